//! The library of functions on a real server: positions, permissions, policies, and what nodes make of its messages.

use std::collections::HashMap;

use anyhow::{Context as _, Result, bail, ensure};
use broker_bridge::{Data, DataKind, EventName, Publication, conformance::Heard, redis::functions};
use redis::{AsyncConnectionConfig, FromRedisValue, RedisError, Value, aio::MultiplexedConnection};
use tidegate_tests::{PATIENCE, eventually::eventually, redis_server::RedisServer};

use crate::stage::{Node, brief, has, room};

/// A connection to a server with the library.
pub struct Library(pub MultiplexedConnection);

/// One entry of a log: its position and its fields.
pub type Entry = (String, HashMap<String, Vec<u8>>);

type Fields = Vec<(String, Vec<u8>)>;

/// A payload, options, and what a node makes of them: a kind and an event.
type Case = (&'static [u8], &'static [&'static str], DataKind, Option<&'static str>);

pub async fn connect(redis: &RedisServer) -> Result<MultiplexedConnection> {
    connect_to(&redis.url()).await
}

pub async fn connect_to(url: &str) -> Result<MultiplexedConnection> {
    let patient = AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
    Ok(redis::Client::open(url)?.get_multiplexed_async_connection_with_config(&patient).await?)
}

impl Library {
    pub async fn on(redis: &RedisServer) -> Result<Self> {
        let mut connection = connect(redis).await?;
        functions::load(&mut connection).await?;
        Ok(Self(connection))
    }

    pub async fn run<T: FromRedisValue>(&mut self, command: &[&str]) -> Result<T, RedisError> {
        self.run_bytes(&command.iter().map(|part| part.as_bytes()).collect::<Vec<_>>()).await
    }

    pub async fn run_bytes<T: FromRedisValue>(&mut self, command: &[&[u8]]) -> Result<T, RedisError> {
        let mut all = redis::Cmd::new();
        all.arg(command);
        all.query_async(&mut self.0).await
    }

    /// Publishes in `room`; returns the position.
    pub async fn publish(
        &mut self,
        room: &str,
        payload: &str,
        options: &[&str],
    ) -> Result<String, RedisError> {
        let log = log(room);
        let command = [&["FCALL", "tidegate_publish", "1", &log, payload], options].concat();
        let (position, repeated): (String, i64) = self.run(&command).await?;
        assert_eq!(repeated, 0, "there is no id");
        Ok(position)
    }

    /// Publishes in `room` with an id; returns the position, and whether the id was known.
    pub async fn publish_once(
        &mut self,
        room: &str,
        id: &str,
        payload: &str,
    ) -> Result<(String, bool), RedisError> {
        let (log, id) = (log(room), format!("{{room:{room}}}:id:{id}"));
        self.run(&["FCALL", "tidegate_publish", "2", &log, &id, payload]).await
    }

    pub async fn entries(&mut self, room: &str) -> Result<Vec<Entry>> {
        let entries: Vec<(String, Fields)> = self.run(&["XRANGE", &log(room), "-", "+"]).await?;
        Ok(entries.into_iter().map(|(id, fields)| (id, fields.into_iter().collect())).collect())
    }

    /// The positions and links of all entries.
    async fn links(&mut self, room: &str) -> Result<Vec<(String, Option<String>)>> {
        let link =
            |mut fields: HashMap<String, Vec<u8>>| fields.remove("p").map(String::from_utf8).transpose();
        self.entries(room).await?.into_iter().map(|(id, fields)| Ok((id, link(fields)?))).collect()
    }
}

pub fn log(room: &str) -> String {
    format!("{{room:{room}}}:log")
}

/// Epoch and offset.
pub fn parts(position: &str) -> (u64, u64) {
    let (epoch, offset) = position.split_once('-').expect("a position has two numbers");
    (epoch.parse().expect("an epoch"), offset.parse().expect("an offset"))
}

/// The code and text of an error.
fn said<T: std::fmt::Debug>(result: Result<T, RedisError>) -> Result<String> {
    let error = match result {
        Ok(answer) => bail!("not refused: {answer:?}"),
        Err(error) => error,
    };
    Ok(format!("{} {}", error.code().unwrap_or("ERR"), error.detail().unwrap_or_default()))
}

#[tokio::test]
async fn messages_get_ascending_positions_and_are_published_under_them() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let mut listening = redis::Client::open(redis.url())?.get_async_pubsub().await?;
    listening.subscribe("room:lobby").await?;
    let mut heard = listening.on_message();

    let mut positions = Vec::new();
    for number in 0..250 {
        let position = library.publish("lobby", &format!("message {number}"), &[]).await?;
        let message = futures_util::StreamExt::next(&mut heard).await.context("a message")?;
        let expected = format!("\u{1}Th{position}\nmessage {number}");
        let mut expected = expected.into_bytes();
        expected[0] = 0xF5;
        ensure!(message.get_payload_bytes() == expected, "{message:?}");
        positions.push(position);
    }
    let (epoch, _) = parts(&positions[0]);
    ensure!(positions.iter().map(|position| parts(position)).eq((1..=250).map(|offset| (epoch, offset))));
    let entries = library.entries("lobby").await?;
    ensure!(entries.iter().map(|(position, _)| position).eq(&positions));
    for (number, (_, fields)) in entries.iter().enumerate() {
        ensure!(fields.len() == 1 && fields["d"] == format!("message {number}").into_bytes(), "{fields:?}");
    }
    // A room with a prefix has a channel and a log of its own.
    let other =
        library.run::<(String, i64)>(&["FCALL", "tidegate_publish", "1", "p:{room:lobby}:log", "x"]).await?;
    ensure!(parts(&other.0).1 == 1);
    Ok(())
}

/// Nodes of this version, which skip the header, decode what the library writes.
#[tokio::test]
async fn nodes_deliver_what_was_published_with_its_kind_and_event() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let (node, lobby) = (Node::up(&redis.url()).await?, room("lobby"));
    node.subscribe(&lobby).await?;
    let (binary, latin) = (&b"\xFF\x00x"[..], &b"\xE9"[..]);
    let envelope = b"\xF5Tg\x01\x00\x03\x01\x01\x00\x00\x00\x00\x02{}";
    let cases: &[Case] = &[
        (b"", &[], DataKind::Text, None),
        (b"hi", &[], DataKind::Text, None),
        ("é日本🎈".as_bytes(), &[], DataKind::Text, None),
        ("é日本🎈\0\r\n".as_bytes(), &["event", "ping"], DataKind::Text, Some("ping")),
        (binary, &[], DataKind::Binary, None),
        (binary, &["event", "é"], DataKind::Binary, Some("é")),
        (b"{}", &["kind", "json"], DataKind::Json, None),
        (b"{}", &["event", "e", "kind", "json", "size", "9"], DataKind::Json, Some("e")),
        (b"{", &["kind", "json"], DataKind::Text, None),
        (b"{}", &["kind", "text"], DataKind::Text, None),
        (b"{}", &["kind", "binary"], DataKind::Binary, None),
        (b"", &["kind", "binary"], DataKind::Binary, None),
        (latin, &["kind", "binary"], DataKind::Binary, None),
        // What could be mistaken for an envelope, a header, or either of them cut short.
        (b"\xF5", &[], DataKind::Binary, None),
        (envelope, &[], DataKind::Binary, None),
        (envelope, &["kind", "binary"], DataKind::Binary, None),
        (b"\xF5Th1-1\nx", &[], DataKind::Binary, None),
    ];
    for (payload, options, ..) in cases {
        let log = log("lobby");
        let mut command: Vec<&[u8]> = vec![b"FCALL", b"tidegate_publish", b"1", log.as_bytes(), payload];
        command.extend(options.iter().map(|option| option.as_bytes()));
        let _: Value =
            library.run_bytes(&command).await.with_context(|| format!("{payload:?} {options:?}"))?;
    }
    // A whole envelope, passed on as it is.
    let log = log("lobby");
    let command: [&[u8]; 7] =
        [b"FCALL", b"tidegate_publish", b"1", log.as_bytes(), envelope, b"envelope", b"1"];
    let _: Value = library.run_bytes(&command).await?;

    let heard = node.heard.wait(&lobby, "all of them", |heard| heard.len() > cases.len()).await;
    let mut expected = Vec::new();
    for (payload, _, kind, event) in cases {
        let data = Data::declare(*kind, payload.to_vec().into()).context("the kind fits")?;
        let event = event.map(EventName::new).transpose()?;
        expected.push(Publication { event, ..Publication::new(data) });
    }
    expected.push(Publication::new(Data::json("{}")?));
    for (heard, expected) in heard.iter().zip(expected) {
        ensure!(*heard == Heard::Publication(expected.clone()), "{heard:?}, not {expected:?}");
    }
    Ok(())
}

#[tokio::test]
async fn invalid_arguments_are_refused_and_nothing_is_written() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let long = "x".repeat(65);
    for (options, words) in [
        (
            &["colour", "red"][..],
            "BADOPTION unknown option 'colour': the options are envelope, event, kind, size, ttl, w",
        ),
        (&["size"], "BADOPTION size: the value is missing"),
        (&["size", "1", "size", "1"], "BADOPTION size: given twice"),
        (&["size", "0"], "BADOPTION size: expected 1 to 4294967295, got '0'"),
        (&["size", "4294967296"], "BADOPTION size"),
        (&["size", "1e3"], "BADOPTION size"),
        (&["size", "0x10"], "BADOPTION size"),
        (&["size", ""], "BADOPTION size"),
        (&["ttl", "0"], "BADOPTION ttl: expected none, or 1 to 3155760000000 milliseconds, got '0'"),
        (&["ttl", "-1"], "BADOPTION ttl"),
        (&["ttl", "9999999999999999"], "BADOPTION ttl"),
        (&["ttl", "never"], "BADOPTION ttl"),
        (&["kind", "xml"], "BADOPTION kind: expected json, text or binary, got 'xml'"),
        (&["event", ""], "BADOPTION event"),
        (&["event", &long], "BADOPTION event: expected 1 to 64 bytes"),
        (&["event", "a\nb"], "BADOPTION event"),
        (&["event", "a\u{85}b"], "BADOPTION event"),
        (&["event", "error"], "BADOPTION event"),
        (&["event", "\u{feff}\u{2003} TideGate.x"], "BADOPTION event"),
        (&["event", "open\u{3000}"], "BADOPTION event"),
        (&["w", ""], "BADOPTION w"),
        (&["w", "a b"], "BADOPTION w"),
        (&["w", &long], "BADOPTION w"),
        (&["envelope", "2"], "BADOPTION envelope: expected 1, got '2'"),
        (&["envelope", "1", "kind", "json"], "BADOPTION envelope: excludes event and kind"),
        (&["a\r\nb\u{e9}", "1"], "BADOPTION unknown option 'a??b??'"),
    ] {
        let refusal = said(library.publish("lobby", "x", options).await)?;
        ensure!(refusal.starts_with(words), "{options:?}: {refusal}");
    }
    let publish = ["FCALL", "tidegate_publish"];
    for (arguments, words) in [
        (&["0"][..], "BADKEY"),
        (&["1", "{room:lobby}:log"], "BADOPTION expected a payload"),
        (&["1", "room:lobby", "x"], "BADKEY expected the key <prefix>{room:<room>}:log, got 'room:lobby'"),
        (&["1", "{room:}:log", "x"], "BADKEY"),
        (&["1", "{room:a b}:log", "x"], "BADKEY"),
        (&["1", "{room:a{b}:log", "x"], "BADKEY"),
        (&["1", "{x}{room:a}:log", "x"], "BADKEY"),
        (&["1", "{room:a}:log2", "x"], "BADKEY"),
        (&["1", "a b{room:a}:log", "x"], "BADKEY"),
        (&["1", &format!("{{room:{}}}:log", "x".repeat(201)), "x"], "BADKEY"),
        (&["1", &format!("{long}{{room:a}}:log"), "x"], "BADKEY"),
        (&["2", "{room:a}:log", "{room:b}:id:1", "x"], "BADKEY expected the key '{room:a}:id:<id>'"),
        (&["2", "{room:a}:log", "{room:a}:id:", "x"], "BADKEY"),
        (&["2", "{room:a}:log", &format!("{{room:a}}:id:{}", "x".repeat(129)), "x"], "BADKEY"),
        (&["3", "{room:a}:log", "{room:a}:id:1", "{room:a}:id:2", "x"], "BADKEY"),
    ] {
        let refusal = said(library.run::<Value>(&[&publish[..], arguments].concat()).await)?;
        ensure!(refusal.starts_with(words), "{arguments:?}: {refusal}");
    }
    let key = log("lobby");
    for kind in ["json", "text"] {
        let command: [&[u8]; 7] =
            [b"FCALL", b"tidegate_publish", b"1", key.as_bytes(), b"\xFF", b"kind", kind.as_bytes()];
        let refusal = said(library.run_bytes::<Value>(&command).await)?;
        ensure!(refusal.contains("its kind must be binary"), "{refusal}");
    }
    let refusal = said(library.run::<Value>(&["FCALL", "tidegate_clear", "1", &key, "size", "1"]).await)?;
    ensure!(refusal.starts_with("BADOPTION unknown option 'size': there are no options"), "{refusal}");
    ensure!(library.run::<i64>(&["DBSIZE"]).await? == 0);
    let published: String = library.run(&["INFO", "commandstats"]).await?;
    ensure!(!published.contains("cmdstat_publish"), "{published}");
    // The bounds themselves are valid.
    library.publish("lobby", "x", &["size", "4294967295", "ttl", "3155760000000", "w", &long[1..]]).await?;
    library.publish(&"x".repeat(200), "x", &["event", &long[1..], "size", "1", "ttl", "1"]).await?;
    Ok(())
}

#[tokio::test]
async fn the_same_id_is_published_once() -> Result<()> {
    let redis = RedisServer::start().await?;
    let (mut one, mut two) = (Library::on(&redis).await?, Library::on(&redis).await?);
    let (node, lobby) = (Node::up(&redis.url()).await?, room("lobby"));
    node.subscribe(&lobby).await?;
    let (first, repeated) = one.publish_once("lobby", "b:1", "first").await?;
    ensure!(!repeated);
    // On another connection, after other messages, and whatever the payload is.
    two.publish("lobby", "between", &[]).await?;
    ensure!(two.publish_once("lobby", "b:1", "again").await? == (first.clone(), true));
    let (next, repeated) = two.publish_once("lobby", "b:2", "another id").await?;
    ensure!(!repeated && parts(&next) == (parts(&first).0, 3));
    let (other, repeated) = two.publish_once("other", "b:1", "another room").await?;
    ensure!(!repeated && parts(&other).1 == 1);
    ensure!(one.publish_once("lobby", "b:1", "again").await? == (first, true));
    let heard = node.heard.wait(&lobby, "the last", has("another id")).await;
    ensure!(brief(&heard) == ["first", "between", "another id"], "{heard:?}");
    ensure!(one.entries("lobby").await?.len() == 3);
    let left: i64 = one.run(&["PTTL", "{room:lobby}:id:b:1"]).await?;
    ensure!((60_000..=120_000).contains(&left), "{left}");
    Ok(())
}

#[tokio::test]
async fn a_history_keeps_its_size_and_outlives_its_newest_message_by_its_ttl() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let (lobby, last) = (log("lobby"), log("last"));
    for number in 0..1000 {
        let options: &[&str] = if number == 0 { &["size", "100", "ttl", "80000"] } else { &[] };
        library.publish("lobby", &number.to_string(), options).await?;
    }
    let length: usize = library.run(&["XLEN", &lobby]).await?;
    ensure!((100..300).contains(&length), "remembered: {length}");
    let entries = library.entries("lobby").await?;
    ensure!(entries.last().is_some_and(|(_, fields)| fields["d"] == b"999"));
    let left: i64 = library.run(&["PTTL", &lobby]).await?;
    ensure!((70_000..=90_000).contains(&left), "remembered: {left}");

    // Once an eighth has passed, the next message renews it.
    library.publish("short", "x", &["ttl", "60000"]).await?;
    library.publish("short", "x", &["ttl", "1600"]).await?;
    eventually("renewed", async || {
        let before: i64 = library.run(&["PTTL", &log("short")]).await.map_err(|error| error.to_string())?;
        library.publish("short", "x", &[]).await.map_err(|error| error.to_string())?;
        let after: i64 = library.run(&["PTTL", &log("short")]).await.map_err(|error| error.to_string())?;
        // A key that has expired is no longer there.
        if before > 0 && after > before && after <= 1800 {
            Ok(())
        } else {
            Err(format!("{before}, then {after}"))
        }
    })
    .await?;

    // The last value for good.
    for number in 0..500 {
        library.publish("last", &number.to_string(), &["size", "1", "ttl", "none"]).await?;
    }
    ensure!(library.run::<i64>(&["PTTL", &last]).await? == -1);
    ensure!(library.run::<usize>(&["XLEN", &last]).await? <= 200);
    ensure!(library.entries("last").await?.last().is_some_and(|(_, fields)| fields["d"] == b"499"));
    library.publish("last", "x", &["ttl", "60000"]).await?;
    ensure!(library.run::<i64>(&["PTTL", &last]).await? > 0);
    library.publish("last", "x", &["ttl", "none"]).await?;
    ensure!(library.run::<i64>(&["PTTL", &last]).await? == -1);

    // The defaults.
    library.publish("plain", "x", &[]).await?;
    let left: i64 = library.run(&["PTTL", &log("plain")]).await?;
    ensure!((600_000..=675_000).contains(&left), "{left}");
    Ok(())
}

#[tokio::test]
async fn the_policy_survives_what_the_library_forgets() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    library.publish("lobby", "x", &["size", "7", "ttl", "none"]).await?;
    let _: Value = library.run(&["FUNCTION", "FLUSH"]).await?;
    functions::load(&mut library.0).await?;
    for _ in 0..500 {
        library.publish("lobby", "x", &[]).await?;
    }
    ensure!(library.run::<i64>(&["PTTL", &log("lobby")]).await? == -1);
    ensure!(library.run::<usize>(&["XLEN", &log("lobby")]).await? <= 207);
    let groups: Vec<HashMap<String, Value>> = library.run(&["XINFO", "GROUPS", &log("lobby")]).await?;
    ensure!(groups.len() == 1, "{groups:?}");
    Ok(())
}

#[tokio::test]
async fn an_opened_room_has_a_position_before_its_first_message() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let lobby = log("lobby");
    let open = ["FCALL", "tidegate_open", "1", &lobby];
    let opened: String = library.run(&[&open[..], &["ttl", "60000"]].concat()).await?;
    let (epoch, offset) = parts(&opened);
    ensure!(offset == 0);
    let left: i64 = library.run(&["PTTL", &lobby]).await?;
    ensure!((60_000..=67_500).contains(&left), "{left}");
    ensure!(library.run::<String>(&open).await? == opened);
    let _: Value = library.run(&["PEXPIRE", &lobby, "5000"]).await?;
    ensure!(library.run::<String>(&[&open[..], &["ttl", "60000"]].concat()).await? == opened);
    ensure!(library.run::<i64>(&["PTTL", &lobby]).await? <= 5000, "listeners do not prolong a history");
    ensure!(library.run::<String>(&[&open[..], &["ttl", "none"]].concat()).await? == opened);
    ensure!(library.run::<i64>(&["PTTL", &lobby]).await? == -1, "a new policy applies at once");
    ensure!(parts(&library.publish("lobby", "first", &[]).await?) == (epoch, 1));
    ensure!(parts(&library.run::<String>(&open).await?) == (epoch, 1));
    ensure!(library.links("lobby").await? == [(format!("{epoch}-1"), None)]);
    Ok(())
}

#[tokio::test]
async fn a_cleared_history_is_empty_and_counts_on() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let lobby = log("lobby");
    for _ in 0..3 {
        library.publish("lobby", "x", &["ttl", "none"]).await?;
    }
    let cleared: String = library.run(&["FCALL", "tidegate_clear", "1", &lobby]).await?;
    let (epoch, offset) = parts(&cleared);
    ensure!(offset == 3 && library.entries("lobby").await?.is_empty());
    ensure!(library.run::<i64>(&["PTTL", &lobby]).await? == -1);
    ensure!(parts(&library.publish("lobby", "x", &[]).await?) == (epoch, 4));
    // Also when the library has forgotten the room.
    let _: Value = library.run(&["FCALL", "tidegate_clear", "1", &lobby]).await?;
    let _: Value = library.run(&["FUNCTION", "FLUSH"]).await?;
    functions::load(&mut library.0).await?;
    ensure!(parts(&library.publish("lobby", "x", &[]).await?) == (epoch, 5));
    ensure!(library.links("lobby").await? == [(format!("{epoch}-5"), None)]);
    Ok(())
}

/// A user without one of the permissions gets an error, and nothing has happened.
#[tokio::test]
async fn a_user_without_a_permission_changes_nothing() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let documented = documented_user()?;
    let commands: Vec<&str> = documented.split_whitespace().filter(|word| word.starts_with('+')).collect();
    let mut crippled: Vec<Vec<String>> =
        commands.iter().map(|command| vec![command.replacen('+', "-", 1)]).collect();
    let again = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    crippled.push(again(&["resetchannels", "&room:else"]));
    crippled.push(again(&["resetkeys", "~{room:else}:log"]));
    crippled.push(again(&["resetkeys", "%R~*"]));
    let mut refusals = 0;
    for (number, rules) in crippled.iter().enumerate() {
        let mut acl = vec!["ACL", "SETUSER"];
        acl.extend(documented.split_whitespace());
        let _: Value = library.run(&acl).await?;
        let mut acl = vec!["ACL", "SETUSER", "orders"];
        acl.extend(rules.iter().map(String::as_str));
        let _: Value = library.run(&acl).await?;
        let mut limited =
            Library(connect_to(&redis.url().replace("redis://", "redis://orders:secret@")).await?);
        let room = format!("orders:{number}");
        let mut channel = redis::Client::open(redis.url())?.get_async_pubsub().await?;
        channel.subscribe(format!("room:{room}")).await?;
        // What happens first: creating the log, appending to it, or a new policy.
        for step in ["create", "append", "policy"] {
            if step != "create" {
                library.publish(&room, "by an administrator", &["ttl", "60000"]).await?;
            }
            let before = library.entries(&room).await?;
            let options: &[&str] = if step == "policy" { &["size", "5", "ttl", "none"] } else { &[] };
            let (log, id) = (log(&room), format!("{{room:{room}}}:id:b:{step}"));
            let command = [&["FCALL", "tidegate_publish", "2", &log, &id, step], options].concat();
            match limited.run::<Value>(&command).await {
                Ok(_) => ensure!(library.entries(&room).await?.len() == before.len() + 1),
                Err(error) => {
                    refusals += 1;
                    ensure!(error.code() == Some("NOPERM"), "{rules:?} {step}: {error}");
                    ensure!(library.entries(&room).await? == before, "{rules:?} {step}: {error}");
                    ensure!(!library.run::<bool>(&["EXISTS", &id]).await?, "{rules:?} {step}: {error}");
                    let published: i64 = library.run(&["PUBLISH", &format!("room:{room}"), "end"]).await?;
                    ensure!(published == 1);
                    let mut heard = channel.on_message();
                    loop {
                        let payload = futures_util::StreamExt::next(&mut heard).await.context("a message")?;
                        let payload = String::from_utf8_lossy(payload.get_payload_bytes()).into_owned();
                        ensure!(
                            !payload.ends_with(&format!("\n{step}")),
                            "{rules:?} {step}: published, and then {error}"
                        );
                        if payload == "end" {
                            break;
                        }
                    }
                }
            }
        }
    }
    // Exactly these are not needed in every call: of three steps each.
    ensure!(refusals >= 2 * crippled.len(), "{refusals}");
    Ok(())
}

/// The user of `gateway/docs/backends.md`: its name, and the rules.
fn documented_user() -> Result<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../gateway/docs/backends.md");
    let text = std::fs::read_to_string(path)?;
    let (_, rest) = text.split_once("```acl\nuser ").context("a user in the document")?;
    let (user, _) = rest.split_once("```").context("its end")?;
    Ok(user.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[tokio::test]
async fn the_documented_permissions_are_enough() -> Result<()> {
    let redis = RedisServer::builder().setting(&format!("user {} on", documented_user()?)).start().await?;
    let mut admin = Library::on(&redis).await?;
    let mut backend = Library(connect_to(&redis.url().replace("redis://", "redis://orders:secret@")).await?);
    let lobby = log("orders");
    for options in
        [&[][..], &["size", "5", "ttl", "9"], &["size", "5", "ttl", "none"], &["kind", "json", "event", "e"]]
    {
        backend.publish("orders", "{}", options).await?;
    }
    let (position, _) = backend.publish_once("orders:1", "b:1", "x").await?;
    ensure!(backend.publish_once("orders:1", "b:1", "x").await? == (position, true));
    // A fence, and a log that was deleted.
    let _: Value = admin.run(&["DEL", &lobby]).await?;
    backend.publish("orders", "x", &[]).await?;
    let denied: Vec<HashMap<String, Value>> = admin.run(&["ACL", "LOG"]).await?;
    ensure!(denied.is_empty(), "{denied:?}");
    let refusal = said(backend.publish("other", "x", &[]).await)?;
    ensure!(refusal.starts_with("NOPERM"), "{refusal}");
    // As the document says.
    let refusal = said(backend.run::<Value>(&["FCALL", "tidegate_clear", "1", &lobby]).await)?;
    ensure!(refusal.starts_with("NOPERM"), "{refusal}");
    let _: Value = admin.run(&["ACL", "SETUSER", "orders", "+xtrim", "+xsetid"]).await?;
    let _: Value = backend.run(&["FCALL", "tidegate_clear", "1", &lobby]).await?;
    let _: Value = backend.run(&["FCALL", "tidegate_clear", "1", "{room:orders:new}:log"]).await?;
    Ok(())
}

#[tokio::test]
async fn without_memory_a_call_is_refused_whole_and_plain_messages_pass() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let (node, lobby) = (Node::up(&redis.url()).await?, room("lobby"));
    node.subscribe(&lobby).await?;
    library.publish("lobby", "before", &[]).await?;
    let _: Value =
        library.run(&["CONFIG", "SET", "maxmemory-policy", "noeviction", "maxmemory", "1"]).await?;
    let refusal = said(library.publish_once("lobby", "b:1", "refused").await)?;
    ensure!(refusal.starts_with("OOM"), "{refusal}");
    let _: i64 = library.run(&["PUBLISH", "room:lobby", "plain"]).await?;
    ensure!(library.entries("lobby").await?.len() == 1 && library.run::<i64>(&["DBSIZE"]).await? == 1);
    let _: Value = library.run(&["CONFIG", "SET", "maxmemory", "0"]).await?;
    let (position, repeated) = library.publish_once("lobby", "b:1", "after").await?;
    ensure!(!repeated && parts(&position).1 == 2);
    let heard = node.heard.wait(&lobby, "the last", has("after")).await;
    ensure!(brief(&heard) == ["before", "plain", "after"], "{heard:?}");
    Ok(())
}

#[tokio::test]
async fn foreign_data_under_the_key_do_not_stop_delivery() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let (node, lobby) = (Node::up(&redis.url()).await?, room("lobby"));
    node.subscribe(&lobby).await?;
    let key = log("lobby");
    let end = "18446744073709551615-18446744073709551615";
    // Not before 2048.
    let many = format!("9000000000001111835-{}", u64::MAX);
    for foreign in [
        &["SET", &key, "x"][..],
        &["RPUSH", &key, "x"],
        &["XADD", &key, end, "d", "x"],
        &["XADD", &key, &many, "d", "x"],
    ] {
        let _: Value = library.run(&["DEL", &key]).await?;
        // A log that the library knows, and one that it does not.
        for known in [true, false] {
            if known {
                library.publish("lobby", "kept", &[]).await?;
                let _: Value = library.run(&["DEL", &key]).await?;
                let _: Value = library.run(foreign).await?;
            }
            let before: Option<Vec<u8>> = library.run(&["DUMP", &key]).await?;
            ensure!(library.publish("lobby", "live", &[]).await?.is_empty(), "{foreign:?}");
            ensure!(library.publish_once("lobby", "b:1", "once").await?.0.is_empty());
            ensure!(library.publish_once("lobby", "b:1", "once").await?.1);
            let _: Value = library.run(&["DEL", "{room:lobby}:id:b:1"]).await?;
            for function in ["tidegate_open", "tidegate_clear"] {
                let refusal = said(library.run::<Value>(&["FCALL", function, "1", &key]).await)?;
                ensure!(refusal.starts_with("BADLOG"), "{refusal}");
            }
            ensure!(library.run::<Option<Vec<u8>>>(&["DUMP", &key]).await? == before);
            let _: Value = library.run(&["FUNCTION", "FLUSH"]).await?;
            functions::load(&mut library.0).await?;
        }
    }
    let _: Value = library.run(&["DEL", &key]).await?;
    library.publish("lobby", "end", &[]).await?;
    let heard = node.heard.wait(&lobby, "the last", has("end")).await;
    let expected = ["kept", "live", "once", "live", "once"].into_iter().cycle().take(20).chain(["end"]);
    ensure!(brief(&heard).iter().map(String::as_str).eq(expected), "{heard:?}");
    Ok(())
}

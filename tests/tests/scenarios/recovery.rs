//! Rooms with a history in the Centrifuge protocol: clients that come back recover what they have missed.

#![allow(clippy::indexing_slicing, reason = "a panic is a failed test")]

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::{
    client::Client,
    fault_proxy::{FaultProxy, Target, Which},
    journal::{Journal, Message, Payload},
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    redis_server::RedisServer,
    token::{Token, anywhere},
};

use crate::history::{data, on, publish, publishing, recording};

const PATH: &str = "/connection/websocket";

/// Two clients of each published SDK in the room, at this address.
async fn sdks(address: std::net::SocketAddr, token: &str) -> Result<Vec<Client>> {
    let url = format!("ws://{address}{PATH}");
    let mut clients = Vec::new();
    for _ in 0..2 {
        clients.push(Client::node_centrifuge(&url, "kept:a", &[token]).await?);
        clients.push(Client::python_centrifuge(&url, "kept:a", &[token]).await?);
    }
    Ok(clients)
}

/// What the SDK said each time it came back: whether it recovered.
fn recoveries(journal: &Journal) -> Vec<bool> {
    let events = journal.messages.iter().filter(|message| message.event == "recovered");
    events.map(|message| message.payload == Payload::text("true")).collect()
}

fn heard(messages: &[Message]) -> impl Iterator<Item = u32> {
    messages.iter().filter_map(data)
}

/// Waits until each client has received the last of `0..sent`, and checks that it has received all of them once and in
/// order, and has always recovered.
async fn ensure_exact(clients: &[Client], sent: u32, least: usize) -> Result<()> {
    for client in clients {
        let journal =
            client.until("the last", |journal| heard(&journal.messages).any(|n| n + 1 == sent)).await?;
        ensure!(heard(&journal.messages).eq(0..sent), "{client:?}");
        let recoveries = recoveries(&journal);
        ensure!(recoveries.len() >= least && recoveries.iter().all(|recovered| *recovered), "{recoveries:?}");
        ensure!(journal.end.is_none(), "{client:?}");
    }
    Ok(())
}

#[tokio::test]
async fn sdks_that_reconnect_under_load_miss_nothing() -> Result<()> {
    const CUTS: usize = 5;
    let node = recording().start().await?;
    let token = anywhere("alice");
    let door = FaultProxy::to(Target::Tcp(node.public)).await?;
    // Each has its position before the first message.
    let clients = sdks(door.address(), &token).await?;
    let cut = async {
        for cut in 1..=CUTS {
            let before = heard(&clients[0].now().messages).count();
            clients[0].until("more", |journal| heard(&journal.messages).count() > before + 30).await?;
            door.cut(&Which::All);
            for client in &clients {
                client.until("the next subscription", |journal| journal.opened > cut).await?;
            }
        }
        Ok(())
    };
    let (sent, ()) = publishing(&node, &token, cut).await?;
    ensure_exact(&clients, sent, CUTS).await?;
    node.ensure_sound()
}

#[tokio::test]
async fn sdks_of_a_node_that_dies_recover_on_another_one() -> Result<()> {
    let redis = RedisServer::start().await?;
    let (mut first, second) = (on(&redis).await?, on(&redis).await?);
    let token = anywhere("alice");
    let door = FaultProxy::to(Target::Tcp(first.public)).await?;
    let clients = sdks(door.address(), &token).await?;
    let moving = async {
        clients[0].until("some", |journal| heard(&journal.messages).count() > 50).await?;
        door.retarget(Target::Tcp(second.public));
        first.kill().await?;
        for client in &clients {
            client.until("the next subscription", |journal| journal.opened > 1).await?;
        }
        Ok(())
    };
    let (sent, ()) = publishing(&second, &token, moving).await?;
    ensure_exact(&clients, sent, 1).await?;
    let reads = second.samples().await?.sum("tidegate_history_resumptions_total", &[r#"from="log""#]);
    ensure!(reads <= 2, "{reads} readings of the log for {} clients", clients.len());
    second.ensure_sound()
}

/// Each of three nodes is drained and replaced, one after the other, while messages are published.
#[tokio::test]
async fn a_rolling_restart_of_all_nodes_costs_nothing() -> Result<()> {
    let redis = RedisServer::start().await?;
    let builder = recording()
        .set("broker.url", &redis.url())
        .set("drain.pause", "0s")
        .set("drain.window", "200ms")
        .set("sse.retry", "50ms");
    let mut nodes = [builder.start().await?, builder.start().await?, builder.start().await?];
    let publisher = builder.start().await?;
    let token = anywhere("alice");
    let door = FaultProxy::to(Target::Tcp(nodes[0].public)).await?;
    let events = nodes[0].url("kept:a", &token, "");
    let events = events.replace(&nodes[0].public.to_string(), &door.address().to_string());
    let clients = sdks(door.address(), &token).await?;
    let sources = [
        Client::node_events(&events, &["tidegate.gap"]).await?,
        Client::node_events(&events, &["tidegate.gap"]).await?,
    ];
    let everybody: Vec<_> = clients.iter().chain(&sources).collect();
    let count = nodes.len();
    let rolling = async {
        for index in 0..count {
            let before = heard(&clients[0].now().messages).count();
            clients[0].until("more", |journal| heard(&journal.messages).count() > before + 20).await?;
            door.retarget(Target::Tcp(nodes[(index + 1) % count].public));
            nodes[index].terminate()?;
            let status = nodes[index].exited().await?;
            ensure!(status.success(), "{status}");
            nodes[index] = builder.start().await?;
            for client in &everybody {
                client.until("the next session", |journal| journal.opened > index + 1).await?;
            }
        }
        Ok(())
    };
    let (sent, ()) = publishing(&publisher, &token, rolling).await?;
    ensure_exact(&clients, sent, count).await?;
    for source in &sources {
        let journal =
            source.until("the last", |journal| heard(&journal.messages).any(|n| n + 1 == sent)).await?;
        ensure!(journal.messages.len() == sent as usize, "a gap: {source:?}");
        ensure!(heard(&journal.messages).eq(0..sent), "{source:?}");
    }
    publisher.ensure_sound()
}

/// The node reads from the log what its clients have missed: they notice nothing.
#[tokio::test]
async fn lost_receiving_connections_cost_sdks_nothing() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = on(&redis).await?;
    let token = anywhere("alice");
    let clients = sdks(node.public, &token).await?;
    let cut = async {
        for round in 0..3 {
            let before = heard(&clients[0].now().messages).count();
            clients[0].until("more", |journal| heard(&journal.messages).count() > before + 20).await?;
            redis.cli(&["CLIENT", "KILL", "TYPE", "pubsub"], b"").await?;
            node.until_samples("the interruption", |samples| {
                samples.sum("tidegate_broker_interruptions_total", &[]) > round
            })
            .await?;
        }
        Ok(())
    };
    let (sent, ()) = publishing(&node, &token, cut).await?;
    ensure_exact(&clients, sent, 0).await?;
    for client in &clients {
        let journal = client.now();
        ensure!((journal.opened, journal.interrupted) == (1, 0), "{client:?}");
    }
    node.ensure_sound()
}

/// Redis acknowledges before it writes to disk: nobody knows whether something is missing after a restart, and each client
/// is told so, once. What comes then is complete.
#[tokio::test]
async fn a_restart_of_redis_is_told_to_sdks_once() -> Result<()> {
    let builder = RedisServer::builder().setting("appendonly yes").setting("appendfsync always");
    let mut redis = builder.start().await?;
    let node = on(&redis).await?;
    let token = anywhere("alice");
    let door = FaultProxy::to(Target::Tcp(node.public)).await?;
    let clients = sdks(door.address(), &token).await?;
    let restart = async {
        clients[0].until("some", |journal| heard(&journal.messages).count() > 50).await?;
        redis.restart().await?;
        for client in &clients {
            client.until("the news", |journal| recoveries(journal) == [false]).await?;
        }
        let before = heard(&clients[0].now().messages).count();
        clients[0].until("more", |journal| heard(&journal.messages).count() > before + 50).await?;
        // Its position in the new epoch is worth as much as that in the old one.
        door.cut(&Which::All);
        for client in &clients {
            client.until("a recovery", |journal| recoveries(journal).len() > 1).await?;
        }
        Ok(())
    };
    let (sent, ()) = publishing(&node, &token, restart).await?;
    for client in &clients {
        let journal =
            client.until("the last", |journal| heard(&journal.messages).any(|n| n + 1 == sent)).await?;
        ensure!(recoveries(&journal) == [false, true], "{client:?}");
        let told = journal.messages.iter().position(|message| message.event == "recovered");
        let (before, after) = journal.messages.split_at(told.context("told")?);
        let (before, after): (Vec<_>, Vec<_>) = (heard(before).collect(), heard(after).collect());
        ensure!(before.iter().copied().eq(0..u32::try_from(before.len())?), "{client:?}");
        let from = *after.first().context("something after it")?;
        ensure!(from as usize >= before.len() && after.iter().copied().eq(from..sent), "{client:?}");
    }
    node.ensure_sound()
}

/// The log is deleted under the members. They have received everything, so nothing is missing; but it begins anew, with
/// another epoch and the offsets from before. The SDKs get the new epoch with a new subscription.
#[tokio::test]
async fn a_log_that_begins_anew_costs_sdks_nothing() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = on(&redis).await?;
    let token = anywhere("alice");
    let door = FaultProxy::to(Target::Tcp(node.public)).await?;
    let clients = sdks(door.address(), &token).await?;
    publish(&node, &token, 0..10).await?;
    for client in &clients {
        client.until("the first", |journal| heard(&journal.messages).count() == 10).await?;
    }
    redis.cli(&["DEL", "{room:kept:a}:log"], b"").await?;
    publish(&node, &token, 10..13).await?;
    for client in &clients {
        client.until("the rest", |journal| heard(&journal.messages).count() == 13).await?;
        ensure!(recoveries(&client.now()) == [true], "{client:?}");
    }
    // Its third message: the old log had one with the same offset.
    door.cut(&Which::All);
    publish(&node, &token, 13..16).await?;
    ensure_exact(&clients, 16, 2).await?;
    node.ensure_sound()
}

/// A session by hand, with its next request.
pub struct Session {
    socket: RawSocket,
    next: u32,
}

impl Session {
    pub async fn open(node: &Node) -> Result<Self> {
        Self::open_as(node, &Token::new("alice").room("*", &["subscribe", "history"]).sign()).await
    }

    async fn open_as(node: &Node, token: &str) -> Result<Self> {
        let mut session = Self { socket: RawSocket::connect(node.public, PATH).await?, next: 1 };
        session.ask("connect", json!({ "token": token })).await?;
        Ok(session)
    }

    async fn receive(&mut self) -> Result<Value> {
        let received = self.socket.receive().await?.context("a message")?;
        serde_json::from_slice(&received.payload).with_context(|| format!("{received:?}"))
    }

    /// Sends a command and does not wait for its reply.
    pub async fn send(&mut self, command: &Value) -> Result<()> {
        self.socket.send(&Frame::text(command.to_string())).await
    }

    /// Sends a command, and returns its reply.
    pub async fn ask(&mut self, method: &str, what: Value) -> Result<Value> {
        let id = self.next;
        self.next += 1;
        let command = json!({ "id": id, method: what });
        self.send(&command).await?;
        let mut reply = self.receive().await?;
        ensure!(reply["id"] == id, "{reply} for {command}");
        Ok(if reply.get("error").is_some() { reply["error"]["code"].take() } else { reply[method].take() })
    }

    /// Subscribes, and returns the reply without who has published what is in it.
    async fn subscribe(&mut self, more: Value) -> Result<Value> {
        let mut what = json!({ "channel": "kept:a" });
        if let (Some(what), Value::Object(more)) = (what.as_object_mut(), more) {
            what.extend(more);
        }
        let mut reply = self.ask("subscribe", what).await?;
        for publication in reply.get_mut("publications").and_then(Value::as_array_mut).into_iter().flatten() {
            publication.as_object_mut().and_then(|publication| publication.remove("info"));
        }
        Ok(reply)
    }
}

#[tokio::test]
async fn a_position_that_nobody_knows_is_not_recovered_and_then_life_goes_on() -> Result<()> {
    let redis = RedisServer::start().await?;
    nobody_knows(&on(&redis).await?).await?;
    nobody_knows(&recording().start().await?).await
}

async fn nobody_knows(node: &Node) -> Result<()> {
    let token = anywhere("alice");
    let begun = Session::open(node).await?.subscribe(json!({})).await?;
    let epoch = begun["epoch"].as_str().context("an epoch")?.to_owned();
    ensure!(
        begun == json!({ "recoverable": true, "positioned": true, "epoch": epoch, "offset": 0 }),
        "{begun}"
    );
    publish(node, &token, 0..5).await?;
    let most = u64::MAX;
    for since in [
        json!({ "epoch": "1", "offset": 1 }),
        json!({ "epoch": "x", "offset": 1 }),
        json!({ "epoch": "0", "offset": 3 }),
        json!({ "epoch": "", "offset": 0 }),
        json!({}),
        json!({ "epoch": most.to_string(), "offset": most }),
        json!({ "epoch": epoch, "offset": 6 }),
        json!({ "epoch": epoch, "offset": most }),
    ] {
        let mut asked = since.clone();
        asked["recover"] = true.into();
        let mut session = Session::open(node).await?;
        let reply = session.subscribe(asked.clone()).await?;
        let expected = json!({
            "recoverable": true, "positioned": true, "epoch": epoch, "offset": 5,
            "was_recovering": true, "recovered": false,
        });
        ensure!(reply == expected, "{reply} for {since}");
        session.ask("unsubscribe", json!({ "channel": "kept:a" })).await?;
        // Unless it would rather fail.
        asked["flag"] = 2.into();
        ensure!(session.subscribe(asked).await? == 112, "{since}");
        ensure!(session.subscribe(json!({})).await?["offset"] == 5);
    }
    let mut session = Session::open(node).await?;
    session.subscribe(json!({ "recover": true, "epoch": "1", "offset": 1 })).await?;
    publish(node, &token, 5..6).await?;
    let push = session.receive().await?;
    ensure!(push["push"]["pub"]["offset"] == 6 && push["push"]["pub"]["data"] == 5, "{push}");
    node.ensure_sound()
}

/// The reply holds what fits into it. The rest follows, and then what is published.
#[tokio::test]
async fn what_does_not_fit_into_the_reply_follows_it() -> Result<()> {
    const ALL: u32 = 256;
    let small = |builder: Builder| builder.set("limits.outbound", "64KiB").set("limits.message_size", "8KiB");
    let node = small(recording()).start().await?;
    let token = anywhere("alice");
    let epoch = Session::open(&node).await?.subscribe(json!({})).await?["epoch"].take();
    let text = |number: u32| format!("{number:04}{}", "\u{1}".repeat(500));
    for number in 0..ALL {
        node.post("kept:a", &token, "text/plain", text(number).as_bytes()).await?;
    }
    for offset in [0, 1, ALL - 20, ALL - 1, ALL] {
        let mut session = Session::open(&node).await?;
        let reply = session.subscribe(json!({ "recover": true, "epoch": epoch, "offset": offset })).await?;
        ensure!(
            reply["recovered"] == true && reply["offset"] == offset && reply["epoch"] == epoch,
            "{reply}"
        );
        let held = reply["publications"].as_array().cloned().unwrap_or_default();
        let fits = 64 * 1024 / 4;
        ensure!(reply.to_string().len() <= fits, "{} bytes", reply.to_string().len());
        ensure!(held.len() >= (ALL - offset).min(4) as usize, "{} publications", held.len());
        let mut publications = held;
        node.post("kept:a", &token, "text/plain", text(ALL).as_bytes()).await?;
        let expected: Vec<_> = (offset..ALL).map(|number| (number + 1, text(number))).collect();
        let mut received = Vec::new();
        loop {
            for publication in publications.drain(..) {
                let text = publication["data"].as_str().context("a text")?.to_owned();
                received.push((u32::try_from(publication["offset"].as_u64().context("an offset")?)?, text));
            }
            if received.last().is_some_and(|(_, last)| *last == text(ALL)) {
                break;
            }
            let frame = session.socket.receive().await?.context("a message")?;
            for line in frame.payload.split(|byte| *byte == b'\n') {
                let mut push: Value = serde_json::from_slice(line)?;
                publications.push(push["push"]["pub"].take());
            }
        }
        let (last, _) = received.pop().context("the last")?;
        ensure!(last > ALL);
        // What the other rounds have published after the history.
        received.retain(|(_, received)| *received != text(ALL));
        ensure!(received == expected, "after {offset}: {} of {}", received.len(), expected.len());
    }
    node.ensure_sound()
}

impl Session {
    /// The numbers in a part of the history, or the code of the error.
    pub async fn history(&mut self, more: Value) -> Result<Result<Vec<u64>, Value>> {
        let mut what = json!({ "channel": "kept:a" });
        if let (Some(what), Value::Object(more)) = (what.as_object_mut(), more) {
            what.extend(more);
        }
        let reply = self.ask("history", what).await?;
        let Some(publications) = reply["publications"].as_array() else { return Ok(Err(reply)) };
        let number = |publication: &Value| publication["data"].as_u64().context("a number");
        publications.iter().map(number).collect::<Result<_>>().map(Ok)
    }
}

#[tokio::test]
async fn any_part_of_a_history_can_be_read() -> Result<()> {
    let redis = RedisServer::start().await?;
    read_parts(&on(&redis).await?).await?;
    read_parts(&recording().start().await?).await
}

async fn read_parts(node: &Node) -> Result<()> {
    let reader = Token::new("reader").room("kept:*", &["history"]).room("lobby", &["history"]).sign();
    let mut session = Session::open_as(node, &reader).await?;
    // Nobody was ever in the room.
    let begun = session.ask("history", json!({ "channel": "kept:a" })).await?;
    let epoch = begun["epoch"].as_str().context("an epoch")?.to_owned();
    ensure!(begun == json!({ "publications": [], "epoch": epoch, "offset": 0 }), "{begun}");

    publish(node, &anywhere("alice"), 0..20).await?;
    let position = session.ask("history", json!({ "channel": "kept:a", "limit": 0 })).await?;
    ensure!(position == json!({ "publications": [], "epoch": epoch, "offset": 20 }), "{position}");
    let since = |offset: u64| json!({ "epoch": epoch, "offset": offset });
    let forwards = |from: u64, to: u64| Ok((from..to).collect::<Vec<_>>());
    let backwards = |from: u64, to: u64| Ok((to..from).rev().collect::<Vec<_>>());
    let lost: Result<Vec<u64>, Value> = Err(json!(112));
    for (asked, expected) in [
        (json!({}), forwards(0, 0)),
        (json!({ "limit": -1 }), forwards(0, 20)),
        (json!({ "limit": 2_000_000_000 }), forwards(0, 20)),
        (json!({ "limit": 5 }), forwards(0, 5)),
        (json!({ "limit": 5, "since": { "epoch": "", "offset": 0 } }), forwards(0, 5)),
        (json!({ "limit": 5, "reverse": true }), backwards(20, 15)),
        (json!({ "limit": 3, "since": since(7) }), forwards(7, 10)),
        (json!({ "limit": 3, "since": since(0) }), forwards(0, 3)),
        (json!({ "limit": 30, "since": since(19) }), forwards(19, 20)),
        (json!({ "limit": 30, "since": since(20) }), forwards(20, 20)),
        (json!({ "limit": 3, "since": since(7), "reverse": true }), backwards(6, 3)),
        (json!({ "limit": 9, "since": since(4), "reverse": true }), backwards(3, 0)),
        (json!({ "limit": 9, "since": since(1), "reverse": true }), backwards(0, 0)),
        (json!({ "limit": 1, "since": since(21) }), lost.clone()),
        (json!({ "limit": 1, "since": since(21), "reverse": true }), lost.clone()),
        (json!({ "limit": 0, "since": { "epoch": "1", "offset": 3 } }), lost.clone()),
        (json!({ "limit": 1, "since": { "epoch": "x", "offset": 3 } }), lost.clone()),
        (json!({ "limit": 1, "since": { "epoch": "x", "offset": 3 }, "reverse": true }), lost),
    ] {
        ensure!(session.history(asked.clone()).await? == expected, "{asked}");
    }
    // A room without a history.
    ensure!(session.ask("history", json!({ "channel": "lobby" })).await? == 108);
    ensure!(session.ask("history", json!({ "channel": "else" })).await? == 103);
    node.ensure_sound()
}

/// Whoever has published something finds it, whatever is under way.
#[tokio::test]
async fn a_history_holds_what_was_acknowledged_before_it_was_asked_for() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = on(&redis).await?;
    let last = json!({ "limit": 1, "reverse": true });
    let mut sessions = futures_util::future::try_join_all((0..40).map(|_| Session::open(&node))).await?;
    for round in 1..=20_u64 {
        publish(&node, &anywhere("alice"), u32::try_from(round)?..u32::try_from(round)? + 1).await?;
        let reads = sessions.iter_mut().map(|session| session.history(last.clone()));
        for read in futures_util::future::try_join_all(reads).await? {
            let read = read.map_err(|code| anyhow::anyhow!("error {code}"))?;
            ensure!(read == [round], "{read:?} in round {round}");
        }
    }
    node.ensure_sound()
}

/// A client asks for far more than its queue holds, and does not read. It gets everything in the end, and nobody takes it
/// for slow.
#[tokio::test]
async fn a_client_that_asks_for_much_history_gets_it_one_after_the_other() -> Result<()> {
    const ASKS: u32 = 100;
    const TEXTS: u64 = 100;
    let node =
        recording().set("limits.outbound", "64KiB").set("limits.message_size", "16KiB").start().await?;
    for number in 0..TEXTS {
        let text = format!("{number:03}{}", "x".repeat(997));
        node.post("kept:a", &anywhere("alice"), "text/plain", text.as_bytes()).await?;
    }
    let mut session = Session::open(&node).await?;
    session.subscribe(json!({})).await?;
    let ask = |id: u32| json!({ "id": id, "history": { "channel": "kept:a", "limit": TEXTS } }).to_string();
    let all: Vec<_> = (1000..1000 + ASKS).map(ask).collect();
    session.socket.send(&Frame::text(all.join("\n"))).await?;
    for id in 1000..1000 + ASKS {
        let reply = session.receive().await?;
        let publications = reply["history"]["publications"].as_array().context("publications")?;
        ensure!(reply["id"] == id && reply["history"]["offset"] == TEXTS, "{reply:.100}");
        ensure!((1..=16).contains(&publications.len()), "{} publications fit", publications.len());
        ensure!(publications[0]["offset"] == 1);
    }
    node.ensure_sound()
}

#[tokio::test]
async fn an_sdk_reads_a_history_in_pages() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = on(&redis).await?;
    let url = format!("ws://{}{PATH}", node.public);
    let sdk = Client::node_centrifuge_history(&url, "kept:a", &anywhere("alice")).await?;
    let heard = sdk.heard(4).await?;
    let told = |event: &str, value: Value| Message {
        event: event.to_owned(),
        ..Message::plain(Payload::text(value.to_string()))
    };
    let expected = [
        told("forwards", (0..20).collect()),
        told("backwards", (0..20).rev().collect()),
        told("position", json!([0, 20])),
        told("unknown", json!(112)),
    ];
    ensure!(heard == expected, "{heard:?}");
    node.ensure_sound()
}

/// A history of one publication keeps a value: whoever comes back gets the newest, and nobody is told of those before it.
#[tokio::test]
async fn a_value_is_recovered_whatever_was_missed() -> Result<()> {
    let redis = RedisServer::start().await?;
    let builder = || Builder::new().set(r#"rooms."kept:*".history.size"#, "1");
    let builder = || builder().set(r#"rooms."kept:*".history.ttl"#, "none").set("broker.url", &redis.url());
    let node = builder().start().await?;
    let token = anywhere("alice");
    let unknown = json!({ "recover": true, "epoch": "", "offset": 0 });

    // Before there is a value, a client has missed nothing only if it knows that.
    let begun = Session::open(&node).await?.subscribe(unknown.clone()).await?;
    let epoch = begun["epoch"].clone();
    ensure!(begun["recovered"] == false && begun["offset"] == 0, "{begun}");
    let known = |offset: u64| json!({ "recover": true, "epoch": epoch, "offset": offset });
    ensure!(Session::open(&node).await?.subscribe(known(0)).await?["recovered"] == true);

    publish(&node, &token, 0..5).await?;
    let recovered = |offset: u64, publications: Option<Value>| {
        let mut reply = json!({
            "recoverable": true, "positioned": true, "epoch": epoch, "offset": offset,
            "was_recovering": true, "recovered": true,
        });
        if let (Some(reply), Some(publications)) = (reply.as_object_mut(), publications) {
            reply.insert("publications".to_owned(), publications);
        }
        reply
    };
    let value = |number: u64| recovered(number, Some(json!([{ "data": number, "offset": number + 1 }])));
    // The second node has to read it.
    let other = builder().start().await?;
    for node in [&node, &other] {
        for asked in
            [unknown.clone(), known(0), known(4), known(17), json!({ "recover": true, "epoch": "1" })]
        {
            let reply = Session::open(node).await?.subscribe(asked.clone()).await?;
            ensure!(reply == value(4), "{reply} for {asked}");
        }
        let reply = Session::open(node).await?.subscribe(known(5)).await?;
        ensure!(reply == recovered(5, None), "{reply}");
        // Who does not ask for it gets what comes.
        let reply = Session::open(node).await?.subscribe(json!({})).await?;
        ensure!(reply["offset"] == 5 && reply.get("publications").is_none(), "{reply}");
    }
    let reads = other.samples().await?.sum("tidegate_history_resumptions_total", &[r#"from="log""#]);
    ensure!(reads == 1, "{reads} readings");

    // From the value on, nothing is missing.
    let mut sessions = futures_util::future::try_join_all([&node, &other].map(Session::open)).await?;
    for session in &mut sessions {
        ensure!(session.subscribe(known(2)).await? == value(4));
    }
    publish(&node, &token, 5..8).await?;
    for session in &mut sessions {
        for number in 5..8 {
            let push = session.receive().await?["push"]["pub"].take();
            ensure!(push["data"] == number && push["offset"] == number + 1, "{push}");
        }
    }
    other.ensure_sound()?;
    node.ensure_sound()
}

//! Several rooms with a history in one session, each continued where the client has left it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tidegate_tests::{
    client::{Client, EventStreamParser},
    http::Request,
    journal::{Journal, Message, Payload},
    node::{Builder, Node},
    redis_server::RedisServer,
    token::anywhere,
};
use tokio::net::TcpSocket;

use crate::{ndjson::Lines, stage::payloads};

/// The most rooms with a history that one event stream may have.
const ROOMS: usize = 16;

fn recording() -> Builder {
    Builder::new().set(r#"rooms."kept:*".history.size"#, "1000")
}

/// `/rooms?room=…` for these rooms.
fn target(rooms: impl IntoIterator<Item = String>) -> String {
    let rooms: Vec<_> = rooms.into_iter().map(|room| format!("room={room}")).collect();
    format!("/rooms?{}", rooms.join("&"))
}

fn kept(number: usize) -> String {
    format!("kept:{number}")
}

/// Publishes `number` in each room.
async fn publish(node: &Node, token: &str, rooms: usize, numbers: std::ops::Range<u32>) -> Result<()> {
    for number in numbers {
        for room in 0..rooms {
            node.post(&kept(room), token, "text/plain", format!("{room} {number}").as_bytes()).await?;
        }
    }
    Ok(())
}

/// What was received, by room.
fn by_room(messages: &[Message]) -> BTreeMap<usize, Vec<u32>> {
    let mut rooms = BTreeMap::<_, Vec<_>>::new();
    for message in messages {
        let Payload::Text(text) = &message.payload else { continue };
        if let Some((room, number)) = text.split_once(' ')
            && let (Ok(room), Ok(number)) = (room.parse(), number.parse())
        {
            rooms.entry(room).or_default().push(number);
        }
    }
    rooms
}

/// Random numbers, the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// What a client has received when it knows its positions in all rooms.
async fn first_id(node: &Node, target: &str) -> Result<String> {
    let mut incoming = Request::get(target).header("Accept", "text/event-stream").open(node.public).await?;
    let (mut parser, mut journal) = (EventStreamParser::default(), Journal::default());
    while parser.last_event_id().is_empty() || parser.last_event_id().contains("0-0") {
        parser.read(&incoming.chunk().await?.context("positions")?, &mut journal);
    }
    Ok(parser.last_event_id().to_owned())
}

/// One stream after another, each cut off at some byte, at two nodes in turn. Also returns how many there were.
async fn read_in_pieces(
    nodes: [&Node; 2],
    target: &str,
    mut id: String,
    messages: usize,
) -> Result<(Journal, usize)> {
    let (mut random, mut journal, mut pieces) = (Random(7), Journal::default(), 0);
    while journal.messages.len() < messages {
        let node = nodes.get(pieces % 2).context("one of two nodes")?;
        pieces += 1;
        let request = Request::get(target).header("Accept", "text/event-stream").header("Last-Event-ID", &id);
        let mut incoming = request.open(node.public).await?;
        ensure!(incoming.status == 200, "{} after {id}", incoming.status);
        let mut parser = EventStreamParser::default();
        let mut left = usize::try_from(200 + random.below(6_000))?;
        while left > 0 && journal.messages.len() < messages {
            let chunk = incoming.chunk().await?.context("the stream goes on")?;
            let taken = chunk.len().min(left);
            parser.read(chunk.get(..taken).unwrap_or_default(), &mut journal);
            left -= taken;
        }
        if !parser.last_event_id().is_empty() {
            parser.last_event_id().clone_into(&mut id);
        }
    }
    Ok((journal, pieces))
}

#[tokio::test]
async fn an_event_stream_of_sixteen_rooms_cut_at_random_misses_nothing() -> Result<()> {
    const ALL: u32 = 40;
    let redis = RedisServer::start().await?;
    let builder = recording().set("broker.url", &redis.url());
    let (a, b) = tokio::try_join!(builder.start(), builder.start())?;
    let token = anywhere("alice");
    // One room has no history, and one no message until the end.
    let rooms = (0..ROOMS - 1).map(kept).chain(["live".to_owned(), "kept:quiet".to_owned()]);
    let target = format!("{}&token={token}", target(rooms));
    let id = first_id(&a, &target).await?;
    let publishing = async {
        publish(&a, &token, ROOMS - 1, 0..ALL).await?;
        a.post("kept:quiet", &token, "text/plain", b"99 0").await
    };
    let all = ALL as usize * (ROOMS - 1) + 1;
    let ((journal, pieces), ()) = tokio::try_join!(read_in_pieces([&b, &a], &target, id, all), publishing)?;
    ensure!(pieces > 10, "cut {pieces} times");
    ensure!(journal.events("tidegate.gap") == 0, "{journal:?}");
    let mut heard = by_room(&journal.messages);
    ensure!(heard.remove(&99) == Some(vec![0]), "the quiet room");
    ensure!(
        heard.len() == ROOMS - 1 && heard.values().all(|numbers| numbers.iter().copied().eq(0..ALL)),
        "{heard:?}"
    );
    for message in journal.messages.iter().filter(|message| message.event == "message") {
        let (room, positions) = message.id.split_once(';').context("an id with positions")?;
        ensure!(room.starts_with("kept:") && positions.split(',').count() == ROOMS + 1, "{message:?}");
    }
    a.ensure_sound()?;
    b.ensure_sound()
}

/// `EventSource` sends back the id of the last event, also of one without data.
#[tokio::test]
async fn an_event_source_of_several_rooms_misses_nothing_while_it_reconnects() -> Result<()> {
    let node = recording().set("public.max_session_age", "1s").set("sse.retry", "50ms").start().await?;
    let token = anywhere("alice");
    let url = format!("http://{}{}&token={token}", node.public, target((0..4).map(kept)));
    let client = Client::node_events(&url, &["tidegate.gap"]).await?;
    client.until("it has reconnected", |journal| journal.opened > 1).await?;
    let mut sent = 0;
    while client.now().opened < 5 {
        publish(&node, &token, 4, sent..sent + 3).await?;
        sent += 3;
    }
    let heard = client.heard(4 * sent as usize).await?;
    ensure!(heard.len() == 4 * sent as usize, "{client:?}");
    ensure!(by_room(&heard).values().all(|numbers| numbers.iter().copied().eq(0..sent)), "{client:?}");
    Ok(())
}

/// A room whose messages overtake others must not make a client forget those.
#[tokio::test]
async fn a_room_with_priority_does_not_overtake_in_a_stream_with_positions() -> Result<()> {
    const ALL: usize = 300;
    let builder = recording().set(r#"rooms."kept:1".priority"#, "true").set("limits.outbound", "16MiB");
    let node = builder.start().await?;
    let token = anywhere("alice");
    let rooms = format!("{}&token={token}", target((0..2).map(kept)));
    let request = Request::get(&rooms).header("Accept", "text/event-stream");
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    let mut incoming = request.open_over(socket.connect(node.public).await?).await?;
    let big = "x".repeat(20_000);
    // It reads nothing meanwhile, so its queue fills.
    for number in 0..ALL {
        node.post("kept:0", &token, "text/plain", format!("0 {number}\n{big}").as_bytes()).await?;
        node.post("kept:1", &token, "text/plain", format!("1 {number}").as_bytes()).await?;
    }
    let (mut parser, mut journal) = (EventStreamParser::default(), Journal::default());
    while journal.messages.len() < 2 * ALL {
        parser.read(&incoming.chunk().await?.context("more")?, &mut journal);
    }
    let order: Vec<_> = journal.messages.iter().map(|message| message.id.split(';').next()).collect();
    ensure!(order.chunks(2).all(|pair| pair == [Some("kept:0"), Some("kept:1")]), "{order:?}");
    Ok(())
}

/// JSON lines name the position of each message; the client puts them together.
#[tokio::test]
async fn json_lines_of_several_rooms_continue_in_each_of_them() -> Result<()> {
    let redis = RedisServer::start().await?;
    let builder = recording().set("broker.url", &redis.url());
    let (a, b) = tokio::try_join!(builder.start(), builder.start())?;
    let token = anywhere("alice");
    let rooms = target((0..3).map(kept));
    let mut lines = Lines::open(&a, &rooms, "application/x-ndjson").await?;
    publish(&a, &token, 2, 0..3).await?;
    let mut positions = BTreeMap::new();
    while positions.values().filter(|(seen, _)| *seen == Some(2)).count() < 2 || positions.len() < 3 {
        let line = lines.next().await?.context("a line")?;
        let number = line.get("data").and_then(Value::as_str).map(number).transpose()?;
        let (room, id) = (text(&line, "room")?, text(&line, "id")?);
        positions.insert(room, (number, id));
    }
    drop(lines);
    publish(&a, &token, 3, 3..5).await?;
    let since: Vec<_> = positions.values().map(|(_, id)| id.as_str()).collect();
    let mut lines =
        Lines::open(&b, &format!("{rooms}&since={}", since.join(",")), "application/x-ndjson").await?;
    let mut heard = BTreeMap::<_, Vec<_>>::new();
    while heard.values().map(Vec::len).sum::<usize>() < 6 {
        let line = lines.next().await?.context("a line")?;
        ensure!(line.get("gap").is_none(), "{line}");
        if let Some(data) = line.get("data").and_then(Value::as_str) {
            heard.entry(text(&line, "room")?).or_default().push(number(data)?);
        }
    }
    ensure!(heard.len() == 3 && heard.values().all(|numbers| *numbers == [3, 4]), "{heard:?}");
    Ok(())
}

fn text(line: &Value, member: &str) -> Result<String> {
    let text = line.get(member).and_then(Value::as_str);
    Ok(text.with_context(|| format!("{member} in {line}"))?.to_owned())
}

fn number(data: &str) -> Result<u32> {
    Ok(data.split_once(' ').context("a room and a number")?.1.parse()?)
}

#[tokio::test]
async fn too_many_rooms_and_bad_positions_are_refused_with_a_reason() -> Result<()> {
    let node = recording().start().await?;
    let token = anywhere("alice");
    let get = |target: String, accept: &'static str| {
        let request = Request::get(&target).bearer(&token).header("Accept", accept);
        let address = node.public;
        async move { request.send(address).await }
    };
    let all = target((0..=ROOMS).map(kept));
    let refused = get(all.clone(), "text/event-stream").await?;
    let why = "an event stream may have at most 16 rooms with a history, found 17";
    ensure!(refused.status == 400 && refused.text().contains(why), "{refused:?}");
    for accept in ["text/event-stream", "application/x-ndjson"] {
        for (since, why) in [("17-42", "expected 2 positions"), ("17-42,yesterday", "expected a position")] {
            let refused = get(format!("{}&since={since}", target((0..2).map(kept))), accept).await?;
            ensure!(refused.status == 400 && refused.text().contains(why), "{refused:?}");
        }
    }
    // JSON lines have no such bound, because a line names only its own position.
    Lines::open(&node, &all, "application/x-ndjson").await?;
    // What an EventSource sends by itself is never refused: it would not come back.
    let url = format!("{}&token={token}", target((0..2).map(kept)));
    for id in ["kept:0", "kept:0;17-42", "kept:1;a,b"] {
        let request = Request::get(&url).header("Accept", "text/event-stream").header("Last-Event-ID", id);
        let mut incoming = request.open(node.public).await?;
        let (mut parser, mut journal) = (EventStreamParser::default(), Journal::default());
        while journal.events("tidegate.gap") < 2 {
            parser.read(&incoming.chunk().await?.context("gaps")?, &mut journal);
        }
        let told = |room: &str| Payload::text(format!(r#"{{"cause":"expired","room":"{room}"}}"#));
        let mut gaps = payloads(&journal.messages);
        gaps.sort();
        ensure!(gaps == [told("kept:0"), told("kept:1")], "{id}: {journal:?}");
    }
    Ok(())
}

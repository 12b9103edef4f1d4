//! A room's policy for publications that do not fit into a slow client's queue, and the order of priority rooms.

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::{Client, EventStreamParser},
    http::Request,
    journal::{Journal, Payload},
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    token::anywhere,
    witness::Witness,
};

use crate::stage::payloads;

const DROPPED: &str = "tidegate_outbound_dropped_total";

/// A node with small queues, and a policy for the lobby.
async fn node(overflow: &str) -> Result<Node> {
    Builder::new().set("limits.outbound", "256KiB").set(r#"rooms."lobby".overflow"#, overflow).start().await
}

fn numbered(n: usize) -> Payload {
    Payload::text(format!("{n} {}", "x".repeat(32 * 1024)))
}

fn number(payload: &[u8]) -> Result<usize> {
    let text = std::str::from_utf8(payload)?;
    text.split_once(' ').context("a number and filler")?.0.parse().context("a number")
}

/// Publishes to the lobby, in step with the readers, until this many publications have been dropped elsewhere.
/// Returns how many were published.
async fn publish_until_dropped(
    node: &Node,
    token: &str,
    fast: &[&Client],
    overflow: &str,
    drops: u64,
) -> Result<usize> {
    let sender = Client::websocket(&node.ws("lobby", token, "echo=false"), &[]).await?;
    let label = format!("overflow=\"{overflow}\"");
    let mut count = 0;
    while node.samples().await?.sum(DROPPED, &[&label]) < drops {
        ensure!(count < 2000, "a client that does not read takes everything");
        for _ in 0..16 {
            sender.send(numbered(count)).await?;
            count += 1;
            for client in fast {
                client.heard(count).await?;
            }
        }
    }
    let all: Vec<_> = (0..count).map(numbered).collect();
    for client in fast {
        ensure!(payloads(&client.heard(count).await?) == all, "a neighbour receives everything");
    }
    Ok(count)
}

/// The messages that a stalled WebSocket gets once it reads, up to the newest.
async fn read_to(stalled: &mut RawSocket, newest: usize) -> Result<Vec<usize>> {
    let mut heard = Vec::new();
    while heard.last() != Some(&newest) {
        let frame = stalled.receive().await?.context("it stays open")?;
        match frame.first {
            0x81 => heard.push(number(&frame.payload)?),
            0x89 => {}
            other => anyhow::bail!("a frame that begins with {other:#x} after {heard:?}"),
        }
    }
    Ok(heard)
}

async fn dropped(node: &Node, overflow: &str) -> Result<usize> {
    let label = format!("overflow=\"{overflow}\"");
    Ok(usize::try_from(node.samples().await?.sum(DROPPED, &[&label]))?)
}

#[tokio::test]
async fn the_oldest_are_dropped_and_the_newest_arrive() -> Result<()> {
    let node = node("drop_oldest").await?;
    let token = anywhere("alice");
    let fast = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let stream = Client::events(&node.url("lobby", &token, "")).await?;
    let mut stalled = RawSocket::connect_narrow(node.public, &format!("/rooms/lobby?token={token}")).await?;
    let count = publish_until_dropped(&node, &token, &[&fast, &stream], "drop_oldest", 40).await?;

    let heard = read_to(&mut stalled, count - 1).await?;
    ensure!(heard.is_sorted_by(|a, b| a < b), "in order: {heard:?}");
    ensure!(
        count - heard.len() == dropped(&node, "drop_oldest").await?,
        "each is heard or counted: {heard:?}"
    );
    // Beside a message that has been partly sent, six fit into the queue, and they are the newest.
    let (_, newest) = heard.split_at(heard.len() - 6);
    ensure!(newest.iter().copied().eq(count - 6..count), "{heard:?}");
    ensure!(node.samples().await?.sum("tidegate_slow_consumers_total", &[]) == 0);

    // It is a normal session again.
    node.post("lobby", &token, "text/plain", b"0 again").await?;
    ensure!(stalled.receive().await?.context("open")?.payload == b"0 again");
    Ok(())
}

/// A queue that a room keeps full has no space for a ping, however small its frames are: that closes no session.
#[tokio::test]
async fn a_ping_that_does_not_fit_closes_no_session() -> Result<()> {
    let node = Builder::new()
        .set("limits.outbound", "64KiB")
        .set("heartbeat.interval", "100ms")
        .set("heartbeat.timeout", "10m")
        .set(r#"rooms."lobby".overflow"#, "drop_oldest")
        .start()
        .await?;
    let token = anywhere("alice");
    let target = format!("/rooms/lobby?token={token}");
    let mut stalled = RawSocket::connect_narrow(node.public, &target).await?;
    let mut sender = RawSocket::connect(node.public, &format!("{target}&echo=false")).await?;
    // Each length leaves a different remainder in the queue.
    let mut count = 0;
    for length in [1_usize, 8, 32, 57, 100] {
        let before = dropped(&node, "drop_oldest").await?;
        while dropped(&node, "drop_oldest").await? < before + 2000 {
            let slow = node.samples().await?.sum("tidegate_slow_consumers_total", &[]);
            ensure!(slow == 0 && count < 400_000, "after {count}: {slow} were closed as slow");
            for _ in 0..500 {
                sender.send(&Frame::text("x".repeat(length))).await?;
                count += 1;
            }
        }
        // A client that reads is pinged as often.
        let mut idle = RawSocket::connect(node.public, &format!("/rooms/quiet?token={token}")).await?;
        for _ in 0..4 {
            ensure!(idle.receive().await?.context("it stays open")?.first == 0x89);
        }
    }
    let samples = node.samples().await?;
    ensure!(samples.sum("tidegate_slow_consumers_total", &[]) == 0, "{samples:?}");

    // It is a normal session again.
    node.post("lobby", &token, "text/plain", b"the last").await?;
    while stalled.receive().await?.context("it stays open")?.payload != b"the last" {}
    node.ensure_sound()
}

#[tokio::test]
async fn only_the_latest_message_is_kept_for_a_slow_client() -> Result<()> {
    let node = node("latest").await?;
    let token = anywhere("alice");
    let fast = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let mut stalled = RawSocket::connect_narrow(node.public, &format!("/rooms/lobby?token={token}")).await?;
    let count = publish_until_dropped(&node, &token, &[&fast], "latest", 40).await?;

    // One that has been partly sent, and the latest.
    node.until_samples("two messages that wait", |samples| {
        (1..2 * 33 * 1024).contains(&samples.sum("tidegate_outbound_bytes", &[]))
    })
    .await?;
    let heard = read_to(&mut stalled, count - 1).await?;
    ensure!(heard.is_sorted_by(|a, b| a < b), "in order: {heard:?}");
    ensure!(count - heard.len() == dropped(&node, "latest").await?, "each is heard or counted: {heard:?}");
    ensure!(node.samples().await?.sum("tidegate_slow_consumers_total", &[]) == 0);
    Ok(())
}

#[tokio::test]
async fn a_client_that_asked_for_close_at_a_gap_is_closed_instead_of_a_drop() -> Result<()> {
    let node = node("drop_oldest").await?;
    let token = anywhere("alice");
    let fast = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let lobby = |query: &str| format!("/rooms/lobby?token={token}{query}");
    let mut silent = RawSocket::connect_narrow(node.public, &lobby("")).await?;
    let mut strict = RawSocket::connect_narrow(node.public, &lobby("&gap=close")).await?;
    let count = publish_until_dropped(&node, &token, &[&fast], "drop_oldest", 40).await?;

    let (mut heard, mut code) = (Vec::new(), None);
    while let Some(frame) = strict.receive().await? {
        match frame.first {
            0x81 => heard.push(number(&frame.payload)?),
            _ => code = frame.close_code().or(code),
        }
    }
    ensure!(heard.iter().copied().eq(0..heard.len()), "nothing is missing before the close: {heard:?}");
    ensure!(heard.len() < count && code.is_none_or(|code| code == 1012), "{code:?}");
    node.until_samples("closed for a gap", |samples| {
        samples.sum("tidegate_connections_closed_total", &["protocol=\"plain\"", "reason=\"gap\""]) == 1
    })
    .await?;
    read_to(&mut silent, count - 1).await?;
    Ok(())
}

/// A policy takes effect with the next publication, for sessions that are in the room already.
#[tokio::test]
async fn a_policy_applies_as_soon_as_it_is_read() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("tidegate.toml");
    std::fs::write(&path, "")?;
    let node = Builder::new().config_file(&path).set("limits.outbound", "256KiB").start().await?;
    let token = anywhere("alice");
    let fast = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let mut stalled = RawSocket::connect_narrow(node.public, &format!("/rooms/lobby?token={token}")).await?;
    std::fs::write(&path, "[rooms.'lob*']\noverflow = 'drop_oldest'\n")?;
    node.hang_up()?;
    node.until_samples("a new configuration", |samples| {
        samples.sum("tidegate_config_reloads_total", &["result=\"applied\""]) == 1
    })
    .await?;
    let count = publish_until_dropped(&node, &token, &[&fast], "drop_oldest", 1).await?;
    let heard = read_to(&mut stalled, count - 1).await?;
    ensure!(count - heard.len() == dropped(&node, "drop_oldest").await?, "{heard:?}");
    Ok(())
}

/// An event stream is notified of the gap at its place, once however many messages were dropped there.
#[tokio::test]
async fn an_event_stream_is_notified_of_the_gap_at_its_place() -> Result<()> {
    for overflow in ["drop_oldest", "latest"] {
        let node = node(overflow).await?;
        let token = anywhere("alice");
        let fast = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
        let request = Request::get("/rooms/lobby").header("Accept", "text/event-stream").bearer(&token);
        let mut stalled = request.open(node.public).await?;
        let count = publish_until_dropped(&node, &token, &[&fast], overflow, 40).await?;

        let (mut parser, mut journal) = (EventStreamParser::default(), Journal::default());
        let newest = numbered(count - 1);
        while journal.messages.last().is_none_or(|message| message.payload != newest) {
            let bytes = stalled.chunk().await?.context("it stays open")?;
            parser.read(&bytes, &mut journal);
        }
        let (mut next, mut told, mut missing, mut gaps) = (0, false, 0, 0);
        for message in &journal.messages {
            if message.event == "tidegate.gap" {
                ensure!(message.payload.bytes() == br#"{"cause":"dropped","room":"lobby"}"#);
                ensure!(!std::mem::replace(&mut told, true), "two notifications of one gap");
                gaps += 1;
                continue;
            }
            let number = number(message.payload.bytes())?;
            ensure!(number >= next && told == (number > next), "{number} after {next}, told: {told}");
            missing += number - next;
            (next, told) = (number + 1, false);
        }
        ensure!(missing == dropped(&node, overflow).await? && missing >= 40);
        ensure!(gaps < missing, "{gaps} gaps, {missing} messages");
    }
    Ok(())
}

/// In the Centrifuge protocol the subscription continues: a new one would bring nothing back.
#[tokio::test]
async fn a_centrifuge_session_is_notified_of_the_gap_and_stays_subscribed() -> Result<()> {
    let node = node("drop_oldest").await?;
    let token = anywhere("alice");
    let fast = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let mut stalled = centrifuge(&node, &token, &["lobby"]).await?;
    let count = publish_until_dropped(&node, &token, &[&fast], "drop_oldest", 40).await?;

    let (mut heard, mut gaps) = (Vec::new(), 0);
    while heard.last() != Some(&(count - 1)) {
        let push = push(&mut stalled).await?;
        if let Some(gap) = push.pointer("/message/data/tidegate.gap") {
            ensure!(*gap == serde_json::json!({ "room": "lobby", "cause": "dropped" }));
            gaps += 1;
        } else {
            let data = push.pointer("/pub/data").and_then(|data| data.as_str());
            heard.push(number(data.with_context(|| push.to_string())?.as_bytes())?);
        }
    }
    ensure!(heard.is_sorted_by(|a, b| a < b), "{heard:?}");
    let missing = count - heard.len();
    ensure!(missing == dropped(&node, "drop_oldest").await?);
    ensure!((1..missing).contains(&gaps), "{gaps} gaps, {missing} messages");
    Ok(())
}

#[tokio::test]
async fn priority_messages_overtake_waiting_ones() -> Result<()> {
    let node = Builder::new()
        .set("limits.outbound", "16MiB")
        .set(r#"rooms."alarm".priority"#, "true")
        .start()
        .await?;
    let token = anywhere("alice");
    let fast = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let sender = Client::websocket(&node.ws("lobby", &token, "echo=false"), &[]).await?;
    let mut stalled = centrifuge(&node, &token, &["lobby", "alarm"]).await?;
    let waiting = |samples: &tidegate_tests::samples::Samples| samples.sum("tidegate_outbound_bytes", &[]);
    let mut count = 0;
    while waiting(&node.samples().await?) < 1 << 20 {
        sender.send(numbered(count)).await?;
        count += 1;
        fast.heard(count).await?;
    }
    node.post("alarm", &token, "text/plain", b"first").await?;
    node.post("alarm", &token, "text/plain", b"second").await?;
    // Two members received the lobby, one the alarms.
    let delivered = u64::try_from(2 * count + 2)?;
    node.until_samples("queued alarms", |samples| samples.sum("tidegate_deliveries_total", &[]) == delivered)
        .await?;

    let mut heard = Vec::new();
    while heard.len() < count + 2 {
        let push = push(&mut stalled).await?;
        let data = push.pointer("/pub/data").and_then(|data| data.as_str()).context("a publication")?;
        heard.push(data.split(' ').next().unwrap_or_default().to_owned());
    }
    let alarm = heard.iter().position(|data| data == "first").context("the first alarm")?;
    ensure!(heard.get(alarm + 1).is_some_and(|data| data == "second"), "{heard:?}");
    // A mebibyte waits, so some thirty of the lobby have been overtaken.
    ensure!(count - alarm >= 20, "the alarm came after {alarm} of {count}");
    heard.drain(alarm..alarm + 2);
    ensure!(heard.into_iter().eq((0..count).map(|n| n.to_string())));
    Ok(())
}

/// Dropping messages in one queue delays no other client, however many are queued, and in however many queues.
#[tokio::test]
async fn drops_for_hundreds_of_sockets_delay_no_other_client() -> Result<()> {
    const STALLED: usize = 200;
    // A mebibyte holds some 14,000 of them.
    const MESSAGES: usize = 20_000;
    let node = Builder::new()
        .set("shards", "1")
        .set(r#"rooms."lobby".overflow"#, "drop_oldest")
        .set("heartbeat.interval", "59m")
        .set("heartbeat.timeout", "1h")
        .start()
        .await?;
    let token = anywhere("alice");
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let target = format!("/rooms/lobby?token={token}");
        stalled.push(RawSocket::connect_narrow(node.public, &target).await?);
    }
    let mut witness = Witness::of(&node).await?;
    let mut sender =
        RawSocket::connect(node.public, &format!("/rooms/lobby?token={token}&echo=false")).await?;
    for (count, number) in (0..MESSAGES).map(|n| (n + 1, format!("{n:08}"))) {
        sender.send(&Frame::text(number)).await?;
        if count % 4000 == 0 {
            let bytes = (8 * count * STALLED) as u64;
            let payload = ["direction=\"out\""];
            node.until_samples("everything queued", |samples| {
                samples.sum("tidegate_payload_bytes_total", &payload) >= bytes
            })
            .await?;
            ensure!(node.ask_ops("/livez").await?.status == 200);
        }
    }
    witness.until(witness.heard() + 100).await?;
    witness.finish().await?;
    let mut missing = 0;
    for socket in stalled.iter_mut().take(5) {
        let (mut heard, mut last) = (0, None);
        while last != Some(MESSAGES - 1) {
            let frame = socket.receive().await?.context("it stays open")?;
            let number: usize = std::str::from_utf8(&frame.payload)?.parse()?;
            ensure!(last.is_none_or(|last| last < number), "{number} after {last:?}");
            (heard, last) = (heard + 1, Some(number));
        }
        missing += MESSAGES - heard;
    }
    let dropped = dropped(&node, "drop_oldest").await?;
    ensure!(dropped > STALLED * 1000 && missing > 5 * 1000, "{missing} are missing, {dropped} were dropped");
    node.ensure_sound()
}

/// A session in these rooms that has read all answers, and stops reading.
async fn centrifuge(node: &Node, token: &str, rooms: &[&str]) -> Result<RawSocket> {
    let mut socket = RawSocket::connect_narrow(node.public, "/connection/websocket").await?;
    let connect = format!(r#"{{"id":1,"connect":{{"token":"{token}"}}}}"#);
    let subscribe =
        |(n, room): (usize, &&str)| format!(r#"{{"id":{},"subscribe":{{"channel":"{room}"}}}}"#, n + 2);
    let commands = std::iter::once(connect).chain(rooms.iter().enumerate().map(subscribe));
    for command in commands {
        socket.send(&Frame::text(command)).await?;
        let answer = socket.receive().await?.context("an answer")?;
        ensure!(!String::from_utf8_lossy(&answer.payload).contains("error"), "{answer:?}");
    }
    Ok(socket)
}

/// The next push.
async fn push(socket: &mut RawSocket) -> Result<serde_json::Value> {
    loop {
        let frame = socket.receive().await?.context("it stays open")?;
        let mut said: serde_json::Value = serde_json::from_slice(&frame.payload)
            .with_context(|| format!("{:#x} {}", frame.first, String::from_utf8_lossy(&frame.payload)))?;
        if let Some(push) = said.get_mut("push") {
            return Ok(push.take());
        }
    }
}

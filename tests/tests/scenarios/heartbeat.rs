//! A dead peer is detected, a living one is kept, however idle.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::Payload,
    node::{Builder, Node},
    raw::{Frame, RawSocket, start},
    redis_server::RedisServer,
    samples::Samples,
    token::anywhere,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

use crate::stage::{payloads, publish};

const PING: u8 = 0x89;
const CLOSE: u8 = 0x88;

async fn restless() -> Result<Node> {
    Builder::new().set("heartbeat.interval", "200ms").set("heartbeat.timeout", "1s").start().await
}

#[tokio::test]
async fn a_silent_client_is_closed_and_an_answering_one_stays() -> Result<()> {
    let node = restless().await?;
    let token = anywhere("alice");
    let answering = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let mut silent = RawSocket::connect(node.public, &format!("/rooms/lobby?token={token}")).await?;

    let mut seen = Vec::new();
    let code = loop {
        let frame = silent.receive().await?.context("the silent client gets the reason of its close")?;
        seen.push(frame.first);
        if frame.first == CLOSE {
            break frame.close_code();
        }
    };
    ensure!(code == Some(1001), "{code:?}");
    let pings = seen.iter().take_while(|first| **first == PING).count();
    ensure!(pings >= 2 && pings + 1 == seen.len(), "pings and a close were expected, not {seen:x?}");

    node.post("lobby", &token, "text/plain", b"still here").await?;
    answering.hears(&Payload::text("still here")).await?;
    let closed = ["protocol=\"plain\"", "reason=\"heartbeat_timeout\""];
    node.until_samples("the silent one is counted", |samples| {
        samples.sum("tidegate_connections_closed_total", &closed) == 1
            && samples.sum("tidegate_connections", &["protocol=\"plain\""]) == 1
    })
    .await?;
    Ok(())
}

/// A client's own pings and messages also count as signs of life.
#[tokio::test]
async fn any_byte_counts_as_a_sign_of_life() -> Result<()> {
    let node = restless().await?;
    let token = anywhere("alice");
    let mut talker =
        RawSocket::connect(node.public, &format!("/rooms/lobby?token={token}&echo=false")).await?;
    // It answers no ping, but sends a message for each ping it sees, for longer than the time-out.
    for _ in 0..12 {
        let frame = talker.receive().await?.context("it is not closed")?;
        ensure!(frame.first == PING, "{:x}", frame.first);
        talker.send(&Frame::text("hm")).await?;
    }
    Ok(())
}

#[tokio::test]
async fn hundreds_of_idle_sessions_live_through_many_heartbeats() -> Result<()> {
    const SESSIONS: usize = 200;
    let node = Builder::new().set("heartbeat.interval", "200ms").start().await?;
    let token = anywhere("alice");
    let mut clients = Vec::new();
    for _ in 0..SESSIONS {
        clients.push(Client::websocket(&node.ws("lobby", &token, ""), &[]).await?);
    }
    // A ping and its answer are at least 8 bytes: this many mean several rounds for all sessions.
    let before = node.samples().await?.sum("tidegate_network_bytes_total", &["direction=\"in\""]);
    node.until_samples("ten rounds of heartbeats", |samples| {
        samples.sum("tidegate_network_bytes_total", &["direction=\"in\""])
            >= before + 10 * 6 * SESSIONS as u64
    })
    .await?;
    node.post("lobby", &token, "text/plain", b"everybody here?").await?;
    for client in &clients {
        client.hears(&Payload::text("everybody here?")).await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_idle_event_stream_is_kept_alive_by_comments() -> Result<()> {
    let node = restless().await?;
    let request = Request::get("/rooms/lobby").header("Accept", "text/event-stream");
    let mut stream = request.bearer(&anywhere("alice")).open(node.public).await?;
    let mut text = String::new();
    while text.lines().filter(|line| *line == ":").count() < 3 {
        let chunk = stream.chunk().await?.context("the stream continues")?;
        text.push_str(std::str::from_utf8(&chunk)?);
    }
    ensure!(text.starts_with("retry: "), "{text}");
    Ok(())
}

/// A client in the lobby, in the Centrifuge protocol.
async fn centrifuge(node: &Node, token: &str) -> Result<RawSocket> {
    let mut socket = RawSocket::connect(node.public, "/connection/websocket").await?;
    for command in [
        format!(r#"{{"id":1,"connect":{{"token":"{token}"}}}}"#),
        r#"{"id":2,"subscribe":{"channel":"lobby"}}"#.to_owned(),
    ] {
        socket.send(&Frame::text(command)).await?;
        socket.receive().await?.context("an answer")?;
    }
    Ok(socket)
}

/// Answers every ping until this many publications have been received.
async fn answer_pings(mut socket: RawSocket, count: usize) -> Result<Vec<String>> {
    let mut heard = Vec::new();
    while heard.len() < count {
        let frame = socket.receive().await?.context("it is not closed")?;
        let said: serde_json::Value = serde_json::from_slice(&frame.payload)
            .with_context(|| format!("{:#x} {:?}", frame.first, frame.close_code()))?;
        match said.pointer("/push/pub/data") {
            Some(data) => heard.push(data.to_string()),
            None => socket.send(&Frame::text("{}")).await?,
        }
    }
    Ok(heard)
}

/// A frozen container, a machine that swaps, a debugger: the node could not receive the answers, and closes no session
/// for that.
#[tokio::test]
async fn a_node_that_was_stopped_closes_no_client_that_answers() -> Result<()> {
    const CLIENTS: usize = 20;
    const MESSAGES: usize = 10;
    /// Longer than all time-outs: this is the fault, not a wait.
    const STOPPED: Duration = Duration::from_secs(4);
    let redis = RedisServer::start().await?;
    let node = Builder::new()
        .set("heartbeat.interval", "300ms")
        .set("heartbeat.timeout", "1500ms")
        .set("public.header_timeout", "2s")
        .set("public.body_timeout", "2s")
        .set("broker.url", &redis.url())
        .set("broker.canary_timeout", "30s")
        .start()
        .await?;
    let token = anywhere("alice");
    let (mut plain, mut answering) = (Vec::new(), JoinSet::new());
    for _ in 0..CLIENTS / 2 {
        plain.push(Client::websocket(&node.ws("lobby", &token, ""), &[]).await?);
        answering.spawn(answer_pings(centrifuge(&node, &token).await?, MESSAGES));
    }
    let stream = Client::events(&node.url("lobby", &token, "")).await?;
    // Half of a head and half of a body.
    let post = Request::post("/rooms/halves", "text/plain", *b"whole").bearer(&token).bytes(node.public);
    let (head, body) = (post.len() / 2, post.len() - 2);
    let mut halves = Vec::new();
    for half in [head, body] {
        let mut sender = TcpStream::connect(node.public).await?;
        sender.write_all(start(&post, half)).await?;
        halves.push((sender, half));
    }
    let mut silent = RawSocket::connect(node.public, &format!("/rooms/quiet?token={token}")).await?;
    ensure!(silent.receive().await?.context("a ping")?.first == PING);

    node.signal(Signal::STOP)?;
    for n in 0..MESSAGES {
        publish(&redis, "lobby", format!("{n}").as_bytes()).await?;
    }
    for (sender, half) in &mut halves {
        sender.write_all(post.get(*half..).context("the other half")?).await?;
    }
    tokio::time::sleep(STOPPED).await;
    node.signal(Signal::CONT)?;

    let expected: Vec<_> = (0..MESSAGES).map(|n| n.to_string()).collect();
    for client in plain.iter().chain([&stream]) {
        let texts = expected.iter().cloned().map(Payload::text);
        ensure!(payloads(&client.heard(MESSAGES).await?).into_iter().eq(texts), "{client:?}");
    }
    while let Some(heard) = answering.join_next().await {
        ensure!(heard?? == expected);
    }
    for (mut sender, _) in halves {
        let mut answer = [0; 12];
        sender.read_exact(&mut answer).await.context("half a request continues")?;
        ensure!(&answer == b"HTTP/1.1 202", "{}", String::from_utf8_lossy(&answer));
    }
    // A session that was pinged and does not answer is still closed, and no other.
    ensure!(silent.close_code().await? == Some(1001));
    let samples = node
        .until_samples("the silent one is counted", |samples| {
            samples.sum("tidegate_connections_closed_total", &["reason=\"heartbeat_timeout\""]) == 1
        })
        .await?;
    ensure!(samples.sum("tidegate_connections_closed_total", &["protocol=\"plain\""]) == 1, "{samples:?}");
    ensure!(
        samples.sum("tidegate_connections", &["protocol=\"plain\""]) == CLIENTS as u64 / 2,
        "{samples:?}"
    );
    ensure!(samples.sum("tidegate_connections", &["protocol=\"sse\""]) == 1, "{samples:?}");
    Ok(())
}

/// A client that reads nothing is not pinged, so it is not silent; after long enough the kernel ends the connection.
#[tokio::test]
async fn the_kernel_ends_a_client_that_reads_nothing() -> Result<()> {
    let node = Builder::new()
        .set("heartbeat.interval", "1s")
        .set("heartbeat.timeout", "5s")
        .set(r#"rooms."lobby".overflow"#, "drop_oldest")
        .start()
        .await?;
    let token = anywhere("alice");
    let stalled = RawSocket::connect_narrow(node.public, &format!("/rooms/lobby?token={token}")).await?;
    let request = Request::get("/rooms/lobby").header("Accept", "text/event-stream").bearer(&token);
    let stream = request.open(node.public).await?;
    let body = vec![b'x'; 60 * 1024];
    let dropped = |samples: &Samples| samples.sum("tidegate_outbound_dropped_total", &[]);
    while dropped(&node.samples().await?) < 200 {
        node.post("lobby", &token, "text/plain", &body).await?;
    }
    // 30 s, in steps of the harness's bound.
    let closed = |samples: &Samples, reason| samples.sum("tidegate_connections_closed_total", &[reason]);
    let given_up = async || {
        node.until_samples("connections that the kernel gave up", |samples| {
            closed(samples, "reason=\"no_progress\"") == 2
        })
        .await
    };
    let samples = match given_up().await {
        Ok(samples) => samples,
        Err(_) => given_up().await?,
    };
    ensure!(samples.sum("tidegate_connections_closed_total", &[]) == 2, "{samples:?}");
    drop((stalled, stream));
    Ok(())
}

//! A dead peer is noticed, a living one is kept, however idle.

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::Payload,
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    token::anywhere,
};

const PING: u8 = 0x89;
const CLOSE: u8 = 0x88;

async fn restless() -> Result<Node> {
    Builder::new().set("heartbeat.interval", "200ms").set("heartbeat.timeout", "1s").start().await
}

#[tokio::test]
async fn who_never_answers_is_closed_and_who_answers_stays() -> Result<()> {
    let node = restless().await?;
    let token = anywhere("alice");
    let answering = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let mut silent = RawSocket::connect(node.public, &format!("/rooms/lobby?token={token}")).await?;

    let mut seen = Vec::new();
    let code = loop {
        let frame = silent.receive().await?.context("the silent one is told why it is closed")?;
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

/// A client's own pings and messages are signs of life, too.
#[tokio::test]
async fn any_byte_counts_as_a_sign_of_life() -> Result<()> {
    let node = restless().await?;
    let token = anywhere("alice");
    let mut talker =
        RawSocket::connect(node.public, &format!("/rooms/lobby?token={token}&echo=false")).await?;
    // It answers no ping, but for each it sees it says something: for longer than the time-out.
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
    // A ping and its answer are 8 bytes, at least: this many are some rounds of everybody.
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
    while text.matches(":\n\n").count() < 3 {
        let chunk = stream.chunk().await?.context("the stream goes on")?;
        text.push_str(std::str::from_utf8(&chunk)?);
    }
    ensure!(text.starts_with("retry: "), "{text}");
    Ok(())
}

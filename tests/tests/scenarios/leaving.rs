//! Leaving without hurting anybody.

use std::{os::unix::process::ExitStatusExt as _, time::Instant};

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::{End, Payload},
    node::Builder,
    raw::RawSocket,
    token::anywhere,
};
use tokio::net::TcpStream;

use crate::stage::{Stage, payloads};

const SOCKETS: usize = 150;
const STREAMS: usize = 50;

#[tokio::test]
async fn two_hundred_sessions_are_sent_on_one_by_one() -> Result<()> {
    let stage = Stage::set_with(|node| node.set("drain.pause", "300ms").set("drain.window", "1s")).await?;
    let Stage { redis: _redis, mut a, b } = stage;
    let token = anywhere("alice");
    let (ws, sse) = (a.ws("lobby", &token, ""), a.url("lobby", &token, ""));
    let sockets = try_join_all((0..SOCKETS).map(|_| Client::websocket(&ws, &[]))).await?;
    let streams = try_join_all((0..STREAMS).map(|_| Client::events(&sse))).await?;
    let elsewhere = Client::websocket(&b.ws("lobby", &token, ""), &[]).await?;

    a.terminate()?;
    let draining = a.until_probe("/readyz", 503).await?;
    ensure!(draining.text().contains("draining"), "{draining:?}");
    ensure!(a.ask_ops("/livez").await?.status == 200);
    // Not ready, still serving those who are there, closed to everybody else.
    for request in [
        Request::upgrade("/rooms/lobby").bearer(&token),
        Request::get("/rooms/lobby").header("Accept", "text/event-stream").bearer(&token),
        Request::post("/rooms/lobby", "text/plain", *b"x").bearer(&token),
    ] {
        // Once the pause is over the listener itself is gone.
        if let Ok(response) = request.send(a.public).await {
            ensure!(response.status == 503 && response.header("Retry-After").is_some(), "{response:?}");
        }
    }
    b.post("lobby", &token, "text/plain", b"one last word").await?;
    let last = Payload::text("one last word");
    ensure!(payloads(&elsewhere.heard(1).await?) == std::slice::from_ref(&last));

    let began = Instant::now();
    let mut ends = Vec::new();
    for socket in &sockets {
        let end = socket.ended().await?;
        ensure!(matches!(end.code(), Some(1001 | 1012)), "{end:?}");
        ends.push(end);
    }
    for stream in &streams {
        ensure!(matches!(stream.ended().await?, End::Closed { .. }), "a stream ends in order");
        ensure!(stream.now().retries.len() == 2, "a stream is told anew when to come back");
    }
    ensure!(began.elapsed().as_millis() > 300, "closes are spread, not all at once: {:?}", began.elapsed());
    for client in sockets.iter().chain(&streams) {
        ensure!(
            client.now().payloads() == [last.clone()],
            "nobody loses what was said before the close began"
        );
    }
    let mut times: Vec<_> =
        streams.iter().filter_map(|stream| stream.now().retries.last().copied()).collect();
    times.sort_unstable();
    times.dedup();
    ensure!(times.len() > STREAMS / 2, "coming back is spread: {times:?}");

    ensure!(a.exited().await?.code() == Some(0));
    ensure!(TcpStream::connect(a.public).await.is_err());
    // The other node has not felt anything.
    b.post("lobby", &token, "text/plain", b"alone now").await?;
    ensure!(payloads(&elsewhere.heard(2).await?) == [last, Payload::text("alone now")]);
    Ok(())
}

/// A message that a client sent before it was told to leave is published.
#[tokio::test]
async fn what_was_sent_before_the_close_is_published() -> Result<()> {
    let Stage { redis: _redis, mut a, b } = Stage::set_with(|node| node.set("drain.pause", "500ms")).await?;
    let token = anywhere("alice");
    let speaker = Client::websocket(&a.ws("lobby", &token, "echo=false"), &[]).await?;
    let listener = Client::websocket(&b.ws("lobby", &token, ""), &[]).await?;
    a.terminate()?;
    a.until_probe("/readyz", 503).await?;
    let sent: Vec<_> = (0..200).map(|n| Payload::text(n.to_string())).collect();
    for payload in &sent {
        speaker.send(payload.clone()).await?;
    }
    ensure!(payloads(&listener.heard(sent.len()).await?) == sent);
    speaker.ended().await?;
    ensure!(a.exited().await?.code() == Some(0));
    Ok(())
}

#[tokio::test]
async fn a_node_that_is_process_one_leaves_too() -> Result<()> {
    let mut node = Builder::new().as_pid_one().start().await?;
    let client = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    node.terminate()?;
    ensure!(matches!(client.ended().await?.code(), Some(1001 | 1012)));
    ensure!(node.exited().await?.code() == Some(0));
    Ok(())
}

#[tokio::test]
async fn a_second_signal_ends_at_once() -> Result<()> {
    let mut node = Builder::new().set("drain.window", "1h").set("drain.deadline", "2h").start().await?;
    let clients = try_join_all(
        (0..20).map(|_| async { Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await }),
    )
    .await?;
    node.terminate()?;
    node.until_probe("/readyz", 503).await?;
    node.terminate()?;
    let status = node.exited().await?;
    ensure!(!status.success(), "ended before everybody had left: {status} {:?}", status.signal());
    for client in clients {
        client.ended().await?;
    }
    Ok(())
}

/// Clients that do not answer their close frames hold nothing up for longer than the deadline.
#[tokio::test]
async fn a_deadline_that_passes_is_told() -> Result<()> {
    let mut node = Builder::new().set("drain.window", "0s").set("drain.deadline", "500ms").start().await?;
    let target = format!("/rooms/lobby?token={}", anywhere("alice"));
    let mut silent = try_join_all((0..3).map(|_| RawSocket::connect(node.public, &target))).await?;
    node.terminate()?;
    ensure!(node.exited().await?.code() == Some(1));
    ensure!(node.output().contains("drain.deadline"), "what was left is told");
    for socket in &mut silent {
        ensure!(socket.close_code().await? == Some(1012), "whoever listens has been told all the same");
    }
    Ok(())
}

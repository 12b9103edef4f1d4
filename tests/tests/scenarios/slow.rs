//! A client that stops reading reaches its own limit, and no other client notices.

use anyhow::{Result, ensure};
use tidegate_tests::{client::Client, journal::Payload, node::Builder, raw::RawSocket, token::anywhere};

use crate::stage::payloads;

#[tokio::test]
async fn a_client_that_stops_reading_is_closed_and_others_receive_everything() -> Result<()> {
    const MESSAGES: usize = 600;
    let node = Builder::new().set("limits.outbound", "256KiB").start().await?;
    let token = anywhere("alice");
    let target = format!("/rooms/lobby?token={token}");
    let fast = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let stream = Client::events(&node.url("lobby", &token, "")).await?;
    let mut stalled = RawSocket::connect_narrow(node.public, &target).await?;
    let memory = node.resident_bytes()?;

    // Far more than the limit and all that the kernel holds for a socket.
    let sent: Vec<_> =
        (0..MESSAGES).map(|n| Payload::text(format!("{n} {}", "x".repeat(32 * 1024)))).collect();
    let sender = Client::websocket(&node.ws("lobby", &token, "echo=false"), &[]).await?;
    for (n, payload) in sent.iter().enumerate() {
        sender.send(payload.clone()).await?;
        // In step with the fast clients: only the one that does not read at all is slow.
        if n % 4 == 3 {
            fast.heard(n + 1).await?;
            stream.heard(n + 1).await?;
        }
    }
    ensure!(payloads(&fast.heard(MESSAGES).await?) == sent);
    ensure!(payloads(&stream.heard(MESSAGES).await?) == sent);

    ensure!(node.samples().await?.sum("tidegate_slow_consumers_total", &[]) == 1);
    // The messages sent before the close are in order; then the connection ends, with the code if that still fitted.
    let (mut heard, mut code) = (0, None);
    while let Some(frame) = stalled.receive().await? {
        match frame.first {
            0x81 => {
                ensure!(Payload::Text(String::from_utf8(frame.payload)?) == sent[heard], "message {heard}");
                heard += 1;
            }
            _ => code = frame.close_code().or(code),
        }
    }
    ensure!(heard < MESSAGES, "the stalled client cannot have received everything");
    ensure!(code.is_none_or(|code| code == 1013), "{code:?}");
    let grown = node.resident_bytes()?.saturating_sub(memory);
    ensure!(grown < 32 << 20, "19 MiB went by, memory grew by {grown} bytes");
    let closed = ["protocol=\"plain\"", "reason=\"slow_consumer\""];
    node.until_samples("slow consumer gone", |samples| {
        samples.sum("tidegate_connections_closed_total", &closed) == 1
    })
    .await?;
    node.until_samples("empty outbound queues", |samples| samples.sum("tidegate_outbound_bytes", &[]) == 0)
        .await?;
    Ok(())
}

/// A stalled event stream is cut in the same way.
#[tokio::test]
async fn a_stream_that_stops_reading_is_cut() -> Result<()> {
    let node = Builder::new().set("limits.outbound", "128KiB").start().await?;
    let token = anywhere("alice");
    let request = tidegate_tests::http::Request::get("/rooms/lobby").header("Accept", "text/event-stream");
    let stalled = request.bearer(&token).open(node.public).await?;
    let fast = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let mut count = 0;
    let body = vec![b'x'; 60 * 1024];
    while node.samples().await?.sum("tidegate_slow_consumers_total", &[]) == 0 {
        ensure!(count < 2000, "a stream that is not read takes everything");
        for _ in 0..16 {
            node.post("lobby", &token, "text/plain", &body).await?;
            count += 1;
        }
    }
    ensure!(fast.heard(count).await?.len() == count);
    let closed = ["protocol=\"sse\"", "reason=\"slow_consumer\""];
    node.until_samples("slow consumer gone", |samples| {
        samples.sum("tidegate_connections_closed_total", &closed) == 1
    })
    .await?;
    drop(stalled);
    Ok(())
}

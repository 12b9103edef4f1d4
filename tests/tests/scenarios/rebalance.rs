//! Sessions that reach the maximum age are closed, and real clients reconnect by themselves.

use anyhow::{Result, ensure};
use tidegate_tests::{
    client::Client,
    journal::{End, Payload},
    node::{Builder, Node},
    token::anywhere,
};

async fn restless() -> Result<Node> {
    let node = Builder::new().set("public.max_session_age", "1s").set("sse.retry", "10ms");
    node.start().await
}

fn aged(protocol: &str) -> [String; 2] {
    [format!("protocol=\"{protocol}\""), "reason=\"max_age\"".to_owned()]
}

async fn until_aged(node: &Node, protocol: &str, count: u64) -> Result<()> {
    let [protocol, reason] = &aged(protocol);
    node.until_samples("sessions that were sent on", |samples| {
        samples.sum("tidegate_connections_closed_total", &[protocol, reason]) >= count
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn the_centrifuge_sdk_reconnects_again_and_again() -> Result<()> {
    let node = restless().await?;
    let token = anywhere("alice");
    let url = format!("ws://{}/connection/websocket", node.public);
    let clients = [
        Client::node_centrifuge(&url, "lobby", &[&token]).await?,
        Client::python_centrifuge(&url, "lobby", &[&token]).await?,
    ];
    for client in &clients {
        let journal = client.until("a third session", |journal| journal.opened >= 3).await?;
        ensure!(journal.end.is_none(), "{journal:?}");
    }
    until_aged(&node, "centrifuge", 4).await
}

#[tokio::test]
async fn an_event_source_reconnects_again_and_again() -> Result<()> {
    let node = restless().await?;
    let client = Client::node_events(&node.url("lobby", &anywhere("alice"), ""), &[]).await?;
    let journal = client.until("a third session", |journal| journal.opened >= 3).await?;
    ensure!(journal.end.is_none(), "{journal:?}");
    until_aged(&node, "sse", 2).await
}

/// A bare WebSocket does not reconnect by itself: the code tells the application.
#[tokio::test]
async fn a_web_socket_close_asks_to_reconnect() -> Result<()> {
    let node = restless().await?;
    let url = node.ws("lobby", &anywhere("alice"), "");
    for client in [Client::node_websocket(&url).await?, Client::python_websocket(&url).await?] {
        let end = client.ended().await?;
        let End::Closed { code: 1012, reason } = &end else { anyhow::bail!("{end:?}") };
        ensure!(reason.contains("come back"), "{reason}");
    }
    until_aged(&node, "plain", 2).await?;
    let again = Client::node_websocket(&url).await?;
    again.send(Payload::text("back")).await?;
    again.hears(&Payload::text("back")).await?;
    Ok(())
}

//! Event streams as other people's clients and middleboxes interpret them.

use anyhow::{Result, ensure};
use futures_util::future::join_all;
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::Payload,
    node::Builder,
    proxy::{Compressing, Nginx},
    token::anywhere,
};

use crate::stage::{alone, payloads};

/// Clients that parse the format themselves and dispatch an empty message for a blank line after anything.
#[tokio::test]
async fn no_client_dispatches_an_empty_message() -> Result<()> {
    let node = Builder::new().set("heartbeat.interval", "100ms").start().await?;
    let token = anywhere("alice");
    let url = node.url("lobby", &token, "");
    let (fetched, httpx, raw) = tokio::try_join!(
        Client::node_fetch_events(&url),
        Client::python_events(&url),
        Client::events(&url),
    )?;
    let clients = [&fetched, &httpx, &raw];
    node.post("lobby", &token, "text/plain", b"one").await?;
    for client in clients {
        client.hears(&Payload::text("one")).await?;
    }
    raw.until("heartbeats", |journal| journal.comments > 5).await?;
    node.post("lobby", &token, "text/plain", b"two").await?;
    for client in clients {
        let heard = payloads(&client.heard(2).await?);
        ensure!(heard == [Payload::text("one"), Payload::text("two")], "{client:?}");
    }
    Ok(())
}

/// A client sends an `id:` back as a header: non-ASCII characters there would keep it from ever reconnecting.
#[tokio::test]
async fn a_client_reconnects_with_the_id_of_any_room() -> Result<()> {
    let node = Builder::new().set("public.max_session_age", "1s").set("sse.retry", "50ms").start().await?;
    let token = anywhere("alice");
    let url = format!("http://{}/rooms?room=%E6%97%A5%E6%9C%AC&room=o&token={token}", node.public);
    let client = Client::node_events(&url, &[]).await?;
    node.post("%E6%97%A5%E6%9C%AC", &token, "text/plain", b"before").await?;
    client.hears(&Payload::text("before")).await?;
    client.until("it has reconnected", |journal| journal.opened > 1).await?;
    let calm = alone().await?;
    let url = format!("http://{}/rooms?room=%E6%97%A5%E6%9C%AC&room=o&token={token}", calm.public);
    let raw = Client::events(&url).await?;
    calm.post("%E6%97%A5%E6%9C%AC", &token, "text/plain", b"after").await?;
    raw.hears(&Payload::text("after")).await?;
    let ids: Vec<_> = raw.now().messages.into_iter().map(|message| message.id).collect();
    ensure!(ids == ["%E6%97%A5%E6%9C%AC"], "{ids:?}");
    Ok(())
}

/// Express's `compression` would hold events back until its buffer is full.
#[tokio::test]
async fn compressing_middleboxes_leave_event_streams_alone() -> Result<()> {
    let node = alone().await?;
    let proxy = Compressing::before(node.public).await?;
    let token = anywhere("alice");
    let url = format!("http://{}/rooms/lobby?token={token}", proxy.address());
    let client = Client::node_events(&url, &[]).await?;
    node.post("lobby", &token, "text/plain", b"through").await?;
    client.hears(&Payload::text("through")).await?;
    // It does compress what it may.
    let page = Request::get("/nowhere").header("Accept-Encoding", "gzip").send(node.public).await?;
    let compressed = Request::get("/nowhere").header("Accept-Encoding", "gzip").send(proxy.address()).await?;
    ensure!(page.header("Content-Encoding").is_none(), "{page:?}");
    ensure!(compressed.header("Content-Encoding") == Some("gzip"), "{compressed:?}");
    Ok(())
}

/// A client and a proxy that send a whole body before reading still get the response and keep using the node.
#[tokio::test]
async fn an_early_refusal_reaches_fetch_and_goes_through_nginx() -> Result<()> {
    const UPLOAD: usize = 1024 * 1024;
    let node = alone().await?;
    let nginx = Nginx::before(node.public).await?;
    for address in [node.public, nginx.address()] {
        let url = format!("http://{address}/rooms/lobby");
        for status in join_all((0..4).map(|_| Client::node_upload(&url, UPLOAD))).await {
            ensure!(status? == 401, "at {address}");
        }
    }
    // Other clients have not been affected.
    let post = Request::post("/rooms/lobby", "text/plain", "x").bearer(&anywhere("alice"));
    ensure!(post.send(nginx.address()).await?.status == 202);
    Ok(())
}

//! JSON lines, in the body of an answer and on a WebSocket.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::{
    client::Client,
    http::{Incoming, Request},
    journal::{End, Payload},
    node::{Builder, Node},
    token::anywhere,
};

use crate::stage::alone;

/// The lines of a body, as they come.
pub struct Lines {
    incoming: Incoming,
    pending: Vec<u8>,
}

impl Lines {
    pub async fn open(node: &Node, target: &str, accept: &str) -> Result<Self> {
        Self::opened(node, target, accept, &anywhere("alice")).await
    }

    pub async fn open_as(node: &Node, target: &str, token: &str) -> Result<Self> {
        Self::opened(node, target, "application/x-ndjson", token).await
    }

    async fn opened(node: &Node, target: &str, accept: &str, token: &str) -> Result<Self> {
        let request = Request::get(target).bearer(token).header("Accept", accept);
        let incoming = request.open(node.public).await?;
        ensure!(incoming.status == 200, "{}", incoming.status);
        ensure!(incoming.header("content-type") == Some("application/x-ndjson"));
        ensure!(incoming.header("vary").is_some_and(|vary| vary.contains("Accept")));
        Ok(Self { incoming, pending: Vec::new() })
    }

    /// The next object; `None` at the end of the body.
    pub async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = self.pending.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            match self.incoming.chunk().await? {
                Some(bytes) => self.pending.extend_from_slice(&bytes),
                None => return Ok(None),
            }
        }
    }
}

#[tokio::test]
async fn a_room_is_one_object_per_line() -> Result<()> {
    let node = Builder::new().set("heartbeat.interval", "100ms").start().await?;
    let token = anywhere("alice");
    let mut lines = Lines::open(&node, "/rooms/lobby", "application/x-ndjson").await?;
    node.post("lobby", &token, "text/plain", "one\ntwo".as_bytes()).await?;
    node.post("lobby?event=tide", &token, "application/json", b"{\"high\":\n true}").await?;
    node.post("lobby", &token, "application/octet-stream", b"\xff\x00").await?;
    let (mut objects, mut beats) = (Vec::new(), 0);
    while objects.len() < 3 || beats < 2 {
        let object = lines.next().await?.context("another line")?;
        if object == json!({}) { beats += 1 } else { objects.push(object) }
    }
    let expected = [
        json!({ "room": "lobby", "data": "one\ntwo" }),
        json!({ "room": "lobby", "event": "tide", "data": { "high": true } }),
        json!({ "room": "lobby", "base64": "/wA=" }),
    ];
    ensure!(objects == expected, "{objects:?}");
    Ok(())
}

/// The same path serves event streams and JSON lines, by what the client prefers.
#[tokio::test]
async fn the_client_chooses_by_its_accept_header() -> Result<()> {
    let node = alone().await?;
    for accept in ["application/x-ndjson", "text/event-stream;q=0.5, application/x-ndjson", "application/*"] {
        Lines::open(&node, "/rooms/lobby", accept).await?;
    }
    for (accept, status, content_type) in [
        ("*/*", 200, "text/event-stream"),
        ("text/event-stream, application/x-ndjson", 200, "text/event-stream"),
        ("application/json", 409, "application/problem+json"),
        ("image/png", 406, "application/problem+json"),
        ("text/event-stream;q=0", 406, "application/problem+json"),
    ] {
        let request = Request::get("/rooms/lobby").bearer(&anywhere("alice")).header("Accept", accept);
        let incoming = request.open(node.public).await?;
        ensure!(incoming.status == status, "{accept}: {}", incoming.status);
        ensure!(incoming.header("content-type") == Some(content_type), "{accept}");
        ensure!(incoming.header("vary").is_some_and(|vary| vary.contains("Accept")), "{accept}");
    }
    Ok(())
}

#[tokio::test]
async fn several_rooms_end_with_the_reason() -> Result<()> {
    let node = Builder::new().set("drain.pause", "0s").set("drain.window", "1s").start().await?;
    let token = anywhere("alice");
    let mut lines = Lines::open(&node, "/rooms?room=a&room=b", "application/x-ndjson").await?;
    node.post("b", &token, "text/plain", b"x").await?;
    ensure!(lines.next().await? == Some(json!({ "room": "b", "data": "x" })));
    node.terminate()?;
    ensure!(lines.next().await? == Some(json!({ "close": "drain", "reconnect": true })));
    ensure!(lines.next().await?.is_none());
    Ok(())
}

#[tokio::test]
async fn a_websocket_speaks_json_where_it_offers_to() -> Result<()> {
    let node = alone().await?;
    let token = anywhere("alice");
    let offer = [("Sec-WebSocket-Protocol", "tidegate.json, tidegate")];
    let json = Client::websocket(&node.ws("lobby", &token, ""), &offer).await?;
    let plain = Client::websocket(&node.ws("lobby", &token, "&echo=false"), &[]).await?;

    json.send(Payload::text(r#"{"data":{"n":1}}"#)).await?;
    plain.hears(&Payload::text(r#"{"n":1}"#)).await?;
    json.hears(&Payload::text(r#"{"room":"lobby","data":{"n":1}}"#)).await?;
    plain.send(Payload::text("hi")).await?;
    json.hears(&Payload::text(r#"{"room":"lobby","data":"hi"}"#)).await?;

    json.send(Payload::text("nonsense")).await?;
    let end = json.ended().await?;
    ensure!(end == End::Closed { code: 1008, reason: "bad request".to_owned() }, "{end:?}");
    let samples = node.samples().await?;
    ensure!(samples.sum("tidegate_connections_opened_total", &["protocol=\"ndjson\""]) == 1);
    Ok(())
}

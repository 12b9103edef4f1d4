//! Redis dies, comes back, or was never there.

use anyhow::{Result, ensure};
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::{Journal, Payload},
    node::Builder,
    redis_server::RedisServer,
    token::anywhere,
};

use crate::stage::{Stage, payloads, publish};

const GAP: &str = "tidegate.gap";

/// The messages received from this text on.
fn since(journal: &Journal, text: &str) -> Vec<Payload> {
    let payloads = journal.payloads();
    let start = payloads.iter().position(|payload| *payload == Payload::text(text)).unwrap_or(payloads.len());
    payloads.into_iter().skip(start).collect()
}

/// Messages published while Redis dies may be missing; received ones arrive once and in order.
fn ensure_in_order(journal: &Journal) -> Result<()> {
    let payloads = journal.payloads();
    let numbers: Vec<u32> = payloads
        .iter()
        .filter_map(|payload| {
            std::str::from_utf8(payload.bytes()).ok()?.strip_prefix("during ")?.parse().ok()
        })
        .collect();
    ensure!(numbers.is_sorted_by(|a, b| a < b), "{numbers:?}");
    Ok(())
}

#[tokio::test]
async fn a_redis_that_dies_under_load_is_one_gap_for_every_session() -> Result<()> {
    let mut stage = Stage::set().await?;
    let token = anywhere("alice");
    let (a, b) = (&stage.a, &stage.b);
    let streams = [
        Client::events(&a.url("lobby", &token, "")).await?,
        Client::events(&b.url("lobby", &token, "")).await?,
        Client::node_events(&b.url("lobby", &token, ""), &[GAP]).await?,
    ];
    let plain = [
        Client::websocket(&a.ws("lobby", &token, ""), &[]).await?,
        Client::websocket(&b.ws("lobby", &token, "gap=ignore"), &[]).await?,
    ];
    let strict = [
        Client::websocket(&a.ws("lobby", &token, "gap=close"), &[]).await?,
        Client::node_websocket(&b.ws("lobby", &token, "gap=close")).await?,
    ];
    // Load that outlives the outage: a socket that publishes until it gets an error.
    let speaker = Client::websocket(&a.ws("lobby", &token, "echo=false"), &[]).await?;
    for n in 0..50 {
        speaker.send(Payload::text(format!("before {n}"))).await?;
    }
    for client in streams.iter().chain(&plain).chain(&strict) {
        client.heard(50).await?;
    }
    for n in 0..20 {
        speaker.send(Payload::text(format!("during {n}"))).await?;
    }
    stage.redis.kill().await?;
    for node in [a, b] {
        node.until_samples("lost broker", |samples| samples.sum("tidegate_broker_up", &[]) == 0).await?;
    }
    stage.redis.restart().await?;

    for stream in &streams {
        stream.until("gap", |journal| journal.events(GAP) == 1).await?;
    }
    for socket in &strict {
        let end = socket.ended().await?;
        ensure!(end.code() == Some(1012), "{end:?}");
    }
    for node in [a, b] {
        node.until_samples("broker", |samples| samples.sum("tidegate_broker_up", &[]) == 1).await?;
    }
    for n in 0..20 {
        let node = if n % 2 == 0 { a } else { b };
        node.post("lobby", &token, "text/plain", format!("after {n}").as_bytes()).await?;
    }
    let after: Vec<_> = (0..20).map(|n| Payload::text(format!("after {n}"))).collect();
    let last = Payload::text("after 19");
    for client in streams.iter().chain(&plain) {
        let journal = client.hears(&last).await?;
        ensure!(since(&journal, "after 0") == after, "{client:?}");
        ensure!(journal.end.is_none() && journal.interrupted == 0, "no other client lost its connection");
    }
    for client in streams.iter().chain(&plain).chain(&strict) {
        ensure_in_order(&client.now())?;
    }
    for stream in &streams {
        let journal = stream.now();
        let gaps: Vec<_> = journal.messages.iter().filter(|message| message.event == GAP).collect();
        ensure!(gaps.len() == 1, "notified once: {gaps:?}");
        let said: serde_json::Value = serde_json::from_slice(gaps[0].payload.bytes())?;
        ensure!(said == serde_json::json!({ "room": "lobby", "cause": "interrupted" }), "{said}");
    }
    for node in [a, b] {
        ensure!(node.samples().await?.sum("tidegate_gaps_total", &["cause=\"interrupted\""]) == 1);
    }
    Ok(())
}

#[tokio::test]
async fn a_node_waits_for_a_redis_that_is_not_there_yet() -> Result<()> {
    let mut redis = RedisServer::start().await?;
    redis.kill().await?;
    let node = Builder::new().set("broker.url", &redis.url()).set("broker.subscribe_timeout", "300ms");
    let node = node.set("broker.publish_timeout", "300ms").launch().await?;
    let token = anywhere("alice");
    ensure!(node.ask_ops("/livez").await?.status == 200);
    let waiting = node.until_probe("/readyz", 503).await?;
    ensure!(waiting.text().contains("broker"), "{waiting:?}");
    for request in [
        Request::upgrade("/rooms/lobby").bearer(&token),
        Request::get("/rooms/lobby").bearer(&token),
        Request::post("/rooms/lobby", "text/plain", *b"x").bearer(&token),
    ] {
        let response = request.send(node.public).await?;
        ensure!(response.status == 503 && response.header("Retry-After").is_some(), "{response:?}");
        response.problem()?;
    }
    redis.restart().await?;
    node.until_ready().await?;
    let client = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    publish(&redis, "lobby", b"hello").await?;
    ensure!(payloads(&client.heard(1).await?) == [Payload::text("hello")]);
    Ok(())
}

#[tokio::test]
async fn a_redis_lost_later_degrades_the_node_and_fails_publications() -> Result<()> {
    let mut stage = Stage::set_with(|node| node.set("broker.publish_timeout", "300ms")).await?;
    let token = anywhere("alice");
    let listener = Client::websocket(&stage.a.ws("lobby", &token, ""), &[]).await?;
    let speaker = Client::websocket(&stage.a.ws("lobby", &token, ""), &[]).await?;
    stage.redis.kill().await?;
    stage.a.until_samples("lost broker", |samples| samples.sum("tidegate_broker_up", &[]) == 0).await?;
    let ready = stage.a.ask_ops("/readyz").await?;
    ensure!(ready.status == 200 && ready.text().contains("degraded"), "{ready:?}");
    ensure!(stage.a.ask_ops("/livez").await?.status == 200);

    let post = Request::post("/rooms/lobby", "text/plain", *b"x").bearer(&token).send(stage.a.public).await?;
    ensure!(post.status == 503 && post.header("Retry-After").is_some(), "{post:?}");
    post.problem()?;
    speaker.send(Payload::text("into the void")).await?;
    ensure!(speaker.ended().await?.code() == Some(1013));

    stage.redis.restart().await?;
    stage.a.until_samples("broker", |samples| samples.sum("tidegate_broker_up", &[]) == 1).await?;
    stage.a.post("lobby", &token, "text/plain", b"again").await?;
    let journal = listener.hears(&Payload::text("again")).await?;
    ensure!(
        journal.payloads() == [Payload::text("again")],
        "what was refused is not delivered later: {journal:?}"
    );
    Ok(())
}

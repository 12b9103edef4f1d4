//! Clients that respond to a gap by subscribing again, all of them at once.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tidegate_tests::{
    client::Client,
    eventually::eventually,
    fault_proxy::{FaultProxy, Target, Which},
    journal::Payload,
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    redis_server::RedisServer,
    token::anywhere,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const SUBSCRIBERS: Which = Which::Saying("tidegate-subscriber");
/// The last publication.
const END: u64 = u64::MAX;

/// The messages of a member: a list of numbers for each of its subscriptions.
type Heard = Vec<Vec<u64>>;

/// Publishes numbers until it is stopped. Returns the last one.
async fn count(speaker: Client, stop: CancellationToken) -> Result<u64> {
    let mut number = 0;
    while !stop.is_cancelled() {
        speaker.send(Payload::text(number.to_string())).await?;
        number += 1;
        tokio::time::sleep(std::time::Duration::from_millis(2)).await; // a pace, not a wait
    }
    Ok(number)
}

async fn subscribe(socket: &mut RawSocket, id: usize) -> Result<()> {
    let command = format!(r#"{{"id":{id},"subscribe":{{"channel":"lobby"}}}}"#);
    socket.send(&Frame::text(command)).await
}

/// Listens until the end, and subscribes again at each unsubscribe. `subscribed` counts its subscriptions.
async fn listen(mut socket: RawSocket, subscribed: Arc<AtomicUsize>) -> Result<Heard> {
    let (mut heard, mut inside) = (Heard::new(), false);
    subscribe(&mut socket, 2).await?;
    loop {
        let frame = socket.receive().await?.context("it stays open")?;
        let said: Value = serde_json::from_slice(&frame.payload)
            .with_context(|| String::from_utf8_lossy(&frame.payload).into_owned())?;
        if said.get("subscribe").is_some() {
            heard.push(Vec::new());
            inside = true;
            subscribed.fetch_add(1, Ordering::Relaxed);
        } else if let Some(unsubscribe) = said.pointer("/push/unsubscribe") {
            ensure!(inside && unsubscribe["code"] == 2500, "{said}");
            inside = false;
            subscribe(&mut socket, heard.len() + 2).await?;
        } else if let Some(data) = said.pointer("/push/pub/data") {
            ensure!(inside, "{said} came without a subscription");
            let number = data.as_u64().context("a number")?;
            if number == END {
                return Ok(heard);
            }
            heard.last_mut().context("a subscription")?.push(number);
        } else {
            ensure!(said.as_object().is_some_and(serde_json::Map::is_empty), "a heartbeat, not {said}");
        }
    }
}

async fn member(node: &Node, token: &str) -> Result<RawSocket> {
    let mut socket = RawSocket::connect(node.public, "/connection/websocket").await?;
    socket.send(&Frame::text(format!(r#"{{"id":1,"connect":{{"token":"{token}"}}}}"#))).await?;
    let answer = socket.receive().await?.context("an answer")?;
    ensure!(!String::from_utf8_lossy(&answer.payload).contains("error"), "{answer:?}");
    Ok(socket)
}

/// A room is notified slice by slice; notified members are back already, and the load continues.
#[tokio::test]
async fn a_client_that_resubscribes_during_a_round_gets_everything_once() -> Result<()> {
    const MEMBERS: usize = 600;
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let node = Builder::new().set("shards", "1").set("broker.url", &proxy.redis_url()).start().await?;
    let token = anywhere("alice");
    let subscribed = Arc::new(AtomicUsize::new(0));
    let mut members = JoinSet::new();
    for _ in 0..MEMBERS {
        members.spawn(listen(member(&node, &token).await?, Arc::clone(&subscribed)));
    }
    let subscriptions = async |count: usize| {
        eventually("subscriptions", async || match subscribed.load(Ordering::Relaxed) {
            enough if enough >= count => Ok(()),
            few => Err(few),
        })
        .await
    };
    subscriptions(MEMBERS).await?;
    let speaker = Client::websocket(&node.ws("lobby", &token, "echo=false"), &[]).await?;
    let stop = CancellationToken::new();
    let mut counting = JoinSet::new();
    counting.spawn(count(speaker, stop.clone()));

    for interruption in 1..=3 {
        proxy.cut(&SUBSCRIBERS);
        subscriptions((interruption + 1) * MEMBERS).await?;
        let gaps = node.samples().await?.sum("tidegate_gaps_total", &["cause=\"interrupted\""]);
        ensure!(gaps == interruption as u64, "{gaps} interruptions of {interruption}");
    }
    stop.cancel();
    let count = counting.join_next().await.context("it was started")???;
    node.post("lobby", &token, "application/json", END.to_string().as_bytes()).await?;

    while let Some(heard) = members.join_next().await {
        let heard = heard??;
        ensure!(heard.len() == 4, "three gaps, not {}: {heard:?}", heard.len() - 1);
        for numbers in &heard {
            ensure!(numbers.is_sorted_by(|a, b| a + 1 == *b), "nothing twice, nothing missing: {numbers:?}");
        }
        let all = heard.concat();
        ensure!(all.is_sorted_by(|a, b| a < b), "nothing twice: {all:?}");
        ensure!(heard.last().and_then(|numbers| numbers.last()).is_none_or(|last| last + 1 == count));
    }
    Ok(())
}

//! The setup of most scenarios.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use tidegate_tests::{
    journal::{Message, Payload},
    node::{Builder, Node},
    redis_server::RedisServer,
};

/// One Redis and two nodes on it.
pub struct Stage {
    pub redis: RedisServer,
    pub a: Node,
    pub b: Node,
}

impl Stage {
    pub async fn set() -> Result<Self> {
        Self::set_with(|node| node).await
    }

    /// A backend's bare `PUBLISH`.
    pub async fn publish(&self, room: &str, payload: &[u8]) -> Result<()> {
        publish(&self.redis, room, payload).await
    }

    /// Both nodes with additional settings.
    pub async fn set_with(settings: impl FnOnce(Builder) -> Builder) -> Result<Self> {
        let redis = RedisServer::start().await?;
        let node = settings(Builder::new().set("broker.url", &redis.url()));
        let (a, b) = tokio::try_join!(node.start(), node.start())?;
        Ok(Self { redis, a, b })
    }
}

/// A backend's bare `PUBLISH`, by `redis-cli`.
pub async fn publish(redis: &RedisServer, room: &str, payload: &[u8]) -> Result<()> {
    let topic = format!("room:{room}");
    // Without input the command is used as it is.
    let arguments: &[&str] = if payload.is_empty() { &["PUBLISH", &topic, ""] } else { &["PUBLISH", &topic] };
    redis.cli(arguments, payload).await.map(drop)
}

/// A node with the embedded broker.
pub async fn alone() -> Result<Node> {
    Builder::new().start().await
}

/// The payloads, in the order in which they were received.
pub fn payloads(messages: &[Message]) -> Vec<Payload> {
    messages.iter().map(|message| message.payload.clone()).collect()
}

/// The payloads as an event stream delivers them.
pub fn as_event_data(payloads: &[Payload]) -> Vec<Payload> {
    payloads.iter().map(Payload::as_event_data).collect()
}

/// Fails unless `heard` is a merge of `sent`: every sender's messages, each once, in the sender's order, and
/// nothing else.
pub fn ensure_merge(heard: &[Payload], sent: &[Vec<Payload>]) -> Result<()> {
    let sender_of: HashMap<_, _> =
        (0..).zip(sent).flat_map(|(n, all)| all.iter().map(move |one| (one, n))).collect();
    let total: usize = sent.iter().map(Vec::len).sum();
    ensure!(sender_of.len() == total, "payloads must differ, or their order cannot be checked");
    for (n, all) in (0..).zip(sent) {
        let own: Vec<_> = heard.iter().filter(|payload| sender_of.get(payload) == Some(&n)).collect();
        ensure!(own == all.iter().collect::<Vec<_>>(), "sender {n} sent {all:?}, received was {own:?}");
    }
    ensure!(heard.len() == total, "{total} messages were sent, {} were received", heard.len());
    Ok(())
}

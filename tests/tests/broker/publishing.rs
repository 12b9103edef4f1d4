//! What happens to publications when their connection fails: settled once, delivered at most once, and never
//! more queued than allowed.

use std::time::Duration;

use anyhow::{Result, ensure};
use broker_bridge::{Accepted, Broker, BrokerError, Data, Publication, redis::RedisConfig};
use tidegate_tests::{
    fault_proxy::{Direction, FaultProxy, Flow, Target, Which},
    redis_server::RedisServer,
};

use crate::stage::{Node, brief, config, has, room};

const PUBLISHERS: Which = Which::Saying("tidegate-publisher");

#[tokio::test]
async fn an_outage_fills_the_queue_and_recovery_frees_it() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let config = RedisConfig {
        publishers: 1,
        publish_queue_bytes: 64 * 1024,
        publish_timeout: Duration::from_millis(300),
        ..config(&proxy.redis_url())?
    };
    let (node, listener) = (Node::up_with(config).await?, Node::up(&redis.url()).await?);
    let room = room("outage");
    listener.subscribe(&room).await?;
    proxy.refuse(true);
    proxy.cut(&Which::All);
    node.until_interrupted().await?;

    let mut taken = 0;
    let full = loop {
        match node
            .broker
            .try_publish(node.receipts.request(&room, Publication::new(Data::text("x".repeat(704)))))
        {
            Ok(()) => taken += 1,
            Err(request) => break request,
        }
        ensure!(taken <= 64, "64 KiB hold 64 publications of a KiB each, their overhead included");
    };
    ensure!(taken == 64, "{taken}");
    ensure!(node.sample("tidegate_broker_publish_queue_bytes")? <= 65_536);
    // A publisher that waits for space gets it when those before it have timed out.
    node.broker.publish(full).await;
    let settled = node.receipts.wait(65).await;
    ensure!(settled.values().all(|outcomes| outcomes == &[Err(BrokerError::Unavailable)]), "{settled:?}");
    ensure!(node.sample("tidegate_broker_publish_queue_bytes")? == 0);
    ensure!(node.sample("tidegate_broker_publications_total{result=\"unavailable\"}")? == 65);

    proxy.refuse(false);
    node.until_up().await?;
    node.publish(&room, "after").await;
    let heard = listener.heard.wait(&room, "what was published later", has("after")).await;
    ensure!(brief(&heard) == ["after"], "what was refused is never delivered: {heard:?}");
    Ok(())
}

#[tokio::test]
async fn queued_publications_are_delivered_in_order_after_a_short_outage() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let (node, listener) = (Node::up(&proxy.redis_url()).await?, Node::up(&redis.url()).await?);
    let room = room("short");
    listener.subscribe(&room).await?;
    proxy.refuse(true);
    proxy.cut(&Which::All);
    // Both of the node's publishers know, so none of the following is in flight when the connection is lost.
    until_no_publisher(&node).await?;
    for number in 0..300 {
        node.publish(&room, &number.to_string()).await;
    }
    proxy.refuse(false);
    let settled = node.receipts.wait(300).await;
    ensure!(settled.values().all(|outcomes| outcomes == &[Ok(Accepted::default())]), "{settled:?}");
    let heard = listener.heard.wait(&room, "all of them", |heard| heard.len() >= 300).await;
    ensure!(brief(&heard) == (0..300).map(|number| number.to_string()).collect::<Vec<_>>(), "{heard:?}");
    Ok(())
}

async fn until_no_publisher(node: &Node) -> Result<()> {
    let connections = "tidegate_broker_connections{role=\"publisher\"}";
    tidegate_tests::eventually::eventually("the publishers know", async || match node.sample(connections) {
        Ok(0) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await
}

/// The server has executed it, but the answer is lost: the node does not know the outcome and does not send it again.
#[tokio::test]
async fn publications_in_flight_are_unknown_and_never_sent_twice() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let (node, listener) = (Node::up(&proxy.redis_url()).await?, Node::up(&redis.url()).await?);
    let room = room("in-flight");
    listener.subscribe(&room).await?;
    proxy.set(PUBLISHERS, Direction::ToClient, Flow::Blackhole);
    for number in 0..10 {
        node.publish(&room, &number.to_string()).await;
    }
    listener.heard.wait(&room, "all ten", |heard| heard.len() >= 10).await;
    proxy.cut(&PUBLISHERS);
    let settled = node.receipts.wait(10).await;
    ensure!(settled.values().all(|outcomes| outcomes == &[Err(BrokerError::Unknown)]), "{settled:?}");
    ensure!(node.sample("tidegate_broker_publications_total{result=\"unknown\"}")? == 10);

    proxy.resume();
    node.until_up().await?;
    node.publish(&room, "after").await;
    let heard = listener.heard.wait(&room, "what was published later", has("after")).await;
    let expected = (0..10).map(|number| number.to_string()).chain(["after".to_owned()]).collect::<Vec<_>>();
    ensure!(brief(&heard) == expected, "{heard:?}");
    Ok(())
}

#[tokio::test]
async fn an_answer_that_never_arrives_times_out() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let config = RedisConfig { publish_timeout: Duration::from_millis(300), ..config(&proxy.redis_url())? };
    let node = Node::up_with(config).await?;
    proxy.set(PUBLISHERS, Direction::ToServer, Flow::Stall);
    for number in 0..10 {
        node.publish(&room("silence"), &number.to_string()).await;
    }
    let settled = node.receipts.wait(10).await;
    let given_up = [Err(BrokerError::Unknown), Err(BrokerError::Unavailable)];
    ensure!(
        settled.values().all(|outcomes| matches!(&outcomes[..], [one] if given_up.contains(one))),
        "{settled:?}"
    );
    proxy.resume();
    node.until_up().await
}

#[tokio::test]
async fn closing_without_a_redis_does_not_wait_longer_than_a_publication_may() -> Result<()> {
    let mut redis = RedisServer::start().await?;
    let config = RedisConfig { publish_timeout: Duration::from_millis(300), ..config(&redis.url())? };
    let node = Node::up_with(config).await?;
    redis.kill().await?;
    until_no_publisher(&node).await?;
    for _ in 0..10 {
        node.publish(&room("closing"), "x").await;
    }
    tokio::time::timeout(tidegate_tests::PATIENCE, node.broker.close()).await?;
    let settled = node.receipts.settled();
    let fair = [Err(BrokerError::Unavailable), Err(BrokerError::Closed)];
    ensure!(settled.len() == 10, "all are settled when close returns: {settled:?}");
    ensure!(
        settled.values().all(|outcomes| matches!(&outcomes[..], [one] if fair.contains(one))),
        "{settled:?}"
    );
    Ok(())
}

//! What makes a connection healthy, besides answering: its server is the master, publishers and subscribers are on
//! the same one, an error is the answer to one command only, and a pause of this process is not a fault of the server.

use std::time::Duration;

use anyhow::{Result, ensure};
use broker_bridge::{Accepted, Broker, BrokerError, BrokerStatus, redis::RedisConfig};
use tidegate_tests::{
    eventually::eventually,
    fault_proxy::{FaultProxy, Target, Which},
    redis_server::RedisServer,
};

use crate::stage::{Node, brief, config, has, room, rooms};

const PUBLISHERS: Which = Which::Saying("tidegate-publisher");

fn ended(role: &str, cause: &str) -> String {
    format!("tidegate_broker_connections_ended_total{{cause=\"{cause}\",role=\"{role}\"}}")
}

async fn until_at_least(node: &Node, series: &str, least: i64) -> Result<()> {
    eventually(series, async || match node.sample(series) {
        Ok(value) if value >= least => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await
}

/// A failover that leaves the node's connections with the old master, which is now a replica.
#[tokio::test]
async fn every_connection_leaves_a_demoted_master_and_it_is_a_gap() -> Result<()> {
    const USER: &str = "user tidegate on >s3cret resetchannels &room:* &tidegate:canary:* \
                        -@all +subscribe +unsubscribe +publish";
    let redis = RedisServer::builder().setting(USER).start().await?;
    let new = RedisServer::builder().setting(USER).start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let url = proxy.redis_url().replace("redis://", "redis://tidegate:s3cret@");
    let (node, other) = (Node::up(&url).await?, Node::up(&new.url()).await?);
    let rooms = rooms(20);
    node.subscribe_all(&rooms).await?;
    redis.cli(&["REPLICAOF", "127.0.0.1", &new.port().to_string()], b"").await?;
    let told =
        |status: &BrokerStatus| matches!(status, BrokerStatus::Interrupted(why) if why.contains("replica"));
    node.until("notified of the demotion", told).await?;
    proxy.retarget(Target::Unix(new.socket()));
    node.until_up().await?;
    for room in &rooms {
        node.heard.wait(room, "its gap", has("[interrupted]")).await;
        other.publish(room, "after").await;
    }
    for room in &rooms {
        let heard = brief(&node.heard.wait(room, "what the new master has", has("after")).await);
        ensure!(heard == ["[interrupted]", "after"], "{room}: {heard:?}");
    }
    ensure!(node.sample(&ended("subscriber", "demoted"))? == 2, "each of them, once");
    ensure!(node.sample(&ended("publisher", "demoted"))? == 2, "each of them, once");
    eventually("no connection is left at the old master", async || match proxy.open(&Which::All) {
        5 => Ok(()),
        open => Err(open),
    })
    .await?;
    let log = String::from_utf8(redis.cli(&["ACL", "LOG"], b"").await?)?;
    ensure!(log.trim().is_empty(), "the documented permissions are enough: {log}");
    Ok(())
}

/// Subscribers on one server and publishers on another: everything answers, but nothing arrives.
#[tokio::test]
async fn publishers_and_subscribers_on_different_servers_are_both_replaced() -> Result<()> {
    let (old, new) = (RedisServer::start().await?, RedisServer::start().await?);
    let proxy = FaultProxy::to(Target::Unix(old.socket())).await?;
    let config = RedisConfig { canary_timeout: Duration::from_millis(500), ..config(&proxy.redis_url())? };
    let (node, other) = (Node::up_with(config).await?, Node::up(&new.url()).await?);
    let rooms = rooms(20);
    node.subscribe_all(&rooms).await?;
    // The name moves. Subscribers follow when they are cut, publishers stay.
    proxy.retarget(Target::Unix(new.socket()));
    old.cli(&["CLIENT", "KILL", "TYPE", "pubsub"], b"").await?;
    // Both meet again at the new server: its own traffic is not mistaken for theirs.
    until_at_least(&node, &ended("publisher", "missed"), 2).await?;
    node.until_up().await?;
    eventually("each receives what the other publishes", async || {
        node.publish(&rooms[0], "ping").await;
        let heard = brief(&other.heard.of(&rooms[0]));
        drop(other.ask(&rooms[0]).await);
        if heard.iter().any(|text| text == "ping") { Ok(()) } else { Err(heard) }
    })
    .await?;
    ensure!(node.sample(&ended("publisher", "missed"))? == 2, "each of them, once");
    Ok(())
}

/// Proxies, and servers with `timeout`, cut unused connections.
#[tokio::test]
async fn publishers_are_never_idle() -> Result<()> {
    let redis = RedisServer::builder().setting("timeout 1").start().await?;
    let node = Node::up(&redis.url()).await?;
    // Two publishers, two subscribers, five times a second: more than three seconds.
    until_at_least(&node, "tidegate_broker_canary_seconds_count", 70).await?;
    for role in ["publisher", "subscriber"] {
        ensure!(node.sample(&ended(role, "closed"))? == 0, "{role}");
    }
    ensure!(node.broker.status().borrow().is_up());
    Ok(())
}

/// While a server runs a script it refuses commands without executing them: a temporary error, not a fault of the
/// connection.
#[tokio::test]
async fn a_busy_server_refuses_for_the_moment_and_no_connection_is_lost() -> Result<()> {
    let redis = RedisServer::builder().setting("busy-reply-threshold 100").start().await?;
    let node = Node::up(&redis.url()).await?;
    let listened = room("listened");
    node.subscribe(&listened).await?;
    let script = redis.cli(&["EVAL", "while true do end", "0"], b"");
    let busy = async {
        eventually("the server is busy", async || match redis.cli(&["PING"], b"").await {
            Err(error) if format!("{error:#}").contains("BUSY") => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await?;
        for _ in 0..10 {
            node.publish(&listened, "refused").await;
        }
        let settled = node.receipts.wait(10).await;
        ensure!(
            settled.values().all(
                |outcomes| matches!(&outcomes[..], [Err(BrokerError::NotNow(why))] if why.starts_with("BUSY"))
            ),
            "{settled:?}"
        );
        let waiting = node.ask(&room("new"));
        redis.cli(&["SCRIPT", "KILL"], b"").await?;
        // It only had to wait.
        tokio::time::timeout(tidegate_tests::PATIENCE, waiting).await??;
        anyhow::Ok(())
    };
    let (script, busy) = tokio::join!(script, busy);
    busy?;
    ensure!(script.is_err(), "it was killed");
    node.until_up().await?;
    node.publish(&listened, "after").await;
    let heard = brief(&node.heard.wait(&listened, "what is newer", has("after")).await);
    ensure!(heard == ["after"], "no refused message was delivered, and no room was interrupted: {heard:?}");
    ensure!(node.sample("tidegate_broker_interruptions_total")? == 0);
    ensure!(node.sample("tidegate_broker_publications_total{result=\"not_now\"}")? == 10);
    Ok(())
}

/// A server that loads its data answers many commands with an error, but delivers publications.
#[tokio::test]
async fn a_loading_server_is_one_gap_and_loses_nothing_after_it() -> Result<()> {
    let mut redis = RedisServer::builder()
        .setting("enable-debug-command yes")
        .setting("loading-process-events-interval-bytes 1024")
        .start()
        .await?;
    let node = Node::up(&redis.url()).await?;
    let room = room("loading");
    node.subscribe(&room).await?;
    redis.cli(&["DEBUG", "POPULATE", "20000", "key", "100"], b"").await?;
    redis.cli(&["SAVE"], b"").await?;
    // About ten seconds of loading, during which the server handles events.
    redis.set("key-load-delay 500");
    redis.restart_loading().await?;
    node.until_interrupted().await?;
    node.until_up().await?;
    ensure!(redis.is_loading().await?, "it is still loading when all connections are up");
    for number in 0..20 {
        node.publish(&room, &number.to_string()).await;
    }
    let settled = node.receipts.wait(20).await;
    ensure!(settled.values().all(|outcomes| outcomes == &[Ok(Accepted::default())]), "{settled:?}");
    let heard = brief(&node.heard.wait(&room, "the last one", has("19")).await);
    let expected: Vec<_> =
        ["[interrupted]".to_owned()].into_iter().chain((0..20).map(|number| number.to_string())).collect();
    ensure!(heard == expected, "{heard:?}");
    let seen = node.sample("tidegate_broker_canary_seconds_count")?;
    ensure!(redis.is_loading().await?, "all of this happened while it loaded");
    // More health checks happen while it loads, and none of them counts as a failure.
    until_at_least(&node, "tidegate_broker_canary_seconds_count", seen + 12).await?;
    ensure!(node.sample("tidegate_broker_interruptions_total")? == 2, "two connections, each lost once");
    ensure!(node.broker.status().borrow().is_up());
    redis.cli(&["CONFIG", "SET", "key-load-delay", "0"], b"").await?;
    Ok(())
}

/// A room that the users of this server may not access, and one that they may.
#[tokio::test]
async fn a_publisher_that_is_disconnected_meanwhile_causes_no_gap() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let node = Node::up(&proxy.redis_url()).await?;
    let room = room("publisher");
    node.subscribe(&room).await?;
    until_at_least(&node, "tidegate_broker_canary_seconds_count", 4).await?;
    proxy.cut(&PUBLISHERS);
    until_at_least(&node, &ended("publisher", "closed"), 2).await?;
    node.until_up().await?;
    node.publish(&room, "after").await;
    let heard = brief(&node.heard.wait(&room, "what is newer", has("after")).await);
    ensure!(heard == ["after"], "publications take another path than deliveries: {heard:?}");
    Ok(())
}

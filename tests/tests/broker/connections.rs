//! Pub/sub connections that are lost, stuck, blackholed, or not there yet: the events of each room, with
//! exact counts.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use broker_bridge::{
    Accepted, Affinity, Broker, BrokerStatus, GapCause, Place, Publication, RoomName, Sink,
    conformance::affinity_of,
    redis::{Part, RedisConfig},
};
use tidegate_tests::{
    eventually::eventually,
    fault_proxy::{Direction, FaultProxy, Flow, Target, Which},
    redis_server::RedisServer,
};
use tokio::runtime::{self, Runtime};

use crate::stage::{Node, brief, config, has, room, rooms};

const SUBSCRIBERS: Which = Which::Saying("tidegate-subscriber");
const OTHERS: Which = Which::NotSaying("tidegate-subscriber");

/// Publishes three texts in every room and expects each room to receive one gap and then these.
async fn expect_one_gap_then_order(node: &Node, speaker: &Node, rooms: &[RoomName]) -> Result<()> {
    for text in ["1", "2", "3"] {
        for room in rooms {
            speaker.publish(room, text).await;
        }
    }
    for room in rooms {
        let heard = node.heard.wait(room, "the last publication", has("3")).await;
        ensure!(brief(&heard) == ["[interrupted]", "1", "2", "3"], "{room}: {:?}", brief(&heard));
    }
    Ok(())
}

#[tokio::test]
async fn a_redis_that_was_killed_is_one_gap_for_each_of_200_rooms() -> Result<()> {
    let mut redis = RedisServer::start().await?;
    let (node, speaker) = (Node::up(&redis.url()).await?, Node::up(&redis.unix_url()).await?);
    let rooms = rooms(200);
    node.subscribe_all(&rooms).await?;
    ensure!(node.sample("tidegate_broker_topics")? == 200);

    redis.kill().await?;
    let why = node.until_interrupted().await?;
    ensure!(why.contains("redis://127.0.0.1"), "{why}");
    ensure!(node.sample("tidegate_broker_up")? == 0);
    // Requested while the server is down: acknowledged later, and without a gap.
    let new = room("new");
    let waiting = node.ask(&new);
    redis.restart().await?;
    node.until_up().await?;
    waiting.await?;

    for room in &rooms {
        ensure!(
            brief(&node.heard.of(room)) == ["[interrupted]"],
            "every gap is reported before it is up again"
        );
    }
    speaker.until_up().await?;
    expect_one_gap_then_order(&node, &speaker, &rooms).await?;
    ensure!(node.heard.of(&new).is_empty());
    ensure!(node.sample("tidegate_broker_resubscriptions_total")? == 200);
    ensure!(node.sample("tidegate_broker_interruptions_total")? == 2, "two connections, each lost once");
    ensure!(node.sample("tidegate_broker_connections{role=\"subscriber\"}")? == 2);
    Ok(())
}

#[tokio::test]
async fn connections_that_are_cut_come_back_with_one_gap() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let (node, speaker) = (Node::up(&proxy.redis_url()).await?, Node::up(&redis.url()).await?);
    let rooms = rooms(50);
    node.subscribe_all(&rooms).await?;
    proxy.cut(&SUBSCRIBERS);
    for room in &rooms {
        node.heard.wait(room, "its gap", has("[interrupted]")).await;
    }
    node.until_up().await?;
    expect_one_gap_then_order(&node, &speaker, &rooms).await
}

#[tokio::test]
async fn repeated_failures_to_reconnect_are_one_gap() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let (node, speaker) = (Node::up(&proxy.redis_url()).await?, Node::up(&redis.url()).await?);
    let rooms = rooms(50);
    node.subscribe_all(&rooms).await?;
    let before = proxy.accepted();
    proxy.refuse(true);
    proxy.cut(&SUBSCRIBERS);
    eventually("six vain attempts", async || match proxy.accepted() - before {
        attempts if attempts >= 6 => Ok(()),
        attempts => Err(attempts),
    })
    .await?;
    proxy.refuse(false);
    node.until_up().await?;
    expect_one_gap_then_order(&node, &speaker, &rooms).await
}

#[tokio::test]
async fn client_kill_is_an_interruption_like_any_other() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up_with(RedisConfig { subscribers: 1, ..config(&redis.url())? }).await?;
    let rooms = rooms(20);
    node.subscribe_all(&rooms).await?;
    redis.cli(&["CLIENT", "KILL", "TYPE", "pubsub"], b"").await?;
    for room in &rooms {
        node.heard.wait(room, "its gap", has("[interrupted]")).await;
    }
    node.until_up().await?;
    ensure!(node.sample("tidegate_broker_interruptions_total")? == 1);
    expect_one_gap_then_order(&node, &node, &rooms).await
}

/// The message of a server that ends a subscription by itself, as a Cluster does when a slot moves.
fn unsubscribed(topic: &str) -> Vec<u8> {
    format!(">3\r\n$11\r\nunsubscribe\r\n${}\r\n{topic}\r\n:0\r\n", topic.len()).into_bytes()
}

#[tokio::test]
async fn a_subscription_ended_by_the_server_interrupts_only_that_room() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let config = RedisConfig { subscribers: 1, ..config(&proxy.redis_url())? };
    let (node, speaker) = (Node::up_with(config).await?, Node::up(&redis.url()).await?);
    let rooms = rooms(20);
    node.subscribe_all(&rooms).await?;
    let accepted = proxy.accepted();

    proxy.say(&SUBSCRIBERS, &unsubscribed("room:room:7"));
    node.heard.wait(&rooms[7], "its gap", has("[interrupted]")).await;
    // For a topic without interest, and of a kind that this version does not know.
    proxy.say(&SUBSCRIBERS, &unsubscribed("room:unknown"));
    proxy.say(&SUBSCRIBERS, b">3\r\n$12\r\nsunsubscribe\r\n$1\r\nx\r\n:0\r\n");
    // Asked again, the server confirms the subscription: no caller waits in vain.
    node.subscribe(&rooms[7]).await?;
    for room in &rooms {
        speaker.publish(room, "after").await;
    }
    for (number, room) in rooms.iter().enumerate() {
        let heard = brief(&node.heard.wait(room, "what is newer", has("after")).await);
        let expected: &[_] = if number == 7 { &["[interrupted]", "after"] } else { &["after"] };
        ensure!(heard == expected, "{room}: {heard:?}");
    }
    ensure!(proxy.accepted() == accepted, "no connection was made anew");
    ensure!(node.sample("tidegate_broker_topic_interruptions_total")? == 1);
    ensure!(node.sample("tidegate_broker_interruptions_total")? == 0);
    ensure!(node.broker.status().borrow().is_up());
    Ok(())
}

#[tokio::test]
async fn a_blackholed_connection_is_detected_by_its_silence() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let config = RedisConfig { canary_timeout: Duration::from_millis(300), ..config(&proxy.redis_url())? };
    let config = RedisConfig { connect_timeout: Duration::from_millis(300), ..config };
    let (node, speaker) = (Node::up_with(config).await?, Node::up(&redis.url()).await?);
    let rooms = rooms(20);
    node.subscribe_all(&rooms).await?;

    proxy.set(SUBSCRIBERS, Direction::ToClient, Flow::Blackhole);
    let why = node.until_interrupted().await?;
    ensure!(why.contains("no answer within"), "{why}");
    // Stall both connections: one that resumes before it has noticed would have lost bytes that no network loses.
    eventually("both have missed their canary", async || {
        match node.sample("tidegate_broker_canary_missed_total") {
            Ok(count) if count >= 2 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    // Publishing takes another path, which works.
    node.publish(&rooms[0], "still published").await;
    ensure!(node.receipts.wait(1).await.values().all(|outcomes| outcomes == &[Ok(Accepted::default())]));

    proxy.resume();
    node.until_up().await?;
    expect_one_gap_then_order(&node, &speaker, &rooms).await
}

/// A possible result of a failover: the pub/sub connections stay with a server that answers `PING` but receives
/// no publications any more.
#[tokio::test]
async fn the_canary_detects_a_connection_that_answers_but_delivers_nothing() -> Result<()> {
    let (old, new) = (RedisServer::start().await?, RedisServer::start().await?);
    let proxy = FaultProxy::to(Target::Unix(old.socket())).await?;
    let config = RedisConfig { canary_timeout: Duration::from_millis(500), ..config(&proxy.redis_url())? };
    let node = Node::up_with(config).await?;
    let speaker = Node::up(&new.url()).await?;
    let rooms = rooms(20);
    node.subscribe_all(&rooms).await?;
    eventually("a canary has come back", async || {
        match node.sample("tidegate_broker_canary_seconds_count") {
            Ok(count) if count >= 2 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;

    proxy.retarget(Target::Unix(new.socket()));
    proxy.cut(&OTHERS);
    for room in &rooms {
        node.heard.wait(room, "its gap", has("[interrupted]")).await;
    }
    node.until_up().await?;
    ensure!(node.sample("tidegate_broker_canary_missed_total")? == 2, "one for each connection");
    expect_one_gap_then_order(&node, &speaker, &rooms).await
}

#[tokio::test]
async fn a_frozen_redis_is_detected_and_recovered_from() -> Result<()> {
    let redis = RedisServer::start().await?;
    let config = RedisConfig {
        canary_timeout: Duration::from_millis(300),
        connect_timeout: Duration::from_millis(300),
        publish_timeout: Duration::from_millis(300),
        ..config(&redis.url())?
    };
    let node = Node::up_with(config).await?;
    let rooms = rooms(20);
    node.subscribe_all(&rooms).await?;
    redis.freeze()?;
    // Each connection notices by itself; one without a pending canary when it thaws would have lost nothing.
    eventually("both connections are given up", async || {
        match node.sample("tidegate_broker_interruptions_total") {
            Ok(2) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    redis.thaw()?;
    node.until_up().await?;
    // Messages that were frozen with it may still be delivered to connections that are no longer read.
    for room in &rooms {
        let heard = node.heard.wait(room, "its gap", has("[interrupted]")).await;
        ensure!(brief(&heard) == ["[interrupted]"], "{room}: {heard:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_node_waits_for_a_redis_that_is_absent_at_the_start() -> Result<()> {
    let mut redis = RedisServer::builder().absent()?;
    let node = Node::start(config(&redis.url())?)?;
    let status = node.until("told why", |status| match status {
        BrokerStatus::Connecting(why) => why.contains("refused") && why.contains("redis://127.0.0.1"),
        _ => false,
    });
    status.await?;
    let room = room("early");
    let waiting = node.ask(&room);
    redis.restart().await?;
    node.until_up().await?;
    waiting.await?;
    node.publish(&room, "hello").await;
    let heard = node.heard.wait(&room, "the first publication", has("hello")).await;
    ensure!(brief(&heard) == ["hello"], "a first subscription has no gap: {heard:?}");
    Ok(())
}

#[tokio::test]
async fn a_replica_is_not_taken_for_a_master() -> Result<()> {
    let master = RedisServer::start().await?;
    let replica =
        RedisServer::builder().setting(&format!("replicaof 127.0.0.1 {}", master.port())).start().await?;
    let node = Node::start(config(&replica.url())?)?;
    let refused =
        |status: &BrokerStatus| matches!(status, BrokerStatus::Connecting(why) if why.contains("replica"));
    node.until("refused", refused).await?;
    replica.cli(&["REPLICAOF", "NO", "ONE"], b"").await?;
    node.until_up().await
}

/// A sink that blocks until it is released.
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
    heard: Arc<dyn Sink>,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }
}

impl Sink for Gate {
    fn publication(&self, publication: Publication, place: Option<Place>) {
        // A sink must not block; this one notifies the runtime first.
        tokio::task::block_in_place(|| {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            drop(self.opened.wait_while(open, |open| !*open));
        });
        self.heard.publication(publication, place);
    }

    fn gap(&self, cause: GapCause) {
        self.heard.gap(cause);
    }
}

/// A node that cannot keep up does not buffer messages in memory: it stops reading, and the backlog stays on the server.
/// When the server's own limit ends the connection, that is a gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_backlog_stays_on_the_server_and_its_limit_is_a_gap() -> Result<()> {
    let redis = RedisServer::builder().setting("client-output-buffer-limit pubsub 1mb 0 0").start().await?;
    let node = Node::up_with(RedisConfig { subscribers: 1, ..config(&redis.unix_url())? }).await?;
    let room = room("flood");
    let heard = node.heard.sink(&room);
    let gate = Arc::new(Gate { open: Mutex::new(false), opened: Condvar::new(), heard });
    node.broker.subscribe(&room, Arc::clone(&gate) as _, Affinity(0)).await?;

    let mut speaker = connection(&redis).await?;
    let mut sent = 0;
    // Until the server has no subscriber left.
    loop {
        let payload = format!("{sent} {}", "x".repeat(16 * 1024));
        let receivers: i64 = redis::cmd("PUBLISH").arg("room:room").arg("").query_async(&mut speaker).await?;
        ensure!(receivers == 0, "no other room has interest");
        let receivers: i64 =
            redis::cmd("PUBLISH").arg("room:flood").arg(payload).query_async(&mut speaker).await?;
        if receivers == 0 {
            break;
        }
        sent += 1;
        ensure!(sent < 10_000, "the server never reached its limit");
    }
    let read_before = node.sample("tidegate_broker_received_total")?;
    ensure!(
        read_before == 1,
        "one publication is being delivered, and no other has been read: {read_before}"
    );
    gate.open();
    let heard = node.heard.wait(&room, "its gap", has("[interrupted]")).await;
    let heard = brief(&heard);
    let before = heard.iter().take_while(|text| *text != "[interrupted]");
    for (number, text) in before.enumerate() {
        ensure!(text.starts_with(&format!("{number} ")), "in order up to the gap");
    }
    node.until_up().await?;
    node.publish(&room, "after").await;
    let heard = brief(&node.heard.wait(&room, "what is newer", has("after")).await);
    ensure!(heard.iter().filter(|text| *text == "[interrupted]").count() == 1);
    ensure!(heard.last().context("something")? == "after");
    Ok(())
}

async fn connection(server: &RedisServer) -> Result<redis::aio::MultiplexedConnection> {
    Ok(redis::Client::open(server.url())?.get_multiplexed_async_connection().await?)
}

/// The thread that serves one part of a broker. Ends when it is dropped.
struct PartThread(Option<Runtime>);

impl PartThread {
    fn start(part: Part) -> Result<Self> {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        for task in part {
            runtime.spawn(task);
        }
        Ok(Self(Some(runtime)))
    }
}

impl Drop for PartThread {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// When a thread ends that serves connections, its rooms are interrupted and go on, and no other room notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rooms_of_a_thread_that_ends_are_interrupted_and_go_on() -> Result<()> {
    let redis = RedisServer::start().await?;
    let (node, parts) = Node::in_parts(config(&redis.url())?)?;
    let mut threads = parts.into_iter().map(PartThread::start).collect::<Result<Vec<_>>>()?;
    node.until_up().await?;
    let speaker = Node::up(&redis.url()).await?;
    let rooms = rooms(20);
    node.subscribe_all(&rooms).await?;
    let (lost, kept): (Vec<_>, Vec<_>) =
        rooms.into_iter().partition(|room| affinity_of(room).0.is_multiple_of(2));
    ensure!(!lost.is_empty() && !kept.is_empty());
    for room in lost.iter().chain(&kept) {
        speaker.publish(room, "before").await;
        node.heard.wait(room, "what was published before", has("before")).await;
    }

    drop(threads.remove(0));
    for room in &lost {
        node.heard.wait(room, "its gap", has("[interrupted]")).await;
    }
    node.until_up().await?;
    for room in lost.iter().chain(&kept) {
        // By its own publishers: one of them was on that thread, too.
        node.publish(room, "after").await;
        node.heard.wait(room, "what was published after", has("after")).await;
    }
    for room in &lost {
        ensure!(brief(&node.heard.of(room)) == ["before", "[interrupted]", "after"]);
    }
    for room in &kept {
        ensure!(brief(&node.heard.of(room)) == ["before", "after"]);
    }
    let settled = node.receipts.wait(lost.len() + kept.len()).await;
    ensure!(settled.values().all(|outcomes| outcomes == &[Ok(Accepted::default())]), "{settled:?}");
    ensure!(node.sample("tidegate_broker_interruptions_total")? == 1);
    node.broker.close().await;
    Ok(())
}

//! Requests and their answers, which open and read the logs of rooms: many at once, on connections that are lost, at
//! servers that have been demoted.

use std::{num::NonZeroU32, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use broker_bridge::{
    Broker, BrokerError, Cursor, Data, Publication, PublishRequest, Retention, RoomName,
    history::{Page, ReadFrom, Start},
    redis::{POOL, RedisConfig},
};
use futures_util::future::join_all;
use tidegate_tests::{
    PATIENCE,
    eventually::eventually,
    fault_proxy::{FaultProxy, Target, Which},
    redis_server::RedisServer,
};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::task::TaskTracker;

use crate::stage::{Node, config, room, rooms};

const REQUESTS: Which = Which::Saying("tidegate-request");

const KEEP: Retention = Retention { size: NonZeroU32::new(1000).expect("not zero"), ttl: None };

/// Does not check the pool during a test: a check borrows a connection.
fn unchecked(url: &str) -> Result<RedisConfig> {
    Ok(RedisConfig { canary_interval: Duration::from_secs(20), ..config(url)? })
}

/// Opens all of them at once.
fn open_all(node: &Node, rooms: &[RoomName]) -> JoinHandle<Vec<Result<Cursor, BrokerError>>> {
    let all = rooms.iter().map(|room| node.broker.open(room, KEEP)).collect::<Vec<_>>();
    TaskTracker::new().spawn(join_all(all))
}

/// Opens rooms until all connections of the pool are open and batches have their full size.
async fn warm_up(node: &Node, redis: &RedisServer, rooms: &[RoomName]) -> Result<()> {
    eventually("all connections are open", async || {
        for outcome in open_all(node, rooms).await.map_err(|error| error.to_string())? {
            outcome.map_err(|error| error.to_string())?;
        }
        match request_connections(redis).await {
            Ok(connections) if connections.len() == POOL => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// The IDs of a node's connections for requests.
async fn request_connections(redis: &RedisServer) -> Result<Vec<String>> {
    let clients = String::from_utf8(redis.cli(&["CLIENT", "LIST"], b"").await?)?;
    let of_requests = clients.lines().filter(|client| client.contains("name=tidegate-request"));
    let id = |client: &str| client.split(' ').find_map(|field| field.strip_prefix("id=").map(str::to_owned));
    of_requests.map(|client| id(client).context("a client has an id")).collect()
}

/// Waits until so many requests are in flight, and the others wait.
async fn until_in_flight(node: &Node, in_flight: i64, waiting: i64) -> Result<()> {
    eventually("the requests are in flight or wait", async || {
        let now =
            ["in_flight", "waiting"].map(|what| node.sample(&format!("tidegate_broker_requests_{what}")));
        match now {
            [Ok(now_in_flight), Ok(now_waiting)] if (now_in_flight, now_waiting) == (in_flight, waiting) => {
                Ok(())
            }
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

async fn record(node: &Node, room: &RoomName, text: &str) -> Result<()> {
    let before = node.receipts.wait(0).await.len();
    let request = node.receipts.request(room, Publication::new(Data::text(text)));
    node.broker.publish(PublishRequest { history: Some(KEEP), ..request }).await;
    node.receipts.wait(before + 1).await;
    Ok(())
}

async fn read(node: &Node, room: &RoomName, from: ReadFrom) -> Result<Page> {
    Ok(timeout(PATIENCE, node.broker.read(room, from, 1000)).await??)
}

/// They wait for their turn: that many come at once is no failure of the server.
#[tokio::test]
async fn many_rooms_that_are_opened_at_once_are_all_opened_with_few_requests_in_flight() -> Result<()> {
    const ROOMS: usize = 25_000;
    let redis = RedisServer::start().await?;
    let node = Node::up_with(unchecked(&redis.url())?).await?;
    let rooms = rooms(ROOMS);
    warm_up(&node, &redis, &rooms[..1000]).await?;
    redis.freeze()?;
    let opening = open_all(&node, &rooms);
    let in_flight = POOL * 64;
    until_in_flight(&node, i64::try_from(in_flight)?, i64::try_from(ROOMS - in_flight)?).await?;
    redis.thaw()?;
    let opened = timeout(PATIENCE, opening).await??;
    let failed = opened.iter().filter(|outcome| outcome.is_err()).collect::<Vec<_>>();
    ensure!(failed.is_empty(), "{} failed, such as {:?}", failed.len(), failed.first());
    ensure!(node.sample("tidegate_broker_log_opens_total{result=\"ok\"}")? == 26_000);
    until_in_flight(&node, 0, 0).await?;
    ensure!(node.sample("tidegate_broker_function_loads_total{result=\"loaded\"}")? == 1, "once for all");
    Ok(())
}

#[tokio::test]
async fn requests_whose_connections_are_cut_are_sent_again() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let node = Node::up_with(unchecked(&proxy.redis_url())?).await?;
    let rooms = rooms(2000);
    warm_up(&node, &redis, &rooms[..1000]).await?;
    redis.freeze()?;
    let opening = open_all(&node, &rooms);
    let in_flight = POOL * 64;
    until_in_flight(&node, i64::try_from(in_flight)?, i64::try_from(rooms.len() - in_flight)?).await?;
    proxy.cut(&REQUESTS);
    redis.thaw()?;
    for outcome in timeout(PATIENCE, opening).await?? {
        outcome?;
    }
    Ok(())
}

/// A request that nobody waits for any more is not sent.
#[tokio::test]
async fn abandoned_requests_are_not_sent() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up_with(unchecked(&redis.url())?).await?;
    let rooms = rooms(3000);
    warm_up(&node, &redis, &rooms[..1000]).await?;
    redis.freeze()?;
    let opening = open_all(&node, &rooms[1000..]);
    let in_flight = POOL * 64;
    until_in_flight(&node, i64::try_from(in_flight)?, i64::try_from(2000 - in_flight)?).await?;
    opening.abort();
    ensure!(opening.await.is_err_and(|error| error.is_cancelled()));
    redis.thaw()?;
    until_in_flight(&node, 0, 0).await?;
    let logs = String::from_utf8(redis.cli(&["DBSIZE"], b"").await?)?;
    ensure!(logs.trim() == (1000 + in_flight).to_string(), "{logs}");
    Ok(())
}

/// Only the server is at fault if it does not answer within the limit.
#[tokio::test]
async fn a_server_that_does_not_answer_fails_what_waits() -> Result<()> {
    let redis = RedisServer::start().await?;
    let limits = RedisConfig {
        canary_timeout: Duration::from_millis(500),
        connect_timeout: Duration::from_millis(500),
        ..config(&redis.url())?
    };
    let node = Node::up_with(limits).await?;
    redis.freeze()?;
    let opened = timeout(PATIENCE, open_all(&node, &rooms(1000))).await??;
    ensure!(opened.iter().all(|outcome| *outcome == Err(BrokerError::Unavailable)), "{opened:?}");
    redis.thaw()?;
    node.until_up().await?;
    ensure!(node.broker.open(&room("after"), KEEP).await.is_ok());
    Ok(())
}

/// Nobody notices that the server has closed all connections of the pool, because they were idle.
#[tokio::test]
async fn connections_that_the_server_has_closed_are_replaced() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up_with(unchecked(&redis.url())?).await?;
    warm_up(&node, &redis, &rooms(1000)).await?;
    for id in request_connections(&redis).await? {
        redis.cli(&["CLIENT", "KILL", "ID", &id], b"").await?;
    }
    ensure!(node.broker.open(&room("after"), KEEP).await.is_ok());
    Ok(())
}

/// The old master still answers, with what it had.
#[tokio::test]
async fn answers_of_a_demoted_server_are_not_believed() -> Result<()> {
    let (redis, new) = (RedisServer::start().await?, RedisServer::start().await?);
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let node = Node::up_with(unchecked(&proxy.redis_url())?).await?;
    let room = room("demoted");
    record(&node, &room, "of the old master").await?;
    ensure!(read(&node, &room, ReadFrom::Last).await?.entries.len() == 1);
    redis.cli(&["REPLICAOF", "127.0.0.1", "1"], b"").await?;
    proxy.retarget(Target::Unix(new.socket()));
    let log = format!("{{room:{room}}}:log");
    let stale = String::from_utf8(redis.cli(&["XLEN", &log], b"").await?)?;
    ensure!(stale.trim() == "1", "{stale}");
    let page = read(&node, &room, ReadFrom::Last).await?;
    ensure!((page.entries.len(), page.top) == (0, None), "{page:?}");
    // All connections are told.
    eventually("every connection has left", async || {
        let ended = ["publisher", "subscriber"].map(|role| {
            let cause =
                format!("tidegate_broker_connections_ended_total{{cause=\"demoted\",role=\"{role}\"}}");
            node.sample(&cause).map_err(|error| error.to_string())
        });
        if ended == [Ok(2), Ok(2)] { Ok(()) } else { Err(format!("{ended:?}")) }
    })
    .await
}

/// A reading of a log without entries asks for its newest position as well. What is recorded between the two questions
/// is not missing.
#[tokio::test]
async fn a_publication_that_comes_during_a_reading_is_not_taken_for_a_removed_one() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up(&redis.url()).await?;
    for room in rooms(300) {
        let beginning = node.broker.open(&room, KEEP).await?;
        let reading = async {
            for from in [ReadFrom::After(beginning), ReadFrom::Last].into_iter().cycle() {
                let page = read(&node, &room, from).await?;
                match (page.start, page.entries.len(), page.top.map(|top| top.offset)) {
                    (Start::Continuous, 0, Some(0)) => {}
                    (Start::Continuous, 1, Some(1)) => return Ok(()),
                    other => bail!("{from:?} in {room}: {other:?}"),
                }
            }
            Ok(())
        };
        let (read, recorded) = tokio::join!(reading, record(&node, &room, "x"));
        read?;
        recorded?;
    }
    Ok(())
}

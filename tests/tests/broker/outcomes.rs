//! What becomes of publications into rooms with history whose answer is lost: each is settled once, and recorded once.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use broker_bridge::{
    Accepted, Broker, BrokerError, Cursor, Data, Publication, PublishRequest, Retention, RoomName,
    history::ReadFrom, redis::RedisConfig,
};
use tidegate_tests::{
    PATIENCE,
    eventually::eventually,
    fault_proxy::{Direction, FaultProxy, Flow, Target, Which},
    redis_server::RedisServer,
};
use tokio::time::timeout;

use crate::stage::{Node, config, room};

const PUBLISHERS: Which = Which::Saying("tidegate-publisher");

const KEEP: Retention = Retention { size: std::num::NonZeroU32::new(10_000).expect("not zero"), ttl: None };

async fn record(node: &Node, room: &RoomName, text: &str) {
    let request = node.receipts.request(room, Publication::new(Data::text(text)));
    node.broker.publish(PublishRequest { history: Some(KEEP), ..request }).await;
}

/// What the log has, in order.
async fn log(node: &Node, room: &RoomName) -> Result<Vec<(Cursor, String)>> {
    let mut log = Vec::new();
    let mut after = node.broker.open(room, KEEP).await?;
    after.offset = 0;
    loop {
        let page = timeout(PATIENCE, node.broker.read(room, ReadFrom::After(after), 1000)).await??;
        let Some(last) = page.entries.last() else { return Ok(log) };
        after = last.place.cursor;
        let text = |data: &Data| data.as_text().unwrap_or_default().to_owned();
        log.extend(page.entries.iter().map(|entry| (entry.place.cursor, text(&entry.publication.data))));
    }
}

/// The outcome of each publication, in the order in which they were handed over.
async fn outcomes(node: &Node, count: usize) -> Result<Vec<Result<Accepted, BrokerError>>> {
    let settled = node.receipts.wait(count).await;
    let each = settled.into_values().map(|outcomes| match <[_; 1]>::try_from(outcomes) {
        Ok([outcome]) => Ok(outcome),
        Err(several) => bail!("settled several times: {several:?}"),
    });
    each.collect()
}

/// Fails unless each publication was accepted once, at the position where the log has it, and nothing else is in the log.
async fn ensure_exact(node: &Node, room: &RoomName, texts: &[String], first: usize) -> Result<()> {
    let all = outcomes(node, first + texts.len()).await?;
    let mut expected = Vec::new();
    for (outcome, text) in all.into_iter().skip(first).zip(texts) {
        let Accepted { cursor, duplicate } = outcome.with_context(|| format!("{text} of {room}"))?;
        ensure!(!duplicate);
        expected.push((cursor.context("no position")?, text.clone()));
    }
    let log = log(node, room).await?;
    ensure!(log == expected, "{room}: {log:?}, not {expected:?}");
    Ok(())
}

fn texts(count: usize) -> Vec<String> {
    (0..count).map(|number| number.to_string()).collect()
}

fn verified(node: &Node, result: &str) -> Result<i64> {
    node.sample(&format!("tidegate_broker_verified_total{{result=\"{result}\"}}"))
}

async fn until_connections(node: &Node, count: i64) -> Result<()> {
    eventually("the publishers' connections", async || {
        match node.sample("tidegate_broker_connections{role=\"publisher\"}") {
            Ok(number) if number == count => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// Under load, cut by the network and by the server, again and again.
#[tokio::test]
async fn connections_that_are_cut_in_the_middle_of_a_batch_lose_and_double_nothing() -> Result<()> {
    const COUNT: usize = 4000;
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    // Connections that are lost at once are replaced at a slower and slower pace. Nothing is to expire meanwhile.
    let config = RedisConfig { publish_timeout: Duration::from_secs(60), ..config(&proxy.redis_url())? };
    let node = Node::up_with(config).await?;
    let rooms = [room("cut:a"), room("cut:b"), room("cut:c")];
    let load = async {
        for number in 0..COUNT {
            for room in &rooms {
                record(&node, room, &number.to_string()).await;
            }
            if number % 20 == 0 {
                tokio::task::yield_now().await;
            }
        }
    };
    let faults = async {
        for round in 0..12 {
            let before = node.receipts.settled().len();
            eventually("some are settled", async || {
                let now = node.receipts.settled().len();
                if now > before + 50 || now == 3 * COUNT { Ok(()) } else { Err(now) }
            })
            .await?;
            if round % 2 == 0 {
                proxy.cut(&PUBLISHERS);
            } else {
                redis.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"], b"").await?;
            }
        }
        anyhow::Ok(())
    };
    tokio::join!(load, faults).1?;
    let outcomes = outcomes(&node, 3 * COUNT).await?;
    for (index, room) in rooms.iter().enumerate() {
        let mut expected = Vec::new();
        for (number, outcome) in outcomes.iter().skip(index).step_by(3).enumerate() {
            match outcome {
                Ok(Accepted { cursor: Some(cursor), duplicate: false }) => {
                    expected.push((*cursor, number.to_string()));
                }
                other => bail!("{number} in {room}: {other:?}"),
            }
        }
        let log = log(&node, room).await?;
        ensure!(log.len() == COUNT, "{} are in the log of {room}", log.len());
        ensure!(log == expected, "the log of {room} has another order");
    }
    let (recorded, missing) = (verified(&node, "recorded")?, verified(&node, "missing")?);
    ensure!(recorded + missing > 0 && verified(&node, "unknown")? == 0, "{recorded} and {missing}");
    Ok(())
}

/// The server is stalled for longer than an answer may take, with the publications in its socket.
#[tokio::test]
async fn publications_that_time_out_in_a_stall_are_recorded_once() -> Result<()> {
    let redis = RedisServer::start().await?;
    let config = RedisConfig {
        publishers: 1,
        publish_timeout: Duration::from_secs(2),
        // The answers are late, and nothing else is.
        canary_interval: Duration::from_secs(60),
        ..config(&redis.url())?
    };
    let node = Node::up_with(config).await?;
    let room = room("stall");
    record(&node, &room, "0").await;
    node.receipts.wait(1).await;
    redis.freeze()?;
    let texts = texts(200);
    for text in texts.iter().skip(1) {
        record(&node, &room, text).await;
    }
    until_connections(&node, 0).await?;
    ensure!(node.receipts.settled().len() == 1, "they are settled while the server is silent");
    redis.thaw()?;
    ensure_exact(&node, &room, &texts, 0).await?;
    ensure!(verified(&node, "recorded")? + verified(&node, "missing")? == 199);
    Ok(())
}

/// What a node may do that is not allowed to close connections.
const WITHOUT_KILL: &str = "user tidegate on >s3cret ~* &* +@all -client|kill";

struct Doubt {
    redis: RedisServer,
    proxy: FaultProxy,
    node: Node,
}

impl Doubt {
    /// A node whose server has executed ten publications, the answers to which do not arrive. One was acknowledged before.
    async fn new(setting: &str, room: &RoomName) -> Result<Self> {
        let redis = RedisServer::builder().setting(setting).start().await?;
        let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
        let url = proxy.redis_url().replace("redis://", "redis://tidegate:s3cret@");
        let node = Node::up_with(RedisConfig { publishers: 1, ..config(&url)? }).await?;
        record(&node, room, "0").await;
        node.receipts.wait(1).await;
        proxy.set(PUBLISHERS, Direction::ToClient, Flow::Blackhole);
        for number in 1..=10 {
            record(&node, room, &number.to_string()).await;
        }
        let key = format!("{{room:{room}}}:log");
        eventually("they are recorded", async || match redis.cli(&["XLEN", &key], b"").await {
            Ok(length) if length.trim_ascii() == b"11" => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await?;
        Ok(Self { redis, proxy, node })
    }

    /// The connection is lost, and the next one works.
    fn go_on(&self) {
        self.proxy.cut(&PUBLISHERS);
        self.proxy.resume();
    }

    async fn ensure_unknown(&self) -> Result<()> {
        let outcomes = outcomes(&self.node, 11).await?;
        ensure!(outcomes.iter().skip(1).all(|outcome| *outcome == Err(BrokerError::Unknown)), "{outcomes:?}");
        ensure!(verified(&self.node, "unknown")? == 10);
        Ok(())
    }
}

const ALL: &str = "user tidegate on >s3cret ~* &* +@all";

#[tokio::test]
async fn what_was_recorded_is_found() -> Result<()> {
    let room = room("found");
    let doubt = Doubt::new(ALL, &room).await?;
    doubt.go_on();
    ensure_exact(&doubt.node, &room, &texts(11), 0).await?;
    ensure!(verified(&doubt.node, "recorded")? == 10);
    Ok(())
}

#[tokio::test]
async fn without_the_right_to_close_connections_the_outcome_is_unknown() -> Result<()> {
    let room = room("forbidden");
    let doubt = Doubt::new(WITHOUT_KILL, &room).await?;
    doubt.go_on();
    doubt.ensure_unknown().await?;
    ensure!(log(&doubt.node, &room).await?.len() == 11, "nothing is sent again");
    Ok(())
}

#[tokio::test]
async fn a_log_that_lost_its_tail_leaves_the_outcome_unknown() -> Result<()> {
    for fault in [("XTRIM", &["MAXLEN", "0"][..]), ("DEL", &[])] {
        let room = room("trimmed");
        let doubt = Doubt::new(ALL, &room).await?;
        let key = format!("{{room:{room}}}:log");
        let command = [&[fault.0, &key], fault.1].concat();
        doubt.redis.cli(&command, b"").await?;
        // A log that begins anew proves nothing.
        doubt.redis.cli(&["FCALL", "tidegate_publish", "1", &key, "x"], b"").await?;
        doubt.go_on();
        doubt.ensure_unknown().await?;
        ensure!(log(&doubt.node, &room).await?.len() == 1, "nothing is sent again");
    }
    Ok(())
}

/// The server has kept the log, but is another one now: it may have lost what the old one had accepted.
#[tokio::test]
async fn a_restarted_server_leaves_the_outcome_unknown() -> Result<()> {
    let room = room("restarted");
    let mut doubt = Doubt::new(ALL, &room).await?;
    doubt.redis.cli(&["SAVE"], b"").await?;
    doubt.redis.restart().await?;
    doubt.go_on();
    doubt.ensure_unknown().await?;
    ensure!(log(&doubt.node, &room).await?.len() == 11, "nothing is sent again");
    Ok(())
}

/// The library forgets what it has executed, and the log alone has to tell.
#[tokio::test]
async fn a_library_that_was_loaded_again_leaves_it_to_the_log() -> Result<()> {
    let room = room("reloaded");
    let doubt = Doubt::new(ALL, &room).await?;
    doubt.redis.cli(&["FUNCTION", "FLUSH"], b"").await?;
    doubt.go_on();
    ensure_exact(&doubt.node, &room, &texts(11), 0).await?;
    Ok(())
}

/// The publications have not reached the server when the connection is lost. The proxy has swallowed them.
#[tokio::test]
async fn what_never_arrived_is_sent_again_in_order() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let node = Node::up_with(RedisConfig { publishers: 1, ..config(&proxy.redis_url())? }).await?;
    let rooms = [room("swallowed:a"), room("swallowed:b")];
    let [first, second] = &rooms;
    record(&node, first, "0").await;
    node.receipts.wait(1).await;
    proxy.set(PUBLISHERS, Direction::ToServer, Flow::Blackhole);
    let texts = texts(11);
    for text in texts.iter().skip(1) {
        record(&node, first, text).await;
    }
    for text in &texts {
        record(&node, second, text).await;
    }
    proxy.cut(&PUBLISHERS);
    until_connections(&node, 0).await?;
    proxy.resume();
    let all = outcomes(&node, 22).await?;
    ensure!(all.iter().all(Result::is_ok), "{all:?}");
    for room in &rooms {
        let log = log(&node, room).await?;
        ensure!(log.iter().map(|(_, text)| text).eq(&texts), "{room}: {log:?}");
    }
    ensure!(verified(&node, "unknown")? == 0);
    Ok(())
}

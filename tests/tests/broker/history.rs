//! Rooms with history on real servers: what the log survives, what is told when it does not, and errors.

use std::{num::NonZeroU32, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use broker_bridge::{
    Accepted, Broker, BrokerError, Cursor, Data, Follows, Place, Publication, PublicationId, PublishRequest,
    Retention, RoomName,
    history::{Page, ReadFrom, Start},
    publication::Owner,
    redis::RedisConfig,
};
use tidegate_tests::{
    PATIENCE,
    eventually::eventually,
    fault_proxy::{Direction, FaultProxy, Flow, Target, Which},
    redis_server::RedisServer,
};
use tokio::time::timeout;

use crate::stage::{Node, brief, config, has, room};

const PUBLISHERS: Which = Which::Saying("tidegate-publisher");

const KEEP: Retention = Retention { size: NonZeroU32::new(10_000).expect("not zero"), ttl: None };

async fn record(node: &Node, room: &RoomName, text: &str) {
    let request = node.receipts.request(room, Publication::new(Data::text(text)));
    node.broker.publish(PublishRequest { history: Some(KEEP), ..request }).await;
}

/// What became of the publication with this number, counted from 1 in each node.
async fn outcome(node: &Node, number: u64) -> Result<Result<Accepted, BrokerError>> {
    let settled = node.receipts.wait(usize::try_from(number)?).await;
    match settled.get(&number).map(Vec::as_slice) {
        Some([outcome]) => Ok(outcome.clone()),
        other => bail!("{other:?}"),
    }
}

async fn cursor(node: &Node, number: u64) -> Result<Cursor> {
    outcome(node, number).await??.cursor.context("it was not recorded")
}

async fn read(node: &Node, room: &RoomName, from: ReadFrom) -> Result<Page> {
    Ok(timeout(PATIENCE, node.broker.read(room, from, 1000)).await??)
}

fn texts(page: &Page) -> Vec<&str> {
    page.entries.iter().filter_map(|entry| entry.publication.data.as_text()).collect()
}

/// The last place that has been heard.
fn last_place(node: &Node, room: &RoomName) -> Result<Place> {
    node.heard.places(room).last().copied().flatten().context("no place")
}

fn log_of(room: &RoomName) -> String {
    format!("{{room:{room}}}:log")
}

#[tokio::test]
async fn functions_that_disappear_under_load_are_loaded_again_and_nothing_is_lost_or_doubled() -> Result<()> {
    const COUNT: usize = 3000;
    let redis = RedisServer::start().await?;
    let (node, other) = (Node::up(&redis.url()).await?, Node::up(&redis.unix_url()).await?);
    let rooms = [room("flush:a"), room("flush:b"), room("flush:c")];
    let mut beginnings = Vec::new();
    for room in &rooms {
        node.subscribe(room).await?;
        beginnings.push(node.broker.open(room, KEEP).await?);
    }
    let publish = async |name: &str, node: &Node| {
        for number in 0..COUNT {
            for room in &rooms {
                record(node, room, &format!("{name}{number}")).await;
            }
            if number % 10 == 0 {
                tokio::task::yield_now().await;
            }
        }
    };
    let flush = async {
        for _ in 0..20 {
            redis.cli(&["FUNCTION", "FLUSH"], b"").await?;
        }
        anyhow::Ok(())
    };
    let (flushed, ..) = tokio::join!(flush, publish("a", &node), publish("b", &other));
    flushed?;
    let mut refused = 0;
    let mut accepted = vec![Vec::new(); rooms.len()];
    for (name, node) in [("a", &node), ("b", &other)] {
        for (index, outcomes) in node.receipts.wait(3 * COUNT).await.into_values().enumerate() {
            match &outcomes[..] {
                [Ok(Accepted { cursor: Some(cursor), duplicate: false })] => {
                    accepted[index % rooms.len()].push((*cursor, format!("{name}{}", index / rooms.len())));
                }
                // Overtaken by a later one, or the functions were gone again: safe to repeat.
                [Err(BrokerError::NotNow(_))] => refused += 1,
                other => bail!("{other:?}"),
            }
        }
    }
    for ((room, beginning), mut expected) in rooms.iter().zip(beginnings).zip(accepted) {
        expected.sort_unstable();
        let heard = node.heard.wait(room, "what was accepted", |heard| heard.len() >= expected.len()).await;
        ensure!(brief(&heard).iter().eq(expected.iter().map(|(_, text)| text)), "{room}");
        let places = node.heard.places(room);
        ensure!(places.iter().flatten().map(|place| place.cursor).eq(expected.iter().map(|(at, _)| *at)));
        ensure!(places.iter().flatten().all(|place| place.cursor.epoch == beginning.epoch), "one epoch");
        for name in ["a", "b"] {
            let own = expected.iter().filter_map(|(_, text)| text.strip_prefix(name)?.parse::<usize>().ok());
            ensure!(own.is_sorted(), "{name} has lost its order in {room}");
        }
        let (mut log, mut position) = (Vec::new(), beginning);
        loop {
            let page = read(&node, room, ReadFrom::After(position)).await?;
            ensure!(page.start == Start::Continuous);
            let Some(last) = page.entries.last() else { break };
            position = last.place.cursor;
            log.extend(
                page.entries.iter().filter_map(|entry| entry.publication.data.as_text().map(str::to_owned)),
            );
        }
        ensure!(log.iter().eq(expected.iter().map(|(_, text)| text)), "the log of {room}");
    }
    let loads = node.sample("tidegate_broker_function_loads_total{result=\"loaded\"}")?
        + other.sample("tidegate_broker_function_loads_total{result=\"loaded\"}")?;
    ensure!(loads >= 2, "{loads}: the test has flushed nothing");
    ensure!(refused < 3 * COUNT, "{refused} of {} were refused", 6 * COUNT);
    Ok(())
}

#[tokio::test]
async fn a_server_that_lost_its_memory_begins_a_new_log() -> Result<()> {
    let mut redis = RedisServer::start().await?;
    let node = Node::up(&redis.url()).await?;
    let room = room("amnesia");
    node.subscribe(&room).await?;
    record(&node, &room, "1").await;
    let old = cursor(&node, 1).await?;
    node.heard.wait(&room, "the first", has("1")).await;
    redis.kill().await?;
    node.until_interrupted().await?;
    redis.restart().await?;
    node.until_up().await?;
    let page = read(&node, &room, ReadFrom::After(old)).await?;
    ensure!((page.start, page.top, page.entries.len()) == (Start::Lost, None, 0), "{page:?}");
    // The functions are gone as well.
    record(&node, &room, "2").await;
    let new = cursor(&node, 2).await?;
    ensure!(new.epoch > old.epoch && new.offset == 1, "{new} after {old}");
    let heard = node.heard.wait(&room, "the second", has("2")).await;
    ensure!(brief(&heard) == ["1", "[interrupted]", "2"], "{heard:?}");
    ensure!(last_place(&node, &room)? == Place { cursor: new, follows: Follows::Nothing });
    let page = read(&node, &room, ReadFrom::After(old)).await?;
    ensure!((page.start, texts(&page)) == (Start::Lost, vec!["2"]), "{page:?}");
    Ok(())
}

/// The server comes back with an older state. What it has lost has positions that are not given to others.
#[tokio::test]
async fn a_log_from_an_older_snapshot_goes_on_in_an_epoch_of_its_own() -> Result<()> {
    let mut redis = RedisServer::start().await?;
    let node = Node::up(&redis.url()).await?;
    let room = room("snapshot");
    node.subscribe(&room).await?;
    for number in 1..=5 {
        record(&node, &room, &number.to_string()).await;
        node.receipts.wait(number).await;
        if number == 3 {
            redis.cli(&["SAVE"], b"").await?;
        }
    }
    node.heard.wait(&room, "the fifth", has("5")).await;
    let (third, fifth) = (cursor(&node, 3).await?, cursor(&node, 5).await?);
    redis.kill().await?;
    node.until_interrupted().await?;
    redis.restart().await?;
    node.until_up().await?;
    for number in 6..=7 {
        record(&node, &room, &number.to_string()).await;
    }
    let (sixth, seventh) = (cursor(&node, 6).await?, cursor(&node, 7).await?);
    ensure!(sixth.epoch > third.epoch && seventh == Cursor { offset: sixth.offset + 1, ..sixth });
    node.heard.wait(&room, "the last", has("7")).await;
    let places = node.heard.places(&room);
    let boundary = Place { cursor: sixth, follows: Follows::Unproven(third) };
    ensure!(
        places[5..] == [Some(boundary), Some(Place { cursor: seventh, follows: Follows::Previous(sixth) })]
    );

    // Up to the boundary everything is there, and the boundary says that something may be missing.
    let page = read(&node, &room, ReadFrom::After(third)).await?;
    ensure!((page.start, texts(&page)) == (Start::Continuous, vec!["6", "7"]), "{page:?}");
    ensure!(page.entries[0].place == boundary, "{page:?}");
    let first = Cursor { offset: 1, ..third };
    let page = read(&node, &room, ReadFrom::After(first)).await?;
    ensure!((page.start, texts(&page)) == (Start::Continuous, vec!["2", "3", "6", "7"]), "{page:?}");
    // The log does not know what was lost, and does not repeat what came before.
    let page = read(&node, &room, ReadFrom::After(fifth)).await?;
    ensure!((page.start, texts(&page)) == (Start::Lost, vec!["6", "7"]), "{page:?}");
    Ok(())
}

/// A log that was moved to another server in its second epoch, and whose third began with a failover. Read after each
/// position, and before it.
#[tokio::test]
async fn a_log_of_three_epochs_knows_its_positions_and_no_others() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up(&redis.url()).await?;
    let room = room("epochs");
    let log = log_of(&room);
    let at = |epoch, offset| Cursor { epoch, offset };
    for (id, link) in [
        ("5-1", ""),
        ("5-2", ""),
        ("5-3", ""),
        ("7-4", "m 5-3"),
        ("7-5", ""),
        ("7-6", ""),
        ("9-7", "u 7-6"),
        ("9-8", ""),
    ] {
        let mut entry = vec!["XADD", &log, id, "d", id];
        if !link.is_empty() {
            entry.extend(["p", link]);
        }
        redis.cli(&entry, b"").await?;
    }
    let all = ["5-1", "5-2", "5-3", "7-4", "7-5", "7-6", "9-7", "9-8"];
    for epoch in [5, 7, 9] {
        for offset in 0..=9 {
            let asked = at(epoch, offset);
            let known = all.iter().position(|id| *id == asked.to_string());
            let page = read(&node, &room, ReadFrom::Before(asked)).await?;
            match known {
                Some(index) => ensure!(
                    (page.start, texts(&page).as_slice()) == (Start::Continuous, &all[..index]),
                    "before {asked}: {page:?}"
                ),
                None => ensure!(page.start == Start::Lost, "before {asked}: {page:?}"),
            }
            let page = read(&node, &room, ReadFrom::After(asked)).await?;
            let known = match (epoch, offset) {
                // The beginning of the log, and of an epoch before which nothing is missing.
                (5, 0) => Some(0),
                (7, 3) => Some(3),
                _ => known.map(|index| index + 1),
            };
            match known {
                Some(index) => ensure!(
                    (page.start, texts(&page).as_slice()) == (Start::Continuous, &all[index..]),
                    "after {asked}: {page:?}"
                ),
                None => ensure!(page.start == Start::Lost, "after {asked}: {page:?}"),
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_deleted_log_begins_anew_even_within_a_millisecond() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up(&redis.url()).await?;
    let room = room("deleted");
    node.subscribe(&room).await?;
    let mut before: Option<Cursor> = None;
    for number in 1..=20 {
        record(&node, &room, "x").await;
        let cursor = cursor(&node, number).await?;
        ensure!(cursor.offset == 1 && before.is_none_or(|before| cursor.epoch > before.epoch), "{cursor}");
        before = Some(cursor);
        redis.cli(&["DEL", &log_of(&room)], b"").await?;
    }
    node.heard.wait(&room, "all of them", |heard| heard.len() >= 20).await;
    ensure!(node.heard.places(&room).iter().flatten().all(|place| place.follows == Follows::Nothing));
    Ok(())
}

/// The minimum permissions of a node with histories, from the documentation of `broker_bridge::redis`.
const DOCUMENTED: &str = "user tidegate on >s3cret resetchannels &room:* &tidegate:canary:* ~{room:*}:* \
                          -@all +subscribe +unsubscribe +publish +fcall +function|load \
                          +xadd +xrange +xrevrange +xinfo +xgroup +xsetid +xtrim +xdel +pexpire +persist +get +set \
                          +info +time +client|kill";

#[tokio::test]
async fn the_documented_permissions_are_enough() -> Result<()> {
    let redis = RedisServer::builder().setting(DOCUMENTED).start().await?;
    let node = Node::up(&redis.url().replace("redis://", "redis://tidegate:s3cret@")).await?;
    let room = room("documented");
    node.subscribe(&room).await?;
    let beginning = node.broker.open(&room, KEEP).await?;
    for number in 1..=3 {
        record(&node, &room, &number.to_string()).await;
        ensure!(cursor(&node, number).await? == Cursor { offset: number, ..beginning });
    }
    ensure!(texts(&read(&node, &room, ReadFrom::After(beginning)).await?) == ["1", "2", "3"]);
    ensure!(texts(&read(&node, &room, ReadFrom::Last).await?) == ["1", "2", "3"]);
    let unknown = Cursor { epoch: u64::MAX, offset: 1 };
    ensure!(read(&node, &room, ReadFrom::After(unknown)).await?.start == Start::Lost);
    ensure!(node.broker.clear(&room).await? == Cursor { offset: 3, ..beginning });
    ensure!(read(&node, &room, ReadFrom::Last).await?.entries.is_empty());
    let denied = String::from_utf8(redis.cli(&["ACL", "LOG"], b"").await?)?;
    ensure!(denied.trim().is_empty(), "{denied}");
    Ok(())
}

#[tokio::test]
async fn a_node_without_the_permissions_says_so_and_delivers_rooms_without_history() -> Result<()> {
    const LIVE_ONLY: &str = "user tidegate on >s3cret resetchannels &room:* &tidegate:canary:* \
                             -@all +subscribe +unsubscribe +publish";
    let redis = RedisServer::builder().setting(LIVE_ONLY).start().await?;
    let node = Node::up(&redis.url().replace("redis://", "redis://tidegate:s3cret@")).await?;
    let room = room("live-only");
    node.subscribe(&room).await?;
    record(&node, &room, "recorded").await;
    node.publish(&room, "live").await;
    let refused = outcome(&node, 1).await?;
    ensure!(
        matches!(&refused, Err(BrokerError::Forbidden(why)) if why.contains("permit +fcall")),
        "{refused:?}"
    );
    ensure!(outcome(&node, 2).await? == Ok(Accepted::default()));
    let heard = node.heard.wait(&room, "the other", has("live")).await;
    ensure!(brief(&heard) == ["live"], "{heard:?}");
    let opened = node.broker.open(&room, KEEP).await;
    ensure!(matches!(opened, Err(BrokerError::Forbidden(_))), "{opened:?}");
    let page = node.broker.read(&room, ReadFrom::Last, 10).await;
    ensure!(matches!(page, Err(BrokerError::Forbidden(_))), "{page:?}");
    ensure!(node.broker.status().borrow().is_up());
    ensure!(node.sample("tidegate_broker_function_loads_total{result=\"failed\"}")? >= 1);
    Ok(())
}

/// What a real server says to the functions when it does not write, and that nothing is done then.
#[tokio::test]
async fn a_server_that_does_not_write_refuses_what_is_to_be_recorded_and_nothing_else() -> Result<()> {
    let redis = RedisServer::builder().setting("min-replicas-max-lag 10").start().await?;
    let node = Node::up(&redis.url()).await?;
    let room = room("refusing");
    node.subscribe(&room).await?;
    record(&node, &room, "1").await;
    let first = cursor(&node, 1).await?;
    let mut number = 1;
    for (code, [name, wrong, right]) in
        [("OOM", ["maxmemory", "1", "0"]), ("NOREPLICAS", ["min-replicas-to-write", "1", "0"])]
    {
        redis.cli(&["CONFIG", "SET", name, wrong], b"").await?;
        record(&node, &room, "refused").await;
        node.publish(&room, code).await;
        number += 2;
        let refused = outcome(&node, number - 1).await?;
        ensure!(matches!(&refused, Err(BrokerError::NotNow(why)) if why.starts_with(code)), "{refused:?}");
        let opened = node.broker.open(&room, KEEP).await;
        ensure!(matches!(&opened, Err(BrokerError::NotNow(why)) if why.starts_with(code)), "{opened:?}");
        redis.cli(&["CONFIG", "SET", name, right], b"").await?;
        if code == "OOM" {
            ensure!(outcome(&node, number).await? == Ok(Accepted::default()));
            node.heard.wait(&room, "what is not recorded", has(code)).await;
        }
    }
    node.receipts.wait(usize::try_from(number)?).await;
    record(&node, &room, "2").await;
    ensure!(cursor(&node, number + 1).await? == Cursor { offset: 2, ..first });
    ensure!(texts(&read(&node, &room, ReadFrom::Last).await?) == ["1", "2"]);
    ensure!(!brief(&node.heard.of(&room)).contains(&"refused".to_owned()));
    Ok(())
}

/// A call that reaches a server after its demotion is not executed, and the connection is left.
#[tokio::test]
async fn a_demoted_server_refuses_what_is_to_be_recorded() -> Result<()> {
    let (redis, new) = (RedisServer::start().await?, RedisServer::start().await?);
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    // Checks so seldom that the publication comes first.
    let config = RedisConfig {
        canary_interval: Duration::from_secs(20),
        canary_timeout: Duration::from_secs(1),
        publish_timeout: Duration::from_secs(20),
        ..config(&proxy.redis_url())?
    };
    let node = Node::up_with(config).await?;
    let room = room("demoted");
    record(&node, &room, "1").await;
    cursor(&node, 1).await?;
    redis.cli(&["REPLICAOF", "127.0.0.1", &new.port().to_string()], b"").await?;
    proxy.retarget(Target::Unix(new.socket()));
    record(&node, &room, "2").await;
    let refused = outcome(&node, 2).await?;
    ensure!(matches!(&refused, Err(BrokerError::NotNow(why)) if why.starts_with("READONLY")), "{refused:?}");
    eventually("the publisher has left", async || {
        let ended =
            node.sample("tidegate_broker_connections_ended_total{cause=\"refused\",role=\"publisher\"}");
        match ended {
            Ok(1) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    record(&node, &room, "3").await;
    // The new server lacks the functions as well.
    let accepted = outcome(&node, 3).await?;
    ensure!(accepted.is_ok(), "{accepted:?}");
    ensure!(proxy.open(&Which::All) > 0);
    Ok(())
}

#[tokio::test]
async fn a_key_that_is_no_log_costs_the_history_and_not_the_delivery() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up(&redis.url()).await?;
    let room = room("stranger");
    node.subscribe(&room).await?;
    redis.cli(&["SET", &log_of(&room), "mine"], b"").await?;
    record(&node, &room, "1").await;
    ensure!(outcome(&node, 1).await? == Ok(Accepted { cursor: None, duplicate: false }));
    node.heard.wait(&room, "the publication", has("1")).await;
    ensure!(node.heard.places(&room) == [None]);
    ensure!(node.sample("tidegate_broker_recorded_total{result=\"not_kept\"}")? == 1);
    let opened = node.broker.open(&room, KEEP).await;
    ensure!(matches!(&opened, Err(BrokerError::Refused(why)) if why.contains("no log")), "{opened:?}");
    let page = node.broker.read(&room, ReadFrom::Last, 10).await;
    ensure!(matches!(&page, Err(BrokerError::Refused(why)) if why.contains("WRONGTYPE")), "{page:?}");
    Ok(())
}

/// Entries that others write into a log, or that are larger than this node accepts, are like entries that were removed.
#[tokio::test]
async fn entries_that_cannot_be_read_are_told_and_stop_nobody() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Node::up_with(RedisConfig { max_publication: 1000, ..config(&redis.url())? }).await?;
    let large = Node::up(&redis.url()).await?;
    let room = room("holes");
    let beginning = node.broker.open(&room, KEEP).await?;
    record(&large, &room, "1").await;
    record(&large, &room, &"x".repeat(1001)).await;
    record(&large, &room, "3").await;
    large.receipts.wait(3).await;
    let at = |offset| Cursor { offset, ..beginning };

    let page = read(&node, &room, ReadFrom::After(beginning)).await?;
    ensure!((page.start, texts(&page), page.top) == (Start::Continuous, vec!["1"], Some(at(3))), "{page:?}");
    let page = read(&node, &room, ReadFrom::After(at(1))).await?;
    ensure!((page.start, texts(&page), page.top) == (Start::Trimmed, vec!["3"], Some(at(3))), "{page:?}");
    ensure!(texts(&read(&node, &room, ReadFrom::Last).await?) == ["3"]);
    ensure!(read(&large, &room, ReadFrom::After(beginning)).await?.entries.len() == 3);

    // At the end: the page is empty, and says where to go on.
    record(&large, &room, &"x".repeat(1001)).await;
    large.receipts.wait(4).await;
    let page = read(&node, &room, ReadFrom::After(at(3))).await?;
    ensure!((page.start, page.entries.len(), page.top) == (Start::Trimmed, 0, Some(at(4))), "{page:?}");
    let page = read(&node, &room, ReadFrom::After(at(4))).await?;
    ensure!((page.start, page.entries.len(), page.top) == (Start::Continuous, 0, Some(at(4))), "{page:?}");

    // Deleted from the middle, and no publication at all.
    redis.cli(&["XDEL", &log_of(&room), &at(3).to_string()], b"").await?;
    redis.cli(&["XADD", &log_of(&room), &at(5).to_string(), "f", "v"], b"").await?;
    let page = read(&large, &room, ReadFrom::After(beginning)).await?;
    ensure!((page.start, page.entries.len(), page.top) == (Start::Continuous, 2, Some(at(5))), "{page:?}");
    let page = read(&large, &room, ReadFrom::After(at(2))).await?;
    ensure!((page.start, page.entries.len(), page.top) == (Start::Trimmed, 1, Some(at(5))), "{page:?}");
    Ok(())
}

/// The answer is lost, or the publication itself: the next connection finds out by the id.
#[tokio::test]
async fn a_publication_with_an_id_is_recorded_once_though_its_connection_is_lost() -> Result<()> {
    let redis = RedisServer::start().await?;
    let proxy = FaultProxy::to(Target::Unix(redis.socket())).await?;
    let config = RedisConfig { publishers: 1, ..config(&proxy.redis_url())? };
    let (node, listener) = (Node::up_with(config).await?, Node::up(&redis.url()).await?);
    let room = room("by-id");
    listener.subscribe(&room).await?;
    record(&node, &room, "first").await;
    let first = cursor(&node, 1).await?;
    let publish = async |text: &str, has_id| -> Result<()> {
        let mut request = node.receipts.request(&room, Publication::new(Data::text(text)));
        request.history = Some(KEEP);
        request.id = if has_id { Some(PublicationId::new(Owner::Backend, text)?) } else { None };
        node.broker.publish(request).await;
        Ok(())
    };
    proxy.set(PUBLISHERS, Direction::ToClient, Flow::Blackhole);
    publish("second", false).await?;
    publish("third", true).await?;
    publish("fourth", false).await?;
    listener.heard.wait(&room, "all of them", has("fourth")).await;
    proxy.cut(&PUBLISHERS);
    proxy.resume();
    node.receipts.wait(4).await;
    let accepted = Accepted { cursor: Some(Cursor { offset: 3, ..first }), duplicate: true };
    ensure!(outcome(&node, 3).await? == Ok(accepted));
    for number in [2, 4] {
        let found = Accepted { cursor: Some(Cursor { offset: number, ..first }), duplicate: false };
        ensure!(
            outcome(&node, number).await? == Ok(found),
            "it has no id, and is found in the log: {number}"
        );
    }

    proxy.set(PUBLISHERS, Direction::ToServer, Flow::Blackhole);
    publish("fifth", true).await?;
    eventually("it has been handed over", async || {
        match node.sample("tidegate_broker_publish_queue_bytes") {
            Ok(bytes) if bytes > 0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await?;
    proxy.cut(&PUBLISHERS);
    proxy.resume();
    let accepted = Accepted { cursor: Some(Cursor { offset: 5, ..first }), duplicate: false };
    ensure!(outcome(&node, 5).await? == Ok(accepted));
    record(&node, &room, "last").await;
    let heard = listener.heard.wait(&room, "the last", has("last")).await;
    ensure!(brief(&heard) == ["first", "second", "third", "fourth", "fifth", "last"], "{heard:?}");
    Ok(())
}

//! No position ever names two messages, whatever happens to the server: restarts, failovers, deleted logs, clocks.
//!
//! Clocks, replication IDs and Cluster cannot be set at will on a real server. Tests that need them load the library with
//! those commands replaced by reads of a hash.

use std::collections::{HashMap, HashSet};

use anyhow::{Context as _, Result, ensure};
use broker_bridge::redis::functions;
use redis::Value;
use tidegate_tests::{eventually::eventually, redis_server::RedisServer};

use crate::functions::{Library, connect, log, parts};

/// The link of the entry at `position`.
async fn link(library: &mut Library, room: &str, position: &str) -> Result<Option<String>> {
    let (_, mut fields) = library
        .entries(room)
        .await?
        .into_iter()
        .find(|(id, _)| id == position)
        .with_context(|| format!("no entry at {position}"))?;
    Ok(fields.remove("p").map(String::from_utf8).transpose()?)
}

/// Publishes `count` messages; returns their positions.
async fn publish(library: &mut Library, count: usize) -> Result<Vec<String>> {
    let mut positions = Vec::new();
    for _ in 0..count {
        positions.push(library.publish("lobby", "x", &[]).await?);
    }
    Ok(positions)
}

/// Fails unless `after` goes on after `last` with one fence.
async fn ensure_fence(library: &mut Library, last: &str, after: &[String]) -> Result<()> {
    let (epoch, offset) = parts(last);
    let (first, rest) = after.split_first().context("a position")?;
    let (fenced, _) = parts(first);
    ensure!(fenced > epoch, "{last}, then {after:?}");
    let expected = (offset + 1..).take(after.len()).map(|offset| (fenced, offset));
    ensure!(after.iter().map(|position| parts(position)).eq(expected), "{last}, then {after:?}");
    ensure!(link(library, "lobby", first).await? == Some(format!("u {last}")));
    for position in rest {
        ensure!(link(library, "lobby", position).await?.is_none(), "a second fence");
    }
    Ok(())
}

#[tokio::test]
async fn a_restart_without_data_begins_anew_under_another_epoch() -> Result<()> {
    let mut redis = RedisServer::start().await?;
    let before = publish(&mut Library::on(&redis).await?, 3).await?;
    redis.restart().await?;
    let mut library = Library::on(&redis).await?;
    let after = publish(&mut library, 3).await?;
    ensure!(parts(&after[0]).0 > parts(&before[0]).0 && parts(&after[0]).1 == 1, "{before:?}, {after:?}");
    ensure!(link(&mut library, "lobby", &after[0]).await?.is_none());
    Ok(())
}

#[tokio::test]
async fn a_restart_from_an_old_snapshot_repeats_no_position() -> Result<()> {
    let mut redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let kept = publish(&mut library, 3).await?;
    let _: Value = library.run(&["SAVE"]).await?;
    let lost = publish(&mut library, 3).await?;
    redis.restart().await?;
    let mut library = Library(connect(&redis).await?);
    let after = publish(&mut library, 3).await?;
    ensure_fence(&mut library, &kept[2], &after).await?;
    let all: HashSet<_> = [&kept[..], &lost, &after].concat().into_iter().collect();
    ensure!(all.len() == 9, "{all:?}");
    Ok(())
}

#[tokio::test]
async fn a_restart_from_a_complete_file_misses_nothing() -> Result<()> {
    let mut redis =
        RedisServer::builder().setting("appendonly yes").setting("appendfsync always").start().await?;
    let before = publish(&mut Library::on(&redis).await?, 3).await?;
    redis.restart().await?;
    let mut library = Library(connect(&redis).await?);
    let after = publish(&mut library, 3).await?;
    ensure_fence(&mut library, &before[2], &after).await?;
    ensure!(library.entries("lobby").await?.into_iter().map(|(id, _)| id).eq([before, after].concat()));
    Ok(())
}

/// Makes `replica` a replica of `master`, and waits until it is in sync.
async fn follow(replica: &mut Library, master: &RedisServer) -> Result<()> {
    let _: Value = replica.run(&["REPLICAOF", "127.0.0.1", &master.port().to_string()]).await?;
    eventually("in sync", async || match replica.run::<String>(&["INFO", "replication"]).await {
        Ok(info) if info.contains("master_link_status:up") => Ok(()),
        other => Err(other),
    })
    .await
}

/// A replica that is promoted without the newest messages of its master, and a master that comes back later.
#[tokio::test]
async fn a_promotion_that_lost_messages_repeats_no_position() -> Result<()> {
    let (a, b) = (RedisServer::start().await?, RedisServer::start().await?);
    let (mut on_a, mut on_b) = (Library::on(&a).await?, Library(connect(&b).await?));
    follow(&mut on_b, &a).await?;
    let kept = publish(&mut on_a, 3).await?;
    ensure!(on_a.run::<i64>(&["WAIT", "1", "0"]).await? == 1);
    let _: Value = on_b.run(&["REPLICAOF", "NO", "ONE"]).await?;
    let lost = publish(&mut on_a, 2).await?;
    ensure!(parts(&lost[1]).1 == 5);
    // The library came with the data.
    let on_b_alone = publish(&mut on_b, 3).await?;
    ensure_fence(&mut on_b, &kept[2], &on_b_alone).await?;
    // Back to the first server.
    follow(&mut on_a, &b).await?;
    let again_on_b = publish(&mut on_b, 1).await?;
    ensure!(on_b.run::<i64>(&["WAIT", "1", "0"]).await? == 1);
    let _: Value = on_a.run(&["REPLICAOF", "NO", "ONE"]).await?;
    let back_on_a = publish(&mut on_a, 2).await?;
    ensure_fence(&mut on_a, &again_on_b[0], &back_on_a).await?;
    let all: HashSet<_> =
        [&kept[..], &lost, &on_b_alone, &again_on_b, &back_on_a].concat().into_iter().collect();
    ensure!(all.len() == 3 + 2 + 3 + 1 + 2, "{all:?}");
    Ok(())
}

/// A transaction has one time, so all of this happens within one millisecond.
#[tokio::test]
async fn a_log_that_is_deleted_and_written_again_at_once_has_another_epoch() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let mut all = redis::pipe();
    all.atomic();
    for _ in 0..100 {
        for command in [&["FCALL", "tidegate_publish", "1", &log("lobby"), "x"][..], &["DEL", &log("lobby")]]
        {
            all.cmd(command[0]).arg(&command[1..]);
        }
    }
    let answers: Vec<Value> = all.query_async(&mut library.0).await?;
    let mut epochs = Vec::new();
    for answer in answers.into_iter().step_by(2) {
        let (position, _): (String, i64) = redis::from_redis_value(answer)?;
        ensure!(parts(&position).1 == 1, "{position}");
        epochs.push(parts(&position).0);
    }
    ensure!(epochs.len() == 100 && epochs.is_sorted_by(|one, two| one < two), "{epochs:?}");
    Ok(())
}

#[tokio::test]
async fn a_log_that_expired_begins_under_a_later_epoch() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let before = library.publish("lobby", "x", &["ttl", "1"]).await?;
    eventually("expired", async || match library.run::<bool>(&["EXISTS", &log("lobby")]).await {
        Ok(false) => Ok(()),
        other => Err(other),
    })
    .await?;
    let after = library.publish("lobby", "x", &[]).await?;
    ensure!(parts(&after).0 > parts(&before).0 && parts(&after).1 == 1, "{before}, {after}");
    Ok(())
}

/// Even when the log has long trimmed the first entry of its epoch.
#[tokio::test]
async fn a_library_that_is_loaded_again_goes_on_in_the_same_epoch() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let mut before = publish(&mut library, 1).await?;
    for _ in 0..500 {
        before.push(library.publish("lobby", "x", &["size", "10"]).await?);
    }
    let _: Value = library.run(&["FUNCTION", "FLUSH"]).await?;
    functions::load(&mut library.0).await?;
    let (epoch, offset) = parts(&before[500]);
    let after = publish(&mut library, 2).await?;
    ensure!(after == [format!("{epoch}-{}", offset + 1), format!("{epoch}-{}", offset + 2)]);
    ensure!(link(&mut library, "lobby", &after[0]).await?.is_none());
    Ok(())
}

/// An administrator restores a log of yesterday, or keys of the same name are in two databases.
#[tokio::test]
async fn another_log_under_the_key_repeats_no_position() -> Result<()> {
    let redis = RedisServer::start().await?;
    let mut library = Library::on(&redis).await?;
    let mut all = publish(&mut library, 3).await?;
    let dump: Vec<u8> = library.run(&["DUMP", &log("lobby")]).await?;
    let yesterday = all.clone();
    all.extend(publish(&mut library, 3).await?);
    let restore: [&[u8]; 5] = [b"RESTORE", log("lobby").leak().as_bytes(), b"0", &dump, b"REPLACE"];
    let _: Value = library.run_bytes(&restore).await?;
    let after = publish(&mut library, 2).await?;
    all.extend(after.clone());
    let now: Vec<String> = library.entries("lobby").await?.into_iter().map(|(id, _)| id).collect();
    ensure!(now == [yesterday, after.clone()].concat(), "{now:?}");
    ensure!(link(&mut library, "lobby", &after[0]).await?.is_some_and(|link| link.starts_with("u ")));

    let mut entries = [now.len(), 0];
    for round in 0..20 {
        let database = usize::from(round % 3 != 0);
        let _: Value = library.run(&["SELECT", &database.to_string()]).await?;
        all.extend(publish(&mut library, 1).await?);
        entries[database] += 1;
        ensure!(library.entries("lobby").await?.len() == entries[database]);
    }
    let distinct: HashSet<_> = all.iter().collect();
    ensure!(distinct.len() == all.len(), "{all:?}");
    Ok(())
}

/// The text of the library with its clock, its server and its Cluster in the hash `stub`, and with this many different
/// tags of reigns: few, if many reigns shall have the same.
fn stubbed(tags: u64) -> Result<String> {
    let mut text = functions::TEXT.to_owned();
    for (from, to) in [
        ("look('TIME')", "redis.call('HMGET', 'stub', 'seconds', 'microseconds')"),
        ("look('INFO', 'replication', 'cluster')", "redis.call('HGET', 'stub', 'info')"),
        ("look('INFO', 'server')", "redis.call('HGET', 'stub', 'server')"),
        ("look('CLUSTER', 'MYID')", "redis.call('HGET', 'stub', 'node')"),
        ("look('CLUSTER', 'NODES')", "redis.call('HGET', 'stub', 'nodes')"),
        ("% 10000000", &format!("% {tags}")),
    ] {
        ensure!(text.matches(from).count() == 1, "{from} is not in the text once");
        text = text.replacen(from, to, 1);
    }
    Ok(text)
}

/// As many as there are.
const TAGS: u64 = 10_000_000;

/// A server whose clock and reign the test decides.
struct Stubbed {
    library: Library,
    /// Milliseconds since 1970.
    clock: u64,
    tags: u64,
    _redis: RedisServer,
}

impl Stubbed {
    async fn start() -> Result<Self> {
        Self::with_tags(TAGS).await
    }

    async fn with_tags(tags: u64) -> Result<Self> {
        let redis = RedisServer::start().await?;
        let library = Library(connect(&redis).await?);
        let mut stubbed = Self { library, clock: 0, tags, _redis: redis };
        stubbed.load().await?;
        stubbed.set_clock(1_800_000_000_000).await?;
        stubbed.set("info", "master_replid:abc").await?;
        Ok(stubbed)
    }

    /// Loads the library; it forgets everything.
    async fn load(&mut self) -> Result<()> {
        let _: Value = self.library.run(&["FUNCTION", "FLUSH"]).await?;
        let _: Value = self.library.run(&["FUNCTION", "LOAD", &stubbed(self.tags)?]).await?;
        Ok(())
    }

    async fn set(&mut self, field: &str, value: &str) -> Result<()> {
        let _: Value = self.library.run(&["HSET", "stub", field, value]).await?;
        Ok(())
    }

    async fn set_clock(&mut self, clock: u64) -> Result<()> {
        self.clock = clock;
        self.set("seconds", &(clock / 1000).to_string()).await?;
        self.set("microseconds", &(clock % 1000 * 1000).to_string()).await
    }

    async fn publish(&mut self) -> Result<(u64, u64, Option<String>)> {
        let position = self.library.publish("lobby", "x", &[]).await?;
        let link = link(&mut self.library, "lobby", &position).await?;
        Ok((parts(&position).0, parts(&position).1, link))
    }

    /// Lets the library look at the reign again.
    async fn reign(&mut self, info: &str) -> Result<()> {
        self.set("info", info).await?;
        self.set_clock(self.clock + 50).await
    }
}

#[tokio::test]
async fn epochs_never_go_back_when_the_clock_does() -> Result<()> {
    let mut stubbed = Stubbed::start().await?;
    let mut epochs = vec![stubbed.publish().await?.0];
    for _ in 0..3 {
        let back = stubbed.clock - 3_600_000;
        stubbed.set_clock(back).await?;
        let (epoch, ..) = stubbed.publish().await?;
        ensure!(Some(&epoch) == epochs.last(), "the log is the same");
        let _: Value = stubbed.library.run(&["DEL", &log("lobby")]).await?;
        epochs.push(stubbed.publish().await?.0);
        stubbed.reign(&format!("master_replid:{back:x}")).await?;
        let (epoch, offset, link) = stubbed.publish().await?;
        ensure!(
            offset == 2 && link == Some(format!("u {}-1", epochs[epochs.len() - 1])),
            "{offset} {link:?}"
        );
        epochs.push(epoch);
    }
    ensure!(epochs.is_sorted_by(|one, two| one < two), "{epochs:?}");
    Ok(())
}

#[tokio::test]
async fn a_log_that_moved_to_another_master_is_continuous() -> Result<()> {
    let mut stubbed = Stubbed::start().await?;
    let node = |number: char| number.to_string().repeat(40);
    let nodes = |flags: &str| {
        format!(
            "{} 127.0.0.1:1@2 {flags} - 0 0 1 connected 0-5\n{} 127.0.0.1:3@4 myself,master - 0 0 2 connected 6-9\n",
            node('a'),
            node('b')
        )
    };
    for (flags, mark) in [("master", "m"), ("master,fail", "u"), ("master,fail?", "u"), ("slave", "u")] {
        stubbed.set("node", &node('a')).await?;
        stubbed.reign(&format!("master_replid:{}\r\ncluster_enabled:1", node('c'))).await?;
        let (epoch, offset, _) = stubbed.publish().await?;
        stubbed.set("node", &node('b')).await?;
        stubbed.set("nodes", &nodes(flags)).await?;
        stubbed.reign(&format!("master_replid:{}\r\ncluster_enabled:1", node('d'))).await?;
        let (_, _, link) = stubbed.publish().await?;
        ensure!(link == Some(format!("{mark} {epoch}-{offset}")), "{flags}: {link:?}");
        let (_, _, link) = stubbed.publish().await?;
        ensure!(link.is_none(), "{link:?}");
    }
    // A failover on the same node is never a move.
    let (epoch, offset, _) = stubbed.publish().await?;
    stubbed.reign(&format!("master_replid:{}\r\ncluster_enabled:1", node('e'))).await?;
    ensure!(stubbed.publish().await?.2 == Some(format!("u {epoch}-{offset}")));
    Ok(())
}

/// Two masters of a real Cluster; a slot moves from one to the other with its keys.
#[tokio::test]
async fn a_slot_that_moves_takes_the_log_and_its_ids_along() -> Result<()> {
    let cluster = || RedisServer::builder().setting("cluster-enabled yes").start();
    let (a, b) = (cluster().await?, cluster().await?);
    let (mut on_a, mut on_b) = (Library::on(&a).await?, Library::on(&b).await?);
    let _: Value = on_a.run(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await?;
    let _: Value = on_b.run(&["CLUSTER", "SET-CONFIG-EPOCH", "2"]).await?;
    let port = b.port().to_string();
    let _: Value = on_a.run(&["CLUSTER", "MEET", "127.0.0.1", &port]).await?;
    for on in [&mut on_a, &mut on_b] {
        eventually("the cluster is complete", async || match on.run::<String>(&["CLUSTER", "INFO"]).await {
            Ok(info) if info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:2") => Ok(()),
            other => Err(other),
        })
        .await?;
    }
    let (first, _) = on_a.publish_once("lobby", "b:1", "first").await?;
    let last = on_a.publish("lobby", "second", &["size", "7", "ttl", "none"]).await?;

    let (key, id) = (log("lobby"), "{room:lobby}:id:b:1");
    let slot = on_a.run::<u16>(&["CLUSTER", "KEYSLOT", &key]).await?.to_string();
    let (name_a, name_b): (String, String) =
        (on_a.run(&["CLUSTER", "MYID"]).await?, on_b.run(&["CLUSTER", "MYID"]).await?);
    let _: Value = on_b.run(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &name_a]).await?;
    let _: Value = on_a.run(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &name_b]).await?;
    let _: Value = on_a.run(&["MIGRATE", "127.0.0.1", &port, "", "0", "30000", "KEYS", &key, id]).await?;
    for on in [&mut on_b, &mut on_a] {
        let _: Value = on.run(&["CLUSTER", "SETSLOT", &slot, "NODE", &name_b]).await?;
    }

    let after = [on_b.publish("lobby", "x", &[]).await?, on_b.publish("lobby", "x", &[]).await?];
    ensure!(
        parts(&after[0]).0 > parts(&last).0 && after.each_ref().map(|one| parts(one).1) == [3, 4],
        "{after:?}"
    );
    ensure!(link(&mut on_b, "lobby", &after[0]).await? == Some(format!("m {last}")));
    ensure!(link(&mut on_b, "lobby", &after[1]).await?.is_none());
    ensure!(on_b.publish_once("lobby", "b:1", "first").await? == (first, true));
    ensure!(on_b.run::<i64>(&["PTTL", &key]).await? == -1, "the policy came along");
    Ok(())
}

#[tokio::test]
async fn a_server_that_hides_its_identity_is_never_trusted_twice() -> Result<()> {
    let mut stubbed = Stubbed::start().await?;
    stubbed.reign("role:master").await?;
    stubbed.set("server", "run_id:abc").await?;
    let (epoch, ..) = stubbed.publish().await?;
    stubbed.load().await?;
    let (same, offset, link) = stubbed.publish().await?;
    ensure!(same == epoch && offset == 2 && link.is_none(), "the run ID proves it: {link:?}");
    stubbed.set("server", "").await?;
    stubbed.reign("role:master").await?;
    let (_, offset, link) = stubbed.publish().await?;
    ensure!(offset == 3 && link.is_some());
    stubbed.reign("role:master").await?;
    ensure!(stubbed.publish().await?.2.is_none(), "the library remembers it");
    stubbed.load().await?;
    ensure!(stubbed.publish().await?.2.is_some(), "nothing proves it");
    Ok(())
}

/// A log that the library has forgotten, deleted and written again, at one and the same time.
#[tokio::test]
async fn more_rooms_than_the_library_remembers() -> Result<()> {
    const ROOMS: usize = 52_000;
    let mut stubbed = Stubbed::start().await?;
    let mut rounds = Vec::new();
    for round in 0..2 {
        let mut positions: Vec<(String, i64)> = Vec::new();
        for first in (0..ROOMS).step_by(2000) {
            let mut chunk = redis::pipe();
            for room in first..first + 2000 {
                chunk.cmd("FCALL").arg("tidegate_publish").arg(1).arg(log(&room.to_string())).arg("x");
            }
            positions.extend(chunk.query_async::<Vec<(String, i64)>>(&mut stubbed.library.0).await?);
        }
        if round == 0 {
            let _: Value = stubbed.library.run(&["DEL", &log("0")]).await?;
        }
        rounds.push(positions);
    }
    ensure!(parts(&rounds[1][0].0).0 > parts(&rounds[0][0].0).0, "{:?}, {:?}", rounds[0][0], rounds[1][0]);
    for (before, after) in rounds[0].iter().zip(&rounds[1]).skip(1) {
        let ((epoch, offset), after) = (parts(&before.0), parts(&after.0));
        ensure!(offset == 1 && after == (epoch, 2), "{before:?}, {after:?}");
    }
    Ok(())
}

/// Anything in any order: publications, deleted and cleared logs, a library that is loaded again, clocks that jump, and
/// servers that restart with all of their data, with older data or with none.
#[tokio::test]
async fn no_position_ever_names_two_messages() -> Result<()> {
    for seed in 1..=6 {
        // Either many reigns have the same tag, or clocks are set back. For both together there is no guarantee.
        let tags = if seed % 2 == 0 { 2 } else { TAGS };
        let mut stubbed = Stubbed::with_tags(tags).await?;
        any_order(&mut stubbed, seed).await.with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

async fn any_order(stubbed: &mut Stubbed, seed: u64) -> Result<()> {
    const ROOMS: [&str; 3] = ["a", "b", "c"];
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut below = |bound: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    // What each position has named, in each room.
    let mut named: HashMap<(&str, String), u64> = HashMap::new();
    let mut dumps: HashMap<&str, Option<Vec<u8>>> = HashMap::new();
    // Rooms whose log was written in the present reign.
    let mut mine: HashSet<&str> = HashSet::new();
    let (mut latest, mut reign, mut fences) = (stubbed.clock, 0, 0);
    for step in 0..1500_u64 {
        let room = *ROOMS.get(usize::try_from(below(3))?).context("one of them")?;
        let key = log(room);
        match below(20) {
            0 => {
                let _: Value = stubbed.library.run(&["DEL", &key]).await?;
            }
            1 | 2 => {
                let function = if below(2) == 0 { "tidegate_clear" } else { "tidegate_open" };
                let exists: bool = stubbed.library.run(&["EXISTS", &key]).await?;
                let _: Value = stubbed.library.run(&["FCALL", function, "1", &key]).await?;
                if !exists {
                    mine.insert(room);
                }
            }
            3 => {
                // A library that has forgotten everything relies on the clock.
                stubbed.load().await?;
                stubbed.set_clock(latest + 1000).await?;
            }
            4 if stubbed.tags == TAGS => stubbed.set_clock(stubbed.clock - below(10_000)).await?,
            4 => {}
            5 => stubbed.set_clock(stubbed.clock + below(20_000)).await?,
            6 => {
                dumps.clear();
                for room in ROOMS {
                    dumps.insert(room, stubbed.library.run(&["DUMP", &log(room)]).await?);
                }
            }
            7 | 8 => {
                // A restart: the library's state is lost, and perhaps data.
                if below(2) == 0 {
                    for room in ROOMS {
                        let _: Value = stubbed.library.run(&["DEL", &log(room)]).await?;
                        if let Some(dump) = dumps.get(room).cloned().flatten() {
                            let key = log(room);
                            let restore: [&[u8]; 4] = [b"RESTORE", key.as_bytes(), b"0", &dump];
                            let _: Value = stubbed.library.run_bytes(&restore).await?;
                        }
                    }
                }
                if below(2) == 0 {
                    stubbed.load().await?;
                }
                reign += 1;
                mine.clear();
                stubbed.set_clock(latest + 1000).await?;
                stubbed.reign(&format!("master_replid:{reign:040x}")).await?;
            }
            _ => {
                let info: Option<HashMap<String, Value>> =
                    stubbed.library.run(&["XINFO", "STREAM", &key]).await.ok();
                let last = info.and_then(|mut info| info.remove("last-generated-id"));
                let last: Option<String> = last.map(redis::from_redis_value).transpose()?;
                let position = stubbed.library.publish(room, &step.to_string(), &["size", "3"]).await?;
                if let Some(before) = named.insert((room, position.clone()), step) {
                    anyhow::bail!("{position} names the messages of steps {before} and {step}");
                }
                let link = link(&mut stubbed.library, room, &position).await?;
                let (epoch, offset) = parts(&position);
                match last {
                    None => ensure!(offset == 1 && link.is_none(), "{position} {link:?} in a new log"),
                    Some(last) => {
                        let (last_epoch, last_offset) = parts(&last);
                        ensure!(offset == last_offset + 1, "{last}, then {position}");
                        let began = epoch != last_epoch;
                        ensure!(began != mine.contains(room), "step {step}: {last}, then {position}");
                        ensure!(epoch >= last_epoch, "{last}, then {position}");
                        ensure!(
                            link == began.then(|| format!("u {last}")),
                            "{last}, then {position} with {link:?}"
                        );
                        fences += u64::from(began);
                    }
                }
                mine.insert(room);
            }
        }
        latest = latest.max(stubbed.clock);
    }
    ensure!(named.len() > 500 && fences > 30, "{} messages, {fences} fences", named.len());
    Ok(())
}

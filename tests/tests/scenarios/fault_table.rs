//! The table of faults: what happens to Redis, the publishers' results, the sessions' gaps, and how long it takes until
//! everything works again.
//!
//! Every row has two nodes on a real server, an event stream on each, a client that keeps publishing by `POST`,
//! and one fault. The counts are exact: each session is notified of so many gaps and no more, an acknowledged message
//! is received or covered by a gap, and a refused one is never received. Each fault happens over TCP, and
//! `tests/run --long` repeats them over TLS and Unix sockets. Nodes always use the documented ACL user.
//!
//! Each fault happens in a room without a history and in one with a history. There, clients that come back afterwards with
//! the position of the first message, at the other node, receive the same.

mod faults;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use tidegate_tests::{
    client::Client,
    eventually::eventually,
    fault_proxy::{FaultProxy, Target},
    http::Request,
    journal::{Journal, Payload},
    node::{Builder, Node},
    redis_server::RedisServer,
    token::anywhere,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use self::faults::Fault;

const GAP: &str = "tidegate.gap";
/// A room without a history, and one with a history.
const ROOMS: [&str; 2] = ["faults", "kept"];
/// The interval between publications.
const PACE: Duration = Duration::from_millis(20);
/// How many rows run at a time: they mostly wait.
const AT_ONCE: usize = 4;

/// How nodes reach the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Tcp,
    Tls,
    Unix,
}

/// One row, set up.
struct Row {
    fault: Fault,
    room: &'static str,
    redis: RedisServer,
    /// A replica, or the other server.
    second: Option<RedisServer>,
    proxy: Option<FaultProxy>,
    admin: redis::aio::MultiplexedConnection,
    nodes: [Node; 2],
    streams: [Client; 2],
    /// The publishers' results so far, by the number of the message.
    statuses: Arc<Mutex<Vec<u16>>>,
}

impl Row {
    fn has_history(&self) -> bool {
        self.room != ROOMS[0]
    }

    async fn set(fault: Fault, room: &'static str, transport: Transport) -> Result<Self> {
        let mut builder = RedisServer::builder()
            .setting("enable-debug-command yes")
            .setting("busy-reply-threshold 100")
            .setting("loading-process-events-interval-bytes 1024")
            .setting("repl-diskless-sync-delay 0")
            .setting("client-output-buffer-limit pubsub 256kb 0 0")
            .setting(if room == ROOMS[0] {
                "user tidegate on >secret resetchannels &room:* &tidegate:canary:* \
                 -@all +subscribe +unsubscribe +publish"
            } else {
                "user tidegate on >secret resetchannels &room:* &tidegate:canary:* ~{room:*}:* \
                 -@all +subscribe +unsubscribe +publish +fcall +function|load \
                 +xadd +xrange +xrevrange +xinfo +xgroup +xsetid +xtrim +xdel +pexpire +persist +get +set \
                 +info +time +client|kill"
            });
        if transport == Transport::Tls {
            builder = builder.tls();
        }
        let second = match fault {
            Fault::Failover | Fault::Demoted | Fault::OtherServer => Some(builder.clone().start().await?),
            _ => None,
        };
        let redis = builder.start().await?;
        if let (Fault::Failover, Some(second)) = (fault, &second) {
            second.cli(&["REPLICAOF", "127.0.0.1", &redis.port().to_string()], b"").await?;
            eventually("the replica follows", async || {
                let info =
                    redis.cli(&["INFO", "replication"], b"").await.map_err(|error| format!("{error:#}"))?;
                let info = String::from_utf8_lossy(&info).into_owned();
                if info.contains("state=online") { Ok(()) } else { Err(info) }
            })
            .await?;
        }
        let admin = redis::Client::open(redis.url())?.get_multiplexed_async_connection().await?;
        let proxied = matches!(fault, Fault::Blackholed | Fault::OtherServer);
        let port = if transport == Transport::Tls { redis.tls_port()? } else { redis.port() };
        let proxy = if proxied {
            Some(FaultProxy::to(Target::Tcp(([127, 0, 0, 1], port).into())).await?)
        } else {
            None
        };
        let port = proxy.as_ref().map_or(port, |proxy| proxy.address().port());
        let url = match transport {
            Transport::Tcp => format!("redis://tidegate:secret@127.0.0.1:{port}"),
            Transport::Tls => format!("rediss://tidegate:secret@localhost:{port}"),
            Transport::Unix => format!("{}?user=tidegate&pass=secret", redis.unix_url()),
        };
        let mut node = Builder::new()
            .set("broker.url", &url)
            .set("broker.canary_interval", "200ms")
            .set("broker.canary_timeout", "1s")
            .set("broker.connect_timeout", "1s")
            .set("broker.publish_timeout", "1s")
            .set("broker.subscribe_timeout", "1s")
            .set("limits.outbound", "64MiB")
            .set(&format!("rooms.\"{}\".history.size", ROOMS[1]), "10000");
        if transport == Transport::Tls {
            node = node.set("broker.ca_file", &redis.ca_file().display().to_string());
        }
        let (a, b) = tokio::try_join!(node.start(), node.start())?;
        let token = anywhere("alice");
        let streams = [
            Client::events(&a.url(room, &token, "")).await?,
            Client::events(&b.url(room, &token, "")).await?,
        ];
        let statuses = Arc::default();
        Ok(Self { fault, room, redis, second, proxy, admin, nodes: [a, b], streams, statuses })
    }

    async fn admin(&mut self, command: &str) -> Result<redis::Value> {
        let mut words = command.split(' ');
        let mut request = redis::cmd(words.next().context("a command")?);
        for word in words {
            request.arg(word);
        }
        request.query_async(&mut self.admin).await.with_context(|| command.to_owned())
    }

    /// Waits until both nodes report that their broker is down.
    async fn until_down(&self) -> Result<()> {
        self.until_up_is(0, "the fault is noticed").await
    }

    async fn until_up(&self) -> Result<()> {
        self.until_up_is(1, "everything works").await
    }

    async fn until_up_is(&self, up: u64, what: &str) -> Result<()> {
        for node in &self.nodes {
            node.until_samples(what, |samples| samples.sum("tidegate_broker_up", &[]) == up).await?;
        }
        Ok(())
    }

    /// Waits until each node has lost its place in the room. In one with a history, nobody is told.
    async fn until_interrupted(&self) -> Result<()> {
        if self.has_history() {
            for node in &self.nodes {
                node.until_samples("a reading of the history", |samples| {
                    samples.sum("tidegate_history_repairs_total", &[]) > 0
                })
                .await?;
            }
            return Ok(());
        }
        for stream in &self.streams {
            stream.until("gap", |journal| journal.events(GAP) > 0).await?;
        }
        Ok(())
    }

    /// Waits until the server executes commands again.
    async fn until_answers(&self) -> Result<()> {
        self.redis.cli(&["PING"], b"").await.map(drop)
    }

    /// Waits for this many more canaries on each node.
    async fn until_proven(&self, canaries: u64) -> Result<()> {
        const SERIES: &str = "tidegate_broker_canary_seconds_count";
        for node in &self.nodes {
            let before = node.samples().await?.sum(SERIES, &[]);
            node.until_samples("proof", |samples| samples.sum(SERIES, &[]) >= before + canaries).await?;
        }
        Ok(())
    }

    /// Waits until this many connections of each node have ended for this cause.
    async fn until_ended(&self, cause: &str, count: u64) -> Result<()> {
        let label = format!("cause=\"{cause}\"");
        for node in &self.nodes {
            node.until_samples("ended connections", |samples| {
                samples.sum("tidegate_broker_connections_ended_total", &[&label]) >= count
            })
            .await?;
        }
        Ok(())
    }

    /// Waits until a publisher gets this result.
    async fn until_status(&self, status: u16) -> Result<()> {
        eventually("a refusal", async || {
            let heard = self.statuses.lock();
            if heard.contains(&status) { Ok(()) } else { Err(heard.last().copied()) }
        })
        .await
    }
}

async fn post(node: &Node, room: &str, text: &str) -> Result<u16> {
    let request =
        Request::post(&format!("/rooms/{room}"), "text/plain", text.as_bytes()).bearer(&anywhere("alice"));
    Ok(request.send(node.public).await?.status)
}

/// An acknowledged message is received or covered by a gap; a refused one is not received. Returns the number of gaps.
fn audit(journal: &Journal, posted: &[u16]) -> Result<usize> {
    audit_from(0, journal, posted)
}

/// The causes of the gaps.
fn causes(journal: &Journal) -> Vec<String> {
    let gaps = journal.messages.iter().filter(|message| message.event == GAP);
    gaps.map(|gap| String::from_utf8_lossy(gap.payload.bytes()).into_owned()).collect()
}

/// The epochs of the positions.
fn epochs(journal: &Journal) -> BTreeSet<String> {
    let ids = journal.messages.iter().map(|message| message.id.split('-').next().unwrap_or_default());
    ids.map(str::to_owned).collect()
}

/// The same for what comes from this number on.
fn audit_from(first: usize, journal: &Journal, posted: &[u16]) -> Result<usize> {
    let mut next = first;
    let mut gaps = 0;
    let mut excused = false;
    for message in &journal.messages {
        if message.event == GAP {
            gaps += 1;
            excused = true;
            continue;
        }
        let text = String::from_utf8_lossy(message.payload.bytes()).into_owned();
        let Some(number) = text.strip_prefix('n').and_then(|number| number.parse::<usize>().ok()) else {
            continue;
        };
        ensure!(number >= next, "{number} was received after {next}");
        let missing = (next..number).filter(|number| posted.get(*number) == Some(&202)).collect::<Vec<_>>();
        ensure!(
            missing.is_empty() || excused,
            "{missing:?} were acknowledged, and are missing without a gap"
        );
        if let Some(status) = posted.get(number) {
            ensure!([202, 504].contains(status), "{number} was refused with {status}, but received");
        }
        next = number + 1;
        excused = false;
    }
    let missing = (next..posted.len()).filter(|number| posted.get(*number) == Some(&202)).count();
    ensure!(missing == 0 || excused, "{missing} acknowledged messages are missing at the end");
    Ok(gaps)
}

/// Plays one row and returns its line of the table.
async fn play(fault: Fault, room: &'static str, transport: Transport) -> Result<String> {
    let mut row = Row::set(fault, room, transport).await?;
    let stop = CancellationToken::new();
    // Publish before, during and after the fault.
    let recovered = {
        let publisher = Publisher::start(&row, stop.clone());
        row.until_proven(4).await?;
        let happened = row.happen().await;
        let healed = Instant::now();
        let up = match happened {
            Ok(()) => row.until_up().await,
            Err(error) => Err(error),
        };
        let recovered = healed.elapsed();
        let proven = match up {
            Ok(()) => row.until_proven(4).await,
            Err(error) => Err(error),
        };
        stop.cancel();
        publisher.finish().await?;
        proven?;
        recovered
    };
    let posted = std::mem::take(&mut *row.statuses.lock());
    eventually("the last message is taken", async || match post(&row.nodes[1], room, "last").await {
        Ok(202) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    let expected = fault.gaps(row.has_history());
    for (index, stream) in row.streams.iter().enumerate() {
        let journal = stream.hears(&Payload::text("last")).await?;
        let gaps = audit(&journal, &posted)?;
        ensure!(
            expected.contains(&gaps),
            "{gaps} gap notifications, not {expected:?}: {:?}, epochs {:?}",
            causes(&journal),
            epochs(&journal)
        );
        if row.has_history() {
            let first = journal.messages.first().context("the first message")?;
            let since = format!("&since={}", first.id);
            let other = row.nodes.get(1 - index).context("two nodes")?;
            let back = Client::events(&other.url(room, &anywhere("alice"), &since)).await?;
            let journal = back.hears(&Payload::text("last")).await?;
            audit_from(1, &journal, &posted).context("somebody who comes back")?;
            let told = causes(&journal);
            ensure!(told.is_empty() || *expected.end() > 0, "somebody who comes back is told of {told:?}");
        }
    }
    let mut heard = BTreeMap::<u16, usize>::new();
    for status in &posted {
        *heard.entry(*status).or_default() += 1;
    }
    let (required, allowed) = fault.statuses(row.has_history());
    for status in heard.keys() {
        ensure!(
            *status == 202 || required.contains(status) || allowed.contains(status),
            "publishers got {heard:?}"
        );
    }
    ensure!(
        required.iter().all(|status| heard.contains_key(status)),
        "publishers got {heard:?}, not {required:?}"
    );
    for node in &row.nodes {
        node.ensure_sound()?;
    }
    let heard: Vec<_> = heard.iter().map(|(status, count)| format!("{count} × {status}")).collect();
    Ok(format!(
        "| {} | {room} | {transport:?} | {} | {} | {:.1} s |",
        fault.name(),
        heard.join(", "),
        match (*expected.start(), *expected.end()) {
            (0, 0) => "nothing".to_owned(),
            (1, 1) => "1 gap each".to_owned(),
            (least, most) => format!("{least} to {most} gaps each"),
        },
        recovered.as_secs_f64()
    ))
}

/// A client that publishes during a row: one message after the other, to both nodes in turn.
struct Publisher(JoinSet<Result<()>>);

impl Publisher {
    fn start(row: &Row, stop: CancellationToken) -> Self {
        let addresses = [row.nodes[0].public, row.nodes[1].public];
        let statuses = Arc::clone(&row.statuses);
        let room = row.room;
        let mut publishing = JoinSet::new();
        publishing.spawn(async move {
            let token = anywhere("alice");
            for number in 0_usize.. {
                if stop.is_cancelled() {
                    break;
                }
                let request = Request::post(&format!("/rooms/{room}"), "text/plain", format!("n{number}"))
                    .bearer(&token);
                let address = addresses.get(number % 2).context("two nodes")?;
                let status = request.send(*address).await?.status;
                statuses.lock().push(status);
                sleep(PACE).await;
            }
            Ok(())
        });
        Self(publishing)
    }

    async fn finish(mut self) -> Result<()> {
        self.0.join_next().await.context("it was started")??
    }
}

async fn table(room: &'static str, transports: &[Transport]) -> Result<()> {
    let rows = transports
        .iter()
        .flat_map(|transport| Fault::ALL.into_iter().map(move |fault| (fault, *transport)))
        .filter(|(fault, transport)| fault.happens_over(*transport));
    play_all(room, rows.collect()).await
}

#[allow(clippy::print_stdout, reason = "the table is what this test is for")]
async fn play_all(room: &'static str, rows: Vec<(Fault, Transport)>) -> Result<()> {
    let played: Vec<_> = stream::iter(rows)
        .map(async |(fault, transport)| (fault, transport, play(fault, room, transport).await))
        .buffered(AT_ONCE)
        .collect()
        .await;
    let mut text = String::from(
        "| fault | room | over | publishers get | gaps per session | recovery time |\n|---|---|---|---|---|---|\n",
    );
    let mut failed = 0;
    for (fault, transport, row) in played {
        match row {
            Ok(line) => writeln!(text, "{line}")?,
            Err(error) => {
                failed += 1;
                writeln!(text, "| {} | {room} | {transport:?} | FAILED: {error:#} | | |", fault.name())?;
            }
        }
    }
    println!("\n{text}");
    if failed > 0 {
        bail!("{failed} rows failed:\n{text}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_fault_over_tcp() -> Result<()> {
    table(ROOMS[0], &[Transport::Tcp]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_fault_in_a_room_with_a_history() -> Result<()> {
    table(ROOMS[1], &[Transport::Tcp]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn each_fault_over_tls_and_unix_sockets() -> Result<()> {
    for room in ROOMS {
        table(room, &[Transport::Tls, Transport::Unix]).await?;
    }
    Ok(())
}

//! The memory that a node holds for its clients stays within `limits.memory`, whatever clients do to increase it.

use std::ops::Range;

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, future::try_join_all, stream};
use tidegate_tests::{
    client::Client,
    eventually::eventually,
    http::{Request, Response},
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    redis_server::RedisServer,
    samples::Samples,
    token::{Token, anywhere},
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinSet};

const HELD: &str = "tidegate_memory_held_bytes";
const CLOSED: &str = "tidegate_connections_closed_total";
const REFUSED: &str = "tidegate_refusals_total";
const MIB: u64 = 1 << 20;

fn held(samples: &Samples, consumer: &str) -> u64 {
    samples.sum(HELD, &[&format!("consumer=\"{consumer}\"")])
}

fn closed(samples: &Samples, reason: &str) -> u64 {
    samples.sum(CLOSED, &[&format!("reason=\"{reason}\"")])
}

fn refused(samples: &Samples, reason: &str) -> u64 {
    samples.sum(REFUSED, &[&format!("reason=\"{reason}\"")])
}

/// Members that read nothing, each in its own room.
async fn stalled(node: &Node, prefix: &str, count: usize) -> Result<Vec<RawSocket>> {
    let token = anywhere("alice");
    let connect = |n| {
        let target = format!("/rooms/{prefix}{n}?token={token}");
        async move { RawSocket::connect_narrow(node.public, &target).await }
    };
    stream::iter(0..count).map(connect).buffered(64).try_collect().await
}

/// A backend that publishes without limits.
struct Backend(redis::aio::MultiplexedConnection);

impl Backend {
    async fn connect(redis: &RedisServer) -> Result<Self> {
        Ok(Self(redis::Client::open(redis.url())?.get_multiplexed_async_connection().await?))
    }

    /// Publishes to each of these rooms.
    async fn publish(&mut self, prefix: &str, rooms: Range<usize>, payload: &[u8]) -> Result<()> {
        let mut pipeline = redis::pipe();
        for n in rooms {
            pipeline.cmd("PUBLISH").arg(format!("room:{prefix}{n}")).arg(payload).ignore();
        }
        Ok(pipeline.query_async(&mut self.0).await?)
    }
}

/// A thousand clients that read nothing could hold a gigabyte within `limits.outbound`.
#[tokio::test]
async fn a_client_that_reads_nothing_is_closed_before_memory_runs_out() -> Result<()> {
    const LIMIT: u64 = 32 * MIB;
    const READERS: usize = 1000;
    const FULLEST: usize = 8;
    let redis = RedisServer::start().await?;
    let node = Builder::new().set("broker.url", &redis.url()).set("limits.memory", "32MiB");
    let node = node.set("limits.outbound", "4MiB").start().await?;
    let start = node.resident_bytes()?;
    let token = anywhere("alice");
    let healthy = Client::websocket(&node.ws("healthy0", &token, ""), &[]).await?;
    let mut fullest = stalled(&node, "full", FULLEST).await?;
    let readers = stalled(&node, "room", READERS).await?;
    let mut backend = Backend::connect(&redis).await?;
    let payload = vec![b'x'; 16 * 1024];

    let (mut count, mut most) = (0, 0);
    let samples = loop {
        ensure!(count < 2000, "a thousand readers that read nothing are never too much");
        // Keep pace with the readers: a hundred rooms at a time, and the same for each of a few.
        let rooms = count % 10 * READERS / 10;
        backend.publish("full", 0..FULLEST, &payload).await?;
        backend.publish("room", rooms..rooms + READERS / 10, &payload).await?;
        backend.publish("healthy", 0..1, format!("{count}").as_bytes()).await?;
        count += 1;
        healthy.heard(count).await?;
        let samples = node.samples().await?;
        most = most.max(samples.sum(HELD, &[]));
        if closed(&samples, "memory") > 100 {
            break samples;
        }
    };
    ensure!(most > LIMIT / 2, "it was nearly used up: {most}");
    // What arrives within a shard's turn is added before any session is closed for it.
    ensure!(most <= LIMIT + LIMIT / 8, "{most} bytes were held");
    let grown = node.resident_bytes()?.saturating_sub(start);
    ensure!(grown < 3 * LIMIT, "resident memory grew by {grown} bytes");

    // No other session was closed, and for no other reason.
    for reason in ["slow_consumer", "lost", "heartbeat_timeout", "internal"] {
        ensure!(closed(&samples, reason) == 0, "{reason}: {samples:?}");
    }
    ensure!(healthy.now().end.is_none() && healthy.now().messages.len() == count);
    // The fullest were closed; they were told to reconnect, if that still reached them.
    for socket in &mut fullest {
        let code = socket.close_code().await?;
        ensure!(code.is_none_or(|code| code == 1013), "{code:?}");
    }

    // When they are gone, nothing is held.
    drop((readers, fullest));
    node.until_samples("nothing is held", |samples| samples.sum(HELD, &[]) == 0).await?;
    node.ensure_sound()
}

/// A message to a room counts once, however many queues it waits in.
#[tokio::test]
async fn a_message_queued_for_a_slow_crowd_counts_once() -> Result<()> {
    const MEMBERS: usize = 200;
    let redis = RedisServer::start().await?;
    let node = Builder::new().set("broker.url", &redis.url()).set("limits.memory", "16MiB").start().await?;
    let token = anywhere("alice");
    let target = format!("/rooms/crowd0?token={token}");
    let crowd = try_join_all((0..MEMBERS).map(|_| RawSocket::connect_narrow(node.public, &target))).await?;
    let healthy = Client::websocket(&node.ws("crowd0", &token, ""), &[]).await?;
    let mut backend = Backend::connect(&redis).await?;
    for round in 0..24 {
        backend.publish("crowd", 0..1, &vec![b'x'; 32 * 1024]).await?;
        healthy.heard(round + 1).await?;
    }
    let samples = node.samples().await?;
    let queued = samples.sum("tidegate_outbound_bytes", &[]);
    ensure!(queued > 64 * MIB, "they are far behind: {queued} bytes");
    let held = held(&samples, "outbound");
    ensure!((300 * 1024..4 * MIB).contains(&held), "{held} bytes are held");
    ensure!(closed(&samples, "memory") == 0);
    drop(crowd);
    node.until_samples("nothing is held", |samples| samples.sum(HELD, &[]) == 0).await?;
    Ok(())
}

/// While Redis is stopped, each `POST` waits with its body.
#[tokio::test]
async fn bodies_that_wait_for_the_broker_are_refused_past_the_budget() -> Result<()> {
    const POSTS: u64 = 400;
    const LIMIT: u64 = 8 * MIB;
    /// A body, and the buffer that it was read into.
    const EACH: u64 = (64 + 56) * 1024;
    let redis = RedisServer::start().await?;
    let node = Builder::new()
        .set("broker.url", &redis.url())
        .set("broker.publish_queue", "64KiB")
        .set("broker.publish_timeout", "1h")
        .set("broker.canary_timeout", "1h")
        .set("limits.memory", "8MiB")
        .start()
        .await?;
    let token = anywhere("alice");
    redis.freeze()?;
    let mut posts = JoinSet::new();
    for _ in 0..POSTS {
        let post = Request::post("/rooms/lobby", "text/plain", vec![b'x'; 64 * 1024]).bearer(&token);
        let address = node.public;
        posts.spawn(async move { post.send(address).await });
    }
    let samples = node
        .until_samples("every body is held or refused", |samples| {
            held(samples, "bodies") / EACH + refused(samples, "memory") == POSTS
        })
        .await?;
    // Requests may use half of the budget, and do.
    let bodies = held(&samples, "bodies");
    ensure!((LIMIT / 2 - EACH..=LIMIT / 2).contains(&bodies), "{bodies} bytes of bodies");
    ensure!(samples.sum(HELD, &[]) < LIMIT, "{samples:?}");
    let refusals = refused(&samples, "memory");

    redis.thaw()?;
    let mut accepted = 0;
    while let Some(answer) = posts.join_next().await {
        accepted += u64::from(is_accepted(&answer??)?);
    }
    ensure!(accepted + refusals == POSTS, "{accepted} were accepted, {refusals} refused");
    // Later requests are served.
    node.post("lobby", &token, "text/plain", b"later").await?;
    node.until_samples("nothing is held", |samples| samples.sum(HELD, &[]) == 0).await?;
    Ok(())
}

/// Whether it is 202; otherwise it must be a refusal with `Retry-After`.
fn is_accepted(answer: &Response) -> Result<bool> {
    if answer.status == 202 {
        return Ok(true);
    }
    ensure!(answer.status == 503, "{} {}", answer.status, answer.text());
    let problem = answer.problem()?;
    let detail = problem.get("detail").and_then(serde_json::Value::as_str);
    ensure!(detail.is_some_and(|text| text.contains("memory")), "{problem}");
    let seconds: u32 = answer.header("retry-after").context("Retry-After")?.parse()?;
    ensure!((2..=8).contains(&seconds));
    Ok(false)
}

/// An incomplete head is held for at most `public.header_timeout`.
#[tokio::test]
async fn large_heads_that_do_not_end_are_not_read_past_the_budget() -> Result<()> {
    const HEADS: usize = 300;
    const LIMIT: u64 = 2 * MIB;
    let node = Builder::new().set("limits.memory", "2MiB").set("public.header_timeout", "1h").start().await?;
    let head =
        format!("GET /rooms/lobby HTTP/1.1\r\nHost: {}\r\nX-Half: {}", node.public, "x".repeat(30_000));
    let mut sockets = Vec::new();
    for _ in 0..HEADS {
        let mut socket = TcpStream::connect(node.public).await?;
        // A client that is cut off while it writes was refused, too.
        drop(socket.write_all(head.as_bytes()).await);
        sockets.push(socket);
    }
    let samples = node
        .until_samples("the rest is refused", |samples| {
            refused(samples, "memory_head") + samples.sum("tidegate_sockets", &[]) == HEADS as u64
                && refused(samples, "memory_head") >= 200
        })
        .await?;
    let heads = held(&samples, "heads");
    ensure!((LIMIT / 4..=LIMIT / 2).contains(&heads), "{heads} bytes of heads are held");
    // A head of normal size is not refused.
    let client = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    client.send(tidegate_tests::journal::Payload::text("hello")).await?;
    client.heard(1).await?;
    drop(sockets);
    node.until_samples("nothing is held", |samples| samples.sum(HELD, &[]) == 0).await?;
    Ok(())
}

/// A refused command costs the node a reply, and no client can make it hold more than a few.
#[tokio::test]
async fn a_client_that_does_not_read_its_refusals_is_not_read() -> Result<()> {
    const SESSIONS: usize = 20;
    const COMMANDS: usize = 20_000;
    // These clients answer no pings.
    let node = Builder::new().set("heartbeat.interval", "59m").set("heartbeat.timeout", "1h").start().await?;
    let nobody = Token::new("nobody").sign();
    let commands: Vec<u8> = (2..COMMANDS + 2)
        .flat_map(|id| {
            Frame::text(format!(r#"{{"id":{id},"publish":{{"channel":"lobby","data":1}}}}"#)).bytes()
        })
        .collect();
    let talk = |_| {
        let (node, nobody) = (&node, &nobody);
        async move {
            let socket = tokio::net::TcpSocket::new_v4()?;
            // Small compared with the answers, and large enough to be read in no time later.
            socket.set_recv_buffer_size(64 * 1024)?;
            let socket = socket.connect(node.public).await?;
            let mut socket = RawSocket::over(socket, "/connection/websocket").await?;
            let connect = format!(r#"{{"id":1,"connect":{{"token":"{nobody}"}}}}"#);
            socket.send(&Frame::text(connect)).await?;
            anyhow::Ok(socket)
        }
    };
    let sockets: Vec<_> = stream::iter(0..SESSIONS).map(talk).buffered(16).try_collect().await?;
    // Each writes as much as the node accepts; the readers start when all are stuck.
    let (turn, signal) = tokio::sync::watch::channel(false);
    let mut talks = JoinSet::new();
    for socket in sockets {
        let (commands, mut signal) = (commands.clone(), signal.clone());
        talks.spawn(async move {
            let mut writer = socket.writer()?;
            let mut reader = socket;
            let talking = async move { writer.write_all(&commands).await.context("write") };
            let hearing = async move {
                signal.wait_for(|given| *given).await?;
                for id in 0..=COMMANDS {
                    let text = loop {
                        let frame = reader.receive().await?.with_context(|| format!("open after {id}"))?;
                        // The node's own pings come in between.
                        if frame.payload != b"{}" {
                            break String::from_utf8(frame.payload)?;
                        }
                    };
                    ensure!(id == 0 || text.contains(&format!(r#""id":{}"#, id + 1)), "{id}: {text}");
                    ensure!(id == 0 || text.contains(r#""code":103"#), "{id}: {text}");
                }
                Ok(())
            };
            tokio::try_join!(talking, hearing).map(drop)
        });
    }
    let token = anywhere("alice");
    let healthy = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let mut most = 0;
    for n in 0..300 {
        node.post("lobby", &token, "text/plain", b"hello").await?;
        healthy.heard(n + 1).await?;
        most = most.max(node.samples().await?.sum(HELD, &[]));
    }
    ensure!(most > 1024 * 1024, "they do not read: {most}");
    ensure!(most < SESSIONS as u64 * 256 * 1024, "{most} bytes are held for {SESSIONS} sessions");
    // Nothing is lost: a client that starts to read gets every answer, in order.
    turn.send(true)?;
    while let Some(done) = talks.join_next().await {
        done??;
    }
    ensure!(closed(&node.samples().await?, "slow_consumer") == 0);
    Ok(())
}

/// What a crowd needed is given back to the system, and not only kept for the next crowd.
#[tokio::test]
async fn the_memory_of_three_crowds_goes_back_to_the_system() -> Result<()> {
    const READERS: usize = 500;
    const QUEUED: u64 = 100 * MIB;
    /// What the allocator may keep, in caches of threads and for its own books; about 4 MiB, however large the crowds.
    const KEPT: u64 = 6 * MIB;
    let redis = RedisServer::start().await?;
    let node = Builder::new().set("broker.url", &redis.url()).set("limits.memory", "1GiB").start().await?;
    let mut backend = Backend::connect(&redis).await?;
    let payload = vec![b'x'; 16 * 1024];
    let start = node.resident_bytes()?;
    for crowd in 1..=3 {
        let readers = stalled(&node, "room", READERS).await?;
        while node.samples().await?.sum("tidegate_outbound_bytes", &[]) < QUEUED {
            // A few at a time: an answer of Redis that takes long is an error.
            for first in (0..READERS).step_by(50) {
                backend.publish("room", first..first + 50, &payload).await?;
            }
        }
        let most = node.resident_bytes()?;
        ensure!(most > start + QUEUED, "crowd {crowd}: {start} bytes resident at the start, {most} now");
        drop(readers);
        node.until_samples("the crowd is gone", |samples| samples.sum("tidegate_sockets", &[]) == 0).await?;
    }
    let left = eventually("the memory is given back", async || {
        let now = node.resident_bytes().map_err(|error| format!("{error:#}"))?;
        if now <= start + KEPT { Ok(now) } else { Err(format!("{now} bytes resident, {start} at the start")) }
    })
    .await?;
    println!("{} KiB resident at the start, {} KiB after three crowds", start / 1024, left / 1024);
    node.ensure_sound()
}

//! A hundred thousand in sequence: junk, and sessions. Nothing of them remains.
//!
//! `TIDEGATE_ENDURANCE` sets how many of each; the default keeps the whole suite quick.

use std::{ops::Range, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tidegate_tests::{
    eventually::eventually,
    http::Request,
    node::{Builder, Node},
    raw::{Frame, RawSocket, start},
    redis_server::RedisServer,
    token::anywhere,
    witness::Witness,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// The default number.
const COUNT: usize = 20_000;
/// How many come first, as a warm-up, so that permanent allocations exist before anything is compared.
const WARM_UP: usize = 5_000;
/// How much memory may grow after the warm-up: the allocator's slack, far below a hundred bytes for each
/// connection.
const SLACK: u64 = 6 << 20;
/// Concurrent connections.
const AT_ONCE: usize = 64;

fn count() -> Result<usize> {
    #[expect(clippy::disallowed_methods, reason = "a test's own setting; no node reads it")]
    let given = std::env::var("TIDEGATE_ENDURANCE");
    given.map_or(Ok(COUNT), |count| count.parse().context("TIDEGATE_ENDURANCE"))
}

#[tokio::test]
async fn junk_connections_leave_nothing_behind() -> Result<()> {
    let node = Builder::new().set("public.header_timeout", "200ms").start().await?;
    let token = anywhere("alice");
    endure("junk connections", &node, WARM_UP, count()?, |numbers| junk(&node, &token, numbers)).await?;
    node.ensure_sound()
}

#[tokio::test]
async fn sessions_that_came_and_went_leave_nothing_behind() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Builder::new().set("broker.url", &redis.url()).set("broker.subscribers", "1").start().await?;
    // After its first canary, the node has all its connections to Redis.
    node.until_samples("a canary", |samples| samples.sum("tidegate_broker_canary_seconds_count", &[]) > 0)
        .await?;
    let token = anywhere("alice");
    let opened = node.samples().await?.sum("tidegate_connections_opened_total", &[]);
    let total = count()?;
    endure("sessions", &node, WARM_UP, total, |numbers| sessions(&node, &token, numbers)).await?;
    let opened = node.samples().await?.sum("tidegate_connections_opened_total", &[]) - opened;
    // Theirs, and the witness's.
    ensure!(opened == (WARM_UP + total) as u64 + 1, "{opened} sessions were opened");
    // In Redis as well; the witness's room stays for a moment.
    eventually("no topic is left", async || {
        let topics =
            redis.cli(&["PUBSUB", "CHANNELS", "room:*"], b"").await.map_err(|error| format!("{error:#}"))?;
        let topics = String::from_utf8_lossy(&topics).trim().to_owned();
        if topics.is_empty() { Ok(()) } else { Err(topics) }
    })
    .await?;
    node.ensure_sound()
}

#[expect(clippy::print_stdout, reason = "--nocapture shows the figures")]
/// Runs a warm-up and then two halves, and compares what the node holds after each.
async fn endure<F: Future<Output = Result<()>>>(
    what: &str,
    node: &Node,
    warm_up: usize,
    total: usize,
    come_and_go: impl Fn(Range<usize>) -> F,
) -> Result<()> {
    let witness = Witness::of(node).await?;
    let before = node.levels_of(1).await?;
    let mut memory = vec![node.resident_bytes()?];
    let mut done = 0;
    for part in [warm_up, total / 2, total - total / 2] {
        come_and_go(done..done + part).await?;
        done += part;
        node.until_levels(&before).await?;
        memory.push(node.resident_bytes()?);
    }
    let kib: Vec<_> = memory.iter().map(|bytes| bytes / 1024).collect();
    println!("{warm_up} and {total} {what}: {before:?} before and after; resident KiB {kib:?}");
    let [_, warm, half, end] = memory.as_slice() else { bail!("four looks") };
    ensure!(*half <= warm + SLACK && *end <= warm + SLACK, "memory grew: {kib:?} KiB");
    ensure!(witness.finish().await? > 0);
    Ok(())
}

async fn junk(node: &Node, token: &str, numbers: Range<usize>) -> Result<()> {
    let get = Request::get(&format!("/rooms/lobby?token={token}")).bytes(node.public);
    let upgrade = Request::upgrade(&format!("/rooms/lobby?token={token}")).bytes(node.public);
    let refused = Request::upgrade("/rooms/lobby?token=nonsense").bytes(node.public);
    let post = Request::post("/rooms/lobby", "text/plain", vec![b'x'; 2000]).bytes(node.public);
    let bad_frame = [&upgrade[..], &[0xf3, 0, 1, 2]].concat();
    let command =
        [&Request::upgrade("/connection/websocket").bytes(node.public)[..], &Frame::text("nonsense").bytes()]
            .concat();
    let tls: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    let kinds: [&[u8]; 12] = [
        b"",
        b"G",
        b"\0\0\0\0\r\n\r\n",
        tls,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n",
        start(&get, get.len() / 2),
        start(&upgrade, upgrade.len() - 1),
        &refused,
        start(&post, post.len() - 1000),
        &bad_frame,
        &command,
    ];
    let kinds = &kinds;
    stream::iter(numbers.zip(kinds.iter().cycle()))
        .map(|(n, bytes)| async move {
            let mut stream =
                TcpStream::connect(node.public).await.with_context(|| format!("connection {n}"))?;
            // The node may have closed already.
            drop(stream.write_all(bytes).await);
            match n / kinds.len() % 3 {
                0 => {}
                1 => socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?,
                _ => {
                    drop(stream.shutdown().await);
                    let mut answer = Vec::new();
                    drop(timeout(tidegate_tests::PATIENCE, stream.read_to_end(&mut answer)).await?);
                }
            }
            Ok(())
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

async fn sessions(node: &Node, token: &str, numbers: Range<usize>) -> Result<()> {
    stream::iter(numbers)
        .map(|n| async move { session(node, token, n).await.with_context(|| format!("session {n}")) })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

/// One session: the protocols take turns, in its own room or in a shared one, ending with or without a close.
async fn session(node: &Node, token: &str, n: usize) -> Result<()> {
    let room = if n.is_multiple_of(2) { "lobby".to_owned() } else { format!("room-{n}") };
    let politely = (n / 6).is_multiple_of(2);
    let target = format!("/rooms/{room}?token={token}");
    let goodbye = Frame { first: 0x88, ..Frame::text(1000_u16.to_be_bytes()) };
    match n / 2 % 3 {
        0 => {
            let mut socket = RawSocket::connect(node.public, &target).await?;
            if politely {
                socket.send(&goodbye).await?;
                ensure!(socket.close_code().await? == Some(1000));
            }
        }
        1 => {
            let mut socket = RawSocket::connect(node.public, "/connection/websocket").await?;
            let connect = format!(r#"{{"id":1,"connect":{{"token":"{token}"}}}}"#);
            let subscribe = format!(r#"{{"id":2,"subscribe":{{"channel":"{room}"}}}}"#);
            socket.send(&Frame::text(format!("{connect}\n{subscribe}"))).await?;
            for _ in 0..2 {
                let reply = socket.receive().await?.context("a reply")?;
                ensure!(!String::from_utf8_lossy(&reply.payload).contains("error"), "{reply:?}");
            }
            if politely {
                socket.send(&goodbye).await?;
                ensure!(socket.close_code().await? == Some(1000));
            }
        }
        _ => {
            let request = Request::get(&target).header("Accept", "text/event-stream");
            let mut incoming = request.open(node.public).await?;
            ensure!(incoming.status == 200, "{}", incoming.status);
            if politely {
                incoming.chunk().await?.context("the preamble")?;
            }
        }
    }
    Ok(())
}

//! Junk of every kind against every endpoint, beside a client that counts: a clear answer, no panic, and nothing left
//! behind.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::{
    StreamExt as _, TryStreamExt as _,
    future::try_join_all,
    stream::{self},
};
use tidegate_tests::{
    client::Client,
    fault_proxy::{Direction, FaultProxy, Flow, Target, Which},
    http::Request,
    journal::Payload,
    node::{Builder, Node},
    raw::{Frame, RawSocket, statuses, talk},
    samples::Samples,
    token::anywhere,
    witness::Witness,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::timeout,
};

use crate::stage::payloads;

/// The pause between two bytes of a slow client. It shapes the client's behaviour; no conclusion depends on it.
const TRICKLE: Duration = Duration::from_millis(10);
/// Concurrent connections.
const AT_ONCE: usize = 64;

/// The first bytes of other protocols, and of no protocol at all.
fn garbage() -> Vec<(&'static str, Vec<u8>)> {
    let hello = b"\x16\x03\x01\x00\x2f\x01\x00\x00\x2b\x03\x03";
    let head = |line: &str| format!("GET / HTTP/1.1\r\nHost: x\r\n{line}\r\n\r\n").into_bytes();
    vec![
        ("a TLS hello", [&hello[..], &[7; 36]].concat()),
        ("HTTP/2 with prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\x04\0\0\0\0\0".to_vec()),
        ("a PROXY line", b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("a binary PROXY header", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec()),
        ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
        ("SMTP", b"EHLO example.org\r\n".to_vec()),
        ("Redis", b"*1\r\n$4\r\nPING\r\n".to_vec()),
        ("zeroes", vec![0; 1000]),
        ("random bytes", (0..5000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).collect()),
        ("a WebSocket frame", Frame::text("hello").bytes()),
        ("no version", b"GET /\r\n\r\n".to_vec()),
        ("an unknown version", b"GET / HTTP/3.0\r\n\r\n".to_vec()),
        ("two blanks", b"GET  / HTTP/1.1\r\n\r\n".to_vec()),
        ("a name without a value", head("Header")),
        ("a control character", head("X: a\x01b")),
        ("a path of a mebibyte", format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(1 << 20)).into_bytes()),
        (
            "a path of 70,000 bytes",
            format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(70_000)).into_bytes(),
        ),
        ("a header of a mebibyte", head(&format!("X: {}", "a".repeat(1 << 20)))),
        ("10,000 headers", head(&"X: y\r\n".repeat(10_000))),
        ("101 short headers", head(&vec!["X: y"; 100].join("\r\n"))),
        ("a method of 100,000 letters", format!("{} / HTTP/1.1\r\n\r\n", "G".repeat(100_000)).into_bytes()),
        ("a token of a mebibyte", head(&format!("Authorization: Bearer {}", "a".repeat(1 << 20)))),
    ]
}

#[tokio::test]
async fn other_protocols_are_refused_or_disconnected() -> Result<()> {
    let node = Builder::new().set("public.header_timeout", "300ms").start().await?;
    let witness = Witness::of(&node).await?;
    let before = node.levels_of(1).await?;
    let memory = node.resident_bytes()?;
    for (what, bytes) in garbage() {
        let said = talk(node.public, &bytes).await.context(what)?;
        let found = statuses(&said).context(what)?;
        // Closing with unread input resets the connection, and a reset can overtake the answer.
        let told = matches!(found.as_slice(), [] | [400 | 404 | 414 | 431]);
        ensure!(told, "{what}: {found:?}");
    }
    let grown = node.resident_bytes()?.saturating_sub(memory);
    ensure!(grown < 16 << 20, "{grown} bytes for junk");
    node.until_levels(&before).await?;
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

/// A client may disappear after any byte.
#[tokio::test]
async fn a_connection_cut_at_any_byte_leaves_nothing() -> Result<()> {
    let node = Builder::new().start().await?;
    let token = anywhere("alice");
    let witness = Witness::of(&node).await?;
    let listener = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let before = node.levels_of(2).await?;

    let target = format!("/rooms/lobby?token={token}");
    let handshake = Request::upgrade(&target).bytes(node.public);
    let stream = Request::get(&target).header("Accept", "text/event-stream").bytes(node.public);
    let post = Request::post(&target, "text/plain", *b"cut").bytes(node.public);
    let frame = Frame::text("cut").bytes();
    let cuts = |bytes: &[u8]| -> Vec<Vec<u8>> { (0..bytes.len()).map(|n| bytes[..n].to_vec()).collect() };
    let mut connections = [cuts(&handshake), cuts(&stream), cuts(&post)].concat();
    connections.extend([handshake.clone(), stream]);
    connections.extend(cuts(&frame).iter().map(|part| [&handshake[..], part].concat()));
    let count = connections.len();
    stream::iter(connections.into_iter().enumerate())
        .map(|(n, bytes)| {
            let address = node.public;
            async move {
                let mut stream = TcpStream::connect(address).await?;
                stream.write_all(&bytes).await?;
                match n % 3 {
                    // A full close, a reset, and a half-close.
                    0 => {}
                    1 => socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?,
                    _ => {
                        stream.shutdown().await?;
                        let mut answer = Vec::new();
                        drop(timeout(tidegate_tests::PATIENCE, stream.read_to_end(&mut answer)).await?);
                    }
                }
                anyhow::Ok(())
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await?;
    node.until_levels(&before).await?;
    node.post("lobby", &token, "text/plain", b"after").await?;
    ensure!(payloads(&listener.heard(1).await?) == [Payload::text("after")], "a cut message was published");
    ensure!(witness.finish().await? > 0);
    println!("{count} connections were cut");

    // Input that arrives byte by byte, but completely, is served.
    let mut slow = TcpStream::connect(node.public).await?;
    slow.set_nodelay(true)?;
    for byte in [&handshake[..], &frame].concat() {
        slow.write_all(&[byte]).await?;
    }
    listener.hears(&Payload::text("cut")).await?;
    node.ensure_sound()
}

/// Heads and bodies that arrive byte by byte, and never completely.
#[tokio::test]
async fn slow_requests_are_cut_off_in_time() -> Result<()> {
    const EACH: usize = 100;
    let node = Builder::new()
        .set("public.header_timeout", "500ms")
        .set("public.body_timeout", "500ms")
        .start()
        .await?;
    let witness = Witness::of(&node).await?;
    let before = node.levels_of(1).await?;
    // After each start, the letter x follows, again and again.
    let starts = ["G", "GE", "GET /rooms/", "GET / HTTP/1.1\r\nHost: ", "GET / HTTP/1.1\r\nHost: x\r\nX"];
    let body = format!(
        "POST /rooms/lobby HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: 100000\r\n\r\n",
        anywhere("alice")
    );
    let slow = |start: Vec<u8>| trickle(&node, start);
    let heads = try_join_all(starts.iter().cycle().take(EACH).map(|start| slow(start.as_bytes().to_vec())));
    let bodies = try_join_all((0..EACH).map(|_| slow(body.clone().into_bytes())));
    let (heads, bodies) = tokio::try_join!(heads, bodies)?;
    ensure!(heads.iter().all(Vec::is_empty), "a head that does not come is closed without an answer");
    for said in bodies {
        ensure!(statuses(&said)? == [408], "{}", String::from_utf8_lossy(&said));
    }
    let refused = |samples: &tidegate_tests::samples::Samples, reason: &str| {
        samples.sum("tidegate_refusals_total", &[&format!("reason=\"{reason}\"")])
    };
    let samples = node.samples().await?;
    ensure!(refused(&samples, "header_timeout") == EACH as u64, "{samples:?}");
    ensure!(refused(&samples, "body_timeout") == EACH as u64, "{samples:?}");
    node.until_levels(&before).await?;
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

/// Sends a start, and then byte after byte until the node closes. Returns the node's data.
async fn trickle(node: &Node, start: Vec<u8>) -> Result<Vec<u8>> {
    let stream = TcpStream::connect(node.public).await?;
    let (mut reading, mut writing) = stream.into_split();
    let mut said = Vec::new();
    let sending = async {
        if writing.write_all(&start).await.is_err() {
            return;
        }
        while writing.write_all(b"x").await.is_ok() {
            tokio::time::sleep(TRICKLE).await;
        }
    };
    let ended = async {
        tokio::select! {
            read = reading.read_to_end(&mut said) => drop(read),
            // The node has closed; read what it sent before.
            () = sending => drop(reading.read_to_end(&mut said).await),
        }
    };
    timeout(tidegate_tests::PATIENCE, ended).await.context("it is closed")?;
    Ok(said)
}

/// The node does not read more requests of a client that never reads answers than the sockets hold.
#[tokio::test]
async fn unread_answers_do_not_accumulate() -> Result<()> {
    const CLIENTS: usize = 8;
    let node = Builder::new().start().await?;
    let witness = Witness::of(&node).await?;
    let before = node.levels_of(1).await?;
    let memory = node.resident_bytes()?;
    let requests = "GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2000);
    let mut silent = Vec::new();
    for _ in 0..CLIENTS {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(1024)?;
        let mut stream = socket.connect(node.public).await?;
        // As long as the node reads: it stops when its answers are not read.
        while timeout(Duration::from_millis(500), stream.write_all(requests.as_bytes()))
            .await
            .is_ok_and(|sent| sent.is_ok())
        {}
        silent.push(stream);
    }
    let grown = node.resident_bytes()?.saturating_sub(memory);
    ensure!(grown < 8 << 20, "{grown} bytes for {CLIENTS} clients that do not read");
    drop(silent);
    node.until_levels(&before).await?;
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

/// Pings are answered, and a flood of them costs only its sender.
#[tokio::test]
async fn a_flood_of_pings_is_bounded() -> Result<()> {
    const PING: [u8; 6] = [0x89, 0x80, 1, 2, 3, 4];
    const CLIENTS: u64 = 8;
    let node = Builder::new().start().await?;
    let witness = Witness::of(&node).await?;
    let before = node.levels_of(1).await?;
    let memory = node.resident_bytes()?;
    let target = format!("/rooms/lobby?token={}", anywhere("alice"));
    let flood = PING.repeat((1 << 20) / PING.len());
    let mut flooding = JoinSet::new();
    for _ in 0..CLIENTS {
        let mut socket = RawSocket::connect_narrow(node.public, &target).await?;
        let flood = flood.clone();
        flooding.spawn(async move { while socket.send_bytes(&flood).await.is_ok() {} });
    }
    // The node stops reading from a client that does not read the answers: at most 64 KiB of them wait.
    let held = |samples: &Samples| samples.sum("tidegate_memory_held_bytes", &[]);
    node.until_samples("answers wait for each", |samples| held(samples) >= CLIENTS * 48 * 1024).await?;
    for _ in 0..100 {
        let samples = node.samples().await?;
        ensure!(held(&samples) < CLIENTS * 256 * 1024, "{} bytes are held", held(&samples));
        ensure!(samples.sum("tidegate_slow_consumers_total", &[]) == 0, "no session is closed for it");
    }
    let grown = node.resident_bytes()?.saturating_sub(memory);
    ensure!(grown < 24 << 20, "{grown} bytes for {CLIENTS} clients");
    flooding.shutdown().await;
    node.until_levels(&before).await?;

    // A client that reads gets an answer to every ping.
    let mut reader = RawSocket::connect(node.public, &target).await?;
    for _ in 0..100 {
        reader.send_bytes(&PING.repeat(100)).await?;
        for _ in 0..100 {
            let pong = reader.receive().await?.context("a pong")?;
            ensure!(pong.first == 0x8a && pong.payload.is_empty(), "{pong:?}");
        }
    }
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

/// A client that never pauses gets its share of a thread, and no more.
#[tokio::test]
async fn a_flood_does_not_starve_other_clients() -> Result<()> {
    const PONG: [u8; 6] = [0x8a, 0x80, 1, 2, 3, 4];
    const NUMBERS: usize = 12;
    let node = Builder::new().set("shards", "1").start().await?;
    let mut witness = Witness::of(&node).await?;
    let before = node.levels_of(1).await?;
    let target = format!("/rooms/lobby?token={}", anywhere("alice"));
    let flood = PONG.repeat((1 << 20) / PONG.len());
    let mut flooding = JoinSet::new();
    for _ in 0..2 {
        let mut socket = RawSocket::connect(node.public, &target).await?;
        let flood = flood.clone();
        flooding.spawn(async move { while socket.send_bytes(&flood).await.is_ok() {} });
    }
    its_share(&node, &mut witness, NUMBERS).await.context("frames")?;
    flooding.shutdown().await;
    node.until_levels(&before).await?;

    // An answer that is not a refusal: a refusal ends its connection.
    let request = Request::new("OPTIONS", "/rooms/lobby").header("Connection", "keep-alive");
    let request = request.header("X", &"x".repeat(8000));
    let flood = request.bytes(node.public).repeat(100);
    for _ in 0..2 {
        let (mut reading, mut writing) = TcpStream::connect(node.public).await?.into_split();
        let flood = flood.clone();
        flooding.spawn(async move { while writing.write_all(&flood).await.is_ok() {} });
        flooding.spawn(async move { drop(tokio::io::copy(&mut reading, &mut tokio::io::sink()).await) });
    }
    its_share(&node, &mut witness, NUMBERS).await.context("requests")?;
    flooding.shutdown().await;
    node.until_levels(&before).await?;
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

/// Fails unless the witness keeps counting while a flood is read.
async fn its_share(node: &Node, witness: &mut Witness, count: usize) -> Result<()> {
    /// Bytes of the flood that the node may read while another client publishes a number and receives it. A turn reads
    /// a quarter of a mebibyte from each socket at most, and a number needs a few turns.
    const SHARE: u64 = 8 << 20;
    let read =
        async || anyhow::Ok(node.samples().await?.sum("tidegate_network_bytes_total", &["direction=\"in\""]));
    let began = read().await?;
    node.until_samples("a flood", |samples| {
        samples.sum("tidegate_network_bytes_total", &["direction=\"in\""]) > began + (4 << 20)
    })
    .await?;
    let (from, numbers) = (read().await?, witness.heard());
    witness.until(numbers + count).await?;
    let share = (read().await? - from) / count as u64;
    ensure!(share < SHARE, "{share} bytes of a flood were read for each number of a neighbour");
    Ok(())
}

/// Fragments without an end hit the limit of a message, and empty ones cost nothing.
#[tokio::test]
async fn endless_fragments_reach_the_limit() -> Result<()> {
    let node = Builder::new().set("limits.message_size", "4KiB").start().await?;
    let token = anywhere("alice");
    let witness = Witness::of(&node).await?;
    let listener = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let before = node.levels_of(2).await?;
    let target = format!("/rooms/lobby?token={token}&echo=false");
    let piece = |first: u8, payload: &[u8]| Frame { first, ..Frame::text(payload) }.bytes();

    let mut endless = RawSocket::connect(node.public, &target).await?;
    endless.send_bytes(&piece(0x01, b"x")).await?;
    // One byte each; beyond the limit the node stops reading, or closes before it has read everything.
    let sent = endless.send_bytes(&piece(0x00, b"x").repeat(20_000)).await;
    ensure!(endless.close_code().await? == Some(1009), "{sent:?}");
    drop(endless);

    let mut empty = RawSocket::connect(node.public, &target).await?;
    empty.send_bytes(&piece(0x01, b"")).await?;
    empty.send_bytes(&piece(0x00, b"").repeat(20_000)).await?;
    empty.send_bytes(&piece(0x80, b"whole")).await?;
    listener.hears(&Payload::text("whole")).await?;
    drop(empty);

    // A frame that is announced but does not arrive costs only the memory of its received bytes.
    let memory = node.resident_bytes()?;
    let mut announced = Vec::new();
    for _ in 0..500 {
        let mut socket = RawSocket::connect(node.public, &target).await?;
        socket.send(&Frame { claimed: Some(4096), ..Frame::text("x") }).await?;
        announced.push(socket);
    }
    let grown = node.resident_bytes()?.saturating_sub(memory);
    ensure!(grown < 16 << 20, "{grown} bytes for 500 frames that are announced");
    drop(announced);
    node.until_levels(&before).await?;
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

/// Peers that vanish without a close: nothing of theirs reaches the node, and nothing reaches them.
#[tokio::test]
async fn sessions_of_vanished_peers_are_removed() -> Result<()> {
    const SESSIONS: u64 = 20;
    let node =
        Builder::new().set("heartbeat.interval", "200ms").set("heartbeat.timeout", "1s").start().await?;
    let token = anywhere("alice");
    let witness = Witness::of(&node).await?;
    let before = node.levels_of(1).await?;
    let door = FaultProxy::to(Target::Tcp(node.public)).await?;
    let mut gone = Vec::new();
    for n in 0..SESSIONS {
        gone.push(Client::websocket(&format!("ws://{}/rooms/{n}?token={token}", door.address()), &[]).await?);
    }
    node.until_samples("all there", |samples| samples.sum("tidegate_connections", &[]) == SESSIONS + 1)
        .await?;
    door.set(Which::All, Direction::ToServer, Flow::Blackhole);
    door.set(Which::All, Direction::ToClient, Flow::Blackhole);
    let closed = ["protocol=\"plain\"", "reason=\"heartbeat_timeout\""];
    node.until_samples("vanished ones gone", |samples| {
        samples.sum("tidegate_connections_closed_total", &closed) == SESSIONS
    })
    .await?;
    // The rooms and the sockets, while the peers still hold their ends open.
    node.until_levels(&before).await?;
    drop(gone);
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

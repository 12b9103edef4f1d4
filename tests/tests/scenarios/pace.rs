//! The pace of a drain: never faster than the even share, whatever protocols the sessions use.
//!
//! Clients see a close later than the node makes it and never earlier. So even on a busy machine, the n-th session
//! to be closed has not been closed before the n-th share of the window.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};
use tidegate_tests::{
    PATIENCE,
    http::{Incoming, Request},
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    token::anywhere,
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsConnector;

/// A session of one of the protocols.
enum Member {
    Plain(RawSocket),
    Centrifuge(RawSocket),
    Stream(Incoming),
}

impl Member {
    /// The protocols take turns.
    async fn join(number: usize, node: SocketAddr, token: &str) -> Result<Self> {
        let stream = connect(number, node).await?;
        let target = format!("/rooms/lobby?token={token}");
        Ok(match number % 3 {
            0 => Self::Plain(RawSocket::over(stream, &target).await?),
            1 => {
                let mut socket = RawSocket::over(stream, "/connection/websocket").await?;
                socket.send(&Frame::text(format!(r#"{{"id":1,"connect":{{"token":"{token}"}}}}"#))).await?;
                let reply = socket.receive().await?.context("a reply")?;
                ensure!(reply.payload.starts_with(br#"{"connect""#), "{reply:?}");
                Self::Centrifuge(socket)
            }
            _ => {
                let request = Request::get(&target).header("Accept", "text/event-stream");
                let incoming = request.open_over(stream).await?;
                ensure!(incoming.status == 200, "{}", incoming.status);
                Self::Stream(incoming)
            }
        })
    }

    /// Waits for its end, which must be its protocol's request to reconnect.
    async fn ended(self) -> Result<Instant> {
        match self {
            Self::Plain(mut socket) => ensure!(socket.close_code().await? == Some(1012)),
            Self::Centrifuge(mut socket) => ensure!(socket.close_code().await? == Some(3001)),
            Self::Stream(mut stream) => while timeout(PATIENCE, stream.chunk()).await??.is_some() {},
        }
        Ok(Instant::now())
    }
}

/// From one of several addresses: this test is not about ports or limits per address.
async fn connect(number: usize, node: SocketAddr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    let last = u8::try_from(2 + number % 16)?;
    socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into())?;
    Ok(socket.connect(node).await?)
}

fn node(window: Duration) -> Builder {
    let window = format!("{}ms", window.as_millis());
    Builder::new().set("shards", "2").set("drain.window", &window).set("drain.deadline", "1m")
}

/// Drains this many sessions that connect through `door`, and returns when each was closed, measured from the
/// signal.
async fn leave(mut node: Node, door: SocketAddr, sessions: usize) -> Result<Vec<Duration>> {
    let token = anywhere("alice");
    let mut members = Vec::new();
    for number in 0..sessions + sessions / 2 {
        members.push(Member::join(number, door, &token).await?);
    }
    // Sockets are assigned to the shards in turn. Disconnect half of one shard's now, so that the shards are unequal.
    let mut number = 0;
    members.retain(|_| {
        number += 1;
        number > sessions || number % 2 == 0
    });
    node.until_samples("unequal shards", |samples| {
        samples.sum("tidegate_connections", &[]) == sessions as u64
    })
    .await?;
    ensure!(members.len() == sessions);

    let mut ends = JoinSet::new();
    for member in members {
        ends.spawn(member.ended());
    }
    let began = Instant::now();
    node.terminate()?;
    let mut times = Vec::new();
    while let Some(ended) = ends.join_next().await {
        times.push(ended??.duration_since(began));
    }
    times.sort_unstable();
    ensure!(node.exited().await?.code() == Some(0));
    Ok(times)
}

/// The n-th of the sessions is closed no earlier than its share of the window.
fn ensure_even(times: &[Duration], window: Duration) -> Result<()> {
    for (closed, time) in (0_u32..).zip(times) {
        let share = window * closed / u32::try_from(times.len())?;
        ensure!(*time >= share, "{closed} others were closed after {time:?}, a share for {share:?}");
    }
    Ok(())
}

#[tokio::test]
async fn five_hundred_sessions_of_all_protocols_close_at_an_even_pace() -> Result<()> {
    let window = Duration::from_secs(3);
    let node = node(window).start().await?;
    let door = node.public;
    ensure_even(&leave(node, door, 500).await?, window)
}

#[tokio::test]
async fn with_tls_the_pace_is_the_same() -> Result<()> {
    let window = Duration::from_secs(2);
    let directory = tempfile::tempdir()?;
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()])?;
    let (cert_path, key_path) = (directory.path().join("cert"), directory.path().join("key"));
    fs::write(&cert_path, cert.pem())?;
    fs::write(&key_path, signing_key.serialize_pem())?;
    let node = node(window)
        .set("tls.cert", cert_path.to_str().context("UTF-8")?)
        .set("tls.key", key_path.to_str().context("UTF-8")?);
    let node = node.start().await?;
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone())?;
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (door, _tunnel) = tunnel(node.public, TlsConnector::from(Arc::new(config))).await?;
    ensure_even(&leave(node, door, 300).await?, window)
}

/// A plain-text entrance to a node with TLS, for clients without it.
async fn tunnel(node: SocketAddr, connector: TlsConnector) -> Result<(SocketAddr, JoinSet<Result<()>>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let door = listener.local_addr()?;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (mut client, _) = listener.accept().await?;
            let connector = connector.clone();
            connections.spawn(async move {
                let stream = TcpStream::connect(node).await?;
                let mut stream = connector.connect("localhost".try_into()?, stream).await?;
                copy_bidirectional(&mut client, &mut stream).await?;
                anyhow::Ok(())
            });
        }
    });
    Ok((door, tasks))
}

/// `cargo test -p tidegate-tests --test scenarios ten_thousand -- --ignored --nocapture` prints the rate.
#[tokio::test]
#[ignore = "takes a minute, 15,000 descriptors and a machine of its own"]
async fn ten_thousand_sessions_leave_at_an_even_pace() -> Result<()> {
    let window = Duration::from_secs(20);
    let node = node(window).start().await?;
    let door = node.public;
    let times = leave(node, door, 10_000).await?;
    let last = times.last().context("there were sessions")?;
    println!("{} sessions, drain.window {window:?}, the last closed after {last:.1?}", times.len());
    println!("second  closed");
    for second in 0..=last.as_secs() {
        let closed = times.iter().filter(|time| time.as_secs() == second).count();
        println!("{second:>6}  {closed:>6}  {}", "#".repeat(closed / 10));
    }
    ensure_even(&times, window)
}

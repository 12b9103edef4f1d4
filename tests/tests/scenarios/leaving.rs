//! Draining without harm to any client.

use std::{fs, os::unix::process::ExitStatusExt as _, time::Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::Signal,
};
use tidegate_tests::{
    client::Client,
    eventually::eventually,
    http::{Incoming, Request},
    journal::{End, Payload},
    node::{Builder, Node},
    raw::RawSocket,
    redis_server::RedisServer,
    samples::Samples,
    token::anywhere,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::stage::{Stage, payloads};

const SOCKETS: usize = 150;
const STREAMS: usize = 50;

#[tokio::test]
async fn two_hundred_sessions_are_closed_one_by_one() -> Result<()> {
    let stage = Stage::set_with(|node| node.set("drain.pause", "300ms").set("drain.window", "1s")).await?;
    let Stage { redis: _redis, mut a, b } = stage;
    let token = anywhere("alice");
    let (ws, sse) = (a.ws("lobby", &token, ""), a.url("lobby", &token, ""));
    let sockets = try_join_all((0..SOCKETS).map(|_| Client::websocket(&ws, &[]))).await?;
    let streams = try_join_all((0..STREAMS).map(|_| Client::events(&sse))).await?;
    let elsewhere = Client::websocket(&b.ws("lobby", &token, ""), &[]).await?;

    a.terminate()?;
    let draining = a.until_probe("/readyz", 503).await?;
    ensure!(draining.text().contains("draining"), "{draining:?}");
    ensure!(a.ask_ops("/livez").await?.status == 200);
    b.post("lobby", &token, "text/plain", b"one last word").await?;
    let last = Payload::text("one last word");
    ensure!(payloads(&elsewhere.heard(1).await?) == std::slice::from_ref(&last));

    let began = Instant::now();
    let mut ends = Vec::new();
    for socket in &sockets {
        let end = socket.ended().await?;
        ensure!(matches!(end.code(), Some(1001 | 1012)), "{end:?}");
        ends.push(end);
    }
    for stream in &streams {
        ensure!(matches!(stream.ended().await?, End::Closed { .. }), "a stream ends in order");
        ensure!(stream.now().retries.len() == 2, "a stream gets a new reconnection time");
    }
    ensure!(began.elapsed().as_millis() > 300, "closes are spread, not all at once: {:?}", began.elapsed());
    for client in sockets.iter().chain(&streams) {
        ensure!(
            client.now().payloads() == [last.clone()],
            "no client loses messages sent before the close began"
        );
    }
    let mut times: Vec<_> =
        streams.iter().filter_map(|stream| stream.now().retries.last().copied()).collect();
    times.sort_unstable();
    times.dedup();
    ensure!(times.len() > STREAMS / 2, "coming back is spread: {times:?}");

    ensure!(a.exited().await?.code() == Some(0));
    ensure!(TcpStream::connect(a.public).await.is_err());
    // The other node is not affected.
    b.post("lobby", &token, "text/plain", b"alone now").await?;
    ensure!(payloads(&elsewhere.heard(2).await?) == [last, Payload::text("alone now")]);
    Ok(())
}

/// A shard whose sessions have all ended still reads its rooms from Redis for the sessions of other shards.
#[tokio::test]
async fn a_shard_without_sessions_still_reads_redis_for_the_others() -> Result<()> {
    let stage = Stage::set_with(|node| {
        node.set("shards", "2").set("broker.subscribers", "2").set("drain.window", "2s")
    })
    .await?;
    let Stage { redis: _redis, mut a, b } = stage;
    let token = anywhere("alice");
    let (on_a, on_b) = (a.ws("lobby", &token, ""), b.ws("lobby", &token, ""));
    // Sockets are assigned to the shards in turn, and the shard of a room's first member reads the room.
    let mut members = Vec::new();
    for _ in 0..40 {
        members.push(Client::websocket(&on_a, &[]).await?);
    }
    let mut number = 0;
    members.retain(|_| {
        number += 1;
        number % 2 == 0
    });
    a.until_samples("one shard has no session", |samples| {
        samples.sum("tidegate_connections", &[]) == members.len() as u64
    })
    .await?;

    let (speaker, witness) = (Client::websocket(&on_b, &[]).await?, Client::websocket(&on_b, &[]).await?);
    let all_have_left = try_join_all(members.iter().map(|member| member.ended()));
    tokio::pin!(all_have_left);
    let mut sent = Vec::new();
    a.terminate()?;
    let ends = loop {
        let next = Payload::text(sent.len().to_string());
        sent.push(next.clone());
        tokio::select! {
            ends = &mut all_have_left => break ends?,
            spoken = async { speaker.send(next.clone()).await.and(witness.hears(&next).await) } => drop(spoken?),
        }
    };
    ensure!(ends.iter().all(|end| matches!(end.code(), Some(1001 | 1012))), "{ends:?}");
    let mut counts = Vec::new();
    for member in &members {
        let heard = member.now().payloads();
        ensure!(sent.starts_with(&heard), "each hears everything until its own close: {heard:?}");
        counts.push(heard.len());
    }
    counts.sort_unstable();
    ensure!(
        counts.first() != counts.last(),
        "publications are under way while sessions are closed: {counts:?}"
    );
    ensure!(a.exited().await?.code() == Some(0));
    Ok(())
}

/// A message that a client sent before it received the close is published.
#[tokio::test]
async fn messages_sent_before_the_close_are_published() -> Result<()> {
    let Stage { redis: _redis, mut a, b } = Stage::set_with(|node| node.set("drain.pause", "500ms")).await?;
    let token = anywhere("alice");
    let speaker = Client::websocket(&a.ws("lobby", &token, "echo=false"), &[]).await?;
    let listener = Client::websocket(&b.ws("lobby", &token, ""), &[]).await?;
    a.terminate()?;
    a.until_probe("/readyz", 503).await?;
    let sent: Vec<_> = (0..200).map(|n| Payload::text(n.to_string())).collect();
    for payload in &sent {
        speaker.send(payload.clone()).await?;
    }
    ensure!(payloads(&listener.heard(sent.len()).await?) == sent);
    speaker.ended().await?;
    ensure!(a.exited().await?.code() == Some(0));
    Ok(())
}

#[tokio::test]
async fn a_node_that_is_process_one_drains_too() -> Result<()> {
    let mut node = Builder::new().as_pid_one().start().await?;
    let client = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    node.terminate()?;
    ensure!(matches!(client.ended().await?.code(), Some(1001 | 1012)));
    ensure!(node.exited().await?.code() == Some(0));
    Ok(())
}

#[tokio::test]
async fn a_second_signal_ends_at_once() -> Result<()> {
    let mut node = Builder::new().set("drain.window", "1h").set("drain.deadline", "2h").start().await?;
    let clients = try_join_all(
        (0..20).map(|_| async { Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await }),
    )
    .await?;
    node.terminate()?;
    node.until_probe("/readyz", 503).await?;
    node.terminate()?;
    let status = node.exited().await?;
    ensure!(!status.success(), "ended before everybody had left: {status} {:?}", status.signal());
    for client in clients {
        client.ended().await?;
    }
    Ok(())
}

/// Clients that do not answer their close frames delay the drain no longer than the deadline.
#[tokio::test]
async fn a_missed_deadline_is_reported() -> Result<()> {
    let mut node = Builder::new().set("drain.window", "0s").set("drain.deadline", "500ms").start().await?;
    let target = format!("/rooms/lobby?token={}", anywhere("alice"));
    let mut silent = try_join_all((0..3).map(|_| RawSocket::connect(node.public, &target))).await?;
    node.terminate()?;
    ensure!(node.exited().await?.code() == Some(1));
    let output = node.output();
    let told = output.lines().find(|line| line.contains("drain.deadline has passed"));
    ensure!(
        told.is_some_and(|line| line.contains("\"sockets\":3")),
        "the log reports the remaining sockets: {told:?}"
    );
    for socket in &mut silent {
        ensure!(socket.close_code().await? == Some(1012), "a client that reads has been told anyway");
    }
    Ok(())
}

/// During the pause load balancers still send clients: all are served, including new sessions.
#[tokio::test]
async fn the_pause_serves_all_clients_and_ends_with_a_second_signal() -> Result<()> {
    let mut node = Builder::new().set("drain.pause", "1h").set("drain.deadline", "2h").start().await?;
    let token = anywhere("alice");
    let client = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    node.terminate()?;
    node.until_probe("/readyz", 503).await?;
    let newcomer = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let stream = Client::events(&node.url("lobby", &token, "")).await?;
    let sdk = format!("ws://{}/connection/websocket", node.public);
    let sdk = Client::node_centrifuge(&sdk, "lobby", &[&token]).await?;
    node.post("lobby", &token, "text/plain", b"posted").await?;
    client.send(Payload::text("served")).await?;
    for client in [&client, &newcomer, &stream] {
        ensure!(payloads(&client.heard(2).await?) == [Payload::text("posted"), Payload::text("served")]);
        ensure!(client.now().end.is_none(), "the pause closes no session");
    }
    ensure!(sdk.heard(2).await?.len() == 2);
    ensure!(node.samples().await?.sum("tidegate_refusals_total", &[]) == 0);
    node.signal(Signal::INT)?;
    ensure!(node.exited().await?.code() == Some(1));
    client.ended().await?;
    Ok(())
}

#[tokio::test]
async fn ctrl_c_drains_as_well() -> Result<()> {
    let mut node = Builder::new().start().await?;
    let client = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    node.signal(Signal::INT)?;
    ensure!(client.ended().await?.code() == Some(1012));
    ensure!(node.exited().await?.code() == Some(0));
    Ok(())
}

#[tokio::test]
async fn a_node_that_never_reached_its_broker_exits_at_once() -> Result<()> {
    let absent = RedisServer::builder().absent()?;
    let mut node = Builder::new().set("broker.url", &absent.url()).launch().await?;
    node.until_probe("/readyz", 503).await?;
    node.terminate()?;
    ensure!(node.exited().await?.code() == Some(0));
    Ok(())
}

/// Sessions are closed anyway; their last publications are abandoned, not waited for.
#[tokio::test]
async fn a_broker_that_is_down_does_not_delay_the_drain() -> Result<()> {
    let mut stage =
        Stage::set_with(|node| node.set("drain.window", "200ms").set("broker.publish_timeout", "1s")).await?;
    let token = anywhere("alice");
    let client = Client::websocket(&stage.a.ws("lobby", &token, ""), &[]).await?;
    let stream = Client::events(&stage.a.url("lobby", &token, "")).await?;
    stage.redis.kill().await?;
    eventually("the node misses its broker", async || match stage.a.ask_ops("/readyz").await {
        Ok(response) if response.text().contains("degraded") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    client.send(Payload::text("into the void")).await?;
    stage.a.terminate()?;
    // Closed because its publication failed, or because the node drains: told to reconnect either way.
    let end = client.ended().await?;
    ensure!(matches!(end.code(), Some(1012 | 1013)), "{end:?}");
    ensure!(matches!(stream.ended().await?, End::Closed { .. }));
    ensure!(stage.a.exited().await?.code() == Some(0));
    Ok(())
}

/// The deadline also applies to what the broker still has to send.
#[tokio::test]
async fn a_frozen_broker_is_abandoned_at_the_deadline() -> Result<()> {
    let mut stage = Stage::set_with(|node| {
        node.set("drain.deadline", "1s")
            .set("broker.publish_timeout", "1h")
            .set("broker.canary_timeout", "1h")
    })
    .await?;
    let token = anywhere("alice");
    let client = Client::websocket(&stage.a.ws("lobby", &token, ""), &[]).await?;
    stage.redis.freeze()?;
    client.send(Payload::text("into the void")).await?;
    stage.a.until_samples("a message", |samples| messages_in(samples) == 1).await?;
    stage.a.terminate()?;
    ensure!(client.ended().await?.code() == Some(1012));
    ensure!(stage.a.exited().await?.code() == Some(1));
    ensure!(stage.a.output().contains("what the broker has not sent is given up"));
    stage.redis.thaw()
}

fn messages_in(samples: &Samples) -> u64 {
    samples.sum("tidegate_messages_total", &["direction=\"in\""])
}

/// A client that does not read cannot read its close frame either: it is cut off after a short wait.
#[tokio::test]
async fn a_client_that_reads_nothing_does_not_delay_the_drain() -> Result<()> {
    let mut node = Builder::new().set("limits.outbound", "8MiB").start().await?;
    let token = anywhere("alice");
    let target = format!("/rooms/lobby?token={token}");
    let stalled = RawSocket::connect_narrow(node.public, &target).await?;
    let reading = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let mut sent = 0;
    while node.samples().await?.sum("tidegate_outbound_bytes", &[]) == 0 {
        node.post("lobby", &token, "text/plain", &vec![b'x'; 60_000]).await?;
        sent += 1;
    }
    reading.heard(sent).await?;
    node.terminate()?;
    ensure!(reading.ended().await?.code() == Some(1012));
    ensure!(node.exited().await?.code() == Some(0));
    drop(stalled);
    Ok(())
}

/// A file that blocks its reader blocks the reload, and nothing else.
#[tokio::test]
async fn a_reload_in_progress_does_not_delay_the_drain() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("tidegate.toml");
    fs::write(&path, "")?;
    let mut node = Builder::new().config_file(&path).start().await?;
    let client = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    // A pipe without a writer: reading it like a file would never end.
    fs::remove_file(&path)?;
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    node.hang_up()?;
    node.terminate()?;
    ensure!(client.ended().await?.code() == Some(1012));
    ensure!(node.exited().await?.code() == Some(0));
    Ok(())
}

#[tokio::test]
async fn a_reload_does_not_disturb_a_draining_node() -> Result<()> {
    let mut node = Builder::new().set("drain.pause", "300ms").start().await?;
    let client = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    node.terminate()?;
    node.until_probe("/readyz", 503).await?;
    node.hang_up()?;
    ensure!(client.ended().await?.code() == Some(1012));
    ensure!(node.exited().await?.code() == Some(0));
    Ok(())
}

/// Half a TLS handshake, half a head and an idle socket are not sessions: the drain does not wait for them.
#[tokio::test]
async fn incomplete_connections_do_not_delay_the_drain() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()])?;
    let (cert_path, key_path) = (directory.path().join("cert"), directory.path().join("key"));
    fs::write(&cert_path, cert.pem())?;
    fs::write(&key_path, signing_key.serialize_pem())?;
    let plain = Builder::new().set("public.header_timeout", "1h");
    let tls = plain
        .clone()
        .set("tls.cert", cert_path.to_str().context("UTF-8")?)
        .set("tls.key", key_path.to_str().context("UTF-8")?);
    // The beginning of a ClientHello: a record of 512 bytes, of which six are sent.
    for (builder, beginning) in [
        (&tls, &[0x16, 3, 1, 2, 0, 1][..]),
        (&tls, b""),
        (&plain, b""),
        (&plain, b"GET /rooms/lobby HTTP/1.1\r\nHo"),
    ] {
        let mut node = builder.start().await?;
        let mut stream = TcpStream::connect(node.public).await?;
        stream.write_all(beginning).await?;
        let arrived = beginning.len() as u64;
        node.until_samples("the bytes have been read", |samples| {
            samples.sum("tidegate_sockets", &[]) == 1
                && samples.sum("tidegate_network_bytes_total", &["direction=\"in\""]) >= arrived
        })
        .await?;
        node.terminate()?;
        ensure!(node.exited().await?.code() == Some(0), "{beginning:?}");
        ensure!(!node.output().contains("cutting what is left"), "{beginning:?}");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.ok();
    }
    Ok(())
}

/// Nor does it wait for an endless request on the ops listener.
#[tokio::test]
async fn a_stalled_probe_does_not_delay_the_drain() -> Result<()> {
    let mut node = Builder::new().set("drain.deadline", "2h").start().await?;
    let mut probe = TcpStream::connect(node.ops).await?;
    probe.write_all(b"GET /metrics HTTP/1.1\r\nHo").await?;
    node.terminate()?;
    ensure!(node.exited().await?.code() == Some(0));
    Ok(())
}

/// An upload in progress may finish, and is answered; one that never ends hits its own time-out.
#[tokio::test]
async fn an_upload_is_answered_before_the_node_ends() -> Result<()> {
    let builder = Builder::new().set("public.body_timeout", "2s").set("drain.pause", "100ms");
    for (rest, status) in [("lo", 202), ("", 408)] {
        let mut node = builder.start().await?;
        let mut stream = begin_upload(&node).await?;
        node.terminate()?;
        node.until_probe("/readyz", 503).await?;
        stream.write_all(rest.as_bytes()).await?;
        let answer = Incoming::read(stream).await?;
        ensure!(answer.status == status, "{} instead of {status}", answer.status);
        ensure!(node.exited().await?.code() == Some(0));
    }
    Ok(())
}

/// Three of five bytes of a body; when this returns, the node has asked for them.
async fn begin_upload(node: &Node) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(node.public).await?;
    let head = format!(
        "POST /rooms/lobby HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\
         Expect: 100-continue\r\nAuthorization: Bearer {}\r\n\r\n",
        anywhere("alice")
    );
    stream.write_all(head.as_bytes()).await?;
    let mut asked = [0; 25];
    stream.read_exact(&mut asked).await?;
    ensure!(asked == *b"HTTP/1.1 100 Continue\r\n\r\n", "{}", String::from_utf8_lossy(&asked));
    stream.write_all(b"hel").await?;
    Ok(stream)
}

/// A client that waits for a subscription the broker does not acknowledge is refused, with an answer.
#[tokio::test]
async fn a_session_that_is_still_opening_is_refused() -> Result<()> {
    let mut stage = Stage::set_with(|node| node.set("broker.subscribe_timeout", "2s")).await?;
    stage.redis.freeze()?;
    let request = Request::get("/rooms/lobby").header("Accept", "text/event-stream");
    let request = request.bearer(&anywhere("alice"));
    let terminate = async {
        stage.a.until_samples("a room", |samples| samples.sum("tidegate_rooms", &[]) == 1).await?;
        stage.a.terminate()
    };
    let (response, ()) = tokio::try_join!(request.send(stage.a.public), terminate)?;
    ensure!(response.status == 200 && response.text().contains("\n: tidegate.retry "), "{response:?}");
    ensure!(stage.a.exited().await?.code() == Some(0));
    stage.redis.thaw()
}

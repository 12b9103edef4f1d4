//! How HTTP connections are kept, and how they end: no answer is lost on the way, and no connection is held for ever.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::Client,
    eventually::eventually,
    http::Request,
    journal::Payload,
    node::{Builder, Node},
    raw::statuses,
    tls::{Pair, PairOfFiles},
    token::anywhere,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::stage::{alone, payloads};

/// The body of a client that does not read before it has sent everything.
const UPLOAD: usize = 2 * 1024 * 1024;

/// Sends a head and a long body completely, and only then reads. Neither may fail: a connection that is reset tells
/// the client nothing.
async fn upload(mut stream: impl AsyncRead + AsyncWrite + Unpin, head: &str) -> Result<Vec<u8>> {
    let exchange = async {
        stream.write_all(head.as_bytes()).await.context("send the head")?;
        let piece = vec![b'x'; 16 * 1024];
        for _ in 0..UPLOAD / piece.len() {
            stream.write_all(&piece).await.context("send the body")?;
        }
        stream.flush().await.context("send the rest")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.context("read the answer")?;
        anyhow::Ok(answer)
    };
    timeout(tidegate_tests::PATIENCE, exchange).await?
}

fn refusals(samples: &tidegate_tests::samples::Samples) -> u64 {
    samples.sum("tidegate_refusals_total", &[])
}

/// RFC 9112 §9.6: whichever part answers, a client that is still sending reads the answer.
#[tokio::test]
async fn an_early_answer_reaches_a_client_that_is_still_sending() -> Result<()> {
    let node = Builder::new().set("limits.message_size", "1KiB").start().await?;
    let strict = Builder::new().set("limits.attempts_per_address", "1/h burst 1").start().await?;
    let proxied = Builder::new()
        .set("public.trusted_proxies", "127.0.0.1")
        .set("public.proxy_protocol", "true")
        .start()
        .await?;
    let pair = Pair::new()?;
    let files = PairOfFiles::of(&pair)?;
    let secure = files.node().start().await?;

    let head = |method: &str, path: &str, more: &str| {
        format!("{method} {path} HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {UPLOAD}\r\n\r\n")
    };
    let bearer = format!("Authorization: Bearer {}\r\n", anywhere("alice"));
    let nobody = head("POST", "/rooms/lobby", "");
    for (what, address, head, status) in [
        ("no token", node.public, nobody.clone(), 401),
        ("a body too large", node.public, head("POST", "/rooms/lobby", &bearer), 413),
        ("no such path", node.public, head("POST", "/nowhere", ""), 404),
        ("no such method", node.public, head("PUT", "/rooms/lobby", ""), 405),
        ("no host", node.public, head("POST", "/rooms/lobby", "Host: y\r\n"), 400),
        ("not HTTP", node.public, "nonsense\r\n\r\n".to_owned(), 400),
        ("a head without end", node.public, "GET / HTTP/1.1\r\nX: ".to_owned(), 431),
        ("the operators' side", node.ops, head("POST", "/livez", ""), 405),
    ] {
        let answer = upload(TcpStream::connect(address).await?, &head).await.context(what)?;
        ensure!(statuses(&answer)? == [status], "{what}: {}", String::from_utf8_lossy(&answer));
    }

    Request::get("/").send(strict.public).await?;
    let answer = upload(TcpStream::connect(strict.public).await?, &nobody).await.context("a limit")?;
    ensure!(statuses(&answer)? == [429], "{}", String::from_utf8_lossy(&answer));

    // Without a header there is no answer, but an orderly end, not a reset that looks like a dead node.
    let answer =
        upload(TcpStream::connect(proxied.public).await?, &nobody).await.context("no PROXY header")?;
    ensure!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));

    let answer = upload(pair.connect(secure.public).await?, &nobody).await.context("TLS")?;
    ensure!(statuses(&answer)? == [401], "{}", String::from_utf8_lossy(&answer));
    // The alert for a client that forgot TLS: a fatal one, recognisable by its first byte.
    let answer = upload(TcpStream::connect(secure.public).await?, &nobody).await.context("no TLS")?;
    ensure!(answer.first() == Some(&21), "{answer:?}");
    for node in [node, strict, proxied, secure] {
        node.ensure_sound()?;
    }
    Ok(())
}

/// Sends everything, closes its sending side, and reads until the end.
async fn say_and_close(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &[u8]) -> Result<Vec<u8>> {
    let exchange = async {
        stream.write_all(request).await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        anyhow::Ok(answer)
    };
    timeout(tidegate_tests::PATIENCE, exchange).await.context("an answer and an end")?
}

/// A client may close its side once it has sent its request (RFC 9112 §9.6, and so does `close_notify` of TLS).
#[tokio::test]
async fn a_client_that_closes_its_side_is_answered() -> Result<()> {
    let pair = Pair::new()?;
    let files = PairOfFiles::of(&pair)?;
    let (plain, secure) = tokio::try_join!(async { alone().await }, async { files.node().start().await })?;
    let token = anywhere("alice");
    let listener = Client::websocket(&plain.ws("lobby", &token, ""), &[]).await?;
    let post = Request::post("/rooms/lobby", "text/plain", "once").bearer(&token);
    let chunked = format!(
        "POST /rooms/lobby HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\
         Transfer-Encoding: chunked\r\n\r\n4\r\nonce\r\n0\r\n\r\n"
    );
    let keep = post.clone().header("Connection", "keep-alive").bytes(plain.public);
    let short = format!(
        "POST /rooms/lobby HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 5\r\n\r\nhalf"
    );
    let rows: [(&str, Vec<u8>, &[u16]); 6] = [
        ("a POST", post.bytes(plain.public), &[202]),
        ("a POST that would keep the connection", keep.clone(), &[202]),
        ("a chunked POST", chunked.into_bytes(), &[202]),
        ("two at once", [keep.clone(), keep].concat(), &[202, 202]),
        ("a path that is none", Request::get("/nowhere").bytes(plain.public), &[404]),
        ("half a body", short.into_bytes(), &[400]),
    ];
    for (what, request, expected) in &rows {
        let answer = say_and_close(TcpStream::connect(plain.public).await?, request).await.context(*what)?;
        ensure!(statuses(&answer)? == *expected, "{what}: {}", String::from_utf8_lossy(&answer));
        let answer = say_and_close(pair.connect(secure.public).await?, request).await.context(*what)?;
        ensure!(statuses(&answer)? == *expected, "{what}, TLS: {}", String::from_utf8_lossy(&answer));
    }
    plain.post("lobby", &token, "text/plain", b"last").await?;
    let mut expected = vec![Payload::text("once"); 5];
    expected.push(Payload::text("last"));
    ensure!(payloads(&listener.heard(6).await?) == expected, "each was delivered once");
    Ok(())
}

/// The only lasting response ends when its client has gone, whatever it sent after its request.
#[tokio::test]
async fn an_event_stream_ends_when_its_client_closes_its_side() -> Result<()> {
    let pair = Pair::new()?;
    let files = PairOfFiles::of(&pair)?;
    let (plain, secure) = tokio::try_join!(async { alone().await }, async { files.node().start().await })?;
    for behind in [&b""[..], b"GET / HT"] {
        leave(&plain, TcpStream::connect(plain.public).await?, behind).await?;
        leave(&secure, pair.connect(secure.public).await?, behind).await?;
    }
    Ok(())
}

/// Starts an event stream over `stream`, sends something more, and closes its side.
async fn leave(node: &Node, mut stream: impl AsyncRead + AsyncWrite + Unpin, behind: &[u8]) -> Result<()> {
    let request = Request::get("/rooms/lobby").header("Accept", "text/event-stream");
    let request = request.header("Connection", "keep-alive").bearer(&anywhere("alice"));
    stream.write_all(&request.bytes(node.public)).await?;
    node.until_samples("a session", |samples| samples.sum("tidegate_connections", &[]) == 1).await?;
    stream.write_all(behind).await?;
    stream.shutdown().await?;
    node.until_samples("no session, no socket", |samples| {
        samples.sum("tidegate_connections", &[]) == 0 && samples.sum("tidegate_sockets", &[]) == 0
    })
    .await?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await?;
    ensure!(rest.starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&rest));
    Ok(())
}

/// One request over a kept connection.
async fn ask(stream: &mut TcpStream, target: &str) -> Result<u16> {
    let request = Request::new("OPTIONS", target).header("Connection", "keep-alive");
    stream.write_all(&request.bytes(stream.peer_addr()?)).await?;
    let mut answer = Vec::new();
    let read = async {
        while !answer.ends_with(b"\r\n\r\n") {
            ensure!(stream.read_buf(&mut answer).await? > 0, "closed after {answer:?}");
        }
        anyhow::Ok(())
    };
    timeout(tidegate_tests::PATIENCE, read).await.context("an answer")??;
    Ok(*statuses(&answer)?.first().context("an answer")?)
}

/// An idle connection without a request in progress is not a request that times out.
#[tokio::test]
async fn an_idle_connection_is_kept_for_longer_than_a_head() -> Result<()> {
    let node = Builder::new().set("public.header_timeout", "300ms").start().await?;
    let mut kept = TcpStream::connect(node.public).await?;
    ensure!(ask(&mut kept, "/rooms/lobby").await? == 204);
    // Half a head that starts after the keep-alive time must first have passed.
    for half in [&b"GET /rooms/lobby HTTP/1.1\r\nHo"[..], b"G"] {
        let mut stream = TcpStream::connect(node.public).await?;
        stream.write_all(half).await?;
        ensure!(timeout(tidegate_tests::PATIENCE, stream.read(&mut [0; 16])).await?? == 0);
    }
    ensure!(ask(&mut kept, "/rooms/lobby").await? == 204, "it was kept");
    // From the first byte of the next head on, it is like any other.
    kept.write_all(b"GET /rooms/lobby HTTP/1.1\r\nHo").await?;
    ensure!(timeout(tidegate_tests::PATIENCE, kept.read(&mut [0; 16])).await?? == 0);
    let samples = node.samples().await?;
    ensure!(samples.sum("tidegate_refusals_total", &["reason=\"header_timeout\""]) == 3, "{samples:?}");
    Ok(())
}

/// It is closed in order when its time is over, and that counts as no refusal. A client that has sent nothing at all
/// is a probe.
#[tokio::test]
async fn an_idle_connection_ends_without_a_refusal() -> Result<()> {
    let node = Builder::new()
        .set("public.keep_alive", "200ms")
        .set("public.header_timeout", "200ms")
        .start()
        .await?;
    let mut kept = TcpStream::connect(node.public).await?;
    ensure!(ask(&mut kept, "/rooms/lobby").await? == 204);
    ensure!(timeout(tidegate_tests::PATIENCE, kept.read(&mut [0; 16])).await?? == 0);
    let mut silent = TcpStream::connect(node.public).await?;
    ensure!(timeout(tidegate_tests::PATIENCE, silent.read(&mut [0; 16])).await?? == 0);
    // Bytes that cross the close on their way are accepted, and not answered with a reset.
    kept.write_all(&Request::get("/").bytes(node.public)).await?;
    ensure!(kept.read(&mut [0; 16]).await? == 0);
    drop((kept, silent));
    node.until_samples("no socket", |samples| samples.sum("tidegate_sockets", &[]) == 0).await?;
    ensure!(refusals(&node.samples().await?) == 0);
    Ok(())
}

/// A request in progress keeps its connection, however long it takes.
#[tokio::test]
async fn a_request_in_progress_is_not_idle() -> Result<()> {
    let node = Builder::new()
        .set("public.keep_alive", "100ms")
        .set("public.header_timeout", "100ms")
        .set("public.body_timeout", "1m")
        .start()
        .await?;
    let head = format!(
        "POST /rooms/lobby HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: 2\r\n\r\n1",
        anywhere("alice")
    );
    let mut slow = TcpStream::connect(node.public).await?;
    slow.write_all(head.as_bytes()).await?;
    let mut idle = TcpStream::connect(node.public).await?;
    ensure!(ask(&mut idle, "/rooms/lobby").await? == 204);
    ensure!(timeout(tidegate_tests::PATIENCE, idle.read(&mut [0; 16])).await?? == 0, "others end meanwhile");
    slow.write_all(b"2").await?;
    let mut answer = [0; 12];
    slow.read_exact(&mut answer).await?;
    ensure!(answer == *b"HTTP/1.1 202");
    Ok(())
}

/// More incomplete requests than the ops listener has slots block no probe, and end by themselves.
#[tokio::test]
async fn half_requests_block_no_probe() -> Result<()> {
    const HALVES: usize = 400;
    let node = alone().await?;
    let before = node.descriptors()?;
    let mut halves = Vec::new();
    for _ in 0..HALVES {
        let mut stream = TcpStream::connect(node.ops).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHo").await?;
        halves.push(stream);
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        ensure!(node.ask_ops(path).await?.status == 200, "{path}");
    }
    eventually("at most 128 connections, and some descriptors of the process", async || {
        let open = node.descriptors().map_err(|error| error.to_string())?.saturating_sub(before);
        if open <= 128 + 8 { Ok(()) } else { Err(format!("{open} descriptors more than before")) }
    })
    .await?;
    // The oldest were closed; the others hit a time-out.
    for stream in &mut halves {
        let ended = timeout(Duration::from_secs(20), stream.read(&mut [0; 16])).await?;
        ensure!(ended.is_err() || ended.is_ok_and(|bytes| bytes == 0));
    }
    node.until_descriptors(before).await
}

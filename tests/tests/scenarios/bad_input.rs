//! Input that no honest client would send: it gets a clear answer, causes no panic, and disturbs no other client.

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::Client,
    http::{Incoming, Request},
    journal::Payload,
    node::{Builder, Node},
    raw::{Frame, RawSocket, talk},
    token::anywhere,
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};

use crate::stage::{alone, payloads};

#[tokio::test]
async fn each_bad_frame_closes_its_own_socket_with_its_code() -> Result<()> {
    let node = Builder::new().set("limits.message_size", "1KiB").start().await?;
    let token = anywhere("alice");
    let target = format!("/rooms/lobby?token={token}");
    let bystander = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let descriptors = node.descriptors()?;
    let whole = |first: u8, payload: &[u8]| Frame { first, ..Frame::text(payload) };
    let rows: Vec<(&str, u16, Vec<Frame>)> = vec![
        ("unmasked", 1002, vec![Frame { masked: false, ..Frame::text("x") }]),
        ("RSV1 without an extension", 1002, vec![whole(0xc1, b"x")]),
        ("RSV2", 1002, vec![whole(0xa1, b"x")]),
        ("RSV3", 1002, vec![whole(0x91, b"x")]),
        ("reserved opcode 3", 1002, vec![whole(0x83, b"x")]),
        ("reserved control opcode 11", 1002, vec![whole(0x8b, b"")]),
        ("continuation of nothing", 1002, vec![whole(0x80, b"x")]),
        ("new message within a message", 1002, vec![whole(0x01, b"x"), whole(0x81, b"y")]),
        ("fragmented ping", 1002, vec![whole(0x09, b"x")]),
        ("ping of 126 bytes", 1002, vec![whole(0x89, &[b'x'; 126])]),
        ("close of one byte", 1002, vec![whole(0x88, &[3])]),
        ("close with code 1005", 1002, vec![whole(0x88, &1005_u16.to_be_bytes())]),
        ("close with a reason that is not UTF-8", 1007, vec![whole(0x88, b"\x03\xe8\xff")]),
        ("text that is not UTF-8", 1007, vec![Frame::text(*b"\xff")]),
        ("text that ends within a character", 1007, vec![Frame::text(*b"\xc3")]),
        ("bad text in a later fragment", 1007, vec![whole(0x01, b"ok"), whole(0x80, b"\xed\xa0\x80")]),
        ("one byte too big", 1009, vec![Frame::text([b'x'; 1025])]),
        ("too big in fragments", 1009, vec![whole(0x01, &[b'x'; 1024]), whole(0x80, b"x")]),
        ("too big by its header alone", 1009, vec![Frame { claimed: Some(1 << 62), ..whole(0x82, b"") }]),
        (
            "a length with its highest bit set",
            1002,
            vec![Frame { claimed: Some(u64::MAX), ..whole(0x82, b"") }],
        ),
    ];
    for (what, code, frames) in &rows {
        let mut socket = RawSocket::connect(node.public, &target).await?;
        for frame in frames {
            socket.send(frame).await?;
        }
        let closed = socket.close_code().await?;
        ensure!(closed == Some(*code), "{what}: {code} was expected, not {closed:?}");
        ensure!(socket.receive().await?.is_none(), "{what}: nothing comes after the close frame");
    }
    // The largest message that fits is still accepted, and pings are answered.
    let mut socket = RawSocket::connect(node.public, &target).await?;
    socket.send(&Frame { first: 0x89, ..Frame::text("are you there?") }).await?;
    let pong = socket.receive().await?;
    ensure!(pong.is_some_and(|frame| frame.first == 0x8a && frame.payload == b"are you there?"));
    socket.send(&Frame::text([b'x'; 1024])).await?;
    drop(socket);

    let expected = Payload::text("x".repeat(1024));
    ensure!(
        payloads(&bystander.hears(&expected).await?.messages) == [expected],
        "only valid messages are delivered"
    );
    node.until_descriptors(descriptors).await?;
    healthy(&node).await
}

#[tokio::test]
async fn each_forbidden_room_name_is_refused() -> Result<()> {
    let node = alone().await?;
    let token = anywhere("alice");
    let long = "a".repeat(201);
    let long_decoded = "%C3%A9".repeat(101);
    for room in [
        "a%00b",
        "a%0Ab",
        "a%7Fb",
        "a%C2%85b",
        "a%20b",
        "%20",
        "a%C2%A0b",
        "a%E2%80%A8b",
        "%7Ba%7D",
        "a%7D",
        "%ff",
        "a%C3",
        "a%",
        "a%2",
        "a%zz",
        "%ED%A0%80",
        &long,
        &long_decoded,
        "",
    ] {
        for request in [
            Request::upgrade(&format!("/rooms/{room}")),
            Request::get(&format!("/rooms/{room}")).header("Accept", "text/event-stream"),
            Request::post(&format!("/rooms/{room}"), "text/plain", *b"x"),
        ] {
            let response = request.bearer(&token).send(node.public).await?;
            let expected = if room.is_empty() { 404 } else { 400 };
            ensure!(response.status == expected || response.status == 400, "{room}: {response:?}");
            response.problem()?;
        }
    }
    let longest = "a".repeat(200);
    for room in [longest.as_str(), "a%2Fb", "%C3%A9t%C3%A9", "a+b", "a%25b", "*", "%F0%9F%A6%80", "..%2F"] {
        let response = Request::upgrade(&format!("/rooms/{room}")).bearer(&token).send(node.public).await?;
        ensure!(response.status == 101, "{room}: {response:?}");
    }
    healthy(&node).await
}

#[tokio::test]
async fn input_that_is_not_http_is_refused() -> Result<()> {
    let node = Builder::new().set("public.header_timeout", "300ms").start().await?;
    let bystander = Client::websocket(&node.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    let descriptors = node.descriptors()?;
    let huge = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(1 << 20));
    let headers = format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "X-Header: value\r\n".repeat(10_000));
    let garbage: [&[u8]; 8] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", // TLS at a plain port
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\0\0\0\0\0\0\0\0",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET  /  HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nBad Header\r\n\r\n",
        huge.as_bytes(),
        headers.as_bytes(),
    ];
    for bytes in garbage {
        let answer = talk(node.public, bytes).await?;
        let shown = String::from_utf8_lossy(&answer).into_owned();
        ensure!(answer.is_empty() || shown.starts_with("HTTP/1.1 4"), "{shown:?}");
    }
    // A head that never ends, and a connection that sends nothing.
    for start in [&b"GET /rooms/lobby HTTP/1.1\r\nHost: x\r\nX-Slow: "[..], b"G", b""] {
        let answer = talk(node.public, start).await?;
        let shown = String::from_utf8_lossy(&answer).into_owned();
        ensure!(answer.is_empty() || shown.starts_with("HTTP/1.1 408"), "{shown:?}");
    }
    node.until_descriptors(descriptors).await?;
    node.post("lobby", &anywhere("alice"), "text/plain", b"still here").await?;
    ensure!(payloads(&bystander.heard(1).await?) == [Payload::text("still here")]);
    healthy(&node).await
}

#[tokio::test]
async fn a_body_that_does_not_arrive_times_out() -> Result<()> {
    let node = Builder::new().set("public.body_timeout", "300ms").start().await?;
    let token = anywhere("alice");
    let mut stream = TcpStream::connect(node.public).await?;
    let head = format!(
        "POST /rooms/lobby HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 10\r\n\r\nhalf"
    );
    stream.write_all(head.as_bytes()).await?;
    let answer = timeout(tidegate_tests::PATIENCE, Incoming::read(stream)).await??;
    ensure!(answer.status == 408, "{answer:?}");
    healthy(&node).await
}

/// Every error is reported before any port opens.
#[tokio::test]
async fn an_invalid_configuration_is_reported_completely_and_opens_no_port() -> Result<()> {
    let wrong = Builder::new()
        .set("sards", "2")
        .set("limits.message_size", "64KB")
        .set("drain.window", "ten")
        .set("origins", "not an origin")
        .variable("TIDEGATE_LIMITS__NOTHING", "1");
    let (status, output) = wrong.run_to_the_end().await?;
    ensure!(status.code() == Some(2), "{status}: {output}");
    for word in
        ["sards", "limits.message_size", "64KB", "drain.window", "ten", "origins", "TIDEGATE_LIMITS__NOTHING"]
    {
        ensure!(output.contains(word), "{word} is missing in:\n{output}");
    }
    ensure!(!output.contains("listening"), "{output}");
    Ok(())
}

/// Nothing panicked, and the node serves as before.
async fn healthy(node: &Node) -> Result<()> {
    let token = anywhere("the doctor");
    let client = Client::websocket(&node.ws("ward", &token, ""), &[]).await?;
    client.send(Payload::text("pulse")).await?;
    ensure!(payloads(&client.heard(1).await?) == [Payload::text("pulse")]);
    ensure!(!node.output().contains("panicked"), "the node panicked");
    Ok(())
}

/// The code and the reason of the close frame with which the node answers.
async fn farewell(socket: &mut RawSocket) -> Result<(u16, String)> {
    let frame = socket.receive().await?.context("a close frame")?;
    let code = frame.close_code().with_context(|| format!("a close frame, not {frame:?}"))?;
    Ok((code, String::from_utf8(frame.payload.into_iter().skip(2).collect())?))
}

/// RFC 6455 §5.5.1: the answer echoes the status code that was received.
#[tokio::test]
async fn a_close_is_answered_with_its_own_code() -> Result<()> {
    let node = alone().await?;
    let token = anywhere("alice");
    for target in [format!("/rooms/lobby?token={token}"), "/connection/websocket".to_owned()] {
        for code in [1000_u16, 1001, 1003, 1011, 3000, 4999] {
            let mut socket = RawSocket::connect(node.public, &target).await?;
            let payload = [&code.to_be_bytes()[..], b"bye"].concat();
            socket.send(&Frame { first: 0x88, ..Frame::text(payload) }).await?;
            ensure!(farewell(&mut socket).await? == (code, String::new()), "{target}: {code}");
            ensure!(socket.receive().await?.is_none());
        }
        let mut socket = RawSocket::connect(node.public, &target).await?;
        socket.send(&Frame { first: 0x88, ..Frame::text("") }).await?;
        ensure!(farewell(&mut socket).await?.0 == 1000, "{target}: no code");
    }
    let closed = ["reason=\"client\""];
    node.until_samples("all of them counted", |samples| {
        samples.sum("tidegate_connections_closed_total", &closed) == 14
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn a_close_frame_has_the_reason() -> Result<()> {
    let node = Builder::new().set("compression.enabled", "true").start().await?;
    let target = format!("/rooms/lobby?token={}", anywhere("alice"));
    let offer = ("Sec-WebSocket-Extensions", "permessage-deflate");
    // RSV1 marks the message as compressed; its first block has the reserved type.
    let compressed = |first| Frame { first, ..Frame::text(*b"\x07\x00") };
    for (frame, code, word) in [
        (compressed(0xc2), 1007, "DEFLATE"),
        (compressed(0xc1), 1007, "DEFLATE"),
        (Frame::text(*b"\xff"), 1007, "a text message"),
        (Frame { first: 0x88, ..Frame::text(*b"\x03\xe8\xff") }, 1007, "a close reason"),
        (Frame { masked: false, ..Frame::text("x") }, 1002, "not masked"),
        (Frame { first: 0x83, ..Frame::text("x") }, 1002, "opcode 3"),
        (Frame { claimed: Some(1 << 40), ..Frame::text("x") }, 1009, "too big"),
    ] {
        let mut socket = RawSocket::connect_with(node.public, &target, &[offer]).await?;
        socket.send(&frame).await?;
        let (closed, reason) = farewell(&mut socket).await?;
        ensure!(closed == code && reason.contains(word), "{code} {word:?}, not {closed} {reason:?}");
    }
    Ok(())
}

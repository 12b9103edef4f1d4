//! Every limit, exceeded by a real client that gets the documented answer, while a well-behaved client beside it
//! receives everything, each message once and in order.
//!
//! The other limits have scenarios elsewhere: `limits.message_size` in `bad_input`, `limits.outbound` in
//! `slow`. Addresses behind proxies are in `addresses`.

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use tidegate_tests::{
    client::Client,
    http::{Request, Response},
    journal::{End, Payload},
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    token::{Token, anywhere},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::stage::payloads;

/// Client addresses of this machine: all of 127.0.0.0/8.
const FLOODER: [u8; 4] = [127, 0, 0, 2];
const NEIGHBOUR: [u8; 4] = [127, 0, 0, 3];

const CENTRIFUGE: &str = "/connection/websocket";

fn limited(limits: &[(&str, &str)]) -> Builder {
    limits.iter().fold(Builder::new(), |node, (name, value)| node.set(&format!("limits.{name}"), value))
}

fn centrifuge(node: &Node) -> String {
    format!("ws://{}{CENTRIFUGE}", node.public)
}

/// A well-behaved pair of clients: each receives what the other publishes.
struct Bystanders {
    speaker: Client,
    listener: Client,
    said: Vec<Payload>,
}

impl Bystanders {
    async fn meet(node: &Node) -> Result<Self> {
        let token = anywhere("bystander");
        let listener = Client::events(&node.url("meadow", &token, "")).await?;
        let speaker = Client::websocket(&node.ws("meadow", &token, ""), &[]).await?;
        Ok(Self { speaker, listener, said: Vec::new() })
    }

    /// Publishes one message, and waits until both have received it.
    async fn talk(&mut self) -> Result<()> {
        self.said.push(Payload::text(format!("all is well {}", self.said.len())));
        self.speaker.send(self.said.last().context("said just now")?.clone()).await?;
        self.heard_everything().await
    }

    async fn heard_everything(&self) -> Result<()> {
        for one in [&self.speaker, &self.listener] {
            let heard = payloads(&one.heard(self.said.len()).await?);
            ensure!(heard == self.said, "{heard:?}");
            ensure!(one.now().end.is_none());
        }
        Ok(())
    }
}

/// A refusal by a limit: 429, problem details, and `Retry-After`.
fn ensure_too_many(response: &Response) -> Result<u64> {
    ensure!(response.status == 429, "{} {}", response.status, response.text());
    response.problem()?;
    let after: u64 = response.header("Retry-After").context("Retry-After")?.parse()?;
    ensure!((1..=90_000).contains(&after), "{after}");
    Ok(after)
}

#[tokio::test]
async fn attempts_of_one_address() -> Result<()> {
    let node = limited(&[("attempts_per_address", "1/h burst 5")]).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?; // two attempts of 127.0.0.1
    let token = anywhere("alice");
    let knock = Request::get("/rooms/lobby").header("Accept", "text/html").bearer(&token).from(FLOODER);
    for _ in 0..5 {
        ensure!(knock.send(node.public).await?.status == 406, "neither a handshake nor an event stream");
    }
    for _ in 0..10 {
        // An hour until the next attempt, or up to twice that.
        ensure!(ensure_too_many(&knock.send(node.public).await?)? >= 3_500);
        bystanders.talk().await?;
    }
    // It has been answered often enough.
    for _ in 0..20 {
        ensure!(knock.send(node.public).await.is_err(), "no answer, but an end");
    }
    bystanders.talk().await?;
    ensure!(knock.clone().from(NEIGHBOUR).send(node.public).await?.status == 406, "another address");

    // Common client libraries see the status.
    let url = node.ws("lobby", &token, "");
    let clients = [Client::node_websocket(&url).await?, Client::python_websocket(&url).await?];
    let third = Client::node_websocket(&url).await?;
    let refused = Client::node_websocket(&url).await.err().context("the sixth of 127.0.0.1")?;
    ensure!(format!("{refused:?}").contains("Refused(429)"), "{refused:?}");
    for client in clients.iter().chain([&third]) {
        ensure!(client.now().end.is_none(), "connected clients stay connected");
    }
    bystanders.talk().await?;
    let samples = node.samples().await?;
    ensure!(samples.sum("tidegate_refusals_total", &["reason=\"attempts\""]) == 11, "{samples:?}");
    ensure!(samples.sum("tidegate_sockets_dropped_total", &["reason=\"attempts\""]) == 20, "{samples:?}");
    Ok(())
}

#[tokio::test]
async fn open_connections_of_one_address() -> Result<()> {
    let node = limited(&[("connections_per_address", "4")]).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?;
    let token = anywhere("alice");
    let open = || async {
        let request = Request::upgrade(&format!("/rooms/lobby?token={token}")).from(FLOODER);
        RawSocket::by(&request, node.public).await
    };
    let mut sockets = try_join_all((0..4).map(|_| open())).await?;
    let request = Request::get("/rooms/lobby").bearer(&token);
    let knock = request.clone().from(FLOODER);
    ensure!((5..=20).contains(&ensure_too_many(&knock.send(node.public).await?)?));
    bystanders.talk().await?;
    let stream = request.clone().from(NEIGHBOUR).open(node.public).await?;
    ensure!(stream.status == 200, "another address");

    // A closed socket makes room.
    let mut leaving = sockets.pop().context("four are open")?;
    leaving.send(&Frame { first: 0x88, ..Frame::text([3, 232]) }).await?;
    ensure!(leaving.close_code().await? == Some(1000));
    drop(leaving);
    node.until_samples("three of the flooder's sockets", |samples| samples.sum("tidegate_sockets", &[]) == 6)
        .await?;
    let stream = knock.open(node.public).await?;
    ensure!(stream.status == 200, "room for one");
    ensure_too_many(&knock.send(node.public).await?)?;

    // An EventSource from 127.0.0.1 still fits beside the bystanders' two, but no more.
    let url = node.url("lobby", &token, "");
    let _streams = [Client::node_events(&url, &[]).await?, Client::events(&url).await?];
    let refused = Client::events(&url).await?;
    ensure!(matches!(refused.ended().await?, End::Closed { .. }), "a fifth is told to reconnect");
    let said = refused.now();
    ensure!(said.messages.is_empty() && said.retries.iter().all(|millis| *millis >= 5_000), "{said:?}");
    bystanders.talk().await?;
    Ok(())
}

/// New connections are not refused because of others: they wait.
#[tokio::test]
async fn accepts_of_the_node() -> Result<()> {
    let node = limited(&[("accepts", "50/s burst 5")]).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?;
    let token = anywhere("alice");
    let target = format!("/rooms/lobby?token={token}");
    let storm = try_join_all((0..60).map(|_| RawSocket::connect(node.public, &target))).await?;
    ensure!(storm.len() == 60);
    bystanders.talk().await?;
    let samples = node.samples().await?;
    ensure!(samples.sum("tidegate_accept_pauses_total", &[]) > 10, "{samples:?}");
    ensure!(samples.sum("tidegate_refusals_total", &[]) == 0, "{samples:?}");
    Ok(())
}

#[tokio::test]
async fn open_connections_of_the_node() -> Result<()> {
    let node = limited(&[("connections", "4")]).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?;
    let url = node.ws("lobby", &anywhere("alice"), "");
    let _two = [Client::websocket(&url, &[]).await?, Client::node_websocket(&url).await?];
    let refused = Client::node_websocket(&url).await.err().context("a fifth")?;
    ensure!(format!("{refused:?}").contains("Refused(503)"), "{refused:?}");
    let post =
        Request::post("/rooms/lobby", "text/plain", "x").bearer(&anywhere("alice")).send(node.public).await?;
    ensure!(post.status == 503 && post.header("Retry-After").is_some(), "{post:?}");
    // A refused client occupies no connection slot: neither with a kept connection nor as an `EventSource`.
    for (what, request) in [
        ("a publisher", Request::post("/rooms/lobby", "text/plain", "x")),
        ("an EventSource", Request::get("/rooms/lobby").header("Accept", "text/event-stream")),
    ] {
        let mut refused = TcpStream::connect(node.public).await?;
        let request = request.bearer(&anywhere("alice")).header("Connection", "keep-alive");
        refused.write_all(&request.bytes(node.public)).await?;
        let mut answer = Vec::new();
        timeout(tidegate_tests::PATIENCE, refused.read_to_end(&mut answer)).await.context(what)??;
        let head = String::from_utf8_lossy(&answer).to_ascii_lowercase();
        ensure!(head.contains("\r\nconnection: close\r\n"), "{what}: {head}");
    }
    bystanders.talk().await
}

/// An SDK gets error 111 for each refused command, continues, is closed with 3013, and reconnects.
#[tokio::test]
async fn commands_of_a_centrifuge_session() -> Result<()> {
    // One for the connect command, one for the subscription.
    let node = limited(&[("commands", "1/h burst 12")]).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?;
    let token = anywhere("alice");
    let listener = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let sdk = Client::node_centrifuge(&centrifuge(&node), "lobby", &[&token]).await?;
    for n in 0..15 {
        sdk.send(Payload::text(n.to_string())).await?;
        if n % 5 == 4 {
            bystanders.talk().await?;
        }
    }
    let ten: Vec<_> = (0..10).map(|n| Payload::text(n.to_string())).collect();
    ensure!(payloads(&listener.heard(10).await?) == ten);
    let journal = sdk.until("five errors", |journal| journal.events("error") == 5).await?;
    let errors: Vec<_> = journal.messages.iter().filter(|message| message.event == "error").collect();
    ensure!(errors.iter().all(|error| error.payload == Payload::text("111")), "{errors:?}");
    ensure!((journal.opened, journal.end) == (1, None), "the session continues");
    // It receives messages as before.
    node.post("lobby", &token, "application/json", b"\"still here\"").await?;
    sdk.hears(&Payload::text("\"still here\"")).await?;
    node.until_samples("five refused commands", |samples| {
        samples.sum("tidegate_limited_total", &["limit=\"commands\""]) == 5
    })
    .await?;

    // If it does not stop, it is closed, and the SDK reconnects as a new session with a new allowance.
    for n in 100..300 {
        sdk.send(Payload::text(n.to_string())).await?;
    }
    let back = sdk.until("second subscription", |journal| journal.opened == 2).await?;
    ensure!((back.interrupted, back.end) == (1, None));
    let closed = ["protocol=\"centrifuge\"", "reason=\"over_limit\""];
    node.until_samples("a session closed over its limit", |samples| {
        samples.sum("tidegate_connections_closed_total", &closed) >= 1
    })
    .await?;
    bystanders.talk().await
}

/// The code on the wire: 3013, upon which SDKs reconnect.
#[tokio::test]
async fn a_centrifuge_client_that_continues_is_closed_with_3013() -> Result<()> {
    let node = limited(&[("commands", "1/h burst 2")]).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?;
    let mut socket = RawSocket::connect(node.public, CENTRIFUGE).await?;
    let connect = format!(r#"{{"id":1,"connect":{{"token":"{}"}}}}"#, anywhere("alice"));
    socket.send(&Frame::text(connect)).await?;
    let ping = |id: usize| Frame::text(format!(r#"{{"id":{id},"ping":{{}}}}"#));
    for id in 2..2000 {
        if socket.send(&ping(id)).await.is_err() {
            break; // closed already
        }
    }
    let (mut errors, mut code) = (0, None);
    while let Some(frame) = socket.receive().await? {
        if frame.first == 0x88 {
            code = frame.close_code();
            break;
        }
        errors += usize::from(String::from_utf8_lossy(&frame.payload).contains("\"code\":111"));
    }
    ensure!(code == Some(3013), "{code:?}");
    // A hundred at once and ten a second are tolerated.
    ensure!((100..1000).contains(&errors), "{errors} errors");
    bystanders.talk().await
}

/// A plain frame cannot carry an error: the node closes with 1008 and names the limit.
#[tokio::test]
async fn commands_of_a_plain_session() -> Result<()> {
    let node = limited(&[("commands", "1/h burst 10")]).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?;
    let token = anywhere("alice");
    let listener = Client::events(&node.url("lobby", &token, "")).await?;
    let clients = [
        Client::node_websocket(&node.ws("lobby", &token, "")).await?,
        Client::python_websocket(&node.ws("lobby", &token, "")).await?,
    ];
    for (who, client) in clients.iter().enumerate() {
        for n in 0..15 {
            client.send(Payload::text(format!("{who} {n}"))).await?;
        }
        let end = client.ended().await?;
        let expected = End::Closed { code: 1008, reason: "too much: limits.commands".to_owned() };
        ensure!(end == expected, "{end:?}");
        let heard = payloads(&listener.heard(10 * (who + 1)).await?);
        let expected: Vec<_> = (0..10).map(|n| Payload::text(format!("{who} {n}"))).collect();
        ensure!(heard[10 * who..] == expected, "{heard:?}");
        bystanders.talk().await?;
    }
    ensure!(listener.now().messages.len() == 20);
    Ok(())
}

#[tokio::test]
async fn bytes_of_a_session() -> Result<()> {
    // The frame headers count.
    let node = limited(&[("bytes", "4KiB/h burst 64KiB")]).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?;
    let token = anywhere("alice");
    let listener = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let client = Client::node_websocket(&node.ws("lobby", &token, "")).await?;
    let said: Vec<_> = (0..4).map(|n| Payload::text(format!("{n} {}", "x".repeat(16 * 1024 - 10)))).collect();
    for payload in &said {
        client.send(payload.clone()).await?;
    }
    ensure!(payloads(&listener.heard(4).await?) == said);
    client.send(Payload::text("one more")).await?;
    let end = client.ended().await?;
    ensure!(end == End::Closed { code: 1008, reason: "too much: limits.bytes".to_owned() }, "{end:?}");
    bystanders.talk().await?;
    ensure!(listener.now().messages.len() == 4);
    node.until_samples("one refused message", |samples| {
        samples.sum("tidegate_limited_total", &["limit=\"bytes\""]) == 1
    })
    .await?;
    Ok(())
}

/// Control frames, and fragments without an end, count as well.
#[tokio::test]
async fn control_frames_and_fragments_are_charged_too() -> Result<()> {
    let rates = [("commands", "1/h burst 10"), ("bytes", "4KiB/h burst 64KiB"), ("message_size", "1KiB")];
    let node = limited(&rates).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?;
    let target = format!("/rooms/lobby?token={}", anywhere("alice"));
    let ping = Frame { first: 0x89, ..Frame::text("x") };
    let mut socket = RawSocket::connect(node.public, &target).await?;
    for _ in 0..5000 {
        if socket.send(&ping).await.is_err() {
            break;
        }
    }
    let mut pongs = 0;
    let code = loop {
        match socket.receive().await?.context("a close frame first")? {
            frame if frame.first == 0x8a => pongs += 1,
            frame => break frame.close_code(),
        }
    };
    ensure!((pongs, code) == (10, Some(1008)), "{pongs} pongs, {code:?}");
    bystanders.talk().await?;

    let mut socket = RawSocket::connect(node.public, &target).await?;
    socket.send(&Frame { first: 0x01, ..Frame::text("x") }).await?;
    let nothing = Frame { first: 0x00, ..Frame::text("") };
    let many = nothing.bytes().repeat(10_000);
    let mut sent = 0;
    while socket.send_bytes(&many).await.is_ok() {
        sent += many.len();
        ensure!(sent < 1 << 30, "a message that never ends is taken for ever");
    }
    node.until_samples("both closed over the limit", |samples| {
        samples.sum("tidegate_connections_closed_total", &["reason=\"over_limit\""]) == 2
    })
    .await?;
    bystanders.talk().await
}

/// All of a user's sessions and its `POST`s share one account; another user has another.
#[tokio::test]
async fn commands_of_a_user() -> Result<()> {
    let node = limited(&[("user_commands", "1/h burst 6")]).start().await?;
    let (alice, bob) = (anywhere("alice"), anywhere("bob"));
    let listener = Client::websocket(&node.ws("lobby", &bob, ""), &[]).await?;
    let plain = Client::websocket(&node.ws("lobby", &alice, ""), &[]).await?;
    // A third is spent on connecting and subscribing.
    let sdk = Client::node_centrifuge(&centrifuge(&node), "lobby", &[&alice]).await?;
    plain.send(Payload::text("1")).await?;
    listener.heard(1).await?;
    sdk.send(Payload::text("2")).await?;
    listener.heard(2).await?;
    for n in 3..=5 {
        node.post("lobby", &alice, "text/plain", n.to_string().as_bytes()).await?;
    }
    let refused = Request::post("/rooms/lobby", "text/plain", "6").bearer(&alice).send(node.public).await?;
    ensure!(ensure_too_many(&refused)? >= 3_500);
    sdk.send(Payload::text("7")).await?;
    let journal = sdk.until("an error", |journal| journal.events("error") == 1).await?;
    ensure!(journal.end.is_none());
    plain.send(Payload::text("8")).await?;
    let end = plain.ended().await?;
    ensure!(
        end == End::Closed { code: 1008, reason: "too much: limits.user_commands".to_owned() },
        "{end:?}"
    );

    // Bob's allowance is untouched.
    for n in 6..=11 {
        listener.send(Payload::text(n.to_string())).await?;
    }
    let expected: Vec<_> = (1..=11).map(|n| Payload::text(n.to_string())).collect();
    ensure!(payloads(&listener.heard(11).await?) == expected);
    let samples = node.samples().await?;
    ensure!(samples.sum("tidegate_limited_total", &["limit=\"user_commands\""]) == 2, "{samples:?}");
    ensure!(samples.sum("tidegate_refusals_total", &["reason=\"user_commands\""]) == 1, "{samples:?}");
    Ok(())
}

#[tokio::test]
async fn bytes_of_a_user() -> Result<()> {
    let node = limited(&[("user_bytes", "4KiB/h burst 64KiB")]).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?;
    let (alice, body) = (anywhere("alice"), vec![b'x'; 20 * 1024]);
    let listener = Client::websocket(&node.ws("lobby", &anywhere("bob"), ""), &[]).await?;
    for _ in 0..3 {
        node.post("lobby", &alice, "text/plain", &body).await?;
    }
    let refused =
        Request::post("/rooms/lobby", "text/plain", body.as_slice()).bearer(&alice).send(node.public).await?;
    ensure_too_many(&refused)?;
    let plain = Client::python_websocket(&node.ws("lobby", &alice, "")).await?;
    plain.send(Payload::Text(String::from_utf8(body)?)).await?;
    let end = plain.ended().await?;
    ensure!(end == End::Closed { code: 1008, reason: "too much: limits.user_bytes".to_owned() }, "{end:?}");
    bystanders.talk().await?;
    ensure!(listener.heard(3).await?.len() == 3);
    Ok(())
}

#[tokio::test]
async fn rooms_of_a_session() -> Result<()> {
    let node = limited(&[("rooms_per_session", "2")]).start().await?;
    let mut bystanders = Bystanders::meet(&node).await?;
    let token = anywhere("alice");
    let three =
        Request::get("/rooms?room=a&room=b&room=c").header("Accept", "text/event-stream").bearer(&token);
    let refused = three.send(node.public).await?;
    ensure!(refused.status == 400, "{refused:?}");
    let mut socket = RawSocket::connect(node.public, CENTRIFUGE).await?;
    let connect = format!(r#"{{"id":1,"connect":{{"token":"{token}"}}}}"#);
    socket.send(&Frame::text(connect)).await?;
    for (id, room) in [(2, "a"), (3, "b"), (4, "c")] {
        socket.send(&Frame::text(format!(r#"{{"id":{id},"subscribe":{{"channel":"{room}"}}}}"#))).await?;
    }
    let mut refused = Vec::new();
    for _ in 0..4 {
        let frame = socket.receive().await?.context("a reply to each")?;
        let reply: serde_json::Value = serde_json::from_slice(&frame.payload)?;
        refused.extend(reply.pointer("/error/code").map(|code| (reply["id"].clone(), code.clone())));
    }
    ensure!(refused == [(4.into(), 106.into())], "{refused:?}");
    bystanders.talk().await
}

/// A client that disconnects leaves no account behind.
#[tokio::test]
async fn accounts_of_disconnected_clients_are_removed() -> Result<()> {
    let node = limited(&[
        ("attempts_per_address", "1000/s burst 10"),
        ("connections_per_address", "10"),
        ("user_commands", "1000/s burst 10"),
        ("user_bytes", "1MiB/s burst 64KiB"),
    ])
    .start()
    .await?;
    let mut sockets = Vec::new();
    for n in 0..200_u8 {
        let token = Token::new(&format!("user {n}")).room("*", &["publish", "subscribe"]).sign();
        let request =
            Request::upgrade(&format!("/rooms/lobby?token={token}&echo=false")).from([127, 1, 0, n + 1]);
        let mut socket = RawSocket::by(&request, node.public).await?;
        socket.send(&Frame::text("hello")).await?;
        sockets.push(socket);
    }
    let there = node.samples().await?.sum("tidegate_limit_accounts", &[]);
    ensure!(there >= 200, "an account of each open connection, not {there}");
    drop(sockets);
    node.until_samples("no account", |samples| samples.sum("tidegate_limit_accounts", &[]) == 0).await?;
    Ok(())
}

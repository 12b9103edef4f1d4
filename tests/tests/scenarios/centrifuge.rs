//! The Centrifuge protocol with its published SDKs, and by hand where it is violated.

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::Client,
    fault_proxy::{FaultProxy, Target},
    journal::{Message, Payload},
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    redis_server::RedisServer,
    token::{Token, anywhere},
};

use crate::stage::{Stage, alone, payloads};

const PATH: &str = "/connection/websocket";

fn url(node: &Node) -> String {
    format!("ws://{}{PATH}", node.public)
}

/// Both SDKs in the lobby, one at each address.
async fn sdks(script: &str, python: &str, tokens: &[&str]) -> Result<[Client; 2]> {
    let script = Client::node_centrifuge(script, "lobby", tokens).await?;
    Ok([script, Client::python_centrifuge(python, "lobby", tokens).await?])
}

fn text(json: &str) -> Payload {
    Payload::text(json)
}

#[tokio::test]
async fn sdks_share_a_room_with_all_other_clients() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    let script = Client::node_centrifuge(&url(&stage.a), "lobby", &[&token]).await?;
    let python = Client::python_centrifuge(&url(&stage.b), "lobby", &[&token]).await?;
    let plain = Client::websocket(&stage.b.ws("lobby", &token, ""), &[]).await?;
    let stream = Client::events(&stage.a.url("lobby", &token, "")).await?;

    script.send(text(r#"{"from":"js","n":[1,2.5,null]}"#)).await?;
    plain.heard(1).await?;
    python.send(text(r#"{"from":"py"}"#)).await?;
    plain.heard(2).await?;
    stage.publish("lobby", b"{\"from\":\"redis\"}").await?;
    plain.heard(3).await?;
    // Text that is not JSON reaches the SDKs as a JSON string.
    plain.send(text("plain text")).await?;

    let said = [r#"{"from":"js","n":[1,2.5,null]}"#, r#"{"from":"py"}"#, r#"{"from":"redis"}"#];
    let mut expected: Vec<_> = said.into_iter().map(text).collect();
    expected.push(text("plain text"));
    // The bytes are the publisher's own: Python's JSON has a blank after a colon.
    expected[1] = text(r#"{"from": "py"}"#);
    ensure!(payloads(&plain.heard(4).await?) == expected);
    ensure!(payloads(&stream.heard(4).await?) == expected);
    expected[1] = text(said[1]);
    expected[3] = text("\"plain text\"");
    ensure!(payloads(&script.heard(4).await?) == expected);
    ensure!(payloads(&python.heard(4).await?) == expected);
    Ok(())
}

/// Everything that many publishers on both nodes send arrives at every SDK in one order.
#[tokio::test]
async fn one_order_for_sdks_on_both_nodes() -> Result<()> {
    const EACH: usize = 100;
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    let clients = [
        Client::node_centrifuge(&url(&stage.a), "lobby", &[&token]).await?,
        Client::node_centrifuge(&url(&stage.b), "lobby", &[&token]).await?,
        Client::python_centrifuge(&url(&stage.a), "lobby", &[&token]).await?,
        Client::python_centrifuge(&url(&stage.b), "lobby", &[&token]).await?,
    ];
    for n in 0..EACH {
        for (who, client) in clients.iter().enumerate() {
            client.send(text(&format!("[{who},{n}]"))).await?;
        }
    }
    let first = payloads(&clients[0].heard(4 * EACH).await?);
    for client in &clients[1..] {
        ensure!(payloads(&client.heard(4 * EACH).await?) == first);
    }
    for who in 0..clients.len() {
        let own: Vec<_> = first
            .iter()
            .filter(|payload| payload.bytes().starts_with(format!("[{who},").as_bytes()))
            .cloned()
            .collect();
        let sent: Vec<_> = (0..EACH).map(|n| text(&format!("[{who},{n}]"))).collect();
        ensure!(own == sent, "{who} sent {sent:?}, received was {own:?}");
    }
    Ok(())
}

#[tokio::test]
async fn sdks_are_refused_operations_that_are_not_granted() -> Result<()> {
    let node = alone().await?;
    let listener = Token::new("bob").room("lobby", &["subscribe"]).sign();
    let sdks = [
        Client::node_centrifuge(&url(&node), "lobby", &[&listener]).await?,
        Client::python_centrifuge(&url(&node), "lobby", &[&listener]).await?,
    ];
    for sdk in &sdks {
        sdk.send(text("1")).await?;
        let heard = sdk.heard(1).await?;
        ensure!(heard[0].event == "error" && heard[0].payload == text("103"), "{heard:?}");
    }
    // A room without a grant, and an invalid token: the connection or the subscription ends with a code.
    for (room, token, code) in [("other", listener.as_str(), 103), ("lobby", "not.a.token", 3500)] {
        let refusal =
            Client::node_centrifuge(&url(&node), room, &[token]).await.err().context("it must not open")?;
        ensure!(format!("{refusal:?}").contains(&format!("code: {code}")), "{refusal:?}");
    }
    node.until_samples("a refused token", |samples| {
        samples.sum("tidegate_auth_failures_total", &["reason=\"malformed\""]) == 1
    })
    .await?;
    Ok(())
}

/// Unsupported features are reported, not ignored, and end no connection.
#[tokio::test]
async fn an_sdk_gets_errors_for_unsupported_features() -> Result<()> {
    let node = alone().await?;
    let sdk = Client::node_centrifuge_asks(&url(&node), "lobby", &anywhere("alice")).await?;
    let answers = [
        ("filter", "108"),
        ("token", "108"),
        ("joinLeave", "108"),
        ("map", "108"),
        ("sharedPoll", "108"),
        ("state", "108"),
        ("since", r#"{"wasRecovering":true,"recovered":false,"positioned":false,"recoverable":false}"#),
        ("declined", r#"{"wasRecovering":false,"recovered":false,"positioned":false,"recoverable":false}"#),
        ("mapPublish", "108"),
        ("history", "103"),
        ("mapRemove", "108"),
        ("message", "\"still here\""),
    ];
    let expected =
        answers.map(|(event, said)| Message { event: event.to_owned(), ..Message::plain(text(said)) });
    let heard = sdk.heard(answers.len()).await?;
    ensure!(heard == expected, "{heard:?}");
    let journal = sdk.now();
    ensure!((journal.opened, journal.interrupted, journal.end) == (1, 0, None));
    Ok(())
}

/// JavaScript timers fire at once beyond 2^31 ms, and the protocol's number has 32 bits.
#[tokio::test]
async fn the_ttl_of_a_token_for_centuries_is_capped_for_clients() -> Result<()> {
    let node = alone().await?;
    let token = Token::new("alice").room("*", &["subscribe", "publish"]).expires_in(1 << 33).sign();
    let mut socket = RawSocket::connect(node.public, PATH).await?;
    for method in ["connect", "refresh"] {
        let command = format!(r#"{{"id":1,"{method}":{{"token":"{token}"}}}}"#);
        socket.send(&Frame::text(command)).await?;
        let answer = socket.receive().await?.context("an answer")?.payload;
        let answer: serde_json::Value = serde_json::from_slice(&answer)?;
        ensure!(answer[method]["expires"] == true && answer[method]["ttl"] == 2_147_483, "{answer}");
    }
    let sdk = Client::node_centrifuge(&url(&node), "lobby", &[&token]).await?;
    sdk.send(text("1")).await?;
    ensure!(sdk.heard(1).await?[0].payload == text("1"), "and no refresh before it");
    Ok(())
}

/// The SDKs send a new token before the old one expires, and the session continues.
#[tokio::test]
async fn sdks_refresh_an_expiring_token() -> Result<()> {
    let node = Builder::new().set("auth.leeway", "0s").start().await?;
    let short = || Token::new("alice").room("*", &["subscribe", "publish"]).expires_in(8).sign();
    let long = anywhere("alice");
    let sdks = sdks(&url(&node), &url(&node), &[&short(), &long]).await?;
    // A plain socket with the short-lived token shows when it expires.
    let plain = Client::websocket(&node.ws("lobby", &short(), ""), &[]).await?;
    let end = plain.ended().await?;
    ensure!(end.code() == Some(1008), "{end:?}");
    for sdk in &sdks {
        let journal = sdk.until("refresh", |journal| journal.events("refresh") > 0).await?;
        ensure!((journal.opened, journal.interrupted, journal.end) == (1, 0, None), "the session continues");
    }
    node.post("lobby", &long, "application/json", b"\"still here\"").await?;
    for sdk in &sdks {
        sdk.hears(&text("\"still here\"")).await?;
    }
    Ok(())
}

/// Their node is killed without notice; they reconnect by themselves to the other one.
#[tokio::test]
async fn sdks_reconnect_to_another_node_after_theirs_was_killed() -> Result<()> {
    let mut stage = Stage::set().await?;
    let token = anywhere("alice");
    let door = FaultProxy::to(Target::Tcp(stage.a.public)).await?;
    let address = format!("ws://{}{PATH}", door.address());
    let sdks = sdks(&address, &address, &[&token]).await?;
    door.retarget(Target::Tcp(stage.b.public));
    stage.a.kill().await?;
    for sdk in &sdks {
        sdk.until("second subscription", |journal| journal.opened == 2).await?;
    }
    stage.publish("lobby", b"\"welcome back\"").await?;
    for sdk in &sdks {
        let journal = sdk.hears(&text("\"welcome back\"")).await?;
        ensure!(journal.end.is_none());
    }
    Ok(())
}

/// An interruption of the topic is "unsubscribed, 2500", upon which the SDKs subscribe again by themselves.
#[tokio::test]
async fn sdks_subscribe_again_after_an_interruption() -> Result<()> {
    let mut stage = Stage::set().await?;
    let token = anywhere("alice");
    let sdks = sdks(&url(&stage.a), &url(&stage.b), &[&token]).await?;
    stage.redis.kill().await?;
    stage.redis.restart().await?;
    for sdk in &sdks {
        sdk.until("interruption and subscription", |journal| (journal.interrupted, journal.opened) == (1, 2))
            .await?;
    }
    stage.publish("lobby", b"\"after\"").await?;
    for sdk in &sdks {
        let journal = sdk.hears(&text("\"after\"")).await?;
        ensure!(journal.payloads() == [text("\"after\"")] && journal.end.is_none());
    }
    Ok(())
}

/// A draining node sends "shutdown" (3001), and the SDKs reconnect.
#[tokio::test]
async fn sdks_reconnect_after_a_drain() -> Result<()> {
    let mut stage = Stage::set_with(|node| node.set("drain.window", "200ms")).await?;
    let token = anywhere("alice");
    let door = FaultProxy::to(Target::Tcp(stage.a.public)).await?;
    let address = format!("ws://{}{PATH}", door.address());
    let sdks = sdks(&address, &address, &[&token]).await?;
    door.retarget(Target::Tcp(stage.b.public));
    stage.a.terminate()?;
    ensure!(stage.a.exited().await?.code() == Some(0));
    for sdk in &sdks {
        let journal = sdk.until("second subscription", |journal| journal.opened == 2).await?;
        ensure!(journal.end.is_none());
    }
    Ok(())
}

/// Commands that no SDK sends, each with its close code.
#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_closed_with_a_code() -> Result<()> {
    let node = alone().await?;
    let connect = format!(r#"{{"id":1,"connect":{{"token":"{}"}}}}"#, anywhere("alice"));
    for (sent, code) in [
        ("nonsense", 3501),
        (r#"{"id":1,"subscribe":{"channel":"lobby"}}"#, 3501),
        (r#"{"id":"1","connect":{}}"#, 3501),
        (r#"{"id":1,"connect":{"token":"no.valid.token"}}"#, 3500),
    ] {
        let mut socket = RawSocket::connect(node.public, PATH).await?;
        socket.send(&Frame::text(sent)).await?;
        ensure!(socket.close_code().await? == Some(code), "{sent}");
    }
    for (sent, code) in [(connect.as_str(), 3501), (r#"{"send":{"data":1}}"#, 3508), ("{\"id\":2", 3501)] {
        let mut socket = RawSocket::connect(node.public, PATH).await?;
        socket.send(&Frame::text(connect.as_str())).await?;
        socket.send(&Frame::text(sent)).await?;
        ensure!(socket.close_code().await? == Some(code), "{sent}");
    }
    Ok(())
}

/// RFC 6455 section 5.5.1: a close frame is the last one, even if outcomes of publications arrive later.
#[tokio::test]
async fn a_reply_that_comes_after_the_close_frame_is_not_sent() -> Result<()> {
    let redis = RedisServer::start().await?;
    let node = Builder::new()
        .set("shards", "1")
        .set("broker.url", &redis.url())
        .set("broker.publish_timeout", "1h")
        .set("broker.canary_timeout", "1h")
        .start()
        .await?;
    let token = anywhere("alice");
    let listener = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let mut socket = RawSocket::connect(node.public, PATH).await?;
    socket.send(&Frame::text(format!(r#"{{"id":1,"connect":{{"token":"{token}"}}}}"#))).await?;
    socket.receive().await?.context("an answer")?;

    redis.freeze()?;
    socket.send(&Frame::text(r#"{"id":2,"publish":{"channel":"lobby","data":"mine"}}"#)).await?;
    // An unmasked frame ends the session while its publication is in progress.
    socket.send_bytes(&[0x81, 0x00]).await?;
    let frame = socket.receive().await?.context("a close frame")?;
    ensure!(frame.close_code() == Some(1002), "{frame:?}");
    redis.thaw()?;
    listener.hears(&text("\"mine\"")).await?;
    // The broker has accepted the previous publication, and its shard has received the outcome.
    for again in ["1", "2"] {
        node.post("lobby", &token, "text/plain", again.as_bytes()).await?;
        listener.hears(&text(again)).await?;
    }

    // The node waits for the client to close its side: it has not written to a stream that it had ended.
    let open = ["protocol=\"centrifuge\""];
    ensure!(node.samples().await?.sum("tidegate_connections", &open) == 1);
    let next = socket.receive().await?;
    ensure!(next.is_none(), "{next:?} after the close frame");
    drop(socket);
    node.until_samples("gone", |samples| samples.sum("tidegate_connections", &open) == 0).await?;
    node.ensure_sound()
}

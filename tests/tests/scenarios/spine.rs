//! Two nodes, one Redis, every kind of client in one room.

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{client::Client, journal::Payload, node::Node, token::anywhere};

use crate::stage::{Stage, as_event_data, ensure_merge, payloads};

const ORIGIN: &str = "http://chat.example";
const EACH: usize = 25;

#[tokio::test]
async fn every_client_on_both_nodes_receives_every_message_in_one_order() -> Result<()> {
    let stage = Stage::set_with(|node| node.set("origins", ORIGIN)).await?;
    let (a, b) = (&stage.a, &stage.b);
    let token = anywhere("alice");
    let (ws_a, ws_b) = (a.ws("lobby", &token, ""), b.ws("lobby", &token, ""));
    let (sse_a, sse_b) = (a.url("lobby", &token, ""), b.url("lobby", &token, ""));
    let sockets = all([
        tokio::try_join!(Client::websocket(&ws_a, &[]), Client::websocket(&ws_b, &[])),
        tokio::try_join!(Client::node_websocket(&ws_a), Client::node_websocket(&ws_b)),
        tokio::try_join!(Client::python_websocket(&ws_a), Client::python_websocket(&ws_b)),
        tokio::try_join!(Client::browser_websocket(&ws_a, ORIGIN), Client::browser_websocket(&ws_b, ORIGIN)),
    ])?;
    let streams = all([
        tokio::try_join!(Client::events(&sse_a), Client::events(&sse_b)),
        tokio::try_join!(Client::node_events(&sse_a, &[]), Client::node_events(&sse_b, &[])),
        tokio::try_join!(Client::browser_events(&sse_a, ORIGIN), Client::browser_events(&sse_b, ORIGIN)),
    ])?;

    // All at once: sockets of every library, POST to both nodes, and a backend that knows only Redis.
    let senders: Vec<Vec<Payload>> =
        (0..sockets.len()).map(|n| (0..EACH).map(|i| mixed(n, i)).collect()).collect();
    let posts: Vec<Payload> = (0..EACH).map(json).collect();
    let backend: Vec<Payload> = (0..EACH).map(|i| Payload::text(format!("{{\"backend\":{i}}}"))).collect();
    let speaking = sockets.iter().zip(&senders).map(|(socket, messages)| async move {
        for message in messages {
            socket.send(message.clone()).await?;
        }
        anyhow::Ok(())
    });
    let nodes = [a, b];
    tokio::try_join!(
        futures_util::future::try_join_all(speaking),
        post_all(&nodes, &token, &posts),
        async {
            for payload in &backend {
                stage.publish("lobby", payload.bytes()).await?;
            }
            Ok(())
        },
    )?;

    let sent = [senders, vec![posts, backend]].concat();
    let total = sent.iter().map(Vec::len).sum();
    let reference = payloads(&sockets.first().context("a client")?.heard(total).await?);
    ensure_merge(&reference, &sent)?;
    for socket in &sockets {
        ensure!(payloads(&socket.heard(total).await?) == reference, "{socket:?} received another order");
    }
    for stream in &streams {
        let heard = payloads(&stream.heard(total).await?);
        ensure!(heard == as_event_data(&reference), "{stream:?} received another order");
    }
    // Nothing arrives twice: the last publication is received last.
    a.post("lobby", &token, "text/plain", b"the end").await?;
    for client in sockets.iter().chain(&streams) {
        let heard = client.heard(total + 1).await?;
        ensure!(
            heard.len() == total + 1
                && heard.last().is_some_and(|last| last.payload == Payload::text("the end"))
        );
    }
    Ok(())
}

/// Everything published after a handshake has completed is received, on every node.
#[tokio::test]
async fn a_completed_handshake_misses_nothing() -> Result<()> {
    let stage = Stage::set().await?;
    let token = anywhere("alice");
    for n in 0..30 {
        let room = format!("fresh:{n}");
        let socket = Client::websocket(&stage.b.ws(&room, &token, ""), &[]).await?;
        let stream = Client::events(&stage.a.url(&room, &token, "")).await?;
        stage.publish(&room, b"first").await?;
        ensure!(payloads(&socket.heard(1).await?) == [Payload::text("first")]);
        ensure!(payloads(&stream.heard(1).await?) == [Payload::text("first")]);
    }
    Ok(())
}

/// A backend may publish anything; payloads are not interpreted.
#[tokio::test]
async fn a_bare_publish_arrives_unchanged() -> Result<()> {
    let stage = Stage::set().await?;
    let socket = Client::websocket(&stage.a.ws("lobby", &anywhere("alice"), ""), &[]).await?;
    let raw: [&[u8]; 8] = [
        b"hello",
        b"",
        b"{\"text\":\"hi\"}",
        b"\x00\x01",
        b"\xff\xfe",
        "été\n".as_bytes(),
        b"\x01\x02\xf0",
        b"TG1",
    ];
    for payload in raw {
        stage.publish("lobby", payload).await?;
    }
    let expected = raw.map(|bytes| match std::str::from_utf8(bytes) {
        Ok(text) => Payload::text(text),
        Err(_) => Payload::binary(bytes),
    });
    ensure!(payloads(&socket.heard(raw.len()).await?) == expected);
    Ok(())
}

/// The messages of sender `n`: short, long, empty, text and bytes, all different.
fn mixed(n: usize, i: usize) -> Payload {
    match i % 5 {
        0 => Payload::text(format!("sender {n} message {i}: été 日本 🦀 \"'<>&")),
        1 => Payload::binary([&[0, 0xff, 0xfe, 0x80], format!("{n}/{i}").as_bytes()].concat()),
        2 if n == 0 && i == 2 => Payload::text(""),
        2 if n == 1 && i == 2 => Payload::binary([]),
        2 => Payload::text(format!("{{\"n\":{n},\"i\":{i}}}")),
        3 if i == 3 => Payload::text(format!("{n}/{i} {}", "long ".repeat(12 * 1024))),
        3 if i == 8 => Payload::binary([format!("{n}/{i} ").as_bytes(), &vec![0xa5; 60 * 1024]].concat()),
        _ => Payload::text(format!("{n}\n{i}\n")),
    }
}

/// JSON as its author wrote it: white space, escapes and numbers are not normalised.
fn json(i: usize) -> Payload {
    Payload::text(format!("{{ \"post\" : {i}.0 , \"\\u00e9\":[ 1e3,null ] }}"))
}

/// One after the other, alternating between the nodes.
async fn post_all(nodes: &[&Node], token: &str, payloads: &[Payload]) -> Result<()> {
    for (payload, node) in payloads.iter().zip(nodes.iter().cycle()) {
        node.post("lobby", token, "application/json", payload.bytes()).await?;
    }
    Ok(())
}

fn all<const N: usize>(pairs: [Result<(Client, Client)>; N]) -> Result<Vec<Client>> {
    let mut clients = Vec::new();
    for pair in pairs {
        let (first, second) = pair?;
        clients.extend([first, second]);
    }
    Ok(clients)
}

//! Permessage-deflate with libraries that implement it: all clients receive the same, fewer bytes are sent, and
//! nobody can attack a node with compressed data.

use anyhow::{Context as _, Result, ensure};
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::Payload,
    node::{Builder, Node},
    raw::{Frame, RawSocket},
    token::anywhere,
};

use crate::stage::{alone, payloads};

const PLAIN: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

async fn compressing() -> Result<Node> {
    Builder::new().set("compression.enabled", "true").start().await
}

/// Messages below and above the threshold that compress well, badly and not at all.
fn samples() -> Vec<Payload> {
    let line = r#"{"symbol":"TIDE","price":101.25,"currency":"EUR","venue":"XETR"}"#;
    let noise = |length: u32| -> Vec<u8> {
        (0..length).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[1]).collect()
    };
    let mut samples =
        vec![Payload::text(""), Payload::text("short"), Payload::text("été 日本 🌊".repeat(100))];
    for times in [1, 3, 4, 5, 50, 900] {
        samples.push(Payload::text(format!("[{}]", vec![line; times].join(","))));
    }
    for length in [1, 255, 256, 257, 5_000, 60_000] {
        samples.push(Payload::binary(noise(length)));
        samples.push(Payload::binary(vec![0; length as usize]));
    }
    samples
}

#[tokio::test]
async fn every_client_receives_every_message_byte_for_byte() -> Result<()> {
    let node = compressing().await?;
    let url = node.ws("lobby", &anywhere("alice"), "");
    let clients = [
        Client::websocket(&url, &[]).await?,
        Client::node_websocket(&url).await?,
        Client::node_websocket_deflated(&url, 15).await?,
        Client::node_websocket_deflated(&url, 10).await?,
        Client::python_websocket_deflated(&url).await?,
        Client::browser_websocket(&url, &format!("http://{}", node.public)).await?,
    ];
    let mut sent = Vec::new();
    for (sample, client) in samples().into_iter().zip((0..clients.len()).cycle()) {
        let sender = clients.get(client).context("one of them")?;
        sender.send(sample.clone()).await?;
        sent.push(sample);
        for client in &clients {
            client.heard(sent.len()).await?;
        }
    }
    for client in &clients {
        ensure!(payloads(&client.heard(sent.len()).await?) == sent);
    }
    Ok(())
}

#[tokio::test]
async fn a_room_of_compressing_clients_costs_fewer_bytes() -> Result<()> {
    const MEMBERS: usize = 4;
    let node = compressing().await?;
    let url = node.ws("lobby", &anywhere("alice"), "");
    let text = format!("[{}]", vec![r#"{"symbol":"TIDE","price":101.25}"#; 300].join(","));
    let mut wire = Vec::new();
    for deflated in [false, true] {
        let mut members = Vec::new();
        for _ in 0..MEMBERS {
            members.push(if deflated {
                Client::node_websocket_deflated(&url, 15).await?
            } else {
                Client::node_websocket(&url).await?
            });
        }
        let before = node.samples().await?.sum("tidegate_network_bytes_total", &["direction=\"out\""]);
        node.post("lobby", &anywhere("backend"), "text/plain", text.as_bytes()).await?;
        for member in &members {
            member.hears(&Payload::text(text.clone())).await?;
        }
        wire.push(node.samples().await?.sum("tidegate_network_bytes_total", &["direction=\"out\""]) - before);
    }
    let [whole, smaller] = wire[..] else { unreachable!("two rounds") };
    ensure!(whole > (MEMBERS * text.len()) as u64, "{wire:?}");
    ensure!(smaller < whole / 10, "{wire:?}");
    Ok(())
}

#[tokio::test]
async fn negotiation_combines_offer_and_settings() -> Result<()> {
    let node = compressing().await?;
    let off = alone().await?;
    let upgrade = |offer: &str| {
        Request::upgrade(&format!("/rooms/lobby?token={}", anywhere("alice")))
            .header("Sec-WebSocket-Extensions", offer)
    };
    let narrow = format!("{PLAIN}; server_max_window_bits=9");
    for (offer, answer) in [
        ("permessage-deflate; client_max_window_bits", Some(PLAIN)),
        ("permessage-deflate; server_max_window_bits=12", Some(narrow.as_str())),
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", Some(PLAIN)),
        ("permessage-deflate; nonsense", None),
        ("permessage-bzip2", None),
    ] {
        let response = upgrade(offer).open(node.public).await?;
        ensure!(
            response.status == 101 && response.header("sec-websocket-extensions") == answer,
            "{offer}: {response:?}"
        );
        let response = upgrade(offer).open(off.public).await?;
        ensure!(
            response.status == 101 && response.header("sec-websocket-extensions").is_none(),
            "{offer}: {response:?}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_bomb_is_refused_and_other_clients_receive_everything() -> Result<()> {
    let node = compressing().await?;
    let token = anywhere("alice");
    let neighbour = Client::websocket(&node.ws("lobby", &token, ""), &[]).await?;
    let target = format!("/rooms/lobby?token={token}");
    let headers = [("Sec-WebSocket-Extensions", "permessage-deflate")];
    let mut socket = RawSocket::connect_with(node.public, &target, &headers).await?;
    socket.send(&Frame { first: 0xc2, masked: true, claimed: None, payload: zeros(300) }).await?;
    ensure!(socket.close_code().await? == Some(1009));

    let mut socket = RawSocket::connect_with(node.public, &target, &headers).await?;
    socket.send(&Frame { first: 0xc1, masked: true, claimed: None, payload: vec![0xff; 20] }).await?;
    ensure!(socket.close_code().await? == Some(1007));

    // Compressed without negotiation.
    let mut socket = RawSocket::connect(node.public, &target).await?;
    socket.send(&Frame { first: 0xc1, masked: true, claimed: None, payload: zeros(1) }).await?;
    ensure!(socket.close_code().await? == Some(1002));

    let mut socket = RawSocket::connect_with(node.public, &target, &headers).await?;
    socket.send(&Frame { first: 0xc2, masked: true, claimed: None, payload: zeros(3) }).await?;
    neighbour.hears(&Payload::binary(vec![0; 1 + 3 * 258])).await?;
    Ok(())
}

/// A message is charged by its inflated size, and is not inflated beyond what its sender may send.
#[tokio::test]
async fn a_compressed_message_is_charged_by_its_inflated_size() -> Result<()> {
    const MESSAGE: usize = 1 + 232 * 258;
    let node = Builder::new()
        .set("compression.enabled", "true")
        .set("limits.user_bytes", "1KiB/m burst 256KiB")
        .start()
        .await?;
    let listener = Client::websocket(&node.ws("lobby", &anywhere("bob"), ""), &[]).await?;
    let target = format!("/rooms/lobby?token={}", anywhere("alice"));
    let headers = [("Sec-WebSocket-Extensions", "permessage-deflate")];
    let message = Frame { first: 0xc2, masked: true, claimed: None, payload: zeros(232) };
    ensure!(message.payload.len() < 400, "the wire costs next to nothing");

    // 256 KiB are four messages of 60 KB, from whichever of the user's sessions.
    let mut first = RawSocket::connect_with(node.public, &target, &headers).await?;
    for _ in 0..3 {
        first.send(&message).await?;
    }
    listener.heard(3).await?;
    let mut second = RawSocket::connect_with(node.public, &target, &headers).await?;
    second.send(&message).await?;
    listener.heard(4).await?;
    for socket in [&mut first, &mut second] {
        socket.send(&message).await?;
        ensure!(socket.close_code().await? == Some(1008));
    }
    node.until_samples("four messages handed on and two refused", |samples| {
        samples.sum("tidegate_limited_total", &["limit=\"user_bytes\""]) == 2
            && samples.sum("tidegate_payload_bytes_total", &["direction=\"in\""]) == 4 * MESSAGE as u64
    })
    .await?;

    // A message that fits into one step of inflating is answered like an uncompressed one.
    let mut centrifuge = RawSocket::connect_with(node.public, "/connection/websocket", &headers).await?;
    let connect = format!(r#"{{"id":1,"connect":{{"token":"{}"}}}}"#, anywhere("carol"));
    centrifuge.send(&Frame::text(connect)).await?;
    centrifuge.receive().await?;
    for id in 2..200 {
        let publish =
            format!(r#"{{"id":{id},"publish":{{"channel":"lobby","data":"{}"}}}}"#, "x".repeat(8_000));
        centrifuge.send(&Frame { first: 0xc1, ..Frame::text(stored(publish.as_bytes())) }).await?;
        let answer = centrifuge.receive().await?.context("an answer")?.payload;
        let answer = String::from_utf8(answer)?;
        if answer.contains("error") {
            ensure!(answer.contains("\"code\":111") && answer.contains(&format!("\"id\":{id}")), "{answer}");
            ensure!(id == 2 + 32, "256 KiB are 32 messages of 8 KB, not {}", id - 2);
            return Ok(());
        }
    }
    anyhow::bail!("nothing was refused");
}

/// A raw deflate stream with `bytes` in stored blocks (RFC 1951 §3.2.4).
fn stored(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    let mut stream = vec![0];
    stream.extend(length.to_le_bytes());
    stream.extend((!length).to_le_bytes());
    stream.extend(bytes);
    // An empty stored block follows, whose last four bytes are not sent.
    stream.push(0);
    stream
}

/// A raw deflate stream (RFC 1951 §3.2.6) of one zero and `references` repetitions of 258 more.
fn zeros(references: usize) -> Vec<u8> {
    let mut bits = Vec::new();
    bits.extend([0, 1, 0]); // Not the last block; fixed codes, low bit first.
    bits.extend([0, 0, 1, 1, 0, 0, 0, 0]); // The literal 0, high bit first.
    for _ in 0..references {
        bits.extend([1, 1, 0, 0, 0, 1, 0, 1]); // Length 258.
        bits.extend([0, 0, 0, 0, 0]); // Distance 1.
    }
    bits.extend([0; 7]); // End of the block.
    bits.extend([0, 0, 0]); // An empty stored block, whose last four bytes are not sent.
    bits.chunks(8).map(|byte| byte.iter().rev().fold(0, |sum, bit| sum << 1 | bit)).collect()
}

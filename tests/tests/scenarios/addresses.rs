//! Which address a client has: the socket's, unless a trusted proxy reports another, by a header or by the PROXY
//! protocol.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};

use anyhow::{Result, ensure};
use tidegate_tests::{
    client::Client,
    http::{Incoming, Request},
    journal::Payload,
    node::{Builder, Node},
    raw::RawSocket,
    token::anywhere,
};
use tokio::io::AsyncReadExt as _;

use crate::haproxy::Haproxy;

const PROXY: [u8; 4] = [127, 0, 0, 5];
const STRANGER: [u8; 4] = [127, 0, 0, 6];

/// A node that trusts one proxy.
fn behind(limits: &[(&str, &str)]) -> Builder {
    limits.iter().fold(
        Builder::new().set("public.trusted_proxies", "127.0.0.5").set("log.filter", "tidegate=debug"),
        |node, (key, value)| node.set(key, value),
    )
}

fn knock(token: &str) -> Request {
    Request::get("/rooms/lobby").header("Accept", "text/html").bearer(token)
}

/// The status of a request without a handshake, once the connection is accepted.
const IN: u16 = 406;

async fn statuses(node: &Node, request: &Request, count: usize) -> Result<Vec<u16>> {
    let mut statuses = Vec::new();
    for _ in 0..count {
        statuses.push(request.send(node.public).await?.status);
    }
    Ok(statuses)
}

#[tokio::test]
async fn headers_of_an_unlisted_peer_are_ignored() -> Result<()> {
    let node = behind(&[("limits.attempts_per_address", "1/h burst 3")]).start().await?;
    let token = anywhere("alice");
    for (n, expected) in [(1, IN), (2, IN), (3, IN), (4, 429), (5, 429)] {
        let spoofed = knock(&token)
            .from(STRANGER)
            .header("X-Forwarded-For", &format!("203.0.113.{n}"))
            .header("Forwarded", &format!("for=203.0.113.{n}"))
            .header("X-Real-IP", &format!("203.0.113.{n}"));
        ensure!(spoofed.send(node.public).await?.status == expected, "request {n}");
    }
    // Nor can it use up another client's allowance.
    let client = knock(&token).from(PROXY).header("X-Forwarded-For", "203.0.113.1");
    ensure!(statuses(&node, &client, 3).await? == [IN; 3]);
    node.until_written("127.0.0.6:").await?;
    Ok(())
}

#[tokio::test]
async fn a_trusted_proxy_reports_its_clients_addresses() -> Result<()> {
    let node = behind(&[("limits.attempts_per_address", "1/h burst 3")]).start().await?;
    let token = anywhere("alice");
    let from = |said: &str| knock(&token).from(PROXY).header("X-Forwarded-For", said);
    ensure!(statuses(&node, &from("203.0.113.7"), 4).await? == [IN, IN, IN, 429]);
    // The proxy appended the last entry; the client has forged those before it.
    ensure!(from("198.51.100.1, 203.0.113.7").send(node.public).await?.status == 429);
    ensure!(from("nonsense, 203.0.113.7, 127.0.0.5").send(node.public).await?.status == 429);
    ensure!(statuses(&node, &from("203.0.113.8"), 3).await? == [IN; 3]);
    // One customer's network counts as one address.
    ensure!(statuses(&node, &from("2001:db8:0:1::1"), 2).await? == [IN; 2]);
    ensure!(statuses(&node, &from("2001:db8:0:1::2"), 2).await? == [IN, 429]);
    ensure!(from("2001:db8:0:2::1").send(node.public).await?.status == IN);
    ensure!(from("::ffff:203.0.113.7").send(node.public).await?.status == 429);
    // The other header is not the one that this proxy writes.
    let other = knock(&token)
        .from(PROXY)
        .header("Forwarded", "for=203.0.113.77")
        .header("X-Forwarded-For", "203.0.113.7");
    ensure!(other.send(node.public).await?.status == 429);
    // Without an entry that can be parsed, the proxy's own address counts, and the limits per address apply to it.
    ensure!(statuses(&node, &from("somebody"), 2).await? == [IN; 2]);
    ensure!(statuses(&node, &knock(&token).from(PROXY), 2).await? == [IN, 429]);

    node.until_written("\"peer\":\"203.0.113.8\"").await?;
    let samples = node.ask_ops("/metrics").await?.text();
    ensure!(!samples.contains("203.0.113") && !samples.contains("127.0.0.5"), "no address becomes a label");
    Ok(())
}

#[tokio::test]
async fn the_forwarded_header_reports_client_addresses() -> Result<()> {
    let node =
        behind(&[("limits.attempts_per_address", "1/h burst 2"), ("public.forwarded_header", "forwarded")])
            .start()
            .await?;
    let token = anywhere("alice");
    let from = |said: &str| knock(&token).from(PROXY).header("Forwarded", said);
    let client = "for=198.51.100.1, For=\"[2001:db8::7]:4711\";proto=https;by=\"127.0.0.5\"";
    ensure!(statuses(&node, &from(client), 3).await? == [IN, IN, 429]);
    let spoofed = from("for=\"[2001:db8::7]\"").header("X-Forwarded-For", "203.0.113.7");
    ensure!(spoofed.send(node.public).await?.status == 429);
    ensure!(from("for=203.0.113.7").send(node.public).await?.status == IN);
    Ok(())
}

/// Sessions behind a proxy are counted by client, for as long as they last.
#[tokio::test]
async fn open_connections_are_counted_per_client_behind_a_proxy() -> Result<()> {
    let node = behind(&[("limits.connections_per_address", "2")]).start().await?;
    let token = anywhere("alice");
    let target = format!("/rooms/lobby?token={token}");
    let upgrade = |client: &str| Request::upgrade(&target).from(PROXY).header("X-Forwarded-For", client);
    let first = RawSocket::by(&upgrade("203.0.113.7"), node.public).await?;
    let stream = Request::get(&target).header("Accept", "text/event-stream");
    let stream = stream.from(PROXY).header("X-Forwarded-For", "203.0.113.7").open(node.public).await?;
    ensure!(stream.status == 200);
    let refused = upgrade("203.0.113.7").send(node.public).await?;
    ensure!(refused.status == 429 && refused.header("Retry-After").is_some(), "{refused:?}");
    let other = RawSocket::by(&upgrade("203.0.113.8"), node.public).await?;
    drop(first);
    node.until_samples("one WebSocket", |samples| {
        samples.sum("tidegate_connections", &["protocol=\"plain\""]) == 1
    })
    .await?;
    // The slot is freed with the rest of the connection, a moment after the session was counted as closed.
    let again = loop {
        let incoming = upgrade("203.0.113.7").open(node.public).await?;
        if incoming.status == 101 {
            break incoming;
        }
        ensure!(incoming.status == 429, "{}", incoming.status);
    };
    ensure!(upgrade("203.0.113.7").send(node.public).await?.status == 429);
    drop((stream, other, again));
    node.until_samples("no account", |samples| samples.sum("tidegate_limit_accounts", &[]) == 0).await?;
    Ok(())
}

/// The header of version 2 for an IPv4 client.
fn version_2(client: [u8; 4]) -> Vec<u8> {
    let [a, b, c, d] = client;
    [b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", &[a, b, c, d, 127, 0, 0, 1, 0x30, 0x39, 0, 80][..]].concat()
}

#[tokio::test]
async fn the_proxy_protocol() -> Result<()> {
    let rates = [("limits.attempts_per_address", "1/h burst 2"), ("public.proxy_protocol", "true")];
    let node = behind(&rates).start().await?;
    let token = anywhere("alice");
    let from = |header: &[u8]| knock(&token).from(PROXY).after(header);
    ensure!(from(b"PROXY TCP4 203.0.113.7 127.0.0.1 12345 80\r\n").send(node.public).await?.status == IN);
    ensure!(from(&version_2([203, 0, 113, 7])).send(node.public).await?.status == IN);
    let refused = from(&version_2([203, 0, 113, 7])).send(node.public).await?;
    ensure!(refused.status == 429 && refused.header("Retry-After").is_some(), "{refused:?}");
    ensure!(from(b"PROXY TCP6 2001:db8::7 ::1 12345 80\r\n").send(node.public).await?.status == IN);
    // A proxy's own health check counts for no client, however often it happens.
    let health = [&b"\r\n\r\n\0\r\nQUIT\n\x20\x00\0\0"[..], b"PROXY UNKNOWN\r\n"];
    for look in health.iter().cycle().take(6) {
        ensure!(from(look).send(node.public).await?.status == IN);
    }
    // An unlisted peer's connection starts as usual; its header would be an invalid request.
    ensure!(knock(&token).from(STRANGER).send(node.public).await?.status == IN);
    let spoofed = knock(&token).from(STRANGER).after(b"PROXY TCP4 203.0.113.9 127.0.0.1 1 2\r\n");
    ensure!(spoofed.send(node.public).await?.status == 400);

    // A trusted proxy that sends no header, or something else, is closed.
    for junk in [&b""[..], b"PROXY TCP4 nonsense\r\n", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff"] {
        ensure!(from(junk).send(node.public).await.is_err(), "{}", junk.escape_ascii());
    }
    let samples = node.samples().await?;
    ensure!(samples.sum("tidegate_refusals_total", &["reason=\"proxy_header\""]) == 3, "{samples:?}");
    node.until_written("\"peer\":\"203.0.113.7:12345\"").await?;
    Ok(())
}

/// A header that does not arrive, or arrives byte by byte, holds a socket no longer than a request's head may.
#[tokio::test]
async fn a_proxy_header_times_out() -> Result<()> {
    let node =
        behind(&[("public.proxy_protocol", "true"), ("public.header_timeout", "200ms")]).start().await?;
    let descriptors = node.descriptors()?;
    let mut sockets = Vec::new();
    for start in [&b""[..], b"PROXY TCP4 ", b"\r\n\r\n\0\r\nQUIT\n\x21"] {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind((PROXY, 0).into())?;
        let mut stream = socket.connect(node.public).await?;
        tokio::io::AsyncWriteExt::write_all(&mut stream, start).await?;
        sockets.push(stream);
    }
    for mut stream in sockets {
        let mut rest = Vec::new();
        let end = tokio::time::timeout(tidegate_tests::PATIENCE, stream.read_to_end(&mut rest)).await?;
        ensure!(matches!(end, Ok(0) | Err(_)), "{}", rest.escape_ascii());
    }
    node.until_descriptors(descriptors).await?;
    ensure!(node.samples().await?.sum("tidegate_refusals_total", &["reason=\"proxy_header\""]) == 3);
    Ok(())
}

#[tokio::test]
async fn ipv6_clients() -> Result<()> {
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_err() {
        return Ok(()); // a machine without IPv6; the /64 has unit tests
    }
    let node = behind(&[("public.listen", "[::]:0"), ("limits.attempts_per_address", "1/h burst 2")])
        .start()
        .await?;
    let token = anywhere("alice");
    let port = node.public.port();
    let status = |address: IpAddr| {
        let request = knock(&token);
        async move { anyhow::Ok(request.send(SocketAddr::new(address, port)).await?.status) }
    };
    let (six, four) = (Ipv6Addr::LOCALHOST.into(), IpAddr::from([127, 0, 0, 1]));
    for expected in [IN, IN, 429] {
        ensure!(status(six).await? == expected);
        // Mapped into IPv6 by the listener, but another address nevertheless.
        ensure!(status(four).await? == expected);
    }
    Ok(())
}

/// haproxy as installed, with its own implementation of both protocols.
#[tokio::test]
async fn behind_haproxy() -> Result<()> {
    for (settings, server, front) in [
        (&[("public.proxy_protocol", "true")][..], "send-proxy", "mode tcp"),
        (&[("public.proxy_protocol", "true")], "send-proxy-v2", "mode tcp"),
        (&[], "", "mode http\n  option forwardfor"),
    ] {
        let node = behind(&[settings, &[("limits.connections_per_address", "2")]].concat());
        let node = node.set("public.trusted_proxies", "127.0.0.1").start().await?;
        let defaults = format!(
            "{front}\n  timeout connect 10s\n  timeout client 60s\n  timeout server 60s\n  timeout tunnel 60s"
        );
        let server = format!("{} {server} source 127.0.0.1", node.public);
        let Some(mut proxy) = Haproxy::start(&defaults, &server)? else {
            return Ok(()); // not installed; everything above speaks its protocols
        };
        let address = proxy.address;

        let token = anywhere("alice");
        let target = format!("/rooms/lobby?token={token}");
        let from = |client: [u8; 4]| {
            Request::upgrade(&target).from(client).header("X-Forwarded-For", "198.51.100.1")
        };
        let one = RawSocket::by(&from(PROXY), address).await?;
        let two = RawSocket::by(&from(PROXY), address).await?;
        ensure!(from(PROXY).send(address).await?.status == 429, "{front} {server}: a third");
        let other: Incoming = from(STRANGER).open(address).await?;
        ensure!(other.status == 101, "{front} {server}: another client");
        // Traffic through it arrives.
        let listener = Client::websocket(&format!("ws://{address}{target}"), &[]).await?;
        let post = Request::post("/rooms/lobby", "text/plain", "hello").bearer(&token).send(address).await?;
        ensure!(post.status == 202, "{post:?}");
        ensure!(listener.heard(1).await?[0].payload == Payload::text("hello"));
        drop((one, two, other));
        proxy.stop().await?;
    }
    Ok(())
}

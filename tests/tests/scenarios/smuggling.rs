//! Requests that two readers could interpret differently: at most one answer, nothing executed twice, and nothing
//! of one user in another's connection.

use anyhow::{Context as _, Result, ensure};
use futures_util::future::join_all;
use tidegate_tests::{
    client::Client,
    http::Request,
    journal::Payload,
    node::Builder,
    proxy::Nginx,
    raw::{statuses, talk},
    token::{Token, anywhere},
    witness::Witness,
};
use tokio::net::TcpStream;

use crate::stage::payloads;

/// The bytes after the token of the outer request, and the allowed statuses. `{S}` is a complete request
/// that publishes in a room where no message may arrive.
type Row = (&'static str, &'static str, &'static [u16]);

const POST: &str = "POST /rooms/lobby HTTP/1.1\r\nHost: x\r\n";

/// Lengths and codings where one reader might use one, and another reader the other.
const ROWS: &[Row] = &[
    (
        "both framings, the length longer",
        "{P}Content-Length: {N5}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{S}",
        &[202],
    ),
    (
        "both framings, the length shorter",
        "{P}Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n{X}\r\n{S}\r\n0\r\n\r\n",
        &[202],
    ),
    ("two lengths", "{P}Content-Length: 0\r\nContent-Length: {N}\r\n\r\n{S}", &[400]),
    ("two lengths in one line", "{P}Content-Length: 0, {N}\r\n\r\n{S}", &[400]),
    ("a length with a sign", "{P}Content-Length: +{N}\r\n\r\n{S}", &[400]),
    ("a negative length", "{P}Content-Length: -1\r\n\r\n{S}", &[400]),
    ("a hexadecimal length", "{P}Content-Length: 0x0\r\n\r\n{S}", &[400]),
    ("a length with a blank in it", "{P}Content-Length: 1 0\r\n\r\n{S}", &[400]),
    ("an empty length", "{P}Content-Length:\r\n\r\n{S}", &[400]),
    ("a length of more than 64 bits", "{P}Content-Length: 18446744073709551616\r\n\r\n{S}", &[400]),
    ("an unknown coding", "{P}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{S}", &[400]),
    ("chunked, and not last", "{P}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{S}", &[400]),
    (
        "chunked, then something else",
        "{P}Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n{S}",
        &[400],
    ),
    (
        "another coding below",
        "{P}Transfer-Encoding: gzip, chunked\r\nConnection: close\r\n\r\n0\r\n\r\n{S}",
        &[501],
    ),
    (
        "an unknown coding below",
        "{P}Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n{S}",
        &[501],
    ),
    ("chunked after a vertical tab", "{P}Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n{S}", &[400]),
    (
        "chunked of HTTP/1.0",
        "POST /rooms/lobby HTTP/1.0\r\nAuthorization: Bearer {T}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{S}",
        &[400],
    ),
    ("a blank before the colon", "{P}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n{S}", &[400]),
    ("a folded line", "{P}X-A: a\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{S}", &[400]),
    ("a folded first line", "POST /rooms/lobby HTTP/1.1\r\n Host: x\r\n\r\n{S}", &[400]),
    ("a bare carriage return", "{P}X-A: a\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{S}", &[400]),
    ("a zero in a value", "{P}X-A: a\0\r\n\r\n{S}", &[400]),
    ("a name that is none", "{P}X\x01: a\r\n\r\n{S}", &[400]),
    ("no name", "{P}: a\r\n\r\n{S}", &[400]),
    ("a chunk with a sign", "{P}Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n{S}", &[400]),
    ("a chunk in hexadecimal, written so", "{P}Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n{S}", &[400]),
    (
        "a chunk of more than 64 bits",
        "{P}Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n\r\n{S}",
        &[400],
    ),
    (
        "a line feed within an extension",
        "{P}Transfer-Encoding: chunked\r\n\r\n2;a\nxx\r\n0\r\n\r\n{S}",
        &[400],
    ),
    ("a chunk longer than it says", "{P}Transfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n{S}", &[400]),
    ("a bare line feed after a chunk's size", "{P}Transfer-Encoding: chunked\r\n\r\n0\n\n{S}", &[400]),
    ("a body that looks like a request", "{P}Connection: close\r\nContent-Length: {N}\r\n\r\n{S}", &[202]),
    ("bytes behind a closed request", "{P}Connection: close\r\nContent-Length: 0\r\n\r\n{S}", &[202]),
    (
        "refused before its body",
        "POST /rooms/lobby HTTP/1.1\r\nHost: x\r\nContent-Length: {N}\r\n\r\n{S}",
        &[401],
    ),
    (
        "refused without a 100",
        "POST /rooms/lobby HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {N}\r\n\r\n{S}",
        &[401],
    ),
    ("a body too large, a request in it", "{P}Content-Length: 5000\r\n\r\n{2048}{S}", &[413]),
    (
        "a chunked body too large, a request in it",
        "{P}Transfer-Encoding: chunked\r\n\r\n801\r\n{2048}x\r\n{X}\r\n{S}\r\n0\r\n\r\n",
        &[413],
    ),
    ("a body that does not come", "{P}Content-Length: 5000\r\n\r\n{S}", &[408]),
    (
        "a GET with a body",
        "GET /rooms/lobby HTTP/1.1\r\nHost: x\r\nAccept: text/html\r\nContent-Length: {N}\r\n\r\n{S}",
        &[406],
    ),
    ("an upgrade with a body", "{U}Content-Length: {N}\r\n\r\n{S}", &[400]),
    (
        "an upgrade with a chunked body",
        "{U}Transfer-Encoding: chunked\r\n\r\n{X}\r\n{S}\r\n0\r\n\r\n",
        &[400],
    ),
    ("a request behind an upgrade", "{U}\r\n{S}", &[101]),
    (
        "a request behind a refused upgrade",
        "GET /rooms/lobby HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n{S}",
        &[401],
    ),
];

#[tokio::test]
async fn no_request_hides_within_another() -> Result<()> {
    let node = Builder::new()
        .set("public.header_timeout", "400ms")
        .set("public.keep_alive", "400ms")
        .set("public.body_timeout", "400ms")
        .set("limits.message_size", "2KiB")
        .start()
        .await?;
    let token = anywhere("alice");
    let secret = Client::websocket(&node.ws("secret", &token, ""), &[]).await?;
    let witness = Witness::of(&node).await?;
    let before = node.levels_of(2).await?;
    let exchanges = ROWS.iter().enumerate().map(|(n, (what, template, expected))| {
        let (request, node, token) = (fill(template, &token, n), &node, &token);
        async move {
            let said = talk(node.public, &request).await.with_context(|| format!("{what}: {token}"))?;
            let found = statuses(&said).with_context(|| (*what).to_owned())?;
            ensure!(
                found == *expected,
                "{what}: {expected:?} expected, not {found:?}: {}",
                String::from_utf8_lossy(&said)
            );
            anyhow::Ok(())
        }
    });
    let failed: Vec<_> = join_all(exchanges).await.into_iter().filter_map(Result::err).collect();
    ensure!(failed.is_empty(), "{failed:#?}");

    // Two honest requests in one write are two requests: the rows above could have been executed.
    let two = fill("{P}Content-Length: 1\r\n\r\nx{S}", &token, 1000);
    ensure!(statuses(&talk(node.public, &two).await?)? == [202, 202]);
    ensure!(payloads(&secret.heard(1).await?) == [Payload::text("smuggled 1000")], "{:?}", secret.now());
    ensure!(witness.finish().await? > 0);
    drop(secret);
    node.ensure_sound()?;
    let nobody =
        tidegate_tests::node::Levels { connections: 0, subscriptions: 0, rooms: 0, sockets: 0, ..before };
    node.until_levels(&nobody).await
}

/// The bytes of a row. `{P}` begins a POST and `{U}` a handshake, both with a token; `{N}` and `{X}` are the length
/// of the hidden request, decimal and hexadecimal, and `{N5}` five more.
fn fill(template: &str, token: &str, n: usize) -> Vec<u8> {
    let said = format!("smuggled {n}");
    let hidden = format!(
        "POST /rooms/secret HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\
         Content-Length: {}\r\n\r\n{said}",
        said.len()
    );
    let length = hidden.len();
    let post = format!("{POST}Authorization: Bearer {token}\r\nContent-Type: text/plain\r\n");
    let upgrade = Request::upgrade("/rooms/lobby").bearer(token).bytes(([127, 0, 0, 1], 80).into());
    let upgrade = String::from_utf8_lossy(&upgrade).trim_end().to_owned() + "\r\n";
    template
        .replace("{P}", &post)
        .replace("{U}", &upgrade)
        .replace("{T}", token)
        .replace("{N}", &length.to_string())
        .replace("{N5}", &(length + 5).to_string())
        .replace("{X}", &format!("{length:x}"))
        .replace("{2048}", &"x".repeat(2048))
        .replace("{S}", &hidden)
        .into_bytes()
}

/// A proxy keeps a few connections to the node and sends the requests of many users over them.
#[tokio::test]
async fn users_behind_a_proxy_do_not_get_each_others_data() -> Result<()> {
    const EACH: usize = 60;
    let node = Builder::new().start().await?;
    let nginx = Nginx::before(node.public).await?;
    let room = |name: &str| Token::new(name).room(name, &["subscribe", "publish"]).sign();
    let (alice, bob) = (room("alice"), room("bob"));
    let url = |name: &str, token: &str| format!("ws://{}/rooms/{name}?token={token}", nginx.address());
    let hears_alice = Client::websocket(&url("alice", &alice), &[]).await?;
    let hears_bob = Client::websocket(&url("bob", &bob), &[]).await?;
    let witness = Witness::of(&node).await?;

    let say = |name: &'static str, token: String, other: &'static str| {
        let address = nginx.address();
        async move {
            for n in 0..EACH {
                let body = format!("{name} {n}");
                let own = Request::post(&format!("/rooms/{name}"), "text/plain", body).bearer(&token);
                ensure!(own.send(address).await?.status == 202, "{name} {n}");
                // A request hidden from a careless pair of readers; the token does not grant it.
                let hidden = fill(
                    "{P}Content-Length: {N5}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{S}",
                    &token,
                    n,
                );
                let found = statuses(&talk(address, &hidden).await?)?;
                ensure!(found.iter().all(|status| [400, 403].contains(status)), "{name} {n}: {found:?}");
                let foreign =
                    Request::post(&format!("/rooms/{other}"), "text/plain", "intruder").bearer(&token);
                ensure!(foreign.send(address).await?.status == 403, "{name} {n}");
                let cut =
                    Request::post(&format!("/rooms/{name}"), "text/plain", "x".repeat(99)).bearer(&token);
                let cut = cut.bytes(address);
                let mut stream = TcpStream::connect(address).await?;
                let half = cut.len() - 50;
                tokio::io::AsyncWriteExt::write_all(&mut stream, cut.get(..half).unwrap_or_default()).await?;
            }
            Ok(())
        }
    };
    tokio::try_join!(say("alice", alice.clone(), "bob"), say("bob", bob.clone(), "alice"))?;
    for (client, name) in [(&hears_alice, "alice"), (&hears_bob, "bob")] {
        let expected: Vec<_> = (0..EACH).map(|n| Payload::text(format!("{name} {n}"))).collect();
        ensure!(payloads(&client.heard(EACH).await?) == expected, "{name} hears {:?}", client.now());
    }
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

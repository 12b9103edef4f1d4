//! TLS with real processes: input that is not TLS, incomplete handshakes, and a certificate that changes under load.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::{SinkExt as _, StreamExt as _, future::try_join_all};
use tidegate_tests::{
    PATIENCE,
    node::Node,
    raw::{start, talk},
    tls::{Pair, PairOfFiles},
    token::anywhere,
    witness::Witness,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::{WebSocketStream, client_async, tungstenite::Message};

/// The first byte of every TLS alert record (RFC 8446 §5.1).
const ALERT: u8 = 21;

async fn websocket(node: &Node, pair: &Pair, room: &str) -> Result<WebSocketStream<TlsStream<TcpStream>>> {
    let url = format!("ws://localhost/rooms/{room}?token={}&echo=false", anywhere("alice"));
    let stream = pair.connect(node.public).await?;
    Ok(client_async(url, stream).await?.0)
}

async fn witness(node: &Node, pair: &Pair, room: &str) -> Result<Witness> {
    let url = format!("ws://localhost/rooms/{room}?token={}", anywhere("the witness"));
    Witness::over(pair.connect(node.public).await?, &url).await
}

/// A `ClientHello` of an old version, without extensions.
fn old_hello(version: u8) -> Vec<u8> {
    let body = [&[3, version][..], &[7; 32], &[0, 0, 4, 0xc0, 0x13, 0, 0x2f, 1, 0]].concat();
    let length = u8::try_from(body.len()).expect("a short hello");
    [&[22, 3, version.min(1), 0, length + 4, 1, 0, 0, length][..], &body].concat()
}

#[tokio::test]
async fn input_that_is_not_tls_is_refused_and_leaves_nothing() -> Result<()> {
    let pair = Pair::new()?;
    let files = PairOfFiles::of(&pair)?;
    let node = files.node().set("public.header_timeout", "500ms").start().await?;
    let witness = witness(&node, &pair, "witness").await?;
    let before = node.levels_of(1).await?;
    let memory = node.resident_bytes()?;

    let junk = vec![0xa5; 1 << 20];
    // A handshake message may span records: this one continues for as long as it can.
    let endless = [&[22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff][..], &junk].concat();
    let record: Vec<u8> = [&[22, 3, 1, 0, 64, 1, 0, 0xf0, 0][..], &[7; 60]].concat();
    let pieces = [&record[..], &[&[22, 3, 1, 0, 64][..], &[7; 64]].concat().repeat(4000)].concat();
    // Bytes, and whether an alert must arrive: it is certain if none of our input is left unread.
    let rows: Vec<(&str, Vec<u8>, bool)> = vec![
        ("plain HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), true),
        (
            "a plain WebSocket handshake",
            tidegate_tests::http::Request::upgrade("/rooms/a").bytes(node.public),
            true,
        ),
        ("HTTP/2 with prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), true),
        ("SSLv2", [&[0x80, 0x2e, 1, 0, 2][..], &[0; 43]].concat(), false),
        ("SSLv3", old_hello(0), true),
        ("TLS 1.0", old_hello(1), true),
        ("TLS 1.1", old_hello(2), true),
        ("application data first", [&[23, 3, 3, 0, 16][..], &[7; 16]].concat(), true),
        ("an alert first", vec![ALERT, 3, 3, 0, 2, 2, 40], false),
        ("a record that is too long", [&[22, 3, 3, 0xff, 0xff][..], &junk].concat(), false),
        ("junk in a handshake record", [&[22, 3, 1, 0x40, 0][..], &junk].concat(), false),
        ("a handshake message of 16 MiB", endless, false),
        ("a hello of 60 KiB in pieces", pieces, false),
        ("zeroes", vec![0; 1000], false),
        ("junk", junk, false),
    ];
    for _ in 0..5 {
        for (what, bytes, alert) in &rows {
            let said = talk(node.public, bytes).await.context(*what)?;
            ensure!(said.first().is_none_or(|first| *first == ALERT), "{what}: {said:?}");
            ensure!(!alert || !said.is_empty(), "{what}: no alert");
            if what.starts_with("TLS 1.") || *what == "SSLv3" {
                // handshake_failure(40) or protocol_version(70), fatal (RFC 8446 §6).
                ensure!(matches!(said.get(5..7), Some(&[2, 40 | 70])), "{what}: {said:?}");
            }
        }
    }
    // A handshake that stops, at any byte: two hundred at a time, all closed in time.
    let mut whole = Vec::new();
    let hello = hello_of(&pair)?;
    for n in 0..200 {
        let mut stream = TcpStream::connect(node.public).await?;
        stream.write_all(start(&hello, n * hello.len() / 200)).await?;
        whole.push(stream);
    }
    for mut stream in whole {
        let mut said = Vec::new();
        drop(
            timeout(PATIENCE, stream.read_to_end(&mut said))
                .await
                .context("a stalled handshake is closed")?,
        );
    }
    let refused = node.samples().await?.sum("tidegate_refusals_total", &["reason=\"tls\""]);
    ensure!(refused == 5 * rows.len() as u64 + 200, "{refused} refusals");
    let grown = node.resident_bytes()?.saturating_sub(memory);
    ensure!(grown < 16 << 20, "{grown} bytes for junk");
    node.until_levels(&before).await?;
    ensure!(witness.finish().await? > 0);
    node.ensure_sound()
}

/// The shard's thread leaves hellos to the thread for cryptography, one job for each piece that arrives. That
/// thread waits for no client.
#[tokio::test]
async fn stalled_handshakes_hold_no_thread() -> Result<()> {
    const STALLED: u32 = 50;
    let pair = Pair::new()?;
    let files = PairOfFiles::of(&pair)?;
    let node = files.node().set("shards", "1").start().await?;
    let done = "tidegate_crypto_wait_seconds_count";
    let until_done = |count: u32| {
        let node = &node;
        async move {
            let what = format!("{count} steps of handshakes");
            node.until_samples(&what, |samples| {
                samples.sum(done, &["work=\"handshake\""]) >= u64::from(count)
                    && samples.sum("tidegate_crypto_waiting", &[]) == 0
            })
            .await
        }
    };
    let hello = hello_of(&pair)?;
    let (begin, end) = hello.split_at(hello.len() / 2);
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let mut stream = TcpStream::connect(node.public).await?;
        stream.set_nodelay(true)?;
        stream.write_all(begin).await?;
        stalled.push(stream);
    }
    until_done(STALLED).await?;

    let witness = witness(&node, &pair, "witness").await?;
    until_done(STALLED + 1).await?;

    for stream in &mut stalled {
        stream.write_all(end).await?;
        let mut answer = [0; 6];
        timeout(PATIENCE, stream.read_exact(&mut answer)).await.context("the node's hello")??;
        ensure!(matches!(answer, [22, 3, 3, _, _, 2]), "no hello: {answer:?}");
    }
    let samples = until_done(2 * STALLED + 1).await?;
    let steps = samples.sum(done, &["work=\"handshake\""]);
    ensure!(steps == u64::from(2 * STALLED + 1), "{steps} steps");
    ensure!(samples.sum(done, &["work=\"token\""]) == 0, "a shared secret needs no other thread");
    ensure!(witness.finish().await? > 0);
    drop(stalled);
    node.ensure_sound()
}

/// The first bytes of a client.
fn hello_of(pair: &Pair) -> Result<Vec<u8>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(pair.certificate().clone())?;
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut client = rustls::ClientConnection::new(std::sync::Arc::new(config), "localhost".try_into()?)?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello)?;
    Ok(hello)
}

/// Open sockets keep their certificate and lose nothing; new ones get the new certificate.
#[tokio::test]
async fn a_certificate_changes_under_load() -> Result<()> {
    const LISTENERS: usize = 30;
    let (first, second, third) = (Pair::new()?, Pair::new()?, Pair::new()?);
    let files = PairOfFiles::of(&first)?;
    let node = files.node().start().await?;
    let old_witness = witness(&node, &first, "old").await?;

    let old = try_join_all((0..LISTENERS).map(|_| websocket(&node, &first, "load"))).await?;
    let mut listening = JoinSet::new();
    for socket in old {
        listening.spawn(listen(socket));
    }
    let mut publisher = websocket(&node, &first, "load").await?;
    let (told, mut stop) = watch::channel(false);
    let (said, mut count) = watch::channel(0);
    let mut publishing = JoinSet::new();
    publishing.spawn(async move {
        let mut number = 0_usize;
        while !*stop.borrow_and_update() {
            publisher.send(Message::text(number.to_string())).await?;
            number += 1;
            said.send_replace(number);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        publisher.send(Message::text("end")).await?;
        anyhow::Ok((number, publisher))
    });
    let mut until_more = async || {
        let now = *count.borrow();
        timeout(PATIENCE, count.wait_for(|count| *count >= now + 200)).await.context("the load")??;
        anyhow::Ok(now + 200)
    };
    let reloads = |result: &'static str, count: u64| {
        let node = &node;
        async move {
            node.until_samples(&format!("{count} reloads that are {result}"), |samples| {
                samples.sum("tidegate_tls_reloads_total", &[&format!("result=\"{result}\"")]) >= count
            })
            .await
        }
    };

    until_more().await?;
    files.put(&second)?;
    node.hang_up()?;
    reloads("ok", 1).await?;
    ensure!(first.connect(node.public).await.is_err(), "the old certificate is not given any more");
    let new_witness = witness(&node, &second, "new").await?;
    let at_change = until_more().await?;

    // An invalid pair changes nothing.
    std::fs::write(files.key(), "no key")?;
    node.hang_up()?;
    reloads("failed", 1).await?;
    drop(second.connect(node.public).await?);

    // Through the files alone.
    let ok = node.samples().await?.sum("tidegate_tls_reloads_total", &["result=\"ok\""]);
    files.put(&third)?;
    reloads("ok", ok + 1).await?;
    let newest = witness(&node, &third, "newest").await?;
    ensure!(second.connect(node.public).await.is_err());
    until_more().await?;

    told.send_replace(true);
    let (sent, _publisher) = publishing.join_next().await.context("the publisher")???;
    while let Some(heard) = listening.join_next().await {
        let heard = heard??;
        ensure!(heard == sent, "{sent} were published, {heard} were received");
    }
    let counted = [old_witness.finish().await?, new_witness.finish().await?, newest.finish().await?];
    println!(
        "{sent} published, {at_change} before the first change was over; each of {LISTENERS} old sockets heard \
         all {sent}; sockets of the three certificates counted {counted:?}"
    );
    // The publisher's.
    node.levels_of(1).await?;
    node.ensure_sound()
}

/// Receives numbers in order until the end message. Returns how many.
async fn listen(mut socket: WebSocketStream<TlsStream<TcpStream>>) -> Result<usize> {
    let mut numbers = 0;
    loop {
        let heard = timeout(PATIENCE, socket.next()).await.context("the next number")?;
        match heard.context("it was cut off")?? {
            Message::Text(text) if text.as_str() == "end" => return Ok(numbers),
            Message::Text(text) => {
                ensure!(text.as_str() == numbers.to_string(), "{numbers} was expected, not {text}");
                numbers += 1;
            }
            _ => {}
        }
    }
}

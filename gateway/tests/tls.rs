//! A node with TLS and real clients over loopback.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::similar_names,
    reason = "tests and their helpers fail with a panic"
)]

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, ProtocolVersion, RootCertStore, StreamOwned,
    SupportedProtocolVersion,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName},
    version::{TLS12, TLS13},
};
use tempfile::TempDir;
use tidegate::{
    auth::{Grant, Subject, mint},
    config::{Config, Sources},
    node::{Departure, Node},
};
use tungstenite::{Bytes, Message, WebSocket, protocol::WebSocketConfig};

const SECRET: &str = "correct horse battery staple, and more";
const PATIENCE: Duration = Duration::from_secs(20);

type Tls = StreamOwned<ClientConnection, TcpStream>;

struct Stage {
    runtime: tokio::runtime::Runtime,
    node: Option<Node>,
    files: TempDir,
    trusted: CertificateDer<'static>,
    token: String,
}

/// Writes a new certificate and key, and returns the certificate.
fn put_pair(directory: &Path) -> CertificateDer<'static> {
    let pair = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    std::fs::write(directory.join("tls.crt"), pair.cert.pem()).unwrap();
    std::fs::write(directory.join("tls.key"), pair.signing_key.serialize_pem()).unwrap();
    pair.cert.der().clone()
}

fn config(files: &Path, more: &[(&str, &str)]) -> Config {
    let (cert, key) = (files.join("tls.crt"), files.join("tls.key"));
    let mut flags = vec![
        ("public.listen", "127.0.0.1:0"),
        ("ops.listen", "127.0.0.1:0"),
        ("shards", "1"),
        ("drain.window", "0s"),
        ("auth.hs256_secret", SECRET),
        ("limits.message_size", "16MiB"),
        ("limits.outbound", "20MiB"),
        ("limits.commands", "off"),
        ("limits.bytes", "off"),
        ("limits.user_bytes", "off"),
        ("tls.cert", cert.to_str().unwrap()),
        ("tls.key", key.to_str().unwrap()),
    ];
    flags.extend(more);
    let flags = flags.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    Config::load(&Sources { flags, ..Sources::default() }).unwrap()
}

/// A client configuration with these versions and protocols. It keeps session tickets.
fn client(
    trusted: &CertificateDer<'static>,
    versions: &[&'static SupportedProtocolVersion],
    protocols: &[&[u8]],
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

impl Stage {
    fn new(more: &[(&str, &str)]) -> Self {
        let files = tempfile::tempdir().unwrap();
        let trusted = put_pair(files.path());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let node = runtime.block_on(async { Node::start(config(files.path(), more)) }).unwrap();
        let grants: [Grant; 1] = ["*=subscribe,publish".parse().unwrap()];
        let subject = Subject::new("alice").unwrap();
        let now = SystemTime::now().into();
        let token = mint::mint(SECRET.as_bytes(), &subject, &grants, Duration::from_secs(600), now).unwrap();
        Self { runtime, node: Some(node), files, trusted, token: token.expose().to_owned() }
    }

    fn tcp(&self) -> TcpStream {
        let tcp = TcpStream::connect(self.node.as_ref().unwrap().public_address()).unwrap();
        tcp.set_read_timeout(Some(PATIENCE)).unwrap();
        tcp.set_write_timeout(Some(PATIENCE)).unwrap();
        tcp
    }

    /// A connection with a completed handshake.
    fn tls(&self, trusted: &CertificateDer<'static>) -> std::io::Result<Tls> {
        self.tls_with(&client(trusted, rustls::ALL_VERSIONS, &[b"h2", b"http/1.1"]))
    }

    fn tls_with(&self, config: &Arc<ClientConfig>) -> std::io::Result<Tls> {
        Self::tls_over(self.tcp(), config)
    }

    fn tls_over(tcp: TcpStream, config: &Arc<ClientConfig>) -> std::io::Result<Tls> {
        let name = ServerName::try_from("localhost").unwrap();
        let mut tls = StreamOwned::new(ClientConnection::new(Arc::clone(config), name).unwrap(), tcp);
        while tls.conn.is_handshaking() {
            tls.conn.complete_io(&mut tls.sock)?;
        }
        Ok(tls)
    }

    fn websocket(&self, room: &str) -> WebSocket<Tls> {
        self.websocket_over(self.tls(&self.trusted).unwrap(), room)
    }

    fn websocket_over(&self, tls: Tls, room: &str) -> WebSocket<Tls> {
        let url = format!("wss://localhost/rooms/{room}?token={}&echo=true", self.token);
        let large = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        tungstenite::client::client_with_config(url, tls, Some(large)).unwrap().0
    }

    fn metrics(&self) -> String {
        let mut ops = TcpStream::connect(self.node.as_ref().unwrap().ops_address()).unwrap();
        ops.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        ops.read_to_string(&mut text).unwrap();
        text
    }

    fn until_measured(&self, sample: &str) {
        let by = Instant::now() + PATIENCE;
        while !self.metrics().lines().any(|line| line == sample) {
            assert!(Instant::now() < by, "no {sample}:\n{}", self.metrics());
            std::thread::yield_now();
        }
    }

    fn reload(&self) {
        self.runtime.block_on(self.node.as_ref().unwrap().reload_files());
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            self.runtime.block_on(node.drain());
        }
    }
}

fn echo(socket: &mut WebSocket<Tls>, payload: Bytes) {
    socket.send(Message::Binary(payload.clone())).unwrap();
    assert!(socket.read().unwrap() == Message::Binary(payload), "the echo equals what was sent");
}

/// The PROXY header comes before TLS; a refusal by a limit comes within TLS.
#[test]
fn tls_starts_after_the_proxy_header() {
    let stage = Stage::new(&[
        ("public.trusted_proxies", "127.0.0.1"),
        ("public.proxy_protocol", "true"),
        ("limits.attempts_per_address", "1/h burst 2"),
    ]);
    for (client, status) in [("7", "404"), ("7", "404"), ("7", "429"), ("8", "404")] {
        let mut tcp = stage.tcp();
        tcp.write_all(format!("PROXY TCP4 203.0.113.{client} 127.0.0.1 12345 443\r\n").as_bytes()).unwrap();
        let mut tls = Stage::tls_over(tcp, &self::client(&stage.trusted, rustls::ALL_VERSIONS, &[])).unwrap();
        tls.write_all(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut answer = String::new();
        tls.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
}

#[test]
fn websockets_carry_messages_of_every_size() {
    let stage = Stage::new(&[]);
    let mut socket = stage.websocket("a");
    assert_eq!(socket.get_ref().conn.alpn_protocol(), Some(&b"http/1.1"[..]));
    for size in [0, 1, 125, 16 * 1024, 16 * 1024 + 1, 70_000, 16 * 1024 * 1024] {
        let payload: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
        echo(&mut socket, payload.into());
    }
    // Many frames in few TLS records, answered in order.
    for number in 0..2_000_u32 {
        socket.write(Message::Binary(number.to_be_bytes().to_vec().into())).unwrap();
    }
    socket.flush().unwrap();
    for number in 0..2_000_u32 {
        assert_eq!(socket.read().unwrap(), Message::Binary(number.to_be_bytes().to_vec().into()));
    }
    socket.close(None).unwrap();
    let end = loop {
        if let Err(end) = socket.read() {
            break end;
        }
    };
    assert!(matches!(end, tungstenite::Error::ConnectionClosed), "a close with close_notify, not {end}");
}

#[test]
fn an_event_stream_receives_a_post() {
    let stage = Stage::new(&[]);
    let mut listener = stage.tls(&stage.trusted).unwrap();
    let token = &stage.token;
    let head = format!(
        "GET /rooms/a?token={token} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
    );
    listener.write_all(head.as_bytes()).unwrap();
    let mut heard = Vec::new();
    let mut until = |text: &str| {
        let mut buffer = [0; 1024];
        while !String::from_utf8_lossy(&heard).contains(text) {
            let read = listener.read(&mut buffer).unwrap();
            assert!(read > 0, "the stream goes on");
            heard.extend_from_slice(&buffer[..read]);
        }
    };
    until("200 OK");
    let mut publisher = stage.tls(&stage.trusted).unwrap();
    let post = format!(
        "POST /rooms/a HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\
         Content-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"
    );
    publisher.write_all(post.as_bytes()).unwrap();
    let mut status = [0; 12];
    publisher.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 202");
    until("data: hello");
}

#[test]
fn a_client_that_does_not_read_is_closed_as_slow() {
    let stage = Stage::new(&[("limits.message_size", "64KiB"), ("limits.outbound", "256KiB")]);
    let _stalled = stage.websocket("a");
    let mut busy = stage.websocket("a");
    let by = Instant::now() + PATIENCE;
    while !stage.metrics().contains("\ntidegate_slow_consumers_total 1\n") {
        assert!(Instant::now() < by, "{}", stage.metrics());
        for _ in 0..16 {
            echo(&mut busy, vec![7; 60_000].into());
        }
    }
    echo(&mut busy, vec![7; 60_000].into());
}

#[test]
fn a_changed_certificate_applies_to_new_connections() {
    let stage = Stage::new(&[]);
    let mut old = stage.websocket("a");
    let second = put_pair(stage.files.path());
    stage.reload();
    stage.tls(&second).unwrap();
    stage.tls(&stage.trusted).unwrap_err();
    echo(&mut old, Bytes::from_static(b"still here"));

    // The node detects the changed files without a signal.
    let third = put_pair(stage.files.path());
    stage.until_measured(r#"tidegate_tls_reloads_total{result="ok"} 2"#);
    stage.tls(&third).unwrap();

    // An invalid pair is refused.
    std::fs::write(stage.files.path().join("tls.key"), "no key").unwrap();
    stage.reload();
    stage.until_measured(r#"tidegate_tls_reloads_total{result="failed"} 1"#);
    stage.tls(&third).unwrap();
    echo(&mut old, Bytes::from_static(b"still here, too"));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    let expiry = stage.metrics().lines().find_map(|line| {
        line.strip_prefix("tidegate_tls_certificate_expiry_timestamp_seconds ")?.parse::<f64>().ok()
    });
    assert!(expiry.is_some_and(|expiry| expiry > now), "{expiry:?}");
}

/// A client with a ticket skips the full handshake, even after the certificate has changed.
#[test]
fn tls_sessions_are_resumed() {
    let stage = Stage::new(&[]);
    for (version, name) in [(&TLS13, ProtocolVersion::TLSv1_3), (&TLS12, ProtocolVersion::TLSv1_2)] {
        let trusted = put_pair(stage.files.path());
        stage.reload();
        let config = client(&trusted, &[version], &[]);
        for (round, expected) in
            [HandshakeKind::Full, HandshakeKind::Resumed, HandshakeKind::Resumed].into_iter().enumerate()
        {
            if round == 2 {
                put_pair(stage.files.path());
                stage.reload();
            }
            // TLS 1.3 tickets arrive with the first bytes after the handshake.
            let mut socket = stage.websocket_over(stage.tls_with(&config).unwrap(), "a");
            echo(&mut socket, Bytes::from_static(b"hello"));
            let tls = &socket.get_ref().conn;
            assert_eq!(
                (tls.protocol_version(), tls.handshake_kind()),
                (Some(name), Some(expected)),
                "{round}"
            );
        }
    }
}

#[test]
fn a_client_with_only_tls_1_2_is_served() {
    let stage = Stage::new(&[]);
    let config = client(&stage.trusted, &[&TLS12], &[b"http/1.1"]);
    let mut socket = stage.websocket_over(stage.tls_with(&config).unwrap(), "a");
    for size in [1, 16 * 1024 + 1, 300_000] {
        echo(&mut socket, vec![7; size].into());
    }
    assert_eq!(socket.get_ref().conn.alpn_protocol(), Some(&b"http/1.1"[..]));
}

#[test]
fn a_client_that_offers_only_h2_gets_an_alert() {
    let stage = Stage::new(&[]);
    let refused = stage.tls_with(&client(&stage.trusted, rustls::ALL_VERSIONS, &[b"h2"])).unwrap_err();
    assert!(refused.to_string().contains("NoApplicationProtocol"), "{refused}");
    stage.until_measured(r#"tidegate_refusals_total{reason="tls"} 1"#);
    // A client without ALPN speaks HTTP/1.1.
    let config = client(&stage.trusted, rustls::ALL_VERSIONS, &[]);
    echo(&mut stage.websocket_over(stage.tls_with(&config).unwrap(), "a"), Bytes::from_static(b"hello"));
}

/// A pending handshake does not delay a draining node.
#[test]
fn a_drain_does_not_wait_for_handshakes() {
    let mut stage = Stage::new(&[("public.header_timeout", "1h"), ("drain.deadline", "20s")]);
    let mut silent = stage.tcp();
    let mut begun = stage.tcp();
    begun.write_all(&[22, 3, 1, 2]).unwrap();
    stage.until_measured("tidegate_sockets 2");
    let node = stage.node.take().unwrap();
    assert_eq!(stage.runtime.block_on(node.drain()), Departure::Complete);
    for socket in [&mut silent, &mut begun] {
        assert_eq!(socket.read(&mut [0; 16]).unwrap_or_default(), 0, "it is closed");
    }
}

#[test]
fn input_that_is_not_tls_is_refused() {
    let stage = Stage::new(&[("public.header_timeout", "300ms")]);
    let mut plain = stage.tcp();
    plain.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    plain.read_to_end(&mut answer).unwrap();
    assert_eq!(answer.first(), Some(&21), "a TLS alert (RFC 8446 §5.1): {answer:?}");
    stage.until_measured(r#"tidegate_refusals_total{reason="tls"} 1"#);

    let mut cut = stage.tcp();
    cut.write_all(&[22, 3, 1, 2]).unwrap();
    drop(cut);
    stage.until_measured(r#"tidegate_refusals_total{reason="tls"} 2"#);

    let mut slow = stage.tcp();
    slow.write_all(&[22, 3, 1]).unwrap();
    assert_eq!(slow.read(&mut [0; 16]).unwrap_or_default(), 0, "it is closed");
    stage.until_measured(r#"tidegate_refusals_total{reason="tls"} 3"#);
}

#[test]
fn a_node_does_not_start_with_a_mismatched_pair() {
    let files = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let complaint = || {
        let started = runtime.block_on(async { Node::start(config(files.path(), &[])) });
        started.err().expect("it does not start").to_string()
    };
    assert!(complaint().starts_with("tls.cert ("), "{}", complaint());
    put_pair(files.path());
    let cert = std::fs::read(files.path().join("tls.crt")).unwrap();
    put_pair(files.path());
    std::fs::write(files.path().join("tls.crt"), cert).unwrap();
    assert!(complaint().contains("expected the private key of the first certificate"), "{}", complaint());
    std::fs::write(files.path().join("tls.crt"), "nothing").unwrap();
    assert!(complaint().contains("expected at least one certificate"), "{}", complaint());
    put_pair(files.path());
    std::fs::write(files.path().join("tls.key"), "nothing").unwrap();
    assert!(complaint().contains("expected one unencrypted private key"), "{}", complaint());
}

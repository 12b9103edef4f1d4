//! Fetching a key set over HTTPS: only from a server with a valid certificate.

#![allow(clippy::unwrap_used, reason = "tests and their helpers fail with a panic")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tempfile::TempDir;
use tidegate::{
    config::{Config, Sources},
    node::Node,
};

const PATIENCE: Duration = Duration::from_secs(20);
const SET: &str =
    r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"1","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

/// A server for `localhost`, and its certificate. Runs until the test process ends.
struct Server {
    address: SocketAddr,
    certificate: String,
    /// Requests received after a completed handshake.
    requests: Arc<AtomicUsize>,
}

impl Server {
    fn start() -> Self {
        let pair = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![pair.cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let (config, count) = (Arc::new(config), Arc::clone(&requests));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
                let mut reader = BufReader::new(StreamOwned::new(connection, stream));
                // A client that does not trust the certificate disconnects before its first line.
                if reader.by_ref().lines().map_while(Result::ok).any(|line| line.is_empty()) {
                    count.fetch_add(1, Ordering::Relaxed);
                    let length = SET.len();
                    let answer = format!(
                        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{SET}"
                    );
                    let stream = reader.get_mut();
                    drop(stream.write_all(answer.as_bytes()));
                    stream.conn.send_close_notify();
                    drop(stream.flush());
                }
            }
        });
        Self { address, certificate: pair.cert.pem(), requests }
    }

    fn url(&self, host: &str) -> String {
        format!("https://{host}:{}/jwks.json", self.address.port())
    }
}

fn config(url: &str, ca_file: &Path) -> Config {
    let flags = [
        ("public.listen", "127.0.0.1:0"),
        ("ops.listen", "127.0.0.1:0"),
        ("shards", "1"),
        ("drain.window", "0s"),
        ("auth.jwks_url", url),
        ("auth.jwks_ca_file", ca_file.to_str().unwrap()),
    ];
    let flags = flags.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    Config::load(&Sources { flags, ..Sources::default() }).unwrap()
}

fn ask(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Repeats the request until the response contains `text`.
fn until(address: SocketAddr, path: &str, text: &str) {
    let end = Instant::now() + PATIENCE;
    loop {
        let answer = ask(address, path);
        if answer.contains(text) {
            return;
        }
        assert!(Instant::now() < end, "{path} has no {text:?}: {answer}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

fn with_node(url: &str, ca: &str, check: impl FnOnce(SocketAddr)) {
    let files = TempDir::new().unwrap();
    let ca_file = files.path().join("ca.pem");
    std::fs::write(&ca_file, ca).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let node = runtime.block_on(async { Node::start(config(url, &ca_file)) }).unwrap();
    check(node.ops_address());
    runtime.block_on(node.drain());
}

#[test]
fn a_key_set_server_with_a_trusted_certificate_is_accepted() {
    let server = Server::start();
    with_node(&server.url("localhost"), &server.certificate, |ops| {
        until(ops, "/readyz", "200 OK");
        until(ops, "/metrics", "tidegate_jwks_keys 1\n");
    });
    assert_eq!(server.requests.load(Ordering::Relaxed), 1);
}

#[test]
fn a_key_set_server_without_a_trusted_certificate_gets_no_request() {
    let (server, other) = (Server::start(), Server::start());
    // First another authority, then a host name that the certificate does not have.
    for (host, ca) in [("localhost", &other.certificate), ("127.0.0.1", &server.certificate)] {
        with_node(&server.url(host), ca, |ops| {
            until(ops, "/metrics", "tidegate_jwks_refreshes_total{result=\"failed\"} 2\n");
            assert!(ask(ops, "/readyz").contains("503 "));
        });
    }
    assert_eq!(server.requests.load(Ordering::Relaxed), 0);
}

#[test]
fn unreadable_authorities_prevent_a_start() {
    let files = TempDir::new().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ca_file = files.path().join("ca.pem");
    for (text, expected) in [(None, "can be read"), (Some("nothing"), "at least one certificate")] {
        if let Some(text) = text {
            std::fs::write(&ca_file, text).unwrap();
        }
        let config = config("https://localhost:1/", &ca_file);
        let error = runtime.block_on(async { Node::start(config) }).err().unwrap().to_string();
        assert!(error.starts_with("auth.jwks_ca_file") && error.contains(expected), "{error}");
    }
}

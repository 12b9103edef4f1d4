//! Token issuers: keys, and a server that publishes a key set.
//!
//! Owns key pairs for signing and a tiny HTTP server that can count requests, delay answers, answer anything, or be
//! down. Does not know what a node does with the answers.

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Result, bail};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use crate::{PATIENCE, file, token::Token};

/// A key pair for ES256, with a name.
#[derive(Debug)]
pub struct SigningKey {
    id: String,
    pair: KeyPair,
}

impl SigningKey {
    /// A new one.
    pub fn new(id: &str) -> Result<Self> {
        Ok(Self { id: id.to_owned(), pair: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)? })
    }

    /// Signs a token with this key's name in the header.
    pub fn sign(&self, token: Token) -> String {
        self.sign_as(token, |_| {})
    }

    /// The same with a modified header.
    pub fn sign_as(&self, token: Token, change: impl FnOnce(&mut Header)) -> String {
        let mut header = Header { kid: Some(self.id.clone()), ..Header::new(Algorithm::ES256) };
        change(&mut header);
        let key = EncodingKey::from_ec_der(self.pair.serialized_der());
        jsonwebtoken::encode(&header, &token.into_claims(), &key).expect("a key pair signs JSON")
    }

    /// The public part as a JWK (RFC 7517).
    pub fn jwk(&self) -> Value {
        // An uncompressed point: 4, x, y (SEC 1 §2.3.3).
        let coordinates = self.pair.der_bytes().get(1..).unwrap_or_default();
        let (x, y) = coordinates.split_at(coordinates.len() / 2);
        let part = |bytes| URL_SAFE_NO_PAD.encode(bytes);
        json!({ "kty": "EC", "crv": "P-256", "use": "sig", "kid": self.id, "x": part(x), "y": part(y) })
    }

    /// The public part in PEM.
    pub fn public_pem(&self) -> String {
        self.pair.public_key_pem()
    }

    /// The private part in PEM, which must never appear in a log.
    pub fn private_pem(&self) -> String {
        self.pair.serialize_pem()
    }
}

/// A key set of these keys.
pub fn key_set(keys: &[&SigningKey]) -> String {
    json!({ "keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>() }).to_string()
}

/// A key of some algorithm, and a token signed with it by OpenSSL (through Node.js).
#[derive(Debug, serde::Deserialize)]
pub struct Foreign {
    /// The algorithm's name in a header.
    pub algorithm: String,
    /// The key's name.
    pub kid: String,
    /// The secret of an HMAC key.
    pub secret: Option<String>,
    /// The public key of any other algorithm, in PEM.
    pub pem: Option<String>,
    /// The same as a JWK.
    pub jwk: Option<Value>,
    /// The token.
    pub token: String,
}

/// A key of each algorithm and a token for `subject`, none of them made by the node's own libraries.
pub async fn foreign_keys(claims: Token) -> Result<Vec<Foreign>> {
    let claims = claims.into_claims().to_string();
    let script = file("clients/issuer.mjs");
    let output = timeout(PATIENCE, Command::new("node").arg(script).arg(claims).output()).await??;
    if !output.status.success() {
        bail!("issuer.mjs: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A server that publishes a key set. It stops when dropped.
#[derive(Debug)]
pub struct Issuer {
    address: SocketAddr,
    state: Arc<watch::Sender<State>>,
    _tasks: JoinSet<()>,
}

#[derive(Debug)]
struct State {
    /// The whole response; without one, connections are closed at once.
    answer: Option<Vec<u8>>,
    held: bool,
    requests: usize,
}

impl Issuer {
    /// Publishes these keys.
    pub async fn start(keys: &[&SigningKey]) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let answer = Some(ok(&key_set(keys)));
        let state = Arc::new(watch::Sender::new(State { answer, held: false, requests: 0 }));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, Arc::clone(&state)));
        Ok(Self { address, state, _tasks: tasks })
    }

    /// The URL of the key set.
    pub fn url(&self) -> String {
        format!("http://{}/jwks.json", self.address)
    }

    /// Publishes exactly these keys from now on.
    pub fn publish(&self, keys: &[&SigningKey]) {
        self.answer(&ok(&key_set(keys)));
    }

    /// Sends this response from now on, byte for byte.
    pub fn answer(&self, answer: &[u8]) {
        self.state.send_modify(|state| state.answer = Some(answer.to_vec()));
    }

    /// Closes every connection without a response from now on.
    pub fn be_away(&self) {
        self.state.send_modify(|state| state.answer = None);
    }

    /// Accepts requests, but answers none before [`Self::release`].
    pub fn hold(&self) {
        self.state.send_modify(|state| state.held = true);
    }

    /// Answers the requests that are waiting.
    pub fn release(&self) {
        self.state.send_modify(|state| state.held = false);
    }

    /// How many requests have arrived.
    pub fn requests(&self) -> usize {
        self.state.borrow().requests
    }

    /// Waits until this many requests have arrived.
    pub async fn until_requests(&self, count: usize) -> Result<()> {
        let mut state = self.state.subscribe();
        match timeout(PATIENCE, state.wait_for(|state| state.requests >= count)).await {
            Ok(_) => Ok(()),
            Err(_) => bail!("{} requests have come, {count} were expected", self.requests()),
        }
    }
}

/// A successful response with this body.
pub fn ok(body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

async fn serve(listener: TcpListener, state: Arc<watch::Sender<State>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(exchange(stream, Arc::clone(&state)));
    }
}

/// Serves one request. Errors are left to the client to notice.
async fn exchange(mut stream: TcpStream, state: Arc<watch::Sender<State>>) {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if !matches!(stream.read_buf(&mut head).await, Ok(count) if count > 0) {
            return;
        }
    }
    state.send_modify(|state| state.requests += 1);
    let mut changes = state.subscribe();
    let Ok(answer) = changes.wait_for(|state| !state.held).await.map(|state| state.answer.clone()) else {
        return;
    };
    if let Some(answer) = answer {
        drop(stream.write_all(&answer).await);
        drop(stream.shutdown().await);
    }
}

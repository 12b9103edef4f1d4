//! One HTTP exchange, byte for byte as the test wants it.
//!
//! A client library would repair, refuse or hide what a test needs to send and see. This one sends what it is
//! given over its own connection and returns the response. It follows no redirect, keeps no
//! connection alive and decodes nothing but chunks.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::PATIENCE;

/// The largest head that is accepted.
const MAX_HEAD: usize = 64 * 1024;

/// A request to be sent.
#[derive(Clone, Debug)]
pub struct Request {
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    source: Option<IpAddr>,
    preface: Vec<u8>,
}

/// A response.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    headers: Vec<(String, String)>,
    /// The body, with chunks joined.
    pub body: Vec<u8>,
}

impl Request {
    /// A request with a method and a target exactly as they are to appear on the request line.
    pub fn new(method: &str, target: &str) -> Self {
        Self {
            method: method.to_owned(),
            target: target.to_owned(),
            headers: Vec::new(),
            body: Vec::new(),
            source: None,
            preface: Vec::new(),
        }
    }

    /// `GET`
    pub fn get(target: &str) -> Self {
        Self::new("GET", target)
    }

    /// `POST` with a body.
    pub fn post(target: &str, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::new("POST", target).header("Content-Type", content_type).body(body)
    }

    /// A `GET` that asks for a WebSocket, with everything that RFC 6455 §4.1 requires.
    pub fn upgrade(target: &str) -> Self {
        Self::get(target)
            .header("Connection", "Upgrade")
            .header("Upgrade", "websocket")
            .header("Sec-WebSocket-Version", "13")
            .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
    }

    /// Adds this header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Removes all headers of this name.
    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(own, _)| !own.eq_ignore_ascii_case(name));
        self
    }

    /// Adds `Authorization: Bearer …`.
    #[must_use]
    pub fn bearer(self, token: &str) -> Self {
        self.header("Authorization", &format!("Bearer {token}"))
    }

    /// Adds this body and its `Content-Length`.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// Sends it from this address of this machine.
    #[must_use]
    pub fn from(mut self, source: impl Into<IpAddr>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Sends these bytes before the request.
    #[must_use]
    pub fn after(mut self, preface: impl Into<Vec<u8>>) -> Self {
        self.preface = preface.into();
        self
    }

    /// Sends it over a new connection and reads the whole response.
    pub async fn send(&self, address: SocketAddr) -> Result<Response> {
        let what = || format!("{} {}", self.method, self.target.split('?').next().unwrap_or_default());
        let exchange = async {
            let mut incoming = self.open(address).await?;
            let mut body = Vec::new();
            if incoming.status != 101 && self.method != "HEAD" {
                while let Some(chunk) = incoming.chunk().await? {
                    body.extend_from_slice(&chunk);
                }
            }
            anyhow::Ok(Response { status: incoming.status, headers: incoming.headers, body })
        };
        timeout(PATIENCE, exchange).await.with_context(what)?.with_context(what)
    }

    /// Sends it over a new connection and returns as soon as the head of the response has arrived.
    pub async fn open(&self, address: SocketAddr) -> Result<Incoming> {
        self.open_over(self.connect(address).await.context("connect")?).await
    }

    /// The same over an existing connection.
    pub async fn open_over(&self, mut stream: TcpStream) -> Result<Incoming> {
        let address = stream.peer_addr()?;
        stream.write_all(&self.bytes(address)).await.context("send the request")?;
        Incoming::read(stream).await
    }

    async fn connect(&self, address: SocketAddr) -> Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(source) = self.source {
            socket.bind((source, 0).into())?;
        }
        Ok(socket.connect(address).await?)
    }

    /// The bytes to write.
    pub fn bytes(&self, address: SocketAddr) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\nHost: {address}\r\n", self.method, self.target);
        for (name, value) in &self.headers {
            write!(head, "{name}: {value}\r\n").expect("writing to a string cannot fail");
        }
        if !self.body.is_empty() || self.method == "POST" {
            write!(head, "Content-Length: {}\r\n", self.body.len()).expect("writing to a string cannot fail");
        }
        let closes = !self.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("connection"));
        head.push_str(if closes { "Connection: close\r\n\r\n" } else { "\r\n" });
        [&self.preface, head.as_bytes(), &self.body].concat()
    }
}

impl Response {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("a JSON body, not {:?}", self.text()))
    }

    /// The body as problem details (RFC 9457), which repeat the status.
    pub fn problem(&self) -> Result<Value> {
        let media_type = self.header("content-type").unwrap_or_default();
        ensure!(media_type.starts_with("application/problem+json"), "a problem, not {media_type:?}");
        let problem = self.json()?;
        let status = problem.get("status").and_then(Value::as_u64);
        ensure!(status == Some(self.status.into()), "status {} is repeated in {problem}", self.status);
        ensure!(problem.get("title").is_some_and(Value::is_string), "a title in {problem}");
        Ok(problem)
    }
}

/// A response whose body is still arriving.
#[derive(Debug)]
pub struct Incoming {
    stream: TcpStream,
    buffer: Vec<u8>,
    framing: Framing,
    /// The size of the head in bytes.
    pub head_length: usize,
    /// The status code.
    pub status: u16,
    headers: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug)]
enum Framing {
    Length(usize),
    Chunked,
    ToTheEnd,
}

impl Incoming {
    /// Reads the head of a response.
    pub async fn read(mut stream: TcpStream) -> Result<Self> {
        let mut buffer = Vec::new();
        loop {
            let mut space = [httparse::EMPTY_HEADER; 64];
            let mut head = httparse::Response::new(&mut space);
            if let httparse::Status::Complete(length) =
                head.parse(&buffer).with_context(|| format!("a head, not {:?}", lossy(&buffer)))?
            {
                let status = head.code.context("a complete head has a status")?;
                let headers: Vec<_> =
                    head.headers.iter().map(|line| (line.name.to_owned(), lossy(line.value))).collect();
                buffer.drain(..length);
                let framing = Framing::of(status, &headers)?;
                return Ok(Self { stream, buffer, framing, head_length: length, status, headers });
            }
            ensure!(buffer.len() < MAX_HEAD, "the head takes more than {MAX_HEAD} bytes");
            ensure!(stream.read_buf(&mut buffer).await? > 0, "closed within the head: {:?}", lossy(&buffer));
        }
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// The next bytes of the body, `None` at its proper end. Not cancel safe.
    pub async fn chunk(&mut self) -> Result<Option<Vec<u8>>> {
        match self.framing {
            Framing::Length(0) => Ok(None),
            Framing::Length(left) => {
                if self.buffer.is_empty() {
                    self.more().await?;
                }
                let taken = self.take(left.min(self.buffer.len()));
                self.framing = Framing::Length(left - taken.len());
                Ok(Some(taken))
            }
            Framing::Chunked => {
                let line = self.line().await?;
                let size = line.split(';').next().unwrap_or_default();
                let size =
                    usize::from_str_radix(size, 16).with_context(|| format!("a chunk's size: {line:?}"))?;
                while self.buffer.len() < size + 2 {
                    self.more().await?;
                }
                let chunk = self.take(size);
                ensure!(self.take(2) == b"\r\n", "a chunk ends with CRLF");
                Ok((size > 0).then_some(chunk))
            }
            Framing::ToTheEnd => {
                if self.buffer.is_empty() && self.stream.read_buf(&mut self.buffer).await? == 0 {
                    return Ok(None);
                }
                Ok(Some(self.take(self.buffer.len())))
            }
        }
    }

    /// The connection itself, and the bytes read beyond the head.
    pub fn into_stream(self) -> (TcpStream, Vec<u8>) {
        (self.stream, self.buffer)
    }

    async fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\r\n") {
                let line = self.take(end);
                self.take(2);
                return Ok(lossy(&line));
            }
            self.more().await?;
        }
    }

    async fn more(&mut self) -> Result<()> {
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            bail!("the connection closed within the body");
        }
        Ok(())
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        self.buffer.drain(..count).collect()
    }
}

impl Framing {
    fn of(status: u16, headers: &[(String, String)]) -> Result<Self> {
        if status == 101 {
            return Ok(Self::ToTheEnd);
        }
        if header(headers, "transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            return Ok(Self::Chunked);
        }
        match header(headers, "content-length") {
            Some(length) => Ok(Self::Length(length.parse().context("Content-Length")?)),
            None if status == 204 || status == 304 => Ok(Self::Length(0)),
            None => Ok(Self::ToTheEnd),
        }
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

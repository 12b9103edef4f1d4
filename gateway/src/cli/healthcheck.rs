//! One GET request over plain HTTP/1.1, for containers without another client.
//!
//! Reads only the status of the response: no redirects, no TLS, no body.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs},
    time::{Duration, Instant},
};

use http::{StatusCode, Uri, uri::Scheme};

/// The time limit for the whole exchange.
const DEADLINE: Duration = Duration::from_secs(5);

/// A status line is `HTTP/1.1 200 OK`. A server that sends more than this without a line break does not speak
/// HTTP.
const MAX_STATUS_LINE: usize = 1024;

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("expected a URL such as http://127.0.0.1:9090/readyz")]
    Url,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the response is not HTTP")]
    NotHttp,
}

/// The readiness URL of a node on this machine that listens at `ops`.
pub(super) fn readiness_url(ops: SocketAddr) -> String {
    let ip = match ops.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("http://{}/readyz", SocketAddr::new(ip, ops.port()))
}

/// Requests `url` and returns the status of the response.
pub(super) fn get(url: &str) -> Result<StatusCode, Error> {
    get_within(url, DEADLINE)
}

pub(super) fn get_within(url: &str, time: Duration) -> Result<StatusCode, Error> {
    let url: Uri = url.parse().map_err(|_| Error::Url)?;
    let (Some(authority), Some(path)) = (url.authority(), url.path_and_query()) else {
        return Err(Error::Url);
    };
    if url.scheme() != Some(&Scheme::HTTP) || authority.as_str().contains('@') {
        return Err(Error::Url);
    }
    let deadline = Instant::now() + time;
    let mut stream = connect(authority.host(), authority.port_u16().unwrap_or(80), deadline)?;
    stream.set_write_timeout(Some(left(deadline)?))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    let mut buffer = [0; 256];
    while !answer.contains(&b'\n') && answer.len() < MAX_STATUS_LINE {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => answer.extend(buffer.iter().take(read)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A socket's read timeout has passed.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(timed_out().into()),
            Err(error) => return Err(error.into()),
        }
    }
    parse_status(&answer).ok_or(Error::NotHttp)
}

/// Tries each address of the host in turn.
fn connect(host: &str, port: u16, deadline: Instant) -> io::Result<TcpStream> {
    let name = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "the host has no address"));
    for address in (name, port).to_socket_addrs()? {
        result = TcpStream::connect_timeout(&address, left(deadline)?);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// Parses `HTTP/1.1 200 …` (RFC 9112 §4).
fn parse_status(answer: &[u8]) -> Option<StatusCode> {
    let line = answer.split(|byte| *byte == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    words.next()?.strip_prefix("HTTP/1.").and_then(|_| StatusCode::from_bytes(words.next()?.as_bytes()).ok())
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(timed_out()) } else { Ok(left) }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer in time")
}

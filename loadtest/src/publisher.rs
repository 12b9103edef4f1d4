//! The one connection that publishes.
//!
//! Owns how a batch of payloads becomes bytes for each way into a room, writes a batch with one system
//! call, and looks at the answers without waiting for them. It does not pace itself.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use rustix::net::{RecvFlags, SendFlags};

use crate::{
    target::{Redis, RedisAddress, Target, Via},
    websocket::{self, Leftover, Opcode},
};

/// How long the far side may refuse to take a batch, or to answer a greeting.
const PATIENCE: Duration = Duration::from_secs(10);

/// What one look at the answers may take, and the largest answer that may wait for its end.
const SCRATCH: usize = websocket::MAX_FRAME + 64 * 1024;

/// A connection that publishes.
#[derive(Debug)]
pub struct Publisher {
    socket: OwnedFd,
    speech: Speech,
    out: Vec<u8>,
    scratch: Vec<u8>,
    leftover: Leftover,
    sent: u64,
}

#[derive(Debug)]
enum Speech {
    WebSocket,
    /// Everything before the value of `Content-Length`.
    Http(String),
    /// The topic.
    Redis(String),
    /// The yardstick's own: a count and a length (`u32`, big-endian), then that many ready-made frames.
    Yardstick,
}

impl Publisher {
    /// Connects, upgrades or authenticates, and is ready to publish.
    pub fn connect(via: &Via) -> anyhow::Result<Self> {
        let connected = match via {
            Via::WebSocket(target) => Self::websocket(target),
            Via::Http(target) => Self::http(target),
            Via::Redis(redis) => Self::redis(redis),
        };
        connected.with_context(|| format!("cannot publish by {via}"))
    }

    /// Connects to the yardstick's control port.
    pub fn yardstick(address: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self::new(tcp(address)?.into(), Speech::Yardstick))
    }

    /// Publishes `batch`, payloads of `size` bytes one after the other, together.
    pub fn publish(&mut self, batch: &[u8], size: usize) -> anyhow::Result<()> {
        self.out.clear();
        let Self { speech, out, sent, .. } = self;
        if let Speech::Yardstick = speech {
            out.extend_from_slice(&u32::try_from(batch.len() / size)?.to_be_bytes());
            out.extend_from_slice(&u32::try_from(websocket::unmasked_size(size))?.to_be_bytes());
        }
        for payload in batch.chunks_exact(size) {
            *sent += 1;
            match speech {
                Speech::WebSocket => websocket::write_masked(out, Opcode::Text, payload, *sent),
                Speech::Yardstick => websocket::write_unmasked(out, Opcode::Text, payload),
                Speech::Http(head) => {
                    write!(out, "{head}{size}\r\n\r\n")?;
                    out.extend_from_slice(payload);
                }
                Speech::Redis(topic) => {
                    write!(out, "*3\r\n$7\r\nPUBLISH\r\n${}\r\n{topic}\r\n${size}\r\n", topic.len())?;
                    out.extend_from_slice(payload);
                    out.extend_from_slice(b"\r\n");
                }
            }
        }
        self.flush()?;
        self.listen()
    }

    /// Looks at what has been answered so far. A refusal is an error.
    pub fn listen(&mut self) -> anyhow::Result<()> {
        loop {
            let held = self.leftover.restore(&mut self.scratch);
            let space = self.scratch.get_mut(held..).unwrap_or_default();
            ensure!(!space.is_empty(), "an answer to a publication does not end");
            let received = match rustix::net::recv(&self.socket, space, RecvFlags::DONTWAIT) {
                Ok((0, _)) => bail!("the connection that publishes was closed by the far side"),
                Ok((received, _)) => received,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
                Err(error) => return Err(error).context("the connection that publishes failed"),
            };
            let bytes = self.scratch.get(..held + received).unwrap_or_default();
            self.out.clear();
            let rest = match &self.speech {
                Speech::WebSocket => hear_websocket(bytes, &mut self.out)?,
                Speech::Http(_) => hear_http(bytes)?,
                Speech::Redis(_) => hear_redis(bytes)?,
                Speech::Yardstick => &[],
            };
            self.leftover.keep(rest);
            self.flush()?;
            if received == 0 {
                return Ok(());
            }
        }
    }

    fn new(socket: OwnedFd, speech: Speech) -> Self {
        let (out, scratch, leftover) = (Vec::new(), vec![0; SCRATCH], Leftover::default());
        Self { socket, speech, out, scratch, leftover, sent: 0 }
    }

    fn websocket(target: &Target) -> anyhow::Result<Self> {
        let request = websocket::upgrade_request(&target.authority, &target.path_and_query);
        let mut publisher = Self::new(tcp(target.address)?.into(), Speech::WebSocket);
        publisher.greet(&request, |bytes| Ok(websocket::read_upgrade(bytes)?))?;
        Ok(publisher)
    }

    fn http(target: &Target) -> anyhow::Result<Self> {
        let head = format!(
            "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: ",
            target.path_and_query, target.authority
        );
        Ok(Self::new(tcp(target.address)?.into(), Speech::Http(head)))
    }

    fn redis(redis: &Redis) -> anyhow::Result<Self> {
        let socket: OwnedFd = match &redis.at {
            RedisAddress::Tcp(address) => tcp(*address)?.into(),
            RedisAddress::Unix(path) => {
                let socket = UnixStream::connect(path)
                    .with_context(|| format!("cannot connect to {}", path.display()))?;
                socket.set_write_timeout(Some(PATIENCE))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                socket.into()
            }
        };
        let mut publisher = Self::new(socket, Speech::Redis(redis.topic.clone()));
        if !redis.auth.is_empty() {
            let mut command = format!("*{}\r\n$4\r\nAUTH\r\n", redis.auth.len() + 1).into_bytes();
            for argument in &redis.auth {
                write!(command, "${}\r\n{argument}\r\n", argument.len())?;
            }
            publisher.greet(&command, |bytes| {
                let rest = hear_redis(bytes)?;
                Ok((rest.len() < bytes.len()).then_some(bytes.len() - rest.len()))
            })?;
        }
        Ok(publisher)
    }

    /// Says `words` and waits until `understood` says how long the answer was. What follows it is kept.
    fn greet(
        &mut self,
        words: &[u8],
        understood: impl Fn(&[u8]) -> anyhow::Result<Option<usize>>,
    ) -> anyhow::Result<()> {
        self.out.clear();
        self.out.extend_from_slice(words);
        self.flush()?;
        let mut filled = 0;
        loop {
            let space = self.scratch.get_mut(filled..).unwrap_or_default();
            // Waits: the socket has a read time-out.
            let (received, _) = rustix::net::recv(&self.socket, space, RecvFlags::empty())
                .context("no answer to the greeting")?;
            ensure!(received > 0, "the far side hung up instead of answering");
            filled += received;
            let bytes = self.scratch.get(..filled).unwrap_or_default();
            if let Some(length) = understood(bytes)? {
                self.leftover.keep(bytes.get(length..).unwrap_or_default());
                return Ok(());
            }
        }
    }

    /// Writes all of `out`, with one system call unless the socket's buffer is full.
    fn flush(&mut self) -> anyhow::Result<()> {
        let mut rest = self.out.as_slice();
        while !rest.is_empty() {
            match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => bail!("the far side took no publication for {PATIENCE:?}"),
                Err(error) => return Err(error).context("the connection that publishes failed"),
            }
        }
        Ok(())
    }
}

fn tcp(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let socket = TcpStream::connect_timeout(&address, PATIENCE)
        .with_context(|| format!("cannot connect to {address}"))?;
    socket.set_nodelay(true)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// What a server sends to its publisher: pings, perhaps the room's own messages, hopefully no close.
fn hear_websocket<'a>(bytes: &'a [u8], out: &mut Vec<u8>) -> anyhow::Result<&'a [u8]> {
    let mut closed = false;
    let rest = websocket::read_frames(bytes, |frame| match frame.opcode {
        Opcode::Ping => websocket::write_masked(out, Opcode::Pong, frame.payload, 2),
        Opcode::Close => closed = true,
        Opcode::Text | Opcode::Binary | Opcode::Pong => {}
    })?;
    ensure!(!closed, "the server closed the connection that publishes");
    Ok(rest)
}

fn hear_http(mut bytes: &[u8]) -> anyhow::Result<&[u8]> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(head) = response.parse(bytes).context("the answer is not HTTP/1.1")?
        else {
            return Ok(bytes);
        };
        let status = response.code.unwrap_or_default();
        ensure!((200..300).contains(&status), "a publication was refused with status {status}");
        let length = response
            .headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case("content-length"))
            .and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse::<usize>().ok());
        let body = match (status, length) {
            (204, _) => 0,
            (_, Some(length)) => length,
            (_, None) => bail!("an answer without Content-Length"),
        };
        match bytes.get(head.saturating_add(body)..) {
            Some(next) => bytes = next,
            None => return Ok(bytes),
        }
    }
}

fn hear_redis(mut bytes: &[u8]) -> anyhow::Result<&[u8]> {
    while let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") {
        let (line, rest) = bytes.split_at(end);
        match line.first() {
            Some(b':' | b'+') => {}
            _ => bail!("Redis answered {:?}", String::from_utf8_lossy(line)),
        }
        bytes = rest.get(2..).unwrap_or_default();
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_answers_one_after_the_other_and_in_parts() {
        let two = b"HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 204 No Content\r\n\r\n";
        assert_eq!(hear_http(two).unwrap(), b"");
        for cut in 0..two.len() {
            let rest = hear_http(&two[..cut]).unwrap();
            assert!(two[..cut].ends_with(rest));
            assert_eq!(hear_http(&[rest, &two[cut..]].concat()).unwrap(), b"");
        }
        assert!(hear_http(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n").is_err());
    }

    #[test]
    fn redis_answers_and_refusals() {
        assert_eq!(hear_redis(b":1\r\n:12\r\n:3").unwrap(), b":3");
        assert_eq!(hear_redis(b"+OK\r\n").unwrap(), b"");
        let error = hear_redis(b":1\r\n-NOAUTH Authentication required.\r\n").unwrap_err();
        assert!(error.to_string().contains("NOAUTH"), "{error}");
    }

    #[test]
    fn a_publisher_hears_pings_and_a_close() {
        let (mut wire, mut out) = (Vec::new(), Vec::new());
        websocket::write_unmasked(&mut wire, Opcode::Ping, b"p");
        websocket::write_unmasked(&mut wire, Opcode::Text, b"echo");
        assert_eq!(hear_websocket(&wire, &mut out).unwrap(), b"");
        assert_eq!(out.first(), Some(&0x8A));
        websocket::write_unmasked(&mut wire, Opcode::Close, &[3, 232]);
        assert!(hear_websocket(&wire, &mut out).is_err());
    }
}

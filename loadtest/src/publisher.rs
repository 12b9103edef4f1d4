//! The one connection that publishes without a client: by HTTP, to Redis, or to the yardstick.
//!
//! Owns the encoding of a batch for each of these, writes a batch with one system call, and reads answers
//! without waiting for them. It does not pace itself.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::{fd::AsFd, unix::net::UnixStream},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    target::{Address, NUMBER, Redis, RedisAddress},
    tls::Stream,
    token::Credentials,
    web::authorization,
    websocket::{self, Leftover, Opcode},
};

/// How long the peer may take to accept a batch, or to answer the greeting.
const PATIENCE: Duration = Duration::from_secs(10);

/// The size of one read of answers, which also bounds an incomplete answer.
const SCRATCH: usize = websocket::MAX_FRAME + 64 * 1024;

/// A connection that publishes.
#[derive(Debug)]
pub struct Publisher {
    channel: Channel,
    speech: Speech,
    out: Vec<u8>,
    scratch: Vec<u8>,
    leftover: Leftover,
}

#[derive(Debug)]
enum Channel {
    Tcp(Stream),
    Unix(UnixStream),
}

#[derive(Debug)]
enum Speech {
    /// The path, and everything between it and the value of `Content-Length`.
    Http(String, String),
    /// The topic, split at the placeholder for the room's number.
    Redis(Vec<String>),
    /// The yardstick's format: the number of writes per socket, a count and a length (`u32`, big-endian),
    /// then that many frames.
    Yardstick { coalesce: bool },
}

impl Publisher {
    /// Connects to an HTTP server.
    pub fn http(address: &Address, credentials: &Credentials) -> anyhow::Result<Self> {
        let token = credentials.of(u32::MAX)?;
        let credentials = authorization(address.basic.as_ref(), token.as_deref());
        let head = format!(
            " HTTP/1.1\r\nHost: {}\r\n{credentials}Content-Type: text/plain; charset=utf-8\r\nContent-Length: ",
            address.authority
        );
        let mut stream = Stream::Clear(tcp(address.socket)?);
        if let Some(tls) = &address.tls {
            stream = tls.wrap(stream)?;
            while !stream.shake().context("the TLS handshake")? {
                wait(&stream, PollFlags::IN)?;
            }
        }
        Ok(Self::new(Channel::Tcp(stream), Speech::Http(address.path_and_query.clone(), head)))
    }

    /// Connects to Redis and authenticates.
    pub fn redis(redis: &Redis) -> anyhow::Result<Self> {
        let channel = match &redis.at {
            RedisAddress::Tcp(address) => Channel::Tcp(Stream::Clear(tcp(*address)?)),
            RedisAddress::Unix(path) => {
                let socket = UnixStream::connect(path)
                    .with_context(|| format!("cannot connect to {}", path.display()))?;
                socket.set_nonblocking(true)?;
                Channel::Unix(socket)
            }
        };
        let mut publisher =
            Self::new(channel, Speech::Redis(redis.topic.split(NUMBER).map(str::to_owned).collect()));
        if !redis.auth.is_empty() {
            let mut command = format!("*{}\r\n$4\r\nAUTH\r\n", redis.auth.len() + 1).into_bytes();
            for argument in &redis.auth {
                write!(command, "${}\r\n{argument}\r\n", argument.len())?;
            }
            publisher.out = command;
            publisher.flush()?;
            publisher.await_word()?;
        }
        Ok(publisher)
    }

    /// Connects to the yardstick's control port. With `coalesce`, a batch is one write per socket.
    pub fn yardstick(address: SocketAddr, coalesce: bool) -> anyhow::Result<Self> {
        let channel = Channel::Tcp(Stream::Clear(tcp(address)?));
        Ok(Self::new(channel, Speech::Yardstick { coalesce }))
    }

    /// Publishes `batch`, consecutive payloads of `size` bytes, together; each goes to the room at the same
    /// index of `rooms`.
    pub fn publish(&mut self, batch: &[u8], size: usize, rooms: &[u32]) -> anyhow::Result<()> {
        self.out.clear();
        let Self { speech, out, .. } = self;
        if let Speech::Yardstick { coalesce } = *speech {
            out.extend_from_slice(&u32::from(coalesce).to_be_bytes());
            out.extend_from_slice(&u32::try_from(batch.len() / size)?.to_be_bytes());
            out.extend_from_slice(&u32::try_from(websocket::unmasked_size(size))?.to_be_bytes());
        }
        for (payload, room) in batch.chunks_exact(size).zip(rooms) {
            match speech {
                Speech::Yardstick { .. } => websocket::write_unmasked(out, Opcode::Text, &[payload]),
                Speech::Http(path, head) => {
                    out.extend_from_slice(b"POST ");
                    numbered(out, path, *room)?;
                    write!(out, "{head}{size}\r\n\r\n")?;
                    out.extend_from_slice(payload);
                }
                Speech::Redis(parts) => {
                    let digits = room.checked_ilog10().map_or(1, |log| log as usize + 1);
                    let text: usize = parts.iter().map(String::len).sum();
                    let length = text + digits * parts.len().saturating_sub(1);
                    out.extend_from_slice(b"*3\r\n$7\r\nPUBLISH\r\n$");
                    write!(out, "{length}\r\n")?;
                    for (number, part) in parts.iter().enumerate() {
                        if number > 0 {
                            write!(out, "{room}")?;
                        }
                        out.extend_from_slice(part.as_bytes());
                    }
                    write!(out, "\r\n${size}\r\n")?;
                    out.extend_from_slice(payload);
                    out.extend_from_slice(b"\r\n");
                }
            }
        }
        self.flush()?;
        self.listen()
    }

    /// Reads the answers so far. A refusal is an error.
    pub fn listen(&mut self) -> anyhow::Result<()> {
        while self.hear()? {}
        Ok(())
    }

    fn await_word(&mut self) -> anyhow::Result<()> {
        while !self.hear()? {
            self.channel.wait(PollFlags::IN).context("no answer to the greeting")?;
        }
        self.listen()
    }

    /// Reads what has arrived; returns whether there was anything.
    fn hear(&mut self) -> anyhow::Result<bool> {
        let held = self.leftover.restore(&mut self.scratch);
        let space = self.scratch.get_mut(held..).unwrap_or_default();
        ensure!(!space.is_empty(), "the answer to a publication is too long");
        let received = match self.channel.read(space) {
            Ok(0) => bail!("the connection that publishes was closed by the peer"),
            Ok(received) => received,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(error) => return Err(error).context("the connection that publishes failed"),
        };
        let bytes = self.scratch.get(..held + received).unwrap_or_default();
        let rest = match &self.speech {
            Speech::Http(..) => hear_http(bytes)?,
            Speech::Redis(..) => hear_redis(bytes)?,
            Speech::Yardstick { .. } => &[],
        };
        self.leftover.keep(rest);
        Ok(received > 0)
    }

    fn new(channel: Channel, speech: Speech) -> Self {
        Self { channel, speech, out: Vec::new(), scratch: vec![0; SCRATCH], leftover: Leftover::default() }
    }

    /// Writes all of `out`, with one system call unless the socket's buffer is full.
    fn flush(&mut self) -> anyhow::Result<()> {
        let mut written = 0;
        while let Some(rest) = self.out.get(written..).filter(|rest| !rest.is_empty()) {
            match self.channel.write(rest) {
                Ok(some) => written += some,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.channel.wait(PollFlags::OUT).context("the peer does not read publications")?;
                }
                Err(error) => return Err(error).context("the connection that publishes failed"),
            }
        }
        while let Channel::Tcp(stream) = &mut self.channel
            && stream.holds_back()
        {
            match stream.flush() {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
                Err(_) => wait(stream, PollFlags::OUT)?,
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

impl Channel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(socket) => socket.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(socket) => socket.write(bytes),
        }
    }

    fn wait(&self, what: PollFlags) -> anyhow::Result<()> {
        match self {
            Self::Tcp(stream) => wait(stream, what),
            Self::Unix(socket) => wait(socket, what),
        }
    }
}

fn wait(on: &impl AsFd, what: PollFlags) -> anyhow::Result<()> {
    let timeout = Timespec::try_from(PATIENCE).context("a time-out")?;
    let ready = match poll(&mut [PollFd::new(on, what)], Some(&timeout)) {
        Err(rustix::io::Errno::INTR) => 1,
        ready => ready?,
    };
    ensure!(ready > 0, "nothing for {PATIENCE:?}");
    Ok(())
}

fn tcp(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let socket = TcpStream::connect_timeout(&address, PATIENCE)
        .with_context(|| format!("cannot connect to {address}"))?;
    socket.set_nodelay(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Writes `template` with the room's number inserted.
fn numbered(out: &mut Vec<u8>, template: &str, room: u32) -> io::Result<()> {
    match template.split_once(NUMBER) {
        Some((before, after)) => write!(out, "{before}{room}{}", after.replace(NUMBER, &room.to_string())),
        None => write!(out, "{template}"),
    }
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
    fn http_answers_are_read_in_sequence_and_in_parts() {
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
    fn every_placeholder_of_a_topic_is_replaced() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = RedisAddress::Tcp(listener.local_addr().unwrap());
        let redis = Redis { at, auth: Vec::new(), topic: "a{room}:{room}".into() };
        let mut publisher = Publisher::redis(&redis).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        publisher.publish(b"xxyyzz", 2, &[0, 9, 10]).unwrap();
        drop(publisher);
        let mut said = String::new();
        server.read_to_string(&mut said).unwrap();
        let command = |topic: &str, payload| {
            format!("*3\r\n$7\r\nPUBLISH\r\n${}\r\n{topic}\r\n$2\r\n{payload}\r\n", topic.len())
        };
        assert_eq!(said, command("a0:0", "xx") + &command("a9:9", "yy") + &command("a10:10", "zz"));
    }

    #[test]
    fn redis_answers_and_refusals() {
        assert_eq!(hear_redis(b":1\r\n:12\r\n:3").unwrap(), b":3");
        assert_eq!(hear_redis(b"+OK\r\n").unwrap(), b"");
        let error = hear_redis(b":1\r\n-NOAUTH Authentication required.\r\n").unwrap_err();
        assert!(error.to_string().contains("NOAUTH"), "{error}");
    }
}

//! Commands to Redis, one at a time, on one connection, and what Redis pushes to subscribers.
//!
//! Owns the connection and the greeting of this, the [`tap`](crate::tap) and the [`relay`](crate::relay), and
//! reads the pushes of the latter two. Commands are not optimised for speed;
//! [`publisher`](crate::publisher) publishes in bulk.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    process::Cpu,
    target::{Redis, RedisAddress},
};

/// The time limit of an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The longest accepted answer. `INFO` has some 10 KiB.
const MAX_ANSWER: usize = 1024 * 1024;

/// The longest accepted push.
pub const MAX_PUSH: usize = 2 * 1024 * 1024;

/// A connection for commands.
#[derive(Debug)]
pub struct Link {
    socket: Socket,
    heard: Vec<u8>,
}

impl Link {
    /// Connects and authenticates.
    pub fn open(redis: &Redis) -> anyhow::Result<Self> {
        let (domain, address) = match &redis.at {
            RedisAddress::Tcp(address) => (Domain::for_address(*address), SockAddr::from(*address)),
            RedisAddress::Unix(path) => (Domain::UNIX, SockAddr::unix(path)?),
        };
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket.connect_timeout(&address, PATIENCE).context("cannot connect to Redis")?;
        if domain != Domain::UNIX {
            socket.set_tcp_nodelay(true)?;
        }
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut link = Self { socket, heard: Vec::new() };
        if !redis.auth.is_empty() {
            let words: Vec<&str> =
                std::iter::once("AUTH").chain(redis.auth.iter().map(String::as_str)).collect();
            link.ask(&words)?;
        }
        Ok(link)
    }

    /// Sends a command and waits for the answer: its text, of any type. An error answer is an error.
    pub fn ask(&mut self, words: &[&str]) -> anyhow::Result<String> {
        let mut command = Vec::new();
        write_command(&mut command, words);
        self.socket.write_all(&command).context("Redis does not take a command")?;
        let mut chunk = [0; 16 * 1024];
        loop {
            if let Some((answer, length)) = read_answer(&self.heard)? {
                self.heard.drain(..length);
                return Ok(answer);
            }
            ensure!(self.heard.len() < MAX_ANSWER, "an answer of Redis is too long");
            match self.socket.read(&mut chunk) {
                Ok(0) => bail!("Redis closed the connection"),
                Ok(received) => self.heard.extend_from_slice(chunk.get(..received).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("no answer from Redis"),
            }
        }
    }

    /// The CPU time that the server has used, as it reports itself: exact, and available for a remote server.
    pub fn cpu(&mut self) -> anyhow::Result<Cpu> {
        let info = self.ask(&["INFO", "cpu"])?;
        let of =
            |name: &str| field(&info, name)?.parse::<f64>().with_context(|| format!("{name} is not a time"));
        Ok(Cpu { user: of("used_cpu_user")?, system: of("used_cpu_sys")? })
    }

    /// How many channels have subscribers.
    pub fn channels(&mut self) -> anyhow::Result<u64> {
        let info = self.ask(&["INFO", "stats"])?;
        field(&info, "pubsub_channels")?.parse().context("pubsub_channels is not a number")
    }

    /// How often each command has been called since the server started, functions' and scripts' calls included.
    pub fn calls(&mut self) -> anyhow::Result<BTreeMap<String, u64>> {
        Ok(read_calls(&self.ask(&["INFO", "commandstats"])?))
    }

    /// The connection, once authenticated.
    pub fn into_socket(self) -> Socket {
        self.socket
    }
}

/// Appends a command.
pub fn write_command(out: &mut Vec<u8>, words: &[&str]) {
    let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
    write_words(out, &words);
}

/// Appends a command of any bytes.
pub fn write_words(out: &mut Vec<u8>, words: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

/// The first line of `bytes`, and the rest.
pub fn line(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|&byte| byte == b'\r')?;
    let (line, rest) = bytes.split_at(end);
    Some((line, rest.get(2..)?))
}

/// The number in a line, after its first byte.
pub fn number(line: &[u8]) -> anyhow::Result<usize> {
    let digits = line.get(1..).unwrap_or_default();
    let text = std::str::from_utf8(digits).unwrap_or_default();
    text.parse().with_context(|| format!("not a length: {:?}", String::from_utf8_lossy(line)))
}

/// A push to a subscriber.
#[derive(Debug, PartialEq, Eq)]
pub enum Push<'a> {
    Message { topic: &'a [u8], payload: &'a [u8] },
    Subscribed { topic: &'a [u8] },
}

/// Reads one push from the front of `bytes`; returns it and the rest, or `None` while it is incomplete.
pub fn read_push(bytes: &[u8]) -> anyhow::Result<Option<(Push<'_>, &[u8])>> {
    let Some((head, rest)) = line(bytes) else { return Ok(None) };
    ensure!(head == b"*3", "Redis said {:?} to a subscriber", String::from_utf8_lossy(head));
    let Some((kind, rest)) = read_bulk(rest)? else { return Ok(None) };
    let Some((topic, rest)) = read_bulk(rest)? else { return Ok(None) };
    if kind == b"message" {
        return Ok(read_bulk(rest)?.map(|(payload, rest)| (Push::Message { topic, payload }, rest)));
    }
    ensure!(kind == b"subscribe", "Redis said {:?} to a subscriber", String::from_utf8_lossy(kind));
    Ok(line(rest).map(|(_count, rest)| (Push::Subscribed { topic }, rest)))
}

fn read_bulk(bytes: &[u8]) -> anyhow::Result<Option<(&[u8], &[u8])>> {
    let Some((head, rest)) = line(bytes) else { return Ok(None) };
    let length = number(head)?;
    ensure!(length <= MAX_PUSH / 2, "a push of {length} bytes");
    Ok(rest.split_at_checked(length).and_then(|(body, rest)| Some((body, rest.get(2..)?))))
}

/// Reads one answer from the front of `bytes`, with its length, or `None` when it is incomplete.
fn read_answer(bytes: &[u8]) -> anyhow::Result<Option<(String, usize)>> {
    let Some((head, rest)) = line(bytes) else { return Ok(None) };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let after = bytes.len() - rest.len();
    match head.first() {
        Some(b'+' | b':') => Ok(Some((text(head.get(1..).unwrap_or_default()), after))),
        Some(b'$') => {
            let length = number(head)?;
            let whole = rest.get(..length).filter(|_| rest.len() >= length + 2);
            Ok(whole.map(|body| (text(body), after + length + 2)))
        }
        _ => bail!("Redis answered {:?}", text(head)),
    }
}

fn read_calls(info: &str) -> BTreeMap<String, u64> {
    let calls = |line: &str| {
        let (name, stats) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
        Some((name.to_owned(), stats.split(',').next()?.parse().ok()?))
    };
    info.lines().filter_map(calls).collect()
}

fn field<'a>(info: &'a str, name: &str) -> anyhow::Result<&'a str> {
    let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.with_context(|| format!("Redis does not report {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_in_parts() {
        for (bytes, answer) in [("+PONG\r\n", "PONG"), (":17\r\n", "17"), ("$4\r\na\r\nb\r\n", "a\r\nb")] {
            let bytes = bytes.as_bytes();
            for cut in 0..bytes.len() {
                assert_eq!(read_answer(&bytes[..cut]).unwrap(), None, "{cut}");
            }
            let two = [bytes, bytes].concat();
            assert_eq!(read_answer(&two).unwrap(), Some((answer.to_owned(), bytes.len())));
        }
        assert!(read_answer(b"-NOAUTH x\r\n").unwrap_err().to_string().contains("NOAUTH"));
        assert!(read_answer(b"$x\r\n").is_err());
    }

    #[test]
    fn fields_of_info() {
        let info = "# CPU\r\nused_cpu_sys:1.5\r\nused_cpu_sys_children:9\r\n";
        assert_eq!(field(info, "used_cpu_sys").unwrap(), "1.5");
        assert!(field(info, "used_cpu").is_err());
    }

    #[test]
    fn calls_of_commands() {
        let info = "# Commandstats\r\ncmdstat_config|get:calls=2,usec=9\r\ncmdstat_ping:calls=17,usec=5\r\n";
        let calls = read_calls(info);
        assert_eq!((calls.get("ping"), calls.get("config|get"), calls.len()), (Some(&17), Some(&2), 2));
    }

    #[test]
    fn pushes_are_read_in_parts() {
        let message = b"*3\r\n$7\r\nmessage\r\n$6\r\nroom:1\r\n$4\r\na\r\nb\r\n";
        let subscribed = b"*3\r\n$9\r\nsubscribe\r\n$6\r\nroom:1\r\n:12\r\n";
        for (bytes, push) in [
            (&message[..], Push::Message { topic: b"room:1", payload: b"a\r\nb" }),
            (subscribed, Push::Subscribed { topic: b"room:1" }),
        ] {
            for cut in 0..bytes.len() {
                assert_eq!(read_push(&bytes[..cut]).unwrap(), None, "{cut}");
            }
            let two = [bytes, bytes].concat();
            assert_eq!(read_push(&two).unwrap(), Some((push, bytes)));
        }
        for bad in [&b"-ERR x\r\n"[..], b"*2\r\n$4\r\n", b"*3\r\n$4\r\npong\r\n$1\r\nx\r\n"] {
            assert!(read_push(bad).is_err(), "{bad:?}");
        }
    }
}

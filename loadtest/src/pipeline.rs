//! Commands to Redis, many in flight on one connection, and their answers in order.
//!
//! Owns the connection, what the socket has not taken yet, and answers that are incomplete. It never waits
//! unless it is asked to, and does not pace itself. [`Link`] sends commands one at a time.

use std::{
    io::{self, Read, Write},
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;

use crate::{
    place::Place,
    redis::{self, Link, line, number},
    target::Redis,
};

/// The size of one read.
const READ_SIZE: usize = 64 * 1024;

/// A connection.
#[derive(Debug)]
pub struct Pipeline {
    socket: Socket,
    /// Commands that the socket has not taken, from `sent` on.
    out: Vec<u8>,
    sent: usize,
    heard: Vec<u8>,
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    Number(u64),
    /// A publication has got this position in its history, and is new unless it is a duplicate. Without a
    /// position it was delivered only.
    Recorded {
        place: Option<Place>,
        duplicate: bool,
    },
    Text(&'a [u8]),
    Error(&'a [u8]),
}

impl Pipeline {
    /// Connects and authenticates.
    pub fn open(redis: &Redis) -> anyhow::Result<Self> {
        let socket = Link::open(redis)?.into_socket();
        socket.set_nonblocking(true)?;
        Ok(Self { socket, out: Vec::new(), sent: 0, heard: Vec::new() })
    }

    /// Adds a command; [`flush`](Self::flush) sends it.
    pub fn push(&mut self, words: &[&[u8]]) {
        redis::write_words(&mut self.out, words);
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.socket.write(rest) {
                Ok(some) => self.sent += some,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("Redis does not take commands"),
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(())
    }

    /// Waits until there is an answer, or until the socket takes more, at most this long.
    pub fn wait(&self, most: Duration) -> anyhow::Result<()> {
        let most = Timespec::try_from(most).context("a time-out")?;
        let unsent = self.sent < self.out.len();
        let wanted = if unsent { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        match poll(&mut [PollFd::new(&self.socket, wanted)], Some(&most)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Passes the answers so far to `each`, and returns how many there were.
    pub fn hear(&mut self, mut each: impl FnMut(Answer<'_>)) -> anyhow::Result<u64> {
        let mut count = 0;
        loop {
            let held = self.heard.len();
            self.heard.resize(held + READ_SIZE, 0);
            let received = self.socket.read(self.heard.get_mut(held..).unwrap_or_default());
            self.heard.truncate(held + received.as_ref().map_or(0, |&received| received));
            match received {
                Ok(0) => bail!("Redis closed the connection"),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(count),
                Err(error) => return Err(error).context("no answer from Redis"),
            }
            let mut rest = self.heard.as_slice();
            while let Some((answer, after)) = read_answer(rest)? {
                each(answer);
                count += 1;
                rest = after;
            }
            let read = self.heard.len() - rest.len();
            self.heard.drain(..read);
        }
    }
}

/// Reads one answer from the front of `bytes`; returns it and the rest, or `None` while it is incomplete.
fn read_answer(bytes: &[u8]) -> anyhow::Result<Option<(Answer<'_>, &[u8])>> {
    let Some((head, rest)) = line(bytes) else { return Ok(None) };
    match head.first() {
        Some(b':') => Ok(Some((Answer::Number(number(head)? as u64), rest))),
        Some(b'+') => Ok(Some((Answer::Text(head.get(1..).unwrap_or_default()), rest))),
        Some(b'-') => Ok(Some((Answer::Error(head.get(1..).unwrap_or_default()), rest))),
        Some(b'$') => Ok(bulk(head, rest)?.map(|(text, rest)| (Answer::Text(text), rest))),
        Some(b'*') if head == b"*2" => {
            let Some((head, rest)) = line(rest) else { return Ok(None) };
            let Some((place, rest)) = bulk(head, rest)? else { return Ok(None) };
            let Some((duplicate, rest)) = line(rest) else { return Ok(None) };
            let answer = Answer::Recorded { place: Place::parse(place), duplicate: number(duplicate)? != 0 };
            Ok(Some((answer, rest)))
        }
        _ => bail!("Redis answered {:?}", String::from_utf8_lossy(head)),
    }
}

fn bulk<'a>(head: &[u8], rest: &'a [u8]) -> anyhow::Result<Option<(&'a [u8], &'a [u8])>> {
    let length = number(head)?;
    Ok(rest.split_at_checked(length).and_then(|(text, rest)| Some((text, rest.get(2..)?))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_in_parts() {
        let recorded =
            |duplicate| Answer::Recorded { place: Some(Place { epoch: 17, offset: 42 }), duplicate };
        for (bytes, answer) in [
            (&b":7\r\n"[..], Answer::Number(7)),
            (b"+OK\r\n", Answer::Text(b"OK")),
            (b"$5\r\nhello\r\n", Answer::Text(b"hello")),
            (b"-OOM x\r\n", Answer::Error(b"OOM x")),
            (b"*2\r\n$5\r\n17-42\r\n:0\r\n", recorded(false)),
            (b"*2\r\n$5\r\n17-42\r\n:1\r\n", recorded(true)),
            (b"*2\r\n$0\r\n\r\n:0\r\n", Answer::Recorded { place: None, duplicate: false }),
        ] {
            for cut in 0..bytes.len() {
                assert_eq!(read_answer(&bytes[..cut]).unwrap(), None, "{cut}");
            }
            let two = [bytes, bytes].concat();
            assert_eq!(read_answer(&two).unwrap(), Some((answer, bytes)));
        }
        assert!(read_answer(b"*3\r\n").is_err());
    }
}

//! Reads RESP3 (<https://redis.io/docs/latest/develop/reference/protocol-spec/>) from the connections that carry
//! publications, in either direction.
//!
//! Owns the read buffer and the frames: `message`, `subscribe` and `unsubscribe` pushes, and the few plain replies
//! of such connections. Other pushes are distinguished from replies, since they answer no command. Sends nothing,
//! and keeps no subscription state. A client library would be correct, too; this reader exists because a library's
//! parser and queue cost about six times the CPU per message, and because the queue between its socket and its stream
//! is unbounded.
//!
//! # Bounds
//!
//! A payload over the limit is reported as [`Frame::Oversized`] and skipped as it arrives, never buffered. Everything
//! else has small fixed bounds (see the constants). A violation of the protocol or of a bound is [`Malformed`], and
//! the connection must be closed.
//!
//! # Copy or slice
//!
//! A slice of the read buffer keeps its whole 64 KiB block alive: a hundred small payloads queued for one slow client
//! could hold 6 MB. So payloads below [`COPY_BELOW`] get an allocation of their own, which costs about 30 ns and lets
//! the block be reused at once. Larger ones are sliced, which keeps at most sixteen times their size alive.

use std::{io, ops::Range};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Payloads below this many bytes are copied out of the read buffer.
const COPY_BELOW: usize = 4 * 1024;
/// The size of one read.
const READ_BYTES: usize = 64 * 1024;
/// The longest line, in bytes: an error's text, or a length.
const MAX_LINE: usize = 4 * 1024;
/// The longest topic, in bytes.
pub(super) const MAX_TOPIC: usize = 1024;
/// The maximum size of a reply other than a publication, in bytes.
const MAX_REPLY: usize = 64 * 1024;
/// The maximum number of elements in one aggregate.
const MAX_ELEMENTS: usize = 1024;
/// The maximum nesting depth of aggregates. The answer to `HELLO` nests four deep.
const MAX_DEPTH: usize = 8;

/// One complete frame from the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    /// A publication.
    Message {
        /// The topic.
        topic: &'a [u8],
        /// The payload.
        payload: Bytes,
    },
    /// A publication over the limit. Its payload is skipped.
    Oversized {
        /// The topic.
        topic: &'a [u8],
        /// The payload's length.
        bytes: u64,
    },
    /// The server has subscribed this connection to the topic.
    Subscribed(&'a [u8]),
    /// The server has unsubscribed this connection from the topic.
    Unsubscribed(&'a [u8]),
    /// An error reply, `CODE text`.
    Error(String),
    /// Any other reply.
    Reply(Value),
    /// A push of an unknown kind. It answers no command.
    Push(Value),
}

/// A reply that is neither a publication nor an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// A string of any kind, or another scalar, as it was written.
    Text(Vec<u8>),
    /// An integer. `PUBLISH` answers with one, so it costs no allocation.
    Integer(i64),
    /// A list; a map is a list of keys and values in turn.
    List(Vec<Value>),
    /// Null.
    Null,
}

/// The server violated the protocol, or one of this reader's bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed answer from the server: {0}")]
pub(super) struct Malformed(&'static str);

/// An incremental reader.
#[derive(Debug)]
pub(super) struct Reader {
    buffer: BytesMut,
    /// How many bytes the last returned frame occupies at the front of `buffer`.
    consumed: usize,
    /// The topic of the last returned frame, if its bytes have left `buffer`.
    topic: Bytes,
    /// How many bytes `buffer` must hold before parsing is tried again.
    needed: usize,
    /// How many bytes of an oversized payload remain to be skipped.
    skip: u64,
    /// Whether the line end after a skipped payload has yet to be checked.
    skip_end: bool,
    max_payload: usize,
}

impl Reader {
    /// A reader that accepts payloads of up to `max_payload` bytes.
    pub(super) fn new(max_payload: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            consumed: 0,
            topic: Bytes::new(),
            needed: 0,
            skip: 0,
            skip_end: false,
            max_payload,
        }
    }

    /// Reads once from `source`; returns 0 at its end. Cancel safe.
    pub(super) async fn fill(&mut self, source: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        self.release();
        let missing = self.needed.saturating_sub(self.buffer.len());
        if self.buffer.capacity() - self.buffer.len() < missing.max(READ_BYTES / 4) {
            self.buffer.reserve(missing.max(READ_BYTES));
        }
        source.read_buf(&mut self.buffer).await
    }

    /// The next complete frame, if there is one.
    pub(super) fn next(&mut self) -> Result<Option<Frame<'_>>, Malformed> {
        self.release();
        if !self.skipped()? || self.buffer.len() < self.needed {
            return Ok(None);
        }
        let parsed = match parse(&self.buffer, self.max_payload) {
            Ok(parsed) => parsed,
            Err(Stop::Malformed(why)) => return Err(Malformed(why)),
            Err(Stop::Incomplete { needed }) => {
                self.needed = needed;
                return Ok(None);
            }
        };
        self.needed = 0;
        self.consumed = parsed.end;
        Ok(Some(match parsed.what {
            What::Message { topic, payload } if payload.len() < COPY_BELOW => Frame::Message {
                payload: Bytes::copy_from_slice(part(&self.buffer, payload)),
                topic: part(&self.buffer, topic),
            },
            What::Message { topic, payload } => {
                let frame = self.buffer.split_to(parsed.end).freeze();
                self.consumed = 0;
                self.topic = frame.slice(topic);
                Frame::Message { topic: &self.topic, payload: frame.slice(payload) }
            }
            What::Oversized { topic, bytes } => {
                self.skip = bytes;
                self.skip_end = true;
                Frame::Oversized { topic: part(&self.buffer, topic), bytes }
            }
            What::Subscribed(topic) => Frame::Subscribed(part(&self.buffer, topic)),
            What::Unsubscribed(topic) => Frame::Unsubscribed(part(&self.buffer, topic)),
            What::Error(text) => Frame::Error(String::from_utf8_lossy(part(&self.buffer, text)).into_owned()),
            What::Reply(value) => Frame::Reply(value),
            What::Push(value) => Frame::Push(value),
        }))
    }

    /// Whether no bytes are buffered beyond the frames returned so far.
    pub(super) fn is_empty(&self) -> bool {
        self.buffer.len() == self.consumed && self.skip == 0
    }

    /// Releases the bytes that the last frame borrowed.
    fn release(&mut self) {
        self.buffer.advance(self.consumed);
        self.consumed = 0;
        self.topic = Bytes::new();
    }

    /// Skips as much of an oversized payload as has arrived; returns whether that was all of it.
    fn skipped(&mut self) -> Result<bool, Malformed> {
        let now = usize::try_from(self.skip).unwrap_or(usize::MAX).min(self.buffer.len());
        self.buffer.advance(now);
        self.skip -= now as u64;
        if self.skip == 0 && self.skip_end {
            match self.buffer.get(..2) {
                None => return Ok(false),
                Some(b"\r\n") => self.buffer.advance(2),
                Some(_) => return Err(Malformed(UNTERMINATED)),
            }
            self.skip_end = false;
        }
        Ok(self.skip == 0)
    }
}

fn part(buffer: &[u8], range: Range<usize>) -> &[u8] {
    buffer.get(range).expect("the parser only returns ranges of what it was given")
}

const UNTERMINATED: &str = "a string does not end where its length says";

struct Parsed {
    what: What,
    end: usize,
}

/// A frame as the positions of its parts.
enum What {
    Message { topic: Range<usize>, payload: Range<usize> },
    Oversized { topic: Range<usize>, bytes: u64 },
    Subscribed(Range<usize>),
    Unsubscribed(Range<usize>),
    Error(Range<usize>),
    Reply(Value),
    Push(Value),
}

enum Stop {
    /// More bytes are needed; at least `needed` in all, if that is known.
    Incomplete {
        needed: usize,
    },
    Malformed(&'static str),
}

fn parse(bytes: &[u8], max_payload: usize) -> Result<Parsed, Stop> {
    let mut cursor = Cursor { bytes, at: 0 };
    let what = match cursor.peek()? {
        b'>' => cursor.push(max_payload)?,
        b'-' => What::Error(cursor.line()?),
        b'!' => What::Error(cursor.sized(MAX_LINE)?),
        _ => What::Reply(cursor.value(0)?),
    };
    Ok(Parsed { what, end: cursor.at })
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn push(&mut self, max_payload: usize) -> Result<What, Stop> {
        let elements = self.elements()?;
        let Some(rest) = elements.checked_sub(1) else { return Err(Stop::Malformed("an empty push")) };
        let kind = self.bulk(MAX_TOPIC)?;
        match (self.bytes.get(kind), rest) {
            (Some(b"message"), 2) => {
                let topic = self.bulk(MAX_TOPIC)?;
                let bytes = self.length()?.ok_or(Stop::Malformed("a publication without a payload"))?;
                if bytes > max_payload as u64 {
                    return Ok(What::Oversized { topic, bytes });
                }
                let payload = self.take(usize::try_from(bytes).expect("at most max_payload, a usize"))?;
                Ok(What::Message { topic, payload })
            }
            (Some(b"subscribe"), 2) => {
                let topic = self.bulk(MAX_TOPIC)?;
                self.value(0)?;
                Ok(What::Subscribed(topic))
            }
            (Some(b"unsubscribe"), 2) => {
                let topic = self.bulk(MAX_TOPIC)?;
                self.value(0)?;
                Ok(What::Unsubscribed(topic))
            }
            _ => (0..rest).map(|_| self.value(0)).collect::<Result<_, _>>().map(Value::List).map(What::Push),
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value, Stop> {
        if depth > MAX_DEPTH {
            return Err(Stop::Malformed("nested too deep"));
        }
        if self.at > MAX_REPLY {
            return Err(Stop::Malformed("a reply is too long"));
        }
        let elements = match self.peek()? {
            b'$' | b'=' | b'!' => {
                let Some(length) = self.length()? else { return Ok(Value::Null) };
                let length = usize::try_from(length)
                    .ok()
                    .filter(|length| *length <= MAX_REPLY)
                    .ok_or(Stop::Malformed("a reply is too long"))?;
                let range = self.take(length)?;
                return Ok(self.text(range));
            }
            b':' => {
                let range = self.line()?;
                let integer =
                    std::str::from_utf8(part(self.bytes, range)).ok().and_then(|text| text.parse().ok());
                return integer.map(Value::Integer).ok_or(Stop::Malformed("expected an integer"));
            }
            b'+' | b'-' | b',' | b'(' | b'#' => {
                let range = self.line()?;
                return Ok(self.text(range));
            }
            b'_' => {
                self.line()?;
                return Ok(Value::Null);
            }
            b'*' | b'~' | b'>' => {
                let start = self.at;
                match self.length()? {
                    None => return Ok(Value::Null),
                    Some(_) => self.at = start,
                }
                self.elements()?
            }
            b'%' => self.elements()? * 2,
            _ => return Err(Stop::Malformed("an unknown type")),
        };
        (0..elements).map(|_| self.value(depth + 1)).collect::<Result<_, _>>().map(Value::List)
    }

    fn text(&self, range: Range<usize>) -> Value {
        Value::Text(part(self.bytes, range).to_vec())
    }

    fn peek(&self) -> Result<u8, Stop> {
        self.bytes.get(self.at).copied().ok_or(Stop::Incomplete { needed: self.at + 1 })
    }

    /// A bulk string of at most `max` bytes.
    fn bulk(&mut self, max: usize) -> Result<Range<usize>, Stop> {
        if self.peek()? != b'$' {
            return Err(Stop::Malformed("expected a string"));
        }
        self.sized(max)
    }

    /// A type byte, a length of at most `max`, and as many bytes.
    fn sized(&mut self, max: usize) -> Result<Range<usize>, Stop> {
        let length = self.length()?.and_then(|length| usize::try_from(length).ok());
        match length.filter(|length| *length <= max) {
            Some(length) => self.take(length),
            None => Err(Stop::Malformed("expected a short string")),
        }
    }

    /// `length` bytes and their line end.
    fn take(&mut self, length: usize) -> Result<Range<usize>, Stop> {
        let range = self.at..self.at + length;
        let needed = range.end + 2;
        match self.bytes.get(range.end..needed) {
            None => Err(Stop::Incomplete { needed }),
            Some(b"\r\n") => {
                self.at = needed;
                Ok(range)
            }
            Some(_) => Err(Stop::Malformed(UNTERMINATED)),
        }
    }

    fn elements(&mut self) -> Result<usize, Stop> {
        let elements = self.length()?.and_then(|elements| usize::try_from(elements).ok());
        elements.filter(|elements| *elements <= MAX_ELEMENTS).ok_or(Stop::Malformed("too many elements"))
    }

    /// A type byte and a length; `None` for the null of RESP2.
    fn length(&mut self) -> Result<Option<u64>, Stop> {
        let line = self.line()?;
        match part(self.bytes, line) {
            b"-1" => Ok(None),
            // Eighteen digits cannot overflow.
            digits if (1..=18).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit) => {
                Ok(Some(digits.iter().fold(0, |length, digit| length * 10 + u64::from(digit - b'0'))))
            }
            _ => Err(Stop::Malformed("expected a length")),
        }
    }

    /// The rest of a line after its type byte.
    fn line(&mut self) -> Result<Range<usize>, Stop> {
        let start = self.at + 1;
        let rest = self.bytes.get(start..).unwrap_or_default();
        let window = rest.get(..=MAX_LINE).unwrap_or(rest);
        let Some(length) = window.iter().position(|byte| *byte == b'\r') else {
            return Err(if window.len() > MAX_LINE {
                Stop::Malformed("a line is too long")
            } else {
                Stop::Incomplete { needed: 0 }
            });
        };
        let range = start..start + length;
        match self.bytes.get(range.end + 1) {
            None => Err(Stop::Incomplete { needed: range.end + 2 }),
            Some(b'\n') => {
                self.at = range.end + 2;
                Ok(range)
            }
            Some(_) => Err(Stop::Malformed("a carriage return inside a line")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const CAP: usize = 10_000;

    /// A frame that owns its topic, for comparing.
    #[derive(Clone, Debug, PartialEq, Eq)]
    enum Seen {
        Message(Vec<u8>, Vec<u8>),
        Oversized(Vec<u8>, u64),
        Subscribed(Vec<u8>),
        Unsubscribed(Vec<u8>),
        Error(String),
        Reply(Value),
        Push(Value),
        Malformed,
    }

    /// Feeds `chunks` one after the other and notes every frame, and the end if it is one.
    fn read<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<Seen> {
        let mut reader = Reader::new(CAP);
        let mut seen = Vec::new();
        for chunk in chunks {
            reader.release();
            reader.buffer.extend_from_slice(chunk);
            loop {
                seen.push(match reader.next() {
                    Ok(None) => break,
                    Err(Malformed(_)) => {
                        seen.push(Seen::Malformed);
                        return seen;
                    }
                    Ok(Some(Frame::Message { topic, payload })) => {
                        Seen::Message(topic.into(), payload.into())
                    }
                    Ok(Some(Frame::Oversized { topic, bytes })) => Seen::Oversized(topic.into(), bytes),
                    Ok(Some(Frame::Subscribed(topic))) => Seen::Subscribed(topic.into()),
                    Ok(Some(Frame::Unsubscribed(topic))) => Seen::Unsubscribed(topic.into()),
                    Ok(Some(Frame::Error(text))) => Seen::Error(text),
                    Ok(Some(Frame::Reply(value))) => Seen::Reply(value),
                    Ok(Some(Frame::Push(value))) => Seen::Push(value),
                });
            }
        }
        seen
    }

    fn bulk(bytes: &[u8]) -> Vec<u8> {
        [format!("${}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
    }

    fn push(parts: &[&[u8]]) -> Vec<u8> {
        let mut bytes = format!(">{}\r\n", parts.len()).into_bytes();
        bytes.extend(parts.iter().flat_map(|part| bulk(part)));
        bytes
    }

    fn wire(seen: &Seen) -> Vec<u8> {
        match seen {
            Seen::Message(topic, payload) => push(&[b"message", topic, payload]),
            Seen::Oversized(topic, bytes) => {
                push(&[b"message", topic, &vec![b'\r'; usize::try_from(*bytes).unwrap()]])
            }
            Seen::Subscribed(topic) => [b">3\r\n", &bulk(b"subscribe")[..], &bulk(topic), b":1\r\n"].concat(),
            Seen::Unsubscribed(topic) => {
                [b">3\r\n", &bulk(b"unsubscribe")[..], &bulk(topic), b":0\r\n"].concat()
            }
            Seen::Error(text) => format!("-{text}\r\n").into_bytes(),
            Seen::Reply(value) => value_wire(value),
            Seen::Push(Value::List(values)) => {
                let mut bytes = format!(">{}\r\n", values.len() + 1).into_bytes();
                bytes.extend(bulk(b"sunsubscribe"));
                bytes.extend(values.iter().flat_map(value_wire));
                bytes
            }
            Seen::Push(_) => unreachable!("a push is a list"),
            Seen::Malformed => b"?\r\n".to_vec(),
        }
    }

    fn value_wire(value: &Value) -> Vec<u8> {
        match value {
            Value::Null => b"_\r\n".to_vec(),
            Value::Text(bytes) => bulk(bytes),
            Value::Integer(integer) => format!(":{integer}\r\n").into_bytes(),
            Value::List(values) => {
                let mut bytes = format!("*{}\r\n", values.len()).into_bytes();
                bytes.extend(values.iter().flat_map(value_wire));
                bytes
            }
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            vec(any::<u8>(), 0..20).prop_map(Value::Text),
            any::<i64>().prop_map(Value::Integer),
        ];
        leaf.prop_recursive(4, 16, 4, |inner| vec(inner, 0..4).prop_map(Value::List))
    }

    fn seen() -> impl Strategy<Value = Seen> {
        let topic = || vec(any::<u8>(), 0..20);
        let size = prop_oneof![8 => 0usize..100, 1 => COPY_BELOW - 2..COPY_BELOW + 2, 1 => CAP - 2..=CAP];
        let payload = size.prop_flat_map(|size| vec(any::<u8>(), size));
        prop_oneof![
            4 => (topic(), payload).prop_map(|(topic, payload)| Seen::Message(topic, payload)),
            1 => (topic(), CAP as u64 + 1..CAP as u64 + 900).prop_map(|(topic, bytes)| Seen::Oversized(topic, bytes)),
            1 => topic().prop_map(Seen::Subscribed),
            1 => topic().prop_map(Seen::Unsubscribed),
            1 => "[A-Z]{1,9} [ -~]{0,20}".prop_map(Seen::Error),
            1 => value().prop_map(Seen::Reply),
            1 => vec(value(), 0..4).prop_map(|values| Seen::Push(Value::List(values))),
        ]
    }

    /// `bytes` in pieces whose lengths repeat `lengths`.
    fn pieces<'a>(bytes: &'a [u8], lengths: &[usize]) -> Vec<&'a [u8]> {
        let mut lengths = lengths.iter().cycle();
        let mut rest = bytes;
        std::iter::from_fn(|| {
            let (piece, tail) = rest.split_at_checked(*lengths.next()?).unwrap_or((rest, &[]));
            rest = tail;
            (!piece.is_empty()).then_some(piece)
        })
        .collect()
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_frames(frames in vec(seen(), 0..8), lengths in vec(1usize..3000, 1..8)) {
            let bytes = frames.iter().flat_map(wire).collect::<Vec<_>>();
            prop_assert_eq!(&read([&bytes[..]]), &frames);
            prop_assert_eq!(&read(pieces(&bytes, &lengths)), &frames);
        }

        #[test]
        fn byte_by_byte_input_gives_the_same_frames(frames in vec(seen(), 0..3)) {
            let bytes = frames.iter().flat_map(wire).collect::<Vec<_>>();
            prop_assert_eq!(read(bytes.chunks(1)), frames);
        }

        #[test]
        fn junk_never_panics_and_splits_do_not_matter(
            bytes in prop_oneof![
                vec(any::<u8>(), 0..300),
                vec(prop::sample::select(b">*%$-+:_0123\r\r\n\nmesag".to_vec()), 0..300),
                "([>*%$:_~+-][0-9]{0,3}\r\n){0,40}".prop_map(String::into_bytes),
            ],
        ) {
            prop_assert_eq!(read([&bytes[..]]), read(bytes.chunks(1)));
        }

        #[test]
        fn a_damaged_stream_never_panics(frames in vec(seen(), 1..5), at: prop::sample::Index, byte: u8, lengths in vec(1usize..2000, 1..5)) {
            let mut bytes = frames.iter().flat_map(wire).collect::<Vec<_>>();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            prop_assert_eq!(read([&bytes[..]]), read(pieces(&bytes, &lengths)));
        }
    }

    #[test]
    fn frame_bounds_are_enforced() {
        let long = "x".repeat(MAX_LINE + 1);
        let deep = "*1\r\n".repeat(MAX_DEPTH + 2);
        for bytes in [
            format!("-{long}\r\n"),
            deep,
            format!("*{}\r\n", MAX_ELEMENTS + 1),
            format!("${}\r\n", MAX_REPLY + 1),
            format!(">3\r\n$7\r\nmessage\r\n${}\r\n", MAX_TOPIC + 1),
            ">3\r\n$7\r\nmessage\r\n$1\r\nt\r\n$-1\r\n".to_owned(),
            ">3\r\n$7\r\nmessage\r\n$1\r\nt\r\n$9999999999999999999\r\n".to_owned(),
            ">0\r\n".to_owned(),
            "$1\r\nabc".to_owned(),
            "|1\r\n".to_owned(),
            ":\r\n".to_owned(),
            ":9223372036854775808\r\n".to_owned(),
            ":1 \r\n".to_owned(),
            format!("!{}\r\n", MAX_LINE + 1),
        ] {
            assert_eq!(read([bytes.as_bytes()]), [Seen::Malformed], "{bytes:.40}");
        }
    }

    #[test]
    fn an_error_is_an_error_in_both_forms() {
        let error = Seen::Error("BUSY a script".to_owned());
        let integer = |integer| Seen::Reply(Value::Integer(integer));
        assert_eq!(
            read([&b"-BUSY a script\r\n!13\r\nBUSY a script\r\n:-7\r\n:+7\r\n"[..]]),
            [error.clone(), error, integer(-7), integer(7)]
        );
    }

    #[test]
    fn an_oversized_payload_is_never_buffered() {
        let mut reader = Reader::new(CAP);
        reader.buffer.extend_from_slice(b">3\r\n$7\r\nmessage\r\n$1\r\nt\r\n$100000000\r\n");
        assert_eq!(reader.next(), Ok(Some(Frame::Oversized { topic: b"t", bytes: 100_000_000 })));
        let block = vec![b'x'; 100_000];
        for _ in 0..1000 {
            reader.release();
            reader.buffer.extend_from_slice(&block);
            assert_eq!(reader.next(), Ok(None));
            assert!(reader.buffer.is_empty());
        }
        reader.buffer.extend_from_slice(b"\r\n+PONG\r\n");
        assert_eq!(reader.next(), Ok(Some(Frame::Reply(Value::Text(b"PONG".to_vec())))));
        assert!(reader.is_empty());
    }

    #[test]
    fn only_large_payloads_share_the_read_buffer() {
        let mut reader = Reader::new(CAP);
        let bytes =
            [push(&[b"message", b"t", &[1; 8]]), push(&[b"message", b"t", &[2; COPY_BELOW]])].concat();
        reader.buffer.extend_from_slice(&bytes);
        let block = reader.buffer.as_ptr_range();
        let Ok(Some(Frame::Message { payload: small, .. })) = reader.next() else { panic!("no first frame") };
        let Ok(Some(Frame::Message { payload: large, .. })) = reader.next() else {
            panic!("no second frame")
        };
        assert!(!block.contains(&small.as_ptr()));
        assert!(block.contains(&large.as_ptr()));
    }
}

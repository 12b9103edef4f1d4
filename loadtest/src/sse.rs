//! Server-sent events (WHATWG HTML §9.2) from an HTTP/1.1 response that does not end.
//!
//! Owns the request, the check of its answer, the chunks of its body (RFC 9112 §7.1) and the splitting into
//! events. It works in place in the swarm's buffer and copies only within it.

use crate::websocket::WireError;

/// The largest response head, in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// The maximum number of digits of a chunk's length, enough for a terabyte.
const MAX_DIGITS: u8 = 10;

/// The parser's state of a stream's body between two reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// The body extends to the end of the connection.
    Whole,
    /// In a chunk's length: its value so far, its number of digits, and whether to skip the rest of the line.
    Length { so_far: u64, digits: u8, skipping: bool },
    /// In a chunk's data, with this many bytes still to come.
    Data { left: u64 },
    /// In the line break after a chunk.
    Break,
    /// The last chunk has been read.
    Ended,
}

impl Body {
    /// Before the first chunk.
    pub const CHUNKED: Self = Self::Length { so_far: 0, digits: 0, skipping: false };

    /// Removes the chunk framing from `bytes` and moves the data to the front; returns its length.
    pub fn unwrap(&mut self, bytes: &mut [u8]) -> Result<usize, WireError> {
        let (mut from, mut to) = (0, 0);
        if *self == Self::Whole {
            return Ok(bytes.len());
        }
        while let Some(&byte) = bytes.get(from) {
            if let Self::Data { left } = *self {
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - from);
                bytes.copy_within(from..from + here, to);
                (from, to) = (from + here, to + here);
                let left = left - here as u64;
                *self = if left == 0 { Self::Break } else { Self::Data { left } };
                continue;
            }
            from += 1;
            *self = self.frame(byte)?;
        }
        Ok(to)
    }

    /// Whether the server has ended the stream.
    pub fn is_over(self) -> bool {
        self == Self::Ended
    }

    fn frame(self, byte: u8) -> Result<Self, WireError> {
        const BAD: WireError = WireError::Handshake("its chunked encoding is invalid");
        if self == Self::Ended || (matches!(self, Self::Length { skipping: true, .. }) && byte != b'\n') {
            return Ok(self);
        }
        match (self, byte) {
            (Self::Break, b'\r') => Ok(self),
            (Self::Break, b'\n') => Ok(Self::CHUNKED),
            (Self::Length { digits: 0, .. }, b'\n') => Err(BAD),
            (Self::Length { so_far: 0, .. }, b'\n') => Ok(Self::Ended),
            (Self::Length { so_far, .. }, b'\n') => Ok(Self::Data { left: so_far }),
            (Self::Length { so_far, digits, .. }, _) => match char::from(byte).to_digit(16) {
                Some(digit) if digits < MAX_DIGITS => Ok(Self::Length {
                    so_far: so_far << 4 | u64::from(digit),
                    digits: digits + 1,
                    skipping: false,
                }),
                // A chunk extension, or the line's carriage return.
                None if digits > 0 => Ok(Self::Length { so_far, digits, skipping: true }),
                _ => Err(BAD),
            },
            _ => Err(BAD),
        }
    }
}

/// The request for an event stream, with the header line `authorization` if it is not empty.
pub fn request(authority: &str, path: &str, authorization: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nAccept: text/event-stream\r\n{authorization}\r\n")
        .into_bytes()
}

/// Reads the answer to [`request`]: the length of its head and the framing of its body, `None` while it is
/// incomplete.
pub fn read_head(bytes: &[u8]) -> Result<Option<(usize, Body)>, WireError> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Ok(None),
        Ok(httparse::Status::Partial) => return Err(WireError::Handshake("its head is too long")),
        Err(_) => return Err(WireError::Handshake("it is not HTTP/1.1")),
    };
    match response.code {
        Some(200) => {}
        Some(status) => return Err(WireError::Refused(status)),
        None => return Err(WireError::Handshake("it has no status code")),
    }
    let has = |name: &str, what: &[u8]| {
        let mut all = response.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name));
        all.any(|header| header.value.to_ascii_lowercase().starts_with(what))
    };
    if !has("content-type", b"text/event-stream") {
        return Err(WireError::Handshake("it is not an event stream"));
    }
    Ok(Some((length, if has("transfer-encoding", b"chunked") { Body::CHUNKED } else { Body::Whole })))
}

/// The cause of a gap, from the data of its event.
pub fn cause(data: &[u8]) -> String {
    let gap: serde_json::Value = serde_json::from_slice(data).unwrap_or_default();
    gap.get("cause").and_then(serde_json::Value::as_str).unwrap_or("without a cause").to_owned()
}

/// What an event stream carries for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent<'a> {
    /// The whole text of an event that has data and no custom name.
    Message(&'a [u8]),
    /// The id of the next event, or of the start of the stream.
    Id(&'a [u8]),
    /// Messages may be missing here; the event's data.
    Gap(&'a [u8]),
}

/// Passes everything complete to `each`, and returns the remaining bytes. A line ends with LF or CRLF; a lone
/// CR is not supported.
pub fn read_events<'a>(mut bytes: &'a [u8], mut each: impl FnMut(Sent<'a>)) -> &'a [u8] {
    let (mut line, mut data, mut named, mut id) = (0, None, None, None);
    while let Some(end) = bytes.get(line..).and_then(|rest| rest.iter().position(|&byte| byte == b'\n')) {
        let text = bytes.get(line..line + end).unwrap_or_default();
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        line += end + 1;
        if !text.is_empty() {
            // The colon and the space after it.
            let value = |text: &'a [u8], name: usize| text.get(name + 2..).unwrap_or_default();
            match text {
                [b'd', b'a', b't', b'a', ..] => data = data.or(Some(value(text, 4))),
                [b'e', b'v', b'e', b'n', b't', b':', ..] if !text.ends_with(b"message") => {
                    named = Some(value(text, 5));
                }
                [b'i', b'd', b':', ..] => id = Some(value(text, 2)),
                _ => {}
            }
            continue;
        }
        let (event, rest) = bytes.split_at(line);
        if let Some(id) = id {
            each(Sent::Id(id));
        }
        match (data, named) {
            (Some(_), None) => each(Sent::Message(event)),
            (Some(data), Some(b"tidegate.gap")) => each(Sent::Gap(data)),
            _ => {}
        }
        (bytes, line, data, named, id) = (rest, 0, None, None, None);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b"retry: 100\n\n: hello\n\nid: 17-42\n\ndata: one\n\nevent: tidegate.gap\n\
                            data: {\"cause\":\"trimmed\"}\n\nevent: other\ndata: x\n\nevent: message\r\nid: x\r\ndata: two\r\n\r\n";

    fn owned(sent: Sent<'_>) -> (&'static str, Vec<u8>) {
        match sent {
            Sent::Message(text) => ("message", text.to_vec()),
            Sent::Id(id) => ("id", id.to_vec()),
            Sent::Gap(data) => {
                assert_eq!(cause(data), "trimmed");
                ("gap", data.to_vec())
            }
        }
    }

    fn chunked(pieces: &[&[u8]]) -> Vec<u8> {
        let mut wire = Vec::new();
        for piece in pieces {
            wire.extend(format!("{:X};why=not\r\n", piece.len()).bytes());
            wire.extend_from_slice(piece);
            wire.extend(b"\r\n");
        }
        wire
    }

    #[test]
    fn events_arrive_in_any_split() {
        let (front, back) = STREAM.split_at(30);
        let wire = chunked(&[front, back]);
        for cut in 0..wire.len() {
            let (mut body, mut text, mut events) = (Body::CHUNKED, Vec::new(), Vec::new());
            for piece in [&wire[..cut], &wire[cut..]] {
                let mut piece = piece.to_vec();
                let length = body.unwrap(&mut piece).unwrap();
                text.extend_from_slice(&piece[..length]);
                let rest = read_events(&text, |sent| events.push(owned(sent))).len();
                text.drain(..text.len() - rest);
            }
            assert_eq!(
                events,
                [
                    ("id", b"17-42".to_vec()),
                    ("message", b"data: one\n\n".to_vec()),
                    ("gap", b"{\"cause\":\"trimmed\"}".to_vec()),
                    ("id", b"x".to_vec()),
                    ("message", b"event: message\r\nid: x\r\ndata: two\r\n\r\n".to_vec()),
                ],
                "{cut}"
            );
            assert!(text.is_empty());
        }
    }

    #[test]
    fn the_last_chunk_ends_the_stream() {
        let (mut body, mut wire) = (Body::CHUNKED, b"1\r\nx\r\n0\r\n\r\n".to_vec());
        assert_eq!(body.unwrap(&mut wire), Ok(1));
        assert!(body.is_over());
        for broken in [&b"\r\n"[..], b"x\r\n", b"1\r\nab\r\n", b"FFFFFFFFFFF\r\n"] {
            let mut body = Body::CHUNKED;
            assert!(body.unwrap(&mut broken.to_vec()).is_err(), "{broken:?}");
        }
    }

    #[test]
    fn the_head_determines_the_framing_of_the_body() {
        let head = |fields: &str| format!("HTTP/1.1 200 OK\r\n{fields}\r\n").into_bytes();
        let chunked =
            head("content-type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: Chunked\r\n");
        assert_eq!(read_head(&chunked), Ok(Some((chunked.len(), Body::CHUNKED))));
        assert_eq!(read_head(&chunked[..30]), Ok(None));
        let whole = head("Content-Type: text/event-stream\r\n");
        assert_eq!(read_head(&whole), Ok(Some((whole.len(), Body::Whole))));
        assert!(read_head(&head("content-type: text/html\r\n")).is_err());
        assert_eq!(read_head(b"HTTP/1.1 401 Unauthorized\r\n\r\n"), Err(WireError::Refused(401)));
    }
}

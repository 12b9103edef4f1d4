//! The part of RFC 6455 that a load tester's client needs.
//!
//! Owns the client's upgrade request, the check of its answer, masked frames out and unmasked frames in. It
//! works on byte slices and knows no socket. Refuses fragmented messages and extensions that were not
//! offered: a tester must report these instead of working around them.

use thiserror::Error;

use crate::inflate::{Inflater, OFFER};

/// The largest frame payload a member accepts, in bytes.
pub const MAX_PAYLOAD: usize = 1024 * 1024;

/// The maximum number of bytes that a buffer may hold without a complete frame.
pub const MAX_FRAME: usize = MAX_PAYLOAD + 10;

/// The largest response head to an upgrade request, in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// Seven-bit lengths that announce a longer length (RFC 6455 §5.2).
const MEDIUM: u8 = 0x7E;
const LONG: u8 = 0x7F;

/// The nonce of RFC 6455 §1.3 and the answer it must get. A fixed nonce is good enough here (it protects
/// against caches, not attackers), and comparing a fixed answer is still a check.
const NONCE: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &[u8] = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// A frame's opcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opcode {
    Text,
    Binary,
    Close,
    Ping,
    Pong,
}

impl Opcode {
    fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0x1 => Some(Self::Text),
            0x2 => Some(Self::Binary),
            0x8 => Some(Self::Close),
            0x9 => Some(Self::Ping),
            0xA => Some(Self::Pong),
            _ => None,
        }
    }

    fn bits(self) -> u8 {
        match self {
            Self::Text => 0x1,
            Self::Binary => 0x2,
            Self::Close => 0x8,
            Self::Ping => 0x9,
            Self::Pong => 0xA,
        }
    }
}

/// One complete frame from the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub opcode: Opcode,
    pub payload: &'a [u8],
    /// The payload is a whole compressed message (RFC 7692 §6).
    pub compressed: bool,
}

/// Why bytes from the server are not acceptable.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    #[error("the server sent a fragmented message, which this tester does not assemble")]
    Fragmented,
    #[error("the server sent a frame with reserved bits or an unknown opcode (first byte {0:#04x})")]
    Reserved(u8),
    #[error("the server sent a masked frame")]
    Masked,
    #[error("the server sent a frame of {0} bytes; this tester accepts up to {MAX_PAYLOAD}")]
    TooLarge(u64),
    #[error("the server sent a message that cannot be inflated")]
    Compression,
    #[error("the connection was refused with status {0}")]
    Refused(u16),
    #[error("the answer is not a valid handshake: {0}")]
    Handshake(&'static str),
}

/// Reads one frame from the front of `bytes`: the frame and its length, or `None` when it is incomplete.
/// `deflate`: compressed messages were negotiated.
pub fn read_frame(bytes: &[u8], deflate: bool) -> Result<Option<(Frame<'_>, usize)>, WireError> {
    let &[first, second, ref rest @ ..] = bytes else { return Ok(None) };
    let compressed = first & 0x40 != 0;
    if first & 0x30 != 0 || compressed && !deflate {
        return Err(WireError::Reserved(first));
    }
    let is_final = first & 0x80 != 0;
    let opcode = match (is_final, first & 0x0F) {
        (false, _) | (_, 0x0) => return Err(WireError::Fragmented),
        (true, bits) => Opcode::from_bits(bits).ok_or(WireError::Reserved(first))?,
    };
    if compressed && !matches!(opcode, Opcode::Text | Opcode::Binary) {
        return Err(WireError::Reserved(first));
    }
    if second & 0x80 != 0 {
        return Err(WireError::Masked);
    }
    let (announced, header) = match second {
        MEDIUM => match rest.first_chunk::<2>() {
            Some(&length) => (u64::from(u16::from_be_bytes(length)), 4),
            None => return Ok(None),
        },
        LONG => match rest.first_chunk::<8>() {
            Some(&length) => (u64::from_be_bytes(length), 10),
            None => return Ok(None),
        },
        short => (u64::from(short), 2),
    };
    let length = usize::try_from(announced)
        .ok()
        .filter(|&length| length <= MAX_PAYLOAD)
        .ok_or(WireError::TooLarge(announced))?;
    let end = header + length;
    Ok(bytes.get(header..end).map(|payload| (Frame { opcode, payload, compressed }, end)))
}

/// Appends a client's frame: masked, final, with the concatenated `parts` as its payload.
///
/// The mask changes with every call but is not secret: between a tester and its target nothing has to be
/// protected by it, and the server has to unmask in any case.
pub fn write_masked(out: &mut Vec<u8>, opcode: Opcode, parts: &[&[u8]], seed: u64) {
    write_header(out, opcode, parts.iter().map(|part| part.len()).sum(), 0x80);
    let [_, _, _, _, mask @ ..] = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_ne_bytes();
    out.extend_from_slice(&mask);
    let payload = parts.iter().copied().flatten();
    out.extend(payload.zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
}

/// Appends a server's frame: unmasked, final, with the concatenated `parts` as its payload. The yardsticks
/// send these.
pub fn write_unmasked(out: &mut Vec<u8>, opcode: Opcode, parts: &[&[u8]]) {
    write_header(out, opcode, parts.iter().map(|part| part.len()).sum(), 0);
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// The length of the frame that [`write_unmasked`] appends for `payload` bytes.
pub fn unmasked_size(payload: usize) -> usize {
    match payload {
        0..=125 => payload + 2,
        126..=0xFFFF => payload + 4,
        _ => payload + 10,
    }
}

fn write_header(out: &mut Vec<u8>, opcode: Opcode, length: usize, mask_bit: u8) {
    out.push(0x80 | opcode.bits());
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short @ 0..=125), _) => out.push(mask_bit | short),
        (_, Ok(medium)) => {
            out.push(mask_bit | MEDIUM);
            out.extend_from_slice(&medium.to_be_bytes());
        }
        _ => {
            out.push(mask_bit | LONG);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
}

/// The upgrade request for `path` (with its query) at `authority`, with the header line `authorization` if it
/// is not empty. `deflate`: offer compression.
pub fn upgrade_request(authority: &str, path: &str, authorization: &str, deflate: bool) -> Vec<u8> {
    let extension = if deflate { format!("Sec-WebSocket-Extensions: {OFFER}\r\n") } else { String::new() };
    format!(
        "GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {NONCE}\r\n{authorization}{extension}\r\n"
    )
    .into_bytes()
}

/// The answer to every [`upgrade_request`] of this tester, for a server of its own: the key is always the
/// same.
pub const UPGRADED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                            Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// Reads the answer to [`upgrade_request`]: the length of its head once the connection is a `WebSocket`,
/// `None` while it is incomplete.
pub fn read_upgrade(bytes: &[u8], deflate: bool) -> Result<Option<usize>, WireError> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Ok(None),
        Ok(httparse::Status::Partial) => return Err(WireError::Handshake("its head is too long")),
        Err(_) => return Err(WireError::Handshake("it is not HTTP/1.1")),
    };
    match response.code {
        Some(101) => {}
        Some(status) => return Err(WireError::Refused(status)),
        None => return Err(WireError::Handshake("it has no status code")),
    }
    let header = |name: &str| {
        response
            .headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case(name))
            .map(|header| header.value)
    };
    if header("sec-websocket-accept") != Some(ACCEPT) {
        return Err(WireError::Handshake("Sec-WebSocket-Accept does not answer the key"));
    }
    match header("sec-websocket-extensions") {
        Some(answer) if deflate && Inflater::is_agreed(answer) => Ok(Some(length)),
        Some(_) => Err(WireError::Handshake("it chose an extension that was not offered")),
        None if deflate => Err(WireError::Handshake("it does not agree to permessage-deflate")),
        None => Ok(Some(length)),
    }
}

/// The bytes that one connection has received but not parsed: at most one incomplete frame or response head.
///
/// All connections of a loop read into one shared scratch buffer. The remaining bytes are kept here and put
/// back in front of the next read; a connection whose frames arrive whole allocates nothing.
#[derive(Debug, Default)]
pub struct Leftover(Vec<u8>);

impl Leftover {
    /// Copies the kept bytes to the front of `scratch` and returns their length. Follow with
    /// [`keep`](Self::keep).
    pub fn restore(&mut self, scratch: &mut [u8]) -> usize {
        if let Some(front) = scratch.get_mut(..self.0.len()) {
            front.copy_from_slice(&self.0);
        }
        let held = self.0.len();
        self.0.clear();
        held
    }

    /// Keeps `rest`, the bytes that could not be parsed yet.
    pub fn keep(&mut self, rest: &[u8]) {
        self.0.extend_from_slice(rest);
    }
}

/// Passes every complete frame at the front of `bytes` to `each` and returns the remaining bytes.
pub fn read_frames<'a>(
    mut bytes: &'a [u8],
    deflate: bool,
    mut each: impl FnMut(Frame<'a>),
) -> Result<&'a [u8], WireError> {
    while let Some((frame, used)) = read_frame(bytes, deflate)? {
        each(frame);
        bytes = bytes.get(used..).unwrap_or_default();
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn server_frames(payloads: &[Vec<u8>]) -> Vec<u8> {
        let mut wire = Vec::new();
        for payload in payloads {
            write_unmasked(&mut wire, Opcode::Binary, &[payload]);
        }
        wire
    }

    #[test]
    fn header_lengths_at_their_boundaries() {
        for (length, header) in [(0, 2), (125, 2), (126, 4), (65_535, 4), (65_536, 10), (MAX_PAYLOAD, 10)] {
            let wire = server_frames(&[vec![7; length]]);
            assert_eq!(wire.len(), length + header);
            assert_eq!(unmasked_size(length), wire.len());
            let (frame, used) = read_frame(&wire, false).unwrap().unwrap();
            assert_eq!((frame.payload.len(), used), (length, wire.len()));
            assert_eq!(read_frame(&wire[..wire.len() - 1], false), Ok(None));
        }
    }

    #[test]
    fn unrequested_frames_are_refused() {
        assert_eq!(read_frame(&[0x01, 0], false), Err(WireError::Fragmented));
        assert_eq!(read_frame(&[0x80, 0], false), Err(WireError::Fragmented));
        assert_eq!(read_frame(&[0xC1, 0], false), Err(WireError::Reserved(0xC1)));
        assert_eq!(read_frame(&[0x83, 0], false), Err(WireError::Reserved(0x83)));
        assert_eq!(read_frame(&[0x81, 0x80], false), Err(WireError::Masked));
        let mut huge = vec![0x82, 127];
        huge.extend_from_slice(&(u64::MAX).to_be_bytes());
        assert_eq!(read_frame(&huge, false), Err(WireError::TooLarge(u64::MAX)));
    }

    #[test]
    fn masked_frames_can_be_unmasked() {
        let mut wire = Vec::new();
        write_masked(&mut wire, Opcode::Text, &[b"he", b"llo"], 3);
        assert_eq!(&wire[..2], &[0x81, 0x85]);
        let mask = &wire[2..6];
        assert_ne!(mask, [0; 4]);
        let plain: Vec<u8> = wire[6..].iter().zip(mask.iter().cycle()).map(|(a, b)| a ^ b).collect();
        assert_eq!(plain, b"hello");
    }

    #[test]
    fn an_upgrade_is_checked() {
        let good = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\
                    sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
        assert_eq!(read_upgrade(good.as_bytes(), false), Ok(Some(good.len())));
        assert_eq!(read_upgrade(format!("{good}\u{81}").as_bytes(), false), Ok(Some(good.len())));
        assert_eq!(read_upgrade(&good.as_bytes()[..good.len() - 1], false), Ok(None));
        assert_eq!(read_upgrade(b"HTTP/1.1 403 Forbidden\r\n\r\n", false), Err(WireError::Refused(403)));
        assert!(matches!(read_upgrade(b"HTTP/1.1 101 x\r\n\r\n", false), Err(WireError::Handshake(_))));
        assert!(matches!(read_upgrade(b"+PONG\r\n", false), Err(WireError::Handshake(_))));
    }

    #[test]
    fn compressed_frames_need_negotiation() {
        let frame = [0xC1, 2, 7, 8];
        assert_eq!(read_frame(&frame, false), Err(WireError::Reserved(0xC1)));
        let expected = Frame { opcode: Opcode::Text, payload: &[7, 8], compressed: true };
        assert_eq!(read_frame(&frame, true), Ok(Some((expected, 4))));
        for first in [0xC9, 0xA1, 0x91] {
            assert_eq!(read_frame(&[first, 0], true), Err(WireError::Reserved(first)), "{first:#x}");
        }
        let answer = |more: &str| {
            format!("HTTP/1.1 101 x\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n{more}\r\n")
        };
        let good = answer("sec-websocket-extensions: permessage-deflate; server_no_context_takeover\r\n");
        assert_eq!(read_upgrade(good.as_bytes(), true), Ok(Some(good.len())));
        assert!(matches!(read_upgrade(good.as_bytes(), false), Err(WireError::Handshake(_))));
        let none = answer("");
        assert!(matches!(read_upgrade(none.as_bytes(), true), Err(WireError::Handshake(_))));
        assert!(String::from_utf8(upgrade_request("x", "/", "", true)).unwrap().contains(OFFER));
    }

    proptest! {
        /// However the stream is split, the same frames come out, and no bytes remain.
        #[test]
        fn frames_survive_any_split(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..400), 1..8),
            cuts in prop::collection::vec(1_usize..300, 1..40),
        ) {
            let wire = server_frames(&payloads);
            let mut scratch = vec![0; 8192];
            let (mut leftover, mut seen, mut sent) = (Leftover::default(), Vec::new(), 0);
            let mut cuts = cuts.into_iter().cycle();
            while sent < wire.len() {
                let held = leftover.restore(&mut scratch);
                let piece = cuts.next().unwrap().min(wire.len() - sent);
                scratch[held..held + piece].copy_from_slice(&wire[sent..sent + piece]);
                sent += piece;
                let rest = read_frames(&scratch[..held + piece], false, |frame| seen.push(frame.payload.to_vec()));
                leftover.keep(rest.unwrap());
            }
            prop_assert_eq!(seen, payloads);
            prop_assert_eq!(leftover.restore(&mut scratch), 0);
        }
    }
}

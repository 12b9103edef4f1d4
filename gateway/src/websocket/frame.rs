//! The layout of a frame (RFC 6455 §5.2), in both directions.
//!
//! Frames to clients are never masked or fragmented, so their bytes depend only on the message: one
//! [`encode`] serves every socket. For frames from clients, this module parses headers and unmasks payloads;
//! the [decoder](super::decoder) handles sequences of frames.

use bytes::{BufMut, Bytes, BytesMut};

use super::{ProtocolError, deflate};

/// The longest payload of a control frame, in bytes (§5.5).
pub const MAX_CONTROL_PAYLOAD: usize = 125;

const FIN: u8 = 0x80;
/// In the first frame of a message: the message is compressed (RFC 7692 §6).
pub(super) const RSV1: u8 = 0x40;
const RSV2_RSV3: u8 = 0x30;
const OPCODE: u8 = 0x0f;
const MASKED: u8 = 0x80;
const LENGTH: u8 = 0x7f;
/// Values of the 7-bit length: the length follows in two or in eight bytes.
const LENGTH_16: u8 = 126;
const LENGTH_64: u8 = 127;

/// The kind of a frame to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// A whole text message; its payload must be UTF-8.
    Text = 1,
    /// A whole binary message.
    Binary = 2,
    /// The closing handshake; see [`close_frame`](super::close_frame).
    Close = 8,
    /// Asks the peer for a sign of life.
    Ping = 9,
    /// The answer to a ping, or an unsolicited sign of life.
    Pong = 10,
}

impl Opcode {
    const fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }
}

/// Encodes one unmasked frame with contiguous header and payload, to share between any number of sockets.
///
/// The payload of a control frame is truncated to [`MAX_CONTROL_PAYLOAD`], so the result is always a valid
/// frame.
pub fn encode(opcode: Opcode, payload: &[u8]) -> Bytes {
    let payload = match payload.get(..MAX_CONTROL_PAYLOAD) {
        Some(allowed) if opcode.is_control() => allowed,
        _ => payload,
    };
    let header = header(opcode, payload.len());
    let mut frame = BytesMut::with_capacity(header.as_slice().len() + payload.len());
    frame.put_slice(header.as_slice());
    frame.put_slice(payload);
    frame.freeze()
}

/// A ping with at most the first [`MAX_CONTROL_PAYLOAD`] bytes of `payload`.
pub fn ping(payload: &[u8]) -> Bytes {
    encode(Opcode::Ping, payload)
}

/// The answer to a ping: its payload, unchanged (§5.5.3).
pub fn pong(payload: &[u8]) -> Bytes {
    encode(Opcode::Pong, payload)
}

/// The header of an unmasked, unfragmented frame with a payload of `length` bytes, for payloads that are
/// written separately.
///
/// For a control frame `length` must be at most [`MAX_CONTROL_PAYLOAD`].
pub fn header(opcode: Opcode, length: usize) -> Header {
    debug_assert!(!opcode.is_control() || length <= MAX_CONTROL_PAYLOAD, "{opcode:?} of {length} bytes");
    let mut header = Header { bytes: [0; Header::MAX_BYTES], length: 0 };
    header.push(&[FIN | opcode as u8]);
    // The match arms choose the shortest form that fits (§5.2).
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short @ ..LENGTH_16), _) => header.push(&[short]),
        (_, Ok(medium)) => {
            header.push(&[LENGTH_16]);
            header.push(&medium.to_be_bytes());
        }
        _ => {
            header.push(&[LENGTH_64]);
            header.push(&(length as u64).to_be_bytes());
        }
    }
    header
}

/// The 2, 4 or 10 bytes before an unmasked payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    bytes: [u8; Self::MAX_BYTES],
    length: u8,
}

impl Header {
    /// The longest header, in bytes.
    pub const MAX_BYTES: usize = 10;

    /// The header as sent on the wire.
    pub fn as_slice(&self) -> &[u8] {
        self.bytes.split_at(usize::from(self.length)).0
    }

    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if let Some(place) = self.bytes.get_mut(usize::from(self.length)) {
                *place = byte;
                self.length += 1;
            }
        }
    }
}

/// The kind and the payload of a complete unmasked text or binary frame, as [`encode`] creates it.
pub(super) fn opened(frame: &[u8]) -> Option<(Opcode, &[u8])> {
    let (&first, rest) = frame.split_first()?;
    let opcode = match first {
        0x81 => Opcode::Text,
        0x82 => Opcode::Binary,
        _ => return None,
    };
    let (&second, rest) = rest.split_first()?;
    let (length, payload) = extended_length(second, rest).ok()??;
    (payload.len() as u64 == length).then_some((opcode, payload))
}

/// The kind of a frame from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrameKind {
    /// The first or only frame of a message.
    First(MessageKind),
    /// A later frame of a fragmented message.
    Continuation,
    /// A control frame.
    Control(ControlKind),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MessageKind {
    Text,
    Binary,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ControlKind {
    Close,
    Ping,
    Pong,
}

/// The state of a message whose last fragment has not arrived.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenMessage {
    pub bytes: usize,
    pub compressed: bool,
}

/// The header of a frame from a client, valid in itself and at its place in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClientHeader {
    pub kind: FrameKind,
    pub fin: bool,
    /// Whether the frame begins a compressed message.
    pub compressed: bool,
    /// Payload bytes that have not arrived yet.
    pub length: usize,
    pub mask: Mask,
}

impl ClientHeader {
    /// The longest header of a masked frame, in bytes.
    pub const MAX_BYTES: usize = 14;

    /// Parses the header at the start of `bytes` and returns it with its length. `None` if more bytes are
    /// needed.
    ///
    /// `open` is the fragmented message in progress, if any. `deflate` tells whether messages may be
    /// compressed.
    ///
    /// Checks the rules byte by byte, in the order of the bytes, so that the result does not depend on how
    /// the stream was split.
    pub fn parse(
        bytes: &[u8],
        open: Option<OpenMessage>,
        max_message: usize,
        deflate: bool,
    ) -> Result<Option<(Self, usize)>, ProtocolError> {
        let Some((&first, rest)) = bytes.split_first() else { return Ok(None) };
        let (kind, fin) = first_byte(first, open.is_some(), deflate)?;
        let compressed = first & RSV1 != 0;

        let Some((&second, rest)) = rest.split_first() else { return Ok(None) };
        if second & MASKED == 0 {
            return Err(ProtocolError::Unmasked);
        }
        let is_control = matches!(kind, FrameKind::Control(_));
        if is_control && usize::from(second & LENGTH) > MAX_CONTROL_PAYLOAD {
            return Err(ProtocolError::ControlTooLong);
        }

        let Some((length, rest)) = extended_length(second & LENGTH, rest)? else { return Ok(None) };
        let open = open.unwrap_or(OpenMessage { bytes: 0, compressed });
        let most = if open.compressed { deflate::longest(max_message) } else { max_message };
        if !is_control && length.saturating_add(open.bytes as u64) > most as u64 {
            return Err(ProtocolError::MessageTooBig { limit: max_message });
        }
        let length = usize::try_from(length).expect("at most the message limit, which is a usize");

        let Some((&mask, rest)) = rest.split_first_chunk() else { return Ok(None) };
        let size = bytes.len() - rest.len();
        Ok(Some((Self { kind, fin, compressed, length, mask: Mask(mask) }, size)))
    }
}

/// Parses FIN, RSV and opcode.
fn first_byte(byte: u8, message_open: bool, deflate: bool) -> Result<(FrameKind, bool), ProtocolError> {
    // Only the first frame of a message may be marked as compressed (RFC 7692 §6.1).
    let may_be_compressed = deflate && matches!(byte & OPCODE, 1 | 2);
    if byte & RSV2_RSV3 != 0 || (byte & RSV1 != 0 && !may_be_compressed) {
        return Err(ProtocolError::ReservedBits);
    }
    let fin = byte & FIN != 0;
    let kind = match byte & OPCODE {
        0 => FrameKind::Continuation,
        1 => FrameKind::First(MessageKind::Text),
        2 => FrameKind::First(MessageKind::Binary),
        8 => FrameKind::Control(ControlKind::Close),
        9 => FrameKind::Control(ControlKind::Ping),
        10 => FrameKind::Control(ControlKind::Pong),
        reserved => return Err(ProtocolError::ReservedOpcode(reserved)),
    };
    match kind {
        FrameKind::Control(_) if !fin => Err(ProtocolError::FragmentedControl),
        FrameKind::Continuation if !message_open => Err(ProtocolError::UnexpectedContinuation),
        FrameKind::First(_) if message_open => Err(ProtocolError::ExpectedContinuation),
        _ => Ok((kind, fin)),
    }
}

/// The payload length and the rest of the input. `None` if more bytes are needed.
fn extended_length(short: u8, rest: &[u8]) -> Result<Option<(u64, &[u8])>, ProtocolError> {
    let (length, shortest, rest) = match short {
        LENGTH_16 => match rest.split_first_chunk() {
            Some((bytes, rest)) => (u64::from(u16::from_be_bytes(*bytes)), u64::from(LENGTH_16), rest),
            None => return Ok(None),
        },
        LENGTH_64 => match rest.split_first_chunk() {
            Some((bytes, rest)) => (u64::from_be_bytes(*bytes), 1 << 16, rest),
            None => return Ok(None),
        },
        short => (u64::from(short), 0, rest),
    };
    if length < shortest {
        return Err(ProtocolError::LengthNotMinimal);
    }
    if length >> 63 != 0 {
        return Err(ProtocolError::LengthTopBit);
    }
    Ok(Some((length, rest)))
}

/// A masking key (§5.3), rotated so that its first byte is the next one to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mask(pub [u8; 4]);

impl Mask {
    /// Masks or unmasks `payload` and rotates the key by its length.
    pub fn apply(&mut self, payload: &mut [u8]) {
        let [a, b, c, d] = self.0;
        let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
        // Whole words of eight bytes; the compiler vectorizes this loop.
        let (words, tail) = payload.as_chunks_mut();
        for word in words {
            *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
        }
        // A word is a multiple of the key, so the tail starts with the key's first byte.
        for (byte, key) in tail.iter_mut().zip([a, b, c, d, a, b, c]) {
            *byte ^= key;
        }
        self.0.rotate_left(payload.len() % 4);
    }
}

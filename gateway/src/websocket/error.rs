//! The ways in which a client can violate the protocol.

use super::CloseCode;

/// A violation of RFC 6455 by a client.
///
/// The text says what was wrong and what was expected. It quotes nothing from the client except numbers, and
/// fits into a close frame's reason (123 bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ProtocolError {
    /// §5.2: RSV1, RSV2 and RSV3 are 0 unless an extension gives them a meaning.
    #[error("reserved bits are set that no negotiated extension uses here: expected them to be 0")]
    ReservedBits,
    /// §5.2: opcodes 3 to 7 and 11 to 15 are reserved.
    #[error("opcode {0} is reserved: expected 0, 1, 2, 8, 9 or 10")]
    ReservedOpcode(u8),
    /// §5.5: control frames are not fragmented.
    #[error("a control frame is fragmented: expected FIN to be set")]
    FragmentedControl,
    /// §5.5: a control frame's payload has at most 125 bytes.
    #[error("a control frame is too long: expected at most 125 bytes of payload")]
    ControlTooLong,
    /// §5.4: a continuation frame must continue a message.
    #[error("a continuation frame came first: expected a text or binary frame to begin a message")]
    UnexpectedContinuation,
    /// §5.4: a message must not begin inside another one.
    #[error("a new message began inside a fragmented one: expected a continuation frame")]
    ExpectedContinuation,
    /// §5.1: a client must mask every frame.
    #[error("a frame is not masked: expected every client frame to be masked")]
    Unmasked,
    /// §5.2: a length must use the shortest form.
    #[error("a payload length is not written in its shortest form: expected the minimal encoding")]
    LengthNotMinimal,
    /// §5.2: the most significant bit of a 64-bit length is 0.
    #[error("a 64-bit payload length has its top bit set: expected less than 2^63")]
    LengthTopBit,
    /// §7.4.1, code 1009: the message is larger than the server accepts.
    #[error("the message is too big: expected at most {limit} bytes")]
    MessageTooBig {
        /// The largest accepted message, in bytes.
        limit: usize,
    },
    /// RFC 7692 §7.2.2: a compressed message is a DEFLATE stream.
    #[error("a compressed message is not valid: expected DEFLATE data")]
    InvalidCompression,
    /// A small message that would inflate to far more memory.
    #[error("a message is compressed too well: expected at most {limit} times its compressed size")]
    CompressedTooWell {
        /// The largest accepted ratio.
        limit: usize,
    },
    /// The caller refuses to let a compressed message grow any further.
    #[error("a compressed message is more than the client may send now: expected less")]
    NotPaidFor,
    /// §8.1: a text message is UTF-8.
    #[error("a text message is not valid: expected UTF-8")]
    InvalidUtf8,
    /// §5.5.1: a close frame's payload, if there is any, begins with a two-byte code.
    #[error("a close frame has one byte of payload: expected none, or a code of two bytes and a reason")]
    CloseTooShort,
    /// §7.4: only some codes may be sent.
    #[error("close code {0} may not be sent: expected 1000-1003, 1007-1014 or 3000-4999")]
    InvalidCloseCode(u16),
    /// §5.5.1: a close frame's reason is UTF-8.
    #[error("a close reason is not valid: expected UTF-8")]
    InvalidCloseReason,
}

impl ProtocolError {
    /// The code to close the connection with (§7.4.1).
    pub fn close_code(self) -> CloseCode {
        match self {
            Self::ReservedBits
            | Self::ReservedOpcode(_)
            | Self::FragmentedControl
            | Self::ControlTooLong
            | Self::UnexpectedContinuation
            | Self::ExpectedContinuation
            | Self::Unmasked
            | Self::LengthNotMinimal
            | Self::LengthTopBit
            | Self::CloseTooShort
            | Self::InvalidCloseCode(_) => CloseCode::PROTOCOL_ERROR,
            Self::InvalidUtf8 | Self::InvalidCloseReason | Self::InvalidCompression => {
                CloseCode::INVALID_PAYLOAD
            }
            Self::MessageTooBig { .. } | Self::CompressedTooWell { .. } => CloseCode::MESSAGE_TOO_BIG,
            Self::NotPaidFor => CloseCode::POLICY_VIOLATION,
        }
    }
}

//! Why a connection closes (RFC 6455 §5.5.1 and §7.4).

use std::fmt;

use bytes::Bytes;

use super::{Opcode, ProtocolError, encode, frame::MAX_CONTROL_PAYLOAD};

/// A close code that may travel in a close frame.
///
/// Codes that only describe what happened locally (1004, 1005, 1006, 1015), unassigned ones and those
/// outside 1000–4999 cannot be a value of this type.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CloseCode(u16);

impl CloseCode {
    /// The purpose of the connection is fulfilled.
    pub const NORMAL: Self = Self(1000);
    /// The server goes down, or the page was left.
    pub const GOING_AWAY: Self = Self(1001);
    /// The peer broke the protocol.
    pub const PROTOCOL_ERROR: Self = Self(1002);
    /// The peer sent a kind of message that is not taken here.
    pub const UNSUPPORTED_DATA: Self = Self(1003);
    /// A message's content does not fit its kind, such as text that is not UTF-8.
    pub const INVALID_PAYLOAD: Self = Self(1007);
    /// A message, or the peer, is against the policy.
    pub const POLICY_VIOLATION: Self = Self(1008);
    /// A message is larger than is taken here.
    pub const MESSAGE_TOO_BIG: Self = Self(1009);
    /// A client misses an extension. Never sent by a server.
    pub const MANDATORY_EXTENSION: Self = Self(1010);
    /// The server cannot fulfil the request.
    pub const INTERNAL_ERROR: Self = Self(1011);
    /// The server restarts: come back after a random pause (IANA registry).
    pub const SERVICE_RESTART: Self = Self(1012);
    /// The server is overloaded: come back later (IANA registry).
    pub const TRY_AGAIN_LATER: Self = Self(1013);
    /// A gateway got an invalid answer from behind it (IANA registry).
    pub const BAD_GATEWAY: Self = Self(1014);

    /// `code`, if an endpoint may send it: 1000–1003, 1007–1014 and 3000–4999.
    ///
    /// The first two ranges are the assigned ones of the IANA "WebSocket Close Code Number" registry
    /// without those that are never sent; the last is for libraries, frameworks and applications
    /// (§7.4.2).
    pub const fn new(code: u16) -> Option<Self> {
        match code {
            1000..=1003 | 1007..=1014 | 3000..=4999 => Some(Self(code)),
            _ => None,
        }
    }

    /// The code as it is written on the wire.
    pub const fn as_u16(self) -> u16 {
        self.0
    }
}

impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// What a received close frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloseFrame<'a> {
    /// Why the peer closes.
    pub code: CloseCode,
    /// A text for people and logs, at most 123 bytes. Written by the peer: not to be trusted.
    pub reason: &'a str,
}

impl<'a> CloseFrame<'a> {
    /// The longest reason, in bytes: a control frame's payload without the code.
    pub const MAX_REASON: usize = MAX_CONTROL_PAYLOAD - 2;

    /// Reads a close frame's payload. `None` if the peer gave no code.
    pub(super) fn parse(payload: &'a [u8]) -> Result<Option<Self>, ProtocolError> {
        let Some((code, reason)) = payload.split_first_chunk() else {
            return if payload.is_empty() { Ok(None) } else { Err(ProtocolError::CloseTooShort) };
        };
        let code = u16::from_be_bytes(*code);
        let code = CloseCode::new(code).ok_or(ProtocolError::InvalidCloseCode(code))?;
        let reason = std::str::from_utf8(reason).map_err(|_| ProtocolError::InvalidCloseReason)?;
        Ok(Some(Self { code, reason }))
    }
}

/// The answer to a close frame: it says the peer's own code (§5.5.1), or that all is well if the peer gave none.
pub fn close_answer(code: Option<CloseCode>) -> Bytes {
    close_frame(code.unwrap_or(CloseCode::NORMAL), "")
}

/// A close frame to send. A reason longer than [`CloseFrame::MAX_REASON`] loses its end, never half a
/// character.
pub fn close_frame(code: CloseCode, reason: &str) -> Bytes {
    let mut end = reason.len().min(CloseFrame::MAX_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let (reason, _) = reason.split_at(end);

    let mut payload = Vec::with_capacity(MAX_CONTROL_PAYLOAD);
    payload.extend_from_slice(&code.as_u16().to_be_bytes());
    payload.extend_from_slice(reason.as_bytes());
    encode(Opcode::Close, &payload)
}

//! Close codes and close frames (RFC 6455 §5.5.1 and §7.4).

use std::fmt;

use bytes::Bytes;

use super::{Opcode, ProtocolError, encode, frame::MAX_CONTROL_PAYLOAD};

/// A close code that may be sent in a close frame.
///
/// Cannot hold codes that only describe local events (1004, 1005, 1006, 1015), unassigned codes, or codes
/// outside 1000–4999.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CloseCode(u16);

impl CloseCode {
    /// The connection has served its purpose.
    pub const NORMAL: Self = Self(1000);
    /// The server is going down, or the user has left the page.
    pub const GOING_AWAY: Self = Self(1001);
    /// The peer violated the protocol.
    pub const PROTOCOL_ERROR: Self = Self(1002);
    /// The peer sent a kind of message that is not accepted.
    pub const UNSUPPORTED_DATA: Self = Self(1003);
    /// A message's content does not fit its kind, such as text that is not UTF-8.
    pub const INVALID_PAYLOAD: Self = Self(1007);
    /// A message, or the peer, violates a policy.
    pub const POLICY_VIOLATION: Self = Self(1008);
    /// A message is too large.
    pub const MESSAGE_TOO_BIG: Self = Self(1009);
    /// A client requires an extension that the server did not agree to. Never sent by a server.
    pub const MANDATORY_EXTENSION: Self = Self(1010);
    /// The server cannot fulfil the request.
    pub const INTERNAL_ERROR: Self = Self(1011);
    /// The server is restarting: reconnect after a random delay (IANA registry).
    pub const SERVICE_RESTART: Self = Self(1012);
    /// The server is overloaded: reconnect later (IANA registry).
    pub const TRY_AGAIN_LATER: Self = Self(1013);
    /// A gateway got an invalid response from its upstream (IANA registry).
    pub const BAD_GATEWAY: Self = Self(1014);

    /// `code`, if an endpoint may send it: 1000–1003, 1007–1014 and 3000–4999.
    ///
    /// The first two ranges are the assigned codes of the IANA "WebSocket Close Code Number" registry,
    /// without those that are never sent. The last is for libraries, frameworks and applications (§7.4.2).
    pub const fn new(code: u16) -> Option<Self> {
        match code {
            1000..=1003 | 1007..=1014 | 3000..=4999 => Some(Self(code)),
            _ => None,
        }
    }

    /// The code as sent on the wire.
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

/// The contents of a received close frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloseFrame<'a> {
    /// Why the peer closes.
    pub code: CloseCode,
    /// A text for people and logs, at most 123 bytes. The peer wrote it, so don't trust it.
    pub reason: &'a str,
}

impl<'a> CloseFrame<'a> {
    /// The longest reason, in bytes: a control frame's payload without the code.
    pub const MAX_REASON: usize = MAX_CONTROL_PAYLOAD - 2;

    /// Parses a close frame's payload. `None` if the peer gave no code.
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

/// The answer to a close frame: echoes the peer's code (§5.5.1), or uses 1000 if the peer gave none.
pub fn close_answer(code: Option<CloseCode>) -> Bytes {
    close_frame(code.unwrap_or(CloseCode::NORMAL), "")
}

/// A close frame to send. A reason longer than [`CloseFrame::MAX_REASON`] is truncated at a character
/// boundary.
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

//! UTF-8 of text messages (RFC 6455 §8.1), whole or in pieces.

use super::ProtocolError;

/// Verifies a text that is all there.
pub(super) fn verify(text: &[u8]) -> Result<(), ProtocolError> {
    simdutf8::basic::from_utf8(text).map(|_| ()).map_err(|_| ProtocolError::InvalidUtf8)
}

/// Verifies a text that grows at its end, of which the first `verified` bytes are known to be good.
///
/// Returns how many bytes are good now: all, or all but the first 1 to 3 bytes of a character whose rest
/// may still come. A sequence that no continuation can make valid is refused at its first wrong byte, so
/// at most three bytes are looked at twice and nothing wrong waits for the end of its frame.
pub(super) fn verify_more(text: &[u8], verified: usize) -> Result<usize, ProtocolError> {
    let tail = text.get(verified..).unwrap_or_default();
    match simdutf8::compat::from_utf8(tail) {
        Ok(_) => Ok(text.len()),
        Err(error) if error.error_len().is_none() => Ok(verified + error.valid_up_to()),
        Err(_) => Err(ProtocolError::InvalidUtf8),
    }
}

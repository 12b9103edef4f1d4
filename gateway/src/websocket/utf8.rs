//! UTF-8 validation of text messages (RFC 6455 §8.1), whole or in pieces.

use super::ProtocolError;

/// Validates a complete text.
pub(super) fn verify(text: &[u8]) -> Result<(), ProtocolError> {
    simdutf8::basic::from_utf8(text).map(|_| ()).map_err(|_| ProtocolError::InvalidUtf8)
}

/// Validates a text that grows at its end, whose first `verified` bytes are already valid.
///
/// Returns how many bytes are valid now: all, or all except for the first 1 to 3 bytes of a character that
/// may still be completed. A sequence that cannot become valid is refused at its first wrong byte. So at most
/// three bytes are checked twice, and no error waits for the end of its frame.
pub(super) fn verify_more(text: &[u8], verified: usize) -> Result<usize, ProtocolError> {
    let tail = text.get(verified..).unwrap_or_default();
    match simdutf8::compat::from_utf8(tail) {
        Ok(_) => Ok(text.len()),
        Err(error) if error.error_len().is_none() => Ok(verified + error.valid_up_to()),
        Err(_) => Err(ProtocolError::InvalidUtf8),
    }
}

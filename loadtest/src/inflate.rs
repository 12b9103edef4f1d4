//! Compressed messages: the client side of permessage-deflate (RFC 7692) without context takeover.
//!
//! Owns the inflater, which all connections of a loop share, since each message is independent. The output is
//! bounded. A broadcast consists of the same bytes for all members, so the last result is kept and equal
//! bytes are not inflated again; this keeps the tester cheaper than the server.

use flate2::{Decompress, FlushDecompress, Status};

use crate::websocket::{MAX_PAYLOAD, WireError};

/// The extension offer. The server has to agree to keep no context; the client never compresses.
pub const OFFER: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

/// The bytes that a sender removes from the end of a message (RFC 7692 §7.2.1).
const TAIL: &[u8] = &[0, 0, 0xFF, 0xFF];

/// How much the output buffer grows at a time, in bytes.
const STEP: usize = 64 * 1024;

/// Inflates messages.
#[derive(Debug)]
pub struct Inflater {
    stream: Decompress,
    /// The last message, compressed and inflated.
    compressed: Vec<u8>,
    message: Vec<u8>,
}

impl Default for Inflater {
    fn default() -> Self {
        Self { stream: Decompress::new(false), compressed: Vec::new(), message: Vec::new() }
    }
}

impl Inflater {
    /// Inflates `payload`.
    pub fn inflate(&mut self, payload: &[u8]) -> Result<&[u8], WireError> {
        // An empty payload is invalid: even an empty message takes a byte.
        if payload.is_empty() || payload != self.compressed {
            self.compressed.clear();
            self.message.clear();
            self.stream.reset(false);
            self.feed(payload)?;
            self.feed(TAIL)?;
            self.compressed.extend_from_slice(payload);
        }
        Ok(&self.message)
    }

    /// Whether `answer`, the value of `Sec-WebSocket-Extensions`, agrees to the [`OFFER`].
    pub fn is_agreed(answer: &[u8]) -> bool {
        let mut words = answer.split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
        words.next() == Some(b"permessage-deflate") && words.any(|word| word == b"server_no_context_takeover")
    }

    fn feed(&mut self, mut input: &[u8]) -> Result<(), WireError> {
        loop {
            let room = (MAX_PAYLOAD + 1).saturating_sub(self.message.len()).min(STEP);
            if self.message.capacity() == self.message.len() {
                self.message.reserve(room);
            }
            let (taken, given) = (self.stream.total_in(), self.message.len());
            let status = self.stream.decompress_vec(input, &mut self.message, FlushDecompress::Sync);
            let status = status.map_err(|_| WireError::Compression)?;
            let taken = usize::try_from(self.stream.total_in() - taken).unwrap_or(input.len());
            input = input.get(taken..).unwrap_or_default();
            if self.message.len() > MAX_PAYLOAD {
                return Err(WireError::TooLarge(self.message.len() as u64));
            }
            let is_full = self.message.len() == self.message.capacity();
            match status {
                // A sender may end the deflate stream with every message (§7.2.3.4); nothing may follow.
                Status::StreamEnd => return Ok(()),
                Status::Ok | Status::BufError if input.is_empty() && !is_full => return Ok(()),
                _ if taken == 0 && self.message.len() == given && !is_full => {
                    return Err(WireError::Compression);
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};
    use proptest::prelude::*;

    use super::*;

    fn deflate(message: &[u8]) -> Vec<u8> {
        let mut stream = Compress::new(Compression::new(6), false);
        let mut out = Vec::with_capacity(message.len() + 1024);
        stream.compress_vec(message, &mut out, FlushCompress::Sync).unwrap();
        assert!(out.ends_with(TAIL));
        out.truncate(out.len() - TAIL.len());
        out
    }

    proptest! {
        #[test]
        fn deflated_messages_inflate_to_the_original(
            messages in prop::collection::vec(prop::collection::vec(0_u8..4, 0..3000), 1..6),
        ) {
            let mut inflater = Inflater::default();
            for message in messages.iter().flat_map(|message| [message, message]) {
                prop_assert_eq!(inflater.inflate(&deflate(message)).unwrap(), message);
            }
        }

        #[test]
        fn invalid_input_is_refused_or_bounded(payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut inflater = Inflater::default();
            if let Ok(message) = inflater.inflate(&payload) {
                prop_assert!(message.len() <= MAX_PAYLOAD);
            }
            prop_assert_eq!(inflater.inflate(&deflate(b"after it")).unwrap(), b"after it");
        }
    }

    #[test]
    fn a_message_has_a_largest_size() {
        let mut inflater = Inflater::default();
        assert_eq!(inflater.inflate(&deflate(&vec![0; MAX_PAYLOAD])).unwrap().len(), MAX_PAYLOAD);
        let bomb = deflate(&vec![0; MAX_PAYLOAD + 1]);
        assert!(bomb.len() < 2048);
        for _ in 0..2 {
            assert!(matches!(inflater.inflate(&bomb), Err(WireError::TooLarge(_))));
        }
        assert_eq!(inflater.inflate(&deflate(b"after it")).unwrap(), b"after it");
    }

    #[test]
    fn only_matching_answers_agree_to_compression() {
        for (answer, agreed) in [
            ("permessage-deflate; server_no_context_takeover; client_no_context_takeover", true),
            ("permessage-deflate;server_no_context_takeover", true),
            ("permessage-deflate; client_no_context_takeover", false),
            ("permessage-deflate", false),
            ("x-webkit-deflate-frame; server_no_context_takeover", false),
            ("", false),
        ] {
            assert_eq!(Inflater::is_agreed(answer.as_bytes()), agreed, "{answer}");
        }
    }
}

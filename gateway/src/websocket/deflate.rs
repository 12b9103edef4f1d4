//! Permessage-deflate (RFC 7692): negotiation, compression and decompression.
//!
//! Frames from the server must not depend on the socket, or they could not be shared. So the answer to every
//! offer contains `server_no_context_takeover`: a message is compressed once for all recipients. It also
//! contains `client_no_context_takeover`, so that no session keeps a window of 32 KiB for its client's
//! back-references. The memory for compression is therefore per thread, not per connection.
//!
//! Contains no policy: callers decide whether to accept compression, and from which size on to compress.

use std::cell::RefCell;

use bytes::{BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use http::HeaderValue;

use super::{
    ProtocolError,
    frame::{self, RSV1},
};

/// The window that a client accepts for compressed messages (RFC 7692 §7.1.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deflate {
    /// Up to 32 KiB, the default.
    Wide,
    /// 512 bytes, which is within any smaller window that a client asks for.
    Narrow,
}

impl Deflate {
    /// Accepts the first acceptable offer among the values of `Sec-WebSocket-Extensions`, in their order, and
    /// returns the header of the answer. Skips offers with an unknown, repeated or out-of-range parameter
    /// (§7.1).
    pub fn negotiate<'a>(mut offers: impl Iterator<Item = &'a str>) -> Option<(Self, HeaderValue)> {
        offers.find_map(Self::accept).map(|(deflate, bits)| {
            let plain = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
            let answer = match bits {
                None => HeaderValue::from_static(plain),
                Some(bits) => HeaderValue::from_str(&format!("{plain}; server_max_window_bits={bits}"))
                    .expect("ASCII and a number"),
            };
            (deflate, answer)
        })
    }

    /// The window for one offer, and the bits to confirm if the client asked for a size.
    fn accept(offer: &str) -> Option<(Self, Option<u8>)> {
        let mut parts = offer.split(';').map(|part| part.trim_matches([' ', '\t']));
        if !parts.next()?.eq_ignore_ascii_case("permessage-deflate") {
            return None;
        }
        let (mut server_bits, mut seen) = (None, [false; 4]);
        for part in parts {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name.trim_end(), Some(unquoted(value.trim_start()))),
                None => (part, None),
            };
            let place = PARAMETERS.iter().position(|known| known.eq_ignore_ascii_case(name))?;
            if std::mem::replace(seen.get_mut(place)?, true) {
                return None;
            }
            match (place, value) {
                (NO_CONTEXT_SERVER | NO_CONTEXT_CLIENT | BITS_CLIENT, None) => {}
                (BITS_CLIENT, Some(bits)) => drop(window_bits(bits)?),
                (BITS_SERVER, Some(bits)) => server_bits = Some(window_bits(bits)?),
                _ => return None,
            }
        }
        match server_bits {
            None => Some((Self::Wide, None)),
            Some(15) => Some((Self::Wide, Some(15))),
            // zlib's smallest window is 2^9 bytes.
            Some(8) => None,
            Some(_) => Some((Self::Narrow, Some(NARROW_BITS))),
        }
    }

    fn window_bits(self) -> u8 {
        match self {
            Self::Wide => 15,
            Self::Narrow => NARROW_BITS,
        }
    }
}

/// The parameters (§7.1). The constants below are their indices.
const PARAMETERS: [&str; 4] = [
    "server_no_context_takeover",
    "client_no_context_takeover",
    "server_max_window_bits",
    "client_max_window_bits",
];
const NO_CONTEXT_SERVER: usize = 0;
const NO_CONTEXT_CLIENT: usize = 1;
const BITS_SERVER: usize = 2;
const BITS_CLIENT: usize = 3;
const NARROW_BITS: u8 = 9;

/// A number from 8 to 15 without leading zeros (§7.1.2).
fn window_bits(text: &str) -> Option<u8> {
    let bits = text.parse().ok().filter(|bits| (8..=15).contains(bits))?;
    (!text.starts_with(['0', '+'])).then_some(bits)
}

/// A parameter's value may be a quoted string (RFC 6455 §9.1).
fn unquoted(value: &str) -> &str {
    value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
}

/// Fast, and on JSON within a few per cent of the slower levels.
const LEVEL: Compression = Compression::new(3);
/// The end of what a flush writes; it is not sent (§7.2.1).
const TAIL: [u8; 4] = [0, 0, 0xff, 0xff];

thread_local! {
    // Tables of some hundred KiB each, too much to allocate per message or to keep per connection.
    static DEFLATERS: RefCell<[Option<Compress>; 2]> = const { RefCell::new([None, None]) };
    static INFLATER: RefCell<Option<Decompress>> = const { RefCell::new(None) };
}

/// The compressed form of `frame`, an unmasked, unfragmented data frame; or `frame` itself if compression
/// does not make it smaller.
pub fn compressed(frame: &Bytes, deflate: Deflate) -> Bytes {
    let Some((opcode, payload)) = frame::opened(frame) else { return frame.clone() };
    let mut body = Vec::with_capacity(payload.len() / 2 + 64);
    DEFLATERS.with_borrow_mut(|deflaters| {
        let [wide, narrow] = deflaters;
        let place = if deflate == Deflate::Wide { wide } else { narrow };
        let compress =
            place.get_or_insert_with(|| Compress::new_with_window_bits(LEVEL, false, deflate.window_bits()));
        compress.reset();
        loop {
            let taken = usize::try_from(compress.total_in()).unwrap_or(usize::MAX);
            let rest = payload.get(taken..).unwrap_or_default();
            let status = compress.compress_vec(rest, &mut body, FlushCompress::Sync);
            // If room is left, everything has been written.
            if status.is_err() || body.len() < body.capacity() {
                break;
            }
            body.reserve(payload.len() / 4 + 64);
        }
    });
    let Some(body) = body.strip_suffix(&TAIL) else { return frame.clone() };
    if body.len() >= payload.len() {
        return frame.clone();
    }
    let header = frame::header(opcode, body.len());
    let mut smaller = BytesMut::with_capacity(header.as_slice().len() + body.len());
    smaller.put_slice(header.as_slice());
    smaller.put_slice(body);
    if let Some(first) = smaller.first_mut() {
        *first |= RSV1;
    }
    smaller.freeze()
}

/// The maximum compressed length of a message of at most `max_message` bytes: incompressible data grows by a
/// few bytes per block.
pub(super) const fn longest(max_message: usize) -> usize {
    max_message.saturating_add(max_message / 1024).saturating_add(16)
}

/// Up to this size, a message may have any compression ratio.
const FREE_OF_RATIO: usize = 64 * 1024;
/// The maximum compression ratio of larger messages. Deflate reaches 1,032 for zeros, and a few dozen for
/// repetitive JSON.
const MAX_RATIO: usize = 200;
/// How many bytes are inflated between two checks of the bounds.
const STEP: usize = 16 * 1024;

/// Inflates the complete compressed message (§7.2.2) to at most `max_message` bytes.
///
/// `pay` receives the number of new bytes as the message grows. If it returns false, the message must end
/// there.
pub(super) fn inflated(
    compressed: &[u8],
    max_message: usize,
    pay: &mut dyn FnMut(usize) -> bool,
) -> Result<Vec<u8>, ProtocolError> {
    let by_ratio = compressed.len().saturating_mul(MAX_RATIO).max(FREE_OF_RATIO);
    let most = max_message.min(by_ratio);
    let (mut message, mut may_grow) = (Vec::new(), true);
    INFLATER.with_borrow_mut(|inflater| {
        let inflater = inflater.get_or_insert_with(|| Decompress::new(false));
        inflater.reset(false);
        for mut input in [compressed, &TAIL] {
            while !input.is_empty() {
                // One byte beyond the bound is enough to detect the violation.
                let step = STEP.min(most.saturating_add(1).saturating_sub(message.len()));
                message.reserve(step);
                let (read, written) = (inflater.total_in(), message.len());
                let status = inflater
                    .decompress_vec(input, &mut message, FlushDecompress::Sync)
                    .map_err(|_| ProtocolError::InvalidCompression)?;
                let taken = usize::try_from(inflater.total_in() - read).unwrap_or(usize::MAX);
                input = input.get(taken..).unwrap_or_default();
                if message.len() > most {
                    return Err(if most < max_message {
                        ProtocolError::CompressedTooWell { limit: MAX_RATIO }
                    } else {
                        ProtocolError::MessageTooBig { limit: max_message }
                    });
                }
                let grown = message.len() - written;
                if grown > 0 {
                    if !may_grow {
                        return Err(ProtocolError::NotPaidFor);
                    }
                    may_grow = pay(grown);
                }
                if status == Status::StreamEnd {
                    // A client may end the DEFLATE stream within a message (§7.2.3.4); what follows starts a
                    // new one.
                    inflater.reset(false);
                } else if taken == 0 && message.len() == written {
                    return Err(ProtocolError::InvalidCompression);
                }
            }
        }
        Ok(())
    })?;
    message.shrink_to_fit();
    Ok(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{
            Decoder, Opcode, encode,
            testing::{Seen, feed},
        },
        *,
    };

    const PLAIN: &str = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";

    fn negotiated(offers: &[&str]) -> Option<(Deflate, String)> {
        let agreed = Deflate::negotiate(offers.iter().copied());
        agreed.map(|(deflate, answer)| (deflate, answer.to_str().unwrap().to_owned()))
    }

    #[test]
    fn the_first_acceptable_offer_is_accepted() {
        let wide = Some((Deflate::Wide, PLAIN.to_owned()));
        for offers in [
            &["permessage-deflate"][..],
            &["permessage-deflate; client_max_window_bits"],
            &["Permessage-Deflate;client_max_window_bits=8 ; server_no_context_takeover"],
            &["permessage-deflate; client_max_window_bits=\"15\""],
            &["x-webkit-deflate-frame", "permessage-deflate; client_no_context_takeover"],
            &["permessage-deflate; unknown", "permessage-deflate"],
            &["permessage-deflate; server_max_window_bits=8", "permessage-deflate"],
        ] {
            assert_eq!(negotiated(offers), wide, "{offers:?}");
        }
        let confirmed = |deflate, bits| Some((deflate, format!("{PLAIN}; server_max_window_bits={bits}")));
        assert_eq!(
            negotiated(&["permessage-deflate; server_max_window_bits=15"]),
            confirmed(Deflate::Wide, 15)
        );
        for bits in 9..15 {
            let offer = format!("permessage-deflate; server_max_window_bits={bits}");
            assert_eq!(negotiated(&[&offer]), confirmed(Deflate::Narrow, 9), "{offer}");
        }
    }

    #[test]
    fn invalid_offers_are_skipped() {
        for offer in [
            "",
            "deflate",
            "permessage-deflate; server_max_window_bits",
            "permessage-deflate; server_max_window_bits=7",
            "permessage-deflate; server_max_window_bits=16",
            "permessage-deflate; server_max_window_bits=09",
            "permessage-deflate; server_max_window_bits=+9",
            "permessage-deflate; client_max_window_bits=1",
            "permessage-deflate; client_max_window_bits=",
            "permessage-deflate; server_no_context_takeover=1",
            "permessage-deflate; client_no_context_takeover; client_no_context_takeover",
            "permessage-deflate;",
        ] {
            assert_eq!(negotiated(&[offer]), None, "{offer}");
        }
    }

    /// A client's frame with a mask of zeros.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("a short payload");
        [&[first, 0x80 | length, 0, 0, 0, 0], payload].concat()
    }

    fn seen(stream: &[u8], max_message: usize) -> Vec<Seen> {
        let whole = seen_in(stream.chunks(stream.len()), max_message);
        assert_eq!(seen_in(stream.chunks(1), max_message), whole, "byte by byte");
        whole
    }

    fn seen_in<'a>(pieces: impl Iterator<Item = &'a [u8]>, max_message: usize) -> Vec<Seen> {
        let (mut decoder, mut seen) = (Decoder::new(), Vec::new());
        decoder.allow_deflate();
        for piece in pieces {
            feed(&mut decoder, piece, max_message, &mut seen);
        }
        seen
    }

    fn hello() -> Vec<Seen> {
        vec![Seen::Text("Hello".to_owned())]
    }

    /// RFC 7692 §7.2.3.
    #[test]
    fn the_examples_of_the_rfc() {
        for example in [
            &b"\xf2\x48\xcd\xc9\xc9\x07\x00"[..],
            b"\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00",
            b"\xf3\x48\xcd\xc9\xc9\x07\x00\x00",
            b"\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00",
        ] {
            assert_eq!(seen(&frame(0xc1, example), 5), hello(), "{example:x?}");
        }
        let fragments = [frame(0x41, b"\xf2\x48\xcd"), frame(0x89, b"?"), frame(0x80, b"\xc9\xc9\x07\x00")];
        let [ping, hello] = [Seen::Ping(b"?".to_vec()), Seen::Text("Hello".to_owned())];
        assert_eq!(seen(&fragments.concat(), 7), [ping, hello]);
    }

    #[test]
    fn messages_do_not_depend_on_each_other() {
        let small = frame(0xc1, b"\xf2\x48\xcd\xc9\xc9\x07\x00");
        assert_eq!(seen(&[&small[..], &small].concat(), 64), [hello(), hello()].concat());
        // "Hello" again as a reference to the message before (§7.2.3.2), but no window is kept.
        let referring = frame(0xc1, b"\xf2\x00\x11\x00\x00");
        let broken = [hello(), vec![Seen::Error(ProtocolError::InvalidCompression)]].concat();
        assert_eq!(seen(&[small, referring].concat(), 64), broken);
    }

    #[test]
    fn uncompressed_messages_remain_possible() {
        assert_eq!(seen(&frame(0x81, b"Hello"), 5), hello());
    }

    #[test]
    fn rsv1_is_refused_where_it_has_no_meaning() {
        let reserved = || vec![Seen::Error(ProtocolError::ReservedBits)];
        for first in [0xc9, 0xc8, 0xca, 0xa1, 0x91, 0xe1, 0xf2] {
            assert_eq!(seen(&frame(first, b""), 64), reserved(), "{first:x}");
        }
        let fragments = [frame(0x41, b"\xf2\x48\xcd"), frame(0xc0, b"\xc9\xc9\x07\x00")].concat();
        assert_eq!(seen(&fragments, 64), reserved());
        let mut decoder = Decoder::new();
        let mut seen = Vec::new();
        feed(&mut decoder, &frame(0xc1, b"\xf2\x48\xcd\xc9\xc9\x07\x00"), 64, &mut seen);
        assert_eq!(seen, reserved(), "not negotiated");
    }

    #[test]
    fn inflating_is_bounded_by_size_and_ratio() {
        let bomb = |bytes: usize| {
            let frame = compressed(&encode(Opcode::Binary, &vec![0; bytes]), Deflate::Wide);
            let mut frame = frame.to_vec();
            let header = if frame[1] == 126 { 4 } else { 2 };
            frame[1] |= 0x80;
            frame.splice(header..header, [0; 4]);
            frame
        };
        assert_eq!(seen(&bomb(60_000), 60_000), [Seen::Binary(vec![0; 60_000])]);
        let too_big = ProtocolError::MessageTooBig { limit: 59_999 };
        assert_eq!(seen(&bomb(60_000), 59_999), [Seen::Error(too_big)]);
        let too_well = ProtocolError::CompressedTooWell { limit: MAX_RATIO };
        assert_eq!(seen(&bomb(1 << 20), 16 << 20), [Seen::Error(too_well)]);
    }

    /// Inflates without an allowance.
    fn free(compressed: &[u8], max_message: usize) -> Result<Vec<u8>, ProtocolError> {
        inflated(compressed, max_message, &mut |_| true)
    }

    #[test]
    fn inflated_bytes_are_charged_as_they_grow() {
        let zeros = compressed(&encode(Opcode::Binary, &vec![0; 60_000]), Deflate::Wide);
        let (_, body) = frame::opened(&[&[zeros[0] & !RSV1], &zeros[1..]].concat())
            .map(|(opcode, body)| (opcode, body.to_vec()))
            .expect("a frame");
        let inflate = |allowance: usize| {
            let (mut paid, mut asked) = (0, 0);
            let message = inflated(&body, 60_000, &mut |bytes| {
                asked += bytes;
                paid += if asked <= allowance { bytes } else { 0 };
                asked <= allowance
            });
            (message.map(|message| message.len()), paid, asked)
        };
        assert_eq!(inflate(60_000), (Ok(60_000), 60_000, 60_000));
        // Most of the message is never inflated.
        for allowance in [0, 1_000, 30_000] {
            let (message, paid, asked) = inflate(allowance);
            assert_eq!(message, Err(ProtocolError::NotPaidFor));
            assert!(paid <= allowance && asked <= allowance + 2 * STEP, "{paid} of {asked} bytes were paid");
        }
        // A message that needs no more allowance is returned, although the allowance is used up.
        let small = compressed(&encode(Opcode::Binary, &[7; 500]), Deflate::Wide);
        let (_, body) = frame::opened(&[&[small[0] & !RSV1], &small[1..]].concat())
            .map(|(opcode, body)| (opcode, body.to_vec()))
            .expect("a frame");
        assert_eq!(inflated(&body, 500, &mut |_| false), Ok(vec![7; 500]));
    }

    #[test]
    fn inflated_text_must_be_utf8() {
        let latin = compressed(&encode(Opcode::Text, &[0xe9; 200]), Deflate::Wide);
        let payload = latin.get(2..).expect("a short frame");
        assert_eq!(seen(&frame(0xc1, payload), 512), [Seen::Error(ProtocolError::InvalidUtf8)]);
        assert_eq!(
            seen(&frame(0xc1, b"\xff\xff\xff"), 512),
            [Seen::Error(ProtocolError::InvalidCompression)]
        );
    }

    #[test]
    fn messages_that_do_not_shrink_stay_uncompressed() {
        let noise: Vec<u8> = (0..64_u8).map(|byte| byte.wrapping_mul(151)).collect();
        for frame in
            [encode(Opcode::Binary, &noise), encode(Opcode::Text, b""), encode(Opcode::Ping, &[0; 100])]
        {
            assert_eq!(compressed(&frame, Deflate::Wide), frame);
        }
    }

    proptest! {
        #[test]
        fn messages_survive_compression(
            words in prop::collection::vec("[a-e]{1,3}|\\PC{1,9}", 0..300),
            narrow in any::<bool>(),
            text in any::<bool>(),
        ) {
            // Longer than either window now and then.
            let message = words.concat().repeat(1 + words.len() % 50);
            let deflate = if narrow { Deflate::Narrow } else { Deflate::Wide };
            let opcode = if text { Opcode::Text } else { Opcode::Binary };
            let whole = encode(opcode, message.as_bytes());
            let smaller = compressed(&whole, deflate);
            prop_assert!(smaller.len() <= whole.len());
            if smaller != whole {
                let mut plain = smaller.to_vec();
                plain[0] &= !RSV1;
                let (kind, body) = frame::opened(&plain).expect("a frame");
                prop_assert_eq!(kind, opcode);
                prop_assert_eq!(free(body, message.len()).expect("what was deflated"), message.as_bytes());
            }
        }

        #[test]
        fn junk_is_bounded(junk in any::<Vec<u8>>(), limit in 0_usize..100_000) {
            if let Ok(message) = free(&junk, limit) {
                prop_assert!(message.len() <= limit);
            }
        }
    }
}

//! Properties of every stream, whatever it contains and however it is split.

use proptest::prelude::*;

use super::{
    Decoder, Opcode, encode,
    frame::Mask,
    testing::{Seen, any_stream, decode, divide, feed, piece_sizes, valid_stream},
    utf8,
};

const LIMIT: usize = 8192;

/// The decoder's maximum heap use in addition to the bytes of one message: its box.
const FIXED_HEAP: usize = 320;

proptest! {
    #[test]
    fn valid_streams_decode_to_the_sent_messages_in_any_split(
        (stream, sent) in valid_stream(),
        sizes in piece_sizes(),
    ) {
        prop_assert_eq!(decode([&stream[..]], LIMIT), &sent[..]);
        prop_assert_eq!(decode(stream.chunks(1), LIMIT), &sent[..]);
        prop_assert_eq!(decode(divide(&stream, &sizes), LIMIT), sent);
    }

    #[test]
    fn any_stream_gives_the_same_events_in_any_split(stream in any_stream(), sizes in piece_sizes()) {
        let in_one_piece = decode([&stream[..]], LIMIT);
        prop_assert_eq!(&decode(divide(&stream, &sizes), LIMIT), &in_one_piece);
        prop_assert_eq!(&decode(stream.chunks(1), LIMIT), &in_one_piece);
    }

    /// A prefix gives the first events of the whole stream: no result depends on later bytes.
    #[test]
    fn results_do_not_depend_on_later_bytes(stream in any_stream(), cut: prop::sample::Index) {
        let whole = decode([&stream[..]], LIMIT);
        let part = decode([&stream[..cut.index(stream.len() + 1)]], LIMIT);
        prop_assert_eq!(&whole[..part.len()], &part[..]);
    }

    #[test]
    fn memory_is_bounded_by_arrived_bytes_and_the_limit(
        stream in any_stream(),
        sizes in piece_sizes(),
        limit in 0..2 * LIMIT,
    ) {
        let mut decoder = Decoder::new();
        let mut seen = Vec::new();
        let mut arrived = 0;
        for piece in divide(&stream, &sizes) {
            feed(&mut decoder, piece, limit, &mut seen);
            arrived += piece.len();
            prop_assert!(decoder.heap_bytes() <= FIXED_HEAP + limit);
            prop_assert!(decoder.heap_bytes() <= FIXED_HEAP + 2 * arrived);
        }
    }

    #[test]
    fn encoded_frames_decode(text in ".{0,300}", mask: [u8; 4], sizes in piece_sizes()) {
        let cut_to_control = |bytes: &[u8]| bytes[..bytes.len().min(125)].to_vec();
        let expected = [
            (Opcode::Text, Seen::Text(text.clone())),
            (Opcode::Binary, Seen::Binary(text.clone().into_bytes())),
            (Opcode::Ping, Seen::Ping(cut_to_control(text.as_bytes()))),
            (Opcode::Pong, Seen::Pong(cut_to_control(text.as_bytes()))),
        ];
        let stream: Vec<_> =
            expected.iter().flat_map(|(opcode, _)| masked(&encode(*opcode, text.as_bytes()), mask)).collect();
        let expected = expected.map(|(_, seen)| seen);
        prop_assert_eq!(decode(divide(&stream, &sizes), LIMIT), expected);
    }

    #[test]
    fn unmasking_in_pieces_is_unmasking_byte_by_byte(
        payload in prop::collection::vec(any::<u8>(), 0..200),
        key: [u8; 4],
        sizes in piece_sizes(),
    ) {
        let expected: Vec<_> = payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key).collect();
        let mut mask = Mask(key);
        let unmasked: Vec<_> = divide(&payload, &sizes)
            .flat_map(|piece| {
                let mut piece = piece.to_vec();
                mask.apply(&mut piece);
                piece
            })
            .collect();
        prop_assert_eq!(unmasked, expected);
    }

    /// Compares with the standard library after each piece.
    #[test]
    fn utf8_is_checked_with_each_piece(
        text in ".{0,80}",
        harm: Option<(prop::sample::Index, u8)>,
        sizes in piece_sizes(),
    ) {
        let mut text = text.into_bytes();
        if let Some((place, byte)) = harm && !text.is_empty() {
            let place = place.index(text.len());
            text[place] = byte;
        }
        let (mut end, mut verified) = (0, 0);
        for piece in divide(&text, &sizes) {
            end += piece.len();
            let expected = match std::str::from_utf8(&text[..end]) {
                Ok(_) => Some(end),
                Err(error) => error.error_len().is_none().then_some(error.valid_up_to()),
            };
            let got = utf8::verify_more(&text[..end], verified).ok();
            prop_assert_eq!(got, expected, "{:x?}", &text[..end]);
            match got {
                Some(more) => verified = more,
                None => return Ok(()),
            }
        }
    }
}

/// Masks a server's frame as a client would.
fn masked(frame: &[u8], mask: [u8; 4]) -> Vec<u8> {
    let header_size = match frame[1] {
        126 => 4,
        127 => 10,
        _ => 2,
    };
    let (header, payload) = frame.split_at(header_size);
    let mut masked = header.to_vec();
    masked[1] |= 0x80;
    masked.extend(mask);
    masked.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
    masked
}

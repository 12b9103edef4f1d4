//! However a stream is split, the decoder gives the same events, and its memory is bounded.
//!
//! An input is the message limit (two bytes; if it is odd, compression is negotiated), the number of piece
//! sizes (one byte), the sizes (one byte each) and the stream.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::websocket::{Decoder, Event, ProtocolError};

/// The decoder's maximum heap use in addition to the bytes of one message.
const FIXED_HEAP: usize = 320;

fuzz_target!(|input: &[u8]| {
    let Some(([a, b, count], rest)) = input.split_first_chunk() else { return };
    let limit = usize::from(u16::from_be_bytes([*a, *b]));
    let Some((sizes, stream)) = rest.split_at_checked(usize::from(*count)) else { return };

    let in_one_piece = decode([stream], limit);
    assert_eq!(decode(stream.chunks(1), limit), in_one_piece, "byte by byte");
    assert_eq!(decode(divide(stream, sizes), limit), in_one_piece, "in pieces of {sizes:?}");
});

#[derive(Debug, PartialEq)]
enum Seen {
    Text(String),
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(Option<(u16, String)>),
    Error(ProtocolError),
}

fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, limit: usize) -> Vec<Seen> {
    let mut decoder = Decoder::new();
    let deflate = limit % 2 == 1;
    if deflate {
        decoder.allow_deflate();
    }
    // Incompressible data grows a little when it is compressed.
    let most = if deflate { limit + limit / 1024 + 16 } else { limit };
    let mut seen = Vec::new();
    let mut arrived = 0;
    for piece in pieces {
        arrived += piece.len();
        let mut piece = piece.to_vec();
        let mut feed = decoder.feed(&mut piece, limit);
        loop {
            seen.push(match feed.next() {
                Ok(None) => break,
                Ok(Some(Event::Text(payload))) => {
                    assert!(payload.as_slice().len() <= limit);
                    Seen::Text(String::from_utf8(payload.into_bytes().to_vec()).expect("a text is UTF-8"))
                }
                Ok(Some(Event::Binary(payload))) => {
                    assert!(payload.as_slice().len() <= limit);
                    Seen::Binary(payload.as_slice().to_vec())
                }
                Ok(Some(Event::Ping(payload))) => Seen::Ping(payload.to_vec()),
                Ok(Some(Event::Pong(payload))) => Seen::Pong(payload.to_vec()),
                Ok(Some(Event::Close(frame))) => {
                    Seen::Close(frame.map(|frame| (frame.code.as_u16(), frame.reason.to_owned())))
                }
                Err(error) => Seen::Error(error),
            });
        }
        assert!(decoder.heap_bytes() <= FIXED_HEAP + most.min(2 * arrived));
    }
    let end = seen.iter().position(|seen| matches!(seen, Seen::Close(_) | Seen::Error(_)));
    assert!(end.is_none_or(|end| end + 1 == seen.len()), "nothing follows a close or an error: {seen:?}");
    seen
}

/// Splits `stream` into pieces of `sizes`, repeated as often as needed; a size of 0 means 256.
fn divide<'a>(mut stream: &'a [u8], sizes: &[u8]) -> impl Iterator<Item = &'a [u8]> {
    let mut sizes = sizes.iter().map(|&size| if size == 0 { 256 } else { usize::from(size) }).cycle();
    std::iter::from_fn(move || {
        let size = sizes.next().unwrap_or(usize::MAX);
        let (piece, rest) = stream.split_at(stream.len().min(size));
        stream = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

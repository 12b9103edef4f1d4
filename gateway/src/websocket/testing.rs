//! A client in miniature for the tests: it masks frames, and it writes down events.

use super::{Decoder, Event, ProtocolError};

/// An event that outlives its input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Text(String),
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(Option<(u16, String)>),
    Error(ProtocolError),
}

impl From<Event<'_>> for Seen {
    fn from(event: Event<'_>) -> Self {
        match event {
            Event::Text(payload) => {
                Self::Text(String::from_utf8(payload.into_bytes().to_vec()).expect("the decoder verified it"))
            }
            Event::Binary(payload) => Self::Binary(payload.as_slice().to_vec()),
            Event::Ping(payload) => Self::Ping(payload.to_vec()),
            Event::Pong(payload) => Self::Pong(payload.to_vec()),
            Event::Close(frame) => {
                Self::Close(frame.map(|frame| (frame.code.as_u16(), frame.reason.to_owned())))
            }
        }
    }
}

/// Feeds one input and appends what is seen. Returns whether the decoder still goes on.
pub(super) fn feed(decoder: &mut Decoder, input: &[u8], max_message: usize, seen: &mut Vec<Seen>) -> bool {
    let mut input = input.to_vec();
    let mut feed = decoder.feed(&mut input, max_message);
    loop {
        match feed.next() {
            Ok(Some(event)) => seen.push(event.into()),
            Ok(None) => return true,
            Err(error) => {
                seen.push(Seen::Error(error));
                assert!(matches!(feed.next(), Ok(None)), "an error is the last word");
                return false;
            }
        }
    }
}

/// What a decoder sees of a stream that arrives in `pieces`.
pub(super) fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, max_message: usize) -> Vec<Seen> {
    let mut decoder = Decoder::new();
    let mut seen = Vec::new();
    for piece in pieces {
        feed(&mut decoder, piece, max_message, &mut seen);
    }
    seen
}

/// A client's frame with its shortest length and a mask that depends on the payload's size.
pub(super) fn client_frame(first_byte: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first_byte];
    match payload.len() {
        length @ 0..=125 => frame.push(0x80 | u8::try_from(length).unwrap()),
        length @ 126..=0xffff => {
            frame.push(0xfe);
            frame.extend(u16::try_from(length).unwrap().to_be_bytes());
        }
        length => {
            frame.push(0xff);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    let mask = (0x9e37_79b9_u32.wrapping_mul(u32::try_from(payload.len()).unwrap() + 1)).to_be_bytes();
    frame.extend(mask);
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
    frame
}

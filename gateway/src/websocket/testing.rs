//! A small test client: masks frames, records events and generates streams.

use proptest::{collection::vec, prelude::*, sample::Index};

use super::{Decoder, Event, ProtocolError};

/// An event that does not borrow from its input.
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

/// Feeds one input and appends the events. Returns whether the decoder continues.
pub(super) fn feed(decoder: &mut Decoder, input: &[u8], max_message: usize, seen: &mut Vec<Seen>) -> bool {
    let mut input = input.to_vec();
    let mut feed = decoder.feed(&mut input, max_message);
    loop {
        match feed.next() {
            Ok(Some(event)) => seen.push(event.into()),
            Ok(None) => return true,
            Err(error) => {
                seen.push(Seen::Error(error));
                assert!(matches!(feed.next(), Ok(None)), "nothing follows an error");
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

/// Sizes of the pieces into which a stream is split.
pub(super) fn piece_sizes() -> impl Strategy<Value = Vec<usize>> {
    vec(prop_oneof![3 => 1..8_usize, 2 => 8..200_usize, 1 => 200..4000_usize], 1..8)
}

/// Splits `stream` into pieces of `sizes`, repeated as often as needed.
pub(super) fn divide<'a>(mut stream: &'a [u8], sizes: &[usize]) -> impl Iterator<Item = &'a [u8]> {
    let mut sizes = sizes.iter().cycle();
    std::iter::from_fn(move || {
        let (piece, rest) = stream.split_at(stream.len().min(*sizes.next()?));
        stream = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

/// A valid stream and the expected events.
pub(super) fn valid_stream() -> impl Strategy<Value = (Vec<u8>, Vec<Seen>)> {
    let close = prop_oneof![
        Just(None),
        ((3000..5000_u16), ".{0,30}").prop_map(|(code, reason)| Some((code, reason)))
    ];
    (vec(valid_message(), 0..6), prop::option::weighted(0.2, close)).prop_map(|(messages, close)| {
        let (frames, seen): (Vec<_>, Vec<_>) = messages.into_iter().unzip();
        let (mut stream, mut seen) = (frames.concat(), seen.concat());
        if let Some(close) = close {
            let payload = close.as_ref().map_or_else(Vec::new, |(code, reason): &(u16, String)| {
                [&code.to_be_bytes(), reason.as_bytes()].concat()
            });
            stream.extend(client_frame(0x88, &payload));
            seen.push(Seen::Close(close));
        }
        (stream, seen)
    })
}

/// A message in any number of fragments, with control frames between them.
fn valid_message() -> impl Strategy<Value = (Vec<u8>, Vec<Seen>)> {
    let message = prop_oneof![
        4 => ".{0,100}".prop_map(Seen::Text),
        1 => ".{200,500}".prop_map(Seen::Text),
        3 => vec(any::<u8>(), 0..150).prop_map(Seen::Binary),
        1 => vec(any::<u8>(), 1000..2048).prop_map(Seen::Binary),
    ];
    let control = prop_oneof![
        vec(any::<u8>(), 0..=125).prop_map(Seen::Ping),
        vec(any::<u8>(), 0..=125).prop_map(Seen::Pong)
    ];
    (message, vec((any::<Index>(), prop::option::of(control)), 0..5)).prop_map(|(message, between)| {
        let (opcode, payload) = match &message {
            Seen::Text(text) => (1, text.as_bytes()),
            Seen::Binary(bytes) => (2, &bytes[..]),
            other => unreachable!("{other:?} is not a message"),
        };
        let mut cuts: Vec<_> = between.iter().map(|(cut, _)| cut.index(payload.len() + 1)).collect();
        cuts.sort_unstable();
        let (mut stream, mut seen) = (Vec::new(), Vec::new());
        let (mut first_byte, mut start) = (opcode, 0);
        for (cut, (_, control)) in cuts.into_iter().zip(between) {
            stream.extend(client_frame(first_byte, &payload[start..cut]));
            (first_byte, start) = (0, cut);
            match &control {
                Some(Seen::Ping(payload)) => stream.extend(client_frame(0x89, payload)),
                Some(Seen::Pong(payload)) => stream.extend(client_frame(0x8a, payload)),
                _ => {}
            }
            seen.extend(control);
        }
        stream.extend(client_frame(0x80 | first_byte, &payload[start..]));
        seen.push(message);
        (stream, seen)
    })
}

/// A stream that may break any rule anywhere: valid frames, frames that are only well-formed, junk, and a few
/// changed bytes.
pub(super) fn any_stream() -> impl Strategy<Value = Vec<u8>> {
    let first_byte = prop_oneof![
        8 => prop::sample::select(vec![0x00_u8, 0x80, 0x01, 0x81, 0x02, 0x82, 0x88, 0x89, 0x8a]),
        1 => any::<u8>(),
    ];
    let payload = prop_oneof![
        2 => vec(any::<u8>(), 0..140),
        2 => ".{0,60}".prop_map(String::into_bytes),
        1 => vec(any::<u8>(), 1800..2300),
        // Close codes, and texts that end inside a character.
        1 => (980..1030_u16, ".{0,10}").prop_map(|(code, text)| [&code.to_be_bytes(), text.as_bytes()].concat()),
        1 => (".{0,40}", 0..4_usize).prop_map(|(text, less)| {
            let mut text = (text + "\u{1f30a}").into_bytes();
            text.truncate(text.len() - less);
            text
        }),
    ];
    let part = prop_oneof![
        3 => valid_message().prop_map(|(stream, _)| stream),
        6 => (first_byte, payload).prop_map(|(first_byte, payload)| client_frame(first_byte, &payload)),
        1 => vec(any::<u8>(), 0..40),
    ];
    let changes = prop_oneof![Just(Vec::new()), vec((any::<Index>(), any::<u8>()), 1..4)];
    (vec(part, 0..7), changes, prop::option::weighted(0.3, any::<Index>())).prop_map(
        |(parts, changes, cut)| {
            let mut stream = parts.concat();
            if let Some(cut) = cut {
                stream.truncate(cut.index(stream.len() + 1));
            }
            for (place, byte) in changes {
                if !stream.is_empty() {
                    let place = place.index(stream.len());
                    stream[place] = byte;
                }
            }
            stream
        },
    )
}

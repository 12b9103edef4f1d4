//! What members share, and what they do not.

use std::{cell::Cell, collections::HashSet};

use broker_bridge::{Data, Publication, RoomName};
use bytes::Bytes;
use proptest::prelude::*;

use super::{
    Broadcast, Cache, Encoding, Format, Frame, Framing, MemberState, Packets, Transport, Wrap, Writer,
};
use crate::websocket::{CloseCode, Deflate};

static UPPER: Format =
    Format { write: |_, publication, _, out| case(publication, u8::to_ascii_uppercase, out), head: None };
static LOWER: Format =
    Format { write: |_, publication, _, out| case(publication, u8::to_ascii_lowercase, out), head: None };
/// Writes its variant.
static NUMBERED: Format = Format {
    write: |_, publication, variant, out| {
        out.put(format!("{variant}:").as_bytes());
        out.put(publication.data.bytes());
    },
    head: None,
};
/// Messages start with the member's id and a number.
static WITH_HEADS: Format = Format {
    write: |_, publication, _, out| out.put(publication.data.bytes()),
    head: Some(|state, out| {
        state.count.set(state.count.get() + 1);
        out.put(&state.id);
        out.put(format!(" {} ", state.count.get()).as_bytes());
    }),
};
static ARRAY: Wrap = Wrap {
    begin: b"a[",
    item: |payload, out| out.put_json_string(&String::from_utf8_lossy(payload)),
    end: b"]",
};

fn case(publication: &Publication, change: fn(&u8) -> u8, out: &mut Writer) {
    out.put(&publication.data.bytes().iter().map(change).collect::<Vec<_>>());
}

fn lobby() -> RoomName {
    RoomName::new("lobby").unwrap()
}

fn broadcast(payload: &str) -> Broadcast {
    Broadcast::new(lobby(), Publication::new(Data::text(payload)), 1)
}

fn state(id: &str) -> MemberState {
    MemberState { id: id.as_bytes().into(), count: Cell::new(0), positions: None }
}

fn encodings() -> impl Strategy<Value = Encoding> {
    let transport = prop_oneof![Just(Transport::WebSocket), Just(Transport::Body)];
    let deflate = prop_oneof![Just(None), Just(Some(Deflate::Wide)), Just(Some(Deflate::Narrow))];
    (0..3_usize, transport, deflate, any::<bool>(), 0..20_u32).prop_map(
        |(format, transport, deflate, wrapped, variant)| {
            let format = [&UPPER, &LOWER, &NUMBERED][format];
            let encoding = Encoding::new(format, transport).with_wrap(wrapped.then_some(&ARRAY));
            encoding.with_variant(variant).with_deflate(deflate)
        },
    )
}

proptest! {
    /// Members with the same encoding get the same bytes, in one copy while they are cached, and nobody gets
    /// bytes of another encoding.
    #[test]
    fn equal_encodings_share_bytes_and_others_do_not(members in prop::collection::vec(encodings(), 1..40)) {
        let broadcast = broadcast(&"The Payload, ".repeat(20));
        let mut known: Vec<(Encoding, Bytes)> = Vec::new();
        for encoding in members {
            let bytes = broadcast.frame(encoding, 0).into_owned();
            let alone = self::broadcast(&"The Payload, ".repeat(20)).frame(encoding, 0).into_owned();
            prop_assert_eq!(&bytes, &alone, "what others were sent makes no difference");
            if let Some((_, before)) = known.iter().find(|(other, _)| *other == encoding) {
                prop_assert_eq!(&bytes, before);
                // A compressed encoding takes two entries: one for the uncompressed bytes.
                prop_assert!(known.len() > Cache::MAX / 2 || bytes.as_ptr() == before.as_ptr());
            } else {
                known.push((encoding, bytes));
            }
        }
    }

    #[test]
    fn a_head_and_a_tail_form_one_frame(id in "[a-z]{0,200}", payload in "[a-z]{0,200}", step in 1..50_usize) {
        let encoding = Encoding::new(&WITH_HEADS, Transport::WebSocket);
        let tail = broadcast(&payload).frame(encoding, 0).into_owned();
        let head = encoding.head(&state(&id), None, tail.len()).unwrap();
        let mut frame = Frame::split(head, tail);
        let expected = crate::websocket::encode(crate::websocket::Opcode::Text, format!("{id} 1 {payload}").as_bytes());
        prop_assert_eq!(frame.clone().into_bytes(), &expected);
        prop_assert_eq!(frame.private_len() + payload.len(), expected.len());
        let mut written = Vec::new();
        while !frame.is_empty() {
            let next: Vec<u8> = frame.pieces().concat().into_iter().take(step).collect();
            frame.advance(next.len());
            written.extend(next);
        }
        prop_assert_eq!(written, expected);
    }
}

#[test]
fn members_with_heads_share_the_payload() {
    let encoding = Encoding::new(&WITH_HEADS, Transport::WebSocket);
    let broadcast = broadcast(&"x".repeat(1000));
    let states: Vec<_> = (0..100).map(|n| state(&format!("id-{n}"))).collect();
    let frames: Vec<_> = states
        .iter()
        .map(|state| {
            let tail = broadcast.frame(encoding, 0).into_owned();
            Frame::split(encoding.head(state, None, tail.len()).unwrap(), tail)
        })
        .collect();
    let payloads: HashSet<_> = frames.iter().map(Frame::end_address).collect();
    assert_eq!(payloads.len(), 1, "one copy of the payload");
    let whole: HashSet<_> = frames.iter().map(|frame| frame.clone().into_bytes()).collect();
    assert_eq!(whole.len(), 100, "and each its own head");
    assert!(frames.iter().all(|frame| frame.private_len() < 20));
    // The next message has the next number.
    let head = encoding.head(&states[7], None, 0).unwrap();
    assert!(head.ends_with(b"id-7 2 "), "{head:?}");
}

#[test]
fn heads_and_bodies_are_not_compressed() {
    for encoding in [Encoding::new(&WITH_HEADS, Transport::WebSocket), Encoding::new(&UPPER, Transport::Body)]
    {
        assert_eq!(encoding.with_deflate(Some(Deflate::Wide)).deflate(), None, "{encoding:?}");
    }
}

#[test]
fn a_full_cache_still_returns_the_right_bytes() {
    let cache = Cache::default();
    let encoding = |variant| Encoding::new(&NUMBERED, Transport::Body).with_variant(variant);
    let bytes = |variant: u32| Bytes::from(variant.to_string());
    for _ in 0..2 {
        for variant in 0..40 {
            assert_eq!(*cache.get_or_make(encoding(variant), || bytes(variant)), bytes(variant));
        }
    }
    let kept = (0..40).filter(|variant| cache.get(encoding(*variant)).is_some()).count();
    assert_eq!(kept, Cache::MAX);
}

#[test]
fn packets_are_framed_for_their_transport() {
    let written = |framing: Framing| {
        let mut out = Packets::default();
        out.begin(framing);
        out.text(b"hi");
        out.binary(b"\xff");
        out.ping();
        out.close(CloseCode::new(1001).unwrap(), "bye");
        out.take().map(|packet| packet.to_vec()).collect::<Vec<_>>()
    };
    let frames: [&[u8]; 4] = [b"\x81\x02hi", b"\x82\x01\xff", b"\x89\x00", b"\x88\x05\x03\xe9bye"];
    assert_eq!(written(Framing::on(Transport::WebSocket)), frames);
    assert_eq!(
        written(Framing::on(Transport::Body)),
        [&b"hi"[..], b"\xff"],
        "a body has no pings and no close"
    );

    let wrapped = written(Framing { wrap: Some(&ARRAY), ..Framing::on(Transport::WebSocket) });
    assert_eq!(wrapped.first().map(Vec::as_slice), Some(&b"\x81\x07a[\"hi\"]"[..]));
    assert_eq!(wrapped.get(2).map(Vec::as_slice), Some(&b"\x89\x00"[..]), "a ping is the transport's own");
}

/// Neither bytes nor encodings contain a format's address.
#[test]
fn an_encoding_prints_no_address() {
    let printed = format!("{:?}", Encoding::new(&UPPER, Transport::Body).with_variant(3));
    assert_eq!(printed, "Encoding { variant: 3, transport: Body, deflate: None, .. }");
}

//! The rules of RFC 6455, one by one. Test names contain the section.

use super::{
    CloseCode, CloseFrame, Decoder, Event, Opcode, Payload, ProtocolError, close_frame, encode, header, ping,
    pong,
    testing::{Seen, client_frame, decode, feed},
};

const LIMIT: usize = 1 << 20;

const TEXT: u8 = 0x81;
const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;
const PONG: u8 = 0x8a;
const FIN: u8 = 0x80;

fn text(text: &str) -> Seen {
    Seen::Text(text.to_owned())
}

fn error(error: ProtocolError) -> Vec<Seen> {
    vec![Seen::Error(error)]
}

/// Asserts what the decoder sees of `stream`, in one piece and byte by byte.
#[track_caller]
fn check(stream: &[u8], expected: &[Seen]) {
    assert_eq!(decode([stream], LIMIT), expected, "in one piece");
    assert_eq!(decode(stream.chunks(1), LIMIT), expected, "byte by byte");
}

/// Asserts that the last byte of `stream` is refused, and none before it.
#[track_caller]
fn refused_at_last_byte(stream: &[u8], expected: ProtocolError) {
    let (last, before) = stream.split_last().unwrap();
    for size in [1, stream.len()] {
        let mut decoder = Decoder::new();
        let mut seen = Vec::new();
        for piece in before.chunks(size) {
            assert!(feed(&mut decoder, piece, LIMIT, &mut seen), "refused too early: {seen:?}");
        }
        assert!(!feed(&mut decoder, &[*last], LIMIT, &mut seen), "not refused: {seen:?}");
        assert_eq!(seen.last(), Some(&Seen::Error(expected)));
    }
    assert_eq!(decode([stream], LIMIT).last(), Some(&Seen::Error(expected)));
}

#[test]
fn section_5_7_examples() {
    // "A single-frame masked text message", "A fragmented unmasked text message" (here masked).
    check(&[0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58], &[text("Hello")]);
    check(
        &[0x8a, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58],
        &[Seen::Pong(b"Hello".into())],
    );
    // Frames from the server.
    assert_eq!(&encode(Opcode::Text, b"Hello")[..], [0x81, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f]);
    assert_eq!(&ping(b"Hello")[..], [0x89, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f]);
    assert_eq!(header(Opcode::Binary, 256).as_slice(), [0x82, 0x7e, 0x01, 0x00]);
    assert_eq!(header(Opcode::Binary, 65536).as_slice(), [0x82, 0x7f, 0, 0, 0, 0, 0, 1, 0, 0]);
}

#[test]
fn section_5_1_unmasked_frames_are_refused_at_the_length_byte() {
    refused_at_last_byte(&[TEXT, 5], ProtocolError::Unmasked);
    refused_at_last_byte(&[CLOSE, 0], ProtocolError::Unmasked);
}

#[test]
fn section_5_2_reserved_bits_are_refused() {
    for bit in [0x40, 0x20, 0x10] {
        for first in [TEXT, BINARY, CLOSE, PING, PONG, 0x01] {
            refused_at_last_byte(&[first | bit], ProtocolError::ReservedBits);
        }
    }
}

#[test]
fn section_5_2_reserved_opcodes_are_refused() {
    for opcode in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
        refused_at_last_byte(&[FIN | opcode], ProtocolError::ReservedOpcode(opcode));
        refused_at_last_byte(&[opcode], ProtocolError::ReservedOpcode(opcode));
    }
}

#[test]
fn section_5_2_lengths_at_each_border() {
    for length in [0, 1, 125, 126, 127, 128, 0xffff, 0x1_0000, 0x1_0001] {
        let payload = vec![b'x'; length];
        let stream = client_frame(BINARY, &payload);
        assert_eq!(decode([&stream[..]], LIMIT), [Seen::Binary(payload.clone())]);
        assert_eq!(decode(stream.chunks(1), LIMIT), [Seen::Binary(payload.clone())]);
        assert_eq!(decode(stream.chunks(4096), LIMIT), [Seen::Binary(payload)]);
    }
}

#[test]
fn section_5_2_lengths_are_minimal() {
    refused_at_last_byte(&[BINARY, 0xfe, 0, 0], ProtocolError::LengthNotMinimal);
    refused_at_last_byte(&[BINARY, 0xfe, 0, 125], ProtocolError::LengthNotMinimal);
    refused_at_last_byte(&[BINARY, 0xff, 0, 0, 0, 0, 0, 0, 0, 126], ProtocolError::LengthNotMinimal);
    refused_at_last_byte(&[BINARY, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff], ProtocolError::LengthNotMinimal);
    check(&[BINARY, 0xfe, 0, 126], &[]);
    check(&[BINARY, 0xff, 0, 0, 0, 0, 0, 1, 0, 0], &[]);
}

#[test]
fn section_5_2_top_bit_of_a_long_length_is_refused() {
    refused_at_last_byte(&[BINARY, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0], ProtocolError::LengthTopBit);
    refused_at_last_byte(
        &[BINARY, 0xff, 0xff, 255, 255, 255, 255, 255, 255, 255],
        ProtocolError::LengthTopBit,
    );
    let too_big = ProtocolError::MessageTooBig { limit: LIMIT };
    refused_at_last_byte(&[BINARY, 0xff, 0x7f, 255, 255, 255, 255, 255, 255, 255], too_big);
}

#[test]
fn section_5_4_fragments_make_one_message() {
    let stream = [client_frame(0x01, b"Hel"), client_frame(0x00, b""), client_frame(0x80, b"lo")].concat();
    check(&stream, &[text("Hello")]);
    let stream = [client_frame(0x02, b""), client_frame(0x80, b"")].concat();
    check(&stream, &[Seen::Binary(Vec::new())]);
}

#[test]
fn section_5_4_control_frames_come_between_fragments() {
    let stream = [
        client_frame(0x01, b"Hel"),
        client_frame(PING, b"1"),
        client_frame(0x00, b"l"),
        client_frame(PONG, b""),
        client_frame(PING, &[7; 125]),
        client_frame(0x80, b"o"),
        client_frame(TEXT, b"!"),
    ]
    .concat();
    let expected =
        [Seen::Ping(b"1".into()), Seen::Pong(Vec::new()), Seen::Ping(vec![7; 125]), text("Hello"), text("!")];
    check(&stream, &expected);
}

#[test]
fn section_5_4_close_comes_between_fragments() {
    let stream = [client_frame(0x01, b"Hel"), client_frame(CLOSE, b""), client_frame(0x80, b"lo")].concat();
    check(&stream, &[Seen::Close(None)]);
}

#[test]
fn section_5_4_a_continuation_needs_a_first_frame() {
    refused_at_last_byte(&[0x00], ProtocolError::UnexpectedContinuation);
    refused_at_last_byte(&[0x80], ProtocolError::UnexpectedContinuation);
    let mut after_a_whole_message = client_frame(TEXT, b"a");
    after_a_whole_message.push(0x80);
    refused_at_last_byte(&after_a_whole_message, ProtocolError::UnexpectedContinuation);
    let mut after_fragments = [client_frame(0x01, b"a"), client_frame(0x80, b"b")].concat();
    after_fragments.push(0x00);
    refused_at_last_byte(&after_fragments, ProtocolError::UnexpectedContinuation);
}

#[test]
fn section_5_4_messages_are_not_interleaved() {
    for first in [TEXT, BINARY, 0x01, 0x02] {
        let mut stream = [client_frame(0x01, b"a"), client_frame(PING, b"")].concat();
        stream.push(first);
        refused_at_last_byte(&stream, ProtocolError::ExpectedContinuation);
    }
}

#[test]
fn section_5_5_control_frames_are_short_and_whole() {
    for first in [CLOSE, PING, PONG] {
        refused_at_last_byte(&[first & !FIN], ProtocolError::FragmentedControl);
        refused_at_last_byte(&[first, 0xfe], ProtocolError::ControlTooLong);
        refused_at_last_byte(&[first, 0xff], ProtocolError::ControlTooLong);
    }
    check(&client_frame(PING, &[1; 125]), &[Seen::Ping(vec![1; 125])]);
}

#[test]
fn section_5_5_control_frames_are_exempt_from_the_message_limit() {
    let stream = [client_frame(PING, &[1; 125]), client_frame(BINARY, b"abc")].concat();
    assert_eq!(decode([&stream[..]], 3), [Seen::Ping(vec![1; 125]), Seen::Binary(b"abc".into())]);
}

#[test]
fn section_5_5_1_close_without_code_and_with_reason() {
    check(&client_frame(CLOSE, b""), &[Seen::Close(None)]);
    check(&client_frame(CLOSE, b"\x03\xe8"), &[Seen::Close(Some((1000, String::new())))]);
    check(&client_frame(CLOSE, b"\x0f\xa0caf\xc3\xa9"), &[Seen::Close(Some((4000, "café".to_owned())))]);
    let longest = [b"\x03\xe9".to_vec(), vec![b'r'; 123]].concat();
    check(&client_frame(CLOSE, &longest), &[Seen::Close(Some((1001, "r".repeat(123))))]);
}

#[test]
fn section_5_5_1_input_after_a_close_is_ignored() {
    let stream = [client_frame(CLOSE, b""), client_frame(TEXT, b"late"), vec![0xff; 40]].concat();
    check(&stream, &[Seen::Close(None)]);
}

#[test]
fn section_7_1_7_input_after_an_error_is_ignored() {
    let stream = [vec![0xff], client_frame(TEXT, b"late")].concat();
    check(&stream, &error(ProtocolError::ReservedBits));
    let stream = [client_frame(CLOSE, b"x"), client_frame(TEXT, b"late")].concat();
    check(&stream, &error(ProtocolError::CloseTooShort));
}

#[test]
fn section_5_5_1_close_payload_is_not_one_byte_and_its_reason_is_utf8() {
    check(&client_frame(CLOSE, b"\x03"), &error(ProtocolError::CloseTooShort));
    check(&client_frame(CLOSE, b"\x03\xe8\xff"), &error(ProtocolError::InvalidCloseReason));
    check(&client_frame(CLOSE, b"\x03\xe8caf\xc3"), &error(ProtocolError::InvalidCloseReason));
}

#[test]
fn section_7_4_close_codes() {
    for code in 0..=u16::MAX {
        let allowed = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
        let expected = if allowed {
            Seen::Close(Some((code, String::new())))
        } else {
            Seen::Error(ProtocolError::InvalidCloseCode(code))
        };
        let frame = client_frame(CLOSE, &code.to_be_bytes());
        assert_eq!(decode([&frame[..]], LIMIT), [expected]);
        assert_eq!(CloseCode::new(code).map(CloseCode::as_u16), allowed.then_some(code));
    }
}

#[test]
fn section_7_4_1_message_limit_is_compared_with_the_announced_length() {
    let limit = 1000;
    let too_big = error(ProtocolError::MessageTooBig { limit });
    assert_eq!(decode([&client_frame(BINARY, &[1; 1000])[..]], limit), [Seen::Binary(vec![1; 1000])]);
    // The frame announces 1001 bytes: refused before the mask, long before the payload.
    assert_eq!(decode([&[BINARY, 0xfe, 0x03, 0xe9][..]], limit), too_big);
    assert_eq!(decode([&client_frame(TEXT, b"a")[..2]], 0), error(ProtocolError::MessageTooBig { limit: 0 }));
    assert_eq!(decode([&client_frame(TEXT, b"")[..]], 0), [text("")]);

    let fits = [client_frame(0x02, &[1; 600]), client_frame(0x80, &[1; 400])].concat();
    assert_eq!(decode([&fits[..]], limit), [Seen::Binary(vec![1; 1000])]);
    assert_eq!(decode(fits.chunks(1), limit), [Seen::Binary(vec![1; 1000])]);
    let exceeds = [client_frame(0x02, &[1; 600]), client_frame(0x00, &[1; 401])[..4].to_vec()].concat();
    assert_eq!(decode([&exceeds[..]], limit), too_big);
    assert_eq!(decode(exceeds.chunks(1), limit), too_big);
    let overflows = [client_frame(0x02, &[1; 600]), [0, 0xff, 0x7f].to_vec(), [0xff; 7].to_vec()].concat();
    assert_eq!(decode([&overflows[..]], limit), too_big);
}

/// Sequences that become invalid with their last byte (Unicode 15, table 3-7).
const WRONG_AT_LAST_BYTE: [&[u8]; 19] = [
    b"\x80",
    b"\xbf",
    b"\xc0",
    b"\xc1",
    b"\xf5",
    b"\xfe",
    b"\xff",
    b"\xc3a",
    b"\xe0\x9f",
    b"\xe2\x82a",
    b"\xed\xa0",
    b"\xed\xbf",
    b"\xf0\x8f",
    b"\xf0\x9f\xff",
    b"\xf4\x90",
    b"\xf1\x80\x80a",
    b"caf\xc3\xa9\xff",
    b"\xe2\x82\xac\xc2\xc2",
    b"\xf0\x9f\x8c\x8a\xf8",
];

#[test]
fn section_8_1_invalid_utf8_is_refused_at_the_first_invalid_byte() {
    for wrong in WRONG_AT_LAST_BYTE {
        // In a frame that announces more than it has sent so far.
        let mut stream = client_frame(TEXT, &[wrong, &[b'a'; 100]].concat());
        stream.truncate(6 + wrong.len());
        refused_at_last_byte(&stream, ProtocolError::InvalidUtf8);
        // In a later fragment, with the sequence split between two fragments in every way.
        for cut in 0..wrong.len() {
            let (before, after) = wrong.split_at(cut);
            let mut second = client_frame(0x00, &[after, &[b'a'; 100]].concat());
            second.truncate(6 + after.len());
            let stream =
                [client_frame(0x01, &[&[b'x'; 70], before].concat()), client_frame(PING, b""), second];
            refused_at_last_byte(&stream.concat(), ProtocolError::InvalidUtf8);
        }
    }
}

#[test]
fn section_8_1_characters_may_be_split_anywhere() {
    let whole = "κόσμε € 🌊 \u{10ffff}\u{d7ff}\u{e000}\u{0}";
    for cut in 0..=whole.len() {
        let (a, b) = whole.as_bytes().split_at(cut);
        check(&[client_frame(0x01, a), client_frame(0x80, b)].concat(), &[text(whole)]);
    }
    let mut bytewise: Vec<_> = whole.bytes().map(|byte| client_frame(0x00, &[byte])).collect();
    bytewise[0][0] = 0x01;
    bytewise.push(client_frame(0x80, b""));
    check(&bytewise.concat(), &[text(whole)]);
}

#[test]
fn section_8_1_a_message_does_not_end_inside_a_character() {
    for unfinished in [&b"\xc3"[..], b"\xe2\x82", b"\xf0\x9f\x8c", b"all good until \xf0\x9f"] {
        check(&client_frame(TEXT, unfinished), &error(ProtocolError::InvalidUtf8));
        let stream = [client_frame(0x01, unfinished), client_frame(0x80, b"")].concat();
        check(&stream, &error(ProtocolError::InvalidUtf8));
        // While the message is incomplete, the rest of the character may still arrive.
        let stream = [client_frame(0x01, unfinished), client_frame(0x00, b"")].concat();
        check(&stream, &[]);
    }
}

#[test]
fn section_8_1_binary_messages_are_any_bytes() {
    let any: Vec<u8> = (0..=255).collect();
    check(&client_frame(BINARY, &any), &[Seen::Binary(any.clone())]);
    check(&[client_frame(0x02, &any), client_frame(0x80, b"")].concat(), &[Seen::Binary(any)]);
}

#[test]
fn whole_messages_are_borrowed_and_others_owned() {
    let mut decoder = Decoder::new();
    let mut input = client_frame(TEXT, b"lent");
    let range = input.as_ptr_range();
    match decoder.feed(&mut input, LIMIT).next() {
        Ok(Some(Event::Text(Payload::Borrowed(bytes)))) => assert!(range.contains(&bytes.as_ptr())),
        other => panic!("not lent: {other:?}"),
    }

    let stream = client_frame(BINARY, &[5; 3000]);
    let (mut first, mut rest) = (stream[..1000].to_vec(), stream[1000..].to_vec());
    assert!(matches!(decoder.feed(&mut first, LIMIT).next(), Ok(None)));
    match decoder.feed(&mut rest, LIMIT).next() {
        Ok(Some(Event::Binary(Payload::Owned(bytes)))) => {
            assert_eq!(bytes.capacity(), 3000, "no more than the message");
            let place = bytes.as_ptr();
            assert_eq!(Payload::Owned(bytes).into_bytes().as_ptr(), place, "not copied");
        }
        other => panic!("not handed over: {other:?}"),
    }
}

#[test]
fn an_idle_decoder_is_small_and_owns_nothing() {
    assert!(size_of::<Decoder>() <= 16);
    let mut decoder = Decoder::new();
    let mut seen = Vec::new();
    let stream = [
        client_frame(0x01, b"a"),
        client_frame(0x80, &[b'b'; 300]),
        client_frame(PING, b"ping"),
        client_frame(TEXT, &[b'c'; 300]),
    ]
    .concat();
    for piece in stream.chunks(7) {
        feed(&mut decoder, piece, LIMIT, &mut seen);
    }
    assert_eq!(seen.len(), 3);
    assert_eq!(decoder.heap_bytes(), 0);

    // A close or an error also frees an incomplete message.
    for end in [client_frame(CLOSE, b""), vec![0xff]] {
        let mut decoder = Decoder::new();
        feed(&mut decoder, &client_frame(0x02, &[0; 5000]), LIMIT, &mut seen);
        assert!(decoder.heap_bytes() >= 5000);
        feed(&mut decoder, &end, LIMIT, &mut seen);
        assert_eq!(decoder.heap_bytes(), 0);
    }
}

#[test]
fn an_announced_length_costs_nothing() {
    let mut decoder = Decoder::new();
    let mut seen = Vec::new();
    let sixteen_mib = [BINARY, 0xff, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4];
    feed(&mut decoder, &sixteen_mib, 16 << 20, &mut seen);
    assert!(decoder.heap_bytes() < 300, "{}", decoder.heap_bytes());
    feed(&mut decoder, &[0; 1000], 16 << 20, &mut seen);
    assert!(decoder.heap_bytes() < 300 + 1000, "{}", decoder.heap_bytes());
    assert_eq!(seen, []);
}

#[test]
fn the_buffer_doubles_up_to_the_size_of_the_message() {
    let stream = client_frame(TEXT, &vec![b'a'; 100_000]);
    let mut decoder = Decoder::new();
    let mut seen = Vec::new();
    let mut capacities = vec![];
    for piece in stream.chunks(1) {
        feed(&mut decoder, piece, LIMIT, &mut seen);
        capacities.push(decoder.heap_bytes());
        assert!(decoder.heap_bytes() <= 300 + 100_000);
    }
    assert_eq!(seen, [text(&"a".repeat(100_000))]);
    capacities.dedup();
    assert!(capacities.len() < 20, "{capacities:?}");
}

#[test]
fn long_close_reasons_are_cut_at_a_character_boundary() {
    for (reason, kept) in [
        ("", ""),
        ("bye", "bye"),
        (&*"a".repeat(123), &*"a".repeat(123)),
        (&*"a".repeat(124), &*"a".repeat(123)),
        (&*"é".repeat(62), &*"é".repeat(61)),
        (&*"🌊".repeat(31), &*"🌊".repeat(30)),
    ] {
        let frame = close_frame(CloseCode::GOING_AWAY, reason);
        assert_eq!(frame[..4], [0x88, u8::try_from(kept.len()).unwrap() + 2, 0x03, 0xe9]);
        assert_eq!(&frame[4..], kept.as_bytes());
    }
    assert_eq!(CloseFrame::MAX_REASON, 123);
}

#[test]
fn encoded_frames_have_the_shortest_header() {
    for (length, expected) in [
        (0, &[0x81, 0][..]),
        (125, &[0x81, 125]),
        (126, &[0x81, 126, 0, 126]),
        (0xffff, &[0x81, 126, 0xff, 0xff]),
        (0x1_0000, &[0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
    ] {
        let payload = vec![b'x'; length];
        let frame = encode(Opcode::Text, &payload);
        assert_eq!(header(Opcode::Text, length).as_slice(), expected);
        assert_eq!(frame, [expected, &payload].concat());
    }
    // Stays a valid control frame.
    assert_eq!(pong(&[1; 126]), [&[0x8a, 125][..], &[1; 125]].concat());
}

#[test]
fn errors_fit_into_a_close_frame_and_name_their_code() {
    let codes = [
        (ProtocolError::ReservedBits, 1002),
        (ProtocolError::ReservedOpcode(15), 1002),
        (ProtocolError::FragmentedControl, 1002),
        (ProtocolError::ControlTooLong, 1002),
        (ProtocolError::UnexpectedContinuation, 1002),
        (ProtocolError::ExpectedContinuation, 1002),
        (ProtocolError::Unmasked, 1002),
        (ProtocolError::LengthNotMinimal, 1002),
        (ProtocolError::LengthTopBit, 1002),
        (ProtocolError::MessageTooBig { limit: usize::MAX }, 1009),
        (ProtocolError::InvalidUtf8, 1007),
        (ProtocolError::CloseTooShort, 1002),
        (ProtocolError::InvalidCloseCode(u16::MAX), 1002),
        (ProtocolError::InvalidCloseReason, 1007),
    ];
    for (error, code) in codes {
        assert_eq!(error.close_code().as_u16(), code, "{error}");
        let said = error.to_string();
        assert!(said.len() <= CloseFrame::MAX_REASON, "{} bytes: {said}", said.len());
        assert!(said.contains("expected"), "{said}");
    }
}

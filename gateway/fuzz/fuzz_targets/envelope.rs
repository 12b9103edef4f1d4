//! Whatever is published in Redis is delivered: no message causes a panic or loses a byte of its data; a
//! message that does not begin like a head or an envelope is raw; what follows a head is decoded as if it
//! were alone; and encoding a decoded publication preserves it.
//!
//! An input is one Redis message.
#![no_main]

use broker_bridge::{Data, Publication, redis::fuzz};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

/// The maximum overhead of an envelope. `gateway/docs/protocols.md` leads to the layout.
const MAX_OVERHEAD: usize = 10 + 3 + 66 + 257 + 2 * 18;

fuzz_target!(|input: &[u8]| {
    let message = Bytes::copy_from_slice(input);
    let publication = fuzz::decode(message.clone());
    assert!(message.ends_with(publication.data.bytes()), "the data is the end of the message");
    let inner = strip(input);
    if let Some(inner) = inner {
        assert_eq!(publication, fuzz::decode(Bytes::copy_from_slice(inner)), "the inner bytes alone");
    } else if !input.starts_with(b"\xF5Tg\x01") {
        assert_eq!(publication, Publication::new(Data::detect(message.clone())), "raw stays raw");
    }
    // Behind a head of this target, the whole input is decoded as if it were alone.
    for head in [&b"\xF5Th1-1\n"[..], b"\xF5Th5-12 u 4-9\n", b"\xF5Th05-1 m 4-9 new=1\n"] {
        assert_eq!(fuzz::decode([head, input].concat().into()), publication);
    }
    let written = fuzz::encode(&publication);
    assert!(written.len() <= publication.data.bytes().len() + MAX_OVERHEAD);
    assert_eq!(fuzz::decode(written.into()), publication);
});

/// What follows the head of a recorded message, exactly by the grammar: the head is a line of printable ASCII
/// that begins with an id, may contain a link, and has at most 256 more bytes.
fn strip(message: &[u8]) -> Option<&[u8]> {
    let line_and_rest = message.strip_prefix(b"\xF5Th")?;
    let end = line_and_rest.iter().position(|byte| *byte == b'\n')?;
    let line = std::str::from_utf8(&line_and_rest[..end]).ok()?;
    if !line.chars().all(|c| (' '..='~').contains(&c)) {
        return None;
    }
    let mut rest = after_id(line)?;
    for mark in [" u ", " m "] {
        if let Some(linked) = rest.strip_prefix(mark).and_then(after_id) {
            rest = linked;
            break;
        }
    }
    (rest.len() <= 256).then(|| &line_and_rest[end + 1..])
}

fn after_id(text: &str) -> Option<&str> {
    let digits = |text: &str| {
        let count = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        (1..=20).contains(&count).then_some(count)
    };
    let text = &text[digits(text)?..];
    let text = text.strip_prefix('-')?;
    Some(&text[digits(text)?..])
}

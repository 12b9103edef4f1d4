//! Whatever is published in Redis is delivered: no message panics, none loses a byte of its data, what does not
//! begin like an envelope is raw, and what was read is written back to the same publication.
//!
//! An input is one Redis message.
#![no_main]

use broker_bridge::{Data, Publication, redis::fuzz};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

/// What an envelope adds at most: `gateway/docs/protocols.md` leads to the layout.
const MAX_OVERHEAD: usize = 10 + 3 + 66 + 257 + 2 * 18;

fuzz_target!(|input: &[u8]| {
    let message = Bytes::copy_from_slice(input);
    let publication = fuzz::decode(message.clone());
    assert!(message.ends_with(publication.data.bytes()), "the data is the end of the message");
    if !input.starts_with(b"\xF5Tg\x01") {
        assert_eq!(publication, Publication::new(Data::detect(message)), "raw stays raw");
    }
    let written = fuzz::encode(&publication);
    assert!(written.len() <= publication.data.bytes().len() + MAX_OVERHEAD);
    assert_eq!(fuzz::decode(written.into()), publication);
});

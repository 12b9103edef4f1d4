//! Whatever a Redis server sends, and however it is split into pieces: no panic, always the same messages,
//! and no payload above the limit.
//!
//! An input is the size of the pieces (1 byte; 0 means 256), the payload limit (1 byte, in units of 16
//! bytes), and the server's bytes.
#![no_main]

use broker_bridge::redis::fuzz::{Said, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let [piece, bound, bytes @ ..] = input else { return };
    let piece = if *piece == 0 { 256 } else { usize::from(*piece) };
    let bound = usize::from(*bound) * 16;
    let (whole, left) = read(bytes, usize::MAX >> 1, bound);
    for said in &whole {
        if let Said::Message(_, payload) = said {
            assert!(payload.len() <= bound, "{} bytes against a bound of {bound}", payload.len());
        }
    }
    for piece in [piece, 1] {
        assert_eq!(read(bytes, piece, bound), (whole.clone(), left), "in pieces of {piece}");
    }
});

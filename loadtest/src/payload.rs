//! The content of a test message besides its stamp: dots, or realistic JSON.
//!
//! Dots compress to almost nothing; to measure what compression costs and saves, messages have to resemble
//! real ones. The JSON messages are chat lines, prices and orders in turn, one object each:
//!
//! ```text
//! {"id":"<the stamp>","type":"chat",…,"text":"words to the size asked for"}
//! ```
//!
//! All of it is derived from the stamp, so a reader of the stamp knows every byte of the message.

use std::io::Write;

use anyhow::ensure;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::{
    dice::Dice,
    stamp::{NUMBERS, Stamp},
};

/// The content of messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Payload {
    /// A JSON string of the stamp and dots
    #[default]
    Dots,
    /// JSON objects like those of chats and markets, to be compressed
    Json,
}

/// The size and the content of a run's messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub payload: Payload,
    size: usize,
}

/// The bytes before the stamp in an object.
pub const FRONT: &[u8] = b"{\"id\":\"";

/// The smallest object: the stamp, the fields of every kind, and a few words.
const MIN_OBJECT: usize = 256;

const NAMES: [&str; 8] = ["mira", "jonas", "aylin", "tomasz", "grace", "wei", "lucia", "sven"];
const SYMBOLS: [&str; 8] = ["EURUSD", "BTC-EUR", "ACME", "XAU", "GBPJPY", "ETH-USD", "BRENT", "DAX"];
const WORDS: [&str; 32] = [
    "the",
    "server",
    "moved",
    "to",
    "another",
    "room",
    "and",
    "nobody",
    "noticed",
    "until",
    "morning",
    "when",
    "traffic",
    "came",
    "back",
    "we",
    "should",
    "try",
    "that",
    "again",
    "tomorrow",
    "with",
    "more",
    "people",
    "please",
    "send",
    "me",
    "a",
    "screenshot",
    "of",
    "your",
    "dashboard",
];

impl Shape {
    /// Messages of `size` bytes, or of the minimum size if that is larger.
    pub fn new(payload: Payload, size: usize) -> Self {
        let fewest = match payload {
            Payload::Dots => Stamp::MIN_SIZE,
            Payload::Json => MIN_OBJECT,
        };
        Self { payload, size: size.max(fewest) }
    }

    /// Dots, which all scenarios but those about compression send.
    pub fn dots(size: usize) -> Self {
        Self::new(Payload::Dots, size)
    }

    /// Messages of a size given by a flag, which has to be large enough.
    pub fn asked(payload: Payload, size: usize) -> anyhow::Result<Self> {
        let shape = Self::new(payload, size);
        ensure!(
            shape.size == size,
            "a message of this payload has at least {} bytes: --size {size} is too small",
            shape.size
        );
        Ok(shape)
    }

    /// Bytes of a message.
    pub fn size(self) -> usize {
        self.size
    }
}

/// Appends the object that carries `numbers`, the digits of a stamp, as message `sequence` of its publisher.
pub fn write_object(out: &mut Vec<u8>, numbers: &[u8; NUMBERS], sequence: u64, size: usize) {
    let start = out.len();
    let mut dice = Dice::new(sequence);
    out.extend_from_slice(FRONT);
    out.extend_from_slice(numbers);
    let last = match sequence % 3 {
        0 => {
            let (user, name) = (dice.below(100_000), dice.of(&NAMES));
            put(out, format_args!("\",\"type\":\"chat\",\"user\":{{\"id\":{user},\"name\":\"{name}\"}}"));
            "text"
        }
        1 => {
            let (symbol, cents, volume) = (dice.of(&SYMBOLS), dice.below(900_000) + 100, dice.below(5_000));
            let (whole, part) = (cents / 100, cents % 100);
            put(
                out,
                format_args!(
                    "\",\"type\":\"price\",\"symbol\":\"{symbol}\",\"bid\":{whole}.{part:02},\"ask\":"
                ),
            );
            put(
                out,
                format_args!(
                    "{whole}.{:02},\"volume\":{volume},\"depth\":[[{whole}.{part:02},1]",
                    (part + 2) % 100
                ),
            );
            // As much of the order book as fits, with room for a note of a few words.
            while out.len() - start + 80 < size {
                let (level, lots) = (dice.below(100), dice.below(900));
                put(out, format_args!(",[{whole}.{level:02},{lots}]"));
            }
            out.push(b']');
            "note"
        }
        _ => {
            let (number, action) = (dice.below(1_000_000_000), dice.of(&["buy", "sell"]));
            let (symbol, lots) = (dice.of(&SYMBOLS), dice.below(500));
            put(
                out,
                format_args!("\",\"type\":\"order\",\"order\":{number},\"side\":\"{action}\",\"symbol\":"),
            );
            put(out, format_args!("\"{symbol}\",\"quantity\":{lots},\"state\":\"accepted\""));
            "remark"
        }
    };
    put(out, format_args!(",\"{last}\":\""));
    let end = start + size - 2;
    while out.len() < end {
        out.extend_from_slice(dice.of(&WORDS).as_bytes());
        out.push(b' ');
    }
    out.truncate(end);
    out.extend_from_slice(b"\"}");
}

fn put(out: &mut Vec<u8>, words: std::fmt::Arguments<'_>) {
    // Writing to a vector cannot fail.
    let _: std::io::Result<()> = out.write_fmt(words);
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    proptest! {
        #[test]
        fn an_object_is_json_of_exactly_its_size(sequence: u64, size in MIN_OBJECT..5000) {
            let mut out = b"before".to_vec();
            write_object(&mut out, &[b'7'; NUMBERS], sequence, size);
            let object = &out[6..];
            prop_assert_eq!(object.len(), size);
            let value: Value = serde_json::from_slice(object).unwrap();
            prop_assert_eq!(value["id"].as_str(), Some(&*"7".repeat(NUMBERS)));
            prop_assert!(object.is_ascii());
        }
    }

    #[test]
    fn messages_differ_and_are_reproducible() {
        let object = |sequence| {
            let mut out = Vec::new();
            write_object(&mut out, &[b'0'; NUMBERS], sequence, 512);
            out
        };
        let all: HashSet<_> = (0..300).map(object).collect();
        assert_eq!(all.len(), 300);
        assert_eq!(object(7), object(7));
    }

    #[test]
    fn a_size_that_is_too_small_is_an_error() {
        assert!(Shape::asked(Payload::Json, 255).unwrap_err().to_string().contains("--size 255"));
        assert_eq!(Shape::asked(Payload::Json, 256).unwrap().size(), 256);
        assert_eq!(Shape::new(Payload::Dots, 0).size(), Stamp::MIN_SIZE);
    }
}

//! What a test message says about itself.
//!
//! A payload is one JSON string of printable ASCII, so that a protocol that insists on JSON and one that
//! takes bytes carry the same thing:
//!
//! ```text
//! "rrrrrrrrssssssssssssssssnnnnnnnnnnnnnnnn....…"
//!  run (8) sequence (16)   sent (16)       padding to the size asked for
//! ```
//!
//! all numbers in lower-case hexadecimal. A payload that differs from this in any byte is no stamp.

/// The marks of one test message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Which run sent it: strangers' messages in the same room are told apart by it.
    pub run: u32,
    /// Its place in the run, from 0.
    pub sequence: u64,
    /// When it was sent, in nanoseconds since the run began.
    pub sent: u64,
}

const NUMBERS: usize = 8 + 16 + 16;
const PADDING: u8 = b'.';

impl Stamp {
    /// The smallest payload that holds a stamp, in bytes.
    pub const MIN_SIZE: usize = NUMBERS + 2;

    /// Appends a payload of `size` bytes, or of [`MIN_SIZE`](Self::MIN_SIZE) if that is more.
    pub fn write(&self, out: &mut Vec<u8>, size: usize) {
        let start = out.len();
        out.push(b'"');
        push_hex(out, &self.run.to_be_bytes());
        push_hex(out, &self.sequence.to_be_bytes());
        push_hex(out, &self.sent.to_be_bytes());
        out.resize((start + size.max(Self::MIN_SIZE)) - 1, PADDING);
        out.push(b'"');
    }

    /// Reads a payload, or returns `None` if it is not exactly what [`write`](Self::write) makes.
    pub fn read(payload: &[u8]) -> Option<Self> {
        let inner = payload.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
        let (numbers, padding) = inner.split_at_checked(NUMBERS)?;
        let (run, rest) = numbers.split_at_checked(8)?;
        let (sequence, sent) = rest.split_at_checked(16)?;
        if !padding.iter().all(|&byte| byte == PADDING) {
            return None;
        }
        Some(Self {
            run: u32::try_from(read_hex(run)?).ok()?,
            sequence: read_hex(sequence)?,
            sent: read_hex(sent)?,
        })
    }
}

fn push_hex(out: &mut Vec<u8>, bytes: &[u8]) {
    let digit = |value: u8| if value < 10 { b'0' + value } else { b'a' + value - 10 };
    for byte in bytes {
        out.push(digit(byte >> 4));
        out.push(digit(byte & 0xF));
    }
}

fn read_hex(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0_u64, |value, &digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(value << 4 | u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trip(run: u32, sequence: u64, sent: u64, size in 0_usize..600) {
            let stamp = Stamp { run, sequence, sent };
            let mut payload = Vec::new();
            stamp.write(&mut payload, size);
            prop_assert_eq!(payload.len(), size.max(Stamp::MIN_SIZE));
            prop_assert_eq!(Stamp::read(&payload), Some(stamp));
            prop_assert!(serde_json::from_slice::<String>(&payload).is_ok());
        }

        #[test]
        fn no_byte_may_change_unseen(at in 0_usize..100, to in any::<u8>()) {
            let stamp = Stamp { run: 0xABCD, sequence: 77, sent: 1_234_567 };
            let mut payload = Vec::new();
            stamp.write(&mut payload, 100);
            prop_assume!(payload[at] != to);
            payload[at] = to;
            prop_assert_ne!(Stamp::read(&payload), Some(stamp));
        }
    }

    #[test]
    fn strangers_are_no_stamps() {
        for payload in [&b""[..], b"\"", b"\"\"", b"hello", &[b'"'; 42], &[0xFF; 64]] {
            assert_eq!(Stamp::read(payload), None);
        }
    }
}

//! The identifying data inside a test message.
//!
//! A payload is one JSON string of printable ASCII, so protocols that require JSON and those that take bytes
//! carry the same thing:
//!
//! ```text
//! "rrrrrrrroooooooopppppppp ssssssssssss nnnnnnnnnnnnnnnn cccccccc....…"     (without the spaces)
//!  run (8) room(8) publisher (8)  sequence (12)  sent (16)  check (8)  padding to the size asked for
//! ```
//!
//! or a JSON object ([`payload`](crate::payload)) that carries the same numbers, all of them in lower-case
//! hexadecimal. The check covers the numbers before it, so an altered message is distinguished from one that
//! was never sent. A payload that differs in any byte is not a stamp.

use crate::{
    dialect::Dialect,
    payload::{FRONT, Payload, Shape, write_object},
};

/// The stamp of one test message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The run that sent it, which distinguishes other runs' messages in the same room.
    pub run: u32,
    /// The room of the run that it was sent to.
    pub room: u32,
    /// The publisher of the room that sent it.
    pub publisher: u32,
    /// Its position among the messages of that publisher in that room, from 0; 48 bits.
    pub sequence: u64,
    /// When it was due, by [`clock::now`](crate::clock::now).
    pub sent: u64,
}

/// The number of digits of all numbers.
pub const NUMBERS: usize = 8 + 8 + 8 + 12 + 16 + 8;
const PADDING: u8 = b'.';

/// Finds this run's stamps in received payloads.
#[derive(Clone, Debug)]
pub struct Finder {
    run: [u8; 8],
    shape: Shape,
    /// The object found last, and its stamp: a broadcast delivers the same one many times.
    object: Vec<u8>,
    stamp: Option<Stamp>,
}

impl Stamp {
    /// The smallest payload that holds a stamp, in bytes.
    pub const MIN_SIZE: usize = NUMBERS + 2;

    /// Appends a payload.
    pub fn write(&self, out: &mut Vec<u8>, shape: Shape) {
        let (start, numbers) = (out.len(), self.numbers());
        match shape.payload {
            Payload::Dots => {
                out.push(b'"');
                out.extend_from_slice(&numbers);
                out.resize(start + shape.size() - 1, PADDING);
                out.push(b'"');
            }
            Payload::Json => write_object(out, &numbers, self.sequence, shape.size()),
        }
    }

    fn numbers(&self) -> [u8; NUMBERS] {
        let [_, _, sequence @ ..] = self.sequence.to_be_bytes();
        let bytes = [&self.run.to_be_bytes()[..], &self.room.to_be_bytes(), &self.publisher.to_be_bytes()];
        let more = [&sequence[..], &self.sent.to_be_bytes(), &self.check().to_be_bytes()];
        let mut numbers = [0; NUMBERS];
        let digits = bytes.iter().chain(&more).flat_map(|part| part.iter()).flat_map(|&byte| hex(byte));
        numbers.iter_mut().zip(digits).for_each(|(place, digit)| *place = digit);
        numbers
    }

    /// Reads the numbers; `None` if any of them is invalid or the check does not match.
    fn read(numbers: &[u8; NUMBERS]) -> Option<Self> {
        let (run, rest) = numbers.split_at_checked(8)?;
        let (room, rest) = rest.split_at_checked(8)?;
        let (publisher, rest) = rest.split_at_checked(8)?;
        let (sequence, rest) = rest.split_at_checked(12)?;
        let (sent, check) = rest.split_at_checked(16)?;
        let word = |digits: &[u8]| u32::try_from(read_hex(digits)?).ok();
        let stamp = Self {
            run: word(run)?,
            room: word(room)?,
            publisher: word(publisher)?,
            sequence: read_hex(sequence)?,
            sent: read_hex(sent)?,
        };
        (word(check)? == stamp.check()).then_some(stamp)
    }

    /// Two rounds of multiply and fold: enough to detect accidental changes.
    fn check(&self) -> u32 {
        let mut state = u64::from(self.run) << 32 | u64::from(self.room);
        for word in [u64::from(self.publisher), self.sequence, self.sent] {
            state = (state ^ word).wrapping_add(0x9E37_79B9_7F4A_7C15).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            state ^= state >> 29;
        }
        u32::try_from(state >> 32).unwrap_or_default()
    }
}

impl Finder {
    /// For the payloads of `shape` that `run` sends.
    pub fn new(run: u32, shape: Shape) -> Self {
        let mut digits = [0; 8];
        let own = run.to_be_bytes().into_iter().flat_map(hex);
        digits.iter_mut().zip(own).for_each(|(place, digit)| *place = digit);
        Self { run: digits, shape, object: Vec::new(), stamp: None }
    }

    /// Finds the stamp where messages of `dialect` carry it.
    pub fn find(&mut self, dialect: Dialect, payload: &[u8]) -> Option<Stamp> {
        match (self.shape.payload, dialect) {
            (Payload::Json, Dialect::Plain | Dialect::Bare) => self.object(payload),
            (Payload::Json, _) => self.object_within(payload),
            (Payload::Dots, dialect) => self.string(dialect, payload),
        }
    }

    fn string(&self, dialect: Dialect, payload: &[u8]) -> Option<Stamp> {
        match dialect {
            Dialect::Plain | Dialect::Bare => self.whole(payload),
            Dialect::Sse | Dialect::Centrifuge | Dialect::SocketIo | Dialect::Json => self.within(payload),
            Dialect::Raw => self.within(payload).or_else(|| self.bare(payload)),
        }
    }

    /// A payload that is exactly an object.
    fn object(&mut self, payload: &[u8]) -> Option<Stamp> {
        if payload.is_empty() || payload != self.object {
            let numbers = payload.strip_prefix(FRONT)?.first_chunk::<NUMBERS>()?;
            let stamp = Stamp::read(numbers).filter(|_| numbers.starts_with(&self.run))?;
            self.object.clear();
            stamp.write(&mut self.object, self.shape);
            self.stamp = Some(stamp);
            if payload != self.object {
                return None;
            }
        }
        self.stamp
    }

    /// An object anywhere within `payload`.
    fn object_within(&mut self, payload: &[u8]) -> Option<Stamp> {
        let of_run = |window: &[u8]| window.ends_with(&self.run) && window.starts_with(FRONT);
        let start = payload.windows(FRONT.len() + self.run.len()).position(of_run)?;
        self.object(payload.get(start..start + self.shape.size())?)
    }

    /// A payload that is exactly a stamp.
    pub fn whole(&self, payload: &[u8]) -> Option<Stamp> {
        (payload.len() == self.shape.size()).then(|| self.at(payload, 0)).flatten()
    }

    /// A stamp anywhere within `payload`: in an envelope that a protocol or a server has added.
    pub fn within(&self, payload: &[u8]) -> Option<Stamp> {
        let quote = payload
            .windows(9)
            .position(|window| window.ends_with(&self.run) && window.first() == Some(&b'"'))?;
        self.at(payload, quote)
    }

    /// The same without its quotes, for a server that decodes the JSON string and sends its text.
    pub fn bare(&self, payload: &[u8]) -> Option<Stamp> {
        let start = payload.windows(8).position(|window| window == self.run)?;
        let inner = payload.get(start..start + self.shape.size() - 2)?;
        let following = payload.get(start + self.shape.size() - 2).is_some_and(|&byte| byte == PADDING);
        (!following).then(|| Self::inner(inner)).flatten()
    }

    fn at(&self, payload: &[u8], quote: usize) -> Option<Stamp> {
        let inner =
            payload.get(quote..quote + self.shape.size())?.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
        inner.starts_with(&self.run).then(|| Self::inner(inner)).flatten()
    }

    fn inner(inner: &[u8]) -> Option<Stamp> {
        let (numbers, padding) = inner.split_first_chunk::<NUMBERS>()?;
        padding.iter().all(|&byte| byte == PADDING).then(|| Stamp::read(numbers)).flatten()
    }
}

fn hex(byte: u8) -> [u8; 2] {
    [byte >> 4, byte & 0xF].map(|value| if value < 10 { b'0' + value } else { b'a' + value - 10 })
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

    fn dots(size: usize) -> Shape {
        Shape::new(Payload::Dots, size)
    }

    fn payload(stamp: Stamp, size: usize) -> Vec<u8> {
        let mut payload = Vec::new();
        stamp.write(&mut payload, dots(size));
        payload
    }

    #[test]
    fn objects_are_checked_byte_for_byte() {
        let shape = Shape::new(Payload::Json, 300);
        let mut finder = Finder::new(0xABCD, shape);
        for sequence in 0..9 {
            let stamp = Stamp { run: 0xABCD, room: 3, publisher: 1, sequence, sent: 1_234_567 };
            let mut object = Vec::new();
            stamp.write(&mut object, shape);
            let wrapped = [b"{\"data\":", &object[..], b"}"].concat();
            for _ in 0..2 {
                assert_eq!(finder.find(Dialect::Plain, &object), Some(stamp));
                assert_eq!(finder.find(Dialect::Centrifuge, &wrapped), Some(stamp));
                assert_eq!(finder.find(Dialect::Plain, &wrapped), None);
            }
            for at in 0..object.len() {
                let mut altered = object.clone();
                altered[at] ^= 1;
                assert_eq!(finder.find(Dialect::Plain, &altered), None, "{at}");
                assert_eq!(finder.find(Dialect::Centrifuge, &altered), None, "{at}");
            }
            assert_eq!(finder.find(Dialect::Plain, &object[..299]), None);
        }
        assert_eq!(Finder::new(0xABCE, shape).find(Dialect::Plain, &finder.object), None, "another run's");
    }

    proptest! {
        #[test]
        fn round_trip(
            run: u32, room: u32, publisher: u32, sequence in 0_u64..1 << 48, sent: u64, size in 0_usize..600,
            before in "[ -!#-~]{0,40}", after in "[ -~]{0,40}",
        ) {
            let stamp = Stamp { run, room, publisher, sequence, sent };
            let payload = payload(stamp, size);
            let finder = Finder::new(run, dots(size));
            prop_assert_eq!(payload.len(), size.max(Stamp::MIN_SIZE));
            prop_assert_eq!(finder.whole(&payload), Some(stamp));
            prop_assert!(serde_json::from_slice::<String>(&payload).is_ok());
            let wrapped = [before.as_bytes(), &payload, after.as_bytes()].concat();
            prop_assert_eq!(finder.within(&wrapped), Some(stamp));
            let text = &payload[1..payload.len() - 1];
            prop_assert_eq!(finder.bare(&[b"{", text, b"}"].concat()), Some(stamp));
        }

        #[test]
        fn every_changed_byte_is_detected(at in 0_usize..100, to in any::<u8>()) {
            let stamp = Stamp { run: 0xABCD, room: 3, publisher: 1, sequence: 77, sent: 1_234_567 };
            let mut payload = payload(stamp, 100);
            prop_assume!(payload[at] != to);
            payload[at] = to;
            let finder = Finder::new(0xABCD, dots(100));
            prop_assert_eq!(finder.whole(&payload), None);
            prop_assert_eq!(finder.within(&payload), None);
        }

        #[test]
        fn a_truncated_or_extended_stamp_is_not_a_stamp(cut in 0_usize..100) {
            let stamp = Stamp { run: 0xABCD, room: 0, publisher: 0, sequence: 1, sent: 2 };
            let payload = payload(stamp, 100);
            let finder = Finder::new(0xABCD, dots(100));
            for cut in [&payload[..cut], &payload[100 - cut..]] {
                prop_assert_eq!(finder.whole(cut), None);
                prop_assert_eq!(finder.within(cut), None);
            }
            let longer = [&payload[..99], b"..\""].concat();
            prop_assert_eq!(finder.whole(&longer), None);
            prop_assert_eq!(finder.within(&longer), None);
            prop_assert_eq!(finder.bare(&longer), None);
        }
    }

    #[test]
    fn other_payloads_are_not_stamps() {
        let finder = Finder::new(0x2222_2222, dots(64));
        for payload in [&b""[..], b"\"", b"\"\"", b"hello", &[b'"'; 64], &[b'2'; 64], &[0xFF; 64]] {
            assert_eq!(finder.whole(payload), None);
            assert_eq!(finder.within(payload), None);
            assert_eq!(finder.bare(payload), None);
        }
    }
}

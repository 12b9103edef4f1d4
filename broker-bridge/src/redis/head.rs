//! The head of a message that was recorded in its room's history: its [`Place`].
//!
//! # Layout
//!
//! ```text
//! F5 'T' 'h' <id> [link] <other> LF <inner>
//! ```
//!
//! | part | what |
//! |---|---|
//! | `<id>` | the position: 1 to 20 digits, `-`, 1 to 20 digits |
//! | `[link]` | optional: space, `u` (unproven) or `m` (moved), space, `<id>` of the publication before, in another epoch. Without it, the message follows the one with the offset before, in the same epoch |
//! | `<other>` | up to 256 bytes of other printable ASCII, for future versions |
//! | `<inner>` | the message itself, delivered as if it had no head |
//!
//! Anything else is not a head, and is delivered as raw bytes. `F5` never occurs in UTF-8, so text is never mistaken
//! for a head; nodes wrap binary data that begins with `F5` in an envelope.

use crate::{Cursor, Follows, Place};

/// The longest head, in bytes.
pub(super) const MAX_BYTES: usize = MAGIC.len() + MAX_ID + LINK_MARK + MAX_ID + MAX_OTHER + 1;

const MAGIC: [u8; 3] = [0xF5, b'T', b'h'];
const MAX_DIGITS: usize = 20;
const MAX_ID: usize = MAX_DIGITS + 1 + MAX_DIGITS;
/// Space, letter, space.
const LINK_MARK: usize = 3;
const MAX_OTHER: usize = 256;

/// The length of the heads at the start of `message`, in bytes, and the place that the first one tells. There are several
/// if the inner bytes would themselves be read as a head. There is no place without a head, nor if a number in it is 2^64
/// or more.
pub(super) fn read(message: &[u8]) -> (usize, Option<Place>) {
    let Some((mut rest, place)) = strip(message) else { return (0, None) };
    while let Some((inner, _)) = strip(rest) {
        rest = inner;
    }
    (message.len() - rest.len(), place)
}

/// The link in an entry of a log: the same text as in a head.
pub(super) fn link(text: &[u8]) -> Option<Follows> {
    match read_link(text) {
        Some((b"", follows)) => follows,
        _ => None,
    }
}

/// The rest after one head, and the place; `None` if there is no head.
fn strip(message: &[u8]) -> Option<(&[u8], Option<Place>)> {
    let (rest, cursor) = read_id(message.strip_prefix(&MAGIC)?)?;
    let (rest, follows) = match rest.strip_prefix(b" ").and_then(read_link) {
        Some((rest, follows)) => (rest, Some(follows)),
        None => (rest, None),
    };
    let place = match (cursor, follows) {
        (Some(cursor), None) => Some(Place::within_epoch(cursor)),
        (Some(cursor), Some(Some(follows))) => Some(Place { cursor, follows }),
        (None, _) | (_, Some(None)) => None,
    };
    let other = rest.iter().take(MAX_OTHER).take_while(|byte| is_printable(**byte)).count();
    Some((rest.get(other..)?.strip_prefix(b"\n")?, place))
}

/// The rest after a link, and what it says unless a number is too large.
fn read_link(bytes: &[u8]) -> Option<(&[u8], Option<Follows>)> {
    let (follows, id): (fn(Cursor) -> Follows, _) = match bytes {
        [b'u', b' ', id @ ..] => (Follows::Unproven, id),
        [b'm', b' ', id @ ..] => (Follows::Moved, id),
        _ => return None,
    };
    let (rest, cursor) = read_id(id)?;
    Some((rest, cursor.map(follows)))
}

/// The rest after an id, and the position unless a number is too large.
fn read_id(bytes: &[u8]) -> Option<(&[u8], Option<Cursor>)> {
    let (epoch, rest) = split_digits(bytes)?;
    let (offset, rest) = split_digits(rest.strip_prefix(b"-")?)?;
    let cursor = number(epoch).zip(number(offset)).map(|(epoch, offset)| Cursor { epoch, offset });
    Some((rest, cursor))
}

fn split_digits(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    // One more than allowed, to reject a number that is too long.
    let digits = bytes.iter().take(MAX_DIGITS + 1).take_while(|byte| byte.is_ascii_digit()).count();
    if (1..=MAX_DIGITS).contains(&digits) { bytes.split_at_checked(digits) } else { None }
}

fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn is_printable(byte: u8) -> bool {
    matches!(byte, b' '..=b'~')
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn length(message: &[u8]) -> usize {
        read(message).0
    }

    fn place(head: &str) -> Option<Place> {
        let message = [&MAGIC, head.as_bytes(), b"inner"].concat();
        let (length, place) = read(&message);
        assert_eq!(length, MAGIC.len() + head.len(), "{head:?}");
        place
    }

    #[test]
    fn a_head_tells_the_place() {
        let at = |epoch, offset| Cursor { epoch, offset };
        let max = u64::MAX;
        for (head, cursor, follows) in [
            ("5-1\n", at(5, 1), Follows::Nothing),
            ("5-2\n", at(5, 2), Follows::Previous(at(5, 1))),
            ("0005-0002\n", at(5, 2), Follows::Previous(at(5, 1))),
            ("5-9 u 4-8\n", at(5, 9), Follows::Unproven(at(4, 8))),
            ("5-9 m 4-8\n", at(5, 9), Follows::Moved(at(4, 8))),
            ("5-1 u 4-0\n", at(5, 1), Follows::Unproven(at(4, 0))),
            ("5-9 m 4-8 more\n", at(5, 9), Follows::Moved(at(4, 8))),
            // What only resembles a link is something of a newer version.
            ("5-2 x 4-8\n", at(5, 2), Follows::Previous(at(5, 1))),
            ("5-2 u 4\n", at(5, 2), Follows::Previous(at(5, 1))),
            ("18446744073709551615-2\n", at(max, 2), Follows::Previous(at(max, 1))),
        ] {
            assert_eq!(place(head), Some(Place { cursor, follows }), "{head:?}");
        }
        for head in ["18446744073709551616-1\n", "1-99999999999999999999\n", "5-9 u 4-18446744073709551616\n"]
        {
            assert_eq!(place(head), None, "{head:?}");
        }
        // The outer head is that of the last one who recorded it.
        let nested = b"\xF5Th2-2\n\xF5Th1-1\nx";
        assert_eq!(read(nested).1, Some(Place::within_epoch(at(2, 2))));
        assert_eq!(read(b"5-1\nx"), (0, None));
    }

    #[test]
    fn a_link_stands_alone_in_an_entry() {
        let before = Cursor { epoch: 4, offset: 8 };
        assert_eq!(link(b"u 4-8"), Some(Follows::Unproven(before)));
        assert_eq!(link(b"m 4-8"), Some(Follows::Moved(before)));
        for text in ["", "u", "x 4-8", " u 4-8", "u 4-8 ", "u 4-18446744073709551616"] {
            assert_eq!(link(text.as_bytes()), None, "{text:?}");
        }
    }

    /// Whether the whole of `head` is one head and nothing of what follows.
    fn is_head(head: &[u8]) -> bool {
        length(&[head, b"inner"].concat()) == head.len()
    }

    #[test]
    fn heads_follow_the_documented_grammar() {
        let longest = format!("{0}-{0}", "9".repeat(20));
        for head in [
            "1-1\n".to_owned(),
            "0-0\n".to_owned(),
            "201845678901234567-42\n".to_owned(),
            format!("{longest}\n"),
            "5-1 u 4-9\n".to_owned(),
            "5-1 m 4-9\n".to_owned(),
            format!("{longest} u {longest}\n"),
            // Other printable ASCII.
            "5-1 \n".to_owned(),
            "5-1 d=1 ~!\n".to_owned(),
            "5-1 u 4-9 d=1\n".to_owned(),
            // What only resembles a link.
            "5-1 x 4-9\n".to_owned(),
            "5-1 u 4-\n".to_owned(),
            "5-1 u 4\n".to_owned(),
            "5-1 u\n".to_owned(),
            "5-1  u 4-9\n".to_owned(),
            format!("5-1{}\n", " ".repeat(MAX_OTHER)),
            format!("{longest} m {longest}{}\n", "x".repeat(MAX_OTHER)),
        ] {
            assert!(is_head(&[&MAGIC, head.as_bytes()].concat()), "{head:?}");
        }
    }

    #[test]
    fn other_bytes_are_not_a_head() {
        let long = "9".repeat(21);
        for no_head in [
            "\n".to_owned(),
            "1\n".to_owned(),
            "1-\n".to_owned(),
            "-1\n".to_owned(),
            "1-x\n".to_owned(),
            "+1-1\n".to_owned(),
            " 1-1\n".to_owned(),
            "1 -1\n".to_owned(),
            "1-1".to_owned(),
            "1-1\r\n".to_owned(),
            "1-1\t\n".to_owned(),
            "1-1 \u{7f}\n".to_owned(),
            "1-1 é\n".to_owned(),
            "1-1\0\n".to_owned(),
            format!("{long}-1\n"),
            format!("1-{long}\n"),
            format!("1-1{}\n", " ".repeat(MAX_OTHER + 1)),
            format!("1-1 u 2-2{}\n", " ".repeat(MAX_OTHER + 1)),
        ] {
            assert_eq!(length(&[&MAGIC, no_head.as_bytes(), b"inner"].concat()), 0, "{no_head:?}");
        }
        for other in [&b""[..], b"1-1\n", b"\xF5", b"\xF5T", b"\xF5Tg1-1\n", b"\xF5TH1-1\n", b"x\xF5Th1-1\n"]
        {
            assert_eq!(length(other), 0, "{other:?}");
        }
    }

    #[test]
    fn the_longest_head_has_the_documented_length() {
        let id = format!("{0}-{0}", "9".repeat(MAX_DIGITS));
        let text = format!("{id} u {id}{}\n", "x".repeat(MAX_OTHER));
        let longest = [&MAGIC, text.as_bytes()].concat();
        assert_eq!((longest.len(), is_head(&longest)), (MAX_BYTES, true));
    }

    #[test]
    fn the_bytes_after_a_head_are_read_unchanged() {
        let nested = b"\xF5Th1-1\n\xF5Th2-2 u 1-1\nx".to_vec();
        assert_eq!(length(&nested), nested.len() - 1);
        let broken = b"\xF5Th1-1\n\xF5Th2-\nx".to_vec();
        assert_eq!(length(&broken), 7);
    }

    proptest! {
        #[test]
        fn a_head_is_stripped_to_its_last_byte(
            id in "[0-9]{1,20}-[0-9]{1,20}",
            link in proptest::option::of(" [um] [0-9]{1,20}-[0-9]{1,20}"),
            other in "( [ -~]{0,255})?",
            inner in vec(any::<u8>(), 0..40),
        ) {
            prop_assume!(!inner.starts_with(&MAGIC));
            let head = [&MAGIC, format!("{id}{}{other}\n", link.unwrap_or_default()).as_bytes()].concat();
            prop_assert!(head.len() <= MAX_BYTES);
            prop_assert_eq!(length(&[&head[..], &inner].concat()), head.len());
        }

        #[test]
        fn a_damaged_head_is_one_line_or_none(
            id in "[0-9]{1,20}-[0-9]{1,20}", at: prop::sample::Index, byte: u8
        ) {
            let mut message = [&MAGIC, format!("{id} u 1-1\nrest").as_bytes()].concat();
            let at = at.index(message.len());
            message[at] = byte;
            let (stripped, place) = read(&message);
            prop_assert!(stripped > 0 || place.is_none());
            prop_assert!(stripped == 0 || message[stripped - 1] == b'\n');
            prop_assert!(stripped <= MAX_BYTES);
        }
    }
}

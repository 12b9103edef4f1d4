//! The head of a message that was recorded in its room's history.
//!
//! Finds where a head ends, and does not interpret it: this version keeps no history. It skips heads, so that newer
//! nodes may write them during a rolling upgrade.
//!
//! # Layout
//!
//! ```text
//! F5 'T' 'h' <id> [link] <other> LF <inner>
//! ```
//!
//! | part | what |
//! |---|---|
//! | `<id>` | 1 to 20 digits, `-`, 1 to 20 digits |
//! | `[link]` | optional: space, `u` or `m`, space, `<id>` |
//! | `<other>` | up to 256 bytes of other printable ASCII, for future versions |
//! | `<inner>` | the message itself, delivered as if it had no head |
//!
//! Anything else is not a head, and is delivered as raw bytes. `F5` never occurs in UTF-8, so text is never mistaken
//! for a head; nodes wrap binary data that begins with `F5` in an envelope.

/// The longest head, in bytes.
pub(super) const MAX_BYTES: usize = MAGIC.len() + MAX_ID + LINK_MARK + MAX_ID + MAX_OTHER + 1;

const MAGIC: [u8; 3] = [0xF5, b'T', b'h'];
const MAX_DIGITS: usize = 20;
const MAX_ID: usize = MAX_DIGITS + 1 + MAX_DIGITS;
/// Space, letter, space.
const LINK_MARK: usize = 3;
const MAX_OTHER: usize = 256;

/// The length of the heads at the start of `message`, in bytes. There are several if the inner bytes would themselves
/// be read as a head.
pub(super) fn length(message: &[u8]) -> usize {
    let mut rest = message;
    while let Some(inner) = strip(rest) {
        rest = inner;
    }
    message.len() - rest.len()
}

/// The rest after one head; `None` if there is no head.
fn strip(message: &[u8]) -> Option<&[u8]> {
    let rest = skip_id(message.strip_prefix(&MAGIC)?)?;
    let rest = skip_link(rest).unwrap_or(rest);
    let other = rest.iter().take(MAX_OTHER).take_while(|byte| is_printable(**byte)).count();
    rest.get(other..)?.strip_prefix(b"\n")
}

fn skip_link(bytes: &[u8]) -> Option<&[u8]> {
    match bytes {
        [b' ', b'u' | b'm', b' ', id @ ..] => skip_id(id),
        _ => None,
    }
}

fn skip_id(bytes: &[u8]) -> Option<&[u8]> {
    skip_digits(skip_digits(bytes)?.strip_prefix(b"-")?)
}

fn skip_digits(bytes: &[u8]) -> Option<&[u8]> {
    // One more than allowed, to reject a number that is too long.
    let digits = bytes.iter().take(MAX_DIGITS + 1).take_while(|byte| byte.is_ascii_digit()).count();
    if (1..=MAX_DIGITS).contains(&digits) { bytes.get(digits..) } else { None }
}

fn is_printable(byte: u8) -> bool {
    matches!(byte, b' '..=b'~')
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

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
            let stripped = length(&message);
            prop_assert!(stripped == 0 || message[stripped - 1] == b'\n');
            prop_assert!(stripped <= MAX_BYTES);
        }
    }
}

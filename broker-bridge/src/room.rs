//! The name of a room.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

/// A valid room name: 1 to 200 bytes of UTF-8 without control characters, white space, `{` or `}`.
///
/// Braces are reserved because a Redis Cluster hash tag is written with them. Cloning shares the text.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomName(Arc<str>);

/// Why a text is not a [`RoomName`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRoomName {
    /// The text is empty.
    #[error("a room name must not be empty")]
    Empty,
    /// The text is longer than [`RoomName::MAX_BYTES`].
    #[error("a room name has at most {max} bytes, this one has {len}", max = RoomName::MAX_BYTES)]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// The bytes are not UTF-8.
    #[error("a room name must be UTF-8")]
    NotUtf8,
    /// A character that no room name may contain.
    #[error("a room name must not contain {found:?}: no control characters, white space, '{{' or '}}'")]
    Forbidden {
        /// The first such character.
        found: char,
    },
}

impl RoomName {
    /// The longest name, in bytes.
    pub const MAX_BYTES: usize = 200;

    /// Validates `name`.
    pub fn new(name: &str) -> Result<Self, InvalidRoomName> {
        if name.is_empty() {
            return Err(InvalidRoomName::Empty);
        }
        if name.len() > Self::MAX_BYTES {
            return Err(InvalidRoomName::TooLong { len: name.len() });
        }
        match name.chars().find(|&c| is_forbidden(c)) {
            Some(found) => Err(InvalidRoomName::Forbidden { found }),
            None => Ok(Self(Arc::from(name))),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_forbidden(c: char) -> bool {
    c.is_control() || c.is_whitespace() || c == '{' || c == '}'
}

impl FromStr for RoomName {
    type Err = InvalidRoomName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::new(name)
    }
}

impl TryFrom<&[u8]> for RoomName {
    type Error = InvalidRoomName;

    fn try_from(name: &[u8]) -> Result<Self, Self::Error> {
        std::str::from_utf8(name).map_err(|_| InvalidRoomName::NotUtf8).and_then(Self::new)
    }
}

/// Allows look-ups by `&str` in maps keyed by room.
impl Borrow<str> for RoomName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RoomName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RoomName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bounds_and_characters() {
        assert_eq!(RoomName::new(""), Err(InvalidRoomName::Empty));
        assert_eq!(RoomName::new(&"a".repeat(200)).map(|r| r.as_str().len()), Ok(200));
        assert_eq!(RoomName::new(&"a".repeat(201)), Err(InvalidRoomName::TooLong { len: 201 }));
        for found in [' ', '\u{a0}', '\n', '\0', '\u{7f}', '\u{85}', '{', '}'] {
            assert_eq!(RoomName::new(&format!("a{found}b")), Err(InvalidRoomName::Forbidden { found }));
        }
        assert_eq!(RoomName::try_from(&b"\xff"[..]), Err(InvalidRoomName::NotUtf8));
        for name in ["lobby", "chat:été:日本", "a/b?c#d%20", "*"] {
            assert_eq!(RoomName::new(name).map(|r| r.to_string()), Ok(name.to_owned()));
        }
    }

    proptest! {
        #[test]
        fn room_names_match_the_documented_grammar(name in ".{0,210}") {
            let expected = !name.is_empty()
                && name.len() <= 200
                && !name.chars().any(|c| c.is_control() || c.is_whitespace() || c == '{' || c == '}');
            prop_assert_eq!(RoomName::new(&name).is_ok(), expected);
        }
    }
}

//! The names that a node uses in Redis.
//!
//! | name | what |
//! |---|---|
//! | `<prefix>room:<room>` | the topic of a room |
//! | `<prefix>tidegate:canary:<node>` | the topic of a node's canaries |
//!
//! The prefix comes from the configuration, and is empty by default. Neither the prefix nor a room name contains
//! braces: they mark the hash tag of a key in Redis Cluster, and keys of a room will carry its topic there.

use std::{fmt, str::FromStr, sync::Arc};

use crate::RoomName;

/// The prefix of every name in Redis: at most 64 bytes of UTF-8 without white space, control characters, `{` and
/// `}`. Empty by default. Cloning shares the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(Arc<str>);

/// Why a text is not a [`Prefix`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {}", Prefix::EXPECTED)]
pub struct InvalidPrefix;

impl Prefix {
    /// The longest prefix, in bytes.
    pub const MAX_BYTES: usize = 64;
    /// A description of valid prefixes, for error messages.
    pub const EXPECTED: &str = "text of at most 64 bytes without white space, control characters, { and }";

    /// The prefix as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Prefix {
    fn default() -> Self {
        Self(Arc::from(""))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Prefix {
    type Err = InvalidPrefix;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let forbidden = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '{' | '}');
        if text.len() > Self::MAX_BYTES || text.contains(forbidden) {
            return Err(InvalidPrefix);
        }
        Ok(Self(Arc::from(text)))
    }
}

/// Builds topics. Cloning shares the prefix.
#[derive(Clone, Debug)]
pub(super) struct Topics {
    prefix: Arc<str>,
}

impl Topics {
    pub(super) fn new(prefix: &Prefix) -> Self {
        Self { prefix: Arc::clone(&prefix.0) }
    }

    /// The topic of `room`.
    pub(super) fn room(&self, room: &RoomName) -> Arc<[u8]> {
        self.pieces(room).concat().into()
    }

    /// The topic of `room` in pieces, for a caller that joins them in a buffer of its own.
    pub(super) fn pieces<'a>(&'a self, room: &'a RoomName) -> [&'a [u8]; 3] {
        [self.prefix.as_bytes(), ROOM, room.as_str().as_bytes()]
    }

    /// The topic of the canaries of `node`.
    pub(super) fn canary(&self, node: u128) -> Arc<[u8]> {
        format!("{}tidegate:canary:{node:032x}", self.prefix).into_bytes().into()
    }
}

const ROOM: &[u8] = b"room:";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_have_the_documented_names() {
        let room = RoomName::new("chat:été").unwrap();
        for (prefix, topic) in [("", "room:chat:été"), ("prod/", "prod/room:chat:été")] {
            let topics = Topics::new(&prefix.parse().unwrap());
            assert_eq!(&*topics.room(&room), topic.as_bytes());
        }
        let canary = Topics::new(&"p:".parse().unwrap()).canary(10);
        assert_eq!(&*canary, b"p:tidegate:canary:0000000000000000000000000000000a");
    }

    #[test]
    fn a_prefix_is_short_and_has_no_braces() {
        for text in ["{", "}", "a{b}", "{room:x}", "a b", "a\n", "a\u{a0}", &"a".repeat(65)] {
            assert_eq!(text.parse::<Prefix>(), Err(InvalidPrefix), "{text:?}");
        }
        for text in ["", "prod:", "été/", &"a".repeat(64)] {
            assert_eq!(text.parse::<Prefix>().as_ref().map(Prefix::as_str), Ok(text));
        }
    }
}

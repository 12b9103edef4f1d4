//! The names that a node uses in Redis.
//!
//! | name | what |
//! |---|---|
//! | `<prefix>room:<room>` | the topic of a room |
//! | `<prefix>tidegate:canary:<node>` | the topic of a node's canaries |
//! | `<prefix>{room:<room>}:log` | the log of a room that keeps a history: a stream |
//! | `<prefix>{room:<room>}:id:b:<id>` | what is remembered of a backend's publication with this id |
//! | `<prefix>{room:<room>}:id:c:<hash>` | likewise of a client's: 64 hexadecimal digits of SHA-256 over the id, a space and the client's subject. An id contains no space |
//!
//! The prefix comes from the configuration, and is empty by default. Neither the prefix nor a room name contains
//! braces: they mark the hash tag of a key in Redis Cluster, so that all keys of a room are in one slot.

use std::{fmt, fmt::Write as _, str::FromStr, sync::Arc};

use aws_lc_rs::digest;

use crate::{PublicationId, RoomName, publication::Owner};

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

/// Builds topics and keys. Cloning shares the prefix.
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

    /// The key of the log of `room`, in pieces.
    pub(super) fn log<'a>(&'a self, room: &'a RoomName) -> [&'a [u8]; 5] {
        let [prefix, start, room] = self.pieces(room);
        [prefix, b"{", start, room, b"}:log"]
    }

    /// The key of an id in `room`, in pieces. The name is that of [`id_name`].
    pub(super) fn id<'a>(&'a self, room: &'a RoomName, name: &'a str) -> [&'a [u8]; 6] {
        let [prefix, start, room] = self.pieces(room);
        [prefix, b"{", start, room, b"}:id:", name.as_bytes()]
    }

    /// The topic of the canaries of `node`.
    pub(super) fn canary(&self, node: u128) -> Arc<[u8]> {
        format!("{}tidegate:canary:{node:032x}", self.prefix).into_bytes().into()
    }
}

/// The name of an id in a key.
pub(super) fn id_name(id: &PublicationId) -> String {
    let text = id.as_str();
    match id.owner() {
        Owner::Backend => format!("b:{text}"),
        Owner::Client(subject) => {
            let hash = digest::digest(&digest::SHA256, format!("{text} {subject}").as_bytes());
            let mut name = String::with_capacity(2 + 2 * hash.as_ref().len());
            name.push_str("c:");
            for byte in hash.as_ref() {
                write!(name, "{byte:02x}").expect("a string takes everything");
            }
            name
        }
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
    fn keys_have_the_documented_names() {
        let room = RoomName::new("chat:été").unwrap();
        let key = |pieces: &[&[u8]]| String::from_utf8(pieces.concat()).unwrap();
        let topics = Topics::new(&"prod/".parse().unwrap());
        assert_eq!(key(&topics.log(&room)), "prod/{room:chat:été}:log");
        let id = |owner, text| id_name(&PublicationId::new(owner, text).unwrap());
        assert_eq!(key(&topics.id(&room, &id(Owner::Backend, "7"))), "prod/{room:chat:été}:id:b:7");
        // `printf '7 alice' | sha256sum`
        let hash = "46f4b7af497bd9f1410ce972405d81ba950508a8782330d72263d8e30d0ca525";
        assert_eq!(
            key(&topics.id(&room, &id(Owner::Client("alice".into()), "7"))),
            format!("prod/{{room:chat:été}}:id:c:{hash}")
        );
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

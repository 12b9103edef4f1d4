//! The names that a node uses in Redis.
//!
//! | name | what |
//! |---|---|
//! | `<prefix>room:<room>` | the topic of a room |
//! | `<prefix>tidegate:canary:<node>:<connection>` | a pub/sub connection's messages to itself |
//!
//! The prefix is the configuration's, empty by default.

use std::{
    io::{self, Write},
    sync::Arc,
};

use redis::{RedisWrite, ToRedisArgs};

use crate::RoomName;

/// Makes topics. Cloning shares the prefix.
#[derive(Clone, Debug)]
pub(super) struct Topics {
    prefix: Arc<str>,
}

impl Topics {
    /// The longest prefix, in bytes: a topic then stays well below what the reader accepts.
    pub(super) const MAX_PREFIX: usize = 256;

    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: Arc::from(prefix) }
    }

    /// The topic of `room`.
    pub(super) fn room(&self, room: &RoomName) -> Arc<[u8]> {
        [self.prefix.as_bytes(), ROOM, room.as_str().as_bytes()].concat().into()
    }

    /// The topic of `room` as a command's argument, written without an allocation.
    pub(super) fn argument<'a>(&'a self, room: &'a RoomName) -> TopicArgument<'a> {
        TopicArgument { prefix: &self.prefix, room }
    }

    /// Where connection `index` of the node `node` sends messages to itself.
    pub(super) fn canary(&self, node: u128, index: usize) -> Arc<[u8]> {
        format!("{}tidegate:canary:{node:032x}:{index}", self.prefix).into_bytes().into()
    }
}

/// See [`Topics::argument`].
#[derive(Clone, Copy, Debug)]
pub(super) struct TopicArgument<'a> {
    prefix: &'a str,
    room: &'a RoomName,
}

impl ToRedisArgs for TopicArgument<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        write_parts(out, [self.prefix.as_bytes(), ROOM, self.room.as_str().as_bytes()]);
    }
}

/// Writes one argument in parts.
pub(super) fn write_parts<'a, W: ?Sized + RedisWrite>(
    out: &mut W,
    parts: impl IntoIterator<Item = &'a [u8]>,
) {
    let mut argument = out.writer_for_next_arg();
    let written: io::Result<()> = parts.into_iter().try_for_each(|part| argument.write_all(part));
    written.expect("a command is written to memory");
}

const ROOM: &[u8] = b"room:";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_the_documented_ones() {
        let room = RoomName::new("chat:été").unwrap();
        for (prefix, topic) in [("", "room:chat:été"), ("prod/", "prod/room:chat:été")] {
            let topics = Topics::new(prefix);
            assert_eq!(&*topics.room(&room), topic.as_bytes());
            assert_eq!(topics.argument(&room).to_redis_args(), [topic.as_bytes()]);
        }
        let canary = Topics::new("p:").canary(10, 3);
        assert_eq!(&*canary, b"p:tidegate:canary:0000000000000000000000000000000a:3");
    }
}

//! One publication on its way to the sessions of this node.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use broker_bridge::{Publication, RoomName, SessionId};
use bytes::Bytes;

use crate::protocol::WireFormat;

/// A publication with the bytes it has been encoded to, shared by all shards that have members.
///
/// Each wire format is encoded at most once per node, by the first shard that needs it, and kept as long
/// as the broadcast lasts.
#[derive(Debug)]
pub struct Broadcast {
    room: RoomName,
    publication: Publication,
    received: Instant,
    frames: [OnceLock<Bytes>; WireFormat::COUNT],
    /// Shards that have still to write it.
    pending: AtomicUsize,
}

impl Broadcast {
    /// A publication that `shards` shards are going to write.
    pub fn new(room: RoomName, publication: Publication, shards: usize) -> Self {
        Self {
            room,
            publication,
            received: Instant::now(),
            frames: [const { OnceLock::new() }; WireFormat::COUNT],
            pending: AtomicUsize::new(shards),
        }
    }

    /// Where it was published.
    pub fn room(&self) -> &RoomName {
        &self.room
    }

    /// The session that must not hear it.
    pub fn exclude(&self) -> Option<SessionId> {
        self.publication.exclude
    }

    /// The payload's size in bytes.
    pub fn payload_len(&self) -> usize {
        self.publication.data.bytes().len()
    }

    /// What members with this format are sent.
    #[expect(clippy::indexing_slicing, reason = "the array has one place per format")]
    pub fn frame(&self, format: WireFormat) -> &Bytes {
        self.frames[format as usize].get_or_init(|| format.encode(&self.room, &self.publication))
    }

    /// One shard has handed all its writes to the kernel. Returns the age of the broadcast if it was the
    /// last one.
    pub fn written(&self) -> Option<Duration> {
        (self.pending.fetch_sub(1, Ordering::AcqRel) == 1).then(|| self.received.elapsed())
    }
}

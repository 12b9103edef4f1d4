//! One publication on its way to the sessions of this node.

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use broker_bridge::{Publication, RoomName, SessionId};
use bytes::Bytes;

use super::{Cache, Encoding};
use crate::{
    budget::{Budget, Consumer, Held},
    websocket,
};

/// What a broadcast counts beside its payload, in bytes.
const OVERHEAD: usize = 256;

/// A publication with the bytes it has been encoded to, shared by all shards that have members.
///
/// Each encoding is made at most once per node, by the first shard that needs it, and kept as long as the
/// broadcast lasts.
#[derive(Debug)]
pub struct Broadcast {
    room: RoomName,
    publication: Publication,
    received: Instant,
    frames: Cache,
    /// Shards that have still to write it.
    pending: AtomicUsize,
    /// Its payload, in the node's budget. Its frames are counted on their own: they outlive it.
    held: Option<Held>,
}

impl Broadcast {
    /// A publication that `shards` shards are going to write.
    pub fn new(room: RoomName, publication: Publication, shards: usize) -> Self {
        Self {
            room,
            publication,
            received: Instant::now(),
            frames: Cache::default(),
            pending: AtomicUsize::new(shards),
            held: None,
        }
    }

    /// Counts what it holds, for as long as anybody holds it.
    #[must_use]
    pub fn counted(mut self, budget: &Arc<Budget>) -> Self {
        self.held = Some(budget.hold(Consumer::Inbox, self.cost()));
        self
    }

    /// Where it was published.
    pub fn room(&self) -> &RoomName {
        &self.room
    }

    /// The session that must not hear it.
    pub fn exclude(&self) -> Option<SessionId> {
        self.publication.exclude
    }

    /// What it counts against a mailbox's capacity: its payload, and about what it and its encoded heads take.
    pub fn cost(&self) -> usize {
        self.payload_len() + OVERHEAD
    }

    /// The payload's size in bytes.
    pub fn payload_len(&self) -> usize {
        self.publication.data.bytes().len()
    }

    /// What members with this encoding are sent, as far as they share it. Nothing below `threshold` bytes of payload
    /// is compressed.
    pub fn frame(&self, encoding: Encoding, threshold: usize) -> Cow<'_, Bytes> {
        let Some(deflate) = encoding.deflate() else {
            return self
                .frames
                .get_or_make(encoding, || self.share(encoding.encode(&self.room, &self.publication)));
        };
        if let Some(frame) = self.frames.get(encoding) {
            return Cow::Borrowed(frame);
        }
        let frame = self.frame(encoding.uncompressed(), threshold);
        if self.payload_len() < threshold {
            return frame;
        }
        self.frames.get_or_make(encoding, || self.share(websocket::compressed(&frame, deflate)))
    }

    /// A frame that was made of it, counted for as long as anybody holds it.
    pub fn share(&self, frame: Bytes) -> Bytes {
        match &self.held {
            Some(held) => held.budget().share(frame),
            None => frame,
        }
    }

    /// One shard has handed all its writes to the kernel. Returns the age of the broadcast if it was the
    /// last one.
    pub fn written(&self) -> Option<Duration> {
        (self.pending.fetch_sub(1, Ordering::AcqRel) == 1).then(|| self.received.elapsed())
    }
}

//! A publication on its way to the sessions of this node.

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use broker_bridge::{Cursor, Publication, RoomName, SessionId};
use bytes::Bytes;
use smallvec::SmallVec;

use super::{Cache, Encoding};
use crate::{
    budget::{Budget, Consumer, Held},
    websocket,
};

/// The fixed cost of a broadcast besides its payload, in bytes.
const OVERHEAD: usize = 256;

/// A publication with its encoded bytes, shared by all shards that have members.
///
/// Each encoding is created at most once per node, by the first shard that needs it, and kept as long as the
/// broadcast.
#[derive(Debug)]
pub struct Broadcast {
    room: RoomName,
    /// Where the shards have the room.
    places: Places,
    publication: Publication,
    /// Its position in the room's log, if it is recorded.
    cursor: Option<Cursor>,
    /// Its number among the items of a room with a history, otherwise 0.
    number: AtomicU64,
    /// When the node received it.
    received: Option<Instant>,
    frames: Cache,
    /// How many shards have not written it yet.
    pending: AtomicUsize,
    /// Its payload in the node's budget. Frames are counted separately, because they outlive it.
    held: Option<Held>,
}

/// Where each shard has a room; 0 if it has not told.
pub type Places = SmallVec<[u64; 4]>;

impl Broadcast {
    /// A publication that `shards` shards will write.
    pub fn new(room: RoomName, publication: Publication, shards: usize) -> Self {
        Self {
            room,
            places: Places::default(),
            publication,
            cursor: None,
            number: AtomicU64::new(0),
            received: None,
            frames: Cache::default(),
            pending: AtomicUsize::new(shards),
            held: None,
        }
    }

    /// Sets where the shards have the room.
    #[must_use]
    pub fn at(self, places: Places) -> Self {
        Self { places, ..self }
    }

    /// Where this shard has the room, if it has told: a hint, since the room may have moved since.
    pub fn place(&self, shard: usize) -> u64 {
        self.places.get(shard).copied().unwrap_or_default()
    }

    /// Sets its position in the room's log, if it is recorded.
    #[must_use]
    pub fn recorded_at(self, cursor: Option<Cursor>) -> Self {
        Self { cursor, ..self }
    }

    /// Sets its number. To be called before it is posted.
    pub fn set_number(&self, number: u64) {
        self.number.store(number, Ordering::Relaxed);
    }

    /// Its number among the items of a room with a history; otherwise 0.
    pub fn number(&self) -> u64 {
        self.number.load(Ordering::Relaxed)
    }

    /// Sets how many shards will write it. To be called before it is posted.
    pub fn set_pending(&self, shards: usize) {
        self.pending.store(shards, Ordering::Relaxed);
    }

    /// Sets when the node received it.
    #[must_use]
    pub fn received_at(self, now: Instant) -> Self {
        Self { received: Some(now), ..self }
    }

    /// Counts what it holds in the budget, for as long as it is held.
    #[must_use]
    pub fn counted(mut self, budget: &Arc<Budget>, consumer: Consumer) -> Self {
        self.held = Some(budget.hold(consumer, self.cost()));
        self
    }

    /// The same for members of `shards` shards. What is encoded for them is not kept for longer than they need it,
    /// unlike this broadcast, which a history keeps.
    #[must_use]
    pub fn to_deliver(&self, shards: usize) -> Self {
        Self { pending: AtomicUsize::new(shards), ..self.with_payload_counted_elsewhere() }
    }

    /// Whether it has been encoded.
    pub fn has_frames(&self) -> bool {
        !self.frames.is_empty()
    }

    /// The same, as if it had not been encoded.
    #[must_use]
    pub fn without_frames(&self) -> Self {
        let held = self.held.as_ref().map(|held| held.budget().hold(Consumer::History, self.cost()));
        Self { held, ..self.with_payload_counted_elsewhere() }
    }

    fn with_payload_counted_elsewhere(&self) -> Self {
        Self {
            room: self.room.clone(),
            places: self.places.clone(),
            publication: self.publication.clone(),
            cursor: self.cursor,
            number: AtomicU64::new(self.number()),
            received: self.received,
            frames: Cache::default(),
            pending: AtomicUsize::new(0),
            held: self.held.as_ref().map(|held| held.budget().hold(Consumer::Inbox, OVERHEAD)),
        }
    }

    /// The room that it was published to.
    pub fn room(&self) -> &RoomName {
        &self.room
    }

    /// What was published.
    pub fn publication(&self) -> &Publication {
        &self.publication
    }

    /// Its position in the room's log, if it is recorded.
    pub fn cursor(&self) -> Option<Cursor> {
        self.cursor
    }

    /// The session that must not receive it.
    pub fn exclude(&self) -> Option<SessionId> {
        self.publication.exclude
    }

    /// What it counts against a mailbox's capacity: its payload, and an estimate for itself and its encoded
    /// heads.
    pub fn cost(&self) -> usize {
        self.payload_len() + OVERHEAD
    }

    /// The payload's size in bytes.
    pub fn payload_len(&self) -> usize {
        self.publication.data.bytes().len()
    }

    /// The bytes that members with this encoding share. Payloads shorter than `threshold` bytes are not
    /// compressed.
    pub fn frame(&self, encoding: Encoding, threshold: usize) -> Cow<'_, Bytes> {
        let Some(deflate) = encoding.deflate() else {
            return self.frames.get_or_make(encoding, || {
                self.share(encoding.encode(&self.room, &self.publication, self.cursor))
            });
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

    /// Counts a frame derived from it in the budget, for as long as the frame is held.
    pub fn share(&self, frame: Bytes) -> Bytes {
        match &self.held {
            Some(held) => held.budget().share(frame),
            None => frame,
        }
    }

    /// Records that one shard has handed all its writes to the kernel. If this was the last shard, returns
    /// when the node had received the broadcast.
    pub fn written(&self) -> Option<Instant> {
        (self.pending.fetch_sub(1, Ordering::AcqRel) == 1).then_some(self.received).flatten()
    }
}

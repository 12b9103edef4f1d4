//! A session's queue of outgoing bytes.
//!
//! Owns the order of the queued frames, the bound of the queue, and which frames may be dropped for newer
//! ones. Does not know what frames contain, nor how a session reports a gap.
//!
//! # Cost
//!
//! Every operation takes constant time, whatever the length of the queue: a slow client must not slow down
//! its shard. The frames form a doubly linked list in a slab, so frames can be removed from the middle.
//! [`Outbound::barrier`] remembers where a priority frame goes. An index finds the oldest frame of a room. It
//! is built by one walk through the queue when a room's frames are first dropped, and kept until the queue is
//! empty. Most queues never need one.

use std::{collections::HashMap, io::IoSlice, num::NonZeroU32};

use bytes::Bytes;
use slab::Slab;

use crate::framing::Frame;

/// Frames that wait for their socket, bounded in bytes.
///
/// Frames are shared with all other members of the room; the queue holds only handles. An empty queue keeps
/// at most a few handles' worth of memory, and none after [`Outbound::release`]. Each frame counts
/// [`Outbound::PER_FRAME`] against the bound besides its bytes: replies to a flood of empty pings are two
/// bytes each on the wire and thirty times that in memory.
///
/// A frame that has been partly written is never moved or dropped, because the peer must receive whole
/// frames.
#[derive(Debug, Default)]
pub struct Outbound {
    frames: Slab<Queued>,
    first: Option<Place>,
    last: Option<Place>,
    /// The last frame that priority publications do not overtake. They go directly behind it.
    barrier: Option<Place>,
    /// Whether the first frame has been partly written.
    head_started: bool,
    bytes: usize,
    /// What only this session holds: everything except publications.
    own: Own,
    /// The frames of each room, once any had to be dropped.
    rooms: Option<Box<Rooms>>,
}

#[derive(Debug)]
struct Queued {
    bytes: Frame,
    lane: Lane,
    previous: Option<Place>,
    next: Option<Place>,
    /// The next publication of the same room. Maintained only while there is an index.
    next_of_room: Option<Place>,
}

/// The slab key of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place(NonZeroU32);

/// The queued frames of a room: its oldest and newest publications, and its newest gap notice.
#[derive(Debug, Default)]
struct Waiting {
    oldest: Option<Place>,
    newest: Option<Place>,
    gap: Option<Place>,
}

type Rooms = HashMap<RoomTag, Waiting, foldhash::fast::RandomState>;

/// Identifies a room within a shard, for as long as it has members there.
pub type RoomTag = NonZeroU32;

/// How publications of a room are queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoomLane {
    /// The room.
    pub room: RoomTag,
    /// Whether its publications overtake those of rooms without priority.
    pub priority: bool,
}

/// The kind of a frame; decides what may overtake it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// A reply, a notice or a close frame. Later frames may depend on it, so nothing overtakes it.
    Session,
    /// A heartbeat. Its position does not matter.
    Heartbeat,
    /// Publications of a room.
    Room(RoomLane),
    /// A notice that publications of the room are missing at this position.
    Gap(RoomLane),
}

/// The frames that no other session holds.
#[derive(Clone, Copy, Debug, Default)]
struct Own {
    frames: usize,
    bytes: usize,
}

/// The queue has no room for another frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

/// How many slots an empty queue keeps. A queue that was longer frees its memory when it becomes empty.
const KEPT: usize = 64;
/// How many frames from either end are searched for a publication.
const NEAR: usize = 8;

impl Outbound {
    /// What a frame costs besides its bytes: its entry here, and an allocation if it is not shared.
    pub const PER_FRAME: usize = 64;
    /// The most frames written with one system call.
    pub const BATCH: usize = 64;

    /// Queues a frame if the queue then costs at most `limit` bytes. An empty queue accepts one frame of any
    /// size.
    pub fn push(&mut self, frame: impl Into<Frame>, lane: Lane, limit: usize) -> Result<(), Full> {
        let frame = frame.into();
        if !self.fits(frame.len(), limit) {
            return Err(Full);
        }
        self.place(frame, lane);
        Ok(())
    }

    /// Queues a frame regardless of the bound: the final message of a session.
    pub fn push_last(&mut self, frame: impl Into<Frame>) {
        self.place(frame.into(), Lane::Session);
    }

    /// Queues the rest of a frame that the kernel has partly taken. The queue must be empty.
    pub fn push_started(&mut self, frame: Frame, written: usize, lane: Lane) {
        debug_assert!(self.is_empty(), "a frame was begun behind others");
        self.place(frame, lane);
        self.advance(written);
    }

    /// Queues a frame of a room and drops older publications of the same room: as many of the oldest as
    /// needed, or `all` of them. Puts `notice` in place of the first one dropped. Returns how many were
    /// dropped.
    pub fn push_over(
        &mut self,
        frame: impl Into<Frame>,
        lane: RoomLane,
        limit: usize,
        all: bool,
        mut notice: Option<Bytes>,
    ) -> Result<usize, Full> {
        let frame = frame.into();
        let noticed = notice.as_ref().map_or(0, |notice| notice.len() + Self::PER_FRAME);
        let mut dropped = 0;
        while all || self.cost_with(frame.len()) + notice.as_ref().map_or(0, |_| noticed) > limit {
            let Some(oldest) = self.oldest_of(lane.room) else { break };
            if let Some(notice) = notice.take() {
                let ahead = self.frame(oldest).previous;
                self.link(notice.into(), Lane::Gap(lane), ahead);
            }
            self.unlink(oldest);
            dropped += 1;
        }
        self.push(frame, Lane::Room(lane), limit).map(|()| dropped)
    }

    /// Whether a frame of this length fits without dropping others.
    pub fn fits(&self, length: usize, limit: usize) -> bool {
        self.is_empty() || self.cost_with(length) <= limit
    }

    /// Whether any queued publications of the room may be dropped.
    pub fn may_drop(&mut self, room: RoomTag) -> bool {
        self.oldest_of(room).is_some()
    }

    /// Whether a gap notice for the room is queued. All queued publications of the room are behind it.
    pub fn has_gap_notice(&mut self, room: RoomTag) -> bool {
        let gap = self.rooms().get(&room).and_then(|waiting| waiting.gap);
        gap.is_some() && gap != self.started()
    }

    /// Lets nothing queued later overtake what is queued now. To be called when rooms gain or lose priority:
    /// the queued frames were ordered by the old rules, and a room must not overtake itself.
    pub fn seal(&mut self) {
        self.barrier = self.last;
    }

    /// Drops all frames except a partly written one.
    pub fn clear(&mut self) {
        let started = self.started().map(|head| self.frames.remove(head.key()));
        self.discard();
        if let Some(Queued { bytes, lane, .. }) = started {
            self.place(bytes, lane);
            self.head_started = true;
        }
    }

    /// Drops everything.
    pub fn discard(&mut self) {
        *self = Self::default();
    }

    /// The queued bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// What counts against the bound: the bytes, and [`Outbound::PER_FRAME`] for each frame.
    pub fn cost(&self) -> usize {
        self.bytes + self.frames.len() * Self::PER_FRAME
    }

    /// The part of the cost that only this session holds: without the bytes of publications.
    pub fn held(&self) -> usize {
        self.own.bytes + self.frames.len() * Self::PER_FRAME
    }

    /// The bytes of publications, which other sessions may hold too.
    pub fn shared(&self) -> usize {
        self.bytes - self.own.bytes
    }

    /// The oldest and the newest queued publication, each identified by the address where its frame ends in
    /// memory, which is the same in all queues that hold it. `None` if there is none near the ends.
    pub fn ends(&self) -> Option<[usize; 2]> {
        let end = |frame: Option<&Queued>| frame.map(|frame| frame.bytes.end_address());
        let publication = |frame: &&Queued| frame.lane.is_shared();
        let last = self.last.map(|last| self.frame(last));
        let mut back = std::iter::successors(last, |frame| frame.previous.map(|place| self.frame(place)));
        let first = end(self.iter().take(NEAR).find(publication));
        let last = end(back.by_ref().take(NEAR).find(publication));
        Some([first.or(last)?, last.or(first)?])
    }

    /// The cost of everything except publications: replies, notices, heartbeats.
    pub fn replies(&self) -> usize {
        self.own.bytes + self.own.frames * Self::PER_FRAME
    }

    /// Whether nothing is queued.
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The bytes of the only frame, if there is exactly one and it is in one piece.
    pub fn only(&self) -> Option<&[u8]> {
        let only = self.first.filter(|_| self.first == self.last)?;
        match self.frame(only).bytes.pieces() {
            [bytes, []] => Some(bytes),
            _ => None,
        }
    }

    /// Points `slices` at the first bytes in the queue and returns how many slices it used.
    pub fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>; Self::BATCH]) -> usize {
        let mut used = 0;
        let pieces = self.iter().flat_map(|frame| frame.bytes.pieces()).filter(|piece| !piece.is_empty());
        for (slice, piece) in slices.iter_mut().zip(pieces) {
            *slice = IoSlice::new(piece);
            used += 1;
        }
        used
    }

    /// Removes the first `written` bytes, which the kernel has taken. Returns whether they included the end
    /// of a heartbeat.
    pub fn advance(&mut self, mut written: usize) -> bool {
        debug_assert!(written <= self.bytes, "the kernel took more than there was");
        let mut heartbeat = false;
        while let Some(first) = self.first {
            let head = self.frame_mut(first);
            if written < head.bytes.len() {
                let own = head.own_len();
                head.bytes.advance(written);
                let own = own - head.own_len();
                self.own.bytes -= own;
                self.bytes = self.bytes.saturating_sub(written);
                self.head_started |= written > 0;
                return heartbeat;
            }
            written -= head.bytes.len();
            heartbeat |= self.unlink(first).lane == Lane::Heartbeat;
        }
        heartbeat
    }

    /// Takes out the rest of the first frame.
    pub fn pop(&mut self) -> Option<Bytes> {
        self.first.map(|first| self.unlink(first).bytes.into_bytes())
    }

    /// Frees unused memory.
    pub fn release(&mut self) {
        if self.is_empty() {
            self.frames = Slab::new();
        }
    }

    fn place(&mut self, frame: Frame, lane: Lane) {
        if frame.is_empty() {
            return;
        }
        let ahead = match lane {
            Lane::Room(own) if own.priority => self.barrier.or(self.started()),
            _ => self.last,
        };
        let place = self.link(frame, lane, ahead);
        if lane.stops_priority() {
            self.barrier = Some(place);
        }
    }

    /// Inserts a frame behind another one, or at the front.
    fn link(&mut self, bytes: Frame, lane: Lane, ahead: Option<Place>) -> Place {
        let next = ahead.map_or(self.first, |ahead| self.frame(ahead).next);
        let frame = Queued { bytes, lane, previous: ahead, next, next_of_room: None };
        self.bytes += frame.bytes.len();
        self.own.frames += usize::from(!lane.is_shared());
        self.own.bytes += frame.own_len();
        let place = Place::of(self.frames.insert(frame));
        match ahead {
            Some(ahead) => self.frame_mut(ahead).next = Some(place),
            None => self.first = Some(place),
        }
        match next {
            Some(next) => self.frame_mut(next).previous = Some(place),
            None => self.last = Some(place),
        }
        if let Some(rooms) = &mut self.rooms {
            enter(rooms, &mut self.frames, place, lane);
        }
        place
    }

    /// Removes a frame: the first in the queue, or the oldest of its room.
    fn unlink(&mut self, place: Place) -> Queued {
        let frame = self.frames.remove(place.key());
        self.bytes -= frame.bytes.len();
        self.own.frames -= usize::from(!frame.lane.is_shared());
        self.own.bytes -= frame.own_len();
        if let Some(previous) = frame.previous {
            self.frame_mut(previous).next = frame.next;
        } else {
            self.first = frame.next;
            self.head_started = false;
        }
        match frame.next {
            Some(next) => self.frame_mut(next).previous = frame.previous,
            None => self.last = frame.previous,
        }
        if self.barrier == Some(place) {
            // Priority frames are contiguous, directly behind the one that they must not overtake.
            self.barrier = frame.previous;
        }
        if self.is_empty() {
            self.rooms = None;
            if self.frames.capacity() > KEPT {
                self.frames = Slab::new();
            }
        } else if let Some(rooms) = &mut self.rooms {
            exit(rooms, &mut self.frames, place, &frame);
        }
        frame
    }

    /// The oldest publication of a room that may be dropped.
    fn oldest_of(&mut self, room: RoomTag) -> Option<Place> {
        let oldest = self.rooms().get(&room)?.oldest?;
        if Some(oldest) == self.started() { self.frame(oldest).next_of_room } else { Some(oldest) }
    }

    /// The index, built if there is none.
    fn rooms(&mut self) -> &Rooms {
        self.rooms.get_or_insert_with(|| {
            let mut rooms = Box::<Rooms>::default();
            let mut next = self.first;
            while let Some((place, frame)) =
                next.and_then(|place| Some((place, self.frames.get(place.key())?)))
            {
                next = frame.next;
                let lane = frame.lane;
                enter(&mut rooms, &mut self.frames, place, lane);
            }
            rooms
        })
    }

    /// The first frame, if it has been partly written.
    fn started(&self) -> Option<Place> {
        self.first.filter(|_| self.head_started)
    }

    fn iter(&self) -> impl Iterator<Item = &Queued> {
        let first = self.first.map(|first| self.frame(first));
        std::iter::successors(first, |frame| frame.next.map(|next| self.frame(next)))
    }

    fn frame(&self, place: Place) -> &Queued {
        self.frames.get(place.key()).expect("links refer to queued frames")
    }

    fn frame_mut(&mut self, place: Place) -> &mut Queued {
        self.frames.get_mut(place.key()).expect("links refer to queued frames")
    }

    /// What the queue costs with another frame of this length.
    fn cost_with(&self, length: usize) -> usize {
        self.bytes + length + (self.frames.len() + 1) * Self::PER_FRAME
    }
}

/// Adds a frame to the index. It is behind all other frames of its room.
fn enter(rooms: &mut Rooms, frames: &mut Slab<Queued>, place: Place, lane: Lane) {
    match lane {
        Lane::Session | Lane::Heartbeat => {}
        Lane::Gap(RoomLane { room, .. }) => rooms.entry(room).or_default().gap = Some(place),
        Lane::Room(RoomLane { room, .. }) => {
            let waiting = rooms.entry(room).or_default();
            match waiting.newest.replace(place).and_then(|newest| frames.get_mut(newest.key())) {
                Some(newest) => newest.next_of_room = Some(place),
                None => waiting.oldest = Some(place),
            }
        }
    }
}

/// Removes a frame from the index: a notice, or the oldest publication of its room that may be dropped.
fn exit(rooms: &mut Rooms, frames: &mut Slab<Queued>, place: Place, frame: &Queued) {
    let (Lane::Room(RoomLane { room, .. }) | Lane::Gap(RoomLane { room, .. })) = frame.lane else { return };
    let Some(waiting) = rooms.get_mut(&room) else { return };
    if matches!(frame.lane, Lane::Gap(_)) {
        waiting.gap.take_if(|gap| *gap == place);
    } else if waiting.oldest == Some(place) {
        waiting.oldest = frame.next_of_room;
        waiting.newest.take_if(|_| frame.next_of_room.is_none());
    } else if let Some(head) = waiting.oldest.and_then(|oldest| frames.get_mut(oldest.key())) {
        // The oldest has been partly written and stays; the removed frame was the one behind it.
        head.next_of_room = frame.next_of_room;
        if frame.next_of_room.is_none() {
            waiting.newest = waiting.oldest;
        }
    }
    if waiting.oldest.is_none() && waiting.gap.is_none() {
        rooms.remove(&room);
    }
}

impl Place {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the queue's bound allows far fewer frames than 2^32"
    )]
    fn of(key: usize) -> Self {
        Self(NonZeroU32::MIN.saturating_add(key as u32))
    }

    fn key(self) -> usize {
        self.0.get() as usize - 1
    }
}

impl Queued {
    /// How many of its bytes are in no other session's queue.
    fn own_len(&self) -> usize {
        if self.lane.is_shared() { self.bytes.private_len() } else { self.bytes.len() }
    }
}

impl Lane {
    /// Whether a frame may be in other sessions' queues too.
    fn is_shared(self) -> bool {
        matches!(self, Self::Room(_))
    }

    /// Whether priority publications stay behind it.
    fn stops_priority(self) -> bool {
        match self {
            Self::Session => true,
            Self::Heartbeat => false,
            Self::Room(lane) | Self::Gap(lane) => lane.priority,
        }
    }
}

#[cfg(test)]
mod tests;

//! What takes more than a moment to be told.
//!
//! A publication in a room with more members than a slice is a round: its members are served slice by slice, and
//! between two slices the shard looks at its sockets, its inbox and the other rounds. Another room's message waits for
//! a slice, however large this room is. A gap is a round in any room: after an interruption all rooms of a node are
//! told of one at once, and a room that is back must not wait for all others. What comes for a room in the meantime
//! waits here, in order, and then goes out together.
//!
//! Owns what is said to whom next. Who is a member, and how far among them a round has come, is known to
//! [`Rooms`](super::rooms::Rooms), since members come and go between two slices.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use broker_bridge::{GapCause, RoomName};

use super::batch::Batch;
use crate::hub::Broadcast;

/// Members that are served before others get their turn.
pub const SLICE: usize = 256;
/// Rounds whose places are kept when there are none any more.
const KEPT: usize = 1024;

/// The rounds under way. What waits in them counts as being in the inbox and is bounded there.
#[derive(Default)]
pub struct Rounds {
    rounds: HashMap<RoomName, Round, foldhash::fast::RandomState>,
    /// Whose turn it is: each room of the map once.
    order: VecDeque<RoomName>,
}

/// What a room is being told, and what it is to be told next.
pub struct Round {
    pub step: Step,
    waiting: VecDeque<Waiting>,
}

/// Something that all members of a room are told.
#[derive(Debug)]
pub enum Step {
    /// Publications that arrived together. Boxed, since gaps are what comes by the thousand.
    Publications(Box<Batch>),
    /// That publications may be missing just here.
    Gap(GapCause),
}

/// Something that a room will be told.
#[derive(Debug)]
pub enum Waiting {
    Publication(Arc<Broadcast>),
    Gap(GapCause),
}

impl Rounds {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The round of this room.
    pub fn get_mut(&mut self, room: &RoomName) -> Option<&mut Round> {
        self.rounds.get_mut(room)
    }

    /// Begins a round in a room that has none.
    pub fn begin(&mut self, room: &RoomName, step: Step) {
        let before = self.rounds.insert(room.clone(), Round { step, waiting: VecDeque::new() });
        debug_assert!(before.is_none(), "two rounds in one room");
        self.order.push_back(room.clone());
    }

    /// Takes out the round whose turn it is, until it is [put back](Self::put_back).
    pub fn take(&mut self) -> Option<(RoomName, Round)> {
        let Some(room) = self.order.pop_front() else {
            if self.order.capacity() > KEPT {
                *self = Self::default();
            }
            return None;
        };
        self.rounds.remove_entry(&room)
    }

    /// Goes on with a round when all others have had their turn.
    pub fn put_back(&mut self, room: RoomName, round: Round) {
        self.order.push_back(room.clone());
        self.rounds.insert(room, round);
    }
}

impl Round {
    /// Says this, too, when everything before it is said.
    pub fn wait(&mut self, what: Waiting) {
        self.waiting.push_back(what);
    }

    /// Takes what the room is told next: one gap, or as many publications as may be put together.
    pub fn next(&mut self) -> Option<Step> {
        if let Some(&Waiting::Gap(cause)) = self.waiting.front() {
            self.waiting.pop_front();
            return Some(Step::Gap(cause));
        }
        let mut batch = Batch::default();
        while let Some(Waiting::Publication(next)) = self.waiting.front()
            && batch.takes(next)
        {
            batch.push(Arc::clone(next));
            self.waiting.pop_front();
        }
        (batch.len() > 0).then(|| Step::Publications(Box::new(batch)))
    }
}

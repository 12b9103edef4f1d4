//! What takes more than a moment to be told.
//!
//! A publication in a room with more members than a slice is a round: its members are served slice by slice, and
//! between two slices the shard looks at its sockets, its inbox and the other rounds. Another room's message waits for
//! a slice, however large this room is. A gap is a round in any room: after an interruption all rooms of a node are
//! told of one at once, and a room that is back must not wait for all others. What comes for a room in the meantime
//! waits here, in order, and then goes out together.
//!
//! Who joins while a round is under way is not in it: a client that answers a gap by subscribing again would be told of
//! the same gap again, and one that left and came back would be sent a publication twice. So whatever is said in a room
//! by rounds has a number, and a membership keeps the number of the first that is said to it. Numbers only grow, for as
//! long as the shard lives.
//!
//! Owns what is said to whom next. Who is a member, and how far among them a round has come, is known to
//! [`Rooms`](super::rooms::Rooms), since members come and go between two slices.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use broker_bridge::{GapCause, RoomName};

use super::batch::Batch;
use crate::framing::Broadcast;

/// Members that are served before others get their turn; where each of a batch's publications is queued by itself, such
/// deliveries.
pub const SLICE: usize = 256;
/// Rounds whose places are kept when there are none any more.
const KEPT: usize = 1024;

/// The rounds under way. What waits in them counts as being in the inbox and is bounded there.
#[derive(Default)]
pub struct Rounds {
    by_room: HashMap<RoomName, Round, foldhash::fast::RandomState>,
    /// Whose turn it is: each room of the map once.
    order: VecDeque<RoomName>,
    /// No round that has ended has reached this number.
    next: u64,
}

/// What a room is being told, and what it is to be told next.
pub struct Round {
    pub step: Step,
    /// The number of the first thing that the step says.
    number: u64,
    /// How many things it says.
    length: u64,
    waiting: VecDeque<Waiting>,
    /// The latest that somebody who joined during the round is told from.
    joined: u64,
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
        self.by_room.get_mut(room)
    }

    /// Begins a round in a room that has none.
    pub fn begin(&mut self, room: &RoomName, step: Step) {
        let length = step.length();
        let round = Round { step, number: self.next, length, waiting: VecDeque::new(), joined: 0 };
        let before = self.by_room.insert(room.clone(), round);
        debug_assert!(before.is_none(), "two rounds in one room");
        self.order.push_back(room.clone());
    }

    /// Takes out the round whose turn it is, until it is [put back](Self::put_back).
    pub fn take(&mut self) -> Option<(RoomName, Round)> {
        let Some(room) = self.order.pop_front() else {
            if self.order.capacity() > KEPT {
                *self = Self { next: self.next, ..Self::default() };
            }
            return None;
        };
        self.by_room.remove_entry(&room)
    }

    /// Goes on with a round when all others have had their turn.
    pub fn put_back(&mut self, room: RoomName, round: Round) {
        self.order.push_back(room.clone());
        self.by_room.insert(room, round);
    }

    /// A round has come to its end.
    pub fn end(&mut self, round: &Round) {
        self.next = self.next.max(round.after());
    }

    /// The number of the first thing that is said to who joins `room` now.
    pub fn join(&mut self, room: &RoomName) -> u64 {
        let Some(round) = self.by_room.get_mut(room) else { return 0 };
        round.joined = round.after();
        round.joined
    }
}

impl Round {
    /// Says this, too, when everything before it is said.
    pub fn wait(&mut self, what: Waiting) {
        if let (Waiting::Gap(cause), Some(Waiting::Gap(last))) = (&what, self.waiting.back())
            && cause == last
            && self.joined < self.after()
        {
            return; // All who would be told of this one are about to be told of that one.
        }
        self.waiting.push_back(what);
    }

    /// Whether the step is not meant for all members, or not all of it.
    pub fn has_newcomers(&self) -> bool {
        self.joined > self.number
    }

    /// How many of the things that the step says come before number `since`.
    pub fn said_before(&self, since: u64) -> usize {
        usize::try_from(since.saturating_sub(self.number)).unwrap_or(usize::MAX)
    }

    /// The number of what would be said next.
    fn after(&self) -> u64 {
        self.number + self.length + self.waiting.len() as u64
    }

    /// Goes on to what the room is told next: one gap, or as many publications as may be put together. Returns false
    /// if there is nothing.
    pub fn advance(&mut self) -> bool {
        let Some(next) = self.next() else { return false };
        self.number += self.length;
        self.length = next.length();
        self.step = next;
        true
    }

    fn next(&mut self) -> Option<Step> {
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

impl Step {
    /// How many things it says.
    fn length(&self) -> u64 {
        match self {
            Self::Publications(batch) => batch.len() as u64,
            Self::Gap(_) => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use broker_bridge::{Data, Publication};

    use super::*;

    fn room() -> RoomName {
        RoomName::new("lobby").unwrap()
    }

    fn publication() -> Arc<Broadcast> {
        Arc::new(Broadcast::new(room(), Publication::new(Data::text("hi")), 1))
    }

    fn publications(count: usize) -> Step {
        let mut batch = Batch::default();
        (0..count).for_each(|_| batch.push(publication()));
        Step::Publications(Box::new(batch))
    }

    #[test]
    fn who_joins_is_told_what_comes_next_and_nothing_before() {
        let mut rounds = Rounds::default();
        assert_eq!(rounds.join(&room()), 0, "without a round");
        for _ in 0..2 {
            rounds.begin(&room(), publications(2));
            let first = rounds.join(&room());
            let round = rounds.get_mut(&room()).unwrap();
            assert_eq!((round.said_before(0), round.said_before(first)), (0, 2));
            round.wait(Waiting::Publication(publication()));
            let second = rounds.join(&room());
            let (room, mut round) = rounds.take().unwrap();
            round.wait(Waiting::Publication(publication()));
            assert!(round.has_newcomers());
            assert!(round.advance());
            // The two that waited go out together: the first to one, the second to both.
            assert_eq!(
                (round.said_before(0), round.said_before(first), round.said_before(second)),
                (0, 0, 1)
            );
            round.wait(Waiting::Gap(GapCause::Interrupted));
            assert!(round.advance());
            assert!(!round.has_newcomers());
            assert!(!round.advance());
            rounds.end(&round);
            // In a round that comes later, both are members like any other.
            rounds.begin(&room, Step::Gap(GapCause::Overflow));
            let (_, round) = rounds.take().unwrap();
            assert_eq!((round.said_before(first), round.said_before(second)), (0, 0));
            assert!(!round.has_newcomers());
            rounds.end(&round);
        }
    }

    #[test]
    fn gaps_that_follow_each_other_are_one_unless_somebody_came_between() {
        let mut rounds = Rounds::default();
        rounds.begin(&room(), Step::Gap(GapCause::Interrupted));
        let waiting = |rounds: &mut Rounds| {
            let round = rounds.get_mut(&room()).unwrap();
            round.wait(Waiting::Gap(GapCause::Interrupted));
            round.waiting.len()
        };
        // Who has been told in the round under way may have subscribed again since.
        assert_eq!([waiting(&mut rounds), waiting(&mut rounds)], [1, 1]);
        rounds.join(&room());
        assert_eq!([waiting(&mut rounds), waiting(&mut rounds)], [2, 2]);
        let round = rounds.get_mut(&room()).unwrap();
        round.wait(Waiting::Gap(GapCause::Overflow));
        round.wait(Waiting::Publication(publication()));
        round.wait(Waiting::Gap(GapCause::Overflow));
        assert_eq!(round.waiting.len(), 5);
    }
}

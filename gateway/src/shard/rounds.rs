//! Deliveries that take more than one turn.
//!
//! A publication in a room with more members than a slice becomes a round. The members are served slice by
//! slice; between two slices the shard polls its sockets, its inbox and the other rounds. So other rooms wait
//! for one slice at most, however large this room is. A gap is a round in any room: after an interruption all
//! rooms of a node get one at once, and rooms that have recovered must not wait for all the others. Messages
//! that arrive for a room during its round wait here, in order, and then go out together.
//!
//! A member that joins during a round does not take part in it. Otherwise a client that answers a gap by
//! resubscribing would receive the same gap again, and one that left and rejoined would receive a publication
//! twice. So each message delivered in a round has a number, and a membership stores the number of the first
//! message that it receives. Numbers only grow, for the lifetime of the shard.
//!
//! Owns what is delivered next to which room. [`Rooms`](super::rooms::Rooms) knows the members and how far a
//! round has come among them, because members join and leave between two slices.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use broker_bridge::{GapCause, RoomName};

use super::batch::Batch;
use crate::framing::Broadcast;

/// How many members are served before other work gets its turn, counted in deliveries where each publication
/// of a batch is queued by itself.
pub const SLICE: usize = 256;
/// How many rounds' capacity is kept when there are none.
const KEPT: usize = 1024;

/// The rounds in progress. Messages that wait in them count against the inbox and are bounded there.
#[derive(Default)]
pub struct Rounds {
    by_room: HashMap<RoomName, Round, foldhash::fast::RandomState>,
    /// The rooms in turn, each exactly once.
    order: VecDeque<RoomName>,
    /// All finished rounds have only used numbers below this.
    next: u64,
}

/// What is being delivered to a room, and what follows.
pub struct Round {
    pub step: Step,
    /// The number of the first message in the step.
    number: u64,
    /// How many messages are in the step.
    length: u64,
    waiting: VecDeque<Waiting>,
    /// The highest starting number of a member that joined during the round.
    joined: u64,
}

/// What all members of a room receive next.
#[derive(Debug)]
pub enum Step {
    /// Publications that arrived together. Boxed, because gaps come by the thousand and should stay small.
    Publications(Box<Batch>),
    /// A notice that publications may be missing at this point, with its number in a room with a history.
    Gap(GapCause, u64),
    /// Broadcasts did not fit into the inbox: members that have not received `first` and should have `last` get them
    /// from the room's history.
    Overflow { first: u64, last: u64 },
    /// The positions have another epoch from the item with this number on.
    NewEpoch(u64),
}

/// A message that waits for its step.
#[derive(Debug)]
pub enum Waiting {
    Publication(Arc<Broadcast>),
    Gap(GapCause, u64),
    Overflow { first: u64, last: u64 },
    NewEpoch(u64),
}

impl Rounds {
    /// Whether no round is in progress.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The round in this room, if any.
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

    /// Continues a round after all others have had their turn.
    pub fn put_back(&mut self, room: RoomName, round: Round) {
        self.order.push_back(room.clone());
        self.by_room.insert(room, round);
    }

    /// Ends a round.
    pub fn end(&mut self, round: &Round) {
        self.next = self.next.max(round.after());
    }

    /// The number of the first message for a member that joins `room` now.
    pub fn join(&mut self, room: &RoomName) -> u64 {
        let Some(round) = self.by_room.get_mut(room) else { return 0 };
        round.joined = round.after();
        round.joined
    }
}

impl Round {
    /// Adds a message to be delivered after all before it.
    pub fn wait(&mut self, what: Waiting) {
        let newcomers = self.joined >= self.after();
        if let (Waiting::Gap(cause, number), Some(Waiting::Gap(last, before))) =
            (&what, self.waiting.back_mut())
            && cause == last
            && !newcomers
        {
            *before = *number;
            return; // All members that would get this gap are about to get that one.
        }
        if let (Waiting::Overflow { last, .. }, Some(Waiting::Overflow { last: before, .. })) =
            (&what, self.waiting.back_mut())
            && !newcomers
        {
            *before = *last;
            return; // Nothing was delivered in between.
        }
        self.waiting.push_back(what);
    }

    /// Whether members have joined that must not receive the step, or not all of it.
    pub fn has_newcomers(&self) -> bool {
        self.joined > self.number
    }

    /// How many messages of the step come before number `since`.
    pub fn count_before(&self, since: u64) -> usize {
        usize::try_from(since.saturating_sub(self.number)).unwrap_or(usize::MAX)
    }

    /// The number that the next message gets.
    fn after(&self) -> u64 {
        self.number + self.length + self.waiting.len() as u64
    }

    /// Advances to the next step: one gap, or as many publications as one batch takes. Returns false if
    /// nothing is waiting.
    pub fn advance(&mut self, outbound: usize) -> bool {
        let Some(next) = self.next(outbound) else { return false };
        self.number += self.length;
        self.length = next.length();
        self.step = next;
        true
    }

    fn next(&mut self, outbound: usize) -> Option<Step> {
        let notice = match self.waiting.front() {
            Some(&Waiting::Gap(cause, number)) => Some(Step::Gap(cause, number)),
            Some(&Waiting::Overflow { first, last }) => Some(Step::Overflow { first, last }),
            Some(&Waiting::NewEpoch(number)) => Some(Step::NewEpoch(number)),
            _ => None,
        };
        if notice.is_some() {
            self.waiting.pop_front();
            return notice;
        }
        let mut batch = Batch::default();
        while let Some(Waiting::Publication(next)) = self.waiting.front()
            && batch.takes(next, outbound)
        {
            batch.push(Arc::clone(next));
            self.waiting.pop_front();
        }
        (batch.len() > 0).then(|| Step::Publications(Box::new(batch)))
    }
}

impl Step {
    /// How many messages are in it.
    fn length(&self) -> u64 {
        match self {
            Self::Publications(batch) => batch.len() as u64,
            Self::Gap(..) | Self::Overflow { .. } | Self::NewEpoch(_) => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use broker_bridge::{Data, Publication};

    use super::*;

    /// What a queue may hold.
    const OUTBOUND: usize = 1024 * 1024;

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
    fn new_members_receive_later_messages_and_none_before() {
        let mut rounds = Rounds::default();
        assert_eq!(rounds.join(&room()), 0, "without a round");
        for _ in 0..2 {
            rounds.begin(&room(), publications(2));
            let first = rounds.join(&room());
            let round = rounds.get_mut(&room()).unwrap();
            assert_eq!((round.count_before(0), round.count_before(first)), (0, 2));
            round.wait(Waiting::Publication(publication()));
            let second = rounds.join(&room());
            let (room, mut round) = rounds.take().unwrap();
            round.wait(Waiting::Publication(publication()));
            assert!(round.has_newcomers());
            assert!(round.advance(OUTBOUND));
            // The two waiting publications go out together: the first of them to one member, the second to
            // both.
            assert_eq!(
                (round.count_before(0), round.count_before(first), round.count_before(second)),
                (0, 0, 1)
            );
            round.wait(Waiting::Gap(GapCause::Interrupted, 0));
            assert!(round.advance(OUTBOUND));
            assert!(!round.has_newcomers());
            assert!(!round.advance(OUTBOUND));
            rounds.end(&round);
            // In a later round, both are ordinary members.
            rounds.begin(&room, Step::Gap(GapCause::Overflow, 0));
            let (_, round) = rounds.take().unwrap();
            assert_eq!((round.count_before(first), round.count_before(second)), (0, 0));
            assert!(!round.has_newcomers());
            rounds.end(&round);
        }
    }

    #[test]
    fn consecutive_gaps_merge_unless_a_member_joined_between() {
        let mut rounds = Rounds::default();
        rounds.begin(&room(), Step::Gap(GapCause::Interrupted, 0));
        let waiting = |rounds: &mut Rounds| {
            let round = rounds.get_mut(&room()).unwrap();
            round.wait(Waiting::Gap(GapCause::Interrupted, 0));
            round.waiting.len()
        };
        // A member that has received the gap of this round may have resubscribed since.
        assert_eq!([waiting(&mut rounds), waiting(&mut rounds)], [1, 1]);
        rounds.join(&room());
        assert_eq!([waiting(&mut rounds), waiting(&mut rounds)], [2, 2]);
        let round = rounds.get_mut(&room()).unwrap();
        round.wait(Waiting::Gap(GapCause::Overflow, 0));
        round.wait(Waiting::Publication(publication()));
        round.wait(Waiting::Gap(GapCause::Overflow, 0));
        assert_eq!(round.waiting.len(), 5);
    }
}

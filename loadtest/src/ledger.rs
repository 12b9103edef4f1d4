//! Accounts for every delivery.
//!
//! Owns the counts of a run: delivered, missing, duplicated, out of order. In the common case (the next
//! message arrives) recording is one comparison and one add; only a member that has missed a message uses
//! memory for it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The accounts of one run: one room, numbered messages, numbered members.
#[derive(Debug)]
pub struct Ledger {
    members: Vec<Member>,
    published: u64,
    alive: u64,
    /// Deliveries outstanding until all connected members have everything published.
    awaited: u64,
    counts: Counts,
}

/// The counts of a run so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Messages published times members: what should have been delivered.
    pub expected: u64,
    /// Distinct (member, message) pairs that arrived.
    pub delivered: u64,
    /// Expected but not arrived, including everything published after a member's connection was lost.
    pub missing: u64,
    /// Arrivals of a message that the same member already had.
    pub duplicated: u64,
    /// First arrivals of a message after a later one had arrived at the same member.
    pub out_of_order: u64,
    /// Arrivals that match no message of this run: altered, truncated, or published by others.
    pub foreign: u64,
    /// Members whose connection ended during the run.
    pub members_lost: u64,
}

#[derive(Debug, Default)]
struct Member {
    account: Account,
    /// Distinct messages seen.
    seen: u64,
    lost: bool,
}

/// One client's account of one publisher's messages.
#[derive(Debug, Default)]
pub struct Account {
    /// One more than the highest sequence seen.
    next: u64,
    /// Sequences below `next` that have not arrived, ascending and disjoint.
    holes: Vec<Range<u64>>,
}

/// The kind of an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// New, and nothing later had arrived before it.
    InOrder,
    /// New, but something later had arrived before it.
    Late,
    /// Had arrived before.
    Duplicate,
    /// Never published.
    Foreign,
}

impl Ledger {
    /// Empty accounts for `members` members.
    pub fn new(members: usize) -> Self {
        Self {
            members: std::iter::repeat_with(Member::default).take(members).collect(),
            published: 0,
            alive: members as u64,
            awaited: 0,
            counts: Counts::default(),
        }
    }

    /// The number of messages published so far, which is the sequence of the next one.
    pub fn published(&self) -> u64 {
        self.published
    }

    /// Records that `count` further messages are about to be published.
    pub fn publish(&mut self, count: u64) {
        self.published += count;
        self.awaited += count * self.alive;
    }

    /// Whether nothing is outstanding: all connected members have everything, or it was [given
    /// up](Self::give_up).
    pub fn is_settled(&self) -> bool {
        self.awaited == 0
    }

    /// Stops waiting for outstanding deliveries. The counts do not change: what never arrives is missing,
    /// what arrives later is delivered.
    pub fn give_up(&mut self) {
        self.awaited = 0;
    }

    /// Records that `member` has received message `sequence`.
    pub fn record(&mut self, member: usize, sequence: u64) -> Arrival {
        let known = sequence < self.published;
        let Some(member) = self.members.get_mut(member).filter(|_| known) else {
            return self.record_foreign();
        };
        let arrival = member.account.record(sequence);
        match arrival {
            Arrival::InOrder => {}
            Arrival::Late => self.counts.out_of_order += 1,
            Arrival::Duplicate | Arrival::Foreign => {
                self.counts.duplicated += 1;
                return arrival;
            }
        }
        member.seen += 1;
        self.counts.delivered += 1;
        // After `give_up` a late arrival may be counted as an awaited delivery. That can only shorten a wait
        // in a run that has already lost time to a stall; no count depends on it.
        self.awaited = self.awaited.saturating_sub(1);
        arrival
    }

    /// Records an arrival that carries no stamp of this run.
    pub fn record_foreign(&mut self) -> Arrival {
        self.counts.foreign += 1;
        Arrival::Foreign
    }

    /// Records that the connection of `member` has ended; nothing more is awaited from it.
    pub fn lose(&mut self, member: usize) {
        if let Some(member) = self.members.get_mut(member).filter(|member| !member.lost) {
            member.lost = true;
            self.counts.members_lost += 1;
            self.alive -= 1;
            self.awaited = self.awaited.saturating_sub(self.published - member.seen);
        }
    }

    /// The current counts.
    pub fn counts(&self) -> Counts {
        let expected = self.published * self.members.len() as u64;
        Counts { expected, missing: expected - self.counts.delivered, ..self.counts }
    }
}

impl Counts {
    /// The difference to `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            expected: self.expected - earlier.expected,
            delivered: self.delivered - earlier.delivered,
            // A message that was missing then may have arrived since.
            missing: self.missing.saturating_sub(earlier.missing),
            duplicated: self.duplicated - earlier.duplicated,
            out_of_order: self.out_of_order - earlier.out_of_order,
            foreign: self.foreign - earlier.foreign,
            members_lost: self.members_lost - earlier.members_lost,
        }
    }
}

impl Account {
    /// The account of a client that has just joined, whose first message may be any.
    pub fn visitor() -> Self {
        Self { next: u64::MAX, holes: Vec::new() }
    }

    /// How many messages before the latest arrival have not arrived.
    pub fn missing(&self) -> u64 {
        self.holes.iter().map(|hole| hole.end - hole.start).sum()
    }

    /// One more than the highest message that has arrived.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The messages before the latest arrival that have not arrived.
    pub fn holes(&self) -> &[Range<u64>] {
        &self.holes
    }

    /// Awaits no message before `sequence` any more; returns how many that are.
    pub fn skip_to(&mut self, sequence: u64) -> u64 {
        let skipped = sequence.saturating_sub(self.next);
        self.next = self.next.max(sequence);
        skipped
    }

    /// Records that message `sequence` has arrived.
    pub fn record(&mut self, sequence: u64) -> Arrival {
        if self.next == u64::MAX {
            self.next = sequence;
        }
        if sequence >= self.next {
            if sequence > self.next {
                self.holes.push(self.next..sequence);
            }
            self.next = sequence + 1;
            return Arrival::InOrder;
        }
        let at = self.holes.partition_point(|hole| hole.end <= sequence);
        let Some(hole) = self.holes.get_mut(at).filter(|hole| hole.contains(&sequence)) else {
            return Arrival::Duplicate;
        };
        let (before, after) = (hole.start..sequence, sequence + 1..hole.end);
        match (before.is_empty(), after.is_empty()) {
            (true, true) => drop(self.holes.remove(at)),
            (true, false) => *hole = after,
            (false, true) => *hole = before,
            (false, false) => {
                *hole = before;
                self.holes.insert(at + 1, after);
            }
        }
        Arrival::Late
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_visitor_misses_only_messages_between_its_first_and_last() {
        let mut account = Account::visitor();
        let arrivals = [7, 9, 6, 9, 8].map(|sequence| account.record(sequence));
        // Messages before its first one may have been sent before it joined: a 6 after it proves nothing.
        let expected =
            [Arrival::InOrder, Arrival::InOrder, Arrival::Duplicate, Arrival::Duplicate, Arrival::Late];
        assert_eq!((arrivals, account.missing()), (expected, 0));
        account.record(20);
        assert_eq!(account.missing(), 10);
    }

    #[test]
    fn a_clean_run_misses_nothing() {
        let mut ledger = Ledger::new(2);
        ledger.publish(3);
        assert!(!ledger.is_settled());
        for member in 0..2 {
            for sequence in 0..3 {
                assert_eq!(ledger.record(member, sequence), Arrival::InOrder);
            }
        }
        assert!(ledger.is_settled());
        assert_eq!(ledger.counts(), Counts { expected: 6, delivered: 6, ..Counts::default() });
    }

    #[test]
    fn a_lost_member_is_not_awaited_but_counts_as_missing() {
        let mut ledger = Ledger::new(2);
        ledger.publish(2);
        ledger.record(0, 0);
        ledger.record(0, 1);
        ledger.record(1, 0);
        assert!(!ledger.is_settled());
        ledger.lose(1);
        ledger.lose(1);
        assert!(ledger.is_settled());
        ledger.publish(1);
        ledger.record(0, 2);
        assert!(ledger.is_settled());
        let expected = Counts { expected: 6, delivered: 4, missing: 2, members_lost: 1, ..Counts::default() };
        assert_eq!(ledger.counts(), expected);
    }

    #[test]
    fn deliveries_that_were_given_up_may_still_arrive() {
        let mut ledger = Ledger::new(1);
        ledger.publish(2);
        ledger.record(0, 1);
        ledger.give_up();
        assert!(ledger.is_settled());
        assert_eq!(ledger.counts().missing, 1);
        assert_eq!(ledger.record(0, 0), Arrival::Late);
        assert_eq!(ledger.record(0, 2), Arrival::Foreign);
        let expected = Counts { expected: 2, delivered: 2, out_of_order: 1, foreign: 1, ..Counts::default() };
        assert_eq!(ledger.counts(), expected);
    }

    proptest! {
        /// Checks the counts of random arrivals against a definition with sets.
        #[test]
        fn counts_are_exact(arrivals in prop::collection::vec((0_usize..3, 0_u64..40), 0..300)) {
            let mut ledger = Ledger::new(3);
            ledger.publish(40);
            let mut seen = vec![HashSet::new(); 3];
            let mut expected = Counts { expected: 120, ..Counts::default() };
            for (member, sequence) in arrivals {
                let later = seen[member].iter().any(|&other| other > sequence);
                let arrival = ledger.record(member, sequence);
                if seen[member].insert(sequence) {
                    expected.delivered += 1;
                    expected.out_of_order += u64::from(later);
                    prop_assert_eq!(arrival, if later { Arrival::Late } else { Arrival::InOrder });
                } else {
                    expected.duplicated += 1;
                    prop_assert_eq!(arrival, Arrival::Duplicate);
                }
            }
            expected.missing = expected.expected - expected.delivered;
            prop_assert_eq!(ledger.counts(), expected);
        }
    }
}

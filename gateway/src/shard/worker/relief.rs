//! What a shard does when the node holds more for its clients than it may: it closes its fullest sessions.
//!
//! A shard keeps a list of the connections that held something when they were last looked at, so that nobody goes
//! through those that are idle. The list is gone through when memory is short, and when it has doubled.
//!
//! # Who is the fullest
//!
//! To close a session frees what nobody else holds. Publications wait in many queues at once and are in memory once
//! ([`Budget::share`](crate::budget::Budget::share)), so each session is taken to hold its part of them
//! ([`Crowd`]): a crowd that does not keep up with one room must not go before one session that fills its own.

use std::{
    collections::{BinaryHeap, HashMap},
    rc::Rc,
};

use super::Worker;
use crate::shard::connection::{Connection, ConnectionKey, NOTABLE};

/// Connections of this shard that hold something, or did.
#[derive(Default)]
pub struct Holders {
    keys: Vec<ConnectionKey>,
    /// At this many the list is cleaned.
    clean_at: usize,
}

/// The list is not cleaned before it has so many entries.
const FEW: usize = 256;
/// Sessions that are closed in one turn at most. Each may be in hundreds of rooms, which it leaves at once.
const CLOSED_PER_TURN: usize = 64;

/// In how many queues publications wait. Of each queue only the oldest and the newest are looked at: what lies between
/// them has mostly been sent to the same sessions, and to look at all would take as long as a fan-out.
#[derive(Default)]
pub(super) struct Crowd(HashMap<usize, usize, foldhash::fast::RandomState>);

impl Crowd {
    /// Counts a queue that reaches from one publication to another.
    pub(super) fn add(&mut self, ends: [usize; 2]) {
        let [oldest, newest] = ends;
        *self.0.entry(oldest).or_default() += 1;
        if newest != oldest {
            *self.0.entry(newest).or_default() += 1;
        }
    }

    /// How many sessions hold what this queue holds, as far as can be told.
    pub(super) fn holders(&self, ends: [usize; 2]) -> usize {
        // The fewer: one publication that everybody is sent must not hide what a session holds alone.
        ends.iter().filter_map(|end| self.0.get(end)).min().copied().unwrap_or(1)
    }
}

impl Worker {
    /// The connection holds something, and did not before.
    pub fn note_holder(&self, key: ConnectionKey) {
        let full = {
            let mut holders = self.holders.borrow_mut();
            holders.keys.push(key);
            holders.keys.len() > holders.clean_at.max(FEW)
        };
        if full {
            let kept: Vec<_> = self.take_holders().into_iter().map(|(_, key)| key).collect();
            let mut holders = self.holders.borrow_mut();
            holders.clean_at = 2 * kept.len();
            holders.keys = kept;
        }
    }

    /// Closes some of the fullest sessions if the node holds more than it may, or, once this `goes_on` from the turn
    /// before, until it holds clearly less. Those of other shards come first while
    /// one there is more than twice as full as any here, unless that takes too long.
    /// Returns whether any was closed; there may be more to close then.
    pub(super) fn relieve(&self, goes_on: bool) -> bool {
        let budget = &self.context.budget;
        let must = if goes_on { budget.held() > budget.relieved() } else { budget.is_over() };
        if !must {
            return false;
        }
        let mut holders = BinaryHeap::from(self.take_holders());
        let own = holders.peek().map_or(0, |(bytes, _)| *bytes);
        let fullest = budget.note_fullest(self.index, own);
        let far_over = budget.held() > budget.limit() + budget.limit() / 8;
        let least = if far_over { 0 } else { fullest / 2 };
        let mut closed = 0_usize;
        while closed < CLOSED_PER_TURN
            && budget.held() > budget.relieved()
            && let Some(&(bytes, key)) = holders.peek()
            && bytes >= least
        {
            holders.pop();
            if let Some(connection) = self.connection(key) {
                connection.holds.set(false);
                tracing::debug!(session = %connection.id(), bytes, "the node is short of memory");
                connection.give_way(self);
                connection.note_holding(self);
                self.tally.settle_memory(budget);
                closed += 1;
            }
        }
        budget.note_fullest(self.index, holders.peek().map_or(0, |(bytes, _)| *bytes));
        self.holders.borrow_mut().keys.extend(holders.into_iter().map(|(_, key)| key));
        if closed > 0 {
            tracing::warn!(
                sessions = closed,
                held = budget.held(),
                limits.memory = budget.limit(),
                "the node holds more for its clients than it may; the fullest sessions are closed"
            );
        }
        closed > 0
    }

    /// While memory is short, the other shards are to know how full the fullest session here is.
    pub(super) fn note_fullest(&self) {
        let budget = &self.context.budget;
        if !budget.is_short() {
            return budget.forget_fullest(self.index);
        }
        let holders = self.take_holders();
        budget.note_fullest(self.index, holders.iter().map(|(bytes, _)| *bytes).max().unwrap_or_default());
        self.holders.borrow_mut().keys.extend(holders.into_iter().map(|(_, key)| key));
    }

    /// Empties the list. Returns who still holds something, and about how much it frees to close them.
    fn take_holders(&self) -> Vec<(usize, ConnectionKey)> {
        let keys = std::mem::take(&mut self.holders.borrow_mut().keys);
        let mut crowd = Crowd::default();
        let holding: Vec<Rc<Connection>> = keys
            .into_iter()
            .filter_map(|key| {
                let connection = self.connection(key)?;
                let holds = connection.fullness() >= NOTABLE;
                connection.holds.set(holds);
                holds.then_some(connection)
            })
            .collect();
        for (_, ends) in holding.iter().filter_map(|connection| connection.publications()) {
            crowd.add(ends);
        }
        let freed = |connection: Rc<Connection>| {
            let shared =
                connection.publications().map_or(0, |(bytes, ends)| bytes - bytes / crowd.holders(ends));
            (connection.fullness().saturating_sub(shared), connection.key())
        };
        holding.into_iter().map(freed).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_shares_what_a_loner_holds_alone() {
        let mut crowd = Crowd::default();
        // Three of one room, of whom one is further behind; one alone; one alone but for the newest.
        let queues = [[1, 9], [1, 9], [0, 9], [5, 6], [7, 9], [8, 8]];
        for ends in queues {
            crowd.add(ends);
        }
        assert_eq!(queues.map(|ends| crowd.holders(ends)), [2, 2, 1, 1, 1, 1]);
    }
}

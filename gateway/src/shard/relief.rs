//! How a shard frees memory when the node holds more for its clients than its limit: it closes its fullest
//! sessions.
//!
//! A shard keeps a list of the connections that held memory when last checked, so it never scans the idle
//! ones. The list is checked again when memory is short, and when it has doubled.
//!
//! # Which session is the fullest
//!
//! Closing a session frees what only it holds. A publication waits in many queues at once but is in memory
//! once ([`Budget::share`](crate::budget::Budget::share)), so each session counts only with its share of it
//! ([`QueueCounts`]): many sessions that are behind in one room must not be closed before one session that fills
//! its own queue.

use std::{
    collections::{BinaryHeap, HashMap},
    sync::Arc,
};

use super::{
    Core,
    connection::{ConnectionKey, NOTABLE},
    transport::Transport,
};

/// Connections of this shard that hold memory, or did when last checked.
#[derive(Default)]
pub struct Holders {
    keys: Vec<ConnectionKey>,
    /// The length at which the list is cleaned.
    clean_at: usize,
}

/// The list is not cleaned while it is shorter than this.
const FEW: usize = 256;
/// The most sessions closed in one turn. Each may be in hundreds of rooms, which it leaves at once.
const CLOSED_PER_TURN: usize = 64;

/// In how many queues each publication waits. Only the oldest and the newest of each queue are counted: those
/// in between have mostly gone to the same sessions, and counting all would take as long as a fan-out.
#[derive(Default)]
pub(super) struct QueueCounts(HashMap<usize, usize, foldhash::fast::RandomState>);

impl QueueCounts {
    /// Counts a queue by its oldest and its newest publication.
    pub(super) fn add(&mut self, ends: [usize; 2]) {
        let [oldest, newest] = ends;
        *self.0.entry(oldest).or_default() += 1;
        if newest != oldest {
            *self.0.entry(newest).or_default() += 1;
        }
    }

    /// How many sessions share the content of this queue, as far as can be told.
    pub(super) fn holders(&self, ends: [usize; 2]) -> usize {
        // Take the lower count: one publication to everybody must not hide what a session holds alone.
        ends.iter().filter_map(|end| self.0.get(end)).min().copied().unwrap_or(1)
    }
}

impl<T: Transport> Core<T> {
    /// Adds the connections that hold memory and did not before.
    pub(super) fn note_holders(&mut self) {
        self.holders.keys.append(&mut self.state.new_holders);
        if self.holders.keys.len() > self.holders.clean_at.max(FEW) {
            let kept: Vec<_> = self.take_holders().into_iter().map(|(_, key)| key).collect();
            self.holders = Holders { clean_at: 2 * kept.len(), keys: kept };
        }
    }

    /// Closes some of the fullest sessions if the node is over its memory limit. If `goes_on` (the previous
    /// turn closed some already), continues until the node is clearly below it. While another shard has a
    /// session more than twice as full as any here, that shard goes first, unless the node is far over its
    /// limit. Returns whether any was closed; there may be more to close then.
    pub(super) fn relieve(&mut self, goes_on: bool) -> bool {
        let budget = &self.state.context.budget;
        let must = if goes_on { budget.held() > budget.relieved() } else { budget.is_over() };
        if !must {
            return false;
        }
        let context = Arc::clone(&self.state.context);
        let budget = &context.budget;
        let mut holders = BinaryHeap::from(self.take_holders());
        let own = holders.peek().map_or(0, |(bytes, _)| *bytes);
        let fullest = budget.note_fullest(self.state.index, own);
        let far_over = budget.held() > budget.limit() + budget.limit() / 8;
        let least = if far_over { 0 } else { fullest / 2 };
        let mut closed = 0_usize;
        while closed < CLOSED_PER_TURN
            && budget.held() > budget.relieved()
            && let Some(&(bytes, key)) = holders.peek()
            && bytes >= least
        {
            holders.pop();
            if let Some(connection) = self.connections.get_mut(key) {
                connection.holds = false;
                tracing::debug!(session = %connection.id(), bytes, "closing a session to free memory");
                connection.free_memory(&mut self.state);
                connection.note_holding(&mut self.state);
                self.state.tally.settle_memory(budget);
                closed += 1;
            }
        }
        budget.note_fullest(self.state.index, holders.peek().map_or(0, |(bytes, _)| *bytes));
        self.holders.keys.extend(holders.into_iter().map(|(_, key)| key));
        if closed > 0 {
            tracing::warn!(
                sessions = closed,
                held = budget.held(),
                limits.memory = budget.limit(),
                "the node holds more for its clients than limits.memory; closed the fullest sessions"
            );
        }
        closed > 0
    }

    /// While memory is short, tells the other shards how full the fullest session here is.
    pub(super) fn note_fullest(&mut self) {
        if !self.state.context.budget.is_short() {
            return self.state.context.budget.forget_fullest(self.state.index);
        }
        let context = Arc::clone(&self.state.context);
        let budget = &context.budget;
        let holders = self.take_holders();
        let fullest = holders.iter().map(|(bytes, _)| *bytes).max().unwrap_or_default();
        budget.note_fullest(self.state.index, fullest);
        self.holders.keys.extend(holders.into_iter().map(|(_, key)| key));
    }

    /// Empties the list. Returns the connections that still hold memory, and about how much closing each
    /// would free.
    fn take_holders(&mut self) -> Vec<(usize, ConnectionKey)> {
        let mut keys = std::mem::take(&mut self.holders.keys);
        let mut counts = QueueCounts::default();
        keys.retain(|key| {
            let Some(connection) = self.connections.get_mut(*key) else { return false };
            connection.holds = connection.fullness() >= NOTABLE;
            if let Some((_, ends)) = connection.publications().filter(|_| connection.holds) {
                counts.add(ends);
            }
            connection.holds
        });
        let freed = |key| {
            let connection = self.connections.get(key)?;
            let shared =
                connection.publications().map_or(0, |(bytes, ends)| bytes - bytes / counts.holders(ends));
            Some((connection.fullness().saturating_sub(shared), key))
        };
        keys.into_iter().filter_map(freed).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_in_one_room_share_their_publications() {
        let mut counts = QueueCounts::default();
        // Three sessions in one room, one of them further behind; one alone; one alone except for the newest.
        let queues = [[1, 9], [1, 9], [0, 9], [5, 6], [7, 9], [8, 8]];
        for ends in queues {
            counts.add(ends);
        }
        assert_eq!(queues.map(|ends| counts.holders(ends)), [2, 2, 1, 1, 1, 1]);
    }
}

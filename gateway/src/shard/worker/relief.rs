//! What a shard does when the node holds more for its clients than it may: it closes its fullest sessions.
//!
//! A shard keeps a list of the connections that held something when they were last looked at, so that nobody goes
//! through those that are idle. The list is gone through when memory is short, and when it has doubled.

use std::collections::BinaryHeap;

use super::Worker;
use crate::shard::connection::{ConnectionKey, NOTABLE};

/// Connections of this shard that hold something, or did.
#[derive(Default)]
pub struct Holders {
    keys: Vec<ConnectionKey>,
    /// At this many the list is cleaned.
    clean_at: usize,
}

/// The list is not cleaned before it has so many entries.
const FEW: usize = 256;

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

    /// Closes the fullest sessions until the node holds no more than it may. Those of other shards come first while
    /// one there is more than twice as full as any here, unless that takes too long.
    /// Returns whether any was closed.
    pub(super) fn relieve(&self) -> bool {
        let budget = &self.context.budget;
        if !budget.is_over() {
            return false;
        }
        let mut holders = BinaryHeap::from(self.take_holders());
        let own = holders.peek().map_or(0, |(bytes, _)| *bytes);
        let fullest = budget.note_fullest(self.index, own);
        let far_over = budget.held() > budget.limit() + budget.limit() / 8;
        let least = if far_over { 0 } else { fullest / 2 };
        let mut closed = 0_usize;
        while budget.held() > budget.relieved()
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
            return;
        }
        let holders = self.take_holders();
        budget.note_fullest(self.index, holders.iter().map(|(bytes, _)| *bytes).max().unwrap_or_default());
        self.holders.borrow_mut().keys.extend(holders.into_iter().map(|(_, key)| key));
    }

    /// Empties the list. Returns who still holds something, and how much.
    fn take_holders(&self) -> Vec<(usize, ConnectionKey)> {
        let keys = std::mem::take(&mut self.holders.borrow_mut().keys);
        let holding = keys.into_iter().filter_map(|key| {
            let connection = self.connection(key)?;
            let bytes = connection.fullness();
            connection.holds.set(bytes >= NOTABLE);
            (bytes >= NOTABLE).then_some((bytes, key))
        });
        holding.collect()
    }
}

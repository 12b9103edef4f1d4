//! Coarse deadlines for many connections at once.

use std::{cmp::Ordering, collections::BinaryHeap};

use crate::clock::Tick;

/// Keys by the tick at which they are due. Entries are never removed early: the owner ignores an entry that
/// no longer matters when it comes up.
///
/// All entries are in one block of memory, so a heartbeat neither allocates nor frees. The block shrinks with
/// the number of entries once most of it is unused.
#[derive(Debug)]
pub struct Timers<K> {
    due: BinaryHeap<Due<K>>,
}

/// An entry; the greatest is due first.
#[derive(Debug)]
struct Due<K> {
    at: Tick,
    key: K,
}

/// The capacity that is always kept.
const KEPT: usize = 1024;

impl<K> Default for Timers<K> {
    fn default() -> Self {
        Self { due: BinaryHeap::new() }
    }
}

impl<K> Timers<K> {
    /// Adds an entry that is due at `at`.
    pub fn set(&mut self, at: Tick, key: K) {
        self.due.push(Due { at, key });
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.due.len()
    }

    /// Removes the entries that no longer matter. Visits every entry.
    pub fn retain(&mut self, matters: impl Fn(&K) -> bool) {
        self.due.retain(|due| matters(&due.key));
    }

    /// The next entry due at or before `now`, with the tick it was set for. Entries of the same tick come in
    /// no particular order.
    pub fn take_due(&mut self, now: Tick) -> Option<(Tick, K)> {
        if self.due.peek()?.at > now {
            return None;
        }
        let Due { at, key } = self.due.pop()?;
        // Shrink to half, to avoid growing and shrinking in turn.
        if self.due.capacity() > KEPT && self.due.len() < self.due.capacity() / 4 {
            self.due.shrink_to(self.due.capacity() / 2);
        }
        Some((at, key))
    }
}

impl<K> Ord for Due<K> {
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.cmp(&self.at)
    }
}

impl<K> PartialOrd for Due<K> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<K> PartialEq for Due<K> {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl<K> Eq for Due<K> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_up_once_and_in_order() {
        let mut timers = Timers::default();
        for (at, key) in [(5, 'b'), (3, 'a'), (7, 'c')] {
            timers.set(Tick(at), key);
        }
        assert_eq!(timers.take_due(Tick(2)), None);
        assert_eq!(timers.take_due(Tick(5)), Some((Tick(3), 'a')));
        assert_eq!(timers.take_due(Tick(5)), Some((Tick(5), 'b')));
        assert_eq!(timers.take_due(Tick(5)), None);
        assert_eq!(timers.take_due(Tick(9)), Some((Tick(7), 'c')));
        assert_eq!(timers.take_due(Tick(9)), None);
    }

    #[test]
    fn memory_of_a_peak_is_freed() {
        let mut timers = Timers::default();
        for at in 0..64 * 1024 {
            timers.set(Tick(at), at);
        }
        for at in 0..64 * 1024 {
            assert_eq!(timers.take_due(Tick(u32::MAX)), Some((Tick(at), at)));
        }
        assert!(timers.due.capacity() <= 2 * KEPT, "{} places", timers.due.capacity());
    }
}

//! Counts of open connections by key.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    hash::BuildHasher as _,
    sync::Arc,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use super::keyed::Key;
use crate::shrink;

const STRIPES: usize = 16;

/// Counts by key. Only keys with something open are stored, so the open connections bound their number.
pub struct Crowd<K> {
    stripes: [Mutex<HashMap<K, u32, RandomState>>; STRIPES],
    hasher: RandomState,
}

/// A counted entry; dropping it removes it from the count.
pub struct Permit<K: Key> {
    crowd: Arc<Crowd<K>>,
    key: K,
}

impl<K> Default for Crowd<K> {
    fn default() -> Self {
        Self { stripes: std::array::from_fn(|_| Mutex::default()), hasher: RandomState::default() }
    }
}

impl<K: Key> Crowd<K> {
    /// Counts one more of `key`, unless there are already `most`.
    pub fn enter(self: &Arc<Self>, key: K, most: usize) -> Option<Permit<K>> {
        let mut counts = self.stripe(&key).lock();
        let count = counts.get(&key).copied().unwrap_or(0);
        if count as usize >= most {
            return None;
        }
        counts.insert(key.clone(), count + 1);
        Some(Permit { crowd: Arc::clone(self), key })
    }

    /// Frees memory that an earlier peak needed.
    pub fn sweep(&self) {
        for stripe in &self.stripes {
            shrink::map(&mut *stripe.lock());
        }
    }

    /// The number of keys with something open.
    pub fn len(&self) -> usize {
        self.stripes.iter().map(|stripe| stripe.lock().len()).sum()
    }

    /// Whether nothing is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn leave(&self, key: &K) {
        let mut counts = self.stripe(key).lock();
        if let Entry::Occupied(mut entry) = counts.entry(key.clone()) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }

    #[expect(clippy::indexing_slicing, reason = "a remainder of the array's length")]
    #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
    fn stripe(&self, key: &K) -> &Mutex<HashMap<K, u32, RandomState>> {
        &self.stripes[self.hasher.hash_one(key) as usize % STRIPES]
    }
}

impl<K: Key> Drop for Permit<K> {
    fn drop(&mut self) {
        self.crowd.leave(&self.key);
    }
}

impl<K: Key> fmt::Debug for Permit<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_bounded_and_end_with_their_permits() {
        let crowd = Arc::new(Crowd::default());
        let mut alices: Vec<_> = (0..3).map_while(|_| crowd.enter("alice", 3)).collect();
        assert_eq!(alices.len(), 3);
        assert!(crowd.enter("alice", 3).is_none());
        let bob = crowd.enter("bob", 3);
        assert!(bob.is_some());
        alices.pop();
        alices.extend(crowd.enter("alice", 3));
        assert_eq!((alices.len(), crowd.len()), (3, 2));
        drop((alices, bob));
        assert!(crowd.is_empty());
    }

    #[test]
    fn memory_of_a_peak_is_freed() {
        let crowd = Arc::new(Crowd::default());
        let permits: Vec<_> = (0..100_000).map(|key| crowd.enter(key, 1).unwrap()).collect();
        assert_eq!(crowd.len(), 100_000);
        drop(permits);
        crowd.sweep();
        let capacity: usize = crowd.stripes.iter().map(|stripe| stripe.lock().capacity()).sum();
        assert!(crowd.is_empty() && capacity <= STRIPES * 64, "memory for {capacity} is kept");
    }
}

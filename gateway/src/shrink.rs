//! How long-lived containers free memory after a peak.
//!
//! Call these after removing an entry. They keep twice the space in use, so a container does not grow and
//! shrink repeatedly, and the cost per removal is constant on average.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, Hash},
};

use smallvec::{Array, SmallVec};

/// The capacity that is always kept.
const KEPT: usize = 64;

/// Frees a map's unused memory if less than a quarter is in use.
pub fn map<K: Eq + Hash, V, S: BuildHasher>(map: &mut HashMap<K, V, S>) {
    if is_mostly_empty(map.len(), map.capacity()) {
        map.shrink_to(map.len() * 2);
    }
}

/// Frees a queue's unused memory, likewise.
pub fn queue<T>(queue: &mut VecDeque<T>) {
    if is_mostly_empty(queue.len(), queue.capacity()) {
        queue.shrink_to(queue.len() * 2);
    }
}

/// Frees a list's unused memory, likewise.
pub fn list<A: Array>(list: &mut SmallVec<A>) {
    if is_mostly_empty(list.len(), list.capacity()) {
        // Despite its name, this sets the capacity.
        list.grow(list.len() * 2);
    }
}

fn is_mostly_empty(len: usize, capacity: usize) -> bool {
    capacity > KEPT && len < capacity / 4
}

#[cfg(test)]
mod tests {
    use super::*;

    const CROWD: usize = 10_000;

    /// Removes the entries one by one and checks the capacity each time.
    fn check<C>(
        mut crowd: C,
        remove: impl Fn(&mut C),
        shrink: impl Fn(&mut C),
        size: impl Fn(&C) -> (usize, usize),
    ) {
        assert_eq!(size(&crowd).0, CROWD);
        for left in (0..CROWD).rev() {
            remove(&mut crowd);
            shrink(&mut crowd);
            let (len, capacity) = size(&crowd);
            assert_eq!(len, left);
            assert!(capacity <= KEPT.max(4 * len + 3), "{capacity} places for {len}");
        }
    }

    #[test]
    fn emptied_collections_release_their_memory() {
        check(
            (0..CROWD).map(|n| (n, n)).collect::<HashMap<_, _>>(),
            |crowd| {
                let key = *crowd.keys().next().unwrap();
                crowd.remove(&key);
            },
            map,
            |crowd| (crowd.len(), crowd.capacity()),
        );
        check(
            (0..CROWD).collect::<VecDeque<_>>(),
            |crowd| assert!(crowd.pop_front().is_some()),
            queue,
            |crowd| (crowd.len(), crowd.capacity()),
        );
        check(
            (0..CROWD).collect::<SmallVec<[_; 2]>>(),
            |crowd| assert!(crowd.pop().is_some()),
            list,
            |crowd| (crowd.len(), crowd.capacity()),
        );
    }
}

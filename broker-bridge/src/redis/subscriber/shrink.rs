//! How tables of rooms give memory back after a crowd.
//!
//! They keep twice the space that is in use, so that a table does not grow and shrink by turns, and the cost per
//! removal is constant on average.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
};

/// Places that are kept in any case.
const KEPT: usize = 64;

/// Frees a map's unused memory if less than a quarter is in use.
pub(super) fn map<K: Eq + Hash, V>(map: &mut HashMap<K, V>) {
    if map.capacity() > KEPT && map.len() < map.capacity() / 4 {
        map.shrink_to(map.len() * 2);
    }
}

/// Frees a queue's unused memory, likewise.
pub(super) fn queue<T>(queue: &mut VecDeque<T>) {
    if queue.capacity() > KEPT && queue.len() < queue.capacity() / 4 {
        queue.shrink_to(queue.len() * 2);
    }
}

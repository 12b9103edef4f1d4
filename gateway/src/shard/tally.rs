//! What a shard counts between two turns.
//!
//! The hot path uses plain cells. Each counter is added once per turn to the handles that all shards share.

use std::cell::Cell;

use prometheus::IntCounter;

use super::ShardMetrics;
use crate::{
    budget::{Budget, Consumer},
    traffic::Traffic,
};

/// Counts since the last [`Tally::settle`].
#[derive(Debug, Default)]
pub struct Tally {
    pub messages_in: Cell<u64>,
    pub payload_in: Cell<u64>,
    pub deliveries: Cell<u64>,
    pub payload_out: Cell<u64>,
    pub slow_consumers: Cell<u64>,
    pub dropped_oldest: Cell<u64>,
    pub dropped_for_latest: Cell<u64>,
    pub subscriptions: Cell<i64>,
    pub outbound_bytes: Cell<i64>,
    /// Memory held for sessions, by purpose.
    pub outbound_held: Cell<i64>,
    pub incomplete_held: Cell<i64>,
    pub publications_held: Cell<i64>,
}

impl Tally {
    /// Adds to a count.
    pub fn add(cell: &Cell<u64>, count: usize) {
        cell.set(cell.get() + count as u64);
    }

    /// Changes a level.
    pub fn shift(cell: &Cell<i64>, by: i64) {
        cell.set(cell.get() + by);
    }

    /// Moves the sessions' memory into the node's budget.
    pub fn settle_memory(&self, budget: &Budget) {
        budget.settle(Consumer::Outbound, self.outbound_held.take());
        budget.settle(Consumer::Incomplete, self.incomplete_held.take());
        budget.settle(Consumer::Publications, self.publications_held.take());
    }

    /// Moves all other counts into the node's metrics.
    pub fn settle(&self, traffic: &Traffic, metrics: &ShardMetrics) {
        add(&traffic.messages_in, self.messages_in.take());
        add(&traffic.payload_bytes_in, self.payload_in.take());
        let deliveries = self.deliveries.take();
        add(&metrics.deliveries, deliveries);
        add(&traffic.messages_out, deliveries);
        add(&traffic.payload_bytes_out, self.payload_out.take());
        add(&metrics.slow_consumers, self.slow_consumers.take());
        add(&metrics.dropped_oldest, self.dropped_oldest.take());
        add(&metrics.dropped_for_latest, self.dropped_for_latest.take());
        metrics.subscriptions.add(self.subscriptions.take());
        metrics.outbound_bytes.add(self.outbound_bytes.take());
    }
}

fn add(counter: &IntCounter, count: u64) {
    if count > 0 {
        counter.inc_by(count);
    }
}

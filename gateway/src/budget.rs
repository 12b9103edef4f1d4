//! The node's memory budget: how many bytes it may hold for its clients, and how many it holds.
//!
//! Counts the bytes (`tidegate_memory_held_bytes`) and decides whether more fit into `limits.memory`. The
//! callers act on it: shards close the fullest sessions, routes refuse bodies, and HTTP connections are cut
//! while they send a large head.
//!
//! # What counts
//!
//! Bytes on the heap because of what clients do or fail to do ([`Consumer`]). Not the cost of idle
//! connections, which `limits.connections` bounds, and not the broker's queue, which `broker.publish_queue`
//! bounds.
//!
//! A frame that waits for many sessions counts once, for as long as any of them holds it ([`Budget::share`]).
//! If many sessions fall behind in one room, they cost what they hold in memory, not that times their number.
//!
//! # Cost
//!
//! A delivery updates no counter here. Shards sum up their changes and settle them once per turn. A
//! publication costs one addition and one subtraction for each format that it is encoded in.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};

use crate::vocabulary::metrics::Label;

/// What holds memory for clients. The label of `tidegate_memory_held_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consumer {
    /// Frames that wait for a socket, and their queues.
    Outbound,
    /// Publications on their way from the broker to the shards.
    Inbox,
    /// Read buffers of HTTP connections, beyond the first few KiB.
    Heads,
    /// Bodies of unanswered requests.
    Bodies,
    /// Incomplete messages of sessions.
    Incomplete,
    /// Publications of sessions that wait for space in the broker's queue.
    Publications,
    /// Publications of rooms with a history, for those who come back.
    History,
}

impl Label for Consumer {
    const ALL: &'static [Self] = &[
        Self::Outbound,
        Self::Inbox,
        Self::Heads,
        Self::Bodies,
        Self::Incomplete,
        Self::Publications,
        Self::History,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbox => "inbox",
            Self::Heads => "heads",
            Self::Bodies => "bodies",
            Self::Incomplete => "incomplete",
            Self::Publications => "publications",
            Self::History => "history",
        }
    }
}

/// How much HTTP may buffer of one connection's request, in addition to the parsed request and beyond the
/// first few KiB that every connection has: hyper's buffer grows to this size and does not shrink.
pub const READ_BUFFER: usize = 56 * 1024;

/// The memory that the node holds for its clients, and its limit.
#[derive(Debug)]
pub struct Budget {
    held: Box<[IntGauge]>,
    /// `limits.memory`, in bytes.
    limit: IntGauge,
    /// How much the fullest session of each shard holds while memory is short; otherwise 0.
    fullest: Box<[AtomicUsize]>,
}

impl Budget {
    /// An empty budget for a node with this many shards. There is no limit until [`Budget::set_limit`].
    pub fn register(registry: &Registry, shards: usize) -> Result<Arc<Self>, prometheus::Error> {
        let held = IntGaugeVec::new(
            Opts::new(
                "tidegate_memory_held_bytes",
                "Memory that the node holds for its clients, by what it is held for; limits.memory bounds the sum.",
            ),
            &["consumer"],
        )?;
        registry.register(Box::new(held.clone()))?;
        let limit = IntGauge::new(
            "tidegate_memory_limit_bytes",
            "Memory that the node may hold for its clients: limits.memory.",
        )?;
        registry.register(Box::new(limit.clone()))?;
        limit.set(i64::MAX);
        Ok(Arc::new(Self {
            held: Consumer::ALL.iter().map(|consumer| held.with_label_values(&[consumer.as_str()])).collect(),
            limit,
            fullest: (0..shards).map(|_| AtomicUsize::new(0)).collect(),
        }))
    }

    /// Sets how many bytes may be held.
    pub fn set_limit(&self, bytes: usize) {
        self.limit.set(signed(bytes));
    }

    /// How many bytes may be held.
    pub fn limit(&self) -> usize {
        unsigned(self.limit.get())
    }

    /// How many bytes are held.
    pub fn held(&self) -> usize {
        // The sum may be negative for a moment: one shard may settle what it freed before another settles
        // what it took.
        unsigned(self.held.iter().map(IntGauge::get).sum())
    }

    /// How many bytes this consumer holds.
    pub fn held_by(&self, consumer: Consumer) -> usize {
        unsigned(self.gauge(consumer).get())
    }

    /// Whether more is held than the limit allows.
    pub fn is_over(&self) -> bool {
        self.held() > self.limit()
    }

    /// The target when sessions are closed because the budget is exceeded. It is a little below the limit, so
    /// that sessions are not searched again at once.
    pub fn relieved(&self) -> usize {
        self.limit() - self.limit() / 16
    }

    /// Whether requests may take this many bytes more. They may use half of the budget, but not its last
    /// eighth: what clients send must not cost clients that are only slow to read their sessions.
    pub fn admits(&self, bytes: usize) -> bool {
        let requests = self.held_by(Consumer::Heads) + self.held_by(Consumer::Bodies);
        self.held().saturating_add(bytes) <= self.limit() - self.limit() / 8
            && requests.saturating_add(bytes) <= self.limit() / 2
    }

    /// Whether memory is short or is about to be.
    pub fn is_short(&self) -> bool {
        self.held() > self.limit() - self.limit() / 8
    }

    /// Records that a shard has taken bytes, or freed them.
    pub fn settle(&self, consumer: Consumer, change: i64) {
        if change != 0 {
            self.gauge(consumer).add(change);
        }
    }

    /// Counts bytes until the returned value is dropped.
    pub fn hold(self: &Arc<Self>, consumer: Consumer, bytes: usize) -> Held {
        self.settle(consumer, signed(bytes));
        Held { budget: Arc::clone(self), consumer, bytes }
    }

    /// Counts a frame that many sessions may hold once, until the last of them drops it.
    pub fn share(self: &Arc<Self>, frame: Bytes) -> Bytes {
        let held = self.hold(Consumer::Outbound, frame.len());
        Bytes::from_owner(Shared { frame, _held: held })
    }

    /// Records how much the fullest session of a shard holds, and returns how much the fullest of the node
    /// holds.
    pub fn note_fullest(&self, shard: usize, bytes: usize) -> usize {
        if let Some(own) = self.fullest.get(shard) {
            own.store(bytes, Ordering::Relaxed);
        }
        self.fullest.iter().map(|bytes| bytes.load(Ordering::Relaxed)).max().unwrap_or_default()
    }

    /// Removes a shard from that comparison, because memory is not short or the shard has ended.
    pub fn forget_fullest(&self, shard: usize) {
        if let Some(own) = self.fullest.get(shard) {
            own.store(0, Ordering::Relaxed);
        }
    }

    #[expect(clippy::indexing_slicing, reason = "the array has one place per consumer, in their order")]
    fn gauge(&self, consumer: Consumer) -> &IntGauge {
        &self.held[consumer as usize]
    }
}

/// Bytes that are counted until this is dropped.
#[derive(Debug)]
pub struct Held {
    budget: Arc<Budget>,
    consumer: Consumer,
    bytes: usize,
}

impl Held {
    /// Counts more bytes.
    pub fn grow(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.budget.settle(self.consumer, signed(bytes));
    }

    /// The budget that counts them.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.settle(self.consumer, -signed(self.bytes));
    }
}

struct Shared {
    frame: Bytes,
    _held: Held,
}

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.frame
    }
}

fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn unsigned(bytes: i64) -> usize {
    usize::try_from(bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(limit: usize) -> Arc<Budget> {
        let budget = Budget::register(&Registry::new(), 2).unwrap();
        budget.set_limit(limit);
        budget
    }

    #[test]
    fn each_consumer_is_counted_separately() {
        let budget = budget(1000);
        for (bytes, consumer) in (1..).zip(Consumer::ALL) {
            budget.settle(*consumer, bytes);
        }
        let held: Vec<_> = Consumer::ALL.iter().map(|consumer| budget.held_by(*consumer)).collect();
        assert_eq!(held, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(budget.held(), 28);
    }

    #[test]
    fn a_shared_frame_is_counted_once_and_until_the_last_one_drops_it() {
        let budget = budget(1000);
        let frame = budget.share(Bytes::from(vec![7; 100]));
        let others = vec![frame.clone(), frame.slice(90..)];
        drop(frame);
        assert_eq!((budget.held_by(Consumer::Outbound), others[1].len()), (100, 10));
        drop(others);
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn requests_use_at_most_half_and_leave_an_eighth() {
        let budget = budget(800);
        let mut bodies = budget.hold(Consumer::Bodies, 200);
        let heads = budget.hold(Consumer::Heads, 100);
        assert!(budget.admits(100));
        assert!(!budget.admits(101));
        assert!(!budget.admits(usize::MAX));
        let queues = budget.hold(Consumer::Outbound, 350);
        assert!(budget.admits(50) && !budget.is_short());
        assert!(!budget.admits(51));
        bodies.grow(150);
        assert!(budget.is_short() && !budget.is_over());
        bodies.grow(1);
        assert!(budget.is_over());
        drop((bodies, heads, queues));
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn shards_see_the_fullest_session_of_the_node() {
        let budget = budget(800);
        assert_eq!(budget.note_fullest(0, 50), 50);
        assert_eq!(budget.note_fullest(1, 20), 50);
        assert_eq!(budget.note_fullest(0, 10), 20);
        budget.forget_fullest(1);
        assert_eq!(budget.note_fullest(0, 10), 10);
    }
}

//! What each shard reports to the rest of the node: its sockets, their bytes, and whether it is alive.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

/// What a running shard reports.
#[derive(Debug, Default)]
pub struct ShardHealth {
    /// Its sockets and their bytes.
    pub meter: Arc<Meter>,
    /// Sockets on their way to the shard.
    pub arriving: AtomicUsize,
    /// How often its loop has ticked.
    pub beats: AtomicU64,
    /// Whether it serves sessions no more, for any reason.
    pub ended: AtomicBool,
}

impl ShardHealth {
    /// The sockets that it holds or is about to receive.
    pub fn load(&self) -> usize {
        self.meter.sockets.load(Ordering::Relaxed) + self.arriving.load(Ordering::Relaxed)
    }
}

/// Open sockets of one shard, and their bytes. Written only by the shard; read by the acceptor and the
/// metrics.
#[derive(Debug, Default)]
pub struct Meter {
    /// Open sockets.
    pub sockets: AtomicUsize,
    /// Bytes read since the last [`Meter::take`].
    read: AtomicU64,
    /// Bytes written since the last [`Meter::take`].
    written: AtomicU64,
}

impl Meter {
    /// The bytes read and written since the last call. Only for the shard's own thread.
    pub fn take(&self) -> (u64, u64) {
        (self.read.swap(0, Ordering::Relaxed), self.written.swap(0, Ordering::Relaxed))
    }

    /// Counts bytes read.
    pub fn read(&self, bytes: usize) {
        add(&self.read, bytes);
    }

    /// Counts bytes written.
    pub fn written(&self, bytes: usize) {
        add(&self.written, bytes);
    }
}

/// Only the shard's thread writes these counters, including [`Meter::take`], so plain loads and stores
/// suffice. An atomic addition would lock the bus once per delivery.
fn add(counter: &AtomicU64, bytes: usize) {
    counter.store(counter.load(Ordering::Relaxed) + bytes as u64, Ordering::Relaxed);
}

//! Ids for sessions and requests.

use std::sync::atomic::{AtomicU64, Ordering};

use broker_bridge::SessionId;

/// Generates ids for sessions: unique across nodes, but not secret.
#[derive(Debug)]
pub struct SessionIds {
    node: u64,
    next: AtomicU64,
}

impl SessionIds {
    /// Ids that begin with a number unique to this process.
    pub fn new(node: u64) -> Self {
        Self { node, next: AtomicU64::new(0) }
    }

    /// The next unused id.
    pub fn next(&self) -> SessionId {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        SessionId(u128::from(self.node) << 64 | u128::from(number))
    }
}

//! The status of the broker, combined from its connections.
//!
//! The broker is *up* only while every connection is up. Otherwise it is *connecting* until it has been up once, and
//! *interrupted* after that. Logs each change once, so that an outage is two lines and not a flood.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{BrokerStatus, metrics::BrokerMetrics};

/// Collects the reports of the connections (parts).
#[derive(Debug)]
pub(super) struct StatusTracker {
    state: Mutex<State>,
    status: watch::Sender<BrokerStatus>,
    metrics: Arc<BrokerMetrics>,
}

#[derive(Debug)]
struct State {
    /// Why each part is down; `None` if it is up.
    parts: Vec<Option<Arc<str>>>,
    was_up: bool,
    closed: bool,
}

impl StatusTracker {
    /// A tracker of `parts` parts, all of them down.
    pub(super) fn new(parts: usize, why: &str, metrics: Arc<BrokerMetrics>) -> Self {
        let why: Arc<str> = why.into();
        metrics.up.set(0);
        Self {
            state: Mutex::new(State {
                parts: vec![Some(Arc::clone(&why)); parts],
                was_up: false,
                closed: false,
            }),
            status: watch::Sender::new(BrokerStatus::Connecting(why)),
            metrics,
        }
    }

    pub(super) fn watch(&self) -> watch::Receiver<BrokerStatus> {
        self.status.subscribe()
    }

    /// Part `index` is up.
    pub(super) fn up(&self, index: usize) {
        self.set(index, None);
    }

    /// Part `index` is down. The reason is shown to operators and must not contain a secret.
    pub(super) fn down(&self, index: usize, why: impl Into<Arc<str>>) {
        self.set(index, Some(why.into()));
    }

    /// Nothing after this changes the status.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.metrics.up.set(0);
        self.status.send_replace(BrokerStatus::Closed);
    }

    fn set(&self, index: usize, part: Option<Arc<str>>) {
        // Held until the status is sent, so that two changes cannot be sent in the wrong order.
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        match state.parts.get_mut(index) {
            Some(old) if *old != part => *old = part,
            _ => return,
        }
        let status = match state.parts.iter().flatten().next() {
            None => BrokerStatus::Up,
            Some(why) if state.was_up => BrokerStatus::Interrupted(Arc::clone(why)),
            Some(why) => BrokerStatus::Connecting(Arc::clone(why)),
        };
        state.was_up |= status.is_up();
        self.metrics.up.set(i64::from(status.is_up()));
        self.status.send_if_modified(|old| {
            let changed = *old != status;
            if changed {
                log(&status);
                *old = status;
            }
            changed
        });
    }
}

fn log(status: &BrokerStatus) {
    match status {
        BrokerStatus::Up => tracing::info!("the broker is up"),
        BrokerStatus::Connecting(why) => tracing::warn!(error = %why, "still connecting to the broker"),
        BrokerStatus::Interrupted(why) => tracing::warn!(error = %why, "the broker is interrupted"),
        BrokerStatus::Closed => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_up_when_every_part_is_up() {
        let metrics = BrokerMetrics::register(&prometheus::Registry::new()).unwrap();
        let tracker = StatusTracker::new(2, "starting", Arc::clone(&metrics));
        let mut watch = tracker.watch();
        assert_eq!(*watch.borrow_and_update(), BrokerStatus::Connecting("starting".into()));
        tracker.up(0);
        assert!(!watch.has_changed().unwrap(), "the other part still says the same");
        tracker.down(1, "refused");
        assert_eq!(*watch.borrow_and_update(), BrokerStatus::Connecting("refused".into()));
        tracker.up(1);
        assert_eq!(*watch.borrow_and_update(), BrokerStatus::Up);
        assert_eq!(metrics.up.get(), 1);
        tracker.down(0, "lost");
        assert_eq!(*watch.borrow_and_update(), BrokerStatus::Interrupted("lost".into()));
        assert_eq!(metrics.up.get(), 0);
        tracker.close();
        tracker.up(0);
        assert_eq!(*watch.borrow_and_update(), BrokerStatus::Closed);
        assert_eq!(metrics.up.get(), 0);
    }
}

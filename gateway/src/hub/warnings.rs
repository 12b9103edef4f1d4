//! Warnings about histories that the broker refuses to open or to read, and about messages that are published past them.
//!
//! Each client that joins causes another attempt, so clients would decide how much is logged. One of a kind is logged per
//! minute, whatever the room, with the number of failures since the last; level `debug` has all of them.

use std::time::{Duration, Instant};

use broker_bridge::{BrokerError, RoomName};
use parking_lot::Mutex;

/// The time between two warnings of a kind.
const EVERY: Duration = Duration::from_secs(60);

/// The warnings of one node.
#[derive(Debug, Default)]
pub struct Warnings {
    opening: Mutex<Repeated>,
    reading: Mutex<Repeated>,
    unrecorded: Mutex<Repeated>,
}

impl Warnings {
    /// The history of a room cannot be opened.
    pub fn cannot_open(&self, room: &RoomName, error: &BrokerError, now: Instant) {
        if let Some(failures) = self.opening.lock().note(now) {
            tracing::warn!(%room, %error, failures, "cannot open the history of a room");
        } else {
            tracing::debug!(%room, %error, "cannot open the history of a room");
        }
    }

    /// The history of a room cannot be read.
    pub fn cannot_read(&self, room: &RoomName, error: &BrokerError, now: Instant) {
        if let Some(failures) = self.reading.lock().note(now) {
            tracing::warn!(%room, %error, failures, "cannot read the history of a room");
        } else {
            tracing::debug!(%room, %error, "cannot read the history of a room");
        }
    }
}

impl Warnings {
    /// Something arrived in a room with a history that is not in it.
    pub fn unrecorded(&self, room: &RoomName, now: Instant) {
        if let Some(messages) = self.unrecorded.lock().note(now) {
            tracing::warn!(
                %room,
                messages,
                "a message was published past the history of its room: a backend should publish with FCALL tidegate_publish \
                 or POST /rooms, or clients that come back miss it"
            );
        }
    }
}

/// A warning that may come very often.
#[derive(Debug, Default)]
struct Repeated {
    /// Failures since the last line.
    count: u64,
    logged_at: Option<Instant>,
}

impl Repeated {
    /// Counts a failure. Returns the number to log, if a line may be logged now.
    fn note(&mut self, now: Instant) -> Option<u64> {
        self.count += 1;
        if self.logged_at.is_some_and(|at| now.saturating_duration_since(at) < EVERY) {
            return None;
        }
        self.logged_at = Some(now);
        Some(std::mem::take(&mut self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_warning_a_minute_counts_the_others() {
        let (mut warning, start) = (Repeated::default(), Instant::now());
        let mut at = |millis| warning.note(start + Duration::from_millis(millis));
        assert_eq!([0, 1, 59_999].map(&mut at), [Some(1), None, None]);
        assert_eq!([60_000, 60_001].map(&mut at), [Some(3), None]);
        assert_eq!(at(600_000), Some(2));
    }
}

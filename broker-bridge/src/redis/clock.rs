//! A clock that stops while this process is stopped.
//!
//! A deadline measures the peer, so time during which this process could not run must not count. A process that was
//! stopped (SIGSTOP, a frozen cgroup, a migrated virtual machine) would otherwise find all its deadlines expired
//! when it continues, although the answers wait in its sockets.
//!
//! Between two readings the clock advances by at most one second. Whoever waits for a deadline therefore reads the
//! clock at least every [`LOOK`], and reads the socket before it decides that the deadline has passed.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// The longest time between two readings while a deadline is pending.
pub(super) const LOOK: Duration = Duration::from_millis(500);
/// The most that one reading can advance the clock.
const STRIDE: Duration = Duration::from_secs(1);

/// The clock that all tasks of a broker share.
#[derive(Debug)]
pub(super) struct Clock {
    /// When the clock was last read, and its time then.
    looked: Mutex<(Instant, Duration)>,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { looked: Mutex::new((Instant::now(), Duration::ZERO)) }
    }

    /// Reads the clock, and advances it.
    pub(super) fn now(&self) -> Duration {
        let mut looked = self.looked.lock();
        let now = Instant::now();
        let (last, time) = *looked;
        let time = time + now.saturating_duration_since(last).min(STRIDE);
        *looked = (now, time);
        time
    }

    /// When to read the clock again while waiting for `due`.
    pub(super) fn next_look(&self, due: Duration) -> Instant {
        Instant::now() + due.saturating_sub(self.now()).min(LOOK)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_unobserved_interval_counts_as_a_second() {
        let clock = Clock::new();
        advance(Duration::from_millis(700)).await;
        assert_eq!(clock.now(), Duration::from_millis(700));
        advance(Duration::from_secs(3600)).await;
        assert_eq!(clock.now(), Duration::from_millis(1700));
        assert_eq!(clock.now(), Duration::from_millis(1700));
    }

    #[tokio::test(start_paused = true)]
    async fn frequent_readings_count_every_second() {
        let clock = Clock::new();
        let due = Duration::from_secs(6);
        let start = Instant::now();
        while clock.now() < due {
            tokio::time::sleep_until(clock.next_look(due)).await;
        }
        assert_eq!(start.elapsed(), due);
    }
}

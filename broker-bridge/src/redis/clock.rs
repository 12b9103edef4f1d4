//! The time during which this process was able to look.
//!
//! Owns one idea: a deadline is about the other side, so time in which this process could not look does not count
//! against it. A process that was stopped (SIGSTOP, a frozen cgroup, a virtual machine that was moved) would find
//! all its deadlines passed when it goes on, although every answer waits in its sockets.
//!
//! Between two looks the clock advances by a second at most. Whoever waits for a deadline therefore looks again
//! at least every [`LOOK`], and reads what has arrived before judging.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// The longest wait between two looks while something has a deadline.
pub(super) const LOOK: Duration = Duration::from_millis(500);
/// What a look can advance the clock by.
const STRIDE: Duration = Duration::from_secs(1);

/// A clock that all tasks of a broker share.
#[derive(Debug)]
pub(super) struct Clock {
    /// The last look, and what the clock said then.
    looked: Mutex<(Instant, Duration)>,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { looked: Mutex::new((Instant::now(), Duration::ZERO)) }
    }

    /// Looks: what time it is now.
    pub(super) fn now(&self) -> Duration {
        let mut looked = self.looked.lock();
        let now = Instant::now();
        let (last, time) = *looked;
        let time = time + now.saturating_duration_since(last).min(STRIDE);
        *looked = (now, time);
        time
    }

    /// When to look again for something that is due then.
    pub(super) fn next_look(&self, due: Duration) -> Instant {
        Instant::now() + due.saturating_sub(self.now()).min(LOOK)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_without_a_look_counts_for_a_second() {
        let clock = Clock::new();
        advance(Duration::from_millis(700)).await;
        assert_eq!(clock.now(), Duration::from_millis(700));
        advance(Duration::from_secs(3600)).await;
        assert_eq!(clock.now(), Duration::from_millis(1700));
        assert_eq!(clock.now(), Duration::from_millis(1700));
    }

    #[tokio::test(start_paused = true)]
    async fn who_looks_often_enough_sees_every_second() {
        let clock = Clock::new();
        let due = Duration::from_secs(6);
        let start = Instant::now();
        while clock.now() < due {
            tokio::time::sleep_until(clock.next_look(due)).await;
        }
        assert_eq!(start.elapsed(), due);
    }
}

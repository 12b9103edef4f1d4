//! The time that all processes of a run share: `CLOCK_MONOTONIC`, in nanoseconds.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since the machine started. The same in every process, so one process can stamp a message and
/// another read the stamp.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap_or(0) * SECOND + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;

/// A span as nanoseconds.
pub fn nanos(span: std::time::Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

/// Nanoseconds as seconds.
#[expect(clippy::cast_precision_loss, reason = "spans of a run, far below 2^53 ns")]
pub fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

/// When message `number` is due, in nanoseconds after the first, at `rate` a second.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a schedule's nanoseconds are below 2^53 and not negative"
)]
pub fn due(number: u64, rate: f64) -> u64 {
    (number as f64 / rate * 1e9) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_is_even() {
        assert_eq!([0, 1, 2, 3000].map(|number| due(number, 1000.0)), [0, 1_000_000, 2_000_000, 3 * SECOND]);
        assert_eq!(due(1, 0.5), 2 * SECOND);
    }

    #[test]
    fn the_clock_does_not_go_back() {
        let first = now();
        assert!(now() >= first && first > 0);
    }
}

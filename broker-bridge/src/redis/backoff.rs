//! The delay before the next connection attempt.
//!
//! Owns the arithmetic only: it does not sleep. *Full jitter*: each delay is uniformly random between a floor and
//! a ceiling that doubles, so that nodes that lost the same server do not reconnect in step.

use std::time::Duration;

/// The delays between the attempts of one connection.
#[derive(Debug)]
pub(super) struct Backoff {
    attempt: u32,
}

impl Backoff {
    /// The shortest delay, so that a server that accepts and drops connections is not flooded.
    pub(super) const FLOOR: Duration = Duration::from_millis(10);
    /// The longest first delay: nearly immediate.
    pub(super) const FIRST: Duration = Duration::from_millis(50);
    /// The longest delay.
    pub(super) const CEILING: Duration = Duration::from_secs(2);

    pub(super) fn new() -> Self {
        Self { attempt: 0 }
    }

    /// The delay before the next attempt.
    pub(super) fn next(&mut self) -> Duration {
        let delay = delay(self.attempt, getrandom::u32().unwrap_or(u32::MAX / 2));
        self.attempt = self.attempt.saturating_add(1);
        delay
    }

    /// Takes the lifetime of the last connection. Only one that lived longer than the ceiling resets the
    /// sequence, so that delays keep growing for a server that accepts and drops connections.
    pub(super) fn stood(&mut self, lifetime: Duration) {
        if lifetime >= Self::CEILING {
            self.attempt = 0;
        }
    }
}

/// Maps `random` uniformly to the range of this attempt.
fn delay(attempt: u32, random: u32) -> Duration {
    let ceiling = Backoff::FIRST.saturating_mul(1 << attempt.min(16)).min(Backoff::CEILING);
    let share = f64::from(random) / f64::from(u32::MAX);
    Backoff::FLOOR + ceiling.saturating_sub(Backoff::FLOOR).mul_f64(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_stay_within_a_ceiling_that_doubles() {
        for (attempt, ceiling) in
            [(0, 50), (1, 100), (2, 200), (5, 1600), (6, 2000), (40, 2000), (u32::MAX, 2000)]
        {
            assert_eq!(delay(attempt, 0), Backoff::FLOOR, "attempt {attempt}");
            assert_eq!(delay(attempt, u32::MAX), Duration::from_millis(ceiling), "attempt {attempt}");
        }
    }

    #[test]
    fn only_a_long_connection_resets_the_backoff() {
        let mut backoff = Backoff::new();
        for _ in 0..20 {
            assert!((Backoff::FLOOR..=Backoff::CEILING).contains(&backoff.next()));
        }
        backoff.stood(Duration::from_millis(1999));
        assert_eq!(backoff.attempt, 20);
        backoff.stood(Backoff::CEILING);
        assert!((Backoff::FLOOR..=Backoff::FIRST).contains(&backoff.next()));
    }

    #[test]
    fn delays_are_spread() {
        let first = (0..64).map(|_| Backoff::new().next()).collect::<std::collections::HashSet<_>>();
        assert!(first.len() > 32, "{first:?}");
    }
}

//! The pace at which a draining node closes its sessions.
//!
//! All shards share one schedule. Regardless of their number, their sizes and their protocols, no session is
//! closed before its even share of the window. Shards choose the sessions to close ([`crate::shard`]); the
//! node decides when the drain begins and ends ([`crate::node`]).

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

/// A drain's schedule: after a fraction of the window, that fraction of the sessions may have been closed.
/// The first session may be closed at once.
#[derive(Debug)]
pub struct Pace {
    began: Instant,
    window: Duration,
    /// Sessions to close on all shards that have joined.
    sessions: AtomicUsize,
    closed: AtomicUsize,
}

impl Pace {
    /// A schedule that starts at `began`.
    pub fn new(began: Instant, window: Duration) -> Self {
        Self { began, window, sessions: AtomicUsize::new(0), closed: AtomicUsize::new(0) }
    }

    /// Adds a shard with this many sessions to close. Returns how many of them it may close per `tick` at
    /// most, so that a shard that was busy does not catch up in a burst.
    pub fn join(&self, sessions: usize, tick: Duration) -> usize {
        self.sessions.fetch_add(sessions, Ordering::Relaxed);
        if self.window.is_zero() {
            return sessions;
        }
        let share = (sessions as u128 * tick.as_nanos()).div_ceil(self.window.as_nanos());
        usize::try_from(share).unwrap_or(usize::MAX)
    }

    /// Whether one more session may be closed at `now`. If so, counts it as closed.
    pub fn try_close(&self, now: Instant) -> bool {
        let due = self.due(now.saturating_duration_since(self.began));
        let one_more = |closed| (closed < due).then_some(closed + 1);
        self.closed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// How many sessions may have been closed after this time.
    fn due(&self, elapsed: Duration) -> usize {
        if self.window.is_zero() {
            return usize::MAX;
        }
        let sessions = self.sessions.load(Ordering::Relaxed) as u128;
        let due = 1 + sessions * elapsed.as_nanos() / self.window.as_nanos();
        usize::try_from(due).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TICK: Duration = Duration::from_millis(100);

    /// How many sessions are closed after each tick, for shards of these sizes that check at the times in
    /// `looks` (milliseconds, one list per shard).
    fn run(window: Duration, sizes: &[usize], looks: &[Vec<u64>]) -> Vec<(Duration, usize)> {
        let began = Instant::now();
        let pace = Pace::new(began, window);
        let caps: Vec<usize> = sizes.iter().map(|size| pace.join(*size, TICK)).collect();
        let mut left = sizes.to_vec();
        let mut agenda: Vec<(u64, usize)> = (0..)
            .zip(looks)
            .flat_map(|(shard, looks)| looks.iter().map(move |look| (*look, shard)))
            .collect();
        agenda.sort_unstable();
        let mut closed = 0;
        let mut history = Vec::new();
        for (ms, shard) in agenda {
            let elapsed = Duration::from_millis(ms);
            for _ in 0..caps[shard].min(left[shard]) {
                if !pace.try_close(began + elapsed) {
                    break;
                }
                left[shard] -= 1;
                closed += 1;
            }
            history.push((elapsed, closed));
        }
        history
    }

    fn every_tick(until: u64, offset: u64) -> Vec<u64> {
        (0..=until / 100).map(|tick| tick * 100 + offset).collect()
    }

    #[test]
    fn ten_thousand_sessions_leave_at_an_even_rate() {
        let history = run(Duration::from_secs(10), &[10_000], &[every_tick(10_000, 0)]);
        let closed: Vec<usize> = history.iter().map(|(_, closed)| *closed).collect();
        let expected: Vec<usize> = (0..=100).map(|tick| (tick * 100 + 1).min(10_000)).collect();
        // The first session is closed at once and each tick closes its share at most, so one is left for
        // another tick.
        assert_eq!(closed[..100], expected[..100]);
        assert_eq!(closed[100], 10_000);
    }

    #[test]
    fn shards_of_unequal_size_share_one_rate_and_finish_together() {
        let sizes = [9_000, 900, 90, 0];
        let looks: Vec<_> = (0..4).map(|shard| every_tick(10_200, shard * 23)).collect();
        let history = run(Duration::from_secs(10), &sizes, &looks);
        assert_eq!(history.last().map(|(_, closed)| *closed), Some(9_990));
        let half = history.iter().find(|(elapsed, _)| *elapsed >= Duration::from_secs(5)).unwrap().1;
        assert!((4_800..=5_000).contains(&half), "{half}");
    }

    #[test]
    fn a_single_session_does_not_wait_for_the_window() {
        assert_eq!(run(Duration::from_secs(10), &[0, 1], &[vec![0], vec![0]]).last().unwrap().1, 1);
    }

    #[test]
    fn without_a_window_all_sessions_close_at_once() {
        assert_eq!(run(Duration::ZERO, &[3, 4], &[vec![0], vec![0]]).last().unwrap().1, 7);
    }

    #[test]
    fn a_delayed_shard_does_not_catch_up() {
        let history = run(Duration::from_secs(10), &[1_000], &[vec![0, 5_000, 5_100, 5_200]]);
        let closed: Vec<usize> = history.iter().map(|(_, closed)| *closed).collect();
        assert_eq!(closed, [1, 11, 21, 31]);
    }

    proptest! {
        #[test]
        fn sessions_are_not_closed_before_their_even_share(
            window in 1_u64..20_000,
            shards in prop::collection::vec((0_usize..500, prop::collection::vec(0_u64..25_000, 0..100)), 1..5),
        ) {
            let window = Duration::from_millis(window);
            let (sizes, looks): (Vec<_>, Vec<_>) = shards.into_iter().unzip();
            let total: usize = sizes.iter().sum();
            for (elapsed, closed) in run(window, &sizes, &looks) {
                let share = total as u128 * elapsed.as_nanos() / window.as_nanos();
                prop_assert!(closed as u128 <= 1 + share, "{closed} after {elapsed:?} of {window:?}");
                prop_assert!(closed <= total);
            }
        }
    }
}

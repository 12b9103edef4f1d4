//! Coarse deadlines for many connections at once.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// A shard's time, in steps of [`Clock::STEP`] since the shard began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(pub u32);

impl Tick {
    /// This much later, rounded up to a whole step.
    pub fn after(self, duration: Duration) -> Self {
        let steps = duration.as_nanos().div_ceil(Clock::STEP.as_nanos());
        Self(self.0.saturating_add(u32::try_from(steps).unwrap_or(u32::MAX)))
    }
}

/// Counts ticks.
#[derive(Debug)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// Length of a tick. Deadlines are late by at most this, heartbeats and expiry do not need better.
    pub const STEP: Duration = Duration::from_millis(100);

    /// A clock that begins now.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }

    /// The tick that runs now.
    pub fn now(&self) -> Tick {
        let steps = self.start.elapsed().as_millis() / Self::STEP.as_millis();
        Tick(u32::try_from(steps).unwrap_or(u32::MAX)) // after 13 years
    }
}

/// Keys by the tick they are due at. Nothing is ever taken out early: an entry that is no longer of
/// interest is skipped by its owner when it comes up.
#[derive(Debug)]
pub struct Timers<K> {
    due: BTreeMap<Tick, Vec<K>>,
}

impl<K> Default for Timers<K> {
    fn default() -> Self {
        Self { due: BTreeMap::new() }
    }
}

impl<K> Timers<K> {
    /// `key` comes up once `at` has come.
    pub fn set(&mut self, at: Tick, key: K) {
        self.due.entry(at).or_default().push(key);
    }

    /// Everything due at or before `now`, tick by tick, with the tick it was set for.
    pub fn take_due(&mut self, now: Tick) -> Option<(Tick, Vec<K>)> {
        let entry = self.due.first_entry()?;
        (*entry.key() <= now).then(|| entry.remove_entry())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_up_once_and_in_order() {
        let mut timers = Timers::default();
        timers.set(Tick(5), 'b');
        timers.set(Tick(3), 'a');
        timers.set(Tick(5), 'c');
        assert_eq!(timers.take_due(Tick(2)), None);
        assert_eq!(timers.take_due(Tick(5)), Some((Tick(3), vec!['a'])));
        assert_eq!(timers.take_due(Tick(5)), Some((Tick(5), vec!['b', 'c'])));
        assert_eq!(timers.take_due(Tick(9)), None);
    }

    #[test]
    fn durations_round_up_to_whole_ticks() {
        assert_eq!(Tick(7).after(Duration::ZERO), Tick(7));
        assert_eq!(Tick(7).after(Duration::from_millis(1)), Tick(8));
        assert_eq!(Tick(7).after(Duration::from_millis(200)), Tick(9));
        assert_eq!(Tick(7).after(Duration::MAX), Tick(u32::MAX));
    }
}

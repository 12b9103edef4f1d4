//! A shard's clock, which does not count time in which the process was suspended.
//!
//! Most deadlines concern the peer: a client that does not answer a ping, a request that does not continue.
//! They assume that this side was running. A process that was suspended (a frozen container, a swapping
//! machine, a debugger) was not: when it continues, all its deadlines have passed, and every answer waits in
//! its sockets. So a reading of this clock that comes late adds nothing to its time. Input that has arrived
//! meanwhile is handled before the next reading, which is on time again. A shard that is late repeatedly is
//! busy, not suspended: until readings have been on time for some seconds, each late one adds a second.
//!
//! Deadlines that do not wait for a peer use real time: the expiry of a token, a drain. [`Time`] gives it, so
//! that a simulation can set it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;

/// A reading more than this after the previous one is late. A shard reads its clock every [`Clock::STEP`].
const LATE: Duration = Duration::from_secs(1);

/// After this much time of readings on time, a late one counts as a pause.
const CALM: Duration = Duration::from_secs(5);

/// A shard's time, in steps of [`Clock::STEP`] since the shard started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(pub u32);

impl Tick {
    /// Later than any time that occurs.
    pub const NEVER: Self = Self(u32::MAX);

    /// This much later, rounded up to a whole step.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        let steps = duration.as_nanos().div_ceil(Clock::STEP.as_nanos());
        Self(self.0.saturating_add(u32::try_from(steps).unwrap_or(u32::MAX)))
    }
}

/// Real time: from the clocks of the machine, or set by hand.
#[derive(Clone, Debug, Default)]
pub struct Time(Option<Arc<Manual>>);

/// A time that stands still until it is advanced.
#[derive(Debug)]
struct Manual {
    start: Instant,
    /// Nanoseconds since the start.
    passed: AtomicU64,
}

impl Time {
    /// The time of day at which a time begins that is set by hand: in the year 2030.
    const START: Duration = Duration::from_secs(1_900_000_000);

    /// A time that stands still until it is advanced. Clones share it.
    pub fn manual() -> Self {
        Self(Some(Arc::new(Manual { start: Instant::now(), passed: AtomicU64::new(0) })))
    }

    /// Advances a time that is set by hand.
    pub fn advance(&self, by: Duration) {
        if let Some(manual) = &self.0 {
            let by = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
            manual.passed.fetch_add(by, Ordering::Relaxed);
        }
    }

    /// The time that has passed since some moment; it never goes back.
    pub fn now(&self) -> Instant {
        self.0.as_ref().map_or_else(Instant::now, |manual| manual.start + manual.passed())
    }

    /// The time of day.
    pub fn unix(&self) -> SystemTime {
        let manual = |manual: &Arc<Manual>| SystemTime::UNIX_EPOCH + Self::START + manual.passed();
        self.0.as_ref().map_or_else(SystemTime::now, manual)
    }
}

impl Manual {
    fn passed(&self) -> Duration {
        Duration::from_nanos(self.passed.load(Ordering::Relaxed))
    }
}

/// A shard's clock. Clones share one state.
#[derive(Clone, Debug)]
pub struct Clock(Arc<Mutex<Reading>>);

#[derive(Debug)]
struct Reading {
    /// When the clock was last read.
    at: Instant,
    /// The clock's time at that reading.
    time: Duration,
    /// Whether that reading was late.
    late: bool,
    /// How long readings have been on time since the last late one, up to [`CALM`].
    calm: Duration,
    /// How many late readings followed one that was on time.
    pauses: u32,
}

/// A clock that starts now.
impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock {
    /// The length of a tick. Deadlines are late by at most this; heartbeats and expiry need no better.
    pub const STEP: Duration = Duration::from_millis(100);

    /// A clock that starts now.
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Reading {
            at: Instant::now(),
            time: Duration::ZERO,
            late: false,
            calm: CALM,
            pauses: 0,
        })))
    }

    /// Reads the clock: the current tick.
    pub fn now(&self) -> Tick {
        let steps = self.time().as_millis() / Self::STEP.as_millis();
        Tick(u32::try_from(steps).unwrap_or(u32::MAX)) // after 13 years
    }

    /// How often the process has been suspended, or appeared to be.
    pub fn pauses(&self) -> u32 {
        self.0.lock().pauses
    }

    /// Reads the clock: the time since it started.
    pub fn time(&self) -> Duration {
        self.read_at(Instant::now())
    }

    /// As if the process had been suspended since the last reading.
    #[cfg(test)]
    pub fn suspend(&self, duration: Duration) {
        self.0.lock().at -= duration;
    }

    fn read_at(&self, now: Instant) -> Duration {
        let mut reading = self.0.lock();
        let passed = now.saturating_duration_since(reading.at);
        let late = passed > LATE;
        if late && !reading.late {
            reading.pauses = reading.pauses.wrapping_add(1);
        }
        if !(late && reading.calm >= CALM) {
            reading.time += passed.min(LATE);
        }
        reading.calm = if late { Duration::ZERO } else { reading.calm.saturating_add(passed).min(CALM) };
        (reading.at, reading.late) = (now, late);
        reading.time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_pause_adds_nothing_and_is_counted() {
        let clock = Clock::new();
        let start = clock.0.lock().at;
        assert_eq!(clock.read_at(start + SECOND / 2), SECOND / 2);
        assert_eq!(clock.read_at(start + 100 * SECOND), SECOND / 2);
        assert_eq!(clock.pauses(), 1);
        for second in 1..=5 {
            assert_eq!(clock.read_at(start + (100 + second) * SECOND), second * SECOND + SECOND / 2);
        }
        assert_eq!(clock.read_at(start + 200 * SECOND), 5 * SECOND + SECOND / 2);
        assert_eq!(clock.pauses(), 2);
    }

    #[test]
    fn a_shard_that_is_always_late_does_not_stop_its_clock() {
        let clock = Clock::new();
        let start = clock.0.lock().at;
        let times: Vec<_> = (1..=4).map(|n| clock.read_at(start + 3 * n * SECOND)).collect();
        assert_eq!(times, [Duration::ZERO, SECOND, 2 * SECOND, 3 * SECOND]);
        assert_eq!(clock.pauses(), 1);
    }

    #[test]
    fn a_reading_on_time_between_stalls_does_not_stop_the_clock_of_a_busy_shard() {
        let clock = Clock::new();
        let start = clock.0.lock().at;
        let times: Vec<_> = (1..=4)
            .map(|n| {
                clock.read_at(start + 3 * n * SECOND);
                clock.read_at(start + 3 * n * SECOND + SECOND / 2)
            })
            .collect();
        assert_eq!(times, [1, 4, 7, 10].map(|halves| halves * SECOND / 2));
        assert_eq!(clock.pauses(), 4);
    }

    #[test]
    fn durations_round_up_to_whole_ticks() {
        assert_eq!(Tick(7).after(Duration::ZERO), Tick(7));
        assert_eq!(Tick(7).after(Duration::from_millis(1)), Tick(8));
        assert_eq!(Tick(7).after(Duration::from_millis(200)), Tick(9));
        assert_eq!(Tick(7).after(Duration::MAX), Tick(u32::MAX));
    }
}

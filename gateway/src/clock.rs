//! A shard's clock, which does not count time in which the process was suspended.
//!
//! Most deadlines concern the peer: a client that does not answer a ping, a request that does not continue.
//! They assume that this side was running. A process that was suspended (a frozen container, a swapping
//! machine, a debugger) was not: when it continues, all its deadlines have passed, and every answer waits in
//! its sockets. So a reading of this clock that comes late adds nothing to its time. Input that has arrived
//! meanwhile is handled before the next reading, which is on time again. A shard that is late repeatedly is
//! busy, not suspended: until readings have been on time for some seconds, each late one adds a second.
//!
//! Deadlines that do not wait for a peer use real time: the expiry of a token, a drain.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// A reading more than this after the previous one is late. A shard reads its clock every [`Clock::STEP`].
const LATE: Duration = Duration::from_secs(1);

/// After this much time of readings on time, a late one counts as a pause.
const CALM: Duration = Duration::from_secs(5);

thread_local! {
    /// The clock of the shard that runs on this thread.
    static OWN: RefCell<Option<Clock>> = const { RefCell::new(None) };
}

/// A shard's time, in steps of [`Clock::STEP`] since the shard started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(pub u32);

impl Tick {
    /// Later than any time that occurs.
    pub const NEVER: Self = Self(u32::MAX);

    /// This much later, rounded up to a whole step.
    pub fn after(self, duration: Duration) -> Self {
        let steps = duration.as_nanos().div_ceil(Clock::STEP.as_nanos());
        Self(self.0.saturating_add(u32::try_from(steps).unwrap_or(u32::MAX)))
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

/// The time allowed for an operation is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl From<Elapsed> for io::Error {
    fn from(Elapsed: Elapsed) -> Self {
        io::ErrorKind::TimedOut.into()
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

    /// Makes this the clock of the current thread.
    pub fn use_on_this_thread(&self) {
        OWN.set(Some(self.clone()));
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

    /// Waits for this much of the clock's time.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        let until = self.time().saturating_add(duration);
        Sleep { clock: self.clone(), until, timer: Box::pin(tokio::time::sleep(duration)) }
    }

    /// Reads the clock: the time since it started.
    fn time(&self) -> Duration {
        self.read_at(Instant::now())
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

/// Runs `future` with a time limit, by the clock of the shard that runs on the current thread; on other
/// threads, by tokio's clock. The future is polled first, so a result that is there in time counts.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    let Some(clock) = OWN.with_borrow(Clone::clone) else {
        return tokio::time::timeout(duration, future).await.map_err(|_| Elapsed);
    };
    tokio::select! {
        biased;
        output = future => Ok(output),
        () = clock.sleep(duration) => Err(Elapsed),
    }
}

/// See [`Clock::sleep`]. Relies on the shard's ticks: a clock that is never read stands still.
#[derive(Debug)]
pub struct Sleep {
    clock: Clock,
    until: Duration,
    timer: Pin<Box<tokio::time::Sleep>>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let left = self.until.saturating_sub(self.clock.time());
            if left.is_zero() {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(tokio::time::Instant::now() + left);
        }
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

    #[tokio::test]
    async fn a_sleep_outlasts_a_pause() {
        let clock = Clock::new();
        let sleep = clock.sleep(Duration::from_millis(300));
        // As if the process had been suspended for an hour.
        clock.0.lock().at -= 3600 * SECOND;
        let readings = async {
            loop {
                clock.now();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let start = Instant::now();
        tokio::select! {
            () = sleep => {}
            () = readings => {}
        }
        assert!(start.elapsed() >= Duration::from_millis(290), "{:?}", start.elapsed());
        assert_eq!(clock.pauses(), 1);
    }

    #[tokio::test]
    async fn a_result_in_time_counts() {
        Clock::new().use_on_this_thread();
        assert_eq!(timeout(Duration::ZERO, async { 1 }).await, Ok(1));
        assert_eq!(timeout(Duration::ZERO, std::future::pending::<()>()).await, Err(Elapsed));
        OWN.set(None);
        assert_eq!(timeout(Duration::ZERO, std::future::pending::<()>()).await, Err(Elapsed));
    }

    #[test]
    fn durations_round_up_to_whole_ticks() {
        assert_eq!(Tick(7).after(Duration::ZERO), Tick(7));
        assert_eq!(Tick(7).after(Duration::from_millis(1)), Tick(8));
        assert_eq!(Tick(7).after(Duration::from_millis(200)), Tick(9));
        assert_eq!(Tick(7).after(Duration::MAX), Tick(u32::MAX));
    }
}

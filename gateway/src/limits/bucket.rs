//! The rate-limit buckets of one session, stored in the session.
//!
//! They belong to one thread and are dropped with the session. A table of them would only add locking and
//! sweeping. For governor, the key *is* the bucket: it stores the state of a key in the key itself.

use std::{
    cell::Cell,
    hash::{Hash, Hasher},
    num::NonZeroU32,
};

use governor::{RateLimiter, clock::Clock, middleware::NoOpMiddleware, nanos::Nanos, state::StateStore};

use super::meter::Measure;
use crate::{clock::Time, config};

/// One bucket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When it will be full again, in nanoseconds of its meter's clock.
    full_at: Cell<u64>,
    /// The meter that wrote `full_at`; 0 for none.
    meter: Cell<u32>,
}

/// governor requires it of keys. No bucket is ever put into a hash table.
impl Hash for Bucket {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.full_at.get(), self.meter.get()).hash(state);
    }
}

/// The rate-limit state of one session.
#[derive(Debug, Default)]
pub struct RateAccount {
    commands: Bucket,
    bytes: Bucket,
    refusals: Bucket,
}

/// The session has exceeded this limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Empty;

/// A store whose state lives in its keys.
#[derive(Debug)]
struct InKey {
    /// A bucket that another meter wrote counts as unused.
    meter: u32,
}

impl StateStore for InKey {
    type Key = Bucket;

    fn measure_and_replace<T, F, E>(&self, key: &Bucket, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let full_at = Nanos::new(key.full_at.get());
        let (outcome, full_at) = measure((key.meter.get() == self.meter).then_some(full_at))?;
        key.full_at.set(full_at.as_u64());
        key.meter.set(self.meter);
        Ok(outcome)
    }
}

/// Applies one rate to the buckets of many sessions.
struct Meter<C: Clock> {
    measure: Measure,
    limiter: RateLimiter<Bucket, InKey, C, NoOpMiddleware<C::Instant>>,
}

impl<C: Clock> Meter<C> {
    fn new(measure: Measure, number: u32, clock: C) -> Self {
        Self { measure, limiter: RateLimiter::new(measure.quota(), InKey { meter: number }, clock) }
    }

    fn charge(&self, bucket: &Bucket, units: usize) -> Result<(), Empty> {
        self.take(bucket, self.measure.cells(units))
    }

    fn charge_more(&self, bucket: &Bucket, paid: usize, units: usize) -> Result<(), Empty> {
        self.measure.more_cells(paid, units).map_or(Ok(()), |cells| self.take(bucket, cells))
    }

    fn take(&self, bucket: &Bucket, cells: NonZeroU32) -> Result<(), Empty> {
        match self.limiter.check_key_n(bucket, cells) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Empty),
        }
    }
}

/// The rates of sessions. Each shard has its own instance for its sessions.
pub struct SessionMeters<C: Clock = Time> {
    commands: Option<Meter<C>>,
    bytes: Option<Meter<C>>,
    refusals: Meter<C>,
    /// The number of meters created so far, which numbers the next one.
    made: u32,
    clock: C,
}

/// The rate of refusals that a session may cause before it is closed.
const TOLERATED_REFUSALS: &str = "10/s burst 100";

/// Without limits, except for that of refusals.
impl Default for SessionMeters {
    fn default() -> Self {
        Self::with_clock(Time::default())
    }
}

impl SessionMeters {
    /// Meters with the rates of `limits`.
    pub fn new(limits: &config::Limits, time: Time) -> Self {
        let mut meters = Self::with_clock(time);
        meters.adopt(limits);
        meters
    }
}

impl<C: Clock + Clone> SessionMeters<C> {
    fn with_clock(clock: C) -> Self {
        let refusals = Measure::of(TOLERATED_REFUSALS.parse().expect("a rate"));
        let refusals = Meter::new(refusals, 1, clock.clone());
        Self { commands: None, bytes: None, refusals, made: 1, clock }
    }

    /// Sets the rates of `limits`.
    pub fn adopt(&mut self, limits: &config::Limits) {
        let Self { commands, bytes, made, clock, .. } = self;
        for (meter, measure) in
            [(commands, limits.commands.map(Measure::of)), (bytes, limits.bytes.map(Measure::of_bytes))]
        {
            if meter.as_ref().map(|meter| meter.measure) != measure {
                *made = made.wrapping_add(1).max(2);
                *meter = measure.map(|measure| Meter::new(measure, *made, clock.clone()));
            }
        }
    }

    /// Charges for a command before it is executed.
    pub fn command(&self, account: &RateAccount) -> Result<(), Empty> {
        self.commands.as_ref().map_or(Ok(()), |meter| meter.charge(&account.commands, 1))
    }

    /// Charges for received bytes.
    pub fn bytes(&self, account: &RateAccount, bytes: usize) -> Result<(), Empty> {
        self.bytes.as_ref().map_or(Ok(()), |meter| meter.charge(&account.bytes, bytes))
    }

    /// Charges for an item that grows by `bytes` after `paid` bytes of it have been charged.
    pub fn more_bytes(&self, account: &RateAccount, paid: usize, bytes: usize) -> Result<(), Empty> {
        self.bytes.as_ref().map_or(Ok(()), |meter| meter.charge_more(&account.bytes, paid, bytes))
    }

    /// Charges for a refusal. Returns whether the session may continue.
    pub fn tolerate(&self, account: &RateAccount) -> bool {
        self.refusals.charge(&account.refusals, 1).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use governor::clock::FakeRelativeClock;

    use super::*;
    use crate::limits::tests::limits;

    fn meters(clock: &FakeRelativeClock, set: &[(&str, &str)]) -> SessionMeters<FakeRelativeClock> {
        let mut meters = SessionMeters::with_clock(clock.clone());
        meters.adopt(&limits(set));
        meters
    }

    #[test]
    fn a_rate_account_takes_48_bytes() {
        assert_eq!(size_of::<RateAccount>(), 48);
    }

    #[test]
    fn a_burst_is_allowed_and_then_the_rate() {
        let clock = FakeRelativeClock::default();
        let meters = meters(&clock, &[("commands", "10/s burst 3"), ("bytes", "1KiB/s burst 4KiB")]);
        let (account, other) = (RateAccount::default(), RateAccount::default());
        let commands = |account: &RateAccount| (0..10).filter(|_| meters.command(account).is_ok()).count();
        assert_eq!((commands(&account), commands(&other)), (3, 3), "each session has its own");
        clock.advance(Duration::from_millis(100));
        assert_eq!(commands(&account), 1);
        clock.advance(Duration::from_secs(60));
        assert_eq!(commands(&account), 3, "unused allowance accumulates only up to the burst");

        assert_eq!(meters.bytes(&account, 4000), Ok(()));
        assert_eq!(meters.bytes(&account, 1000), Err(Empty));
        assert_eq!(meters.bytes(&account, 96), Ok(()), "a refused charge costs nothing");
        clock.advance(Duration::from_secs(1));
        assert_eq!(meters.bytes(&account, 1024), Ok(()));
        assert_eq!(meters.bytes(&account, 16), Err(Empty));
    }

    #[test]
    fn a_changed_rate_starts_anew_and_the_others_go_on() {
        let clock = FakeRelativeClock::default();
        let mut meters = meters(&clock, &[("commands", "1/h burst 2"), ("bytes", "1/m burst 1000")]);
        let account = RateAccount::default();
        let left = |meters: &SessionMeters<_>| (0..100).filter(|_| meters.command(&account).is_ok()).count();
        assert_eq!(left(&meters), 2);
        assert_eq!(meters.bytes(&account, 1000), Ok(()));
        meters.adopt(&limits(&[("commands", "1/h burst 2"), ("bytes", "1/m burst 1000")]));
        assert_eq!(left(&meters), 0, "nothing has changed");
        meters.adopt(&limits(&[("commands", "1/h burst 5"), ("bytes", "1/m burst 1000")]));
        assert_eq!(left(&meters), 5);
        assert_eq!(meters.bytes(&account, 1), Err(Empty), "this rate is the same");
        meters.adopt(&limits(&[]));
        assert_eq!(left(&meters), 100, "no limit");
        meters.adopt(&limits(&[("commands", "1/h burst 5")]));
        assert_eq!(left(&meters), 5);
    }

    #[test]
    fn a_burst_of_a_hundred_refusals_is_tolerated() {
        let clock = FakeRelativeClock::default();
        let meters = meters(&clock, &[]);
        let account = RateAccount::default();
        let tolerated = || (0..1000).filter(|_| meters.tolerate(&account)).count();
        assert_eq!(tolerated(), 100);
        clock.advance(Duration::from_secs(1));
        assert_eq!(tolerated(), 10);
    }
}

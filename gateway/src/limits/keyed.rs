//! Rate-limit buckets by key, bounded in number.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hash},
    num::NonZeroU32,
    time::Duration,
};

use foldhash::fast::RandomState;
use governor::{
    RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    nanos::Nanos,
    state::{StateStore, keyed::ShrinkableKeyedStateStore},
};
use parking_lot::Mutex;

use super::meter::Measure;
use crate::{clock::Time, shrink};

/// A key with its own bucket.
pub trait Key: Clone + Eq + Hash {}

impl<K: Clone + Eq + Hash> Key for K {}

/// Maximum number of buckets of one kind. Beyond it, all new keys share one bucket per stripe (16 in total),
/// until a sweep frees room.
pub const MAX_KEYS: usize = 1 << 17;
/// Number of locks, so that shards rarely wait for each other.
const STRIPES: usize = 16;

/// A bucket for each key, all with the same rate.
pub struct Keyed<K: Key, C: Clock = Time> {
    measure: Measure,
    limiter: RateLimiter<K, Bounded<K>, C, NoOpMiddleware<C::Instant>>,
}

impl<K: Key> Keyed<K> {
    /// Starts with full buckets.
    pub fn new(measure: Measure, time: Time) -> Self {
        Self::with_clock(measure, MAX_KEYS, time)
    }
}

impl<K: Key, C: Clock> Keyed<K, C> {
    fn with_clock(measure: Measure, max_keys: usize, clock: C) -> Self {
        Self { measure, limiter: RateLimiter::new(measure.quota(), Bounded::new(max_keys), clock) }
    }

    /// The rate of the buckets.
    pub fn measure(&self) -> Measure {
        self.measure
    }

    /// Takes `units` from the key's bucket, all or none. `Err` is how long to wait for them.
    pub fn charge(&self, key: &K, units: usize) -> Result<(), Duration> {
        self.take(key, self.measure.cells(units))
    }

    /// Like [`Self::charge`], for an item that grows by `units` after `paid` units of it have been charged.
    pub fn charge_more(&self, key: &K, paid: usize, units: usize) -> Result<(), Duration> {
        self.measure.more_cells(paid, units).map_or(Ok(()), |cells| self.take(key, cells))
    }

    fn take(&self, key: &K, cells: NonZeroU32) -> Result<(), Duration> {
        match self.limiter.check_key_n(key, cells) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(until)) => Err(until.wait_time_from(self.limiter.clock().now())),
            // Unreachable: no charge exceeds the burst.
            Err(_) => Err(Duration::ZERO),
        }
    }

    /// Removes the buckets that have been full for at least one interval.
    pub fn sweep(&self) {
        self.limiter.retain_recent();
    }

    /// The number of buckets in use.
    pub fn len(&self) -> usize {
        self.limiter.len()
    }

    /// Whether no bucket is in use.
    pub fn is_empty(&self) -> bool {
        self.limiter.is_empty()
    }
}

/// governor's states by key, up to a maximum number.
struct Bounded<K> {
    stripes: [Mutex<Stripe<K>>; STRIPES],
    max_per_stripe: usize,
    hasher: RandomState,
}

struct Stripe<K> {
    states: HashMap<K, Nanos, RandomState>,
    /// The state shared by all keys that find the stripe full.
    overflow: Option<Nanos>,
}

impl<K> Bounded<K> {
    fn new(max_keys: usize) -> Self {
        let stripe = || Mutex::new(Stripe { states: HashMap::default(), overflow: None });
        Self {
            stripes: std::array::from_fn(|_| stripe()),
            max_per_stripe: max_keys / STRIPES,
            hasher: RandomState::default(),
        }
    }
}

impl<K: Key> StateStore for Bounded<K> {
    type Key = K;

    #[expect(clippy::indexing_slicing, reason = "a remainder of the array's length")]
    fn measure_and_replace<T, F, E>(&self, key: &K, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        let stripe = self.hasher.hash_one(key) as usize % STRIPES;
        let mut stripe = self.stripes[stripe].lock();
        if let Some(state) = stripe.states.get_mut(key) {
            let (outcome, next) = measure(Some(*state))?;
            *state = next;
            return Ok(outcome);
        }
        if stripe.states.len() < self.max_per_stripe {
            let (outcome, next) = measure(None)?;
            stripe.states.insert(key.clone(), next);
            return Ok(outcome);
        }
        let (outcome, next) = measure(stripe.overflow)?;
        stripe.overflow = Some(next);
        Ok(outcome)
    }
}

impl<K: Key> ShrinkableKeyedStateStore<K> for Bounded<K> {
    fn retain_recent(&self, drop_below: Nanos) {
        for stripe in &self.stripes {
            let Stripe { states, overflow } = &mut *stripe.lock();
            states.retain(|_, state| *state > drop_below);
            *overflow = overflow.filter(|state| *state > drop_below);
            shrink::map(states);
        }
    }

    fn len(&self) -> usize {
        self.stripes.iter().map(|stripe| stripe.lock().states.len()).sum()
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;

    use super::*;

    fn keyed(rate: &str, max_keys: usize, clock: &FakeRelativeClock) -> Keyed<u32, FakeRelativeClock> {
        Keyed::with_clock(Measure::of(rate.parse().unwrap()), max_keys, clock.clone())
    }

    #[test]
    fn each_key_has_its_own_bucket_and_waiting_time() {
        let clock = FakeRelativeClock::default();
        let keyed = keyed("10/s burst 2", MAX_KEYS, &clock);
        for key in [1, 2] {
            assert_eq!(keyed.charge(&key, 2), Ok(()));
            assert_eq!(keyed.charge(&key, 1), Err(Duration::from_millis(100)));
        }
        clock.advance(Duration::from_millis(100));
        assert_eq!(keyed.charge(&1, 1), Ok(()));
    }

    /// Removes the buckets of clients that are gone and keeps those of active ones.
    #[test]
    fn buckets_of_100_000_unused_keys_are_freed() {
        let clock = FakeRelativeClock::default();
        let keyed = keyed("1/s burst 3", MAX_KEYS, &clock);
        for key in 0..100_000 {
            assert_eq!(keyed.charge(&key, 1), Ok(()));
        }
        assert_eq!(keyed.charge(&7, 2), Ok(()));
        keyed.sweep();
        assert_eq!(keyed.len(), 100_000, "no bucket is full yet");
        clock.advance(Duration::from_millis(2_500));
        keyed.sweep();
        assert_eq!(keyed.len(), 1);
        assert_eq!(keyed.charge(&7, 3), Err(Duration::from_millis(500)));
        clock.advance(Duration::from_secs(3));
        keyed.sweep();
        assert!(keyed.is_empty());
        let capacity: usize = keyed
            .limiter
            .into_state_store()
            .stripes
            .iter()
            .map(|stripe| stripe.lock().states.capacity())
            .sum();
        assert!(capacity <= STRIPES * 64, "memory for {capacity} buckets is kept");
    }

    /// However many keys come, the table does not grow, and the first ones keep their own buckets.
    #[test]
    fn newcomers_of_a_full_table_share() {
        let clock = FakeRelativeClock::default();
        let keyed = keyed("1/s burst 2", 32, &clock);
        assert_eq!(keyed.charge(&0, 1), Ok(()));
        let served = (1..10_000).filter(|key| keyed.charge(key, 1).is_ok()).count();
        assert!(keyed.len() <= 32, "{} buckets", keyed.len());
        // Every key with its own bucket, and two charges for each shared bucket.
        assert_eq!(served, keyed.len() - 1 + STRIPES * 2);
        assert_eq!(keyed.charge(&0, 1), Ok(()));
        clock.advance(Duration::from_secs(3));
        keyed.sweep();
        assert!(keyed.is_empty());
        assert_eq!(keyed.charge(&10_000, 2), Ok(()), "the key has its own bucket again");
    }
}

//! Conversion of configured rates to governor's quotas.

use std::{
    num::{NonZero, NonZeroU32},
    time::{Duration, Instant},
};

use governor::Quota;

use crate::{
    clock::Time,
    config::{ByteRate, Rate},
};

/// Rate limits go by real time.
impl governor::clock::Clock for Time {
    type Instant = Instant;

    fn now(&self) -> Instant {
        Time::now(self)
    }
}

/// The parameters of a rate limit: a bucket of `burst` cells that gains one cell per interval. A cell stands
/// for one or more units.
///
/// The interval is a whole number of nanoseconds. With one byte per cell, byte rates would be rounded by
/// several per cent; so a cell then stands for several bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Units per cell, as a power of two.
    shift: u32,
    interval: Duration,
    burst: NonZeroU32,
}

impl Measure {
    /// Intervals from this length on lose nothing that matters by rounding to nanoseconds.
    const FINE: u128 = 1_000;

    /// A limit of events.
    pub fn of(rate: Rate) -> Self {
        let (per, amount) = (rate.per().as_nanos(), u128::from(rate.amount().get()));
        let shift = (0..32).find(|shift| (per << shift) / amount >= Self::FINE).unwrap_or(0);
        let interval = u64::try_from((per << shift) / amount).unwrap_or(u64::MAX);
        let burst = NonZero::new(rate.burst().get() >> shift).unwrap_or(NonZeroU32::MIN);
        Self { shift, interval: Duration::from_nanos(interval), burst }
    }

    /// A limit of bytes.
    pub fn of_bytes(ByteRate(rate): ByteRate) -> Self {
        Self::of(rate)
    }

    /// The equivalent quota of governor.
    pub fn quota(self) -> Quota {
        Quota::with_period(self.interval).expect("an interval is never zero").allow_burst(self.burst)
    }

    /// The number of cells for `units`, at most a whole burst: a larger charge could never succeed.
    pub fn cells(self, units: usize) -> NonZeroU32 {
        let cells = u32::try_from(units.div_ceil(1 << self.shift)).unwrap_or(u32::MAX);
        NonZero::new(cells).unwrap_or(NonZeroU32::MIN).min(self.burst)
    }

    /// The number of additional cells for an item that grows by `units` after `paid` units of it have been
    /// charged. `None` if there are none, for example because a whole burst has been charged.
    pub fn more_cells(self, paid: usize, units: usize) -> Option<NonZeroU32> {
        let before = if paid == 0 { 0 } else { self.cells(paid).get() };
        NonZero::new(self.cells(paid.saturating_add(units)).get() - before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_rates_are_exact_and_fast_ones_nearly() {
        let measure = |text: &str| Measure::of(text.parse().unwrap());
        let exact = measure("600/m burst 50");
        assert_eq!((exact.shift, exact.interval, exact.burst.get()), (0, Duration::from_millis(100), 50));
        assert_eq!(exact.cells(0).get(), 1);
        assert_eq!(exact.cells(7).get(), 7);
        assert_eq!(exact.cells(1 << 40).get(), 50);
        let more = |paid, units| exact.more_cells(paid, units).map(NonZeroU32::get);
        assert_eq!([more(0, 7), more(7, 3), more(7, 1 << 40)], [Some(7), Some(3), Some(43)]);
        assert_eq!([more(50, 1), more(7, 0)], [None, None], "nothing costs more than a whole burst");

        let fast = Measure::of_bytes("1GiB/s burst 1GiB".parse().unwrap());
        let per_second = f64::from(1_u32 << fast.shift) / fast.interval.as_secs_f64();
        assert!((per_second / f64::from(1 << 30) - 1.0).abs() < 0.001, "{fast:?}");
        assert_eq!(fast.cells(1).get(), 1);
        assert_eq!(fast.cells(1 << 30), fast.burst);
    }
}

//! From a configured rate to governor's quota.

use std::{
    num::{NonZero, NonZeroU32},
    time::Duration,
};

use governor::Quota;

use crate::config::{ByteRate, Rate};

/// How something is measured: in cells of so many units, so many of them at once, one more after each
/// interval.
///
/// The interval is a whole number of nanoseconds. Bytes come so fast that one of them would be measured
/// wrongly by several per cent: then a cell is several bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Units per cell, as a power of two.
    shift: u32,
    interval: Duration,
    burst: NonZeroU32,
}

impl Measure {
    /// An interval from which on a nanosecond does not matter.
    const FINE: u128 = 1_000;

    /// Things, one by one.
    pub fn of(rate: Rate) -> Self {
        let (per, amount) = (rate.per().as_nanos(), u128::from(rate.amount().get()));
        let shift = (0..32).find(|shift| (per << shift) / amount >= Self::FINE).unwrap_or(0);
        let interval = u64::try_from((per << shift) / amount).unwrap_or(u64::MAX);
        let burst = NonZero::new(rate.burst().get() >> shift).unwrap_or(NonZeroU32::MIN);
        Self { shift, interval: Duration::from_nanos(interval), burst }
    }

    /// Bytes.
    pub fn of_bytes(ByteRate(rate): ByteRate) -> Self {
        Self::of(rate)
    }

    /// What governor calls it.
    pub fn quota(self) -> Quota {
        Quota::with_period(self.interval).expect("an interval is never zero").allow_burst(self.burst)
    }

    /// How many cells so many units take. What is more than a whole burst costs a whole burst: it could
    /// never pass otherwise.
    pub fn cells(self, units: usize) -> NonZeroU32 {
        let cells = u32::try_from(units.div_ceil(1 << self.shift)).unwrap_or(u32::MAX);
        NonZero::new(cells).unwrap_or(NonZeroU32::MIN).min(self.burst)
    }

    /// How many cells so many more units take of something of which `paid` units have been paid for. `None`: no
    /// more, as for what is beyond a whole burst.
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

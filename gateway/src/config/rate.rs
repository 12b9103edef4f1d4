//! Rates as they are written: `100/s burst 200`, `600/m`, `1MiB/s burst 4MiB`.

use std::{
    fmt,
    num::{NonZero, NonZeroU32},
    str::FromStr,
    time::Duration,
};

use super::ByteSize;

/// An amount per second, minute or hour, and a burst: the amount allowed at once.
///
/// Unused allowance accumulates up to the burst. A burst refills within a day, which bounds how long a rate
/// limiter must keep its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    amount: NonZeroU32,
    per: Per,
    burst: NonZeroU32,
}

/// A [`Rate`] of bytes, whose amounts may have units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRate(pub Rate);

/// The period of a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Per {
    Second,
    Minute,
    Hour,
}

/// Why a text is not a [`Rate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRate {
    /// The text is not in the expected form.
    #[error("expected a rate such as 100/s or 600/m burst 50")]
    Form,
    /// An amount is zero or too large.
    #[error("expected an amount and a burst from 1 to {}", Rate::MAX)]
    Amount,
    /// The burst refills too slowly.
    #[error("expected a burst that refills within a day")]
    Refill,
}

impl Per {
    const ALL: [(&'static str, Self); 3] = [("s", Self::Second), ("m", Self::Minute), ("h", Self::Hour)];

    fn time(self) -> Duration {
        Duration::from_secs(match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 3_600,
        })
    }
}

impl Rate {
    /// The largest amount and the largest burst.
    pub const MAX: u32 = 1 << 30;
    const DAY: Duration = Duration::from_secs(24 * 3_600);

    fn new(amount: NonZeroU32, per: Per, burst: NonZeroU32) -> Result<Self, InvalidRate> {
        if amount.get() > Self::MAX || burst.get() > Self::MAX {
            return Err(InvalidRate::Amount);
        }
        let rate = Self { amount, per, burst };
        let refill = per.time().as_nanos() * u128::from(burst.get()) / u128::from(amount.get());
        if refill > Self::DAY.as_nanos() { Err(InvalidRate::Refill) } else { Ok(rate) }
    }

    /// The amount allowed in [`Rate::per`].
    pub fn amount(self) -> NonZeroU32 {
        self.amount
    }

    /// The period of the amount.
    pub fn per(self) -> Duration {
        self.per.time()
    }

    /// The amount allowed at once.
    pub fn burst(self) -> NonZeroU32 {
        self.burst
    }

    /// Parses a rate, with `amount` to parse the amounts.
    fn parse(text: &str, amount: impl Fn(&str) -> Option<usize>) -> Result<Self, InvalidRate> {
        let amount = |text: &str| {
            let number = amount(text).ok_or(InvalidRate::Form)?;
            u32::try_from(number).ok().and_then(NonZero::new).ok_or(InvalidRate::Amount)
        };
        let (rate, burst) =
            text.split_once(" burst ").map_or((text, None), |(rate, burst)| (rate, Some(burst)));
        let (number, unit) = rate.split_once('/').ok_or(InvalidRate::Form)?;
        let (_, per) = Per::ALL.into_iter().find(|(name, _)| *name == unit).ok_or(InvalidRate::Form)?;
        let number = amount(number)?;
        Self::new(number, per, burst.map_or(Ok(number), amount)?)
    }

    fn write(self, f: &mut fmt::Formatter<'_>, amount: impl Fn(u32) -> String) -> fmt::Result {
        let unit = Per::ALL.iter().find(|(_, per)| *per == self.per).map_or("", |(name, _)| name);
        write!(f, "{}/{unit}", amount(self.amount.get()))?;
        if self.burst != self.amount {
            write!(f, " burst {}", amount(self.burst.get()))?;
        }
        Ok(())
    }
}

impl FromStr for Rate {
    type Err = InvalidRate;

    fn from_str(text: &str) -> Result<Self, InvalidRate> {
        Self::parse(text, |number| {
            number.bytes().all(|b| b.is_ascii_digit()).then(|| number.parse().ok()).flatten()
        })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, |number| number.to_string())
    }
}

impl FromStr for ByteRate {
    type Err = InvalidRate;

    fn from_str(text: &str) -> Result<Self, InvalidRate> {
        Rate::parse(text, |size| size.parse().ok().map(ByteSize::get)).map(Self)
    }
}

impl fmt::Display for ByteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f, |bytes| ByteSize::bytes(bytes as usize).to_string())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rates_are_parsed_in_all_notations() {
        let rate = |text: &str| text.parse::<Rate>().map(|rate| (rate.amount().get(), rate.burst().get()));
        assert_eq!(rate("100/s burst 200"), Ok((100, 200)));
        assert_eq!(rate("600/m"), Ok((600, 600)));
        assert_eq!("2/h".parse::<Rate>().unwrap().per(), Duration::from_secs(3_600));
        let bytes = "1MiB/s burst 4MiB".parse::<ByteRate>().unwrap();
        assert_eq!((bytes.0.amount().get(), bytes.0.burst().get()), (1 << 20, 4 << 20));
        assert_eq!("1048576/s burst 4MiB".parse(), Ok(bytes));

        for text in
            ["", "100", "/s", "100/", "100/d", "100 / s", "-1/s", "+1/s", "1.5/s", "1KiB/s", "1/s burst"]
        {
            assert_eq!(rate(text), Err(InvalidRate::Form), "{text:?}");
        }
        for text in ["0/s", "5/s burst 0", "1073741825/s", "99999999999/s"] {
            assert_eq!(rate(text), Err(InvalidRate::Amount), "{text:?}");
        }
        assert_eq!(rate("1/h burst 25"), Err(InvalidRate::Refill));
        assert_eq!(rate("1/h burst 24"), Ok((1, 24)));
        assert_eq!("1MB/s".parse::<ByteRate>(), Err(InvalidRate::Form));
    }

    proptest! {
        #[test]
        fn displayed_rates_parse_to_the_same_value(
            amount in 1..=Rate::MAX,
            burst in 1..=Rate::MAX,
            per in prop::sample::select(&[Per::Second, Per::Minute, Per::Hour][..]),
        ) {
            let [amount, burst] = [amount, burst].map(|number| NonZero::new(number).unwrap());
            if let Ok(rate) = Rate::new(amount, per, burst) {
                prop_assert_eq!(rate.to_string().parse(), Ok(rate));
                prop_assert_eq!(ByteRate(rate).to_string().parse(), Ok(ByteRate(rate)));
            }
        }

        #[test]
        fn arbitrary_input_never_panics(text in "\\PC*|[0-9]*/[smh]( burst [0-9]*)?") {
            if let Ok(rate) = text.parse::<Rate>() {
                prop_assert_eq!(rate.to_string().parse(), Ok(rate));
            }
        }
    }
}

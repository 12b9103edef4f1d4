//! Types of configuration values, valid by construction.
//!
//! Defines the notation of sizes and times, and secrets that are never shown. Knows no keys.

use std::{fmt, str::FromStr, time::Duration};

/// A number of bytes, written `512B`, `64KiB`, `16MiB`, `1GiB`, or as a plain integer.
///
/// Decimal units (`kB`, `MB`) are refused: some people read `64KB` as 65,536 and others as 64,000, and a
/// limit must not depend on the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(usize);

/// Why a text is not a [`ByteSize`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a whole number followed by B, KiB, MiB or GiB, such as 64KiB")]
pub struct InvalidByteSize;

impl ByteSize {
    const UNITS: [(&'static str, usize); 4] =
        [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

    /// This many bytes.
    pub const fn bytes(bytes: usize) -> Self {
        Self(bytes)
    }

    /// This many times 1,024 bytes.
    pub const fn kib(kib: usize) -> Self {
        Self(kib << 10)
    }

    /// This many times 1,048,576 bytes.
    pub const fn mib(mib: usize) -> Self {
        Self(mib << 20)
    }

    /// The number of bytes.
    pub const fn get(self) -> usize {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = InvalidByteSize;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, unit) = split_unit(text).ok_or(InvalidByteSize)?;
        let scale = match unit {
            "" => 1,
            unit => Self::UNITS.iter().find(|(name, _)| *name == unit).ok_or(InvalidByteSize)?.1,
        };
        let number = usize::try_from(number).map_err(|_| InvalidByteSize)?;
        number.checked_mul(scale).map(Self).ok_or(InvalidByteSize)
    }
}

/// Uses the largest unit that leaves a whole number.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, scale) = Self::UNITS
            .into_iter()
            .find(|(_, scale)| self.0 != 0 && self.0.is_multiple_of(*scale))
            .unwrap_or(("B", 1));
        write!(f, "{}{unit}", self.0 / scale)
    }
}

/// Why a text is not a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a whole number followed by ms, s, m or h, such as 30s")]
pub struct InvalidTime;

const TIME_UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Parses a duration: a whole number followed by `ms`, `s`, `m` or `h`.
///
/// There is no default unit, because people disagree on what `10` means.
pub fn parse_time(text: &str) -> Result<Duration, InvalidTime> {
    let (number, unit) = split_unit(text).ok_or(InvalidTime)?;
    let (_, scale) = TIME_UNITS.iter().find(|(name, _)| *name == unit).ok_or(InvalidTime)?;
    number.checked_mul(*scale).map(Duration::from_millis).ok_or(InvalidTime)
}

/// Writes a duration in the notation of [`parse_time`], with the largest unit that leaves a whole number.
/// Drops fractions of a millisecond.
pub fn format_time(time: Duration) -> String {
    let ms = time.as_millis();
    let whole = TIME_UNITS.into_iter().find(|(_, scale)| ms != 0 && ms.is_multiple_of(u128::from(*scale)));
    let (unit, scale) = whole.unwrap_or(("s", 1_000));
    format!("{}{unit}", ms / u128::from(scale))
}

/// Splits `64KiB` into 64 and `KiB`. Accepts no sign, fraction, white space or separators.
fn split_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    number.parse().ok().map(|number| (number, unit))
}

/// The header in which a proxy reports a client's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForwardedHeader {
    /// `X-Forwarded-For`: a list of addresses.
    XForwardedFor,
    /// `Forwarded` (RFC 7239).
    Forwarded,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line, for collectors.
    Json,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes, written) in [
            ("0", 0, "0B"),
            ("512B", 512, "512B"),
            ("1024", 1024, "1KiB"),
            ("64KiB", 65_536, "64KiB"),
            ("1536KiB", 1_572_864, "1536KiB"),
            ("1024KiB", 1 << 20, "1MiB"),
            ("2GiB", 2 << 30, "2GiB"),
        ] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!((size.get(), size.to_string().as_str()), (bytes, written), "{text}");
        }
        for wrong in [
            "", "B", "KiB", "64KB", "64kB", "64k", "64Ki", "64kib", "64 KiB", " 1", "-1", "+1", "1.5MiB",
            "1_000",
        ] {
            assert_eq!(wrong.parse::<ByteSize>(), Err(InvalidByteSize), "{wrong}");
        }
        for too_much in ["18446744073709551616", "18446744073709551615KiB", "99999999999GiB"] {
            assert_eq!(too_much.parse::<ByteSize>(), Err(InvalidByteSize), "{too_much}");
        }
    }

    #[test]
    fn times() {
        for (text, ms, written) in [
            ("0s", 0, "0s"),
            ("250ms", 250, "250ms"),
            ("1000ms", 1_000, "1s"),
            ("90s", 90_000, "90s"),
            ("60s", 60_000, "1m"),
            ("24h", 86_400_000, "24h"),
        ] {
            let time = parse_time(text).unwrap();
            assert_eq!((time.as_millis(), format_time(time).as_str()), (ms, written), "{text}");
        }
        for wrong in
            ["", "10", "s", "1 s", "1.5s", "-1s", "1S", "1sec", "1m30s", "1d", "1us", "99999999999999999999s"]
        {
            assert_eq!(parse_time(wrong), Err(InvalidTime), "{wrong}");
        }
        assert_eq!(parse_time("18446744073709551615h"), Err(InvalidTime), "overflow");
    }

    proptest! {
        #[test]
        fn displayed_values_parse_to_the_same_value(bytes in any::<usize>(), ms in any::<u64>()) {
            let size = ByteSize::bytes(bytes);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
            let time = Duration::from_millis(ms);
            prop_assert_eq!(parse_time(&format_time(time)), Ok(time));
        }

        #[test]
        fn junk_never_panics(text in any::<String>(), number in "[0-9]{0,25}", unit in "[a-zA-Z]{0,4}") {
            for text in [text, format!("{number}{unit}")] {
                let _: Result<_, _> = text.parse::<ByteSize>();
                let _: Result<_, _> = parse_time(&text);
            }
        }
    }
}

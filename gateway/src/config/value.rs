//! The kinds of value that a configuration is made of, each valid by construction.
//!
//! This module owns how sizes and times are written, and what must never be shown. It knows no key.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use tracing_subscriber::EnvFilter;

/// A number of bytes, written `512B`, `64KiB`, `16MiB`, `1GiB`, or as a plain integer.
///
/// Decimal units (`kB`, `MB`) are refused: half of the world reads `64KB` as 65,536 and the other half as
/// 64,000, and a limit must not depend on the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(usize);

/// Why a text is not a [`ByteSize`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a size is a whole number and B, KiB, MiB or GiB, such as 64KiB")]
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

/// Written with the largest unit that leaves a whole number.
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
#[error("a time is a whole number and ms, s, m or h, such as 30s")]
pub struct InvalidTime;

const TIME_UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Reads a length of time: a whole number followed by `ms`, `s`, `m` or `h`.
///
/// There is no default unit: `10` means ten of something else to everyone.
pub fn parse_time(text: &str) -> Result<Duration, InvalidTime> {
    let (number, unit) = split_unit(text).ok_or(InvalidTime)?;
    let (_, scale) = TIME_UNITS.iter().find(|(name, _)| *name == unit).ok_or(InvalidTime)?;
    number.checked_mul(*scale).map(Duration::from_millis).ok_or(InvalidTime)
}

/// Writes a length of time the way [`parse_time`] reads it, with the largest unit that leaves a whole
/// number. Whatever is below a millisecond is cut off.
pub fn format_time(time: Duration) -> String {
    let ms = time.as_millis();
    let whole = TIME_UNITS.into_iter().find(|(_, scale)| ms != 0 && ms.is_multiple_of(u128::from(*scale)));
    let (unit, scale) = whole.unwrap_or(("s", 1_000));
    format!("{}{unit}", ms / u128::from(scale))
}

/// Splits `64KiB` into 64 and `KiB`. No sign, no fraction, no white space, no separators.
fn split_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    number.parse().ok().map(|number| (number, unit))
}

/// Bytes that are never shown: neither `Debug` nor `Display` prints them.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<[u8]>);

impl Secret {
    /// Takes bytes that must not be shown.
    pub fn new(bytes: impl Into<Arc<[u8]>>) -> Self {
        Self(bytes.into())
    }

    /// The bytes, for the one place that computes with them.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line, for collectors.
    Json,
}

/// Which events are logged: directives that `tracing_subscriber::EnvFilter` understands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(Arc<str>);

/// Why a text is not a [`LogFilter`].
#[derive(Debug, thiserror::Error)]
#[error("a log filter is a level or a list of target=level, such as info,tidegate::auth=debug")]
pub struct InvalidLogFilter;

impl LogFilter {
    /// The filter, ready for a subscriber.
    pub fn to_env_filter(&self) -> EnvFilter {
        EnvFilter::try_new(&*self.0).expect("the directives were parsed when this value was made")
    }
}

impl FromStr for LogFilter {
    type Err = InvalidLogFilter;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match EnvFilter::try_new(text) {
            Ok(_) if !text.trim().is_empty() => Ok(Self(Arc::from(text))),
            _ => Err(InvalidLogFilter),
        }
    }
}

impl fmt::Display for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

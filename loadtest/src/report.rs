//! The results of a run, for people and for machines.
//!
//! Owns warnings, expectations, tables, plots and JSON. The same structures are printed, drawn and saved, so
//! they cannot disagree.

pub mod connections;
pub mod document;
pub mod flow;
pub mod html;
pub mod load;
pub mod outputs;
pub mod relay;
pub mod resubscribe;
pub mod room;
pub mod rooms;
pub mod svg;

use std::{
    fmt, fs,
    io::{self, Write},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use self::document::{Chart, Expectation, Series};
pub use self::room::{CompareReport, RoomReport};
use crate::timeline::Point;

/// The outcome of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    AsExpected,
    /// What was not as expected, one line each.
    Unexpected(String),
    /// The run was ended early: the reason, and what was not as expected by then.
    Interrupted(String),
}

/// Shown for a value that was not measured.
pub const NOTHING: &str = "–";

/// Where and when a run took place.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_bytes: u64,
    pub kernel: String,
    pub tester: &'static str,
    /// UTC, to the second.
    pub date: String,
}

impl Verdict {
    /// The verdict on `expectations`; `interrupted` is the reason if the run was ended early.
    pub fn of(expectations: &[Expectation], interrupted: Option<&str>) -> Self {
        let missed = expectations.iter().filter(|expectation| !expectation.met).map(|it| it.words.clone());
        let early = interrupted.map(|why| format!("ended early by {why}"));
        let lines = early.into_iter().chain(missed).collect::<Vec<_>>().join("\n");
        match interrupted {
            Some(_) => Self::Interrupted(lines),
            None if lines.is_empty() => Self::AsExpected,
            None => Self::Unexpected(lines),
        }
    }
}

impl Machine {
    /// This machine, now.
    pub fn this() -> Self {
        let field = |file: &str, name: &str| {
            let text = fs::read_to_string(file).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map_or_else(String::new, |(_, value)| value.trim().to_owned())
        };
        let memory =
            field("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0_u64) * 1024;
        Self {
            cpu: field("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, Into::into),
            memory_bytes: memory,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            tester: env!("CARGO_PKG_VERSION"),
            date: utc(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO)),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cores, memory_bytes, kernel, tester, date } = self;
        let memory = memory_bytes >> 30;
        write!(f, "{date}, {cores} × {cpu}, {memory} GiB, Linux {kernel}, tidegate-loadtest {tester}")
    }
}

/// Prints a report to standard output.
pub fn print(report: &impl fmt::Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    write!(out, "{report}")?;
    out.flush()
}

/// Marks every expectation of an interrupted run as not met: the run did not complete.
pub fn unmet(expectations: &mut [Expectation], interrupted: Option<&str>) {
    if interrupted.is_none() {
        return;
    }
    for expectation in expectations.iter_mut().filter(|expectation| expectation.met) {
        expectation.met = false;
        expectation.words.push_str(" until the run was ended early");
    }
}

/// A value formatted by `show`, or [`NOTHING`].
pub fn or_nothing<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| NOTHING.to_owned(), show)
}

/// Whether `value` was measured and is at most `limit`.
pub fn at_most(value: Option<f64>, limit: f64) -> bool {
    value.is_some_and(|value| value <= limit)
}

/// Whether `value` was measured and is at least `limit`.
pub fn at_least(value: Option<f64>, limit: f64) -> bool {
    value.is_some_and(|value| value >= limit)
}

/// `one` divided by `other`, if the result is finite.
pub fn ratio(one: f64, other: f64) -> Option<f64> {
    Some(one / other).filter(|ratio| ratio.is_finite())
}

/// The plots of every timeline.
pub fn over_time(points: &[Point]) -> Vec<Chart> {
    type Value = fn(&Point) -> Option<f64>;
    let plot = |title: &str, y: &str, lines: &[(&str, Value)]| Chart {
        title: title.into(),
        x: "seconds".into(),
        y: y.into(),
        marks: Vec::new(),
        series: lines
            .iter()
            .map(|(name, value)| Series {
                name: (*name).into(),
                points: points.iter().filter_map(|point| Some((point.at, value(point)?))).collect(),
            })
            .filter(|series| series.points.iter().any(|point| point.1 > 0.0))
            .collect(),
    };
    vec![
        plot(
            "Latency over time",
            "ms",
            &[
                ("p50", |point| Some(point.p50? / 1e3)),
                ("p99", |point| Some(point.p99? / 1e3)),
                ("max", |point| Some(point.max? / 1e3)),
            ],
        ),
        plot("Deliveries", "per second", &[("delivered", |point| Some(point.delivered))]),
        plot("Publications", "per second", &[("published", |point| Some(point.published))]),
        plot("New connections", "per second", &[("connected", |point| Some(point.connected))]),
        plot("Connections", "ready", &[("ready", |point| Some(f64::from(point.standing)))]),
        plot(
            "CPU",
            "cores",
            &[("server", |point| point.server_share), ("tester", |point| Some(point.tester_share))],
        ),
        plot("Memory of the server", "MiB resident", &[("RSS", |point| point.server_rss.map(mib))]),
    ]
}

/// Bytes as MiB.
#[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// The middle value, or the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 { Some(upper) } else { Some(f64::midpoint(*values.get(middle - 1)?, upper)) }
}

/// Microseconds in a readable unit.
pub fn written(micros: f64) -> String {
    match micros {
        long if long >= 1e6 => format!("{:.2} s", long / 1e6),
        long if long >= 1e4 => format!("{:.1} ms", long / 1e3),
        long if long >= 1e3 => format!("{:.2} ms", long / 1e3),
        short => format!("{short:.0} µs"),
    }
}

/// A time since 1970 as a UTC date.
fn utc(since: Duration) -> String {
    let seconds = since.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days are counted from 1 March of year 0, which makes a leap day the last of its year.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + era * 400 + carry;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn dates() {
        for (seconds, date) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_827_696, "2000-02-29 12:34:56 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_709_251_200, "2024-03-01 00:00:00 UTC"),
            (1_798_761_599, "2026-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(utc(Duration::from_secs(seconds)), date);
        }
    }

    #[test]
    fn every_missed_expectation_has_a_line() {
        let expectation = |words: &str, met| Expectation { words: words.into(), met };
        assert_eq!(Verdict::of(&[expectation("a", true)], None), Verdict::AsExpected);
        let mut all = [expectation("a", false), expectation("b", true), expectation("c", false)];
        assert_eq!(Verdict::of(&all, None), Verdict::Unexpected("a\nc".into()));
        unmet(&mut all, Some("SIGINT"));
        let words = "ended early by SIGINT\na\nb until the run was ended early\nc";
        assert_eq!(Verdict::of(&all, Some("SIGINT")), Verdict::Interrupted(words.into()));
        assert_eq!(Verdict::of(&[], Some("SIGINT")), Verdict::Interrupted("ended early by SIGINT".into()));
    }

    #[test]
    fn times_have_readable_units() {
        let all = [0.4, 250.0, 1234.0, 45_600.0, 2_500_000.0].map(written);
        assert_eq!(all, ["0 µs", "250 µs", "1.23 ms", "45.6 ms", "2.50 s"]);
    }
}

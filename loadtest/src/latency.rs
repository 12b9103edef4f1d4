//! Latencies of deliveries.
//!
//! Owns the histogram and its summaries. Values are nanoseconds, with three significant digits, up to a
//! minute.

use anyhow::Context;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::clock::SECOND;

/// Latencies above this are recorded as this.
const LONGEST: u64 = 60 * SECOND;

/// A histogram of latencies.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram<u64>);

/// A summary of a histogram, in microseconds. An empty histogram has none: "nothing measured" is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(Default))]
pub struct Latency {
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub p999: f64,
    pub p9999: f64,
    pub max: f64,
}

/// The contents of a histogram: each value with its count. Passed between processes.
pub type Sparse = Vec<(u64, u64)>;

impl Latencies {
    /// An empty histogram.
    pub fn new() -> anyhow::Result<Self> {
        Histogram::new_with_bounds(1, LONGEST, 3).map(Self).context("the latency histogram")
    }

    /// Records one latency in nanoseconds.
    pub fn record(&mut self, nanos: u64) {
        self.0.saturating_record(nanos);
    }

    /// The number of recorded values.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// Takes the contents out and leaves the histogram empty.
    pub fn take(&mut self) -> Sparse {
        let contents =
            self.0.iter_recorded().map(|value| (value.value_iterated_to(), value.count_at_value()));
        let contents = contents.collect();
        self.0.reset();
        contents
    }

    /// Adds contents that were [taken](Self::take) from another histogram.
    pub fn add(&mut self, contents: &Sparse) {
        for &(value, count) in contents {
            self.0.saturating_record_n(value, count);
        }
    }

    /// Adds another histogram.
    pub fn merge(&mut self, other: &Self) {
        // Both have the bounds of `new`.
        let _: Result<(), _> = self.0.add(&other.0);
    }

    /// Removes all values.
    pub fn clear(&mut self) {
        self.0.reset();
    }

    /// The usual percentiles and the maximum, if anything was recorded.
    pub fn summary(&self) -> Option<Latency> {
        let at = |quantile| micros(self.0.value_at_quantile(quantile).min(self.0.max()));
        (!self.0.is_empty()).then(|| Latency {
            p50: at(0.5),
            p90: at(0.9),
            p95: at(0.95),
            p99: at(0.99),
            p999: at(0.999),
            p9999: at(0.9999),
            max: micros(self.0.max()),
        })
    }

    /// Points of the percentile curve: the percentile and its latency in microseconds, denser towards the end.
    pub fn curve(&self) -> Vec<(f64, f64)> {
        if self.0.is_empty() {
            return Vec::new();
        }
        let points = self.0.iter_quantiles(2);
        points
            .map(|value| (value.quantile_iterated_to() * 100.0, micros(value.value_iterated_to())))
            .collect()
    }
}

#[expect(clippy::cast_precision_loss, reason = "at most a minute of nanoseconds")]
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taken_contents_can_be_added_elsewhere() {
        let (mut here, mut there) = (Latencies::new().unwrap(), Latencies::new().unwrap());
        for nanos in (0..10_000).map(|step| step * 7_919 + 20_000) {
            here.record(nanos);
        }
        let (summary, curve) = (here.summary().unwrap(), here.curve());
        there.add(&here.take());
        assert_eq!((there.summary(), there.count(), here.count()), (Some(summary), 10_000, 0));
        assert_eq!(here.summary(), None, "nothing measured is not 0");
        assert!(summary.p50 < summary.p99 && summary.p99 < summary.p9999 && summary.p9999 <= summary.max);
        assert_eq!(curve.last().map(|point| point.0), Some(100.0));
        here.merge(&there);
        assert_eq!(here.summary(), Some(summary));
    }

    #[test]
    fn latencies_above_a_minute_count_as_a_minute() {
        let mut latencies = Latencies::new().unwrap();
        assert!(latencies.curve().is_empty());
        latencies.record(3600 * SECOND);
        let max = latencies.summary().unwrap().max;
        assert!((max / 60e6 - 1.0).abs() < 0.001, "{max}");
    }
}

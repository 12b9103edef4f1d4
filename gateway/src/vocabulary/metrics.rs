//! Helpers to register metrics.
//!
//! Each module registers the families that it counts. Label values come from closed sets only ([`Label`], and
//! the names of the protocols): no user, room or address ever becomes a label. Every series exists from the
//! start, because a counter that begins at its first event hides that event from `rate()` and `increase()`.

use std::marker::PhantomData;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    core::Collector,
};

/// A closed set of label values.
pub trait Label: Copy + 'static {
    /// All values.
    const ALL: &'static [Self];

    /// The label value in the metrics output.
    fn as_str(self) -> &'static str;
}

/// Counters by one label.
#[derive(Debug)]
pub struct Counters<L> {
    family: IntCounterVec,
    label: PhantomData<L>,
}

impl<L: Label> Counters<L> {
    /// Registers the family, with a series for each value of the label.
    pub fn register(
        registry: &Registry,
        name: &str,
        help: &str,
        label: &str,
    ) -> Result<Self, prometheus::Error> {
        let family = counter_family(registry, name, help, &[label])?;
        let counters = Self { family, label: PhantomData };
        for value in L::ALL {
            counters.of(*value);
        }
        Ok(counters)
    }

    /// The counter for one value.
    pub fn of(&self, value: L) -> IntCounter {
        self.family.with_label_values(&[value.as_str()])
    }
}

/// Registers a counter.
pub fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
    registered(registry, IntCounter::new(name, help)?)
}

/// Registers a family of counters.
pub fn counter_family(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    registered(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
}

/// Registers a gauge.
pub fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    registered(registry, IntGauge::new(name, help)?)
}

/// Registers a family of gauges.
pub fn gauge_family(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntGaugeVec, prometheus::Error> {
    registered(registry, IntGaugeVec::new(Opts::new(name, help), labels)?)
}

/// Registers a histogram.
pub fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: Vec<f64>,
) -> Result<Histogram, prometheus::Error> {
    registered(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?)
}

/// Registers a family of histograms.
pub fn histogram_family(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
    buckets: Vec<f64>,
) -> Result<HistogramVec, prometheus::Error> {
    registered(registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels)?)
}

fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> Result<C, prometheus::Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

//! The samples of `/metrics`.
//!
//! Reads as much of the Prometheus text format as tests need to compare counts: integers, which all counters and
//! gauges of a node are. Sums of seconds are skipped. `promtool` checks whether the text is well-formed.

use std::collections::BTreeMap;

/// The samples of one scrape: `name{labels}` as written, and the value.
#[derive(Clone, Debug)]
pub struct Samples(BTreeMap<String, u64>);

impl Samples {
    /// Reads a scrape's text.
    pub fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            Some((series.to_owned(), value.parse().ok()?))
        });
        Self(samples.collect())
    }

    /// The sum of all series of `name` whose labels contain each of `labels`, such as `reason="expired"`.
    /// Zero if there are none.
    pub fn sum(&self, name: &str, labels: &[&str]) -> u64 {
        let of_name = self.0.iter().filter(|(series, _)| {
            let (own, rest) = series.split_once('{').unwrap_or((series, ""));
            own == name && labels.iter().all(|label| rest.contains(label))
        });
        of_name.map(|(_, value)| value).sum()
    }

    /// Whether any series has this name.
    pub fn has(&self, name: &str) -> bool {
        self.0.keys().any(|series| series.split('{').next() == Some(name))
    }

    /// How much each counter of these names has grown since `before`; unchanged ones are omitted.
    pub fn growth(&self, before: &Self, names: &[&str]) -> BTreeMap<String, u64> {
        let of_names = self.0.iter().filter(|(series, _)| {
            let own = series.split('{').next().unwrap_or_default();
            names.contains(&own)
        });
        of_names
            .map(|(series, value)| {
                (series.clone(), value.saturating_sub(before.0.get(series).copied().unwrap_or(0)))
            })
            .filter(|(_, growth)| *growth != 0)
            .collect()
    }
}

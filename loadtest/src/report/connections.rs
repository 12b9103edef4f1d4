//! The costs of connections: `storm` and `idle`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    Machine,
    document::{Chart, Document, Expectation, Series, Table},
    load::percentile_chart,
    mib, or_nothing, over_time, written,
};
use crate::{latency::Latency, process::Memory, timeline::Point};

/// `storm`.
#[derive(Debug, Serialize)]
pub struct StormReport {
    pub what: String,
    pub machine: Machine,
    /// Why the run was ended early.
    pub interrupted: Option<String>,
    pub processes: u32,
    pub waves: Vec<Wave>,
    pub timeline: Vec<Point>,
    pub warnings: Vec<String>,
    pub expectations: Vec<Expectation>,
}

/// One wave: all clients connect once.
#[derive(Debug, Serialize)]
pub struct Wave {
    pub connections: u32,
    pub standing: u32,
    /// Until the last one was ready or refused.
    pub seconds: f64,
    pub per_second: f64,
    /// Microseconds from the connect until the client was ready in its room; `None` if no client became
    /// ready.
    pub latency: Option<Latency>,
    pub percentiles: Vec<(f64, f64)>,
    /// Failed connections, by reason.
    pub refused: BTreeMap<String, u64>,
    /// As a fraction of a core.
    pub server_share: Option<f64>,
    /// CPU microseconds of the server per connection that became ready.
    pub server_cpu_us: Option<f64>,
    pub server_rss: Option<u64>,
    /// The share of the tester's busiest process.
    pub tester_busiest: Option<f64>,
}

/// `idle`.
#[derive(Debug, Serialize)]
pub struct IdleReport {
    pub what: String,
    pub machine: Machine,
    /// Why the run was ended early.
    pub interrupted: Option<String>,
    pub window_seconds: f64,
    pub levels: Vec<Level>,
    /// From the first level with connections to the last.
    pub slope: Option<Slope>,
    pub timeline: Vec<Point>,
    pub warnings: Vec<String>,
    pub expectations: Vec<Expectation>,
}

/// The server with a number of connections.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Level {
    pub connections: u32,
    pub memory: Memory,
    /// Whether memory was stable before it was measured.
    pub settled: bool,
    /// CPU seconds per second over the window.
    pub cpu_per_second: Option<f64>,
    /// Connections that had ended by then.
    pub lost: u64,
}

/// What one more connection costs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Slope {
    pub from: u32,
    pub to: u32,
    /// Bytes per connection.
    pub rss: f64,
    pub pss: f64,
    pub uss: f64,
    /// CPU seconds per connection and second.
    pub cpu: Option<f64>,
}

impl StormReport {
    /// The report for people.
    pub fn document(&self) -> Document {
        let mut waves = Table::new(
            "waves; times from the connect until the client is ready in its room",
            &[
                "wave",
                "stand",
                "refused",
                "seconds",
                "per second",
                "p50",
                "p99",
                "p99.9",
                "max",
                "server CPU",
                "µs each",
                "RSS MiB",
                "tester",
            ],
        );
        let micros =
            |wave: &Wave, value: fn(&Latency) -> f64| or_nothing(wave.latency.as_ref().map(value), written);
        for (number, wave) in (1..).zip(&self.waves) {
            let refused: u64 = wave.refused.values().sum();
            waves.row([
                number.to_string(),
                format!("{} of {}", wave.standing, wave.connections),
                refused.to_string(),
                format!("{:.2}", wave.seconds),
                format!("{:.0}", wave.per_second),
                micros(wave, |latency| latency.p50),
                micros(wave, |latency| latency.p99),
                micros(wave, |latency| latency.p999),
                micros(wave, |latency| latency.max),
                or_nothing(wave.server_share, super::room::percent),
                or_nothing(wave.server_cpu_us, |cpu| format!("{cpu:.1}")),
                or_nothing(wave.server_rss, |rss| format!("{:.1}", mib(rss))),
                or_nothing(wave.tester_busiest, super::room::percent),
            ]);
        }
        let mut refusals = Table::new("refusals", &["reason", "wave", "times"]);
        for (number, wave) in (1..).zip(&self.waves) {
            for (why, count) in &wave.refused {
                refusals.row([why.clone(), number.to_string(), count.to_string()]);
            }
        }
        let names: Vec<String> = (1..=self.waves.len()).map(|number| format!("wave {number}")).collect();
        let lines = names.iter().zip(&self.waves).take(6);
        let lines: Vec<_> = lines.map(|(name, wave)| (name.as_str(), wave.percentiles.as_slice())).collect();
        let mut charts = over_time(&self.timeline);
        charts.insert(0, Chart { title: "Time to connect by percentile".into(), ..percentile_chart(&lines) });
        Document {
            title: self.what.clone(),
            facts: vec![self.machine.to_string(), format!("{} processes of the tester", self.processes)],
            tables: vec![waves, refusals],
            charts,
            warnings: self.warnings.clone(),
            expectations: self.expectations.clone(),
        }
    }
}

impl IdleReport {
    /// Computes the slope from the levels.
    pub fn conclude(&mut self) {
        let held = || self.levels.iter().filter(|level| level.connections > 0);
        let (Some(first), Some(last)) = (held().next().copied(), held().next_back().copied()) else { return };
        // A single level is compared with no connections.
        let first =
            if first.connections == last.connections { self.levels.first().copied() } else { Some(first) };
        self.slope = first.and_then(|first| Slope::between(first, last));
    }

    /// The report for people.
    pub fn document(&self) -> Document {
        let mut levels =
            Table::new("", &["connections", "RSS KiB", "Pss KiB", "USS KiB", "CPU ms/s", "lost", "memory"]);
        for level in &self.levels {
            let Memory { rss, pss, uss } = level.memory;
            levels.row([
                level.connections.to_string(),
                (rss / 1024).to_string(),
                (pss / 1024).to_string(),
                (uss / 1024).to_string(),
                or_nothing(level.cpu_per_second, |cpu| format!("{:.2}", cpu * 1e3)),
                level.lost.to_string(),
                if level.settled { "steady" } else { "still changing" }.into(),
            ]);
        }
        let mut facts = vec![self.machine.to_string()];
        if let Some(Slope { from, to, rss, pss, uss, cpu }) = self.slope {
            facts.push(format!(
                "per connection, slope from {from} to {to}: RSS {rss:.0} B, Pss {pss:.0} B, USS {uss:.0} B, \
                 {} µs CPU per second",
                or_nothing(cpu, |cpu| format!("{:.2}", cpu * 1e6))
            ));
        }
        let points = |value: fn(Memory) -> u64| {
            self.levels.iter().map(|level| (f64::from(level.connections), mib(value(level.memory)))).collect()
        };
        let series = |name: &str, value| Series { name: name.into(), points: points(value) };
        let memory = Chart {
            title: "Memory by connections".into(),
            x: "connections".into(),
            y: "MiB".into(),
            marks: Vec::new(),
            series: vec![series("RSS", |memory| memory.rss), series("USS", |memory| memory.uss)],
        };
        let mut charts = over_time(&self.timeline);
        charts.insert(0, memory);
        Document {
            title: self.what.clone(),
            facts,
            tables: vec![levels],
            charts,
            warnings: self.warnings.clone(),
            expectations: self.expectations.clone(),
        }
    }
}

impl Slope {
    #[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
    fn between(first: Level, last: Level) -> Option<Self> {
        let connections =
            f64::from(last.connections.checked_sub(first.connections).filter(|&more| more > 0)?);
        let bytes =
            |part: fn(Memory) -> u64| (part(last.memory) as f64 - part(first.memory) as f64) / connections;
        Some(Self {
            from: first.connections,
            to: last.connections,
            rss: bytes(|memory| memory.rss),
            pss: bytes(|memory| memory.pss),
            uss: bytes(|memory| memory.uss),
            cpu: last
                .cpu_per_second
                .zip(first.cpu_per_second)
                .map(|(last, first)| (last - first) / connections),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_between_the_levels_that_hold_connections() {
        let level = |connections: u32, rss| Level {
            connections,
            memory: Memory { rss, pss: rss, uss: rss },
            settled: true,
            cpu_per_second: None,
            lost: 0,
        };
        let mut report = IdleReport {
            what: "test".into(),
            machine: Machine::this(),
            interrupted: None,
            window_seconds: 1.0,
            levels: vec![level(0, 5_000_000), level(3_000, 9_000_000), level(15_000, 21_000_000)],
            slope: None,
            timeline: Vec::new(),
            warnings: Vec::new(),
            expectations: Vec::new(),
        };
        report.conclude();
        let slope = report.slope.unwrap();
        assert_eq!((slope.from, slope.to), (3_000, 15_000));
        assert!((slope.rss - 1000.0).abs() < 1e-9);
        let text = report.document().to_string();
        assert!(text.contains("slope from 3000 to 15000: RSS 1000 B"), "{text}");
        assert!(text.contains("– µs CPU per second"), "{text}");
        report.levels.truncate(2);
        report.conclude();
        assert_eq!(report.slope.map(|slope| (slope.from, slope.to)), Some((0, 3_000)));
    }

    #[test]
    fn a_wave_without_ready_connections_has_no_latency() {
        let wave = Wave {
            connections: 4,
            standing: 0,
            seconds: 0.1,
            per_second: 0.0,
            latency: None,
            percentiles: Vec::new(),
            refused: [("status 503".to_owned(), 4)].into(),
            server_share: None,
            server_cpu_us: None,
            server_rss: None,
            tester_busiest: None,
        };
        let report = StormReport {
            what: "test".into(),
            machine: Machine::this(),
            interrupted: None,
            processes: 1,
            waves: vec![wave],
            timeline: Vec::new(),
            warnings: Vec::new(),
            expectations: Vec::new(),
        };
        let text = report.document().to_string();
        assert_eq!(text.matches('–').count(), 8, "four times, and what was not measured: {text}");
        assert!(!text.contains("µs\n") && !text.contains("0 µs"), "{text}");
        assert!(serde_json::to_value(&report).unwrap().pointer("/waves/0/latency").unwrap().is_null());
    }
}

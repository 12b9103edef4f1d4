//! What a run at a steady rate found out.

use serde::Serialize;

use super::{
    Machine,
    document::{Chart, Document, Expectation, Series, Table},
    mib, over_time,
    room::{BUSY, percent},
    svg, written,
};
use crate::{
    cli::load::Expect,
    latency::{Latencies, Latency},
    process::Cpu,
    scenario::held::Held,
    timeline::Point,
};

/// Behind this part of the offered rate the schedule was not kept.
const KEPT: f64 = 0.99;

/// A tester that waits for a CPU for more than this part of the time measures its own waiting.
const STARVED: f64 = 0.1;

/// `fanout`, `rooms`, `chat`, `slow`, `mixed`.
#[derive(Debug, Serialize)]
pub struct LoadReport {
    pub what: String,
    pub machine: Machine,
    pub processes: u32,
    pub clients: u32,
    /// Whether the run was ended before its plan was.
    pub cut_short: bool,
    /// For how long messages were published.
    pub seconds: f64,
    /// Messages per second, as asked for and as published.
    pub offered_rate: f64,
    pub achieved_rate: f64,
    pub deliveries_per_second: f64,
    pub counts: Counts,
    /// Microseconds from when a message was due to its arrival.
    pub latency: Latency,
    pub groups: Vec<GroupReport>,
    /// Of `slow`: before the stalled stop reading, and after.
    pub phases: Vec<Phase>,
    /// The second phase's p99 divided by the first's.
    pub p99_ratio: Option<f64>,
    /// What the server held for the stalled, if it was weighed.
    pub held: Option<Held>,
    pub server: Option<ServerReport>,
    pub tester: TesterReport,
    /// The percentile and its latency in microseconds.
    pub percentiles: Vec<(f64, f64)>,
    pub timeline: Vec<Point>,
    pub warnings: Vec<String>,
    pub expectations: Vec<Expectation>,
}

/// What arrived and what did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub published: u64,
    /// Messages that were due and could not be sent.
    pub unsent: u64,
    pub expected: u64,
    pub delivered: u64,
    pub missing: u64,
    pub duplicated: u64,
    pub out_of_order: u64,
    pub foreign: u64,
    pub members_lost: u64,
    pub visits: u64,
    pub visitors_delivered: u64,
    pub visitors_missing: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct GroupReport {
    pub name: String,
    pub rooms: u32,
    pub members: u32,
    pub counts: Counts,
    pub latency: Latency,
}

#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    pub name: &'static str,
    pub deliveries: u64,
    pub latency: Latency,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct ServerReport {
    /// CPU seconds while messages were published and until the last had arrived.
    pub cpu: Cpu,
    pub cpu_per_million: Option<f64>,
    /// Part of a core.
    pub share: f64,
    pub rss_before: u64,
    pub rss_after: u64,
    pub rss_most: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct TesterReport {
    pub cpu: Cpu,
    pub cpu_per_million: Option<f64>,
    /// Of its busiest process, as a part of a core.
    pub busiest: f64,
    /// The part of the time that this process was ready to run and was not let: somebody else had its CPU.
    pub starved: f64,
}

impl Counts {
    /// Adds another group's.
    pub fn add(&mut self, other: &Self) {
        self.published += other.published;
        self.unsent += other.unsent;
        self.expected += other.expected;
        self.delivered += other.delivered;
        self.missing += other.missing;
        self.duplicated += other.duplicated;
        self.out_of_order += other.out_of_order;
        self.foreign += other.foreign;
        self.members_lost += other.members_lost;
        self.visits += other.visits;
        self.visitors_delivered += other.visitors_delivered;
        self.visitors_missing += other.visitors_missing;
    }
}

impl LoadReport {
    /// Draws warnings from the numbers.
    pub fn warn(&mut self, first_loss: Option<&str>, refusals: (u64, Option<&str>), unreturned: u64) {
        let mut warn = |words: String| self.warnings.push(words);
        if self.cut_short {
            warn("ended early: the report is about what had happened by then".into());
        }
        let busier = self.server.is_some_and(|server| self.tester.busiest > server.share * 1.25);
        if self.tester.busiest > BUSY || (busier && self.tester.busiest > BUSY / 2.0) {
            warn(format!(
                "the tester may be the bottleneck: its busiest process used {} of a core; use --processes, or a \
                 lower --rate",
                percent(self.tester.busiest)
            ));
        }
        if self.tester.starved > STARVED {
            warn(format!(
                "the tester had to wait for a CPU {} of the time: something else runs on it, and latencies are too long \
                 by that",
                percent(self.tester.starved)
            ));
        }
        if self.achieved_rate < self.offered_rate * KEPT && !self.cut_short {
            warn(format!(
                "{:.1} messages/s were published of {:.1} offered: the schedule was not kept",
                self.achieved_rate, self.offered_rate
            ));
        }
        if self.counts.unsent > 0 {
            warn(format!(
                "{} messages could not be sent: their publishers were gone or stuck",
                self.counts.unsent
            ));
        }
        if let Some(why) = first_loss {
            warn(format!("clients were lost; the first: {why}"));
        }
        if let (count @ 1.., Some(why)) = refusals {
            warn(format!("{count} publications were refused; the first: {why}"));
        }
        if unreturned > 0 {
            warn(format!("{unreturned} visits were refused"));
        }
    }

    /// Holds the numbers against what was expected.
    pub fn judge(&mut self, expect: &Expect, latencies: &Latencies, p99_ratio: Option<f64>) {
        let mut state = |flag: &str, asked: String, found: String, met: bool| {
            self.expectations.push(Expectation { words: format!("{flag} {asked}: {found}"), met });
        };
        let counts = self.counts;
        if let Some(allowed) = expect.expect_lost {
            let Counts { missing, duplicated, out_of_order, foreign, unsent, visitors_missing, .. } = counts;
            let faults = duplicated + out_of_order + foreign;
            state(
                "--expect-lost",
                allowed.to_string(),
                format!(
                    "{missing} missing of {}, {duplicated} duplicated, {out_of_order} out of order, {foreign} foreign, \
                     {unsent} unsent, {visitors_missing} missing at visitors",
                    counts.expected
                ),
                missing + unsent + visitors_missing <= allowed && faults == 0 && counts.published > 0,
            );
        }
        let most = self.latency.max;
        for (flag, limit, found) in [
            ("--expect-p50", expect.expect_p50, latencies.at(0.5)),
            ("--expect-p99", expect.expect_p99, latencies.at(0.99)),
            ("--expect-p999", expect.expect_p999, latencies.at(0.999)),
            ("--expect-max", expect.expect_max, most),
        ] {
            if let Some(limit) = limit {
                let micros = limit.0.as_secs_f64() * 1e6;
                // Nothing arrived: nothing has been shown.
                let met = latencies.count() > 0 && found <= micros;
                state(flag, format!("{:?}", limit.0), written(found), met);
            }
        }
        if let Some(part) = expect.expect_achieved {
            let found = self.achieved_rate / self.offered_rate;
            let met = found >= part && !self.cut_short;
            state("--expect-achieved", part.to_string(), format!("{found:.4} of the offered rate"), met);
        }
        if let Some(allowed) = p99_ratio {
            let ratio = self.p99_ratio.unwrap_or(f64::NAN);
            let met = ratio <= allowed;
            state("--expect-p99-ratio", allowed.to_string(), format!("{ratio:.2} × what it was"), met);
        }
    }

    /// The report for people.
    pub fn document(&self) -> Document {
        let mut facts = vec![
            self.machine.to_string(),
            format!(
                "{} clients in {} processes; offered {:.1} messages/s, achieved {:.1} for {:.1} s; {:.0} deliveries/s",
                self.clients,
                self.processes,
                self.offered_rate,
                self.achieved_rate,
                self.seconds,
                self.deliveries_per_second
            ),
        ];
        let million = |cost: Option<f64>| cost.map_or("-".into(), |cost| format!("{cost:.3} s"));
        if let Some(server) = self.server {
            facts.push(format!(
                "server: {} of a core, {} CPU per million deliveries, RSS {:.1} MiB before, {:.1} after, {:.1} at most",
                percent(server.share),
                million(server.cpu_per_million),
                mib(server.rss_before),
                mib(server.rss_after),
                mib(server.rss_most),
            ));
        }
        if let Some(Held { clients, queued, kernel, each }) = self.held {
            facts.push(format!(
                "held for each of {clients} stalled: at most {:.1} KiB, {:.1} in the server's queue and {:.1} in the \
                 kernel's",
                each / 1024.0,
                queued / 1024.0,
                mib(kernel) * 1024.0
            ));
        }
        facts.push(format!(
            "tester: {} of a core in its busiest process, {} CPU per million deliveries",
            percent(self.tester.busiest),
            million(self.tester.cpu_per_million)
        ));
        Document {
            title: self.what.clone(),
            facts,
            tables: self.tables(),
            charts: self.charts(),
            warnings: self.warnings.clone(),
            expectations: self.expectations.clone(),
        }
    }

    fn tables(&self) -> Vec<Table> {
        let mut deliveries = Table::new(
            "deliveries",
            &[
                "group",
                "published",
                "expected",
                "delivered",
                "missing",
                "duplicated",
                "out of order",
                "foreign",
                "lost",
            ],
        );
        let row = |name: &str, counts: &Counts| {
            let numbers = [
                counts.published,
                counts.expected,
                counts.delivered,
                counts.missing,
                counts.duplicated,
                counts.out_of_order,
                counts.foreign,
                counts.members_lost,
            ];
            std::iter::once(name.to_owned())
                .chain(numbers.map(|number| number.to_string()))
                .collect::<Vec<_>>()
        };
        self.groups.iter().for_each(|group| deliveries.row(row(&group.name, &group.counts)));
        if self.groups.len() > 1 {
            deliveries.row(row("all", &self.counts));
        }
        let mut latency = Table::new(
            "latency from when a message was due",
            &["", "p50", "p90", "p99", "p99.9", "p99.99", "max"],
        );
        let row = |name: &str, latency: &Latency| {
            let Latency { p50, p90, p99, p999, p9999, max } = *latency;
            let cells = [p50, p90, p99, p999, p9999, max].map(written);
            std::iter::once(name.to_owned()).chain(cells).collect::<Vec<_>>()
        };
        let groups = self.groups.iter().filter(|group| group.counts.delivered > 0);
        groups.for_each(|group| latency.row(row(&group.name, &group.latency)));
        if self.groups.len() > 1 {
            latency.row(row("all", &self.latency));
        }
        self.phases.iter().for_each(|phase| latency.row(row(phase.name, &phase.latency)));
        let mut visitors = Table::new("visitors", &["group", "visits", "delivered", "missing in between"]);
        for group in self.groups.iter().filter(|group| group.counts.visits > 0) {
            let Counts { visits, visitors_delivered, visitors_missing, .. } = group.counts;
            let numbers = [visits, visitors_delivered, visitors_missing].map(|number| number.to_string());
            visitors.row(std::iter::once(group.name.clone()).chain(numbers));
        }
        vec![deliveries, latency, visitors]
    }

    fn charts(&self) -> Vec<Chart> {
        let mut charts = over_time(&self.timeline);
        charts.insert(1.min(charts.len()), percentile_chart(&[("latency", &self.percentiles)]));
        charts
    }
}

/// Latency by percentile, the axis stretched towards the end.
pub fn percentile_chart(lines: &[(&str, &[(f64, f64)])]) -> Chart {
    // 90, 99, 99.9 … are equally far from each other.
    let stretch = |percentile: f64| -((100.0 - percentile) / 100.0).max(1e-5).log10();
    let most = lines.iter().flat_map(|(_, line)| line.iter()).map(|point| point.0).filter(|at| *at < 100.0);
    let most = most.fold(90.0, f64::max);
    let marks = [0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999];
    let marks = marks.into_iter().filter(|mark| *mark <= most).map(|mark| (stretch(mark), mark.to_string()));
    Chart {
        title: "Latency by percentile".into(),
        x: "percentile".into(),
        y: "ms".into(),
        marks: marks.collect(),
        series: lines
            .iter()
            .map(|(name, line)| Series {
                name: (*name).to_owned(),
                points: line
                    .iter()
                    .filter(|point| point.0 < 100.0)
                    .map(|&(percentile, micros)| (stretch(percentile), micros / 1e3))
                    .collect(),
            })
            .collect(),
    }
}

/// A rate in few characters.
pub fn rate(value: f64) -> String {
    format!("{}/s", svg::short(value))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cli::Time;

    fn report(counts: Counts) -> (LoadReport, Latencies) {
        let mut latencies = Latencies::new().unwrap();
        (1..=1000).for_each(|step| latencies.record(step * 10_000));
        let report = LoadReport {
            what: "test".into(),
            machine: Machine::this(),
            processes: 1,
            clients: 10,
            cut_short: false,
            seconds: 10.0,
            offered_rate: 100.0,
            achieved_rate: 100.0,
            deliveries_per_second: 1000.0,
            counts,
            latency: latencies.summary(),
            groups: Vec::new(),
            phases: Vec::new(),
            p99_ratio: None,
            held: None,
            server: None,
            tester: TesterReport { cpu: Cpu::default(), cpu_per_million: None, busiest: 0.1, starved: 0.0 },
            percentiles: latencies.curve(),
            timeline: Vec::new(),
            warnings: Vec::new(),
            expectations: Vec::new(),
        };
        (report, latencies)
    }

    fn clean() -> Counts {
        Counts { published: 10, expected: 100, delivered: 100, ..Counts::default() }
    }

    fn judged(counts: Counts, expect: &Expect) -> Vec<Expectation> {
        let (mut report, latencies) = report(counts);
        report.judge(expect, &latencies, None);
        report.expectations
    }

    #[test]
    fn each_fault_fails_an_expectation_of_no_loss() {
        let expect = Expect { expect_lost: Some(0), ..Expect::default() };
        assert!(judged(clean(), &expect)[0].met);
        for faulty in [
            Counts { missing: 1, ..clean() },
            Counts { unsent: 1, ..clean() },
            Counts { duplicated: 1, ..clean() },
            Counts { out_of_order: 1, ..clean() },
            Counts { foreign: 1, ..clean() },
            Counts { visitors_missing: 1, ..clean() },
            Counts::default(),
        ] {
            assert!(!judged(faulty, &expect)[0].met, "{faulty:?}");
        }
    }

    #[test]
    fn latencies_are_held_against_their_limits() {
        let limit = |micros| Some(Time(Duration::from_micros(micros)));
        let expect = Expect {
            expect_p50: limit(5_100),
            expect_p99: limit(9_000),
            expect_max: limit(11_000),
            expect_achieved: Some(0.99),
            ..Expect::default()
        };
        let met: Vec<_> = judged(clean(), &expect).iter().map(|it| it.met).collect();
        assert_eq!(met, [true, false, true, true]);
        let words = &judged(clean(), &expect)[1].words;
        assert!(words.starts_with("--expect-p99 9ms: 9.9"), "{words}");
    }

    #[test]
    fn what_spoils_a_number_is_told() {
        let (mut report, _) = report(Counts { unsent: 3, ..clean() });
        (report.tester.busiest, report.tester.starved) = (0.95, 0.2);
        report.achieved_rate = 50.0;
        report.cut_short = false;
        report.warn(Some("client 1: gone"), (2, Some("error 103")), 0);
        assert_eq!(report.warnings.len(), 6, "{:?}", report.warnings);
        let text = report.document().to_string();
        for words in [
            "bottleneck",
            "wait for a CPU 20%",
            "schedule was not kept",
            "3 messages",
            "client 1: gone",
            "error 103",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn percentiles_are_stretched_towards_the_end() {
        let chart = percentile_chart(&[("x", &[(50.0, 1e3), (90.0, 2e3), (99.0, 3e3), (100.0, 9e3)])]);
        let at: Vec<_> = chart.series[0].points.iter().map(|point| (point.0 * 10.0).round()).collect();
        assert_eq!(at, [3.0, 10.0, 20.0]);
        assert_eq!(chart.marks.last().map(|mark| mark.1.as_str()), Some("99"));
    }
}

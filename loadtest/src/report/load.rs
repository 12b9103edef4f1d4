//! The results of a run at a steady rate.

use serde::Serialize;

use super::{
    Machine, at_least, at_most,
    document::{Chart, Document, Expectation, Series, Table},
    mib, or_nothing, over_time, ratio,
    room::{BUSY, percent},
    svg, unmet, written,
};
use crate::{cli::load::Expect, latency::Latency, process::Cpu, scenario::held::Held, timeline::Point};

/// Below this fraction of the offered rate the schedule was not kept.
const KEPT: f64 = 0.99;

/// A tester that waits for a CPU for more than this fraction of the time measures its own waiting.
const STARVED: f64 = 0.1;

/// `fanout`, `rooms`, `chat`, `slow`, `mixed`.
#[derive(Debug, Serialize)]
pub struct LoadReport {
    pub what: String,
    pub machine: Machine,
    pub processes: u32,
    pub clients: u32,
    /// Why the run was ended early.
    pub interrupted: Option<String>,
    /// How many messages were due in all.
    pub due: u64,
    /// How long messages were published.
    pub seconds: f64,
    /// Messages per second, as requested and as published.
    pub offered_rate: Option<f64>,
    pub achieved_rate: Option<f64>,
    pub deliveries_per_second: Option<f64>,
    pub counts: Counts,
    /// Microseconds from when a message was due to its arrival.
    pub latency: Option<Latency>,
    pub groups: Vec<GroupReport>,
    /// For `slow`: before the stalled clients stop reading, and after.
    pub phases: Vec<Phase>,
    /// The second phase's p99 divided by the first's.
    pub p99_ratio: Option<f64>,
    /// What the server held for the stalled clients, if measured.
    pub held: Option<Held>,
    pub server: Option<ServerReport>,
    pub tester: TesterReport,
    /// Each percentile with its latency in microseconds.
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
    pub latency: Option<Latency>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    pub name: &'static str,
    pub deliveries: u64,
    pub latency: Option<Latency>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct ServerReport {
    /// CPU seconds from the first publication until the last message had arrived.
    pub cpu: Cpu,
    pub cpu_per_million: Option<f64>,
    /// As a fraction of a core.
    pub share: Option<f64>,
    pub rss_before: u64,
    pub rss_after: u64,
    pub rss_most: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct TesterReport {
    pub cpu: Option<Cpu>,
    pub cpu_per_million: Option<f64>,
    /// The share of its busiest process, as a fraction of a core.
    pub busiest: Option<f64>,
    /// The fraction of the time in which this process was ready to run but waited for a CPU.
    pub starved: Option<f64>,
}

/// Failures of clients and publications, with the first reason of each kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct Troubles<'a> {
    /// Of a client that was lost after it had been ready.
    pub first_loss: Option<&'a str>,
    /// Publications that the server refused.
    pub refused: u64,
    pub first_refusal: Option<&'a str>,
}

impl Counts {
    /// Adds the counts of another group.
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
    /// Derives warnings from the numbers.
    pub fn warn(&mut self, unreturned: u64) {
        let mut warn = |words: String| self.warnings.push(words);
        if let Some(why) = &self.interrupted {
            warn(format!("ended early by {why}: the report covers the run up to then"));
        }
        let busiest = self.tester.busiest.unwrap_or_default();
        let server = self.server.and_then(|server| server.share);
        let busier = server.is_some_and(|server| busiest > server * 1.25);
        if busiest > BUSY || (busier && busiest > BUSY / 2.0) {
            warn(format!(
                "the tester may be the bottleneck: its busiest process used {} of a core; use --processes, or a \
                 lower --rate",
                percent(busiest)
            ));
        }
        if let Some(starved) = self.tester.starved.filter(|starved| *starved > STARVED) {
            warn(format!(
                "the tester had to wait for a CPU {} of the time: something else runs on it, and latencies include that \
                 waiting",
                percent(starved)
            ));
        }
        if let Some((achieved, offered)) = self.achieved_rate.zip(self.offered_rate)
            && achieved < offered * KEPT
            && self.interrupted.is_none()
        {
            warn(format!(
                "{achieved:.1} messages/s were published of {offered:.1} offered: the schedule was not kept"
            ));
        }
        if unreturned > 0 {
            warn(format!("{unreturned} visits were refused"));
        }
    }

    /// Compares the numbers with the expectations, and the work done with the work requested. The latter is
    /// listed only if it was not done.
    pub fn judge(&mut self, expect: &Expect, p99_ratio: Option<f64>, troubles: &Troubles<'_>) {
        let mut expectations = self.undone(troubles);
        let mut state = |flag: &str, asked: String, found: String, met: bool| {
            expectations.push(Expectation { words: format!("{flag} {asked}: {found}"), met });
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
        let found = |value: fn(&Latency) -> f64| self.latency.as_ref().map(value);
        for (flag, limit, found) in [
            ("--expect-p50", expect.expect_p50, found(|latency| latency.p50)),
            ("--expect-p99", expect.expect_p99, found(|latency| latency.p99)),
            ("--expect-p999", expect.expect_p999, found(|latency| latency.p999)),
            ("--expect-max", expect.expect_max, found(|latency| latency.max)),
        ] {
            if let Some(limit) = limit {
                let met = at_most(found, limit.0.as_secs_f64() * 1e6);
                let found = found.map_or_else(|| "nothing arrived".to_owned(), written);
                state(flag, format!("{:?}", limit.0), found, met);
            }
        }
        if let Some(part) = expect.expect_achieved {
            let rates = self.achieved_rate.zip(self.offered_rate);
            let found = rates.and_then(|(achieved, offered)| ratio(achieved, offered));
            let met = at_least(found, part);
            let found = found.map_or_else(
                || "nothing was published".to_owned(),
                |found| format!("{found:.4} of the offered rate"),
            );
            state("--expect-achieved", part.to_string(), found, met);
        }
        if let Some(allowed) = p99_ratio {
            let met = at_most(self.p99_ratio, allowed);
            let found = self.p99_ratio.map_or_else(
                || "nothing arrived in one of the phases".to_owned(),
                |ratio| format!("{ratio:.2} × what it was"),
            );
            state("--expect-p99-ratio", allowed.to_string(), found, met);
        }
        unmet(&mut expectations, self.interrupted.as_deref());
        self.expectations = expectations;
    }

    /// Work that was requested but not done.
    fn undone(&self, troubles: &Troubles<'_>) -> Vec<Expectation> {
        let Counts { published, unsent, expected, delivered, members_lost, .. } = self.counts;
        let mut undone = Vec::new();
        let mut note = |words: String| undone.push(Expectation { words, met: false });
        let after = |why: Option<&str>| why.map(|why| format!("; the first: {why}")).unwrap_or_default();
        if unsent > 0 {
            note(format!(
                "all due messages are published: {unsent} of {} could not be sent, because their publishers were gone or \
                 stuck",
                self.due
            ));
        }
        if troubles.refused > 0 {
            let first = after(troubles.first_refusal);
            note(format!("publications are accepted: {} were refused{first}", troubles.refused));
        }
        if troubles.first_loss.is_some() {
            let first = after(troubles.first_loss);
            note(format!(
                "clients stay connected: {members_lost} members were lost, or a publisher was{first}"
            ));
        }
        if published > 0 && expected > 0 && delivered == 0 {
            note(format!("messages arrive: none of {expected} did"));
        }
        undone
    }

    /// The report for people.
    pub fn document(&self) -> Document {
        let mut facts = vec![
            self.machine.to_string(),
            format!(
                "{} clients in {} processes; offered {} messages/s, achieved {} for {:.1} s; {} deliveries/s",
                self.clients,
                self.processes,
                or_nothing(self.offered_rate, |rate| format!("{rate:.1}")),
                or_nothing(self.achieved_rate, |rate| format!("{rate:.1}")),
                self.seconds,
                or_nothing(self.deliveries_per_second, |rate| format!("{rate:.0}"))
            ),
        ];
        let million = |cost: Option<f64>| or_nothing(cost, |cost| format!("{cost:.3} s"));
        if let Some(server) = self.server {
            facts.push(format!(
                "server: {} of a core, {} CPU per million deliveries, RSS {:.1} MiB before, {:.1} after, {:.1} at most",
                or_nothing(server.share, percent),
                million(server.cpu_per_million),
                mib(server.rss_before),
                mib(server.rss_after),
                mib(server.rss_most),
            ));
        }
        if let Some(Held { clients, queued, kernel, each }) = self.held {
            facts.push(format!(
                "held for each of {clients} stalled clients: at most {:.1} KiB, {:.1} in the server's queue and {:.1} in the \
                 kernel's",
                each / 1024.0,
                queued / 1024.0,
                mib(kernel) * 1024.0
            ));
        }
        facts.push(format!(
            "tester: {} of a core in its busiest process, {} CPU per million deliveries",
            or_nothing(self.tester.busiest, percent),
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
        let row = |name: &str, latency: &Option<Latency>| {
            let each = |Latency { p50, p90, p99, p999, p9999, max, .. }| [p50, p90, p99, p999, p9999, max];
            let cells = latency.map(each).map_or([None; 6], |cells| cells.map(Some));
            let cells = cells.map(|cell| or_nothing(cell, written));
            std::iter::once(name.to_owned()).chain(cells).collect::<Vec<_>>()
        };
        let groups = self.groups.iter().filter(|group| group.counts.expected > 0);
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

/// Latency by percentile, with the axis stretched towards 100.
pub fn percentile_chart(lines: &[(&str, &[(f64, f64)])]) -> Chart {
    // On this axis 90, 99, 99.9 … are equally far apart.
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

/// A short form of a rate.
pub fn rate(value: f64) -> String {
    format!("{}/s", svg::short(value))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{cli::Time, latency::Latencies};

    fn report(counts: Counts) -> LoadReport {
        let mut latencies = Latencies::new().unwrap();
        (1..=1000).for_each(|step| latencies.record(step * 10_000));
        LoadReport {
            what: "test".into(),
            machine: Machine::this(),
            processes: 1,
            clients: 10,
            interrupted: None,
            due: 10,
            seconds: 10.0,
            offered_rate: Some(100.0),
            achieved_rate: Some(100.0),
            deliveries_per_second: Some(1000.0),
            counts,
            latency: latencies.summary(),
            groups: Vec::new(),
            phases: Vec::new(),
            p99_ratio: None,
            held: None,
            server: None,
            tester: TesterReport {
                cpu: Some(Cpu::default()),
                cpu_per_million: None,
                busiest: Some(0.1),
                starved: Some(0.0),
            },
            percentiles: latencies.curve(),
            timeline: Vec::new(),
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    fn clean() -> Counts {
        Counts { published: 10, expected: 100, delivered: 100, ..Counts::default() }
    }

    fn judged(counts: Counts, expect: &Expect) -> Vec<Expectation> {
        let mut report = report(counts);
        report.judge(expect, None, &Troubles::default());
        report.expectations
    }

    #[test]
    fn each_fault_fails_an_expectation_of_no_loss() {
        let expect = Expect { expect_lost: Some(0), ..Expect::default() };
        assert!(judged(clean(), &expect).iter().all(|it| it.met));
        for faulty in [
            Counts { missing: 1, ..clean() },
            Counts { unsent: 1, ..clean() },
            Counts { duplicated: 1, ..clean() },
            Counts { out_of_order: 1, ..clean() },
            Counts { foreign: 1, ..clean() },
            Counts { visitors_missing: 1, ..clean() },
            Counts::default(),
        ] {
            assert!(judged(faulty, &expect).iter().any(|it| !it.met), "{faulty:?}");
        }
    }

    #[test]
    fn latencies_are_compared_with_their_limits() {
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
    fn unreliable_numbers_have_a_warning() {
        let mut report = report(clean());
        (report.tester.busiest, report.tester.starved) = (Some(0.95), Some(0.2));
        report.achieved_rate = Some(50.0);
        report.warn(7);
        assert_eq!(report.warnings.len(), 4, "{:?}", report.warnings);
        let text = report.document().to_string();
        for words in ["bottleneck", "wait for a CPU 20%", "schedule was not kept", "7 visits"] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn incomplete_work_is_not_met_without_expectations() {
        let counts = Counts { unsent: 3, delivered: 0, ..clean() };
        let mut report = report(counts);
        let troubles =
            Troubles { first_loss: Some("client 1: gone"), refused: 2, first_refusal: Some("error 103") };
        report.judge(&Expect::default(), None, &troubles);
        let words = report.expectations.iter().map(|it| it.words.as_str()).collect::<Vec<_>>().join("\n");
        for part in [
            "3 of 10 could not be sent",
            "2 were refused; the first: error 103",
            "client 1: gone",
            "none of 100 did",
        ] {
            assert!(words.contains(part), "{part}: {words}");
        }
        assert!(report.expectations.iter().all(|it| !it.met));
        report.judge(&Expect::default(), None, &Troubles::default());
        report.counts = clean();
        report.judge(&Expect::default(), None, &Troubles::default());
        assert!(report.expectations.is_empty(), "only conditions that do not hold are listed");
    }

    #[test]
    fn an_interrupted_run_meets_no_expectation() {
        let mut report = report(clean());
        report.interrupted = Some("SIGINT after 2.0 of 60.0 s".into());
        let expect = Expect {
            expect_lost: Some(0),
            expect_p99: Some(Time(Duration::from_secs(9))),
            ..Expect::default()
        };
        report.judge(&expect, None, &Troubles::default());
        assert_eq!(report.expectations.len(), 2);
        for expectation in &report.expectations {
            assert!(!expectation.met && expectation.words.ends_with("until the run was ended early"));
        }
    }

    #[test]
    fn unmeasured_values_are_not_shown_as_numbers() {
        let limit = Some(Time(Duration::from_secs(1)));
        let expect =
            Expect { expect_p99: limit, expect_max: limit, expect_achieved: Some(0.9), ..Expect::default() };
        let mut report = report(Counts { expected: 100, ..Counts::default() });
        (report.latency, report.achieved_rate, report.deliveries_per_second) = (None, None, None);
        report.tester = TesterReport { cpu: None, cpu_per_million: None, busiest: None, starved: None };
        report.groups = vec![GroupReport {
            name: "fanout".into(),
            rooms: 1,
            members: 10,
            counts: report.counts,
            latency: None,
        }];
        report.warn(0);
        report.judge(&expect, Some(2.0), &Troubles::default());
        let text = report.document().to_string();
        for words in [
            "achieved – for",
            "– deliveries/s",
            "--expect-p99 1s: nothing arrived",
            "--expect-max 1s: nothing arrived",
            "--expect-achieved 0.9: nothing was published",
            "--expect-p99-ratio 2: nothing arrived in one of the phases",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert_eq!(text.matches('–').count(), 2 + 2 + 6, "rates, tester, percentiles: {text}");
        assert!(!text.contains("NaN") && !text.contains("0 µs"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        for place in
            ["/latency", "/achieved_rate", "/deliveries_per_second", "/tester/busiest", "/groups/0/latency"]
        {
            assert!(json.pointer(place).unwrap().is_null(), "{place}");
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

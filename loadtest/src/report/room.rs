//! What rounds found out: medians, ratios, warnings.

use serde::Serialize;

use super::{
    Machine, Verdict,
    document::{Chart, Document, Series, Table},
    median,
};
use crate::{cli::RoomArgs, latency::Latency, ledger::Counts, room::Round};

/// Above this part of a core the tester may be what limits the rate.
pub const BUSY: f64 = 0.9;

/// So may it be when it works this many times as much as the server, on however little of a shared core.
const BUSIER: f64 = 1.25;

/// `cost` or `yardstick`.
#[derive(Debug, Serialize)]
pub struct RoomReport {
    pub what: String,
    pub machine: Machine,
    pub members: usize,
    pub size: usize,
    pub burst: u64,
    pub rounds: Vec<Round>,
    pub median: Option<Medians>,
    /// Over the whole run, the unmeasured round included.
    pub counts: Counts,
    /// Why the first member that was lost was lost.
    pub first_loss: Option<String>,
    pub warnings: Vec<String>,
    #[serde(skip)]
    planned: u32,
    #[serde(skip)]
    paced: bool,
}

/// Medians over the complete rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Medians {
    pub deliveries_per_second: f64,
    /// CPU seconds of the server per million deliveries, user and system.
    pub server_cpu: Option<f64>,
    pub tester_cpu: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// Bytes that a member received for each delivery.
    pub wire_bytes: f64,
}

/// `compare-limit`.
#[derive(Debug, Serialize)]
pub struct CompareReport {
    pub limit: RoomReport,
    pub server: RoomReport,
    /// CPU per delivery, server over limit: the ratio of the medians.
    pub cpu_ratio: Option<f64>,
    /// The smallest and the largest ratio of two neighbouring rounds.
    pub cpu_ratio_range: Option<(f64, f64)>,
    /// Deliveries per second, server over limit.
    pub rate_ratio: Option<f64>,
    /// Median p99, server over limit; only paced rounds compare latencies.
    pub p99_ratio: Option<f64>,
    /// The smallest and the largest ratio of two neighbouring rounds.
    pub p99_ratio_range: Option<(f64, f64)>,
}

impl RoomReport {
    /// An empty report about a room like `args`.
    pub fn new(what: String, args: &RoomArgs) -> Self {
        Self {
            what,
            machine: Machine::this(),
            members: args.members,
            size: args.size,
            burst: args.burst,
            rounds: Vec::new(),
            median: None,
            counts: Counts::default(),
            first_loss: None,
            warnings: Vec::new(),
            planned: args.rounds,
            paced: args.rate.is_some(),
        }
    }

    /// Draws medians and warnings from the rounds and counts.
    pub fn conclude(&mut self) {
        let complete: Vec<&Round> = self.rounds.iter().filter(|round| round.complete).collect();
        let over = |value: fn(&Round) -> f64| median(complete.iter().map(|round| value(round)).collect());
        let server: Vec<f64> = complete.iter().filter_map(|round| Some(round.server_cpu?.total())).collect();
        self.median = over(|round| round.deliveries_per_second).and_then(|deliveries_per_second| {
            Some(Medians {
                deliveries_per_second,
                server_cpu: median(server),
                tester_cpu: over(|round| round.tester_cpu.total())?,
                p50_us: over(|round| round.latency.p50)?,
                p99_us: over(|round| round.latency.p99)?,
                wire_bytes: over(Round::wire_bytes_each)?,
            })
        });
        let count = |test: fn(&Round) -> bool| self.rounds.iter().filter(|round| test(round)).count();
        let bottleneck = count(limited_by_tester);
        let stalls: u32 = self.rounds.iter().map(|round| round.stalls).sum();
        if bottleneck > 0 {
            self.warnings.push(format!(
                "the tester was the bottleneck in {bottleneck} rounds: deliveries/s and latency are its own, CPU \
                 per million deliveries still holds"
            ));
        }
        if stalls > 0 {
            self.warnings
                .push(format!("{stalls} batches ran out of patience: rates and CPU include the waiting"));
        }
        if complete.len() < usize::try_from(self.planned).unwrap_or(usize::MAX) {
            self.warnings.push(format!(
                "ended early: {} of {} rounds are complete",
                complete.len(),
                self.planned
            ));
        }
        if let Some(why) = &self.first_loss {
            self.warnings.push(format!("members were lost; the first: {why}"));
        }
    }

    /// Whether what arrived is what `--expect-lost` allows.
    pub fn verdict(&self, expect_lost: Option<u64>) -> Verdict {
        let Counts { missing, duplicated, out_of_order, .. } = self.counts;
        match expect_lost {
            Some(allowed) if missing > allowed => {
                Verdict::Unexpected(format!("{missing} deliveries are missing, at most {allowed} may be"))
            }
            Some(_) if duplicated + out_of_order > 0 => Verdict::Unexpected(format!(
                "{duplicated} deliveries were duplicated and {out_of_order} out of order"
            )),
            // Without a single complete round nothing has been shown.
            Some(_) if self.median.is_none() => Verdict::Unexpected("no round was completed".into()),
            _ => Verdict::AsExpected,
        }
    }
}

impl CompareReport {
    /// Compares two concluded reports.
    pub fn new(limit: RoomReport, server: RoomReport) -> Self {
        let medians = limit.median.zip(server.median);
        let pairs = || {
            limit
                .rounds
                .iter()
                .zip(&server.rounds)
                .filter(|(limit, server)| limit.complete && server.complete)
        };
        let cpu = |round: &Round| Some(round.server_cpu?.total());
        let p99 = |round: &Round| round.latency.p99;
        let cpu_range = range(pairs().filter_map(|(limit, server)| Some(cpu(server)? / cpu(limit)?)));
        let p99_range = range(pairs().map(|(limit, server)| p99(server) / p99(limit)));
        Self {
            cpu_ratio: medians.and_then(|(limit, server)| Some(server.server_cpu? / limit.server_cpu?)),
            cpu_ratio_range: cpu_range,
            p99_ratio: medians.filter(|_| limit.paced).map(|(limit, server)| server.p99_us / limit.p99_us),
            p99_ratio_range: p99_range.filter(|_| limit.paced),
            rate_ratio: medians
                .map(|(limit, server)| server.deliveries_per_second / limit.deliveries_per_second),
            limit,
            server,
        }
    }

    /// Whether both expectations hold.
    pub fn verdict(
        &self,
        expect_lost: Option<u64>,
        expect_ratio: Option<f64>,
        expect_p99_ratio: Option<f64>,
    ) -> Verdict {
        if let Some((allowed, ratio)) = expect_p99_ratio.zip(self.p99_ratio)
            && ratio > allowed
        {
            return Verdict::Unexpected(format!(
                "p99 is {ratio:.3} × the limit's, at most {allowed} is expected"
            ));
        }
        match (expect_ratio, self.cpu_ratio) {
            (Some(_), None) => {
                Verdict::Unexpected("there is no ratio to judge: is --server-pid given?".into())
            }
            (Some(allowed), Some(ratio)) if ratio > allowed => Verdict::Unexpected(format!(
                "the server costs {ratio:.3} × the limit, at most {allowed} is expected"
            )),
            _ => match self.limit.verdict(expect_lost.map(|_| 0)) {
                Verdict::Unexpected(words) => Verdict::Unexpected(format!("the yardstick failed: {words}")),
                Verdict::AsExpected => self.server.verdict(expect_lost),
            },
        }
    }
}

impl RoomReport {
    /// The report for people.
    pub fn document(&self) -> Document {
        let facts = [Some(self.machine.to_string()), self.medians(), Some(self.books())];
        Document {
            title: self.what.clone(),
            facts: facts.into_iter().flatten().collect(),
            tables: vec![self.table("")],
            charts: charts(&[("server", self)]),
            warnings: self.warnings.clone(),
            expectations: Vec::new(),
        }
    }

    fn table(&self, caption: &str) -> Table {
        let head = [
            "round",
            "seconds",
            "deliveries/s",
            "server CPU s/M (usr+sys)",
            "of core",
            "tester CPU s/M",
            "of core",
            "p50 µs",
            "p99 µs",
            "p99.9 µs",
            "max µs",
        ];
        let mut table = Table::new(caption, &head);
        for (number, round) in (1..).zip(&self.rounds) {
            let server =
                round.server_cpu.map(|cpu| format!("{:.3} ({:.3}+{:.3})", cpu.total(), cpu.user, cpu.system));
            let Latency { p50, p99, p999, max, .. } = round.latency;
            table.row(
                [
                    format!("{number}{}", if round.complete { "" } else { " (incomplete)" }),
                    format!("{:.3}", round.seconds),
                    format!("{:.0}", round.deliveries_per_second),
                    server.unwrap_or_else(|| "-".into()),
                    round.server_share.map_or_else(|| "-".into(), percent),
                    format!("{:.3}", round.tester_cpu.total()),
                    percent(round.tester_share),
                ]
                .into_iter()
                .chain([p50, p99, p999, max].map(|micros| format!("{micros:.1}"))),
            );
        }
        table
    }

    fn medians(&self) -> Option<String> {
        let median = self.median?;
        let server = median.server_cpu.map_or_else(|| "-".to_owned(), |cpu| format!("{cpu:.3}"));
        Some(format!(
            "medians: {:.0} deliveries/s, server CPU {server} s/M, tester CPU {:.3} s/M, p50 {:.1} µs, p99 {:.1} µs, \
             {:.0} bytes received per delivery",
            median.deliveries_per_second, median.tester_cpu, median.p50_us, median.p99_us, median.wire_bytes,
        ))
    }

    fn books(&self) -> String {
        let counts = self.counts;
        format!(
            "delivered {} of {}, missing {}, duplicated {}, out of order {}, foreign {}, members lost {}",
            counts.delivered,
            counts.expected,
            counts.missing,
            counts.duplicated,
            counts.out_of_order,
            counts.foreign,
            counts.members_lost,
        )
    }
}

impl CompareReport {
    /// The report for people.
    pub fn document(&self) -> Document {
        let Self { limit, server, .. } = self;
        let within = |range: Option<(f64, f64)>| {
            range.map_or_else(String::new, |(low, high)| format!(" (rounds {low:.3} to {high:.3})"))
        };
        let mut facts = vec![server.machine.to_string(), limit.what.clone()];
        for (name, leg) in [("bare loop", limit), ("server", server)] {
            facts.extend(leg.medians().map(|words| format!("{name}, {words}")));
            facts.push(format!("{name}: {}", leg.books()));
        }
        facts.push(match self.cpu_ratio {
            Some(ratio) => {
                format!("CPU per delivery: {ratio:.3} × the bare loop{}", within(self.cpu_ratio_range))
            }
            None => "CPU per delivery: not measured (no --server-pid, or no complete round)".into(),
        });
        match (self.p99_ratio, self.rate_ratio) {
            // Paced, both deliver what was offered.
            (Some(ratio), _) => {
                let range = within(self.p99_ratio_range);
                facts.push(format!("p99: {ratio:.3} × the bare loop at the same pace{range}"));
            }
            (None, Some(ratio)) => facts.push(format!("deliveries/s: {ratio:.3} × the bare loop")),
            (None, None) => {}
        }
        let warnings = limit.warnings.iter().map(|words| format!("the bare loop: {words}"));
        Document {
            title: server.what.clone(),
            facts,
            tables: vec![limit.table("bare loop"), server.table("server")],
            charts: charts(&[("bare loop", limit), ("server", server)]),
            warnings: warnings.chain(server.warnings.iter().cloned()).collect(),
            expectations: Vec::new(),
        }
    }
}

/// What each round cost, and how long deliveries took in it.
fn charts(legs: &[(&str, &RoomReport)]) -> Vec<Chart> {
    type Value = fn(&Round) -> Option<f64>;
    let plot = |title: &str, y: &str, value: Value| Chart {
        title: title.into(),
        x: "round".into(),
        y: y.into(),
        marks: Vec::new(),
        series: legs
            .iter()
            .map(|(name, leg)| Series {
                name: (*name).into(),
                points: (1_u32..)
                    .zip(&leg.rounds)
                    .filter_map(|(number, round)| Some((f64::from(number), value(round)?)))
                    .collect(),
            })
            .collect(),
    };
    vec![
        plot("CPU per delivery", "µs", |round| Some(round.server_cpu?.total())),
        plot("99th percentile of latency", "µs", |round| Some(round.latency.p99)),
        plot("Deliveries", "per second", |round| Some(round.deliveries_per_second)),
    ]
}

/// The smallest and the largest.
pub fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |ends, value| {
        let (low, high) = ends.unwrap_or((value, value));
        Some((low.min(value), high.max(value)))
    })
}

fn limited_by_tester(round: &Round) -> bool {
    let busier = round.server_share.is_some_and(|server| round.tester_share > BUSIER * server);
    round.tester_share > BUSY || busier
}

pub fn percent(share: f64) -> String {
    format!("{:.0}%", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Cpu;

    fn args() -> RoomArgs {
        RoomArgs {
            members: 10,
            messages: 100,
            size: 256,
            payload: crate::payload::Payload::Dots,
            burst: 1,
            rounds: 3,
            warmup: None,
            rate: None,
            patience: crate::cli::Time(std::time::Duration::from_secs(2)),
        }
    }

    fn round(cpu: f64) -> Round {
        Round {
            messages: 100,
            seconds: 1.0,
            delivered: 1000,
            deliveries_per_second: 1000.0,
            server_cpu: Some(Cpu { user: 0.0, system: cpu }),
            tester_cpu: Cpu { user: 0.1, system: 0.1 },
            server_share: Some(0.5),
            tester_share: 0.1,
            latency: Latency::default(),
            wire_bytes: 260_000,
            stalls: 0,
            complete: true,
        }
    }

    fn report(rounds: Vec<Round>, counts: Counts) -> RoomReport {
        let mut report = RoomReport { rounds, counts, ..RoomReport::new("test".into(), &args()) };
        report.conclude();
        report
    }

    #[test]
    fn a_clean_run_meets_every_expectation() {
        let server = report(vec![round(6.0), round(6.6), round(7.0)], Counts::default());
        assert!(server.warnings.is_empty(), "{:?}", server.warnings);
        assert_eq!(server.verdict(Some(0)), Verdict::AsExpected);
        let compared = CompareReport::new(report(vec![round(6.0); 3], Counts::default()), server);
        assert!((compared.cpu_ratio.unwrap() - 1.1).abs() < 1e-9);
        let (low, high) = compared.cpu_ratio_range.unwrap();
        assert!((low - 1.0).abs() < 1e-9 && (high - 7.0 / 6.0).abs() < 1e-9);
        assert_eq!(compared.verdict(Some(0), Some(1.11), None), Verdict::AsExpected);
        assert!(matches!(compared.verdict(Some(0), Some(1.05), None), Verdict::Unexpected(_)));
        let server = report(vec![round(6.0); 3], Counts::default());
        let broken = CompareReport::new(report(vec![], Counts::default()), server);
        assert!(
            matches!(broken.verdict(Some(0), None, None), Verdict::Unexpected(_)),
            "no yardstick, no comparison"
        );
    }

    #[test]
    fn each_fault_fails_the_run() {
        let clean = Counts { expected: 10, delivered: 10, ..Counts::default() };
        for faulty in [
            Counts { missing: 1, ..clean },
            Counts { duplicated: 1, ..clean },
            Counts { out_of_order: 1, ..clean },
        ] {
            let report = report(vec![round(6.0); 3], faulty);
            assert!(matches!(report.verdict(Some(0)), Verdict::Unexpected(_)), "{faulty:?}");
            assert_eq!(report.verdict(None), Verdict::AsExpected);
        }
        assert!(matches!(report(vec![], clean).verdict(Some(0)), Verdict::Unexpected(_)));
    }

    #[test]
    fn warnings_name_what_spoils_a_number() {
        let slow = Round { tester_share: 0.95, ..round(6.0) };
        let starved = Round { tester_share: 0.4, server_share: Some(0.3), ..round(6.0) };
        let cut = Round { complete: false, stalls: 2, ..round(6.0) };
        let report = report(vec![slow, starved, cut], Counts::default());
        assert_eq!(report.warnings.len(), 3, "{:?}", report.warnings);
        let text = report.document().to_string();
        for words in ["bottleneck in 2 rounds", "2 batches", "2 of 3 rounds", "(incomplete)"] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}

//! The results of rounds: medians, ratios, warnings.

use serde::Serialize;

use super::{
    Machine, Verdict, at_most,
    document::{Chart, Document, Expectation, Series, Table},
    median, or_nothing, ratio, unmet,
};
use crate::{acks, cli::RoomArgs, latency::Latency, ledger::Counts, room::Round};

/// Above this fraction of a core the tester may limit the rate.
pub const BUSY: f64 = 0.9;

/// It may also do so when it uses this many times the server's CPU, however small its share of a core.
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
    /// Over the whole run, including the unmeasured round.
    pub counts: Counts,
    /// Why the first lost member was lost.
    pub first_loss: Option<String>,
    /// Why the run was ended early.
    pub interrupted: Option<String>,
    pub warnings: Vec<String>,
    pub expectations: Vec<Expectation>,
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
    pub tester_cpu: Option<f64>,
    pub p50_us: f64,
    pub p99_us: f64,
    /// Bytes received by a member per delivery.
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
    /// Why the run was ended early.
    pub interrupted: Option<String>,
    pub expectations: Vec<Expectation>,
}

impl RoomReport {
    /// An empty report for a room as set by `args`.
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
            interrupted: None,
            warnings: Vec::new(),
            expectations: Vec::new(),
            planned: args.rounds,
            paced: args.rate.is_some(),
        }
    }

    /// How many rounds are complete.
    pub fn complete(&self) -> usize {
        self.rounds.iter().filter(|round| round.complete).count()
    }

    /// Derives medians and warnings from the rounds and counts.
    pub fn conclude(&mut self) {
        let complete: Vec<&Round> = self.rounds.iter().filter(|round| round.complete).collect();
        let over = |value: fn(&Round) -> Option<f64>| {
            median(complete.iter().filter_map(|round| value(round)).collect())
        };
        self.median = over(|round| Some(round.deliveries_per_second)).and_then(|deliveries_per_second| {
            Some(Medians {
                deliveries_per_second,
                server_cpu: over(|round| Some(round.server_cpu?.total())),
                tester_cpu: over(|round| Some(round.tester_cpu?.total())),
                p50_us: over(|round| Some(round.latency?.p50))?,
                p99_us: over(|round| Some(round.latency?.p99))?,
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
            self.warnings.push(format!(
                "{stalls} batches were given up after --patience: rates and CPU include the waiting"
            ));
        }
        if let Some(why) = &self.interrupted {
            self.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
        }
    }

    /// Compares the losses with `--expect-lost`, and the complete rounds with those requested. The latter is
    /// listed only if some are missing.
    pub fn judge(&mut self, expect_lost: Option<u64>) {
        let complete = self.complete();
        if complete < usize::try_from(self.planned).unwrap_or(usize::MAX) || self.median.is_none() {
            let words = format!("rounds are completed: {complete} of {} are", self.planned);
            self.expectations.push(Expectation { words, met: false });
        }
        let Counts { expected, missing, duplicated, out_of_order, members_lost, .. } = self.counts;
        if let Some(why) = &self.first_loss {
            let words = format!("members stay connected: {members_lost} were lost; the first: {why}");
            self.expectations.push(Expectation { words, met: false });
        }
        if let Some(allowed) = expect_lost {
            let words = format!(
                "--expect-lost {allowed}: {missing} missing of {expected}, {duplicated} duplicated, {out_of_order} out of \
                 order"
            );
            let met = missing <= allowed && duplicated + out_of_order == 0;
            self.expectations.push(Expectation { words, met });
        }
        unmet(&mut self.expectations, self.interrupted.as_deref());
    }

    /// Whether all expectations hold.
    pub fn verdict(&self) -> Verdict {
        Verdict::of(&self.expectations, self.interrupted.as_deref())
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
        let p99 = |round: &Round| Some(round.latency?.p99);
        let cpu_range = range(pairs().filter_map(|(limit, server)| ratio(cpu(server)?, cpu(limit)?)));
        let p99_range = range(pairs().filter_map(|(limit, server)| ratio(p99(server)?, p99(limit)?)));
        Self {
            cpu_ratio: medians.and_then(|(limit, server)| ratio(server.server_cpu?, limit.server_cpu?)),
            cpu_ratio_range: cpu_range,
            p99_ratio: medians
                .filter(|_| limit.paced)
                .and_then(|(limit, server)| ratio(server.p99_us, limit.p99_us)),
            p99_ratio_range: p99_range.filter(|_| limit.paced),
            rate_ratio: medians
                .and_then(|(limit, server)| ratio(server.deliveries_per_second, limit.deliveries_per_second)),
            interrupted: server.interrupted.clone(),
            expectations: Vec::new(),
            limit,
            server,
        }
    }

    /// Checks the expectations for both legs and their ratios.
    pub fn judge(
        &mut self,
        expect_lost: Option<u64>,
        expect_ratio: Option<f64>,
        expect_p99_ratio: Option<f64>,
    ) {
        self.limit.judge(expect_lost.map(|_| 0));
        self.server.judge(expect_lost);
        for (leg, report) in [("the bare loop", &self.limit), ("the server", &self.server)] {
            let of_leg = report.expectations.iter().map(|Expectation { words, met }| Expectation {
                words: format!("{leg}: {words}"),
                met: *met,
            });
            self.expectations.extend(of_leg);
        }
        for (flag, limit, ratio) in [
            ("--expect-ratio", expect_ratio, self.cpu_ratio),
            ("--expect-p99-ratio", expect_p99_ratio, self.p99_ratio),
        ] {
            let Some(limit) = limit else { continue };
            let found = ratio.map_or_else(
                || "there is no ratio to judge (no --server-pid, or no complete round)".to_owned(),
                |ratio| format!("{ratio:.3} × the bare loop's"),
            );
            let words = format!("{flag} {limit}: {found}");
            self.expectations.push(Expectation { words, met: at_most(ratio, limit) });
        }
        unmet(&mut self.expectations, self.interrupted.as_deref());
    }

    /// Whether all expectations hold.
    pub fn verdict(&self) -> Verdict {
        Verdict::of(&self.expectations, self.interrupted.as_deref())
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
            expectations: self.expectations.clone(),
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
            let each = |Latency { p50, p99, p999, max, .. }| [p50, p99, p999, max];
            let latency = round.latency.map(each).map_or([None; 4], |cells| cells.map(Some));
            table.row(
                [
                    format!("{number}{}", if round.complete { "" } else { " (incomplete)" }),
                    format!("{:.3}", round.seconds),
                    format!("{:.0}", round.deliveries_per_second),
                    or_nothing(server, |cell| cell),
                    or_nothing(round.server_share, percent),
                    or_nothing(round.tester_cpu, |cpu| format!("{:.3}", cpu.total())),
                    percent(round.tester_share),
                ]
                .into_iter()
                .chain(latency.map(|cell| or_nothing(cell, |micros| format!("{micros:.1}")))),
            );
        }
        table
    }

    fn medians(&self) -> Option<String> {
        let median = self.median?;
        let [server, tester] =
            [median.server_cpu, median.tester_cpu].map(|cpu| or_nothing(cpu, |cpu| format!("{cpu:.3}")));
        Some(format!(
            "medians: {:.0} deliveries/s, server CPU {server} s/M, tester CPU {tester} s/M, p50 {:.1} µs, p99 {:.1} µs, \
             {:.0} bytes received per delivery",
            median.deliveries_per_second, median.p50_us, median.p99_us, median.wire_bytes,
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
    /// A warning if both sides cannot be compared. Batches are not: how many messages share a write depends on
    /// the side.
    fn sizes(&self) -> Option<String> {
        let (limit, server) = self.limit.median.zip(self.server.median).filter(|_| self.limit.burst == 1)?;
        acks::warning(&[("the bare loop", limit.wire_bytes), ("the server", server.wire_bytes)])
    }

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
            // With a schedule, both deliver what was offered.
            (Some(ratio), _) => {
                let range = within(self.p99_ratio_range);
                facts.push(format!("p99: {ratio:.3} × the bare loop at the same pace{range}"));
            }
            (None, Some(ratio)) => facts.push(format!("deliveries/s: {ratio:.3} × the bare loop")),
            (None, None) => {}
        }
        let warnings = limit.warnings.iter().map(|words| format!("the bare loop: {words}"));
        let warnings = warnings.chain(self.sizes());
        Document {
            title: server.what.clone(),
            facts,
            tables: vec![limit.table("bare loop"), server.table("server")],
            charts: charts(&[("bare loop", limit), ("server", server)]),
            warnings: warnings.chain(server.warnings.iter().cloned()).collect(),
            expectations: self.expectations.clone(),
        }
    }
}

/// Plots of each round's cost and latency.
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
        plot("99th percentile of latency", "µs", |round| Some(round.latency?.p99)),
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
            tester_cpu: Some(Cpu { user: 0.1, system: 0.1 }),
            server_share: Some(0.5),
            tester_share: 0.1,
            latency: Some(Latency::default()),
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

    fn verdict(mut report: RoomReport, expect_lost: Option<u64>) -> Verdict {
        report.judge(expect_lost);
        report.verdict()
    }

    #[test]
    fn a_clean_run_meets_every_expectation() {
        let server = || report(vec![round(6.0), round(6.6), round(7.0)], Counts::default());
        assert!(server().warnings.is_empty(), "{:?}", server().warnings);
        assert_eq!(verdict(server(), Some(0)), Verdict::AsExpected);
        let compared = |expect_ratio| {
            let mut compared = CompareReport::new(report(vec![round(6.0); 3], Counts::default()), server());
            compared.judge(Some(0), Some(expect_ratio), None);
            compared
        };
        assert!((compared(1.11).cpu_ratio.unwrap() - 1.1).abs() < 1e-9);
        let (low, high) = compared(1.11).cpu_ratio_range.unwrap();
        assert!((low - 1.0).abs() < 1e-9 && (high - 7.0 / 6.0).abs() < 1e-9);
        assert_eq!(compared(1.11).verdict(), Verdict::AsExpected);
        assert!(matches!(compared(1.05).verdict(), Verdict::Unexpected(_)));
        let larger = report(vec![Round { wire_bytes: 377_000, ..round(6.0) }; 3], Counts::default());
        let apart = CompareReport::new(report(vec![round(6.0); 3], Counts::default()), larger);
        let warnings = apart.document().warnings;
        assert!(warnings[0].contains("the server (377 bytes) on the server's time"), "{warnings:?}");
        assert!(compared(1.11).document().warnings.is_empty());
        let mut broken = CompareReport::new(report(vec![], Counts::default()), server());
        broken.judge(None, Some(2.0), None);
        let Verdict::Unexpected(words) = broken.verdict() else {
            panic!("there is no comparison without a yardstick")
        };
        for part in
            ["the bare loop: rounds are completed: 0 of 3", "--expect-ratio 2: there is no ratio to judge"]
        {
            assert!(words.contains(part), "{part}: {words}");
        }
    }

    #[test]
    fn each_fault_fails_the_run() {
        let clean = Counts { expected: 10, delivered: 10, ..Counts::default() };
        for faulty in [
            Counts { missing: 1, ..clean },
            Counts { duplicated: 1, ..clean },
            Counts { out_of_order: 1, ..clean },
        ] {
            let report = || report(vec![round(6.0); 3], faulty);
            assert!(matches!(verdict(report(), Some(0)), Verdict::Unexpected(_)), "{faulty:?}");
            assert_eq!(verdict(report(), None), Verdict::AsExpected);
        }
        assert!(matches!(verdict(report(vec![], clean), None), Verdict::Unexpected(_)), "nothing was done");
        let interrupted =
            RoomReport { interrupted: Some("SIGINT".into()), ..report(vec![round(6.0)], clean) };
        assert!(matches!(verdict(interrupted, None), Verdict::Interrupted(_)));
    }

    #[test]
    fn a_round_in_which_nothing_arrived_has_no_cost() {
        let nothing = Round {
            delivered: 0,
            deliveries_per_second: 0.0,
            server_cpu: None,
            tester_cpu: None,
            latency: None,
            complete: false,
            ..round(6.0)
        };
        assert_eq!(nothing.wire_bytes_each(), None);
        let report = report(vec![nothing], Counts::default());
        assert!(report.median.is_none());
        let text = report.document().to_string();
        assert_eq!(text.matches('–').count(), 6, "CPU twice, and four times: {text}");
    }

    #[test]
    fn warnings_name_unreliable_numbers() {
        let slow = Round { tester_share: 0.95, ..round(6.0) };
        let starved = Round { tester_share: 0.4, server_share: Some(0.3), ..round(6.0) };
        let cut = Round { complete: false, stalls: 2, ..round(6.0) };
        let report = report(vec![slow, starved, cut], Counts::default());
        assert_eq!(report.warnings.len(), 2, "{:?}", report.warnings);
        let text = report.document().to_string();
        for words in ["bottleneck in 2 rounds", "2 batches", "(incomplete)"] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}

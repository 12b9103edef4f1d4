//! Throughput: `intake` and `publish`, compared with a path without a gateway.

use serde::Serialize;

use super::{
    Machine, Verdict, at_least,
    document::{Document, Expectation, Table},
    median, or_nothing, ratio,
    room::BUSY,
    unmet,
};
use crate::{cli::flow::Flow, ledger::Counts, process::Cpu};

/// `intake` or `publish`.
#[derive(Debug, Serialize)]
pub struct FlowReport {
    pub what: String,
    pub machine: Machine,
    /// Without a gateway.
    pub bare: Vec<FlowRound>,
    pub server: Vec<FlowRound>,
    pub median: Option<Medians>,
    /// Publications per second, server over bare: the median of neighbouring rounds' ratios.
    pub ratio: Option<f64>,
    pub ratio_range: Option<(f64, f64)>,
    /// Deliveries through the server, over the whole run, including the unmeasured round.
    pub counts: Counts,
    /// Publications missing on the path without a gateway.
    pub bare_missing: u64,
    /// Why the first lost connection was lost.
    pub first_loss: Option<String>,
    /// Why the run was ended early.
    pub interrupted: Option<String>,
    pub warnings: Vec<String>,
    pub expectations: Vec<Expectation>,
}

/// Medians over the rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Medians {
    pub bare_per_second: f64,
    pub server_per_second: f64,
    /// Publications per second of the server's CPU time: its rate if it had a core and never waited.
    pub server_per_core: Option<f64>,
    /// CPU seconds per million publications.
    pub server_cpu: Option<f64>,
    pub redis_cpu: Option<f64>,
}

/// One round.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct FlowRound {
    pub messages: u64,
    pub seconds: f64,
    /// `None` if nothing arrived.
    pub per_second: Option<f64>,
    /// Whether everything arrived.
    pub complete: bool,
    /// CPU seconds per million publications, of each participant.
    pub server_cpu: Option<Cpu>,
    pub redis_cpu: Option<Cpu>,
    pub subscriber_cpu: Option<Cpu>,
    pub tester_cpu: Option<Cpu>,
}

impl FlowReport {
    /// An empty report.
    pub fn new(what: String) -> Self {
        Self {
            what,
            machine: Machine::this(),
            bare: Vec::new(),
            server: Vec::new(),
            median: None,
            ratio: None,
            ratio_range: None,
            counts: Counts::default(),
            bare_missing: 0,
            first_loss: None,
            interrupted: None,
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    /// Adds `published` publications through the server.
    pub fn account(&mut self, published: u64) {
        self.counts.expected = published;
        self.counts.missing = published.saturating_sub(self.counts.delivered);
    }

    /// Derives medians, warnings and expectations from the rounds and counts.
    pub fn conclude(&mut self, args: &Flow) {
        let pairs = self.bare.iter().zip(&self.server);
        let ratios: Vec<f64> = pairs
            .filter(|(bare, server)| bare.complete && server.complete)
            .filter_map(|(bare, server)| ratio(server.per_second?, bare.per_second?))
            .collect();
        if let Some((first, rest)) = ratios.split_first() {
            let range = |(low, high): (f64, f64), &ratio: &f64| (low.min(ratio), high.max(ratio));
            self.ratio_range = Some(rest.iter().fold((*first, *first), range));
        }
        self.ratio = median(ratios);
        let of = |rounds: &[FlowRound], value: fn(&FlowRound) -> Option<f64>| {
            median(rounds.iter().filter(|round| round.complete).filter_map(value).collect())
        };
        let rate: fn(&FlowRound) -> Option<f64> = |round| round.per_second;
        let server_cpu = of(&self.server, |round| Some(round.server_cpu?.total()));
        self.median = of(&self.bare, rate).zip(of(&self.server, rate)).map(|(bare, server)| Medians {
            bare_per_second: bare,
            server_per_second: server,
            server_per_core: server_cpu.and_then(|cpu| ratio(1e6, cpu)),
            server_cpu,
            redis_cpu: of(&self.server, |round| Some(round.redis_cpu?.total())),
        });
        let all = self.server.len();
        let others: fn(&FlowRound) -> bool = |round| {
            let busy = |cpu: Option<Cpu>| {
                cpu.zip(round.per_second).is_some_and(|(cpu, rate)| cpu.total() * rate / 1e6 > BUSY)
            };
            busy(round.redis_cpu) || busy(round.tester_cpu)
        };
        let full = self.server.iter().filter(|round| others(round)).count();
        if full > 0 {
            self.warnings.push(format!(
                "Redis or the tester used up a core in {full} of {all} rounds: they limit the rate; the server's CPU time \
                 still holds"
            ));
        }
        if let Some(why) = &self.interrupted {
            self.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
        }
        self.judge(args);
        unmet(&mut self.expectations, self.interrupted.as_deref());
    }

    /// How many rounds are complete, without and with the server.
    pub fn complete(&self) -> usize {
        self.bare.iter().zip(&self.server).filter(|(bare, server)| bare.complete && server.complete).count()
    }

    /// Checks expectations, and conditions that must hold in any case; the latter are listed only if they do
    /// not hold.
    fn judge(&mut self, args: &Flow) {
        let complete = self.complete();
        if complete < args.rounds as usize {
            let words = format!("rounds are completed: {complete} of {} are", args.rounds);
            self.expectations.push(Expectation { words, met: false });
        }
        if let Some(why) = &self.first_loss {
            let words = format!("clients stay connected: some were lost; the first: {why}");
            self.expectations.push(Expectation { words, met: false });
        }
        if let Some(allowed) = args.expect_lost {
            let Counts { missing, duplicated, out_of_order, foreign, expected, .. } = self.counts;
            let words = format!(
                "--expect-lost {allowed}: {missing} missing of {expected}, {duplicated} duplicated, {out_of_order} out \
                 of order, {foreign} foreign"
            );
            let met = missing <= allowed && duplicated + out_of_order + foreign == 0 && expected > 0;
            self.expectations.push(Expectation { words, met });
        }
        let unknown = || "nothing was measured".to_owned();
        let ratio = args.expect_ratio.map(|least| {
            let found =
                self.ratio.map_or_else(unknown, |found| format!("{found:.3} × the rate without a server"));
            (format!("--expect-ratio {least}: {found}"), at_least(self.ratio, least))
        });
        let rate = args.expect_per_core.map(|least| {
            let per_core = self.median.and_then(|median| median.server_per_core);
            let found = per_core
                .map_or_else(unknown, |found| format!("{found:.0} per second of the server's CPU time"));
            (format!("--expect-per-core {least}: {found}"), at_least(per_core, least))
        });
        self.expectations.extend(match (ratio, rate) {
            (Some((ratio, one)), Some((rate, other))) => {
                Some(Expectation { words: format!("{ratio}; or {rate}"), met: one || other })
            }
            (one, other) => one.or(other).map(|(words, met)| Expectation { words, met }),
        });
    }

    /// Whether the expectations hold.
    pub fn verdict(&self) -> Verdict {
        Verdict::of(&self.expectations, self.interrupted.as_deref())
    }

    /// The report as it is printed.
    pub fn document(&self) -> Document {
        let mut table = Table::new(
            "Rounds; CPU seconds per million publications",
            &["", "seconds", "per second", "server", "Redis", "bare subscriber", "tester"],
        );
        let cell = |cpu: Option<Cpu>| or_nothing(cpu, |cpu| format!("{:.3}", cpu.total()));
        for number in 0..self.bare.len().max(self.server.len()) {
            for (name, rounds) in [("bare", &self.bare), ("server", &self.server)] {
                let Some(round) = rounds.get(number) else { continue };
                table.row([
                    format!("{name} {}{}", number + 1, if round.complete { "" } else { " (incomplete)" }),
                    format!("{:.2}", round.seconds),
                    or_nothing(round.per_second, |rate| format!("{rate:.0}")),
                    cell(round.server_cpu),
                    cell(round.redis_cpu),
                    cell(round.subscriber_cpu),
                    cell(round.tester_cpu),
                ]);
            }
        }
        let mut facts = vec![self.machine.to_string()];
        if let (Some(median), Some(ratio), Some((low, high))) = (self.median, self.ratio, self.ratio_range) {
            facts.push(format!(
                "publications/s: {:.0}, {ratio:.3} × the {:.0} without a server (rounds {low:.3} to {high:.3})",
                median.server_per_second, median.bare_per_second,
            ));
            facts.extend(median.server_cpu.zip(median.server_per_core).map(|(cpu, rate)| {
                format!("CPU of the server: {cpu:.3} µs per publication, so {rate:.0} per second of one core")
            }));
        }
        let Counts { expected, delivered, missing, duplicated, out_of_order, foreign, members_lost } =
            self.counts;
        facts.push(format!(
            "delivered {delivered} of {expected}, missing {missing}, duplicated {duplicated}, out of order \
             {out_of_order}, foreign {foreign}, members lost {members_lost}; without a server missing {}",
            self.bare_missing
        ));
        Document {
            title: self.what.clone(),
            facts,
            tables: vec![table],
            charts: Vec::new(),
            warnings: self.warnings.clone(),
            expectations: self.expectations.clone(),
        }
    }
}

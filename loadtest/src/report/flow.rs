//! How much passes: `intake` and `publish`, beside a way without a gateway.

use serde::Serialize;

use super::{
    Machine, Verdict,
    document::{Document, Expectation, Table},
    median,
    room::BUSY,
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
    /// What came through the server, over the whole run, the unmeasured round included.
    pub counts: Counts,
    /// What did not come through without one.
    pub bare_missing: u64,
    pub warnings: Vec<String>,
    pub expectations: Vec<Expectation>,
}

/// Medians over the rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Medians {
    pub bare_per_second: f64,
    pub server_per_second: f64,
    /// Publications per second of the server's CPU time: what it would take if it had a core and waited for nobody.
    pub server_per_core: Option<f64>,
    /// CPU seconds per million publications.
    pub server_cpu: Option<f64>,
    pub redis_cpu: f64,
}

/// One round.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct FlowRound {
    pub messages: u64,
    pub seconds: f64,
    pub per_second: f64,
    /// Whether everything arrived.
    pub complete: bool,
    /// CPU seconds per million publications, of everybody who takes part.
    pub server_cpu: Option<Cpu>,
    pub redis_cpu: Cpu,
    pub subscriber_cpu: Option<Cpu>,
    pub tester_cpu: Cpu,
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
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    /// Draws medians, warnings and expectations from the rounds and counts.
    pub fn conclude(&mut self, args: &Flow, first_loss: Option<&str>) {
        let pairs = self.bare.iter().zip(&self.server);
        let ratios: Vec<f64> = pairs
            .filter(|(bare, server)| bare.complete && server.complete)
            .map(|(bare, server)| server.per_second / bare.per_second)
            .collect();
        if let Some((first, rest)) = ratios.split_first() {
            let range = |(low, high): (f64, f64), &ratio: &f64| (low.min(ratio), high.max(ratio));
            self.ratio_range = Some(rest.iter().fold((*first, *first), range));
        }
        self.ratio = median(ratios);
        let of = |rounds: &[FlowRound], value: fn(&FlowRound) -> Option<f64>| {
            median(rounds.iter().filter(|round| round.complete).filter_map(value).collect())
        };
        let rate: fn(&FlowRound) -> Option<f64> = |round| Some(round.per_second);
        let server_cpu = of(&self.server, |round| Some(round.server_cpu?.total()));
        self.median = of(&self.bare, rate).zip(of(&self.server, rate)).map(|(bare, server)| Medians {
            bare_per_second: bare,
            server_per_second: server,
            server_per_core: server_cpu.map(|cpu| 1e6 / cpu),
            server_cpu,
            redis_cpu: of(&self.server, |round| Some(round.redis_cpu.total())).unwrap_or_default(),
        });
        let all = self.server.len();
        let others: fn(&FlowRound) -> bool = |round| {
            let busy = |cpu: Cpu| cpu.total() * round.per_second / 1e6 > BUSY;
            busy(round.redis_cpu) || busy(round.tester_cpu)
        };
        let full = self.server.iter().filter(|round| others(round)).count();
        if full > 0 {
            self.warnings.push(format!(
                "Redis or the tester used up a core in {full} of {all} rounds: the rate is theirs, the server's CPU time \
                 still holds"
            ));
        }
        if let Some(why) = first_loss {
            self.warnings.push(format!("connections were lost; the first: {why}"));
        }
        if self.ratio_rounds() < args.rounds as usize {
            self.warnings.push(format!("{} of {} rounds are complete", self.ratio_rounds(), args.rounds));
        }
        self.judge(args);
    }

    fn ratio_rounds(&self) -> usize {
        self.bare.iter().zip(&self.server).filter(|(bare, server)| bare.complete && server.complete).count()
    }

    fn judge(&mut self, args: &Flow) {
        if let Some(allowed) = args.expect_lost {
            let Counts { missing, duplicated, out_of_order, foreign, expected, .. } = self.counts;
            let words = format!(
                "--expect-lost {allowed}: {missing} missing of {expected}, {duplicated} duplicated, {out_of_order} out \
                 of order, {foreign} foreign"
            );
            let met = missing <= allowed && duplicated + out_of_order + foreign == 0 && expected > 0;
            self.expectations.push(Expectation { words, met });
        }
        let ratio = args.expect_ratio.map(|least| {
            let found = self.ratio.unwrap_or(f64::NAN);
            (format!("--expect-ratio {least}: {found:.3} × the rate without a server"), found >= least)
        });
        let rate = args.expect_per_core.map(|least| {
            let found = self.median.and_then(|median| median.server_per_core).unwrap_or(f64::NAN);
            let words = format!("--expect-per-core {least}: {found:.0} per second of the server's CPU time");
            (words, found >= least)
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
        Verdict::of(&self.expectations)
    }

    /// The report as it is printed.
    pub fn document(&self) -> Document {
        let mut table = Table::new(
            "Rounds; CPU seconds per million publications",
            &["", "seconds", "per second", "server", "Redis", "bare subscriber", "tester"],
        );
        let cell = |cpu: Option<Cpu>| cpu.map_or("-".to_owned(), |cpu| format!("{:.3}", cpu.total()));
        for number in 0..self.bare.len().max(self.server.len()) {
            for (name, rounds) in [("bare", &self.bare), ("server", &self.server)] {
                let Some(round) = rounds.get(number) else { continue };
                table.row([
                    format!("{name} {}{}", number + 1, if round.complete { "" } else { " (incomplete)" }),
                    format!("{:.2}", round.seconds),
                    format!("{:.0}", round.per_second),
                    cell(round.server_cpu),
                    cell(Some(round.redis_cpu)),
                    cell(round.subscriber_cpu),
                    cell(Some(round.tester_cpu)),
                ]);
            }
        }
        let mut facts = vec![self.machine.to_string()];
        if let Some((median, (low, high))) = self.median.zip(self.ratio_range) {
            facts.push(format!(
                "publications/s: {:.0}, {:.3} × the {:.0} without a server (rounds {low:.3} to {high:.3})",
                median.server_per_second,
                self.ratio.unwrap_or_default(),
                median.bare_per_second,
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

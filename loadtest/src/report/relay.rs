//! The limit through Redis, and the gateway compared with it.

use serde::Serialize;

use super::{
    Machine, at_most,
    document::{Chart, Document, Expectation, Series, Table},
    median, or_nothing, ratio,
    room::{BUSY, percent, range},
    unmet,
};
use crate::{
    acks,
    cli::relay::{CompareRelay, SmallRooms},
    latency::Latency,
    ledger::Counts,
};

/// Above this median latency, in microseconds, messages wait in a queue that some CPU does not empty.
const QUEUED: f64 = 10_000.0;

/// `relay` or `compare-relay`.
#[derive(Debug, Serialize)]
pub struct RelayReport {
    pub what: String,
    pub machine: Machine,
    pub rates: Vec<Rate>,
    /// Over all sides and the whole run, including the unmeasured rounds.
    pub counts: Counts,
    /// Why the run was ended early.
    pub interrupted: Option<String>,
    pub warnings: Vec<String>,
    pub expectations: Vec<Expectation>,
}

/// What was measured at one rate.
#[derive(Debug, Serialize)]
pub struct Rate {
    /// Messages per second.
    pub rate: f64,
    /// The relay, then the gateways.
    pub legs: Vec<Leg>,
}

/// One side at one rate.
#[derive(Debug, Serialize)]
pub struct Leg {
    pub name: String,
    pub rounds: Vec<RelayRound>,
    pub median: Option<Medians>,
    /// CPU per delivery, over the relay's: the ratio of the medians, and the smallest and the largest of two
    /// neighbouring rounds.
    pub cpu_ratio: Option<f64>,
    pub cpu_ratio_range: Option<(f64, f64)>,
    /// The same for the median latency.
    pub p50_ratio: Option<f64>,
    pub p50_ratio_range: Option<(f64, f64)>,
    /// System calls of the server per message, in a round of its own; `None` if they are not counted.
    pub syscalls: Option<f64>,
}

/// One round.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct RelayRound {
    pub messages: u64,
    pub delivered: u64,
    /// From the first message to the last delivery.
    pub seconds: f64,
    /// Whether everything was published and has arrived.
    pub complete: bool,
    /// CPU microseconds of the server per delivery, user and system.
    pub server_cpu: Option<f64>,
    /// CPU microseconds of Redis per message.
    pub redis_cpu: Option<f64>,
    /// Context switches of the server per message.
    pub switches: Option<f64>,
    /// As a fraction of a core.
    pub tester_share: Option<f64>,
    /// Bytes received by a member per delivery, and by a publisher per message.
    pub wire_bytes: Option<f64>,
    pub answer_bytes: Option<f64>,
    /// Microseconds from when a message was due to its arrival.
    pub latency: Option<Latency>,
}

/// Medians over the complete rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Medians {
    pub server_cpu: f64,
    pub redis_cpu: Option<f64>,
    pub switches: Option<f64>,
    pub wire_bytes: f64,
    pub answer_bytes: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

impl Leg {
    /// Without rounds.
    pub fn new(name: String) -> Self {
        Self {
            name,
            rounds: Vec::new(),
            median: None,
            cpu_ratio: None,
            cpu_ratio_range: None,
            p50_ratio: None,
            p50_ratio_range: None,
            syscalls: None,
        }
    }

    fn medians(&self) -> Option<Medians> {
        let over = |value: fn(&RelayRound) -> Option<f64>| {
            median(self.rounds.iter().filter(|round| round.complete).filter_map(value).collect())
        };
        Some(Medians {
            server_cpu: over(|round| round.server_cpu)?,
            redis_cpu: over(|round| round.redis_cpu),
            switches: over(|round| round.switches),
            wire_bytes: over(|round| round.wire_bytes)?,
            answer_bytes: over(|round| round.answer_bytes)?,
            p50_us: over(|round| Some(round.latency?.p50))?,
            p99_us: over(|round| Some(round.latency?.p99))?,
        })
    }

    /// Compares concluded medians with those of the relay.
    fn compare(&mut self, limit: &Self) {
        let medians = self.median.zip(limit.median);
        self.cpu_ratio = medians.and_then(|(own, limit)| ratio(own.server_cpu, limit.server_cpu));
        self.p50_ratio = medians.and_then(|(own, limit)| ratio(own.p50_us, limit.p50_us));
        let neighbours = |value: fn(&RelayRound) -> Option<f64>| {
            let pairs = self.rounds.iter().zip(&limit.rounds);
            let complete = pairs.filter(|(own, limit)| own.complete && limit.complete);
            range(complete.filter_map(|(own, limit)| ratio(value(own)?, value(limit)?)))
        };
        let cpu = neighbours(|round| round.server_cpu);
        let p50 = neighbours(|round| Some(round.latency?.p50));
        (self.cpu_ratio_range, self.p50_ratio_range) = (cpu, p50);
    }
}

impl RelayReport {
    /// An empty report.
    pub fn new(what: String, args: &SmallRooms) -> Self {
        Self {
            what,
            machine: Machine::this(),
            rates: args.rates.iter().map(|&rate| Rate { rate, legs: Vec::new() }).collect(),
            counts: Counts::default(),
            interrupted: None,
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    /// Adds the accounts of one side, which should have delivered `expected` messages.
    pub fn add(&mut self, counts: Counts, expected: u64) {
        let Counts { delivered, duplicated, out_of_order, foreign, members_lost, .. } = counts;
        let all = &mut self.counts;
        all.expected += expected;
        all.delivered += delivered;
        all.missing += expected.saturating_sub(delivered);
        all.duplicated += duplicated;
        all.out_of_order += out_of_order;
        all.foreign += foreign;
        all.members_lost += members_lost;
    }

    /// Derives medians, ratios, warnings and expectations from the rounds and counts. `compare` has the
    /// bounds of a gateway, if there is one.
    pub fn conclude(&mut self, args: &SmallRooms, compare: Option<&CompareRelay>) {
        for rate in &mut self.rates {
            for leg in &mut rate.legs {
                leg.median = leg.medians();
            }
            if let Some((limit, legs)) = rate.legs.split_first_mut() {
                for leg in legs {
                    leg.compare(limit);
                }
            }
        }
        self.warn();
        self.judge(args, compare);
        unmet(&mut self.expectations, self.interrupted.as_deref());
    }

    fn warn(&mut self) {
        let rounds = self.rates.iter().flat_map(|rate| &rate.legs).flat_map(|leg| &leg.rounds);
        let busy = rounds.filter(|round| round.tester_share.is_some_and(|share| share > BUSY)).count();
        if busy > 0 {
            self.warnings.push(format!(
                "the tester used more than {} of a core in {busy} rounds: latencies are its own, CPU per delivery still \
                 holds",
                percent(BUSY)
            ));
        }
        let all = self.rates.iter().flat_map(|rate| rate.legs.iter().map(move |leg| (rate.rate, leg)));
        let late = all.filter(|(_, leg)| leg.median.is_some_and(|median| median.p50_us > QUEUED));
        let late: Vec<_> = late.map(|(rate, leg)| format!("{} at {rate}/s", leg.name)).collect();
        if !late.is_empty() {
            self.warnings.push(format!(
                "messages queue: {}; that p50 is the queue's, and no measure of the server. A CPU is full, the server's or \
                 that of Redis and the tester",
                late.join(", ")
            ));
        }
        let legs = self.rates.first().map_or(&[][..], |rate| &rate.legs);
        let sizes = legs.iter().filter_map(|leg| Some((leg.name.as_str(), leg.median?.wire_bytes)));
        self.warnings.extend(acks::warning(&sizes.collect::<Vec<_>>()));
        if let Some(why) = &self.interrupted {
            self.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
        }
    }

    /// Checks expectations, and conditions that must hold in any case; the latter are listed only if they do
    /// not hold.
    fn judge(&mut self, args: &SmallRooms, compare: Option<&CompareRelay>) {
        type Value = fn(&Leg) -> Option<f64>;
        let mut expect = |words: String, met| self.expectations.push(Expectation { words, met });
        for rate in &self.rates {
            for leg in &rate.legs {
                let complete = leg.rounds.iter().filter(|round| round.complete).count();
                if complete < args.rounds as usize {
                    let Leg { name, .. } = leg;
                    let words = format!("rounds of {name} at {}/s: {complete} of {}", rate.rate, args.rounds);
                    expect(words, false);
                }
            }
        }
        if let Some(allowed) = args.expect_lost {
            let Counts { missing, duplicated, out_of_order, foreign, expected, .. } = self.counts;
            let words = format!(
                "--expect-lost {allowed}: {missing} missing of {expected}, {duplicated} duplicated, {out_of_order} out \
                 of order, {foreign} foreign"
            );
            let met = missing <= allowed && duplicated + out_of_order + foreign == 0 && expected > 0;
            expect(words, met);
        }
        let Some(compare) = compare else { return };
        let bounds: [(&str, Option<f64>, Value); 2] = [
            ("--expect-ratio", compare.expect_ratio, |leg| leg.cpu_ratio),
            ("--expect-p50-ratio", compare.expect_p50_ratio, |leg| leg.p50_ratio),
        ];
        for (flag, allowed, value) in bounds {
            let Some(allowed) = allowed else { continue };
            for (rate, leg) in
                self.rates.iter().flat_map(|rate| rate.legs.iter().skip(1).map(|leg| (rate.rate, leg)))
            {
                let found = value(leg);
                let words = found.map_or_else(
                    || "nothing was measured".to_owned(),
                    |found| format!("{found:.3} × the relay's"),
                );
                expect(
                    format!("{flag} {allowed}: {} at {rate}/s: {words}", leg.name),
                    at_most(found, allowed),
                );
            }
        }
    }

    /// The report as it is printed.
    pub fn document(&self) -> Document {
        let mut table = Table::new(
            "Medians of the rounds",
            &[
                "messages/s",
                "CPU µs per delivery",
                "× relay",
                "rounds",
                "p50 µs",
                "× relay",
                "p99 µs",
                "switches per message",
                "system calls",
                "Redis CPU µs per message",
                "bytes per delivery",
            ],
        );
        for Rate { rate, legs } in &self.rates {
            for leg in legs {
                let of = |value: fn(&Medians) -> Option<f64>, digits: usize| {
                    or_nothing(leg.median.as_ref().and_then(value), |value| format!("{value:.digits$}"))
                };
                let times = |ratio: Option<f64>| or_nothing(ratio, |ratio| format!("{ratio:.3}"));
                let range = leg.cpu_ratio_range.map(|(low, high)| format!("{low:.3} to {high:.3}"));
                table.row([
                    format!("{rate} {}", leg.name),
                    of(|median| Some(median.server_cpu), 2),
                    times(leg.cpu_ratio),
                    or_nothing(range, |range| range),
                    of(|median| Some(median.p50_us), 0),
                    times(leg.p50_ratio),
                    of(|median| Some(median.p99_us), 0),
                    of(|median| median.switches, 2),
                    or_nothing(leg.syscalls, |calls| format!("{calls:.2}")),
                    of(|median| median.redis_cpu, 2),
                    of(|median| Some(median.wire_bytes), 0),
                ]);
            }
        }
        let Counts { expected, delivered, missing, duplicated, out_of_order, foreign, members_lost } =
            self.counts;
        let facts = vec![
            self.machine.to_string(),
            format!(
                "delivered {delivered} of {expected}, missing {missing}, duplicated {duplicated}, out of order \
                 {out_of_order}, foreign {foreign}, members lost {members_lost}"
            ),
        ];
        Document {
            title: self.what.clone(),
            facts,
            tables: vec![table],
            charts: self.charts(),
            warnings: self.warnings.clone(),
            expectations: self.expectations.clone(),
        }
    }

    fn charts(&self) -> Vec<Chart> {
        type Value = fn(&Medians) -> f64;
        let names = self.rates.first().map(|rate| rate.legs.iter().map(|leg| leg.name.clone()));
        let names: Vec<String> = names.into_iter().flatten().collect();
        let plots: [(&str, &str, Value); 2] = [
            ("CPU per delivery", "µs", |median| median.server_cpu),
            ("Median latency", "µs", |median| median.p50_us),
        ];
        let plot = |(title, y, value): (&str, &str, Value)| Chart {
            title: title.into(),
            x: "messages/s".into(),
            y: y.into(),
            marks: Vec::new(),
            series: names
                .iter()
                .enumerate()
                .map(|(at, name)| Series {
                    name: name.clone(),
                    points: self
                        .rates
                        .iter()
                        .filter_map(|rate| Some((rate.rate, value(rate.legs.get(at)?.median.as_ref()?))))
                        .collect(),
                })
                .collect(),
        };
        plots.into_iter().map(plot).collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::report::Verdict;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        args: CompareRelay,
    }

    fn args(flags: &str) -> CompareRelay {
        let words = ["test", "--rates=1000,2000", "--rounds=3", "--expect-lost=0"];
        Only::parse_from(words.into_iter().chain(flags.split_whitespace())).args
    }

    fn leg(name: &str, cpu: [f64; 3], p50: f64, bytes: f64) -> Leg {
        let rounds = cpu.map(|cpu| RelayRound {
            complete: true,
            server_cpu: Some(cpu),
            wire_bytes: Some(bytes),
            answer_bytes: Some(0.0),
            latency: Some(Latency { p50, ..Latency::default() }),
            ..RelayRound::default()
        });
        Leg { rounds: rounds.into(), ..Leg::new(name.into()) }
    }

    /// A report of the relay, an old and a new gateway; at the second rate all cost twice as much.
    fn report(flags: &str, bytes: f64) -> RelayReport {
        let args = args(flags);
        let mut report = RelayReport::new("test".into(), &args.small);
        report.counts = Counts { expected: 9, delivered: 9, ..Counts::default() };
        for (rate, times) in report.rates.iter_mut().zip([1.0, 2.0]) {
            let cpu = |cpu: [f64; 3]| cpu.map(|cpu| cpu * times);
            rate.legs = vec![
                leg("relay", cpu([10.0, 11.0, 12.0]), 100.0, 260.0),
                leg("old", cpu([20.0, 22.0, 20.0]), 200.0 * times, bytes),
                leg("new", cpu([11.0, 14.0, 13.2]), 100.0 * times, bytes),
            ];
        }
        report.conclude(&args.small, Some(&args));
        report
    }

    fn near(one: Option<f64>, other: f64) -> bool {
        one.is_some_and(|one| (one - other).abs() < 1e-9)
    }

    #[test]
    fn every_gateway_is_compared_with_the_relay_at_every_rate() {
        let report = report("", 260.0);
        for rate in &report.rates {
            let [relay, old, new] = &rate.legs[..] else { panic!() };
            assert_eq!(relay.cpu_ratio, None);
            assert!(near(old.cpu_ratio, 20.0 / 11.0) && near(new.cpu_ratio, 1.2), "{new:?}");
            let (low, high) = new.cpu_ratio_range.unwrap();
            assert!(near(Some(low), 1.1) && near(Some(high), 14.0 / 11.0), "rounds are compared in turn");
        }
        assert!(near(report.rates[1].legs[1].p50_ratio, 4.0));
        assert!(report.warnings.is_empty(), "{:?}", report.warnings);
        assert_eq!(Verdict::of(&report.expectations, None), Verdict::AsExpected);
        let text = report.document().to_string();
        assert!(
            text.contains("2000 new") && text.contains("1.200") && text.contains("1.100 to 1.273"),
            "{text}"
        );
    }

    #[test]
    fn a_bound_is_checked_for_every_gateway_at_every_rate() {
        let missed = |flags: &str| {
            let report = report(flags, 260.0);
            report.expectations.iter().filter(|it| !it.met).map(|it| it.words.clone()).collect::<Vec<_>>()
        };
        assert!(missed("--expect-ratio=1.9 --expect-p50-ratio=4").is_empty());
        let old = missed("--expect-ratio=1.3");
        assert_eq!(old.len(), 2, "{old:?}");
        assert!(old[0].starts_with("--expect-ratio 1.3: old at 1000/s: 1.818"), "{old:?}");
        let p50 = missed("--expect-p50-ratio=1.5");
        assert_eq!(p50.len(), 3, "{p50:?}");
        assert!(p50[2].contains("new at 2000/s: 2.000"), "{p50:?}");
    }

    #[test]
    fn an_incomplete_round_is_no_measurement() {
        let args = args("--expect-ratio=9");
        let mut report = report("", 260.0);
        report.expectations.clear();
        report.rates[0].legs[2].rounds.iter_mut().for_each(|round| round.complete = false);
        report.conclude(&args.small, Some(&args));
        assert!(report.rates[0].legs[2].median.is_none());
        let missed: Vec<_> = report.expectations.iter().filter(|it| !it.met).collect();
        assert_eq!(missed.len(), 2, "{missed:?}");
        assert!(missed[0].words.contains("rounds of new at 1000/s: 0 of 3"), "{missed:?}");
        assert!(missed[1].words.contains("nothing was measured"), "{missed:?}");
    }

    #[test]
    fn a_queue_is_no_latency() {
        let args = args("");
        let mut report = report("", 260.0);
        for round in &mut report.rates[1].legs[2].rounds {
            round.latency = Some(Latency { p50: 10_001.0, ..Latency::default() });
        }
        report.conclude(&args.small, Some(&args));
        let [warning] = &report.warnings[..] else { panic!("{:?}", report.warnings) };
        assert!(warning.starts_with("messages queue: new at 2000/s;"), "{warning}");
    }

    #[test]
    fn sides_of_unequal_sizes_are_named() {
        let warnings = report("", 377.0).warnings;
        assert!(warnings[0].contains("old (377 bytes), new (377 bytes)"), "{warnings:?}");
    }
}

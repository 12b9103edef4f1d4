//! How long a node's topics take to return after a restart of Redis.

use serde::Serialize;

use super::{
    Machine, at_most,
    document::{Document, Expectation, Table},
    median, or_nothing, ratio, unmet, written,
};
use crate::{cli::flow::Resubscribe, latency::Latency, ledger::Counts};

/// `resubscribe`.
#[derive(Debug, Serialize)]
pub struct ResubscribeReport {
    pub what: String,
    pub machine: Machine,
    pub topics: u32,
    pub restarts: Vec<Restart>,
    pub median: Option<Medians>,
    /// Publications to rooms that were back, and one to every room after each restart.
    pub counts: Counts,
    /// Why the run was ended early.
    pub interrupted: Option<String>,
    pub warnings: Vec<String>,
    pub expectations: Vec<Expectation>,
}

/// Medians over the restarts.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Medians {
    pub topics_back: f64,
    pub clients_back: f64,
    pub bare: f64,
    /// `topics_back` over `bare`: the median of the restarts' ratios.
    pub ratio: f64,
    pub peace_p99_us: Option<f64>,
    pub storm_p99_us: Option<f64>,
    pub p99_ratio: Option<f64>,
}

/// One restart. Times are in seconds from the first answer of the new Redis.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Restart {
    /// Until Redis had all topics of the node again.
    pub topics_back: f64,
    /// Until every client had been notified of the gap and had resubscribed.
    pub clients_back: f64,
    /// The time that a bare subscriber needs for the same number of topics.
    pub bare: f64,
    /// Microseconds from when a publication was due: before the outage, and during recovery.
    pub peace: Option<Latency>,
    pub storm: Option<Latency>,
}

impl ResubscribeReport {
    /// An empty report.
    pub fn new(args: &Resubscribe, topics: u32) -> Self {
        Self {
            what: format!(
                "resubscribe: a node with {topics} topics, {} clients, Redis down for {:?}",
                args.connections, args.outage.0
            ),
            machine: Machine::this(),
            topics,
            restarts: Vec::new(),
            median: None,
            counts: Counts::default(),
            interrupted: None,
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    /// Derives medians, warnings and expectations from the restarts and counts.
    pub fn conclude(&mut self, args: &Resubscribe) {
        let of =
            |value: fn(&Restart) -> Option<f64>| median(self.restarts.iter().filter_map(value).collect());
        self.median = of(|restart| Some(restart.topics_back)).and_then(|topics_back| {
            Some(Medians {
                topics_back,
                clients_back: of(|restart| Some(restart.clients_back))?,
                bare: of(|restart| Some(restart.bare))?,
                ratio: of(|restart| ratio(restart.topics_back, restart.bare))?,
                peace_p99_us: of(|restart| Some(restart.peace?.p99)),
                storm_p99_us: of(|restart| Some(restart.storm?.p99)),
                p99_ratio: of(|restart| ratio(restart.storm?.p99, restart.peace?.p99)),
            })
        });
        if let Some(why) = &self.interrupted {
            self.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
        }
        let unknown = || "nothing was measured".to_owned();
        let mut found = Vec::new();
        if self.restarts.len() < args.rounds as usize {
            let words = format!("restarts are completed: {} of {} are", self.restarts.len(), args.rounds);
            found.push(Expectation { words, met: false });
        }
        if let Some(allowed) = args.expect_lost {
            let Counts { missing, duplicated, out_of_order, foreign, expected, .. } = self.counts;
            let words = format!(
                "--expect-lost {allowed}: {missing} missing of {expected}, {duplicated} duplicated, {out_of_order} out \
                 of order, {foreign} foreign"
            );
            let met = missing <= allowed && duplicated + out_of_order + foreign == 0 && expected > 0;
            found.push(Expectation { words, met });
        }
        if let Some(allowed) = args.expect_back {
            let seconds = self.median.map(|median| median.topics_back);
            let words =
                seconds.map_or_else(unknown, |seconds| format!("all topics are back after {seconds:.3} s"));
            let words = format!("--expect-back {:?}: {words}", allowed.0);
            found.push(Expectation { words, met: at_most(seconds, allowed.0.as_secs_f64()) });
        }
        if let Some(allowed) = args.expect_p99_ratio {
            let ratio = self.median.and_then(|median| median.p99_ratio);
            let words = ratio.map_or_else(unknown, |ratio| format!("{ratio:.2} × p99 before the outage"));
            let words = format!("--expect-p99-ratio {allowed}: {words}");
            found.push(Expectation { words, met: at_most(ratio, allowed) });
        }
        unmet(&mut found, self.interrupted.as_deref());
        self.expectations = found;
    }

    /// The report as it is printed.
    pub fn document(&self) -> Document {
        let mut table = Table::new(
            "Restarts; seconds from Redis' first answer, and latency in rooms that are back",
            &[
                "",
                "topics back",
                "clients back",
                "bare",
                "p50 before",
                "p99 before",
                "max before",
                "p50",
                "p99",
                "max",
            ],
        );
        for (number, restart) in (1..).zip(&self.restarts) {
            let Restart { topics_back, clients_back, bare, peace, storm } = restart;
            let times = [topics_back, clients_back, bare].map(|seconds| format!("{seconds:.3}"));
            let cells = |latency: &Option<Latency>| {
                let each = |Latency { p50, p99, max, .. }| [p50, p99, max];
                let cells = latency.map(each).map_or([None; 3], |cells| cells.map(Some));
                cells.map(|cell| or_nothing(cell, written))
            };
            let row = std::iter::once(number.to_string()).chain(times);
            table.row(row.chain(cells(peace)).chain(cells(storm)));
        }
        let mut facts = vec![self.machine.to_string()];
        if let Some(median) = self.median {
            facts.push(format!(
                "{} topics back after {:.3} s, {:.2} × a bare subscriber's {:.3} s; every client after {:.3} s",
                self.topics, median.topics_back, median.ratio, median.bare, median.clients_back
            ));
            facts.push(format!(
                "p99 in rooms that are back {}, {} × the {} before the outage",
                or_nothing(median.storm_p99_us, written),
                or_nothing(median.p99_ratio, |ratio| format!("{ratio:.2}")),
                or_nothing(median.peace_p99_us, written)
            ));
        }
        let Counts { expected, delivered, missing, duplicated, out_of_order, foreign, members_lost } =
            self.counts;
        facts.push(format!(
            "delivered {delivered} of {expected}, missing {missing}, duplicated {duplicated}, out of order \
             {out_of_order}, foreign {foreign}, members lost {members_lost}"
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

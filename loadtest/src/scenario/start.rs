//! How long a server takes from its start until it reports that it is ready.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use crate::{
    cli::Start,
    report::{
        self, Machine, Verdict, at_most,
        document::{Document, Expectation, Table},
        median,
        outputs::Outputs,
        unmet,
    },
    stop::Stop,
    workshop::{Processes, pause},
};

/// The interval between two readiness requests.
const GLANCE: Duration = Duration::from_millis(1);

#[derive(Debug, Serialize)]
struct StartReport {
    what: String,
    machine: Machine,
    /// Why the run was ended early.
    interrupted: Option<String>,
    /// Milliseconds, by round.
    rounds: Vec<f64>,
    median_ms: Option<f64>,
    range_ms: Option<(f64, f64)>,
    expectations: Vec<Expectation>,
}

/// Runs the scenario and prints its report.
pub fn run(args: &Start) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.common)?;
    let stop = super::begin(&args.common)?;
    let planned = args.rounds as usize;
    let mut rounds = Vec::new();
    let mut measure = || {
        while rounds.len() < planned && !stop.is_set() {
            rounds.push(once(args, &stop)?.as_secs_f64() * 1e3);
        }
        Ok(rounds.len() == planned)
    };
    let outcome = measure();
    let interrupted = stop.early_end(outcome)?;
    let mut report = StartReport {
        what: format!("start to ready: {}", args.command.first().map_or("", String::as_str)),
        machine: Machine::this(),
        interrupted,
        median_ms: median(rounds.clone()),
        range_ms: report::room::range(rounds.iter().copied()),
        rounds,
        expectations: Vec::new(),
    };
    if let Some(limit) = args.expect_ready {
        let found = report
            .median_ms
            .map_or_else(|| "no start was measured".to_owned(), |found| format!("{found:.1} ms"));
        let words = format!("--expect-ready {:?}: {found}", limit.0);
        let met = at_most(report.median_ms, limit.0.as_secs_f64() * 1e3);
        report.expectations.push(Expectation { words, met });
    }
    unmet(&mut report.expectations, report.interrupted.as_deref());
    outputs.conclude(&report.document(), &report, report.interrupted.as_deref())
}

/// Starts the server, waits until it is ready, and stops it; returns how long that took.
fn once(args: &Start, stop: &Stop) -> anyhow::Result<Duration> {
    ensure!(args.ready.get().is_err(), "something answers at --ready before the server is started");
    let (program, arguments) = args.command.split_first().context("a command")?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut processes = Processes::default();
    let begun = Instant::now();
    let child = processes.add(command.spawn().with_context(|| format!("cannot start {program}"))?)?;
    loop {
        // Connection refused, reset or not ready yet: try again.
        if matches!(args.ready.get(), Ok((200, _))) {
            return Ok(begun.elapsed());
        }
        if let Some(status) = child.try_wait()? {
            bail!("{program} ended with {status} before it was ready");
        }
        ensure!(begun.elapsed() < args.patience.0, "{program} is not ready after {:?}", args.patience.0);
        ensure!(!stop.is_set(), "{program} was not ready yet");
        pause(GLANCE)?;
    }
}

impl StartReport {
    fn document(&self) -> Document {
        let mut rounds = Table::new("", &["round", "ms until ready"]);
        for (number, millis) in (1..).zip(&self.rounds) {
            rounds.row([number.to_string(), format!("{millis:.1}")]);
        }
        let mut facts = vec![self.machine.to_string()];
        let early = self
            .interrupted
            .iter()
            .map(|why| format!("ended early by {why}: the report covers the run up to then"));
        facts.extend(self.median_ms.map(|median| format!("median {median:.1} ms")));
        Document {
            title: self.what.clone(),
            facts,
            tables: vec![rounds],
            warnings: early.collect(),
            expectations: self.expectations.clone(),
            ..Document::default()
        }
    }
}

//! The engine's budgets: measures each and compares it with its bound.
//!
//! Owns how budgets are measured and reported; [`list`] defines them. Every measurement runs this program
//! with flags that a person could type, against servers started for it.

pub mod list;
mod site;
#[cfg(test)]
mod tests;

use std::{fmt::Write as _, fs, io::Write as _, process::Command, time::Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use serde_json::Value;

use self::{
    list::{BUDGETS, Bound, Budget, Found},
    site::Site,
};
use crate::{
    acks,
    cli::Budgets,
    process::{self, Cpu},
    report::{
        self, Machine, Verdict,
        document::{Document, Table},
        median,
        outputs::Outputs,
        svg,
    },
    stop::Stop,
    workshop::{self, Workshop, said},
};

/// The number of rounds that a budget needs.
const ENOUGH: u32 = 5;

/// If other processes use more of a core than this, the numbers are not reliable.
const QUIET: f64 = 0.1;

/// All results.
#[derive(Debug, Serialize)]
struct Results {
    machine: Machine,
    tidegate: String,
    rounds: u32,
    /// Why the run was ended before the last budget.
    interrupted: Option<String>,
    budgets: Vec<Row>,
    #[serde(skip)]
    preamble: String,
}

/// The result of one budget.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    /// As text; `None` if there is no bound.
    bound: Option<String>,
    median: Option<f64>,
    /// The smallest and the largest round.
    range: Option<(f64, f64)>,
    outcome: Outcome,
    /// How much of a core unrelated processes used.
    others: f64,
    /// The commands that produce the number.
    commands: Vec<String>,
    /// The node's additional settings.
    settings: Vec<String>,
    /// Why the two sides of the comparison cannot be compared, if they cannot.
    sizes: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Met,
    Missed,
    /// There is no bound.
    Known,
    /// It needs something that is not installed.
    Skipped(String),
    /// It could not be measured.
    Failed(String),
}

/// The rounds of one measurement, keyed by its run: several budgets may read from it.
struct Measured {
    of: &'static Budget,
    others: f64,
    /// The report of each round, and that of the run it is compared with.
    reports: anyhow::Result<Vec<(Value, Value)>>,
}

/// Measures the budgets, prints them, and writes the results.
pub fn run(args: &Budgets) -> anyhow::Result<Verdict> {
    if args.list {
        report::print(&listed())?;
        return Ok(Verdict::AsExpected);
    }
    let outputs = Outputs::open(args.json.as_deref(), None, args.results.as_deref())?;
    let stop = Stop::install(args.time_limit.0)?;
    workshop::with_scratch("budgets", |scratch| {
        let workshop = Workshop {
            tidegate: args.tidegate.clone(),
            scratch: scratch.to_owned(),
            server_cpu: args.server_cpu,
            client_cpu: args.client_cpu,
        };
        measure_all(args, &workshop, &stop, outputs)
    })
}

fn measure_all(
    args: &Budgets,
    workshop: &Workshop,
    stop: &Stop,
    outputs: Outputs,
) -> anyhow::Result<Verdict> {
    let chosen: Vec<&'static Budget> =
        if args.only.is_empty() { BUDGETS.iter().collect() } else { args.only.clone() };
    let mut results = Results {
        machine: Machine::this(),
        tidegate: said(Command::new(workshop.tidegate()?).arg("--version"))?,
        rounds: args.rounds,
        interrupted: None,
        budgets: Vec::new(),
        preamble: site::preamble(workshop),
    };
    let mut done: Vec<Measured> = Vec::new();
    for budget in chosen {
        if stop.is_set() {
            results.interrupted = stop.cause();
            break;
        }
        let mut row = Row::new(budget, args.rounds, workshop);
        if let Some(why) = lacking(budget) {
            row.outcome = Outcome::Skipped(why);
        } else if budget.found == Found::Stripped {
            row.conclude(budget, stripped(workshop).map(|size| vec![size]));
        } else {
            let known = done.iter().position(|measured| measured.of.is_measured_with(budget));
            let at = known.unwrap_or_else(|| {
                done.push(Measured::new(budget, args.rounds, workshop, stop));
                done.len() - 1
            });
            if let Some(measured) = done.get(at) {
                row.others = measured.others;
                row.read(budget, measured);
            }
        }
        // Measuring takes a while, so each result is printed as soon as it is known.
        let _: std::io::Result<()> = writeln!(std::io::stderr(), "{}: {}", row.name, row.summary());
        results.budgets.push(row);
    }
    // A signal may have arrived during the last budget, which is then incomplete.
    if results.budgets.last().is_some_and(|row| matches!(row.outcome, Outcome::Failed(_))) {
        results.interrupted = results.interrupted.or_else(|| stop.cause());
    }
    let document = results.document();
    outputs.write(&document, &results, String::new, || results.markdown())?;
    Ok(results.verdict())
}

/// The list of budgets.
fn listed() -> Document {
    let mut table = Table::new("", &["name and what it is", "bound"]);
    for Budget { name, title, unit, bound, .. } in BUDGETS {
        table.row([format!("{name}: {title}, {unit}"), bound.words().unwrap_or_default()]);
    }
    Document { title: "The engine's budgets".into(), tables: vec![table], ..Document::default() }
}

/// Why `budget` cannot be measured on this machine.
fn lacking(budget: &Budget) -> Option<String> {
    // A scenario that starts the gateway's program starts a Redis too.
    let redis = budget.node.is_some_and(|node| node.redis) || budget.run.contains("{program}");
    let redis = redis.then_some("redis-server");
    let strip = (budget.found == Found::Stripped).then_some("strip");
    let programs = redis.into_iter().chain(strip);
    programs
        .filter(|program| said(Command::new(program).arg("--version")).is_err())
        .map(|program| format!("no {program}"))
        .next()
}

/// The size of the gateway's program without its symbols.
fn stripped(workshop: &Workshop) -> anyhow::Result<f64> {
    let copy = workshop.scratch.join("stripped");
    let status = Command::new("strip").arg("-o").arg(&copy).arg(workshop.tidegate()?).status()?;
    ensure!(status.success(), "strip ended with {status}");
    #[expect(clippy::cast_precision_loss, reason = "a file's size")]
    let size = fs::metadata(&copy)?.len() as f64;
    fs::remove_file(copy)?;
    Ok(size)
}

impl Measured {
    fn new(budget: &'static Budget, rounds: u32, workshop: &Workshop, stop: &Stop) -> Self {
        let neighbours = Neighbours::watch();
        let reports = measure(budget, rounds, workshop, stop);
        Self { of: budget, others: neighbours.share(), reports }
    }
}

fn measure(
    budget: &Budget,
    rounds: u32,
    workshop: &Workshop,
    stop: &Stop,
) -> anyhow::Result<Vec<(Value, Value)>> {
    let mut site = Site::open(workshop, budget)?;
    let mut reports = Vec::new();
    if let Found::Rounds { .. } = budget.found {
        let mut flags = site.flags(budget.run)?;
        flags.insert(1.min(flags.len()), format!("--rounds={rounds}"));
        return Ok(vec![(workshop.run(&flags)?, Value::Null)]);
    }
    for round in 0..rounds {
        // A median of fewer rounds than requested does not answer the budget.
        ensure!(!stop.is_set(), "ended after {round} of {rounds} rounds");
        let beside = match budget.found {
            Found::Ratio { to, .. } => Some(to),
            _ => None,
        };
        if round > 0 && beside.is_none() {
            // The old node must end before the new one starts.
            drop(site);
            site = Site::open(workshop, budget)?;
        }
        let report = workshop.run(&site.flags(budget.run)?)?;
        let beside = beside.map(|run| workshop.run(&site.flags(run)?)).transpose()?;
        reports.push((report, beside.unwrap_or_default()));
    }
    Ok(reports)
}

impl Budget {
    fn is_measured_with(&self, other: &Self) -> bool {
        let beside = |budget: &Self| match budget.found {
            Found::Ratio { to, .. } => Some(to),
            _ => None,
        };
        (self.run, self.node, beside(self)) == (other.run, other.node, beside(other))
    }
}

impl Row {
    fn new(budget: &Budget, rounds: u32, workshop: &Workshop) -> Self {
        let typed = |run: &str, more: &[String]| site::typed(run, workshop, more);
        let commands = match budget.found {
            Found::Rounds { .. } => vec![typed(budget.run, &[format!("--rounds={rounds}")])],
            Found::Run(_) => vec![typed(budget.run, &[])],
            Found::Ratio { to, .. } => vec![typed(budget.run, &[]), typed(to, &[])],
            Found::Stripped => vec!["strip -o stripped tidegate; stat -c %s stripped".into()],
        };
        Self {
            name: budget.name,
            title: budget.title,
            unit: budget.unit,
            bound: budget.bound.words(),
            median: None,
            range: None,
            outcome: Outcome::Known,
            others: 0.0,
            commands,
            settings: budget.node.as_ref().map(site::settings).unwrap_or_default(),
            sizes: None,
        }
    }

    /// Extracts the number from the reports.
    fn read(&mut self, budget: &Budget, measured: &Measured) {
        let reports = match &measured.reports {
            Ok(reports) => reports,
            Err(why) => return self.conclude(budget, Err(anyhow::anyhow!("{why:#}"))),
        };
        let number = |report: &Value, place: &str| {
            report.pointer(place).and_then(Value::as_f64).with_context(|| format!("a report without {place}"))
        };
        let each = |(report, beside): &(Value, Value)| match budget.found {
            Found::Rounds { median, .. } => number(report, median),
            Found::Run(place) => number(report, place),
            Found::Ratio { of, at, .. } => Ok(number(report, of)? / number(beside, at)?),
            Found::Stripped => Err(anyhow::anyhow!("no run to measure")),
        };
        self.conclude(budget, reports.iter().map(each).collect());
        self.sizes = reports.last().and_then(|(report, beside)| {
            let bytes = |report: &Value| number(report, "/median/wire_bytes").ok();
            acks::warning(&[(self.name, bytes(report)?), ("what it is compared with", bytes(beside)?)])
        });
        if let (Found::Rounds { range, .. }, Some((report, _))) = (budget.found, reports.first()) {
            let end = |which: usize| report.pointer(range)?.get(which)?.as_f64();
            self.range = end(0).zip(end(1)).map(|(low, high)| (low * budget.factor, high * budget.factor));
        }
    }

    /// Compares the rounds' numbers with the bound.
    fn conclude(&mut self, budget: &Budget, numbers: anyhow::Result<Vec<f64>>) {
        let numbers: Vec<f64> = match numbers {
            Ok(numbers) => numbers.into_iter().map(|number| number * budget.factor).collect(),
            Err(why) => {
                self.outcome = Outcome::Failed(format!("{why:#}"));
                return;
            }
        };
        self.range = report::room::range(numbers.iter().copied());
        self.median = median(numbers);
        self.outcome = match (self.median, budget.bound) {
            (None, _) => Outcome::Failed("ended before the first round".into()),
            (Some(_), Bound::Any) => Outcome::Known,
            (Some(number), bound) if bound.allows(number) => Outcome::Met,
            _ => Outcome::Missed,
        };
    }

    /// The number, its range, and the outcome, as text.
    fn cells(&self) -> [String; 3] {
        let number = report::or_nothing(self.median, written);
        let range = self
            .range
            .map_or_else(String::new, |(low, high)| format!("{} to {}", written(low), written(high)));
        let outcome = match &self.outcome {
            Outcome::Met => "met".into(),
            Outcome::Missed => "MISSED".into(),
            Outcome::Known => "no bound".into(),
            Outcome::Skipped(why) => format!("skipped: {why}"),
            Outcome::Failed(_) => "FAILED".into(),
        };
        [number, range, outcome]
    }

    fn summary(&self) -> String {
        let [number, range, outcome] = self.cells();
        let bound = self.bound.as_ref().map_or_else(String::new, |bound| format!("; {bound}"));
        format!("{outcome}: {number} {} ({range}){bound}", self.unit)
    }
}

impl Results {
    fn document(&self) -> Document {
        let mut table = Table::new(
            &format!("medians of {} rounds, and the smallest and the largest", self.rounds),
            &["budget", "bound", "median", "rounds", "", "others' CPU"],
        );
        for row in &self.budgets {
            let [number, range, outcome] = row.cells();
            let bound = row.bound.clone().unwrap_or_default();
            let others = report::room::percent(row.others);
            let what = format!("{}: {}, {}", row.name, row.title, row.unit);
            table.row([what, bound, number, range, outcome, others]);
        }
        Document {
            title: "The engine's budgets".into(),
            facts: vec![self.machine.to_string(), self.tidegate.clone()],
            tables: vec![table],
            warnings: self.warnings(),
            ..Document::default()
        }
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for row in &self.budgets {
            if let Outcome::Failed(why) = &row.outcome {
                warnings.push(format!("{} could not be measured: {why}", row.name));
            }
            warnings.extend(row.sizes.iter().map(|words| format!("{}: {words}", row.name)));
        }
        let loud = self.budgets.iter().filter(|row| row.others > QUIET).count();
        if loud > 0 {
            warnings.push(format!(
                "other processes used more than {} of a core beside {loud} of the measurements: repeat those on a \
                 quiet machine",
                report::room::percent(QUIET)
            ));
        }
        if self.rounds < ENOUGH {
            warnings.push(format!("a budget asks for the median of at least {ENOUGH} rounds"));
        }
        if let Some(why) = &self.interrupted {
            warnings.push(format!("ended early by {why}: not every budget was measured"));
        }
        warnings
    }

    /// A budget that was missed or could not be measured fails the run; a skipped one does not.
    fn verdict(&self) -> Verdict {
        let failed = self
            .budgets
            .iter()
            .filter(|row| matches!(row.outcome, Outcome::Missed | Outcome::Failed(_)))
            .map(|row| match &row.outcome {
                Outcome::Failed(why) => format!("{} could not be measured: {why}", row.name),
                _ => format!("{}: {}", row.name, row.summary()),
            });
        let failed: Vec<_> = failed.collect();
        match &self.interrupted {
            Some(why) => {
                let early = format!("ended early by {why}");
                Verdict::Interrupted(std::iter::once(early).chain(failed).collect::<Vec<_>>().join("\n"))
            }
            None if failed.is_empty() => Verdict::AsExpected,
            None => Verdict::Unexpected(failed.join("\n")),
        }
    }

    /// The Markdown file.
    fn markdown(&self) -> String {
        let mut text = format!(
            "# Budgets\n\nWritten by `tidegate-loadtest budgets`; each number is explained in \
             [README.md](README.md).\n\n- {}\n- {}\n- medians of {} rounds, with the smallest and the largest \
             round; others' CPU is the share of a core that the rest of the machine used meanwhile\n\n\
             | | what | budget | median | rounds | | others' CPU |\n|---|---|---:|---:|---:|---|---:|\n",
            self.machine, self.tidegate, self.rounds,
        );
        for row in &self.budgets {
            let [number, range, outcome] = row.cells();
            let bound = row.bound.as_deref().unwrap_or(report::NOTHING);
            let others = report::room::percent(row.others);
            let Row { name, title, unit, .. } = row;
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "| {name} | {title}, {unit} | {bound} | {number} | {range} | {outcome} | {others} |"
            );
        }
        for warning in self.warnings() {
            let _ = writeln!(text, "\n{warning}.");
        }
        let _ = write!(
            text,
            "\n## By hand\n\nEach budget needs a node (a new one if settings are given) and the command. Two commands \
             run in turns; the ratio of each turn counts.\n\n```sh\n{}```\n",
            self.preamble
        );
        for row in &self.budgets {
            let _ = write!(text, "\n**{}**", row.name);
            if !row.settings.is_empty() {
                let _ = write!(text, ", the node with `{}`", row.settings.join(" "));
            }
            let _ = write!(text, "\n\n```sh\n{}\n```\n", row.commands.join("\n"));
        }
        text
    }
}

impl Bound {
    fn words(self) -> Option<String> {
        match self {
            Self::AtMost(most) => Some(format!("≤ {}", written(most))),
            Self::AtLeast(least) => Some(format!("≥ {}", written(least))),
            Self::Any => None,
        }
    }
}

/// A number with a sensible number of digits: ratios to the thousandth.
fn written(number: f64) -> String {
    match number.abs() {
        small if small < 10.0 => {
            format!("{number:.3}").trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        large if large < 1e5 => format!("{number:.0}"),
        _ => svg::short(number),
    }
}

/// The CPU use of processes that this program did not start.
struct Neighbours {
    begun: Instant,
    machine: f64,
    own: Cpu,
}

impl Neighbours {
    fn watch() -> Self {
        Self {
            begun: Instant::now(),
            machine: process::machine_busy().unwrap_or_default(),
            own: Cpu::of_family().unwrap_or_default(),
        }
    }

    /// The share of a core that they have used since the start. Processes started by this program have exited
    /// by then.
    fn share(&self) -> f64 {
        let now = Self::watch();
        let others = now.machine - self.machine - now.own.since(self.own).total();
        (others / self.begun.elapsed().as_secs_f64().max(1e-3)).max(0.0)
    }
}

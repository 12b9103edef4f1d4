//! The same scenarios against several servers, in alternating rounds of one session.
//!
//! Owns what is measured and how the results are reported. Every measurement runs this program with flags
//! that a person would use, so each can be repeated by hand. Machines drift, so only the ratios of
//! neighbouring rounds are compared, and their median is reported.

pub mod peer;

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::Value;

use self::peer::{Kind, Peer};
use crate::{
    acks,
    cli::Compare,
    report::{
        Machine, Verdict,
        document::{Document, Table},
        median, or_nothing,
        outputs::{Outputs, replace},
        svg,
    },
    stop::Stop,
    workshop::{self, Workshop},
};

/// The name of the bare loop among the servers.
const YARDSTICK: &str = "bare send loop";

/// A measurement that is made of every server.
struct Measure {
    title: &'static str,
    /// The plot's file name.
    file: &'static str,
    unit: &'static str,
    flags: Vec<String>,
    /// Where the report has the number.
    found: &'static str,
    factor: f64,
    /// Whether the bare loop can be measured too.
    has_limit: bool,
    /// Whether a server has to be restarted for it.
    fresh: bool,
    /// Whether a delivery is one write, whose size matters.
    sized: bool,
}

/// All results.
#[derive(Debug, Serialize)]
struct Results {
    machine: Machine,
    rounds: u32,
    /// Why the run was ended early.
    interrupted: Option<String>,
    versions: BTreeMap<&'static str, String>,
    skipped: BTreeMap<&'static str, String>,
    measures: Vec<Measured>,
}

#[derive(Debug, Serialize)]
struct Measured {
    title: &'static str,
    file: &'static str,
    unit: &'static str,
    /// The flags, without those of one server.
    command: String,
    servers: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    /// By round; `None` where a round failed.
    rounds: Vec<Option<f64>>,
    median: Option<f64>,
    /// The median of the rounds' ratios to our server, and to the bare loop.
    to_ours: Option<f64>,
    to_limit: Option<f64>,
    /// Bytes on the wire per delivery in the last round, if a delivery is one write.
    wire_bytes: Option<f64>,
    /// Why the first failed round failed.
    failure: Option<String>,
}

/// Runs the comparison, prints it, and writes the results.
pub fn run(args: &Compare) -> anyhow::Result<Verdict> {
    let outputs = Outputs::open(args.json.as_deref(), None, args.results.as_deref())?;
    let plots = args.results.as_deref().map(plots_beside);
    if let Some(plots) = &plots {
        fs::create_dir_all(plots).with_context(|| format!("cannot create {}", plots.display()))?;
    }
    let stop = Stop::install(args.time_limit.0)?;
    workshop::with_scratch("compare", |scratch| {
        let results = compare(args, scratch, &stop)?;
        // Plots are written even if the report cannot be written, and vice versa.
        let drawn = plots.map_or(Ok(()), |plots| results.draw(&plots));
        outputs.write(&results.document(), &results, String::new, || results.markdown())?;
        drawn?;
        Ok(results.verdict())
    })
}

/// Where the plots of the results at `path` go.
fn plots_beside(path: &Path) -> PathBuf {
    path.with_extension("").with_file_name("results")
}

fn compare(args: &Compare, scratch: &Path, stop: &Stop) -> anyhow::Result<Results> {
    let workshop = Workshop {
        tidegate: args.tidegate.clone(),
        scratch: scratch.to_owned(),
        server_cpu: args.server_cpu,
        client_cpu: args.client_cpu,
    };
    let mut results = Results {
        machine: Machine::this(),
        rounds: args.rounds,
        interrupted: None,
        versions: BTreeMap::new(),
        skipped: BTreeMap::new(),
        measures: Vec::new(),
    };
    let mut kinds = Vec::new();
    for &kind in &args.servers {
        match kind.version(&workshop, &args.scripts) {
            Ok(version) => {
                results.versions.insert(kind.name(), version);
                kinds.push(kind);
            }
            Err(why) => {
                results.skipped.insert(kind.name(), format!("{why:#}"));
            }
        }
    }
    if kinds.is_empty() {
        bail!("none of the servers is installed");
    }
    for measure in measures(args) {
        if stop.is_set() {
            results.interrupted = stop.cause();
            break;
        }
        results.measures.push(measured(&measure, &kinds, args, &workshop, stop));
        // The comparison takes a while, so each table is printed as soon as it is complete.
        let _: std::io::Result<()> =
            writeln!(std::io::stderr(), "{}", results.table(results.measures.len() - 1));
    }
    // A signal may have arrived during the last measurement, which then has fewer rounds, or failed ones.
    let is_short = |row: &Row| row.rounds.iter().flatten().count() < args.rounds as usize;
    if results.measures.last().is_some_and(|measured| measured.servers.iter().any(is_short)) {
        results.interrupted = results.interrupted.or_else(|| stop.cause());
    }
    Ok(results)
}

fn measures(args: &Compare) -> Vec<Measure> {
    let cost = |burst: u32| {
        vec![
            "cost".into(),
            format!("--members={}", args.members),
            format!("--messages={}", args.messages),
            format!("--burst={burst}"),
            "--rounds=1".into(),
            "--warmup=20".into(),
        ]
    };
    let cpu = |title, file, burst| Measure {
        title,
        file,
        unit: "CPU s per million",
        flags: cost(burst),
        found: "/median/server_cpu",
        factor: 1.0,
        has_limit: true,
        fresh: false,
        sized: burst == 1,
    };
    let paced = vec![
        "cost".into(),
        format!("--members={}", args.members),
        format!("--messages={}", args.messages.min(200)),
        format!("--rate={}", args.rate),
        "--rounds=1".into(),
        "--warmup=20".into(),
    ];
    let idle = |first: u32| {
        vec!["idle".into(), format!("--connections={first},{}", args.idle), "--window=1s".into()]
    };
    let storm =
        vec!["storm".into(), format!("--connections={}", args.idle), "--waves=1".into(), "--hold=0s".into()];
    vec![
        cpu("Fan-out, messages one at a time", "fanout-1", 1),
        cpu("Fan-out, eight messages together", "fanout-8", 8),
        Measure {
            title: "99th percentile of latency at a steady pace",
            file: "latency-p99",
            unit: "ms",
            flags: paced,
            found: "/median/p99_us",
            factor: 1e-3,
            has_limit: true,
            fresh: false,
            sized: true,
        },
        Measure {
            title: "Memory of an idle connection",
            file: "idle",
            unit: "bytes resident",
            flags: idle(args.idle / 5),
            found: "/slope/rss",
            factor: 1.0,
            has_limit: false,
            fresh: true,
            sized: false,
        },
        Measure {
            title: "CPU of a new connection",
            file: "connect",
            unit: "µs",
            flags: storm,
            found: "/waves/0/server_cpu_us",
            factor: 1.0,
            has_limit: false,
            fresh: true,
            sized: false,
        },
    ]
}

fn measured(measure: &Measure, kinds: &[Kind], args: &Compare, workshop: &Workshop, stop: &Stop) -> Measured {
    let start = |kind: Kind| Peer::start(kind, workshop, &args.scripts);
    let mut peers: Vec<anyhow::Result<Peer>> =
        if measure.fresh { Vec::new() } else { kinds.iter().map(|&kind| start(kind)).collect() };
    let row = |name| Row {
        name,
        rounds: Vec::new(),
        median: None,
        to_ours: None,
        to_limit: None,
        wire_bytes: None,
        failure: None,
    };
    let mut rows: Vec<Row> = kinds.iter().map(|kind| row(kind.name())).collect();
    let mut limit = row(YARDSTICK);
    for _ in 0..args.rounds {
        if stop.is_set() {
            break;
        }
        if measure.has_limit {
            let mut flags = measure.flags.clone();
            flags.splice(0..1, ["yardstick".to_owned()]);
            flags.extend(args.server_cpu.map(|cpu| format!("--server-cpu={cpu}")));
            limit.note(measure, one(measure, &flags, workshop));
        }
        for (number, (row, &kind)) in rows.iter_mut().zip(kinds).enumerate() {
            let fresh;
            let peer = if measure.fresh {
                fresh = start(kind);
                Some(&fresh)
            } else {
                peers.get(number)
            };
            let outcome = match peer {
                Some(Ok(peer)) => {
                    let flags = [measure.flags.clone(), peer.flags()].concat();
                    one(measure, &flags, workshop)
                }
                Some(Err(why)) => Err(anyhow::anyhow!("{why:#}")),
                None => continue,
            };
            row.note(measure, outcome);
        }
    }
    peers.clear();
    let ours = |name: &str| kinds.iter().find(|kind| kind.name() == name).map(|kind| kind.ours().name());
    let by_name: BTreeMap<&str, Vec<Option<f64>>> =
        rows.iter().map(|row| (row.name, row.rounds.clone())).collect();
    for row in &mut rows {
        row.median = median(row.rounds.iter().flatten().copied().collect());
        row.to_ours = ours(row.name).and_then(|ours| ratio(&row.rounds, by_name.get(ours)?));
        row.to_limit = ratio(&row.rounds, &limit.rounds);
    }
    limit.median = median(limit.rounds.iter().flatten().copied().collect());
    if measure.has_limit {
        rows.insert(0, limit);
    }
    let command = measure.flags.join(" ");
    Measured { title: measure.title, file: measure.file, unit: measure.unit, command, servers: rows }
}

/// Runs this program once and returns the number, and the bytes of a delivery.
fn one(measure: &Measure, flags: &[String], workshop: &Workshop) -> anyhow::Result<(f64, Option<f64>)> {
    let report = workshop.run(flags)?;
    let number = report.pointer(measure.found).and_then(Value::as_f64).context("the run has no result")?;
    let bytes = report.pointer("/median/wire_bytes").and_then(Value::as_f64).filter(|_| measure.sized);
    Ok((number * measure.factor, bytes))
}

/// The median of the ratios of neighbouring rounds.
pub fn ratio(theirs: &[Option<f64>], ours: &[Option<f64>]) -> Option<f64> {
    let pairs = theirs.iter().zip(ours).filter_map(|(their, our)| Some((*their)? / (*our)?));
    median(pairs.filter(|ratio| ratio.is_finite()).collect())
}

impl Row {
    fn note(&mut self, measure: &Measure, outcome: anyhow::Result<(f64, Option<f64>)>) {
        match outcome {
            Ok((number, bytes)) => {
                self.rounds.push(Some(number));
                self.wire_bytes = bytes;
            }
            Err(why) => {
                self.rounds.push(None);
                self.failure.get_or_insert_with(|| format!("{}, {}: {why:#}", self.name, measure.title));
            }
        }
    }
}

impl Results {
    fn table(&self, number: usize) -> Table {
        let Some(measured) = self.measures.get(number) else { return Table::default() };
        let mut table = Table::new(
            &format!("{}, {} (medians of {} rounds)", measured.title, measured.unit, self.rounds),
            &["server", "median", "× ours", "× bare loop", "bytes of a delivery"],
        );
        let times = |ratio: Option<f64>| or_nothing(ratio, |ratio| format!("{ratio:.2}"));
        for row in &measured.servers {
            let median = row.median.map_or("failed".to_owned(), svg::short);
            let bytes = or_nothing(row.wire_bytes, |bytes| format!("{bytes:.0}"));
            table.row([row.name.to_owned(), median, times(row.to_ours), times(row.to_limit), bytes]);
        }
        table
    }

    fn document(&self) -> Document {
        let mut facts = vec![self.machine.to_string()];
        facts.extend(self.versions.iter().map(|(name, version)| format!("{name}: {version}")));
        facts.extend(self.skipped.iter().map(|(name, why)| format!("{name} is skipped: {why}")));
        facts.push("CPU and memory are those of the server, without Redis".into());
        facts.push(
            "× ours: relative to tidegate-redis for socket-io, which also uses Redis, and to tidegate otherwise"
                .into(),
        );
        facts.push(
            "bytes of a delivery: on the wire, with frames and envelopes. On loopback the server's CPU depends on them in \
             two modes: see \"Sizes on the wire\" in README.md"
                .into(),
        );
        let early =
            self.interrupted.iter().map(|why| format!("ended early by {why}: not everything was measured"));
        Document {
            title: "Tidegate and other gateways".into(),
            facts,
            tables: (0..self.measures.len()).map(|number| self.table(number)).collect(),
            charts: Vec::new(),
            warnings: early.chain(self.sizes()).chain(self.failures()).collect(),
            expectations: Vec::new(),
        }
    }

    /// A warning for every measurement whose servers cannot be compared.
    fn sizes(&self) -> impl Iterator<Item = String> {
        self.measures.iter().filter_map(|measured| {
            let sides = measured.servers.iter().filter_map(|row| Some((row.name, row.wire_bytes?)));
            let words = acks::warning(&sides.collect::<Vec<_>>())?;
            Some(format!("{}: {words}", measured.title))
        })
    }

    fn failures(&self) -> impl Iterator<Item = String> {
        let rows = self.measures.iter().flat_map(|measured| &measured.servers);
        rows.filter_map(|row| row.failure.clone())
    }

    /// A failed measurement fails the run.
    fn verdict(&self) -> Verdict {
        let failed: Vec<_> = self.failures().collect();
        match &self.interrupted {
            Some(why) => {
                let early = format!("ended early by {why}");
                Verdict::Interrupted(std::iter::once(early).chain(failed).collect::<Vec<_>>().join("\n"))
            }
            None if failed.is_empty() => Verdict::AsExpected,
            None => Verdict::Unexpected(failed.join("\n")),
        }
    }

    /// Draws a plot of every measurement in the directory `plots`.
    fn draw(&self, plots: &Path) -> anyhow::Result<()> {
        let draw = |measured: &Measured| {
            let bars: Vec<(&str, f64)> =
                measured.servers.iter().filter_map(|row| Some((row.name, row.median?))).collect();
            let plot = plots.join(format!("{}.svg", measured.file));
            replace(&plot, svg::bars(measured.title, measured.unit, &bars).as_bytes())
                .with_context(|| format!("cannot write {}", plot.display()))
        };
        // Draws each, even if others fail.
        let outcomes: Vec<_> = self.measures.iter().map(draw).collect();
        outcomes.into_iter().collect()
    }

    /// The Markdown file, which refers to the plots.
    fn markdown(&self) -> String {
        let document = self.document();
        let mut text = format!(
            "# Results\n\nWritten by `tidegate-loadtest compare`; each number is explained in \
             [README.md](README.md).\n\n{}\n",
            document.facts.iter().map(|fact| format!("- {fact}\n")).collect::<Vec<_>>().concat()
        );
        for (measured, table) in self.measures.iter().zip(&document.tables) {
            let head = table.head.join(" | ");
            let rows: Vec<String> =
                table.rows.iter().map(|row| format!("| {} |\n", row.join(" | "))).collect();
            text += &[
                format!("## {}\n\n", measured.title),
                format!("{}, medians of {} rounds of `{}`\n\n", measured.unit, self.rounds, measured.command),
                format!("| {head} |\n|---|---:|---:|---:|---:|\n{}\n", rows.concat()),
                format!("![{}](results/{}.svg)\n\n", measured.title, measured.file),
            ]
            .concat();
        }
        for warning in &document.warnings {
            text += &["- ", warning, "\n"].concat();
        }
        text.trim_end().to_owned() + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    #[test]
    fn ratios_compare_neighbouring_rounds() {
        let theirs = [Some(2.0), None, Some(9.0), Some(8.0)];
        let ours = [Some(1.0), Some(5.0), Some(3.0), Some(0.0)];
        assert_eq!(ratio(&theirs, &ours), Some(2.5));
        assert_eq!(ratio(&[], &ours), None);
    }

    #[test]
    fn results_are_written_with_their_plots() {
        let directory = std::env::temp_dir().join(format!("compare-test-{}", process::run_id()));
        fs::create_dir(&directory).unwrap();
        let row = |name, median: f64| Row {
            name,
            rounds: vec![Some(median)],
            median: Some(median),
            to_ours: Some(1.5),
            to_limit: None,
            wire_bytes: Some(if name == "ws" { 260.0 } else { 377.0 }),
            failure: None,
        };
        let results = Results {
            machine: Machine::this(),
            rounds: 1,
            interrupted: None,
            versions: [("ws", "8".to_owned())].into(),
            skipped: [("nchan", "no nginx".to_owned())].into(),
            measures: vec![Measured {
                title: "Memory",
                file: "memory",
                unit: "bytes",
                command: "idle".into(),
                servers: vec![
                    row("tidegate", 900.0),
                    Row { failure: Some("x: y".into()), ..row("ws", 3000.0) },
                ],
            }],
        };
        results.draw(&directory).unwrap();
        let text = results.markdown();
        for words in [
            "- nchan is skipped: no nginx",
            "| ws | 3000 | 1.50 | – | 260 |",
            "- Memory: loopback acknowledges deliveries of tidegate (377 bytes)",
            "(results/memory.svg)",
            "- x: y",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(fs::read_to_string(directory.join("memory.svg")).unwrap().contains("3000"));
        fs::remove_dir_all(directory).unwrap();
        assert_eq!(results.verdict(), Verdict::Unexpected("x: y".into()));
    }
}

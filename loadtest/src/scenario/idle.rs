//! Many idle connections.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::{begin_run, load::silent, plan_of, settle};
use crate::{
    cli::Idle,
    crew::Crew,
    live::Live,
    plan::Order,
    report::{
        Machine, Verdict, at_most,
        connections::{IdleReport, Level},
        document::Expectation,
        outputs::Outputs,
        unmet,
    },
    stop::Stop,
};

/// The kernel's unit of CPU time.
const TICK: Duration = Duration::from_millis(10);

/// Runs the scenario and prints its report.
pub fn run(args: &Idle) -> anyhow::Result<Verdict> {
    ensure!(args.connections.is_sorted(), "--connections must ascend");
    ensure!(!args.run.server_pid.is_empty(), "idle measures a server: set its process with --server-pid");
    let most = *args.connections.last().context("--connections is empty")?;
    let target = args.target.resolve(args.rooms)?;
    let outputs = Outputs::of_run(&args.run)?;
    let (stop, server) = begin_run(&args.run)?;
    let live = Live::new(args.run.quiet);
    let mut crew = Crew::start(plan_of(&args.run, silent("idle", &args.target, args.rooms, most)), server)?;
    let mut report = IdleReport {
        what: format!("idle connections to {}", target.entrance.address),
        machine: Machine::this(),
        interrupted: None,
        window_seconds: args.window.0.as_secs_f64(),
        levels: Vec::new(),
        slope: None,
        timeline: Vec::new(),
        warnings: Vec::new(),
        expectations: Vec::new(),
    };
    for connections in std::iter::once(0).chain(args.connections.iter().copied()) {
        live.doing(format!("{connections} connections"));
        if !level(&mut crew, connections, args, &live, &stop, &mut report)? {
            let why = format!("{} at {connections} connections", stop.cause().unwrap_or_default());
            report.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
            report.interrupted = Some(why);
            break;
        }
    }
    crew.end()?;
    drop(live);
    report.timeline.clone_from(&crew.timeline.points);
    let messages: u64 = crew.totals.groups.iter().map(|group| group.counts.foreign).sum();
    if messages > 0 {
        report.warnings.push(format!("{messages} messages arrived; these connections were not idle"));
    }
    report.conclude();
    judge(args, &mut report, crew.totals.first_loss.as_deref());
    unmet(&mut report.expectations, report.interrupted.as_deref());
    outputs.conclude(&report.document(), &report, report.interrupted.as_deref())
}

/// Measures the server with this many connections; `false` if the run is to end.
fn level(
    crew: &mut Crew,
    connections: u32,
    args: &Idle,
    live: &Live,
    stop: &Stop,
    report: &mut IdleReport,
) -> anyhow::Result<bool> {
    crew.order(&Order::Open(connections))?;
    if !crew.until(stop, Crew::is_settled, |crew| live.show(crew))? {
        return Ok(false);
    }
    let (memory, settled) = settle(stop, |wait| {
        let now = Instant::now();
        crew.until(stop, |_| now.elapsed() >= wait, |crew| live.show(crew))?;
        crew.server_memory()
    })?;
    let (before, begun) = (crew.server_cpu(), Instant::now());
    let whole = crew.until(stop, |_| begun.elapsed() >= args.window.0, |crew| live.show(crew))?;
    let used = crew.server_cpu().zip(before).map(|(now, before)| now.since(before).total());
    report.levels.push(Level {
        connections,
        memory,
        settled,
        // CPU time counts in ticks of 10 ms; a shorter window measures nothing.
        cpu_per_second: used
            .filter(|_| begun.elapsed() >= TICK)
            .map(|used| used / begun.elapsed().as_secs_f64()),
        lost: u64::from(connections.saturating_sub(crew.totals.standing)),
    });
    Ok(whole)
}

fn judge(args: &Idle, report: &mut IdleReport, first_loss: Option<&str>) {
    let lost = report.levels.last().map_or(0, |level| level.lost);
    if lost > 0 {
        let why = first_loss.map(|why| format!("; the first: {why}")).unwrap_or_default();
        let words = format!("idle connections stay: {lost} were lost{why}");
        report.expectations.push(Expectation { words, met: false });
    }
    if let Some(allowed) = args.expect_bytes {
        let found = report.slope.map(|slope| slope.rss);
        let words = found.map_or_else(
            || "no two levels were measured".to_owned(),
            |found| format!("a connection costs {found:.0} bytes"),
        );
        let words = format!("--expect-bytes {allowed}: {words}");
        report.expectations.push(Expectation { words, met: at_most(found, allowed) });
    }
}

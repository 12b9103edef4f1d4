//! Many connections that do nothing.

use std::time::Instant;

use anyhow::{Context, ensure};

use super::{begin_run, load::silent, plan_of, settle};
use crate::{
    cli::Idle,
    crew::Crew,
    live::Live,
    plan::Order,
    report::{
        self, Machine, Verdict,
        connections::{IdleReport, Level},
        document::Expectation,
    },
    stop::Stop,
};

/// Runs the scenario and prints its report.
pub fn run(args: &Idle) -> anyhow::Result<Verdict> {
    ensure!(args.connections.is_sorted(), "--connections must ascend");
    ensure!(!args.run.server_pid.is_empty(), "idle measures a server: give its process by --server-pid");
    let most = *args.connections.last().context("--connections is empty")?;
    let target = args.target.resolve(args.rooms)?;
    let (stop, server) = begin_run(&args.run)?;
    let live = Live::new(args.run.quiet);
    let mut crew = Crew::start(plan_of(&args.run, silent("idle", &args.target, args.rooms, most)), server)?;
    let mut report = IdleReport {
        what: format!("idle connections to {}", target.entrance.address),
        machine: Machine::this(),
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
            report.warnings.push(format!("ended early, at {connections} connections"));
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
    report::deliver(&report.document(), &report, &args.run)
}

/// Measures the server with so many connections. `false` if the run is to end.
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
    let (before, begun) = (crew.server_cpu()?.unwrap_or_default(), Instant::now());
    let whole = crew.until(stop, |_| begun.elapsed() >= args.window.0, |crew| live.show(crew))?;
    let used = crew.server_cpu()?.unwrap_or_default().since(before).total();
    report.levels.push(Level {
        connections,
        memory,
        settled,
        cpu_per_second: used / begun.elapsed().as_secs_f64().max(1e-3),
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
        let found = report.slope.map_or(f64::NAN, |slope| slope.rss);
        let words = format!("--expect-bytes {allowed}: a connection costs {found:.0} bytes");
        report.expectations.push(Expectation { words, met: found <= allowed });
    }
}

//! All clients connect at once, are dropped, and reconnect.

use std::{collections::BTreeMap, time::Instant};

use super::{begin_run, load::silent, plan_of};
use crate::{
    cli::Storm,
    crew::Crew,
    live::Live,
    plan::{Order, Plan},
    report::{
        Machine, Verdict, at_most,
        connections::{StormReport, Wave},
        document::Expectation,
        outputs::Outputs,
        room::BUSY,
        unmet, written,
    },
    stop::Stop,
};

/// Runs the scenario and prints its report.
pub fn run(args: &Storm) -> anyhow::Result<Verdict> {
    let target = args.target.resolve(args.rooms)?;
    let outputs = Outputs::of_run(&args.run)?;
    let (stop, server) = begin_run(&args.run)?;
    let groups = silent("storm", &args.target, args.rooms, args.connections);
    let plan = Plan { tolerant: true, at_once: args.at_once, ..plan_of(&args.run, groups) };
    let live = Live::new(args.run.quiet);
    let mut crew = Crew::start(plan, server)?;
    let mut report = StormReport {
        what: format!(
            "storm: {} connections to {}, {} waves, {} in progress at once in each process",
            args.connections, target.entrance.address, args.waves, args.at_once
        ),
        machine: Machine::this(),
        interrupted: None,
        processes: crew.plan.parts,
        waves: Vec::new(),
        timeline: Vec::new(),
        warnings: Vec::new(),
        expectations: Vec::new(),
    };
    for number in 1..=args.waves {
        live.doing(format!("wave {number}"));
        let whole = wave(&mut crew, args, &live, &stop, &mut report)?;
        if !whole {
            let cause = stop.cause().unwrap_or_default();
            report.interrupted = Some(format!("{cause} in wave {number} of {}", args.waves));
            break;
        }
    }
    crew.end()?;
    drop(live);
    report.timeline.clone_from(&crew.timeline.points);
    if let Some(why) = &report.interrupted {
        report.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
    }
    if report.waves.iter().any(|wave| wave.tester_busiest.is_some_and(|busiest| busiest > BUSY)) {
        report.warnings.push("the tester may be the bottleneck: use --processes".into());
    }
    report.expectations = judge(args, &report.waves, crew.totals.first_loss.as_deref());
    unmet(&mut report.expectations, report.interrupted.as_deref());
    outputs.conclude(&report.document(), &report, report.interrupted.as_deref())
}

/// Runs one wave and drops it; `false` if the run is to end.
fn wave(
    crew: &mut Crew,
    args: &Storm,
    live: &Live,
    stop: &Stop,
    report: &mut StormReport,
) -> anyhow::Result<bool> {
    crew.phase()?;
    crew.measure()?;
    let (before, cpu, begun) = (crew.totals.refused.clone(), crew.server_cpu(), Instant::now());
    crew.order(&Order::Open(args.connections))?;
    let whole = crew.until(stop, Crew::is_settled, |crew| live.show(crew))?;
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = crew.server_cpu().zip(cpu).map(|(now, before)| now.since(before).total());
    let standing = crew.totals.standing;
    let connects = &crew.totals.connects;
    let refused: BTreeMap<String, u64> = crew
        .totals
        .refused
        .iter()
        .map(|(why, count)| (why.clone(), count - before.get(why).unwrap_or(&0)))
        .filter(|(_, count)| *count > 0)
        .collect();
    let wave = Wave {
        connections: args.connections,
        standing,
        seconds,
        per_second: f64::from(standing) / seconds,
        latency: connects.summary(),
        percentiles: connects.curve(),
        refused,
        server_share: cpu.map(|cpu| cpu / seconds),
        server_cpu_us: cpu.filter(|_| standing > 0).map(|cpu| cpu / f64::from(standing) * 1e6),
        server_rss: crew.server_rss(),
        tester_busiest: crew.busiest().map(|share| share.running),
    };
    report.waves.push(wave);
    let held = Instant::now();
    let stayed = whole && crew.until(stop, |_| held.elapsed() >= args.hold.0, |crew| live.show(crew))?;
    crew.order(&Order::Drop)?;
    let dropped =
        crew.until(stop, |crew| crew.is_settled() && crew.totals.standing == 0, |crew| live.show(crew))?;
    Ok(stayed && dropped)
}

/// Checks expectations, and conditions that a storm must always meet; the latter are listed only if they do
/// not hold.
fn judge(args: &Storm, waves: &[Wave], first_loss: Option<&str>) -> Vec<Expectation> {
    let mut expectations = Vec::new();
    for (number, _) in (1..).zip(waves).filter(|(_, wave)| wave.standing == 0) {
        let words = format!("connections become ready: none did in wave {number}");
        expectations.push(Expectation { words, met: false });
    }
    if let Some(why) = first_loss {
        let words = format!("connections stay until they are dropped: some were lost; the first: {why}");
        expectations.push(Expectation { words, met: false });
    }
    if let Some(allowed) = args.expect_refused {
        let failed: u64 = waves.iter().map(|wave| u64::from(wave.connections - wave.standing)).sum();
        let whole = waves.len() == args.waves as usize;
        let words = format!("--expect-refused {allowed}: {failed} connections did not become ready");
        expectations.push(Expectation { words, met: whole && failed <= allowed });
    }
    if let Some(limit) = args.expect_connect_p99 {
        let p99 = waves.iter().filter_map(|wave| wave.latency).map(|latency| latency.p99).reduce(f64::max);
        let found = p99.map_or_else(
            || "no connection became ready".to_owned(),
            |p99| format!("{} in the slowest wave", written(p99)),
        );
        let words = format!("--expect-connect-p99 {:?}: {found}", limit.0);
        let met = waves.len() == args.waves as usize && at_most(p99, limit.0.as_secs_f64() * 1e6);
        expectations.push(Expectation { words, met });
    }
    expectations
}

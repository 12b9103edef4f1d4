//! Runs at a steady rate: `fanout`, `rooms`, `chat`, `slow`, `mixed`.
//!
//! Messages are published on a schedule that does not wait for deliveries, and latency counts from when a
//! message was due: a server that stops for a second delays every message of that second, and all of them are
//! counted.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::{begin_run, held::Scales, open_all, plan_of};
use crate::{
    cli::{
        Chat, Fanout, Mixed, Rooms, Slow, file,
        load::{self, Expect, Pace, Run},
    },
    clock,
    crew::{Crew, Share},
    latency::Latencies,
    live::Live,
    payload::{Payload, Shape},
    plan::{Group, Order, Publishers},
    process::Cpu,
    report::{
        Machine, Verdict,
        load::{Counts, GroupReport, LoadReport, Phase, ServerReport, TesterReport, Troubles},
        outputs::Outputs,
        ratio,
    },
    stop::Stop,
    target::TargetArgs,
};

/// The time between the order to publish and the first message, in which all workers read the order.
const LEAD: Duration = Duration::from_millis(100);

/// What the five scenarios have in common.
struct Common<'a> {
    what: String,
    groups: Vec<Group>,
    pace: &'a Pace,
    run: &'a Run,
    expect: &'a Expect,
    /// Whether the stalled clients stop reading after half of the time.
    slow: bool,
    /// The maximum growth of p99 after that.
    p99_ratio: Option<f64>,
    /// Measures the bytes held for them.
    scales: Option<Scales>,
}

/// One room, many members.
pub fn fanout(args: &Fanout) -> anyhow::Result<Verdict> {
    let group = one("fanout", &args.target, &args.pace, 1, args.members);
    let what = format!("fanout: 1 room of {} at {}", args.members, place(&args.target)?);
    run(Common {
        what,
        groups: vec![group],
        pace: &args.pace,
        run: &args.run,
        expect: &args.expect,
        slow: false,
        p99_ratio: None,
        scales: None,
    })
}

/// Many rooms.
pub fn rooms(args: &Rooms) -> anyhow::Result<Verdict> {
    let group = Group {
        rooms_per_client: args.rooms_per_client,
        ..one("rooms", &args.target, &args.pace, args.rooms, args.members)
    };
    super::check_rooms_per_client(&args.target, args.rooms, args.rooms_per_client)?;
    let what = format!("rooms: {} of {} each at {}", args.rooms, args.members, place(&args.target)?);
    run(Common {
        what,
        groups: vec![group],
        pace: &args.pace,
        run: &args.run,
        expect: &args.expect,
        slow: false,
        p99_ratio: None,
        scales: None,
    })
}

/// All members publish.
pub fn chat(args: &Chat) -> anyhow::Result<Verdict> {
    let group = Group {
        publishers: Publishers::Members,
        ..one("chat", &args.target, &args.pace, args.rooms, args.members)
    };
    let what = format!("chat: {} rooms of {} each at {}", args.rooms, args.members, place(&args.target)?);
    run(Common {
        what,
        groups: vec![group],
        pace: &args.pace,
        run: &args.run,
        expect: &args.expect,
        slow: false,
        p99_ratio: None,
        scales: None,
    })
}

/// Some members stop reading.
pub fn slow(args: &Slow) -> anyhow::Result<Verdict> {
    let group = Group { stalled: args.stalled, ..one("slow", &args.target, &args.pace, 1, args.members) };
    let port = args.target.resolve(1)?.entrance.address.socket.port();
    let scales = args.metrics.clone().map(|at| Scales::new(at, args.metric.clone(), port, args.stalled));
    let scales = scales.transpose()?;
    let what = format!(
        "slow: {} of {} stop reading at {}",
        args.stalled,
        args.members + args.stalled,
        place(&args.target)?
    );
    run(Common {
        what,
        groups: vec![group],
        pace: &args.pace,
        run: &args.run,
        expect: &args.expect,
        slow: true,
        p99_ratio: args.expect_p99_ratio,
        scales,
    })
}

/// Several groups at once.
pub fn mixed(args: &Mixed) -> anyhow::Result<Verdict> {
    const USUAL: [&str; 5] = [
        "name=big members=500 rate=10",
        "name=small rooms=100 members=5 rate=100",
        "name=chat rooms=5 members=20 publishers=members rate=50",
        "name=idle members=500 publishers=nobody",
        "name=visited rooms=5 members=10 rate=50 visitors=50 churn=10",
    ];
    let words: Vec<&str> = match args.group.as_slice() {
        [] => USUAL.to_vec(),
        groups => groups.iter().map(String::as_str).collect(),
    };
    let mut groups: Vec<Group> = Vec::new();
    for (number, words) in (1..).zip(words) {
        let own = file::group(words)?;
        let name = own.name.clone().unwrap_or_else(|| format!("group {number}"));
        let mut group = one(&name, &args.target, &args.pace, own.rooms, own.members);
        group.first_room = groups.last().map_or(0, |last| last.first_room + last.rooms);
        group.publishers = match own.publishers {
            load::Publishers::One => Publishers::One,
            load::Publishers::Members => Publishers::Members,
            load::Publishers::Nobody => Publishers::Nobody,
        };
        group.rate = own.rate.unwrap_or(group.rate);
        group.size = own.size.unwrap_or(group.size);
        group.burst = own.burst.unwrap_or(group.burst);
        group.messages = own.messages.or(group.messages);
        (group.visitors, group.churn) = (own.visitors, own.churn);
        ensure!(own.churn >= 0.0 && own.churn <= 1e5, "--group {words}: churn is 0 to 100000 per second");
        group.target.url = own.url.unwrap_or(group.target.url);
        group.target.protocol = own.protocol.unwrap_or(group.target.protocol);
        group.target.channel = own.channel.or(group.target.channel);
        group.target.publish = own.publish.unwrap_or(group.target.publish);
        groups.push(group);
    }
    let rooms: u32 = groups.iter().map(|group| group.rooms).sum();
    for group in &groups {
        // Rooms are numbered across groups, so each group's template must distinguish all of them.
        group.target.resolve(rooms).with_context(|| format!("group {}", group.name))?;
    }
    let what = format!("mixed: {} groups at {}", groups.len(), place(&args.target)?);
    run(Common {
        what,
        groups,
        pace: &args.pace,
        run: &args.run,
        expect: &args.expect,
        slow: false,
        p99_ratio: None,
        scales: None,
    })
}

fn run(mut args: Common<'_>) -> anyhow::Result<Verdict> {
    let mut scales = args.scales.take();
    let args = &args;
    for group in &args.groups {
        group.target.resolve(group.rooms)?;
        Shape::asked(group.payload, group.size)?;
    }
    let outputs = Outputs::of_run(args.run)?;
    let (stop, server) = begin_run(args.run)?;
    let rss_before = server.rss()?;
    let plan = plan_of(args.run, args.groups.clone());
    let live = Live::new(args.run.quiet);
    let mut crew = Crew::start(plan, server)?;
    let published = if open_all(&mut crew, &live, &stop)? {
        publish(&mut crew, args, scales.as_mut(), &live, &stop)?
    } else {
        Published::nothing(args, &crew, &stop)
    };
    let rss_after = crew.server_rss();
    crew.end()?;
    drop(live);
    let mut report = assemble(args, &crew, &published)?;
    if let (Some(cpu), Some(before), Some(after)) = (published.server, rss_before, rss_after) {
        let most = crew.timeline.points.iter().filter_map(|point| point.server_rss).max().unwrap_or(after);
        report.server = Some(ServerReport {
            cpu,
            cpu_per_million: per_million(cpu, report.counts.delivered),
            share: ratio(cpu.total(), published.measured),
            rss_before: before,
            rss_after: after,
            rss_most: most.max(after),
        });
    } else if rss_before.is_some() && published.interrupted.is_none() {
        report.warnings.push("the server's process has exited: its CPU time and memory are not known".into());
    }
    let troubles = Troubles {
        first_loss: crew.totals.first_loss.as_deref(),
        refused: crew.totals.refused_publications,
        first_refusal: crew.totals.first_refusal.as_deref(),
    };
    report.warn(crew.totals.refusals());
    match scales.as_ref().map(Scales::held) {
        Some(Ok(held)) => report.held = Some(held),
        Some(Err(why)) => {
            report.warnings.push(format!("the bytes held for the stalled clients are not known: {why}"));
        }
        None => {}
    }
    report.judge(args.expect, args.p99_ratio, &troubles);
    outputs.conclude(&report.document(), &report, report.interrupted.as_deref())
}

/// The measurements of the publishing phase.
struct Published {
    /// Why it was ended early, if it was.
    interrupted: Option<String>,
    /// Seconds from the first message to the last.
    seconds: f64,
    /// The same, according to the schedule.
    planned: f64,
    /// Seconds over which CPU time was measured.
    measured: f64,
    server: Option<Cpu>,
    tester: Option<Cpu>,
    busiest: Option<Share>,
}

impl Published {
    /// The result when the run ended before all clients were connected.
    fn nothing(args: &Common<'_>, crew: &Crew, stop: &Stop) -> Self {
        let cause = stop.cause().unwrap_or_default();
        let (standing, clients) = (crew.totals.standing, crew.plan.clients());
        Self {
            interrupted: Some(format!(
                "{cause} while connecting; {standing} of {clients} clients were ready"
            )),
            seconds: 0.0,
            planned: clock::seconds(planned(args, crew)),
            measured: 0.0,
            server: None,
            tester: None,
            busiest: None,
        }
    }
}

/// How many nanoseconds messages are due for, according to the schedule.
fn planned(args: &Common<'_>, crew: &Crew) -> u64 {
    let duration = clock::nanos(args.pace.duration.0);
    crew.plan.groups.iter().map(|group| group.lasts(duration)).max().unwrap_or(0)
}

fn publish(
    crew: &mut Crew,
    args: &Common<'_>,
    mut scales: Option<&mut Scales>,
    live: &Live,
    stop: &Stop,
) -> anyhow::Result<Published> {
    let duration = clock::nanos(args.pace.duration.0);
    let start = clock::now() + clock::nanos(LEAD);
    let (tester, server, begun) = (crew.cpu()?, crew.server_cpu(), Instant::now());
    crew.measure()?;
    live.doing("publishing");
    crew.order(&Order::Publish { start, duration })?;
    let mut going_on = true;
    if args.slow {
        let half = start + duration / 2;
        going_on = crew.until(stop, |_| clock::now() >= half, |crew| live.show(crew))?;
        crew.order(&Order::Stall)?;
        crew.phase()?;
        live.doing("publishing while some clients are stalled");
    }
    let mut watch = |crew: &Crew| {
        live.show(crew);
        if let Some(scales) = &mut scales {
            scales.look();
        }
    };
    going_on = going_on && crew.until(stop, Crew::is_done, &mut watch)?;
    let busiest = crew.busiest();
    let ended = clock::now();
    if !going_on {
        crew.order(&Order::Halt)?;
    }
    live.doing("waiting for the last messages");
    settle(crew, args.run.patience.0, live)?;
    let server = crew.server_cpu().zip(server).map(|(now, before)| now.since(before));
    let planned = planned(args, crew);
    let lasted = if going_on {
        crew.totals.last_sent.saturating_sub(start).max(planned)
    } else {
        ended.saturating_sub(start)
    };
    let interrupted = (!going_on).then(|| {
        let cause = stop.cause().unwrap_or_default();
        format!("{cause} after {:.1} of {:.1} s", clock::seconds(lasted), clock::seconds(planned))
    });
    Ok(Published {
        interrupted,
        seconds: clock::seconds(lasted),
        planned: clock::seconds(planned),
        measured: begun.elapsed().as_secs_f64(),
        server,
        tester: Some(crew.cpu()?.since(tester)),
        busiest,
    })
}

/// Waits until everything has arrived, or nothing has for `patience`.
fn settle(crew: &mut Crew, patience: Duration, live: &Live) -> anyhow::Result<()> {
    let mut progress = (crew.balance().1, Instant::now());
    loop {
        let (expected, delivered) = crew.balance();
        // The balance is final only when all workers have reported what they published.
        if delivered >= expected && crew.is_done() {
            return Ok(());
        }
        if delivered != progress.0 {
            progress = (delivered, Instant::now());
        } else if progress.1.elapsed() >= patience {
            return Ok(());
        }
        crew.listen()?;
        live.show(crew);
    }
}

fn assemble(args: &Common<'_>, crew: &Crew, published: &Published) -> anyhow::Result<LoadReport> {
    let (mut all, mut groups) = (Counts::default(), Vec::new());
    for (group, totals) in crew.plan.groups.iter().zip(&crew.totals.groups) {
        let tally = &totals.counts;
        let expected = group.expected(tally.published);
        let counts = Counts {
            published: tally.published,
            unsent: tally.unsent,
            expected,
            delivered: tally.delivered,
            missing: expected.saturating_sub(tally.delivered),
            duplicated: tally.duplicated,
            out_of_order: tally.out_of_order,
            foreign: tally.foreign,
            members_lost: tally.lost,
            visits: tally.visits,
            visitors_delivered: tally.visitors_delivered,
            visitors_missing: tally.visitors_missing,
        };
        all.add(&counts);
        let mut latencies = Latencies::new()?;
        totals.phases.iter().for_each(|phase| latencies.merge(phase));
        let (rooms, members) = (group.rooms, group.members);
        groups.push(GroupReport {
            name: group.name.clone(),
            rooms,
            members,
            counts,
            latency: latencies.summary(),
        });
    }
    let latencies = crew.totals.latencies(None)?;
    let phases = if args.slow { vec!["all reading", "some stalled"] } else { Vec::new() };
    let phase = |(number, name): (usize, &'static str)| {
        let latencies = crew.totals.latencies(Some(number))?;
        Ok(Phase { name, deliveries: latencies.count(), latency: latencies.summary() })
    };
    let phases: Vec<Phase> = phases.into_iter().enumerate().map(phase).collect::<anyhow::Result<_>>()?;
    let duration = clock::nanos(args.pace.duration.0);
    let due: u64 = crew.plan.groups.iter().map(|group| group.due_within(duration)).sum();
    #[expect(clippy::cast_precision_loss, reason = "counts below 2^53")]
    let per_second = |count: u64, seconds: f64| ratio(count as f64, seconds);
    Ok(LoadReport {
        what: args.what.clone(),
        machine: Machine::this(),
        processes: crew.plan.parts,
        clients: crew.plan.clients(),
        interrupted: published.interrupted.clone(),
        due,
        seconds: published.seconds,
        offered_rate: per_second(due, published.planned),
        achieved_rate: per_second(all.published, published.seconds),
        deliveries_per_second: per_second(all.delivered, published.seconds),
        counts: all,
        latency: latencies.summary(),
        groups,
        p99_ratio: growth(&phases),
        phases,
        held: None,
        server: None,
        tester: TesterReport {
            cpu: published.tester,
            cpu_per_million: published.tester.and_then(|cpu| per_million(cpu, all.delivered)),
            busiest: published.busiest.map(|share| share.running),
            starved: published.busiest.map(|share| share.waiting),
        },
        percentiles: latencies.curve(),
        timeline: crew.timeline.points.clone(),
        warnings: Vec::new(),
        expectations: Vec::new(),
    })
}

/// The ratio of the second phase's p99 to the first's.
fn growth(phases: &[Phase]) -> Option<f64> {
    let [before, after] = phases else { return None };
    ratio(after.latency?.p99, before.latency?.p99)
}

fn per_million(cpu: Cpu, deliveries: u64) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "counts below 2^53")]
    let deliveries = deliveries as f64;
    (deliveries > 0.0).then(|| cpu.total() / deliveries * 1e6)
}

fn one(name: &str, target: &TargetArgs, pace: &Pace, rooms: u32, members: u32) -> Group {
    Group {
        name: name.to_owned(),
        target: target.clone(),
        first_room: 0,
        rooms,
        members,
        rooms_per_client: 1,
        publishers: Publishers::One,
        echo: !pace.no_echo,
        rate: pace.rate,
        size: pace.size,
        payload: pace.payload,
        burst: pace.burst,
        messages: pace.messages,
        stalled: 0,
        visitors: 0,
        churn: 0.0,
    }
}

/// A description of the target, without its query.
fn place(target: &TargetArgs) -> anyhow::Result<String> {
    let resolved = target.resolve(1)?;
    Ok(format!("{}, published by {}", resolved.entrance.address, resolved.via))
}

/// Groups of clients that only receive, without publishers.
pub fn silent(name: &str, target: &TargetArgs, rooms: u32, connections: u32) -> Vec<Group> {
    let group = |rooms, members, first_room| Group {
        name: name.to_owned(),
        target: target.clone(),
        first_room,
        rooms,
        members,
        rooms_per_client: 1,
        publishers: Publishers::Nobody,
        echo: true,
        rate: 1.0,
        size: 0,
        payload: Payload::Dots,
        burst: 1,
        messages: None,
        stalled: 0,
        visitors: 0,
        churn: 0.0,
    };
    // Rooms are filled evenly; the first ones hold the remainder.
    let rooms = rooms.min(connections).max(1);
    let mut groups = vec![group(rooms, connections / rooms, 0)];
    if !connections.is_multiple_of(rooms) {
        groups.push(group(connections % rooms, 1, 0));
    }
    groups
}

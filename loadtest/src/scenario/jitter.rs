//! Clients that lose their connections again and again while messages flow into rooms with a history.
//!
//! The scenario starts a Redis and the nodes. Messages go straight into Redis, as a backend publishes them.
//! Each client comes back with its position, to any node, and must have received every message in the end:
//! once, in order, and without a gap.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    path::Path,
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{
    cli::history::Jitter,
    clock,
    crowd::{Crowd, Tally},
    dice::Dice,
    fleet::Fleet,
    journal::Journal,
    latency::Latency,
    payload::Shape,
    process,
    report::{
        Machine, Verdict, at_most,
        document::{Document, Expectation, Table},
        or_nothing,
        outputs::Outputs,
        unmet, written,
    },
    stop::Stop,
    swarm::OPENING_AT_ONCE,
    workshop::{Workshop, with_scratch},
};

/// The longest wait for arrivals between two messages.
const GLANCE: Duration = Duration::from_millis(5);

/// How long no client may make progress while all come back at the end.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Serialize)]
struct JitterReport {
    what: String,
    machine: Machine,
    counts: Tally,
    /// Returns that ended before the client had caught up, because it dropped its connection again.
    unfinished: u64,
    /// Microseconds from the start of a client's connection until it had everything.
    catching_up: Option<Latency>,
    /// Microseconds from when a message was due until a client that was live had it.
    latency: Option<Latency>,
    interrupted: Option<String>,
    warnings: Vec<String>,
    expectations: Vec<Expectation>,
}

/// Runs the scenario and prints its report.
pub fn run(args: &Jitter) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.stage.common)?;
    let stop = super::begin(&args.stage.common)?;
    let mut report = JitterReport::new(args);
    let outcome = with_scratch("jitter", |scratch| measure(args, scratch, &mut report, &stop));
    report.interrupted = stop.early_end(outcome)?;
    report.conclude(args);
    outputs.conclude(&report.document(), &report, report.interrupted.as_deref())
}

fn measure(args: &Jitter, scratch: &Path, report: &mut JitterReport, stop: &Stop) -> anyhow::Result<bool> {
    process::allow_descriptors(args.clients as usize)?;
    let workshop = Workshop::for_stage(&args.stage, scratch);
    let mut fleet = Fleet::start(&workshop, args.stage.history_size, &[])?;
    fleet.load_functions()?;
    for _ in 1..args.nodes {
        fleet.add_node()?;
    }
    let mut doors = Vec::new();
    for node in 0..args.nodes as usize {
        for &protocol in &args.protocols {
            doors.push(fleet.entrance(node, protocol.into())?);
        }
    }
    let (run, shape) = (process::run_id(), Shape::dots(args.stage.size));
    let mut crowd = Crowd::new(doors, args.rooms, run, shape)?;
    let door = |client: u32, node: u64| {
        let protocols = args.protocols.len();
        usize::try_from(node).unwrap_or(0) * protocols + client as usize % protocols
    };
    let nodes = u64::from(args.nodes);
    let place = |client: u32| (client % args.rooms, door(client, u64::from(client) % nodes));
    crowd.open(args.clients, place, stop)?;
    let mut journal = Journal::open(&fleet.redis, args.rooms, run, shape)?;

    let mut dice = Dice::new(1);
    // When each client acts next, and whether it comes back then.
    let mut plans = BinaryHeap::new();
    let begun = clock::now();
    for client in 0..args.clients {
        let first = dice.below(2 * clock::nanos(args.up.0));
        plans.push(Reverse((begun + first, client, false)));
    }
    let until = Instant::now() + args.duration.0;
    let mut number = 0;
    while Instant::now() < until && !stop.is_set() {
        let now = clock::now();
        while let Some(&Reverse((due, client, comes_back))) = plans.peek()
            && due <= now
            && (!comes_back || crowd.opening() < OPENING_AT_ONCE)
        {
            plans.pop();
            if comes_back {
                crowd.lead_to(client as usize, door(client, dice.below(nodes)));
                crowd.bring_back(client as usize, true)?;
            } else {
                crowd.drop_connection(client as usize);
            }
            let rest = if comes_back { args.up.0 } else { args.down.0 };
            plans.push(Reverse((now + dice.about(rest), client, !comes_back)));
        }
        let next = begun + clock::due(number, args.rate);
        if now >= next {
            let room = u32::try_from(number % u64::from(args.rooms)).unwrap_or(0);
            journal.publish(room, next)?;
            number += 1;
        }
        crowd.note_published(&journal);
        journal.turn()?;
        journal.ensure_connected()?;
        let wait = begun.saturating_add(clock::due(number, args.rate)).saturating_sub(clock::now());
        crowd.attend(Duration::from_nanos(wait).min(GLANCE))?;
    }
    let complete = !stop.is_set();
    while let Some(Reverse((_, client, comes_back))) = plans.pop() {
        if comes_back {
            while crowd.opening() >= OPENING_AT_ONCE {
                crowd.attend(GLANCE)?;
            }
            crowd.bring_back(client as usize, true)?;
        }
    }
    // A client that misses something never becomes live; the counts say what.
    let _incomplete = crowd.await_live(stop, PATIENCE.min(args.stage.patience.0));
    crowd.finish(&mut journal, stop, args.stage.patience.0)?;
    report.counts = crowd.books.tally(&journal);
    report.unfinished = report.counts.returns.saturating_sub(crowd.books.catching_up.count());
    report.catching_up = crowd.books.catching_up.summary();
    report.latency = crowd.books.latency.summary();
    Ok(complete && !stop.is_set())
}

impl JitterReport {
    fn new(args: &Jitter) -> Self {
        Self {
            what: format!(
                "jitter: {} clients ({}) in {} rooms on {} nodes, {} messages/s, connected for about {:?}, away for \
                 about {:?}",
                args.clients,
                super::names(&args.protocols),
                args.rooms,
                args.nodes,
                args.rate,
                args.up.0,
                args.down.0
            ),
            machine: Machine::this(),
            counts: Tally::default(),
            unfinished: 0,
            catching_up: None,
            latency: None,
            interrupted: None,
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    fn conclude(&mut self, args: &Jitter) {
        if let Some(why) = &self.interrupted {
            self.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
        }
        let mut found = vec![Expectation {
            words: format!("every message once, in order, without a gap: {}", self.counts.words()),
            met: self.counts.is_exact(),
        }];
        if let Some(allowed) = args.expect_p99 {
            let p99 = self.catching_up.map(|latency| latency.p99);
            let words = or_nothing(p99, written);
            let words = format!("--expect-p99 {:?} until a client has caught up: {words}", allowed.0);
            found.push(Expectation { words, met: at_most(p99, allowed.0.as_secs_f64() * 1e6) });
        }
        unmet(&mut found, self.interrupted.as_deref());
        self.expectations = found;
    }

    fn document(&self) -> Document {
        let mut table = Table::new("", &["", "p50", "p90", "p95", "p99", "p99.9", "max"]);
        for (name, latency) in
            [("from a return until caught up", self.catching_up), ("a message to live clients", self.latency)]
        {
            let cells = latency.map_or([None; 6], |latency| {
                let Latency { p50, p90, p95, p99, p999, max, .. } = latency;
                [p50, p90, p95, p99, p999, max].map(Some)
            });
            let cells = cells.map(|cell| or_nothing(cell, written));
            table.row(std::iter::once(name.to_owned()).chain(cells));
        }
        let mut facts = vec![self.machine.to_string(), self.counts.words()];
        if self.unfinished > 0 {
            facts.push(format!("{} returns ended before the client had caught up", self.unfinished));
        }
        Document {
            title: self.what.clone(),
            facts,
            tables: vec![table],
            warnings: self.warnings.clone(),
            expectations: self.expectations.clone(),
            ..Document::default()
        }
    }
}

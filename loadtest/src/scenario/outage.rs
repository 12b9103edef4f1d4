//! How long a client is without messages when Redis, or its node, is killed.
//!
//! Messages are published at a steady rate to every room. Redis comes back without its data, so clients are told
//! one gap; clients of a killed node come back to the other one at once, and miss nothing. The time without
//! messages is the longest between two messages of a client.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::ValueEnum;
use serde::Serialize;

use crate::{
    cli::history::{Outage, Victim},
    clock,
    crowd::{Crowd, Tally},
    fleet::Fleet,
    journal::Journal,
    latency::{Latencies, Latency},
    payload::Shape,
    process,
    redis::Link,
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
const GLANCE: Duration = Duration::from_millis(2);

/// How long everything may take to come back.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize)]
struct OutageReport {
    what: String,
    machine: Machine,
    legs: Vec<Leg>,
    interrupted: Option<String>,
    warnings: Vec<String>,
    expectations: Vec<Expectation>,
}

#[derive(Debug, Serialize)]
struct Leg {
    /// `redis` or `node`.
    killed: String,
    rounds: u32,
    /// Microseconds between two messages of a client: the longest of each client and round. Of a node's kill,
    /// only its own clients count.
    pauses: Option<Latency>,
    /// Microseconds from a client's return until it had everything, if its node was killed.
    catching_up: Option<Latency>,
    /// Clients that were told more than one gap for each kill of Redis.
    told_twice: usize,
    counts: Tally,
    #[serde(skip)]
    all_pauses: Option<Latencies>,
}

/// Runs the scenario and prints its report.
pub fn run(args: &Outage) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.stage.common)?;
    let stop = super::begin(&args.stage.common)?;
    let mut report = OutageReport::new(args);
    let outcome = with_scratch("outage", |scratch| {
        let mut complete = true;
        for &victim in &args.kill {
            if stop.is_set() {
                return Ok(false);
            }
            let mut leg = Leg::new(victim);
            let outcome = measure(args, victim, scratch, &mut leg, &stop);
            leg.pauses = leg.all_pauses.as_ref().and_then(Latencies::summary);
            report.legs.push(leg);
            complete &= outcome?;
        }
        Ok(complete)
    });
    report.interrupted = stop.early_end(outcome)?;
    report.conclude(args);
    outputs.conclude(&report.document(), &report, report.interrupted.as_deref())
}

fn measure(
    args: &Outage,
    victim: Victim,
    scratch: &Path,
    leg: &mut Leg,
    stop: &Stop,
) -> anyhow::Result<bool> {
    process::allow_descriptors(args.clients as usize)?;
    let workshop = Workshop::for_stage(&args.stage, scratch);
    let mut fleet = Fleet::start(&workshop, args.stage.history_size, &[])?;
    fleet.load_functions()?;
    let second = fleet.add_node()?;
    let (run, shape) = (process::run_id(), Shape::dots(args.stage.size));
    let crowd = Crowd::new(Vec::new(), args.rooms, run, shape)?;
    let journal = Journal::open(&fleet.redis, args.rooms, run, shape)?;
    let mut test = Test { args, fleet, crowd, journal, begun: clock::now(), number: 0, stop };
    let doors = [test.add_doors(0)?, test.add_doors(second)?];
    let protocols = args.protocols.len();
    let place = |client: u32| {
        let door = doors.get(client as usize % 2).copied().unwrap_or(0);
        (client / 2 % args.rooms, door + client as usize / 2 % protocols)
    };
    test.crowd.open(args.clients, place, stop)?;
    test.begun = clock::now();
    let mut pauses = Latencies::new()?;
    let mut node = second;
    for _ in 0..args.rounds {
        test.publish_for(args.peace.0)?;
        test.crowd.books.start_pauses();
        let theirs = match victim {
            Victim::Redis => test.kill_redis().map(|()| None)?,
            Victim::Node => Some(test.kill_node(node, doors.first().copied().unwrap_or(0))?),
        };
        test.publish_for(args.peace.0)?;
        if stop.is_set() {
            break;
        }
        test.crowd.finish(&mut test.journal, stop, args.stage.patience.0)?;
        let counts = |client: usize| theirs.as_ref().is_none_or(|theirs| theirs.contains(&client));
        pauses.merge(&test.crowd.books.pauses(counts)?);
        leg.rounds += 1;
        if let Some(theirs) = theirs.filter(|_| leg.rounds < args.rounds) {
            node = test.fleet.add_node()?;
            let door = test.add_doors(node)?;
            for client in theirs {
                test.crowd.lead_to(client, door + client / 2 % protocols);
                test.return_one(client)?;
            }
            test.crowd.await_live(stop, PATIENCE)?;
        }
        test.begun = clock::now();
        test.number = 0;
    }
    leg.all_pauses = Some(pauses);
    leg.counts = test.crowd.books.tally(&test.journal);
    leg.told_twice = test.crowd.books.told_more_than(u64::from(leg.rounds));
    leg.catching_up = test.crowd.books.catching_up.summary();
    Ok(leg.rounds == args.rounds && !stop.is_set())
}

struct Test<'a, 'w> {
    args: &'a Outage,
    fleet: Fleet<'w>,
    crowd: Crowd,
    journal: Journal,
    /// When the schedule of messages began, and how many were due since.
    begun: u64,
    number: u64,
    stop: &'a Stop,
}

impl Test<'_, '_> {
    /// Adds a door of `node` for each protocol; returns the first.
    fn add_doors(&mut self, node: usize) -> anyhow::Result<usize> {
        let mut first = None;
        for &protocol in &self.args.protocols {
            let door = self.crowd.add_door(self.fleet.entrance(node, protocol.into())?);
            first.get_or_insert(door);
        }
        first.context("a protocol")
    }

    /// Publishes what is due, and handles arrivals. Messages that are due while Redis is away are not published.
    fn turn(&mut self) -> anyhow::Result<()> {
        while clock::now() >= self.begun + clock::due(self.number, self.args.rate) {
            let due = self.begun + clock::due(self.number, self.args.rate);
            let room = u32::try_from(self.number % u64::from(self.args.rooms)).unwrap_or(0);
            self.number += 1;
            if self.journal.is_connected() {
                self.journal.publish(room, due)?;
            }
        }
        self.crowd.note_published(&self.journal);
        self.journal.turn()?;
        let next = self.begun + clock::due(self.number, self.args.rate);
        let wait = Duration::from_nanos(next.saturating_sub(clock::now()));
        self.crowd.attend(wait.min(GLANCE))
    }

    fn publish_for(&mut self, span: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + span;
        while Instant::now() < until && !self.stop.is_set() {
            self.turn()?;
        }
        Ok(())
    }

    fn kill_redis(&mut self) -> anyhow::Result<()> {
        self.fleet.kill_redis()?;
        self.publish_for(self.args.down.0)?;
        ensure!(!self.journal.is_connected(), "Redis was killed, and the connection to it stands");
        self.fleet.restart_redis()?;
        let begun = Instant::now();
        while Link::open(&self.fleet.redis).and_then(|mut link| link.ask(&["PING"])).is_err() {
            self.crowd.attend(GLANCE)?;
            ensure!(begun.elapsed() < PATIENCE, "Redis did not start again");
        }
        self.fleet.load_functions()?;
        self.journal.reopen()
    }

    /// Kills `node`; its clients come back to the first node at once. Returns them.
    fn kill_node(&mut self, node: usize, door: usize) -> anyhow::Result<Vec<usize>> {
        self.crowd.books.tolerant = true;
        self.fleet.kill_node(node)?;
        let (begun, mut theirs) = (Instant::now(), Vec::new());
        loop {
            self.turn()?;
            for client in std::mem::take(&mut self.crowd.books.lost) {
                theirs.push(client);
                self.crowd.lead_to(client, door + client / 2 % self.args.protocols.len());
                self.return_one(client)?;
            }
            if theirs.len() == self.crowd.len() / 2 && self.crowd.is_live() {
                break;
            }
            ensure!(!self.stop.is_set(), "ended while clients came back");
            ensure!(begun.elapsed() < PATIENCE, "{} clients of the killed node have returned", theirs.len());
        }
        self.crowd.books.tolerant = false;
        Ok(theirs)
    }

    fn return_one(&mut self, client: usize) -> anyhow::Result<()> {
        while self.crowd.opening() >= OPENING_AT_ONCE {
            self.crowd.attend(GLANCE)?;
        }
        self.crowd.bring_back(client, true)
    }
}

impl Leg {
    fn new(victim: Victim) -> Self {
        let killed = victim.to_possible_value().map(|value| value.get_name().to_owned());
        Self {
            killed: killed.unwrap_or_default(),
            rounds: 0,
            pauses: None,
            catching_up: None,
            told_twice: 0,
            counts: Tally::default(),
            all_pauses: None,
        }
    }
}

impl OutageReport {
    fn new(args: &Outage) -> Self {
        Self {
            what: format!(
                "outage: {} clients ({}) on two nodes, {} rooms, {} messages/s; Redis is down for {:?}",
                args.clients,
                super::names(&args.protocols),
                args.rooms,
                args.rate,
                args.down.0
            ),
            machine: Machine::this(),
            legs: Vec::new(),
            interrupted: None,
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    fn conclude(&mut self, args: &Outage) {
        if let Some(why) = &self.interrupted {
            self.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
        }
        let mut found = Vec::new();
        for leg in &self.legs {
            let counts = leg.counts.words();
            found.push(if leg.killed == "redis" {
                Expectation {
                    words: format!(
                        "every message once and in order, or under one gap for each kill: {counts}"
                    ),
                    met: leg.counts.is_told() && leg.told_twice == 0 && leg.rounds == args.rounds,
                }
            } else {
                Expectation {
                    words: format!("every message once, in order, without a gap: {counts}"),
                    met: leg.counts.is_exact() && leg.rounds == args.rounds,
                }
            });
            if let Some(allowed) = args.expect_pause {
                let longest = leg.pauses.map(|pauses| pauses.max);
                let words = or_nothing(longest, written);
                let words = format!("--expect-pause {:?}, {} killed: {words} at most", allowed.0, leg.killed);
                found.push(Expectation { words, met: at_most(longest, allowed.0.as_secs_f64() * 1e6) });
            }
        }
        unmet(&mut found, self.interrupted.as_deref());
        self.expectations = found;
    }

    fn document(&self) -> Document {
        let mut table = Table::new("", &["killed", "rounds", "p50", "p95", "p99", "max"]);
        for leg in &self.legs {
            for (what, latency) in [
                (format!("{}: longest time without messages", leg.killed), leg.pauses),
                (format!("{}: from a return until caught up", leg.killed), leg.catching_up),
            ] {
                let Some(latency) = latency else { continue };
                let cells = [latency.p50, latency.p95, latency.p99, latency.max].map(written);
                table.row([what, leg.rounds.to_string()].into_iter().chain(cells));
            }
        }
        Document {
            title: self.what.clone(),
            facts: std::iter::once(self.machine.to_string())
                .chain(self.legs.iter().map(|leg| format!("{} killed: {}", leg.killed, leg.counts.words())))
                .collect(),
            tables: vec![table],
            warnings: self.warnings.clone(),
            expectations: self.expectations.clone(),
            ..Document::default()
        }
    }
}

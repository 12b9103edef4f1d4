//! All clients of rooms with a history come back at once.
//!
//! Each round compares two storms of the same clients: one in which they connect without a position, after
//! nothing was published, and one in which they come back with their positions after they have missed
//! messages. Either storm goes to the node that they were connected to, which has the messages in memory
//! because a few other clients have stayed, or to a new node, which has to read the log.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::ensure;
use clap::ValueEnum;
use serde::Serialize;

use crate::{
    cli::history::{Resume, Sharing, Source},
    crowd::{Crowd, Tally},
    fleet::Fleet,
    journal::Journal,
    payload::Shape,
    process,
    redis::Link,
    report::{
        Machine, Verdict, at_most,
        document::{Document, Expectation, Table},
        median, or_nothing,
        outputs::Outputs,
        room::range,
        unmet,
    },
    stop::Stop,
    target::Protocol,
    workshop::{Workshop, pause, with_scratch},
};

/// Rooms of one client that stays.
const ANCHORED: u32 = 500;

/// How long the node may take to notice that its clients are gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// The commands that read a log.
const READS: [&str; 2] = ["xrange", "xrevrange"];

#[derive(Debug, Serialize)]
struct ResumeReport {
    what: String,
    machine: Machine,
    clients: u32,
    missed: u32,
    legs: Vec<Leg>,
    interrupted: Option<String>,
    warnings: Vec<String>,
    expectations: Vec<Expectation>,
}

/// The rounds of one number of rooms, from one source.
#[derive(Debug, Serialize)]
struct Leg {
    rooms: u32,
    /// `memory` or `log`.
    from: String,
    rounds: Vec<Round>,
    median: Option<Medians>,
    /// The smallest and the largest round of three of these numbers.
    seconds_range: Option<(f64, f64)>,
    beyond_cpu_range: Option<(f64, f64)>,
    reads_per_room_range: Option<(f64, f64)>,
    counts: Tally,
}

#[derive(Debug, Serialize)]
struct Round {
    plain: Storm,
    resumed: Storm,
}

/// One storm of all clients.
#[derive(Debug, Serialize)]
struct Storm {
    /// Seconds until every client was ready and had everything.
    seconds: f64,
    /// Microseconds of the node's CPU for each client.
    cpu: f64,
    /// Microseconds of Redis' CPU for each client.
    redis_cpu: f64,
    /// The calls of each command of Redis.
    calls: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
struct Medians {
    plain_seconds: f64,
    seconds: f64,
    plain_cpu: f64,
    cpu: f64,
    /// The median of the rounds' differences.
    beyond_cpu: f64,
    redis_cpu: f64,
    /// How often a log was read, for each room.
    reads_per_room: f64,
}

/// Runs the scenario and prints its report.
pub fn run(args: &Resume) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.stage.common)?;
    let stop = super::begin(&args.stage.common)?;
    let mut report = ResumeReport::new(args);
    let outcome = with_scratch("resume", |scratch| {
        let mut complete = true;
        for &sharing in &args.rooms {
            for &source in &args.from {
                if stop.is_set() {
                    return Ok(false);
                }
                let mut leg = Leg::new(args, sharing, source);
                let outcome = measure(args, source, scratch, &mut leg, &stop);
                leg.conclude();
                report.legs.push(leg);
                complete &= outcome?;
            }
        }
        Ok(complete)
    });
    report.interrupted = stop.early_end(outcome)?;
    report.conclude(args);
    outputs.conclude(&report.document(), &report, report.interrupted.as_deref())
}

fn measure(
    args: &Resume,
    source: Source,
    scratch: &Path,
    leg: &mut Leg,
    stop: &Stop,
) -> anyhow::Result<bool> {
    process::allow_descriptors(args.clients as usize + 100)?;
    let workshop = Workshop::for_stage(&args.stage, scratch);
    let settings = [format!("limits.rooms_per_session={ANCHORED}")];
    let mut fleet = Fleet::start(&workshop, args.stage.history_size, &settings)?;
    fleet.load_functions()?;
    let (run, shape) = (process::run_id(), Shape::dots(args.stage.size));
    let protocol = args.protocol.into();
    let mut crowd = Crowd::new(vec![fleet.entrance(0, protocol)?], leg.rooms, run, shape)?;
    let rooms = leg.rooms;
    crowd.open(args.clients, |client| (client % rooms, 0), stop)?;
    let mut journal = Journal::open(&fleet.redis, rooms, run, shape)?;
    let mut test = Test { args, fleet: &mut fleet, crowd: &mut crowd, protocol, node: 0, anchors: 0 };
    if source == Source::Memory {
        let door = test.fleet.entrance(0, Protocol::Centrifuge)?;
        test.anchors = test.crowd.anchor(&door, ANCHORED, stop)?;
    }
    // Everybody has a position of a message.
    test.crowd.finish(&mut journal, stop, args.stage.patience.0)?;
    for _ in 0..args.rounds {
        if stop.is_set() {
            break;
        }
        let plain = test.storm(source, 0, &mut journal, stop)?;
        let resumed = test.storm(source, args.missed, &mut journal, stop)?;
        // Everybody is live: one message to every room reaches all.
        test.crowd.finish(&mut journal, stop, args.stage.patience.0)?;
        leg.rounds.push(Round { plain, resumed });
    }
    leg.counts = test.crowd.books.tally(&journal);
    Ok(leg.rounds.len() == args.rounds as usize && !stop.is_set())
}

struct Test<'a, 'w> {
    args: &'a Resume,
    fleet: &'a mut Fleet<'w>,
    crowd: &'a mut Crowd,
    protocol: Protocol,
    /// The node that clients are connected to.
    node: usize,
    anchors: usize,
}

impl Test<'_, '_> {
    /// All clients drop their connections, miss `missed` messages in every room, and come back; without a
    /// position if they have missed nothing.
    fn storm(
        &mut self,
        source: Source,
        missed: u32,
        journal: &mut Journal,
        stop: &Stop,
    ) -> anyhow::Result<Storm> {
        for client in 0..self.crowd.len() {
            self.crowd.drop_connection(client);
        }
        if source == Source::Log {
            self.fleet.kill_node(self.node)?;
        } else {
            self.await_departure(stop)?;
        }
        self.crowd.publish_everywhere(journal, missed, stop)?;
        if source == Source::Log {
            self.node = self.fleet.add_node()?;
            let door = self.crowd.add_door(self.fleet.entrance(self.node, self.protocol)?);
            for client in 0..self.crowd.len() {
                self.crowd.lead_to(client, door);
            }
        } else {
            self.crowd.await_anchors(journal.published().iter().sum(), stop)?;
        }
        let mut redis = Link::open(&self.fleet.redis)?;
        let calls = redis.calls()?;
        let (cpu, redis_cpu) = (self.fleet.cpu(self.node)?, redis.cpu()?);
        let took = self.crowd.bring_all_back(missed > 0, stop)?;
        let cpu = self.fleet.cpu(self.node)?.since(cpu).total();
        let redis_cpu = redis.cpu()?.since(redis_cpu).total();
        let clients = f64::from(self.args.clients);
        let mut called = redis.calls()?;
        for (name, count) in &mut called {
            *count -= calls.get(name).copied().unwrap_or(0);
        }
        called.retain(|name, count| *count > 0 && name != "info");
        Ok(Storm {
            seconds: took.as_secs_f64(),
            cpu: cpu * 1e6 / clients,
            redis_cpu: redis_cpu * 1e6 / clients,
            calls: called,
        })
    }

    /// Waits until the node has only the connections of those who stay.
    fn await_departure(&self, stop: &Stop) -> anyhow::Result<()> {
        let begun = Instant::now();
        #[expect(clippy::cast_precision_loss, reason = "a few clients")]
        let anchors = self.anchors as f64;
        while self.fleet.metric(self.node, "tidegate_connections")? > anchors {
            ensure!(!stop.is_set(), "ended while clients leave");
            ensure!(begun.elapsed() < PATIENCE, "the node still has clients that have left");
            pause(Duration::from_millis(20))?;
        }
        Ok(())
    }
}

impl Leg {
    fn new(args: &Resume, sharing: Sharing, source: Source) -> Self {
        let from = source.to_possible_value().map(|value| value.get_name().to_owned());
        Self {
            rooms: if sharing == Sharing::One { 1 } else { args.clients },
            from: from.unwrap_or_default(),
            rounds: Vec::new(),
            median: None,
            seconds_range: None,
            beyond_cpu_range: None,
            reads_per_room_range: None,
            counts: Tally::default(),
        }
    }

    fn conclude(&mut self) {
        let of = |value: fn(&Round) -> f64| median(self.rounds.iter().map(value).collect());
        let rooms = f64::from(self.rooms);
        self.median = (|| {
            Some(Medians {
                plain_seconds: of(|round| round.plain.seconds)?,
                seconds: of(|round| round.resumed.seconds)?,
                plain_cpu: of(|round| round.plain.cpu)?,
                cpu: of(|round| round.resumed.cpu)?,
                beyond_cpu: of(|round| round.resumed.cpu - round.plain.cpu)?,
                redis_cpu: of(|round| round.resumed.redis_cpu)?,
                reads_per_room: of(|round| round.resumed.reads())? / rooms,
            })
        })();
        self.seconds_range = range(self.rounds.iter().map(|round| round.resumed.seconds));
        self.beyond_cpu_range = range(self.rounds.iter().map(|round| round.resumed.cpu - round.plain.cpu));
        self.reads_per_room_range = range(self.rounds.iter().map(|round| round.resumed.reads() / rooms));
    }
}

impl Storm {
    #[expect(clippy::cast_precision_loss, reason = "calls of one storm")]
    fn reads(&self) -> f64 {
        READS.iter().filter_map(|name| self.calls.get(*name)).sum::<u64>() as f64
    }
}

impl ResumeReport {
    fn new(args: &Resume) -> Self {
        Self {
            what: format!(
                "resume: {} clients ({}) come back at once after {} messages in each room",
                args.clients,
                super::names(&[args.protocol]),
                args.missed
            ),
            machine: Machine::this(),
            clients: args.clients,
            missed: args.missed,
            legs: Vec::new(),
            interrupted: None,
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    fn conclude(&mut self, args: &Resume) {
        if let Some(why) = &self.interrupted {
            self.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
        }
        let mut found = Vec::new();
        for leg in &self.legs {
            let which = format!("{} rooms, from {}", leg.rooms, leg.from);
            found.push(Expectation {
                words: format!(
                    "every message once, in order, without a gap, {which}: {}",
                    leg.counts.words()
                ),
                met: leg.counts.is_exact() && leg.rounds.len() == args.rounds as usize,
            });
            let of = |value: fn(&Medians) -> f64| leg.median.as_ref().map(value);
            if let Some(allowed) = args.expect_cpu.filter(|_| leg.from == "memory") {
                let cpu = of(|median| median.beyond_cpu);
                let words = or_nothing(cpu, |cpu| format!("{cpu:.1} µs of CPU beyond a plain connect"));
                let words = format!("--expect-cpu {allowed}, {which}: {words}");
                found.push(Expectation { words, met: at_most(cpu, allowed) });
            }
            if let Some(allowed) = args.expect_reads {
                let reads = of(|median| median.reads_per_room);
                let words = or_nothing(reads, |reads| format!("{reads:.3} readings of the log per room"));
                let words = format!("--expect-reads {allowed}, {which}: {words}");
                found.push(Expectation { words, met: at_most(reads, allowed) });
            }
        }
        unmet(&mut found, self.interrupted.as_deref());
        self.expectations = found;
    }

    fn document(&self) -> Document {
        let head = [
            "rooms, from",
            "plain s",
            "all live s",
            "plain µs",
            "µs each",
            "beyond µs",
            "Redis µs each",
            "reads per room",
        ];
        let mut table = Table::new("Medians; CPU of the node and of Redis for each client", &head);
        let mut facts = vec![self.machine.to_string()];
        for leg in &self.legs {
            let cells = leg.median.as_ref().map_or_else(Vec::new, |median| {
                vec![
                    format!("{:.3}", median.plain_seconds),
                    format!("{:.3}", median.seconds),
                    format!("{:.1}", median.plain_cpu),
                    format!("{:.1}", median.cpu),
                    format!("{:.1}", median.beyond_cpu),
                    format!("{:.2}", median.redis_cpu),
                    format!("{:.4}", median.reads_per_room),
                ]
            });
            table.row(std::iter::once(format!("{}, {}", leg.rooms, leg.from)).chain(cells));
            for (number, round) in (1..).zip(&leg.rounds) {
                let called = |storm: &Storm| {
                    let each = storm.calls.iter().map(|(name, count)| format!("{name} {count}"));
                    let each: Vec<String> = each.collect();
                    if each.is_empty() { "none".to_owned() } else { each.join(", ") }
                };
                facts.push(format!(
                    "{} rooms, from {}, round {number}: calls of Redis {}; of a plain connect {}",
                    leg.rooms,
                    leg.from,
                    called(&round.resumed),
                    called(&round.plain)
                ));
            }
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

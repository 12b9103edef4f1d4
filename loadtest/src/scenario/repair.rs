//! Interrupts a node with many rooms that have a history: how soon has it repaired them?
//!
//! The node connects to Redis as a user of its own. That user is locked out, one message is published to every
//! room, and the user is let in again. A room is repaired when its client has received the message. Meanwhile
//! another connection sends one command after the other, which shows how long Redis is kept from others.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use serde::Serialize;

use crate::{
    cli::history::Repair,
    clock,
    dialect::{Dialect, Seat},
    fleet::Fleet,
    flow::Lanes,
    journal::Journal,
    latency::{Latencies, Latency},
    ledger::Counts,
    payload::Shape,
    process,
    redis::Link,
    report::{
        Machine, Verdict, at_most,
        document::{Document, Expectation, Table},
        median, or_nothing,
        outputs::Outputs,
        room::range,
        unmet, written,
    },
    stamp::Finder,
    stop::Stop,
    swarm::{Event, Swarm},
    target::{Protocol, Redis},
    workshop::{Workshop, pause, with_scratch},
};

/// The user that the node connects as.
const USER: &str = "node";
const PASSWORD: &str = "this-run";

/// Clients that connect at the same time.
const AT_ONCE: usize = 8;

/// Publications in flight.
const WINDOW: usize = 512;

/// How often Redis is asked whether the node is back, and between two commands of the other connection.
const ASKING: Duration = Duration::from_millis(10);
const RESTING: Duration = Duration::from_millis(1);

/// How long no room may be repaired before the run is given up.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize)]
struct RepairReport {
    what: String,
    machine: Machine,
    rooms: u32,
    rounds: Vec<Round>,
    median: Option<Medians>,
    /// The smallest and the largest round of `repaired`, and of the others' p99.
    range: Option<(f64, f64)>,
    others_range: Option<(f64, f64)>,
    counts: Counts,
    /// Gaps that clients were told.
    gaps: u64,
    interrupted: Option<String>,
    warnings: Vec<String>,
    expectations: Vec<Expectation>,
}

/// One interruption. Times are in seconds from when the node's user was let in again.
#[derive(Clone, Copy, Debug, Serialize)]
struct Round {
    /// Until the node had subscribed to a topic: it waits between attempts to connect.
    connected: f64,
    repaired: f64,
    /// Microseconds that a command of another connection took meanwhile.
    others: Option<Latency>,
    /// How often a log was read, for each room.
    reads_per_room: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Medians {
    connected: f64,
    repaired: f64,
    /// The median of the rounds' p99.
    others_p99_us: Option<f64>,
    reads_per_room: f64,
}

/// Runs the scenario and prints its report.
pub fn run(args: &Repair) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.stage.common)?;
    let stop = super::begin(&args.stage.common)?;
    let rooms = args.connections.checked_mul(args.rooms_per_client).filter(|&rooms| rooms < 1 << 24);
    let rooms = rooms.context("more rooms than a node is made for")?;
    let mut report = RepairReport::new(args, rooms);
    let outcome = with_scratch("repair", |scratch| measure(args, scratch, &mut report, &stop));
    report.interrupted = stop.early_end(outcome)?;
    report.conclude(args);
    outputs.conclude(&report.document(), &report, report.interrupted.as_deref())
}

fn measure(args: &Repair, scratch: &Path, report: &mut RepairReport, stop: &Stop) -> anyhow::Result<bool> {
    process::allow_descriptors(args.connections as usize)?;
    let workshop = Workshop::for_stage(&args.stage, scratch);
    let settings = [format!("limits.rooms_per_session={}", args.rooms_per_client)];
    let mut fleet = Fleet::start(&workshop, args.stage.history_size, &settings)?;
    fleet.load_functions()?;
    let mut link = Link::open(&fleet.redis)?;
    let password = format!(">{PASSWORD}");
    link.ask(&["ACL", "SETUSER", USER, "on", &password, "allkeys", "allchannels", "+@all"])?;
    let url = fleet.redis_url().replace("redis://", &format!("redis://{USER}:{PASSWORD}@"));
    let node = fleet.add_node_as(&url)?;
    // The node that owns the Redis is not measured.
    fleet.kill_node(0)?;

    let (run, shape) = (process::run_id(), Shape::dots(args.stage.size));
    let entrance = fleet.entrance(node, Protocol::Centrifuge)?;
    let mut journal = Journal::open(&fleet.redis, report.rooms, run, shape)?;
    let mut books = Books {
        finder: Finder::new(run, shape),
        each: args.rooms_per_client,
        lanes: Lanes::new(report.rooms),
        gaps: 0,
        failure: None,
    };
    let mut swarm = Swarm::new()?;
    let each = args.rooms_per_client;
    let seat = |member: usize| {
        let user = u32::try_from(member).unwrap_or(0);
        Seat { user, room: user * each, rooms: each, stays: true, since: None, listens: true }
    };
    // A few at a time: each subscribes to all of its rooms at once.
    for total in (AT_ONCE..args.connections as usize + AT_ONCE).step_by(AT_ONCE) {
        let total = total.min(args.connections as usize);
        swarm.grow(&entrance, total, seat, stop, |event| books.note(event))?;
    }
    let mut test = Test { args, swarm, books, published: 0, rooms: report.rooms, stop };
    test.publish(&mut journal)?;
    test.await_all()?;
    for _ in 0..args.rounds {
        if stop.is_set() {
            break;
        }
        report.rounds.extend(test.interrupt(&fleet.redis, &mut link, &mut journal)?);
    }
    report.counts = test.books.lanes.counts;
    report.counts.expected = test.published;
    report.counts.missing = test.published.saturating_sub(report.counts.delivered);
    report.gaps = test.books.gaps;
    Ok(report.rounds.len() == args.rounds as usize)
}

struct Test<'a> {
    args: &'a Repair,
    swarm: Swarm,
    books: Books,
    published: u64,
    rooms: u32,
    stop: &'a Stop,
}

struct Books {
    finder: Finder,
    each: u32,
    lanes: Lanes,
    gaps: u64,
    failure: Option<String>,
}

impl Test<'_> {
    /// Locks the node out, publishes to every room, lets it in, and waits until every room is repaired.
    fn interrupt(
        &mut self,
        redis: &Redis,
        link: &mut Link,
        journal: &mut Journal,
    ) -> anyhow::Result<Option<Round>> {
        link.ask(&["ACL", "SETUSER", USER, "off"])?;
        link.ask(&["CLIENT", "KILL", "USER", USER])?;
        self.publish(journal)?;
        let before = link.calls()?;
        let others = Others::start(redis)?;
        link.ask(&["ACL", "SETUSER", USER, "on"])?;
        let (begun, mut asked, mut connected) = (Instant::now(), Instant::now(), None);
        let mut progress = (0, Instant::now());
        while self.books.lanes.counts.delivered < self.published {
            self.attend(ASKING)?;
            if connected.is_none() && asked.elapsed() >= ASKING {
                asked = Instant::now();
                connected = (link.channels()? > 0).then(|| begun.elapsed());
            }
            if progress.0 != self.books.lanes.counts.delivered {
                progress = (self.books.lanes.counts.delivered, Instant::now());
            }
            if progress.1.elapsed() > self.args.stage.patience.0.max(PATIENCE) {
                // The rest is missing.
                break;
            }
            if self.stop.is_set() {
                return Ok(None);
            }
        }
        let repaired = begun.elapsed();
        let others = others.finish()?;
        let reads =
            |calls: &std::collections::BTreeMap<String, u64>| calls.get("xrange").copied().unwrap_or(0);
        let read = reads(&link.calls()?) - reads(&before);
        #[expect(clippy::cast_precision_loss, reason = "some 100,000 rooms")]
        let reads_per_room = read as f64 / f64::from(self.rooms);
        Ok(Some(Round {
            connected: connected.unwrap_or(repaired).as_secs_f64(),
            repaired: repaired.as_secs_f64(),
            others: others.summary(),
            reads_per_room,
        }))
    }

    /// Publishes one message to every room, and waits until Redis has recorded all.
    fn publish(&mut self, journal: &mut Journal) -> anyhow::Result<()> {
        for room in 0..self.rooms {
            journal.publish(room, clock::now())?;
            while journal.in_flight() >= WINDOW {
                self.turn(journal)?;
            }
        }
        while journal.in_flight() > 0 {
            self.turn(journal)?;
        }
        self.published += u64::from(self.rooms);
        Ok(())
    }

    fn turn(&mut self, journal: &mut Journal) -> anyhow::Result<()> {
        journal.turn()?;
        journal.ensure_connected()?;
        ensure!(!self.stop.is_set(), "ended while publishing");
        self.attend(Duration::ZERO)
    }

    fn await_all(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while self.books.lanes.counts.delivered < self.published {
            self.attend(super::GLANCE)?;
            ensure!(!self.stop.is_set(), "ended while clients receive");
            ensure!(
                begun.elapsed() < PATIENCE,
                "clients have received {} of {} messages before the interruption",
                self.books.lanes.counts.delivered,
                self.published
            );
        }
        Ok(())
    }

    fn attend(&mut self, wait: Duration) -> anyhow::Result<()> {
        let Self { swarm, books, .. } = self;
        swarm.drain(wait, |event| books.note(event))?;
        match books.failure.take() {
            Some(why) => bail!("{why}"),
            None => Ok(()),
        }
    }
}

impl Books {
    fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Standing { .. } | Event::Accepted | Event::Joined { .. } | Event::Position { .. } => {}
            Event::Message { member, payload, .. } => {
                let stamp = self.finder.find(Dialect::Centrifuge, payload);
                let own = stamp.filter(|stamp| (stamp.room / self.each) as usize == member);
                self.lanes.record(own.map(|stamp| (stamp.room, stamp.sequence)));
            }
            // A gap ends a subscription in this protocol.
            Event::Gap { .. } | Event::Left { .. } => self.gaps += 1,
            Event::Refused { why } => {
                self.failure.get_or_insert(why);
            }
            Event::Lost { member, why, .. } => {
                self.lanes.counts.members_lost += 1;
                self.failure.get_or_insert_with(|| format!("client {}: {why}", member + 1));
            }
        }
    }
}

/// A connection that sends one command after the other, on a thread of its own.
struct Others {
    done: Arc<AtomicBool>,
    thread: thread::JoinHandle<anyhow::Result<Latencies>>,
}

impl Others {
    fn start(redis: &Redis) -> anyhow::Result<Self> {
        let done = Arc::new(AtomicBool::new(false));
        let (mut link, mut latencies, until) = (Link::open(redis)?, Latencies::new()?, Arc::clone(&done));
        let thread = thread::Builder::new().name("others".into()).spawn(move || {
            while !until.load(Ordering::Relaxed) {
                let begun = clock::now();
                link.ask(&["PING"])?;
                latencies.record(clock::now() - begun);
                pause(RESTING)?;
            }
            Ok(latencies)
        })?;
        Ok(Self { done, thread })
    }

    fn finish(self) -> anyhow::Result<Latencies> {
        self.done.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the other connection's thread panicked"))?
    }
}

impl RepairReport {
    fn new(args: &Repair, rooms: u32) -> Self {
        Self {
            what: format!(
                "repair: a node with {rooms} rooms that have a history, {} clients",
                args.connections
            ),
            machine: Machine::this(),
            rooms,
            rounds: Vec::new(),
            median: None,
            range: None,
            others_range: None,
            counts: Counts::default(),
            gaps: 0,
            interrupted: None,
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    fn conclude(&mut self, args: &Repair) {
        let of = |value: fn(&Round) -> Option<f64>| median(self.rounds.iter().filter_map(value).collect());
        self.median = of(|round| Some(round.repaired)).and_then(|repaired| {
            Some(Medians {
                repaired,
                connected: of(|round| Some(round.connected))?,
                others_p99_us: of(|round| Some(round.others?.p99)),
                reads_per_room: of(|round| Some(round.reads_per_room))?,
            })
        });
        self.range = range(self.rounds.iter().map(|round| round.repaired));
        self.others_range = range(self.rounds.iter().filter_map(|round| Some(round.others?.p99)));
        if let Some(why) = &self.interrupted {
            self.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
        }
        let Counts { missing, duplicated, out_of_order, foreign, expected, .. } = self.counts;
        let exact = missing + duplicated + out_of_order + foreign + self.gaps == 0 && expected > 0;
        let mut found = vec![Expectation {
            words: format!("every message once, in order, without a gap: {}", self.words()),
            met: exact && self.rounds.len() == args.rounds as usize,
        }];
        if let Some(allowed) = args.expect_repaired {
            let seconds = self.median.map(|median| median.repaired);
            let words = or_nothing(seconds, |seconds| format!("{seconds:.3} s"));
            let words = format!("--expect-repaired {:?}: {words}", allowed.0);
            found.push(Expectation { words, met: at_most(seconds, allowed.0.as_secs_f64()) });
        }
        if let Some(allowed) = args.expect_p99 {
            let worst = self.rounds.iter().filter_map(|round| Some(round.others?.p99)).reduce(f64::max);
            let words = or_nothing(worst, written);
            let words = format!("--expect-p99 {:?} of other commands: {words}", allowed.0);
            found.push(Expectation { words, met: at_most(worst, allowed.0.as_secs_f64() * 1e6) });
        }
        unmet(&mut found, self.interrupted.as_deref());
        self.expectations = found;
    }

    fn words(&self) -> String {
        let Counts { expected, delivered, missing, duplicated, out_of_order, foreign, members_lost } =
            self.counts;
        format!(
            "delivered {delivered} of {expected}, missing {missing}, duplicated {duplicated}, out of order \
             {out_of_order}, foreign {foreign}, members lost {members_lost}, gaps {}",
            self.gaps
        )
    }

    fn document(&self) -> Document {
        let head = ["", "connected s", "all repaired s", "others' p50", "p99", "max", "reads per room"];
        let mut table = Table::new("Interruptions; seconds from the end of each", &head);
        for (number, round) in (1..).zip(&self.rounds) {
            let others = round.others.map(|others| [others.p50, others.p99, others.max]);
            let others = others.map_or([None; 3], |cells| cells.map(Some));
            let cells = others.map(|cell| or_nothing(cell, written));
            let times = [round.connected, round.repaired].map(|seconds| format!("{seconds:.3}"));
            let reads = format!("{:.3}", round.reads_per_room);
            table.row(std::iter::once(number.to_string()).chain(times).chain(cells).chain([reads]));
        }
        Document {
            title: self.what.clone(),
            facts: vec![self.machine.to_string(), self.words()],
            tables: vec![table],
            warnings: self.warnings.clone(),
            expectations: self.expectations.clone(),
            ..Document::default()
        }
    }
}

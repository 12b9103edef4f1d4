//! What recording a publication costs Redis.
//!
//! Three ways to publish take turns on one Redis, pipelined on one connection: a plain `PUBLISH`, which records
//! nothing; Tidegate's function; and a script of the field's usual design, which counts a room's messages in a
//! hash. Every answer is checked: a recorded message has the position after the one before it.

use std::{path::Path, time::Instant};

use anyhow::{bail, ensure};
use serde::Serialize;

use crate::{
    cli::history::History,
    clock,
    fleet::{load_functions, redis_at},
    journal::log_key,
    payload::Shape,
    pipeline::{Answer, Pipeline},
    place::Place,
    process,
    redis::Link,
    report::{
        Machine, Verdict, at_least,
        document::{Document, Expectation, Table},
        median, or_nothing,
        outputs::Outputs,
        ratio,
        room::range,
        svg::short,
        unmet,
    },
    stamp::Stamp,
    stop::Stop,
    target::{NUMBER, Redis},
    workshop::{Processes, Workshop, with_scratch},
};

/// The script that Tidegate's function is compared with: a counter and an epoch in a hash, the counter as the
/// stream's ID, and both with the message on the channel.
///
/// Keys: the stream, the hash. Arguments: the message, the channel, how many messages to keep, and for how
/// many seconds to keep them and the hash; the epoch of a new room.
const PEER: &str = r"
local epoch = redis.call('HGET', KEYS[2], 'epoch')
if not epoch then
  epoch = ARGV[6]
  redis.call('HSET', KEYS[2], 'epoch', epoch)
end
local offset = redis.call('HINCRBY', KEYS[2], 'offset', 1)
redis.call('EXPIRE', KEYS[2], ARGV[5])
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[3], offset .. '-0', 'd', ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('PUBLISH', ARGV[2], offset .. ':' .. epoch .. ':' .. ARGV[1])
return { epoch .. '-' .. offset, 0 }
";

/// What the script keeps, and for how long: as Tidegate's function does without options, and the hash for 30
/// days.
const KEPT: &[u8] = b"1000";
const SECONDS: &[u8] = b"600";
const META_SECONDS: &[u8] = b"2592000";

/// A way to publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Publish,
    Record,
    Peer,
}

const WAYS: [Way; 3] = [Way::Publish, Way::Record, Way::Peer];

#[derive(Debug, Serialize)]
struct HistoryReport {
    what: String,
    machine: Machine,
    legs: Vec<Leg>,
    interrupted: Option<String>,
    warnings: Vec<String>,
    expectations: Vec<Expectation>,
}

/// The rounds of one number of rooms.
#[derive(Debug, Serialize)]
struct Leg {
    rooms: u32,
    rounds: Vec<Round>,
    median: Option<Medians>,
    /// The smallest and the largest round of `per_core` and of `to_peer`.
    range: Option<(f64, f64)>,
    to_peer_range: Option<(f64, f64)>,
}

/// Microseconds of Redis' CPU per publication, and publications per second, as measured.
#[derive(Clone, Copy, Debug, Serialize)]
struct Cost {
    redis_cpu: f64,
    per_second: f64,
}

#[derive(Debug, Serialize)]
struct Round {
    publish: Cost,
    record: Cost,
    peer: Cost,
}

#[derive(Debug, Serialize)]
struct Medians {
    publish_cpu: f64,
    record_cpu: f64,
    peer_cpu: f64,
    /// Recorded publications per second of Redis' CPU.
    per_core: f64,
    /// `record_cpu` over the others: medians of the rounds' ratios.
    to_publish: Option<f64>,
    to_peer: Option<f64>,
}

/// Runs the scenario and prints its report.
pub fn run(args: &History) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.stage.common)?;
    let stop = super::begin(&args.stage.common)?;
    let mut report = HistoryReport::new(args);
    let outcome = with_scratch("history", |scratch| {
        for &rooms in &args.rooms {
            if stop.is_set() {
                break;
            }
            let mut leg = Leg { rooms, rounds: Vec::new(), median: None, range: None, to_peer_range: None };
            let outcome = measure(args, scratch, &mut leg, &stop);
            leg.conclude();
            report.legs.push(leg);
            outcome?;
        }
        Ok(report.is_complete(args))
    });
    report.interrupted = stop.early_end(outcome)?;
    report.conclude(args);
    outputs.conclude(&report.document(), &report, report.interrupted.as_deref())
}

fn measure(args: &History, scratch: &Path, leg: &mut Leg, stop: &Stop) -> anyhow::Result<()> {
    let workshop = Workshop::for_stage(&args.stage, scratch);
    let mut processes = Processes::default();
    let redis = redis_at(&workshop.measured_redis(&mut processes)?)?;
    load_functions(&redis)?;
    let mut test = Test::open(args, redis, leg.rooms)?;
    for way in WAYS {
        // Creates every room.
        if test.pass(way, u64::from(leg.rooms).max(args.messages / 10), stop)?.is_none() {
            return Ok(());
        }
    }
    for _ in 0..args.rounds {
        let Some(publish) = test.pass(Way::Publish, args.messages, stop)? else { break };
        let Some(record) = test.pass(Way::Record, args.messages, stop)? else { break };
        let Some(peer) = test.pass(Way::Peer, args.messages, stop)? else { break };
        leg.rounds.push(Round { publish, record, peer });
    }
    Ok(())
}

struct Test<'a> {
    args: &'a History,
    redis: Redis,
    link: Link,
    pipeline: Pipeline,
    rooms: u32,
    run: u32,
    script: String,
    /// The newest positions of Tidegate's and of the script's rooms.
    recorded: Vec<Option<Place>>,
    counted: Vec<Option<Place>>,
    sequence: u64,
}

impl<'a> Test<'a> {
    fn open(args: &'a History, redis: Redis, rooms: u32) -> anyhow::Result<Self> {
        let mut link = Link::open(&redis)?;
        let script = link.ask(&["SCRIPT", "LOAD", PEER])?;
        Ok(Self {
            args,
            link,
            pipeline: Pipeline::open(&redis)?,
            redis,
            rooms,
            run: process::run_id(),
            script,
            recorded: vec![None; rooms as usize],
            counted: vec![None; rooms as usize],
            sequence: 0,
        })
    }

    /// Publishes `messages` to the rooms in turn; `None` if the run was to end first.
    fn pass(&mut self, way: Way, messages: u64, stop: &Stop) -> anyhow::Result<Option<Cost>> {
        let (begun, cpu) = (Instant::now(), self.link.cpu()?);
        let (mut sent, mut answered) = (0, 0);
        while answered < messages {
            while sent < messages && sent - answered < self.args.window {
                self.push(way, self.room(sent));
                sent += 1;
            }
            self.pipeline.flush()?;
            self.pipeline.wait(super::GLANCE)?;
            answered += self.hear(way, answered)?;
            ensure!(begun.elapsed() < self.args.stage.common.time_limit.0, "Redis does not answer");
            if stop.is_set() {
                return Ok(None);
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "messages of a round")]
        let messages = messages as f64;
        Ok(Some(Cost {
            redis_cpu: self.link.cpu()?.since(cpu).total() * 1e6 / messages,
            per_second: messages / begun.elapsed().as_secs_f64(),
        }))
    }

    fn room(&self, number: u64) -> u32 {
        u32::try_from(number % u64::from(self.rooms)).unwrap_or(0)
    }

    fn push(&mut self, way: Way, room: u32) {
        let mut payload = Vec::new();
        let Self { run, sequence, .. } = *self;
        self.sequence += 1;
        let stamp = Stamp { run, room, publisher: 0, sequence, sent: clock::now() };
        stamp.write(&mut payload, Shape::dots(self.args.stage.size));
        let topic = self.redis.topic.replace(NUMBER, &room.to_string());
        match way {
            Way::Publish => self.pipeline.push(&[b"PUBLISH", topic.as_bytes(), &payload]),
            Way::Record => {
                let key = log_key(&self.redis, room);
                let words: [&[u8]; 7] =
                    [b"FCALL", b"tidegate_publish", b"1", key.as_bytes(), &payload, b"kind", b"json"];
                self.pipeline.push(&words);
            }
            Way::Peer => {
                let (stream, meta) = (format!("{{{topic}}}:stream"), format!("{{{topic}}}:meta"));
                self.pipeline.push(&[
                    b"EVALSHA",
                    self.script.as_bytes(),
                    b"2",
                    stream.as_bytes(),
                    meta.as_bytes(),
                    &payload,
                    topic.as_bytes(),
                    KEPT,
                    SECONDS,
                    META_SECONDS,
                    b"1",
                ]);
            }
        }
    }

    /// Checks the answers so far, from message `first` of this pass on.
    fn hear(&mut self, way: Way, first: u64) -> anyhow::Result<u64> {
        let Self { pipeline, rooms, recorded, counted, .. } = self;
        let places = if way == Way::Record { recorded } else { counted };
        let (mut number, mut wrong) = (first, None);
        let heard = pipeline.hear(|answer| {
            let room = usize::try_from(number % u64::from(*rooms)).unwrap_or(0);
            number += 1;
            let right = match (&answer, places.get_mut(room)) {
                (Answer::Number(_), _) => way == Way::Publish,
                (&Answer::Recorded { place: Some(place), duplicate: false }, Some(before)) => {
                    let follows = before.is_none_or(|before| {
                        before.epoch == place.epoch && before.offset + 1 == place.offset
                    });
                    *before = Some(place);
                    follows && way != Way::Publish
                }
                _ => false,
            };
            if !right && wrong.is_none() {
                wrong = Some(format!("message {number} by {way:?}: Redis answered {answer:?}"));
            }
        })?;
        match wrong {
            Some(wrong) => bail!("{wrong}"),
            None => Ok(heard),
        }
    }
}

impl Leg {
    fn conclude(&mut self) {
        let of = |value: fn(&Round) -> Option<f64>| median(self.rounds.iter().filter_map(value).collect());
        self.median = (|| {
            Some(Medians {
                publish_cpu: of(|round| Some(round.publish.redis_cpu))?,
                record_cpu: of(|round| Some(round.record.redis_cpu))?,
                peer_cpu: of(|round| Some(round.peer.redis_cpu))?,
                per_core: of(|round| ratio(1e6, round.record.redis_cpu))?,
                to_publish: of(|round| ratio(round.record.redis_cpu, round.publish.redis_cpu)),
                to_peer: of(|round| ratio(round.record.redis_cpu, round.peer.redis_cpu)),
            })
        })();
        self.range = range(self.rounds.iter().map(|round| 1e6 / round.record.redis_cpu));
        self.to_peer_range =
            range(self.rounds.iter().map(|round| round.record.redis_cpu / round.peer.redis_cpu));
    }
}

impl HistoryReport {
    fn new(args: &History) -> Self {
        Self {
            what: format!(
                "history: {} publications of {} B by each way, {} in flight",
                args.messages, args.stage.size, args.window
            ),
            machine: Machine::this(),
            legs: Vec::new(),
            interrupted: None,
            warnings: Vec::new(),
            expectations: Vec::new(),
        }
    }

    fn is_complete(&self, args: &History) -> bool {
        self.legs.len() == args.rooms.len()
            && self.legs.iter().all(|leg| leg.rounds.len() == args.rounds as usize)
    }

    fn conclude(&mut self, args: &History) {
        if let Some(why) = &self.interrupted {
            self.warnings.push(format!("ended early by {why}: the report covers the run up to then"));
        }
        let mut found = Vec::new();
        if !self.is_complete(args) {
            found.push(Expectation { words: "all rounds are completed".into(), met: false });
        }
        for leg in &self.legs {
            if let Some(least) = args.expect_per_core {
                let rate = leg.median.as_ref().map(|median| median.per_core);
                let words = or_nothing(rate, short);
                let words = format!(
                    "--expect-per-core {least}, {} rooms: {words} recorded per second of Redis' CPU",
                    leg.rooms
                );
                found.push(Expectation { words, met: at_least(rate, least) });
            }
        }
        unmet(&mut found, self.interrupted.as_deref());
        self.expectations = found;
    }

    fn document(&self) -> Document {
        let head = [
            "rooms",
            "PUBLISH µs",
            "recorded µs",
            "counter script µs",
            "× PUBLISH",
            "× script",
            "recorded/s per core",
            "measured/s",
        ];
        let mut table = Table::new("Medians; Redis' CPU per publication", &head);
        for leg in &self.legs {
            let measured = median(leg.rounds.iter().map(|round| round.record.per_second).collect());
            let cells = leg.median.as_ref().map_or_else(Vec::new, |median| {
                vec![
                    format!("{:.2}", median.publish_cpu),
                    format!("{:.2}", median.record_cpu),
                    format!("{:.2}", median.peer_cpu),
                    or_nothing(median.to_publish, |ratio| format!("{ratio:.2}")),
                    or_nothing(median.to_peer, |ratio| format!("{ratio:.2}")),
                    short(median.per_core),
                    or_nothing(measured, short),
                ]
            });
            table.row(std::iter::once(leg.rooms.to_string()).chain(cells));
        }
        Document {
            title: self.what.clone(),
            facts: vec![self.machine.to_string()],
            tables: vec![table],
            warnings: self.warnings.clone(),
            expectations: self.expectations.clone(),
            ..Document::default()
        }
    }
}

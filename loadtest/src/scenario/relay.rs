//! The physical limit through Redis, and the gateway compared with it: `relay` and `compare-relay`.
//!
//! Many small rooms, each with a few members and a publisher, at several rates. The scenario starts the bare
//! [relay](mod@crate::relay), the gateways, and a Redis for each of them. All clients stay connected for the whole
//! run, and rounds alternate between the sides, so that a drift of the machine affects all of them.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};

use crate::{
    cli::relay::{CompareRelay, Relay, SmallRooms, Speech},
    clock,
    dialect::{Dialect, Seat},
    flow::Lanes,
    latency::Latencies,
    payload::Shape,
    process::{self, Cpu},
    redis::Link,
    relay::{self, DEAF, Wish},
    report::{
        Verdict,
        outputs::Outputs,
        ratio,
        relay::{Leg, RelayReport, RelayRound},
    },
    stamp::{Finder, Stamp},
    stop::Stop,
    swarm::{Event, Swarm},
    syscalls::Syscalls,
    target::{Entrance, NUMBER, Protocol, PublishArg, Redis, TargetArgs, Via},
    websocket,
    workshop::{Node, Processes, SECRET, Wanted, Workshop, with_scratch},
};

/// How many messages may be sent before the loop reads arrivals.
const BATCH: usize = 64;

/// The time before the first message of a round, in which the last deliveries of another side settle.
const LEAD: Duration = Duration::from_millis(20);

/// Measures the relay alone.
pub fn relay(args: &Relay) -> anyhow::Result<Verdict> {
    let report = RelayReport::new(format!("relay: {}", describe(&args.small)), &args.small);
    let extra = Extra { envelope: args.envelope.into(), answer: args.answer.into() };
    conduct(&args.small, report, None, |scratch, stop| {
        let mut bare = Side::relay(&workshop(&args.small, None, scratch), &args.small, extra, stop)?;
        bare.warm_up(&args.small, stop)?;
        Ok(vec![bare])
    })
}

/// Measures the relay and one or more gateways in turn.
pub fn compare(args: &CompareRelay) -> anyhow::Result<Verdict> {
    let small = &args.small;
    let what = format!("compare-relay, {:?} clients: {}", args.protocol, describe(small));
    let report = RelayReport::new(what, small);
    let programs: Vec<_> = match args.tidegate.as_slice() {
        [] => vec![None],
        all => all.iter().cloned().map(Some).collect(),
    };
    conduct(small, report, Some(args), |scratch, stop| {
        let mut sides = Vec::new();
        let mut extra = None;
        for (number, program) in programs.into_iter().enumerate() {
            let scratch = scratch.join(format!("node-{number}"));
            std::fs::create_dir(&scratch)?;
            let mut side = Side::gateway(&workshop(small, program, &scratch), args, stop)?;
            let learned = side.warm_up(small, stop)?;
            if args.protocol == Speech::Centrifuge {
                extra.get_or_insert(learned);
            }
            sides.push(side);
        }
        let mut bare = Side::relay(&workshop(small, None, scratch), small, extra.unwrap_or_default(), stop)?;
        bare.warm_up(small, stop)?;
        sides.insert(0, bare);
        Ok(sides)
    })
}

/// The bytes of a protocol that the relay imitates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Extra {
    /// In front of a message.
    envelope: usize,
    /// The payload of the answer to a publication.
    answer: usize,
}

fn describe(small: &SmallRooms) -> String {
    let SmallRooms { rooms, members, size, .. } = small;
    format!("{rooms} rooms with {members} members and a publisher each, {size} B, through Redis")
}

fn workshop(small: &SmallRooms, tidegate: Option<std::path::PathBuf>, scratch: &Path) -> Workshop {
    Workshop { tidegate, scratch: scratch.to_owned(), server_cpu: small.server_cpu, client_cpu: None }
}

/// Opens the sides, the relay first, and measures them.
fn conduct(
    small: &SmallRooms,
    mut report: RelayReport,
    compare: Option<&CompareRelay>,
    open: impl FnOnce(&Path, &Stop) -> anyhow::Result<Vec<Side>>,
) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&small.common)?;
    let stop = super::begin(&small.common)?;
    let outcome = with_scratch("relay", |scratch| {
        let mut sides = open(scratch, &stop)?;
        let done = rounds(small, &mut sides, &mut report, &stop);
        for side in sides {
            report.add(side.books.lanes.counts, side.expected);
            side.swarm.close();
        }
        done
    });
    report.interrupted = stop.early_end(outcome)?;
    report.conclude(small, compare);
    outputs.deliver(&report.document(), &report)?;
    Ok(Verdict::of(&report.expectations, report.interrupted.as_deref()))
}

/// Measures the rounds of all sides in turn; returns whether all were measured.
fn rounds(
    small: &SmallRooms,
    sides: &mut [Side],
    report: &mut RelayReport,
    stop: &Stop,
) -> anyhow::Result<bool> {
    for measured in &mut report.rates {
        measured.legs = sides.iter().map(|side| Leg::new(side.name.clone())).collect();
    }
    for _ in 0..small.rounds {
        for measured in &mut report.rates {
            for (side, leg) in sides.iter_mut().zip(&mut measured.legs) {
                if stop.is_set() {
                    return Ok(false);
                }
                leg.rounds.push(side.round(measured.rate, small.duration.0, small, stop)?);
            }
        }
    }
    for measured in report.rates.iter_mut().filter(|_| small.syscalls) {
        for (side, leg) in sides.iter_mut().zip(&mut measured.legs) {
            let count = Syscalls::count(side.pid).context("--syscalls")?;
            let round = side.round(measured.rate, small.duration.0, small, stop)?;
            #[expect(clippy::cast_precision_loss, reason = "counts below 2^53")]
            let each = ratio(count.finish()? as f64, round.messages as f64);
            leg.syscalls = each.filter(|_| round.complete);
        }
    }
    Ok(report
        .rates
        .iter()
        .flat_map(|measured| &measured.legs)
        .all(|leg| leg.rounds.iter().filter(|round| round.complete).count() == small.rounds as usize))
}

/// The relay or a gateway, with its Redis and its clients.
struct Side {
    name: String,
    pid: u32,
    redis: Link,
    /// Publishers connect here.
    voices: Entrance,
    swarm: Swarm,
    books: Books,
    run: u32,
    /// The next sequence of each room.
    sequences: Vec<u64>,
    /// The number of publications so far, and of the deliveries that they should lead to.
    published: u64,
    expected: u64,
    /// How many frames a publisher receives for every publication: its own message, an answer, or both.
    answers: u64,
    /// The room of the next publication.
    turn: u32,
    /// Stopped after the clients, in this order.
    _server: Running,
    _processes: Processes,
}

/// Keeps a server running.
enum Running {
    Relay(#[expect(dead_code, reason = "dropping it stops the relay")] relay::Relay),
    Gateway(#[expect(dead_code, reason = "dropping it stops the node and its Redis")] Node),
}

struct Books {
    finder: Finder,
    dialect: Dialect,
    rooms: u32,
    /// Members have numbers below this, publishers from here on.
    members: usize,
    /// One for each member.
    lanes: Lanes,
    latency: Latencies,
    /// What publishers have received: their own messages, or answers.
    answers: u64,
    failure: Option<String>,
}

/// What the participants have used and received up to now.
struct Reading {
    cpu: Cpu,
    switches: u64,
    redis: Cpu,
    tester: Cpu,
    delivered: u64,
    /// Bytes at members, and at publishers.
    bytes: (u64, u64),
    at: Instant,
}

impl Side {
    fn relay(workshop: &Workshop, small: &SmallRooms, extra: Extra, stop: &Stop) -> anyhow::Result<Self> {
        let mut processes = Processes::default();
        let url = workshop.redis(&mut processes)?;
        let clients = small.rooms * (small.members + 1);
        let redis = Redis { topic: format!("room:{NUMBER}"), ..at(&url)? };
        let wish = Wish {
            redis: &redis,
            clients,
            envelope: extra.envelope,
            answer: extra.answer,
            cpu: small.server_cpu,
        };
        let server = relay::Relay::start(&wish)?;
        let protocol = if extra.envelope == 0 { Protocol::Plain } else { Protocol::Raw };
        let url = format!("ws://{}/rooms/load:{NUMBER}", server.address);
        let target = TargetArgs { protocol, addresses: small.addresses, ..plain(&url) };
        let entrance = target.resolve(small.rooms)?.entrance;
        let (pid, link) = (server.pid(), Link::open(&redis)?);
        let server = (Running::Relay(server), processes);
        let answers = u64::from(extra.answer > 0) + u64::from(small.echo);
        Self::open("relay".into(), pid, link, &entrance, answers, small, server, stop)
    }

    fn gateway(workshop: &Workshop, args: &CompareRelay, stop: &Stop) -> anyhow::Result<Self> {
        let small = &args.small;
        let set = args.set.iter().map(|setting| format!("--set={setting}"));
        let flags: Vec<String> = std::iter::once("--set=shards=1".to_owned()).chain(set).collect();
        let node = workshop.node_with(&Wanted { redis: true, ..Wanted::default() }, &flags)?;
        let (path, protocol) = match args.protocol {
            Speech::Plain => (format!("/rooms/load:{NUMBER}"), Protocol::Plain),
            Speech::Centrifuge => ("/connection/websocket".to_owned(), Protocol::Centrifuge),
        };
        let url = format!("ws://{}{path}", node.public);
        let hs256_secret = Some(SECRET.to_owned());
        let target = TargetArgs { protocol, hs256_secret, addresses: small.addresses, ..plain(&url) };
        let entrance = target.resolve(small.rooms)?.entrance;
        let link = Link::open(&at(node.redis.as_deref().context("the node is on a Redis")?)?)?;
        let name = workshop.tidegate.as_ref().map_or("tidegate".into(), |path| path.display().to_string());
        let pid = node.pid;
        let server = (Running::Gateway(node), Processes::default());
        let answers = u64::from(args.protocol == Speech::Centrifuge) + u64::from(small.echo);
        Self::open(name, pid, link, &entrance, answers, small, server, stop)
    }

    #[expect(clippy::too_many_arguments, reason = "what differs between a relay and a gateway")]
    fn open(
        name: String,
        pid: u32,
        redis: Link,
        entrance: &Entrance,
        answers: u64,
        small: &SmallRooms,
        (server, processes): (Running, Processes),
        stop: &Stop,
    ) -> anyhow::Result<Self> {
        let members = (small.rooms * small.members) as usize;
        let clients = members + small.rooms as usize;
        // Every side has as many, and their connections are open together.
        process::allow_descriptors(3 * clients)?;
        let mut voices = entrance.clone();
        if voices.dialect != Dialect::Centrifuge && !small.echo {
            voices.address.path_and_query.push('?');
            voices.address.path_and_query.push_str(DEAF);
        }
        let run = process::run_id();
        let mut books = Books {
            finder: Finder::new(run, Shape::dots(small.size)),
            dialect: entrance.dialect,
            rooms: small.rooms,
            members,
            lanes: Lanes::new(small.rooms * small.members),
            latency: Latencies::new()?,
            answers: 0,
            failure: None,
        };
        let mut swarm = Swarm::new()?;
        let seat = |listens: bool| {
            move |client: usize| {
                let user = u32::try_from(client).unwrap_or(0);
                Seat { user, room: user % small.rooms, rooms: 1, stays: false, since: None, listens }
            }
        };
        swarm
            .grow(entrance, members, seat(true), stop, |event| books.note(event))
            .with_context(|| name.clone())?;
        swarm
            .grow(&voices, clients, seat(small.echo), stop, |event| books.note(event))
            .with_context(|| name.clone())?;
        Ok(Self {
            name,
            pid,
            redis,
            voices,
            swarm,
            books,
            run,
            sequences: vec![0; small.rooms as usize],
            published: 0,
            expected: 0,
            answers,
            turn: 0,
            _server: server,
            _processes: processes,
        })
    }

    /// A round that is not measured; returns the bytes of the protocol.
    fn warm_up(&mut self, small: &SmallRooms, stop: &Stop) -> anyhow::Result<Extra> {
        let rate = small.rates.get(small.rates.len() / 2).copied().context("a rate")?;
        let round = self.round(rate, small.warmup.0, small, stop)?;
        ensure!(round.complete || stop.is_set(), "{}: not everything arrives", self.name);
        let echo = round.wire_bytes.filter(|_| small.echo).unwrap_or(0.0);
        Ok(Extra {
            envelope: payload_of(round.wire_bytes).saturating_sub(small.size),
            answer: payload_of(round.answer_bytes.map(|bytes| bytes - echo)),
        })
    }

    /// Publishes for `duration` and waits until everything has arrived, or nothing arrives any more.
    fn round(
        &mut self,
        rate: f64,
        duration: Duration,
        small: &SmallRooms,
        stop: &Stop,
    ) -> anyhow::Result<RelayRound> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "rates and durations are bounded and not negative"
        )]
        let planned = (duration.as_secs_f64() * rate).round() as u64;
        self.books.latency.clear();
        let before = self.read()?;
        let start = clock::now() + clock::nanos(LEAD);
        let (mut next, mut progress) = (0, (0, Instant::now()));
        let mut last = start;
        // Publishers' answers arrive after the deliveries; the next side starts when they are there too.
        while next < planned || !self.is_settled() {
            if stop.is_set() {
                break;
            }
            let mut wait = super::GLANCE;
            for sent in 0.. {
                let (due, now) = (start + clock::due(next, rate), clock::now());
                if next >= planned {
                    break;
                }
                if due > now || sent >= BATCH {
                    wait = Duration::from_nanos(due.saturating_sub(now)).min(wait);
                    break;
                }
                self.publish(due, small)?;
                next += 1;
            }
            let Self { swarm, books, .. } = self;
            swarm.drain(wait, |event| books.note(event))?;
            if let Some(why) = &books.failure {
                bail!("{}: {why}", self.name);
            }
            let arrived = books.lanes.counts.delivered + books.answers;
            if arrived != progress.0 {
                progress = (arrived, Instant::now());
                last = clock::now();
            } else if next >= planned && progress.1.elapsed() > small.patience.0 {
                break;
            }
        }
        let after = self.read()?;
        Ok(RelayRound {
            messages: next,
            seconds: clock::seconds(last.saturating_sub(start)),
            complete: next == planned && self.is_settled(),
            latency: self.books.latency.summary(),
            ..before.until(&after, next)
        })
    }

    /// Whether everything published has been delivered and answered.
    fn is_settled(&self) -> bool {
        let answers = self.published * self.answers;
        self.books.answers >= answers && self.books.lanes.counts.delivered >= self.expected
    }

    fn publish(&mut self, due: u64, small: &SmallRooms) -> anyhow::Result<()> {
        let room = self.turn;
        self.turn = (self.turn + 1) % small.rooms;
        let sequence = self.sequences.get_mut(room as usize).context("a room has a number")?;
        let stamp = Stamp { run: self.run, room, publisher: 0, sequence: *sequence, sent: due };
        *sequence += 1;
        let (mut payload, mut frame) = (Vec::new(), Vec::new());
        stamp.write(&mut payload, Shape::dots(small.size));
        self.voices.dialect.publish(&self.voices, room, &payload, self.published, &mut frame);
        self.published += 1;
        self.expected += u64::from(small.members);
        let said = self.swarm.say(self.books.members + room as usize, &frame);
        ensure!(said.is_ok(), "{}: the publisher of room {room} cannot publish: {said:?}", self.name);
        Ok(())
    }

    fn read(&mut self) -> anyhow::Result<Reading> {
        let members = self.swarm.received(self.books.members);
        Ok(Reading {
            cpu: Cpu::of(self.pid)?,
            switches: process::context_switches(self.pid)?,
            redis: self.redis.cpu()?,
            tester: Cpu::of_self()?,
            delivered: self.books.lanes.counts.delivered,
            bytes: (members, self.swarm.received(self.swarm.len()) - members),
            at: Instant::now(),
        })
    }
}

impl Reading {
    /// What was used until `after`, in which `messages` were published.
    #[expect(clippy::cast_precision_loss, reason = "counts and bytes below 2^53")]
    fn until(&self, after: &Self, messages: u64) -> RelayRound {
        let delivered = after.delivered - self.delivered;
        let per_delivery = |amount: f64| ratio(amount, delivered as f64);
        let per_message = |amount: f64| ratio(amount, messages as f64);
        let seconds = after.at.duration_since(self.at).as_secs_f64();
        RelayRound {
            delivered,
            server_cpu: per_delivery(after.cpu.since(self.cpu).total() * 1e6),
            redis_cpu: per_message(after.redis.since(self.redis).total() * 1e6),
            // A thread that has ended takes its count along.
            switches: per_message(after.switches.saturating_sub(self.switches) as f64),
            tester_share: ratio(after.tester.since(self.tester).total(), seconds),
            wire_bytes: per_delivery((after.bytes.0 - self.bytes.0) as f64),
            answer_bytes: per_message((after.bytes.1 - self.bytes.1) as f64),
            ..RelayRound::default()
        }
    }
}

impl Books {
    fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Standing { .. }
            | Event::Joined { .. }
            | Event::Left { .. }
            | Event::Position { .. }
            | Event::Gap { .. } => {}
            Event::Accepted => self.answers += 1,
            // A publisher receives its own messages, or the relay's answers.
            Event::Message { member, .. } if member >= self.members => self.answers += 1,
            Event::Message { member, payload, at } => {
                let member = u32::try_from(member).unwrap_or(u32::MAX);
                let stamp = self.finder.find(self.dialect, payload);
                let own = stamp.filter(|stamp| stamp.room == member % self.rooms);
                self.lanes.record(own.map(|stamp| (member, stamp.sequence)));
                if let Some(stamp) = own {
                    self.latency.record(at.saturating_sub(stamp.sent));
                }
            }
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

/// The payload of a frame of `bytes`, the mean over many.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a frame has few bytes")]
fn payload_of(bytes: Option<f64>) -> usize {
    let bytes = bytes.unwrap_or(0.0).round() as usize;
    (0..=bytes).rev().find(|&payload| websocket::unmasked_size(payload) <= bytes).unwrap_or(0)
}

/// The Redis at `url`, for commands.
fn at(url: &str) -> anyhow::Result<Redis> {
    let target =
        TargetArgs { publish: PublishArg::Elsewhere(url.to_owned()), ..plain("ws://127.0.0.1/rooms/-") };
    let Via::Redis(redis) = target.resolve(1)?.via else { bail!("{url} is not a Redis") };
    Ok(redis)
}

fn plain(url: &str) -> TargetArgs {
    TargetArgs {
        url: url.to_owned(),
        protocol: Protocol::Plain,
        channel: None,
        publish: PublishArg::Client,
        topic: None,
        token: None,
        hs256_secret: None,
        ca: None,
        insecure: false,
        addresses: 16,
        deflate: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_relay_imitates_the_frames_of_a_protocol() {
        for payload in [0, 40, 125, 126, 373, 65_535] {
            #[expect(clippy::cast_precision_loss, reason = "small")]
            let bytes = websocket::unmasked_size(payload) as f64;
            assert_eq!(payload_of(Some(bytes + 0.3)), payload, "heartbeats are few");
        }
        assert_eq!((payload_of(None), payload_of(Some(1.0))), (0, 0));
    }
}

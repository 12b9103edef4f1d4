//! Restarts Redis under a node with many topics.
//!
//! The scenario starts both, because it has to kill Redis. Each client is in many rooms. A room is back when
//! the node has resubscribed to its topic and its client has resubscribed too: the node signals the gap by
//! ending the subscription, and the client resubscribes at once (SDKs wait a moment). From then on the
//! scenario publishes to the room on a fixed schedule, which shows whether the node is slowed down by the
//! subscriptions of other rooms. A [bare subscriber](crate::tap) with the same number of topics shows what
//! Redis itself needs.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};

use crate::{
    cli::flow::Resubscribe,
    clock,
    dialect::{Seat, subscribe},
    flow::Lanes,
    latency::{Latencies, Latency},
    payload::Shape,
    process,
    publisher::Publisher,
    redis::Link,
    report::{
        Verdict,
        outputs::Outputs,
        resubscribe::{Restart, ResubscribeReport},
    },
    stamp::{Finder, Stamp},
    stop::Stop,
    swarm::{Event, Swarm},
    tap::{Tap, Wish},
    target::{Entrance, Protocol, PublishArg, Redis, TargetArgs, Via},
    websocket::{self, Opcode},
    workshop::{Node, SECRET, Wanted, Workshop, with_scratch},
};

/// How often Redis is asked how many topics are back, and whether it is up.
const ASKING: Duration = Duration::from_millis(5);
const KNOCKING: Duration = Duration::from_millis(1);

/// Give up missing messages when nothing has arrived for this long.
const PATIENCE: Duration = Duration::from_secs(5);

/// Publications in flight while every room is checked.
const WINDOW: u64 = 4096;

/// Runs the scenario and prints its report.
pub fn run(args: &Resubscribe) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.common)?;
    let stop = super::begin(&args.common)?;
    let rooms = args.connections.checked_mul(args.rooms_per_client).filter(|&rooms| rooms < 1 << 24);
    let rooms = rooms.context("more rooms than a node is made for")?;
    let mut report = ResubscribeReport::new(args, rooms);
    let outcome = with_scratch("resubscribe", |scratch| restart(args, rooms, scratch, &mut report, &stop));
    report.interrupted = stop.early_end(outcome)?;
    report.conclude(args);
    outputs.deliver(&report.document(), &report)?;
    Ok(Verdict::of(&report.expectations, report.interrupted.as_deref()))
}

/// Measures the restarts; returns whether all were measured.
fn restart(
    args: &Resubscribe,
    rooms: u32,
    scratch: &Path,
    report: &mut ResubscribeReport,
    stop: &Stop,
) -> anyhow::Result<bool> {
    let workshop = Workshop {
        tidegate: args.tidegate.clone(),
        scratch: scratch.to_owned(),
        server_cpu: args.server_cpu,
        client_cpu: None,
    };
    let flags = ["--set".into(), format!("limits.rooms_per_session={}", args.rooms_per_client)];
    let mut node = workshop.node_with(&Wanted { redis: true, ..Wanted::default() }, &flags)?;
    let target = TargetArgs {
        url: format!("ws://{}/connection/websocket", node.public),
        protocol: Protocol::Centrifuge,
        channel: None,
        publish: PublishArg::Elsewhere(node.redis.clone().context("the node is on a Redis")?),
        topic: None,
        token: None,
        hs256_secret: Some(SECRET.to_owned()),
        ca: None,
        insecure: false,
        addresses: 16,
        deflate: false,
    };
    let target = target.resolve(rooms)?;
    let Via::Redis(redis) = target.via else { bail!("published by Redis") };
    let mut test = Test::open(args, target.entrance, redis, rooms, stop)?;
    for _ in 0..args.rounds {
        if stop.is_set() {
            break;
        }
        report.restarts.extend(test.round(&mut node, &workshop, stop)?);
    }
    report.counts = test.books.lanes.counts;
    report.counts.expected = test.published;
    report.counts.missing = test.published.saturating_sub(report.counts.delivered);
    Ok(report.restarts.len() == args.rounds as usize)
}

struct Test<'a> {
    args: &'a Resubscribe,
    entrance: Entrance,
    redis: Redis,
    rooms: u32,
    swarm: Swarm,
    books: Books,
    run: u32,
    sequences: Vec<u64>,
    published: u64,
    /// The state of a small random number generator that picks the next room.
    dice: u64,
}

struct Books {
    finder: Finder,
    entrance: Entrance,
    each: u32,
    lanes: Lanes,
    latency: Latencies,
    /// Rooms whose client receives again, in the order in which they came back, and whether each has.
    back: Vec<u32>,
    is_back: Vec<bool>,
    /// Rooms whose subscription the node has ended, with their clients.
    left: Vec<(usize, u32)>,
    loss: Option<String>,
}

impl<'a> Test<'a> {
    fn open(
        args: &'a Resubscribe,
        entrance: Entrance,
        redis: Redis,
        rooms: u32,
        stop: &Stop,
    ) -> anyhow::Result<Self> {
        process::allow_descriptors(args.connections as usize)?;
        let (run, size) = (process::run_id(), Stamp::MIN_SIZE);
        let mut books = Books {
            finder: Finder::new(run, Shape::dots(size)),
            entrance: entrance.clone(),
            each: args.rooms_per_client,
            lanes: Lanes::new(rooms),
            latency: Latencies::new()?,
            back: (0..rooms).collect(),
            is_back: vec![true; rooms as usize],
            left: Vec::new(),
            loss: None,
        };
        let mut swarm = Swarm::new()?;
        let each = args.rooms_per_client;
        let seat = |member: usize| {
            let user = u32::try_from(member).unwrap_or(0);
            Seat { user, room: user * each, rooms: each, stays: true, since: None, listens: true }
        };
        swarm.grow(&entrance, args.connections as usize, seat, stop, |event| books.note(event))?;
        let sequences = vec![0; rooms as usize];
        Ok(Self { args, entrance, redis, rooms, swarm, books, run, sequences, published: 0, dice: 1 })
    }

    /// A quiet phase, an outage, and the recovery. `None` if the run was to end before everything was back:
    /// times up to then would look too good.
    fn round(
        &mut self,
        node: &mut Node,
        workshop: &Workshop,
        stop: &Stop,
    ) -> anyhow::Result<Option<Restart>> {
        let topics = Link::open(&self.redis)?.channels()?;
        let publisher = Publisher::redis(&self.redis)?;
        let until = Instant::now() + self.args.peace.0;
        let peace = self.measure(publisher, stop, |_, _| Ok(Instant::now() < until))?;
        if stop.is_set() {
            return Ok(None);
        }
        node.kill_redis()?;
        self.books.back.clear();
        self.books.is_back.fill(false);
        self.attend_for(self.args.outage.0, stop)?;
        let spawned = Instant::now();
        node.restart_redis(workshop)?;
        let mut link = loop {
            match Link::open(&self.redis).and_then(|mut link| link.ask(&["PING"]).map(|_| link)) {
                Ok(link) => break link,
                Err(_) if stop.is_set() => return Ok(None),
                Err(why) if spawned.elapsed() > self.args.patience.0 => return Err(why),
                Err(_) => self.attend(KNOCKING)?,
            }
        };
        let begun = Instant::now();
        let (mut topics_back, mut asked) = (None, begun);
        let publisher = Publisher::redis(&self.redis)?;
        let all = self.rooms as usize;
        let patience = self.args.patience.0;
        let storm = self.measure(publisher, stop, |books, now| {
            if topics_back.is_none() && now.duration_since(asked) >= ASKING {
                asked = now;
                topics_back = (link.channels()? >= topics).then(|| begun.elapsed());
            }
            ensure!(
                begun.elapsed() < patience,
                "after {patience:?} {} of {all} rooms are back, and {} of {topics} topics",
                books.back.len(),
                link.channels()?
            );
            Ok(topics_back.is_none() || books.back.len() < all)
        })?;
        let clients_back = begun.elapsed();
        let Some(topics_back) = topics_back.filter(|_| self.books.back.len() == all) else {
            return Ok(None);
        };
        self.try_every_room()?;
        let wish = Wish {
            redis: &Redis { topic: format!("={}", self.redis.topic), ..self.redis.clone() },
            rooms: self.rooms,
            connections: 2,
            cpu: self.args.server_cpu,
            verify: None,
        };
        let bare = Tap::start(&wish)?.subscribing;
        self.attend(Duration::ZERO)?;
        Ok(Some(Restart {
            topics_back: topics_back.as_secs_f64(),
            clients_back: clients_back.as_secs_f64(),
            bare: bare.as_secs_f64(),
            peace,
            storm,
        }))
    }

    /// Publishes to rooms that are back while `lasts` returns `true`, then waits for messages in flight.
    fn measure(
        &mut self,
        mut publisher: Publisher,
        stop: &Stop,
        mut lasts: impl FnMut(&Books, Instant) -> anyhow::Result<bool>,
    ) -> anyhow::Result<Option<Latency>> {
        self.books.latency.clear();
        let (start, mut number) = (clock::now(), 0);
        while lasts(&self.books, Instant::now())? && !stop.is_set() {
            let due = start + clock::due(number, self.args.rate);
            let now = clock::now();
            if now < due {
                self.attend(Duration::from_nanos(due - now).min(ASKING))?;
                continue;
            }
            number += 1;
            // Rooms that are not back get no messages.
            if let Some(room) = self.any_room() {
                self.publish(&mut publisher, &[room], due)?;
            }
            self.attend(Duration::ZERO)?;
        }
        self.await_all()?;
        Ok(self.books.latency.summary())
    }

    /// Publishes one message to every room: all of them must arrive.
    fn try_every_room(&mut self) -> anyhow::Result<()> {
        let mut publisher = Publisher::redis(&self.redis)?;
        let rooms: Vec<u32> = (0..self.rooms).collect();
        for batch in rooms.chunks(256) {
            self.publish(&mut publisher, batch, clock::now())?;
            self.await_all_but(WINDOW)?;
        }
        self.await_all()
    }

    fn publish(&mut self, publisher: &mut Publisher, rooms: &[u32], due: u64) -> anyhow::Result<()> {
        let mut payloads = Vec::new();
        for &room in rooms {
            let sequence = self.sequences.get_mut(room as usize).context("a room has a number")?;
            let stamp = Stamp { run: self.run, room, publisher: 0, sequence: *sequence, sent: due };
            *sequence += 1;
            stamp.write(&mut payloads, Shape::dots(Stamp::MIN_SIZE));
        }
        self.published += rooms.len() as u64;
        publisher.publish(&payloads, Stamp::MIN_SIZE, rooms)
    }

    /// Any of the rooms that are back, by a linear congruential generator (Knuth's MMIX constants).
    fn any_room(&mut self) -> Option<u32> {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let back = self.books.back.len().max(1) as u64;
        self.books.back.get(usize::try_from((self.dice >> 33) % back).unwrap_or(0)).copied()
    }

    /// Waits until everything has arrived, or nothing arrives any more; the rest is missing then.
    fn await_all(&mut self) -> anyhow::Result<()> {
        self.await_all_but(0)
    }

    /// The same, until at most `most` are in flight.
    fn await_all_but(&mut self, most: u64) -> anyhow::Result<()> {
        let mut progress = (self.books.lanes.counts.delivered, Instant::now());
        while self.books.lanes.counts.delivered + most < self.published && progress.1.elapsed() < PATIENCE {
            self.attend(super::GLANCE)?;
            if self.books.lanes.counts.delivered != progress.0 {
                progress = (self.books.lanes.counts.delivered, Instant::now());
            }
        }
        Ok(())
    }

    /// Handles arrivals for the given time, or until the run is to end.
    fn attend_for(&mut self, span: Duration, stop: &Stop) -> anyhow::Result<()> {
        let until = Instant::now() + span;
        while let Some(rest) = until.checked_duration_since(Instant::now())
            && !stop.is_set()
        {
            self.attend(rest.min(super::GLANCE))?;
        }
        Ok(())
    }

    /// Reads arrivals, and resubscribes where the node has ended a subscription.
    fn attend(&mut self, wait: Duration) -> anyhow::Result<()> {
        let Self { swarm, books, entrance, .. } = self;
        swarm.drain(wait, |event| books.note(event))?;
        if let Some(why) = &books.loss {
            bail!("{why}");
        }
        let left = std::mem::take(&mut books.left);
        for own in left.chunk_by(|(one, _), (other, _)| one == other) {
            let Some((member, _)) = own.first() else { continue };
            let words: anyhow::Result<Vec<String>> =
                own.iter().map(|&(_, room)| subscribe(entrance, room, None)).collect();
            let mut frame = Vec::new();
            websocket::write_masked(&mut frame, Opcode::Text, &[words?.join("\n").as_bytes()], 1);
            let said = swarm.say(*member, &frame);
            ensure!(said.is_ok(), "client {} cannot subscribe again: {said:?}", member + 1);
        }
        Ok(())
    }
}

impl Books {
    fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Standing { .. } | Event::Accepted | Event::Position { .. } | Event::Gap { .. } => {}
            Event::Joined { room } => {
                if let Some(is_back) = self.is_back.get_mut(room as usize)
                    && !std::mem::replace(is_back, true)
                {
                    self.back.push(room);
                }
            }
            Event::Left { member, channel } => match self.entrance.room(channel) {
                Some(room) => {
                    self.left.push((member, room));
                    if self.is_back.get(room as usize) == Some(&true) {
                        let words = format!("client {}: a gap in {channel}, which was back", member + 1);
                        self.loss.get_or_insert(words);
                    }
                }
                None => {
                    self.loss = Some(format!("a subscription to {channel} has ended that was never made"));
                }
            },
            Event::Message { member, payload, at } => {
                let stamp = self.finder.find(self.entrance.dialect, payload);
                let own = stamp.filter(|stamp| (stamp.room / self.each) as usize == member);
                self.lanes.record(own.map(|stamp| (stamp.room, stamp.sequence)));
                if let Some(stamp) = own {
                    self.latency.record(at.saturating_sub(stamp.sent));
                }
            }
            Event::Refused { why } => {
                self.loss.get_or_insert(why);
            }
            Event::Lost { member, why, .. } => {
                self.lanes.counts.members_lost += 1;
                self.loss.get_or_insert_with(|| format!("client {}: {why}", member + 1));
            }
        }
    }
}

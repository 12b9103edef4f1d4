//! One room under test: its members, a publisher, and the accounting of both.
//!
//! Owns the pace of a round and its measurements. A round is a closed loop: a batch is published when every
//! member has the previous one. So a server can coalesce writes within a batch but never across two, and the
//! cost per delivery does not depend on the tester's speed. Latency in a closed loop is service time; it does
//! not show how a server behaves under overload.

//!
//! A round may also be paced ([`Load::rate`]): batches are published on a fixed schedule, and latency counts
//! from when a batch was due. Use this to compare latencies.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::{
    clock,
    dialect::{Dialect, Seat},
    latency::{Latencies, Latency},
    ledger::{Counts, Ledger},
    payload::Shape,
    process::{self, Cpu, Server},
    publisher::Publisher,
    stamp::{Finder, Stamp},
    stop::Stop,
    swarm::{Event, Swarm, Unsaid},
    target::{Entrance, Target, Via},
};

/// After this many consecutive batches that no member completed, a round is abandoned.
const STALLS_IN_A_ROW: u32 = 3;

/// The messages of a round.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// The shape of a message.
    pub shape: Shape,
    /// Messages published together.
    pub burst: u64,
    /// How long a batch may make no progress before the next one is published anyway.
    pub patience: Duration,
    /// Messages per second, regardless of what has been received; `None` for the closed loop.
    pub rate: Option<f64>,
}

/// An open room: every member is connected.
pub struct Room {
    swarm: Swarm,
    sender: Sender,
    server: Server,
    load: Load,
    books: Books,
    batch: Vec<u8>,
    frames: Vec<u8>,
}

/// The connection that publishes.
#[derive(Debug)]
pub enum Sender {
    /// One more connection of the swarm, after the members.
    Client(Entrance),
    Line(Publisher),
}

/// The state that an arrival changes.
#[derive(Debug)]
struct Books {
    ledger: Ledger,
    latency: Latencies,
    dialect: Dialect,
    finder: Finder,
    run: u32,
    members: usize,
    /// Why the first member was lost, for the report.
    first_loss: Option<String>,
    /// Why nothing more can be published.
    silenced: Option<String>,
}

/// The measurements of one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Round {
    pub messages: u64,
    pub seconds: f64,
    pub delivered: u64,
    pub deliveries_per_second: f64,
    /// CPU seconds of the server per million deliveries; absent without a pid.
    pub server_cpu: Option<Cpu>,
    /// CPU seconds of this tester per million deliveries.
    pub tester_cpu: Option<Cpu>,
    /// The fraction of one core that the server used.
    pub server_share: Option<f64>,
    /// The fraction of one core that this tester used.
    pub tester_share: f64,
    /// Microseconds from just before the publishing system call to just after the receiving one; when paced,
    /// from when the batch was due. `None` if nothing arrived.
    pub latency: Option<Latency>,
    /// Bytes that members received: framed messages, compressed or not, and heartbeats. Under TLS, the
    /// plaintext of its records.
    pub wire_bytes: u64,
    /// Batches that were given up.
    pub stalls: u32,
    /// Whether every message of the plan was published.
    pub complete: bool,
}

impl Round {
    /// Bytes received by a member per delivery.
    #[expect(clippy::cast_precision_loss, reason = "bytes of a round")]
    pub fn wire_bytes_each(&self) -> Option<f64> {
        (self.delivered > 0).then(|| self.wire_bytes as f64 / self.delivered as f64)
    }
}

impl Room {
    /// Opens `members` members in room 0 of `target`, waits until all are ready, then connects the publisher.
    pub fn open(
        target: &Target,
        members: usize,
        server: Server,
        load: Load,
        stop: &Stop,
    ) -> anyhow::Result<Self> {
        Self::open_with(&target.entrance, members, || Sender::connect(&target.via), server, load, stop)
    }

    /// The same with a sender chosen by the caller.
    pub fn open_with(
        entrance: &Entrance,
        members: usize,
        connect: impl FnOnce() -> anyhow::Result<Sender>,
        server: Server,
        load: Load,
        stop: &Stop,
    ) -> anyhow::Result<Self> {
        process::allow_descriptors(members)?;
        let run = process::run_id();
        let mut books = Books {
            ledger: Ledger::new(members),
            latency: Latencies::new()?,
            dialect: entrance.dialect,
            finder: Finder::new(run, load.shape),
            run,
            members,
            first_loss: None,
            silenced: None,
        };
        let mut swarm = Swarm::new()?;
        let seat = |member: usize, listens| {
            let user = u32::try_from(member).unwrap_or(0);
            Seat { user, room: 0, rooms: 1, stays: false, since: None, listens }
        };
        swarm.grow(entrance, members, |member| seat(member, true), stop, |event| books.note(event))?;
        let sender = connect()?;
        if let Sender::Client(entrance) = &sender {
            let publisher = |member| seat(member, false);
            let stands = swarm.grow(entrance, members + 1, publisher, stop, |event| books.note(event));
            stands.context("cannot publish as a client")?;
        }
        Ok(Self { swarm, sender, server, load, books, batch: Vec::new(), frames: Vec::new() })
    }

    /// Publishes `messages` messages and measures until all have been received.
    pub fn round(&mut self, messages: u64, stop: &Stop) -> anyhow::Result<Round> {
        self.books.latency.clear();
        let (server, tester, before) = (self.server.cpu()?, Cpu::of_self()?, self.counts());
        let received = self.swarm.received(self.books.members);
        let (start, schedule) = (Instant::now(), clock::now());
        let (mut published, mut stalls, mut in_a_row) = (0, 0, 0);
        while published < messages && in_a_row < STALLS_IN_A_ROW && !stop.is_set() {
            let count = self.load.burst.min(messages - published);
            let due = match self.load.rate {
                Some(rate) => self.await_turn(schedule + clock::due(published, rate))?,
                None => clock::now(),
            };
            self.publish(count, due)?;
            published += count;
            // A paced round waits only for its last batch.
            if (self.load.rate.is_some() && published < messages) || self.settle()? {
                in_a_row = 0;
            } else {
                stalls += 1;
                in_a_row += 1;
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        self.listen()?;
        let tester = Cpu::of_self()?.since(tester);
        let server = self.server.cpu()?.zip(server).map(|(now, before)| now.since(before));
        let delivered = self.counts().since(before).delivered;
        #[expect(clippy::cast_precision_loss, reason = "counts below 2^53")]
        let deliveries = delivered as f64;
        let per_million = |cpu: Cpu| (delivered > 0).then(|| cpu.scaled(1e6 / deliveries));
        Ok(Round {
            messages: published,
            seconds,
            delivered,
            deliveries_per_second: deliveries / seconds,
            server_cpu: server.and_then(per_million),
            tester_cpu: per_million(tester),
            server_share: server.map(|cpu| cpu.total() / seconds),
            tester_share: tester.total() / seconds,
            latency: self.books.latency.summary(),
            wire_bytes: self.swarm.received(self.books.members).saturating_sub(received),
            stalls,
            complete: published == messages,
        })
    }

    /// The counts since the room was opened.
    pub fn counts(&self) -> Counts {
        self.books.ledger.counts()
    }

    /// Why the first lost member was lost.
    pub fn first_loss(&self) -> Option<&str> {
        self.books.first_loss.as_deref()
    }

    /// Waits briefly for late arrivals, closes every connection and returns the final counts.
    pub fn close(mut self) -> anyhow::Result<Counts> {
        let settled = Instant::now() + self.load.patience;
        while self.counts().missing > 0 && self.counts().members_lost == 0 && Instant::now() < settled {
            let Self { swarm, books, .. } = &mut self;
            swarm.drain(Duration::from_millis(50), |event| books.note(event))?;
        }
        let counts = self.counts();
        self.swarm.close();
        Ok(counts)
    }

    /// Reads arrivals until the next batch is due, and returns that time.
    fn await_turn(&mut self, due: u64) -> anyhow::Result<u64> {
        loop {
            let now = clock::now();
            if now >= due {
                return Ok(due);
            }
            let Self { swarm, books, .. } = self;
            swarm.drain(Duration::from_nanos(due - now), |event| books.note(event))?;
        }
    }

    fn publish(&mut self, count: u64, sent: u64) -> anyhow::Result<()> {
        self.batch.clear();
        let first = self.books.ledger.published();
        self.books.ledger.publish(count);
        for sequence in first..first + count {
            let stamp = Stamp { run: self.books.run, room: 0, publisher: 0, sequence, sent };
            stamp.write(&mut self.batch, self.load.shape);
        }
        let size = self.load.shape.size();
        match &mut self.sender {
            Sender::Line(publisher) => {
                let rooms = vec![0; usize::try_from(count)?];
                publisher.publish(&self.batch, size, &rooms)
            }
            Sender::Client(entrance) => {
                self.frames.clear();
                for (sequence, payload) in (first..).zip(self.batch.chunks_exact(size)) {
                    entrance.dialect.publish(entrance, 0, payload, sequence, &mut self.frames);
                }
                match self.swarm.say(self.books.members, &self.frames) {
                    Ok(()) => Ok(()),
                    Err(Unsaid::Full) => bail!("the server does not read publications"),
                    Err(Unsaid::Gone) => {
                        self.listen().and_then(|()| bail!("the connection that publishes failed"))
                    }
                }
            }
        }
    }

    /// Checks that the server accepted what was published.
    fn listen(&mut self) -> anyhow::Result<()> {
        if let Sender::Line(publisher) = &mut self.sender {
            publisher.listen()?;
        }
        if let Some(why) = &self.books.silenced {
            bail!("a publication failed: {why}");
        }
        Ok(())
    }

    /// Reads arrivals until all members have everything; `false` if `patience` ran out first.
    fn settle(&mut self) -> anyhow::Result<bool> {
        let mut progress = (self.counts().delivered, Instant::now());
        while !self.books.ledger.is_settled() {
            let Self { swarm, books, load, .. } = self;
            swarm.drain(load.patience.min(Duration::from_millis(100)), |event| books.note(event))?;
            let (delivered, now) = (books.ledger.counts().delivered, Instant::now());
            if delivered != progress.0 {
                progress = (delivered, now);
            } else if now.duration_since(progress.1) >= load.patience {
                // The answers may explain why nothing arrives.
                self.listen()?;
                self.books.ledger.give_up();
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Sender {
    /// Connects as `via` specifies. A client is connected by the swarm instead.
    pub fn connect(via: &Via) -> anyhow::Result<Self> {
        let connected = match via {
            Via::Client(entrance) => Ok(Self::Client(entrance.clone())),
            Via::Http(address, credentials) => Publisher::http(address, credentials).map(Self::Line),
            Via::Redis(redis) => Publisher::redis(redis).map(Self::Line),
        };
        connected.with_context(|| format!("cannot publish by {via}"))
    }
}

impl Books {
    fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Standing { .. }
            | Event::Accepted
            | Event::Joined { .. }
            | Event::Left { .. }
            | Event::Position { .. }
            | Event::Gap { .. } => {}
            // The connection after the members publishes; ignore what it receives.
            Event::Message { member, .. } if member >= self.members => {}
            Event::Message { member, payload, at } => match self.finder.find(self.dialect, payload) {
                Some(stamp) => {
                    self.ledger.record(member, stamp.sequence);
                    self.latency.record(at.saturating_sub(stamp.sent));
                }
                None => {
                    self.ledger.record_foreign();
                }
            },
            Event::Lost { member, why, .. } if member >= self.members => {
                self.silenced.get_or_insert_with(|| why.to_string());
            }
            Event::Lost { member, why, .. } => {
                self.ledger.lose(member);
                self.first_loss.get_or_insert_with(|| format!("member {}: {why}", member + 1));
            }
            Event::Refused { why } => {
                self.silenced.get_or_insert(why);
            }
        }
    }
}

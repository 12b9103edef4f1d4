//! One room under test: members that listen, a publisher, and the books about both.
//!
//! Owns the pace of a round and its measurements. A round is a closed loop: a batch is published when every
//! member has the batch before it. So a server can coalesce within a batch and never across two, and the
//! cost per delivery does not depend on how fast the tester happens to be. Latency in a closed loop is
//! service time; it says nothing about a server that is offered more than it can do.

use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::{
    ledger::{Counts, Ledger},
    process::{self, Cpu, Server},
    publisher::Publisher,
    stamp::Stamp,
    stop::Stop,
    swarm::{Entrance, Event, Lost, Swarm},
};

/// After so many batches in a row that nobody completed, a round is abandoned.
const STALLS_IN_A_ROW: u32 = 3;

/// Latencies above this are recorded as this.
const LONGEST: Duration = Duration::from_secs(60);

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Bytes of payload per message.
    pub size: usize,
    /// Messages published together.
    pub burst: u64,
    /// How long a batch may make no progress before the next one goes out all the same.
    pub patience: Duration,
}

/// A room that stands: every member is connected.
pub struct Room {
    swarm: Swarm,
    publisher: Publisher,
    server: Server,
    load: Load,
    books: Books,
    batch: Vec<u8>,
}

/// Everything an arrival changes.
#[derive(Debug)]
struct Books {
    ledger: Ledger,
    latency: Histogram<u64>,
    run: u32,
    began: Instant,
    /// Why the first member was lost, for the report.
    first_loss: Option<String>,
}

/// What one round measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Round {
    pub messages: u64,
    pub seconds: f64,
    pub delivered: u64,
    pub deliveries_per_second: f64,
    /// CPU seconds of the server per million deliveries; absent without a pid.
    pub server_cpu: Option<Cpu>,
    /// CPU seconds of this tester per million deliveries.
    pub tester_cpu: Cpu,
    /// The part of one core that the server used.
    pub server_share: Option<f64>,
    /// The part of one core that this tester used.
    pub tester_share: f64,
    pub latency: Latency,
    /// Batches that ran out of patience.
    pub stalls: u32,
    /// Whether every message of the plan was published.
    pub complete: bool,
}

/// Time from just before the publishing system call to just after the receiving one, in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl Room {
    /// Opens `members` members and waits until all stand, then connects the publisher.
    pub fn open(
        entrance: &Entrance,
        members: usize,
        connect: impl FnOnce() -> anyhow::Result<Publisher>,
        server: Server,
        load: Load,
        stop: &Stop,
    ) -> anyhow::Result<Self> {
        process::allow_descriptors(members)?;
        let longest = u64::try_from(LONGEST.as_nanos()).unwrap_or(u64::MAX);
        let mut books = Books {
            ledger: Ledger::new(members),
            latency: Histogram::new_with_bounds(1, longest, 3).context("the latency histogram")?,
            run: process::run_id(),
            began: Instant::now(),
            first_loss: None,
        };
        let mut swarm = Swarm::new()?;
        swarm.grow(entrance, members, stop, |event| books.note(&event))?;
        Ok(Self { swarm, publisher: connect()?, server, load, books, batch: Vec::new() })
    }

    /// Publishes `messages` messages and measures until the last one is everywhere.
    pub fn round(&mut self, messages: u64, stop: &Stop) -> anyhow::Result<Round> {
        self.books.latency.reset();
        let (server, tester, before) = (self.server.cpu()?, Cpu::of_self()?, self.counts());
        let start = Instant::now();
        let (mut published, mut stalls, mut in_a_row) = (0, 0, 0);
        while published < messages && in_a_row < STALLS_IN_A_ROW && !stop.is_set() {
            let count = self.load.burst.min(messages - published);
            self.publish(count)?;
            published += count;
            if self.settle()? {
                in_a_row = 0;
            } else {
                stalls += 1;
                in_a_row += 1;
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        self.publisher.listen()?;
        let tester = Cpu::of_self()?.since(tester);
        let server = match (self.server.cpu()?, server) {
            (Some(now), Some(before)) => Some(now.since(before)),
            _ => None,
        };
        let delivered = self.counts().since(before).delivered;
        #[expect(clippy::cast_precision_loss, reason = "counts below 2^53")]
        let deliveries = delivered as f64;
        let per_million = |cpu: Cpu| cpu.scaled(1e6 / deliveries.max(1.0));
        Ok(Round {
            messages: published,
            seconds,
            delivered,
            deliveries_per_second: deliveries / seconds,
            server_cpu: server.map(per_million),
            tester_cpu: per_million(tester),
            server_share: server.map(|cpu| cpu.total() / seconds),
            tester_share: tester.total() / seconds,
            latency: self.books.latency(),
            stalls,
            complete: published == messages,
        })
    }

    /// What has been counted since the room was opened.
    pub fn counts(&self) -> Counts {
        self.books.ledger.counts()
    }

    /// Why the first member that was lost was lost.
    pub fn first_loss(&self) -> Option<&str> {
        self.books.first_loss.as_deref()
    }

    /// Waits a moment for stragglers, closes every connection and returns the final counts.
    pub fn close(mut self) -> anyhow::Result<Counts> {
        let settled = Instant::now() + self.load.patience;
        while self.counts().missing > 0 && self.counts().members_lost == 0 && Instant::now() < settled {
            let Self { swarm, books, .. } = &mut self;
            swarm.drain(Duration::from_millis(50), |event| books.note(&event))?;
        }
        let counts = self.counts();
        self.swarm.close();
        Ok(counts)
    }

    fn publish(&mut self, count: u64) -> anyhow::Result<()> {
        self.batch.clear();
        let first = self.books.ledger.published();
        self.books.ledger.publish(count);
        let sent = u64::try_from(self.books.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        for sequence in first..first + count {
            Stamp { run: self.books.run, sequence, sent }.write(&mut self.batch, self.load.size);
        }
        self.publisher.publish(&self.batch, self.load.size)
    }

    /// Drains until everybody has everything. `false` if patience ran out before.
    fn settle(&mut self) -> anyhow::Result<bool> {
        let mut progress = (self.counts().delivered, Instant::now());
        while !self.books.ledger.is_settled() {
            let Self { swarm, books, load, .. } = self;
            swarm.drain(load.patience.min(Duration::from_millis(100)), |event| books.note(&event))?;
            let (delivered, now) = (books.ledger.counts().delivered, Instant::now());
            if delivered != progress.0 {
                progress = (delivered, now);
            } else if now.duration_since(progress.1) >= load.patience {
                // The answers may say why nothing arrives.
                self.publisher.listen()?;
                self.books.ledger.give_up();
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Books {
    fn note(&mut self, event: &Event<'_>) {
        match event {
            Event::Message { member, payload, at } => match Stamp::read(payload) {
                Some(stamp) if stamp.run == self.run => {
                    self.ledger.record(*member, stamp.sequence);
                    let now = u64::try_from(at.duration_since(self.began).as_nanos()).unwrap_or(u64::MAX);
                    self.latency.saturating_record(now.saturating_sub(stamp.sent));
                }
                _ => {
                    self.ledger.record_foreign();
                }
            },
            Event::Lost { member, why, .. } => {
                self.ledger.lose(*member);
                self.first_loss.get_or_insert_with(|| format!("member {}: {}", member + 1, describe(why)));
            }
        }
    }

    fn latency(&self) -> Latency {
        #[expect(clippy::cast_precision_loss, reason = "at most a minute of nanoseconds")]
        let micros = |nanos: u64| nanos as f64 / 1e3;
        let at = |quantile| micros(self.latency.value_at_quantile(quantile));
        Latency {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: micros(self.latency.max()),
        }
    }
}

fn describe(why: &Lost) -> String {
    match why {
        Lost::Closed(Some(code)) => format!("closed by the server with code {code}"),
        Lost::Closed(None) => "closed by the server without a code".into(),
        Lost::Ended => "the server hung up".into(),
        Lost::Wire(error) => error.to_string(),
        Lost::Io(error) => error.to_string(),
    }
}

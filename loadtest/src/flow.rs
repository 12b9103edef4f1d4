//! Measures how many publications a path can carry: into Redis and out at members, from clients and out at
//! Redis, or without any gateway, for comparison.
//!
//! Owns the window: the number of publications in flight is bounded, so the slowest part of the path sets the
//! pace and no queue grows. Owns the accounting of a path too: every publisher numbers its messages, so
//! losses, duplicates and reordering are counted exactly.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use crate::{
    clock,
    ledger::{Account, Arrival, Counts},
    payload::Shape,
    publisher::Publisher,
    stamp::{Finder, Stamp},
    stop::Stop,
    swarm::{Event, Swarm},
    tap::Tap,
    target::Entrance,
};

/// Publications that are sent before the loop reads what has arrived.
const BATCH: u64 = 256;

/// How long to wait for arrivals when the window is full.
const GLANCE: Duration = Duration::from_millis(20);

/// What is published, and how much of it at once.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub run: u32,
    /// Publishers in all rooms together; publisher `n` is in room `n` modulo the number of rooms.
    pub lanes: u32,
    pub rooms: u32,
    pub size: usize,
    /// How many messages one publisher sends in a row.
    pub burst: u32,
    /// How many may be in flight.
    pub window: u64,
    /// Give up when nothing has arrived for this long.
    pub patience: Duration,
}

/// The result of one round.
#[derive(Clone, Copy, Debug)]
pub struct Passage {
    pub published: u64,
    pub arrived: u64,
    pub seconds: f64,
}

/// A path from a publisher to a receiver.
pub trait Way {
    /// Publishes at most `most` messages and returns how many.
    fn publish(&mut self, most: u64) -> anyhow::Result<u64>;
    /// Returns how many have arrived since the path was opened; waits up to `wait` for more.
    fn arrived(&mut self, wait: Duration) -> anyhow::Result<u64>;
}

/// Publishes `messages` messages on `way`, and returns when all have arrived or nothing arrives any more.
pub fn pass(way: &mut impl Way, load: &Load, messages: u64, stop: &Stop) -> anyhow::Result<Passage> {
    let before = way.arrived(Duration::ZERO)?;
    let begun = Instant::now();
    let (mut published, mut arrived, mut progress) = (0, 0, begun);
    while arrived < published || (published < messages && !stop.is_set()) {
        let room = load.window.saturating_sub(published - arrived.min(published));
        let more = if stop.is_set() { 0 } else { room.min(messages - published).min(BATCH) };
        let sent = if more > 0 { way.publish(more)? } else { 0 };
        published += sent;
        let wait = if sent > 0 && published < messages { Duration::ZERO } else { GLANCE };
        let now = way.arrived(wait)? - before;
        if now > arrived || sent > 0 {
            (arrived, progress) = (now, Instant::now());
        } else if progress.elapsed() > load.patience {
            break;
        }
    }
    Ok(Passage { published, arrived, seconds: progress.duration_since(begun).as_secs_f64() })
}

/// Accounting for publishers that number their messages.
#[derive(Debug)]
pub struct Lanes {
    accounts: Vec<Account>,
    pub counts: Counts,
}

impl Lanes {
    /// Empty accounts for `lanes` publishers.
    pub fn new(lanes: u32) -> Self {
        let accounts = std::iter::repeat_with(Account::default).take(lanes as usize).collect();
        Self { accounts, counts: Counts::default() }
    }

    /// Records an arrival: publisher and sequence, or `None` if it does not belong to this run.
    pub fn record(&mut self, mark: Option<(u32, u64)>) {
        let account =
            mark.and_then(|(lane, sequence)| Some((self.accounts.get_mut(lane as usize)?, sequence)));
        let Some((account, sequence)) = account else {
            self.counts.foreign += 1;
            return;
        };
        match account.record(sequence) {
            Arrival::Duplicate | Arrival::Foreign => self.counts.duplicated += 1,
            arrival => {
                self.counts.delivered += 1;
                self.counts.out_of_order += u64::from(arrival == Arrival::Late);
            }
        }
    }
}

/// Decides who publishes what next: publishers take turns.
#[derive(Debug)]
pub struct Script {
    load: Load,
    lane: u32,
    /// How much of the lane's burst has been sent.
    said: u32,
    sequences: Vec<u64>,
}

impl Script {
    /// Starts with the first publisher.
    pub fn new(load: &Load) -> Self {
        Self { load: *load, lane: 0, said: 0, sequences: vec![0; load.lanes as usize] }
    }

    /// The publisher whose turn it is.
    pub fn lane(&self) -> u32 {
        self.lane
    }

    /// Appends the next payload of the current lane and advances after its burst; returns the room.
    pub fn next(&mut self, out: &mut Vec<u8>) -> u32 {
        let Load { run, lanes, rooms, size, burst, .. } = self.load;
        let (publisher, room) = (self.lane, self.lane % rooms);
        if let Some(sequence) = self.sequences.get_mut(publisher as usize) {
            Stamp { run, room, publisher, sequence: *sequence, sent: clock::now() }
                .write(out, Shape::dots(size));
            *sequence += 1;
        }
        self.said += 1;
        if self.said >= burst {
            self.said = 0;
            self.lane = (self.lane + 1) % lanes;
        }
        room
    }
}

/// A pipelined PUBLISH, with the payloads that wait to be sent.
pub struct Pipeline {
    line: Publisher,
    script: Script,
    payloads: Vec<u8>,
    rooms: Vec<u32>,
}

impl Pipeline {
    /// Uses a connection to Redis.
    pub fn new(line: Publisher, load: &Load) -> Self {
        Self { line, script: Script::new(load), payloads: Vec::new(), rooms: Vec::new() }
    }

    fn publish(&mut self, count: u64) -> anyhow::Result<u64> {
        self.payloads.clear();
        self.rooms.clear();
        for _ in 0..count {
            self.rooms.push(self.script.next(&mut self.payloads));
        }
        self.line.publish(&self.payloads, self.script.load.size, &self.rooms)?;
        Ok(count)
    }
}

/// The path from a pipeline through Redis to a bare subscriber, without a gateway.
pub struct Bare {
    pub pipeline: Pipeline,
    pub tap: Tap,
}

impl Way for Bare {
    fn publish(&mut self, most: u64) -> anyhow::Result<u64> {
        self.pipeline.publish(most)
    }

    fn arrived(&mut self, wait: Duration) -> anyhow::Result<u64> {
        self.tap.count(wait)
    }
}

/// The path from a pipeline through Redis and a gateway to its members.
pub struct Intake {
    pub pipeline: Pipeline,
    pub swarm: Swarm,
    pub books: MemberBooks,
}

/// The messages that members have received.
pub struct MemberBooks {
    pub lanes: Lanes,
    pub finder: Finder,
    pub entrance: Entrance,
    pub rooms_per_client: u32,
    pub first_loss: Option<String>,
}

impl MemberBooks {
    /// Records an event of the swarm.
    pub fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Standing { .. }
            | Event::Accepted
            | Event::Joined { .. }
            | Event::Left { .. }
            | Event::Position { .. }
            | Event::Gap { .. } => {}
            Event::Message { member, payload, .. } => {
                let stamp = self.finder.find(self.entrance.dialect, payload);
                // Each room has one member; a message that arrives at another is astray.
                let own = stamp.filter(|stamp| (stamp.room / self.rooms_per_client) as usize == member);
                self.lanes.record(own.map(|stamp| (stamp.publisher, stamp.sequence)));
            }
            Event::Refused { why } => {
                self.first_loss.get_or_insert(why);
            }
            Event::Lost { member, why, .. } => {
                self.lanes.counts.members_lost += 1;
                self.first_loss.get_or_insert_with(|| format!("member {}: {why}", member + 1));
            }
        }
    }
}

impl Way for Intake {
    fn publish(&mut self, most: u64) -> anyhow::Result<u64> {
        self.pipeline.publish(most)
    }

    fn arrived(&mut self, wait: Duration) -> anyhow::Result<u64> {
        let Self { swarm, books, .. } = self;
        swarm.drain(wait, |event| books.note(event))?;
        Ok(books.lanes.counts.delivered)
    }
}

/// The path from clients through a gateway and Redis to a bare subscriber.
pub struct Clients {
    pub swarm: Swarm,
    pub entrance: Entrance,
    pub script: Script,
    pub tap: Tap,
    pub frames: Vec<u8>,
    pub failure: Option<String>,
    /// The number of publications so far, which also serves as a unique number for each.
    pub said: u64,
}

impl Way for Clients {
    fn publish(&mut self, most: u64) -> anyhow::Result<u64> {
        let mut payload = Vec::new();
        let mut count = 0;
        while count < most {
            let client = self.script.lane();
            self.frames.clear();
            let mut burst = 0;
            // A client's burst is one write.
            while count + burst < most && self.script.lane() == client && (burst == 0 || self.script.said > 0)
            {
                payload.clear();
                let room = self.script.next(&mut payload);
                let Self { entrance, frames, said, .. } = self;
                entrance.dialect.publish(entrance, room, &payload, *said, frames);
                *said += 1;
                burst += 1;
            }
            let said = self.swarm.say(client as usize, &self.frames);
            ensure!(said.is_ok(), "client {} cannot publish: {said:?}", client + 1);
            count += burst;
        }
        Ok(count)
    }

    fn arrived(&mut self, wait: Duration) -> anyhow::Result<u64> {
        let Self { swarm, failure, .. } = self;
        // Read the answers, or the gateway stops reading from these clients.
        swarm.drain(Duration::ZERO, |event| match event {
            Event::Refused { why } => {
                failure.get_or_insert(why);
            }
            Event::Lost { member, why, .. } => {
                failure.get_or_insert_with(|| format!("client {}: {why}", member + 1));
            }
            Event::Standing { .. }
            | Event::Message { .. }
            | Event::Accepted
            | Event::Joined { .. }
            | Event::Left { .. }
            | Event::Position { .. }
            | Event::Gap { .. } => {}
        })?;
        if let Some(why) = failure {
            bail!("a publication failed: {why}");
        }
        self.tap.count(wait.min(Duration::from_millis(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load() -> Load {
        let patience = Duration::from_millis(10);
        Load { run: 1, lanes: 3, rooms: 2, size: 62, burst: 2, window: 5, patience }
    }

    #[test]
    fn publishers_take_turns_and_number_their_messages() {
        let (mut script, finder) = (Script::new(&load()), Finder::new(1, Shape::dots(62)));
        let said: Vec<_> = (0..8)
            .map(|_| {
                let mut payload = Vec::new();
                let room = script.next(&mut payload);
                let stamp = finder.whole(&payload).unwrap();
                assert_eq!(stamp.room, room);
                (room, stamp.publisher, stamp.sequence)
            })
            .collect();
        let expected =
            [(0, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0, 2, 0), (0, 2, 1), (0, 0, 2), (0, 0, 3)];
        assert_eq!(said, expected);
    }

    #[test]
    fn every_arrival_is_classified() {
        let mut lanes = Lanes::new(2);
        for mark in [Some((0, 0)), Some((1, 1)), Some((1, 0)), Some((0, 0)), Some((2, 0)), None] {
            lanes.record(mark);
        }
        let expected =
            Counts { delivered: 3, out_of_order: 1, duplicated: 1, foreign: 2, ..Counts::default() };
        assert_eq!(lanes.counts, expected);
    }

    /// Delivers each message one call later, and loses everything from a point on.
    struct Lossy {
        given: u64,
        arrived: u64,
        loses_after: u64,
        most_on_its_way: u64,
    }

    impl Way for Lossy {
        fn publish(&mut self, most: u64) -> anyhow::Result<u64> {
            self.given += most;
            self.most_on_its_way = self.most_on_its_way.max(self.given - self.arrived);
            Ok(most)
        }

        fn arrived(&mut self, _: Duration) -> anyhow::Result<u64> {
            let before = self.arrived;
            self.arrived = self.given.min(self.loses_after);
            Ok(before)
        }
    }

    #[test]
    fn the_window_bounds_messages_in_flight_and_a_loss_ends_the_round() {
        let stop = Stop::install(Duration::from_secs(60)).unwrap();
        let lossy = |loses_after| Lossy { given: 0, arrived: 0, loses_after, most_on_its_way: 0 };
        let mut faithful = lossy(u64::MAX);
        let passage = pass(&mut faithful, &load(), 23, &stop).unwrap();
        assert_eq!((passage.published, passage.arrived), (23, 23));
        assert!(faithful.most_on_its_way <= 5);
        let passage = pass(&mut lossy(7), &load(), 23, &stop).unwrap();
        assert_eq!((passage.published, passage.arrived), (12, 7), "a full window was sent, and lost");
    }
}

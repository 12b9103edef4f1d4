//! As many publications as a way takes: into Redis and out at members, from clients and out at Redis, or past every
//! gateway, for comparison.
//!
//! Owns the window: only so many publications are on their way at once, so that the slowest on the way sets the
//! pace and nobody's queue grows. Owns the books of a way too: every publisher numbers what it says, so that what
//! is lost, doubled or out of order is known exactly.

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

/// Publications that go out before the loop looks at what has arrived.
const BATCH: u64 = 256;

/// How long a look at what has arrived waits, when nothing more may go out.
const GLANCE: Duration = Duration::from_millis(20);

/// What is published, and how much of it at once.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub run: u32,
    /// Publishers in all rooms together; each is in the room of its number, counted round.
    pub lanes: u32,
    pub rooms: u32,
    pub size: usize,
    /// How many one publisher says in one go.
    pub burst: u32,
    /// How many may be on their way.
    pub window: u64,
    /// How long nothing may arrive.
    pub patience: Duration,
}

/// One round of a way.
#[derive(Clone, Copy, Debug)]
pub struct Passage {
    pub published: u64,
    pub arrived: u64,
    pub seconds: f64,
}

/// From where something is published to where it arrives.
pub trait Way {
    /// Publishes at most so many, and says how many it were.
    fn publish(&mut self, most: u64) -> anyhow::Result<u64>;
    /// How many have arrived since the way was opened; waits so long for more.
    fn arrived(&mut self, wait: Duration) -> anyhow::Result<u64>;
}

/// Publishes `messages` messages on `way`, and returns when they have arrived or nothing arrives any more.
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

/// Books about publishers that number what they say.
#[derive(Debug)]
pub struct Lanes {
    accounts: Vec<Account>,
    pub counts: Counts,
}

impl Lanes {
    /// Empty books about so many.
    pub fn new(lanes: u32) -> Self {
        let accounts = std::iter::repeat_with(Account::default).take(lanes as usize).collect();
        Self { accounts, counts: Counts::default() }
    }

    /// Records an arrival: publisher and sequence, or `None` if it is not of this run.
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

/// Who says what next: publishers in turn.
#[derive(Debug)]
pub struct Script {
    load: Load,
    lane: u32,
    /// How much of the lane's burst has been said.
    said: u32,
    sequences: Vec<u64>,
}

impl Script {
    /// From the beginning.
    pub fn new(load: &Load) -> Self {
        Self { load: *load, lane: 0, said: 0, sequences: vec![0; load.lanes as usize] }
    }

    /// Whose turn it is.
    pub fn lane(&self) -> u32 {
        self.lane
    }

    /// Appends the next payload of the lane whose turn it is, and passes the turn on after its burst. The room.
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

/// A pipelined PUBLISH, with the payloads that are on their way to it.
pub struct Pipeline {
    line: Publisher,
    script: Script,
    payloads: Vec<u8>,
    rooms: Vec<u32>,
}

impl Pipeline {
    /// On a connection to Redis.
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

/// From a pipeline through Redis to a bare subscriber: no gateway at all.
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

/// From a pipeline through Redis and a gateway to its members.
pub struct Intake {
    pub pipeline: Pipeline,
    pub swarm: Swarm,
    pub books: MemberBooks,
}

/// What members have received.
pub struct MemberBooks {
    pub lanes: Lanes,
    pub finder: Finder,
    pub entrance: Entrance,
    pub rooms_per_client: u32,
    pub first_loss: Option<String>,
}

impl MemberBooks {
    /// Records what the swarm has seen.
    pub fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Standing { .. } | Event::Joined { .. } | Event::Left { .. } => {}
            Event::Message { member, payload, .. } => {
                let stamp = self.finder.find(self.entrance.dialect, payload);
                // Each room has one member, and that is this one or the message has gone astray.
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

/// From clients through a gateway and Redis to a bare subscriber.
pub struct Clients {
    pub swarm: Swarm,
    pub entrance: Entrance,
    pub script: Script,
    pub tap: Tap,
    pub frames: Vec<u8>,
    pub failure: Option<String>,
    /// Publications so far: a number that differs from one to the next.
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
            // What one says in one go is one write.
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
        // Their answers have to be read, or the gateway stops to read from them.
        swarm.drain(Duration::ZERO, |event| match event {
            Event::Refused { why } => {
                failure.get_or_insert(why);
            }
            Event::Lost { member, why, .. } => {
                failure.get_or_insert_with(|| format!("client {}: {why}", member + 1));
            }
            Event::Standing { .. } | Event::Message { .. } | Event::Joined { .. } | Event::Left { .. } => {}
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
    fn publishers_speak_in_turn_and_number_what_they_say() {
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
    fn every_arrival_is_counted_for_what_it_is() {
        let mut lanes = Lanes::new(2);
        for mark in [Some((0, 0)), Some((1, 1)), Some((1, 0)), Some((0, 0)), Some((2, 0)), None] {
            lanes.record(mark);
        }
        let expected =
            Counts { delivered: 3, out_of_order: 1, duplicated: 1, foreign: 2, ..Counts::default() };
        assert_eq!(lanes.counts, expected);
    }

    /// Delivers what it is given one look later, and loses everything from a point on.
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
    fn no_more_than_the_window_is_on_its_way_and_a_loss_ends_the_round() {
        let stop = Stop::install(Duration::from_secs(60)).unwrap();
        let lossy = |loses_after| Lossy { given: 0, arrived: 0, loses_after, most_on_its_way: 0 };
        let mut faithful = lossy(u64::MAX);
        let passage = pass(&mut faithful, &load(), 23, &stop).unwrap();
        assert_eq!((passage.published, passage.arrived), (23, 23));
        assert!(faithful.most_on_its_way <= 5);
        let passage = pass(&mut lossy(7), &load(), 23, &stop).unwrap();
        assert_eq!((passage.published, passage.arrived), (12, 7), "a window's worth is out, and lost");
    }
}

//! Clients of rooms with a history, which drop their connections and come back with their positions.
//!
//! Owns the clients: what each has received, where it stands, and how long it took to catch up. Each is in one
//! room and receives every message of it from the first on, so each message counts for each client: it is
//! delivered once and in order, or covered by a gap that the server has told, or missing.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use crate::{
    clock,
    dialect::{Dialect, Seat, subscribe},
    journal::Journal,
    latency::Latencies,
    ledger::{Account, Arrival},
    payload::Shape,
    place::Place,
    stamp::Finder,
    stop::Stop,
    swarm::{Event, Lost, OPENING_AT_ONCE, Swarm},
    target::Entrance,
    websocket::{self, Opcode},
};

/// How long to wait for arrivals in one turn.
const GLANCE: Duration = Duration::from_millis(5);

/// The clients.
pub struct Crowd {
    swarm: Swarm,
    doors: Vec<Entrance>,
    pub books: Books,
    anchors: Option<Anchors>,
}

/// Clients that stay in all rooms, so that a node keeps what it has in memory while the others are away.
struct Anchors {
    swarm: Swarm,
    count: usize,
    received: u64,
    failure: Option<String>,
}

/// What the clients have received.
pub struct Books {
    finder: Finder,
    clients: Vec<Client>,
    /// How many messages each room has got.
    published: Vec<u64>,
    /// Clients that have received everything that was published before they were ready.
    live: usize,
    counts: Tally,
    /// From the start of a client's connection until it is live again; only of clients that come back.
    pub catching_up: Latencies,
    /// From when a message was due.
    pub latency: Latencies,
    /// Whether clients may lose their connections: a node is killed.
    pub tolerant: bool,
    /// Clients that have lost theirs.
    pub lost: Vec<usize>,
    /// Clients whose subscription the server has ended with a code that allows them to subscribe again.
    left: Vec<usize>,
    failure: Option<String>,
}

/// The counts of a run, of clients and messages together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Messages times the clients of their rooms.
    pub expected: u64,
    pub delivered: u64,
    /// Neither delivered nor covered by anything below.
    pub missing: u64,
    pub duplicated: u64,
    pub out_of_order: u64,
    /// Arrivals that are not a message of this run for the client's room.
    pub foreign: u64,
    /// Messages that did not arrive where the server has told a gap.
    pub covered: u64,
    /// Messages that did not arrive and may never have been recorded: Redis was lost before it answered.
    pub doubtful: u64,
    /// Gaps that were told, by their cause.
    pub gaps: BTreeMap<String, u64>,
    /// The largest number of gaps that one client was told.
    pub gaps_of_one: u64,
    /// Connections that ended without the tester's doing.
    pub connections_lost: u64,
    /// How often clients have come back.
    pub returns: u64,
}

#[derive(Debug, Default)]
struct Client {
    room: u32,
    door: usize,
    place: Option<Place>,
    account: Account,
    /// Whether a gap was told since the last message.
    gap: bool,
    gaps: u64,
    state: State,
    /// When its connection was started.
    begun: u64,
    returning: bool,
    /// When its last message arrived, and the longest time between two.
    heard: u64,
    pause: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Away,
    Opening,
    /// Ready; it is live once it has all messages before this one.
    CatchingUp(u64),
    Live,
}

impl Crowd {
    /// Without clients. Rooms are numbered below `rooms`.
    pub fn new(doors: Vec<Entrance>, rooms: u32, run: u32, shape: Shape) -> anyhow::Result<Self> {
        let books = Books {
            finder: Finder::new(run, shape),
            clients: Vec::new(),
            published: vec![0; rooms as usize],
            live: 0,
            counts: Tally::default(),
            catching_up: Latencies::new()?,
            latency: Latencies::new()?,
            tolerant: false,
            lost: Vec::new(),
            left: Vec::new(),
            failure: None,
        };
        Ok(Self { swarm: Swarm::new()?, doors, books, anchors: None })
    }

    /// Adds a door and returns its number.
    pub fn add_door(&mut self, door: Entrance) -> usize {
        self.doors.push(door);
        self.doors.len() - 1
    }

    /// Opens Centrifuge clients that stay in all rooms, at most `each` rooms on one connection. Everything that
    /// is published from now on must reach them. Returns how many there are.
    pub fn anchor(&mut self, door: &Entrance, each: u32, stop: &Stop) -> anyhow::Result<usize> {
        let rooms = u32::try_from(self.books.published.len()).unwrap_or(0);
        let count = rooms.div_ceil(each) as usize;
        let mut anchors = Anchors { swarm: Swarm::new()?, count, received: 0, failure: None };
        let seat = |member: usize| {
            let first = u32::try_from(member).unwrap_or(0) * each;
            // Anchors are other users than clients.
            let user = u32::MAX / 2 + first;
            Seat {
                user,
                room: first,
                rooms: each.min(rooms - first),
                stays: false,
                since: None,
                listens: true,
            }
        };
        anchors.swarm.grow(door, count, seat, stop, |_| {})?;
        self.anchors = Some(anchors);
        Ok(count)
    }

    /// Waits until the anchors have received `messages` since they were opened.
    pub fn await_anchors(&mut self, messages: u64, stop: &Stop) -> anyhow::Result<()> {
        let begun = Instant::now();
        while let Some(anchors) = &mut self.anchors
            && anchors.received < messages
        {
            anchors.attend(GLANCE)?;
            ensure!(!stop.is_set(), "ended while the anchors receive");
            ensure!(
                begun.elapsed() < Duration::from_secs(30),
                "the anchors received {} of {messages} messages",
                anchors.received
            );
        }
        Ok(())
    }

    /// How many clients there are.
    pub fn len(&self) -> usize {
        self.books.clients.len()
    }

    /// How many connections are being opened.
    pub fn opening(&self) -> usize {
        self.swarm.opening()
    }

    /// Whether every client is live.
    pub fn is_live(&self) -> bool {
        self.books.live == self.books.clients.len()
    }

    /// Opens `clients` connections and waits until all are ready. `place` chooses a room and a door for each.
    pub fn open(
        &mut self,
        clients: u32,
        place: impl Fn(u32) -> (u32, usize),
        stop: &Stop,
    ) -> anyhow::Result<()> {
        let doors = self.doors.clone();
        let first = u32::try_from(self.len()).unwrap_or(0);
        for number in first..first + clients {
            let (room, door) = place(number);
            let begun = clock::now();
            self.books.clients.push(Client { room, door, state: State::Opening, begun, ..Client::default() });
            while self.swarm.opening() >= OPENING_AT_ONCE {
                self.attend(GLANCE)?;
            }
            let entrance = doors.get(door).context("a door has a number")?;
            self.swarm.open(entrance, seat(number, room, None))?;
        }
        self.await_live(stop, Duration::from_secs(30))
    }

    /// Drops the connection of `client` without a word.
    pub fn drop_connection(&mut self, client: usize) {
        self.swarm.hang_up(client);
        if let Some(client) = self.books.clients.get_mut(client) {
            self.books.live -= usize::from(client.state == State::Live);
            client.state = State::Away;
        }
    }

    /// Starts to connect `client` again: with its position, if it has been told one, or without.
    pub fn bring_back(&mut self, client: usize, with_position: bool) -> anyhow::Result<()> {
        self.drop_connection(client);
        let own = self.books.clients.get_mut(client).context("a client has a number")?;
        own.state = State::Opening;
        own.begun = clock::now();
        own.returning = true;
        let number = u32::try_from(client).unwrap_or(0);
        let seat = seat(number, own.room, own.place.filter(|_| with_position));
        let entrance = self.doors.get(own.door).context("a door has a number")?;
        self.books.counts.returns += 1;
        self.swarm.reopen(client, entrance, seat)
    }

    /// From now on `client` connects at `door`.
    pub fn lead_to(&mut self, client: usize, door: usize) {
        if let Some(client) = self.books.clients.get_mut(client) {
            client.door = door;
        }
    }

    /// Drops all connections and starts them again, as fast as the server takes them; returns how long it took
    /// until all clients were live.
    pub fn bring_all_back(&mut self, with_position: bool, stop: &Stop) -> anyhow::Result<Duration> {
        for client in 0..self.len() {
            self.drop_connection(client);
        }
        let begun = Instant::now();
        for client in 0..self.len() {
            while self.swarm.opening() >= OPENING_AT_ONCE {
                self.attend(GLANCE)?;
            }
            self.bring_back(client, with_position)?;
        }
        self.await_live(stop, Duration::from_secs(60))?;
        Ok(begun.elapsed())
    }

    /// Takes note of what has been published.
    pub fn note_published(&mut self, journal: &Journal) {
        self.books.published.copy_from_slice(journal.published());
    }

    /// Reads arrivals, and subscribes again where the server has ended a subscription.
    pub fn attend(&mut self, wait: Duration) -> anyhow::Result<()> {
        let Self { swarm, books, doors, anchors } = self;
        swarm.drain(wait, |event| books.note(event))?;
        if let Some(anchors) = anchors {
            anchors.attend(Duration::ZERO)?;
        }
        for member in std::mem::take(&mut books.left) {
            let Some(client) = books.clients.get(member) else { continue };
            let door = doors.get(client.door).context("a door has a number")?;
            let mut frame = Vec::new();
            let words = subscribe(door, client.room, client.place)?;
            websocket::write_masked(&mut frame, Opcode::Text, &[words.as_bytes()], 1);
            let said = swarm.say(member, &frame);
            ensure!(said.is_ok(), "client {} cannot subscribe again: {said:?}", member + 1);
        }
        match books.failure.take() {
            Some(why) => bail!("{why}"),
            None => Ok(()),
        }
    }

    /// Waits until every client is live.
    pub fn await_live(&mut self, stop: &Stop, patience: Duration) -> anyhow::Result<()> {
        let mut progress = (self.books.live, Instant::now());
        while !self.is_live() {
            self.attend(GLANCE)?;
            if progress.0 != self.books.live {
                progress = (self.books.live, Instant::now());
            }
            let words = || format!("{} of {} clients are live", self.books.live, self.len());
            ensure!(!stop.is_set(), "ended while {}", words());
            ensure!(progress.1.elapsed() < patience, "no progress for {patience:?}: {}", words());
        }
        Ok(())
    }

    /// Publishes one message to every room, waits until Redis has recorded all and every client has
    /// everything, or nothing arrives for `patience`.
    pub fn finish(&mut self, journal: &mut Journal, stop: &Stop, patience: Duration) -> anyhow::Result<()> {
        self.publish_everywhere(journal, 1, stop)?;
        self.await_all(stop, patience)
    }

    /// Publishes `each` messages to every room, and waits until Redis has recorded all.
    pub fn publish_everywhere(
        &mut self,
        journal: &mut Journal,
        each: u32,
        stop: &Stop,
    ) -> anyhow::Result<()> {
        /// Publications in flight.
        const WINDOW: usize = 512;
        let rooms = u32::try_from(self.books.published.len()).unwrap_or(0);
        for _ in 0..each {
            for room in 0..rooms {
                journal.publish(room, clock::now())?;
                while journal.in_flight() >= WINDOW {
                    self.turn(journal)?;
                    ensure!(!stop.is_set(), "ended while publishing");
                }
            }
        }
        while journal.in_flight() > 0 {
            self.turn(journal)?;
            ensure!(!stop.is_set(), "ended while publishing");
        }
        Ok(())
    }

    fn turn(&mut self, journal: &mut Journal) -> anyhow::Result<()> {
        self.note_published(journal);
        journal.turn()?;
        journal.ensure_connected()?;
        self.attend(Duration::ZERO)
    }

    /// Waits until every client has every message, or nothing arrives for `patience`: then the rest is
    /// missing.
    pub fn await_all(&mut self, stop: &Stop, patience: Duration) -> anyhow::Result<()> {
        let mut progress = (self.books.counts.delivered, Instant::now());
        while self.books.is_behind() && progress.1.elapsed() < patience && !stop.is_set() {
            let until = Instant::now() + Duration::from_millis(50);
            while Instant::now() < until {
                self.attend(GLANCE)?;
            }
            if progress.0 != self.books.counts.delivered {
                progress = (self.books.counts.delivered, Instant::now());
            }
        }
        Ok(())
    }
}

impl Anchors {
    fn attend(&mut self, wait: Duration) -> anyhow::Result<()> {
        let Self { swarm, count, received, failure } = self;
        swarm.drain(wait, |event| match event {
            Event::Message { .. } => *received += 1,
            Event::Lost { member, why, .. } => {
                failure.get_or_insert_with(|| format!("anchor {} of {count}: {why}", member + 1));
            }
            _ => {}
        })?;
        match failure.take() {
            Some(why) => bail!("{why}"),
            None => Ok(()),
        }
    }
}

impl Books {
    /// The counts so far. What is still on its way counts as missing.
    pub fn tally(&self, journal: &Journal) -> Tally {
        let mut tally = self.counts.clone();
        for client in &self.clients {
            let published = journal.published().get(client.room as usize).copied().unwrap_or(0);
            tally.expected += published;
            let doubts = journal.doubts(client.room);
            let next = client.account.next();
            let rest = next..published.max(next);
            for hole in client.account.holes().iter().chain([&rest]) {
                let doubtful = doubts.iter().filter(|sequence| hole.contains(sequence)).count() as u64;
                tally.doubtful += doubtful;
                tally.missing += hole.end - hole.start - doubtful;
            }
            tally.gaps_of_one = tally.gaps_of_one.max(client.gaps);
        }
        tally
    }

    /// Forgets the longest pauses: the time without messages counts from now on.
    pub fn start_pauses(&mut self) {
        for client in &mut self.clients {
            client.heard = clock::now();
            client.pause = 0;
        }
    }

    /// The longest time between two messages of each client that `counts`.
    pub fn pauses(&self, counts: impl Fn(usize) -> bool) -> anyhow::Result<Latencies> {
        let mut pauses = Latencies::new()?;
        let own = self.clients.iter().enumerate().filter(|&(number, _)| counts(number));
        own.for_each(|(_, client)| pauses.record(client.pause));
        Ok(pauses)
    }

    /// How many clients have been told more than `most` gaps.
    pub fn told_more_than(&self, most: u64) -> usize {
        self.clients.iter().filter(|client| client.gaps > most).count()
    }

    fn is_behind(&self) -> bool {
        let published = |client: &Client| self.published.get(client.room as usize).copied().unwrap_or(0);
        self.clients.iter().any(|client| client.account.next() < published(client))
    }

    fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Accepted | Event::Joined { .. } => {}
            Event::Standing { member, took } => {
                let Some(client) = self.clients.get_mut(member) else { return };
                let goal = self.published.get(client.room as usize).copied().unwrap_or(0);
                client.state = State::CatchingUp(goal);
                self.catch_up(member, |begun| begun + took);
            }
            Event::Position { member, epoch, offset } => {
                let Some(client) = self.clients.get_mut(member) else { return };
                let epoch = epoch.or(client.place.map(|place| place.epoch));
                client.place = epoch.map(|epoch| Place { epoch, offset });
            }
            Event::Gap { member, cause } => {
                *self.counts.gaps.entry(cause.to_owned()).or_default() += 1;
                if let Some(client) = self.clients.get_mut(member) {
                    client.gap = true;
                    client.gaps += 1;
                }
            }
            Event::Message { member, payload, at } => self.message(member, payload, at),
            Event::Left { member, .. } => self.left.push(member),
            Event::Refused { why } => {
                self.failure.get_or_insert(why);
            }
            Event::Lost { member, why, stood } => self.lose(member, &why, stood),
        }
    }

    fn message(&mut self, member: usize, payload: &[u8], at: u64) {
        let Some(client) = self.clients.get_mut(member) else { return };
        // Every protocol of this scenario wraps the message, and its stamp is found in the same way.
        let stamp = self.finder.find(Dialect::Json, payload);
        let Some(stamp) = stamp.filter(|stamp| stamp.room == client.room) else {
            self.counts.foreign += 1;
            return;
        };
        client.pause = client.pause.max(at.saturating_sub(client.heard));
        client.heard = at;
        if std::mem::take(&mut client.gap) {
            self.counts.covered += client.account.skip_to(stamp.sequence);
        }
        match client.account.record(stamp.sequence) {
            Arrival::InOrder => self.counts.delivered += 1,
            Arrival::Late => {
                self.counts.delivered += 1;
                self.counts.out_of_order += 1;
            }
            Arrival::Duplicate => self.counts.duplicated += 1,
            Arrival::Foreign => self.counts.foreign += 1,
        }
        if client.state == State::Live {
            self.latency.record(at.saturating_sub(stamp.sent));
        }
        self.catch_up(member, |_| at);
    }

    /// Takes note if the client has just become live. `at`: the time now, given when its connection began.
    fn catch_up(&mut self, member: usize, at: impl Fn(u64) -> u64) {
        let Some(client) = self.clients.get_mut(member) else { return };
        if let State::CatchingUp(goal) = client.state
            && client.account.next() >= goal
        {
            client.state = State::Live;
            self.live += 1;
            if client.returning {
                self.catching_up.record(at(client.begun).saturating_sub(client.begun));
            }
        }
    }

    fn lose(&mut self, member: usize, why: &Lost, stood: bool) {
        let Some(client) = self.clients.get_mut(member) else { return };
        self.live -= usize::from(client.state == State::Live);
        client.state = State::Away;
        self.counts.connections_lost += u64::from(stood);
        if self.tolerant {
            self.lost.push(member);
        } else {
            let when = if stood { "" } else { " while it connected" };
            self.failure.get_or_insert_with(|| format!("client {}{when}: {why}", member + 1));
        }
    }
}

impl Tally {
    /// Whether every message was delivered once and in order, and no gap was told.
    pub fn is_exact(&self) -> bool {
        self.gaps.is_empty() && self.covered == 0 && self.is_told()
    }

    /// Whether every message was delivered once and in order, or lies under a gap that was told.
    pub fn is_told(&self) -> bool {
        self.expected > 0 && self.missing + self.duplicated + self.out_of_order + self.foreign == 0
    }

    /// The counts as text.
    pub fn words(&self) -> String {
        let Self { expected, delivered, missing, duplicated, out_of_order, foreign, .. } = self;
        let Self { covered, doubtful, gaps, gaps_of_one, connections_lost, returns, .. } = self;
        let told: u64 = gaps.values().sum();
        let causes: Vec<String> = gaps.iter().map(|(cause, count)| format!("{cause} {count}")).collect();
        let causes = if causes.is_empty() { String::new() } else { format!(" ({})", causes.join(", ")) };
        format!(
            "delivered {delivered} of {expected}, missing {missing}, duplicated {duplicated}, out of order \
             {out_of_order}, foreign {foreign}; gaps told {told}{causes}, at most {gaps_of_one} to one client, \
             covering {covered}; outcome unknown {doubtful}; {returns} returns, {connections_lost} connections lost"
        )
    }
}

fn seat(user: u32, room: u32, since: Option<Place>) -> Seat {
    Seat { user, room, rooms: 1, stays: true, since, listens: true }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stamp::Stamp;

    /// The books of one client in room 0, which was told its position.
    fn books() -> Books {
        let mut books = Crowd::new(Vec::new(), 1, 7, Shape::dots(64)).unwrap().books;
        books.clients.push(Client { state: State::Opening, returning: true, begun: 1, ..Client::default() });
        books.note(Event::Position { member: 0, epoch: Some(17), offset: 0 });
        books
    }

    fn message(books: &mut Books, room: u32, sequence: u64) {
        let mut payload = b"{\"room\":\"x\",\"data\":".to_vec();
        Stamp { run: 7, room, publisher: 0, sequence, sent: 5 }.write(&mut payload, Shape::dots(64));
        payload.push(b'}');
        books.note(Event::Message { member: 0, payload: &payload, at: clock::now() });
    }

    #[test]
    fn every_arrival_is_accounted_for() {
        let mut books = books();
        for sequence in [0, 2, 1, 2] {
            message(&mut books, 0, sequence);
        }
        message(&mut books, 1, 3);
        let counts = &books.counts;
        assert_eq!((counts.delivered, counts.out_of_order, counts.duplicated, counts.foreign), (3, 1, 1, 1));
        // Centrifuge names the epoch only when a client subscribes.
        books.note(Event::Position { member: 0, epoch: None, offset: 3 });
        assert_eq!(books.clients[0].place, Some(Place { epoch: 17, offset: 3 }));
    }

    #[test]
    fn a_gap_covers_what_is_missing_at_its_place_only() {
        let mut books = books();
        message(&mut books, 0, 0);
        message(&mut books, 0, 3);
        books.note(Event::Gap { member: 0, cause: "trimmed" });
        message(&mut books, 0, 9);
        let client = &books.clients[0];
        assert_eq!((client.account.missing(), books.counts.covered, books.counts.delivered), (2, 5, 3));
        assert_eq!((books.counts.gaps["trimmed"], client.gaps), (1, 1));
        // What comes later after all is a message that was delivered out of place.
        message(&mut books, 0, 5);
        assert_eq!(books.counts.duplicated, 1);
    }

    #[test]
    fn a_client_is_live_once_it_has_what_was_published_before_it_was_ready() {
        let mut books = books();
        books.published[0] = 2;
        books.note(Event::Standing { member: 0, took: 1 });
        books.published[0] = 5;
        message(&mut books, 0, 0);
        assert_eq!((books.live, books.catching_up.count()), (0, 0));
        message(&mut books, 0, 1);
        assert_eq!((books.live, books.catching_up.count()), (1, 1));
        assert!(books.is_behind());
        let closed = || Lost::Closed(None);
        books.note(Event::Lost { member: 0, why: closed(), stood: true });
        assert_eq!((books.live, books.counts.connections_lost), (0, 1));
        assert!(books.failure.take().is_some() && books.lost.is_empty());
        books.tolerant = true;
        books.note(Event::Lost { member: 0, why: closed(), stood: false });
        assert!(books.failure.is_none() && books.lost == [0]);
    }
}

//! Many small rooms compared with a few big ones: the same connections, the same deliveries.
//!
//! Every client is in a few rooms with all others, and in as many rooms of its own. A wave is one delivery to
//! every client: one message to a big room, or one message to a small room of each client. Either way every
//! connection is written to once, so the difference is the cost of a room: its message comes from the broker,
//! is looked up, and is encoded for one member instead of all. With `--publish redis://…` messages come
//! directly from Redis, which is the cheapest source, and big rooms use it too.

use std::time::Instant;

use anyhow::{Context, ensure};

use crate::{
    cli::flow::CompareRooms,
    clock,
    dialect::{Seat, subscribe},
    flow::Lanes,
    payload::Shape,
    process::{self, Cpu, Memory, Server},
    publisher::Publisher,
    report::{
        Verdict,
        outputs::Outputs,
        rooms::{CompareRoomsReport, RoomMemory, ShapeRound},
    },
    room::Sender,
    stamp::{Finder, Stamp},
    stop::Stop,
    swarm::{Event, Swarm},
    target::Entrance,
    websocket::{self, Opcode},
};

/// Publications that are sent before the loop reads what has arrived.
const BATCH: usize = 256;

/// Runs the scenario and prints its report.
pub fn run(args: &CompareRooms) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.common)?;
    let stop = super::begin(&args.common)?;
    let each = args.rooms_per_client;
    super::check_several_rooms(&args.target)?;
    ensure!(args.burst <= each, "--burst: at most one message in each of the --rooms-per-client rooms");
    let all = args.connections.checked_mul(each).and_then(|rooms| rooms.checked_add(each));
    let target = args.target.resolve(all.context("so many rooms have no numbers")?)?;
    let server = Server::new(args.server_pid.clone());
    server.cpu()?;
    let Sender::Line(publisher) = Sender::connect(&target.via)? else {
        anyhow::bail!("--publish: publish to Redis or by HTTP, because one client cannot be in every room");
    };
    let mut report = CompareRoomsReport::new(args, &target.via.to_string());
    let outcome = measure(args, target.entrance, publisher, &server, &mut report, &stop);
    report.interrupted = stop.early_end(outcome)?;
    report.conclude(args);
    outputs.deliver(&report.document(), &report)?;
    Ok(Verdict::of(&report.expectations, report.interrupted.as_deref()))
}

/// Measures the rounds of both shapes; returns whether all were measured.
fn measure(
    args: &CompareRooms,
    entrance: Entrance,
    publisher: Publisher,
    server: &Server,
    report: &mut CompareRoomsReport,
    stop: &Stop,
) -> anyhow::Result<bool> {
    let mut test = Test::connect(args, entrance, publisher, stop)?;
    report.memory = Some(test.fill(server, stop)?);
    for number in 0..=args.rounds {
        for (small, rounds) in [(false, &mut report.big), (true, &mut report.small)] {
            if stop.is_set() {
                break;
            }
            let round = test.round(small, server, stop)?;
            // The first round of each shape warms up.
            if number > 0 {
                rounds.push(round);
            }
        }
    }
    report.counts = test.books.lanes.counts;
    report.counts.expected = test.expected;
    report.counts.missing = test.expected.saturating_sub(report.counts.delivered);
    report.first_loss = test.books.first_loss;
    test.swarm.close();
    Ok(report.complete() == args.rounds as usize)
}

struct Test<'a> {
    args: &'a CompareRooms,
    entrance: Entrance,
    publisher: Publisher,
    swarm: Swarm,
    books: Books,
    run: u32,
    /// The next sequence of every room.
    sequences: Vec<u64>,
    expected: u64,
    /// Which of each client's rooms the next wave uses.
    turn: u32,
}

struct Books {
    finder: Finder,
    entrance: Entrance,
    each: u32,
    /// One for each pair of client and room: its big rooms, then its own.
    lanes: Lanes,
    joined: u64,
    first_loss: Option<String>,
}

impl<'a> Test<'a> {
    /// Connects all clients without joining a room.
    fn connect(
        args: &'a CompareRooms,
        entrance: Entrance,
        publisher: Publisher,
        stop: &Stop,
    ) -> anyhow::Result<Self> {
        process::allow_descriptors(args.connections as usize)?;
        let run = process::run_id();
        let mut books = Books {
            finder: Finder::new(run, Shape::dots(args.size)),
            entrance: entrance.clone(),
            each: args.rooms_per_client,
            lanes: Lanes::new(2 * args.connections * args.rooms_per_client),
            joined: 0,
            first_loss: None,
        };
        let mut swarm = Swarm::new()?;
        let seat = |member: usize| {
            let user = u32::try_from(member).unwrap_or(0);
            Seat { user, room: 0, rooms: 1, stays: false, since: None, listens: false }
        };
        swarm.grow(&entrance, args.connections as usize, seat, stop, |event| books.note(event))?;
        let rooms = (args.connections + 1) * args.rooms_per_client;
        let sequences = vec![0; rooms as usize];
        Ok(Self { args, entrance, publisher, swarm, books, run, sequences, expected: 0, turn: 0 })
    }

    /// Lets all clients join the big rooms, then their own, and measures memory in between.
    fn fill(&mut self, server: &Server, stop: &Stop) -> anyhow::Result<RoomMemory> {
        let (connected, first) = self.settle(server, stop)?;
        self.join(false, stop)?;
        let (in_big, second) = self.settle(server, stop)?;
        self.join(true, stop)?;
        let (in_small, third) = self.settle(server, stop)?;
        Ok(RoomMemory { connected, in_big, in_small, settled: first && second && third })
    }

    fn settle(&mut self, server: &Server, stop: &Stop) -> anyhow::Result<(Memory, bool)> {
        let Self { swarm, books, .. } = self;
        super::settle(stop, |wait| {
            let until = Instant::now() + wait;
            while let Some(rest) = until.checked_duration_since(Instant::now()) {
                swarm.drain(rest, |event| books.note(event))?;
            }
            server.memory()
        })
    }

    /// The first of a client's rooms, of either kind.
    fn first_room(&self, client: u32, small: bool) -> u32 {
        if small { (client + 1) * self.args.rooms_per_client } else { 0 }
    }

    fn join(&mut self, small: bool, stop: &Stop) -> anyhow::Result<()> {
        let (each, clients) = (self.args.rooms_per_client, self.args.connections);
        let before = self.books.joined;
        for client in 0..clients {
            let first = self.first_room(client, small);
            let words: anyhow::Result<Vec<String>> =
                (first..first + each).map(|room| subscribe(&self.entrance, room, None)).collect();
            let mut frame = Vec::new();
            websocket::write_masked(&mut frame, Opcode::Text, &[words?.join("\n").as_bytes()], 1);
            let said = self.swarm.say(client as usize, &frame);
            ensure!(said.is_ok(), "client {} cannot subscribe: {said:?}", client + 1);
            // Reading the answers makes room for more commands.
            let joined = before + u64::from(client.saturating_sub(256)) * u64::from(each);
            self.until(stop, |books| books.joined >= joined).context("subscribing")?;
        }
        let all = before + u64::from(clients) * u64::from(each);
        self.until(stop, |books| books.joined >= all).context("subscribing")
    }

    fn until(&mut self, stop: &Stop, holds: impl Fn(&Books) -> bool) -> anyhow::Result<()> {
        let Self { swarm, books, args, .. } = self;
        let mut progress = (books.joined, Instant::now());
        while !holds(books) {
            swarm.drain(super::GLANCE, |event| books.note(event))?;
            if let Some(why) = &books.first_loss {
                anyhow::bail!("{why}");
            }
            if progress.0 != books.joined {
                progress = (books.joined, Instant::now());
            }
            ensure!(progress.1.elapsed() < args.patience.0 && !stop.is_set(), "no answers");
        }
        Ok(())
    }

    /// Publishes waves and measures until the last one has been received.
    fn round(&mut self, small: bool, server: &Server, stop: &Stop) -> anyhow::Result<ShapeRound> {
        let before = (server.cpu()?, Cpu::of_self()?, self.books.lanes.counts.delivered);
        let begun = Instant::now();
        let (mut waves, mut complete) = (0, true);
        while waves < self.args.messages && complete && !stop.is_set() {
            let burst = self.args.burst.min(self.args.messages - waves);
            complete = self.wave(small, burst)?;
            waves += burst;
        }
        let seconds = begun.elapsed().as_secs_f64();
        let delivered = self.books.lanes.counts.delivered - before.2;
        #[expect(clippy::cast_precision_loss, reason = "counts below 2^53")]
        let deliveries = delivered as f64;
        let per_million = |cpu: Cpu| (delivered > 0).then(|| cpu.scaled(1e6 / deliveries));
        let used = server.cpu()?.zip(before.0).map(|(now, before)| now.since(before));
        Ok(ShapeRound {
            delivered,
            seconds,
            per_second: deliveries / seconds,
            complete: complete && waves == self.args.messages,
            server_cpu: used.and_then(per_million),
            tester_cpu: per_million(Cpu::of_self()?.since(before.1)),
        })
    }

    /// One delivery, or a burst of them, to every client; `false` if they do not arrive.
    fn wave(&mut self, small: bool, burst: u32) -> anyhow::Result<bool> {
        let each = self.args.rooms_per_client;
        let turns: Vec<u32> = (0..burst).map(|number| (self.turn + number) % each).collect();
        self.turn = (self.turn + burst) % each;
        let clients = if small { self.args.connections } else { 1 };
        self.expected += u64::from(burst) * u64::from(self.args.connections);
        let (mut payloads, mut rooms) = (Vec::new(), Vec::new());
        for client in 0..clients {
            let first = self.first_room(client, small);
            for turn in &turns {
                let room = first + turn;
                let sequence = self.sequences.get_mut(room as usize).context("a room has a number")?;
                let stamp =
                    Stamp { run: self.run, room, publisher: 0, sequence: *sequence, sent: clock::now() };
                *sequence += 1;
                stamp.write(&mut payloads, Shape::dots(self.args.size));
                rooms.push(room);
            }
            if rooms.len() >= BATCH || client + 1 == clients {
                self.publisher.publish(&payloads, self.args.size, &rooms)?;
                payloads.clear();
                rooms.clear();
                let Self { swarm, books, .. } = &mut *self;
                swarm.drain(std::time::Duration::ZERO, |event| books.note(event))?;
            }
        }
        let mut progress = (0, Instant::now());
        while self.books.lanes.counts.delivered < self.expected {
            let Self { swarm, books, .. } = &mut *self;
            swarm.drain(super::GLANCE, |event| books.note(event))?;
            let delivered = books.lanes.counts.delivered;
            if delivered != progress.0 {
                progress = (delivered, Instant::now());
            } else if progress.1.elapsed() > self.args.patience.0 {
                self.publisher.listen()?;
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Books {
    fn note(&mut self, event: Event<'_>) {
        match event {
            Event::Standing { .. }
            | Event::Accepted
            | Event::Left { .. }
            | Event::Position { .. }
            | Event::Gap { .. } => {}
            Event::Joined { .. } => self.joined += 1,
            Event::Message { member, payload, .. } => {
                let stamp = self.finder.find(self.entrance.dialect, payload);
                let member = u32::try_from(member).unwrap_or(u32::MAX);
                let mark = stamp.and_then(|stamp| Some((self.lane(member, stamp.room)?, stamp.sequence)));
                self.lanes.record(mark);
            }
            Event::Refused { why } => {
                self.first_loss.get_or_insert(why);
            }
            Event::Lost { member, why, .. } => {
                self.lanes.counts.members_lost += 1;
                self.first_loss.get_or_insert_with(|| format!("client {}: {why}", member + 1));
            }
        }
    }

    /// The account of `member` in `room`, if it is in it.
    fn lane(&self, member: u32, room: u32) -> Option<u32> {
        let own = (member + 1) * self.each;
        let at = if room < self.each { room } else { room.checked_sub(own)? + self.each };
        (at < 2 * self.each).then_some(2 * self.each * member + at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dialect::Dialect, target::Address, token::Credentials};

    #[test]
    fn a_client_has_an_account_for_each_room_it_is_in() {
        let address = Address {
            socket: ([127, 0, 0, 1], 1).into(),
            tls: None,
            authority: String::new(),
            path_and_query: String::new(),
            basic: None,
        };
        let entrance = Entrance {
            address,
            dialect: Dialect::Centrifuge,
            channel: String::new(),
            credentials: Credentials::None,
            source_addresses: 0,
            deflate: false,
        };
        let finder = Finder::new(1, Shape::dots(64));
        let books = Books { finder, entrance, each: 2, lanes: Lanes::new(12), joined: 0, first_loss: None };
        let of = |member| (0..9).map(|room| books.lane(member, room)).collect::<Vec<_>>();
        let none = None;
        assert_eq!(of(0), [Some(0), Some(1), Some(2), Some(3), none, none, none, none, none]);
        assert_eq!(of(2), [Some(8), Some(9), none, none, none, none, Some(10), Some(11), none]);
    }
}

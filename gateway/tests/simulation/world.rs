//! Nodes, clients and the broker, one step at a time.

mod checks;
mod clients;
mod rest;

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
    sync::{Arc, Mutex},
    time::Duration,
};

use broker_bridge::{BrokerError, Cursor, Data, Publication, Retention, RoomName};
use tidegate::clock::{Tick, Time};

use crate::{
    broker::{self, Bus, SharedBus, lock},
    client::{Client, Kind},
    node::{Node, STEP, Shard, settings},
    random::Random,
    server::Restart,
};

const ROOMS: [&str; 8] = ["one", "two", "three", "four", "drop", "last", "kept", "short"];
/// The rooms with a history, and how many publications it keeps.
const HISTORIES: [(&str, u32); 2] = [("kept", 200), ("short", 5)];
/// Small queues, so that they overflow.
const SETTINGS: &str = r#"
limits.outbound = "4KiB"
limits.message_size = "2KiB"
limits.rooms_per_session = 700
compression.threshold = "64B"
heartbeat.interval = "5s"
heartbeat.timeout = "10s"
broker.subscribe_timeout = "3s"

[rooms."drop"]
overflow = "drop_oldest"

[rooms."last"]
overflow = "latest"
priority = true

[rooms."kept"]
history.size = 200

[rooms."short"]
history.size = 5
"#;
/// How many rooms there are for clients that are in more than they can leave at once.
const MANY: usize = 600;
/// Other settings, to change to.
const OTHER_SETTINGS: &str = r#"
limits.outbound = "8KiB"
limits.message_size = "2KiB"
limits.commands = "200/s burst 100"
limits.rooms_per_session = 700
heartbeat.interval = "3s"
heartbeat.timeout = "7s"
broker.subscribe_timeout = "2s"
public.max_session_age = "2m"

[rooms."one"]
overflow = "drop_oldest"

[rooms."drop"]
priority = true

[rooms."kept"]
history.size = 200

[rooms."short"]
history.size = 5
"#;
/// The most bytes that a connection may hold beyond its queue: an incomplete message, a frame that is written
/// whole, what TLS holds, and publications that wait for the broker.
const BESIDES_QUEUE: usize = BESIDES_BOUND + 2 * 2048 + 2 * 8192 + 64 * (2048 + 256);
/// The most that a queue may hold beyond its bound: an empty one takes a frame of any size, and the final
/// message is always taken.
const BESIDES_BOUND: usize = 4 * 1024;

/// A client and what the checks know of it.
struct Peer {
    client: Client,
    /// Whether its request has been answered, and, if it has to, it has connected.
    is_open: bool,
    is_closed: bool,
    /// It reads nothing at the moment.
    is_stalled: bool,
    /// It has sent junk, and may be told anything.
    is_wild: bool,
    /// The rooms that its request named.
    asked: Vec<RoomName>,
    rooms: BTreeMap<RoomName, Membership>,
    /// Where its own publications are in the log.
    number: u64,
    /// Whether it has shown its token, and knows that it was accepted.
    has_begun: bool,
    /// When its token expires (Unix time, in seconds).
    expires: u64,
    /// Since when it has, and for how many ticks nothing has been on its way to the client.
    expired: Option<(Tick, u32)>,
    /// What it knew of its room when it was here the last time.
    came_back_with: Option<Membership>,
}

/// Somebody who has gone and may come back.
struct Absent {
    kind: Kind,
    room: RoomName,
    known: Membership,
}

/// What a client knows of a room.
#[derive(Clone, Debug, Default)]
struct Membership {
    is_member: bool,
    /// The position in the room's log from which everything has to come. After a join, earlier publications
    /// may come as well, even with holes: what was on its way to a node whose last member had left.
    next: usize,
    /// The first position that has not been seen by this client in this room, ever.
    unseen: usize,
    /// Whether it has been told of a gap since the last publication.
    has_gap: bool,
    /// The position that it was told last.
    cursor: Option<Cursor>,
    /// It has come with a position that the room never had, and must be told of a gap before anything else.
    is_lost: bool,
    /// What it has received that is in no history, although the room has one.
    unrecorded: BTreeSet<u64>,
}

/// Everything.
pub struct World {
    random: Random,
    time: Time,
    now: Tick,
    bus: SharedBus,
    nodes: Vec<Node>,
    peers: Vec<Peer>,
    /// Where each publication is: its room's log and its position there, and its publisher.
    places: BTreeMap<u64, (RoomName, usize)>,
    /// How much of each room's log has been looked at.
    known: BTreeMap<RoomName, usize>,
    /// Who published it, by number.
    publishers: BTreeMap<u64, u64>,
    /// The last publication of each publisher in each room.
    last_of: BTreeMap<(u64, RoomName), u64>,
    absent: Vec<Absent>,
    /// Whether there are rooms with a history.
    has_histories: bool,
    /// Whether the server that keeps it fails often.
    is_stormy: bool,
    /// Whether nothing fails for which a room with a history has to tell a gap.
    is_exact: bool,
    next_number: u64,
    next_peer: u64,
    most_peers: usize,
    /// How many gaps each client has been told in each room, while they are counted.
    told: Option<BTreeMap<(u64, RoomName), u64>>,
    /// Clients do nothing wrong any more.
    is_calm: bool,
    /// The client whose life is printed (`SIMULATION_TRACE`).
    traced: Option<u64>,
    pub counts: Counts,
}

/// What has happened, to show that the simulation does what it is for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub steps: u64,
    pub ticks: u64,
    pub sessions: u64,
    pub publications: u64,
    pub deliveries: u64,
    pub gaps: u64,
    pub closed: u64,
    pub interruptions: u64,
    pub restarts: u64,
    pub returns: u64,
}

impl Counts {
    pub fn plus(self, other: Self) -> Self {
        Self {
            steps: self.steps + other.steps,
            ticks: self.ticks + other.ticks,
            sessions: self.sessions + other.sessions,
            publications: self.publications + other.publications,
            deliveries: self.deliveries + other.deliveries,
            gaps: self.gaps + other.gaps,
            closed: self.closed + other.closed,
            interruptions: self.interruptions + other.interruptions,
            restarts: self.restarts + other.restarts,
            returns: self.returns + other.returns,
        }
    }
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut world = Self {
            random: Random::new(seed),
            time: Time::manual(),
            now: Tick::default(),
            bus: Arc::new(Mutex::new(Bus::default())),
            nodes: Vec::new(),
            peers: Vec::new(),
            places: BTreeMap::new(),
            known: BTreeMap::new(),
            publishers: BTreeMap::new(),
            last_of: BTreeMap::new(),
            absent: Vec::new(),
            has_histories: true,
            is_stormy: false,
            is_exact: false,
            next_number: 1,
            next_peer: 1,
            most_peers: 40,
            told: None,
            is_calm: false,
            traced: crate::from_env("SIMULATION_TRACE"),
            counts: Counts::default(),
        };
        world.is_exact = world.random.one_in(3);
        world.has_histories = !world.random.one_in(4);
        world.is_stormy = world.has_histories && world.random.one_in(4);
        let is_crowded = world.random.one_in(8);
        let is_alone = is_crowded && world.random.one_in(2);
        for _ in 0..if is_alone { 1 } else { world.random.between(1, 3) } {
            let shards = if is_alone { 1 } else { world.random.between(1, 3) };
            world.add_node(shards);
        }
        if is_crowded {
            world.add_crowd();
        }
        world
    }

    /// More clients than a few slices serve, most of them in one room.
    fn add_crowd(&mut self) {
        self.most_peers = 1200;
        let first = RoomName::new(ROOMS[0]).unwrap();
        for _ in 0..self.random.between(700, 1100) {
            if self.random.one_in(4) {
                self.open();
                continue;
            }
            let kind = Kind::Plain { echo: true, close_on_gap: self.random.one_in(2) };
            let node = self.random.below(self.nodes.len());
            let shard = self.random.below(self.nodes[node].shards.len());
            self.open_in(node, shard, kind, vec![first.clone()]);
        }
    }

    fn add_node(&mut self, shards: usize) {
        let node = Node::new(&self.bus, SETTINGS, shards, &self.time, self.now, &mut self.random);
        if self.random.one_in(3) {
            node.limit_memory(self.random.between(8, 64) * 1024);
        }
        self.nodes.push(node);
    }

    /// Runs so many steps, lets everything come to rest, and closes everything.
    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step();
        }
        self.come_to_rest();
        self.conclude();
        self.check_complete();
        self.check_one_gap();
        self.check_calm();
        self.check_slices();
        self.close_all();
    }

    pub fn step(&mut self) {
        self.counts.steps += 1;
        match self.random.below(1000) {
            0..350 => self.node_works(),
            350..550 => self.broker_works(),
            550..800 => self.clients_work(),
            800..850 => self.client_acts(),
            850..880 => self.publish_from_backend(),
            880..900 => self.open(),
            900..910 => self.come_back(),
            910..915 if self.is_stormy => self.server_fails(),
            910..960 => self.tick(),
            960..985 => self.client_misbehaves(),
            985 | 986 if self.has_histories => self.server_fails(),
            985..993 => self.broker_fails(),
            993..997 => self.reload(),
            997 => self.drain_or_stop(),
            998 => match self.random.below(3) {
                0 => {
                    let seconds = self.random.between(2, 600) as u64;
                    self.pause(Duration::from_secs(seconds));
                }
                _ => self.jump(),
            },
            _ => self.burst(),
        }
        self.learn();
        self.check_bounds();
    }

    // ---- nodes ----

    fn node_works(&mut self) {
        let node = self.random.below(self.nodes.len());
        let shard = self.random.below(self.nodes[node].shards.len());
        for _ in 0..self.pace() {
            self.nodes[node].shards[shard].step(self.now, &mut self.random);
        }
        if self.random.one_in(2) {
            self.nodes[node].repair(&mut self.random);
        }
    }

    /// How much nodes and clients do at a time, so that most of a crowd keeps up.
    fn pace(&self) -> usize {
        self.peers.len().div_ceil(50).max(1)
    }

    fn tick(&mut self) {
        self.counts.ticks += 1;
        // Some come late.
        let steps =
            if !self.is_calm && self.random.one_in(50) { self.random.between(2, 10) as u32 } else { 1 };
        self.now = Tick(self.now.0 + steps);
        self.time.advance(STEP * steps);
        for index in 0..self.nodes.len() {
            let node = &mut self.nodes[index];
            for shard in &mut node.shards {
                shard.tick(self.now, &mut self.random);
            }
            if self.counts.ticks.is_multiple_of(3) {
                node.hub.forget_rooms();
                node.settings.limiters().sweep();
            }
        }
        for index in 0..self.nodes.len() {
            let node = &self.nodes[index];
            if node.is_draining && node.shards.iter().all(Shard::is_drained) {
                self.nodes[index].check_empty(false);
                self.replace_node(index);
            }
        }
        self.check_expired();
    }

    /// The nodes' machine is suspended: time goes on, but not for the shards.
    fn pause(&mut self, time: Duration) {
        self.time.advance(time);
        for shard in self.nodes.iter_mut().flat_map(|node| &mut node.shards) {
            shard.resume(self.now);
        }
    }

    /// Seconds pass in which clients do little.
    fn jump(&mut self) {
        for _ in 0..self.random.between(10, 120) {
            self.tick();
            for _ in 0..8 {
                self.node_works();
                self.clients_work();
                self.broker_works();
            }
            self.learn();
        }
    }

    /// A node is gone: another takes its place.
    fn replace_node(&mut self, index: usize) {
        lock(&self.bus).remove(self.nodes[index].link);
        let shards = self.random.between(1, 3);
        self.nodes[index] = Node::new(&self.bus, SETTINGS, shards, &self.time, self.now, &mut self.random);
    }

    fn reload(&mut self) {
        let node = self.random.below(self.nodes.len());
        let text = if self.random.one_in(2) { SETTINGS } else { OTHER_SETTINGS };
        self.nodes[node].settings.replace(settings(text));
    }

    fn drain_or_stop(&mut self) {
        let node = self.random.below(self.nodes.len());
        if self.random.one_in(4) {
            self.nodes[node].stop(self.now, &mut self.random);
            self.replace_node(node);
        } else if !self.nodes[node].is_draining {
            let window = Duration::from_millis(self.random.below(5_000) as u64);
            self.nodes[node].drain(window);
        }
    }

    // ---- the broker ----

    fn broker_works(&mut self) {
        let link = self.nodes[self.random.below(self.nodes.len())].link;
        let refuse = self.random.one_in(40);
        match self.random.below(4) {
            0 => drop(lock(&self.bus).accept_next(link, refuse)),
            1 if self.random.one_in(10) => lock(&self.bus).confirm_all(link),
            1 => drop(lock(&self.bus).confirm_next(link, self.random.below(8), refuse)),
            2 if self.random.one_in(2) => self.server_answers(link),
            _ => {
                for _ in 0..self.random.between(1, 6) {
                    broker::deliver(&self.bus, link);
                }
            }
        }
    }

    /// What a node has asked is answered, at the server or at the node.
    fn server_answers(&mut self, link: usize) {
        let refusal = match self.random.below(40) {
            0 => Some(BrokerError::Unavailable),
            1 if !self.is_exact => Some(BrokerError::NotNow("busy".into())),
            2 if !self.is_exact => Some(BrokerError::Refused("no".into())),
            _ => None,
        };
        let mut bus = lock(&self.bus);
        bus.answer_next(link, self.random.below(8), refusal);
        if self.random.one_in(2) {
            bus.pass_answer(link, self.random.below(8));
        }
    }

    fn broker_fails(&mut self) {
        let link = self.nodes[self.random.below(self.nodes.len())].link;
        let accepted = self.random.below(3);
        let mut bus = lock(&self.bus);
        if !bus.links[link].is_up {
            return bus.restore(link);
        }
        self.counts.interruptions += 1;
        bus.interrupt(link, accepted);
        if self.random.one_in(2) {
            bus.fail_questions(link);
        }
    }

    /// Something happens to the histories of rooms.
    fn server_fails(&mut self) {
        let (room, _) = HISTORIES[self.random.below(HISTORIES.len())];
        let room = RoomName::new(room).unwrap();
        let mut bus = lock(&self.bus);
        match self.random.below(8) {
            0 => bus.server.relocate(&room),
            1..4 => bus.server.save(),
            _ if self.is_exact => {}
            4 => bus.server.delete(&room),
            5 => bus.server.clear(&room),
            _ => {
                let restarts = [Restart::Everything, Restart::Snapshot, Restart::Nothing];
                self.counts.restarts += 1;
                bus.restart(restarts[self.random.below(3)]);
            }
        }
    }

    fn publish_from_backend(&mut self) {
        let room = self.any_room();
        let data = self.data(0);
        self.accept(&room, data);
    }

    /// The broker accepts a backend's publication.
    fn accept(&mut self, room: &RoomName, data: String) {
        // Some backends do not know that a room has a history.
        let history = history_of(room).filter(|_| self.is_exact || self.is_calm || !self.random.one_in(30));
        lock(&self.bus).accept(room, Publication::new(Data::text(data)), history);
    }

    /// A backend publishes faster than anybody reads.
    fn burst(&mut self) {
        let room = self.any_room();
        if self.is_exact && history_of(&room).is_some() {
            return;
        }
        for _ in 0..self.random.between(50, 600) {
            let data = self.data(0);
            self.accept(&room, data);
            if self.random.one_in(2) {
                let node = self.random.below(self.nodes.len());
                broker::deliver(&self.bus, self.nodes[node].link);
            }
        }
    }

    fn any_room(&mut self) -> RoomName {
        if self.random.one_in(20) {
            return many(self.random.below(MANY));
        }
        let is_crowded = self.most_peers > 40 && self.random.one_in(2);
        let room = if is_crowded {
            0
        } else {
            self.random.below(if self.has_histories { ROOMS.len() } else { ROOMS.len() - HISTORIES.len() })
        };
        RoomName::new(ROOMS[room]).unwrap()
    }

    /// The data of a new publication of this publisher.
    fn data(&mut self, publisher: u64) -> String {
        let number = self.next_number;
        self.next_number += 1;
        self.publishers.insert(number, publisher);
        let length = match self.random.below(10) {
            0 => self.random.below(1500),
            _ => self.random.below(60),
        };
        format!("#{number}#{}", "x".repeat(length))
    }
}

/// How much of a room's publications is kept.
fn history_of(room: &RoomName) -> Option<Retention> {
    let (_, size) = HISTORIES.iter().find(|(name, _)| *name == room.as_str())?;
    Some(Retention { size: NonZeroU32::new(*size).unwrap(), ..Retention::default() })
}

/// One of many rooms.
fn many(number: usize) -> RoomName {
    RoomName::new(&format!("many-{number}")).unwrap()
}

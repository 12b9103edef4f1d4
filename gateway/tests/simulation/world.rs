//! Nodes, clients and the broker, one step at a time, and what must be true after each.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use broker_bridge::{Data, Publication, RoomName};
use http::Request;
use tidegate::{
    auth::{Grant, Identity, Subject, Token, mint},
    clock::{Tick, Time},
    framing::{Framing, Transport},
    protocol::{Ask, On, TABLE},
    session::Session,
    shard::Start,
};

use crate::{
    broker::{self, Bus, SharedBus, lock},
    client::{Client, Heard, Kind, number},
    node::{Carrier, Node, SECRET, STEP, settings},
    random::Random,
    transport::Pipe,
};

const ROOMS: [&str; 6] = ["one", "two", "three", "four", "drop", "last"];
/// Small queues, so that they overflow.
const SETTINGS: &str = r#"
limits.outbound = "4KiB"
limits.message_size = "2KiB"
heartbeat.interval = "5s"
heartbeat.timeout = "10s"
broker.subscribe_timeout = "3s"

[rooms."drop"]
overflow = "drop_oldest"

[rooms."last"]
overflow = "latest"
priority = true
"#;
/// Other settings, to change to.
const OTHER_SETTINGS: &str = r#"
limits.outbound = "8KiB"
limits.message_size = "2KiB"
limits.commands = "200/s burst 100"
heartbeat.interval = "3s"
heartbeat.timeout = "7s"
broker.subscribe_timeout = "2s"
public.max_session_age = "2m"

[rooms."one"]
overflow = "drop_oldest"

[rooms."drop"]
priority = true
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
}

/// What a client knows of a room.
#[derive(Clone, Debug)]
struct Membership {
    is_member: bool,
    /// The position in the room's log from which everything has to come. After a join, earlier publications
    /// may come as well, even with holes: what was on its way to a node whose last member had left.
    next: usize,
    /// The first position that has not been seen by this client in this room, ever.
    unseen: usize,
    /// Whether it has been told of a gap since the last publication.
    has_gap: bool,
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
            next_number: 1,
            next_peer: 1,
            most_peers: 40,
            told: None,
            is_calm: false,
            traced: crate::from_env("SIMULATION_TRACE"),
            counts: Counts::default(),
        };
        for _ in 0..world.random.between(1, 3) {
            world.add_node();
        }
        if world.random.one_in(8) {
            world.add_crowd();
        }
        world
    }

    /// More clients than one slice serves, most of them in one room.
    fn add_crowd(&mut self) {
        self.most_peers = 700;
        for _ in 0..self.random.between(300, 600) {
            self.open();
        }
    }

    fn add_node(&mut self) {
        let shards = self.random.between(1, 3);
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
        self.check_complete();
        self.check_one_gap();
        self.check_calm();
        self.close_all();
    }

    pub fn step(&mut self) {
        self.counts.steps += 1;
        match self.random.below(1000) {
            0..350 => self.node_works(),
            350..550 => self.broker_works(),
            550..800 => self.client_works(),
            800..850 => self.client_acts(),
            850..880 => self.publish_from_backend(),
            880..910 => self.open(),
            910..960 => self.tick(),
            960..985 => self.client_misbehaves(),
            985..993 => self.broker_fails(),
            993..997 => self.reload(),
            997..998 => self.drain(),
            998..999 => self.jump(),
            _ => self.burst(),
        }
        self.learn();
        self.check_bounds();
    }

    // ---- nodes ----

    fn node_works(&mut self) {
        let node = self.random.below(self.nodes.len());
        let shard = self.random.below(self.nodes[node].shards.len());
        self.nodes[node].shards[shard].step(self.now, &mut self.random);
    }

    fn tick(&mut self) {
        self.counts.ticks += 1;
        self.now = Tick(self.now.0 + 1);
        self.time.advance(STEP);
        for index in 0..self.nodes.len() {
            let node = &mut self.nodes[index];
            for shard in &mut node.shards {
                shard.tick(self.now);
            }
            if self.now.0.is_multiple_of(3) {
                node.hub.forget_rooms();
                node.settings.limiters().sweep();
            }
        }
        for index in 0..self.nodes.len() {
            let node = &self.nodes[index];
            if node.is_draining && node.shards.iter().all(crate::node::Shard::is_drained) {
                self.replace_node(index);
            }
        }
    }

    /// Seconds pass in which clients do little.
    fn jump(&mut self) {
        for _ in 0..self.random.between(10, 120) {
            self.tick();
            for _ in 0..8 {
                self.node_works();
                self.client_works();
                self.broker_works();
            }
            self.learn();
        }
    }

    /// A node has drained: another takes its place.
    fn replace_node(&mut self, index: usize) {
        self.check_empty(index);
        lock(&self.bus).remove(self.nodes[index].link);
        let shards = self.random.between(1, 3);
        self.nodes[index] = Node::new(&self.bus, SETTINGS, shards, &self.time, self.now, &mut self.random);
    }

    fn reload(&mut self) {
        let node = self.random.below(self.nodes.len());
        let text = if self.random.one_in(2) { SETTINGS } else { OTHER_SETTINGS };
        self.nodes[node].settings.replace(settings(text));
    }

    fn drain(&mut self) {
        let node = self.random.below(self.nodes.len());
        if !self.nodes[node].is_draining {
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
            1 => drop(lock(&self.bus).confirm_next(link, self.random.below(8), refuse)),
            _ => {
                for _ in 0..self.random.between(1, 6) {
                    broker::deliver(&self.bus, link);
                }
            }
        }
    }

    fn broker_fails(&mut self) {
        let link = self.nodes[self.random.below(self.nodes.len())].link;
        let accepted = self.random.below(3);
        let mut bus = lock(&self.bus);
        if bus.links[link].is_up {
            self.counts.interruptions += 1;
            bus.interrupt(link, accepted);
        } else {
            bus.restore(link);
        }
    }

    fn publish_from_backend(&mut self) {
        let room = self.any_room();
        let data = self.data(0);
        lock(&self.bus).accept(&room, Publication::new(Data::text(data)));
    }

    /// A backend publishes faster than anybody reads.
    fn burst(&mut self) {
        let room = self.any_room();
        for _ in 0..self.random.between(50, 600) {
            let data = self.data(0);
            lock(&self.bus).accept(&room, Publication::new(Data::text(data)));
            if self.random.one_in(2) {
                let node = self.random.below(self.nodes.len());
                broker::deliver(&self.bus, self.nodes[node].link);
            }
        }
    }

    fn any_room(&mut self) -> RoomName {
        let is_crowded = self.most_peers > 40 && self.random.one_in(2);
        let room = if is_crowded { 0 } else { self.random.below(ROOMS.len()) };
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

    // ---- clients ----

    fn open(&mut self) {
        if self.peers.len() >= self.most_peers {
            return;
        }
        let node = self.random.below(self.nodes.len());
        if self.nodes[node].is_draining {
            return;
        }
        let shard = self.random.below(self.nodes[node].shards.len());
        let kind = Kind::any(&mut self.random);
        self.open_at(node, shard, kind);
    }

    fn open_at(&mut self, node: usize, shard: usize, kind: Kind) {
        let mut rooms: Vec<RoomName> = Vec::new();
        let most = kind.rooms();
        let wanted = if most > 1 { self.random.between(2, most) } else { most };
        while rooms.len() < wanted {
            let room = self.any_room();
            if !rooms.contains(&room) {
                rooms.push(room);
            }
        }
        let number = self.next_peer;
        self.next_peer += 1;
        let capacity = self.random.between(64, 4096);
        let pipe = Pipe::new(capacity);
        let first = rooms.first().cloned().unwrap_or_else(|| RoomName::new(ROOMS[0]).unwrap());
        let mut client = Client::new(kind, &pipe, first, &mut self.random);
        let start = self.start(node, kind, &rooms, number);
        let tls = self.random.one_in(2);
        let carrier = if kind.is_web_socket() { Carrier::Socket { tls } } else { Carrier::Response };
        if kind == Kind::Centrifuge && (self.is_calm || !self.random.one_in(20)) {
            client.connect(self.token(number).expose());
        }
        self.nodes[node].shards[shard].open(start, &rooms, carrier, &pipe);
        self.counts.sessions += 1;
        self.peers.push(Peer {
            client,
            is_open: false,
            is_closed: false,
            is_stalled: false,
            is_wild: false,
            asked: rooms,
            rooms: BTreeMap::new(),
            number,
        });
    }

    /// A token for any room. Some expire soon.
    fn token(&mut self, number: u64) -> Token {
        let subject = Subject::new(&format!("user-{}", number % 7)).unwrap();
        let grants: [Grant; 1] = ["*=subscribe,publish".parse().unwrap()];
        let ttl = Duration::from_secs(if !self.is_calm && self.random.one_in(4) { 20 } else { 100_000 });
        let now = self.time.unix().into();
        mint::mint(&SECRET, &subject, &grants, ttl, now).unwrap()
    }

    fn start(&mut self, node: usize, kind: Kind, rooms: &[RoomName], number: u64) -> Start {
        let (name, transport, query) = kind.request();
        let endpoint = TABLE.iter().find(|endpoint| endpoint.name.as_str() == name).unwrap();
        let open = endpoint.routes.iter().find_map(|route| match route.on {
            On::WebSocket { open, .. } if transport == Transport::WebSocket => Some(open),
            On::Stream { open, .. } if transport == Transport::Body => Some(open),
            _ => None,
        });
        let query: Vec<_> = rooms
            .iter()
            .map(|room| format!("room={room}"))
            .chain([query])
            .filter(|part| !part.is_empty())
            .collect();
        let request = Request::get(format!("/?{}", query.join("&"))).body(()).unwrap();
        let settings = self.nodes[node].settings.load();
        let room = (rooms.len() == 1).then(|| rooms[0].clone());
        let ask = Ask { request: &request.into_parts().0, settings: &settings, room };
        let opening = open.unwrap()(&ask).unwrap();
        let id = self.nodes[node].ids.next();
        let protocol = (opening.protocol)();
        let framing = Framing::on(transport);
        let session = if opening.signs_in_later {
            Session::to_begin(id, None, protocol, framing)
        } else {
            let token = self.token(number);
            let now = self.time.unix().into();
            let identity: Identity = settings.authenticator.verify(&token, now).unwrap();
            Session::new(id, Arc::new(identity), protocol, framing)
        };
        Start { session, name: endpoint.name, deflate: None, permit: None }
    }

    fn any_peer(&mut self) -> Option<usize> {
        (!self.peers.is_empty()).then(|| self.random.below(self.peers.len()))
    }

    /// A client reads some of what has come.
    fn client_works(&mut self) {
        let Some(index) = self.any_peer() else { return };
        if self.peers[index].is_stalled {
            return;
        }
        let most = match self.random.below(3) {
            0 => self.random.between(1, 30),
            _ => 4096,
        };
        self.read(index, most);
    }

    fn read(&mut self, index: usize, most: usize) {
        self.note_admission(index);
        let heard = self.peers[index].client.read(most);
        for one in heard {
            self.hear(index, one);
        }
        let peer = &mut self.peers[index];
        let is_over = {
            let pipe = peer.client.pipe.borrow();
            (pipe.is_closed || pipe.node_ended || pipe.is_reset)
                && (pipe.to_client.is_empty() || pipe.is_reset)
        };
        if is_over {
            peer.client.pipe.borrow_mut().client_ended = true;
            self.counts.closed += 1;
            self.peers.swap_remove(index);
        }
    }

    /// The answer to its request has reached a client: it gets everything from now on.
    fn note_admission(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        if peer.is_open || !peer.client.pipe.borrow().is_answered {
            return;
        }
        peer.is_open = true;
        for room in peer.asked.clone() {
            self.join(index, room);
        }
    }

    fn join(&mut self, index: usize, room: RoomName) {
        let next = self.known.get(&room).copied().unwrap_or(0);
        let peer = &mut self.peers[index];
        let unseen = peer.rooms.get(&room).map_or(0, |known| known.unseen);
        let fresh = Membership { is_member: true, next, unseen, has_gap: false };
        peer.rooms.insert(room, fresh);
    }

    /// A client does what clients do.
    fn client_acts(&mut self) {
        let Some(index) = self.any_peer() else { return };
        if !self.peers[index].is_open || self.peers[index].is_closed {
            return;
        }
        let kind = self.peers[index].client.kind;
        let own = self.peers[index].asked.first().cloned();
        let room = if matches!(kind, Kind::Plain { .. }) { own.unwrap() } else { self.any_room() };
        match (kind, self.random.below(8)) {
            (Kind::Centrifuge, 0..4) => {
                let peer = &mut self.peers[index];
                if peer.client.is_asking(&room) {
                    return;
                }
                let is_member = peer.rooms.get(&room).is_some_and(|known| known.is_member);
                if self.traced == Some(peer.number) {
                    println!(
                        "step {}: client {} asks for {room}, {is_member}",
                        self.counts.steps, peer.number
                    );
                }
                match is_member {
                    true if self.random.one_in(2) => peer.client.unsubscribe(&room),
                    true => {}
                    false => peer.client.subscribe(&room),
                }
            }
            (Kind::Plain { .. } | Kind::Json { .. } | Kind::Centrifuge, 4..8) => {
                // Sometimes more than may be in flight.
                let count = if self.random.one_in(30) { 100 } else { self.random.between(1, 5) };
                for _ in 0..count {
                    let data = self.data(self.peers[index].number);
                    self.counts.publications += 1;
                    self.peers[index].client.publish(&room, &data);
                }
            }
            _ => {}
        }
    }

    /// A client does what clients should not do.
    fn client_misbehaves(&mut self) {
        let Some(index) = self.any_peer() else { return };
        let peer = &mut self.peers[index];
        let is_socket = peer.client.kind.is_web_socket();
        match self.random.below(20) {
            0..8 => peer.is_stalled = !peer.is_stalled,
            8 => peer.client.pipe.borrow_mut().is_reset = true,
            9 if is_socket => peer.client.pipe.borrow_mut().client_ended = true,
            10 if is_socket => peer.client.close(),
            11 if is_socket => {
                peer.is_wild = true;
                peer.client.junk(&mut self.random);
            }
            12..16 if is_socket => peer.client.ping(),
            16 => peer.client.pipe.borrow_mut().capacity = self.random.between(32, 16 * 1024),
            17 if is_socket => {
                // A flood that is not read.
                for _ in 0..self.random.between(10, 150) {
                    peer.client.ping();
                }
            }
            _ => {}
        }
    }

    // ---- checks ----

    /// Looks at what the broker has accepted.
    fn learn(&mut self) {
        let bus = lock(&self.bus);
        for (room, log) in &bus.log {
            let known = self.known.entry(room.clone()).or_default();
            for publication in log.iter().skip(*known) {
                let number = number(publication.data.as_text().unwrap_or_default());
                let place = (room.clone(), *known);
                *known += 1;
                if number == 0 {
                    continue;
                }
                let twice = self.places.insert(number, place);
                assert!(twice.is_none(), "publication {number} was accepted twice");
                let publisher = self.publishers[&number];
                if publisher > 0 {
                    let last = self.last_of.insert((publisher, room.clone()), number);
                    assert!(
                        last.is_none_or(|last| last < number),
                        "publisher {publisher} is out of order in {room}: {number} after {last:?}"
                    );
                }
            }
        }
    }

    fn hear(&mut self, index: usize, heard: Heard) {
        self.learn();
        let peer = &mut self.peers[index];
        if self.traced == Some(peer.number) {
            println!("step {}: client {} hears {heard:?}", self.counts.steps, peer.number);
        }
        if peer.is_wild {
            return;
        }
        assert!(peer.is_open, "client {} hears {heard:?} before it is answered", peer.number);
        assert!(!peer.is_closed, "client {} hears {heard:?} after the end", peer.number);
        if let (Some(told), Heard::Gap(room) | Heard::Unsubscribed(room, _)) = (&mut self.told, &heard) {
            *told.entry((peer.number, room.clone())).or_default() += 1;
        }
        match heard {
            Heard::Publication(room, number @ 1..) => self.check_publication(index, &room, number),
            Heard::Gap(room) => {
                self.counts.gaps += 1;
                let known = peer.rooms.get_mut(&room).filter(|known| known.is_member);
                let known = known.unwrap_or_else(|| panic!("a gap in {room}, where the client is not"));
                known.has_gap = true;
            }
            Heard::Joined(room) => self.join(index, room),
            Heard::Left(room) => {
                if let Some(known) = peer.rooms.get_mut(&room) {
                    known.is_member = false;
                }
            }
            Heard::Unsubscribed(room, code) => {
                self.counts.gaps += 1;
                assert_eq!(code, 2500, "insufficient state");
                let known = peer.rooms.get_mut(&room).filter(|known| known.is_member);
                let known = known.unwrap_or_else(|| panic!("a gap in {room}, where the client is not"));
                known.is_member = false;
                let rejoins = self.told.is_some() || self.random.one_in(2);
                if rejoins && !peer.client.is_asking(&room) {
                    peer.client.subscribe(&room);
                }
            }
            Heard::Closed => peer.is_closed = true,
            Heard::Ping(payload) => {
                if self.is_calm || !self.random.one_in(10) {
                    peer.client.pong(&payload);
                }
            }
            Heard::Connected | Heard::Published | Heard::Publication(_, 0) => {}
        }
    }

    fn check_publication(&mut self, index: usize, room: &RoomName, number: u64) {
        self.counts.deliveries += 1;
        let peer = &self.peers[index];
        let who = format!("client {} ({:?}) in {room}", peer.number, peer.client.kind);
        let (of, place) =
            self.places.get(&number).unwrap_or_else(|| panic!("{who}: {number} was never accepted"));
        assert_eq!(of, room, "{who}: {number} is of another room");
        let place = *place;
        let known = peer.rooms.get(room).unwrap_or_else(|| panic!("{who}: it is not there"));
        assert!(known.is_member, "{who}: it has left, and gets {number}");
        assert!(place >= known.unseen, "{who}: {number} comes twice or out of order");
        let own = self.publishers[&number] == peer.number;
        assert!(!own || peer.client.kind.has_echo(), "{who}: its own {number}");
        if place > known.next && !known.has_gap && peer.client.kind.hears_gaps() {
            self.check_nothing_missing(&who, index, room, known.next..place);
        }
        let known = self.peers[index].rooms.get_mut(room).unwrap();
        known.unseen = place + 1;
        if place >= known.next {
            (known.next, known.has_gap) = (place + 1, false);
        }
    }

    /// Nothing of this part of a room's log may be missing, but what is not for this client.
    fn check_nothing_missing(&self, who: &str, index: usize, room: &RoomName, part: std::ops::Range<usize>) {
        let peer = &self.peers[index];
        let bus = lock(&self.bus);
        for publication in &bus.log[room][part] {
            let number = number(publication.data.as_text().unwrap_or_default());
            let is_own = number == 0 || self.publishers[&number] == peer.number;
            assert!(
                is_own && (number == 0 || !peer.client.kind.has_echo()),
                "{who}: {number} is lost, and no gap was told"
            );
        }
    }

    /// No queue is larger than it may be.
    fn check_bounds(&mut self) {
        let node = &self.nodes[self.random.below(self.nodes.len())];
        let outbound = node.settings.load().limits.outbound.get().max(8 * 1024);
        for shard in &node.shards {
            for link in &shard.links {
                let queued = shard.core.queued_for(link.key);
                assert!(queued <= outbound + BESIDES_BOUND, "{queued} bytes are queued for a client");
                let holds = shard.core.held_for(link.key);
                assert!(holds <= outbound + BESIDES_QUEUE, "a connection holds {holds} bytes");
            }
        }
    }

    /// Everything that fails is mended, and everybody reads.
    fn come_to_rest(&mut self) {
        for round in 0..2_000_000 {
            {
                let mut bus = lock(&self.bus);
                for node in &self.nodes {
                    if !bus.links[node.link].is_up {
                        bus.restore(node.link);
                    }
                    while bus.accept_next(node.link, false) {}
                    while bus.confirm_next(node.link, 0, false) {}
                }
            }
            for node in 0..self.nodes.len() {
                while broker::deliver(&self.bus, self.nodes[node].link) {}
                for shard in 0..self.nodes[node].shards.len() {
                    let mut steps = 0;
                    while self.nodes[node].shards[shard].step(self.now, &mut self.random) {
                        steps += 1;
                        assert!(steps < 1_000_000, "a shard does not come to rest");
                    }
                }
            }
            self.learn();
            for index in (0..self.peers.len()).rev() {
                self.peers[index].is_stalled = false;
                self.peers[index].client.pipe.borrow_mut().capacity = 64 * 1024;
                self.read(index, usize::MAX);
            }
            if self.is_quiet() {
                return;
            }
            // A session that is closing waits for its client or its deadline.
            if round % 4 == 3 {
                self.tick();
            }
            assert!(round < 5_000, "the simulation does not come to rest");
        }
    }

    fn is_quiet(&self) -> bool {
        lock(&self.bus).is_quiet_for(self.nodes.iter().map(|node| node.link))
            && self.nodes.iter().flat_map(|node| &node.shards).all(crate::node::Shard::is_quiet)
            && self.peers.iter().all(|peer| peer.client.pipe.borrow().to_client.is_empty())
    }

    /// Everybody who is in a room has got everything.
    fn check_complete(&mut self) {
        for index in 0..self.peers.len() {
            let peer = &self.peers[index];
            if peer.is_closed || peer.is_wild || !peer.is_open || peer.client.pipe.borrow().client_ended {
                continue;
            }
            assert_eq!(peer.client.waiting(), 0, "client {} has not been answered", peer.number);
            for (room, known) in &peer.rooms {
                if !known.is_member || known.has_gap || !peer.client.kind.hears_gaps() {
                    continue;
                }
                let who = format!("client {} ({:?}) in {room} at the end", peer.number, peer.client.kind);
                let end = self.known.get(room).copied().unwrap_or(0);
                if known.next < end {
                    self.check_nothing_missing(&who, index, room, known.next..end);
                }
            }
        }
    }

    /// One interruption is one gap for each client in each room, also if the client joins again at once, while
    /// others have yet to be told.
    fn check_one_gap(&mut self) {
        self.is_calm = true;
        let room = self.any_room();
        let node = self.random.below(self.nodes.len());
        if self.random.one_in(3) && !self.nodes[node].is_draining {
            // More than are told of a gap in one turn.
            (0..200).for_each(|_| self.open_at(node, 0, Kind::Centrifuge));
            self.come_to_rest();
        }
        for peer in self.peers.iter_mut().filter(|peer| peer.is_open && !peer.is_closed) {
            let is_member = peer.rooms.get(&room).is_some_and(|known| known.is_member);
            if peer.client.kind == Kind::Centrifuge && !is_member && !peer.client.is_asking(&room) {
                peer.client.subscribe(&room);
            }
        }
        self.come_to_rest();
        let link = self.nodes[node].link;
        {
            let mut bus = lock(&self.bus);
            bus.interrupt(link, 0);
            bus.restore(link);
        }
        while broker::deliver(&self.bus, link) {}
        self.told = Some(BTreeMap::new());
        for _ in 0..50 {
            for shard in self.nodes.iter_mut().flat_map(|node| &mut node.shards) {
                shard.step_by_turn(self.now, &mut self.random);
            }
            for index in (0..self.peers.len()).rev() {
                self.read(index, usize::MAX);
            }
        }
        self.come_to_rest();
        for ((client, room), gaps) in self.told.take().unwrap() {
            assert_eq!(gaps, 1, "client {client} is told {gaps} gaps in {room} for one interruption");
        }
    }

    /// Who does nothing wrong, while nothing fails, stays.
    fn check_calm(&mut self) {
        self.most_peers = usize::MAX;
        let first = self.next_peer;
        (0..10).for_each(|_| self.open());
        self.come_to_rest();
        for _ in 0..100 {
            self.tick();
            self.publish_from_backend();
            for node in 0..self.nodes.len() {
                while broker::deliver(&self.bus, self.nodes[node].link) {}
                for shard in &mut self.nodes[node].shards {
                    while shard.step(self.now, &mut self.random) {}
                }
            }
            for index in (0..self.peers.len()).rev() {
                self.read(index, usize::MAX);
            }
        }
        self.come_to_rest();
        let stayed = self.peers.iter().filter(|peer| peer.number >= first && !peer.is_closed && peer.is_open);
        let opened = usize::try_from(self.next_peer - first).unwrap();
        assert_eq!(stayed.count(), opened, "somebody who does nothing wrong is closed");
        self.check_complete();
    }

    /// All clients go, and nothing of them stays.
    fn close_all(&mut self) {
        for peer in &self.peers {
            peer.client.pipe.borrow_mut().is_reset = true;
        }
        self.come_to_rest();
        for _ in 0..100 {
            self.tick();
        }
        self.come_to_rest();
        for node in 0..self.nodes.len() {
            self.check_empty(node);
            for shard in &self.nodes[node].shards {
                assert_eq!(shard.core.joining(), 0, "subscriptions are left");
            }
            let link = self.nodes[node].link;
            assert_eq!(lock(&self.bus).rooms(link), 0, "subscriptions are left at the broker");
        }
    }

    /// A node without connections has nothing left of them.
    fn check_empty(&self, node: usize) {
        let node = &self.nodes[node];
        for shard in &node.shards {
            assert!(shard.core.is_empty(), "{} connections are left", shard.core.len());
        }
        for name in ["tidegate_connections", "tidegate_subscriptions", "tidegate_outbound_bytes"] {
            assert_eq!(node.metric(name), 0, "{name}");
        }
        let held = node.metrics("tidegate_memory_held_bytes");
        assert!(held.iter().all(|(_, count)| *count == 0), "memory is counted that nobody holds: {held:?}");
        let (opened, closed) = (
            node.metric("tidegate_connections_opened_total"),
            node.metric("tidegate_connections_closed_total"),
        );
        assert_eq!(opened, closed, "each session ends once, for one reason");
    }
}

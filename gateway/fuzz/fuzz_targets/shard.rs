//! A shard's whole core, bytes in and bytes out. Whatever clients of all protocols send, in whatever pieces,
//! and whatever the broker, the sockets and time do meanwhile: the core does not panic, its queues keep their
//! bounds, no ready socket waits for long, all that it sends is well-formed, nothing is published or joined
//! without a grant, and when everybody has gone, nothing is left. What a plain client sends becomes exactly
//! one publication per message, byte for byte and in order, and what it gets was published in its room, byte
//! for byte and in order.
//!
//! The node, its sockets and its broker are those of `gateway/tests/simulation`. An input is a byte that
//! seeds the order of what happens at the same time, and steps: a byte each, with what it needs behind it
//! ([`Stage::step`]). The text `TOKEN` in a frame is replaced by a valid token.
#![no_main]
#![allow(dead_code, reason = "the simulation uses the rest")]

#[path = "../../tests/simulation/broker.rs"]
mod broker;
#[path = "../../tests/simulation/node.rs"]
mod node;
#[path = "../../tests/simulation/random.rs"]
mod random;
#[path = "../../tests/simulation/server.rs"]
mod server;
#[path = "../../tests/simulation/service.rs"]
mod service;
#[path = "../../tests/simulation/task.rs"]
mod task;
#[path = "../../tests/simulation/transport.rs"]
mod transport;
#[path = "../../tests/simulation/wire.rs"]
mod wire;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use broker_bridge::{Accepted, BrokerError, Data, DataKind, GapCause, Publication, RoomName, SessionId};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tidegate::{
    auth::{Grant, Subject, mint},
    clock::{Tick, Time},
    framing::{Framing, Transport},
    protocol::{Ask, On, TABLE},
    session::Session,
    shard::{ConnectionKey, Start},
    vocabulary::CloseReason,
    websocket::{Decoder, Deflate, Event},
};

use self::{
    broker::{Bus, SharedBus, lock},
    node::{Carrier, Node, SECRET, STEP, settings},
    random::Random,
    transport::{Pipe, Shared},
};

const MAX_MESSAGE: usize = 1024;
const OUTBOUND: usize = 4096;
const ROOMS_PER_SESSION: usize = 3;
const SETTINGS: &str = r#"
limits.outbound = "4KiB"
limits.message_size = "1KiB"
limits.rooms_per_session = 3
compression.threshold = "32B"
heartbeat.interval = "5s"
heartbeat.timeout = "10s"
broker.subscribe_timeout = "3s"

[rooms."a-drop"]
overflow = "drop_oldest"

[rooms."a-last"]
overflow = "latest"
priority = true
"#;
/// What a reload changes to.
const OTHER_SETTINGS: &str = r#"
limits.outbound = "4KiB"
limits.message_size = "1KiB"
limits.rooms_per_session = 3
limits.commands = "20/s burst 20"
heartbeat.interval = "3s"
heartbeat.timeout = "7s"
public.max_session_age = "1m"
"#;
/// What a connection may hold besides its queue: an incomplete message, a frame that is written whole, what
/// TLS holds, and publications that wait for the broker.
const BESIDES_QUEUE: usize = 4096 + 2 * MAX_MESSAGE + 2 * 8192 + 64 * (MAX_MESSAGE + 256);
/// Everything that begins with `a` is granted.
const ROOMS: [&str; 5] = ["a1", "a2", "a-drop", "a-last", "b"];
const MOST_CLIENTS: usize = 8;
/// When all clients have gone, a session lasts no longer than it waits for its last message to be read.
const MOST_TICKS_TO_END: usize = 60;

/// A protocol and its options.
struct Kind {
    name: &'static str,
    transport: Transport,
    query: &'static str,
    /// The rooms that the request names.
    rooms: &'static [&'static str],
    deflate: Option<Deflate>,
}

const fn kind(
    name: &'static str,
    transport: Transport,
    query: &'static str,
    rooms: &'static [&'static str],
) -> Kind {
    Kind { name, transport, query, rooms, deflate: None }
}

static KINDS: [Kind; 10] = [
    kind("plain", Transport::WebSocket, "echo=true", &["a1"]),
    kind("plain", Transport::WebSocket, "echo=false&gap=close", &["a-drop"]),
    Kind { deflate: Some(Deflate::Wide), ..kind("plain", Transport::WebSocket, "", &["a-last"]) },
    kind("ndjson", Transport::WebSocket, "", &["a1", "a-drop", "a-last"]),
    Kind { deflate: Some(Deflate::Narrow), ..kind("ndjson", Transport::WebSocket, "echo=false", &["a2"]) },
    kind("ndjson", Transport::Body, "", &["a1", "a-last"]),
    kind("sse", Transport::Body, "", &["a1"]),
    kind("sse", Transport::Body, "", &["a-drop", "a2"]),
    kind("centrifuge", Transport::WebSocket, "", &[]),
    Kind { deflate: Some(Deflate::Wide), ..kind("centrifuge", Transport::WebSocket, "", &[]) },
];

/// Messages of clients, to be completed by a room or by data.
const MESSAGES: [&str; 8] = [
    r#"{"id":1,"connect":{"token":"TOKEN"}}"#,
    r#"{"id":2,"subscribe":{"channel":"ROOM"}}"#,
    r#"{"id":3,"unsubscribe":{"channel":"ROOM"}}"#,
    r#"{"id":4,"publish":{"channel":"ROOM","data":"x"}}"#,
    r#"{"id":5,"refresh":{"token":"TOKEN"}}"#,
    "{}",
    r#"{"room":"ROOM","data":1}"#,
    r#"{"room":"ROOM","base64":"/wA="}"#,
];

fuzz_target!(|input: &[u8]| {
    let Some((seed, script)) = input.split_first() else { return };
    let mut stage = Stage::new(*seed);
    let mut script = Script(script);
    while stage.step(&mut script).is_some() {
        stage.check();
    }
    stage.end();
});

/// The rest of an input.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> Option<usize> {
        self.byte().map(usize::from)
    }

    /// As many bytes as the next byte says, if they are there.
    fn bytes(&mut self) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at(self.number()?.min(self.0.len()));
        self.0 = rest;
        Some(bytes)
    }

    fn room(&mut self) -> Option<RoomName> {
        Some(room(ROOMS[self.number()? % ROOMS.len()]))
    }
}

struct Client {
    kind: &'static Kind,
    id: SessionId,
    key: ConnectionKey,
    pipe: Shared,
    output: Vec<u8>,
    /// For a plain client: what it has sent and has not been published yet.
    sent: Option<(Decoder, VecDeque<(DataKind, Bytes)>)>,
    has_closed: bool,
    /// How much of its room's log a plain client has got or missed.
    seen: usize,
}

struct Stage {
    bus: SharedBus,
    node: Node,
    time: Time,
    now: Tick,
    random: Random,
    clients: Vec<Client>,
    token: String,
    /// How many publications at the front of the broker's queue have been checked.
    checked: usize,
    is_draining: bool,
}

impl Stage {
    fn new(seed: u8) -> Self {
        let (time, now) = (Time::manual(), Tick::default());
        let bus = Arc::new(Mutex::new(Bus::default()));
        let mut random = Random::new(seed.into());
        let node = Node::new(&bus, SETTINGS, 1, &time, now, &mut random);
        if seed % 4 == 0 {
            node.limit_memory(16 * 1024);
        }
        let subject = Subject::new("alice").expect("a subject");
        let grants: [Grant; 1] = ["a*=subscribe,publish".parse().expect("a grant")];
        let token = mint::mint(&SECRET, &subject, &grants, Duration::from_secs(100), time.unix().into());
        let token = token.expect("a token").expose().to_owned();
        let clients = Vec::new();
        Self { bus, node, time, now, random, clients, token, checked: 0, is_draining: false }
    }

    /// Takes the next step. `None` at the end of the script.
    fn step(&mut self, script: &mut Script<'_>) -> Option<()> {
        let link = self.node.link;
        match script.byte()? % 20 {
            0 | 1 => self.open(&KINDS[script.number()? % KINDS.len()]),
            2 => {
                let client = self.client(script)?;
                let bytes = script.bytes()?;
                self.send(client, bytes);
            }
            3 | 4 => {
                let client = self.client(script)?;
                let opcode = [1, 2, 8, 9, 10, 1, 1, 1][script.number()? % 8];
                let payload = script.bytes()?;
                self.frame(client, opcode, payload);
            }
            5 | 6 => {
                let client = self.client(script)?;
                let message = MESSAGES[script.number()? % MESSAGES.len()];
                let room = script.room()?;
                self.frame(client, 1, message.replace("ROOM", room.as_str()).as_bytes());
            }
            7 => {
                let client = self.client(script)?;
                self.read(client, script.number()? * 8);
            }
            8 => {
                let client = self.client(script)?;
                self.clients[client].pipe.borrow_mut().capacity = script.number()? * 16;
            }
            9 => {
                let room = script.room()?;
                let data = script.bytes()?;
                lock(&self.bus).accept(&room, Publication::new(Data::detect(data.to_vec().into())), None);
            }
            10 => {
                // A flood.
                let room = script.room()?;
                let (count, length) = (script.number()?, script.number()?);
                for _ in 0..count {
                    let data = Data::text("x".repeat(length));
                    lock(&self.bus).accept(&room, Publication::new(data), None);
                }
            }
            11 => {
                let error = match script.byte()? % 8 {
                    0 => Some(BrokerError::Unavailable),
                    1 => Some(BrokerError::Unknown),
                    2 => Some(BrokerError::Forbidden("NOPERM".into())),
                    _ => None,
                };
                let was_any = match error {
                    None => lock(&self.bus).accept_next(link, false),
                    Some(error) => lock(&self.bus).settle_next(link, Err(error)),
                };
                self.checked -= usize::from(was_any);
            }
            12 => {
                let which = script.number()?;
                lock(&self.bus).confirm_next(link, which, which % 16 == 0);
            }
            13 => (0..script.number()?).for_each(|_| {
                broker::deliver(&self.bus, link);
            }),
            14 => {
                let mut bus = lock(&self.bus);
                if bus.links[link].is_up {
                    bus.interrupt(link, script.number()? % 4);
                    self.checked = 0;
                } else {
                    bus.restore(link);
                }
            }
            15 => (0..script.number()? % 64).for_each(|_| self.tick()),
            16 => (0..script.number()?).for_each(|_| {
                self.node.shards[0].step(self.now, &mut self.random);
            }),
            17 => {
                let client = self.client(script)?;
                let pipe = Shared::clone(&self.clients[client].pipe);
                match script.byte()? % 4 {
                    0 => pipe.borrow_mut().is_reset = true,
                    1 => pipe.borrow_mut().client_ended = true,
                    2 => self.node.shards[0].close(self.clients[client].key, CloseReason::Drain),
                    _ => lock(&self.bus).tell_gap(link, &room("a1"), GapCause::Oversized),
                }
            }
            18 => match script.byte()? % 4 {
                0 if !self.is_draining => {
                    self.is_draining = true;
                    self.node.drain(Duration::from_millis(script.number()? as u64));
                }
                1 => {
                    self.time.advance(Duration::from_secs(script.number()? as u64));
                    self.node.shards[0].resume(self.now);
                }
                which => {
                    self.node.settings.replace(settings(if which == 2 { OTHER_SETTINGS } else { SETTINGS }));
                }
            },
            _ => self.work(),
        }
        Some(())
    }

    /// One of the clients. The first one opens if there is none.
    fn client(&mut self, script: &mut Script<'_>) -> Option<usize> {
        let which = script.number()?;
        if self.clients.is_empty() {
            self.open(&KINDS[which % KINDS.len()]);
        }
        (!self.clients.is_empty()).then(|| which % self.clients.len())
    }

    fn open(&mut self, kind: &'static Kind) {
        if self.clients.len() >= MOST_CLIENTS || self.is_draining {
            return;
        }
        let rooms: Vec<_> = kind.rooms.iter().map(|name| room(name)).collect();
        let endpoint = TABLE.iter().find(|endpoint| endpoint.name.as_str() == kind.name).expect("a protocol");
        let open = endpoint.routes.iter().find_map(|route| match route.on {
            On::WebSocket { open, .. } if kind.transport == Transport::WebSocket => Some(open),
            On::Stream { open, .. } if kind.transport == Transport::Body => Some(open),
            _ => None,
        });
        let query: String = kind.rooms.iter().map(|room| format!("room={room}&")).collect();
        let request = http::Request::get(format!("/?{query}{}", kind.query)).body(()).expect("a request");
        let settings = self.node.settings.load();
        let room = (rooms.len() == 1).then(|| rooms[0].clone());
        let ask = Ask { request: &request.into_parts().0, settings: &settings, room };
        let opening = open.expect("a route")(&ask).expect("a session");
        let id = self.node.ids.next();
        let (protocol, framing) = ((opening.protocol)(), Framing::on(kind.transport));
        let session = if opening.signs_in_later {
            Session::to_begin(id, None, protocol, framing)
        } else {
            let token = tidegate::auth::Token::new(&self.token).expect("a token");
            let Ok(identity) = settings.authenticator.verify(&token, self.time.unix().into()) else { return };
            Session::new(id, Arc::new(identity), protocol, framing)
        };
        let is_web_socket = kind.transport == Transport::WebSocket;
        let carrier =
            if is_web_socket { Carrier::Socket { tls: self.random.one_in(2) } } else { Carrier::Response };
        let pipe = Pipe::new(1024);
        let start = Start { session, name: endpoint.name, deflate: kind.deflate, permit: None };
        let key = self.node.shards[0].open(start, &rooms, &[], carrier, &pipe);
        let sent = (kind.name == "plain").then(|| {
            let mut decoder = Decoder::new();
            if kind.deflate.is_some() {
                decoder.allow_deflate();
            }
            (decoder, VecDeque::new())
        });
        self.clients.push(Client {
            kind,
            id,
            key,
            pipe,
            output: Vec::new(),
            sent,
            has_closed: false,
            seen: 0,
        });
    }

    /// A client sends a frame, compressed if it may and chance says so.
    fn frame(&mut self, client: usize, opcode: u8, payload: &[u8]) {
        let text = std::str::from_utf8(payload).ok().filter(|text| text.contains("TOKEN"));
        let replaced = text.map(|text| text.replace("TOKEN", &self.token));
        let payload = replaced.as_ref().map_or(payload, String::as_bytes);
        let mask = (self.random.next() as u32).to_be_bytes();
        let may_deflate = self.clients[client].kind.deflate.is_some() && opcode < 8;
        let frame = if may_deflate && self.random.one_in(2) {
            wire::masked_and_deflated(opcode, payload, mask)
        } else {
            wire::masked(opcode, payload, mask)
        };
        self.send(client, &frame);
    }

    fn send(&mut self, client: usize, bytes: &[u8]) {
        let client = &mut self.clients[client];
        if client.kind.transport == Transport::Body || client.pipe.borrow().client_ended {
            return;
        }
        client.pipe.borrow_mut().to_node.extend(bytes);
        let Some((decoder, messages)) = &mut client.sent else { return };
        let mut bytes = bytes.to_vec();
        let mut feed = decoder.feed(&mut bytes, MAX_MESSAGE);
        while let Ok(Some(event)) = feed.next() {
            match event {
                Event::Text(payload) => messages.push_back((DataKind::Text, payload.into_bytes())),
                Event::Binary(payload) => messages.push_back((DataKind::Binary, payload.into_bytes())),
                Event::Ping(_) | Event::Pong(_) => {}
                Event::Close(_) => break,
            }
        }
    }

    /// A client reads so many bytes, and finds them well-formed.
    fn read(&mut self, client: usize, most: usize) {
        let client = &mut self.clients[client];
        {
            let mut pipe = client.pipe.borrow_mut();
            let read = pipe.to_client.len().min(most);
            client.output.extend(pipe.to_client.drain(..read));
        }
        if client.kind.transport == Transport::Body {
            while let Some(end) = client.output.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = client.output.drain(..=end).collect();
                let line = std::str::from_utf8(&line).expect("lines are UTF-8").trim_end_matches('\n');
                if client.kind.name == "ndjson" {
                    serde_json::from_str::<serde_json::Value>(line).expect("each line is JSON");
                } else {
                    let is_field =
                        ["id: ", "event: ", "data: ", "retry: "].iter().any(|name| line.starts_with(name));
                    assert!(line.is_empty() || line == ":" || is_field, "not a field: {line}");
                }
            }
            return;
        }
        while let Some((opcode, payload)) =
            wire::next_frame(&mut client.output, client.kind.deflate.is_some())
        {
            assert!(!client.has_closed, "nothing follows a close frame");
            client.has_closed = opcode == 8;
            if client.kind.name == "plain" && opcode < 8 {
                let bus = lock(&self.bus);
                let log = bus.log.get(&room(client.kind.rooms[0])).map_or(&[][..], Vec::as_slice);
                let mut rest = log.iter().skip(client.seen);
                let is_binary = |publication: &Publication| publication.data.kind() == DataKind::Binary;
                let place = rest.position(|(publication, _)| {
                    publication.data.bytes() == &payload && is_binary(publication) == (opcode == 2)
                });
                client.seen += 1 + place.expect("a publication of the room, after those before");
            } else if opcode == 1 {
                for line in std::str::from_utf8(&payload).expect("a text is UTF-8").lines() {
                    serde_json::from_str::<serde_json::Value>(line).expect("each message is JSON");
                }
            }
        }
    }

    fn tick(&mut self) {
        self.now = Tick(self.now.0 + 1);
        self.time.advance(STEP);
        self.node.shards[0].tick(self.now, &mut self.random);
        self.node.hub.forget_rooms();
    }

    /// Does all that can be done without clients and the broker.
    fn work(&mut self) {
        let mut steps = 0;
        while self.node.shards[0].step(self.now, &mut self.random) {
            steps += 1;
            assert!(steps < 100_000, "the shard does not come to rest");
        }
    }

    fn check(&mut self) {
        for link in &self.node.shards[0].links {
            let core = &self.node.shards[0].core;
            let (queued, held) = (core.queued_for(link.key), core.held_for(link.key));
            assert!(queued <= OUTBOUND + 4096, "{queued} bytes are queued for a client");
            assert!(held <= OUTBOUND + BESIDES_QUEUE, "a connection holds {held} bytes");
        }
        let bus = lock(&self.bus);
        for (room, publication) in bus.publishing(self.node.link).skip(self.checked) {
            self.checked += 1;
            assert!(room.as_str().starts_with('a'), "{room} was not granted");
            let publisher = publication.publisher.as_ref().expect("a session says who it is").session;
            let client = self.clients.iter_mut().find(|client| client.id == publisher).expect("a client");
            let Some((_, sent)) = &mut client.sent else { continue };
            let (kind, bytes) = sent.pop_front().expect("a message is published once");
            assert_eq!((publication.data.kind(), publication.data.bytes()), (kind, &bytes));
            assert_eq!(room.as_str(), client.kind.rooms[0]);
            assert_eq!(publication.exclude.is_some(), client.kind.query.contains("echo=false"));
        }
        for room in bus.subscribed(self.node.link) {
            assert!(room.as_str().starts_with('a'), "{room} was not granted");
        }
    }

    /// Whether nothing is left to be done, for the shard or the broker.
    fn is_over(&self) -> bool {
        let shard = &self.node.shards[0];
        let link = self.node.link;
        let bus = lock(&self.bus);
        let is_quiet = shard.is_quiet() && bus.is_quiet_for([link].into_iter());
        is_quiet && shard.core.is_empty() && shard.core.joining() == 0 && bus.subscribed(link).count() == 0
    }

    /// Everybody goes, and nothing stays.
    fn end(mut self) {
        let link = self.node.link;
        let most = (self.clients.len() * ROOMS_PER_SESSION) as i64;
        assert!(self.node.metric("tidegate_subscriptions") <= most, "a session is in too many rooms");
        for client in 0..self.clients.len() {
            self.read(client, usize::MAX);
            self.clients[client].pipe.borrow_mut().is_reset = true;
        }
        for ticks in 0..MOST_TICKS_TO_END {
            // What was counted is settled by the ticks after that.
            if ticks >= 2 && self.is_over() {
                break;
            }
            {
                let mut bus = lock(&self.bus);
                if !bus.links[link].is_up {
                    bus.restore(link);
                }
                while bus.settle_next(link, Ok(Accepted::default())) {}
                while bus.confirm_next(link, 0, false) {}
            }
            while broker::deliver(&self.bus, link) {}
            self.work();
            self.tick();
        }
        self.node.check_empty(true);
        assert_eq!(self.node.shards[0].core.joining(), 0, "subscriptions are left");
        assert_eq!(lock(&self.bus).subscribed(link).count(), 0, "subscriptions are left at the broker");
    }
}

fn room(name: &str) -> RoomName {
    RoomName::new(name).expect("a room's name")
}

//! Clients of every protocol: what they send, and what they understand of what they get.

use std::collections::BTreeMap;

use broker_bridge::{Cursor, RoomName};
use serde_json::{Value, json};
use tidegate::framing::Transport;

use crate::{random::Random, transport::Shared, wire};

/// A protocol and its options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Plain { echo: bool, close_on_gap: bool },
    Json { echo: bool, several: bool },
    Lines { several: bool },
    Events { several: bool },
    Centrifuge,
}

/// What a client has understood.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    /// The number of a publication, and its position.
    Publication(RoomName, u64, Option<Cursor>),
    /// Where the session begins in a room's history.
    Position(RoomName, Cursor),
    /// Publications may be missing, for this reason.
    Gap(RoomName, String),
    /// The session has begun.
    Connected,
    /// The client is in the room. If it has asked for what it has missed: whether it gets all of it.
    Joined(RoomName, Option<bool>),
    /// It is not, or not any more.
    Left(RoomName),
    /// It has been told to leave the room, and why.
    Unsubscribed(RoomName, u64),
    /// The answer to a publication.
    Published,
    /// The node ends the session.
    Closed,
    /// The node asks whether the client is there.
    Ping(Vec<u8>),
}

/// A request that has not been answered.
#[derive(Clone, Debug)]
enum Request {
    Connect,
    Subscribe(RoomName),
    Unsubscribe(RoomName),
    Publish,
}

/// One client.
pub struct Client {
    pub kind: Kind,
    pub pipe: Shared,
    /// The room of a session that has one.
    pub room: RoomName,
    input: Vec<u8>,
    next_request: u64,
    waiting: Vec<(u64, Request)>,
    /// The `id` of the event that is being read, its name and its data.
    event: (Option<String>, String, Option<String>),
    mask: Random,
    /// Whether compression was agreed.
    pub deflate: bool,
    /// The epochs of subscriptions.
    epochs: BTreeMap<RoomName, u64>,
}

impl Kind {
    pub fn any(random: &mut Random) -> Self {
        let (echo, several) = (random.one_in(2), random.one_in(2));
        match random.below(6) {
            0 => Self::Plain { echo, close_on_gap: several },
            1 => Self::Json { echo, several },
            2 => Self::Lines { several },
            3 => Self::Events { several },
            _ => Self::Centrifuge,
        }
    }

    /// The protocol's name, the transport and the query of the request.
    pub fn request(self) -> (&'static str, Transport, String) {
        match self {
            Self::Plain { echo, close_on_gap } => {
                let gap = if close_on_gap { "close" } else { "ignore" };
                ("plain", Transport::WebSocket, format!("echo={echo}&gap={gap}"))
            }
            Self::Json { echo, .. } => ("ndjson", Transport::WebSocket, format!("echo={echo}")),
            Self::Lines { .. } => ("ndjson", Transport::Body, String::new()),
            Self::Events { .. } => ("sse", Transport::Body, String::new()),
            Self::Centrifuge => ("centrifuge", Transport::WebSocket, String::new()),
        }
    }

    /// How many rooms its request names at most.
    pub fn rooms(self) -> usize {
        match self {
            Self::Plain { .. } => 1,
            Self::Json { several, .. } | Self::Lines { several } | Self::Events { several } => {
                if several {
                    4
                } else {
                    1
                }
            }
            Self::Centrifuge => 0,
        }
    }

    /// Whether it is told of every gap, or closed.
    pub fn hears_gaps(self) -> bool {
        self != Self::Plain { echo: true, close_on_gap: false }
            && self != Self::Plain { echo: false, close_on_gap: false }
    }

    /// Whether it gets its own publications.
    pub fn has_echo(self) -> bool {
        !matches!(self, Self::Plain { echo: false, .. } | Self::Json { echo: false, .. })
    }

    /// Whether it is told positions with which it can come back.
    pub fn can_resume(self) -> bool {
        matches!(
            self,
            Self::Json { several: false, .. }
                | Self::Lines { several: false }
                | Self::Events { several: false }
        )
    }

    pub fn is_web_socket(self) -> bool {
        self.request().1 == Transport::WebSocket
    }
}

impl Client {
    pub fn new(kind: Kind, pipe: &Shared, room: RoomName, random: &mut Random) -> Self {
        Self {
            kind,
            pipe: Shared::clone(pipe),
            room,
            input: Vec::new(),
            next_request: 1,
            waiting: Vec::new(),
            event: (None, String::new(), None),
            mask: Random::new(random.next()),
            deflate: false,
            epochs: BTreeMap::new(),
        }
    }

    // ---- what it sends ----

    pub fn connect(&mut self, token: &str) {
        self.request(Request::Connect, &json!({ "connect": { "token": token } }));
    }

    pub fn subscribe(&mut self, room: &RoomName, since: Option<Cursor>) {
        let mut subscribe = json!({ "channel": room.as_str() });
        if let Some(Cursor { epoch, offset }) = since {
            subscribe["recover"] = true.into();
            subscribe["epoch"] = epoch.to_string().into();
            subscribe["offset"] = offset.into();
        }
        let message = json!({ "subscribe": subscribe });
        self.request(Request::Subscribe(room.clone()), &message);
    }

    pub fn unsubscribe(&mut self, room: &RoomName) {
        let message = json!({ "unsubscribe": { "channel": room.as_str() } });
        self.request(Request::Unsubscribe(room.clone()), &message);
    }

    /// Publishes, if the protocol can.
    pub fn publish(&mut self, room: &RoomName, data: &str) -> bool {
        match self.kind {
            Kind::Plain { .. } => self.frame(1, data.as_bytes()),
            Kind::Json { .. } => {
                let message = json!({ "room": room.as_str(), "data": data });
                self.frame(1, message.to_string().as_bytes());
            }
            Kind::Centrifuge => {
                let message = json!({ "publish": { "channel": room.as_str(), "data": data } });
                self.request(Request::Publish, &message);
            }
            Kind::Lines { .. } | Kind::Events { .. } => return false,
        }
        true
    }

    pub fn pong(&mut self, payload: &[u8]) {
        match self.kind {
            Kind::Centrifuge => self.frame(1, b"{}"),
            _ => self.frame(10, payload),
        }
    }

    pub fn ping(&mut self) {
        self.frame(9, b"?");
    }

    pub fn close(&mut self) {
        self.frame(8, &[0x03, 0xe8]);
    }

    pub fn junk(&mut self, random: &mut Random) {
        let bytes: Vec<u8> = (0..random.between(1, 40)).map(|_| random.below(256) as u8).collect();
        self.pipe.borrow_mut().to_node.extend(bytes);
    }

    fn request(&mut self, request: Request, message: &Value) {
        let id = self.next_request;
        self.next_request += 1;
        self.waiting.push((id, request));
        let mut message = message.clone();
        message["id"] = id.into();
        self.frame(1, message.to_string().as_bytes());
    }

    fn frame(&mut self, opcode: u8, payload: &[u8]) {
        let mask = (self.mask.next() as u32).to_be_bytes();
        let is_deflated = self.deflate && opcode < 8 && self.mask.one_in(2);
        let frame = if is_deflated {
            wire::masked_and_deflated(opcode, payload, mask)
        } else {
            wire::masked(opcode, payload, mask)
        };
        let mut pipe = self.pipe.borrow_mut();
        if !pipe.client_ended && !pipe.is_reset {
            pipe.to_node.extend(frame);
        }
    }

    // ---- what it reads ----

    /// Reads at most `most` bytes.
    pub fn read(&mut self, most: usize) -> Vec<Heard> {
        {
            let mut pipe = self.pipe.borrow_mut();
            let read = pipe.to_client.len().min(most);
            self.input.extend(pipe.to_client.drain(..read));
        }
        let mut heard = Vec::new();
        while self.understand(&mut heard) {}
        heard
    }

    /// Understands the next frame or line. Returns false if it is not there yet.
    fn understand(&mut self, heard: &mut Vec<Heard>) -> bool {
        if self.kind.is_web_socket() {
            let frame = wire::next_frame(&mut self.input, self.deflate);
            let Some((opcode, payload)) = frame else { return false };
            match opcode {
                1 | 2 => self.message(&payload, heard),
                8 => heard.push(Heard::Closed),
                9 => heard.push(Heard::Ping(payload)),
                10 => {}
                other => panic!("opcode {other}"),
            }
            return true;
        }
        let Some(end) = self.input.iter().position(|byte| *byte == b'\n') else { return false };
        let line: Vec<u8> = self.input.drain(..=end).collect();
        let line = String::from_utf8(line).unwrap();
        match self.kind {
            Kind::Lines { .. } => Self::object(line.trim_end(), heard),
            _ => self.field(line.trim_end_matches('\n'), heard),
        }
        true
    }

    fn message(&mut self, payload: &[u8], heard: &mut Vec<Heard>) {
        let text = String::from_utf8(payload.to_vec()).unwrap();
        match self.kind {
            Kind::Plain { .. } => heard.push(Heard::Publication(self.room.clone(), number(&text), None)),
            Kind::Json { .. } => Self::object(&text, heard),
            Kind::Centrifuge => text.lines().for_each(|line| self.push(line, heard)),
            Kind::Lines { .. } | Kind::Events { .. } => unreachable!("no WebSocket"),
        }
    }

    /// An object of `tidegate.json`.
    fn object(text: &str, heard: &mut Vec<Heard>) {
        let object: Value = serde_json::from_str(text).unwrap_or_else(|_| panic!("no JSON: {text}"));
        if object.get("close").is_some() {
            heard.push(Heard::Closed);
        } else if let Some(cause) = object.get("gap") {
            heard.push(Heard::Gap(room(&object["room"]), text_of(cause)));
        } else if let Some(data) = object.get("data") {
            let number = data.as_str().map_or(0, number);
            heard.push(Heard::Publication(room(&object["room"]), number, cursor(&object["id"])));
        } else if object.get("base64").is_some() {
            heard.push(Heard::Publication(room(&object["room"]), 0, None)); // junk
        } else if let Some(cursor) = cursor(&object["id"]) {
            heard.push(Heard::Position(room(&object["room"]), cursor));
        } else if object.get("error").is_none() && object != json!({}) {
            panic!("an unknown object: {text}");
        }
    }

    /// A field of an event stream.
    fn field(&mut self, line: &str, heard: &mut Vec<Heard>) {
        if let Some(id) = line.strip_prefix("id: ") {
            self.event.0 = Some(id.to_owned());
        } else if let Some(name) = line.strip_prefix("event: ") {
            name.clone_into(&mut self.event.1);
        } else if let Some(data) = line.strip_prefix("data: ") {
            self.event.2 = Some(data.to_owned());
        } else if line.is_empty() {
            let (id, name, data) = std::mem::take(&mut self.event);
            let several = self.kind == Kind::Events { several: true };
            let cursor = id.as_deref().filter(|_| !several).map(|id| id.parse().unwrap());
            // In several rooms the positions in all of them follow.
            let of = id.as_deref().filter(|_| several).map(|id| id.split(';').next().unwrap());
            let of = of.map_or_else(|| self.room.clone(), |of| RoomName::new(of).unwrap());
            match data {
                None if several => {}
                None => heard.push(Heard::Position(of, cursor.unwrap())),
                Some(data) if name == "tidegate.gap" => {
                    let data: Value = serde_json::from_str(&data).unwrap();
                    heard.push(Heard::Gap(room(&data["room"]), text_of(&data["cause"])));
                }
                Some(data) => heard.push(Heard::Publication(of, number(&data), cursor)),
            }
        } else {
            assert!(line.starts_with("retry: ") || line == ":", "an unknown field: {line}");
        }
    }

    /// A reply or a push of the Centrifuge protocol.
    fn push(&mut self, line: &str, heard: &mut Vec<Heard>) {
        let object: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"));
        if object == json!({}) {
            return heard.push(Heard::Ping(Vec::new()));
        }
        if let Some(push) = object.get("push") {
            let data = &push["pub"]["data"];
            if push.get("pub").is_some() {
                let (room, number) = (room(&push["channel"]), data.as_str().map_or(0, number));
                let cursor = self.position(&room, &push["pub"]["offset"]);
                heard.push(Heard::Publication(room, number, cursor));
            } else if let Some(code) = push["unsubscribe"]["code"].as_u64() {
                heard.push(Heard::Unsubscribed(room(&push["channel"]), code));
            } else {
                let gap = &push["message"]["data"]["tidegate.gap"];
                heard.push(Heard::Gap(room(&gap["room"]), text_of(&gap["cause"])));
            }
            return;
        }
        let id = object["id"].as_u64().unwrap_or_else(|| panic!("neither push nor reply: {line}"));
        let place = self.waiting.iter().position(|(request, _)| *request == id);
        let place = place.unwrap_or_else(|| panic!("a second answer to one request, or one to none: {line}"));
        let (_, request) = self.waiting.remove(place);
        let failed = object.get("error").is_some();
        match request {
            Request::Connect | Request::Unsubscribe(_) if failed => {}
            Request::Connect => heard.push(Heard::Connected),
            Request::Subscribe(room) if failed => heard.push(Heard::Left(room)),
            Request::Subscribe(room) => self.subscribed(room, &object["subscribe"], heard),
            Request::Unsubscribe(room) => heard.push(Heard::Left(room)),
            Request::Publish => heard.push(Heard::Published),
        }
    }

    fn subscribed(&mut self, room: RoomName, reply: &Value, heard: &mut Vec<Heard>) {
        if let Some(epoch) = reply["epoch"].as_str() {
            self.epochs.insert(room.clone(), epoch.parse().unwrap());
        }
        heard.push(Heard::Joined(room.clone(), reply["recovered"].as_bool()));
        let missed = reply["publications"].as_array().map_or(&[][..], Vec::as_slice);
        for publication in missed {
            let number = publication["data"].as_str().map_or(0, number);
            let cursor = self.position(&room, &publication["offset"]);
            heard.push(Heard::Publication(room.clone(), number, cursor));
        }
        if let Some(cursor) = self.position(&room, &reply["offset"]).filter(|_| missed.is_empty()) {
            heard.push(Heard::Position(room, cursor));
        }
    }

    fn position(&self, room: &RoomName, offset: &Value) -> Option<Cursor> {
        Some(Cursor { epoch: *self.epochs.get(room)?, offset: offset.as_u64()? })
    }

    /// Whether it has sent a request for this room that has not been answered.
    pub fn is_asking(&self, room: &RoomName) -> bool {
        self.waiting.iter().any(|(_, request)| match request {
            Request::Subscribe(asked) | Request::Unsubscribe(asked) => asked == room,
            Request::Connect | Request::Publish => false,
        })
    }

    /// How many requests have not been answered.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

fn room(value: &Value) -> RoomName {
    RoomName::new(value.as_str().unwrap_or_else(|| panic!("no room: {value}"))).unwrap()
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
}

fn cursor(value: &Value) -> Option<Cursor> {
    value.as_str().map(|id| id.parse().unwrap_or_else(|_| panic!("no position: {id}")))
}

/// The number of a publication, which its data contains between `#`. Zero for what junk has published.
pub fn number(data: &str) -> u64 {
    data.split('#').nth(1).and_then(|number| number.parse().ok()).unwrap_or(0)
}

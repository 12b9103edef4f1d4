//! Golden behaviour: a simulated client plays a transcript of its protocol
//! (`gateway/src/protocol/*/transcripts`) against a whole node, and gets exactly the bytes of the transcript.
//!
//! The transcripts are those of the sessions' own tests, which know neither sockets nor shards. Here the
//! client's bytes arrive in pieces, its socket takes a few bytes at a time, with TLS or without, and the shard
//! has other clients to serve. What a transcript says of the broker and of time, the simulation causes.
//! So every answer is determined, and compared byte by byte, but for the pauses that event streams ask for.
//!
//! Steps that a whole node cannot be brought to are left out: a publication settled twice, and what follows a
//! step that ends the session. Of several such steps, one is played, which one depends on the seed.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use broker_bridge::{Accepted, BrokerError, Data, EventName, GapCause, Publication, RoomName, SessionId};
use tidegate::{
    auth::{Grant, Identity, Subject, UnixSeconds, mint},
    clock::{Tick, Time},
    framing::{Framing, Transport},
    protocol::{Ask, On, TABLE},
    session::Session,
    shard::{ConnectionKey, Start},
    vocabulary::CloseReason,
};

use crate::{
    broker::{self, Bus, SharedBus, lock},
    node::{Carrier, Node, SECRET},
    random::Random,
    transcript::{Input, Opened, Refused, Transcript, with_tokens},
    transport::{Pipe, Shared},
    wire,
};

/// The id of the session in all transcripts.
const SESSION: SessionId = SessionId(7);
/// How long a room without members keeps its subscription, and more.
const LINGER: Duration = Duration::from_secs(2);
/// The most ticks until a session gets a heartbeat.
const HEARTBEAT: usize = 300;

/// What the transcripts assume.
const SETTINGS: &str = r#"
limits.rooms_per_session = 2
limits.message_size = "600B"
sse.retry = "1s"
auth.leeway = "0s"
"#;

/// Plays one of the transcripts.
pub fn play(seed: u64) {
    let mut random = Random::new(seed ^ 0x601d);
    let protocols = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/protocol");
    let mut all: Vec<_> = fs::read_dir(protocols)
        .unwrap()
        .filter_map(|folder| fs::read_dir(folder.unwrap().path().join("transcripts")).ok())
        .flat_map(|files| files.map(|file| file.unwrap().path()))
        // It needs a history, and is over after the first publication.
        .filter(|path| !path.ends_with("long_poll/transcripts/long_poll.txt"))
        .collect();
    all.sort();
    let path = &all[random.below(all.len())];
    let transcript = Transcript::new(&fs::read_to_string(path).unwrap());
    let name = path.file_stem().unwrap().to_str().unwrap();
    let mut stage = Stage::new(&transcript.session, random);
    for step in transcript.steps {
        if stage.is_over {
            break;
        }
        stage.step(&step.input, &step.effects, name);
    }
    stage.end();
}

/// A node, the client that plays, and others.
struct Stage {
    random: Random,
    time: Time,
    now: Tick,
    bus: SharedBus,
    node: Node,
    shard: usize,
    key: ConnectionKey,
    pipe: Shared,
    is_web_socket: bool,
    /// Other clients of the node.
    others: Vec<Shared>,
    heard: Vec<u8>,
    /// What the transcript sends, escaped.
    expected: String,
    /// The publications that the broker has yet to settle: their requests, and how the transcript has them.
    in_flight: VecDeque<(u64, String)>,
    /// The requests for rooms that the broker has yet to answer.
    joining: Vec<u64>,
    is_over: bool,
}

impl Stage {
    fn new(opened: &Opened, mut random: Random) -> Self {
        let mut text = SETTINGS.to_owned();
        for (name, rate) in &opened.limits {
            writeln!(text, "limits.{name} = {rate:?}").unwrap();
        }
        let (time, now) = (Time::manual(), Tick::default());
        let bus = Arc::new(Mutex::new(Bus::default()));
        let shards = random.between(1, 3);
        let mut node = Node::new(&bus, &text, shards, &time, now, &mut random);
        lock(&bus).set_queue(node.link, 64);
        let shard = random.below(shards);
        let pipe = Pipe::new(random.between(1, 300));
        let (start, is_web_socket, rooms) = start(&node, opened, SESSION, time.unix().into());
        let kind = if is_web_socket { Carrier::Socket { tls: random.one_in(2) } } else { Carrier::Response };
        let key = node.shards[shard].open(start, &rooms, &[], kind, &pipe);
        let mut stage = Self {
            random,
            time,
            now,
            bus,
            node,
            shard,
            key,
            pipe,
            is_web_socket,
            others: Vec::new(),
            heard: Vec::new(),
            expected: String::new(),
            in_flight: VecDeque::new(),
            joining: Vec::new(),
            is_over: false,
        };
        stage.add_others();
        for room in rooms.iter().chain(&[room("others")]) {
            lock(&stage.bus).confirm(stage.node.link, room, &Ok(()));
        }
        stage.rest();
        // An event stream begins with a pause, which is not in the transcripts: it is random.
        let greeting = if opened.protocol == "sse" { "retry: *\\n" } else { "" };
        assert_eq!(without_pause(&stage.heard.escape_ascii().to_string()), greeting);
        stage.heard.clear();
        stage
    }

    /// Clients in a room of their own. Some never read.
    fn add_others(&mut self) {
        let count = if self.random.one_in(10) { 300 } else { self.random.below(8) };
        let opened = Opened::new("session plain");
        for number in 0..count {
            let now = self.time.unix().into();
            let (start, ..) = start(&self.node, &opened, SessionId(1000 + number as u128), now);
            let pipe = Pipe::new(self.random.between(64, 4096));
            let kind = Carrier::Socket { tls: self.random.one_in(2) };
            self.node.shards[self.shard].open(start, &[room("others")], &[], kind, &pipe);
            self.others.push(pipe);
        }
    }

    fn step(&mut self, step: &str, effects: &[String], name: &str) {
        let unix = self.time.unix().into();
        let input = Input::new(&with_tokens(step, |subject, grants, seconds| {
            token(subject, grants, seconds, unix).expose().to_owned()
        }));
        let close = effects.iter().find_map(|effect| effect.strip_prefix("close "));
        let ends = close.is_some() || matches!(input, Input::Farewell(_));
        if !self.can_be_caused(&input) || ends && !self.random.one_in(3) {
            return;
        }
        self.expect(effects, close);
        let waits = !matches!(input, Input::Client { .. });
        self.cause(input);
        self.is_over = ends;
        // A client need not wait for answers. The broker does.
        // Nor does the node answer a history in its turn.
        let waits = waits || effects.iter().any(|effect| effect.starts_with("read "));
        if waits || ends || self.random.one_in(2) {
            self.rest();
            self.compare(name, step);
        }
        if effects.iter().any(|effect| effect.starts_with("leave ") || effect == "no member") {
            self.rest();
            self.time.advance(LINGER);
            self.node.hub.forget_rooms();
        }
    }

    /// Whether the transcript's broker can do that here.
    fn can_be_caused(&self, input: &Input) -> bool {
        match input {
            Input::Settled { request, .. } => {
                self.in_flight.front().is_some_and(|(waiting, _)| waiting == request)
            }
            Input::Joined { request, .. } => self.joining.contains(request),
            _ => true,
        }
    }

    fn expect(&mut self, effects: &[String], close: Option<&str>) {
        for effect in effects {
            let (what, rest) = effect.split_once(' ').unwrap_or((effect, ""));
            match what {
                "send" => self.expected += rest,
                "publish" => {
                    let (publication, request) = match rest.rsplit_once(" for ") {
                        Some((publication, request)) => (publication, request.parse().unwrap()),
                        None => (rest, 0),
                    };
                    self.in_flight.push_back((request, publication.to_owned()));
                }
                "read" => {
                    // No room here has a history.
                    let (_, request) = rest.rsplit_once(" for ").unwrap();
                    let error = r#"{"code":108,"message":"not available","temporary":false}"#;
                    let reply = format!(r#"{{"error":{error},"id":{request}}}"#);
                    let frame = [&[0x81, reply.len() as u8], reply.as_bytes()].concat();
                    self.expected += &frame.escape_ascii().to_string();
                }
                "join" => {
                    let (_, request) = rest.split_once(" for ").unwrap();
                    self.joining.push(request.split(' ').next().unwrap().parse().unwrap());
                }
                _ => {}
            }
        }
        if let Some((code, words)) = close.and_then(|close| close.split_once(' ')) {
            let code: u16 = code.parse().unwrap();
            let head = [&[0x88, words.len() as u8 + 2], &code.to_be_bytes()[..]].concat();
            self.expected += &head.escape_ascii().to_string();
            self.expected += words;
        }
    }

    fn cause(&mut self, input: Input) {
        let link = self.node.link;
        match input {
            Input::Client { is_text, payload } => {
                let mask = (self.random.next() as u32).to_be_bytes();
                let frame = wire::masked(if is_text { 1 } else { 2 }, &payload, mask);
                self.pipe.borrow_mut().to_node.extend(frame);
            }
            Input::Room { room: name, is_text, event, payload } => {
                let data = if is_text { Data::detect(payload) } else { Data::binary(payload) };
                let event = event.map(|event| EventName::new(&event).unwrap());
                self.rest();
                lock(&self.bus).accept(&room(&name), Publication { event, ..Publication::new(data) }, None);
            }
            Input::Gap { room: name, cause } => {
                let causes =
                    [GapCause::Interrupted, GapCause::Oversized, GapCause::Overflow, GapCause::Dropped];
                let cause = causes.into_iter().find(|known| known.as_str() == cause).unwrap();
                self.rest();
                lock(&self.bus).tell_gap(link, &room(&name), cause);
            }
            Input::Settled { outcome, .. } => {
                let outcome = match outcome.as_str() {
                    "ok" => Ok(Accepted::default()),
                    "unavailable" => Err(BrokerError::Unavailable),
                    "unknown" => Err(BrokerError::Unknown),
                    "refused" => Err(BrokerError::Refused("ERR".into())),
                    other => panic!("no outcome {other}"),
                };
                self.rest();
                self.in_flight.pop_front();
                assert!(lock(&self.bus).settle_next(link, outcome));
            }
            Input::Joined { request, room: name, outcome } => {
                let outcome = outcome.map_err(|refused| match refused {
                    Refused::Unavailable => BrokerError::Unavailable,
                    Refused::Forbidden => BrokerError::Forbidden("NOPERM".into()),
                });
                self.rest();
                self.joining.retain(|joining| *joining != request);
                lock(&self.bus).confirm(link, &room(&name), &outcome);
            }
            Input::Heartbeat => {
                self.rest();
                let before = self.heard.len();
                let ticks = (0..HEARTBEAT).position(|_| {
                    self.tick();
                    self.rest();
                    self.heard.len() > before
                });
                assert!(ticks.is_some(), "no heartbeat within {HEARTBEAT} ticks");
            }
            Input::Farewell(reason) => {
                let reason = match reason.as_str() {
                    "drain" => CloseReason::Drain,
                    "slow_consumer" => CloseReason::SlowConsumer,
                    "memory" => CloseReason::OutOfMemory,
                    "token_expired" => CloseReason::TokenExpired,
                    "lost" => CloseReason::Lost,
                    other => panic!("no reason {other}"),
                };
                self.rest();
                self.node.shards[self.shard].close(self.key, reason);
                self.tick();
            }
        }
    }

    /// Time for the shards passes, but not the time of day: tokens stay as old as in the transcripts.
    fn tick(&mut self) {
        self.now = Tick(self.now.0 + 1);
        for shard in &mut self.node.shards {
            shard.tick(self.now, &mut self.random);
        }
    }

    /// Until nothing is left to do, while others publish and read.
    fn rest(&mut self) {
        if self.random.one_in(3) {
            let data = Data::text("x".repeat(self.random.below(300)));
            lock(&self.bus).accept(&room("others"), Publication::new(data), None);
        }
        loop {
            let mut is_quiet = !broker::deliver(&self.bus, self.node.link);
            for shard in &mut self.node.shards {
                for _ in 0..self.random.between(1, 20) {
                    is_quiet &= !shard.step(self.now, &mut self.random);
                }
            }
            for pipe in self.others.iter().skip(1) {
                let mut pipe = pipe.borrow_mut();
                let read = pipe.to_client.len().min(self.random.below(2000));
                pipe.to_client.drain(..read);
            }
            let mut pipe = self.pipe.borrow_mut();
            is_quiet &= pipe.to_client.is_empty();
            let read = self.random.between(1, 200).min(pipe.to_client.len());
            self.heard.extend(pipe.to_client.drain(..read));
            if is_quiet {
                return;
            }
        }
    }

    /// The client has heard what the transcript says, and the broker has got it.
    fn compare(&self, name: &str, step: &str) {
        let heard = without_pause(&self.heard.escape_ascii().to_string());
        let expected = without_pause(&self.expected);
        let same = heard.bytes().zip(expected.bytes()).take_while(|(one, other)| one == other).count();
        assert_eq!(&heard[same..], &expected[same..], "{name} > {step}: after {same} bytes");
        let bus = lock(&self.bus);
        let published: Vec<String> = bus
            .publishing(self.node.link)
            .map(|(room, publication)| {
                let kind = if publication.data.as_text().is_some() { "text" } else { "binary" };
                let echo = if publication.exclude == Some(SESSION) { " (not to itself)" } else { "" };
                format!("{room} {kind} {}{echo}", publication.data.bytes().escape_ascii())
            })
            .collect();
        let expected: Vec<_> = self.in_flight.iter().map(|(_, publication)| publication).collect();
        assert_eq!(published.iter().collect::<Vec<_>>(), expected, "{name} > {step}: what the broker gets");
    }

    /// The client goes, if the node has not ended the session, and leaves nothing behind.
    fn end(mut self) {
        self.rest();
        let has_ended = {
            let pipe = self.pipe.borrow();
            pipe.node_ended || pipe.is_closed
        };
        assert_eq!(has_ended, self.is_over, "whether the node has ended the session");
        for pipe in self.others.iter().chain([&self.pipe]) {
            pipe.borrow_mut().client_ended = true;
            pipe.borrow_mut().is_reset |= !self.is_web_socket || self.random.one_in(2);
        }
        self.rest();
        for _ in 0..100 {
            self.tick();
            self.rest();
        }
        while lock(&self.bus).settle_next(self.node.link, Ok(Accepted::default())) {}
        self.rest();
        self.node.check_empty(true);
    }
}

/// Opens a session as a request would. Returns whether it is on a WebSocket, and its rooms.
fn start(node: &Node, opened: &Opened, id: SessionId, now: UnixSeconds) -> (Start, bool, Vec<RoomName>) {
    let endpoint = TABLE.iter().find(|endpoint| endpoint.name.as_str() == opened.protocol).unwrap();
    let several = opened.several_rooms;
    let found = endpoint.routes.iter().find_map(|route| match route.on {
        _ if several != (route.path == "/rooms") => None,
        On::WebSocket { open, .. } => Some((Transport::WebSocket, open)),
        On::Stream { open, .. } if !opened.on_web_socket => Some((Transport::Body, open)),
        On::Stream { .. } | On::Request { .. } => None,
    });
    let (transport, open) = found.unwrap();
    let request = http::Request::get(format!("/?{}", opened.query.join("&"))).body(()).unwrap();
    let settings = node.settings.load();
    let ask = Ask {
        request: &request.into_parts().0,
        settings: &settings,
        room: (!several).then(|| room("lobby")),
    };
    let opening = open(&ask).unwrap();
    let (protocol, framing) = ((opening.protocol)(), Framing::on(transport));
    let (session, rooms) = if opening.signs_in_later {
        (Session::to_begin(id, None, protocol, framing), Vec::new())
    } else {
        let operations = if opened.may_publish { "subscribe,publish" } else { "subscribe" };
        let token = token("alice", &format!("lobby={operations}"), 60, now);
        let identity: Identity = settings.authenticator.verify(&token, now).unwrap();
        let rooms = if several { vec![room("lobby"), room("harbour")] } else { vec![room("lobby")] };
        (Session::new(id, Arc::new(identity), protocol, framing), rooms)
    };
    let start = Start { session, name: endpoint.name, deflate: None, permit: None };
    (start, transport == Transport::WebSocket, rooms)
}

fn token(subject: &str, grants: &str, seconds: u64, now: UnixSeconds) -> tidegate::auth::Token {
    let minted = UnixSeconds(now.0 - 60 + seconds);
    let subject = Subject::new(subject).unwrap();
    let grants: Vec<Grant> = grants.split(';').map(|grant| grant.parse().unwrap()).collect();
    mint::mint(&SECRET, &subject, &grants, Duration::from_secs(60), minted).unwrap()
}

fn room(name: &str) -> RoomName {
    RoomName::new(name).unwrap()
}

/// An event stream asks for a random pause, of one to two seconds here.
fn without_pause(text: &str) -> String {
    let Some((before, pause)) = text.split_once("retry: ") else { return text.to_owned() };
    let digits: String = pause.chars().take_while(char::is_ascii_digit).collect();
    assert!((1000..2000).contains(&digits.parse().unwrap()), "a pause of {digits} ms");
    format!("{before}retry: *{}", &pause[digits.len()..])
}

//! Golden transcripts: the exact output of each protocol.
//!
//! A transcript is a file of steps. A line that begins with `>` is an input to the session, and the lines
//! below it are all resulting effects:
//!
//! ```text
//! session plain echo=false gap=close publish      the endpoint, its options, and the grants besides subscribe
//! > client text hi                                a message of the client
//! publish lobby text hi                           … is handed to the broker
//! > room lobby text hello                         a publication
//! send \x81\x05hello                              … these bytes go out
//! > gap lobby interrupted
//! close 1012 messages may have been missed
//! ```
//!
//! Payloads and bytes are written as Rust byte strings.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use broker_bridge::{BrokerError, Data, EventName, GapCause, Publication, RoomName, SessionId};
use bytes::Bytes;

use super::{Charge, Effect, Effects, Session, Surroundings};
use crate::{
    auth::{AuthConfig, Authenticator, Grant, Identity, Keyring, Subject, Token, UnixSeconds, mint},
    clock::Time,
    config::{Config, Sources},
    framing::{Encoding, Framing, Packets, Transport},
    limits::{Allowance, Limiters, bucket::SessionMeters, tests::limits as limits_of},
    protocol::{self, Ask, Message, On, Opening, Protocol, RoomFormat, TABLE, Then},
    settings::Settings,
    vocabulary::{CloseReason, ReplyError, metrics::Label as _},
};

/// Every protocol's transcripts, from its folder.
#[test]
fn transcripts() {
    let protocols = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/protocol");
    let mut played = BTreeMap::new();
    for protocol in files(&protocols) {
        for transcript in files(&protocol.join("transcripts")) {
            println!("{}", transcript.display());
            check(&fs::read_to_string(&transcript).expect("a transcript"));
            *played.entry(protocol.file_name().expect("a folder's name").to_owned()).or_insert(0) += 1;
        }
    }
    // Each protocol with sessions has at least one.
    assert_eq!(played.len(), protocol::names().len(), "{played:?}");
}

pub(super) fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

#[test]
fn tokens_are_compared_by_their_grants() {
    let before = identity("lobby=subscribe;b=subscribe,publish");
    assert!(before.grants_as(&identity("lobby=subscribe;b=subscribe,publish")));
    for other in ["lobby=subscribe", "lobby=subscribe;b=subscribe", "lobby=subscribe;c=subscribe,publish"] {
        assert!(!before.grants_as(&identity(other)), "{other}");
    }
}

#[test]
fn centrifuge_junk() {
    for (junk, end) in [
        ("client text {}", None), // a pong, which anybody may send at any time
        ("client text nonsense", Some("close 3501 bad request")),
        ("client text []", Some("close 3501 bad request")),
        ("client text {\"id\":\"one\",\"connect\":{}}", Some("close 3501 bad request")),
        ("client text {\"id\":-1,\"connect\":{}}", Some("close 3501 bad request")),
        ("client text {\"id\":1,\"connect\":{\"token\":7}}", Some("close 3501 bad request")),
        ("client text {\"id\":1,\"id\":1,\"connect\":{}}", Some("close 3501 bad request")),
        ("client text {\"id\":1,\"connect\":{}", Some("close 3501 bad request")),
        ("client text {\"connect\":{}}", Some("close 3501 bad request")),
        ("client text {\"id\":1,\"subscribe\":{\"channel\":\"lobby\"}}", Some("close 3501 bad request")),
        ("client binary {}", Some("close 3501 bad request")),
    ] {
        let mut client = open("session centrifuge");
        assert_eq!(client.play(junk).first().map(String::as_str), end, "{junk}");
    }
}

#[test]
fn continuing_over_a_limit_closes_the_session() {
    let mut client = open("session centrifuge commands=2/h");
    let mut say = |line: &str| client.play(&with_tokens(line));
    assert_eq!(
        say("client text {\"id\":1,\"connect\":{\"token\":\"<token alice lobby=publish 60>\"}}").len(),
        2
    );
    let publish = |id| format!("{{\"id\":{id},\"publish\":{{\"channel\":\"lobby\",\"data\":1}}}}");
    let all: Vec<String> = (2..=200).map(publish).collect();
    let said = say(&format!("client text {}", all.join("\\n")));
    assert_eq!(said.iter().filter(|line| line.starts_with("publish ")).count(), 1);
    let refused = said.iter().filter(|line| line.contains("\\\"code\\\":111")).count();
    assert!((100..110).contains(&refused), "{refused} were refused with an error");
    assert_eq!(said.last().map(String::as_str), Some("close 3013 too many requests"));
    assert_eq!(said.len(), 1 + 2 * refused + 2, "and nothing after that");
}

#[test]
fn pings_count_as_commands() {
    let mut client = open("session plain commands=2/h");
    let answered = (0..50).filter(|_| client.ping(6).is_empty()).count();
    assert_eq!(answered, 2);
    assert_eq!(client.ping(6), ["limited commands"]);
    let close = (0..200).find_map(|_| client.ping(6).get(1).cloned());
    assert_eq!(close.as_deref(), Some("close 1008 too much: limits.commands"));
}

const ROOM: &str = "lobby";
const SESSION: SessionId = SessionId(7);

/// Replays the steps and compares all output with the file.
fn check(transcript: &str) {
    let mut lines = transcript.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let first = lines.next().expect("a transcript begins with its session");
    let mut client = open(first);
    let mut played = format!("{first}\n");
    let expected =
        std::iter::once(first).chain(lines.clone()).fold(String::new(), |all, line| all + line + "\n");
    for step in lines.filter_map(|line| line.strip_prefix("> ")) {
        writeln!(played, "> {step}").expect("a string takes everything");
        for said in client.play(&with_tokens(step)) {
            writeln!(played, "{said}").expect("a string takes everything");
        }
    }
    assert_eq!(played, expected);
}

/// A session and its limits.
pub(super) struct Client {
    pub(super) session: Session,
    meters: SessionMeters,
    limiters: Limiters,
}

impl Client {
    /// Returns what the session's protocol writes, and what follows from it.
    pub(super) fn write(
        &mut self,
        write: impl FnOnce(&mut dyn Protocol, &mut Packets) -> Then,
    ) -> (Vec<Bytes>, Then) {
        let mut out = Packets::default();
        out.begin(self.session.framing());
        let then = write(self.session.protocol.as_mut(), &mut out);
        (out.take().collect(), then)
    }

    pub(super) fn play(&mut self, step: &str) -> Vec<String> {
        play(self, step)
    }

    /// Sends a control frame of this size. Returns the resulting effects: none if it may be answered.
    fn ping(&mut self, bytes: usize) -> Vec<String> {
        let mut effects = Effects::default();
        let allowance = Allowance { session: &self.meters, node: &self.limiters };
        let authenticator = authenticator();
        let around =
            Surroundings { authenticator: &authenticator, now: NOW, rooms_per_session: 2, allowance };
        let answered = self.session.receive_other(bytes, &around, &mut effects);
        assert_eq!(answered, effects.is_empty());
        let all: Vec<_> = effects.drain().collect();
        all.into_iter().map(|effect| said(&mut self.session, effect)).collect()
    }
}

pub(super) fn open(line: &str) -> Client {
    let limits: Vec<_> = line.split(' ').filter_map(|word| word.split_once('=')).collect();
    let limits: Vec<_> = limits.into_iter().filter(|(_, value)| value.contains('/')).collect();
    let limits = limits_of(&limits);
    Client {
        session: open_session(line),
        meters: SessionMeters::new(&limits, Time::default()),
        limiters: Limiters::new(&limits, Time::default()),
    }
}

fn open_session(line: &str) -> Session {
    let mut words = line.split(' ');
    assert_eq!(words.next(), Some("session"));
    let protocol = words.next().expect("a protocol");
    let options: Vec<&str> = words.collect();
    let (opening, framing) = opening(protocol, &options);
    let state = (opening.protocol)();
    if opening.signs_in_later {
        return Session::to_begin(SESSION, None, state, framing);
    }
    let operations = if options.contains(&"publish") { "subscribe,publish" } else { "subscribe" };
    let identity = Arc::new(identity(&format!("{ROOM}={operations}")));
    Session::new(SESSION, identity, state, framing)
}

/// Opens a session as a request would: for one room, or (`several_rooms`) for two, with the options as its
/// query. If there are several transports, `websocket` selects that one.
fn opening(protocol: &str, options: &[&str]) -> (Opening, Framing) {
    let name = if protocol == "event_stream" { "sse" } else { protocol };
    let endpoint = TABLE.iter().find(|endpoint| endpoint.name.as_str() == name).expect("a protocol");
    let several = options.contains(&"several_rooms");
    let mut routes = endpoint.routes.iter().filter(|route| several == (route.path == "/rooms"));
    let on_web_sockets = options.contains(&"websocket");
    let (transport, open) = routes
        .find_map(|route| match route.on {
            On::WebSocket { open, .. } => Some((Transport::WebSocket, open)),
            On::Stream { open, .. } if !on_web_sockets => Some((Transport::Body, open)),
            On::Stream { .. } | On::Request { .. } => None,
        })
        .expect("a route");
    let mut query: Vec<&str> =
        options.iter().copied().filter(|option| option.contains('=') && !option.contains('/')).collect();
    if several {
        query.extend(["room=lobby", "room=harbour"]);
    }
    let request = http::Request::get(format!("/?{}", query.join("&"))).body(()).expect("a request");
    let flags = vec![("sse.retry".to_owned(), "1s".to_owned())];
    let config = Config::load(&Sources { flags, ..Sources::default() }).expect("a configuration");
    let settings = Settings::new(&config, Arc::new(Keyring::new(Vec::new(), Vec::new())));
    let ask =
        Ask { request: &request.into_parts().0, settings: &settings, room: (!several).then(|| room(ROOM)) };
    (open(&ask).expect("a session"), Framing::on(transport))
}

fn play(client: &mut Client, step: &str) -> Vec<String> {
    let Client { session, meters, limiters } = client;
    let mut effects = Effects::default();
    let (what, rest) = step.split_once(' ').unwrap_or((step, ""));
    match what {
        "client" => {
            let (kind, payload) = rest.split_once(' ').unwrap_or((rest, ""));
            let payload = unescape(payload);
            let message = if kind == "text" { Message::Text(payload) } else { Message::Binary(payload) };
            let authenticator = authenticator();
            let around = Surroundings {
                authenticator: &authenticator,
                now: NOW,
                rooms_per_session: 2,
                allowance: Allowance { session: meters, node: limiters },
            };
            let (Message::Text(bytes) | Message::Binary(bytes)) = &message;
            let charge = Charge::default().received(bytes.len());
            session.receive(message, charge, &around, &mut Vec::new(), &mut effects);
        }
        "room" => {
            let (name, rest) = rest.split_once(' ').expect("a room and a payload");
            let (kind, payload) = rest.split_once(' ').unwrap_or((rest, ""));
            let (kind, event) =
                kind.split_once('/').map_or((kind, None), |(kind, event)| (kind, Some(event)));
            let payload = unescape(payload);
            let data = if kind == "text" { Data::detect(payload) } else { Data::binary(payload) };
            let event = event.map(|event| EventName::new(event).expect("an event's name"));
            let publication = Publication { event, ..Publication::new(data) };
            let RoomFormat { format, .. } = session.format(&room(name), 0);
            let encoding = Encoding::new(format, session.framing().transport);
            effects.push(Effect::Send(encoding.encode(&room(name), &publication)));
        }
        "gap" => {
            let (name, cause) = rest.split_once(' ').expect("a room and a cause");
            let cause = [GapCause::Interrupted, GapCause::Oversized, GapCause::Overflow, GapCause::Dropped]
                .into_iter()
                .find(|known| known.as_str() == cause);
            session.gap(&room(name), cause.expect("a cause"), &mut effects);
        }
        "settled" => {
            let (request, outcome) = rest.split_once(' ').unwrap_or(("0", rest));
            let outcome = match outcome {
                "ok" => Ok(()),
                "unavailable" => Err(BrokerError::Unavailable),
                "unknown" => Err(BrokerError::Unknown),
                "not_now" => Err(BrokerError::NotNow("BUSY".into())),
                "forbidden" => Err(BrokerError::Forbidden("NOPERM".into())),
                "refused" => Err(BrokerError::Refused("ERR".into())),
                other => panic!("no outcome {other}"),
            };
            session.settled(request.parse().expect("a request"), &outcome, &mut effects);
        }
        "joined" | "refused" => {
            let (request, name) = rest.split_once(' ').expect("a request and a room");
            let (name, refusal) = match name.split_once(' ') {
                None => (name, ReplyError::Unavailable),
                Some((name, "forbidden")) => (name, ReplyError::Forbidden),
                Some((_, other)) => panic!("no refusal {other}"),
            };
            let request = request.parse().expect("a request");
            let member = session.joined(
                request,
                &room(name),
                if what == "joined" { Ok(()) } else { Err(refusal) },
                &mut effects,
            );
            let member = if member { "member" } else { "no member" };
            let mut all: Vec<_> = effects.drain().map(|effect| said(session, effect)).collect();
            all.push(member.to_owned());
            return all;
        }
        "heartbeat" => {
            let mut packets = Packets::default();
            session.heartbeat(&mut packets);
            packets.take().for_each(|packet| effects.push(Effect::Send(packet)));
        }
        "farewell" => {
            let reason = match rest {
                "drain" => CloseReason::Drain,
                "slow_consumer" => CloseReason::SlowConsumer,
                "memory" => CloseReason::OutOfMemory,
                "token_expired" => CloseReason::TokenExpired,
                "lost" => CloseReason::Lost,
                "bad_request" => CloseReason::BadRequest,
                "invalid_token" => CloseReason::InvalidToken,
                other => panic!("no reason {other}"),
            };
            let mut packets = Packets::default();
            session.farewell(reason, 0.5, &mut packets);
            packets.take().for_each(|packet| effects.push(Effect::Send(packet)));
        }
        other => panic!("no step {other}"),
    }
    effects.drain().map(|effect| said(session, effect)).collect()
}

fn said(session: &mut Session, effect: Effect) -> String {
    match effect {
        Effect::Send(bytes) => format!("send {}", bytes.escape_ascii()),
        Effect::Close(reason) => {
            let mut packets = Packets::default();
            session.farewell(reason, 0.5, &mut packets);
            let words = packets.take_joined().expect("somebody is there to read it");
            let (code, text) =
                words.get(2..).and_then(|payload| payload.split_at_checked(2)).expect("a close frame");
            let code = u16::from_be_bytes([code[0], code[1]]);
            format!("close {code} {}", text.escape_ascii())
        }
        Effect::Join(request, room) => format!("join {room} for {request}"),
        Effect::Leave(room) => format!("leave {room}"),
        Effect::Expires(at) => format!("expires in {} s", at.since(NOW).as_secs()),
        Effect::Limited(limit) => format!("limited {}", limit.as_str()),
        Effect::Refused(failure) => format!("refused {}", failure.as_str()),
        Effect::Publish(request, room, publication) => {
            let kind = if publication.data.as_text().is_some() { "text" } else { "binary" };
            let publisher = publication.publisher.expect("a session says who it is");
            assert_eq!((publisher.user.as_deref(), publisher.session), (Some("alice"), SESSION));
            let exclude = if publication.exclude == Some(SESSION) { " (not to itself)" } else { "" };
            let request = if request == 0 { String::new() } else { format!(" for {request}") };
            format!("publish {room} {kind} {}{exclude}{request}", publication.data.bytes().escape_ascii())
        }
    }
}

pub(super) fn room(name: &str) -> RoomName {
    RoomName::new(name).expect("a room's name")
}

const NOW: UnixSeconds = UnixSeconds(1_000_000);
const SECRET: [u8; 32] = [7; 32];

fn identity(grants: &str) -> Identity {
    authenticator().verify(&token("alice", grants, 60), NOW).expect("a valid token")
}

fn authenticator() -> Authenticator {
    Authenticator::new(AuthConfig::with_secret(&SECRET))
}

/// A token with these grants (separated by `;`) that expires in `seconds`.
fn token(subject: &str, grants: &str, seconds: u64) -> Token {
    let minted = UnixSeconds(NOW.0 - 60 + seconds);
    let subject = Subject::new(subject).expect("a subject");
    let grants: Vec<Grant> = grants.split(';').map(|grant| grant.parse().expect("a grant")).collect();
    mint::mint(&SECRET, &subject, &grants, Duration::from_secs(60), minted).expect("a token")
}

/// Replaces `<token SUBJECT GRANTS SECONDS>` with tokens.
pub(super) fn with_tokens(step: &str) -> String {
    let mut parts = step.split("<token ");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (words, rest) = part.split_once('>').expect("a token's end");
        let words: Vec<&str> = words.split(' ').collect();
        let seconds = words[2].parse().expect("seconds");
        text.push_str(token(words[0], words[1], seconds).expose());
        text.push_str(rest);
    }
    text
}

/// Undoes `escape_ascii`, as far as transcripts need it.
fn unescape(text: &str) -> Bytes {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = match (first, tail) {
            (b'\\', [b'n', tail @ ..]) => {
                bytes.push(b'\n');
                tail
            }
            (b'\\', [b'r', tail @ ..]) => {
                bytes.push(b'\r');
                tail
            }
            (b'\\', [b'x', high, low, tail @ ..]) => {
                let digits = [*high, *low];
                let digits = std::str::from_utf8(&digits).expect("two digits");
                bytes.push(u8::from_str_radix(digits, 16).expect("two hexadecimal digits"));
                tail
            }
            _ => {
                bytes.push(*first);
                tail
            }
        };
    }
    bytes.into()
}

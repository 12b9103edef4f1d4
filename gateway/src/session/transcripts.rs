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
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use broker_bridge::{BrokerError, Data, EventName, GapCause, Publication, RoomName, SessionId};
use bytes::Bytes;

use super::{
    Charge, Effect, Effects, Session, Surroundings,
    transcript::{self, Input, Opened, Refused, Transcript},
};
use crate::{
    auth::{AuthConfig, Authenticator, Grant, Identity, Keyring, Subject, Token, UnixSeconds, mint},
    clock::Time,
    config::{Config, Sources},
    framing::{Encoding, Framing, Packets, Transport},
    limits::{Allowance, Limiters, bucket::SessionMeters, tests::limits as limits_of},
    protocol::{
        self, Ask, HistoryQuery, Message, On, Opening, Protocol, Recover, RequestId, RoomFormat, Subscribed,
        TABLE, Then,
    },
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
fn check(text: &str) {
    let Transcript { session, steps } = Transcript::new(text);
    let mut client = open_as(&session);
    for step in steps {
        assert_eq!(client.play(&with_tokens(&step.input)), step.effects, "> {}", step.input);
    }
}

/// A session and its limits.
pub(super) struct Client {
    pub(super) session: Session,
    pub(super) meters: SessionMeters,
    pub(super) limiters: Limiters,
    /// What it asked to recover, by request.
    pub(super) recovering: BTreeMap<RequestId, Recover>,
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

/// What a session is told that joins a room without a history.
fn joined_without_history(recover: Option<Recover>) -> Result<Subscribed<'static>, ReplyError> {
    match recover {
        Some(Recover { or_fail: true, .. }) => Err(ReplyError::NotAvailable),
        _ => Ok(Subscribed { position: None, recovered: recover.map(|_| false), missed: &[], most: 0 }),
    }
}

pub(super) fn open(line: &str) -> Client {
    open_as(&Opened::new(line))
}

fn open_as(opened: &Opened) -> Client {
    let limits: Vec<_> = opened.limits.iter().map(|(name, rate)| (name.as_str(), rate.as_str())).collect();
    let limits = limits_of(&limits);
    Client {
        session: open_session(opened),
        meters: SessionMeters::new(&limits, Time::default()),
        limiters: Limiters::new(&limits, Time::default()),
        recovering: BTreeMap::new(),
    }
}

fn open_session(opened: &Opened) -> Session {
    let (opening, framing) = opening(opened);
    let state = (opening.protocol)();
    if opening.signs_in_later {
        return Session::to_begin(SESSION, None, state, framing);
    }
    let operations = if opened.may_publish { "subscribe,publish" } else { "subscribe" };
    let identity = Arc::new(identity(&format!("{ROOM}={operations}")));
    Session::new(SESSION, identity, state, framing)
}

/// Opens a session as a request would.
fn opening(opened: &Opened) -> (Opening, Framing) {
    let endpoint = TABLE.iter().find(|endpoint| endpoint.name.as_str() == opened.protocol);
    let several = opened.several_rooms;
    let mut routes = endpoint.expect("a protocol").routes.iter();
    let (transport, open) = routes
        .find_map(|route| match route.on {
            _ if several != (route.path == "/rooms") => None,
            On::WebSocket { open, .. } => Some((Transport::WebSocket, open)),
            On::Stream { open, .. } if !opened.on_web_socket => Some((Transport::Body, open)),
            On::Stream { .. } | On::Request { .. } => None,
        })
        .expect("a route");
    let request = http::Request::get(format!("/?{}", opened.query.join("&"))).body(()).expect("a request");
    let mut flags = vec![("sse.retry".to_owned(), "1s".to_owned())];
    if opened.protocol == "long_poll" {
        flags.push((format!(r#"rooms."{ROOM}".history.size"#), "10".to_owned()));
    }
    let config = Config::load(&Sources { flags, ..Sources::default() }).expect("a configuration");
    let settings = Settings::new(&config, Arc::new(Keyring::new(Vec::new(), Vec::new())));
    let ask =
        Ask { request: &request.into_parts().0, settings: &settings, room: (!several).then(|| room(ROOM)) };
    (open(&ask).expect("a session"), Framing::on(transport))
}

fn play(client: &mut Client, step: &str) -> Vec<String> {
    let Client { session, meters, limiters, recovering } = client;
    let mut effects = Effects::default();
    match Input::new(step) {
        Input::Client { is_text, payload } => {
            let charge = Charge::default().received(payload.len());
            let message = if is_text { Message::Text(payload) } else { Message::Binary(payload) };
            let authenticator = authenticator();
            let around = Surroundings {
                authenticator: &authenticator,
                now: NOW,
                rooms_per_session: 2,
                allowance: Allowance { session: meters, node: limiters },
            };
            session.receive(message, charge, &around, &mut Vec::new(), &mut effects);
        }
        Input::Room { room: name, is_text, event, payload } => {
            let data = if is_text { Data::detect(payload) } else { Data::binary(payload) };
            let event = event.map(|event| EventName::new(&event).expect("an event's name"));
            let publication = Publication { event, ..Publication::new(data) };
            let RoomFormat { format, .. } = session.format(&room(&name), 0);
            let encoding = Encoding::new(format, session.framing().transport);
            effects.push(Effect::Send(encoding.encode(&room(&name), &publication, None)));
        }
        Input::Gap { room: name, cause } => {
            let cause = [GapCause::Interrupted, GapCause::Oversized, GapCause::Overflow, GapCause::Dropped]
                .into_iter()
                .find(|known| known.as_str() == cause);
            session.gap(&room(&name), cause.expect("a cause"), &mut effects);
        }
        Input::Settled { request, outcome } => {
            let outcome = match outcome.as_str() {
                "ok" => Ok(()),
                "unavailable" => Err(BrokerError::Unavailable),
                "unknown" => Err(BrokerError::Unknown),
                "not_now" => Err(BrokerError::NotNow("BUSY".into())),
                "forbidden" => Err(BrokerError::Forbidden("NOPERM".into())),
                "refused" => Err(BrokerError::Refused("ERR".into())),
                other => panic!("no outcome {other}"),
            };
            session.settled(request.try_into().expect("a request"), &outcome, &mut effects);
        }
        Input::Joined { request, room: name, outcome } => {
            let request = request.try_into().expect("a request");
            let outcome = match outcome {
                Ok(()) => joined_without_history(recovering.remove(&request)),
                Err(Refused::Unavailable) => Err(ReplyError::Unavailable),
                Err(Refused::Forbidden) => Err(ReplyError::Forbidden),
            };
            let member = session.joined(request, &room(&name), outcome, &mut effects);
            let member = if member.is_some() { "member" } else { "no member" };
            let mut all: Vec<_> = effects.drain().map(|effect| said(session, effect)).collect();
            all.push(member.to_owned());
            return all;
        }
        Input::Heartbeat => {
            let mut packets = Packets::default();
            session.heartbeat(&mut packets);
            packets.take().for_each(|packet| effects.push(Effect::Send(packet)));
        }
        Input::Farewell(reason) => {
            let reason = match reason.as_str() {
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
    }
    let effects: Vec<_> = effects.drain().collect();
    for effect in &effects {
        if let Effect::Join(request, _, Some(recover)) = effect {
            recovering.insert(*request, *recover);
        }
    }
    effects.into_iter().map(|effect| said(session, effect)).collect()
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
        Effect::Join(request, room, None) => format!("join {room} for {request}"),
        Effect::Join(request, room, Some(Recover { since, or_fail })) => {
            let or_fail = if or_fail { ", or fail" } else { "" };
            format!("join {room} for {request} after {since}{or_fail}")
        }
        Effect::History(request, room, HistoryQuery { since, limit, is_reversed }) => {
            let since = since.map(|since| format!(" since {since}")).unwrap_or_default();
            let reversed = if is_reversed { ", reversed" } else { "" };
            format!("read {limit} of {room}{since}{reversed} for {request}")
        }
        Effect::Leave(room) => format!("leave {room}"),
        Effect::Verify(_) => "verify a token".to_owned(),
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

pub(super) const NOW: UnixSeconds = UnixSeconds(1_000_000);
pub(super) const SECRET: [u8; 32] = [7; 32];

fn identity(grants: &str) -> Identity {
    authenticator().verify(&token("alice", grants, 60), NOW).expect("a valid token")
}

fn authenticator() -> Authenticator {
    Authenticator::new(AuthConfig::with_secret(&SECRET))
}

/// A token with these grants (separated by `;`) that expires in `seconds`.
pub(super) fn token(subject: &str, grants: &str, seconds: u64) -> Token {
    let minted = UnixSeconds(NOW.0 - 60 + seconds);
    let subject = Subject::new(subject).expect("a subject");
    let grants: Vec<Grant> = grants.split(';').map(|grant| grant.parse().expect("a grant")).collect();
    mint::mint(&SECRET, &subject, &grants, Duration::from_secs(60), minted).expect("a token")
}

/// Replaces `<token SUBJECT GRANTS SECONDS>` with tokens.
pub(super) fn with_tokens(step: &str) -> String {
    transcript::with_tokens(step, |subject, grants, seconds| {
        token(subject, grants, seconds).expose().to_owned()
    })
}

//! What a client sends and receives, for each protocol under test, as bytes.
//!
//! Owns the protocols above a `WebSocket`: how a client joins its room, which received frames are messages,
//! and how it publishes. Knows no socket. Understands only what a client needs to stay connected and count.

use std::borrow::Cow;

use anyhow::ensure;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    place::Place,
    sse,
    target::Entrance,
    web::authorization,
    websocket::{self, Opcode},
};

/// The protocol of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// A frame's payload is the message.
    Plain,
    /// The message is somewhere in a frame.
    Raw,
    Sse,
    Centrifuge,
    SocketIo,
    /// Tidegate's JSON objects, over a `WebSocket`.
    Json,
    /// The yardstick's protocol: frames without a handshake; the server sends first.
    Bare,
}

/// The subprotocol of [`Dialect::Json`].
const JSON_SUBPROTOCOL: &str = "Sec-WebSocket-Protocol: tidegate.json\r\n";

/// Centrifuge commands have 32-bit ids: 1 is the connect, rooms follow from this id on by their numbers, then
/// publications.
const SUBSCRIBE_IDS: u64 = 2;
const PUBLISH_IDS: u64 = 1 << 31;

/// After an unsubscribe with a code from here on, SDKs resubscribe automatically.
const COME_BACK_FROM: u32 = 2500;

/// The identity of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Seat {
    /// Its number among all clients of the run.
    pub user: u32,
    /// The room it is in; the first if there are several.
    pub room: u32,
    /// How many consecutive rooms it is in. Only Centrifuge supports more than one.
    pub rooms: u32,
    /// Whether it stays connected when the server removes it from a room.
    pub stays: bool,
    /// The position that it comes back with, in a room with a history.
    pub since: Option<Place>,
    /// Whether it receives the room's messages. A client that only publishes need not, if the protocol allows
    /// it.
    pub listens: bool,
}

/// What a client has to send before it is ready.
#[derive(Debug, Default)]
pub struct Opening {
    /// Sent once the transport is open; empty if the server sends first.
    pub request: Vec<u8>,
    /// Payloads of text frames, each sent when the server's frame asks for it.
    pub steps: Vec<Vec<u8>>,
    /// How many answers are still to come.
    pub awaited: u32,
    /// When the connection was started.
    pub begun: u64,
}

/// The meaning of a text frame from the server.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard<'a> {
    /// A message, possibly in an envelope.
    Message(&'a [u8]),
    /// The position of the next message, or of the start of the subscription. Centrifuge names the epoch only
    /// when a client subscribes.
    Position { epoch: Option<u64>, offset: u64 },
    /// Messages may be missing at this point, for this reason.
    Gap(Cow<'a, str>),
    /// The client should send the next step of the opening.
    Next,
    /// An awaited answer has arrived, with its room if several can be joined.
    Answered(Option<u32>),
    /// The server has removed the connection from one room, with a code that allows it to resubscribe.
    Left(Cow<'a, str>),
    /// The client must answer with this payload.
    Reply(&'static [u8]),
    /// A publication was accepted, if the protocol says so.
    Accepted,
    /// A publication was refused.
    Refused(String),
    /// The server has ended the connection.
    Ended(String),
}

impl Dialect {
    /// Whether the connection is a `WebSocket`.
    pub fn is_framed(self) -> bool {
        self != Self::Sse
    }

    /// What the client in `seat` sends to join.
    pub fn opening(self, entrance: &Entrance, seat: Seat) -> anyhow::Result<Opening> {
        let path = entrance.address.path(seat.room);
        let authority = &entrance.address.authority;
        let token = entrance.credentials.of(seat.user)?;
        let token = token.as_deref();
        let json = |text: &str| serde_json::to_string(text);
        let said = |token| authorization(entrance.address.basic.as_ref(), token);
        let upgrade = |token| websocket::upgrade_request(authority, &path, &said(token), entrance.deflate);
        let mut opening = Opening::default();
        ensure!(
            seat.rooms == 1 || self == Self::Centrifuge,
            "only the Centrifuge protocol supports several rooms on one connection"
        );
        match self {
            Self::Bare => {}
            Self::Plain | Self::Raw => opening.request = upgrade(token),
            Self::Json => {
                let since = seat
                    .since
                    .map(|since| format!("{}since={since}", if path.contains('?') { '&' } else { '?' }));
                let path = path + &since.unwrap_or_default();
                let headers = said(token) + JSON_SUBPROTOCOL;
                opening.request = websocket::upgrade_request(authority, &path, &headers, entrance.deflate);
            }
            Self::Sse => {
                let since = seat.since.map(|since| format!("Last-Event-ID: {since}\r\n"));
                let headers = said(token) + &since.unwrap_or_default();
                opening.request = sse::request(authority, &path, &headers);
            }
            Self::Centrifuge => {
                opening.request = upgrade(None);
                let mut words = match token {
                    Some(token) => format!(r#"{{"id":1,"connect":{{"token":{}}}}}"#, json(token)?),
                    None => r#"{"id":1,"connect":{}}"#.to_owned(),
                };
                opening.awaited = 1;
                if seat.listens {
                    for room in seat.room..seat.room + seat.rooms {
                        words.push('\n');
                        words += &subscribe(entrance, room, seat.since)?;
                    }
                    opening.awaited += seat.rooms;
                }
                opening.steps.push(words.into_bytes());
            }
            Self::SocketIo => {
                opening.request = upgrade(token);
                opening.steps.push(match token {
                    Some(token) => format!(r#"40{{"token":{}}}"#, json(token)?).into_bytes(),
                    None => b"40".to_vec(),
                });
                opening.awaited = 1;
                if seat.listens {
                    let words = format!(r#"420["join",{}]"#, json(&entrance.channel(seat.room))?);
                    opening.steps.push(words.into_bytes());
                    opening.awaited = 2;
                }
            }
        }
        // In reverse, because steps are popped from the end.
        opening.steps.reverse();
        Ok(opening)
    }

    /// Interprets the text frame `payload`.
    pub fn hear<'a>(self, payload: &'a [u8], mut each: impl FnMut(Heard<'a>)) {
        match self {
            Self::Plain | Self::Raw | Self::Bare | Self::Sse => each(Heard::Message(payload)),
            Self::Centrifuge => payload
                .split(|&byte| byte == b'\n')
                .filter(|line| !line.is_empty())
                .for_each(|line| hear_centrifuge(line, &mut each)),
            Self::Json => hear_json(payload, each),
            Self::SocketIo => hear_socket_io(payload, each),
        }
    }

    /// Appends the frame that publishes `payload`, a JSON string, to room `room`. `number` differs with every
    /// call.
    pub fn publish(self, entrance: &Entrance, room: u32, payload: &[u8], number: u64, out: &mut Vec<u8>) {
        let (before, after): (String, &[u8]) = match self {
            Self::Plain | Self::Raw | Self::Sse | Self::Bare => (String::new(), b""),
            Self::Json => (r#"{"data":"#.to_owned(), b"}"),
            Self::Centrifuge => {
                let channel = serde_json::Value::from(entrance.channel(room));
                let id = number % (u64::from(u32::MAX) - PUBLISH_IDS) + PUBLISH_IDS;
                (format!(r#"{{"id":{id},"publish":{{"channel":{channel},"data":"#), b"}}")
            }
            Self::SocketIo => {
                let channel = serde_json::Value::from(entrance.channel(room));
                (format!(r#"42["m",{channel},"#), b"]")
            }
        };
        websocket::write_masked(out, Opcode::Text, &[before.as_bytes(), payload, after], number);
    }
}

/// The Centrifuge command that subscribes to room `room`, and recovers what came after `since`.
pub fn subscribe(entrance: &Entrance, room: u32, since: Option<Place>) -> anyhow::Result<String> {
    let channel = serde_json::to_string(&entrance.channel(room))?;
    let id = SUBSCRIBE_IDS + u64::from(room);
    let recover = since
        .map(|Place { epoch, offset }| format!(r#","recover":true,"epoch":"{epoch}","offset":{offset}"#));
    let recover = recover.unwrap_or_default();
    Ok(format!(r#"{{"id":{id},"subscribe":{{"channel":{channel}{recover}}}}}"#))
}

/// Interprets one JSON object of Tidegate.
fn hear_json<'a>(payload: &'a [u8], mut each: impl FnMut(Heard<'a>)) {
    #[derive(Deserialize)]
    struct Line<'a> {
        id: Option<&'a str>,
        #[serde(borrow)]
        gap: Option<Cow<'a, str>>,
        #[serde(borrow)]
        error: Option<Cow<'a, str>>,
    }
    /// Room, position and event come before the data, and the event has at most 64 bytes.
    const HEAD: usize = 1024;
    let position = |id: &[u8]| {
        Place::parse(id).map(|Place { epoch, offset }| Heard::Position { epoch: Some(epoch), offset })
    };
    // Publications arrive by the million, so they are recognised by a member's name and not parsed. Quotes in a
    // string are escaped, so no string looks like one.
    let head = payload.get(..payload.len().min(HEAD)).unwrap_or_default();
    let data = [&b",\"data\":"[..], b",\"base64\":"].iter().find_map(|&name| find(head, name));
    if let Some(head) = data.and_then(|at| head.get(..at)) {
        let id = find(head, br#","id":""#).and_then(|at| head.get(at + 7..));
        let id = id.and_then(|rest| rest.split(|&byte| byte == b'"').next());
        id.and_then(position).into_iter().for_each(&mut each);
        return each(Heard::Message(payload));
    }
    let Ok(line) = serde_json::from_slice::<Line>(payload) else {
        return each(Heard::Ended("the server does not speak tidegate.json".into()));
    };
    line.id.and_then(|id| position(id.as_bytes())).into_iter().for_each(&mut each);
    if let Some(cause) = line.gap {
        each(Heard::Gap(cause));
    }
    if let Some(why) = line.error {
        each(Heard::Refused(why.into_owned()));
    }
}

/// Where `what` begins in `bytes`.
fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// The offset in a line that pushes a publication: the first or the last field beside its data.
fn pushed_offset(line: &[u8]) -> Option<u64> {
    const FIELD: &[u8] = br#""offset":"#;
    const FRONT: &[u8] = br#""pub":{"offset":"#;
    /// The field, the 20 digits of a large number, and the closing braces.
    const TAIL: usize = FIELD.len() + 20 + 3;
    let digits = |rest: &[u8]| {
        let end = rest.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(rest.len());
        std::str::from_utf8(rest.get(..end)?).ok()?.parse().ok()
    };
    let head = line.get(..line.len().min(256)).unwrap_or_default();
    if let Some(at) = head.windows(FRONT.len()).position(|window| window == FRONT) {
        return digits(line.get(at + FRONT.len()..)?);
    }
    let tail = line.get(line.len().saturating_sub(TAIL)..)?;
    let at = tail.windows(FIELD.len()).rposition(|window| window == FIELD)?;
    digits(tail.get(at + FIELD.len()..)?)
}

/// The result of a Centrifuge subscription: a position, and what the client has missed, if it recovers.
#[derive(Deserialize)]
struct Subscribed<'a> {
    #[serde(borrow, default)]
    epoch: Cow<'a, str>,
    #[serde(default)]
    offset: u64,
    #[serde(default)]
    recovered: bool,
    #[serde(default)]
    was_recovering: bool,
    #[serde(borrow, default)]
    publications: Vec<Missed<'a>>,
}

#[derive(Deserialize)]
struct Missed<'a> {
    #[serde(borrow)]
    data: &'a RawValue,
    #[serde(default)]
    offset: u64,
}

impl<'a> Subscribed<'a> {
    fn hear(&self, each: &mut impl FnMut(Heard<'a>)) {
        let epoch = self.epoch.parse().ok();
        if self.was_recovering && !self.recovered {
            each(Heard::Gap(Cow::Borrowed("unrecovered")));
        }
        for missed in &self.publications {
            each(Heard::Position { epoch, offset: missed.offset });
            each(Heard::Message(missed.data.get().as_bytes()));
        }
        if let Some(epoch) = epoch {
            each(Heard::Position { epoch: Some(epoch), offset: self.offset });
        }
    }
}

/// Interprets one line of the Centrifuge protocol.
fn hear_centrifuge<'a>(line: &'a [u8], each: &mut impl FnMut(Heard<'a>)) {
    #[derive(Deserialize)]
    struct Reply<'a> {
        #[serde(default)]
        id: u64,
        error: Option<Problem>,
        #[serde(borrow)]
        push: Option<Push<'a>>,
        #[serde(borrow)]
        subscribe: Option<Subscribed<'a>>,
    }
    #[derive(Deserialize)]
    struct Problem {
        code: u32,
        #[serde(default)]
        message: String,
    }
    #[derive(Deserialize)]
    struct Push<'a> {
        #[serde(borrow, default)]
        channel: Cow<'a, str>,
        unsubscribe: Option<Left>,
        disconnect: Option<Left>,
    }
    #[derive(Deserialize)]
    struct Left {
        #[serde(default)]
        code: u32,
    }
    if line == b"{}" {
        return each(Heard::Reply(b"{}"));
    }
    // Publications arrive by the million, so they are recognised by their first bytes and not parsed.
    if line.starts_with(br#"{"push":{"#) && line.windows(7).any(|window| window == br#""pub":{"#) {
        if let Some(offset) = pushed_offset(line) {
            each(Heard::Position { epoch: None, offset });
        }
        return each(Heard::Message(line));
    }
    let Ok(reply) = serde_json::from_slice::<Reply>(line) else {
        return each(Heard::Ended("the server does not speak the Centrifuge protocol".into()));
    };
    if let Some(subscribed) = reply.subscribe.as_ref().filter(|_| reply.error.is_none()) {
        subscribed.hear(each);
    }
    let heard = match reply {
        Reply { push: Some(Push { unsubscribe: Some(left), channel, .. }), .. }
            if left.code >= COME_BACK_FROM =>
        {
            Some(Heard::Left(channel))
        }
        Reply { push: Some(Push { unsubscribe: Some(left), .. }), .. } => {
            Some(Heard::Ended(format!("unsubscribed by the server with code {}", left.code)))
        }
        Reply { push: Some(Push { disconnect: Some(left), .. }), .. } => {
            Some(Heard::Ended(format!("disconnected by the server with code {}", left.code)))
        }
        Reply { push: Some(_), .. } => None,
        Reply { id: id @ 1..PUBLISH_IDS, error: Some(problem), .. } => {
            let what = if id == 1 { "connecting" } else { "subscribing" };
            Some(Heard::Ended(format!(
                "{what} was refused with error {} ({})",
                problem.code, problem.message
            )))
        }
        Reply { error: Some(problem), .. } => {
            Some(Heard::Refused(format!("error {} ({})", problem.code, problem.message)))
        }
        Reply { id: 1, .. } => Some(Heard::Answered(None)),
        Reply { id: id @ SUBSCRIBE_IDS..PUBLISH_IDS, .. } => {
            Some(Heard::Answered(u32::try_from(id - SUBSCRIBE_IDS).ok()))
        }
        Reply { id: PUBLISH_IDS.., .. } => Some(Heard::Accepted),
        Reply { .. } => None,
    };
    heard.into_iter().for_each(each);
}

fn hear_socket_io<'a>(payload: &'a [u8], mut each: impl FnMut(Heard<'a>)) {
    match payload {
        [b'4', b'2', ..] => each(Heard::Message(payload)),
        [b'2', ..] => each(Heard::Reply(b"3")),
        [b'0', ..] => each(Heard::Next),
        [b'4', b'0', ..] => {
            each(Heard::Answered(None));
            each(Heard::Next);
        }
        [b'4', b'3', ..] => each(Heard::Answered(None)),
        [b'4', b'4', ..] => {
            each(Heard::Ended(format!("connecting was refused: {}", String::from_utf8_lossy(payload))));
        }
        [b'1', ..] | [b'4', b'1', ..] => each(Heard::Ended("disconnected by the server".into())),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_connection_in_many_rooms() {
        let channel = "load:{room}".to_owned();
        let address = crate::target::Address {
            socket: ([127, 0, 0, 1], 1).into(),
            tls: None,
            authority: "x".into(),
            path_and_query: "/".into(),
            basic: None,
        };
        let credentials = crate::token::Credentials::None;
        let entrance = Entrance {
            address,
            dialect: Dialect::Centrifuge,
            channel,
            credentials,
            source_addresses: 0,
            deflate: false,
        };
        let seat = Seat { user: 0, room: 7, rooms: 3, stays: false, since: None, listens: true };
        let opening = Dialect::Centrifuge.opening(&entrance, seat).unwrap();
        assert_eq!(opening.awaited, 4);
        let words = String::from_utf8(opening.steps.concat()).unwrap();
        let lines: Vec<_> = words.lines().collect();
        assert_eq!(lines.len(), 4, "{words}");
        assert_eq!(lines[3], r#"{"id":11,"subscribe":{"channel":"load:9"}}"#);
        assert_eq!(
            (entrance.room("load:9"), entrance.room("load:"), entrance.room("9")),
            (Some(9), None, None)
        );
        assert!(Dialect::Plain.opening(&entrance, seat).is_err());
        let since = Some(Place { epoch: 17, offset: 42 });
        assert_eq!(
            subscribe(&entrance, 9, since).unwrap(),
            r#"{"id":11,"subscribe":{"channel":"load:9","recover":true,"epoch":"17","offset":42}}"#
        );
        // Where the position is sent in the other protocols.
        let seat = Seat { rooms: 1, since, ..seat };
        let request = |dialect: Dialect| String::from_utf8(dialect.opening(&entrance, seat).unwrap().request);
        assert!(request(Dialect::Json).unwrap().starts_with("GET /?since=17-42 HTTP/1.1\r\n"));
        assert!(request(Dialect::Json).unwrap().contains("\r\nSec-WebSocket-Protocol: tidegate.json\r\n"));
        assert!(request(Dialect::Sse).unwrap().contains("\r\nLast-Event-ID: 17-42\r\n"));
    }

    #[test]
    fn positions_and_gaps_of_json_objects() {
        let at = |offset| Heard::Position { epoch: Some(17), offset };
        let message = r#"{"room":"x","id":"17-43","event":"e","data":"…"}"#;
        assert_eq!(heard(Dialect::Json, message), [at(43), Heard::Message(message.as_bytes())]);
        assert_eq!(heard(Dialect::Json, r#"{"room":"x","id":"17-42"}"#), [at(42)]);
        assert_eq!(heard(Dialect::Json, r#"{"room":"x","gap":"trimmed"}"#), [Heard::Gap("trimmed".into())]);
        let refused = heard(Dialect::Json, r#"{"error":"permission denied","temporary":false}"#);
        assert_eq!(refused, [Heard::Refused("permission denied".into())]);
        assert!(matches!(heard(Dialect::Json, "\"plain\"").as_slice(), [Heard::Ended(_)]));
    }

    #[test]
    fn positions_and_recovered_publications_of_centrifuge() {
        let at = |offset| Heard::Position { epoch: Some(17), offset };
        let reply = r#"{"id":9,"subscribe":{"recoverable":true,"epoch":"17","offset":43,"was_recovering":true,
            "recovered":true,"publications":[{"data":"a","offset":42},{"data":{"b":1},"offset":43}]}}"#;
        let reply = reply.replace('\n', " ");
        let (first, second) = (Heard::Message(b"\"a\""), Heard::Message(b"{\"b\":1}"));
        let expected = [at(42), first, at(43), second, at(43), Heard::Answered(Some(7))];
        assert_eq!(heard(Dialect::Centrifuge, &reply), expected);
        let lost = r#"{"id":9,"subscribe":{"epoch":"17","offset":43,"was_recovering":true}}"#;
        let expected = [Heard::Gap("unrecovered".into()), at(43), Heard::Answered(Some(7))];
        assert_eq!(heard(Dialect::Centrifuge, lost), expected);
        for push in [
            r#"{"push":{"channel":"x","pub":{"data":"…","offset":44}}}"#,
            r#"{"push":{"channel":"x","pub":{"offset":44,"data":"…"}}}"#,
        ] {
            let expected = [Heard::Position { epoch: None, offset: 44 }, Heard::Message(push.as_bytes())];
            assert_eq!(heard(Dialect::Centrifuge, push), expected);
        }
    }

    fn heard(dialect: Dialect, payload: &str) -> Vec<Heard<'_>> {
        let mut all = Vec::new();
        dialect.hear(payload.as_bytes(), |heard| all.push(heard));
        all
    }

    #[test]
    fn centrifuge_lines() {
        let publication = r#"{"push":{"channel":"x","pub":{"data":"…"}}}"#;
        let lines = format!(
            "{{}}\n{publication}\n{{\"id\":2,\"subscribe\":{{}}}}\n{{\"id\":3000000000,\"publish\":{{}}}}\n"
        );
        assert_eq!(
            heard(Dialect::Centrifuge, &lines),
            [
                Heard::Reply(b"{}"),
                Heard::Message(publication.as_bytes()),
                Heard::Answered(Some(0)),
                Heard::Accepted
            ]
        );
        for (line, words) in [
            (
                r#"{"id":1,"error":{"code":101,"message":"unauthorized"}}"#,
                "connecting was refused with error 101",
            ),
            (r#"{"id":2,"error":{"code":103}}"#, "subscribing was refused with error 103"),
            (r#"{"push":{"channel":"x","unsubscribe":{"code":2000}}}"#, "code 2000"),
            (r#"{"push":{"disconnect":{"code":3001,"reason":"shutdown"}}}"#, "code 3001"),
            ("hello", "does not speak"),
        ] {
            match heard(Dialect::Centrifuge, line).as_slice() {
                [Heard::Ended(why)] => assert!(why.contains(words), "{why}"),
                other => panic!("{line}: {other:?}"),
            }
        }
        assert_eq!(
            heard(Dialect::Centrifuge, r#"{"id":3000000000,"error":{"code":103,"message":"denied"}}"#),
            [Heard::Refused("error 103 (denied)".into())]
        );
        let left = heard(Dialect::Centrifuge, r#"{"push":{"channel":"x","unsubscribe":{"code":2500}}}"#);
        assert_eq!(left, [Heard::Left("x".into())]);
        assert_eq!(heard(Dialect::Centrifuge, r#"{"push":{"channel":"x","join":{"info":{}}}}"#), []);
    }

    #[test]
    fn socket_io_packets() {
        assert_eq!(heard(Dialect::SocketIo, r#"0{"sid":"x"}"#), [Heard::Next]);
        assert_eq!(heard(Dialect::SocketIo, r#"40{"sid":"y"}"#), [Heard::Answered(None), Heard::Next]);
        assert_eq!(heard(Dialect::SocketIo, "430[]"), [Heard::Answered(None)]);
        assert_eq!(heard(Dialect::SocketIo, "2"), [Heard::Reply(b"3")]);
        assert_eq!(heard(Dialect::SocketIo, r#"42["m","x"]"#), [Heard::Message(br#"42["m","x"]"#)]);
        assert!(matches!(heard(Dialect::SocketIo, "44{}").as_slice(), [Heard::Ended(_)]));
    }
}

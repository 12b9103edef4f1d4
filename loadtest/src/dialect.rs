//! What a client sends and receives, for each protocol under test, as bytes.
//!
//! Owns the protocols above a `WebSocket`: how a client joins its room, which received frames are messages,
//! and how it publishes. Knows no socket. Understands only what a client needs to stay connected and count.

use std::borrow::Cow;

use anyhow::ensure;
use serde::Deserialize;

use crate::{
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
    /// The yardstick's protocol: frames without a handshake; the server sends first.
    Bare,
}

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
            Self::Sse => opening.request = sse::request(authority, &path, &said(token)),
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
                        words += &subscribe(entrance, room)?;
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
                .filter_map(hear_centrifuge)
                .for_each(each),
            Self::SocketIo => hear_socket_io(payload, each),
        }
    }

    /// Appends the frame that publishes `payload`, a JSON string, to room `room`. `number` differs with every
    /// call.
    pub fn publish(self, entrance: &Entrance, room: u32, payload: &[u8], number: u64, out: &mut Vec<u8>) {
        let (before, after): (String, &[u8]) = match self {
            Self::Plain | Self::Raw | Self::Sse | Self::Bare => (String::new(), b""),
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

/// The Centrifuge command that subscribes to room `room`.
pub fn subscribe(entrance: &Entrance, room: u32) -> anyhow::Result<String> {
    let channel = serde_json::to_string(&entrance.channel(room))?;
    let id = SUBSCRIBE_IDS + u64::from(room);
    Ok(format!(r#"{{"id":{id},"subscribe":{{"channel":{channel}}}}}"#))
}

/// Interprets one line of the Centrifuge protocol; `None` if it requires nothing.
fn hear_centrifuge(line: &[u8]) -> Option<Heard<'_>> {
    #[derive(Deserialize)]
    struct Reply<'a> {
        #[serde(default)]
        id: u64,
        error: Option<Problem>,
        #[serde(borrow)]
        push: Option<Push<'a>>,
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
        return Some(Heard::Reply(b"{}"));
    }
    // Publications arrive by the million, so they are recognised by their first bytes and not parsed.
    if line.starts_with(br#"{"push":{"#) && line.windows(7).any(|window| window == br#""pub":{"#) {
        return Some(Heard::Message(line));
    }
    let Ok(reply) = serde_json::from_slice::<Reply>(line) else {
        return Some(Heard::Ended("the server does not speak the Centrifuge protocol".into()));
    };
    match reply {
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
    }
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
        let seat = Seat { user: 0, room: 7, rooms: 3, stays: false, listens: true };
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

//! What a client says and hears, for each protocol under test, as bytes.
//!
//! Owns the words of the protocols above a `WebSocket`: how a client gets into its room, which of the things
//! it hears are messages, and how it publishes. Knows no socket. What is understood is the least that lets a
//! client stay and count: everything else is the server's affair.

use serde::Deserialize;

use crate::{
    sse,
    target::Entrance,
    websocket::{self, Opcode},
};

/// How a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// A frame's payload is the message.
    Plain,
    /// The message stands somewhere in a frame.
    Raw,
    Sse,
    Centrifuge,
    SocketIo,
    /// The yardstick: frames without a handshake, and the server speaks first.
    Bare,
}

/// Who a connection is.
#[derive(Clone, Copy, Debug)]
pub struct Seat {
    /// Its number among all clients of the run.
    pub user: u32,
    /// The room it is in.
    pub room: u32,
    /// Whether it hears the room. One that only publishes need not, where the protocol lets it.
    pub listens: bool,
}

/// What a client has to say before it stands.
#[derive(Debug, Default)]
pub struct Opening {
    /// Once the transport stands; empty if the server speaks first.
    pub request: Vec<u8>,
    /// Payloads of text frames, each after the server's word that calls for it.
    pub steps: Vec<Vec<u8>>,
    /// How many answers are still to come.
    pub awaited: u32,
    /// When the connection was begun.
    pub begun: u64,
}

/// What a text frame from the server amounts to.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard<'a> {
    /// A message, perhaps in an envelope.
    Message(&'a [u8]),
    /// The next step of the opening is called for.
    Next,
    /// One awaited answer has come.
    Answered,
    /// To be answered with this payload.
    Reply(&'static [u8]),
    /// A publication was refused.
    Refused(String),
    /// The server has ended it.
    Ended(String),
}

impl Dialect {
    /// Whether the connection is a `WebSocket`.
    pub fn is_framed(self) -> bool {
        self != Self::Sse
    }

    /// What the client in `seat` says to get in.
    pub fn opening(self, entrance: &Entrance, seat: Seat) -> anyhow::Result<Opening> {
        let path = entrance.address.path(seat.room);
        let authority = &entrance.address.authority;
        let token = entrance.credentials.of(seat.user)?;
        let token = token.as_deref();
        let json = |text: &str| serde_json::to_string(text);
        let upgrade = |token| websocket::upgrade_request(authority, &path, token, entrance.deflate);
        let mut opening = Opening::default();
        match self {
            Self::Bare => {}
            Self::Plain | Self::Raw => opening.request = upgrade(token),
            Self::Sse => opening.request = sse::request(authority, &path, token),
            Self::Centrifuge => {
                opening.request = upgrade(None);
                let mut words = match token {
                    Some(token) => format!(r#"{{"id":1,"connect":{{"token":{}}}}}"#, json(token)?),
                    None => r#"{"id":1,"connect":{}}"#.to_owned(),
                };
                opening.awaited = 1;
                if seat.listens {
                    let channel = json(&entrance.channel(seat.room))?;
                    words = format!("{words}\n{{\"id\":2,\"subscribe\":{{\"channel\":{channel}}}}}");
                    opening.awaited = 2;
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
        // Said last to first.
        opening.steps.reverse();
        Ok(opening)
    }

    /// Takes apart the text frame `payload`.
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

    /// Appends the frame that publishes `payload`, a JSON string, to room `room`. `number` differs from call
    /// to call.
    pub fn publish(self, entrance: &Entrance, room: u32, payload: &[u8], number: u64, out: &mut Vec<u8>) {
        let (before, after): (String, &[u8]) = match self {
            Self::Plain | Self::Raw | Self::Sse | Self::Bare => (String::new(), b""),
            Self::Centrifuge => {
                let channel = serde_json::Value::from(entrance.channel(room));
                // Replies need an id, and those below are the opening's.
                let id = number % u64::from(u32::MAX - 8) + 8;
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

/// One line of the Centrifuge protocol; `None` if it asks for nothing.
fn hear_centrifuge(line: &[u8]) -> Option<Heard<'_>> {
    #[derive(Deserialize)]
    struct Reply {
        #[serde(default)]
        id: u64,
        error: Option<Problem>,
        push: Option<Push>,
    }
    #[derive(Deserialize)]
    struct Problem {
        code: u32,
        #[serde(default)]
        message: String,
    }
    #[derive(Deserialize)]
    struct Push {
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
    // The one shape that comes by the million is known by its head and not parsed.
    if line.starts_with(br#"{"push":{"#) && line.windows(7).any(|window| window == br#""pub":{"#) {
        return Some(Heard::Message(line));
    }
    let Ok(reply) = serde_json::from_slice::<Reply>(line) else {
        return Some(Heard::Ended("the server does not speak the Centrifuge protocol".into()));
    };
    match reply {
        Reply { push: Some(Push { unsubscribe: Some(left), .. }), .. } => {
            Some(Heard::Ended(format!("unsubscribed by the server with code {}", left.code)))
        }
        Reply { push: Some(Push { disconnect: Some(left), .. }), .. } => {
            Some(Heard::Ended(format!("disconnected by the server with code {}", left.code)))
        }
        Reply { push: Some(_), .. } => None,
        Reply { id: id @ (1 | 2), error: Some(problem), .. } => {
            let what = if id == 1 { "connecting" } else { "subscribing" };
            Some(Heard::Ended(format!(
                "{what} was refused with error {} ({})",
                problem.code, problem.message
            )))
        }
        Reply { error: Some(problem), .. } => {
            Some(Heard::Refused(format!("error {} ({})", problem.code, problem.message)))
        }
        Reply { id: 1 | 2, .. } => Some(Heard::Answered),
        Reply { .. } => None,
    }
}

fn hear_socket_io<'a>(payload: &'a [u8], mut each: impl FnMut(Heard<'a>)) {
    match payload {
        [b'4', b'2', ..] => each(Heard::Message(payload)),
        [b'2', ..] => each(Heard::Reply(b"3")),
        [b'0', ..] => each(Heard::Next),
        [b'4', b'0', ..] => {
            each(Heard::Answered);
            each(Heard::Next);
        }
        [b'4', b'3', ..] => each(Heard::Answered),
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

    fn heard(dialect: Dialect, payload: &str) -> Vec<Heard<'_>> {
        let mut all = Vec::new();
        dialect.hear(payload.as_bytes(), |heard| all.push(heard));
        all
    }

    #[test]
    fn centrifuge_lines() {
        let publication = r#"{"push":{"channel":"x","pub":{"data":"…"}}}"#;
        let lines =
            format!("{{}}\n{publication}\n{{\"id\":2,\"subscribe\":{{}}}}\n{{\"id\":9,\"publish\":{{}}}}\n");
        assert_eq!(
            heard(Dialect::Centrifuge, &lines),
            [Heard::Reply(b"{}"), Heard::Message(publication.as_bytes()), Heard::Answered]
        );
        for (line, words) in [
            (
                r#"{"id":1,"error":{"code":101,"message":"unauthorized"}}"#,
                "connecting was refused with error 101",
            ),
            (r#"{"id":2,"error":{"code":103}}"#, "subscribing was refused with error 103"),
            (r#"{"push":{"channel":"x","unsubscribe":{"code":2500}}}"#, "code 2500"),
            (r#"{"push":{"disconnect":{"code":3001,"reason":"shutdown"}}}"#, "code 3001"),
            ("hello", "does not speak"),
        ] {
            match heard(Dialect::Centrifuge, line).as_slice() {
                [Heard::Ended(why)] => assert!(why.contains(words), "{why}"),
                other => panic!("{line}: {other:?}"),
            }
        }
        assert_eq!(
            heard(Dialect::Centrifuge, r#"{"id":9,"error":{"code":103,"message":"denied"}}"#),
            [Heard::Refused("error 103 (denied)".into())]
        );
        assert_eq!(heard(Dialect::Centrifuge, r#"{"push":{"channel":"x","join":{"info":{}}}}"#), []);
    }

    #[test]
    fn socket_io_packets() {
        assert_eq!(heard(Dialect::SocketIo, r#"0{"sid":"x"}"#), [Heard::Next]);
        assert_eq!(heard(Dialect::SocketIo, r#"40{"sid":"y"}"#), [Heard::Answered, Heard::Next]);
        assert_eq!(heard(Dialect::SocketIo, "430[]"), [Heard::Answered]);
        assert_eq!(heard(Dialect::SocketIo, "2"), [Heard::Reply(b"3")]);
        assert_eq!(heard(Dialect::SocketIo, r#"42["m","x"]"#), [Heard::Message(br#"42["m","x"]"#)]);
        assert!(matches!(heard(Dialect::SocketIo, "44{}").as_slice(), [Heard::Ended(_)]));
    }
}

//! Golden transcripts: what each protocol says, word for word.
//!
//! A transcript is a file of steps. Lines that begin with `>` are what happens to a session, the lines
//! below each are everything that follows from it:
//!
//! ```text
//! session plain echo=false gap=close publish      the door, its options, and the grants beside subscribe
//! > client text hi                                a message of the client
//! publish lobby text hi                           … is handed to the broker
//! > room lobby text hello                         a publication
//! send \x81\x05hello                              … these bytes go out
//! > gap lobby interrupted
//! close 1012 messages may have been missed
//! ```
//!
//! Payloads and bytes are written as Rust writes byte strings.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use broker_bridge::{BrokerError, Data, EventName, GapCause, Publication, RoomName, SessionId};
use bytes::Bytes;

use super::{CloseReason, Effect, Session};
use crate::{
    auth::{AuthConfig, Authenticator, Grant, Identity, Subject, UnixSeconds, mint},
    protocol::{Message, Protocol, event_stream::EventStream, plain::Plain},
};

#[test]
fn plain() {
    check(include_str!("transcripts/plain.txt"));
}

#[test]
fn plain_without_echo_closed_at_a_gap() {
    check(include_str!("transcripts/plain_options.txt"));
}

#[test]
fn plain_without_a_grant_to_publish() {
    check(include_str!("transcripts/plain_listener.txt"));
}

#[test]
fn event_stream() {
    check(include_str!("transcripts/event_stream.txt"));
}

#[test]
fn event_stream_of_several_rooms() {
    check(include_str!("transcripts/event_stream_rooms.txt"));
}

const ROOM: &str = "lobby";
const SESSION: SessionId = SessionId(7);

/// Plays the steps again and compares all that is said with the file.
fn check(transcript: &str) {
    let mut lines = transcript.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let first = lines.next().expect("a transcript begins with its session");
    let mut session = open(first);
    let mut played = format!("{first}\n");
    let expected =
        std::iter::once(first).chain(lines.clone()).fold(String::new(), |all, line| all + line + "\n");
    for step in lines.filter_map(|line| line.strip_prefix("> ")) {
        writeln!(played, "> {step}").expect("a string takes everything");
        for said in play(&mut session, step) {
            writeln!(played, "{said}").expect("a string takes everything");
        }
    }
    assert_eq!(played, expected);
}

fn open(line: &str) -> Session {
    let mut words = line.split(' ');
    assert_eq!(words.next(), Some("session"));
    let door = words.next().expect("a door");
    let options: Vec<&str> = words.collect();
    let protocol = match door {
        "plain" => Protocol::Plain(Plain {
            room: room(ROOM),
            echo: !options.contains(&"echo=false"),
            close_on_gap: options.contains(&"gap=close"),
        }),
        "event_stream" => Protocol::EventStream(EventStream {
            several_rooms: options.contains(&"several_rooms"),
            retry_millis: 1000,
        }),
        other => panic!("no door {other}"),
    };
    let operations = if options.contains(&"publish") { "subscribe,publish" } else { "subscribe" };
    Session::new(SESSION, Arc::new(identity(&format!("{ROOM}={operations}"))), protocol)
}

fn play(session: &mut Session, step: &str) -> Vec<String> {
    let mut effects = Vec::new();
    let (what, rest) = step.split_once(' ').unwrap_or((step, ""));
    match what {
        "client" => {
            let (kind, payload) = rest.split_once(' ').unwrap_or((rest, ""));
            let payload = unescape(payload);
            let message = if kind == "text" { Message::Text(payload) } else { Message::Binary(payload) };
            session.receive(message, &mut Vec::new(), &mut effects);
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
            effects.push(Effect::Send(session.protocol().format().encode(&room(name), &publication)));
        }
        "gap" => {
            let (name, cause) = rest.split_once(' ').expect("a room and a cause");
            let cause = [GapCause::Interrupted, GapCause::Oversized, GapCause::Overflow]
                .into_iter()
                .find(|known| known.as_str() == cause);
            session.gap(&room(name), cause.expect("a cause"), &mut effects);
        }
        "settled" => {
            let outcome = match rest {
                "ok" => Ok(()),
                "unavailable" => Err(BrokerError::Unavailable),
                "unknown" => Err(BrokerError::Unknown),
                other => panic!("no outcome {other}"),
            };
            session.settled(&outcome, &mut effects);
        }
        "heartbeat" => effects.push(Effect::Send(session.protocol().heartbeat())),
        "farewell" => {
            let reason = match rest {
                "drain" => CloseReason::Drain,
                "slow_consumer" => CloseReason::SlowConsumer,
                "token_expired" => CloseReason::TokenExpired,
                "lost" => CloseReason::Lost,
                other => panic!("no reason {other}"),
            };
            effects.extend(session.protocol().farewell(reason, 0.5).map(Effect::Send));
        }
        other => panic!("no step {other}"),
    }
    effects.into_iter().map(said).collect()
}

fn said(effect: Effect) -> String {
    match effect {
        Effect::Send(bytes) => format!("send {}", bytes.escape_ascii()),
        Effect::Close(reason) => {
            let (code, text) = reason.plain_close().expect("somebody is there to read it");
            format!("close {code} {text}")
        }
        Effect::Publish(room, publication) => {
            let kind = if publication.data.as_text().is_some() { "text" } else { "binary" };
            let publisher = publication.publisher.expect("a session says who it is");
            assert_eq!((publisher.user.as_deref(), publisher.session), (Some("alice"), SESSION));
            let exclude = if publication.exclude == Some(SESSION) { " (not to itself)" } else { "" };
            format!("publish {room} {kind} {}{exclude}", publication.data.bytes().escape_ascii())
        }
    }
}

fn room(name: &str) -> RoomName {
    RoomName::new(name).expect("a room's name")
}

fn identity(grant: &str) -> Identity {
    let secret = [7; 32];
    let now = UnixSeconds(1_000_000);
    let subject = Subject::new("alice").expect("a subject");
    let grants: [Grant; 1] = [grant.parse().expect("a grant")];
    let token = mint::mint(&secret, &subject, &grants, Duration::from_secs(60), now).expect("a token");
    let config = AuthConfig { hs256_secret: &secret, leeway: Duration::ZERO, policies: Vec::new() };
    Authenticator::new(config).verify(&token, now).expect("a valid token")
}

/// Undoes `escape_ascii`, as far as transcripts use it.
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

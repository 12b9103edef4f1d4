//! What every protocol must do, whatever its messages look like. Each protocol's folder has a
//! `conformance.json` with messages to begin and to publish, and junk. Everything else is the same for all
//! protocols.

use std::{collections::BTreeSet, fs, path::Path};

use broker_bridge::{Data, GapCause, Publication};
use serde::Deserialize;

use super::{
    Session,
    transcripts::{Client, files, open, room, with_tokens},
};
use crate::{
    framing::{Encoding, Transport},
    protocol::{self, News, Reply, RoomFormat, Then},
    vocabulary::{CloseReason, Limit, ReplyError, metrics::Label as _},
};

/// How a client of the protocol behaves, in the notation of the transcripts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spoken {
    /// Sessions, each opened in a different way.
    sessions: Vec<String>,
    /// A session that does not receive its own publications, if the protocol supports that.
    without_echo: Option<String>,
    /// What a client sends first.
    begin: Vec<String>,
    /// A publication of the text `hi` in the room `lobby`, if clients can publish.
    publish: Option<String>,
    /// The client's answer to a heartbeat, if it is a message.
    pong: Option<String>,
    /// Input that must neither be published nor ignored, unless clients cannot send at all.
    junk: Vec<String>,
}

/// Each protocol that has sessions, by the name of its folder.
fn protocols() -> Vec<(String, Spoken)> {
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/protocol");
    let protocols: Vec<_> = files(&folders)
        .into_iter()
        .filter_map(|folder| {
            let text = fs::read_to_string(folder.join("conformance.json")).ok()?;
            let name = folder.file_name()?.to_str()?.to_owned();
            Some((
                name.clone(),
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}")),
            ))
        })
        .collect();
    assert_eq!(protocols.len(), protocol::names().len(), "each protocol says how it is spoken");
    protocols
}

/// Each way to open a session of each protocol, begun.
fn sessions(limits: &str) -> impl Iterator<Item = (String, Spoken, Client)> {
    let opened = protocols().into_iter().flat_map(|(name, spoken)| {
        let sessions = spoken.sessions.clone();
        sessions.into_iter().map(move |session| (name.clone(), session))
    });
    let limits = limits.to_owned();
    opened.map(move |(name, session)| {
        let (_, spoken) = protocols().into_iter().find(|(other, _)| *other == name).expect("found before");
        let client = begun(&format!("session {session}{limits}"), &spoken);
        (session, spoken, client)
    })
}

fn begun(line: &str, spoken: &Spoken) -> Client {
    let mut client = open(line);
    for step in &spoken.begin {
        client.play(&with_tokens(step));
    }
    client
}

#[test]
fn a_publication_is_passed_on_once_with_its_publisher() {
    for (name, spoken, mut client) in sessions("") {
        let Some(publish) = &spoken.publish else { continue };
        let said = client.play(publish);
        let is_published = |line: &&String| line.starts_with("publish lobby text") && line.contains("hi");
        let published: Vec<_> = said.iter().filter(is_published).collect();
        assert_eq!(published.len(), 1, "{name}: {said:?}");
        assert!(!published[0].contains("not to itself"), "{name}: {said:?}");
    }
    for (name, spoken) in protocols() {
        let (Some(line), Some(publish)) = (&spoken.without_echo, &spoken.publish) else { continue };
        let said = begun(&format!("session {line}"), &spoken).play(publish);
        assert!(said.iter().any(|line| line.contains("(not to itself)")), "{name}: {said:?}");
    }
}

#[test]
fn sessions_with_equal_options_share_an_encoding() {
    let lobby = room("lobby");
    let mut seen: Vec<(String, Encoding)> = Vec::new();
    for (name, _, mut client) in sessions("") {
        let Client { session, .. } = &mut client;
        let encoding = encoding(session);
        let again = {
            let mut other = open(&format!("session {name}"));
            self::encoding(&mut other.session)
        };
        assert_eq!(encoding, again, "{name}");
        let bytes = encoding.encode(&lobby, &Publication::new(Data::text("the payload")), None);
        assert!(bytes.windows(11).any(|window| window == b"the payload"), "{name}");
        if session.framing().transport == Transport::WebSocket {
            assert_eq!(payload_of(&bytes), bytes.len() - 2, "{name}: one whole frame");
        }
        for (other, known) in &seen {
            let theirs = known.encode(&lobby, &Publication::new(Data::text("the payload")), None);
            assert!(*known != encoding || theirs == bytes, "{name} and {other}");
        }
        seen.push((name, encoding));
    }
}

fn encoding(session: &mut Session) -> Encoding {
    let RoomFormat { format, variant, state: _ } = session.format(&room("lobby"), 1);
    let framing = session.framing();
    Encoding::new(format, framing.transport).with_variant(variant).with_wrap(framing.wrap)
}

/// The payload length in a short frame.
fn payload_of(frame: &[u8]) -> usize {
    usize::from(frame[1])
}

#[test]
fn no_failure_passes_unnoticed() {
    for (name, spoken, mut client) in sessions("") {
        for error in ReplyError::ALL {
            let reply = Reply::Failed(*error);
            let (packets, then) = client.write(|protocol, out| protocol.reply(2, &reply, out));
            let silent = packets.is_empty() && then == Then::Stay;
            assert_eq!(silent, spoken.publish.is_none(), "{name}: {error:?}");
        }
    }
}

#[test]
fn a_gap_is_reported_or_closes_unless_the_client_ignores_gaps() {
    let lobby = room("lobby");
    for (name, _, mut client) in sessions("") {
        for cause in [GapCause::Interrupted, GapCause::Oversized, GapCause::Overflow, GapCause::Dropped] {
            let news = News::Gap(&lobby, cause);
            let (packets, then) = client.write(|protocol, out| protocol.news(&news, out));
            let mut told = packets.iter().any(|packet| packet.windows(5).any(|window| window == b"lobby"));
            if name == "long_poll" {
                // An answer has one room. It tells a gap at its end.
                let (end, _) = client.write(|protocol, out| {
                    protocol.farewell(CloseReason::Answered, 0.0, out);
                    Then::Stay
                });
                told = end
                    .iter()
                    .any(|end| end.ends_with(format!("\"gap\":\"{}\"}}\n", cause.as_str()).as_bytes()));
            }
            let ignored = name == "plain publish";
            assert_eq!(told || matches!(then, Then::Close(_)), !ignored, "{name}: {cause:?}");
        }
        let (packets, then) = client.write(|protocol, out| protocol.news(&News::Expelled(&lobby), out));
        assert!(!packets.is_empty() || then == Then::Close(CloseReason::Forbidden), "{name}: expelled");
    }
}

#[test]
fn every_close_reason_is_sent_while_the_peer_is_connected() {
    for (name, _, mut client) in sessions("") {
        let mut texts = BTreeSet::new();
        for reason in CloseReason::ALL {
            let (packets, _) = client.write(|protocol, out| {
                protocol.farewell(*reason, 0.5, out);
                Then::Stay
            });
            let on_web_socket = client.session.framing().transport == Transport::WebSocket;
            let gone = matches!(
                reason,
                CloseReason::Client | CloseReason::Answered | CloseReason::Lost | CloseReason::NoProgress
            );
            if on_web_socket {
                assert_eq!(packets.len(), usize::from(!gone), "{name}: {reason:?}");
            }
            for packet in packets.iter().filter(|_| on_web_socket) {
                // RFC 6455 §5.5.1: a code that may be sent, and a text of at most 123 bytes.
                assert_eq!((packet[0], payload_of(packet)), (0x88, packet.len() - 2), "{name}: {reason:?}");
                let code = u16::from_be_bytes([packet[2], packet[3]]);
                assert!((1000..5000).contains(&code) && ![1004, 1005, 1006, 1015].contains(&code), "{code}");
                texts.insert((code, String::from_utf8(packet[4..].to_vec()).expect("UTF-8")));
            }
        }
        assert!(texts.iter().all(|(_, text)| !text.is_empty() && text.len() <= 123), "{name}: {texts:?}");
    }
}

#[test]
fn a_heartbeat_is_sent_and_its_answer_is_free() {
    for (name, spoken, mut client) in sessions(" commands=5/h") {
        for _ in 0..100 {
            let beat = client.play("heartbeat");
            assert_eq!(beat.len(), 1, "{name}: {beat:?}");
            if let Some(pong) = &spoken.pong {
                assert_eq!(client.play(pong), [""; 0], "{name}");
            }
        }
    }
}

#[test]
fn continuing_over_a_limit_closes_the_session() {
    for (name, spoken, mut client) in sessions(" commands=3/h") {
        let Some(publish) = &spoken.publish else { continue };
        let said: Vec<_> = (0..300).flat_map(|_| client.play(publish)).collect();
        let published = said.iter().filter(|line| line.starts_with("publish ")).count();
        assert!((2..=3).contains(&published), "{name}: {published}");
        assert!(said.iter().any(|line| line.starts_with("close ")), "{name}");
        let limited = format!("limited {}", Limit::Commands.as_str());
        assert!(said.contains(&limited), "{name}");
    }
}

#[test]
fn junk_is_neither_published_nor_ignored() {
    for (name, spoken, _) in sessions("") {
        for junk in &spoken.junk {
            let said = begun(&format!("session {name}"), &spoken).play(junk);
            assert!(!said.iter().any(|line| line.starts_with("publish ")), "{name}: {junk}: {said:?}");
            assert_eq!(said.is_empty(), spoken.publish.is_none(), "{name}: {junk}: {said:?}");
        }
    }
}

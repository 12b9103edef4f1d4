//! Whatever a Centrifuge client sends: the session does not panic, joins no more rooms than allowed, does
//! nothing without a grant, and every outgoing frame is one line of JSON.
//!
//! An input contains the frames of a client in order, each ended by a zero byte. The text `TOKEN` is replaced
//! by a valid token.
#![no_main]

use std::{collections::HashSet, sync::LazyLock, time::Duration};

use broker_bridge::{BrokerError, Cursor, Data, GapCause, Publication, RoomName, SessionId};
use libfuzzer_sys::fuzz_target;
use tidegate::{
    auth::{AuthConfig, Authenticator, Grant, Subject, UnixSeconds, mint},
    framing::{Framing, Transport},
    limits::{Allowance, Limiters, bucket::SessionMeters},
    protocol::{History, MakeProtocol, Message, Subscribed, centrifuge},
    session::{Charge, Effect, Effects, Session, Surroundings},
    vocabulary::ReplyError,
};
use tidegate_fuzz::open;

const SECRET: [u8; 32] = [7; 32];
const NOW: UnixSeconds = UnixSeconds(1_000_000);
const ROOMS: usize = 3;

static AUTHENTICATOR: LazyLock<Authenticator> =
    LazyLock::new(|| Authenticator::new(AuthConfig::with_secret(&SECRET)));

static TOKEN: LazyLock<String> = LazyLock::new(|| {
    let subject = Subject::new("alice").expect("a subject");
    let grants: [Grant; 1] = ["a*=subscribe,publish".parse().expect("a grant")];
    let token = mint::mint(&SECRET, &subject, &grants, Duration::from_secs(60), NOW).expect("a token");
    token.expose().to_owned()
});

/// Without limits.
static LIMITERS: LazyLock<Limiters> = LazyLock::new(Limiters::default);

static PROTOCOL: LazyLock<MakeProtocol> =
    LazyLock::new(|| open(&centrifuge::ENDPOINT, Transport::WebSocket, "", None));

fuzz_target!(|input: &[u8]| {
    let Ok(input) = std::str::from_utf8(input) else { return };
    let protocol = PROTOCOL();
    let meters = SessionMeters::default();
    let mut session = Session::to_begin(SessionId(7), None, protocol, Framing::on(Transport::WebSocket));
    let around = Surroundings {
        authenticator: &AUTHENTICATOR,
        now: NOW,
        rooms_per_session: ROOMS,
        allowance: Allowance { session: &meters, node: &LIMITERS },
    };
    let (mut commands, mut effects) = (Vec::new(), Effects::default());
    let mut rooms: HashSet<RoomName> = HashSet::new();
    for (n, frame) in input.split('\0').enumerate() {
        let text = frame.replace("TOKEN", &TOKEN);
        let position = Cursor { epoch: 5, offset: 7 };
        let kept = Publication::new(Data::text(text.clone()));
        let kept = [(&kept, position)];
        session.receive(Message::Text(text.into()), Charge::default(), &around, &mut commands, &mut effects);
        assert!(commands.is_empty(), "every command has been handled");
        // Requests to the broker succeed, fail, or are interrupted, in turn.
        let mut pending = std::mem::take(&mut effects);
        while !pending.is_empty() {
            for effect in pending.drain() {
                match effect {
                    Effect::Join(request, room, recover) => {
                        assert!(room.as_str().starts_with('a'), "{room} was not granted");
                        let subscribed = Subscribed {
                            position: recover.map(|recover| recover.since),
                            recovered: recover.map(|_| n % 2 == 0),
                            missed: if recover.is_some() { &kept } else { &[] },
                            most: 1000,
                        };
                        let outcome = if n % 3 == 1 { Err(ReplyError::Unavailable) } else { Ok(subscribed) };
                        if session.joined(request, &room, outcome, &mut effects).is_some() {
                            rooms.insert(room.clone());
                        }
                        if n % 3 == 2 {
                            session.gap(&room, GapCause::Interrupted, &mut effects);
                        }
                    }
                    Effect::History(request, room, query) => {
                        assert!(room.as_str().starts_with('a'), "{room} was not granted");
                        assert!(query.limit <= 1000, "{query:?}");
                        let history = History { position, publications: &kept, most: 1000 };
                        session.history(request, Ok(history), &mut effects);
                    }
                    Effect::Leave(room) => drop(rooms.remove(&room)),
                    Effect::Publish(request, room, _) => {
                        assert!(room.as_str().starts_with('a'), "{room} was not granted");
                        let outcome = if n % 2 == 0 { Ok(()) } else { Err(BrokerError::Unavailable) };
                        session.settled(request, &outcome, &mut effects);
                    }
                    Effect::Send(bytes) => assert_is_one_object(&bytes),
                    Effect::Close(_) => return,
                    Effect::Expires(_) | Effect::Refused(_) | Effect::Limited(_) | Effect::Verify(_) => {}
                }
            }
            std::mem::swap(&mut pending, &mut effects);
        }
        assert!(rooms.len() <= ROOMS, "{rooms:?}");
    }
});

fn assert_is_one_object(frame: &[u8]) {
    let header = match frame {
        [0x81, 126, ..] => 4,
        [0x81, 127, ..] => 10,
        [0x81, ..] => 2,
        other => panic!("a text frame, not {other:x?}"),
    };
    let text = std::str::from_utf8(&frame[header..]).expect("a text is UTF-8");
    assert!(!text.contains('\n'), "a line break would end the message: {text}");
    assert!(text.starts_with('{') && text.ends_with('}'), "{text}");
}

//! From a client's bytes to effects: every message that the codec accepts becomes exactly one publication,
//! byte for byte, in the session's room and in order.
//!
//! An input is the stream of a client. The lowest bit of its first byte is the option `echo`.
#![no_main]

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use broker_bridge::{DataKind, RoomName, SessionId};
use libfuzzer_sys::fuzz_target;
use tidegate::{
    auth::{AuthConfig, Authenticator, Grant, Identity, Subject, UnixSeconds, mint},
    framing::{Framing, Transport},
    limits::{Allowance, Limiters, bucket::SessionMeters},
    protocol::{MakeProtocol, Message, plain},
    session::{Charge, Effect, Effects, Session, Surroundings},
    websocket::{Decoder, Event},
};
use tidegate_fuzz::open;

const MAX_MESSAGE: usize = 1024;

const SECRET: [u8; 32] = [7; 32];
const NOW: UnixSeconds = UnixSeconds(1_000_000);

static AUTHENTICATOR: LazyLock<Authenticator> =
    LazyLock::new(|| Authenticator::new(AuthConfig::with_secret(&SECRET)));

static IDENTITY: LazyLock<Arc<Identity>> = LazyLock::new(|| {
    let subject = Subject::new("alice").expect("a subject");
    let grants: [Grant; 1] = ["room=subscribe,publish".parse().expect("a grant")];
    let token = mint::mint(&SECRET, &subject, &grants, Duration::from_secs(60), NOW).expect("a token");
    Arc::new(AUTHENTICATOR.verify(&token, NOW).expect("a valid token"))
});

/// With the option `echo` and without.
static PROTOCOLS: LazyLock<[MakeProtocol; 2]> = LazyLock::new(|| {
    ["echo=false", "echo=true"].map(|query| open(&plain::ENDPOINT, Transport::WebSocket, query, Some(room())))
});

fn room() -> RoomName {
    RoomName::new("room").expect("a room's name")
}

/// Without limits.
static LIMITERS: LazyLock<Limiters> = LazyLock::new(Limiters::default);

fuzz_target!(|input: &[u8]| {
    let Some((options, stream)) = input.split_first() else { return };
    let echo = options & 1 == 1;
    let meters = SessionMeters::default();
    let mut session = Session::new(
        SessionId(7),
        Arc::clone(&IDENTITY),
        PROTOCOLS[usize::from(echo)](),
        Framing::on(Transport::WebSocket),
    );

    let (mut commands, mut effects) = (Vec::new(), Effects::default());
    let mut stream = stream.to_vec();
    let mut decoder = Decoder::new();
    let mut feed = decoder.feed(&mut stream, MAX_MESSAGE);
    while let Ok(Some(event)) = feed.next() {
        let (kind, bytes) = match event {
            Event::Text(payload) => (DataKind::Text, payload.into_bytes()),
            Event::Binary(payload) => (DataKind::Binary, payload.into_bytes()),
            Event::Ping(_) | Event::Pong(_) | Event::Close(_) => continue,
        };
        let message = match kind {
            DataKind::Text => Message::Text(bytes.clone()),
            _ => Message::Binary(bytes.clone()),
        };
        let around = Surroundings {
            authenticator: &AUTHENTICATOR,
            now: NOW,
            rooms_per_session: 1,
            allowance: Allowance { session: &meters, node: &LIMITERS },
        };
        session.receive(message, Charge::default(), &around, &mut commands, &mut effects);
        assert!(commands.is_empty(), "every command has been handled");
        let effects: Vec<_> = effects.drain().collect();
        let [Effect::Publish(0, to, publication)] = effects.as_slice() else { panic!("{effects:?}") };
        assert_eq!(*to, room());
        assert_eq!((publication.data.kind(), publication.data.bytes()), (kind, &bytes));
        assert_eq!(publication.exclude, (!echo).then_some(SessionId(7)));
    }
});

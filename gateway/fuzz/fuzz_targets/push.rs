//! Whatever is published in Redis, its Centrifuge frame contains exactly one push, in the room of the
//! publication: one line of JSON that common parsers accept, whose members are those of a publication, each
//! at most once.
//!
//! An input is one Redis message.
#![no_main]

use std::collections::BTreeMap;

use broker_bridge::{DataKind, EventName, RoomName, redis::fuzz};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use serde::Deserialize;
use serde_json::Value;
use tidegate::{
    framing::{Encoding, Transport},
    protocol::centrifuge,
};

// A repeated or unknown member is an error.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reply {
    push: Push,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Push {
    channel: String,
    r#pub: Publication,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Publication {
    data: Value,
    info: Option<Info>,
    #[serde(default)]
    tags: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    client: String,
    user: Option<String>,
}

fuzz_target!(|input: &[u8]| {
    let room = RoomName::new("lobby").expect("a room's name");
    let publication = fuzz::decode(Bytes::copy_from_slice(input));
    let frame = Encoding::new(&centrifuge::FORMAT, Transport::WebSocket).encode(&room, &publication, None);

    let line = payload(&frame);
    assert!(!line.contains(['\n', '\r']), "a line break ends a message");
    let Reply { push } = serde_json::from_str(line).expect("one push");
    assert_eq!(push.channel, "lobby");
    let Publication { data, info, mut tags } = push.r#pub;

    assert_eq!(tags.remove("event").as_deref(), publication.event.as_ref().map(EventName::as_str));
    let encoding = (publication.data.kind() == DataKind::Binary).then_some("base64");
    assert_eq!(tags.remove("encoding").as_deref(), encoding);
    assert!(tags.is_empty(), "{tags:?}");

    let info = info.map(|info| (info.client, info.user));
    let publisher = publication.publisher.as_ref();
    let named = publisher.map(|by| (by.session.to_string(), by.user.as_deref().map(ToOwned::to_owned)));
    assert_eq!(info, named);

    // The data are the published JSON, or a string.
    let as_json = publication.data.as_text().and_then(|text| serde_json::from_str::<Value>(text).ok());
    match (publication.data.kind(), as_json) {
        (DataKind::Json, as_json) => assert_eq!(Some(data), as_json),
        (DataKind::Text, Some(as_json)) if data == as_json => {}
        (DataKind::Text, _) => assert_eq!(data.as_str(), publication.data.as_text()),
        (DataKind::Binary, _) => assert!(data.is_string()),
    }
});

/// The payload of a complete unmasked text frame (RFC 6455 §5.2).
fn payload(frame: &[u8]) -> &str {
    let header = match frame {
        [0x81, 127, ..] => 10,
        [0x81, 126, ..] => 4,
        [0x81, ..] => 2,
        _ => panic!("a text frame"),
    };
    std::str::from_utf8(&frame[header..]).expect("a text is UTF-8")
}

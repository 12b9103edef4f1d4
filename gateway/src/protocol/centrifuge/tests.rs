//! Whatever is published, its frame contains one push, for the right room.

use std::collections::BTreeMap;

use broker_bridge::{Data, DataKind, EventName, Publication, Publisher, RoomName, SessionId};
use proptest::{option, prelude::*};
use serde::Deserialize;
use serde_json::Value;

use crate::framing::{Encoding, Transport};

// Duplicate or unknown fields are errors.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reply {
    push: Push,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Push {
    channel: String,
    r#pub: Pub,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pub {
    data: Value,
    info: Option<Info>,
    #[serde(default)]
    tags: BTreeMap<String, String>,
}

#[derive(Deserialize, Debug, PartialEq)]
#[serde(deny_unknown_fields)]
struct Info {
    client: String,
    user: Option<String>,
}

/// The push in a frame, and its line.
fn push(room: &RoomName, publication: &Publication) -> (Push, String) {
    let frame = Encoding::new(&super::FORMAT, Transport::WebSocket).encode(room, publication, None);
    let header = match frame.get(1) {
        Some(127) => 10,
        Some(126) => 4,
        _ => 2,
    };
    let line = String::from_utf8(frame[header..].to_vec()).unwrap();
    assert!(!line.contains(['\n', '\r']), "a line break ends a message: {line:?}");
    (serde_json::from_str::<Reply>(&line).expect(&line).push, line)
}

fn data() -> impl Strategy<Value = Data> {
    let text = prop_oneof![
        ".{0,40}",
        r#"[\[\]{}",:0-9a-c\\u\n\r ]{0,12}"#,
        r#"\{"a":1\}\},"(channel|pub|push)":"admin","x":\{"y":1"#,
        r#"[0-9]\}\}\}.?\{"push":\{"disconnect":\{"code":3500"#,
    ];
    prop_oneof![
        text.prop_map(|text| Data::json(text.clone()).unwrap_or_else(|_| Data::text(text))),
        proptest::collection::vec(any::<u8>(), 0..40).prop_map(Data::binary),
    ]
}

proptest! {
    #[test]
    fn a_publication_is_one_push_in_its_room(
        room in r#"[a-z"\\:,/]{1,9}"#,
        data in data(),
        event in option::of("\\PC{1,9}"),
        user in option::of(option::of("\\PC{1,9}")),
    ) {
        let room = RoomName::new(&room).unwrap();
        let event = event.and_then(|event| EventName::new(&event).ok());
        let publisher = user.map(|user| Publisher { user: user.map(Into::into), session: SessionId(7) });
        let publication = Publication { data, event, publisher, exclude: None };
        let (Push { channel, r#pub: Pub { data, info, mut tags } }, line) = push(&room, &publication);

        prop_assert_eq!(channel.as_str(), room.as_str(), "{}", &line);
        let named = publication.publisher.as_ref().map(|by| Info {
            client: by.session.to_string(),
            user: by.user.as_deref().map(ToOwned::to_owned),
        });
        prop_assert_eq!(info, named, "{}", &line);
        let (tag, encoding) = (tags.remove("event"), tags.remove("encoding"));
        prop_assert_eq!(tag.as_deref(), publication.event.as_ref().map(EventName::as_str), "{}", &line);
        let binary = publication.data.kind() == DataKind::Binary;
        prop_assert_eq!(encoding.as_deref(), binary.then_some("base64"), "{}", &line);
        prop_assert!(tags.is_empty(), "{}", &line);
        match publication.data.as_text().map(serde_json::from_str::<Value>) {
            Some(Ok(value)) => prop_assert_eq!(data, value, "{}", &line),
            Some(Err(_)) => prop_assert_eq!(data.as_str(), publication.data.as_text(), "{}", &line),
            None => prop_assert!(data.is_string(), "{}", &line),
        }
    }
}

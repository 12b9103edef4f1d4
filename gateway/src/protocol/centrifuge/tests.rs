//! Whatever is published, its frame contains one push, for the right room. And what subscriptions in rooms with a history
//! are told.

use std::collections::BTreeMap;

use broker_bridge::{Cursor, Data, DataKind, EventName, Publication, Publisher, RoomName, SessionId};
use proptest::{option, prelude::*};
use serde::Deserialize;
use serde_json::Value;

use super::{Centrifuge, Subscribed, recovery};
use crate::{
    framing::{Encoding, Framing, Packets, Transport},
    protocol::{History, News, Protocol as _, Then},
};

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
    offset: Option<u64>,
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
fn push(room: &RoomName, publication: &Publication, position: Option<Cursor>) -> (Push, String) {
    let frame = Encoding::new(&super::FORMAT, Transport::WebSocket).encode(room, publication, position);
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
        offset in option::of(any::<u64>()),
    ) {
        let room = RoomName::new(&room).unwrap();
        let event = event.and_then(|event| EventName::new(&event).ok());
        let publisher = user.map(|user| Publisher { user: user.map(Into::into), session: SessionId(7) });
        let publication = Publication { data, event, publisher, exclude: None };
        let position = offset.map(|offset| Cursor { epoch: 5, offset });
        let (Push { channel, r#pub }, line) = push(&room, &publication, position);
        let Pub { data, info, offset: told, mut tags } = r#pub;
        prop_assert_eq!(told, offset, "{}", &line);

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

fn at(offset: u64) -> Cursor {
    Cursor { epoch: 12_345_678_901_234_567, offset }
}

#[test]
fn a_subscription_is_told_its_position_and_what_the_client_has_missed() {
    let reply = |subscribed| {
        let (reply, held) = recovery::reply(7, &subscribed);
        (String::from_utf8(reply).unwrap(), held)
    };
    let missed = [Publication::new(Data::text("1")), Publication::new(Data::text("two"))];
    let missed: Vec<_> = (5..).map(at).zip(&missed).map(|(at, publication)| (publication, at)).collect();
    let plain = Subscribed { position: None, recovered: None, missed: &[], most: 1000 };
    for (subscribed, expected) in [
        (plain, r#"{"id":7,"subscribe":{}}"#),
        (
            Subscribed { recovered: Some(false), ..plain },
            r#"{"id":7,"subscribe":{"was_recovering":true,"recovered":false}}"#,
        ),
        // Before the first publication, too.
        (
            Subscribed { position: Some(at(0)), ..plain },
            concat!(
                r#"{"id":7,"subscribe":{"recoverable":true,"positioned":true,"#,
                r#""epoch":"12345678901234567","offset":0}}"#
            ),
        ),
        (
            Subscribed { position: Some(at(4)), recovered: Some(true), missed: &missed, ..plain },
            concat!(
                r#"{"id":7,"subscribe":{"recoverable":true,"positioned":true,"#,
                r#""epoch":"12345678901234567","offset":4,"was_recovering":true,"recovered":true,"#,
                r#""publications":[{"data":1,"offset":5},{"data":"two","offset":6}]}}"#
            ),
        ),
    ] {
        let (reply, held) = reply(subscribed);
        assert_eq!((reply.as_str(), held), (expected, subscribed.missed.len()));
    }
}

/// A text of control characters is six times as long in JSON: what fits is decided by what is written.
#[test]
fn a_reply_holds_no_more_than_it_may() {
    let publications =
        [1_usize, 100, 100, 100].map(|length| Publication::new(Data::text("\u{1}".repeat(length))));
    let missed: Vec<_> =
        (1..).map(at).zip(&publications).map(|(at, publication)| (publication, at)).collect();
    let (position, recovered) = (Some(at(0)), Some(true));
    let all = recovery::reply(7, &Subscribed { position, recovered, missed: &missed, most: 10_000 });
    assert_eq!(all.1, 4);
    assert!(all.0.len() > 6 * 301);
    let mut counts = std::collections::BTreeSet::new();
    for most in 0..all.0.len() + 500 {
        let (reply, held) = recovery::reply(7, &Subscribed { position, recovered, missed: &missed, most });
        assert!(held == 0 || reply.len() <= most, "{} bytes for {held} where {most} fit", reply.len());
        counts.insert(held);
    }
    assert!(counts.into_iter().eq(0..=4));
}

#[test]
fn a_client_subscribes_again_when_the_epoch_has_changed() {
    let mut out = Packets::default();
    out.begin(Framing::on(Transport::Body));
    let lobby = RoomName::new("lobby").unwrap();
    let then = Centrifuge { ping_seconds: 25 }.news(&News::NewEpoch(&lobby), &mut out);
    assert_eq!(then, Then::Leave);
    let push = r#"{"push":{"channel":"lobby","unsubscribe":{"code":2500,"reason":"insufficient state"}}}"#;
    assert_eq!(out.bytes(), push.as_bytes());
}

#[test]
fn a_part_of_a_history_holds_what_fits_and_at_least_one_publication() {
    let publications = [1, 2].map(|number| Publication::new(Data::text(number.to_string())));
    let publications: Vec<_> =
        (5..).map(at).zip(&publications).map(|(at, publication)| (publication, at)).collect();
    let reply = |publications, most| {
        String::from_utf8(recovery::history(7, &History { position: at(6), publications, most })).unwrap()
    };
    let position = r#""epoch":"12345678901234567","offset":6"#;
    assert_eq!(reply(&[], 0), format!(r#"{{"id":7,"history":{{"publications":[],{position}}}}}"#));
    let one = r#"{"data":1,"offset":5}"#;
    for most in [0, 300] {
        assert_eq!(
            reply(&publications, most),
            format!(r#"{{"id":7,"history":{{"publications":[{one}],{position}}}}}"#)
        );
    }
    let two = r#"{"data":2,"offset":6}"#;
    assert_eq!(
        reply(&publications, 400),
        format!(r#"{{"id":7,"history":{{"publications":[{one},{two}],{position}}}}}"#)
    );
}

//! Whatever is published, an event stream stays valid: the parser of WHATWG HTML §9.2.6 finds exactly one
//! event in each encoded publication, with the given name, room and payload.
//!
//! An input is a byte of flags, the length of the event's name, the name, and the payload.
#![no_main]

use std::sync::LazyLock;

use broker_bridge::{Data, EventName, Publication, RoomName};
use libfuzzer_sys::fuzz_target;
use tidegate::{
    framing::{Encoding, Transport},
    protocol::{MakeProtocol, event_stream},
};
use tidegate_fuzz::open;

/// A stream of one room, and one of several.
static PROTOCOLS: LazyLock<[MakeProtocol; 2]> = LazyLock::new(|| {
    ["room=lobby", "room=lobby&room=other"]
        .map(|query| open(&event_stream::ENDPOINT, Transport::Body, query, None))
});

fuzz_target!(|input: &[u8]| {
    let Some(([flags, length], rest)) = input.split_first_chunk() else { return };
    let Some((name, payload)) = rest.split_at_checked(usize::from(*length)) else { return };
    let room = RoomName::new("lobby").expect("a room's name");
    let event = std::str::from_utf8(name).ok().and_then(|name| EventName::new(name).ok());
    let data = Data::detect(payload.to_vec().into());
    let text = data.as_text().map(ToOwned::to_owned);
    let publication = Publication { event: event.clone(), ..Publication::new(data) };
    let several = flags & 1 == 1;
    let id = if several { "lobby" } else { "" };

    let format = PROTOCOLS[usize::from(several)]().format(&room, 0).format;
    let encoded = Encoding::new(format, Transport::Body).encode(&room, &publication, None);
    let events = parse(std::str::from_utf8(&encoded).expect("an event stream is UTF-8"));
    let [seen] = events.as_slice() else { panic!("one event, not {events:?}") };
    assert_eq!((seen.name.as_str(), seen.id.as_str()), (event.as_ref().map_or("", EventName::as_str), id));
    match text {
        Some(text) => assert_eq!(seen.data, text.replace("\r\n", "\n").replace('\r', "\n")),
        None => assert!(seen.data.starts_with("data:application/octet-stream;base64,")),
    }
});

#[derive(Debug, Default)]
struct Seen {
    name: String,
    data: String,
    id: String,
}

fn parse(stream: &str) -> Vec<Seen> {
    let (mut events, mut current, mut has_data) = (Vec::new(), Seen::default(), false);
    for line in stream.replace("\r\n", "\n").replace('\r', "\n").split('\n') {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" if line.is_empty() => {
                if std::mem::take(&mut has_data) {
                    current.data.pop();
                    events.push(std::mem::take(&mut current));
                }
            }
            "event" => value.clone_into(&mut current.name),
            "id" => value.clone_into(&mut current.id),
            "data" => {
                has_data = true;
                current.data.push_str(value);
                current.data.push('\n');
            }
            _ => {}
        }
    }
    events
}

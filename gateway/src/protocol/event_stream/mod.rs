//! Server-sent events (WHATWG HTML §9.2): one or several rooms as an event stream.
//!
//! | on the wire | meaning |
//! |---|---|
//! | `event: <name>` | the publication's event; absent for the default, `message` |
//! | `data: <text>` | the payload; one field per line. The format treats CR, LF and CRLF alike as line ends, so the client sees each as LF |
//! | `data: data:application/octet-stream;base64,…` | a binary payload, as a `data:` URL (RFC 2397) |
//! | `id: <epoch>-<offset>` | on a stream of one room, if it has a history: the event's position. Without data: where the stream begins. A client that comes back with it, in `Last-Event-ID` or as `?since=`, gets what it has missed |
//! | `id: <room>` | on a stream of several rooms: the event's room, percent-encoded as in a path |
//! | `id: <room>;<positions>` | likewise, if any of the rooms has a history: then come the positions in all rooms, in the order of the request, with commas in between, and nothing for a room without a history |
//! | `event: tidegate.gap` | data `{"room":…,"cause":…}`: publications of the room may be missing before this point |
//! | `retry: <milliseconds>` | at the start, and with a new random time when the node drains |
//! | `:` | a comment, to keep the connection alive |
//!
//! Only events end with a blank line. The standard ignores one after `retry:` or a comment, but some clients
//! that parse the format themselves (`@microsoft/fetch-event-source`, `httpx-sse`) dispatch an empty message.

use std::{rc::Rc, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use broker_bridge::{Cursor, DataKind, GapCause, Publication, RoomName};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::{
    Ask, Command, Endpoint, Message, News, On, Opening, Protocol, Reply, RequestId, RoomFormat, Route, Then,
    endpoint::UNKNOWN,
};
use crate::{
    framing::{Format, MemberState, Packets, Positions, Writer},
    history::Beginning,
    request::Problem,
    vocabulary::{CloseReason, ProtocolName},
};

mod endpoint;

/// `GET` of one or several rooms that accepts `text/event-stream`.
pub static ENDPOINT: Endpoint = Endpoint {
    name: ProtocolName::new("sse"),
    routes: &[Route { path: "/rooms/{room}", on: stream() }, Route { path: "/rooms", on: stream() }],
    refuse: Some(endpoint::come_back),
};

/// An event in a stream of one room.
static ONE_ROOM: Format =
    Format { write: |_, publication, _, out| write(None, publication, out), head: None };
/// An event in a stream of several rooms.
static SEVERAL_ROOMS: Format =
    Format { write: |room, publication, _, out| write(Some(room), publication, out), head: None };
/// An event in a stream of several rooms of which some have a history. The positions are the session's own.
static POSITIONED: Format =
    Format { write: |_, publication, _, out| put_event(publication, out), head: Some(put_positions) };

const fn stream() -> On {
    On::Stream { media_type: endpoint::MEDIA_TYPE, head: endpoint::head, open }
}

fn open(ask: &Ask<'_>) -> Result<Opening, Problem> {
    let rooms = ask.rooms()?;
    let begin = ask.begin(&rooms)?;
    let (several_rooms, retry_millis) = (rooms.len() > 1, ask.settings.retry_millis);
    let start = several_rooms.then(|| first_positions(ask, &rooms, &begin)).flatten();
    let all: Arc<[_]> = rooms.clone().into();
    let protocol = Arc::new(move || {
        let positions = start.as_ref().map(|start| Rc::new(Positions::new(start.iter().copied())));
        let several = several_rooms.then(|| Several { rooms: Arc::clone(&all), positions });
        Box::new(EventStream { several, retry_millis }) as _
    });
    Ok(Opening {
        rooms,
        begin,
        is_answer: false,
        has_all_positions: several_rooms,
        signs_in_later: false,
        protocol,
    })
}

/// What a client of several rooms has received before the stream begins. `None` if no room has a history.
///
/// A room whose position is not known yet has one that nobody knows: a client that is cut off before it learns the
/// position is told a gap when it comes back.
fn first_positions(ask: &Ask<'_>, rooms: &[RoomName], begin: &[Beginning]) -> Option<Arc<[Option<Cursor>]>> {
    let since = begin.iter().map(|begin| begin.since()).chain(std::iter::repeat(None));
    let positions: Arc<[_]> = rooms
        .iter()
        .zip(since)
        .map(|(room, since)| ask.has_history(room).then(|| since.unwrap_or(UNKNOWN)))
        .collect();
    positions.iter().any(Option::is_some).then_some(positions)
}

/// The event that reports a gap.
const GAP_EVENT: &str = "tidegate.gap";
/// The characters encoded in an `id:`. The client sends it back in a header, `Last-Event-ID`, which has to be
/// ASCII (RFC 9110 §5.5). Everything that `encodeURIComponent` leaves alone, and `:`, is not encoded.
const ENCODED_IN_IDS: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'!')
    .remove(b'~')
    .remove(b'*')
    .remove(b'\'')
    .remove(b'(')
    .remove(b')')
    .remove(b':');

const DATA_URL: &[u8] = b"data:application/octet-stream;base64,";

/// The state of one event stream.
#[derive(Debug)]
struct EventStream {
    /// Set if each event contains its room.
    several: Option<Several>,
    /// The shortest time after which a client should reconnect, in milliseconds. Each client gets a random
    /// time between this and twice as much.
    retry_millis: u32,
}

/// The rooms of an event stream, if there are several.
#[derive(Debug)]
struct Several {
    rooms: Arc<[RoomName]>,
    /// Set if any of them has a history.
    positions: Option<Rc<Positions>>,
}

impl Several {
    /// What the heads of events in this room are written from. `None` if no room has a history.
    fn state(&self, room: &RoomName) -> Option<MemberState> {
        let positions = Rc::clone(self.positions.as_ref()?);
        let index = self.rooms.iter().position(|other| other == room)?;
        Some(MemberState {
            id: encoded(room).into_bytes().into(),
            positions: Some((positions, index)),
            ..MemberState::default()
        })
    }
}

impl EventStream {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a spread in 0..1 of a few seconds in milliseconds"
    )]
    fn put_retry(&self, spread: f32, out: &mut Packets) {
        let retry = self.retry_millis.saturating_add((self.retry_millis as f32 * spread) as u32);
        out.text(format!("retry: {retry}\n").as_bytes());
    }
}

impl Protocol for EventStream {
    /// The transport has no way for the client to send.
    fn decode(&mut self, _: Message, _: &mut Vec<Command>) {}

    fn reply(&mut self, _: RequestId, _: &Reply, _: &mut Packets) -> Then {
        Then::Stay
    }

    fn news(&mut self, news: &News<'_>, out: &mut Packets) -> Then {
        match news {
            News::Gap(room, cause) => out.text(gap(room, *cause).as_bytes()),
            News::NewEpoch(_) => {}
            // An event without data is not dispatched, but its id counts (WHATWG HTML §9.2.6).
            News::Position(room, position) => match &self.several {
                None => out.text(format!("id: {position}\n\n").as_bytes()),
                Some(Several { rooms, positions: Some(positions) }) => {
                    // A client that comes back has told most of them itself.
                    if let Some(index) = rooms.iter().position(|other| other == *room)
                        && positions.get(index) != Some(*position)
                    {
                        positions.set(index, *position);
                        out.text(format!("id: {};{positions}\n\n", encoded(room)).as_bytes());
                    }
                }
                Some(_) => {}
            },
            News::Expelled(_) => return Then::Close(CloseReason::Forbidden),
        }
        Then::Stay
    }

    fn format(&mut self, room: &RoomName, _: RequestId) -> RoomFormat {
        match self.several.as_ref().map(|several| several.state(room)) {
            None => (&ONE_ROOM).into(),
            Some(None) => (&SEVERAL_ROOMS).into(),
            Some(state) => RoomFormat { format: &POSITIONED, variant: 0, state: state.map(Rc::new) },
        }
    }

    fn greet(&mut self, spread: f32, out: &mut Packets) {
        self.put_retry(spread, out);
    }

    fn heartbeat(&mut self, out: &mut Packets) {
        out.text_static(b":\n");
    }

    fn farewell(&mut self, reason: CloseReason, spread: f32, out: &mut Packets) {
        // Clients that should reconnect get a new random time, because all clients of this node end together.
        if reason.come_back() {
            self.put_retry(spread, out);
        }
    }
}

/// The event for a publication, the same for every member of the room.
fn write(room: Option<&RoomName>, publication: &Publication, out: &mut Writer) {
    out.reserve(publication.data.bytes().len() + 64);
    if let Some(room) = room {
        out.put(format!("id: {}\n", encoded(room)).as_bytes());
    } else if let Some(position) = out.position() {
        out.put(format!("id: {position}\n").as_bytes());
    }
    put_event(publication, out);
}

/// The room as it stands in an id.
fn encoded(room: &RoomName) -> String {
    utf8_percent_encode(room.as_str(), ENCODED_IN_IDS).to_string()
}

/// The id of an event in a stream of several rooms, with the positions after that event.
fn put_positions(state: &MemberState, out: &mut Writer) {
    let Some((positions, index)) = &state.positions else { return };
    if let Some(position) = out.position() {
        positions.set(*index, position);
    }
    out.put(b"id: ");
    out.put(&state.id);
    out.put(format!(";{positions}\n").as_bytes());
}

/// The event without its id.
fn put_event(publication: &Publication, out: &mut Writer) {
    let data = publication.data.bytes();
    out.reserve(data.len() + 64);
    if let Some(event) = &publication.event {
        out.put(b"event: ");
        out.put(event.as_str().as_bytes());
        out.put(b"\n");
    }
    if publication.data.kind() == DataKind::Binary {
        out.put(b"data: ");
        out.put(DATA_URL);
        out.put(BASE64.encode(data).as_bytes());
        out.put(b"\n");
    } else {
        put_data(out, data);
    }
    out.put(b"\n");
}

/// The event that reports a gap.
fn gap(room: &RoomName, cause: GapCause) -> String {
    let data = serde_json::json!({ "room": room.as_str(), "cause": cause.as_str() });
    format!("event: {GAP_EVENT}\ndata: {data}\n\n")
}

/// Writes one `data:` field per line, whatever the line endings.
fn put_data(out: &mut Writer, mut text: &[u8]) {
    loop {
        let end = text.iter().position(|&byte| byte == b'\n' || byte == b'\r');
        let (line, rest) = text.split_at(end.unwrap_or(text.len()));
        out.put(b"data: ");
        out.put(line);
        out.put(b"\n");
        match rest {
            [] => return,
            [b'\r', b'\n', rest @ ..] | [_, rest @ ..] => text = rest,
        }
    }
}

#[cfg(test)]
mod tests {
    use broker_bridge::{Data, EventName};
    use proptest::prelude::*;

    use super::*;
    use crate::framing::{Encoding, Transport};

    fn encode(room: Option<&RoomName>, publication: &Publication) -> String {
        let format = if room.is_some() { &SEVERAL_ROOMS } else { &ONE_ROOM };
        let lobby = RoomName::new("lobby").unwrap();
        let bytes = Encoding::new(format, Transport::Body).encode(room.unwrap_or(&lobby), publication, None);
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    fn text(text: &str) -> String {
        encode(None, &Publication::new(Data::text(text)))
    }

    /// Parses one event as in WHATWG HTML §9.2.6: (event, data, id).
    fn parse(stream: &str) -> (String, String, String) {
        let (mut event, mut data, mut id) = (String::new(), String::new(), String::new());
        let normal = stream.replace("\r\n", "\n").replace('\r', "\n");
        for line in normal.split('\n') {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "event" => value.clone_into(&mut event),
                "data" => {
                    data.push_str(value);
                    data.push('\n');
                }
                "id" => value.clone_into(&mut id),
                _ => assert_eq!(line, ""),
            }
        }
        assert_eq!(data.pop(), Some('\n'));
        (event, data, id)
    }

    #[test]
    fn golden_events() {
        assert_eq!(text("hi"), "data: hi\n\n");
        assert_eq!(text(""), "data: \n\n");
        assert_eq!(text("a\nb\r\nc\rd\n"), "data: a\ndata: b\ndata: c\ndata: d\ndata: \n\n");
        assert_eq!(text(" x"), "data:  x\n\n");

        let room = RoomName::new("lobby").unwrap();
        let mut publication = Publication::new(Data::binary(&b"\xff\x00"[..]));
        publication.event = Some(EventName::new("image").unwrap());
        assert_eq!(
            encode(Some(&room), &publication),
            "id: lobby\nevent: image\ndata: data:application/octet-stream;base64,/wA=\n\n"
        );
        assert_eq!(
            gap(&room, GapCause::Interrupted),
            "event: tidegate.gap\ndata: {\"cause\":\"interrupted\",\"room\":\"lobby\"}\n\n"
        );
    }

    /// The id equals `encodeURIComponent(name).replaceAll("%3A", ":")`, and `decodeURIComponent` restores the
    /// name.
    #[test]
    fn ids_are_ascii() {
        for (name, id) in [
            ("日本", "%E6%97%A5%E6%9C%AC"),
            ("chat:été", "chat:%C3%A9t%C3%A9"),
            ("a/b+c&d=e?f#g%h", "a%2Fb%2Bc%26d%3De%3Ff%23g%25h"),
            ("A-z_0.9!~*'()", "A-z_0.9!~*'()"),
            ("a;b,c@d", "a%3Bb%2Cc%40d"),
        ] {
            let room = RoomName::new(name).unwrap();
            let event = encode(Some(&room), &Publication::new(Data::text("x")));
            assert_eq!(event, format!("id: {id}\ndata: x\n\n"));
        }
    }

    /// Each id says what the client has received in all rooms once it has read the event.
    #[test]
    fn events_of_several_rooms_have_the_positions_in_all_of_them() {
        let room = |name| RoomName::new(name).unwrap();
        let (rooms, at) = ([room("é;"), room("live"), room("b")], |offset| Cursor { epoch: 17, offset });
        let start = [Some(UNKNOWN), None, Some(at(4))];
        let positions = Some(Rc::new(Positions::new(start)));
        let several = Some(Several { rooms: Arc::new(rooms.clone()), positions });
        let mut stream = EventStream { several, retry_millis: 1 };
        let formats = rooms.each_ref().map(|room| stream.format(room, 0));
        let event = |index: usize, position| {
            let RoomFormat { format, state, .. } = &formats[index];
            let encoding = Encoding::new(format, Transport::Body);
            let tail = encoding.encode(&rooms[index], &Publication::new(Data::text("x")), position);
            let head = encoding.head(state.as_ref().unwrap(), position, tail.len()).unwrap();
            String::from_utf8([head, tail].concat()).unwrap()
        };
        let mut out = Packets::default();
        assert_eq!(stream.news(&News::Position(&rooms[0], at(1)), &mut out), Then::Stay);
        assert_eq!(stream.news(&News::Position(&rooms[2], at(4)), &mut out), Then::Stay);
        assert_eq!(out.bytes(), b"id: %C3%A9%3B;17-1,,17-4\n\n", "without what the client knows");
        assert_eq!(event(0, Some(at(2))), "id: %C3%A9%3B;17-2,,17-4\ndata: x\n\n");
        assert_eq!(event(1, None), "id: live;17-2,,17-4\ndata: x\n\n");
        assert_eq!(event(2, Some(at(5))), "id: b;17-2,,17-5\ndata: x\n\n");
        assert_eq!(event(2, None), "id: b;17-2,,17-5\ndata: x\n\n", "past the history");
    }

    #[test]
    fn retry_is_between_once_and_twice_the_setting() {
        let written = |write: &dyn Fn(&mut EventStream, &mut Packets)| {
            let mut out = Packets::default();
            write(&mut EventStream { several: None, retry_millis: 3000 }, &mut out);
            String::from_utf8(out.bytes().to_vec()).unwrap()
        };
        assert_eq!(written(&|stream, out| stream.greet(0.0, out)), "retry: 3000\n");
        assert_eq!(written(&|stream, out| stream.greet(0.5, out)), "retry: 4500\n");
        assert_eq!(written(&|stream, out| stream.farewell(CloseReason::Drain, 0.5, out)), "retry: 4500\n");
        assert_eq!(written(&|stream, out| stream.farewell(CloseReason::TokenExpired, 0.5, out)), "");
    }

    proptest! {
        #[test]
        fn any_text_arrives_with_lf_line_ends(input in "(\\PC|[\r\n:])*") {
            let normal = input.replace("\r\n", "\n").replace('\r', "\n");
            prop_assert_eq!(parse(&text(&input)), (String::new(), normal, String::new()));
        }
    }
}

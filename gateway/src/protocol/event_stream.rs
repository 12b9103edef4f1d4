//! Server-sent events (WHATWG HTML §9.2): a room, or several, as an event stream.
//!
//! | on the wire | meaning |
//! |---|---|
//! | `event: <name>` | the publication's event; absent for the default, `message` |
//! | `data: <text>` | the payload; one field per line. The format ends a line at CR, LF and CRLF alike, so a client sees each as LF |
//! | `data: data:application/octet-stream;base64,…` | a binary payload, as a `data:` URL (RFC 2397) |
//! | `id: <room>` | on a stream of several rooms: the room that the event belongs to, as it stands in a path |
//! | `event: tidegate.gap` | data `{"room":…,"cause":…}`: publications of the room may be missing just before |
//! | `retry: <milliseconds>` | at the start, and with new spread when the node leaves |
//! | `:` | a comment, to keep the connection alive |
//!
//! Only events end with a blank line. The standard passes over one that follows `retry:` or a comment; clients
//! that read the format themselves (`@microsoft/fetch-event-source`, `httpx-sse`) dispatch an empty message.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use broker_bridge::{DataKind, GapCause, Publication, RoomName};
use bytes::{BufMut as _, Bytes, BytesMut};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::WireFormat;
use crate::vocabulary::{CloseReason, ProtocolName};

/// Its name.
pub const NAME: ProtocolName = ProtocolName::new("sse");

/// The event that tells of a gap.
pub const GAP_EVENT: &str = "tidegate.gap";
/// The comment that keeps a connection alive.
pub(super) const KEEP_ALIVE: Bytes = Bytes::from_static(b":\n");
/// What is encoded in an `id:`. A client sends it back as the value of a header, `Last-Event-ID`, which has to be
/// ASCII (RFC 9110 §5.5). What is left alone is what `encodeURIComponent` leaves alone, and `:`.
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
pub struct EventStream {
    /// Whether events say which room they belong to.
    pub several_rooms: bool,
    /// The shortest time after which a client should come back, in milliseconds. Each client is told a
    /// random time between this and its double.
    pub retry_millis: u32,
}

impl EventStream {
    pub(super) fn format(&self) -> WireFormat {
        if self.several_rooms { WireFormat::RoomEvent } else { WireFormat::Event }
    }

    /// What a stream begins with.
    pub fn preamble(&self, spread: f32) -> Bytes {
        Bytes::from(format!("retry: {}\n", self.retry(spread)))
    }

    pub(super) fn farewell(&self, reason: CloseReason, spread: f32) -> Option<Bytes> {
        // Whoever is told to come back gets a new time: all clients of this node leave together.
        reason.come_back().then(|| self.preamble(spread))
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a spread in 0..1 of a few seconds in milliseconds"
    )]
    fn retry(&self, spread: f32) -> u32 {
        self.retry_millis.saturating_add((self.retry_millis as f32 * spread) as u32)
    }
}

/// The event that every member of the room is sent.
pub(super) fn encode(room: Option<&RoomName>, publication: &Publication) -> Bytes {
    let data = publication.data.bytes();
    let mut out = BytesMut::with_capacity(data.len() + 64);
    if let Some(room) = room {
        out.put_slice(b"id: ");
        for piece in utf8_percent_encode(room.as_str(), ENCODED_IN_IDS) {
            out.put_slice(piece.as_bytes());
        }
        out.put_u8(b'\n');
    }
    if let Some(event) = &publication.event {
        put_event(&mut out, event.as_str());
    }
    if publication.data.kind() == DataKind::Binary {
        out.put_slice(b"data: ");
        out.put_slice(DATA_URL);
        out.put_slice(BASE64.encode(data).as_bytes());
        out.put_u8(b'\n');
    } else {
        put_data(&mut out, data);
    }
    out.put_u8(b'\n');
    out.freeze()
}

/// The event that tells of a gap.
pub(super) fn gap(room: &RoomName, cause: GapCause) -> Bytes {
    let mut out = BytesMut::new();
    put_event(&mut out, GAP_EVENT);
    let data = serde_json::json!({ "room": room.as_str(), "cause": cause.as_str() });
    put_data(&mut out, data.to_string().as_bytes());
    out.put_u8(b'\n');
    out.freeze()
}

fn put_event(out: &mut BytesMut, name: &str) {
    out.put_slice(b"event: ");
    out.put_slice(name.as_bytes());
    out.put_u8(b'\n');
}

/// One `data:` field per line, whatever ends the line.
fn put_data(out: &mut BytesMut, mut text: &[u8]) {
    loop {
        let end = text.iter().position(|&byte| byte == b'\n' || byte == b'\r');
        let (line, rest) = text.split_at(end.unwrap_or(text.len()));
        out.put_slice(b"data: ");
        out.put_slice(line);
        out.put_u8(b'\n');
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

    fn text(text: &str) -> String {
        String::from_utf8(encode(None, &Publication::new(Data::text(text))).to_vec()).unwrap()
    }

    /// The parser of WHATWG HTML §9.2.6, as far as one event goes: (event, data, id).
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

    /// `encodeURIComponent(name).replaceAll("%3A", ":")`, and `decodeURIComponent` gives the name back.
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

    #[test]
    fn retry_lies_between_once_and_twice() {
        let stream = EventStream { several_rooms: false, retry_millis: 3000 };
        assert_eq!(stream.preamble(0.0), "retry: 3000\n");
        assert_eq!(stream.preamble(0.5), "retry: 4500\n");
        assert_eq!(stream.farewell(CloseReason::Drain, 0.5).unwrap(), "retry: 4500\n");
        assert_eq!(stream.farewell(CloseReason::TokenExpired, 0.5), None);
    }

    proptest! {
        #[test]
        fn any_text_arrives_with_its_line_ends_made_lf(input in "(\\PC|[\r\n:])*") {
            let normal = input.replace("\r\n", "\n").replace('\r', "\n");
            prop_assert_eq!(parse(&text(&input)), (String::new(), normal, String::new()));
        }
    }
}

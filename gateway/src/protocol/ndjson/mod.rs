//! JSON lines (<https://github.com/ndjson/ndjson-spec>): one JSON object per line in a response body. The
//! same objects are also available as text messages on a WebSocket, with the subprotocol `tidegate.json`.
//!
//! | object | meaning |
//! |---|---|
//! | `{"room":…,"event":…,"data":…}` | a publication. `data` is its JSON, or its text as a string; `event` is present if it has a name |
//! | `{"room":…,"base64":…}` | a publication of binary data |
//! | `…,"id":…` | in a room with a history: the publication's position. A client that comes back with it, as `?since=`, gets what it has missed |
//! | `{"room":…,"id":…}` | where the session begins in a room with a history |
//! | `{"room":…,"gap":…}` | publications of the room may be missing before this point, and why |
//! | `{"error":…,"temporary":…}` | a publication of this client was refused; `temporary` says whether it may succeed later |
//! | `{"close":…,"reconnect":…}` | the last line of a body: why it ends, and whether to reconnect |
//! | `{}` | a heartbeat in a body; a WebSocket has pings |
//!
//! On a WebSocket the client publishes with the same object: `data` or `base64`, optionally `event`, and
//! `room` if the session is in several.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use broker_bridge::{Data, EventName, Publication, RoomName};
use http::{HeaderMap, HeaderValue, header};
use serde::Deserialize;
use serde_json::{json, value::RawValue};

use super::{
    Ask, Command, Endpoint, Message, News, On, Opening, Protocol, Reply, RequestId, RoomFormat, Route, Then,
    json::{Object, present},
};
use crate::{
    framing::{Format, Packets, Writer},
    request::Problem,
    vocabulary::{CloseReason, ProtocolName, metrics::Label as _},
};

const MEDIA_TYPE: &str = "application/x-ndjson";
const SUBPROTOCOL: &str = "tidegate.json";

/// `GET` of one or several rooms that accepts `application/x-ndjson`, or with a WebSocket handshake for
/// `tidegate.json`.
pub static ENDPOINT: Endpoint = Endpoint {
    name: ProtocolName::new("ndjson"),
    routes: &[
        Route { path: "/rooms/{room}", on: On::Stream { media_type: MEDIA_TYPE, head, open: lines } },
        Route { path: "/rooms", on: On::Stream { media_type: MEDIA_TYPE, head, open: lines } },
        Route { path: "/rooms/{room}", on: On::WebSocket { subprotocol: SUBPROTOCOL, open: messages } },
        Route { path: "/rooms", on: On::WebSocket { subprotocol: SUBPROTOCOL, open: messages } },
    ],
    refuse: None,
};

/// An object with a line end.
static LINE: Format = Format {
    write: |room, publication, _, out| {
        write(room, publication, out);
        out.put(b"\n");
    },
    head: None,
};
/// An object without a line end.
static MESSAGE: Format =
    Format { write: |room, publication, _, out| write(room, publication, out), head: None };

/// The state of one session.
#[derive(Debug)]
struct Ndjson {
    rooms: Arc<[RoomName]>,
    /// Whether objects are lines of a body rather than messages of a WebSocket.
    lines: bool,
    /// Whether the session receives its own publications (`?echo=`, default true).
    echo: bool,
}

fn lines(ask: &Ask<'_>) -> Result<Opening, Problem> {
    opening(ask, true, true)
}

fn messages(ask: &Ask<'_>) -> Result<Opening, Problem> {
    let echo = ask.query().choice("echo", ["true", "false"])? == "true";
    opening(ask, false, echo)
}

fn opening(ask: &Ask<'_>, lines: bool, echo: bool) -> Result<Opening, Problem> {
    let rooms = ask.rooms()?;
    let begin = ask.begin(&rooms)?;
    let all: Arc<[_]> = rooms.clone().into();
    let protocol = Arc::new(move || Box::new(Ndjson { rooms: Arc::clone(&all), lines, echo }) as _);
    Ok(Opening { rooms, begin, is_answer: false, has_all_positions: false, signs_in_later: false, protocol })
}

/// As for an event stream: a proxy must neither compress nor buffer lines.
fn head(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
}

/// Writes the object for a publication.
pub(super) fn write(room: &RoomName, publication: &Publication, out: &mut Writer) {
    out.reserve(publication.data.bytes().len() + 128);
    out.put(b"{\"room\":");
    out.put_json_string(room.as_str());
    if let Some(position) = out.position() {
        out.put(format!(",\"id\":\"{position}\"").as_bytes());
    }
    if let Some(event) = &publication.event {
        out.put(b",\"event\":");
        out.put_json_string(event.as_str());
    }
    match publication.data.as_text() {
        Some(text) if publication.data.is_json() => {
            out.put(b",\"data\":");
            out.put_json_line(text);
        }
        Some(text) => {
            out.put(b",\"data\":");
            out.put_json_string(text);
        }
        None => {
            out.put(b",\"base64\":");
            out.put_json_string(&BASE64.encode(publication.data.bytes()));
        }
    }
    out.put(b"}");
}

/// A publication by the client.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Published<'a> {
    room: Option<String>,
    event: Option<String>,
    #[serde(borrow, default, deserialize_with = "present")]
    data: Option<&'a RawValue>,
    base64: Option<String>,
}

impl Ndjson {
    fn read(&self, message: &Message) -> Option<Command> {
        let Message::Text(text) = message else { return None };
        let Object(Published { room, event, data, base64 }) = serde_json::from_slice(text).ok()?;
        let data = match (data, base64) {
            (Some(data), None) => {
                // A string is published as its text, unless that text is itself JSON: delivery must turn it
                // into a string again.
                let bytes = text.slice_ref(data.get().as_bytes());
                match serde_json::from_slice::<String>(&bytes).map(Data::text) {
                    Ok(text) if !text.is_json() => text,
                    _ => Data::json(bytes).ok()?,
                }
            }
            (None, Some(base64)) => Data::binary(BASE64.decode(base64).ok()?),
            _ => return None,
        };
        let room = match (room, &*self.rooms) {
            (Some(room), _) => RoomName::new(&room).ok()?,
            (None, [only]) => only.clone(),
            (None, _) => return None,
        };
        let event = event.as_deref().map(EventName::new).transpose().ok()?;
        Some(Command::Publish { request: 0, room, event, data, echo: self.echo })
    }

    fn put(&self, object: &serde_json::Value, out: &mut Packets) {
        let end = if self.lines { "\n" } else { "" };
        out.text(format!("{object}{end}").as_bytes());
    }
}

impl Protocol for Ndjson {
    fn decode(&mut self, message: Message, commands: &mut Vec<Command>) {
        commands.push(self.read(&message).unwrap_or(Command::Break(CloseReason::BadRequest)));
    }

    fn reply(&mut self, _: RequestId, reply: &Reply, out: &mut Packets) -> Then {
        if let Reply::Failed(error) = reply {
            self.put(&json!({ "error": error.to_string(), "temporary": error.is_temporary() }), out);
        }
        Then::Stay
    }

    fn news(&mut self, news: &News<'_>, out: &mut Packets) -> Then {
        match news {
            News::Gap(room, cause) => {
                self.put(&json!({ "room": room.as_str(), "gap": cause.as_str() }), out);
                Then::Stay
            }
            News::Position(room, position) => {
                self.put(&json!({ "room": room.as_str(), "id": position.to_string() }), out);
                Then::Stay
            }
            News::NewEpoch(_) => Then::Stay,
            News::Expelled(_) => Then::Close(CloseReason::Forbidden),
        }
    }

    fn format(&mut self, _: &RoomName, _: RequestId) -> RoomFormat {
        if self.lines { (&LINE).into() } else { (&MESSAGE).into() }
    }

    fn heartbeat(&mut self, out: &mut Packets) {
        if self.lines { out.text_static(b"{}\n") } else { out.ping() }
    }

    fn farewell(&mut self, reason: CloseReason, _: f32, out: &mut Packets) {
        if self.lines {
            self.put(&json!({ "close": reason.as_str(), "reconnect": reason.come_back() }), out);
        } else if let Some((code, text)) = reason.plain_close() {
            out.close(code, text);
        }
    }
}

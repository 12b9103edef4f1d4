//! The Centrifuge protocol, JSON: many rooms over one WebSocket, with requests and replies. A room is a
//! channel. Source: <https://centrifugal.dev/docs/transports/client_protocol>.
//!
//! A text frame holds one or several JSON objects, one per line. A client's object is a command, such as
//! `{"id":1,"subscribe":{"channel":"lobby"}}`. The server answers it with a reply that has the same id, and
//! sends pushes, which have none. `{}` is a ping from the server and a pong from the client.
//!
//! Publications that are JSON ([`Data::json`]) are sent unchanged. Other text is sent as a JSON string, and
//! binary data as a base64 string with the tag `"encoding":"base64"`. An event's name is the tag `"event"`.
//!
//! Not supported, and answered with error 108: presence, RPC, refresh of single subscriptions, and
//! options of supported commands that are not implemented ([`fields`]).

use std::{io::Write as _, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use broker_bridge::{Data, GapCause, Publication, RoomName};
use bytes::Bytes;
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{json, value::RawValue};

use self::fields::{Connect, History, Publish, Refresh, Subscribe, Unsubscribe};
use super::{
    Ask, Command, Endpoint, Message, News, On, Opening, Protocol, Reply, RequestId, RoomFormat, Route,
    Subscribed, Then, Timing, json::Object,
};
use crate::{
    framing::{Format, Packets, Writer},
    request::Problem,
    vocabulary::{CloseReason, ProtocolName, ReplyError},
    websocket::CloseCode,
};

mod fields;
mod recovery;
#[cfg(test)]
mod tests;

/// `/connection/websocket`, the default path of the protocol's SDKs.
pub static ENDPOINT: Endpoint = Endpoint {
    name: ProtocolName::new("centrifuge"),
    routes: &[Route { path: "/connection/websocket", on: On::WebSocket { subprotocol: SUBPROTOCOL, open } }],
    refuse: None,
};

/// The subprotocol that a client may offer; the SDKs offer none for JSON.
const SUBPROTOCOL: &str = "centrifuge-json";

/// A frame with a push.
pub static FORMAT: Format =
    Format { write: |room, publication, _, out| write(room, publication, out), head: None };

/// "unsubscribed by the server": the client does not resubscribe.
const UNSUBSCRIBED_BY_SERVER: u16 = 2000;
/// "insufficient state": the client resubscribes by itself.
const INSUFFICIENT_STATE: u16 = 2500;

/// The longest `ttl` sent, in seconds. The protocol's number has 32 bits, and JavaScript's timers count
/// milliseconds in 31 bits: beyond that `setTimeout` fires at once.
const MAX_TTL: u64 = 2_147_483;

/// The state of one Centrifuge session.
#[derive(Debug)]
struct Centrifuge {
    /// The server's ping interval, in seconds. The client closes the connection if pings stop.
    ping_seconds: u64,
}

#[expect(clippy::unnecessary_wraps, reason = "the type of every endpoint's function")]
fn open(ask: &Ask<'_>) -> Result<Opening, Problem> {
    let ping_seconds = ask.settings.heartbeat.interval.as_secs().max(1);
    let protocol = Arc::new(move || Box::new(Centrifuge { ping_seconds }) as _);
    // The token is usually in the connect command.
    Ok(Opening {
        rooms: Vec::new(),
        begin: Vec::new(),
        is_answer: false,
        has_all_positions: false,
        signs_in_later: true,
        protocol,
    })
}

/// Reads the commands of one frame.
fn decode(message: &Message, commands: &mut Vec<Command>) {
    let Message::Text(text) = message else {
        commands.push(Command::Break(CloseReason::BadRequest));
        return;
    };
    for line in text.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
        match serde_json::from_slice::<Object<WireCommand<'_>>>(line) {
            // Of several methods in one command, only one could be answered.
            Ok(Object(command)) if command.methods() <= 1 => commands.extend(command.named(text)),
            // The SDKs treat a close as final, so the connection is only closed if no reply is possible.
            Ok(Object(WireCommand { id: request @ 1.., .. })) => commands.push(bad_request(request)),
            Ok(_) => commands.push(Command::Break(CloseReason::BadRequest)),
            Err(_) => {
                let Ok(Object(Numbered { id: request @ 1.. })) = serde_json::from_slice(line) else {
                    commands.push(Command::Break(CloseReason::BadRequest));
                    return;
                };
                commands.push(bad_request(request));
            }
        }
    }
}

fn bad_request(request: RequestId) -> Command {
    Command::Answer { request, reply: Reply::Failed(ReplyError::BadRequest) }
}

/// A command on the wire: an id and one method.
#[derive(Deserialize)]
struct WireCommand<'a> {
    #[serde(default)]
    id: RequestId,
    connect: Option<Object<Connect>>,
    refresh: Option<Object<Refresh>>,
    subscribe: Option<Object<Subscribe>>,
    unsubscribe: Option<Object<Unsubscribe>>,
    #[serde(borrow)]
    publish: Option<Object<Publish<'a>>>,
    ping: Option<IgnoredAny>,
    send: Option<IgnoredAny>,
    presence: Option<IgnoredAny>,
    presence_stats: Option<IgnoredAny>,
    history: Option<Object<History>>,
    rpc: Option<IgnoredAny>,
    sub_refresh: Option<IgnoredAny>,
}

/// The part of a malformed command that is needed to answer it.
#[derive(Deserialize)]
struct Numbered {
    #[serde(default)]
    id: RequestId,
}

impl WireCommand<'_> {
    /// How many methods it contains.
    fn methods(&self) -> usize {
        let Self { id: _, connect, refresh, subscribe, unsubscribe, publish, history, .. } = self;
        let ignored =
            [&self.ping, &self.send, &self.presence, &self.presence_stats, &self.rpc, &self.sub_refresh];
        let served = [
            connect.is_some(),
            refresh.is_some(),
            subscribe.is_some(),
            unsubscribe.is_some(),
            publish.is_some(),
            history.is_some(),
        ];
        served.into_iter().chain(ignored.map(Option::is_some)).filter(|named| *named).count()
    }

    /// The command it stands for; `None` for a pong. `message` is the text that it was parsed from; payloads
    /// are kept as slices of it.
    fn named(self, message: &Bytes) -> Option<Command> {
        let request = self.id;
        let fail = |error| Command::Answer { request, reply: Reply::Failed(error) };
        let with_room = |name: &str, command: &dyn Fn(RoomName) -> Command| {
            RoomName::new(name).map_or_else(|_| fail(ReplyError::BadRequest), command)
        };
        let unserved = [self.presence, self.presence_stats, self.rpc, self.sub_refresh];
        let command = if self.send.is_some() {
            // The one method without a reply.
            return Some(Command::Break(CloseReason::NotAvailable));
        } else if let Some(Object(Connect { token })) = self.connect {
            Command::Connect { request, token: (!token.is_empty()).then_some(token) }
        } else if let Some(Object(Refresh { token })) = self.refresh {
            Command::Refresh { request, token }
        } else if let Some(Object(subscribe)) = self.subscribe {
            if subscribe.asks_for_more() {
                fail(ReplyError::NotAvailable)
            } else {
                let recover = subscribe.recover();
                with_room(&subscribe.channel, &|room| Command::Subscribe { request, room, recover })
            }
        } else if let Some(Object(Unsubscribe { channel })) = self.unsubscribe {
            with_room(&channel, &|room| Command::Unsubscribe { request, room })
        } else if let Some(Object(history)) = self.history {
            match history.query() {
                Some(query) => with_room(&history.channel, &|room| Command::History { request, room, query }),
                None => fail(ReplyError::BadRequest),
            }
        } else if let Some(Object(publish)) = self.publish {
            let json = |data: &RawValue| Data::json(message.slice_ref(data.get().as_bytes())).ok();
            if publish.asks_for_more() {
                fail(ReplyError::NotAvailable)
            } else if let Some(data) = publish.data.and_then(json) {
                with_room(&publish.channel, &|room| Command::Publish {
                    request,
                    room,
                    event: None,
                    data: data.clone(),
                    echo: true,
                })
            } else {
                fail(ReplyError::BadRequest)
            }
        } else if self.ping.is_some() {
            Command::Answer { request, reply: Reply::Pong }
        } else if unserved.iter().any(Option::is_some) {
            fail(ReplyError::NotAvailable)
        } else if request == 0 {
            return None; // `{}`
        } else {
            fail(ReplyError::UnknownMethod)
        };
        // Without an id the client could never learn the outcome.
        Some(if request == 0 { Command::Break(CloseReason::BadRequest) } else { command })
    }
}

impl Protocol for Centrifuge {
    fn decode(&mut self, message: Message, commands: &mut Vec<Command>) {
        decode(&message, commands);
    }

    fn reply(&mut self, id: RequestId, reply: &Reply, out: &mut Packets) -> Then {
        let body = match reply {
            Reply::Connected { session, ttl } => json!({ "id": id, "connect": {
                "client": session.to_string(),
                "version": concat!("tidegate ", env!("CARGO_PKG_VERSION")),
                "ping": self.ping_seconds,
                "pong": true,
                "expires": true,
                "ttl": ttl.min(&MAX_TTL),
            }}),
            Reply::Refreshed { session, ttl } => json!({ "id": id, "refresh": {
                "client": session.to_string(),
                "version": concat!("tidegate ", env!("CARGO_PKG_VERSION")),
                "expires": true,
                "ttl": ttl.min(&MAX_TTL),
            }}),
            Reply::Unsubscribed => {
                put_done(id, "unsubscribe", out);
                return Then::Stay;
            }
            Reply::Published => {
                put_done(id, "publish", out);
                return Then::Stay;
            }
            Reply::Pong => {
                put_done(id, "ping", out);
                return Then::Stay;
            }
            Reply::Failed(error) => {
                let temporary = error.is_temporary();
                let (code, message) = (code(*error), error.to_string());
                json!({ "id": id, "error": { "code": code, "message": message, "temporary": temporary } })
            }
        };
        out.json(&body);
        Then::Stay
    }

    fn subscribed(&mut self, id: RequestId, subscribed: &Subscribed<'_>, out: &mut Packets) -> usize {
        let (reply, held) = recovery::reply(id, subscribed);
        out.text(&reply);
        held
    }

    fn history(&mut self, id: RequestId, history: &super::History<'_>, out: &mut Packets) {
        out.text(&recovery::history(id, history));
    }

    fn news(&mut self, news: &News<'_>, out: &mut Packets) -> Then {
        match news {
            // Resubscribing would recover nothing, and would end in the same full queue.
            News::Gap(room, cause @ GapCause::Dropped) => {
                // A message outside all channels: within a channel, no push can report a gap and keep the
                // subscription.
                let gap = json!({ "room": room.as_str(), "cause": cause.as_str() });
                out.json(&json!({ "push": { "message": { "data": { "tidegate.gap": gap } } } }));
                Then::Stay
            }
            // After a gap the client learns what is missing when it subscribes again. A new epoch it can learn in no other
            // way: it knows that of its subscription only. It comes back with the last position before the new epoch, and
            // nothing is missing.
            News::Gap(room, _) | News::NewEpoch(room) => {
                put_unsubscribe(room, INSUFFICIENT_STATE, "insufficient state", out);
                Then::Leave
            }
            News::Position(..) => Then::Stay,
            News::Expelled(room) => {
                put_unsubscribe(room, UNSUBSCRIBED_BY_SERVER, "permission denied", out);
                Then::Stay
            }
        }
    }

    fn format(&mut self, _: &RoomName, _: RequestId) -> RoomFormat {
        (&FORMAT).into()
    }

    fn timing(&self) -> Timing {
        Timing { promised: Some(Duration::from_secs(self.ping_seconds)) }
    }

    fn heartbeat(&mut self, out: &mut Packets) {
        out.text(b"{}");
    }

    /// The close frame: after codes 3500–3999 the client does not reconnect, after 3000–3499 it does.
    fn farewell(&mut self, reason: CloseReason, _: f32, out: &mut Packets) {
        if let Some((code, text)) = close_of(reason) {
            out.close(code, text);
        }
    }
}

/// The minimal reply that reports success. Written by hand because there is one for every publication.
fn put_done(id: RequestId, method: &str, out: &mut Packets) {
    let mut reply = [0; 48];
    let mut free = reply.as_mut_slice();
    write!(free, r#"{{"id":{id},"{method}":{{}}}}"#).expect("10 digits and the longest method fit");
    let free = free.len();
    let written = reply.len() - free;
    out.text(reply.split_at(written).0);
}

/// The push for a publication, the same for every member of the room.
fn write(room: &RoomName, publication: &Publication, out: &mut Writer) {
    // Enough for usual room and user names.
    out.reserve(publication.data.bytes().len() + 256);
    out.put(b"{\"push\":{\"channel\":");
    out.put_json_string(room.as_str());
    out.put(b",\"pub\":");
    let offset = out.position().map(|position| position.offset);
    put_publication(publication, offset, out);
    out.put(b"}}");
}

/// A publication, without its room.
fn put_publication(publication: &Publication, offset: Option<u64>, out: &mut Writer) {
    out.put(b"{\"data\":");
    let binary = put_data(out, &publication.data);
    if let Some(publisher) = &publication.publisher {
        write!(out, r#","info":{{"client":"{}""#, publisher.session).expect(GROWS);
        if let Some(user) = &publisher.user {
            out.put(b",\"user\":");
            out.put_json_string(user);
        }
        out.put(b"}");
    }
    if let Some(offset) = offset {
        write!(out, r#","offset":{offset}"#).expect(GROWS);
    }
    let event = publication.event.as_ref().map(|event| ("event", event.as_str()));
    let encoding = binary.then_some(("encoding", "base64"));
    let mut opening = ",\"tags\":{";
    for (name, value) in event.into_iter().chain(encoding) {
        out.put(std::mem::replace(&mut opening, ",").as_bytes());
        out.put_json_string(name);
        out.put(b":");
        out.put_json_string(value);
    }
    if opening == "," {
        out.put(b"}");
    }
    out.put(b"}");
}

/// Appends the data as JSON. Returns whether it is binary data in base64.
fn put_data(out: &mut Writer, data: &Data) -> bool {
    let Some(text) = data.as_text() else {
        out.put_json_string(&BASE64.encode(data.bytes()));
        return true;
    };
    if data.is_json() {
        out.put_json_line(text);
    } else {
        out.put_json_string(text);
    }
    false
}

const GROWS: &str = "a vector takes everything";

fn put_unsubscribe(room: &RoomName, code: u16, reason: &str, out: &mut Packets) {
    let push = json!({ "channel": room.as_str(), "unsubscribe": { "code": code, "reason": reason } });
    out.json(&json!({ "push": push }));
}

/// The protocol's own code and text for a reason, if it has any.
fn close_of(reason: CloseReason) -> Option<(CloseCode, &'static str)> {
    let (code, text) = match reason {
        CloseReason::Drain => (3001, "shutdown"),
        CloseReason::MaxAge => (3011, "force reconnect"),
        CloseReason::Internal | CloseReason::OutOfMemory => (3004, "internal server error"),
        CloseReason::TokenExpired => (3005, "connection expired"),
        CloseReason::SlowConsumer => (3008, "slow"),
        CloseReason::Gap => (3010, "insufficient state"),
        CloseReason::HeartbeatTimeout => (3012, "no pong"),
        CloseReason::OverLimit(_) => (3013, "too many requests"),
        CloseReason::InvalidToken => (3500, "invalid token"),
        CloseReason::BadRequest => (3501, "bad request"),
        CloseReason::Stale => (3502, "stale"),
        CloseReason::Forbidden => (3507, "permission denied"),
        CloseReason::NotAvailable => (3508, "not available"),
        CloseReason::Client
        | CloseReason::Answered
        | CloseReason::Lost
        | CloseReason::NoProgress
        | CloseReason::ProtocolError
        | CloseReason::InvalidText
        | CloseReason::MessageTooBig
        | CloseReason::PublishFailed
        | CloseReason::BrokerRefused => {
            return reason.plain_close();
        }
    };
    CloseCode::new(code).map(|code| (code, text))
}

/// The protocol's error codes.
fn code(error: ReplyError) -> u16 {
    match error {
        ReplyError::Unavailable | ReplyError::NotNow | ReplyError::KeyAwaited | ReplyError::Internal => 100,
        ReplyError::Unauthorized => 101,
        ReplyError::Forbidden => 103,
        ReplyError::UnknownMethod => 104,
        ReplyError::AlreadySubscribed => 105,
        ReplyError::LimitExceeded => 106,
        ReplyError::BadRequest => 107,
        ReplyError::NotAvailable | ReplyError::Refused => 108,
        ReplyError::TokenExpired => 109,
        ReplyError::TooManyRequests(_) => 111,
        ReplyError::Unrecoverable => 112,
    }
}

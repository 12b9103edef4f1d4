//! Wire protocols: they turn a client's messages into [`Command`]s, and replies, news and publications into
//! bytes.
//!
//! A protocol is one folder and one line in [`TABLE`]. The folder contains its endpoint (routes, and what a
//! request there becomes), its state machine ([`Protocol`], one per session), its publication formats
//! ([`Format`]) and its transcripts. Nothing outside the folder names the protocol,
//! which is why these modules are `mod.rs` files.
//!
//! A state machine does no IO, reads no clock, and knows nothing of brokers and grants. Its output takes two
//! forms:
//!
//! - Publications are the same bytes for all members of a room with the same
//!   [`Encoding`](crate::framing::Encoding). The format encodes them once per node, and they are shared.
//! - Everything else is for one session; its protocol writes it into [`Packets`].
//!
//! `docs/design/layout.md` explains how to add one.

use std::{fmt, rc::Rc, time::Duration};

use axum::body::Body;
use broker_bridge::{Cursor, Data, EventName, GapCause, Publication, RoomName, SessionId};
use bytes::Bytes;
use http::{Response, request::Parts};

use crate::{
    framing::{Format, MemberState, Packets},
    request::Problem,
    vocabulary::{CloseReason, ProtocolName, ReplyError},
};

pub mod centrifuge;
pub mod endpoint;
pub mod event_stream;
mod json;
pub mod long_poll;
pub mod ndjson;
pub mod plain;
pub mod publish;

pub use self::endpoint::{Ask, Call, Endpoint, MakeProtocol, On, Opening, Route};

/// Every protocol. If several can serve a request equally well, the first one does.
pub static TABLE: [&Endpoint; 6] = [
    &plain::ENDPOINT,
    &event_stream::ENDPOINT,
    &ndjson::ENDPOINT,
    &long_poll::ENDPOINT,
    &centrifuge::ENDPOINT,
    &publish::ENDPOINT,
];

/// The names of the protocols that have sessions.
pub fn names() -> Vec<ProtocolName> {
    TABLE.iter().filter(|endpoint| endpoint.has_sessions()).map(|endpoint| endpoint.name).collect()
}

/// A refusal in the form that the request's protocol needs, if it needs a special one.
pub fn refuse(request: &Parts, problem: &Problem) -> Option<Response<Body>> {
    TABLE.iter().filter_map(|endpoint| endpoint.refuse).find_map(|refuse| refuse(request, problem))
}

/// The protocol of one session, with its state.
pub trait Protocol: fmt::Debug {
    /// Parses one message from the client and appends the resulting commands to `commands`.
    fn decode(&mut self, message: Message, commands: &mut Vec<Command>);

    /// Writes the reply to a request.
    fn reply(&mut self, request: RequestId, reply: &Reply, out: &mut Packets) -> Then;

    /// Writes the reply to a subscription that has become active. Returns how many of the
    /// [missed](Subscribed::missed) publications the reply contains; the session gets the others as publications.
    fn subscribed(&mut self, request: RequestId, subscribed: &Subscribed<'_>, out: &mut Packets) -> usize {
        let _ = (request, subscribed, out);
        0
    }

    /// Writes the reply to a request for a part of a room's history: as many of its publications as fit, and at least
    /// one.
    fn history(&mut self, request: RequestId, history: &History<'_>, out: &mut Packets) {
        let _ = (request, history, out);
    }

    /// Writes something that the client did not ask for.
    fn news(&mut self, news: &News<'_>, out: &mut Packets) -> Then;

    /// How publications of `room` are encoded for this session; `request` subscribed to the room. Called once
    /// for each membership, when it begins.
    fn format(&mut self, room: &RoomName, request: RequestId) -> RoomFormat;

    /// How often the session needs heartbeats.
    fn timing(&self) -> Timing {
        Timing::default()
    }

    /// For a session that is one answer and not a stream: how long it may wait until there is something to answer.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// How many publications the answer has, for a session that is one. It ends once it has caught up and has any.
    fn answered(&self) -> u64 {
        0
    }

    /// Writes the first message, if the protocol has one. `spread` is a random number in `0..1` that spreads
    /// clients over time.
    fn greet(&mut self, spread: f32, out: &mut Packets) {
        let _ = (spread, out);
    }

    /// Writes a heartbeat, which keeps an idle connection alive and, if the protocol supports that, makes the
    /// client answer.
    fn heartbeat(&mut self, out: &mut Packets);

    /// Writes the final message of a session. `spread` is as in [`greet`](Self::greet), for clients that are
    /// told to reconnect.
    fn farewell(&mut self, reason: CloseReason, spread: f32, out: &mut Packets);
}

/// What happens to the session after a message has been written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing.
    Stay,
    /// It leaves the room that the news concern.
    Leave,
    /// The session ends.
    Close(CloseReason),
}

/// A message to a session that is not a reply.
#[derive(Clone, Copy, Debug)]
pub enum News<'a> {
    /// Publications of the room may be missing before this point.
    Gap(&'a RoomName, GapCause),
    /// The session has begun in a room with a history, after this position.
    Position(&'a RoomName, Cursor),
    /// From here on, the positions of the room's publications have another epoch. Nothing is missing.
    NewEpoch(&'a RoomName),
    /// The session has been removed from the room, because its new token does not grant it.
    Expelled(&'a RoomName),
}

/// How publications of one room are encoded for one session.
pub struct RoomFormat {
    /// The format, a static.
    pub format: &'static Format,
    /// A protocol-defined number for anything else that the bytes depend on.
    pub variant: u32,
    /// The state for the member's own heads, if the format has any.
    pub state: Option<Rc<MemberState>>,
}

impl From<&'static Format> for RoomFormat {
    fn from(format: &'static Format) -> Self {
        Self { format, variant: 0, state: None }
    }
}

/// When heartbeats are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// The heartbeat interval that the client has been promised, if any.
    pub promised: Option<Duration>,
}

/// One message of the transport, without its framing.
#[derive(Debug)]
pub enum Message {
    /// UTF-8, already verified.
    Text(Bytes),
    /// Arbitrary bytes.
    Binary(Bytes),
}

/// Identifies a request within a session. Protocols without requests use 0.
pub type RequestId = u32;

/// A command from a client, parsed but not authorized yet.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Begin the session, with a token unless the request had one.
    Connect {
        /// The request.
        request: RequestId,
        /// The token.
        token: Option<String>,
    },
    /// Replace the token.
    Refresh {
        /// The request.
        request: RequestId,
        /// The token.
        token: String,
    },
    /// Receive the publications of a room.
    Subscribe {
        /// The request.
        request: RequestId,
        /// The room.
        room: RoomName,
        /// Set if the client also asks for missed publications.
        recover: Option<Recover>,
    },
    /// Stop receiving the publications of a room.
    Unsubscribe {
        /// The request.
        request: RequestId,
        /// The room.
        room: RoomName,
    },
    /// Read a part of a room's history.
    History {
        /// The request.
        request: RequestId,
        /// The room.
        room: RoomName,
        /// Which part.
        query: HistoryQuery,
    },
    /// Reply to something that needs no authorization and changes nothing.
    Answer {
        /// The request.
        request: RequestId,
        /// The reply.
        reply: Reply,
    },
    /// The client violated its protocol.
    Break(CloseReason),
    /// Publish to a room.
    Publish {
        /// The request.
        request: RequestId,
        /// The room.
        room: RoomName,
        /// The name of the event, if the client gave one.
        event: Option<EventName>,
        /// The payload.
        data: Data,
        /// Whether the publishing session itself receives the publication too.
        echo: bool,
    },
}

impl Command {
    /// The request that the command belongs to.
    pub fn request(&self) -> RequestId {
        match self {
            Self::Connect { request, .. }
            | Self::Refresh { request, .. }
            | Self::Subscribe { request, .. }
            | Self::Unsubscribe { request, .. }
            | Self::History { request, .. }
            | Self::Answer { request, .. }
            | Self::Publish { request, .. } => *request,
            Self::Break(_) => 0,
        }
    }
}

/// What a client asks for that comes back to a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recover {
    /// The position up to which it has received everything. A position with epoch 0 never existed.
    pub since: Cursor,
    /// Whether the subscription fails if publications may be missing after that position.
    pub or_fail: bool,
}

/// A subscription that has become active.
#[derive(Clone, Copy, Debug)]
pub struct Subscribed<'a> {
    /// The position after which the session receives everything, [missed](Self::missed) publications included. `None`
    /// if the room has no history, or if its position is not known.
    pub position: Option<Cursor>,
    /// Whether the session continues where the client left off. `None` if the client did not ask for that.
    pub recovered: Option<bool>,
    /// What the client has missed, in order, with positions of one epoch. Maybe not all of it.
    pub missed: &'a [(&'a Publication, Cursor)],
    /// How many bytes the reply may have.
    pub most: usize,
}

/// Which part of a room's history is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HistoryQuery {
    /// The position at which it begins, exclusively. `None`: with the oldest publication, or with the newest if it is
    /// [reversed](Self::is_reversed).
    pub since: Option<Cursor>,
    /// The most publications. 0: only the position of the newest.
    pub limit: usize,
    /// Whether it goes back in time.
    pub is_reversed: bool,
}

/// A part of a room's history.
#[derive(Clone, Copy, Debug)]
pub struct History<'a> {
    /// The epoch of the [publications](Self::publications), and the offset of the newest publication in the room. Both
    /// together are the newest's position if the room's epoch has not changed since, or if there are no publications.
    pub position: Cursor,
    /// The publications, in the order that was asked for, with positions of one epoch. The client continues after the last
    /// to get those of the next epoch.
    pub publications: &'a [(&'a Publication, Cursor)],
    /// How many bytes the reply may have.
    pub most: usize,
}

/// A reply to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The session has begun.
    Connected {
        /// Its id.
        session: SessionId,
        /// Seconds after which the client should refresh its token.
        ttl: u64,
    },
    /// The token has been replaced.
    Refreshed {
        /// Its id.
        session: SessionId,
        /// Seconds after which the client should refresh its token again.
        ttl: u64,
    },
    /// The subscription has ended.
    Unsubscribed,
    /// The broker has accepted the publication.
    Published,
    /// A reply to the client's ping.
    Pong,
    /// The request failed; the connection stays open.
    Failed(ReplyError),
}

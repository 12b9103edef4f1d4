//! Wire protocols: what a client sends becomes [`Command`]s, what it is sent becomes bytes.
//!
//! A protocol is one folder and one line in [`TABLE`]. In its folder are its endpoint (routes, and what a request there
//! becomes), its state machine ([`Protocol`], one per session), its publication formats
//! ([`Format`](crate::framing::Format)) and its transcripts. Nothing outside of the folder names it. (That is why these
//! modules are `mod.rs` files.)
//!
//! A state machine does no IO, reads no clock, and knows no broker and no grant. It has two ways out:
//!
//! - publications are the same bytes for every member of a room with the same
//!   [`Encoding`](crate::framing::Encoding): they are written once per node, by the format, and shared;
//! - everything else is meant for one session and written by its protocol into [`Packets`].
//!
//! `docs/design/layout.md` says how to add one.

use std::{fmt, rc::Rc, time::Duration};

use axum::body::Body;
use broker_bridge::{Data, EventName, GapCause, RoomName, SessionId};
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
pub mod ndjson;
pub mod plain;
pub mod publish;

pub use self::endpoint::{Ask, Call, Endpoint, MakeProtocol, On, Opening, Route};

/// Every protocol. Where a request leaves the choice open, the first one that can serve it does.
pub static TABLE: [&Endpoint; 5] =
    [&plain::ENDPOINT, &event_stream::ENDPOINT, &ndjson::ENDPOINT, &centrifuge::ENDPOINT, &publish::ENDPOINT];

/// The names of the protocols that sessions speak.
pub fn names() -> Vec<ProtocolName> {
    TABLE.iter().filter(|endpoint| endpoint.has_sessions()).map(|endpoint| endpoint.name).collect()
}

/// A refusal in the form that the request's protocol needs, if it needs one of its own.
pub fn refuse(request: &Parts, problem: &Problem) -> Option<Response<Body>> {
    TABLE.iter().filter_map(|endpoint| endpoint.refuse).find_map(|refuse| refuse(request, problem))
}

/// The protocol of one session, with its state.
pub trait Protocol: fmt::Debug {
    /// Reads one message of the client and appends what it asks for to `commands`.
    fn decode(&mut self, message: Message, commands: &mut Vec<Command>);

    /// Answers a request.
    fn reply(&mut self, request: RequestId, reply: &Reply, out: &mut Packets) -> Then;

    /// Tells the client something that it did not ask for.
    fn news(&mut self, news: &News<'_>, out: &mut Packets) -> Then;

    /// How publications of `room` are written for this session, which `request` subscribed to it. Asked once for each
    /// membership, when it begins.
    fn format(&mut self, room: &RoomName, request: RequestId) -> RoomFormat;

    /// How often the session needs heartbeats.
    fn timing(&self) -> Timing {
        Timing::default()
    }

    /// What is sent before everything else. `spread` is a random number in `0..1`, which spreads clients over time.
    fn greet(&mut self, spread: f32, out: &mut Packets) {
        let _ = (spread, out);
    }

    /// Keeps an idle connection alive and asks the client for a sign of life, where the protocol can.
    fn heartbeat(&mut self, out: &mut Packets);

    /// The final message of a session. `spread` is as in [`greet`](Self::greet), for clients that are told to come
    /// back.
    fn farewell(&mut self, reason: CloseReason, spread: f32, out: &mut Packets);
}

/// What follows for the session from what it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing.
    Stay,
    /// It is no longer in the room that the news are about.
    Leave,
    /// The session ends.
    Close(CloseReason),
}

/// What a session is told without having asked.
#[derive(Clone, Copy, Debug)]
pub enum News<'a> {
    /// Publications of the room may be missing just before.
    Gap(&'a RoomName, GapCause),
    /// The session is no longer in the room, because its new token does not grant it.
    Expelled(&'a RoomName),
}

/// How publications of one room are written for one session.
pub struct RoomFormat {
    /// The format, a static.
    pub format: &'static Format,
    /// The protocol's own number for what else the bytes depend on.
    pub variant: u32,
    /// What the member's private heads are written from, if the format has any.
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
    /// The longest time between two heartbeats that the client has been told to expect, if it has.
    pub promised: Option<Duration>,
}

/// One message of the transport, without its framing.
#[derive(Debug)]
pub enum Message {
    /// UTF-8, already verified.
    Text(Bytes),
    /// Any bytes.
    Binary(Bytes),
}

/// Which of a client's requests something belongs to. Protocols without requests use 0.
pub type RequestId = u32;

/// What a client wants, parsed and named, not yet permitted.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Begin the session, with a token unless the connection itself brought one.
    Connect {
        /// The request.
        request: RequestId,
        /// The token.
        token: Option<String>,
    },
    /// Go on with a newer token.
    Refresh {
        /// The request.
        request: RequestId,
        /// The token.
        token: String,
    },
    /// Hear what is published in a room.
    Subscribe {
        /// The request.
        request: RequestId,
        /// The room.
        room: RoomName,
        /// Whether to hear also what the client has missed.
        recover: bool,
    },
    /// Hear it no more.
    Unsubscribe {
        /// The request.
        request: RequestId,
        /// The room.
        room: RoomName,
    },
    /// Answer something that needs no permission and changes nothing.
    Answer {
        /// The request.
        request: RequestId,
        /// The answer.
        reply: Reply,
    },
    /// The client broke its protocol.
    Break(CloseReason),
    /// Publish into a room.
    Publish {
        /// The request.
        request: RequestId,
        /// The room.
        room: RoomName,
        /// The event's name, if the client gave one.
        event: Option<EventName>,
        /// The payload.
        data: Data,
        /// Whether the publishing session itself should be left out.
        echo: bool,
    },
}

impl Command {
    /// Which of the client's requests it is.
    pub fn request(&self) -> RequestId {
        match self {
            Self::Connect { request, .. }
            | Self::Refresh { request, .. }
            | Self::Subscribe { request, .. }
            | Self::Unsubscribe { request, .. }
            | Self::Answer { request, .. }
            | Self::Publish { request, .. } => *request,
            Self::Break(_) => 0,
        }
    }
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The session has begun.
    Connected {
        /// Its name.
        session: SessionId,
        /// Seconds after which it should come with a new token.
        ttl: u64,
    },
    /// The session goes on for so many seconds.
    Refreshed {
        /// Its name.
        session: SessionId,
        /// Seconds after which it should come with a newer token.
        ttl: u64,
    },
    /// The subscription stands.
    Subscribed {
        /// Whether the client asked for what it has missed. It does not get it.
        recover: bool,
    },
    /// The subscription has ended.
    Unsubscribed,
    /// The broker has taken the publication.
    Published,
    /// Still here.
    Pong,
    /// It could not be done; the connection lives.
    Failed(ReplyError),
}

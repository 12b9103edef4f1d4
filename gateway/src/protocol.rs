//! Wire protocols, sans-IO: what clients say becomes [`Command`]s, what they are told becomes bytes.
//!
//! A protocol never touches a socket, knows no broker and checks no grant. Each is one file; this one
//! holds what they share. A protocol has two ways out:
//!
//! - publications are the same bytes for every member of a room that uses the same [`WireFormat`]: they
//!   are encoded once per node and shared ([`WireFormat::encode`]);
//! - everything else is said to one session and encoded by its [`Protocol`].

use broker_bridge::{Data, EventName, GapCause, Publication, RoomName};
use bytes::Bytes;

use crate::{session::CloseReason, websocket};

pub mod event_stream;
pub mod plain;

/// The protocol of one session, with its state.
#[derive(Debug)]
pub enum Protocol {
    /// Plain WebSocket: one room, frames are payloads.
    Plain(plain::Plain),
    /// Server-sent events: one or several rooms, nothing from the client.
    EventStream(event_stream::EventStream),
}

/// The name of a protocol: the metric's label and the log's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolName {
    /// [`Protocol::Plain`]
    Plain,
    /// [`Protocol::EventStream`]
    EventStream,
}

impl ProtocolName {
    /// Every protocol.
    pub const ALL: [Self; 2] = [Self::Plain, Self::EventStream];

    /// The metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::EventStream => "sse",
        }
    }
}

/// One message of the transport, unframed.
#[derive(Debug)]
pub enum Message {
    /// UTF-8, already verified.
    Text(Bytes),
    /// Any bytes.
    Binary(Bytes),
}

/// What a client wants, parsed and named, not yet permitted.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Publish into a room.
    Publish {
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

/// How publications are written for all sessions of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum WireFormat {
    /// A WebSocket frame whose payload is the publication's data.
    PlainFrame,
    /// An event of an event stream that carries one room.
    Event,
    /// An event of an event stream that carries several rooms.
    RoomEvent,
}

impl WireFormat {
    /// How many there are.
    pub const COUNT: usize = 3;

    /// The bytes every member with this format is sent.
    pub fn encode(self, room: &RoomName, publication: &Publication) -> Bytes {
        match self {
            Self::PlainFrame => plain::encode(publication),
            Self::Event => event_stream::encode(None, publication),
            Self::RoomEvent => event_stream::encode(Some(room), publication),
        }
    }
}

impl Protocol {
    /// Its name.
    pub fn name(&self) -> ProtocolName {
        match self {
            Self::Plain(_) => ProtocolName::Plain,
            Self::EventStream(_) => ProtocolName::EventStream,
        }
    }

    /// How it wants publications written.
    pub fn format(&self) -> WireFormat {
        match self {
            Self::Plain(_) => WireFormat::PlainFrame,
            Self::EventStream(stream) => stream.format(),
        }
    }

    /// Reads one message of the client and appends what it asks for to `commands`.
    pub fn decode(&mut self, message: Message, commands: &mut Vec<Command>) {
        match self {
            Self::Plain(plain) => commands.push(plain.decode(message)),
            // The transport of an event stream has no way for a client to send.
            Self::EventStream(_) => {}
        }
    }

    /// Tells the client that publications of a room may be missing.
    pub fn gap(&self, room: &RoomName, cause: GapCause) -> Notice {
        match self {
            Self::Plain(plain) => plain.gap(),
            Self::EventStream(_) => Notice::Send(event_stream::gap(room, cause)),
        }
    }

    /// What keeps an idle connection alive and proves that the client is there, where it can.
    pub fn heartbeat(&self) -> Bytes {
        match self {
            Self::Plain(_) => plain::PING,
            Self::EventStream(_) => event_stream::KEEP_ALIVE,
        }
    }

    /// The last words of a session. `spread` is a random number in `0..1` with which clients that are
    /// told to come back are spread over time.
    pub fn farewell(&self, reason: CloseReason, spread: f32) -> Option<Bytes> {
        match self {
            Self::Plain(_) => reason.plain_close().map(|(code, text)| websocket::close_frame(code, text)),
            Self::EventStream(stream) => stream.farewell(reason, spread),
        }
    }
}

/// What a protocol does with news that are not a publication.
#[derive(Debug, PartialEq, Eq)]
pub enum Notice {
    /// It has no words for it and the client did not ask.
    Silent,
    /// These bytes.
    Send(Bytes),
    /// The client asked to be closed in this case.
    Close(CloseReason),
}

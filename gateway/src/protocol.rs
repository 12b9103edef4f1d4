//! Wire protocols, sans-IO: what clients say becomes [`Command`]s, what they are told becomes bytes.
//!
//! A protocol never touches a socket, knows no broker and checks no grant. Each is one file; this one
//! holds what they share. A protocol has two ways out:
//!
//! - publications are the same bytes for every member of a room that uses the same [`WireFormat`]: they
//!   are encoded once per node and shared ([`WireFormat::encode`]);
//! - everything else is said to one session and encoded by its [`Protocol`].

use std::time::Duration;

use broker_bridge::{Data, EventName, GapCause, Publication, RoomName, SessionId};
use bytes::Bytes;

use crate::{
    vocabulary::{CloseReason, ProtocolName, ReplyError},
    websocket::{self, Deflate},
};

pub mod centrifuge;
pub mod event_stream;
pub mod plain;

/// Every protocol, for metrics.
pub const NAMES: [ProtocolName; 3] = [plain::NAME, event_stream::NAME, centrifuge::NAME];

/// The protocol of one session, with its state.
#[derive(Debug)]
pub enum Protocol {
    /// Plain WebSocket: one room, frames are payloads.
    Plain(plain::Plain),
    /// Server-sent events: one or several rooms, nothing from the client.
    EventStream(event_stream::EventStream),
    /// Centrifuge JSON: many rooms over one WebSocket, with requests and replies.
    Centrifuge(centrifuge::Centrifuge),
}

/// One message of the transport, unframed.
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
    /// A WebSocket frame with a Centrifuge JSON push.
    CentrifugePush,
}

impl WireFormat {
    /// The bytes every member with this format is sent.
    pub fn encode(self, room: &RoomName, publication: &Publication) -> Bytes {
        match self {
            Self::PlainFrame => plain::encode(publication),
            Self::Event => event_stream::encode(None, publication),
            Self::RoomEvent => event_stream::encode(Some(room), publication),
            Self::CentrifugePush => centrifuge::encode(room, publication),
        }
    }
}

/// What two members must have in common to be sent the same bytes: the format, and how it is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoding {
    format: WireFormat,
    deflate: Option<Deflate>,
}

impl Encoding {
    /// How many there are.
    pub const COUNT: usize = 8;

    /// A format, compressed if that was agreed on and the format knows how.
    pub fn new(format: WireFormat, deflate: Option<Deflate>) -> Self {
        let web_socket = matches!(format, WireFormat::PlainFrame | WireFormat::CentrifugePush);
        Self { format, deflate: deflate.filter(|_| web_socket) }
    }

    /// The format.
    pub fn format(self) -> WireFormat {
        self.format
    }

    /// How frames are compressed.
    pub fn deflate(self) -> Option<Deflate> {
        self.deflate
    }

    /// The same, not compressed.
    #[must_use]
    pub fn uncompressed(self) -> Self {
        Self { deflate: None, ..self }
    }

    /// Its place in a table of [`Self::COUNT`].
    pub fn index(self) -> usize {
        match (self.deflate, self.format) {
            (None, format) => format as usize,
            (Some(Deflate::Wide), WireFormat::CentrifugePush) => 4,
            (Some(Deflate::Narrow), WireFormat::CentrifugePush) => 5,
            (Some(Deflate::Wide), _) => 6,
            (Some(Deflate::Narrow), _) => 7,
        }
    }
}

impl From<WireFormat> for Encoding {
    fn from(format: WireFormat) -> Self {
        Self { format, deflate: None }
    }
}

impl Protocol {
    /// Its name.
    pub fn name(&self) -> ProtocolName {
        match self {
            Self::Plain(_) => plain::NAME,
            Self::EventStream(_) => event_stream::NAME,
            Self::Centrifuge(_) => centrifuge::NAME,
        }
    }

    /// How it wants publications written.
    pub fn format(&self) -> WireFormat {
        match self {
            Self::Plain(_) => WireFormat::PlainFrame,
            Self::EventStream(stream) => stream.format(),
            Self::Centrifuge(_) => WireFormat::CentrifugePush,
        }
    }

    /// Reads one message of the client and appends what it asks for to `commands`.
    pub fn decode(&mut self, message: Message, commands: &mut Vec<Command>) {
        match self {
            Self::Plain(plain) => commands.push(plain.decode(message)),
            // The transport of an event stream has no way for a client to send.
            Self::EventStream(_) => {}
            Self::Centrifuge(_) => centrifuge::decode(&message, commands),
        }
    }

    /// Answers a request.
    pub fn reply(&self, request: RequestId, reply: &Reply) -> Notice {
        match self {
            Self::Plain(_) => plain::reply(reply),
            Self::EventStream(_) => Notice::Silent,
            Self::Centrifuge(centrifuge) => Notice::Send(centrifuge.reply(request, reply)),
        }
    }

    /// Tells the client that it is in a room no longer, because its new token does not grant it.
    pub fn expelled(&self, room: &RoomName) -> Notice {
        match self {
            Self::Plain(_) | Self::EventStream(_) => Notice::Close(CloseReason::Forbidden),
            Self::Centrifuge(_) => Notice::Send(centrifuge::expelled(room)),
        }
    }

    /// Tells the client that publications of a room may be missing.
    pub fn gap(&self, room: &RoomName, cause: GapCause) -> Notice {
        match self {
            Self::Plain(plain) => plain.gap(),
            Self::EventStream(_) => Notice::Send(event_stream::gap(room, cause)),
            // To subscribe again would bring nothing back, and would end in the same queue.
            Self::Centrifuge(_) if cause == GapCause::Dropped => Notice::Send(centrifuge::gap(room, cause)),
            Self::Centrifuge(_) => Notice::Leave(centrifuge::resubscribe(room)),
        }
    }

    /// What keeps an idle connection alive and proves that the client is there, where it can.
    pub fn heartbeat(&self) -> Bytes {
        match self {
            Self::Plain(_) => plain::PING,
            Self::EventStream(_) => event_stream::KEEP_ALIVE,
            Self::Centrifuge(_) => centrifuge::PING,
        }
    }

    /// The longest time between two heartbeats that the client has been told to expect, if it has.
    pub fn promised_heartbeat(&self) -> Option<Duration> {
        match self {
            Self::Plain(_) | Self::EventStream(_) => None,
            Self::Centrifuge(centrifuge) => Some(Duration::from_secs(centrifuge.ping_seconds)),
        }
    }

    /// The last words of a session. `spread` is a random number in `0..1` with which clients that are
    /// told to come back are spread over time.
    pub fn farewell(&self, reason: CloseReason, spread: f32) -> Option<Bytes> {
        match self {
            Self::Plain(_) => reason.plain_close().map(|(code, text)| websocket::close_frame(code, text)),
            Self::EventStream(stream) => stream.farewell(reason, spread),
            Self::Centrifuge(_) => centrifuge::farewell(reason),
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
    /// These bytes, and the session is no longer in the room that they are about.
    Leave(Bytes),
    /// The client asked to be closed in this case.
    Close(CloseReason),
}

#[cfg(test)]
mod tests {
    use broker_bridge::BrokerError;

    use super::{centrifuge::Centrifuge, plain::Plain, *};
    use crate::vocabulary::Outcome;

    /// A client comes back by itself exactly where that is safe and of use, whatever it speaks.
    #[test]
    fn every_protocol_is_told_the_same() {
        let room = RoomName::new("lobby").unwrap();
        let plain = Protocol::Plain(Plain { room, echo: true, close_on_gap: false });
        let centrifuge = Protocol::Centrifuge(Centrifuge { ping_seconds: 25 });
        let text = || "BUSY".into();
        for (error, status, temporary, close) in [
            (BrokerError::Unavailable, 503, true, CloseReason::PublishFailed),
            (BrokerError::Closed, 503, true, CloseReason::PublishFailed),
            (BrokerError::NotNow(text()), 503, true, CloseReason::PublishFailed),
            (BrokerError::Forbidden(text()), 403, false, CloseReason::Forbidden),
            (BrokerError::Refused(text()), 502, false, CloseReason::BrokerRefused),
            (BrokerError::Unknown, 504, false, CloseReason::PublishFailed),
        ] {
            let Outcome { refusal, reply } = Outcome::from(&error);
            assert_eq!(refusal.status().as_u16(), status, "{error}");
            assert_eq!(error.is_retryable() || error == BrokerError::Closed, temporary, "{error}");

            let failed = Reply::Failed(reply);
            assert_eq!(plain.reply(0, &failed), Notice::Close(close), "{error}");
            let Notice::Send(frame) = centrifuge.reply(1, &failed) else { panic!("{error}: no reply") };
            let frame = String::from_utf8_lossy(&frame).into_owned();
            assert!(frame.contains(&format!("\"temporary\":{temporary}")), "{error}: {frame}");
            assert!(!frame.contains("BUSY"), "what the broker said is not sent: {frame}");
        }
    }
}

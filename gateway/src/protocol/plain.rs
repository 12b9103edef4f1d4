//! Plain WebSocket (RFC 6455): a room is a URL, a frame is a payload, in both directions.
//!
//! Text stays text and binary stays binary. There is nothing else on the wire, so two things have no
//! words here: an event's name (not sent) and a gap (the client may ask to be closed at one).

use broker_bridge::{Data, DataKind, Publication, RoomName};
use bytes::Bytes;

use super::{Command, Message, Notice, Reply};
use crate::{
    vocabulary::{CloseReason, ProtocolName, ReplyError},
    websocket::{self, Opcode},
};

/// Its name.
pub const NAME: ProtocolName = ProtocolName::new("plain");

/// An empty ping frame (RFC 6455 §5.5.2), shared by all sessions.
pub(super) const PING: Bytes = Bytes::from_static(&[0x89, 0]);

/// The state of one plain session.
#[derive(Debug)]
pub struct Plain {
    /// The room of the URL.
    pub room: RoomName,
    /// Whether the session hears what it publishes itself (`?echo=`, default true).
    pub echo: bool,
    /// Whether a gap closes the session (`?gap=close`) or is passed over (`?gap=ignore`, default).
    pub close_on_gap: bool,
}

impl Plain {
    pub(super) fn decode(&self, message: Message) -> Command {
        let (kind, bytes) = match message {
            Message::Text(bytes) => (DataKind::Text, bytes),
            Message::Binary(bytes) => (DataKind::Binary, bytes),
        };
        let data = Data::declare(kind, bytes).expect("a text message has been verified by the codec");
        Command::Publish { request: 0, room: self.room.clone(), event: None, data, echo: self.echo }
    }

    pub(super) fn gap(&self) -> Notice {
        if self.close_on_gap { Notice::Close(CloseReason::Gap) } else { Notice::Silent }
    }
}

/// A plain frame has no place for an answer, and silence about a failure would be a lie.
pub(super) fn reply(reply: &Reply) -> Notice {
    match reply {
        Reply::Failed(ReplyError::Forbidden) => Notice::Close(CloseReason::Forbidden),
        Reply::Failed(ReplyError::Refused) => Notice::Close(CloseReason::BrokerRefused),
        Reply::Failed(ReplyError::TooManyRequests(limit)) => Notice::Close(CloseReason::OverLimit(*limit)),
        Reply::Failed(_) => Notice::Close(CloseReason::PublishFailed),
        _ => Notice::Silent,
    }
}

/// The frame that every plain member of the room is sent.
pub(super) fn encode(publication: &Publication) -> Bytes {
    let opcode = match publication.data.kind() {
        DataKind::Json | DataKind::Text => Opcode::Text,
        DataKind::Binary => Opcode::Binary,
    };
    websocket::encode(opcode, publication.data.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(close_on_gap: bool) -> Plain {
        Plain { room: RoomName::new("lobby").unwrap(), echo: true, close_on_gap }
    }

    #[test]
    fn text_stays_text_and_binary_stays_binary() {
        for (message, data) in [
            (Message::Text(Bytes::from_static(b"hi")), Data::text("hi")),
            (Message::Binary(Bytes::from_static(b"hi")), Data::binary(&b"hi"[..])),
            (Message::Text(Bytes::new()), Data::text("")),
        ] {
            let expected = Command::Publish {
                request: 0,
                room: RoomName::new("lobby").unwrap(),
                event: None,
                data,
                echo: true,
            };
            assert_eq!(plain(false).decode(message), expected);
        }
    }

    #[test]
    fn golden_frames() {
        assert_eq!(PING, websocket::ping(b""));
        let frame = |data| encode(&Publication::new(data)).to_vec();
        assert_eq!(frame(Data::text("hi")), b"\x81\x02hi");
        assert_eq!(frame(Data::binary(&b"\xff"[..])), b"\x82\x01\xff");
        assert_eq!(frame(Data::declare(DataKind::Json, Bytes::from_static(b"{}")).unwrap()), b"\x81\x02{}");
    }

    #[test]
    fn a_gap_closes_only_who_asked_for_it() {
        assert_eq!(plain(false).gap(), Notice::Silent);
        assert_eq!(plain(true).gap(), Notice::Close(CloseReason::Gap));
    }
}

//! Plain WebSocket (RFC 6455): a room is a URL, and a frame is a payload, in both directions.
//!
//! Text stays text and binary stays binary. Since nothing else is sent, event names are lost, and gaps are
//! not reported (the client may ask to be closed at a gap).

use std::sync::Arc;

use broker_bridge::{Data, DataKind, Publication, RoomName};

use super::{
    Ask, Command, Endpoint, Message, News, On, Opening, Protocol, Reply, RequestId, RoomFormat, Route, Then,
};
use crate::{
    auth::credential::PLAIN_SUBPROTOCOL,
    framing::{Format, Packets, Writer},
    request::Problem,
    vocabulary::{CloseReason, ProtocolName, ReplyError},
};

/// `GET /rooms/{room}` with a WebSocket handshake.
pub static ENDPOINT: Endpoint = Endpoint {
    name: ProtocolName::new("plain"),
    routes: &[Route { path: "/rooms/{room}", on: On::WebSocket { subprotocol: PLAIN_SUBPROTOCOL, open } }],
    refuse: None,
};

/// A frame whose payload is the publication's data.
static FORMAT: Format = Format { write, head: None };

/// The state of one plain session.
#[derive(Debug)]
struct Plain {
    /// The room in the URL.
    room: RoomName,
    /// Whether the session receives its own publications (`?echo=`, default true).
    echo: bool,
    /// Whether a gap closes the session (`?gap=close`) or is ignored (`?gap=ignore`, default).
    close_on_gap: bool,
}

fn open(ask: &Ask<'_>) -> Result<Opening, Problem> {
    let echo = ask.query().choice("echo", ["true", "false"])? == "true";
    let close_on_gap = ask.query().choice("gap", ["ignore", "close"])? == "close";
    let room = ask.room.clone().expect("the path of the route names a room");
    let rooms = vec![room.clone()];
    Ok(Opening {
        begin: ask.begin(&rooms)?,
        is_answer: false,
        has_all_positions: false,
        rooms,
        signs_in_later: false,
        protocol: Arc::new(move || Box::new(Plain { room: room.clone(), echo, close_on_gap })),
    })
}

fn write(_: &RoomName, publication: &Publication, _: u32, out: &mut Writer) {
    if publication.data.kind() == DataKind::Binary {
        out.binary();
    }
    out.put(publication.data.bytes());
}

impl Protocol for Plain {
    fn decode(&mut self, message: Message, commands: &mut Vec<Command>) {
        let (kind, bytes) = match message {
            Message::Text(bytes) => (DataKind::Text, bytes),
            Message::Binary(bytes) => (DataKind::Binary, bytes),
        };
        let data = Data::declare(kind, bytes).expect("a text message has been verified by the codec");
        let room = self.room.clone();
        commands.push(Command::Publish { request: 0, room, event: None, data, echo: self.echo });
    }

    /// Every frame is a payload, so there is no reply. A failure must not go unnoticed, so it ends the
    /// session.
    fn reply(&mut self, _: RequestId, reply: &Reply, _: &mut Packets) -> Then {
        match reply {
            Reply::Failed(ReplyError::Forbidden) => Then::Close(CloseReason::Forbidden),
            Reply::Failed(ReplyError::Refused) => Then::Close(CloseReason::BrokerRefused),
            Reply::Failed(ReplyError::TooManyRequests(limit)) => Then::Close(CloseReason::OverLimit(*limit)),
            Reply::Failed(_) => Then::Close(CloseReason::PublishFailed),
            _ => Then::Stay,
        }
    }

    fn news(&mut self, news: &News<'_>, _: &mut Packets) -> Then {
        match news {
            News::Gap(..) if self.close_on_gap => Then::Close(CloseReason::Gap),
            News::Gap(..) | News::Position(..) | News::NewEpoch(_) => Then::Stay,
            News::Expelled(_) => Then::Close(CloseReason::Forbidden),
        }
    }

    fn format(&mut self, _: &RoomName, _: RequestId) -> RoomFormat {
        (&FORMAT).into()
    }

    fn heartbeat(&mut self, out: &mut Packets) {
        out.ping();
    }

    fn farewell(&mut self, reason: CloseReason, _: f32, out: &mut Packets) {
        if let Some((code, text)) = reason.plain_close() {
            out.close(code, text);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::framing::{Encoding, Transport};

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
            let mut commands = Vec::new();
            plain(false).decode(message, &mut commands);
            assert_eq!(commands, [expected]);
        }
    }

    #[test]
    fn golden_frames() {
        let room = RoomName::new("lobby").unwrap();
        let encoding = Encoding::new(&FORMAT, Transport::WebSocket);
        let frame = |data| encoding.encode(&room, &Publication::new(data), None).to_vec();
        assert_eq!(frame(Data::text("hi")), b"\x81\x02hi");
        assert_eq!(frame(Data::binary(&b"\xff"[..])), b"\x82\x01\xff");
        assert_eq!(frame(Data::declare(DataKind::Json, Bytes::from_static(b"{}")).unwrap()), b"\x81\x02{}");
    }

    #[test]
    fn a_gap_closes_only_sessions_that_asked_for_it() {
        let lobby = RoomName::new("lobby").unwrap();
        let gap = News::Gap(&lobby, broker_bridge::GapCause::Interrupted);
        let mut out = Packets::default();
        assert_eq!(plain(false).news(&gap, &mut out), Then::Stay);
        assert_eq!(plain(true).news(&gap, &mut out), Then::Close(CloseReason::Gap));
        assert!(out.is_empty());
    }
}

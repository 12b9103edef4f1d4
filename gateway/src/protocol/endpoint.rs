//! Where a protocol is reached, and what a request there becomes.

use std::{fmt, pin::Pin, sync::Arc};

use axum::body::Body;
use broker_bridge::RoomName;
use http::{HeaderMap, Method, Response, request::Parts};

use super::Protocol;
use crate::{
    request::{Gate, Problem, query::Query},
    settings::Settings,
    vocabulary::{ProtocolName, Refusal},
};

/// A protocol, as the server sees it.
#[derive(Debug)]
pub struct Endpoint {
    /// Its name in metrics and logs.
    pub name: ProtocolName,
    /// Which requests it serves.
    pub routes: &'static [Route],
    /// Puts a refusal into the protocol's own form, if the request is such that it needs one. By default a refusal is
    /// a problem document (RFC 9457).
    pub refuse: Option<Refuse>,
}

/// Requests for one path, and what they become.
#[derive(Debug)]
pub struct Route {
    /// The path; `{room}` stands for a room's name.
    pub path: &'static str,
    /// Which requests to the path, and what they become.
    pub on: On,
}

/// What a request must be like, and what it becomes.
#[derive(Debug)]
pub enum On {
    /// A WebSocket handshake (RFC 6455 §4). Of those that offer subprotocols, the ones that offer this; of those that
    /// offer none, all, if it is the first route of its path.
    WebSocket {
        /// The subprotocol.
        subprotocol: &'static str,
        /// Opens the session.
        open: Open,
    },
    /// `GET` of a media type (RFC 9110 §12.5.1): the answer's body carries a session. Of requests that accept
    /// several alike, the first route of the path serves them.
    Stream {
        /// The media type.
        media_type: &'static str,
        /// Adds to the answer's head.
        head: fn(&mut HeaderMap),
        /// Opens the session.
        open: Open,
    },
    /// A request with this method, answered at once.
    Request {
        /// The method.
        method: Method,
        /// Answers it.
        answer: Answer,
    },
}

/// Puts a refusal into a protocol's own form, if the request needs one.
pub type Refuse = fn(&Parts, &Problem) -> Option<Response<Body>>;

/// Answers a request.
pub type Answer = fn(Call) -> Answering;

/// Decides what kind of session a request asks for, or refuses it. Who asks, and whether they may, is checked after
/// that, and in the same way for all protocols.
pub type Open = fn(&Ask<'_>) -> Result<Opening, Problem>;

/// An answer that is being made.
pub type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, Problem>> + Send>>;

/// A request for a session.
pub struct Ask<'a> {
    /// Its head.
    pub request: &'a Parts,
    /// The settings in effect.
    pub settings: &'a Settings,
    /// The room of the path, if the path names one.
    pub room: Option<RoomName>,
}

impl Ask<'_> {
    /// The query.
    pub fn query(&self) -> Query<'_> {
        Query::new(self.request.uri.query())
    }

    /// The room of the path, or those of `?room=…&room=…` without duplicates.
    pub fn rooms(&self) -> Result<Vec<RoomName>, Problem> {
        if let Some(room) = &self.room {
            return Ok(vec![room.clone()]);
        }
        let mut rooms = Vec::new();
        let most = self.settings.limits.rooms_per_session;
        for name in self.query().all("room") {
            let room =
                RoomName::new(&name).map_err(|error| Problem::new(Refusal::RoomName, error.to_string()))?;
            if rooms.contains(&room) {
                continue;
            }
            if rooms.len() == most {
                let detail = format!("a session may be in at most {most} rooms");
                return Err(Problem::new(Refusal::TooManyRooms, detail));
            }
            rooms.push(room);
        }
        if rooms.is_empty() {
            return Err(Problem::new(Refusal::BadRequest, "expected at least one query parameter `room`"));
        }
        Ok(rooms)
    }
}

/// A request to be answered at once.
pub struct Call {
    /// What every request is checked by.
    pub gate: Arc<Gate>,
    /// Its head.
    pub request: Arc<Parts>,
    /// Its body.
    pub body: Body,
    /// The room of the path, if the path names one.
    pub room: Option<RoomName>,
}

/// A session to be opened.
#[derive(Clone)]
pub struct Opening {
    /// The rooms that it is a member of from the start, without duplicates.
    pub rooms: Vec<RoomName>,
    /// Whether the client says who it is within the session, so that the request needs no token.
    pub signs_in_later: bool,
    /// Makes its protocol.
    pub protocol: MakeProtocol,
}

/// Makes the protocol of one session.
pub type MakeProtocol = Arc<dyn Fn() -> Box<dyn Protocol> + Send + Sync>;

impl Endpoint {
    /// Whether any of its routes opens sessions.
    pub fn has_sessions(&self) -> bool {
        self.routes.iter().any(|route| !matches!(route.on, On::Request { .. }))
    }
}

impl fmt::Debug for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opening")
            .field("rooms", &self.rooms)
            .field("signs_in_later", &self.signs_in_later)
            .finish_non_exhaustive()
    }
}

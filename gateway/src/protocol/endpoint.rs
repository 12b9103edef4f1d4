//! The endpoints of a protocol: its routes, and what a request there becomes.

use std::{fmt, pin::Pin, sync::Arc};

use axum::body::Body;
use broker_bridge::{Affinity, Cursor, RoomName, history::InvalidCursor};
use http::{HeaderMap, Method, Response, request::Parts};

use super::Protocol;
use crate::{
    request::{Gate, Problem, query::Query},
    settings::Settings,
    vocabulary::{ProtocolName, Refusal},
};

/// A protocol as the server sees it.
#[derive(Debug)]
pub struct Endpoint {
    /// Its name in metrics and logs.
    pub name: ProtocolName,
    /// Which requests it serves.
    pub routes: &'static [Route],
    /// Rewrites a refusal in the protocol's own form, for requests that need that. By default a refusal is a
    /// problem document (RFC 9457).
    pub refuse: Option<Refuse>,
}

/// The requests for one path, and what they become.
#[derive(Debug)]
pub struct Route {
    /// The path; `{room}` stands for a room's name.
    pub path: &'static str,
    /// Which requests to the path, and what they become.
    pub on: On,
}

/// The kind of request that a route serves, and what it becomes.
#[derive(Debug)]
pub enum On {
    /// A WebSocket handshake (RFC 6455 §4) that offers this subprotocol. The first route of a path also
    /// serves handshakes that offer none.
    WebSocket {
        /// The subprotocol.
        subprotocol: &'static str,
        /// Opens the session.
        open: Open,
    },
    /// `GET` of a media type (RFC 9110 §12.5.1): the response body carries a session. If a request accepts
    /// several types equally, the first route of the path serves it.
    Stream {
        /// The media type.
        media_type: &'static str,
        /// Sets additional response headers.
        head: fn(&mut HeaderMap),
        /// Opens the session.
        open: Open,
    },
    /// A request with this method that is answered directly.
    Request {
        /// The method.
        method: Method,
        /// Answers it.
        answer: Answer,
    },
}

/// Rewrites a refusal in a protocol's own form, if the request needs that.
pub type Refuse = fn(&Parts, &Problem) -> Option<Response<Body>>;

/// Answers a request.
pub type Answer = fn(Call) -> Answering;

/// Decides which kind of session a request asks for, or refuses it. Authentication and authorization come
/// after that, the same for all protocols.
pub type Open = fn(&Ask<'_>) -> Result<Opening, Problem>;

/// A pending response.
pub type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, Problem>> + Send>>;

/// A request for a session.
pub struct Ask<'a> {
    /// Its head.
    pub request: &'a Parts,
    /// The current settings.
    pub settings: &'a Settings,
    /// The room of the path, if the path names one.
    pub room: Option<RoomName>,
}

impl Ask<'_> {
    /// The query.
    pub fn query(&self) -> Query<'_> {
        Query::new(self.request.uri.query())
    }

    /// The room of the path, or those in `?room=…&room=…` without duplicates.
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

impl Ask<'_> {
    /// The position from which the client continues: `Last-Event-ID` (WHATWG HTML §9.2.3), or else `?since=`. Only for
    /// sessions in one room, since positions in different rooms have nothing to do with each other.
    ///
    /// A client cannot help what it sends as `Last-Event-ID`. What is no position is taken as one that nobody knows.
    pub fn since(&self) -> Result<Option<Cursor>, Problem> {
        let is_one_room = self.rooms()?.len() == 1;
        // A client that reconnects by itself sends the header, and the same query as before.
        let last_event_id = self.last_event_id().filter(|_| is_one_room);
        match self.query().one("since")?.filter(|_| last_event_id.is_none()) {
            Some(_) if !is_one_room => {
                let detail = "a session continues in one room only: open one for each room";
                Err(Problem::new(Refusal::BadRequest, detail))
            }
            Some(text) => text.parse().map(Some).map_err(|error: InvalidCursor| {
                Problem::new(Refusal::BadRequest, format!("query parameter `since`: {error}, such as 17-42"))
            }),
            None => {
                let unknown = Cursor { epoch: 0, offset: 0 };
                Ok(last_event_id.map(|id| id.parse().unwrap_or(unknown)))
            }
        }
    }

    fn last_event_id(&self) -> Option<&str> {
        let id = self.request.headers.get("last-event-id")?;
        Some(id.to_str().unwrap_or("?")).filter(|id| !id.is_empty())
    }
}

/// A request to be answered directly.
pub struct Call {
    /// The checks for requests.
    pub gate: Arc<Gate>,
    /// The broker's connection that this thread serves.
    pub affinity: Affinity,
    /// Its head.
    pub request: Arc<Parts>,
    /// Its body.
    pub body: Body,
    /// The room of the path, if the path names one.
    pub room: Option<RoomName>,
}

/// A session to open.
#[derive(Clone)]
pub struct Opening {
    /// The rooms that it joins at the start, without duplicates.
    pub rooms: Vec<RoomName>,
    /// The position in the only room from which the client continues.
    pub since: Option<Cursor>,
    /// Whether the client authenticates within the session, and the request needs no token.
    pub signs_in_later: bool,
    /// Creates its protocol state.
    pub protocol: MakeProtocol,
}

/// Creates the protocol state of one session.
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
            .field("since", &self.since)
            .field("signs_in_later", &self.signs_in_later)
            .finish_non_exhaustive()
    }
}

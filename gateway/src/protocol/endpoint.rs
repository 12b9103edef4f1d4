//! The endpoints of a protocol: its routes, and what a request there becomes.

use std::{fmt, num::NonZeroU32, pin::Pin, sync::Arc};

use axum::body::Body;
use broker_bridge::{Affinity, Cursor, RoomName, history::InvalidCursor};
use http::{HeaderMap, Method, Response, request::Parts};

use super::Protocol;
use crate::{
    framing::Positions,
    history::Beginning,
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
/// after that, the same for all protocols. So what it refuses must not depend on the policies of rooms.
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
    /// The position in each of `rooms`, the [rooms](Self::rooms) of the request, after which the client continues:
    /// `Last-Event-ID` (WHATWG HTML §9.2.3), or else `?since=`. In a request for several rooms both are
    /// [`Positions`]; what an event stream sends as an id has its room and a semicolon before them.
    ///
    /// A client cannot help what it sends as `Last-Event-ID`, and an `EventSource` that is refused never comes back. So
    /// what does not fit the rooms is taken as a position that nobody knows, in each room that has a history.
    pub fn since(&self, rooms: &[RoomName]) -> Result<Vec<Option<Cursor>>, Problem> {
        let given = self.query().one("since")?;
        // A client that reconnects by itself sends the header, and the same query as before.
        match (self.last_event_id(), given) {
            (Some(id), _) => Ok(positions(id, rooms).unwrap_or_else(|_| {
                rooms.iter().map(|room| self.has_history(room).then_some(UNKNOWN)).collect()
            })),
            (None, Some(text)) => positions(&text, rooms)
                .map_err(|why| Problem::new(Refusal::BadRequest, format!("query parameter `since`: {why}"))),
            (None, None) => Ok(Vec::new()),
        }
    }

    /// Where the client begins in each of `rooms`, the [rooms](Self::rooms) of the request: [after](Self::since) a position,
    /// with the newest publications (`?last=`), or live. [`Opening::check_policies`] refuses `?last=` where no room has a
    /// history.
    pub fn begin(&self, rooms: &[RoomName]) -> Result<Vec<Beginning>, Problem> {
        let since = self.since(rooms)?;
        let Some(last) = self.last()? else { return Ok(since.into_iter().map(Beginning::from).collect()) };
        if self.query().one("since")?.is_some() {
            let detail = "query parameters `since` and `last`: expected only one of them";
            return Err(Problem::new(Refusal::BadRequest, detail));
        }
        // The client has come back by itself, with what it has received in the meantime.
        if !since.is_empty() {
            return Ok(since.into_iter().map(Beginning::from).collect());
        }
        Ok(vec![Beginning::Last(last); rooms.len()])
    }

    fn last(&self) -> Result<Option<NonZeroU32>, Problem> {
        let Some(text) = self.query().one("last")? else { return Ok(None) };
        let number = text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
        match number {
            Some(number) if NonZeroU32::get(number) <= MAX_LAST => Ok(Some(number)),
            _ => {
                let detail =
                    format!("query parameter `last`: expected a number from 1 to {MAX_LAST}, found {text:?}");
                Err(Problem::new(Refusal::BadRequest, detail))
            }
        }
    }

    /// Whether the configuration gives the room a history.
    pub fn has_history(&self, room: &RoomName) -> bool {
        self.settings.history.of(room).is_some()
    }

    fn last_event_id(&self) -> Option<&str> {
        let id = self.request.headers.get("last-event-id")?;
        Some(id.to_str().unwrap_or("?")).filter(|id| !id.is_empty())
    }
}

/// A position that no log knows.
pub const UNKNOWN: Cursor = Cursor { epoch: 0, offset: 0 };

/// The most publications that a client may ask for with `?last=`.
const MAX_LAST: u32 = 1000;

/// The room keeps nothing that could be read.
fn needs_history() -> Problem {
    Problem::new(Refusal::NeedsHistory, "needs history: the configuration gives this room none")
}

/// How many rooms a client may continue in at once.
pub const MAX_POSITIONS: usize = 16;

/// Reads a position for each of the rooms.
fn positions(text: &str, rooms: &[RoomName]) -> Result<Vec<Option<Cursor>>, String> {
    if rooms.len() == 1 {
        let position = text.parse().map_err(|error: InvalidCursor| format!("{error}, such as 17-42"))?;
        return Ok(vec![Some(position)]);
    }
    let vector = text.split_once(';').map_or(text, |(_, vector)| vector);
    let positions: Positions = vector.parse().map_err(|error: InvalidCursor| {
        format!(
            "{error}, for each `room` in the order of the query, with commas in between, such as 17-42,18-3"
        )
    })?;
    let positions: Vec<_> = positions.iter().collect();
    if positions.len() != rooms.len() {
        let (found, expected) = (positions.len(), rooms.len());
        return Err(format!("expected {expected} positions, one for each `room`, found {found}"));
    }
    if positions.iter().flatten().count() > MAX_POSITIONS {
        return Err(format!("a session continues in at most {MAX_POSITIONS} rooms"));
    }
    Ok(positions)
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
    /// Where the client begins in each of the rooms. Empty if it begins live in all of them.
    pub begin: Vec<Beginning>,
    /// Whether the session is one answer. It counts as a command of its user, and all rooms need a history.
    pub is_answer: bool,
    /// Whether the client is told its positions in all rooms together, which are at most [`MAX_POSITIONS`].
    pub has_all_positions: bool,
    /// Whether the client authenticates within the session, and the request needs no token.
    pub signs_in_later: bool,
    /// Creates its protocol state.
    pub protocol: MakeProtocol,
}

impl Opening {
    /// Refuses what the policies of the rooms do not allow. Tells which rooms have a history, so only for clients that may
    /// enter the rooms.
    pub fn check_policies(&self, settings: &Settings) -> Result<(), Problem> {
        let recorded = self.rooms.iter().filter(|room| settings.history.of(room).is_some()).count();
        let asks_for_last = self.begin.iter().any(|begin| matches!(begin, Beginning::Last(_)));
        if (self.is_answer && recorded < self.rooms.len()) || (asks_for_last && recorded == 0) {
            return Err(needs_history());
        }
        if self.has_all_positions && recorded > MAX_POSITIONS {
            let detail = format!(
                "an event stream may have at most {MAX_POSITIONS} rooms with a history, found {recorded}: open several"
            );
            return Err(Problem::new(Refusal::TooManyRooms, detail));
        }
        Ok(())
    }
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
            .field("begin", &self.begin)
            .field("signs_in_later", &self.signs_in_later)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        auth::Keyring,
        config::{Config, Sources},
    };

    /// What the request asks for, if rooms that begin with `kept:` have a history.
    fn since(target: &str, last_event_id: &str) -> Result<Vec<Option<Cursor>>, String> {
        let flags = vec![(r#"rooms."kept:*".history.size"#.to_owned(), "10".to_owned())];
        let config = Config::load(&Sources { flags, ..Sources::default() }).unwrap();
        let settings = Settings::new(&config, Arc::new(Keyring::new(Vec::new(), Vec::new())));
        let request = http::Request::get(target).header("last-event-id", last_event_id).body(()).unwrap();
        let ask = Ask { request: &request.into_parts().0, settings: &settings, room: None };
        let rooms = ask.rooms().map_err(|problem| problem.detail().to_owned())?;
        ask.since(&rooms).map_err(|problem| problem.detail().to_owned())
    }

    const fn at(epoch: u64, offset: u64) -> Cursor {
        Cursor { epoch, offset }
    }

    #[test]
    fn the_header_counts_before_the_query() {
        for (target, header, expected) in [
            ("/?room=kept:a", "", vec![]),
            ("/?room=kept:a&since=17-42", "", vec![Some(at(17, 42))]),
            ("/?room=kept:a&since=17-42", "17-43", vec![Some(at(17, 43))]),
            ("/?room=kept:a&room=kept:b&since=17-42,", "", vec![Some(at(17, 42)), None]),
            (
                "/?room=kept:a&room=l&room=kept:b&since=17-42,,18-3",
                "",
                vec![Some(at(17, 42)), None, Some(at(18, 3))],
            ),
            (
                "/?room=kept:a&room=kept:b&since=kept:b;17-42,18-3",
                "",
                vec![Some(at(17, 42)), Some(at(18, 3))],
            ),
            (
                "/?room=kept:a&room=kept:b&since=1-1,1-1",
                "kept:b;17-42,18-3",
                vec![Some(at(17, 42)), Some(at(18, 3))],
            ),
            // Without duplicates.
            (
                "/?room=kept:a&room=kept:a&room=kept:b&since=17-42,18-3",
                "",
                vec![Some(at(17, 42)), Some(at(18, 3))],
            ),
        ] {
            assert_eq!(since(target, header), Ok(expected), "{target} {header}");
        }
    }

    /// An `EventSource` that is refused never comes back.
    #[test]
    fn a_header_that_does_not_fit_is_a_position_that_nobody_knows() {
        let unknown = Some(UNKNOWN);
        assert_eq!(since("/?room=kept:a", "yesterday"), Ok(vec![unknown]));
        for header in [
            "kept:a",
            "kept:a;",
            "kept:a;17-42",
            "kept:a;17-42,18-3",
            "x;17-42,y,1-1",
            ";",
            "1-1,1-1,1-1,1-1",
        ] {
            let found = since("/?room=kept:a&room=live&room=kept:b", header);
            assert_eq!(found, Ok(vec![unknown, None, unknown]), "{header}");
        }
        assert_eq!(since("/?room=live&room=other", "live"), Ok(vec![None, None]));
    }

    #[test]
    fn a_query_that_does_not_fit_is_refused_with_a_reason() {
        let position = "expected a position: two decimal numbers below 2^64 with a hyphen between them";
        let vector = format!(
            "{position}, for each `room` in the order of the query, with commas in between, such as 17-42,18-3"
        );
        for (target, why) in [
            ("/?room=kept:a&since=x", format!("{position}, such as 17-42")),
            ("/?room=kept:a&since=", format!("{position}, such as 17-42")),
            ("/?room=a&room=b&since=x,y", vector),
            ("/?room=a&room=b&since=1-1", "expected 2 positions, one for each `room`, found 1".to_owned()),
            ("/?room=a&room=b&since=1-1,,", "expected 2 positions, one for each `room`, found 3".to_owned()),
        ] {
            assert_eq!(since(target, ""), Err(format!("query parameter `since`: {why}")), "{target}");
        }
        let (rooms, positions): (String, String) =
            (0..17).map(|n| (format!("room={n}&"), "1-1,".to_owned())).unzip();
        let target = format!("/?{rooms}since={}", positions.trim_end_matches(','));
        let why = "query parameter `since`: a session continues in at most 16 rooms";
        assert_eq!(since(&target, ""), Err(why.to_owned()));
    }
}

//! `/rooms/{room}` and `/rooms?room=…`: a room is a URL.
//!
//! | request | what it is |
//! |---|---|
//! | `GET /rooms/{room}` with a WebSocket handshake | plain frames in both directions |
//! | `GET /rooms/{room}` accepting `text/event-stream` | an event stream |
//! | `POST /rooms/{room}` | publish the body |
//! | `GET /rooms?room=a&room=b` | one event stream over several rooms |

use std::{convert::Infallible, sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::{Request, State},
};
use broker_bridge::RoomName;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header, request::Parts};
use percent_encoding::percent_decode_str;

use super::{publish, upgrade};
use crate::{
    auth::{Operation, credential},
    protocol::{event_stream as event_stream_protocol, plain},
    request::{Applicant, Gate, Problem, cors, event_stream, query::Query},
    shard::{Admission, admission::Door},
    vocabulary::Refusal,
    websocket::handshake,
};

const ONE_ROOM_METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, POST, OPTIONS");
const SEVERAL_ROOMS_METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, OPTIONS");

/// Handles `/rooms/{room}`.
pub async fn one_room(State(gate): State<Arc<Gate>>, request: Request) -> Response<Body> {
    let began = Instant::now();
    let (parts, body) = request.into_parts();
    let room = match room_of_path(parts.uri.path()) {
        Ok(room) => room,
        Err(problem) => return gate.refuse(&parts, problem),
    };
    if handshake::is_upgrade(&parts.headers) {
        let admitted = session(&gate, web_socket(&gate, &parts, room)).await;
        return answer(Applicant { gate, request: parts, protocol: plain::NAME, began }, admitted);
    }
    match parts.method {
        Method::GET | Method::HEAD => {
            let admitted = session(&gate, events(&gate, &parts, vec![room])).await;
            answer(Applicant { gate, request: parts, protocol: event_stream_protocol::NAME, began }, admitted)
        }
        Method::POST => match publish::publish(&gate, &parts, body, room).await {
            Ok(response) => gate.expose(&parts, response),
            Err(problem) => gate.refuse(&parts, problem),
        },
        Method::OPTIONS => cors::options(&gate.settings(), &parts, ONE_ROOM_METHODS),
        _ => gate.refuse(&parts, wrong_method(&parts, ONE_ROOM_METHODS)),
    }
}

/// Handles `/rooms`.
pub async fn several_rooms(State(gate): State<Arc<Gate>>, request: Request) -> Response<Body> {
    let began = Instant::now();
    let (parts, _) = request.into_parts();
    match parts.method {
        Method::GET | Method::HEAD => {
            let admission = async {
                let rooms = rooms_of_query(&gate, Query::new(parts.uri.query()))?;
                events(&gate, &parts, rooms).await
            };
            let admitted = session(&gate, admission).await;
            answer(Applicant { gate, request: parts, protocol: event_stream_protocol::NAME, began }, admitted)
        }
        Method::OPTIONS => cors::options(&gate.settings(), &parts, SEVERAL_ROOMS_METHODS),
        _ => gate.refuse(&parts, wrong_method(&parts, SEVERAL_ROOMS_METHODS)),
    }
}

/// The answer that a route has decided on.
pub(super) fn answer(applicant: Applicant, admitted: Result<Response<Body>, Problem>) -> Response<Body> {
    match admitted {
        Ok(response) => {
            let mut response = applicant.gate.expose(&applicant.request, response);
            if response.extensions().get::<Admission>().is_some() {
                response.extensions_mut().insert(Arc::new(applicant));
            }
            response
        }
        Err(problem) => applicant.refuse(problem),
    }
}

/// Admits a session, if the node takes any.
pub(super) async fn session(
    gate: &Gate,
    admission: impl Future<Output = Result<Response<Body>, Problem>>,
) -> Result<Response<Body>, Problem> {
    gate.check_capacity()?;
    admission.await
}

async fn web_socket(gate: &Gate, parts: &Parts, room: RoomName) -> Result<Response<Body>, Problem> {
    let handshake = upgrade::accept(parts, credential::PLAIN_SUBPROTOCOL)?;
    let query = Query::new(parts.uri.query());
    let echo = query.choice("echo", ["true", "false"])? == "true";
    let close_on_gap = query.choice("gap", ["ignore", "close"])? == "close";
    gate.check_origin(parts)?;
    let identity = gate.authenticate(parts).await?;
    let rooms = Arc::from([room]);
    gate.check_grant(&identity, Operation::Subscribe, &rooms)?;

    let (mut response, deflate) = upgrade::response(gate, handshake);
    response.extensions_mut().insert(Admission {
        identity: Some(identity),
        rooms,
        door: Door::Plain { echo, close_on_gap },
        deflate,
    });
    Ok(response)
}

async fn events(gate: &Gate, parts: &Parts, rooms: Vec<RoomName>) -> Result<Response<Body>, Problem> {
    if !event_stream::is_accepted(&parts.headers) {
        let detail = "expected a WebSocket handshake, or `Accept: text/event-stream`";
        return Err(Problem::new(Refusal::NotAcceptable, detail));
    }
    gate.check_origin(parts)?;
    let identity = gate.authenticate(parts).await?;
    gate.check_grant(&identity, Operation::Subscribe, &rooms)?;

    // Of no known length: an answer to HEAD would tell it, and there is none.
    let mut response =
        event_stream::response(Body::from_stream(stream::empty::<Result<Bytes, Infallible>>()));
    if parts.method == Method::GET {
        let door = Door::EventStream { retry_millis: gate.settings().retry_millis };
        response.extensions_mut().insert(Admission {
            identity: Some(identity),
            rooms: rooms.into(),
            door,
            deflate: None,
        });
    }
    Ok(response)
}

/// The room of `/rooms/{room}`, percent-decoded (RFC 3986 §2.1).
fn room_of_path(path: &str) -> Result<RoomName, Problem> {
    let encoded = path.strip_prefix("/rooms/").unwrap_or_default();
    let mut rest = encoded.split('%');
    rest.next();
    if rest.any(|escape| !escape.as_bytes().get(..2).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit)))
    {
        let detail = format!("expected two hexadecimal digits after each % in {encoded:?}");
        return Err(Problem::new(Refusal::RoomName, detail));
    }
    let decoded: Vec<u8> = percent_decode_str(encoded).collect();
    RoomName::try_from(decoded.as_slice()).map_err(|error| Problem::new(Refusal::RoomName, error.to_string()))
}

/// The rooms of `/rooms?room=…`, without duplicates.
fn rooms_of_query(gate: &Gate, query: Query<'_>) -> Result<Vec<RoomName>, Problem> {
    let mut rooms = Vec::new();
    let most = gate.settings().limits.rooms_per_session;
    for name in query.all("room") {
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

fn wrong_method(parts: &Parts, methods: HeaderValue) -> Problem {
    let detail = format!(
        "{} is not served here, expected one of {}",
        parts.method,
        methods.to_str().unwrap_or_default()
    );
    let headers = HeaderMap::from_iter([(header::ALLOW, methods)]);
    Problem::new(Refusal::Method, detail).with_status(StatusCode::METHOD_NOT_ALLOWED).with_headers(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooms_in_paths() {
        let room =
            |path| room_of_path(path).map(|room| room.to_string()).map_err(|problem| problem.refusal());
        assert_eq!(room("/rooms/lobby"), Ok("lobby".into()));
        assert_eq!(room("/rooms/chat:%C3%A9t%c3%a9"), Ok("chat:été".into()));
        assert_eq!(room("/rooms/a%2Fb+c"), Ok("a/b+c".into()));
        for path in
            ["/rooms/", "/rooms/a%", "/rooms/a%2", "/rooms/a%zz", "/rooms/%ff", "/rooms/a%20b", "/rooms/%7Ba"]
        {
            assert_eq!(room(path), Err(Refusal::RoomName), "{path}");
        }
    }
}

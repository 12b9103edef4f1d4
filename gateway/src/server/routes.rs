//! The public routes, built from the table of protocols: which protocol serves a request, and the checks
//! before that.
//!
//! Several protocols may share a path. A WebSocket handshake goes to the one whose subprotocol it offers, a
//! `GET` to the one whose media type it prefers, and any other request to the one that serves its method.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Instant};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    routing::any,
};
use broker_bridge::{Affinity, RoomName};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header, request::Parts};
use percent_encoding::percent_decode_str;

use super::upgrade::{self, Accepted};
use crate::{
    auth::Operation,
    driver::Admission,
    framing::{Framing, Transport},
    history::Beginning,
    protocol::{
        Ask, Call, Endpoint, On, TABLE,
        endpoint::{Answer, Open},
    },
    request::{Applicant, Gate, Problem, accept, cors},
    vocabulary::{ProtocolName, Refusal},
    websocket::{Deflate, handshake},
};

/// The routes of one path.
#[derive(Default)]
struct Path {
    /// Protocols, with their subprotocols.
    web_sockets: Vec<(ProtocolName, &'static str, Open)>,
    streams: Vec<Stream>,
    requests: Vec<(Method, Answer)>,
    /// The methods of the path, as listed in `Allow`.
    methods: String,
    has_room: bool,
}

/// A media type, and how to open a session for a request that prefers it.
#[derive(Clone, Copy)]
struct Stream {
    protocol: ProtocolName,
    media_type: &'static str,
    head: fn(&mut HeaderMap),
    open: Open,
}

/// A route for each path of the table. What they publish has this affinity.
pub fn routes(affinity: Affinity) -> Router<Arc<Gate>> {
    let mut router = Router::new();
    for (name, path) in paths(&TABLE) {
        let path = Arc::new(path);
        let handler = move |State(gate): State<Arc<Gate>>, request: Request| {
            let path = Arc::clone(&path);
            async move { serve(gate, affinity, &path, request).await }
        };
        router = router.route(name, any(handler));
    }
    router
}

fn paths(table: &[&'static Endpoint]) -> BTreeMap<&'static str, Path> {
    let mut paths = BTreeMap::<_, Path>::new();
    for endpoint in table {
        for route in endpoint.routes {
            let path = paths.entry(route.path).or_default();
            path.has_room = route.path.contains("{room}");
            match &route.on {
                On::WebSocket { subprotocol, open } => {
                    path.web_sockets.push((endpoint.name, *subprotocol, *open));
                }
                On::Stream { media_type, head, open } => {
                    let (media_type, head, open) = (*media_type, *head, *open);
                    path.streams.push(Stream { protocol: endpoint.name, media_type, head, open });
                }
                On::Request { method, answer } => path.requests.push((method.clone(), *answer)),
            }
        }
    }
    for path in paths.values_mut() {
        let gets = if path.streams.is_empty() { &[] as &[&str] } else { &["GET", "HEAD"] };
        let others = path.requests.iter().map(|(method, _)| method.as_str());
        path.methods = gets.iter().copied().chain(others).chain(["OPTIONS"]).collect::<Vec<_>>().join(", ");
    }
    paths
}

async fn serve(gate: Arc<Gate>, affinity: Affinity, path: &Path, request: Request) -> Response<Body> {
    let began = Instant::now();
    let (request, body) = request.into_parts();
    let room = match path.has_room.then(|| room_of_path(request.uri.path())).transpose() {
        Ok(room) => room,
        Err(problem) => return gate.refuse(&request, problem),
    };
    let only_web_sockets = path.streams.is_empty() && path.requests.is_empty();
    if !path.web_sockets.is_empty() && (only_web_sockets || handshake::is_upgrade(&request.headers)) {
        let (protocol, admitted) = web_socket(&gate, path, &request, room).await;
        return answer(Applicant { gate, request, protocol, began }, admitted);
    }
    if let Some((_, answer)) = path.requests.iter().find(|(method, _)| *method == request.method) {
        let request = Arc::new(request);
        let call = Call { gate: Arc::clone(&gate), affinity, request: Arc::clone(&request), body, room };
        return match answer(call).await {
            Ok(response) => gate.expose(&request, response),
            Err(problem) => gate.refuse(&request, problem),
        };
    }
    match request.method {
        Method::GET | Method::HEAD if !path.streams.is_empty() => {
            let (protocol, admitted) = body_stream(&gate, path, &request, room).await;
            let mut response = answer(Applicant { gate, request, protocol, began }, admitted);
            // Replaces the `Origin` that every response lists.
            response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept, Origin"));
            response
        }
        Method::OPTIONS => cors::options(&gate.settings(), &request, path.allow()),
        _ => gate.refuse(&request, path.wrong_method(&request.method)),
    }
}

/// Opens a session on a WebSocket. Also returns the protocol if it is refused, for the metrics.
async fn web_socket(
    gate: &Gate,
    path: &Path,
    request: &Parts,
    room: Option<RoomName>,
) -> (ProtocolName, Result<Response<Body>, Problem>) {
    let subprotocols: Vec<_> = path.web_sockets.iter().map(|(_, subprotocol, _)| *subprotocol).collect();
    let offered = upgrade::offered(request, &subprotocols).unwrap_or_default();
    let Some((protocol, _, open)) = path.web_sockets.get(offered) else {
        return (ProtocolName::new("none"), Err(Refusal::Handshake.into()));
    };
    let accepted = gate.check_capacity().and_then(|()| upgrade::accept(request, &subprotocols));
    let opened = match accepted {
        Ok(handshake) => open_web_socket(gate, *protocol, *open, request, room, handshake).await,
        Err(problem) => Err(problem),
    };
    (*protocol, opened)
}

async fn open_web_socket(
    gate: &Gate,
    protocol: ProtocolName,
    open: Open,
    request: &Parts,
    room: Option<RoomName>,
    handshake: Accepted<'_>,
) -> Result<Response<Body>, Problem> {
    let mut admission = admit(gate, protocol, open, request, room, Transport::WebSocket).await?;
    let (mut response, deflate) = upgrade::response(gate, handshake);
    admission.deflate = deflate;
    response.extensions_mut().insert(admission);
    Ok(response)
}

/// Opens a session in the response body.
async fn body_stream(
    gate: &Gate,
    path: &Path,
    request: &Parts,
    room: Option<RoomName>,
) -> (ProtocolName, Result<Response<Body>, Problem>) {
    let media_types = path.streams.iter().map(|stream| stream.media_type);
    let preferred = accept::preferred(&request.headers, media_types);
    let stream = path.streams.iter().find(|stream| Some(stream.media_type) == preferred);
    let name = stream.or(path.streams.first()).map_or(ProtocolName::new("none"), |stream| stream.protocol);
    let opened = match (gate.check_capacity(), stream) {
        (Err(problem), _) => Err(problem),
        (Ok(()), None) => Err(path.not_acceptable()),
        (Ok(()), Some(stream)) => open_stream(gate, *stream, request, room).await,
    };
    (name, opened)
}

async fn open_stream(
    gate: &Gate,
    stream: Stream,
    request: &Parts,
    room: Option<RoomName>,
) -> Result<Response<Body>, Problem> {
    let admission = admit(gate, stream.protocol, stream.open, request, room, Transport::Body).await?;
    // The body has no known length; otherwise the response to HEAD would state one, although the stream has
    // none.
    let mut response = Response::new(Body::from_stream(stream::empty::<Result<Bytes, Infallible>>()));
    (stream.head)(response.headers_mut());
    if request.method == Method::GET {
        response.extensions_mut().insert(admission);
    }
    Ok(response)
}

/// The checks that are the same for all protocols, in an order that reveals nothing to clients without
/// access.
async fn admit(
    gate: &Gate,
    protocol: ProtocolName,
    open: Open,
    request: &Parts,
    room: Option<RoomName>,
    transport: Transport,
) -> Result<Admission, Problem> {
    let settings = gate.settings();
    let opening = open(&Ask { request, settings: &settings, room })?;
    gate.check_origin(request)?;
    let identity = if opening.signs_in_later {
        gate.authenticate_early(request).await?
    } else {
        Some(gate.authenticate(request).await?)
    };
    if let Some(identity) = &identity {
        gate.check_grant(identity, Operation::Subscribe, &opening.rooms)?;
        if opening.begin.iter().any(|begin| matches!(begin, Beginning::Last(_))) {
            gate.check_grant(identity, Operation::History, &opening.rooms)?;
        }
        opening.check_policies(&settings)?;
        if opening.is_answer && request.method == Method::GET {
            gate.check_user(identity, None)?;
        }
    }
    Ok(Admission { identity, opening, protocol, framing: Framing::on(transport), deflate: None::<Deflate> })
}

/// The response that a route has decided on.
fn answer(applicant: Applicant, admitted: Result<Response<Body>, Problem>) -> Response<Body> {
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

impl Path {
    fn allow(&self) -> HeaderValue {
        HeaderValue::from_str(&self.methods).expect("methods are ASCII")
    }

    fn wrong_method(&self, method: &Method) -> Problem {
        let detail = format!("{method} is not served here, expected one of {}", self.methods);
        let headers = HeaderMap::from_iter([(header::ALLOW, self.allow())]);
        Problem::new(Refusal::Method, detail)
            .with_status(StatusCode::METHOD_NOT_ALLOWED)
            .with_headers(headers)
    }

    fn not_acceptable(&self) -> Problem {
        let upgrade = if self.web_sockets.is_empty() { "" } else { "a WebSocket handshake, or " };
        let types: Vec<_> = self.streams.iter().map(|stream| stream.media_type).collect();
        let detail = format!("expected {upgrade}`Accept: {}`", types.join("` or `Accept: "));
        Problem::new(Refusal::NotAcceptable, detail)
    }
}

/// The room in `/rooms/{room}`, percent-decoded (RFC 3986 §2.1).
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

//! A route's view of a WebSocket handshake: a problem, or the response that completes it.

use axum::body::Body;
use http::{HeaderValue, Response, header, request::Parts};

use crate::{
    auth::credential,
    request::{Gate, Problem},
    vocabulary::Refusal,
    websocket::{
        Deflate,
        handshake::{self, Handshake},
    },
};

/// A valid handshake, and the selected subprotocol.
pub struct Accepted<'a> {
    handshake: Handshake<'a>,
    subprotocol: Option<HeaderValue>,
}

/// The index of the first of the client's offers that is among `subprotocols`, if any.
pub fn offered(request: &Parts, subprotocols: &[&'static str]) -> Option<usize> {
    let mut offered = credential::offered_subprotocols(&request.headers);
    offered.find_map(|name| subprotocols.iter().position(|spoken| *spoken == name))
}

/// Checks a client's handshake for a path whose endpoints speak `subprotocols`. The response selects the
/// [`offered`] one, or the first of all if the client offers none.
///
/// A client that offers subprotocols expects one of them in the response, and never its token. If the 101
/// response selects none, a browser drops the connection (WHATWG standard) and its page learns no reason. So
/// an offer without a known subprotocol is refused before the upgrade.
pub fn accept<'a>(request: &'a Parts, subprotocols: &[&'static str]) -> Result<Accepted<'a>, Problem> {
    let handshake =
        handshake::accept(&request.method, request.version, &request.headers).map_err(|error| {
            Problem::new(Refusal::Handshake, error.to_string())
                .with_status(error.status())
                .with_headers(error.headers())
        })?;
    let selected = offered(request, subprotocols).and_then(|index| subprotocols.get(index));
    if selected.is_none() && handshake.protocols().next().is_some() {
        let offered = credential::offered_subprotocols(&request.headers);
        return Err(Problem::new(Refusal::Handshake, not_spoken(offered, subprotocols)));
    }
    Ok(Accepted { handshake, subprotocol: selected.map(|name| HeaderValue::from_static(name)) })
}

/// Does not repeat the offer: with a mistyped prefix it would contain a token.
fn not_spoken<'a>(mut offered: impl Iterator<Item = &'a str>, subprotocols: &[&str]) -> String {
    let offer = format!("expected `{}` in Sec-WebSocket-Protocol", subprotocols.join("` or `"));
    match offered.next() {
        None => format!("{offer}, beside the token"),
        Some("centrifuge-protobuf") => {
            format!("{offer}, or none: the Centrifuge protocol is spoken in JSON, not in Protobuf")
        }
        Some(_) => format!("{offer}, or none: no subprotocol that was offered is spoken here"),
    }
}

/// The response, and the negotiated compression.
pub fn response(gate: &Gate, accepted: Accepted<'_>) -> (Response<Body>, Option<Deflate>) {
    let Accepted { handshake, subprotocol } = accepted;
    let mut response = handshake.response(subprotocol).map(|()| Body::empty());
    let agreed = if gate.settings().compression.enabled { handshake.deflate() } else { None };
    let deflate = agreed.map(|(deflate, confirmation)| {
        response.headers_mut().insert(header::SEC_WEBSOCKET_EXTENSIONS, confirmation);
        deflate
    });
    (response, deflate)
}

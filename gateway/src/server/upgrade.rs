//! A WebSocket handshake as a route sees it: a problem, or the answer that makes it one.

use axum::body::Body;
use http::{HeaderValue, Response, header, request::Parts};

use super::{Gate, Problem, Refusal};
use crate::{
    auth::credential,
    websocket::{
        Deflate,
        handshake::{self, Handshake},
    },
};

/// Checks a client's handshake.
pub fn accept(request: &Parts) -> Result<Handshake<'_>, Problem> {
    handshake::accept(&request.method, request.version, &request.headers).map_err(|error| {
        Problem::new(Refusal::Handshake, error.to_string())
            .with_status(error.status())
            .with_headers(error.headers())
    })
}

/// The answer, which picks `subprotocol` if the client offers it: a client that offers subprotocols expects
/// one of them back, and never its token. With it, what is agreed on about compression.
pub fn response(
    gate: &Gate,
    handshake: &Handshake<'_>,
    request: &Parts,
    subprotocol: &'static str,
) -> (Response<Body>, Option<Deflate>) {
    let offered = credential::offered_subprotocols(&request.headers).any(|name| name == subprotocol);
    let picked = offered.then(|| HeaderValue::from_static(subprotocol));
    let mut response = handshake.response(picked).map(|()| Body::empty());
    let agreed = if gate.settings().compression.enabled { handshake.deflate() } else { None };
    let deflate = agreed.map(|(deflate, confirmation)| {
        response.headers_mut().insert(header::SEC_WEBSOCKET_EXTENSIONS, confirmation);
        deflate
    });
    (response, deflate)
}

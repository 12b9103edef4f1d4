//! `/connection/websocket`: the Centrifuge protocol, where its SDKs look for it.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::{Request, State},
};
use http::{HeaderValue, Response, request::Parts};

use super::{Gate, Problem, Refusal, rooms};
use crate::{
    auth::{AuthFailure, credential},
    protocol::ProtocolName,
    shard::{Admission, admission::Door},
    websocket::handshake,
};

/// The subprotocol that a client may offer; the SDKs offer none for JSON.
const SUBPROTOCOL: &str = "centrifuge-json";

/// Handles `/connection/websocket`.
pub async fn connection(State(gate): State<Arc<Gate>>, request: Request) -> Response<Body> {
    let began = Instant::now();
    let (parts, _) = request.into_parts();
    rooms::session(&gate, &parts, ProtocolName::Centrifuge, began, || web_socket(&gate, &parts))
}

fn web_socket(gate: &Gate, parts: &Parts) -> Result<Response<Body>, Problem> {
    let handshake = handshake::accept(&parts.method, parts.version, &parts.headers).map_err(|error| {
        Problem::new(Refusal::Handshake, error.to_string())
            .with_status(error.status())
            .with_headers(error.headers())
    })?;
    gate.check_origin(parts)?;
    // The token usually comes in the connect command. One that comes with the request must be valid.
    let carries_none = credential::find(&parts.headers, parts.uri.query())
        .is_err_and(|failure| failure == AuthFailure::Missing);
    let identity = if carries_none { None } else { Some(gate.authenticate(parts)?) };
    let protocol = credential::offered_subprotocols(&parts.headers).any(|name| name == SUBPROTOCOL);
    let protocol = protocol.then(|| HeaderValue::from_static(SUBPROTOCOL));
    let mut response = handshake.response(protocol).map(|()| Body::empty());
    response.extensions_mut().insert(Admission { identity, rooms: Arc::from([]), door: Door::Centrifuge });
    Ok(response)
}

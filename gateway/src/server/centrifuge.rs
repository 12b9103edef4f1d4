//! `/connection/websocket`: the Centrifuge protocol, where its SDKs look for it.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::{Request, State},
};
use http::{Response, request::Parts};

use super::{rooms, upgrade};
use crate::{
    protocol::centrifuge,
    request::{Applicant, Gate, Problem},
    shard::{Admission, admission::Door},
};

/// The subprotocol that a client may offer; the SDKs offer none for JSON.
const SUBPROTOCOL: &str = "centrifuge-json";

/// Handles `/connection/websocket`.
pub async fn connection(State(gate): State<Arc<Gate>>, request: Request) -> Response<Body> {
    let began = Instant::now();
    let (parts, _) = request.into_parts();
    let admitted = rooms::session(&gate, web_socket(&gate, &parts)).await;
    rooms::answer(Applicant { gate, request: parts, protocol: centrifuge::NAME, began }, admitted)
}

async fn web_socket(gate: &Gate, parts: &Parts) -> Result<Response<Body>, Problem> {
    let handshake = upgrade::accept(parts, SUBPROTOCOL)?;
    gate.check_origin(parts)?;
    // The token usually comes in the connect command.
    let identity = gate.authenticate_early(parts).await?;
    let (mut response, deflate) = upgrade::response(gate, handshake);
    let admission = Admission { identity, rooms: Arc::from([]), door: Door::Centrifuge, deflate };
    response.extensions_mut().insert(admission);
    Ok(response)
}

//! Listeners and routes: what a request may become, and how it is refused.
//!
//! | module | what it holds |
//! |---|---|
//! | [`head`] | rules for the head of every request |
//! | [`peer`] | the client's address, and the limits of that address |
//! | `routes` | the public routes, built from the table of protocols |
//! | [`demo`] | the demo page |
//! | [`ops`] | the second listener: metrics and probes |
//! | [`ops_listener`] | the second listener's sockets |
//! | [`acceptor`] | accepts sockets and hands them to the emptiest shard |
//!
//! Routes are ordinary axum handlers. The shard takes over an admitted request ([`crate::driver::admission`]).

use std::sync::Arc;

use axum::{Router, extract::Request, middleware::from_fn_with_state};
use broker_bridge::Affinity;

use crate::{
    request::{Gate, Problem},
    vocabulary::Refusal,
};

pub mod acceptor;
pub mod demo;
pub mod head;
pub mod ops;
pub mod ops_listener;
pub mod peer;
mod routes;
mod upgrade;

/// All routes of the public listener. What they publish has this affinity.
pub fn public_routes(gate: Arc<Gate>, affinity: Affinity) -> Router {
    let mut routes = routes::routes(affinity);
    if gate.demo {
        routes = routes.merge(demo::routes());
    }
    let head = from_fn_with_state(Arc::clone(&gate), head::check_public);
    let peer = from_fn_with_state(Arc::clone(&gate), peer::check);
    // The last layer runs first.
    routes.fallback(not_found).layer(head).layer(peer).with_state(gate)
}

async fn not_found(
    gate: axum::extract::State<Arc<Gate>>,
    request: Request,
) -> http::Response<axum::body::Body> {
    let detail = format!("nothing is at {}; a room is at /rooms/{{room}}", request.uri().path());
    gate.refuse(&request.into_parts().0, Problem::new(Refusal::NotFound, detail))
}

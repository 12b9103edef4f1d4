//! Listeners and routes: what a request may become, and how it is refused.
//!
//! | module | what it holds |
//! |---|---|
//! | [`connection`] | one HTTP connection: its time-outs, and an end that destroys no answer |
//! | [`head`] | what the head of every request must keep to |
//! | [`gate`] | [`Gate`]: what every public route asks: may this request come in? |
//! | [`peer`] | whom a request comes from, and whether they may knock |
//! | [`centrifuge`] | `/connection/websocket`: the Centrifuge protocol |
//! | [`rooms`] | `/rooms/{room}` and `/rooms`: a room is a URL |
//! | [`event_stream`] | the heads of event streams, and their temporary refusals |
//! | [`demo`] | the demo page |
//! | [`ops`] | the second listener: metrics and probes |
//! | [`ops_listener`] | the second listener's sockets |
//! | [`acceptor`] | sockets, handed to the emptiest shard |
//! | [`problem`] | [`Problem`] and [`Refusal`]: answers that say no (RFC 9457) |
//! | `refusals` | refused tokens, origins and grants, in the log |
//!
//! Routes are ordinary axum handlers; what becomes of an admitted request is the shard's
//! ([`crate::shard::admission`]).

use std::sync::Arc;

use axum::{Router, extract::Request, middleware::from_fn_with_state, routing::any};

pub mod acceptor;
pub mod centrifuge;
pub mod connection;
mod cors;
pub mod demo;
pub mod event_stream;
mod forwarded;
pub mod gate;
pub mod head;
pub mod ops;
pub mod ops_listener;
pub mod peer;
pub mod problem;
mod publish;
mod query;
pub(crate) mod refusals;
pub mod rooms;
mod upgrade;

pub use gate::Gate;
pub use problem::{HandshakeResult, Problem, Refusal, Unanswered};

/// All routes of the public listener.
pub fn public_routes(gate: Arc<Gate>) -> Router {
    let mut routes = Router::new()
        .route("/rooms/{room}", any(rooms::one_room))
        .route("/rooms", any(rooms::several_rooms))
        .route("/connection/websocket", any(centrifuge::connection));
    if gate.demo {
        routes = routes.merge(demo::routes());
    }
    let head = from_fn_with_state(Arc::clone(&gate), head::check_public);
    let peer = from_fn_with_state(Arc::clone(&gate), peer::check);
    // The last layer is the first to be asked.
    routes.fallback(not_found).layer(head).layer(peer).with_state(gate)
}

async fn not_found(
    gate: axum::extract::State<Arc<Gate>>,
    request: Request,
) -> http::Response<axum::body::Body> {
    let detail = format!("nothing is at {}; a room is at /rooms/{{room}}", request.uri().path());
    gate.refuse(&request.into_parts().0, Problem::new(Refusal::NotFound, detail))
}

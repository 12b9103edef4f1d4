//! The client's address of a request, and the limits of that address.
//!
//! The shard knows the address from the socket or a PROXY protocol header. A proxy that reports it in an HTTP
//! header is handled here: only now is the client known, and only now can the limits of its address apply.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
};
use http::{HeaderValue, Response, header};

use crate::{
    limits::Decision,
    request::{Gate, Problem, forwarded},
    vocabulary::{AddressLimit, Peer, PeerStatus, Refusal},
};

/// A layer around all public routes.
pub async fn check(State(gate): State<Arc<Gate>>, mut request: Request, next: Next) -> Response<Body> {
    match request.extensions().get::<PeerStatus>().copied().unwrap_or(PeerStatus::Known) {
        PeerStatus::Known => next.run(request).await,
        PeerStatus::Refused(limit) => refuse(&gate, request, limit),
        PeerStatus::Proxy => {
            let settings = gate.settings();
            let reported =
                forwarded::client(request.headers(), settings.forwarded_header, &settings.trusted_proxies);
            if let Some((address, port)) = reported {
                request.extensions_mut().insert(Peer { address, port });
            }
            let Some(peer) = request.extensions().get::<Peer>() else { return next.run(request).await };
            match gate.settings.limiters().admit(peer.address, settings.limits.connections_per_address) {
                Decision::Accept(permit) => {
                    let mut response = next.run(request).await;
                    if let Some(permit) = permit {
                        response.extensions_mut().insert(Arc::new(permit));
                    }
                    response
                }
                // The connection belongs to the proxy and is shared, so even these get an answer.
                Decision::Refuse(limit, _) | Decision::Drop(limit) => refuse(&gate, request, limit),
            }
        }
    }
}

fn refuse(gate: &Gate, request: Request, limit: AddressLimit) -> Response<Body> {
    let problem = match limit {
        AddressLimit::Attempts(wait) => Problem::from(Refusal::Attempts).after(wait),
        AddressLimit::Connections => Problem::from(Refusal::AddressConnections),
    };
    let proxied = matches!(request.extensions().get(), Some(PeerStatus::Proxy));
    let mut response = gate.refuse(&request.into_parts().0, problem);
    if !proxied {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

//! Whom a request comes from, and whether they may knock.
//!
//! A shard knows what the socket and a PROXY protocol header say. What is left is the proxy that speaks by
//! a header of HTTP: only here is it known for whom, so only here can the client be held to what an
//! address may do.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    middleware::Next,
};
use http::{HeaderValue, Response, header};

use crate::{
    limits::Verdict,
    request::{Gate, Problem, forwarded},
    vocabulary::{AddressLimit, Peer, PeerStatus, Refusal},
};

/// Stands before all public routes.
pub async fn check(State(gate): State<Arc<Gate>>, mut request: Request, next: Next) -> Response<Body> {
    match request.extensions().get::<PeerStatus>().copied().unwrap_or(PeerStatus::Known) {
        PeerStatus::Known => next.run(request).await,
        PeerStatus::Refused(limit) => refuse(&gate, request, limit),
        PeerStatus::Proxy => {
            let settings = gate.settings();
            let said =
                forwarded::client(request.headers(), settings.forwarded_header, &settings.trusted_proxies);
            if let Some((address, port)) = said {
                request.extensions_mut().insert(Peer { address, port });
            }
            let Some(peer) = request.extensions().get::<Peer>() else { return next.run(request).await };
            match gate.settings.limiters().knock(peer.address, settings.limits.connections_per_address) {
                Verdict::Welcome(seat) => {
                    let mut response = next.run(request).await;
                    if let Some(seat) = seat {
                        response.extensions_mut().insert(Arc::new(seat));
                    }
                    response
                }
                // The connection is the proxy's, and others use it: everybody is answered.
                Verdict::Refused(limit, _) | Verdict::Dropped(limit) => refuse(&gate, request, limit),
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

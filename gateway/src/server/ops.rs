//! The second listener: metrics and probes. Clients must not be able to reach it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use axum::{Router, body::Body, extract::State, middleware::from_fn, routing::get};
use broker_bridge::BrokerStatus;
use http::{HeaderValue, Response, StatusCode, header};
use parking_lot::Mutex;
use prometheus::{IntGauge, Registry, TextEncoder};
use tokio::sync::watch;

use super::head;

use crate::{
    request::{Gate, Problem},
    vocabulary::{Refusal, metrics::gauge},
};

/// A shard that has not ticked for this long counts as stuck.
const STUCK: Duration = Duration::from_secs(10);

/// The state behind the probes.
pub struct Ops {
    gate: Arc<Gate>,
    broker: watch::Receiver<BrokerStatus>,
    beats: Mutex<Vec<Beat>>,
    registry: Registry,
    // Set on each scrape.
    sockets: IntGauge,
    sockets_limit: IntGauge,
    limit_accounts: IntGauge,
}

/// The last observed progress of a shard.
struct Beat {
    count: u64,
    seen: Instant,
}

/// All routes of the ops listener. `registry` is what `/metrics` shows.
pub fn routes(gate: Arc<Gate>, registry: Registry) -> Result<Router, prometheus::Error> {
    let now = Instant::now();
    let beats = gate.shards.iter().map(|_| Beat { count: 0, seen: now }).collect();
    let ops = Ops {
        broker: gate.broker.status(),
        beats: Mutex::new(beats),
        gate,
        sockets: gauge(&registry, "tidegate_sockets", "Open sockets of the public listener.")?,
        sockets_limit: gauge(
            &registry,
            "tidegate_sockets_limit",
            "Sockets that the public listener may hold: limits.connections, or fewer where the limit of open files is too low.",
        )?,
        limit_accounts: gauge(
            &registry,
            "tidegate_limit_accounts",
            "Accounts kept of what addresses and users have used of their limits; gone when nothing is used.",
        )?,
        registry,
    };
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .fallback(|| async {
            Problem::new(Refusal::NotFound, "expected /metrics, /livez or /readyz").into_response()
        })
        .layer(from_fn(head::check_ops))
        .with_state(Arc::new(ops));
    Ok(routes)
}

async fn metrics(State(ops): State<Arc<Ops>>) -> Response<Body> {
    let level = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    ops.sockets.set(level(ops.gate.connections()));
    ops.sockets_limit.set(level(ops.gate.settings().sockets.connections));
    ops.limit_accounts.set(level(ops.gate.settings.limiters().accounts()));
    match TextEncoder::new().encode_to_string(&ops.registry.gather()) {
        Ok(text) => {
            let mut response = Response::new(Body::from(text));
            let value = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, value);
            response
        }
        Err(error) => {
            tracing::error!(%error, "cannot render the metrics");
            plain(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be rendered\n")
        }
    }
}

/// Alive as long as every shard's loop runs. Never asks the broker: an outage there must not make an
/// orchestrator kill every node.
async fn livez(State(ops): State<Arc<Ops>>) -> Response<Body> {
    let now = Instant::now();
    let mut beats = ops.beats.lock();
    let mut stuck = Vec::new();
    for (shard, (health, beat)) in ops.gate.shards.iter().zip(beats.iter_mut()).enumerate() {
        let count = health.beats.load(Ordering::Relaxed);
        let ended = health.ended.load(Ordering::Acquire);
        if count != beat.count && !ended {
            *beat = Beat { count, seen: now };
        } else if (ended || now.duration_since(beat.seen) > STUCK) && !ops.gate.is_draining() {
            stuck.push(shard);
        }
    }
    if stuck.is_empty() {
        plain(StatusCode::OK, "alive\n")
    } else {
        plain(StatusCode::SERVICE_UNAVAILABLE, format!("shards that make no progress: {stuck:?}\n"))
    }
}

/// Ready to accept new sessions. Losing the broker after the first connection does not make the node unready:
/// all other nodes would become unready with it.
async fn readyz(State(ops): State<Arc<Ops>>) -> Response<Body> {
    let gate = &ops.gate;
    if gate.is_draining() {
        return plain(StatusCode::SERVICE_UNAVAILABLE, "draining\n");
    }
    if gate.connections() >= gate.settings().sockets.connections {
        return plain(StatusCode::SERVICE_UNAVAILABLE, "full: limits.connections is reached\n");
    }
    if !gate.settings().authenticator.keys().is_complete() {
        return plain(StatusCode::SERVICE_UNAVAILABLE, "waiting for the keys of auth.jwks_url\n");
    }
    match &*ops.broker.borrow() {
        BrokerStatus::Up => plain(StatusCode::OK, "ready\n"),
        BrokerStatus::Interrupted(why) => plain(StatusCode::OK, format!("degraded: {why}\n")),
        BrokerStatus::Connecting(why) => {
            plain(StatusCode::SERVICE_UNAVAILABLE, format!("waiting for the broker: {why}\n"))
        }
        BrokerStatus::Closed => plain(StatusCode::SERVICE_UNAVAILABLE, "the broker is closed\n"),
    }
}

fn plain(status: StatusCode, text: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(text.into());
    *response.status_mut() = status;
    let value = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}

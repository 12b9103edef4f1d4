//! Metrics of requests, until they become sessions.

use prometheus::{HistogramVec, IntCounter, IntCounterVec, IntGauge, Registry};

use crate::{
    auth::AuthFailure,
    vocabulary::{
        HandshakeResult, ProtocolName, Refusal, Unanswered,
        metrics::{Counters, Label, counter, counter_family, gauge, histogram_family},
    },
};

/// The limits for which a socket may be closed without an answer.
const DROPPED_FOR: [Refusal; 3] = [Refusal::Connections, Refusal::Attempts, Refusal::AddressConnections];

/// The metrics of requests.
#[derive(Debug)]
pub struct RequestMetrics {
    /// 1 while the node is draining.
    pub draining: IntGauge,
    /// How often the acceptor paused because `limits.accepts` was used up.
    pub accept_pauses: IntCounter,
    handshakes: IntCounterVec,
    handshake_seconds: HistogramVec,
    refusals: IntCounterVec,
    sockets_dropped: IntCounterVec,
    auth_failures: Counters<AuthFailure>,
}

impl RequestMetrics {
    /// Registers the metrics, for sessions of these protocols.
    pub fn register(registry: &Registry, protocols: &[ProtocolName]) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            draining: gauge(registry, "tidegate_draining", "1 while the node is leaving.")?,
            accept_pauses: counter(
                registry,
                "tidegate_accept_pauses_total",
                "How often new connections had to wait because limits.accepts was used up.",
            )?,
            handshakes: counter_family(
                registry,
                "tidegate_handshakes_total",
                "Requests for a session, by protocol and result.",
                &["protocol", "result"],
            )?,
            handshake_seconds: histogram_family(
                registry,
                "tidegate_handshake_seconds",
                "Time from a request's head to a session whose subscriptions stand.",
                &["protocol"],
                prometheus::exponential_buckets(0.000_25, 4.0, 9)?,
            )?,
            refusals: counter_family(
                registry,
                "tidegate_refusals_total",
                "Requests refused before a session existed, by reason.",
                &["reason"],
            )?,
            sockets_dropped: counter_family(
                registry,
                "tidegate_sockets_dropped_total",
                "New sockets closed without an answer, because too many were refused already, by reason.",
                &["reason"],
            )?,
            auth_failures: Counters::register(
                registry,
                "tidegate_auth_failures_total",
                "Tokens refused, by reason.",
                "reason",
            )?,
        };
        for protocol in protocols {
            for result in HandshakeResult::ALL {
                metrics.handshakes.with_label_values(&[protocol.as_str(), result.as_str()]);
            }
            metrics.handshake_seconds.with_label_values(&[protocol.as_str()]);
        }
        for refusal in Refusal::ALL {
            metrics.refusals.with_label_values(&[refusal.as_str()]);
        }
        for reason in Unanswered::ALL {
            metrics.refusals.with_label_values(&[reason.as_str()]);
        }
        for refusal in DROPPED_FOR {
            metrics.sockets_dropped.with_label_values(&[refusal.as_str()]);
        }
        Ok(metrics)
    }

    /// Counts a request for a session that has been answered.
    pub fn handshake(&self, protocol: ProtocolName, result: HandshakeResult, seconds: f64) {
        self.handshakes.with_label_values(&[protocol.as_str(), result.as_str()]).inc();
        self.handshake_seconds.with_label_values(&[protocol.as_str()]).observe(seconds);
    }

    /// Counts a refused request.
    pub fn refused(&self, refusal: Refusal) {
        self.refusals.with_label_values(&[refusal.as_str()]).inc();
    }

    /// Counts a connection that was closed before it sent a request.
    pub fn unanswered(&self, reason: Unanswered) {
        self.refusals.with_label_values(&[reason.as_str()]).inc();
    }

    /// Counts a socket that was closed without an answer because of a limit.
    pub fn dropped(&self, refusal: Refusal) {
        self.sockets_dropped.with_label_values(&[refusal.as_str()]).inc();
    }

    /// Counts a refused token.
    pub fn auth_failed(&self, failure: AuthFailure) {
        self.auth_failures.of(failure).inc();
    }
}

//! Everything a node measures, under one registry.
//!
//! Label values come from closed enums only: no user, room or address ever becomes a label. Hot paths
//! do not touch these handles: a shard counts in plain cells ([`crate::shard`]) and adds its tallies here
//! once per turn of its loop.

mod process;

use broker_bridge::GapCause;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use self::process::Process;
use crate::{
    auth::{AuthFailure, UnixSeconds},
    cli,
    limits::Limit,
    protocol::ProtocolName,
    server::{HandshakeResult, Refusal, Unanswered},
    session::CloseReason,
    telemetry,
};

/// For which limits a socket may be closed without an answer.
const DROPPED_FOR: [Refusal; 3] = [Refusal::Connections, Refusal::Attempts, Refusal::AddressConnections];
/// Which gaps a whole room is told of; [`GapCause::Dropped`] is told to one session.
const ROOM_GAPS: [GapCause; 3] = [GapCause::Interrupted, GapCause::Oversized, GapCause::Overflow];

/// The handles of all metrics of a node.
pub struct Metrics {
    registry: Registry,
    /// Sockets held on the public listener, whatever they carry.
    pub sockets: IntGauge,
    /// What `sockets` is held against: `limits.connections`, as far as the process may have them.
    pub sockets_limit: IntGauge,
    /// Sessions by protocol.
    connections: IntGaugeVec,
    connections_opened: IntCounterVec,
    connections_closed: IntCounterVec,
    handshakes: IntCounterVec,
    handshake_seconds: HistogramVec,
    /// Bytes read from sockets, as they are on the wire.
    pub network_bytes_in: IntCounter,
    /// Bytes written to sockets, as they are on the wire.
    pub network_bytes_out: IntCounter,
    /// Payload bytes that clients sent.
    pub payload_bytes_in: IntCounter,
    /// Payload bytes that were queued for clients.
    pub payload_bytes_out: IntCounter,
    /// Messages that clients sent.
    pub messages_in: IntCounter,
    /// Messages that were queued for clients.
    pub messages_out: IntCounter,
    /// Publications that arrived for rooms with a session on this node.
    pub publications: IntCounter,
    /// Publications times the sessions each was queued for.
    pub deliveries: IntCounter,
    /// From the broker's receipt of a publication to the last write of its fan-out.
    pub fanout_seconds: Histogram,
    /// Bytes waiting in the sessions' outbound queues.
    pub outbound_bytes: IntGauge,
    /// Sessions closed because their outbound queue was full.
    pub slow_consumers: IntCounter,
    /// Publications that made way for newer ones, `overflow = "drop_oldest"`.
    pub dropped_oldest: IntCounter,
    /// Publications that made way for newer ones, `overflow = "latest"`.
    pub dropped_for_latest: IntCounter,
    refusals: IntCounterVec,
    auth_failures: IntCounterVec,
    limited: IntCounterVec,
    gaps: IntCounterVec,
    /// Rooms that the hub knows.
    pub rooms: IntGauge,
    /// Sessions times the rooms each is in.
    pub subscriptions: IntGauge,
    /// How late a shard's regular tick came.
    pub shard_lag_seconds: Histogram,
    /// Publications that did not fit into a shard's inbox.
    pub inbox_overflows: IntCounter,
    /// Addresses and users that have used up some of a limit.
    pub limit_accounts: IntGauge,
    /// How often the acceptor waited because `limits.accepts` was used up.
    pub accept_pauses: IntCounter,
    sockets_dropped: IntCounterVec,
    /// 1 while the node is leaving.
    pub draining: IntGauge,
    config_reloads: IntCounterVec,
    config_reload_successful: IntGauge,
    config_reload_success_timestamp: IntGauge,
}

/// What became of an attempt to take a new configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadResult {
    /// Something counts that did not before.
    Applied,
    /// There was nothing new that may change while the node runs.
    Unchanged,
    /// It was not sound; the old one goes on.
    Refused,
}

impl ReloadResult {
    const ALL: [Self; 3] = [Self::Applied, Self::Unchanged, Self::Refused];

    /// The metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Unchanged => "unchanged",
            Self::Refused => "refused",
        }
    }
}

impl Metrics {
    /// Registers every metric of the node with `registry`.
    #[expect(clippy::too_many_lines, reason = "one list, read from top to bottom")]
    pub fn register(registry: Registry) -> Result<Self, prometheus::Error> {
        let network = int_counters(
            &registry,
            "tidegate_network_bytes_total",
            "Bytes on the public listener's sockets as TCP carries them: HTTP heads, WebSocket frame headers and (with TLS) records included, TCP and IP headers not.",
            &["direction"],
        )?;
        let payload = int_counters(
            &registry,
            "tidegate_payload_bytes_total",
            "Payload bytes of messages, without any framing.",
            &["direction"],
        )?;
        let messages = int_counters(
            &registry,
            "tidegate_messages_total",
            "Messages that clients sent (in) and that were queued for clients (out).",
            &["direction"],
        )?;
        let outbound_dropped = int_counters(
            &registry,
            "tidegate_outbound_dropped_total",
            "Publications that waited for a slow session and made way for newer ones of their room, by the room's policy.",
            &["overflow"],
        )?;
        let build_info = int_gauges(
            &registry,
            "tidegate_build_info",
            "Always 1; the labels tell which build this is.",
            &["version", "revision"],
        )?;
        build_info.with_label_values(&[env!("CARGO_PKG_VERSION"), cli::revision()]).set(1);
        registry.register(Box::new(Process::new()?))?;
        registry.register(Box::new(telemetry::dropped_lines().clone()))?;

        let metrics = Self {
            sockets: int_gauge(&registry, "tidegate_sockets", "Open sockets of the public listener.")?,
            sockets_limit: int_gauge(
                &registry,
                "tidegate_sockets_limit",
                "Sockets that the public listener may hold: limits.connections, or fewer where the limit of open files is too low.",
            )?,
            connections: int_gauges(
                &registry,
                "tidegate_connections",
                "Sessions open now, by protocol.",
                &["protocol"],
            )?,
            connections_opened: int_counters(
                &registry,
                "tidegate_connections_opened_total",
                "Sessions opened, by protocol.",
                &["protocol"],
            )?,
            connections_closed: int_counters(
                &registry,
                "tidegate_connections_closed_total",
                "Sessions ended, by protocol and reason.",
                &["protocol", "reason"],
            )?,
            handshakes: int_counters(
                &registry,
                "tidegate_handshakes_total",
                "Requests for a session, by protocol and result.",
                &["protocol", "result"],
            )?,
            handshake_seconds: histograms(
                &registry,
                "tidegate_handshake_seconds",
                "Time from a request's head to a session whose subscriptions stand.",
                &["protocol"],
                prometheus::exponential_buckets(0.000_25, 4.0, 9)?,
            )?,
            network_bytes_in: network.with_label_values(&["in"]),
            network_bytes_out: network.with_label_values(&["out"]),
            payload_bytes_in: payload.with_label_values(&["in"]),
            payload_bytes_out: payload.with_label_values(&["out"]),
            messages_in: messages.with_label_values(&["in"]),
            messages_out: messages.with_label_values(&["out"]),
            publications: int_counter(
                &registry,
                "tidegate_publications_total",
                "Publications received from the broker for rooms with a session on this node.",
            )?,
            deliveries: int_counter(
                &registry,
                "tidegate_deliveries_total",
                "Publications times the sessions each was queued for.",
            )?,
            fanout_seconds: histogram(
                &registry,
                "tidegate_fanout_seconds",
                "Time from the receipt of a publication to the last write of its fan-out handed to the kernel.",
                prometheus::exponential_buckets(0.000_05, 2.5, 12)?,
            )?,
            outbound_bytes: int_gauge(
                &registry,
                "tidegate_outbound_bytes",
                "Bytes waiting in the sessions' outbound queues.",
            )?,
            slow_consumers: int_counter(
                &registry,
                "tidegate_slow_consumers_total",
                "Sessions closed because their outbound queue was full.",
            )?,
            dropped_oldest: outbound_dropped.with_label_values(&["drop_oldest"]),
            dropped_for_latest: outbound_dropped.with_label_values(&["latest"]),
            refusals: int_counters(
                &registry,
                "tidegate_refusals_total",
                "Requests refused before a session existed, by reason.",
                &["reason"],
            )?,
            auth_failures: int_counters(
                &registry,
                "tidegate_auth_failures_total",
                "Tokens refused, by reason.",
                &["reason"],
            )?,
            limited: int_counters(
                &registry,
                "tidegate_limited_total",
                "Messages, commands and control frames of sessions that were refused, by the limit that they were over.",
                &["limit"],
            )?,
            gaps: int_counters(
                &registry,
                "tidegate_gaps_total",
                "Gaps told to rooms of this node, by cause: publications may be missing there.",
                &["cause"],
            )?,
            rooms: int_gauge(
                &registry,
                "tidegate_rooms",
                "Rooms that have a session on this node, or had one a moment ago.",
            )?,
            subscriptions: int_gauge(
                &registry,
                "tidegate_subscriptions",
                "Sessions times the rooms each is in.",
            )?,
            shard_lag_seconds: histogram(
                &registry,
                "tidegate_shard_lag_seconds",
                "How late the regular tick of a shard's loop came: time spent in one turn of other work.",
                prometheus::exponential_buckets(0.000_5, 3.0, 9)?,
            )?,
            inbox_overflows: int_counter(
                &registry,
                "tidegate_inbox_overflows_total",
                "Publications dropped inside the node because a shard's inbox was full; each is told as a gap.",
            )?,
            limit_accounts: int_gauge(
                &registry,
                "tidegate_limit_accounts",
                "Accounts kept of what addresses and users have used of their limits; gone when nothing is used.",
            )?,
            accept_pauses: int_counter(
                &registry,
                "tidegate_accept_pauses_total",
                "How often new connections had to wait because limits.accepts was used up.",
            )?,
            sockets_dropped: int_counters(
                &registry,
                "tidegate_sockets_dropped_total",
                "New sockets closed without an answer, because too many were refused already, by reason.",
                &["reason"],
            )?,
            draining: int_gauge(&registry, "tidegate_draining", "1 while the node is leaving.")?,
            config_reloads: int_counters(
                &registry,
                "tidegate_config_reloads_total",
                "Attempts to take a new configuration, by result.",
                &["result"],
            )?,
            config_reload_successful: int_gauge(
                &registry,
                "tidegate_config_last_reload_successful",
                "1 if the configuration that was read last is sound, 0 if it was refused.",
            )?,
            config_reload_success_timestamp: int_gauge(
                &registry,
                "tidegate_config_last_reload_success_timestamp_seconds",
                "When a sound configuration was last read, in Unix time.",
            )?,
            registry,
        };
        metrics.touch_labels();
        Ok(metrics)
    }

    /// Makes every labelled series exist from the start, so that a rate over a first event is not lost.
    fn touch_labels(&self) {
        for protocol in ProtocolName::ALL {
            self.connections.with_label_values(&[protocol.as_str()]);
            self.connections_opened.with_label_values(&[protocol.as_str()]);
            for reason in CloseReason::ALL {
                self.connections_closed.with_label_values(&[protocol.as_str(), reason.as_str()]);
            }
            for result in HandshakeResult::ALL {
                self.handshakes.with_label_values(&[protocol.as_str(), result.as_str()]);
            }
            self.handshake_seconds.with_label_values(&[protocol.as_str()]);
        }
        for refusal in Refusal::ALL {
            self.refusals.with_label_values(&[refusal.as_str()]);
        }
        for reason in Unanswered::ALL {
            self.refusals.with_label_values(&[reason.as_str()]);
        }
        for failure in AuthFailure::ALL {
            self.auth_failures.with_label_values(&[failure.as_str()]);
        }
        for result in ReloadResult::ALL {
            self.config_reloads.with_label_values(&[result.as_str()]);
        }
        for refusal in DROPPED_FOR {
            self.sockets_dropped.with_label_values(&[refusal.as_str()]);
        }
        for limit in Limit::ALL {
            self.limited.with_label_values(&[limit.as_str()]);
        }
        for cause in ROOM_GAPS {
            self.gaps.with_label_values(&[cause.as_str()]);
        }
    }

    /// Counts a session that begins.
    pub fn connection_opened(&self, protocol: ProtocolName) {
        self.connections.with_label_values(&[protocol.as_str()]).inc();
        self.connections_opened.with_label_values(&[protocol.as_str()]).inc();
    }

    /// Counts a session that is gone.
    pub fn connection_closed(&self, protocol: ProtocolName, reason: CloseReason) {
        self.connections.with_label_values(&[protocol.as_str()]).dec();
        self.connections_closed.with_label_values(&[protocol.as_str(), reason.as_str()]).inc();
    }

    /// Counts an answered request for a session.
    pub fn handshake(&self, protocol: ProtocolName, result: HandshakeResult, seconds: f64) {
        self.handshakes.with_label_values(&[protocol.as_str(), result.as_str()]).inc();
        self.handshake_seconds.with_label_values(&[protocol.as_str()]).observe(seconds);
    }

    /// Counts a refused request.
    pub fn refused(&self, refusal: Refusal) {
        self.refusals.with_label_values(&[refusal.as_str()]).inc();
    }

    /// Counts a connection that was closed before there was a request.
    pub fn unanswered(&self, reason: Unanswered) {
        self.refusals.with_label_values(&[reason.as_str()]).inc();
    }

    /// Counts a socket that was closed without an answer, for the sake of a limit.
    pub fn dropped(&self, refusal: Refusal) {
        self.sockets_dropped.with_label_values(&[refusal.as_str()]).inc();
    }

    /// Counts a refused token.
    pub fn auth_failed(&self, failure: AuthFailure) {
        self.auth_failures.with_label_values(&[failure.as_str()]).inc();
    }

    /// Counts what a session was refused.
    pub fn limited(&self, limit: Limit) {
        self.limited.with_label_values(&[limit.as_str()]).inc();
    }

    /// Counts a gap told to a room.
    pub fn gap(&self, cause: GapCause) {
        self.gaps.with_label_values(&[cause.as_str()]).inc();
    }

    /// Counts an attempt to take a new configuration, at `now`.
    pub fn config_reloaded(&self, result: ReloadResult, now: UnixSeconds) {
        self.config_reloads.with_label_values(&[result.as_str()]).inc();
        self.config_read(result != ReloadResult::Refused, now);
    }

    /// Notes whether the configuration that was read last is sound.
    pub fn config_read(&self, sound: bool, now: UnixSeconds) {
        self.config_reload_successful.set(i64::from(sound));
        if sound {
            self.config_reload_success_timestamp.set(i64::try_from(now.0).unwrap_or(i64::MAX));
        }
    }

    /// Everything, in the Prometheus text format (version 0.0.4).
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Where other parts of the process may register theirs.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }
}

fn int_counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
    let counter = IntCounter::new(name, help)?;
    registry.register(Box::new(counter.clone()))?;
    Ok(counter)
}

fn int_counters(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(counters.clone()))?;
    Ok(counters)
}

fn int_gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
    let gauge = IntGauge::new(name, help)?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
}

fn int_gauges(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> Result<IntGaugeVec, prometheus::Error> {
    let gauges = IntGaugeVec::new(Opts::new(name, help), labels)?;
    registry.register(Box::new(gauges.clone()))?;
    Ok(gauges)
}

fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: Vec<f64>,
) -> Result<Histogram, prometheus::Error> {
    let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
    registry.register(Box::new(histogram.clone()))?;
    Ok(histogram)
}

fn histograms(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
    buckets: Vec<f64>,
) -> Result<HistogramVec, prometheus::Error> {
    let histograms = HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), labels)?;
    registry.register(Box::new(histograms.clone()))?;
    Ok(histograms)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A counter that begins at its first event hides that event from `rate()` and `increase()`.
    #[test]
    fn the_first_event_adds_no_series() {
        let metrics = Metrics::register(Registry::new()).unwrap();
        let series = || -> BTreeSet<String> {
            let page = metrics.render().unwrap();
            let lines = page.lines().filter(|line| !line.starts_with('#') && line.starts_with("tidegate_"));
            lines.filter_map(|line| line.rsplit_once(' ').map(|(series, _)| series.to_owned())).collect()
        };
        let before = series();
        let labels = r#"tidegate_connections_closed_total{protocol="sse",reason="internal"}"#;
        assert!(before.contains(labels), "{before:?}");

        for protocol in ProtocolName::ALL {
            metrics.connection_opened(protocol);
            for reason in CloseReason::ALL {
                metrics.connection_closed(protocol, reason);
            }
            for result in HandshakeResult::ALL {
                metrics.handshake(protocol, result, 0.1);
            }
        }
        for refusal in Refusal::ALL {
            metrics.refused(refusal);
        }
        for reason in Unanswered::ALL {
            metrics.unanswered(reason);
        }
        for refusal in DROPPED_FOR {
            metrics.dropped(refusal);
        }
        for failure in AuthFailure::ALL {
            metrics.auth_failed(failure);
        }
        for limit in Limit::ALL {
            metrics.limited(limit);
        }
        for cause in ROOM_GAPS {
            metrics.gap(cause);
        }
        for result in ReloadResult::ALL {
            metrics.config_reloaded(result, UnixSeconds(0));
        }
        let added: Vec<_> = series().difference(&before).cloned().collect();
        assert!(added.is_empty(), "{added:?}");
    }
}

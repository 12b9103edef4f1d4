//! Shard metrics. Each shard counts in plain cells and adds its counts up here once per turn
//! ([`super::tally`]).

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};

use crate::vocabulary::{
    CloseReason, Limit, ProtocolName,
    metrics::{Counters, Label, counter, counter_family, gauge, gauge_family, histogram},
};

/// The metrics of all shards together.
#[derive(Debug)]
pub struct ShardMetrics {
    connections: IntGaugeVec,
    opened: IntCounterVec,
    closed: IntCounterVec,
    limited: Counters<Limit>,
    /// Publications times the sessions each was queued for.
    pub deliveries: IntCounter,
    /// From the broker's receipt of a publication to the last write of its fan-out.
    pub fanout_seconds: Histogram,
    /// Bytes waiting in the sessions' outbound queues.
    pub outbound_bytes: IntGauge,
    /// Sessions closed because their outbound queue was full.
    pub slow_consumers: IntCounter,
    /// Publications dropped for newer ones, `overflow = "drop_oldest"`.
    pub dropped_oldest: IntCounter,
    /// Publications dropped for newer ones, `overflow = "latest"`.
    pub dropped_for_latest: IntCounter,
    /// Subscriptions that asked for what the session has missed, and continue where it left off.
    pub recovered: IntCounter,
    /// Subscriptions that asked for what the session has missed, where something may be missing.
    pub unrecovered: IntCounter,
    /// Sessions times the rooms each is in.
    pub subscriptions: IntGauge,
    /// How late a shard's regular tick ran.
    pub lag_seconds: Histogram,
}

impl ShardMetrics {
    /// Registers the metrics, for sessions of these protocols.
    pub fn register(registry: &Registry, protocols: &[ProtocolName]) -> Result<Self, prometheus::Error> {
        let dropped = counter_family(
            registry,
            "tidegate_outbound_dropped_total",
            "Publications that waited for a slow session and made way for newer ones of their room, by the room's policy.",
            &["overflow"],
        )?;
        let recoveries = counter_family(
            registry,
            "tidegate_history_recoveries_total",
            "Subscriptions of the Centrifuge protocol that asked for missed publications, by whether nothing is missing.",
            &["recovered"],
        )?;
        let metrics = Self {
            connections: gauge_family(
                registry,
                "tidegate_connections",
                "Sessions open now, by protocol.",
                &["protocol"],
            )?,
            opened: counter_family(
                registry,
                "tidegate_connections_opened_total",
                "Sessions opened, by protocol.",
                &["protocol"],
            )?,
            closed: counter_family(
                registry,
                "tidegate_connections_closed_total",
                "Sessions ended, by protocol and reason.",
                &["protocol", "reason"],
            )?,
            limited: Counters::register(
                registry,
                "tidegate_limited_total",
                "Messages, commands and control frames of sessions that were refused, by the limit that they were over.",
                "limit",
            )?,
            deliveries: counter(
                registry,
                "tidegate_deliveries_total",
                "Publications times the sessions each was queued for.",
            )?,
            fanout_seconds: histogram(
                registry,
                "tidegate_fanout_seconds",
                "Time from the receipt of a publication to the last write of its fan-out handed to the kernel.",
                prometheus::exponential_buckets(0.000_05, 2.5, 12)?,
            )?,
            outbound_bytes: gauge(
                registry,
                "tidegate_outbound_bytes",
                "Bytes waiting in the sessions' outbound queues.",
            )?,
            slow_consumers: counter(
                registry,
                "tidegate_slow_consumers_total",
                "Sessions closed because their outbound queue was full.",
            )?,
            dropped_oldest: dropped.with_label_values(&["drop_oldest"]),
            dropped_for_latest: dropped.with_label_values(&["latest"]),
            recovered: recoveries.with_label_values(&["true"]),
            unrecovered: recoveries.with_label_values(&["false"]),
            subscriptions: gauge(registry, "tidegate_subscriptions", "Sessions times the rooms each is in.")?,
            lag_seconds: histogram(
                registry,
                "tidegate_shard_lag_seconds",
                "How late the regular tick of a shard's loop came: time spent in one turn of other work.",
                prometheus::exponential_buckets(0.000_5, 3.0, 9)?,
            )?,
        };
        for protocol in protocols {
            metrics.connections.with_label_values(&[protocol.as_str()]);
            metrics.opened.with_label_values(&[protocol.as_str()]);
            for reason in CloseReason::ALL {
                metrics.closed.with_label_values(&[protocol.as_str(), reason.as_str()]);
            }
        }
        Ok(metrics)
    }

    /// Counts a session that opens.
    pub fn connection_opened(&self, protocol: ProtocolName) {
        self.connections.with_label_values(&[protocol.as_str()]).inc();
        self.opened.with_label_values(&[protocol.as_str()]).inc();
    }

    /// Counts a session that has ended.
    pub fn connection_closed(&self, protocol: ProtocolName, reason: CloseReason) {
        self.connections.with_label_values(&[protocol.as_str()]).dec();
        self.closed.with_label_values(&[protocol.as_str(), reason.as_str()]).inc();
    }

    /// Counts something that a session was refused because of a limit.
    pub fn limited(&self, limit: Limit) {
        self.limited.of(limit).inc();
    }
}

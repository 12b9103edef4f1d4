//! The metrics of a broker.
//!
//! Owns the metric families and cached handles to each label value, so that counting on a hot path is one
//! atomic add. Labels come from closed enums: no room, topic or address is ever a label.

mod history;

use std::{sync::Arc, time::Duration};

use prometheus::{
    Error, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

pub(crate) use self::history::HistoryMetrics;
use crate::{Accepted, BrokerError};

/// A broker's metrics. One set per node: registering twice in one registry is an error.
#[derive(Debug)]
pub struct BrokerMetrics {
    pub(crate) up: IntGauge,
    pub(crate) subscriber_connections: IntGauge,
    pub(crate) publisher_connections: IntGauge,
    pub(crate) interruptions: IntCounter,
    pub(crate) topic_interruptions: IntCounter,
    pub(crate) resubscriptions: IntCounter,
    pub(crate) canary_missed: IntCounter,
    pub(crate) received: IntCounter,
    pub(crate) received_bytes: IntCounter,
    pub(crate) oversized: IntCounter,
    pub(crate) topics: IntGauge,
    pub(crate) topics_refused: IntGauge,
    pub(crate) subscriptions_refused: IntCounter,
    pub(crate) publish_queue_bytes: IntGauge,
    pub(crate) history: HistoryMetrics,
    canary: Histogram,
    ended: [[IntCounter; End::ALL.len()]; Part::ALL.len()],
    acked: IntCounter,
    not_now: IntCounter,
    forbidden: IntCounter,
    refused: IntCounter,
    unknown: IntCounter,
    unavailable: IntCounter,
    closed: IntCounter,
}

/// Which of the broker's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Subscriber,
    Publisher,
}

impl Part {
    const ALL: [Self; 2] = [Self::Subscriber, Self::Publisher];

    fn as_str(self) -> &'static str {
        match self {
            Self::Subscriber => "subscriber",
            Self::Publisher => "publisher",
        }
    }
}

/// Why an established connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The peer closed it, or the network failed.
    Closed,
    /// There was no answer in time.
    Silent,
    /// What this node published did not arrive at this node.
    Missed,
    /// The server has become a replica.
    Demoted,
    /// The server answered that it does not serve this connection.
    Refused,
    /// The server's answers could not be understood.
    Protocol,
}

impl End {
    const ALL: [Self; 6] =
        [Self::Closed, Self::Silent, Self::Missed, Self::Demoted, Self::Refused, Self::Protocol];

    fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Silent => "silent",
            Self::Missed => "missed",
            Self::Demoted => "demoted",
            Self::Refused => "refused",
            Self::Protocol => "protocol",
        }
    }
}

impl BrokerMetrics {
    /// Makes the metrics and registers them.
    pub fn register(registry: &Registry) -> Result<Arc<Self>, Error> {
        let connections = register(
            registry,
            IntGaugeVec::new(
                Opts::new("tidegate_broker_connections", "Connections to the broker that stand, by role."),
                &["role"],
            )?,
        )?;
        let ended = register(
            registry,
            IntCounterVec::new(
                Opts::new(
                    "tidegate_broker_connections_ended_total",
                    "Connections to the broker that stood and were lost or given up, by role and cause.",
                ),
                &["role", "cause"],
            )?,
        )?;
        let publications = register(
            registry,
            IntCounterVec::new(
                Opts::new(
                    "tidegate_broker_publications_total",
                    "Publications handed to the broker, by what became of them.",
                ),
                &["result"],
            )?,
        )?;
        let canary = HistogramOpts::new(
            "tidegate_broker_canary_seconds",
            "How long a message takes from a publishing connection through the broker to a receiving one of this node.",
        )
        .buckets(vec![0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0]);
        Ok(Arc::new(Self {
            up: gauge(registry, "up", "1 while everything between this node and its broker works, else 0.")?,
            subscriber_connections: connections.with_label_values(&["subscriber"]),
            publisher_connections: connections.with_label_values(&["publisher"]),
            interruptions: counter(
                registry,
                "interruptions_total",
                "Subscriber connections that were lost.",
            )?,
            topic_interruptions: counter(
                registry,
                "topic_interruptions_total",
                "Subscriptions of topics that the broker ended by itself, on connections that stood.",
            )?,
            resubscriptions: counter(
                registry,
                "resubscriptions_total",
                "Topics that were subscribed again after they were lost.",
            )?,
            canary_missed: counter(
                registry,
                "canary_missed_total",
                "Receiving connections that were given up because they fell silent or missed a message of this node to itself.",
            )?,
            received: counter(registry, "received_total", "Publications received from the broker.")?,
            received_bytes: counter(
                registry,
                "received_bytes_total",
                "Bytes of publications received from the broker, as they came (envelope included).",
            )?,
            oversized: counter(
                registry,
                "oversized_total",
                "Publications that were skipped because they were larger than this node accepts.",
            )?,
            topics: gauge(registry, "topics", "Topics that this node wants to be subscribed to.")?,
            topics_refused: gauge(
                registry,
                "topics_refused",
                "Topics that the broker delivered once and does not allow now.",
            )?,
            subscriptions_refused: counter(
                registry,
                "subscriptions_refused_total",
                "Subscriptions of new topics that the broker refused.",
            )?,
            publish_queue_bytes: gauge(
                registry,
                "publish_queue_bytes",
                "Bytes of publications that wait to be sent or acknowledged.",
            )?,
            history: HistoryMetrics::register(registry)?,
            canary: register(registry, Histogram::with_opts(canary)?)?,
            ended: Part::ALL
                .map(|part| End::ALL.map(|end| ended.with_label_values(&[part.as_str(), end.as_str()]))),
            acked: publications.with_label_values(&["acked"]),
            not_now: publications.with_label_values(&["not_now"]),
            forbidden: publications.with_label_values(&["forbidden"]),
            refused: publications.with_label_values(&["refused"]),
            unknown: publications.with_label_values(&["unknown"]),
            unavailable: publications.with_label_values(&["unavailable"]),
            closed: publications.with_label_values(&["closed"]),
        }))
    }

    pub(crate) fn canary_returned(&self, after: Duration) {
        self.canary.observe(after.as_secs_f64());
    }

    /// Counts one settled publication. Each publication is counted once, so the sum over the label is what
    /// was handed over.
    pub(crate) fn published(&self, outcome: &Result<Accepted, BrokerError>) {
        match outcome {
            Ok(_) => &self.acked,
            Err(BrokerError::NotNow(_)) => &self.not_now,
            Err(BrokerError::Forbidden(_)) => &self.forbidden,
            Err(BrokerError::Refused(_)) => &self.refused,
            Err(BrokerError::Unknown) => &self.unknown,
            Err(BrokerError::Unavailable) => &self.unavailable,
            Err(BrokerError::Closed) => &self.closed,
        }
        .inc();
    }

    pub(crate) fn connection_ended(&self, part: Part, end: End) {
        if let Some(counter) = self.ended.get(part as usize).and_then(|ends| ends.get(end as usize)) {
            counter.inc();
        }
    }

    pub(crate) fn received(&self, bytes: usize) {
        self.received.inc();
        self.received_bytes.inc_by(bytes as u64);
    }
}

fn gauge(registry: &Registry, name: &str, help: &str) -> Result<IntGauge, Error> {
    register(registry, IntGauge::new(format!("tidegate_broker_{name}"), help)?)
}

fn counter(registry: &Registry, name: &str, help: &str) -> Result<IntCounter, Error> {
    register(registry, IntCounter::new(format!("tidegate_broker_{name}"), help)?)
}

fn register<C: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> Result<C, Error> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

#[cfg(test)]
mod tests {
    use prometheus::{Encoder, TextEncoder};

    use super::*;
    use crate::{
        Cursor,
        history::{Page, Start},
    };

    #[test]
    fn every_series_exists_from_the_start_and_counts_once() {
        let registry = Registry::new();
        let metrics = BrokerMetrics::register(&registry).unwrap();
        assert!(BrokerMetrics::register(&registry).is_err(), "one set per registry");
        for outcome in [
            Ok(Accepted::default()),
            Err(BrokerError::NotNow("x".into())),
            Err(BrokerError::Forbidden("x".into())),
            Err(BrokerError::Refused("x".into())),
            Err(BrokerError::Unknown),
            Err(BrokerError::Unavailable),
            Err(BrokerError::Closed),
        ] {
            metrics.published(&outcome);
        }
        metrics.received(7);
        for (offset, duplicate) in [(Some(1), false), (Some(1), true), (None, false)] {
            let cursor = offset.map(|offset| Cursor { epoch: 1, offset });
            metrics.history.recorded(&Accepted { cursor, duplicate });
        }
        metrics.history.opened(&Ok(Cursor { epoch: 1, offset: 1 }));
        metrics.history.opened(&Err(BrokerError::Unavailable));
        for start in [Start::Continuous, Start::Trimmed, Start::Lost] {
            metrics.history.read(&Ok(Page { entries: vec![], start, top: None }));
        }
        metrics.history.read(&Err(BrokerError::Unavailable));
        metrics.connection_ended(Part::Publisher, End::Demoted);
        metrics.canary_returned(Duration::from_millis(3));

        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        for result in ["acked", "not_now", "forbidden", "refused", "unknown", "unavailable", "closed"] {
            let line = format!("tidegate_broker_publications_total{{result=\"{result}\"}} 1");
            assert!(text.contains(&line), "{line} in {text}");
        }
        for line in [
            "tidegate_broker_connections{role=\"publisher\"} 0",
            "tidegate_broker_received_bytes_total 7",
            "tidegate_broker_connections_ended_total{cause=\"demoted\",role=\"publisher\"} 1",
            "tidegate_broker_connections_ended_total{cause=\"demoted\",role=\"subscriber\"} 0",
            "tidegate_broker_canary_seconds_count 1",
            "tidegate_broker_recorded_total{result=\"recorded\"} 1",
            "tidegate_broker_recorded_total{result=\"duplicate\"} 1",
            "tidegate_broker_recorded_total{result=\"not_kept\"} 1",
            "tidegate_broker_log_opens_total{result=\"ok\"} 1",
            "tidegate_broker_log_opens_total{result=\"failed\"} 1",
            "tidegate_broker_log_reads_total{result=\"continuous\"} 1",
            "tidegate_broker_log_reads_total{result=\"trimmed\"} 1",
            "tidegate_broker_log_reads_total{result=\"lost\"} 1",
            "tidegate_broker_log_reads_total{result=\"failed\"} 1",
            "tidegate_broker_log_read_publications_total 0",
            "tidegate_broker_function_loads_total{result=\"loaded\"} 0",
            "tidegate_broker_function_loads_total{result=\"failed\"} 0",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}

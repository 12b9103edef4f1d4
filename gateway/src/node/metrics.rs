//! The metric families of one node, each registered by its owner.

use std::sync::Arc;

use prometheus::Registry;

use super::process::Process;
use crate::{
    cli,
    hub::HubMetrics,
    request::RequestMetrics,
    shard::ShardMetrics,
    telemetry,
    traffic::Traffic,
    vocabulary::{ProtocolName, metrics::gauge_family},
};

/// The metrics that the parts of a node use.
pub struct Metrics {
    pub hub: Arc<HubMetrics>,
    pub requests: Arc<RequestMetrics>,
    pub shards: Arc<ShardMetrics>,
    pub traffic: Arc<Traffic>,
}

impl Metrics {
    /// Registers everything that a node measures.
    pub fn register(registry: &Registry, protocols: &[ProtocolName]) -> Result<Self, prometheus::Error> {
        let build_info = gauge_family(
            registry,
            "tidegate_build_info",
            "Always 1; the labels tell which build this is.",
            &["version", "revision"],
        )?;
        build_info.with_label_values(&[env!("CARGO_PKG_VERSION"), cli::revision()]).set(1);
        registry.register(Box::new(Process::new()?))?;
        registry.register(Box::new(telemetry::dropped_lines().clone()))?;
        Ok(Self {
            hub: Arc::new(HubMetrics::register(registry)?),
            requests: Arc::new(RequestMetrics::register(registry, protocols)?),
            shards: Arc::new(ShardMetrics::register(registry, protocols)?),
            traffic: Arc::new(Traffic::register(registry)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use broker_bridge::GapCause;
    use prometheus::TextEncoder;

    use super::*;
    use crate::{
        auth::AuthFailure,
        vocabulary::{CloseReason, HandshakeResult, Limit, Refusal, Unanswered, metrics::Label as _},
    };

    /// A counter that begins at its first event hides that event from `rate()` and `increase()`.
    #[test]
    fn the_first_event_adds_no_series() {
        let registry = Registry::new();
        let protocols = [ProtocolName::new("one"), ProtocolName::new("other")];
        let Metrics { hub, requests, shards, .. } = Metrics::register(&registry, &protocols).unwrap();
        let series = || -> BTreeSet<String> {
            let page = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
            let lines = page.lines().filter(|line| !line.starts_with('#') && line.starts_with("tidegate_"));
            lines.filter_map(|line| line.rsplit_once(' ').map(|(series, _)| series.to_owned())).collect()
        };
        let before = series();
        let labels = r#"tidegate_connections_closed_total{protocol="one",reason="internal"}"#;
        assert!(before.contains(labels), "{before:?}");

        for protocol in protocols {
            shards.connection_opened(protocol);
            for reason in CloseReason::ALL {
                shards.connection_closed(protocol, *reason);
            }
            for result in HandshakeResult::ALL {
                requests.handshake(protocol, *result, 0.1);
            }
        }
        for refusal in Refusal::ALL {
            requests.refused(*refusal);
        }
        for reason in Unanswered::ALL {
            requests.unanswered(*reason);
        }
        for refusal in [Refusal::Connections, Refusal::Attempts, Refusal::AddressConnections] {
            requests.dropped(refusal);
        }
        for failure in AuthFailure::ALL {
            requests.auth_failed(*failure);
        }
        for limit in Limit::ALL {
            shards.limited(*limit);
        }
        for cause in [GapCause::Interrupted, GapCause::Oversized, GapCause::Overflow] {
            hub.gap(cause);
        }
        let added: Vec<_> = series().difference(&before).cloned().collect();
        assert!(added.is_empty(), "{added:?}");
    }
}

//! Traffic from and to clients in bytes and messages, for all transports.

use prometheus::{IntCounter, Registry};

use crate::vocabulary::metrics::counter_family;

/// Counters of traffic. Shards count in plain cells and add up here once per turn.
#[derive(Debug)]
pub struct Traffic {
    /// Bytes read from sockets, as on the wire.
    pub network_bytes_in: IntCounter,
    /// Bytes written to sockets, as on the wire.
    pub network_bytes_out: IntCounter,
    /// Payload bytes that clients sent.
    pub payload_bytes_in: IntCounter,
    /// Payload bytes that were queued for clients.
    pub payload_bytes_out: IntCounter,
    /// Messages that clients sent.
    pub messages_in: IntCounter,
    /// Messages that were queued for clients.
    pub messages_out: IntCounter,
}

impl Traffic {
    /// Registers the counters.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let network = counter_family(
            registry,
            "tidegate_network_bytes_total",
            "Bytes on the public listener's sockets as TCP carries them: HTTP heads, WebSocket frame headers and (with TLS) records included, TCP and IP headers not.",
            &["direction"],
        )?;
        let payload = counter_family(
            registry,
            "tidegate_payload_bytes_total",
            "Payload bytes of messages, without any framing.",
            &["direction"],
        )?;
        let messages = counter_family(
            registry,
            "tidegate_messages_total",
            "Messages that clients sent (in) and that were queued for clients (out).",
            &["direction"],
        )?;
        Ok(Self {
            network_bytes_in: network.with_label_values(&["in"]),
            network_bytes_out: network.with_label_values(&["out"]),
            payload_bytes_in: payload.with_label_values(&["in"]),
            payload_bytes_out: payload.with_label_values(&["out"]),
            messages_in: messages.with_label_values(&["in"]),
            messages_out: messages.with_label_values(&["out"]),
        })
    }
}

//! The hub's metrics.

use broker_bridge::GapCause;
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, Registry};

use crate::vocabulary::metrics::{counter, counter_family, gauge, histogram};

/// The causes of gaps that concern a whole room; [`GapCause::Dropped`] concerns one session.
const ROOM_GAPS: [GapCause; 7] = [
    GapCause::Interrupted,
    GapCause::Oversized,
    GapCause::Overflow,
    GapCause::Failover,
    GapCause::Trimmed,
    GapCause::Expired,
    GapCause::Unrecorded,
];

/// The bounds of the times of repairs, in seconds.
const REPAIRS: [f64; 9] = [0.001, 0.004, 0.016, 0.064, 0.256, 1.0, 4.0, 16.0, 64.0];

/// The hub's metrics.
#[derive(Debug)]
pub struct HubMetrics {
    /// Publications received for rooms with a session on this node.
    pub publications: IntCounter,
    /// Rooms in the hub.
    pub rooms: IntGauge,
    /// Publications that did not fit into a shard's inbox.
    pub inbox_overflows: IntCounter,
    /// Readings of a room's log to find out what an interruption has cost.
    pub repairs: IntCounter,
    /// Readings of a silent room's log.
    pub checks: IntCounter,
    /// Messages in rooms with a history that are not in it.
    pub unrecorded: IntCounter,
    /// Rooms that wait for a reading that finds out what an interruption has cost.
    pub repairing: IntGauge,
    /// How long they waited.
    pub repair_seconds: Histogram,
    /// Publications that did not arrive, and were read from a log.
    pub repaired: IntCounter,
    /// Members that came back and found what they had missed in this node's memory.
    pub resumed_from_memory: IntCounter,
    /// Readings of a room's log for members that came back.
    pub resumed_from_log: IntCounter,
    gaps: IntCounterVec,
}

impl HubMetrics {
    /// Registers the metrics.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gaps = counter_family(
            registry,
            "tidegate_gaps_total",
            "Gaps told to rooms of this node, by cause: publications may be missing there.",
            &["cause"],
        )?;
        let resumptions = counter_family(
            registry,
            "tidegate_history_resumptions_total",
            "Sessions that came back to a room with a history: from this node's memory, or by a reading of the log.",
            &["from"],
        )?;
        for cause in ROOM_GAPS {
            gaps.with_label_values(&[cause.as_str()]);
        }
        Ok(Self {
            publications: counter(
                registry,
                "tidegate_publications_total",
                "Publications received from the broker for rooms with a session on this node.",
            )?,
            rooms: gauge(
                registry,
                "tidegate_rooms",
                "Rooms that have a session on this node, or had one a moment ago.",
            )?,
            inbox_overflows: counter(
                registry,
                "tidegate_inbox_overflows_total",
                "Publications dropped inside the node because a shard's inbox was full; each is told as a gap.",
            )?,
            repairs: counter(
                registry,
                "tidegate_history_repairs_total",
                "Readings of a room's history to find out what an interruption has cost.",
            )?,
            checks: counter(
                registry,
                "tidegate_history_checks_total",
                "Readings of the history of rooms in which nothing has arrived for a while.",
            )?,
            unrecorded: counter(
                registry,
                "tidegate_history_unrecorded_total",
                "Messages received in rooms with a history that were published past it: clients that come back do not get them.",
            )?,
            repairing: gauge(
                registry,
                "tidegate_history_repairing_rooms",
                "Rooms with a history that wait for a reading to find out what an interruption has cost; what is published meanwhile waits, too.",
            )?,
            repair_seconds: histogram(
                registry,
                "tidegate_history_repair_seconds",
                "Time from when a room is known to miss something until all that its log has is on its way to its members.",
                REPAIRS.to_vec(),
            )?,
            repaired: counter(
                registry,
                "tidegate_history_repaired_messages_total",
                "Messages that had not arrived from the broker, and were read from a room's history.",
            )?,
            resumed_from_memory: resumptions.with_label_values(&["memory"]),
            resumed_from_log: resumptions.with_label_values(&["log"]),
            gaps,
        })
    }

    /// Counts a gap in a room.
    pub fn gap(&self, cause: GapCause) {
        self.gaps.with_label_values(&[cause.as_str()]).inc();
    }
}

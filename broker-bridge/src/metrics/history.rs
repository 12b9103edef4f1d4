//! The metrics of rooms' histories.

use prometheus::{Error, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use super::{counter, gauge, register};
use crate::{
    Accepted, BrokerError, Cursor,
    history::{Page, Start},
};

/// What a broker counts of histories.
#[derive(Debug)]
pub(crate) struct HistoryMetrics {
    pub(crate) requests_waiting: IntGauge,
    pub(crate) requests_in_flight: IntGauge,
    pub(crate) functions_loaded: IntCounter,
    pub(crate) functions_failed: IntCounter,
    /// Of publications whose connection was lost before the answer.
    pub(crate) verified_recorded: IntCounter,
    pub(crate) verified_missing: IntCounter,
    pub(crate) verified_unknown: IntCounter,
    recorded: IntCounter,
    duplicate: IntCounter,
    not_kept: IntCounter,
    opened: IntCounter,
    open_failed: IntCounter,
    reads: [IntCounter; 4],
    publications_read: IntCounter,
}

impl HistoryMetrics {
    pub(super) fn register(registry: &Registry) -> Result<Self, Error> {
        let recorded = by_result(
            registry,
            "recorded_total",
            "Publications for rooms with history that the broker accepted: recorded, dropped because their id was known, or delivered and not kept.",
        )?;
        let opens = by_result(
            registry,
            "log_opens_total",
            "Requests for the position of a room's newest publication, by result.",
        )?;
        let reads = by_result(
            registry,
            "log_reads_total",
            "Requests for a part of a room's history: answered from where it was asked for, from later because publications were removed, or not knowing the position; or failed.",
        )?;
        let functions = by_result(
            registry,
            "function_loads_total",
            "Attempts to load the functions that record publications into Redis, which lacked them or had an older version, by result.",
        )?;
        let verified = by_result(
            registry,
            "verified_total",
            "Publications for rooms with history whose connection was lost before the answer: found in the history; missing there, and sent again unless a later one of the room was accepted; or nobody can tell.",
        )?;
        Ok(Self {
            requests_waiting: gauge(
                registry,
                "requests_waiting",
                "Requests for positions in rooms' histories, and for parts of them, that wait to be sent to the broker.",
            )?,
            requests_in_flight: gauge(
                registry,
                "requests_in_flight",
                "Requests for positions in rooms' histories, and for parts of them, that wait for the broker's answer.",
            )?,
            verified_recorded: verified.with_label_values(&["recorded"]),
            verified_missing: verified.with_label_values(&["missing"]),
            verified_unknown: verified.with_label_values(&["unknown"]),
            functions_loaded: functions.with_label_values(&["loaded"]),
            functions_failed: functions.with_label_values(&["failed"]),
            recorded: recorded.with_label_values(&["recorded"]),
            duplicate: recorded.with_label_values(&["duplicate"]),
            not_kept: recorded.with_label_values(&["not_kept"]),
            opened: opens.with_label_values(&["ok"]),
            open_failed: opens.with_label_values(&["failed"]),
            reads: ["continuous", "trimmed", "lost", "failed"]
                .map(|result| reads.with_label_values(&[result])),
            publications_read: counter(
                registry,
                "log_read_publications_total",
                "Publications read from rooms' histories.",
            )?,
        })
    }

    /// Counts one accepted publication that was to be recorded.
    pub(crate) fn recorded(&self, accepted: &Accepted) {
        match accepted {
            Accepted { duplicate: true, .. } => &self.duplicate,
            Accepted { cursor: Some(_), .. } => &self.recorded,
            Accepted { cursor: None, .. } => &self.not_kept,
        }
        .inc();
    }

    pub(crate) fn opened(&self, answer: &Result<Cursor, BrokerError>) {
        if answer.is_ok() { &self.opened } else { &self.open_failed }.inc();
    }

    pub(crate) fn read(&self, answer: &Result<Page, BrokerError>) {
        let [continuous, trimmed, lost, failed] = &self.reads;
        match answer {
            Ok(Page { start: Start::Continuous, .. }) => continuous,
            Ok(Page { start: Start::Trimmed, .. }) => trimmed,
            Ok(Page { start: Start::Lost, .. }) => lost,
            Err(_) => failed,
        }
        .inc();
        let publications = answer.as_ref().map_or(0, |page| page.entries.len());
        self.publications_read.inc_by(publications as u64);
    }
}

fn by_result(registry: &Registry, name: &str, help: &str) -> Result<IntCounterVec, Error> {
    register(registry, IntCounterVec::new(Opts::new(format!("tidegate_broker_{name}"), help), &["result"])?)
}

//! Rooms with a history: real nodes on a real Redis, small numbers, exact counts.

#![expect(clippy::unwrap_used, reason = "a test panics where it fails")]

mod support;

use std::process::Output;

use serde_json::Value;
use tidegate_tests::node;

use self::support::report;

fn run(name: &str, scenario: &[&str]) -> (Output, Value) {
    let program = format!("--tidegate={}", node::binary().unwrap().display());
    let flags: Vec<&str> = scenario.iter().copied().chain([program.as_str()]).collect();
    report(name, &flags)
}

fn count(counts: &Value, name: &str) -> u64 {
    counts.get(name).and_then(Value::as_u64).unwrap_or_else(|| panic!("no {name}: {counts}"))
}

/// Asserts that everything was delivered once and in order, without a gap; returns how much.
fn assert_exact(counts: &Value) -> u64 {
    let wrong =
        ["missing", "duplicated", "out_of_order", "foreign", "covered", "doubtful", "connections_lost"];
    for name in wrong {
        assert_eq!(count(counts, name), 0, "{name}: {counts}");
    }
    assert!(counts.get("gaps").unwrap().as_object().unwrap().is_empty(), "{counts}");
    assert_eq!(count(counts, "delivered"), count(counts, "expected"));
    count(counts, "delivered")
}

const JITTER: [&str; 8] = [
    "jitter",
    "--clients=30",
    "--rooms=3",
    "--nodes=2",
    "--rate=300",
    "--duration=2s",
    "--up=300ms",
    "--down=150ms",
];

#[test]
fn clients_that_drop_again_and_again_miss_nothing() {
    let (output, report) = run("history-jitter", &JITTER);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let delivered = assert_exact(report.get("counts").unwrap());
    // Ten clients in each room, which gets a third of what is published and one message at the end.
    assert_eq!(delivered % 10, 0);
    assert!(delivered >= 10 * 500, "{report}");
    assert!(count(report.get("counts").unwrap(), "returns") > 60, "{report}");
    assert!(report.pointer("/catching_up/p99").unwrap().as_f64() > Some(0.0), "{report}");
}

#[test]
fn without_a_history_the_same_clients_miss_messages() {
    let (output, report) = run("history-none", &[&JITTER[..], &["--history-size=0"]].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(count(report.get("counts").unwrap(), "missing") > 0, "{report}");
}

#[test]
fn clients_that_come_back_at_once_share_one_reading_of_the_log() {
    let scenario = ["resume", "--clients=40", "--missed=3", "--rounds=2", "--expect-reads=1"];
    let (output, report) = run("history-resume", &scenario);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let legs = report.get("legs").unwrap().as_array().unwrap();
    let kinds: Vec<(u64, &str)> =
        legs.iter().map(|leg| (count(leg, "rooms"), leg.get("from").unwrap().as_str().unwrap())).collect();
    assert_eq!(kinds, [(1, "memory"), (1, "log"), (40, "memory"), (40, "log")]);
    for leg in legs {
        // One message before, and three missed ones and one more in each of two rounds.
        assert_eq!(assert_exact(leg.get("counts").unwrap()), 40 * 9, "{leg}");
        let reads = leg.pointer("/median/reads_per_room").unwrap().as_f64().unwrap();
        assert_eq!(reads > 0.0, leg.get("from").unwrap() == "log", "{leg}");
    }
}

#[test]
fn three_ways_to_publish_are_compared() {
    let scenario = ["history", "--rooms=1,50", "--messages=2000", "--rounds=2", "--expect-per-core=1"];
    let (output, report) = run("history-publish", &scenario);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for leg in report.get("legs").unwrap().as_array().unwrap() {
        assert_eq!(leg.get("rounds").unwrap().as_array().unwrap().len(), 2, "{leg}");
        assert!(leg.pointer("/median/to_publish").unwrap().as_f64() > Some(1.0), "{leg}");
    }
}

#[test]
fn a_kill_of_redis_is_one_gap_and_a_kill_of_a_node_is_none() {
    let scenario = ["outage", "--clients=20", "--rooms=2", "--rate=200", "--peace=500ms", "--rounds=2"];
    let (output, report) = run("history-outage", &scenario);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let counts = |leg: usize| report.pointer(&format!("/legs/{leg}/counts")).unwrap();
    assert_eq!(count(counts(0), "gaps_of_one"), 2, "{report}");
    assert_eq!(count(counts(0), "missing") + count(counts(0), "duplicated"), 0, "{report}");
    let counts = counts(1);
    assert_eq!(
        count(counts, "missing") + count(counts, "duplicated") + count(counts, "covered"),
        0,
        "{report}"
    );
    // The clients of the killed node return, and after the first kill they go to a new one.
    assert_eq!((count(counts, "connections_lost"), count(counts, "returns")), (20, 30), "{report}");
    let pause = |leg: usize| report.pointer(&format!("/legs/{leg}/pauses/max")).unwrap().as_f64().unwrap();
    assert!(pause(0) >= 500_000.0 && pause(1) > 0.0, "{report}");
}

#[test]
fn an_interrupted_node_repairs_every_room() {
    let scenario = ["repair", "--connections=5", "--rooms-per-client=20", "--rounds=2"];
    let (output, report) = run("history-repair", &scenario);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let counts = report.get("counts").unwrap();
    assert_eq!((count(counts, "expected"), count(counts, "delivered")), (300, 300), "{report}");
    assert_eq!(report.get("gaps").unwrap(), 0, "{report}");
    assert!(report.pointer("/median/repaired").unwrap().as_f64() > Some(0.0), "{report}");
}

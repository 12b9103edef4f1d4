//! Tests of the budgets' numbers, verdicts and documents.

use serde_json::json;

use super::*;

fn budget(name: &str) -> &'static Budget {
    BUDGETS.iter().find(|budget| budget.name == name).unwrap()
}

fn row(name: &str, reports: Vec<(Value, Value)>) -> Row {
    let workshop =
        Workshop { tidegate: None, scratch: "/nowhere".into(), server_cpu: Some(0), client_cpu: Some(1) };
    let of = budget(name);
    let mut row = Row::new(of, 5, &workshop);
    row.read(of, &Measured { of, others: 0.0, reports: Ok(reports) });
    row
}

fn results(budgets: Vec<Row>) -> Results {
    Results {
        machine: Machine::this(),
        tidegate: "tidegate 1".into(),
        rounds: 5,
        interrupted: None,
        budgets,
        preamble: "preamble\n".into(),
    }
}

#[test]
fn numbers_are_read_from_reports_and_compared_with_their_bounds() {
    let limit =
        row("fanout-1000", vec![(json!({ "cpu_ratio": 1.1, "cpu_ratio_range": [1.0, 1.3] }), Value::Null)]);
    assert_eq!((limit.median, limit.range, limit.outcome), (Some(1.1), Some((1.0, 1.3)), Outcome::Met));

    let pair = |of: f64, to: f64| {
        (json!({ "median": { "server_cpu": of } }), json!({ "median": { "server_cpu": to } }))
    };
    let ratio = row("centrifuge", vec![pair(1.0, 2.0), pair(6.0, 2.0), pair(2.4, 2.0)]);
    assert_eq!((ratio.median, ratio.range, &ratio.outcome), (Some(1.2), Some((0.5, 3.0)), &Outcome::Missed));

    let of_bytes = |cpu: f64, bytes: f64| json!({ "median": { "server_cpu": cpu, "wire_bytes": bytes } });
    let apart = row("centrifuge", vec![(of_bytes(1.0, 377.0), of_bytes(1.0, 260.0))]);
    assert!(results(vec![apart]).warnings()[0].starts_with("centrifuge: loopback acknowledges"));
    let equal = row("centrifuge-length", vec![(of_bytes(1.0, 377.0), of_bytes(1.0, 377.0))]);
    assert_eq!((equal.sizes, ratio.sizes.clone()), (None, None));

    let wave = |rate: f64| (json!({ "waves": [{ "per_second": rate }] }), Value::Null);
    let storm = row("storm", vec![wave(9_000.0), wave(11_000.0), wave(12_000.0)]);
    assert_eq!((storm.median, &storm.outcome), (Some(11_000.0), &Outcome::Met), "at least is not at most");

    let held = row("stalled-bytes", vec![(json!({ "held": { "each": 2048 } }), Value::Null)]);
    assert_eq!(held.median, Some(2.0), "KiB");

    let broken = row("storm", vec![(json!({}), Value::Null)]);
    assert!(matches!(&broken.outcome, Outcome::Failed(why) if why.contains("/waves/0/per_second")));

    let Verdict::Unexpected(words) = results(vec![ratio, storm, broken]).verdict() else { panic!() };
    assert_eq!(words.lines().count(), 2, "what was met is not named: {words}");
    assert!(words.contains("centrifuge: MISSED: 1.2 × plain WebSocket (0.5 to 3); ≤ 1.15"), "{words}");
}

#[test]
fn a_skipped_budget_does_not_fail_the_run() {
    let mut skipped = row("storm", Vec::new());
    skipped.outcome = Outcome::Skipped("no redis-server".into());
    let results = results(vec![skipped]);
    assert_eq!(results.verdict(), Verdict::AsExpected);
    assert!(results.document().to_string().contains("skipped: no redis-server"));
}

#[test]
fn an_interrupted_run_is_reported_as_interrupted() {
    let wave = (json!({ "waves": [{ "per_second": 12_000.0 }] }), Value::Null);
    let mut results = results(vec![row("storm", vec![wave])]);
    assert_eq!(results.verdict(), Verdict::AsExpected);
    results.interrupted = Some("SIGTERM".into());
    assert_eq!(results.verdict(), Verdict::Interrupted("ended early by SIGTERM".into()));
}

#[test]
fn an_interrupted_budget_has_no_number() {
    let workshop =
        Workshop { tidegate: None, scratch: "/nowhere".into(), server_cpu: None, client_cpu: None };
    let over = Stop::install(std::time::Duration::ZERO).unwrap();
    let of = Budget { node: None, ..*budget("handshakes") };
    let error = measure(&of, 5, &workshop, &over).unwrap_err();
    assert_eq!(error.to_string(), "ended after 0 of 5 rounds");
}

#[test]
fn every_rate_beside_the_relay_has_a_row() {
    let leg = |ratio: f64| {
        json!({ "cpu_ratio": ratio, "cpu_ratio_range": [0.9, ratio], "p50_ratio": 1.4,
        "p50_ratio_range": [1.3, 1.5] })
    };
    let rates: Vec<Value> =
        (0..5).map(|rate| json!({ "legs": [{}, leg(1.18 + 0.01 * f64::from(rate))] })).collect();
    let report = json!({ "rates": rates });
    for protocol in ["", "centrifuge-"] {
        let of = |number: &str| {
            let row = row(&format!("relay-{protocol}{number}"), vec![(report.clone(), Value::Null)]);
            (row.median.map(|median| (median * 100.0).round()), row.outcome)
        };
        assert_eq!(of("2000"), (Some(118.0), Outcome::Met));
        assert_eq!(of("5000"), (Some(119.0), Outcome::Met));
        assert_eq!(of("10000"), (Some(120.0), Outcome::Met));
        assert_eq!(of("20000"), (Some(121.0), Outcome::Missed));
        assert_eq!(of("30000"), (Some(122.0), Outcome::Missed));
        assert_eq!(of("p50"), (Some(140.0), Outcome::Met));
    }
    // The places in the report count on these rates.
    for run in [budget("relay-2000").run, budget("relay-centrifuge-2000").run] {
        assert!(run.contains("--rates=2000,5000,10000,20000,30000 "), "{run}");
    }
}

#[test]
fn budgets_of_one_run_share_it() {
    let shared = |one: &str, other: &str| budget(one).is_measured_with(budget(other));
    assert!(shared("rooms", "rooms-bytes") && shared("stalled-p99", "stalled-bytes"));
    assert!(shared("relay-2000", "relay-p50") && !shared("relay-2000", "relay-centrifuge-2000"));
    assert!(shared("resume-cpu-one", "resume-live-each") && shared("repair", "repair-p99"));
    assert!(shared("history-1", "history-script") && !shared("history-1", "repair"));
    assert!(!shared("idle-bytes", "idle-bytes-tls") && !shared("fanout-1000", "p99"));
}

#[test]
fn results_are_written_with_the_commands_to_repeat_them() {
    let wave = |rate: f64| (json!({ "waves": [{ "per_second": rate }] }), Value::Null);
    let slow = row("stalled-p99", vec![(json!({ "p99_ratio": 1.0 }), Value::Null)]);
    let text = results(vec![row("storm", vec![wave(12_345.6)]), slow]).markdown();
    for words in [
        "| storm | New connections, HS256 verified, per second on one core | ≥ 10000 | 12346 | 12346 to 12346 | met | 0% |",
        "```sh\ntidegate-loadtest storm --client-cpu=1 $node --connections=15000",
        "the node with `--set='limits.outbound=256KiB'",
        "```sh\npreamble\n```",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn numbers_have_a_sensible_number_of_digits() {
    let all = [1.15, 1.0, 0.4567, 12.6, 2048.0, 250_000.0].map(written);
    assert_eq!(all, ["1.15", "1", "0.457", "13", "2048", "250k"]);
}

//! The scenarios of the budgets: small numbers, exact counts, and verdicts that match their reports.

#![expect(clippy::unwrap_used, reason = "a test panics where it fails")]

mod support;

use std::{fs, path::PathBuf};

use serde_json::{Value, json};
use tidegate_tests::{
    node::{Builder, binary},
    token::SECRET,
};

use self::support::{Broadcast, assert_counts, faithful, file, report, tester};

#[test]
fn handshakes_succeed_and_are_charged_to_the_loop() {
    let flags = ["handshakes", "--connections=40", "--waves=3", "--at-once=8", "--processes=2", "--quiet"];
    let (output, report) = report("handshakes", &flags);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let waves = report["waves"].as_array().unwrap();
    assert_eq!(waves.len(), 3);
    for wave in waves {
        assert_eq!((&wave["standing"], &wave["refused"]), (&json!(40), &json!({})));
        assert!(wave["server_cpu_us"].is_number(), "{wave}");
    }
}

#[test]
fn a_bare_loop_holds_idle_connections() {
    for tls in [false, true] {
        let (connections, interval) = ("--connections=20,60", "--interval=200ms");
        let mut flags = vec!["heartbeats", connections, interval, "--window=500ms", "--quiet"];
        flags.extend(tls.then_some("--tls"));
        let (output, report) = report(&format!("heartbeats-{tls}"), &flags);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let levels = report["levels"].as_array().unwrap();
        let held: Vec<_> = levels.iter().map(|level| (&level["connections"], &level["lost"])).collect();
        assert_eq!(held, [(&json!(0), &json!(0)), (&json!(20), &json!(0)), (&json!(60), &json!(0))]);
        assert!(levels.iter().all(|level| level["cpu_per_second"].is_number()), "{report}");
    }
}

#[test]
fn a_start_ends_when_the_server_is_ready() {
    let program = binary().unwrap();
    let address = format!("127.0.0.1:{}", free_port());
    let ready = format!("--ready=http://{address}/readyz");
    let ops = format!("--ops-listen={address}");
    let command = ["--", program.to_str().unwrap(), "--public-listen=127.0.0.1:0", &ops];
    let (output, report) =
        report_before("start", &["start", &ready, "--rounds=3", "--expect-ready=1h"], &command);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let rounds: Vec<f64> =
        report["rounds"].as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).collect();
    assert_eq!(rounds.len(), 3);
    let (low, high) = (report["range_ms"][0].as_f64().unwrap(), report["range_ms"][1].as_f64().unwrap());
    assert!(rounds.iter().all(|round| (low..=high).contains(round) && *round > 0.0), "{report}");

    let output = tester(&["start", &ready, "--", "/bin/false"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("/bin/false ended with exit status: 1 before it was ready"), "{words}");
}

#[tokio::test]
async fn compressed_messages_have_fewer_bytes_and_the_same_content() {
    let node = Builder::new()
        .set("compression.enabled", "true")
        .set("limits.commands", "off")
        .set("limits.bytes", "off")
        .start()
        .await
        .unwrap();
    let url = format!("--url=ws://{}/rooms/load:x", node.public);
    let secret = format!("--hs256-secret={SECRET}");
    let flags = ["cost", &url, &secret, "--payload=json", "--size=1024", "--members=10", "--messages=30"];
    let flags = [&flags[..], &["--rounds=2", "--warmup=0", "--expect-lost=0"]].concat();
    let received = |report: &Value| {
        report["rounds"]
            .as_array()
            .unwrap()
            .iter()
            .map(|round| round["wire_bytes"].as_u64().unwrap())
            .sum::<u64>()
    };

    let (output, plain) = report("cost-json", &flags);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_counts(&plain, &[("expected", 600), ("delivered", 600)]);
    assert_eq!(received(&plain), 600 * (1024 + 4), "a header of four bytes, and the message as it is");

    let (output, deflated) = report("cost-deflate", &[&flags[..], &["--deflate"]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_counts(&deflated, &[("expected", 600), ("delivered", 600)]);
    assert!(received(&deflated) < received(&plain), "{deflated}");

    let fanout = ["fanout", &url, &secret, "--payload=json", "--deflate", "--members=10", "--messages=40"];
    let (output, fanout) =
        report("fanout-deflate", &[&fanout[..], &["--rate=400", "--expect-lost=0"]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_counts(&fanout, &[("published", 40), ("expected", 400), ("delivered", 400)]);
}

#[test]
fn a_server_that_does_not_compress_fails_the_run() {
    let server = Broadcast::start(faithful);
    let url = format!("--url=ws://{}/x", server.address);
    let output = tester(&["cost", &url, "--deflate", "--members=1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("it does not agree to permessage-deflate"), "{words}");

    let output = tester(&["cost", &url, "--payload=json", "--size=100", "--members=1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("at least 256 bytes"), "{words}");
}

#[tokio::test]
async fn bytes_held_for_stalled_clients_are_within_their_bound() {
    let node = Builder::new()
        .set("limits.commands", "off")
        .set("limits.bytes", "off")
        .set("limits.outbound", "64KiB")
        .set(r#"rooms."load:*".overflow"#, "drop_oldest")
        .start()
        .await
        .unwrap();
    let url = format!("--url=ws://{}/rooms/load:x", node.public);
    let (secret, metrics) =
        (format!("--hs256-secret={SECRET}"), format!("--metrics=http://{}/metrics", node.ops));
    let flags =
        ["slow", &url, &secret, &metrics, "--members=5", "--stalled=2", "--duration=2s", "--rate=200"];
    let (output, slow) = report("held", &[&flags[..], &["--size=16384"]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let held = &slow["held"];
    assert_eq!(held["clients"], 2);
    let (queued, each) = (held["queued"].as_f64().unwrap(), held["each"].as_f64().unwrap());
    // All members together may hold bytes at the time of a sample, but each of them never more than its
    // bound.
    assert!(queued <= 65536.0 * 7.0 / 2.0 && each >= queued, "{held}");

    let wrong = [&flags[..], &["--metric=nothing_of_the_kind"]].concat();
    let output = tester(&wrong).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("no metric nothing_of_the_kind"));
}

#[test]
fn budgets_are_measured_and_judged() {
    let program: PathBuf = binary().unwrap();
    let (tidegate, results) = (format!("--tidegate={}", program.display()), file("BUDGETS.md"));
    let results_flag = format!("--results={}", results.display());
    let flags = ["budgets", &tidegate, "--only=start,size,handshakes", "--rounds=1", &results_flag];
    let (output, report) = report("budgets", &flags);
    let rows = report["budgets"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["start", "size", "handshakes"]);
    // The speed of this machine varies; the test checks that the numbers are present and judged.
    assert!(rows.iter().all(|row| row["median"].as_f64().is_some_and(|number| number > 0.0)), "{report}");
    let missed = rows.iter().filter(|row| row["outcome"] == "missed").count();
    let met = rows.iter().filter(|row| row["outcome"] == "met").count();
    assert_eq!(missed + met, 3, "{report}");
    assert_eq!(output.status.code(), Some(i32::from(missed > 0)), "{output:?}");
    let text = fs::read_to_string(results).unwrap();
    for words in ["| size |", "tidegate-loadtest start --rounds=1 --ready=", "tidegate-loadtest storm $node"]
    {
        assert!(text.contains(words), "{words}: {text}");
    }

    let output = tester(&["budgets", "--only=nothing"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("fanout-1000"), "they are named");
    let output = tester(&["budgets", "--tidegate=/nowhere/tidegate"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// [`report`] for a command line that ends with a command of its own.
fn report_before(name: &str, arguments: &[&str], command: &[&str]) -> (std::process::Output, Value) {
    let json = file(&format!("{name}.json"));
    let flag = format!("--json={}", json.display());
    let output = tester(&[arguments, &[&flag], command].concat()).output().unwrap();
    let report = fs::read(&json).unwrap_or_else(|error| panic!("no report ({error}): {output:?}"));
    (output, serde_json::from_slice(&report).unwrap())
}

//! The limit through Redis: the bare relay, alone and beside a real node, in small numbers with exact counts.

mod support;

use std::process::Command;

use serde_json::Value;
use tidegate_tests::node;

use self::support::{assert_counts, report};

/// Six rooms of two members at two rates. A round has 20 and 40 messages, the warm-up 40: every side sends
/// 40 + 2 × (20 + 40) messages to two members each.
const SMALL: [&str; 6] =
    ["--rooms=6", "--members=2", "--rates=200,400", "--duration=100ms", "--rounds=2", "--warmup=100ms"];
const EACH: u64 = 2 * (40 + 2 * (20 + 40));

fn run(name: &str, scenario: &[&str]) -> Value {
    let (output, report) = report(name, &[scenario, &SMALL, &["--expect-lost=0"]].concat());
    assert_eq!(output.status.code(), Some(0), "{name}: {output:?}");
    report
}

fn number(report: &Value, place: &str) -> f64 {
    report.pointer(place).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {place}: {report}"))
}

/// The payload of a message and a frame's header.
const PLAIN: f64 = 256.0 + 4.0;

#[test]
fn the_relay_delivers_everything_once() {
    let alone = run("relay", &["relay"]);
    assert_counts(&alone, &[("expected", EACH), ("delivered", EACH)]);
    for place in ["/rates/0/legs/0/median", "/rates/1/legs/0/median"] {
        // An idle side may receive a ping in a round.
        assert!(number(&alone, &format!("{place}/wire_bytes")) - PLAIN < 1.0, "{alone}");
        assert!(number(&alone, &format!("{place}/answer_bytes")) < 1.0, "publishers do not listen: {alone}");
        assert!(number(&alone, &format!("{place}/p50_us")) > 0.0, "{alone}");
        assert!(number(&alone, &format!("{place}/switches")) > 0.0, "{alone}");
    }
    // The bytes of a protocol, and its answers.
    let other = run("relay-envelope", &["relay", "--envelope=100", "--answer=30"]);
    assert_counts(&other, &[("expected", EACH), ("delivered", EACH)]);
    assert!((number(&other, "/rates/1/legs/0/median/wire_bytes") - PLAIN - 100.0).abs() < 1.0, "{other}");
    assert!((number(&other, "/rates/1/legs/0/median/answer_bytes") - 32.0).abs() < 1.0, "{other}");
    // Publishers that listen receive what members do.
    let echo = run("relay-echo", &["relay", "--echo"]);
    assert_counts(&echo, &[("expected", EACH), ("delivered", EACH)]);
    assert!((number(&echo, "/rates/0/legs/0/median/answer_bytes") - PLAIN).abs() < 1.0, "{echo}");
}

#[test]
fn system_calls_are_counted() {
    // The kernel must let this user trace; a container may not.
    let trace = ["stat", "-e", "raw_syscalls:sys_enter", "true"];
    if !Command::new("perf").args(trace).output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: perf is not installed, or may not trace");
        return;
    }
    let counted = run("relay-syscalls", &["relay", "--syscalls"]);
    // One more round at each rate.
    let all = EACH + 2 * (20 + 40);
    assert_counts(&counted, &[("expected", all), ("delivered", all)]);
    for rate in ["/rates/0", "/rates/1"] {
        // A message is read, published, received and sent to two members: at least five, and not many more.
        let calls = number(&counted, &format!("{rate}/legs/0/syscalls"));
        assert!((4.0..12.0).contains(&calls), "{calls} system calls per message: {counted}");
    }
}

#[test]
fn a_gateway_and_the_relay_send_as_many_bytes() {
    let program = node::binary().unwrap().display().to_string();
    let once = format!("--tidegate={program}");
    // The same program twice stands for an old and a new one.
    let twice = format!("{once},{program}");
    for (name, gateways, flags) in [
        ("plain", 1, &["--protocol=plain", &once][..]),
        ("centrifuge", 1, &["--protocol=centrifuge", &once]),
        ("plain-echo", 2, &["--echo", &twice]),
    ] {
        let compared = run(&format!("relay-{name}"), &[&["compare-relay"], flags].concat());
        let all = (1 + gateways) * EACH;
        assert_counts(&compared, &[("expected", all), ("delivered", all)]);
        for rate in ["/rates/0", "/rates/1"] {
            let legs = compared.pointer(&format!("{rate}/legs")).and_then(Value::as_array).unwrap();
            assert_eq!(u64::try_from(legs.len()), Ok(1 + gateways), "{compared}");
            let (relay, gateways) = legs.split_first().unwrap();
            for gateway in gateways {
                for bytes in ["/median/wire_bytes", "/median/answer_bytes"] {
                    let apart = number(gateway, bytes) - number(relay, bytes);
                    assert!(apart.abs() < 4.0, "{name}: {bytes} are {apart} apart: {compared}");
                }
                assert!(number(gateway, "/p50_ratio") > 0.0, "{compared}");
            }
            let added = number(relay, "/median/wire_bytes") - PLAIN;
            assert_eq!(name == "centrifuge", added > 50.0, "{name} adds {added} bytes: {compared}");
        }
    }
}

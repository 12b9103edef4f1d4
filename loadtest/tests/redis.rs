//! Throughput between Redis and clients: real nodes on a real Redis, small numbers, exact counts.

#![expect(clippy::unwrap_used, reason = "a test panics where it fails")]

mod support;

use serde_json::Value;
use tidegate_tests::{
    node::{self, Builder, Node},
    redis_server::RedisServer,
    token::SECRET,
};

use self::support::{assert_counts, report, tester};

/// A node with its own Redis, and the flags to reach both.
async fn node() -> (RedisServer, Node, Vec<String>) {
    let redis = RedisServer::start().await.unwrap();
    let node = Builder::new().set("broker.url", &redis.url()).start().await.unwrap();
    let flags = vec![
        format!("--url=ws://{}/connection/websocket", node.public),
        "--protocol=centrifuge".to_owned(),
        format!("--hs256-secret={SECRET}"),
        format!("--server-pid={}", node.pid().unwrap().as_raw_nonzero()),
        "--expect-lost=0".to_owned(),
    ];
    (redis, node, flags)
}

fn run(name: &str, scenario: &[&str], flags: &[String]) -> Value {
    let flags: Vec<&str> = scenario.iter().copied().chain(flags.iter().map(String::as_str)).collect();
    let (output, report) = report(name, &flags);
    assert_eq!(output.status.code(), Some(0), "{name}: {output:?}");
    report
}

#[tokio::test]
async fn everything_published_to_redis_is_delivered_once() {
    let (redis, node, mut flags) = node().await;
    flags.push(format!("--redis={}", redis.url()));
    let pace = ["--messages=3000", "--window=700", "--rounds=2", "--warmup=500"];
    let scenario = [&["intake", "--rooms=30", "--rooms-per-client=5", "--burst=2"], &pace[..]].concat();
    let many = run("redis-intake", &scenario, &flags);
    assert_counts(&many, &[("expected", 6500), ("delivered", 6500)]);
    assert_eq!((&many["bare_missing"], many["server"].as_array().unwrap().len()), (&Value::from(0), 2));
    assert!(many["ratio"].as_f64().unwrap() > 0.0 && many["median"]["redis_cpu"].is_number(), "{many}");

    // A plain client is in one room; more are an error.
    let plain = format!("--url=ws://{}/rooms/load:{{room}}", node.public);
    let own = [plain, "--protocol=plain".to_owned()];
    let scenario = [&["intake", "--rooms=8", "--subscribers=3"], &pace[..]].concat();
    let one = run("redis-intake-plain", &scenario, &[&flags[..], &own].concat());
    assert_counts(&one, &[("expected", 6500), ("delivered", 6500)]);
    let output = tester(&["intake", "--rooms=8", "--rooms-per-client=2"]).args(&flags).args(&own).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("--protocol centrifuge"), "{words}");
}

#[tokio::test]
async fn everything_that_clients_publish_reaches_redis_once() {
    let (redis, _node, mut flags) = node().await;
    flags.push(format!("--redis={}", redis.unix_url()));
    let pace = ["--messages=3000", "--window=700", "--rounds=2", "--warmup=500"];
    let scenario = [&["publish", "--sessions=10", "--rooms=4", "--burst=3"], &pace[..]].concat();
    let report = run("redis-publish", &scenario, &flags);
    assert_counts(&report, &[("expected", 6500), ("delivered", 6500)]);
    assert_eq!((&report["bare_missing"], report["bare"].as_array().unwrap().len()), (&Value::from(0), 2));
    assert!(report["median"]["server_per_second"].as_f64().unwrap() > 0.0, "{report}");
}

#[tokio::test]
async fn publications_to_another_topic_are_missing() {
    let (redis, _node, mut flags) = node().await;
    // Clients publish to `load:…`, but the subscriber listens to `other:…`.
    flags.extend([format!("--redis={}", redis.url()), "--topic=room:other:{room}".to_owned()]);
    let pace = ["--messages=50", "--window=50", "--rounds=1", "--warmup=0", "--patience=300ms"];
    let scenario = [&["publish", "--sessions=5", "--rooms=5"], &pace[..]].concat();
    let all: Vec<&str> = scenario.iter().copied().chain(flags.iter().map(String::as_str)).collect();
    let (output, report) = report("redis-astray", &all);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_counts(&report, &[("expected", 50), ("missing", 50)]);
    assert!(report["ratio"].is_null(), "{report}");
}

#[tokio::test]
async fn small_rooms_are_compared_with_big_ones() {
    let (redis, _node, mut flags) = node().await;
    flags.push(format!("--publish={}", redis.url()));
    let scenario = ["compare-rooms", "--connections=10", "--rooms-per-client=4", "--rounds=2"];
    let report = run("redis-rooms", &[&scenario[..], &["--messages=7", "--burst=3"]].concat(), &flags);
    // Two measured rounds of each shape, and one warm-up round.
    assert_counts(&report, &[("expected", 10 * 7 * 6), ("delivered", 10 * 7 * 6)]);
    assert_eq!(report["small"][1]["delivered"], 70, "{report}");
    assert!(report["memory"]["in_small"]["rss"].as_u64().unwrap() > 0, "{report}");
    let scenario = ["rooms", "--rooms=6", "--members=5", "--rooms-per-client=3", "--quiet"];
    flags.extend(["--messages=40", "--rate=400", "--processes=2"].map(str::to_owned));
    let rooms = run("redis-rooms-each", &scenario, &flags);
    assert_counts(&rooms, &[("published", 40), ("expected", 200), ("delivered", 200)]);
}

#[test]
fn topics_return_after_a_restart_and_rooms_that_are_back_miss_nothing() {
    let program = format!("--tidegate={}", node::binary().unwrap().display());
    let scenario = ["resubscribe", "--connections=10", "--rooms-per-client=20", "--rounds=2", "--rate=200"];
    let flags =
        [program, "--expect-lost=0".to_owned(), "--peace=300ms".to_owned(), "--outage=50ms".to_owned()];
    let report = run("redis-resubscribe", &scenario, &flags);
    assert_eq!((&report["topics"], report["restarts"].as_array().unwrap().len()), (&Value::from(200), 2));
    let counts = &report["counts"];
    // One message to every room after each restart, and those published before the outages.
    assert!(counts["expected"].as_u64().unwrap() > 2 * 200, "{report}");
    assert_eq!(counts["expected"], counts["delivered"], "{report}");
    let median = &report["median"];
    assert!(median["clients_back"].as_f64() > Some(0.0) && median["bare"].as_f64() > Some(0.0), "{report}");
}

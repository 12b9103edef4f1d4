//! The tester against real nodes on a real Redis: every protocol, every way to publish, and no losses.

mod support;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use tidegate_tests::{node::Builder, redis_server::RedisServer, token::SECRET};

use self::support::{assert_counts, file, report};

/// Runs `scenario` with a few messages and checks that all deliveries arrived.
fn complete(name: &str, scenario: &[&str], listeners: u64) {
    let secret = format!("--hs256-secret={SECRET}");
    let pace = [&secret, "--messages=40", "--rate=400", "--expect-lost=0", "--quiet"];
    let (output, report) = report(name, &[scenario, &pace].concat());
    assert_eq!(output.status.code(), Some(0), "{name}: {output:?}");
    let delivered = 40 * listeners;
    assert_counts(&report, &[("published", 40), ("expected", delivered), ("delivered", delivered)]);
}

#[tokio::test]
async fn every_protocol_and_every_way_to_publish_loses_nothing() {
    let redis = RedisServer::start().await.unwrap();
    let node = Builder::new().set("broker.url", &redis.url()).start().await.unwrap();
    let plain = format!("--url=ws://{}/rooms/load:{{room}}", node.public);
    let events = format!("--url=http://{}/rooms/load:{{room}}", node.public);
    let centrifuge = format!("--url=ws://{}/connection/websocket", node.public);
    let into_redis = format!("--publish={}", redis.url());
    let socket = format!("--publish={}", redis.unix_url());
    let by_http = format!("--publish=http://{}/rooms/load:{{room}}", node.public);
    complete("node-plain", &["fanout", &plain, "--members=20"], 20);
    complete("node-http", &["rooms", &plain, "--rooms=4", "--members=5", "--publish=http"], 5);
    complete("node-redis", &["rooms", &plain, "--rooms=4", "--members=5", &into_redis], 5);
    complete("node-sse", &["rooms", &events, "--protocol=sse", "--rooms=4", "--members=5", &socket], 5);
    complete("node-sse-http", &["fanout", &events, "--protocol=sse", "--members=20"], 20);
    let rooms = ["rooms", &centrifuge, "--protocol=centrifuge", "--rooms=4", "--members=5", "--processes=2"];
    complete("node-centrifuge", &rooms, 5);
    complete("node-centrifuge-http", &[&rooms[..], &[&by_http]].concat(), 5);
    complete("node-chat", &["chat", &centrifuge, "--protocol=centrifuge", "--rooms=2", "--members=10"], 10);
}

#[tokio::test]
async fn tls_needs_a_trusted_certificate_or_insecure() {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (certificate, key) = (file("node.pem"), file("node.key"));
    std::fs::write(&certificate, cert.pem()).unwrap();
    std::fs::write(&key, signing_key.serialize_pem()).unwrap();
    let node = Builder::new()
        .set("tls.cert", certificate.to_str().unwrap())
        .set("tls.key", key.to_str().unwrap())
        .launch()
        .await
        .unwrap();
    let url = format!("--url=wss://localhost:{}/rooms/load:x", node.public.port());
    let events = format!("--url=https://localhost:{}/rooms/load:x", node.public.port());
    let ca = format!("--ca={}", certificate.display());
    complete("tls-plain", &["fanout", &url, &ca, "--members=10"], 10);
    complete("tls-sse", &["fanout", &events, "--protocol=sse", "--insecure", "--members=10"], 10);
    let stranger = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let other = file("other.pem");
    std::fs::write(&other, stranger.cert.pem()).unwrap();
    let output =
        support::tester(&["fanout", &url, &format!("--ca={}", other.display()), "--members=10"]).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("did not become ready: the server's certificate is signed"), "{words}");
}

#[tokio::test]
async fn mixed_and_stalled_clients_cost_other_clients_no_message() {
    let node = Builder::new().start().await.unwrap();
    let url = format!("--url=ws://{}/rooms/load:{{room}}", node.public);
    let secret = format!("--hs256-secret={SECRET}");
    let flags = ["slow", &url, &secret, "--members=10", "--stalled=2", "--duration=1s", "--rate=100"];
    let (output, slow) = report("node-slow", &[&flags[..], &["--expect-lost=0"]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_counts(&slow, &[("published", 100), ("expected", 1000), ("delivered", 1000)]);
    let deliveries: u64 = (0..2).map(|phase| slow["phases"][phase]["deliveries"].as_u64().unwrap()).sum();
    assert_eq!(deliveries, 1000);

    let groups = [
        "--group=name=big members=10 rate=20",
        "--group=name=chat rooms=2 members=5 publishers=members rate=40",
        "--group=name=visited members=5 rate=40 visitors=4 churn=20",
    ];
    let flags = ["mixed", &url, &secret, "--duration=1s", "--expect-lost=0", "--processes=2"];
    let (output, mixed) = report("node-mixed", &[&flags[..], &groups].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let counts = &mixed["counts"];
    assert_eq!((&counts["delivered"], &counts["missing"]), (&serde_json::json!(600), &serde_json::json!(0)));
    // Four connected at first, and reconnected some twenty times in a second; the last of them may be in
    // progress.
    assert!(counts["visits"].as_u64().unwrap() > 4, "{counts}");
}

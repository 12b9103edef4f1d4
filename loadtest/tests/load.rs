//! Runs at a steady rate, and connections, against servers with known faults.

mod support;

use std::{
    io::Write,
    net::{Ipv4Addr, TcpListener},
    process::{Command, Stdio},
    sync::mpsc::sync_channel,
    thread,
    time::Duration,
};

use rustix::process::Signal;
use serde_json::{Value, json};

use self::support::{Broadcast, SWITCH, assert_counts, end, faithful, file, read_head, report, tester};

/// Thirty messages to six members, at a high rate.
const SHORT: [&str; 8] = ["--members", "6", "--messages", "30", "--rate", "300", "--patience", "500ms"];

fn url(server: &Broadcast) -> String {
    format!("--url=ws://{}/rooms/x?secret=hush", server.address)
}

#[test]
fn a_faithful_server_loses_nothing() {
    let server = Broadcast::start(faithful);
    let (url, html) = (url(&server), file("faithful.html"));
    let html_flag = format!("--html={}", html.display());
    let pid = format!("--server-pid={}", std::process::id());
    let more = [&url, &html_flag, &pid, "--expect-lost=0", "--expect-max=1h", "--processes=3", "--burst=3"];
    let (output, report) = report("load-faithful", &[&["fanout"], &SHORT[..], &more].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_counts(&report, &[("published", 30), ("expected", 180), ("delivered", 180)]);
    assert_eq!(report["processes"], 3);
    assert!(report["latency"]["p9999"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["server"]["rss_after"].as_u64().unwrap() > 0, "{report}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("met: --expect-lost 0: 0 missing of 180"), "{text}");
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.contains("<svg") && page.contains("0 missing of 180"), "{page}");
    for told in [&text, &report.to_string(), &page] {
        assert!(!told.contains("hush"), "a secret of the URL was told: {told}");
    }
}

#[test]
fn every_fault_is_counted_exactly_and_reported() {
    // Client 0 never gets message 5, client 1 gets 7 twice, clients 2 and 3 get 8 and 9 in the wrong order, and
    // client 4 gets 11 with a digit of its time changed, which is one missing and one foreign.
    let server = Broadcast::start(|client, message, published| match (client, message) {
        (0, 5) | (2 | 3, 8) => vec![],
        (1, 7) => vec![published[7].clone(), published[7].clone()],
        (2 | 3, 9) => vec![published[9].clone(), published[8].clone()],
        (4, 11) => {
            let mut altered = published[11].clone();
            altered[50] = if altered[50] == b'0' { b'1' } else { b'0' };
            vec![altered]
        }
        _ => vec![published[message].clone()],
    });
    let more = [&url(&server), "--expect-lost=0", "--expect-p99=1h", "--processes=2"];
    let (output, report) = report("load-faulty", &[&["fanout"], &SHORT[..], &more].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_counts(
        &report,
        &[
            ("published", 30),
            ("expected", 180),
            ("delivered", 178),
            ("missing", 2),
            ("duplicated", 1),
            ("out_of_order", 2),
            ("foreign", 1),
        ],
    );
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(
        words.contains("--expect-lost 0: 2 missing of 180, 1 duplicated, 2 out of order, 1 foreign"),
        "{words}"
    );
    assert!(!words.contains("--expect-p99"), "only what was not met is named: {words}");
}

#[test]
fn a_missed_latency_alone_fails_the_run() {
    let server = Broadcast::start(faithful);
    let more = [&url(&server), "--expect-lost=0", "--expect-p50=0us", "--expect-p99=1h"];
    let output = tester(&[&["fanout"], &SHORT[..], &more].concat()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("--expect-p50 0ns: ") && !words.contains("--expect-lost"), "{words}");
}

#[test]
fn a_raw_server_may_add_any_envelope() {
    let server = Broadcast::start(|_, message, published| {
        let text: String = serde_json::from_slice(&published[message]).unwrap();
        vec![json!({ "from": "somebody", "text": text }).to_string().into_bytes()]
    });
    let url = url(&server);
    let raw = [&url, "--protocol=raw", "--expect-lost=0"];
    let (output, raw) = report("load-raw", &[&["fanout"], &SHORT[..], &raw].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_counts(&raw, &[("published", 30), ("expected", 180), ("delivered", 180)]);
    let (_, plain) = report("load-not-raw", &[&["fanout"], &SHORT[..], &[&url[..]]].concat());
    assert_counts(&plain, &[("published", 30), ("expected", 180), ("missing", 180), ("foreign", 180)]);
}

#[test]
fn all_members_publish_in_a_chat() {
    let server = Broadcast::start(faithful);
    let more = [&url(&server), "--expect-lost=0", "--processes=2"];
    let (output, report) = report("load-chat", &[&["chat"], &SHORT[..], &more].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_counts(&report, &[("published", 30), ("expected", 180), ("delivered", 180)]);
}

#[test]
fn a_pause_of_the_server_delays_every_due_message() {
    // A hundred messages in a second, and a pause of 600 ms: those that were due in its first 100 ms, a tenth
    // of all, arrive at least 500 ms late. A slow machine makes that more, never less.
    let server = Broadcast::start(|client, message, published| {
        if (client, message) == (0, 10) {
            let (_open, never) = sync_channel::<()>(0);
            let _silence = never.recv_timeout(Duration::from_millis(600));
        }
        vec![published[message].clone()]
    });
    let flags = ["fanout", &url(&server), "--members=6", "--rate=100", "--duration=1s", "--expect-lost=0"];
    let (output, report) = report("load-pause", &flags);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let latency = |name: &str| report["latency"][name].as_f64().unwrap();
    assert!(latency("p90") > 400_000.0 && latency("max") > 550_000.0, "{}", report["latency"]);
    assert!(latency("p50") > 30_000.0, "{}", report["latency"]);
}

#[test]
fn messages_that_a_broken_publisher_could_not_send_are_not_expected() {
    // The publisher, client 6, is disconnected after ten messages.
    let server = Broadcast::start(|client, message, published| match (client, message) {
        (6, 9) => vec![b"goodbye".to_vec()],
        _ => vec![published[message].clone()],
    });
    let (output, report) =
        report("load-broken", &[&["fanout"], &SHORT[..], &[&url(&server), "--expect-lost=0"]].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let count = |name: &str| report["counts"][name].as_u64().unwrap();
    // Messages written before the disconnect was noticed are published and lost; the rest could not be sent.
    assert_eq!((count("delivered"), count("published") + count("unsent")), (60, 30), "{}", report["counts"]);
    assert_eq!(count("missing"), (count("published") - 10) * 6, "{}", report["counts"]);
    assert!(count("unsent") > 0, "{}", report["counts"]);
}

#[test]
fn incomplete_work_fails_a_run_without_expectations() {
    // The publisher, client 6, is disconnected after ten messages.
    let server = Broadcast::start(|client, message, published| match (client, message) {
        (6, 9) => vec![b"goodbye".to_vec()],
        _ => vec![published[message].clone()],
    });
    let (output, report) = report("load-undone", &[&["fanout"], &SHORT[..], &[&url(&server)]].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(report["interrupted"].is_null(), "{report}");
    let words = String::from_utf8(output.stderr).unwrap();
    for part in ["all due messages are published: ", " of 30 could not be sent", "clients stay connected: "] {
        assert!(words.contains(part), "{part}: {words}");
    }
}

#[test]
fn a_signal_ends_a_run_with_its_own_code_and_the_report_so_far() {
    for (signal, name) in [(Signal::INT, "SIGINT"), (Signal::TERM, "SIGTERM"), (Signal::HUP, "SIGHUP")] {
        let server = Broadcast::start(faithful);
        let json = file(&format!("interrupted-{name}.json"));
        let flags = ["--members=6", "--rate=200", "--duration=1h", "--expect-lost=0", "--expect-p99=1h"];
        // The test's parent may ignore a signal, as `nohup` does, and children inherit that.
        let child = Command::new("env")
            .arg("--default-signal")
            .arg(env!("CARGO_BIN_EXE_tidegate-loadtest"))
            .args([&["fanout", &url(&server)], &flags[..]].concat())
            .arg(format!("--json={}", json.display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        (0..20).for_each(|_| server.sent.recv().unwrap());
        let output = end(child, signal);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
        let published = report["counts"]["published"].as_u64().unwrap();
        assert!(published >= 20, "{report}");
        assert_counts(
            &report,
            &[("published", published), ("expected", published * 6), ("delivered", published * 6)],
        );
        let why = report["interrupted"].as_str().unwrap();
        assert!(why.starts_with(&format!("{name} after ")) && why.ends_with(" of 3600.0 s"), "{why}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(&format!("warning: ended early by {name}")), "{text}");
        assert_eq!(text.matches("\nNOT MET: --expect-").count(), 2, "what was not done is not met: {text}");
    }
}

#[test]
fn the_time_limit_ends_a_run_early() {
    let server = Broadcast::start(faithful);
    let flags = ["--members=6", "--rate=50", "--duration=1h", "--time-limit=1s", "--expect-lost=0"];
    let (output, report) = report("load-limit", &[&["fanout", &url(&server)], &flags[..]].concat());
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(report["interrupted"].as_str().unwrap().starts_with("--time-limit 1s after "), "{report}");
}

#[test]
fn a_run_that_ends_while_connecting_has_a_report() {
    for (scenario, flags, why) in [
        ("fanout", &["--members=6"][..], "SIGTERM while connecting; 0 of 7 clients were ready"),
        ("storm", &["--connections=6"], "SIGTERM in wave 1 of 3"),
        ("cost", &["--members=6"], "SIGTERM: ended while opening members; 0 of 6 are ready"),
    ] {
        // A server that accepts connections and never answers.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let url = format!("--url=ws://{}/rooms/x", listener.local_addr().unwrap());
        let (json, html) = (file(&format!("connecting-{scenario}.json")), file(&format!("{scenario}.html")));
        let child = tester(&[&[scenario, &url], flags].concat())
            .arg(format!("--json={}", json.display()))
            .arg(format!("--html={}", html.display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let _open = listener.accept().unwrap();
        let output = end(child, Signal::TERM);
        assert_eq!(output.status.code(), Some(3), "{scenario}: {output:?}");
        let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
        assert_eq!(report["interrupted"].as_str(), Some(why), "{report}");
        let (text, page) =
            (String::from_utf8(output.stdout).unwrap(), std::fs::read_to_string(html).unwrap());
        for told in [&text, &page] {
            assert!(told.contains(&format!("ended early by {why}")), "{told}");
            assert!(!told.contains("NaN") && !told.contains(">0 µs") && !told.contains(" 0 µs"), "{told}");
        }
    }
}

#[test]
fn a_storm_without_ready_connections_has_no_latency_and_shows_no_password() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, heads) = sync_channel(100);
    thread::spawn(move || {
        while let Ok((mut socket, _)) = listener.accept() {
            let head = read_head(&mut socket);
            let refusal = "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n";
            socket.write_all(refusal.as_bytes()).unwrap();
            tell.send(head).unwrap();
        }
    });
    let url = format!("--url=WS://me:hunter2%21@{address}/rooms/x{{room}}?a=b");
    let html = file("nobody.html");
    let html_flag = format!("--html={}", html.display());
    let flags = ["storm", &url, "--connections=4", "--waves=1", "--expect-connect-p99=1s", &html_flag];
    let (output, report) = report("storm-nobody", &flags);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(report["waves"][0]["latency"].is_null(), "{report}");
    let head = heads.recv().unwrap();
    assert!(head.starts_with("GET /rooms/x0?a=b HTTP/1.1\r\n"), "{head}");
    assert!(head.contains(&format!("\r\nHost: {address}\r\n")), "{head}");
    // "me:hunter2!" in base64.
    assert!(head.contains("\r\nAuthorization: Basic bWU6aHVudGVyMiE=\r\n"), "{head}");
    let text = String::from_utf8(output.stdout).unwrap();
    let (words, page) = (String::from_utf8(output.stderr).unwrap(), std::fs::read_to_string(html).unwrap());
    assert!(words.contains("connections become ready: none did in wave 1"), "{words}");
    assert!(words.contains("--expect-connect-p99 1s: no connection became ready"), "{words}");
    for told in [&text, &words, &page, &report.to_string()] {
        assert!(!told.contains("hunter2") && !told.contains("bWU6") && !told.contains("NaN"), "{told}");
        assert!(!told.contains(" 0 µs"), "{told}");
    }
}

#[test]
fn no_error_repeats_a_password() {
    for (flag, url) in [
        ("--url", "gopher://me:hunter2@127.0.0.1/"),
        ("--url", "ws://me:hunter2@127.0.0.1/#part"),
        ("--publish", "gopher://me:hunter2@127.0.0.1/"),
        ("--publish", "redis://me:hunter2@127.0.0.1:x/"),
        ("--member", "ws://me:hunter2@127.0.0.1/"),
        ("--members", "ws://me:hunter2@127.0.0.1/"),
    ] {
        let output = tester(&["fanout", &format!("{flag}={url}")]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let words = String::from_utf8(output.stderr).unwrap();
        assert!(!words.is_empty() && !words.contains("hunter2"), "{words}");
    }
}

#[test]
fn an_unwritable_report_fails_before_the_run() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("--url=ws://{}/rooms/x", listener.local_addr().unwrap());
    let (json, html) = (file("kept.json"), file("absent").join("page.html"));
    std::fs::write(&json, "what was there").unwrap();
    let output = tester(&["fanout", &url])
        .arg(format!("--json={}", json.display()))
        .arg(format!("--html={}", html.display()))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("--html: cannot write ") && words.contains("page.html"), "{words}");
    assert!(listener.accept().is_err(), "the tester must not connect");
    assert_eq!(std::fs::read_to_string(&json).unwrap(), "what was there");
}

#[test]
fn a_file_replaces_flags_and_reports_all_its_errors_at_once() {
    let server = Broadcast::start(faithful);
    let good = file("good.toml");
    let text = format!(
        "url = \"ws://{}/x\"\nmembers = 6\nmessages = 30\nrate = 5\nexpect-lost = 0\nquiet = true\n",
        server.address
    );
    std::fs::write(&good, text).unwrap();
    let flag = format!("--config={}", good.display());
    let (output, report) = report("load-file", &["fanout", "--rate=300", &flag]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_counts(&report, &[("published", 30), ("expected", 180), ("delivered", 180)]);

    let bad = file("bad.toml");
    std::fs::write(&bad, "membres = 6\nrate = \"fast\"\nduration = 1979-05-27\n").unwrap();
    let output = tester(&["fanout", &format!("--config={}", bad.display())]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    for key in ["membres: no such key", "rate: ", "duration: "] {
        assert!(words.contains(key), "{key}: {words}");
    }
}

#[test]
fn a_storm_counts_refusals_by_reason() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("--url=ws://{}/rooms/x", listener.local_addr().unwrap());
    thread::spawn(move || {
        let mut held = Vec::new();
        for number in 0.. {
            let Ok((mut socket, _)) = listener.accept() else { return };
            read_head(&mut socket);
            let refusal = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
            socket.write_all(if number % 5 == 0 { refusal } else { SWITCH }.as_bytes()).unwrap();
            held.push(socket);
        }
    });
    let flags =
        ["storm", &url, "--connections=20", "--waves=2", "--hold=0s", "--expect-refused=0", "--processes=2"];
    let (output, report) = report("storm", &flags);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let waves = report["waves"].as_array().unwrap();
    assert_eq!(waves.len(), 2);
    for wave in waves {
        assert_eq!((&wave["standing"], &wave["refused"]), (&json!(16), &json!({ "status 503": 4 })));
        assert!(wave["latency"]["p99"].as_f64().unwrap() > 0.0);
    }
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(words.contains("--expect-refused 0: 8 connections did not become ready"), "{words}");
}

#[test]
fn idle_connections_have_a_slope() {
    let server = Broadcast::start(faithful);
    let pid = format!("--server-pid={}", std::process::id());
    let (output, report) =
        report("idle", &["idle", &url(&server), "--connections=5,15", &pid, "--window=0s", "--processes=2"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!((&report["slope"]["from"], &report["slope"]["to"]), (&json!(5), &json!(15)));
    assert_eq!(report["levels"].as_array().unwrap().len(), 3);
}

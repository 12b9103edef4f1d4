//! Rounds: the tester as a process against a broadcast server with injected faults.
//!
//! The faults are known exactly, and the report must list exactly those.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test panics where it fails")]

mod support;

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Output},
    sync::mpsc,
    thread,
};

use serde_json::Value;

use self::support::{SWITCH, read_frame, read_head};

/// The server's fault for message number `n` (from 0) and member number `m` (from 0, in order of arrival):
/// the numbers of the messages that it sends instead.
type Misbehaviour = fn(member: usize, message: usize) -> Vec<usize>;

fn faithful(_: usize, message: usize) -> Vec<usize> {
    vec![message]
}

/// Serves `members` members and then one publisher. Ends with the publisher.
fn server(members: usize, misbehave: Misbehaviour) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut sockets: Vec<TcpStream> = (0..members).map(|_| upgrade(&listener)).collect();
        // The tester publishes once every member has answered a ping.
        for socket in &mut sockets {
            socket.write_all(&[0x89, 1, b'?']).unwrap();
        }
        let mut publisher = upgrade(&listener);
        for socket in &mut sockets {
            assert_eq!(read_frame(socket), Some((0xA, b"?".to_vec())));
        }
        let mut frames: Vec<Vec<u8>> = Vec::new();
        while let Some((0x1, payload)) = read_frame(&mut publisher) {
            let mut frame = vec![0x81, 126];
            frame.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
            frame.extend_from_slice(&payload);
            frames.push(frame);
            for (member, socket) in sockets.iter_mut().enumerate() {
                for message in misbehave(member, frames.len() - 1) {
                    // Sent in two pieces, so that a frame does not always arrive whole.
                    let (front, back) = frames[message].split_at(3 + member % 200);
                    let _gone = socket.write_all(front).and_then(|()| socket.write_all(back));
                }
            }
        }
    });
    address
}

fn upgrade(listener: &TcpListener) -> TcpStream {
    let (mut socket, _) = listener.accept().unwrap();
    assert!(read_head(&mut socket).contains("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="));
    socket.write_all(SWITCH.as_bytes()).unwrap();
    socket
}

fn tester(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidegate-loadtest")).args(arguments).output().unwrap()
}

/// Runs `cost` with ten members and 30 messages and reads its report.
fn fanout(address: SocketAddr, name: &str, more: &[&str]) -> (Output, Value) {
    let url = format!("ws://{address}/rooms/x?token=hush");
    let json = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.json"));
    let json = json.to_str().unwrap();
    let output = tester(
        &[
            &[
                "cost",
                "--url",
                &url,
                "--members",
                "10",
                "--messages",
                "10",
                "--rounds",
                "2",
                "--warmup",
                "10",
            ],
            &["--patience", "1", "--json", json][..],
            more,
        ]
        .concat(),
    );
    let report = std::fs::read(json).unwrap_or_else(|error| panic!("no report ({error}): {output:?}"));
    (output, serde_json::from_slice(&report).unwrap())
}

fn count(report: &Value, name: &str) -> u64 {
    report["counts"][name].as_u64().unwrap()
}

#[test]
fn a_faithful_server_loses_nothing() {
    let pid = std::process::id().to_string();
    let address = server(10, faithful);
    let (output, report) =
        fanout(address, "faithful", &["--expect-lost", "0", "--server-pid", &pid, "--burst", "4"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for (name, expected) in [
        ("expected", 300),
        ("delivered", 300),
        ("missing", 0),
        ("duplicated", 0),
        ("out_of_order", 0),
        ("foreign", 0),
    ] {
        assert_eq!(count(&report, name), expected, "{name}: {report}");
    }
    assert_eq!(report["rounds"].as_array().unwrap().len(), 2);
    assert!(report["median"]["server_cpu"].is_number(), "{report}");
    assert!(report["rounds"][0]["latency"]["p50"].as_f64().unwrap() > 0.0, "{report}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("delivered 300 of 300"), "{text}");
    assert!(!text.contains("hush") && !report.to_string().contains("hush"), "a token was printed");
}

#[test]
fn every_fault_is_counted_exactly() {
    // Of 30 messages: member 0 never gets number 5, member 1 gets 7 twice, members 2 and 3 get 8 and 9 in
    // the wrong order.
    let address = server(10, |member, message| match (member, message) {
        (0, 5) | (2 | 3, 8) => vec![],
        (1, 7) => vec![7, 7],
        (2 | 3, 9) => vec![9, 8],
        _ => vec![message],
    });
    let (output, report) = fanout(address, "faulty", &["--expect-lost", "0", "--burst", "10"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    for (name, expected) in [
        ("expected", 300),
        ("delivered", 299),
        ("missing", 1),
        ("duplicated", 1),
        ("out_of_order", 2),
        ("foreign", 0),
    ] {
        assert_eq!(count(&report, name), expected, "{name}: {report}");
    }
}

#[test]
fn a_refused_upgrade_fails_the_run() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (ended, end) = mpsc::sync_channel(1);
    thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        socket.write_all(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n").unwrap();
        end.recv().unwrap();
    });
    let output = tester(&["cost", "--url", &format!("ws://{address}/rooms/x"), "--members", "1"]);
    ended.send(()).unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let words = String::from_utf8(output.stderr).unwrap();
    assert!(
        words.contains("member 1 of 1 did not become ready: the connection was refused with status 429"),
        "{words}"
    );
}

#[test]
fn the_limit_and_a_server_are_measured_in_one_run() {
    let pid = std::process::id().to_string();
    let url = format!("ws://{}/rooms/x", server(20, faithful));
    let html = Path::new(env!("CARGO_TARGET_TMPDIR")).join("compare-limit.html");
    let output = tester(&[
        "compare-limit",
        "--html",
        html.to_str().unwrap(),
        "--url",
        &url,
        "--members",
        "20",
        "--messages",
        "200",
        "--rounds",
        "3",
        "--server-pid",
        &pid,
        "--expect-lost",
        "0",
    ]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        text.matches("delivered 12400 of 12400, missing 0, duplicated 0, out of order 0").count(),
        2,
        "{text}"
    );
    assert!(text.contains("× the bare loop"), "{text}");
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.matches("<svg").count() == 3 && page.contains("× the bare loop"), "{page}");
}

#[test]
fn a_paced_round_is_compared_by_its_p99() {
    let pid = std::process::id().to_string();
    let url = format!("ws://{}/rooms/x", server(5, faithful));
    let output = tester(&[
        "compare-limit",
        "--url",
        &url,
        "--members",
        "5",
        "--messages",
        "20",
        "--rounds",
        "2",
        "--rate",
        "400",
        "--server-pid",
        &pid,
        "--expect-p99-ratio",
        "0",
    ]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("p99: ") && text.contains("× the bare loop at the same pace"), "{text}");
    assert!(
        String::from_utf8(output.stderr).unwrap().contains("--expect-p99-ratio"),
        "the expectation is named"
    );
}

//! Test servers with injected faults.

#![allow(dead_code, reason = "each test binary uses only a part of it")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test panics where it fails")]

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Output},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, sync_channel},
    },
    thread,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

pub const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                          Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// The server's fault for message number `n` (from 0) and client number `c`: the payloads that it sends
/// instead, made from all that have been published. After a `goodbye` that client is disconnected.
pub type Misbehaviour = fn(client: usize, message: usize, published: &[Vec<u8>]) -> Vec<Vec<u8>>;

pub fn faithful(_: usize, message: usize, published: &[Vec<u8>]) -> Vec<Vec<u8>> {
    vec![published[message].clone()]
}

/// A server that broadcasts every message to all clients. It identifies clients by their addresses: they
/// connect from 127.0.0.2 and up in the order of their numbers.
pub struct Broadcast {
    pub address: SocketAddr,
    /// A signal for every message that has been broadcast.
    pub sent: Receiver<()>,
}

impl Broadcast {
    pub fn start(misbehave: Misbehaviour) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, sent) = sync_channel(100_000);
        let clients: Arc<Mutex<Vec<(usize, TcpStream)>>> = Arc::default();
        let published: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        thread::spawn(move || {
            while let Ok((mut socket, peer)) = listener.accept() {
                let (clients, published, tell) = (Arc::clone(&clients), Arc::clone(&published), tell.clone());
                thread::spawn(move || {
                    read_head(&mut socket);
                    // A client that has been answered receives everything from then on.
                    let mut all = clients.lock().unwrap();
                    socket.write_all(SWITCH.as_bytes()).unwrap();
                    all.push((number(peer), socket.try_clone().unwrap()));
                    drop(all);
                    let mut dismissed = false;
                    while let Some((0x1, payload)) = read_frame(&mut socket).filter(|_| !dismissed) {
                        let mut published = published.lock().unwrap();
                        published.push(payload);
                        for (client, socket) in clients.lock().unwrap().iter_mut() {
                            for payload in misbehave(*client, published.len() - 1, &published) {
                                if payload == b"goodbye" {
                                    // What the client has already sent stays unread.
                                    dismissed |= *client == number(peer);
                                    let _gone = socket.shutdown(Shutdown::Both);
                                }
                                let _gone = socket.write_all(&frame(&payload));
                            }
                        }
                        let _nobody_asks = tell.try_send(());
                    }
                });
            }
        });
        Self { address, sent }
    }
}

fn number(peer: SocketAddr) -> usize {
    let IpAddr::V4(address) = peer.ip() else { panic!("{peer}") };
    usize::from(address.octets()[3]) - 2
}

/// A server's text frame of 126 bytes to 64 KiB.
pub fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x81, 126];
    frame.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// Reads a request's head.
pub fn read_head(socket: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        head.extend_from_slice(&byte);
    }
    String::from_utf8(head).unwrap()
}

/// Reads a masked frame of up to 64 KiB: opcode and payload. `None` at the end of the stream.
pub fn read_frame(socket: &mut TcpStream) -> Option<(u8, Vec<u8>)> {
    let mut header = [0; 2];
    socket.read_exact(&mut header).ok()?;
    assert_eq!(header[1] & 0x80, 0x80, "a client masks");
    let mut length = usize::from(header[1] & 0x7F);
    if length == 126 {
        let mut long = [0; 2];
        socket.read_exact(&mut long).ok()?;
        length = usize::from(u16::from_be_bytes(long));
    }
    let (mut mask, mut payload) = ([0; 4], vec![0; length]);
    socket.read_exact(&mut mask).ok()?;
    socket.read_exact(&mut payload).ok()?;
    payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
    Some((header[0] & 0xF, payload))
}

/// The tester, not yet started.
pub fn tester(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate-loadtest"));
    // A node started by the tester would read it as a setting.
    command.args(arguments).env_remove("TIDEGATE_BIN");
    command
}

/// Sends `signal` to `child` and waits for its exit.
pub fn end(child: Child, signal: Signal) -> Output {
    kill_process(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), signal).unwrap();
    child.wait_with_output().unwrap()
}

/// The path of a test's file.
pub fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Runs the tester and reads its report.
pub fn report(name: &str, arguments: &[&str]) -> (Output, Value) {
    let json = file(&format!("{name}.json"));
    let _absent = std::fs::remove_file(&json);
    let output = tester(arguments).arg("--json").arg(&json).output().unwrap();
    let report = std::fs::read(&json).unwrap_or_else(|error| panic!("no report ({error}): {output:?}"));
    (output, serde_json::from_slice(&report).unwrap())
}

/// Asserts that the counts of `report` are these, and that all others are 0.
pub fn assert_counts(report: &Value, expected: &[(&str, u64)]) {
    for (name, found) in report["counts"].as_object().unwrap() {
        let expected = expected.iter().find(|(own, _)| own == name).map_or(0, |pair| pair.1);
        assert_eq!(found.as_u64(), Some(expected), "{name}: {}", report["counts"]);
    }
}

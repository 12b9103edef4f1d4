//! Receiving a message allocates nothing, in any protocol.
//!
//! A tester that allocates measures its allocator. The count covers the whole path, from the socket to the
//! accounting. The rest of a frame that arrives in two pieces is kept in memory that the member already has.

use std::{
    io::Write,
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::Command,
    time::Duration,
};

use flate2::{Compress, Compression, FlushCompress};

use crate::{
    books::Books,
    dialect::Seat,
    payload::Payload,
    plan::{Group, Plan, Publishers, tests::group},
    stamp::Stamp,
    swarm::Swarm,
    target::Protocol,
    websocket::{Opcode, write_unmasked},
};

#[global_allocator]
static HEAP: dhat::Alloc = dhat::Alloc;

const MEMBERS: u32 = 8;
/// Messages before the count starts, and while it runs.
const EARLIER: u64 = 10;
const COUNTED: u64 = 50;

const SWITCH: &str =
    "HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n";
const AGREED: &str = "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover\r\n";

#[test]
fn receiving_allocates_nothing() {
    // All tests of a process share one heap, so the count runs in its own process, and on its only thread:
    // the harness allocates too.
    let mut command = Command::new(std::env::current_exe().unwrap());
    let flags = ["--ignored", "--exact", "allocations::counted", "--nocapture", "--test-threads=1"];
    let output = command.args(flags).output().unwrap();
    let words = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && words.contains("1 passed"), "{output:?}");
}

#[test]
#[ignore = "run by receiving_allocates_nothing, in a process of its own"]
fn counted() {
    let framed = [Protocol::Plain, Protocol::Raw, Protocol::Centrifuge, Protocol::SocketIo, Protocol::Json];
    for protocol in framed.into_iter().chain([Protocol::Sse]) {
        for payload in [Payload::Dots, Payload::Json] {
            for deflate in [false, true] {
                if protocol != Protocol::Sse || !deflate {
                    Stage::new(protocol, payload, deflate).count();
                }
            }
        }
    }
}

/// Members, and the server's ends of their connections.
struct Stage {
    group: Group,
    swarm: Swarm,
    books: Books,
    sockets: Vec<TcpStream>,
    delivered: u64,
}

impl Stage {
    fn new(protocol: Protocol, payload: Payload, deflate: bool) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let scheme = if protocol == Protocol::Sse { "http" } else { "ws" };
        let mut group = Group { size: 400, payload, first_room: 0, ..group(1, MEMBERS, Publishers::One) };
        group.target.url = format!("{scheme}://{}/x", listener.local_addr().unwrap());
        (group.target.protocol, group.target.deflate) = (protocol, deflate);
        let entrance = group.target.resolve(1).unwrap().entrance;
        let groups = vec![group.clone()];
        let plan = Plan {
            run: 1,
            groups,
            part: 0,
            parts: 1,
            ramp: 0,
            at_once: 1,
            tolerant: false,
            client_cpu: None,
        };
        let mut books = Books::new(&plan, &[entrance.dialect]).unwrap();
        let (mut swarm, mut sockets) = (Swarm::new().unwrap(), Vec::new());
        for user in 0..MEMBERS {
            swarm
                .open(&entrance, Seat { user, room: 0, rooms: 1, stays: false, since: None, listens: true })
                .unwrap();
            let (mut socket, _) = listener.accept().unwrap();
            socket.set_nodelay(true).unwrap();
            socket.write_all(&welcome(protocol, deflate)).unwrap();
            sockets.push(socket);
            while swarm.opening() > 0 {
                swarm.drain(Duration::from_secs(1), |event| books.note(event)).unwrap();
            }
        }
        Self { group, swarm, books, sockets, delivered: 0 }
    }

    fn count(mut self) {
        let messages: Vec<Vec<u8>> = (0..EARLIER + COUNTED).map(|sequence| self.message(sequence)).collect();
        let (earlier, counted) = messages.split_at(usize::try_from(EARLIER).unwrap());
        // Buffers for partial frames reach their size here: the first piece is almost the whole frame, later
        // half of it.
        self.broadcast(earlier, |length| length - 1);
        let profiler = dhat::Profiler::builder().testing().build();
        self.broadcast(counted, |length| length / 2);
        let allocated = dhat::HeapStats::get().total_blocks;
        drop(profiler);
        let Group { target, payload, .. } = &self.group;
        let what = format!("{:?} of {payload:?}, deflate: {}", target.protocol, target.deflate);
        assert_eq!(allocated, 0, "allocations for {COUNTED} messages to {MEMBERS} members: {what}");
    }

    /// Sends `messages` to all members, every other one in two pieces, and lets each member receive each of
    /// them.
    fn broadcast(&mut self, messages: &[Vec<u8>], first_piece: fn(usize) -> usize) {
        for (number, message) in messages.iter().enumerate() {
            let cut = if number % 2 == 0 { message.len() } else { first_piece(message.len()) };
            let (front, back) = message.split_at(cut);
            for piece in [front, back].into_iter().filter(|piece| !piece.is_empty()) {
                let awaited = self.swarm.received(usize::MAX) + (piece.len() * self.sockets.len()) as u64;
                self.sockets.iter_mut().for_each(|socket| socket.write_all(piece).unwrap());
                while self.swarm.received(usize::MAX) < awaited {
                    let Self { swarm, books, .. } = self;
                    swarm.drain(Duration::from_secs(1), |event| books.note(event)).unwrap();
                }
            }
            self.delivered += u64::from(MEMBERS);
            let tally = self.books.tally(0).unwrap();
            assert_eq!((tally.delivered, tally.foreign, tally.duplicated), (self.delivered, 0, 0));
        }
    }

    /// Message `sequence` as the server sends it.
    fn message(&self, sequence: u64) -> Vec<u8> {
        let mut payload = Vec::new();
        Stamp { run: 1, room: 0, publisher: 0, sequence, sent: 1 }.write(&mut payload, self.group.shape());
        let (before, after) = match self.group.target.protocol {
            Protocol::Plain | Protocol::Raw | Protocol::Bare => ("", ""),
            Protocol::Sse => ("data: ", "\n\n"),
            Protocol::Centrifuge => (r#"{"push":{"channel":"load:0","pub":{"data":"#, "}}}"),
            Protocol::SocketIo => (r#"42["m","#, "]"),
            Protocol::Json => (r#"{"room":"load:0","id":"17-42","data":"#, "}"),
        };
        let text = [before.as_bytes(), &payload, after.as_bytes()].concat();
        if self.group.target.protocol == Protocol::Sse {
            return text;
        }
        frame(&text, self.group.target.deflate)
    }
}

/// What a server sends until a client of `protocol` is ready.
fn welcome(protocol: Protocol, deflate: bool) -> Vec<u8> {
    let words: &[&str] = match protocol {
        Protocol::Plain | Protocol::Raw | Protocol::Bare | Protocol::Json => &[],
        Protocol::Sse => return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n".to_vec(),
        Protocol::Centrifuge => &["{\"id\":1,\"connect\":{}}\n{\"id\":2,\"subscribe\":{}}"],
        Protocol::SocketIo => &["0{}", "40{}", "430[]"],
    };
    let extension = if deflate { AGREED } else { "" };
    let frames = words.iter().flat_map(|words| frame(words.as_bytes(), false));
    format!("{SWITCH}{extension}\r\n").into_bytes().into_iter().chain(frames).collect()
}

/// A server's text frame.
fn frame(text: &[u8], deflate: bool) -> Vec<u8> {
    let mut frame = Vec::new();
    if !deflate {
        write_unmasked(&mut frame, Opcode::Text, &[text]);
        return frame;
    }
    let mut out = Vec::with_capacity(text.len() + 1024);
    Compress::new(Compression::new(6), false).compress_vec(text, &mut out, FlushCompress::Sync).unwrap();
    out.truncate(out.len() - 4);
    write_unmasked(&mut frame, Opcode::Text, &[&out]);
    frame[0] |= 0x40;
    frame
}

//! Counts the allocations on the path of a message: none per delivery, and a fixed number per publication.
//!
//! A real node with the memory broker serves real sockets. The clients are std sockets on the test's own
//! thread, which allocate nothing while they are measured. So the count covers the whole process, with all
//! threads of the node: `cargo test -p tidegate --test allocations -- --nocapture` prints the numbers.
//!
//! The measured work always costs the same. Other work that happens to fall into a window (a heartbeat, the
//! periodic check of key files) can only add to it. So the minimum of a few windows counts, and it must be
//! exact: fewer allocations than stated fail as well.
//!
//! There is a single test, because there is a single heap. `DHAT_PROFILE=<file>` writes a profile that shows
//! where allocations came from: it has the stacks of the last window (open it with DHAT's viewer, or read the
//! JSON).

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::indexing_slicing,
    reason = "tests and their helpers fail with a panic; the counts are printed"
)]

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, SystemTime},
};

use rustix::process::{Resource, getrlimit, setrlimit};
use tidegate::{
    auth::{Grant, Subject, mint},
    config::{Config, Sources},
    node::Node,
};

#[global_allocator]
static HEAP: dhat::Alloc = dhat::Alloc;

/// A publication by a plain member: the stored message of the client (1), its shared form (1), the broadcast
/// (1), its frame (1), and the frame's shared form (1).
const PER_PLAIN_PUBLICATION: u64 = 5;
/// The same, plus the parsed channel (1), its room (1), the push's text (1) and the reply (1).
const PER_CENTRIFUGE_PUBLICATION: u64 = 9;
/// A room that is not served in one turn keeps its pending work in a box (1) with a list (1).
const PER_LARGE_ROOM: u64 = 2;
/// A Centrifuge client's pong: the message while it is handled.
const PER_MESSAGE: u64 = 1;
/// A client's ping: the bytes of the answer.
const PER_PING: u64 = 1;

const FEW: usize = 100;
/// Numbers of members, and the additional allocations of a publication to so many.
const SIZES: [(usize, u64); 3] = [(FEW, 0), (600, PER_LARGE_ROOM), (1200, PER_LARGE_ROOM)];
/// How often one window repeats the measured work.
const ROUNDS: u64 = 5;
/// Maximum number of windows, some of which may be disturbed.
const WINDOWS: usize = 20;
const SECRET: &str = "correct horse battery staple, and more";
const PATIENCE: Duration = Duration::from_secs(60);
const BUFFER: usize = 4096;
/// A plain member's heartbeat: an empty ping.
const HEARTBEAT: &[u8] = b"\x89\x00";
/// The mask of every client frame. Masking serves no purpose on loopback, so it is constant.
const MASK: [u8; 4] = [1, 2, 3, 4];

#[test]
fn a_delivery_allocates_nothing_and_a_publication_a_fixed_number() {
    allow_descriptors();
    let stage = Stage::start("59m");

    let (frame, heard) = (masked(0x81, b"{\"n\":1}"), &b"\x81\x07{\"n\":1}"[..]);
    for (members, more) in SIZES {
        let mut clients = stage.plain(members, members);
        let what = format!("a publication to {members} plain members");
        assert_allocates(PER_PLAIN_PUBLICATION + more, &what, || {
            clients[0].send(&frame);
            hear_all(&mut clients, heard);
        });

        let ping = masked(0x89, b"");
        assert_allocates(PER_PING, "a client's ping", || {
            clients[0].send(&ping);
            clients[0].expect(b"\x8a\x00");
        });
    }

    let mut buffer = [0; BUFFER];
    for (members, more) in SIZES {
        let mut clients = stage.centrifuge(members, &format!("c{members}"));
        let publish = masked(
            0x81,
            format!(r#"{{"id":7,"publish":{{"channel":"c{members}","data":{{"n":1}}}}}}"#).as_bytes(),
        );
        let what = format!("a publication to {members} Centrifuge members");
        assert_allocates(PER_CENTRIFUGE_PUBLICATION + more, &what, || {
            clients[0].send(&publish);
            assert!(clients[0].hear(&mut buffer).starts_with(br#"{"id":7,"publish":{}}"#));
            for client in &mut clients {
                assert!(client.hear(&mut buffer).starts_with(br#"{"push":{"channel":"c"#));
            }
        });

        // Messages that need no answer. The answer to the ping shows that they have been read.
        let both = [masked(0x81, b"{}").repeat(10), masked(0x89, b"")].concat();
        assert_allocates(10 * PER_MESSAGE + PER_PING, "ten messages of a client and a ping", || {
            clients[0].send(&both);
            assert!(clients[0].hear(&mut buffer).is_empty());
        });
    }
    drop(stage);

    let stage = Stage::start("100ms");
    let mut clients = stage.plain(FEW, 0);
    assert_allocates(0, &format!("a heartbeat to each of {FEW}"), || {
        hear_all(&mut clients, HEARTBEAT);
    });
}

/// A node in this process.
struct Stage {
    runtime: tokio::runtime::Runtime,
    node: Option<Node>,
    address: SocketAddr,
    token: String,
}

impl Stage {
    fn start(heartbeat: &str) -> Self {
        let flags = [
            ("public.listen", "127.0.0.1:0"),
            ("ops.listen", "127.0.0.1:0"),
            ("shards", "1"),
            ("drain.window", "0s"),
            ("auth.hs256_secret", SECRET),
            ("limits.attempts_per_address", "off"),
            ("limits.commands", "off"),
            ("limits.user_commands", "off"),
            ("heartbeat.interval", heartbeat),
            ("heartbeat.timeout", "1h"),
        ];
        let flags = flags.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let config = Config::load(&Sources { flags, ..Sources::default() }).unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let node = runtime.block_on(async { Node::start(config) }).unwrap();
        let grants: [Grant; 1] = ["*=subscribe,publish".parse().unwrap()];
        let subject = Subject::new("alice").unwrap();
        let token = mint::mint(
            SECRET.as_bytes(),
            &subject,
            &grants,
            Duration::from_secs(3600),
            SystemTime::now().into(),
        );
        Self {
            address: node.public_address(),
            runtime,
            node: Some(node),
            token: token.unwrap().expose().to_owned(),
        }
    }

    /// Plain members of a room.
    fn plain(&self, count: usize, room: usize) -> Vec<Client> {
        let path = format!("/rooms/{room}?token={}", self.token);
        (0..count).map(|_| Client::connect(self.address, &path)).collect()
    }

    /// Centrifuge members of a room.
    fn centrifuge(&self, count: usize, room: &str) -> Vec<Client> {
        let path = format!("/connection/websocket?token={}", self.token);
        let greeting = [
            masked(0x81, br#"{"id":1,"connect":{}}"#),
            masked(0x81, format!(r#"{{"id":2,"subscribe":{{"channel":"{room}"}}}}"#).as_bytes()),
        ]
        .concat();
        let mut clients: Vec<_> = (0..count).map(|_| Client::connect(self.address, &path)).collect();
        let mut buffer = [0; BUFFER];
        for client in &mut clients {
            client.send(&greeting);
            assert!(client.hear(&mut buffer).starts_with(br#"{"connect":"#));
            assert_eq!(client.hear(&mut buffer), br#"{"id":2,"subscribe":{}}"#);
        }
        clients
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(node) = self.node.take() {
            self.runtime.block_on(node.drain());
        }
    }
}

/// A WebSocket client that allocates nothing once it is connected.
struct Client(TcpStream);

impl Client {
    fn connect(address: SocketAddr, path: &str) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        Self(stream)
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Reads exactly this short frame. Skips a heartbeat before it.
    fn expect(&mut self, expected: &[u8]) {
        let mut buffer = [0; BUFFER];
        let (head, rest) = buffer[..expected.len()].split_at_mut(HEARTBEAT.len());
        self.0.read_exact(head).unwrap();
        if head == HEARTBEAT && expected != HEARTBEAT {
            self.0.read_exact(head).unwrap();
        }
        self.0.read_exact(rest).unwrap();
        assert_eq!(&buffer[..expected.len()], expected);
    }

    /// Reads one frame and returns its payload. Skips heartbeats, which are messages in this protocol.
    fn hear<'a>(&mut self, buffer: &'a mut [u8; BUFFER]) -> &'a [u8] {
        loop {
            self.0.read_exact(&mut buffer[..2]).unwrap();
            let mut length = usize::from(buffer[1]);
            if length == 126 {
                self.0.read_exact(&mut buffer[..2]).unwrap();
                length = usize::from(u16::from_be_bytes([buffer[0], buffer[1]]));
            }
            self.0.read_exact(&mut buffer[..length]).unwrap();
            if &buffer[..length] != b"{}" {
                return &buffer[..length];
            }
        }
    }
}

fn hear_all(clients: &mut [Client], frame: &[u8]) {
    for client in clients {
        client.expect(frame);
    }
}

/// A client's frame of at most 125 bytes.
fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).ok().filter(|length| *length < 126).unwrap();
    let body = payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask);
    [first, 0x80 | length].into_iter().chain(MASK).chain(body).collect()
}

/// Asserts how many allocations one `round` causes in the whole process.
fn assert_allocates(expected: u64, what: &str, mut round: impl FnMut()) {
    // Let tables and queues grow to their size.
    for _ in 0..ROUNDS {
        round();
    }
    let mut least = u64::MAX;
    for _ in 0..WINDOWS {
        least = least.min(allocations(|| (0..ROUNDS).for_each(|_| round())));
        if least <= expected * ROUNDS {
            break;
        }
    }
    assert_eq!(least, expected * ROUNDS, "allocations for {ROUNDS} times {what}");
    println!("{expected} for {what}");
}

/// Counts allocations and reallocations of the process while `work` runs.
fn allocations(work: impl FnOnce()) -> u64 {
    let profile = std::env::var_os("DHAT_PROFILE");
    let profiler = match &profile {
        Some(file) => dhat::Profiler::builder().file_name(file).trim_backtraces(Some(24)).build(),
        None => dhat::Profiler::builder().testing().build(),
    };
    work();
    let counted = dhat::HeapStats::get().total_blocks;
    drop(profiler);
    counted
}

/// Both ends of each connection are in this process.
fn allow_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

//! How long other clients wait while a large room is being served.
//!
//! A node with one shard serves a room of `TIDEGATE_MEMBERS` members (10,000 by default), with publications
//! back to back. Meanwhile another client, on the same shard, sends pings and publishes in its own room. The test
//! prints its waiting times, first without the large room's publications, then with them.
//! A shard checks its sockets and its inbox after every slice of writes: a ping or another room's message waits
//! for slices, not for the whole room.
//!
//! The second measurement uses a room with `overflow = "drop_oldest"` and 200 members that do not read and whose queues
//! are full: each publication drops messages in all of them, 100 times a second. Neither other clients nor `/livez` may
//! be affected.
//!
//! These are measurements, so the suite ignores them and they assert no time. Clients and node are two processes on one
//! machine: with fewer than three free cores they also wait for each other.
//!
//! ```text
//! cargo build --release -p tidegate
//! TIDEGATE_BIN=target/release/tidegate \
//!     cargo test --release -p tidegate-tests --test fairness -- --ignored --nocapture
//! ```

#![allow(clippy::print_stdout, reason = "what it measures is to be seen")]

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    buffer::spare_capacity,
    event::{
        Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
    process::{Resource, getrlimit, setrlimit},
};
use tidegate_tests::{PATIENCE, http::Request, node::Builder, raw::Frame, token::anywhere};

const MEMBERS: usize = 10_000;
/// The duration of each of the two measurements.
const WINDOW: Duration = Duration::from_secs(10);
/// The prober's pause between two requests. It shares the machine with everything else.
const PAUSE: Duration = Duration::from_millis(1);
/// Publications in flight at any time: the shard has the next one before it has finished the previous one.
const IN_FLIGHT: u64 = 2;
const PAYLOAD: &str = r#"{"user":"alice","text":"The same to everybody, and to everybody at once."}"#;

#[test]
#[ignore = "a measurement, for a machine that has nothing else to do"]
fn waiting_time_of_others_beside_a_large_room() -> Result<()> {
    let members = members()?;
    allow_descriptors(members)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let node = runtime.block_on(Builder::new().set("shards", "1").set("limits.accepts", "off").start())?;
    let token = anywhere("alice");
    let mut prober = Prober::new(connect(node.public, "quiet", &token)?)?;

    let room = Room::open(node.public, &token, members)?;
    println!("{members} members, idle");
    prober.measure()?.print();
    let busy = room.begin()?;
    println!("{members} members, publications back to back");
    let waits = prober.measure()?;
    let (publications, took) = busy.end()?;
    waits.print();
    let each = took / u32::try_from(publications.max(1))?;
    println!("  {publications} publications, {each:.1?} each; {} deliveries", publications * members as u64);
    node.ensure_sound()
}

const STALLED: usize = 200;
const STALLED_PACE: Duration = Duration::from_millis(10);
/// As many as fit into a queue of the default size, plus what fits into the kernel.
const STALLED_FILL: usize = 30_000;

#[test]
#[ignore = "a measurement, for a machine that has nothing else to do"]
fn waiting_time_of_others_beside_a_room_of_stalled_members() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let node = runtime.block_on(
        Builder::new()
            .set("shards", "1")
            .set(r#"rooms."crowd".overflow"#, "drop_oldest")
            .set("heartbeat.timeout", "1h")
            .start(),
    )?;
    let token = anywhere("alice");
    let mut prober = Prober::new(connect(node.public, "quiet", &token)?)?;
    let stalled = (0..STALLED).map(|_| connect(node.public, "crowd", &token)).collect::<Result<Vec<_>>>()?;
    println!("{STALLED} members that do not read, nothing published");
    prober.measure()?.print();

    let mut publisher = connect(node.public, "crowd", &token)?;
    let echo = publisher.try_clone()?;
    let reading = std::thread::Builder::new()
        .name("echo".into())
        .spawn(move || io::copy(&mut &echo, &mut io::sink()))?;
    let message = Frame::text("8 bytes.").bytes();
    let began = Instant::now();
    for _ in 0..STALLED_FILL {
        publisher.write_all(&message)?;
    }
    let sum = |name: &str| -> Result<u64> { Ok(runtime.block_on(node.samples())?.sum(name, &[])) };
    while sum("tidegate_publications_total")? < STALLED_FILL as u64 {
        std::thread::park_timeout(STALLED_PACE);
    }
    println!("{STALLED_FILL} publications back to back, all queues are full: {:.1?}", began.elapsed());
    let before = sum("tidegate_outbound_dropped_total")?;

    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let publishing = std::thread::Builder::new().name("publisher".into()).spawn(move || {
        while !told.load(Ordering::Relaxed) {
            publisher.write_all(&message)?;
            std::thread::park_timeout(STALLED_PACE);
        }
        publisher.shutdown(std::net::Shutdown::Both)
    })?;
    println!("100 publications of 8 bytes a second");
    prober.measure()?.print();
    let dropped = sum("tidegate_outbound_dropped_total")? - before;
    let alive = runtime.block_on(node.ask_ops("/livez"))?.status;
    println!("  {dropped} dropped, /livez {alive}");
    stop.store(true, Ordering::Relaxed);
    publishing.join().expect("a thread that returns its errors")?;
    reading.join().expect("a thread that returns its errors")?;
    drop(stalled);
    node.ensure_sound()
}

fn members() -> Result<usize> {
    #[expect(clippy::disallowed_methods, reason = "a test's own setting; no node reads it")]
    let given = std::env::var("TIDEGATE_MEMBERS");
    given.map_or(Ok(MEMBERS), |count| count.parse().context("TIDEGATE_MEMBERS"))
}

/// One client that sends requests and measures the waiting time.
struct Prober(TcpStream);

/// The waiting times so far.
#[derive(Default)]
struct Waits {
    pings: Vec<Duration>,
    messages: Vec<Duration>,
}

impl Prober {
    fn new(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    fn measure(&mut self) -> Result<Waits> {
        let ping = Frame { first: 0x89, ..Frame::text("") }.bytes();
        let message = Frame::text("hello").bytes();
        let (mut waits, start) = (Waits::default(), Instant::now());
        while start.elapsed() < WINDOW {
            waits.pings.push(self.ask(&ping, b"\x8a\x00")?);
            std::thread::park_timeout(PAUSE);
            waits.messages.push(self.ask(&message, b"\x81\x05hello")?);
            std::thread::park_timeout(PAUSE);
        }
        Ok(waits)
    }

    /// Sends a frame and reads the answer, skipping heartbeats that come before it.
    fn ask(&mut self, question: &[u8], answer: &[u8]) -> Result<Duration> {
        let mut buffer = [0; 16];
        let frame = buffer.get_mut(..answer.len()).context("answers are short")?;
        let asked = Instant::now();
        self.0.write_all(question)?;
        let (head, rest) = frame.split_at_mut(2);
        self.0.read_exact(head)?;
        if head == b"\x89\x00" {
            self.0.read_exact(head)?;
        }
        self.0.read_exact(rest)?;
        let waited = asked.elapsed();
        ensure!(frame == answer, "{frame:?} in place of {answer:?}");
        Ok(waited)
    }
}

impl Waits {
    fn print(self) {
        for (what, mut waits) in [("ping", self.pings), ("message", self.messages)] {
            waits.sort_unstable();
            let at = |part: usize| waits.get((waits.len() - 1) * part / 100).copied().unwrap_or_default();
            let (count, p50, p99, max) = (waits.len(), at(50), at(99), at(100));
            println!("  {what:<8} p50 {p50:>9.1?}  p99 {p99:>9.1?}  max {max:>9.1?}  of {count}");
        }
    }
}

/// The large room: its members, and its publishers.
struct Room {
    members: Vec<TcpStream>,
    publisher: TcpStream,
    epoll: OwnedFd,
}

/// A room with publishers, on its own thread.
struct Busy {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<(u64, Duration)>>,
}

impl Room {
    fn open(address: SocketAddr, token: &str, count: usize) -> Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let open = |index| {
            let member = connect(address, "crowd", token).with_context(|| format!("member {index}"))?;
            member.set_nonblocking(true)?;
            epoll::add(&epoll, &member, EventData::new_u64(index as u64), EventFlags::IN)?;
            Ok(member)
        };
        let members = (0..count).map(open).collect::<Result<_>>()?;
        let members: Vec<TcpStream> = members;
        let publisher = members.first().context("a room without members")?.try_clone()?;
        Ok(Self { members, publisher, epoll })
    }

    fn begin(self) -> Result<Busy> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("members".into()).spawn(move || self.serve(&told))?;
        Ok(Busy { stop, thread })
    }

    /// Publishes and reads until it is stopped and everything has arrived.
    fn serve(mut self, stop: &AtomicBool) -> Result<(u64, Duration)> {
        let message = Frame::text(PAYLOAD).bytes();
        // Header and payload, for each member.
        let round = (2 + PAYLOAD.len() as u64) * self.members.len() as u64;
        let (mut buffer, mut ready) = (vec![0; 64 * 1024], Vec::with_capacity(1024));
        let (mut published, mut received, start) = (0, 0, Instant::now());
        let mut heard = start;
        loop {
            while !stop.load(Ordering::Relaxed) && received + IN_FLIGHT * round > published * round {
                self.publisher.write_all(&message)?;
                published += 1;
            }
            // Heartbeats come on top; they only make the next publication start slightly earlier.
            if received >= published * round {
                return Ok((published, start.elapsed()));
            }
            ensure!(heard.elapsed() < PATIENCE, "{received} bytes of {published} publications arrived");
            ready.clear();
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            epoll::wait(&self.epoll, spare_capacity(&mut ready), Some(&second))?;
            for event in &ready {
                let index = usize::try_from(event.data.u64())?;
                let Some(member) = self.members.get_mut(index) else { continue };
                match member.read(&mut buffer) {
                    Ok(0) => anyhow::bail!("member {index} was closed"),
                    Ok(count) => {
                        received += count as u64;
                        heard = Instant::now();
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error).with_context(|| format!("member {index}")),
                }
            }
        }
    }
}

impl Busy {
    /// How many publications were delivered to all members, and in what time.
    fn end(self) -> Result<(u64, Duration)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the members' thread returns its errors")
    }
}

/// A member of a room, over a plain WebSocket.
fn connect(address: SocketAddr, room: &str, token: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.write_all(&Request::upgrade(&format!("/rooms/{room}?token={token}")).bytes(address))?;
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    ensure!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    Ok(stream)
}

/// The node raises its own limit; its clients need the same number.
fn allow_descriptors(members: usize) -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    let allowed = limit.maximum.unwrap_or(u64::MAX);
    // The node counts its own descriptors as well.
    ensure!(members as u64 + 200 < allowed, "{members} members need more than {allowed} descriptors");
    Ok(())
}

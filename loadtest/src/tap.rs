//! A bare subscriber of Redis: the baseline for a node that receives from Redis, and the counter of what a
//! node publishes to it.
//!
//! A separate process subscribes to the topics and reads. It parses and counts every push and does nothing
//! else, unless it has to [verify](TapServer::verify) the stamps: then it accounts for every message. It
//! prints the count on standard output, every thousand publications and whenever it has read everything.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rustix::{
    buffer::spare_capacity,
    event::{
        PollFd, PollFlags, Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
        poll,
    },
    process::{Signal, set_parent_process_death_signal},
};
use socket2::Socket;

use crate::{
    cli::flow::TapServer,
    flow::Lanes,
    ledger::Counts,
    payload::Shape,
    process,
    redis::{self, Link, MAX_PUSH, Push, read_push},
    stamp::Finder,
    stop::Stop,
    target::{NUMBER, Redis},
    websocket::Leftover,
};

/// The size of one read.
const READ_SIZE: usize = 64 * 1024;

/// How many publications may be counted before the count is reported, while more are waiting.
const TELLING: u64 = 1024;

/// The number of topics in one SUBSCRIBE.
const BATCH: usize = 512;

/// How many topics may wait for their acknowledgement.
const SUBSCRIBING: usize = 16 * BATCH;

/// How long a subscriber may take to report anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running subscriber; killed when this is dropped.
#[derive(Debug)]
pub struct Tap {
    child: Child,
    orders: Option<ChildStdin>,
    answers: ChildStdout,
    heard: Vec<u8>,
    count: u64,
    /// How long it took until all topics were acknowledged.
    pub subscribing: Duration,
}

/// The task of a subscriber.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    pub redis: &'a Redis,
    /// The number of topics: `{room}` stands for a number below `rooms`.
    pub rooms: u32,
    pub connections: u32,
    /// The CPU to run on.
    pub cpu: Option<usize>,
    /// What to verify: the run, the number of its publishers in all rooms together, and the payload's size.
    pub verify: Option<(u32, u32, usize)>,
}

impl Tap {
    /// Starts it and waits until every subscription is acknowledged.
    pub fn start(wish: &Wish<'_>) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("tap-server").arg(format!("--rooms={}", wish.rooms));
        command.arg(format!("--connections={}", wish.connections));
        command.args(wish.cpu.map(|cpu| format!("--cpu={cpu}")));
        if let Some((run, lanes, size)) = wish.verify {
            command.arg(format!("--verify={run},{lanes},{size}"));
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let answers = child.stdout.take().context("standard output is piped")?;
        let mut orders = child.stdin.take().context("standard input is piped")?;
        // The URL may contain a password, which must not appear in the process list.
        writeln!(orders, "{}", serde_json::to_string(wish.redis)?)?;
        let orders = Some(orders);
        let mut tap =
            Self { child, orders, answers, heard: Vec::new(), count: 0, subscribing: Duration::ZERO };
        let line = tap.line().context("a bare subscriber of Redis did not start")?;
        tap.subscribing = Duration::from_micros(line.parse().context("the time it took to subscribe")?);
        Ok(tap)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many publications it has received, as last reported; waits up to `wait` for a report.
    pub fn count(&mut self, wait: Duration) -> anyhow::Result<u64> {
        if self.hear(wait)? {
            while let Some(line) = self.next_line() {
                self.count = line.parse().context("a bare subscriber of Redis did not report a number")?;
            }
        }
        Ok(self.count)
    }

    /// Ends it; returns how many it has received, and its accounts if it verified.
    pub fn finish(mut self) -> anyhow::Result<(u64, Counts)> {
        drop(self.orders.take());
        loop {
            let line = self.line()?;
            if let Ok(end) = serde_json::from_str(&line) {
                return Ok(end);
            }
        }
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let begun = Instant::now();
        loop {
            if let Some(line) = self.next_line() {
                return Ok(line);
            }
            ensure!(begun.elapsed() < PATIENCE, "nothing from a bare subscriber of Redis for {PATIENCE:?}");
            self.hear(Duration::from_millis(100))?;
        }
    }

    fn next_line(&mut self) -> Option<String> {
        let end = self.heard.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.heard.drain(..=end).collect();
        Some(String::from_utf8_lossy(line.trim_ascii_end()).into_owned())
    }

    /// Whether it has reported anything within `wait`.
    fn hear(&mut self, wait: Duration) -> anyhow::Result<bool> {
        let wait = Timespec::try_from(wait).context("a time-out")?;
        match poll(&mut [PollFd::new(&self.answers, PollFlags::IN)], Some(&wait)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(false),
            ready => ready?,
        };
        let mut chunk = [0; 4096];
        let received = self.answers.read(&mut chunk)?;
        ensure!(received > 0, "a bare subscriber of Redis has exited");
        self.heard.extend_from_slice(chunk.get(..received).unwrap_or_default());
        Ok(true)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _: io::Result<()> = self.child.kill();
        let _: io::Result<_> = self.child.wait();
    }
}

/// The subscriber itself.
pub fn serve(args: &TapServer) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Ctrl-C reaches the whole process group, but the tester still has to finish its last round.
    let _ignored = Stop::install(Duration::MAX)?;
    if let Some(cpu) = args.cpu {
        process::pin_to(cpu)?;
    }
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    let redis: Redis =
        serde_json::from_str(&line).context("this command is started by a scenario, not by hand")?;
    let mut reader = Reader::open(&redis, args)?;
    let begun = Instant::now();
    while reader.subscribed < args.rooms {
        ensure!(reader.turn(None)?, "ended while subscribing");
    }
    tell(begun.elapsed().as_micros())?;
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut told = 0;
    // The parent ends this process by closing its standard input, when everything has arrived.
    while reader.turn((told < reader.count).then_some(&now))? {
        if reader.count >= told + TELLING || (reader.idle && reader.count > told) {
            told = reader.count;
            tell(told)?;
        }
    }
    // Read what arrived together with the end of input.
    while reader.turn(Some(&now)).is_ok() && !reader.idle {}
    let counts = reader.books.map_or_else(Counts::default, |(_, lanes)| lanes.counts);
    tell(serde_json::to_string(&(reader.count, counts))?)
}

fn tell(words: impl std::fmt::Display) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{words}")?;
    Ok(out.flush()?)
}

struct Reader {
    epoll: OwnedFd,
    connections: Vec<Connection>,
    scratch: Vec<u8>,
    ready: Vec<epoll::Event>,
    count: u64,
    subscribed: u32,
    /// Whether the last turn found nothing.
    idle: bool,
    books: Option<(Finder, Lanes)>,
}

struct Connection {
    socket: Socket,
    leftover: Leftover,
    /// Topics still to subscribe to, and the number of acknowledgements outstanding.
    topics: VecDeque<String>,
    awaited: usize,
}

impl Reader {
    /// Marks standard input among the connections.
    const ORDERS: u64 = u64::MAX;

    fn open(redis: &Redis, args: &TapServer) -> anyhow::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, io::stdin(), EventData::new_u64(Self::ORDERS), EventFlags::IN)?;
        let mut connections = Vec::new();
        for number in 0..args.connections {
            let socket = Link::open(redis)?.into_socket();
            socket.set_nonblocking(true)?;
            epoll::add(&epoll, &socket, EventData::new_u64(u64::from(number)), EventFlags::IN)?;
            let own = (number..args.rooms).step_by(args.connections as usize);
            let topics = own.map(|room| redis.topic.replace(NUMBER, &room.to_string())).collect();
            let leftover = Leftover::default();
            let mut connection = Connection { socket, leftover, topics, awaited: 0 };
            connection.subscribe()?;
            connections.push(connection);
        }
        let books = args.verify.map(|verify| {
            let [run, lanes, size] = verify.0;
            (Finder::new(run, Shape::dots(size as usize)), Lanes::new(lanes))
        });
        Ok(Self {
            epoll,
            connections,
            scratch: vec![0; MAX_PUSH + READ_SIZE],
            ready: Vec::with_capacity(64),
            count: 0,
            subscribed: 0,
            idle: false,
            books,
        })
    }

    /// Waits and reads once from every ready connection; `false` at the end of input.
    fn turn(&mut self, timeout: Option<&Timespec>) -> anyhow::Result<bool> {
        self.ready.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.ready), timeout) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
        let Self { connections, scratch, ready, count, subscribed, idle, books, .. } = self;
        let mut ended = false;
        *idle = true;
        for event in ready.iter() {
            let number = event.data.u64();
            if number == Self::ORDERS {
                ended = true;
                continue;
            }
            *idle = false;
            let Some(connection) = usize::try_from(number).ok().and_then(|at| connections.get_mut(at)) else {
                continue;
            };
            let held = connection.leftover.restore(scratch);
            let space = scratch.get_mut(held..held + READ_SIZE).context("a push is too long")?;
            let received = match connection.socket.read(space) {
                Ok(0) => bail!("Redis closed the connection of a bare subscriber"),
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error.into()),
            };
            let mut bytes = scratch.get(..held + received).unwrap_or_default();
            while let Some((push, rest)) = read_push(bytes)? {
                bytes = rest;
                match push {
                    Push::Subscribed { .. } => {
                        *subscribed += 1;
                        connection.awaited -= 1;
                    }
                    Push::Message { payload, .. } => {
                        *count += 1;
                        if let Some((finder, lanes)) = books {
                            let stamp = finder.within(payload);
                            lanes.record(stamp.map(|stamp| (stamp.publisher, stamp.sequence)));
                        }
                    }
                }
            }
            connection.leftover.keep(bytes);
            connection.subscribe()?;
        }
        Ok(!ended)
    }
}

impl Connection {
    /// Sends as many SUBSCRIBEs as may wait for acknowledgements: few enough for any socket's buffer.
    fn subscribe(&mut self) -> anyhow::Result<()> {
        while !self.topics.is_empty() && self.awaited + BATCH <= SUBSCRIBING {
            let batch: Vec<String> = self.topics.drain(..BATCH.min(self.topics.len())).collect();
            self.awaited += batch.len();
            let words: Vec<&str> =
                std::iter::once("SUBSCRIBE").chain(batch.iter().map(String::as_str)).collect();
            let mut command = Vec::new();
            redis::write_command(&mut command, &words);
            self.socket.set_nonblocking(false)?;
            self.socket.write_all(&command)?;
            self.socket.set_nonblocking(true)?;
        }
        Ok(())
    }
}

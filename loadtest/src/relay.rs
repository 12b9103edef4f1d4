//! The bare relay: the smallest program that carries messages from `WebSocket` clients through Redis to
//! others.
//!
//! It is the physical limit that a gateway on Redis is compared with. One thread, one epoll loop, one
//! connection to Redis that publishes and one that subscribes. In a turn of the loop it reads every ready
//! connection once (up to 64 KiB), sends all publications of the turn with one system call, and sends each
//! message to each member with one system call. It parses and unmasks frames, and it answers an upgrade only
//! when Redis has acknowledged the topic, as a gateway does. It has no limits, no identities, no heartbeats
//! and no queues: a member that does not read stops it.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    ops::Range,
    os::fd::OwnedFd,
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, CreateFlags, EventData, EventFlags},
    process::{Signal, set_parent_process_death_signal},
};
use socket2::Socket;

use crate::{
    cli::relay::RelayServer,
    process,
    redis::{self, Link, Push, read_push},
    stop::Stop,
    target::Redis,
    websocket::{self, Leftover, Opcode},
};

/// The size of one read.
const READ_SIZE: usize = 64 * 1024;

/// The longest accepted frame, push or request head.
const MAX_PIECE: usize = 2 * 1024 * 1024;

/// A client with this in its query does not receive the messages of its room, as on Tidegate.
pub const DEAF: &str = "echo=false";

/// What every other client of a path under this is: a member of the room that the rest names.
const ROOMS: &str = "/rooms/";

/// A running relay; killed when this is dropped.
#[derive(Debug)]
pub struct Relay {
    child: Child,
    /// The relay ends when this is closed.
    _orders: ChildStdin,
    pub address: SocketAddr,
}

/// The task of a relay.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// Where it publishes; `{room}` in the topic stands for the rest of a client's path after `/rooms/`.
    pub redis: &'a Redis,
    pub clients: u32,
    /// The bytes that it adds in front of every message on the way to a member.
    pub envelope: usize,
    /// The payload bytes of the frame that answers every publication; 0 for no answer.
    pub answer: usize,
    /// The CPU to run on.
    pub cpu: Option<usize>,
}

impl Relay {
    /// Starts it and waits until it listens.
    pub fn start(wish: &Wish<'_>) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("relay-server").arg(format!("--clients={}", wish.clients));
        command.arg(format!("--envelope={}", wish.envelope)).arg(format!("--answer={}", wish.answer));
        command.args(wish.cpu.map(|cpu| format!("--cpu={cpu}")));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut orders = child.stdin.take().context("standard input is piped")?;
        // The URL may contain a password, which must not appear in the process list.
        writeln!(orders, "{}", serde_json::to_string(wish.redis)?)?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("standard output is piped")?).read_line(&mut line)?;
        let address = line.trim().parse().context("the relay did not start")?;
        Ok(Self { child, _orders: orders, address })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _: io::Result<()> = self.child.kill();
        let _: io::Result<_> = self.child.wait();
    }
}

/// The relay itself.
pub fn serve(args: &RelayServer) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Ctrl-C reaches the whole process group, but the tester still has to finish its last round.
    let _ignored = Stop::install(Duration::MAX)?;
    if let Some(cpu) = args.cpu {
        process::pin_to(cpu)?;
    }
    process::allow_descriptors(args.clients as usize)?;
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    let redis: Redis =
        serde_json::from_str(&line).context("this command is started by a scenario, not by hand")?;
    let mut relay = Loop::open(&redis, args)?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", relay.listener.local_addr()?)?;
    stdout.flush()?;
    while relay.turn()? {}
    Ok(())
}

struct Loop {
    epoll: OwnedFd,
    listener: TcpListener,
    publishing: Socket,
    subscribing: Socket,
    /// By number; `None` once a client has left.
    clients: Vec<Option<Client>>,
    most: usize,
    rooms: Vec<Room>,
    by_topic: HashMap<Vec<u8>, usize>,
    topic: String,
    /// The publications of this turn.
    commands: Vec<u8>,
    /// The publishers that wait for an answer, in the order of their publications.
    asking: VecDeque<usize>,
    /// Parts of what Redis has sent.
    pushes: Leftover,
    receipts: Leftover,
    /// What is added in front of a message.
    envelope: Vec<u8>,
    /// The frame that answers a publication; empty if none does.
    answer: Vec<u8>,
    frame: Vec<u8>,
    scratch: Vec<u8>,
    ready: Vec<epoll::Event>,
}

struct Client {
    socket: TcpStream,
    /// Its room, once its request has been read.
    room: Option<usize>,
    leftover: Leftover,
}

struct Room {
    /// A PUBLISH to its topic, up to the payload's length.
    publish: Vec<u8>,
    members: Vec<usize>,
    /// Clients whose upgrade is answered once Redis has acknowledged the topic; `None` from then on.
    waiting: Option<Vec<usize>>,
}

impl Loop {
    /// The numbers of the descriptors that are no clients.
    const ORDERS: u64 = u64::MAX;
    const LISTENER: u64 = u64::MAX - 1;
    const PUBLISHING: u64 = u64::MAX - 2;
    const SUBSCRIBING: u64 = u64::MAX - 3;

    fn open(redis: &Redis, args: &RelayServer) -> anyhow::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        // The sockets of Redis and of clients block: a ready one is read once, and what is written fits.
        let [publishing, subscribing] = [Link::open(redis)?, Link::open(redis)?].map(Link::into_socket);
        epoll::add(&epoll, io::stdin(), EventData::new_u64(Self::ORDERS), EventFlags::IN)?;
        epoll::add(&epoll, &listener, EventData::new_u64(Self::LISTENER), EventFlags::IN)?;
        epoll::add(&epoll, &publishing, EventData::new_u64(Self::PUBLISHING), EventFlags::IN)?;
        epoll::add(&epoll, &subscribing, EventData::new_u64(Self::SUBSCRIBING), EventFlags::IN)?;
        let mut answer = Vec::new();
        if args.answer > 0 {
            websocket::write_unmasked(&mut answer, Opcode::Text, &[&vec![b' '; args.answer]]);
        }
        Ok(Self {
            epoll,
            listener,
            publishing,
            subscribing,
            clients: Vec::new(),
            most: args.clients as usize,
            rooms: Vec::new(),
            by_topic: HashMap::new(),
            topic: redis.topic.clone(),
            commands: Vec::new(),
            asking: VecDeque::new(),
            pushes: Leftover::default(),
            receipts: Leftover::default(),
            envelope: vec![b' '; args.envelope],
            answer,
            frame: Vec::new(),
            scratch: vec![0; MAX_PIECE + READ_SIZE],
            ready: Vec::with_capacity(1024),
        })
    }

    /// Waits and reads once from every ready connection; `false` at the end of the orders.
    fn turn(&mut self) -> anyhow::Result<bool> {
        let mut ready = std::mem::take(&mut self.ready);
        ready.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut ready), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ended = false;
        for event in &ready {
            match event.data.u64() {
                Self::ORDERS => ended = true,
                Self::LISTENER => self.accept()?,
                Self::PUBLISHING => self.take_receipts()?,
                Self::SUBSCRIBING => self.take_pushes()?,
                client => self.hear(usize::try_from(client)?)?,
            }
        }
        self.ready = ready;
        if !self.commands.is_empty() {
            self.publishing.write_all(&self.commands)?;
            self.commands.clear();
        }
        Ok(!ended)
    }

    fn accept(&mut self) -> anyhow::Result<()> {
        loop {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            ensure!(self.clients.len() < self.most, "more than {} clients", self.most);
            socket.set_nodelay(true)?;
            let number = self.clients.len() as u64;
            epoll::add(&self.epoll, &socket, EventData::new_u64(number), EventFlags::IN)?;
            self.clients.push(Some(Client { socket, room: None, leftover: Leftover::default() }));
        }
    }

    /// Reads the request or the publications of a client.
    fn hear(&mut self, number: usize) -> anyhow::Result<()> {
        let Some(slot) = self.clients.get_mut(number) else { return Ok(()) };
        let Some(client) = slot else { return Ok(()) };
        let held = client.leftover.restore(&mut self.scratch);
        let space = self.scratch.get_mut(held..held + READ_SIZE).context("a frame is too long")?;
        let Some(received) = client.socket.read(space).ok().filter(|&received| received > 0) else {
            // Closing the socket removes it from the epoll set. Nobody is a member of a room twice.
            if let Some(room) = client.room.and_then(|room| self.rooms.get_mut(room)) {
                room.members.retain(|&member| member != number);
            }
            *slot = None;
            return Ok(());
        };
        let bytes = self.scratch.get_mut(..held + received).unwrap_or_default();
        let Some(room) = client.room else {
            if !bytes.ends_with(b"\r\n\r\n") {
                client.leftover.keep(bytes);
                return Ok(());
            }
            let request = String::from_utf8_lossy(bytes).into_owned();
            return self.admit(number, &request);
        };
        let room = self.rooms.get(room).context("a room has a number")?;
        let mut start = 0;
        while let Some((opcode, payload, end)) = read_masked(bytes.get_mut(start..).unwrap_or_default())? {
            let payload = bytes.get(start + payload.start..start + payload.end).unwrap_or_default();
            start += end;
            if opcode != TEXT && opcode != BINARY {
                continue;
            }
            self.commands.extend_from_slice(&room.publish);
            write!(self.commands, "${}\r\n", payload.len())?;
            self.commands.extend_from_slice(payload);
            self.commands.extend_from_slice(b"\r\n");
            if !self.answer.is_empty() {
                self.asking.push_back(number);
            }
        }
        client.leftover.keep(bytes.get(start..).unwrap_or_default());
        Ok(())
    }

    /// Puts a client into the room that its request names.
    fn admit(&mut self, number: usize, request: &str) -> anyhow::Result<()> {
        let (name, query) = asked(request).with_context(|| format!("a relay was asked {request:?}"))?;
        let topic = self.topic.replace(crate::target::NUMBER, name).into_bytes();
        let fresh = self.rooms.len();
        let room = *self.by_topic.entry(topic.clone()).or_insert(fresh);
        if room == fresh {
            let mut publish = Vec::new();
            write!(publish, "*3\r\n$7\r\nPUBLISH\r\n${}\r\n", topic.len())?;
            publish.extend_from_slice(&topic);
            publish.extend_from_slice(b"\r\n");
            self.rooms.push(Room { publish, members: Vec::new(), waiting: Some(Vec::new()) });
            let mut command = Vec::new();
            redis::write_command(&mut command, &["SUBSCRIBE", &String::from_utf8_lossy(&topic)]);
            self.subscribing.write_all(&command)?;
        }
        let place = self.rooms.get_mut(room).context("a room has a number")?;
        if query != DEAF {
            place.members.push(number);
        }
        if let Some(client) = self.clients.get_mut(number).and_then(Option::as_mut) {
            client.room = Some(room);
        }
        match &mut place.waiting {
            Some(waiting) => waiting.push(number),
            None => self.send(number, websocket::UPGRADED.as_bytes()),
        }
        Ok(())
    }

    /// Reads the receipts of publications, and answers the publishers if they are to be answered.
    fn take_receipts(&mut self) -> anyhow::Result<()> {
        let held = self.receipts.restore(&mut self.scratch);
        let space = self.scratch.get_mut(held..held + READ_SIZE).context("a receipt is too long")?;
        let received = self.publishing.read(space)?;
        ensure!(received > 0, "Redis closed the connection of a relay");
        let mut bytes = self.scratch.get(..held + received).unwrap_or_default();
        let mut receipts = 0;
        while let Some((line, rest)) = redis::line(bytes) {
            ensure!(line.starts_with(b":"), "Redis answered {:?}", String::from_utf8_lossy(line));
            bytes = rest;
            receipts += 1;
        }
        self.receipts.keep(bytes);
        if !self.answer.is_empty() {
            let answer = std::mem::take(&mut self.answer);
            for publisher in self.asking.drain(..receipts).collect::<Vec<_>>() {
                self.send(publisher, &answer);
            }
            self.answer = answer;
        }
        Ok(())
    }

    /// Sends the messages that Redis has pushed to the members of their rooms.
    fn take_pushes(&mut self) -> anyhow::Result<()> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let held = self.pushes.restore(&mut scratch);
        let space = scratch.get_mut(held..held + READ_SIZE).context("a push is too long")?;
        let received = self.subscribing.read(space)?;
        ensure!(received > 0, "Redis closed the connection of a relay");
        let mut bytes = scratch.get(..held + received).unwrap_or_default();
        while let Some((push, rest)) = read_push(bytes)? {
            bytes = rest;
            let (Push::Subscribed { topic } | Push::Message { topic, .. }) = push;
            let room = *self.by_topic.get(topic).context("a push to an unknown topic")?;
            let room = self.rooms.get_mut(room).context("a room has a number")?;
            match push {
                Push::Subscribed { .. } => {
                    for number in room.waiting.take().unwrap_or_default() {
                        self.send(number, websocket::UPGRADED.as_bytes());
                    }
                }
                Push::Message { payload, .. } => {
                    self.frame.clear();
                    websocket::write_unmasked(&mut self.frame, Opcode::Text, &[&self.envelope, payload]);
                    for &member in &room.members {
                        write(&mut self.clients, member, &self.frame);
                    }
                }
            }
        }
        self.pushes.keep(bytes);
        self.scratch = scratch;
        Ok(())
    }

    fn send(&mut self, number: usize, bytes: &[u8]) {
        write(&mut self.clients, number, bytes);
    }
}

/// Writes to a client. If that fails, the next read fails too and removes it.
fn write(clients: &mut [Option<Client>], number: usize, bytes: &[u8]) {
    if let Some(client) = clients.get_mut(number).and_then(Option::as_mut) {
        let _: io::Result<()> = client.socket.write_all(bytes);
    }
}

/// The room and the query that a request names.
fn asked(request: &str) -> Option<(&str, &str)> {
    let target = request.strip_prefix("GET ")?.split(' ').next()?;
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    Some((path.strip_prefix(ROOMS)?, query))
}

/// Opcodes (RFC 6455 §5.2).
const TEXT: u8 = 1;
const BINARY: u8 = 2;

/// Reads a client's frame at the front of `bytes` and unmasks it in place: its opcode, where its payload is,
/// and its length. `None` while it is incomplete.
fn read_masked(bytes: &mut [u8]) -> anyhow::Result<Option<(u8, Range<usize>, usize)>> {
    let (first, length, header) = match *bytes {
        [first, second, ..] if second & 0x7F < 126 => (first, usize::from(second & 0x7F), 2),
        [first, second, high, low, ..] if second & 0x7F == 126 => {
            (first, usize::from(u16::from_be_bytes([high, low])), 4)
        }
        [_, second, ..] if second & 0x7F == 127 => bail!("a relay takes frames of up to 64 KiB"),
        _ => return Ok(None),
    };
    ensure!(first & 0xF0 == 0x80, "a relay takes whole messages without extensions");
    let start = header + 4;
    let Some([a, b, c, d]) = bytes.get(header..).and_then(|rest| rest.first_chunk().copied()) else {
        return Ok(None);
    };
    let Some(payload) = bytes.get_mut(start..start + length) else { return Ok(None) };
    let mask = [a, b, c, d, a, b, c, d];
    let word = u64::from_ne_bytes(mask);
    let (blocks, rest) = payload.as_chunks_mut();
    for block in blocks {
        *block = (u64::from_ne_bytes(*block) ^ word).to_ne_bytes();
    }
    rest.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
    Ok(Some((first & 0xF, start..start + length, start + length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_frames_are_read_in_parts() {
        for size in [0, 5, 8, 125, 126, 300, 65_535] {
            let payload: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let mut wire = Vec::new();
            websocket::write_masked(&mut wire, Opcode::Text, &[&payload], 7);
            for cut in (0..wire.len().min(20)).chain([wire.len() - 1]) {
                assert_eq!(read_masked(&mut wire.clone()[..cut]).unwrap(), None, "{size}: {cut}");
            }
            wire.push(0x88);
            let (opcode, at, end) = read_masked(&mut wire).unwrap().unwrap();
            assert_eq!((opcode, &wire[at], end), (TEXT, &payload[..], wire.len() - 1));
        }
        assert!(read_masked(&mut [0x01, 0x80, 0, 0, 0, 0]).is_err(), "a fragment");
        assert!(read_masked(&mut [0x82, 0xFF, 0, 0]).is_err(), "longer than 64 KiB");
    }

    #[test]
    fn a_request_names_a_room_and_whether_its_client_listens() {
        let head = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(asked(&head("/rooms/load:7")), Some(("load:7", "")));
        assert_eq!(asked(&head("/rooms/load:7?echo=false")), Some(("load:7", DEAF)));
        assert_eq!(asked(&head("/other")), None);
        assert_eq!(asked("POST /rooms/x HTTP/1.1\r\n\r\n"), None);
    }
}

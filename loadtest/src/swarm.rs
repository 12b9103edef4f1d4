//! The members: many connections, one epoll loop, one thread.
//!
//! Owns the sockets that listen, from the connect to the last byte, and hands every whole message to the
//! caller. It does not know what a message means, and publishes nothing.
//!
//! Readiness is level-triggered and each ready socket is read once per turn into one shared scratch buffer,
//! so a delivery costs one `recv` and its share of an `epoll_wait`, and allocates nothing.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, ensure};
use rustix::{
    buffer::spare_capacity,
    event::{
        Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    stop::Stop,
    websocket::{self, Frame, Leftover, MAX_FRAME, Opcode, WireError},
};

/// How many connections may be on their way at once: below any sane listen backlog.
const OPENING_AT_ONCE: usize = 256;

/// How long no connection may make progress while members are being opened.
const OPENING_PATIENCE: Duration = Duration::from_secs(15);

/// What one read may take. Large enough that a burst of eight 4 KiB messages is one read.
const READ_SIZE: usize = 256 * 1024;

const EVENTS_PER_TURN: usize = 1024;

/// Where members connect to and what they say first.
#[derive(Clone, Debug)]
pub struct Entrance {
    pub address: SocketAddr,
    /// The upgrade request; `None` if the server speaks first, and in frames (the yardstick).
    pub upgrade: Option<Vec<u8>>,
    /// Over how many addresses (127.0.0.2 and up) members are spread; 0 leaves the choice to the kernel.
    pub source_addresses: u8,
}

/// What happened to a member.
#[derive(Debug)]
pub enum Event<'a> {
    /// It received a message; `at` is when the read that brought it returned.
    Message { member: usize, payload: &'a [u8], at: Instant },
    /// Its connection has ended; `stood` tells whether it had ever been ready.
    Lost { member: usize, why: Lost, stood: bool },
}

/// Why a connection ended.
#[derive(Debug)]
pub enum Lost {
    /// The server said goodbye, with this code if it gave one.
    Closed(Option<u16>),
    /// The stream ended without a close frame.
    Ended,
    Wire(WireError),
    Io(io::Error),
}

/// The members and their loop.
pub struct Swarm {
    epoll: OwnedFd,
    members: Vec<Member>,
    /// Members that do not stand yet.
    opening: usize,
    scratch: Vec<u8>,
    ready: Vec<epoll::Event>,
}

#[derive(Debug)]
struct Member {
    /// `None` once the connection has ended.
    socket: Option<TcpStream>,
    phase: Phase,
    leftover: Leftover,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Connecting,
    Upgrading,
    /// Until the server's first word. A connect alone proves nothing: with a full backlog the client's
    /// side of a connection stands and the server's does not.
    Awaiting,
    Open,
}

impl Swarm {
    /// A swarm without members.
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC).context("cannot create an epoll instance")?,
            members: Vec::new(),
            opening: 0,
            scratch: vec![0; MAX_FRAME + READ_SIZE],
            ready: Vec::with_capacity(EVENTS_PER_TURN),
        })
    }

    /// Opens members until there are `total`, and returns when every one of them stands. What happens to
    /// those that stand already goes to `on`.
    ///
    /// The first connection that fails is an error: a test of fewer members than asked for is another test.
    pub fn grow(
        &mut self,
        entrance: &Entrance,
        total: usize,
        stop: &Stop,
        mut on: impl FnMut(Event<'_>),
    ) -> anyhow::Result<()> {
        self.members.reserve_exact(total.saturating_sub(self.members.len()));
        let mut progress = (0, Instant::now());
        while self.members.len() < total || self.opening > 0 {
            let standing = self.members.len() - self.opening;
            ensure!(!stop.is_set(), "ended while opening members; {standing} of {total} stand");
            while self.members.len() < total && self.opening < OPENING_AT_ONCE {
                self.connect(entrance).with_context(|| {
                    format!(
                        "member {} of {total} cannot connect to {}",
                        self.members.len() + 1,
                        entrance.address
                    )
                })?;
            }
            let mut failure = None;
            self.turn(Duration::from_millis(100), entrance.upgrade.as_deref(), |event| match event {
                Event::Lost { member, why, stood: false } => failure = Some((member, why)),
                event => on(event),
            })?;
            if let Some((member, why)) = failure {
                let error = match why {
                    Lost::Closed(code) => anyhow!("the server closed it (code {code:?})"),
                    Lost::Ended => anyhow!("the server hung up"),
                    Lost::Wire(error) => error.into(),
                    Lost::Io(error) => error.into(),
                };
                return Err(error.context(format!("member {} of {total} does not stand", member + 1)));
            }
            let standing = self.members.len() - self.opening;
            if progress.0 != standing {
                progress = (standing, Instant::now());
            }
            ensure!(
                progress.1.elapsed() < OPENING_PATIENCE,
                "no connection was completed for {OPENING_PATIENCE:?}; {standing} of {total} stand"
            );
        }
        Ok(())
    }

    /// Waits up to `timeout` for something to arrive and hands it to `on`.
    pub fn drain(&mut self, timeout: Duration, on: impl FnMut(Event<'_>)) -> anyhow::Result<()> {
        self.turn(timeout, None, on)
    }

    /// Says goodbye to the server on every connection (RFC 6455 §7.1.1) and forgets them all.
    pub fn close(self) {
        let mut goodbye = Vec::new();
        websocket::write_masked(&mut goodbye, Opcode::Close, &1000_u16.to_be_bytes(), 0);
        for mut socket in self.members.into_iter().filter_map(|member| member.socket) {
            // A connection that fails now is as closed as one that does not.
            let _: io::Result<usize> = socket.write(&goodbye);
        }
    }

    fn connect(&mut self, entrance: &Entrance) -> anyhow::Result<()> {
        let index = self.members.len();
        let socket = Socket::new(
            Domain::for_address(entrance.address),
            Type::STREAM.nonblocking(),
            Some(Protocol::TCP),
        )?;
        if entrance.source_addresses > 0 && entrance.address.is_ipv4() {
            let host =
                u8::try_from(index % usize::from(entrance.source_addresses)).unwrap_or(0).saturating_add(2);
            let source = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, host)), 0);
            socket.bind(&source.into())?;
        }
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&entrance.address.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
            Err(error) => return Err(error.into()),
        }
        epoll::add(&self.epoll, &socket, EventData::new_u64(index as u64), EventFlags::OUT)?;
        self.opening += 1;
        self.members.push(Member {
            socket: Some(socket.into()),
            phase: Phase::Connecting,
            leftover: Leftover::default(),
        });
        Ok(())
    }

    fn turn(
        &mut self,
        timeout: Duration,
        upgrade: Option<&[u8]>,
        mut on: impl FnMut(Event<'_>),
    ) -> anyhow::Result<()> {
        let timeout = Timespec::try_from(timeout).context("a time-out beyond the clock's range")?;
        self.ready.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.ready), Some(&timeout)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error).context("epoll_wait"),
        }
        for event in &self.ready {
            let index = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
            let Some(member) = self.members.get_mut(index) else { continue };
            let stood = member.phase == Phase::Open;
            let outcome = if member.phase == Phase::Connecting {
                member.start(&self.epoll, index, upgrade)
            } else {
                member.read(index, &mut self.scratch, &mut on)
            };
            if !stood && (outcome.is_err() || member.phase == Phase::Open) {
                self.opening -= 1;
            }
            if let Err(why) = outcome {
                // Closing the descriptor takes it out of the epoll set.
                member.socket = None;
                on(Event::Lost { member: index, why, stood });
            }
        }
        Ok(())
    }
}

impl Member {
    /// The connect has come to an end: asks for the upgrade, if there is one to ask for.
    fn start(&mut self, epoll: &OwnedFd, index: usize, upgrade: Option<&[u8]>) -> Result<(), Lost> {
        let Some(socket) = &mut self.socket else { return Ok(()) };
        if let Some(error) = socket.take_error().map_err(Lost::Io)? {
            return Err(Lost::Io(error));
        }
        self.phase = Phase::Awaiting;
        if let Some(request) = upgrade {
            // A fresh socket's buffer takes a request of a few hundred bytes whole.
            socket.write_all(request).map_err(Lost::Io)?;
            self.phase = Phase::Upgrading;
        }
        epoll::modify(epoll, &*socket, EventData::new_u64(index as u64), EventFlags::IN)
            .map_err(|error| Lost::Io(error.into()))
    }

    fn read(&mut self, index: usize, scratch: &mut [u8], on: &mut impl FnMut(Event<'_>)) -> Result<(), Lost> {
        let Some(socket) = &mut self.socket else { return Ok(()) };
        let held = self.leftover.restore(scratch);
        let received = match socket.read(scratch.get_mut(held..).unwrap_or_default()) {
            Ok(0) => return Err(Lost::Ended),
            Ok(received) => received,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(error) => return Err(Lost::Io(error)),
        };
        let at = Instant::now();
        let mut bytes = scratch.get(..held + received).unwrap_or_default();
        if self.phase == Phase::Awaiting && received > 0 {
            self.phase = Phase::Open;
        }
        if self.phase == Phase::Upgrading {
            let Some(length) = websocket::read_upgrade(bytes).map_err(Lost::Wire)? else {
                self.leftover.keep(bytes);
                return Ok(());
            };
            self.phase = Phase::Open;
            bytes = bytes.get(length..).unwrap_or_default();
        }
        let mut end = Ok(());
        let rest = websocket::read_frames(bytes, |frame| match answer(frame, socket) {
            Answer::Message(payload) => on(Event::Message { member: index, payload, at }),
            Answer::Nothing => {}
            Answer::End(why) => end = Err(why),
        })
        .map_err(Lost::Wire)?;
        self.leftover.keep(rest);
        end
    }
}

enum Answer<'a> {
    Message(&'a [u8]),
    Nothing,
    End(Lost),
}

/// Does what RFC 6455 asks of a client that has received `frame`.
fn answer<'a>(frame: Frame<'a>, socket: &mut TcpStream) -> Answer<'a> {
    match frame.opcode {
        Opcode::Text | Opcode::Binary => Answer::Message(frame.payload),
        Opcode::Pong => Answer::Nothing,
        Opcode::Close => {
            Answer::End(Lost::Closed(frame.payload.first_chunk::<2>().map(|&code| u16::from_be_bytes(code))))
        }
        Opcode::Ping => {
            let mut pong = Vec::with_capacity(frame.payload.len() + 6);
            websocket::write_masked(&mut pong, Opcode::Pong, frame.payload, 1);
            // Nothing else is ever written here, so the buffer has room unless the server does not read.
            match socket.write_all(&pong) {
                Ok(()) => Answer::Nothing,
                Err(error) => Answer::End(Lost::Io(error)),
            }
        }
    }
}

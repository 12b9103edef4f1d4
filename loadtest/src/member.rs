//! One client's connection: from the connect to the last byte.
//!
//! Owns a socket, the state of joining the room, and the part of the next frame that has arrived. The
//! [`swarm`](crate::swarm) reports readiness and lends it the read buffer.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
};

use anyhow::Context;
use rustix::event::epoll::{self, EventData, EventFlags};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::{
    clock,
    dialect::{Dialect, Heard, Opening, Seat},
    inflate::Inflater,
    place::Place,
    sse::{self, Body, Sent},
    swarm::{Event, Lost},
    target::Entrance,
    tls::Stream,
    websocket::{self, Frame, Leftover, Opcode, WireError},
};

/// The maximum number of bytes waiting to be written. Beyond it the peer is not reading, and nothing more is
/// sent.
const MAX_BACKLOG: usize = 4 * 1024 * 1024;

/// A member of the swarm.
#[derive(Debug)]
pub struct Member {
    /// `None` once the connection has ended.
    stream: Option<Stream>,
    phase: Phase,
    dialect: Dialect,
    /// The framing of an event stream's body.
    body: Body,
    /// Whether compressed messages were negotiated.
    deflate: bool,
    leftover: Leftover,
    /// Bytes read so far.
    received: u64,
    backlog: Vec<u8>,
    /// The readiness that epoll waits for.
    interest: EventFlags,
    stays: bool,
    /// `None` once the client is ready.
    opening: Option<Box<Entering>>,
}

#[derive(Debug)]
struct Entering {
    opening: Opening,
    tls: Option<crate::tls::Tls>,
}

/// State that members borrow while they read: one for all of them.
#[derive(Debug)]
pub struct Desk {
    pub scratch: Vec<u8>,
    pub inflater: Inflater,
}

/// Why a message was not published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsaid {
    /// The connection has ended, or is not ready yet.
    Gone,
    /// The peer reads too slowly.
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Connecting,
    Shaking,
    /// The request has been sent, its answer has not arrived.
    Requesting,
    /// The transport is open, the protocol above it is not ready.
    Entering,
    /// Waiting for the server's first bytes. A completed connect alone proves nothing: with a full backlog
    /// the connection is established for the client but not for the server.
    Awaiting,
    Open,
}

impl Member {
    /// Starts to connect.
    pub fn connect(epoll: &OwnedFd, index: usize, entrance: &Entrance, seat: Seat) -> anyhow::Result<Self> {
        let mut opening = entrance.dialect.opening(entrance, seat)?;
        opening.begun = clock::now();
        let address = entrance.address.socket;
        let socket =
            Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))
                .context("cannot open a socket")?;
        if entrance.source_addresses > 0 && address.is_ipv4() {
            let host = seat.user % u32::from(entrance.source_addresses);
            let host = u8::try_from(host).unwrap_or(0).saturating_add(2);
            let source = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, host)), 0);
            socket.bind(&source.into()).with_context(|| format!("cannot connect from {}", source.ip()))?;
        }
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&address.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
            Err(error) => return Err(error.into()),
        }
        epoll::add(epoll, &socket, EventData::new_u64(index as u64), EventFlags::OUT)?;
        Ok(Self {
            stream: Some(Stream::Clear(socket.into())),
            opening: Some(Box::new(Entering { opening, tls: entrance.address.tls.clone() })),
            stays: seat.stays,
            deflate: entrance.deflate,
            ..Self::absent(entrance.dialect)
        })
    }

    /// A member without a connection.
    pub fn absent(dialect: Dialect) -> Self {
        Self {
            stream: None,
            phase: Phase::Connecting,
            dialect,
            body: Body::Whole,
            deflate: false,
            leftover: Leftover::default(),
            received: 0,
            backlog: Vec::new(),
            interest: EventFlags::OUT,
            stays: false,
            opening: None,
        }
    }

    pub fn is_connected(&self) -> bool {
        self.stream.is_some()
    }

    pub fn received(&self) -> u64 {
        self.received
    }

    pub fn stands(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Closes the socket, which also removes it from the epoll set.
    pub fn drop_connection(&mut self) {
        self.stream = None;
        self.opening = None;
        self.leftover = Leftover::default();
        self.backlog = Vec::new();
    }

    /// Stops waiting for readiness.
    pub fn stall(&mut self, epoll: &OwnedFd) -> anyhow::Result<()> {
        let Some(stream) = &self.stream else { return Ok(()) };
        if !self.interest.is_empty() {
            epoll::delete(epoll, stream)?;
            self.interest = EventFlags::empty();
        }
        Ok(())
    }

    /// Whether this many bytes may be sent.
    pub fn can_say(&self, bytes: usize) -> Result<(), Unsaid> {
        match &self.stream {
            Some(_) if self.phase != Phase::Open => Err(Unsaid::Gone),
            Some(_) if self.backlog.len() + bytes > MAX_BACKLOG => Err(Unsaid::Full),
            Some(_) => Ok(()),
            None => Err(Unsaid::Gone),
        }
    }

    /// Writes whole frames; what does not fit is kept for later.
    pub fn say(&mut self, epoll: &OwnedFd, index: usize, bytes: &[u8]) -> Result<(), Unsaid> {
        self.can_say(bytes.len())?;
        let Some(stream) = &mut self.stream else { return Err(Unsaid::Gone) };
        // A failure also shows on the next read, which ends the connection.
        put(stream, &mut self.backlog, bytes).map_err(|_| Unsaid::Gone)?;
        self.attend(epoll, index).map_err(|_| Unsaid::Gone)
    }

    /// Handles readiness.
    pub fn turn(
        &mut self,
        epoll: &OwnedFd,
        index: usize,
        desk: &mut Desk,
        on: &mut impl FnMut(Event<'_>),
    ) -> Result<(), Lost> {
        if matches!(self.phase, Phase::Connecting | Phase::Shaking) {
            self.start()?;
        } else {
            self.catch_up()?;
            self.read(index, desk, on)?;
        }
        self.attend(epoll, index)
    }

    /// Sends a close frame (RFC 6455 §7.1.1).
    pub fn close(mut self) {
        let polite = self.dialect.is_framed() && self.stands();
        if let Some(stream) = self.stream.as_mut().filter(|_| polite) {
            let mut goodbye = Vec::new();
            websocket::write_masked(&mut goodbye, Opcode::Close, &[&1000_u16.to_be_bytes()], 0);
            // If the connection fails now, it is closed just the same.
            let _: io::Result<usize> = stream.write(&goodbye);
        }
    }

    /// Updates the epoll interest, if it has changed.
    fn attend(&mut self, epoll: &OwnedFd, index: usize) -> Result<(), Lost> {
        let Some(stream) = &self.stream else { return Ok(()) };
        let mut wanted = EventFlags::IN;
        if !self.backlog.is_empty() || stream.holds_back() {
            wanted |= EventFlags::OUT;
        }
        if wanted != self.interest && !self.interest.is_empty() {
            epoll::modify(epoll, stream, EventData::new_u64(index as u64), wanted)
                .map_err(io::Error::from)?;
            self.interest = wanted;
        }
        Ok(())
    }

    /// Continues after the connect, or a step of the handshake, until the request has been sent.
    fn start(&mut self) -> Result<(), Lost> {
        let (Some(mut stream), Some(entering)) = (self.stream.take(), &mut self.opening) else {
            return Ok(());
        };
        if self.phase == Phase::Connecting {
            if let Some(error) = stream.socket().take_error()? {
                return Err(Lost::Io(error));
            }
            self.phase = Phase::Shaking;
            if let Some(tls) = entering.tls.take() {
                stream = tls.wrap(stream).map_err(|error| Lost::Ended(error.to_string()))?;
            }
        }
        let stream = self.stream.insert(stream);
        if !stream.shake()? {
            return Ok(());
        }
        self.phase = Phase::Awaiting;
        let request = std::mem::take(&mut entering.opening.request);
        if !request.is_empty() {
            put(stream, &mut self.backlog, &request)?;
            self.phase = Phase::Requesting;
        }
        Ok(())
    }

    fn catch_up(&mut self) -> Result<(), Lost> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        if stream.holds_back() {
            match stream.flush() {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error.into()),
                _ => {}
            }
        }
        if !self.backlog.is_empty() {
            let waiting = std::mem::take(&mut self.backlog);
            put(stream, &mut self.backlog, &waiting)?;
        }
        Ok(())
    }

    fn read(&mut self, index: usize, desk: &mut Desk, on: &mut impl FnMut(Event<'_>)) -> Result<(), Lost> {
        let Desk { scratch, inflater } = desk;
        loop {
            let Some(stream) = &mut self.stream else { return Ok(()) };
            let held = self.leftover.restore(scratch);
            let received = match stream.read(scratch.get_mut(held..).unwrap_or_default()) {
                Ok(0) => return Err(Lost::HungUp),
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Lost::HungUp),
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
                {
                    0
                }
                Err(error) => return Err(error.into()),
            };
            if received == 0 {
                self.leftover.keep(scratch.get(..held).unwrap_or_default());
                return Ok(());
            }
            self.received += received as u64;
            let more = stream.may_hold_more();
            let bytes = scratch.get_mut(..held + received).unwrap_or_default();
            self.understand(index, bytes, held, inflater, on)?;
            if !more {
                return Ok(());
            }
        }
    }

    /// Parses `bytes`, of which the first `held` were left over from earlier reads.
    fn understand(
        &mut self,
        index: usize,
        mut bytes: &mut [u8],
        mut held: usize,
        inflater: &mut Inflater,
        on: &mut impl FnMut(Event<'_>),
    ) -> Result<(), Lost> {
        let at = clock::now();
        if self.phase == Phase::Awaiting {
            self.stand(index, at, on);
        }
        if self.phase == Phase::Requesting {
            let length = if self.dialect == Dialect::Sse {
                sse::read_head(bytes)?.map(|(head, body)| {
                    self.body = body;
                    head
                })
            } else {
                websocket::read_upgrade(bytes, self.deflate)?
            };
            let Some(length) = length else {
                self.leftover.keep(bytes);
                return Ok(());
            };
            bytes = bytes.get_mut(length..).unwrap_or_default();
            held = 0;
            self.admitted(index, at, on)?;
        }
        if self.dialect == Dialect::Sse {
            let fresh = bytes.get_mut(held..).unwrap_or_default();
            let decoded = self.body.unwrap(fresh)?;
            let text = bytes.get(..held + decoded).unwrap_or_default();
            let rest = sse::read_events(text, |sent| match sent {
                Sent::Message(payload) => on(Event::Message { member: index, payload, at }),
                Sent::Id(id) => {
                    if let Some(Place { epoch, offset }) = Place::parse(id) {
                        on(Event::Position { member: index, epoch: Some(epoch), offset });
                    }
                }
                Sent::Gap(data) => on(Event::Gap { member: index, cause: &sse::cause(data) }),
            });
            self.leftover.keep(rest);
            return if self.body.is_over() { Err(Lost::HungUp) } else { Ok(()) };
        }
        let mut end = Ok(());
        let rest = websocket::read_frames(bytes, self.deflate, |frame| {
            if end.is_ok() {
                end = match inflated(frame, inflater) {
                    Ok(frame) => self.frame(index, frame, at, on),
                    Err(error) => Err(error.into()),
                };
            }
        })?;
        self.leftover.keep(rest);
        end
    }

    /// Continues once the transport is open.
    fn admitted(&mut self, index: usize, at: u64, on: &mut impl FnMut(Event<'_>)) -> Result<(), Lost> {
        let awaited = self.opening.as_ref().map_or(0, |entering| entering.opening.awaited);
        if awaited == 0 {
            self.stand(index, at, on);
            return Ok(());
        }
        self.phase = Phase::Entering;
        // A Socket.IO server sends first.
        if self.dialect == Dialect::SocketIo { Ok(()) } else { self.step() }
    }

    fn stand(&mut self, index: usize, at: u64, on: &mut impl FnMut(Event<'_>)) {
        self.phase = Phase::Open;
        if let Some(stream) = &self.stream {
            // Acknowledge like a client that has sent before, as all clients do sooner or later, if only to
            // answer a heartbeat. Otherwise the kernel would send more acknowledgements for clients that have
            // not sent yet, and the server's cost would depend on what its clients had sent before. A socket
            // that rejects the option still works.
            let _: io::Result<()> = SockRef::from(stream.socket()).set_tcp_quickack(false);
        }
        let begun = self.opening.take().map_or(at, |entering| entering.opening.begun);
        on(Event::Standing { member: index, took: at.saturating_sub(begun) });
    }

    fn step(&mut self) -> Result<(), Lost> {
        let step = self.opening.as_mut().and_then(|entering| entering.opening.steps.pop());
        step.map_or(Ok(()), |step| self.answer(Opcode::Text, &step))
    }

    /// Does what RFC 6455 and the dialect require of a client that has received `frame`.
    fn frame(
        &mut self,
        index: usize,
        frame: Frame<'_>,
        at: u64,
        on: &mut impl FnMut(Event<'_>),
    ) -> Result<(), Lost> {
        match frame.opcode {
            Opcode::Text | Opcode::Binary => {}
            Opcode::Pong => return Ok(()),
            Opcode::Ping => return self.answer(Opcode::Pong, frame.payload),
            Opcode::Close => {
                let code = frame.payload.first_chunk::<2>().map(|&code| u16::from_be_bytes(code));
                return Err(Lost::Closed(code));
            }
        }
        let mut end = Ok(());
        self.dialect.hear(frame.payload, |heard| {
            if end.is_err() {
                return;
            }
            end = match heard {
                Heard::Message(payload) => {
                    on(Event::Message { member: index, payload, at });
                    Ok(())
                }
                Heard::Position { epoch, offset } => {
                    on(Event::Position { member: index, epoch, offset });
                    Ok(())
                }
                Heard::Gap(cause) => {
                    on(Event::Gap { member: index, cause: &cause });
                    Ok(())
                }
                Heard::Reply(payload) => self.answer(Opcode::Text, payload),
                Heard::Next => self.step(),
                Heard::Accepted => {
                    on(Event::Accepted);
                    Ok(())
                }
                Heard::Refused(why) => {
                    on(Event::Refused { why });
                    Ok(())
                }
                Heard::Ended(why) => Err(Lost::Ended(why)),
                Heard::Left(channel) if self.stays => {
                    on(Event::Left { member: index, channel: &channel });
                    Ok(())
                }
                Heard::Left(channel) => {
                    Err(Lost::Ended(format!("the server has ended the subscription to {channel}")))
                }
                Heard::Answered(room) => {
                    if let Some(room) = room.filter(|_| self.opening.is_none()) {
                        on(Event::Joined { room });
                    } else if let Some(entering) = &mut self.opening {
                        entering.opening.awaited = entering.opening.awaited.saturating_sub(1);
                        if entering.opening.awaited == 0 {
                            self.stand(index, at, on);
                        }
                    }
                    Ok(())
                }
            };
        });
        end
    }

    fn answer(&mut self, opcode: Opcode, payload: &[u8]) -> Result<(), Lost> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let mut frame = Vec::with_capacity(payload.len() + 14);
        websocket::write_masked(&mut frame, opcode, &[payload], 1);
        put(stream, &mut self.backlog, &frame).map_err(Lost::Io)
    }
}

/// Returns `frame` with its message inflated.
fn inflated<'a>(frame: Frame<'a>, inflater: &'a mut Inflater) -> Result<Frame<'a>, WireError> {
    if !frame.compressed {
        return Ok(frame);
    }
    let payload = inflater.inflate(frame.payload)?;
    Ok(Frame { payload, compressed: false, ..frame })
}

/// Appends `bytes` after what already waits; what the socket does not take waits.
fn put(stream: &mut Stream, backlog: &mut Vec<u8>, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    while backlog.is_empty() && !rest.is_empty() {
        match stream.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    backlog.extend_from_slice(rest);
    if backlog.len() > MAX_BACKLOG {
        return Err(io::Error::other("the server does not read"));
    }
    Ok(())
}

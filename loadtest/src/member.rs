//! One client's connection: from the connect to the last byte.
//!
//! Owns a socket, where it stands on its way into the room, and what has arrived of the next frame. Readiness
//! comes from the [`swarm`](crate::swarm), which lends it the buffer to read into.

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
    sse::{self, Body},
    swarm::{Event, Lost},
    target::Entrance,
    tls::Stream,
    websocket::{self, Frame, Leftover, Opcode, WireError},
};

/// What may wait to be written. Beyond it the far side takes nothing, and nothing more is said to it.
const MAX_BACKLOG: usize = 4 * 1024 * 1024;

/// A member of the swarm.
#[derive(Debug)]
pub struct Member {
    /// `None` once the connection has ended.
    stream: Option<Stream>,
    phase: Phase,
    dialect: Dialect,
    /// How the body of an event stream is framed.
    body: Body,
    /// Compressed messages were asked for.
    deflate: bool,
    leftover: Leftover,
    /// Bytes that have been read so far.
    received: u64,
    backlog: Vec<u8>,
    /// What readiness is waited for.
    interest: EventFlags,
    stays: bool,
    /// Gone once it stands.
    opening: Option<Box<Entering>>,
}

#[derive(Debug)]
struct Entering {
    opening: Opening,
    tls: Option<crate::tls::Tls>,
}

/// What members borrow while they read: one for all of them.
#[derive(Debug)]
pub struct Desk {
    pub scratch: Vec<u8>,
    pub inflater: Inflater,
}

/// Why something was not published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsaid {
    /// The connection has ended, or does not stand yet.
    Gone,
    /// The far side reads too slowly.
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Connecting,
    Shaking,
    /// The request is out, its answer is not in.
    Requesting,
    /// The transport stands, the protocol above it does not.
    Entering,
    /// Until the server's first word. A connect alone proves nothing: with a full backlog the client's
    /// side of a connection stands and the server's does not.
    Awaiting,
    Open,
}

impl Member {
    /// Begins to connect.
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

    /// Without a connection.
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

    /// Closing the descriptor takes it out of the epoll set.
    pub fn drop_connection(&mut self) {
        self.stream = None;
        self.opening = None;
        self.leftover = Leftover::default();
        self.backlog = Vec::new();
    }

    /// Stops to wait for anything.
    pub fn stall(&mut self, epoll: &OwnedFd) -> anyhow::Result<()> {
        let Some(stream) = &self.stream else { return Ok(()) };
        if !self.interest.is_empty() {
            epoll::delete(epoll, stream)?;
            self.interest = EventFlags::empty();
        }
        Ok(())
    }

    /// Whether so many bytes may be said.
    pub fn can_say(&self, bytes: usize) -> Result<(), Unsaid> {
        match &self.stream {
            Some(_) if self.phase != Phase::Open => Err(Unsaid::Gone),
            Some(_) if self.backlog.len() + bytes > MAX_BACKLOG => Err(Unsaid::Full),
            Some(_) => Ok(()),
            None => Err(Unsaid::Gone),
        }
    }

    /// Writes whole frames, or keeps for later what does not fit.
    pub fn say(&mut self, epoll: &OwnedFd, index: usize, bytes: &[u8]) -> Result<(), Unsaid> {
        self.can_say(bytes.len())?;
        let Some(stream) = &mut self.stream else { return Err(Unsaid::Gone) };
        // A failure shows itself to the next read, which ends the connection.
        put(stream, &mut self.backlog, bytes).map_err(|_| Unsaid::Gone)?;
        self.attend(epoll, index).map_err(|_| Unsaid::Gone)
    }

    /// Does what readiness allows.
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

    /// Says goodbye (RFC 6455 §7.1.1).
    pub fn close(mut self) {
        let polite = self.dialect.is_framed() && self.stands();
        if let Some(stream) = self.stream.as_mut().filter(|_| polite) {
            let mut goodbye = Vec::new();
            websocket::write_masked(&mut goodbye, Opcode::Close, &[&1000_u16.to_be_bytes()], 0);
            // A connection that fails now is as closed as one that does not.
            let _: io::Result<usize> = stream.write(&goodbye);
        }
    }

    /// Waits for what is to be waited for, if that has changed.
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

    /// The connect has come to an end, or a step of the handshake has: goes on until the request is out.
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

    /// Takes apart `bytes`, of which the first `held` were there before.
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
            let rest = sse::read_events(text, |payload| on(Event::Message { member: index, payload, at }));
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

    /// The transport stands.
    fn admitted(&mut self, index: usize, at: u64, on: &mut impl FnMut(Event<'_>)) -> Result<(), Lost> {
        let awaited = self.opening.as_ref().map_or(0, |entering| entering.opening.awaited);
        if awaited == 0 {
            self.stand(index, at, on);
            return Ok(());
        }
        self.phase = Phase::Entering;
        // A Socket.IO server speaks first.
        if self.dialect == Dialect::SocketIo { Ok(()) } else { self.step() }
    }

    fn stand(&mut self, index: usize, at: u64, on: &mut impl FnMut(Event<'_>)) {
        self.phase = Phase::Open;
        if let Some(stream) = &self.stream {
            // Acknowledgements as from a client that has spoken before, as all do sooner or later, if only to answer a
            // heartbeat. The kernel would otherwise have those that have not spoken yet pay for acknowledgements
            // that the others leave to their peer, and what a server costs would depend on what was said to it
            // before. A socket that does not take the option is no worse for it.
            let _: io::Result<()> = SockRef::from(stream.socket()).set_tcp_quickack(false);
        }
        let begun = self.opening.take().map_or(at, |entering| entering.opening.begun);
        on(Event::Standing { member: index, took: at.saturating_sub(begun) });
    }

    fn step(&mut self) -> Result<(), Lost> {
        let step = self.opening.as_mut().and_then(|entering| entering.opening.steps.pop());
        step.map_or(Ok(()), |step| self.answer(Opcode::Text, &step))
    }

    /// Does what RFC 6455 and the dialect ask of a client that has received `frame`.
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
                Heard::Reply(payload) => self.answer(Opcode::Text, payload),
                Heard::Next => self.step(),
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

/// `frame` with the message that it stands for.
fn inflated<'a>(frame: Frame<'a>, inflater: &'a mut Inflater) -> Result<Frame<'a>, WireError> {
    if !frame.compressed {
        return Ok(frame);
    }
    let payload = inflater.inflate(frame.payload)?;
    Ok(Frame { payload, compressed: false, ..frame })
}

/// Writes `bytes` behind what waits already; what does not fit waits.
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
        return Err(io::Error::other("the server takes nothing more"));
    }
    Ok(())
}

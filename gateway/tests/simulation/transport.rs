//! Simulated sockets and responses: two bounded queues of bytes.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io::{self, IoSlice},
    rc::Rc,
    time::Duration,
};

use tidegate::shard::transport::{Response, Socket, Transport};

/// The most that TLS takes before it has to reach the socket.
const TLS_BUFFER: usize = 8 * 1024;

thread_local! {
    /// The number of the turn, and how many sockets have been written to in it.
    static TURN: Cell<(u64, usize)> = const { Cell::new((0, 0)) };
}

/// A turn begins.
pub fn begin_turn() {
    TURN.set((TURN.get().0 + 1, 0));
}

/// How many sockets have been written to since the turn began.
pub fn written() -> usize {
    TURN.get().1
}

/// What is between a node and one client.
#[derive(Debug, Default)]
pub struct Pipe {
    /// Bytes on their way to the client; at most `capacity`.
    pub to_client: VecDeque<u8>,
    pub capacity: usize,
    /// Bytes on their way to the node.
    pub to_node: VecDeque<u8>,
    /// How many bytes the node has sent and received so far.
    pub sent: u64,
    pub received: u64,
    /// The number of the turn in which the node has last written.
    turn: u64,
    /// The node has answered the request: the session is open.
    pub is_answered: bool,
    /// The node has ended its side.
    pub node_ended: bool,
    /// The client has ended its side.
    pub client_ended: bool,
    /// The connection was reset.
    pub is_reset: bool,
    /// The node has dropped the socket, or cut the response.
    pub is_closed: bool,
    /// The core wants its driver to look.
    pub is_woken: bool,
}

pub type Shared = Rc<RefCell<Pipe>>;

impl Pipe {
    pub fn new(capacity: usize) -> Shared {
        Rc::new(RefCell::new(Self { capacity, ..Self::default() }))
    }

    pub fn space(&self) -> usize {
        self.capacity.saturating_sub(self.to_client.len())
    }

    /// The node sends these bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        self.to_client.extend(bytes);
        self.sent += bytes.len() as u64;
    }

    /// The node receives so many bytes.
    pub fn receive(&mut self, count: usize) -> Vec<u8> {
        self.received += count as u64;
        self.to_node.drain(..count).collect()
    }
}

/// The transports of the simulation.
pub struct Simulated;

impl Transport for Simulated {
    type Socket = SimSocket;
    type Response = SimResponse;
}

/// A socket that takes what fits.
pub struct SimSocket {
    pub pipe: Shared,
    /// What TLS has taken and the socket has not. `None` for a plain socket.
    unsent: Option<VecDeque<u8>>,
    shut: bool,
}

impl SimSocket {
    pub fn new(pipe: &Shared, tls: bool) -> Self {
        Self { pipe: Rc::clone(pipe), unsent: tls.then(VecDeque::new), shut: false }
    }

    fn push(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut pipe = self.pipe.borrow_mut();
        let (turn, written) = TURN.get();
        if pipe.turn != turn {
            pipe.turn = turn;
            TURN.set((turn, written + 1));
        }
        if pipe.is_reset {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        assert!(!pipe.node_ended, "the node writes after it has ended its side");
        let taken = bytes.len().min(pipe.space());
        if taken == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        pipe.send(&bytes[..taken]);
        Ok(taken)
    }
}

impl Socket for SimSocket {
    fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        assert!(!all.is_empty(), "an empty write");
        if self.unsent.is_none() {
            return self.push(&all);
        }
        self.flush()?;
        let taken = all.len().min(TLS_BUFFER);
        self.unsent.as_mut().unwrap().extend(all.iter().take(taken));
        match self.flush() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.has_unsent() {
            let bytes: Vec<u8> = self.unsent.iter().flatten().copied().collect();
            let taken = self.push(&bytes)?;
            self.unsent.as_mut().unwrap().drain(..taken);
        }
        if self.shut {
            self.pipe.borrow_mut().node_ended = true;
        }
        Ok(())
    }

    fn has_unsent(&self) -> bool {
        self.unsent.as_ref().is_some_and(|unsent| !unsent.is_empty())
    }

    fn unsent(&self) -> usize {
        self.unsent.as_ref().map_or(0, VecDeque::len)
    }

    fn has_unread(&mut self) -> bool {
        !self.pipe.borrow().to_node.is_empty()
    }

    fn shutdown_write(&mut self) {
        self.shut = true;
        drop(self.flush());
        if self.unsent.is_none() {
            self.pipe.borrow_mut().node_ended = true;
        }
    }

    fn set_heartbeat_timeout(&mut self, _: Duration) {}

    fn wake(&mut self) {
        self.pipe.borrow_mut().is_woken = true;
    }
}

impl Drop for SimSocket {
    fn drop(&mut self) {
        self.pipe.borrow_mut().is_closed = true;
    }
}

/// A response whose body goes to the client.
pub struct SimResponse(pub Shared);

impl Response for SimResponse {
    fn wake(&mut self) {
        self.0.borrow_mut().is_woken = true;
    }

    fn abort(&mut self) {
        self.0.borrow_mut().is_closed = true;
    }
}

//! Sockets on their way from the acceptor to a shard.
//!
//! Bounded by the node's limit of sockets, which counts them.

use std::{
    mem,
    net::SocketAddr,
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use crate::{
    limits::{ConnectionPermit, RefusalPermit},
    vocabulary::AddressLimit,
};

/// A socket as the acceptor hands it over.
#[derive(Debug)]
pub struct Accepted {
    /// The socket, already non-blocking.
    pub socket: std::net::TcpStream,
    /// The remote end of the socket.
    pub peer: SocketAddr,
    /// Whether the client may connect.
    pub entry: Entry,
}

/// What the acceptor knows about a socket's peer.
#[derive(Debug)]
pub enum Entry {
    /// A client, with its connection permit if connections per address are counted.
    Client(Option<ConnectionPermit>),
    /// A trusted proxy: the client's address is not known yet.
    Proxy,
    /// A client to be refused with a response.
    Refused(AddressLimit, RefusalPermit),
}

/// The queue of accepted sockets in front of a shard.
#[derive(Debug, Default)]
pub struct Arrivals {
    queue: Mutex<Vec<Accepted>>,
    waker: AtomicWaker,
}

impl Arrivals {
    /// Adds a socket.
    pub fn post(&self, accepted: Accepted) {
        self.queue.lock().push(accepted);
        self.waker.wake();
    }

    /// Takes all sockets. Only the shard polls this.
    pub fn poll_take(&self, cx: &Context<'_>) -> Poll<Vec<Accepted>> {
        self.waker.register(cx.waker());
        let queue = mem::take(&mut *self.queue.lock());
        if queue.is_empty() { Poll::Pending } else { Poll::Ready(queue) }
    }
}

//! What the core needs from the sockets and responses that carry its connections.

use std::{
    io::{self, IoSlice},
    time::Duration,
};

/// The transports of a driver.
pub trait Transport: 'static {
    /// Carries a WebSocket.
    type Socket: Socket;
    /// Carries the body of an HTTP response.
    type Response: Response;
}

/// A socket that never blocks. Dropping it closes it.
pub trait Socket {
    /// Writes what is accepted: by the kernel, in one system call, or by TLS, which may buffer some of it
    /// ([`Socket::has_unsent`]).
    fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Passes accepted bytes that still wait to the kernel.
    fn flush(&mut self) -> io::Result<()>;

    /// Whether accepted bytes still wait for the kernel.
    fn has_unsent(&self) -> bool;

    /// How many bytes of plaintext still wait, at most.
    fn unsent(&self) -> usize;

    /// Whether the peer has sent something that has not been read.
    fn has_unread(&mut self) -> bool;

    /// Ends the stream towards the peer, which can still send. What has not been written waits in the socket
    /// ([`Socket::has_unsent`]).
    fn shutdown_write(&mut self);

    /// Sets the heartbeat's timeout, which says how long the peer may make no progress at all.
    fn set_heartbeat_timeout(&mut self, timeout: Duration);

    /// Makes the driver look at the connection again.
    fn wake(&mut self);
}

/// An HTTP response whose body is the output of a session.
pub trait Response {
    /// Makes the driver take output again.
    fn wake(&mut self);

    /// Cuts the HTTP connection.
    fn abort(&mut self);
}

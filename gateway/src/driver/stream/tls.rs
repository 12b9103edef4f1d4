//! Non-blocking TLS on one socket.
//!
//! Guarantees an exact translation: accepted plaintext is sent in order, a full socket is
//! [`io::ErrorKind::WouldBlock`], and data that is already decrypted never waits for the socket. Does not
//! wait for readiness ([`super::Stream`] does) and does not interpret the data.

use std::{
    io::{self, BufRead as _, IoSlice, Read as _, Write as _},
    sync::Arc,
};

use rustls::{HandshakeKind, ProtocolVersion, ServerConfig, ServerConnection};

/// Plaintext accepted before its records have gone to the kernel, in bytes. This is what a stalled client
/// costs here, besides its outbound queue.
const UNSENT: usize = 32 * 1024;

/// A non-blocking socket.
pub trait Wire {
    /// Reads what is available; 0 is the end of the stream.
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes what the socket accepts.
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize>;
    /// Shuts the socket for writing.
    fn shut(&self);
}

/// The state of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// It is complete and everything has been sent.
    Done,
    /// It waits for data from the peer.
    WantsRead,
    /// It waits for room in the socket.
    WantsWrite,
    /// It waits for [`Tls::process`]: the peer has sent something.
    WantsProcessing,
}

/// The server side of a TLS connection.
#[derive(Debug)]
pub struct Tls {
    connection: ServerConnection,
    /// `close_notify` has been queued: shut the socket once everything has been sent.
    closing: bool,
    /// Whether the peer has sent anything.
    received: bool,
    /// Plaintext accepted since the socket last took everything.
    unsent: usize,
}

impl Tls {
    /// A connection before its handshake.
    pub fn new(config: Arc<ServerConfig>) -> Result<Self, rustls::Error> {
        let mut connection = ServerConnection::new(config)?;
        connection.set_buffer_limit(Some(UNSENT));
        Ok(Self { connection, closing: false, received: false, unsent: 0 })
    }

    /// Continues the handshake as far as the socket allows. Does not process what the peer has sent.
    pub fn handshake(&mut self, wire: &impl Wire) -> io::Result<Handshake> {
        match self.flush(wire) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Handshake::WantsWrite),
            Err(error) => return Err(error),
        }
        if !self.connection.is_handshaking() {
            return Ok(Handshake::Done);
        }
        match self.receive(wire) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(Handshake::WantsProcessing),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Handshake::WantsRead),
            Err(error) => Err(error),
        }
    }

    /// Processes what the peer has sent. In a handshake this includes the key exchange and the signature.
    pub fn process(&mut self) -> Result<(), rustls::Error> {
        self.connection.process_new_packets().map(drop)
    }

    /// Whether the key exchange and the signature are done: what is left of the handshake takes microseconds.
    pub fn is_nearly_done(&self) -> bool {
        // After a retry request, TLS 1.3 has both still to do, and TLS 1.2 the key exchange.
        self.connection.protocol_version() == Some(ProtocolVersion::TLSv1_3)
            && matches!(self.connection.handshake_kind(), Some(HandshakeKind::Full | HandshakeKind::Resumed))
    }

    /// Ends the connection after [`Tls::process`] has failed.
    pub fn fail(&mut self, wire: &impl Wire, error: rustls::Error) -> io::Error {
        // Send the alert that tells why. The connection ends whether it arrives or not.
        drop(self.close(wire));
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    /// Whether the peer has sent anything. A probe that only connects has not.
    pub fn has_received(&self) -> bool {
        self.received
    }

    /// Whether a read can return without waiting for the socket.
    pub fn is_readable(&mut self) -> bool {
        // The read reports an error.
        !matches!(self.connection.reader().fill_buf(), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Reads what is available; 0 is an end of the stream that the peer has announced with `close_notify`. An
    /// end that it has not announced (RFC 8446 §6.1) is an error.
    pub fn try_read(&mut self, wire: &impl Wire, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return outcome,
            }
            // At the end of the stream, the reader tells the two cases apart.
            self.fill(wire)?;
        }
    }

    /// Accepts plaintext and returns how much. Accepts none while earlier records are unsent. What it
    /// accepted may be unsent when it returns ([`Tls::has_unsent`]).
    pub fn try_write(&mut self, wire: &impl Wire, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.flush(wire)?;
        let taken = self.connection.writer().write_vectored(slices)?;
        self.unsent += taken;
        match self.flush(wire) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    /// Whether records wait for the socket.
    pub fn has_unsent(&self) -> bool {
        self.connection.wants_write()
    }

    /// How much plaintext the waiting records contain, including records sent since the socket last took
    /// everything.
    pub fn unsent(&self) -> usize {
        self.unsent
    }

    /// Sends the records that wait.
    pub fn flush(&mut self, wire: &impl Wire) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Writing(wire)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.unsent = 0;
        if self.closing {
            wire.shut();
        }
        Ok(())
    }

    /// Queues `close_notify`, and shuts the socket for writing once it has been sent.
    pub fn close(&mut self, wire: &impl Wire) -> io::Result<()> {
        if !self.closing {
            self.closing = true;
            self.connection.send_close_notify();
        }
        self.flush(wire)
    }

    fn fill(&mut self, wire: &impl Wire) -> io::Result<usize> {
        let read = self.receive(wire)?;
        match self.process() {
            Ok(()) => Ok(read),
            Err(error) => Err(self.fail(wire, error)),
        }
    }

    fn receive(&mut self, wire: &impl Wire) -> io::Result<usize> {
        let read = self.connection.read_tls(&mut Reading(wire))?;
        self.received |= read > 0;
        Ok(read)
    }
}

struct Reading<'a, W>(&'a W);

impl<W: Wire> io::Read for Reading<'_, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

struct Writing<'a, W>(&'a W);

impl<W: Wire> io::Write for Writing<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests;

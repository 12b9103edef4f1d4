//! TLS on one socket, without a wait.
//!
//! Owns the exactness of the translation: what was accepted as plaintext is sent in order, a full socket
//! is [`io::ErrorKind::WouldBlock`], and nothing that was decrypted already waits for the socket. Does not
//! wait for readiness ([`super::Stream`] does) and does not know what it carries.

use std::{
    io::{self, BufRead as _, IoSlice, Read as _, Write as _},
    sync::Arc,
};

use rustls::{ServerConfig, ServerConnection};

/// Plaintext that is taken before its records have gone to the kernel, in bytes. What a stalled client
/// costs here beside its outbound queue.
const UNSENT: usize = 32 * 1024;

/// A socket that never waits.
pub trait Wire {
    /// Reads what is there; 0 is the end of the stream.
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes what is taken.
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize>;
    /// Nothing more will be written.
    fn shut(&self);
}

/// How far a handshake has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// It is over; what it had to say is sent.
    Done,
    /// The peer has the word.
    WantsRead,
    /// The socket is full.
    WantsWrite,
}

/// The server's side of a TLS connection.
#[derive(Debug)]
pub struct Tls {
    connection: ServerConnection,
    /// Nothing more will be said: the socket is shut once everything has been sent.
    closing: bool,
    /// Whether the peer has said anything.
    heard: bool,
    /// Plaintext that was taken since the socket had last taken everything.
    unsent: usize,
}

impl Tls {
    /// A connection before its handshake.
    pub fn new(config: Arc<ServerConfig>) -> Result<Self, rustls::Error> {
        let mut connection = ServerConnection::new(config)?;
        connection.set_buffer_limit(Some(UNSENT));
        Ok(Self { connection, closing: false, heard: false, unsent: 0 })
    }

    /// Goes on with the handshake as far as the socket allows.
    pub fn handshake(&mut self, wire: &impl Wire) -> io::Result<Handshake> {
        loop {
            match self.flush(wire) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Handshake::WantsWrite),
                Err(error) => return Err(error),
            }
            if !self.connection.is_handshaking() {
                return Ok(Handshake::Done);
            }
            match self.fill(wire) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Handshake::WantsRead),
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether the peer has said anything: a probe that only connects has not.
    pub fn heard(&self) -> bool {
        self.heard
    }

    /// Whether a read would not wait for the socket.
    pub fn is_readable(&mut self) -> bool {
        // An error is for the read to report.
        !matches!(self.connection.reader().fill_buf(), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Reads what is there; 0 is the end of the stream, said by the peer. An end that it has not said
    /// (RFC 8446 §6.1) is an error.
    pub fn try_read(&mut self, wire: &impl Wire, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return outcome,
            }
            // At its end, the reader knows which one it is.
            self.fill(wire)?;
        }
    }

    /// Takes plaintext and returns how much. It takes none while earlier records are unsent; what it took
    /// may be unsent when it returns ([`Tls::has_unsent`]).
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

    /// How much plaintext is in the records that wait, or was in those before them.
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

    /// Says that nothing more will come, and shuts the socket for writing once that is sent.
    pub fn close(&mut self, wire: &impl Wire) -> io::Result<()> {
        if !self.closing {
            self.closing = true;
            self.connection.send_close_notify();
        }
        self.flush(wire)
    }

    fn fill(&mut self, wire: &impl Wire) -> io::Result<usize> {
        let read = self.connection.read_tls(&mut Reading(wire))?;
        self.heard |= read > 0;
        if let Err(error) = self.connection.process_new_packets() {
            // The alert that says why; the connection is over whether it arrives or not.
            drop(self.close(wire));
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
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
mod tests;

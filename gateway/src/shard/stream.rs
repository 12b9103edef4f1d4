//! A client's socket, counted, plain or with TLS on it.

mod intake;
mod tls;

use std::{
    cell::RefCell,
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use intake::Intake;
use tls::{Handshake, Tls, Wire};

use crate::{budget::Budget, health::Meter, http1::Progress, limits::Seat};

/// The shortest time without progress after which the kernel gives a connection up.
const LEAST_PATIENCE: Duration = Duration::from_secs(30);

/// For how long a connection may make no progress before the kernel gives it up (`TCP_USER_TIMEOUT`, RFC 5482).
///
/// The kernel counts from the moment at which the peer's window closes, too, whether the peer answers its probes or not:
/// less than `heartbeat.timeout` would end clients that are only slow.
pub fn patience(heartbeat_timeout: Duration) -> Duration {
    heartbeat_timeout.max(LEAST_PATIENCE)
}

/// A client's socket, from accept to close: HTTP reads and writes it through [`AsyncRead`] and
/// [`AsyncWrite`], a WebSocket by readiness.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    /// Boxed, so that plain sockets do not pay for it.
    tls: Option<Box<RefCell<Tls>>>,
    /// Its place among the connections of its address, where they are counted.
    seat: Option<Seat>,
    /// What HTTP keeps of what it has read here; nothing any more once it is upgraded.
    intake: Option<Box<Intake>>,
}

/// The TCP socket, whose bytes are counted.
#[derive(Debug)]
struct Socket {
    tcp: TcpStream,
    meter: Arc<Meter>,
}

impl Wire for Socket {
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.tcp.try_read(buffer)?;
        self.meter.read(bytes);
        Ok(bytes)
    }

    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let bytes = match slices {
            [one] => self.tcp.try_write(one)?,
            many => self.tcp.try_write_vectored(many)?,
        };
        self.meter.written(bytes);
        Ok(bytes)
    }

    fn shut(&self) {
        // A peer that is gone already has nothing to be told.
        drop(socket2::SockRef::from(&self.tcp).shutdown(std::net::Shutdown::Write));
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.meter.sockets.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Stream {
    /// Takes a socket into the account of `meter`.
    pub fn new(socket: TcpStream, meter: Arc<Meter>) -> Self {
        meter.sockets.fetch_add(1, Ordering::Relaxed);
        Self { socket: Socket { tcp: socket, meter }, tls: None, seat: None, intake: None }
    }

    /// Takes a seat for as long as the socket is open.
    pub fn sit(&mut self, seat: Option<Seat>) {
        self.seat = seat;
    }

    /// Counts what HTTP reads from now on.
    pub fn begin_http(&mut self, budget: &Arc<Budget>, progress: Arc<Progress>) {
        self.intake = Some(Box::new(Intake::new(budget, progress)));
    }

    /// HTTP is over: its buffers are gone.
    pub fn end_http(&mut self) {
        self.intake = None;
    }

    /// Puts TLS on a socket from which nothing has been read. To be followed by [`Stream::poll_handshake`].
    pub fn with_tls(mut self, config: Arc<ServerConfig>) -> Result<Self, rustls::Error> {
        self.tls = Some(Box::new(RefCell::new(Tls::new(config)?)));
        Ok(self)
    }

    /// Waits until the TLS handshake is over; a plain socket has none.
    pub fn poll_handshake(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(tls) = &self.tls else { return Poll::Ready(Ok(())) };
        loop {
            match tls.borrow_mut().handshake(&self.socket)? {
                Handshake::Done => return Poll::Ready(Ok(())),
                Handshake::WantsRead => ready!(self.socket.tcp.poll_read_ready(cx))?,
                Handshake::WantsWrite => ready!(self.socket.tcp.poll_write_ready(cx))?,
            }
        }
    }

    /// Whether the peer has said anything in its handshake.
    pub fn is_heard(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.borrow().heard())
    }

    /// Ready when a read may succeed.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What is decrypted already announces itself by no readiness of the socket.
        if self.tls.as_ref().is_some_and(|tls| tls.borrow_mut().is_readable()) {
            return Poll::Ready(Ok(()));
        }
        self.socket.tcp.poll_read_ready(cx)
    }

    /// Ready when a write may succeed.
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.tcp.poll_write_ready(cx)
    }

    /// Reads what is there; 0 is the end of the stream.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.tls {
            None => self.socket.try_read(buffer),
            Some(tls) => tls.borrow_mut().try_read(&self.socket, buffer),
        }
    }

    /// How long the peer may make no progress, neither acknowledging nor taking what it is sent: long enough for who is
    /// slow to be treated as slow, and for who is gone to be found by its heartbeats first.
    pub fn set_patience(&self, heartbeat_timeout: Duration) {
        let patience = patience(heartbeat_timeout);
        // A socket that takes no option any more has an error, which the next read or write tells.
        drop(socket2::SockRef::from(&self.socket.tcp).set_tcp_user_timeout(Some(patience)));
    }

    /// Whether the peer has sent something that has not been read. Asks the kernel: what the runtime knows of the socket
    /// may be older.
    pub fn has_unread(&self) -> bool {
        let decrypted = self.tls.as_ref().is_some_and(|tls| tls.borrow_mut().is_readable());
        let mut byte = [MaybeUninit::uninit()];
        decrypted || matches!(socket2::SockRef::from(&self.socket.tcp).peek(&mut byte), Ok(1..))
    }

    /// Writes what is taken: by the kernel, in one system call, or by TLS, which may keep some of it
    /// ([`Stream::has_unsent`]).
    pub fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match &self.tls {
            None => self.socket.try_write(slices),
            Some(tls) => tls.borrow_mut().try_write(&self.socket, slices),
        }
    }

    /// Whether bytes that a write has taken still wait for the kernel.
    pub fn has_unsent(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.borrow().has_unsent())
    }

    /// How much that is, in bytes of plaintext at most.
    pub fn unsent(&self) -> usize {
        self.tls.as_ref().map_or(0, |tls| tls.borrow().unsent())
    }

    /// Hands the kernel what waits for it.
    pub fn try_flush(&self) -> io::Result<()> {
        self.tls.as_ref().map_or(Ok(()), |tls| tls.borrow_mut().flush(&self.socket))
    }

    /// Tells the peer that nothing more will come, and keeps reading. With TLS the goodbye itself may
    /// have to wait ([`Stream::has_unsent`]).
    pub fn shutdown_write(&self) {
        match &self.tls {
            None => self.socket.shut(),
            // Unsent, or lost with the socket, which the next read tells.
            Some(tls) => drop(tls.borrow_mut().close(&self.socket)),
        }
    }

    fn answered(&mut self) {
        if let Some(intake) = &mut self.intake {
            intake.answered();
        }
    }

    fn poll_write_with(
        &self,
        cx: &mut Context<'_>,
        mut write: impl FnMut() -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match write() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.poll_write_ready(cx))?;
                }
                outcome => return Poll::Ready(outcome),
            }
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match self.try_read(buffer.initialize_unfilled()) {
                Ok(bytes) => {
                    buffer.advance(bytes);
                    let intake = self.get_mut().intake.as_mut();
                    return Poll::Ready(intake.map_or(Ok(()), |intake| intake.read(bytes)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.socket.tcp.poll_read_ready(cx))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.answered();
        this.poll_write_with(cx, || this.try_write(&[IoSlice::new(bytes)]))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.answered();
        this.poll_write_with(cx, || this.try_write(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_write_with(cx, || self.try_flush().map(|()| 0)).map_ok(drop)
    }

    /// What still comes afterwards is nobody's any more: TLS does not take it apart.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shutdown_write();
        let outcome = ready!(self.as_mut().poll_flush(cx));
        self.tls = None;
        Poll::Ready(outcome)
    }
}

//! A client's socket, plain or with TLS, with its bytes counted.

mod intake;
mod tls;

use std::{
    cell::RefCell,
    future::{pending, poll_fn},
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

use intake::Intake;
use tls::{Handshake, Tls, Wire};

use crate::{
    budget::Budget,
    crypto::{CryptoThreads, Stage, Work},
    health::Meter,
    http1::Progress,
    limits::ConnectionPermit,
};

/// The shortest time without progress after which the kernel gives up a connection.
const LEAST_TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a connection may make no progress before the kernel gives it up (`TCP_USER_TIMEOUT`, RFC 5482).
///
/// The kernel also counts from the moment when the peer's window closes, even if the peer answers its probes:
/// anything below `heartbeat.timeout` would end clients that are merely slow.
pub fn tcp_user_timeout(heartbeat_timeout: Duration) -> Duration {
    heartbeat_timeout.max(LEAST_TCP_USER_TIMEOUT)
}

/// A client's socket, from accept to close. HTTP reads and writes it through [`AsyncRead`] and
/// [`AsyncWrite`]; a WebSocket polls its readiness.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    /// Boxed, so plain sockets do not pay for it.
    tls: Option<Box<RefCell<Tls>>>,
    /// Its connection permit for the client's address, if connections are counted.
    permit: Option<ConnectionPermit>,
    /// Counts what HTTP buffers of this connection's input. `None` after an upgrade.
    intake: Option<Box<Intake>>,
}

/// The TCP socket, with its bytes counted.
#[derive(Debug)]
struct Socket {
    tcp: TcpStream,
    meter: Arc<Meter>,
}

impl Wire for Socket {
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.tcp.try_read(buffer)?;
        self.meter.read(bytes);
        if bytes < buffer.len() {
            self.note_drained();
        }
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
        // An error means that the peer is gone already.
        drop(socket2::SockRef::from(&self.tcp).shutdown(std::net::Shutdown::Write));
    }
}

impl Socket {
    /// Records that a read has emptied the socket, which saves a second system call for each message: the one
    /// that would only say so. Input that comes later makes the socket ready again, and the end of the stream
    /// keeps it ready.
    fn note_drained(&self) {
        let drained = || Err::<(), io::Error>(io::ErrorKind::WouldBlock.into());
        // This is how tokio is told. The error is ours.
        drop(self.tcp.try_io(Interest::READABLE, drained));
    }

    /// Ready once the peer has ended its side or the connection is broken. Not if it has sent something before
    /// that is still unread: then only the time limit helps.
    async fn peer_has_ended(&self) {
        if let Ok(ready) = self.tcp.ready(Interest::READABLE).await
            && !ready.is_read_closed()
        {
            pending::<()>().await;
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.meter.sockets.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Stream {
    /// Counts a new socket in `meter`.
    pub fn new(socket: TcpStream, meter: Arc<Meter>) -> Self {
        meter.sockets.fetch_add(1, Ordering::Relaxed);
        Self { socket: Socket { tcp: socket, meter }, tls: None, permit: None, intake: None }
    }

    /// Holds a connection permit for as long as the socket is open.
    pub fn hold_permit(&mut self, permit: Option<ConnectionPermit>) {
        self.permit = permit;
    }

    /// Counts what HTTP reads from now on.
    pub fn begin_http(&mut self, budget: &Arc<Budget>, progress: Arc<Progress>) {
        self.intake = Some(Box::new(Intake::new(budget, progress)));
    }

    /// Stops counting: HTTP has freed its buffers.
    pub fn end_http(&mut self) {
        self.intake = None;
    }

    /// Adds TLS to a socket from which nothing has been read. Call [`Stream::handshake`] next.
    pub fn with_tls(mut self, config: Arc<ServerConfig>) -> Result<Self, rustls::Error> {
        self.tls = Some(Box::new(RefCell::new(Tls::new(config)?)));
        Ok(self)
    }

    /// Completes the TLS handshake; ready at once for a plain socket. The socket stays on this thread; the
    /// state of TLS visits one of `crypto`'s for the steps that take long. If the future is dropped in such a
    /// step, or the peer ends the connection meanwhile, that state is lost: don't use the stream then.
    pub async fn handshake(&mut self, crypto: &CryptoThreads) -> io::Result<()> {
        let mut stage = Stage::First;
        while let Some(tls) = &mut self.tls {
            let tls = tls.get_mut();
            match tls.handshake(&self.socket)? {
                Handshake::Done => break,
                // A client that sends nothing has no job, so it holds up no other.
                Handshake::WantsRead => poll_fn(|cx| self.socket.tcp.poll_read_ready(cx)).await?,
                Handshake::WantsWrite => poll_fn(|cx| self.socket.tcp.poll_write_ready(cx)).await?,
                Handshake::WantsProcessing if tls.is_nearly_done() => {
                    tls.process().map_err(|error| tls.fail(&self.socket, error))?;
                }
                Handshake::WantsProcessing => {
                    self.process_elsewhere(crypto, stage).await?;
                    stage = Stage::Later;
                }
            }
        }
        Ok(())
    }

    async fn process_elsewhere(&mut self, crypto: &CryptoThreads, stage: Stage) -> io::Result<()> {
        let Some(mut tls) = self.tls.take() else { return Ok(()) };
        let job = move || {
            let processed = tls.get_mut().process();
            (tls, processed)
        };
        let (mut tls, processed) = tokio::select! {
            done = crypto.run(Work::Handshake, stage, job) => done?,
            () = self.socket.peer_has_ended() => return Err(io::ErrorKind::UnexpectedEof.into()),
        };
        let outcome = processed.map_err(|error| tls.get_mut().fail(&self.socket, error));
        self.tls = Some(tls);
        outcome
    }

    /// Whether the peer has sent anything in its TLS handshake. A state that was lost in a step had something
    /// to process.
    pub fn has_received(&self) -> bool {
        self.tls.as_ref().is_none_or(|tls| tls.borrow().has_received())
    }

    /// Ready when a read may succeed.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Data that TLS has already decrypted causes no readiness of the socket.
        if self.tls.as_ref().is_some_and(|tls| tls.borrow_mut().is_readable()) {
            return Poll::Ready(Ok(()));
        }
        self.socket.tcp.poll_read_ready(cx)
    }

    /// Ready when a write may succeed.
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.tcp.poll_write_ready(cx)
    }

    /// Reads what is available; 0 is the end of the stream.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.tls {
            None => self.socket.try_read(buffer),
            Some(tls) => tls.borrow_mut().try_read(&self.socket, buffer),
        }
    }

    /// Sets how long the peer may make no progress, neither acknowledging nor accepting data: long enough
    /// that slow clients are handled as slow consumers, and dead ones are found by their heartbeats first.
    pub fn set_tcp_user_timeout(&self, heartbeat_timeout: Duration) {
        let time = tcp_user_timeout(heartbeat_timeout);
        // If the socket accepts no options any more, it has an error, which the next read or write reports.
        drop(socket2::SockRef::from(&self.socket.tcp).set_tcp_user_timeout(Some(time)));
    }

    /// Whether there is unread input. Asks the kernel, since the runtime's view of the socket may be out of
    /// date.
    pub fn has_unread(&self) -> bool {
        let decrypted = self.tls.as_ref().is_some_and(|tls| tls.borrow_mut().is_readable());
        let mut byte = [MaybeUninit::uninit()];
        decrypted || matches!(socket2::SockRef::from(&self.socket.tcp).peek(&mut byte), Ok(1..))
    }

    /// Writes what is accepted: by the kernel, in one system call, or by TLS, which may buffer some of it
    /// ([`Stream::has_unsent`]).
    pub fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match &self.tls {
            None => self.socket.try_write(slices),
            Some(tls) => tls.borrow_mut().try_write(&self.socket, slices),
        }
    }

    /// Whether accepted bytes still wait for the kernel.
    pub fn has_unsent(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.borrow().has_unsent())
    }

    /// How many bytes of plaintext still wait, at most.
    pub fn unsent(&self) -> usize {
        self.tls.as_ref().map_or(0, |tls| tls.borrow().unsent())
    }

    /// Passes waiting bytes to the kernel.
    pub fn try_flush(&self) -> io::Result<()> {
        self.tls.as_ref().map_or(Ok(()), |tls| tls.borrow_mut().flush(&self.socket))
    }

    /// Ends the stream towards the peer and keeps reading. With TLS the `close_notify` itself may have to
    /// wait ([`Stream::has_unsent`]).
    pub fn shutdown_write(&self) {
        match &self.tls {
            None => self.socket.shut(),
            // It is still unsent, or lost with the socket; then the next read reports it.
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

    /// Drops TLS: input that comes later is not decrypted any more.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shutdown_write();
        let outcome = ready!(self.as_mut().poll_flush(cx));
        self.tls = None;
        Poll::Ready(outcome)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    async fn connected() -> (Stream, std::net::TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.set_nodelay(true).unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        (Stream::new(socket, Arc::default()), peer)
    }

    /// With one more client than threads, the job of one that leaves is taken back.
    #[tokio::test]
    async fn a_client_that_leaves_while_its_handshake_waits_for_a_thread_is_noticed() {
        let registry = prometheus::Registry::new();
        let crypto = CryptoThreads::start(1, &registry).unwrap();
        let (release, released) = std::sync::mpsc::sync_channel::<()>(1);
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let busy = async {
            let job = move || {
                begun.send(()).unwrap();
                released.recv().ok();
            };
            crypto.run(Work::Token, Stage::Later, job).await.unwrap();
        };
        let leaving = async {
            has_begun.await.unwrap();
            let (stream, mut peer) = connected().await;
            let (server, mut client) = tls::tests::configs();
            let mut stream = stream.with_tls(server).unwrap();
            client.write_tls(&mut peer).unwrap();
            let waiting = |registry: &prometheus::Registry| {
                let families = registry.gather();
                let family =
                    families.iter().find(|family| family.name() == "tidegate_crypto_waiting").unwrap();
                family.get_metric().iter().map(|metric| metric.get_gauge().get_value()).sum::<f64>()
            };
            let mut handshake = Box::pin(stream.handshake(&crypto));
            while waiting(&registry) < 1.0 {
                assert!(futures_util::poll!(&mut handshake).is_pending());
                tokio::task::yield_now().await;
            }
            drop(peer);
            assert_eq!(handshake.await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            assert!(stream.has_received());
            assert!(waiting(&registry) < 1.0);
            release.send(()).unwrap();
        };
        tokio::join!(busy, leaving);
    }

    async fn is_ready(stream: &Stream) -> bool {
        poll_fn(|cx| Poll::Ready(stream.poll_read_ready(cx).is_ready())).await
    }

    async fn until_ready(stream: &Stream) {
        poll_fn(|cx| stream.poll_read_ready(cx)).await.unwrap();
    }

    #[tokio::test]
    async fn a_short_read_needs_no_second_one() {
        let (stream, mut peer) = connected().await;
        for _ in 0..3 {
            peer.write_all(b"hello").unwrap();
            until_ready(&stream).await;
            assert_eq!(stream.try_read(&mut [0; 2]).unwrap(), 2);
            assert!(is_ready(&stream).await, "there is more");
            assert_eq!(stream.try_read(&mut [0; 100]).unwrap(), 3);
            assert!(!is_ready(&stream).await, "there is no more");
        }
    }

    /// An end that has arrived along with the data makes the socket ready only once.
    #[tokio::test]
    async fn a_short_read_hides_no_end_of_the_stream() {
        for ends_first in [true, false] {
            let (stream, mut peer) = connected().await;
            peer.write_all(b"hello").unwrap();
            let mut peer = Some(peer);
            if ends_first {
                peer = None;
            }
            until_ready(&stream).await;
            assert_eq!(stream.try_read(&mut [0; 100]).unwrap(), 5);
            drop(peer);
            until_ready(&stream).await;
            assert_eq!(stream.try_read(&mut [0; 100]).unwrap(), 0);
            assert!(is_ready(&stream).await);
        }
    }
}

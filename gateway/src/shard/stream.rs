//! A client's socket, counted.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// What all sockets of one shard have carried, and how many there are. Written by the shard alone, read
/// by the acceptor and the metrics.
#[derive(Debug, Default)]
pub struct Meter {
    /// Open sockets.
    pub sockets: AtomicUsize,
    /// Bytes read since the last [`Meter::take`].
    read: AtomicU64,
    /// Bytes written since then.
    written: AtomicU64,
}

impl Meter {
    /// The bytes read and written since the last call.
    pub fn take(&self) -> (u64, u64) {
        (self.read.swap(0, Ordering::Relaxed), self.written.swap(0, Ordering::Relaxed))
    }

    fn read(&self, bytes: usize) {
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn written(&self, bytes: usize) {
        self.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// A client's socket, from accept to close: HTTP reads and writes it through [`AsyncRead`] and
/// [`AsyncWrite`], a WebSocket by readiness.
#[derive(Debug)]
pub struct Stream {
    socket: TcpStream,
    meter: Arc<Meter>,
}

impl Stream {
    /// Takes a socket into the account of `meter`.
    pub fn new(socket: TcpStream, meter: Arc<Meter>) -> Self {
        meter.sockets.fetch_add(1, Ordering::Relaxed);
        Self { socket, meter }
    }

    /// Ready when a read may succeed.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_read_ready(cx)
    }

    /// Ready when a write may succeed.
    pub fn poll_write_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_write_ready(cx)
    }

    /// Reads what is there; 0 is the end of the stream.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.socket.try_read(buffer)?;
        self.meter.read(bytes);
        Ok(bytes)
    }

    /// Writes what the kernel takes, in one system call.
    pub fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let bytes = match slices {
            [one] => self.socket.try_write(one)?,
            many => self.socket.try_write_vectored(many)?,
        };
        self.meter.written(bytes);
        Ok(bytes)
    }

    /// Tells the peer that nothing more will come, and keeps reading.
    pub fn shutdown_write(&self) {
        // A peer that is gone already has nothing to be told.
        drop(socket2::SockRef::from(&self.socket).shutdown(std::net::Shutdown::Write));
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.meter.sockets.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buffer))?;
        self.meter.read(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.socket).poll_write(cx, bytes))?;
        self.meter.written(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.socket).poll_write_vectored(cx, slices))?;
        self.meter.written(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

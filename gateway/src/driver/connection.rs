//! A session's transport: its socket, or the response that carries it.

use std::{
    io::{self, IoSlice},
    pin::pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use tokio::task::AbortHandle;

use super::{stream::Stream, worker::Worker};
use crate::shard::{ConnectionKey, Output, Transport, transport};

/// Reads in a row before other tasks get their turn.
const READS_PER_TURN: usize = 4;

/// The transports of this driver.
pub struct Tokio;

impl Transport for Tokio {
    type Socket = Socket;
    type Response = Response;
}

/// The socket of a WebSocket.
pub struct Socket {
    stream: Stream,
    /// The task that serves it.
    task: Option<Waker>,
}

impl Socket {
    pub fn new(stream: Stream) -> Self {
        Self { stream, task: None }
    }
}

impl transport::Socket for Socket {
    fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.stream.try_write(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.try_flush()
    }

    fn has_unsent(&self) -> bool {
        self.stream.has_unsent()
    }

    fn unsent(&self) -> usize {
        self.stream.unsent()
    }

    fn has_unread(&mut self) -> bool {
        self.stream.has_unread()
    }

    fn shutdown_write(&mut self) {
        self.stream.shutdown_write();
    }

    fn set_heartbeat_timeout(&mut self, timeout: Duration) {
        self.stream.set_tcp_user_timeout(timeout);
    }

    fn wake(&mut self) {
        wake(self.task.as_ref());
    }
}

/// The response whose body is the output of a session.
pub struct Response {
    /// Aborts the task of the HTTP connection.
    http: AbortHandle,
    /// That task.
    task: Option<Waker>,
}

impl Response {
    pub fn new(http: AbortHandle) -> Self {
        Self { http, task: None }
    }
}

impl transport::Response for Response {
    fn wake(&mut self) {
        wake(self.task.as_ref());
    }

    fn abort(&mut self) {
        self.http.abort();
    }
}

fn wake(task: Option<&Waker>) {
    if let Some(task) = task {
        task.wake_by_ref();
    }
}

fn set_waker(task: &mut Option<Waker>, cx: &Context<'_>) {
    match task {
        Some(waker) => waker.clone_from(cx.waker()),
        none => *none = Some(cx.waker().clone()),
    }
}

/// Keeps the connection in its shard's tables. When it is dropped, for whatever reason, the connection is
/// removed from them.
pub struct ConnectionGuard {
    pub worker: Rc<Worker>,
    pub key: ConnectionKey,
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.worker.forget(self.key);
    }
}

impl ConnectionGuard {
    /// Reads and writes as far as the socket allows. Ready when the connection has ended.
    pub fn poll_socket(&self, cx: &mut Context<'_>) -> Poll<()> {
        for _ in 0..READS_PER_TURN {
            match self.worker.with_core(|core| self.poll_once(core, cx)) {
                Step::Again => {}
                Step::Wait => return Poll::Pending,
                Step::End => return Poll::Ready(()),
            }
        }
        // If this task woke itself directly, it would be polled again before the shard's turn or any other
        // readiness: a client that never pauses would occupy the thread for dozens of polls.
        pin!(tokio::task::yield_now()).poll(cx)
    }

    fn poll_once(&self, core: &mut super::worker::Core, cx: &mut Context<'_>) -> Step {
        let key = self.key;
        let Some((socket, interest)) = core.socket(key) else { return Step::End };
        set_waker(&mut socket.task, cx);
        if interest.write && socket.stream.poll_write_ready(cx).is_ready() {
            core.writable(key);
            return Step::Again;
        }
        if !interest.read {
            return Step::Wait; // woken when publications are settled or the socket becomes writable
        }
        let mut buffer = self.worker.scratch.borrow_mut();
        let read = match socket.stream.poll_read_ready(cx) {
            Poll::Pending => return Step::Wait,
            Poll::Ready(ready) => ready.and_then(|()| socket.stream.try_read(&mut buffer)),
        };
        match read {
            Ok(0) => {
                core.lost(key, None);
                Step::End
            }
            Ok(read) => {
                core.received(key, buffer.get_mut(..read).unwrap_or_default());
                Step::Again
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Step::Again,
            Err(error) => {
                core.lost(key, Some(&error));
                Step::End
            }
        }
    }

    /// Takes the next bytes for a response; `None` ends it.
    pub fn poll_response(&self, cx: &Context<'_>) -> Poll<Option<Bytes>> {
        self.worker.with_core(|core| {
            if let Some(response) = core.response(self.key) {
                set_waker(&mut response.task, cx);
            }
            match core.take_output(self.key) {
                Output::Bytes(bytes) => Poll::Ready(Some(bytes)),
                Output::Pending => Poll::Pending,
                Output::End => Poll::Ready(None),
            }
        })
    }
}

/// What follows one look at a socket.
enum Step {
    Again,
    Wait,
    End,
}

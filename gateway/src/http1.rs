//! One HTTP/1.1 connection from its first byte to its last, on either listener.
//!
//! Owns what hyper leaves to its users: timeouts for heads, idle connections and responses, clients that have
//! closed their side of the connection, and a close that does not destroy the response. Knows no routes,
//! shards or sessions.

use std::{
    convert::Infallible,
    fmt,
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::Body as RouterBody;
use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

/// A request is refused when this many bytes contain no complete head; the last read may add as many again.
/// Also bounds what a slow reader of a response holds here.
const MAX_HEAD: usize = 32 * 1024;
/// How long the client may take to read a response that is already complete.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How many bytes may follow a request whose response is a session before the connection is no longer read.
const MAX_AHEAD: usize = 4 * 1024;
/// If a deadline is noticed this late, this process was suspended, and the client is not to blame.
const LATE: Duration = Duration::from_secs(1);

/// The timeouts of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// For a complete head, from its first byte. Also for the first head to begin.
    pub head: Duration,
    /// Between two requests. Read again every [`Times::head`] while the connection is idle, because it may
    /// become shorter.
    pub keep_alive: Duration,
    /// For the rest of a head, or for reading a response, while the node is draining.
    pub draining: Duration,
}

/// The state of a connection, shared by its task and its service.
#[derive(Debug, Default)]
pub struct Progress {
    /// How many requests have been received.
    requests: AtomicU64,
    /// A request is being served, or its response body is not complete.
    serving: AtomicBool,
    /// Bytes have been received since the last request.
    begun: AtomicBool,
    /// The socket is full.
    blocked: AtomicBool,
    /// The response lasts until the client closes its side.
    watched: AtomicBool,
}

impl Progress {
    /// Makes the current response last only as long as the client: it ends when the client closes its side of
    /// the connection. Other responses are sent nevertheless, because their requests are complete.
    pub fn end_with_client(&self) {
        set(&self.watched, true);
    }

    /// Whether any request has been received.
    pub fn is_used(&self) -> bool {
        self.requests() > 0
    }

    /// Whether a request is being served.
    pub fn is_serving(&self) -> bool {
        get(&self.serving)
    }

    fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    fn phase(&self) -> Phase {
        if get(&self.serving) {
            Phase::Serving
        } else if get(&self.blocked) {
            Phase::Writing
        } else if get(&self.begun) {
            Phase::Head
        } else {
            Phase::Idle
        }
    }
}

/// Relaxed is enough: only the connection's task uses these flags.
fn set(flag: &AtomicBool, value: bool) {
    flag.store(value, Ordering::Relaxed);
}

fn get(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No part of a request has been received.
    Idle,
    /// A part of a head has been received.
    Head,
    /// A request is being served.
    Serving,
    /// The client is slow to read the response.
    Writing,
}

impl Phase {
    /// How long the phase may last. An idle connection is checked again after this time.
    fn time_limit(self, is_used: bool, is_draining: bool, times: Times) -> Option<Duration> {
        match self {
            Self::Serving => None,
            Self::Head | Self::Writing if is_draining => Some(times.draining),
            Self::Writing => Some(ANSWER_TIMEOUT),
            Self::Idle if is_used => Some(times.keep_alive.min(times.head)),
            Self::Head | Self::Idle => Some(times.head),
        }
    }
}

/// Why a connection has ended.
#[derive(Debug)]
pub enum End {
    /// Normally: the client closed it, or it was upgraded, which the service knows.
    Done,
    /// The client was idle for too long, or too slow while the node was draining.
    Idle,
    /// A head did not arrive in time.
    HeadTimeout,
    /// The client did not read its response in time.
    AnswerTimeout,
    /// The input is not HTTP, or the socket failed.
    Failed(hyper::Error),
}

/// A connection after HTTP has ended on it.
pub struct Served<S> {
    /// The stream, for a subsequent protocol or to be closed ([`linger`]).
    pub stream: S,
    /// Bytes already read that belong to the subsequent protocol.
    pub read_ahead: Bytes,
    /// Why it ended.
    pub end: End,
}

impl<S> Served<S> {
    /// Whether a response may still be in flight to the client.
    pub fn has_answered(&self, progress: &Progress) -> bool {
        match self.end {
            // hyper answers what it cannot parse.
            End::Failed(_) => true,
            End::Done | End::Idle => progress.is_used(),
            End::HeadTimeout | End::AnswerTimeout => false,
        }
    }
}

/// Serves requests until the connection ends. When `draining` is cancelled, the current request is the last.
/// `failed` is called on a failure while the response still exists.
pub async fn serve<S, B, F>(
    stream: S,
    progress: Arc<Progress>,
    times: impl Fn() -> Times,
    draining: &CancellationToken,
    service: impl Fn(Request<RequestBody>) -> F,
    failed: impl Fn(&hyper::Error),
) -> Served<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Response<B>>,
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let service = service_fn(|request: Request<Incoming>| {
        progress.requests.fetch_add(1, Ordering::Relaxed);
        set(&progress.begun, false);
        set(&progress.serving, true);
        let guard = Guard(Arc::clone(&progress));
        let whole = Arc::new(AtomicBool::new(false));
        let answer = service(request.map(|body| RequestBody::new(body, Arc::clone(&whole))));
        Box::pin(async move {
            let mut response = answer.await;
            // The rest of the body is not read, and the client must not assume that it was (RFC 9112 §9.3).
            if !get(&whole) && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response.map(|body| Answer { body, _guard: guard }))
        })
    });
    let wire = Wire { stream, progress: Arc::clone(&progress), ahead: BytesMut::new() };
    let mut connection = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        // A client may close its side after its request and wait for the response. `Wire` watches those with
        // lasting responses.
        .half_close(true)
        .serve_connection(TokioIo::new(wire), service);

    let mut drain = std::pin::pin!(draining.cancelled());
    let mut is_draining = false;
    let mut shutting_down = false;
    // A request may arrive and be answered within one poll, so the phase alone would not show it.
    let (mut phase, mut requests) = (Phase::Idle, 0);
    let mut since = Instant::now();
    let mut deadline = std::pin::pin!(sleep_until(since + times().head));
    let mut due = Some(deadline.deadline());
    let end = poll_fn(|cx| {
        loop {
            match connection.poll_without_shutdown(cx) {
                Poll::Ready(Err(error)) => {
                    failed(&error);
                    return Poll::Ready(End::Failed(error));
                }
                // hyper has finished, but the socket has not taken everything yet.
                Poll::Ready(Ok(())) if get(&progress.blocked) => {}
                Poll::Ready(Ok(())) => return Poll::Ready(End::Done),
                Poll::Pending => {}
            }
            let drain_begins = !is_draining && drain.as_mut().poll(cx).is_ready();
            let now = (progress.phase(), progress.requests());
            if drain_begins || now != (phase, requests) {
                is_draining |= drain_begins;
                (phase, requests) = now;
                since = Instant::now();
                due = phase.time_limit(requests > 0, is_draining, times()).map(|time| since + time);
                if let Some(due) = due {
                    deadline.as_mut().reset(due);
                }
            }
            // A partial head may still become a request.
            if is_draining && !shutting_down && phase != Phase::Head {
                shutting_down = true;
                Pin::new(&mut connection).graceful_shutdown();
                continue;
            }
            let Some(at) = due else { return Poll::Pending };
            ready!(deadline.as_mut().poll(cx));
            let more = match phase {
                Phase::Head | Phase::Writing if at.elapsed() > LATE => {
                    phase.time_limit(requests > 0, is_draining, times())
                }
                Phase::Idle if requests > 0 => {
                    let times = times();
                    let left = times.keep_alive.saturating_sub(since.elapsed());
                    (!left.is_zero()).then(|| left.min(times.head))
                }
                _ => None,
            };
            if let Some(more) = more {
                let at = Instant::now() + more;
                due = Some(at);
                deadline.as_mut().reset(at);
                continue;
            }
            return Poll::Ready(match phase {
                Phase::Head if !is_draining => End::HeadTimeout,
                Phase::Writing => End::AnswerTimeout,
                Phase::Idle | Phase::Head | Phase::Serving => End::Idle,
            });
        }
    })
    .await;
    let parts = connection.into_parts();
    Served { stream: parts.io.into_inner().stream, read_ahead: parts.read_buf, end }
}

/// How long to wait at the end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Linger {
    /// The longest time without input.
    pub silence: Duration,
    /// The longest time overall.
    pub total: Duration,
}

/// The most bytes discarded from a connection that is being closed.
const MAX_LINGER: usize = 16 * 1024 * 1024;
/// How many reads before other tasks of the thread get their turn: a fast sender must not hold them up.
const LINGER_READS: usize = 4;

/// Closes a connection on which a response may be in flight (RFC 9112 §9.6): writes nothing more, and
/// discards input until the client closes its side. If the socket were closed at once with unread input, the
/// kernel would reset the connection and the client might never read its response.
pub async fn linger<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, bounds: Linger) {
    let closing = async {
        stream.shutdown().await?;
        let mut left = MAX_LINGER;
        let mut reads = 0_usize;
        while left > 0 {
            reads += 1;
            if reads.is_multiple_of(LINGER_READS) {
                tokio::task::yield_now().await;
            }
            match timeout(bounds.silence, discard(stream)).await {
                Ok(Ok(0)) | Err(_) => break,
                Ok(Ok(bytes)) => left = left.saturating_sub(bytes),
                Ok(Err(error)) => return Err(error),
            }
        }
        io::Result::Ok(())
    };
    // Lost or too slow: close it anyway.
    drop(timeout(bounds.total, closing).await);
}

/// Reads some bytes and discards them. Holds no buffer while waiting, because many connections may be
/// closing.
async fn discard<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<usize> {
    poll_fn(|cx| {
        let mut space = [0; 16 * 1024];
        let mut buffer = ReadBuf::new(&mut space);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    })
    .await
}

/// The body of a request; records whether it has been read to its end.
pub struct RequestBody {
    body: Incoming,
    whole: Arc<AtomicBool>,
}

impl RequestBody {
    fn new(body: Incoming, whole: Arc<AtomicBool>) -> Self {
        set(&whole, body.is_end_stream());
        Self { body, whole }
    }

    /// The body in the form that routes take.
    pub fn for_router(self) -> RouterBody {
        RouterBody::new(self)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        let ended = match &frame {
            None => true,
            Some(Ok(_)) => this.body.is_end_stream(),
            Some(Err(_)) => false,
        };
        set(&this.whole, ended);
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Dropped when a request has been served.
struct Guard(Arc<Progress>);

impl Drop for Guard {
    fn drop(&mut self) {
        set(&self.0.serving, false);
        set(&self.0.watched, false);
    }
}

/// The body of a response.
struct Answer<B> {
    body: B,
    _guard: Guard,
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The stream as hyper uses it.
struct Wire<S> {
    stream: S,
    progress: Arc<Progress>,
    /// Bytes read while watching the client.
    ahead: BytesMut,
}

impl<S: AsyncRead + Unpin> Wire<S> {
    /// Fails if the client of a lasting response has closed its side. hyper itself does not read while it
    /// writes a response.
    fn watch(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while get(&self.progress.watched) && self.ahead.len() < MAX_AHEAD {
            let mut space = [0; 512];
            let mut buffer = ReadBuf::new(&mut space);
            match Pin::new(&mut self.stream).poll_read(cx, &mut buffer) {
                Poll::Pending => break,
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => {
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, ClientLeft));
                }
                Poll::Ready(Ok(())) => self.ahead.extend_from_slice(buffer.filled()),
                Poll::Ready(Err(error)) => return Err(error),
            }
        }
        Ok(())
    }

    fn wrote<T>(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        set(&self.progress.blocked, outcome.is_pending());
        if outcome.is_pending() {
            self.watch(cx)?;
        }
        outcome
    }
}

#[derive(Debug)]
struct ClientLeft;

impl fmt::Display for ClientLeft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the client has closed its side")
    }
}

impl std::error::Error for ClientLeft {}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        if this.ahead.is_empty() {
            ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
        } else {
            let length = this.ahead.len().min(buffer.remaining());
            buffer.put_slice(&this.ahead.split_to(length));
        }
        if buffer.filled().len() > before && !get(&this.progress.serving) {
            set(&this.progress.begun, true);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.wrote(cx, outcome)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_write_vectored(cx, slices);
        this.wrote(cx, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.stream).poll_flush(cx);
        ready!(this.wrote(cx, outcome))?;
        Poll::Ready(this.watch(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;

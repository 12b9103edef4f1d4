//! One HTTP/1.1 connection, from its first byte to its last, on either listener.
//!
//! Owns what hyper leaves to whoever uses it: how long a head, an idle connection and an answer may take, a client
//! that has closed its side of the connection, and an end that destroys no answer. Knows no route, no shard and no
//! session.

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

/// At this many bytes without a whole head, a request is refused; the last read may bring as many again. It
/// bounds, too, what a slow reader of an answer holds here.
const MAX_HEAD: usize = 32 * 1024;
/// How long the client may take to read an answer of which nothing more has to be made.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// What may follow a request whose answer is a session, before the connection is read no further.
const MAX_AHEAD: usize = 4 * 1024;
/// A deadline that is noticed so late says that this process stood still, not that the client did.
const LATE: Duration = Duration::from_secs(1);

/// How long a connection waits for its client.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// For the rest of a head, counted from its first byte. For the first one to begin, too.
    pub head: Duration,
    /// Between two requests. Read again every [`Times::head`] while the connection is idle, so it may become shorter.
    pub keep_alive: Duration,
    /// For the rest of a head or the reading of an answer, when the node is leaving.
    pub farewell: Duration,
}

/// Where a connection stands. Shared by what serves it and by its service.
#[derive(Debug, Default)]
pub struct Progress {
    /// How many requests have come.
    requests: AtomicU64,
    /// A request is served, or the body of its answer is not complete.
    serving: AtomicBool,
    /// Bytes have come since the last request.
    begun: AtomicBool,
    /// The socket takes no more for now.
    blocked: AtomicBool,
    /// The answer lasts until the client has gone.
    watched: AtomicBool,
}

impl Progress {
    /// The answer that is being made lasts for as long as the client is there: it ends when the client closes its
    /// side of the connection. Any other answer is sent all the same, since its request has come whole.
    pub fn end_with_client(&self) {
        set(&self.watched, true);
    }

    /// Whether a request has come.
    pub fn is_used(&self) -> bool {
        self.requests() > 0
    }

    /// Whether a request is served.
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

/// The connection's task is the only one that uses these flags.
fn set(flag: &AtomicBool, value: bool) {
    flag.store(value, Ordering::Relaxed);
}

fn get(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing of a request has come.
    Idle,
    /// A part of a head has.
    Head,
    /// A request is served.
    Serving,
    /// The client takes its time to read the answer.
    Writing,
}

impl Phase {
    /// How long it may last; an idle connection is looked at again after this time.
    fn patience(self, is_used: bool, is_leaving: bool, times: Times) -> Option<Duration> {
        match self {
            Self::Serving => None,
            Self::Head | Self::Writing if is_leaving => Some(times.farewell),
            Self::Writing => Some(ANSWER_TIMEOUT),
            Self::Idle if is_used => Some(times.keep_alive.min(times.head)),
            Self::Head | Self::Idle => Some(times.head),
        }
    }
}

/// Why a connection is over.
#[derive(Debug)]
pub enum End {
    /// In order, or because its client has gone. Or by an upgrade, which the service knows of.
    Done,
    /// The client has sent nothing for long, or not enough while the node was leaving.
    Idle,
    /// A head did not come in time.
    HeadTimeout,
    /// The client does not read its answer.
    AnswerTimeout,
    /// What came is not HTTP, or the socket failed.
    Failed(hyper::Error),
}

/// A connection that is not served any more.
pub struct Served<S> {
    /// The stream, for a protocol that follows, or to be closed ([`linger`]).
    pub stream: S,
    /// What was read and belongs to the protocol that follows.
    pub read_ahead: Bytes,
    /// Why.
    pub end: End,
}

impl<S> Served<S> {
    /// Whether an answer may still be under way to the client.
    pub fn has_answered(&self, progress: &Progress) -> bool {
        match self.end {
            // hyper answers what it cannot parse.
            End::Failed(_) => true,
            End::Done | End::Idle => progress.is_used(),
            End::HeadTimeout | End::AnswerTimeout => false,
        }
    }
}

/// Serves requests until the connection is over. When `leaving` is cancelled, the request that is being served is
/// the last. `failed` hears of a failure while the answer is still there.
pub async fn serve<S, B, F>(
    stream: S,
    progress: Arc<Progress>,
    times: impl Fn() -> Times,
    leaving: &CancellationToken,
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
            // What is left of the body is not read: the client may not take it for read (RFC 9112 §9.3).
            if !get(&whole) && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response.map(|body| Answer { body, _guard: guard }))
        })
    });
    let wire = Wire { stream, progress: Arc::clone(&progress), ahead: BytesMut::new() };
    let mut connection = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        // A client that has sent its request may close its side and wait for the answer. `Wire` watches those
        // whose answers would last.
        .half_close(true)
        .serve_connection(TokioIo::new(wire), service);

    let mut left = std::pin::pin!(leaving.cancelled());
    let mut is_leaving = false;
    let mut told = false;
    // A request may come and be answered within one poll: the phase alone would not tell that it was there.
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
                // hyper is done with it, and the socket has not taken everything yet.
                Poll::Ready(Ok(())) if get(&progress.blocked) => {}
                Poll::Ready(Ok(())) => return Poll::Ready(End::Done),
                Poll::Pending => {}
            }
            let leaves = !is_leaving && left.as_mut().poll(cx).is_ready();
            let now = (progress.phase(), progress.requests());
            if leaves || now != (phase, requests) {
                is_leaving |= leaves;
                (phase, requests) = now;
                since = Instant::now();
                due = phase.patience(requests > 0, is_leaving, times()).map(|time| since + time);
                if let Some(due) = due {
                    deadline.as_mut().reset(due);
                }
            }
            // Half a head may still become a request.
            if is_leaving && !told && phase != Phase::Head {
                told = true;
                Pin::new(&mut connection).graceful_shutdown();
                continue;
            }
            let Some(at) = due else { return Poll::Pending };
            ready!(deadline.as_mut().poll(cx));
            let more = match phase {
                Phase::Head | Phase::Writing if at.elapsed() > LATE => {
                    phase.patience(requests > 0, is_leaving, times())
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
                Phase::Head if !is_leaving => End::HeadTimeout,
                Phase::Writing => End::AnswerTimeout,
                Phase::Idle | Phase::Head | Phase::Serving => End::Idle,
            });
        }
    })
    .await;
    let parts = connection.into_parts();
    Served { stream: parts.io.into_inner().stream, read_ahead: parts.read_buf, end }
}

/// What the end of a connection waits for.
#[derive(Clone, Copy, Debug)]
pub struct Linger {
    /// The longest time in which nothing comes.
    pub silence: Duration,
    /// The longest time at all.
    pub total: Duration,
}

/// Bytes that a connection which is being closed may still bring.
const MAX_LINGER: usize = 16 * 1024 * 1024;
/// After so many reads the other tasks of the thread have their turn: a fast sender must not hold them up.
const LINGER_READS: usize = 4;

/// Closes a connection on which an answer may be under way (RFC 9112 §9.6): nothing more is written, and what
/// still comes is read and thrown away until the client closes its side. To close at once while bytes of the client
/// are unread would make the kernel reset the connection, and the client might never read its answer.
pub async fn linger<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, bounds: Linger) {
    let farewell = async {
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
    // Lost, or too slow: it is closed all the same.
    drop(timeout(bounds.total, farewell).await);
}

/// Reads some bytes and throws them away. No buffer is kept while none come: many connections may be closing.
async fn discard<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<usize> {
    poll_fn(|cx| {
        let mut space = [0; 16 * 1024];
        let mut buffer = ReadBuf::new(&mut space);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    })
    .await
}

/// The body of a request, which knows whether it has been read to its end.
pub struct RequestBody {
    body: Incoming,
    whole: Arc<AtomicBool>,
}

impl RequestBody {
    fn new(body: Incoming, whole: Arc<AtomicBool>) -> Self {
        set(&whole, body.is_end_stream());
        Self { body, whole }
    }

    /// As routes take it.
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

/// The body of an answer.
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

/// The stream as hyper sees it.
struct Wire<S> {
    stream: S,
    progress: Arc<Progress>,
    /// What was read while the client was watched.
    ahead: BytesMut,
}

impl<S: AsyncRead + Unpin> Wire<S> {
    /// Fails if the client of an answer that lasts has closed its side. hyper itself does not read while it writes
    /// an answer.
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

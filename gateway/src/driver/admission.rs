//! From an accepted socket to a connection with active subscriptions.
//!
//! Routes ([`crate::server`]) are ordinary axum handlers that know nothing of shards. They check a request,
//! answer it, and attach an [`Admission`] to the response if the request becomes a session. This module
//! creates the session and joins its rooms, and sends the response only after the broker has acknowledged the
//! subscriptions: a client receives everything that is published after it has read the response.

use std::{
    cell::{Cell, OnceCell, RefCell},
    convert::Infallible,
    future::poll_fn,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use axum::body::Body as RouterBody;
use broker_bridge::SessionId;
use http::{Request, Response};
use tokio::{net::TcpStream, task::AbortHandle};
use tower::ServiceExt as _;

use super::{
    Accepted, Entry,
    body::ShardBody,
    connection::{ConnectionGuard, Response as ResponseBody, Socket},
    proxy_protocol::{self, Source},
    stream::Stream,
    worker::Worker,
};
use crate::{
    auth::Identity,
    framing::{Framing, Transport},
    http1::{self, End, Linger, Progress, RequestBody, Times},
    limits::{ConnectionPermit, Decision},
    protocol::Opening,
    request::Applicant,
    session::Session,
    shard::{ConnectionKey, LINGER, NotAdmitted, Start},
    timeout,
    vocabulary::{
        CloseReason, HandshakeResult, Peer, PeerStatus, ProtocolName, Refusal, RequestName, Unanswered,
    },
    websocket::Deflate,
};

/// A route's decision that this request becomes a session. Travels in the extensions of the response.
#[derive(Clone, Debug)]
pub struct Admission {
    /// The session's user. May be unknown until later if the client signs in within the session.
    pub identity: Option<Arc<Identity>>,
    /// What the request asked for.
    pub opening: Opening,
    /// The protocol's name.
    pub protocol: ProtocolName,
    /// How its messages are framed.
    pub framing: Framing,
    /// The compression that the WebSocket handshake negotiated.
    pub deflate: Option<Deflate>,
}

/// State that an HTTP connection shares with the handlers of its requests.
#[derive(Default)]
struct HttpConnection {
    /// Set once the connection's task exists; a session in a response body aborts it to cut the connection.
    task: OnceCell<AbortHandle>,
    progress: Arc<Progress>,
    /// The session whose transport is a response on this connection.
    session: Cell<Option<ConnectionKey>>,
    /// The session that takes over the socket once the handshake has been answered.
    upgrading: RefCell<Option<ConnectionGuard>>,
}

impl Worker {
    /// Serves HTTP on an accepted socket.
    pub fn accept(&self, accepted: Accepted) {
        let Some(worker) = self.this.upgrade() else { return };
        let Accepted { socket, peer, entry } = accepted;
        let socket = TcpStream::from_std(socket);
        self.health.arriving.fetch_sub(1, Ordering::Relaxed);
        let stream = match socket {
            Ok(socket) => Stream::new(socket, Arc::clone(&self.health.meter)),
            Err(error) => {
                tracing::warn!(%error, "cannot register a socket with the runtime");
                return;
            }
        };
        let http = Rc::<HttpConnection>::default();
        let serving = serve_http(worker, stream, peer, entry, Rc::clone(&http));
        let task = self.tasks.spawn_local(serving);
        http.task.set(task.abort_handle()).expect("set once, here");
    }

    async fn respond(
        self: Rc<Self>,
        mut request: Request<RequestBody>,
        (peer, status): (Peer, PeerStatus),
        http: Rc<HttpConnection>,
    ) -> Response<ShardBody> {
        // Pipelined requests yield to the other tasks of this thread, one by one.
        tokio::task::yield_now().await;
        request.extensions_mut().insert(peer);
        request.extensions_mut().insert(status);
        request.extensions_mut().insert(RequestName(self.context.ids.next()));
        let answer = self.router.clone().oneshot(request.map(RequestBody::for_router)).await;
        let mut response = answer.unwrap_or_else(|never: Infallible| match never {});
        let permit = response.extensions_mut().remove::<Arc<ConnectionPermit>>();
        match response.extensions_mut().remove::<Admission>() {
            None => response.map(ShardBody::Router),
            Some(admission) => {
                let applicant =
                    response.extensions_mut().remove().expect("inserted along with the admission");
                self.admit(admission, applicant, permit, response, &http).await
            }
        }
    }

    async fn admit(
        self: Rc<Self>,
        admission: Admission,
        applicant: Arc<Applicant>,
        permit: Option<Arc<ConnectionPermit>>,
        response: Response<RouterBody>,
        http: &HttpConnection,
    ) -> Response<ShardBody> {
        // Refuse requests that passed the gate before draining began; the drain has not counted them.
        if self.draining.is_cancelled() {
            return applicant.refuse(Refusal::Draining.into()).map(ShardBody::Router);
        }
        let protocol = admission.protocol;
        let (rooms, begin) = (&admission.opening.rooms, &admission.opening.begin);
        let id = self.context.ids.next();
        let start = admission.start(id, permit);
        let (key, admitted) = self.open(|core| core.open(start, rooms, begin));
        let guard = ConnectionGuard { worker: Rc::clone(&self), key };
        let refused = match admitted.await {
            Ok(Ok(())) => None,
            Ok(Err(NotAdmitted::Subscribing(refusal))) => Some(refusal.into()),
            Ok(Err(NotAdmitted::Closed(reason))) => {
                let expired =
                    admission.identity.as_deref().map(|identity| applicant.gate.check_expiry(identity));
                Some(expired.and_then(Result::err).unwrap_or_else(|| why_closed(reason).into()))
            }
            Err(_) => Some(Refusal::Draining.into()), // the shard has ended
        };
        if let Some(problem) = refused {
            return applicant.refuse(problem).map(ShardBody::Router);
        }
        self.context.requests.handshake(
            protocol,
            HandshakeResult::Ok,
            applicant.began.elapsed().as_secs_f64(),
        );
        tracing::debug!(
            session = %id,
            protocol = protocol.as_str(),
            rooms = rooms.len(),
            "session opened"
        );
        match admission.framing.transport {
            Transport::WebSocket => {
                http.upgrading.replace(Some(guard));
                response.map(ShardBody::Router)
            }
            Transport::Body => {
                if let Some(task) = http.task.get() {
                    self.with_core(|core| core.attach_response(key, ResponseBody::new(task.clone())));
                }
                http.session.set(Some(key));
                http.progress.end_with_client();
                response.map(|_| ShardBody::Session(guard))
            }
        }
    }
}

impl Admission {
    /// The parameters of the connection.
    fn start(&self, id: SessionId, permit: Option<Arc<ConnectionPermit>>) -> Start {
        let Self { identity, opening, protocol, framing, deflate } = self;
        let (identity, state) = (identity.clone(), (opening.protocol)());
        let session = if opening.signs_in_later {
            Session::to_begin(id, identity, state, *framing)
        } else {
            let identity = identity.expect("a session that is not signed in later has an identity");
            Session::new(id, identity, state, *framing)
        };
        Start { session, name: *protocol, deflate: *deflate, permit }
    }
}

async fn serve_http(
    worker: Rc<Worker>,
    stream: Stream,
    peer: SocketAddr,
    entry: Entry,
    http: Rc<HttpConnection>,
) {
    let draining = worker.draining.clone();
    let Some((mut stream, peer, entry)) = read_proxy_header(&worker, stream, peer, entry).await else {
        return;
    };
    // Held until the client has been refused.
    let (status, _refusal_permit) = match entry {
        Entry::Client(permit) => {
            stream.hold_permit(permit);
            (PeerStatus::Known, None)
        }
        Entry::Proxy => (PeerStatus::Proxy, None),
        Entry::Refused(limit, permit) => (PeerStatus::Refused(limit), Some(permit)),
    };
    let Some(mut stream) = accept_tls(&worker, stream, peer).await else { return };
    stream.begin_http(&worker.context.shard.budget, Arc::clone(&http.progress));
    let times = || {
        let settings = worker.settings();
        let head = settings.header_timeout;
        let crowded = worker.context.is_crowded();
        let keep_alive = if crowded { settings.keep_alive.min(head) } else { settings.keep_alive };
        Times { head, keep_alive, draining: LINGER }
    };
    let failed = |error: &hyper::Error| {
        if is_timed_out(error)
            && let Some(key) = http.session.get()
        {
            worker.with_core(|core| core.close(key, CloseReason::NoProgress));
        }
    };
    let respond = |request| Rc::clone(&worker).respond(request, (peer, status), Rc::clone(&http));
    let progress = Arc::clone(&http.progress);
    let mut served = http1::serve(stream, progress, times, &draining, respond, failed).await;
    served.stream.end_http();
    if let (Some(guard), End::Done) = (http.upgrading.take(), &served.end) {
        let socket = Socket::new(served.stream);
        worker.with_core(|core| core.attach_socket(guard.key, socket, &served.read_ahead));
        // Use a new task: this one still holds the remains of the handshake.
        worker.tasks.spawn_local(poll_fn(move |cx| guard.poll_socket(cx)));
        return;
    }
    let has_answered = served.has_answered(&http.progress);
    match served.end {
        End::Failed(error) => {
            if error.is_parse() {
                worker.context.requests.refused(Refusal::MalformedHttp);
            }
            tracing::debug!(%error, %peer, "an HTTP connection ended early");
            if is_about_memory(&error) {
                // Memory is short: don't wait for the rest of the head.
                worker.context.requests.unanswered(Unanswered::Memory);
                return;
            }
        }
        End::HeadTimeout => {
            worker.context.requests.unanswered(Unanswered::HeaderTimeout);
            tracing::debug!(%peer, "the head of a request took too long");
        }
        End::AnswerTimeout => tracing::debug!(%peer, "the client did not read a response in time"),
        End::Done | End::Idle => {}
    }
    if has_answered {
        close_gracefully(&worker, served.stream).await;
    }
}

/// The refusal for a session that began to close before it was open.
fn why_closed(reason: CloseReason) -> Refusal {
    match reason {
        CloseReason::OutOfMemory => Refusal::Memory,
        _ => Refusal::Draining,
    }
}

/// Whether the kernel has timed the connection out.
fn is_timed_out(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    source.is_some_and(|source| source.kind() == io::ErrorKind::TimedOut)
}

/// Whether the connection was ended because the node is short of memory.
fn is_about_memory(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    source.is_some_and(|source| source.kind() == io::ErrorKind::OutOfMemory)
}

/// Closes a socket on which a response may still be in flight.
async fn close_gracefully(worker: &Worker, mut stream: Stream) {
    let draining = async {
        worker.draining.cancelled().await;
        timeout::sleep(worker.clock(), DRAIN_LINGER).await;
    };
    tokio::select! {
        () = Box::pin(http1::linger(&mut stream, CLOSE_LINGER)) => {}
        () = draining => {}
    }
}

/// Reads the PROXY protocol header of a trusted proxy's connection, if one is expected, and returns the
/// client that it names. The header has to arrive within the time allowed for a request head.
async fn read_proxy_header(
    worker: &Worker,
    stream: Stream,
    peer: SocketAddr,
    entry: Entry,
) -> Option<(Stream, Peer, Entry)> {
    if !worker.settings().proxy_protocol || !matches!(entry, Entry::Proxy) {
        return Some((stream, peer.into(), entry));
    }
    let time = worker.settings().header_timeout;
    let header = timeout::timeout(time, proxy_protocol::read(&stream));
    let header = worker.draining.run_until_cancelled(header).await?;
    let client = match header.map_err(io::Error::from).flatten() {
        Ok(Source::Client(client)) => client,
        Ok(Source::Proxy) => return Some((stream, peer.into(), Entry::Client(None))),
        Err(error) => {
            // A peer that connects and sends nothing is a probe.
            if error.kind() != io::ErrorKind::UnexpectedEof {
                worker.context.requests.unanswered(Unanswered::ProxyHeader);
            }
            tracing::debug!(%error, %peer, "no PROXY protocol header");
            close_gracefully(worker, stream).await;
            return None;
        }
    };
    let entry = if worker.settings().trusted_proxies.contains(client.ip()) {
        Entry::Proxy
    } else {
        let most = worker.settings().limits.connections_per_address;
        match worker.context.shard.settings.limiters().admit(client.ip(), most) {
            Decision::Accept(permit) => Entry::Client(permit),
            Decision::Refuse(limit, permit) => Entry::Refused(limit, permit),
            Decision::Drop(limit) => {
                worker.context.requests.dropped(limit.into());
                return None;
            }
        }
    };
    Some((stream, client.into(), entry))
}

/// Performs the TLS handshake if the node serves TLS. It has to finish within the time allowed for a request
/// head.
async fn accept_tls(worker: &Worker, stream: Stream, peer: Peer) -> Option<Stream> {
    let Some(tls) = &worker.context.tls else { return Some(stream) };
    let mut stream = match stream.with_tls(tls.current()) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(%error, "cannot create a TLS connection");
            return None;
        }
    };
    let time = worker.settings().header_timeout;
    let handshake = timeout::timeout(time, stream.handshake(&worker.context.crypto));
    let ended = tokio::select! {
        ended = handshake => ended,
        () = worker.draining.cancelled() => return None,
    };
    match ended {
        Ok(Ok(())) => return Some(stream),
        Ok(Err(error)) => {
            // A peer that connects and sends nothing is a probe, as on a plain port.
            if stream.has_received() {
                worker.context.requests.unanswered(Unanswered::Tls);
            }
            tracing::debug!(%error, %peer, "a TLS handshake failed");
            // The alert says what went wrong. Linger, so that unread input does not reset the connection
            // before the peer has read it.
            close_gracefully(worker, stream).await;
        }
        Err(_) => {
            worker.context.requests.unanswered(Unanswered::Tls);
            tracing::debug!(%peer, "a TLS handshake took too long");
        }
    }
    None
}

/// How long a closed connection lingers for a distant client that has just sent the rest of a request.
const CLOSE_LINGER: Linger = Linger { silence: LINGER, total: Duration::from_secs(10) };
/// How long it lingers while the node is draining.
const DRAIN_LINGER: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_closed_before_it_opens_is_refused_with_the_reason() {
        assert_eq!(why_closed(CloseReason::OutOfMemory), Refusal::Memory);
        assert_eq!(why_closed(CloseReason::Drain), Refusal::Draining);
    }
}

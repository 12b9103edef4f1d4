//! One connection of a shard: a session, its outbound queue and its transport.
//!
//! A connection is written from its shard's turn and read from its own task ([`transport`]). Both run on one
//! thread, so cells are enough. It begins to close in one place ([`Connection::begin_close`]) and is removed
//! in one place ([`Worker::forget`], through its [`ConnectionGuard`]).
//!
//! # Idle cost
//!
//! Most connections are idle most of the time, and their memory limits how many a node can hold. The task of
//! an idle WebSocket is one [`ConnectionGuard`]. It holds no buffer (the shard lends one for a read), no timer
//! (the shard's [`Timers`](super::timers::Timers) hold its key) and no frames.

mod holding;
mod queue;
mod transport;
mod write;

pub use self::{holding::NOTABLE, queue::BatchDelivery};

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    io,
    rc::Rc,
    sync::Arc,
    task::{Context, Waker},
    time::{Duration, SystemTime},
};

use broker_bridge::{
    BrokerError, GapCause, Publication, PublishRequest, Receipt, ReceiptSink, RoomName, SessionId, Ticket,
};
use bytes::Bytes;
use slotmap::{Key as _, new_key_type};
use tokio::task::AbortHandle;

use super::{
    outbound::{Lane, Outbound},
    rooms::Memberships,
    stream::Stream,
    worker::Worker,
};
use crate::{
    clock::Tick,
    framing::{Encoding, Framing, MemberState},
    limits::ConnectionPermit,
    protocol::{RequestId, RoomFormat},
    request::refusals,
    session::{Effect, Effects, Session},
    vocabulary::{CloseReason, ProtocolName, ReplyError},
    websocket::{Decoder, Deflate},
};

new_key_type! {
    /// Identifies a connection within its shard. Never reused while anything may still refer to it.
    pub struct ConnectionKey;
}

/// How long a peer may take to read the close frame and close its side.
pub(super) const LINGER: Duration = Duration::from_secs(5);
/// How many publications of one session may wait for the broker's acknowledgement. At this limit the session
/// is not read, so one busy client cannot fill the queue shared by all.
const MAX_IN_FLIGHT: u32 = 64;

/// One connection.
pub struct Connection {
    key: ConnectionKey,
    id: SessionId,
    deflate: Option<Deflate>,
    /// See [`usual_encoding`](Self::usual_encoding).
    encoding: OnceCell<Encoding>,
    name: ProtocolName,
    session: RefCell<Session>,
    pub(super) memberships: RefCell<Memberships>,
    outbound: RefCell<Outbound>,
    attachment: RefCell<Attachment>,
    decoder: RefCell<Decoder>,
    phase: Cell<Phase>,
    /// Whether it has ever been open.
    opened: Cell<bool>,
    /// The task that reads or writes for this connection.
    waker: RefCell<Option<Waker>>,
    /// Whether it is in the shard's list of connections to write in this turn.
    pub(super) dirty: Cell<bool>,
    /// The socket is full, and its task waits until it is writable. Likewise for a response.
    wants_write: Cell<bool>,
    /// The response body has been woken for waiting output and has not polled since.
    offered: Cell<bool>,
    /// A heartbeat is due at the end of the turn.
    ping_due: Cell<bool>,
    /// Set if the last delivery could not be queued; the connection closes for this reason at the end of the
    /// turn.
    close_after_turn: Cell<Option<CloseReason>>,
    /// Input from the client is no longer parsed.
    ignores_input: Cell<bool>,
    in_flight: Cell<u32>,
    /// Bytes of an incomplete message that have not been charged yet.
    unpaid: Cell<u32>,
    /// Publications that did not fit into the broker's queue, in order. The session is not read while there
    /// are any.
    blocked: RefCell<VecDeque<PublishRequest>>,
    /// What the tallies include of its outbound queue and blocked publications.
    counted: Cell<Counted>,
    /// Whether it is in the shard's list of connections that hold memory.
    pub(super) holds: Cell<bool>,
    created: Tick,
    /// When the last byte was received.
    last_received: Cell<Tick>,
    /// When a ping was handed to the kernel, if no byte has been received since.
    pinged_at: Cell<Tick>,
    /// A ping has left the queue, but TLS may not have passed it to the kernel yet.
    ping_in_tls: Cell<bool>,
    next_ping: Cell<Tick>,
    /// The client has to begin its session before this, unless the request already did.
    begin_deadline: Cell<Tick>,
    /// The tick of its current timer entry in the shard.
    due: Cell<Tick>,
    close_by: Cell<Tick>,
    _permit: Option<Arc<ConnectionPermit>>,
}

/// What a connection holds, as counted in the shard's tally.
#[derive(Clone, Copy, Default)]
struct Counted {
    /// Bytes queued for the client.
    queued: usize,
    /// Bytes in the queue and the socket that only this connection holds.
    outbound: usize,
    /// Bytes of publications that wait for room in the broker's queue.
    blocked: usize,
}

/// The transport of a connection.
enum Attachment {
    /// The upgrade or the response is still being prepared.
    Pending,
    /// A WebSocket.
    Socket { stream: Stream, shut: bool },
    /// The body of an HTTP response; the handle aborts the HTTP connection.
    Response(AbortHandle),
    /// None any more.
    Detached,
}

/// The phases of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its subscriptions are being set up. Publications queue up already.
    Admitting,
    /// It is in service.
    Open,
    /// The final message is being sent.
    Closing(CloseReason),
}

/// The parameters of a new connection.
pub struct Start {
    pub session: Session,
    pub name: ProtocolName,
    /// The negotiated compression.
    pub deflate: Option<Deflate>,
    pub now: Tick,
    /// When the client must have begun its session, unless the request already did.
    pub begin_deadline: Tick,
    /// When the first ping is due.
    pub first_ping: Tick,
    /// Its connection permit for the client's address, if the address was known only from the request.
    pub permit: Option<Arc<ConnectionPermit>>,
}

impl Connection {
    /// A connection that has no transport yet.
    pub fn new(key: ConnectionKey, start: Start) -> Self {
        let Start { session, name, deflate, now, begin_deadline, first_ping, permit } = start;
        let mut decoder = Decoder::new();
        if deflate.is_some() {
            decoder.allow_deflate();
        }
        Self {
            key,
            id: session.id(),
            deflate,
            encoding: OnceCell::new(),
            name,
            session: RefCell::new(session),
            memberships: RefCell::default(),
            outbound: RefCell::default(),
            attachment: RefCell::new(Attachment::Pending),
            decoder: RefCell::new(decoder),
            phase: Cell::new(Phase::Admitting),
            opened: Cell::new(false),
            waker: RefCell::default(),
            dirty: Cell::new(false),
            wants_write: Cell::new(false),
            offered: Cell::new(false),
            ping_due: Cell::new(false),
            close_after_turn: Cell::new(None),
            ignores_input: Cell::new(false),
            in_flight: Cell::new(0),
            unpaid: Cell::new(0),
            blocked: RefCell::default(),
            counted: Cell::default(),
            holds: Cell::new(false),
            created: now,
            last_received: Cell::new(now),
            pinged_at: Cell::new(Tick::NEVER),
            ping_in_tls: Cell::new(false),
            next_ping: Cell::new(first_ping),
            begin_deadline: Cell::new(begin_deadline),
            due: Cell::new(Tick::default()),
            close_by: Cell::new(Tick::default()),
            _permit: permit,
        }
    }

    pub fn key(&self) -> ConnectionKey {
        self.key
    }

    pub fn id(&self) -> SessionId {
        self.id
    }

    pub fn name(&self) -> ProtocolName {
        self.name
    }

    pub fn due(&self) -> Tick {
        self.due.get()
    }

    pub fn set_due(&self, at: Tick) {
        self.due.set(at);
    }

    pub fn phase(&self) -> Phase {
        self.phase.get()
    }

    /// Marks the subscriptions as active. Returns false if the connection has begun to close in the meantime.
    pub fn open(&self) -> bool {
        let admitting = self.phase.get() == Phase::Admitting;
        if admitting {
            self.phase.set(Phase::Open);
            self.opened.set(true);
        }
        admitting
    }

    pub fn was_open(&self) -> bool {
        self.opened.get()
    }

    /// The number of the first message in `room` that this connection receives.
    pub fn since(&self, room: &RoomName) -> u64 {
        self.memberships.borrow().get(room).map_or(u64::MAX, |membership| membership.since)
    }

    /// How publications of `room` are encoded for this connection, whose `request` subscribed to it.
    pub fn encoding_of(&self, room: &RoomName, request: RequestId) -> (Encoding, Option<Rc<MemberState>>) {
        let mut session = self.session.borrow_mut();
        let RoomFormat { format, variant, state } = session.format(room, request);
        let Framing { transport, wrap } = session.framing();
        let encoding = Encoding::new(format, transport).with_variant(variant).with_wrap(wrap);
        let state = state.or_else(|| encoding.has_heads().then(Rc::default));
        (encoding.with_deflate(self.deflate), state)
    }

    /// The encoding of most of its rooms: that of the first one.
    pub fn usual_encoding(&self, first: Encoding) -> Encoding {
        *self.encoding.get_or_init(|| first)
    }

    /// The same, if it has ever been in a room.
    pub fn encoding(&self) -> Option<Encoding> {
        self.encoding.get().copied()
    }

    /// Queues the message that the protocol sends first, if any.
    pub fn greet(&self, worker: &Worker) {
        let mut packets = worker.take_packets();
        self.session.borrow_mut().greet(worker.spread(), &mut packets);
        if let Some(greeting) = packets.take_joined() {
            self.queue(worker, greeting.into(), Lane::Session);
        }
        worker.give_packets(packets);
    }

    // ---- called from the shard's turn ----

    /// New settings apply: what is queued now was ordered by the old ones.
    pub fn seal_outbound(&self) {
        self.outbound.borrow_mut().seal();
    }

    /// Notifies the session of a gap.
    pub fn gap(&self, worker: &Worker, room: &RoomName, cause: GapCause) {
        let mut effects = worker.take_effects();
        self.session.borrow_mut().gap(room, cause, &mut effects);
        self.run(worker, &mut effects);
        worker.give_effects(effects);
    }

    /// The broker has accepted or refused one of the session's publications.
    pub fn settled(&self, worker: &Worker, request: u64, outcome: &Result<(), BrokerError>) {
        let was_full = self.in_flight.get() >= MAX_IN_FLIGHT;
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
        if let Err(error) = outcome {
            tracing::debug!(session = %self.id, %error, "a publication was not delivered");
        }
        let mut effects = worker.take_effects();
        let request = RequestId::try_from(request).expect("a ticket holds the id of a request");
        self.session.borrow_mut().settled(request, outcome, &mut effects);
        self.run(worker, &mut effects);
        worker.give_effects(effects);
        if was_full {
            self.wake();
        }
    }

    /// The broker has accepted or refused a subscription that the session asked for. Returns whether the
    /// session becomes a member now.
    pub fn joined(
        &self,
        worker: &Worker,
        request: RequestId,
        room: &RoomName,
        outcome: Result<(), ReplyError>,
    ) -> bool {
        if matches!(self.phase.get(), Phase::Closing(_)) {
            return false;
        }
        let mut effects = worker.take_effects();
        let member = self.session.borrow_mut().joined(request, room, outcome, &mut effects);
        self.run(worker, &mut effects);
        worker.give_effects(effects);
        member
    }

    /// Handles what is due and returns when to call again.
    pub fn on_timer(&self, worker: &Worker, now: Tick) -> Option<Tick> {
        match self.phase.get() {
            Phase::Closing(_) => {
                if now < self.close_by.get() {
                    return Some(self.close_by.get());
                }
                self.cut();
                None
            }
            Phase::Admitting | Phase::Open if now >= self.expires(now) => {
                let reason = self.session.borrow().expired();
                // Before closing as stale, read what the client has already sent, once.
                let unread = reason == CloseReason::Stale && self.has_unread();
                if self.begin_deadline.replace(Tick::default()) > Tick::default() && unread {
                    return Some(now);
                }
                self.begin_close(worker, reason);
                Some(self.close_by.get())
            }
            Phase::Admitting => Some(now.after(self.heartbeat_interval(worker)).min(self.expires(now))),
            Phase::Open if now >= self.ages(worker) => {
                self.begin_close(worker, CloseReason::MaxAge);
                Some(self.close_by.get())
            }
            Phase::Open => {
                // Only WebSocket clients answer pings. For other transports the kernel's timeouts apply.
                if now >= self.silent_by(worker) {
                    if !self.has_unread() {
                        self.begin_close(worker, CloseReason::HeartbeatTimeout);
                        return Some(self.close_by.get());
                    }
                    self.note_received(now);
                }
                if now >= self.next_ping.get() {
                    self.outbound.borrow_mut().release();
                    self.next_ping.set(now.after(self.heartbeat_interval(worker)));
                    self.ping_due.set(true);
                    worker.touch(self.key);
                }
                let silent_by = self.silent_by(worker);
                Some(self.next_ping.get().min(self.expires(now)).min(silent_by).min(self.ages(worker)))
            }
        }
    }

    /// Restarts the heartbeat after a change of settings. The peer was not pinged in time for the new
    /// `heartbeat.timeout` and must not be closed for that.
    pub fn begin_heartbeat(&self, worker: &Worker) {
        if matches!(self.phase.get(), Phase::Closing(_)) {
            return;
        }
        if let Attachment::Socket { stream, .. } = &*self.attachment.borrow() {
            stream.set_tcp_user_timeout(worker.settings().heartbeat.timeout);
        }
        let now = worker.now();
        self.note_received(now);
        self.next_ping.set(now.after(self.heartbeat_interval(worker).mul_f32(worker.spread())));
        let first = self.next_ping.get().min(self.expires(now)).min(self.ages(worker));
        worker.set_timer(Tick(first.0.max(now.0 + 1)), self);
    }

    fn heartbeat_interval(&self, worker: &Worker) -> Duration {
        let interval = worker.settings().heartbeat.interval;
        self.session.borrow().timing().promised.map_or(interval, |promised| interval.min(promised))
    }

    /// Records that the peer has sent something.
    fn note_received(&self, now: Tick) {
        self.last_received.set(now);
        self.pinged_at.set(Tick::NEVER);
    }

    /// Records that the kernel has taken a ping for the peer.
    fn note_pinged(&self, worker: &Worker) {
        self.pinged_at.set(self.pinged_at.get().min(worker.now()));
        let silent_by = self.silent_by(worker);
        if silent_by < self.due.get() && self.phase.get() == Phase::Open {
            worker.set_timer(silent_by, self);
        }
    }

    /// When the peer counts as gone: it has sent nothing for `heartbeat.timeout`, and nothing since it was
    /// pinged, for as long as it would have had to answer a ping sent in time. A ping that is queued behind
    /// unread output does not count as sent.
    fn silent_by(&self, worker: &Worker) -> Tick {
        let timeout = worker.settings().heartbeat.timeout;
        let to_answer = timeout.saturating_sub(self.heartbeat_interval(worker));
        self.last_received.get().after(timeout).max(self.pinged_at.get().after(to_answer))
    }

    /// When its session expires, by the shard's clock.
    ///
    /// A token expires in real time, even if the node was suspended in the meantime.
    pub fn expires(&self, now: Tick) -> Tick {
        let ends = self.session.borrow().ends();
        ends.map_or(self.begin_deadline.get(), |at| now.after(at.since(SystemTime::now().into())))
    }

    /// The shard's clock has been paused, so the token may expire earlier than the timer was set for.
    pub fn set_expiry_timer(&self, worker: &Worker, now: Tick) {
        let expires = self.expires(now);
        if expires < self.due.get() && !matches!(self.phase.get(), Phase::Closing(_)) {
            worker.set_timer(expires, self);
        }
    }

    /// Whether the peer has sent something that has not been read yet.
    fn has_unread(&self) -> bool {
        matches!(&*self.attachment.borrow(), Attachment::Socket { stream, .. } if stream.has_unread())
    }

    /// When the session reaches its age limit.
    fn ages(&self, worker: &Worker) -> Tick {
        worker.end_of_age(self.id, self.created)
    }

    /// Pings the peer. Most connections are idle when pinged, so an empty queue is bypassed and stays without
    /// memory. A ping that does not fit into the queue is skipped: the peer has enough to read already, and a
    /// room's overflow policy may keep the queue full for as long as the peer is slow.
    fn ping(&self, worker: &Worker) {
        if matches!(self.phase.get(), Phase::Closing(_)) {
            return;
        }
        let mut packets = worker.take_packets();
        self.session.borrow_mut().heartbeat(&mut packets);
        if !packets.is_empty() && !self.send_past_queue(worker, &packets, Lane::Heartbeat) {
            let limit = worker.settings().limits.outbound.get();
            let ping = packets.to_bytes();
            if self.outbound.borrow_mut().push(ping, Lane::Heartbeat, limit).is_ok() {
                self.count_outbound(worker);
            }
        }
        packets.clear();
        worker.give_packets(packets);
    }

    /// Begins to close the connection: it leaves its rooms, sends its final message, and is cut off if the
    /// peer does not close its side in time. Only the first reason counts.
    pub fn begin_close(&self, worker: &Worker, reason: CloseReason) {
        self.close_with(worker, reason, None);
    }

    /// Likewise, with `words` instead of the protocol's final message.
    fn close_with(&self, worker: &Worker, reason: CloseReason, words: Option<Bytes>) {
        if matches!(self.phase.get(), Phase::Closing(_)) {
            return;
        }
        self.phase.set(Phase::Closing(reason));
        worker.leave_rooms(self);
        self.drop_blocked(worker);
        if reason == CloseReason::OutOfMemory {
            self.drop_incomplete(worker);
        }
        {
            let mut outbound = self.outbound.borrow_mut();
            if matches!(reason, CloseReason::SlowConsumer | CloseReason::OutOfMemory) {
                outbound.clear();
            }
            let final_message = || {
                let mut packets = worker.take_packets();
                self.session.borrow_mut().farewell(reason, worker.spread(), &mut packets);
                let words = packets.take_joined();
                worker.give_packets(packets);
                words
            };
            if let Some(words) = words.or_else(final_message) {
                outbound.push_last(words);
            }
        }
        self.count_outbound(worker);
        let by = worker.now().after(LINGER);
        self.close_by.set(by);
        worker.set_timer(by, self);
        worker.touch(self.key);
        self.wake();
    }

    // ---- called from both ----

    fn run(&self, worker: &Worker, effects: &mut Effects) {
        for effect in effects.drain() {
            match effect {
                Effect::Publish(request, room, publication) => {
                    self.publish(worker, request, room, publication);
                }
                Effect::Join(request, room) => worker.join_later(self.key, request, room),
                Effect::Leave(room) => worker.leave(&room, self),
                Effect::Refused(failure) => {
                    worker.context.requests.auth_failed(failure);
                    refusals::token_of_session(self.id, failure);
                }
                Effect::Limited(limit) => worker.context.metrics.limited(limit),
                Effect::Expires(_) => self.set_expiry_timer(worker, worker.now()),
                // Nothing follows the final message (for a WebSocket, RFC 6455 section 5.5.1).
                Effect::Send(_) if matches!(self.phase.get(), Phase::Closing(_)) => {}
                Effect::Send(bytes) => {
                    self.queue(worker, bytes.into(), Lane::Session);
                    worker.touch(self.key);
                }
                Effect::Close(reason) => self.begin_close(worker, reason),
            }
        }
    }

    fn publish(&self, worker: &Worker, request: RequestId, room: RoomName, publication: Publication) {
        if matches!(self.phase.get(), Phase::Closing(_)) {
            return;
        }
        let ticket = Ticket { owner: self.key.data().as_ffi(), request: request.into() };
        let inbox: Arc<dyn ReceiptSink> = worker.inbox.clone();
        let request = PublishRequest { room, publication, receipt: Receipt::new(inbox, ticket) };
        self.in_flight.set(self.in_flight.get() + 1);
        if self.is_blocked() {
            self.block(worker, request);
        } else if let Err(request) = worker.context.broker.try_publish(request) {
            self.block(worker, request);
            worker.publish_blocked(self.key);
        }
    }

    /// The transport has ended, by this error or because the peer closed it.
    fn lost(&self, worker: &Worker, error: Option<&io::Error>) {
        let timed_out = error.is_some_and(|error| error.kind() == io::ErrorKind::TimedOut);
        let reason = if timed_out { CloseReason::NoProgress } else { CloseReason::Lost };
        self.begin_close(worker, reason);
        self.cut();
    }

    /// Drops the transport, which has ended by itself.
    pub fn detach(&self) {
        self.attachment.replace(Attachment::Detached);
    }

    /// Cuts the transport, whatever is still queued.
    fn cut(&self) {
        match self.attachment.replace(Attachment::Detached) {
            Attachment::Response(http) => http.abort(),
            Attachment::Pending | Attachment::Socket { .. } | Attachment::Detached => {}
        }
        self.wake();
    }

    fn set_waker(&self, cx: &Context<'_>) {
        match &mut *self.waker.borrow_mut() {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
    }

    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }
}

/// Keeps the connection in its shard's tables. When it is dropped, for whatever reason, the connection is
/// removed from them.
pub struct ConnectionGuard {
    pub worker: Rc<Worker>,
    pub connection: Rc<Connection>,
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.worker.forget(&self.connection);
    }
}

impl ConnectionGuard {
    /// Serves the connection over its socket until it ends.
    pub fn serve_socket(self) -> impl Future<Output = ()> {
        poll_fn(move |cx| self.connection.poll_socket(&self.worker, cx))
    }
}

//! One connection of a shard: a session, its outbound queue and what carries it.
//!
//! A connection is written from its shard's turn and read from its own task ([`carried`]); both run on one thread, so
//! cells are enough. It begins to close in one place ([`Connection::begin_close`]) and is gone in one
//! place ([`Worker::forget`], through its [`Lease`]).
//!
//! # Idle cost
//!
//! Most connections do nothing most of the time and their memory is what a node is made of. The task of
//! an idle WebSocket is one [`Lease`]; it holds no buffer (the shard lends one for a read), no timer (the
//! shard's [`Timers`](super::timers::Timers) hold its key) and no frames.

mod carried;
mod holding;
mod queue;
mod write;

pub use self::{holding::NOTABLE, queue::BatchDelivery};

use std::{
    cell::{Cell, RefCell},
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
    limits::Seat,
    protocol::{RequestId, RoomFormat},
    request::refusals,
    session::{Effect, Effects, Session},
    vocabulary::{CloseReason, ProtocolName, ReplyError},
    websocket::{Decoder, Deflate},
};

new_key_type! {
    /// Names a connection within its shard; never reused while anything may still refer to it.
    pub struct ConnectionKey;
}

/// How long a peer may take to read the last words and to close its side.
pub(super) const LINGER: Duration = Duration::from_secs(5);
/// Publications of one session that the broker has not acknowledged. Beyond it the session is not read
/// any further, so that one busy client cannot fill the queue of all.
const MAX_IN_FLIGHT: u32 = 64;

/// One connection.
pub struct Connection {
    key: ConnectionKey,
    id: SessionId,
    deflate: Option<Deflate>,
    name: ProtocolName,
    session: RefCell<Session>,
    pub(super) memberships: RefCell<Memberships>,
    outbound: RefCell<Outbound>,
    carrier: RefCell<Carrier>,
    decoder: RefCell<Decoder>,
    phase: Cell<Phase>,
    /// Whether it was ever open.
    opened: Cell<bool>,
    /// The task that reads or writes for this connection.
    waker: RefCell<Option<Waker>>,
    /// In the shard's list of connections to write this turn.
    pub(super) dirty: Cell<bool>,
    /// The socket was full; its task waits until it can be written. Likewise a response.
    wants_write: Cell<bool>,
    /// The body of the response has been told that something waits, and has not come for it since.
    offered: Cell<bool>,
    /// A heartbeat goes out at the end of the turn.
    ping_due: Cell<bool>,
    /// The last delivery could not be queued; closed for that at the end of the turn.
    doomed: Cell<Option<CloseReason>>,
    /// Nothing the client sends is understood any more.
    deaf: Cell<bool>,
    in_flight: Cell<u32>,
    /// Bytes of a message that has not ended, not charged yet.
    unpaid: Cell<u32>,
    /// Publications that did not fit into the broker's queue, in order. While there are any, the session
    /// is not read.
    blocked: RefCell<VecDeque<PublishRequest>>,
    /// What has been counted of its queue and of what waits for the broker.
    counted: Cell<Counted>,
    /// In the shard's list of connections that hold something.
    pub(super) holds: Cell<bool>,
    born: Tick,
    /// When the last byte came.
    heard: Cell<Tick>,
    /// Since when, without a byte since, a ping has been in the hands of the kernel.
    asked: Cell<Tick>,
    /// A ping has left the queue; TLS may still keep it from the kernel.
    asking: Cell<bool>,
    next_ping: Cell<Tick>,
    /// The client has to begin its session before that, unless the door was the beginning.
    begin_by: Cell<Tick>,
    /// The tick of its entry among the shard's timers.
    due: Cell<Tick>,
    close_by: Cell<Tick>,
    _seat: Option<Arc<Seat>>,
}

/// What a connection holds, as the shard's tally knows it.
#[derive(Clone, Copy, Default)]
struct Counted {
    /// Bytes queued for the client.
    queued: usize,
    /// What the queue and the socket hold for this connection alone.
    outbound: usize,
    /// Publications that wait for room in the broker's queue.
    blocked: usize,
}

/// What carries a connection.
enum Carrier {
    /// The upgrade or the response is on its way.
    Coming,
    /// A WebSocket.
    Socket { stream: Stream, shut: bool },
    /// The body of an HTTP response; the handle ends the HTTP connection around it.
    Response(AbortHandle),
    /// Nothing any more.
    Gone,
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its subscriptions are being made; publications queue up already.
    Admitting,
    /// Everything works.
    Open,
    /// The last words are on their way.
    Closing(CloseReason),
}

/// What a new connection starts with.
pub struct Start {
    pub session: Session,
    pub name: ProtocolName,
    /// What was agreed on about compression.
    pub deflate: Option<Deflate>,
    pub now: Tick,
    /// When the client must have begun its session, unless the door was the beginning.
    pub begin_by: Tick,
    /// When it is first pinged.
    pub first_ping: Tick,
    /// Its place among the connections of its address, if that is known by its request only.
    pub seat: Option<Arc<Seat>>,
}

impl Connection {
    /// A connection that is not carried by anything yet.
    pub fn new(key: ConnectionKey, start: Start) -> Self {
        let Start { session, name, deflate, now, begin_by, first_ping, seat } = start;
        let mut decoder = Decoder::new();
        if deflate.is_some() {
            decoder.allow_deflate();
        }
        Self {
            key,
            id: session.id(),
            deflate,
            name,
            session: RefCell::new(session),
            memberships: RefCell::default(),
            outbound: RefCell::default(),
            carrier: RefCell::new(Carrier::Coming),
            decoder: RefCell::new(decoder),
            phase: Cell::new(Phase::Admitting),
            opened: Cell::new(false),
            waker: RefCell::default(),
            dirty: Cell::new(false),
            wants_write: Cell::new(false),
            offered: Cell::new(false),
            ping_due: Cell::new(false),
            doomed: Cell::new(None),
            deaf: Cell::new(false),
            in_flight: Cell::new(0),
            unpaid: Cell::new(0),
            blocked: RefCell::default(),
            counted: Cell::default(),
            holds: Cell::new(false),
            born: now,
            heard: Cell::new(now),
            asked: Cell::new(Tick::NEVER),
            asking: Cell::new(false),
            next_ping: Cell::new(first_ping),
            begin_by: Cell::new(begin_by),
            due: Cell::new(Tick::default()),
            close_by: Cell::new(Tick::default()),
            _seat: seat,
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

    /// Its subscriptions stand. Returns false if it has begun to close in the meantime.
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

    /// The number of the first thing said in `room` that is said to this connection.
    pub fn since(&self, room: &RoomName) -> u64 {
        self.memberships.borrow().get(room).map_or(u64::MAX, |membership| membership.since)
    }

    /// How publications of `room` are written for this connection, which `request` subscribed to it.
    pub fn encoding(&self, room: &RoomName, request: RequestId) -> (Encoding, Option<Rc<MemberState>>) {
        let mut session = self.session.borrow_mut();
        let RoomFormat { format, variant, state } = session.format(room, request);
        let Framing { transport, wrap } = session.framing();
        let encoding = Encoding::new(format, transport).with_variant(variant).with_wrap(wrap);
        (encoding.with_deflate(self.deflate), state)
    }

    /// Queues what the protocol sends before everything else.
    pub fn greet(&self, worker: &Worker) {
        let mut packets = worker.take_packets();
        self.session.borrow_mut().greet(worker.spread(), &mut packets);
        if let Some(greeting) = packets.take_joined() {
            self.queue(worker, greeting.into(), Lane::Session);
        }
        worker.give_packets(packets);
    }

    // ---- what the shard's turn does ----

    /// Other settings count now: what waits was queued by the old ones.
    pub fn seal_outbound(&self) {
        self.outbound.borrow_mut().seal();
    }

    /// Tells the session of a gap.
    pub fn gap(&self, worker: &Worker, room: &RoomName, cause: GapCause) {
        let mut effects = worker.take_effects();
        self.session.borrow_mut().gap(room, cause, &mut effects);
        self.run(worker, &mut effects);
        worker.give_effects(effects);
    }

    /// The broker has taken one of the session's publications, or has not.
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

    /// The broker has acknowledged a room that the session asked for, or has not. Returns whether the session
    /// is to be a member now.
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

    /// Does what is due and says when to come back.
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
                // What the client has said already is read before it is late; once.
                let unheard = reason == CloseReason::Stale && self.has_unread();
                if self.begin_by.replace(Tick::default()) > Tick::default() && unheard {
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
                // Only a WebSocket's client answers; for the others the kernel's time-outs watch.
                if now >= self.silent_by(worker) {
                    if !self.has_unread() {
                        self.begin_close(worker, CloseReason::HeartbeatTimeout);
                        return Some(self.close_by.get());
                    }
                    self.hear(now);
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

    /// Begins to ask anew whether the peer is there: it has not been asked in time for another
    /// `heartbeat.timeout`, and must not be closed for that.
    pub fn begin_heartbeat(&self, worker: &Worker) {
        if matches!(self.phase.get(), Phase::Closing(_)) {
            return;
        }
        if let Carrier::Socket { stream, .. } = &*self.carrier.borrow() {
            stream.set_patience(worker.settings().heartbeat.timeout);
        }
        let now = worker.now();
        self.hear(now);
        self.next_ping.set(now.after(self.heartbeat_interval(worker).mul_f32(worker.spread())));
        let first = self.next_ping.get().min(self.expires(now)).min(self.ages(worker));
        worker.set_timer(Tick(first.0.max(now.0 + 1)), self);
    }

    fn heartbeat_interval(&self, worker: &Worker) -> Duration {
        let interval = worker.settings().heartbeat.interval;
        self.session.borrow().timing().promised.map_or(interval, |promised| interval.min(promised))
    }

    /// The peer has said something.
    fn hear(&self, now: Tick) {
        self.heard.set(now);
        self.asked.set(Tick::NEVER);
    }

    /// The kernel has a ping for the peer.
    fn ask(&self, worker: &Worker) {
        self.asked.set(self.asked.get().min(worker.now()));
        let silent_by = self.silent_by(worker);
        if silent_by < self.due.get() && self.phase.get() == Phase::Open {
            worker.set_timer(silent_by, self);
        }
    }

    /// When the peer will have been silent for too long: no byte for `heartbeat.timeout`, and none since it was asked,
    /// for which it has as long as it would have had if it had been asked in time. A ping that waits behind what the
    /// peer does not read is no question.
    fn silent_by(&self, worker: &Worker) -> Tick {
        let timeout = worker.settings().heartbeat.timeout;
        let to_answer = timeout.saturating_sub(self.heartbeat_interval(worker));
        self.heard.get().after(timeout).max(self.asked.get().after(to_answer))
    }

    /// When its time is over, by the shard's clock.
    ///
    /// A token ends in real time, whether the node has run in the meantime or not.
    pub fn expires(&self, now: Tick) -> Tick {
        let ends = self.session.borrow().ends();
        ends.map_or(self.begin_by.get(), |at| now.after(at.since(SystemTime::now().into())))
    }

    /// The shard's clock has stood still: the end of a token may be nearer than was thought.
    pub fn set_expiry_timer(&self, worker: &Worker, now: Tick) {
        let expires = self.expires(now);
        if expires < self.due.get() && !matches!(self.phase.get(), Phase::Closing(_)) {
            worker.set_timer(expires, self);
        }
    }

    /// Whether the peer has sent something that has not been read.
    fn has_unread(&self) -> bool {
        matches!(&*self.carrier.borrow(), Carrier::Socket { stream, .. } if stream.has_unread())
    }

    /// When the session is old enough to be sent on.
    fn ages(&self, worker: &Worker) -> Tick {
        worker.end_of_age(self.id, self.born)
    }

    /// Asks the peer whether it is there. Most connections are idle when they are asked: their queue, empty, stays
    /// without memory. A ping that does not fit into the queue is left out: the peer has more than enough to read
    /// already, and a room's policy may keep the queue full for as long as the peer is slow.
    fn ping(&self, worker: &Worker) {
        if matches!(self.phase.get(), Phase::Closing(_)) {
            return;
        }
        let mut packets = worker.take_packets();
        self.session.borrow_mut().heartbeat(&mut packets);
        if !packets.is_empty() && !self.send_past_queue(worker, &packets, Lane::Heartbeat) {
            let limit = worker.settings().limits.outbound.get();
            let ping = Bytes::copy_from_slice(packets.bytes());
            if self.outbound.borrow_mut().push(ping, Lane::Heartbeat, limit).is_ok() {
                self.count_outbound(worker);
            }
        }
        packets.clear();
        worker.give_packets(packets);
    }

    /// Starts to end the connection: it leaves its rooms, hears its last words, and is cut off if it does
    /// not close its side in time. The first reason counts.
    pub fn begin_close(&self, worker: &Worker, reason: CloseReason) {
        self.close_with(worker, reason, None);
    }

    /// Likewise, with last words that the protocol does not choose.
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
            let farewell = || {
                let mut packets = worker.take_packets();
                self.session.borrow_mut().farewell(reason, worker.spread(), &mut packets);
                let words = packets.take_joined();
                worker.give_packets(packets);
                words
            };
            if let Some(words) = words.or_else(farewell) {
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

    // ---- what both do ----

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
                // The farewell is the last that a client hears (for a WebSocket, RFC 6455 section 5.5.1).
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

    /// What carries the connection has come to its end, by this error or at the peer's wish.
    fn lost(&self, worker: &Worker, error: Option<&io::Error>) {
        let timed_out = error.is_some_and(|error| error.kind() == io::ErrorKind::TimedOut);
        let reason = if timed_out { CloseReason::NoProgress } else { CloseReason::Lost };
        self.begin_close(worker, reason);
        self.cut();
    }

    /// Lets go of what carries the connection: it has come to its own end.
    pub fn detach(&self) {
        self.carrier.replace(Carrier::Gone);
    }

    /// Ends what carries the connection, whatever is still queued.
    fn cut(&self) {
        match self.carrier.replace(Carrier::Gone) {
            Carrier::Response(http) => http.abort(),
            Carrier::Coming | Carrier::Socket { .. } | Carrier::Gone => {}
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

/// Whoever holds the lease keeps the connection in its shard's tables; dropped, in whatever way, the
/// connection is gone from them.
pub struct Lease {
    pub worker: Rc<Worker>,
    pub connection: Rc<Connection>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.worker.forget(&self.connection);
    }
}

impl Lease {
    /// Carries the connection over its socket until it is over.
    pub fn serve_socket(self) -> impl Future<Output = ()> {
        poll_fn(move |cx| self.connection.poll_socket(&self.worker, cx))
    }
}

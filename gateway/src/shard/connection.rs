//! One connection of a shard: a session, its outbound queue and its transport.
//!
//! It begins to close in one place ([`Connection::begin_close`]) and is removed in one place
//! ([`Core::forget`](super::Core::forget)). Its methods get the [`State`] of the shard besides it, so they can
//! change anything but other connections. What concerns others too (leaving rooms) is left in the state, and
//! the core does it before it returns to its driver.
//!
//! # Idle cost
//!
//! Most connections are idle most of the time, and their memory limits how many a node can hold. An idle
//! WebSocket holds no buffer (the driver lends one for a read), no timer (the shard's
//! [`Timers`](super::timers::Timers) hold its key) and no frames.

mod holding;
mod input;
mod queue;
mod write;

pub use self::{holding::NOTABLE, input::Output, queue::BatchDelivery};

use std::{collections::VecDeque, io, rc::Rc, sync::Arc, time::Duration};

use broker_bridge::{
    Accepted, BrokerError, Cursor, GapCause, Publication, PublishRequest, Receipt, ReceiptSink, RoomName,
    SessionId, Ticket,
};
use bytes::Bytes;
use slotmap::{Key as _, SlotMap, new_key_type};

use super::{
    catchup::{CatchingUp, NEVER},
    joins::{Join, JoinKey},
    outbound::{Lane, Outbound},
    reads::Reads,
    rooms::Memberships,
    state::{Action, NotAdmitted, State},
    tally::Tally,
    transport::{Response as _, Socket as _, Transport},
};
use crate::{
    clock::Tick,
    framing::{Encoding, Framing, MemberState},
    history::Beginning,
    limits::ConnectionPermit,
    protocol::{History, Recover, RequestId, RoomFormat, Subscribed},
    session::{Effect, Effects, Session},
    vocabulary::{CloseReason, ProtocolName, ReplyError},
    websocket::{Decoder, Deflate},
};

new_key_type! {
    /// Identifies a connection within its shard. Never reused while anything may still refer to it.
    pub struct ConnectionKey;
}

/// The connections of a shard. Boxed, so that the table does not move them when it grows.
pub type Connections<T> = SlotMap<ConnectionKey, Box<Connection<T>>>;

/// How long a peer may take to read the close frame and close its side.
pub const LINGER: Duration = Duration::from_secs(5);
/// How long a client may take to read the end of an answer.
const ANSWER_LINGER: Duration = Duration::from_secs(60);
/// An answer with this many publications ends, even if there are more.
const FULL_ANSWER: u64 = 1000;
/// How many publications of one session may wait for the broker's acknowledgement. At this limit the session
/// is not read, so one busy client cannot fill the queue shared by all.
const MAX_IN_FLIGHT: u32 = 64;

/// One connection.
#[expect(clippy::struct_excessive_bools, reason = "independent facts of one byte each")]
pub struct Connection<T: Transport> {
    key: ConnectionKey,
    id: SessionId,
    deflate: Option<Deflate>,
    /// See [`usual_encoding`](Self::usual_encoding).
    encoding: Option<Encoding>,
    name: ProtocolName,
    session: Session,
    pub(super) memberships: Memberships,
    outbound: Outbound,
    attachment: Attachment<T>,
    decoder: Decoder,
    phase: Phase,
    /// Whether it has ever been open.
    opened: bool,
    /// What it waits for from the broker: before it is open, the rooms that its request named.
    pub(super) joins: Vec<JoinKey>,
    /// Whether it is in the shard's list of connections to write in this turn.
    pub(super) dirty: bool,
    /// The socket is full, and the connection waits until it is writable. Likewise for a response.
    wants_write: bool,
    /// The response has been woken for waiting output and has not taken any since.
    offered: bool,
    /// A heartbeat is due at the end of the turn.
    ping_due: bool,
    /// Set if the last delivery could not be queued; the connection closes for this reason at the end of the
    /// turn.
    close_after_turn: Option<CloseReason>,
    /// Input from the client is no longer parsed.
    ignores_input: bool,
    /// Its driver has let go of it. It is removed once it has left its rooms.
    pub(super) forgotten: bool,
    /// The rooms in which it catches up.
    pub(super) catching_up: Option<Box<CatchingUp>>,
    /// What it reads of rooms' histories.
    pub(super) reads: Option<Box<Reads>>,
    in_flight: u32,
    /// Bytes of an incomplete message that have not been charged yet.
    unpaid: u32,
    /// Publications that did not fit into the broker's queue, in order. The session is not read while there
    /// are any.
    blocked: VecDeque<PublishRequest>,
    /// What the tallies include of its outbound queue and blocked publications.
    counted: Counted,
    /// Whether it is in the shard's list of connections that hold memory.
    pub(super) holds: bool,
    created: Tick,
    /// When the last byte was received.
    last_received: Tick,
    /// When a ping was handed to the kernel, if no byte has been received since.
    pinged_at: Tick,
    /// A ping has left the queue, but TLS may not have passed it to the kernel yet.
    ping_in_tls: bool,
    next_ping: Tick,
    /// The client has to begin its session before this, unless the request already did.
    begin_deadline: Tick,
    /// The tick of its current timer entry in the shard.
    due: Tick,
    close_by: Tick,
    /// When the session ends if it is one answer, even if there is nothing to answer. Never for a stream.
    answer_by: Tick,
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
    /// Bytes of messages that wait for the verification of a token.
    behind: usize,
}

/// The transport of a connection.
enum Attachment<T: Transport> {
    /// The upgrade or the response is still being prepared.
    Pending,
    /// A WebSocket.
    Socket { socket: T::Socket, shut: bool },
    /// The body of an HTTP response.
    Response(T::Response),
    /// None any more.
    Detached,
}

/// What a connection waits for from its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Input.
    pub read: bool,
    /// Space for output.
    pub write: bool,
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
    /// Its session.
    pub session: Session,
    /// The protocol's name.
    pub name: ProtocolName,
    /// The negotiated compression.
    pub deflate: Option<Deflate>,
    /// Its connection permit for the client's address, if the address was known only from the request.
    pub permit: Option<Arc<ConnectionPermit>>,
}

impl<T: Transport> Connection<T> {
    /// A connection that has no transport yet. The client has to begin its session by `begin_deadline`,
    /// unless the request already did.
    pub fn new(key: ConnectionKey, start: Start, now: Tick, begin_deadline: Tick, first_ping: Tick) -> Self {
        let Start { session, name, deflate, permit } = start;
        let mut decoder = Decoder::new();
        if deflate.is_some() {
            decoder.allow_deflate();
        }
        let answer_by = session.patience().map_or(Tick::NEVER, |patience| now.after(patience));
        Self {
            key,
            id: session.id(),
            deflate,
            encoding: None,
            name,
            session,
            memberships: Memberships::default(),
            outbound: Outbound::default(),
            attachment: Attachment::Pending,
            decoder,
            phase: Phase::Admitting,
            opened: false,
            joins: Vec::new(),
            dirty: false,
            wants_write: false,
            offered: false,
            ping_due: false,
            close_after_turn: None,
            ignores_input: false,
            forgotten: false,
            catching_up: None,
            reads: None,
            in_flight: 0,
            unpaid: 0,
            blocked: VecDeque::new(),
            counted: Counted::default(),
            holds: false,
            created: now,
            last_received: now,
            pinged_at: Tick::NEVER,
            ping_in_tls: false,
            next_ping: first_ping,
            begin_deadline,
            due: Tick::default(),
            close_by: Tick::default(),
            answer_by,
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
        self.due
    }

    pub fn set_due(&mut self, at: Tick) {
        self.due = at;
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Marks the subscriptions as active. Returns false if the connection has begun to close in the meantime.
    pub fn open(&mut self) -> bool {
        let admitting = self.phase == Phase::Admitting;
        if admitting {
            self.phase = Phase::Open;
            self.opened = true;
        }
        admitting
    }

    pub fn was_open(&self) -> bool {
        self.opened
    }

    /// The number of the first message in `room` that this connection receives.
    pub fn since(&self, room: &RoomName) -> u64 {
        self.memberships.get(room).map_or(u64::MAX, |membership| membership.since)
    }

    /// The number of the first broadcast in `room` that this connection receives, if the room has a history.
    pub fn from(&self, room: &RoomName) -> u64 {
        self.memberships.get(room).map_or(NEVER, |membership| membership.from)
    }

    /// Whether it is told of a gap with this number. One that catches up finds it in the room's ring. A gap without a
    /// number is this shard's own, and nothing is missing in the ring.
    pub fn receives_gap(&self, room: &RoomName, number: u64) -> bool {
        let from = self.from(room);
        from <= number || (number == 0 && from != NEVER)
    }

    /// How publications of `room` are encoded for this connection, whose `request` subscribed to it.
    pub fn encoding_of(
        &mut self,
        room: &RoomName,
        request: RequestId,
    ) -> (Encoding, Option<Rc<MemberState>>) {
        let RoomFormat { format, variant, state } = self.session.format(room, request);
        let Framing { transport, wrap } = self.session.framing();
        let encoding = Encoding::new(format, transport).with_variant(variant).with_wrap(wrap);
        let state = state.or_else(|| encoding.has_heads().then(Rc::default));
        (encoding.with_deflate(self.deflate), state)
    }

    /// The encoding of most of its rooms: that of the first one.
    pub fn usual_encoding(&mut self, first: Encoding) -> Encoding {
        *self.encoding.get_or_insert(first)
    }

    /// Whether the session is one answer.
    pub fn is_answer(&self) -> bool {
        self.answer_by != Tick::NEVER
    }

    /// When the session ends if it is one answer.
    pub fn answer_by(&self) -> Tick {
        self.answer_by
    }

    /// Whether the session is an answer that is complete.
    fn is_answered(&self, now: Tick) -> bool {
        if !self.is_answer() || self.phase != Phase::Open {
            return false;
        }
        let count = self.session.answered();
        count >= FULL_ANSWER || (!self.is_catching_up() && (count > 0 || now >= self.answer_by))
    }

    /// Queues the message that the protocol sends first, if any.
    pub fn greet(&mut self, shard: &mut State) {
        let mut packets = shard.take_packets();
        self.session.greet(shard.spread(), &mut packets);
        if let Some(greeting) = packets.take_joined() {
            self.queue(shard, greeting.into(), Lane::Session);
        }
        shard.give_packets(packets);
    }

    // ---- called from the shard's turn ----

    /// New settings apply: what is queued now was ordered by the old ones.
    pub fn seal_outbound(&mut self) {
        self.outbound.seal();
    }

    /// Notifies the session of a gap.
    pub fn gap(&mut self, shard: &mut State, room: &RoomName, cause: GapCause) {
        let mut effects = shard.take_effects();
        self.session.gap(room, cause, &mut effects);
        self.run(shard, &mut effects);
        shard.give_effects(effects);
    }

    /// Tells the session that positions in the room have another epoch from here on.
    pub fn new_epoch(&mut self, shard: &mut State, room: &RoomName) {
        let mut effects = shard.take_effects();
        self.session.new_epoch(room, &mut effects);
        self.run(shard, &mut effects);
        shard.give_effects(effects);
    }

    /// Tells the session where it begins in a room with a history.
    pub fn positioned(&mut self, shard: &mut State, room: &RoomName, position: Cursor) {
        let mut effects = shard.take_effects();
        self.session.positioned(room, position, &mut effects);
        self.run(shard, &mut effects);
        shard.give_effects(effects);
    }

    /// Replies to a request for a part of a room's history.
    pub fn tell_history(
        &mut self,
        shard: &mut State,
        request: RequestId,
        outcome: Result<History<'_>, ReplyError>,
    ) {
        let mut effects = shard.take_effects();
        self.session.history(request, outcome, &mut effects);
        self.run(shard, &mut effects);
        shard.give_effects(effects);
    }

    /// The broker has accepted or refused one of the session's publications.
    pub fn settled(&mut self, shard: &mut State, request: u64, outcome: Result<Accepted, BrokerError>) {
        let was_full = self.in_flight >= MAX_IN_FLIGHT;
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Err(error) = &outcome {
            tracing::debug!(session = %self.id, %error, "a publication was not delivered");
        }
        let mut effects = shard.take_effects();
        let request = RequestId::try_from(request).expect("a ticket holds the id of a request");
        self.session.settled(request, &outcome.map(drop), &mut effects);
        self.run(shard, &mut effects);
        shard.give_effects(effects);
        if was_full {
            self.wake();
        }
    }

    /// The broker has accepted or refused a subscription that the session asked for. `None` if the session does not
    /// become a member; otherwise how many of the missed publications it has got with the reply.
    pub fn joined(
        &mut self,
        shard: &mut State,
        request: RequestId,
        room: &RoomName,
        outcome: Result<Subscribed<'_>, ReplyError>,
    ) -> Option<usize> {
        if matches!(self.phase, Phase::Closing(_)) {
            return None;
        }
        let mut effects = shard.take_effects();
        let member = self.session.joined(request, room, outcome, &mut effects);
        self.run(shard, &mut effects);
        shard.give_effects(effects);
        member
    }

    /// Handles what is due and returns when to call again.
    pub fn on_timer(&mut self, shard: &mut State, now: Tick) -> Option<Tick> {
        match self.phase {
            Phase::Closing(_) => {
                if now < self.close_by {
                    return Some(self.close_by);
                }
                self.cut();
                None
            }
            Phase::Admitting | Phase::Open if now >= self.expires(shard, now) => {
                let reason = self.session.expired();
                // Before closing as stale, read what the client has already sent, once.
                let unread = reason == CloseReason::Stale && self.has_unread();
                if std::mem::take(&mut self.begin_deadline) > Tick::default() && unread {
                    return Some(now);
                }
                self.begin_close(shard, reason);
                Some(self.close_by)
            }
            Phase::Admitting => {
                let beat = now.after(self.heartbeat_interval(shard));
                Some(beat.min(self.expires(shard, now)).min(self.answer_by))
            }
            Phase::Open if now >= self.answer_by && !self.is_catching_up() => {
                self.begin_close(shard, CloseReason::Answered);
                Some(self.close_by)
            }
            Phase::Open if now >= self.ages(shard) => {
                self.begin_close(shard, CloseReason::MaxAge);
                Some(self.close_by)
            }
            Phase::Open => {
                // Only WebSocket clients answer pings. For other transports the kernel's timeouts apply.
                if now >= self.silent_by(shard) {
                    if !self.has_unread() {
                        self.begin_close(shard, CloseReason::HeartbeatTimeout);
                        return Some(self.close_by);
                    }
                    self.note_received(now);
                }
                if now >= self.next_ping {
                    self.outbound.release();
                    self.next_ping = now.after(self.heartbeat_interval(shard));
                    self.ping_due = true;
                    self.touch(shard);
                }
                let silent_by = self.silent_by(shard);
                let ends = self.expires(shard, now).min(self.ages(shard)).min(self.answer_by);
                Some(self.next_ping.min(silent_by).min(ends))
            }
        }
    }

    /// Restarts the heartbeat after a change of settings. The peer was not pinged in time for the new
    /// `heartbeat.timeout` and must not be closed for that.
    pub fn begin_heartbeat(&mut self, shard: &mut State) {
        if matches!(self.phase, Phase::Closing(_)) {
            return;
        }
        if let Attachment::Socket { socket, .. } = &mut self.attachment {
            socket.set_heartbeat_timeout(shard.settings.heartbeat.timeout);
        }
        let now = shard.now;
        self.note_received(now);
        let interval = self.heartbeat_interval(shard);
        self.next_ping = now.after(interval.mul_f32(shard.spread()));
        let first = self.next_ping.min(self.expires(shard, now)).min(self.ages(shard)).min(self.answer_by);
        shard.set_timer(Tick(first.0.max(now.0 + 1)), self);
    }

    fn heartbeat_interval(&self, shard: &State) -> Duration {
        let interval = shard.settings.heartbeat.interval;
        self.session.timing().promised.map_or(interval, |promised| interval.min(promised))
    }

    /// Records that the peer has sent something.
    fn note_received(&mut self, now: Tick) {
        self.last_received = now;
        self.pinged_at = Tick::NEVER;
    }

    /// Records that the kernel has taken a ping for the peer.
    fn note_pinged(&mut self, shard: &mut State) {
        self.pinged_at = self.pinged_at.min(shard.now);
        let silent_by = self.silent_by(shard);
        if silent_by < self.due && self.phase == Phase::Open {
            shard.set_timer(silent_by, self);
        }
    }

    /// When the peer counts as gone: it has sent nothing for `heartbeat.timeout`, and nothing since it was
    /// pinged, for as long as it would have had to answer a ping sent in time. A ping that is queued behind
    /// unread output does not count as sent.
    fn silent_by(&self, shard: &State) -> Tick {
        let timeout = shard.settings.heartbeat.timeout;
        let to_answer = timeout.saturating_sub(self.heartbeat_interval(shard));
        self.last_received.after(timeout).max(self.pinged_at.after(to_answer))
    }

    /// When its session expires, by the shard's clock.
    ///
    /// A token expires in real time, even if the node was suspended in the meantime.
    pub fn expires(&self, shard: &State, now: Tick) -> Tick {
        let ends = self.session.ends();
        ends.map_or(self.begin_deadline, |at| now.after(at.since(shard.context.time.unix().into())))
    }

    /// The shard's clock has been paused, so the token may expire earlier than the timer was set for.
    pub fn set_expiry_timer(&mut self, shard: &mut State, now: Tick) {
        let expires = self.expires(shard, now);
        if expires < self.due && !matches!(self.phase, Phase::Closing(_)) {
            shard.set_timer(expires, self);
        }
    }

    /// Whether the peer has sent something that has not been read yet.
    fn has_unread(&mut self) -> bool {
        match &mut self.attachment {
            Attachment::Socket { socket, .. } => socket.has_unread(),
            Attachment::Pending | Attachment::Response(_) | Attachment::Detached => false,
        }
    }

    /// When the session reaches its age limit.
    fn ages(&self, shard: &State) -> Tick {
        shard.end_of_age(self.id, self.created)
    }

    /// Pings the peer. Most connections are idle when pinged, so an empty queue is bypassed and stays without
    /// memory. A ping that does not fit into the queue is skipped: the peer has enough to read already, and a
    /// room's overflow policy may keep the queue full for as long as the peer is slow.
    fn ping(&mut self, shard: &mut State) {
        if matches!(self.phase, Phase::Closing(_)) {
            return;
        }
        let mut packets = shard.take_packets();
        self.session.heartbeat(&mut packets);
        if !packets.is_empty() && !self.send_past_queue(shard, &packets, Lane::Heartbeat) {
            let limit = shard.settings.limits.outbound.get();
            let ping = packets.to_bytes();
            if self.outbound.push(ping, Lane::Heartbeat, limit).is_ok() {
                self.count_outbound(shard);
            }
        }
        packets.clear();
        shard.give_packets(packets);
    }

    /// Begins to close the connection: it leaves its rooms, sends its final message, and is cut off if the
    /// peer does not close its side in time. Only the first reason counts.
    pub fn begin_close(&mut self, shard: &mut State, reason: CloseReason) {
        self.close_with(shard, reason, None);
    }

    /// Likewise, with `words` instead of the protocol's final message.
    fn close_with(&mut self, shard: &mut State, reason: CloseReason, words: Option<Bytes>) {
        if matches!(self.phase, Phase::Closing(_)) {
            return;
        }
        // A reason that waits for the end of the turn was the first.
        let (reason, words) = self.close_after_turn.take().map_or((reason, words), |first| (first, None));
        if reason == CloseReason::SlowConsumer {
            Tally::add(&shard.tally.slow_consumers, 1);
        }
        let admitting = std::mem::replace(&mut self.phase, Phase::Closing(reason)) == Phase::Admitting;
        if admitting {
            shard.actions.push_back(Action::Admitted(self.key, Err(NotAdmitted::Closed(reason))));
        }
        self.abandon_joins(shard);
        shard.leave_rooms(self.key);
        self.drop_blocked(shard);
        self.drop_behind(shard);
        self.reads = None;
        if reason == CloseReason::OutOfMemory {
            self.drop_incomplete(shard);
        }
        if matches!(reason, CloseReason::SlowConsumer | CloseReason::OutOfMemory) {
            self.outbound.clear();
        }
        let words = words.or_else(|| {
            let mut packets = shard.take_packets();
            self.session.farewell(reason, shard.spread(), &mut packets);
            let words = packets.take_joined();
            shard.give_packets(packets);
            words
        });
        if let Some(words) = words {
            self.outbound.push_last(words);
        }
        self.count_outbound(shard);
        let is_readable =
            self.is_answer() && !matches!(reason, CloseReason::SlowConsumer | CloseReason::OutOfMemory);
        self.close_by = shard.now.after(if is_readable { ANSWER_LINGER } else { LINGER });
        shard.set_timer(self.close_by, self);
        self.touch(shard);
        self.wake();
    }

    /// A room that its request named was refused: the connection does not get into service.
    pub fn give_up(&mut self, shard: &mut State, why: NotAdmitted) {
        if self.phase == Phase::Admitting {
            self.phase = Phase::Closing(CloseReason::Lost);
            shard.actions.push_back(Action::Admitted(self.key, Err(why)));
            self.abandon_joins(shard);
            shard.leave_rooms(self.key);
        }
    }

    /// Joins a room once the broker acknowledges it. A session that has asked for the room by a request
    /// becomes a member at the same moment as it gets the reply: it receives everything that is published
    /// after that. Publications that were on their way to the node may come first.
    pub fn await_join(
        &mut self,
        shard: &mut State,
        room: RoomName,
        request: Option<RequestId>,
        beginning: impl Into<Beginning>,
        recover: Option<Recover>,
    ) {
        let join = shard.join(Join { connection: self.key, room, request, recover }, beginning);
        self.joins.push(join);
    }

    fn abandon_joins(&mut self, shard: &mut State) {
        for key in std::mem::take(&mut self.joins) {
            let Some(join) = shard.joins.end(key) else { continue };
            shard.actions.push_back(Action::Abandon(key));
            // Rooms that its request named are among its rooms already.
            if join.request.is_some() {
                shard.context.hub.leave(&join.room, shard.index);
            }
        }
    }

    // ---- called from both ----

    fn run(&mut self, shard: &mut State, effects: &mut Effects) {
        for effect in effects.drain() {
            match effect {
                Effect::Publish(request, room, publication) => {
                    self.publish(shard, request, room, publication);
                }
                Effect::Join(request, room, recover) => {
                    let since = recover.map(|recover| recover.since);
                    self.await_join(shard, room, Some(request), since, recover);
                }
                Effect::History(request, room, query) => self.read_history(shard, request, room, query),
                Effect::Leave(room) => shard.leave(self.key, room),
                Effect::Refused(failure) => shard.actions.push_back(Action::TokenRefused(self.id, failure)),
                Effect::Verify(token) => shard.actions.push_back(Action::Verify(self.key, token)),
                Effect::Limited(limit) => shard.context.metrics.limited(limit),
                Effect::Expires(_) => self.set_expiry_timer(shard, shard.now),
                // Nothing follows the final message (for a WebSocket, RFC 6455 section 5.5.1).
                Effect::Send(_) if matches!(self.phase, Phase::Closing(_)) => {}
                Effect::Send(bytes) => {
                    self.queue(shard, bytes.into(), Lane::Session);
                    self.touch(shard);
                }
                Effect::Close(reason) => self.begin_close(shard, reason),
            }
        }
    }

    fn publish(&mut self, shard: &mut State, request: RequestId, room: RoomName, publication: Publication) {
        if matches!(self.phase, Phase::Closing(_)) {
            return;
        }
        let ticket = Ticket { owner: self.key.data().as_ffi(), request: request.into() };
        let inbox: Arc<dyn ReceiptSink> = shard.inbox.clone();
        let (affinity, receipt) = (shard.affinity(), Receipt::new(inbox, ticket));
        let history = shard.settings.history.of(&room);
        let request = PublishRequest { room, publication, history, id: None, affinity, receipt };
        self.in_flight += 1;
        if self.is_blocked() {
            self.block(shard, request);
        } else if let Err(request) = shard.context.broker.try_publish(request) {
            self.wait_for_broker(shard, request);
        }
    }

    /// The transport has ended, by this error or because the peer closed it.
    pub fn lost(&mut self, shard: &mut State, error: Option<&io::Error>) {
        let timed_out = error.is_some_and(|error| error.kind() == io::ErrorKind::TimedOut);
        let reason = if timed_out { CloseReason::NoProgress } else { CloseReason::Lost };
        self.begin_close(shard, reason);
        self.cut();
    }

    /// Marks the connection to be written before the turn ends.
    pub fn touch(&mut self, shard: &mut State) {
        if !self.dirty {
            self.dirty = true;
            shard.dirty.push_back(self.key);
        }
    }

    /// Drops the transport, which has ended by itself.
    pub fn detach(&mut self) {
        self.attachment = Attachment::Detached;
    }

    /// Cuts the transport, whatever is still queued.
    fn cut(&mut self) {
        self.wake();
        if let Attachment::Response(mut response) =
            std::mem::replace(&mut self.attachment, Attachment::Detached)
        {
            response.abort();
        }
    }

    /// Makes the driver look at the connection again.
    pub(super) fn wake(&mut self) {
        match &mut self.attachment {
            Attachment::Socket { socket, .. } => socket.wake(),
            Attachment::Response(response) => response.wake(),
            Attachment::Pending | Attachment::Detached => {}
        }
    }
}

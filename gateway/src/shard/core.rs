//! One shard: its tables, and what happens in a turn.

use std::{
    collections::VecDeque,
    io, mem,
    sync::Arc,
    time::{Duration, Instant},
};

use broker_bridge::{BrokerError, GapCause, RoomName, history::Page};
use bytes::Bytes;
use slotmap::KeyData;

use super::{
    Context, Inbox, ShardEvent,
    age::Age,
    batch::Batch,
    catchup::NEVER,
    connection::{Connection, ConnectionKey, Connections, Interest, Output, Phase, Start},
    fanout::Written,
    joins::{Join, JoinKey},
    relief::Holders,
    rooms::{Member, Rooms},
    rounds::{Rounds, SLICE},
    state::{Action, KEPT, Leave, NotAdmitted, State},
    tally::Tally,
    transport::Transport,
};
use crate::{
    auth::{AuthFailure, Identity},
    clock::{Clock, Tick},
    drain::Pace,
    history::Beginning,
    hub::Joined,
    protocol::{Recover, RequestId},
    settings::Settings,
    vocabulary::{CloseReason, Outcome, metrics::Label as _},
};

/// How long a client may take to begin its session, in protocols where the client sends a first message.
const TIME_TO_BEGIN: Duration = Duration::from_secs(15);

/// One shard, without a thread, a runtime, a clock or sockets of its own.
///
/// A driver calls it when something has happened, performs the [actions](Self::next_action) that result, and
/// calls [`Core::turn`] when the [inbox](Inbox) has events, until it is [`Turn::Idle`].
pub struct Core<T: Transport> {
    pub(super) state: State,
    pub(super) connections: Connections<T>,
    pub(super) rooms: Rooms,
    pub(super) rounds: Rounds,
    pub(super) holders: Holders,
    /// Events taken from the inbox and not handled yet.
    events: VecDeque<ShardEvent>,
    /// Broadcasts of one room that are delivered together.
    pub(super) batch: Batch,
    pub(super) written: Written,
    /// The inbox cost of the broadcasts finished since events were last taken.
    pub(super) done: usize,
    /// Whether the turn has come to its writes.
    is_writing: bool,
    /// Whether everything else must have its turn before the next one, although the inbox has events.
    pub(super) must_yield: bool,
    /// Whether the last turn closed sessions to free memory.
    is_relieving: bool,
    /// Rooms that connections have yet to leave, because there were too many for one turn.
    departures: VecDeque<(ConnectionKey, Vec<RoomName>)>,
    drain: Option<Draining>,
}

/// What follows a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing, until the inbox has events.
    Idle,
    /// Another turn, once everything else has had its turn.
    More,
    /// Nothing more, ever: the shard drains, and all its connections have ended.
    Drained,
    /// Nothing: it was told to stop.
    Stopped,
}

/// A drain in progress.
struct Draining {
    pace: Arc<Pace>,
    /// Connections that existed when it began and have not been closed, in no particular order.
    remaining: Vec<ConnectionKey>,
    /// How many of them this shard may close per tick.
    per_tick: usize,
}

impl<T: Transport> Core<T> {
    /// A shard without connections. Its random numbers are derived from `seed`.
    pub fn new(index: usize, context: Arc<Context>, inbox: Arc<Inbox>, now: Tick, seed: u64) -> Self {
        Self {
            state: State::new(index, context, inbox, now, seed),
            connections: Connections::default(),
            rooms: Rooms::default(),
            rounds: Rounds::default(),
            holders: Holders::default(),
            events: VecDeque::new(),
            batch: Batch::default(),
            written: Written::default(),
            done: 0,
            is_writing: false,
            must_yield: false,
            is_relieving: false,
            departures: VecDeque::new(),
            drain: None,
        }
    }

    /// The settings that applied at the beginning of the turn.
    pub fn settings(&self) -> &Settings {
        &self.state.settings
    }

    /// Whether the shard drains.
    pub fn is_draining(&self) -> bool {
        self.state.is_draining
    }

    /// The thread ends: settles what has been counted.
    pub fn end(&mut self) {
        self.state.settle_tally();
        self.state.context.budget.forget_fullest(self.state.index);
    }

    /// Takes the next thing that the driver has to do.
    pub fn next_action(&mut self) -> Option<Action> {
        self.state.actions.pop_front()
    }

    // ---- turns ----

    /// Handles some of what is in the inbox, or writes some of what results from it.
    pub fn turn(&mut self, now: Tick) -> Turn {
        self.refresh(now);
        if !self.is_writing {
            if self.handle_events() == Turn::Stopped {
                return Turn::Stopped;
            }
            self.serve_rounds();
            self.is_writing = true;
        }
        let is_written = self.write_slice();
        self.settle();
        if !is_written {
            return Turn::More;
        }
        self.is_writing = false;
        self.state.settle_tally();
        if !self.events.is_empty() || self.batch.len() > 0 {
            return Turn::More;
        }
        if self.events.capacity() > KEPT {
            self.events = VecDeque::new();
        }
        // Close only some sessions per turn, and serve the others in between.
        self.is_relieving = self.relieve(self.is_relieving);
        self.settle();
        self.depart();
        let has_late_joins = self.end_late_joins();
        if self.is_drained() {
            // The last turn, maybe: what has left by now counts.
            self.state.settle_tally();
            return Turn::Drained;
        }
        let must_yield = mem::take(&mut self.must_yield);
        if self.is_relieving
            || has_late_joins
            || must_yield
            || !self.rounds.is_empty()
            || !self.departures.is_empty()
        {
            return Turn::More;
        }
        Turn::Idle
    }

    /// Handles events until there are none, or there is much to write.
    fn handle_events(&mut self) -> Turn {
        if self.events.is_empty() {
            self.state.inbox.take(&mut self.events, mem::take(&mut self.done));
        }
        while let Some(event) = self.events.pop_front() {
            if !self.batch.may_wait(&event, self.state.settings.limits.outbound.get()) {
                self.deliver();
            }
            match event {
                ShardEvent::Broadcast(broadcast) => self.batch.push(broadcast),
                ShardEvent::Stop => return Turn::Stopped,
                event => self.handle(event),
            }
            // Write before a session's queue is full, so no session looks slow just because much arrived at
            // once. And don't let other work wait until everything that arrived has been delivered.
            if self.written.is_much(self.state.settings.limits.outbound.get()) {
                return Turn::More;
            }
        }
        self.deliver();
        Turn::Idle
    }

    /// Handles an event that is not a delivery.
    fn handle(&mut self, event: ShardEvent) {
        match event {
            ShardEvent::Gap(room, cause, number) => self.report_gap(&room, cause, number),
            ShardEvent::Overflow(room, number) => self.report_overflow(&room, number),
            ShardEvent::NewEpoch(room, number) => self.report_new_epoch(&room, number),
            ShardEvent::CatchUp(key) => self.catch_up(key),
            ShardEvent::Settled(ticket, outcome) => {
                self.with(KeyData::from_ffi(ticket.owner).into(), |connection, state| {
                    connection.settled(state, ticket.request, outcome);
                });
            }
            ShardEvent::Drain(pace) => self.begin_drain(pace),
            ShardEvent::Broadcast(_) | ShardEvent::Stop => {}
        }
    }

    fn refresh(&mut self, now: Tick) {
        self.state.now = now;
        let state = &mut self.state;
        if let Some(before) = state.context.settings.refresh(&mut state.settings) {
            state.meters.adopt(&state.settings.limits);
            self.adjust(&before);
        }
    }

    /// Does what is due. To be called once per [`Clock::STEP`].
    pub fn tick(&mut self, now: Tick) {
        self.refresh(now);
        while let Some((at, key)) = self.state.timers.take_due(now) {
            // An entry counts only if it is the connection's latest.
            if let Some(connection) = self.connections.get_mut(key)
                && connection.due() == at
                && let Some(next) = connection.on_timer(&mut self.state, now)
            {
                self.state.set_timer(Tick(next.0.max(now.0 + 1)), connection);
            }
        }
        self.note_fullest();
        self.close_share();
        self.settle();
    }

    /// The shard's clock was paused. Timers follow it; tokens expire in real time and may have expired.
    pub fn resume(&mut self, now: Tick) {
        self.refresh(now);
        for connection in self.connections.values_mut() {
            connection.set_expiry_timer(&mut self.state, now);
        }
    }

    /// Does what concerns more than one connection and was left to be done: nothing of it may wait until
    /// another event is handled.
    pub(super) fn settle(&mut self) {
        while let Some(leave) = self.state.leaving.pop() {
            match leave {
                Leave::Room(key, room) => self.leave(&room, key),
                Leave::All(key) => self.leave_rooms(key),
            }
        }
        self.note_holders();
    }

    /// Changes one connection. `None` if it has ended.
    fn with<R>(
        &mut self,
        key: ConnectionKey,
        change: impl FnOnce(&mut Connection<T>, &mut State) -> R,
    ) -> Option<R> {
        let connection = self.connections.get_mut(key)?;
        let result = change(connection, &mut self.state);
        self.settle();
        Some(result)
    }

    // ---- draining ----

    fn begin_drain(&mut self, pace: Arc<Pace>) {
        self.state.is_draining = true;
        let remaining: Vec<_> = self.connections.keys().collect();
        let per_tick = pace.join(remaining.len(), Clock::STEP);
        self.drain.get_or_insert(Draining { pace, remaining, per_tick });
        // Their clients come back soon anyway.
        for connection in self.connections.values_mut().filter(|connection| connection.is_answer()) {
            connection.begin_close(&mut self.state, CloseReason::Drain);
        }
        self.settle();
    }

    /// Closes as many sessions as the drain's pace allows in this tick.
    fn close_share(&mut self) {
        let share = self.drain.as_ref().map_or(0, |drain| drain.per_tick);
        let now = self.state.context.time.now();
        for _ in 0..share {
            let Some(key) = self.next_to_close(now) else { return };
            if let Some(connection) = self.connections.get_mut(key) {
                connection.begin_close(&mut self.state, CloseReason::Drain);
            }
        }
    }

    fn next_to_close(&mut self, now: Instant) -> Option<ConnectionKey> {
        let Draining { pace, remaining, .. } = self.drain.as_mut()?;
        loop {
            let key = *remaining.last()?;
            let closes = self
                .connections
                .get(key)
                .is_some_and(|connection| !matches!(connection.phase(), Phase::Closing(_)));
            // A session that ended by itself does not use up the pace.
            if closes && !pace.try_close(now) {
                return None;
            }
            remaining.pop();
            if closes {
                return Some(key);
            }
        }
    }

    /// Whether the shard drains and all its connections have ended.
    fn is_drained(&self) -> bool {
        self.drain.as_ref().is_some_and(|drain| drain.remaining.is_empty()) && self.connections.is_empty()
    }

    // ---- changed settings ----

    /// Applies new settings. Most are read where they are used; these are built into timers and queues.
    fn adjust(&mut self, before: &Settings) {
        let state = &mut self.state;
        let age = state.settings.max_session_age != before.max_session_age;
        let heartbeat = state.settings.heartbeat != before.heartbeat;
        if age {
            state.age = Age::new(state.settings.max_session_age, state.now);
        }
        self.rooms.set_policies(&state.settings.delivery);
        for connection in self.connections.values_mut() {
            connection.seal_outbound();
            if heartbeat || age {
                connection.begin_heartbeat(state);
            }
        }
    }

    // ---- connections ----

    /// Opens a connection, without a transport yet, and joins these rooms. [`Action::Admitted`] says when it
    /// is in service: everything that is published from then on reaches it, and in a room with a history first what
    /// `begin` says for the room. A room that `begin` does not reach is joined live.
    pub fn open(&mut self, start: Start, rooms: &[RoomName], begin: &[Beginning]) -> ConnectionKey {
        let state = &mut self.state;
        let now = state.now;
        let first_ping = now.after(state.settings.heartbeat.interval.mul_f32(0.5 + state.spread() / 2.0));
        let ages = state.end_of_age(start.session.id(), now);
        let key = self.connections.insert_with_key(|key| {
            Box::new(Connection::new(key, start, now, now.after(TIME_TO_BEGIN), first_ping))
        });
        let connection = self.connections.get_mut(key).expect("inserted above");
        let first = first_ping.min(ages).min(connection.expires(state, now)).min(connection.answer_by());
        state.set_timer(first, connection);
        connection.greet(state);
        for (index, room) in rooms.iter().enumerate() {
            let beginning = begin.get(index).copied().unwrap_or_default();
            let from = if self.state.settings.history.of(room).is_some() { NEVER } else { 0 };
            if self.join(room, 0, key, from) {
                let connection = self.connections.get_mut(key).expect("inserted above");
                if beginning.since().is_some() && from != NEVER {
                    connection.gap(&mut self.state, room, GapCause::Unrecorded);
                }
                connection.await_join(&mut self.state, room.clone(), None, beginning, None);
                self.locate(room);
            }
        }
        self.admit_if_joined(key);
        self.settle();
        key
    }

    fn admit_if_joined(&mut self, key: ConnectionKey) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if connection.joins.is_empty() && connection.open() {
            self.state.context.metrics.connection_opened(connection.name());
            self.state.actions.push_back(Action::Admitted(key, Ok(())));
        }
    }

    /// How many bytes are held for this connection: output for its client, publications for the broker, and
    /// an incomplete message.
    pub fn held_for(&self, key: ConnectionKey) -> usize {
        self.connections.get(key).map_or(0, |connection| connection.fullness())
    }

    /// How many bytes are queued for the client of this connection, with what each frame costs.
    pub fn queued_for(&self, key: ConnectionKey) -> usize {
        self.connections.get(key).map_or(0, |connection| connection.queued())
    }

    /// How many connections there are.
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// How many subscriptions wait for the broker.
    pub fn joining(&self) -> usize {
        self.state.joins.len()
    }

    /// Makes this socket the transport of the connection. `read_ahead` was read along with the handshake.
    pub fn attach_socket(&mut self, key: ConnectionKey, socket: T::Socket, read_ahead: &Bytes) {
        self.with(key, |connection, state| connection.attach_socket(state, socket, read_ahead));
    }

    /// Makes this response the transport of the connection.
    pub fn attach_response(&mut self, key: ConnectionKey, response: T::Response) {
        self.with(key, |connection, _| connection.attach_response(response));
    }

    /// The socket, and what the connection waits for from it. `None` if there is no socket any more: the
    /// driver then [forgets](Self::forget) the connection.
    pub fn socket(&mut self, key: ConnectionKey) -> Option<(&mut T::Socket, Interest)> {
        self.connections.get_mut(key)?.socket()
    }

    /// The response, if that is the transport.
    pub fn response(&mut self, key: ConnectionKey) -> Option<&mut T::Response> {
        self.connections.get_mut(key)?.response()
    }

    /// Handles input of the connection. Only while it waits for input.
    pub fn received(&mut self, key: ConnectionKey, bytes: &mut [u8]) {
        self.with(key, |connection, state| connection.received(state, bytes));
    }

    /// The connection's socket takes output again.
    pub fn writable(&mut self, key: ConnectionKey) {
        self.with(key, Connection::writable);
    }

    /// Takes the next output for a response.
    pub fn take_output(&mut self, key: ConnectionKey) -> Output {
        self.with(key, Connection::take_output).unwrap_or(Output::End)
    }

    /// The connection's transport has ended, by this error or because the peer closed it.
    pub fn lost(&mut self, key: ConnectionKey, error: Option<&io::Error>) {
        self.with(key, |connection, state| connection.lost(state, error));
    }

    /// Begins to close the connection.
    pub fn close(&mut self, key: ConnectionKey, reason: CloseReason) {
        self.with(key, |connection, state| connection.begin_close(state, reason));
    }

    /// The driver lets go of a connection: it has ended. It is removed once it has left its rooms.
    pub fn forget(&mut self, key: ConnectionKey) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if mem::replace(&mut connection.forgotten, true) {
            return;
        }
        let phase = connection.phase();
        connection.begin_close(&mut self.state, CloseReason::Lost);
        connection.detach();
        connection.release_memory(&mut self.state);
        let reason = match phase {
            Phase::Closing(reason) => reason,
            Phase::Admitting | Phase::Open => CloseReason::Lost,
        };
        if connection.was_open() {
            self.state.context.metrics.connection_closed(connection.name(), reason);
            tracing::debug!(session = %connection.id(), reason = reason.as_str(), "session ended");
        }
        self.settle();
        self.remove_if_forgotten(key);
    }

    fn remove_if_forgotten(&mut self, key: ConnectionKey) {
        let Some(connection) = self.connections.get(key) else { return };
        if connection.forgotten && connection.memberships.is_empty() {
            self.connections.remove(key);
        }
    }

    /// The broker's queue has taken a publication that was waiting, see [`Action::Publish`].
    pub fn handed_over(&mut self, key: ConnectionKey, cost: usize) {
        let handed_over = self.with(key, |connection, state| connection.handed_over(state, cost));
        if handed_over.is_none() {
            #[expect(clippy::cast_possible_wrap, reason = "a publication is bounded far below")]
            Tally::shift(&self.state.tally.publications_held, -(cost as i64));
        }
    }

    /// A part of a room's history has been read, or cannot be, see [`Action::ReadHistory`]. `None` if the room has no
    /// history.
    pub fn history_read(
        &mut self,
        key: ConnectionKey,
        request: RequestId,
        outcome: Option<&Result<Arc<Page>, BrokerError>>,
    ) {
        self.with(key, |connection, state| connection.history_read(state, request, outcome));
    }

    /// A token has been verified, see [`Action::Verify`].
    pub fn verified(&mut self, key: ConnectionKey, outcome: Result<Identity, AuthFailure>) {
        self.with(key, |connection, state| connection.verified(state, outcome));
    }

    // ---- rooms ----

    /// Makes the connection a member on this shard. Returns false if it is one already.
    fn join(&mut self, room: &RoomName, request: RequestId, key: ConnectionKey, from: u64) -> bool {
        let Some(connection) = self.connections.get_mut(key) else { return false };
        if connection.memberships.get(room).is_some() {
            return false;
        }
        let since = self.rounds.join(room);
        let (encoding, state) = connection.encoding_of(room, request);
        let member = Member::new(connection, encoding, state);
        let joined = self.rooms.join(room, connection, member, since, from, &self.state.settings.delivery);
        if joined {
            Tally::shift(&self.state.tally.subscriptions, 1);
        }
        joined
    }

    /// Tells the hub where the room is, if it is new on this shard. A member has joined it, here and there.
    fn locate(&mut self, room: &RoomName) {
        if let Some(place) = self.rooms.take_place(room) {
            self.state.context.hub.locate(room, self.state.index, place);
        }
    }

    /// Ends one membership of the connection, here and in the hub, if there is one.
    fn leave(&mut self, room: &RoomName, key: ConnectionKey) {
        if self.rooms.leave(room, key, &mut self.connections) {
            if let Some(connection) = self.connections.get_mut(key) {
                connection.stop_catching_up(room);
            }
            Tally::shift(&self.state.tally.subscriptions, -1);
            self.state.context.hub.leave(room, self.state.index);
        }
    }

    /// Ends all memberships of the connection, here and in the hub. If there are very many, a slice at a
    /// time.
    fn leave_rooms(&mut self, key: ConnectionKey) {
        let Some(connection) = self.connections.get(key) else { return };
        let mut rooms: Vec<_> = connection.memberships.rooms().cloned().collect();
        rooms.sort_unstable(); // the map has no order
        let rest = rooms.split_off(rooms.len().min(SLICE));
        for room in rooms {
            self.leave(&room, key);
        }
        if !rest.is_empty() {
            self.departures.push_back((key, rest));
        }
    }

    /// Leaves one slice of the rooms that are yet to be left.
    fn depart(&mut self) {
        let Some((key, mut rooms)) = self.departures.pop_front() else { return };
        for room in rooms.split_off(rooms.len().saturating_sub(SLICE)) {
            self.leave(&room, key);
        }
        if rooms.is_empty() {
            self.remove_if_forgotten(key);
        } else {
            self.departures.push_back((key, rooms));
        }
    }

    /// The broker has acknowledged or refused a subscription, see [`Action::Subscribe`].
    pub fn subscribed(&mut self, key: JoinKey, outcome: Result<Joined, BrokerError>) {
        self.end_join(key, outcome);
        self.settle();
    }

    fn end_join(&mut self, key: JoinKey, outcome: Result<Joined, BrokerError>) {
        let Some(Join { connection, room, request, recover }) = self.state.joins.end(key) else { return };
        let Some(member) = self.connections.get_mut(connection) else { return };
        member.joins.retain(|join| *join != key);
        if let Err(error) = &outcome {
            tracing::debug!(session = %member.id(), %error, "a subscription failed");
        }
        match request {
            None => self.end_admission(connection, &room, outcome),
            Some(request) => self.end_request(connection, request, &room, recover, outcome),
        }
    }

    /// Gives up some of the joins that the broker has not acknowledged in time. Returns whether there may be
    /// more.
    fn end_late_joins(&mut self) -> bool {
        for _ in 0..SLICE {
            let Some(join) = self.state.joins.take_due(self.state.now) else { return false };
            self.state.actions.push_back(Action::Abandon(join));
            self.end_join(join, Err(BrokerError::Unavailable));
        }
        self.settle();
        true
    }

    /// One of the rooms that opened a session is acknowledged, or refused.
    fn end_admission(&mut self, key: ConnectionKey, room: &RoomName, outcome: Result<Joined, BrokerError>) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        match outcome {
            Ok(Joined { begin }) => {
                // In this order: a gap may close the session, but in service it can say why.
                self.admit_if_joined(key);
                self.begin_catching_up(key, room, begin);
            }
            Err(error) => {
                let refused = NotAdmitted::Subscribing(Outcome::from(&error).refusal);
                connection.give_up(&mut self.state, refused);
            }
        }
    }

    /// A room that a session has asked for is acknowledged, or refused.
    fn end_request(
        &mut self,
        key: ConnectionKey,
        request: RequestId,
        room: &RoomName,
        recover: Option<Recover>,
        outcome: Result<Joined, BrokerError>,
    ) {
        let begin = outcome.as_ref().ok().and_then(|joined| joined.begin);
        let outcome = outcome.map(|_| begin).map_err(|error| Outcome::from(&error).reply);
        let begins = self.reply_to_join(key, request, room, recover, outcome);
        let from = if begin.is_some() { NEVER } else { 0 };
        if let Some(place) = begins
            && self.join(room, request, key, from)
        {
            self.locate(room);
            self.begin_at(key, place);
        } else {
            self.state.context.hub.leave(room, self.state.index);
        }
        if let Some(connection) = self.connections.get_mut(key) {
            connection.flush(&mut self.state);
        }
    }
}

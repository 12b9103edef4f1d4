//! The loop and the tables of one shard.

mod fanout;
mod relief;

use std::{
    cell::{Cell, Ref, RefCell},
    future::poll_fn,
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering},
    task::Poll,
};

use axum::Router;
use broker_bridge::{RoomName, SessionId};
use slotmap::{KeyData, SlotMap};
use tokio::{
    task::LocalSet,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::relief::Holders;
use super::{
    Context, Inbox, ShardEvent,
    age::Age,
    batch::Batch,
    connection::{Connection, ConnectionGuard, ConnectionKey, Phase, Start},
    rooms::{Member, Rooms},
    rounds::{Rounds, SLICE},
    tally::Tally,
    timers::Timers,
};
use crate::{
    clock::{self, Clock, Tick},
    drain::Pace,
    framing::{Broadcast, Packets},
    health::ShardHealth,
    limits::bucket::SessionMeters,
    protocol::{Command, RequestId},
    session::Effects,
    settings::Settings,
    vocabulary::{CloseReason, Outcome, ReplyError, metrics::Label as _},
};

/// The most bytes in one read. All connections of the shard share one buffer.
const SCRATCH: usize = 64 * 1024;
/// Queued deliveries after which a turn writes and yields before it continues with its events.
const TURN: usize = 16 * SLICE;
/// The capacity for events, commands, effects and writes that is kept between turns. A burst that needed more
/// frees its memory.
const KEPT_EVENTS: usize = 4096;

/// The state of one shard, on its own thread.
pub struct Worker {
    this: Weak<Worker>,
    pub index: usize,
    pub context: Arc<Context>,
    settings: RefCell<Arc<Settings>>,
    /// The rate limits for this shard's sessions.
    meters: RefCell<SessionMeters>,
    pub inbox: Arc<Inbox>,
    pub health: Arc<ShardHealth>,
    pub router: Router,
    /// The tasks of this shard: HTTP connections, upgrades, sockets, blocked publishers.
    pub tasks: TaskTracker,
    /// Cancelled when the shard begins to drain: HTTP connections without a session then end by themselves.
    pub draining: CancellationToken,
    pub tally: Tally,
    pub scratch: RefCell<Box<[u8]>>,
    commands: RefCell<Vec<Command>>,
    effects: RefCell<Effects>,
    packets: RefCell<Packets>,
    connections: RefCell<SlotMap<ConnectionKey, Rc<Connection>>>,
    holders: RefCell<Holders>,
    rooms: RefCell<Rooms>,
    rounds: RefCell<Rounds>,
    /// The inbox cost of the broadcasts finished since the last turn.
    done: Cell<usize>,
    /// Connections to write before the turn ends.
    dirty: RefCell<Vec<Rc<Connection>>>,
    timers: RefCell<Timers<ConnectionKey>>,
    clock: Clock,
    /// The clock's count of pauses at the last check.
    pauses: Cell<u32>,
    now: Cell<Tick>,
    drain: RefCell<Option<Draining>>,
    age: Cell<Age>,
    random: Cell<u64>,
}

/// What a turn writes. Empty between turns, and kept for its capacity.
#[derive(Default)]
struct Written {
    /// Swapped with [`Worker::dirty`].
    connections: Vec<Rc<Connection>>,
    /// The members served in the current slice of a round.
    slice: Vec<Member>,
    /// Broadcasts that are fully written on this shard when the turn ends.
    broadcasts: Vec<Arc<Broadcast>>,
    /// The most bytes that any session's queue has grown since the last write.
    queued: usize,
    /// Deliveries queued since then.
    deliveries: usize,
}

/// A drain in progress.
struct Draining {
    pace: Arc<Pace>,
    /// Connections that existed when it began and have not been closed, in no particular order.
    remaining: Vec<ConnectionKey>,
    /// How many of them this shard may close per tick.
    per_tick: usize,
}

/// Runs a shard on the calling thread until it has drained or is stopped.
pub fn run(
    runtime: &tokio::runtime::Runtime,
    index: usize,
    inbox: Arc<Inbox>,
    health: Arc<ShardHealth>,
    context: Arc<Context>,
    router: Router,
) {
    let clock = Clock::new();
    clock.use_on_this_thread();
    let settings = context.settings.load();
    let worker = Rc::new_cyclic(|this| Worker {
        this: Weak::clone(this),
        index,
        age: Cell::new(Age::new(settings.max_session_age, clock.now())),
        meters: RefCell::new(SessionMeters::new(&settings.limits)),
        settings: RefCell::new(settings),
        context,
        inbox,
        health,
        router,
        tasks: TaskTracker::new(),
        draining: CancellationToken::new(),
        tally: Tally::default(),
        scratch: RefCell::new(vec![0; SCRATCH].into_boxed_slice()),
        commands: RefCell::default(),
        effects: RefCell::default(),
        packets: RefCell::default(),
        connections: RefCell::default(),
        holders: RefCell::default(),
        rooms: RefCell::default(),
        rounds: RefCell::default(),
        done: Cell::default(),
        dirty: RefCell::default(),
        timers: RefCell::default(),
        now: Cell::new(clock.now()),
        pauses: Cell::default(),
        clock,
        drain: RefCell::default(),
        random: Cell::new(getrandom::u64().unwrap_or(1) | 1),
    });
    let tasks = LocalSet::new();
    tasks.block_on(runtime, Rc::clone(&worker).run_turns());
    // Sockets that are still open now are closed with their tasks.
    drop(tasks);
    worker.settle_tally();
    worker.context.budget.forget_fullest(index);
}

impl Worker {
    async fn run_turns(self: Rc<Self>) {
        let mut ticks = tokio::time::interval(Clock::STEP);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let (mut events, mut batch, mut written) = (Vec::new(), Batch::default(), Written::default());
        let mut relieving = false;
        loop {
            let tick = poll_fn(|cx| {
                if let Poll::Ready(at) = ticks.poll_tick(cx) {
                    return Poll::Ready(Some(at));
                }
                match self.inbox.poll_ready(cx) {
                    Poll::Pending if self.rounds.borrow().is_empty() && !relieving => Poll::Pending,
                    _ => Poll::Ready(None),
                }
            })
            .await;
            self.refresh_and_tick(tick);
            self.inbox.take(&mut events, self.done.take());
            for event in events.drain(..) {
                if !batch.may_wait(&event) {
                    self.deliver(&mut batch, &mut written);
                }
                match event {
                    ShardEvent::Broadcast(broadcast) => batch.push(broadcast),
                    ShardEvent::Stop => return,
                    event => self.handle(event),
                }
                // Write before a session's queue is full, so no session looks slow just because much arrived
                // at once. And don't let other work wait until everything that arrived has been delivered.
                if written.queued > self.settings().limits.outbound.get() / 2 || written.deliveries >= TURN {
                    self.serve_rounds(&mut written);
                    self.write(&mut written).await;
                    tokio::task::yield_now().await;
                    let tick = poll_fn(|cx| Poll::Ready(ticks.poll_tick(cx))).await;
                    self.refresh_and_tick(match tick {
                        Poll::Ready(at) => Some(at),
                        Poll::Pending => None,
                    });
                }
            }
            self.deliver(&mut batch, &mut written);
            self.serve_rounds(&mut written);
            self.write(&mut written).await;
            if events.capacity() > KEPT_EVENTS {
                events = Vec::new();
            }
            self.settle_tally();
            // Close only some sessions per turn, and serve the others in between.
            relieving = self.relieve(relieving);
            if relieving {
                self.write(&mut written).await;
                self.settle_tally();
            }
            if self.is_drained() {
                return;
            }
            if relieving || !self.rounds.borrow().is_empty() {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Reads the clock and the settings, and does what is due.
    fn refresh_and_tick(&self, tick: Option<Instant>) {
        self.now.set(self.clock.now());
        let replaced = self.context.settings.refresh(&mut self.settings.borrow_mut());
        if let Some(before) = replaced {
            self.meters.borrow_mut().adopt(&self.settings().limits);
            self.adjust(&before);
        }
        if self.pauses.replace(self.clock.pauses()) != self.clock.pauses() {
            // Timers follow the shard's clock, which has been paused. Tokens expire in real time and may have
            // expired.
            let now = self.now();
            self.connections.borrow().values().for_each(|connection| connection.set_expiry_timer(self, now));
        }
        if let Some(due) = tick {
            self.tick(due);
        }
    }

    /// Handles an event that is not a delivery.
    fn handle(self: &Rc<Self>, event: ShardEvent) {
        match event {
            ShardEvent::Gap(room, cause) => self.report_gap(&room, cause),
            ShardEvent::Settled(ticket, outcome) => {
                if let Some(connection) = self.connection(KeyData::from_ffi(ticket.owner).into()) {
                    connection.settled(self, ticket.request, &outcome);
                }
            }
            ShardEvent::Accepted(accepted) => self.accept(accepted),
            ShardEvent::Drain(pace) => self.begin_drain(pace),
            ShardEvent::Broadcast(_) | ShardEvent::Stop => {}
        }
    }

    fn tick(&self, due: Instant) {
        self.health.beats.fetch_add(1, Ordering::Relaxed);
        self.context.metrics.lag_seconds.observe(due.elapsed().as_secs_f64());
        let now = self.now.get();
        loop {
            // End the borrow before handling the entry, which sets new timers.
            let Some((at, key)) = self.timers.borrow_mut().take_due(now) else { break };
            // An entry counts only if it is the connection's latest.
            if let Some(connection) = self.connection(key)
                && connection.due() == at
                && let Some(next) = connection.on_timer(self, now)
            {
                self.set_timer(Tick(next.0.max(now.0 + 1)), &connection);
            }
        }
        self.note_fullest();
        self.close_share();
    }

    // ---- draining ----

    fn begin_drain(&self, pace: Arc<Pace>) {
        self.draining.cancel();
        let remaining: Vec<_> = self.connections.borrow().keys().collect();
        let per_tick = pace.join(remaining.len(), Clock::STEP);
        self.drain.borrow_mut().get_or_insert(Draining { pace, remaining, per_tick });
    }

    /// Closes as many sessions as the drain's pace allows in this tick.
    fn close_share(&self) {
        let share = self.drain.borrow().as_ref().map_or(0, |drain| drain.per_tick);
        let now = std::time::Instant::now();
        for _ in 0..share {
            let Some(connection) = self.next_to_close(now) else { return };
            connection.begin_close(self, CloseReason::Drain);
        }
    }

    fn next_to_close(&self, now: std::time::Instant) -> Option<Rc<Connection>> {
        let mut drain = self.drain.borrow_mut();
        let Draining { pace, remaining, .. } = drain.as_mut()?;
        loop {
            let next = self.connection(*remaining.last()?);
            let next = next.filter(|connection| !matches!(connection.phase(), Phase::Closing(_)));
            // A session that ended by itself does not use up the pace.
            if next.is_some() && !pace.try_close(now) {
                return None;
            }
            remaining.pop();
            if next.is_some() {
                return next;
            }
        }
    }

    fn is_drained(&self) -> bool {
        self.drain.borrow().as_ref().is_some_and(|drain| drain.remaining.is_empty())
            && self.health.load() == 0
    }

    // ---- changed settings ----

    /// Applies new settings. Most are read where they are used; these are built into timers and queues.
    fn adjust(&self, before: &Settings) {
        let (heartbeat, age) = {
            let now = self.settings();
            (now.heartbeat != before.heartbeat, now.max_session_age != before.max_session_age)
        };
        if age {
            self.age.set(Age::new(self.settings().max_session_age, self.now()));
        }
        for connection in self.connections.borrow().values() {
            connection.seal_outbound();
            if heartbeat || age {
                connection.begin_heartbeat(self);
            }
        }
    }

    /// When the session reaches its age limit. Never while draining, which closes all sessions in its own
    /// order.
    pub fn end_of_age(&self, session: SessionId, created: Tick) -> Tick {
        if self.draining.is_cancelled() { Tick::NEVER } else { self.age.get().end(session, created) }
    }

    // ---- connections ----

    /// Creates a connection, without a transport yet.
    pub fn open(self: &Rc<Self>, start: Start) -> ConnectionGuard {
        let ages = self.end_of_age(start.session.id(), start.now);
        let first = start.first_ping.min(ages);
        let now = start.now;
        let mut connections = self.connections.borrow_mut();
        let key = connections.insert_with_key(|key| Rc::new(Connection::new(key, start)));
        let connection = Rc::clone(connections.get(key).expect("inserted above"));
        self.set_timer(first.min(connection.expires(now)), &connection);
        ConnectionGuard { worker: Rc::clone(self), connection }
    }

    /// Removes a connection that has ended. Only its guard calls this.
    pub fn forget(&self, connection: &Connection) {
        let phase = connection.phase();
        connection.begin_close(self, CloseReason::Lost);
        connection.detach();
        connection.release_memory(self);
        self.connections.borrow_mut().remove(connection.key());
        let reason = match phase {
            Phase::Closing(reason) => reason,
            Phase::Admitting | Phase::Open => CloseReason::Lost,
        };
        if connection.was_open() {
            self.context.metrics.connection_closed(connection.name(), reason);
            tracing::debug!(session = %connection.id(), reason = reason.as_str(), "session ended");
        }
    }

    pub fn connection(&self, key: ConnectionKey) -> Option<Rc<Connection>> {
        self.connections.borrow().get(key).cloned()
    }

    /// Marks the connection to be written before the turn ends.
    pub fn touch(&self, key: ConnectionKey) {
        if let Some(connection) = self.connections.borrow().get(key) {
            self.touch_connection(connection);
        }
    }

    fn touch_connection(&self, connection: &Rc<Connection>) {
        if !connection.dirty.replace(true) {
            self.dirty.borrow_mut().push(Rc::clone(connection));
        }
    }

    /// Hands over, in order, the publications that did not fit into the broker's queue.
    pub fn publish_blocked(&self, key: ConnectionKey) {
        let (Some(worker), Some(connection)) = (self.this.upgrade(), self.connection(key)) else { return };
        self.tasks.spawn_local(async move {
            connection.publish_blocked(&worker).await;
        });
    }

    // ---- rooms ----

    /// Makes the connection a member on this shard. Returns false if it is one already.
    pub fn join(&self, room: &RoomName, request: RequestId, connection: &Rc<Connection>) -> bool {
        if connection.memberships.borrow().get(room).is_some() {
            return false;
        }
        let since = self.rounds.borrow_mut().join(room);
        let (encoding, state) = connection.encoding_of(room, request);
        let member = Member::new(connection, encoding, state);
        let joined = self.rooms.borrow_mut().join(room, member, since);
        if joined {
            Tally::shift(&self.tally.subscriptions, 1);
        }
        joined
    }

    /// Ends one membership of the connection, here and in the hub, if there is one.
    pub fn leave(&self, room: &RoomName, connection: &Connection) {
        if self.rooms.borrow_mut().leave(room, connection) {
            Tally::shift(&self.tally.subscriptions, -1);
            self.context.hub.leave(room, self.index);
        }
    }

    /// Joins a room that a session has asked for. The session becomes a member at the same moment as it gets
    /// the reply: it receives everything that is published after that, and nothing from before.
    pub fn join_later(&self, key: ConnectionKey, request: RequestId, room: RoomName) {
        let Some(worker) = self.this.upgrade() else { return };
        let acknowledged = self.context.hub.join(&room, self.index);
        self.tasks.spawn_local(async move {
            let time = worker.settings().subscribe_timeout;
            let outcome = match clock::timeout(time, acknowledged).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a subscription failed");
                    Err(Outcome::from(&error).reply)
                }
                Err(_) => Err(ReplyError::Unavailable),
            };
            let connection = worker.connection(key);
            let member = connection
                .as_ref()
                .is_some_and(|connection| connection.joined(&worker, request, &room, outcome));
            match connection {
                Some(connection) if member && worker.join(&room, request, &connection) => {
                    connection.flush(&worker);
                }
                Some(connection) => {
                    worker.context.hub.leave(&room, worker.index);
                    connection.flush(&worker);
                }
                None => worker.context.hub.leave(&room, worker.index),
            }
        });
    }

    /// Ends all memberships of the connection, here and in the hub. If there are very many, a slice at a
    /// time.
    pub fn leave_rooms(&self, connection: &Connection) {
        let rooms: Vec<_> = connection.memberships.borrow().rooms().cloned().collect();
        let (first, rest) = rooms.split_at(rooms.len().min(SLICE));
        for room in first {
            self.leave(room, connection);
        }
        if rest.is_empty() {
            return;
        }
        let (Some(worker), Some(connection)) = (self.this.upgrade(), self.connection(connection.key()))
        else {
            for room in rest {
                self.leave(room, connection);
            }
            return;
        };
        let rest: Box<[_]> = rest.into();
        self.tasks.spawn_local(async move {
            for some in rest.chunks(SLICE) {
                tokio::task::yield_now().await;
                for room in some {
                    worker.leave(room, &connection);
                }
            }
        });
    }

    // ---- helpers ----

    /// The settings that apply in this turn.
    pub fn settings(&self) -> Ref<'_, Settings> {
        Ref::map(self.settings.borrow(), |settings| &**settings)
    }

    /// The rate limits that apply in this turn.
    pub fn meters(&self) -> Ref<'_, SessionMeters> {
        self.meters.borrow()
    }

    /// The shard's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The shard's time at the beginning of the turn.
    pub fn now(&self) -> Tick {
        self.now.get()
    }

    /// Sets when the connection's timer fires, replacing the previous one.
    pub fn set_timer(&self, at: Tick, connection: &Connection) {
        connection.set_due(at);
        self.timers.borrow_mut().set(at, connection.key());
    }

    pub fn take_effects(&self) -> Effects {
        self.effects.take()
    }

    /// Keeps the allocation for the next effects, unless a burst has made it large.
    pub fn give_effects(&self, effects: Effects) {
        if effects.capacity() <= KEPT_EVENTS {
            self.effects.replace(effects);
        }
    }

    pub fn take_packets(&self) -> Packets {
        self.packets.take()
    }

    /// Keeps the allocation for the next messages.
    pub fn give_packets(&self, packets: Packets) {
        debug_assert!(packets.is_empty(), "messages were written and not sent");
        self.packets.replace(packets);
    }

    pub fn take_commands(&self) -> Vec<Command> {
        self.commands.take()
    }

    /// Keeps the allocation for the next commands, unless a burst has made it large.
    pub fn give_commands(&self, commands: Vec<Command>) {
        if commands.capacity() <= KEPT_EVENTS {
            self.commands.replace(commands);
        }
    }

    /// A random number in `0..1`, good enough to spread clients over time (xorshift64).
    #[expect(clippy::cast_precision_loss, reason = "24 bits fit an f32's mantissa")]
    pub fn spread(&self) -> f32 {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        (x >> 40) as f32 / (1_u64 << 24) as f32
    }

    fn settle_tally(&self) {
        self.tally.settle(&self.health.meter, &self.context.traffic, &self.context.metrics);
        self.tally.settle_memory(&self.context.budget);
    }
}

//! What the connections of a shard share.

use std::{collections::VecDeque, num::NonZeroU32, sync::Arc};

use broker_bridge::{Affinity, BrokerError, Cursor, PublishRequest, Retention, RoomName, SessionId};
use futures_util::future::BoxFuture;

use super::{
    Context, Inbox,
    age::Age,
    connection::{Connection, ConnectionKey},
    joins::{Join, JoinKey, Joins},
    tally::Tally,
    timers::Timers,
    transport::Transport,
};
use crate::{
    auth::{AuthFailure, Token},
    clock::Tick,
    framing::Packets,
    history::Beginning,
    hub::{Begin, Joining},
    limits::bucket::SessionMeters,
    protocol::{Command, HistoryQuery, RequestId},
    session::Effects,
    settings::Settings,
    vocabulary::{CloseReason, Refusal},
};

/// The capacity for events, commands, effects and writes that is kept between turns. A burst that needed more
/// frees its memory.
pub const KEPT: usize = 4096;

/// What the core asks its driver to do, in order.
#[derive(Debug)]
pub enum Action {
    /// Wait until the broker acknowledges this subscription, then call
    /// [`Core::subscribed`](super::Core::subscribed).
    Subscribe(JoinKey, Subscription),
    /// Nobody waits for the acknowledgement any more.
    Abandon(JoinKey),
    /// Hand this to the broker once its queue has space, then call
    /// [`Core::handed_over`](super::Core::handed_over) with the key and the cost.
    Publish(ConnectionKey, PublishRequest, usize),
    /// Read this part of a room's history, then call [`Core::history_read`](super::Core::history_read) with the key and
    /// the request. Nothing can be read if the room has no retention.
    ReadHistory(ConnectionKey, RequestId, RoomName, Option<Retention>, HistoryQuery),
    /// Find out where a member continues in a room, then call [`Core::resumed`](super::Core::resumed) with the key, the
    /// room and the position.
    Resume(ConnectionKey, RoomName, Cursor, Resuming),
    /// Verify this token, then call [`Core::verified`](super::Core::verified). It may take a while: do it where
    /// no session waits for it.
    Verify(ConnectionKey, Token),
    /// The connection is in service, or will never be.
    Admitted(ConnectionKey, Result<(), NotAdmitted>),
    /// A session's client has sent a token that was refused.
    TokenRefused(SessionId, AuthFailure),
}

/// Resolves when the broker has acknowledged a subscription.
pub struct Subscription(pub Joining);

impl std::fmt::Debug for Subscription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Subscription")
    }
}

/// Resolves when it is known where a member continues.
pub struct Resuming(pub BoxFuture<'static, Result<Begin, BrokerError>>);

impl std::fmt::Debug for Resuming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Resuming")
    }
}

/// Why a connection did not get into service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAdmitted {
    /// A subscription failed.
    Subscribing(Refusal),
    /// It began to close for this reason while it waited for the broker.
    Closed(CloseReason),
}

/// Everything of a shard except its connections, rooms and rounds.
pub struct State {
    pub index: usize,
    pub context: Arc<Context>,
    /// Takes the receipts of publications.
    pub inbox: Arc<Inbox>,
    /// The settings that apply in this turn.
    pub settings: Arc<Settings>,
    /// The rate limits for this shard's sessions.
    pub meters: SessionMeters,
    pub tally: Tally,
    pub timers: Timers<ConnectionKey>,
    pub joins: Joins,
    /// The shard's time at the beginning of the turn.
    pub now: Tick,
    pub is_draining: bool,
    pub age: Age,
    /// Connections to write before the turn ends.
    pub dirty: VecDeque<ConnectionKey>,
    /// Memberships to end before the core returns.
    pub leaving: Vec<Leave>,
    /// Connections that hold memory and did not before.
    pub new_holders: Vec<ConnectionKey>,
    /// What the driver has to do.
    pub actions: VecDeque<Action>,
    random: u64,
    commands: Vec<Command>,
    effects: Effects,
    packets: Packets,
}

/// Memberships that end.
pub enum Leave {
    /// That of a connection in one room.
    Room(ConnectionKey, RoomName),
    /// All of a connection.
    All(ConnectionKey),
}

impl State {
    /// The state of a new shard. Its random numbers are derived from `seed`.
    pub fn new(index: usize, context: Arc<Context>, inbox: Arc<Inbox>, now: Tick, seed: u64) -> Self {
        let settings = context.settings.load();
        Self {
            index,
            age: Age::new(settings.max_session_age, now),
            meters: SessionMeters::new(&settings.limits, context.time.clone()),
            settings,
            context,
            inbox,
            tally: Tally::default(),
            timers: Timers::default(),
            joins: Joins::default(),
            now,
            is_draining: false,
            dirty: VecDeque::new(),
            leaving: Vec::new(),
            new_holders: Vec::new(),
            actions: VecDeque::new(),
            random: seed | 1,
            commands: Vec::new(),
            effects: Effects::default(),
            packets: Packets::default(),
        }
    }

    /// The broker's connection that this shard's thread serves.
    pub fn affinity(&self) -> Affinity {
        Affinity(self.index)
    }

    /// Sets when the connection's timer fires, replacing the previous one.
    pub fn set_timer<T: Transport>(&mut self, at: Tick, connection: &mut Connection<T>) {
        connection.set_due(at);
        self.timers.set(at, connection.key());
    }

    /// When the session reaches its age limit. Never while draining, which closes all sessions in its own
    /// order.
    pub fn end_of_age(&self, session: SessionId, created: Tick) -> Tick {
        if self.is_draining { Tick::NEVER } else { self.age.end(session, created) }
    }

    /// Announces a member to the hub, and waits for the broker.
    pub fn join(&mut self, join: Join, beginning: impl Into<Beginning>) -> JoinKey {
        let history = self.settings.history.of(&join.room);
        // A history of one publication keeps a value: nobody needs those before it.
        let keeps_value = history.is_some_and(|retention| retention.size.get() == 1);
        let beginning = match beginning.into() {
            Beginning::After(_) if keeps_value && join.recover.is_some() => Beginning::Last(NonZeroU32::MIN),
            beginning => beginning,
        };
        let joining = self.context.hub.join(&join.room, self.index, history, beginning);
        let deadline = self.now.after(self.settings.subscribe_timeout);
        let key = self.joins.begin(join, deadline);
        self.actions.push_back(Action::Subscribe(key, Subscription(joining)));
        key
    }

    /// Ends one membership of a connection.
    pub fn leave(&mut self, connection: ConnectionKey, room: RoomName) {
        self.leaving.push(Leave::Room(connection, room));
    }

    /// Ends all memberships of a connection.
    pub fn leave_rooms(&mut self, connection: ConnectionKey) {
        self.leaving.push(Leave::All(connection));
    }

    /// Moves what was counted since the last time into the node's metrics.
    pub fn settle_tally(&self) {
        self.tally.settle(&self.context.traffic, &self.context.metrics);
        self.tally.settle_memory(&self.context.budget);
    }

    /// A random number in `0..1`, good enough to spread clients over time (xorshift64).
    #[expect(clippy::cast_precision_loss, reason = "24 bits fit an f32's mantissa")]
    pub fn spread(&mut self) -> f32 {
        let mut x = self.random;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random = x;
        (x >> 40) as f32 / (1_u64 << 24) as f32
    }

    // ---- allocations that the connections share ----

    pub fn take_effects(&mut self) -> Effects {
        std::mem::take(&mut self.effects)
    }

    /// Keeps the allocation for the next effects, unless a burst has made it large.
    pub fn give_effects(&mut self, effects: Effects) {
        if effects.capacity() <= KEPT {
            self.effects = effects;
        }
    }

    pub fn take_packets(&mut self) -> Packets {
        std::mem::take(&mut self.packets)
    }

    /// Keeps the allocation for the next messages.
    pub fn give_packets(&mut self, packets: Packets) {
        debug_assert!(packets.is_empty(), "messages were written and not sent");
        self.packets = packets;
    }

    pub fn take_commands(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    /// Keeps the allocation for the next commands, unless a burst has made it large.
    pub fn give_commands(&mut self, commands: Vec<Command>) {
        if commands.capacity() <= KEPT {
            self.commands = commands;
        }
    }
}

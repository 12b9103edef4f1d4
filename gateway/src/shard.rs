//! The core of a shard: the connections of one thread, their rooms, and what happens to them.
//!
//! A shard never parses a payload and knows no wire protocol: sessions ([`crate::session`]) decide what has
//! to happen, and shards do it. The core has no thread, no runtime, no clock, no sockets and no source of
//! randomness: a driver gives it all of these. [`crate::driver`] drives it on tokio; `tests/simulation`
//! drives whole nodes in one thread, from a seed.
//!
//! | module | what it holds |
//! |---|---|
//! | [`core`](mod@core) | the shard's tables, its turns, and everything that a driver calls |
//! | [`transport`] | what the core needs from sockets and responses |
//! | [`inbox`] | what the rest of the process sends to a shard |
//! | [`connection`] | one connection: its session, its queue and its transport |
//! | [`state`] | what the connections share |
//! | [`joins`] | subscriptions that the broker has not acknowledged yet |
//! | [`age`] | when a session is told to move to another node |
//! | [`fanout`], [`rounds`] | deliveries; those to large rooms, slice by slice |
//! | [`catchup`], [`recovery`] | what sessions have missed in rooms with a history |
//! | [`reads`] | sessions that read parts of rooms' histories |
//! | [`relief`] | which sessions are closed when memory is short |
//! | [`batch`], [`outbound`], [`rooms`], [`tally`], [`timers`] | parts of the above |
//!
//! # A turn
//!
//! A shard takes its whole inbox, queues the result for every affected member, and only then writes: one
//! system call per socket for everything queued there. A room with more members than a slice (256) is not
//! served within one turn. Each turn serves one slice of one such room, so a room of 20,000 delays pings and
//! other rooms by at most one slice. Gaps are delivered in the same way. After each slice of writes the
//! driver polls its sockets.
//!
//! # Driving it
//!
//! The driver calls the core when a socket has input or takes output, when a [tick](Core::tick) is due and
//! when the inbox has events ([`Core::turn`]). It performs the [`Action`]s that result. The core writes to
//! sockets itself, through [`Transport`], and never calls the driver back.

use std::sync::Arc;

use broker_bridge::Broker;

use crate::{budget::Budget, clock::Time, hub::Hub, settings::LiveSettings, traffic::Traffic};

mod age;
mod batch;
mod catchup;
mod connection;
mod core;
mod fanout;
pub mod inbox;
mod joined_text;
mod joins;
mod metrics;
mod outbound;
mod reads;
mod recovery;
mod relief;
mod rooms;
mod rounds;
mod state;
mod tally;
mod timers;
pub mod transport;

pub use self::{
    connection::{ConnectionKey, Interest, LINGER, Output, Start},
    core::{Core, Turn},
    inbox::{Inbox, ShardEvent},
    joins::JoinKey,
    metrics::ShardMetrics,
    state::{Action, NotAdmitted, Resuming, Subscription},
    transport::Transport,
};

/// What the shards of a node share.
pub struct Context {
    /// Rooms and interest.
    pub hub: Arc<Hub>,
    /// Where publications go.
    pub broker: Arc<dyn Broker>,
    /// Where the shards add up their tallies.
    pub metrics: Arc<ShardMetrics>,
    /// Likewise, for traffic.
    pub traffic: Arc<Traffic>,
    /// Accounts for the memory held for clients, and limits it.
    pub budget: Arc<Budget>,
    /// Keys, limits and timeouts; a shard checks once per turn whether they have changed.
    pub settings: Arc<LiveSettings>,
    /// The time of day, and time as rate limits count it.
    pub time: Time,
}

//! Shards: one thread per core, each the sole owner of its sockets.
//!
//! The acceptor hands each socket to the shard with the fewest. The socket stays there for its whole life,
//! from HTTP through the upgrade to the close, so a shard needs no migration, no locks, and `Rc` instead of
//! `Arc`. A shard never parses a payload and knows no wire protocol: sessions ([`crate::session`]) decide
//! what has to happen, and shards do it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`inbox`] | what the rest of the process sends to a shard |
//! | [`worker`] | the shard's loop and tables |
//! | [`connection`] | one connection: its session, its queue and its socket |
//! | [`admission`] | from a request to a connection with active subscriptions |
//! | [`body`] | a connection whose transport is an HTTP response |
//! | [`age`] | when a session is told to move to another node |
//! | [`rounds`] | deliveries to large rooms, slice by slice |
//! | [`batch`], [`outbound`], [`proxy_protocol`], [`rooms`], [`stream`], [`tally`], [`timers`] | parts of the above |
//!
//! # A turn
//!
//! A shard takes its whole inbox, queues the result for every affected member, and only then writes: one
//! system call per socket for everything queued there. A room with more members than a slice (256) is not
//! served within one turn. Each turn serves one slice of one such room, so a room of 20,000 delays pings and
//! other rooms by at most one slice. Gaps are delivered in the same way. After each slice of writes the shard
//! polls its sockets.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use axum::Router;
use broker_bridge::Broker;

use crate::{
    budget::Budget, health::ShardHealth, hub::Hub, request::RequestMetrics, settings::LiveSettings, tls::Tls,
    traffic::Traffic, vocabulary::SessionIds,
};

pub mod admission;
mod age;
mod batch;
mod body;
mod connection;
pub mod inbox;
mod metrics;
mod outbound;
mod proxy_protocol;
mod rooms;
mod rounds;
mod stream;
mod tally;
mod timers;
mod worker;

pub use admission::Admission;
pub use inbox::{Accepted, Entry, Inbox, ShardEvent};
pub use metrics::ShardMetrics;
pub use stream::tcp_user_timeout;

/// What all shards of a node share.
pub struct Context {
    /// Rooms and interest.
    pub hub: Arc<Hub>,
    /// Where publications go.
    pub broker: Arc<dyn Broker>,
    /// Where the shards add up their tallies.
    pub metrics: Arc<ShardMetrics>,
    /// Likewise, for traffic.
    pub traffic: Arc<Traffic>,
    /// Counts requests that do not become sessions.
    pub requests: Arc<RequestMetrics>,
    /// Accounts for the memory held for clients, and limits it.
    pub budget: Arc<Budget>,
    /// TLS for new sockets; without it they are plain.
    pub tls: Option<Arc<Tls>>,
    /// Generates ids for new sessions.
    pub ids: Arc<SessionIds>,
    /// Keys, limits and timeouts; a shard checks once per turn whether they have changed.
    pub settings: Arc<LiveSettings>,
    /// Health and load of every shard on the node.
    pub shards: Vec<Arc<ShardHealth>>,
}

impl Context {
    /// Whether nine tenths of the node's socket limit is in use, so idle sockets should be closed sooner.
    pub fn is_crowded(&self) -> bool {
        let open = self.shards.iter().map(|health| health.load()).sum();
        self.settings.load().sockets.is_crowded(open)
    }
}

/// A handle to a running shard.
pub struct Shard {
    inbox: Arc<Inbox>,
    health: Arc<ShardHealth>,
}

/// Marks the shard as ended when its thread exits, even by a panic.
struct Ending(Arc<ShardHealth>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
    }
}

impl Shard {
    /// Starts a shard thread that serves `router` on the sockets it accepts.
    pub fn start(
        index: usize,
        inbox: Arc<Inbox>,
        health: Arc<ShardHealth>,
        context: Arc<Context>,
        router: Router,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name(format!("shard-{index}")).spawn({
            let (inbox, health) = (Arc::clone(&inbox), Arc::clone(&health));
            let ending = Ending(Arc::clone(&health));
            move || {
                let _ending = ending;
                worker::run(&runtime, index, inbox, health, context, router);
            }
        })?;
        Ok(Self { inbox, health })
    }

    /// The inbox that takes events for this shard.
    pub fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// Its health counters.
    pub fn health(&self) -> &Arc<ShardHealth> {
        &self.health
    }

    /// Hands a socket over to this shard.
    pub fn accept(&self, accepted: Accepted) {
        self.health.arriving.fetch_add(1, Ordering::Relaxed);
        self.inbox.post(ShardEvent::Accepted(accepted));
    }

    /// Whether its thread has exited.
    pub fn is_finished(&self) -> bool {
        self.health.ended.load(Ordering::Acquire)
    }
}

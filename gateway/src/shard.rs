//! Shards: one thread per core, each the sole owner of its sockets.
//!
//! A socket is handed to the shard with the fewest, is born there as HTTP, upgrades, lives and dies: no
//! migration, no lock, `Rc` in place of `Arc`. A shard never parses a payload and knows no wire protocol;
//! sessions ([`crate::session`]) say what has to happen, shards make it happen.
//!
//! | module | what it holds |
//! |---|---|
//! | [`inbox`] | what the rest of the process tells a shard |
//! | [`worker`] | the shard's loop and tables |
//! | [`connection`] | one connection: its session, its queue and its socket |
//! | [`admission`] | from a request to a connection whose subscriptions stand |
//! | [`body`] | a connection carried by an HTTP response |
//! | [`age`] | when a session is sent on to another node |
//! | [`rounds`] | what a large room is told, slice by slice |
//! | [`batch`], [`outbound`], [`proxy_protocol`], [`rooms`], [`stream`], [`tally`], [`timers`] | the parts of those |
//!
//! # A turn
//!
//! A shard takes its whole inbox, queues what it says for every member concerned, and only then writes:
//! each socket once, with one system call for all that waits. A room of more than a slice of members (256) is not
//! served within the turn: each turn serves one slice of one such room, so that a room of 20,000 keeps neither pings
//! nor other rooms waiting for more than a slice; gaps are told in the same way. After each slice of writes comes a look at
//! readiness.

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
pub use inbox::{Accepted, Entry, Event, Inbox};
pub use metrics::ShardMetrics;
pub use stream::patience;

/// What all shards of a node share.
pub struct Context {
    /// Rooms and interest.
    pub hub: Arc<Hub>,
    /// Where publications go.
    pub broker: Arc<dyn Broker>,
    /// Where the shards' tallies go.
    pub metrics: Arc<ShardMetrics>,
    /// Likewise.
    pub traffic: Arc<Traffic>,
    /// Counts requests that do not become sessions.
    pub requests: Arc<RequestMetrics>,
    /// What is held for clients, and how much may be.
    pub budget: Arc<Budget>,
    /// TLS for new sockets; without it they are plain.
    pub tls: Option<Arc<Tls>>,
    /// Names for new sessions.
    pub ids: Arc<SessionIds>,
    /// Keys, bounds and times; a shard looks once per turn whether they have changed.
    pub settings: Arc<LiveSettings>,
    /// What each shard of the node holds.
    pub shards: Vec<Arc<ShardHealth>>,
}

impl Context {
    /// Whether nine tenths of the node's places for sockets are taken, so that idle ones should make way.
    pub fn is_crowded(&self) -> bool {
        let open = self.shards.iter().map(|health| health.load()).sum();
        self.settings.load().sockets.is_crowded(open)
    }
}

/// A running shard, seen from outside.
pub struct Shard {
    inbox: Arc<Inbox>,
    health: Arc<ShardHealth>,
}

/// Says that the thread that holds it has come to its end, also by a panic.
struct Ending(Arc<ShardHealth>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
    }
}

impl Shard {
    /// Starts the thread of a shard that serves `router` to whom it accepts.
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

    /// Where to tell it something.
    pub fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// How it is.
    pub fn health(&self) -> &Arc<ShardHealth> {
        &self.health
    }

    /// Hands a socket over.
    pub fn accept(&self, accepted: Accepted) {
        self.health.arriving.fetch_add(1, Ordering::Relaxed);
        self.inbox.post(Event::Accepted(accepted));
    }

    /// Whether its thread has come to its end.
    pub fn is_finished(&self) -> bool {
        self.health.ended.load(Ordering::Acquire)
    }
}

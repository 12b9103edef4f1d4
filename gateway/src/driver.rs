//! Drives shards on tokio: one thread per core, each the sole owner of its sockets.
//!
//! The acceptor hands each socket to the shard with the fewest. The socket stays there for its whole life,
//! from HTTP through the upgrade to the close, so a shard needs no migration and no locks. The thread runs
//! the [core](crate::shard) in turns and one small task per socket; all of them share the core.
//!
//! | module | what it holds |
//! |---|---|
//! | [`arrivals`] | sockets on their way to a shard |
//! | [`worker`] | the loop that runs the core's turns and performs its actions |
//! | [`admission`] | HTTP on an accepted socket, and from a request to a session |
//! | [`connection`] | a session's socket, or the response that carries it |
//! | [`body`] | response bodies |
//! | [`readings`], [`repairs`] | readings of rooms' histories, for sessions and after interruptions |
//! | [`stream`] | a client's socket, plain or with TLS |
//! | [`proxy_protocol`] | the header of a proxy that announces its client |

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use axum::Router;
use broker_bridge::redis::Part;
use futures_util::future::join_all;

use crate::{
    crypto::CryptoThreads,
    health::ShardHealth,
    request::RequestMetrics,
    shard::{self, Inbox},
    tls::Tls,
    vocabulary::SessionIds,
};

pub mod admission;
mod arrivals;
mod body;
mod connection;
mod proxy_protocol;
pub mod readings;
pub mod repairs;
mod stream;
mod worker;

pub use self::{
    admission::Admission,
    arrivals::{Accepted, Entry},
    stream::tcp_user_timeout,
};
use self::{arrivals::Arrivals, readings::Readings, worker::Worker};

/// What the drivers of a node's shards share.
pub struct Context {
    /// What the shards share.
    pub shard: Arc<shard::Context>,
    /// Counts requests that do not become sessions.
    pub requests: Arc<RequestMetrics>,
    /// TLS for new sockets; without it they are plain.
    pub tls: Option<Arc<Tls>>,
    /// Reads parts of rooms' histories.
    pub readings: Arc<Readings>,
    /// Does the cryptography that takes long.
    pub crypto: Arc<CryptoThreads>,
    /// Generates ids for new sessions.
    pub ids: Arc<SessionIds>,
    /// Health and load of every shard on the node.
    pub shards: Vec<Arc<ShardHealth>>,
}

impl Context {
    /// Whether nine tenths of the node's socket limit is in use, so idle sockets should be closed sooner.
    pub fn is_crowded(&self) -> bool {
        let open = self.shards.iter().map(|health| health.load()).sum();
        self.shard.settings.load().sockets.is_crowded(open)
    }
}

/// A handle to a running shard.
pub struct Shard {
    inbox: Arc<Inbox>,
    arrivals: Arc<Arrivals>,
    health: Arc<ShardHealth>,
}

/// Marks the shard as ended when it has no sessions any more, and gets none, even by a panic.
struct Ending(Arc<ShardHealth>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
    }
}

impl Shard {
    /// Starts a shard thread that serves `router` on the sockets it accepts, and its part of the broker. The thread
    /// outlives the sessions: it serves the broker until that is closed.
    pub fn start(
        index: usize,
        inbox: Arc<Inbox>,
        health: Arc<ShardHealth>,
        context: Arc<Context>,
        router: Router,
        part: Part,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let arrivals = Arc::new(Arrivals::default());
        std::thread::Builder::new().name(format!("shard-{index}")).spawn({
            let (inbox, arrivals, health) = (Arc::clone(&inbox), Arc::clone(&arrivals), Arc::clone(&health));
            let ending = Ending(Arc::clone(&health));
            move || {
                let broker: Vec<_> = part.into_iter().map(|task| runtime.spawn(task)).collect();
                Worker::run(&runtime, index, inbox, arrivals, health, context, router);
                drop(ending);
                runtime.block_on(join_all(broker));
            }
        })?;
        Ok(Self { inbox, arrivals, health })
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
        self.arrivals.post(accepted);
    }

    /// Whether all its sessions have ended, and it accepts no more.
    pub fn is_finished(&self) -> bool {
        self.health.ended.load(Ordering::Acquire)
    }
}

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
//! | [`clock`] | time in which the shard looked |
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
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use axum::Router;
use broker_bridge::{Broker, SessionId};

use crate::{budget::Budget, hub::Hub, metrics::Metrics, settings::LiveSettings, tls::Tls};

pub mod admission;
mod age;
mod batch;
mod body;
mod clock;
mod connection;
pub mod inbox;
mod outbound;
mod proxy_protocol;
mod rooms;
mod rounds;
mod stream;
mod tally;
mod timers;
mod worker;

pub use admission::{Admission, Peer, RequestName, Standing};
pub use clock::{Elapsed, timeout};
pub use inbox::{Accepted, Entry, Event, Inbox};
pub use stream::{Meter, patience};

/// What all shards of a node share.
pub struct Context {
    /// Rooms and interest.
    pub hub: Arc<Hub>,
    /// Where publications go.
    pub broker: Arc<dyn Broker>,
    /// Where the shards' tallies go.
    pub metrics: Arc<Metrics>,
    /// What is held for clients, and how much may be.
    pub budget: Arc<Budget>,
    /// TLS for new sockets; without it they are plain.
    pub tls: Option<Arc<Tls>>,
    /// Names for new sessions.
    pub ids: Arc<SessionIds>,
    /// Keys, bounds and times; a shard looks once per turn whether they have changed.
    pub settings: Arc<LiveSettings>,
    /// What each shard of the node holds.
    pub shards: Vec<Arc<Vitals>>,
}

impl Context {
    /// Whether nine tenths of the node's places for sockets are taken, so that idle ones should make way.
    pub fn is_crowded(&self) -> bool {
        let open = self.shards.iter().map(|vitals| vitals.load()).sum();
        self.settings.load().sockets.is_crowded(open)
    }
}

/// Makes names for sessions: unique across nodes, not secret.
#[derive(Debug)]
pub struct SessionIds {
    node: u64,
    next: AtomicU64,
}

impl SessionIds {
    /// Names that begin with a number of this process's own.
    pub fn new(node: u64) -> Self {
        Self { node, next: AtomicU64::new(0) }
    }

    /// A name that nobody has had.
    pub fn next(&self) -> SessionId {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        SessionId(u128::from(self.node) << 64 | u128::from(number))
    }
}

/// A running shard, seen from outside.
pub struct Shard {
    inbox: Arc<Inbox>,
    vitals: Arc<Vitals>,
}

/// What a shard shows of itself while it runs.
#[derive(Debug, Default)]
pub struct Vitals {
    /// Its sockets and their bytes.
    pub meter: Arc<Meter>,
    /// Sockets on their way to it.
    pub arriving: AtomicUsize,
    /// How often its loop has ticked.
    pub beats: AtomicU64,
    /// Its thread has come to its end, in whatever way.
    pub ended: AtomicBool,
}

/// Says that the thread that holds it has come to its end, also by a panic.
struct Ending(Arc<Vitals>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
    }
}

impl Vitals {
    /// Sockets that it holds or is about to.
    pub fn load(&self) -> usize {
        self.meter.sockets.load(Ordering::Relaxed) + self.arriving.load(Ordering::Relaxed)
    }
}

impl Shard {
    /// Starts the thread of a shard that serves `router` to whom it accepts.
    pub fn start(
        index: usize,
        inbox: Arc<Inbox>,
        vitals: Arc<Vitals>,
        context: Arc<Context>,
        router: Router,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name(format!("shard-{index}")).spawn({
            let (inbox, vitals) = (Arc::clone(&inbox), Arc::clone(&vitals));
            let ending = Ending(Arc::clone(&vitals));
            move || {
                let _ending = ending;
                worker::run(&runtime, index, inbox, vitals, context, router);
            }
        })?;
        Ok(Self { inbox, vitals })
    }

    /// Where to tell it something.
    pub fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// How it is.
    pub fn vitals(&self) -> &Arc<Vitals> {
        &self.vitals
    }

    /// Hands a socket over.
    pub fn accept(&self, accepted: Accepted) {
        self.vitals.arriving.fetch_add(1, Ordering::Relaxed);
        self.inbox.post(Event::Accepted(accepted));
    }

    /// Whether its thread has come to its end.
    pub fn is_finished(&self) -> bool {
        self.vitals.ended.load(Ordering::Acquire)
    }
}

//! A node: assembled, running, leaving.
//!
//! The only place that knows all parts. Sockets live on the shards' threads; everything else (broker,
//! listeners, ops) runs on the runtime that calls [`Node::start`].

mod metrics;
mod process;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use broker_bridge::{
    Broker, BrokerUrl,
    memory::{MemoryBroker, MemoryBus},
    metrics::BrokerMetrics,
    redis::{RedisBroker, RedisConfig, RedisStartError},
};
use parking_lot::Mutex;
use prometheus::Registry;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::metrics::Metrics;
use crate::{
    auth::{
        files::{KeyFiles, LoadError},
        remote::{RemoteError, RemoteKeys},
    },
    budget::Budget,
    config::{Changes, Config, Snapshot},
    drain::Pace,
    file::{FileError, MAX, Reads, read_text},
    hub::{FanOut, Hub, Mailbox},
    protocol,
    request::Gate,
    server,
    settings::{LiveSettings, Settings},
    shard::{Context, Event, Inbox, Shard},
    tls::{Tls, TlsError},
    vocabulary::SessionIds,
    watch::watch,
};

/// What an inbox may hold in publications at most, in bytes. At a rate that a shard cannot keep up with, this is
/// the memory it may cost before publications are dropped and told as gaps.
const INBOX: usize = 64 * 1024 * 1024;
/// How often a leaving node looks whether its shards have left.
const LOOK: Duration = Duration::from_millis(20);
/// How long a leaving node waits for a shard that was told to drop everything.
const GRACE: Duration = Duration::from_secs(2);

/// A running node.
pub struct Node {
    public: SocketAddr,
    ops: SocketAddr,
    /// What it runs with, key by key.
    configured: Mutex<Snapshot>,
    registry: Registry,
    gate: Arc<Gate>,
    shards: Arc<[Shard]>,
    broker: Arc<dyn Broker>,
    tls: Option<Arc<Tls>>,
    key_files: Arc<KeyFiles>,
    /// Of certificate and keys, when it is told to.
    reads: tokio::sync::Mutex<Reads>,
    /// Stops the acceptor.
    accepting: CancellationToken,
    /// Stops everything else that is not a shard.
    running: CancellationToken,
    tasks: TaskTracker,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener's address cannot be used.
    #[error("cannot listen on {address} ({key}): {error}")]
    Listen {
        /// The configuration key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the operating system said.
        error: io::Error,
    },
    /// A shard's thread or runtime could not be made.
    #[error("cannot start a shard: {0}")]
    Shard(io::Error),
    /// The operating system gave no random numbers.
    #[error("no random numbers: {0}")]
    Random(getrandom::Error),
    /// Two metrics have one name.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The certificates to trust cannot be read.
    #[error("broker.ca_file ({path}): expected a file that can be read: {error}", path = path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// Why.
        error: FileError,
    },
    /// The Redis broker cannot work as configured on this machine.
    #[error("broker: {0}")]
    Broker(#[from] RedisStartError),
    /// A configured key cannot be used.
    #[error("{key}: {0}", key = .0.key())]
    Keys(#[from] LoadError),
    /// Key sets cannot be fetched.
    #[error(transparent)]
    RemoteKeys(#[from] RemoteError),
    /// The certificate or its key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Why a sound configuration cannot be taken by a running node.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// Tokens would be verified by a key that nobody knows.
    #[error("auth: expected a key, since the node was started with one")]
    NoKey,
    /// A key cannot be used.
    #[error("{key}: {0}", key = .0.key())]
    Keys(#[from] LoadError),
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Everybody was told and everything was sent.
    Complete,
    /// The deadline came first; so many sockets were cut. 0 if only the broker was not done.
    Cut(usize),
}

impl Node {
    /// Starts a node; both listeners accept when it returns. Must be called within a tokio runtime.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let registry = Registry::new();
        let metrics = Metrics::register(&registry, &protocol::names())?;
        // Before any port opens: nobody is to reach a node that cannot serve him.
        let tls = config.tls.clone().map(|files| Tls::load(files, &registry)).transpose()?;
        let tls = tls.map(Arc::new);
        let (key_files, remote_keys) = start_keys(&config, &registry)?;
        let public = bind("public.listen", config.public.listen)?;
        let ops = bind("ops.listen", config.ops.listen)?;
        let address =
            |listener: &tokio::net::TcpListener, fallback| listener.local_addr().unwrap_or(fallback);
        let public_address = address(&public, config.public.listen);
        let ops_address = address(&ops, config.ops.listen);

        let budget = Budget::register(&registry, config.shards)?;
        budget.set_limit(config.limits.memory.get());
        let inboxes: Box<[_]> =
            (0..config.shards).map(|_| Arc::new(Inbox::new(inbox_capacity(&config)))).collect();
        let mailboxes = inboxes.iter().map(|inbox| Arc::clone(inbox) as Arc<dyn Mailbox>).collect();
        let fan_out = Arc::new(FanOut::new(mailboxes, metrics.hub, Arc::clone(&budget)));
        let broker = start_broker(&config, &fan_out, &registry)?;
        let hub = Arc::new(Hub::new(fan_out, Arc::clone(&broker)));
        let ids = Arc::new(SessionIds::new(getrandom::u64().map_err(StartError::Random)?));
        let settings = Arc::new(LiveSettings::new(Settings::new(&config, key_files.keyring())));
        // Shards and routes ask how much all shards hold: the counters come first.
        let health: Vec<_> = (0..config.shards).map(|_| Arc::default()).collect();
        let context = Arc::new(Context {
            hub: Arc::clone(&hub),
            broker: Arc::clone(&broker),
            metrics: metrics.shards,
            traffic: Arc::clone(&metrics.traffic),
            requests: Arc::clone(&metrics.requests),
            budget: Arc::clone(&budget),
            tls: tls.clone(),
            ids: Arc::clone(&ids),
            settings: Arc::clone(&settings),
            shards: health.clone(),
        });

        let gate = Arc::new(Gate {
            settings: Arc::clone(&settings),
            broker: Arc::clone(&broker),
            metrics: metrics.requests,
            traffic: metrics.traffic,
            budget,
            ids,
            shards: health.clone(),
            refuse: protocol::refuse,
            demo: config.demo,
            draining: false.into(),
            closed: false.into(),
        });
        let shards = inboxes
            .iter()
            .zip(health)
            .enumerate()
            .map(|(index, (inbox, health))| {
                let routes = server::public_routes(Arc::clone(&gate));
                Shard::start(index, Arc::clone(inbox), health, Arc::clone(&context), routes)
            })
            .collect::<io::Result<Arc<[Shard]>>>()
            .map_err(StartError::Shard)?;

        let (accepting, running, tasks) =
            (CancellationToken::new(), CancellationToken::new(), TaskTracker::new());
        tasks.spawn(server::acceptor::run(public, Arc::clone(&shards), Arc::clone(&gate), accepting.clone()));
        tasks.spawn(running.clone().run_until_cancelled_owned(async move { hub.run().await }));
        tasks.spawn(running.clone().run_until_cancelled_owned(settings.keep_house()));
        if let Some(tls) = &tls {
            tasks.spawn(running.clone().run_until_cancelled_owned(watch(Arc::clone(tls))));
        }
        tasks.spawn(running.clone().run_until_cancelled_owned(watch(Arc::clone(&key_files))));
        if let Some(remote_keys) = remote_keys {
            tasks.spawn(running.clone().run_until_cancelled_owned(remote_keys.run()));
        }
        let ops_routes = server::ops::routes(Arc::clone(&gate), registry.clone())?;
        tasks.spawn(server::ops_listener::run(ops, ops_routes, running.clone()));
        tracing::info!(listener = "public", address = %public_address, "listening");
        tracing::info!(listener = "ops", address = %ops_address, "listening");
        Ok(Self {
            public: public_address,
            ops: ops_address,
            configured: Mutex::new(config.snapshot),
            registry,
            gate,
            shards,
            broker,
            tls,
            key_files,
            reads: tokio::sync::Mutex::default(),
            accepting,
            running,
            tasks,
        })
    }

    /// Where clients reach it.
    pub fn public_address(&self) -> SocketAddr {
        self.public
    }

    /// Where metrics and probes are.
    pub fn ops_address(&self) -> SocketAddr {
        self.ops
    }

    /// What it measures.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Takes over from `config` what may change while the node runs, all of it in one moment, and says what
    /// is different. Open connections stay.
    pub fn reload(&self, config: &Config) -> Result<Changes, ReloadError> {
        // Held to the end: of two reloads at once, the later one counts as a whole.
        let mut configured = self.configured.lock();
        if !config.auth.has_key() {
            return Err(ReloadError::NoKey);
        }
        // The one step that may fail comes first.
        if !self.key_files.hold(&config.auth.keys) {
            self.key_files.replace(config.auth.keys.clone(), config.auth.key_files.clone())?;
        }
        let changes = configured.take_over(&config.snapshot);
        if !changes.live.is_empty() {
            self.gate.settings.replace(Settings::new(config, self.key_files.keyring()));
            self.gate.budget.set_limit(config.limits.memory.get());
            for shard in self.shards.iter() {
                shard.inbox().set_capacity(inbox_capacity(config));
            }
        }
        Ok(changes)
    }

    /// Reads the certificate and its key again, for new connections, and the keys that are files. What is
    /// not sound is refused, with a line in the log.
    pub async fn reload_files(&self) {
        let (tls, key_files) = (self.tls.clone(), Arc::clone(&self.key_files));
        let read = move || (key_files.read_now(), tls.map(|tls| tls.read()));
        match self.reads.lock().await.run(read).await {
            Ok((keys, pair)) => {
                self.key_files.take_now(keys);
                if let Some((tls, pair)) = self.tls.as_ref().zip(pair) {
                    tls.replace(pair);
                }
            }
            Err(error) => {
                tracing::error!(%error, "certificate and keys were not read again; the old ones go on");
            }
        }
    }

    /// Leaves without hurting anybody: not ready at once; after `drain.pause`, in which everybody is served,
    /// new sessions are refused and sessions closed evenly over `drain.window`; then the broker sends what it
    /// has left.
    pub async fn drain(self) -> Departure {
        let drain = self.gate.settings().drain.clone();
        let deadline = Instant::now() + drain.deadline;
        self.gate.draining.store(true, Ordering::Relaxed);
        self.gate.metrics.draining.set(1);
        tracing::info!(sockets = self.gate.connections(), window = ?drain.window, "draining");
        tokio::time::sleep(drain.pause).await;
        self.gate.closed.store(true, Ordering::Relaxed);
        self.accepting.cancel();
        let pace = Arc::new(Pace::new(std::time::Instant::now(), drain.window));
        for shard in self.shards.iter() {
            shard.inbox().post(Event::Drain(Arc::clone(&pace)));
        }
        let departure = if timeout_at(deadline, self.shards_have_left()).await.is_ok() {
            Departure::Complete
        } else {
            let sockets = self.gate.connections();
            tracing::warn!(sockets, "drain.deadline has passed; cutting what is left");
            for shard in self.shards.iter() {
                shard.inbox().post(Event::Stop);
            }
            if timeout(GRACE, self.shards_have_left()).await.is_err() {
                tracing::error!("a shard makes no progress; leaving without it");
            }
            Departure::Cut(sockets)
        };
        let closed = timeout_at(deadline.max(Instant::now() + GRACE), self.close()).await;
        let departure = match (departure, closed) {
            (departure, Ok(())) => departure,
            (departure, Err(_)) => {
                tracing::warn!("drain.deadline has passed; what the broker has not sent is given up");
                if departure == Departure::Complete { Departure::Cut(0) } else { departure }
            }
        };
        tracing::info!(?departure, "drained");
        departure
    }

    /// Ends everything that is not a shard.
    async fn close(&self) {
        self.broker.close().await;
        self.running.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn shards_have_left(&self) {
        let mut looks = tokio::time::interval(LOOK);
        while !self.shards.iter().all(Shard::is_finished) {
            looks.tick().await;
        }
    }
}

/// What each inbox may hold: all of them together no more than a quarter of the node's budget.
fn inbox_capacity(config: &Config) -> usize {
    INBOX.min(config.limits.memory.get() / 4 / config.shards)
}

fn bind(key: &'static str, address: SocketAddr) -> Result<tokio::net::TcpListener, StartError> {
    server::acceptor::bind(address).map_err(|error| StartError::Listen { key, address, error })
}

/// What keeps the keys up to date.
fn start_keys(
    config: &Config,
    registry: &Registry,
) -> Result<(Arc<KeyFiles>, Option<RemoteKeys>), StartError> {
    let auth = &config.auth;
    let with_url = auth.jwks_url.is_some();
    let files = KeyFiles::new(auth.keys.clone(), auth.key_files.clone(), with_url, registry)?;
    let remote = auth.jwks_url.clone().map(|url| {
        RemoteKeys::new(url, auth.jwks_interval, auth.jwks_ca_file.as_deref(), files.keyring(), registry)
    });
    let remote = remote.transpose()?;
    Ok((Arc::new(files), remote))
}

fn read_ca(path: &Path) -> Result<String, StartError> {
    read_text(path, MAX).map_err(|error| StartError::CaFile { path: path.to_owned(), error })
}

fn start_broker(
    config: &Config,
    fan_out: &Arc<FanOut>,
    registry: &Registry,
) -> Result<Arc<dyn Broker>, StartError> {
    let sink = Arc::clone(fan_out);
    let measured = BrokerMetrics::register(registry)?;
    let broker = &config.broker;
    Ok(match &broker.url {
        BrokerUrl::Memory => Arc::new(MemoryBroker::new(&MemoryBus::new(), sink).with_metrics(measured)),
        BrokerUrl::Redis(url) => {
            let redis = RedisConfig {
                prefix: broker.prefix.clone(),
                subscribers: broker.subscribers,
                publishers: broker.publishers,
                publish_queue_bytes: broker.publish_queue.get(),
                max_publication: broker.max_publication.get(),
                connect_timeout: broker.connect_timeout,
                publish_timeout: broker.publish_timeout,
                canary_interval: broker.canary_interval,
                canary_timeout: broker.canary_timeout,
                ca_pem: broker.ca_file.as_deref().map(read_ca).transpose()?,
                ..RedisConfig::new(url.clone())
            };
            Arc::new(RedisBroker::start(redis, sink, measured)?)
        }
    })
}

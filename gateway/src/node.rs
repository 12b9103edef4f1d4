//! A node: assembles the parts, runs them, and drains them.
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
    Affinity, Broker, BrokerUrl,
    memory::{MemoryBroker, MemoryBus},
    metrics::BrokerMetrics,
    redis::{Part, RedisBroker, RedisConfig, RedisStartError},
};
use parking_lot::Mutex;
use prometheus::Registry;
use tokio::time::{Instant, MissedTickBehavior, timeout, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::metrics::Metrics;
use crate::{
    auth::{
        files::{KeyFiles, LoadError},
        remote::{RemoteError, RemoteKeys},
    },
    budget::Budget,
    clock::Time,
    config::{Changes, Config, Snapshot},
    crypto::{CryptoError, CryptoThreads},
    drain::Pace,
    driver::{self, Shard},
    file::{FileError, MAX, Reads, read_text},
    hub::{FanOut, Hub, Mailbox},
    protocol,
    request::Gate,
    server,
    settings::{LiveSettings, Settings},
    shard::{self, Inbox, ShardEvent},
    tls::{Tls, TlsError},
    vocabulary::SessionIds,
    watch::watch,
};

/// The most bytes of publications in an inbox. If a shard cannot keep up, this is the memory that it may cost
/// before publications are dropped and reported as gaps.
const INBOX: usize = 64 * 1024 * 1024;
/// How often unused rate-limit state is removed.
const SWEEP: Duration = Duration::from_secs(1);
/// How often a draining node checks whether its shards have ended.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);
/// How long a draining node waits for a shard that was told to drop everything.
const GRACE: Duration = Duration::from_secs(2);

/// A running node.
pub struct Node {
    public: SocketAddr,
    ops: SocketAddr,
    /// The configuration in effect, key by key.
    configured: Mutex<Snapshot>,
    registry: Registry,
    gate: Arc<Gate>,
    shards: Arc<[Shard]>,
    broker: Arc<dyn Broker>,
    tls: Option<Arc<Tls>>,
    key_files: Arc<KeyFiles>,
    /// Rereads the certificate and key files on request.
    reads: tokio::sync::Mutex<Reads>,
    /// Stops the acceptor.
    accepting: CancellationToken,
    /// Stops everything else that is not a shard.
    running: CancellationToken,
    tasks: TaskTracker,
}

/// Why a node failed to start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener's address cannot be used.
    #[error("cannot listen on {address} ({key}): {error}")]
    Listen {
        /// The configuration key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// The error from the operating system.
        error: io::Error,
    },
    /// A shard's thread or runtime could not be created.
    #[error("cannot start a shard: {0}")]
    Shard(io::Error),
    /// The operating system returned no random numbers.
    #[error("no random numbers: {0}")]
    Random(getrandom::Error),
    /// Two metrics have the same name.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The file of trusted certificates cannot be read.
    #[error("broker.ca_file ({path}): expected a file that can be read: {error}", path = path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// The error.
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
    /// The threads for cryptography cannot be started.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
}

/// Why a running node rejects a valid configuration.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// Tokens could no longer be verified.
    #[error("auth: expected a key, since the node was started with one")]
    NoKey,
    /// A key cannot be used.
    #[error("{key}: {0}", key = .0.key())]
    Keys(#[from] LoadError),
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// All sessions were notified and everything was sent.
    Complete,
    /// The deadline passed first, and this many sockets were cut. 0 if only the broker had not finished.
    Cut(usize),
}

impl Node {
    /// Starts a node; both listeners accept connections when it returns. Must be called within a tokio
    /// runtime.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let registry = Registry::new();
        let metrics = Metrics::register(&registry, &protocol::names())?;
        // Don't open a port until the node can serve.
        let load = |files| Tls::load(files, &registry).map(Arc::new);
        let tls = config.tls.clone().map(load).transpose()?;
        let (key_files, remote_keys) = start_keys(&config, &registry)?;
        let public = bind("public.listen", config.public.listen)?;
        let ops = bind("ops.listen", config.ops.listen)?;
        let public_address = public.local_addr().unwrap_or(config.public.listen);
        let ops_address = ops.local_addr().unwrap_or(config.ops.listen);

        let crypto = Arc::new(CryptoThreads::start(config.shards, &registry)?);
        let time = Time::default();
        let budget = Budget::register(&registry, config.shards)?;
        budget.set_limit(config.limits.memory.get());
        let inboxes: Box<[_]> =
            (0..config.shards).map(|_| Arc::new(Inbox::new(inbox_capacity(&config)))).collect();
        let mailboxes = inboxes.iter().map(|inbox| Arc::clone(inbox) as Arc<dyn Mailbox>).collect();
        let fan_out = FanOut::new(mailboxes, metrics.hub, Arc::clone(&budget), time.clone());
        let (broker, parts) = start_broker(&config, &registry)?;
        let hub = Arc::new(Hub::new(fan_out, Arc::clone(&broker)));
        let ids = Arc::new(SessionIds::new(getrandom::u64().map_err(StartError::Random)?));
        let settings = Arc::new(LiveSettings::new(Settings::new(&config, key_files.keyring()), time.clone()));
        // Shards and routes use the load of all shards, so create the counters first.
        let health: Vec<_> = (0..config.shards).map(|_| Arc::default()).collect();
        let context = Arc::new(driver::Context {
            shard: Arc::new(shard::Context {
                hub: Arc::clone(&hub),
                broker: Arc::clone(&broker),
                metrics: metrics.shards,
                traffic: Arc::clone(&metrics.traffic),
                budget: Arc::clone(&budget),
                settings: Arc::clone(&settings),
                time,
            }),
            requests: Arc::clone(&metrics.requests),
            tls: tls.clone(),
            readings: driver::readings::Readings::new(Arc::clone(&broker)),
            crypto: Arc::clone(&crypto),
            ids: Arc::clone(&ids),
            shards: health.clone(),
        });

        let gate = Arc::new(Gate {
            settings: Arc::clone(&settings),
            broker: Arc::clone(&broker),
            metrics: metrics.requests,
            traffic: metrics.traffic,
            budget,
            crypto,
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
            .zip(parts.into_iter().chain(std::iter::repeat_with(Part::new)))
            .enumerate()
            .map(|(index, ((inbox, health), part))| {
                let routes = server::public_routes(Arc::clone(&gate), Affinity(index));
                Shard::start(index, Arc::clone(inbox), health, Arc::clone(&context), routes, part)
            })
            .collect::<io::Result<Arc<[Shard]>>>()
            .map_err(StartError::Shard)?;

        let (accepting, running, tasks) =
            (CancellationToken::new(), CancellationToken::new(), TaskTracker::new());
        tasks.spawn(server::acceptor::run(public, Arc::clone(&shards), Arc::clone(&gate), accepting.clone()));
        tasks.spawn(running.clone().run_until_cancelled_owned(driver::repairs::run(Arc::clone(&hub))));
        let forget = async move { every(Hub::STEP, || hub.forget_rooms()).await };
        tasks.spawn(running.clone().run_until_cancelled_owned(forget));
        let swept = Arc::clone(&settings);
        let sweep = async move { every(SWEEP, || swept.limiters().sweep()).await };
        tasks.spawn(running.clone().run_until_cancelled_owned(sweep));
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

    /// The address for clients.
    pub fn public_address(&self) -> SocketAddr {
        self.public
    }

    /// The address for metrics and probes.
    pub fn ops_address(&self) -> SocketAddr {
        self.ops
    }

    /// The node's metrics.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Atomically applies the settings of `config` that may change while the node runs, and returns the
    /// differences. Open connections stay.
    pub fn reload(&self, config: &Config) -> Result<Changes, ReloadError> {
        // Held to the end: with two concurrent reloads, the later one applies as a whole.
        let mut configured = self.configured.lock();
        if !config.auth.has_key() {
            return Err(ReloadError::NoKey);
        }
        // Do the only step that may fail first.
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

    /// Reads the certificate and its key again, for new connections, and the key files. Invalid files are
    /// rejected with a log message.
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
                tracing::error!(%error, "cannot reread the certificate and keys; the old ones stay in use");
            }
        }
    }

    /// Drains the node without disturbing its clients. It is not ready from the start. During `drain.pause`,
    /// everything is still served. Then new sessions are refused and existing ones closed evenly over
    /// `drain.window`. Finally the broker sends what it has queued.
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
            shard.inbox().post(ShardEvent::Drain(Arc::clone(&pace)));
        }
        let departure = if timeout_at(deadline, self.shards_have_ended()).await.is_ok() {
            Departure::Complete
        } else {
            let sockets = self.gate.connections();
            tracing::warn!(sockets, "drain.deadline has passed; cutting what is left");
            for shard in self.shards.iter() {
                shard.inbox().post(ShardEvent::Stop);
            }
            if timeout(GRACE, self.shards_have_ended()).await.is_err() {
                tracing::error!("a shard makes no progress; exiting without it");
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

    /// Stops everything except the shards.
    async fn close(&self) {
        self.broker.close().await;
        self.running.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn shards_have_ended(&self) {
        let mut checks = tokio::time::interval(CHECK_INTERVAL);
        while !self.shards.iter().all(Shard::is_finished) {
            checks.tick().await;
        }
    }
}

/// The capacity of each inbox: all inboxes together may use a quarter of the node's memory budget.
fn inbox_capacity(config: &Config) -> usize {
    INBOX.min(config.limits.memory.get() / 4 / config.shards)
}

fn bind(key: &'static str, address: SocketAddr) -> Result<tokio::net::TcpListener, StartError> {
    server::acceptor::bind(address).map_err(|error| StartError::Listen { key, address, error })
}

/// Starts the tasks that keep the keys up to date.
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

/// Does something periodically, forever.
async fn every(time: Duration, mut act: impl FnMut()) {
    let mut ticks = tokio::time::interval(time);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        act();
    }
}

/// The broker, and what the shards' threads do for it.
fn start_broker(config: &Config, registry: &Registry) -> Result<(Arc<dyn Broker>, Vec<Part>), StartError> {
    let measured = BrokerMetrics::register(registry)?;
    let broker = &config.broker;
    Ok(match &broker.url {
        BrokerUrl::Memory => {
            (Arc::new(MemoryBroker::new(&MemoryBus::new()).with_metrics(measured)), Vec::new())
        }
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
            let (broker, parts) = RedisBroker::new(redis, measured)?;
            (Arc::new(broker), parts)
        }
    })
}

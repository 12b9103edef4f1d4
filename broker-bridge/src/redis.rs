//! Redis pub/sub between any number of nodes.
//!
//! A room is a topic, `<prefix>room:<room>`. Any program may publish there with a bare `PUBLISH`; nodes add an
//! envelope when there is metadata. Supports one standalone Redis server, over TCP, TLS or a unix socket.
//!
//! The log of a room with history is a stream. A function in Redis ([`functions`]) appends a publication to it and
//! publishes it, in one step; see `functions.lua`. Nodes load the functions where they are missing.
//!
//! Owns the connections and their tasks:
//!
//! | connections | used for | bound |
//! |---|---|---|
//! | [`subscribers`](RedisConfig::subscribers) pub/sub connections, own reader | receiving; the [affinity](Affinity) of a subscription chooses one of them | no queue: the sink is called in line |
//! | [`publishers`](RedisConfig::publishers) connections, own writer | `PUBLISH`, and calls of the function that also records, in pipelines; the affinity of a publication chooses one of them | [`publish_queue_bytes`](RedisConfig::publish_queue_bytes), shared out |
//! | a small pool | requests and their answers in batches: positions and parts of rooms' histories; health checks | [`POOL`] connections, 64 requests in flight on each |
//!
//! The tasks of the first two are handed out as [`Part`]s: a part has one connection of each kind, or of one if there
//! are fewer of the other, and whoever gets it polls its tasks. So a gateway's shard reads and writes Redis on its own
//! thread. Everything that is not per message runs on the runtime on which the broker was started.
//!
//! # Health checks
//!
//! Every [`canary_interval`](RedisConfig::canary_interval), for as long as it lives, a connection has to prove that its
//! server answers, that the server is the master, and that what this node publishes reaches this node. See
//! `canaries`, and `answer` for the meaning of server errors. Deadlines do not run while this process is stopped
//! (`clock`).
//!
//! An unreachable Redis is not an error: the status is [`BrokerStatus::Connecting`] with the reason, and the tasks
//! retry with jittered delays of up to two seconds.
//!
//! # The ACL user
//!
//! The minimum permissions that a node needs, with the default prefix:
//!
//! ```text
//! ACL SETUSER tidegate on >secret resetchannels &room:* &tidegate:canary:*
//!     -@all +subscribe +unsubscribe +publish
//! ```
//!
//! Rooms with history need more:
//!
//! ```text
//! ACL SETUSER tidegate ~{room:*}:* +fcall +function|load +xadd +xrange +xrevrange +xinfo +xgroup +xsetid +xtrim
//!     +xdel +pexpire +persist +get +set +info +time +client|kill
//! ```
//!
//! Leave out `+function|load` if an administrator loads the functions (see [`functions`]). Without `+client|kill` a node
//! cannot find out what became of publications whose connection was lost before the answer: they are unknown.
//!
//! Put a prefix, if there is one, before all patterns of channels and keys. `+select` is needed for a database other than 0.
//! `HELLO`, by which a node asks for the server's role, needs no permission.

mod answer;
mod backoff;
mod canaries;
mod clock;
mod connection;
mod envelope;
pub mod functions;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod head;
mod keys;
mod log;
mod part;
mod pool;
mod publisher;
mod requests;
mod resp;
mod status;
mod subscriber;
mod url;

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use tokio::{
    runtime::Handle,
    sync::{Mutex, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    canaries::Canaries,
    clock::Clock,
    connection::Connector,
    keys::Topics,
    log::Logs,
    part::Tasks,
    pool::Pool,
    publisher::{Publisher, Queue},
    requests::Requests,
    status::StatusTracker,
    subscriber::{DesiredRooms, Subscriber},
};
pub use self::{
    keys::{InvalidPrefix, Prefix},
    part::Part,
    url::{Endpoint, RedisUrl, Secret},
};
use crate::{
    Affinity, Broker, BrokerError, BrokerStatus, Positioning, PublishRequest, Reading, Retention, RoomName,
    Sink, Subscribing, history::ReadFrom, metrics::BrokerMetrics, tls::TrustError,
};

/// The configuration of a [`RedisBroker`].
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// The server's address.
    pub url: RedisUrl,
    /// The prefix of every name in Redis.
    pub prefix: Prefix,
    /// The number of pub/sub connections; at least one.
    pub subscribers: usize,
    /// The number of connections for publications; at least one.
    pub publishers: usize,
    /// The size of their queues together, in bytes; each publication counts as 320 bytes more than its payload.
    pub publish_queue_bytes: usize,
    /// The largest payload, in bytes. A larger one is refused when published here, and a gap when received.
    pub max_publication: usize,
    /// The time limit for connecting, including TLS and greeting.
    pub connect_timeout: Duration,
    /// The time limit for a publication to wait for a connection, and then for its answer.
    pub publish_timeout: Duration,
    /// How often each connection is checked. Keep it below the idle time-outs of proxies in between.
    pub canary_interval: Duration,
    /// The time limit for a check, after which the connection is closed.
    pub canary_timeout: Duration,
    /// Certificates to trust instead of the system's, in PEM: authorities, or the server's own certificate.
    pub ca_pem: Option<String>,
}

impl RedisConfig {
    /// The defaults for a server at `url`.
    pub fn new(url: RedisUrl) -> Self {
        Self {
            url,
            prefix: Prefix::default(),
            subscribers: 2,
            publishers: 2,
            publish_queue_bytes: 16 * 1024 * 1024,
            max_publication: 4 * 1024 * 1024,
            connect_timeout: Duration::from_secs(5),
            publish_timeout: Duration::from_secs(5),
            canary_interval: Duration::from_secs(5),
            canary_timeout: Duration::from_secs(5),
            ca_pem: None,
        }
    }
}

/// `redis://127.0.0.1:6379` and the defaults of [`RedisConfig::new`].
impl Default for RedisConfig {
    fn default() -> Self {
        let endpoint = Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 6379 };
        Self::new(RedisUrl { endpoint, user: None, password: None, database: 0 })
    }
}

/// Why a [`RedisBroker`] cannot start. An unreachable server is no reason.
#[derive(Debug, thiserror::Error)]
pub enum RedisStartError {
    /// The trusted certificates cannot be loaded.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The host is not a name that a certificate can contain.
    #[error("not a host name that a certificate can be for: {0}")]
    ServerName(String),
    /// The pool cannot be created.
    #[error("the connection pool: {0}")]
    Pool(String),
}

/// One node's broker on Redis. Dropping it aborts its tasks; [`close`](Broker::close) lets them finish.
pub struct RedisBroker {
    desired: Vec<Arc<DesiredRooms>>,
    queues: Vec<Queue>,
    max_publication: usize,
    flush_limit: Duration,
    status: Arc<StatusTracker>,
    metrics: Arc<BrokerMetrics>,
    /// With the pool.
    logs: Logs,
    tracker: TaskTracker,
    closing: CancellationToken,
    abort: CancellationToken,
}

/// How long tasks may take to end once they have been aborted. Only one that no thread polls takes longer.
const ABORT_LIMIT: Duration = Duration::from_secs(1);

/// The maximum number of connections in the pool.
pub const POOL: usize = pool::SIZE;

impl RedisBroker {
    /// Starts everything on the ambient tokio runtime and returns at once.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn start(config: RedisConfig, metrics: Arc<BrokerMetrics>) -> Result<Self, RedisStartError> {
        let (broker, parts) = Self::new(config, metrics)?;
        for task in parts.into_iter().flatten() {
            broker.tracker.spawn(task);
        }
        Ok(broker)
    }

    /// A broker and its parts, as many as it has subscribers or publishers. What has an affinity goes through the part of
    /// that number, modulo the number of subscribers or publishers. Nothing happens on a part until its tasks are
    /// polled; the rest runs on the ambient tokio runtime.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[allow(clippy::needless_pass_by_value, reason = "the broker takes ownership")]
    pub fn new(
        config: RedisConfig,
        metrics: Arc<BrokerMetrics>,
    ) -> Result<(Self, Vec<Part>), RedisStartError> {
        let ca_pem = config.ca_pem.as_ref().map(String::as_bytes);
        let connector = Arc::new(Connector::new(config.url.clone(), ca_pem, config.connect_timeout)?);
        let topics = Topics::new(&config.prefix);
        let (subscribers, publishers) = (config.subscribers.max(1), config.publishers.max(1));
        let clock = Arc::new(Clock::new());
        let canaries =
            Arc::new(Canaries::new(topics.canary(random_id()), publishers, subscribers, Arc::clone(&clock)));
        let (tracker, closing) = (TaskTracker::new(), CancellationToken::new());
        let pool = pool::pool(
            Arc::clone(&connector),
            Arc::clone(&canaries),
            config.canary_timeout,
            tracker.clone(),
            closing.clone(),
        )
        .map_err(|error| RedisStartError::Pool(error.to_string()))?;
        let starting = format!("{}: connecting", config.url);
        let requests = Requests::new(pool.clone(), config.canary_timeout, &tracker, &closing, &metrics);
        let logs =
            Logs::new(pool.clone(), requests, topics.clone(), config.max_publication, Arc::clone(&metrics));
        let mut broker = Self {
            desired: Vec::with_capacity(subscribers),
            queues: Vec::with_capacity(publishers),
            max_publication: config.max_publication,
            flush_limit: config.publish_timeout,
            status: Arc::new(StatusTracker::new(
                subscribers + publishers + 1,
                &starting,
                Arc::clone(&metrics),
            )),
            metrics,
            logs: logs.clone(),
            tracker,
            closing,
            abort: CancellationToken::new(),
        };
        let tasks = Tasks {
            runtime: Handle::current(),
            tracker: broker.tracker.clone(),
            closing: broker.closing.clone(),
            status: Arc::clone(&broker.status),
        };
        let mut parts: Vec<Part> = (0..subscribers.max(publishers)).map(|_| Part::new()).collect();
        for (index, part) in parts.iter_mut().enumerate().take(subscribers) {
            let desired = Arc::new(DesiredRooms::new(Arc::clone(&broker.metrics)));
            broker.desired.push(Arc::clone(&desired));
            let subscriber = Subscriber {
                part: index,
                connector: Arc::clone(&connector),
                topics: topics.clone(),
                canaries: Arc::clone(&canaries),
                clock: Arc::clone(&clock),
                canary_interval: config.canary_interval,
                canary_timeout: config.canary_timeout,
                max_publication: config.max_publication,
                desired,
                metrics: Arc::clone(&broker.metrics),
                status: Arc::clone(&broker.status),
                closing: broker.closing.clone(),
            };
            part.push(tasks.task(index, Arc::new(move || Box::pin(subscriber.clone().run()))));
        }
        for (index, part) in parts.iter_mut().enumerate().take(publishers) {
            let (queue, far_end) = Queue::new(
                config.publish_queue_bytes / publishers,
                config.publish_timeout,
                Arc::clone(&clock),
                Arc::clone(&broker.metrics),
            );
            broker.queues.push(queue);
            let publisher = Publisher {
                index,
                part: subscribers + index,
                connector: Arc::clone(&connector),
                topics: topics.clone(),
                time_limit: config.publish_timeout,
                canaries: Arc::clone(&canaries),
                canary_interval: config.canary_interval,
                canary_timeout: config.canary_timeout,
                load_functions: logs.clone().loader(),
                clock: Arc::clone(&clock),
                metrics: Arc::clone(&broker.metrics),
                status: Arc::clone(&broker.status),
                closing: broker.closing.clone(),
                abort: broker.abort.clone(),
            };
            let far_end = Arc::new(Mutex::new(far_end));
            let begin = Arc::new(move || -> BoxFuture<'static, ()> {
                let (publisher, far_end) = (publisher.clone(), Arc::clone(&far_end));
                Box::pin(async move { publisher.run(far_end.lock_owned().await).await })
            });
            part.push(tasks.task(subscribers + index, begin));
        }
        broker.watch(pool, &tasks, subscribers + publishers, &config);
        Ok((broker, parts))
    }

    /// Checks the pool for as long as the broker is open, and reports it as `part` of the status.
    fn watch(&self, pool: Pool, tasks: &Tasks, part: usize, config: &RedisConfig) {
        let status = Arc::clone(&self.status);
        let (of, interval) = (format!("{}: requests", config.url), config.canary_interval);
        let begin = Arc::new(move || -> BoxFuture<'static, ()> {
            Box::pin(pool::watch(pool.clone(), interval, part, Arc::clone(&status), of.clone()))
        });
        let watch = tasks.clone().run(part, begin);
        self.tracker.spawn(self.closing.clone().run_until_cancelled_owned(watch));
    }

    /// Settles a request that must not be queued, and returns any other.
    fn refuse(&self, request: PublishRequest) -> Option<PublishRequest> {
        let bytes = request.publication.data.bytes().len();
        let outcome = if self.closing.is_cancelled() {
            Err(BrokerError::Closed)
        } else if bytes > self.max_publication {
            let text = format!("{bytes} bytes are more than the {} that are allowed", self.max_publication);
            Err(BrokerError::Refused(text.into()))
        } else if let Some(fault) = request.fault() {
            Err(fault)
        } else {
            return Some(request);
        };
        self.metrics.published(&outcome);
        request.receipt.settle(outcome);
        None
    }
}

impl Broker for RedisBroker {
    fn subscribe(&self, room: &RoomName, sink: Arc<dyn Sink>, affinity: Affinity) -> Subscribing {
        affinity.of(&self.desired).subscribe(room, sink)
    }

    fn unsubscribe(&self, room: &RoomName, affinity: Affinity) {
        affinity.of(&self.desired).unsubscribe(room);
    }

    fn try_publish(&self, request: PublishRequest) -> Result<(), PublishRequest> {
        match self.refuse(request) {
            Some(request) => request.affinity.of(&self.queues).try_publish(request),
            None => Ok(()),
        }
    }

    fn publish(&self, request: PublishRequest) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            if let Some(request) = self.refuse(request) {
                request.affinity.of(&self.queues).publish(request).await;
            }
        })
    }

    fn open(&self, room: &RoomName, retention: Retention) -> Positioning {
        Box::pin(self.logs.clone().open(room.clone(), retention))
    }

    fn read(&self, room: &RoomName, from: ReadFrom, limit: usize) -> Reading {
        Box::pin(self.logs.clone().read(room.clone(), from, limit))
    }

    fn clear(&self, room: &RoomName) -> Positioning {
        Box::pin(self.logs.clone().clear(room.clone()))
    }

    fn status(&self) -> watch::Receiver<BrokerStatus> {
        self.status.watch()
    }

    /// Takes at most [`RedisConfig::publish_timeout`] and one second.
    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.end();
            if timeout(self.flush_limit, self.tracker.wait()).await.is_err() {
                tracing::warn!("closing the broker with publications that could not be sent");
                self.abort.cancel();
                if timeout(ABORT_LIMIT, self.tracker.wait()).await.is_err() {
                    tracing::error!(
                        "the thread of a connection to the broker makes no progress; closing without it"
                    );
                }
            }
            self.status.close();
        })
    }
}

impl RedisBroker {
    /// Accepts nothing more, and tells the tasks to finish.
    fn end(&self) {
        self.closing.cancel();
        self.logs.close();
        self.desired.iter().for_each(|desired| desired.close());
        self.queues.iter().for_each(Queue::close);
        self.tracker.close();
    }
}

impl Drop for RedisBroker {
    fn drop(&mut self) {
        self.end();
        self.abort.cancel();
        self.status.close();
    }
}

impl fmt::Debug for RedisBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisBroker").field("status", &*self.status.watch().borrow()).finish_non_exhaustive()
    }
}

fn random_id() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system gives random bytes");
    u128::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use prometheus::Registry;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn closing_does_not_wait_for_a_part_that_no_thread_polls() {
        let config = RedisConfig::new("redis://127.0.0.1:1".parse().unwrap());
        let limit = config.publish_timeout + ABORT_LIMIT + Duration::from_secs(1);
        let metrics = BrokerMetrics::register(&Registry::new()).unwrap();
        let (broker, parts) = RedisBroker::new(config, metrics).unwrap();
        timeout(limit, broker.close()).await.unwrap();
        assert_eq!(*broker.status().borrow(), BrokerStatus::Closed);
        drop(parts);
    }
}

//! The pool of connections for requests and their answers, such as a part of a room's history.
//!
//! Opens connections like all others, and checks the server's role before a connection is lent again. Every interval
//! it also checks that the pool works; that request keeps a connection from being idle. A demotion that it detects
//! is reported to all connections ([`Canaries::demoted`]).
//!
//! Uses `deadpool`, but not the manager of `deadpool-redis`, which opens connections by itself, without this
//! crate's TLS trust and address racing.

use std::{pin::Pin, sync::Arc, time::Duration};

use deadpool::managed::{self, RecycleError, RecycleResult};
use deadpool_redis::{Metrics, Runtime};
use redis::{AsyncConnectionConfig, ProtocolVersion, RedisConnectionInfo, Value, aio::MultiplexedConnection};
use tokio::time::{Instant, sleep_until};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    answer::{Answer, Link},
    canaries::Canaries,
    connection::{ConnectError, Connection, Connector, Role},
    status::StatusTracker,
};
use crate::BrokerError;

/// Connections for requests.
pub(super) type Pool = managed::Pool<Manager>;

/// The maximum number of connections in the pool.
pub(super) const SIZE: usize = 4;

/// The maximum number of requests in flight on one connection.
const IN_FLIGHT: usize = 8;

/// Reads and writes a connection's bytes.
type Driver = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Opens connections, and decides whether one may be reused.
pub(super) struct Manager {
    connector: Arc<Connector>,
    canaries: Arc<Canaries>,
    /// The time limit for an answer.
    time_limit: Duration,
    tracker: TaskTracker,
    closing: CancellationToken,
}

/// A connection of the pool.
pub(super) struct Pooled {
    connection: MultiplexedConnection,
    /// How many demotions had been detected when it began.
    demotions: u64,
}

impl Pooled {
    pub(super) fn connection(&mut self) -> &mut MultiplexedConnection {
        &mut self.connection
    }
}

/// Why the pool has no connection to lend.
#[derive(Debug, thiserror::Error)]
pub(super) enum PoolError {
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Request(#[from] redis::RedisError),
    #[error("the server said: {0}")]
    Refused(Arc<str>),
    #[error("the server has become a replica")]
    Demoted,
}

impl managed::Manager for Manager {
    type Type = Pooled;
    type Error = PoolError;

    async fn create(&self) -> Result<Pooled, PoolError> {
        // Counted before the server says that it is the master: a demotion after that ends this connection.
        let demotions = *self.canaries.demotions().borrow();
        let stream = self.connector.open(Role::Request).await?;
        let (connection, driver) = hand_over(stream, self.time_limit).await?;
        // Ends with its connection, or with the broker.
        self.tracker.spawn(self.closing.clone().run_until_cancelled_owned(driver));
        Ok(Pooled { connection, demotions })
    }

    async fn recycle(&self, pooled: &mut Pooled, _: &Metrics) -> RecycleResult<PoolError> {
        if *self.canaries.demotions().borrow() != pooled.demotions {
            return Err(RecycleError::Backend(PoolError::Demoted));
        }
        let mut hello = redis::cmd("HELLO");
        hello.arg(3);
        let answer = pooled.connection.send_packed_command(&hello).await;
        let server_error = match answer {
            Ok(Value::ServerError(error)) => Answer::to_server_error(&error),
            Ok(value) if role_of(&value).is_some_and(|role| role != b"master") => {
                self.canaries.demoted(pooled.demotions);
                return Err(RecycleError::Backend(PoolError::Demoted));
            }
            Ok(_) => return Ok(()),
            Err(error) => return Err(RecycleError::Backend(error.into())),
        };
        match server_error.link {
            Link::Keep => Ok(()),
            Link::Renew => Err(RecycleError::Backend(PoolError::Refused(server_error.text))),
        }
    }
}

/// A pool that connects on demand.
pub(super) fn pool(
    connector: Arc<Connector>,
    canaries: Arc<Canaries>,
    time_limit: Duration,
    tracker: TaskTracker,
    closing: CancellationToken,
) -> Result<Pool, managed::BuildError> {
    let manager = Manager { connector, canaries, time_limit, tracker, closing };
    Pool::builder(manager)
        .max_size(SIZE)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(time_limit))
        .recycle_timeout(Some(time_limit))
        .build()
}

/// A connection for a request; [`BrokerError::Unavailable`] if there is none within the time limit.
pub(super) async fn get(pool: &Pool) -> Result<managed::Object<Manager>, BrokerError> {
    pool.get().await.map_err(|error| match error {
        managed::PoolError::Closed => BrokerError::Closed,
        error => {
            tracing::debug!(%error, "no connection for a request");
            BrokerError::Unavailable
        }
    })
}

/// Borrows a connection every interval, and reports the result as `part`. A single failure is not reported, because
/// the pool then opens a new connection.
pub(super) async fn watch(
    pool: Pool,
    interval: Duration,
    part: usize,
    status: Arc<StatusTracker>,
    of: String,
) {
    let mut failures = 0_u32;
    loop {
        let next = Instant::now() + interval;
        match pool.get().await {
            Ok(_) => {
                failures = 0;
                status.up(part);
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                if failures >= 2 {
                    status.down(part, format!("{of}: {error}"));
                }
            }
        }
        sleep_until(next).await;
    }
}

/// Turns a greeted connection into one of the client library, which does not greet the server again. `time_limit` bounds
/// the wait for an answer.
async fn hand_over(
    stream: Connection,
    time_limit: Duration,
) -> Result<(MultiplexedConnection, Driver), ConnectError> {
    let greeted = RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
    let config = AsyncConnectionConfig::new()
        .set_response_timeout(Some(time_limit))
        .set_pipeline_buffer_size(IN_FLIGHT);
    let (connection, driver) = MultiplexedConnection::new_with_config(&greeted, stream, config)
        .await
        .map_err(|error| ConnectError::Refused(error.to_string()))?;
    Ok((connection, Box::pin(driver)))
}

/// The `role` in an answer to `HELLO`, as the client library parses it.
fn role_of(hello: &Value) -> Option<&[u8]> {
    fn text(value: &Value) -> Option<&[u8]> {
        match value {
            Value::BulkString(bytes) => Some(bytes),
            Value::SimpleString(text) => Some(text.as_bytes()),
            _ => None,
        }
    }
    match hello {
        Value::Map(pairs) => {
            pairs.iter().find(|(key, _)| text(key) == Some(b"role")).and_then(|(_, role)| text(role))
        }
        Value::Array(items) => items
            .chunks_exact(2)
            .find_map(|pair| {
                matches!(pair, [key, _] if text(key) == Some(b"role")).then(|| text(pair.last()?))
            })
            .flatten(),
        _ => None,
    }
}

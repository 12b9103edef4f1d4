//! The pool of connections for requests and their answers.
//!
//! Opens connections like all others, when they are needed. A connection is lent without asking the server anything
//! first. Whoever borrows one asks for the server's role, and believes no answer unless the server says that it is the
//! master ([`Pooled::vouch`]): [`requests`](super::requests) send that question behind the requests themselves, others
//! borrow by [`checked`]. A demotion that is detected here is reported to all connections ([`Canaries::demoted`]).
//!
//! Every interval the pool is checked, so that its status is known and a connection is not idle.
//!
//! Uses `deadpool`, but not the manager of `deadpool-redis`, which opens connections by itself, without this
//! crate's TLS trust and address racing.

use std::{pin::Pin, sync::Arc, time::Duration};

use deadpool::managed::{self, RecycleError, RecycleResult};
use deadpool_redis::{Metrics, Runtime};
use redis::{
    AsyncConnectionConfig, Cmd, ProtocolVersion, RedisConnectionInfo, Value, aio::MultiplexedConnection,
};
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

/// The number of messages that may wait for a connection's driver. A pipeline is one message.
const BUFFERED: usize = 2;

/// Reads and writes a connection's bytes.
type Driver = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A borrowed connection. Goes back to the pool when it is dropped.
pub(super) type Lent = managed::Object<Manager>;

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
    canaries: Arc<Canaries>,
    /// How many demotions had been detected when it began.
    demotions: u64,
}

impl Pooled {
    pub(super) fn connection(&mut self) -> &mut MultiplexedConnection {
        &mut self.connection
    }

    /// Whether answers on this connection may be believed that came before `hello`, the answer to [`hello`]: the server
    /// is still the master, and nobody has found out anything else. If not, the connection must be closed.
    pub(super) fn vouch(&self, hello: &Value) -> Result<(), PoolError> {
        if self.is_left() {
            return Err(PoolError::Demoted);
        }
        match hello {
            Value::ServerError(error) => {
                let answer = Answer::to_server_error(error);
                match answer.link {
                    Link::Keep => Ok(()),
                    Link::Renew => Err(PoolError::Refused(answer.text)),
                }
            }
            value if role_of(value).is_some_and(|role| role != b"master") => {
                self.canaries.demoted(self.demotions);
                Err(PoolError::Demoted)
            }
            _ => Ok(()),
        }
    }

    /// Whether a demotion has been detected since this connection began, on whichever connection.
    fn is_left(&self) -> bool {
        *self.canaries.demotions().borrow() != self.demotions
    }
}

/// Asks for the server's role. Needs no permission.
pub(super) fn hello() -> Cmd {
    let mut hello = redis::cmd("HELLO");
    hello.arg(3);
    hello
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
        Ok(Pooled { connection, canaries: Arc::clone(&self.canaries), demotions })
    }

    async fn recycle(&self, pooled: &mut Pooled, _: &Metrics) -> RecycleResult<PoolError> {
        if pooled.is_left() { Err(RecycleError::Backend(PoolError::Demoted)) } else { Ok(()) }
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

/// A connection whose server has just said that it is the master. Tries the next one if the server has closed a
/// connection that was idle.
pub(super) async fn checked(pool: &Pool) -> Result<Lent, managed::PoolError<PoolError>> {
    loop {
        let mut lent = pool.get().await?;
        let answer = lent.connection().send_packed_command(&hello()).await;
        let Err(error) = answer.map_err(PoolError::from).and_then(|answer| lent.vouch(&answer)) else {
            return Ok(lent);
        };
        let is_new = Lent::metrics(&lent).recycle_count == 0;
        drop(Lent::take(lent));
        if is_new {
            return Err(managed::PoolError::Backend(error));
        }
    }
}

/// What the failure to borrow a connection means for a request.
pub(super) fn no_connection(error: managed::PoolError<PoolError>) -> BrokerError {
    match error {
        managed::PoolError::Closed => BrokerError::Closed,
        error => {
            tracing::debug!(%error, "no connection for a request");
            BrokerError::Unavailable
        }
    }
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
        match checked(&pool).await {
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
        .set_pipeline_buffer_size(BUFFERED);
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

//! One connection for publications and the task that owns it. The queue before it is `queue`.
//!
//! Owns the order of a room on the way out and the fate of each publication.
//!
//! The task drains the queue into pipelines of `PUBLISH` and keeps a few of them in flight on one multiplexed
//! connection. A pool would spread a room over many connections and lose its order; a round trip per publication
//! would be slow.
//!
//! # Proof
//!
//! A connection begins with a [canary](super::canaries) together with `HELLO`, and sends both again every interval.
//! `HELLO` tells the server's role: a server that has become a replica still acknowledges publications, but does not
//! pass them on. The canary also keeps the connection from being idle.
//! Publications wait in the queue while a subscriber of this node has not received a canary of this connection.
//!
//! An error is the answer to one publication. It ends the connection only if another one may succeed; then the task
//! first waits for the publications in flight.
//!
//! # Never twice
//!
//! A publication is sent on one connection only. If the connection is lost before the answer, the publication is
//! settled as [`BrokerError::Unknown`]. Publications that still wait in the queue are sent on the next connection, or
//! settled as [`BrokerError::Unavailable`] when their time limit is over. The client library does not reconnect by
//! itself: a lost connection is dropped together with the library's queue.

mod queue;

use std::{
    collections::VecDeque,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use redis::{
    AsyncConnectionConfig, ProtocolVersion, RedisConnectionInfo, RedisError, RedisWrite, ToRedisArgs, Value,
    aio::MultiplexedConnection,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use self::queue::Outgoing;
pub(super) use self::queue::Queue;
use super::{
    answer::{Answer, Link as After},
    backoff::Backoff,
    canaries::{Asked, Canaries},
    clock::{Clock, LOOK},
    connection::{ConnectError, Connection, Connector, Role},
    envelope::{self, Encoded},
    keys::{Topics, write_parts},
    status::StatusTracker,
};
use crate::{
    BrokerError,
    metrics::{BrokerMetrics, End, Part},
};

/// The maximum number of publications in one pipeline.
const PIPELINE: usize = 128;
/// A pipeline is complete when its payloads reach this many bytes: the library copies them twice.
const PIPELINE_BYTES: usize = 256 * 1024;
/// The maximum number of pipelines in flight.
const IN_FLIGHT: usize = 4;
/// After this many refused canaries in a row, the connection is reported as down.
const FAILURES: u32 = 2;

/// The owner of one connection for publications.
pub(super) struct Publisher {
    /// Which of the publishers.
    pub(super) index: usize,
    /// Its part of the status.
    pub(super) part: usize,
    pub(super) connector: Arc<Connector>,
    pub(super) topics: Topics,
    /// The time limit for a publication to wait for a connection, and then for its answer.
    pub(super) time_limit: Duration,
    pub(super) canaries: Arc<Canaries>,
    pub(super) canary_interval: Duration,
    /// The time limit for the answer to a canary.
    pub(super) canary_timeout: Duration,
    pub(super) clock: Arc<Clock>,
    pub(super) metrics: Arc<BrokerMetrics>,
    pub(super) status: Arc<StatusTracker>,
    /// The node closes the broker: send what is queued, then end.
    pub(super) closing: CancellationToken,
    /// End now.
    pub(super) abort: CancellationToken,
}

impl Publisher {
    /// Sends what arrives from `queue` until the node closes the broker.
    pub(super) async fn run(self, queue: mpsc::Receiver<Outgoing>) {
        let abort = self.abort.clone();
        let mut task = Task { on: self, queue, waiting: VecDeque::new(), failures: 0, demotions: 0 };
        // Dropping what is left settles it.
        abort.run_until_cancelled(task.run()).await;
    }
}

struct Task {
    on: Publisher,
    queue: mpsc::Receiver<Outgoing>,
    /// Taken out of the queue, and not yet sent.
    waiting: VecDeque<Outgoing>,
    /// How many canaries in a row were refused.
    failures: u32,
    /// How many demotions had been detected when the connection began.
    demotions: u64,
}

/// A connection and its driver. Dropping it closes the connection and discards what was not sent.
struct Link {
    connection: MultiplexedConnection,
    driver: Driver,
}

/// Reads and writes a connection's bytes.
type Driver = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Asked {
    /// Why the connection must be closed, if that is asked.
    fn reason_to_leave(self) -> Option<Lost> {
        match self {
            Self::Beat => None,
            Self::Renew => Some(Lost::Missed),
            Self::Leave => Some(Lost::Demoted),
        }
    }
}

/// Why an established connection ended.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("the connection was lost")]
    Disconnected,
    #[error("{0}")]
    Failed(#[from] RedisError),
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("the server said: {0}")]
    Refused(Arc<str>),
    #[error("the server has become a replica, which keeps publications to itself")]
    Demoted,
    #[error("what is published here does not arrive at this node")]
    Missed,
}

impl Lost {
    fn end(&self) -> End {
        match self {
            Self::Disconnected | Self::Failed(_) => End::Closed,
            Self::Silent(_) => End::Silent,
            Self::Refused(_) => End::Refused,
            Self::Demoted => End::Demoted,
            Self::Missed => End::Missed,
        }
    }
}

/// A pipeline and its answers.
struct Flight {
    cargo: Cargo,
    answers: Result<Vec<Value>, RedisError>,
}

impl Flight {
    /// Settles its publications, if it carries any: by their answers, or else as unknown.
    fn settle(self) {
        if let (Cargo::Publications(batch), Ok(answers)) = (self.cargo, self.answers) {
            settle(batch, answers);
        }
    }
}

enum Cargo {
    Publications(Vec<Outgoing>),
    /// `HELLO`, and a publication to the canaries' topic.
    Canary,
}

/// What a pipeline in flight carries.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Canary,
    Publications,
}

impl Task {
    async fn run(&mut self) {
        let mut backoff = Backoff::new();
        while let Some(link) = self.connect(&mut backoff).await {
            let since = Instant::now();
            self.failures = 0;
            // In this order: a demotion that is reported in between also ends this connection.
            self.on.canaries.connected(self.on.index);
            self.demotions = *self.on.canaries.demotions().borrow();
            self.on.status.up(self.on.part);
            self.on.metrics.publisher_connections.inc();
            let end = self.serve(link).await;
            self.on.canaries.disconnected(self.on.index);
            self.on.metrics.publisher_connections.dec();
            let Err(lost) = end else { break };
            self.on.metrics.connection_ended(Part::Publisher, lost.end());
            self.on.status.down(self.on.part, format!("{}: {lost}", self.on.connector.url()));
            backoff.stood(since.elapsed());
        }
    }

    /// Retries until it succeeds, and settles publications whose time limit is over; `None` when the node closes the
    /// broker and nothing is left to send.
    async fn connect(&mut self, backoff: &mut Backoff) -> Option<Link> {
        loop {
            let attempt = attempt(Arc::clone(&self.on.connector), backoff.next());
            tokio::pin!(attempt);
            let result = loop {
                self.take();
                self.expire();
                if self.is_done() {
                    return None;
                }
                let next = self.waiting.front().map(|outgoing| self.on.clock.next_look(outgoing.until));
                tokio::select! {
                    result = &mut attempt => break result,
                    () = self.on.closing.cancelled(), if !self.queue.is_closed() => self.queue.close(),
                    () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
                    Some(outgoing) = self.queue.recv(), if next.is_none() => self.waiting.push_back(outgoing),
                }
            };
            match result {
                Ok(link) => return Some(link),
                Err(error) => {
                    self.on.status.down(self.on.part, format!("{}: {error}", self.on.connector.url()));
                }
            }
        }
    }

    /// Serves one connection until it is lost, or until the node closes the broker and nothing is left to send.
    async fn serve(&mut self, link: Link) -> Result<(), Lost> {
        let Link { connection, mut driver } = link;
        let mut flights = FuturesUnordered::new();
        // When each pipeline was sent, and its time limit. Answers come in order.
        let mut due = VecDeque::new();
        let mut next_canary = Instant::now();
        let mut canary_flies = false;
        let mut timer = pin!(sleep_until(next_canary));
        let canaries = Arc::clone(&self.on.canaries);
        let mut asked = pin!(canaries.notified(self.on.index));
        // Why to close the connection once everything in flight is answered. Nothing more is sent meanwhile.
        let mut leaving = None;
        let lost = loop {
            let now = Instant::now();
            if !canary_flies && leaving.is_none() && next_canary <= now {
                flights.push(launch(&connection, self.canary()));
                due.push_back((self.on.clock.now(), self.on.canary_timeout, Kind::Canary));
                canary_flies = true;
                next_canary = now + self.on.canary_interval;
            }
            let holding = self.is_holding();
            if holding {
                self.expire();
            }
            while flights.len() < IN_FLIGHT && leaving.is_none() && !holding {
                let batch = self.batch();
                if batch.is_empty() {
                    break;
                }
                flights.push(launch(&connection, self.pipeline(batch)));
                due.push_back((self.on.clock.now(), self.on.time_limit, Kind::Publications));
            }
            if flights.is_empty() {
                if let Some(lost) = leaving {
                    return Err(lost);
                }
                if self.is_done() {
                    return Ok(());
                }
            }
            // The timer is reset rarely, to keep the cost per message low.
            let look = self.next_look(now, holding);
            if (holding || !flights.is_empty()) && timer.deadline() > look {
                timer.as_mut().reset(look);
            }
            let landed = tokio::select! {
                // Answers first: they may have arrived just before the connection was lost.
                biased;
                Some(flight) = flights.next() => flight,
                () = &mut driver => break Lost::Disconnected,
                () = self.on.closing.cancelled(), if !self.queue.is_closed() => {
                    self.queue.close();
                    continue;
                }
                // Bounded: what waits while publications are held stays in the queue, and counts there.
                Some(outgoing) = self.queue.recv(),
                    if flights.len() < IN_FLIGHT && leaving.is_none() && self.waiting.len() < PIPELINE => {
                    self.waiting.push_back(outgoing);
                    continue;
                }
                () = asked.as_mut() => {
                    asked.set(canaries.notified(self.on.index));
                    let asked = canaries.take_asked(self.on.index);
                    if asked == Some(Asked::Beat) {
                        next_canary = Instant::now();
                    }
                    leaving = leaving.or(asked.and_then(Asked::reason_to_leave));
                    continue;
                }
                () = timer.as_mut() => {
                    let look = Instant::now() + LOOK;
                    timer.as_mut().reset(if flights.is_empty() { next_canary } else { look });
                    let Some((since, limit, _)) = due.front().copied() else { continue };
                    if self.on.clock.now() < since + limit {
                        continue;
                    }
                    // Read what has arrived before checking the deadline.
                    if (&mut driver).now_or_never().is_some() {
                        break Lost::Disconnected;
                    }
                    match flights.next().now_or_never() {
                        Some(Some(flight)) => flight,
                        _ => break Lost::Silent(limit),
                    }
                }
            };
            due.pop_front();
            // The server answers in order, so this answer means that it now works on the next pipeline. The time limit
            // of a canary starts now. That of a publication does not: its outcome is promised within the limit.
            if let Some((since, _, Kind::Canary)) = due.front_mut() {
                *since = self.on.clock.now();
            }
            match (landed.cargo, landed.answers) {
                // Dropping the batch settles it as unknown.
                (_, Err(error)) => break Lost::Failed(error),
                (Cargo::Publications(batch), Ok(answers)) => {
                    leaving = leaving.or(settle(batch, answers).map(Lost::Refused));
                }
                (Cargo::Canary, Ok(answers)) => {
                    canary_flies = false;
                    leaving = leaving.or(self.canary_landed(&answers));
                }
            }
        };
        // Without its driver the connection resolves at once: with answers that had arrived, or with an error.
        drop(driver);
        flights.map(Flight::settle).collect::<()>().await;
        Err(lost)
    }

    /// When to look at the deadlines again.
    fn next_look(&self, now: Instant, holding: bool) -> Instant {
        match self.waiting.front() {
            Some(outgoing) if holding => self.on.clock.next_look(outgoing.until),
            _ => now + LOOK,
        }
    }

    /// Handles the answers to a canary; returns why the connection must be closed, if so.
    fn canary_landed(&mut self, answers: &[Value]) -> Option<Lost> {
        let [hello, published] = answers else { return None };
        if role_of(hello).is_some_and(|role| role != b"master") {
            self.on.canaries.demoted(self.demotions);
            return Some(Lost::Demoted);
        }
        let mut refused = None;
        for answer in [hello, published] {
            let Value::ServerError(error) = answer else { continue };
            let answer = Answer::to_server_error(error);
            if answer.link == After::Renew {
                return Some(Lost::Refused(answer.text));
            }
            refused = Some(answer.text);
        }
        if let Value::ServerError(_) = published {
            self.failures = self.failures.saturating_add(1);
            self.on.canaries.refused(self.on.index);
            if self.failures >= FAILURES {
                let text = refused.unwrap_or_default();
                self.on.status.down(self.on.part, format!("{}: {text}", self.on.connector.url()));
            }
        } else {
            self.failures = 0;
            self.on.canaries.accepted(self.on.index);
            self.on.status.up(self.on.part);
        }
        None
    }

    /// Whether publications wait for proof that this connection reaches the node's subscribers. Two time limits are
    /// enough for a subscriber that serves rooms, unless a backlog is in the way.
    fn is_holding(&self) -> bool {
        self.on.canaries.holds(self.on.index, 2 * self.on.canary_timeout)
    }

    /// Whether the node closes the broker and nothing is left to send.
    fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.queue.is_closed() && self.queue.is_empty()
    }

    /// Takes publications out of the queue, up to one pipeline.
    fn take(&mut self) {
        while self.waiting.len() < PIPELINE
            && let Ok(outgoing) = self.queue.try_recv()
        {
            self.waiting.push_back(outgoing);
        }
    }

    fn expire(&mut self) {
        let now = self.on.clock.now();
        while self.waiting.front().is_some_and(|outgoing| outgoing.until <= now)
            && let Some(outgoing) = self.waiting.pop_front()
        {
            outgoing.settle(Err(BrokerError::Unavailable));
            self.take();
        }
    }

    fn batch(&mut self) -> Vec<Outgoing> {
        self.take();
        let mut bytes = 0;
        let mut batch = Vec::new();
        while batch.len() < PIPELINE
            && bytes < PIPELINE_BYTES
            && let Some(mut outgoing) = self.waiting.pop_front()
        {
            bytes += outgoing.payload_bytes();
            outgoing.sent = true;
            batch.push(outgoing);
        }
        batch
    }

    fn pipeline(&self, batch: Vec<Outgoing>) -> (redis::Pipeline, usize, Cargo) {
        let mut pipeline = redis::Pipeline::with_capacity(batch.len());
        for request in batch.iter().filter_map(|outgoing| outgoing.request.as_ref()) {
            pipeline
                .cmd("PUBLISH")
                .arg(self.on.topics.argument(&request.room))
                .arg(envelope::encode(&request.publication));
        }
        let count = batch.len();
        (pipeline, count, Cargo::Publications(batch))
    }

    fn canary(&self) -> (redis::Pipeline, usize, Cargo) {
        let mut pipeline = redis::Pipeline::with_capacity(2);
        let canary = self.on.canaries.send(self.on.index);
        pipeline.cmd("HELLO").arg(3);
        pipeline.cmd("PUBLISH").arg(&**self.on.canaries.topic()).arg(canary);
        (pipeline, 2, Cargo::Canary)
    }
}

/// Hands a pipeline to the connection; its place in the order is fixed when this returns.
fn launch(
    connection: &MultiplexedConnection,
    (pipeline, count, cargo): (redis::Pipeline, usize, Cargo),
) -> impl Future<Output = Flight> + use<> {
    let mut connection = connection.clone();
    // The first poll puts the pipeline into the connection's queue, which is longer than `IN_FLIGHT`. Without
    // `unconstrained`, tokio's budget could delay the first poll, and a later pipeline could overtake this one.
    let mut reply = Box::pin(tokio::task::unconstrained(async move {
        connection.send_packed_commands(&pipeline, 0, count).await
    }));
    let mut early = reply.as_mut().now_or_never();
    async move {
        let answers = match early.take() {
            Some(answers) => answers,
            None => reply.await,
        };
        Flight { cargo, answers }
    }
}

/// Waits, connects and hands the connection to the client library, which does not greet the server again.
async fn attempt(connector: Arc<Connector>, delay: Duration) -> Result<Link, ConnectError> {
    sleep(delay).await;
    let stream = connector.open(Role::Publisher).await?;
    let (connection, driver) = hand_over(stream, None).await?;
    Ok(Link { connection, driver })
}

/// Turns a greeted connection into one of the client library. `response_timeout` bounds the wait for answers; without
/// it there is no bound.
pub(super) async fn hand_over(
    stream: Connection,
    response_timeout: Option<Duration>,
) -> Result<(MultiplexedConnection, Driver), ConnectError> {
    let greeted = RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
    let config = AsyncConnectionConfig::new()
        .set_response_timeout(response_timeout)
        .set_pipeline_buffer_size(2 * IN_FLIGHT);
    let (connection, driver) = MultiplexedConnection::new_with_config(&greeted, stream, config)
        .await
        .map_err(|error| ConnectError::Refused(error.to_string()))?;
    Ok((connection, Box::pin(driver)))
}

/// Settles each publication by its own answer. Returns the server's error if the connection must be closed.
fn settle(batch: Vec<Outgoing>, answers: Vec<Value>) -> Option<Arc<str>> {
    let mut renew = None;
    let mut answers = answers.into_iter();
    for outgoing in batch {
        let outcome = match answers.next() {
            Some(Value::ServerError(error)) => {
                let answer = Answer::to_server_error(&error);
                if answer.link == After::Renew {
                    renew = Some(Arc::clone(&answer.text));
                }
                Err(answer.error())
            }
            Some(_) => Ok(()),
            // The library promises one answer per command; without one the outcome is unknown.
            None => Err(BrokerError::Unknown),
        };
        outgoing.settle(outcome);
    }
    renew
}

/// The `role` in an answer to `HELLO`, as the client library parses it.
pub(super) fn role_of(hello: &Value) -> Option<&[u8]> {
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

impl ToRedisArgs for Encoded<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        write_parts(out, [&self.header, self.data]);
    }
}

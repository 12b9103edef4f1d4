//! One pub/sub connection and the task that owns it.
//!
//! Owns the connection and its successors, everything that arrives on them, and the reporting of gaps. The parts:
//!
//! - `desired`: the desired rooms, shared with the callers of `subscribe`
//! - `table`: the commands that were sent and what the server has acknowledged; no I/O
//! - `health`: the health check
//!
//! The reading task calls the sink directly, without a queue in between. So a slow sink slows down the reading, and
//! the backlog builds up in Redis, not in the memory of this process. Redis closes the connection at its
//! `client-output-buffer-limit`, which is an interruption like any other.
//!
//! # Order of a gap
//!
//! A gap is told when the server acknowledges the new subscription, by the task that reads the acknowledgement
//! and in the place where it was read. Whatever is newer comes behind it on the same connection. Rooms are subscribed
//! only after this node's publishers are proven to publish to the same server, so that the gap covers what they
//! published elsewhere (see `canaries`).

mod desired;
mod health;
mod shrink;
mod table;

use std::{fmt, io, sync::Arc, time::Duration};

use bytes::BytesMut;
use futures_util::FutureExt as _;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    task::{unconstrained, yield_now},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

pub(super) use self::desired::DesiredRooms;
use self::{
    health::{Dead, HealthCheck},
    table::{OutOfStep, Purpose, Refusal, Table},
};
use super::{
    answer::{Answer, Fate, Link},
    backoff::Backoff,
    canaries::Canaries,
    clock::Clock,
    connection::{ConnectError, Connection, Connector, Role, role_of},
    envelope,
    keys::Topics,
    part::Counted,
    resp::{Frame, Malformed, Reader},
    status::StatusTracker,
};
use crate::{
    GapCause, RoomName, Sink,
    metrics::{BrokerMetrics, End, Part},
};

/// After a read of this many bytes, others get their turn.
const MANY_BYTES: usize = 16 * 1024;

/// A room with the sink of its subscription.
#[derive(Clone)]
pub(super) struct Room {
    pub(super) name: RoomName,
    pub(super) sink: Arc<dyn Sink>,
}

impl Room {
    /// Whether it is the same subscription, and not only the same room.
    fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.sink, &other.sink)
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)
    }
}

/// By name: a room has one subscription at a time.
impl PartialEq for Room {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Room {}

/// The owner of one pub/sub connection.
#[derive(Clone)]
pub(super) struct Subscriber {
    /// Which of the subscribers, and its part of the status.
    pub(super) part: usize,
    pub(super) connector: Arc<Connector>,
    pub(super) topics: Topics,
    pub(super) canaries: Arc<Canaries>,
    pub(super) clock: Arc<Clock>,
    pub(super) canary_interval: Duration,
    pub(super) canary_timeout: Duration,
    /// The largest payload, in bytes.
    pub(super) max_publication: usize,
    pub(super) desired: Arc<DesiredRooms>,
    pub(super) metrics: Arc<BrokerMetrics>,
    pub(super) status: Arc<StatusTracker>,
    pub(super) closing: CancellationToken,
}

impl Subscriber {
    /// Connects, serves and reconnects until the node closes the broker.
    pub(super) async fn run(self) {
        let table = Table::new(self.canaries.topic());
        let mut task =
            Task { table, bytes: 0, retry_at: None, retries: Backoff::new(), demotions: 0, on: self };
        task.take_over();
        let mut backoff = Backoff::new();
        while let Some(connection) = task.connect(&mut backoff).await {
            let since = Instant::now();
            let counted = Counted::new(&task.on.metrics.subscriber_connections);
            let end = task.serve(connection).await;
            drop(counted);
            let Err(lost) = end else { break };
            task.on.metrics.interruptions.inc();
            task.on.metrics.connection_ended(Part::Subscriber, lost.end());
            task.on.status.down(task.on.part, format!("{}: {lost}", task.on.connector.url()));
            task.on.desired.interrupted();
            task.table.lost();
            task.retry_at = None;
            backoff.stood(since.elapsed());
        }
        task.on.desired.close();
    }
}

/// Why an established connection ended.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("the server closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Malformed(#[from] Malformed),
    #[error("{0}")]
    OutOfStep(#[from] OutOfStep),
    #[error("the server said: {0}")]
    Refused(Arc<str>),
    #[error("the server has become a replica")]
    Demoted,
    #[error("{0}")]
    Dead(#[from] Dead),
}

impl Lost {
    fn end(&self) -> End {
        match self {
            Self::Closed | Self::Io(_) => End::Closed,
            Self::Malformed(_) | Self::OutOfStep(_) => End::Protocol,
            Self::Refused(_) => End::Refused,
            Self::Demoted => End::Demoted,
            Self::Dead(Dead::Silent(_)) => End::Silent,
            Self::Dead(Dead::Missed(_)) => End::Missed,
        }
    }
}

struct Task {
    on: Subscriber,
    table: Table,
    /// How many bytes have arrived.
    bytes: u64,
    /// When to retry subscriptions that the server temporarily refused.
    retry_at: Option<Instant>,
    retries: Backoff,
    /// How many demotions had been detected when the connection began.
    demotions: u64,
}

impl Task {
    /// Takes the rooms of a task that is gone, as its thread is. There are none at the start.
    fn take_over(&mut self) {
        let rooms = self.on.desired.take_over();
        if rooms.iter().any(|(_, was_acknowledged)| *was_acknowledged) {
            self.on.metrics.interruptions.inc();
        }
        for (room, was_acknowledged) in rooms {
            let topic = self.on.topics.room(&room.name);
            self.table.add(&topic, room);
            if was_acknowledged {
                self.table.owe(&topic);
            }
        }
    }

    /// Retries until it succeeds; `None` when the node closes the broker. Takes the callers' changes meanwhile, so
    /// that they do not pile up.
    async fn connect(&mut self, backoff: &mut Backoff) -> Option<Connection> {
        loop {
            let delay = backoff.next();
            let connector = Arc::clone(&self.on.connector);
            let attempt = async move {
                sleep(delay).await;
                connector.open(Role::Subscriber).await
            };
            tokio::pin!(attempt);
            let desired = Arc::clone(&self.on.desired);
            let result: Result<Connection, ConnectError> = loop {
                tokio::select! {
                    () = self.on.closing.cancelled() => return None,
                    () = desired.changed() => self.take_changes(),
                    result = &mut attempt => break result,
                }
            };
            match result {
                Ok(connection) => return Some(connection),
                Err(error) => {
                    self.on.status.down(self.on.part, format!("{}: {error}", self.on.connector.url()));
                }
            }
        }
    }

    /// Serves one connection until it is lost, or until the node closes the broker.
    async fn serve(&mut self, connection: Connection) -> Result<(), Lost> {
        let (mut incoming, mut outgoing) = tokio::io::split(connection);
        // The limit is for the payload alone. Twice the wrapping leaves room for newer nodes, which may add more.
        let mut reader = Reader::new(self.on.max_publication.saturating_add(2 * envelope::MAX_WRAPPING));
        let mut out = BytesMut::new();
        let mut unsent = false;
        let mut health = HealthCheck::new(
            Arc::clone(&self.on.canaries),
            self.on.part,
            Arc::clone(&self.on.clock),
            self.on.canary_interval,
            self.on.canary_timeout,
        );
        let mut demotions = self.on.canaries.demotions();
        self.demotions = *demotions.borrow_and_update();
        let mut released = self.on.canaries.released();
        let closing = self.on.closing.clone();
        let desired = Arc::clone(&self.on.desired);
        loop {
            if health.prove() {
                self.table.open();
                self.report();
            }
            self.table.write(&mut out);
            unsent |= !out.is_empty();
            let retry_at = self.retry_at;
            tokio::select! {
                () = closing.cancelled() => return Ok(()),
                read = reader.fill(&mut incoming) => {
                    let bytes = read?;
                    self.read(bytes, &mut reader, &mut health)?;
                    // There may be more. First come others that this thread serves, such as the sessions that have to
                    // write what has just arrived.
                    if bytes >= MANY_BYTES {
                        yield_now().await;
                    }
                }
                sent = send(&mut outgoing, &mut out), if unsent => {
                    sent?;
                    unsent = false;
                }
                () = desired.changed() => self.take_changes(),
                Ok(()) = demotions.changed() => return Err(Lost::Demoted),
                Ok(()) = released.changed(), if !self.table.is_open() => {}
                () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => {
                    self.retry_at = None;
                    self.table.retry_refused();
                }
                () = health.timer() => {
                    // Read what has arrived before checking deadlines, whatever this task has done already: tokio would
                    // pretend that there is nothing.
                    if let Some(read) = unconstrained(reader.fill(&mut incoming)).now_or_never() {
                        self.read(read?, &mut reader, &mut health)?;
                    }
                    self.look(&mut health, &mut out)?;
                }
            }
        }
    }

    fn read(&mut self, bytes: usize, reader: &mut Reader, health: &mut HealthCheck) -> Result<(), Lost> {
        if bytes == 0 {
            return Err(Lost::Closed);
        }
        self.bytes += bytes as u64;
        while let Some(frame) = reader.next()? {
            self.hear(frame, health)?;
        }
        Ok(())
    }

    fn look(&mut self, health: &mut HealthCheck, out: &mut BytesMut) -> Result<(), Lost> {
        if health.look(self.bytes).inspect_err(|_| self.on.metrics.canary_missed.inc())? {
            self.table.ask(out);
            self.table.retry_refused();
        }
        Ok(())
    }

    fn take_changes(&mut self) {
        for (name, desired) in self.on.desired.take_changes() {
            let topic = self.on.topics.room(&name);
            match desired {
                None => self.table.remove(&topic),
                Some(room) => {
                    if self.table.add(&topic, room.clone()) {
                        // Unsubscribed and subscribed again before the server was told: the subscription never ended.
                        self.on.desired.acknowledged(&room);
                    }
                }
            }
        }
        self.report();
    }

    fn hear(&mut self, frame: Frame<'_>, health: &mut HealthCheck) -> Result<(), Lost> {
        match frame {
            Frame::Message { topic, payload } => match self.table.desired(topic) {
                Some(Purpose::Room(room)) => {
                    self.on.metrics.received(payload.len());
                    let (publication, place) = envelope::decode_with_place(payload);
                    if publication.data.bytes().len() <= self.on.max_publication {
                        room.sink.publication(publication, place);
                    } else {
                        self.on.metrics.oversized.inc();
                        room.sink.gap(GapCause::Oversized);
                    }
                }
                Some(Purpose::Canary) => {
                    let heard = health.heard(&payload).inspect_err(|_| self.on.metrics.canary_missed.inc());
                    if let Some(after) = heard? {
                        self.on.metrics.canary_returned(after);
                    }
                }
                None => {}
            },
            Frame::Oversized { topic, bytes } => {
                if let Some(Purpose::Room(room)) = self.table.desired(topic) {
                    tracing::warn!(bytes, "skipped a publication that is larger than this node accepts");
                    self.on.metrics.oversized.inc();
                    room.sink.gap(GapCause::Oversized);
                }
            }
            Frame::Subscribed(topic) => {
                let acknowledged = self.table.subscribed(topic)?;
                match acknowledged.purpose {
                    Purpose::Canary => health.subscribed(),
                    Purpose::Room(room) => {
                        self.retries = Backoff::new();
                        if acknowledged.after_loss {
                            self.on.metrics.resubscriptions.inc();
                            room.sink.gap(GapCause::Interrupted);
                        }
                        if acknowledged.desired {
                            self.on.desired.acknowledged(room);
                        }
                    }
                }
                self.report();
            }
            Frame::Unsubscribed(topic) => match self.table.unsubscribed(topic) {
                Some(Purpose::Room(room)) => {
                    tracing::debug!(room = %room.name, "the server ended a subscription");
                    self.on.metrics.topic_interruptions.inc();
                    self.on.desired.room_interrupted(&room.name);
                }
                Some(Purpose::Canary) => health.unsubscribed(),
                None => {}
            },
            Frame::Push(_) => {}
            Frame::Error(text) => self.refused(&text, health)?,
            Frame::Reply(value) => {
                self.table.replied()?;
                if role_of(&value).is_some_and(|role| role != b"master") {
                    self.on.canaries.demoted(self.demotions);
                    return Err(Lost::Demoted);
                }
                health.answered();
            }
        }
        Ok(())
    }

    /// An error answers the oldest pending command, and concerns that command alone, unless another connection may
    /// succeed.
    fn refused(&mut self, text: &str, health: &mut HealthCheck) -> Result<(), Lost> {
        let answer = Answer::to(text);
        if answer.link == Link::Renew {
            return Err(Lost::Refused(answer.text));
        }
        match self.table.refused(answer.fate == Fate::Later)? {
            Refusal::Answered => health.answered(),
            Refusal::OneByOne | Refusal::Refused(Purpose::Canary) => {}
            Refusal::StillSubscribed { desired, later } => {
                for room in &desired {
                    self.on.desired.acknowledged(room);
                }
                if later {
                    self.retry_later();
                }
            }
            Refusal::Refused(Purpose::Room(room)) => {
                self.on.metrics.subscriptions_refused.inc();
                self.on.desired.refused(&room.name, &answer.error());
            }
            Refusal::StillOwed(purpose) => {
                match purpose {
                    Purpose::Room(room) => self.on.desired.refused_again(&room.name, &answer.error()),
                    // There is no proof to wait for.
                    Purpose::Canary => self.table.open(),
                }
                self.on.status.down(self.on.part, format!("a subscription was refused: {text}"));
            }
            Refusal::Later { owed } => {
                self.retry_later();
                if owed {
                    self.on.status.down(self.on.part, format!("subscriptions have to wait: {text}"));
                }
            }
        }
        Ok(())
    }

    fn retry_later(&mut self) {
        let delay = self.retries.next();
        self.retry_at.get_or_insert_with(|| Instant::now() + delay);
    }

    fn report(&self) {
        if self.table.is_complete() {
            self.on.status.up(self.on.part);
        }
    }
}

/// Cancel safe: bytes that were written have been removed from `out`. Its memory is freed when all are written: the
/// topics of a crowd may have needed a megabyte.
async fn send(outgoing: &mut (impl AsyncWrite + Unpin), out: &mut BytesMut) -> io::Result<()> {
    outgoing.write_all_buf(out).await?;
    *out = BytesMut::new();
    outgoing.flush().await
}

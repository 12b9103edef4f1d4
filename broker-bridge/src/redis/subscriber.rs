//! One pub/sub connection and the task that owns it.
//!
//! Owns the connection from the first attempt to the last, what arrives on it, and the promise that a loss is
//! told. The parts:
//!
//! - `wanted`: which rooms this node wants, shared with the callers of `subscribe`
//! - `table`: what the server has been told and has acknowledged; no I/O
//! - `canary`: whether the connection still delivers
//!
//! Publications go to the sink in line, from the reading task: there is no queue between the socket and the
//! sink. A sink that is slow therefore slows the reading, and the backlog is Redis' (which ends the
//! connection at its `client-output-buffer-limit`, and that is an interruption like any other) and never
//! memory of this process.
//!
//! # Order of a gap
//!
//! A gap is told when the server acknowledges the new subscription, by the task that reads the acknowledgement
//! and in the place where it was read. Whatever is newer comes behind it on the same connection.

mod canary;
mod table;
mod wanted;

use std::{io, sync::Arc, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    time::{Instant, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(super) use self::wanted::Wanted;
use self::{
    canary::{Canary, Event, Progress, Verdict},
    table::{Answer, OutOfStep, Purpose, Table},
};
use super::{
    backoff::Backoff,
    connection::{ConnectError, Connection, Connector, Role},
    envelope,
    keys::Topics,
    resp::{Frame, Malformed, Reader},
    status::Board,
};
use crate::{BrokerError, GapCause, Sink, metrics::BrokerMetrics};

/// The owner of one pub/sub connection.
pub(super) struct Subscriber {
    /// Its part on the status board.
    pub(super) part: usize,
    pub(super) connector: Arc<Connector>,
    pub(super) topics: Topics,
    pub(super) canary_topic: Arc<[u8]>,
    pub(super) canary_interval: Duration,
    pub(super) canary_timeout: Duration,
    /// The largest payload, in bytes.
    pub(super) max_publication: usize,
    pub(super) wanted: Arc<Wanted>,
    pub(super) sink: Arc<dyn Sink>,
    pub(super) metrics: Arc<BrokerMetrics>,
    pub(super) board: Arc<Board>,
    pub(super) pool: deadpool_redis::Pool,
    pub(super) tracker: TaskTracker,
    pub(super) closing: CancellationToken,
}

impl Subscriber {
    /// Keeps the connection until the node closes the broker.
    pub(super) async fn run(self) {
        let table = Table::new(&self.canary_topic);
        let mut task = Task { table, progress: Progress::default(), cannot_publish: false, on: self };
        let mut backoff = Backoff::new();
        while let Some(connection) = task.connect(&mut backoff).await {
            let since = Instant::now();
            task.on.metrics.subscriber_connections.inc();
            let end = task.serve(connection).await;
            task.on.metrics.subscriber_connections.dec();
            let Err(lost) = end else { break };
            task.on.metrics.interruptions.inc();
            task.on.board.down(task.on.part, format!("{}: {lost}", task.on.connector.url()));
            task.on.wanted.interrupted();
            task.table.lost();
            task.cannot_publish = false;
            backoff.stood(since.elapsed());
        }
        task.on.wanted.close();
    }
}

/// Why a connection that stood does not stand any more.
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
    Refused(String),
    #[error("{0}")]
    Wedged(#[from] canary::Wedged),
}

struct Task {
    on: Subscriber,
    table: Table,
    progress: Progress,
    /// The last canaries could not be published.
    cannot_publish: bool,
}

impl Task {
    /// Tries until it works; `None` when the node closes the broker. What is wanted meanwhile is noted, so that
    /// the notes of the callers stay short.
    async fn connect(&mut self, backoff: &mut Backoff) -> Option<Connection> {
        loop {
            let delay = backoff.next();
            let connector = Arc::clone(&self.on.connector);
            let attempt = async move {
                sleep(delay).await;
                connector.open(Role::Subscriber).await
            };
            tokio::pin!(attempt);
            let wanted = Arc::clone(&self.on.wanted);
            let result: Result<Connection, ConnectError> = loop {
                tokio::select! {
                    () = self.on.closing.cancelled() => return None,
                    () = wanted.changed() => self.take_changes(),
                    result = &mut attempt => break result,
                }
            };
            match result {
                Ok(connection) => return Some(connection),
                Err(error) => {
                    self.on.board.down(self.on.part, format!("{}: {error}", self.on.connector.url()));
                }
            }
        }
    }

    /// Serves one connection until it is lost, or until the node closes the broker.
    async fn serve(&mut self, connection: Connection) -> Result<(), Lost> {
        let (mut incoming, mut outgoing) = tokio::io::split(connection);
        // What wraps a publication does not count; a newer node may wrap a little more.
        let mut reader = Reader::new(self.on.max_publication.saturating_add(2 * envelope::MAX_WRAPPING));
        let mut out = BytesMut::new();
        let mut unsent = false;
        let mut canary = Canary::new(
            self.on.pool.clone(),
            Arc::clone(&self.on.canary_topic),
            self.on.canary_interval,
            self.on.canary_timeout,
            self.on.tracker.clone(),
        );
        let closing = self.on.closing.clone();
        let wanted = Arc::clone(&self.on.wanted);
        loop {
            self.table.write(&mut out);
            unsent |= !out.is_empty();
            tokio::select! {
                () = closing.cancelled() => return Ok(()),
                read = reader.fill(&mut incoming) => {
                    match read? {
                        0 => return Err(Lost::Closed),
                        bytes => self.progress.bytes += bytes as u64,
                    }
                    while let Some(frame) = reader.next()? {
                        self.hear(frame, &mut canary)?;
                    }
                }
                sent = send(&mut outgoing, &mut out), if unsent => {
                    sent?;
                    unsent = false;
                }
                () = wanted.changed() => self.take_changes(),
                event = canary.event() => self.mind(event, &mut canary, &mut out)?,
            }
        }
    }

    fn take_changes(&mut self) {
        for (room, is_wanted) in self.on.wanted.take_changes() {
            let topic = self.on.topics.room(&room);
            if !is_wanted {
                self.table.unwant(&topic);
            } else if self.table.want(&topic, room.clone()) {
                // Given up and wanted again before the server was told: the subscription never ended.
                self.on.wanted.acknowledged(&room);
            }
        }
        self.report();
    }

    fn hear(&mut self, frame: Frame<'_>, canary: &mut Canary) -> Result<(), Lost> {
        match frame {
            Frame::Message { topic, payload } => match self.table.wanted(topic) {
                Some(Purpose::Room(room)) => {
                    self.progress.publications += 1;
                    self.on.metrics.received(payload.len());
                    let publication = envelope::decode(payload);
                    if publication.data.bytes().len() <= self.on.max_publication {
                        self.on.sink.publication(room, publication);
                    } else {
                        self.on.metrics.oversized.inc();
                        self.on.sink.gap(room, GapCause::Oversized);
                    }
                }
                Some(Purpose::Canary) => {
                    if let Some(after) = canary.heard(&payload) {
                        self.on.metrics.canary_returned(after);
                    }
                }
                None => {}
            },
            Frame::Oversized { topic, bytes } => {
                if let Some(Purpose::Room(room)) = self.table.wanted(topic) {
                    self.progress.publications += 1;
                    tracing::warn!(bytes, "skipped a publication that is larger than this node accepts");
                    self.on.metrics.oversized.inc();
                    self.on.sink.gap(room, GapCause::Oversized);
                }
            }
            Frame::Subscribed(topic) => {
                let acknowledged = self.table.subscribed(topic)?;
                match acknowledged.purpose {
                    Purpose::Canary => canary.subscribed(),
                    Purpose::Room(room) => {
                        if acknowledged.after_loss {
                            self.on.metrics.resubscriptions.inc();
                            self.on.sink.gap(room, GapCause::Interrupted);
                        }
                        if acknowledged.wanted {
                            self.on.wanted.acknowledged(room);
                        }
                    }
                }
                self.report();
            }
            Frame::Unsubscribed(topic) => match self.table.unsubscribed(topic) {
                Some(Purpose::Room(room)) => {
                    tracing::debug!(%room, "the server ended a subscription");
                    self.on.metrics.topic_interruptions.inc();
                    self.on.wanted.room_interrupted(&room);
                }
                Some(Purpose::Canary) => canary.unsubscribed(),
                None => {}
            },
            Frame::Push(_) => {}
            Frame::Error(text) => self.refused(text, canary)?,
            Frame::Reply(_) => {
                self.table.replied()?;
                canary.ponged();
            }
        }
        Ok(())
    }

    /// An error belongs to the oldest command that has no answer yet. Most are about permissions and
    /// concern that command alone; a few say that this server is of no use at the moment.
    fn refused(&mut self, text: String, canary: &mut Canary) -> Result<(), Lost> {
        const NOT_NOW: [&str; 6] = ["LOADING", "BUSY", "MASTERDOWN", "NOAUTH", "TRYAGAIN", "CLUSTERDOWN"];
        if text.split(' ').next().is_some_and(|code| NOT_NOW.contains(&code)) {
            return Err(Lost::Refused(text));
        }
        let error = || BrokerError::Refused(text.as_str().into());
        match self.table.refused()? {
            Answer::Pong => canary.ponged(),
            Answer::OneByOne | Answer::StillSubscribed | Answer::Refused(Purpose::Canary) => {}
            Answer::Refused(Purpose::Room(room)) => self.on.wanted.refused(&room, &error()),
            Answer::StillOwed(purpose) => {
                if let Purpose::Room(room) = purpose {
                    self.on.wanted.refused_again(&room, &error());
                }
                self.on.board.down(self.on.part, format!("a subscription was refused: {text}"));
            }
        }
        Ok(())
    }

    fn mind(&mut self, event: Event, canary: &mut Canary, out: &mut BytesMut) -> Result<(), Lost> {
        match canary.mind(event, self.progress) {
            Ok(Verdict::Fine) => {}
            Ok(Verdict::Start) => {
                self.table.ping(out);
                self.table.retry_refused();
                canary.start(self.progress);
            }
            Ok(Verdict::CannotPublish(why)) => {
                self.cannot_publish = true;
                self.on.board.down(self.on.part, format!("cannot publish to this connection: {why}"));
            }
            Ok(Verdict::CanPublish) => {
                self.cannot_publish = false;
                self.report();
            }
            Err(wedged) => {
                self.on.metrics.canary_missed.inc();
                return Err(wedged.into());
            }
        }
        Ok(())
    }

    fn report(&self) {
        if self.table.is_complete() && !self.cannot_publish {
            self.on.board.up(self.on.part);
        }
    }
}

/// Cancel safe: what was written has left `out`.
async fn send(outgoing: &mut (impl AsyncWrite + Unpin), out: &mut BytesMut) -> io::Result<()> {
    outgoing.write_all_buf(out).await?;
    outgoing.flush().await
}

//! One connection for publications and the task that owns it. The parts:
//!
//! - `queue`: the queue before the connection
//! - `output`: the commands to be sent, as bytes
//! - `pipeline`: one connection, and what is in flight on it
//! - `recording`: what has to happen before publications are recorded, and what must be sent once more
//! - `verification`: what became of publications whose answer is lost
//!
//! Owns the order of a room on the way out and the fate of each publication.
//!
//! The task writes what the queue holds as `PUBLISH` commands, or calls of the function that also records the publication
//! in its room's history, without waiting for the answers to earlier ones, and
//! settles each publication by its own answer. A pool would spread a room over many connections and lose its order; a
//! round trip per publication would be slow.
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
//! If the connection is lost before the answer to a publication, nobody knows whether the server has executed it:
//!
//! - If it is recorded under an id, it is sent again on the next connection, in its order and within its time limit: the
//!   server records an id once.
//! - If it is recorded without an id, the next connection looks for it in the log, within one more time limit, and it is
//!   sent again if it is not there (`verification`).
//! - Otherwise, or if that is not possible, it is settled as [`BrokerError::Unknown`].
//!
//! Publications that still wait in the queue are sent on the next connection, or settled as
//! [`BrokerError::Unavailable`] when their time limit is over. A lost connection is dropped together with what it had yet
//! to send.

mod output;
mod pipeline;
mod queue;
mod recording;
mod verification;

use std::{collections::VecDeque, future::poll_fn, io, pin::pin, sync::Arc, time::Duration};

use futures_util::FutureExt;
use tokio::{
    sync::{OwnedMutexGuard, mpsc},
    task::unconstrained,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use self::{
    pipeline::{Answered, Limits, Pipeline, Reply},
    queue::Outgoing,
    recording::{Admission, Recording},
};
pub(super) use self::{queue::Queue, recording::LoadFunctions};
use super::{
    answer::Link,
    backoff::Backoff,
    canaries::{Asked, Canaries},
    clock::{Clock, LOOK},
    connection::{ConnectError, Connection, Connector, Role, role_of},
    keys::Topics,
    part::Counted,
    resp::{Malformed, Value},
    status::StatusTracker,
};
use crate::{
    Accepted, BrokerError,
    metrics::{BrokerMetrics, End, Part},
};

/// The maximum number of publications that are taken out of the queue before they can be sent.
const WAITING: usize = 128;
/// After this many refused canaries in a row, the connection is reported as down.
const FAILURES: u32 = 2;

/// The owner of one connection for publications.
#[derive(Clone)]
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
    /// Makes sure that the server can record publications.
    pub(super) load_functions: LoadFunctions,
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
    pub(super) async fn run(self, queue: OwnedMutexGuard<mpsc::Receiver<Outgoing>>) {
        let abort = self.abort.clone();
        let mut task = Task::new(self, queue);
        // Dropping what is left settles it.
        abort.run_until_cancelled(task.run()).await;
    }
}

struct Task {
    on: Publisher,
    /// Locked for as long as the task lives: if its thread ends, the next one takes over the queue.
    queue: OwnedMutexGuard<mpsc::Receiver<Outgoing>>,
    /// Taken out of the queue, and not yet sent.
    waiting: VecDeque<Outgoing>,
    recording: Recording,
    /// How many canaries in a row were refused.
    failures: u32,
    /// How many demotions had been detected when the connection began.
    demotions: u64,
}

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
    #[error("the server closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Malformed(#[from] Malformed),
    #[error("the server's answer fits no command")]
    OutOfStep,
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
            Self::Closed | Self::Io(_) => End::Closed,
            Self::Malformed(_) | Self::OutOfStep => End::Protocol,
            Self::Silent(_) => End::Silent,
            Self::Refused(_) => End::Refused,
            Self::Demoted => End::Demoted,
            Self::Missed => End::Missed,
        }
    }
}

/// Reports a connection for as long as it lives.
struct Connected {
    canaries: Arc<Canaries>,
    index: usize,
    _counted: Counted,
}

impl Connected {
    fn new(on: &Publisher) -> Self {
        on.canaries.connected(on.index);
        let counted = Counted::new(&on.metrics.publisher_connections);
        Self { canaries: Arc::clone(&on.canaries), index: on.index, _counted: counted }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.canaries.disconnected(self.index);
    }
}

impl Task {
    fn new(on: Publisher, queue: OwnedMutexGuard<mpsc::Receiver<Outgoing>>) -> Self {
        let recording =
            Recording::new(Arc::clone(&on.load_functions), on.topics.clone(), Arc::clone(&on.metrics));
        Self { on, queue, waiting: VecDeque::new(), recording, failures: 0, demotions: 0 }
    }

    async fn run(&mut self) {
        let mut backoff = Backoff::new();
        while let Some(connection) = self.connect(&mut backoff).await {
            let since = Instant::now();
            self.failures = 0;
            // In this order: a demotion that is reported in between also ends this connection.
            let connected = Connected::new(&self.on);
            self.demotions = *self.on.canaries.demotions().borrow();
            self.on.status.up(self.on.part);
            let end = self.serve(connection).await;
            self.take_back();
            drop(connected);
            let Err(lost) = end else { break };
            self.on.metrics.connection_ended(Part::Publisher, lost.end());
            self.on.status.down(self.on.part, format!("{}: {lost}", self.on.connector.url()));
            backoff.stood(since.elapsed());
        }
    }

    /// Retries until it succeeds, and settles publications whose time limit is over; `None` when the node closes the
    /// broker and nothing is left to send.
    async fn connect(&mut self, backoff: &mut Backoff) -> Option<Connection> {
        loop {
            let attempt = attempt(Arc::clone(&self.on.connector), backoff.next());
            tokio::pin!(attempt);
            let result = loop {
                self.take();
                self.expire();
                if self.is_done() {
                    return None;
                }
                let due = self.waiting.front().map(|outgoing| outgoing.until);
                let due = due.into_iter().chain(self.recording.due()).min();
                let next = due.map(|due| self.on.clock.next_look(due));
                tokio::select! {
                    result = &mut attempt => break result,
                    () = self.on.closing.cancelled(), if !self.queue.is_closed() => self.queue.close(),
                    () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
                    Some(outgoing) = self.queue.recv(), if next.is_none() => self.waiting.push_back(outgoing),
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

    /// Serves one connection until it is lost, or until the node closes the broker and nothing is left to send.
    async fn serve(&mut self, connection: Connection) -> Result<(), Lost> {
        self.recording.reconnected();
        let limits = Limits { publication: self.on.time_limit, canary: self.on.canary_timeout };
        let mut pipeline = Pipeline::new(connection, limits, Arc::clone(&self.on.clock));
        let end = self.drive(&mut pipeline).await;
        // What is in flight is settled, verified, or sent once more.
        let until = self.on.clock.now() + self.on.time_limit;
        pipeline.end(|outgoing| self.recording.in_doubt(outgoing, until));
        end
    }

    async fn drive(&mut self, pipeline: &mut Pipeline) -> Result<(), Lost> {
        let mut next_canary = Instant::now();
        let mut timer = pin!(sleep_until(next_canary));
        let canaries = Arc::clone(&self.on.canaries);
        let mut asked = pin!(canaries.notified(self.on.index));
        let closing = self.on.closing.clone();
        let mut closing = pin!(closing.cancelled());
        // Why to close the connection once everything in flight is answered. Nothing more is sent meanwhile.
        let mut leaving = None;
        loop {
            let now = Instant::now();
            if leaving.is_none() && next_canary <= now && pipeline.has_room_for_canary() {
                pipeline.canary(canaries.topic(), canaries.send(self.on.index).as_bytes());
                next_canary = now + self.on.canary_interval;
            }
            if pipeline.is_idle() {
                self.take_back();
            }
            if leaving.is_none() {
                self.recording.prepare();
                self.ask(pipeline);
            }
            let mut holding = self.is_holding();
            if holding {
                self.expire();
            } else if leaving.is_none() {
                self.send(pipeline);
                holding = self.recording.is_preparing();
            }
            if pipeline.is_idle() {
                if let Some(lost) = leaving {
                    return Err(lost);
                }
                if self.is_done() {
                    return Ok(());
                }
            }
            // The timer is reset rarely, to keep the cost per message low.
            let look = self.next_look(now, holding);
            if (holding || !pipeline.is_idle()) && timer.deadline() > look {
                timer.as_mut().reset(look);
            }
            tokio::select! {
                // Answers first: they may have arrived just before the connection was lost.
                biased;
                turn = poll_fn(|cx| pipeline.poll_turn(cx)) => turn?,
                () = closing.as_mut(), if !self.queue.is_closed() => self.queue.close(),
                // Bounded: what waits while publications are held stays in the queue, and counts there.
                Some(outgoing) = self.queue.recv(),
                    if pipeline.has_room() && leaving.is_none() && self.waiting.len() < WAITING => {
                    self.waiting.push_back(outgoing);
                }
                () = poll_fn(|cx| self.recording.poll_loaded(cx)) => {}
                () = asked.as_mut() => {
                    asked.set(canaries.notified(self.on.index));
                    let asked = canaries.take_asked(self.on.index);
                    if asked == Some(Asked::Beat) {
                        next_canary = Instant::now();
                    }
                    leaving = leaving.or(asked.and_then(Asked::reason_to_leave));
                }
                () = timer.as_mut() => {
                    let look = Instant::now() + LOOK;
                    timer.as_mut().reset(if pipeline.is_idle() { next_canary } else { look });
                    if let Some((due, limit)) = pipeline.due() && due <= self.on.clock.now() {
                        // Read what has arrived before checking the deadline, whatever this task has done already.
                        let turn = unconstrained(poll_fn(|cx| pipeline.poll_turn(cx))).now_or_never();
                        turn.transpose()?;
                        if !self.hear(pipeline, &mut leaving)? {
                            return Err(Lost::Silent(limit));
                        }
                    }
                }
            }
            self.hear(pipeline, &mut leaving)?;
            pipeline.yield_if_busy().await;
        }
    }

    /// Sends what waits, as much as the connection takes.
    fn send(&mut self, pipeline: &mut Pipeline) {
        let mut now = None;
        while pipeline.has_room()
            && let Some(outgoing) = self.waiting.pop_front().or_else(|| self.queue.try_recv().ok())
        {
            if outgoing.is_recorded() {
                match self.recording.admit() {
                    Admission::Now => {}
                    Admission::Later => return self.waiting.push_front(outgoing),
                    Admission::Never(error) => {
                        outgoing.settle(Err(error));
                        continue;
                    }
                }
            }
            let now = *now.get_or_insert_with(|| self.on.clock.now());
            let number = self.recording.number(&outgoing);
            pipeline.publish(outgoing, &self.on.topics, number, now);
        }
    }

    /// Sends what has to be asked before publications are recorded.
    fn ask(&mut self, pipeline: &mut Pipeline) {
        while pipeline.has_room()
            && let Some(question) = self.recording.next_question()
        {
            pipeline.ask(&question);
        }
    }

    /// Handles the answers that have been read, and notes in `leaving` why the connection must be closed, if so. Returns
    /// whether there were any.
    fn hear(&mut self, pipeline: &mut Pipeline, leaving: &mut Option<Lost>) -> Result<bool, Lost> {
        let mut any = false;
        while let Some(answered) = pipeline.next()? {
            any = true;
            let lost = match answered {
                Answered::Publication(outgoing, reply) => self.settle(outgoing, reply).map(Lost::Refused),
                Answered::Canary { hello, published } => self.canary_landed(&hello, published),
                Answered::Question(reply) => {
                    self.recording.answered(reply);
                    None
                }
            };
            if leaving.is_none() {
                *leaving = lost;
            }
        }
        Ok(any)
    }

    /// Settles a publication by its own answer, or keeps it to be sent once more. Returns the server's error if the
    /// connection must be closed.
    fn settle(&mut self, outgoing: Outgoing, reply: Reply) -> Option<Arc<str>> {
        match reply {
            Ok(value) => {
                if let Some(request) = &outgoing.request {
                    self.recording.accepted(&request.room);
                }
                let accepted = if outgoing.is_recorded() { accepted(&value) } else { Accepted::default() };
                outgoing.settle(Ok(accepted));
                None
            }
            Err(answer) if answer.lacks_functions() && outgoing.is_recorded() && !outgoing.is_repeated => {
                self.recording.give_back(outgoing);
                None
            }
            Err(answer) => {
                outgoing.settle(Err(answer.error()));
                (answer.link == Link::Renew).then_some(answer.text)
            }
        }
    }

    /// Puts publications that must be sent once more before all others.
    fn take_back(&mut self) {
        while let Some(outgoing) = self.recording.take_last() {
            self.waiting.push_front(outgoing);
        }
    }

    /// When to look at the deadlines again.
    fn next_look(&self, now: Instant, holding: bool) -> Instant {
        match self.waiting.front() {
            Some(outgoing) if holding => self.on.clock.next_look(outgoing.until),
            _ => now + LOOK,
        }
    }

    /// Handles the answers to a canary; returns why the connection must be closed, if so.
    fn canary_landed(&mut self, hello: &Reply, published: Reply) -> Option<Lost> {
        if let Ok(greeting) = hello {
            self.recording.greeted(greeting);
        }
        if hello.as_ref().ok().and_then(role_of).is_some_and(|role| role != b"master") {
            self.on.canaries.demoted(self.demotions);
            return Some(Lost::Demoted);
        }
        for answer in [hello, &published].into_iter().filter_map(|reply| reply.as_ref().err()) {
            if answer.link == Link::Renew {
                return Some(Lost::Refused(Arc::clone(&answer.text)));
            }
        }
        if let Err(answer) = published {
            self.failures = self.failures.saturating_add(1);
            self.on.canaries.refused(self.on.index);
            if self.failures >= FAILURES {
                self.on.status.down(self.on.part, format!("{}: {}", self.on.connector.url(), answer.text));
            }
        } else {
            self.failures = 0;
            self.on.canaries.accepted(self.on.index);
            self.on.status.up(self.on.part);
        }
        None
    }

    /// Whether publications wait: for the functions that record them, for those whose outcome is in doubt, for the answers to those before the ones that must
    /// be repeated, or for proof that this connection reaches the node's subscribers. Two time limits are enough for a
    /// subscriber that serves rooms, unless a backlog is in the way.
    fn is_holding(&self) -> bool {
        self.recording.is_preparing()
            || self.recording.has_returned()
            || self.on.canaries.holds(self.on.index, 2 * self.on.canary_timeout)
    }

    /// Whether the node closes the broker and nothing is left to send.
    fn is_done(&self) -> bool {
        self.waiting.is_empty()
            && !self.recording.has_returned()
            && self.queue.is_closed()
            && self.queue.is_empty()
    }

    /// Takes publications out of the queue, up to [`WAITING`].
    fn take(&mut self) {
        while self.waiting.len() < WAITING
            && let Ok(outgoing) = self.queue.try_recv()
        {
            self.waiting.push_back(outgoing);
        }
    }

    fn expire(&mut self) {
        let now = self.on.clock.now();
        self.recording.expire(now);
        while self.waiting.front().is_some_and(|outgoing| outgoing.until <= now)
            && let Some(outgoing) = self.waiting.pop_front()
        {
            outgoing.settle(Err(BrokerError::Unavailable));
            self.take();
        }
    }
}

/// Waits, and then connects.
async fn attempt(connector: Arc<Connector>, delay: Duration) -> Result<Connection, ConnectError> {
    sleep(delay).await;
    connector.open(Role::Publisher).await
}

/// What the function says of a publication that is recorded: its position, and whether its id was known. There is no
/// position if it was delivered and could not be recorded.
fn accepted(value: &Value) -> Accepted {
    let Value::List(parts) = value else { return Accepted::default() };
    let [Value::Text(cursor), Value::Integer(duplicate)] = &parts[..] else { return Accepted::default() };
    let cursor = std::str::from_utf8(cursor).ok().and_then(|cursor| cursor.parse().ok());
    Accepted { cursor, duplicate: *duplicate == 1 }
}

#[cfg(test)]
mod tests;

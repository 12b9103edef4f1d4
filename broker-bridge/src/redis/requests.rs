//! Requests and their answers, such as parts of rooms' histories, in batches over the connections of the
//! [pool].
//!
//! Owns the requests that wait, in the order in which they came. A request is one command, which may be sent more than
//! once: a batch whose connection was lost, or whose server is no longer the master, is sent again on another one.
//!
//! # Batches
//!
//! A worker takes what waits, up to the size of a batch, and sends it as one pipeline. While it waits for the answers,
//! more requests gather, so batches grow with the load, and one connection serves most loads. Another worker begins on
//! another connection if more than a batch waits, or if a worker has not had its answers for [`SLOW`]. So at most
//! [`SIZE`] × [`BATCH`] requests are in flight. Workers end when nothing waits.
//!
//! A batch is as large as the one before allows: twice that, as long as its answers would not exceed [`BATCH_BYTES`].
//!
//! # What is believed
//!
//! The last command of each batch asks for the server's role. If the server is the master then, it was when it executed
//! the others.
//!
//! # Bounds
//!
//! Many requests at once are no reason to fail: they wait for their turn, however long that takes, because the server
//! answers. A request fails if there is no connection, if the server does not answer a batch within the time limit, or
//! if [`MAX_WAITING`] others wait. If the caller drops it, it is not sent.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use prometheus::IntGauge;
use redis::{Cmd, Pipeline, Value};
use tokio::{runtime::Handle, sync::oneshot, task::JoinHandle, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    answer::Answer,
    pool::{self, Lent, Pool, PoolError, SIZE},
};
use crate::{BrokerError, metrics::BrokerMetrics};

/// The maximum number of requests in one batch.
const BATCH: usize = 64;
/// A batch is made smaller if the answers to the one before would have exceeded this many bytes.
const BATCH_BYTES: usize = 1024 * 1024;
/// The maximum number of requests that wait.
const MAX_WAITING: usize = 256 * 1024;
/// How long a batch may take before another worker begins beside its own.
const SLOW: Duration = Duration::from_millis(20);
/// How often a request is sent: over all connections of the pool, which the server may have closed while they were
/// idle, and over a new one.
const ATTEMPTS: usize = SIZE + 1;

/// What the server said to a request.
type Outcome = Result<Result<Value, Answer>, BrokerError>;

/// Sends requests to one server. Cloning shares the queue.
#[derive(Clone)]
pub(super) struct Requests(Arc<Shared>);

struct Shared {
    pool: Pool,
    /// The time limit for the answers to one batch.
    time_limit: Duration,
    runtime: Handle,
    tracker: TaskTracker,
    closing: CancellationToken,
    metrics: Arc<BrokerMetrics>,
    state: Mutex<State>,
}

struct State {
    waiting: VecDeque<Request>,
    /// Tasks that serve what waits.
    workers: usize,
    /// Those of them that have waited for longer than [`SLOW`].
    slow: usize,
    /// The maximum number of requests in the next batch.
    batch: usize,
}

struct Request {
    command: Cmd,
    /// When it was sent for the first time.
    sent: Option<Instant>,
    attempts: usize,
    answer: oneshot::Sender<Outcome>,
}

impl Requests {
    /// Requests over the connections of `pool`, by tasks on the ambient runtime.
    pub(super) fn new(
        pool: Pool,
        time_limit: Duration,
        tracker: &TaskTracker,
        closing: &CancellationToken,
        metrics: &Arc<BrokerMetrics>,
    ) -> Self {
        let state = State { waiting: VecDeque::new(), workers: 0, slow: 0, batch: 1 };
        Self(Arc::new(Shared {
            pool,
            time_limit,
            runtime: Handle::current(),
            tracker: tracker.clone(),
            closing: closing.clone(),
            metrics: Arc::clone(metrics),
            state: Mutex::new(state),
        }))
    }

    /// Sends a command that may be sent more than once, and returns the server's answer.
    pub(super) async fn ask(&self, command: Cmd) -> Outcome {
        let (answer, answered) = oneshot::channel();
        self.0.submit(Request { command, sent: None, attempts: 0, answer })?;
        answered.await.unwrap_or(Err(BrokerError::Closed))
    }

    /// Spawns work that belongs to requests, on the runtime of their tasks. It is dropped when the broker is closed.
    pub(super) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, BrokerError>> + Send + 'static,
    ) -> JoinHandle<Result<T, BrokerError>> {
        let work = self.0.closing.clone().run_until_cancelled_owned(work);
        let work = async move { work.await.unwrap_or(Err(BrokerError::Closed)) };
        self.0.tracker.spawn_on(work, &self.0.runtime)
    }
}

impl Shared {
    fn submit(self: &Arc<Self>, request: Request) -> Result<(), BrokerError> {
        let mut state = self.state.lock();
        if self.closing.is_cancelled() {
            return Err(BrokerError::Closed);
        }
        if state.waiting.len() >= MAX_WAITING {
            state.waiting.retain(|request| !request.answer.is_closed());
            if state.waiting.len() >= MAX_WAITING {
                return Err(BrokerError::Unavailable);
            }
        }
        state.waiting.push_back(request);
        self.help(state);
        Ok(())
    }

    /// Begins another worker if one is needed.
    fn help(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        self.metrics.history.requests_waiting.set(i64::try_from(state.waiting.len()).unwrap_or(i64::MAX));
        let prompt = state.workers - state.slow;
        let is_needed = match state.waiting.len() {
            0 => false,
            waiting => prompt == 0 || waiting > state.batch * prompt,
        };
        if is_needed && state.workers < SIZE {
            state.workers += 1;
            // If the runtime has ended, the worker is dropped at once.
            drop(state);
            let worker = Worker { shared: Arc::clone(self), has_begun: false, is_slow: false };
            let work = self.closing.clone().run_until_cancelled_owned(worker.work());
            self.tracker.spawn_on(work, &self.runtime);
        }
    }

    /// The next batch for a worker; `None` if nothing waits.
    fn take(&self) -> Option<Vec<Request>> {
        let mut state = self.state.lock();
        let now = Instant::now();
        let mut batch = Vec::with_capacity(state.batch.min(state.waiting.len()));
        while batch.len() < state.batch
            && let Some(mut request) = state.waiting.pop_front()
        {
            if !request.answer.is_closed() {
                request.sent.get_or_insert(now);
                batch.push(request);
            }
        }
        self.metrics.history.requests_waiting.set(i64::try_from(state.waiting.len()).unwrap_or(i64::MAX));
        if batch.is_empty() { None } else { Some(batch) }
    }

    /// Sizes the next batch after one of `requests`, whose answers had so many bytes.
    fn resize(&self, requests: usize, bytes: usize) {
        let mut state = self.state.lock();
        state.batch = batch_after(state.batch, requests, bytes);
    }

    /// Puts requests whose connection was of no use back to where they came from, unless they were sent too often or too
    /// long ago.
    fn put_back(&self, batch: Vec<Request>) {
        let mut failed = Vec::new();
        {
            let mut state = self.state.lock();
            for mut request in batch.into_iter().rev() {
                request.attempts += 1;
                let is_late = request.sent.is_some_and(|sent| sent.elapsed() >= self.time_limit);
                if request.attempts < ATTEMPTS && !is_late {
                    state.waiting.push_front(request);
                } else {
                    failed.push(request);
                }
            }
        }
        fail(failed, &BrokerError::Unavailable);
    }
}

/// A task that serves what waits, one batch at a time.
struct Worker {
    shared: Arc<Shared>,
    has_begun: bool,
    is_slow: bool,
}

impl Worker {
    async fn work(mut self) {
        self.has_begun = true;
        while let Some(batch) = self.shared.take() {
            let shared = Arc::clone(&self.shared);
            let mut serving = pin!(shared.serve(batch));
            if timeout(SLOW, &mut serving).await.is_err() {
                self.set_slow(true);
                serving.await;
                self.set_slow(false);
            }
        }
    }

    fn set_slow(&mut self, is_slow: bool) {
        self.is_slow = is_slow;
        let mut state = self.shared.state.lock();
        if is_slow {
            state.slow += 1;
            self.shared.help(state);
        } else {
            state.slow -= 1;
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.workers -= 1;
        state.slow -= usize::from(self.is_slow);
        if !self.has_begun || self.shared.closing.is_cancelled() {
            // Nobody will send them.
            let waiting = std::mem::take(&mut state.waiting);
            drop(state);
            drop(waiting);
        } else {
            // A request may have come after the last look, or this worker has panicked.
            self.shared.help(state);
        }
    }
}

impl Shared {
    /// Sends a batch, and answers its requests or puts them back.
    async fn serve(&self, batch: Vec<Request>) {
        let mut lent = match self.pool.get().await {
            Ok(lent) => lent,
            Err(error) => {
                let error = pool::no_connection(error);
                fail(batch, &error);
                let waiting = std::mem::take(&mut self.state.lock().waiting);
                return fail(waiting, &error);
            }
        };
        let in_flight = InFlight::new(&self.metrics.history.requests_in_flight, batch.len());
        let answers = exchange(&mut lent, &batch).await;
        drop(in_flight);
        match answers {
            Ok(answers) => {
                drop(lent);
                self.resize(batch.len(), answers.iter().map(size).sum());
                for (request, answer) in batch.into_iter().zip(answers) {
                    let answer = match answer {
                        Value::ServerError(error) => Err(Answer::to_server_error(&error)),
                        value => Ok(value),
                    };
                    // The caller may be gone.
                    request.answer.send(Ok(answer)).ok();
                }
            }
            Err(error) => {
                tracing::debug!(%error, requests = batch.len(), "requests to Redis failed");
                // Closes the connection.
                drop(Lent::take(lent));
                self.put_back(batch);
            }
        }
    }
}

/// Counts requests in a gauge while they are in flight.
struct InFlight<'a>(&'a IntGauge, i64);

impl<'a> InFlight<'a> {
    fn new(gauge: &'a IntGauge, requests: usize) -> Self {
        let requests = i64::try_from(requests).unwrap_or(i64::MAX);
        gauge.add(requests);
        Self(gauge, requests)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.sub(self.1);
    }
}

/// Sends a batch and returns the answers that may be believed.
async fn exchange(lent: &mut Lent, batch: &[Request]) -> Result<Vec<Value>, PoolError> {
    let mut pipeline = Pipeline::with_capacity(batch.len() + 1);
    for request in batch {
        pipeline.add_command(request.command.clone());
    }
    pipeline.add_command(pool::hello());
    let mut answers = lent.connection().send_packed_commands(&pipeline, 0, batch.len() + 1).await?;
    let hello = answers.pop().unwrap_or(Value::Nil);
    lent.vouch(&hello)?;
    Ok(answers)
}

fn fail(requests: impl IntoIterator<Item = Request>, error: &BrokerError) {
    for request in requests {
        request.answer.send(Err(error.clone())).ok();
    }
}

/// The maximum size of a batch, after it was `size` and the answers to so many requests had so many bytes.
fn batch_after(size: usize, requests: usize, bytes: usize) -> usize {
    let fit = (BATCH_BYTES * requests).checked_div(bytes).unwrap_or(BATCH);
    fit.clamp(1, (size * 2).min(BATCH))
}

/// About how many bytes an answer has.
fn size(value: &Value) -> usize {
    match value {
        Value::BulkString(bytes) => bytes.len(),
        Value::Array(items) => items.iter().map(size).sum(),
        _ => size_of::<Value>(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_grow_while_answers_are_small_and_shrink_at_once() {
        let mut size = 1;
        let mut sizes = Vec::new();
        for _ in 0..8 {
            size = batch_after(size, size, 100 * size);
            sizes.push(size);
        }
        assert_eq!(sizes, [2, 4, 8, 16, 32, 64, 64, 64]);
        assert_eq!(batch_after(64, 64, 64 * 32 * 1024), 32);
        assert_eq!(batch_after(64, 1, 100 * BATCH_BYTES), 1);
        assert_eq!(batch_after(1, 1, 0), 2);
    }

    #[test]
    fn the_size_of_an_answer_counts_its_payloads() {
        let text = |bytes| Value::BulkString(vec![0; bytes]);
        let entry = Value::Array(vec![text(10), Value::Array(vec![text(1), text(1000)])]);
        assert_eq!(size(&Value::Array(vec![entry.clone(), entry])), 2022);
        assert!(size(&Value::Nil) > 0);
    }
}

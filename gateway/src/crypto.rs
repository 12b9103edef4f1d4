//! Threads for cryptography that takes long: TLS handshakes, and signatures of tokens.
//!
//! A signature takes up to milliseconds. On a shard's thread, all sockets of the shard would wait for it. Shards
//! hand such work over and get the result back; sockets never leave their shard. The threads run at a low
//! priority, so established sessions come first even if there is only one core. Does not know what it computes.
//!
//! Each connection has at most one job at a time, and takes it back when it no longer wants the result, so
//! `limits.connections` bounds the queue.
//!
//! When more clients connect than the node can serve, some are served in time, rather than all too late: jobs
//! that complete what has begun go first, and once the oldest hello has waited for [`LATE`], the newest goes
//! first.

use std::{
    collections::BTreeMap,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use prometheus::{Histogram, IntGauge, Registry};
use tokio::sync::oneshot;

use crate::vocabulary::metrics::{Label, gauge_family, histogram_family};

/// How much nicer the threads are than the shards. On one busy core, Linux gives a thread that is nicer by 10
/// a tenth of what it gives a shard's: handshakes progress, and sessions hardly notice.
const NICER: i32 = 10;

/// Jobs of [`Stage::Later`] in a row before one of [`Stage::First`] has its turn.
const LATER_IN_A_ROW: u32 = 8;

/// Once a job of [`Stage::First`] has waited for so long, the newest one goes first. Clients give up after some
/// seconds, and `public.header_timeout` ends a handshake. In the order of arrival, a node that is behind
/// would serve only those that are about to give up, and complete hardly any of their handshakes.
const LATE: Duration = Duration::from_secs(1);

/// What a job is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A step of a TLS handshake.
    Handshake,
    /// The verification of a token.
    Token,
}

impl Label for Work {
    const ALL: &'static [Self] = &[Self::Handshake, Self::Token];

    fn as_str(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::Token => "token",
        }
    }
}

/// How far the client of a job has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The node has done nothing for this client yet.
    First,
    /// The node has already spent time on this client.
    Later,
}

/// The threads did not run a job to its end: it panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cryptographic operation failed unexpectedly")]
pub struct JobLost;

impl From<JobLost> for io::Error {
    fn from(error: JobLost) -> Self {
        Self::other(error)
    }
}

/// The threads. Ends them, and waits for that, when it is dropped.
pub struct CryptoThreads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// The metrics of one kind of work.
struct Measured {
    waiting: IntGauge,
    wait: Histogram,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    handshakes: Measured,
    tokens: Measured,
}

/// A job that waits for a thread.
struct Waiting {
    job: Box<dyn FnOnce() + Send>,
    work: Work,
    since: Instant,
}

/// The jobs that wait, by number.
#[derive(Default)]
struct Queue {
    first: BTreeMap<u64, Waiting>,
    later: BTreeMap<u64, Waiting>,
    /// The number of the next job.
    next: u64,
    /// How many of `later` have been taken since one of `first` was.
    in_a_row: u32,
    closed: bool,
}

impl Queue {
    fn of(&mut self, stage: Stage) -> &mut BTreeMap<u64, Waiting> {
        match stage {
            Stage::First => &mut self.first,
            Stage::Later => &mut self.later,
        }
    }

    /// Adds a job and returns its number.
    fn push(&mut self, stage: Stage, waiting: Waiting) -> u64 {
        let number = self.next;
        self.next += 1;
        self.of(stage).insert(number, waiting);
        number
    }

    /// Takes the job whose turn it is.
    fn pop(&mut self, now: Instant) -> Option<Waiting> {
        if self.in_a_row < LATER_IN_A_ROW
            && let Some((_, waiting)) = self.later.pop_first()
        {
            self.in_a_row += 1;
            return Some(waiting);
        }
        self.in_a_row = 0;
        let oldest = self.first.first_key_value();
        let is_late = oldest.is_some_and(|(_, oldest)| now.saturating_duration_since(oldest.since) >= LATE);
        let next = if is_late { self.first.pop_last() } else { self.first.pop_first() };
        next.or_else(|| self.later.pop_first()).map(|(_, waiting)| waiting)
    }
}

/// A job that has been queued. Dropping it takes the job out of the queue, unless a thread has it already.
struct Queued<'a> {
    shared: &'a Shared,
    stage: Stage,
    number: u64,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        let waiting = self.shared.queue.lock().of(self.stage).remove(&self.number);
        if let Some(waiting) = waiting {
            self.shared.ended_waiting(&waiting);
        }
    }
}

impl CryptoThreads {
    /// Registers the metrics and starts `threads` threads. A node starts as many as it has shards, so that
    /// handshakes may use all cores that sessions leave idle.
    pub fn start(threads: usize, registry: &Registry) -> Result<Self, CryptoError> {
        let waiting = gauge_family(
            registry,
            "tidegate_crypto_waiting",
            "Steps of TLS handshakes and verifications of tokens that wait for a thread.",
            &["work"],
        )?;
        let wait = histogram_family(
            registry,
            "tidegate_crypto_wait_seconds",
            "How long steps of TLS handshakes and verifications of tokens waited for a thread, or until nobody \
             wanted them any more.",
            &["work"],
            prometheus::exponential_buckets(0.000_1, 4.0, 9)?,
        )?;
        let measured = |work: Work| Measured {
            waiting: waiting.with_label_values(&[work.as_str()]),
            wait: wait.with_label_values(&[work.as_str()]),
        };
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            changed: Condvar::new(),
            handshakes: measured(Work::Handshake),
            tokens: measured(Work::Token),
        });
        let mut started = Self { shared, threads: Vec::new() };
        for index in 0..threads {
            let shared = Arc::clone(&started.shared);
            let thread = thread::Builder::new().name(format!("crypto-{index}"));
            started.threads.push(thread.spawn(move || shared.serve())?);
        }
        Ok(started)
    }

    /// Runs `job` on one of the threads. Cancel safe: a job that has not begun when the future is dropped is
    /// never run, and the result of any other is dropped.
    pub async fn run<T: Send + 'static>(
        &self,
        work: Work,
        stage: Stage,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JobLost> {
        let (result, received) = oneshot::channel();
        let job = move || {
            // A panic drops the sender, and the one who waits is told. The thread goes on with other jobs.
            if let Ok(done) = catch_unwind(AssertUnwindSafe(job)) {
                result.send(done).ok();
            }
        };
        let _queued = self.shared.enqueue(work, stage, Box::new(job));
        received.await.map_err(|_| JobLost)
    }
}

impl Drop for CryptoThreads {
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // It catches the panics of jobs and has none of its own.
            thread.join().ok();
        }
    }
}

/// Why the threads cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum CryptoError {
    /// A thread could not be started.
    #[error("cannot start a thread for cryptography: {0}")]
    Thread(#[from] io::Error),
    /// A metric could not be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl Shared {
    fn measured(&self, work: Work) -> &Measured {
        match work {
            Work::Handshake => &self.handshakes,
            Work::Token => &self.tokens,
        }
    }

    fn enqueue(&self, work: Work, stage: Stage, job: Box<dyn FnOnce() + Send>) -> Queued<'_> {
        self.measured(work).waiting.inc();
        let number = self.queue.lock().push(stage, Waiting { job, work, since: Instant::now() });
        self.changed.notify_one();
        Queued { shared: self, stage, number }
    }

    /// Counts those that were given up as well: when the newest go first, only they tell how long others wait.
    fn ended_waiting(&self, waiting: &Waiting) {
        let measured = self.measured(waiting.work);
        measured.waiting.dec();
        measured.wait.observe(waiting.since.elapsed().as_secs_f64());
    }

    /// Does jobs until the queue is closed.
    fn serve(&self) {
        // On Linux this concerns the calling thread alone. Where it is not allowed, sessions only wait longer.
        if let Err(error) = rustix::process::nice(NICER) {
            tracing::debug!(%error, "cannot lower the priority of a thread for cryptography");
        }
        while let Some(waiting) = self.next() {
            self.ended_waiting(&waiting);
            (waiting.job)();
            // The shard that was woken runs now, rather than after this thread's time slice.
            thread::yield_now();
        }
    }

    fn next(&self) -> Option<Waiting> {
        let mut queue = self.queue.lock();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(waiting) = queue.pop(Instant::now()) {
                return Some(waiting);
            }
            self.changed.wait(&mut queue);
        }
    }
}

#[cfg(test)]
mod tests;

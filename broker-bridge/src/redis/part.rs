//! The tasks of a broker's connections, and who polls them.
//!
//! A [`Part`] is handed to whoever has a thread for it: a gateway's shard polls the connections that its sessions use.
//! If that thread ends before the broker is closed, by a panic, its connections are lost, but not their rooms and not
//! the publications in the queue: each task begins anew on the runtime on which the broker was started. To members this
//! is an interruption like any other. There it begins anew after each panic, with a delay, and the status says why its
//! connection is down.

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{FutureExt as _, future::BoxFuture};
use prometheus::IntGauge;
use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{backoff::Backoff, status::StatusTracker};

/// One part of a broker: the tasks that one thread should poll, each until it ends.
pub type Part = Vec<BoxFuture<'static, ()>>;

/// Begins a task from what its predecessor has left.
pub(super) type Begin = Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// Makes tasks that survive the thread that polls them.
#[derive(Clone)]
pub(super) struct Tasks {
    pub(super) runtime: Handle,
    pub(super) tracker: TaskTracker,
    pub(super) closing: CancellationToken,
    pub(super) status: Arc<StatusTracker>,
}

impl Tasks {
    /// A task that begins anew if it is dropped before the broker is closed. It reports as `part` of the status.
    pub(super) fn task(&self, part: usize, begin: Begin) -> BoxFuture<'static, ()> {
        let task = Surviving { now: Some(begin()), part, begin, tasks: self.clone() };
        Box::pin(self.tracker.track_future(task))
    }

    /// Runs a task until it ends by itself or the broker is closed. After a panic it begins anew, with a delay.
    pub(super) async fn run(self, part: usize, begin: Begin) {
        let mut backoff = Backoff::new();
        loop {
            let since = Instant::now();
            // Whatever the panic has left half done is dropped with the task.
            if AssertUnwindSafe(begin()).catch_unwind().await.is_ok() {
                return;
            }
            tracing::error!("a task that serves a connection to the broker has panicked; it begins anew");
            self.status.down(part, "a task that serves a connection to the broker has panicked");
            backoff.stood(since.elapsed());
            if self.closing.run_until_cancelled(sleep(backoff.next())).await.is_none() {
                return;
            }
        }
    }
}

struct Surviving {
    /// `None` once it has ended.
    now: Option<BoxFuture<'static, ()>>,
    part: usize,
    begin: Begin,
    tasks: Tasks,
}

impl Future for Surviving {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(now) = &mut self.now else { return Poll::Ready(()) };
        let polled = now.as_mut().poll(cx);
        if polled.is_ready() {
            self.now = None;
        }
        polled
    }
}

impl Drop for Surviving {
    fn drop(&mut self) {
        let Some(now) = self.now.take() else { return };
        // First, so that its connection ends before there is another.
        drop(now);
        let tasks = &self.tasks;
        if !tasks.closing.is_cancelled() {
            tracing::error!(
                "a thread has ended that served a connection to the broker; its work goes on elsewhere"
            );
            tasks.status.down(self.part, "a thread has ended that served a connection to the broker");
            // If the runtime has ended as well, the node has.
            let again = tasks.clone().run(self.part, Arc::clone(&self.begin));
            tasks.runtime.spawn(tasks.tracker.track_future(again));
        }
    }
}

/// Counts a connection in a gauge for as long as it lives.
pub(super) struct Counted(IntGauge);

impl Counted {
    pub(super) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prometheus::Registry;
    use tokio::{
        sync::{Semaphore, watch},
        time::timeout,
    };

    use super::*;
    use crate::{BrokerStatus, metrics::BrokerMetrics};

    async fn until(status: &mut watch::Receiver<BrokerStatus>, expected: &str) {
        let is_expected = |status: &BrokerStatus| format!("{status:?}").contains(expected);
        let reached = timeout(Duration::from_secs(60), status.wait_for(is_expected)).await.is_ok();
        assert!(reached, "{expected}, not {:?}", *status.borrow());
    }

    /// The first time on the thread that was given the task, then on the runtime.
    #[tokio::test(start_paused = true)]
    async fn a_task_begins_anew_after_each_panic_and_its_connection_is_down_meanwhile() {
        let metrics = BrokerMetrics::register(&Registry::new()).unwrap();
        let status = Arc::new(StatusTracker::new(1, "starting", metrics));
        let mut watch = status.watch();
        let tasks = Tasks {
            runtime: Handle::current(),
            tracker: TaskTracker::new(),
            closing: CancellationToken::new(),
            status: Arc::clone(&status),
        };
        let steps = Arc::new(Semaphore::new(0));
        let begin: Begin = {
            let steps = Arc::clone(&steps);
            Arc::new(move || {
                let (steps, status) = (Arc::clone(&steps), Arc::clone(&status));
                Box::pin(async move {
                    steps.acquire().await.unwrap().forget();
                    status.up(0);
                    steps.acquire().await.unwrap().forget();
                    std::panic::resume_unwind(Box::new(()));
                })
            })
        };
        let first = TaskTracker::new().spawn(tasks.task(0, begin));
        for why in ["a thread has ended", "has panicked", "has panicked"] {
            steps.add_permits(1);
            until(&mut watch, "Up").await;
            steps.add_permits(1);
            until(&mut watch, why).await;
        }
        assert!(first.await.unwrap_err().is_panic());
        tasks.closing.cancel();
        tasks.tracker.close();
        // The last one waits for its delay or for its first step.
        steps.add_permits(2);
        timeout(Duration::from_secs(60), tasks.tracker.wait()).await.unwrap();
    }
}

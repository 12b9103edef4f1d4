//! The tasks of a broker's connections, and who polls them.
//!
//! A [`Part`] is handed to whoever has a thread for it: a gateway's shard polls the connections that its sessions use.
//! If that thread ends before the broker is closed, by a panic, its connections are lost, but not their rooms and not
//! the publications in the queue: each task begins anew on the runtime on which the broker was started. To members this
//! is an interruption like any other.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use prometheus::IntGauge;
use tokio::runtime::Handle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// One part of a broker: the tasks that one thread should poll, each until it ends.
pub type Part = Vec<BoxFuture<'static, ()>>;

/// Begins a task from what its predecessor has left.
pub(super) type Begin = Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// Makes tasks that survive the thread that polls them.
pub(super) struct Tasks {
    pub(super) runtime: Handle,
    pub(super) tracker: TaskTracker,
    pub(super) closing: CancellationToken,
}

impl Tasks {
    /// A task that begins anew if it is dropped before the broker is closed.
    pub(super) fn task(&self, begin: Begin) -> BoxFuture<'static, ()> {
        let task = Surviving {
            now: Some(begin()),
            begin,
            runtime: self.runtime.clone(),
            tracker: self.tracker.clone(),
            closing: self.closing.clone(),
        };
        Box::pin(self.tracker.track_future(task))
    }
}

struct Surviving {
    /// `None` once it has ended.
    now: Option<BoxFuture<'static, ()>>,
    begin: Begin,
    runtime: Handle,
    tracker: TaskTracker,
    closing: CancellationToken,
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
        if !self.closing.is_cancelled() {
            tracing::error!(
                "a thread has ended that served a connection to the broker; its work goes on elsewhere"
            );
            // Only once: if the runtime has ended as well, the node has.
            self.runtime.spawn(self.tracker.track_future((self.begin)()));
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

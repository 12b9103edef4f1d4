//! A broker within one process: the embedded default.
//!
//! Owns the table of subscriptions and, in `logs`, the rooms' histories. Several [`MemoryBroker`]s on one [`MemoryBus`]
//! behave like several nodes on one Redis, except that nothing can be interrupted, so it never reports a gap. It has no
//! queue: the publishing thread dispatches a publication before `publish` returns. Histories end with the process.
//!
//! # Locks
//!
//! Rooms are spread over stripes; a stripe has two locks. A publisher holds `logs` while it records and dispatches, which
//! makes the order of a room the same for every node and for its log. `members` is held only for a look-up or a change.
//! Lock order: `logs`, then `members`. No sink is called under `members`.
//! So a sink may subscribe and unsubscribe, and a caller may do so under a lock that its sink takes too.
//! Two things are not allowed inside a sink or under such a lock: publishing, and polling a future that opens, reads or
//! clears a log.

mod logs;

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{self, BoxFuture},
};
use parking_lot::Mutex;
use tokio::sync::watch;

use self::logs::{Clock, Epochs, Logs};
use crate::{
    Accepted, Affinity, Broker, BrokerError, BrokerStatus, Place, Positioning, PublishRequest, Reading,
    Retention, RoomName, Sink, Subscribing,
    history::ReadFrom,
    metrics::{BrokerMetrics, HistoryMetrics},
};

/// What the brokers of one process share. Cloning shares the same bus.
#[derive(Clone)]
pub struct MemoryBus(Arc<Bus>);

impl MemoryBus {
    /// A bus without nodes.
    pub fn new() -> Self {
        Self::with(logs::clock())
    }

    /// A bus without nodes, on which histories age by this clock: the time since the Unix epoch, which never goes back.
    pub fn with_clock(clock: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self::with(Arc::new(clock))
    }

    fn with(clock: Clock) -> Self {
        Self(Arc::new(Bus {
            stripes: std::iter::repeat_with(Stripe::default).take(STRIPES).collect(),
            hasher: RandomState::new(),
            next_node: AtomicU64::new(0),
            epochs: Epochs::new(clock()),
            clock,
        }))
    }
}

impl Default for MemoryBus {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBus").finish_non_exhaustive()
    }
}

/// One node's broker on a [`MemoryBus`]. Dropping it closes it.
pub struct MemoryBroker {
    bus: MemoryBus,
    id: u64,
    metrics: Option<Arc<BrokerMetrics>>,
    status: watch::Sender<BrokerStatus>,
    closed: AtomicBool,
}

impl MemoryBroker {
    /// A node on `bus`.
    pub fn new(bus: &MemoryBus) -> Self {
        Self {
            bus: bus.clone(),
            id: bus.0.next_node.fetch_add(1, Ordering::Relaxed),
            metrics: None,
            status: watch::Sender::new(BrokerStatus::Up),
            closed: AtomicBool::new(false),
        }
    }

    /// Adds metrics. Call this before the first subscription.
    #[must_use]
    pub fn with_metrics(mut self, metrics: Arc<BrokerMetrics>) -> Self {
        metrics.up.set(1);
        self.metrics = Some(metrics);
        self
    }

    fn settle(&self, request: PublishRequest, outcome: Result<Accepted, BrokerError>) {
        if let Some(metrics) = &self.metrics {
            metrics.published(&outcome);
        }
        request.receipt.settle(outcome);
    }

    fn publish_now(&self, request: PublishRequest) {
        if self.closed.load(Ordering::Acquire) {
            return self.settle(request, Err(BrokerError::Closed));
        }
        if let Some(fault) = request.fault() {
            return self.settle(request, Err(fault));
        }
        let PublishRequest { room, publication, history, id, .. } = &request;
        let stripe = self.bus.0.stripe(room);
        let mut logs = stripe.logs.lock();
        let place = if let Some(retention) = *history {
            let (now, epochs) = ((self.bus.0.clock)(), &self.bus.0.epochs);
            if let Some(first) = id.as_ref().and_then(|id| logs.find(room, id, now)) {
                drop(logs);
                return self.settle_recorded(request, Accepted { cursor: Some(first), duplicate: true });
            }
            Some(logs.record(room, publication, retention, id.as_ref(), now, epochs))
        } else {
            None
        };
        let members = stripe.members.lock().get(room).cloned();
        for member in members.iter().flat_map(|members| members.iter()) {
            if let Some(metrics) = &member.metrics {
                metrics.received(publication.data.bytes().len());
            }
            member.sink.publication(publication.clone(), place);
        }
        drop(logs);
        match place {
            None => self.settle(request, Ok(Accepted::default())),
            Some(Place { cursor, .. }) => {
                self.settle_recorded(request, Accepted { cursor: Some(cursor), duplicate: false });
            }
        }
    }

    fn settle_recorded(&self, request: PublishRequest, accepted: Accepted) {
        if let Some(metrics) = &self.metrics {
            metrics.history.recorded(&accepted);
        }
        self.settle(request, Ok(accepted));
    }

    /// What `task` answers with the logs of the room's stripe, at this time. It runs when the future is polled.
    fn with_logs<T: Send + 'static>(
        &self,
        room: &RoomName,
        task: impl FnOnce(&mut Logs, &RoomName, Duration, &Epochs) -> T + Send + 'static,
    ) -> BoxFuture<'static, Result<T, BrokerError>> {
        let closed = self.closed.load(Ordering::Acquire);
        let (bus, room) = (self.bus.clone(), room.clone());
        Box::pin(async move {
            if closed {
                return Err(BrokerError::Closed);
            }
            let bus = &*bus.0;
            let mut logs = bus.stripe(&room).logs.lock();
            Ok(task(&mut logs, &room, (bus.clock)(), &bus.epochs))
        })
    }

    /// Counts what comes of a request.
    fn counted<T: 'static>(
        &self,
        answer: BoxFuture<'static, T>,
        count: impl FnOnce(&HistoryMetrics, &T) + Send + 'static,
    ) -> BoxFuture<'static, T> {
        let Some(metrics) = self.metrics.clone() else { return answer };
        Box::pin(answer.inspect(move |answer| count(&metrics.history, answer)))
    }

    fn close_now(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        for stripe in &self.bus.0.stripes {
            stripe.members.lock().retain(|_, members| {
                if members.iter().any(|member| member.id == self.id) {
                    *members = without(members, self.id);
                    self.topics_changed(-1);
                }
                !members.is_empty()
            });
        }
        if let Some(metrics) = &self.metrics {
            metrics.up.set(0);
        }
        self.status.send_replace(BrokerStatus::Closed);
    }

    fn topics_changed(&self, by: i64) {
        if let Some(metrics) = &self.metrics {
            metrics.topics.add(by);
        }
    }
}

impl Broker for MemoryBroker {
    fn subscribe(&self, room: &RoomName, sink: Arc<dyn Sink>, _: Affinity) -> Subscribing {
        let mut members = self.bus.0.stripe(room).members.lock();
        // Checked under the lock, so that `close_now` cannot run in between.
        if self.closed.load(Ordering::Acquire) {
            return Box::pin(future::ready(Err(BrokerError::Closed)));
        }
        let members = members.entry(room.clone()).or_default();
        if !members.iter().any(|member| member.id == self.id) {
            let member = Member { id: self.id, sink, metrics: self.metrics.clone() };
            *members = members.iter().cloned().chain([member]).collect();
            self.topics_changed(1);
        }
        Box::pin(future::ready(Ok(())))
    }

    fn unsubscribe(&self, room: &RoomName, _: Affinity) {
        let mut rooms = self.bus.0.stripe(room).members.lock();
        let Some(members) = rooms.get_mut(room) else { return };
        if !members.iter().any(|member| member.id == self.id) {
            return;
        }
        *members = without(members, self.id);
        if members.is_empty() {
            rooms.remove(room);
        }
        self.topics_changed(-1);
    }

    fn try_publish(&self, request: PublishRequest) -> Result<(), PublishRequest> {
        self.publish_now(request);
        Ok(())
    }

    fn publish(&self, request: PublishRequest) -> BoxFuture<'_, ()> {
        Box::pin(async move { self.publish_now(request) })
    }

    fn open(&self, room: &RoomName, retention: Retention) -> Positioning {
        let opened =
            self.with_logs(room, move |logs, room, now, epochs| logs.open(room, retention, now, epochs));
        self.counted(opened, HistoryMetrics::opened)
    }

    fn read(&self, room: &RoomName, from: ReadFrom, limit: usize) -> Reading {
        let read = self.with_logs(room, move |logs, room, now, _| logs.read(room, from, limit, now));
        self.counted(read, HistoryMetrics::read)
    }

    fn clear(&self, room: &RoomName) -> Positioning {
        self.with_logs(room, Logs::clear)
    }

    fn status(&self) -> watch::Receiver<BrokerStatus> {
        self.status.subscribe()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async { self.close_now() })
    }
}

impl Drop for MemoryBroker {
    fn drop(&mut self) {
        self.close_now();
    }
}

impl fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBroker").field("node", &self.id).finish_non_exhaustive()
    }
}

/// Enough that publishers on a few dozen cores seldom contend; each costs two small locks and an empty map.
const STRIPES: usize = 64;

struct Bus {
    stripes: Box<[Stripe]>,
    /// Keyed, here and in the maps: room names are chosen by clients.
    hasher: RandomState,
    next_node: AtomicU64,
    epochs: Epochs,
    clock: Clock,
}

#[derive(Default)]
struct Stripe {
    logs: Mutex<Logs>,
    /// Copied on change, so that dispatching needs no lock on it.
    members: Mutex<HashMap<RoomName, Arc<[Member]>>>,
}

#[derive(Clone)]
struct Member {
    id: u64,
    sink: Arc<dyn Sink>,
    metrics: Option<Arc<BrokerMetrics>>,
}

impl Bus {
    #[allow(clippy::cast_possible_truncation, reason = "the remainder is below STRIPES")]
    fn stripe(&self, room: &RoomName) -> &Stripe {
        let index = (self.hasher.hash_one(room) % STRIPES as u64) as usize;
        self.stripes.get(index).expect("the index is below STRIPES, the length of the slice")
    }
}

fn without(members: &[Member], id: u64) -> Arc<[Member]> {
    members.iter().filter(|member| member.id != id).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{Backend, Receipts, Recorder};

    struct Bus(MemoryBus);

    impl Backend for Bus {
        fn node(&self) -> BoxFuture<'_, Box<dyn Broker>> {
            Box::pin(async move { Box::new(MemoryBroker::new(&self.0)) as Box<dyn Broker> })
        }
    }

    crate::broker_conformance!(Bus(MemoryBus::new()));
    crate::broker_history_conformance!(Bus(MemoryBus::new()));

    /// A sink that changes its subscription while it is told something, as a hub may.
    struct Fickle {
        this: std::sync::Weak<Fickle>,
        broker: MemoryBroker,
        room: RoomName,
        heard: AtomicU64,
    }

    impl Sink for Fickle {
        fn publication(&self, _: crate::Publication, _: Option<crate::Place>) {
            self.heard.fetch_add(1, Ordering::Relaxed);
            self.broker.unsubscribe(&self.room, Affinity(0));
            let this = self.this.upgrade().expect("the test holds it");
            drop(self.broker.subscribe(&self.room, this, Affinity(0)));
        }

        fn gap(&self, _: crate::GapCause) {}
    }

    #[tokio::test]
    async fn a_sink_may_change_its_subscription() {
        let sink = Arc::new_cyclic(|this| Fickle {
            this: this.clone(),
            broker: MemoryBroker::new(&MemoryBus::new()),
            room: RoomName::new("r").unwrap(),
            heard: AtomicU64::new(0),
        });
        sink.broker.subscribe(&sink.room, Arc::clone(&sink) as _, Affinity(0)).await.unwrap();
        let receipts = Arc::new(Receipts::default());
        for text in ["1", "2"] {
            let publication = crate::Publication::new(crate::Data::text(text));
            sink.broker.publish(receipts.request(&sink.room, publication)).await;
        }
        assert_eq!(sink.heard.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn brokers_with_metrics_count_publications() {
        let metrics = BrokerMetrics::register(&prometheus::Registry::new()).unwrap();
        let broker = MemoryBroker::new(&MemoryBus::new()).with_metrics(Arc::clone(&metrics));
        let (room, heard) = (RoomName::new("r").unwrap(), Arc::new(Recorder::default()));
        broker.subscribe(&room, heard.sink(&room), Affinity(0)).await.unwrap();
        broker.subscribe(&room, heard.sink(&room), Affinity(0)).await.unwrap();
        assert_eq!((metrics.up.get(), metrics.topics.get()), (1, 1));
        let receipts = Arc::new(Receipts::default());
        broker.publish(receipts.request(&room, crate::Publication::new(crate::Data::text("12345")))).await;
        assert_eq!((metrics.received.get(), metrics.received_bytes.get()), (1, 5));
        broker.close().await;
        assert_eq!((metrics.up.get(), metrics.topics.get()), (0, 0));
    }
}

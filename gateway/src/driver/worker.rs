//! The loop of one shard's thread.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering},
    task::Poll,
};

use axum::Router;
use broker_bridge::{Cursor, PublishRequest, Retention, RoomName};
use futures_util::FutureExt as _;
use slotmap::SparseSecondaryMap;
use tokio::{
    sync::oneshot,
    task::{AbortHandle, LocalSet},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Context, arrivals::Arrivals, connection::Tokio};
use crate::{
    auth::Token,
    clock::Clock,
    health::ShardHealth,
    protocol::{HistoryQuery, RequestId},
    request::{refusals, verify},
    settings::Settings,
    shard::{
        Action, ConnectionKey, Core as ShardCore, Inbox, JoinKey, NotAdmitted, Resuming, Subscription, Turn,
    },
    timeout,
};

/// The most bytes in one read. All connections of the shard share one buffer.
const SCRATCH: usize = 64 * 1024;

/// How many joins may be completed before other tasks get their turn.
const JOINS_AT_ONCE: usize = 16;

/// The core that this driver drives.
pub type Core = ShardCore<Tokio>;

/// Receives the outcome of an admission.
pub type Admitted = oneshot::Receiver<Result<(), NotAdmitted>>;

/// One shard's thread.
pub struct Worker {
    pub this: Weak<Worker>,
    core: RefCell<Core>,
    pub context: Arc<Context>,
    inbox: Arc<Inbox>,
    arrivals: Arc<Arrivals>,
    pub health: Arc<ShardHealth>,
    pub router: Router,
    /// The tasks of this shard: HTTP connections, upgrades, sockets, blocked publishers.
    pub tasks: TaskTracker,
    /// Cancelled when the shard begins to drain: HTTP connections without a session then end by themselves.
    pub draining: CancellationToken,
    pub scratch: RefCell<Box<[u8]>>,
    clock: Clock,
    /// The clock's count of pauses at the last turn.
    pauses: Cell<u32>,
    /// Those who wait for an admission.
    applicants: RefCell<SparseSecondaryMap<ConnectionKey, oneshot::Sender<Result<(), NotAdmitted>>>>,
    /// The tasks that wait for the broker to acknowledge a subscription.
    subscribing: RefCell<SparseSecondaryMap<JoinKey, AbortHandle>>,
    /// The tasks that wait for the verification of a session's token.
    verifying: RefCell<SparseSecondaryMap<ConnectionKey, AbortHandle>>,
    /// The tasks that read a part of a history. A session has one reading under way at most.
    reading: RefCell<SparseSecondaryMap<ConnectionKey, AbortHandle>>,
}

impl Worker {
    /// Runs a shard on the calling thread until it has drained or is stopped.
    pub fn run(
        runtime: &tokio::runtime::Runtime,
        index: usize,
        inbox: Arc<Inbox>,
        arrivals: Arc<Arrivals>,
        health: Arc<ShardHealth>,
        context: Arc<Context>,
        router: Router,
    ) {
        let clock = Clock::new();
        timeout::use_clock(&clock);
        let seed = getrandom::u64().unwrap_or(1);
        let core = Core::new(index, Arc::clone(&context.shard), Arc::clone(&inbox), clock.now(), seed);
        let worker = Rc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            core: RefCell::new(core),
            context,
            inbox,
            arrivals,
            health,
            router,
            tasks: TaskTracker::new(),
            draining: CancellationToken::new(),
            scratch: RefCell::new(vec![0; SCRATCH].into_boxed_slice()),
            pauses: Cell::new(clock.pauses()),
            clock,
            applicants: RefCell::default(),
            subscribing: RefCell::default(),
            verifying: RefCell::default(),
            reading: RefCell::default(),
        });
        let tasks = LocalSet::new();
        tasks.block_on(runtime, Rc::clone(&worker).run_turns());
        // Sockets that are still open now are closed with their tasks.
        drop(tasks);
        worker.core.borrow_mut().end();
        worker.settle_meter();
    }

    async fn run_turns(self: Rc<Self>) {
        let mut ticks = tokio::time::interval(Clock::STEP);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut turn = Turn::Idle;
        loop {
            let tick = poll_fn(|cx| {
                if let Poll::Ready(at) = ticks.poll_tick(cx) {
                    return Poll::Ready(Some(at));
                }
                if let Poll::Ready(arrived) = self.arrivals.poll_take(cx) {
                    for accepted in arrived {
                        self.accept(accepted);
                    }
                }
                if turn == Turn::More || self.inbox.poll_ready(cx).is_ready() {
                    return Poll::Ready(None);
                }
                Poll::Pending
            })
            .await;
            turn = self.turn(tick);
            self.settle_meter();
            match turn {
                Turn::Stopped => return,
                // The last clients may still be reading a response.
                Turn::Drained if self.health.load() == 0 => return,
                Turn::Drained | Turn::Idle => {}
                Turn::More => tokio::task::yield_now().await,
            }
        }
    }

    fn turn(&self, tick: Option<Instant>) -> Turn {
        let now = self.clock.now();
        let was_paused = self.pauses.replace(self.clock.pauses()) != self.clock.pauses();
        self.with_core(|core| {
            if was_paused {
                core.resume(now);
            }
            if let Some(due) = tick {
                self.health.beats.fetch_add(1, Ordering::Relaxed);
                self.context.shard.metrics.lag_seconds.observe(due.elapsed().as_secs_f64());
                core.tick(now);
            }
            let turn = core.turn(now);
            if core.is_draining() {
                self.draining.cancel();
            }
            turn
        })
    }

    /// Uses the core, and performs the actions that result.
    pub fn with_core<R>(&self, act: impl FnOnce(&mut Core) -> R) -> R {
        let mut core = self.core.borrow_mut();
        let result = act(&mut core);
        let mut at_once = JOINS_AT_ONCE;
        while let Some(action) = core.next_action() {
            self.perform(&mut core, action, &mut at_once);
        }
        result
    }

    fn perform(&self, core: &mut Core, action: Action, at_once: &mut usize) {
        match action {
            Action::Subscribe(key, subscription) => self.subscribe(core, key, subscription, at_once),
            Action::Abandon(key) => {
                if let Some(task) = self.subscribing.borrow_mut().remove(key) {
                    task.abort();
                }
            }
            Action::Publish(key, request, cost) => self.publish(key, request, cost),
            Action::ReadHistory(key, request, room, retention, query) => {
                self.read_history(key, request, room, retention, query);
            }
            Action::Resume(key, room, cursor, resuming) => self.resume(key, room, cursor, resuming),
            Action::Verify(key, token) => self.verify(key, token),
            Action::Admitted(key, outcome) => {
                if let Some(applicant) = self.applicants.borrow_mut().remove(key) {
                    // The client may have gone.
                    applicant.send(outcome).ok();
                }
            }
            Action::TokenRefused(session, failure) => {
                self.context.requests.auth_failed(failure);
                refusals::token_of_session(session, failure);
            }
        }
    }

    fn subscribe(
        &self,
        core: &mut Core,
        key: JoinKey,
        Subscription(mut acknowledged): Subscription,
        at_once: &mut usize,
    ) {
        // Most rooms have members already, and need no answer from the broker. But one client that joins very
        // many rooms must not hold up the others.
        if *at_once > 0
            && let Some(outcome) = (&mut acknowledged).now_or_never()
        {
            *at_once -= 1;
            return core.subscribed(key, outcome);
        }
        let Some(worker) = self.this.upgrade() else { return };
        let task = self.tasks.spawn_local(async move {
            let outcome = acknowledged.await;
            worker.subscribing.borrow_mut().remove(key);
            worker.with_core(|core| core.subscribed(key, outcome));
        });
        self.subscribing.borrow_mut().insert(key, task.abort_handle());
    }

    fn publish(&self, key: ConnectionKey, request: PublishRequest, cost: usize) {
        let Some(worker) = self.this.upgrade() else { return };
        self.tasks.spawn_local(async move {
            worker.context.shard.broker.publish(request).await;
            worker.with_core(|core| core.handed_over(key, cost));
        });
    }

    fn read_history(
        &self,
        key: ConnectionKey,
        request: RequestId,
        room: RoomName,
        retention: Option<Retention>,
        query: HistoryQuery,
    ) {
        let Some(worker) = self.this.upgrade() else { return };
        let task = self.tasks.spawn_local(async move {
            let outcome = match retention {
                Some(retention) => Some(worker.context.readings.read(&room, retention, query).await),
                None => None,
            };
            // Before the core hears of it: it may begin the session's next reading at once.
            worker.reading.borrow_mut().remove(key);
            worker.with_core(|core| core.history_read(key, request, outcome.as_ref()));
        });
        self.reading.borrow_mut().insert(key, task.abort_handle());
    }

    fn resume(&self, key: ConnectionKey, room: RoomName, cursor: Cursor, Resuming(resuming): Resuming) {
        let Some(worker) = self.this.upgrade() else { return };
        self.tasks.spawn_local(async move {
            let outcome = resuming.await;
            worker.with_core(|core| core.resumed(key, &room, cursor, outcome));
        });
    }

    fn verify(&self, key: ConnectionKey, token: Token) {
        let Some(worker) = self.this.upgrade() else { return };
        let task = self.tasks.spawn_local(async move {
            let outcome = verify(worker.settings(), &worker.context.crypto, token).await;
            worker.verifying.borrow_mut().remove(key);
            worker.with_core(|core| core.verified(key, outcome));
        });
        self.verifying.borrow_mut().insert(key, task.abort_handle());
    }

    /// Lets go of a connection that has ended. Nobody waits for its token's verification or its reading any more:
    /// otherwise those of sessions that gave up would hold up the sessions that came after them.
    pub fn forget(&self, key: ConnectionKey) {
        for tasks in [&self.verifying, &self.reading] {
            if let Some(task) = tasks.borrow_mut().remove(key) {
                task.abort();
            }
        }
        self.with_core(|core| core.forget(key));
    }

    /// Opens a connection. The receiver gets the outcome of its admission.
    pub fn open(&self, open: impl FnOnce(&mut Core) -> ConnectionKey) -> (ConnectionKey, Admitted) {
        let (sender, receiver) = oneshot::channel();
        let key = self.with_core(|core| {
            let key = open(core);
            self.applicants.borrow_mut().insert(key, sender);
            key
        });
        (key, receiver)
    }

    /// The settings that apply now.
    pub fn settings(&self) -> Arc<Settings> {
        self.context.shard.settings.load()
    }

    /// The shard's clock.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Moves the counts of bytes into the node's metrics.
    fn settle_meter(&self) {
        let (read, written) = self.health.meter.take();
        let traffic = &self.context.shard.traffic;
        if read > 0 {
            traffic.network_bytes_in.inc_by(read);
        }
        if written > 0 {
            traffic.network_bytes_out.inc_by(written);
        }
    }
}

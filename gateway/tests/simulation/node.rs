//! A simulated node: the real hub, settings, limits and shard cores, driven one step at a time.

use std::{collections::BTreeMap, io, sync::Arc, task::Context, time::Duration};

use broker_bridge::{Broker, BrokerError, Cursor, PublishRequest, RoomName};
use futures_util::{future::BoxFuture, task::noop_waker};
use prometheus::{Registry, proto::MetricFamily};
use tidegate::{
    auth::{Algorithm, Key, Keyring, Token},
    budget::Budget,
    clock::{Clock, Tick, Time},
    config::{Config, Sources},
    drain::Pace,
    history::Beginning,
    hub::{Begin, FanOut, Hub, HubMetrics, Joining, Mailbox, Repair},
    protocol,
    settings::{LiveSettings, Settings},
    shard::{
        Action, ConnectionKey, Context as ShardContext, Core, Inbox, Interest, JoinKey, NotAdmitted, Output,
        Resuming, ShardEvent, ShardMetrics, Start, Subscription, Turn, transport::Socket as _,
    },
    traffic::Traffic,
    vocabulary::{CloseReason, SessionIds},
};

use crate::{
    broker::{ModelBroker, SharedBus},
    random::Random,
    service::{SLICE, Service},
    task::Task,
    transport::{self, Shared, SimResponse, SimSocket, Simulated},
};

/// The secret that tokens are signed with.
pub const SECRET: [u8; 32] = [7; 32];
/// A key that signs nothing. A node that has a public key verifies tokens on another thread, and sessions wait.
const PUBLIC_KEY: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE3vYXTDq3gzpic6rdxqWlScD7R5lL
bdTrE90RXLwcD0qjw6Whw3J6YWkLX4Lvk6viHfh244Q4Qi836uniU2ja5A==
-----END PUBLIC KEY-----
";
/// A turn writes to a bounded number of sockets, so that all others have to wait for no more than that: to a
/// slice of the members in rounds, and to a slice of the connections with queued output.
const SOCKETS_PER_TURN: usize = 2 * SLICE;
/// What is in a full inbox is handled within so many turns.
const MOST_TURNS_TO_STOP: usize = 2_000;

/// Finds out where a member continues.
type Resumption = BoxFuture<'static, Result<Begin, BrokerError>>;

/// One node.
pub struct Node {
    pub link: usize,
    pub shards: Vec<Shard>,
    pub settings: Arc<LiveSettings>,
    pub ids: SessionIds,
    pub hub: Arc<Hub>,
    pub budget: Arc<Budget>,
    pub is_draining: bool,
    /// The next reading that the hub wants.
    next_repair: Task<BoxFuture<'static, Repair>>,
    /// Readings under way.
    repairing: Vec<Repairing>,
    registry: Registry,
    time: Time,
}

/// One shard and what its driver keeps.
pub struct Shard {
    pub core: Core<Simulated>,
    inbox: Arc<Inbox>,
    broker: Arc<dyn Broker>,
    turn: Turn,
    /// The most sockets that a turn has written to.
    pub most_written: usize,
    /// Subscriptions that wait for the broker.
    subscribing: BTreeMap<JoinKey, Task<Joining>>,
    /// Members that wait to know where they continue.
    resuming: Vec<(ConnectionKey, RoomName, Cursor, Task<Resumption>)>,
    polls_at_once: bool,
    /// Publications that wait for space in the broker's queue, in order.
    publishing: Vec<(ConnectionKey, PublishRequest, usize)>,
    /// Tokens that are being verified.
    verifying: Vec<(ConnectionKey, Token)>,
    time: Time,
    /// The connections, in the order in which they were opened.
    pub links: Vec<Link>,
    /// Admissions that have ended and were not looked at.
    admitted: BTreeMap<ConnectionKey, Result<(), NotAdmitted>>,
}

/// A connection of a shard and what its driver keeps.
pub struct Link {
    pub key: ConnectionKey,
    pub pipe: Shared,
    kind: Carrier,
    /// What the task of the connection waits for. Nothing else makes it run, but a wake-up.
    waits: Waits,
    service: Service,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    Socket { tls: bool },
    Response,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    /// The transport is not attached yet.
    Admission,
    For {
        read: bool,
        write: bool,
    },
}

/// A reading of a room's history.
type Repairing = Task<BoxFuture<'static, (Repair, Result<(), BrokerError>)>>;

/// How many rooms' histories are read at a time.
const MOST_REPAIRS: usize = 3;

fn next_repair(hub: &Arc<Hub>) -> Task<BoxFuture<'static, Repair>> {
    let hub = Arc::clone(hub);
    Task::new(Box::pin(async move { hub.next_repair().await }))
}

fn attempt(repair: Repair) -> Repairing {
    Task::new(Box::pin(async move {
        let outcome = repair.attempt().await;
        (repair, outcome)
    }))
}

/// The settings of a node.
pub fn settings(text: &str) -> Settings {
    let sources = Sources { file: Some(("simulation.toml".into(), text.to_owned())), ..Sources::default() };
    let config = Config::load(&sources).unwrap();
    let secret = Key::shared(None, Algorithm::Hs256, &SECRET).unwrap();
    let unused = Key::public(Some("unused"), Algorithm::Es256, PUBLIC_KEY.as_bytes()).unwrap();
    Settings::new(&config, Arc::new(Keyring::new(vec![secret, unused], Vec::new())))
}

impl Node {
    pub fn new(
        bus: &SharedBus,
        text: &str,
        shards: usize,
        time: &Time,
        now: Tick,
        random: &mut Random,
    ) -> Self {
        let registry = Registry::new();
        let budget = Budget::register(&registry, shards).unwrap();
        let inboxes: Vec<_> = (0..shards).map(|_| Arc::new(Inbox::new(64 * 1024))).collect();
        let mailboxes = inboxes.iter().map(|inbox| Arc::clone(inbox) as Arc<dyn Mailbox>).collect();
        let metrics = Arc::new(HubMetrics::register(&registry).unwrap());
        let fan_out = FanOut::new(mailboxes, metrics, Arc::clone(&budget), time.clone());
        let queue = if random.one_in(2) { random.between(2, 32) } else { random.between(100, 300) };
        let model = ModelBroker::new(bus, queue);
        let link = model.link();
        let broker: Arc<dyn Broker> = Arc::new(model);
        let hub = Arc::new(Hub::new(fan_out, Arc::clone(&broker)));
        let settings = Arc::new(LiveSettings::new(settings(text), time.clone()));
        let names = protocol::names();
        let context = Arc::new(ShardContext {
            hub: Arc::clone(&hub),
            broker: Arc::clone(&broker),
            metrics: Arc::new(ShardMetrics::register(&registry, &names).unwrap()),
            traffic: Arc::new(Traffic::register(&registry).unwrap()),
            budget: Arc::clone(&budget),
            settings: Arc::clone(&settings),
            time: time.clone(),
        });
        let shards = inboxes
            .into_iter()
            .enumerate()
            .map(|(index, inbox)| Shard {
                core: Core::new(index, Arc::clone(&context), Arc::clone(&inbox), now, random.next()),
                inbox,
                broker: Arc::clone(&broker),
                turn: Turn::Idle,
                most_written: 0,
                subscribing: BTreeMap::new(),
                resuming: Vec::new(),
                polls_at_once: random.one_in(2),
                publishing: Vec::new(),
                verifying: Vec::new(),
                time: time.clone(),
                links: Vec::new(),
                admitted: BTreeMap::new(),
            })
            .collect();
        let ids = SessionIds::new(link as u64 + 1);
        Self {
            link,
            shards,
            settings,
            ids,
            next_repair: next_repair(&hub),
            repairing: Vec::new(),
            hub,
            budget,
            is_draining: false,
            registry,
            time: time.clone(),
        }
    }

    /// Goes on with one of the readings of rooms' histories. Returns whether there was anything to do.
    pub fn repair(&mut self, random: &mut Random) -> bool {
        if self.repairing.len() < MOST_REPAIRS
            && let Some(repair) = self.next_repair.run()
        {
            self.next_repair = next_repair(&self.hub);
            self.repairing.push(attempt(repair));
            return true;
        }
        let woken: Vec<_> =
            (0..self.repairing.len()).filter(|index| self.repairing[*index].is_woken()).collect();
        let Some(index) = woken.get(random.below(woken.len())).copied() else { return false };
        if let Some((repair, outcome)) = self.repairing[index].run() {
            self.repairing.swap_remove(index);
            if outcome.is_err() {
                self.repairing.push(attempt(repair));
            }
        }
        true
    }

    /// Whether no history is being read.
    pub fn has_repaired(&self) -> bool {
        self.repairing.is_empty() && !self.next_repair.is_woken()
    }

    pub fn limit_memory(&self, bytes: usize) {
        self.budget.set_limit(bytes);
    }

    /// Begins to close all sessions within this time.
    pub fn drain(&mut self, window: Duration) {
        self.is_draining = true;
        let pace = Arc::new(Pace::new(self.time.now(), window));
        for shard in &self.shards {
            shard.inbox.post(ShardEvent::Drain(Arc::clone(&pace)));
        }
    }

    /// Stops at once, whatever its shards have to do. Their sockets are closed.
    pub fn stop(&mut self, now: Tick, random: &mut Random) {
        for shard in &mut self.shards {
            shard.inbox.post(ShardEvent::Stop);
            let turns = (0..MOST_TURNS_TO_STOP).position(|_| {
                shard.take_turn(now, random);
                shard.turn == Turn::Stopped
            });
            assert!(turns.is_some(), "a shard does not stop within {MOST_TURNS_TO_STOP} turns");
            shard.core.end();
            shard.links.iter().for_each(|link| link.pipe.borrow_mut().is_closed = true);
        }
    }

    /// The sum of a metric's samples.
    pub fn metric(&self, name: &str) -> i64 {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name);
        family.map_or(0, |family| samples(family).map(|(_, value)| value).sum())
    }

    /// The samples of a metric, by their labels.
    pub fn metrics(&self, name: &str) -> Vec<(String, i64)> {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name);
        family.map_or_else(Vec::new, |family| samples(family).collect())
    }

    /// A node without connections has nothing left of them. What it keeps of rooms' histories goes when it forgets
    /// the rooms.
    pub fn check_empty(&self, has_forgotten: bool) {
        for shard in &self.shards {
            assert!(shard.core.is_empty(), "{} connections are left", shard.core.len());
        }
        for name in ["tidegate_connections", "tidegate_subscriptions", "tidegate_outbound_bytes"] {
            assert_eq!(self.metric(name), 0, "{name}");
        }
        let mut held = self.metrics("tidegate_memory_held_bytes");
        held.retain(|(consumer, _)| has_forgotten || !["history", "outbound"].contains(&&**consumer));
        assert!(held.iter().all(|(_, count)| *count == 0), "memory is counted that nobody holds: {held:?}");
        let (opened, closed) = (
            self.metric("tidegate_connections_opened_total"),
            self.metric("tidegate_connections_closed_total"),
        );
        assert_eq!(opened, closed, "each session ends once, for one reason");
    }
}

fn samples(family: &MetricFamily) -> impl Iterator<Item = (String, i64)> {
    family.get_metric().iter().map(|metric| {
        let labels: Vec<_> = metric.get_label().iter().map(|label| label.value().to_owned()).collect();
        (labels.join(" "), (metric.get_gauge().get_value() + metric.get_counter().get_value()) as i64)
    })
}

impl Shard {
    /// Opens a connection whose client is at the other end of the pipe.
    pub fn open(
        &mut self,
        start: Start,
        rooms: &[RoomName],
        begin: &[Beginning],
        kind: Carrier,
        pipe: &Shared,
    ) -> ConnectionKey {
        let key = self.core.open(start, rooms, begin);
        let service = Service::default();
        self.links.push(Link { key, pipe: Shared::clone(pipe), kind, waits: Waits::Admission, service });
        self.perform();
        key
    }

    /// Does one of the things that could be done now. Returns whether there was any.
    pub fn step(&mut self, now: Tick, random: &mut Random) -> bool {
        let first = random.below(5);
        (0..5).any(|offset| match (first + offset) % 5 {
            0 => self.take_turn(now, random),
            1 => self.run_task(random),
            2 => self.poll_subscription(random),
            3 => self.verify(random),
            _ => self.hand_over(random),
        })
    }

    /// Does everything that could be done now, but turns; then takes one.
    pub fn step_by_turn(&mut self, now: Tick, random: &mut Random) {
        while self.run_task(random)
            || self.poll_subscription(random)
            || self.verify(random)
            || self.hand_over(random)
        {}
        self.take_turn(now, random);
    }

    /// The regular tick.
    pub fn tick(&mut self, now: Tick, random: &mut Random) {
        self.core.tick(now);
        self.perform();
        // A tick always ends with a turn.
        self.turn = Turn::More;
        self.take_turn(now, random);
    }

    /// The shard's clock stood still, while time went on.
    pub fn resume(&mut self, now: Tick) {
        self.core.resume(now);
        self.perform();
    }

    /// Begins to close a connection.
    pub fn close(&mut self, key: ConnectionKey, reason: CloseReason) {
        self.core.close(key, reason);
        self.perform();
    }

    fn take_turn(&mut self, now: Tick, random: &mut Random) -> bool {
        let waker = noop_waker();
        let ready = self.inbox.poll_ready(&Context::from_waker(&waker)).is_ready();
        if self.turn == Turn::Stopped || matches!(self.turn, Turn::Idle | Turn::Drained) && !ready {
            return false;
        }
        self.run_overdue(random);
        let joining = self.core.joining();
        transport::begin_turn();
        self.turn = self.core.turn(now);
        // Whoever asked for a room in vain is answered, besides.
        let most = SOCKETS_PER_TURN + joining.saturating_sub(self.core.joining());
        assert!(transport::written() <= most, "a turn writes to {} sockets", transport::written());
        self.most_written = self.most_written.max(transport::written());
        self.perform();
        self.check_service();
        true
    }

    /// Runs the tasks that have been passed over too often.
    fn run_overdue(&mut self, random: &mut Random) {
        for index in (0..self.links.len()).rev() {
            let link = &mut self.links[index];
            let is_runnable = link.is_runnable(&self.admitted);
            if link.service.must_run(is_runnable) {
                self.run_link(index, random);
            }
        }
        self.perform();
    }

    /// No ready socket waits for long.
    fn check_service(&mut self) {
        let connections = self.links.len();
        for link in self.links.iter_mut().filter(|link| link.waits != Waits::Admission) {
            let mut queued = self.core.queued_for(link.key);
            let interest = match self.core.socket(link.key) {
                Some((socket, interest)) => {
                    queued += socket.unsent();
                    interest
                }
                None => Interest { read: false, write: false },
            };
            link.service.check(&link.pipe.borrow(), interest, queued, connections);
        }
    }

    /// Runs the task of a connection that is ready or has been woken.
    fn run_task(&mut self, random: &mut Random) -> bool {
        let runnable: Vec<_> =
            (0..self.links.len()).filter(|index| self.links[*index].is_runnable(&self.admitted)).collect();
        if runnable.is_empty() {
            return false;
        }
        let index = runnable[random.below(runnable.len())];
        self.run_link(index, random);
        self.perform();
        true
    }

    fn run_link(&mut self, index: usize, random: &mut Random) {
        let Link { key, pipe, kind, waits, .. } = &mut self.links[index];
        let (key, pipe) = (*key, Shared::clone(pipe));
        pipe.borrow_mut().is_woken = false;
        if *waits == Waits::Admission {
            let outcome = self.admitted.remove(&key);
            if outcome.is_none_or(|outcome| outcome.is_err()) || pipe.borrow().is_reset {
                pipe.borrow_mut().is_closed = true;
                return self.forget(index);
            }
            pipe.borrow_mut().is_answered = true;
            match *kind {
                Carrier::Socket { tls } => {
                    // A client may send before it has read the answer, and that may come with its request.
                    let early = pipe.borrow().to_node.len();
                    let early = if random.one_in(2) { random.below(early + 1) } else { 0 };
                    let early = pipe.borrow_mut().receive(early);
                    self.core.attach_socket(key, SimSocket::new(&pipe, tls), &early.into());
                }
                Carrier::Response => self.core.attach_response(key, SimResponse(Shared::clone(&pipe))),
            }
            *waits = Waits::For { read: false, write: false };
            pipe.borrow_mut().is_woken = true;
            return;
        }
        match kind {
            Carrier::Response => self.run_response(index, key, &pipe),
            Carrier::Socket { .. } => self.run_socket(index, key, &pipe, random),
        }
    }

    fn run_response(&mut self, index: usize, key: ConnectionKey, pipe: &Shared) {
        if pipe.borrow().is_reset || pipe.borrow().is_closed {
            pipe.borrow_mut().is_closed = true;
            return self.forget(index);
        }
        // hyper takes output while its own buffer has space.
        if pipe.borrow().space() == 0 {
            self.links[index].waits = Waits::For { read: false, write: true };
            return;
        }
        match self.core.take_output(key) {
            Output::Bytes(bytes) => {
                let mut pipe = pipe.borrow_mut();
                pipe.send(&bytes);
                pipe.is_woken = true;
            }
            Output::Pending => self.links[index].waits = Waits::For { read: false, write: false },
            Output::End => {
                pipe.borrow_mut().is_closed = true;
                self.forget(index);
            }
        }
    }

    fn run_socket(&mut self, index: usize, key: ConnectionKey, pipe: &Shared, random: &mut Random) {
        let Some((_, interest)) = self.core.socket(key) else { return self.forget(index) };
        let can_write = pipe.borrow().space() > 0 || pipe.borrow().is_reset;
        let interest = if interest.write && can_write {
            self.core.writable(key);
            // Like tokio's driver, which reads as soon as the socket takes no more.
            let Some((_, interest)) = self.core.socket(key) else { return self.forget(index) };
            interest
        } else {
            interest
        };
        if !interest.read {
            self.links[index].waits = Waits::For { read: false, write: interest.write };
            return;
        }
        let input = {
            let mut pipe = pipe.borrow_mut();
            let all = pipe.to_node.len();
            if pipe.is_reset {
                Err(io::ErrorKind::ConnectionReset.into())
            } else if all > 0 {
                let read = random.between(1, all);
                Ok(Some(pipe.receive(read)))
            } else if pipe.client_ended {
                Ok(Some(Vec::new()))
            } else {
                Ok(None)
            }
        };
        match input {
            Ok(None) => self.links[index].waits = Waits::For { read: true, write: interest.write },
            Ok(Some(bytes)) if bytes.is_empty() => {
                self.core.lost(key, None);
                self.forget(index);
            }
            Ok(Some(mut bytes)) => {
                self.core.received(key, &mut bytes);
                pipe.borrow_mut().is_woken = true;
            }
            Err(error) => {
                let error: io::Error = error;
                self.core.lost(key, Some(&error));
                self.forget(index);
            }
        }
    }

    fn forget(&mut self, index: usize) {
        let link = self.links.remove(index);
        self.core.forget(link.key);
        self.admitted.remove(&link.key);
    }

    fn poll_subscription(&mut self, random: &mut Random) -> bool {
        let keys: Vec<_> = self.subscribing.keys().copied().collect();
        if let Some(index) = (0..self.resuming.len()).find(|_| random.one_in(2))
            && let Some(outcome) = self.resuming[index].3.run()
        {
            let (key, room, cursor, _) = self.resuming.remove(index);
            self.core.resumed(key, &room, cursor, outcome);
            self.perform();
            return true;
        }
        let first = random.below(keys.len());
        for offset in 0..keys.len() {
            let key = keys[(first + offset) % keys.len()];
            if self.poll(key) {
                self.perform();
                return true;
            }
        }
        false
    }

    fn poll(&mut self, key: JoinKey) -> bool {
        let outcome = self.subscribing.get_mut(&key).and_then(Task::run);
        let Some(outcome) = outcome else { return false };
        self.subscribing.remove(&key);
        self.core.subscribed(key, outcome);
        true
    }

    fn hand_over(&mut self, random: &mut Random) -> bool {
        if self.publishing.is_empty() {
            return false;
        }
        let (key, request, cost) = self.publishing.remove(random.below(self.publishing.len()));
        match self.broker.try_publish(request) {
            Ok(()) => {
                self.core.handed_over(key, cost);
                self.perform();
                true
            }
            Err(request) => {
                self.publishing.push((key, request, cost));
                false
            }
        }
    }

    fn verify(&mut self, random: &mut Random) -> bool {
        if self.verifying.is_empty() {
            return false;
        }
        let (key, token) = self.verifying.remove(random.below(self.verifying.len()));
        let outcome = self.core.settings().authenticator.verify(&token, self.time.unix().into());
        self.core.verified(key, outcome);
        self.perform();
        true
    }

    fn perform(&mut self) {
        while let Some(action) = self.core.next_action() {
            match action {
                Action::Subscribe(key, Subscription(subscribing)) => {
                    self.subscribing.insert(key, Task::new(subscribing));
                    // A driver may look at once, or later.
                    if self.polls_at_once {
                        self.poll(key);
                    }
                }
                Action::Abandon(key) => drop(self.subscribing.remove(&key)),
                Action::Publish(key, request, cost) => self.publishing.push((key, request, cost)),
                Action::Admitted(key, outcome) => drop(self.admitted.insert(key, outcome)),
                Action::Verify(key, token) => self.verifying.push((key, token)),
                Action::Resume(key, room, cursor, Resuming(resuming)) => {
                    self.resuming.push((key, room, cursor, Task::new(resuming)));
                }
                Action::ReadHistory(key, request, ..) => self.core.history_read(key, request, None),
                Action::TokenRefused(..) => {}
            }
        }
    }

    /// Whether nothing is left to do without something new.
    pub fn is_quiet(&self) -> bool {
        let waker = noop_waker();
        self.subscribing.is_empty()
            && self.resuming.is_empty()
            && self.publishing.is_empty()
            && self.verifying.is_empty()
            && matches!(self.turn, Turn::Idle | Turn::Drained)
            && self.inbox.poll_ready(&Context::from_waker(&waker)).is_pending()
            && !self.links.iter().any(|link| link.is_runnable(&self.admitted))
    }

    /// Whether it has drained, and what it had for the broker has been handed over.
    pub fn is_drained(&self) -> bool {
        self.turn == Turn::Drained && self.publishing.is_empty()
    }
}

impl Link {
    fn is_runnable(&self, admitted: &BTreeMap<ConnectionKey, Result<(), NotAdmitted>>) -> bool {
        let pipe = self.pipe.borrow();
        match self.waits {
            Waits::Admission => admitted.contains_key(&self.key) || pipe.is_reset,
            // A response's connection notices when its client goes.
            Waits::For { .. } if self.kind == Carrier::Response && (pipe.is_reset || pipe.is_closed) => true,
            Waits::For { read, write } => {
                let readable = !pipe.to_node.is_empty() || pipe.client_ended || pipe.is_reset;
                let writable = pipe.space() > 0 || pipe.is_reset;
                pipe.is_woken || read && readable || write && writable
            }
        }
    }
}

/// The length of a tick.
pub const STEP: Duration = Clock::STEP;

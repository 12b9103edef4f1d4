//! A model of a broker: it reorders nothing, but it loses, stalls, refuses and answers late, and it tells the
//! gaps that it must tell.
//!
//! Nothing happens by itself. The simulation says when a node's connection accepts a publication, confirms a
//! subscription or delivers something.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use broker_bridge::{
    Accepted, Affinity, Broker, BrokerError, BrokerStatus, GapCause, Publication, PublishRequest, RoomName,
    Sink, Subscribing,
};
use futures_util::future::BoxFuture;
use tokio::sync::{oneshot, watch};

/// Something on its way to a node: a publication for a subscription, or a gap.
type Arrival = (Arc<dyn Sink>, Result<Publication, GapCause>);

/// What all nodes share.
#[derive(Default)]
pub struct Bus {
    /// Every publication that was accepted, by room and in order.
    pub log: BTreeMap<RoomName, Vec<Publication>>,
    pub links: Vec<Link>,
}

/// A node's connection to the bus.
pub struct Link {
    rooms: BTreeMap<RoomName, Subscription>,
    /// What is on its way to the node.
    arriving: VecDeque<Arrival>,
    /// What the node has handed over.
    publishing: VecDeque<PublishRequest>,
    /// How many publications the node may hand over before one is accepted.
    queue: usize,
    pub is_up: bool,
}

/// A node's subscription to a room.
struct Subscription {
    sink: Arc<dyn Sink>,
    is_confirmed: bool,
    /// Whether the node has missed publications since it was confirmed.
    is_interrupted: bool,
    waiting: Vec<oneshot::Sender<Result<(), BrokerError>>>,
}

pub type SharedBus = Arc<Mutex<Bus>>;

impl Bus {
    /// Accepts a publication: it is delivered to all nodes whose subscription is confirmed.
    pub fn accept(&mut self, room: &RoomName, publication: Publication) {
        for link in &mut self.links {
            if link.is_up
                && let Some(subscription) = link.rooms.get(room)
                && subscription.is_confirmed
            {
                link.arriving.push_back((Arc::clone(&subscription.sink), Ok(publication.clone())));
            }
        }
        self.log.entry(room.clone()).or_default().push(publication);
    }

    /// Accepts the next publication of a node, or refuses it. Returns whether there was any.
    pub fn accept_next(&mut self, link: usize, refuse: bool) -> bool {
        if refuse || !self.links[link].is_up {
            return self.settle_next(link, Err(BrokerError::NotNow("busy".into())));
        }
        if let Some(PublishRequest { room, publication, .. }) = self.links[link].publishing.front() {
            let (room, publication) = (room.clone(), publication.clone());
            self.accept(&room, publication);
        }
        self.settle_next(link, Ok(Accepted::default()))
    }

    /// Answers the next publication of a node, which nobody gets by that. Returns whether there was any.
    pub fn settle_next(&mut self, link: usize, outcome: Result<Accepted, BrokerError>) -> bool {
        let link = &mut self.links[link];
        let next = if link.is_up { link.publishing.pop_front() } else { None };
        let is_any = next.is_some();
        if let Some(request) = next {
            request.receipt.settle(outcome);
        }
        is_any
    }

    /// What a node has handed over and has not been settled, in order.
    pub fn publishing(&self, link: usize) -> impl Iterator<Item = (&RoomName, &Publication)> {
        self.links[link].publishing.iter().map(|request| (&request.room, &request.publication))
    }

    /// Sets how many publications a node may hand over before one is accepted.
    pub fn set_queue(&mut self, link: usize, queue: usize) {
        self.links[link].queue = queue;
    }

    /// Tells a node of a gap.
    pub fn tell_gap(&mut self, link: usize, room: &RoomName, cause: GapCause) {
        let link = &mut self.links[link];
        if let Some(subscription) = link.rooms.get(room) {
            link.arriving.push_back((Arc::clone(&subscription.sink), Err(cause)));
        }
    }

    /// Takes the next thing on its way to a node. To be passed to [`deliver`] without the lock.
    fn next_arrival(&mut self, link: usize) -> Option<Arrival> {
        self.links.get_mut(link)?.arriving.pop_front()
    }

    /// Confirms or refuses the subscription to one of the rooms that wait. Returns whether there was any.
    pub fn confirm_next(&mut self, link: usize, which: usize, refuse: bool) -> bool {
        let Link { rooms, is_up, .. } = &self.links[link];
        let waiting: Vec<_> =
            rooms.iter().filter(|(_, room)| !room.is_confirmed).map(|(name, _)| name.clone()).collect();
        if !is_up || waiting.is_empty() {
            return false;
        }
        let outcome = if refuse { Err(BrokerError::Refused("no".into())) } else { Ok(()) };
        self.confirm(link, &waiting[which % waiting.len()], &outcome);
        true
    }

    /// Confirms all subscriptions of a node.
    pub fn confirm_all(&mut self, link: usize) {
        let waiting: Vec<_> = self.subscribed(link).filter(|_| self.links[link].is_up).cloned().collect();
        for room in waiting {
            self.confirm(link, &room, &Ok(()));
        }
    }

    /// Confirms or refuses the subscription to a room, if it waits.
    pub fn confirm(&mut self, link: usize, room: &RoomName, outcome: &Result<(), BrokerError>) {
        let rooms = &mut self.links[link].rooms;
        let Some(subscription) = rooms.get_mut(room) else { return };
        for waiting in subscription.waiting.drain(..) {
            drop(waiting.send(outcome.clone()));
        }
        if outcome.is_err() {
            rooms.remove(room);
        } else {
            subscription.is_confirmed = true;
        }
    }

    /// The node's connection is lost, and with it what was on its way. Of the publications that wait, so many
    /// were accepted, but the node never learns it.
    pub fn interrupt(&mut self, link: usize, accepted: usize) {
        for _ in 0..accepted {
            let Some(request) = self.links[link].publishing.pop_front() else { break };
            self.accept(&request.room, request.publication);
            request.receipt.settle(Err(BrokerError::Unknown));
        }
        let link = &mut self.links[link];
        link.is_up = false;
        link.arriving.clear();
        for room in link.rooms.values_mut().filter(|room| room.is_confirmed) {
            room.is_confirmed = false;
            room.is_interrupted = true;
        }
        for request in link.publishing.drain(..) {
            request.receipt.settle(Err(BrokerError::Unknown));
        }
    }

    /// The node is connected again: its subscriptions stand, and each that was interrupted is told a gap.
    pub fn restore(&mut self, link: usize) {
        let link = &mut self.links[link];
        link.is_up = true;
        for room in link.rooms.values_mut().filter(|room| room.is_interrupted) {
            (room.is_confirmed, room.is_interrupted) = (true, false);
            link.arriving.push_back((Arc::clone(&room.sink), Err(GapCause::Interrupted)));
            for waiting in room.waiting.drain(..) {
                drop(waiting.send(Ok(())));
            }
        }
    }

    /// Whether nothing is under way on these connections.
    pub fn is_quiet_for(&self, mut links: impl Iterator<Item = usize>) -> bool {
        links.all(|link| {
            let link = &self.links[link];
            link.is_up
                && link.arriving.is_empty()
                && link.publishing.is_empty()
                && link.rooms.values().all(|room| room.is_confirmed)
        })
    }

    /// The node is gone.
    pub fn remove(&mut self, link: usize) {
        self.interrupt(link, 0);
        self.links[link].rooms.clear();
        self.links[link].is_up = true;
    }

    /// The rooms that a node is subscribed to.
    pub fn subscribed(&self, link: usize) -> impl Iterator<Item = &RoomName> {
        self.links[link].rooms.keys()
    }
}

/// Delivers the next thing on its way to a node. Returns whether there was any.
pub fn deliver(bus: &SharedBus, link: usize) -> bool {
    let next = lock(bus).next_arrival(link);
    let Some((sink, what)) = next else { return false };
    match what {
        Ok(publication) => sink.publication(publication, None),
        Err(cause) => sink.gap(cause),
    }
    true
}

pub fn lock(bus: &SharedBus) -> MutexGuard<'_, Bus> {
    bus.lock().unwrap()
}

/// One node's broker.
pub struct ModelBroker {
    bus: SharedBus,
    link: usize,
    status: watch::Sender<BrokerStatus>,
}

impl ModelBroker {
    /// Connects a node whose queue takes this many publications.
    pub fn new(bus: &SharedBus, queue: usize) -> Self {
        let mut shared = lock(bus);
        shared.links.push(Link {
            rooms: BTreeMap::new(),
            arriving: VecDeque::new(),
            publishing: VecDeque::new(),
            queue,
            is_up: true,
        });
        Self {
            bus: Arc::clone(bus),
            link: shared.links.len() - 1,
            status: watch::Sender::new(BrokerStatus::Up),
        }
    }

    /// The number of the node's connection.
    pub fn link(&self) -> usize {
        self.link
    }
}

impl Broker for ModelBroker {
    fn subscribe(&self, room: &RoomName, sink: Arc<dyn Sink>, _: Affinity) -> Subscribing {
        let mut bus = lock(&self.bus);
        let new = || Subscription { sink, is_confirmed: false, is_interrupted: false, waiting: Vec::new() };
        let subscription = bus.links[self.link].rooms.entry(room.clone()).or_insert_with(new);
        if subscription.is_confirmed {
            return Box::pin(async { Ok(()) });
        }
        let (sender, receiver) = oneshot::channel();
        subscription.waiting.push(sender);
        Box::pin(async move { receiver.await.unwrap_or(Err(BrokerError::Closed)) })
    }

    fn unsubscribe(&self, room: &RoomName, _: Affinity) {
        let subscription = lock(&self.bus).links[self.link].rooms.remove(room);
        for waiting in subscription.into_iter().flat_map(|subscription| subscription.waiting) {
            drop(waiting.send(Err(BrokerError::NotNow("unsubscribed".into()))));
        }
    }

    fn try_publish(&self, request: PublishRequest) -> Result<(), PublishRequest> {
        let mut bus = lock(&self.bus);
        let link = &mut bus.links[self.link];
        if link.publishing.len() >= link.queue {
            return Err(request);
        }
        link.publishing.push_back(request);
        Ok(())
    }

    fn publish(&self, _: PublishRequest) -> BoxFuture<'_, ()> {
        unreachable!("the simulation waits for space by itself")
    }

    fn status(&self) -> watch::Receiver<BrokerStatus> {
        self.status.subscribe()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

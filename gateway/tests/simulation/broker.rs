//! A model of a broker: it reorders nothing, but it loses, stalls, refuses and answers late, and it tells the
//! gaps that it must tell.
//!
//! Nothing happens by itself. The simulation says when a node's connection accepts a publication, confirms a
//! subscription, answers what a node wants to know of a room's history, or delivers something.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use broker_bridge::{
    Accepted, Affinity, Broker, BrokerError, BrokerStatus, Cursor, GapCause, Place, Positioning, Publication,
    PublishRequest, Reading, Retention, RoomName, Sink, Subscribing,
    history::{Page, ReadFrom},
};
use futures_util::future::BoxFuture;
use tokio::sync::{oneshot, watch};

use crate::server::{Restart, Server};

/// Something on its way to a node: a publication for a subscription, or a gap.
type Arrival = (Arc<dyn Sink>, Result<(Publication, Option<Place>), GapCause>);

/// What all nodes share.
#[derive(Default)]
pub struct Bus {
    /// Every publication that was accepted, by room and in order, and its position in the room's history.
    pub log: BTreeMap<RoomName, Vec<(Publication, Option<Cursor>)>>,
    pub server: Server,
    pub links: Vec<Link>,
}

/// What a node wants to know of a room's history.
enum Question {
    Open(oneshot::Sender<Result<Cursor, BrokerError>>),
    Read(ReadFrom, usize, oneshot::Sender<Result<Page, BrokerError>>),
}

/// What the server has said to that, on its way to the node.
enum Answer {
    Open(oneshot::Sender<Result<Cursor, BrokerError>>, Result<Cursor, BrokerError>),
    Read(oneshot::Sender<Result<Page, BrokerError>>, Result<Page, BrokerError>),
}

impl Question {
    fn refused(self, error: BrokerError) -> Answer {
        match self {
            Self::Open(sender) => Answer::Open(sender, Err(error)),
            Self::Read(_, _, sender) => Answer::Read(sender, Err(error)),
        }
    }
}

impl Answer {
    fn send(self) {
        match self {
            Self::Open(sender, answer) => drop(sender.send(answer)),
            Self::Read(sender, answer) => drop(sender.send(answer)),
        }
    }
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
    /// What the node has asked, and what it was answered.
    asked: Vec<(RoomName, Question)>,
    answers: Vec<Answer>,
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
    /// Accepts a publication, and records it if so much is to be kept: it is delivered to all nodes whose
    /// subscription is confirmed.
    pub fn accept(
        &mut self,
        room: &RoomName,
        publication: Publication,
        history: Option<Retention>,
    ) -> Option<Cursor> {
        let place = history.map(|retention| self.server.record(room, publication.clone(), retention));
        let cursor = place.map(|place| place.cursor);
        for link in &mut self.links {
            if link.is_up
                && let Some(subscription) = link.rooms.get(room)
                && subscription.is_confirmed
            {
                link.arriving.push_back((Arc::clone(&subscription.sink), Ok((publication.clone(), place))));
            }
        }
        self.log.entry(room.clone()).or_default().push((publication, cursor));
        cursor
    }

    /// Accepts the next publication of a node, or refuses it. Returns whether there was any.
    pub fn accept_next(&mut self, link: usize, refuse: bool) -> bool {
        if refuse || !self.links[link].is_up {
            return self.settle_next(link, Err(BrokerError::NotNow("busy".into())));
        }
        let mut cursor = None;
        if let Some(PublishRequest { room, publication, history, .. }) = self.links[link].publishing.front() {
            let (room, publication, history) = (room.clone(), publication.clone(), *history);
            cursor = self.accept(&room, publication, history);
        }
        self.settle_next(link, Ok(Accepted { cursor, duplicate: false }))
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
            self.accept(&request.room, request.publication, request.history);
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

    /// The server starts again: all connections are lost, and what was asked.
    pub fn restart(&mut self, with: Restart) {
        for link in 0..self.links.len() {
            self.interrupt(link, 0);
            self.fail_questions(link);
        }
        self.server.restart(with);
    }

    /// The connection is lost on which a node has asked.
    pub fn fail_questions(&mut self, link: usize) {
        let Link { asked, answers, .. } = &mut self.links[link];
        for answer in answers.iter_mut() {
            match answer {
                Answer::Open(_, answer) => *answer = Err(BrokerError::Unavailable),
                Answer::Read(_, answer) => *answer = Err(BrokerError::Unavailable),
            }
        }
        answers.extend(asked.drain(..).map(|(_, question)| question.refused(BrokerError::Unavailable)));
    }

    /// The server answers one of a node's questions, or refuses to. Returns whether there was any.
    pub fn answer_next(&mut self, link: usize, which: usize, refusal: Option<BrokerError>) -> bool {
        let Link { asked, answers, .. } = &mut self.links[link];
        if asked.is_empty() {
            return false;
        }
        let (room, question) = asked.remove(which % asked.len());
        answers.push(match (question, refusal) {
            (question, Some(error)) => question.refused(error),
            (Question::Open(sender), None) => Answer::Open(sender, Ok(self.server.open(&room))),
            (Question::Read(from, limit, sender), None) => {
                Answer::Read(sender, Ok(self.server.read(&room, from, limit)))
            }
        });
        true
    }

    /// One of the answers reaches the node. Returns whether there was any.
    pub fn pass_answer(&mut self, link: usize, which: usize) -> bool {
        let answers = &mut self.links[link].answers;
        if answers.is_empty() {
            return false;
        }
        let which = which % answers.len();
        answers.remove(which).send();
        true
    }

    /// Whether nothing is under way on these connections.
    pub fn is_quiet_for(&self, mut links: impl Iterator<Item = usize>) -> bool {
        links.all(|link| {
            let link = &self.links[link];
            link.is_up
                && link.arriving.is_empty()
                && link.publishing.is_empty()
                && link.asked.is_empty()
                && link.answers.is_empty()
                && link.rooms.values().all(|room| room.is_confirmed)
        })
    }

    /// The node is gone.
    pub fn remove(&mut self, link: usize) {
        self.interrupt(link, 0);
        let link = &mut self.links[link];
        link.rooms.clear();
        link.asked.clear();
        link.answers.clear();
        link.is_up = true;
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
        Ok((publication, place)) => sink.publication(publication, place),
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
            asked: Vec::new(),
            answers: Vec::new(),
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

    /// Asks the server.
    fn ask<T: Send + 'static>(
        &self,
        room: &RoomName,
        question: impl FnOnce(oneshot::Sender<Result<T, BrokerError>>) -> Question,
    ) -> BoxFuture<'static, Result<T, BrokerError>> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.bus).links[self.link].asked.push((room.clone(), question(sender)));
        Box::pin(async move { receiver.await.unwrap_or(Err(BrokerError::Closed)) })
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

    fn open(&self, room: &RoomName, _: Retention) -> Positioning {
        self.ask(room, Question::Open)
    }

    fn read(&self, room: &RoomName, from: ReadFrom, limit: usize) -> Reading {
        self.ask(room, |sender| Question::Read(from, limit, sender))
    }

    fn status(&self) -> watch::Receiver<BrokerStatus> {
        self.status.subscribe()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

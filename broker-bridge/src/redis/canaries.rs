//! Proof that what this node publishes reaches this node.
//!
//! A connection can be open and answer, and still be of no use: its server has been failed over and forgotten, or
//! publications go to one server and subscriptions to another. So each publisher's connection regularly sends a small
//! message, its *canary*, to a topic of this node, and each subscriber's connection subscribes to that topic. This
//! module is what both ends know about each other.
//!
//! Canaries are numbered. The first command on a publisher's connection is a canary, and the next canary is sent only
//! after the previous one was answered. A connection leads to one server for as long as it lives. So a publisher's
//! connection and a subscriber's connection are *proven* to lead to the same server once the subscriber has received
//! any canary that was sent on that publisher's connection.
//!
//! # Rules
//!
//! 1. **A subscriber proves its connection before it subscribes to rooms.** A new connection first subscribes to the
//!    canaries' topic and asks every publisher for a canary. It subscribes to rooms, and tells their gaps, only when each
//!    publisher's connection is proven, has ended, or cannot be proven because the server refuses its canaries.
//! 2. **A publisher holds its publications while a connection is unproven**, for each subscriber that listens, and when
//!    it is asked to reconnect. They wait in the queue, where nothing has happened to them yet.
//! 3. **A missed canary renews both ends.** A subscriber has missed a canary that was sent after the topic was subscribed
//!    and acknowledged, if a later one of the same publisher has come, or if a command that was sent after the
//!    acknowledgement has been answered and the time limit is over. (Redis answers a connection in order: on the same
//!    server the canary would have come first, however long the backlog is.) Canaries of connections that had ended when
//!    the rooms were subscribed do not count: the gap covers what these connections carried. Publishers that this
//!    subscriber has not heard at all are renewed with the one it has missed.
//!
//! # Why a gap covers everything that was lost
//!
//! Take a publication of this node that a server acknowledged and that does not reach a room's subscriber. Let *c* be
//! the publisher's connection that carried it, and *s* the subscriber's connection on which the room is subscribed next,
//! which is when the gap is told.
//!
//! - *c* had ended before the room was subscribed on *s*: whatever it was acknowledged happened before the gap.
//! - *c* and *s* were proven: both lead to one server. That server executed the publication either before the room's
//!   `SUBSCRIBE`, so before the gap, or after it, and then it is delivered.
//! - *c* was opened after *s* had subscribed its rooms. If it leads to another server, its first canary, which precedes
//!   every publication on it, is acknowledged and missed. Rule 3 ends *s* and *c*, and the next *s* tells another gap,
//!   by rule 1 after *c* has ended. Nothing newer of that publisher comes before: its next connection starts with a
//!   canary, too, and when that arrives the missed one is detected first.
//! - The server refuses canaries on *c*: nothing can be proven, and the broker is reported as interrupted.
//!
//! Both waits end. A publisher's connection that does not answer a canary in time is given up, and one whose canary is
//! acknowledged is proven or missed within the time limit. A publisher that cannot connect carries nothing, so nobody
//! waits for it. If no proof ever succeeds, no room is subscribed and nothing is published: to members this is an outage
//! like any other, and one gap ends it. Rule 2 is not needed for the proof. It keeps publications from being lost at
//! all, and it keeps one node from publishing to a server that the others have left: their sessions may have been told
//! their gaps already. So a hold ends with a fact, and not with a time: the subscriber has heard a canary, the
//! publisher has reconnected, the subscriber's connection has ended, or the server refuses canaries. That is why a pending request to reconnect holds, too: the subscriber that has asked for it
//! is gone at once, and nobody is left to wait for. Only a subscriber that serves rooms may have a long backlog before the
//! canary, which must not stop the publishers: for its sake a publisher waits a limited time ([`Canaries::holds`]).
//!
//! What other nodes publish is theirs to prove: this module knows nothing about a node that is at another server with
//! all its connections.
//!
//! # Demotions
//!
//! Each connection asks for its server's role by itself. What one of them finds out concerns all, whether the server
//! is still a replica when the others ask or not: [`Canaries::demoted`] renews all of them. A publisher may be
//! acknowledged by the replica until it has left. It has left, or is proven anew, before a gap is told: rule 1.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{Notify, futures::Notified, watch};

use super::clock::Clock;

/// The state that publishers and subscribers share.
#[derive(Debug)]
pub(super) struct Canaries {
    topic: Arc<[u8]>,
    clock: Arc<Clock>,
    publishers: Box<[PublisherState]>,
    /// Counts detected demotions.
    demotions: watch::Sender<u64>,
    /// Changes when a subscriber has one publisher less to wait for, other than by hearing its canary.
    released: watch::Sender<()>,
}

/// The state of one publisher.
#[derive(Debug, Default)]
struct PublisherState {
    state: Mutex<State>,
    /// Wakes the publisher.
    asked: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Counts the publisher's connections.
    connection: u64,
    /// How the last one is.
    link: Link,
    /// The number of the last canary before it.
    sent_before: u64,
    /// Whether a canary of this connection has arrived, by subscriber.
    proofs: Box<[Proof]>,
    /// Which subscribers' connections serve rooms, so that a backlog may delay the canary.
    serving: Box<[bool]>,
    /// Since when one of them is unproven.
    unproven_since: Option<Duration>,
    /// The number of the last canary, and when it was sent.
    sent: u64,
    sent_at: Duration,
    sent_instant: Option<Instant>,
    /// The last two canaries that were acknowledged, the newer one first.
    accepted: [Option<Accepted>; 2],
    beat: bool,
    renew: Option<u64>,
    demoted: bool,
}

/// How a publisher's connection is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Link {
    /// There is none.
    #[default]
    Down,
    Up,
    /// It stands, and its server refuses canaries.
    Refused,
}

/// Whether a publisher's and a subscriber's connection lead to the same server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Proof {
    /// The subscriber does not listen to canaries.
    NotListening,
    /// It listens, and has not heard any of this connection.
    Unproven,
    Proven,
}

impl PublisherState {
    /// Asks for a connection that is newer than this one.
    fn renew(&self, connection: u64) {
        // Of two subscribers that ask at once, the one that has missed the newer connection's canary counts.
        let mut state = self.state.lock();
        state.renew = state.renew.max(Some(connection));
        drop(state);
        self.asked.notify_one();
    }
}

impl State {
    /// The first connection that may still carry publications: the current one, or the next one.
    fn first_open(&self) -> u64 {
        self.connection + u64::from(self.link == Link::Down)
    }

    /// Sets one subscriber's proof; returns whether that was the last one that held back publications.
    fn set_proof(&mut self, subscriber: usize, proof: Proof, now: Duration) -> bool {
        if let Some(place) = self.proofs.get_mut(subscriber) {
            *place = proof;
        }
        self.judge(now)
    }

    fn set_serving(&mut self, subscriber: usize, serving: bool) {
        if let Some(place) = self.serving.get_mut(subscriber) {
            *place = serving;
        }
    }

    /// Whether the connection is about to be replaced.
    fn is_leaving(&self) -> bool {
        self.demoted || self.renew == Some(self.connection)
    }

    /// Whether a subscriber is unproven that serves no rooms yet.
    fn is_awaited(&self) -> bool {
        self.proofs.iter().zip(&self.serving).any(|(proof, serving)| *proof == Proof::Unproven && !serving)
    }

    fn judge(&mut self, now: Duration) -> bool {
        if self.proofs.contains(&Proof::Unproven) {
            self.unproven_since.get_or_insert(now);
            return false;
        }
        self.unproven_since.take().is_some()
    }
}

/// A canary that the broker has acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Accepted {
    number: u64,
    connection: u64,
    sent_at: Duration,
    at: Duration,
}

/// What a publisher is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Send a canary now.
    Beat,
    /// Reconnect, because the canaries of this connection do not arrive.
    Renew,
    /// Reconnect, because the server has become a replica.
    Leave,
}

impl Canaries {
    pub(super) fn new(topic: Arc<[u8]>, publishers: usize, subscribers: usize, clock: Arc<Clock>) -> Self {
        let publisher = || {
            let proofs = vec![Proof::NotListening; subscribers].into();
            let serving = vec![false; subscribers].into();
            let state = Mutex::new(State { proofs, serving, ..State::default() });
            PublisherState { state, asked: Notify::new() }
        };
        let publishers = (0..publishers).map(|_| publisher()).collect();
        Self { topic, clock, publishers, demotions: watch::Sender::new(0), released: watch::Sender::new(()) }
    }

    /// The topic of the canaries.
    pub(super) fn topic(&self) -> &Arc<[u8]> {
        &self.topic
    }

    /// Publisher `index` has a new connection.
    pub(super) fn connected(&self, index: usize) {
        let now = self.clock.now();
        let mut state = self.publisher(index).state.lock();
        state.connection += 1;
        state.link = Link::Up;
        state.sent_before = state.sent;
        state.renew = None;
        state.demoted = false;
        for proof in state.proofs.iter_mut().filter(|proof| **proof == Proof::Proven) {
            *proof = Proof::Unproven;
        }
        state.unproven_since = None;
        state.judge(now);
    }

    /// The connection of publisher `index` has ended, and so has every publication on it.
    pub(super) fn disconnected(&self, index: usize) {
        self.publisher(index).state.lock().link = Link::Down;
        self.released.send_replace(());
    }

    /// The broker has refused a canary of publisher `index`.
    pub(super) fn refused(&self, index: usize) {
        let mut state = self.publisher(index).state.lock();
        if state.link == Link::Up {
            state.link = Link::Refused;
        }
        drop(state);
        self.released.send_replace(());
    }

    /// Whether publisher `index` holds its publications: it is asked to reconnect, or its connection is unproven for a
    /// subscriber and there is a proof to be had. For subscribers that serve rooms it waits no longer than `patience`.
    pub(super) fn holds(&self, index: usize, patience: Duration) -> bool {
        let state = self.publisher(index).state.lock();
        if state.is_leaving() {
            return true;
        }
        match state.unproven_since.filter(|_| state.link != Link::Refused) {
            Some(since) => state.is_awaited() || self.clock.now() < since + patience,
            None => false,
        }
    }

    /// Changes when a publisher need not be waited for any more ([`Listener::prove`]).
    pub(super) fn released(&self) -> watch::Receiver<()> {
        self.released.subscribe()
    }

    /// How many demotions have been detected. Every connection that exists when this grows must be closed.
    pub(super) fn demotions(&self) -> watch::Receiver<u64> {
        self.demotions.subscribe()
    }

    /// A connection has detected that its server is a replica. `known` is the number of demotions when it began: if
    /// another one was reported since, this is the same one.
    pub(super) fn demoted(&self, known: u64) {
        let first = self.demotions.send_if_modified(|demotions| {
            let first = *demotions == known;
            *demotions += u64::from(first);
            first
        });
        if !first {
            return;
        }
        for publisher in &self.publishers {
            publisher.state.lock().demoted = true;
            publisher.asked.notify_one();
        }
    }

    /// Publisher `index` sends a canary; returns its payload.
    pub(super) fn send(&self, index: usize) -> String {
        let mut state = self.publisher(index).state.lock();
        state.sent += 1;
        // Under the lock: a subscriber that asks for a canary after this gets the next one.
        state.sent_at = self.clock.now();
        state.sent_instant = Some(Instant::now());
        state.beat = false;
        format!("{index}:{}", state.sent)
    }

    /// The broker has acknowledged the last canary of publisher `index`.
    pub(super) fn accepted(&self, index: usize) {
        let at = self.clock.now();
        let mut state = self.publisher(index).state.lock();
        if state.link == Link::Refused {
            state.link = Link::Up;
        }
        let accepted =
            Accepted { number: state.sent, connection: state.connection, sent_at: state.sent_at, at };
        state.accepted = [Some(accepted), state.accepted[0]];
    }

    /// Resolves when publisher `index` should look at [`take_asked`](Self::take_asked) and its proofs again.
    pub(super) fn notified(&self, index: usize) -> Notified<'_> {
        self.publisher(index).asked.notified()
    }

    /// What publisher `index` is asked to do.
    pub(super) fn take_asked(&self, index: usize) -> Option<Asked> {
        let mut state = self.publisher(index).state.lock();
        if std::mem::take(&mut state.demoted) {
            return Some(Asked::Leave);
        }
        if state.renew.take().is_some_and(|connection| connection == state.connection) {
            return Some(Asked::Renew);
        }
        std::mem::take(&mut state.beat).then_some(Asked::Beat)
    }

    fn publisher(&self, index: usize) -> &PublisherState {
        self.publishers.get(index).expect("a publisher knows its number")
    }
}

/// The canaries of one subscriber's connection.
#[derive(Debug)]
pub(super) struct Listener {
    canaries: Arc<Canaries>,
    /// Which of the subscribers.
    subscriber: usize,
    time_limit: Duration,
    /// Rooms may be subscribed on this connection, and messages be lost on it.
    proven: bool,
    /// When the topic was subscribed.
    since: Option<Duration>,
    /// The first connection whose publications are not covered by the gaps told here, by publisher. What an earlier
    /// connection carried was acknowledged before the rooms were subscribed.
    first_open: Box<[u64]>,
    /// The last canary received, by publisher.
    heard: Box<[u64]>,
    /// The oldest acknowledged canary that has not arrived, by publisher.
    owed: Box<[Option<Accepted>]>,
}

/// A canary was acknowledged and did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message that was acknowledged did not arrive")]
pub(super) struct Missed;

impl Listener {
    pub(super) fn new(canaries: Arc<Canaries>, subscriber: usize, time_limit: Duration) -> Self {
        let publishers = canaries.publishers.len();
        Self {
            canaries,
            subscriber,
            time_limit,
            proven: false,
            since: None,
            first_open: vec![0; publishers].into(),
            heard: vec![0; publishers].into(),
            owed: vec![None; publishers].into(),
        }
    }

    /// The topic is subscribed; every publisher is asked for a canary.
    pub(super) fn subscribed(&mut self) {
        let now = self.canaries.clock.now();
        self.since = Some(now);
        for publisher in &self.canaries.publishers {
            let mut state = publisher.state.lock();
            state.set_proof(self.subscriber, Proof::Unproven, now);
            state.set_serving(self.subscriber, self.proven);
            state.beat = true;
            publisher.asked.notify_one();
        }
    }

    /// The topic is not subscribed any more.
    pub(super) fn unsubscribed(&mut self) {
        self.since = None;
        self.owed.fill(None);
        self.leave();
    }

    /// No publisher waits for this subscriber any more.
    fn leave(&self) {
        let now = self.canaries.clock.now();
        for publisher in &self.canaries.publishers {
            if publisher.state.lock().set_proof(self.subscriber, Proof::NotListening, now) {
                publisher.asked.notify_one();
            }
        }
    }

    /// Whether the connection has just been proven: every publisher's connection meets it, has ended, or has its
    /// canaries refused. True once; connections that publishers open later are judged by [`look`](Self::look) and
    /// [`heard`](Self::heard).
    pub(super) fn prove(&mut self) -> bool {
        if self.proven || self.since.is_none() {
            return false;
        }
        self.proven =
            self.canaries.publishers.iter().zip(&mut self.first_open).all(|(publisher, first_open)| {
                let state = publisher.state.lock();
                *first_open = state.first_open();
                state.link == Link::Down
                    || (state.link == Link::Refused)
                    || state.proofs.get(self.subscriber) == Some(&Proof::Proven)
            });
        if self.proven {
            for publisher in &self.canaries.publishers {
                publisher.state.lock().set_serving(self.subscriber, true);
            }
        }
        self.proven
    }

    /// A message to the topic. Returns its latency, if it is the last canary of a publisher.
    pub(super) fn heard(&mut self, payload: &[u8]) -> Result<Option<Duration>, Missed> {
        let Some((index, number)) = read(payload) else { return Ok(None) };
        let Some(heard) = self.heard.get_mut(index).filter(|heard| **heard < number) else { return Ok(None) };
        let before = std::mem::replace(heard, number);
        let owed = self.owed.get_mut(index).and_then(Option::take);
        let now = self.canaries.clock.now();
        let (after, missed) = {
            let publisher = self.canaries.publisher(index);
            let mut state = publisher.state.lock();
            if number > state.sent_before
                && self.since.is_some()
                && state.set_proof(self.subscriber, Proof::Proven, now)
            {
                publisher.asked.notify_one();
            }
            let after = state.sent_instant.filter(|_| state.sent == number).map(|sent| sent.elapsed());
            // The one that is owed first: more than two may have been acknowledged since, on other connections.
            let mut accepted = owed.into_iter().chain(state.accepted.iter().flatten().copied());
            (after, accepted.find(|accepted| (before + 1..number).contains(&accepted.number)))
        };
        // A connection without rooms has lost nothing yet.
        match missed.filter(|accepted| self.proven && self.expects(index, accepted)) {
            Some(missed) => Err(self.missed(index, missed)),
            None => Ok(after),
        }
    }

    /// Checks whether a canary has been missed. `answered` is when the last answered command was sent. The caller has
    /// read the socket. Returns when to check again, if a canary has not arrived yet.
    pub(super) fn look(&mut self, answered: Option<Duration>) -> Result<Option<Duration>, Missed> {
        let now = self.canaries.clock.now();
        let mut next: Option<Duration> = None;
        for index in 0..self.heard.len() {
            let latest = {
                let state = self.canaries.publisher(index).state.lock();
                if let (false, Some(first_open)) = (self.proven, self.first_open.get_mut(index)) {
                    *first_open = state.first_open();
                }
                state.accepted[0]
            };
            let heard = self.heard.get(index).copied().unwrap_or_default();
            let latest = latest.filter(|latest| latest.number > heard && self.expects(index, latest));
            let still_owed = self.owed.get(index).copied().flatten().filter(|owed| self.expects(index, owed));
            let Some(owed) = self.owed.get_mut(index) else { continue };
            *owed = still_owed.or(latest);
            let Some(owed) = *owed else { continue };
            let due = owed.at + self.time_limit;
            if now >= due && answered.is_some_and(|sent_at| sent_at > owed.at) {
                return Err(self.all_missed(answered));
            }
            next = Some(next.map_or(due, |next| next.min(due)));
        }
        Ok(next)
    }

    /// Renews every publisher whose canary should have come before the answer, and not only the one whose time limit
    /// is over: otherwise they would be detected one after the other.
    fn all_missed(&self, answered: Option<Duration>) -> Missed {
        for (index, owed) in self.owed.iter().enumerate() {
            if let Some(owed) = owed.filter(|owed| answered.is_some_and(|sent_at| sent_at > owed.at)) {
                self.missed(index, owed);
            }
        }
        Missed
    }

    fn expects(&self, index: usize, accepted: &Accepted) -> bool {
        self.since.is_some_and(|since| accepted.sent_at >= since)
            && self.first_open.get(index).is_some_and(|first_open| accepted.connection >= *first_open)
    }

    /// Asks the publisher to reconnect, unless it has done so since, and so all publishers that have not been heard.
    /// They may be at the same other server, and nobody holds them back when this connection has ended.
    fn missed(&self, index: usize, missed: Accepted) -> Missed {
        self.canaries.publisher(index).renew(missed.connection);
        for publisher in &self.canaries.publishers {
            let state = publisher.state.lock();
            let (link, connection) = (state.link, state.connection);
            let unproven = state.proofs.get(self.subscriber) == Some(&Proof::Unproven);
            drop(state);
            if unproven && link == Link::Up {
                publisher.renew(connection);
            }
        }
        Missed
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.leave();
    }
}

fn read(payload: &[u8]) -> Option<(usize, u64)> {
    let (index, number) = std::str::from_utf8(payload).ok()?.split_once(':')?;
    Some((index.parse().ok()?, number.parse().ok()?))
}

#[cfg(test)]
mod tests;

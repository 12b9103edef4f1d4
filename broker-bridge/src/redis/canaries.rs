//! Proof that what this node publishes reaches this node.
//!
//! A connection can be open and answer, and still be of no use: its server has been failed over and forgotten, or
//! publications go to one server and subscriptions to another. So each publisher's connection regularly sends a small
//! message, its *canary*, to a topic of this node, and each subscriber's connection subscribes to that topic. This
//! module is what both ends know about each other.
//!
//! Canaries are numbered. The first command on a publisher's connection is a canary, and the next canary is sent only
//! after the previous one was answered. A connection leads to one server for as long as it lives. So a publisher's
//! connection and a subscriber's connection are *proven* to meet once the subscriber has received any canary that was
//! sent on that publisher's connection.
//!
//! # Rules
//!
//! 1. **A subscriber proves its connection before it subscribes to rooms.** A new connection first subscribes to the
//!    canaries' topic and asks every publisher for a canary. It subscribes to rooms, and tells their gaps, only when each
//!    publisher's connection is proven, has ended, or cannot be proven because the server refuses its canaries.
//! 2. **A publisher holds its publications while a connection is unproven**, for each subscriber that listens. They wait in
//!    the queue, where nothing has happened to them yet.
//! 3. **A missed canary renews both ends.** A subscriber has missed a canary that was sent after the topic was subscribed
//!    and acknowledged, if a later one of the same publisher has come, or if a command that was sent after the
//!    acknowledgement has been answered and the time limit is over. (Redis answers a connection in order: on the same
//!    server the canary would have come first, however long the backlog is.)
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
//!   canary, too, and when that arrives the missed one is noticed first.
//! - The server refuses canaries on *c*: nothing can be proven, and the broker is reported as interrupted.
//!
//! Both waits end. A publisher's connection that does not answer a canary in time is given up, and one whose canary is
//! acknowledged is proven or missed within the time limit. A publisher that cannot connect carries nothing, so nobody
//! waits for it. If both ends never meet, no room is subscribed and nothing is published: to members this is an outage
//! like any other, and one gap ends it. Rule 2 is not needed for the proof. It keeps publications from being lost at
//! all, and it keeps one node from publishing to a server that the others have left. It gives up after a while
//! ([`Canaries::unproven_since`]), so that a subscriber with a long backlog does not stop the publishers.
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

/// What both ends know.
#[derive(Debug)]
pub(super) struct Canaries {
    topic: Arc<[u8]>,
    clock: Arc<Clock>,
    publishers: Box<[Trail]>,
    /// Counts the demotions that have been found out.
    demotions: watch::Sender<u64>,
    /// Changes when a subscriber has one publisher less to wait for, other than by hearing its canary.
    fewer: watch::Sender<()>,
}

/// What one publisher has sent.
#[derive(Debug, Default)]
struct Trail {
    state: Mutex<State>,
    /// Wakes the publisher: something is asked of it.
    asked: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Counts the publisher's connections.
    connection: u64,
    /// Whether the last one stands.
    connected: bool,
    /// The number of the last canary before it.
    before: u64,
    /// The server refuses its canaries.
    refused: bool,
    /// By subscriber: whether its connection and this one meet.
    meetings: Box<[Meeting]>,
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

/// Whether a publisher's and a subscriber's connection lead to one server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meeting {
    /// The subscriber does not listen to canaries.
    Deaf,
    /// It listens, and has not heard any of this connection.
    Unproven,
    Proven,
}

impl State {
    /// Sets one meeting, and whether any is unproven; whether that allows the publisher to go on.
    fn meet(&mut self, subscriber: usize, meeting: Meeting, now: Duration) -> bool {
        if let Some(place) = self.meetings.get_mut(subscriber) {
            *place = meeting;
        }
        self.judge(now)
    }

    fn judge(&mut self, now: Duration) -> bool {
        if self.meetings.contains(&Meeting::Unproven) {
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

/// What a publisher is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// A canary now.
    Beat,
    /// A new connection, since this one's canaries do not arrive.
    Renew,
    /// A new connection, since the server has become a replica.
    Leave,
}

impl Canaries {
    pub(super) fn new(topic: Arc<[u8]>, publishers: usize, subscribers: usize, clock: Arc<Clock>) -> Self {
        let trail = || {
            let meetings = vec![Meeting::Deaf; subscribers].into();
            Trail { state: Mutex::new(State { meetings, ..State::default() }), asked: Notify::new() }
        };
        let publishers = (0..publishers).map(|_| trail()).collect();
        Self { topic, clock, publishers, demotions: watch::Sender::new(0), fewer: watch::Sender::new(()) }
    }

    /// Where canaries are sent.
    pub(super) fn topic(&self) -> &Arc<[u8]> {
        &self.topic
    }

    /// Publisher `index` has a new connection.
    pub(super) fn connected(&self, index: usize) {
        let now = self.clock.now();
        let mut state = self.trail(index).state.lock();
        state.connection += 1;
        state.connected = true;
        state.before = state.sent;
        state.refused = false;
        state.renew = None;
        state.demoted = false;
        for meeting in state.meetings.iter_mut().filter(|meeting| **meeting == Meeting::Proven) {
            *meeting = Meeting::Unproven;
        }
        state.unproven_since = None;
        state.judge(now);
    }

    /// The connection of publisher `index` has ended, and so has every publication on it.
    pub(super) fn disconnected(&self, index: usize) {
        self.trail(index).state.lock().connected = false;
        self.fewer.send_replace(());
    }

    /// The broker has refused a canary of publisher `index`.
    pub(super) fn refused(&self, index: usize) {
        self.trail(index).state.lock().refused = true;
        self.fewer.send_replace(());
    }

    /// Since when the connection of publisher `index` leaves a subscriber's unproven; `None` if there is no such
    /// subscriber, or no proof to be had. A publisher holds its publications meanwhile, within reason.
    pub(super) fn unproven_since(&self, index: usize) -> Option<Duration> {
        let state = self.trail(index).state.lock();
        state.unproven_since.filter(|_| !state.refused)
    }

    /// Changes when a publisher need not be waited for any more ([`Listener::prove`]).
    pub(super) fn fewer(&self) -> watch::Receiver<()> {
        self.fewer.subscribe()
    }

    /// How many demotions have been found out. A connection that stands while this grows is to be given up.
    pub(super) fn demotions(&self) -> watch::Receiver<u64> {
        self.demotions.subscribe()
    }

    /// A connection has found out that its server is a replica. `known` is how many demotions there were when it
    /// began: if there has been another one since, this is the same.
    pub(super) fn demoted(&self, known: u64) {
        let first = self.demotions.send_if_modified(|demotions| {
            let first = *demotions == known;
            *demotions += u64::from(first);
            first
        });
        if !first {
            return;
        }
        for trail in &self.publishers {
            trail.state.lock().demoted = true;
            trail.asked.notify_one();
        }
    }

    /// Publisher `index` sends a canary: what it says.
    pub(super) fn send(&self, index: usize) -> String {
        let mut state = self.trail(index).state.lock();
        state.sent += 1;
        // Under the lock: a subscription that has asked for a canary since then gets it with the next one.
        state.sent_at = self.clock.now();
        state.sent_instant = Some(Instant::now());
        state.beat = false;
        format!("{index}:{}", state.sent)
    }

    /// The broker has acknowledged the last canary of publisher `index`.
    pub(super) fn accepted(&self, index: usize) {
        let at = self.clock.now();
        let mut state = self.trail(index).state.lock();
        let accepted =
            Accepted { number: state.sent, connection: state.connection, sent_at: state.sent_at, at };
        state.accepted = [Some(accepted), state.accepted[0]];
        state.refused = false;
    }

    /// Resolves when something is asked of publisher `index`.
    pub(super) fn notified(&self, index: usize) -> Notified<'_> {
        self.trail(index).asked.notified()
    }

    /// What is asked of publisher `index`.
    pub(super) fn take_asked(&self, index: usize) -> Option<Asked> {
        let mut state = self.trail(index).state.lock();
        if std::mem::take(&mut state.demoted) {
            return Some(Asked::Leave);
        }
        if state.renew.take().is_some_and(|connection| connection == state.connection) {
            return Some(Asked::Renew);
        }
        std::mem::take(&mut state.beat).then_some(Asked::Beat)
    }

    fn trail(&self, index: usize) -> &Trail {
        self.publishers.get(index).expect("a publisher knows its number")
    }
}

/// What one subscriber's connection has heard.
#[derive(Debug)]
pub(super) struct Listener {
    canaries: Arc<Canaries>,
    /// Which of the subscribers.
    subscriber: usize,
    time_limit: Duration,
    /// Rooms may be subscribed on this connection, and messages be lost on it.
    proven: bool,
    /// Since when the topic is subscribed.
    since: Option<Duration>,
    /// By publisher.
    heard: Box<[u64]>,
    /// By publisher: the oldest canary that is owed.
    owed: Box<[Option<Accepted>]>,
}

/// A canary was acknowledged and did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message that was acknowledged did not arrive")]
pub(super) struct Missed;

impl Listener {
    pub(super) fn new(canaries: Arc<Canaries>, subscriber: usize, time_limit: Duration) -> Self {
        let publishers = canaries.publishers.len();
        let (heard, owed) = (vec![0; publishers].into(), vec![None; publishers].into());
        Self { canaries, subscriber, time_limit, proven: false, since: None, heard, owed }
    }

    /// The topic is subscribed; every publisher is asked for a canary.
    pub(super) fn subscribed(&mut self) {
        let now = self.canaries.clock.now();
        self.since = Some(now);
        for trail in &self.canaries.publishers {
            let mut state = trail.state.lock();
            state.meet(self.subscriber, Meeting::Unproven, now);
            state.beat = true;
            trail.asked.notify_one();
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
        for trail in &self.canaries.publishers {
            if trail.state.lock().meet(self.subscriber, Meeting::Deaf, now) {
                trail.asked.notify_one();
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
        self.proven = self.canaries.publishers.iter().all(|trail| {
            let state = trail.state.lock();
            !state.connected || state.refused || state.meetings.get(self.subscriber) == Some(&Meeting::Proven)
        });
        self.proven
    }

    /// A message to the topic. How long it took, if it is the last canary of a publisher.
    pub(super) fn heard(&mut self, payload: &[u8]) -> Result<Option<Duration>, Missed> {
        let Some((index, number)) = read(payload) else { return Ok(None) };
        let Some(heard) = self.heard.get_mut(index).filter(|heard| **heard < number) else { return Ok(None) };
        let before = std::mem::replace(heard, number);
        if let Some(owed) = self.owed.get_mut(index) {
            *owed = None;
        }
        let now = self.canaries.clock.now();
        let (after, missed) = {
            let trail = self.canaries.trail(index);
            let mut state = trail.state.lock();
            if number > state.before
                && self.since.is_some()
                && state.meet(self.subscriber, Meeting::Proven, now)
            {
                trail.asked.notify_one();
            }
            let after = state.sent_instant.filter(|_| state.sent == number).map(|sent| sent.elapsed());
            let mut accepted = state.accepted.iter().flatten();
            (after, accepted.find(|accepted| (before + 1..number).contains(&accepted.number)).copied())
        };
        // A connection without rooms has lost nothing yet.
        match missed.filter(|accepted| self.proven && self.expects(accepted)) {
            Some(missed) => Err(self.missed(index, missed)),
            None => Ok(after),
        }
    }

    /// Looks: has a canary been missed? `answered` is when the last command was sent that has been answered. What
    /// has arrived has been read. When to look again, if one is owed.
    pub(super) fn look(&mut self, answered: Option<Duration>) -> Result<Option<Duration>, Missed> {
        let now = self.canaries.clock.now();
        let mut next: Option<Duration> = None;
        for index in 0..self.heard.len() {
            let latest = self.canaries.trail(index).state.lock().accepted[0];
            let heard = self.heard.get(index).copied().unwrap_or_default();
            let latest = latest.filter(|latest| latest.number > heard && self.expects(latest));
            let Some(owed) = self.owed.get_mut(index) else { continue };
            *owed = owed.or(latest);
            let Some(owed) = *owed else { continue };
            let due = owed.at + self.time_limit;
            if now >= due && answered.is_some_and(|sent_at| sent_at > owed.at) {
                return Err(self.all_missed(answered));
            }
            next = Some(next.map_or(due, |next| next.min(due)));
        }
        Ok(next)
    }

    /// Every publisher whose canary had to come before the answer is in the same position as the one whose time is
    /// over, and is not to be found out one after the other.
    fn all_missed(&self, answered: Option<Duration>) -> Missed {
        for (index, owed) in self.owed.iter().enumerate() {
            if let Some(owed) = owed.filter(|owed| answered.is_some_and(|sent_at| sent_at > owed.at)) {
                self.missed(index, owed);
            }
        }
        Missed
    }

    fn expects(&self, accepted: &Accepted) -> bool {
        self.since.is_some_and(|since| accepted.sent_at >= since)
    }

    /// The other end is to be made anew, unless that has happened.
    fn missed(&self, index: usize, missed: Accepted) -> Missed {
        let trail = self.canaries.trail(index);
        trail.state.lock().renew = Some(missed.connection);
        trail.asked.notify_one();
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
mod tests {
    use futures_util::FutureExt as _;
    use tokio::time::{advance, sleep_until};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(3);

    struct World {
        canaries: Arc<Canaries>,
        clock: Arc<Clock>,
        listener: Listener,
    }

    impl World {
        /// Two connected publishers and a listener whose topic is subscribed.
        fn new() -> Self {
            let clock = Arc::new(Clock::new());
            let canaries = Arc::new(Canaries::new(b"topic"[..].into(), 2, 2, Arc::clone(&clock)));
            canaries.connected(0);
            canaries.connected(1);
            let mut listener = Listener::new(Arc::clone(&canaries), 0, LIMIT);
            listener.subscribed();
            Self { canaries, clock, listener }
        }

        /// Publisher `index` sends a canary, which is acknowledged.
        fn accept(&self, index: usize) -> Vec<u8> {
            let canary = self.canaries.send(index);
            self.canaries.accepted(index);
            canary.into_bytes()
        }

        /// The subscriber's connection is lost, and another one subscribes to the topic.
        fn reconnect(&mut self) {
            self.listener = Listener::new(Arc::clone(&self.canaries), 0, LIMIT);
            self.listener.subscribed();
        }

        /// Publisher `index` sends a canary, which arrives.
        fn meet(&mut self, index: usize) {
            let canary = self.accept(index);
            assert!(self.listener.heard(&canary).unwrap().is_some());
        }

        /// Which publishers hold their publications.
        fn holding(&self) -> [bool; 2] {
            [0, 1].map(|index| self.canaries.unproven_since(index).is_some())
        }

        fn asked(&self, index: usize) -> Option<Asked> {
            self.canaries.notified(index).now_or_never()?;
            self.canaries.take_asked(index)
        }

        async fn pass(&self, time: Duration) {
            let due = self.clock.now() + time;
            while self.clock.now() < due {
                sleep_until(self.clock.next_look(due)).await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_arrives_is_not_missed() {
        let mut world = World::new();
        for index in [0, 1, 0] {
            let canary = world.accept(index);
            assert!(world.listener.look(None).unwrap().is_some(), "it is owed");
            assert!(world.listener.heard(&canary).unwrap().is_some());
            assert_eq!(world.listener.heard(&canary), Ok(None), "once");
            assert_eq!(world.listener.look(Some(world.clock.now())), Ok(None));
        }
        for strange in [&b""[..], b"x", b"0", b"9:1", b"0:x", b"\xff"] {
            assert_eq!(world.listener.heard(strange), Ok(None));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_acknowledged_canary_that_does_not_come_is_missed_once_the_connection_has_answered() {
        let mut world = World::new();
        assert_eq!(world.asked(0), Some(Asked::Beat), "asked when the topic was subscribed");
        assert_eq!(world.asked(0), None);
        world.accept(0);
        let before = Some(world.clock.now());
        let due = world.listener.look(before).unwrap().expect("it is owed");
        assert_eq!(due, world.clock.now() + LIMIT);
        // Later canaries do not put it off.
        for _ in 0..3 {
            world.pass(LIMIT / 3).await;
            assert!(world.listener.look(before).is_ok(), "behind a backlog it is late");
            world.accept(0);
        }
        assert_eq!(world.listener.look(Some(world.clock.now())), Err(Missed));
        assert_eq!(world.asked(0), Some(Asked::Renew));
        assert_eq!(world.asked(1), Some(Asked::Beat));
        assert_eq!(world.asked(1), None, "the other publisher has nothing to do with it");
    }

    #[tokio::test(start_paused = true)]
    async fn all_publishers_that_went_the_wrong_way_are_found_out_together() {
        let mut world = World::new();
        world.accept(0);
        assert!(world.listener.look(None).is_ok());
        world.pass(LIMIT / 2).await;
        world.accept(1);
        assert!(world.listener.look(None).is_ok());
        world.pass(LIMIT / 2).await;
        assert_eq!(world.listener.look(Some(world.clock.now())), Err(Missed));
        assert_eq!((world.asked(0), world.asked(1)), (Some(Asked::Renew), Some(Asked::Renew)));
    }

    /// The subscribers come back while one publisher still is where nobody hears it. What it is acknowledged there is
    /// before the gap only if the rooms, whose subscription tells the gap, wait for it.
    #[tokio::test(start_paused = true)]
    async fn rooms_wait_for_the_last_publisher_that_may_be_at_another_server() {
        let mut world = World::new();
        world.meet(0);
        assert!(!world.listener.prove());
        world.meet(1);
        assert!(world.listener.prove());
        assert!(!world.listener.prove(), "told once");

        // The subscriber goes to another server, where it hears nobody.
        world.reconnect();
        assert_eq!(world.holding(), [true, true]);
        world.accept(0);
        world.accept(1);
        assert!(world.listener.look(None).is_ok());
        world.pass(LIMIT).await;
        assert_eq!(world.listener.look(Some(world.clock.now())), Err(Missed));

        // It comes back. Publisher 0 follows at once, publisher 1 still waits for answers from the other server.
        world.reconnect();
        world.canaries.disconnected(0);
        world.canaries.connected(0);
        world.meet(0);
        assert_eq!(world.holding(), [false, true]);
        assert!(!world.listener.prove(), "publisher 1 can still be acknowledged elsewhere");
        let mut fewer = world.canaries.fewer();
        world.canaries.disconnected(1);
        assert!(fewer.has_changed().unwrap(), "the subscriber looks again");
        assert!(world.listener.prove(), "whatever publisher 1 was acknowledged is in the past");
        fewer.mark_unchanged();

        // Its next connection proves itself to a subscriber that serves its rooms already.
        world.canaries.connected(1);
        assert_eq!(world.holding(), [false, true]);
        world.meet(1);
        assert_eq!(world.holding(), [false, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_what_cannot_be_proven() {
        let mut world = World::new();
        world.canaries.disconnected(0);
        world.canaries.send(1);
        assert!(!world.listener.prove());
        world.canaries.refused(1);
        assert!(!world.holding()[1], "its canaries are refused");
        assert!(world.listener.prove(), "one has no connection, the other cannot prove anything");

        // A subscriber that is gone or deaf is waited for by nobody.
        world.canaries.connected(1);
        assert!(world.holding()[1]);
        world.listener.unsubscribed();
        assert!(!world.holding()[1]);
        world.listener.subscribed();
        assert!(world.holding()[1]);
        let other = Listener::new(Arc::clone(&world.canaries), 1, LIMIT);
        drop(std::mem::replace(&mut world.listener, other));
        assert!(!world.holding()[1]);
        assert_eq!(world.asked(1), Some(Asked::Beat), "and the publisher wakes up");
    }

    #[tokio::test(start_paused = true)]
    async fn a_canary_of_an_earlier_connection_proves_nothing() {
        let mut world = World::new();
        world.canaries.disconnected(1);
        let late = world.accept(0);
        world.canaries.disconnected(0);
        world.canaries.connected(0);
        assert!(world.listener.heard(&late).is_ok());
        assert!(world.holding()[0]);
        assert!(!world.listener.prove());
        world.meet(0);
        assert!(world.listener.prove());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_rooms_has_lost_nothing_when_a_canary_is_overtaken() {
        let mut world = World::new();
        world.accept(0);
        world.canaries.connected(0);
        world.meet(0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_canary_that_a_later_one_has_overtaken_is_missed_at_once() {
        let mut world = World::new();
        world.meet(0);
        world.meet(1);
        assert!(world.listener.prove());
        world.pass(Duration::from_millis(1)).await;
        world.accept(0);
        world.canaries.connected(0);
        let second = world.canaries.send(0);
        assert_eq!(
            world.listener.heard(second.as_bytes()),
            Err(Missed),
            "whether that one is acknowledged yet or not"
        );
        assert_eq!(world.asked(0), None, "the connection it was sent on is gone already");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_acknowledged_or_sent_too_early_is_owed_to_nobody() {
        let mut world = World::new();
        world.canaries.send(0);
        world.canaries.connected(0);
        let second = world.accept(0);
        assert!(world.listener.heard(&second).unwrap().is_some(), "nobody knows what became of the first");

        world.listener.unsubscribed();
        world.accept(0);
        assert_eq!(world.listener.look(Some(world.clock.now())), Ok(None));
        world.pass(Duration::from_millis(1)).await;
        world.listener.subscribed();
        let later = world.accept(0);
        assert!(world.listener.heard(&later).unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_demotion_concerns_every_connection_that_stands_and_no_later_one() {
        let world = World::new();
        let known = *world.canaries.demotions().borrow();
        world.canaries.demoted(known);
        assert_eq!((world.asked(0), world.asked(1)), (Some(Asked::Leave), Some(Asked::Leave)));
        world.canaries.connected(0);
        world.canaries.demoted(known);
        assert_eq!(*world.canaries.demotions().borrow(), known + 1, "found out twice, and the same");
        assert_eq!(world.asked(0), None);
        world.canaries.demoted(known + 1);
        assert_eq!(world.asked(0), Some(Asked::Leave));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_of_the_process_is_not_held_against_anybody() {
        let mut world = World::new();
        let canary = world.accept(0);
        assert!(world.listener.look(None).unwrap().is_some());
        advance(Duration::from_secs(3600)).await;
        assert!(world.listener.look(Some(world.clock.now())).is_ok());
        assert!(world.listener.heard(&canary).unwrap().is_some());
    }
}

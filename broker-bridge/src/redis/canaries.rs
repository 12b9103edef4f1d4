//! Whether what this node publishes reaches this node.
//!
//! A connection can be open, can even answer, and be of no use: its server has been failed over and forgotten, or
//! publications go to one server and subscriptions to another. So each publisher's connection sends a small
//! message to a topic of this node every interval, the way that publications go, and each subscriber's connection
//! is subscribed to that topic. This module is what both ends know of each other.
//!
//! # Proof
//!
//! A publisher's first command on a connection is such a message, its *canary*. Canaries are numbered, and the next
//! one is sent only when the one before has been answered. So if a publication was acknowledged, a canary before
//! it on the same connection was too; and if that canary has reached a subscriber's connection, publications take
//! the same way. A subscriber has missed a canary that was sent after its subscription stood and acknowledged, if
//!
//! - a later one of the same publisher has come, or
//! - a command that was sent after the acknowledgement has been answered, and the time limit is over. (Redis answers
//!   a connection in order: on the same server, the canary would have come first, however long the backlog is.)
//!
//! Then both ends are made anew.
//!
//! # Demotions
//!
//! Each connection asks for its server's role by itself. What one of them finds out concerns all, whether the server
//! is still a replica when the others ask or not: [`Canaries::demoted`] makes all of them anew.

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
    pub(super) fn new(topic: Arc<[u8]>, publishers: usize, clock: Arc<Clock>) -> Self {
        let publishers = (0..publishers).map(|_| Trail::default()).collect();
        Self { topic, clock, publishers, demotions: watch::Sender::new(0) }
    }

    /// Where canaries are sent.
    pub(super) fn topic(&self) -> &Arc<[u8]> {
        &self.topic
    }

    /// Publisher `index` has a new connection.
    pub(super) fn connected(&self, index: usize) {
        let mut state = self.trail(index).state.lock();
        state.connection += 1;
        state.renew = None;
        state.demoted = false;
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
    time_limit: Duration,
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
    pub(super) fn new(canaries: Arc<Canaries>, time_limit: Duration) -> Self {
        let publishers = canaries.publishers.len();
        let (heard, owed) = (vec![0; publishers].into(), vec![None; publishers].into());
        Self { canaries, time_limit, since: None, heard, owed }
    }

    /// The topic is subscribed; every publisher is asked for a canary.
    pub(super) fn subscribed(&mut self) {
        self.since = Some(self.canaries.clock.now());
        for trail in &self.canaries.publishers {
            trail.state.lock().beat = true;
            trail.asked.notify_one();
        }
    }

    /// The topic is not subscribed any more.
    pub(super) fn unsubscribed(&mut self) {
        self.since = None;
        self.owed.fill(None);
    }

    /// A message to the topic. How long it took, if it is the last canary of a publisher.
    pub(super) fn heard(&mut self, payload: &[u8]) -> Result<Option<Duration>, Missed> {
        let Some((index, number)) = read(payload) else { return Ok(None) };
        let Some(heard) = self.heard.get_mut(index).filter(|heard| **heard < number) else { return Ok(None) };
        let before = std::mem::replace(heard, number);
        if let Some(owed) = self.owed.get_mut(index) {
            *owed = None;
        }
        let (after, missed) = {
            let state = self.canaries.trail(index).state.lock();
            let after = state.sent_instant.filter(|_| state.sent == number).map(|sent| sent.elapsed());
            let mut accepted = state.accepted.iter().flatten();
            (after, accepted.find(|accepted| (before + 1..number).contains(&accepted.number)).copied())
        };
        match missed.filter(|accepted| self.expects(accepted)) {
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
            let canaries = Arc::new(Canaries::new(b"topic"[..].into(), 2, Arc::clone(&clock)));
            canaries.connected(0);
            canaries.connected(1);
            let mut listener = Listener::new(Arc::clone(&canaries), LIMIT);
            listener.subscribed();
            Self { canaries, clock, listener }
        }

        /// Publisher `index` sends a canary, which is acknowledged.
        fn accept(&self, index: usize) -> Vec<u8> {
            let canary = self.canaries.send(index);
            self.canaries.accepted(index);
            canary.into_bytes()
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

    #[tokio::test(start_paused = true)]
    async fn a_canary_that_a_later_one_has_overtaken_is_missed_at_once() {
        let mut world = World::new();
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

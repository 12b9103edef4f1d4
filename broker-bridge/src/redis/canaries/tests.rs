//! What publishers and subscribers learn from canaries, on a paused clock.

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
    fn hear_canary(&mut self, index: usize) {
        let canary = self.accept(index);
        assert!(self.listener.heard(&canary).unwrap().is_some());
    }

    /// Which publishers hold their publications.
    fn holding(&self) -> [bool; 2] {
        [0, 1].map(|index| self.canaries.holds(index, 2 * LIMIT))
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
async fn a_canary_that_arrives_is_not_missed() {
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
async fn an_acknowledged_canary_that_does_not_arrive_is_missed() {
    let mut world = World::new();
    assert_eq!(world.asked(0), Some(Asked::Beat), "asked when the topic was subscribed");
    assert_eq!(world.asked(0), None);
    assert_eq!(world.asked(1), Some(Asked::Beat));
    world.hear_canary(1);
    assert_eq!(world.asked(1), None, "it is proven, and only looks again");
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
    assert_eq!(world.asked(1), None, "the other publisher has nothing to do with it");
}

#[tokio::test(start_paused = true)]
async fn all_publishers_on_the_wrong_server_are_detected_together() {
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
async fn rooms_wait_for_publishers_that_may_be_on_another_server() {
    let mut world = World::new();
    world.hear_canary(0);
    assert!(!world.listener.prove());
    world.hear_canary(1);
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
    world.hear_canary(0);
    assert_eq!(world.holding(), [false, true]);
    world.accept(1);
    assert!(!world.listener.prove(), "publisher 1 can still be acknowledged elsewhere");
    assert!(world.listener.look(None).unwrap().is_some(), "its canary is awaited");
    let mut released = world.canaries.released();
    world.canaries.disconnected(1);
    assert!(released.has_changed().unwrap(), "the subscriber looks again");
    assert!(world.listener.prove(), "whatever publisher 1 was acknowledged is in the past");
    released.mark_unchanged();
    assert_eq!(world.listener.look(Some(world.clock.now())), Ok(None), "and so is its canary");

    // Its next connection proves itself to a subscriber that serves its rooms already, and that tells no second gap
    // for the canary that publisher 1 sent elsewhere before.
    world.canaries.connected(1);
    assert_eq!(world.holding(), [false, true]);
    world.hear_canary(1);
    assert_eq!(world.holding(), [false, false]);
}

/// Another node may have told its gaps already, so what is acknowledged at the old server now is lost to its sessions.
#[tokio::test(start_paused = true)]
async fn nothing_is_published_between_doubt_and_reconnection() {
    let mut world = World::new();
    let mut other = Listener::new(Arc::clone(&world.canaries), 1, LIMIT);
    other.subscribed();
    world.accept(0);
    assert!(world.listener.look(None).is_ok());
    assert!(other.look(None).is_ok());
    // A busy machine runs the subscribers late.
    world.pass(3 * LIMIT).await;
    assert_eq!(world.holding(), [true, true], "nobody has heard them");
    let answered = Some(world.clock.now());
    assert_eq!(world.listener.look(answered), Err(Missed));
    assert_eq!(other.look(answered), Err(Missed));
    world.listener.leave();
    drop(other);
    assert_eq!(world.holding(), [true, true], "they have yet to see that they are asked to reconnect");
    for index in [0, 1] {
        assert_eq!(world.asked(index), Some(Asked::Renew));
        world.canaries.disconnected(index);
        world.canaries.connected(index);
    }
    assert_eq!(world.holding(), [false, false], "nobody listens");
}

#[tokio::test(start_paused = true)]
async fn a_backlog_does_not_stop_the_publishers() {
    let mut world = World::new();
    world.hear_canary(0);
    world.canaries.disconnected(1);
    assert!(world.listener.prove());
    for index in [0, 1] {
        world.canaries.disconnected(index);
        world.canaries.connected(index);
    }
    world.pass((2 * LIMIT).saturating_sub(Duration::from_millis(1))).await;
    assert_eq!(world.holding(), [true, true]);
    world.pass(Duration::from_millis(1)).await;
    assert_eq!(world.holding(), [false, false]);
}

#[tokio::test(start_paused = true)]
async fn unprovable_connections_are_not_waited_for() {
    let mut world = World::new();
    world.canaries.disconnected(0);
    world.canaries.send(1);
    assert!(!world.listener.prove());
    world.canaries.refused(1);
    assert!(!world.holding()[1], "its canaries are refused");
    assert!(world.listener.prove(), "one has no connection, the other cannot prove anything");

    // A publisher does not wait for a subscriber that is gone or does not listen.
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
    world.hear_canary(0);
    assert!(world.listener.prove());
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_rooms_misses_no_overtaken_canary() {
    let mut world = World::new();
    world.accept(0);
    world.canaries.connected(0);
    world.hear_canary(0);
}

#[tokio::test(start_paused = true)]
async fn an_overtaken_canary_is_missed_at_once() {
    let mut world = World::new();
    world.hear_canary(0);
    world.hear_canary(1);
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
async fn an_outstanding_canary_is_missed_after_later_acknowledgements() {
    let mut world = World::new();
    world.hear_canary(0);
    world.hear_canary(1);
    assert!(world.listener.prove());
    world.pass(Duration::from_millis(1)).await;
    world.accept(0);
    assert!(world.listener.look(None).unwrap().is_some(), "it is owed");
    // On the next connection two are acknowledged before the first of them has been read.
    world.canaries.connected(0);
    let next = world.accept(0);
    world.accept(0);
    assert_eq!(world.listener.heard(&next), Err(Missed));
}

#[tokio::test(start_paused = true)]
async fn the_newest_missed_canary_decides() {
    let mut world = World::new();
    world.hear_canary(0);
    world.hear_canary(1);
    assert!(world.listener.prove());
    world.pass(Duration::from_millis(1)).await;
    world.accept(0);
    let older = world.canaries.publishers[0].state.lock().accepted[0].unwrap();
    world.canaries.connected(0);
    world.accept(0);
    let newer = world.canaries.publishers[0].state.lock().accepted[0].unwrap();
    let _ = world.asked(0);
    world.listener.missed(0, newer);
    world.listener.missed(0, older);
    assert_eq!(world.asked(0), Some(Asked::Renew));
}

#[tokio::test(start_paused = true)]
async fn unacknowledged_and_early_canaries_are_not_awaited() {
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
async fn a_demotion_renews_existing_connections_only() {
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
async fn a_pause_of_the_process_is_not_counted() {
    let mut world = World::new();
    let canary = world.accept(0);
    assert!(world.listener.look(None).unwrap().is_some());
    advance(Duration::from_secs(3600)).await;
    assert!(world.listener.look(Some(world.clock.now())).is_ok());
    assert!(world.listener.heard(&canary).unwrap().is_some());
}

//! The queue of events for a shard.
//!
//! Many threads post. The shard takes everything in one go, and is woken only when the inbox turns from empty
//! to non-empty.
//!
//! Bound: broadcasts may hold a fixed number of payload bytes, plus a fixed cost for each. This includes
//! broadcasts that the shard has taken but not delivered yet. A broadcast that does not fit is dropped and
//! replaced by an overflow event, because blocking the broker's reader would delay every room of the node. All
//! other events are bounded by their causes: settled publications by the sessions' publications in flight,
//! gaps and overflows by the number of rooms.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use broker_bridge::{Accepted, BrokerError, GapCause, ReceiptSink, RoomName, Ticket};
use parking_lot::Mutex;

use super::connection::ConnectionKey;
use crate::{drain::Pace, framing::Broadcast, hub::Mailbox};

/// An event for a shard to handle.
#[derive(Debug)]
pub enum ShardEvent {
    /// A publication for a room with members on this shard.
    Broadcast(Arc<Broadcast>),
    /// Publications of the room may be missing at this point. In a room with a history it has a number, otherwise 0.
    Gap(RoomName, GapCause, u64),
    /// Broadcasts from this number on have not fitted into the inbox. In a room with a history, members get them from
    /// there; in others the number is 0, and this is a gap.
    Overflow(RoomName, u64),
    /// The positions of the room have another epoch from the item with this number on.
    NewEpoch(RoomName, u64),
    /// The connection continues to catch up.
    CatchUp(ConnectionKey),
    /// The broker has accepted or refused a publication of one of this shard's sessions.
    Settled(Ticket, Result<Accepted, BrokerError>),
    /// Close all sessions at this pace, then end.
    Drain(Arc<Pace>),
    /// Drop everything and end at once.
    Stop,
}

/// The queue in front of a shard.
pub struct Inbox {
    state: Mutex<State>,
    capacity: AtomicUsize,
}

#[derive(Default)]
struct State {
    events: VecDeque<ShardEvent>,
    /// Bytes that broadcasts count against the capacity: those among the events, and those that the shard has
    /// taken and not finished.
    bytes: usize,
    /// Rooms whose last event is an overflow, of those posted since the shard last took events.
    overflowed: HashSet<RoomName>,
    waker: Option<Waker>,
}

impl Inbox {
    /// An inbox whose broadcasts may hold `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self { state: Mutex::default(), capacity: AtomicUsize::new(capacity) }
    }

    /// Changes how many bytes broadcasts may hold. Queued events stay.
    pub fn set_capacity(&self, capacity: usize) {
        self.capacity.store(capacity, Ordering::Relaxed);
    }

    /// Posts an event that is not bounded by the capacity.
    pub fn post(&self, event: ShardEvent) {
        let waker = {
            let mut state = self.state.lock();
            state.push(event)
        };
        wake(waker);
    }

    /// Takes all events, in the order in which they were posted. `into` must be empty; its allocation is
    /// reused for the next events. `done` is the cost of the broadcasts that the shard has finished since the
    /// last call.
    pub fn take(&self, into: &mut VecDeque<ShardEvent>, done: usize) {
        debug_assert!(into.is_empty());
        let mut state = self.state.lock();
        std::mem::swap(&mut state.events, into);
        debug_assert!(done <= state.bytes, "done with more than there was");
        state.bytes = state.bytes.saturating_sub(done);
        if !state.overflowed.is_empty() {
            state.overflowed = HashSet::new();
        }
    }

    /// Ready when there are events to take. Only the shard polls this.
    pub fn poll_ready(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if !state.events.is_empty() {
            return Poll::Ready(());
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            None => state.waker = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

impl Mailbox for Inbox {
    fn post_broadcast(&self, broadcast: &Arc<Broadcast>) -> bool {
        let size = broadcast.cost();
        let (fits, waker) = {
            let mut state = self.state.lock();
            if state.bytes == 0 || state.bytes + size <= self.capacity.load(Ordering::Relaxed) {
                state.bytes += size;
                if !state.overflowed.is_empty() {
                    // A smaller one may fit behind an overflow. What is dropped after it needs one of its own.
                    state.overflowed.remove(broadcast.room());
                }
                (true, state.push(ShardEvent::Broadcast(Arc::clone(broadcast))))
            } else if state.overflowed.insert(broadcast.room().clone()) {
                (false, state.push(ShardEvent::Overflow(broadcast.room().clone(), broadcast.number())))
            } else {
                (false, None)
            }
        };
        wake(waker);
        fits
    }

    fn post_new_epoch(&self, room: &RoomName, number: u64) {
        self.post(ShardEvent::NewEpoch(room.clone(), number));
    }

    fn post_gap(&self, room: &RoomName, cause: GapCause, number: u64) {
        self.post(ShardEvent::Gap(room.clone(), cause, number));
    }
}

impl State {
    /// Returns the waker if this was the first event.
    fn push(&mut self, event: ShardEvent) -> Option<Waker> {
        self.events.push_back(event);
        if self.events.len() == 1 { self.waker.take() } else { None }
    }
}

/// Wakes the shard outside the lock, because the shard takes the lock first thing.
fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl ReceiptSink for Inbox {
    fn settle(&self, ticket: Ticket, outcome: Result<Accepted, BrokerError>) {
        self.post(ShardEvent::Settled(ticket, outcome));
    }
}

#[cfg(test)]
mod tests {
    use broker_bridge::{Data, Publication};
    use futures_util::task::noop_waker;

    use super::*;

    fn broadcast(room: &str, len: usize) -> Arc<Broadcast> {
        let publication = Publication::new(Data::binary(vec![0; len]));
        Arc::new(Broadcast::new(RoomName::new(room).unwrap(), publication, 1))
    }

    fn take(inbox: &Inbox, done: usize) -> Vec<String> {
        let mut events = VecDeque::new();
        inbox.take(&mut events, done);
        let name = |event: &ShardEvent| match event {
            ShardEvent::Broadcast(broadcast) => broadcast.room().to_string(),
            ShardEvent::Overflow(room, _) => format!("{room}:overflow"),
            other => format!("{other:?}"),
        };
        events.iter().map(name).collect()
    }

    #[test]
    fn overflow_is_one_gap_per_room_in_place_and_everything_after_fits_again() {
        let cost = broadcast("a", 100).cost();
        let inbox = Inbox::new(2 * cost);
        let fits: Vec<bool> = ["a", "a", "a", "b", "a", "b"]
            .iter()
            .map(|room| inbox.post_broadcast(&broadcast(room, 100)))
            .collect();
        assert_eq!(fits, [true, true, false, false, false, false]);
        assert_eq!(take(&inbox, 0), ["a", "a", "a:overflow", "b:overflow"]);
        assert!(!inbox.post_broadcast(&broadcast("a", 100)), "what is taken is not done with");
        assert_eq!(take(&inbox, cost), ["a:overflow"]);
        assert!(inbox.post_broadcast(&broadcast("a", 100)));
        assert_eq!(take(&inbox, 2 * cost), ["a"]);
    }

    #[test]
    fn what_is_dropped_behind_a_smaller_broadcast_has_a_gap_of_its_own() {
        let (small, large) = (broadcast("a", 10), broadcast("a", 1000));
        let inbox = Inbox::new(large.cost() + 2 * small.cost());
        let posts = [&large, &large, &small, &large, &large, &small];
        assert_eq!(posts.map(|post| inbox.post_broadcast(post)), [true, false, true, false, false, true]);
        assert_eq!(take(&inbox, 0), ["a", "a:overflow", "a", "a:overflow", "a"]);
    }

    #[test]
    fn a_single_broadcast_fits_whatever_its_size() {
        let inbox = Inbox::new(10);
        assert!(inbox.post_broadcast(&broadcast("a", 1000)));
        assert!(!inbox.post_broadcast(&broadcast("a", 0)));
        assert_eq!(take(&inbox, 0), ["a", "a:overflow"]);
    }

    #[test]
    fn ready_only_with_something_to_take() {
        let inbox = Inbox::new(10);
        let waker = noop_waker();
        let cx = Context::from_waker(&waker);
        assert!(inbox.poll_ready(&cx).is_pending());
        inbox.post(ShardEvent::Stop);
        assert!(inbox.poll_ready(&cx).is_ready());
        assert_eq!(take(&inbox, 0), ["Stop"]);
        assert!(inbox.poll_ready(&cx).is_pending());
    }
}

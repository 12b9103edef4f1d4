//! The desired subscriptions of one connection.
//!
//! Owns the desired rooms and the callers that wait for acknowledgements. Callers change the set under a short lock and
//! wake the connection's task, which alone reports acknowledgements.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::Arc,
};

use futures_util::future;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use super::{Room, shrink};
use crate::{BrokerError, RoomName, Sink, Subscribing, metrics::BrokerMetrics};

/// The rooms desired on one connection.
#[derive(Debug)]
pub(in crate::redis) struct DesiredRooms {
    state: Mutex<State>,
    wake: Notify,
    metrics: Arc<BrokerMetrics>,
}

#[derive(Debug, Default)]
struct State {
    rooms: HashMap<RoomName, DesiredRoom>,
    /// Rooms that were added or removed since the task last looked. A set, so that flapping cannot make it grow.
    changed: HashSet<RoomName>,
    /// Counts lost connections, from 1. A room is subscribed if it was acknowledged since the last loss.
    epoch: u64,
    closed: bool,
}

#[derive(Debug)]
struct DesiredRoom {
    room: Room,
    /// The last epoch in which it was acknowledged; 0 if the server has ended that subscription since.
    acknowledged: Option<u64>,
    /// Why the server refuses it now, though it was acknowledged before. Further callers get this error at once.
    refused: Option<BrokerError>,
    waiters: Vec<Waiter>,
}

type Waiter = oneshot::Sender<Result<(), BrokerError>>;

impl DesiredRooms {
    pub(in crate::redis) fn new(metrics: Arc<BrokerMetrics>) -> Self {
        Self { state: Mutex::new(State { epoch: 1, ..State::default() }), wake: Notify::new(), metrics }
    }

    /// See [`Broker::subscribe`](crate::Broker::subscribe).
    pub(in crate::redis) fn subscribe(&self, room: &RoomName, sink: Arc<dyn Sink>) -> Subscribing {
        let mut state = self.state.lock();
        let state = &mut *state;
        if state.closed {
            return Box::pin(future::ready(Err(BrokerError::Closed)));
        }
        let desired = match state.rooms.entry(room.clone()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                state.changed.insert(room.clone());
                self.metrics.topics.inc();
                self.wake.notify_one();
                let room = Room { name: room.clone(), sink };
                entry.insert(DesiredRoom { room, acknowledged: None, refused: None, waiters: Vec::new() })
            }
        };
        if desired.acknowledged == Some(state.epoch) {
            return Box::pin(future::ready(Ok(())));
        }
        if let Some(error) = &desired.refused {
            return Box::pin(future::ready(Err(error.clone())));
        }
        // Remove waiters that gave up whenever the list would grow, so that repeated calls during an outage cannot
        // make it grow without bound.
        if desired.waiters.len() == desired.waiters.capacity() {
            desired.waiters.retain(|waiter| !waiter.is_closed());
        }
        let (waiter, answer) = oneshot::channel();
        desired.waiters.push(waiter);
        Box::pin(async move { answer.await.unwrap_or(Err(BrokerError::Closed)) })
    }

    /// See [`Broker::unsubscribe`](crate::Broker::unsubscribe).
    pub(in crate::redis) fn unsubscribe(&self, room: &RoomName) {
        let given_up = {
            let mut state = self.state.lock();
            let Some(desired) = state.rooms.remove(room) else { return };
            shrink::map(&mut state.rooms);
            state.changed.insert(room.clone());
            self.metrics.topics.dec();
            self.metrics.topics_refused.sub(i64::from(desired.refused.is_some()));
            self.wake.notify_one();
            desired.waiters
        };
        let reason = "the room was given up before its subscription was acknowledged";
        settle(given_up, &Err(BrokerError::NotNow(reason.into())));
    }

    /// Resolves when there may be changes. Cancel safe.
    pub(super) async fn changed(&self) {
        self.wake.notified().await;
    }

    /// The rooms that were added or removed, and what each is now if it is desired.
    pub(super) fn take_changes(&self) -> Vec<(RoomName, Option<Room>)> {
        let mut state = self.state.lock();
        let changed = std::mem::take(&mut state.changed);
        changed
            .into_iter()
            .map(|name| {
                let desired = state.rooms.get(&name).map(|desired| desired.room.clone());
                (name, desired)
            })
            .collect()
    }

    /// All desired rooms, for a task that takes over from one that is gone, and whether each was acknowledged. No room
    /// is acknowledged any more.
    pub(super) fn take_over(&self) -> Vec<(Room, bool)> {
        let mut state = self.state.lock();
        state.changed.clear();
        state.epoch += 1;
        let rooms = state.rooms.values();
        rooms.map(|desired| (desired.room.clone(), desired.acknowledged.is_some())).collect()
    }

    /// The server has acknowledged this subscription. Nothing happens if the room has another one by now, which the task
    /// does not know yet: what arrives still goes to the sink of the old one.
    pub(super) fn acknowledged(&self, room: &Room) {
        let waiters = {
            let mut state = self.state.lock();
            let epoch = state.epoch;
            let desired = state.rooms.get_mut(&room.name);
            let Some(desired) = desired.filter(|desired| desired.room.is_same(room)) else { return };
            desired.acknowledged = Some(epoch);
            self.metrics.topics_refused.sub(i64::from(desired.refused.take().is_some()));
            std::mem::take(&mut desired.waiters)
        };
        settle(waiters, &Ok(()));
    }

    /// The server refuses this room, which was never acknowledged: it is removed.
    pub(super) fn refused(&self, room: &RoomName, error: &BrokerError) {
        let removed = self.state.lock().rooms.remove(room);
        if let Some(desired) = removed {
            self.metrics.topics.dec();
            settle(desired.waiters, &Err(error.clone()));
        }
    }

    /// The server refuses this room, though it was acknowledged before. It stays desired.
    pub(super) fn refused_again(&self, room: &RoomName, error: &BrokerError) {
        let waiters = {
            let mut state = self.state.lock();
            let Some(desired) = state.rooms.get_mut(room) else { return };
            let first = desired.refused.replace(error.clone()).is_none();
            self.metrics.topics_refused.add(i64::from(first));
            std::mem::take(&mut desired.waiters)
        };
        settle(waiters, &Err(error.clone()));
    }

    /// The server has ended this room's subscription: it is no longer acknowledged.
    pub(super) fn room_interrupted(&self, room: &RoomName) {
        if let Some(desired) = self.state.lock().rooms.get_mut(room) {
            desired.acknowledged = desired.acknowledged.and(Some(0));
        }
    }

    /// The connection is lost: no room is acknowledged any more.
    pub(super) fn interrupted(&self) {
        self.state.lock().epoch += 1;
    }

    /// Closes the set: all waiters get an error, and no room can be added.
    pub(in crate::redis) fn close(&self) {
        let rooms = {
            let mut state = self.state.lock();
            state.closed = true;
            state.changed.clear();
            std::mem::take(&mut state.rooms)
        };
        self.metrics.topics.sub(i64::try_from(rooms.len()).unwrap_or(i64::MAX));
        for desired in rooms.into_values() {
            self.metrics.topics_refused.sub(i64::from(desired.refused.is_some()));
            settle(desired.waiters, &Err(BrokerError::Closed));
        }
    }
}

/// Call this without the lock: a waiter may run at once.
fn settle(waiters: Vec<Waiter>, outcome: &Result<(), BrokerError>) {
    for waiter in waiters {
        // The waiter may have given up.
        let _ = waiter.send(outcome.clone());
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use prometheus::Registry;

    use super::*;
    use crate::conformance::Recorder;

    #[test]
    fn an_acknowledgement_of_the_old_subscription_says_nothing_of_the_new_one() {
        let desired = DesiredRooms::new(BrokerMetrics::register(&Registry::new()).unwrap());
        let (name, recorder) = (RoomName::new("r").unwrap(), Arc::<Recorder>::default());
        let new_room = || Room { name: name.clone(), sink: recorder.sink(&name) };
        let (old, new) = (new_room(), new_room());
        drop(desired.subscribe(&name, Arc::clone(&old.sink)));
        desired.take_changes();
        desired.unsubscribe(&name);
        let mut waiting = desired.subscribe(&name, Arc::clone(&new.sink));
        desired.acknowledged(&old);
        assert_eq!((&mut waiting).now_or_never(), None, "publications still go to the old sink");
        assert_eq!(desired.take_changes(), [(name, Some(new.clone()))]);
        desired.acknowledged(&new);
        assert_eq!(waiting.now_or_never(), Some(Ok(())));
    }
}

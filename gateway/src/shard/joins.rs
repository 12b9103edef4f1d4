//! Subscriptions that the broker has not acknowledged yet.

use broker_bridge::RoomName;
use slotmap::{SlotMap, new_key_type};

use super::{connection::ConnectionKey, timers::Timers};
use crate::{
    clock::Tick,
    protocol::{Recover, RequestId},
};

new_key_type! {
    /// Identifies a subscription that is waiting for the broker.
    pub struct JoinKey;
}

/// A connection that waits for the broker's acknowledgement of a room.
#[derive(Debug)]
pub struct Join {
    pub connection: ConnectionKey,
    pub room: RoomName,
    /// The session's request. `None` if the request that opened the session named the room: then the
    /// connection is a member already, and goes into service when all such rooms are acknowledged.
    pub request: Option<RequestId>,
    /// Set if that request asks for what the session has missed.
    pub recover: Option<Recover>,
}

/// How many deadlines of ended joins are kept.
const KEPT: usize = 1024;

/// All of them, with their deadlines.
#[derive(Debug, Default)]
pub struct Joins {
    waiting: SlotMap<JoinKey, Join>,
    deadlines: Timers<JoinKey>,
}

impl Joins {
    /// Adds one that is given up at `deadline`.
    pub fn begin(&mut self, join: Join, deadline: Tick) -> JoinKey {
        let key = self.waiting.insert(join);
        self.deadlines.set(deadline, key);
        key
    }

    /// Takes one out. `None` if it has been given up.
    pub fn end(&mut self, key: JoinKey) -> Option<Join> {
        let join = self.waiting.remove(key);
        // Most joins end long before their deadline.
        if self.deadlines.len() > 2 * self.waiting.len() + KEPT {
            self.deadlines.retain(|key| self.waiting.contains_key(*key));
        }
        join
    }

    /// The next one that is to be given up at `now`.
    pub fn take_due(&mut self, now: Tick) -> Option<JoinKey> {
        loop {
            let (_, key) = self.deadlines.take_due(now)?;
            if self.waiting.contains_key(key) {
                return Some(key);
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }
}

//! The subscriptions of one connection: which topics are desired, which commands are in flight, and what the server
//! has acknowledged.
//!
//! Computes the commands that lead from the acknowledged to the desired subscriptions. No I/O: commands are written
//! into a buffer, answers are passed in. A topic has at most one command in flight; a change in the meantime is
//! handled when the answer has arrived, so flapping converges on the last call.
//!
//! Redis answers commands in order. It answers a `SUBSCRIBE` of many topics with one acknowledgement per topic, in
//! the order of the arguments, or with one error for all. So the queue of commands in flight tells what each answer
//! belongs to, and an answer that does not fit means that the connection must be closed. The only thing a server sends
//! unasked is that it has ended a subscription, which concerns that topic alone.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use bytes::BytesMut;

use super::{Room, shrink};
use crate::redis::connection::{write_command, write_header, write_part};

/// The maximum number of topics in one command.
const BATCH: usize = 512;
/// The maximum number of topics in flight. Bounds the buffer of commands, and is enough to keep a server busy that is
/// a few milliseconds away.
const WINDOW: usize = 16 * BATCH;

/// The purpose of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Room(Room),
    Canary,
}

/// An acknowledgement.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Acknowledged<'a> {
    pub(super) purpose: &'a Purpose,
    /// It was subscribed before, and the subscription was lost.
    pub(super) after_loss: bool,
    /// It is still desired.
    pub(super) desired: bool,
}

/// The consequence of an error.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It answered a `HELLO`.
    Answered,
    /// One of several topics was refused, and the error does not say which: each is now tried alone.
    OneByOne,
    /// A new topic was refused. It has been forgotten.
    Refused(Purpose),
    /// A topic that was subscribed before was refused. [`Table::retry_refused`] tries it again.
    StillOwed(Purpose),
    /// The server temporarily refuses. [`Table::retry_refused`] tries all of it again.
    Later {
        /// Some of the topics were subscribed before.
        owed: bool,
    },
    /// An `UNSUBSCRIBE` was refused. Messages on these topics are ignored, except for topics that are desired again.
    StillSubscribed {
        /// The rooms that are desired again: their subscriptions never ended.
        desired: Vec<Room>,
        /// [`Table::retry_refused`] unsubscribes the others again. After a permanent error that would be pointless.
        later: bool,
    },
}

/// An answer fits no command in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server's answer fits no command")]
pub(super) struct OutOfStep;

#[derive(Debug)]
pub(super) struct Table {
    topics: HashMap<Arc<[u8]>, Topic>,
    /// Topics whose desired and actual state may differ. A topic is in it at most once.
    queue: VecDeque<Arc<[u8]>>,
    in_flight: VecDeque<Command>,
    in_flight_topics: usize,
    /// How many desired topics were subscribed before and are not now.
    owed: usize,
    refused: Vec<Arc<[u8]>>,
    /// Rooms may be subscribed, and not only the canaries' topic.
    open: bool,
}

#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts; their product is no state machine")]
struct Topic {
    purpose: Purpose,
    desired: bool,
    wire: Wire,
    /// It was subscribed, was lost, and has not been acknowledged since.
    owed: bool,
    /// It has been part of a command that was refused.
    alone: bool,
    queued: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wire {
    Absent,
    Subscribing,
    Subscribed,
    Unsubscribing,
}

#[derive(Debug)]
enum Command {
    Subscribe(Awaited),
    Unsubscribe(Awaited),
    Hello,
}

#[derive(Debug)]
struct Awaited {
    topics: Vec<Arc<[u8]>>,
    answered: usize,
}

impl Awaited {
    /// Takes the acknowledgement of `topic`; returns whether it was the last.
    fn take(&mut self, topic: &[u8]) -> Result<bool, OutOfStep> {
        if self.topics.get(self.answered).is_none_or(|expected| **expected != *topic) {
            return Err(OutOfStep);
        }
        self.answered += 1;
        Ok(self.answered == self.topics.len())
    }
}

impl Table {
    /// A table that wants the canary's topic and no other.
    pub(super) fn new(canary: &Arc<[u8]>) -> Self {
        let mut table = Self {
            topics: HashMap::new(),
            queue: VecDeque::new(),
            in_flight: VecDeque::new(),
            in_flight_topics: 0,
            owed: 0,
            refused: Vec::new(),
            open: false,
        };
        table.insert(canary, Purpose::Canary);
        // From the start, the connection is complete only with its canaries' topic.
        table.owe(canary);
        table
    }

    /// The purpose of a topic, if it is desired: the look-up for every publication.
    pub(super) fn desired(&self, topic: &[u8]) -> Option<&Purpose> {
        self.topics.get(topic).filter(|topic| topic.desired).map(|topic| &topic.purpose)
    }

    /// Whether everything that was subscribed before is subscribed again.
    pub(super) fn is_complete(&self) -> bool {
        self.owed == 0 && self.open
    }

    /// From now on rooms are subscribed, until the connection is lost.
    pub(super) fn open(&mut self) {
        self.open = true;
    }

    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// Adds a room; returns whether it is subscribed already.
    pub(super) fn add(&mut self, topic: &Arc<[u8]>, room: Room) -> bool {
        let Some(entry) = self.topics.get_mut(topic) else {
            self.insert(topic, Purpose::Room(room));
            return false;
        };
        // A new subscription has missed nothing yet.
        if !matches!(&entry.purpose, Purpose::Room(before) if before.is_same(&room))
            && std::mem::take(&mut entry.owed)
        {
            self.owed -= 1;
        }
        entry.purpose = Purpose::Room(room);
        entry.desired = true;
        let stands = entry.wire == Wire::Subscribed;
        if !stands {
            self.enqueue(topic);
        }
        stands
    }

    /// Removes a room. It is told no gap.
    pub(super) fn remove(&mut self, topic: &[u8]) {
        let Some((topic, entry)) = self.topics.get_key_value(topic) else { return };
        let (topic, owed) = (Arc::clone(topic), entry.owed);
        if owed {
            self.owed -= 1;
        }
        if let Some(entry) = self.topics.get_mut(&topic) {
            entry.desired = false;
            entry.owed = false;
        }
        self.enqueue(&topic);
    }

    /// Writes as many commands as the window allows.
    pub(super) fn write(&mut self, out: &mut BytesMut) {
        let (mut subscribe, mut unsubscribe) = (Vec::new(), Vec::new());
        while self.in_flight_topics + subscribe.len() + unsubscribe.len() < WINDOW {
            let Some(topic) = self.queue.pop_front() else { break };
            let Some(entry) = self.topics.get_mut(&topic) else { continue };
            if !self.open && entry.purpose != Purpose::Canary {
                self.queue.push_front(topic);
                break;
            }
            entry.queued = false;
            let batch = match (entry.desired, entry.wire) {
                (true, Wire::Absent) => {
                    entry.wire = Wire::Subscribing;
                    if entry.alone {
                        self.send(out, true, vec![topic]);
                        continue;
                    }
                    &mut subscribe
                }
                (false, Wire::Subscribed) => {
                    entry.wire = Wire::Unsubscribing;
                    &mut unsubscribe
                }
                (false, Wire::Absent) => {
                    self.topics.remove(&topic);
                    shrink::map(&mut self.topics);
                    continue;
                }
                // In the desired state, or handled when the answer arrives.
                _ => continue,
            };
            batch.push(topic);
            if subscribe.len() == BATCH {
                self.send(out, true, std::mem::take(&mut subscribe));
            }
            if unsubscribe.len() == BATCH {
                self.send(out, false, std::mem::take(&mut unsubscribe));
            }
        }
        shrink::queue(&mut self.queue);
        self.send(out, true, subscribe);
        self.send(out, false, unsubscribe);
    }

    /// Writes a `HELLO`, which asks for the server's role and changes nothing.
    pub(super) fn ask(&mut self, out: &mut BytesMut) {
        write_command(out, &[b"HELLO", b"3"]);
        self.in_flight.push_back(Command::Hello);
    }

    /// The server has acknowledged a `SUBSCRIBE`.
    pub(super) fn subscribed(&mut self, topic: &[u8]) -> Result<Acknowledged<'_>, OutOfStep> {
        let Some(Command::Subscribe(awaited)) = self.in_flight.front_mut() else { return Err(OutOfStep) };
        if awaited.take(topic)? {
            self.in_flight.pop_front();
        }
        self.in_flight_topics -= 1;
        let Some((key, entry)) = self.topics.get_key_value(topic) else { return Err(OutOfStep) };
        if !entry.desired {
            let key = Arc::clone(key);
            self.enqueue(&key);
        }
        let entry = self.topics.get_mut(topic).ok_or(OutOfStep)?;
        entry.wire = Wire::Subscribed;
        entry.alone = false;
        let after_loss = std::mem::take(&mut entry.owed);
        if after_loss {
            self.owed -= 1;
        }
        Ok(Acknowledged { purpose: &entry.purpose, after_loss, desired: entry.desired })
    }

    /// A subscription has ended: the server has acknowledged an `UNSUBSCRIBE`, or has ended the subscription by itself.
    /// In the second case a topic that is still desired is subscribed again, is owed a gap, and is returned.
    pub(super) fn unsubscribed(&mut self, topic: &[u8]) -> Option<Purpose> {
        if let Some(Command::Unsubscribe(awaited)) = self.in_flight.front_mut()
            && let Ok(last) = awaited.take(topic)
        {
            if last {
                self.in_flight.pop_front();
            }
            self.in_flight_topics -= 1;
            self.ended(topic);
            return None;
        }
        let entry = self.topics.get_mut(topic).filter(|entry| entry.wire == Wire::Subscribed)?;
        // In any other state, a command is in flight whose answer decides.
        let lost = entry.desired.then(|| entry.purpose.clone());
        if lost.is_some() && !std::mem::replace(&mut entry.owed, true) {
            self.owed += 1;
        }
        self.ended(topic);
        lost
    }

    fn ended(&mut self, topic: &[u8]) {
        let Some((key, _)) = self.topics.get_key_value(topic) else { return };
        let key = Arc::clone(key);
        self.set_wire(&key, Wire::Absent);
        self.enqueue(&key);
    }

    /// The server has sent a reply other than an acknowledgement or an error: it answers a `HELLO`.
    pub(super) fn replied(&mut self) -> Result<(), OutOfStep> {
        match self.in_flight.pop_front() {
            Some(Command::Hello) => Ok(()),
            _ => Err(OutOfStep),
        }
    }

    /// The server has answered with an error; `later` says whether the same command may succeed later.
    pub(super) fn refused(&mut self, later: bool) -> Result<Refusal, OutOfStep> {
        match self.in_flight.pop_front().ok_or(OutOfStep)? {
            Command::Hello => Ok(Refusal::Answered),
            Command::Subscribe(Awaited { topics, answered: 0 }) => {
                self.in_flight_topics -= topics.len();
                Ok(if later { self.subscribe_later(topics) } else { self.subscribe_refused(topics) })
            }
            Command::Unsubscribe(Awaited { topics, answered: 0 }) => {
                self.in_flight_topics -= topics.len();
                let mut desired = Vec::new();
                for topic in topics {
                    self.set_wire(&topic, Wire::Subscribed);
                    match self.topics.get(&topic) {
                        Some(Topic { desired: true, purpose: Purpose::Room(room), .. }) => {
                            desired.push(room.clone());
                        }
                        _ if later => self.refused.push(topic),
                        _ => {}
                    }
                }
                Ok(Refusal::StillSubscribed { desired, later })
            }
            // A command that is partly acknowledged cannot fail.
            Command::Subscribe(_) | Command::Unsubscribe(_) => Err(OutOfStep),
        }
    }

    /// The error does not concern these topics in particular: they stay in one batch.
    fn subscribe_later(&mut self, topics: Vec<Arc<[u8]>>) -> Refusal {
        let mut owed = false;
        for topic in topics {
            self.set_wire(&topic, Wire::Absent);
            owed |= self.topics.get(&topic).is_some_and(|entry| entry.owed);
            self.refused.push(topic);
        }
        Refusal::Later { owed }
    }

    /// Queues refused topics again.
    pub(super) fn retry_refused(&mut self) {
        for topic in std::mem::take(&mut self.refused) {
            self.enqueue(&topic);
        }
    }

    /// The connection is lost: no topic is subscribed, and desired topics that were subscribed are owed a gap.
    pub(super) fn lost(&mut self) {
        self.open = false;
        self.in_flight.clear();
        self.in_flight_topics = 0;
        self.refused.clear();
        self.queue.clear();
        self.topics.retain(|_, topic| topic.desired);
        self.owed = 0;
        for (key, topic) in &mut self.topics {
            topic.owed |= topic.wire == Wire::Subscribed || topic.purpose == Purpose::Canary;
            self.owed += usize::from(topic.owed);
            topic.wire = Wire::Absent;
            topic.alone = false;
            topic.queued = true;
            enqueue(&mut self.queue, key, &topic.purpose);
        }
    }

    fn subscribe_refused(&mut self, topics: Vec<Arc<[u8]>>) -> Refusal {
        let several = topics.len() > 1;
        let mut answer = Refusal::OneByOne;
        for topic in topics {
            let Some(entry) = self.topics.get_mut(&topic) else { continue };
            entry.wire = Wire::Absent;
            entry.alone = true;
            if several || !entry.desired {
                self.enqueue(&topic);
            } else if entry.owed {
                answer = Refusal::StillOwed(entry.purpose.clone());
                self.refused.push(topic);
            } else {
                answer = Refusal::Refused(entry.purpose.clone());
                self.topics.remove(&topic);
            }
        }
        answer
    }

    fn insert(&mut self, topic: &Arc<[u8]>, purpose: Purpose) {
        let entry =
            Topic { purpose, desired: true, wire: Wire::Absent, owed: false, alone: false, queued: false };
        self.topics.insert(Arc::clone(topic), entry);
        self.enqueue(topic);
    }

    /// The topic was subscribed before, on a connection that is lost: it is owed a gap.
    pub(super) fn owe(&mut self, topic: &[u8]) {
        if let Some(entry) = self.topics.get_mut(topic)
            && !std::mem::replace(&mut entry.owed, true)
        {
            self.owed += 1;
        }
    }

    fn set_wire(&mut self, topic: &[u8], wire: Wire) {
        if let Some(entry) = self.topics.get_mut(topic) {
            entry.wire = wire;
        }
    }

    fn enqueue(&mut self, topic: &Arc<[u8]>) {
        if let Some(entry) = self.topics.get_mut(topic)
            && !std::mem::replace(&mut entry.queued, true)
        {
            enqueue(&mut self.queue, topic, &entry.purpose);
        }
    }

    fn send(&mut self, out: &mut BytesMut, subscribe: bool, topics: Vec<Arc<[u8]>>) {
        if topics.is_empty() {
            return;
        }
        write_header(out, 1 + topics.len());
        write_part(out, if subscribe { b"SUBSCRIBE" } else { b"UNSUBSCRIBE" });
        for topic in &topics {
            write_part(out, topic);
        }
        self.in_flight_topics += topics.len();
        let awaited = Awaited { topics, answered: 0 };
        self.in_flight.push_back(if subscribe {
            Command::Subscribe(awaited)
        } else {
            Command::Unsubscribe(awaited)
        });
    }
}

/// The canaries' topic comes first: rooms wait until it has proven the connection.
fn enqueue(queue: &mut VecDeque<Arc<[u8]>>, topic: &Arc<[u8]>, purpose: &Purpose) {
    match purpose {
        Purpose::Canary => queue.push_front(Arc::clone(topic)),
        Purpose::Room(_) => queue.push_back(Arc::clone(topic)),
    }
}

#[cfg(test)]
mod tests;

//! What one connection's server has been told about topics, and what it has acknowledged.
//!
//! Owns the difference between the wish and the wire, and how to make it smaller. No I/O: commands are
//! written into a buffer, answers are fed in. A topic has at most one command in flight; a wish that
//! changes meanwhile is acted upon when the answer is there, so flapping converges on the last wish.
//!
//! Redis answers commands in order, and a `SUBSCRIBE` of many topics with one acknowledgement per topic in
//! the order of its arguments, or with one error for all. So the queue of commands in flight says what
//! each answer is about, and an answer that does not fit means that the connection is of no use. The one thing a
//! server says unasked is that it has ended a subscription. That concerns its topic alone.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use bytes::BytesMut;

use crate::{
    RoomName,
    redis::connection::{write_command, write_header, write_part},
};

/// The most topics in one command.
const BATCH: usize = 512;
/// The most topics whose acknowledgement is awaited. Bounds the buffer of commands, and keeps a
/// server busy that is a few milliseconds away.
const WINDOW: usize = 16 * BATCH;

/// What a topic is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Room(RoomName),
    Canary,
}

/// An acknowledgement.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Acknowledged<'a> {
    pub(super) purpose: &'a Purpose,
    /// It stood before, and was lost.
    pub(super) after_loss: bool,
    /// It is still wanted.
    pub(super) wanted: bool,
}

/// What an error meant.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A question is answered all the same.
    Answered,
    /// One of several topics was refused, and nobody knows which: each is tried alone now.
    OneByOne,
    /// A new topic was refused. It has been forgotten.
    Refused(Purpose),
    /// A topic that once stood was refused. It will be tried again by [`Table::retry_refused`].
    StillOwed(Purpose),
    /// The server cannot at the moment. All of it will be tried again by [`Table::retry_refused`].
    Later {
        /// Some of it once stood.
        owed: bool,
    },
    /// An `UNSUBSCRIBE` was refused. What the topics bring is ignored, but for those that are wanted again.
    StillSubscribed {
        /// The rooms that are wanted again: their subscriptions never ended.
        wanted: Vec<RoomName>,
        /// The others will be tried again by [`Table::retry_refused`]. For good, they would only be refused again.
        later: bool,
    },
}

/// The server answered something that was not asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server's answer fits no command")]
pub(super) struct OutOfStep;

#[derive(Debug)]
pub(super) struct Table {
    topics: HashMap<Arc<[u8]>, Topic>,
    /// Topics whose wish and wire may differ. A topic is in it at most once.
    queue: VecDeque<Arc<[u8]>>,
    in_flight: VecDeque<Command>,
    in_flight_topics: usize,
    /// How many wanted topics once stood and do not now, and how many of them were refused.
    owed: usize,
    refused: Vec<Arc<[u8]>>,
    /// Rooms may be subscribed, and not only the canaries' topic.
    open: bool,
}

#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts; their product is no state machine")]
struct Topic {
    purpose: Purpose,
    wanted: bool,
    wire: Wire,
    /// It stood, was lost, and has not been acknowledged since.
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
    /// Takes the acknowledgement of `topic`; whether it was the last.
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
        // The connection is complete only with its canary, from the first time on.
        table.owe(canary);
        table
    }

    /// What a topic is for, if it is wanted: the look-up of every publication.
    pub(super) fn wanted(&self, topic: &[u8]) -> Option<&Purpose> {
        self.topics.get(topic).filter(|topic| topic.wanted).map(|topic| &topic.purpose)
    }

    /// Whether everything that once stood stands.
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

    /// Wants a room; whether it stands already.
    pub(super) fn want(&mut self, topic: &Arc<[u8]>, room: RoomName) -> bool {
        let Some(entry) = self.topics.get_mut(topic) else {
            self.insert(topic, Purpose::Room(room));
            return false;
        };
        entry.wanted = true;
        let stands = entry.wire == Wire::Subscribed;
        if !stands {
            self.enqueue(topic);
        }
        stands
    }

    /// Does not want a room any more, and owes it nothing.
    pub(super) fn unwant(&mut self, topic: &[u8]) {
        let Some((topic, entry)) = self.topics.get_key_value(topic) else { return };
        let (topic, owed) = (Arc::clone(topic), entry.owed);
        if owed {
            self.owed -= 1;
        }
        if let Some(entry) = self.topics.get_mut(&topic) {
            entry.wanted = false;
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
            let batch = match (entry.wanted, entry.wire) {
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
                    continue;
                }
                // Either as it should be, or looked at again when the answer is there.
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
        self.send(out, true, subscribe);
        self.send(out, false, unsubscribe);
    }

    /// Writes a `HELLO`, which asks the server how it is and changes nothing.
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
        if !entry.wanted {
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
        Ok(Acknowledged { purpose: &entry.purpose, after_loss, wanted: entry.wanted })
    }

    /// A subscription has ended. Either the server has acknowledged an `UNSUBSCRIBE`, or it has ended the
    /// subscription by itself; then what is still wanted is owed, subscribed again and returned.
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
        // In any other state the answer to a command is still to come, and says what is so.
        let lost = entry.wanted.then(|| entry.purpose.clone());
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

    /// The server has answered something else than an acknowledgement or an error: to a `HELLO`.
    pub(super) fn replied(&mut self) -> Result<(), OutOfStep> {
        match self.in_flight.pop_front() {
            Some(Command::Hello) => Ok(()),
            _ => Err(OutOfStep),
        }
    }

    /// The server has answered with an error; whether the same command may succeed later.
    pub(super) fn refused(&mut self, later: bool) -> Result<Refusal, OutOfStep> {
        match self.in_flight.pop_front().ok_or(OutOfStep)? {
            Command::Hello => Ok(Refusal::Answered),
            Command::Subscribe(Awaited { topics, answered: 0 }) => {
                self.in_flight_topics -= topics.len();
                Ok(if later { self.subscribe_later(topics) } else { self.subscribe_refused(topics) })
            }
            Command::Unsubscribe(Awaited { topics, answered: 0 }) => {
                self.in_flight_topics -= topics.len();
                let mut wanted = Vec::new();
                for topic in topics {
                    self.set_wire(&topic, Wire::Subscribed);
                    match self.topics.get(&topic) {
                        Some(Topic { wanted: true, purpose: Purpose::Room(room), .. }) => {
                            wanted.push(room.clone());
                        }
                        _ if later => self.refused.push(topic),
                        _ => {}
                    }
                }
                Ok(Refusal::StillSubscribed { wanted, later })
            }
            // A command that is half acknowledged cannot fail any more.
            Command::Subscribe(_) | Command::Unsubscribe(_) => Err(OutOfStep),
        }
    }

    /// Nothing is wrong with these topics: they stay in one batch.
    fn subscribe_later(&mut self, topics: Vec<Arc<[u8]>>) -> Refusal {
        let mut owed = false;
        for topic in topics {
            self.set_wire(&topic, Wire::Absent);
            owed |= self.topics.get(&topic).is_some_and(|entry| entry.owed);
            self.refused.push(topic);
        }
        Refusal::Later { owed }
    }

    /// Tries again what was refused and is to be tried again.
    pub(super) fn retry_refused(&mut self) {
        for topic in std::mem::take(&mut self.refused) {
            self.enqueue(&topic);
        }
    }

    /// The connection is lost: nothing is on the wire, and what stood and is wanted is owed.
    pub(super) fn lost(&mut self) {
        self.open = false;
        self.in_flight.clear();
        self.in_flight_topics = 0;
        self.refused.clear();
        self.queue.clear();
        self.topics.retain(|_, topic| topic.wanted);
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
            if several || !entry.wanted {
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
            Topic { purpose, wanted: true, wire: Wire::Absent, owed: false, alone: false, queued: false };
        self.topics.insert(Arc::clone(topic), entry);
        self.enqueue(topic);
    }

    fn owe(&mut self, topic: &[u8]) {
        if let Some(entry) = self.topics.get_mut(topic) {
            entry.owed = true;
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

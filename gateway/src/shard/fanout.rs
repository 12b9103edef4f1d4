//! Fan-out to the members of a room: within the turn in a small room, slice by slice in a large one.

use std::{collections::VecDeque, sync::Arc};

use broker_bridge::{GapCause, RoomName};

use super::{
    Core,
    batch::Batch,
    catchup::{Lost, Place},
    connection::BatchDelivery,
    outbound::{Outbound, RoomLane},
    rooms::{Member, Traits},
    rounds::{Round, SLICE, Step, Waiting},
    state::{KEPT, State},
    transport::Transport,
};
use crate::framing::Broadcast;

/// Queued deliveries after which a turn writes and yields before it continues with its events.
const TURN: usize = 16 * SLICE;
/// What reporting a gap to a session costs, in deliveries: it ends the membership and needs a message of its
/// own.
const PER_GAP: usize = 4;

/// What has been queued and not written yet.
#[derive(Default)]
pub struct Written {
    /// The members served in the current slice of a round. Kept for its capacity.
    slice: Vec<Member>,
    /// Broadcasts that are fully written on this shard when the writes end.
    broadcasts: Vec<Arc<Broadcast>>,
    /// The most bytes that any session's queue has grown.
    queued: usize,
    /// Deliveries queued.
    deliveries: usize,
}

impl Written {
    /// Counts a batch that was queued for one member.
    pub fn add(&mut self, batch: &Batch) {
        // Nobody shares it.
        self.queued += batch.payload_len() + batch.len() * Outbound::PER_FRAME;
        self.deliveries += batch.len();
    }

    /// Whether it is time to write, if queues may hold this many bytes.
    pub fn is_much(&self, outbound: usize) -> bool {
        self.queued > outbound / 2 || self.deliveries >= TURN
    }
}

impl<T: Transport> Core<T> {
    /// Queues the batch for every member, or begins a round with it.
    pub(super) fn deliver(&mut self) {
        let Some(first) = self.batch.first() else { return };
        let (room, place) = (first.room(), first.place(self.state.index));
        if let Some(round) = self.rounds.get_mut(room) {
            self.batch.take().for_each(|broadcast| round.wait(Waiting::Publication(broadcast)));
            return;
        }
        if let Some(known) = self.rooms.find(place, room) {
            let delivery = delivery(&self.state, &self.batch, known.traits());
            let frames = delivery.frames();
            if known.members.len() * frames > SLICE {
                let room = room.clone();
                let step = Step::Publications(Box::new(std::mem::take(&mut self.batch)));
                self.rounds.begin(&room, step);
                return;
            }
            let is_mixed = is_mixed(&self.batch, known.traits());
            for member in known.members.iter() {
                if let Some(connection) = self.connections.get_mut(member.connection) {
                    if is_mixed {
                        let skip = self.batch.count_below(connection.from(room));
                        if skip > 0 {
                            connection.deliver_rest(&mut self.state, member, &delivery, skip);
                            continue;
                        }
                    }
                    connection.deliver(&mut self.state, member, &delivery);
                    connection.touch(&mut self.state);
                }
            }
            self.written.queued += self.batch.payload_len() + frames * Outbound::PER_FRAME;
            self.written.deliveries += known.members.len() * frames;
        }
        finish(self.batch.take(), &mut self.written, &mut self.done);
    }

    /// Begins a round that reports a gap to every member.
    pub(super) fn report_gap(&mut self, room: &RoomName, cause: GapCause, number: u64) {
        match self.rounds.get_mut(room) {
            Some(round) => round.wait(Waiting::Gap(cause, number)),
            None => self.rounds.begin(room, Step::Gap(cause, number)),
        }
    }

    /// Begins a round after which every member gets what did not fit into the inbox from the room's history, or a gap if
    /// the room has none.
    pub(super) fn report_overflow(&mut self, room: &RoomName, number: u64) {
        if number == 0 {
            return self.report_gap(room, GapCause::Overflow, 0);
        }
        let (first, last) = (number, number);
        match self.rounds.get_mut(room) {
            Some(round) => round.wait(Waiting::Overflow { first, last }),
            None => self.rounds.begin(room, Step::Overflow { first, last }),
        }
    }

    /// Begins a round that tells every member that positions have another epoch from the item with this number on.
    pub(super) fn report_new_epoch(&mut self, room: &RoomName, number: u64) {
        match self.rounds.get_mut(room) {
            Some(round) => round.wait(Waiting::NewEpoch(number)),
            None => self.rounds.begin(room, Step::NewEpoch(number)),
        }
    }

    /// Continues the rounds in turn, until a slice of members has been served.
    pub(super) fn serve_rounds(&mut self) {
        let mut left = SLICE;
        while left > 0 {
            let Some((room, round)) = self.rounds.take() else { return };
            let weight = self.weight(&room, &round);
            let served = self.serve(room, round, left.div_ceil(weight));
            left -= (served * weight).min(left);
        }
    }

    /// What one step of a round costs per member, in deliveries.
    fn weight(&self, room: &RoomName, round: &Round) -> usize {
        match &round.step {
            Step::Gap(..) | Step::Overflow { .. } | Step::NewEpoch(_) => PER_GAP,
            Step::Publications(batch) => {
                self.rooms.get(room).map_or(1, |known| delivery(&self.state, batch, known.traits()).frames())
            }
        }
    }

    /// Continues a round with at most `most` members. Returns how many members' worth of the turn it has
    /// used.
    fn serve(&mut self, room: RoomName, mut round: Round, most: usize) -> usize {
        let mut slice = std::mem::take(&mut self.written.slice);
        let found = self
            .rooms
            .get_mut(&room)
            .map(|known| (known.traits(), known.members.next_slice(most, &mut slice)));
        if let Some((traits, _)) = found {
            self.serve_slice(&room, &round, &slice, traits);
            // Whoever has left because of this step must not get the next one.
            self.settle();
        }
        let served = slice.len().max(1);
        slice.clear();
        self.written.slice = slice;
        if let Some((_, false)) = found {
            self.rounds.put_back(room, round);
            return served;
        }
        // If the room has no members any more, finish the waiting messages at once.
        loop {
            if let Step::Publications(batch) = &mut round.step {
                finish(batch.take(), &mut self.written, &mut self.done);
            }
            if !round.advance(self.state.settings.limits.outbound.get()) {
                self.rounds.end(&round);
                return served;
            }
            if found.is_some() {
                self.rounds.put_back(room, round);
                return served;
            }
        }
    }

    fn serve_slice(&mut self, room: &RoomName, round: &Round, slice: &[Member], traits: Traits) {
        let delivery = match &round.step {
            Step::Publications(batch) => Some(delivery(&self.state, batch, traits)),
            Step::Gap(..) | Step::Overflow { .. } | Step::NewEpoch(_) => None,
        };
        let before = match round.step {
            Step::Overflow { first, .. } => self.state.context.hub.position_before(room, first),
            _ => None,
        };
        for member in slice {
            let Some(connection) = self.connections.get_mut(member.connection) else { continue };
            let mut before_join =
                if round.has_newcomers() { round.count_before(connection.since(room)) } else { 0 };
            if let Step::Publications(batch) = &round.step
                && is_mixed(batch, traits)
            {
                before_join = before_join.max(batch.count_below(connection.from(room)));
            }
            match (&round.step, &delivery) {
                (Step::Publications(_), Some(delivery)) if before_join == 0 => {
                    connection.deliver_now(&mut self.state, member, delivery);
                }
                (Step::Publications(_), Some(delivery)) => {
                    connection.deliver_rest(&mut self.state, member, delivery, before_join);
                }
                (Step::Gap(cause, number), _)
                    if before_join == 0 && connection.receives_gap(room, *number) =>
                {
                    connection.gap(&mut self.state, room, *cause);
                }
                (&Step::Overflow { first, last }, _)
                    if before_join == 0 && connection.receives_gap(room, last) =>
                {
                    let next = first.max(connection.from(room));
                    self.rooms.catch_up_again(room, connection);
                    let position = before.filter(|_| next == first);
                    let place = Place {
                        room: room.clone(),
                        next,
                        live: next,
                        epoch: before.map(|before| before.epoch),
                        position,
                        is_snapshot: false,
                        lost: Lost::Not,
                    };
                    connection.catch_up_from(&mut self.state, place);
                }
                (Step::NewEpoch(number), _) if before_join == 0 && connection.receives_gap(room, *number) => {
                    connection.new_epoch(&mut self.state, room);
                }
                _ => {}
            }
        }
    }

    /// Writes a slice of the connections with queued output. Returns whether that was the last.
    pub(super) fn write_slice(&mut self) -> bool {
        // Connections touched during these writes are written in this turn too.
        for _ in 0..SLICE {
            let Some(key) = self.state.dirty.pop_front() else { break };
            if let Some(connection) = self.connections.get_mut(key) {
                connection.dirty = false;
                connection.flush(&mut self.state);
            }
        }
        if !self.state.dirty.is_empty() {
            return false;
        }
        if self.state.dirty.capacity() > KEPT {
            self.state.dirty = VecDeque::new();
        }
        let written = &mut self.written;
        (written.queued, written.deliveries) = (0, 0);
        if !written.broadcasts.is_empty() {
            let context = &self.state.context;
            let now = context.time.now();
            for received in written.broadcasts.drain(..).filter_map(|broadcast| broadcast.written()) {
                let age = now.saturating_duration_since(received);
                context.metrics.fanout_seconds.observe(age.as_secs_f64());
            }
        }
        if written.broadcasts.capacity() > KEPT {
            written.broadcasts = Vec::new();
        }
        true
    }
}

/// Whether some members do not receive all of the batch.
fn is_mixed(batch: &Batch, traits: Traits) -> bool {
    batch.first().is_some_and(|first| first.number() < traits.latest)
}

/// The delivery of a batch, with what is the same for all members.
pub(super) fn delivery<'a>(state: &State, batch: &'a Batch, traits: Traits) -> BatchDelivery<'a> {
    let settings = &state.settings;
    let Traits { tag, policy, with_heads, .. } = traits;
    BatchDelivery {
        batch,
        exclude: batch.first().and_then(Broadcast::exclude),
        threshold: settings.compression.threshold.get(),
        limit: settings.limits.outbound.get(),
        lane: RoomLane { room: tag, priority: policy.priority },
        overflow: policy.overflow,
        with_heads,
    }
}

/// The shard is done with these broadcasts, but for the writes.
fn finish(broadcasts: impl Iterator<Item = Arc<Broadcast>>, written: &mut Written, done: &mut usize) {
    for broadcast in broadcasts {
        *done += broadcast.cost();
        written.broadcasts.push(broadcast);
    }
}

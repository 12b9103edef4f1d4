//! Fan-out to the members of a room: within the turn in a small room, slice by slice in a large one.

use std::sync::Arc;

use broker_bridge::{GapCause, RoomName};

use super::{KEPT_EVENTS, Worker, Written};
use crate::{
    framing::Broadcast,
    shard::{
        batch::Batch,
        connection::BatchDelivery,
        outbound::{Outbound, RoomLane, RoomTag},
        rooms::Member,
        rounds::{Round, SLICE, Step, Waiting},
    },
};

/// What reporting a gap to a session costs, in deliveries: it ends the membership and needs a message of its
/// own.
const PER_GAP: usize = 4;

impl Worker {
    /// Queues a batch for every member, or begins a round with it.
    pub(super) fn deliver(&self, batch: &mut Batch, written: &mut Written) {
        let Some(room) = batch.first().map(Broadcast::room) else { return };
        if let Some(round) = self.rounds.borrow_mut().get_mut(room) {
            batch.take().for_each(|broadcast| round.wait(Waiting::Publication(broadcast)));
            return;
        }
        if let Some(known) = self.rooms.borrow().get(room) {
            let delivery = self.delivery(batch, known.tag, known.with_heads > 0);
            let frames = delivery.frames();
            if known.members.len() * frames > SLICE {
                let room = room.clone();
                let step = Step::Publications(Box::new(std::mem::take(batch)));
                self.rounds.borrow_mut().begin(&room, step);
                return;
            }
            for member in known.members.iter() {
                member.connection.deliver(self, member, &delivery);
                self.touch_connection(&member.connection);
            }
            written.queued += batch.payload_len() + frames * Outbound::PER_FRAME;
            written.deliveries += known.members.len() * frames;
        }
        batch.take().for_each(|broadcast| self.done_with(broadcast, written));
    }

    /// Begins a round that reports a gap to every member.
    pub(super) fn report_gap(&self, room: &RoomName, cause: GapCause) {
        let mut rounds = self.rounds.borrow_mut();
        match rounds.get_mut(room) {
            Some(round) => round.wait(Waiting::Gap(cause)),
            None => rounds.begin(room, Step::Gap(cause)),
        }
    }

    /// Continues the rounds in turn, until a slice of members has been served.
    pub(super) fn serve_rounds(&self, written: &mut Written) {
        let mut left = SLICE;
        while left > 0 {
            let Some((room, round)) = self.rounds.borrow_mut().take() else { return };
            let weight = self.weight(&room, &round);
            let served = self.serve(room, round, left.div_ceil(weight), written);
            left -= (served * weight).min(left);
        }
    }

    /// What one step of a round costs per member, in deliveries.
    fn weight(&self, room: &RoomName, round: &Round) -> usize {
        match &round.step {
            Step::Gap(_) => PER_GAP,
            Step::Publications(batch) => {
                // Any tag will do here.
                self.rooms
                    .borrow()
                    .get(room)
                    .map_or(1, |known| self.delivery(batch, known.tag, known.with_heads > 0).frames())
            }
        }
    }

    /// Continues a round with at most `most` members. Returns how many members' worth of the turn it has
    /// used.
    fn serve(&self, room: RoomName, mut round: Round, most: usize, written: &mut Written) -> usize {
        let slice = &mut written.slice;
        let found = self
            .rooms
            .borrow_mut()
            .get_mut(&room)
            .map(|known| (known.tag, known.with_heads > 0, known.members.next_slice(most, slice)));
        if let Some((tag, with_heads, _)) = found {
            let before_join = |member: &Member| {
                if round.has_newcomers() { round.count_before(member.connection.since(&room)) } else { 0 }
            };
            match &round.step {
                Step::Publications(batch) => {
                    let delivery = self.delivery(batch, tag, with_heads);
                    for member in slice.iter() {
                        match before_join(member) {
                            0 => member.connection.deliver_now(self, member, &delivery),
                            some => member.connection.deliver_rest(self, member, &delivery, some),
                        }
                    }
                }
                Step::Gap(cause) => {
                    for member in slice.iter().filter(|member| before_join(member) == 0) {
                        member.connection.gap(self, &room, *cause);
                    }
                }
            }
        }
        let served = slice.len().max(1);
        slice.clear();
        if let Some((.., false)) = found {
            self.rounds.borrow_mut().put_back(room, round);
            return served;
        }
        // If the room has no members any more, finish the waiting messages at once.
        loop {
            if let Step::Publications(batch) = &mut round.step {
                batch.take().for_each(|broadcast| self.done_with(broadcast, written));
            }
            let goes_on = round.advance();
            let mut rounds = self.rounds.borrow_mut();
            if !goes_on {
                rounds.end(&round);
                return served;
            }
            if found.is_some() {
                rounds.put_back(room, round);
                return served;
            }
        }
    }

    fn delivery<'a>(&self, batch: &'a Batch, tag: RoomTag, with_heads: bool) -> BatchDelivery<'a> {
        let settings = self.settings();
        let policy = batch.first().map_or_else(Default::default, |first| settings.delivery.of(first.room()));
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

    fn done_with(&self, broadcast: Arc<Broadcast>, written: &mut Written) {
        self.done.set(self.done.get() + broadcast.cost());
        written.broadcasts.push(broadcast);
    }

    /// Writes every connection with queued output, slice by slice.
    pub(super) async fn write(&self, written: &mut Written) {
        let mut count = 0;
        loop {
            // Connections touched during these writes are written in this turn too.
            std::mem::swap(&mut written.connections, &mut *self.dirty.borrow_mut());
            if written.connections.is_empty() {
                break;
            }
            for connection in written.connections.drain(..) {
                connection.dirty.set(false);
                connection.flush(self);
                count += 1;
                if count % SLICE == 0 {
                    tokio::task::yield_now().await;
                }
            }
        }
        if written.connections.capacity() > KEPT_EVENTS {
            written.connections = Vec::new();
        }
        (written.queued, written.deliveries) = (0, 0);
        for age in written.broadcasts.drain(..).filter_map(|broadcast| broadcast.written()) {
            self.context.metrics.fanout_seconds.observe(age.as_secs_f64());
        }
        if written.broadcasts.capacity() > KEPT_EVENTS {
            written.broadcasts = Vec::new();
        }
    }
}

//! From what a room is told to its members: within the turn in a small room, slice by slice in a large one.

use std::sync::Arc;

use broker_bridge::{GapCause, RoomName};

use super::{Worker, Written};
use crate::{
    delivery::Overflow,
    hub::Broadcast,
    shard::{
        Inbox,
        batch::Batch,
        connection::BatchDelivery,
        outbound::{Outbound, RoomLane, RoomTag},
        rounds::{SLICE, Step, Waiting},
    },
};

impl Worker {
    /// Queues a batch for every member, or begins a round with it. Returns what it costs a member's queue at most.
    pub(super) fn deliver(&self, batch: &mut Batch, written: &mut Written) -> usize {
        let Some(room) = batch.first().map(Broadcast::room) else { return 0 };
        if let Some(round) = self.rounds.borrow_mut().get_mut(room) {
            batch.take().for_each(|broadcast| round.wait(Waiting::Publication(broadcast)));
            return 0;
        }
        let mut cost = 0;
        if let Some(known) = self.rooms.borrow().get(room) {
            if known.members.len() > SLICE {
                let room = room.clone();
                self.rounds.borrow_mut().begin(&room, Step::Publications(std::mem::take(batch)));
                return 0;
            }
            let delivery = self.delivery(batch, known.tag);
            for member in known.members.iter() {
                member.deliver(self, &delivery);
                self.touch_connection(member);
            }
            let frames = if delivery.overflow == Overflow::Close { 1 } else { batch.len() };
            cost = batch.payload_len() + frames * Outbound::PER_FRAME;
        }
        batch.take().for_each(|broadcast| self.done_with(broadcast, written));
        cost
    }

    /// Tells every member of a gap, or begins a round with it.
    pub(super) fn tell_gap(&self, room: &RoomName, cause: GapCause) {
        if let Some(round) = self.rounds.borrow_mut().get_mut(room) {
            return round.wait(Waiting::Gap(cause));
        }
        let members = {
            let rooms = self.rooms.borrow();
            let Some(known) = rooms.get(room) else { return };
            if known.members.len() > SLICE {
                return self.rounds.borrow_mut().begin(room, Step::Gap(cause));
            }
            // A copy, since who asked for it is closed at a gap and leaves the room.
            known.members.iter().cloned().collect::<Vec<_>>()
        };
        for member in members {
            member.gap(self, room, cause);
        }
    }

    /// Goes on with the round whose turn it is, by one slice.
    pub(super) fn serve_slice(&self, written: &mut Written) {
        let Some((room, mut round)) = self.rounds.borrow_mut().take() else { return };
        let slice = &mut written.slice;
        let found = self
            .rooms
            .borrow_mut()
            .get_mut(&room)
            .map(|known| (known.tag, known.members.next_slice(SLICE, slice)));
        if let Some((tag, _)) = found {
            match &round.step {
                Step::Publications(batch) => {
                    let delivery = self.delivery(batch, tag);
                    for member in slice.iter() {
                        member.deliver_now(self, &delivery);
                    }
                }
                Step::Gap(cause) => {
                    for member in slice.iter() {
                        member.gap(self, &room, *cause);
                    }
                }
            }
        }
        slice.clear();
        if let Some((_, false)) = found {
            return self.rounds.borrow_mut().put_back(room, round);
        }
        // To its end, if nobody is left who could hear what waits.
        loop {
            if let Step::Publications(batch) = &mut round.step {
                batch.take().for_each(|broadcast| self.done_with(broadcast, written));
            }
            let Some(next) = round.next() else { return };
            round.step = next;
            if found.is_some() {
                return self.rounds.borrow_mut().put_back(room, round);
            }
        }
    }

    fn delivery<'a>(&self, batch: &'a Batch, tag: RoomTag) -> BatchDelivery<'a> {
        let settings = self.settings();
        let policy = batch.first().map_or_else(Default::default, |first| settings.delivery.of(first.room()));
        BatchDelivery {
            batch,
            exclude: batch.first().and_then(Broadcast::exclude),
            threshold: settings.compression.threshold.get(),
            limit: settings.limits.outbound.get(),
            lane: RoomLane { room: tag, priority: policy.priority },
            overflow: policy.overflow,
        }
    }

    fn done_with(&self, broadcast: Arc<Broadcast>, written: &mut Written) {
        self.done.set(self.done.get() + Inbox::cost(&broadcast));
        written.broadcasts.push(broadcast);
    }

    /// Writes every connection that something was queued for, slice by slice.
    pub(super) async fn write(&self, written: &mut Written) {
        let mut count = 0;
        loop {
            // What is touched while we write is written before the turn ends, too.
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
        for age in written.broadcasts.drain(..).filter_map(|broadcast| broadcast.written()) {
            self.context.metrics.fanout_seconds.observe(age.as_secs_f64());
        }
    }
}

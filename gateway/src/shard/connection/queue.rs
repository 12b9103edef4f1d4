//! What is queued for a connection's client, and what happens when its queue is full.

use broker_bridge::{RoomName, SessionId};
use bytes::Bytes;

use super::{Connection, Phase};
use crate::{
    delivery::Overflow,
    hub::Broadcast,
    protocol::Notice,
    session::CloseReason,
    shard::{
        batch::Batch,
        outbound::{Full, Lane, RoomLane},
        tally::Tally,
        worker::Worker,
    },
};

impl Connection {
    /// Queues a batch, unless it is this session's own echo. The caller writes at the end of its turn.
    pub fn deliver(
        &self,
        worker: &Worker,
        exclude: Option<SessionId>,
        batch: &Batch,
        threshold: usize,
        lane: RoomLane,
        overflow: Overflow,
    ) {
        if matches!(self.phase.get(), Phase::Closing(_)) || exclude == Some(self.id) {
            return;
        }
        if overflow == Overflow::Close {
            if self.queue(worker, batch.frame(self.encoding, threshold).clone(), Lane::Room(lane)) {
                Tally::add(&worker.tally.deliveries, batch.len());
                Tally::add(&worker.tally.payload_out, batch.payload_len());
            }
            return;
        }
        // What may have to make way one by one is queued one by one.
        let Some(room) = batch.first().map(Broadcast::room) else { return };
        for (frame, payload) in batch.frames(self.encoding, threshold) {
            if self.queue_over(worker, frame.clone(), lane, overflow, room) {
                Tally::add(&worker.tally.deliveries, 1);
                Tally::add(&worker.tally.payload_out, payload);
            }
        }
    }

    /// Queues bytes if the bound allows; marks the connection as too slow if not.
    pub(super) fn queue(&self, worker: &Worker, frame: Bytes, lane: Lane) -> bool {
        let before = self.outbound.borrow().len();
        let pushed = self.outbound.borrow_mut().push(frame, lane, worker.settings().limits.outbound.get());
        if pushed == Err(Full) {
            self.doom(worker, CloseReason::SlowConsumer);
            return false;
        }
        worker.count_outbound(before, self.outbound.borrow().len());
        true
    }

    /// Queues a publication of a room whose older publications make way for newer ones, and tells of the gap.
    fn queue_over(
        &self,
        worker: &Worker,
        frame: Bytes,
        lane: RoomLane,
        overflow: Overflow,
        room: &RoomName,
    ) -> bool {
        if self.doomed.get().is_some() {
            return false; // It would follow a gap of which the session has not been told.
        }
        let limit = worker.settings().limits.outbound.get();
        let told = {
            let outbound = self.outbound.borrow();
            let full = !outbound.fits(frame.len(), limit);
            let behind = overflow == Overflow::Latest && self.wants_write.get();
            if !(full || behind) || !outbound.may_drop(lane.room) {
                drop(outbound);
                return self.queue(worker, frame, Lane::Room(lane));
            }
            outbound.tells_gap(lane.room)
        };
        let notice = if told { Notice::Silent } else { self.session.borrow().dropped(room) };
        let notice = match notice {
            Notice::Silent => None,
            Notice::Send(bytes) | Notice::Leave(bytes) => Some(bytes),
            Notice::Close(reason) => {
                self.doom(worker, reason);
                return false;
            }
        };
        let before = self.outbound.borrow().len();
        let all = overflow == Overflow::Latest;
        let pushed = self.outbound.borrow_mut().push_over(frame, lane, limit, all, notice);
        worker.count_outbound(before, self.outbound.borrow().len());
        let Ok(dropped) = pushed else {
            self.doom(worker, CloseReason::SlowConsumer);
            return false;
        };
        Tally::add(
            if all { &worker.tally.dropped_for_latest } else { &worker.tally.dropped_oldest },
            dropped,
        );
        true
    }

    /// Closes the connection at the end of the turn. (Not at once: the shard goes through a room's members.)
    fn doom(&self, worker: &Worker, reason: CloseReason) {
        self.doomed.set(self.doomed.get().or(Some(reason)));
        worker.touch(self.key);
    }
}

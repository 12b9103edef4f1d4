//! What is queued for a connection's client, and what happens when its queue is full.

use broker_bridge::{RoomName, SessionId};

use super::{Connection, Phase};
use crate::{
    delivery::Overflow,
    framing::{Broadcast, Frame},
    protocol::Then,
    shard::{
        batch::Batch,
        outbound::{Full, Lane, RoomLane},
        rooms::Member,
        tally::Tally,
        worker::Worker,
    },
    vocabulary::CloseReason,
};

/// A batch that is being delivered to the members of a room, with what is the same for all of them.
pub struct BatchDelivery<'a> {
    pub batch: &'a Batch,
    /// The session that must not receive it.
    pub exclude: Option<SessionId>,
    /// Publications with fewer bytes are not compressed.
    pub threshold: usize,
    /// The bound of each queue, in bytes.
    pub limit: usize,
    pub lane: RoomLane,
    pub overflow: Overflow,
    /// Whether any members have per-member heads.
    pub with_heads: bool,
}

impl BatchDelivery<'_> {
    /// The most frames that a member's queue takes for it. With a policy that drops single publications, each
    /// is queued by itself, and so are messages with heads in between.
    pub fn frames(&self) -> usize {
        if self.overflow == Overflow::Close && !self.with_heads { 1 } else { self.batch.len() }
    }
}

impl Connection {
    /// Queues a batch, unless this session is excluded from it. The caller writes at the end of its turn.
    pub fn deliver(&self, worker: &Worker, member: &Member, delivery: &BatchDelivery<'_>) {
        if self.receives(delivery) {
            self.enqueue(worker, member, delivery);
        }
    }

    /// Delivers a batch and writes it at once. If nothing is queued, the write bypasses the queue.
    pub fn deliver_now(&self, worker: &Worker, member: &Member, delivery: &BatchDelivery<'_>) {
        if !self.receives(delivery) {
            return;
        }
        if !member.has_heads() {
            let frame = delivery.batch.frame(member.encoding(), delivery.threshold);
            if self.send_past_queue(worker, frame.as_ref(), Lane::Room(delivery.lane)) {
                return Self::count(worker, delivery.batch);
            }
        }
        self.enqueue(worker, member, delivery);
        self.flush(worker);
    }

    /// Delivers a batch without its first `before_join` publications, which came before this member joined.
    /// Writes at once.
    pub fn deliver_rest(
        &self,
        worker: &Worker,
        member: &Member,
        delivery: &BatchDelivery<'_>,
        before_join: usize,
    ) {
        if before_join < delivery.batch.len() && self.receives(delivery) {
            self.enqueue_each(worker, member, delivery, before_join);
            self.flush(worker);
        }
    }

    fn receives(&self, delivery: &BatchDelivery<'_>) -> bool {
        !matches!(self.phase.get(), Phase::Closing(_)) && delivery.exclude != Some(self.id)
    }

    fn enqueue(&self, worker: &Worker, member: &Member, delivery: &BatchDelivery<'_>) {
        if delivery.overflow == Overflow::Close && !member.has_heads() {
            let frame = delivery.batch.frame(member.encoding(), delivery.threshold).into_owned();
            if self.queue_within(worker, frame.into(), Lane::Room(delivery.lane), delivery.limit) {
                Self::count(worker, delivery.batch);
            }
        } else {
            self.enqueue_each(worker, member, delivery, 0);
        }
    }

    /// Queues the publications of a batch one by one, without the first `skip`.
    fn enqueue_each(&self, worker: &Worker, member: &Member, delivery: &BatchDelivery<'_>, skip: usize) {
        let &BatchDelivery { batch, threshold, limit, lane, overflow, .. } = delivery;
        let Some(room) = batch.first().map(Broadcast::room) else { return };
        for (shared, payload) in batch.frames(member.encoding(), threshold).skip(skip) {
            let frame = member.frame(shared.into_owned());
            let queued = match overflow {
                Overflow::Close => self.queue_within(worker, frame, Lane::Room(lane), limit),
                _ => self.queue_over(worker, frame, lane, overflow, room),
            };
            if !queued {
                return;
            }
            Tally::add(&worker.tally.deliveries, 1);
            Tally::add(&worker.tally.payload_out, payload);
        }
    }

    fn count(worker: &Worker, batch: &Batch) {
        Tally::add(&worker.tally.deliveries, batch.len());
        Tally::add(&worker.tally.payload_out, batch.payload_len());
    }

    /// Queues bytes if the bound allows; otherwise marks the connection as a slow consumer.
    pub(super) fn queue(&self, worker: &Worker, frame: Frame, lane: Lane) -> bool {
        let limit = worker.settings().limits.outbound.get();
        self.queue_within(worker, frame, lane, limit)
    }

    fn queue_within(&self, worker: &Worker, frame: Frame, lane: Lane, limit: usize) -> bool {
        let pushed = self.outbound.borrow_mut().push(frame, lane, limit);
        if pushed == Err(Full) {
            self.close_after_turn(worker, CloseReason::SlowConsumer);
            return false;
        }
        self.count_outbound(worker);
        true
    }

    /// Queues a publication of a room whose older publications are dropped for newer ones, and reports the
    /// gap.
    fn queue_over(
        &self,
        worker: &Worker,
        frame: Frame,
        lane: RoomLane,
        overflow: Overflow,
        room: &RoomName,
    ) -> bool {
        if self.close_after_turn.get().is_some() {
            return false; // It would follow a gap that the session has not been notified of.
        }
        let limit = worker.settings().limits.outbound.get();
        let has_notice = {
            let mut outbound = self.outbound.borrow_mut();
            let full = !outbound.fits(frame.len(), limit);
            let behind = overflow == Overflow::Latest && self.wants_write.get();
            if !(full || behind) || !outbound.may_drop(lane.room) {
                drop(outbound);
                return self.queue(worker, frame, Lane::Room(lane));
            }
            outbound.has_gap_notice(lane.room)
        };
        let mut notice = None;
        if !has_notice {
            let mut packets = worker.take_packets();
            let then = self.session.borrow_mut().dropped(room, &mut packets);
            notice = packets.take_joined();
            worker.give_packets(packets);
            if let Then::Close(reason) = then {
                self.close_after_turn(worker, reason);
                return false;
            }
        }
        let all = overflow == Overflow::Latest;
        let pushed = self.outbound.borrow_mut().push_over(frame, lane, limit, all, notice);
        self.count_outbound(worker);
        let Ok(dropped) = pushed else {
            self.close_after_turn(worker, CloseReason::SlowConsumer);
            return false;
        };
        Tally::add(
            if all { &worker.tally.dropped_for_latest } else { &worker.tally.dropped_oldest },
            dropped,
        );
        true
    }

    /// Closes the connection at the end of the turn. Not at once: the shard is iterating over a room's
    /// members.
    fn close_after_turn(&self, worker: &Worker, reason: CloseReason) {
        self.close_after_turn.set(self.close_after_turn.get().or(Some(reason)));
        worker.touch(self.key);
    }
}

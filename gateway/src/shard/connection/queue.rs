//! What is queued for a connection's client, and what happens when its queue is full.

use broker_bridge::{RoomName, SessionId};

use super::{Connection, Phase};
use crate::{
    delivery::Overflow,
    framing::{Broadcast, Encoding, Frame},
    protocol::Then,
    shard::{
        batch::Batch,
        outbound::{Full, Lane, RoomLane},
        rooms::Member,
        state::State,
        tally::Tally,
        transport::Transport,
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

impl<T: Transport> Connection<T> {
    /// Queues a batch, unless this session is excluded from it. The caller writes at the end of its turn.
    pub fn deliver(&mut self, shard: &mut State, member: &Member, delivery: &BatchDelivery<'_>) {
        if self.receives(delivery) {
            self.enqueue(shard, member, delivery);
        }
    }

    /// Delivers a batch and writes it at once. If nothing is queued, the write bypasses the queue.
    pub fn deliver_now(&mut self, shard: &mut State, member: &Member, delivery: &BatchDelivery<'_>) {
        if !self.receives(delivery) {
            return;
        }
        if !member.has_heads() {
            let frame = delivery.batch.frame(self.encoding_for(member), delivery.threshold);
            if self.send_past_queue(shard, frame.as_ref(), Lane::Room(delivery.lane)) {
                return Self::count(shard, delivery.batch);
            }
        }
        self.enqueue(shard, member, delivery);
        self.flush(shard);
    }

    /// Delivers a batch without its first `before_join` publications, which came before this member joined.
    /// Writes at once.
    pub fn deliver_rest(
        &mut self,
        shard: &mut State,
        member: &Member,
        delivery: &BatchDelivery<'_>,
        before_join: usize,
    ) {
        if before_join < delivery.batch.len() && self.receives(delivery) {
            self.enqueue_each(shard, member, delivery, before_join);
            self.flush(shard);
        }
    }

    fn encoding_for(&self, member: &Member) -> Encoding {
        member.own_encoding().or(self.encoding).expect("set by the first membership")
    }

    fn receives(&self, delivery: &BatchDelivery<'_>) -> bool {
        !matches!(self.phase, Phase::Closing(_)) && delivery.exclude != Some(self.id)
    }

    fn enqueue(&mut self, shard: &mut State, member: &Member, delivery: &BatchDelivery<'_>) {
        if delivery.overflow == Overflow::Close && !member.has_heads() {
            let frame = delivery.batch.frame(self.encoding_for(member), delivery.threshold).into_owned();
            if self.queue_within(shard, frame.into(), Lane::Room(delivery.lane), delivery.limit) {
                Self::count(shard, delivery.batch);
            }
        } else {
            self.enqueue_each(shard, member, delivery, 0);
        }
    }

    /// Queues the publications of a batch one by one, without the first `skip`.
    fn enqueue_each(
        &mut self,
        shard: &mut State,
        member: &Member,
        delivery: &BatchDelivery<'_>,
        skip: usize,
    ) {
        let &BatchDelivery { batch, threshold, limit, mut lane, mut overflow, .. } = delivery;
        lane.priority &= !member.is_ordered();
        if self.is_answer() {
            // The end of the answer says which publications are in it.
            overflow = Overflow::Close;
        }
        let Some(room) = batch.first().map(Broadcast::room) else { return };
        for (shared, broadcast) in batch.frames(self.encoding_for(member), threshold).skip(skip) {
            let frame = member.frame(shared.into_owned(), broadcast.cursor());
            let queued = match overflow {
                Overflow::Close => self.queue_within(shard, frame, Lane::Room(lane), limit),
                _ => self.queue_over(shard, frame, lane, overflow, room),
            };
            if !queued {
                return;
            }
            Tally::add(&shard.tally.deliveries, 1);
            Tally::add(&shard.tally.payload_out, broadcast.payload_len());
        }
    }

    fn count(shard: &State, batch: &Batch) {
        Tally::add(&shard.tally.deliveries, batch.len());
        Tally::add(&shard.tally.payload_out, batch.payload_len());
    }

    /// Queues bytes if the bound allows; otherwise marks the connection as a slow consumer.
    pub(super) fn queue(&mut self, shard: &mut State, frame: Frame, lane: Lane) -> bool {
        let limit = shard.settings.limits.outbound.get();
        self.queue_within(shard, frame, lane, limit)
    }

    fn queue_within(&mut self, shard: &mut State, frame: Frame, lane: Lane, limit: usize) -> bool {
        if self.close_after_turn.is_some() {
            return false; // It would follow what did not fit.
        }
        let pushed = self.outbound.push(frame, lane, limit);
        if pushed == Err(Full) {
            self.close_after_turn(shard, CloseReason::SlowConsumer);
            return false;
        }
        self.count_outbound(shard);
        true
    }

    /// Queues a publication of a room whose older publications are dropped for newer ones, and reports the
    /// gap.
    fn queue_over(
        &mut self,
        shard: &mut State,
        frame: Frame,
        lane: RoomLane,
        overflow: Overflow,
        room: &RoomName,
    ) -> bool {
        if self.close_after_turn.is_some() {
            return false; // It would follow a gap that the session has not been notified of.
        }
        let limit = shard.settings.limits.outbound.get();
        let full = !self.outbound.fits(frame.len(), limit);
        let behind = overflow == Overflow::Latest && self.wants_write;
        if !(full || behind) || !self.outbound.may_drop(lane.room) {
            return self.queue(shard, frame, Lane::Room(lane));
        }
        let mut notice = None;
        if !self.outbound.has_gap_notice(lane.room) {
            let mut packets = shard.take_packets();
            let then = self.session.dropped(room, &mut packets);
            notice = packets.take_joined();
            shard.give_packets(packets);
            if let Then::Close(reason) = then {
                self.close_after_turn(shard, reason);
                return false;
            }
        }
        let all = overflow == Overflow::Latest;
        let pushed = self.outbound.push_over(frame, lane, limit, all, notice);
        self.count_outbound(shard);
        let Ok(dropped) = pushed else {
            self.close_after_turn(shard, CloseReason::SlowConsumer);
            return false;
        };
        Tally::add(if all { &shard.tally.dropped_for_latest } else { &shard.tally.dropped_oldest }, dropped);
        true
    }

    /// Closes the connection at the end of the turn: one notice covers everything that did not fit into it.
    fn close_after_turn(&mut self, shard: &mut State, reason: CloseReason) {
        self.close_after_turn = self.close_after_turn.or(Some(reason));
        self.touch(shard);
    }
}

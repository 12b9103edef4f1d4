//! What a connection holds of the node's memory, and how it gives it back.

use broker_bridge::PublishRequest;

use super::{Carrier, Connection, Counted, Phase};
use crate::{
    shard::{tally::Tally, worker::Worker},
    vocabulary::CloseReason,
    websocket::Decoder,
};

/// What a connection must hold to be worth closing for it.
pub const NOTABLE: usize = 1024;
/// What a publication that waits for the broker costs beside its payload.
const PER_PUBLICATION: usize = 256;

impl Connection {
    /// What is kept for this session: what waits for its client and for the broker, and half a message.
    pub fn fullness(&self) -> usize {
        let waiting = self.outbound.borrow().cost() + self.unsent();
        waiting + self.decoder.borrow().heap_bytes() + self.counted.get().blocked
    }

    /// The bytes of the publications that wait, and the oldest and the newest of them; `None` if there are none.
    pub fn publications(&self) -> Option<(usize, [usize; 2])> {
        let outbound = self.outbound.borrow();
        outbound.ends().map(|ends| (outbound.shared(), ends))
    }

    /// Counts what the queue and the socket hold now.
    pub(super) fn count_outbound(&self, worker: &Worker) {
        let before = self.counted.get();
        let now = {
            let outbound = self.outbound.borrow();
            Counted { queued: outbound.len(), outbound: outbound.held() + self.unsent(), ..before }
        };
        self.counted.set(now);
        shift(&worker.tally.outbound_bytes, before.queued, now.queued);
        shift(&worker.tally.outbound_held, before.outbound, now.outbound);
    }

    /// Joins the shard's list of connections that hold something, if it does.
    pub fn note_holding(&self, worker: &Worker) {
        if !self.holds.get() && self.fullness() >= NOTABLE {
            self.holds.set(true);
            worker.note_holder(self.key);
        }
    }

    /// The node is short of memory, and this connection holds much of it. One that is closing already loses what it
    /// still waits for.
    pub fn give_way(&self, worker: &Worker) {
        if matches!(self.phase.get(), Phase::Closing(_)) {
            self.outbound.borrow_mut().discard();
            self.count_outbound(worker);
            self.cut();
        } else {
            self.begin_close(worker, CloseReason::OutOfMemory);
        }
    }

    /// Forgets all that it holds: it is gone.
    pub fn give_back(&self, worker: &Worker) {
        self.outbound.borrow_mut().discard();
        self.count_outbound(worker);
        self.drop_blocked(worker);
        self.drop_incomplete(worker);
    }

    // ---- publications that wait for the broker ----

    /// Whether a publication waits for room in the broker's queue.
    pub(super) fn is_blocked(&self) -> bool {
        self.counted.get().blocked > 0
    }

    pub(super) fn block(&self, worker: &Worker, request: PublishRequest) {
        self.count_blocked(worker, self.counted.get().blocked + cost(&request));
        self.blocked.borrow_mut().push_back(request);
    }

    /// Hands over, in order, what waits for room in the broker's queue.
    pub async fn publish_blocked(&self, worker: &Worker) {
        loop {
            let Some(request) = self.blocked.borrow_mut().pop_front() else { break };
            // Counted until the queue has taken it.
            let cost = cost(&request);
            worker.context.broker.publish(request).await;
            self.count_blocked(worker, self.counted.get().blocked.saturating_sub(cost));
        }
        self.wake();
    }

    pub(super) fn drop_blocked(&self, worker: &Worker) {
        let dropped: usize = self.blocked.take().iter().map(cost).sum();
        self.count_blocked(worker, self.counted.get().blocked.saturating_sub(dropped));
    }

    fn count_blocked(&self, worker: &Worker, now: usize) {
        let before = self.counted.get();
        self.counted.set(Counted { blocked: now, ..before });
        shift(&worker.tally.publications_held, before.blocked, now);
    }

    // ---- half a message ----

    /// Counts what the decoder keeps, which was so much before.
    pub(super) fn count_incomplete(worker: &Worker, before: usize, after: usize) {
        shift(&worker.tally.incomplete_held, before, after);
    }

    /// Drops half a message. Nothing that the client sends is understood after that.
    pub(super) fn drop_incomplete(&self, worker: &Worker) {
        let held = self.decoder.borrow().heap_bytes();
        if held > 0 {
            self.deaf.set(true);
            self.decoder.replace(Decoder::new());
            Self::count_incomplete(worker, held, 0);
        }
    }

    /// Bytes that TLS has taken and the socket has not.
    fn unsent(&self) -> usize {
        match &*self.carrier.borrow() {
            Carrier::Socket { stream, .. } => stream.unsent(),
            Carrier::Coming | Carrier::Response(_) | Carrier::Gone => 0,
        }
    }
}

fn cost(request: &PublishRequest) -> usize {
    request.publication.data.bytes().len() + PER_PUBLICATION
}

#[expect(clippy::cast_possible_wrap, reason = "what one connection holds is bounded far below")]
fn shift(cell: &std::cell::Cell<i64>, before: usize, after: usize) {
    Tally::shift(cell, after as i64 - before as i64);
}

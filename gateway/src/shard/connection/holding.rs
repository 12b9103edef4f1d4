//! How much of the node's memory a connection holds, and how it gives it back.

use broker_bridge::PublishRequest;

use super::{Attachment, Connection, Counted, Phase};
use crate::{
    shard::{tally::Tally, worker::Worker},
    vocabulary::CloseReason,
    websocket::Decoder,
};

/// The least number of bytes that makes a connection worth closing to free memory.
pub const NOTABLE: usize = 1024;
/// What a blocked publication costs besides its payload.
const PER_PUBLICATION: usize = 256;

impl Connection {
    /// Bytes held for this session: output for its client, publications for the broker, and an incomplete
    /// message.
    pub fn fullness(&self) -> usize {
        let waiting = self.outbound.borrow().cost() + self.unsent();
        waiting + self.decoder.borrow().heap_bytes() + self.counted.get().blocked
    }

    /// The bytes of the queued publications, and the oldest and the newest of them; `None` if there are none.
    pub fn publications(&self) -> Option<(usize, [usize; 2])> {
        let outbound = self.outbound.borrow();
        outbound.ends().map(|ends| (outbound.shared(), ends))
    }

    /// Updates the tally of what the queue and the socket hold.
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

    /// Adds the connection to the shard's list of connections that hold memory, if it holds enough.
    pub fn note_holding(&self, worker: &Worker) {
        if !self.holds.get() && self.fullness() >= NOTABLE {
            self.holds.set(true);
            worker.note_holder(self.key);
        }
    }

    /// Frees memory, because the node is short of it and this connection holds much. Begins to close the
    /// connection; if it is closing already, drops the rest of its output.
    pub fn free_memory(&self, worker: &Worker) {
        if matches!(self.phase.get(), Phase::Closing(_)) {
            self.outbound.borrow_mut().discard();
            self.count_outbound(worker);
            self.cut();
        } else {
            self.begin_close(worker, CloseReason::OutOfMemory);
        }
    }

    /// Drops everything it holds: the connection has ended.
    pub fn release_memory(&self, worker: &Worker) {
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

    /// Hands the blocked publications to the broker, in order, as its queue gets room.
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

    // ---- incomplete messages ----

    /// Updates the tally of what the decoder holds; it was `before`.
    pub(super) fn count_incomplete(worker: &Worker, before: usize, after: usize) {
        shift(&worker.tally.incomplete_held, before, after);
    }

    /// Drops an incomplete message. Input from the client cannot be parsed after that.
    pub(super) fn drop_incomplete(&self, worker: &Worker) {
        let held = self.decoder.borrow().heap_bytes();
        if held > 0 {
            self.ignores_input.set(true);
            self.decoder.replace(Decoder::new());
            Self::count_incomplete(worker, held, 0);
        }
    }

    /// Bytes that TLS has taken and the socket has not.
    fn unsent(&self) -> usize {
        match &*self.attachment.borrow() {
            Attachment::Socket { stream, .. } => stream.unsent(),
            Attachment::Pending | Attachment::Response(_) | Attachment::Detached => 0,
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

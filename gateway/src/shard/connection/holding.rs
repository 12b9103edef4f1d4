//! How much of the node's memory a connection holds, and how it gives it back.

use broker_bridge::PublishRequest;

use super::{Attachment, Connection, Counted, Phase};
use crate::{
    shard::{
        state::{Action, State},
        tally::Tally,
        transport::{Socket as _, Transport},
    },
    vocabulary::CloseReason,
    websocket::Decoder,
};

/// The least number of bytes that makes a connection worth closing to free memory.
pub const NOTABLE: usize = 1024;
/// What a blocked publication costs besides its payload.
const PER_PUBLICATION: usize = 256;

impl<T: Transport> Connection<T> {
    /// Bytes held for this session: output for its client, publications for the broker, and an incomplete
    /// message.
    pub fn fullness(&self) -> usize {
        let waiting = self.outbound.cost() + self.unsent();
        waiting + self.decoder.heap_bytes() + self.counted.behind + self.counted.blocked
    }

    /// What its outbound queue costs, in bytes.
    pub fn queued(&self) -> usize {
        self.outbound.cost()
    }

    /// The bytes of the queued publications, and the oldest and the newest of them; `None` if there are none.
    pub fn publications(&self) -> Option<(usize, [usize; 2])> {
        self.outbound.ends().map(|ends| (self.outbound.shared(), ends))
    }

    /// Updates the tally of what the queue and the socket hold.
    pub(super) fn count_outbound(&mut self, shard: &mut State) {
        let before = self.counted;
        let outbound = self.outbound.held() + self.unsent();
        let now = Counted { queued: self.outbound.len(), outbound, ..before };
        self.counted = now;
        shift(&shard.tally.outbound_bytes, before.queued, now.queued);
        shift(&shard.tally.outbound_held, before.outbound, now.outbound);
    }

    /// Adds the connection to the shard's list of connections that hold memory, if it holds enough.
    pub fn note_holding(&mut self, shard: &mut State) {
        if !self.holds && self.fullness() >= NOTABLE {
            self.holds = true;
            shard.new_holders.push(self.key);
        }
    }

    /// Frees memory, because the node is short of it and this connection holds much. Begins to close the
    /// connection; if it is closing already, drops the rest of its output.
    pub fn free_memory(&mut self, shard: &mut State) {
        if matches!(self.phase, Phase::Closing(_)) {
            self.outbound.discard();
            self.count_outbound(shard);
            self.cut();
        } else {
            self.begin_close(shard, CloseReason::OutOfMemory);
        }
    }

    /// Drops everything it holds: the connection has ended.
    pub fn release_memory(&mut self, shard: &mut State) {
        self.outbound.discard();
        self.count_outbound(shard);
        self.drop_blocked(shard);
        self.drop_behind(shard);
        self.drop_incomplete(shard);
    }

    // ---- publications that wait for the broker ----

    /// Whether a publication waits for room in the broker's queue.
    pub(super) fn is_blocked(&self) -> bool {
        self.counted.blocked > 0
    }

    pub(super) fn block(&mut self, shard: &mut State, request: PublishRequest) {
        self.count_blocked(shard, self.counted.blocked + cost(&request));
        self.blocked.push_back(request);
    }

    /// Has the driver hand a publication to the broker once its queue has space. Counted until then.
    pub(super) fn wait_for_broker(&mut self, shard: &mut State, request: PublishRequest) {
        let cost = cost(&request);
        self.count_blocked(shard, self.counted.blocked + cost);
        shard.actions.push_back(Action::Publish(self.key, request, cost));
    }

    /// The broker's queue has taken a publication that was waiting; hands over those that wait behind it, in
    /// order.
    pub fn handed_over(&mut self, shard: &mut State, cost: usize) {
        self.count_blocked(shard, self.counted.blocked.saturating_sub(cost));
        while let Some(request) = self.blocked.pop_front() {
            self.count_blocked(shard, self.counted.blocked.saturating_sub(self::cost(&request)));
            if let Err(request) = shard.context.broker.try_publish(request) {
                return self.wait_for_broker(shard, request);
            }
        }
        self.wake();
    }

    pub(super) fn drop_blocked(&mut self, shard: &mut State) {
        let dropped: usize = std::mem::take(&mut self.blocked).iter().map(cost).sum();
        self.count_blocked(shard, self.counted.blocked.saturating_sub(dropped));
    }

    fn count_blocked(&mut self, shard: &mut State, now: usize) {
        let before = self.counted;
        self.counted = Counted { blocked: now, ..before };
        shift(&shard.tally.publications_held, before.blocked, now);
    }

    // ---- incomplete messages ----

    /// Updates the tally of what the decoder holds; it was `before`.
    pub(super) fn count_incomplete(shard: &State, before: usize, after: usize) {
        shift(&shard.tally.incomplete_held, before, after);
    }

    /// Updates the tally of the commands that wait for the verification of a token.
    pub(super) fn count_behind(&mut self, shard: &State) {
        let before = self.counted;
        self.counted = Counted { behind: self.session.held(), ..before };
        shift(&shard.tally.incomplete_held, before.behind, self.counted.behind);
    }

    /// Drops the commands that wait for the verification of a token.
    pub(super) fn drop_behind(&mut self, shard: &State) {
        self.session.drop_held();
        self.count_behind(shard);
    }

    /// Drops an incomplete message. Input from the client cannot be parsed after that.
    pub(super) fn drop_incomplete(&mut self, shard: &mut State) {
        let held = self.decoder.heap_bytes();
        if held > 0 {
            self.ignores_input = true;
            self.decoder = Decoder::new();
            Self::count_incomplete(shard, held, 0);
        }
    }

    /// Bytes that TLS has taken and the socket has not.
    fn unsent(&self) -> usize {
        match &self.attachment {
            Attachment::Socket { socket, .. } => socket.unsent(),
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

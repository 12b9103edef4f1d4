//! Sessions that read parts of rooms' histories.
//!
//! A session has one reading under way; its other requests wait. The next begins once the client has read some of its
//! replies, and while any wait the client's input is not read. So a client that asks for much holds no more than its
//! queue and one reply.

use std::{collections::VecDeque, sync::Arc};

use broker_bridge::{
    BrokerError, Cursor, RoomName,
    history::{Page, Start},
};

use super::{
    connection::{Connection, Phase},
    recovery::MAX_REPLY,
    state::{Action, State},
    transport::Transport,
};
use crate::{
    protocol::{History, HistoryQuery, RequestId},
    vocabulary::{Outcome, ReplyError},
};

/// What a session has asked for.
#[derive(Debug, Default)]
pub struct Reads {
    is_reading: bool,
    waiting: VecDeque<(RequestId, RoomName, HistoryQuery)>,
}

impl Reads {
    /// Whether any request waits for another one.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}

impl<T: Transport> Connection<T> {
    /// Reads a part of a room's history, after what it has asked for before.
    pub(super) fn read_history(
        &mut self,
        shard: &mut State,
        request: RequestId,
        room: RoomName,
        query: HistoryQuery,
    ) {
        self.reads.get_or_insert_default().waiting.push_back((request, room, query));
        self.read_next(shard);
    }

    /// Begins the next reading, if there is space for its reply.
    pub(super) fn read_next(&mut self, shard: &mut State) {
        let has_space = self.queued() < shard.settings.limits.outbound.get() / 4;
        let Some(reads) = &mut self.reads else { return };
        if reads.is_reading || !has_space {
            return;
        }
        match reads.waiting.pop_front() {
            None => self.reads = None,
            Some((request, room, query)) => {
                reads.is_reading = true;
                let retention = shard.settings.history.of(&room);
                shard.actions.push_back(Action::ReadHistory(self.key(), request, room, retention, query));
            }
        }
    }

    /// What it has asked for was read, or cannot be.
    pub(super) fn history_read(
        &mut self,
        shard: &mut State,
        request: RequestId,
        outcome: Option<&Result<Arc<Page>, BrokerError>>,
    ) {
        if matches!(self.phase(), Phase::Closing(_)) {
            return;
        }
        let shown: Vec<_>;
        let outcome = match outcome {
            None => Err(ReplyError::NotAvailable),
            Some(Err(error)) => {
                tracing::debug!(session = %self.id(), %error, "a history could not be read");
                Err(Outcome::from(error).reply)
            }
            Some(Ok(page)) if page.start == Start::Lost => Err(ReplyError::Unrecoverable),
            Some(Ok(page)) => {
                let entries = page.entries.iter();
                shown = entries.map(|entry| (&entry.publication, entry.place.cursor)).collect();
                let space = shard.settings.limits.outbound.get() / 4;
                let most = space.saturating_sub(self.queued()).min(MAX_REPLY);
                page.top.map_or(Err(ReplyError::Internal), |top| {
                    let epoch = shown.first().map_or(top.epoch, |(_, cursor)| cursor.epoch);
                    let position = Cursor { epoch, ..top };
                    Ok(History { position, publications: &shown, most })
                })
            }
        };
        self.tell_history(shard, request, outcome);
        let was_waiting = self.reads.as_mut().is_some_and(|reads| {
            reads.is_reading = false;
            reads.is_waiting()
        });
        self.read_next(shard);
        if was_waiting {
            self.wake();
        }
        self.flush_unless_full(shard);
    }
}

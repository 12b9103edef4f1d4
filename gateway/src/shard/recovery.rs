//! Sessions that come back to a room by a request, and get what they have missed with the reply.
//!
//! The reply holds as much as fits into it. The rest follows like that of any other member that
//! [catches up](super::catchup). A session that asks for it is told whether it continues where it left off. If not, it
//! begins with the next publication, and its client loads its state anew.

use std::sync::Arc;

use broker_bridge::{Cursor, RoomName, SessionId};

use super::{
    Core,
    catchup::{Lost, Place},
    connection::ConnectionKey,
    tally::Tally,
    transport::Transport,
};
use crate::{
    framing::Broadcast,
    hub::{Begin, Hub, log::Item},
    protocol::{Recover, RequestId, Subscribed},
    vocabulary::ReplyError,
};

/// The most bytes in a reply. Some clients accept no message of more than 1 MiB.
pub const MAX_REPLY: usize = 512 * 1024;
/// How much of a reply is not publications.
const AROUND: usize = 512;

/// What a session has missed, from the position on that it has named.
struct Missed {
    /// The publications that it receives, with their numbers.
    publications: Vec<(u64, Arc<Broadcast>, Cursor)>,
    /// The position before the first, in the same epoch.
    before: Option<Cursor>,
    /// The number of the next item.
    next: u64,
}

impl<T: Transport> Core<T> {
    /// Replies to a session that asked for a room, which has now been acknowledged or refused. `None` if the session does
    /// not become a member. Otherwise where it catches up, which is nowhere if the room has no history.
    pub(super) fn reply_to_join(
        &mut self,
        key: ConnectionKey,
        request: RequestId,
        room: &RoomName,
        recover: Option<Recover>,
        outcome: Result<Option<Begin>, ReplyError>,
    ) -> Option<Place> {
        let share = self.state.settings.limits.outbound.get() / 4;
        let connection = self.connections.get_mut(key)?;
        let begin = match outcome {
            Ok(begin) => begin,
            Err(error) => {
                connection.joined(&mut self.state, request, room, Err(error));
                return None;
            }
        };
        let most = share.saturating_sub(connection.queued()).min(MAX_REPLY);
        let hub = &self.state.context.hub;
        let missed = begin.filter(|begin| begin.gap.is_none()).zip(recover).and_then(|(begin, recover)| {
            if begin.is_snapshot {
                return Missed::newest(hub, room, &begin, recover.since);
            }
            Missed::find(hub, room, &begin, connection.id(), most.saturating_sub(AROUND))
        });
        let recovered = recover.map(|_| missed.is_some());
        match recovered.filter(|_| begin.is_some()) {
            Some(true) => self.state.context.metrics.recovered.inc(),
            Some(false) => self.state.context.metrics.unrecovered.inc(),
            None => {}
        }
        if recover.is_some_and(|recover| recover.or_fail) && missed.is_none() {
            let error = match begin.map(|begin| begin.top) {
                None => ReplyError::NotAvailable,
                Some(None) => ReplyError::NotNow,
                Some(Some(_)) => ReplyError::Unrecoverable,
            };
            connection.joined(&mut self.state, request, room, Err(error));
            return None;
        }
        let position = match (&missed, recover) {
            (Some(missed), Some(recover)) => Some(missed.before.unwrap_or(recover.since)),
            _ => begin.and_then(|begin| begin.top),
        };
        let publications = missed.as_ref().map_or(&[][..], |missed| &missed.publications);
        let shown: Vec<_> =
            publications.iter().map(|(_, broadcast, cursor)| (broadcast.publication(), *cursor)).collect();
        let subscribed = Subscribed { position, recovered, missed: &shown, most };
        let held = connection.joined(&mut self.state, request, room, Ok(subscribed))?;
        Tally::add(&self.state.tally.deliveries, held);
        let payload = publications.iter().take(held).map(|(_, broadcast, _)| broadcast.payload_len()).sum();
        Tally::add(&self.state.tally.payload_out, payload);
        let rest = publications.get(held).map(|(number, ..)| *number);
        let live = begin.map_or(0, |begin| begin.live);
        let next = rest.or(missed.as_ref().map(|missed| missed.next)).unwrap_or(live);
        let epoch = position.map(|position| position.epoch);
        let last = publications.iter().take(held).next_back().map(|(.., cursor)| *cursor);
        let (room, position) = (room.clone(), last.or(position));
        Some(Place { room, next, live, epoch, position, is_snapshot: false, lost: Lost::Not })
    }

    /// A member that has got its reply catches up from here.
    pub(super) fn begin_at(&mut self, key: ConnectionKey, place: Place) {
        if place.live == 0 {
            return self.end_catching_up(key, &place.room, 0);
        }
        if let Some(connection) = self.connections.get_mut(key) {
            connection.catch_up_from(&mut self.state, place);
        }
    }
}

impl Missed {
    /// Collects publications of about `most` bytes, and of one epoch. `None` if something may be missing before the
    /// first.
    fn find(hub: &Hub, room: &RoomName, begin: &Begin, session: SessionId, most: usize) -> Option<Self> {
        let mut missed = Self { publications: Vec::new(), before: None, next: begin.from };
        let mut bytes = 0;
        loop {
            let piece = hub.piece(room, missed.next, most.saturating_sub(bytes))?;
            if piece.has_lost {
                return missed.if_proven();
            }
            let is_last = piece.is_end || piece.items.is_empty();
            for (number, item) in piece.items {
                match item {
                    Item::Publication(broadcast, Some(cursor))
                        if missed.before.is_none_or(|before| before.epoch == cursor.epoch) =>
                    {
                        let before = Cursor { offset: cursor.offset.saturating_sub(1), ..cursor };
                        missed.before.get_or_insert(before);
                        bytes += broadcast.cost();
                        missed.next = number + 1;
                        if broadcast.exclude() != Some(session) {
                            missed.publications.push((number, broadcast, cursor));
                        }
                    }
                    // Since the session has joined: not missed.
                    _ if number >= begin.live => return Some(missed),
                    Item::Publication(..) | Item::Gap(_) => return missed.if_proven(),
                }
            }
            if is_last || bytes >= most {
                return Some(missed);
            }
        }
    }

    /// Finds the newest publication, unless the client has it. `None` if there is none, and the client has received others.
    fn newest(hub: &Hub, room: &RoomName, begin: &Begin, since: Cursor) -> Option<Self> {
        let nothing = Self { publications: Vec::new(), before: None, next: begin.live };
        if begin.from == begin.live {
            return (begin.top == Some(since)).then_some(nothing);
        }
        match hub.piece(room, begin.from, 0)?.items.into_iter().next()? {
            (number, Item::Publication(broadcast, Some(cursor))) if number == begin.from => {
                if cursor == since {
                    return Some(nothing);
                }
                let before = Cursor { offset: cursor.offset.saturating_sub(1), ..cursor };
                Some(Self {
                    publications: vec![(number, broadcast, cursor)],
                    before: Some(before),
                    ..nothing
                })
            }
            _ => None,
        }
    }

    /// Whatever comes next, the client continues where it left off if it gets anything before that.
    fn if_proven(self) -> Option<Self> {
        self.before.is_some().then_some(self)
    }
}

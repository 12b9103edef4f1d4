//! Members that catch up in a room with a history.
//!
//! Whoever joins such a room begins at a certain item of the room's ring ([`Begin`]): with the first that was missed, or
//! with the next to come. Until it has reached the newest, it gets none of the broadcasts, and takes pieces of the ring
//! instead, each at most a quarter of what its queue may hold, and the next when there is space again. So a client that
//! has missed much and reads slowly costs no more memory than others, and does not look slow.
//!
//! A ring gives up its oldest items when it is full, or the node's memory is. Whoever has not received them by then has
//! them read from the log once more, and is told of a gap if it has given them up, too.
//!
//! When a piece reaches the end of the ring, the member receives what comes after it: broadcasts carry the number of
//! their item, so what is on its way to this shard already is neither lost nor doubled.

use broker_bridge::{BrokerError, Cursor, GapCause, RoomName};

use super::{
    Core, ShardEvent,
    batch::Batch,
    connection::{Connection, ConnectionKey},
    fanout::delivery,
    joined_text,
    rooms::Membership,
    state::{Action, Resuming, State},
    transport::Transport,
};
use crate::{
    delivery::Overflow,
    history::Join,
    hub::{Begin, log::Item},
};

/// The number from which a member receives broadcasts while it catches up: never.
pub const NEVER: u64 = u64::MAX;

/// The rooms in which a connection catches up, one after the other.
#[derive(Debug, Default)]
pub struct CatchingUp {
    rooms: Vec<Place>,
    /// Whether it waits for space in the connection's queue.
    waits: bool,
}

/// How far a connection has come in a room.
#[derive(Clone, Debug)]
pub struct Place {
    pub room: RoomName,
    /// The number of the next item.
    pub next: u64,
    /// The number of the first item that came after it had joined.
    pub live: u64,
    /// The epoch of its position, if it knows one.
    pub epoch: Option<u64>,
    /// The position up to which it has received everything, if it is known.
    pub position: Option<Cursor>,
    /// Whether what is missing before that item does not count.
    pub is_snapshot: bool,
    /// Whether the ring has given up what comes next, and where that has led.
    pub lost: Lost,
}

/// Whether the ring has given up what a member has to receive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lost {
    /// No.
    #[default]
    Not,
    /// It is being read from the log.
    Awaited,
    /// It was read from the log, or cannot be.
    Read,
}

impl<T: Transport> Core<T> {
    /// A member that gets no broadcasts yet begins here.
    pub(super) fn begin_catching_up(&mut self, key: ConnectionKey, room: &RoomName, begin: Option<Begin>) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if connection.memberships.get(room).is_none_or(|membership| membership.from != NEVER) {
            return;
        }
        let Begin { from, live, gap, after, position, top: _, is_snapshot } =
            begin.unwrap_or(Begin::without_history(None));
        if let Some(cause) = gap {
            self.tell(key, room, cause);
        }
        let Some(connection) = self.connections.get_mut(key) else { return };
        if connection.memberships.get(room).is_none() {
            return; // left because of the gap
        }
        if let Some(position) = position {
            connection.positioned(&mut self.state, room, position);
        }
        let epoch = position.map(|position| position.epoch);
        let position = after.filter(|_| gap.is_none()).or(position);
        let (room, lost) = (room.clone(), Lost::Not);
        self.begin_at(key, Place { room, next: from, live, epoch, position, is_snapshot, lost });
    }

    /// Continues with the next piece.
    pub(super) fn catch_up(&mut self, key: ConnectionKey) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let share = self.state.settings.limits.outbound.get() / 4;
        let Some(place) = connection.next_to_catch_up(share) else { return };
        let Place { room, next, live, mut epoch, mut position, is_snapshot, lost } = place;
        // A snapshot is as much of the past as there is, with whatever may be missing in it.
        let is_past = |number| is_snapshot && number < live;
        let space = share.saturating_sub(connection.queued());
        let Some(piece) = self.state.context.hub.piece(&room, next, space) else {
            return self.end_catching_up(key, &room, 0);
        };
        let first = piece.items.first().map_or(piece.next, |(number, _)| *number);
        // All up to the first live one may be missing in a snapshot, but no more.
        if piece.has_lost && !(is_snapshot && first <= live) {
            if lost == Lost::Not
                && let Some(cursor) = position
                && let Some(resuming) = self.state.context.hub.resume(&room, cursor)
            {
                connection.set_catch_up(&room, |place| place.lost = Lost::Awaited);
                return self.state.actions.push_back(Action::Resume(key, room, cursor, Resuming(resuming)));
            }
            self.tell(key, &room, GapCause::Trimmed);
        }
        let mut batch = Batch::default();
        let mut has_unrecorded = false;
        let mut reached = piece.next;
        let joins = self.state.settings.history.join(&room) == Join::Text;
        let items =
            if joins { joined_text::join(piece.items, &self.state.context.budget) } else { piece.items };
        for (number, item) in items {
            let gap = match item {
                Item::Publication(broadcast, cursor) if cursor.is_some() || number >= live => {
                    has_unrecorded = false;
                    let before = position;
                    position = cursor.or(position);
                    if let Some(cursor) = cursor
                        && epoch.replace(cursor.epoch).is_some_and(|before| before != cursor.epoch)
                    {
                        self.deliver_to(key, &room, &mut batch);
                        self.tell_new_epoch(key, &room);
                    }
                    if !batch.takes(&broadcast, share / 4) {
                        self.deliver_to(key, &room, &mut batch);
                        // Encoded it may be several times as much.
                        if self.connections.get(key).is_some_and(|connection| connection.queued() >= share) {
                            (reached, position) = (number, before);
                            break;
                        }
                    }
                    batch.push(broadcast);
                    continue;
                }
                _ if is_past(number) => continue,
                // Nobody can tell whether the client has received it before it came back.
                Item::Publication(..) if has_unrecorded => continue,
                Item::Publication(..) => {
                    has_unrecorded = true;
                    GapCause::Unrecorded
                }
                Item::Gap(cause) => cause,
            };
            self.deliver_to(key, &room, &mut batch);
            self.tell(key, &room, gap);
        }
        self.deliver_to(key, &room, &mut batch);
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.set_catch_up(&room, |place| {
            (place.next, place.epoch, place.position, place.lost) = (reached, epoch, position, Lost::Not);
        });
        if piece.is_end && reached == piece.next {
            self.end_catching_up(key, &room, reached);
        }
        if let Some(connection) = self.connections.get_mut(key) {
            connection.touch(&mut self.state);
            if connection.is_catching_up() {
                self.state.inbox.post(ShardEvent::CatchUp(key));
                // Sockets and responses take what is queued between two pieces.
                self.must_yield = true;
            }
        }
    }

    /// It is known where a member continues that had not received what the ring has given up, see [`Action::Resume`].
    pub fn resumed(
        &mut self,
        key: ConnectionKey,
        room: &RoomName,
        cursor: Cursor,
        outcome: Result<Begin, BrokerError>,
    ) {
        let is_awaited = |place: &Place| place.lost == Lost::Awaited && place.position == Some(cursor);
        let Some(connection) = self.connections.get_mut(key) else { return };
        if !connection.catches_up(room, is_awaited) {
            return; // It has left since.
        }
        let begin =
            outcome.inspect_err(|error| tracing::debug!(%room, %error, "cannot read a history again"));
        let gap = begin.as_ref().ok().and_then(|begin| begin.gap);
        connection.set_catch_up(room, |place| {
            place.lost = Lost::Read;
            if let Ok(begin) = &begin {
                place.next = begin.from;
            }
        });
        if let Some(cause) = gap {
            self.tell(key, room, cause);
        }
        if let Some(connection) = self.connections.get_mut(key)
            && connection.is_catching_up()
        {
            self.state.inbox.post(ShardEvent::CatchUp(key));
        }
    }

    /// Tells the member of a gap. If that ends its membership, it gets nothing more.
    fn tell(&mut self, key: ConnectionKey, room: &RoomName, cause: GapCause) {
        if let Some(connection) = self.connections.get_mut(key)
            && connection.memberships.get(room).is_some()
        {
            connection.gap(&mut self.state, room, cause);
            self.settle();
        }
    }

    /// Tells the member that positions have another epoch. That may end its membership, too.
    fn tell_new_epoch(&mut self, key: ConnectionKey, room: &RoomName) {
        if let Some(connection) = self.connections.get_mut(key)
            && connection.memberships.get(room).is_some()
        {
            connection.new_epoch(&mut self.state, room);
            self.settle();
        }
    }

    /// Queues the batch for one member, and empties it.
    fn deliver_to(&mut self, key: ConnectionKey, room: &RoomName, batch: &mut Batch) {
        if batch.len() > 0
            && let Some(connection) = self.connections.get_mut(key)
            && let Some(known) = self.rooms.get(room)
            && let Some(place) = connection.memberships.get(room).map(Membership::place)
            && let Some(member) = known.members.get(place)
        {
            let mut delivery = delivery(&self.state, batch, known.traits());
            if delivery.overflow == Overflow::Latest {
                // The client has asked for what it has missed, so all of it counts, not only the newest. What is queued
                // of it is no sign that the client reads slowly. Only drop what does not fit.
                delivery.overflow = Overflow::DropOldest;
            }
            connection.deliver(&mut self.state, member, &delivery);
            connection.touch(&mut self.state);
            self.written.add(batch);
        }
        batch.take().for_each(drop);
    }

    /// The member receives broadcasts from number `from` on.
    pub(super) fn end_catching_up(&mut self, key: ConnectionKey, room: &RoomName, from: u64) {
        if let Some(connection) = self.connections.get_mut(key) {
            connection.stop_catching_up(room);
            self.rooms.end_catching_up(room, connection, from);
        }
    }
}

impl<T: Transport> Connection<T> {
    /// Remembers where it catches up, and asks for its first turn.
    pub(super) fn catch_up_from(&mut self, shard: &mut State, place: Place) {
        let catching_up = self.catching_up.get_or_insert_default();
        catching_up.rooms.push(place);
        if catching_up.rooms.len() == 1 {
            shard.inbox.post(ShardEvent::CatchUp(self.key()));
        }
    }

    /// The next room to continue in. `None` if there is none, or it has to wait for space.
    fn next_to_catch_up(&mut self, share: usize) -> Option<Place> {
        let has_space = self.queued() < share;
        let catching_up = self.catching_up.as_mut()?;
        catching_up.waits = !has_space;
        catching_up.rooms.first().filter(|place| has_space && place.lost != Lost::Awaited).cloned()
    }

    fn set_catch_up(&mut self, room: &RoomName, set: impl FnOnce(&mut Place)) {
        let mut rooms = self.catching_up.iter_mut().flat_map(|catching_up| &mut catching_up.rooms);
        if let Some(place) = rooms.find(|place| place.room == *room) {
            set(place);
        }
    }

    /// Whether it catches up in a room, at such a place.
    fn catches_up(&self, room: &RoomName, is_there: impl Fn(&Place) -> bool) -> bool {
        let mut rooms = self.catching_up.iter().flat_map(|catching_up| &catching_up.rooms);
        rooms.any(|place| place.room == *room && is_there(place))
    }

    /// Whether there is a room to continue in.
    pub(super) fn is_catching_up(&self) -> bool {
        self.catching_up.is_some()
    }

    /// It has reached the end in this room, or has left it.
    pub(super) fn stop_catching_up(&mut self, room: &RoomName) {
        if let Some(catching_up) = &mut self.catching_up {
            catching_up.rooms.retain(|place| place.room != *room);
            if catching_up.rooms.is_empty() {
                self.catching_up = None;
            }
        }
    }

    /// There may be space in its queue again.
    pub(super) fn resume_catching_up(&mut self, shard: &mut State) {
        let limit = shard.settings.limits.outbound.get() / 4;
        if self.catching_up.as_ref().is_some_and(|catching_up| catching_up.waits) && self.queued() < limit {
            shard.inbox.post(ShardEvent::CatchUp(self.key()));
            if let Some(catching_up) = &mut self.catching_up {
                catching_up.waits = false;
            }
        }
    }
}

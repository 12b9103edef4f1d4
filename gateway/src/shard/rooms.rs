//! The rooms of one shard and their members.

mod members;

use std::{
    collections::{HashMap, hash_map::Entry},
    rc::Rc,
};

use broker_bridge::{Cursor, RoomName};
use bytes::Bytes;
use slotmap::{Key as _, KeyData, SlotMap, new_key_type};

use self::members::Members;
use super::{
    catchup::NEVER,
    connection::{Connection, ConnectionKey, Connections},
    outbound::RoomTag,
    transport::Transport,
};
use crate::{
    delivery::{Delivery, DeliveryPolicies},
    framing::{Encoding, Frame, MemberState},
    room_map::RoomMap,
    shrink,
};

/// The rooms of this shard, with their members.
///
/// A room knows its members by key, and each connection keeps its position in the member list of each of its
/// rooms. Broadcasts find a room by its key, and everything else by its name.
#[derive(Default)]
pub struct Rooms {
    /// Its size is that of the largest crowd of rooms: the keys of rooms that are gone must never be used again.
    by_key: SlotMap<RoomKey, Room>,
    by_name: HashMap<RoomName, RoomKey, foldhash::fast::RandomState>,
    /// The tag of the newest room.
    tagged: u32,
}

new_key_type! {
    /// Identifies a room of this shard for as long as it has members.
    struct RoomKey;
}

/// One room with members on this shard.
pub struct Room {
    /// How its publications are delivered under the current settings.
    policy: Delivery,
    /// Whether the hub knows the room's key.
    is_located: bool,
    /// Tells its frames from those of other rooms in a member's outbound queue. Tags are reused after 2^32
    /// rooms, when no frame of the first one can still be queued.
    tag: RoomTag,
    pub members: Members<Member>,
    /// How many of them catch up, and get no broadcasts yet.
    catching_up: u32,
    /// The highest number from which one of them receives broadcasts.
    latest: u64,
    /// How many of them have heads. For those, each publication is a frame of its own.
    with_heads: u32,
}

/// What a delivery has to know about a room.
#[derive(Clone, Copy)]
pub struct Traits {
    pub tag: RoomTag,
    pub policy: Delivery,
    /// Whether any member has heads.
    pub with_heads: bool,
    /// Whether some members may not receive all broadcasts from this number on.
    pub latest: u64,
}

impl Room {
    /// What a delivery has to know about it.
    pub fn traits(&self) -> Traits {
        let latest = if self.catching_up > 0 { NEVER } else { self.latest };
        Traits { tag: self.tag, policy: self.policy, with_heads: self.with_heads > 0, latest }
    }
}

/// A member of a room: a connection, and how publications are encoded for it.
#[derive(Clone)]
pub struct Member {
    pub connection: ConnectionKey,
    /// Set if the room is not encoded as most of the connection's rooms are, which is rare.
    own: Option<Rc<Own>>,
}

/// A room's encoding that differs from that of the connection's other rooms.
struct Own {
    encoding: Encoding,
    /// The state for its per-member heads, if its encoding has any.
    state: Option<Rc<MemberState>>,
}

impl Member {
    /// A member with this encoding of the room.
    pub fn new<T: Transport>(
        connection: &mut Connection<T>,
        encoding: Encoding,
        state: Option<Rc<MemberState>>,
    ) -> Self {
        let is_usual = state.is_none() && connection.usual_encoding(encoding) == encoding;
        let own = (!is_usual).then(|| Rc::new(Own { encoding, state }));
        Self { connection: connection.key(), own }
    }

    /// How publications are encoded for it, if not like those of most of its connection's rooms.
    pub fn own_encoding(&self) -> Option<Encoding> {
        self.own.as_ref().map(|own| own.encoding)
    }

    /// Whether its messages have per-member heads.
    pub fn has_heads(&self) -> bool {
        self.own.as_ref().is_some_and(|own| own.state.is_some())
    }

    /// Whether the client learns positions in several rooms at once: what it has received in one of them must be true
    /// for all, so no publication overtakes another.
    pub fn is_ordered(&self) -> bool {
        let state = self.own.as_ref().and_then(|own| own.state.as_ref());
        state.is_some_and(|state| state.positions.is_some())
    }

    /// A frame that consists of, or ends with, the bytes shared by all members with the same encoding. `position` is
    /// that of the publication, if it is recorded.
    pub fn frame(&self, shared: Bytes, position: Option<Cursor>) -> Frame {
        let own = self.own.as_ref();
        let head = own.and_then(|own| own.encoding.head(own.state.as_ref()?, position, shared.len()));
        match head {
            Some(head) => Frame::split(head, shared),
            None => shared.into(),
        }
    }
}

/// A connection's rooms.
pub type Memberships = RoomMap<Membership, 1>;

/// A connection's position in a room.
#[derive(Debug)]
pub struct Membership {
    place: u32,
    /// The number of the first message in the room that this member receives, if a [round](super::rounds) was
    /// in progress when it joined.
    pub since: u64,
    /// The number of the first broadcast that this member receives in a room with a history, see [`catchup`](super::catchup).
    pub from: u64,
}

impl Membership {
    /// The member's place among the room's members.
    pub fn place(&self) -> u32 {
        self.place
    }
}

impl Rooms {
    /// Makes `connection` a member of `room`, for messages from number `since` on. Returns false if it is one
    /// already.
    pub fn join<T: Transport>(
        &mut self,
        room: &RoomName,
        connection: &mut Connection<T>,
        member: Member,
        since: u64,
        from: u64,
        policies: &DeliveryPolicies,
    ) -> bool {
        if connection.memberships.get(room).is_some() {
            return false;
        }
        let key = match self.by_name.entry(room.clone()) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(vacant) => {
                self.tagged = self.tagged.checked_add(1).unwrap_or(1);
                let tag = RoomTag::new(self.tagged).unwrap_or(RoomTag::MIN);
                let policy = policies.of(room);
                let members = Members::new();
                *vacant.insert(self.by_key.insert(Room {
                    policy,
                    is_located: false,
                    tag,
                    members,
                    catching_up: 0,
                    latest: 0,
                    with_heads: 0,
                }))
            }
        };
        let Some(known) = self.by_key.get_mut(key) else { return false };
        known.with_heads += u32::from(member.has_heads());
        known.catching_up += u32::from(from == NEVER);
        let place = known.members.push(member);
        connection.memberships.insert(room.clone(), Membership { place, since, from });
        true
    }

    /// Ends one membership of the connection with this key. Returns whether there was one.
    pub fn leave<T: Transport>(
        &mut self,
        room: &RoomName,
        connection: ConnectionKey,
        connections: &mut Connections<T>,
    ) -> bool {
        let connection = connections.get_mut(connection);
        let membership = connection.and_then(|connection| connection.memberships.remove(room));
        if let Some(Membership { place, from, .. }) = membership {
            self.remove(room, place, from, connections);
        }
        membership.is_some()
    }

    /// This member gets no broadcasts any more until it has caught up.
    pub fn catch_up_again<T: Transport>(&mut self, room: &RoomName, connection: &mut Connection<T>) {
        if let Some(membership) = connection.memberships.get_mut(room)
            && let Some(known) = self.by_name.get(room).and_then(|key| self.by_key.get_mut(*key))
            && membership.from != NEVER
        {
            membership.from = NEVER;
            known.catching_up += 1;
        }
    }

    /// This member, which caught up, receives broadcasts from number `from` on.
    pub fn end_catching_up<T: Transport>(
        &mut self,
        room: &RoomName,
        connection: &mut Connection<T>,
        from: u64,
    ) {
        let Some(membership) = connection.memberships.get_mut(room) else { return };
        let Some(key) = self.by_name.get(room) else { return };
        if let Some(known) = self.by_key.get_mut(*key)
            && membership.from == NEVER
        {
            membership.from = from;
            known.catching_up -= 1;
            known.latest = known.latest.max(from);
        }
    }

    /// The room, if it has members.
    pub fn get(&self, room: &RoomName) -> Option<&Room> {
        self.by_key.get(*self.by_name.get(room)?)
    }

    /// The room of a broadcast, if it has members: where the broadcast says that it is, or else by its name.
    pub fn find(&self, place: u64, room: &RoomName) -> Option<&Room> {
        self.by_key.get(KeyData::from_ffi(place).into()).or_else(|| self.get(room))
    }

    /// The room, for a round that continues with the next members.
    pub fn get_mut(&mut self, room: &RoomName) -> Option<&mut Room> {
        self.by_key.get_mut(*self.by_name.get(room)?)
    }

    /// Where the room is, if the hub has not been told yet. Counts as told from now on.
    pub fn take_place(&mut self, room: &RoomName) -> Option<u64> {
        let key = *self.by_name.get(room)?;
        let room = self.by_key.get_mut(key)?;
        (!std::mem::replace(&mut room.is_located, true)).then(|| key.data().as_ffi())
    }

    /// New policies apply.
    pub fn set_policies(&mut self, policies: &DeliveryPolicies) {
        for (name, key) in &self.by_name {
            if let Some(room) = self.by_key.get_mut(*key) {
                room.policy = policies.of(name);
            }
        }
    }

    fn remove<T: Transport>(
        &mut self,
        room: &RoomName,
        place: u32,
        from: u64,
        connections: &mut Connections<T>,
    ) {
        let Some(&key) = self.by_name.get(room) else { return };
        let Some(Room { members, with_heads, catching_up, .. }) = self.by_key.get_mut(key) else { return };
        let removed = members.remove(place, |moved, place| {
            let connection = connections.get_mut(moved.connection);
            if let Some(membership) = connection.and_then(|moved| moved.memberships.get_mut(room)) {
                membership.place = place;
            }
        });
        *with_heads -= u32::from(removed.has_heads());
        *catching_up -= u32::from(from == NEVER);
        if members.is_empty() {
            self.by_key.remove(key);
            self.by_name.remove(room);
            shrink::map(&mut self.by_name);
        }
    }
}

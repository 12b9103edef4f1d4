//! The rooms of one shard and their members.

use std::{
    collections::{HashMap, hash_map::Entry},
    rc::Rc,
};

use broker_bridge::RoomName;
use smallvec::SmallVec;

use super::{connection::Connection, outbound::RoomTag};

/// Who is in which room on this shard.
///
/// A connection keeps, for each of its rooms, its place among the members, so that leaving costs the
/// same in a room of two and of 20,000.
#[derive(Default)]
pub struct Rooms {
    rooms: HashMap<RoomName, Room, foldhash::fast::RandomState>,
    /// The tag of the latest room.
    tagged: u32,
}

/// One room with members on this shard.
pub struct Room {
    /// Tells its frames from those of other rooms in a member's outbound queue. Used again after 2^32 rooms,
    /// when no frame of the first one can be waiting any more.
    pub tag: RoomTag,
    pub members: SmallVec<[Rc<Connection>; 2]>,
}

/// A connection's place in a room.
#[derive(Debug)]
pub struct Membership {
    room: RoomName,
    place: usize,
}

impl Rooms {
    /// Makes `connection` a member of `room`. Returns false if it is one already.
    pub fn join(&mut self, room: &RoomName, connection: &Rc<Connection>) -> bool {
        let mut memberships = connection.memberships.borrow_mut();
        if memberships.iter().any(|membership| membership.room == *room) {
            return false;
        }
        let members = match self.rooms.entry(room.clone()) {
            Entry::Occupied(known) => &mut known.into_mut().members,
            Entry::Vacant(vacant) => {
                self.tagged = self.tagged.checked_add(1).unwrap_or(1);
                let tag = RoomTag::new(self.tagged).unwrap_or(RoomTag::MIN);
                &mut vacant.insert(Room { tag, members: SmallVec::new() }).members
            }
        };
        memberships.push(Membership { room: room.clone(), place: members.len() });
        members.push(Rc::clone(connection));
        true
    }

    /// Ends all memberships of `connection` and returns their rooms.
    pub fn leave_all(&mut self, connection: &Connection) -> SmallVec<[RoomName; 1]> {
        let memberships = connection.memberships.take();
        memberships
            .into_iter()
            .map(|Membership { room, place }| {
                self.remove(&room, place);
                room
            })
            .collect()
    }

    /// Ends one membership of `connection`. Returns whether there was one.
    pub fn leave(&mut self, room: &RoomName, connection: &Connection) -> bool {
        let mut memberships = connection.memberships.borrow_mut();
        let Some(index) = memberships.iter().position(|membership| membership.room == *room) else {
            return false;
        };
        let Membership { place, .. } = memberships.swap_remove(index);
        drop(memberships);
        self.remove(room, place);
        true
    }

    /// The room, if it has members.
    pub fn get(&self, room: &RoomName) -> Option<&Room> {
        self.rooms.get(room)
    }

    /// The members of `room`.
    pub fn members(&self, room: &RoomName) -> &[Rc<Connection>] {
        self.get(room).map_or(&[], |room| room.members.as_slice())
    }

    fn remove(&mut self, room: &RoomName, place: usize) {
        let Some(Room { members, .. }) = self.rooms.get_mut(room) else { return };
        members.swap_remove(place);
        if let Some(moved) = members.get(place) {
            let mut memberships = moved.memberships.borrow_mut();
            if let Some(membership) = memberships.iter_mut().find(|membership| membership.room == *room) {
                membership.place = place;
            }
        }
        if members.is_empty() {
            self.rooms.remove(room);
        }
    }
}

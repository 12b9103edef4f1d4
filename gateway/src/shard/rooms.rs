//! The rooms of one shard and their members.

mod members;

use std::{
    collections::{HashMap, hash_map::Entry},
    rc::Rc,
};

use broker_bridge::RoomName;
use smallvec::SmallVec;

use self::members::Members;
use super::{connection::Connection, outbound::RoomTag};

/// Who is in which room on this shard.
///
/// A connection keeps, for each of its rooms, its place among the members.
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
    pub members: Members<Rc<Connection>>,
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
                &mut vacant.insert(Room { tag, members: Members::new() }).members
            }
        };
        let place = members.push(Rc::clone(connection));
        memberships.push(Membership { room: room.clone(), place });
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

    /// The room, for a round that goes on to its next members.
    pub fn get_mut(&mut self, room: &RoomName) -> Option<&mut Room> {
        self.rooms.get_mut(room)
    }

    fn remove(&mut self, room: &RoomName, place: usize) {
        let Some(Room { members, .. }) = self.rooms.get_mut(room) else { return };
        members.remove(place, |moved, place| {
            let mut memberships = moved.memberships.borrow_mut();
            if let Some(membership) = memberships.iter_mut().find(|membership| membership.room == *room) {
                membership.place = place;
            }
        });
        if members.is_empty() {
            self.rooms.remove(room);
        }
    }
}

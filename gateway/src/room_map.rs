//! A map of a session's rooms.
//!
//! Most sessions are in one room, some in a handful, and a few in tens of thousands. So this is a list while
//! there are few rooms, which costs almost nothing, and a hash table beyond that, where lookups take constant
//! time.

use std::collections::HashMap;

use broker_bridge::RoomName;
use smallvec::SmallVec;

/// The maximum number of rooms in the list.
const FEW: usize = 16;

/// A map from rooms to values. The first `INLINE` entries need no allocation.
#[derive(Debug)]
pub struct RoomMap<V, const INLINE: usize> {
    /// All rooms, unless there is a table.
    list: SmallVec<[(RoomName, V); INLINE]>,
    table: Option<Box<Table<V>>>,
}

type Table<V> = HashMap<RoomName, V, foldhash::fast::RandomState>;

impl<V, const INLINE: usize> Default for RoomMap<V, INLINE> {
    fn default() -> Self {
        Self { list: SmallVec::new(), table: None }
    }
}

impl<V, const INLINE: usize> RoomMap<V, INLINE> {
    /// The number of rooms.
    pub fn len(&self) -> usize {
        self.table.as_ref().map_or(self.list.len(), |table| table.len())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value of `room`.
    pub fn get(&self, room: &RoomName) -> Option<&V> {
        match &self.table {
            Some(table) => table.get(room),
            None => self.list.iter().find(|(own, _)| own == room).map(|(_, value)| value),
        }
    }

    /// The value of `room`, mutably.
    pub fn get_mut(&mut self, room: &RoomName) -> Option<&mut V> {
        match &mut self.table {
            Some(table) => table.get_mut(room),
            None => self.list.iter_mut().find(|(own, _)| own == room).map(|(_, value)| value),
        }
    }

    /// Adds a room that is not in the map.
    pub fn insert(&mut self, room: RoomName, value: V) {
        debug_assert!(self.get(&room).is_none(), "{room} is already in the map");
        if self.table.is_none() && self.list.len() < FEW {
            return self.list.push((room, value));
        }
        let table = self.table.get_or_insert_default();
        table.extend(std::mem::take(&mut self.list));
        table.insert(room, value);
    }

    /// Removes a room and returns its value.
    pub fn remove(&mut self, room: &RoomName) -> Option<V> {
        let Some(table) = &mut self.table else {
            let place = self.list.iter().position(|(own, _)| own == room)?;
            return Some(self.list.swap_remove(place).1);
        };
        let removed = table.remove(room);
        // Half of the size at which it becomes a table, so that it does not switch back and forth.
        if table.len() <= FEW / 2 {
            self.list = table.drain().collect();
            self.table = None;
        } else if table.capacity() > 4 * table.len() {
            table.shrink_to(2 * table.len());
        }
        removed
    }

    /// Removes and returns all rooms for which `leaves` is true. Visits every room.
    pub fn extract(&mut self, mut leaves: impl FnMut(&RoomName) -> bool) -> Vec<RoomName> {
        let rooms: Vec<_> = self.rooms().filter(|room| leaves(room)).cloned().collect();
        for room in &rooms {
            self.remove(room);
        }
        rooms
    }

    /// The rooms, in no particular order.
    pub fn rooms(&self) -> impl Iterator<Item = &RoomName> {
        let table = self.table.iter().flat_map(|table| table.keys());
        self.list.iter().map(|(room, _)| room).chain(table)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn room(number: usize) -> RoomName {
        RoomName::new(&format!("room-{number}")).unwrap()
    }

    #[test]
    fn removed_rooms_leave_no_memory_behind() {
        let mut map = RoomMap::<usize, 1>::default();
        for number in 0..10_000 {
            map.insert(room(number), number);
        }
        for number in 1..10_000 {
            assert_eq!(map.remove(&room(number)), Some(number));
            assert!(map.table.as_ref().is_none_or(|table| table.capacity() <= 8 * map.len()));
        }
        assert!(map.table.is_none());
        assert_eq!(map.rooms().collect::<Vec<_>>(), [&room(0)]);
    }

    proptest! {
        /// With any number of rooms: as a list, as a table, and as a list again.
        #[test]
        fn a_room_map_behaves_like_a_map(steps in prop::collection::vec((any::<bool>(), 0_usize..40), 0..300)) {
            let (mut map, mut model) = (RoomMap::<usize, 1>::default(), BTreeMap::new());
            for (number, (insert, name)) in steps.into_iter().enumerate() {
                let room = room(name);
                prop_assert_eq!(map.get(&room), model.get(&room));
                if !insert {
                    prop_assert_eq!(map.remove(&room), model.remove(&room));
                } else if let Some(value) = map.get_mut(&room) {
                    *value = number;
                    model.insert(room, number);
                } else {
                    map.insert(room.clone(), number);
                    model.insert(room, number);
                }
                prop_assert_eq!(map.len(), model.len());
            }
            let mut rooms: Vec<_> = map.rooms().cloned().collect();
            rooms.sort();
            prop_assert_eq!(&rooms, &model.keys().cloned().collect::<Vec<_>>());
            let odd = |room: &RoomName| room.as_str().ends_with(['1', '3', '5', '7', '9']);
            let mut left = map.extract(odd);
            left.sort();
            prop_assert_eq!(left, model.keys().filter(|room| odd(room)).cloned().collect::<Vec<_>>());
            prop_assert!(!map.rooms().any(odd));
        }
    }
}

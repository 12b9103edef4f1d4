//! The members of one room, in an order that a round can follow while members join and leave.

use smallvec::SmallVec;

use crate::shrink;

/// Members, each at its own position. Leaving costs the same in rooms of 2 and of 20,000: other members move
/// into the gap and are notified of their new positions.
#[derive(Debug)]
pub struct Members<T> {
    list: SmallVec<[T; 2]>,
    /// How many members the current round has served: those before this position. Zero without a round.
    served: usize,
}

impl<T> Members<T> {
    pub fn new() -> Self {
        Self { list: SmallVec::new(), served: 0 }
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub fn get(&self, place: u32) -> Option<&T> {
        self.list.get(place as usize)
    }

    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.list.iter()
    }

    /// Adds a member and returns its position.
    #[expect(clippy::cast_possible_truncation, reason = "a process has far fewer sockets than 2^32")]
    pub fn push(&mut self, member: T) -> u32 {
        self.list.push(member);
        self.list.len() as u32 - 1
    }

    /// Removes and returns the member at `place`, and calls `moved` for every other member whose position
    /// changes.
    #[expect(clippy::cast_possible_truncation, reason = "places were given by `push`")]
    pub fn remove(&mut self, place: u32, mut moved: impl FnMut(&T, u32)) -> T {
        let mut place = place as usize;
        if place < self.served {
            // Move the gap to the end of the served members. The one that fills it then is not served yet.
            self.served -= 1;
            self.list.swap(place, self.served);
            self.list.get(place).inspect(|member| moved(member, place as u32));
            place = self.served;
        }
        let removed = self.list.swap_remove(place);
        shrink::list(&mut self.list);
        self.list.get(place).inspect(|member| moved(member, place as u32));
        removed
    }
}

impl<T: Clone> Members<T> {
    /// Appends the next members of the round, at most `most`, to `slice`. Returns whether they are the last;
    /// the next slice then starts a new round.
    ///
    /// A member that stays from the first slice of a round to the last is in exactly one of them. A member
    /// that joins in between is in one too; the caller decides whether it receives the message.
    pub fn next_slice(&mut self, most: usize, slice: &mut Vec<T>) -> bool {
        let end = self.list.len().min(self.served + most);
        slice.extend(self.list.get(self.served..end).unwrap_or_default().iter().cloned());
        self.served = end;
        let last = end == self.list.len();
        if last {
            self.served = 0;
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        collections::{HashMap, HashSet},
        rc::Rc,
    };

    use proptest::prelude::*;

    use super::*;

    /// A member that knows its position, as connections do.
    type Member = Rc<(u32, Cell<u32>)>;

    #[derive(Default)]
    struct Room {
        members: Option<Members<Member>>,
        here: HashMap<u32, Member>,
        named: u32,
    }

    impl Room {
        fn members(&mut self) -> &mut Members<Member> {
            self.members.get_or_insert_with(Members::new)
        }

        fn join(&mut self) {
            self.named += 1;
            let member = Rc::new((self.named, Cell::new(0)));
            let place = self.members().push(Rc::clone(&member));
            member.1.set(place);
            self.here.insert(self.named, member);
        }

        fn leave(&mut self, which: usize) -> Option<u32> {
            let mut names: Vec<_> = self.here.keys().copied().collect();
            names.sort_unstable();
            let name = *names.get(which.checked_rem(names.len())?)?;
            let member = self.here.remove(&name).unwrap();
            self.members().remove(member.1.get(), |moved, place| moved.1.set(place));
            Some(name)
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Join,
        Leave(usize),
        Slice(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            Just(Step::Join),
            any::<usize>().prop_map(Step::Leave),
            (1_usize..4).prop_map(Step::Slice),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn staying_members_are_served_exactly_once(size in 1_usize..20, steps in steps()) {
            let mut room = Room::default();
            (0..size).for_each(|_| room.join());
            let mut stays: HashSet<u32> = room.here.keys().copied().collect();
            let mut served = Vec::new();
            for step in steps {
                match step {
                    Step::Join => room.join(),
                    Step::Leave(which) => {
                        if let Some(name) = room.leave(which) {
                            stays.remove(&name);
                        }
                    }
                    Step::Slice(most) => {
                        let last = room.members().next_slice(most, &mut served);
                        if !last {
                            continue;
                        }
                        let mut names: Vec<_> = served.drain(..).map(|member| member.0).collect();
                        let count = names.len();
                        names.sort_unstable();
                        names.dedup();
                        prop_assert_eq!(names.len(), count, "a member was served twice");
                        for name in &stays {
                            prop_assert!(names.contains(name), "{} was skipped", name);
                        }
                        // A new round begins.
                        stays = room.here.keys().copied().collect();
                    }
                }
                for (place, member) in (0_u32..).zip(room.members().iter()) {
                    prop_assert_eq!(member.1.get(), place);
                }
                prop_assert_eq!(room.members().len(), room.here.len());
            }
        }
    }
}

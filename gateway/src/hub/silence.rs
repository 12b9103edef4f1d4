//! Looks for publications that were lost on their way to a room in which nothing comes after them.
//!
//! A lost publication shows as a hole when the next one arrives. In a silent room there is no next one. So each room with
//! a history is checked once a [`ROUND`], if nothing has arrived for [`IDLE`]: one reading from the last position on,
//! through the same queue as all others, so that Redis is not flooded.
//!
//! The rooms are spread over the round by their names, and not by when they began: after a lost connection all of them
//! are silent at the same time.

use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::Room;

/// How often a room is checked.
const ROUND: Duration = Duration::from_secs(60);
/// A room is silent when nothing has arrived for so long.
const IDLE: Duration = Duration::from_secs(30);
/// How many parts a round has, one after the other.
const PARTS: usize = 60;
const PART: Duration = ROUND.checked_div(60).expect("not by zero");

/// The rooms with a history.
pub struct Silence(Mutex<State>);

struct State {
    /// By when they are checked.
    parts: Box<[Vec<Weak<Room>>]>,
    /// The part that is next.
    next: usize,
    /// When.
    due: Instant,
}

impl Silence {
    pub fn new(now: Instant) -> Self {
        let parts = std::iter::repeat_with(Vec::new).take(PARTS).collect();
        Self(Mutex::new(State { parts, next: 0, due: now + PART }))
    }

    /// Checks this room from now on, until it is forgotten.
    pub fn watch(&self, room: &Arc<Room>) {
        let mut state = self.0.lock();
        if let Some(part) = state.parts.get_mut(part_of(room.name.as_str())) {
            part.push(Arc::downgrade(room));
        }
    }

    /// All of them.
    pub fn rooms(&self) -> Vec<Arc<Room>> {
        self.0.lock().parts.iter().flatten().filter_map(Weak::upgrade).collect()
    }

    /// Checks the rooms of the parts that are due.
    pub fn check(&self, now: Instant) {
        for _ in 0..PARTS {
            let Some(rooms) = self.take(now) else { return };
            for room in rooms {
                if let Some(recorded) = &room.recorded
                    && !room.is_empty()
                {
                    recorded.check(&room, IDLE);
                }
            }
        }
        // The node was stopped for longer than a round.
        self.0.lock().due = now + PART;
    }

    /// The rooms of the next part, if it is due. Nothing is locked while they are checked.
    fn take(&self, now: Instant) -> Option<Vec<Arc<Room>>> {
        let mut state = self.0.lock();
        if now < state.due {
            return None;
        }
        let next = state.next;
        state.next = (next + 1) % PARTS;
        state.due += PART;
        let part = state.parts.get_mut(next)?;
        let mut rooms = Vec::with_capacity(part.len());
        part.retain(|room| {
            let room = room.upgrade();
            let is_known = room.is_some();
            rooms.extend(room);
            is_known
        });
        part.shrink_to(2 * part.len());
        Some(rooms)
    }
}

/// The same in every process, so that a simulation can be repeated (FNV-1a).
fn part_of(name: &str) -> usize {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    usize::try_from(hash % PARTS as u64).unwrap_or(0)
}

//! A model of the server that keeps the histories of rooms. It fails in every way that the real one does: it starts
//! again with all it had, with what it had some time ago, or with nothing; it loses single logs, and moves them.

use std::collections::{BTreeMap, VecDeque};

use broker_bridge::{
    Cursor, Follows, Place, Publication, Retention, RoomName,
    history::{Entry, Page, ReadFrom, Start},
};

/// The server, in one of its lives.
#[derive(Default)]
pub struct Server {
    logs: BTreeMap<RoomName, Log>,
    /// What a server that starts again may have.
    snapshot: BTreeMap<RoomName, Log>,
    reign: u64,
    /// Never used twice, whatever is lost.
    epochs: u64,
}

#[derive(Clone)]
struct Log {
    entries: VecDeque<Entry>,
    top: Cursor,
    /// Who wrote the newest entry.
    writer: u64,
    /// It has moved to another server since.
    has_moved: bool,
}

/// What a server has when it starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    Everything,
    Snapshot,
    Nothing,
}

impl Server {
    /// Records a publication.
    pub fn record(&mut self, room: &RoomName, publication: Publication, retention: Retention) -> Place {
        let reign = self.reign;
        let epochs = &mut self.epochs;
        let log = self.logs.entry(room.clone()).or_insert_with(|| Log::new(epochs, reign));
        let before = log.top;
        let follows = if log.writer == reign && !log.has_moved {
            log.top.offset += 1;
            if before.offset == 0 { Follows::Nothing } else { Follows::Previous(before) }
        } else {
            *epochs += 1;
            log.top = Cursor { epoch: *epochs, offset: before.offset + 1 };
            if log.writer == reign { Follows::Moved(before) } else { Follows::Unproven(before) }
        };
        (log.writer, log.has_moved) = (reign, false);
        let place = Place { cursor: log.top, follows };
        log.entries.push_back(Entry { place, publication });
        while log.entries.len() > retention.size.get() as usize {
            log.entries.pop_front();
        }
        place
    }

    /// The position of the newest publication.
    pub fn open(&mut self, room: &RoomName) -> Cursor {
        let (epochs, reign) = (&mut self.epochs, self.reign);
        self.logs.entry(room.clone()).or_insert_with(|| Log::new(epochs, reign)).top
    }

    pub fn read(&self, room: &RoomName, from: ReadFrom, limit: usize) -> Page {
        let Some(log) = self.logs.get(room) else {
            let start = if matches!(from, ReadFrom::After(_)) { Start::Lost } else { Start::Continuous };
            return Page { entries: Vec::new(), start, top: None };
        };
        match from {
            ReadFrom::Last | ReadFrom::Before(_) => {
                let is_before = |entry: &&Entry| match from {
                    ReadFrom::Before(end) => entry.place.cursor < end,
                    _ => true,
                };
                let older = || log.entries.iter().filter(is_before);
                let skipped = older().count().saturating_sub(limit);
                let entries = older().skip(skipped).cloned().collect();
                Page { entries, start: Start::Continuous, top: Some(log.top) }
            }
            ReadFrom::After(asked) => {
                let newer = log.entries.iter().filter(|entry| entry.place.cursor > asked);
                let entries: Vec<_> = newer.take(limit).cloned().collect();
                let first = entries.first().map(|entry| entry.place);
                let next = first.map_or(log.top, |first| first.cursor);
                let is_continuous = match first {
                    None => log.top == asked,
                    Some(Place { cursor, follows: Follows::Nothing }) => {
                        asked == Cursor { offset: 0, ..cursor }
                    }
                    Some(first) => first.follows.cursor() == Some(asked),
                };
                let start = if is_continuous {
                    Start::Continuous
                } else if next.epoch == asked.epoch && next > asked {
                    Start::Trimmed
                } else {
                    Start::Lost
                };
                Page { entries, start, top: Some(log.top) }
            }
        }
    }

    /// Saves what a later start may have.
    pub fn save(&mut self) {
        self.snapshot.clone_from(&self.logs);
    }

    pub fn restart(&mut self, with: Restart) {
        self.reign += 1;
        match with {
            Restart::Everything => {}
            Restart::Snapshot => self.logs.clone_from(&self.snapshot),
            Restart::Nothing => self.logs.clear(),
        }
        self.save();
    }

    /// The log is deleted, evicted or has expired.
    pub fn delete(&mut self, room: &RoomName) {
        self.logs.remove(room);
        // Or else it would rise again, and what members have received long ago would come after a gap.
        self.snapshot.remove(room);
    }

    /// All publications are removed from the log.
    pub fn clear(&mut self, room: &RoomName) {
        if let Some(log) = self.logs.get_mut(room) {
            log.entries.clear();
        }
    }

    /// The log moves to another server, which has all of it.
    pub fn relocate(&mut self, room: &RoomName) {
        if let Some(log) = self.logs.get_mut(room) {
            log.has_moved = true;
        }
    }
}

impl Log {
    fn new(epochs: &mut u64, writer: u64) -> Self {
        *epochs += 1;
        Self { entries: VecDeque::new(), top: Cursor { epoch: *epochs, offset: 0 }, writer, has_moved: false }
    }
}

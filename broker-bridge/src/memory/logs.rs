//! The logs of rooms.
//!
//! Owns the positions of publications, what is kept and for how long, and the ids that are remembered. Who calls this
//! holds the rooms' lock until the publication is delivered, so that the log's order is the order of delivery.
//!
//! Expired logs are removed at the latest when a recorded publication of any room under the same lock comes
//! [`SWEEP`] later. Their bytes are the publishers': a log keeps a publication, and copies none.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    Cursor, Place, Publication, PublicationId, Retention, RoomName,
    broker::{MAX_PAGE, MAX_PAGE_BYTES},
    history::{Entry, Page, ReadFrom, Start},
};

/// How long an id is remembered.
const REMEMBERED: Duration = Duration::from_secs(120);
/// How many ids are remembered under one lock. Above that, the oldest are forgotten early.
const MAX_IDS: usize = 1 << 16;
/// How often expired logs are looked for.
const SWEEP: Duration = Duration::from_secs(10);
/// 2020-01-01T00:00:00Z, in milliseconds since the Unix epoch. Epochs count from there.
const YEAR_2020: u128 = 1_577_836_800_000;
/// An epoch is a time in milliseconds, and then a random tag below this.
const TAGS: u64 = 10_000_000;

/// The time since the Unix epoch. It never goes back.
pub(super) type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The system's time at the start, which then runs on evenly.
pub(super) fn clock() -> Clock {
    let (started, instant) = (SystemTime::now(), Instant::now());
    let started = started.duration_since(UNIX_EPOCH).unwrap_or_default();
    Arc::new(move || started + instant.elapsed())
}

/// Makes epochs. Each log gets one of its own, above all that this process and earlier ones have used, unless the system's
/// clock was set back in between.
pub(super) struct Epochs(AtomicU64);

impl Epochs {
    /// Epochs of a process that began at `start`.
    pub(super) fn new(start: Duration) -> Self {
        let mut random = [0; 4];
        getrandom::fill(&mut random).expect("the system gives random bytes");
        let tag = u64::from(u32::from_be_bytes(random)) % TAGS;
        let time = u64::try_from(start.as_millis().saturating_sub(YEAR_2020)).unwrap_or(0);
        Self(AtomicU64::new(time.saturating_mul(TAGS).saturating_add(tag)))
    }

    fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// The logs of some rooms.
#[derive(Default)]
pub(super) struct Logs {
    rooms: HashMap<RoomName, Log>,
    ids: HashMap<Arc<(RoomName, PublicationId)>, Cursor>,
    /// The same, in the order in which they are forgotten, and when.
    forgotten: VecDeque<(Duration, Arc<(RoomName, PublicationId)>)>,
    swept: Duration,
}

struct Log {
    /// The position of the newest publication.
    top: Cursor,
    /// The newest publications, whose offsets end at the top's.
    entries: VecDeque<Publication>,
    expires: Option<Duration>,
}

impl Log {
    fn is_alive(&self, now: Duration) -> bool {
        self.expires.is_none_or(|expires| now < expires)
    }

    /// The newest publications and their places, the newest first.
    fn newest_first(&self) -> impl Iterator<Item = (Place, &Publication)> {
        let place = |back: u64| {
            Place::within_epoch(Cursor { offset: self.top.offset.saturating_sub(back), ..self.top })
        };
        (0..).map(place).zip(self.entries.iter().rev())
    }
}

impl Logs {
    /// Where the publication with this id is, if it was recorded and the id is remembered.
    pub(super) fn find(&mut self, room: &RoomName, id: &PublicationId, now: Duration) -> Option<Cursor> {
        while self.forgotten.front().is_some_and(|(when, _)| *when <= now) {
            self.forget();
        }
        self.ids.get(&(room.clone(), id.clone())).copied()
    }

    /// Records a publication. Its id, if it has one, is not yet known.
    pub(super) fn record(
        &mut self,
        room: &RoomName,
        publication: &Publication,
        retention: Retention,
        id: Option<&PublicationId>,
        now: Duration,
        epochs: &Epochs,
    ) -> Place {
        let log = self.log(room, retention, now, epochs);
        log.top.offset += 1;
        log.entries.push_back(publication.clone());
        let size = usize::try_from(retention.size.get()).unwrap_or(usize::MAX);
        while log.entries.len() > size {
            log.entries.pop_front();
        }
        log.expires = retention.ttl.map(|ttl| now.saturating_add(ttl));
        let cursor = log.top;
        if let Some(id) = id {
            if self.ids.len() >= MAX_IDS {
                self.forget();
            }
            let key = Arc::new((room.clone(), id.clone()));
            self.ids.insert(Arc::clone(&key), cursor);
            self.forgotten.push_back((now.saturating_add(REMEMBERED), key));
        }
        Place::within_epoch(cursor)
    }

    /// See [`Broker::open`](crate::Broker::open).
    pub(super) fn open(
        &mut self,
        room: &RoomName,
        retention: Retention,
        now: Duration,
        epochs: &Epochs,
    ) -> Cursor {
        self.log(room, retention, now, epochs).top
    }

    /// See [`Broker::read`](crate::Broker::read).
    pub(super) fn read(&self, room: &RoomName, from: ReadFrom, limit: usize, now: Duration) -> Page {
        let log = self.rooms.get(room).filter(|log| log.is_alive(now));
        let top = log.map(|log| log.top);
        let limit = limit.clamp(1, MAX_PAGE);
        let kept = log.into_iter().flat_map(Log::newest_first);
        let (entries, start) = match from {
            ReadFrom::Last => {
                let mut entries = page(kept, limit);
                entries.reverse();
                (entries, Start::Continuous)
            }
            ReadFrom::Before(asked) => {
                let mut older = kept.skip_while(|(place, _)| place.cursor > asked).peekable();
                let is_kept = older.next_if(|(place, _)| place.cursor == asked).is_some();
                let mut entries = page(older, limit);
                entries.reverse();
                let start = Start::before(asked, is_kept, !entries.is_empty(), top);
                (entries, start)
            }
            ReadFrom::After(asked) => {
                let newer: Vec<_> = kept.take_while(|(place, _)| place.cursor > asked).collect();
                let entries = page(newer.into_iter().rev(), limit);
                let start = Start::after(asked, entries.first().map(|entry| entry.place), top);
                (entries, start)
            }
        };
        Page { entries, start, top }
    }

    /// See [`Broker::clear`](crate::Broker::clear).
    pub(super) fn clear(&mut self, room: &RoomName, now: Duration, epochs: &Epochs) -> Cursor {
        let log = self.log(room, Retention::default(), now, epochs);
        log.entries = VecDeque::new();
        log.top
    }

    /// The room's log, a new one if there is none.
    fn log(&mut self, room: &RoomName, retention: Retention, now: Duration, epochs: &Epochs) -> &mut Log {
        if now >= self.swept.saturating_add(SWEEP) {
            self.swept = now;
            self.rooms.retain(|_, log| log.is_alive(now));
        }
        let new = || Log {
            top: Cursor { epoch: epochs.next(), offset: 0 },
            entries: VecDeque::new(),
            expires: retention.ttl.map(|ttl| now.saturating_add(ttl)),
        };
        let log = self.rooms.entry(room.clone()).or_insert_with(new);
        if !log.is_alive(now) {
            *log = new();
        }
        log
    }

    fn forget(&mut self) {
        if let Some((_, key)) = self.forgotten.pop_front() {
            self.ids.remove(&key);
        }
    }
}

/// As many as a page may contain, in the order given.
fn page<'a>(entries: impl Iterator<Item = (Place, &'a Publication)>, limit: usize) -> Vec<Entry> {
    let mut bytes = 0_usize;
    let fits = |(number, (_, publication)): &(usize, (Place, &Publication))| {
        bytes = bytes.saturating_add(publication.data.bytes().len());
        *number == 0 || bytes <= MAX_PAGE_BYTES
    };
    let entry = |(_, (place, publication)): (usize, (Place, &Publication))| Entry {
        place,
        publication: publication.clone(),
    };
    entries.take(limit).enumerate().take_while(fits).map(entry).collect()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::{Data, publication::Owner};

    const TTL: Duration = Duration::from_secs(60);

    struct Bench {
        logs: Logs,
        epochs: Epochs,
        now: Duration,
    }

    impl Bench {
        fn new() -> Self {
            let now = Duration::from_secs(1_900_000_000);
            Self { logs: Logs::default(), epochs: Epochs::new(now), now }
        }

        fn record(&mut self, room: &str, ttl: Option<Duration>) -> Cursor {
            self.record_with(room, ttl, None)
        }

        fn record_with(&mut self, name: &str, ttl: Option<Duration>, id: Option<&PublicationId>) -> Cursor {
            let retention = Retention { size: NonZeroU32::new(3).unwrap(), ttl };
            let publication = Publication::new(Data::text("x"));
            self.logs.record(&room(name), &publication, retention, id, self.now, &self.epochs).cursor
        }

        fn top(&self, name: &str) -> Option<Cursor> {
            self.logs.read(&room(name), ReadFrom::Last, 1, self.now).top
        }
    }

    fn room(name: &str) -> RoomName {
        RoomName::new(name).unwrap()
    }

    fn id(number: usize) -> PublicationId {
        PublicationId::new(Owner::Backend, &number.to_string()).unwrap()
    }

    #[test]
    fn every_publication_prolongs_its_log_and_reading_does_not() {
        let mut bench = Bench::new();
        let first = bench.record("r", Some(TTL));
        for _ in 0..5 {
            bench.now += TTL.saturating_sub(Duration::from_millis(1));
            assert_eq!(bench.record("r", Some(TTL)).epoch, first.epoch);
        }
        let top = bench.top("r");
        assert_eq!(top, Some(Cursor { offset: 6, ..first }));
        bench.now += TTL.saturating_sub(Duration::from_millis(1));
        assert_eq!(bench.top("r"), top);
        bench.now += Duration::from_millis(1);
        assert_eq!(bench.top("r"), None);
        let anew = bench.record("r", None);
        assert!(anew.epoch > first.epoch && anew.offset == 1, "{anew} after {first}");
        bench.now += Duration::from_secs(1 << 30);
        assert_eq!(bench.top("r"), Some(anew), "without a time limit it stays");
        bench.record("r", Some(TTL));
        bench.now += TTL;
        assert_eq!(bench.top("r"), None, "the last publication decides");
    }

    #[test]
    fn a_log_that_nobody_wrote_to_expires_as_well() {
        let mut bench = Bench::new();
        let retention = Retention { size: NonZeroU32::MIN, ttl: Some(TTL) };
        let opened = bench.logs.open(&room("r"), retention, bench.now, &bench.epochs);
        bench.now += TTL / 2;
        assert_eq!(bench.logs.open(&room("r"), retention, bench.now, &bench.epochs), opened);
        bench.now += TTL / 2;
        assert_eq!(bench.top("r"), None, "opening it again has not prolonged it");
    }

    #[test]
    fn expired_logs_free_their_memory() {
        let mut bench = Bench::new();
        for number in 0..100 {
            bench.record(&number.to_string(), Some(TTL));
        }
        bench.now += TTL;
        bench.record("other", Some(TTL));
        assert_eq!(bench.logs.rooms.len(), 1);
    }

    #[test]
    fn ids_are_remembered_for_two_minutes_even_if_the_log_is_gone() {
        let mut bench = Bench::new();
        let first = bench.record_with("r", Some(Duration::from_secs(1)), Some(&id(1)));
        bench.now += REMEMBERED.saturating_sub(Duration::from_millis(1));
        assert_eq!(bench.logs.find(&room("r"), &id(1), bench.now), Some(first));
        assert_eq!(bench.logs.find(&room("other"), &id(1), bench.now), None);
        bench.now += Duration::from_millis(1);
        assert_eq!(bench.logs.find(&room("r"), &id(1), bench.now), None);
        assert_eq!((bench.logs.ids.len(), bench.logs.forgotten.len()), (0, 0));
    }

    #[test]
    fn the_number_of_ids_is_bounded() {
        let mut bench = Bench::new();
        for number in 0..=MAX_IDS {
            bench.record_with("r", Some(TTL), Some(&id(number)));
        }
        assert_eq!((bench.logs.ids.len(), bench.logs.forgotten.len()), (MAX_IDS, MAX_IDS));
        assert_eq!(bench.logs.find(&room("r"), &id(0), bench.now), None);
        assert!(bench.logs.find(&room("r"), &id(1), bench.now).is_some());
    }

    #[test]
    fn a_later_process_has_later_epochs() {
        let (early, late) = (Duration::from_secs(1_900_000_000), Duration::from_millis(1_900_000_000_002));
        for _ in 0..100 {
            assert!(Epochs::new(early).next() < Epochs::new(late).next());
        }
        assert_eq!(Epochs::new(early).next() / TAGS, 322_163_200_000);
    }
}

//! A room with a history: what arrives goes through its [`RoomLog`], and whoever comes back catches up from there.
//!
//! # Locks
//!
//! The log has one lock. What comes out of it is posted to the shards under that lock, so that all shards get the same
//! order, whether it arrived on the topic or was read.

use std::{
    collections::VecDeque,
    future::poll_fn,
    num::NonZeroU32,
    sync::{Arc, Weak},
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use broker_bridge::{
    Broker, BrokerError, Cursor, GapCause, Place, Publication, Retention, Subscribing,
    broker::MAX_PAGE,
    history::{Entry, Page, ReadFrom, Start},
};
use futures_util::{
    FutureExt as _,
    future::{self, BoxFuture, Shared, WeakShared},
};
use parking_lot::Mutex;

use super::{
    Room,
    log::{Arrival, Bounds, Item, Next, Resume, RoomLog},
};
use crate::{budget::Consumer, framing::Broadcast, history::Beginning};

/// How much one room's ring holds, in bytes, with what each publication costs besides its payload.
const RING: usize = 16 * 1024 * 1024;
/// Payloads of this size may be part of a larger block, which a ring must not keep.
const SHARED: usize = 4 * 1024;
/// How many items a ring holds beyond the size of the history: a log may keep a few hundred more than its size.
const SLACK: usize = 512;
/// How much is read at once to find out what an interruption has cost: the first publication that is not missing, and
/// as many as a moment brings.
const REPAIR_PAGE: usize = 128;
/// How often it is read what should have arrived.
const TRIES: usize = 3;

/// What a room with a history has besides others.
pub struct Recorded {
    broker: Arc<dyn Broker>,
    retention: Retention,
    state: Mutex<State>,
}

/// The opening of a log, which all wait for who join meanwhile.
type Opening = BoxFuture<'static, Result<(), BrokerError>>;
/// A reading of a log, which all wait for who join meanwhile.
type Reading = BoxFuture<'static, ()>;

struct State {
    log: RoomLog<Arc<Broadcast>>,
    /// Whether the log has been opened.
    is_open: bool,
    /// The opening of the log, and a reading for somebody who joins, while somebody waits for them. Nobody else drives
    /// them: if they were kept for longer, they would keep their connection to Redis.
    opening: Option<WeakShared<Opening>>,
    reading: Option<WeakShared<Reading>>,
    /// The reading that waits for what is on its way to this node.
    waiting: Option<Waker>,
    /// What the ring held when it was last counted, and what waited for a reading.
    counted: usize,
    waited: usize,
    /// Since when something is known to be missing.
    missing: Option<Instant>,
    /// When something last arrived, or somebody came for something.
    used: Instant,
    /// Whether the ring may hold encoded frames, for those who catch up.
    has_frames: bool,
}

impl State {
    /// The reading under way for somebody who joins.
    fn reading(&self) -> Option<Shared<Reading>> {
        self.reading.as_ref().and_then(WeakShared::upgrade)
    }
}

/// How a member of a room begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Joined {
    /// Where, if the room has a history.
    pub begin: Option<Begin>,
}

/// Where a member of a room with a history begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begin {
    /// The number of the first item that it receives.
    pub from: u64,
    /// The number of the next item that comes to the room.
    pub live: u64,
    /// To be told first.
    pub gap: Option<GapCause>,
    /// The position up to which it has received everything, if it is known.
    pub after: Option<Cursor>,
    /// The position before that item, if the member does not know it and something is known of it.
    pub position: Option<Cursor>,
    /// The position before the item with the number [`live`](Self::live), if it is known.
    pub top: Option<Cursor>,
    /// Whether it asked for the newest items before [`live`](Self::live), whatever may be missing among them.
    pub is_snapshot: bool,
}

impl Begin {
    fn snapshot(self) -> Self {
        Self { is_snapshot: true, ..self }
    }

    /// In a room whose interest began before it had a history: with whatever comes.
    pub fn without_history(since: Option<Cursor>) -> Self {
        Self {
            from: 0,
            live: 0,
            gap: since.map(|_| GapCause::Unrecorded),
            after: None,
            position: None,
            top: None,
            is_snapshot: false,
        }
    }
}

/// What somebody who joins wants, and the ring does not have.
#[derive(Clone, Copy)]
enum Wanted {
    /// Everything after this position.
    After(Cursor),
    /// So many of the newest publications.
    Last(usize),
}

/// A piece of a ring.
#[derive(Debug, Default)]
pub struct Piece {
    /// The items with their numbers.
    pub items: Vec<(u64, Item<Arc<Broadcast>>)>,
    /// The number of the next item.
    pub next: u64,
    /// Whether there is no later item yet.
    pub is_end: bool,
    /// Whether the ring no longer has the first that was asked for.
    pub has_lost: bool,
}

/// Something that has to be read from a room's log.
pub struct Repair {
    room: Weak<Room>,
    after: Cursor,
}

/// What has to be read, and who waits for that.
#[derive(Default)]
pub struct Repairs(Mutex<(VecDeque<Repair>, Option<Waker>)>);

impl Repairs {
    fn push(&self, repair: Repair) {
        let waker = {
            let mut queue = self.0.lock();
            queue.0.push_back(repair);
            queue.1.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Takes the next one, once there is one.
    pub async fn next(&self) -> Repair {
        poll_fn(|cx| {
            let mut queue = self.0.lock();
            if let Some(repair) = queue.0.pop_front() {
                return Poll::Ready(repair);
            }
            queue.1 = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl Repair {
    /// Reads once. After an error that [may pass](BrokerError::is_retryable) it should be tried again.
    pub async fn attempt(&self) -> Result<(), BrokerError> {
        let Some((room, reading)) = self.read() else { return Ok(()) };
        let outcome = reading.await;
        let Some(recorded) = &room.recorded else { return Ok(()) };
        match outcome {
            Ok(page) => recorded.change(&room, |log, now, out| {
                let make = |entry| {
                    room.fan_out.metrics.repaired.inc();
                    room.recorded_broadcast(entry)
                };
                log.read(self.after, page, make, now, out)
            }),
            // Nothing is known to be missing, and what arrives must not wait: the next check comes soon.
            Err(error) if recorded.end_check(&room) => {
                tracing::debug!(room = %room.name, %error, "cannot check the history of a room");
            }
            Err(error) if error.is_retryable() => return Err(error),
            Err(error) => {
                room.fan_out.warnings.cannot_read(&room.name, &error, room.fan_out.time.now());
                recorded.change(&room, |log, now, out| log.unreadable(GapCause::Interrupted, now, out));
            }
        }
        Ok(())
    }

    /// `None` if nobody is interested in the room any more.
    fn read(&self) -> Option<(Arc<Room>, broker_bridge::Reading)> {
        let room = self.room.upgrade()?;
        let recorded = room.recorded.as_ref()?;
        let reading = recorded.broker.read(&room.name, ReadFrom::After(self.after), REPAIR_PAGE);
        Some((room, reading))
    }
}

impl Recorded {
    pub fn new(broker: Arc<dyn Broker>, retention: Retention, now: Instant) -> Self {
        let items = usize::try_from(retention.size.get()).unwrap_or(usize::MAX).saturating_add(SLACK);
        let state = State {
            log: RoomLog::new(Bounds { items, bytes: RING }),
            is_open: false,
            opening: None,
            reading: None,
            waiting: None,
            counted: 0,
            waited: 0,
            missing: None,
            used: now,
            has_frames: false,
        };
        Self { broker, retention, state: Mutex::new(state) }
    }

    /// Changes the log, posts what comes out, and asks for what has to be read.
    pub fn change(
        &self,
        room: &Room,
        change: impl FnOnce(
            &mut RoomLog<Arc<Broadcast>>,
            std::time::Instant,
            &mut dyn FnMut(u64, &Item<Arc<Broadcast>>),
        ) -> Next,
    ) {
        let now = room.fan_out.time.now();
        let waiting = {
            let mut state = self.state.lock();
            // Of what members have received last.
            let mut epoch = state.log.position().map(|position| position.epoch);
            state.used = now;
            let next = change(&mut state.log, now, &mut |number, item| room.post(number, item, &mut epoch));
            room.fan_out.count_history(&mut state);
            room.fan_out.count_waiting(&mut state);
            room.fan_out.time_repair(&mut state, now);
            if let Next::Read(after) = next {
                let metrics = &room.fan_out.metrics;
                if state.log.is_checking() { &metrics.checks } else { &metrics.repairs }.inc();
                room.fan_out.repairs.push(Repair { room: Weak::clone(&room.this), after });
            }
            state.waiting.take()
        };
        if let Some(waiting) = waiting {
            waiting.wake();
        }
    }

    /// A publication has arrived on the topic.
    pub fn arrived(&self, room: &Room, mut publication: Publication, place: Option<Place>) {
        if place.is_none() {
            room.fan_out.metrics.unrecorded.inc();
            room.fan_out.warnings.unrecorded(&room.name, room.fan_out.time.now());
        }
        if publication.data.bytes().len() >= SHARED {
            publication.data = publication.data.copied();
        }
        let broadcast = room.broadcast(publication, place.map(|place| place.cursor));
        let bytes = broadcast.cost();
        let arrival = Arrival { publication: Arc::new(broadcast), bytes, place };
        self.change(room, |log, now, out| log.arrived(arrival, now, out));
    }

    /// Reads the log if nothing has arrived for `idle`: the last publication may have been lost on its way.
    pub fn check(&self, room: &Room, idle: Duration) {
        self.change(room, |log, now, _| log.check(idle, now));
    }

    /// Ends a check that cannot be made. Returns whether there was one.
    fn end_check(&self, room: &Room) -> bool {
        let mut was_checking = false;
        self.change(room, |log, now, out| {
            was_checking = log.is_checking();
            if was_checking { log.unreadable(GapCause::Interrupted, now, out) } else { Next::Wait }
        });
        was_checking
    }

    /// How much is kept.
    pub fn retention(&self) -> Retention {
        self.retention
    }

    /// When something last arrived, or somebody came for something.
    pub fn used(&self) -> Instant {
        self.state.lock().used
    }

    /// Gives up all of the ring but the newest item.
    pub fn shrink(&self, fan_out: &super::FanOut) {
        let mut state = self.state.lock();
        state.log.shrink(0);
        fan_out.count_history(&mut state);
    }

    /// Gives up what was encoded for those who catch up.
    pub fn forget_frames(&self) {
        let mut state = self.state.lock();
        state.has_frames = false;
        state.log.renew(|broadcast| broadcast.has_frames().then(|| Arc::new(broadcast.without_frames())));
    }

    /// The last position before item `number`, if it is known.
    pub fn position_before(&self, number: u64) -> Option<Cursor> {
        self.state.lock().log.ring().position_before(number)
    }

    /// Items from number `from` on, of about this many bytes.
    pub fn piece(&self, room: &Room, from: u64, bytes: usize) -> Piece {
        let mut state = self.state.lock();
        state.used = room.fan_out.time.now();
        if !std::mem::replace(&mut state.has_frames, true) {
            room.fan_out.encoded.lock().push(Weak::clone(&room.this));
        }
        let ring = state.log.ring();
        let (later, items) = ring.slice(from, bytes);
        let next = items.last().map_or(later.unwrap_or(from), |(number, _)| number + 1);
        Piece { items, next, is_end: next >= ring.next(), has_lost: later.is_some() }
    }

    /// Waits for the acknowledgement, and finds out where a member begins.
    pub fn join(
        room: Arc<Room>,
        subscribing: Subscribing,
        beginning: Beginning,
    ) -> BoxFuture<'static, Result<Joined, BrokerError>> {
        Box::pin(async move {
            subscribing.await?;
            let Some(recorded) = &room.recorded else { return Ok(Joined::default()) };
            if let Err(error) = recorded.open(&room).await {
                if matches!(error, BrokerError::Unavailable | BrokerError::Unknown | BrokerError::Closed) {
                    return Err(error);
                }
                // It answers, and cannot, such as for lack of memory: the members are served live.
                recorded.state.lock().log.not_opened();
                room.fan_out.warnings.cannot_open(&room.name, &error, room.fan_out.time.now());
            }
            let begin = match beginning {
                Beginning::Live => {
                    let state = recorded.state.lock();
                    let next = state.log.ring().next();
                    // If something was missed after it, whoever comes back with it is told.
                    let position = state.log.position();
                    Begin {
                        from: next,
                        live: next,
                        gap: None,
                        after: position,
                        position,
                        top: position,
                        is_snapshot: false,
                    }
                }
                Beginning::After(cursor) => recorded.resume(&room, cursor).await?,
                Beginning::Last(count) => recorded.last(&room, count).await?,
            };
            Ok(Joined { begin: Some(begin) })
        })
    }

    /// Opens the log, once for all who join.
    async fn open(&self, room: &Arc<Room>) -> Result<(), BrokerError> {
        let (opening, is_own) = self.opening(room);
        match opening.await {
            // That one may have failed long ago, for somebody who has left since.
            Err(error) if !is_own && error.is_retryable() => self.opening(room).0.await,
            outcome => outcome,
        }
    }

    /// The opening under way, or a new one. Also whether it is new.
    fn opening(&self, room: &Arc<Room>) -> (Shared<Opening>, bool) {
        let mut state = self.state.lock();
        if state.is_open {
            return (future::ready(Ok(())).boxed().shared(), true);
        }
        if let Some(opening) = state.opening.as_ref().and_then(WeakShared::upgrade) {
            return (opening, false);
        }
        let positioning = self.broker.open(&room.name, self.retention);
        let room = Arc::downgrade(room);
        let opening = async move {
            let top = positioning.await?;
            if let Some(room) = room.upgrade()
                && let Some(recorded) = &room.recorded
            {
                let mut state = recorded.state.lock();
                state.log.opened(top);
                state.is_open = true;
            }
            Ok(())
        };
        let opening = opening.boxed().shared();
        // If it fails, whoever joins next tries again.
        state.opening = opening.downgrade();
        (opening, true)
    }

    /// Where somebody continues who has received everything up to `cursor`.
    pub async fn resume(&self, room: &Arc<Room>, cursor: Cursor) -> Result<Begin, BrokerError> {
        let begin = self.find(room, cursor).await?;
        Ok(Begin { after: Some(cursor), ..begin })
    }

    async fn find(&self, room: &Arc<Room>, cursor: Cursor) -> Result<Begin, BrokerError> {
        if cursor.epoch == 0 {
            // Not a position that ever was: nothing to read.
            let state = self.state.lock();
            return Ok(Self::begin(room, &state, state.log.ring().next(), Some(GapCause::Expired)));
        }
        loop {
            let others = {
                let state = self.state.lock();
                let found = match state.log.resume(cursor) {
                    Resume::At(from) => Some((from, None)),
                    Resume::After(from, cause) => Some((from, Some(cause))),
                    Resume::Read => None,
                };
                if let Some((from, gap)) = found {
                    room.fan_out.metrics.resumed_from_memory.inc();
                    return Ok(Self::begin(room, &state, from, gap));
                }
                state.reading()
            };
            match others {
                Some(reading) => reading.await,
                None => {
                    if let Some(begin) = self.read_for(room, Wanted::After(cursor)).await {
                        return begin;
                    }
                }
            }
        }
    }

    /// Where somebody begins who wants the newest publications, `count` of them or as many as the room keeps.
    async fn last(&self, room: &Arc<Room>, count: NonZeroU32) -> Result<Begin, BrokerError> {
        let count = usize::try_from(count.min(self.retention.size).get()).unwrap_or(usize::MAX).min(MAX_PAGE);
        loop {
            let others = {
                let state = self.state.lock();
                if let Some(from) = state.log.last(count) {
                    room.fan_out.metrics.resumed_from_memory.inc();
                    return Ok(Self::begin(room, &state, from, None).snapshot());
                }
                state.reading()
            };
            match others {
                Some(reading) => reading.await,
                None => {
                    if let Some(begin) = self.read_for(room, Wanted::Last(count)).await {
                        return begin.map(Begin::snapshot);
                    }
                }
            }
        }
    }

    /// Reads the log for somebody who joins. `None` if somebody else has begun to meanwhile.
    async fn read_for(&self, room: &Arc<Room>, wanted: Wanted) -> Option<Result<Begin, BrokerError>> {
        let begin = Arc::new(Mutex::new(None));
        let reading = {
            let mut state = self.state.lock();
            if state.reading().is_some() {
                return None;
            }
            room.fan_out.metrics.resumed_from_log.inc();
            // Weak, because the room keeps the reading until it has ended.
            let (room, found) = (Arc::downgrade(room), Arc::clone(&begin));
            let reading = async move {
                let page = match wanted {
                    Wanted::After(cursor) => read_all(&room, cursor).await,
                    Wanted::Last(count) => read_page(&room, ReadFrom::Last, count).await,
                };
                let top = page.as_ref().map_or(None, |page| page.top);
                for _ in 0..TRIES {
                    if reached(&room, top).await {
                        break;
                    }
                }
                let Some(room) = room.upgrade() else { return };
                let Some(recorded) = &room.recorded else { return };
                let mut state = recorded.state.lock();
                state.reading = None;
                *found.lock() = Some(match page {
                    // What has not arrived by now could come again.
                    Ok(page) if !state.log.has_reached(page.top) => Err(BrokerError::Unavailable),
                    Ok(page) => Ok(Self::backfill(&room, &mut state, wanted, page)),
                    // What was missed is still there: the client may try again.
                    Err(error) if error.is_retryable() => Err(error),
                    Err(error) => {
                        room.fan_out.warnings.cannot_read(&room.name, &error, room.fan_out.time.now());
                        let next = state.log.ring().next();
                        Ok(Self::begin(&room, &state, next, Some(GapCause::Interrupted)))
                    }
                });
            };
            let reading = reading.boxed().shared();
            state.reading = reading.downgrade();
            reading
        };
        reading.await;
        begin.lock().take()
    }

    fn is_waiting_for(&self, top: Option<Cursor>) -> bool {
        !self.state.lock().log.has_reached(top)
    }

    fn backfill(room: &Room, state: &mut State, wanted: Wanted, page: Page) -> Begin {
        let make = |entry| room.recorded_broadcast(entry);
        let (from, gap) = match wanted {
            Wanted::After(cursor) => state.log.backfill(cursor, page, make),
            Wanted::Last(count) => (state.log.backfill_last(count, page, make), None),
        };
        // Whoever asked for it has to have a chance to get it: there is time to shrink.
        room.fan_out.add_history(state.log.ring().bytes(), state.counted);
        state.counted = state.log.ring().bytes();
        state.used = room.fan_out.time.now();
        Self::begin(room, state, from, gap)
    }

    /// Somebody begins with the item of this number.
    fn begin(room: &Room, state: &State, from: u64, gap: Option<GapCause>) -> Begin {
        if let Some(cause) = gap {
            room.fan_out.metrics.gap(cause);
        }
        let live = state.log.ring().next();
        let position = if from == live { state.log.position() } else { None };
        Begin { from, live, gap, after: None, position, top: state.log.position(), is_snapshot: false }
    }
}

/// Reads everything after `cursor` that the ring does not have. The room may be forgotten meanwhile.
async fn read_all(room: &Weak<Room>, cursor: Cursor) -> Result<Page, BrokerError> {
    let mut page = read_page(room, ReadFrom::After(cursor), MAX_PAGE).await?;
    while let Some(last) = page.entries.last().map(|entry| entry.place.cursor)
        && page.top.is_some_and(|top| last < top)
        && wants_more(room, last, &page)
    {
        let more = read_page(room, ReadFrom::After(last), MAX_PAGE).await?;
        if more.entries.is_empty() {
            break;
        }
        if more.start == Start::Continuous {
            page.top = more.top;
            page.entries.extend(more.entries);
        } else {
            // Something was removed in between: what is before it does not count any more.
            page = more;
        }
    }
    Ok(page)
}

async fn read_page(room: &Weak<Room>, from: ReadFrom, limit: usize) -> Result<Page, BrokerError> {
    let reading = room.upgrade().and_then(|room| {
        let recorded = room.recorded.as_ref()?;
        Some(recorded.broker.read(&room.name, from, limit))
    });
    reading.ok_or(BrokerError::Closed)?.await
}

/// Whether the ring begins later than what was read.
fn wants_more(room: &Weak<Room>, last: Cursor, page: &Page) -> bool {
    let Some(room) = room.upgrade() else { return false };
    let Some(recorded) = &room.recorded else { return false };
    let most = usize::try_from(recorded.retention.size.get()).unwrap_or(usize::MAX).saturating_add(SLACK);
    let bytes: usize = page.entries.iter().map(|entry| entry.publication.data.bytes().len()).sum();
    page.entries.len() < most && bytes < RING && recorded.state.lock().log.ring().is_before(last)
}

/// Waits until everything up to this position has arrived on the topic. It should have by now: if not, it is read.
/// Returns false if that failed.
async fn reached(room: &Weak<Room>, top: Option<Cursor>) -> bool {
    let mut has_asked = false;
    poll_fn(|cx| {
        let Some(room) = room.upgrade() else { return Poll::Ready(true) };
        let Some(recorded) = &room.recorded else { return Poll::Ready(true) };
        if !recorded.is_waiting_for(top) {
            return Poll::Ready(true);
        }
        if !std::mem::replace(&mut has_asked, true) {
            recorded.change(&room, |log, now, _| log.suspect(now));
        }
        let mut state = recorded.state.lock();
        if state.log.has_reached(top) || !state.log.is_repairing() {
            return Poll::Ready(state.log.has_reached(top));
        }
        state.waiting = Some(cx.waker().clone());
        Poll::Pending
    })
    .await
}

impl Room {
    /// A broadcast of this room, to be numbered.
    fn broadcast(&self, publication: Publication, cursor: Option<Cursor>) -> Broadcast {
        let (_, places) = self.shards();
        Broadcast::new(self.name.clone(), publication, 0)
            .recorded_at(cursor)
            .at(places)
            .received_at(self.fan_out.time.now())
            .counted(&self.fan_out.budget, Consumer::History)
    }

    /// What was read from the log, with its size.
    fn recorded_broadcast(&self, entry: Entry) -> (Arc<Broadcast>, usize) {
        let broadcast = Broadcast::new(self.name.clone(), entry.publication, 0)
            .recorded_at(Some(entry.place.cursor))
            .counted(&self.fan_out.budget, Consumer::History);
        let bytes = broadcast.cost();
        (Arc::new(broadcast), bytes)
    }

    /// Posts an item to the shards that have members. `epoch` is that of the last position.
    fn post(&self, number: u64, item: &Item<Arc<Broadcast>>, epoch: &mut Option<u64>) {
        match item {
            Item::Publication(broadcast, cursor) => {
                if let Some(cursor) = cursor
                    && epoch.replace(cursor.epoch).is_some_and(|before| before != cursor.epoch)
                {
                    let (shards, _) = self.shards();
                    for mailbox in self.fan_out.mailboxes(shards) {
                        mailbox.post_new_epoch(&self.name, number);
                    }
                }
                broadcast.set_number(number);
                let (shards, _) = self.shards();
                // Lingering interest has no members, but those who come back will want it.
                if shards.len() > 0 {
                    self.post_broadcast(&Arc::new(broadcast.to_deliver(shards.len())), shards);
                }
            }
            Item::Gap(cause) => self.post_gap(*cause, number),
        }
    }
}

impl super::FanOut {
    /// Counts what a ring holds. If all rings together hold too much, this one gives up half of it.
    fn count_history(&self, state: &mut State) {
        let held = state.log.ring().bytes();
        self.add_history(held, state.counted);
        state.counted = held;
        if self.history_bytes() > super::RINGS {
            state.log.shrink(held / 2);
            let held = state.log.ring().bytes();
            self.add_history(held, state.counted);
            state.counted = held;
        }
    }
}

impl super::FanOut {
    /// Measures how long it takes to find out what was missing.
    fn time_repair(&self, state: &mut State, now: Instant) {
        let is_missing = state.log.is_repairing() && !state.log.is_checking();
        match state.missing {
            None if is_missing => {
                state.missing = Some(now);
                self.metrics.repairing.inc();
            }
            Some(since) if !is_missing => {
                state.missing = None;
                self.metrics.repairing.dec();
                self.metrics.repair_seconds.observe(now.saturating_duration_since(since).as_secs_f64());
            }
            _ => {}
        }
    }

    /// Counts what waits for a reading. If too much does in all rooms, what waits here is read later.
    fn count_waiting(&self, state: &mut State) {
        let waits = state.log.waiting_bytes();
        if waits == state.waited {
            return;
        }
        let is_too_much = self.add_waiting(waits, state.waited);
        state.waited = waits;
        if is_too_much && waits > 0 {
            state.log.drop_waiting();
            self.add_waiting(0, waits);
            state.waited = 0;
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(recorded) = &self.recorded {
            let state = recorded.state.lock();
            self.fan_out.add_history(0, state.counted);
            self.fan_out.add_waiting(0, state.waited);
            if state.missing.is_some() {
                self.fan_out.metrics.repairing.dec();
            }
        }
    }
}

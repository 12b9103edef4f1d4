//! What a node knows of one room with a history: what its members have received, and what is missing.
//!
//! A state machine without I/O. [`RoomLog`] gets what arrives on the room's topic, is told of interruptions, and says
//! what has to be read from the log. What members are to receive goes to the caller, in order, and into a [`Ring`] for
//! those who come back later.
//!
//! # Order
//!
//! A publication that says that it [follows](broker_bridge::Follows) the last one is passed on. One that does not is
//! the sign of a hole: it waits until the log has been read from the last position on. The same after an interruption.
//! What arrives meanwhile waits behind, and is dropped where the log had it already.
//!
//! A room that is silent is [checked](RoomLog::check) now and then: the last publication may have been lost on its way, and
//! nothing comes after it that would show the hole.
//!
//! # What is told as a gap
//!
//! What the log has is never a gap. A gap is told where the log itself says that it may have lost something
//! ([`Follows::Unproven`]): members that were connected without interruption have received it, so only what follows an
//! interruption counts. It is told where the log no longer has the last position, and where a publication without a
//! place may have been missed.

mod ring;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use broker_bridge::{
    Cursor, Follows, GapCause, Place,
    broker::MAX_PAGE_BYTES,
    history::{Entry, Page, Start},
};

pub use self::ring::{Item, Ring};

/// What may wait for a reading of the log, in bytes.
const MOST_WAITING: usize = 256 * 1024;

/// How many unknown positions are remembered: after a long absence, most members of a room come with the same few.
const UNKNOWN: usize = 64;
/// How far the topic may be behind the log. A connection that is silent for longer is given up.
const LAG: Duration = Duration::from_secs(30);

/// The state of a room with a history.
#[derive(Debug)]
pub struct RoomLog<P> {
    bounds: Bounds,
    ring: Ring<P>,
    /// The position of the last publication in the ring. `None` while it is not known.
    seen: Option<Cursor>,
    /// The same, even if it is not known any more what comes next.
    newest: Option<Cursor>,
    /// Whether there was an interruption since the last live publication: a server may have accepted something after
    /// `seen`, and have lost it.
    is_unproven: bool,
    /// Until then, what arrives may be older than what was read.
    behind_until: Option<Instant>,
    /// Positions that somebody has come back with and that the log did not know, the latest first.
    unknown: VecDeque<(Cursor, GapCause)>,
    opening: Opening,
    /// Whether publications without a place arrive in the room, which no log has.
    has_unrecorded: bool,
    /// When something last arrived, or was found in the log.
    active: Option<Instant>,
    /// The number of the ring's first item when the log was read from its end, and how many publications were asked for:
    /// while the ring begins there, the log has no more to give.
    read_back: Option<(u64, usize)>,
    repair: Option<Repair<P>>,
}

/// Whether there may be members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    /// Nobody is let in before the log is open, and nothing has arrived.
    Awaited,
    /// It is open, or something has arrived.
    Over,
    /// Members are served although it is not open.
    Refused,
}

/// The bounds of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// In items.
    pub items: usize,
    /// In bytes.
    pub bytes: usize,
}

/// The log is being read.
#[derive(Debug)]
struct Repair<P> {
    /// What has arrived meanwhile, in order.
    waiting: VecDeque<Waiting<P>>,
    /// Its payload in bytes.
    bytes: usize,
    /// Another reading has to follow: what has waited was too much, and was dropped.
    again: bool,
    /// Whether something without a place was dropped.
    has_dropped_unrecorded: bool,
    /// Nothing is known to be missing.
    is_check: bool,
}

/// What waits until the log is read.
#[derive(Debug)]
enum Waiting<P> {
    Publication(Arrival<P>),
    /// Publications may be missing here.
    Interrupted(GapCause),
}

impl<P> Default for Repair<P> {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            bytes: 0,
            again: false,
            has_dropped_unrecorded: false,
            is_check: false,
        }
    }
}

impl<P> Waiting<P> {
    fn bytes(&self) -> usize {
        match self {
            Self::Publication(arrival) => arrival.bytes,
            Self::Interrupted(_) => 0,
        }
    }
}

/// A publication from the room's topic.
#[derive(Clone, Debug)]
pub struct Arrival<P> {
    /// The publication.
    pub publication: P,
    /// Its size in bytes.
    pub bytes: usize,
    /// Its place in the log, if it is recorded.
    pub place: Option<Place>,
}

/// Receives what members are to receive, with its number.
pub type Out<'a, P> = &'a mut dyn FnMut(u64, &Item<P>);

/// What has to be done next.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Wait,
    /// Read the log from after this position on, and pass the answer to [`RoomLog::read`].
    Read(Cursor),
}

/// Where somebody who comes back continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// With the item of this number.
    At(u64),
    /// With the item of this number, after this gap: nobody knows what was between.
    After(u64, GapCause),
    /// The ring does not go back so far: read the log from after the position on, pass the answer to
    /// [`RoomLog::backfill`].
    Read,
}

impl<P: Clone> RoomLog<P> {
    /// The log of a room about which nothing is known yet.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            ring: Ring::default(),
            seen: None,
            newest: None,
            is_unproven: true,
            behind_until: None,
            unknown: VecDeque::new(),
            opening: Opening::Awaited,
            has_unrecorded: false,
            active: None,
            read_back: None,
            repair: None,
        }
    }

    /// Gives up the oldest items beyond this many bytes.
    pub fn shrink(&mut self, bytes: usize) {
        self.ring.trim(self.bounds.items, bytes);
    }

    /// Puts other publications in the place of those for which there are any.
    pub fn renew(&mut self, other: impl Fn(&P) -> Option<P>) {
        self.ring.renew(other);
    }

    /// The ring.
    pub fn ring(&self) -> &Ring<P> {
        &self.ring
    }

    /// The position of the last publication that members have received or are about to.
    pub fn seen(&self) -> Option<Cursor> {
        self.seen
    }

    /// The same, or the last that is known if publications after it were missed.
    pub fn position(&self) -> Option<Cursor> {
        self.seen.or(self.newest)
    }

    /// What has to be read, if anything: for a reading that has failed and is made again.
    pub fn wants(&self) -> Option<Cursor> {
        self.repair.as_ref().and(self.seen)
    }

    /// The broker says that this is the position of the newest publication. The subscription was acknowledged before,
    /// so everything after it arrives.
    pub fn opened(&mut self, top: Cursor) {
        if self.seen.is_none() && self.opening != Opening::Refused {
            (self.seen, self.opening) = (Some(top), Opening::Over);
            if self.ring.is_empty() {
                self.ring.begin(Some(top));
            }
        }
    }

    /// The log cannot be opened, and members are served without a position. A position that is learned later says nothing
    /// about what is on its way to them, so the next one is that of the next publication.
    pub fn not_opened(&mut self) {
        self.opening = Opening::Refused;
    }

    /// A publication has arrived.
    pub fn arrived(&mut self, mut arrival: Arrival<P>, now: Instant, out: Out<'_, P>) -> Next {
        self.active = Some(now);
        if self.repair.as_ref().is_some_and(|repair| repair.is_check && repair.waiting.is_empty()) {
            // What follows the last publication needs no check.
            match self.pass(arrival, now, out) {
                None => return Next::Wait,
                Some(hole) => arrival = hole,
            }
        }
        if let Some(repair) = &mut self.repair {
            repair.bytes += arrival.bytes;
            repair.waiting.push_back(Waiting::Publication(arrival));
            if repair.bytes > MOST_WAITING {
                self.drop_waiting();
            }
            return Next::Wait;
        }
        match self.pass(arrival, now, out) {
            None => Next::Wait,
            Some(hole) => {
                // However it came about, nobody has told that the server is still the same.
                self.is_unproven = true;
                let bytes = hole.bytes;
                let waiting = VecDeque::from([Waiting::Publication(hole)]);
                self.repair = Some(Repair { waiting, bytes, ..Repair::default() });
                self.seen.map_or(Next::Wait, Next::Read)
            }
        }
    }

    /// What waits for a reading of the log, in bytes.
    pub fn waiting_bytes(&self) -> usize {
        self.repair.as_ref().map_or(0, |repair| repair.bytes)
    }

    /// Gives up what waits for a reading of the log: the log has it, or else nobody has. It is read once more.
    pub fn drop_waiting(&mut self) {
        let Some(repair) = &mut self.repair else { return };
        let is_unrecorded =
            |waiting: &Waiting<P>| matches!(waiting, Waiting::Publication(Arrival { place: None, .. }));
        repair.has_dropped_unrecorded |= self.has_unrecorded || repair.waiting.iter().any(is_unrecorded);
        repair.waiting.clear();
        (repair.bytes, repair.again, repair.is_check) = (0, true, false);
        self.is_unproven = true;
    }

    /// Publications may be missing before what arrives next.
    pub fn interrupted(&mut self, cause: GapCause, now: Instant, out: Out<'_, P>) -> Next {
        if let Some(repair) = &mut self.repair {
            repair.is_check = false;
            if !matches!(repair.waiting.back(), Some(Waiting::Interrupted(last)) if *last == cause) {
                repair.waiting.push_back(Waiting::Interrupted(cause));
            }
            return Next::Wait;
        }
        if cause == GapCause::Oversized {
            self.skip(out);
            return Next::Wait;
        }
        self.begin_repair(cause, VecDeque::new(), now, out)
    }

    /// This node has refused a publication for its size, and would refuse it again.
    fn skip(&mut self, out: Out<'_, P>) {
        self.gap(GapCause::Oversized, out);
        self.seen = None;
    }

    /// Whether the log is being read.
    pub fn is_repairing(&self) -> bool {
        self.repair.is_some()
    }

    /// Something should have arrived that has not: whoever comes back has received it elsewhere, or the log has it. Maybe
    /// it is only late, so nothing is told unless something is found.
    pub fn suspect(&mut self, now: Instant) -> Next {
        self.check(Duration::ZERO, now)
    }

    /// If nothing has arrived for `idle`, the log has to be read to find out whether the last publication was lost on its
    /// way. Nothing is told unless something is found.
    pub fn check(&mut self, idle: Duration, now: Instant) -> Next {
        let is_idle = self.active.is_none_or(|at| now.saturating_duration_since(at) >= idle);
        match self.seen {
            Some(seen) if is_idle && self.repair.is_none() => {
                self.repair = Some(Repair { is_check: true, ..Repair::default() });
                Next::Read(seen)
            }
            _ => Next::Wait,
        }
    }

    /// Whether the log is being read although nothing is known to be missing.
    pub fn is_checking(&self) -> bool {
        self.repair.as_ref().is_some_and(|repair| repair.is_check)
    }

    fn begin_repair(
        &mut self,
        cause: GapCause,
        waiting: VecDeque<Waiting<P>>,
        now: Instant,
        out: Out<'_, P>,
    ) -> Next {
        self.is_unproven = true;
        if self.has_unrecorded {
            self.gap(GapCause::Unrecorded, out);
        }
        let bytes = waiting.iter().map(Waiting::bytes).sum();
        self.repair = Some(Repair { waiting, bytes, ..Repair::default() });
        if let Some(seen) = self.seen {
            return Next::Read(seen);
        }
        if self.opening != Opening::Awaited {
            self.gap(cause, out);
        }
        self.finish(true, now, out)
    }

    /// The log was read from after `after` on.
    pub fn read(
        &mut self,
        after: Cursor,
        page: Page,
        make: impl Fn(Entry) -> (P, usize),
        now: Instant,
        out: Out<'_, P>,
    ) -> Next {
        let Some(repair) = &mut self.repair else { return Next::Wait };
        let Some(seen) = self.seen else { return self.finish(true, now, out) };
        if after != seen {
            if repair.is_check {
                // Something has arrived that follows what was to be checked.
                return self.pass_waiting(true, now, out);
            }
            return Next::Read(seen);
        }
        let again = std::mem::take(&mut repair.again);
        let is_check = std::mem::take(&mut repair.is_check);
        if std::mem::take(&mut repair.has_dropped_unrecorded) {
            self.gap(GapCause::Unrecorded, out);
        }
        if is_check && page.entries.is_empty() && self.has_nothing_after(seen, &page) {
            // Nothing was lost on its way. That the log is gone does not concern members that have received all of it.
            return self.pass_waiting(true, now, out);
        }
        self.is_unproven |= is_check;
        let is_told = page.start != Start::Continuous;
        let has_known = page.entries.iter().any(|entry| self.ring.number_of(entry.place.cursor).is_some())
            || page.top.is_some_and(|top| self.ring.number_of(top).is_some());
        if is_told {
            self.gap(
                match page.start {
                    Start::Trimmed => GapCause::Trimmed,
                    // The server went back in time.
                    _ if has_known => GapCause::Failover,
                    // The log is another one, or gone.
                    _ => GapCause::Expired,
                },
                out,
            );
        }
        let mut is_first = true;
        for entry in page.entries {
            let place = entry.place;
            // After a loss the page begins with what members may have received long ago.
            if place.cursor <= seen || self.ring.after(place.cursor).is_some() {
                continue;
            }
            if !(is_first && is_told) && matches!(place.follows, Follows::Unproven(_)) {
                self.gap(GapCause::Failover, out);
            }
            is_first = false;
            let (publication, bytes) = make(entry);
            self.append(publication, bytes, Some(place), out);
        }
        let has_progress = !is_first;
        if has_progress {
            self.active = Some(now);
        }
        if is_told && !has_progress {
            // What comes next follows the newest that there is, and the gap before it is told. What has arrived up to
            // here is known already, or of a time that is lost.
            self.seen = page.top;
            if !has_known {
                // Maybe another log, of a server whose clock was set back.
                self.newest = page.top.or(self.newest);
            }
            self.is_unproven = false;
            if let Some(repair) = &mut self.repair {
                let is_later = |waiting: &Waiting<P>| matches!(waiting, Waiting::Interrupted(_));
                let later = repair.waiting.iter().position(is_later).unwrap_or(repair.waiting.len());
                repair.waiting.drain(..later);
            }
        }
        match self.seen {
            Some(reached) if again || (has_progress && page.top.is_some_and(|top| top > reached)) => {
                Next::Read(reached)
            }
            _ => self.finish(has_progress || is_told || is_check, now, out),
        }
    }

    /// Whether an empty page is the end of what there was. A log may be gone, or older than what members have received.
    fn has_nothing_after(&self, seen: Cursor, page: &Page) -> bool {
        page.start == Start::Continuous
            || page.top.is_none_or(|top| {
                let is_older = top.epoch == seen.epoch && top <= seen;
                is_older || top.offset == 0 || self.ring.number_of(top).is_some()
            })
    }

    /// The log cannot be read: what is missing stays missing. After a check, nothing is known to be missing.
    pub fn unreadable(&mut self, cause: GapCause, now: Instant, out: Out<'_, P>) -> Next {
        match &self.repair {
            None => return Next::Wait,
            Some(repair) if repair.is_check => return self.pass_waiting(true, now, out),
            Some(_) => {}
        }
        self.gap(cause, out);
        // Whatever comes next is taken as it comes.
        self.seen = None;
        self.finish(true, now, out)
    }

    /// Passes on what has waited. If the reading had nothing new, what does not fit is not in the log.
    fn finish(&mut self, has_progress: bool, now: Instant, out: Out<'_, P>) -> Next {
        self.behind_until = Some(now + LAG);
        self.pass_waiting(has_progress, now, out)
    }

    fn pass_waiting(&mut self, has_progress: bool, now: Instant, out: Out<'_, P>) -> Next {
        let Some(mut repair) = self.repair.take() else { return Next::Wait };
        repair.is_check = false;
        while let Some(waiting) = repair.waiting.pop_front() {
            let arrival = match waiting {
                Waiting::Publication(arrival) => arrival,
                Waiting::Interrupted(GapCause::Oversized) => {
                    self.skip(out);
                    continue;
                }
                Waiting::Interrupted(cause) => return self.begin_repair(cause, repair.waiting, now, out),
            };
            if let Some(hole) = self.pass(arrival, now, out) {
                repair.waiting.push_front(Waiting::Publication(hole));
                self.is_unproven = true;
                if !has_progress {
                    self.gap(GapCause::Interrupted, out);
                    self.seen = None;
                    continue;
                }
                repair.bytes = repair.waiting.iter().map(Waiting::bytes).sum();
                self.repair = Some(repair);
                return self.seen.map_or(Next::Wait, Next::Read);
            }
        }
        Next::Wait
    }

    /// Passes a publication on, or drops it if the ring has it. Returns it if something is missing before it.
    fn pass(&mut self, arrival: Arrival<P>, now: Instant, out: Out<'_, P>) -> Option<Arrival<P>> {
        let Arrival { publication, bytes, place } = arrival;
        let Some(at) = place else {
            self.has_unrecorded = true;
            self.append(publication, bytes, None, out);
            return None;
        };
        let is_behind = self.behind_until.is_some_and(|until| now < until);
        if is_behind && self.newest.is_some_and(|newest| at.cursor <= newest) {
            return None;
        }
        let before = at.follows.cursor();
        // Even if nobody knows what comes next, and however late it is: a node may have been suspended.
        if self.seen.is_none() && self.ring.after(at.cursor).is_some() {
            return None;
        }
        if let Some(seen) = self.seen
            && before != Some(seen)
        {
            // Epochs ascend, except if a log was lost and the server's clock was set back.
            let begins_anew = at.follows == Follows::Nothing && !is_behind;
            if at.cursor <= seen && !begins_anew || self.ring.after(at.cursor).is_some() {
                return None;
            }
            if at.follows != Follows::Nothing {
                return Some(Arrival { publication, bytes, place });
            }
        }
        if self.is_unproven && self.seen.is_some() {
            match at.follows {
                Follows::Unproven(_) => self.gap(GapCause::Failover, out),
                // Even an empty log: it may have been lost with what came first.
                Follows::Nothing if self.seen.is_some_and(|seen| seen.epoch != at.cursor.epoch) => {
                    self.gap(GapCause::Expired, out);
                }
                Follows::Nothing | Follows::Previous(_) | Follows::Moved(_) => {}
            }
        }
        if self.ring.is_empty() {
            let is_proven = !matches!(at.follows, Follows::Unproven(_));
            self.ring.begin(before.filter(|_| is_proven));
        }
        (self.is_unproven, self.behind_until) = (false, None);
        self.append(publication, bytes, place, out);
        None
    }

    fn append(&mut self, publication: P, bytes: usize, place: Option<Place>, out: Out<'_, P>) {
        if self.opening == Opening::Awaited {
            self.opening = Opening::Over;
        }
        let cursor = place.map(|place| place.cursor);
        if cursor.is_some() {
            (self.seen, self.newest) = (cursor, cursor);
        }
        self.push(Item::Publication(publication, cursor), bytes, out);
    }

    fn gap(&mut self, cause: GapCause, out: Out<'_, P>) {
        self.push(Item::Gap(cause), 0, out);
    }

    fn push(&mut self, item: Item<P>, bytes: usize, out: Out<'_, P>) {
        out(self.ring.next(), &item);
        self.ring.push(item, bytes);
        self.ring.trim(self.bounds.items, self.bounds.bytes);
    }

    /// Where somebody continues who has received everything up to this position.
    pub fn resume(&self, cursor: Cursor) -> Resume {
        if let Some(number) = self.ring.after(cursor).or_else(|| self.ring.first_of_epoch_after(cursor)) {
            return Resume::At(number);
        }
        // A position that the log did not know is never used again.
        let unknown = self.unknown.iter().find(|(known, _)| *known == cursor);
        unknown.map_or(Resume::Read, |(_, cause)| Resume::After(self.ring.later_than(cursor), *cause))
    }

    /// The number of the item with which the newest `count` publications begin, or fewer if the log has no more. `None`
    /// if the ring does not know: read the log from its end on, and pass the answer to
    /// [`backfill_last`](Self::backfill_last).
    pub fn last(&self, count: usize) -> Option<u64> {
        let (number, found) = self.ring.last(count);
        let is_read = self.read_back.is_some_and(|(first, most)| first == self.ring.first() && count <= most);
        let is_all = is_read
            || found == count
            // A page would not have more either.
            || self.ring.bytes() >= MAX_PAGE_BYTES
            || self.ring.start().is_some_and(|start| start.offset == 0);
        is_all.then_some(number)
    }

    /// The log was read from its end on, for somebody who wants the newest `count` publications. Returns where to begin.
    ///
    /// Only once this node has [reached](Self::has_reached) the top of the page, as for [`backfill`](Self::backfill).
    pub fn backfill_last(&mut self, count: usize, page: Page, make: impl Fn(Entry) -> (P, usize)) -> u64 {
        // A page that is not full has everything, or as many bytes as a page may have.
        let most = if page.entries.len() < count { usize::MAX } else { count };
        if let Some(first) = page.entries.first() {
            let Place { cursor, follows } = first.place;
            let before = follows.cursor().unwrap_or(Cursor { offset: 0, ..cursor });
            // The number is that of the page's first publication, which may be earlier than what is wanted.
            let _ = self.backfill(before, Page { start: Start::Continuous, ..page }, make);
        }
        self.read_back = Some((self.ring.first(), most));
        self.ring.last(count).0
    }

    /// Whether everything up to this position has arrived, as far as it will.
    pub fn has_reached(&self, top: Option<Cursor>) -> bool {
        let has_seen = top.zip(self.seen).is_none_or(|(top, seen)| seen >= top);
        has_seen && self.repair.is_none()
    }

    /// The log was read from after `cursor` on, for somebody who comes back from there: the pages until one that
    /// reaches [what the ring has](Ring::start), or the newest. Returns where to continue, and the gap to be told
    /// before.
    ///
    /// Only once this node has [reached](Self::has_reached) the top of the page: otherwise what is still on its way would
    /// come again.
    pub fn backfill(
        &mut self,
        cursor: Cursor,
        page: Page,
        make: impl Fn(Entry) -> (P, usize),
    ) -> (u64, Option<GapCause>) {
        if let Resume::At(number) = self.resume(cursor) {
            return (number, None);
        }
        if self.seen.is_none() {
            // Nothing is known of what is on its way.
            return (self.ring.next(), Some(GapCause::Interrupted));
        }
        let is_continuous = page.start == Start::Continuous;
        if is_continuous && !self.ring.is_before(cursor) {
            // The ring has a gap there, but whoever comes back has been told what was before it.
            let first = page.entries.first().map(|entry| entry.place.cursor);
            // If nothing followed, something may have since, with a gap before it.
            let number = first.map_or(Some(self.ring.past(cursor)), |first| self.ring.number_of(first));
            if let Some(number) = number {
                return (number, None);
            }
        }
        // Where that is not proven, whoever stands there has to be told.
        let before_first = page.entries.first().map(|entry| entry.place.follows);
        let before_first =
            before_first.filter(|follows| !matches!(follows, Follows::Unproven(_))).and_then(Follows::cursor);
        let mut items = Vec::new();
        let mut reaches = is_continuous.then_some(cursor);
        let mut newer = None;
        for entry in page.entries {
            let at = entry.place.cursor;
            // What the ring has, and what arrives on the topic. The ring may begin later than what it has, if the server
            // went back in time and its clock, too.
            if !self.ring.is_before(at) || self.ring.number_of(at).is_some() {
                newer = Some(entry.place);
                break;
            }
            if matches!(entry.place.follows, Follows::Unproven(_)) && (!items.is_empty() || is_continuous) {
                items.push((Item::Gap(GapCause::Failover), 0));
            }
            let (publication, bytes) = make(entry);
            items.push((Item::Publication(publication, Some(at)), bytes));
            reaches = Some(at);
        }
        if let Some(newer) = newer
            && reaches != self.ring.start()
            && !self.ring.is_begun_by(newer)
        {
            // The server went back in time: it no longer has what came right before the ring.
            items.push((Item::Gap(GapCause::Failover), 0));
        }
        let is_older = self.ring.is_before(cursor) || !is_continuous;
        if is_older && (newer.is_some() || (reaches.is_some() && reaches == self.ring.start())) {
            let start = if is_continuous { Some(cursor) } else { before_first };
            self.ring.prepend(items.into_iter(), start);
            self.ring.trim(self.bounds.items, self.bounds.bytes);
        }
        if let Resume::At(number) = self.resume(cursor) {
            return (number, None);
        }
        let cause = if page.start == Start::Lost { GapCause::Expired } else { GapCause::Trimmed };
        // A position of this epoch that is yet to come may be somebody's later.
        let is_to_come = page.top.is_some_and(|top| cursor.epoch == top.epoch && cursor > top);
        if !is_continuous && !is_to_come {
            self.unknown.truncate(UNKNOWN - 1);
            self.unknown.push_front((cursor, cause));
        }
        (self.ring.later_than(cursor), Some(cause))
    }
}

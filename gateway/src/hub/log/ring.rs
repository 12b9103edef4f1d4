//! The newest part of a room's log, in memory.

use std::collections::VecDeque;

use broker_bridge::{Cursor, Follows, GapCause, Place};

/// One item of a room, in the order in which its members receive them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item<P> {
    /// A publication, and its position if it is recorded.
    Publication(P, Option<Cursor>),
    /// Publications may be missing here.
    Gap(GapCause),
}

impl<P> Item<P> {
    fn cursor(&self) -> Option<Cursor> {
        match self {
            Self::Publication(_, cursor) => *cursor,
            Self::Gap(_) => None,
        }
    }
}

/// How many items are taken at once.
const PIECE: usize = 256;

/// The numbers of the items begin here, so that older items can be put before the first.
const FIRST: u64 = 1 << 32;

/// The items, each with a number that is one more than that of the item before. Numbers are this node's own, and mean
/// nothing elsewhere.
#[derive(Debug)]
pub struct Ring<P> {
    items: VecDeque<(Item<P>, usize)>,
    /// The number of the first item.
    first: u64,
    /// The position right before the first item, if it is known that nothing is missing in between.
    start: Option<Cursor>,
    /// What the items hold.
    bytes: usize,
}

impl<P> Default for Ring<P> {
    fn default() -> Self {
        Self { items: VecDeque::new(), first: FIRST, start: None, bytes: 0 }
    }
}

impl<P: Clone> Ring<P> {
    /// What the items hold, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it has no item.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The number that the next item gets.
    pub fn next(&self) -> u64 {
        self.first + self.items.len() as u64
    }

    /// The number of the first item.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// The number of the item with which the newest `count` publications with a position begin, and how many of them
    /// there are.
    pub fn last(&self, count: usize) -> (u64, usize) {
        let numbered = (self.first..).zip(self.items.iter().map(|(item, _)| item));
        let recorded = numbered.filter(|(_, item)| item.cursor().is_some()).map(|(number, _)| number);
        let newest: Vec<_> = recorded.collect();
        let skipped = newest.len().saturating_sub(count);
        (newest.get(skipped).copied().unwrap_or(self.next()), newest.len() - skipped)
    }

    /// The position right before the first item.
    pub fn start(&self) -> Option<Cursor> {
        self.start
    }

    /// Whether its first publication with a position is the one at this place, and nothing was lost before it that is
    /// not told.
    pub fn is_begun_by(&self, place: Place) -> bool {
        let begins_with_gap = matches!(self.items.front(), Some((Item::Gap(_), _)));
        self.items.iter().find_map(|(item, _)| item.cursor()) == Some(place.cursor)
            && (begins_with_gap || !matches!(place.follows, Follows::Unproven(_)))
    }

    /// Says which position comes right before the first item, which is the next to be appended. Only while it is empty.
    pub fn begin(&mut self, start: Option<Cursor>) {
        debug_assert!(self.items.is_empty(), "the first item is known");
        self.start = start;
    }

    /// Appends an item of this many bytes.
    pub fn push(&mut self, item: Item<P>, bytes: usize) {
        self.items.push_back((item, bytes));
        self.bytes += bytes;
    }

    /// Puts older items before the first, which begin right after `start`.
    pub fn prepend(
        &mut self,
        items: impl DoubleEndedIterator<Item = (Item<P>, usize)>,
        start: Option<Cursor>,
    ) {
        for (item, bytes) in items.rev() {
            self.items.push_front((item, bytes));
            self.bytes += bytes;
            self.first -= 1;
        }
        self.start = start;
    }

    /// Removes the oldest items beyond this number and these bytes. The newest item always stays.
    pub fn trim(&mut self, count: usize, bytes: usize) {
        while self.items.len() > 1 && (self.items.len() > count || self.bytes > bytes) {
            let Some((item, size)) = self.items.pop_front() else { return };
            self.bytes -= size;
            self.first += 1;
            // Whoever stands before a gap, or before a publication without a position, has not passed it.
            self.start = item.cursor();
        }
    }

    /// Puts other publications, of the same size, in the place of those for which there are any.
    pub fn renew(&mut self, other: impl Fn(&P) -> Option<P>) {
        for (item, _) in &mut self.items {
            if let Item::Publication(publication, _) = item
                && let Some(other) = other(publication)
            {
                *publication = other;
            }
        }
    }

    /// The number of the first item after this position. `None` if the ring does not know what follows it.
    pub fn after(&self, cursor: Cursor) -> Option<u64> {
        match self.number_of(cursor) {
            Some(number) => Some(number + 1),
            None => (self.start == Some(cursor)).then_some(self.first),
        }
    }

    /// The number of the first item of an epoch, if this is the position right before it in that epoch. Nobody has
    /// received a publication with this position. It is told to members that have received everything before the
    /// epoch, and know its name from then on.
    pub fn first_of_epoch_after(&self, cursor: Cursor) -> Option<u64> {
        let first = Cursor { offset: cursor.offset.checked_add(1)?, ..cursor };
        let number = self.number_of(first)?;
        let before = match number.checked_sub(self.first + 1) {
            Some(index) => self.items.get(usize::try_from(index).ok()?).and_then(|(item, _)| item.cursor()),
            None => self.start,
        };
        before.is_some_and(|before| before.epoch != cursor.epoch).then_some(number)
    }

    /// The number of the item at this position.
    pub fn number_of(&self, cursor: Cursor) -> Option<u64> {
        let found = self.items.iter().rposition(|(item, _)| item.cursor() == Some(cursor));
        found.map(|index| self.first + index as u64)
    }

    /// Whether this position is before the first item.
    pub fn is_before(&self, cursor: Cursor) -> bool {
        match self.start {
            Some(start) => cursor <= start,
            None => self.items.iter().find_map(|(item, _)| item.cursor()).is_some_and(|first| cursor < first),
        }
    }

    /// The number of the first item whose position is later than this one, or of the next to be appended.
    pub fn later_than(&self, cursor: Cursor) -> u64 {
        let found = self.items.iter().position(|(item, _)| item.cursor().is_some_and(|at| at > cursor));
        found.map_or(self.next(), |index| self.first + index as u64)
    }

    /// The number right after the last item whose position is not later than this one.
    pub fn past(&self, cursor: Cursor) -> u64 {
        let found = self.items.iter().rposition(|(item, _)| item.cursor().is_some_and(|at| at <= cursor));
        found.map_or(self.first, |index| self.first + index as u64 + 1)
    }

    /// The last position before the item with this number.
    pub fn position_before(&self, number: u64) -> Option<Cursor> {
        let before =
            usize::try_from(number.saturating_sub(self.first)).unwrap_or(usize::MAX).min(self.items.len());
        let found = self.items.range(..before).rev().find_map(|(item, _)| item.cursor());
        found.or(self.start)
    }

    /// The items from number `from` on, until they hold `bytes`, and at most [`PIECE`]: at least one, if there is any. Also the number of the
    /// first item that the ring still has, if that is later than `from`.
    pub fn slice(&self, from: u64, bytes: usize) -> (Option<u64>, Vec<(u64, Item<P>)>) {
        let begin = from.max(self.first);
        let skip = usize::try_from(begin - self.first).unwrap_or(usize::MAX);
        let mut taken = Vec::new();
        let mut held = 0;
        for (index, (item, size)) in self.items.iter().enumerate().skip(skip) {
            held += size;
            if (held > bytes || taken.len() == PIECE) && !taken.is_empty() {
                break;
            }
            taken.push((self.first + index as u64, item.clone()));
        }
        ((begin > from).then_some(begin), taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(epoch: u64, offset: u64) -> Cursor {
        Cursor { epoch, offset }
    }

    #[test]
    fn the_position_before_an_epoch_is_known_where_the_epoch_follows_another_without_a_gap() {
        let mut ring = Ring::default();
        ring.begin(Some(at(5, 2)));
        for item in [
            Item::Publication((), Some(at(6, 3))),
            Item::Publication((), Some(at(7, 1))),
            Item::Publication((), None),
            Item::Publication((), Some(at(8, 2))),
            Item::Gap(GapCause::Failover),
            Item::Publication((), Some(at(9, 3))),
        ] {
            ring.push(item, 1);
        }
        let first = ring.next() - 6;
        for (position, number) in [
            (at(6, 2), Some(first)),
            (at(7, 0), Some(first + 1)),
            // Something without a position is before it.
            (at(8, 1), None),
            // A gap is before it.
            (at(9, 2), None),
            // Within an epoch, nothing but the position itself counts.
            (at(5, 2), None),
            (at(6, 3), None),
            (at(7, 1), None),
            (at(10, u64::MAX), None),
        ] {
            assert_eq!(ring.first_of_epoch_after(position), number, "{position}");
        }
    }
}

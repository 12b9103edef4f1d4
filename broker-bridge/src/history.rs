//! Positions in a room's history, and what is read from it.
//!
//! A room with a history has a *log*: its publications in the order in which the broker accepted them, as many and for
//! as long as its [`Retention`] says. A [`Cursor`] is the position of one publication in the log. A client that knows
//! the cursor of the last publication that it has received can ask for everything after it, on any node.
//!
//! # Epochs
//!
//! The offset alone does not name a publication: a server that restarts from an older snapshot, or a replica that is
//! promoted without its master's last writes, counts from an earlier offset again. So each reign of a server writes
//! under an epoch of its own. Offsets go on across epochs of one log, and a log that was deleted begins anew at offset
//! 1 under an epoch that was never used in the room.
//!
//! [`Follows`] says what came before a publication. Whether anything is missing between two publications is decided by
//! that alone and never by arithmetic.

use std::{fmt, num::NonZeroU32, str::FromStr, time::Duration};

use crate::Publication;

/// The position of a publication in its room's log, written `<epoch>-<offset>`. Offset 0 is the beginning of a log that
/// has no publication yet.
///
/// Cursors of one log ascend. Those of different rooms have nothing to do with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cursor {
    /// Names the reign that wrote it.
    pub epoch: u64,
    /// Counts the room's publications.
    pub offset: u64,
}

/// Why a text is not a [`Cursor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a position: two decimal numbers below 2^64 with a hyphen between them")]
pub struct InvalidCursor;

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.offset)
    }
}

impl FromStr for Cursor {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |digits: &str| {
            let only_digits = digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|_| only_digits).ok_or(InvalidCursor)
        };
        let (epoch, offset) = text.split_once('-').ok_or(InvalidCursor)?;
        Ok(Self { epoch: number(epoch)?, offset: number(offset)? })
    }
}

/// The place of a publication in its room's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its position.
    pub cursor: Cursor,
    /// What comes before it.
    pub follows: Follows,
}

impl Place {
    /// The place of a publication right after the one with the offset before, in the same epoch, or at the beginning of
    /// a log.
    pub(crate) fn within_epoch(cursor: Cursor) -> Self {
        let Cursor { epoch, offset } = cursor;
        let follows = if offset > 1 {
            Follows::Previous(Cursor { epoch, offset: offset - 1 })
        } else {
            Follows::Nothing
        };
        Self { cursor, follows }
    }

    /// If it is the first of an epoch in a log that has had others: the position before it, in the same epoch, which no
    /// publication has.
    fn begins_after(&self) -> Option<Cursor> {
        let before = self.follows.cursor().filter(|before| before.epoch != self.cursor.epoch);
        before.map(|_| Cursor { offset: self.cursor.offset.saturating_sub(1), ..self.cursor })
    }

    /// Whether it is the first that was published after `cursor`, so that nothing is in between that the log knows of.
    pub(crate) fn comes_after(&self, cursor: Cursor) -> bool {
        match self.follows.cursor() {
            Some(before) => before == cursor,
            None => cursor == Cursor { offset: 0, ..self.cursor },
        }
    }
}

/// What comes before a publication in its room's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follows {
    /// The publication at this position, and nothing in between.
    Previous(Cursor),
    /// The publication at this position is the last that the log's server knows of. A server that reigned before may
    /// have accepted others after it, which are lost.
    Unproven(Cursor),
    /// The publication at this position. The log has moved to another server since, and nothing was lost.
    Moved(Cursor),
    /// Nothing: the log begins here. What the room had before is lost, if anything.
    Nothing,
}

impl Follows {
    /// The position before, if there is one.
    pub fn cursor(self) -> Option<Cursor> {
        match self {
            Self::Previous(cursor) | Self::Unproven(cursor) | Self::Moved(cursor) => Some(cursor),
            Self::Nothing => None,
        }
    }
}

/// How much of a room's publications its log keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The number of publications. A log may keep up to a few hundred more.
    pub size: NonZeroU32,
    /// How long the log is kept after its last publication. `None`: until it is cleared.
    pub ttl: Option<Duration>,
}

/// The last 1,000 publications, for ten minutes.
impl Default for Retention {
    fn default() -> Self {
        const SIZE: NonZeroU32 = NonZeroU32::new(1000).expect("not zero");
        Self { size: SIZE, ttl: Some(Duration::from_secs(600)) }
    }
}

/// Where to begin to read a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// After the publication at this position, forwards.
    After(Cursor),
    /// So that the page ends with the newest publication.
    Last,
    /// So that the page ends with the publication before the one at this position.
    Before(Cursor),
}

/// A part of a log, the oldest first. Each publication comes right after the one before it in the page.
///
/// The next page begins after the last publication of this one; after an empty page, at its [`top`](Self::top).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The publications.
    pub entries: Vec<Entry>,
    /// What the page means for whoever has received everything up to the position that was asked for. What the first
    /// publication [follows](Place::follows) says whether that is proven.
    pub start: Start,
    /// The position of the newest publication in the log when the page was read, or of its beginning: a page that does
    /// not end there has a next one. `None` if there is no log.
    pub top: Option<Cursor>,
}

/// One publication of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place.
    pub place: Place,
    /// The publication, as it was published.
    pub publication: Publication,
}

/// How a page begins. It never contains publications up to the position that was asked for, in the order of cursors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Right after the position that was asked for, or as was asked: the position is known.
    Continuous,
    /// Later in the same log: publications in between have been removed, or are larger than this node accepts.
    Trimmed,
    /// The position is not known in this log: it belongs to another room, the log was deleted or has expired, it was lost
    /// together with a server, or no publication ever had it. Nothing is known of what was in between.
    Lost,
}

impl Start {
    /// How a page begins that was read after `asked`: with a publication at the place `first`, or empty. `top` is the
    /// position of the newest publication, if there is a log.
    pub(crate) fn after(asked: Cursor, first: Option<Place>, top: Option<Cursor>) -> Self {
        let is_earlier = |later: Cursor| later.epoch == asked.epoch && asked < later;
        match first {
            Some(first) if first.comes_after(asked) => Self::Continuous,
            Some(first) if is_earlier(first.cursor) => match first.begins_after() {
                None => Self::Trimmed,
                // Clients are told this position when an epoch begins and nothing is missing before it.
                Some(before) if before == asked && !matches!(first.follows, Follows::Unproven(_)) => {
                    Self::Continuous
                }
                // The epoch has nothing before `first`. What another epoch has there is not in the page.
                Some(_) => Self::Lost,
            },
            None if top == Some(asked) => Self::Continuous,
            None if top.is_some_and(is_earlier) => Self::Trimmed,
            _ => Self::Lost,
        }
    }

    /// How a page begins that ends before `asked`. `is_kept` says whether the log has an entry at that position, and
    /// `has_older` whether it has any before it. `top` is the position of the newest publication, if there is a log.
    pub(crate) fn before(asked: Cursor, is_kept: bool, has_older: bool, top: Option<Cursor>) -> Self {
        // The oldest entries are removed first. So an entry that is gone while an older one is kept never existed.
        let may_have_been = !has_older && top.is_some_and(|top| top.epoch == asked.epoch && asked <= top);
        if is_kept || may_have_been { Self::Continuous } else { Self::Lost }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_are_written_as_two_numbers() {
        let cursor = Cursor { epoch: u64::MAX, offset: 0 };
        assert_eq!(cursor.to_string(), "18446744073709551615-0");
        assert_eq!(cursor.to_string().parse(), Ok(cursor));
        for text in [
            "",
            "-",
            "1",
            "1-",
            "-1",
            "1-2-3",
            "+1-2",
            "1-+2",
            " 1-2",
            "1-2 ",
            "18446744073709551616-0",
            "a-b",
        ] {
            assert_eq!(text.parse::<Cursor>(), Err(InvalidCursor), "{text:?}");
        }
    }

    #[test]
    fn a_page_is_continuous_only_if_nothing_can_be_missing_before_it() {
        let at = |epoch, offset| Cursor { epoch, offset };
        let place = |epoch, offset| Place::within_epoch(at(epoch, offset));
        let linked = |follows| Place { cursor: at(7, 6), follows };
        for (asked, first, top, start) in [
            // In one epoch.
            (at(5, 3), Some(place(5, 4)), at(5, 9), Start::Continuous),
            (at(5, 0), Some(place(5, 1)), at(5, 9), Start::Continuous),
            (at(5, 3), Some(place(5, 5)), at(5, 9), Start::Trimmed),
            (at(5, 0), Some(place(5, 2)), at(5, 9), Start::Trimmed),
            // Nothing is left.
            (at(5, 9), None, at(5, 9), Start::Continuous),
            (at(5, 0), None, at(5, 0), Start::Continuous),
            (at(5, 8), None, at(5, 9), Start::Trimmed),
            (at(5, 10), None, at(5, 9), Start::Lost),
            (at(4, 9), None, at(5, 9), Start::Lost),
            (at(6, 1), None, at(5, 9), Start::Lost),
            // Over the boundary of an epoch.
            (at(5, 5), Some(linked(Follows::Unproven(at(5, 5)))), at(7, 6), Start::Continuous),
            (at(5, 5), Some(linked(Follows::Moved(at(5, 5)))), at(7, 6), Start::Continuous),
            (at(5, 6), Some(linked(Follows::Unproven(at(5, 5)))), at(7, 6), Start::Lost),
            (at(5, 4), Some(linked(Follows::Unproven(at(5, 5)))), at(7, 6), Start::Lost),
            // Before the first of an epoch, in the same epoch: only the position right before it is ever told, and only
            // where nothing is missing. The log has what an earlier epoch had at those offsets.
            (at(7, 5), Some(linked(Follows::Moved(at(5, 5)))), at(7, 9), Start::Continuous),
            (at(7, 5), Some(linked(Follows::Previous(at(5, 5)))), at(7, 9), Start::Continuous),
            (at(7, 5), Some(linked(Follows::Unproven(at(5, 5)))), at(7, 9), Start::Lost),
            (at(7, 3), Some(linked(Follows::Moved(at(5, 5)))), at(7, 9), Start::Lost),
            (at(7, 3), Some(linked(Follows::Unproven(at(5, 5)))), at(7, 9), Start::Lost),
            (at(6, 5), Some(linked(Follows::Moved(at(5, 5)))), at(7, 9), Start::Lost),
            // Within an epoch that follows another one.
            (at(7, 6), Some(place(7, 7)), at(7, 9), Start::Continuous),
            (at(7, 3), Some(place(7, 8)), at(7, 9), Start::Trimmed),
            // A log that began anew.
            (at(5, 0), Some(place(6, 1)), at(6, 1), Start::Lost),
            (at(5, 3), Some(place(6, 4)), at(6, 4), Start::Lost),
        ] {
            assert_eq!(Start::after(asked, first, Some(top)), start, "{asked} {first:?} {top}");
        }
        assert_eq!(Start::after(at(5, 0), None, None), Start::Lost);
    }

    #[test]
    fn a_position_that_is_gone_while_older_ones_are_kept_never_existed() {
        let at = |epoch, offset| Cursor { epoch, offset };
        let top = Some(at(7, 9));
        for (asked, is_kept, has_older, start) in [
            (at(7, 6), true, true, Start::Continuous),
            (at(5, 6), true, false, Start::Continuous),
            (at(7, 6), false, false, Start::Continuous),
            (at(7, 9), false, false, Start::Continuous),
            (at(7, 6), false, true, Start::Lost),
            (at(7, 10), false, false, Start::Lost),
            (at(5, 6), false, false, Start::Lost),
            (at(5, 6), false, true, Start::Lost),
        ] {
            assert_eq!(Start::before(asked, is_kept, has_older, top), start, "{asked} {is_kept} {has_older}");
        }
        assert_eq!(Start::before(at(7, 6), false, false, None), Start::Lost);
    }
}

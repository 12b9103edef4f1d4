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

/// Where to begin to read a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// After the publication at this position, forwards.
    After(Cursor),
    /// So that the page ends with the newest publication.
    Last,
}

/// A part of a log, the oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The publications.
    pub entries: Vec<Entry>,
    /// What the page means for whoever has received everything up to the position that was asked for.
    pub start: Start,
    /// The position of the newest publication in the log: a page that does not end there has a next one. `None` if
    /// there is no log.
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

/// How a page begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Right after the position that was asked for, or as was asked.
    Continuous,
    /// Later: publications in between have been removed, because there were too many.
    Trimmed,
    /// The position is not in the log: it belongs to another room, the log was deleted or has expired, or it was
    /// lost together with a server. The page begins with the oldest publication.
    Lost,
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
}

//! The positions of a session in several rooms.

use std::{cell::Cell, fmt, str::FromStr};

use broker_bridge::{Cursor, history::InvalidCursor};

/// What a session's client has received in each of its rooms, in the order of the rooms. Written as positions with
/// commas between them; nothing stands for a room without a position: `17-42,,18-3`.
///
/// Heads update it as they are written ([`MemberState`](super::MemberState)), so it always says what the client has
/// received once it has read everything up to that head.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Positions(Box<[Cell<Option<Cursor>>]>);

impl Positions {
    /// These positions.
    pub fn new(positions: impl IntoIterator<Item = Option<Cursor>>) -> Self {
        Self(positions.into_iter().map(Cell::new).collect())
    }

    /// The position in the room with this index.
    pub fn get(&self, index: usize) -> Option<Cursor> {
        self.0.get(index)?.get()
    }

    /// Replaces the position in the room with this index.
    pub fn set(&self, index: usize, position: Cursor) {
        if let Some(known) = self.0.get(index) {
            known.set(Some(position));
        }
    }

    /// The positions, in the order of the rooms.
    pub fn iter(&self) -> impl Iterator<Item = Option<Cursor>> {
        self.0.iter().map(Cell::get)
    }
}

impl fmt::Display for Positions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, position) in self.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            if let Some(position) = position {
                write!(f, "{position}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for Positions {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let position = |text: &str| if text.is_empty() { Ok(None) } else { text.parse().map(Some) };
        let positions: Vec<_> = text.split(',').map(position).collect::<Result<_, _>>()?;
        Ok(Self::new(positions))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_positions_and_commas_are_read() {
        let positions: Positions = "17-42,,18-3".parse().unwrap();
        let at = |epoch, offset| Some(Cursor { epoch, offset });
        assert!(positions.iter().eq([at(17, 42), None, at(18, 3)]));
        assert!("".parse::<Positions>().unwrap().iter().eq([None]));
        for text in
            ["17", "17-42;18-3", "17-42, 18-3", "17-42,x", "-,", "lobby;17-42", "1-1,1-99999999999999999999"]
        {
            assert_eq!(text.parse::<Positions>(), Err(InvalidCursor), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            all in prop::collection::vec(prop::option::of((any::<u64>(), any::<u64>())), 1..20)
        ) {
            let cursor = |(epoch, offset)| Cursor { epoch, offset };
            let positions = Positions::new(all.into_iter().map(|position| position.map(cursor)));
            let text = positions.to_string();
            prop_assert!(text.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'-' | b',')));
            prop_assert_eq!(text.parse::<Positions>(), Ok(positions));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[0-9,;a-]*") {
            if let Ok(positions) = text.parse::<Positions>() {
                prop_assert_eq!(positions.iter().count(), text.split(',').count());
            }
        }
    }
}

//! A client's position in a room with a history.
//!
//! Owns how a position is written: `<epoch>-<offset>`, both numbers. A client that comes back sends the last
//! one that it received and gets everything after it.

use std::fmt;

/// The position of a message, or of the start of a subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub epoch: u64,
    pub offset: u64,
}

impl Place {
    /// Reads `<epoch>-<offset>`; `None` for any other text, such as the id of a stream of several rooms.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (epoch, offset) = std::str::from_utf8(text).ok()?.split_once('-')?;
        Some(Self { epoch: epoch.parse().ok()?, offset: offset.parse().ok()? })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_as_they_are_written() {
        let place = Place { epoch: 2_181_990_568_866_111_835, offset: 3 };
        assert_eq!(place.to_string(), "2181990568866111835-3");
        assert_eq!(Place::parse(place.to_string().as_bytes()), Some(place));
        for other in ["", "-", "lobby", "1", "1-", "-1", "1-2-3", "a%3A7"] {
            assert_eq!(Place::parse(other.as_bytes()), None, "{other}");
        }
    }
}

//! How much of a room's publications is kept.
//!
//! Owns the configured policies ([`HistoryPolicies`]) and decides which of several matching patterns applies to a
//! room. Also names where a client may begin in such a room ([`Beginning`]). The broker keeps the publications.

use std::{num::NonZeroU32, str::FromStr, time::Duration};

use broker_bridge::{Cursor, Retention, RoomName};

use crate::auth::grant::PolicyPattern;

/// The configured history for the rooms of one pattern. `None` leaves a setting to another pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryPolicy {
    /// The rooms. `{sub}` stands for any subject.
    pub pattern: PolicyPattern,
    /// How many publications are kept.
    pub size: Option<NonZeroU32>,
    /// How long they are kept after the last one.
    pub ttl: Option<Ttl>,
    /// Which of them arrive as one.
    pub join: Option<Join>,
}

/// Which consecutive publications arrive as one at a client that catches up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Join {
    /// None.
    #[default]
    Nothing,
    /// Texts with the same event and user: pieces of one longer text.
    Text,
}

/// Why a text is not a [`Join`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected none or text")]
pub struct UnknownJoin;

impl FromStr for Join {
    type Err = UnknownJoin;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::Nothing),
            "text" => Ok(Self::Text),
            _ => Err(UnknownJoin),
        }
    }
}

/// How long a history is kept after its last publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ttl {
    /// For this time.
    Expires(Duration),
    /// Until it is cleared.
    Never,
}

/// Where a client begins in a room with a history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Beginning {
    /// With the next publication.
    #[default]
    Live,
    /// Right after this position: the client has received everything up to there.
    After(Cursor),
    /// With the newest publications, as many as this. The client has no claim to what was before.
    Last(NonZeroU32),
}

impl From<Option<Cursor>> for Beginning {
    fn from(since: Option<Cursor>) -> Self {
        since.map_or(Self::Live, Self::After)
    }
}

impl Beginning {
    /// The position after which the client continues.
    pub fn since(self) -> Option<Cursor> {
        match self {
            Self::After(position) => Some(position),
            Self::Live | Self::Last(_) => None,
        }
    }
}

/// All configured histories.
#[derive(Debug, Default)]
pub struct HistoryPolicies {
    /// The most precise pattern comes first. Empty if none gives a size.
    policies: Box<[HistoryPolicy]>,
}

impl HistoryPolicies {
    /// Accepts policies in any order.
    pub fn new(policies: &[HistoryPolicy]) -> Self {
        // A policy without a size still matters, because its ttl applies together with another one's size.
        let says_something =
            |policy: &&HistoryPolicy| policy.size.is_some() || policy.ttl.is_some() || policy.join.is_some();
        let mut policies: Box<[_]> = policies.iter().filter(says_something).cloned().collect();
        if policies.iter().all(|policy| policy.size.is_none()) {
            return Self::default();
        }
        policies.sort_by_key(|policy| std::cmp::Reverse(policy.pattern.precision()));
        Self { policies }
    }

    /// How much of the publications of `room` is kept; `None` if the room has no history. Compares the room with
    /// every pattern, or with none if no room has a history.
    pub fn of(&self, room: &RoomName) -> Option<Retention> {
        let mut matching = self.policies.iter().filter(|policy| policy.pattern.covers(room));
        let (mut size, mut ttl) = (None, None);
        while let Some(policy) = matching.next()
            && (size.is_none() || ttl.is_none())
        {
            size = size.or(policy.size);
            ttl = ttl.or(policy.ttl);
        }
        let ttl = match ttl {
            None => Retention::default().ttl,
            Some(Ttl::Expires(time)) => Some(time),
            Some(Ttl::Never) => None,
        };
        size.map(|size| Retention { size, ttl })
    }

    /// Which publications of `room` arrive as one at a client that catches up.
    pub fn join(&self, room: &RoomName) -> Join {
        let mut matching = self.policies.iter().filter(|policy| policy.pattern.covers(room));
        matching.find_map(|policy| policy.join).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(pattern: &str, size: Option<u32>, ttl: Option<Ttl>) -> HistoryPolicy {
        let size = size.map(|size| size.try_into().unwrap());
        HistoryPolicy { pattern: pattern.parse().unwrap(), size, ttl, join: None }
    }

    fn seconds(seconds: u64) -> Ttl {
        Ttl::Expires(Duration::from_secs(seconds))
    }

    #[test]
    fn size_and_ttl_each_come_from_the_most_specific_pattern() {
        let policies = HistoryPolicies::new(&[
            policy("*", None, Some(seconds(60))),
            policy("chat:*", Some(100), None),
            policy("chat:long:*", Some(1000), Some(seconds(3600))),
            policy("chat:long:last", Some(1), Some(Ttl::Never)),
            policy("chat:{sub}:in", None, Some(seconds(5))),
            policy("news", Some(7), None),
        ]);
        let of = |room: &str| {
            let retention = policies.of(&RoomName::new(room).unwrap());
            retention.map(|Retention { size, ttl }| (size.get(), ttl.map(|ttl| ttl.as_secs())))
        };
        assert_eq!(of("lobby"), None, "a ttl alone is no history");
        assert_eq!(of("chat:a"), Some((100, Some(60))));
        assert_eq!(of("chat:a:in"), Some((100, Some(5))));
        assert_eq!(of("chat:long:a"), Some((1000, Some(3600))));
        assert_eq!(of("chat:long:last"), Some((1, None)));
        assert_eq!(of("news"), Some((7, Some(60))));
    }

    #[test]
    fn a_history_without_a_ttl_is_kept_for_the_default_time() {
        let lobby = RoomName::new("lobby").unwrap();
        let policies = HistoryPolicies::new(&[policy("lobby", Some(3), None)]);
        assert_eq!(
            policies.of(&lobby),
            Some(Retention { size: 3.try_into().unwrap(), ..Retention::default() })
        );
        assert_eq!(HistoryPolicies::default().of(&lobby), None);
    }

    #[test]
    fn the_most_specific_pattern_says_what_is_joined() {
        let join = |join, policy| HistoryPolicy { join, ..policy };
        let policies = HistoryPolicies::new(&[
            join(Some(Join::Text), policy("answer:*", None, None)),
            join(Some(Join::Nothing), policy("answer:raw:*", None, None)),
            policy("*", Some(5), None),
        ]);
        let of = |room: &str| policies.join(&RoomName::new(room).unwrap());
        assert_eq!(
            [of("answer:1"), of("answer:raw:1"), of("lobby")],
            [Join::Text, Join::Nothing, Join::Nothing]
        );
        assert_eq!(["none", "text"].map(str::parse), [Ok(Join::Nothing), Ok(Join::Text)]);
        assert_eq!("texts".parse::<Join>(), Err(UnknownJoin));
    }

    /// Each publication asks, also where no room has a history.
    #[test]
    fn without_a_size_no_pattern_is_compared() {
        let policies = HistoryPolicies::new(&[policy("*", None, Some(Ttl::Never)), policy("a", None, None)]);
        assert!(policies.policies.is_empty());
    }
}

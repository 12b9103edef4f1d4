//! How a room's publications behave in the outbound queues of its members.
//!
//! Owns the types ([`Overflow`], [`Delivery`]) and decides which of several matching patterns applies to a
//! room. The queue itself belongs to the shard.

use std::str::FromStr;

use broker_bridge::RoomName;

use crate::auth::grant::PolicyPattern;

/// What happens if a publication does not fit into a session's outbound queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// The session is closed as slow.
    #[default]
    Close,
    /// The oldest queued publications of the room are dropped.
    DropOldest,
    /// All queued publications of the room are dropped, because only the latest matters. This happens as soon
    /// as the socket falls behind, whether the queue is full or not.
    Latest,
}

/// Why a text is not an [`Overflow`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected close, drop_oldest or latest")]
pub struct UnknownOverflow;

/// How the publications of a room are delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// What happens when a queue is full.
    pub overflow: Overflow,
    /// Whether they overtake queued publications of rooms without priority.
    pub priority: bool,
}

/// The configured delivery for the rooms of one pattern. `None` leaves a setting to another pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryPolicy {
    /// The rooms. `{sub}` stands for any subject.
    pub pattern: PolicyPattern,
    /// What happens when a queue is full.
    pub overflow: Option<Overflow>,
    /// Whether publications overtake those of other rooms.
    pub priority: Option<bool>,
}

/// All configured delivery policies.
#[derive(Debug, Default)]
pub struct DeliveryPolicies {
    /// The most precise pattern comes first.
    policies: Box<[DeliveryPolicy]>,
}

impl DeliveryPolicies {
    /// Accepts policies in any order.
    pub fn new(policies: &[DeliveryPolicy]) -> Self {
        let says_something =
            |policy: &&DeliveryPolicy| policy.overflow.is_some() || policy.priority.is_some();
        let mut policies: Box<[_]> = policies.iter().filter(says_something).cloned().collect();
        policies.sort_by_key(|policy| std::cmp::Reverse(policy.pattern.precision()));
        Self { policies }
    }

    /// How publications of `room` are delivered. Compares the room with every pattern, so call it once for
    /// all members.
    pub fn of(&self, room: &RoomName) -> Delivery {
        let mut matching = self.policies.iter().filter(|policy| policy.pattern.covers(room));
        let (mut overflow, mut priority) = (None, None);
        while let Some(policy) = matching.next()
            && (overflow.is_none() || priority.is_none())
        {
            overflow = overflow.or(policy.overflow);
            priority = priority.or(policy.priority);
        }
        Delivery { overflow: overflow.unwrap_or_default(), priority: priority.unwrap_or_default() }
    }
}

impl FromStr for Overflow {
    type Err = UnknownOverflow;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "close" => Ok(Self::Close),
            "drop_oldest" => Ok(Self::DropOldest),
            "latest" => Ok(Self::Latest),
            _ => Err(UnknownOverflow),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(pattern: &str, overflow: Option<Overflow>, priority: Option<bool>) -> DeliveryPolicy {
        DeliveryPolicy { pattern: pattern.parse().unwrap(), overflow, priority }
    }

    #[test]
    fn the_most_specific_pattern_applies() {
        let policies = DeliveryPolicies::new(&[
            policy("*", Some(Overflow::Close), Some(true)),
            policy("price:*", Some(Overflow::Latest), None),
            policy("price:eur*", Some(Overflow::DropOldest), None),
            policy("price:eur", None, Some(false)),
            policy("user:{sub}:in", Some(Overflow::Latest), None),
            policy("price:eurusd", None, None),
        ]);
        let of = |room: &str| {
            let Delivery { overflow, priority } = policies.of(&RoomName::new(room).unwrap());
            (overflow, priority)
        };
        assert_eq!(of("lobby"), (Overflow::Close, true));
        assert_eq!(of("price:usd"), (Overflow::Latest, true));
        assert_eq!(of("price:eurusd"), (Overflow::DropOldest, true));
        assert_eq!(of("price:eur"), (Overflow::DropOldest, false));
        assert_eq!(of("user:alice:in"), (Overflow::Latest, true));
        assert_eq!(of("user:a:b:in"), (Overflow::Close, true), "no subject has a colon");
        let none = DeliveryPolicies::default();
        assert_eq!(none.of(&RoomName::new("lobby").unwrap()), Delivery::default());
    }
}

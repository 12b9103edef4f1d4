//! Grants: which operations are allowed in which rooms.
//!
//! Owns [`Operation`], [`Operations`], [`RoomPattern`] (from a token), [`PolicyPattern`] (from the
//! configuration, may contain `{sub}`) and how each matches a room. Does not know where a grant came from;
//! [`token`](super::token) does.
//!
//! # Patterns
//!
//! A pattern is a room name, or a prefix of one followed by `*`. `*` stands for any text, including the empty
//! one, and only at the end; everything before it is literal. Parsing decides whether a pattern is exact or a
//! prefix. Text that is inserted later (a subject, a room called `*`) cannot change that.
//! subject, a room called `*`) can turn one into the other.

use std::{fmt, str::FromStr};

use broker_bridge::{InvalidRoomName, RoomName};

/// An operation in a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Operation {
    /// Receive publications.
    Subscribe = 1,
    /// Publish.
    Publish = 1 << 1,
    /// See who is in the room.
    Presence = 1 << 2,
    /// Read earlier publications.
    History = 1 << 3,
}

/// A set of [`Operation`]s, one byte.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Operations(u8);

/// A room name or a prefix of room names, as in a token's `rooms` claim.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoomPattern {
    literal: Box<str>,
    reach: Reach,
}

/// Operations in the rooms that a pattern matches. Written `PATTERN=OPERATION,…` on the command line.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Grant {
    /// The rooms.
    pub pattern: RoomPattern,
    /// The operations allowed there.
    pub operations: Operations,
}

/// A pattern from the configuration: a [`RoomPattern`] that may contain `{sub}` once, which stands for the
/// subject of the token.
///
/// A subject may fill `{sub}` only as a single segment of a room name. The pattern grants nothing to a
/// subject that contains `:`, `/`, `*`, or the character that follows `{sub}` in the pattern. Otherwise
/// `user:{sub}:*` would give subject `x` access to the rooms of subject `x:y`. For the same reason `*` must
/// not directly follow `{sub}`: `user:{sub}*` would give `al` access to the rooms of `alice`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PolicyPattern(Template);

/// What the configuration grants to every valid token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The rooms.
    pub pattern: PolicyPattern,
    /// The operations allowed there.
    pub operations: Operations,
}

/// Why a text is not an [`Operation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an operation is one of subscribe, publish, presence, history")]
pub struct UnknownOperation;

/// Why a text is not a [`RoomPattern`] or a [`PolicyPattern`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPattern {
    /// Apart from `*` and `{sub}`, a pattern may contain only what a room name may contain.
    #[error("in a room pattern, {0}")]
    Room(#[from] InvalidRoomName),
    /// `*` anywhere but at the end.
    #[error("in a room pattern, `*` is allowed only once, at the end")]
    InnerStar,
    /// `{sub}` more than once.
    #[error("in a room pattern, `{{sub}}` is allowed only once")]
    RepeatedSubject,
    /// `{sub}*`.
    #[error(
        "in a room pattern, `*` must not follow `{{sub}}` directly: it would match every subject with that prefix"
    )]
    OpenSubject,
}

/// Why a text is not a [`Grant`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidGrant {
    /// There is no `=`.
    #[error("a grant is written PATTERN=OPERATION,…, for example chat:*=subscribe,publish")]
    Form,
    /// The part before the last `=` is not a pattern.
    #[error(transparent)]
    Pattern(#[from] InvalidPattern),
    /// The part after the last `=` is not a list of operations.
    #[error(transparent)]
    Operation(#[from] UnknownOperation),
}

impl Operation {
    /// Every operation, in the order in which they are written.
    pub const ALL: [Self; 4] = [Self::Subscribe, Self::Publish, Self::Presence, Self::History];

    /// The name that tokens and the configuration use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Subscribe => "subscribe",
            Self::Publish => "publish",
            Self::Presence => "presence",
            Self::History => "history",
        }
    }
}

impl Operations {
    /// The empty set.
    pub const NONE: Self = Self(0);

    /// Whether the set contains `operation`.
    pub fn contains(self, operation: Operation) -> bool {
        self.0 & operation as u8 != 0
    }

    /// The union of both sets.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the set is empty.
    pub fn is_empty(self) -> bool {
        self == Self::NONE
    }

    /// The operations of the set, in the order of [`Operation::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Operation> {
        Operation::ALL.into_iter().filter(move |&operation| self.contains(operation))
    }
}

impl RoomPattern {
    /// Whether the pattern matches the room.
    pub fn matches(&self, room: &RoomName) -> bool {
        self.reach.covers(&self.literal, room.as_str())
    }
}

impl PolicyPattern {
    /// Whether the pattern matches the room with `{sub}` replaced by `subject`.
    ///
    /// The subject is compared with the room's text directly. It never becomes part of a pattern.
    pub fn matches(&self, subject: &str, room: &RoomName) -> bool {
        match &self.0 {
            Template::Fixed(pattern) => pattern.matches(room),
            Template::Subject { before, after, reach } => {
                fills_one_segment(subject, after)
                    && room
                        .as_str()
                        .strip_prefix(&**before)
                        .and_then(|rest| rest.strip_prefix(subject))
                        .is_some_and(|rest| reach.covers(after, rest))
            }
        }
    }
}

impl PolicyPattern {
    /// Whether the pattern matches the room for any subject.
    pub fn covers(&self, room: &RoomName) -> bool {
        match &self.0 {
            Template::Fixed(pattern) => pattern.matches(room),
            Template::Subject { before, after, .. } => {
                let Some(rest) = room.as_str().strip_prefix(&**before) else { return false };
                // A subject never contains the character that follows `{sub}`, so only one subject can fit.
                let end = after.chars().next().map_or(Some(rest.len()), |next| rest.find(next));
                end.and_then(|end| rest.get(..end)).is_some_and(|subject| self.matches(subject, room))
            }
        }
    }

    /// Orders patterns by how much of a room's name they fix; more precise patterns are greater.
    pub fn precision(&self) -> impl Ord + use<> {
        let (literal, reach) = match &self.0 {
            Template::Fixed(RoomPattern { literal, reach }) => (literal.len(), reach),
            Template::Subject { before, after, reach } => (before.len() + after.len(), reach),
        };
        (literal, *reach == Reach::Exact)
    }
}

/// Whether a pattern's literal text is a whole name or a prefix.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Reach {
    /// Matches only this text.
    Exact,
    /// Matches every text with this prefix.
    Prefix,
}

impl Reach {
    /// Splits the trailing `*` off a pattern.
    fn parse(text: &str) -> Result<(&str, Self), InvalidPattern> {
        let (literal, reach) = match text.strip_suffix('*') {
            Some(literal) => (literal, Self::Prefix),
            None => (text, Self::Exact),
        };
        if literal.contains('*') { Err(InvalidPattern::InnerStar) } else { Ok((literal, reach)) }
    }

    fn covers(self, literal: &str, text: &str) -> bool {
        match self {
            Self::Exact => text == literal,
            Self::Prefix => text.starts_with(literal),
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Exact => "",
            Self::Prefix => "*",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Template {
    Fixed(RoomPattern),
    Subject { before: Box<str>, after: Box<str>, reach: Reach },
}

const SUBJECT: &str = "{sub}";

/// See [`PolicyPattern`] for the reason.
fn fills_one_segment(subject: &str, after: &str) -> bool {
    let next = after.chars().next();
    !subject.is_empty() && !subject.chars().any(|c| matches!(c, ':' | '/' | '*') || Some(c) == next)
}

impl FromStr for Operation {
    type Err = UnknownOperation;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|operation| operation.as_str() == name).ok_or(UnknownOperation)
    }
}

impl FromIterator<Operation> for Operations {
    fn from_iter<I: IntoIterator<Item = Operation>>(operations: I) -> Self {
        Self(operations.into_iter().fold(0, |set, operation| set | operation as u8))
    }
}

/// Comma-separated names.
impl FromStr for Operations {
    type Err = UnknownOperation;

    fn from_str(names: &str) -> Result<Self, Self::Err> {
        names.split(',').map(|name| name.trim().parse::<Operation>()).collect()
    }
}

impl FromStr for RoomPattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (literal, reach) = Reach::parse(text)?;
        // Only the pattern `*`, which matches every room, may have an empty literal.
        if !(literal.is_empty() && reach == Reach::Prefix) {
            RoomName::new(literal)?;
        }
        Ok(Self { literal: literal.into(), reach })
    }
}

impl FromStr for PolicyPattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((before, rest)) = text.split_once(SUBJECT) else {
            return text.parse().map(|pattern| Self(Template::Fixed(pattern)));
        };
        if rest.contains(SUBJECT) {
            return Err(InvalidPattern::RepeatedSubject);
        }
        let (after, reach) = Reach::parse(rest)?;
        if before.contains('*') {
            return Err(InvalidPattern::InnerStar);
        }
        if after.is_empty() && reach == Reach::Prefix {
            return Err(InvalidPattern::OpenSubject);
        }
        // Check the shortest room that the pattern can match: one with a subject of one byte.
        RoomName::new(&format!("{before}s{after}"))?;
        Ok(Self(Template::Subject { before: before.into(), after: after.into(), reach }))
    }
}

/// Splits at the last `=`: a room name may contain `=`, an operation may not.
impl FromStr for Grant {
    type Err = InvalidGrant;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (pattern, operations) = text.rsplit_once('=').ok_or(InvalidGrant::Form)?;
        Ok(Self { pattern: pattern.parse()?, operations: operations.parse()? })
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Operations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, operation) in self.iter().enumerate() {
            write!(f, "{}{operation}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Operations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl fmt::Display for RoomPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.literal, self.reach.as_str())
    }
}

impl fmt::Debug for RoomPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl fmt::Display for PolicyPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Template::Fixed(pattern) => fmt::Display::fmt(pattern, f),
            Template::Subject { before, after, reach } => {
                write!(f, "{before}{SUBJECT}{after}{}", reach.as_str())
            }
        }
    }
}

impl fmt::Debug for PolicyPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.pattern, self.operations)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn room(name: &str) -> RoomName {
        RoomName::new(name).unwrap()
    }

    fn pattern(text: &str) -> RoomPattern {
        text.parse().unwrap()
    }

    fn policy(text: &str) -> PolicyPattern {
        text.parse().unwrap()
    }

    #[test]
    fn operations_are_a_set_with_names() {
        let both: Operations = "subscribe, publish".parse().unwrap();
        assert!(both.contains(Operation::Subscribe) && both.contains(Operation::Publish));
        assert!(!both.contains(Operation::Presence) && !both.contains(Operation::History));
        assert_eq!(both.to_string(), "subscribe,publish");
        assert_eq!(both, "publish,subscribe,publish".parse().unwrap());
        for wrong in ["", "read", "Subscribe", "subscribe,", "subscribe publish", "*"] {
            assert_eq!(wrong.parse::<Operations>(), Err(UnknownOperation), "{wrong:?}");
        }
        for operation in Operation::ALL {
            assert_eq!(operation.as_str().parse(), Ok(operation));
        }
    }

    #[test]
    fn a_pattern_is_an_exact_name_or_a_prefix() {
        assert!(pattern("lobby").matches(&room("lobby")));
        for other in ["lobb", "lobby2", "Lobby", "*", "lobby*"] {
            assert!(!pattern("lobby").matches(&room(other)), "{other}");
        }
        for covered in ["chat:", "chat:a", "chat:a:b", "chat:*"] {
            assert!(pattern("chat:*").matches(&room(covered)), "{covered}");
        }
        for other in ["chat", "chats:a", "Chat:a", "x:chat:a", "*"] {
            assert!(!pattern("chat:*").matches(&room(other)), "{other}");
        }
        assert!(pattern("*").matches(&room("anything:at-all")));
    }

    #[test]
    fn invalid_patterns_are_refused_with_the_reason() {
        let refused = |text: &str| text.parse::<RoomPattern>().unwrap_err();
        assert_eq!(refused(""), InvalidPattern::Room(InvalidRoomName::Empty));
        for inner in ["a*b", "*a", "a**", "**"] {
            assert_eq!(refused(inner), InvalidPattern::InnerStar, "{inner}");
        }
        for (text, found) in [("a b*", ' '), ("user:{sub}", '{'), ("a}", '}'), ("a\n", '\n')] {
            assert_eq!(refused(text), InvalidPattern::Room(InvalidRoomName::Forbidden { found }));
        }
        assert!(format!("{}*", "a".repeat(200)).parse::<RoomPattern>().is_ok());
        assert_eq!(
            refused(&format!("{}*", "a".repeat(201))),
            InvalidPattern::Room(InvalidRoomName::TooLong { len: 201 })
        );
    }

    #[test]
    fn invalid_policy_patterns_are_refused_with_the_reason() {
        let refused = |text: &str| text.parse::<PolicyPattern>().unwrap_err();
        assert_eq!(refused("user:{sub}*"), InvalidPattern::OpenSubject);
        assert_eq!(refused("{sub}*"), InvalidPattern::OpenSubject);
        assert_eq!(refused("{sub}:{sub}"), InvalidPattern::RepeatedSubject);
        assert_eq!(refused("*:{sub}"), InvalidPattern::InnerStar);
        assert_eq!(refused("{sub}:*:x"), InvalidPattern::InnerStar);
        for (text, found) in [("a:{user}", '{'), ("{{sub}}", '{'), ("{sub}}", '}'), ("{SUB}", '{')] {
            assert_eq!(refused(text), InvalidPattern::Room(InvalidRoomName::Forbidden { found }), "{text}");
        }
    }

    #[test]
    fn the_subject_replaces_its_placeholder() {
        assert!(policy("user:{sub}").matches("alice", &room("user:alice")));
        assert!(policy("user:{sub}:*").matches("alice", &room("user:alice:inbox")));
        assert!(policy("{sub}/in").matches("a@example.com", &room("a@example.com/in")));
        assert!(policy("inbox-{sub}").matches("550e8400-e29b-41d4", &room("inbox-550e8400-e29b-41d4")));
        for other in ["user:bob", "user:alice2", "user:alic", "user:", "user:alice:inbox", "user:{sub}x"] {
            if let Ok(other) = RoomName::new(other) {
                assert!(!policy("user:{sub}").matches("alice", &other), "{other}");
            }
        }
        assert!(!policy("user:{sub}:*").matches("al", &room("user:alice:inbox")));
        assert!(policy("news:*").matches("whoever", &room("news:today")));
    }

    #[test]
    fn an_unusual_subject_matches_no_further_rooms() {
        let rooms = ["user:*", "user:a", "user:a*", "user:ab", "user:x:y", "user:x", "user:x:y:z", "user:"];
        for subject in
            ["*", "a*", "x:y", "x/y", "{sub}", "{", "}", "a b", "", "user:*", "x:", ":", "\u{0}", "a\n"]
        {
            for text in ["user:{sub}", "user:{sub}:*", "{sub}", "{sub}:*"] {
                for name in rooms {
                    assert!(!policy(text).matches(subject, &room(name)), "{subject:?} {text} {name}");
                }
            }
        }
        // The character that follows `{sub}` also separates segments.
        assert!(policy("user.{sub}.*").matches("a", &room("user.a.in")));
        assert!(!policy("user.{sub}.*").matches("a.b", &room("user.a.b.in")));
    }

    #[test]
    fn a_grant_is_written_with_an_equals_sign() {
        let grant: Grant = "chat:*=subscribe,publish".parse().unwrap();
        assert_eq!(grant.to_string(), "chat:*=subscribe,publish");
        let grant: Grant = "a=b=history".parse().unwrap();
        assert!(grant.pattern.matches(&room("a=b")));
        assert_eq!("chat:*".parse::<Grant>(), Err(InvalidGrant::Form));
        assert_eq!("chat:*=".parse::<Grant>(), Err(UnknownOperation.into()));
        assert_eq!("*a=subscribe".parse::<Grant>(), Err(InvalidPattern::InnerStar.into()));
    }

    proptest! {
        #[test]
        fn matching_agrees_with_a_naive_reading(text in "[ab:]{0,4}\\*?", name in "[ab:*]{1,6}") {
            prop_assume!(!text.is_empty());
            let naive = if text.ends_with('*') {
                let beginning: Vec<char> = text.chars().take(text.chars().count() - 1).collect();
                name.chars().take(beginning.len()).collect::<Vec<_>>() == beginning
            } else {
                name == text
            };
            prop_assert_eq!(pattern(&text).matches(&room(&name)), naive);
        }

        /// For a plain subject, substituting it into the pattern and lazy matching give the same result.
        #[test]
        fn lazy_matching_agrees_with_substitution(
            before in "[ab:.]{0,3}", after in "([:.][ab:.]{0,2}\\*?)?", subject in "[ab]{1,3}", name in "[ab:.]{1,9}",
        ) {
            let filled = pattern(&format!("{before}{subject}{after}"));
            let lazy = policy(&format!("{before}{{sub}}{after}"));
            prop_assert_eq!(lazy.matches(&subject, &room(&name)), filled.matches(&room(&name)));
        }

        /// `covers` finds every subject that fits.
        #[test]
        fn covering_agrees_with_trying_every_subject(
            text in "[ab:.]{0,2}(\\{sub\\})?([ab:.]{1,2}\\*?)?", name in "[ab:.*/]{1,8}",
        ) {
            prop_assume!(!text.is_empty());
            let (policy, room) = (policy(&text), room(&name));
            let subjects = (0..name.len()).flat_map(|start| (start..=name.len()).map(move |end| (start, end)));
            let any = subjects.into_iter().any(|(start, end)| policy.matches(&name[start..end], &room));
            prop_assert_eq!(policy.covers(&room), any);
        }

        /// No room belongs to two subjects of a policy with `{sub}`.
        #[test]
        fn no_two_subjects_share_a_room(
            text in "[ab:.]{0,2}\\{sub\\}([ab:.]{1,2}\\*?)?",
            one in "[ab:.*/]{1,3}", other in "[ab:.*/]{1,3}", name in "[ab:.*/]{1,8}",
        ) {
            prop_assume!(one != other);
            let (policy, room) = (policy(&text), room(&name));
            prop_assert!(!(policy.matches(&one, &room) && policy.matches(&other, &room)));
        }

        #[test]
        fn parsing_never_panics_and_writes_back(text in "[ab:*{}sub=\\PC]{0,12}") {
            if let Ok(pattern) = text.parse::<RoomPattern>() {
                prop_assert_eq!(pattern.to_string(), text.clone());
            }
            if let Ok(pattern) = text.parse::<PolicyPattern>() {
                prop_assert_eq!(pattern.to_string(), text.clone());
            }
            drop(text.parse::<Grant>());
        }
    }
}

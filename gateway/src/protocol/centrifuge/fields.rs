//! The fields of commands, sorted by how the server treats them.
//!
//! If a client asks for something and does not get it, it has to be told. In some cases the protocol does
//! that by omitting a field from the reply: a subscription that is not `recoverable`, not `positioned` (both say what the
//! room is, whatever was asked for), without `delta`; a connection without `subs`. Such fields are ignored here. So are fields that only inform
//! (`name`, `version`, `profile`, `data`), fields that offer something optional (`flag`, `dict`), and unknown
//! fields. Anything else is parsed as [`Asked`], and a command that uses it is refused as a whole, because
//! the client could not notice that it is missing.
//!
//! Source: `client.proto` of <https://github.com/centrifugal/protocol>, August 2026.

use std::fmt;

use broker_bridge::Cursor;
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::protocol::{
    HistoryQuery, Recover,
    json::{Object, present},
};

/// Begin the session.
#[derive(Deserialize)]
pub(super) struct Connect {
    #[serde(default)]
    pub(super) token: String,
}

/// Replace the token.
#[derive(Deserialize)]
pub(super) struct Refresh {
    pub(super) token: String,
}

/// Subscribe to a channel.
#[derive(Deserialize)]
pub(super) struct Subscribe {
    pub(super) channel: String,
    /// Asks for publications after a known position, of which absent parts are empty and 0.
    #[serde(default, deserialize_with = "or_default")]
    recover: bool,
    #[serde(default, deserialize_with = "or_default")]
    epoch: String,
    #[serde(default, deserialize_with = "or_default")]
    offset: u64,
    #[serde(default)]
    flag: Flags,
    /// A subscription token. Grants come with the connection's token instead.
    #[serde(default)]
    token: Asked,
    /// Only publications with certain tags.
    #[serde(default)]
    tf: Asked,
    /// A subscription that is not a stream of publications: a map, shared polling. `phase` is the part of the
    /// state to send.
    #[serde(default, rename = "type")]
    kind: Asked,
    #[serde(default)]
    phase: Asked,
    #[serde(default)]
    cursor: Asked,
    #[serde(default)]
    limit: Asked,
    #[serde(default)]
    asc: Asked,
    /// Pushes when clients join and leave.
    #[serde(default)]
    join_leave: Asked,
}

impl Subscribe {
    /// Whether it asks for something that is not supported.
    pub(super) fn asks_for_more(&self) -> bool {
        let Self { token, tf, kind, phase, cursor, limit, asc, join_leave, .. } = self;
        let unserved = [token, tf, kind, phase, cursor, limit, asc, join_leave];
        unserved.into_iter().any(|asked| asked.0)
    }

    /// The position from which it asks to continue.
    pub(super) fn recover(&self) -> Option<Recover> {
        let since = position(&self.epoch, self.offset);
        self.recover.then_some(Recover { since, or_fail: self.flag.reject_unrecovered() })
    }
}

/// The position with this epoch and offset. An epoch that no node can have sent gives one that never existed.
fn position(epoch: &str, offset: u64) -> Cursor {
    let is_number = epoch.bytes().all(|byte| byte.is_ascii_digit());
    Cursor { epoch: epoch.parse().ok().filter(|_| is_number).unwrap_or_default(), offset }
}

/// A field that may be `null`, as in protobuf's JSON mapping.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Unsubscribe from a channel.
#[derive(Deserialize)]
pub(super) struct Unsubscribe {
    pub(super) channel: String,
}

/// Publish to a channel.
#[derive(Deserialize)]
pub(super) struct Publish<'a> {
    pub(super) channel: String,
    #[serde(borrow, default, deserialize_with = "present")]
    pub(super) data: Option<&'a RawValue>,
    /// Into a map instead of a stream.
    #[serde(default, rename = "type")]
    kind: Asked,
    #[serde(default)]
    key: Asked,
    #[serde(default)]
    removed: Asked,
}

impl Publish<'_> {
    /// Whether it asks for something that is not supported.
    pub(super) fn asks_for_more(&self) -> bool {
        let Self { channel: _, data: _, kind, key, removed } = self;
        [kind, key, removed].into_iter().any(|asked| asked.0)
    }
}

/// Read a part of a channel's history.
#[derive(Deserialize)]
pub(super) struct History {
    pub(super) channel: String,
    /// The most publications. 0: only the position. A negative number: as many as there are.
    #[serde(default, deserialize_with = "or_default")]
    limit: i32,
    /// After this position, or before it.
    #[serde(default)]
    since: Option<Object<StreamPosition>>,
    /// From the newest to the oldest.
    #[serde(default, deserialize_with = "or_default")]
    reverse: bool,
}

#[derive(Deserialize)]
struct StreamPosition {
    #[serde(default, deserialize_with = "or_default")]
    offset: u64,
    #[serde(default, deserialize_with = "or_default")]
    epoch: String,
}

impl History {
    /// The most publications in one reply.
    const MAX: usize = 1000;

    /// What it asks for. `None` if the protocol refuses that: nothing is before the beginning.
    pub(super) fn query(&self) -> Option<HistoryQuery> {
        let limit = usize::try_from(self.limit).map_or(Self::MAX, |limit| limit.min(Self::MAX));
        let is_reversed = self.reverse;
        let since = match &self.since {
            Some(Object(StreamPosition { offset: 0, .. })) if is_reversed => return None,
            // From the beginning.
            Some(Object(StreamPosition { offset: 0, epoch })) if epoch.is_empty() => None,
            Some(Object(StreamPosition { offset, epoch })) => Some(position(epoch, *offset)),
            None => None,
        };
        Some(HistoryQuery { since, limit, is_reversed })
    }
}

/// Whether a field has another value than its default: absent, `null`, `false`, 0, or empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Asked(pub(super) bool);

impl<'de> Deserialize<'de> for Asked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Anything;

        impl<'de> Visitor<'de> for Anything {
            type Value = bool;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_unit<E>(self) -> Result<bool, E> {
                Ok(false)
            }

            fn visit_bool<E>(self, value: bool) -> Result<bool, E> {
                Ok(value)
            }

            fn visit_i64<E>(self, value: i64) -> Result<bool, E> {
                Ok(value != 0)
            }

            fn visit_u64<E>(self, value: u64) -> Result<bool, E> {
                Ok(value != 0)
            }

            fn visit_f64<E>(self, value: f64) -> Result<bool, E> {
                Ok(value != 0.0)
            }

            fn visit_str<E>(self, value: &str) -> Result<bool, E> {
                Ok(!value.is_empty())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<bool, A::Error> {
                let mut any = false;
                while items.next_element::<IgnoredAny>()?.is_some() {
                    any = true;
                }
                Ok(any)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<bool, A::Error> {
                let mut any = false;
                while members.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    any = true;
                }
                Ok(any)
            }
        }

        deserializer.deserialize_any(Anything).map(Self)
    }
}

/// The subscription features that a client supports, as bits. A number, or a string as in protobuf's JSON
/// mapping.
#[derive(Clone, Copy, Debug, Default)]
struct Flags(i64);

impl Flags {
    /// The client wants the subscription to fail if nothing can be recovered.
    fn reject_unrecovered(self) -> bool {
        self.0 & 2 != 0
    }
}

impl<'de> Deserialize<'de> for Flags {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(i64),
            Text(String),
        }

        match Option::<Written>::deserialize(deserializer)? {
            None => Ok(Self(0)),
            Some(Written::Number(bits)) => Ok(Self(bits)),
            Some(Written::Text(text)) => text.parse().map(Self).map_err(D::Error::custom),
        }
    }
}

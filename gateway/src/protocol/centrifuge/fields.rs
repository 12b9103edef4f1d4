//! The commands' fields, each by what becomes of it.
//!
//! What a client asks for and does not get, it must be told. The protocol says some of it by leaving a word out of
//! its reply: a subscription that is not `recoverable`, not `positioned`, without `delta`; a connection without
//! `subs`. Such fields are passed over here, and so are those that only inform (`name`, `version`, `profile`,
//! `data`), that offer what the server may use or not (`flag`, `dict`), and those that the protocol does not have.
//! What would be missed in silence is [`Asked`] for, and the command that does so is refused as a whole.
//!
//! Source: `client.proto` of <https://github.com/centrifugal/protocol>, August 2026.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};
use serde_json::value::RawValue;

/// Begin the session.
#[derive(Deserialize)]
pub(super) struct Connect {
    #[serde(default)]
    pub(super) token: String,
}

/// Go on with another token.
#[derive(Deserialize)]
pub(super) struct Refresh {
    pub(super) token: String,
}

/// Enter a room.
#[derive(Deserialize)]
pub(super) struct Subscribe {
    pub(super) channel: String,
    /// What has been published since the position that the client knows. Answered with `recovered: false`.
    #[serde(default)]
    pub(super) recover: Asked,
    #[serde(default)]
    flag: Flags,
    /// A subscription token: grants come with the token of the connection.
    #[serde(default)]
    token: Asked,
    /// Only publications with certain tags.
    #[serde(default)]
    tf: Asked,
    /// Another kind of subscription than a stream of publications: a map, shared polling. With it, the part of the
    /// state that is to come.
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
    /// Pushes that tell who comes and goes.
    #[serde(default)]
    join_leave: Asked,
}

impl Subscribe {
    /// Whether it asks for something that is not served.
    pub(super) fn asks_for_more(&self) -> bool {
        let Self { channel: _, recover, flag, token, tf, kind, phase, cursor, limit, asc, join_leave } = self;
        let unserved = [token, tf, kind, phase, cursor, limit, asc, join_leave];
        unserved.into_iter().any(|asked| asked.0) || (recover.0 && flag.reject_unrecovered())
    }
}

/// Leave a room.
#[derive(Deserialize)]
pub(super) struct Unsubscribe {
    pub(super) channel: String,
}

/// Publish into a room.
#[derive(Deserialize)]
pub(super) struct Publish<'a> {
    pub(super) channel: String,
    #[serde(borrow, default, deserialize_with = "there")]
    pub(super) data: Option<&'a RawValue>,
    /// Into a map, instead of a stream.
    #[serde(default, rename = "type")]
    kind: Asked,
    #[serde(default)]
    key: Asked,
    #[serde(default)]
    removed: Asked,
}

impl Publish<'_> {
    /// Whether it asks for something that is not served.
    pub(super) fn asks_for_more(&self) -> bool {
        let Self { channel: _, data: _, kind, key, removed } = self;
        [kind, key, removed].into_iter().any(|asked| asked.0)
    }
}

/// A field that is there, though it be `null`.
fn there<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Whether a field says anything but its default: nothing, `null`, `false`, 0, or empty.
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

/// Features of a subscription that a client knows, as bits. A number, or in the JSON of protobuf a string.
#[derive(Clone, Copy, Debug, Default)]
struct Flags(i64);

impl Flags {
    /// Refuse the subscription, instead of making it, if nothing can be recovered.
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

/// A JSON object. Left to itself, serde takes an array of the fields' values for the same.
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }

        deserializer.deserialize_map(Fields(PhantomData)).map(Self)
    }
}

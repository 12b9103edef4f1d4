//! Checks that bytes are JSON that can be embedded in another JSON text.
//!
//! `serde_json` does not fully validate ignored values: it accepts any depth, unpaired surrogates and numbers of any
//! size. A client with a stricter parser would drop its connection over any of these, so this module reads every value,
//! and discards it.

use std::fmt;

use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};

/// Checks that `bytes` are one JSON text whose arrays and objects are nested at most `max_depth` deep (at most 127).
/// Strings are UTF-8, so the whole is.
pub(crate) fn check(bytes: &[u8], max_depth: usize) -> Result<(), serde_json::Error> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    Value { levels_left: max_depth }.deserialize(&mut reader)?;
    reader.end()
}

/// Any value, nested at most this deep.
#[derive(Clone, Copy)]
struct Value {
    levels_left: usize,
}

impl Value {
    /// The depth limit for the elements of an array or object.
    fn inner<E: Error>(self) -> Result<Self, E> {
        let levels_left = self.levels_left.checked_sub(1);
        levels_left.map(|levels_left| Self { levels_left }).ok_or_else(|| E::custom("nested too deep"))
    }
}

impl<'de> DeserializeSeed<'de> for Value {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Value {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let inner = self.inner()?;
        while items.next_element_seed(inner)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let inner = self.inner()?;
        while members.next_entry_seed(inner, inner)?.is_some() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_json(text: &str) -> bool {
        check(text.as_bytes(), 120).is_ok()
    }

    #[test]
    fn json_is_distinguished_from_other_text() {
        for text in [
            "null",
            " {\"a\" : [1, -2.50, 1e308, \"\\u00e9\\ud83d\\ude00\", true, {}]}\r\n",
            "18446744073709551616",
            "\"\u{2028}\u{7f}\"",
            "{\"a\":1,\"a\":2}",
        ] {
            assert!(is_json(text), "{text}");
        }
        for text in [
            "",
            "{} {}",
            "{\"pay\":\"x\"}},\"channel\":\"admin\",\"x\":{\"y\":1",
            "{},",
            "\u{feff}{}",
            "{a:1}",
            "[1,]",
            "01",
            "NaN",
            "'a'",
            "\"a",
            "\"a\nb\"",
            "\"a\0b\"",
            "{}\0",
            "[1] // one",
            // Halves of surrogate pairs, as values and as names.
            "\"\\ud800\"",
            "\"\\udc00\\ud800\"",
            "{\"\\ud800\":1}",
            "1e999",
            "[-1e999]",
        ] {
            assert!(!is_json(text), "{text}");
        }
        assert!(check(b"\"\xff\"", 120).is_err(), "not UTF-8");
        assert!(check(b"{\"\xff\":1}", 120).is_err(), "not UTF-8");
    }

    #[test]
    fn depth_is_bounded() {
        let arrays = |depth| "[".repeat(depth) + &"]".repeat(depth);
        let objects = |depth| "{\"a\":".repeat(depth) + "1" + &"}".repeat(depth);
        assert!(is_json(&arrays(120)) && is_json(&objects(120)));
        let error = check(arrays(121).as_bytes(), 120).unwrap_err();
        assert_eq!(error.to_string(), "nested too deep at line 1 column 122");
        assert!(!is_json(&objects(121)) && !is_json(&arrays(1_000_000)));
        // What wraps it can still be read with a bound of 128.
        let wrapped = format!("{{\"push\":{{\"pub\":{{\"data\":{}}}}}}}", arrays(120));
        assert!(serde_json::from_str::<serde_json::Value>(&wrapped).is_ok());
    }
}

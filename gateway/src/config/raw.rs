//! Raw values, before their meaning is known.
//!
//! Defines what TOML, environment variables and flags have in common. Knows no keys.

use toml::{
    Spanned,
    de::{DeString, DeTable, DeValue},
};

use super::error::quote;

/// A raw value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Raw {
    /// A TOML string, or the whole value of an environment variable or a flag.
    Text(String),
    /// A TOML number, boolean or date, as text.
    Word(String),
    /// A TOML array.
    List(Vec<Raw>),
    /// A TOML table, in the order in which it was written.
    Table(Vec<Entry>),
}

/// One key of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The last part of the key.
    pub key: String,
    /// The line of the key, from 1.
    pub line: usize,
    /// The value.
    pub raw: Raw,
}

/// An error of the TOML parser, and its line.
pub(super) struct Syntax {
    pub line: usize,
    pub message: String,
}

impl Raw {
    /// Parses a TOML document, or returns all its errors.
    pub(super) fn document(text: &str) -> Result<Vec<Entry>, Vec<Syntax>> {
        let (table, errors) = DeTable::parse_recoverable(text);
        let lines = Lines::of(text);
        if errors.is_empty() {
            return Ok(entries(table.get_ref(), &lines));
        }
        // The error's own `Display` quotes the line, which may contain a secret.
        let syntax = |error: toml::de::Error| Syntax {
            line: lines.number(error.span().map_or(0, |span| span.start)),
            message: error.message().replace('\n', "; "),
        };
        let mut errors: Vec<Syntax> = errors.into_iter().map(syntax).collect();
        errors.sort_by_key(|error| error.line);
        Err(errors)
    }

    /// Parses a single TOML value, such as an inline table. (JSON arrays of strings are TOML arrays.)
    pub(super) fn value(text: &str) -> Option<Self> {
        DeValue::parse(text).ok().map(|value| Self::from_toml(value.get_ref(), &Lines::of(text)))
    }

    /// The text of a string, a number or a boolean: `2` and `"2"` are the same.
    pub(super) fn scalar(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Word(text) => Some(text),
            Self::List(_) | Self::Table(_) => None,
        }
    }

    /// The text of a string.
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Word(_) | Self::List(_) | Self::Table(_) => None,
        }
    }

    /// The texts of a list: an array of strings, or a single comma-separated text.
    pub(super) fn texts(&self) -> Option<Vec<String>> {
        match self {
            Self::List(items) => items.iter().map(|item| item.text().map(str::to_owned)).collect(),
            Self::Text(text) if text.trim_start().starts_with('[') => match Self::value(text.trim())? {
                Self::Text(_) => None,
                list => list.texts(),
            },
            Self::Text(text) if text.trim().is_empty() => Some(Vec::new()),
            Self::Text(text) => Some(text.split(',').map(|item| item.trim().to_owned()).collect()),
            Self::Word(_) | Self::Table(_) => None,
        }
    }

    /// The value as errors show it.
    pub(super) fn show(&self) -> String {
        match self {
            Self::Text(text) => quote(text),
            Self::Word(word) => word.clone(),
            Self::List(items) => {
                let shown: Vec<String> = items.iter().take(4).map(Self::show).collect();
                format!("[{}{}]", shown.join(", "), if items.len() > 4 { ", …" } else { "" })
            }
            Self::Table(_) => "{…}".to_owned(),
        }
    }

    fn from_toml(value: &DeValue<'_>, lines: &Lines) -> Self {
        match value {
            DeValue::String(text) => Self::Text(text.to_string()),
            DeValue::Integer(number) => Self::Word(number.to_string()),
            DeValue::Float(number) => Self::Word(number.to_string()),
            DeValue::Boolean(switch) => Self::Word(switch.to_string()),
            DeValue::Datetime(date) => Self::Word(date.to_string()),
            DeValue::Array(items) => {
                Self::List(items.iter().map(|item| Self::from_toml(item.get_ref(), lines)).collect())
            }
            DeValue::Table(table) => Self::Table(entries(table, lines)),
        }
    }
}

/// The parser sorts tables by name. This restores the written order, which makes errors easier to follow.
fn entries(table: &DeTable<'_>, lines: &Lines) -> Vec<Entry> {
    let mut written: Vec<_> = table.iter().collect();
    written.sort_by_key(|(key, _)| key.span().start);
    let entry = |(key, value): (&Spanned<DeString<'_>>, &Spanned<DeValue<'_>>)| Entry {
        key: key.get_ref().to_string(),
        line: lines.number(key.span().start),
        raw: Raw::from_toml(value.get_ref(), lines),
    };
    written.into_iter().map(entry).collect()
}

/// The offsets of a text's line breaks.
struct Lines(Vec<usize>);

impl Lines {
    fn of(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect())
    }

    fn number(&self, at: usize) -> usize {
        1 + self.0.partition_point(|end| *end < at)
    }
}

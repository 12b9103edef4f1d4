//! Converts raw values to typed ones.
//!
//! Collects errors: for a value that cannot be read, it records the error and continues with the default, so
//! that one pass finds all errors. [`Reader::finish`] fails if there is any error, so these defaults are
//! never used.

use std::{collections::BTreeSet, fmt, num::NonZeroU32};

use super::{
    Sources,
    error::{ConfigError, ConfigErrors, Source},
    kind::{self, Kind},
    layers::{Given, Layers},
    raw::{Entry, Raw},
    snapshot::Snapshot,
    suggest::suggest,
    table::{self, Fallback, Key, Row},
};
use crate::{
    auth::grant::{Operations, Policy, PolicyPattern},
    delivery::DeliveryPolicy,
    file::read_value,
    history::{HistoryPolicy, Ttl},
};

/// Reads the keys of the table from the layers.
pub(super) struct Reader {
    layers: Layers,
    errors: Vec<ConfigError>,
    /// Keys that already have an error. Checks that depend on them are skipped.
    failed: BTreeSet<&'static str>,
    snapshot: Snapshot,
}

impl Reader {
    pub(super) fn new(sources: &Sources) -> Self {
        let mut layers = Layers::of(sources);
        let errors = std::mem::take(&mut layers.errors);
        Self { layers, errors, failed: BTreeSet::new(), snapshot: Snapshot::default() }
    }

    /// The value of a key that has a default.
    pub(super) fn read<K: Kind>(&mut self, key: &Key<K>) -> K::Value {
        let given = self.read_optional(key);
        given.or_else(|| default(key)).unwrap_or_else(|| unreachable!("{} has no default", key.name))
    }

    /// The value that was given for a key, if it was given and is valid.
    pub(super) fn read_optional<K: Kind>(&mut self, key: &Key<K>) -> Option<K::Value> {
        let Some(Given { raw, source }) = self.layers.get(key.name).cloned() else {
            self.note(key, None);
            return None;
        };
        match key.kind.read(&raw) {
            Ok(value) => {
                self.note(key, Some((&raw, &value)));
                Some(value)
            }
            Err(expected) => {
                let value = (!key.kind.is_secret()).then(|| raw.show());
                self.fail(key.name, ConfigError { key: key.name.to_owned(), source, value, expected });
                None
            }
        }
    }

    /// The value of a key that can also be read from a file that another key names. If different layers give
    /// both keys, the stronger layer wins; one layer must not give both.
    pub(super) fn text_or_file<K: Kind>(
        &mut self,
        key: &Key<K>,
        file_key: &Key<kind::File>,
    ) -> Option<K::Value> {
        let rank = |given: Option<&Given>| given.map(|given| given.source.rank());
        let (direct, by_file) = (rank(self.layers.get(key.name)), rank(self.layers.get(file_key.name)));
        if direct.is_some() && direct == by_file {
            let expected = format!("expected either {} or {}, not both", key.name, file_key.name);
            self.complain(file_key, expected);
            return None;
        }
        // Only the value matters for the snapshot, not which of the two keys gave it.
        self.snapshot.set(file_key.name, None);
        if direct >= by_file {
            return self.read_optional(key);
        }
        let path = self.read_optional(file_key)?;
        let text = match read_value(&path) {
            Ok(text) => text,
            Err(error) => {
                self.complain(file_key, format!("expected a file of text that can be read: {error}"));
                return None;
            }
        };
        let raw = Raw::Text(text);
        match key.kind.read(&raw) {
            Ok(value) => {
                self.note(key, Some((&raw, &value)));
                self.snapshot.set(file_key.name, None);
                Some(value)
            }
            Err(expected) => {
                self.complain(file_key, format!("in that file, {expected}"));
                None
            }
        }
    }

    /// The room policies in the order in which they were written: grants, delivery and history.
    pub(super) fn read_rooms(&mut self) -> (Vec<Policy>, Vec<DeliveryPolicy>, Vec<HistoryPolicy>) {
        let (mut policies, mut deliveries, mut histories) = (Vec::new(), Vec::new(), Vec::new());
        for (pattern, Given { raw, source }) in std::mem::take(&mut self.layers.rooms) {
            let name = format!("{}.{pattern:?}", table::ROOMS);
            let error = |source: &Source, key: &str, value, expected| ConfigError {
                key: key.to_owned(),
                source: source.clone(),
                value,
                expected,
            };
            let parsed = pattern.parse::<PolicyPattern>();
            if let Err(wrong) = &parsed {
                self.errors.push(error(&source, &name, None, format!("expected a room pattern: {wrong}")));
            }
            let Raw::Table(entries) = raw else {
                let expected = r#"expected a table, such as { grant = ["subscribe"] }"#.to_owned();
                self.errors.push(error(&source, &name, Some(raw.show()), expected));
                continue;
            };
            let (mut operations, mut overflow, mut priority) = (Operations::NONE, None, None);
            let (mut size, mut ttl, mut join) = (None, None, None);
            for Entry { key, line, raw } in entries.into_iter().flat_map(flatten) {
                let name = format!("{name}.{key}");
                let source = source.at_line(line);
                let read = match &*key {
                    "grant" => table::ROOMS_GRANT.kind.read(&raw).map(|granted| operations = granted),
                    "overflow" => table::ROOMS_OVERFLOW.kind.read(&raw).map(|given| overflow = Some(given)),
                    "priority" => table::ROOMS_PRIORITY.kind.read(&raw).map(|given| priority = Some(given)),
                    "history.size" => table::ROOMS_HISTORY_SIZE.kind.read(&raw).map(|given| {
                        size = u32::try_from(given).ok().and_then(NonZeroU32::new);
                    }),
                    "history.ttl" => table::ROOMS_HISTORY_TTL.kind.read(&raw).map(|given| {
                        ttl = Some(given.map_or(Ttl::Never, Ttl::Expires));
                    }),
                    "history.join" => {
                        table::ROOMS_HISTORY_JOIN.kind.read(&raw).map(|given| join = Some(given))
                    }
                    key if table::is_room_section(key) => Err(table_of(key)),
                    key => {
                        self.errors.push(error(&source, &name, None, unknown_room_key(key)));
                        continue;
                    }
                };
                if let Err(expected) = read {
                    self.errors.push(error(&source, &name, Some(raw.show()), expected));
                }
            }
            if let Ok(pattern) = parsed {
                policies.push(Policy { pattern: pattern.clone(), operations });
                deliveries.push(DeliveryPolicy { pattern: pattern.clone(), overflow, priority });
                histories.push(HistoryPolicy { pattern, size, ttl, join });
            }
        }
        self.note_rooms(&deliveries, &table::ROOMS_OVERFLOW, |it| Some((&it.pattern, it.overflow?)));
        self.note_rooms(&deliveries, &table::ROOMS_PRIORITY, |it| Some((&it.pattern, it.priority?)));
        self.note_rooms(&histories, &table::ROOMS_HISTORY_SIZE, |it| Some((&it.pattern, it.size?)));
        self.note_rooms(&histories, &table::ROOMS_HISTORY_TTL, |it| Some((&it.pattern, it.ttl?)));
        self.note_rooms(&histories, &table::ROOMS_HISTORY_JOIN, |it| Some((&it.pattern, it.join?)));
        self.snapshot.set(table::ROOMS_GRANT.name, Some(format!("{policies:?}")));
        (policies, deliveries, histories)
    }

    /// Records the values of one key of all room policies.
    fn note_rooms<P, V: fmt::Debug>(
        &mut self,
        policies: &[P],
        key: &dyn Row,
        value: impl Fn(&P) -> Option<(&PolicyPattern, V)>,
    ) {
        let values = policies.iter().filter_map(value);
        let values: Vec<String> = values.map(|(pattern, value)| format!("{pattern} {value:?}")).collect();
        self.snapshot.set(key.name(), Some(values.join(" ")));
    }

    /// Records an error for `key` unless `holds`. Skips this if `key`, or one of the `others` that the
    /// condition depends on, already has an error.
    pub(super) fn require(
        &mut self,
        holds: bool,
        key: &dyn Row,
        others: &[&dyn Row],
        expected: impl Fn() -> String,
    ) {
        let sound = |name| !self.failed.contains(name);
        if !holds
            && self.layers.file_is_sound
            && sound(key.name())
            && others.iter().all(|other| sound(other.name()))
        {
            self.complain(key, expected());
        }
    }

    /// The source of a key's value.
    pub(super) fn source(&self, key: &dyn Row) -> Source {
        self.layers.get(key.name()).map_or(Source::Default, |given| given.source.clone())
    }

    /// Fails with the errors of this key and of whole files.
    pub(super) fn finish_with(mut self, key: &dyn Row) -> Result<(), ConfigErrors> {
        self.errors.retain(|error| error.key.is_empty() || error.key == key.name());
        ConfigErrors::check(self.errors)
    }

    /// Fails with all errors, or returns the value of every key.
    pub(super) fn finish(self) -> Result<Snapshot, ConfigErrors> {
        ConfigErrors::check(self.errors).map(|()| self.snapshot)
    }

    /// Records the value of a key; the default if none was given.
    fn note<K: Kind>(&mut self, key: &Key<K>, given: Option<(&Raw, &K::Value)>) {
        let noted = match (given, key.default) {
            (Some((raw, value)), _) => Some(printed(key, raw, value)),
            (None, Fallback::Is(raw)) => {
                Raw::value(raw).zip(default(key)).map(|(raw, value)| printed(key, &raw, &value))
            }
            (None, Fallback::Unset { .. }) => None,
        };
        self.snapshot.set(key.name, noted);
    }

    /// Records an error for `key`.
    pub(super) fn complain(&mut self, key: &dyn Row, expected: String) {
        let (value, source) = match (self.layers.get(key.name()), key.default()) {
            (Some(given), _) => ((!key.is_secret()).then(|| given.raw.show()), given.source.clone()),
            (None, Fallback::Is(default)) => (Some(default.to_owned()), Source::Default),
            (None, Fallback::Unset { .. }) => (None, Source::Default),
        };
        self.fail(key.name(), ConfigError { key: key.name().to_owned(), source, value, expected });
    }

    fn fail(&mut self, name: &'static str, error: ConfigError) {
        self.failed.insert(name);
        self.errors.push(error);
    }
}

/// Replaces a table among the entries of a room pattern by its own entries: `history = { size = 5 }` by
/// `history.size = 5`. Leaves values of keys that are not tables, even if they should not be tables.
fn flatten(entry: Entry) -> Vec<Entry> {
    let is_key = table::room_keys().any(|key| key == entry.key);
    // A quoted key that contains a dot is a single key, and no such key exists.
    let bare = |key: String| if key.contains('.') { format!("{key:?}") } else { key };
    let Entry { key, line, raw } = entry;
    let key = bare(key);
    match raw {
        Raw::Table(inner) if !is_key && (table::is_room_section(&key) || !inner.is_empty()) => {
            let inner = inner.into_iter();
            inner.map(|entry| Entry { key: format!("{key}.{}", bare(entry.key)), ..entry }).collect()
        }
        raw => vec![Entry { key, line, raw }],
    }
}

/// What is wrong with a value that should be this section of a room pattern.
fn table_of(section: &str) -> String {
    let inner = table::room_keys().filter_map(|key| key.strip_prefix(section)?.strip_prefix('.'));
    format!("expected a table of {}", inner.collect::<Vec<_>>().join(", "))
}

/// What is wrong with a key of a room pattern that does not exist.
fn unknown_room_key(key: &str) -> String {
    let near = suggest(key, table::room_keys()).join(" or ");
    if near.is_empty() {
        format!("there is no such key; there are {}", table::room_keys().collect::<Vec<_>>().join(", "))
    } else {
        format!("there is no such key; did you mean {near}?")
    }
}

/// The default of a key, if it has one.
fn default<K: Kind>(key: &Key<K>) -> Option<K::Value> {
    let Fallback::Is(default) = key.default else { return None };
    let default = Raw::value(default).expect("a default is TOML");
    Some(key.kind.read(&default).expect("a default is a valid value"))
}

/// A text that differs for different values. Secrets print nothing, so for them it is the raw text; for
/// others it is the parsed value, so that `60s` and `1m` are equal.
fn printed<K: Kind>(key: &Key<K>, raw: &Raw, value: &K::Value) -> String {
    if key.kind.is_secret() { format!("{raw:?}") } else { format!("{value:?}") }
}

//! The layers of a configuration: file, environment, flags.
//!
//! Knows how each layer spells keys, which layer wins, and which keys exist. Does not know what values mean.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use super::{
    error::{ConfigError, ConfigErrors, Source},
    raw::{Entry, Raw},
    suggest::suggest,
    table::{ROOMS, TABLE, is_of_rooms, is_room_section, room_keys},
};
use crate::file;

/// The sources of a configuration. Nothing else is read, so tests control all input.
#[derive(Clone, Default)]
pub struct Sources {
    /// The configuration file: its path, for messages, and its text.
    pub file: Option<(PathBuf, String)>,
    /// Environment variables. Only those that begin with `TIDEGATE_` are used.
    pub env: BTreeMap<String, String>,
    /// Keys and values from the command line. The last value of a key wins.
    pub flags: Vec<(String, String)>,
}

impl Sources {
    /// The environment of this process. Loading refuses values that are not UTF-8.
    pub fn environment() -> BTreeMap<String, String> {
        let lossy = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        std::env::vars_os().map(|(name, value)| (lossy(name), lossy(value))).collect()
    }

    /// The configuration file that the environment names, in case the command line names none.
    pub fn file_of(env: &BTreeMap<String, String>) -> Option<PathBuf> {
        let named = env.iter().find(|(name, value)| name.eq_ignore_ascii_case(FILE) && !value.is_empty());
        named.map(|(_, path)| path.into())
    }

    /// Reads the current text of a configuration file.
    pub fn read_file(&mut self, path: PathBuf) -> Result<(), ConfigError> {
        match file::read_text(&path, file::MAX) {
            Ok(text) => {
                self.file = Some((path, text));
                Ok(())
            }
            Err(error) => {
                let source = Source::File { path, line: None };
                let expected = format!("expected a file of text that can be read: {error}");
                Err(ConfigError { key: String::new(), source, value: None, expected })
            }
        }
    }

    /// Whether any file may change: the configuration file, or one that holds a value.
    pub fn name_files(&self) -> bool {
        let mut names = self.env.keys().chain(self.flags.iter().map(|(name, _)| name));
        self.file.is_some() || names.any(|name| name.to_ascii_lowercase().ends_with("_file"))
    }

    /// The same environment and flags, with the current text of the file.
    pub fn read_again(&self) -> Result<Self, ConfigErrors> {
        let mut again = Self { file: None, env: self.env.clone(), flags: self.flags.clone() };
        if let Some((path, _)) = &self.file {
            again.read_file(path.clone()).map_err(|error| ConfigErrors::from(vec![error]))?;
        }
        Ok(again)
    }
}

/// Hides everything that may contain a secret.
impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.as_ref().map(|(path, _)| path);
        f.debug_struct("Sources").field("file", &file).finish_non_exhaustive()
    }
}

/// The strongest layer's value of each key.
#[derive(Default)]
pub(super) struct Layers {
    keys: BTreeMap<&'static str, Given>,
    /// Room policies: pattern and value. All from one layer; layers are not merged.
    pub rooms: Vec<(String, Given)>,
    /// Unknown keys and files that cannot be parsed.
    pub errors: Vec<ConfigError>,
    /// Whether the file could be parsed. If not, its values are unknown.
    pub file_is_sound: bool,
}

/// A value and its source.
#[derive(Clone)]
pub(super) struct Given {
    pub raw: Raw,
    pub source: Source,
}

impl Layers {
    pub(super) fn of(sources: &Sources) -> Self {
        let mut layers = Self { file_is_sound: true, ..Self::default() };
        if let Some((path, text)) = &sources.file {
            layers.file(path, text);
        }
        layers.environment(&sources.env);
        layers.flags(&sources.flags);
        layers
    }

    pub(super) fn get(&self, name: &str) -> Option<&Given> {
        self.keys.get(name)
    }

    fn file(&mut self, path: &Path, text: &str) {
        let at = |line| Source::File { path: path.to_owned(), line: Some(line) };
        match Raw::document(text) {
            Ok(entries) => self.table("", entries, &at),
            Err(errors) => {
                self.file_is_sound = false;
                self.errors.extend(errors.into_iter().map(|error| ConfigError {
                    key: String::new(),
                    source: at(error.line),
                    value: None,
                    expected: format!("expected TOML: {}", error.message),
                }));
            }
        }
    }

    /// Adds a table of the file. `path` is the table's name followed by a dot.
    fn table(&mut self, path: &str, entries: Vec<Entry>, at: &impl Fn(usize) -> Source) {
        for Entry { key, line, raw } in entries {
            let source = at(line);
            // A quoted key that contains a dot is a single key, and no such key exists.
            let name = if key.contains('.') { format!("{path}{key:?}") } else { format!("{path}{key}") };
            let is_section = TABLE
                .iter()
                .any(|row| row.name().strip_prefix(&name).is_some_and(|rest| rest.starts_with('.')));
            match raw {
                Raw::Table(rooms) if name == ROOMS => self.set_rooms(rooms, at),
                Raw::Table(entries) if is_section => self.table(&format!("{name}."), entries, at),
                _ if is_section => self.errors.push(ConfigError {
                    expected: format!("expected a table of keys, [{name}]"),
                    key: name,
                    source,
                    value: None,
                }),
                raw => self.set(&name, raw, source, str::to_owned),
            }
        }
    }

    fn environment(&mut self, env: &BTreeMap<String, String>) {
        let mut spelt: BTreeMap<String, &str> = BTreeMap::new();
        for (variable, value) in env {
            let Some(rest) = strip_prefix_ignoring_case(variable, PREFIX) else { continue };
            if is_service_link(rest, value) || variable.eq_ignore_ascii_case(FILE) {
                continue;
            }
            let name = rest.to_ascii_lowercase().replace("__", ".");
            let source = Source::Env(variable.clone());
            let refuse = |expected: String| ConfigError {
                key: name.clone(),
                source: source.clone(),
                value: None,
                expected,
            };
            if let Some(other) = spelt.insert(name.clone(), variable) {
                self.errors.push(refuse(format!("expected only one spelling; {other} is set as well")));
            } else if value.contains(char::REPLACEMENT_CHARACTER) {
                self.errors.push(refuse("expected UTF-8".to_owned()));
            } else if name == ROOMS {
                self.inline_rooms(value, &source);
            } else {
                self.set(&name, Raw::Text(value.clone()), source, variable_of);
            }
        }
    }

    fn flags(&mut self, flags: &[(String, String)]) {
        for (name, value) in flags {
            if name == ROOMS {
                self.inline_rooms(value, &Source::Flag);
            } else if let Some((pattern, key)) = room_key(name) {
                self.set_room(pattern, key, value);
            } else {
                self.set(name, Raw::Text(value.clone()), Source::Flag, str::to_owned);
            }
        }
    }

    /// Adds a value, or an error if the key is unknown. The error does not show the value, which may be that
    /// of a misspelt secret.
    fn set(&mut self, name: &str, raw: Raw, source: Source, write: impl Fn(&str) -> String) {
        match TABLE.iter().find(|row| row.name() == name && !is_of_rooms(name)) {
            Some(row) => {
                self.keys.insert(row.name(), Given { raw, source });
            }
            None => self.errors.push(ConfigError {
                key: name.to_owned(),
                source,
                value: None,
                expected: match suggest(name, TABLE.iter().map(|row| row.name())).as_slice() {
                    [] => "there is no such key; `tidegate default-config` lists them all".to_owned(),
                    near => {
                        let near: Vec<String> = near.iter().map(|name| write(name)).collect();
                        format!("there is no such key; did you mean {}?", near.join(" or "))
                    }
                },
            }),
        }
    }

    /// Adds room policies from an inline TOML table.
    fn inline_rooms(&mut self, text: &str, source: &Source) {
        match Raw::value(text.trim()) {
            Some(Raw::Table(rooms)) => self.set_rooms(rooms, &|_| source.clone()),
            _ => self.errors.push(ConfigError {
                key: ROOMS.to_owned(),
                source: source.clone(),
                value: Some(Raw::Text(text.to_owned()).show()),
                expected:
                    r#"expected an inline TOML table, such as { "chat:*" = { grant = ["subscribe"] } }"#
                        .to_owned(),
            }),
        }
    }

    /// Adds one key of a pattern from a flag. The last value of a key wins.
    fn set_room(&mut self, pattern: &str, key: &str, value: &str) {
        self.rooms.retain(|(_, given)| given.source == Source::Flag);
        let mut raw = Raw::Text(value.to_owned());
        if is_room_section(key)
            && let Some(table @ Raw::Table(_)) = Raw::value(value.trim())
        {
            raw = table;
        }
        let known = self.rooms.iter_mut().find(|(known, _)| known == pattern);
        if let Some((_, Given { raw: Raw::Table(entries), .. })) = known {
            put(entries, key, raw);
        } else {
            let mut entries = Vec::new();
            put(&mut entries, key, raw);
            let given = Given { raw: Raw::Table(entries), source: Source::Flag };
            self.rooms.push((pattern.to_owned(), given));
        }
    }

    fn set_rooms(&mut self, rooms: Vec<Entry>, at: &impl Fn(usize) -> Source) {
        let given = |entry: Entry| (entry.key, Given { raw: entry.raw, source: at(entry.line) });
        self.rooms = rooms.into_iter().map(given).collect();
    }
}

const PREFIX: &str = "TIDEGATE_";
/// Names the configuration file. It is not a key, because a file cannot name itself.
const FILE: &str = "TIDEGATE_CONFIG";

/// The environment variable of this key.
pub(super) fn variable_of(key: &str) -> String {
    if is_of_rooms(key) {
        return format!("{PREFIX}ROOMS");
    }
    format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

/// Splits `rooms."<pattern>".grant`, with or without the quotes, into pattern and key. The key may be unknown.
fn room_key(name: &str) -> Option<(&str, &str)> {
    let rest = name.strip_prefix(ROOMS)?.strip_prefix('.')?;
    if let Some(quoted) = rest.strip_prefix('"').and_then(|rest| rest.rsplit_once("\".")) {
        return Some(quoted);
    }
    // A pattern may contain dots. A misspelt key of a section still belongs to the section.
    let (pattern, key) = rest.rsplit_once('.')?;
    match pattern.rsplit_once('.') {
        Some((pattern, section)) if is_room_section(section) && !room_keys().any(|known| known == key) => {
            rest.get(pattern.len() + 1..).map(|key| (pattern, key))
        }
        _ => Some((pattern, key)),
    }
}

/// Sets a key of a room pattern, which may be one of a section (`history.size`). Replaces its earlier value.
fn put(entries: &mut Vec<Entry>, key: &str, raw: Raw) {
    let Some((section, key)) = key.split_once('.').filter(|(section, _)| is_room_section(section)) else {
        return replace(entries, key, raw);
    };
    let mut inner = match entries.iter().find(|entry| entry.key == section) {
        Some(Entry { raw: Raw::Table(inner), .. }) => inner.clone(),
        _ => Vec::new(),
    };
    replace(&mut inner, key, raw);
    replace(entries, section, Raw::Table(inner));
}

fn replace(entries: &mut Vec<Entry>, key: &str, raw: Raw) {
    entries.retain(|entry| entry.key != key);
    entries.push(Entry { key: key.to_owned(), line: 1, raw });
}

fn strip_prefix_ignoring_case<'a>(text: &'a str, prefix: &str) -> Option<&'a str> {
    let (start, rest) = text.split_at_checked(prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then_some(rest)
}

/// Whether Kubernetes set this variable for a Service whose name is, or starts with, `tidegate`:
/// `TIDEGATE_SERVICE_HOST`, `TIDEGATE_PORT=tcp://…`, `TIDEGATE_OPS_PORT_9090_TCP_ADDR`, … Every pod of the
/// namespace gets them, and they must not stop a node from starting.
fn is_service_link(rest: &str, value: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_port_link = |rest: &str| {
        // 8080_TCP, 8080_TCP_ADDR, …
        let mut parts = rest.split('_');
        parts.next().is_some_and(is_number)
            && parts.next().is_some_and(|protocol| matches!(protocol, "TCP" | "UDP" | "SCTP"))
            && matches!(parts.next(), None | Some("ADDR" | "PORT" | "PROTO"))
            && parts.next().is_none()
    };
    let after = |word: &str| match rest.strip_prefix(word) {
        Some(end) => Some(end),
        None => rest.split_once(&format!("_{word}")).map(|(_, end)| end),
    };
    after("SERVICE_HOST").is_some_and(str::is_empty)
        || after("SERVICE_PORT")
            .is_some_and(|end| (end.is_empty() || end.starts_with('_')) && is_number(value))
        || after("PORT").is_some_and(|end| match end.strip_prefix('_') {
            None => end.is_empty() && value.contains("://"),
            Some(end) => is_port_link(end),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_that_name_files_are_detected() {
        let flag = |name: &str| vec![(name.to_owned(), "x".to_owned())];
        let none = Sources { flags: flag("broker.url"), ..Sources::default() };
        assert!(!none.name_files());
        assert!(Sources { flags: flag("broker.url_file"), ..Sources::default() }.name_files());
        assert!(Sources { file: Some(("tidegate.toml".into(), String::new())), ..none }.name_files());
        let env = flag("Tidegate_Auth__HS256_Secret_File").into_iter().collect();
        assert!(Sources { env, ..Sources::default() }.name_files());
    }
}

//! What is wrong with a configuration.

use std::{fmt, path::PathBuf};

/// Everything that is wrong with a configuration, in the order in which it was found. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

/// One value, or one key, that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The key, as the reference writes it or as it was given. Empty if a whole file is at fault.
    pub key: String,
    /// Where it was given.
    pub source: Source,
    /// What was given, shortened. `None` if it is, or might be, a secret.
    pub value: Option<String>,
    /// What was expected in its place.
    pub expected: String,
}

/// Where a value was given, from the weakest to the strongest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: it is the default.
    Default,
    /// In a configuration file.
    File {
        /// Which file.
        path: PathBuf,
        /// On which line, counted from 1; `None` if the whole file is meant.
        line: Option<usize>,
    },
    /// In this environment variable.
    Env(String),
    /// On the command line.
    Flag,
}

impl Source {
    /// The same file at another line; anything else has no lines.
    pub(super) fn at_line(&self, line: usize) -> Self {
        match self {
            Self::File { path, .. } => Self::File { path: path.clone(), line: Some(line) },
            other => other.clone(),
        }
    }

    /// The place of the layer in the order of layers.
    pub(super) fn rank(&self) -> u8 {
        match self {
            Self::Default => 0,
            Self::File { .. } => 1,
            Self::Env(_) => 2,
            Self::Flag => 3,
        }
    }
}

impl ConfigErrors {
    /// `Err` if there is any error.
    pub(super) fn check(errors: Vec<ConfigError>) -> Result<(), Self> {
        if errors.is_empty() { Ok(()) } else { Err(Self(errors)) }
    }

    /// Each error.
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.0.iter()
    }
}

/// From at least one error.
impl From<Vec<ConfigError>> for ConfigErrors {
    fn from(errors: Vec<ConfigError>) -> Self {
        debug_assert!(!errors.is_empty(), "that would be a success");
        Self(errors)
    }
}

impl From<ConfigErrors> for Vec<ConfigError> {
    fn from(errors: ConfigErrors) -> Self {
        errors.0
    }
}

impl std::error::Error for ConfigErrors {}

/// One line per error, without a line break at the end.
impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if index == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// One line: `drain.window = "ten" (tidegate.toml:12): expected a time …`.
impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, source, value, expected } = self;
        match value {
            _ if key.is_empty() => write!(f, "{source}: {expected}"),
            Some(value) => write!(f, "{} = {value} ({source}): {expected}", OneLine(key)),
            None => write!(f, "{} ({source}): {expected}", OneLine(key)),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line: None } => write!(f, "{}", path.display()),
            Self::File { path, line: Some(line) } => write!(f, "{}:{line}", path.display()),
            Self::Env(name) => write!(f, "environment {}", OneLine(name)),
            Self::Flag => f.write_str("command line"),
        }
    }
}

/// A given key, kept to one line of bearable length.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in shorten(self.0).chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        Ok(())
    }
}

/// A text as it appears in an error: quoted, escaped, shortened.
pub(super) fn quote(text: &str) -> String {
    let short = shorten(text);
    format!("{short:?}{}", if short.len() < text.len() { "…" } else { "" })
}

fn shorten(text: &str) -> &str {
    const MAX_CHARS: usize = 100;
    text.char_indices().nth(MAX_CHARS).and_then(|(end, _)| text.get(..end)).unwrap_or(text)
}

//! Errors in a configuration.

use std::{fmt, path::PathBuf};

/// All errors in a configuration, in the order in which they were found. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

/// One invalid value or unknown key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The key, as in the reference or as given. Empty if the error concerns a whole file.
    pub key: String,
    /// Where it was given.
    pub source: Source,
    /// The given value, shortened. `None` if it is or may be a secret.
    pub value: Option<String>,
    /// What was expected instead.
    pub expected: String,
}

/// Where a value was given, from the weakest to the strongest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Not given: the default.
    Default,
    /// In a configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1; `None` for the whole file.
        line: Option<usize>,
    },
    /// In this environment variable.
    Env(String),
    /// On the command line.
    Flag,
}

impl Source {
    /// The same file at another line. Other sources have no lines and stay the same.
    pub(super) fn at_line(&self, line: usize) -> Self {
        match self {
            Self::File { path, .. } => Self::File { path: path.clone(), line: Some(line) },
            other => other.clone(),
        }
    }

    /// The rank of the layer: a higher rank wins.
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

/// `errors` must not be empty.
impl From<Vec<ConfigError>> for ConfigErrors {
    fn from(errors: Vec<ConfigError>) -> Self {
        debug_assert!(!errors.is_empty(), "no errors would be a success");
        Self(errors)
    }
}

impl From<ConfigErrors> for Vec<ConfigError> {
    fn from(errors: ConfigErrors) -> Self {
        errors.0
    }
}

impl std::error::Error for ConfigErrors {}

/// One line per error, without a trailing line break.
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

/// A given key as one shortened line.
struct OneLine<'a>(&'a str);

impl fmt::Display for OneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in shorten(self.0).chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        Ok(())
    }
}

/// Quotes, escapes and shortens a text for an error.
pub(super) fn quote(text: &str) -> String {
    let short = shorten(text);
    format!("{short:?}{}", if short.len() < text.len() { "…" } else { "" })
}

fn shorten(text: &str) -> &str {
    const MAX_CHARS: usize = 100;
    text.char_indices().nth(MAX_CHARS).and_then(|(end, _)| text.get(..end)).unwrap_or(text)
}

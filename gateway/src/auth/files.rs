//! Keys from files on this machine: the configured keys, and a key set.
//!
//! Reads the files and replaces the keys at runtime: all of them, or none if any file is invalid.
//! [`crate::watch`] decides when to read the files.

use std::{fmt, path::PathBuf, sync::Arc};

use parking_lot::Mutex;
use prometheus::{IntCounterVec, Opts, Registry};

use super::{
    jwks::{Document, DocumentError, Ignored, Origin},
    key::{Algorithm, Key, KeyError},
    keyring::Keyring,
};
use crate::{
    file::{FileError, MAX_SMALL, read_text, read_value},
    vocabulary::Secret,
    watch::Watched,
};

/// The configured keys on this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalKeys {
    /// `auth.hs256_secret`
    pub secret: Option<Secret>,
    /// `auth.keys`
    pub files: Vec<KeyFile>,
    /// `auth.jwks_file`
    pub jwks: Option<PathBuf>,
}

/// An entry of `auth.keys`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFile {
    /// The key id (`kid`) that tokens name.
    pub id: String,
    /// The key's algorithm. Determines whether the file holds a secret or a public key.
    pub algorithm: Algorithm,
    /// The file.
    pub path: PathBuf,
}

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The configured secret is invalid.
    #[error(transparent)]
    Secret(KeyError),
    /// A key's file cannot be read.
    #[error("{id:?}: expected a file that can be read: {error}")]
    Read {
        /// The key's id.
        id: String,
        /// Why it cannot be read.
        error: FileError,
    },
    /// A key's file does not hold a key for its algorithm.
    #[error("{id:?}, {algorithm}: in its file, {error}", algorithm = .algorithm.as_str())]
    Key {
        /// The key's id.
        id: String,
        /// Its configured algorithm.
        algorithm: Algorithm,
        /// What is wrong with it.
        error: KeyError,
    },
    /// The key set cannot be read.
    #[error("expected a file that can be read: {0}")]
    ReadSet(FileError),
    /// The key set cannot be used.
    #[error("in that file, {0}")]
    Set(DocumentError),
    /// A metric could not be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl LoadError {
    /// The configuration key that the error is about.
    pub fn key(&self) -> &'static str {
        match self {
            Self::Secret(_) => "auth.hs256_secret",
            Self::Read { .. } | Self::Key { .. } => "auth.keys",
            Self::ReadSet(_) | Self::Set(_) => "auth.jwks_file",
            Self::Metrics(_) => "auth",
        }
    }
}

/// Keys that were read and validated.
struct Loaded {
    configured: Vec<Key>,
    set: Vec<Key>,
    ignored: Vec<Ignored>,
}

impl LocalKeys {
    /// Whether no key is configured.
    pub fn is_empty(&self) -> bool {
        self.secret.is_none() && self.files.is_empty() && self.jwks.is_none()
    }

    /// Reads all files and returns their contents, or all errors. Blocks on the file system.
    pub fn read(&self) -> Result<Contents, Vec<LoadError>> {
        let alone = |files: Vec<KeyFile>, jwks| {
            let alone = Self { secret: None, files, jwks };
            let contents = alone.contents()?;
            alone.parse(&contents).map(|_| contents)
        };
        let files = self.files.iter().map(|file| alone(vec![file.clone()], None));
        let set = self.jwks.iter().map(|jwks| alone(Vec::new(), Some(jwks.clone())));
        let (mut whole, mut wrong) = (Contents::default(), Vec::new());
        for read in files.chain(set) {
            match read {
                Ok(Contents { keys, set }) => {
                    whole.keys.extend(keys);
                    whole.set = set;
                }
                Err(error) => wrong.push(error),
            }
        }
        if wrong.is_empty() { Ok(whole) } else { Err(wrong) }
    }

    /// Reads all files without validating them. Blocks on the file system.
    fn contents(&self) -> Result<Contents, LoadError> {
        let set = |path: &PathBuf| read_text(path, Document::MAX_BYTES).map_err(LoadError::ReadSet);
        Ok(Contents {
            keys: self.files.iter().map(KeyFile::read).collect::<Result<_, _>>()?,
            set: self.jwks.as_ref().map(set).transpose()?,
        })
    }

    /// Parses and validates the keys in `contents`.
    fn parse(&self, contents: &Contents) -> Result<Loaded, LoadError> {
        let secret = self
            .secret
            .iter()
            .map(|secret| Key::shared(None, Algorithm::Hs256, secret.expose()).map_err(LoadError::Secret));
        let keys = self.files.iter().zip(&contents.keys).map(|(file, text)| file.key(text));
        let configured = secret.chain(keys).collect::<Result<_, _>>()?;
        let set = contents.set.as_ref().map(|text| Document::read(text.as_bytes(), Origin::File));
        let Document { keys: set, ignored } = set.transpose().map_err(LoadError::Set)?.unwrap_or_default();
        Ok(Loaded { configured, set, ignored })
    }
}

impl KeyFile {
    fn read(&self) -> Result<String, LoadError> {
        let text = if self.algorithm.is_shared() {
            read_value(&self.path)
        } else {
            read_text(&self.path, MAX_SMALL)
        };
        text.map_err(|error| LoadError::Read { id: self.id.clone(), error })
    }

    fn key(&self, text: &str) -> Result<Key, LoadError> {
        let Self { id, algorithm, .. } = self;
        let key = if algorithm.is_shared() { Key::shared } else { Key::public };
        key(Some(id), *algorithm, text.as_bytes()).map_err(|error| LoadError::Key {
            id: id.clone(),
            algorithm: *algorithm,
            error,
        })
    }
}

/// The contents of the key files.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Contents {
    keys: Vec<String>,
    set: Option<String>,
}

/// The configured keys and the contents read from their files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    local: LocalKeys,
    contents: Contents,
}

/// Hides the contents, which may include secrets.
impl fmt::Debug for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contents").finish_non_exhaustive()
    }
}

/// Keeps a keyring in step with the files.
pub struct KeyFiles {
    keyring: Arc<Keyring>,
    state: Mutex<State>,
    reloads: IntCounterVec,
}

struct State {
    local: LocalKeys,
    /// What the files held at the last attempt, successful or not.
    tried: Contents,
}

impl KeyFiles {
    /// Starts with `contents`, which the files of `local` hold. `with_url` tells whether a URL supplies keys
    /// as well.
    pub fn new(
        local: LocalKeys,
        contents: Contents,
        with_url: bool,
        registry: &Registry,
    ) -> Result<Self, LoadError> {
        let Loaded { configured, set, ignored } = local.parse(&contents)?;
        say_ignored(&ignored, "auth.jwks_file");
        let keyring = Keyring::new(configured, set);
        let keyring = Arc::new(if with_url { keyring.with_url() } else { keyring });
        let reloads = IntCounterVec::new(
            Opts::new(
                "tidegate_key_reloads_total",
                "Attempts to replace the keys that come from files, by result.",
            ),
            &["result"],
        )?;
        for result in ["ok", "failed"] {
            reloads.with_label_values(&[result]);
        }
        registry.register(Box::new(reloads.clone()))?;
        Ok(Self { keyring, state: Mutex::new(State { local, tried: contents }), reloads })
    }

    /// The keyring.
    pub fn keyring(&self) -> Arc<Keyring> {
        Arc::clone(&self.keyring)
    }

    /// Whether `local` is the configuration in use, whatever its files hold by now.
    pub fn hold(&self, local: &LocalKeys) -> bool {
        self.state.lock().local == *local
    }

    /// Switches to `local`, whose files hold `contents`. Fails without a change if any key is invalid.
    pub fn replace(&self, local: LocalKeys, contents: Contents) -> Result<(), LoadError> {
        let mut state = self.state.lock();
        self.take(local.parse(&contents)?);
        *state = State { local, tried: contents };
        Ok(())
    }

    /// Reads the files that are in use. Blocks on the file system.
    pub fn read_now(&self) -> Result<Read, LoadError> {
        let local = self.state.lock().local.clone();
        local.contents().map(|contents| Read { local, contents })
    }

    /// Installs what was read if all of it is valid, even if nothing has changed.
    pub fn take_now(&self, read: Result<Read, LoadError>) {
        if let Err(error) = read.and_then(|Read { local, contents }| self.replace(local, contents)) {
            self.refuse(&error);
        }
    }

    fn take(&self, loaded: Loaded) {
        let Loaded { configured, set, ignored } = loaded;
        say_ignored(&ignored, "auth.jwks_file");
        tracing::info!(keys = configured.len() + set.len(), "loaded the keys from files");
        self.keyring.set_local(configured, set);
        self.reloads.with_label_values(&["ok"]).inc();
    }

    fn refuse(&self, error: &LoadError) {
        self.reloads.with_label_values(&["failed"]).inc();
        tracing::error!(key = error.key(), %error, "cannot replace the keys from files; the old ones stay in use");
    }
}

impl Watched for KeyFiles {
    type Contents = Read;

    fn has_files(&self) -> bool {
        let state = self.state.lock();
        !state.local.files.is_empty() || state.local.jwks.is_some()
    }

    fn read(&self) -> Option<Read> {
        self.read_now().ok()
    }

    fn found(&self, Read { local, contents }: &Read) {
        let mut state = self.state.lock();
        // Skip this if the configuration has changed since the files were read.
        if state.local == *local && state.tried != *contents {
            match local.parse(contents) {
                Ok(loaded) => self.take(loaded),
                Err(error) => self.refuse(&error),
            }
            state.tried.clone_from(contents);
        }
    }
}

/// Logs which keys of a set are skipped.
pub(super) fn say_ignored(ignored: &[Ignored], set: &'static str) {
    for ignored in ignored {
        tracing::warn!(set, %ignored, "skipped a key of the key set");
    }
}

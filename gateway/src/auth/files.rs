//! Keys from files of this machine: the configured ones, and a key set.
//!
//! Owns reading them, and replacing them while the node runs: all of them or, if one is not sound, none.
//! When the files are looked at is [`crate::watch`]'s.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use prometheus::{IntCounterVec, Opts, Registry};

use super::{
    jwks::{Document, DocumentError, Ignored, Origin},
    key::{Algorithm, Key, KeyError},
    keyring::Keyring,
};
use crate::{
    config::Secret,
    watch::{Looks, Watched},
};

/// The largest file of a single key, in bytes.
const MAX_KEY_FILE: usize = 64 * 1024;

/// What the configuration says of keys on this machine.
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
    /// The name by which tokens choose it.
    pub id: String,
    /// What it is used with, and decides whether the file holds a secret or a public key.
    pub algorithm: Algorithm,
    /// The file.
    pub path: PathBuf,
}

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The secret of the configuration.
    #[error(transparent)]
    Secret(KeyError),
    /// A key's file cannot be read.
    #[error("{id:?}: expected a file that can be read: {error}")]
    Read {
        /// The key.
        id: String,
        /// What the operating system said.
        error: io::Error,
    },
    /// A key's file does not hold such a key.
    #[error("{id:?}, {algorithm}: in its file, {error}", algorithm = .algorithm.as_str())]
    Key {
        /// The key.
        id: String,
        /// What it was to be used with.
        algorithm: Algorithm,
        /// What is wrong.
        error: KeyError,
    },
    /// The key set cannot be read.
    #[error("expected a file that can be read: {0}")]
    ReadSet(io::Error),
    /// The key set cannot be used.
    #[error("in that file, {0}")]
    Set(DocumentError),
    /// Two metrics have one name.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

impl LoadError {
    /// The configuration key that it is about.
    pub fn key(&self) -> &'static str {
        match self {
            Self::Secret(_) => "auth.hs256_secret",
            Self::Read { .. } | Self::Key { .. } => "auth.keys",
            Self::ReadSet(_) | Self::Set(_) => "auth.jwks_file",
            Self::Metrics(_) => "auth",
        }
    }
}

/// Keys that were read and are sound.
struct Loaded {
    configured: Vec<Key>,
    set: Vec<Key>,
    ignored: Vec<Ignored>,
}

impl LocalKeys {
    /// Whether there is any.
    pub fn is_empty(&self) -> bool {
        self.secret.is_none() && self.files.is_empty() && self.jwks.is_none()
    }

    /// Everything that is wrong with them, one sentence each.
    pub fn complaints(&self) -> Vec<LoadError> {
        let one = |files: Vec<KeyFile>, jwks| {
            let local = Self { secret: None, files, jwks };
            local.read().and_then(|contents| local.parse(&contents)).err()
        };
        let keys = self.files.iter().filter_map(|file| one(vec![file.clone()], None));
        keys.chain(self.jwks.clone().and_then(|jwks| one(Vec::new(), Some(jwks)))).collect()
    }

    fn read(&self) -> Result<Contents, LoadError> {
        let key = |file: &KeyFile| {
            read_file(&file.path, MAX_KEY_FILE)
                .map_err(|error| LoadError::Read { id: file.id.clone(), error })
        };
        let set = |path: &PathBuf| read_file(path, Document::MAX_BYTES).map_err(LoadError::ReadSet);
        Ok(Contents {
            keys: self.files.iter().map(key).collect::<Result<_, _>>()?,
            set: self.jwks.as_ref().map(set).transpose()?,
        })
    }

    fn parse(&self, contents: &Contents) -> Result<Loaded, LoadError> {
        let secret = self
            .secret
            .iter()
            .map(|secret| Key::shared(None, Algorithm::Hs256, secret.expose()).map_err(LoadError::Secret));
        let keys = self.files.iter().zip(&contents.keys).map(|(KeyFile { id, algorithm, .. }, bytes)| {
            let key = if algorithm.is_shared() {
                Key::shared(Some(id), *algorithm, without_line_break(bytes))
            } else {
                Key::public(Some(id), *algorithm, bytes)
            };
            key.map_err(|error| LoadError::Key { id: id.clone(), algorithm: *algorithm, error })
        });
        let configured = secret.chain(keys).collect::<Result<_, _>>()?;
        let set = contents.set.as_ref().map(|json| Document::read(json, Origin::File)).transpose();
        let Document { keys: set, ignored } = set.map_err(LoadError::Set)?.unwrap_or_default();
        Ok(Loaded { configured, set, ignored })
    }
}

/// What the files hold.
#[derive(Clone, PartialEq, Eq)]
pub struct Contents {
    keys: Vec<Vec<u8>>,
    set: Option<Vec<u8>>,
}

/// Keeps a keyring as the files are.
pub struct KeyFiles {
    keyring: Arc<Keyring>,
    /// Held while files are tried, so that attempts come one after another.
    state: Mutex<State>,
    reloads: IntCounterVec,
}

struct State {
    local: LocalKeys,
    /// What the files held when they were last tried, whether that was sound or not.
    tried: Option<Contents>,
}

impl KeyFiles {
    /// Reads and checks the keys. `with_url` says whether more will come from a URL.
    pub fn load(local: LocalKeys, with_url: bool, registry: &Registry) -> Result<Self, LoadError> {
        let contents = local.read()?;
        let Loaded { configured, set, ignored } = local.parse(&contents)?;
        say_ignored(&ignored, "auth.jwks_file");
        let keyring = Keyring::new(configured, set);
        let keyring = Arc::new(if with_url { keyring.with_url() } else { keyring });
        let reloads = IntCounterVec::new(
            Opts::new(
                "tidegate_key_reloads_total",
                "Attempts to replace the keys that are files, by result.",
            ),
            &["result"],
        )?;
        for result in ["ok", "failed"] {
            reloads.with_label_values(&[result]);
        }
        registry.register(Box::new(reloads.clone()))?;
        Ok(Self { keyring, state: Mutex::new(State { local, tried: Some(contents) }), reloads })
    }

    /// The keys.
    pub fn keyring(&self) -> Arc<Keyring> {
        Arc::clone(&self.keyring)
    }

    /// Whether these are the keys that count, wherever their files have got to.
    pub fn hold(&self, local: &LocalKeys) -> bool {
        self.state.lock().local == *local
    }

    /// From now on `local` counts, if all of it is sound. Blocks on the file system.
    pub fn replace(&self, local: LocalKeys) -> Result<(), LoadError> {
        let mut state = self.state.lock();
        let contents = local.read()?;
        self.take(local.parse(&contents)?);
        *state = State { local, tried: Some(contents) };
        Ok(())
    }

    /// Reads the files now and takes what they hold if all of it is sound. Blocks on the file system.
    pub fn reload(&self) {
        let local = self.state.lock().local.clone();
        if let Err(error) = self.replace(local) {
            self.refuse(&error);
        }
    }

    fn take(&self, loaded: Loaded) {
        let Loaded { configured, set, ignored } = loaded;
        say_ignored(&ignored, "auth.jwks_file");
        tracing::info!(keys = configured.len() + set.len(), "the keys that are files were read");
        self.keyring.set_local(configured, set);
        self.reloads.with_label_values(&["ok"]).inc();
    }

    fn refuse(&self, error: &LoadError) {
        self.reloads.with_label_values(&["failed"]).inc();
        tracing::error!(key = error.key(), %error, "the keys that are files were not replaced; the old ones go on");
    }
}

impl Watched for KeyFiles {
    type Contents = Contents;

    fn has_files(&self) -> bool {
        // Who holds it is reading some.
        self.state.try_lock().is_none_or(|state| !state.local.files.is_empty() || state.local.jwks.is_some())
    }

    fn look(&self, looks: &mut Looks<Contents>) {
        let mut state = self.state.lock();
        let Some(found) = looks.agree(state.local.read().ok()) else { return };
        if state.tried.as_ref() != Some(found) {
            match state.local.parse(found) {
                Ok(loaded) => self.take(loaded),
                Err(error) => self.refuse(&error),
            }
            state.tried = Some(found.clone());
        }
    }
}

/// Says which keys of a set are not used.
pub(super) fn say_ignored(ignored: &[Ignored], set: &'static str) {
    for ignored in ignored {
        tracing::warn!(set, %ignored, "a key is not used");
    }
}

/// Without the one line break that an editor leaves at a file's end.
pub(crate) fn without_line_break(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(b"\n").map_or(bytes, |line| line.strip_suffix(b"\r").unwrap_or(line))
}

fn read_file(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = File::open(path)?.take(max as u64 + 1).read_to_end(&mut bytes)?;
    if read > max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {max} bytes")));
    }
    Ok(bytes)
}

//! The node's keys, and which of them to try for a token.
//!
//! Chooses keys by `kid` and algorithm, and is the only place where keys are replaced at runtime. Reads
//! nothing: [`files`](super::files) and [`remote`](super::remote) supply the keys.
//!
//! Keys come from three sources, in this order: the configuration, a key set in a file, a key set at a URL.
//! If several sources have keys with the same id, only the first source counts. A key set can therefore never
//! replace a configured key.

use std::{fmt, sync::Arc, time::Duration};

use parking_lot::RwLock;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    AuthFailure,
    key::{Algorithm, Key},
};

/// The node's keys. Reading them takes one short read lock and never waits for a fetch.
pub struct Keyring {
    current: RwLock<Arc<Keys>>,
    fetching: Option<Fetching>,
}

/// A snapshot of the keys.
#[derive(Default)]
pub struct Keys {
    configured: Arc<[Key]>,
    file: Arc<[Key]>,
    /// `None` while a URL is configured and no fetch has succeeded yet.
    url: Option<Arc<[Key]>>,
}

impl Keyring {
    /// How many keys are tried for one token at most. Bounds the cost of a forged token.
    pub const MAX_TRIES: usize = 4;

    /// Starts with keys from the configuration and from a key set in a file.
    pub fn new(configured: Vec<Key>, file: Vec<Key>) -> Self {
        let keys = Keys { configured: configured.into(), file: file.into(), url: Some(Arc::from([])) };
        Self { current: RwLock::new(Arc::new(keys)), fetching: None }
    }

    /// Adds a URL as a source whose keys are still to be fetched.
    #[must_use]
    pub fn with_url(mut self) -> Self {
        self.replace(|keys| keys.url = None);
        self.fetching = Some(Fetching::default());
        self
    }

    /// The current keys.
    pub fn current(&self) -> Arc<Keys> {
        Arc::clone(&self.current.read())
    }

    /// Replaces the keys from the configuration and from the key set in a file.
    pub fn set_local(&self, configured: Vec<Key>, file: Vec<Key>) {
        self.replace(|keys| (keys.configured, keys.file) = (configured.into(), file.into()));
    }

    /// Replaces the keys from the URL.
    pub fn set_url(&self, url: Vec<Key>) {
        self.replace(|keys| keys.url = Some(url.into()));
    }

    /// Whether every source has supplied its keys.
    pub fn is_complete(&self) -> bool {
        self.current.read().url.is_some()
    }

    /// Whether any key is public. Verifying with one takes many times as long as with a shared secret.
    pub fn has_public_keys(&self) -> bool {
        self.current().all().any(|key| !key.algorithm().is_shared())
    }

    /// Coordinates fetches of the URL; `None` without a URL.
    pub fn fetching(&self) -> Option<&Fetching> {
        self.fetching.as_ref()
    }

    /// How many fetches have ended. Take it before you verify a token: see [`Self::want_key`].
    pub fn fetches(&self) -> u64 {
        self.fetching().map_or(0, |fetching| fetching.state.borrow().ended)
    }

    /// Requests a fetch because a token named a key that was unknown after `seen` fetches. Returns whether a
    /// fetch that may bring the key is pending or running, or has ended since.
    pub fn want_key(&self, seen: u64) -> bool {
        self.fetching().is_some_and(|fetching| fetching.want(self.is_complete(), seen).is_some())
    }

    /// Like [`Self::want_key`], but waits until that fetch has ended. Returns whether one has.
    pub async fn wait_for_key(&self, seen: u64) -> bool {
        let Some(end) = self.fetching().and_then(|fetching| fetching.want(self.is_complete(), seen)) else {
            return false;
        };
        tokio::time::timeout(Fetching::PATIENCE, end.come()).await.is_ok()
    }

    fn replace(&self, change: impl FnOnce(&mut Keys)) {
        let mut current = self.current.write();
        let Keys { configured, file, url } = &**current;
        let mut keys = Keys { configured: Arc::clone(configured), file: Arc::clone(file), url: url.clone() };
        change(&mut keys);
        *current = Arc::new(keys);
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.current().all()).finish()
    }
}

impl Keys {
    /// The keys that may have signed a token with this header: 1 to [`Keyring::MAX_TRIES`] keys, all of this
    /// algorithm.
    ///
    /// With a `kid`, the keys with that id. If there are none, the keys without an id: the issuer may use any
    /// `kid` for a key that has no id here. Without a `kid`, every key of the algorithm, unless there are
    /// more than [`Keyring::MAX_TRIES`].
    pub fn find(&self, algorithm: Algorithm, id: Option<&str>) -> Result<Vec<&Key>, AuthFailure> {
        let Some(id) = id else {
            let fit: Vec<_> = self.all().filter(|key| key.algorithm() == algorithm).collect();
            return match fit.len() {
                // The set that has not been fetched yet may contain the key.
                0 if self.url.is_none() && !algorithm.is_shared() => Err(AuthFailure::UnknownKey),
                0 => Err(AuthFailure::WrongAlgorithm),
                1..=Keyring::MAX_TRIES => Ok(fit),
                _ => Err(AuthFailure::UnknownKey),
            };
        };
        let (keys, failure) = match self.places().find(|place| place.iter().any(|key| key.id() == Some(id))) {
            Some(place) => (named(place.iter(), Some(id), algorithm), AuthFailure::WrongAlgorithm),
            None => (named(self.all(), None, algorithm), AuthFailure::UnknownKey),
        };
        if keys.is_empty() { Err(failure) } else { Ok(keys) }
    }

    fn all(&self) -> impl Iterator<Item = &Key> {
        self.places().flat_map(|place| place.iter())
    }

    fn places(&self) -> impl Iterator<Item = &[Key]> {
        [&*self.configured, &*self.file, self.url.as_deref().unwrap_or_default()].into_iter()
    }
}

fn named<'a>(keys: impl Iterator<Item = &'a Key>, id: Option<&str>, algorithm: Algorithm) -> Vec<&'a Key> {
    keys.filter(|key| key.id() == id && key.algorithm() == algorithm).take(Keyring::MAX_TRIES).collect()
}

/// Coordinates fetches of the key set between the fetcher and the requests that wait for a key.
///
/// Only one fetch runs at a time, however many requests ask, and a request starts the next one no sooner than
/// [`Self::COOLDOWN`] after the last has ended. Tokens with random key ids therefore cannot make this node
/// flood the server of the set.
pub struct Fetching {
    state: watch::Sender<State>,
    wanted: Notify,
}

#[derive(Default)]
struct State {
    under_way: bool,
    ended: u64,
    last_end: Option<Instant>,
}

/// Resolves when a requested fetch has ended.
pub struct End {
    state: watch::Receiver<State>,
    after: u64,
}

impl Fetching {
    /// The minimum time between the end of one fetch and the next one that a token triggers.
    pub const COOLDOWN: Duration = Duration::from_secs(5);

    /// How long a request waits for a fetch.
    pub const PATIENCE: Duration = Duration::from_secs(5);

    /// Requests a fetch that the caller has not `seen`. Returns its [`End`] if one has ended since, is
    /// running or can start now. Until the first fetch succeeds (`complete` is false) it always returns one,
    /// because the fetcher keeps retrying.
    fn want(&self, complete: bool, seen: u64) -> Option<End> {
        let mut end = None;
        self.state.send_if_modified(|state| {
            if state.ended > seen {
                end = Some(seen);
                return false;
            }
            let cooling = state.last_end.is_some_and(|last| last.elapsed() < Self::COOLDOWN);
            if !state.under_way && !cooling {
                state.under_way = true;
                self.wanted.notify_one();
            }
            if state.under_way || !complete {
                end = Some(state.ended);
            }
            false
        });
        end.map(|after| End { state: self.state.subscribe(), after })
    }

    /// The fetcher calls this when a fetch starts.
    pub(super) fn begin(&self) {
        self.state.send_if_modified(|state| {
            state.under_way = true;
            false
        });
    }

    /// The fetcher calls this when a fetch has ended and its keys are installed.
    pub(super) fn end(&self) {
        self.state.send_modify(|state| {
            *state = State { under_way: false, ended: state.ended + 1, last_end: Some(Instant::now()) };
        });
    }

    /// Waits until a request asks for a fetch.
    pub(super) async fn wanted(&self) {
        loop {
            self.wanted.notified().await;
            // The notification may be stale: the fetch it asked for has already ended.
            if self.state.borrow().under_way {
                return;
            }
        }
    }
}

impl Default for Fetching {
    fn default() -> Self {
        Self { state: watch::Sender::new(State::default()), wanted: Notify::new() }
    }
}

impl End {
    async fn come(mut self) {
        // The sender lives as long as the keyring, which the waiting caller holds.
        drop(self.state.wait_for(|state| state.ended > self.after).await);
    }
}

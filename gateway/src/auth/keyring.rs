//! The keys of a node, and which of them a token is to be tried with.
//!
//! Owns the choice by `kid` and algorithm, and the one place where keys are replaced while the node runs.
//! Reads nothing: [`files`](super::files) and [`remote`](super::remote) bring the keys.
//!
//! There are three places that keys come from: the configuration, a key set in a file, a key set at a URL.
//! Of a name that several places use, the first place in this order decides alone, so that a key set can
//! never stand in for a configured key.

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

/// The keys of a node. Each look at them is one short read lock; nothing waits for a fetch here.
pub struct Keyring {
    current: RwLock<Arc<Keys>>,
    fetching: Option<Fetching>,
}

/// The keys at one moment.
#[derive(Default)]
pub struct Keys {
    configured: Arc<[Key]>,
    file: Arc<[Key]>,
    /// `None` as long as a URL is configured and nothing has come from it.
    url: Option<Arc<[Key]>>,
}

impl Keyring {
    /// How many keys one token is tried with at most. Bounds what a token costs that is not genuine.
    pub const MAX_TRIES: usize = 4;

    /// Keys that come from the configuration, and perhaps a key set in a file.
    pub fn new(configured: Vec<Key>, file: Vec<Key>) -> Self {
        let keys = Keys { configured: configured.into(), file: file.into(), url: Some(Arc::from([])) };
        Self { current: RwLock::new(Arc::new(keys)), fetching: None }
    }

    /// The same, with more to come from a URL.
    #[must_use]
    pub fn with_url(mut self) -> Self {
        self.replace(|keys| keys.url = None);
        self.fetching = Some(Fetching::default());
        self
    }

    /// The keys as they are now.
    pub fn current(&self) -> Arc<Keys> {
        Arc::clone(&self.current.read())
    }

    /// Replaces the keys of the configuration and of the key set in a file.
    pub fn set_local(&self, configured: Vec<Key>, file: Vec<Key>) {
        self.replace(|keys| (keys.configured, keys.file) = (configured.into(), file.into()));
    }

    /// Replaces the keys that came from the URL.
    pub fn set_url(&self, url: Vec<Key>) {
        self.replace(|keys| keys.url = Some(url.into()));
    }

    /// Whether every place that keys come from has given some.
    pub fn is_complete(&self) -> bool {
        self.current.read().url.is_some()
    }

    /// Where fetches of the URL are asked for; `None` if there is no URL.
    pub fn fetching(&self) -> Option<&Fetching> {
        self.fetching.as_ref()
    }

    /// Asks for the URL to be fetched, since a token named a key that nobody knows. Returns whether a
    /// fetch is under way that may bring it.
    pub fn want_key(&self) -> bool {
        self.fetching().is_some_and(|fetching| fetching.want(self.is_complete()).is_some())
    }

    /// The same, and waits until that fetch has ended. Returns whether there was one.
    pub async fn wait_for_key(&self) -> bool {
        let Some(end) = self.fetching().and_then(|fetching| fetching.want(self.is_complete())) else {
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
    /// The keys that a token with this header may be signed with: at least one, at most
    /// [`Keyring::MAX_TRIES`], all of this algorithm.
    ///
    /// A token with `kid` is tried with the keys of that name. If no key has it, with those that have no
    /// name: whoever signs may call a key what he likes if the node does not call it anything. A token
    /// without `kid` is tried with every key of its algorithm, as long as they are few.
    pub fn find(&self, algorithm: Algorithm, id: Option<&str>) -> Result<Vec<&Key>, AuthFailure> {
        let Some(id) = id else {
            let fit: Vec<_> = self.all().filter(|key| key.algorithm() == algorithm).collect();
            return match fit.len() {
                // What is still to come may have one.
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

/// Fetches of the key set, as those see them who wait for one.
///
/// However many ask, one fetch is under way at a time, and the next begins [`Self::COOLDOWN`] after the
/// last has ended: tokens that name random keys cannot make this node a nuisance to whoever serves the set.
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

/// The end of a fetch that is under way.
pub struct End {
    state: watch::Receiver<State>,
    after: u64,
}

impl Fetching {
    /// From the end of one fetch to the beginning of the next that a token causes.
    pub const COOLDOWN: Duration = Duration::from_secs(5);

    /// How long a request waits for a fetch.
    pub const PATIENCE: Duration = Duration::from_secs(5);

    /// Asks for a fetch. Returns the end of the one that is under way, if one is or can begin now. As long
    /// as nothing has ever come (`complete` is false), one always is: it is tried again and again.
    fn want(&self, complete: bool) -> Option<End> {
        let mut end = None;
        self.state.send_if_modified(|state| {
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

    /// A fetch begins.
    pub(super) fn begin(&self) {
        self.state.send_if_modified(|state| {
            state.under_way = true;
            false
        });
    }

    /// It has ended, and what it brought is in its place.
    pub(super) fn end(&self) {
        self.state.send_modify(|state| {
            *state = State { under_way: false, ended: state.ended + 1, last_end: Some(Instant::now()) };
        });
    }

    /// Comes back when somebody wants a fetch.
    pub(super) async fn wanted(&self) {
        loop {
            self.wanted.notified().await;
            // One that wanted the fetch which ended meanwhile has had it.
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
        // The sender lives as long as the keyring, which whoever waits holds.
        drop(self.state.wait_for(|state| state.ended > self.after).await);
    }
}

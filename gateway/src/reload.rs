//! A running node takes a new configuration: on SIGHUP, and when a file of it has changed.
//!
//! Owns when the configuration is read again, whether it is taken, and how that is told. What it then
//! changes is the node's ([`Node::reload`]); sockets are touched by neither.
//!
//! A look ([`crate::watch`]) reads all of the configuration as a start would, with every file that it
//! names: a file that is replaced by a rename, a mounted Kubernetes secret that changes by the swap of a
//! link two directories up, and a key that only now names a file are all the same to it. Where no file is
//! named, nothing can change and nothing is read. A file system that does not answer ends a look after a while
//! ([`crate::file`]); that is told as a refused configuration, and the next look begins anew.

use std::{convert::Infallible, future::pending, sync::Arc, time::SystemTime};

use tokio::signal::unix::Signal;

use crate::{
    config::{Changes, Config, ConfigErrors, Secret, Sources},
    descriptors,
    file::{Hung, Reads},
    metrics::ReloadResult,
    node::{Node, ReloadError},
    telemetry::Filter,
    watch::{Looks, ticks},
};

/// Reads the configuration again and has the node take it.
pub struct Reloader {
    sources: Arc<Sources>,
    /// What decides about the log; `None` if the log is somebody else's.
    log: Option<Filter>,
    /// The key of a node that was started without one: it counts for as long as no other is configured.
    own_secret: Option<Secret>,
    /// What was last tried, whether it was sound or not.
    tried: Found,
    reads: Reads,
}

/// What a look has found.
enum Found {
    Sound(Box<Config>),
    Broken(ConfigErrors),
    /// Nothing: the file system does not answer.
    Nothing(Hung),
}

impl Found {
    fn read(sources: &Sources) -> Self {
        match sources.read_again().and_then(|sources| Config::load(&sources)) {
            Ok(config) => Self::Sound(Box::new(config)),
            Err(errors) => Self::Broken(errors),
        }
    }
}

/// Whether both would be told, and taken, in the same way.
impl PartialEq for Found {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Sound(one), Self::Sound(other)) => one.snapshot == other.snapshot,
            (Self::Broken(one), Self::Broken(other)) => one == other,
            _ => false,
        }
    }
}

impl Reloader {
    /// Begins with the configuration that the node was started with, and where that came from.
    pub fn new(sources: Sources, config: Config, log: Option<Filter>) -> Self {
        Self {
            sources: Arc::new(sources),
            log,
            own_secret: None,
            tried: Found::Sound(Box::new(config)),
            reads: Reads::default(),
        }
    }

    /// With the key that a node made for itself.
    #[must_use]
    pub fn with_own_secret(mut self, secret: Secret) -> Self {
        self.own_secret = Some(secret);
        self
    }

    /// Takes new configurations until dropped. `hangup` has them, and the certificate, taken at once.
    pub async fn run(mut self, node: &Node, hangup: &mut Signal) -> Infallible {
        let mut ticks = ticks();
        let mut looks = Looks::default();
        loop {
            let told = tokio::select! {
                () = received(hangup) => true,
                _ = ticks.tick(), if self.sources.name_files() => false,
            };
            // A look that nobody asked for waits until the one before has come to its end.
            if !told && self.reads.hang() {
                continue;
            }
            let found = self.look().await;
            if told {
                node.reload_files().await;
                looks.take();
                self.take(node, found);
            } else if let Found::Nothing(_) = found {
                looks.take();
                self.take(node, found);
            } else if looks.agree(Some(found)).is_some_and(|found| *found != self.tried)
                && let Some(found) = looks.take()
            {
                self.take(node, found);
            }
        }
    }

    /// Reads everything, within the time that a file may take.
    async fn look(&mut self) -> Found {
        let sources = Arc::clone(&self.sources);
        self.reads.run(move || Found::read(&sources)).await.unwrap_or_else(Found::Nothing)
    }

    fn take(&mut self, node: &Node, mut found: Found) {
        if let Found::Sound(config) = &mut found
            && !config.auth.has_key()
        {
            config.auth.keys.secret.clone_from(&self.own_secret);
        }
        let result = match &found {
            Found::Broken(errors) => {
                for error in errors.iter() {
                    tracing::error!(%error, "the new configuration is refused; the old one goes on");
                }
                ReloadResult::Refused
            }
            Found::Nothing(error) => {
                tracing::error!(%error, "the configuration was not read again; the old one goes on");
                ReloadResult::Refused
            }
            Found::Sound(config) => match node.reload(config) {
                Ok(changes) => self.tell(config, &changes),
                Err(error @ (ReloadError::NoKey | ReloadError::Keys(_))) => {
                    tracing::error!(%error, "the new configuration is refused; the old one goes on");
                    ReloadResult::Refused
                }
            },
        };
        node.metrics().config_reloaded(result, SystemTime::now().into());
        self.tried = found;
    }

    fn tell(&self, config: &Config, Changes { live, restart }: &Changes) -> ReloadResult {
        if !restart.is_empty() {
            let keys = restart.join(", ");
            tracing::warn!(keys, "changed in the configuration; takes effect after a restart");
        }
        if live.is_empty() {
            tracing::info!("the configuration was read again; nothing in it changes this node");
            return ReloadResult::Unchanged;
        }
        if let Some(log) = &self.log {
            log.set(&config.log.filter);
        }
        tracing::info!(keys = live.join(", "), "the new configuration counts");
        if live.contains(&"limits.connections") {
            descriptors::warn_if_too_few(config);
        }
        ReloadResult::Applied
    }
}

/// Waits for the signal; forever if none can come any more.
async fn received(signal: &mut Signal) {
    if signal.recv().await.is_none() {
        pending::<()>().await;
    }
}

//! Reloads the configuration of a running node: on SIGHUP, and when one of its files has changed.
//!
//! Decides when to read the configuration, whether to accept it, and how to report the result. The node
//! applies the changes ([`Node::reload`]). Neither touches sockets.
//!
//! Each check ([`crate::watch`]) reads the whole configuration as at startup, with every file that it names.
//! So it detects a file that is replaced by a rename, a mounted Kubernetes secret whose link two directories
//! up is swapped, and a key that only now names a file. If no file is named, nothing can change and nothing
//! is read. If the file system does not answer, the check ends after a while ([`crate::file`]), and the
//! configuration is reported as refused; the next check starts anew.

use std::{convert::Infallible, future::pending, sync::Arc, time::SystemTime};

use prometheus::{IntGauge, Registry};
use tokio::signal::unix::Signal;

use crate::{
    auth::UnixSeconds,
    config::{Changes, Config, ConfigErrors, Sources},
    descriptors,
    file::{Hung, Reads},
    node::{Node, ReloadError},
    telemetry::Filter,
    vocabulary::{
        Secret,
        metrics::{Counters, Label, gauge},
    },
    watch::{Looks, ticks},
};

/// The result of an attempt to reload the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadResult {
    /// Some keys changed and are in effect.
    Applied,
    /// No key changed that a running node can apply.
    Unchanged,
    /// It is invalid; the node keeps the old one.
    Refused,
}

impl Label for ReloadResult {
    const ALL: &'static [Self] = &[Self::Applied, Self::Unchanged, Self::Refused];

    fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Unchanged => "unchanged",
            Self::Refused => "refused",
        }
    }
}

/// The metrics of reloads.
#[derive(Debug)]
pub struct ReloadMetrics {
    reloads: Counters<ReloadResult>,
    successful: IntGauge,
    success_timestamp: IntGauge,
}

impl ReloadMetrics {
    /// Registers the metrics. A valid configuration was read at `now`.
    pub fn register(registry: &Registry, now: UnixSeconds) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            reloads: Counters::register(
                registry,
                "tidegate_config_reloads_total",
                "Attempts to take a new configuration, by result.",
                "result",
            )?,
            successful: gauge(
                registry,
                "tidegate_config_last_reload_successful",
                "1 if the configuration that was read last is sound, 0 if it was refused.",
            )?,
            success_timestamp: gauge(
                registry,
                "tidegate_config_last_reload_success_timestamp_seconds",
                "When a sound configuration was last read, in Unix time.",
            )?,
        };
        metrics.read(true, now);
        Ok(metrics)
    }

    fn reloaded(&self, result: ReloadResult, now: UnixSeconds) {
        self.reloads.of(result).inc();
        self.read(result != ReloadResult::Refused, now);
    }

    fn read(&self, sound: bool, now: UnixSeconds) {
        self.successful.set(i64::from(sound));
        if sound {
            self.success_timestamp.set(i64::try_from(now.0).unwrap_or(i64::MAX));
        }
    }
}

/// Reads the configuration again and applies it to the node.
pub struct Reloader {
    sources: Arc<Sources>,
    /// The log's filter; `None` if the log is not this program's own.
    log: Option<Filter>,
    /// The secret of a node that started without a key. It stays in use until a key is configured.
    own_secret: Option<Secret>,
    /// The result of the last attempt, valid or not.
    tried: Found,
    reads: Reads,
}

/// The result of a check.
enum Found {
    Sound(Box<Config>),
    Broken(ConfigErrors),
    /// The file system does not answer.
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

/// Whether both would be reported and applied in the same way.
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
    /// Starts with the node's current configuration and its sources.
    pub fn new(sources: Sources, config: Config, log: Option<Filter>) -> Self {
        Self {
            sources: Arc::new(sources),
            log,
            own_secret: None,
            tried: Found::Sound(Box::new(config)),
            reads: Reads::default(),
        }
    }

    /// Sets the secret that a node generated for itself.
    #[must_use]
    pub fn with_own_secret(mut self, secret: Secret) -> Self {
        self.own_secret = Some(secret);
        self
    }

    /// Reloads configurations until dropped. `hangup` reloads the configuration and the certificate at once.
    pub async fn run(mut self, node: &Node, metrics: &ReloadMetrics, hangup: &mut Signal) -> Infallible {
        let mut ticks = ticks();
        let mut looks = Looks::default();
        loop {
            let told = tokio::select! {
                () = received(hangup) => true,
                _ = ticks.tick(), if self.sources.name_files() => false,
            };
            // A periodic check waits until the one before has ended.
            if !told && self.reads.hang() {
                continue;
            }
            let found = self.look().await;
            if told {
                node.reload_files().await;
                looks.take();
                self.take(node, metrics, found);
            } else if let Found::Nothing(_) = found {
                looks.take();
                self.take(node, metrics, found);
            } else if looks.agree(Some(found)).is_some_and(|found| *found != self.tried)
                && let Some(found) = looks.take()
            {
                self.take(node, metrics, found);
            }
        }
    }

    /// Reads everything, within the time limit for reading files.
    async fn look(&mut self) -> Found {
        let sources = Arc::clone(&self.sources);
        self.reads.run(move || Found::read(&sources)).await.unwrap_or_else(Found::Nothing)
    }

    fn take(&mut self, node: &Node, metrics: &ReloadMetrics, mut found: Found) {
        if let Found::Sound(config) = &mut found
            && !config.auth.has_key()
        {
            config.auth.keys.secret.clone_from(&self.own_secret);
        }
        let result = match &found {
            Found::Broken(errors) => {
                for error in errors.iter() {
                    tracing::error!(%error, "the new configuration is refused; the old one stays in effect");
                }
                ReloadResult::Refused
            }
            Found::Nothing(error) => {
                tracing::error!(%error, "cannot read the configuration again; the old one stays in effect");
                ReloadResult::Refused
            }
            Found::Sound(config) => match node.reload(config) {
                Ok(changes) => self.tell(config, &changes),
                Err(error @ (ReloadError::NoKey | ReloadError::Keys(_))) => {
                    tracing::error!(%error, "the new configuration is refused; the old one stays in effect");
                    ReloadResult::Refused
                }
            },
        };
        metrics.reloaded(result, SystemTime::now().into());
        self.tried = found;
    }

    fn tell(&self, config: &Config, Changes { live, restart }: &Changes) -> ReloadResult {
        if !restart.is_empty() {
            let keys = restart.join(", ");
            tracing::warn!(keys, "changed in the configuration; takes effect after a restart");
        }
        if live.is_empty() {
            tracing::info!("the configuration was reloaded; nothing changes in the running node");
            return ReloadResult::Unchanged;
        }
        if let Some(log) = &self.log {
            log.set(&config.log.filter);
        }
        tracing::info!(keys = live.join(", "), "the new configuration is in effect");
        if live.contains(&"limits.connections") {
            descriptors::warn_if_too_few(config);
        }
        ReloadResult::Applied
    }
}

/// Waits for the signal; forever if the signal can no longer arrive.
async fn received(signal: &mut Signal) {
    if signal.recv().await.is_none() {
        pending::<()>().await;
    }
}

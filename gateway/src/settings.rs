//! What may change while the node runs: keys, policies, origins, limits and times.
//!
//! A [`Settings`] is one consistent set, made from a [`Config`] and never changed. [`LiveSettings`] holds the
//! set that counts now. Routes load it where they ask it something, shards look once per turn whether it has
//! changed: nobody sees half of a change, and no message pays for a lock. What a node binds or starts (listeners, shards, the broker) is not here.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;

use crate::{
    auth::{AuthConfig, Authenticator},
    config::{Config, Heartbeat, Limits, Origins},
};

/// One consistent set of what may change.
pub struct Settings {
    /// Verifies tokens, and knows what the room policies grant.
    pub authenticator: Authenticator,
    /// Web pages that may connect.
    pub origins: Origins,
    /// How much anybody may use.
    pub limits: Limits,
    /// How a dead peer is noticed.
    pub heartbeat: Heartbeat,
    /// Time for the head of a request.
    pub header_timeout: Duration,
    /// Time for the body of a request.
    pub body_timeout: Duration,
    /// Time for the broker to acknowledge a new session's subscriptions.
    pub subscribe_timeout: Duration,
    /// The shortest time after which an event stream's client should come back, in milliseconds.
    pub retry_millis: u32,
}

impl Settings {
    /// What `config` says, with `secret` for HS256 tokens.
    pub fn new(config: &Config, secret: &[u8]) -> Self {
        Self {
            authenticator: Authenticator::new(AuthConfig {
                hs256_secret: secret,
                leeway: config.auth.leeway,
                policies: config.rooms.clone(),
            }),
            origins: config.origins.clone(),
            limits: config.limits.clone(),
            heartbeat: config.heartbeat.clone(),
            header_timeout: config.public.header_timeout,
            body_timeout: config.public.body_timeout,
            subscribe_timeout: config.broker.subscribe_timeout,
            retry_millis: u32::try_from(config.sse.retry.as_millis()).unwrap_or(u32::MAX),
        }
    }
}

/// The settings that count now. Shared by all threads of a node.
pub struct LiveSettings(ArcSwap<Settings>);

impl LiveSettings {
    /// Begins with `settings`.
    pub fn new(settings: Settings) -> Self {
        Self(ArcSwap::from_pointee(settings))
    }

    /// The settings that count now. They stay consistent for as long as they are held.
    pub fn load(&self) -> Arc<Settings> {
        self.0.load_full()
    }

    /// From now on `settings` count. Open sessions stay; what they do next is measured by the new ones.
    pub fn replace(&self, settings: Settings) {
        self.0.store(Arc::new(settings));
    }

    /// Takes over the settings that count now, if they are others than `held`.
    pub fn refresh(&self, held: &mut Arc<Settings>) {
        let current = self.0.load();
        if !Arc::ptr_eq(&current, held) {
            *held = Arc::clone(&current);
        }
    }
}

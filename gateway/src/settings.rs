//! The settings that may change at runtime: keys, policies, origins, limits and timeouts.
//!
//! A [`Settings`] is one consistent, immutable set, built from a [`Config`]. [`LiveSettings`] holds the
//! current set. Routes load it when they need it; shards check once per turn whether it has changed. Nobody
//! sees a partial change, and no message pays for a lock. The rate-limit state ([`Limiters`]) outlives
//! changes of the settings. Whatever a node binds or starts (listeners, shards, the broker) is not part of
//! this module.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;

use crate::{
    auth::{AuthConfig, Authenticator, CookieName, Keyring},
    clock::Time,
    config::{Compression, Config, Drain, ForwardedHeader, Heartbeat, Limits, Networks, Origins},
    delivery::DeliveryPolicies,
    descriptors::Sockets,
    history::HistoryPolicies,
    limits::Limiters,
};

/// One consistent set of settings.
pub struct Settings {
    /// Verifies tokens and knows the grants of the room policies.
    pub authenticator: Authenticator,
    /// Web pages that may connect.
    pub origins: Origins,
    /// The cookie that may carry the token of a page that may connect.
    pub cookie: Option<CookieName>,
    /// Limits of what clients may use.
    pub limits: Limits,
    /// How many sockets the public listener may hold: `limits.connections`, within what the process may have.
    pub sockets: Sockets,
    /// Proxies that may report a client's address.
    pub trusted_proxies: Networks,
    /// The header in which they report it.
    pub forwarded_header: ForwardedHeader,
    /// Whether their connections begin with a PROXY protocol header.
    pub proxy_protocol: bool,
    /// Whether messages are compressed.
    pub compression: Compression,
    /// How rooms behave in the outbound queues of their members.
    pub delivery: DeliveryPolicies,
    /// How much of a room's publications is kept.
    pub history: HistoryPolicies,
    /// How dead peers are detected.
    pub heartbeat: Heartbeat,
    /// The age at which clients are asked to reconnect, before jitter.
    pub max_session_age: Option<Duration>,
    /// How the node drains.
    pub drain: Drain,
    /// Time limit for the head of a request to arrive.
    pub header_timeout: Duration,
    /// Time limit for the body of a request to arrive.
    pub body_timeout: Duration,
    /// How long an idle connection waits for the next request.
    pub keep_alive: Duration,
    /// Time limit for the broker to acknowledge a new session's subscriptions.
    pub subscribe_timeout: Duration,
    /// The minimum delay before an event stream's client should reconnect, in milliseconds.
    pub retry_millis: u32,
}

impl Settings {
    /// The settings of `config`. The keys in `keys` are replaced independently.
    pub fn new(config: &Config, keys: Arc<Keyring>) -> Self {
        Self {
            authenticator: Authenticator::new(AuthConfig {
                keys,
                issuer: config.auth.issuer.clone(),
                audience: config.auth.audience.clone(),
                leeway: config.auth.leeway,
                policies: config.rooms.clone(),
            }),
            origins: config.origins.clone(),
            cookie: config.auth.cookie.clone(),
            limits: config.limits.clone(),
            sockets: Sockets::allowed(config),
            trusted_proxies: config.public.trusted_proxies.clone(),
            forwarded_header: config.public.forwarded_header,
            proxy_protocol: config.public.proxy_protocol,
            compression: config.compression.clone(),
            delivery: DeliveryPolicies::new(&config.delivery),
            history: HistoryPolicies::new(&config.history),
            heartbeat: config.heartbeat.clone(),
            max_session_age: config.public.max_session_age,
            drain: config.drain.clone(),
            header_timeout: config.public.header_timeout,
            body_timeout: config.public.body_timeout,
            keep_alive: config.public.keep_alive,
            subscribe_timeout: config.broker.subscribe_timeout,
            retry_millis: u32::try_from(config.sse.retry.as_millis()).unwrap_or(u32::MAX),
        }
    }
}

/// The current settings. Shared by all threads of a node.
pub struct LiveSettings {
    settings: ArcSwap<Settings>,
    limiters: Limiters,
}

impl LiveSettings {
    /// Starts with `settings`.
    pub fn new(settings: Settings, time: Time) -> Self {
        let limiters = Limiters::new(&settings.limits, time);
        Self { settings: ArcSwap::from_pointee(settings), limiters }
    }

    /// The current settings. They stay consistent for as long as the caller holds them.
    pub fn load(&self) -> Arc<Settings> {
        self.settings.load_full()
    }

    /// Makes `settings` current. Open sessions stay; the new settings apply to what they do next.
    pub fn replace(&self, settings: Settings) {
        self.limiters.adopt(&settings.limits);
        self.settings.store(Arc::new(settings));
    }

    /// The rate-limit state of addresses and users, with the current rates.
    pub fn limiters(&self) -> &Limiters {
        &self.limiters
    }

    /// Updates `held` to the current settings if they differ, and returns the old ones.
    pub fn refresh(&self, held: &mut Arc<Settings>) -> Option<Arc<Settings>> {
        let current = self.settings.load();
        (!Arc::ptr_eq(&current, held)).then(|| std::mem::replace(held, Arc::clone(&current)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{auth::Subject, config::Sources};

    fn settings(user_commands: &str) -> Settings {
        let flags = vec![("limits.user_commands".to_owned(), user_commands.to_owned())];
        let config = Config::load(&Sources { flags, ..Sources::default() });
        Settings::new(
            &config.unwrap_or_else(|errors| panic!("{errors}")),
            Arc::new(Keyring::new(Vec::new(), Vec::new())),
        )
    }

    /// A reload that does not concern users' rates keeps their state.
    #[test]
    fn changed_rates_apply_at_once_and_unchanged_ones_keep_their_accounts() {
        let live = LiveSettings::new(settings("1/h burst 2"), Time::default());
        let mut held = live.load();
        let alice = Subject::new("alice").unwrap();
        let left = || (0..10).filter(|_| live.limiters().user_command(&alice).is_ok()).count();
        assert_eq!(left(), 2);
        assert!(live.refresh(&mut held).is_none());
        live.replace(settings("1/h burst 2"));
        assert!(live.refresh(&mut held).is_some());
        assert_eq!(left(), 0);
        live.replace(settings("1/h burst 3"));
        assert_eq!(left(), 3);
    }
}

//! What may change while the node runs: keys, policies, origins, limits and times.
//!
//! A [`Settings`] is one consistent set, made from a [`Config`] and never changed. [`LiveSettings`] holds the
//! set that counts now. Routes load it where they ask it something, shards look once per turn whether it has
//! changed: nobody sees half of a change, and no message pays for a lock. The accounts that limits need
//! ([`Limiters`]) outlive a change of the settings. What a node binds or starts (listeners, shards, the broker) is not here.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;

use crate::{
    auth::{AuthConfig, Authenticator, CookieName, Keyring},
    config::{Compression, Config, Drain, ForwardedHeader, Heartbeat, Limits, Networks, Origins},
    delivery::DeliveryPolicies,
    descriptors::Sockets,
    limits::Limiters,
};

/// One consistent set of what may change.
pub struct Settings {
    /// Verifies tokens, and knows what the room policies grant.
    pub authenticator: Authenticator,
    /// Web pages that may connect.
    pub origins: Origins,
    /// The cookie that may carry the token of a page that may connect.
    pub cookie: Option<CookieName>,
    /// How much anybody may use.
    pub limits: Limits,
    /// How many sockets the public listener may hold: `limits.connections`, as far as the process may have them.
    pub sockets: Sockets,
    /// Whose word on a client's address is taken.
    pub trusted_proxies: Networks,
    /// The header in which they say it.
    pub forwarded_header: ForwardedHeader,
    /// Whether their connections begin with a PROXY protocol header.
    pub proxy_protocol: bool,
    /// Whether messages are compressed.
    pub compression: Compression,
    /// What rooms may do in the outbound queues of their members.
    pub delivery: DeliveryPolicies,
    /// How a dead peer is noticed.
    pub heartbeat: Heartbeat,
    /// The age at which a session is told to come back, before jitter.
    pub max_session_age: Option<Duration>,
    /// How the node leaves.
    pub drain: Drain,
    /// Time for the head of a request.
    pub header_timeout: Duration,
    /// Time for the body of a request.
    pub body_timeout: Duration,
    /// Time for the next request to begin on an idle connection.
    pub keep_alive: Duration,
    /// Time for the broker to acknowledge a new session's subscriptions.
    pub subscribe_timeout: Duration,
    /// The shortest time after which an event stream's client should come back, in milliseconds.
    pub retry_millis: u32,
}

impl Settings {
    /// What `config` says. The keys are replaced on their own, within `keys`.
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

/// The settings that count now. Shared by all threads of a node.
pub struct LiveSettings {
    settings: ArcSwap<Settings>,
    limiters: Limiters,
}

impl LiveSettings {
    /// Begins with `settings`.
    pub fn new(settings: Settings) -> Self {
        let limiters = Limiters::new(&settings.limits);
        Self { settings: ArcSwap::from_pointee(settings), limiters }
    }

    /// The settings that count now. They stay consistent for as long as they are held.
    pub fn load(&self) -> Arc<Settings> {
        self.settings.load_full()
    }

    /// From now on `settings` count. Open sessions stay; what they do next is measured by the new ones.
    pub fn replace(&self, settings: Settings) {
        self.limiters.adopt(&settings.limits);
        self.settings.store(Arc::new(settings));
    }

    /// What addresses and users have used, by the rates that count now.
    pub fn limiters(&self) -> &Limiters {
        &self.limiters
    }

    /// Forgets, again and again, who has used up nothing.
    pub async fn keep_house(self: Arc<Self>) {
        let mut looks = tokio::time::interval(Duration::from_secs(1));
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            self.limiters.sweep();
        }
    }

    /// Takes over the settings that count now, if they are others than `held`, which it then returns.
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

    /// What users have used outlives a reload that does not concern it.
    #[test]
    fn new_rates_count_at_once_and_old_ones_keep_their_accounts() {
        let live = LiveSettings::new(settings("1/h burst 2"));
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

//! File descriptors: how many of them clients' sockets may use, so that enough remain for everything else.
//!
//! A process without free descriptors cannot answer a probe, reconnect to its broker, fetch a key set or read
//! its configuration. So clients never get a reserved part: if the process may not have as many descriptors
//! as `limits.connections` needs, the node serves fewer clients and warns the operator.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::config::Config;

/// How many sockets beyond `limits.connections` are accepted, to refuse them with a status.
const REFUSALS: usize = 256;
/// The least number of those, before the number of served clients is reduced.
const LEAST_REFUSALS: usize = 16;
/// Descriptors that every node needs in addition: connections of the ops listener (at most 128), standard
/// streams, listeners, signals, files being read, a key set being fetched, a socket being accepted.
const NODE: usize = 128 + 64;
/// Descriptors of a shard's runtime, with some to spare.
const PER_SHARD: usize = 6;
/// Descriptors of each connection to the broker: its own, and that of its replacement.
const PER_BROKER_CONNECTION: usize = 2;

/// How many sockets the public listener may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sockets {
    /// Sockets to serve.
    pub connections: usize,
    /// Those plus the sockets that are only refused with a status.
    pub all: usize,
}

impl Sockets {
    /// Whether more than nine tenths of the slots are taken when `open` sockets are open.
    pub fn is_crowded(self, open: usize) -> bool {
        open > self.connections - self.connections.div_ceil(10)
    }

    /// What `config` asks for, within what the process may have.
    pub fn allowed(config: &Config) -> Self {
        Self::within(open_files(), config)
    }

    fn within(open_files: Option<usize>, config: &Config) -> Self {
        let wanted = config.limits.connections;
        let wish = Self { connections: wanted, all: wanted.saturating_add(REFUSALS) };
        let Some(open_files) = open_files else { return wish };
        // If the reserve would take nearly everything, clients still get a quarter.
        let free = open_files.saturating_sub(reserve(config)).max(open_files / 4).max(2);
        if wish.all <= free {
            return wish;
        }
        let refusals = LEAST_REFUSALS.min(free / 8);
        Self { connections: wanted.min(free - refusals), all: free }
    }
}

/// Raises the limit to the maximum that the process may have, and warns if that is too low.
pub fn raise_limit(config: &Config) {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    warn_if_too_few(config);
}

/// Warns if the process may not have enough descriptors for `limits.connections`.
pub fn warn_if_too_few(config: &Config) {
    let (wanted, allowed) = (config.limits.connections, Sockets::allowed(config).connections);
    if allowed < wanted {
        tracing::warn!(
            open_files = open_files(),
            limits.connections = wanted,
            connections = allowed,
            "the limit of open files (ulimit -n) is too low for limits.connections; the node serves fewer clients"
        );
    }
}

fn reserve(config: &Config) -> usize {
    let broker = config.broker.subscribers + config.broker.publishers;
    NODE + PER_SHARD * config.shards + PER_BROKER_CONNECTION * broker
}

/// How many descriptors the process may have; `None` if unlimited.
fn open_files() -> Option<usize> {
    getrlimit(Resource::Nofile).current.and_then(|most| usize::try_from(most).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sources;

    fn config(connections: usize) -> Config {
        let flags = [("limits.connections", connections.to_string()), ("shards", "2".to_owned())];
        let flags = flags.map(|(key, value)| (key.to_owned(), value)).into();
        Config::load(&Sources { flags, ..Sources::default() }).unwrap_or_else(|errors| panic!("{errors}"))
    }

    #[track_caller]
    fn check(open_files: Option<usize>, wanted: usize, connections: usize, all: usize) {
        assert_eq!(Sockets::within(open_files, &config(wanted)), Sockets { connections, all });
    }

    #[test]
    fn a_tenth_of_the_connections_is_reserved_from_idle_ones() {
        for (connections, most) in [(1, 0), (4, 3), (10, 9), (11, 9), (100_000, 90_000)] {
            let sockets = Sockets { connections, all: connections + REFUSALS };
            assert_eq!(
                (sockets.is_crowded(most), sockets.is_crowded(most + 1)),
                (false, true),
                "{connections}"
            );
        }
    }

    #[test]
    fn clients_get_the_configured_connections_if_descriptors_suffice() {
        check(None, 100_000, 100_000, 100_256);
        // 192, 2 times 6 and 4 times 2 are reserved.
        check(Some(100_468), 100_000, 100_000, 100_256);
        check(Some(100_256), 100_000, 100_000, 100_044);
        check(Some(100_227), 100_000, 99_999, 100_015);
    }

    #[test]
    fn clients_do_not_get_reserved_descriptors() {
        check(Some(1024), 100_000, 796, 812);
        check(Some(1024), 500, 500, 756);
        check(Some(1024), 790, 790, 812);
        check(Some(200), 100_000, 44, 50);
        check(Some(64), 100_000, 14, 16);
        check(Some(0), 100_000, 2, 2);
    }
}

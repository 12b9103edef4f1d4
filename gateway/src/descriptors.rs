//! File descriptors: how many of them clients' sockets may take, so that everything else finds one.
//!
//! A process that has none left cannot answer a probe, reach its broker again, fetch a key set or read its own
//! configuration. So a part is never given to clients: if the process may not have as many as
//! `limits.connections` needs, fewer clients are served, and the operator is told.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::config::Config;

/// How far beyond `limits.connections` sockets are still taken, to be told so with a status.
const COURTESY: usize = 256;
/// Fewer, before fewer are served.
const LEAST_COURTESY: usize = 16;
/// Descriptors that every node needs besides: connections of the ops listener (128 at most), standard streams, listeners,
/// signals, files that are being read, a key set that is being fetched, a socket that is being accepted.
const NODE: usize = 128 + 64;
/// Those of a shard's runtime, and some to spare.
const PER_SHARD: usize = 6;
/// Those of each connection to the broker: it, and the one that replaces it.
const PER_BROKER_CONNECTION: usize = 2;

/// How many sockets the public listener may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sockets {
    /// Those that are served.
    pub connections: usize,
    /// Those and the ones that are answered that there is no place for them.
    pub all: usize,
}

impl Sockets {
    /// Whether more than nine tenths of the places are taken when so many sockets are open.
    pub fn is_crowded(self, open: usize) -> bool {
        open > self.connections - self.connections.div_ceil(10)
    }

    /// What `config` asks for, as far as this process may have it.
    pub fn allowed(config: &Config) -> Self {
        Self::within(open_files(), config)
    }

    fn within(open_files: Option<usize>, config: &Config) -> Self {
        let wanted = config.limits.connections;
        let wish = Self { connections: wanted, all: wanted.saturating_add(COURTESY) };
        let Some(open_files) = open_files else { return wish };
        // Where the reserve would be nearly everything, clients get a quarter all the same.
        let free = open_files.saturating_sub(reserve(config)).max(open_files / 4).max(2);
        if wish.all <= free {
            return wish;
        }
        let courtesy = LEAST_COURTESY.min(free / 8);
        Self { connections: wanted.min(free - courtesy), all: free }
    }
}

/// Takes as many descriptors as the process may have, and says so if they are too few.
pub fn raise_limit(config: &Config) {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
    warn_if_too_few(config);
}

/// Says so if the process may have too few descriptors for `limits.connections`.
pub fn warn_if_too_few(config: &Config) {
    let (wanted, allowed) = (config.limits.connections, Sockets::allowed(config).connections);
    if allowed < wanted {
        tracing::warn!(
            open_files = open_files(),
            limits.connections = wanted,
            connections = allowed,
            "the limit of open files (ulimit -n) is too low for limits.connections; fewer clients are served"
        );
    }
}

fn reserve(config: &Config) -> usize {
    let broker = config.broker.subscribers + config.broker.publishers;
    NODE + PER_SHARD * config.shards + PER_BROKER_CONNECTION * broker
}

/// How many descriptors the process may have, if that is limited.
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
    fn a_tenth_of_the_places_is_kept_from_idle_connections() {
        for (connections, most) in [(1, 0), (4, 3), (10, 9), (11, 9), (100_000, 90_000)] {
            let sockets = Sockets { connections, all: connections + COURTESY };
            assert_eq!(
                (sockets.is_crowded(most), sockets.is_crowded(most + 1)),
                (false, true),
                "{connections}"
            );
        }
    }

    #[test]
    fn clients_get_what_is_wanted_if_there_is_enough() {
        check(None, 100_000, 100_000, 100_256);
        // 192, 2 times 6 and 4 times 2 are kept back.
        check(Some(100_468), 100_000, 100_000, 100_256);
        check(Some(100_256), 100_000, 100_000, 100_044);
        check(Some(100_227), 100_000, 99_999, 100_015);
    }

    #[test]
    fn the_reserve_is_not_for_clients() {
        check(Some(1024), 100_000, 796, 812);
        check(Some(1024), 500, 500, 756);
        check(Some(1024), 790, 790, 812);
        check(Some(200), 100_000, 44, 50);
        check(Some(64), 100_000, 14, 16);
        check(Some(0), 100_000, 2, 2);
    }
}

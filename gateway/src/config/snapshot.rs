//! The value of each key, to compare two configurations key by key.

use std::{collections::BTreeMap, fmt};

use super::table::{Reload, TABLE};

use crate::vocabulary::Secret;

/// The value of each key of a configuration.
///
/// Contains secrets, but does not show them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<&'static str, Option<Secret>>);

/// The keys that differ between the running configuration and a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Those that take effect immediately.
    pub live: Vec<&'static str>,
    /// Those that take effect after a restart.
    pub restart: Vec<&'static str>,
}

impl Snapshot {
    pub(super) fn set(&mut self, key: &'static str, value: Option<String>) {
        self.0.insert(key, value.map(|value| Secret::new(value.into_bytes())));
    }

    /// Adopts the values that may change at runtime, and returns what differs. Keys that need a restart are
    /// returned every time until then.
    pub fn take_over(&mut self, new: &Self) -> Changes {
        let mut changes = Changes::default();
        for row in TABLE {
            let (name, value) = (row.name(), new.0.get(row.name()));
            if self.0.get(name) == value {
                continue;
            }
            match row.reload() {
                Reload::Restart => changes.restart.push(name),
                Reload::Live => {
                    changes.live.push(name);
                    self.0.insert(name, value.cloned().flatten());
                }
            }
        }
        changes
    }
}

/// Shows neither keys nor values; the configuration that contains the snapshot shows them.
impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Snapshot").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::{
        Config, Sources,
        table::{ROOMS_GRANT, ROOMS_HISTORY_SIZE, ROOMS_HISTORY_TTL},
    };

    fn flags(flags: &[(&str, &str)]) -> Sources {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        Sources { flags: flags.iter().map(own).collect(), ..Sources::default() }
    }

    fn load(sources: &Sources) -> Config {
        Config::load(sources).unwrap_or_else(|errors| panic!("{errors}"))
    }

    /// The keys that change at once and those that need a restart, when the flags change.
    fn changes(before: &[(&str, &str)], after: &[(&str, &str)]) -> (Vec<&'static str>, Vec<&'static str>) {
        let mut running = load(&flags(before)).snapshot;
        let Changes { live, restart } = running.take_over(&load(&flags(after)).snapshot);
        (live, restart)
    }

    #[test]
    fn every_key_is_compared() {
        let keys: BTreeSet<_> = TABLE.iter().map(|row| row.name()).collect();
        assert_eq!(load(&Sources::default()).snapshot.0.keys().copied().collect::<BTreeSet<_>>(), keys);
    }

    #[test]
    fn configurations_are_compared_by_value() {
        let before = [("sse.retry", "60s"), ("broker.url", "redis://:old@host:1"), ("shards", "2")];
        assert_eq!(changes(&before, &before), (vec![], vec![]));
        let same = [("sse.retry", "1m"), ("broker.url", "redis://:old@host:1"), ("shards", "02")];
        assert_eq!(changes(&before, &same), (vec![], vec![]));
        // Giving the default explicitly is no change.
        assert_eq!(changes(&[], &[("sse.retry", "3s"), ("broker.url", "memory:")]), (vec![], vec![]));
        let after = [("sse.retry", "1m"), ("broker.url", "redis://:new@host:1"), ("origins", "*")];
        assert_eq!(changes(&before, &after), (vec!["origins"], vec!["shards", "broker.url"]));
        let policies = [(r#"rooms."a".grant"#, "subscribe")];
        assert_eq!(changes(&[], &policies), (vec![ROOMS_GRANT.name], vec![]));
        assert_eq!(
            changes(&policies, &[(r#"rooms."a".grant"#, "publish")]),
            (vec![ROOMS_GRANT.name], vec![])
        );
        let history = |size, ttl| [("rooms.a.history.size", size), ("rooms.a.history.ttl", ttl)];
        assert_eq!(changes(&history("5", "1h"), &history("05", "60m")), (vec![], vec![]));
        assert_eq!(
            changes(&history("5", "1h"), &history("6", "none")),
            (vec![ROOMS_HISTORY_SIZE.name, ROOMS_HISTORY_TTL.name], vec![])
        );
    }

    #[test]
    fn secrets_are_compared_regardless_of_their_source() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let by_file = [("auth.hs256_secret_file", path.to_str().unwrap())];
        let secret = "0123456789abcdef0123456789abcdef";
        std::fs::write(&path, format!("{secret}\n")).unwrap();
        let mut running = load(&flags(&[("auth.hs256_secret", secret)])).snapshot;
        assert_eq!(running.take_over(&load(&flags(&by_file)).snapshot), Changes::default());
        std::fs::write(&path, secret.to_uppercase()).unwrap();
        let changes = running.take_over(&load(&flags(&by_file)).snapshot);
        assert_eq!(changes, Changes { live: vec!["auth.hs256_secret"], restart: vec![] });
    }

    #[test]
    fn pending_restarts_are_reported_until_they_are_resolved() {
        let mut running = load(&Sources::default()).snapshot;
        let new = load(&flags(&[("shards", "7"), ("drain.pause", "1s")])).snapshot;
        let waiting = Changes { live: vec![], restart: vec!["shards"] };
        assert_eq!(running.take_over(&new), Changes { live: vec!["drain.pause"], ..waiting.clone() });
        assert_eq!(running.take_over(&new), waiting);
        let back = load(&Sources::default()).snapshot;
        assert_eq!(running.take_over(&back), Changes { live: vec!["drain.pause"], restart: vec![] });
    }

    #[test]
    fn a_reload_reads_the_file_and_keeps_the_flags() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tidegate.toml");
        let mut sources = flags(&[("drain.pause", "1s")]);
        std::fs::write(&path, "sse.retry = '1s'\ndrain.pause = '9s'").unwrap();
        sources.read_file(path.clone()).unwrap();
        std::fs::write(&path, "sse.retry = '2s'\ndrain.pause = '8s'").unwrap();
        let config = load(&sources.read_again().unwrap());
        assert_eq!((config.sse.retry.as_secs(), config.drain.pause.as_secs()), (2, 1));
        std::fs::remove_file(&path).unwrap();
        let gone = sources.read_again().unwrap_err().to_string();
        assert!(gone.contains("tidegate.toml: expected a file of text that can be read"), "{gone}");
        std::fs::write(&path, vec![b'#'; 1024 * 1024 + 1]).unwrap();
        let huge = sources.read_again().unwrap_err().to_string();
        assert!(huge.contains("it is larger than 1024 KiB"), "{huge}");
    }
}

//! The meaning of server errors: one table for publishers, subscribers and the pool.
//!
//! An error is the answer to one command. Its first word is a code that says what became of that command
//! (<https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors>). Whether it also says something
//! about the connection is a separate question. An error is a reason to reconnect only if another connection may
//! succeed.
//!
//! Every error here means that the command was not executed: the commands that a node sends are executed either
//! completely or not at all. A command without an answer may have been executed: [`BrokerError::Unknown`].

use std::sync::Arc;

use crate::BrokerError;

/// What becomes of the request behind the command, which was not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// The same command may succeed later.
    Later,
    /// The user lacks permission. The same command fails until somebody changes the permissions.
    Forbidden,
    /// The server rejects the command. The same command fails again.
    Never,
}

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// Keep it: another one would get the same answer.
    Keep,
    /// Reconnect: a new connection may reach a server that serves.
    Renew,
}

/// A parsed server error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) fate: Fate,
    pub(super) link: Link,
    /// What the server said: `CODE text`. For operators; it may name a topic.
    pub(super) text: Arc<str>,
}

/// The table. A code that is not in it is an error of the command itself.
const TABLE: [(&str, Fate, Link); 19] = [
    // The server is temporarily busy, and will serve this connection again.
    ("LOADING", Fate::Later, Link::Keep),
    ("BUSY", Fate::Later, Link::Keep),
    ("OOM", Fate::Later, Link::Keep),
    ("MISCONF", Fate::Later, Link::Keep),
    ("NOREPLICAS", Fate::Later, Link::Keep),
    ("TRYAGAIN", Fate::Later, Link::Keep),
    ("EXECABORT", Fate::Later, Link::Keep),
    // The functions can be loaded.
    (NO_FUNCTION, Fate::Later, Link::Keep),
    // It is not a master, not the right one, or its cluster is partitioned.
    ("READONLY", Fate::Later, Link::Renew),
    ("MASTERDOWN", Fate::Later, Link::Renew),
    ("CLUSTERDOWN", Fate::Later, Link::Renew),
    ("MOVED", Fate::Later, Link::Renew),
    ("ASK", Fate::Later, Link::Renew),
    ("UNBLOCKED", Fate::Later, Link::Renew),
    // Not authenticated: the password was changed, or the user was deleted.
    ("NOAUTH", Fate::Later, Link::Renew),
    ("WRONGPASS", Fate::Later, Link::Renew),
    // It accepts no connections, or none from this address.
    ("DENIED", Fate::Later, Link::Renew),
    (MAX_CLIENTS, Fate::Later, Link::Renew),
    // Authenticated, but without permission.
    ("NOPERM", Fate::Forbidden, Link::Keep),
];

/// An error without a code of its own: the server lacks the functions of this project.
const NO_FUNCTION: &str = "ERR Function not found";
/// The one error without a code of its own that concerns the connection.
const MAX_CLIENTS: &str = "ERR max number of clients";

impl Answer {
    /// Parses the text of a server's error, without the leading `-`.
    pub(super) fn to(text: &str) -> Self {
        let code = text.split(' ').next().unwrap_or_default();
        let is = |known: &str| {
            known == code || ([MAX_CLIENTS, NO_FUNCTION].contains(&known) && text.starts_with(known))
        };
        let (fate, link) = TABLE
            .iter()
            .find(|(known, ..)| is(known))
            .map_or((Fate::Never, Link::Keep), |(_, fate, link)| (*fate, *link));
        Self { fate, link, text: text.into() }
    }

    /// Converts an error from the client library.
    pub(super) fn to_server_error(error: &redis::ServerError) -> Self {
        match error.details() {
            Some(details) => Self::to(&format!("{} {details}", error.code())),
            None => Self::to(error.code()),
        }
    }

    /// Whether the command called a function that the server does not have, or has in an older version only.
    pub(super) fn lacks_functions(&self) -> bool {
        &*self.text == NO_FUNCTION || self.text.starts_with("BADOPTION unknown option")
    }

    /// The error for the caller of the broker.
    pub(super) fn error(&self) -> BrokerError {
        let text = Arc::clone(&self.text);
        match self.fate {
            Fate::Later => BrokerError::NotNow(text),
            Fate::Forbidden => BrokerError::Forbidden(text),
            Fate::Never => BrokerError::Refused(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What real servers say, by the release that says it.
    #[test]
    fn errors_of_real_servers_are_classified() {
        use {Fate::*, Link::*};
        for (text, fate, link) in [
            ("LOADING Redis is loading the dataset in memory", Later, Keep),
            (
                "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
                Later,
                Keep,
            ),
            ("OOM command not allowed when used memory > 'maxmemory'.", Later, Keep),
            (
                "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
                Later,
                Keep,
            ),
            ("NOREPLICAS Not enough good replicas to write.", Later, Keep),
            ("EXECABORT Transaction discarded because of previous errors.", Later, Keep),
            ("TRYAGAIN Multiple keys request during rehashing of slot", Later, Keep),
            ("READONLY You can't write against a read only replica.", Later, Renew),
            (
                "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
                Later,
                Renew,
            ),
            ("CLUSTERDOWN The cluster is down", Later, Renew),
            ("CLUSTERDOWN Hash slot not served", Later, Renew),
            ("MOVED 3999 127.0.0.1:6381", Later, Renew),
            ("ASK 3999 127.0.0.1:6381", Later, Renew),
            ("UNBLOCKED force unblock from blocking operation, instance state changed", Later, Renew),
            ("NOAUTH Authentication required.", Later, Renew),
            ("WRONGPASS invalid username-password pair or user is disabled.", Later, Renew),
            ("DENIED Redis is running in protected mode because protected mode is enabled", Later, Renew),
            ("ERR max number of clients reached", Later, Renew),
            ("ERR max number of clients + cluster connections reached", Later, Renew),
            (
                "NOPERM this user has no permissions to access one of the channels used as arguments",
                Forbidden,
                Keep,
            ),
            ("NOPERM this user has no permissions to run the 'publish' command", Forbidden, Keep),
            ("NOPERM User tidegate has no permissions to access the 'room:x' channel", Forbidden, Keep),
            ("ERR Function not found", Later, Keep),
            ("ERR unknown command 'SUBSCRIBE'", Never, Keep),
            ("ERR max", Never, Keep),
            ("CROSSSLOT Keys in request don't hash to the same slot", Never, Keep),
            ("WRONGTYPE Operation against a key holding the wrong kind of value", Never, Keep),
            ("BUSYKEY Target key name already exists.", Never, Keep),
            ("", Never, Keep),
        ] {
            let answer = Answer::to(text);
            assert_eq!((answer.fate, answer.link), (fate, link), "{text}");
            assert_eq!(&*answer.text, text);
        }
    }

    #[test]
    fn each_fate_has_one_error_kind_and_only_later_is_retryable() {
        let kinds = ["BUSY x", "NOPERM x", "ERR x"].map(|text| Answer::to(text).error());
        assert!(matches!(kinds[0], BrokerError::NotNow(_)) && kinds[0].is_retryable());
        assert!(matches!(kinds[1], BrokerError::Forbidden(_)) && !kinds[1].is_retryable());
        assert!(matches!(kinds[2], BrokerError::Refused(_)) && !kinds[2].is_retryable());
    }

    #[test]
    fn each_error_code_is_listed_once() {
        let codes: BTreeSet<_> = TABLE.iter().map(|(code, ..)| *code).collect();
        assert_eq!(codes.len(), TABLE.len());
    }
}

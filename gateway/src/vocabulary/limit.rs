//! The limits that clients can exceed.

use std::time::Duration;

use super::metrics::Label;

/// A limit exceeded by the client of a session or a publisher by `POST`. The label of
/// `tidegate_limited_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `limits.commands`
    Commands,
    /// `limits.bytes`
    Bytes,
    /// `limits.user_commands`
    UserCommands,
    /// `limits.user_bytes`
    UserBytes,
}

impl Label for Limit {
    const ALL: &'static [Self] = &[Self::Commands, Self::Bytes, Self::UserCommands, Self::UserBytes];

    fn as_str(self) -> &'static str {
        match self {
            Self::Commands => "commands",
            Self::Bytes => "bytes",
            Self::UserCommands => "user_commands",
            Self::UserBytes => "user_bytes",
        }
    }
}

impl Limit {
    /// The reason text of the close frame, which names the limit.
    pub fn close_text(self) -> &'static str {
        match self {
            Self::Commands => "too much: limits.commands",
            Self::Bytes => "too much: limits.bytes",
            Self::UserCommands => "too much: limits.user_commands",
            Self::UserBytes => "too much: limits.user_bytes",
        }
    }
}

/// A limit that an address has exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressLimit {
    /// `limits.attempts_per_address`, and how long until the next attempt is allowed.
    Attempts(Duration),
    /// `limits.connections_per_address`
    Connections,
}

//! A protocol's name.

use std::fmt;

/// The name of a protocol: the `protocol` label in metrics, and the field of that name in the log.
///
/// Names come from the table of protocols and never from a client, so there are as many values as protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProtocolName(&'static str);

impl ProtocolName {
    /// Creates a name.
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// The label's value.
    pub const fn as_str(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for ProtocolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

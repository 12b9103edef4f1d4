//! Bytes by encoding.

use std::{borrow::Cow, sync::OnceLock};

use bytes::Bytes;

use super::Encoding;

/// Bytes by encoding, each created by the first thread that needs it.
///
/// An append-only list: few rooms have members with more than one or two encodings, and the first needs no
/// allocation here. Threads share it without a lock. A thread waits for bytes that another one is creating;
/// different encodings do not wait for each other.
#[derive(Debug, Default)]
pub struct Cache {
    first: OnceLock<Entry>,
}

#[derive(Debug)]
struct Entry {
    encoding: Encoding,
    bytes: OnceLock<Bytes>,
    next: OnceLock<Box<Entry>>,
}

impl Cache {
    /// How many encodings are cached. Beyond that, the bytes are encoded again for each member.
    pub const MAX: usize = 16;

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.first.get().is_none()
    }

    /// The bytes for an encoding, if they have been created.
    pub fn get(&self, encoding: Encoding) -> Option<&Bytes> {
        let entries = std::iter::successors(self.first.get(), |entry| entry.next.get().map(Box::as_ref));
        entries.into_iter().find(|entry| entry.encoding == encoding)?.bytes.get()
    }

    /// The bytes for an encoding, created by `make` if necessary.
    pub fn get_or_make(&self, encoding: Encoding, make: impl FnOnce() -> Bytes) -> Cow<'_, Bytes> {
        let mut entry = self.first.get_or_init(|| Entry::new(encoding));
        let mut kept = 1;
        while entry.encoding != encoding {
            if kept == Self::MAX {
                return Cow::Owned(make());
            }
            entry = entry.next.get_or_init(|| Box::new(Entry::new(encoding)));
            kept += 1;
        }
        Cow::Borrowed(entry.bytes.get_or_init(make))
    }
}

impl Entry {
    fn new(encoding: Encoding) -> Self {
        Self { encoding, bytes: OnceLock::new(), next: OnceLock::new() }
    }
}

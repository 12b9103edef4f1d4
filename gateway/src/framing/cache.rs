//! Bytes by encoding.

use std::{borrow::Cow, sync::OnceLock};

use bytes::Bytes;

use super::Encoding;

/// Bytes by encoding, each created by the first thread that needs it.
///
/// An append-only list: few rooms have members with more than one or two encodings, and the first needs no
/// allocation here. Threads share it without a lock; a thread that needs the next slot waits while another
/// fills it.
#[derive(Debug, Default)]
pub struct Cache {
    first: OnceLock<Entry>,
}

#[derive(Debug)]
struct Entry {
    encoding: Encoding,
    bytes: Bytes,
    next: OnceLock<Box<Entry>>,
}

impl Cache {
    /// How many encodings are cached. Beyond that, the bytes are encoded again for each member.
    pub const MAX: usize = 16;

    /// The bytes for an encoding, if they have been created.
    pub fn get(&self, encoding: Encoding) -> Option<&Bytes> {
        let entries = std::iter::successors(self.first.get(), |entry| entry.next.get().map(Box::as_ref));
        entries.into_iter().find(|entry| entry.encoding == encoding).map(|entry| &entry.bytes)
    }

    /// The bytes for an encoding, created by `make` if necessary. `make` must not use this cache.
    pub fn get_or_make(&self, encoding: Encoding, make: impl FnOnce() -> Bytes) -> Cow<'_, Bytes> {
        let mut make = Some(make);
        let mut entry = self.first.get_or_init(|| Entry::new(encoding, &mut make));
        for _ in 1..Self::MAX {
            if entry.encoding == encoding {
                return Cow::Borrowed(&entry.bytes);
            }
            entry = entry.next.get_or_init(|| Box::new(Entry::new(encoding, &mut make)));
        }
        if entry.encoding == encoding {
            return Cow::Borrowed(&entry.bytes);
        }
        Cow::Owned(make.take().expect("only an entry of this encoding takes it")())
    }
}

impl Entry {
    fn new(encoding: Encoding, make: &mut Option<impl FnOnce() -> Bytes>) -> Self {
        let bytes = make.take().expect("an entry of this encoding ends the search")();
        Self { encoding, bytes, next: OnceLock::new() }
    }
}

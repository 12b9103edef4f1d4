//! Reads rooms' histories for sessions that ask for a part of them.
//!
//! A reading begins after it was asked for, so it contains everything that was accepted before. At most
//! [`AT_ONCE`] are under way on a node; those that wait share one reading if they ask for the same.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use broker_bridge::{
    Broker, BrokerError, Cursor, Retention, RoomName,
    history::{Entry, Page, ReadFrom, Start},
};
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared, WeakShared},
};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::protocol::HistoryQuery;

/// How many readings are under way at a time.
const AT_ONCE: usize = 16;

/// What was read.
type Outcome = Result<Arc<Page>, BrokerError>;
type Key = (RoomName, HistoryQuery);

/// The readings of a node.
pub struct Readings {
    this: Weak<Self>,
    broker: Arc<dyn Broker>,
    permits: Semaphore,
    /// Those that have not begun.
    waiting: Mutex<HashMap<Key, WeakShared<BoxFuture<'static, Outcome>>>>,
}

impl Readings {
    /// No readings yet.
    pub fn new(broker: Arc<dyn Broker>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            broker,
            permits: Semaphore::new(AT_ONCE),
            waiting: Mutex::default(),
        })
    }

    /// Reads a part of a room's history, which is kept as `retention` says. Contains everything that was accepted before
    /// the call. Publications come in the order that was asked for, all of one epoch, and [`Page::top`] is known. If the
    /// position at which it begins is not known, the page [starts](Page::start) as [`Lost`](Start::Lost).
    pub fn read(
        &self,
        room: &RoomName,
        retention: Retention,
        query: HistoryQuery,
    ) -> Shared<BoxFuture<'static, Outcome>> {
        let key = (room.clone(), query);
        let mut waiting = self.waiting.lock();
        if let Some(reading) = waiting.get(&key).and_then(WeakShared::upgrade) {
            return reading;
        }
        let begins = Begins { readings: Weak::clone(&self.this), key: key.clone() };
        let reading = async move {
            let Some(readings) = begins.readings.upgrade() else { return Err(BrokerError::Closed) };
            let _permit = readings.permits.acquire().await.map_err(|_| BrokerError::Closed)?;
            let (room, query) = begins.key.clone();
            // Whoever asks from now on may know of publications that this reading misses.
            drop(begins);
            readings.read_now(&room, retention, query).await.map(Arc::new)
        };
        let reading = reading.boxed().shared();
        if let Some(weak) = reading.downgrade() {
            waiting.insert(key, weak);
        }
        reading
    }

    async fn read_now(
        &self,
        room: &RoomName,
        retention: Retention,
        query: HistoryQuery,
    ) -> Result<Page, BrokerError> {
        const BEGINNING: Cursor = Cursor { epoch: 0, offset: 0 };
        let HistoryQuery { since, limit, is_reversed } = query;
        let from = match since {
            Some(since) if is_reversed => ReadFrom::Before(since),
            Some(since) => ReadFrom::After(since),
            None if is_reversed || limit == 0 => ReadFrom::Last,
            None => ReadFrom::After(BEGINNING),
        };
        let mut page = self.broker.read(room, from, limit).await?;
        if page.top.is_none() {
            let opened = self.broker.open(room, retention).await?;
            if opened.offset > 0 {
                // Somebody has published since, and nobody may be told a position beyond what was read.
                page = self.broker.read(room, from, limit).await?;
            }
            page.top = page.top.or(Some(opened));
        }
        page.entries.truncate(limit);
        if since.is_none() {
            page.start = Start::Continuous;
        }
        if is_reversed {
            page.entries.reverse();
        }
        // Clients are told one epoch for all offsets of a page, and continue after the last with both.
        let epoch = |entry: &Entry| entry.place.cursor.epoch;
        let first = page.entries.first().map(epoch);
        let same = page.entries.iter().take_while(|entry| Some(epoch(entry)) == first).count();
        page.entries.truncate(same);
        Ok(page)
    }
}

/// A reading that has not begun. When this is dropped, it has, or nobody waits for it any more.
struct Begins {
    readings: Weak<Readings>,
    key: Key,
}

impl Drop for Begins {
    fn drop(&mut self) {
        if let Some(readings) = self.readings.upgrade() {
            readings.waiting.lock().remove(&self.key);
        }
    }
}

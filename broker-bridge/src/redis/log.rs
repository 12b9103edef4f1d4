//! Opens and reads the logs of rooms.
//!
//! A log is a stream; see `functions.lua` for its entries. Owns the meaning of what is read: pages, and what they prove.
//!
//! # Reading
//!
//! A page has at most [`MAX_PAGE_BYTES`], but Redis limits a read by the number of entries only. So a page is read in
//! batches, which begin small and grow as the entries turn out to be small. One batch suffices for most who resume.
//! Entries may be removed between two batches. That is noticed, because each entry says what it follows, and ends the
//! page: the next one tells that some are missing.
//!
//! A read after a position begins with the publication at the position itself. If it is the newest, nothing else has to
//! be asked to know that nothing is missing.
//!
//! An entry that is no publication, or one that is larger than this node accepts, is like one that was removed.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use redis::{Value, cmd};

use super::{
    answer::Answer,
    envelope,
    functions::{self, LoadError, Loaded},
    head,
    keys::Topics,
    pool::{self, Pool},
    publisher::LoadFunctions,
    requests::Requests,
};
use crate::{
    BrokerError, Cursor, Place, Retention, RoomName,
    broker::{MAX_PAGE, MAX_PAGE_BYTES},
    history::{Entry, Page, ReadFrom, Start},
    metrics::BrokerMetrics,
};

/// The number of entries in the first batch of a read. One more than most need: the position itself.
const FIRST_BATCH: usize = 17;
/// A batch has at most so many times the entries of the one before.
const GROWTH: usize = 4;
/// The maximum number of entries in one batch.
const MAX_BATCH: usize = 256;
/// How often a different library must be found in place of this project's before that is believed. It looks the same if
/// somebody loads the functions and somebody else deletes them, between two questions.
const LOADS: usize = 5;
/// The longest time that a log can be kept after its last publication.
const MAX_TTL_MS: u128 = 3_155_760_000_000;

/// The arguments for the functions that say how much to keep.
pub(super) fn policy(retention: Retention) -> [String; 4] {
    let ttl = retention.ttl.map_or("none".to_owned(), |ttl| ttl.as_millis().clamp(1, MAX_TTL_MS).to_string());
    ["size".to_owned(), retention.size.to_string(), "ttl".to_owned(), ttl]
}

/// The logs on one server. Cloning shares the pool.
#[derive(Clone)]
pub(super) struct Logs {
    requests: Requests,
    functions: Functions,
    /// The loading of the functions that all wait for whose calls did not find them.
    loading: Arc<Mutex<Option<LoadingAll>>>,
    topics: Topics,
    max_publication: usize,
    metrics: Arc<BrokerMetrics>,
}

/// The loading of the library of functions, for all who wait for it.
type LoadingAll = Shared<BoxFuture<'static, Result<(), BrokerError>>>;

impl Logs {
    /// The logs that `pool` reaches, and `requests` over it. A larger payload than `max_publication` bytes is not read.
    pub(super) fn new(
        pool: Pool,
        requests: Requests,
        topics: Topics,
        max_publication: usize,
        metrics: Arc<BrokerMetrics>,
    ) -> Self {
        let functions = Functions { pool, metrics: Arc::clone(&metrics), failure: Arc::default() };
        Self { requests, functions, loading: Arc::default(), topics, max_publication, metrics }
    }

    /// Closes the pool.
    pub(super) fn close(&self) {
        self.functions.pool.close();
    }

    /// See [`Broker::open`](crate::Broker::open).
    pub(super) async fn open(self, room: RoomName, retention: Retention) -> Result<Cursor, BrokerError> {
        let answer = self.call("tidegate_open", &room, &policy(retention)).await;
        self.metrics.history.opened(&answer);
        answer
    }

    /// See [`Broker::clear`](crate::Broker::clear).
    pub(super) async fn clear(self, room: RoomName) -> Result<Cursor, BrokerError> {
        self.call("tidegate_clear", &room, &[]).await
    }

    /// See [`Broker::read`](crate::Broker::read).
    pub(super) async fn read(
        self,
        room: RoomName,
        from: ReadFrom,
        limit: usize,
    ) -> Result<Page, BrokerError> {
        let page = self.read_page(&room, from, limit.clamp(1, MAX_PAGE)).await;
        self.metrics.history.read(&page);
        page
    }

    /// What loads the library of functions, for publishers.
    pub(super) fn loader(self) -> LoadFunctions {
        Arc::new(move || {
            let functions = self.functions.clone();
            Box::pin(async move { functions.load().await })
        })
    }

    /// Loads the library of functions, once for all who wait for it.
    async fn load(&self) -> Result<(), BrokerError> {
        let loading = {
            let mut loading = self.loading.lock();
            match &*loading {
                Some(loading) if loading.peek().is_none() => loading.clone(),
                _ => {
                    let functions = self.functions.clone();
                    // A task: it must not keep its connection for as long as nobody waits.
                    let task = self.requests.spawn(async move { functions.load().await });
                    let new = task.map(|done| done.unwrap_or(Err(BrokerError::Closed))).boxed().shared();
                    loading.insert(new).clone()
                }
            }
        };
        loading.await
    }

    /// Calls a function that answers a position. It has no effect the second time.
    async fn call(&self, function: &str, room: &RoomName, options: &[String]) -> Result<Cursor, BrokerError> {
        let mut call = cmd("FCALL");
        call.arg(function).arg(1).arg(self.topics.log(room).concat()).arg(options);
        let answer = match self.requests.ask(call.clone()).await? {
            Err(answer) if answer.lacks_functions() => {
                self.load().await?;
                self.requests.ask(call).await?
            }
            answer => answer,
        };
        let value = answer.map_err(|answer| answer.error())?;
        text(&value).and_then(position).ok_or_else(malformed)
    }

    async fn read_page(&self, room: &RoomName, from: ReadFrom, limit: usize) -> Result<Page, BrokerError> {
        let key = self.topics.log(room).concat();
        let mut reading = Reading::new(from, limit, self.max_publication);
        self.read_batches(&key, &mut reading).await?;
        let mut top = reading.top;
        if top.is_none() {
            top = top_of(&self.requests, &key).await?;
            if reading.is_overtaken_by(top) {
                // A publication that was recorded in between is not one that was removed.
                reading = Reading::new(from, limit, self.max_publication);
                self.read_batches(&key, &mut reading).await?;
                top = top.max(reading.top);
            }
        }
        Ok(reading.page(top))
    }

    async fn read_batches(&self, key: &[u8], reading: &mut Reading) -> Result<(), BrokerError> {
        while let Some(count) = reading.next_batch() {
            let mut command = cmd(if reading.is_backwards() { "XREVRANGE" } else { "XRANGE" });
            let [start, end] = reading.range();
            command.arg(key).arg(start).arg(end).arg("COUNT").arg(count);
            let batch = self.requests.ask(command).await?.map_err(|answer| answer.error())?;
            reading.take(entries(batch)?, count);
        }
        Ok(())
    }
}

/// Loads the library of functions.
#[derive(Clone)]
struct Functions {
    pool: Pool,
    metrics: Arc<BrokerMetrics>,
    /// Why the functions could not be loaded, if the last attempt failed and the log says so.
    failure: Arc<Mutex<Option<Arc<str>>>>,
}

impl Functions {
    /// Loads the library of functions unless the server has it.
    async fn load(&self) -> Result<(), BrokerError> {
        let mut pooled = pool::checked(&self.pool).await.map_err(pool::no_connection)?;
        let mut loaded = functions::load(pooled.connection()).await;
        for _ in 1..LOADS {
            if !matches!(loaded, Err(LoadError::Stranger(_))) {
                break;
            }
            loaded = functions::load(pooled.connection()).await;
        }
        match loaded {
            Ok(loaded) => {
                *self.failure.lock() = None;
                if let Loaded::Now { replaced } = loaded {
                    self.metrics.history.functions_loaded.inc();
                    tracing::info!(
                        version = functions::VERSION,
                        ?replaced,
                        "loaded the functions into Redis"
                    );
                }
                Ok(())
            }
            Err(LoadError::Forbidden { text, present: Some(version) }) => {
                tracing::warn!(version, error = %text, "Redis has an older version of the functions");
                Ok(())
            }
            Err(error) => {
                self.metrics.history.functions_failed.inc();
                let text: Arc<str> = error.to_string().into();
                // Each client that joins a room with a history causes another attempt.
                if self.failure.lock().replace(Arc::clone(&text)).as_ref() != Some(&text) {
                    tracing::warn!(%error, "cannot load the functions into Redis, which record publications");
                }
                Err(match error {
                    LoadError::Forbidden { .. } => BrokerError::Forbidden(text),
                    LoadError::TooOld | LoadError::Stranger(_) => BrokerError::Refused(text),
                    LoadError::Refused(text) => Answer::to(&text).error(),
                    LoadError::Connection(_) => BrokerError::Unavailable,
                })
            }
        }
    }
}

/// The position of the newest publication, kept or not; `None` if there is no log.
async fn top_of(requests: &Requests, key: &[u8]) -> Result<Option<Cursor>, BrokerError> {
    let mut command = cmd("XINFO");
    command.arg("STREAM").arg(key);
    let value = match requests.ask(command).await? {
        Ok(value) => value,
        Err(answer) if answer.text.contains("no such key") => return Ok(None),
        Err(answer) => return Err(answer.error()),
    };
    let last = field(&value, b"last-generated-id").and_then(text).and_then(position);
    last.map(Some).ok_or_else(malformed)
}

/// An entry of a stream.
struct Raw {
    cursor: Cursor,
    link: Option<Bytes>,
    data: Option<Bytes>,
}

/// A page while it is read.
struct Reading {
    from: ReadFrom,
    limit: usize,
    max_publication: usize,
    /// In the order of reading.
    entries: Vec<Entry>,
    /// The payloads in `entries`, in bytes.
    bytes: usize,
    /// The number of entries that the last batch asked for.
    batch: usize,
    /// The last entry that was read, after which the next batch goes on.
    last: Option<Cursor>,
    /// The position of the newest publication, if that has been seen.
    top: Option<Cursor>,
    /// Whether the entry at the position that was asked for has been seen.
    is_kept: bool,
    is_done: bool,
}

impl Reading {
    fn new(from: ReadFrom, limit: usize, max_publication: usize) -> Self {
        Self {
            from,
            limit,
            max_publication,
            entries: Vec::new(),
            bytes: 0,
            batch: 0,
            last: None,
            top: None,
            is_kept: false,
            is_done: false,
        }
    }

    /// Whether the newest is read first.
    fn is_backwards(&self) -> bool {
        matches!(self.from, ReadFrom::Last | ReadFrom::Before(_))
    }

    /// How many entries to ask for next; `None` when the page is complete.
    fn next_batch(&mut self) -> Option<usize> {
        if self.is_done {
            return None;
        }
        let missing = self.limit - self.entries.len();
        self.batch = match self.batch {
            0 => FIRST_BATCH.min(missing + 1),
            before => {
                let average = self.bytes / self.entries.len().max(1);
                let fit = (MAX_PAGE_BYTES - self.bytes.min(MAX_PAGE_BYTES)) / average.max(1) + 1;
                (before * GROWTH).min(MAX_BATCH).min(missing).min(fit)
            }
        };
        Some(self.batch)
    }

    /// Whether nothing was found, although the newest publication, which was asked for later, is at `top`.
    fn is_overtaken_by(&self, top: Option<Cursor>) -> bool {
        let is_newer = |top: Cursor| match self.from {
            ReadFrom::After(asked) => asked < top,
            ReadFrom::Last => top.offset > 0,
            ReadFrom::Before(_) => false,
        };
        self.entries.is_empty() && top.is_some_and(is_newer)
    }

    /// Where the next batch begins, and where it ends at the latest.
    fn range(&self) -> [String; 2] {
        let beyond = |cursor: &Cursor| format!("({cursor}");
        match self.from {
            ReadFrom::After(asked) => {
                [self.last.as_ref().map_or_else(|| asked.to_string(), beyond), "+".to_owned()]
            }
            ReadFrom::Last => [self.last.as_ref().map_or_else(|| "+".to_owned(), beyond), "-".to_owned()],
            ReadFrom::Before(asked) => {
                [self.last.as_ref().map_or_else(|| asked.to_string(), beyond), "-".to_owned()]
            }
        }
    }

    /// Takes a batch, for which `count` entries were asked.
    fn take(&mut self, batch: Vec<Raw>, count: usize) {
        let is_end = batch.len() < count;
        match self.from {
            ReadFrom::Last if self.last.is_none() => self.top = batch.first().map(|raw| raw.cursor),
            ReadFrom::After(_) if is_end => self.top = batch.last().map(|raw| raw.cursor).or(self.last),
            _ => {}
        }
        self.is_done = is_end;
        for raw in batch {
            self.last = Some(raw.cursor);
            if matches!(self.from, ReadFrom::After(asked) | ReadFrom::Before(asked) if asked == raw.cursor) {
                self.is_kept = true;
            } else if !self.add(raw) {
                self.is_done = true;
                return;
            }
        }
    }

    /// Adds an entry; returns whether the page has room for more.
    fn add(&mut self, raw: Raw) -> bool {
        let place = match raw.link.as_deref().and_then(head::link) {
            Some(follows) => Place { cursor: raw.cursor, follows },
            None => Place::within_epoch(raw.cursor),
        };
        let publication = raw.data.map(envelope::decode);
        let Some(publication) =
            publication.filter(|publication| publication.data.bytes().len() <= self.max_publication)
        else {
            // The page does not reach beyond it, unless it has yet to begin.
            return self.entries.is_empty();
        };
        let bytes = self.bytes.saturating_add(publication.data.bytes().len());
        if let Some(Entry { place: before, .. }) = self.entries.last() {
            let (earlier, later) = if self.is_backwards() { (place, *before) } else { (*before, place) };
            if bytes > MAX_PAGE_BYTES || !later.comes_after(earlier.cursor) {
                return false;
            }
        }
        self.bytes = bytes;
        self.entries.push(Entry { place, publication });
        self.entries.len() < self.limit && self.bytes < MAX_PAGE_BYTES
    }

    fn page(self, top: Option<Cursor>) -> Page {
        let is_backwards = self.is_backwards();
        let mut entries = self.entries;
        if is_backwards {
            entries.reverse();
        }
        let start = match self.from {
            ReadFrom::Last => Start::Continuous,
            ReadFrom::Before(asked) => Start::before(asked, self.is_kept, self.last.is_some(), top),
            ReadFrom::After(asked) => Start::after(asked, entries.first().map(|entry| entry.place), top),
        };
        // It may have been deleted since its publications were read.
        let newest = entries.last().map(|entry| entry.place.cursor);
        Page { entries, start, top: top.max(newest) }
    }
}

/// The entries in the answer to `XRANGE`.
fn entries(value: Value) -> Result<Vec<Raw>, BrokerError> {
    let Value::Array(items) = value else { return Err(malformed()) };
    items.into_iter().map(entry).collect()
}

/// One of them: its ID, and a list of its fields and their values in turn.
fn entry(value: Value) -> Result<Raw, BrokerError> {
    let Value::Array(parts) = value else { return Err(malformed()) };
    let [id, Value::Array(fields)] = <[Value; 2]>::try_from(parts).map_err(|_| malformed())? else {
        return Err(malformed());
    };
    let cursor = text(&id).and_then(position).ok_or_else(malformed)?;
    let mut raw = Raw { cursor, link: None, data: None };
    let mut fields = fields.into_iter();
    while let (Some(Value::BulkString(name)), Some(value)) = (fields.next(), fields.next()) {
        let value = if let Value::BulkString(bytes) = value { Some(Bytes::from(bytes)) } else { None };
        match &*name {
            b"d" => raw.data = value,
            b"p" => raw.link = value,
            _ => {}
        }
    }
    Ok(raw)
}

fn position(text: &[u8]) -> Option<Cursor> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn text(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}

/// The value of a field in a map, which is a list of keys and values in turn to older clients.
fn field<'a>(value: &'a Value, name: &[u8]) -> Option<&'a Value> {
    match value {
        Value::Map(pairs) => pairs.iter().find(|(key, _)| text(key) == Some(name)).map(|(_, value)| value),
        Value::Array(items) => items.chunks_exact(2).find_map(|pair| match pair {
            [key, value] if text(key) == Some(name) => Some(value),
            _ => None,
        }),
        _ => None,
    }
}

fn malformed() -> BrokerError {
    BrokerError::Refused("the server's answer cannot be understood".into())
}

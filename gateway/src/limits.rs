//! How much anybody may use: rates in governor's buckets, and counts of what is open.
//!
//! Owns the accounts of addresses, users and sessions, and says whether something still fits. What happens
//! to whom it does not fit for is said where it happens: by the acceptor and the routes
//! ([`crate::server`]) before there is a session, by the session ([`crate::session`]) after.
//!
//! | module | what it holds |
//! |---|---|
//! | [`address`] | what counts as one address |
//! | [`bucket`] | the buckets of one session, kept within it |
//! | [`keyed`] | buckets by key, bounded in number |
//! | [`crowd`] | how many of each key are open |
//! | [`meter`] | from a configured rate to governor's quota |
//!
//! # Bounds
//!
//! A session's buckets lie in the session and go with it. Buckets by address and by user are swept once a
//! second ([`Limiters::sweep`]): one that is full again is like one that was never used, and is forgotten.
//! Of each kind there are at most [`keyed::MAX_KEYS`]. While there are as many, newcomers share buckets.
//!
//! # Changes
//!
//! [`Limiters::adopt`] takes new rates. The buckets of a rate that has changed start anew, those of all others
//! keep their state.

pub mod address;
pub mod bucket;
pub mod crowd;
pub mod keyed;
pub mod meter;

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;

use self::{
    address::AddressKey,
    bucket::{Purse, SessionMeters},
    crowd::{Crowd, Lease},
    keyed::Keyed,
    meter::Measure,
};
use crate::{auth::Subject, config};

/// What a client of a session, or a publisher by `POST`, has used up. The label of
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

impl Limit {
    /// Every limit.
    pub const ALL: [Self; 4] = [Self::Commands, Self::Bytes, Self::UserCommands, Self::UserBytes];

    /// The metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Commands => "commands",
            Self::Bytes => "bytes",
            Self::UserCommands => "user_commands",
            Self::UserBytes => "user_bytes",
        }
    }

    /// The text of a close frame, which names it.
    pub fn close_text(self) -> &'static str {
        match self {
            Self::Commands => "too much: limits.commands",
            Self::Bytes => "too much: limits.bytes",
            Self::UserCommands => "too much: limits.user_commands",
            Self::UserBytes => "too much: limits.user_bytes",
        }
    }
}

/// What an address has used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressLimit {
    /// `limits.attempts_per_address`, and after how long there is room for another.
    Attempts(Duration),
    /// `limits.connections_per_address`
    Connections,
}

/// What becomes of somebody who knocks.
#[derive(Debug)]
pub enum Verdict {
    /// Come in. The seat, if seats are counted, is taken until the lease is dropped.
    Welcome(Option<Seat>),
    /// To be told so, with a status.
    Refused(AddressLimit, Courtesy),
    /// Has been told often enough, or too many are being told: not worth an answer.
    Dropped(AddressLimit),
}

/// One open connection of an address.
pub type Seat = Lease<AddressKey>;

/// A place among those who are being told that they are refused.
#[derive(Debug)]
pub struct Courtesy(Arc<AtomicUsize>);

impl Courtesy {
    /// Refused connections that are answered at the same time, on this node.
    pub const MAX: usize = 256;
    /// How often one address is answered.
    const RATE: &str = "1/s burst 10";
}

impl Drop for Courtesy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The limits that all threads of a node share.
pub struct Limiters {
    accepts: ArcSwap<Option<Keyed<()>>>,
    attempts: ArcSwap<Option<Keyed<AddressKey>>>,
    connections: Arc<Crowd<AddressKey>>,
    courtesy: Keyed<AddressKey>,
    refused: Arc<AtomicUsize>,
    user_commands: ArcSwap<Option<Keyed<Subject>>>,
    user_bytes: ArcSwap<Option<Keyed<Subject>>>,
}

/// Nothing is limited.
impl Default for Limiters {
    fn default() -> Self {
        let courtesy = Courtesy::RATE.parse().expect("a rate");
        Self {
            accepts: ArcSwap::default(),
            attempts: ArcSwap::default(),
            connections: Arc::default(),
            courtesy: Keyed::new(Measure::of(courtesy)),
            refused: Arc::default(),
            user_commands: ArcSwap::default(),
            user_bytes: ArcSwap::default(),
        }
    }
}

impl Limiters {
    /// Limiters with the rates of `limits`.
    pub fn new(limits: &config::Limits) -> Self {
        let limiters = Self::default();
        limiters.adopt(limits);
        limiters
    }

    /// Takes the rates of `limits`.
    pub fn adopt(&self, limits: &config::Limits) {
        adopt(&self.accepts, limits.accepts.map(Measure::of));
        adopt(&self.attempts, limits.attempts_per_address.map(Measure::of));
        adopt(&self.user_commands, limits.user_commands.map(Measure::of));
        adopt(&self.user_bytes, limits.user_bytes.map(Measure::of_bytes));
    }

    /// Whether one more connection may be accepted now, or how long to wait.
    pub fn accept(&self) -> Result<(), Duration> {
        charge(&self.accepts, &(), 1)
    }

    /// Somebody comes from `address`, of whose connections at most `most` may be open.
    pub fn knock(&self, address: IpAddr, most: Option<usize>) -> Verdict {
        let key = AddressKey::from(address);
        let limit = match charge(&self.attempts, &key, 1) {
            Err(wait) => AddressLimit::Attempts(wait),
            Ok(()) => match most {
                None => return Verdict::Welcome(None),
                Some(most) => match self.connections.enter(key, most) {
                    Some(seat) => return Verdict::Welcome(Some(seat)),
                    None => AddressLimit::Connections,
                },
            },
        };
        match self.courtesy(key) {
            Some(courtesy) => Verdict::Refused(limit, courtesy),
            None => Verdict::Dropped(limit),
        }
    }

    /// A user publishes by `POST`.
    pub fn user_command(&self, user: &Subject) -> Result<(), Duration> {
        charge(&self.user_commands, user, 1)
    }

    /// A user sends so many bytes.
    pub fn user_bytes(&self, user: &Subject, bytes: usize) -> Result<(), Duration> {
        charge(&self.user_bytes, user, bytes)
    }

    /// A user sends so many more bytes of something of which `paid` bytes have been charged already.
    pub fn more_user_bytes(&self, user: &Subject, paid: usize, bytes: usize) -> Result<(), Duration> {
        let buckets = self.user_bytes.load();
        buckets.as_ref().as_ref().map_or(Ok(()), |keyed| keyed.charge_more(user, paid, bytes))
    }

    /// Forgets who has used up nothing. To be called about once a second.
    pub fn sweep(&self) {
        self.courtesy.sweep();
        self.connections.sweep();
        sweep(&self.attempts);
        sweep(&self.user_commands);
        sweep(&self.user_bytes);
    }

    /// Buckets and counts that are kept by address and by user. Beyond a moment after everybody has gone there
    /// are none.
    pub fn accounts(&self) -> usize {
        self.courtesy.len()
            + self.connections.len()
            + len(&self.attempts)
            + len(&self.user_commands)
            + len(&self.user_bytes)
    }

    fn courtesy(&self, key: AddressKey) -> Option<Courtesy> {
        self.courtesy.charge(&key, 1).ok()?;
        let courtesy = Courtesy(Arc::clone(&self.refused));
        (self.refused.fetch_add(1, Ordering::Relaxed) < Courtesy::MAX).then_some(courtesy)
    }
}

fn adopt<K: keyed::Key>(place: &ArcSwap<Option<Keyed<K>>>, measure: Option<Measure>) {
    if place.load().as_ref().as_ref().map(Keyed::measure) != measure {
        place.store(Arc::new(measure.map(Keyed::new)));
    }
}

fn charge<K: keyed::Key>(place: &ArcSwap<Option<Keyed<K>>>, key: &K, count: usize) -> Result<(), Duration> {
    place.load().as_ref().as_ref().map_or(Ok(()), |keyed| keyed.charge(key, count))
}

fn sweep<K: keyed::Key>(place: &ArcSwap<Option<Keyed<K>>>) {
    if let Some(keyed) = place.load().as_ref() {
        keyed.sweep();
    }
}

fn len<K: keyed::Key>(place: &ArcSwap<Option<Keyed<K>>>) -> usize {
    place.load().as_ref().as_ref().map_or(0, Keyed::len)
}

/// What a session asks before it does something: its own limits and its user's.
#[derive(Clone, Copy)]
pub struct Allowance<'a> {
    /// The session's rates.
    pub session: &'a SessionMeters,
    /// Where its user's buckets are.
    pub node: &'a Limiters,
}

impl Allowance<'_> {
    /// So many bytes have come.
    pub fn bytes(&self, purse: &Purse, user: Option<&Subject>, bytes: usize) -> Result<(), Limit> {
        self.session.bytes(purse, bytes).map_err(|_| Limit::Bytes)?;
        let paid = user.map_or(Ok(()), |user| self.node.user_bytes(user, bytes));
        paid.map_err(|_| Limit::UserBytes)
    }

    /// So many more bytes of a message have come, of which `paid` bytes have been charged already.
    pub fn more_bytes(
        &self,
        purse: &Purse,
        user: Option<&Subject>,
        paid: usize,
        bytes: usize,
    ) -> Result<(), Limit> {
        self.session.more_bytes(purse, paid, bytes).map_err(|_| Limit::Bytes)?;
        let paid = user.map_or(Ok(()), |user| self.node.more_user_bytes(user, paid, bytes));
        paid.map_err(|_| Limit::UserBytes)
    }

    /// A command is to be obeyed.
    pub fn command(&self, purse: &Purse, user: Option<&Subject>) -> Result<(), Limit> {
        self.session.command(purse).map_err(|_| Limit::Commands)?;
        let paid = user.map_or(Ok(()), |user| self.node.user_command(user));
        paid.map_err(|_| Limit::UserCommands)
    }

    /// Something has been refused. Returns whether the session may go on.
    pub fn excuse(&self, purse: &Purse) -> bool {
        self.session.excuse(purse)
    }
}

#[cfg(test)]
pub(crate) mod tests;

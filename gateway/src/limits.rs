//! Limits of what clients may use: rate limits in governor's buckets, and counts of open connections.
//!
//! Holds the rate-limit buckets of addresses, users and sessions, and decides whether an action is within its
//! limit. The callers act on a refusal: the acceptor and the routes ([`crate::server`]) before there is a
//! session, the session ([`crate::session`]) after that.
//!
//! | module | what it holds |
//! |---|---|
//! | [`address`] | what counts as one address |
//! | [`bucket`] | a session's buckets, stored in the session |
//! | [`keyed`] | buckets by key, bounded in number |
//! | [`crowd`] | counts of open connections by key |
//! | [`meter`] | conversion of configured rates to governor's quotas |
//!
//! # Bounds
//!
//! A session's buckets are stored in the session and dropped with it. Buckets by address and by user are
//! swept once a second ([`Limiters::sweep`]): a full bucket equals an unused one, so it is removed. There are
//! at most [`keyed::MAX_KEYS`] of each kind. Once that number is reached, new keys share buckets.
//!
//! # Changes
//!
//! [`Limiters::adopt`] sets new rates. Buckets of a changed rate start full; all others keep their state.

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
    bucket::{RateAccount, SessionMeters},
    crowd::{Crowd, Permit},
    keyed::Keyed,
    meter::Measure,
};
use crate::{
    auth::Subject,
    clock::Time,
    config,
    vocabulary::{AddressLimit, Limit},
};

/// The decision about a connection attempt.
#[derive(Debug)]
pub enum Decision {
    /// Accept. If connections are counted, dropping the permit releases its slot.
    Accept(Option<ConnectionPermit>),
    /// Refuse, and answer with a status.
    Refuse(AddressLimit, RefusalPermit),
    /// Drop without an answer: the address has had enough answers, or too many refusals are being answered.
    Drop(AddressLimit),
}

/// A permit for one open connection of an address.
pub type ConnectionPermit = Permit<AddressKey>;

/// A permit to answer a refused connection.
#[derive(Debug)]
pub struct RefusalPermit(Arc<AtomicUsize>);

impl RefusalPermit {
    /// Maximum number of refused connections that this node answers at the same time.
    pub const MAX: usize = 256;
    /// The rate of answers to one address.
    const RATE: &str = "1/s burst 10";
}

impl Drop for RefusalPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The limits that all threads of a node share.
pub struct Limiters {
    time: Time,
    accepts: ArcSwap<Option<Keyed<()>>>,
    attempts: ArcSwap<Option<Keyed<AddressKey>>>,
    connections: Arc<Crowd<AddressKey>>,
    refusals: Keyed<AddressKey>,
    refused: Arc<AtomicUsize>,
    user_commands: ArcSwap<Option<Keyed<Subject>>>,
    user_bytes: ArcSwap<Option<Keyed<Subject>>>,
}

/// Without limits.
impl Default for Limiters {
    fn default() -> Self {
        Self::without_limits(Time::default())
    }
}

impl Limiters {
    /// Limiters with the rates of `limits`.
    pub fn new(limits: &config::Limits, time: Time) -> Self {
        let limiters = Self::without_limits(time);
        limiters.adopt(limits);
        limiters
    }

    fn without_limits(time: Time) -> Self {
        let rate = RefusalPermit::RATE.parse().expect("a rate");
        Self {
            accepts: ArcSwap::default(),
            attempts: ArcSwap::default(),
            connections: Arc::default(),
            refusals: Keyed::new(Measure::of(rate), time.clone()),
            refused: Arc::default(),
            user_commands: ArcSwap::default(),
            user_bytes: ArcSwap::default(),
            time,
        }
    }

    /// Sets the rates of `limits`.
    pub fn adopt(&self, limits: &config::Limits) {
        adopt(&self.accepts, limits.accepts.map(Measure::of), &self.time);
        adopt(&self.attempts, limits.attempts_per_address.map(Measure::of), &self.time);
        adopt(&self.user_commands, limits.user_commands.map(Measure::of), &self.time);
        adopt(&self.user_bytes, limits.user_bytes.map(Measure::of_bytes), &self.time);
    }

    /// Whether one more connection may be accepted now; `Err` is how long to wait.
    pub fn accept(&self) -> Result<(), Duration> {
        charge(&self.accepts, &(), 1)
    }

    /// Decides about a connection attempt from `address`, which may have at most `most` open connections.
    pub fn admit(&self, address: IpAddr, most: Option<usize>) -> Decision {
        let key = AddressKey::from(address);
        let limit = match charge(&self.attempts, &key, 1) {
            Err(wait) => AddressLimit::Attempts(wait),
            Ok(()) => match most {
                None => return Decision::Accept(None),
                Some(most) => match self.connections.enter(key, most) {
                    Some(permit) => return Decision::Accept(Some(permit)),
                    None => AddressLimit::Connections,
                },
            },
        };
        match self.refusal_permit(key) {
            Some(permit) => Decision::Refuse(limit, permit),
            None => Decision::Drop(limit),
        }
    }

    /// Charges a user for a publication by `POST`.
    pub fn user_command(&self, user: &Subject) -> Result<(), Duration> {
        charge(&self.user_commands, user, 1)
    }

    /// Charges a user for received bytes.
    pub fn user_bytes(&self, user: &Subject, bytes: usize) -> Result<(), Duration> {
        charge(&self.user_bytes, user, bytes)
    }

    /// Charges a user for an item that grows by `bytes` after `paid` bytes of it have been charged.
    pub fn more_user_bytes(&self, user: &Subject, paid: usize, bytes: usize) -> Result<(), Duration> {
        let buckets = self.user_bytes.load();
        buckets.as_ref().as_ref().map_or(Ok(()), |keyed| keyed.charge_more(user, paid, bytes))
    }

    /// Removes unused buckets. Call this about once a second.
    pub fn sweep(&self) {
        self.refusals.sweep();
        self.connections.sweep();
        sweep(&self.attempts);
        sweep(&self.user_commands);
        sweep(&self.user_bytes);
    }

    /// The number of buckets and counts kept by address and by user. Shortly after all clients have gone it
    /// is zero.
    pub fn accounts(&self) -> usize {
        self.refusals.len()
            + self.connections.len()
            + len(&self.attempts)
            + len(&self.user_commands)
            + len(&self.user_bytes)
    }

    fn refusal_permit(&self, key: AddressKey) -> Option<RefusalPermit> {
        self.refusals.charge(&key, 1).ok()?;
        let permit = RefusalPermit(Arc::clone(&self.refused));
        (self.refused.fetch_add(1, Ordering::Relaxed) < RefusalPermit::MAX).then_some(permit)
    }
}

fn adopt<K: keyed::Key>(place: &ArcSwap<Option<Keyed<K>>>, measure: Option<Measure>, time: &Time) {
    if place.load().as_ref().as_ref().map(Keyed::measure) != measure {
        place.store(Arc::new(measure.map(|measure| Keyed::new(measure, time.clone()))));
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

/// The limits of a session and of its user, which apply before the session does something.
#[derive(Clone, Copy)]
pub struct Allowance<'a> {
    /// The session's rates.
    pub session: &'a SessionMeters,
    /// The node's limiters, which hold the user's buckets.
    pub node: &'a Limiters,
}

impl Allowance<'_> {
    /// Charges for received bytes.
    pub fn bytes(&self, account: &RateAccount, user: Option<&Subject>, bytes: usize) -> Result<(), Limit> {
        self.session.bytes(account, bytes).map_err(|_| Limit::Bytes)?;
        let paid = user.map_or(Ok(()), |user| self.node.user_bytes(user, bytes));
        paid.map_err(|_| Limit::UserBytes)
    }

    /// Charges for a message that grows by `bytes` after `paid` bytes of it have been charged.
    pub fn more_bytes(
        &self,
        account: &RateAccount,
        user: Option<&Subject>,
        paid: usize,
        bytes: usize,
    ) -> Result<(), Limit> {
        self.session.more_bytes(account, paid, bytes).map_err(|_| Limit::Bytes)?;
        let paid = user.map_or(Ok(()), |user| self.node.more_user_bytes(user, paid, bytes));
        paid.map_err(|_| Limit::UserBytes)
    }

    /// Charges for a command before it is executed.
    pub fn command(&self, account: &RateAccount, user: Option<&Subject>) -> Result<(), Limit> {
        self.session.command(account).map_err(|_| Limit::Commands)?;
        let paid = user.map_or(Ok(()), |user| self.node.user_command(user));
        paid.map_err(|_| Limit::UserCommands)
    }

    /// Charges for a refusal. Returns whether the session may continue.
    pub fn tolerate(&self, account: &RateAccount) -> bool {
        self.session.tolerate(account)
    }
}

#[cfg(test)]
pub(crate) mod tests;

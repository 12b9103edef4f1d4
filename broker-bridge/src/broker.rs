//! The contract between a gateway node and its broker.
//!
//! A broker instance belongs to one node. Each subscription has a [`Sink`], to which the broker reports what arrives.
//!
//! # Affinity
//!
//! A broker may have several connections, each served by a thread of its own. A caller chooses one by its [`Affinity`]: if
//! that is the number of its thread, what it publishes and what it hears crosses no other thread.
//!
//! # What a broker promises
//!
//! **Order.** All nodes that are subscribed to a room receive the room's publications in one order.
//! Publications that are handed over for one room with one affinity, one after the other, keep that order. So do those of
//! which the earlier one was acknowledged before the later one was handed over, whatever their affinity.
//!
//! **Acknowledgement.** [`Broker::subscribe`] resolves once the broker has acknowledged the subscription:
//! every publication accepted from then on reaches the sink, or the sink is told of a gap. A [`Receipt`] is
//! settled exactly once: `Ok` means that the broker has accepted the publication and delivers it to all
//! subscribers.
//!
//! **Loss.** Nothing is lost in silence. When publications of a subscribed room may have been missed (a
//! connection was lost, a payload was too large) [`Sink::gap`] is called before the sink gets anything newer of that
//! room. One interruption is one gap per room, however often the broker had to try
//! again. A publication whose fate is unknown is settled as [`BrokerError::Unknown`] and never sent twice. It is sent again
//! only if its id makes sure that it is accepted once, or if it is proven that nothing was done the first time.
//!
//! **History.** A publication that is handed over with a [`Retention`] is recorded in its room's log, and then
//! delivered. Its [`Place`] in the log arrives together with it, and its receipt names the same [`Cursor`]. The log's
//! order is the order in which all nodes receive the room: a sink gets each recorded publication exactly once and in
//! the log's order, unless it is told of a gap. A publication whose [id](PublicationId) was accepted before in this room,
//! from whichever node, is neither recorded nor delivered again: its receipt names the cursor of the first one. A broker
//! remembers an id for two minutes. Publications without a retention are delivered in their order among the others and
//! are not in the log.
//!
//! [`Broker::open`] tells the position from which a subscription begins, [`Broker::read`] what was published after a
//! position. A log's offsets go on when old publications are removed and when it is cleared. The whole log is deleted
//! [`ttl`](Retention::ttl) after its last publication; subscriptions and reading do not prolong that.
//!
//! **Waiting.** [`Broker::subscribe`], [`Broker::unsubscribe`] and [`Broker::try_publish`] do their
//! registration before they return and never block; calls for one room take effect in the order they
//! were made. A subscription survives every loss of connection until it is given up.

use std::{fmt, future::ready, sync::Arc};

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::{
    Cursor, Place, Publication, PublicationId, Retention, RoomName,
    history::{Page, ReadFrom},
};

/// The interface between a node and its broker. The [module](self) says what each call promises.
pub trait Broker: Send + Sync + 'static {
    /// Subscribes to the room's publications, with this affinity. Calling this again for a room that is already subscribed is
    /// cheap and waits for the same acknowledgement: the sink and the affinity must be those of the first call.
    ///
    /// The request is registered when this returns; dropping the future does not cancel it.
    ///
    /// After [`BrokerError::Refused`] or [`BrokerError::Forbidden`] the node is no longer subscribed, unless the room
    /// was acknowledged earlier: then the broker keeps trying, its status says so, further calls get the same error, and
    /// the sink is told of the gap once it succeeds. If the broker temporarily cannot subscribe, the future waits, as it
    /// does while the broker is unreachable. If the node unsubscribes from the room in the meantime, the future resolves
    /// to [`BrokerError::NotNow`].
    fn subscribe(&self, room: &RoomName, sink: Arc<dyn Sink>, affinity: Affinity) -> Subscribing;

    /// Unsubscribes from the room. The affinity is that of its subscription. Its sink may still get a few publications, even after
    /// the room is subscribed again with another sink.
    fn unsubscribe(&self, room: &RoomName, affinity: Affinity);

    /// Hands a publication over if the outgoing queue has room for it, and gives the request back if not.
    #[allow(
        clippy::result_large_err,
        reason = "the caller keeps the request and waits; a box would cost every publication"
    )]
    fn try_publish(&self, request: PublishRequest) -> Result<(), PublishRequest>;

    /// Hands a publication over, waiting for room in the outgoing queue. Cancel safe: a dropped future has
    /// either handed the publication over or settled its receipt as [`BrokerError::Closed`].
    fn publish(&self, request: PublishRequest) -> BoxFuture<'_, ()>;

    /// Makes sure that the room has a log, and answers the position of its newest publication, or of its beginning
    /// ([`Cursor::offset`] 0) if nothing was recorded yet. A new log is kept as `retention` says.
    ///
    /// It is safe to repeat after any error but [`BrokerError::Refused`]. The default is for brokers that keep no
    /// history.
    fn open(&self, _room: &RoomName, _retention: Retention) -> Positioning {
        Box::pin(ready(Err(no_history())))
    }

    /// Reads a part of the room's log: at most `limit` publications, which is taken as at least 1 and at most
    /// [`MAX_PAGE`], and at most [`MAX_PAGE_BYTES`] of payload, but at least one publication if there is any.
    ///
    /// [`Page`] says how to continue. Reading changes nothing. The default is for brokers that keep no history.
    fn read(&self, _room: &RoomName, _from: ReadFrom, _limit: usize) -> Reading {
        Box::pin(ready(Err(no_history())))
    }

    /// Removes all publications from the room's log, and answers the position at which it goes on: that of the newest
    /// publication there was. Who resumes from there has missed nothing. If there is no log, a new one begins, which is
    /// kept as [`Retention::default`] says until something is recorded.
    ///
    /// It is safe to repeat. The default is for brokers that keep no history.
    fn clear(&self, _room: &RoomName) -> Positioning {
        Box::pin(ready(Err(no_history())))
    }

    /// The broker's status, and a way to wait for changes.
    fn status(&self) -> watch::Receiver<BrokerStatus>;

    /// Sends what is queued (bounded by the broker's own time-out), settles every receipt and closes all
    /// connections.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// Resolves when the broker has acknowledged a subscription. Waits while the broker is unreachable: callers bound
/// it with a time-out of their own.
pub type Subscribing = BoxFuture<'static, Result<(), BrokerError>>;

/// Resolves to a position in a room's log. Fails, and does not wait, while the broker is unreachable.
pub type Positioning = BoxFuture<'static, Result<Cursor, BrokerError>>;

/// Resolves to a part of a room's log. Fails, and does not wait, while the broker is unreachable.
pub type Reading = BoxFuture<'static, Result<Page, BrokerError>>;

/// The maximum number of publications in a [`Page`].
pub const MAX_PAGE: usize = 1000;

/// The maximum size of the payloads in a [`Page`] with more than one publication, in bytes.
pub const MAX_PAGE_BYTES: usize = 1024 * 1024;

fn no_history() -> BrokerError {
    BrokerError::Refused("this broker keeps no history".into())
}

/// Selects one of a broker's connections, and so the thread that serves it. Any number is allowed: a broker takes it
/// modulo the number of its connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity(pub usize);

impl Affinity {
    /// The one of `all` that this affinity selects.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub(crate) fn of<T>(self, all: &[T]) -> &T {
        all.get(self.0 % all.len()).expect("a remainder is below the length")
    }
}

/// Receives what arrives for one subscription. Called from the broker's reading tasks, without a queue in between, so it
/// must not block. It may subscribe and unsubscribe; it must not publish.
pub trait Sink: Send + Sync + 'static {
    /// A publication of the room, and its place in the room's log if it was recorded. Calls come from one task at a
    /// time, in order.
    fn publication(&self, publication: Publication, place: Option<Place>);

    /// Publications of the room may be missing before the next one.
    fn gap(&self, cause: GapCause);
}

/// Why publications may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapCause {
    /// The subscription was interrupted, and is established again.
    Interrupted,
    /// A publication was larger than this node accepts.
    Oversized,
    /// This node could not keep up and dropped publications from an internal queue.
    Overflow,
    /// A session could not keep up, and newer publications of the room replaced queued ones.
    Dropped,
    /// The broker's server was replaced or restarted, and the new one may lack the newest that the old one had accepted.
    Failover,
    /// The room's history no longer goes back to what was received last.
    Trimmed,
    /// The room's history does not know what was received last: it was deleted, it has expired, or it never had it.
    Expired,
    /// Publications that are not recorded may have been missed, in a room with a history.
    Unrecorded,
}

impl GapCause {
    /// The name that clients see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interrupted => "interrupted",
            Self::Oversized => "oversized",
            Self::Overflow => "overflow",
            Self::Dropped => "dropped",
            Self::Failover => "failover",
            Self::Trimmed => "trimmed",
            Self::Expired => "expired",
            Self::Unrecorded => "unrecorded",
        }
    }
}

/// A publication to be sent.
#[derive(Debug)]
pub struct PublishRequest {
    /// The room to publish to.
    pub room: RoomName,
    /// The message.
    pub publication: Publication,
    /// How much of the room's history to keep, this publication included. `None`: it is not recorded.
    pub history: Option<Retention>,
    /// Recognizes the publication if it is published again. Only for publications that are recorded: any other with an
    /// id is refused.
    pub id: Option<PublicationId>,
    /// The connection to use.
    pub affinity: Affinity,
    /// Reports the outcome.
    pub receipt: Receipt,
}

impl PublishRequest {
    /// Why no broker accepts this request, if so.
    pub(crate) fn fault(&self) -> Option<BrokerError> {
        let unrecorded = self.history.is_none() && self.id.is_some();
        unrecorded.then(|| BrokerError::Refused("an id needs a room that keeps a history".into()))
    }
}

/// Tells a publisher, exactly once, what became of its publication. A receipt that is dropped settles
/// itself as [`BrokerError::Closed`].
pub struct Receipt(Option<(Arc<dyn ReceiptSink>, Ticket)>);

/// Identifies a publication to its publisher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The publisher, as its receipt sink identifies it.
    pub owner: u64,
    /// Which of the publisher's publications.
    pub request: u64,
}

/// What became of a publication that the broker has accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Its position in the room's log; `None` if it was not recorded.
    pub cursor: Option<Cursor>,
    /// A publication with the same id was accepted before, and this one was dropped. The cursor is that of the first. True
    /// as well if the broker had to send the publication again and the first attempt had succeeded.
    pub duplicate: bool,
}

/// Receives the outcomes of publications. Called from the broker's tasks: must not block.
pub trait ReceiptSink: Send + Sync + 'static {
    /// The broker has accepted the publication with this ticket, or has not.
    fn settle(&self, ticket: Ticket, outcome: Result<Accepted, BrokerError>);
}

impl Receipt {
    /// A receipt that reports to `sink`.
    pub fn new(sink: Arc<dyn ReceiptSink>, ticket: Ticket) -> Self {
        Self(Some((sink, ticket)))
    }

    /// A receipt that nobody waits for.
    pub fn ignored() -> Self {
        Self(None)
    }

    /// Reports the outcome.
    pub fn settle(mut self, outcome: Result<Accepted, BrokerError>) {
        if let Some((sink, ticket)) = self.0.take() {
            sink.settle(ticket, outcome);
        }
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if let Some((sink, ticket)) = self.0.take() {
            sink.settle(ticket, Err(BrokerError::Closed));
        }
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Receipt").field(&self.0.as_ref().map(|(_, ticket)| ticket)).finish()
    }
}

/// The status of a broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BrokerStatus {
    /// Not connected since the start. The text says what was tried and what failed, and contains no secret.
    Connecting(Arc<str>),
    /// Everything works.
    Up,
    /// It worked before and does not work now: publications may be refused, and gaps will be told. The text says why.
    Interrupted(Arc<str>),
    /// Closed by the node.
    Closed,
}

impl BrokerStatus {
    /// Whether everything works.
    pub fn is_up(&self) -> bool {
        matches!(self, Self::Up)
    }
}

/// Why a request to the broker failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// There was no connection within the time limit. The publication was not sent: it is safe to retry.
    #[error("the broker cannot be reached")]
    Unavailable,
    /// The connection was lost after the publication was sent and before it was acknowledged: it may or
    /// may not have been delivered.
    #[error("the connection to the broker was lost before it acknowledged")]
    Unknown,
    /// The broker answered that it temporarily cannot, and did nothing: it is safe to retry.
    #[error("the broker cannot at the moment: {0}")]
    NotNow(Arc<str>),
    /// The node has no permission for the room. A retry fails until somebody changes the permissions.
    #[error("the broker does not allow it: {0}")]
    Forbidden(Arc<str>),
    /// The broker refused, and did nothing. A retry fails again.
    #[error("the broker refused: {0}")]
    Refused(Arc<str>),
    /// The broker has been closed by this node.
    #[error("the broker is closed")]
    Closed,
}

impl BrokerError {
    /// Whether the same request may succeed later without doing anything twice.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable | Self::NotNow(_))
    }
}

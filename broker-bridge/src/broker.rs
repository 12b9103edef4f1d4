//! The contract between a gateway node and its broker.
//!
//! A broker instance belongs to one node. It reports to one [`Sink`], given when the broker is made, so
//! that the handler stands before the first subscription is sent.
//!
//! # What a broker promises
//!
//! **Order.** All nodes that are subscribed to a room receive the room's publications in one order.
//! Publications that one caller hands over for one room, one after the other, keep that order.
//!
//! **Acknowledgement.** [`Broker::subscribe`] resolves once the broker has acknowledged the subscription:
//! every publication accepted from then on reaches the sink, or the sink hears of a gap. A [`Receipt`] is
//! settled exactly once: `Ok` means that the broker has taken the publication and will give it to whoever
//! is subscribed.
//!
//! **Loss.** Nothing is lost in silence. When publications of a subscribed room may have been missed (a
//! connection was lost, a payload was over the bound) the sink is told by [`Sink::gap`] before it is given
//! anything newer of that room. One interruption is one gap per room, however often the broker had to try
//! again. A publication whose fate is unknown is settled as [`BrokerError::Unknown`] and never sent twice.
//!
//! **Waiting.** [`Broker::subscribe`], [`Broker::unsubscribe`] and [`Broker::try_publish`] do their
//! registration before they return and never block; calls for one room take effect in the order they
//! were made. A subscription survives every loss of connection until it is given up.

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::{Publication, RoomName};

/// What a node asks of its broker. See the [module](self) for what each call promises.
pub trait Broker: Send + Sync + 'static {
    /// Wants the room's publications from now on. Asking again for a room that is wanted already is
    /// cheap and waits for the same acknowledgement.
    ///
    /// The request is registered when this returns; dropping the future does not take it back.
    ///
    /// After [`BrokerError::Refused`] or [`BrokerError::Forbidden`] the room is not wanted any more, unless it was
    /// acknowledged earlier: then the broker goes on trying, its status says so, whoever asks meanwhile is told the
    /// same, and the sink hears of the gap when it succeeds. A broker that only cannot at the moment is waited for,
    /// like one that is away. Who waits for a room that this node gives up meanwhile is told
    /// [`BrokerError::NotNow`]: the broker has not refused.
    fn subscribe(&self, room: &RoomName) -> Subscribing;

    /// Stops wanting the room's publications. A few may still arrive.
    fn unsubscribe(&self, room: &RoomName);

    /// Hands a publication over if the outgoing queue has room for it, and gives the request back if not.
    #[allow(
        clippy::result_large_err,
        reason = "the caller keeps the request and waits; a box would cost every publication"
    )]
    fn try_publish(&self, request: PublishRequest) -> Result<(), PublishRequest>;

    /// Hands a publication over, waiting for room in the outgoing queue. Cancel safe: a dropped future has
    /// either handed the publication over or settled its receipt as [`BrokerError::Closed`].
    fn publish(&self, request: PublishRequest) -> BoxFuture<'_, ()>;

    /// How the broker is, and a way to wait for changes.
    fn status(&self) -> watch::Receiver<BrokerStatus>;

    /// Sends what is queued (bounded by the broker's own time-out), settles every receipt and closes all
    /// connections.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// Resolves when the broker has acknowledged a subscription. Waits as long as the broker is away: bound
/// it with a time-out of your own.
pub type Subscribing = BoxFuture<'static, Result<(), BrokerError>>;

/// Who hears what arrives for this node. Called from the broker's reading tasks: must not block, for there is no
/// queue before it. It may subscribe and unsubscribe; it must not publish.
pub trait Sink: Send + Sync + 'static {
    /// A publication of a subscribed room. Calls for one room come from one task at a time, in order.
    fn publication(&self, room: &RoomName, publication: Publication);

    /// Publications of this room may be missing just before whatever comes next.
    fn gap(&self, room: &RoomName, cause: GapCause);
}

/// Why publications may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapCause {
    /// The subscription was interrupted, and stands again.
    Interrupted,
    /// A publication was larger than this node accepts.
    Oversized,
    /// This node could not keep up and dropped publications inside.
    Overflow,
    /// A session could not keep up, and what waited for it made way for newer publications of the room.
    Dropped,
}

impl GapCause {
    /// The name that clients see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interrupted => "interrupted",
            Self::Oversized => "oversized",
            Self::Overflow => "overflow",
            Self::Dropped => "dropped",
        }
    }
}

/// A publication on its way out.
#[derive(Debug)]
pub struct PublishRequest {
    /// Where it goes.
    pub room: RoomName,
    /// What is published.
    pub publication: Publication,
    /// Who hears how it went.
    pub receipt: Receipt,
}

/// Tells a publisher, exactly once, what became of its publication. A receipt that is dropped settles
/// itself as [`BrokerError::Closed`].
pub struct Receipt(Option<(Arc<dyn ReceiptSink>, Ticket)>);

/// What the publisher chose to recognise its publication by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Who published, in the publisher's own terms.
    pub owner: u64,
    /// Which of the owner's publications.
    pub request: u64,
}

/// Who hears what became of a publication. Called from the broker's tasks: must not block.
pub trait ReceiptSink: Send + Sync + 'static {
    /// The publication with this ticket has been taken by the broker, or has not.
    fn settle(&self, ticket: Ticket, outcome: Result<(), BrokerError>);
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
    pub fn settle(mut self, outcome: Result<(), BrokerError>) {
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

/// How a broker is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BrokerStatus {
    /// Never connected since the start. The text says what was tried and what came of it, and holds no secret.
    Connecting(Arc<str>),
    /// Everything works.
    Up,
    /// It worked and does not now: publications may be refused and gaps will be told. The text says why.
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

/// Why the broker could not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// No connection within the time allowed. The publication was not sent: trying again is safe.
    #[error("the broker cannot be reached")]
    Unavailable,
    /// The connection was lost after the publication was sent and before it was acknowledged: it may or
    /// may not have been delivered.
    #[error("the connection to the broker was lost before it acknowledged")]
    Unknown,
    /// The broker answered that it cannot at the moment, and did nothing: trying again is safe.
    #[error("the broker cannot at the moment: {0}")]
    NotNow(Arc<str>),
    /// The broker does not let this node into the room. Trying again will not help by itself.
    #[error("the broker does not allow it: {0}")]
    Forbidden(Arc<str>),
    /// The broker refused, and did nothing. Trying again will not help by itself.
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

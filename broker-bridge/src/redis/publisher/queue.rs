//! The queue before one connection for publications.
//!
//! Owns the bound in bytes, and that each request is settled once. Each request is charged its payload and
//! [`REQUEST_BYTES`] for itself, so that the bound holds for their number too, and is charged until it is settled:
//! what is in flight counts.

use std::{num::NonZeroU64, sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, mpsc};

use crate::{Accepted, BrokerError, PublishRequest, RoomName, metrics::BrokerMetrics, redis::clock::Clock};

/// The charge for a queued request besides its payload, in bytes.
const REQUEST_BYTES: usize = 320;
const _: () =
    assert!(size_of::<Outgoing>() <= REQUEST_BYTES, "a queued request is charged less than it takes");

/// The sending side of one queue.
#[derive(Debug)]
pub(in crate::redis) struct Queue {
    sender: mpsc::Sender<Outgoing>,
    space: Arc<Semaphore>,
    capacity: usize,
    time_limit: Duration,
    clock: Arc<Clock>,
    metrics: Arc<BrokerMetrics>,
}

impl Queue {
    /// A queue of `capacity` bytes, and its receiver.
    pub(in crate::redis) fn new(
        capacity: usize,
        time_limit: Duration,
        clock: Arc<Clock>,
        metrics: Arc<BrokerMetrics>,
    ) -> (Self, mpsc::Receiver<Outgoing>) {
        // A semaphore counts at most `u32::MAX` at once.
        let capacity = capacity.clamp(REQUEST_BYTES, (u32::MAX >> 3) as usize);
        // The semaphore bounds the number of requests, so this channel is never full.
        let (sender, receiver) = mpsc::channel(capacity / REQUEST_BYTES);
        let space = Arc::new(Semaphore::new(capacity));
        (Self { sender, space, capacity, time_limit, clock, metrics }, receiver)
    }

    /// See [`Broker::try_publish`](crate::Broker::try_publish).
    #[allow(clippy::result_large_err, reason = "the contract gives the request back")]
    pub(in crate::redis) fn try_publish(&self, request: PublishRequest) -> Result<(), PublishRequest> {
        match Arc::clone(&self.space).try_acquire_many_owned(self.charge(&request)) {
            Ok(space) => {
                self.enqueue(self.outgoing(request), space);
                Ok(())
            }
            Err(TryAcquireError::NoPermits) => Err(request),
            Err(TryAcquireError::Closed) => {
                drop(self.outgoing(request));
                Ok(())
            }
        }
    }

    /// See [`Broker::publish`](crate::Broker::publish).
    pub(in crate::redis) async fn publish(&self, request: PublishRequest) {
        let charge = self.charge(&request);
        // Created first, so that dropping the future settles it.
        let outgoing = self.outgoing(request);
        if let Ok(space) = Arc::clone(&self.space).acquire_many_owned(charge).await {
            self.enqueue(outgoing, space);
        }
    }

    /// Closes the queue. Requests that wait for space are settled as [`BrokerError::Closed`].
    pub(in crate::redis) fn close(&self) {
        self.space.close();
    }

    /// A publication larger than the whole queue waits until the queue is empty.
    fn charge(&self, request: &PublishRequest) -> u32 {
        let bytes = request.publication.data.bytes().len().saturating_add(REQUEST_BYTES).min(self.capacity);
        u32::try_from(bytes).unwrap_or(u32::MAX)
    }

    fn outgoing(&self, request: PublishRequest) -> Outgoing {
        Outgoing {
            request: Some(request),
            until: self.clock.now() + self.time_limit,
            space: None,
            sent: false,
            is_repeated: false,
            in_doubt: false,
            number: None,
            metrics: Arc::clone(&self.metrics),
        }
    }

    fn enqueue(&self, mut outgoing: Outgoing, space: OwnedSemaphorePermit) {
        self.metrics.publish_queue_bytes.add(bytes_of(&space));
        outgoing.space = Some(space);
        // If the channel is closed, the request is dropped, which settles it as closed.
        let _ = self.sender.try_send(outgoing);
    }
}

/// A request in the queue or in flight. Dropped unsettled, it settles as [`BrokerError::Unknown`] if it has been
/// handed to a connection, and as [`BrokerError::Closed`] if not.
#[derive(Debug)]
pub(in crate::redis) struct Outgoing {
    /// Taken when it is settled.
    pub(super) request: Option<PublishRequest>,
    /// Until when it may wait for a connection, by the broker's clock.
    pub(super) until: Duration,
    space: Option<OwnedSemaphorePermit>,
    /// It has been handed to a connection.
    pub(super) sent: bool,
    /// The server lacked the functions when it was first sent.
    pub(super) is_repeated: bool,
    /// The server may have executed it on an earlier connection. So no error can say that nothing was done.
    pub(super) in_doubt: bool,
    /// Its number among those of its connection, by which it can be found in the log if the answer is lost.
    pub(super) number: Option<NonZeroU64>,
    metrics: Arc<BrokerMetrics>,
}

impl Outgoing {
    pub(super) fn settle(mut self, outcome: Result<Accepted, BrokerError>) {
        self.settle_once(outcome);
    }

    fn settle_once(&mut self, outcome: Result<Accepted, BrokerError>) {
        if let Some(request) = self.request.take() {
            let outcome = if self.in_doubt { outcome.or(Err(BrokerError::Unknown)) } else { outcome };
            self.metrics.published(&outcome);
            if let (Ok(accepted), Some(_)) = (&outcome, request.history) {
                self.metrics.history.recorded(accepted);
            }
            request.receipt.settle(outcome);
        }
    }

    /// Whether it is to be recorded.
    pub(super) fn is_recorded(&self) -> bool {
        self.request.as_ref().is_some_and(|request| request.history.is_some())
    }

    /// Whether the server recognizes it if it is sent again.
    pub(super) fn has_id(&self) -> bool {
        self.request.as_ref().is_some_and(|request| request.id.is_some())
    }

    pub(super) fn room(&self) -> Option<&RoomName> {
        self.request.as_ref().map(|request| &request.room)
    }

    pub(super) fn is_for(&self, room: &RoomName) -> bool {
        self.room() == Some(room)
    }

    pub(super) fn payload_bytes(&self) -> usize {
        self.request.as_ref().map_or(0, |request| request.publication.data.bytes().len())
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let Some(space) = &self.space {
            self.metrics.publish_queue_bytes.sub(bytes_of(space));
        }
        self.settle_once(Err(if self.sent { BrokerError::Unknown } else { BrokerError::Closed }));
    }
}

fn bytes_of(space: &OwnedSemaphorePermit) -> i64 {
    i64::try_from(space.num_permits()).unwrap_or(i64::MAX)
}

//! Publications that are to be recorded, on one connection: whether its server has the functions for it, and what must be
//! sent once more because it had not.
//!
//! The functions are checked before the first such publication of a connection, through a connection of the pool, and
//! loaded if they are missing or old. Others wait behind it, so that the order is kept. The functions may also disappear:
//! `FUNCTION FLUSH`, or a restart without persistence that the connection does not notice. Then the server answers each
//! call that nothing was done. When everything in flight is answered, the functions are loaded again and the calls are
//! repeated in their order. Somebody else may load them in between; a publication that was overtaken by a later one of its
//! room is refused, because repeating it would break the room's order.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::queue::Outgoing;
use crate::{BrokerError, RoomName};

/// Makes sure that the server has the functions.
pub(in crate::redis) type LoadFunctions =
    Arc<dyn Fn() -> BoxFuture<'static, Result<(), BrokerError>> + Send + Sync>;

/// How long the functions are not tried to be loaded again after a failure. Until then publications get the same error.
const RETRY: Duration = Duration::from_secs(1);

/// See the [module](self).
pub(super) struct Recording {
    load: LoadFunctions,
    functions: Functions,
    /// To be sent again, in the order in which they were sent: the server has done nothing for these, because it lacked the
    /// functions, or it knows by their ids whether it has.
    returned: VecDeque<Outgoing>,
}

/// Whether the server has the functions.
enum Functions {
    Unknown,
    Loading(BoxFuture<'static, Result<(), BrokerError>>),
    Present,
    /// They could not be loaded, at this time.
    Failed(BrokerError, Instant),
}

/// Whether a publication may be sent.
pub(super) enum Admission {
    Now,
    /// When [`Recording::poll_loaded`] is ready.
    Later,
    Never(BrokerError),
}

impl Recording {
    pub(super) fn new(load: LoadFunctions) -> Self {
        Self { load, functions: Functions::Unknown, returned: VecDeque::new() }
    }

    /// There is a new connection, perhaps to another server.
    pub(super) fn reconnected(&mut self) {
        self.functions = Functions::Unknown;
    }

    /// Whether a publication that is to be recorded may be sent.
    pub(super) fn admit(&mut self) -> Admission {
        match &self.functions {
            Functions::Present => return Admission::Now,
            Functions::Failed(error, at) if at.elapsed() < RETRY => return Admission::Never(error.clone()),
            Functions::Loading(_) => {}
            Functions::Unknown | Functions::Failed(..) => self.functions = Functions::Loading((self.load)()),
        }
        Admission::Later
    }

    /// Whether publications wait for the functions.
    pub(super) fn is_loading(&self) -> bool {
        matches!(self.functions, Functions::Loading(_))
    }

    /// Ready when publications need not wait for the functions any more. Pending if they do not wait.
    pub(super) fn poll_loaded(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Functions::Loading(loading) = &mut self.functions else { return Poll::Pending };
        self.functions = match ready!(loading.as_mut().poll(cx)) {
            Ok(()) => Functions::Present,
            Err(error) => Functions::Failed(error, Instant::now()),
        };
        Poll::Ready(())
    }

    /// The server has done nothing for this publication, because it lacks the functions.
    pub(super) fn give_back(&mut self, mut outgoing: Outgoing) {
        outgoing.sent = false;
        outgoing.is_repeated = true;
        self.functions = Functions::Unknown;
        self.returned.push_back(outgoing);
    }

    /// The connection was lost before the answer to this publication. It is settled as unknown, unless the server will
    /// recognize it.
    pub(super) fn in_doubt(&mut self, mut outgoing: Outgoing) {
        if outgoing.has_id() {
            outgoing.in_doubt = true;
            self.returned.push_back(outgoing);
        }
    }

    /// A publication in this room was accepted. Those that were given back came before it.
    pub(super) fn accepted(&mut self, room: &RoomName) {
        if self.returned.iter().any(|outgoing| outgoing.is_for(room)) {
            let returned = std::mem::take(&mut self.returned);
            let (overtaken, others): (Vec<_>, Vec<_>) =
                returned.into_iter().partition(|outgoing| outgoing.is_for(room));
            self.returned = others.into();
            for outgoing in overtaken {
                let text = "the server lacked the functions, and has them again for later publications";
                outgoing.settle(Err(BrokerError::NotNow(text.into())));
            }
        }
    }

    /// Whether publications have been given back.
    pub(super) fn has_returned(&self) -> bool {
        !self.returned.is_empty()
    }

    /// Takes back the last publication that was given back.
    pub(super) fn take_last(&mut self) -> Option<Outgoing> {
        self.returned.pop_back()
    }
}

//! Publications that are to be recorded, on one connection: what has to happen before the first of them is sent, and what
//! must be sent once more.
//!
//! Before the first such publication of a connection, the functions are checked through a connection of the pool, and
//! loaded if they are missing or old. Then the connection introduces itself as a [writer](super::verification), and asks
//! what became of publications whose connection was lost before. Others wait behind, so that the order is kept.
//!
//! The functions may also disappear: `FUNCTION FLUSH`, or a restart without persistence that the connection does not
//! notice. Then the server answers each call that nothing was done. When everything in flight is answered, the functions
//! are loaded again and the calls are repeated in their order. Somebody else may load them in between; a publication that
//! was overtaken by a later one of its room is refused, because repeating it would break the room's order.

use std::{
    collections::{HashSet, VecDeque},
    num::NonZeroU64,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::{
    pipeline::Reply,
    queue::Outgoing,
    verification::{Fate, Verdict, Verdicts, Writer, client_id},
};
use crate::{
    Accepted, BrokerError, RoomName,
    metrics::BrokerMetrics,
    redis::{keys::Topics, resp::Value},
};

/// Makes sure that the server has the functions.
pub(in crate::redis) type LoadFunctions =
    Arc<dyn Fn() -> BoxFuture<'static, Result<(), BrokerError>> + Send + Sync>;

/// How long the functions are not tried to be loaded again after a failure. Until then publications get the same error.
const RETRY: Duration = Duration::from_secs(1);
/// The same while publications are in doubt, which all others wait for.
const RETRY_IN_DOUBT: Duration = Duration::from_millis(100);

/// See the [module](self).
pub(super) struct Recording {
    load: LoadFunctions,
    topics: Topics,
    metrics: Arc<BrokerMetrics>,
    functions: Functions,
    /// To be sent again, in the order in which they were sent: the server has done nothing for these, because it lacked the
    /// functions; or it knows by their ids whether it has; or they are in doubt.
    returned: VecDeque<Outgoing>,
    /// The connection that sent those in doubt, and until when they may be looked for.
    doubted: Option<(Writer, Duration)>,
    /// This connection, once it has introduced itself.
    writer: Option<Writer>,
    /// The number of the next publication that it sends.
    number: NonZeroU64,
    /// The server's ID of this connection.
    client: Option<i64>,
}

/// Whether the server has the functions.
enum Functions {
    Unknown,
    Loading(BoxFuture<'static, Result<(), BrokerError>>),
    /// It has, and the connection has something to ask first.
    Asking(Asking),
    Present,
    /// They could not be loaded, at this time.
    Failed(BrokerError, Instant),
}

/// What a connection asks before it records publications.
#[derive(Default)]
struct Asking {
    /// To be sent.
    next: VecDeque<Question>,
    /// Sent and not answered.
    sent: VecDeque<Question>,
    name: Box<str>,
    /// The answer to `INFO server`.
    info: Option<Value>,
    verdicts: Verdicts,
}

enum Question {
    Info,
    Begin,
    Kill,
    /// From this number on.
    Verify(RoomName, NonZeroU64),
}

/// Whether a publication may be sent.
pub(super) enum Admission {
    Now,
    /// When [`Recording::is_preparing`] is over.
    Later,
    Never(BrokerError),
}

impl Recording {
    pub(super) fn new(load: LoadFunctions, topics: Topics, metrics: Arc<BrokerMetrics>) -> Self {
        Self {
            load,
            topics,
            metrics,
            functions: Functions::Unknown,
            returned: VecDeque::new(),
            doubted: None,
            writer: None,
            number: NonZeroU64::MIN,
            client: None,
        }
    }

    /// There is a new connection, perhaps to another server.
    pub(super) fn reconnected(&mut self) {
        self.functions = Functions::Unknown;
        (self.writer, self.client) = (None, None);
    }

    /// The server has answered `HELLO` on this connection.
    pub(super) fn greeted(&mut self, greeting: &Value) {
        self.client = client_id(greeting).or(self.client);
    }

    /// Whether a publication that is to be recorded may be sent.
    pub(super) fn admit(&mut self) -> Admission {
        match &self.functions {
            Functions::Present => return Admission::Now,
            Functions::Failed(error, at) if at.elapsed() < RETRY => return Admission::Never(error.clone()),
            Functions::Loading(_) | Functions::Asking(_) => {}
            Functions::Unknown | Functions::Failed(..) => self.functions = Functions::Loading((self.load)()),
        }
        Admission::Later
    }

    /// Whether publications wait for the functions, or for answers to the connection's questions.
    pub(super) fn is_preparing(&self) -> bool {
        matches!(self.functions, Functions::Loading(_) | Functions::Asking(_))
    }

    /// Begins to verify what is in doubt, if anything is.
    pub(super) fn prepare(&mut self) {
        if self.doubted.is_some() {
            if let Functions::Failed(_, at) = &self.functions
                && at.elapsed() >= RETRY_IN_DOUBT
            {
                self.functions = Functions::Unknown;
            }
            let _ = self.admit();
        }
    }

    /// Ready when the functions are loaded, or cannot be loaded. Pending if nothing is being loaded.
    pub(super) fn poll_loaded(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Functions::Loading(loading) = &mut self.functions else { return Poll::Pending };
        match ready!(loading.as_mut().poll(cx)) {
            Ok(()) => {
                let name = Writer::new_name().unwrap_or_default();
                let next = [Question::Info, Question::Begin].into();
                self.functions = Functions::Asking(Asking { next, name, ..Asking::default() });
            }
            Err(error) => {
                // The pool may have lost its connections as well, and is about to get others.
                if !error.is_retryable() {
                    self.give_up(&error.to_string());
                }
                self.functions = Functions::Failed(error, Instant::now());
            }
        }
        Poll::Ready(())
    }

    /// The next command to send on this connection before publications, if there is one.
    pub(super) fn next_question(&mut self) -> Option<Vec<Vec<u8>>> {
        let Functions::Asking(asking) = &mut self.functions else { return None };
        if self.doubted.is_none() {
            // Nobody waits for it any more.
            asking.next.retain(|question| matches!(question, Question::Info | Question::Begin));
            if asking.next.is_empty() && asking.sent.is_empty() {
                self.functions = Functions::Present;
                return None;
            }
        }
        let question = asking.next.pop_front()?;
        let call = |function: &str, keys: &str, rest: Vec<Vec<u8>>| {
            [vec![b"FCALL".to_vec(), function.into(), keys.into()], rest].concat()
        };
        let command = match &question {
            Question::Info => vec![b"INFO".to_vec(), b"server".to_vec()],
            Question::Begin => call("tidegate_begin", "0", vec![asking.name.as_bytes().to_vec()]),
            Question::Kill => self.doubted.as_ref().map(|(writer, _)| writer.kill()).unwrap_or_default(),
            Question::Verify(room, first) => {
                let name = self.doubted.as_ref().map_or("", |(writer, _)| &writer.name);
                let rest =
                    [self.topics.log(room).concat(), name.as_bytes().to_vec(), first.to_string().into()];
                call("tidegate_verify", "1", rest.into())
            }
        };
        asking.sent.push_back(question);
        Some(command)
    }

    /// The answer to the oldest question.
    pub(super) fn answered(&mut self, reply: Reply) {
        let Functions::Asking(asking) = &mut self.functions else { return };
        let Some(question) = asking.sent.pop_front() else { return };
        match question {
            Question::Info => asking.info = reply.ok(),
            Question::Begin => {
                let info = asking.info.take().filter(|_| reply.is_ok());
                self.writer = info.and_then(|info| Writer::new(&asking.name, self.client, &info));
                match (&self.doubted, &self.writer) {
                    (None, _) => {}
                    (Some((old, _)), Some(new)) if old.shares_run_with(new) => {
                        asking.next.push_back(Question::Kill);
                    }
                    (Some(_), Some(_)) => self.give_up("the server was restarted or replaced"),
                    (Some(_), None) => {
                        let error = reply.err().map(|answer| answer.text);
                        self.give_up(error.as_deref().unwrap_or("the server hides its run ID"));
                    }
                }
            }
            Question::Kill => match reply {
                Ok(_) => {
                    let mut rooms = HashSet::new();
                    let doubts = self.returned.iter().filter_map(|outgoing| {
                        let number = outgoing.number?;
                        let room = outgoing.room().filter(|room| rooms.insert((*room).clone()))?;
                        Some(Question::Verify(room.clone(), number))
                    });
                    asking.next.extend(doubts);
                    self.resolve_if_done();
                }
                Err(answer) => self.give_up(&format!(
                    "the server does not close the old connection ({}): permit +client|kill",
                    answer.text
                )),
            },
            Question::Verify(room, _) => {
                match reply {
                    Ok(value) => {
                        if let Some(verdict) = Verdict::parse(&value) {
                            asking.verdicts.insert(room, verdict);
                        }
                    }
                    Err(answer) => {
                        tracing::warn!(%room, error = %answer.text, "cannot verify publications in a room");
                    }
                }
                self.resolve_if_done();
            }
        }
        if let Functions::Asking(asking) = &self.functions
            && asking.next.is_empty()
            && asking.sent.is_empty()
        {
            self.functions = Functions::Present;
        }
    }

    /// Settles what is in doubt once everything is answered, and keeps what must be sent again.
    fn resolve_if_done(&mut self) {
        if let Functions::Asking(asking) = &mut self.functions
            && asking.next.is_empty()
            && asking.sent.is_empty()
        {
            let verdicts = std::mem::take(&mut asking.verdicts);
            self.resolve(&verdicts);
        }
    }

    fn resolve(&mut self, verdicts: &Verdicts) {
        self.doubted = None;
        let mut settled = Vec::new();
        let mut later = HashSet::new();
        let mut again = VecDeque::new();
        for mut outgoing in std::mem::take(&mut self.returned).into_iter().rev() {
            let Some(room) = outgoing.room().cloned() else { continue };
            let fate = outgoing.number.take().map(|number| verdicts.of(&room, number.get()));
            let is_overtaken = later.contains(&room);
            match fate {
                Some(Fate::Recorded(cursor)) => {
                    later.insert(room);
                    settled.push((outgoing, Ok(Accepted { cursor: Some(cursor), duplicate: false })));
                }
                Some(Fate::Unknown) => settled.push((outgoing, Err(BrokerError::Unknown))),
                None if outgoing.in_doubt => again.push_front(outgoing),
                Some(Fate::Missing) | None if is_overtaken => settled.push((outgoing, Err(overtaken()))),
                Some(Fate::Missing) | None => {
                    outgoing.sent = false;
                    again.push_front(outgoing);
                    if fate.is_some() {
                        self.metrics.history.verified_missing.inc();
                    }
                }
            }
        }
        let mut unknown = 0;
        for (outgoing, outcome) in settled.into_iter().rev() {
            match &outcome {
                Ok(_) => self.metrics.history.verified_recorded.inc(),
                Err(BrokerError::Unknown) => unknown += 1,
                Err(_) => self.metrics.history.verified_missing.inc(),
            }
            outgoing.settle(outcome);
        }
        self.metrics.history.verified_unknown.inc_by(unknown);
        if unknown > 0 {
            tracing::warn!(count = unknown, "the log does not show what became of publications");
        }
        self.returned = again;
    }

    /// What is in doubt cannot be verified.
    fn give_up(&mut self, reason: &str) {
        if self.doubted.is_some() {
            tracing::warn!(reason, "cannot find out what became of publications whose connection was lost");
            self.resolve(&Verdicts::default());
        }
    }

    /// The number of a publication that is about to be sent, and the name of the writer. `None` if the connection is no
    /// writer, or the server recognizes the publication by its id.
    pub(super) fn number(&mut self, outgoing: &Outgoing) -> Option<(&str, NonZeroU64)> {
        let writer = self.writer.as_ref().filter(|_| outgoing.is_recorded() && !outgoing.has_id())?;
        let next = self.number.checked_add(1)?;
        Some((&writer.name, std::mem::replace(&mut self.number, next)))
    }

    /// The server has done nothing for this publication, because it lacks the functions.
    pub(super) fn give_back(&mut self, mut outgoing: Outgoing) {
        outgoing.sent = false;
        outgoing.number = None;
        outgoing.is_repeated = true;
        self.functions = Functions::Unknown;
        self.returned.push_back(outgoing);
    }

    /// The connection was lost before the answer to this publication. It is settled as unknown, unless it can be verified
    /// until `until`, or the server will recognize it.
    pub(super) fn in_doubt(&mut self, mut outgoing: Outgoing, until: Duration) {
        if outgoing.has_id() {
            outgoing.in_doubt = true;
            self.returned.push_back(outgoing);
        } else if let (Some(_), Some(writer)) = (outgoing.number, &self.writer) {
            self.doubted.get_or_insert_with(|| (writer.clone(), until));
            self.returned.push_back(outgoing);
        }
    }

    /// A publication in this room was accepted. Those that were given back came before it.
    pub(super) fn accepted(&mut self, room: &RoomName) {
        if self.returned.iter().any(|outgoing| outgoing.is_for(room)) {
            let returned = std::mem::take(&mut self.returned);
            let (earlier, others): (Vec<_>, Vec<_>) =
                returned.into_iter().partition(|outgoing| outgoing.is_for(room));
            self.returned = others.into();
            for outgoing in earlier {
                outgoing.settle(Err(overtaken()));
            }
        }
    }

    /// Settles what has waited for too long.
    pub(super) fn expire(&mut self, now: Duration) {
        if self.due().is_none_or(|due| now < due) {
            return;
        }
        let mut left = VecDeque::new();
        for outgoing in std::mem::take(&mut self.returned) {
            if self.due_of(&outgoing) > now {
                left.push_back(outgoing);
            } else if outgoing.number.is_some() {
                self.metrics.history.verified_unknown.inc();
                outgoing.settle(Err(BrokerError::Unknown));
            } else {
                outgoing.settle(Err(BrokerError::Unavailable));
            }
        }
        self.returned = left;
        if self.returned.iter().all(|outgoing| outgoing.number.is_none()) {
            self.doubted = None;
        }
    }

    fn due_of(&self, outgoing: &Outgoing) -> Duration {
        let doubted = self.doubted.as_ref().filter(|_| outgoing.number.is_some());
        doubted.map_or(outgoing.until, |(_, until)| *until)
    }

    /// When something has waited for too long.
    pub(super) fn due(&self) -> Option<Duration> {
        self.returned.iter().map(|outgoing| self.due_of(outgoing)).min()
    }

    /// Whether something must be sent once more, or is in doubt.
    pub(super) fn has_returned(&self) -> bool {
        !self.returned.is_empty()
    }

    /// Takes back the last publication that must be sent once more. `None` while something is in doubt.
    pub(super) fn take_last(&mut self) -> Option<Outgoing> {
        if self.doubted.is_some() { None } else { self.returned.pop_back() }
    }
}

fn overtaken() -> BrokerError {
    BrokerError::NotNow("the server refused it, and has accepted a later publication of the room".into())
}

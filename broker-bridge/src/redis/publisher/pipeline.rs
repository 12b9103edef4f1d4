//! One established connection: the commands that are sent, and the answers to them.
//!
//! Owns the byte stream, and the order of what is in flight: the server answers in order, so the next answer belongs to
//! the oldest command. What an answer means for the connection is its owner's business.
//!
//! # One turn
//!
//! The task that drives a connection shares its thread with others. So a turn is one write and one read, and a task that
//! finds the connection ready again yields first.
//!
//! A read is not repeated to find out that the socket is empty. After a read of fewer bytes than were asked for, tokio
//! knows that a TCP or unix socket has nothing more, and the next poll waits for epoll without a system call
//! (`PollEvented::poll_read`). The same holds for a write that was taken in part.

use std::{
    collections::VecDeque,
    io,
    num::NonZeroU64,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{io::AsyncWrite as _, task::yield_now};

use super::{Lost, output::Output, queue::Outgoing};
use crate::redis::{
    answer::Answer,
    clock::Clock,
    connection::Connection,
    keys::Topics,
    resp::{Frame, Reader, Value},
};

/// The maximum number of publications in flight.
const IN_FLIGHT: usize = 512;
/// No publication is sent while the payloads in flight reach this many bytes.
const IN_FLIGHT_BYTES: usize = 1024 * 1024;

/// The time limits for answers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// From the sending of a publication.
    pub(super) publication: Duration,
    /// From the sending of a canary, or from the answer before its own if that comes later.
    pub(super) canary: Duration,
}

/// A connection. Dropping it closes the connection and settles what is in flight as unknown. See also [`Pipeline::end`].
pub(super) struct Pipeline {
    stream: Connection,
    reader: Reader,
    output: Output,
    /// What was written is still in a buffer of the stream (TLS).
    unflushed: bool,
    /// Why nothing more can be written. Answers may still arrive.
    broken: Option<io::Error>,
    /// Sent and not answered, the oldest first.
    in_flight: VecDeque<Sent>,
    /// The payloads in flight, in bytes.
    bytes: usize,
    /// A canary is in flight.
    canary: bool,
    /// How many turns have found the connection ready, without waiting in between.
    turns: u32,
    limits: Limits,
    clock: Arc<Clock>,
}

/// A command in flight.
struct Sent {
    what: What,
    /// When it was sent, or a canary's time limit was restarted, by the broker's clock.
    since: Duration,
}

#[expect(clippy::large_enum_variant, reason = "nearly all are publications; a box would cost each of them")]
enum What {
    Publication(Outgoing),
    /// `HELLO`, and a publication to the canaries' topic.
    Canary,
    /// The same after the answer to `HELLO`.
    Greeted(Reply),
    /// Any other command.
    Question,
}

/// What the server answers to one command.
pub(super) type Reply = Result<Value, Answer>;

/// Something that was sent, and the answer.
#[expect(clippy::large_enum_variant, reason = "nearly all are publications; a box would cost each of them")]
pub(super) enum Answered {
    Publication(Outgoing, Reply),
    Canary { hello: Reply, published: Reply },
    Question(Reply),
}

impl Pipeline {
    pub(super) fn new(stream: Connection, limits: Limits, clock: Arc<Clock>) -> Self {
        Self {
            stream,
            // Nothing is subscribed here, so there are no payloads.
            reader: Reader::new(0),
            output: Output::default(),
            unflushed: false,
            broken: None,
            in_flight: VecDeque::new(),
            bytes: 0,
            canary: false,
            turns: 0,
            limits,
            clock,
        }
    }

    /// Closes the connection, and passes on the publications that were not answered, in the order in which they were sent.
    pub(super) fn end(self, unanswered: impl FnMut(Outgoing)) {
        drop(self.stream);
        let publications = self.in_flight.into_iter().filter_map(|sent| match sent.what {
            What::Publication(outgoing) => Some(outgoing),
            What::Canary | What::Greeted(_) | What::Question => None,
        });
        publications.for_each(unanswered);
    }

    /// Whether everything that was sent is answered.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Whether a publication may be sent now.
    pub(super) fn has_room(&self) -> bool {
        self.in_flight.len() < IN_FLIGHT && self.bytes < IN_FLIGHT_BYTES && !self.output.is_full()
    }

    /// Whether a canary may be sent now: only one is in flight.
    pub(super) fn has_room_for_canary(&self) -> bool {
        !self.canary && !self.output.is_full()
    }

    /// Sends a publication, at the time `now`, as the one of this number of a writer. There must be
    /// [room](Self::has_room).
    pub(super) fn publish(
        &mut self,
        mut outgoing: Outgoing,
        topics: &Topics,
        number: Option<(&str, NonZeroU64)>,
        now: Duration,
    ) {
        let Some(request) = &outgoing.request else { return };
        self.output.publish(topics, request, number);
        outgoing.number = number.map(|(_, number)| number);
        self.bytes += outgoing.payload_bytes();
        outgoing.sent = true;
        self.in_flight.push_back(Sent { what: What::Publication(outgoing), since: now });
    }

    /// Sends a canary, and `HELLO` before it, which asks for the server's role. There must be
    /// [room](Self::has_room_for_canary).
    pub(super) fn canary(&mut self, topic: &[u8], canary: &[u8]) {
        self.output.command(&[b"HELLO", b"3"]);
        self.output.command(&[b"PUBLISH", topic, canary]);
        self.canary = true;
        self.in_flight.push_back(Sent { what: What::Canary, since: self.clock.now() });
    }

    /// Sends another command. There must be [room](Self::has_room).
    pub(super) fn ask(&mut self, command: &[Vec<u8>]) {
        self.output.command(&command.iter().map(Vec::as_slice).collect::<Vec<_>>());
        self.in_flight.push_back(Sent { what: What::Question, since: self.clock.now() });
    }

    /// When the time limit of the oldest command in flight is over, by the broker's clock, and that limit.
    pub(super) fn due(&self) -> Option<(Duration, Duration)> {
        self.in_flight.front().map(|sent| {
            let limit = match sent.what {
                What::Publication(_) | What::Question => self.limits.publication,
                What::Canary | What::Greeted(_) => self.limits.canary,
            };
            (sent.since + limit, limit)
        })
    }

    /// Writes once and reads once. Ready when something was read, or when there is room that there was not before; an
    /// error when the connection is lost and everything that had arrived has been read.
    pub(super) fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Lost>> {
        let wrote = self.poll_write(cx);
        let read = pin!(self.reader.fill(&mut self.stream)).poll(cx);
        let end = match read {
            Poll::Ready(Ok(0)) => Some(Lost::Closed),
            Poll::Ready(Ok(_)) => None,
            Poll::Ready(Err(error)) => Some(error.into()),
            Poll::Pending if self.broken.is_some() => Some(Lost::Closed),
            Poll::Pending if wrote => None,
            Poll::Pending => {
                self.turns = 0;
                return Poll::Pending;
            }
        };
        self.turns += 1;
        Poll::Ready(match end {
            // The first error says more than what follows from it.
            Some(end) => Err(self.broken.take().map_or(end, Lost::Io)),
            None => Ok(()),
        })
    }

    /// Lets other tasks run, if the last turn was not the first one without waiting.
    pub(super) async fn yield_if_busy(&mut self) {
        if self.turns > 1 {
            self.turns = 0;
            yield_now().await;
        }
    }

    /// The next answer that has been read, if there is one.
    pub(super) fn next(&mut self) -> Result<Option<Answered>, Lost> {
        loop {
            let reply = match self.reader.next()? {
                None => return Ok(None),
                Some(Frame::Reply(value)) => Ok(value),
                Some(Frame::Error(text)) => Err(Answer::to(&text)),
                // Pushes answer no command.
                Some(_) => continue,
            };
            let answered = match (self.in_flight.pop_front(), reply) {
                (Some(Sent { what: What::Publication(outgoing), .. }), reply) => {
                    self.bytes -= outgoing.payload_bytes();
                    Answered::Publication(outgoing, reply)
                }
                (Some(Sent { what: What::Question, .. }), reply) => Answered::Question(reply),
                (Some(Sent { what: What::Canary, since }), hello) => {
                    self.in_flight.push_front(Sent { what: What::Greeted(hello), since });
                    continue;
                }
                (Some(Sent { what: What::Greeted(hello), .. }), published) => {
                    self.canary = false;
                    Answered::Canary { hello, published }
                }
                (None, Ok(_)) => return Err(Lost::OutOfStep),
                (None, Err(answer)) => return Err(Lost::Refused(answer.text)),
            };
            // The server answers in order, so this answer means that it now works on the next command. The time limit
            // of a canary starts now. That of a publication does not: its outcome is promised within the limit.
            if let Some(Sent { what: What::Canary, since }) = self.in_flight.front_mut() {
                *since = self.clock.now();
            }
            return Ok(Some(answered));
        }
    }

    /// Writes once. Returns whether there is room now that there was not before, or more to write.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> bool {
        let mut stream = Pin::new(&mut self.stream);
        if self.broken.is_some() {
            return false;
        }
        let mut again = false;
        if !self.output.is_empty() {
            let was_full = self.output.is_full();
            match self.output.poll_write(cx, stream.as_mut()) {
                Poll::Pending => return false,
                Poll::Ready(Err(error)) => {
                    self.broken = Some(error);
                    return false;
                }
                Poll::Ready(Ok(())) => {
                    self.unflushed = true;
                    again = was_full || !self.output.is_empty();
                }
            }
        }
        if self.unflushed && self.output.is_empty() {
            match stream.poll_flush(cx) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(error)) => self.broken = Some(error),
            }
        }
        again
    }
}

//! What a connection's own task does: it attaches the transport, reads it, and waits for it.

use std::{
    io,
    task::{Context, Poll},
    time::SystemTime,
};

use bytes::Bytes;
use tokio::task::AbortHandle;

use super::{Attachment, Connection, MAX_IN_FLIGHT, Phase};
use crate::{
    limits::Allowance,
    protocol::Message,
    session::{Charge, Effect, Effects, Session, Surroundings},
    shard::{stream::Stream, tally::Tally, worker::Worker},
    vocabulary::CloseReason,
    websocket::{self, Event, ProtocolError},
};

/// Reads in a row before other tasks get their turn.
const READS_PER_TURN: usize = 4;
/// Cost of unread replies, in bytes plus 64 for each, at which a client is no longer read. Refusing requests
/// must not cost the node more than serving them.
const MAX_REPLIES: usize = 64 * 1024;
/// Bytes of frame headers that a message may have before they are charged without waiting for its end.
const MAX_OVERHEAD: usize = 4 * 1024;

impl Connection {
    /// Makes this socket the transport of the connection. `read_ahead` was read along with the handshake.
    pub fn attach_socket(&self, worker: &Worker, stream: Stream, read_ahead: &Bytes) {
        if matches!(&*self.attachment.borrow(), Attachment::Detached) {
            return; // cut during the upgrade
        }
        // The setting may have changed since the socket was accepted.
        stream.set_tcp_user_timeout(worker.settings().heartbeat.timeout);
        self.attachment.replace(Attachment::Socket { stream, shut: false });
        if !read_ahead.is_empty() {
            let mut bytes = read_ahead.to_vec();
            self.consume(worker, &mut bytes);
        }
        self.flush(worker);
    }

    /// Makes a response body the transport of the connection.
    pub fn attach_response(&self, http: AbortHandle) {
        self.attachment.replace(Attachment::Response(http));
    }

    /// Takes the next bytes for a response; `None` ends it.
    pub fn poll_response(&self, worker: &Worker, cx: &Context<'_>) -> Poll<Option<Bytes>> {
        self.set_waker(cx);
        self.offered.set(false);
        self.wants_write.set(false);
        let frame = self.outbound.borrow_mut().pop();
        self.count_outbound(worker);
        match (frame, self.phase.get()) {
            (Some(frame), _) => Poll::Ready(Some(frame)),
            (None, Phase::Closing(_)) => Poll::Ready(None),
            (None, _) => Poll::Pending,
        }
    }

    /// Reads and writes as far as the socket allows. Ready when the connection has ended.
    pub(super) fn poll_socket(&self, worker: &Worker, cx: &mut Context<'_>) -> Poll<()> {
        self.set_waker(cx);
        for _ in 0..READS_PER_TURN {
            if self.wants_write.get() {
                let ready = match &*self.attachment.borrow() {
                    Attachment::Socket { stream, .. } => stream.poll_write_ready(cx).is_ready(),
                    _ => return Poll::Ready(()),
                };
                if ready {
                    self.wants_write.set(false);
                    self.flush(worker);
                    continue;
                }
            }
            if self.must_pause() {
                return Poll::Pending; // woken when publications are settled or the socket becomes writable
            }
            let outcome = match &*self.attachment.borrow() {
                Attachment::Socket { stream, .. } => match stream.poll_read_ready(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) => Err(error),
                    Poll::Ready(Ok(())) => self.read(worker, stream),
                },
                _ => return Poll::Ready(()),
            };
            match outcome {
                Ok(0) => {
                    self.lost(worker, None);
                    return Poll::Ready(());
                }
                Ok(_) => {
                    if self.has_output() && !self.wants_write.get() {
                        self.flush(worker);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.lost(worker, Some(&error));
                    return Poll::Ready(());
                }
            }
        }
        // If this task woke itself directly, it would be polled again before the shard's turn or any other
        // readiness: a client that never pauses would occupy the thread for dozens of polls.
        let after_the_others = std::pin::pin!(tokio::task::yield_now());
        after_the_others.poll(cx)
    }

    fn read(&self, worker: &Worker, stream: &Stream) -> io::Result<usize> {
        let mut buffer = worker.scratch.borrow_mut();
        let read = stream.try_read(&mut buffer)?;
        self.note_received(worker.now());
        if let Some(bytes) = buffer.get_mut(..read) {
            self.consume(worker, bytes);
        }
        Ok(read)
    }

    fn consume(&self, worker: &Worker, bytes: &mut [u8]) {
        let max_message = worker.settings().limits.message_size.get();
        let before = self.decoder.borrow().heap_bytes();
        self.decode(worker, bytes, max_message);
        let after = self.decoder.borrow().heap_bytes();
        if before.max(after) > 0 {
            Self::count_incomplete(worker, before, after);
        }
        if after > 0 || self.is_blocked() {
            self.note_holding(worker);
        }
    }

    fn decode(&self, worker: &Worker, bytes: &mut [u8], max_message: usize) {
        let mut decoder = self.decoder.borrow_mut();
        let mut feed = decoder.feed(bytes, max_message);
        while !self.ignores_input.get() {
            let mut charge = Charge::default();
            match feed.next_paid(&mut |bytes| self.pay(worker, &mut charge, bytes)) {
                Ok(Some((event, size))) => {
                    let charge = charge.received(size + self.unpaid.take() as usize);
                    self.receive(worker, event, charge);
                }
                Ok(None) => {
                    let unpaid = feed.unfinished() + self.unpaid.get() as usize;
                    self.unpaid.set(u32::try_from(unpaid).unwrap_or(u32::MAX));
                    if unpaid > max_message + MAX_OVERHEAD {
                        // Endless fragments, each with almost no payload.
                        let bytes = self.unpaid.take() as usize;
                        self.with_session(worker, |session, around, effects| {
                            session.receive_other(bytes, around, effects);
                        });
                    }
                    return;
                }
                Err(error) => {
                    self.ignores_input.set(true);
                    if let (ProtocolError::NotPaidFor, Some(limit)) = (error, charge.refused()) {
                        worker.context.metrics.limited(limit);
                        self.begin_close(worker, CloseReason::OverLimit(limit));
                        return;
                    }
                    tracing::debug!(session = %self.id, %error, "the client violated the protocol");
                    let words = websocket::close_frame(error.close_code(), &error.to_string());
                    self.close_with(worker, broken_by(error), Some(words));
                }
            }
        }
    }

    /// Charges the bytes that a compressed message inflates to. Returns whether it may go on.
    fn pay(&self, worker: &Worker, charge: &mut Charge, bytes: usize) -> bool {
        let meters = worker.meters();
        let allowance = Allowance { session: &meters, node: worker.context.settings.limiters() };
        self.session.borrow().inflate(charge, bytes, &allowance)
    }

    fn receive(&self, worker: &Worker, event: Event<'_>, charge: Charge) {
        let size = charge.bytes_received();
        if let Phase::Closing(_) = self.phase.get() {
            // A close frame ends the wait. Anything else came too late.
            self.ignores_input.set(matches!(event, Event::Close(_)));
            return;
        }
        let message = match event {
            Event::Text(payload) => Message::Text(payload.into_bytes()),
            Event::Binary(payload) => Message::Binary(payload.into_bytes()),
            Event::Ping(payload) => {
                let pong = websocket::pong(payload);
                self.with_session(worker, |session, around, effects| {
                    if session.receive_other(size, around, effects) {
                        effects.push(Effect::Send(pong));
                    }
                });
                return;
            }
            Event::Pong(_) => {
                return self.with_session(worker, |session, around, effects| {
                    session.pong(size, around, effects);
                });
            }
            Event::Close(frame) => {
                self.ignores_input.set(true);
                let answer = websocket::close_answer(frame.map(|frame| frame.code));
                self.close_with(worker, CloseReason::Client, Some(answer));
                return;
            }
        };
        let (Message::Text(bytes) | Message::Binary(bytes)) = &message;
        Tally::add(&worker.tally.messages_in, 1);
        Tally::add(&worker.tally.payload_in, bytes.len());
        self.with_session(worker, |session, around, effects| {
            let mut commands = worker.take_commands();
            session.receive(message, charge, around, &mut commands, effects);
            worker.give_commands(commands);
        });
    }

    /// Passes something that the client did to the session, and runs the resulting effects.
    fn with_session(&self, worker: &Worker, act: impl FnOnce(&mut Session, &Surroundings<'_>, &mut Effects)) {
        let mut effects = worker.take_effects();
        {
            let settings = worker.settings();
            let meters = worker.meters();
            let around = Surroundings {
                authenticator: &settings.authenticator,
                now: SystemTime::now().into(),
                rooms_per_session: settings.limits.rooms_per_session,
                allowance: Allowance { session: &meters, node: worker.context.settings.limiters() },
            };
            act(&mut self.session.borrow_mut(), &around, &mut effects);
        }
        self.run(worker, &mut effects);
        worker.give_effects(effects);
    }

    fn must_pause(&self) -> bool {
        !matches!(self.phase.get(), Phase::Closing(_))
            && (self.in_flight.get() >= MAX_IN_FLIGHT
                || self.is_blocked()
                || self.outbound.borrow().replies() > MAX_REPLIES)
    }
}

fn broken_by(error: ProtocolError) -> CloseReason {
    match error {
        ProtocolError::InvalidUtf8 | ProtocolError::InvalidCloseReason => CloseReason::InvalidText,
        _ if error.close_code() == websocket::CloseCode::MESSAGE_TOO_BIG => CloseReason::MessageTooBig,
        _ => CloseReason::ProtocolError,
    }
}

//! What the driver tells a connection about its transport: it is there, it has input, it takes output.

use bytes::Bytes;

use super::{Attachment, Connection, Interest, MAX_IN_FLIGHT, Phase};
use crate::{
    auth::{AuthFailure, Identity},
    limits::Allowance,
    protocol::Message,
    session::{Charge, Effect, Effects, Session, Surroundings},
    shard::{
        state::State,
        tally::Tally,
        transport::{Response as _, Socket as _, Transport},
    },
    vocabulary::CloseReason,
    websocket::{self, Decoder, Event, ProtocolError},
};

/// Cost of unread replies, in bytes plus 64 for each, at which a client is no longer read. Refusing requests
/// must not cost the node more than serving them.
const MAX_REPLIES: usize = 64 * 1024;
/// Bytes of frame headers that a message may have before they are charged without waiting for its end.
const MAX_OVERHEAD: usize = 4 * 1024;

/// What a response gets when it asks for output.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// The next bytes.
    Bytes(Bytes),
    /// Nothing yet. The response is woken when there is something.
    Pending,
    /// The connection has ended.
    End,
}

impl<T: Transport> Connection<T> {
    /// Makes this socket the transport of the connection. `read_ahead` was read along with the handshake.
    pub fn attach_socket(&mut self, shard: &mut State, mut socket: T::Socket, read_ahead: &Bytes) {
        if matches!(self.attachment, Attachment::Detached) {
            return; // cut during the upgrade
        }
        // The setting may have changed since the socket was accepted.
        socket.set_heartbeat_timeout(shard.settings.heartbeat.timeout);
        self.attachment = Attachment::Socket { socket, shut: false };
        if !read_ahead.is_empty() {
            let mut bytes = read_ahead.to_vec();
            self.consume(shard, &mut bytes);
        }
        self.flush(shard);
    }

    /// Makes a response the transport of the connection.
    pub fn attach_response(&mut self, mut response: T::Response) {
        if matches!(self.attachment, Attachment::Detached) {
            return response.abort(); // cut before the response began
        }
        self.attachment = Attachment::Response(response);
    }

    /// The socket, and what the connection waits for from it. `None` if there is no socket any more.
    pub fn socket(&mut self) -> Option<(&mut T::Socket, Interest)> {
        let interest = Interest { read: !self.must_pause(), write: self.wants_write };
        match &mut self.attachment {
            Attachment::Socket { socket, .. } => Some((socket, interest)),
            Attachment::Pending | Attachment::Response(_) | Attachment::Detached => None,
        }
    }

    /// The response, if that is the transport.
    pub fn response(&mut self) -> Option<&mut T::Response> {
        match &mut self.attachment {
            Attachment::Response(response) => Some(response),
            Attachment::Pending | Attachment::Socket { .. } | Attachment::Detached => None,
        }
    }

    /// Takes the next bytes for a response.
    pub fn take_output(&mut self, shard: &mut State) -> Output {
        self.offered = false;
        self.wants_write = false;
        let frame = self.outbound.pop();
        self.count_outbound(shard);
        self.resume_catching_up(shard);
        self.read_next(shard);
        match (frame, self.phase) {
            (Some(frame), _) => Output::Bytes(frame),
            (None, Phase::Closing(_)) => Output::End,
            (None, _) => Output::Pending,
        }
    }

    /// The socket takes output again.
    pub fn writable(&mut self, shard: &mut State) {
        self.wants_write = false;
        self.flush(shard);
    }

    /// Handles input.
    pub fn received(&mut self, shard: &mut State, bytes: &mut [u8]) {
        self.note_received(shard.now);
        self.consume(shard, bytes);
        self.flush_unless_full(shard);
    }

    /// A token that the session's client has sent is verified, see [`Action::Verify`](crate::shard::Action).
    pub fn verified(&mut self, shard: &mut State, outcome: Result<Identity, AuthFailure>) {
        if matches!(self.phase, Phase::Closing(_)) {
            return;
        }
        self.with_session(shard, |session, around, effects| session.verified(outcome, around, effects));
        self.count_behind(shard);
        self.flush_unless_full(shard);
        self.wake();
    }

    /// Writes what is queued, unless the socket is known to take nothing.
    pub(in crate::shard) fn flush_unless_full(&mut self, shard: &mut State) {
        if self.has_output() && !self.wants_write {
            self.flush(shard);
        }
    }

    fn consume(&mut self, shard: &mut State, bytes: &mut [u8]) {
        let max_message = shard.settings.limits.message_size.get();
        // Taken out while it lends its events: handling them needs the rest of the connection.
        let mut decoder = std::mem::replace(&mut self.decoder, Decoder::new());
        let before = decoder.heap_bytes();
        self.decode(shard, &mut decoder, bytes, max_message);
        let after = decoder.heap_bytes();
        self.decoder = decoder;
        self.count_behind(shard);
        if before.max(after) > 0 {
            Self::count_incomplete(shard, before, after);
        }
        if after > 0 || self.is_blocked() || self.session.is_verifying() {
            self.note_holding(shard);
        }
    }

    fn decode(&mut self, shard: &mut State, decoder: &mut Decoder, bytes: &mut [u8], max_message: usize) {
        let mut feed = decoder.feed(bytes, max_message);
        while !self.ignores_input {
            let mut charge = Charge::default();
            match feed.next_paid(&mut |bytes| self.pay(shard, &mut charge, bytes)) {
                Ok(Some((event, size))) => {
                    let charge = charge.received(size + std::mem::take(&mut self.unpaid) as usize);
                    self.receive(shard, event, charge);
                }
                Ok(None) => {
                    let unpaid = feed.unfinished() + self.unpaid as usize;
                    self.unpaid = u32::try_from(unpaid).unwrap_or(u32::MAX);
                    if unpaid > max_message + MAX_OVERHEAD {
                        // Endless fragments, each with almost no payload.
                        let bytes = std::mem::take(&mut self.unpaid) as usize;
                        self.with_session(shard, |session, around, effects| {
                            session.receive_other(bytes, around, effects);
                        });
                    }
                    return;
                }
                Err(error) => {
                    self.ignores_input = true;
                    if let (ProtocolError::NotPaidFor, Some(limit)) = (error, charge.refused()) {
                        shard.context.metrics.limited(limit);
                        self.begin_close(shard, CloseReason::OverLimit(limit));
                        return;
                    }
                    tracing::debug!(session = %self.id, %error, "the client violated the protocol");
                    let words = websocket::close_frame(error.close_code(), &error.to_string());
                    self.close_with(shard, broken_by(error), Some(words));
                }
            }
        }
    }

    /// Charges the bytes that a compressed message inflates to. Returns whether it may go on.
    fn pay(&self, shard: &State, charge: &mut Charge, bytes: usize) -> bool {
        let allowance = Allowance { session: &shard.meters, node: shard.context.settings.limiters() };
        self.session.inflate(charge, bytes, &allowance)
    }

    fn receive(&mut self, shard: &mut State, event: Event<'_>, charge: Charge) {
        let size = charge.bytes_received();
        if let Phase::Closing(_) = self.phase {
            // A close frame ends the wait. Anything else came too late.
            self.ignores_input = matches!(event, Event::Close(_));
            return;
        }
        let message = match event {
            Event::Text(payload) => Message::Text(payload.into_bytes()),
            Event::Binary(payload) => Message::Binary(payload.into_bytes()),
            Event::Ping(payload) => {
                let pong = websocket::pong(payload);
                self.with_session(shard, |session, around, effects| {
                    if session.receive_other(size, around, effects) {
                        effects.push(Effect::Send(pong));
                    }
                });
                return;
            }
            Event::Pong(_) => {
                return self.with_session(shard, |session, around, effects| {
                    session.pong(size, around, effects);
                });
            }
            Event::Close(frame) => {
                self.ignores_input = true;
                let answer = websocket::close_answer(frame.map(|frame| frame.code));
                self.close_with(shard, CloseReason::Client, Some(answer));
                return;
            }
        };
        let (Message::Text(bytes) | Message::Binary(bytes)) = &message;
        Tally::add(&shard.tally.messages_in, 1);
        Tally::add(&shard.tally.payload_in, bytes.len());
        let mut commands = shard.take_commands();
        self.with_session(shard, |session, around, effects| {
            session.receive(message, charge, around, &mut commands, effects);
        });
        shard.give_commands(commands);
    }

    /// Passes something that the client did to the session, and runs the resulting effects.
    fn with_session(
        &mut self,
        shard: &mut State,
        act: impl FnOnce(&mut Session, &Surroundings<'_>, &mut Effects),
    ) {
        let mut effects = shard.take_effects();
        let around = Surroundings {
            authenticator: &shard.settings.authenticator,
            now: shard.context.time.unix().into(),
            rooms_per_session: shard.settings.limits.rooms_per_session,
            allowance: Allowance { session: &shard.meters, node: shard.context.settings.limiters() },
        };
        act(&mut self.session, &around, &mut effects);
        self.run(shard, &mut effects);
        shard.give_effects(effects);
    }

    fn must_pause(&self) -> bool {
        !matches!(self.phase, Phase::Closing(_))
            && (self.in_flight >= MAX_IN_FLIGHT
                || self.is_blocked()
                || self.session.is_verifying()
                || self.reads.as_ref().is_some_and(|reads| reads.is_waiting())
                || self.outbound.replies() > MAX_REPLIES)
    }
}

fn broken_by(error: ProtocolError) -> CloseReason {
    match error {
        ProtocolError::InvalidUtf8 | ProtocolError::InvalidCloseReason => CloseReason::InvalidText,
        _ if error.close_code() == websocket::CloseCode::MESSAGE_TOO_BIG => CloseReason::MessageTooBig,
        _ => CloseReason::ProtocolError,
    }
}

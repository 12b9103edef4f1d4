//! A session: one client, whatever the transport.
//!
//! A state machine without IO. It turns what the client sends into [`Effect`]s, after checking it against the
//! identity's grants and the limits of the session and its user, and turns news into messages for the client.
//! The shard runs the effects and needs to know nothing of protocols or grants.

use std::{cell::OnceCell, sync::Arc, time::Duration};

use broker_bridge::{BrokerError, Cursor, GapCause, Publication, Publisher, RoomName, SessionId};
use bytes::Bytes;

use crate::{
    auth::{AuthFailure, Authenticator, Identity, Operation, Subject, Token, UnixSeconds},
    framing::{Framing, Packets},
    limits::{Allowance, bucket::RateAccount},
    protocol::{
        Command, History, HistoryQuery, Message, News, Protocol, Recover, Reply, RequestId, RoomFormat,
        Subscribed, Then, Timing,
    },
    room_map::RoomMap,
    vocabulary::{CloseReason, Limit, Outcome, ReplyError},
};

#[cfg(test)]
mod conformance;
mod identity;
#[cfg(test)]
mod transcript;
#[cfg(test)]
mod transcripts;
#[cfg(test)]
mod waiting;

/// The session of one client.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    /// The session's user. `None` until the client has shown a token, in protocols that carry their own.
    identity: Option<Arc<Identity>>,
    /// Whether the client has begun the session. True from the start if the request itself began it.
    begun: bool,
    protocol: Box<dyn Protocol>,
    framing: Framing,
    /// The rooms that the client has subscribed to within the session, with the requests.
    subscriptions: RoomMap<RequestId, 0>,
    /// Its usage of its limits. Empty until the client has sent something.
    account: OnceCell<Box<RateAccount>>,
    /// Whether a ping has not been answered yet.
    pinged: bool,
    /// What waits for the verification of a token. Boxed: sessions rarely have it.
    verifying: Option<Box<identity::Verifying>>,
}

/// The context that a session needs to handle input.
pub struct Surroundings<'a> {
    /// Verifies tokens sent within a session.
    pub authenticator: &'a Authenticator,
    /// The current time.
    pub now: UnixSeconds,
    /// `limits.rooms_per_session`
    pub rooms_per_session: usize,
    /// The rate limits for the session and its user.
    pub allowance: Allowance<'a>,
}

/// What a message costs the client in bytes: its size on the wire or its inflated size, whichever is larger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Charge {
    /// Its inflated size, already charged by [`Session::inflate`].
    inflated: usize,
    /// The limit that left part of it uncharged, if any.
    refused: Option<Limit>,
    /// Its size on the wire.
    received: usize,
}

impl Charge {
    /// Sets the message's size on the wire, frame headers included.
    #[must_use]
    pub fn received(self, bytes: usize) -> Self {
        Self { received: bytes, ..self }
    }

    /// The message's size on the wire.
    pub fn bytes_received(self) -> usize {
        self.received
    }

    /// The limit that the message exceeds, if any.
    pub fn refused(self) -> Option<Limit> {
        self.refused
    }
}

/// What has to be done because of something that the client sent or has to be told.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Hand this to the broker; the outcome comes back through [`Session::settled`].
    Publish(RequestId, RoomName, Publication),
    /// Make the session a member; the outcome comes back through [`Session::joined`].
    Join(RequestId, RoomName, Option<Recover>),
    /// Read this part of the room's history; the outcome goes to [`Session::history`].
    History(RequestId, RoomName, HistoryQuery),
    /// End its membership.
    Leave(RoomName),
    /// Queue these bytes for the client.
    Send(Bytes),
    /// Verify this token on another thread; the outcome goes to [`Session::verified`]. Give the session no
    /// input until then, beyond what has been read already.
    Verify(Token),
    /// The identity expires at this time.
    Expires(UnixSeconds),
    /// Count a refused token.
    Refused(AuthFailure),
    /// Count something that was refused because of a limit.
    Limited(Limit),
    /// End the session.
    Close(CloseReason),
}

/// The effects of one input, in order. A shard reuses one list for all its sessions.
#[derive(Debug, Default)]
pub struct Effects {
    list: Vec<Effect>,
    packets: Packets,
}

impl Effects {
    /// Adds an effect.
    pub fn push(&mut self, effect: Effect) {
        self.list.push(effect);
    }

    /// The last effect.
    pub fn last(&self) -> Option<&Effect> {
        self.list.last()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Takes all of them out.
    pub fn drain(&mut self) -> impl Iterator<Item = Effect> {
        self.list.drain(..)
    }

    /// The capacity of the list.
    pub fn capacity(&self) -> usize {
        self.list.capacity()
    }

    /// Lets a protocol write messages to its client, and adds them as effects.
    fn write<T>(&mut self, framing: Framing, write: impl FnOnce(&mut Packets) -> T) -> T {
        self.packets.begin(framing);
        let result = write(&mut self.packets);
        if !self.packets.is_empty() {
            self.list.extend(self.packets.take().map(Effect::Send));
        }
        result
    }
}

impl Session {
    /// A session that has been admitted as `identity`.
    pub fn new(
        id: SessionId,
        identity: Arc<Identity>,
        protocol: Box<dyn Protocol>,
        framing: Framing,
    ) -> Self {
        Self::of(id, Some(identity), true, protocol, framing)
    }

    /// A session that the client has yet to begin with its protocol's first message. It may have an identity
    /// from the request already.
    pub fn to_begin(
        id: SessionId,
        identity: Option<Arc<Identity>>,
        protocol: Box<dyn Protocol>,
        framing: Framing,
    ) -> Self {
        Self::of(id, identity, false, protocol, framing)
    }

    fn of(
        id: SessionId,
        identity: Option<Arc<Identity>>,
        begun: bool,
        protocol: Box<dyn Protocol>,
        framing: Framing,
    ) -> Self {
        Self {
            id,
            identity,
            begun,
            protocol,
            framing,
            subscriptions: RoomMap::default(),
            account: OnceCell::new(),
            pinged: false,
            verifying: None,
        }
    }

    /// Its id, unique across all nodes.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// How its messages are framed.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// When the protocol needs heartbeats.
    pub fn timing(&self) -> Timing {
        self.protocol.timing()
    }

    /// How long it may wait for something to answer, if it is one answer.
    pub fn patience(&self) -> Option<Duration> {
        self.protocol.patience()
    }

    /// How many publications it has answered with, if it is one answer.
    pub fn answered(&self) -> u64 {
        self.protocol.answered()
    }

    /// How publications of `room` are encoded for it; `request` subscribed to the room.
    pub fn format(&mut self, room: &RoomName, request: RequestId) -> RoomFormat {
        self.protocol.format(room, request)
    }

    /// Writes the message that the protocol sends first, if any.
    pub fn greet(&mut self, spread: f32, out: &mut Packets) {
        out.begin(self.framing);
        self.protocol.greet(spread, out);
    }

    /// Writes the final message.
    pub fn farewell(&mut self, reason: CloseReason, spread: f32, out: &mut Packets) {
        out.begin(self.framing);
        self.protocol.farewell(reason, spread, out);
    }

    /// Charges the bytes by which a compressed message has grown. Returns whether the limits allow them.
    pub fn inflate(&self, charge: &mut Charge, bytes: usize, allowance: &Allowance<'_>) -> bool {
        let paid = allowance.more_bytes(self.account(), self.user(), charge.inflated, bytes);
        charge.inflated += bytes;
        charge.refused = charge.refused.or(paid.err());
        charge.refused.is_none()
    }

    fn pay(&self, charge: Charge, allowance: &Allowance<'_>) -> Result<(), Limit> {
        match charge {
            Charge { refused: Some(limit), .. } => Err(limit),
            Charge { inflated: 0, received, .. } => allowance.bytes(self.account(), self.user(), received),
            Charge { inflated, received, .. } => {
                let rest = received.saturating_sub(inflated);
                allowance.more_bytes(self.account(), self.user(), inflated, rest)
            }
        }
    }

    /// Handles a message from the client.
    ///
    /// The message is charged once for its bytes, and once for each of its commands. Commands over a limit
    /// are not executed, and the client is notified.
    pub fn receive(
        &mut self,
        message: Message,
        charge: Charge,
        around: &Surroundings<'_>,
        commands: &mut Vec<Command>,
        effects: &mut Effects,
    ) {
        let (Message::Text(bytes) | Message::Binary(bytes)) = &message;
        let size = bytes.len();
        self.protocol.decode(message, commands);
        if commands.is_empty() && std::mem::take(&mut self.pinged) {
            return;
        }
        let paid = self.pay(charge, &around.allowance);
        if commands.is_empty() {
            // It contains no command, but reading it costs one.
            if let Err(limit) = paid.and_then(|()| around.allowance.command(self.account(), self.user())) {
                self.overrun(limit, around, effects);
            }
        }
        for command in commands.drain(..) {
            match paid.and_then(|()| around.allowance.command(self.account(), self.user())) {
                Ok(()) => match &mut self.verifying {
                    Some(verifying) => verifying.behind.push(command),
                    None => self.handle(command, around, effects),
                },
                Err(limit) => self.decline(&command, limit, around, effects),
            }
            if matches!(effects.last(), Some(Effect::Close(_))) {
                break; // the session is closing
            }
        }
        if let Some(verifying) = &mut self.verifying {
            verifying.bytes += size;
        }
    }

    /// Writes a heartbeat, which keeps the connection alive and asks the client to answer. The answer is free
    /// of charge.
    pub fn heartbeat(&mut self, out: &mut Packets) {
        self.pinged = true;
        out.begin(self.framing);
        self.protocol.heartbeat(out);
    }

    /// Handles a pong from the client, solicited or not.
    pub fn pong(&mut self, bytes: usize, around: &Surroundings<'_>, effects: &mut Effects) {
        if !std::mem::take(&mut self.pinged) {
            self.receive_other(bytes, around, effects);
        }
    }

    /// Charges bytes from the client that are not a message: a control frame, or part of an endless message.
    /// Returns whether the limits allowed them, so the frame may be answered.
    pub fn receive_other(&mut self, bytes: usize, around: &Surroundings<'_>, effects: &mut Effects) -> bool {
        let user = self.user();
        let paid = around.allowance.bytes(self.account(), user, bytes);
        match paid.and_then(|()| around.allowance.command(self.account(), user)) {
            Ok(()) => true,
            Err(limit) => {
                self.overrun(limit, around, effects);
                false
            }
        }
    }

    /// The broker has accepted or refused an [`Effect::Join`]. `None` if the session does not become a member: it was
    /// refused, or the session no longer wants the room by this request. Otherwise how many of the missed publications
    /// the client has got with the reply.
    pub fn joined(
        &mut self,
        request: RequestId,
        room: &RoomName,
        outcome: Result<Subscribed<'_>, ReplyError>,
        effects: &mut Effects,
    ) -> Option<usize> {
        if self.subscriptions.get(room) != Some(&request) {
            return None;
        }
        match outcome {
            Ok(subscribed) => {
                let write = |out: &mut Packets| self.protocol.subscribed(request, &subscribed, out);
                Some(effects.write(self.framing, write))
            }
            Err(error) => {
                self.subscriptions.remove(room);
                self.answer(request, &Reply::Failed(error), effects);
                None
            }
        }
    }

    /// The history that an [`Effect::History`] asked for has been read, or cannot be read.
    pub fn history(
        &mut self,
        request: RequestId,
        outcome: Result<History<'_>, ReplyError>,
        effects: &mut Effects,
    ) {
        match outcome {
            Ok(history) => {
                effects.write(self.framing, |out| self.protocol.history(request, &history, out));
            }
            Err(error) => self.answer(request, &Reply::Failed(error), effects),
        }
    }

    /// The broker has accepted or refused a publication of this session.
    pub fn settled(&mut self, request: RequestId, outcome: &Result<(), BrokerError>, effects: &mut Effects) {
        let reply = match outcome {
            Ok(()) => Reply::Published,
            Err(error) => Reply::Failed(Outcome::from(error).reply),
        };
        self.answer(request, &reply, effects);
    }

    /// Publications of `room` may be missing.
    pub fn gap(&mut self, room: &RoomName, cause: GapCause, effects: &mut Effects) {
        self.notify(&News::Gap(room, cause), room, effects);
    }

    /// In `room` the session begins after this position.
    pub fn positioned(&mut self, room: &RoomName, position: Cursor, effects: &mut Effects) {
        self.notify(&News::Position(room, position), room, effects);
    }

    /// From here on, the positions in `room` have another epoch.
    pub fn new_epoch(&mut self, room: &RoomName, effects: &mut Effects) {
        self.notify(&News::NewEpoch(room), room, effects);
    }

    /// Writes the notice that publications of `room` were dropped because the client's own outbound queue was
    /// full.
    pub fn dropped(&mut self, room: &RoomName, out: &mut Packets) -> Then {
        out.begin(self.framing);
        self.protocol.news(&News::Gap(room, GapCause::Dropped), out)
    }

    /// When its identity expires; `None` until the client has begun the session.
    pub fn ends(&self) -> Option<UnixSeconds> {
        self.identity.as_ref().filter(|_| self.begun).map(|identity| identity.expires_at())
    }

    /// Why the session has expired: its token has, or the client has not begun in time.
    pub fn expired(&self) -> CloseReason {
        if self.begun { CloseReason::TokenExpired } else { CloseReason::Stale }
    }

    fn handle(&mut self, command: Command, around: &Surroundings<'_>, effects: &mut Effects) {
        let first = matches!(command, Command::Connect { .. });
        if let Command::Break(reason) = command {
            return effects.push(Effect::Close(reason));
        }
        if first == self.begun {
            // Either a command before the session has begun, or a second begin.
            return effects.push(Effect::Close(CloseReason::BadRequest));
        }
        match command {
            Command::Connect { request, token } => self.connect(request, token, around, effects),
            Command::Refresh { request, token } => self.verify(request, true, &token, around, effects),
            Command::Subscribe { request, room, recover } => {
                self.subscribe(request, room, recover, around, effects);
            }
            Command::History { request, room, query } => {
                // Whoever may subscribe may read what the room keeps, by coming back with an old position.
                let is_subscribed = self.subscriptions.get(&room).is_some();
                if !is_subscribed && self.granted(Operation::History, &room).is_none() {
                    return self.answer(request, &Reply::Failed(ReplyError::Forbidden), effects);
                }
                effects.push(Effect::History(request, room, query));
            }
            Command::Unsubscribe { request, room } => self.unsubscribe(request, &room, effects),
            Command::Answer { request, reply } => self.answer(request, &reply, effects),
            Command::Publish { request, room, event, data, echo } => {
                let Some(identity) = self.granted(Operation::Publish, &room) else {
                    return self.answer(request, &Reply::Failed(ReplyError::Forbidden), effects);
                };
                let user = Some(identity.subject().shared());
                let publisher = Some(Publisher { user, session: self.id });
                let exclude = (!echo).then_some(self.id);
                effects.push(Effect::Publish(request, room, Publication { data, event, publisher, exclude }));
            }
            Command::Break(_) => {}
        }
    }

    /// Refuses a command because of a limit, and notifies the client.
    fn decline(&mut self, command: &Command, limit: Limit, around: &Surroundings<'_>, effects: &mut Effects) {
        if let Command::Break(reason) = command {
            return effects.push(Effect::Close(*reason));
        }
        if self.overrun(limit, around, effects) {
            self.answer(command.request(), &Reply::Failed(ReplyError::TooManyRequests(limit)), effects);
        }
    }

    /// Records that the client is over a limit. Returns whether the session continues; it ends if that
    /// happens too often.
    fn overrun(&mut self, limit: Limit, around: &Surroundings<'_>, effects: &mut Effects) -> bool {
        effects.push(Effect::Limited(limit));
        let tolerated = around.allowance.tolerate(self.account());
        if !tolerated {
            effects.push(Effect::Close(CloseReason::OverLimit(limit)));
        }
        tolerated
    }

    fn account(&self) -> &RateAccount {
        self.account.get_or_init(Box::default)
    }

    fn user(&self) -> Option<&Subject> {
        self.identity.as_deref().map(Identity::subject)
    }

    fn subscribe(
        &mut self,
        request: RequestId,
        room: RoomName,
        recover: Option<Recover>,
        around: &Surroundings<'_>,
        effects: &mut Effects,
    ) {
        let refusal = if self.subscriptions.get(&room).is_some() {
            Some(ReplyError::AlreadySubscribed)
        } else if self.granted(Operation::Subscribe, &room).is_none() {
            Some(ReplyError::Forbidden)
        } else if self.subscriptions.len() >= around.rooms_per_session {
            Some(ReplyError::LimitExceeded)
        } else {
            None
        };
        if let Some(error) = refusal {
            return self.answer(request, &Reply::Failed(error), effects);
        }
        self.subscriptions.insert(room.clone(), request);
        effects.push(Effect::Join(request, room, recover));
    }

    /// Answered even if there was no subscription: the client gets the state it asked for.
    fn unsubscribe(&mut self, request: RequestId, room: &RoomName, effects: &mut Effects) {
        self.subscriptions.remove(room);
        effects.push(Effect::Leave(room.clone()));
        self.answer(request, &Reply::Unsubscribed, effects);
    }

    fn granted(&self, operation: Operation, room: &RoomName) -> Option<&Identity> {
        self.identity.as_deref().filter(|identity| identity.may(operation, room))
    }

    fn answer(&mut self, request: RequestId, reply: &Reply, effects: &mut Effects) {
        let then = effects.write(self.framing, |out| self.protocol.reply(request, reply, out));
        if let Then::Close(reason) = then {
            effects.push(Effect::Close(reason));
        }
    }

    fn notify(&mut self, news: &News<'_>, room: &RoomName, effects: &mut Effects) {
        let before = effects.list.len();
        match effects.write(self.framing, |out| self.protocol.news(news, out)) {
            Then::Stay => {}
            Then::Close(reason) => effects.push(Effect::Close(reason)),
            Then::Leave => {
                self.subscriptions.remove(room);
                // End the membership before the client is notified.
                effects.list.insert(before, Effect::Leave(room.clone()));
            }
        }
    }
}

/// Seconds after which the client is told to refresh its token. The refresh is due before the token expires:
/// by a fifth of the remaining time, half a minute at most.
fn announced(remaining: Duration) -> u64 {
    let margin = (remaining / 5).min(Duration::from_secs(30));
    remaining.saturating_sub(margin).as_secs().max(1)
}

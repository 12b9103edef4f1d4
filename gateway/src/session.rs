//! A session: one client, whatever carries it.
//!
//! A state machine without IO. It turns what the client says into [`Effect`]s after checking them
//! against the identity's grants, and news into what this client is told. Who runs the effects (the
//! shard) needs to know nothing of protocols or grants.

use std::sync::Arc;

use broker_bridge::{BrokerError, GapCause, Publication, Publisher, RoomName, SessionId};
use bytes::Bytes;

use crate::{
    auth::{Identity, Operation},
    protocol::{Command, Message, Notice, Protocol},
};

mod close;
#[cfg(test)]
mod transcripts;

pub use close::CloseReason;

/// One client.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    identity: Arc<Identity>,
    protocol: Protocol,
}

/// What has to happen because of what a client said or is told.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Hand this to the broker; the outcome comes back through [`Session::settled`].
    Publish(RoomName, Publication),
    /// Queue these bytes for the client.
    Send(Bytes),
    /// End the session.
    Close(CloseReason),
}

impl Session {
    /// A session that has been admitted.
    pub fn new(id: SessionId, identity: Arc<Identity>, protocol: Protocol) -> Self {
        Self { id, identity, protocol }
    }

    /// Its name across all nodes.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Whose it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its wire protocol.
    pub fn protocol(&self) -> &Protocol {
        &self.protocol
    }

    /// The client sent `message`.
    pub fn receive(&mut self, message: Message, commands: &mut Vec<Command>, effects: &mut Vec<Effect>) {
        self.protocol.decode(message, commands);
        for command in commands.drain(..) {
            effects.push(self.permit(command));
        }
    }

    /// A publication of this session was taken by the broker, or was not.
    pub fn settled(&mut self, outcome: &Result<(), BrokerError>, effects: &mut Vec<Effect>) {
        match (&self.protocol, outcome) {
            (_, Ok(())) | (Protocol::EventStream(_), Err(_)) => {}
            // A plain frame has no place for an error, and silence would be a lie.
            (Protocol::Plain(_), Err(_)) => effects.push(Effect::Close(CloseReason::PublishFailed)),
        }
    }

    /// Publications of `room` may be missing.
    pub fn gap(&self, room: &RoomName, cause: GapCause, effects: &mut Vec<Effect>) {
        match self.protocol.gap(room, cause) {
            Notice::Silent => {}
            Notice::Send(bytes) => effects.push(Effect::Send(bytes)),
            Notice::Close(reason) => effects.push(Effect::Close(reason)),
        }
    }

    fn permit(&self, command: Command) -> Effect {
        match command {
            Command::Publish { room, event, data, echo } => {
                if !self.identity.may(Operation::Publish, &room) {
                    return Effect::Close(CloseReason::Forbidden);
                }
                let publisher = Publisher { user: Some(self.identity.subject().shared()), session: self.id };
                let exclude = (!echo).then_some(self.id);
                Effect::Publish(room, Publication { data, event, publisher: Some(publisher), exclude })
            }
        }
    }
}

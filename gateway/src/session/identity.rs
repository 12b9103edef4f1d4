//! Whom a session belongs to: tokens within a session, at its beginning and later.

use std::sync::Arc;

use super::{Effect, Effects, Session, Surroundings, announced};
use crate::{
    auth::{AuthFailure, Identity, Operation, Token},
    protocol::{Command, News, Reply, RequestId},
    vocabulary::{CloseReason, ReplyError},
};

/// A token that is being verified, see [`Effect::Verify`].
#[derive(Debug)]
pub(super) struct Verifying {
    /// The request that brought it.
    request: RequestId,
    /// Whether the session has begun already, so that the token refreshes it.
    refreshes: bool,
    /// How many fetches of the key set had ended when it arrived.
    fetches: u64,
    /// Commands that arrived after it, in order and charged. They may need the identity.
    pub(super) behind: Vec<Command>,
    /// The size of the messages that contained them, in bytes.
    pub(super) bytes: usize,
}

impl Session {
    /// Whether it waits for [`Session::verified`].
    pub fn is_verifying(&self) -> bool {
        self.verifying.is_some()
    }

    /// Bytes that are held while it waits for [`Session::verified`].
    pub fn held(&self) -> usize {
        self.verifying.as_ref().map_or(0, |verifying| verifying.bytes)
    }

    /// Drops what is held; the session is closing.
    pub fn drop_held(&mut self) {
        self.verifying = None;
    }

    /// The token of an [`Effect::Verify`] has been verified.
    pub fn verified(
        &mut self,
        outcome: Result<Identity, AuthFailure>,
        around: &Surroundings<'_>,
        effects: &mut Effects,
    ) {
        let Some(verifying) = self.verifying.take() else { return };
        let Verifying { request, refreshes, fetches, behind, bytes } = *verifying;
        self.proved(request, refreshes, fetches, outcome, around, effects);
        let mut behind = behind.into_iter();
        while !matches!(effects.last(), Some(Effect::Close(_)))
            && let Some(command) = behind.next()
        {
            self.handle(command, around, effects);
            if let Some(verifying) = &mut self.verifying {
                // Another token: the rest waits for that one.
                (verifying.behind, verifying.bytes) = (behind.collect(), bytes);
                return;
            }
        }
    }

    pub(super) fn connect(
        &mut self,
        request: RequestId,
        token: Option<String>,
        around: &Surroundings<'_>,
        effects: &mut Effects,
    ) {
        match token {
            Some(token) => self.verify(request, false, &token, around, effects),
            None => self.begin(request, around, effects),
        }
    }

    fn begin(&mut self, request: RequestId, around: &Surroundings<'_>, effects: &mut Effects) {
        let Some(identity) = &self.identity else {
            effects.push(Effect::Refused(AuthFailure::Missing));
            return self.answer(request, &Reply::Failed(ReplyError::Unauthorized), effects);
        };
        effects.push(Effect::Expires(identity.expires_at()));
        let ttl = announced(identity.remaining(around.now));
        self.begun = true;
        self.answer(request, &Reply::Connected { session: self.id, ttl }, effects);
    }

    fn refresh(
        &mut self,
        request: RequestId,
        identity: Arc<Identity>,
        around: &Surroundings<'_>,
        effects: &mut Effects,
    ) {
        if self.identity.as_ref().is_none_or(|own| own.subject() != identity.subject()) {
            // A session cannot change its user.
            return effects.push(Effect::Close(CloseReason::InvalidToken));
        }
        effects.push(Effect::Expires(identity.expires_at()));
        let ttl = announced(identity.remaining(around.now));
        let before = self.identity.replace(identity);
        self.answer(request, &Reply::Refreshed { session: self.id, ttl }, effects);
        // Most new tokens only extend the expiry: then a session in thousands of rooms need not check them
        // all.
        let same = before.zip(self.identity.as_ref()).is_some_and(|(before, now)| before.grants_as(now));
        if !same {
            self.expel(effects);
        }
    }

    /// Ends the subscriptions that the identity does not grant any more.
    fn expel(&mut self, effects: &mut Effects) {
        let identity = self.identity.as_deref();
        let lost = self
            .subscriptions
            .extract(|room| !identity.is_some_and(|own| own.may(Operation::Subscribe, room)));
        for room in lost {
            effects.push(Effect::Leave(room.clone()));
            self.notify(&News::Expelled(&room), &room, effects);
        }
    }

    /// Verifies a token: here if a shared secret suffices, otherwise on another thread.
    pub(super) fn verify(
        &mut self,
        request: RequestId,
        refreshes: bool,
        token: &str,
        around: &Surroundings<'_>,
        effects: &mut Effects,
    ) {
        let fetches = around.authenticator.keys().fetches();
        let outcome = match Token::new(token) {
            Ok(token) if around.authenticator.keys().has_public_keys() => {
                let verifying = Verifying { request, refreshes, fetches, behind: Vec::new(), bytes: 0 };
                self.verifying = Some(Box::new(verifying));
                return effects.push(Effect::Verify(token));
            }
            Ok(token) => around.authenticator.verify(&token, around.now),
            Err(failure) => Err(failure),
        };
        self.proved(request, refreshes, fetches, outcome, around, effects);
    }

    fn proved(
        &mut self,
        request: RequestId,
        refreshes: bool,
        fetches: u64,
        outcome: Result<Identity, AuthFailure>,
        around: &Surroundings<'_>,
        effects: &mut Effects,
    ) {
        match outcome.map(Arc::new) {
            Ok(identity) if refreshes => self.refresh(request, identity, around, effects),
            Ok(identity) => {
                self.identity = Some(identity);
                self.begin(request, around, effects);
            }
            Err(failure) => {
                effects.push(Effect::Refused(failure));
                match failure {
                    AuthFailure::Expired => {
                        self.answer(request, &Reply::Failed(ReplyError::TokenExpired), effects);
                    }
                    AuthFailure::UnknownKey if around.authenticator.keys().want_key(fetches) => {
                        self.answer(request, &Reply::Failed(ReplyError::KeyAwaited), effects);
                    }
                    _ => effects.push(Effect::Close(CloseReason::InvalidToken)),
                }
            }
        }
    }
}

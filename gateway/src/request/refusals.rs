//! Log messages for refused tokens, origins and grants.
//!
//! They are the first thing to look for when a client cannot connect, so they are logged at the default
//! level. Any client can cause them, so only a few per second are; level `debug` has them all. All have the
//! target `tidegate::auth`, wherever they come from.

use std::{
    fmt::Display,
    num::NonZero,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
};

use broker_bridge::SessionId;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use http::{header, request::Parts};
use tracing::{Level, field::display};

use super::{Problem, gate::header_text};
use crate::{
    auth::AuthFailure,
    vocabulary::{Peer, RequestName, metrics::Label as _},
};

const TARGET: &str = "tidegate::auth";
/// Lines per second at level `info`, and the burst.
const PER_SECOND: NonZero<u32> = NonZero::new(10).expect("it is not zero");
/// The longest quoted part of a request, in characters.
const MAX_QUOTED: usize = 200;

/// Logs that a request's token was refused.
pub fn token(request: &Parts, failure: AuthFailure) {
    Refused { reason: failure.as_str(), error: &failure, ..Refused::of(request) }.log("a token was refused");
}

/// Logs that a token sent within a session was refused.
pub fn token_of_session(session: SessionId, failure: AuthFailure) {
    let refused = Refused {
        request: None,
        session: Some(session),
        peer: None,
        path: None,
        origin: None,
        host: None,
        reason: failure.as_str(),
        error: &failure,
    };
    refused.log("a token was refused");
}

/// Logs that a request was refused because of its page's origin, or because its token lacks a grant.
pub fn access(request: &Parts, problem: &Problem) {
    let host = quoted(request, &header::HOST);
    let (reason, error) = (problem.refusal().as_str(), &problem.detail());
    Refused { host, reason, error, ..Refused::of(request) }.log("a request was refused");
}

/// The content of a line.
struct Refused<'a> {
    request: Option<SessionId>,
    session: Option<SessionId>,
    peer: Option<Peer>,
    path: Option<&'a str>,
    origin: Option<&'a str>,
    host: Option<&'a str>,
    reason: &'static str,
    error: &'a dyn Display,
}

impl<'a> Refused<'a> {
    fn of(request: &'a Parts) -> Self {
        let path = request.uri.path();
        Self {
            request: request.extensions.get::<RequestName>().map(|name| name.0),
            session: None,
            peer: request.extensions.get().copied(),
            path: Some(shorten(path)),
            origin: quoted(request, &header::ORIGIN),
            host: None,
            reason: "",
            error: &"",
        }
    }

    fn log(&self, message: &str) {
        static LIMIT: LazyLock<Limit> = LazyLock::new(Limit::new);
        let Self { request, session, peer, path, origin, host, reason, error } = self;
        let (request, session) = (request.map(display), session.map(display));
        let peer = peer.map(display);
        if let Some(suppressed) = LIMIT.admit(|| tracing::enabled!(target: TARGET, Level::DEBUG)) {
            let suppressed = (suppressed > 0).then_some(suppressed);
            tracing::info!(
                target: TARGET,
                request, session, peer, path, origin, host, reason, %error, suppressed,
                "{message}"
            );
        } else {
            tracing::debug!(
                target: TARGET,
                request, session, peer, path, origin, host, reason, %error,
                "{message}"
            );
        }
    }
}

/// Limits the lines at the default level.
struct Limit {
    rate: DefaultDirectRateLimiter,
    suppressed: AtomicU64,
}

impl Limit {
    fn new() -> Self {
        Self { rate: RateLimiter::direct(Quota::per_second(PER_SECOND)), suppressed: AtomicU64::new(0) }
    }

    /// Returns `Some` if a line may be logged now, with the number suppressed since the last one.
    /// `logged_anyway` says whether a suppressed line is logged at a lower level instead.
    fn admit(&self, logged_anyway: impl FnOnce() -> bool) -> Option<u64> {
        if self.rate.check().is_ok() {
            return Some(self.suppressed.swap(0, Ordering::Relaxed));
        }
        if !logged_anyway() {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
        }
        None
    }
}

fn quoted<'a>(request: &'a Parts, name: &header::HeaderName) -> Option<&'a str> {
    header_text(request, name).map(shorten)
}

fn shorten(text: &str) -> &str {
    text.char_indices().nth(MAX_QUOTED).and_then(|(end, _)| text.get(..end)).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_logs_a_few_lines_and_a_count() {
        let limit = Limit::new();
        let admitted = |anyway| limit.admit(|| anyway);
        let first: Vec<_> = (0..1000).filter_map(|_| admitted(false)).collect();
        assert!((10..1000).contains(&first.len()), "{}", first.len());
        let suppressed = first.iter().sum::<u64>();
        let kept = limit.suppressed.load(Ordering::Relaxed);
        assert_eq!(first.len() as u64 + suppressed + kept, 1000, "each is logged or counted");
        let before = limit.suppressed.load(Ordering::Relaxed);
        let shown = (0..1000).filter(|_| admitted(true).is_some()).count();
        assert!(shown < 1000);
        assert!(limit.suppressed.load(Ordering::Relaxed) <= before, "at level debug none is left out");
    }
}

//! The checks that public routes make before they serve a request.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Instant, SystemTime},
};

use axum::body::Body;
use broker_bridge::{Broker, RoomName, SessionId};
use http::{HeaderValue, Response, StatusCode, header, request::Parts};
use tracing::field::DisplayValue;

use super::{Problem, RequestMetrics, cors, refusals};
use crate::{
    auth::{AuthFailure, Identity, Operation, Token, credential},
    budget::Budget,
    config::Origins,
    crypto::{CryptoThreads, Stage, Work},
    health::ShardHealth,
    settings::{LiveSettings, Settings},
    traffic::Traffic,
    vocabulary::{Peer, ProtocolName, Refusal, RequestName, SessionIds, metrics::Label as _},
};

/// What the public routes share: settings, and whether the node accepts sessions at all.
pub struct Gate {
    /// Keys, origins, limits and timeouts.
    pub settings: Arc<LiveSettings>,
    /// Where publications go.
    pub broker: Arc<dyn Broker>,
    /// Counts refused requests.
    pub metrics: Arc<RequestMetrics>,
    /// Counts publications made by HTTP requests.
    pub traffic: Arc<Traffic>,
    /// Accounts for the request bodies held in memory.
    pub budget: Arc<Budget>,
    /// Verifies tokens that public keys have signed.
    pub crypto: Arc<CryptoThreads>,
    /// Generates ids for publishers without a session.
    pub ids: Arc<SessionIds>,
    /// The health and load of each shard.
    pub shards: Vec<Arc<ShardHealth>>,
    /// Rewrites a refusal in the form that the request's protocol needs, if it needs a special one.
    pub refuse: fn(&Parts, &Problem) -> Option<Response<Body>>,
    /// Whether the demo page is served.
    pub demo: bool,
    /// Set once the node is draining: it is not ready any more.
    pub draining: AtomicBool,
    /// Set when the pause at the start of a drain is over: new sessions are refused from then on.
    pub closed: AtomicBool,
}

impl Gate {
    /// Open sockets of the public listener, including those on their way to a shard.
    pub fn connections(&self) -> usize {
        self.shards.iter().map(|health| health.load()).sum()
    }

    /// The current settings.
    pub fn settings(&self) -> Arc<Settings> {
        self.settings.load()
    }

    /// Whether the node is draining.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Refuses a session if the node is full, or if it is draining and the pause is over. During the pause
    /// load balancers notice the drain; the sessions that they still send are served.
    pub fn check_capacity(&self) -> Result<(), Problem> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(Refusal::Draining.into());
        }
        self.check_connections()
    }

    /// Refuses a request if the node is full. The request's own socket is included in the count.
    pub fn check_connections(&self) -> Result<(), Problem> {
        if self.connections() > self.settings().sockets.connections {
            return Err(Refusal::Connections.into());
        }
        Ok(())
    }

    /// Refuses pages of origins that are not allowed. A request without `Origin` does not come from a page.
    /// While the node serves the demo page, that page may connect whatever `origins` lists.
    pub fn check_origin(&self, request: &Parts) -> Result<(), Problem> {
        if cors::origin(request).is_none()
            || cors::allowed_origin(&self.settings().origins, request).is_some()
            || (self.demo && cors::allowed_origin(&Origins::default(), request).is_some())
        {
            Ok(())
        } else {
            Err(Refusal::Origin.into())
        }
    }

    /// Authenticates a request. The client gets the same answer whatever is wrong with its token.
    ///
    /// If the token's key is unknown, waits for a fetch of the key set, if one is allowed, and verifies once
    /// more. A cookie is used only if there is no other token and the request's page may use it.
    pub async fn authenticate(&self, request: &Parts) -> Result<Arc<Identity>, Problem> {
        let settings = self.settings();
        let found = match explicit_token(request) {
            Err(AuthFailure::Missing) => cookie_token(&settings, request),
            found => found,
        };
        self.verify(&settings, request, found).await.map_err(|_| Refusal::Unauthorized.into())
    }

    /// Authenticates a request if it contains a token, for protocols that can also carry a token in a
    /// message.
    ///
    /// An explicit token must be valid. A cookie need not be: browsers send it unasked, and an old one must
    /// not block the token that the client is about to send.
    pub async fn authenticate_early(&self, request: &Parts) -> Result<Option<Arc<Identity>>, Problem> {
        let settings = self.settings();
        match explicit_token(request) {
            Err(AuthFailure::Missing) => match cookie_token(&settings, request) {
                Err(AuthFailure::Missing) => Ok(None),
                found => Ok(self.verify(&settings, request, found).await.ok()),
            },
            found => {
                let verified = self.verify(&settings, request, found).await;
                verified.map(Some).map_err(|_| Refusal::Unauthorized.into())
            }
        }
    }

    /// Refuses unless the identity may do this in all of the rooms.
    pub fn check_grant(
        &self,
        identity: &Identity,
        operation: Operation,
        rooms: &[RoomName],
    ) -> Result<(), Problem> {
        match rooms.iter().find(|room| !identity.may(operation, room)) {
            None => Ok(()),
            Some(room) => {
                let detail = format!("the token does not grant `{}` in room {room}", operation.as_str());
                Err(Problem::new(Refusal::Forbidden, detail))
            }
        }
    }

    /// Refuses if the identity's user has published too much or too often. `bytes` is unknown until the body
    /// has been received.
    pub fn check_user(&self, identity: &Identity, bytes: Option<usize>) -> Result<(), Problem> {
        let (limiters, user) = (self.settings.limiters(), identity.subject());
        let (paid, refusal) = match bytes {
            None => (limiters.user_command(user), Refusal::UserCommands),
            Some(bytes) => (limiters.user_bytes(user, bytes), Refusal::UserBytes),
        };
        paid.map_err(|wait| Problem::from(refusal).after(wait))
    }

    /// Lets a page of an allowed origin read the response.
    pub fn expose(&self, request: &Parts, response: Response<Body>) -> Response<Body> {
        cors::expose(&self.settings(), request, response)
    }

    /// Counts and answers a refused request.
    pub fn refuse(&self, request: &Parts, problem: Problem) -> Response<Body> {
        let (refusal, status) = (problem.refusal(), problem.status());
        self.metrics.refused(refusal);
        tracing::debug!(
            request = request_name(request),
            peer = request.extensions.get::<Peer>().map(tracing::field::display),
            method = %request.method,
            path = request.uri.path(),
            status = status.as_u16(),
            reason = refusal.as_str(),
            "request refused"
        );
        if matches!(refusal, Refusal::Origin | Refusal::Forbidden) {
            refusals::access(request, &problem);
        }
        let response = (self.refuse)(request, &problem).unwrap_or_else(|| problem.into_response());
        let mut response = self.expose(request, response);
        // Every retry after a mistake costs a connection, and connections are limited. A client that this
        // node has no room for must not occupy an idle connection either.
        let is_mistake = status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS;
        if is_mistake || refusal.is_about_this_node() {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Refuses an identity whose token has expired since it was verified, while the body arrived or the
    /// broker was asked.
    pub fn check_expiry(&self, identity: &Identity) -> Result<(), Problem> {
        if identity.remaining(SystemTime::now().into()).is_zero() {
            self.metrics.auth_failed(AuthFailure::Expired);
            return Err(Refusal::Unauthorized.into());
        }
        Ok(())
    }

    /// Verifies the token, and counts a failure.
    async fn verify(
        &self,
        settings: &Arc<Settings>,
        request: &Parts,
        found: Result<Token, AuthFailure>,
    ) -> Result<Arc<Identity>, AuthFailure> {
        let verified = match found {
            Ok(token) => self.verify_awaiting_key(settings, token).await,
            Err(failure) => Err(failure),
        };
        verified.map(Arc::new).inspect_err(|failure| {
            self.metrics.auth_failed(*failure);
            refusals::token(request, *failure);
        })
    }

    async fn verify_awaiting_key(
        &self,
        settings: &Arc<Settings>,
        token: Token,
    ) -> Result<Identity, AuthFailure> {
        let keys = settings.authenticator.keys();
        let seen = keys.fetches();
        let verified = verify(Arc::clone(settings), &self.crypto, token.clone()).await;
        if matches!(verified, Err(AuthFailure::UnknownKey)) && keys.wait_for_key(seen).await {
            return verify(Arc::clone(settings), &self.crypto, token).await;
        }
        verified
    }
}

/// Verifies a token: on a thread of `crypto` if there is a public key, because that takes as long as a dozen
/// deliveries.
pub async fn verify(
    settings: Arc<Settings>,
    crypto: &CryptoThreads,
    token: Token,
) -> Result<Identity, AuthFailure> {
    let is_long = settings.authenticator.keys().has_public_keys();
    let verify = move || settings.authenticator.verify(&token, SystemTime::now().into());
    if !is_long {
        return verify();
    }
    // A panic is not the client's fault, but it proves nothing about the token either.
    crypto.run(Work::Token, Stage::Later, verify).await.unwrap_or(Err(AuthFailure::BadSignature))
}

/// A request for a session. It stays in the extensions of the response until the session is open or refused.
pub struct Applicant {
    /// The gate that checks it.
    pub gate: Arc<Gate>,
    /// The request's head.
    pub request: Parts,
    /// The protocol that it asks for.
    pub protocol: ProtocolName,
    /// When it arrived.
    pub began: Instant,
}

impl Applicant {
    /// Refuses it, and counts the handshake.
    pub fn refuse(&self, problem: Problem) -> Response<Body> {
        let seconds = self.began.elapsed().as_secs_f64();
        self.gate.metrics.handshake(self.protocol, problem.refusal().into(), seconds);
        self.gate.refuse(&self.request, problem)
    }
}

/// The token that the client has put into the request explicitly.
fn explicit_token(request: &Parts) -> Result<Token, AuthFailure> {
    credential::find(&request.headers, request.uri.query())
}

/// The token in the cookie, if cookies are enabled and the request's page may use it.
fn cookie_token(settings: &Settings, request: &Parts) -> Result<Token, AuthFailure> {
    let name = settings.cookie.as_ref().ok_or(AuthFailure::Missing)?;
    let found = name.find(&request.headers);
    if found != Err(AuthFailure::Missing) && !cors::may_use_cookies(&settings.origins, request) {
        tracing::debug!(
            request = request_name(request),
            "ignored a cookie: the request does not come from a page that may use it"
        );
        return Err(AuthFailure::Missing);
    }
    found
}

/// The authority of the request: of its target in absolute form, or else from `Host` (RFC 9112 §3.2.2).
pub fn authority(request: &Parts) -> Option<&str> {
    match request.uri.authority() {
        Some(authority) => Some(authority.as_str()),
        None => request.headers.get(header::HOST)?.to_str().ok(),
    }
}

/// The request's id in the log.
pub fn request_name(request: &Parts) -> Option<DisplayValue<SessionId>> {
    request.extensions.get::<RequestName>().map(|name| tracing::field::display(name.0))
}

/// The text of a header, if it is present and visible ASCII.
pub fn header_text<'a>(request: &'a Parts, name: &header::HeaderName) -> Option<&'a str> {
    request.headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use http::Version;

    use super::*;

    fn head(version: Version, target: &str, headers: &[(&str, &str)]) -> Parts {
        let request = http::Request::builder().version(version).uri(target);
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn an_absolute_target_names_the_authority() {
        let host = ("host", "gateway.example");
        assert_eq!(authority(&head(Version::HTTP_11, "/", &[host])), Some("gateway.example"));
        let request = head(Version::HTTP_11, "http://other.example:80/", &[host]);
        assert_eq!(authority(&request), Some("other.example:80"));
        assert_eq!(authority(&head(Version::HTTP_10, "/", &[])), None);
    }
}

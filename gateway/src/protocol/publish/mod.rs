//! `POST /rooms/{room}`: publishes the body.

use std::{borrow::Cow, sync::Arc};

use axum::body::Body;
use broker_bridge::{
    Accepted, Affinity, BrokerError, Data, DataKind, EventName, Publication, PublicationId, PublishRequest,
    Publisher, Receipt, ReceiptSink, RoomName, Ticket, publication::Owner,
};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, header, request::Parts};
use http_body::Body as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{Call, Endpoint, On, Route};
use crate::{
    auth::{Operation, Subject},
    budget::{Consumer, Held, READ_BUFFER},
    request::{
        Gate, Problem,
        gate::{header_text, request_name},
        query::Query,
    },
    timeout,
    vocabulary::{Outcome, ProtocolName, Refusal},
};

/// `POST /rooms/{room}`.
pub static ENDPOINT: Endpoint = Endpoint {
    name: ProtocolName::new("http"),
    routes: &[Route {
        path: "/rooms/{room}",
        on: On::Request { method: Method::POST, answer: |call| Box::pin(answer(call)) },
    }],
    refuse: None,
};

/// The header with the name of the publication's event.
pub const X_EVENT: HeaderName = HeaderName::from_static("x-event");

/// The header by which a repeated publication is recognized (draft-ietf-httpapi-idempotency-key-header-07).
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

async fn answer(call: Call) -> Result<Response<Body>, Problem> {
    let Call { gate, affinity, request, body, room } = call;
    let room = room.expect("the path of the route names a room");
    publish(&gate, affinity, &request, body, room).await
}

/// Publishes the body to `room` and answers 202 once the broker has acknowledged it.
async fn publish(
    gate: &Gate,
    affinity: Affinity,
    parts: &Parts,
    body: Body,
    room: RoomName,
) -> Result<Response<Body>, Problem> {
    // A draining node serves this as well, as long as requests arrive: it needs no session.
    gate.check_connections()?;
    gate.check_origin(parts)?;
    let identity = gate.authenticate(parts).await?;
    gate.check_grant(&identity, Operation::Publish, std::slice::from_ref(&room))?;
    gate.check_user(&identity, None)?;
    let event = event_name(parts)?;
    let history = gate.settings().history.of(&room);
    let id = publication_id(parts, identity.subject(), history.is_some())?;
    let media_type = MediaType::of(parts)?;
    // Counted until the publication is settled.
    let mut held = gate.budget.hold(Consumer::Bodies, 0);
    let data = media_type.read(body_bytes(gate, body, &mut held).await?)?;
    gate.check_expiry(&identity)?;
    gate.check_user(&identity, Some(data.bytes().len()))?;
    gate.traffic.messages_in.inc();
    gate.traffic.payload_bytes_in.inc_by(data.bytes().len() as u64);

    let publisher = Publisher { user: Some(identity.subject().shared()), session: gate.ids.next() };
    let publication = Publication { data, event, publisher: Some(publisher), exclude: None };
    let (sink, outcome) = oneshot::channel();
    let sink = Arc::new(Once(Mutex::new(Some(sink))));
    let receipt = Receipt::new(sink, Ticket { owner: 0, request: 0 });
    let request = PublishRequest { room, publication, history, id, affinity, receipt };
    gate.broker.publish(request).await;
    match outcome.await.unwrap_or(Err(BrokerError::Closed)) {
        Ok(accepted) => Ok(answer_accepted(accepted)),
        Err(error) => {
            tracing::debug!(request = request_name(parts), %error, "a publication was not delivered");
            Err(Outcome::from(&error).refusal.into())
        }
    }
}

/// 202, with the publication's position if it was recorded.
fn answer_accepted(accepted: Accepted) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::ACCEPTED;
    if let Some(cursor) = accepted.cursor {
        let id = cursor.to_string();
        let body = if accepted.duplicate {
            serde_json::json!({ "id": id, "duplicate": true })
        } else {
            serde_json::json!({ "id": id })
        };
        *response.body_mut() = Body::from(body.to_string());
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    response
}

/// What the content type says about the body.
enum MediaType {
    Json,
    Text,
    Binary,
    /// Detect the type: there is no content type, or the one that `curl -d` sends with everything.
    Detect,
}

impl MediaType {
    fn of(parts: &Parts) -> Result<Self, Problem> {
        if !parts.headers.get_all(header::CONTENT_ENCODING).iter().all(is_identity) {
            return Err(Problem::new(Refusal::MediaType, "expected a body without Content-Encoding"));
        }
        let Some(value) = parts.headers.get(header::CONTENT_TYPE) else { return Ok(Self::Detect) };
        let value =
            value.to_str().map_err(|_| Problem::new(Refusal::MediaType, "Content-Type is not ASCII"))?;
        let mut parameters = value.split(';').map(str::trim);
        let essence = parameters.next().unwrap_or_default().to_ascii_lowercase();
        let charset = parameters
            .filter_map(|parameter| parameter.split_once('='))
            .find(|(name, _)| name.trim().eq_ignore_ascii_case("charset"))
            .map(|(_, charset)| charset.trim().trim_matches('"').to_ascii_lowercase());
        if charset.is_some_and(|charset| charset != "utf-8" && charset != "us-ascii") {
            return Err(Problem::new(Refusal::MediaType, "expected charset=utf-8, which is the default"));
        }
        Ok(match essence.as_str() {
            "application/json" => Self::Json,
            "application/x-www-form-urlencoded" => Self::Detect,
            essence if essence.ends_with("+json") => Self::Json,
            essence if essence.starts_with("text/") => Self::Text,
            _ => Self::Binary,
        })
    }

    fn read(self, bytes: Bytes) -> Result<Data, Problem> {
        match self {
            Self::Detect => Ok(Data::detect(bytes)),
            Self::Binary => Ok(Data::binary(bytes)),
            Self::Text => Data::declare(DataKind::Text, bytes)
                .ok_or_else(|| Problem::new(Refusal::Body, "expected the text to be UTF-8")),
            Self::Json => Data::json(bytes)
                .map_err(|error| Problem::new(Refusal::Body, format!("expected JSON: {error}"))),
        }
    }
}

/// Whether the list of codings leaves the body unchanged (RFC 9110 §8.4). Empty elements are ignored
/// (§5.6.1).
fn is_identity(codings: &HeaderValue) -> bool {
    codings
        .as_bytes()
        .split(|byte| *byte == b',')
        .map(<[u8]>::trim_ascii)
        .all(|coding| coding.is_empty() || coding.eq_ignore_ascii_case(b"identity"))
}

fn event_name(parts: &Parts) -> Result<Option<EventName>, Problem> {
    let query = Query::new(parts.uri.query()).one("event")?;
    // A header that is not text becomes an empty name, which is refused below.
    let header =
        parts.headers.contains_key(X_EVENT).then(|| header_text(parts, &X_EVENT).unwrap_or_default());
    let name = match (header, query.as_deref()) {
        (Some(_), Some(_)) => {
            let detail = "expected the event's name in `X-Event` or in `?event=`, found both";
            return Err(Problem::new(Refusal::BadRequest, detail));
        }
        (Some(name), None) | (None, Some(name)) => name,
        (None, None) => return Ok(None),
    };
    EventName::new(name).map(Some).map_err(|error| Problem::new(Refusal::BadRequest, error.to_string()))
}

/// The id that `Idempotency-Key` gives to the publication of this user. Refused if the room has no history,
/// because then nothing could recognize it.
///
/// The draft sends a string of structured fields (RFC 9651 §3.3.3), in quotes; many clients send the bare text.
/// Both are the same id.
fn publication_id(
    parts: &Parts,
    user: &Subject,
    has_history: bool,
) -> Result<Option<PublicationId>, Problem> {
    if !parts.headers.contains_key(IDEMPOTENCY_KEY) {
        return Ok(None);
    }
    // A header that is not text becomes an empty key, which is refused below.
    let text = header_text(parts, &IDEMPOTENCY_KEY).unwrap_or_default();
    let key = match text.strip_prefix('"') {
        Some(quoted) => unquote(quoted).map(Cow::Owned),
        None => Some(Cow::Borrowed(text)),
    };
    let id = key.and_then(|key| PublicationId::new(Owner::Client(user.shared()), &key).ok());
    let Some(id) = id else {
        let detail = "expected an `Idempotency-Key` of 1 to 64 printable ASCII characters without spaces";
        return Err(Problem::new(Refusal::BadRequest, detail));
    };
    if !has_history {
        let detail = "this room keeps no history, so it cannot recognize an `Idempotency-Key`; leave the \
                      header out";
        return Err(Problem::new(Refusal::BadRequest, detail));
    }
    Ok(Some(id))
}

/// The text of a string of structured fields, after the opening quote.
fn unquote(quoted: &str) -> Option<String> {
    let mut rest = quoted.chars();
    let mut text = String::new();
    loop {
        match rest.next()? {
            '"' => return rest.next().is_none().then_some(text),
            '\\' => text.push(rest.next().filter(|escaped| matches!(escaped, '"' | '\\'))?),
            c => text.push(c),
        }
    }
}

async fn body_bytes(gate: &Gate, body: Body, held: &mut Held) -> Result<Bytes, Problem> {
    let settings = gate.settings();
    let (time, size) = (settings.body_timeout, settings.limits.message_size.get());
    let read = timeout::timeout(time, collect(Limited::new(body, size), held));
    match read.await {
        Err(_) => {
            let detail = format!("expected the whole body within {time:?}");
            Err(Problem::new(Refusal::BodyTimeout, detail))
        }
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(Interrupted::Memory)) => Err(Refusal::Memory.into()),
        Ok(Err(Interrupted::Body(error))) if error.is::<LengthLimitError>() => {
            let detail = format!("a message has at most {size} bytes");
            Err(Problem::new(Refusal::BodyTooLarge, detail))
        }
        Ok(Err(Interrupted::Body(_))) => Err(Problem::new(Refusal::Body, "the body ended early")),
    }
}

/// Why the body could not be read.
enum Interrupted {
    /// The node is short of memory.
    Memory,
    /// It is too long, or the connection was lost.
    Body(Box<dyn std::error::Error + Send + Sync>),
}

/// Reads the body into memory of its own. The buffer that it was read from is larger and is freed. Both are
/// counted against the budget, from the start if the length is known.
async fn collect(mut body: Limited<Body>, held: &mut Held) -> Result<Bytes, Interrupted> {
    let size = body.size_hint();
    let announced = usize::try_from(size.lower()).unwrap_or(usize::MAX / 4);
    let most = size.upper().and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX / 4);
    let mut bytes = Vec::new();
    reserve(&mut bytes, announced, held)?;
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame.map_err(Interrupted::Body)?.into_data() else { continue };
        let length = bytes.len() + piece.len();
        if length > bytes.capacity() {
            let doubled = bytes.capacity().saturating_mul(2).min(most);
            reserve(&mut bytes, length.max(doubled), held)?;
        }
        bytes.extend_from_slice(&piece);
    }
    // The broker's queue counts the length, so the capacity must match.
    bytes.shrink_to_fit();
    Ok(bytes.into())
}

/// Grows the buffer to this capacity, if the budget allows. Reserved memory is not requested again.
fn reserve(bytes: &mut Vec<u8>, capacity: usize, held: &mut Held) -> Result<(), Interrupted> {
    let cost = |capacity: usize| capacity + capacity.min(READ_BUFFER);
    let more = cost(capacity) - cost(bytes.capacity());
    if !held.budget().admits(more) {
        return Err(Interrupted::Memory);
    }
    held.grow(more);
    bytes.reserve_exact(capacity - bytes.len());
    Ok(())
}

/// Passes a receipt's outcome to the task that waits for it.
struct Once(Mutex<Option<oneshot::Sender<Result<Accepted, BrokerError>>>>);

impl ReceiptSink for Once {
    fn settle(&self, _: Ticket, outcome: Result<Accepted, BrokerError>) {
        if let Some(sender) = self.0.lock().take() {
            // The waiting task may be gone.
            drop(sender.send(outcome));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        convert::Infallible,
        pin::Pin,
        task::{Context, Poll},
    };

    use http_body::{Frame, SizeHint};
    use prometheus::Registry;

    use super::*;
    use crate::budget::Budget;

    /// A body; all memory is taken by something else before its first piece.
    struct Pieces {
        left: VecDeque<Bytes>,
        announced: Option<u64>,
        meanwhile: Option<(Arc<Budget>, i64)>,
    }

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            if let Some((budget, bytes)) = self.meanwhile.take() {
                budget.settle(Consumer::Outbound, bytes);
            }
            Poll::Ready(self.left.pop_front().map(|piece| Ok(Frame::data(piece))))
        }

        fn size_hint(&self) -> SizeHint {
            self.announced.map_or_else(SizeHint::default, SizeHint::with_exact)
        }
    }

    fn pieces(announced: Option<u64>, meanwhile: Option<(Arc<Budget>, i64)>) -> Limited<Body> {
        let left = (0..3).map(|n| Bytes::from(vec![n; 1000])).collect();
        Limited::new(Body::new(Pieces { left, announced, meanwhile }), 3500)
    }

    fn budget() -> Arc<Budget> {
        let budget = Budget::register(&Registry::new(), 1).unwrap();
        budget.set_limit(80_000);
        budget
    }

    #[tokio::test]
    async fn a_started_body_of_known_length_is_read_to_its_end() {
        let budget = budget();
        let mut held = budget.hold(Consumer::Bodies, 0);
        let body = pieces(Some(3000), Some((Arc::clone(&budget), 80_000)));
        let bytes = collect(body, &mut held).await.ok().unwrap();
        assert_eq!((bytes.len(), budget.held_by(Consumer::Bodies)), (3000, 6000));

        // The next one is refused before any of it is read.
        assert!(matches!(collect(pieces(Some(3000), None), &mut held).await, Err(Interrupted::Memory)));
    }

    #[tokio::test]
    async fn the_reservation_of_a_body_of_unknown_length_is_counted() {
        let budget = budget();
        let mut held = budget.hold(Consumer::Bodies, 0);
        let bytes = collect(pieces(None, None), &mut held).await.ok().unwrap();
        // 1000, twice that, and then the maximum of a body; each counted twice, for the buffer that it is
        // read from.
        assert_eq!(budget.held_by(Consumer::Bodies), 2 * 3500);
        assert_eq!(Vec::from(bytes).capacity(), 3000);
        drop(held);
        assert_eq!(budget.held(), 0);
    }

    fn keyed(key: &str, has_history: bool) -> Result<Option<PublicationId>, Problem> {
        let request = http::Request::post("/rooms/lobby").header("Idempotency-Key", key);
        let parts = request.body(()).unwrap().into_parts().0;
        publication_id(&parts, &Subject::new("alice").unwrap(), has_history)
    }

    #[test]
    fn an_idempotency_key_is_a_short_text_with_or_without_quotes() {
        let longest = "x".repeat(64);
        for (value, text) in [
            ("order-1", "order-1"),
            ("\"order-1\"", "order-1"),
            ("\"\\\"a\\\\\"", "\"a\\"),
            ("a\"b", "a\"b"),
            (&longest, &longest),
            (&format!("\"{longest}\""), &longest),
        ] {
            let id = keyed(value, true).unwrap().unwrap();
            assert_eq!((id.as_str(), id.owner()), (text, &Owner::Client("alice".into())), "{value}");
        }
        for value in [
            "",
            "\"\"",
            "a b",
            "\"a b\"",
            "a, b",
            "\"a",
            "\"",
            "\"a\"b",
            "\"a\";p=1",
            "\"a\\b\"",
            "\"a\\",
            "\u{e9}",
            &format!("{longest}x"),
        ] {
            let problem = keyed(value, true).unwrap_err();
            assert_eq!(problem.refusal(), Refusal::BadRequest, "{value}");
            assert!(problem.detail().contains("1 to 64"), "{}", problem.detail());
        }
    }

    #[test]
    fn a_key_is_refused_where_nothing_would_recognize_it() {
        let problem = keyed("order-1", false).unwrap_err();
        assert_eq!(problem.refusal(), Refusal::BadRequest);
        assert!(problem.detail().contains("keeps no history"), "{}", problem.detail());
        let without = http::Request::post("/rooms/lobby").body(()).unwrap().into_parts().0;
        assert_eq!(publication_id(&without, &Subject::new("alice").unwrap(), false).unwrap(), None);
    }

    #[test]
    fn only_unencoded_bodies_are_accepted() {
        for (values, expected) in [
            (&[] as &[&str], true),
            (&["identity"], true),
            (&["Identity", "identity, ,IDENTITY"], true),
            (&["gzip"], false),
            (&["identity", "gzip"], false),
            (&["identity, gzip"], false),
            (&["identity", "x\u{e9}"], false),
        ] {
            let request = http::Request::post("/rooms/lobby");
            let request = values.iter().fold(request, |it, value| it.header("content-encoding", *value));
            let found = MediaType::of(&request.body(()).unwrap().into_parts().0);
            assert_eq!(
                found.map_err(|problem| problem.refusal()).err(),
                (!expected).then_some(Refusal::MediaType)
            );
        }
    }
}

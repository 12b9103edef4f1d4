//! `POST /rooms/{room}`: publish the body.

use std::sync::Arc;

use axum::body::Body;
use broker_bridge::{
    BrokerError, Data, DataKind, EventName, Publication, PublishRequest, Publisher, Receipt, ReceiptSink,
    RoomName, Ticket,
};
use bytes::Bytes;
use http::{HeaderName, Response, StatusCode, header, request::Parts};
use http_body::Body as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{
    Gate, Problem, Refusal,
    gate::{header_text, request_name},
    query::Query,
};
use crate::{
    auth::Operation,
    budget::{Consumer, Held, READ_BUFFER},
    outcome::Told,
    shard,
};

/// Names the event of a publication.
pub(super) const X_EVENT: HeaderName = HeaderName::from_static("x-event");

/// Publishes the body into `room` and answers 202 once the broker has acknowledged it.
pub async fn publish(
    gate: &Gate,
    parts: &Parts,
    body: Body,
    room: RoomName,
) -> Result<Response<Body>, Problem> {
    // Served by a leaving node, too, as long as somebody sends it here: it is no session.
    gate.check_connections()?;
    gate.check_origin(parts)?;
    let identity = gate.authenticate(parts).await?;
    gate.check_grant(&identity, Operation::Publish, std::slice::from_ref(&room))?;
    gate.check_user(&identity, None)?;
    let event = event_name(parts)?;
    let media_type = MediaType::of(parts)?;
    // Counted until the publication is settled.
    let mut held = gate.budget.hold(Consumer::Bodies, 0);
    let data = media_type.read(body_bytes(gate, body, &mut held).await?)?;
    gate.check_expiry(&identity)?;
    gate.check_user(&identity, Some(data.bytes().len()))?;
    gate.metrics.messages_in.inc();
    gate.metrics.payload_bytes_in.inc_by(data.bytes().len() as u64);

    let publisher = Publisher { user: Some(identity.subject().shared()), session: gate.ids.next() };
    let publication = Publication { data, event, publisher: Some(publisher), exclude: None };
    let (sink, outcome) = oneshot::channel();
    let sink = Arc::new(Once(Mutex::new(Some(sink))));
    let receipt = Receipt::new(sink, Ticket { owner: 0, request: 0 });
    gate.broker.publish(PublishRequest { room, publication, receipt }).await;
    match outcome.await.unwrap_or(Err(BrokerError::Closed)) {
        Ok(()) => {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::ACCEPTED;
            Ok(response)
        }
        Err(error) => {
            tracing::debug!(request = request_name(parts), %error, "a publication was not delivered");
            Err(Told::from(&error).refusal.into())
        }
    }
}

/// What the content type says of the body.
enum MediaType {
    Json,
    Text,
    Binary,
    /// Nothing that can be relied on: no type at all, or the one that `curl -d` sends with anything.
    Detect,
}

impl MediaType {
    fn of(parts: &Parts) -> Result<Self, Problem> {
        if let Some(encoding) = parts.headers.get(header::CONTENT_ENCODING)
            && encoding != "identity"
        {
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

fn event_name(parts: &Parts) -> Result<Option<EventName>, Problem> {
    let query = Query::new(parts.uri.query()).one("event")?;
    // A header that is no text becomes an empty name, which is refused below.
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

async fn body_bytes(gate: &Gate, body: Body, held: &mut Held) -> Result<Bytes, Problem> {
    let settings = gate.settings();
    let (time, size) = (settings.body_timeout, settings.limits.message_size.get());
    let read = shard::timeout(time, collect(Limited::new(body, size), held));
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

/// Why a body was not read to its end.
enum Interrupted {
    /// The node is short of memory.
    Memory,
    /// It is too long, or the connection was lost.
    Body(Box<dyn std::error::Error + Send + Sync>),
}

/// Reads a body into memory of its own: what it was read into holds more than the body, and goes back. Both are counted,
/// from the start if the length is known.
async fn collect(mut body: Limited<Body>, held: &mut Held) -> Result<Bytes, Interrupted> {
    let mut counted = 0;
    let mut reserve = |length: usize| {
        let more = (length + length.min(READ_BUFFER)).saturating_sub(counted);
        if !held.budget().admits(more) {
            return Err(Interrupted::Memory);
        }
        held.grow(more);
        counted += more;
        Ok(())
    };
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX / 4);
    reserve(announced)?;
    let mut bytes = Vec::with_capacity(announced);
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame.map_err(Interrupted::Body)?.into_data() else { continue };
        reserve(bytes.len() + piece.len())?;
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.into())
}

/// Hands a receipt's outcome to whoever waits for it.
struct Once(Mutex<Option<oneshot::Sender<Result<(), BrokerError>>>>);

impl ReceiptSink for Once {
    fn settle(&self, _: Ticket, outcome: Result<(), BrokerError>) {
        if let Some(sender) = self.0.lock().take() {
            // Who waited may have gone away.
            drop(sender.send(outcome));
        }
    }
}

//! Long polling: `GET` of a room with a history that accepts `application/json`. One answer, as soon as there is
//! something to answer:
//!
//! ```json
//! {"messages":[{"room":"lobby","id":"17-43","data":"hi"}],"cursor":"17-43","gap":null}
//! ```
//!
//! | member | meaning |
//! |---|---|
//! | `messages` | what was published after `?since=`, each as in [JSON lines](super::ndjson) |
//! | `cursor` | the position after them: `?since=` of the next request |
//! | `gap` | why publications may be missing before `messages`; `null` if none are |
//!
//! A request without `since` is answered at once with the current position, or with the newest publications if it has
//! `?last=`. Otherwise it waits for `?wait=` seconds. A gap alone ends the waiting only if it is known where to continue:
//! otherwise the next request would be told the same gap at once.
//!
//! The answer begins before there is anything in it, like a stream, and ends with the session. Heartbeats are white space.

use std::{rc::Rc, time::Duration};

use broker_bridge::{GapCause, RoomName};
use http::{HeaderMap, HeaderValue, header};

use super::{
    Ask, Command, Endpoint, Message, News, On, Opening, Protocol, Reply, RequestId, RoomFormat, Route, Then,
    ndjson,
};
use crate::{
    framing::{Format, MemberState, Packets, Positions, Writer},
    history::Beginning,
    request::Problem,
    vocabulary::{CloseReason, ProtocolName, Refusal},
};

const MEDIA_TYPE: &str = "application/json";
/// The longest that a request may wait, in seconds.
const MAX_WAIT: u64 = 60;

/// `GET` of one room that accepts `application/json`.
pub static ENDPOINT: Endpoint = Endpoint {
    name: ProtocolName::new("long_poll"),
    routes: &[Route { path: "/rooms/{room}", on: On::Stream { media_type: MEDIA_TYPE, head, open } }],
    refuse: None,
};

/// An element of `messages`. Its comma is the session's own.
static ELEMENT: Format =
    Format { write: |room, publication, _, out| ndjson::write(room, publication, out), head: Some(separate) };

/// The state of one answer.
#[derive(Debug)]
struct Answer {
    /// How many publications have been written, and the position after them.
    state: Rc<MemberState>,
    /// What may be missing before them.
    gap: Option<GapCause>,
    wait: Duration,
    /// Whether the client has no position yet, and wants one.
    asks_for_position: bool,
}

fn open(ask: &Ask<'_>) -> Result<Opening, Problem> {
    let rooms = ask.rooms()?;
    let begin = ask.begin(&rooms)?;
    let wait = wait(ask)?;
    let beginning = begin.first().copied().unwrap_or_default();
    let since = beginning.since();
    let wait = if since.is_some() { wait } else { Duration::ZERO };
    let asks_for_position = beginning == Beginning::Live;
    let protocol = std::sync::Arc::new(move || {
        let positions = Some((Rc::new(Positions::new([since])), 0));
        let state = Rc::new(MemberState { positions, ..MemberState::default() });
        Box::new(Answer { state, gap: None, wait, asks_for_position }) as _
    });
    Ok(Opening { rooms, begin, is_answer: true, has_all_positions: false, signs_in_later: false, protocol })
}

fn wait(ask: &Ask<'_>) -> Result<Duration, Problem> {
    let Some(text) = ask.query().one("wait")? else { return Ok(Duration::ZERO) };
    let seconds = text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    if let Some(seconds @ 0..=MAX_WAIT) = seconds {
        return Ok(Duration::from_secs(seconds));
    }
    let detail = format!("query parameter `wait`: expected seconds from 0 to {MAX_WAIT}, found {text:?}");
    Err(Problem::new(Refusal::BadRequest, detail))
}

fn head(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
}

/// Writes what is between two elements, and counts.
fn separate(state: &MemberState, out: &mut Writer) {
    if state.count.replace(state.count.get() + 1) > 0 {
        out.put(b",");
    }
    if let (Some((positions, index)), Some(position)) = (&state.positions, out.position()) {
        positions.set(*index, position);
    }
}

impl Protocol for Answer {
    /// The transport has no way for the client to send.
    fn decode(&mut self, _: Message, _: &mut Vec<Command>) {}

    fn reply(&mut self, _: RequestId, _: &Reply, _: &mut Packets) -> Then {
        Then::Stay
    }

    fn news(&mut self, news: &News<'_>, _: &mut Packets) -> Then {
        match news {
            // The next answer begins with it.
            News::Gap(..) if self.answered() > 0 => return Then::Close(CloseReason::Answered),
            News::Gap(_, cause) => self.gap = Some(*cause),
            News::Position(_, position) => {
                if let Some((positions, index)) = &self.state.positions {
                    positions.set(*index, *position);
                }
                if self.asks_for_position || self.gap.is_some() {
                    return Then::Close(CloseReason::Answered);
                }
            }
            News::NewEpoch(_) => {}
            News::Expelled(_) => return Then::Close(CloseReason::Forbidden),
        }
        Then::Stay
    }

    fn format(&mut self, _: &RoomName, _: RequestId) -> RoomFormat {
        RoomFormat { format: &ELEMENT, variant: 0, state: Some(Rc::clone(&self.state)) }
    }

    fn patience(&self) -> Option<Duration> {
        Some(self.wait)
    }

    fn answered(&self) -> u64 {
        self.state.count.get()
    }

    fn greet(&mut self, _: f32, out: &mut Packets) {
        out.text(b"{\"messages\":[");
    }

    fn heartbeat(&mut self, out: &mut Packets) {
        out.text_static(b"\n");
    }

    fn farewell(&mut self, reason: CloseReason, _: f32, out: &mut Packets) {
        // Publications that were counted have been dropped from the queue. An answer without an end is not JSON, so the
        // client asks again from where it was.
        if matches!(reason, CloseReason::SlowConsumer | CloseReason::OutOfMemory) {
            return;
        }
        let position = self.state.positions.as_ref().and_then(|(positions, index)| positions.get(*index));
        let end = serde_json::json!({
            "cursor": position.map(|position| position.to_string()),
            "gap": self.gap.map(GapCause::as_str),
        });
        // Without its brace it follows the array.
        let end = end.to_string();
        out.text(format!("],{}\n", end.get(1..).unwrap_or_default()).as_bytes());
    }
}

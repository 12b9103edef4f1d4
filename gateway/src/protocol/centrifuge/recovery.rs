//! The reply to a subscription: where it begins, and what the client has missed.
//!
//! In a room with a history a subscription has a position, an epoch and an offset. The client takes the epoch from the
//! reply and the offset from the last publication. It subscribes again with both when it has lost its connection.

use std::io::Write as _;

use super::{GROWS, Subscribed, put_publication};
use crate::{framing::Writer, protocol::RequestId};

/// The reply, and how many of the missed publications it contains.
pub(super) fn reply(id: RequestId, subscribed: &Subscribed<'_>) -> (Vec<u8>, usize) {
    let &Subscribed { position, recovered, missed, most } = subscribed;
    let mut fields = Vec::new();
    if let Some(position) = position {
        // A number of 64 bits would lose digits in JavaScript, and the protocol's epochs are strings.
        write!(fields, r#","recoverable":true,"positioned":true,"epoch":"{}""#, position.epoch).expect(GROWS);
        write!(fields, r#","offset":{}"#, position.offset).expect(GROWS);
    }
    if let Some(recovered) = recovered {
        write!(fields, r#","was_recovering":true,"recovered":{recovered}"#).expect(GROWS);
    }
    let mut held = 0;
    let mut publications = Writer::body();
    for (publication, position) in missed {
        let mut next = Writer::body();
        put_publication(publication, Some(position.offset), &mut next);
        if publications.payload().len() + next.payload().len() + 1 > most.saturating_sub(AROUND) {
            break;
        }
        if held > 0 {
            publications.put(b",");
        }
        publications.put(next.payload());
        held += 1;
    }
    if held > 0 {
        fields.extend_from_slice(br#","publications":["#);
        fields.extend_from_slice(publications.payload());
        fields.push(b']');
    }
    let mut reply = Vec::with_capacity(fields.len() + 48);
    write!(reply, r#"{{"id":{id},"subscribe":{{"#).expect(GROWS);
    reply.extend_from_slice(fields.get(1..).unwrap_or_default());
    reply.extend_from_slice(b"}}");
    (reply, held)
}

/// More than what is around the publications.
const AROUND: usize = 256;

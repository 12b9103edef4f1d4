//! The replies with publications: to a subscription, of what the client has missed, and to a request for history.
//!
//! In a room with a history a subscription has a position, an epoch and an offset. The client takes the epoch from the
//! reply and the offset from the last publication. It subscribes again with both when it has lost its connection.

use std::io::Write as _;

use broker_bridge::{Cursor, Publication};

use super::{GROWS, Subscribed, put_publication};
use crate::{
    framing::Writer,
    protocol::{History, RequestId},
};

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
    let (publications, held) = list(missed, most.saturating_sub(AROUND), 0);
    if held > 0 {
        fields.extend_from_slice(br#","publications":"#);
        fields.extend_from_slice(&publications);
    }
    let mut reply = Vec::with_capacity(fields.len() + 48);
    write!(reply, r#"{{"id":{id},"subscribe":{{"#).expect(GROWS);
    reply.extend_from_slice(fields.get(1..).unwrap_or_default());
    reply.extend_from_slice(b"}}");
    (reply, held)
}

/// The reply to a request for a part of a room's history.
pub(super) fn history(id: RequestId, history: &History<'_>) -> Vec<u8> {
    let &History { position: Cursor { epoch, offset }, publications, most } = history;
    // One at least, so that whoever goes on from the last arrives at the end.
    let (publications, _) = list(publications, most.saturating_sub(AROUND), 1);
    let mut reply = Vec::with_capacity(publications.len() + AROUND);
    write!(reply, r#"{{"id":{id},"history":{{"publications":"#).expect(GROWS);
    reply.extend_from_slice(&publications);
    write!(reply, r#","epoch":"{epoch}","offset":{offset}}}}}"#).expect(GROWS);
    reply
}

/// As many publications as fit into `most` bytes, but at least the first `least`, as a JSON array. And how many that are.
fn list(publications: &[(&Publication, Cursor)], most: usize, least: usize) -> (Vec<u8>, usize) {
    let mut list = vec![b'['];
    let mut held = 0;
    for (publication, position) in publications {
        let mut next = Writer::body();
        put_publication(publication, Some(position.offset), &mut next);
        if list.len() + next.payload().len() + 2 > most && held >= least {
            break;
        }
        if held > 0 {
            list.push(b',');
        }
        list.extend_from_slice(next.payload());
        held += 1;
    }
    list.push(b']');
    (list, held)
}

/// More than what is around the publications.
const AROUND: usize = 256;

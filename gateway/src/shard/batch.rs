//! Publications of one room that arrived together.
//!
//! Each member gets them as one piece, so the cost of a delivery besides the system call is paid once for all
//! of them.

use std::{borrow::Cow, sync::Arc};

use bytes::{Bytes, BytesMut};

use super::ShardEvent;
use crate::framing::{Broadcast, Cache, Encoding};

/// The most bytes joined in one batch. Beyond this, copying costs more than it saves.
const MAX_BYTES: usize = 64 * 1024;
/// About what each publication has around its payload.
const PER_PUBLICATION: usize = 64;

/// Broadcasts of one room, in order, the same for all of its members.
#[derive(Debug, Default)]
pub struct Batch {
    broadcasts: Vec<Arc<Broadcast>>,
    payload: usize,
    frames: Cache,
}

impl Batch {
    /// Whether the batch may be delivered after `event` is handled.
    pub fn may_wait(&self, event: &ShardEvent, outbound: usize) -> bool {
        match event {
            ShardEvent::Broadcast(broadcast) => self.takes(broadcast, outbound),
            // The broker's acknowledgements come in between the publications of a busy session. They say
            // nothing about the room, so they may overtake its publications.
            ShardEvent::Settled(_, outcome) => outcome.is_ok(),
            _ => false,
        }
    }

    /// Whether `broadcast` may join the batch: it is for the same room, neither it nor the batch excludes a
    /// session, and the total stays within the bound. That is at most half of `outbound`, what a session's
    /// queue may hold: nobody must look slow because much arrived at once.
    pub fn takes(&self, broadcast: &Broadcast, outbound: usize) -> bool {
        let around = PER_PUBLICATION * (self.broadcasts.len() + 1);
        self.broadcasts.last().is_none_or(|last| {
            last.room() == broadcast.room()
                && last.exclude().is_none()
                && broadcast.exclude().is_none()
                && self.payload + broadcast.payload_len() + around <= MAX_BYTES.min(outbound / 2)
        })
    }

    /// Adds a broadcast that it [takes](Self::takes).
    pub fn push(&mut self, broadcast: Arc<Broadcast>) {
        debug_assert!(self.takes(&broadcast, usize::MAX));
        self.payload += broadcast.payload_len();
        self.broadcasts.push(broadcast);
    }

    /// The first broadcast, if there is any. Gives the room and the excluded session of the batch.
    pub fn first(&self) -> Option<&Broadcast> {
        self.broadcasts.first().map(Arc::as_ref)
    }

    /// Each broadcast separately, with its bytes in this encoding.
    pub fn frames(
        &self,
        encoding: Encoding,
        threshold: usize,
    ) -> impl Iterator<Item = (Cow<'_, Bytes>, &Broadcast)> {
        self.broadcasts.iter().map(move |broadcast| (broadcast.frame(encoding, threshold), &**broadcast))
    }

    /// How many of the first broadcasts have a number below this one.
    pub fn count_below(&self, number: u64) -> usize {
        self.broadcasts.iter().take_while(|broadcast| broadcast.number() < number).count()
    }

    /// How many broadcasts there are.
    pub fn len(&self) -> usize {
        self.broadcasts.len()
    }

    /// Their total payload in bytes.
    pub fn payload_len(&self) -> usize {
        self.payload
    }

    /// All broadcasts in this encoding, joined once and cached. Publications shorter than `threshold` bytes
    /// are not compressed. Not for encodings with per-member heads, which go between the publications.
    pub fn frame(&self, encoding: Encoding, threshold: usize) -> Cow<'_, Bytes> {
        debug_assert!(!encoding.has_heads(), "messages with heads are sent one by one");
        let [one] = self.broadcasts.as_slice() else {
            return self.frames.get_or_make(encoding, || self.join(encoding, threshold));
        };
        one.frame(encoding, threshold)
    }

    fn join(&self, encoding: Encoding, threshold: usize) -> Bytes {
        let frames: Vec<_> = self.frames(encoding, threshold).map(|(frame, _)| frame).collect();
        let mut all = BytesMut::with_capacity(frames.iter().map(|frame| frame.len()).sum());
        for frame in &frames {
            all.extend_from_slice(frame);
        }
        match self.first() {
            Some(first) => first.share(all.freeze()),
            None => all.freeze(),
        }
    }

    /// Takes the broadcasts out and leaves an empty batch.
    pub fn take(&mut self) -> impl Iterator<Item = Arc<Broadcast>> {
        self.payload = 0;
        self.frames = Cache::default();
        self.broadcasts.drain(..)
    }
}

#[cfg(test)]
mod tests {
    use broker_bridge::{Accepted, BrokerError, Data, GapCause, Publication, RoomName, SessionId, Ticket};

    use super::*;
    use crate::framing::{Format, Transport};

    /// What a queue may hold.
    const OUTBOUND: usize = 1024 * 1024;

    static PLAIN: Format =
        Format { write: |_, publication, _, out| out.put(publication.data.bytes()), head: None };

    fn broadcast(room: &str, text: &str, exclude: Option<SessionId>) -> Arc<Broadcast> {
        let publication = Publication { exclude, ..Publication::new(Data::text(text)) };
        Arc::new(Broadcast::new(RoomName::new(room).unwrap(), publication, 1))
    }

    #[test]
    fn only_broadcasts_for_all_members_are_joined() {
        let mut batch = Batch::default();
        batch.push(broadcast("a", "one", None));
        assert!(batch.takes(&broadcast("a", "two", None), OUTBOUND));
        assert!(!batch.takes(&broadcast("b", "two", None), OUTBOUND), "another room");
        assert!(!batch.takes(&broadcast("a", "two", Some(SessionId(1))), OUTBOUND), "not for everybody");
        assert!(!batch.takes(&broadcast("a", &"x".repeat(MAX_BYTES), None), OUTBOUND), "too much");
        assert!(batch.takes(&broadcast("a", "two", None), 2 * (6 + 2 * PER_PUBLICATION)));
        assert!(!batch.takes(&broadcast("a", "two", None), 2 * (5 + 2 * PER_PUBLICATION)), "half of a queue");

        let mut alone = Batch::default();
        alone.push(broadcast("a", "one", Some(SessionId(1))));
        assert!(!alone.takes(&broadcast("a", "two", None), OUTBOUND));
    }

    #[test]
    fn acknowledgements_do_not_split_a_batch_but_failures_and_gaps_do() {
        let mut batch = Batch::default();
        batch.push(broadcast("a", "one", None));
        let ticket = Ticket { owner: 1, request: 1 };
        assert!(batch.may_wait(&ShardEvent::Settled(ticket, Ok(Accepted::default())), OUTBOUND));
        assert!(batch.may_wait(&ShardEvent::Broadcast(broadcast("a", "two", None)), OUTBOUND));
        assert!(!batch.may_wait(&ShardEvent::Settled(ticket, Err(BrokerError::Unavailable)), OUTBOUND));
        assert!(
            !batch
                .may_wait(&ShardEvent::Gap(RoomName::new("a").unwrap(), GapCause::Interrupted, 0), OUTBOUND)
        );
        assert!(!batch.may_wait(&ShardEvent::Broadcast(broadcast("b", "two", None)), OUTBOUND));
    }

    #[test]
    fn frames_follow_each_other() {
        let mut batch = Batch::default();
        batch.push(broadcast("a", "one", None));
        batch.push(broadcast("a", "two", None));
        assert_eq!(
            *batch.frame(Encoding::new(&PLAIN, Transport::WebSocket), 0),
            b"\x81\x03one\x81\x03two"[..]
        );
        assert_eq!(*batch.frame(Encoding::new(&PLAIN, Transport::Body), 0), b"onetwo"[..]);
        assert_eq!((batch.len(), batch.payload_len()), (2, 6));

        assert_eq!(batch.take().count(), 2);
        assert_eq!((batch.len(), batch.payload_len()), (0, 0));
        batch.push(broadcast("b", "three", None));
        assert_eq!(*batch.frame(Encoding::new(&PLAIN, Transport::WebSocket), 0), b"\x81\x05three"[..]);
    }
}

//! A session's queue of bytes on their way out.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf as _, Bytes};

/// Frames that wait for their socket, bounded in bytes.
///
/// Frames are shared with every other member of the room; the queue holds only handles. Empty, it holds
/// no more than a few handles' worth of memory, and none after [`Outbound::release`]. Each frame costs
/// [`Outbound::PER_FRAME`] of the bound besides its bytes: the answers to a flood of empty pings are two bytes
/// each on the wire and thirty times that in memory.
#[derive(Debug, Default)]
pub struct Outbound {
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// Whether the head frame has been written in part.
    head_started: bool,
}

/// The queue has no room for another frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

impl Outbound {
    /// What a frame costs beside its bytes: a handle here, and for a frame of one's own an allocation.
    pub const PER_FRAME: usize = 64;
    /// How many frames one system call takes at most.
    pub const BATCH: usize = 64;

    /// Queues a frame if the queue then costs at most `limit` bytes. One frame always fits into an empty
    /// queue, however large.
    pub fn push(&mut self, frame: Bytes, limit: usize) -> Result<(), Full> {
        let cost = self.bytes + frame.len() + (self.frames.len() + 1) * Self::PER_FRAME;
        if !self.is_empty() && cost > limit {
            return Err(Full);
        }
        self.push_last(frame);
        Ok(())
    }

    /// Queues a frame whatever the bound: the last words of a session.
    pub fn push_last(&mut self, frame: Bytes) {
        if !frame.is_empty() {
            self.bytes += frame.len();
            self.frames.push_back(frame);
        }
    }

    /// Forgets all frames but one that is half written: a peer must see whole frames.
    pub fn clear(&mut self) {
        self.frames.truncate(usize::from(self.head_started));
        self.bytes = self.frames.iter().map(Bytes::len).sum();
    }

    /// Forgets everything.
    pub fn discard(&mut self) {
        *self = Self::default();
    }

    /// Bytes queued.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether nothing is queued.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// The frame, if there is just one.
    pub fn only(&self) -> Option<&Bytes> {
        if self.frames.len() == 1 { self.frames.front() } else { None }
    }

    /// Points `slices` at the first frames and returns how many it used.
    pub fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>; Self::BATCH]) -> usize {
        let mut used = 0;
        for (slice, frame) in slices.iter_mut().zip(&self.frames) {
            *slice = IoSlice::new(frame);
            used += 1;
        }
        used
    }

    /// The kernel has taken the first `written` bytes.
    pub fn advance(&mut self, mut written: usize) {
        debug_assert!(written <= self.bytes, "the kernel took more than there was");
        self.bytes = self.bytes.saturating_sub(written);
        while let Some(head) = self.frames.front_mut() {
            if written < head.len() {
                head.advance(written);
                self.head_started |= written > 0;
                return;
            }
            written -= head.len();
            self.frames.pop_front();
            self.head_started = false;
        }
    }

    /// Takes the first frame.
    pub fn pop(&mut self) -> Option<Bytes> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }

    /// Gives unused memory back.
    pub fn release(&mut self) {
        if self.frames.is_empty() {
            self.frames = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn contents(outbound: &Outbound) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); Outbound::BATCH];
        let used = outbound.gather(&mut slices);
        slices[..used].iter().flat_map(|slice| slice.to_vec()).collect()
    }

    #[test]
    fn the_bound_counts_bytes_and_spares_a_first_frame() {
        const TWO: usize = 2 * Outbound::PER_FRAME;
        let mut outbound = Outbound::default();
        assert_eq!(outbound.push(Bytes::from_static(b"0123456789"), 4), Ok(()));
        assert_eq!(outbound.push(Bytes::from_static(b"x"), TWO + 10), Err(Full));
        outbound.advance(9);
        assert_eq!(outbound.push(Bytes::from_static(b"abc"), TWO + 4), Ok(()));
        assert_eq!(outbound.push(Bytes::from_static(b"d"), TWO + 4), Err(Full));
        assert_eq!((contents(&outbound), outbound.len()), (b"9abc".to_vec(), 4));
    }

    #[test]
    fn small_frames_are_bounded_by_what_they_cost_in_memory() {
        let mut outbound = Outbound::default();
        while outbound.push(Bytes::from_static(b"\x8a\x00"), 1 << 20).is_ok() {}
        let handles = outbound.frames.capacity() * size_of::<Bytes>();
        assert!(handles <= 1 << 20, "{handles} bytes for a bound of a mebibyte");
    }

    #[test]
    fn clearing_keeps_a_half_written_frame() {
        let mut outbound = Outbound::default();
        for frame in [&b"first"[..], b"second", b"third"] {
            outbound.push_last(Bytes::from_static(frame));
        }
        outbound.advance(7);
        outbound.clear();
        assert_eq!((contents(&outbound), outbound.len()), (b"cond".to_vec(), 4));
        outbound.advance(4);
        outbound.push_last(Bytes::from_static(b"fourth"));
        outbound.clear();
        assert!(outbound.is_empty());
    }

    proptest! {
        #[test]
        fn whatever_the_kernel_takes_the_bytes_keep_their_order(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..100),
            steps in prop::collection::vec(1_usize..50, 1..200),
        ) {
            let expected: Vec<u8> = frames.concat();
            let mut outbound = Outbound::default();
            for frame in frames {
                outbound.push_last(Bytes::from(frame));
            }
            prop_assert_eq!(outbound.len(), expected.len());
            let mut written = Vec::new();
            for step in steps.into_iter().cycle() {
                let front = contents(&outbound);
                if front.is_empty() {
                    break;
                }
                let taken = step.min(front.len());
                written.extend_from_slice(&front[..taken]);
                outbound.advance(taken);
            }
            prop_assert_eq!(written, expected);
            prop_assert_eq!(outbound.len(), 0);
        }
    }
}

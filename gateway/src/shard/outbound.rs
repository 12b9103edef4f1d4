//! A session's queue of bytes on their way out.
//!
//! Owns the order of what waits, its bound, and what may make way for what. Does not know what a frame says
//! or what its session is told of a gap.

use std::{collections::VecDeque, io::IoSlice, num::NonZeroU32};

use bytes::{Buf as _, Bytes};

/// Frames that wait for their socket, bounded in bytes.
///
/// Frames are shared with every other member of the room; the queue holds only handles. Empty, it holds
/// no more than a few handles' worth of memory, and none after [`Outbound::release`]. Each frame costs
/// [`Outbound::PER_FRAME`] of the bound besides its bytes: the answers to a flood of empty pings are two bytes
/// each on the wire and thirty times that in memory.
///
/// A frame that has been written in part is never moved and never dropped: a peer must see whole frames.
#[derive(Debug, Default)]
pub struct Outbound {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// Whether the head frame has been written in part.
    head_started: bool,
}

#[derive(Debug)]
struct Frame {
    bytes: Bytes,
    lane: Lane,
}

/// A room of a shard, for as long as it has members there.
pub type RoomTag = NonZeroU32;

/// Where publications of a room go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoomLane {
    /// The room.
    pub room: RoomTag,
    /// Whether they overtake those of rooms without priority.
    pub priority: bool,
}

/// What a frame is to those that come after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// An answer, a notice, a goodbye: what comes after it may rest on it, so nothing overtakes it.
    Session,
    /// Keeps the connection alive, wherever it stands.
    Heartbeat,
    /// Publications.
    Room(RoomLane),
    /// Says that publications of the room are missing between what stands before it and what stands after it.
    Gap(RoomLane),
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
    pub fn push(&mut self, frame: Bytes, lane: Lane, limit: usize) -> Result<(), Full> {
        if !self.fits(frame.len(), limit) {
            return Err(Full);
        }
        self.place(frame, lane);
        Ok(())
    }

    /// Queues a frame whatever the bound: the last words of a session.
    pub fn push_last(&mut self, frame: Bytes) {
        self.place(frame, Lane::Session);
    }

    /// Queues what the kernel has left of a frame of which it has taken a part, behind nothing. Returns how much
    /// that is.
    pub fn push_started(&mut self, frame: Bytes, written: usize, lane: Lane) -> usize {
        debug_assert!(self.is_empty(), "a frame was begun behind others");
        self.place(frame, lane);
        self.advance(written);
        self.bytes
    }

    /// Queues a frame of a room in place of older ones of the same room: of the oldest, as many as it takes,
    /// or of `all`. `notice` is put where they stood. Returns how many have made way.
    pub fn push_over(
        &mut self,
        frame: Bytes,
        lane: RoomLane,
        limit: usize,
        all: bool,
        notice: Option<Bytes>,
    ) -> Result<usize, Full> {
        let noticed = notice.as_ref().map_or(0, |notice| notice.len() + Self::PER_FRAME);
        let mut cost = self.cost_with(frame.len()) + noticed;
        let (mut index, mut dropped, mut gap) = (0, 0, None);
        self.frames.retain(|waiting| {
            let started = index == 0 && self.head_started;
            let goes = !started && waiting.lane.is_of(lane.room) && (all || cost > limit);
            if goes {
                gap.get_or_insert(index);
                cost -= waiting.bytes.len() + Self::PER_FRAME;
                self.bytes -= waiting.bytes.len();
                dropped += 1;
            }
            index += 1;
            !goes
        });
        if let (Some(at), Some(notice)) = (gap, notice) {
            self.bytes += notice.len();
            self.frames.insert(at, Frame { bytes: notice, lane: Lane::Gap(lane) });
        }
        self.push(frame, Lane::Room(lane), limit).map(|()| dropped)
    }

    /// Whether a frame of so many bytes fits without any other making way.
    pub fn fits(&self, length: usize, limit: usize) -> bool {
        self.is_empty() || self.cost_with(length) <= limit
    }

    /// Whether frames of the room wait that may still make way.
    pub fn may_drop(&self, room: RoomTag) -> bool {
        self.not_started().any(|frame| frame.lane.is_of(room))
    }

    /// Whether a notice of a gap in the room waits. Whatever waits of the room stands behind it.
    pub fn tells_gap(&self, room: RoomTag) -> bool {
        self.not_started().any(|frame| matches!(frame.lane, Lane::Gap(lane) if lane.room == room))
    }

    /// Forgets all frames but one that is half written.
    pub fn clear(&mut self) {
        self.frames.truncate(usize::from(self.head_started));
        self.bytes = self.frames.iter().map(|frame| frame.bytes.len()).sum();
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
        if self.frames.len() == 1 { self.frames.front().map(|frame| &frame.bytes) } else { None }
    }

    /// Points `slices` at the first frames and returns how many it used.
    pub fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>; Self::BATCH]) -> usize {
        let mut used = 0;
        for (slice, frame) in slices.iter_mut().zip(&self.frames) {
            *slice = IoSlice::new(&frame.bytes);
            used += 1;
        }
        used
    }

    /// The kernel has taken the first `written` bytes.
    pub fn advance(&mut self, mut written: usize) {
        debug_assert!(written <= self.bytes, "the kernel took more than there was");
        self.bytes = self.bytes.saturating_sub(written);
        while let Some(Frame { bytes: head, .. }) = self.frames.front_mut() {
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
        let Frame { bytes, .. } = self.frames.pop_front()?;
        self.bytes -= bytes.len();
        Some(bytes)
    }

    /// Gives unused memory back.
    pub fn release(&mut self) {
        if self.frames.is_empty() {
            self.frames = VecDeque::new();
        }
    }

    fn place(&mut self, frame: Bytes, lane: Lane) {
        if frame.is_empty() {
            return;
        }
        self.bytes += frame.len();
        let frame = Frame { bytes: frame, lane };
        match lane {
            Lane::Room(own) if own.priority => {
                let overtaken =
                    self.not_started().rev().take_while(|ahead| ahead.lane.lets_pass(own)).count();
                self.frames.insert(self.frames.len() - overtaken, frame);
            }
            _ => self.frames.push_back(frame),
        }
    }

    fn not_started(&self) -> impl DoubleEndedIterator<Item = &Frame> {
        self.frames.range(usize::from(self.head_started)..)
    }

    /// What the queue costs with another frame of so many bytes.
    fn cost_with(&self, length: usize) -> usize {
        self.bytes + length + (self.frames.len() + 1) * Self::PER_FRAME
    }
}

impl Lane {
    fn is_of(self, room: RoomTag) -> bool {
        matches!(self, Self::Room(lane) if lane.room == room)
    }

    /// Whether publications of a room with priority overtake it. A room that was given priority with frames in
    /// the queue must not overtake itself.
    fn lets_pass(self, priority: RoomLane) -> bool {
        match self {
            Self::Session => false,
            Self::Heartbeat => true,
            Self::Room(lane) | Self::Gap(lane) => !lane.priority && lane.room != priority.room,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Lane = Lane::Session;

    fn contents(outbound: &Outbound) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); Outbound::BATCH];
        let used = outbound.gather(&mut slices);
        slices[..used].iter().flat_map(|slice| slice.to_vec()).collect()
    }

    #[test]
    fn the_bound_counts_bytes_and_spares_a_first_frame() {
        const TWO: usize = 2 * Outbound::PER_FRAME;
        let mut outbound = Outbound::default();
        assert_eq!(outbound.push(Bytes::from_static(b"0123456789"), PLAIN, 4), Ok(()));
        assert_eq!(outbound.push(Bytes::from_static(b"x"), PLAIN, TWO + 10), Err(Full));
        outbound.advance(9);
        assert_eq!(outbound.push(Bytes::from_static(b"abc"), PLAIN, TWO + 4), Ok(()));
        assert_eq!(outbound.push(Bytes::from_static(b"d"), PLAIN, TWO + 4), Err(Full));
        assert_eq!((contents(&outbound), outbound.len()), (b"9abc".to_vec(), 4));
    }

    #[test]
    fn small_frames_are_bounded_by_what_they_cost_in_memory() {
        let mut outbound = Outbound::default();
        while outbound.push(Bytes::from_static(b"\x8a\x00"), PLAIN, 1 << 20).is_ok() {}
        let handles = outbound.frames.capacity() * size_of::<Frame>();
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

    /// A frame of the model: its lane and how many of that lane came before it.
    type Named = (u8, u32);

    /// Two rooms without priority, two with, answers (`S`) and heartbeats (`H`).
    const LANES: [(u8, bool); 4] = [(b'a', false), (b'b', false), (b'P', true), (b'Q', true)];

    fn lane(name: u8) -> Lane {
        match LANES.iter().find(|(own, _)| *own == name) {
            Some(&(_, priority)) => Lane::Room(room_lane(name, priority)),
            None if name == b'H' => Lane::Heartbeat,
            None => Lane::Session,
        }
    }

    fn room_lane(name: u8, priority: bool) -> RoomLane {
        RoomLane { room: RoomTag::new(name.into()).unwrap(), priority }
    }

    /// `a7` and so much more that it has `length` bytes, ended by `;`.
    fn named((name, number): Named, length: usize) -> Bytes {
        let text = format!("{}{number}", name as char);
        Bytes::from(format!("{text:-<length$};"))
    }

    /// The frames in `written`, which are whole but for the last one; `!a` is a notice of a gap in `a`.
    fn read(written: &[u8]) -> Vec<(bool, Named)> {
        let whole = written.iter().rposition(|&byte| byte == b';').map_or(&[][..], |end| &written[..end]);
        let frames = whole.split(|&byte| byte == b';').filter(|frame| !frame.is_empty());
        frames
            .map(|frame| {
                let text = std::str::from_utf8(frame).unwrap();
                match text.strip_prefix('!') {
                    Some(room) => (true, (room.as_bytes()[0], 0)),
                    None => (false, (frame[0], text[1..].trim_end_matches('-').parse().unwrap())),
                }
            })
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push { name: u8, length: usize },
        Over { name: u8, length: usize, all: bool },
        Write(usize),
        Pop,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let push = (prop::sample::select(b"abPQSH".to_vec()), 1_usize..200)
            .prop_map(|(name, length)| Step::Push { name, length });
        let over = (prop::sample::select(b"abPQ".to_vec()), 1_usize..200, any::<bool>())
            .prop_map(|(name, length, all)| Step::Over { name, length, all });
        let write = (1_usize..300).prop_map(Step::Write);
        prop::collection::vec(prop_oneof![3 => push, 4 => over, 1 => write, 1 => Just(Step::Pop)], 1..200)
    }

    proptest! {
        /// Whatever is queued, dropped and written: the bound holds, every frame comes out whole, each room's
        /// in order, what is missing was reported as dropped, and a notice stands wherever it is missing.
        #[test]
        fn order_and_bound_hold_whatever_makes_way(steps in steps(), limit in 500_usize..3000) {
            let mut outbound = Outbound::default();
            let mut written = Vec::new();
            let mut numbers = [0_u32; 256];
            let (mut accepted, mut dropped) = (0, 0);
            for step in steps {
                match step {
                    Step::Push { name, length } => {
                        let number = &mut numbers[usize::from(name)];
                        let frame = named((name, *number), length);
                        if outbound.push(frame, lane(name), limit).is_ok() {
                            *number += 1;
                            accepted += 1;
                        }
                    }
                    Step::Over { name, length, all } => {
                        let Lane::Room(lane) = lane(name) else { unreachable!() };
                        let told = outbound.tells_gap(lane.room);
                        let notice = (!told).then(|| Bytes::from(format!("!{};", name as char)));
                        let could = outbound.may_drop(lane.room);
                        let number = &mut numbers[usize::from(name)];
                        let frame = named((name, *number), length);
                        let before = outbound.frames.len();
                        let Ok(gone) = outbound.push_over(frame, lane, limit, all, notice) else {
                            // The session is closed as slow: nothing that waits is sent any more.
                            prop_assert!(outbound.frames.len() <= before + 1);
                            outbound.clear();
                            let front = contents(&outbound);
                            written.extend_from_slice(&front);
                            check(&written, None)?;
                            return Ok(());
                        };
                        *number += 1;
                        accepted += 1;
                        dropped += gone;
                        prop_assert!(could || gone == 0);
                        prop_assert!(!all || gone > 0 || !could);
                        prop_assert!(gone == 0 || outbound.tells_gap(lane.room));
                        let waiting = outbound.not_started().filter(|f| f.lane.is_of(lane.room)).count();
                        prop_assert!(!all || waiting == 1, "only the latest of {waiting}");
                    }
                    Step::Write(most) => {
                        let front = contents(&outbound);
                        let taken = most.min(front.len());
                        written.extend_from_slice(&front[..taken]);
                        outbound.advance(taken);
                    }
                    Step::Pop if !outbound.head_started => written.extend(outbound.pop().unwrap_or_default()),
                    Step::Pop => {}
                }
                let cost = outbound.bytes + outbound.frames.len() * Outbound::PER_FRAME;
                prop_assert!(cost <= limit || outbound.frames.len() == 1, "{cost} of {limit}");
                prop_assert_eq!(outbound.bytes, outbound.frames.iter().map(|f| f.bytes.len()).sum::<usize>());
            }
            while let Some(frame) = outbound.pop() {
                written.extend_from_slice(&frame);
            }
            check(&written, Some(accepted - dropped))?;
        }

        /// Nobody waits for what has no priority, and nobody with priority overtakes another.
        #[test]
        fn priority_goes_first_and_answers_keep_their_place(
            names in prop::collection::vec(prop::sample::select(b"abPQSH".to_vec()), 1..60), started in any::<bool>()
        ) {
            let mut outbound = Outbound::default();
            for (number, &name) in (0_u32..).zip(&names) {
                outbound.push(named((name, number), 9), lane(name), usize::MAX).unwrap();
                if number == 0 && started {
                    outbound.advance(1);
                }
            }
            let mut written = if started { vec![names[0]] } else { Vec::new() };
            while let Some(frame) = outbound.pop() {
                written.extend_from_slice(&frame);
            }
            // Between two answers: first what has priority, then the rest, each in the order in which it came.
            let (free, fixed) = if started { (1, 1) } else { (0, 0) };
            let mut expected: Vec<Named> = (0_u32..).zip(&names).take(fixed).map(|(n, &name)| (name, n)).collect();
            let rest: Vec<Named> = (0_u32..).zip(&names).skip(free).map(|(n, &name)| (name, n)).collect();
            for part in rest.split_inclusive(|(name, _)| *name == b'S') {
                let urgent = |(name, _): &&Named| b"PQ".contains(name);
                expected.extend(part.iter().filter(urgent));
                expected.extend(part.iter().filter(|frame| !urgent(frame)));
            }
            prop_assert_eq!(read(&written).into_iter().map(|(_, frame)| frame).collect::<Vec<_>>(), expected);
        }
    }

    /// Each lane's numbers ascend, and where one is left out a notice stands before the next.
    fn check(written: &[u8], count: Option<usize>) -> Result<(), TestCaseError> {
        let (mut next, mut told) = ([0_u32; 256], [false; 256]);
        let mut frames = 0;
        for (notice, (name, number)) in read(written) {
            let place = usize::from(name);
            if notice {
                told[place] = true;
                continue;
            }
            frames += 1;
            prop_assert!(number >= next[place], "{}{number} is late", name as char);
            if number > next[place] {
                prop_assert!(told[place], "{}{number} follows a gap that nobody has told", name as char);
            }
            told[place] = false;
            next[place] = number + 1;
        }
        prop_assert!(count.is_none_or(|count| count == frames));
        Ok(())
    }
}

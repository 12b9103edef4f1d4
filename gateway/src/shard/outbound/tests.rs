use proptest::prelude::*;

use self::simple::Simple;
use super::*;

mod simple;

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
    let handles = outbound.frames.capacity() * size_of::<Queued>();
    assert!(handles <= 1 << 20, "{handles} bytes for a bound of a mebibyte");
}

#[test]
fn queues_that_hold_the_same_publications_have_the_same_ends() {
    let lane = Lane::Room(RoomLane { room: RoomTag::MIN, priority: false });
    let publications = [Bytes::from(vec![1; 100]), Bytes::from(vec![2; 10])];
    let mut queues = [Outbound::default(), Outbound::default()];
    assert_eq!(queues[0].ends(), None);
    for (n, outbound) in queues.iter_mut().enumerate() {
        outbound.push_last(Bytes::from(vec![3; n + 1]));
        for frame in &publications {
            outbound.push(frame.clone(), lane, 4096).unwrap();
        }
        outbound.push_last(Bytes::from(vec![4; 20]));
    }
    // The kernel has taken part of the first publication from one of them.
    queues[1].advance(2 + 60);
    assert_eq!(queues[0].ends(), queues[1].ends());
    assert_eq!(queues.map(|outbound| outbound.shared()), [110, 50]);

    let mut other = Outbound::default();
    other.push(Bytes::from(vec![1; 100]), lane, 4096).unwrap();
    let ends = other.ends().unwrap();
    assert_eq!(ends[0], ends[1]);
    assert_ne!(ends[0], publications[0].as_ptr_range().end.addr());
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

fn is_of(frame: &Queued, room: RoomTag) -> bool {
    matches!(frame.lane, Lane::Room(lane) if lane.room == room)
}

/// A frame of the model: its lane, and its number within that lane.
type Named = (u8, u32);

/// Two rooms without priority, two with; replies are `S` and heartbeats `H`.
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

/// `a7`, padded to `length` bytes, then `;`.
fn named((name, number): Named, length: usize) -> Bytes {
    let text = format!("{}{number}", name as char);
    Bytes::from(format!("{text:-<length$};"))
}

/// The frames in `written`, of which only the last may be incomplete; `!a` is a gap notice for `a`.
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
    /// Whatever is queued, dropped and written: the bound holds, frames come out whole and in order for each
    /// room, and wherever one is missing, it was reported as dropped and a notice stands in its place.
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
                    let has_notice = outbound.has_gap_notice(lane.room);
                    let notice = (!has_notice).then(|| Bytes::from(format!("!{};", name as char)));
                    let could = outbound.may_drop(lane.room);
                    let number = &mut numbers[usize::from(name)];
                    let frame = named((name, *number), length);
                    let before = outbound.frames.len();
                    let Ok(gone) = outbound.push_over(frame, lane, limit, all, notice) else {
                        // The session is closed as a slow consumer and sends nothing that is queued.
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
                    prop_assert!(gone == 0 || outbound.has_gap_notice(lane.room));
                    let waiting = outbound.iter().skip(usize::from(outbound.head_started)).filter(|f| is_of(f, lane.room)).count();
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
            prop_assert_eq!(outbound.bytes, outbound.iter().map(|f| f.bytes.len()).sum::<usize>());
            let own = || outbound.iter().filter(|frame| !matches!(frame.lane, Lane::Room(_)));
            let own_bytes: usize = own().map(|frame| frame.bytes.len()).sum();
            prop_assert_eq!(outbound.held(), own_bytes + outbound.frames.len() * Outbound::PER_FRAME);
            prop_assert_eq!(outbound.replies(), own_bytes + own().count() * Outbound::PER_FRAME);
        }
        while let Some(frame) = outbound.pop() {
            written.extend_from_slice(&frame);
        }
        check(&written, Some(accepted - dropped))?;
    }

    /// Priority frames never wait for others, and never overtake each other.
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
        // Between two replies: first the priority frames, then the rest, each in the order in which it was
        // queued.
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

/// Each lane's numbers ascend, and a notice stands wherever one is missing.
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
            prop_assert!(told[place], "{}{number} follows a gap without a notice", name as char);
        }
        told[place] = false;
        next[place] = number + 1;
    }
    prop_assert!(count.is_none_or(|count| count == frames));
    Ok(())
}

/// An operation for both the real queue and the simple one.
#[derive(Clone, Debug)]
enum Act {
    Push(Lane, usize),
    Over {
        room: u32,
        length: usize,
        all: bool,
        notice: Option<usize>,
    },
    Last(usize),
    Advance(usize),
    Pop,
    Clear,
    /// A new configuration gives this room priority, or takes it away.
    Flip(u32),
    Release,
}

const ROOMS: u32 = 4;

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let room = || 1..=ROOMS;
    let length = || 1_usize..100;
    // Priorities are filled in when the operation runs.
    let publication =
        |room| Lane::Room(RoomLane { room: RoomTag::new(room).unwrap_or(RoomTag::MIN), priority: false });
    let lane = prop_oneof![
        1 => Just(Lane::Session),
        1 => Just(Lane::Heartbeat),
        8 => room().prop_map(publication),
    ];
    let over = (room(), length(), prop::bool::weighted(0.2), prop::option::of(length()))
        .prop_map(|(room, length, all, notice)| Act::Over { room, length, all, notice });
    let act = prop_oneof![
        8 => (lane, length()).prop_map(|(lane, length)| Act::Push(lane, length)),
        8 => over,
        1 => length().prop_map(Act::Last),
        4 => (1_usize..300).prop_map(Act::Advance),
        2 => Just(Act::Pop),
        1 => Just(Act::Clear),
        1 => room().prop_map(Act::Flip),
        1 => Just(Act::Release),
    ];
    prop::collection::vec(act, 1..300)
}

proptest! {
    /// The queue behaves like a plain list of frames that is searched from end to end.
    #[test]
    fn it_does_what_a_simple_queue_does(acts in acts(), limit in 300_usize..3000) {
        let (mut real, mut simple) = (Outbound::default(), Simple::default());
        let mut priority = [false; ROOMS as usize + 1];
        for (number, act) in (0..=u8::MAX).cycle().zip(acts) {
            let frame = |length: usize| Bytes::from(vec![number; length]);
            let lane_of = |room: RoomTag| RoomLane { room, priority: priority[room.get() as usize] };
            match act {
                Act::Push(lane, length) => {
                    let lane = match lane {
                        Lane::Room(RoomLane { room, .. }) => Lane::Room(lane_of(room)),
                        other => other,
                    };
                    prop_assert_eq!(
                        real.push(frame(length), lane, limit),
                        simple.push(frame(length), lane, limit)
                    );
                }
                Act::Over { room, length, all, notice } => {
                    let room = RoomTag::new(room).unwrap();
                    prop_assert_eq!(real.may_drop(room), simple.may_drop(room));
                    prop_assert_eq!(real.has_gap_notice(room), simple.has_gap_notice(room));
                    let notice = notice.filter(|_| !simple.has_gap_notice(room)).map(frame);
                    let lane = lane_of(room);
                    prop_assert_eq!(
                        real.push_over(frame(length), lane, limit, all, notice.clone()),
                        simple.push_over(frame(length), lane, limit, all, notice)
                    );
                }
                Act::Last(length) => {
                    real.push_last(frame(length));
                    simple.push(frame(length), Lane::Session, usize::MAX).unwrap();
                }
                Act::Advance(written) => {
                    let written = written.min(real.len());
                    real.advance(written);
                    simple.advance(written);
                }
                Act::Pop => prop_assert_eq!(real.pop(), simple.pop()),
                Act::Clear => {
                    real.clear();
                    simple.clear();
                }
                Act::Flip(room) => {
                    priority[room as usize] ^= true;
                    real.seal();
                    simple.seal();
                }
                Act::Release => real.release(),
            }
            let waits: Vec<_> = real.iter().map(|frame| frame.bytes.clone()).collect();
            let expected: Vec<_> = simple.frames.iter().map(|frame| frame.bytes.clone()).collect();
            prop_assert_eq!(real.len(), waits.iter().map(Frame::len).sum::<usize>());
            prop_assert_eq!(real.frames.len(), waits.len());
            let waits: Vec<_> = waits.into_iter().map(Frame::into_bytes).collect();
            prop_assert_eq!(waits, expected);
        }
    }
}

#[test]
fn a_queue_that_was_long_leaves_nothing_behind() {
    let mut outbound = Outbound::default();
    let lane = RoomLane { room: RoomTag::MIN, priority: false };
    while outbound.push(Bytes::from_static(b"a message"), Lane::Room(lane), 1 << 20).is_ok() {}
    for _ in 0..1000 {
        outbound.push_over(Bytes::from_static(b"a message"), lane, 1 << 20, false, None).unwrap();
    }
    outbound.advance(outbound.len());
    assert_eq!((outbound.frames.capacity(), outbound.rooms.is_none()), (0, true));
}

/// Every idle connection has a queue.
#[test]
fn an_empty_queue_is_small() {
    assert!(size_of::<Outbound>() <= 88, "{} bytes", size_of::<Outbound>());
    // The slab's entry is no larger than the frame.
    assert!(size_of::<Queued>() <= Outbound::PER_FRAME);
}

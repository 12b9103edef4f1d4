//! The table against a model of a server: whatever happens in whatever order, the wish comes true, and each
//! loss is owed exactly once.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{RoomName, conformance::Recorder};

/// A server that reads commands and answers them when it is told to.
#[derive(Default)]
struct Server {
    subscribed: BTreeSet<Vec<u8>>,
    forbidden: BTreeSet<Vec<u8>>,
    answers: VecDeque<Reply>,
    largest_batch: usize,
    /// It subscribes nobody at the moment.
    busy: bool,
}

#[derive(Debug)]
enum Reply {
    Subscribed(Vec<u8>),
    Unsubscribed(Vec<u8>),
    Error,
    Busy,
    Hello,
}

impl Server {
    fn has_ended_any(&self) -> bool {
        self.answers.iter().any(|reply| matches!(reply, Reply::Unsubscribed(_)))
    }

    fn take(&mut self, out: &mut BytesMut) {
        let taken = out.split();
        let mut parts =
            taken[..].split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        while let Some(header) = parts.next().filter(|line| !line.is_empty()) {
            let count: usize = std::str::from_utf8(&header[1..]).unwrap().parse().unwrap();
            let mut part = || {
                parts.next();
                parts.next().unwrap().to_vec()
            };
            let name = part();
            let arguments = (1..count).map(|_| part()).collect::<Vec<_>>();
            self.largest_batch = self.largest_batch.max(arguments.len());
            match &name[..] {
                b"HELLO" => self.answers.push_back(Reply::Hello),
                // An end that is on its way would be taken for the answer to an UNSUBSCRIBE.
                b"UNSUBSCRIBE" if self.busy && !self.has_ended_any() => self.answers.push_back(Reply::Busy),
                b"SUBSCRIBE" if self.busy => self.answers.push_back(Reply::Busy),
                b"SUBSCRIBE" if arguments.iter().any(|topic| self.forbidden.contains(topic)) => {
                    self.answers.push_back(Reply::Error);
                }
                b"SUBSCRIBE" => {
                    for topic in arguments {
                        self.subscribed.insert(topic.clone());
                        self.answers.push_back(Reply::Subscribed(topic));
                    }
                }
                b"UNSUBSCRIBE" => {
                    for topic in arguments {
                        self.subscribed.remove(&topic);
                        self.answers.push_back(Reply::Unsubscribed(topic));
                    }
                }
                other => panic!("unknown command {other:?}"),
            }
        }
    }
}

/// The table, a server and what has been told about each room.
struct World {
    table: Table,
    server: Server,
    out: BytesMut,
    gaps: BTreeMap<RoomName, usize>,
    refusals: Vec<RoomName>,
    /// Rooms whose subscription the server has ended by itself.
    ended: Vec<RoomName>,
}

const CANARY: &[u8] = b"canary";

fn name(index: usize) -> RoomName {
    RoomName::new(&format!("r{index}")).unwrap()
}

fn room(index: usize) -> Room {
    Room { name: name(index), sink: Arc::<Recorder>::default().sink(&name(index)) }
}

fn topic(index: usize) -> Arc<[u8]> {
    format!("room:r{index}").into_bytes().into()
}

impl World {
    fn new() -> Self {
        Self {
            table: Table::new(&CANARY.into()),
            server: Server::default(),
            out: BytesMut::new(),
            gaps: BTreeMap::new(),
            refusals: Vec::new(),
            ended: Vec::new(),
        }
    }

    /// The server ends a subscription by itself, if there is one.
    fn kick(&mut self, index: usize) {
        let topic = topic(index).to_vec();
        if self.server.subscribed.remove(&topic) {
            self.server.answers.push_back(Reply::Unsubscribed(topic));
        }
    }

    fn exchange(&mut self) {
        self.table.write(&mut self.out);
        self.server.take(&mut self.out);
    }

    /// Feeds up to `most` answers; whether there was one.
    fn answer(&mut self, most: usize) -> bool {
        for done in 0..most {
            let Some(reply) = self.server.answers.pop_front() else { return done > 0 };
            match reply {
                Reply::Hello => self.table.replied().unwrap(),
                Reply::Busy => {
                    let refusal = self.table.refused(true).unwrap();
                    let later = matches!(
                        refusal,
                        Refusal::Later { .. } | Refusal::StillSubscribed { later: true, .. }
                    );
                    assert!(later, "{refusal:?}");
                }
                Reply::Unsubscribed(topic) => {
                    if let Some(Purpose::Room(room)) = self.table.unsubscribed(&topic) {
                        self.ended.push(room.name);
                    }
                }
                Reply::Subscribed(topic) => {
                    let acknowledged = self.table.subscribed(&topic).unwrap();
                    match (acknowledged.purpose, acknowledged.after_loss) {
                        (Purpose::Room(room), true) => *self.gaps.entry(room.name.clone()).or_default() += 1,
                        (Purpose::Room(_), false) => {}
                        (Purpose::Canary, _) => self.table.open(),
                    }
                }
                Reply::Error => {
                    if let Refusal::Refused(Purpose::Room(room)) = self.table.refused(false).unwrap() {
                        self.refusals.push(room.name);
                    }
                }
            }
        }
        true
    }

    fn settle(&mut self) {
        self.exchange();
        while self.answer(usize::MAX) {
            self.exchange();
        }
    }

    fn lose(&mut self) {
        self.server.subscribed.clear();
        self.server.answers.clear();
        self.out.clear();
        self.table.lost();
    }

    fn expect(&self, rooms: impl IntoIterator<Item = usize>) {
        let expected = rooms
            .into_iter()
            .map(|index| topic(index).to_vec())
            .chain([CANARY.to_vec()])
            .collect::<BTreeSet<_>>();
        assert_eq!(self.server.subscribed, expected);
        for topic in &expected {
            assert!(self.table.desired(topic).is_some(), "{topic:?} is looked up");
        }
    }
}

/// Whoever wants a room again whose end the server refuses has to be told that it stands: nothing else will come.
#[test]
fn a_room_added_during_a_refused_unsubscribe_stays_subscribed() {
    for later in [false, true] {
        let mut world = World::new();
        for index in 0..3 {
            assert!(!world.table.add(&topic(index), room(index)));
        }
        world.settle();
        for index in 0..2 {
            world.table.remove(&topic(index));
        }
        world.table.write(&mut world.out);
        world.out.clear();
        assert!(!world.table.add(&topic(0), room(0)), "its end is under way");
        let refusal = world.table.refused(later).unwrap();
        assert_eq!(refusal, Refusal::StillSubscribed { desired: vec![room(0)], later });
        assert!(world.table.add(&topic(0), room(0)), "it stands");
        assert!(world.table.desired(&topic(1)).is_none(), "what it brings is ignored");
        world.table.retry_refused();
        world.settle();
        let left = (0..3).filter(|&index| world.server.subscribed.contains(&topic(index).to_vec()));
        assert_eq!(left.collect::<Vec<_>>(), if later { vec![0, 2] } else { vec![0, 1, 2] });
    }
}

#[derive(Clone, Debug)]
enum Step {
    Add(usize),
    Remove(usize),
    Exchange,
    Answer(usize),
    Ask,
    Busy(bool),
    Kick(usize),
    Lose,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0usize..6).prop_map(Step::Add),
        3 => (0usize..6).prop_map(Step::Remove),
        4 => Just(Step::Exchange),
        4 => (1usize..4).prop_map(Step::Answer),
        1 => Just(Step::Ask),
        1 => any::<bool>().prop_map(Step::Busy),
        1 => (0usize..6).prop_map(Step::Kick),
        1 => Just(Step::Lose),
    ]
}

proptest! {
    #[test]
    fn subscriptions_converge_on_the_last_call(steps in vec(step(), 0..120)) {
        let mut world = World::new();
        let mut desired = BTreeSet::new();
        for step in steps {
            match step {
                Step::Add(index) => {
                    let stands = world.table.add(&topic(index), room(index));
                    let on_its_way = |reply: &Reply| matches!(reply, Reply::Unsubscribed(ended) if **ended == *topic(index));
                    let told = world.server.subscribed.contains(&*topic(index))
                        || world.server.answers.iter().any(on_its_way);
                    prop_assert!(!stands || told, "stands, but does not");
                    desired.insert(index);
                }
                Step::Remove(index) => {
                    world.table.remove(&topic(index));
                    desired.remove(&index);
                }
                Step::Exchange => world.exchange(),
                Step::Answer(most) => drop(world.answer(most)),
                Step::Ask => world.table.ask(&mut world.out),
                Step::Busy(busy) => world.server.busy = busy,
                Step::Kick(index) => world.kick(index),
                Step::Lose => world.lose(),
            }
        }
        world.settle();
        world.server.busy = false;
        world.table.retry_refused();
        world.settle();
        world.expect(desired.iter().copied());
        prop_assert!(world.table.is_complete());
        prop_assert_eq!(world.table.topics.len(), desired.len() + 1, "nothing is kept that is not desired");
        prop_assert_eq!(world.table.in_flight_topics, 0);
    }

    #[test]
    fn repeated_failures_are_one_gap_per_subscribed_room(answered in vec(0usize..8, 0..5)) {
        let mut world = World::new();
        for index in 0..5 {
            world.table.add(&topic(index), room(index));
        }
        world.settle();
        prop_assert!(world.gaps.is_empty(), "a new room has no gap");
        world.table.remove(&topic(0));
        world.lose();
        world.table.add(&topic(5), room(5));
        for most in &answered {
            world.exchange();
            world.answer(*most);
            let told = world.gaps.values().sum::<usize>();
            // What was acknowledged again stood again, and this loss is another one.
            world.gaps.clear();
            prop_assert!(told <= 5);
            world.lose();
        }
        world.settle();
        for index in 1..5 {
            prop_assert_eq!(world.gaps.get(&name(index)), Some(&1), "room {}", index);
        }
        prop_assert_eq!(world.gaps.get(&name(0)), None, "given up before the loss");
        if answered.is_empty() {
            prop_assert_eq!(world.gaps.get(&name(5)), None, "new since the loss");
        }
        prop_assert!(world.table.is_complete());
    }

    #[test]
    fn a_forbidden_topic_does_not_disturb_the_others(forbidden in 0usize..20, window in 1usize..20) {
        let mut world = World::new();
        world.server.forbidden.insert(topic(forbidden).to_vec());
        for index in 0..window.max(forbidden + 1) {
            world.table.add(&topic(index), room(index));
        }
        world.settle();
        world.expect((0..window.max(forbidden + 1)).filter(|index| *index != forbidden));
        prop_assert_eq!(world.refusals, [name(forbidden)]);
    }
}

#[test]
fn batches_and_the_window_are_bounded() {
    let mut world = World::new();
    world.settle();
    for index in 0..20_000 {
        world.table.add(&topic(index), room(index));
    }
    world.exchange();
    assert_eq!(world.server.answers.len(), WINDOW);
    assert_eq!(world.server.largest_batch, BATCH);
    world.settle();
    assert_eq!(world.server.subscribed.len(), 20_001);
    for index in 0..20_000 {
        world.table.remove(&topic(index));
    }
    world.settle();
    world.expect([]);
}

#[test]
fn rooms_are_subscribed_after_the_connection_is_proven() {
    let mut world = World::new();
    let canary_alone = BTreeSet::from([CANARY.to_vec()]);
    for index in 0..3 {
        world.table.add(&topic(index), room(index));
    }
    for lost in [false, true] {
        world.table.write(&mut world.out);
        world.server.take(&mut world.out);
        assert_eq!(world.server.subscribed, canary_alone);
        // The server ends it, and it is subscribed again before any room.
        for reply in [Reply::Subscribed(CANARY.to_vec()), Reply::Unsubscribed(CANARY.to_vec())] {
            world.table.write(&mut world.out);
            assert!(world.out.is_empty(), "rooms have to wait");
            match reply {
                Reply::Subscribed(topic) => drop(world.table.subscribed(&topic).unwrap()),
                _ => assert_eq!(world.table.unsubscribed(CANARY), Some(Purpose::Canary)),
            }
            assert!(!world.table.is_complete());
        }
        world.server.answers.clear();
        world.settle();
        world.expect(0..3);
        assert_eq!(world.gaps.len(), if lost { 3 } else { 0 });
        world.lose();
    }
}

#[test]
fn a_refused_resubscription_is_retried_and_then_has_a_gap() {
    let mut world = World::new();
    world.table.add(&topic(1), room(1));
    world.settle();
    world.lose();
    world.server.forbidden.insert(topic(1).to_vec());
    world.settle();
    assert!(!world.table.is_complete());
    assert_eq!(world.refusals, [], "it is not forgotten");
    world.server.forbidden.clear();
    world.settle();
    assert!(!world.table.is_complete(), "not before it is told to");
    world.table.retry_refused();
    world.settle();
    assert!(world.table.is_complete());
    assert_eq!(world.gaps, BTreeMap::from([(name(1), 1)]));
}

#[test]
fn unexpected_answers_close_the_connection() {
    let mut world = World::new();
    assert_eq!(world.table.subscribed(CANARY), Err(OutOfStep));
    assert_eq!(world.table.replied(), Err(OutOfStep));
    assert_eq!(world.table.refused(true), Err(OutOfStep));
    assert_eq!(world.table.refused(false), Err(OutOfStep));
    world.exchange();
    assert_eq!(world.table.subscribed(b"other"), Err(OutOfStep));
}

#[test]
fn a_subscription_ended_by_the_server_interrupts_only_that_room() {
    let mut world = World::new();
    for index in 0..3 {
        world.table.add(&topic(index), room(index));
    }
    world.settle();
    world.kick(1);
    assert!(world.answer(1));
    assert_eq!(world.ended, [name(1)]);
    assert!(!world.table.is_complete(), "it is owed");
    world.settle();
    world.expect([0, 1, 2]);
    assert_eq!(world.gaps, BTreeMap::from([(name(1), 1)]));

    // In the middle of its own UNSUBSCRIBE it is no news, and neither is a topic that nobody knows.
    world.table.remove(&topic(2));
    world.kick(2);
    world.exchange();
    assert_eq!(world.table.unsubscribed(b"room:unknown"), None);
    world.settle();
    world.expect([0, 1]);
    assert_eq!(world.ended, [name(1)]);
    assert_eq!(world.gaps.len(), 1);
}

#[test]
fn a_busy_server_is_retried_in_whole_batches() {
    let mut world = World::new();
    world.server.busy = true;
    for index in 0..BATCH {
        world.table.add(&topic(index), room(index));
    }
    world.settle();
    assert_eq!((world.refusals.len(), world.server.answers.len()), (0, 0), "asked once");
    world.table.retry_refused();
    world.server.largest_batch = 0;
    world.server.busy = false;
    world.settle();
    assert_eq!(world.server.largest_batch, BATCH);
    world.expect(0..BATCH);

    world.server.busy = true;
    world.table.remove(&topic(0));
    world.settle();
    world.server.busy = false;
    world.table.retry_refused();
    world.settle();
    world.expect(1..BATCH);
    assert!(world.gaps.is_empty());
}

#[test]
fn a_new_subscription_has_no_gap_of_the_old_one() {
    let mut world = World::new();
    world.table.add(&topic(1), room(1));
    world.settle();
    world.lose();
    assert!(!world.table.is_complete());
    world.table.add(&topic(1), room(1));
    world.settle();
    assert_eq!(world.gaps, BTreeMap::new());
    assert!(world.table.is_complete());
}

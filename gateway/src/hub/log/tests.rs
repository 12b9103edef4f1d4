//! A model of a room's log with all that can happen to it, over the code that is shipped.

use std::collections::{BTreeSet, VecDeque};

use broker_bridge::{Data, Publication};
use proptest::{collection::vec, prelude::*, test_runner::TestCaseError};

use super::*;

/// How many entries a page has at most.
const PAGE: usize = 3;
const BOUNDS: Bounds = Bounds { items: 6, bytes: 1 << 20 };

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Step {
    Publish,
    PublishUnrecorded,
    /// One that is too large for every node.
    PublishOversized,
    /// The next thing that is on its way to a node arrives.
    Deliver(usize),
    /// The next thing that is on its way to a node is lost, and nobody notices.
    Lose(usize),
    /// A node checks whether something was lost.
    Check(usize),
    /// A node loses its connection, and what is on its way.
    Interrupt(usize),
    Reconnect(usize),
    /// The server dies; another one reigns, and lacks so many of the newest entries.
    Failover(usize),
    Delete,
    /// The oldest entries are removed.
    Trim(usize),
    /// The server answers what a node has to read.
    Answer(usize),
    /// The answer arrives.
    Read(usize),
    /// Somebody joins at a node.
    Join(usize),
    /// A member leaves its node, and comes back at one.
    Resume {
        member: usize,
        node: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let node = 0..NODES;
    prop_oneof![
        8 => Just(Step::Publish),
        1 => Just(Step::PublishUnrecorded),
        1 => Just(Step::PublishOversized),
        10 => node.clone().prop_map(Step::Deliver),
        1 => node.clone().prop_map(Step::Lose),
        2 => node.clone().prop_map(Step::Check),
        2 => node.clone().prop_map(Step::Interrupt),
        4 => node.clone().prop_map(Step::Reconnect),
        1 => (0_usize..4).prop_map(Step::Failover),
        1 => Just(Step::Delete),
        1 => (0_usize..8).prop_map(Step::Trim),
        5 => node.clone().prop_map(Step::Answer),
        5 => node.clone().prop_map(Step::Read),
        2 => node.clone().prop_map(Step::Join),
        4 => (0_usize..8, node).prop_map(|(member, node)| Step::Resume { member, node }),
    ]
}

const NODES: usize = 2;

/// The number of a publication among all that were accepted.
type Id = usize;

#[derive(Clone, Debug)]
enum Coming {
    Publication(Id, Option<Place>),
    Opened(Cursor),
    Gap(GapCause),
}

struct Node {
    log: RoomLog<Id>,
    is_up: bool,
    coming: VecDeque<Coming>,
    next: Next,
    answer: Option<(Cursor, Page)>,
    /// The last publication that was lost on its way.
    lost: Option<Cursor>,
}

/// Somebody in the room.
struct Member {
    /// `None` while it is away.
    node: Option<usize>,
    /// The number of the first item that it receives.
    from: u64,
    /// The newest publication that it has, or the newest that there was when it joined.
    last: Option<Id>,
    /// The position of the last recorded publication that it has received.
    cursor: Option<Cursor>,
    /// Whether a gap was told since.
    has_gap: bool,
    /// The publications without a place that it has received.
    unrecorded: BTreeSet<Id>,
    /// Whether it has joined, and has not received anything yet.
    is_new: bool,
}

struct World {
    /// The entries of the log.
    entries: Vec<(Place, Id)>,
    /// The last position of the log, if there is one.
    top: Option<Cursor>,
    /// Names of reigns so far.
    epochs: u64,
    epoch: u64,
    /// Whether each accepted publication is recorded.
    accepted: Vec<bool>,
    oversized: BTreeSet<Id>,
    nodes: Vec<Node>,
    members: Vec<Member>,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let nodes = std::iter::repeat_with(|| Node {
            log: RoomLog::new(BOUNDS),
            is_up: true,
            coming: VecDeque::new(),
            next: Next::Wait,
            answer: None,
            lost: None,
        });
        let mut world = Self {
            entries: Vec::new(),
            top: None,
            epochs: 0,
            epoch: 0,
            accepted: Vec::new(),
            oversized: BTreeSet::new(),
            nodes: nodes.take(NODES).collect(),
            members: Vec::new(),
            now: Instant::now(),
        };
        for node in 0..NODES {
            world.open(node);
        }
        world
    }

    fn open(&mut self, node: usize) {
        let top = self.top.unwrap_or_else(|| {
            self.epochs += 1;
            self.epoch = self.epochs;
            Cursor { epoch: self.epoch, offset: 0 }
        });
        self.top = Some(top);
        self.nodes[node].coming.push_back(Coming::Opened(top));
    }

    fn publish(&mut self, recorded: bool) {
        let id = self.accepted.len();
        self.accepted.push(recorded);
        let place = recorded.then(|| self.next_place());
        if let Some(place) = place {
            self.entries.push((place, id));
            self.top = Some(place.cursor);
        }
        for node in self.nodes.iter_mut().filter(|node| node.is_up) {
            node.coming.push_back(Coming::Publication(id, place));
        }
    }

    fn next_place(&mut self) -> Place {
        match self.top {
            Some(top) if top.epoch == self.epoch => {
                let cursor = Cursor { epoch: top.epoch, offset: top.offset + 1 };
                let follows = if top.offset == 0 { Follows::Nothing } else { Follows::Previous(top) };
                Place { cursor, follows }
            }
            Some(top) => {
                let cursor = Cursor { epoch: self.epoch, offset: top.offset + 1 };
                Place { cursor, follows: Follows::Unproven(top) }
            }
            None => {
                self.epochs += 1;
                self.epoch = self.epochs;
                Place { cursor: Cursor { epoch: self.epoch, offset: 1 }, follows: Follows::Nothing }
            }
        }
    }

    fn interrupt(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        node.is_up = false;
        node.coming.clear();
        node.answer = None;
    }

    fn page(&self, after: Cursor, limit: usize) -> Page {
        let entry = |(place, id): &(Place, Id)| Entry {
            place: *place,
            publication: Publication::new(Data::text(id.to_string())),
        };
        let known = self.entries.iter().position(|(place, _)| place.cursor == after);
        let (start, skip) = match (known, self.entries.first()) {
            (Some(index), _) => (Start::Continuous, index + 1),
            (None, _) if self.top == Some(after) => (Start::Continuous, self.entries.len()),
            (None, Some((first, _)))
                if first.follows == Follows::Nothing
                    && after.offset == 0
                    && after.epoch == first.cursor.epoch =>
            {
                (Start::Continuous, 0)
            }
            (None, Some((first, _))) if first.follows.cursor() == Some(after) => (Start::Continuous, 0),
            (None, Some((first, _))) if after.epoch == first.cursor.epoch && after < first.cursor => {
                (Start::Trimmed, 0)
            }
            (None, None) if self.top.is_some_and(|top| top.epoch == after.epoch && after < top) => {
                (Start::Trimmed, 0)
            }
            (None, _) => (Start::Lost, 0),
        };
        // What is too large counts as removed: a page ends before it, or begins after it.
        let is_oversized = |(_, id): &&(Place, Id)| self.oversized.contains(id);
        let rest = || self.entries.iter().skip(skip);
        let large = rest().take_while(is_oversized).count();
        let start = if large > 0 && start == Start::Continuous { Start::Trimmed } else { start };
        let found = rest().skip(large).take_while(|entry| !is_oversized(entry));
        Page { entries: found.take(limit).map(entry).collect(), start, top: self.top }
    }

    /// Passes something to a node's log, and what comes out of it to its members.
    fn at(
        &mut self,
        node: usize,
        act: impl FnOnce(&mut RoomLog<Id>, Out<'_, Id>) -> Next,
    ) -> Result<(), TestCaseError> {
        let mut items = Vec::new();
        let known = &mut self.nodes[node];
        let next = act(&mut known.log, &mut |number, item| items.push((number, item.clone())));
        if next != Next::Wait {
            known.next = next;
        }
        for (number, item) in items {
            for member in 0..self.members.len() {
                let is_here = self.members[member].node == Some(node);
                if is_here && number >= self.members[member].from {
                    self.receive(member, &item)?;
                }
            }
        }
        Ok(())
    }

    fn receive(&mut self, member: usize, item: &Item<Id>) -> Result<(), TestCaseError> {
        let accepted = &self.accepted;
        let member = &mut self.members[member];
        match item {
            Item::Gap(_) => member.has_gap = true,
            // Over an interruption their order among the others is lost.
            Item::Publication(id, None) => {
                prop_assert!(member.unrecorded.insert(*id), "{id} came again");
            }
            Item::Publication(id, cursor) => {
                // What was on its way when a member joined may come too.
                let is_early = member.is_new && member.last.is_some_and(|last| *id <= last);
                if !is_early {
                    let from = member.last.map_or(0, |last| last + 1);
                    prop_assert!(from <= *id, "{id} came again, or after {:?}", member.last);
                    let missing = (from..*id).any(|missing| accepted[missing]);
                    prop_assert!(!missing || member.has_gap, "{from}..{id} were lost without a gap");
                    member.last = Some(*id);
                    member.is_new = false;
                    member.has_gap = false;
                }
                member.cursor = *cursor;
            }
        }
        Ok(())
    }

    /// Nobody is let in before the log is open, unless that is refused.
    fn enter(&mut self, node: usize) {
        let log = &mut self.nodes[node].log;
        if log.seen().is_none() {
            log.not_opened();
        }
    }

    fn apply(&mut self, step: Step) -> Result<(), TestCaseError> {
        let now = self.now;
        match step {
            Step::Publish => self.publish(true),
            Step::PublishUnrecorded => self.publish(false),
            Step::PublishOversized => {
                self.publish(true);
                self.oversized.insert(self.accepted.len() - 1);
                for node in self.nodes.iter_mut().filter(|node| node.is_up) {
                    node.coming.pop_back();
                    node.coming.push_back(Coming::Gap(GapCause::Oversized));
                }
            }
            Step::Deliver(node) => match self.nodes[node].coming.pop_front() {
                None => {}
                Some(Coming::Opened(top)) => self.nodes[node].log.opened(top),
                Some(Coming::Gap(cause)) => self.at(node, |log, out| log.interrupted(cause, now, out))?,
                Some(Coming::Publication(publication, place)) => {
                    self.at(node, |log, out| {
                        log.arrived(Arrival { publication, bytes: 100, place }, now, out)
                    })?;
                }
            },
            Step::Lose(node) => {
                let node = &mut self.nodes[node];
                // Without a position, or once the log is deleted, nobody can notice.
                if let Some(Coming::Publication(_, Some(place))) = node.coming.front()
                    && node.log.seen().is_some()
                    && self.entries.iter().any(|(kept, _)| kept == place)
                {
                    node.lost = Some(place.cursor);
                    node.coming.pop_front();
                }
            }
            Step::Check(node) => self.at(node, |log, _| log.check(Duration::ZERO, now))?,
            Step::Interrupt(node) => self.interrupt(node),
            Step::Reconnect(node) => {
                if !self.nodes[node].is_up {
                    self.nodes[node].is_up = true;
                    self.nodes[node].coming.push_back(Coming::Gap(GapCause::Interrupted));
                }
            }
            Step::Failover(lost) => {
                (0..NODES).for_each(|node| self.interrupt(node));
                let kept = self.entries.len().saturating_sub(lost);
                self.entries.truncate(kept);
                if let Some(top) = &mut self.top
                    && lost > 0
                {
                    // As of a moment before: a log that had nothing then may not have been there.
                    match self.entries.last() {
                        Some((place, _)) => *top = place.cursor,
                        None => self.top = None,
                    }
                }
                self.epochs += 1;
                self.epoch = self.epochs;
            }
            // What was lost on its way and then in the log is lost for good, and nobody can know.
            Step::Delete if self.nodes.iter().any(|node| node.lost > node.log.seen()) => {}
            Step::Delete => {
                self.entries.clear();
                self.top = None;
            }
            Step::Trim(count) => drop(self.entries.drain(..count.min(self.entries.len()))),
            Step::Answer(node) => {
                if let Next::Read(after) = self.nodes[node].next
                    && self.nodes[node].is_up
                {
                    self.nodes[node].next = Next::Wait;
                    self.nodes[node].answer = Some((after, self.page(after, PAGE)));
                }
            }
            Step::Read(node) => {
                if let Some((after, page)) = self.nodes[node].answer.take() {
                    self.at(node, |log, out| log.read(after, page, make, now, out))?;
                }
            }
            Step::Join(node) => {
                if self.nodes[node].is_up && self.members.len() < 8 {
                    self.enter(node);
                    self.members.push(Member {
                        node: Some(node),
                        from: self.nodes[node].log.ring().next(),
                        last: self.accepted.len().checked_sub(1),
                        cursor: self.nodes[node].log.seen(),
                        has_gap: false,
                        unrecorded: BTreeSet::new(),
                        is_new: true,
                    });
                }
            }
            Step::Resume { member, node } => self.resume(member, node)?,
        }
        // A reading whose connection was lost is made again.
        for node in &mut self.nodes {
            if let (Next::Wait, None, Some(after)) = (node.next, &node.answer, node.log.wants()) {
                node.next = Next::Read(after);
            }
        }
        Ok(())
    }

    fn resume(&mut self, member: usize, node: usize) -> Result<(), TestCaseError> {
        let Some(cursor) = self.members.get(member).and_then(|member| member.cursor) else { return Ok(()) };
        if self.members[member].is_new || !self.nodes[node].is_up {
            return Ok(());
        }
        let (from, gap) = match self.nodes[node].log.resume(cursor) {
            Resume::At(number) => (number, None),
            Resume::After(number, cause) => (number, Some(cause)),
            Resume::Read => {
                let page = self.page(cursor, usize::MAX);
                if self.nodes[node].log.seen().is_none() {
                    return Ok(()); // What is on its way may come again, after a gap.
                }
                if !self.nodes[node].log.has_reached(page.top) {
                    let now = self.now;
                    return self.at(node, |log, _| log.suspect(now)); // It waits.
                }
                // Nobody can tell what is on its way from a log that was deleted: it comes after the gap, maybe again.
                if page.top.is_none() && !self.nodes[node].coming.is_empty() {
                    return Ok(());
                }
                self.nodes[node].log.backfill(cursor, page, make)
            }
        };
        let (_, items) = self.nodes[node].log.ring().slice(from, usize::MAX);
        self.members[member].node = Some(node);
        // Without a position nobody can tell whether it had them at the other node.
        self.members[member].unrecorded.clear();
        self.members[member].from = self.nodes[node].log.ring().next();
        // It may have received this by another way already: from the node where it was before.
        if let Some(cause) = gap {
            self.receive(member, &Item::Gap(cause))?;
        }
        for (_, item) in items {
            let item =
                if let Item::Publication(_, None) = item { Item::Gap(GapCause::Unrecorded) } else { item };
            self.receive(member, &item)?;
        }
        Ok(())
    }

    /// Everything comes to rest, and then something is published: whatever is missing must be told by then.
    fn rest(&mut self) -> Result<(), TestCaseError> {
        for last in [false, true] {
            if last {
                self.publish(true);
            }
            for node in 0..NODES {
                self.apply(Step::Reconnect(node))?;
                for _ in 0..1000 {
                    let known = &self.nodes[node];
                    if known.log.repair.is_none() && known.coming.is_empty() && known.answer.is_none() {
                        break;
                    }
                    self.apply(Step::Deliver(node))?;
                    self.apply(Step::Answer(node))?;
                    self.apply(Step::Read(node))?;
                }
                if !last {
                    self.apply(Step::Check(node))?;
                    for _ in 0..1000 {
                        self.apply(Step::Answer(node))?;
                        self.apply(Step::Read(node))?;
                    }
                    let (seen, top) = (self.nodes[node].log.seen(), self.top);
                    prop_assert!(
                        seen.is_none() || top.is_none() || seen == top,
                        "a check has not found {top:?}"
                    );
                }
                let known = &self.nodes[node];
                prop_assert!(known.log.repair.is_none() && known.coming.is_empty(), "a repair does not end");
            }
        }
        let newest = self.accepted.len().checked_sub(1);
        for member in &self.members {
            prop_assert_eq!(member.last, newest, "a member hears nothing any more");
        }
        Ok(())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "what is made of an entry may keep it")]
fn make(entry: Entry) -> (Id, usize) {
    let text = entry.publication.data.as_text().unwrap_or_default().to_owned();
    (text.parse().unwrap_or(Id::MAX), 100)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16 * ProptestConfig::default().cases, max_shrink_iters: 5_000, ..ProptestConfig::default() })]

    /// Order, no doubles, and a gap wherever something is missing, for members that stay and that come back.
    #[test]
    fn nothing_is_lost_doubled_or_reordered_without_a_gap(steps in vec(step(), 1..120)) {
        let mut world = World::new();
        for step in steps {
            world.apply(step)?;
        }
        world.rest()?;
    }
}

fn at(offset: u64) -> Cursor {
    Cursor { epoch: 1, offset }
}

fn place(offset: u64) -> Place {
    let follows = if offset > 1 { Follows::Previous(at(offset - 1)) } else { Follows::Nothing };
    Place { cursor: at(offset), follows }
}

/// A page that ends with the newest publication.
fn last_page(offsets: std::ops::RangeInclusive<u64>) -> Page {
    let top = Some(at(*offsets.end()));
    let publication = Publication::new(Data::text(""));
    let entries = offsets.map(|offset| Entry { place: place(offset), publication: publication.clone() });
    Page { entries: entries.collect(), start: Start::Continuous, top }
}

/// The newest publications, if the ring knows them.
fn newest(log: &RoomLog<u64>, count: usize) -> Option<Vec<u64>> {
    let (_, items) = log.ring().slice(log.last(count)?, usize::MAX);
    let offset = |(_, item)| match item {
        Item::Publication(offset, _) => offset,
        Item::Gap(cause) => panic!("{cause:?}"),
    };
    Some(items.into_iter().map(offset).collect())
}

#[test]
fn the_newest_are_in_the_ring_or_at_the_end_of_the_log() {
    let make = |entry: Entry| (entry.place.cursor.offset, 1);
    let mut log = RoomLog::new(Bounds { items: 100, bytes: 1000 });
    log.opened(at(10));
    assert_eq!(newest(&log, 3), None);
    log.backfill_last(3, last_page(8..=10), make);
    assert_eq!(newest(&log, 3), Some(vec![8, 9, 10]));
    assert_eq!(newest(&log, 2), Some(vec![9, 10]));
    assert_eq!(newest(&log, 4), None, "the log may have more");
    log.backfill_last(100, last_page(5..=10), make);
    assert_eq!(newest(&log, 1000), Some(vec![5, 6, 7, 8, 9, 10]), "the log has no more");
    let arrival = Arrival { publication: 11, bytes: 1, place: Some(place(11)) };
    let next = log.arrived(arrival, Instant::now(), &mut |_, _| {});
    assert_eq!((next, newest(&log, 2)), (Next::Wait, Some(vec![10, 11])));
    assert_eq!(newest(&log, 1000).map(|all| all.len()), Some(7));
    log.shrink(5);
    assert_eq!(newest(&log, 5), Some(vec![7, 8, 9, 10, 11]));
    assert_eq!(newest(&log, 6), None, "the log may have what the ring has given up");

    let mut empty = RoomLog::new(Bounds { items: 100, bytes: 1000 });
    empty.opened(at(0));
    assert_eq!(newest(&empty, 5), Some(vec![]), "there is nothing before its beginning");
}

/// A log of numbers, and what its members have received.
struct Scene {
    log: RoomLog<Id>,
    heard: Vec<String>,
    now: Instant,
}

fn cursor(epoch: u64, offset: u64) -> Cursor {
    Cursor { epoch, offset }
}

/// A place in epoch 1, or in a later one that begins there without a proof that nothing was lost before.
fn unproven(epoch: u64, offset: u64) -> Place {
    Place { cursor: cursor(epoch, offset), follows: Follows::Unproven(at(offset - 1)) }
}

fn name(item: &Item<Id>) -> String {
    match item {
        Item::Publication(id, _) => id.to_string(),
        Item::Gap(cause) => cause.as_str().to_owned(),
    }
}

fn page(start: Start, places: &[Place], top: Option<Cursor>) -> Page {
    let entry = |place: &Place| Entry {
        place: *place,
        publication: Publication::new(Data::text(place.cursor.offset.to_string())),
    };
    Page { entries: places.iter().map(entry).collect(), start, top }
}

impl Scene {
    fn opened(top: Cursor) -> Self {
        let mut log = RoomLog::new(Bounds { items: 100, bytes: 1000 });
        log.opened(top);
        Self { log, heard: Vec::new(), now: Instant::now() }
    }

    fn run(&mut self, act: impl FnOnce(&mut RoomLog<Id>, Instant, Out<'_, Id>) -> Next) -> Next {
        let heard = &mut self.heard;
        act(&mut self.log, self.now, &mut |_, item| heard.push(name(item)))
    }

    /// Its number is the offset of its place.
    fn arrives(&mut self, place: Place) -> Next {
        self.arrives_with(place, 1)
    }

    fn arrives_with(&mut self, place: Place, bytes: usize) -> Next {
        let publication = usize::try_from(place.cursor.offset).unwrap();
        self.run(|log, now, out| log.arrived(Arrival { publication, bytes, place: Some(place) }, now, out))
    }

    fn interrupt(&mut self) -> Next {
        self.run(|log, now, out| log.interrupted(GapCause::Interrupted, now, out))
    }

    fn check(&mut self) -> Next {
        self.run(|log, now, _| log.check(Duration::ZERO, now))
    }

    fn read(&mut self, after: Cursor, page: Page) -> Next {
        self.run(|log, now, out| log.read(after, page, make, now, out))
    }

    /// What somebody receives who comes back, with what was read, if that is needed.
    fn come_back(&mut self, cursor: Cursor, page: Page) -> Vec<String> {
        let (from, gap) = match self.log.resume(cursor) {
            Resume::At(number) => (number, None),
            Resume::After(number, cause) => (number, Some(cause)),
            Resume::Read => self.log.backfill(cursor, page, make),
        };
        let (_, items) = self.log.ring().slice(from, usize::MAX);
        gap.map(|cause| cause.as_str().to_owned())
            .into_iter()
            .chain(items.iter().map(|(_, item)| name(item)))
            .collect()
    }
}

#[test]
fn a_check_finds_another_log_whose_publications_are_gone() {
    let mut scene = Scene::opened(at(3));
    assert_eq!(scene.check(), Next::Read(at(3)));
    assert_eq!(scene.read(at(3), page(Start::Lost, &[], Some(cursor(2, 1)))), Next::Wait);
    assert_eq!((scene.heard, scene.log.seen()), (vec!["expired".to_owned()], Some(cursor(2, 1))));
}

#[test]
fn a_check_tells_nothing_of_a_log_that_has_nothing_new() {
    for top in [None, Some(at(2)), Some(cursor(2, 0))] {
        let mut scene = Scene::opened(at(3));
        assert_eq!(scene.check(), Next::Read(at(3)));
        assert_eq!(scene.read(at(3), page(Start::Lost, &[], top)), Next::Wait);
        assert_eq!((scene.heard, scene.log.seen()), (vec![], Some(at(3))), "{top:?}");
    }
}

#[test]
fn what_follows_the_last_publication_ends_a_check() {
    let mut scene = Scene::opened(at(1));
    assert_eq!(scene.check(), Next::Read(at(1)));
    assert_eq!(scene.arrives(place(2)), Next::Wait);
    assert_eq!(scene.heard, ["2"], "it does not wait");
    // The answer comes late, when the log has been trimmed.
    assert_eq!(scene.read(at(1), page(Start::Trimmed, &[], Some(at(2)))), Next::Wait);
    assert!(!scene.log.is_repairing());
    // What does not follow it waits for the answer.
    assert_eq!(scene.check(), Next::Read(at(2)));
    assert_eq!(scene.arrives(place(4)), Next::Wait);
    assert_eq!(scene.read(at(2), page(Start::Continuous, &[place(3), place(4)], Some(at(4)))), Next::Wait);
    assert_eq!(scene.heard, ["2", "3", "4"]);
}

#[test]
fn an_empty_log_that_was_lost_in_an_interruption_may_have_had_something() {
    let mut scene = Scene::opened(at(0));
    assert_eq!(scene.interrupt(), Next::Read(at(0)));
    assert_eq!(scene.read(at(0), page(Start::Continuous, &[], Some(at(0)))), Next::Wait);
    assert_eq!(scene.heard, [""; 0]);
    assert_eq!(scene.arrives(Place { cursor: cursor(2, 1), follows: Follows::Nothing }), Next::Wait);
    assert_eq!(scene.heard, ["expired", "1"]);
}

#[test]
fn a_gap_stands_where_the_server_has_lost_what_came_right_before_the_ring() {
    let mut scene = Scene::opened(at(7));
    let _ = scene.arrives(place(8));
    // A server reigns that lacks the last three, and accepts another.
    assert_eq!(scene.arrives(unproven(2, 6)), Next::Read(at(8)));
    let kept = [place(4), place(5), unproven(2, 6)];
    let _ = scene.read(at(8), page(Start::Lost, &kept, Some(cursor(2, 6))));
    assert_eq!(scene.heard, ["8", "expired", "6"]);
    let back = scene.come_back(at(3), page(Start::Continuous, &kept, Some(cursor(2, 6))));
    assert_eq!(back, ["4", "5", "failover", "8", "expired", "6"]);
}

#[test]
fn the_beginning_of_a_page_is_proven_only_if_its_first_entry_says_so() {
    let mut scene = Scene::opened(cursor(2, 6));
    let kept = [unproven(2, 5), Place { cursor: cursor(2, 6), follows: Follows::Previous(cursor(2, 5)) }];
    let top = Some(cursor(2, 6));
    assert_eq!(scene.come_back(cursor(1, 1), page(Start::Lost, &kept, top)), ["expired", "5", "6"]);
    assert_eq!(scene.come_back(at(4), page(Start::Continuous, &kept, top)), ["failover", "5", "6"]);
}

#[test]
fn a_ring_begins_after_a_position_only_if_that_is_proven() {
    let mut scene = Scene::opened(at(1));
    scene.log = RoomLog::new(Bounds { items: 100, bytes: 1000 });
    scene.log.not_opened();
    let _ = scene.arrives(unproven(2, 5));
    assert_eq!(scene.heard, ["5"]);
    let top = Some(cursor(2, 5));
    assert_eq!(scene.come_back(at(4), page(Start::Continuous, &[unproven(2, 5)], top)), ["failover", "5"]);
}

#[test]
fn somebody_whose_page_is_empty_gets_what_has_come_since() {
    let mut scene = Scene::opened(at(5));
    let _ = scene.interrupt();
    let _ = scene.run(|log, now, out| log.unreadable(GapCause::Interrupted, now, out));
    let _ = scene.arrives(place(9));
    assert_eq!(scene.heard, ["interrupted", "9"]);
    // Read before the eighth and the ninth were published.
    assert_eq!(scene.come_back(at(7), page(Start::Continuous, &[], Some(at(7)))), ["interrupted", "9"]);
}

#[test]
fn what_the_ring_has_is_not_put_before_it_again() {
    // The server and its clock went back: the ring has an earlier epoch behind a later one.
    let mut scene = Scene::opened(cursor(3, 1));
    let _ = scene.arrives(Place { cursor: cursor(3, 2), follows: Follows::Previous(cursor(3, 1)) });
    let first = Place { cursor: cursor(2, 1), follows: Follows::Nothing };
    let second = Place { cursor: cursor(2, 2), follows: Follows::Previous(cursor(2, 1)) };
    let third = Place { cursor: cursor(4, 3), follows: Follows::Moved(cursor(2, 2)) };
    for place in [first, second, third] {
        let _ = scene.arrives(place);
    }
    assert_eq!(scene.heard, ["2", "1", "2", "3"]);
    let back = scene.come_back(at(1), page(Start::Lost, &[first, second, third], Some(cursor(4, 3))));
    assert_eq!(back, ["expired", "2", "1", "2", "3"]);
}

#[test]
fn what_the_ring_has_is_never_passed_on_again_however_late_it_arrives() {
    let mut scene = Scene::opened(at(1));
    let _ = scene.interrupt();
    let _ = scene.read(at(1), page(Start::Continuous, &[place(2)], Some(at(2))));
    // The log is deleted, and the node suspended while the publication is on its way.
    let _ = scene.interrupt();
    let _ = scene.read(at(2), page(Start::Lost, &[], None));
    scene.now += LAG * 2;
    let _ = scene.arrives(place(2));
    assert_eq!(scene.heard, ["2", "expired"]);
}

#[test]
fn what_no_log_has_may_be_missing_after_an_interruption() {
    let mut scene = Scene::opened(at(1));
    let unrecorded = Arrival { publication: 7, bytes: 1, place: None };
    let _ = scene.run(|log, now, out| log.arrived(unrecorded, now, out));
    let _ = scene.interrupt();
    let _ = scene.read(at(1), page(Start::Continuous, &[], Some(at(1))));
    assert_eq!(scene.heard, ["7", "unrecorded"]);
}

#[test]
fn a_failover_is_told_to_those_who_come_back_from_before_it() {
    let mut scene = Scene::opened(cursor(2, 7));
    let last = Place { cursor: cursor(2, 7), follows: Follows::Previous(cursor(2, 6)) };
    let kept = page(Start::Continuous, &[place(5), unproven(2, 6), last], Some(cursor(2, 7)));
    assert_eq!(scene.come_back(at(4), kept), ["5", "failover", "6", "7"]);
}

#[test]
fn what_is_too_much_to_wait_is_read_again() {
    let mut scene = Scene::opened(at(1));
    assert_eq!(scene.interrupt(), Next::Read(at(1)));
    assert_eq!(scene.arrives_with(place(2), MOST_WAITING + 1), Next::Wait);
    // As of a moment before it was published.
    assert_eq!(scene.read(at(1), page(Start::Continuous, &[], Some(at(1)))), Next::Read(at(1)));
    assert_eq!(scene.read(at(1), page(Start::Continuous, &[place(2)], Some(at(2)))), Next::Wait);
    assert_eq!(scene.heard, ["2"]);
}

#[test]
fn what_has_waited_does_not_come_after_the_gap_that_stands_for_it() {
    let mut scene = Scene::opened(at(1));
    let _ = scene.interrupt();
    let _ = scene.arrives(place(2));
    let _ = scene.read(at(1), page(Start::Lost, &[], None));
    let _ = scene.arrives(Place { cursor: cursor(2, 1), follows: Follows::Nothing });
    assert_eq!(scene.heard, ["expired", "1"]);
}

#[test]
fn an_interruption_during_a_check_is_not_forgotten_if_the_check_fails() {
    for waits in [false, true] {
        let mut scene = Scene::opened(at(1));
        assert_eq!(scene.check(), Next::Read(at(1)));
        if waits {
            let _ = scene.arrives_with(place(3), MOST_WAITING + 1);
        } else {
            assert_eq!(scene.interrupt(), Next::Wait);
        }
        assert!(!scene.log.is_checking(), "it has to be read now");
    }
}

#[test]
fn nothing_is_told_if_the_topic_is_only_late() {
    let mut scene = Scene::opened(at(1));
    let _ =
        scene.run(|log, now, out| log.arrived(Arrival { publication: 7, bytes: 1, place: None }, now, out));
    // Somebody comes back who has received the second elsewhere.
    assert_eq!(scene.run(|log, now, _| log.suspect(now)), Next::Read(at(1)));
    assert_eq!(scene.read(at(1), page(Start::Continuous, &[place(2)], Some(at(2)))), Next::Wait);
    let _ = scene.arrives(place(2));
    assert_eq!(scene.heard, ["7", "2"]);
}

#[test]
fn a_position_that_is_yet_to_come_is_not_remembered_as_unknown() {
    let mut scene = Scene::opened(at(1));
    let lost = || page(Start::Lost, &[], Some(at(1)));
    assert_eq!(scene.come_back(at(2), lost()), ["expired"]);
    for offset in 2..=4 {
        let _ = scene.arrives(place(offset));
    }
    scene.log.shrink(0);
    let kept = page(Start::Continuous, &[place(3), place(4)], Some(at(4)));
    assert_eq!(scene.come_back(at(2), kept), ["3", "4"]);
    // One that was never used is.
    assert_eq!(scene.come_back(cursor(9, 9), lost()), ["expired"]);
    assert_eq!(scene.log.resume(cursor(9, 9)), Resume::After(scene.log.ring().next(), GapCause::Expired));
}

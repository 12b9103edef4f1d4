//! The promises about histories.

#![allow(clippy::indexing_slicing, reason = "a panic is a failed test")]

use std::{num::NonZeroU32, time::Duration};

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::{Backend, Heard, Node, PATIENCE, bounded, every_combination, node, nodes, room, texts};
use crate::{
    Accepted, BrokerError, Cursor, Data, Follows, Place, Publication, PublicationId, PublishRequest,
    Retention, RoomName,
    broker::{MAX_PAGE, MAX_PAGE_BYTES},
    history::{Page, ReadFrom, Start},
    publication::Owner,
};

/// Keeps `size` publications for longer than a test takes.
fn keep(size: u32) -> Retention {
    Retention { size: NonZeroU32::new(size).expect("not zero"), ttl: Some(Duration::from_secs(600)) }
}

impl Node {
    async fn record(&self, room: &RoomName, publication: Publication, retention: Retention) {
        let request = PublishRequest { history: Some(retention), ..self.request(room, publication) };
        bounded("room in the queue", self.broker.publish(request)).await;
    }

    async fn record_text(&self, room: &RoomName, text: &str) {
        self.record(room, Publication::new(Data::text(text)), keep(10_000)).await;
    }

    /// Records the texts `0` to `count - 1`, and answers their positions.
    async fn record_numbers(&self, room: &RoomName, count: usize) -> Vec<Cursor> {
        let before = self.receipts.settled().len();
        for number in 0..count {
            self.record_text(room, &number.to_string()).await;
        }
        self.cursors(before, count).await
    }

    /// The positions of `count` publications after the first `before` ones of this node, as their receipts tell them.
    async fn cursors(&self, before: usize, count: usize) -> Vec<Cursor> {
        let settled = self.receipts.wait(before + count).await;
        let cursor = |outcomes: &Vec<_>| match outcomes[..] {
            [Ok(Accepted { cursor: Some(cursor), duplicate: false })] => cursor,
            _ => panic!("not recorded: {outcomes:?}"),
        };
        settled.values().skip(before).map(cursor).collect()
    }

    /// Records a publication with an id.
    async fn record_with_id(&self, room: &RoomName, text: &str, id: &PublicationId) -> Accepted {
        let before = self.receipts.settled().len();
        let request = PublishRequest {
            history: Some(keep(100)),
            id: Some(id.clone()),
            ..self.request(room, Publication::new(Data::text(text)))
        };
        bounded("room in the queue", self.broker.publish(request)).await;
        let settled = self.receipts.wait(before + 1).await;
        let outcomes = settled.values().next_back().expect("it has been settled");
        match &outcomes[..] {
            [Ok(accepted)] => *accepted,
            other => panic!("not accepted: {other:?}"),
        }
    }

    async fn open(&self, room: &RoomName, retention: Retention) -> Cursor {
        bounded("a position", self.broker.open(room, retention)).await.expect("a position")
    }

    async fn read(&self, room: &RoomName, from: ReadFrom, limit: usize) -> Page {
        bounded("a page", self.broker.read(room, from, limit)).await.expect("a page")
    }

    /// Everything after a position, in pages of `limit`.
    async fn read_all(&self, room: &RoomName, after: Cursor, limit: usize) -> Vec<(Place, Publication)> {
        let (mut all, mut position) = (Vec::new(), after);
        loop {
            let page = self.read(room, ReadFrom::After(position), limit).await;
            assert_eq!(page.start, Start::Continuous, "after {position}");
            assert!(page.entries.len() <= limit, "{} are more than {limit}", page.entries.len());
            let Some(last) = page.entries.last() else {
                assert_eq!(page.top, Some(position));
                return all;
            };
            position = last.place.cursor;
            all.extend(page.entries.into_iter().map(|entry| (entry.place, entry.publication)));
        }
    }
}

/// The texts of a page.
fn page_texts(page: &Page) -> Vec<&str> {
    page.entries.iter().map(|entry| entry.publication.data.as_text().expect("a text")).collect()
}

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

fn before(cursor: Cursor) -> Cursor {
    Cursor { offset: cursor.offset - 1, ..cursor }
}

/// The positions of a room ascend by one in one epoch; subscribers and publishers are told the same ones.
pub async fn cursors_ascend_by_one_and_receipts_carry_them(backend: &dyn Backend) {
    const COUNT: usize = 300;
    let nodes: [Node; 2] = nodes(backend).await;
    let room = room("cursors");
    nodes[1].subscribe(&room).await;
    let cursors = nodes[0].record_numbers(&room, COUNT).await;
    let heard = nodes[1].heard.wait(&room, "all of them", |heard| heard.len() >= COUNT).await;
    assert_eq!(texts(&heard), numbers(0..COUNT));

    let epoch = cursors[0].epoch;
    let mut follows = Follows::Nothing;
    for (offset, (cursor, place)) in (1..).zip(cursors.iter().zip(nodes[1].heard.places(&room))) {
        assert_eq!(*cursor, Cursor { epoch, offset });
        assert_eq!(place, Some(Place { cursor: *cursor, follows }));
        follows = Follows::Previous(*cursor);
    }
}

/// Reading after any position gives exactly what was published since, whatever the size of a page.
pub async fn a_page_after_any_position_is_what_was_missed(backend: &dyn Backend) {
    const COUNT: usize = 60;
    let nodes: [Node; 2] = nodes(backend).await;
    let room = room("missed");
    let beginning = nodes[1].open(&room, keep(100)).await;
    nodes[1].subscribe(&room).await;
    let cursors = nodes[0].record_numbers(&room, COUNT).await;
    nodes[1].heard.wait(&room, "all of them", |heard| heard.len() >= COUNT).await;
    let places = nodes[1].heard.places(&room);
    for (seen, position) in std::iter::once(beginning).chain(cursors).enumerate() {
        for limit in [1, 7, COUNT, MAX_PAGE] {
            let missed = nodes[1].read_all(&room, position, limit).await;
            let texts = missed.iter().map(|(_, publication)| publication.data.as_text().expect("a text"));
            assert!(texts.eq(&numbers(seen..COUNT)), "after {position}, in pages of {limit}: {missed:?}");
            assert!(
                missed.iter().map(|(place, _)| Some(*place)).eq(places[seen..].iter().copied()),
                "the places are those that were heard live"
            );
        }
    }
}

/// The last page ends with the newest publication, and has as many as are there and were asked for.
pub async fn the_last_page_ends_with_the_newest(backend: &dyn Backend) {
    let node = node(backend).await;
    let room = room("last");
    let page = node.read(&room, ReadFrom::Last, 10).await;
    assert_eq!((page.entries.len(), page.start, page.top), (0, Start::Continuous, None));
    let beginning = node.open(&room, keep(100)).await;
    let page = node.read(&room, ReadFrom::Last, 10).await;
    assert_eq!((page.entries.len(), page.start, page.top), (0, Start::Continuous, Some(beginning)));

    let cursors = node.record_numbers(&room, 50).await;
    for limit in [1, 2, 49, 50, 51, MAX_PAGE] {
        let page = node.read(&room, ReadFrom::Last, limit).await;
        let expected = numbers(50_usize.saturating_sub(limit)..50);
        assert_eq!(page_texts(&page), expected);
        assert_eq!((page.start, page.top), (Start::Continuous, Some(cursors[49])));
        let places = page.entries.iter().map(|entry| entry.place.cursor);
        assert!(places.eq(cursors[50 - expected.len()..].iter().copied()));
    }
}

/// A page before any position ends with the publication before it, and says whether the position is known.
pub async fn a_page_before_a_position_ends_right_before_it(backend: &dyn Backend) {
    const COUNT: usize = 50;
    let node = node(backend).await;
    let room = room("before");
    let beginning = node.open(&room, keep(100)).await;
    let page = node.read(&room, ReadFrom::Before(beginning), 10).await;
    assert_eq!((page.entries.len(), page.start, page.top), (0, Start::Continuous, Some(beginning)));

    let cursors = node.record_numbers(&room, COUNT).await;
    let top = Some(cursors[COUNT - 1]);
    for (seen, position) in std::iter::once(beginning).chain(cursors.iter().copied()).enumerate() {
        for limit in [1, 16, 17, MAX_PAGE] {
            let page = node.read(&room, ReadFrom::Before(position), limit).await;
            let end = seen.saturating_sub(1);
            assert_eq!(
                page_texts(&page),
                numbers(end.saturating_sub(limit)..end),
                "{limit} before {position}"
            );
            assert_eq!((page.start, page.top), (Start::Continuous, top));
        }
    }
    let Cursor { epoch, offset } = cursors[COUNT - 1];
    for unknown in [
        Cursor { epoch, offset: offset + 1 },
        Cursor { epoch: epoch + 1, offset: 7 },
        Cursor { epoch: epoch - 1, offset: 7 },
        Cursor { epoch: 0, offset: 0 },
    ] {
        let page = node.read(&room, ReadFrom::Before(unknown), 10).await;
        assert_eq!((page.start, page.top), (Start::Lost, top), "{unknown}");
    }
    node.broker.clear(&room).await.expect("cleared");
    let page = node.read(&room, ReadFrom::Before(cursors[7]), 10).await;
    assert_eq!((page.entries.len(), page.start, page.top), (0, Start::Continuous, top));
}

/// A page has a bounded number of publications and of bytes, but at least one publication.
pub async fn a_page_is_bounded(backend: &dyn Backend) {
    let node = node(backend).await;
    let large = room("page:large");
    let beginning = node.open(&large, keep(100)).await;
    let sizes = [MAX_PAGE_BYTES / 2, MAX_PAGE_BYTES / 2, 1, MAX_PAGE_BYTES + 1, 1, 1];
    for size in sizes {
        node.record(&large, Publication::new(Data::text("x".repeat(size))), keep(100)).await;
    }
    node.cursors(0, sizes.len()).await;
    let (mut position, mut pages) = (beginning, Vec::new());
    loop {
        let page = node.read(&large, ReadFrom::After(position), 10).await;
        let Some(last) = page.entries.last() else { break };
        position = last.place.cursor;
        pages.push(page.entries.iter().map(|entry| entry.publication.data.bytes().len()).collect::<Vec<_>>());
    }
    assert_eq!(pages.concat(), sizes);
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1, 1, 2]);
    let last = node.read(&large, ReadFrom::Last, 10).await;
    assert_eq!(last.entries.len(), 2);

    let many = room("page:many");
    let beginning = node.open(&many, keep(10_000)).await;
    node.record_numbers(&many, MAX_PAGE + 5).await;
    for (limit, expected) in [(0, 1), (1, 1), (MAX_PAGE, MAX_PAGE), (usize::MAX, MAX_PAGE)] {
        let page = node.read(&many, ReadFrom::After(beginning), limit).await;
        assert_eq!(page_texts(&page), numbers(0..expected));
        assert!(page.top.is_some_and(|top| top.offset == MAX_PAGE as u64 + 5), "{:?}", page.top);
        let page = node.read(&many, ReadFrom::Last, limit).await;
        assert_eq!(page_texts(&page), numbers(MAX_PAGE + 5 - expected..MAX_PAGE + 5));
    }
}

/// Whoever asks for more than is kept is told so, and gets what is left.
pub async fn a_trimmed_position_is_told(backend: &dyn Backend) {
    const COUNT: usize = 700;
    let node = node(backend).await;
    let room = room("trimmed");
    for number in 0..COUNT {
        node.record(&room, Publication::new(Data::text(number.to_string())), keep(10)).await;
    }
    let cursors = node.cursors(0, COUNT).await;
    let page = node.read(&room, ReadFrom::After(before(cursors[0])), MAX_PAGE).await;
    assert_eq!(page.start, Start::Trimmed);
    let kept = page.entries.len();
    // A log may keep a few hundred more.
    assert!((10..=COUNT / 2).contains(&kept), "{kept}");
    assert_eq!(page_texts(&page), numbers(COUNT - kept..COUNT));

    for position in [cursors[0], cursors[COUNT - kept - 2]] {
        let page = node.read(&room, ReadFrom::After(position), 5).await;
        assert_eq!(page.start, Start::Trimmed);
        assert_eq!(page_texts(&page), numbers(COUNT - kept..COUNT - kept + 5));
    }
    // Removed itself, but nothing after it.
    let page = node.read(&room, ReadFrom::After(cursors[COUNT - kept - 1]), MAX_PAGE).await;
    assert_eq!((page.start, page.entries.len()), (Start::Continuous, kept));
}

/// A position that this log never had is lost: from the future, of another log, of a room without log.
pub async fn an_unknown_position_is_lost(backend: &dyn Backend) {
    let node = node(backend).await;
    let room_with = room("unknown");
    let cursors = node.record_numbers(&room_with, 3).await;
    let top = cursors[2];
    let unknown = [
        (Cursor { offset: top.offset + 1, ..top }, 0),
        (Cursor { epoch: top.epoch + 1, offset: 1 }, 0),
        (Cursor { epoch: u64::MAX, offset: u64::MAX }, 0),
        (Cursor { epoch: top.epoch - 1, offset: 1 }, 3),
        (Cursor { epoch: top.epoch - 1, offset: 0 }, 3),
        (Cursor { epoch: 0, offset: 0 }, 3),
    ];
    for (position, newer) in unknown {
        let page = node.read(&room_with, ReadFrom::After(position), 10).await;
        assert_eq!((page.start, page.top), (Start::Lost, Some(top)), "after {position}");
        assert_eq!(page_texts(&page), numbers(0..newer), "after {position}");
    }
    let page = node.read(&room("never"), ReadFrom::After(top), 10).await;
    assert_eq!((page.start, page.top, page.entries.len()), (Start::Lost, None, 0));
}

/// A log that was opened has a position before anything was published in it.
pub async fn an_empty_log_has_a_position(backend: &dyn Backend) {
    let nodes: [Node; 2] = nodes(backend).await;
    let room = room("empty");
    let beginning = nodes[0].open(&room, keep(10)).await;
    assert_eq!(beginning.offset, 0);
    assert_eq!(nodes[1].open(&room, keep(10)).await, beginning, "there is one already");
    let page = nodes[1].read(&room, ReadFrom::After(beginning), 10).await;
    assert_eq!((page.start, page.top, page.entries.len()), (Start::Continuous, Some(beginning), 0));

    let cursors = nodes[1].record_numbers(&room, 1).await;
    assert_eq!(cursors, [Cursor { offset: 1, ..beginning }]);
    let page = nodes[0].read(&room, ReadFrom::After(beginning), 10).await;
    assert_eq!((page.start, page.top), (Start::Continuous, Some(cursors[0])));
    assert_eq!(page.entries[0].place, Place { cursor: cursors[0], follows: Follows::Nothing });
    assert_eq!(nodes[0].open(&room, keep(10)).await, cursors[0]);
}

/// Positions go on after a log was cleared. Whoever had received everything has missed nothing.
pub async fn a_cleared_log_goes_on(backend: &dyn Backend) {
    let nodes: [Node; 2] = nodes(backend).await;
    let room = room("cleared");
    let cursors = nodes[0].record_numbers(&room, 5).await;
    let cleared = bounded("a position", nodes[1].broker.clear(&room)).await;
    assert_eq!(cleared, Ok(cursors[4]));
    let page = nodes[0].read(&room, ReadFrom::Last, 10).await;
    assert_eq!((page.entries.len(), page.top), (0, Some(cursors[4])));
    for (position, start) in [(cursors[4], Start::Continuous), (cursors[3], Start::Trimmed)] {
        let page = nodes[0].read(&room, ReadFrom::After(position), 10).await;
        assert_eq!((page.start, page.entries.len()), (start, 0), "after {position}");
    }
    nodes[0].record_text(&room, "5").await;
    let next = nodes[0].cursors(5, 1).await[0];
    assert_eq!(next, Cursor { offset: 6, ..cursors[4] });
    for (position, start) in [(cursors[4], Start::Continuous), (cursors[3], Start::Trimmed)] {
        let page = nodes[1].read(&room, ReadFrom::After(position), 10).await;
        assert_eq!((page.start, page_texts(&page)), (start, vec!["5"]), "after {position}");
    }
}

/// A publication with an id that is known is not published again, whoever sends it.
pub async fn an_id_is_recorded_once(backend: &dyn Backend) {
    let nodes: [Node; 3] = nodes(backend).await;
    let (room, other_room) = (room("ids"), room("ids:other"));
    nodes[2].subscribe(&room).await;
    let client = |name: &str| Owner::Client(name.into());
    let id = |owner, text| PublicationId::new(owner, text).expect("a valid id");
    // Different owners; the last two resemble each other when they are written one after the other.
    let ids = [
        id(Owner::Backend, "1"),
        id(Owner::Backend, "2"),
        id(client("backend"), "1"),
        id(client("a"), "1"),
        id(client("b"), "1"),
        id(client("2 x"), "1"),
        id(client("x"), "1:2"),
    ];
    let mut first = Vec::new();
    for (number, id) in ids.iter().enumerate() {
        let accepted = nodes[0].record_with_id(&room, &number.to_string(), id).await;
        assert!(!accepted.duplicate, "{id:?}");
        first.push(accepted.cursor.expect("it is recorded"));
    }
    for (id, first) in ids.iter().zip(&first) {
        for node in &nodes {
            let again = node.record_with_id(&room, "again", id).await;
            assert_eq!(again, Accepted { cursor: Some(*first), duplicate: true }, "{id:?}");
        }
    }
    assert!(!nodes[1].record_with_id(&other_room, "elsewhere", &ids[0]).await.duplicate);

    nodes[1].record_text(&room, "end").await;
    let heard =
        nodes[2].heard.wait(&room, "the end", |heard| texts(heard).iter().any(|text| text == "end")).await;
    let expected: Vec<_> = numbers(0..ids.len()).into_iter().chain(["end".to_owned()]).collect();
    assert_eq!(texts(&heard), expected);
    assert_eq!(page_texts(&nodes[2].read(&room, ReadFrom::Last, 100).await), expected);
}

/// Time after the last publication a log is gone. The next one has an epoch of its own.
pub async fn an_expired_log_begins_anew(backend: &dyn Backend) {
    let nodes: [Node; 2] = nodes(backend).await;
    let room = room("expired");
    let short = Retention { ttl: Some(Duration::from_millis(200)), ..keep(10) };
    nodes[0].subscribe(&room).await;
    nodes[0].record(&room, Publication::new(Data::text("0")), short).await;
    let old = nodes[0].cursors(0, 1).await[0];
    let until = Instant::now() + PATIENCE;
    // Reading does not prolong it.
    while let page = nodes[1].read(&room, ReadFrom::After(before(old)), 10).await
        && page.top.is_some()
    {
        assert_eq!((page.start, page_texts(&page)), (Start::Continuous, vec!["0"]));
        assert!(Instant::now() < until, "it does not expire");
        sleep(Duration::from_millis(20)).await;
    }
    let page = nodes[1].read(&room, ReadFrom::After(old), 10).await;
    assert_eq!((page.start, page.top, page.entries.len()), (Start::Lost, None, 0));

    let new = nodes[0].open(&room, keep(10)).await;
    assert!(new.epoch > old.epoch && new.offset == 0, "{new} after {old}");
    nodes[1].record_text(&room, "1").await;
    let cursor = nodes[1].cursors(0, 1).await[0];
    assert_eq!(cursor, Cursor { offset: 1, ..new });
    let page = nodes[1].read(&room, ReadFrom::After(old), 10).await;
    assert_eq!((page.start, page_texts(&page)), (Start::Lost, vec!["1"]));
    nodes[0].heard.wait(&room, "both", |heard| heard.len() >= 2).await;
    let places = nodes[0].heard.places(&room);
    assert_eq!(places[1], Some(Place { cursor, follows: Follows::Nothing }));
}

/// However many nodes publish at once: all hear one order, and it is that of the log.
pub async fn the_log_has_the_order_that_all_nodes_hear(backend: &dyn Backend) {
    const EACH: usize = 400;
    let nodes: [Node; 3] = nodes(backend).await;
    let room = room("log-order");
    let beginning = nodes[0].open(&room, keep(10_000)).await;
    for node in &nodes {
        node.subscribe(&room).await;
    }
    let publish = async |name: &'static str, node: &Node| {
        for number in 0..EACH {
            node.record_text(&room, &format!("{name}{number}")).await;
        }
    };
    tokio::join!(publish("a", &nodes[0]), publish("b", &nodes[1]), publish("c", &nodes[2]));
    let log = {
        join_all(nodes.iter().map(|node| node.cursors(0, EACH))).await;
        nodes[0].read_all(&room, beginning, 100).await
    };
    assert_eq!(log.len(), 3 * EACH);
    for node in &nodes {
        let heard = node.heard.wait(&room, "all of them", |heard| heard.len() >= 3 * EACH).await;
        let places = node.heard.places(&room);
        for ((place, publication), (heard, heard_place)) in log.iter().zip(heard.iter().zip(places)) {
            assert_eq!((heard, heard_place), (&Heard::Publication(publication.clone()), Some(*place)));
        }
        assert_eq!(heard.len(), log.len());
    }
    for name in ["a", "b", "c"] {
        let own = log.iter().filter_map(|(_, publication)| publication.data.as_text()?.strip_prefix(name));
        assert!(own.eq(&numbers(0..EACH)), "{name}'s order is broken");
    }
}

/// What is read from a log is what was published: payload, kind, event, publisher and excluded session.
pub async fn every_field_and_data_kind_is_recorded_unchanged(backend: &dyn Backend) {
    let nodes: [Node; 2] = nodes(backend).await;
    let room = room("log-fields");
    let beginning = nodes[1].open(&room, keep(10_000)).await;
    nodes[1].subscribe(&room).await;
    let sent = every_combination();
    for publication in &sent {
        nodes[0].record(&room, publication.clone(), keep(10_000)).await;
    }
    let heard = nodes[1].heard.wait(&room, "every combination", |heard| heard.len() >= sent.len()).await;
    nodes[0].cursors(0, sent.len()).await;
    let log = nodes[1].read_all(&room, beginning, MAX_PAGE).await;
    assert_eq!((heard.len(), log.len()), (sent.len(), sent.len()));
    for ((heard, (_, recorded)), sent) in heard.iter().zip(&log).zip(&sent) {
        assert_eq!(heard, &Heard::Publication(sent.clone()));
        assert_eq!(recorded, sent);
    }
}

/// Publications with and without history in one room arrive as they were published; the log has only the former.
pub async fn recorded_and_other_publications_keep_one_order(backend: &dyn Backend) {
    const COUNT: usize = 200;
    let nodes: [Node; 2] = nodes(backend).await;
    let room = room("mixed");
    nodes[1].subscribe(&room).await;
    for number in 0..COUNT {
        let publication = Publication::new(Data::text(number.to_string()));
        if number % 3 == 0 {
            nodes[0].record(&room, publication, keep(1000)).await;
        } else {
            nodes[0].publish(&room, publication).await;
        }
    }
    let heard = nodes[1].heard.wait(&room, "all of them", |heard| heard.len() >= COUNT).await;
    assert_eq!(texts(&heard), numbers(0..COUNT));
    let mut offset = 0;
    for (number, place) in nodes[1].heard.places(&room).into_iter().enumerate() {
        assert_eq!(place.is_some(), number % 3 == 0, "{number}");
        if let Some(place) = place {
            offset += 1;
            assert_eq!(place.cursor.offset, offset);
        }
    }
    let recorded: Vec<_> = (0..COUNT).step_by(3).map(|number| number.to_string()).collect();
    assert_eq!(page_texts(&nodes[1].read(&room, ReadFrom::Last, MAX_PAGE).await), recorded);
}

/// Nothing is recorded unless that is asked for, and an id is not ignored.
pub async fn a_room_without_history_has_no_places(backend: &dyn Backend) {
    let node = node(backend).await;
    let room = room("plain");
    node.subscribe(&room).await;
    for _ in 0..3 {
        node.publish(&room, Publication::new(Data::text("x"))).await;
    }
    node.heard.wait(&room, "all of them", |heard| heard.len() >= 3).await;
    assert_eq!(node.heard.places(&room), [None; 3]);
    let settled = node.receipts.wait(3).await;
    assert!(settled.values().all(|outcomes| outcomes == &[Ok(Accepted::default())]), "{settled:?}");
    assert_eq!(node.read(&room, ReadFrom::Last, 10).await.top, None);

    let id = PublicationId::new(Owner::Backend, "1").expect("a valid id");
    let request =
        PublishRequest { id: Some(id), ..node.request(&room, Publication::new(Data::text("with an id"))) };
    bounded("room in the queue", node.broker.publish(request)).await;
    let settled = node.receipts.wait(4).await;
    assert!(matches!(settled[&4][..], [Err(BrokerError::Refused(_))]), "{settled:?}");
    assert_eq!(node.heard.of(&room).len(), 3);
}

/// What is asked of a closed broker is answered.
pub async fn a_closed_broker_reads_nothing(backend: &dyn Backend) {
    let node = node(backend).await;
    let room = room("closed");
    bounded("close", node.broker.close()).await;
    let opened = bounded("a position", node.broker.open(&room, keep(10))).await;
    assert_eq!(opened, Err(BrokerError::Closed));
    let page = bounded("a page", node.broker.read(&room, ReadFrom::Last, 10)).await;
    assert_eq!(page, Err(BrokerError::Closed));
}

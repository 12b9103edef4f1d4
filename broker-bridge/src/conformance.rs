//! The broker contract as a test suite.
//!
//! Whoever implements [`Broker`] writes a [`Backend`] and one line,
//! [`broker_conformance!`](crate::broker_conformance), and has one test per promise. The suite knows nothing
//! about how a broker works: it makes several nodes on one backend, lets them publish, and compares what each has
//! heard. Faults are not its business, for every backend fails in its own way; its tests cause them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use crate::{
    Accepted, Affinity, Broker, BrokerError, Data, DataKind, EventName, GapCause, Place, Publication,
    PublishRequest, Publisher, Receipt, ReceiptSink, RoomName, SessionId, Sink, Subscribing, Ticket,
};

pub mod history;

/// What several brokers share: a bus, a server.
pub trait Backend: Sync {
    /// A new node on this backend, up and without subscriptions.
    fn node(&self) -> BoxFuture<'_, Box<dyn Broker>>;
}

/// Writes one `#[tokio::test]` per promise of the contract, run on the [`Backend`] that the expression makes.
#[macro_export]
macro_rules! broker_conformance {
    ($backend:expr) => {
        $crate::broker_conformance! { @cases $backend;
            one_order_for_every_node
            publications_after_the_acknowledgement_arrive
            publishers_receive_their_own_publications
            every_field_and_data_kind_arrives_unchanged
            an_unsubscribed_room_delivers_nothing
            a_room_can_be_subscribed_again
            flapping_ends_in_the_state_of_the_last_call
            many_rooms_can_be_subscribed_at_once
            rooms_do_not_mix
            receipts_are_settled_once
            close_settles_receipts_and_waiters
            drop_settles_receipts_and_waiters
            a_large_payload_arrives
        }
    };
    (@cases $backend:expr; $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                $crate::conformance::$case(&$backend).await;
            }
        )*
    };
}

/// The same for the promises about [histories](crate::history).
#[macro_export]
macro_rules! broker_history_conformance {
    ($backend:expr) => {
        $crate::broker_history_conformance! { @cases $backend;
            cursors_ascend_by_one_and_receipts_carry_them
            a_page_after_any_position_is_what_was_missed
            the_last_page_ends_with_the_newest
            a_page_before_a_position_ends_right_before_it
            a_page_is_bounded
            a_trimmed_position_is_told
            an_unknown_position_is_lost
            an_empty_log_has_a_position
            a_cleared_log_goes_on
            an_id_is_recorded_once
            an_expired_log_begins_anew
            the_log_has_the_order_that_all_nodes_hear
            every_field_and_data_kind_is_recorded_unchanged
            recorded_and_other_publications_keep_one_order
            a_room_without_history_has_no_places
            a_closed_broker_reads_nothing
        }
    };
    (@cases $backend:expr; $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                $crate::conformance::history::$case(&$backend).await;
            }
        )*
    };
}

/// All nodes hear one order, and each publisher's publications keep theirs in it.
pub async fn one_order_for_every_node(backend: &dyn Backend) {
    const EACH: usize = 500;
    let nodes: [Node; 3] = nodes(backend).await;
    let room = room("order");
    for node in &nodes {
        node.subscribe(&room).await;
    }
    let publish = async |name: &str, node: &Node| {
        for number in 0..EACH {
            node.publish(&room, Publication::new(Data::text(format!("{name}{number}")))).await;
        }
    };
    tokio::join!(publish("a", &nodes[0]), publish("b", &nodes[1]));

    let order = nodes[0].heard.wait(&room, "all of both publishers", |heard| heard.len() >= 2 * EACH).await;
    for node in &nodes {
        let other = node.heard.wait(&room, "all of both publishers", |heard| heard.len() >= 2 * EACH).await;
        assert!(other == order, "the nodes heard different orders");
    }
    let order = texts(&order);
    for name in ["a", "b"] {
        let own = order.iter().filter(|text| text.starts_with(name));
        assert!(
            own.eq(&(0..EACH).map(|number| format!("{name}{number}")).collect::<Vec<_>>()),
            "{name}'s order is broken"
        );
    }
}

/// Whatever is published once `subscribe` has resolved arrives, from whichever node.
pub async fn publications_after_the_acknowledgement_arrive(backend: &dyn Backend) {
    let nodes: [Node; 2] = nodes(backend).await;
    for number in 0..50 {
        let room = room(&format!("ack:{number}"));
        nodes[0].subscribe(&room).await;
        nodes[1].publish(&room, Publication::new(Data::text("now"))).await;
        let heard = nodes[0].heard.wait(&room, "the publication", |heard| !heard.is_empty()).await;
        assert_eq!(texts(&heard), ["now"]);
    }
}

/// A node's own publications come back to it like everybody else's.
pub async fn publishers_receive_their_own_publications(backend: &dyn Backend) {
    let node = node(backend).await;
    let room = room("self");
    node.subscribe(&room).await;
    node.publish(&room, Publication::new(Data::text("echo"))).await;
    let heard = node.heard.wait(&room, "its own publication", |heard| !heard.is_empty()).await;
    assert_eq!(texts(&heard), ["echo"]);
}

/// Payload, kind and metadata arrive as they were, whatever the payload looks like.
pub async fn every_field_and_data_kind_arrives_unchanged(backend: &dyn Backend) {
    let nodes: [Node; 2] = nodes(backend).await;
    let room = room("fields");
    nodes[1].subscribe(&room).await;
    let sent = every_combination();
    for publication in &sent {
        nodes[0].publish(&room, publication.clone()).await;
    }
    let heard = nodes[1].heard.wait(&room, "every combination", |heard| heard.len() >= sent.len()).await;
    for (heard, sent) in heard.iter().zip(&sent) {
        assert_eq!(heard, &Heard::Publication(sent.clone()));
    }
    assert_eq!(heard.len(), sent.len());
}

/// Publications with every combination of fields.
fn every_combination() -> Vec<Publication> {
    let declare =
        |kind, bytes: &'static [u8]| Data::declare(kind, Bytes::from_static(bytes)).expect("the kind fits");
    let payloads = [
        declare(DataKind::Text, b""),
        declare(DataKind::Json, b"{\"a\":[1,2.50,\"\\u00e9\"]}"),
        declare(DataKind::Json, b"null"),
        declare(DataKind::Text, b"{\"only\": \"text\"}"),
        declare(DataKind::Text, "line\r\nline\0é日本".as_bytes()),
        declare(DataKind::Binary, b""),
        declare(DataKind::Binary, b"also UTF-8"),
        declare(DataKind::Binary, b"\xff\xfe\x00\r\n$5\r\n"),
        // What this project's own envelope looks like: whole, cut short, and only its first bytes.
        declare(DataKind::Binary, b"\xF5Tg\x01\x00\x03\x01\x01\x01\x00\x00\x00\x01x"),
        declare(DataKind::Binary, b"\xF5Tg\x01\x00\x03\x01\x01\x01\x00\x00\x00\x02x"),
        declare(DataKind::Binary, b"\xF5Tg"),
        declare(DataKind::Binary, b"\xF5"),
    ];
    let events = [None, Some("e"), Some("a name with spaces, é and 日本")];
    let publishers = [
        None,
        Some(Publisher { user: None, session: SessionId(u128::MAX) }),
        Some(Publisher { user: Some("u".into()), session: SessionId(0) }),
        Some(Publisher { user: Some("u".repeat(255).into()), session: SessionId(1 << 64) }),
    ];
    let mut sent = Vec::new();
    for data in payloads {
        for event in events {
            for publisher in &publishers {
                for exclude in [None, Some(SessionId(7))] {
                    let event = event.map(|event| EventName::new(event).expect("a valid name"));
                    sent.push(Publication {
                        data: data.clone(),
                        event,
                        publisher: publisher.clone(),
                        exclude,
                    });
                }
            }
        }
    }
    sent
}

/// A room that was given up falls silent, and others do not.
pub async fn an_unsubscribed_room_delivers_nothing(backend: &dyn Backend) {
    let nodes: [Node; 2] = nodes(backend).await;
    let (given_up, kept) = (room("given-up"), room("kept"));
    nodes[0].subscribe(&given_up).await;
    nodes[0].subscribe(&kept).await;
    nodes[1].subscribe(&given_up).await;
    nodes[0].unsubscribe(&given_up);
    // A few may still arrive; it is silent once ten in a row did not.
    let mut silent = 0;
    let until = Instant::now() + PATIENCE;
    while silent < 10 {
        assert!(Instant::now() < until, "the room that was given up is still heard");
        let before = nodes[0].heard.of(&given_up).len();
        let seen = nodes[1].heard.of(&given_up).len();
        nodes[1].publish(&given_up, Publication::new(Data::text("x"))).await;
        nodes[1].heard.wait(&given_up, "what the other node hears", |heard| heard.len() > seen).await;
        silent = if nodes[0].heard.of(&given_up).len() == before { silent + 1 } else { 0 };
    }
    nodes[1].publish(&kept, Publication::new(Data::text("still here"))).await;
    let heard = nodes[0].heard.wait(&kept, "the other room", |heard| !heard.is_empty()).await;
    assert_eq!(texts(&heard), ["still here"]);
}

/// A room that was given up can be wanted again, and then misses nothing and repeats nothing.
pub async fn a_room_can_be_subscribed_again(backend: &dyn Backend) {
    let node = node(backend).await;
    let room = room("again");
    for round in 0..20 {
        node.subscribe(&room).await;
        node.publish(&room, Publication::new(Data::text(round.to_string()))).await;
        let heard = node.heard.wait(&room, "this round", |heard| heard.len() > round).await;
        assert_eq!(texts(&heard), (0..=round).map(|round| round.to_string()).collect::<Vec<_>>());
        node.unsubscribe(&room);
    }
}

/// Subscribing and unsubscribing in quick turn ends as the last call says, and loses no subscription.
pub async fn flapping_ends_in_the_state_of_the_last_call(backend: &dyn Backend) {
    let node = node(backend).await;
    for number in 0..30 {
        let room = room(&format!("flap:{number}"));
        let mut last = node.ask(&room);
        for turn in 0..number {
            node.unsubscribe(&room);
            if turn % 3 == 0 {
                tokio::task::yield_now().await;
            }
            last = node.ask(&room);
        }
        bounded("the last subscription", last).await.expect("acknowledged");
        node.publish(&room, Publication::new(Data::text("here"))).await;
        let heard = node.heard.wait(&room, "a publication after flapping", |heard| !heard.is_empty()).await;
        assert_eq!(texts(&heard), ["here"]);
    }
}

/// Thousands of rooms are acknowledged and each hears its own.
pub async fn many_rooms_can_be_subscribed_at_once(backend: &dyn Backend) {
    const ROOMS: usize = 5_000;
    let nodes: [Node; 2] = nodes(backend).await;
    let rooms = (0..ROOMS).map(|number| room(&format!("many:{number}"))).collect::<Vec<_>>();
    let acknowledgements = rooms.iter().map(|room| nodes[0].ask(room)).collect::<Vec<_>>();
    for acknowledged in bounded("all acknowledgements", join_all(acknowledgements)).await {
        acknowledged.expect("acknowledged");
    }
    for room in &rooms {
        nodes[1].publish(room, Publication::new(Data::text(room.as_str()))).await;
    }
    for room in &rooms {
        let heard = nodes[0].heard.wait(room, "its own publication", |heard| !heard.is_empty()).await;
        assert_eq!(texts(&heard), [room.as_str()]);
    }
}

/// Names that resemble each other are different rooms, and patterns are plain names.
pub async fn rooms_do_not_mix(backend: &dyn Backend) {
    let node = node(backend).await;
    let rooms = ["a", "a:b", "a:*", "*", "A", "room:a", "a/b", "a?b", "[a]", "é", "e\u{301}"].map(room);
    for room in &rooms {
        node.subscribe(room).await;
    }
    for room in &rooms {
        node.publish(room, Publication::new(Data::text(room.as_str()))).await;
    }
    for room in &rooms {
        node.heard.wait(room, "its own publication", |heard| !heard.is_empty()).await;
    }
    for room in &rooms {
        assert_eq!(texts(&node.heard.of(room)), [room.as_str()]);
    }
}

/// Every receipt is settled, once, and `Ok` where nothing fails.
pub async fn receipts_are_settled_once(backend: &dyn Backend) {
    const EACH: usize = 300;
    let node = node(backend).await;
    for number in 0..EACH {
        let room = room(&format!("receipts:{}", number % 7));
        node.publish(&room, Publication::new(Data::text("x"))).await;
        let mut request = node.request(&room, Publication::new(Data::text("y")));
        while let Err(back) = node.broker.try_publish(request) {
            request = back;
            node.receipts.changed().await;
        }
    }
    let settled = node.receipts.wait(2 * EACH).await;
    assert_eq!(settled.len(), 2 * EACH);
    assert!(settled.values().all(|outcomes| outcomes == &[Ok(Accepted::default())]), "{settled:?}");
}

/// `close` settles every receipt and every waiter, and what comes after is settled as closed.
pub async fn close_settles_receipts_and_waiters(backend: &dyn Backend) {
    const BEFORE: usize = 200;
    let nodes: [Node; 2] = nodes(backend).await;
    let room = room("close");
    nodes[1].subscribe(&room).await;
    for _ in 0..BEFORE {
        nodes[0].publish(&room, Publication::new(Data::text("before"))).await;
    }
    bounded("close", nodes[0].broker.close()).await;
    let settled = nodes[0].receipts.wait(BEFORE).await;
    assert!(
        settled.values().all(|outcomes| outcomes == &[Ok(Accepted::default())]),
        "what was queued is flushed: {settled:?}"
    );
    assert_eq!(
        nodes[1].heard.wait(&room, "what was flushed", |heard| heard.len() >= BEFORE).await.len(),
        BEFORE
    );

    assert_eq!(*nodes[0].broker.status().borrow(), crate::BrokerStatus::Closed);
    let late = bounded("a late subscription", nodes[0].ask(&room)).await;
    assert_eq!(late, Err(BrokerError::Closed));
    nodes[0].unsubscribe(&room);
    nodes[0].publish(&room, Publication::new(Data::text("late"))).await;
    let taken = nodes[0].broker.try_publish(nodes[0].request(&room, Publication::new(Data::text("late"))));
    assert!(taken.is_ok(), "a closed broker settles instead of giving back");
    let settled = nodes[0].receipts.wait(BEFORE + 2).await;
    let late = settled.values().filter(|outcomes| *outcomes == &[Err(BrokerError::Closed)]).count();
    assert_eq!(late, 2, "{settled:?}");
    bounded("close again", nodes[0].broker.close()).await;
}

/// A broker that is dropped settles every receipt too, with whatever is true.
pub async fn drop_settles_receipts_and_waiters(backend: &dyn Backend) {
    const BEFORE: usize = 200;
    let Node { broker, receipts, heard } = node(backend).await;
    let room = room("drop");
    let mut asked = 0;
    for _ in 0..BEFORE {
        let request = receipts.request(&room, Publication::new(Data::text("x")));
        asked += 1;
        // Given back or taken: either way its receipt is settled when it is dropped.
        drop(broker.try_publish(request));
    }
    let waiting = broker.subscribe(&room, heard.sink(&room), Affinity(0));
    drop(broker);
    let settled = receipts.wait(asked).await;
    assert!(settled.values().all(|outcomes| outcomes.len() == 1), "{settled:?}");
    let waited = bounded("a subscription of a dropped broker", waiting).await;
    assert!(matches!(waited, Ok(()) | Err(BrokerError::Closed)), "{waited:?}");
}

/// A payload of a mebibyte arrives whole, and so do its neighbours.
pub async fn a_large_payload_arrives(backend: &dyn Backend) {
    let nodes: [Node; 2] = nodes(backend).await;
    let room = room("large");
    nodes[1].subscribe(&room).await;
    let large = (0..1024 * 1024_u32).map(|number| number.to_le_bytes()[1]).collect::<Vec<_>>();
    let sent = [Data::text("before"), Data::binary(large), Data::text("after")].map(Publication::new);
    for publication in &sent {
        nodes[0].publish(&room, publication.clone()).await;
    }
    let heard = nodes[1].heard.wait(&room, "all three", |heard| heard.len() >= 3).await;
    // Not `assert_eq`: nobody reads a mebibyte.
    assert!(heard.iter().zip(&sent).all(|(heard, sent)| heard == &Heard::Publication(sent.clone())));
}

/// How long anything may take before the suite gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What a sink has been told about a room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A publication.
    Publication(Publication),
    /// A gap.
    Gap(GapCause),
}

/// Remembers what the sinks of a node's rooms are told.
#[derive(Debug, Default)]
pub struct Recorder {
    rooms: Mutex<BTreeMap<RoomName, Told>>,
    changed: Notify,
}

/// What a sink has been told.
#[derive(Debug, Default)]
struct Told {
    heard: Vec<Heard>,
    /// The places of the publications in `heard`.
    places: Vec<Option<Place>>,
}

impl Recorder {
    /// What has been heard in `room` so far.
    pub fn of(&self, room: &RoomName) -> Vec<Heard> {
        self.rooms.lock().get(room).map(|told| told.heard.clone()).unwrap_or_default()
    }

    /// The places of the publications that have been heard in `room` so far.
    pub fn places(&self, room: &RoomName) -> Vec<Option<Place>> {
        self.rooms.lock().get(room).map(|told| told.places.clone()).unwrap_or_default()
    }

    /// Waits until what has been heard in `room` is as it should be.
    ///
    /// # Panics
    ///
    /// After [`PATIENCE`], with what has been heard.
    pub async fn wait(&self, room: &RoomName, what: &str, done: impl Fn(&[Heard]) -> bool) -> Vec<Heard> {
        let until = Instant::now() + PATIENCE;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let heard = self.of(room);
            if done(&heard) {
                return heard;
            }
            assert!(
                timeout_at(until, changed).await.is_ok(),
                "{room}: {what} did not come; heard {} so far, the last being {:.300?}",
                heard.len(),
                heard.last(),
            );
        }
    }

    /// The sink of a room.
    pub fn sink(self: &Arc<Self>, room: &RoomName) -> Arc<dyn Sink> {
        Arc::new(RoomRecorder { recorder: Arc::clone(self), room: room.clone() })
    }

    fn hear(&self, room: &RoomName, hear: impl FnOnce(&mut Told)) {
        hear(self.rooms.lock().entry(room.clone()).or_default());
        self.changed.notify_waiters();
    }
}

/// The sink of one room.
struct RoomRecorder {
    recorder: Arc<Recorder>,
    room: RoomName,
}

impl Sink for RoomRecorder {
    fn publication(&self, publication: Publication, place: Option<Place>) {
        self.recorder.hear(&self.room, |told| {
            told.heard.push(Heard::Publication(publication));
            told.places.push(place);
        });
    }

    fn gap(&self, cause: GapCause) {
        self.recorder.hear(&self.room, |told| told.heard.push(Heard::Gap(cause)));
    }
}

/// Outcomes by ticket: a list each, so that settling twice is seen.
pub type Outcomes = BTreeMap<u64, Vec<Result<Accepted, BrokerError>>>;

/// A receipt sink that remembers.
#[derive(Debug, Default)]
pub struct Receipts {
    state: Mutex<(u64, Outcomes)>,
    changed: Notify,
}

impl Receipts {
    /// A request whose receipt reports here, under the next ticket: 1, 2, 3…
    pub fn request(self: &Arc<Self>, room: &RoomName, publication: Publication) -> PublishRequest {
        let ticket = {
            let mut state = self.state.lock();
            state.0 += 1;
            Ticket { owner: 0, request: state.0 }
        };
        let sink: Arc<dyn ReceiptSink> = Arc::clone(self) as _;
        let receipt = Receipt::new(sink, ticket);
        PublishRequest {
            room: room.clone(),
            publication,
            history: None,
            id: None,
            affinity: affinity_of(room),
            receipt,
        }
    }

    /// What has been settled so far.
    pub fn settled(&self) -> Outcomes {
        self.state.lock().1.clone()
    }

    /// Waits until `count` receipts are settled.
    ///
    /// # Panics
    ///
    /// After [`PATIENCE`], with how many there are.
    pub async fn wait(&self, count: usize) -> Outcomes {
        let until = Instant::now() + PATIENCE;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let settled = self.settled();
            if settled.len() >= count {
                return settled;
            }
            let kinds = settled.values().map(|outcomes| format!("{outcomes:?}")).collect::<BTreeSet<_>>();
            assert!(
                timeout_at(until, changed).await.is_ok(),
                "only {} of {count} receipts are settled: {kinds:?}",
                settled.len()
            );
        }
    }

    async fn changed(&self) {
        drop(
            bounded("a receipt", async {
                let before = self.settled().len();
                self.wait(before + 1).await
            })
            .await,
        );
    }
}

impl ReceiptSink for Receipts {
    fn settle(&self, ticket: Ticket, outcome: Result<Accepted, BrokerError>) {
        self.state.lock().1.entry(ticket.request).or_default().push(outcome);
        self.changed.notify_waiters();
    }
}

struct Node {
    broker: Box<dyn Broker>,
    heard: Arc<Recorder>,
    receipts: Arc<Receipts>,
}

impl Node {
    fn ask(&self, room: &RoomName) -> Subscribing {
        self.broker.subscribe(room, self.heard.sink(room), affinity_of(room))
    }

    async fn subscribe(&self, room: &RoomName) {
        bounded("an acknowledgement", self.ask(room)).await.expect("acknowledged");
    }

    fn unsubscribe(&self, room: &RoomName) {
        self.broker.unsubscribe(room, affinity_of(room));
    }

    async fn publish(&self, room: &RoomName, publication: Publication) {
        bounded("room in the queue", self.broker.publish(self.request(room, publication))).await;
    }

    fn request(&self, room: &RoomName, publication: Publication) -> PublishRequest {
        self.receipts.request(room, publication)
    }
}

async fn node(backend: &dyn Backend) -> Node {
    let broker = bounded("a node", backend.node()).await;
    Node { broker, heard: Arc::default(), receipts: Arc::default() }
}

async fn nodes<const N: usize>(backend: &dyn Backend) -> [Node; N] {
    let nodes = join_all((0..N).map(|_| node(backend))).await;
    nodes.try_into().unwrap_or_else(|_| unreachable!("as many as were asked for"))
}

fn room(name: &str) -> RoomName {
    RoomName::new(name).expect("a valid room name")
}

/// Spreads rooms over affinities, always in the same way.
pub fn affinity_of(room: &RoomName) -> Affinity {
    Affinity(room.as_str().bytes().map(usize::from).sum())
}

/// The texts of the publications; panics on anything else, so a gap where none belongs is seen.
fn texts(heard: &[Heard]) -> Vec<String> {
    let text = |heard: &Heard| match heard {
        Heard::Publication(publication) => publication.data.as_text().map(str::to_owned),
        Heard::Gap(_) => None,
    };
    heard.iter().map(|heard| text(heard).unwrap_or_else(|| panic!("not a text: {heard:?}"))).collect()
}

async fn bounded<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout_at(Instant::now() + PATIENCE, future).await {
        Ok(value) => value,
        Err(late) => panic!("{what} did not come: {late} ({PATIENCE:?})"),
    }
}

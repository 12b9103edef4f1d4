//! The rooms of this node: which shards have members, and the node's interest in each room's topic.
//!
//! The hub knows neither sockets nor payloads. Each room is the broker's [`Sink`] for its topic: it posts to the inboxes
//! of the shards that have members. Shards call [`Hub`] when sessions join and leave.
//!
//! # Affinity
//!
//! A room is received by the thread of the shard that its first member is on ([`Affinity`]), for as long as the node's
//! interest lasts. If the last member leaves and the room is forgotten, a later member begins a new room, with a sink of
//! its own and maybe by another thread. What the old subscription still receives goes to the old sink, which has no
//! members: so nobody hears a publication twice.
//!
//! # Locks
//!
//! Rooms are split into stripes, each behind its own mutex. A stripe is locked for map operations, and while
//! the broker registers or releases interest (which never blocks): so the broker sees a room's last leave and
//! next join in the order in which they happened. Nothing is posted to a shard while a lock is held, and a publication
//! locks its room only.

use std::{
    collections::{HashMap, VecDeque},
    hash::BuildHasher,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use broker_bridge::{
    Affinity, Broker, BrokerError, Cursor, GapCause, Place, Publication, Retention, RoomName, Sink,
    Subscribing,
};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use smallvec::SmallVec;

use crate::{
    budget::{Budget, Consumer},
    clock::Time,
    framing::{Broadcast, Places},
    history::Beginning,
    shrink,
};

pub mod log;
mod metrics;
mod recorded;
mod silence;
mod warnings;

use self::recorded::{Recorded, Repairs};
use self::silence::Silence;
use self::warnings::Warnings;
pub use self::{
    metrics::HubMetrics,
    recorded::{Begin, Joined, Piece, Repair},
};

/// How long the node keeps its interest in a room after its last session has left, so a page reload does not
/// cost an UNSUBSCRIBE and a SUBSCRIBE.
const LINGER: Duration = Duration::from_secs(1);
/// The same for a room with a history. Clients that come back within that time, such as from a node that was replaced,
/// find what they have missed in memory.
const LINGER_RECORDED: Duration = Duration::from_secs(30);
/// How many rooms with a history linger for so long. Beyond that, the oldest are forgotten.
const MOST_LINGERING: usize = 10_000;
const STRIPES: usize = 64;

/// Where the hub posts events for the rooms of a shard.
pub trait Mailbox: Send + Sync {
    /// Posts a broadcast. Returns whether there was space for it; if not, that has been posted in its place.
    fn post_broadcast(&self, broadcast: &Arc<Broadcast>) -> bool;

    /// Posts that the positions of a room have another epoch from the item with this number on.
    fn post_new_epoch(&self, room: &RoomName, number: u64);

    /// Posts that publications of a room may be missing. In a room with a history the gap has a number, otherwise 0.
    fn post_gap(&self, room: &RoomName, cause: GapCause, number: u64);
}

/// The interface for shards when sessions join and leave rooms.
pub struct Hub {
    stripes: Box<[Stripe]>,
    hasher: foldhash::fast::RandomState,
    fan_out: Arc<FanOut>,
    broker: Arc<dyn Broker>,
    /// Rooms without a session, oldest first: those without a history, and those with one. At most one entry per room.
    lingering: [Mutex<VecDeque<(Instant, RoomName)>>; 2],
    /// Rooms with a history, to be checked now and then.
    silence: Silence,
}

type Stripe = Mutex<HashMap<RoomName, Interest, foldhash::fast::RandomState>>;

/// The node's interest in a room.
struct Interest {
    room: Arc<Room>,
    /// That of the shard of the first member.
    affinity: Affinity,
    /// Whether the room has an entry in [`Hub::lingering`].
    lingering: bool,
    /// When the last member left.
    left: Instant,
}

impl Hub {
    /// A hub without rooms.
    pub fn new(fan_out: FanOut, broker: Arc<dyn Broker>) -> Self {
        let hasher = foldhash::fast::RandomState::default();
        let stripes = (0..STRIPES).map(|_| Mutex::new(HashMap::with_hasher(hasher.clone()))).collect();
        let silence = Silence::new(fan_out.time.now());
        Self { stripes, hasher, fan_out: Arc::new(fan_out), broker, lingering: Default::default(), silence }
    }

    /// Adds a session of `shard` to `room`. Resolves when the broker has acknowledged the node's interest, and if the room
    /// has a history, once it is known where the session begins.
    /// Every [`join`](Self::join) needs one [`leave`](Self::leave), even if the future is dropped or fails.
    ///
    /// Whether a room has a history is decided by who joins it first, for as long as the node's interest lasts.
    pub fn join(
        &self,
        room: &RoomName,
        shard: usize,
        history: Option<Retention>,
        beginning: impl Into<Beginning>,
    ) -> Joining {
        let beginning = beginning.into();
        let mut rooms = self.stripe(room.as_str()).lock();
        let mut lingering = false;
        if let Some(interest) = rooms.get(room)
            && interest.room.is_empty()
            && interest.room.recorded.as_deref().map(Recorded::retention) != history
        {
            // Nobody is left who began under the old policy.
            self.broker.unsubscribe(room, interest.affinity);
            self.fan_out.metrics.rooms.dec();
            lingering = interest.lingering;
            rooms.remove(room);
        }
        let interest = rooms.entry(room.clone()).or_insert_with(|| {
            self.fan_out.metrics.rooms.inc();
            let recorded = history.map(|retention| {
                Box::new(Recorded::new(Arc::clone(&self.broker), retention, self.fan_out.time.now()))
            });
            let room = Room::new(room.clone(), Arc::clone(&self.fan_out), recorded);
            if room.recorded.is_some() {
                self.silence.watch(&room);
            }
            Interest { room, affinity: Affinity(shard), lingering, left: self.fan_out.time.now() }
        });
        interest.room.enter(shard);
        let known = Arc::clone(&interest.room);
        let subscribing = self.broker.subscribe(room, Arc::clone(&known) as _, interest.affinity);
        drop(rooms);
        match known.recorded {
            None => Joining::Live(subscribing, history.map(|_| Begin::without_history(beginning.since()))),
            Some(_) => Joining::Recorded(Recorded::join(known, subscribing, beginning)),
        }
    }

    /// Items of a room with a history, from number `from` on, of about this many bytes. `None` if it has none.
    pub fn piece(&self, room: &RoomName, from: u64, bytes: usize) -> Option<Piece> {
        let room = Arc::clone(&self.stripe(room.as_str()).lock().get(room)?.room);
        Some(room.recorded.as_ref()?.piece(&room, from, bytes))
    }

    /// The last position before item `number` of a room with a history, if it is known.
    pub fn position_before(&self, room: &RoomName, number: u64) -> Option<Cursor> {
        let room = Arc::clone(&self.stripe(room.as_str()).lock().get(room)?.room);
        room.recorded.as_ref()?.position_before(number)
    }

    /// Finds out where a member of a room with a history continues that has received everything up to `cursor`. `None` if
    /// the room has none.
    pub fn resume(
        &self,
        room: &RoomName,
        cursor: Cursor,
    ) -> Option<BoxFuture<'static, Result<Begin, BrokerError>>> {
        let room = Arc::clone(&self.stripe(room.as_str()).lock().get(room)?.room);
        room.recorded.as_ref()?;
        Some(Box::pin(async move {
            match &room.recorded {
                Some(recorded) => recorded.resume(&room, cursor).await,
                None => Ok(Begin::without_history(Some(cursor))),
            }
        }))
    }

    /// Takes the next thing that has to be read from a room's log, once there is one.
    pub async fn next_repair(&self) -> Repair {
        self.fan_out.repairs.next().await
    }

    /// Notes where `shard` has `room`, which a session of it has joined: every [`Broadcast`] then says so
    /// ([`Broadcast::place`]), and the shard need not look for the room by its name.
    pub fn locate(&self, room: &RoomName, shard: usize, place: u64) {
        if let Some(interest) = self.stripe(room.as_str()).lock().get(room)
            && let Some(members) = interest.room.members.lock().get_mut(shard)
        {
            members.place = place;
        }
    }

    /// Removes a session of `shard` from `room`.
    pub fn leave(&self, room: &RoomName, shard: usize) {
        let mut rooms = self.stripe(room.as_str()).lock();
        let Some(interest) = rooms.get_mut(room) else {
            debug_assert!(false, "left a room that nobody had joined");
            return;
        };
        if !interest.room.exit(shard) {
            return;
        }
        interest.left = self.fan_out.time.now();
        if !interest.lingering {
            interest.lingering = true;
            let left = interest.left;
            let [live, recorded] = &self.lingering;
            let queue = if interest.room.recorded.is_some() { recorded } else { live };
            drop(rooms);
            queue.lock().push_back((left, room.clone()));
        }
    }

    /// How often to [forget rooms](Self::forget_rooms).
    pub const STEP: Duration = LINGER.checked_div(4).expect("not by zero");

    /// Releases interest in rooms that have been without a session for a moment, and checks those in which nothing has
    /// arrived for a while.
    pub fn forget_rooms(&self) {
        if self.fan_out.history_bytes() > RINGS / 4 * 3 || self.fan_out.budget.is_short() {
            self.shrink_rings();
        }
        for room in self.fan_out.take_encoded() {
            room.recorded.iter().for_each(|recorded| recorded.forget_frames());
        }
        let now = self.fan_out.time.now();
        self.silence.check(now);
        let [live, recorded] = &self.lingering;
        self.forget(live, LINGER, usize::MAX, now);
        self.forget(recorded, LINGER_RECORDED, MOST_LINGERING, now);
    }

    /// Forgets rooms that have been in this queue for so long, and the oldest if there are too many.
    fn forget(
        &self,
        queue: &Mutex<VecDeque<(Instant, RoomName)>>,
        after: Duration,
        most: usize,
        now: Instant,
    ) {
        loop {
            let next = {
                let mut lingering = queue.lock();
                let is_full = lingering.len() > most;
                match lingering.front() {
                    Some((left, _)) if is_full || now.duration_since(*left) >= after => {
                        let next = lingering.pop_front();
                        shrink::queue(&mut lingering);
                        next.map(|(_, room)| (room, is_full))
                    }
                    _ => None,
                }
            };
            let Some((room, is_full)) = next else { return };
            let mut rooms = self.stripe(room.as_str()).lock();
            let Some(interest) = rooms.get_mut(&room) else { continue };
            if interest.room.is_empty() && !is_full && now.duration_since(interest.left) < after {
                // Somebody was here again since.
                let left = interest.left;
                drop(rooms);
                queue.lock().push_back((left, room));
                continue;
            }
            interest.lingering = false;
            if interest.room.is_empty() {
                let affinity = interest.affinity;
                rooms.remove(&room);
                shrink::map(&mut *rooms);
                self.fan_out.metrics.rooms.dec();
                // With the stripe locked, so a subsequent join reaches the broker after this.
                self.broker.unsubscribe(&room, affinity);
            }
        }
    }

    /// Empties rings until they hold half of what they may, or do: first those in which nothing has arrived and for which
    /// nobody has come for the longest time.
    fn shrink_rings(&self) {
        let most = self.fan_out.history_bytes().min(RINGS) / 2;
        let mut rooms = self.silence.rooms();
        // Sorted by name as well, for a simulation that can be repeated.
        rooms.sort_by_cached_key(|room| (room.recorded.as_deref().map(Recorded::used), room.name.clone()));
        for recorded in rooms.iter().filter_map(|room| room.recorded.as_deref()) {
            if self.fan_out.history_bytes() <= most {
                return;
            }
            recorded.shrink(&self.fan_out);
        }
    }

    #[expect(clippy::indexing_slicing, reason = "reduced modulo the number of stripes")]
    fn stripe(&self, room: &str) -> &Stripe {
        // The map uses the low and high bits of the same hash, so use bits from the middle.
        let hash = self.hasher.hash_one(room) >> 24;
        &self.stripes[usize::try_from(hash % STRIPES as u64).expect("below the number of stripes")]
    }
}

/// The way to the shards, which all rooms share.
pub struct FanOut {
    mailboxes: Box<[Arc<dyn Mailbox>]>,
    metrics: Arc<HubMetrics>,
    budget: Arc<Budget>,
    time: Time,
    repairs: Repairs,
    warnings: Warnings,
    /// What all rings hold, in bytes.
    history: AtomicUsize,
    /// What waits for readings of logs in all rooms, in bytes.
    waiting: AtomicUsize,
    /// Rooms with publications in their rings that somebody who catches up has had encoded.
    encoded: Mutex<Vec<Weak<Room>>>,
}

/// What the rings of all rooms may hold together, in bytes.
const RINGS: usize = 64 * 1024 * 1024;
/// What may wait for readings of logs in all rooms together, in bytes.
const WAITING: usize = 64 * 1024 * 1024;

impl FanOut {
    /// A fan-out to these shards.
    pub fn new(
        mailboxes: Box<[Arc<dyn Mailbox>]>,
        metrics: Arc<HubMetrics>,
        budget: Arc<Budget>,
        time: Time,
    ) -> Self {
        Self {
            mailboxes,
            metrics,
            budget,
            time,
            repairs: Repairs::default(),
            warnings: Warnings::default(),
            history: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            encoded: Mutex::default(),
        }
    }

    fn take_encoded(&self) -> Vec<Arc<Room>> {
        std::mem::take(&mut *self.encoded.lock()).iter().filter_map(Weak::upgrade).collect()
    }

    fn history_bytes(&self) -> usize {
        self.history.load(Ordering::Relaxed)
    }

    /// A ring holds so many bytes, and held so many before.
    fn add_history(&self, now: usize, before: usize) {
        // Wraps around where it has shrunk.
        self.history.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
    }

    /// So many bytes wait in a room, and so many did before. Returns whether too many do in all rooms.
    fn add_waiting(&self, now: usize, before: usize) -> bool {
        let added = now.wrapping_sub(before);
        self.waiting.fetch_add(added, Ordering::Relaxed).wrapping_add(added) > WAITING
    }

    fn mailboxes(&self, shards: ShardSet) -> impl Iterator<Item = &dyn Mailbox> {
        self.mailboxes
            .iter()
            .enumerate()
            .filter(move |(shard, _)| shards.contains(*shard))
            .map(|(_, mailbox)| &**mailbox)
    }
}

/// A room with members on this node. Posts what arrives to the shards that have them; never blocks.
struct Room {
    name: RoomName,
    this: Weak<Self>,
    /// By shard.
    members: Mutex<SmallVec<[Members; 2]>>,
    fan_out: Arc<FanOut>,
    /// Set if it has a history.
    recorded: Option<Box<Recorded>>,
}

/// The members of a room on one shard.
#[derive(Clone, Copy, Default)]
struct Members {
    count: u32,
    /// Where the shard has the room, by its own account.
    place: u64,
}

impl Room {
    fn new(name: RoomName, fan_out: Arc<FanOut>, recorded: Option<Box<Recorded>>) -> Arc<Self> {
        let members = Mutex::new(SmallVec::from_elem(Members::default(), fan_out.mailboxes.len()));
        Arc::new_cyclic(|this| Self { name, this: Weak::clone(this), members, fan_out, recorded })
    }

    fn enter(&self, shard: usize) {
        if let Some(members) = self.members.lock().get_mut(shard) {
            members.count += 1;
        }
    }

    /// Returns whether nobody is left.
    fn exit(&self, shard: usize) -> bool {
        let mut members = self.members.lock();
        if let Some(members) = members.get_mut(shard) {
            debug_assert!(members.count > 0, "more sessions left than came");
            members.count = members.count.saturating_sub(1);
        }
        members.iter().all(|members| members.count == 0)
    }

    fn is_empty(&self) -> bool {
        self.members.lock().iter().all(|members| members.count == 0)
    }

    /// The shards with members, and where they have the room.
    fn shards(&self) -> (ShardSet, Places) {
        let mut shards = ShardSet::default();
        let members = self.members.lock();
        for (shard, _) in members.iter().enumerate().filter(|(_, members)| members.count > 0) {
            shards.insert(shard);
        }
        (shards, members.iter().map(|members| members.place).collect())
    }
}

impl Room {
    /// Posts a broadcast to the shards that have members.
    fn post_broadcast(&self, broadcast: &Arc<Broadcast>, shards: ShardSet) {
        let fan_out = &self.fan_out;
        fan_out.metrics.publications.inc();
        for mailbox in fan_out.mailboxes(shards) {
            if !mailbox.post_broadcast(broadcast) {
                fan_out.metrics.inbox_overflows.inc();
                if self.recorded.is_none() {
                    fan_out.metrics.gap(GapCause::Overflow);
                }
                broadcast.written();
            }
        }
    }

    /// Posts a gap to the shards that have members.
    fn post_gap(&self, cause: GapCause, number: u64) {
        let (shards, _) = self.shards();
        if shards.len() > 0 {
            self.fan_out.metrics.gap(cause);
        }
        for mailbox in self.fan_out.mailboxes(shards) {
            mailbox.post_gap(&self.name, cause, number);
        }
    }
}

impl Sink for Room {
    fn publication(&self, publication: Publication, place: Option<Place>) {
        if let Some(recorded) = &self.recorded {
            return recorded.arrived(self, publication, place);
        }
        let (shards, places) = self.shards();
        let count = shards.len();
        if count == 0 {
            return; // Lingering interest: there are no members to deliver to.
        }
        let broadcast = Broadcast::new(self.name.clone(), publication, count)
            .at(places)
            .received_at(self.fan_out.time.now())
            .counted(&self.fan_out.budget, Consumer::Inbox);
        self.post_broadcast(&Arc::new(broadcast), shards);
    }

    fn gap(&self, cause: GapCause) {
        match &self.recorded {
            Some(recorded) => recorded.change(self, |log, now, out| log.interrupted(cause, now, out)),
            None => self.post_gap(cause, 0),
        }
    }
}

/// Resolves when a session has joined a room, see [`Hub::join`].
pub enum Joining {
    /// A room without a history, and where the session begins if it expects one.
    Live(Subscribing, Option<Begin>),
    /// A room with one.
    Recorded(BoxFuture<'static, Result<Joined, BrokerError>>),
}

impl Future for Joining {
    type Output = Result<Joined, BrokerError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Live(subscribing, begin) => {
                subscribing.as_mut().poll(cx).map_ok(|()| Joined { begin: *begin })
            }
            Self::Recorded(joining) => joining.as_mut().poll(cx),
        }
    }
}

/// A set of shards, copied out of a stripe so posting needs no lock.
#[derive(Clone, Copy, Default)]
struct ShardSet([u64; Self::WORDS]);

impl ShardSet {
    /// Enough for the 256 shards that the configuration allows.
    const WORDS: usize = 4;

    fn insert(&mut self, shard: usize) {
        if let Some(word) = self.0.get_mut(shard / 64) {
            *word |= 1 << (shard % 64);
        }
    }

    fn contains(&self, shard: usize) -> bool {
        self.0.get(shard / 64).is_some_and(|word| word & (1 << (shard % 64)) != 0)
    }

    fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use broker_bridge::{
        Data, PublishRequest, Receipt,
        history::ReadFrom,
        memory::{MemoryBroker, MemoryBus},
    };
    use prometheus::Registry;

    use super::*;
    use crate::shard::{Inbox, ShardEvent};

    struct Bench {
        hub: Hub,
        inboxes: Box<[Arc<Inbox>]>,
        broker: Arc<dyn Broker>,
        time: Time,
    }

    impl Bench {
        fn new(shards: usize) -> Self {
            Self::on(shards, Arc::new(MemoryBroker::new(&MemoryBus::new())))
        }

        fn on(shards: usize, broker: Arc<dyn Broker>) -> Self {
            let registry = Registry::new();
            let time = Time::manual();
            let metrics = Arc::new(HubMetrics::register(&registry).unwrap());
            let inboxes: Box<[_]> = (0..shards).map(|_| Arc::new(Inbox::new(1 << 20))).collect();
            let budget = Budget::register(&registry, shards).unwrap();
            let mailboxes = inboxes.iter().map(|inbox| Arc::clone(inbox) as Arc<dyn Mailbox>).collect();
            let fan_out = FanOut::new(mailboxes, metrics, budget, time.clone());
            Self { hub: Hub::new(fan_out, Arc::clone(&broker)), inboxes, broker, time }
        }

        async fn join(&self, name: &str, shard: usize) {
            self.hub.join(&room(name), shard, None, Beginning::Live).await.unwrap();
        }

        fn publish(&self, name: &str, text: &str) {
            self.publish_as(name, text, None);
        }

        fn record(&self, name: &str, text: &str) {
            self.publish_as(name, text, Some(KEEP));
        }

        fn publish_as(&self, name: &str, text: &str, history: Option<Retention>) {
            let request = PublishRequest {
                room: room(name),
                publication: Publication::new(Data::text(text)),
                history,
                id: None,
                affinity: Affinity(0),
                receipt: Receipt::ignored(),
            };
            self.broker.try_publish(request).unwrap();
        }

        /// What has been posted to each shard, by room.
        fn posted(&self) -> Vec<Vec<String>> {
            let names = |inbox: &Arc<Inbox>| {
                let mut events = VecDeque::new();
                inbox.take(&mut events, 0);
                let name = |event: &ShardEvent| match event {
                    ShardEvent::Broadcast(broadcast) => broadcast.room().to_string(),
                    other => format!("{other:?}"),
                };
                events.iter().map(name).collect()
            };
            self.inboxes.iter().map(names).collect()
        }

        fn forget_rooms_after(&self, time: Duration) {
            self.time.advance(time);
            self.hub.forget_rooms();
        }

        fn lingering(&self) -> usize {
            self.hub.lingering.iter().map(|queue| queue.lock().len()).sum()
        }

        fn rooms(&self) -> i64 {
            self.hub.fan_out.metrics.rooms.get()
        }
    }

    fn room(name: &str) -> RoomName {
        RoomName::new(name).unwrap()
    }

    #[tokio::test]
    async fn only_shards_with_members_are_posted_to() {
        let bench = Bench::new(70);
        bench.join("a", 0).await;
        bench.join("a", 69).await;
        bench.join("b", 69).await;
        for name in ["a", "b", "c"] {
            bench.publish(name, "hi");
        }
        let posted = bench.posted();
        assert_eq!((&posted[0], &posted[69]), (&vec!["a".to_owned()], &vec!["a".to_owned(), "b".to_owned()]));
        assert!(posted[1..69].iter().all(Vec::is_empty));

        bench.hub.leave(&room("a"), 0);
        bench.publish("a", "again");
        assert_eq!(bench.posted()[0], Vec::<String>::new());
    }

    #[tokio::test]
    async fn interest_outlives_the_last_session_for_a_moment() {
        let bench = Bench::new(1);
        bench.join("a", 0).await;
        bench.hub.leave(&room("a"), 0);
        bench.forget_rooms_after(LINGER / 2);
        assert_eq!(bench.rooms(), 1);

        // A session that returns in time finds the interest still alive.
        bench.join("a", 0).await;
        bench.forget_rooms_after(LINGER * 2);
        assert_eq!(bench.rooms(), 1);
        bench.publish("a", "hi");
        assert_eq!(bench.posted(), [["a"]]);

        bench.hub.leave(&room("a"), 0);
        bench.forget_rooms_after(LINGER);
        assert_eq!((bench.rooms(), bench.lingering()), (0, 0));
    }

    #[tokio::test]
    async fn rooms_that_are_forgotten_leave_no_memory_behind() {
        const ROOMS: usize = 20_000;
        let bench = Bench::new(1);
        let capacity = |bench: &Bench| {
            let stripes = bench.hub.stripes.iter();
            stripes.map(|stripe| stripe.lock().capacity()).sum::<usize>()
                + bench.hub.lingering.iter().map(|queue| queue.lock().capacity()).sum::<usize>()
        };
        for name in 0..ROOMS {
            bench.join(&name.to_string(), 0).await;
        }
        for name in 0..ROOMS {
            bench.hub.leave(&room(&name.to_string()), 0);
        }
        assert!(capacity(&bench) >= 2 * ROOMS);
        bench.forget_rooms_after(LINGER);
        assert_eq!(bench.rooms(), 0);
        assert!(capacity(&bench) <= (STRIPES + 1) * 64, "{} places are kept", capacity(&bench));
    }

    #[tokio::test]
    async fn a_room_lingers_from_when_its_last_member_has_left() {
        let bench = Bench::new(1);
        for pause in [Duration::ZERO, LINGER * 3 / 4] {
            bench.join("a", 0).await;
            bench.time.advance(pause);
            bench.hub.leave(&room("a"), 0);
        }
        bench.forget_rooms_after(LINGER / 2);
        assert_eq!((bench.rooms(), bench.lingering()), (1, 1));
        bench.forget_rooms_after(LINGER / 2);
        assert_eq!((bench.rooms(), bench.lingering()), (0, 0));
    }

    #[tokio::test]
    async fn a_flapping_room_waits_in_line_once() {
        let bench = Bench::new(1);
        for _ in 0..1000 {
            bench.join("a", 0).await;
            bench.hub.leave(&room("a"), 0);
        }
        assert_eq!(bench.lingering(), 1);
    }

    const KEEP: Retention = Retention { size: std::num::NonZeroU32::new(100).unwrap(), ttl: None };

    /// A broker that loses publications on their way to the node, and nobody notices.
    struct Lossy {
        broker: MemoryBroker,
        loses: Arc<AtomicBool>,
        reads: AtomicUsize,
    }

    struct LossySink(Arc<dyn Sink>, Arc<AtomicBool>);

    impl Sink for LossySink {
        fn publication(&self, publication: Publication, place: Option<Place>) {
            if !self.1.load(Ordering::Relaxed) {
                self.0.publication(publication, place);
            }
        }

        fn gap(&self, cause: GapCause) {
            self.0.gap(cause);
        }
    }

    impl Broker for Lossy {
        fn subscribe(&self, room: &RoomName, sink: Arc<dyn Sink>, affinity: Affinity) -> Subscribing {
            self.broker.subscribe(room, Arc::new(LossySink(sink, Arc::clone(&self.loses))), affinity)
        }

        fn unsubscribe(&self, room: &RoomName, affinity: Affinity) {
            self.broker.unsubscribe(room, affinity);
        }

        fn try_publish(&self, request: PublishRequest) -> Result<(), PublishRequest> {
            self.broker.try_publish(request)
        }

        fn publish(&self, request: PublishRequest) -> BoxFuture<'_, ()> {
            self.broker.publish(request)
        }

        fn open(&self, room: &RoomName, retention: Retention) -> broker_bridge::Positioning {
            self.broker.open(room, retention)
        }

        fn read(&self, room: &RoomName, from: ReadFrom, limit: usize) -> broker_bridge::Reading {
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.broker.read(room, from, limit)
        }

        fn status(&self) -> tokio::sync::watch::Receiver<broker_bridge::BrokerStatus> {
            self.broker.status()
        }

        fn close(&self) -> BoxFuture<'_, ()> {
            self.broker.close()
        }
    }

    /// Time passes, with all that is due in it.
    async fn pass(bench: &Bench, time: Duration) {
        let until = bench.time.now() + time;
        while bench.time.now() < until {
            bench.forget_rooms_after(Hub::STEP);
            while let Some(repair) = futures_util::FutureExt::now_or_never(bench.hub.next_repair()) {
                repair.attempt().await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn the_last_publication_that_was_lost_in_a_silent_room_is_delivered_within_ninety_seconds() {
        let loses = Arc::new(AtomicBool::new(false));
        let broker = MemoryBroker::new(&MemoryBus::new());
        let lossy = Arc::new(Lossy { broker, loses: Arc::clone(&loses), reads: AtomicUsize::new(0) });
        let bench = Bench::on(1, Arc::clone(&lossy) as _);
        bench.hub.join(&room("a"), 0, Some(KEEP), Beginning::Live).await.unwrap();
        bench.record("a", "1");
        assert_eq!(bench.posted(), [["a"]]);
        loses.store(true, Ordering::Relaxed);
        bench.record("a", "2");
        assert_eq!(bench.posted(), [[""; 0]]);
        pass(&bench, Duration::from_secs(90)).await;
        assert_eq!(bench.posted(), [["a"]], "without a gap");
        assert_eq!(bench.hub.fan_out.metrics.repaired.get(), 1);

        // Nothing is told while nothing is lost, and a check costs one reading a minute.
        let before = lossy.reads.load(Ordering::Relaxed);
        pass(&bench, Duration::from_secs(600)).await;
        assert_eq!(bench.posted(), [[""; 0]]);
        assert_eq!(lossy.reads.load(Ordering::Relaxed) - before, 10);

        // A busy room is not read.
        loses.store(false, Ordering::Relaxed);
        let before = lossy.reads.load(Ordering::Relaxed);
        for number in 0..20 {
            bench.record("a", &number.to_string());
            pass(&bench, Duration::from_secs(10)).await;
        }
        assert_eq!(lossy.reads.load(Ordering::Relaxed), before);
    }

    #[tokio::test]
    async fn what_is_published_past_a_history_is_delivered_and_counted() {
        let bench = Bench::new(1);
        bench.hub.join(&room("a"), 0, Some(KEEP), Beginning::Live).await.unwrap();
        bench.join("b", 0).await;
        bench.record("a", "1");
        bench.publish("a", "2");
        bench.publish("b", "3");
        assert_eq!(bench.posted(), [["a", "a", "b"]]);
        assert_eq!(bench.hub.fan_out.metrics.unrecorded.get(), 1);
    }

    #[tokio::test]
    async fn the_time_of_a_repair_is_measured() {
        let bench = Bench::new(1);
        bench.hub.join(&room("a"), 0, Some(KEEP), Beginning::Live).await.unwrap();
        let metrics = &bench.hub.fan_out.metrics;
        let interest = Arc::clone(&bench.hub.stripe("a").lock()["a"].room);
        interest.gap(GapCause::Interrupted);
        interest.gap(GapCause::Interrupted);
        assert_eq!((metrics.repairing.get(), metrics.repair_seconds.get_sample_count()), (1, 0));
        bench.time.advance(Duration::from_secs(3));
        while let Some(repair) = futures_util::FutureExt::now_or_never(bench.hub.next_repair()) {
            repair.attempt().await.unwrap();
        }
        assert_eq!((metrics.repairing.get(), metrics.repair_seconds.get_sample_count()), (0, 1));
        assert!((metrics.repair_seconds.get_sample_sum() - 3.0).abs() < 0.01);
        // A room that is forgotten meanwhile does not count for ever.
        interest.gap(GapCause::Interrupted);
        assert_eq!(metrics.repairing.get(), 1);
        drop(interest);
        bench.hub.leave(&room("a"), 0);
        bench.forget_rooms_after(LINGER_RECORDED);
        assert_eq!(metrics.repairing.get(), 0);
    }

    /// A broker that answers nothing about histories, and counts who still waits.
    struct Silent {
        broker: MemoryBroker,
        asked: Arc<()>,
        opens: bool,
    }

    impl Silent {
        fn ask<T: Send + 'static>(&self) -> BoxFuture<'static, T> {
            let asked = Arc::clone(&self.asked);
            Box::pin(async move {
                std::future::pending::<()>().await;
                drop(asked);
                unreachable!("it is never answered")
            })
        }
    }

    impl Broker for Silent {
        fn subscribe(&self, room: &RoomName, sink: Arc<dyn Sink>, affinity: Affinity) -> Subscribing {
            self.broker.subscribe(room, sink, affinity)
        }

        fn unsubscribe(&self, room: &RoomName, affinity: Affinity) {
            self.broker.unsubscribe(room, affinity);
        }

        fn try_publish(&self, request: PublishRequest) -> Result<(), PublishRequest> {
            self.broker.try_publish(request)
        }

        fn publish(&self, request: PublishRequest) -> BoxFuture<'_, ()> {
            self.broker.publish(request)
        }

        fn open(&self, room: &RoomName, retention: Retention) -> broker_bridge::Positioning {
            if self.opens { self.broker.open(room, retention) } else { self.ask() }
        }

        fn read(&self, _: &RoomName, _: ReadFrom, _: usize) -> broker_bridge::Reading {
            self.ask()
        }

        fn status(&self) -> tokio::sync::watch::Receiver<broker_bridge::BrokerStatus> {
            self.broker.status()
        }

        fn close(&self) -> BoxFuture<'_, ()> {
            self.broker.close()
        }
    }

    #[tokio::test]
    async fn what_is_asked_of_the_broker_ends_with_the_last_who_waits_for_it() {
        for opens in [true, false] {
            let (broker, asked) = (MemoryBroker::new(&MemoryBus::new()), Arc::new(()));
            let silent = Silent { broker, asked: Arc::clone(&asked), opens };
            let bench = Bench::on(1, Arc::new(silent));
            let come = |beginning| bench.hub.join(&room("a"), 0, Some(KEEP), beginning);
            let member = if opens { Some(come(Beginning::Live).await.unwrap()) } else { None };
            let since = Beginning::After("1-1".parse().unwrap());
            let (mut first, mut second) = (come(since), come(since));
            for waiting in [&mut first, &mut second] {
                assert!(futures_util::FutureExt::now_or_never(waiting).is_none());
            }
            assert_eq!(Arc::strong_count(&asked), 3, "asked once for both");
            drop(first);
            assert_eq!(Arc::strong_count(&asked), 3);
            drop(second);
            assert_eq!(Arc::strong_count(&asked), 2, "nobody waits: {member:?}");
        }
    }

    #[tokio::test]
    async fn a_room_with_a_history_lingers_longer_unless_its_policy_has_changed() {
        let bench = Bench::new(1);
        let join = async |history| bench.hub.join(&room("a"), 0, history, Beginning::Live).await.unwrap();
        join(Some(KEEP)).await;
        bench.hub.leave(&room("a"), 0);
        bench.forget_rooms_after(LINGER_RECORDED.checked_sub(Hub::STEP).unwrap());
        assert_eq!(bench.rooms(), 1);
        // What is published meanwhile is known without a reading.
        bench.record("a", "1");
        join(Some(KEEP)).await;
        let ring = bench.hub.piece(&room("a"), 0, usize::MAX).unwrap();
        assert_eq!(ring.items.len(), 1);

        bench.hub.leave(&room("a"), 0);
        join(None).await;
        assert!(bench.hub.piece(&room("a"), 0, usize::MAX).is_none(), "it has no history any more");
        bench.hub.leave(&room("a"), 0);
        assert_eq!((bench.rooms(), bench.lingering()), (1, 1));
        bench.forget_rooms_after(LINGER_RECORDED);
        bench.forget_rooms_after(LINGER_RECORDED);
        assert_eq!((bench.rooms(), bench.lingering()), (0, 0));
    }

    #[tokio::test]
    async fn a_bounded_number_of_rooms_with_a_history_lingers() {
        let bench = Bench::new(1);
        for name in 0..MOST_LINGERING + 5 {
            let name = room(&name.to_string());
            bench.hub.join(&name, 0, Some(KEEP), Beginning::Live).await.unwrap();
            bench.hub.leave(&name, 0);
        }
        bench.forget_rooms_after(Hub::STEP);
        assert_eq!(bench.rooms(), i64::try_from(MOST_LINGERING).unwrap());
        bench.forget_rooms_after(LINGER_RECORDED);
        assert_eq!((bench.rooms(), bench.lingering()), (0, 0));
    }

    #[tokio::test]
    async fn a_broadcast_is_encoded_once_and_shared() {
        use crate::framing::{Encoding, Format, Transport};
        static FORMAT: Format =
            Format { write: |_, publication, _, out| out.put(publication.data.bytes()), head: None };
        let bench = Bench::new(2);
        bench.join("a", 0).await;
        bench.join("a", 1).await;
        bench.publish("a", "hi");
        let frames: Vec<_> = bench
            .inboxes
            .iter()
            .map(|inbox| {
                let mut events = VecDeque::new();
                inbox.take(&mut events, 0);
                let Some(ShardEvent::Broadcast(broadcast)) = events.pop_back() else {
                    panic!("one broadcast")
                };
                broadcast.frame(Encoding::new(&FORMAT, Transport::WebSocket), 0).into_owned()
            })
            .collect();
        assert_eq!(frames[0], &b"\x81\x02hi"[..]);
        assert_eq!(frames[0].as_ptr(), frames[1].as_ptr(), "both shards write the same bytes");
    }
}

//! What must be true after each step.

use broker_bridge::{
    Cursor, RoomName,
    history::{ReadFrom, Start},
};
use tidegate::auth::UnixSeconds;

use super::{BESIDES_BOUND, BESIDES_QUEUE, World, history_of};
use crate::{
    broker::lock,
    client::{Heard, Kind, number},
    service::PATIENCE,
};

/// `auth.leeway`, in seconds.
const LEEWAY: u64 = 5;
/// How many ticks a session may last after that: a client has five seconds to read its final message, and some
/// ticks come late.
const LATE: u32 = 50 + 100;
/// How many of them may pass in a row with nothing on its way to the client: its task has to run, and writes what
/// is left, or ends the session.
const IDLE: u32 = 2 * PATIENCE;

impl World {
    /// Looks at what the broker has accepted.
    pub(super) fn learn(&mut self) {
        let bus = lock(&self.bus);
        for (room, log) in &bus.log {
            let known = self.known.entry(room.clone()).or_default();
            for (publication, _) in log.iter().skip(*known) {
                let number = number(publication.data.as_text().unwrap_or_default());
                let place = (room.clone(), *known);
                *known += 1;
                if number == 0 {
                    continue;
                }
                let twice = self.places.insert(number, place);
                assert!(twice.is_none(), "publication {number} was accepted twice");
                let publisher = self.publishers[&number];
                if publisher > 0 {
                    let last = self.last_of.insert((publisher, room.clone()), number);
                    assert!(
                        last.is_none_or(|last| last < number),
                        "publisher {publisher} is out of order in {room}: {number} after {last:?}"
                    );
                }
            }
        }
    }

    pub(super) fn hear(&mut self, index: usize, heard: Heard) {
        self.learn();
        let peer = &mut self.peers[index];
        if self.traced == Some(peer.number) {
            println!("step {}: client {} hears {heard:?}", self.counts.steps, peer.number);
        }
        if peer.is_wild {
            return;
        }
        assert!(peer.is_open, "client {} hears {heard:?} before it is answered", peer.number);
        assert!(!peer.is_closed, "client {} hears {heard:?} after the end", peer.number);
        if let (Some(told), Heard::Gap(room, _) | Heard::Unsubscribed(room, _)) = (&mut self.told, &heard) {
            *told.entry((peer.number, room.clone())).or_default() += 1;
        }
        match heard {
            Heard::Publication(room, number @ 1.., cursor) => {
                self.check_publication(index, &room, number, cursor);
            }
            Heard::Position(room, cursor) => {
                let known = peer.rooms.get_mut(&room).unwrap();
                // After a gap, a server may have gone back.
                let is_later = known.has_gap || known.cursor.is_none_or(|last| last <= cursor);
                assert!(is_later, "{cursor} in {room} after {known:?}");
                known.cursor = Some(cursor);
            }
            Heard::Gap(room, cause) => {
                self.counts.gaps += 1;
                let may_be = match room.as_str() {
                    "kept" => {
                        let known = peer.rooms[&room].cursor;
                        let from = known.map_or(ReadFrom::Last, ReadFrom::After);
                        let page = lock(&self.bus).server.read(&room, from, 1);
                        cause == "trimmed" && page.start == Start::Trimmed
                    }
                    // It is soon trimmed past what somebody has seen, and past a link.
                    "short" => cause == "trimmed" || cause == "expired",
                    _ => true,
                };
                let may_be = may_be || peer.rooms[&room].is_lost;
                assert!(!self.is_exact || may_be, "client {}: {cause} in {room}", peer.number);
                let known = peer.rooms.get_mut(&room).filter(|known| known.is_member);
                let known = known.unwrap_or_else(|| panic!("a gap in {room}, where the client is not"));
                known.has_gap = true;
                known.is_lost = false;
            }
            Heard::Joined(room, recovered) => self.rejoin(index, &room, recovered),
            Heard::Left(room) => {
                if let Some(known) = peer.rooms.get_mut(&room) {
                    known.is_member = false;
                }
            }
            Heard::Unsubscribed(room, code) => {
                self.counts.gaps += 1;
                assert_eq!(code, 2500, "insufficient state");
                let known = peer.rooms.get_mut(&room).filter(|known| known.is_member);
                let known = known.unwrap_or_else(|| panic!("a gap in {room}, where the client is not"));
                known.is_member = false;
                let rejoins = self.told.is_some() || self.random.one_in(2);
                if rejoins && !peer.client.is_asking(&room) {
                    peer.subscribe(&room);
                }
            }
            Heard::Closed => peer.is_closed = true,
            Heard::Ping(payload) => {
                if self.is_calm || !self.random.one_in(10) {
                    peer.client.pong(&payload);
                }
            }
            Heard::Connected => peer.has_begun = true,
            Heard::Published | Heard::Publication(_, 0, _) => {}
        }
    }

    /// A client has subscribed again. It goes on where it was, unless it is told that it has missed something.
    fn rejoin(&mut self, index: usize, room: &RoomName, recovered: Option<bool>) {
        match self.peers[index].rooms.get_mut(room) {
            Some(known) if recovered == Some(true) => (known.is_member, known.has_gap) = (true, false),
            _ => {
                let may_be = !self.is_exact || room.as_str() != "kept" || recovered != Some(false);
                assert!(may_be, "client {} has not recovered {room}", self.peers[index].number);
                self.join(index, room.clone());
                if recovered == Some(false)
                    && let Some(known) = self.peers[index].rooms.get_mut(room)
                {
                    // Its user begins anew, at a position from which a server may have gone back.
                    known.unseen = 0;
                }
            }
        }
    }

    fn check_publication(&mut self, index: usize, room: &RoomName, number: u64, cursor: Option<Cursor>) {
        self.counts.deliveries += 1;
        let peer = &self.peers[index];
        let who = format!("client {} ({:?}) in {room}", peer.number, peer.client.kind);
        let (of, place) =
            self.places.get(&number).unwrap_or_else(|| panic!("{who}: {number} was never accepted"));
        assert_eq!(of, room, "{who}: {number} is of another room");
        let place = *place;
        let known = peer.rooms.get(room).unwrap_or_else(|| panic!("{who}: it is not there"));
        assert!(known.is_member, "{who}: it has left, and gets {number}");
        assert!(!known.is_lost, "{who}: {number} comes before the gap");
        let recorded = lock(&self.bus).log[room][place].1;
        if peer.client.kind == Kind::Centrifuge && cursor.is_some() {
            // Its epoch is that of the subscription.
            let offsets = [cursor, recorded].map(|cursor| cursor.map(|cursor| cursor.offset));
            assert_eq!(offsets[0], offsets[1], "{who}: the offset of {number}");
        }
        if peer.client.kind.can_resume() || (cursor.is_some() && peer.client.kind != Kind::Centrifuge) {
            assert_eq!(cursor, recorded, "{who}: the position of {number}");
        }
        if history_of(room).is_some() && recorded.is_none() {
            // After an interruption its place among the others is not known.
            let known = self.peers[index].rooms.get_mut(room).unwrap();
            assert!(known.unrecorded.insert(number), "{who}: {number} comes twice");
            return;
        }
        assert!(place >= known.unseen, "{who}: {number} comes twice or out of order");
        let own = self.publishers[&number] == peer.number;
        assert!(!own || peer.client.kind.has_echo(), "{who}: its own {number}");
        if place > known.next && !known.has_gap && peer.client.kind.hears_gaps() {
            self.check_nothing_missing(&who, index, room, known.next..place);
        }
        let known = self.peers[index].rooms.get_mut(room).unwrap();
        known.unseen = place + 1;
        known.cursor = cursor.or(known.cursor);
        if place >= known.next {
            (known.next, known.has_gap) = (place + 1, false);
        }
    }

    /// Nothing of this part of a room's log may be missing, but what is not for this client.
    pub(super) fn check_nothing_missing(
        &self,
        who: &str,
        index: usize,
        room: &RoomName,
        part: std::ops::Range<usize>,
    ) {
        let peer = &self.peers[index];
        let bus = lock(&self.bus);
        for (publication, cursor) in &bus.log[room][part] {
            if cursor.is_none() && history_of(room).is_some() {
                // A node that has seen none cannot know that it misses any.
                continue;
            }
            let number = number(publication.data.as_text().unwrap_or_default());
            let is_own = number == 0 || self.publishers[&number] == peer.number;
            assert!(
                is_own && (number == 0 || !peer.client.kind.has_echo()),
                "{who}: {number} is lost, and no gap was told"
            );
        }
    }

    /// A session ends with its token, in real time, however long its node stood still.
    pub(super) fn check_expired(&mut self) {
        let unix = UnixSeconds::from(self.time.unix()).0;
        for peer in &mut self.peers {
            let pipe = peer.client.pipe.borrow();
            let is_over = pipe.is_closed || pipe.node_ended || pipe.is_reset || pipe.client_ended;
            if is_over || !peer.has_begun || unix <= peer.expires + LEEWAY {
                continue;
            }
            let (since, idle) = peer.expired.get_or_insert((self.now, 0));
            *idle = if pipe.to_client.is_empty() { *idle + 1 } else { 0 };
            let late = self.now.0 - since.0;
            assert!(
                late <= LATE && *idle <= IDLE,
                "client {} goes on {late} ticks after its token has expired, {idle} of them idle",
                peer.number
            );
        }
    }

    /// No queue is larger than it may be.
    pub(super) fn check_bounds(&mut self) {
        let node = &self.nodes[self.random.below(self.nodes.len())];
        let outbound = node.settings.load().limits.outbound.get().max(8 * 1024);
        for shard in &node.shards {
            for link in &shard.links {
                let queued = shard.core.queued_for(link.key);
                assert!(queued <= outbound + BESIDES_BOUND, "{queued} bytes are queued for a client");
                let holds = shard.core.held_for(link.key);
                assert!(holds <= outbound + BESIDES_QUEUE, "a connection holds {holds} bytes");
            }
        }
    }
}

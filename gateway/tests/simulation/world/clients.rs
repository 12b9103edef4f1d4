//! What clients do, and what they should not do.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use broker_bridge::{Cursor, RoomName};
use http::Request;
use tidegate::{
    auth::{Grant, Identity, Subject, Token, UnixSeconds, mint},
    framing::{Framing, Transport},
    history::Beginning,
    limits::Decision,
    protocol::{Ask, On, TABLE},
    session::Session,
    shard::Start,
    websocket::Deflate,
};

use super::{Absent, MANY, Membership, Peer, ROOMS, World, history_of, many};
use crate::{
    client::{Client, Kind},
    node::{Carrier, SECRET},
    transport::Pipe,
};

impl Peer {
    /// Asks for a room, and for what has been missed there since the last time, as SDKs do.
    pub(super) fn subscribe(&mut self, room: &RoomName) {
        let cursor = self.rooms.get(room).and_then(|known| known.cursor);
        self.client.subscribe(room, cursor);
    }
}

impl World {
    pub(super) fn open(&mut self) {
        if self.peers.len() >= self.most_peers {
            return;
        }
        let node = self.random.below(self.nodes.len());
        if self.nodes[node].is_draining {
            return;
        }
        let shard = self.random.below(self.nodes[node].shards.len());
        let kind = Kind::any(&mut self.random);
        self.open_at(node, shard, kind);
    }

    pub(super) fn open_at(&mut self, node: usize, shard: usize, kind: Kind) {
        let mut rooms: Vec<RoomName> = Vec::new();
        let most = kind.rooms();
        let wanted = if most > 1 { self.random.between(2, most) } else { most };
        while rooms.len() < wanted {
            let room = self.any_room();
            if !rooms.contains(&room) {
                rooms.push(room);
            }
        }
        if most > 1 && !self.is_calm && self.random.one_in(20) {
            // More than are left at once.
            rooms.extend(
                (0..self.random.between(257, MANY))
                    .map(many)
                    .filter(|room| !rooms.contains(room))
                    .collect::<Vec<_>>(),
            );
        }
        self.open_in(node, shard, kind, rooms);
    }

    pub(super) fn open_in(&mut self, node: usize, shard: usize, kind: Kind, rooms: Vec<RoomName>) {
        self.open_since(node, shard, kind, rooms, None);
    }

    /// Somebody who has been here continues where it was, on any node.
    pub(super) fn come_back(&mut self) {
        if self.absent.is_empty() || self.peers.len() >= self.most_peers {
            return;
        }
        let node = self.random.below(self.nodes.len());
        if self.nodes[node].is_draining {
            return;
        }
        let shard = self.random.below(self.nodes[node].shards.len());
        let Absent { kind, room, mut known } = self.absent.swap_remove(self.random.below(self.absent.len()));
        if self.random.one_in(20) {
            // With a position that this room never had.
            let bogus = Cursor { epoch: self.random.below(3) as u64 * 1_000_000, offset: 7 };
            known =
                Membership { cursor: None, is_lost: true, unseen: 0, unrecorded: BTreeSet::new(), ..known };
            return self.open_since(node, shard, kind, vec![room], Some((bogus, known)));
        }
        let Some(cursor) = known.cursor else { return };
        // What has no position may come again at another node.
        known.unrecorded.clear();
        self.counts.returns += 1;
        self.open_since(node, shard, kind, vec![room], Some((cursor, known)));
    }

    fn open_since(
        &mut self,
        node: usize,
        shard: usize,
        kind: Kind,
        rooms: Vec<RoomName>,
        came_back_with: Option<(Cursor, Membership)>,
    ) {
        let number = self.next_peer;
        self.next_peer += 1;
        let capacity = self.random.between(64, 4096);
        let pipe = Pipe::new(capacity);
        let first = rooms.first().cloned().unwrap_or_else(|| RoomName::new(ROOMS[0]).unwrap());
        let mut client = Client::new(kind, &pipe, first, &mut self.random);
        let (token, expires) = self.token(number);
        let (since, came_back_with) = came_back_with.unzip();
        if self.traced == Some(number) {
            println!(
                "step {}: client {} ({kind:?}) comes to {rooms:?} with {since:?}",
                self.counts.steps, number
            );
        }
        let (mut start, begin) = self.start(node, kind, &rooms, since, &token);
        if kind.is_web_socket() && self.random.one_in(3) {
            start.deflate = Some(if self.random.one_in(2) { Deflate::Wide } else { Deflate::Narrow });
            client.deflate = true;
        }
        let tls = self.random.one_in(2);
        let carrier = if kind.is_web_socket() { Carrier::Socket { tls } } else { Carrier::Response };
        if kind == Kind::Centrifuge && (self.is_calm || !self.random.one_in(20)) {
            client.connect(token.expose());
        }
        self.nodes[node].shards[shard].open(start, &rooms, &begin, carrier, &pipe);
        self.counts.sessions += 1;
        self.peers.push(Peer {
            client,
            is_open: false,
            is_closed: false,
            is_stalled: false,
            is_wild: false,
            asked: rooms,
            rooms: BTreeMap::new(),
            number,
            has_begun: kind != Kind::Centrifuge,
            expires,
            expired: None,
            came_back_with,
        });
    }

    /// A token for any room, and when it expires. Some expire soon.
    fn token(&mut self, number: u64) -> (Token, u64) {
        let subject = Subject::new(&format!("user-{}", number % 7)).unwrap();
        let grants: [Grant; 1] = ["*=subscribe,publish,history".parse().unwrap()];
        let ttl = Duration::from_secs(if !self.is_calm && self.random.one_in(4) { 20 } else { 100_000 });
        let now = UnixSeconds::from(self.time.unix());
        (mint::mint(&SECRET, &subject, &grants, ttl, now).unwrap(), now.0 + ttl.as_secs())
    }

    /// A request that has been checked, and the position that it names.
    fn start(
        &mut self,
        node: usize,
        kind: Kind,
        rooms: &[RoomName],
        since: Option<Cursor>,
        token: &Token,
    ) -> (Start, Vec<Beginning>) {
        let (name, transport, query) = kind.request();
        let endpoint = TABLE.iter().find(|endpoint| endpoint.name.as_str() == name).unwrap();
        let open = endpoint.routes.iter().find_map(|route| match route.on {
            On::WebSocket { open, .. } if transport == Transport::WebSocket => Some(open),
            On::Stream { open, .. } if transport == Transport::Body => Some(open),
            _ => None,
        });
        // The newest that there are, and then what comes.
        let has_history = kind != Kind::Centrifuge && rooms.iter().any(|room| history_of(room).is_some());
        let asks_for_last = since.is_none() && has_history && self.random.one_in(3);
        let last = asks_for_last.then(|| format!("last={}", self.random.between(1, 300)));
        let query: Vec<_> = rooms
            .iter()
            .map(|room| format!("room={room}"))
            .chain([query])
            .chain(since.map(|cursor| format!("since={cursor}")))
            .chain(last)
            .filter(|part| !part.is_empty())
            .collect();
        let request = Request::get(format!("/?{}", query.join("&"))).body(()).unwrap();
        let settings = self.nodes[node].settings.load();
        let room = (rooms.len() == 1).then(|| rooms[0].clone());
        let ask = Ask { request: &request.into_parts().0, settings: &settings, room };
        let opening = open.unwrap()(&ask).unwrap();
        let id = self.nodes[node].ids.next();
        let protocol = (opening.protocol)();
        let framing = Framing::on(transport);
        let session = if opening.signs_in_later {
            Session::to_begin(id, None, protocol, framing)
        } else {
            let now = self.time.unix().into();
            let identity: Identity = settings.authenticator.verify(token, now).unwrap();
            Session::new(id, Arc::new(identity), protocol, framing)
        };
        let address = IpAddr::from([192, 0, 2, self.random.below(5) as u8]);
        let decision = self.nodes[node].settings.limiters().admit(address, Some(usize::MAX));
        let Decision::Accept(permit) = decision else { panic!("not admitted: {decision:?}") };
        let start = Start { session, name: endpoint.name, deflate: None, permit: permit.map(Arc::new) };
        (start, opening.begin)
    }

    fn any_peer(&mut self) -> Option<usize> {
        (!self.peers.is_empty()).then(|| self.random.below(self.peers.len()))
    }

    /// Clients read some of what has come.
    pub(super) fn clients_work(&mut self) {
        for _ in 0..self.pace() {
            let Some(index) = self.any_peer() else { return };
            if self.peers[index].is_stalled {
                continue;
            }
            let most = match self.random.below(3) {
                0 => self.random.between(1, 30),
                _ => 4096,
            };
            self.read(index, most);
        }
    }

    pub(super) fn read(&mut self, index: usize, most: usize) {
        self.note_admission(index);
        let heard = self.peers[index].client.read(most);
        for one in heard {
            self.hear(index, one);
        }
        let peer = &mut self.peers[index];
        let is_over = {
            let pipe = peer.client.pipe.borrow();
            (pipe.is_closed || pipe.node_ended || pipe.is_reset)
                && (pipe.to_client.is_empty() || pipe.is_reset)
        };
        if is_over {
            peer.client.pipe.borrow_mut().client_ended = true;
            self.counts.closed += 1;
            let peer = self.peers.swap_remove(index);
            self.leave(peer);
        }
    }

    /// A client has gone. It may come back if it knows where it was.
    fn leave(&mut self, mut peer: Peer) {
        let room = peer.client.room.clone();
        if self.is_calm || peer.is_wild || !peer.client.kind.can_resume() || history_of(&room).is_none() {
            return;
        }
        let known = peer.rooms.remove(&room).or(peer.came_back_with);
        if let Some(known) = known.filter(|known| known.cursor.is_some() && !known.is_lost) {
            self.absent.push(Absent { kind: peer.client.kind, room, known });
        }
    }

    /// The answer to its request has reached a client: it gets everything from now on.
    fn note_admission(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        if peer.is_open || !peer.client.pipe.borrow().is_answered {
            return;
        }
        peer.is_open = true;
        for room in peer.asked.clone() {
            self.join(index, room);
        }
    }

    pub(super) fn join(&mut self, index: usize, room: RoomName) {
        let next = self.known.get(&room).copied().unwrap_or(0);
        let peer = &mut self.peers[index];
        if let Some(known) = peer.came_back_with.take() {
            let known = if known.is_lost { Membership { next, ..known } } else { known };
            peer.rooms.insert(room, Membership { is_member: true, ..known });
            return;
        }
        let unseen = peer.rooms.get(&room).map_or(0, |known| known.unseen);
        let fresh = Membership { is_member: true, next, unseen, ..Membership::default() };
        peer.rooms.insert(room, fresh);
    }

    /// A client does what clients do.
    pub(super) fn client_acts(&mut self) {
        let Some(index) = self.any_peer() else { return };
        if !self.peers[index].is_open || self.peers[index].is_closed {
            return;
        }
        let kind = self.peers[index].client.kind;
        let own = self.peers[index].asked.first().cloned();
        let room = if matches!(kind, Kind::Plain { .. }) { own.unwrap() } else { self.any_room() };
        match (kind, self.random.below(8)) {
            (Kind::Centrifuge, 0..4) => {
                let peer = &mut self.peers[index];
                if peer.client.is_asking(&room) {
                    return;
                }
                let is_member = peer.rooms.get(&room).is_some_and(|known| known.is_member);
                if self.traced == Some(peer.number) {
                    println!(
                        "step {}: client {} asks for {room}, {is_member}",
                        self.counts.steps, peer.number
                    );
                }
                match is_member {
                    true if self.random.one_in(2) => peer.client.unsubscribe(&room),
                    true => {}
                    false => peer.subscribe(&room),
                }
            }
            (Kind::Plain { .. } | Kind::Json { .. } | Kind::Centrifuge, 4..8) => {
                // Sometimes more than may be in flight.
                let count = if self.random.one_in(30) { 100 } else { self.random.between(1, 5) };
                for _ in 0..count {
                    let data = self.data(self.peers[index].number);
                    self.counts.publications += 1;
                    self.peers[index].client.publish(&room, &data);
                }
            }
            _ => {}
        }
    }

    /// A client does what clients should not do.
    pub(super) fn client_misbehaves(&mut self) {
        let Some(index) = self.any_peer() else { return };
        let peer = &mut self.peers[index];
        let is_socket = peer.client.kind.is_web_socket();
        match self.random.below(20) {
            0..8 => peer.is_stalled = !peer.is_stalled,
            8 => peer.client.pipe.borrow_mut().is_reset = true,
            9 if is_socket => peer.client.pipe.borrow_mut().client_ended = true,
            10 if is_socket => peer.client.close(),
            11 if is_socket => {
                peer.is_wild = true;
                peer.client.junk(&mut self.random);
            }
            12..16 if is_socket => peer.client.ping(),
            16 => peer.client.pipe.borrow_mut().capacity = self.random.between(32, 16 * 1024),
            17 if is_socket => {
                // A flood that is not read.
                for _ in 0..self.random.between(10, 150) {
                    peer.client.ping();
                }
            }
            _ => {}
        }
    }
}

//! What must be true once everything has come to rest.

use std::{collections::BTreeMap, time::Duration};

use broker_bridge::RoomName;

use super::{HISTORIES, ROOMS, SETTINGS, World, history_of};
use crate::{
    broker::{self, lock},
    client::Kind,
    node::{Node, Shard},
    service::SLICE,
};

impl World {
    /// Everything that fails is mended, and everybody reads.
    pub(super) fn come_to_rest(&mut self) {
        for round in 0..5_000 {
            {
                let mut bus = lock(&self.bus);
                for node in &self.nodes {
                    if !bus.links[node.link].is_up {
                        bus.restore(node.link);
                    }
                    while bus.accept_next(node.link, false) {}
                    bus.confirm_all(node.link);
                    while bus.answer_next(node.link, 0, None) || bus.pass_answer(node.link, 0) {}
                }
            }
            for node in 0..self.nodes.len() {
                while broker::deliver(&self.bus, self.nodes[node].link) {}
                while self.nodes[node].repair(&mut self.random) {}
                for shard in 0..self.nodes[node].shards.len() {
                    let mut steps = 0;
                    while self.nodes[node].shards[shard].step(self.now, &mut self.random) {
                        steps += 1;
                        assert!(steps < 1_000_000, "a shard does not come to rest");
                    }
                }
            }
            self.learn();
            for index in (0..self.peers.len()).rev() {
                self.peers[index].is_stalled = false;
                self.peers[index].client.pipe.borrow_mut().capacity = 64 * 1024;
                self.read(index, usize::MAX);
            }
            if self.is_quiet() {
                return;
            }
            // A session that is closing waits for its client or its deadline.
            if round % 4 == 3 {
                self.tick();
            }
        }
        panic!("the simulation does not come to rest");
    }

    fn is_quiet(&self) -> bool {
        lock(&self.bus).is_quiet_for(self.nodes.iter().map(|node| node.link))
            && self.nodes.iter().flat_map(|node| &node.shards).all(Shard::is_quiet)
            && self.nodes.iter().all(Node::has_repaired)
            && self.peers.iter().all(|peer| peer.client.pipe.borrow().to_client.is_empty())
    }

    /// A last publication in each room with a history: that a server has started again, and may have lost something,
    /// is told with the next.
    pub(super) fn conclude(&mut self) {
        self.is_calm = true;
        // Histories take memory too, and a node that is short of it refuses newcomers.
        self.nodes.iter().for_each(|node| node.limit_memory(usize::MAX));
        self.tick();
        let rooms: &[_] = if self.has_histories { &HISTORIES } else { &[] };
        for (room, _) in rooms {
            let data = self.data(0);
            self.accept(&RoomName::new(room).unwrap(), data);
        }
        self.come_to_rest();
    }

    /// Everybody who is in a room has got everything.
    pub(super) fn check_complete(&mut self) {
        for index in 0..self.peers.len() {
            let peer = &self.peers[index];
            if peer.is_closed || peer.is_wild || !peer.is_open || peer.client.pipe.borrow().client_ended {
                continue;
            }
            assert_eq!(peer.client.waiting(), 0, "client {} has not been answered", peer.number);
            for (room, known) in &peer.rooms {
                if !known.is_member || known.has_gap || !peer.client.kind.hears_gaps() {
                    continue;
                }
                let who = format!("client {} ({:?}) in {room} at the end", peer.number, peer.client.kind);
                let end = self.known.get(room).copied().unwrap_or(0);
                if known.next < end {
                    self.check_nothing_missing(&who, index, room, known.next..end);
                }
            }
        }
    }

    /// One interruption is one gap for each client in each room, also if the client joins again at once, while
    /// others have yet to be told.
    pub(super) fn check_one_gap(&mut self) {
        self.is_calm = true;
        let room = self.any_room();
        let node = self.random.below(self.nodes.len());
        if self.random.one_in(3) && !self.nodes[node].is_draining {
            // More than are told of a gap in one turn.
            (0..200).for_each(|_| self.open_at(node, 0, Kind::Centrifuge));
            self.come_to_rest();
        }
        for peer in self.peers.iter_mut().filter(|peer| peer.is_open && !peer.is_closed) {
            let is_member = peer.rooms.get(&room).is_some_and(|known| known.is_member);
            if peer.client.kind == Kind::Centrifuge && !is_member && !peer.client.is_asking(&room) {
                peer.subscribe(&room);
            }
        }
        self.come_to_rest();
        let link = self.nodes[node].link;
        {
            let mut bus = lock(&self.bus);
            bus.interrupt(link, 0);
            bus.restore(link);
        }
        while broker::deliver(&self.bus, link) {}
        self.told = Some(BTreeMap::new());
        for _ in 0..50 {
            for shard in self.nodes.iter_mut().flat_map(|node| &mut node.shards) {
                shard.step_by_turn(self.now, &mut self.random);
            }
            for index in (0..self.peers.len()).rev() {
                self.read(index, usize::MAX);
            }
        }
        self.come_to_rest();
        for ((client, room), gaps) in self.told.take().unwrap() {
            // A history bridges it, unless something was published that is not in there.
            let is_right = if history_of(&room).is_some() { !self.is_exact && gaps == 1 } else { gaps == 1 };
            assert!(is_right, "client {client} is told {gaps} gaps in {room} for one interruption");
        }
    }

    /// Who does nothing wrong, while nothing fails, stays.
    pub(super) fn check_calm(&mut self) {
        self.most_peers = usize::MAX;
        let first = self.next_peer;
        (0..10).for_each(|_| self.open());
        self.come_to_rest();
        for tick in 0..100 {
            self.tick();
            if tick == 50 {
                self.pause(Duration::from_secs(1800));
            }
            self.publish_from_backend();
            for node in 0..self.nodes.len() {
                while broker::deliver(&self.bus, self.nodes[node].link) {}
                for shard in &mut self.nodes[node].shards {
                    while shard.step(self.now, &mut self.random) {}
                }
            }
            for index in (0..self.peers.len()).rev() {
                self.read(index, usize::MAX);
            }
        }
        self.come_to_rest();
        let stayed = self.peers.iter().filter(|peer| peer.number >= first && !peer.is_closed && peer.is_open);
        let opened = usize::try_from(self.next_peer - first).unwrap();
        let stayed: Vec<_> = stayed.map(|peer| peer.number).collect();
        assert_eq!(
            stayed.len(),
            opened,
            "somebody from {first} on is closed who does nothing wrong: {stayed:?} stay"
        );
        self.check_complete();
    }

    /// Large rooms, and many small ones, are served slice by slice, so that nobody waits for all of it; and
    /// nobody is left out. On a node of its own: elsewhere the same turn has other connections to write, and
    /// may write twice as many.
    pub(super) fn check_slices(&mut self) {
        if !self.random.one_in(4) {
            return;
        }
        let node = Node::new(&self.bus, SETTINGS, 1, &self.time, self.now, &mut self.random);
        self.nodes.push(node);
        let node = self.nodes.len() - 1;
        let kind = Kind::Plain { echo: true, close_on_gap: true };
        let rooms: Vec<_> = ROOMS.iter().take(self.random.between(1, 2)).collect();
        let rooms: Vec<_> = rooms.into_iter().map(|name| RoomName::new(name).unwrap()).collect();
        for number in 0..SLICE + 50 {
            self.open_in(node, 0, kind, vec![rooms[number % rooms.len()].clone()]);
        }
        self.come_to_rest();
        for room in &rooms {
            let data = self.data(0);
            self.accept(room, data);
        }
        // Without a tick, which pings some of them.
        while broker::deliver(&self.bus, self.nodes[node].link) {}
        let shard = &mut self.nodes[node].shards[0];
        shard.most_written = 0;
        while shard.step(self.now, &mut self.random) {}
        assert_eq!(shard.most_written, SLICE, "sockets that a turn has written to");
        self.come_to_rest();
        self.check_complete();
    }

    /// All clients go, and nothing of them stays.
    pub(super) fn close_all(&mut self) {
        for peer in &self.peers {
            peer.client.pipe.borrow_mut().is_reset = true;
        }
        self.come_to_rest();
        for _ in 0..350 {
            self.tick();
        }
        self.come_to_rest();
        for node in 0..self.nodes.len() {
            self.nodes[node].check_empty(true);
            for shard in &self.nodes[node].shards {
                assert_eq!(shard.core.joining(), 0, "subscriptions are left");
            }
            let link = self.nodes[node].link;
            assert_eq!(lock(&self.bus).subscribed(link).count(), 0, "subscriptions are left at the broker");
            let accounts = self.nodes[node].settings.limiters().accounts();
            assert_eq!(accounts, 0, "limits are counted that nobody uses");
        }
    }
}

//! The plan of a run: where each client is, who publishes what, and when.
//!
//! A plan is data and arithmetic. Every process has the same plan, so each can compute which clients and
//! messages are its own.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    clock,
    dialect::Seat,
    latency::Sparse,
    payload::{Payload, Shape},
    target::TargetArgs,
};

/// A run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    pub run: u32,
    pub groups: Vec<Group>,
    /// This process, of `parts`.
    pub part: u32,
    pub parts: u32,
    /// Connections are opened evenly over this many nanoseconds.
    pub ramp: u64,
    /// How many connections may be in progress at once, in each process.
    pub at_once: u32,
    /// Whether a failed connection is counted instead of ending the run.
    pub tolerant: bool,
    pub client_cpu: Option<usize>,
}

/// Clients of one kind.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Group {
    pub name: String,
    pub target: TargetArgs,
    /// The number of its first room; no two groups share one.
    pub first_room: u32,
    pub rooms: u32,
    /// Listeners in each room.
    pub members: u32,
    /// How many rooms a listener is in; `rooms` is a multiple of it.
    pub rooms_per_client: u32,
    pub publishers: Publishers,
    /// Whether a publisher that listens receives its own messages.
    pub echo: bool,
    /// Messages per second, over all rooms.
    pub rate: f64,
    pub size: usize,
    pub payload: Payload,
    pub burst: u64,
    /// The maximum number of messages.
    pub messages: Option<u64>,
    /// Additional clients, over all rooms in turn, that stop reading when ordered to. Their deliveries are
    /// not counted.
    pub stalled: u32,
    /// Additional clients, over all rooms in turn, that leave and come back.
    pub visitors: u32,
    /// How many of them do so per second.
    pub churn: f64,
}

/// Who publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Publishers {
    Nobody,
    /// One for each room, which does not listen.
    One,
    /// The listeners, in turn.
    Members,
}

/// The role of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Listener,
    Stalled,
    Visitor,
    Publisher,
}

/// One client of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Within the group; for a listener in several rooms, the first.
    pub room: u32,
    /// Within the room, among clients with the same role.
    pub index: u32,
    pub role: Role,
}

/// The orders to a process, one per line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// The first order, sent once.
    Begin(Box<Plan>),
    /// Open connections until those with a number below this are ready.
    Open(u32),
    /// Publish from this time on for this many nanoseconds.
    Publish { start: u64, duration: u64 },
    /// Publish nothing more.
    Halt,
    /// The stalled clients stop reading.
    Stall,
    /// Drop every connection.
    Drop,
    /// Send the last update and exit.
    End,
}

/// The updates from a process, one per line: what has happened since the previous one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Update {
    /// How many orders have been carried out or started.
    pub orders: u32,
    /// Clients that are ready now.
    pub standing: u32,
    /// No connection is in progress.
    pub settled: bool,
    /// Everything due has been published.
    pub done: bool,
    /// When the last message was sent; 0 if there was none.
    pub last_sent: u64,
    pub groups: Vec<Tally>,
    /// Nanoseconds from the connect until the client was ready.
    pub connects: Sparse,
    /// Failed connections, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Why the first client was lost that had been ready.
    pub first_loss: Option<String>,
    /// Publications that the server refused, and why it refused the first.
    pub refused_publications: u64,
    pub first_refusal: Option<String>,
    /// Why the run cannot continue.
    pub failure: Option<String>,
}

/// Counts of one group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    pub published: u64,
    /// Messages that were due and could not be sent.
    pub unsent: u64,
    /// Distinct (listener, message) pairs.
    pub delivered: u64,
    pub duplicated: u64,
    pub out_of_order: u64,
    pub foreign: u64,
    /// Listeners whose connection ended.
    pub lost: u64,
    /// How often a visitor came back.
    pub visits: u64,
    pub visitors_delivered: u64,
    /// Messages missing between the first and the last that a visitor received.
    pub visitors_missing: u64,
    pub latency: Sparse,
}

impl Tally {
    /// Takes the counts and resets them.
    pub fn take(&mut self) -> Self {
        std::mem::take(self)
    }

    /// Adds all counts but not the latencies.
    pub fn add(&mut self, other: &Self) {
        self.published += other.published;
        self.unsent += other.unsent;
        self.delivered += other.delivered;
        self.duplicated += other.duplicated;
        self.out_of_order += other.out_of_order;
        self.foreign += other.foreign;
        self.lost += other.lost;
        self.visits += other.visits;
        self.visitors_delivered += other.visitors_delivered;
        self.visitors_missing += other.visitors_missing;
    }
}

impl Plan {
    /// How many clients there are, over all groups.
    pub fn clients(&self) -> u32 {
        self.groups.iter().map(Group::clients).sum()
    }

    /// The clients of this part: group, place and number.
    pub fn own(&self) -> impl Iterator<Item = (usize, Place, u32)> {
        let all = self.groups.iter().enumerate().flat_map(|(number, group)| {
            (0..group.clients()).map(move |client| (number, group.place(client)))
        });
        all.zip(0..).filter_map(|((group, place), number)| {
            (number % self.parts == self.part).then_some((group, place, number))
        })
    }
}

impl Group {
    /// How many clients the group has: listeners, stalled, visitors, and publishers if they are clients too.
    pub fn clients(&self) -> u32 {
        let publishers = if self.publishes_by_client() { self.rooms } else { 0 };
        self.listeners() + self.stalled + self.visitors + publishers
    }

    /// The shape of a message.
    pub fn shape(&self) -> Shape {
        Shape::new(self.payload, self.size)
    }

    /// How many clients are measured.
    pub fn listeners(&self) -> u32 {
        self.rooms / self.rooms_per_client * self.members
    }

    /// The place of client `number` of the group.
    pub fn place(&self, number: u32) -> Place {
        let mut number = number;
        if number < self.listeners() {
            let blocks = self.rooms / self.rooms_per_client;
            let room = number % blocks * self.rooms_per_client;
            return Place { room, index: number / blocks, role: Role::Listener };
        }
        number -= self.listeners();
        for (count, role) in [(self.stalled, Role::Stalled), (self.visitors, Role::Visitor)] {
            if number < count {
                return Place { room: number % self.rooms, index: number / self.rooms, role };
            }
            number -= count;
        }
        Place { room: number, index: 0, role: Role::Publisher }
    }

    /// The identity of a client.
    pub fn seat(&self, place: Place, number: u32) -> Seat {
        let room = self.first_room + place.room;
        let rooms = self.rooms_of(place.role);
        Seat { user: number, room, rooms, stays: false, since: None, listens: place.role != Role::Publisher }
    }

    /// How many rooms a client is in.
    pub fn rooms_of(&self, role: Role) -> u32 {
        if role == Role::Listener { self.rooms_per_client } else { 1 }
    }

    /// How many publishers a room has.
    pub fn voices(&self) -> u32 {
        match self.publishers {
            Publishers::Nobody => 0,
            Publishers::One => 1,
            Publishers::Members => self.members,
        }
    }

    /// The room and the publisher of message `number`: rooms take turns, and the publishers of a room too.
    pub fn voice(&self, number: u64) -> (u32, u32) {
        let (rooms, voices) = (u64::from(self.rooms), u64::from(self.voices().max(1)));
        let room = u32::try_from(number % rooms).unwrap_or(0);
        (room, u32::try_from(number / rooms % voices).unwrap_or(0))
    }

    /// When message `number` is due, in nanoseconds after the first: together with the others of its burst.
    pub fn due(&self, number: u64) -> u64 {
        clock::due(number - number % self.burst, self.rate)
    }

    /// How many messages are due within `duration` nanoseconds.
    pub fn due_within(&self, duration: u64) -> u64 {
        if self.publishers == Publishers::Nobody {
            return 0;
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "rates and durations are bounded and not negative"
        )]
        let all = (clock::seconds(duration) * self.rate).round() as u64;
        all.min(self.messages.unwrap_or(u64::MAX))
    }

    /// For how many of the `duration` nanoseconds messages are due.
    pub fn lasts(&self, duration: u64) -> u64 {
        clock::due(self.due_within(duration), self.rate)
    }

    /// Deliveries that `published` messages should lead to.
    pub fn expected(&self, published: u64) -> u64 {
        let deaf = u32::from(self.publishers == Publishers::Members && !self.echo);
        published * u64::from(self.members - deaf.min(self.members))
    }

    fn publishes_by_client(&self) -> bool {
        self.publishers == Publishers::One && self.target.publishes_by_client()
    }
}

impl TargetArgs {
    /// Whether [`resolve`](Self::resolve) will return [`Via::Client`](crate::target::Via::Client).
    fn publishes_by_client(&self) -> bool {
        use crate::target::{Protocol, PublishArg};
        match &self.publish {
            PublishArg::Client => self.protocol != Protocol::Sse,
            PublishArg::Http => false,
            PublishArg::Elsewhere(url) => {
                let scheme = url.split_once(':').map_or("", |(scheme, _)| scheme);
                scheme.eq_ignore_ascii_case("ws") || scheme.eq_ignore_ascii_case("wss")
            }
        }
    }
}

#[cfg(test)]
pub mod tests {
    use std::collections::HashSet;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        target: TargetArgs,
    }

    pub fn group(rooms: u32, members: u32, publishers: Publishers) -> Group {
        Group {
            name: "test".into(),
            target: Only::parse_from(["test"]).target,
            first_room: 5,
            rooms,
            members,
            rooms_per_client: 1,
            publishers,
            echo: true,
            rate: 100.0,
            size: 64,
            payload: Payload::Dots,
            burst: 1,
            messages: None,
            stalled: 0,
            visitors: 0,
            churn: 0.0,
        }
    }

    #[test]
    fn every_client_belongs_to_exactly_one_process() {
        let mut other = group(2, 4, Publishers::Members);
        (other.stalled, other.visitors) = (3, 5);
        let groups = vec![group(3, 10, Publishers::One), other];
        let mut seen = HashSet::new();
        for part in 0..3 {
            let plan = Plan {
                run: 1,
                groups: groups.clone(),
                part,
                parts: 3,
                ramp: 0,
                at_once: 1,
                tolerant: false,
                client_cpu: None,
            };
            assert_eq!(plan.clients(), 33 + 16);
            for (group, place, number) in plan.own() {
                assert_eq!(number % 3, part);
                assert!(place.room < plan.groups[group].rooms);
                assert!(seen.insert((group, place.room, place.index, place.role as u8)), "{place:?}");
            }
        }
        assert_eq!(seen.len(), 49);
    }

    #[test]
    fn a_client_in_several_rooms_counts_for_each() {
        let group = Group { rooms_per_client: 3, ..group(6, 2, Publishers::One) };
        assert_eq!(group.listeners(), 4);
        let seats: Vec<_> = (0..4).map(|number| group.seat(group.place(number), number)).collect();
        let rooms: Vec<_> = seats.iter().map(|seat| (seat.room, seat.rooms)).collect();
        assert_eq!(rooms, [(5, 3), (8, 3), (5, 3), (8, 3)], "rooms start with 5");
        assert_eq!(group.expected(10), 20);
        assert_eq!(group.seat(group.place(5), 5).rooms, 1, "a publisher has its own room");
    }

    #[test]
    fn rooms_and_publishers_take_turns() {
        let group = group(3, 2, Publishers::Members);
        let voices: Vec<_> = (0..7).map(|number| group.voice(number)).collect();
        assert_eq!(voices, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 0)]);
        assert_eq!(group.expected(10), 20);
        assert_eq!(Group { echo: false, ..group.clone() }.expected(10), 10);
        assert_eq!(Group { publishers: Publishers::One, echo: false, ..group }.expected(10), 20);
    }

    #[test]
    fn a_burst_is_due_together_and_the_rate_holds() {
        let group = Group { burst: 4, messages: Some(150), ..group(1, 1, Publishers::One) };
        let due: Vec<_> = (0..9).map(|number| group.due(number) / 1_000_000).collect();
        assert_eq!(due, [0, 0, 0, 0, 40, 40, 40, 40, 80]);
        assert_eq!(group.due_within(clock::SECOND), 100);
        assert_eq!(group.due_within(2 * clock::SECOND), 150);
        assert_eq!(Group { publishers: Publishers::Nobody, ..group }.due_within(clock::SECOND), 0);
    }
}

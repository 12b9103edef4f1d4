//! From a publication to the bytes for the members: finding the room, and encoding once per format.
//!
//! `cargo bench -p tidegate --bench delivery`

use std::{collections::VecDeque, hint::black_box, sync::Arc};

use broker_bridge::{
    Affinity, Broker, Data, Publication, PublishRequest, Publisher, Receipt, RoomName, SessionId,
    memory::{MemoryBroker, MemoryBus},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use prometheus::Registry;
use tidegate::{
    auth::Keyring,
    budget::Budget,
    clock::Time,
    config::{Config, Sources},
    framing::{Broadcast, Encoding, Format, Frame, MemberState, Transport},
    history::Beginning,
    hub::{FanOut, Hub, HubMetrics},
    protocol::{Ask, On, TABLE},
    settings::Settings,
    shard::{Inbox, ShardEvent},
};

const ROOMS: usize = 100_000;
const INBOX: usize = 64 * 1024 * 1024;

fn hub(c: &mut Criterion) {
    let inbox = Arc::new(Inbox::new(INBOX));
    let registry = Registry::new();
    let metrics = Arc::new(HubMetrics::register(&registry).expect("the registry is new"));
    let budget = Budget::register(&registry, 1).expect("the registry is new");
    let fan_out = FanOut::new(Box::new([Arc::clone(&inbox) as _]), metrics, budget, Time::default());
    let broker: Arc<dyn Broker> = Arc::new(MemoryBroker::new(&MemoryBus::new()));
    let hub = Hub::new(fan_out, Arc::clone(&broker));
    let publish = |room: &RoomName, publication: Publication| {
        let (affinity, receipt) = (Affinity::default(), Receipt::ignored());
        let request =
            PublishRequest { room: room.clone(), publication, history: None, id: None, affinity, receipt };
        broker.try_publish(request).expect("the memory broker has no queue");
    };
    let rooms: Vec<_> = (0..ROOMS).map(|number| room(&format!("chat:{number}"))).collect();
    for room in &rooms {
        drop(hub.join(room, 0, None, Beginning::Live));
    }
    let publication = publication(r#"{"text":"hello"}"#);
    let mut next = rooms.iter().cycle().step_by(7919); // nothing of the room before is in a cache

    let mut group = c.benchmark_group("hub of 100,000 rooms");
    group.bench_function("find a room and post to its shard", |b| {
        let (mut events, mut done) = (VecDeque::new(), 0);
        b.iter(|| {
            publish(next.next().expect("a cycle does not end"), publication.clone());
            inbox.take(&mut events, std::mem::take(&mut done));
            for event in events.drain(..) {
                if let ShardEvent::Broadcast(broadcast) = event {
                    done += broadcast.cost();
                }
            }
        });
    });
    for room in &rooms {
        hub.leave(room, 0);
    }
    group.bench_function("find a room that everybody has left", |b| {
        b.iter(|| publish(next.next().expect("a cycle does not end"), publication.clone()));
    });
}

fn formats(c: &mut Criterion) {
    let room = room("chat:lobby");
    let large = format!("[{}\"\"]", "{\"text\":\"hello\"},".repeat(4096));
    let mut group = c.benchmark_group("format");
    for (encoding, name) in encodings(&room) {
        for (size, text) in [("16 B", r#"{"text":"hello"}"#), ("64 KiB", &large)] {
            let publication = publication(text);
            group.throughput(Throughput::Bytes(text.len() as u64));
            group.bench_function(format!("{name}, {size}"), |b| {
                b.iter(|| encoding.encode(black_box(&room), black_box(&publication), None));
            });
        }
    }
}

/// What a member with a private head costs more than one that shares everything.
fn heads(c: &mut Criterion) {
    static SHARED: Format =
        Format { write: |_, publication, _, out| out.put(publication.data.bytes()), head: None };
    static PRIVATE: Format = Format {
        write: |_, publication, _, out| out.put(publication.data.bytes()),
        head: Some(|state, out| out.put(&state.id)),
    };
    let broadcast = Broadcast::new(room("chat:lobby"), publication(r#"{"text":"hello"}"#), 1);
    let mut group = c.benchmark_group("member's frame");
    for (name, format) in [("shared", &SHARED), ("with a head of its own", &PRIVATE)] {
        let encoding = Encoding::new(format, Transport::WebSocket);
        let states: Vec<_> = (0..10_000)
            .map(|n| MemberState {
                id: format!("subscription-{n} ").into_bytes().into(),
                ..Default::default()
            })
            .collect();
        let mut next = states.iter().cycle();
        group.bench_function(name, |b| {
            b.iter(|| {
                let shared = broadcast.frame(encoding, 0).into_owned();
                match encoding.head(next.next().expect("a cycle does not end"), None, shared.len()) {
                    Some(head) => Frame::split(head, shared),
                    None => shared.into(),
                }
            });
        });
    }
}

/// How each protocol writes the publications of a room, by the route that a session was opened on.
fn encodings(room: &RoomName) -> Vec<(Encoding, String)> {
    let config = Config::load(&Sources::default()).expect("the defaults are valid");
    let settings = Settings::new(&config, Arc::new(Keyring::new(Vec::new(), Vec::new())));
    let request = http::Request::get("/?room=a&room=b").body(()).expect("a request");
    let ask = Ask { request: &request.into_parts().0, settings: &settings, room: Some(room.clone()) };
    let routes = TABLE.iter().flat_map(|endpoint| endpoint.routes.iter().map(move |route| (endpoint, route)));
    let encodings = routes.filter_map(|(endpoint, route)| {
        let (transport, open) = match route.on {
            On::WebSocket { open, .. } => (Transport::WebSocket, open),
            On::Stream { open, .. } => (Transport::Body, open),
            On::Request { .. } => return None,
        };
        let mut protocol = (open(&ask).expect("a session").protocol)();
        let encoding = Encoding::new(protocol.format(room, 0).format, transport);
        Some((encoding, format!("{} {}", endpoint.name, route.path)))
    });
    encodings.collect()
}

fn room(name: &str) -> RoomName {
    RoomName::new(name).expect("a valid name")
}

fn publication(text: &str) -> Publication {
    let data = Data::json(text.to_owned()).expect("the payloads are JSON");
    let publisher = Publisher { user: Some("alice".into()), session: SessionId(7) };
    Publication { publisher: Some(publisher), ..Publication::new(data) }
}

criterion_group!(benches, hub, formats, heads);
criterion_main!(benches);

//! From a publication to the bytes for the members: finding the room, and encoding once per format.
//!
//! `cargo bench -p tidegate --bench delivery`

use std::{hint::black_box, sync::Arc};

use broker_bridge::{
    Broker, Data, Publication, Publisher, RoomName, SessionId, Sink as _,
    memory::{MemoryBroker, MemoryBus},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use prometheus::Registry;
use tidegate::{
    budget::Budget,
    hub::{FanOut, Hub, HubMetrics},
    protocol::WireFormat,
    shard::{Event, Inbox},
};

const ROOMS: usize = 100_000;
const INBOX: usize = 64 * 1024 * 1024;

fn hub(c: &mut Criterion) {
    let inbox = Arc::new(Inbox::new(INBOX));
    let registry = Registry::new();
    let metrics = Arc::new(HubMetrics::register(&registry).expect("the registry is new"));
    let budget = Budget::register(&registry, 1).expect("the registry is new");
    let fan_out = Arc::new(FanOut::new(Box::new([Arc::clone(&inbox) as _]), metrics, budget));
    let broker: Arc<dyn Broker> = Arc::new(MemoryBroker::new(&MemoryBus::new(), Arc::clone(&fan_out) as _));
    let hub = Hub::new(Arc::clone(&fan_out), broker);
    let rooms: Vec<_> = (0..ROOMS).map(|number| room(&format!("chat:{number}"))).collect();
    for room in &rooms {
        drop(hub.join(room, 0));
    }
    let publication = publication(r#"{"text":"hello"}"#);
    let mut next = rooms.iter().cycle().step_by(7919); // nothing of the room before is in a cache

    let mut group = c.benchmark_group("hub of 100,000 rooms");
    group.bench_function("find a room and post to its shard", |b| {
        let (mut events, mut done) = (Vec::new(), 0);
        b.iter(|| {
            fan_out.publication(next.next().expect("a cycle does not end"), publication.clone());
            inbox.take(&mut events, std::mem::take(&mut done));
            for event in events.drain(..) {
                if let Event::Broadcast(broadcast) = event {
                    done += broadcast.cost();
                }
            }
        });
    });
    for room in &rooms {
        hub.leave(room, 0);
    }
    group.bench_function("find a room that everybody has left", |b| {
        b.iter(|| fan_out.publication(next.next().expect("a cycle does not end"), publication.clone()));
    });
}

fn formats(c: &mut Criterion) {
    let room = room("chat:lobby");
    let large = format!("[{}\"\"]", "{\"text\":\"hello\"},".repeat(4096));
    let mut group = c.benchmark_group("format");
    for (format, name) in [
        (WireFormat::PlainFrame, "plain"),
        (WireFormat::Event, "event stream"),
        (WireFormat::RoomEvent, "event stream of several rooms"),
        (WireFormat::CentrifugePush, "Centrifuge"),
    ] {
        for (size, text) in [("16 B", r#"{"text":"hello"}"#), ("64 KiB", &large)] {
            let publication = publication(text);
            group.throughput(Throughput::Bytes(text.len() as u64));
            group.bench_function(format!("{name}, {size}"), |b| {
                b.iter(|| format.encode(black_box(&room), black_box(&publication)));
            });
        }
    }
}

fn room(name: &str) -> RoomName {
    RoomName::new(name).expect("a valid name")
}

fn publication(text: &str) -> Publication {
    let data = Data::json(text.to_owned()).expect("the payloads are JSON");
    let publisher = Publisher { user: Some("alice".into()), session: SessionId(7) };
    Publication { publisher: Some(publisher), ..Publication::new(data) }
}

criterion_group!(benches, hub, formats);
criterion_main!(benches);

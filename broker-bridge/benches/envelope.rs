//! A publication written for Redis and read from it; writing includes the copy that joins the head and the data.
//!
//! `cargo bench -p broker-bridge --features fuzz`

use std::hint::black_box;

use broker_bridge::{Data, EventName, Publication, Publisher, SessionId, redis::fuzz};
use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

fn envelope(c: &mut Criterion) {
    let mut group = c.benchmark_group("envelope");
    for (size, length) in [("64 B", 64), ("64 KiB", 64 * 1024)] {
        let text = Bytes::from(format!("\"{}\"", "a".repeat(length - 2)));
        let data = Data::json(text.clone()).expect("a string");
        let full = Publication {
            data,
            event: Some(EventName::new("message.created").expect("a sound name")),
            publisher: Some(Publisher { user: Some("alice".into()), session: SessionId(7) }),
            exclude: Some(SessionId(7)),
        };
        let written = Bytes::from(fuzz::encode(&full));
        group.throughput(Throughput::Bytes(length as u64));
        group.bench_function(format!("encode, {size}"), |b| b.iter(|| fuzz::encode(black_box(&full))));
        for (name, message) in [("decode", &written), ("decode a raw message", &text)] {
            group.bench_function(format!("{name}, {size}"), |b| {
                b.iter_batched(
                    || message.clone(),
                    |message| fuzz::decode(black_box(message)),
                    BatchSize::SmallInput,
                );
            });
        }
    }
}

criterion_group!(benches, envelope);
criterion_main!(benches);

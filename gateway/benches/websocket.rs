//! The codec alone: client bytes to messages, messages to frames, compressed and uncompressed.
//!
//! `cargo bench -p tidegate --bench websocket`

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use tidegate::websocket::{Decoder, Deflate, Event, Opcode, compressed, encode};

const MAX_MESSAGE: usize = 1024 * 1024;
/// The maximum size of one read of a shard.
const READ: usize = 64 * 1024;
const MASK: [u8; 4] = [0x1b, 0x9d, 0x22, 0xe4];

fn decode(c: &mut Criterion) {
    let small = frame(0x81, json(48).as_bytes()).repeat(100);
    let large = frame(0x82, &vec![7; READ]);
    let text = json(READ);
    let pieces: Vec<_> = text.as_bytes().chunks(1024).collect();
    let last = pieces.len() - 1;
    let fragmented: Vec<u8> = pieces
        .iter()
        .enumerate()
        .flat_map(|(index, piece)| {
            let (first, fin) = (u8::from(index == 0), if index == last { 0x80 } else { 0 });
            frame(first | fin, piece)
        })
        .collect();
    let deflated = masked_frame(&compressed(&encode(Opcode::Text, text.as_bytes()), Deflate::Wide));

    let mut group = c.benchmark_group("decode");
    for (name, stream) in [
        ("100 text frames of 48 B", &small),
        ("one binary frame of 64 KiB", &large),
        ("a text of 64 KiB in 64 fragments", &fragmented),
        ("a JSON of 64 KiB, deflated", &deflated),
    ] {
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_function(name, |b| {
            let mut decoder = Decoder::new();
            decoder.allow_deflate();
            // Unmasking happens in place, so every run needs a fresh copy.
            b.iter_batched_ref(|| stream.clone(), |stream| read(&mut decoder, stream), BatchSize::SmallInput);
        });
    }
}

/// Decodes a stream as a connection does, one read at a time.
fn read(decoder: &mut Decoder, stream: &mut [u8]) {
    for input in stream.chunks_mut(READ) {
        let mut feed = decoder.feed(input, MAX_MESSAGE);
        while let Some(event) = feed.next().expect("the stream follows the protocol") {
            match event {
                Event::Text(payload) | Event::Binary(payload) => drop(black_box(payload)),
                other => panic!("{other:?} was not sent"),
            }
        }
    }
}

fn write(c: &mut Criterion) {
    let mut group = c.benchmark_group("encode");
    for (name, length) in [("48 B", 48), ("4 KiB", 4 * 1024), ("64 KiB", READ)] {
        let text = json(length);
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_function(name, |b| b.iter(|| encode(Opcode::Text, black_box(text.as_bytes()))));
    }
}

fn compress(c: &mut Criterion) {
    let mut group = c.benchmark_group("compress");
    for (name, length) in [("JSON of 300 B", 300), ("JSON of 64 KiB", READ)] {
        let frame = encode(Opcode::Text, json(length).as_bytes());
        group.throughput(Throughput::Bytes(frame.len() as u64));
        for (window, deflate) in [("wide", Deflate::Wide), ("narrow", Deflate::Narrow)] {
            let _ = compressed(&frame, deflate); // the thread's tables are made once
            group.bench_function(format!("{name}, {window}"), |b| {
                b.iter(|| compressed(black_box(&frame), deflate));
            });
        }
    }
}

/// A JSON array of at least `length` bytes, as chats and tickers send.
fn json(length: usize) -> String {
    let item = |number: u32| {
        let user = number.wrapping_mul(2_654_435_761);
        format!(r#"{{"id":{number},"user":"u{user}","text":"hello"}}"#)
    };
    let mut out = format!("[{}", item(0));
    for number in 1_u32.. {
        if out.len() >= length {
            break;
        }
        out += ",";
        out += &item(number);
    }
    out + "]"
}

/// A client's frame with this first byte.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let head = tidegate::websocket::header(Opcode::Binary, payload.len());
    let (_, length) = head.as_slice().split_first().expect("a header has at least two bytes");
    let (announced, extended) = length.split_first().expect("a header has at least two bytes");
    let body = payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask);
    [first, announced | 0x80].into_iter().chain(extended.iter().copied()).chain(MASK).chain(body).collect()
}

/// A server's frame, as a client would send it.
fn masked_frame(server: &Bytes) -> Vec<u8> {
    let (first, rest) = server.split_first().expect("a frame is not empty");
    let head = match rest.first() {
        Some(126) => 3,
        Some(127) => 9,
        _ => 1,
    };
    frame(*first, rest.split_at(head).1)
}

criterion_group!(benches, decode, write, compress);
criterion_main!(benches);

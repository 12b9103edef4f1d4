//! A client's side of RFC 6455 and RFC 7692: bytes of frames, both ways.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

const FIN: u8 = 0x80;
const RSV1: u8 = 0x40;
const MASKED: u8 = 0x80;
/// What ends a flushed block, and is not sent (RFC 7692 §7.2.1).
const TAIL: [u8; 4] = [0, 0, 0xff, 0xff];

/// A whole masked frame (RFC 6455 §5.2).
pub fn masked(opcode: u8, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
    frame(FIN | opcode, payload, mask)
}

/// Likewise, compressed.
pub fn masked_and_deflated(opcode: u8, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
    let mut compress = Compress::new(Compression::fast(), false);
    let mut body = Vec::with_capacity(payload.len() * 2 + 64);
    compress.compress_vec(payload, &mut body, FlushCompress::Sync).unwrap();
    let body = body.strip_suffix(&TAIL).expect("a flushed block");
    frame(FIN | RSV1 | opcode, body, mask)
}

fn frame(first: u8, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![first];
    if payload.len() < 126 {
        frame.push(MASKED | payload.len() as u8);
    } else {
        frame.push(MASKED | 0x7e);
        frame.extend(u16::try_from(payload.len()).expect("a short message").to_be_bytes());
    }
    frame.extend(mask);
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// Takes the next frame from what a server has sent: its opcode and its payload, inflated if it was
/// compressed. `None` if it is not all there. `may_deflate` says whether compression was negotiated.
///
/// # Panics
///
/// If a server may not send that.
pub fn next_frame(input: &mut Vec<u8>, may_deflate: bool) -> Option<(u8, Vec<u8>)> {
    let (first, second) = (*input.first()?, *input.get(1)?);
    let (is_deflated, opcode) = (first & RSV1 != 0, first & 0x0f);
    assert_eq!(first & 0xb0, FIN, "whole frames, and no unknown extensions");
    assert_eq!(second & MASKED, 0, "a server does not mask");
    let (head, length) = match second {
        126 => (4, usize::from(u16::from_be_bytes([*input.get(2)?, *input.get(3)?]))),
        127 => panic!("a frame of more than 64 KiB"),
        short => (2, usize::from(short)),
    };
    assert!(head == 2 || length > 125, "the shortest form of a length");
    assert!(!is_deflated || (may_deflate && opcode < 8), "only data are compressed, if agreed");
    if input.len() < head + length {
        return None;
    }
    let frame: Vec<u8> = input.drain(..head + length).collect();
    let payload = frame.get(head..)?;
    let payload = if is_deflated { inflated(payload) } else { payload.to_vec() };
    match opcode {
        1 => assert!(std::str::from_utf8(&payload).is_ok(), "a text is UTF-8"),
        2 => {}
        8..=10 => assert!(length <= 125, "a control frame is short"),
        other => panic!("opcode {other}"),
    }
    Some((opcode, payload))
}

fn inflated(body: &[u8]) -> Vec<u8> {
    let mut inflate = Decompress::new(false);
    let mut message = Vec::with_capacity(128 * 1024);
    for part in [body, &TAIL] {
        inflate.decompress_vec(part, &mut message, FlushDecompress::Sync).expect("a DEFLATE stream");
    }
    assert_eq!(inflate.total_in(), (body.len() + TAIL.len()) as u64, "a message of less than 128 KiB");
    message
}

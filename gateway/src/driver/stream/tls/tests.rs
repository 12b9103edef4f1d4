//! TLS over a wire that moves one byte at a time, is full in between, and breaks.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, ServerName, pem::PemObject as _},
};

use super::*;

/// The socket between the node and a client.
#[derive(Default)]
struct FakeWire {
    /// From the client.
    incoming: RefCell<VecDeque<u8>>,
    /// To the client.
    outgoing: RefCell<Vec<u8>>,
    /// How many bytes a read or a write moves at most; with 0 the socket is full and has no data.
    most: Cell<usize>,
    /// Whether every other call finds the socket not ready.
    stutters: Cell<bool>,
    stuttered: Cell<bool>,
    /// The client's end is closed: a read returns the end of the stream.
    ended: Cell<bool>,
    broken: Cell<bool>,
    shut: Cell<bool>,
}

impl FakeWire {
    fn moving(most: usize) -> Self {
        Self { most: most.into(), ..Self::default() }
    }

    fn stuttering() -> Self {
        Self { stutters: true.into(), ..Self::moving(1) }
    }

    fn may_move(&self) -> io::Result<usize> {
        if self.broken.get() {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let stutter = self.stutters.get() && !self.stuttered.get();
        self.stuttered.set(stutter);
        if stutter || self.most.get() == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(self.most.get())
    }
}

impl Wire for FakeWire {
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = self.may_move()?.min(buffer.len());
        let mut incoming = self.incoming.borrow_mut();
        if incoming.is_empty() {
            return if self.ended.get() { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let count = most.min(incoming.len());
        for (place, byte) in buffer.iter_mut().zip(incoming.drain(..count)) {
            *place = byte;
        }
        Ok(count)
    }

    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        assert!(!self.shut.get(), "nothing is written after the end");
        let most = self.may_move()?;
        let before = self.outgoing.borrow().len();
        let bytes = slices.iter().flat_map(|slice| slice.iter().copied());
        self.outgoing.borrow_mut().extend(bytes.take(most));
        Ok(self.outgoing.borrow().len() - before)
    }

    fn shut(&self) {
        self.shut.set(true);
    }
}

/// The node's side and a client, before the handshake.
fn pair() -> (Tls, ClientConnection) {
    let (server, client) = configs();
    (Tls::new(server).unwrap(), client)
}

/// The node's configuration and a client that trusts it.
pub fn configs() -> (Arc<ServerConfig>, ClientConnection) {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::from_pem_slice(made.signing_key.serialize_pem().as_bytes()).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    (Arc::new(server), ClientConnection::new(Arc::new(client), name).unwrap())
}

/// Moves data between the client and the wire. Returns the plaintext that the client has received.
fn carry(client: &mut ClientConnection, wire: &FakeWire) -> Vec<u8> {
    let mut said = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut said).unwrap();
    }
    wire.incoming.borrow_mut().extend(said);
    let outgoing = wire.outgoing.take();
    let (mut rest, mut told) = (&outgoing[..], Vec::new());
    // An empty read would be the end of the stream.
    while !rest.is_empty() {
        client.read_tls(&mut rest).unwrap();
        client.process_new_packets().unwrap();
        match client.reader().read_to_end(&mut told) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => panic!("{error}"),
            _ => {}
        }
    }
    told
}

fn introduce(tls: &mut Tls, client: &mut ClientConnection, wire: &FakeWire) {
    loop {
        match tls.handshake(wire).unwrap() {
            Handshake::WantsProcessing => tls.process().unwrap(),
            Handshake::Done if !client.is_handshaking() => break,
            _ => drop(carry(client, wire)),
        }
    }
    carry(client, wire);
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

#[test]
fn a_wire_that_moves_a_byte_at_a_time_loses_none() {
    let (mut tls, mut client) = pair();
    let wire = FakeWire::stuttering();
    introduce(&mut tls, &mut client, &wire);

    let sent = pattern(50_000);
    let (mut taken, mut arrived) = (0, Vec::new());
    while taken < sent.len() || tls.has_unsent() {
        let rest = &sent[taken..];
        let (one, two) = rest.split_at(rest.len() / 3);
        let outcome = if rest.is_empty() {
            tls.flush(&wire).map(|()| 0)
        } else {
            tls.try_write(&wire, &[IoSlice::new(one), IoSlice::new(two)])
        };
        match outcome {
            Ok(count) => taken += count,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        arrived.extend(carry(&mut client, &wire));
    }
    assert!(arrived == sent, "{} of {} bytes, or others", arrived.len(), sent.len());

    client.writer().write_all(&sent).unwrap();
    let (mut arrived, mut buffer) = (Vec::<u8>::new(), [0; 1000]);
    while arrived.len() < sent.len() {
        carry(&mut client, &wire);
        // Once announced as readable, it does not wait for the socket.
        let readable = tls.is_readable();
        match tls.try_read(&wire, &mut buffer) {
            Ok(count) => arrived.extend(&buffer[..count]),
            Err(error) => assert_eq!((error.kind(), readable), (io::ErrorKind::WouldBlock, false)),
        }
    }
    assert!(arrived == sent);
}

#[test]
fn a_full_wire_bounds_what_is_taken() {
    let (mut tls, mut client) = pair();
    let wire = FakeWire::moving(usize::MAX);
    introduce(&mut tls, &mut client, &wire);
    wire.most.set(0);
    let sent = pattern(10 * UNSENT);
    let mut taken = 0;
    let refusal = loop {
        match tls.try_write(&wire, &[IoSlice::new(&sent[taken..])]) {
            Ok(count) => taken += count,
            Err(error) => break error.kind(),
        }
    };
    assert_eq!(refusal, io::ErrorKind::WouldBlock);
    assert!((1..=UNSENT).contains(&taken), "{taken} bytes were taken for a wire that is full");
    assert!(tls.has_unsent());
    // It continues where it stopped.
    wire.most.set(usize::MAX);
    tls.flush(&wire).unwrap();
    let told = carry(&mut client, &wire);
    assert!(!tls.has_unsent() && told == sent[..taken]);
}

#[test]
fn the_wire_is_shut_after_close_notify() {
    let (mut tls, mut client) = pair();
    let wire = FakeWire::moving(usize::MAX);
    introduce(&mut tls, &mut client, &wire);
    wire.most.set(1);
    wire.stutters.set(true);
    assert_eq!(tls.try_write(&wire, &[IoSlice::new(b"last words")]).unwrap(), 10);
    while let Err(error) = tls.close(&wire) {
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(!wire.shut.get() && tls.has_unsent());
    }
    assert!(wire.shut.get());
    assert_eq!(carry(&mut client, &wire), b"last words");
    assert_eq!(client.reader().read(&mut [0]).unwrap(), 0, "the client has been told that this was all");
}

#[test]
fn an_announced_end_differs_from_an_abrupt_one() {
    for said in [true, false] {
        let (mut tls, mut client) = pair();
        let wire = FakeWire::stuttering();
        introduce(&mut tls, &mut client, &wire);
        client.writer().write_all(b"half").unwrap();
        if said {
            client.send_close_notify();
        }
        carry(&mut client, &wire);
        wire.ended.set(true);
        let (mut heard, mut buffer) = (Vec::<u8>::new(), [0; 100]);
        let end = loop {
            match tls.try_read(&wire, &mut buffer) {
                Ok(0) => break None,
                Ok(count) => heard.extend(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => break Some(error.kind()),
            }
        };
        assert_eq!(heard, b"half");
        assert_eq!(end, (!said).then_some(io::ErrorKind::UnexpectedEof), "said: {said}");
    }
}

#[test]
fn a_record_cut_in_half_is_an_error() {
    let (mut tls, mut client) = pair();
    let wire = FakeWire::moving(usize::MAX);
    introduce(&mut tls, &mut client, &wire);
    client.writer().write_all(&pattern(1000)).unwrap();
    carry(&mut client, &wire);
    wire.incoming.borrow_mut().truncate(500);
    wire.ended.set(true);
    let error = tls.try_read(&wire, &mut [0; 100]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "no byte of it was read");
}

#[test]
fn a_wire_that_breaks_is_an_error_wherever_it_breaks() {
    let (mut tls, mut client) = pair();
    let wire = FakeWire::moving(1);
    wire.broken.set(true);
    assert_eq!(tls.handshake(&wire).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    wire.broken.set(false);
    introduce(&mut tls, &mut client, &wire);
    wire.most.set(0);
    tls.try_write(&wire, &[IoSlice::new(&pattern(1000))]).unwrap();
    wire.broken.set(true);
    assert_eq!(tls.flush(&wire).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let written = tls.try_write(&wire, &[IoSlice::new(b"more")]);
    assert_eq!(written.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(tls.try_read(&wire, &mut [0; 10]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn junk_is_answered_with_an_alert_at_any_time() {
    for introduced in [false, true] {
        let (mut tls, mut client) = pair();
        let wire = FakeWire::moving(usize::MAX);
        if introduced {
            introduce(&mut tls, &mut client, &wire);
        }
        wire.outgoing.take();
        wire.incoming.borrow_mut().extend(b"\x17\x03\x03\x00\x20 these are no records at all, none");
        let outcome = if introduced {
            tls.try_read(&wire, &mut [0; 100]).map(|_| ())
        } else {
            assert_eq!(tls.handshake(&wire).unwrap(), Handshake::WantsProcessing);
            tls.process().map_err(|error| tls.fail(&wire, error))
        };
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::InvalidData, "introduced: {introduced}");
        assert!(!wire.outgoing.borrow().is_empty(), "why it ends is said");
        assert!(wire.shut.get());
    }
}

//! Sessions that wait for the verification of a token on another thread.

use std::sync::Arc;

use super::{
    Charge, Effect, Effects, Surroundings,
    transcripts::{Client, NOW, SECRET, open, token},
};
use crate::{
    auth::{Algorithm, AuthConfig, AuthFailure, Authenticator, Identity, Key, Keyring},
    limits::Allowance,
    protocol::Message,
    vocabulary::CloseReason,
};

/// A key that has signed nothing. It makes verification a matter for other threads.
const PUBLIC_KEY: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE3vYXTDq3gzpic6rdxqWlScD7R5lL
bdTrE90RXLwcD0qjw6Whw3J6YWkLX4Lvk6viHfh244Q4Qi836uniU2ja5A==
-----END PUBLIC KEY-----
";
const CONNECT_AND_SUBSCRIBE: &str =
    "{\"id\":1,\"connect\":{\"token\":\"TOKEN\"}}\n{\"id\":2,\"subscribe\":{\"channel\":\"lobby\"}}";
const UNSUBSCRIBE: &str = r#"{"id":3,"unsubscribe":{"channel":"lobby"}}"#;

fn authenticator(has_public_key: bool) -> Authenticator {
    let secret = Key::shared(None, Algorithm::Hs256, &SECRET).unwrap();
    let public = Key::public(Some("unused"), Algorithm::Es256, PUBLIC_KEY.as_bytes()).unwrap();
    let keys = std::iter::once(secret).chain(has_public_key.then_some(public)).collect();
    Authenticator::new(AuthConfig {
        keys: Arc::new(Keyring::new(keys, Vec::new())),
        ..AuthConfig::with_secret(&SECRET)
    })
}

fn receive(client: &mut Client, text: &str, authenticator: &Authenticator) -> Vec<Effect> {
    let Client { session, meters, limiters, .. } = client;
    let allowance = Allowance { session: meters, node: limiters };
    let around = Surroundings { authenticator, now: NOW, rooms_per_session: 2, allowance };
    let (mut effects, mut commands) = (Effects::default(), Vec::new());
    let text = text.replace("TOKEN", token("alice", "lobby=subscribe", 60).expose());
    let charge = Charge::default().received(text.len());
    session.receive(Message::Text(text.into()), charge, &around, &mut commands, &mut effects);
    effects.drain().collect()
}

fn verified(
    client: &mut Client,
    outcome: Result<Identity, AuthFailure>,
    authenticator: &Authenticator,
) -> Vec<Effect> {
    let Client { session, meters, limiters, .. } = client;
    let allowance = Allowance { session: meters, node: limiters };
    let around = Surroundings { authenticator, now: NOW, rooms_per_session: 2, allowance };
    let mut effects = Effects::default();
    session.verified(outcome, &around, &mut effects);
    effects.drain().collect()
}

#[test]
fn commands_behind_a_token_wait_for_it_in_order() {
    let (mut client, authenticator) = (open("session centrifuge"), authenticator(true));
    let effects = receive(&mut client, CONNECT_AND_SUBSCRIBE, &authenticator);
    let [Effect::Verify(token)] = &effects[..] else { panic!("{effects:?}") };
    assert!(client.session.is_verifying());
    let held = client.session.held();
    assert!(held > CONNECT_AND_SUBSCRIBE.len(), "{held}");
    assert_eq!(receive(&mut client, UNSUBSCRIBE, &authenticator), []);
    assert_eq!(client.session.held(), held + UNSUBSCRIBE.len());

    let outcome = authenticator.verify(token, NOW);
    let effects = verified(&mut client, outcome, &authenticator);
    let [
        Effect::Expires(_),
        Effect::Send(connected),
        Effect::Join(2, _, None),
        Effect::Leave(_),
        Effect::Send(left),
    ] = &effects[..]
    else {
        panic!("{effects:?}")
    };
    assert!(connected.windows(6).any(|window| window == b"\"id\":1"), "{connected:?}");
    assert!(left.windows(6).any(|window| window == b"\"id\":3"), "{left:?}");
    assert!(!client.session.is_verifying());
    assert_eq!(client.session.held(), 0);
}

#[test]
fn what_waits_behind_a_refused_token_is_not_done() {
    let (mut client, authenticator) = (open("session centrifuge"), authenticator(true));
    receive(&mut client, CONNECT_AND_SUBSCRIBE, &authenticator);
    let effects = verified(&mut client, Err(AuthFailure::BadSignature), &authenticator);
    let refused = [Effect::Refused(AuthFailure::BadSignature), Effect::Close(CloseReason::InvalidToken)];
    assert_eq!(effects, refused);
    assert_eq!(client.session.held(), 0);
    assert_eq!(verified(&mut client, Err(AuthFailure::BadSignature), &authenticator), [], "once");
}

#[test]
fn a_shared_secret_needs_no_other_thread() {
    let (mut client, authenticator) = (open("session centrifuge"), authenticator(false));
    let effects = receive(&mut client, CONNECT_AND_SUBSCRIBE, &authenticator);
    assert!(
        matches!(effects[..], [Effect::Expires(_), Effect::Send(_), Effect::Join(2, _, None)]),
        "{effects:?}"
    );
    assert!(!client.session.is_verifying());
}

//! Authentication and authorization: verifying tokens, by algorithm; looking up grants.
//!
//! `cargo bench -p tidegate --bench access`

use std::{hint::black_box, sync::Arc, time::Duration};

use broker_bridge::RoomName;
use criterion::{Criterion, criterion_group, criterion_main};
use tidegate::auth::{
    Algorithm, AuthConfig, Authenticator, Grant, Key, Keyring, Operation, Subject, Token, UnixSeconds,
    key::KeyError,
    mint::{Signer, Wanted},
};

const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
const SECRET: [u8; 64] = [7; 64];

fn verify(c: &mut Criterion) {
    let grants = grants(&["chat:*=subscribe,publish", "user:alice=subscribe"]);
    let mut group = c.benchmark_group("verify a token");
    for (algorithm, pair) in [
        (Algorithm::Hs256, None),
        (Algorithm::Hs384, None),
        (Algorithm::Hs512, None),
        (Algorithm::Rs256, Some(&rcgen::PKCS_RSA_SHA256)),
        (Algorithm::Rs384, Some(&rcgen::PKCS_RSA_SHA384)),
        (Algorithm::Rs512, Some(&rcgen::PKCS_RSA_SHA512)),
        (Algorithm::Ps256, Some(&rcgen::PKCS_RSA_SHA256)),
        (Algorithm::Ps384, Some(&rcgen::PKCS_RSA_SHA384)),
        (Algorithm::Ps512, Some(&rcgen::PKCS_RSA_SHA512)),
        (Algorithm::Es256, Some(&rcgen::PKCS_ECDSA_P256_SHA256)),
        (Algorithm::Es384, Some(&rcgen::PKCS_ECDSA_P384_SHA384)),
        (Algorithm::EdDsa, Some(&rcgen::PKCS_ED25519)),
    ] {
        let (node, token) = match pair {
            None => issued(algorithm, &SECRET, Key::shared(None, algorithm, &SECRET), &grants),
            Some(pair) => {
                let pair = rcgen::KeyPair::generate_for(pair).expect("a key pair can be made");
                let public = Key::public(None, algorithm, pair.public_key_pem().as_bytes());
                issued(algorithm, pair.serialize_pem().as_bytes(), public, &grants)
            }
        };
        group.bench_function(algorithm.as_str(), |b| {
            b.iter(|| node.verify(black_box(&token), NOW).expect("the token is valid"));
        });
    }
}

fn may(c: &mut Criterion) {
    let asked = RoomName::new("last:lobby").expect("a valid name");
    let mut group = c.benchmark_group("find a grant");
    for count in [1, 32, 256] {
        let others = (1..count).map(|number| format!("{number}:*=subscribe"));
        let texts: Vec<_> = others.chain(["last:*=subscribe".to_owned()]).collect();
        let grants = grants(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        let secret = Key::shared(None, Algorithm::Hs256, &SECRET);
        let (node, token) = issued(Algorithm::Hs256, &SECRET, secret, &grants);
        let identity = node.verify(&token, NOW).expect("the token is valid");
        assert!(identity.may(Operation::Subscribe, &asked) && !identity.may(Operation::Publish, &asked));
        for (outcome, operation) in [("granted", Operation::Subscribe), ("refused", Operation::Publish)] {
            group.bench_function(format!("{outcome}, of {count}"), |b| {
                b.iter(|| identity.may(black_box(operation), black_box(&asked)));
            });
        }
    }
}

/// A node that knows the key, and a token signed with it.
fn issued(
    algorithm: Algorithm,
    private: &[u8],
    key: Result<Key, KeyError>,
    grants: &[Grant],
) -> (Authenticator, Token) {
    let subject = Subject::new("alice").expect("a valid subject");
    let wanted =
        Wanted { subject: &subject, grants, issuer: None, audience: &[], ttl: Duration::from_secs(60) };
    let signer = Signer::new(algorithm, private, None).expect("a key of the algorithm");
    let token = signer.sign(&wanted, NOW).expect("the token is not too long");
    let key = key.expect("a key of the algorithm");
    let keys = Arc::new(Keyring::new(vec![key], Vec::new()));
    (Authenticator::new(AuthConfig { keys, ..AuthConfig::with_secret(&SECRET) }), token)
}

fn grants(texts: &[&str]) -> Vec<Grant> {
    texts.iter().map(|text| text.parse().expect("a valid grant")).collect()
}

criterion_group!(benches, verify, may);
criterion_main!(benches);

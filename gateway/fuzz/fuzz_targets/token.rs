//! Tokens and key sets from anybody: no input causes a panic, and no token is accepted without a valid
//! signature.
//!
//! The first byte of an input selects the kind of the rest: a complete token; a token's header, a line break,
//! and its claims, signed with the node's key that the byte selects; or a key set.
#![no_main]

use std::sync::{Arc, LazyLock};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use aws_lc_rs::{
    encoding::AsDer as _,
    hmac,
    signature::{Ed25519KeyPair, KeyPair as _},
};
use libfuzzer_sys::fuzz_target;
use tidegate::auth::{
    Algorithm, AuthConfig, Authenticator, Key, Keyring, Token, UnixSeconds,
    jwks::{Document, Origin},
};

const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
const SECRET: [u8; 64] = [7; 64];

struct Node {
    ed: Ed25519KeyPair,
    authenticator: Authenticator,
}

static NODE: LazyLock<Node> = LazyLock::new(|| {
    let ed = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).expect("a seed");
    let spki = ed.public_key().as_der().expect("a public key");
    let pem = base64::engine::general_purpose::STANDARD.encode(spki.as_ref());
    let pem = format!("-----BEGIN PUBLIC KEY-----\n{pem}\n-----END PUBLIC KEY-----\n");
    let keys = vec![
        Key::shared(None, Algorithm::Hs256, &SECRET).expect("a secret"),
        Key::shared(Some("hs"), Algorithm::Hs512, &SECRET).expect("a secret"),
        Key::public(Some("ed"), Algorithm::EdDsa, pem.as_bytes()).expect("a public key"),
    ];
    let config = AuthConfig {
        keys: Arc::new(Keyring::new(keys, Vec::new()).with_url()),
        issuer: Some("i".to_owned()),
        audience: vec!["a".to_owned()],
        ..AuthConfig::with_secret(&SECRET)
    };
    Node { ed, authenticator: Authenticator::new(config) }
});

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else { return };
    match kind % 5 {
        0 => {
            let Ok(Ok(token)) = std::str::from_utf8(rest).map(Token::new) else { return };
            // No input contains a signature by these keys, unless it was made for that.
            assert!(NODE.authenticator.verify(&token, NOW).is_err(), "{}", token.expose());
        }
        signer @ 1..=3 => signed(signer, rest),
        _ => {
            for origin in [Origin::File, Origin::Url] {
                if let Ok(document) = Document::read(rest, origin) {
                    assert!((1..=Document::MAX_KEYS).contains(&document.keys.len()));
                    assert!(document.keys.iter().all(|key| origin == Origin::File || !key.algorithm().is_shared()));
                    assert!(document.keys.iter().all(|key| !key.verifies(b"text", &[0; 64])));
                }
            }
        }
    }
});

/// Verifies a token with the input's header and claims, and a valid signature by one of the keys.
fn signed(signer: u8, rest: &[u8]) {
    let end = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
    let (header, claims) = rest.split_at(end);
    let text = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(header),
        URL_SAFE_NO_PAD.encode(claims.get(1..).unwrap_or_default())
    );
    let (name, signature) = match signer {
        1 => ("HS256", hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &SECRET), text.as_bytes()).as_ref().to_vec()),
        2 => ("HS512", hmac::sign(&hmac::Key::new(hmac::HMAC_SHA512, &SECRET), text.as_bytes()).as_ref().to_vec()),
        _ => ("Ed", NODE.ed.sign(text.as_bytes()).as_ref().to_vec()),
    };
    let Ok(token) = Token::new(&format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))) else { return };
    if let Ok(identity) = NODE.authenticator.verify(&token, NOW) {
        // The header must name the algorithm that made the signature (escapes may hide the name), and the
        // token must expire in the future.
        assert!(identity.expires_at() > NOW);
        assert!(header.contains(&b'\\') || String::from_utf8_lossy(header).contains(name));
    }
}

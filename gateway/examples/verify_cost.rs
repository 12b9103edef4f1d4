//! What it costs to verify a token, by algorithm: `cargo run --release -p tidegate --example verify_cost`.

#![allow(clippy::print_stdout, reason = "it is what the program is for")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tidegate::auth::{
    Algorithm, AuthConfig, Authenticator, Grant, Key, Keyring, Subject, UnixSeconds,
    mint::{Signer, Wanted},
};

const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
const MEASURE: Duration = Duration::from_secs(1);
const SECRET: [u8; 64] = [7; 64];

fn main() -> anyhow::Result<()> {
    let subject = Subject::new("alice")?;
    let grants: [Grant; 2] = ["chat:*=subscribe,publish".parse()?, "user:alice=subscribe".parse()?];
    for (algorithm, pair) in [
        (Algorithm::Hs256, None),
        (Algorithm::Rs256, Some(&rcgen::PKCS_RSA_SHA256)),
        (Algorithm::Ps256, Some(&rcgen::PKCS_RSA_SHA256)),
        (Algorithm::Es256, Some(&rcgen::PKCS_ECDSA_P256_SHA256)),
        (Algorithm::Es384, Some(&rcgen::PKCS_ECDSA_P384_SHA384)),
        (Algorithm::EdDsa, Some(&rcgen::PKCS_ED25519)),
    ] {
        let (key, signer) = match pair.map(rcgen::KeyPair::generate_for).transpose()? {
            None => (Key::shared(None, algorithm, &SECRET)?, Signer::new(algorithm, &SECRET, None)?),
            Some(pair) => (
                Key::public(None, algorithm, pair.public_key_pem().as_bytes())?,
                Signer::new(algorithm, pair.serialize_pem().as_bytes(), None)?,
            ),
        };
        let wanted = Wanted {
            subject: &subject,
            grants: &grants,
            issuer: None,
            audience: &[],
            ttl: Duration::from_secs(60),
        };
        let token = signer.sign(&wanted, NOW)?;
        let node = Authenticator::new(AuthConfig {
            keys: Arc::new(Keyring::new(vec![key], Vec::new())),
            ..AuthConfig::with_secret(&SECRET)
        });
        let (began, mut count) = (Instant::now(), 0_u32);
        while began.elapsed() < MEASURE {
            node.verify(&token, NOW)?;
            count += 1;
        }
        let each = began.elapsed() / count;
        println!(
            "{:<5} {:>8.1} µs a token of {} bytes",
            algorithm.as_str(),
            each.as_secs_f64() * 1e6,
            token.expose().len()
        );
    }
    Ok(())
}

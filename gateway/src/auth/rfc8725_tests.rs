//! The cases of RFC 8725 (JSON Web Token Best Current Practices) that apply to a verifier, one test each;
//! `docs/security.md` lists them. The tests sign tokens by hand, because libraries refuse to create many of
//! them.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::{
    encoding::AsDer as _,
    hmac,
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING,
        EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding,
        RsaKeyPair,
    },
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE, URL_SAFE_NO_PAD},
};
use serde_json::{Value, json};

use super::{
    Algorithm, AuthConfig, AuthFailure, Authenticator, Key, Keyring, Token, UnixSeconds,
    jwks::{Document, Origin},
};

const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
const SECRET: &[u8] = b"sixty-four bytes are what HS512 asks for, which no sentence has.";

/// An issuer with a key of each kind, and a node that trusts them.
struct World {
    rsa: RsaKeyPair,
    p256: EcdsaKeyPair,
    p384: EcdsaKeyPair,
    ed: Ed25519KeyPair,
    node: Authenticator,
}

fn pem(der: &[u8]) -> String {
    format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(der))
}

impl World {
    fn new() -> Self {
        Self::with(|config| config)
    }

    fn with(change: impl FnOnce(AuthConfig) -> AuthConfig) -> Self {
        let rsa = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
        let p256 = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        let p384 = EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap();
        let ed = Ed25519KeyPair::generate().unwrap();
        let public =
            |id, algorithm, der: &[u8]| Key::public(Some(id), algorithm, pem(der).as_bytes()).unwrap();
        let keys = vec![
            Key::shared(Some("hs"), Algorithm::Hs256, SECRET).unwrap(),
            public("rs", Algorithm::Rs256, rsa.public_key().as_der().unwrap().as_ref()),
            public("ps", Algorithm::Ps256, rsa.public_key().as_der().unwrap().as_ref()),
            public("es", Algorithm::Es256, p256.public_key().as_der().unwrap().as_ref()),
            public("es3", Algorithm::Es384, p384.public_key().as_der().unwrap().as_ref()),
            public("ed", Algorithm::EdDsa, ed.public_key().as_der().unwrap().as_ref()),
        ];
        let config = AuthConfig {
            keys: Arc::new(Keyring::new(keys, Vec::new())),
            issuer: None,
            audience: Vec::new(),
            leeway: Duration::ZERO,
            policies: Vec::new(),
        };
        Self { rsa, p256, p384, ed, node: Authenticator::new(change(config)) }
    }

    fn verify(&self, token: &str) -> Result<(), AuthFailure> {
        self.node.verify(&Token::new(token)?, NOW).map(drop)
    }

    fn rsa(&self, encoding: &'static dyn RsaEncoding, text: &str) -> Vec<u8> {
        let mut signature = vec![0; self.rsa.public_modulus_len()];
        self.rsa.sign(encoding, &SystemRandom::new(), text.as_bytes(), &mut signature).unwrap();
        signature
    }

    /// Signs the claims with `algorithm`, whatever the header says.
    fn sign(&self, algorithm: Algorithm, header: &str, claims: &str) -> String {
        let text = format!("{}.{}", encode(header), encode(claims));
        let signature = match algorithm {
            Algorithm::Rs256 => self.rsa(&RSA_PKCS1_SHA256, &text),
            Algorithm::Ps256 => self.rsa(&RSA_PSS_SHA256, &text),
            Algorithm::Es256 => {
                self.p256.sign(&SystemRandom::new(), text.as_bytes()).unwrap().as_ref().to_vec()
            }
            Algorithm::Es384 => {
                self.p384.sign(&SystemRandom::new(), text.as_bytes()).unwrap().as_ref().to_vec()
            }
            Algorithm::EdDsa => self.ed.sign(text.as_bytes()).as_ref().to_vec(),
            _ => hmac_of(algorithm, SECRET, &text),
        };
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// A valid token for each key.
    fn good(&self) -> Vec<(Algorithm, String)> {
        let algorithms = [
            (Algorithm::Hs256, "hs"),
            (Algorithm::Rs256, "rs"),
            (Algorithm::Ps256, "ps"),
            (Algorithm::Es256, "es"),
            (Algorithm::Es384, "es3"),
            (Algorithm::EdDsa, "ed"),
        ];
        let token = |(algorithm, id)| (algorithm, self.sign(algorithm, &header(algorithm, id), &claims()));
        algorithms.map(token).into()
    }
}

fn hmac_of(algorithm: Algorithm, secret: &[u8], text: &str) -> Vec<u8> {
    let hash = match algorithm {
        Algorithm::Hs384 => hmac::HMAC_SHA384,
        Algorithm::Hs512 => hmac::HMAC_SHA512,
        _ => hmac::HMAC_SHA256,
    };
    hmac::sign(&hmac::Key::new(hash, secret), text.as_bytes()).as_ref().to_vec()
}

fn encode(text: &str) -> String {
    URL_SAFE_NO_PAD.encode(text)
}

fn header(algorithm: Algorithm, id: &str) -> String {
    json!({ "alg": algorithm.as_str(), "kid": id, "typ": "JWT" }).to_string()
}

fn claims() -> String {
    json!({ "sub": "alice", "exp": NOW.0 + 60, "rooms": { "*": ["subscribe"] } }).to_string()
}

fn with_claims(more: &Value) -> String {
    let mut claims: Value = serde_json::from_str(&claims()).unwrap();
    claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    claims.to_string()
}

#[test]
fn section_2_1_an_unsigned_token_is_refused_in_any_spelling_of_none() {
    let world = World::new();
    for none in ["none", "None", "NONE", "nOnE", "", " none", "none ", "no\\u006ee", "null"] {
        for kid in ["", r#","kid":"rs""#, r#","kid":"hs""#] {
            let header = format!(r#"{{"alg":"{none}"{kid}}}"#);
            let unsigned = format!("{}.{}.", encode(&header), encode(&claims()));
            assert_eq!(world.verify(&unsigned), Err(AuthFailure::WrongAlgorithm), "{header}");
            for (algorithm, _) in world.good() {
                let signed = world.sign(algorithm, &header, &claims());
                assert_eq!(world.verify(&signed), Err(AuthFailure::WrongAlgorithm), "{header}");
            }
        }
    }
    // A supported algorithm without a signature.
    for (_, good) in world.good() {
        let (text, _) = good.rsplit_once('.').unwrap();
        assert_eq!(world.verify(&format!("{text}.")), Err(AuthFailure::BadSignature));
    }
}

/// The attacker knows every public key in every format, and uses each as an HMAC secret.
#[test]
fn section_2_1_a_public_key_is_not_an_hmac_secret() {
    let world = World::new();
    let rsa = world.rsa.public_key().as_der().unwrap();
    let (rsa_pkcs1, rsa) = (world.rsa.public_key().as_ref(), rsa.as_ref());
    let p256 = world.p256.public_key().as_der().unwrap();
    let ed = world.ed.public_key().as_der().unwrap();
    let jwk = json!({ "e": "AQAB", "kty": "RSA", "n": URL_SAFE_NO_PAD.encode(rsa_pkcs1) }).to_string();
    for known in [
        pem(rsa).into_bytes(),
        pem(rsa).trim_end().as_bytes().to_vec(),
        rsa.to_vec(),
        rsa_pkcs1.to_vec(),
        STANDARD.encode(rsa).into_bytes(),
        jwk.into_bytes(),
        pem(p256.as_ref()).into_bytes(),
        p256.as_ref().to_vec(),
        world.p256.public_key().as_ref().to_vec(),
        pem(ed.as_ref()).into_bytes(),
        world.ed.public_key().as_ref().to_vec(),
    ] {
        for algorithm in [Algorithm::Hs256, Algorithm::Hs384, Algorithm::Hs512] {
            for id in [Some("rs"), Some("ps"), Some("es"), Some("ed"), Some("hs"), Some("other"), None] {
                let header = json!({ "alg": algorithm.as_str(), "kid": id }).to_string();
                let header = if id.is_none() { header.replace(r#","kid":null"#, "") } else { header };
                let text = format!("{}.{}", encode(&header), encode(&claims()));
                let forged = URL_SAFE_NO_PAD.encode(hmac_of(algorithm, &known, &text));
                let expected = match (algorithm, id) {
                    (Algorithm::Hs256, Some("hs") | None) => AuthFailure::BadSignature,
                    (_, Some("other")) => AuthFailure::UnknownKey,
                    _ => AuthFailure::WrongAlgorithm,
                };
                assert_eq!(world.verify(&format!("{text}.{forged}")), Err(expected), "{header}");
            }
        }
    }
}

#[test]
fn section_3_1_each_key_has_one_algorithm() {
    let world = World::new();
    for (_, good) in world.good() {
        assert_eq!(world.verify(&good), Ok(()));
    }
    let ids = ["hs", "rs", "ps", "es", "es3", "ed"];
    let own = [
        Algorithm::Hs256,
        Algorithm::Rs256,
        Algorithm::Ps256,
        Algorithm::Es256,
        Algorithm::Es384,
        Algorithm::EdDsa,
    ];
    for (id, own) in ids.into_iter().zip(own) {
        for named in Algorithm::ALL.into_iter().filter(|named| *named != own) {
            // Signed by the right key, but with another algorithm in the header, and with that other
            // algorithm.
            for signed in [own, named] {
                let signed = if signed == Algorithm::Hs384 || own_key(signed) { signed } else { own };
                let token = world.sign(signed, &header(named, id), &claims());
                assert_eq!(world.verify(&token), Err(AuthFailure::WrongAlgorithm), "{id} {named:?}");
            }
        }
        // With the key's own algorithm, but signed with every other key.
        for signed in own_algorithms().filter(|signed| *signed != own) {
            let token = world.sign(signed, &header(own, id), &claims());
            assert_eq!(world.verify(&token), Err(AuthFailure::BadSignature), "{id} {signed:?}");
        }
    }
    let unnamed = |algorithm: Algorithm| json!({ "alg": algorithm.as_str() }).to_string();
    assert_eq!(world.verify(&world.sign(Algorithm::Ps256, &unnamed(Algorithm::Ps256), &claims())), Ok(()));
    let longer = world.sign(Algorithm::Hs384, &unnamed(Algorithm::Hs384), &claims());
    assert_eq!(world.verify(&longer), Err(AuthFailure::WrongAlgorithm), "HS384 with an HS256 key");
}

fn own_algorithms() -> impl Iterator<Item = Algorithm> {
    Algorithm::ALL.into_iter().filter(|algorithm| own_key(*algorithm))
}

fn own_key(algorithm: Algorithm) -> bool {
    use Algorithm::{EdDsa, Es256, Es384, Hs256, Ps256, Rs256};
    matches!(algorithm, Hs256 | Rs256 | Ps256 | Es256 | Es384 | EdDsa)
}

#[test]
fn section_3_3_nested_and_encrypted_tokens_are_refused() {
    let world = World::new();
    let (_, inner) = world.good().remove(3);
    // A signed token nested in a signed token (`cty`); the verifier does not unwrap it.
    let outer = world.sign(Algorithm::Es256, r#"{"alg":"ES256","kid":"es","cty":"JWT"}"#, &inner);
    assert_eq!(world.verify(&outer), Err(AuthFailure::InvalidPayload));
    // Encrypted tokens have five parts, whatever their header says.
    for header in [r#"{"alg":"RSA-OAEP","enc":"A256GCM"}"#, r#"{"alg":"ES256","kid":"es"}"#] {
        for parts in ["a.b.c.d", "...", "a.b.c", "a.b.c.d.e"] {
            let token = format!("{}.{parts}", encode(header));
            assert_eq!(world.verify(&token), Err(AuthFailure::Malformed), "{token}");
        }
    }
    // The JSON serializations of RFC 7515 §7.2 contain characters that no token has.
    assert_eq!(world.verify(r#"{"payload":"","signatures":[]}"#), Err(AuthFailure::Malformed));
}

#[test]
fn section_3_4_signatures_have_one_form_and_keys_their_own_curve() {
    let world = World::new();
    let text = format!("{}.{}", encode(&header(Algorithm::Es256, "es")), encode(&claims()));
    let token = |signature: &[u8]| format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature));
    let pkcs8 = world.p256.to_pkcs8v1().unwrap();
    let der = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref()).unwrap();
    let der = der.sign(&SystemRandom::new(), text.as_bytes()).unwrap();
    let raw = world.p256.sign(&SystemRandom::new(), text.as_bytes()).unwrap();
    assert_eq!(world.verify(&token(raw.as_ref())), Ok(()));
    // The order of the curve's group: r and s must be below it.
    let order = [
        0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xbc, 0xe6, 0xfa,
        0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
    ];
    let (r, s) = raw.as_ref().split_at(32);
    let one = [&[0; 31][..], &[1]].concat();
    for wrong in [
        der.as_ref().to_vec(),
        vec![0; 64],
        vec![0; 96],
        vec![0xff; 64],
        [order, order].concat(),
        [r, &[0; 32]].concat(),
        [&[0; 32], s].concat(),
        [&order, s].concat(),
        [&one[..], &one].concat(),
        [&[0], r, &[0], s].concat(),
        [raw.as_ref(), &[0]].concat(),
        raw.as_ref()[..63].to_vec(),
        [s, r].concat(),
        Vec::new(),
    ] {
        assert_eq!(world.verify(&token(&wrong)), Err(AuthFailure::BadSignature), "{wrong:?}");
    }
    // The other curve, under either id.
    for (named, id, signed) in
        [(Algorithm::Es256, "es", Algorithm::Es384), (Algorithm::Es384, "es3", Algorithm::Es256)]
    {
        let token = world.sign(signed, &header(named, id), &claims());
        assert_eq!(world.verify(&token), Err(AuthFailure::BadSignature));
    }
    // Keys off their curve, with a small RSA modulus or for another curve are refused when they are loaded:
    // see `key_tests`.
}

#[test]
fn section_3_5_weak_secrets_are_refused() {
    for (algorithm, length) in [(Algorithm::Hs256, 31), (Algorithm::Hs384, 47), (Algorithm::Hs512, 63)] {
        assert!(Key::shared(None, algorithm, &vec![b'x'; length]).is_err());
        assert!(Key::shared(None, algorithm, &vec![b'x'; length + 1]).is_ok());
    }
}

#[test]
fn section_3_6_a_compressed_payload_is_not_inflated() {
    let world = World::new();
    // Raw DEFLATE output for `{}`. `zip` is for encryption only (RFC 7516 §4.1.3) and is ignored here.
    let deflated = "\u{ab}\u{ae}\u{5}\0";
    let token = world.sign(Algorithm::EdDsa, r#"{"alg":"EdDSA","kid":"ed","zip":"DEF"}"#, deflated);
    assert_eq!(world.verify(&token), Err(AuthFailure::InvalidPayload));
}

#[test]
fn section_3_7_text_is_utf_8() {
    let world = World::new();
    let raw = |header: &[u8], payload: &[u8]| {
        let text = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(hmac_of(Algorithm::Hs256, SECRET, &text)))
    };
    let good = br#"{"alg":"HS256","kid":"hs"}"#;
    assert_eq!(world.verify(&raw(good, claims().as_bytes())), Ok(()));
    let latin1 = b"{\"alg\":\"HS256\",\"kid\":\"h\xe9\"}";
    assert_eq!(world.verify(&raw(latin1, claims().as_bytes())), Err(AuthFailure::Malformed));
    let utf16: Vec<u8> = String::from_utf8_lossy(good).encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(world.verify(&raw(&utf16, claims().as_bytes())), Err(AuthFailure::Malformed));
    let marked = [b"\xef\xbb\xbf", &good[..]].concat();
    assert_eq!(world.verify(&raw(&marked, claims().as_bytes())), Err(AuthFailure::Malformed));
    let payload = b"{\"sub\":\"\xff\",\"exp\":1900000000}";
    // A claim kept as raw JSON is checked for UTF-8 only when it is parsed.
    let refused = world.verify(&raw(good, payload));
    assert!(matches!(refused, Err(AuthFailure::InvalidPayload | AuthFailure::InvalidSubject)), "{refused:?}");
}

#[test]
fn section_3_8_the_issuer_must_be_the_configured_one() {
    let world =
        World::with(|config| AuthConfig { issuer: Some("https://login.example".to_owned()), ..config });
    let verify =
        |claims: &str| world.verify(&world.sign(Algorithm::EdDsa, &header(Algorithm::EdDsa, "ed"), claims));
    assert_eq!(verify(&with_claims(&json!({ "iss": "https://login.example" }))), Ok(()));
    assert_eq!(verify(&claims()), Err(AuthFailure::WrongIssuer), "missing");
    for iss in [
        json!("https://login.example/"),
        json!("https://LOGIN.example"),
        json!("https://login.example.evil"),
        json!("login.example"),
        json!(""),
        json!(null),
        json!(1),
        json!(["https://login.example"]),
        json!({ "https://login.example": 1 }),
    ] {
        assert_eq!(verify(&with_claims(&json!({ "iss": iss }))), Err(AuthFailure::WrongIssuer), "{iss}");
    }
    let twice = claims().replacen('{', r#"{"iss":"https://login.example","iss":"https://login.example","#, 1);
    assert_eq!(verify(&twice), Err(AuthFailure::InvalidPayload));
    // Without a configured issuer, any `iss` is accepted.
    let world = World::new();
    let any = with_claims(&json!({ "iss": ["whoever"] }));
    assert_eq!(world.verify(&world.sign(Algorithm::EdDsa, &header(Algorithm::EdDsa, "ed"), &any)), Ok(()));
}

#[test]
fn section_3_9_the_audience_must_contain_a_configured_name() {
    let names = || vec!["chat".to_owned(), "https://chat.example".to_owned()];
    let world = World::with(|config| AuthConfig { audience: names(), ..config });
    let verify =
        |claims: &str| world.verify(&world.sign(Algorithm::EdDsa, &header(Algorithm::EdDsa, "ed"), claims));
    for aud in [json!("chat"), json!("https://chat.example"), json!(["x", "chat"]), json!(["chat"])] {
        assert_eq!(verify(&with_claims(&json!({ "aud": aud }))), Ok(()), "{aud}");
    }
    assert_eq!(verify(&claims()), Err(AuthFailure::ForeignAudience), "missing");
    for aud in [
        json!("Chat"),
        json!("chat "),
        json!("https://chat.example/"),
        json!("cha"),
        json!(["x", "y"]),
        json!([]),
        json!(""),
        json!(null),
        json!(true),
        json!(["chat", 1]),
        json!([["chat"]]),
        json!({ "chat": 1 }),
    ] {
        assert_eq!(verify(&with_claims(&json!({ "aud": aud }))), Err(AuthFailure::ForeignAudience), "{aud}");
    }
    // A node without a configured audience accepts no `aud`.
    let world = World::new();
    let meant = with_claims(&json!({ "aud": "chat" }));
    let token = world.sign(Algorithm::EdDsa, &header(Algorithm::EdDsa, "ed"), &meant);
    assert_eq!(world.verify(&token), Err(AuthFailure::ForeignAudience));
}

#[test]
fn section_3_10_key_names_and_urls_in_headers_are_not_trusted() {
    let world = World::new();
    let text = |header: &str| format!("{}.{}", encode(header), encode(&claims()));
    // The attacker signs with its own key and includes that key in the header in every possible way.
    let own = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let point = own.public_key().as_ref();
    let jwk = json!({
        "kty": "EC", "crv": "P-256", "kid": "es",
        "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..]),
    });
    for brought in [
        json!({ "jwk": jwk }),
        json!({ "jku": "http://127.0.0.1:1/jwks.json" }),
        json!({ "x5u": "file:///etc/passwd" }),
        json!({ "x5c": [STANDARD.encode(point)], "x5t": "AA" }),
    ] {
        let mut header = json!({ "alg": "ES256", "kid": "es" });
        header.as_object_mut().unwrap().extend(brought.as_object().unwrap().clone());
        let header = header.to_string();
        let forged = own.sign(&SystemRandom::new(), text(&header).as_bytes()).unwrap();
        let forged = format!("{}.{}", text(&header), URL_SAFE_NO_PAD.encode(forged));
        assert_eq!(world.verify(&forged), Err(AuthFailure::BadSignature), "{header}");
        assert_eq!(world.verify(&world.sign(Algorithm::Es256, &header, &claims())), Ok(()), "{header}");
    }
    // A `kid` is only compared with the ids in memory, as a whole.
    let long = "k".repeat(257);
    for (kid, expected) in [
        (json!("../../../../dev/null"), AuthFailure::UnknownKey),
        (json!("' UNION SELECT 'key' --"), AuthFailure::UnknownKey),
        (json!("es\0"), AuthFailure::UnknownKey),
        (json!("ES"), AuthFailure::UnknownKey),
        (json!("e"), AuthFailure::UnknownKey),
        (json!("k".repeat(256)), AuthFailure::UnknownKey),
        (json!(long), AuthFailure::Malformed),
        (json!(""), AuthFailure::Malformed),
        (json!(null), AuthFailure::Malformed),
        (json!(1), AuthFailure::Malformed),
        (json!(["es"]), AuthFailure::Malformed),
        (json!({ "es": 1 }), AuthFailure::Malformed),
    ] {
        let header = json!({ "alg": "ES256", "kid": kid }).to_string();
        assert_eq!(world.verify(&world.sign(Algorithm::Es256, &header, &claims())), Err(expected), "{kid}");
    }
}

#[test]
fn section_3_11_tokens_for_another_purpose_are_refused_by_their_type() {
    let world = World::new();
    let verify = |typ: &str| {
        let header = format!(r#"{{"alg":"EdDSA","kid":"ed","typ":{typ}}}"#);
        world.verify(&world.sign(Algorithm::EdDsa, &header, &claims()))
    };
    for own in ["JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", "Application/JWT"] {
        assert_eq!(verify(&format!("\"{own}\"")), Ok(()), "{own}");
    }
    for other in [
        "",
        "JOSE",
        "JWE",
        "logout+jwt",
        "secevent+jwt",
        "dpop+jwt",
        "token-introspection+jwt",
        "vc+sd-jwt",
        "application/",
        "application/application/jwt",
        "text/jwt",
        "jwt ",
        "jwtx",
        "äpplication/jwt",
    ] {
        assert_eq!(verify(&format!("\"{other}\"")), Err(AuthFailure::WrongType), "{other}");
    }
    for broken in ["null", "1", "[\"JWT\"]"] {
        assert_eq!(verify(broken), Err(AuthFailure::Malformed), "{broken}");
    }
}

#[test]
fn headers_that_demand_something_are_refused() {
    let world = World::new();
    for demand in [
        r#""crit":["exp"]"#,
        r#""crit":[]"#,
        r#""crit":null"#,
        r#""crit":"b64""#,
        r#""crit":["b64"],"b64":false"#,
        r#""b64":false"#,
        r#""b64":true"#,
    ] {
        let header = format!(r#"{{"alg":"EdDSA","kid":"ed",{demand}}}"#);
        let token = world.sign(Algorithm::EdDsa, &header, &claims());
        assert_eq!(world.verify(&token), Err(AuthFailure::CriticalHeader), "{demand}");
    }
    // RFC 7797: the payload is not encoded.
    let text = format!("{}.{}", encode(r#"{"alg":"HS256","kid":"hs","b64":false,"crit":["b64"]}"#), "alice");
    let token = format!("{text}.{}", URL_SAFE_NO_PAD.encode(hmac_of(Algorithm::Hs256, SECRET, &text)));
    assert_eq!(world.verify(&token), Err(AuthFailure::CriticalHeader));
    for twice in [r#""alg":"EdDSA""#, r#""kid":"ed""#, r#""typ":"JWT""#, r#""\u0061lg":"EdDSA""#] {
        let header = format!(r#"{{"alg":"EdDSA","kid":"ed","typ":"JWT",{twice}}}"#);
        let token = world.sign(Algorithm::EdDsa, &header, &claims());
        assert_eq!(world.verify(&token), Err(AuthFailure::Malformed), "{twice}");
    }
}

#[test]
fn each_token_has_one_spelling() {
    let world = World::new();
    for (algorithm, good) in world.good() {
        for end in 0..good.len() {
            assert!(world.verify(&good[..end]).is_err(), "{algorithm:?}, cut at {end}");
        }
        let parts: Vec<&str> = good.split('.').collect();
        for at in 0..3 {
            let respelt = |part: String| {
                let mut parts = parts.clone();
                parts[at] = &part;
                world.verify(&parts.join("."))
            };
            let bytes = URL_SAFE_NO_PAD.decode(parts[at]).unwrap();
            for padded in [URL_SAFE.encode(&bytes), format!("{}=", parts[at]), STANDARD.encode(&bytes)] {
                assert!(padded == parts[at] || respelt(padded.clone()).is_err(), "{algorithm:?} {padded}");
            }
            for added in ["A", "AA", "AAA", "AAAA", "."] {
                assert!(respelt(format!("{}{added}", parts[at])).is_err(), "{algorithm:?} {at} {added}");
            }
            // Where the last character has unused bits, they must be zero.
            let spare = match bytes.len() % 3 {
                1 => 16,
                2 => 4,
                _ => 1,
            };
            let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
            let (rest, last) = parts[at].split_at(parts[at].len() - 1);
            let value = alphabet.find(last).unwrap();
            for other in (1..spare).map(|bits| value | bits) {
                assert!(respelt(format!("{rest}{}", &alphabet[other..=other])).is_err());
            }
        }
    }
    assert_eq!(world.verify(&"a".repeat(Token::MAX_BYTES + 1)), Err(AuthFailure::TooLong));
}

#[test]
fn a_replaced_key_set_applies_at_once() {
    let world = World::new();
    let token = world.good().remove(5).1;
    let set = |id: &str| {
        let x = URL_SAFE_NO_PAD.encode(world.ed.public_key().as_ref());
        let set = json!({ "keys": [{ "kty": "OKP", "crv": "Ed25519", "kid": id, "x": x }] }).to_string();
        Document::read(set.as_bytes(), Origin::Url).unwrap().keys
    };
    let keyring = Arc::new(Keyring::new(Vec::new(), Vec::new()).with_url());
    let config = AuthConfig { keys: Arc::clone(&keyring), ..AuthConfig::with_secret(SECRET) };
    let node = Authenticator::new(config);
    let verify = || node.verify(&Token::new(&token).unwrap(), NOW).map(drop);
    assert_eq!(verify(), Err(AuthFailure::UnknownKey));
    keyring.set_url(set("ed"));
    assert_eq!(verify(), Ok(()));
    keyring.set_url(set("another"));
    assert_eq!(verify(), Err(AuthFailure::UnknownKey));
    keyring.set_local(set("ed"), Vec::new());
    assert_eq!(verify(), Ok(()));
}

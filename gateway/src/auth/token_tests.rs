//! Valid and invalid tokens. The invalid ones follow RFC 8725 and known attacks.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use broker_bridge::RoomName;
use proptest::prelude::*;
use serde_json::{Value, json};

use std::{sync::Arc, time::Duration};

use super::{
    AuthConfig, AuthFailure, Authenticator, Grant, Identity, Operation, Policy, Subject, Token, UnixSeconds,
    key::KeyError,
    mint::{MintError, generate_secret, mint},
};
use crate::vocabulary::metrics::Label as _;

const SECRET: &[u8] = b"thirty-two bytes, known to tests";
const NOW: UnixSeconds = UnixSeconds(1_800_000_000);
const LEEWAY: u64 = 5;

fn authenticator(policies: &[(&str, &str)]) -> Authenticator {
    let policies = policies.iter().map(|(pattern, operations)| Policy {
        pattern: pattern.parse().unwrap(),
        operations: operations.parse().unwrap(),
    });
    Authenticator::new(AuthConfig {
        leeway: Duration::from_secs(LEEWAY),
        policies: policies.collect(),
        ..AuthConfig::with_secret(SECRET)
    })
}

fn encode(text: &str) -> String {
    URL_SAFE_NO_PAD.encode(text)
}

/// Signs without any of the checks of the module under test, and without its library.
fn sign_with(algorithm: aws_lc_rs::hmac::Algorithm, secret: &[u8], header: &str, payload: &str) -> String {
    let signed = format!("{}.{}", encode(header), encode(payload));
    let key = aws_lc_rs::hmac::Key::new(algorithm, secret);
    let signature = aws_lc_rs::hmac::sign(&key, signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn sign(header: &str, payload: &str) -> String {
    sign_with(aws_lc_rs::hmac::HMAC_SHA256, SECRET, header, payload)
}

const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

fn verify_at(token: &str, now: UnixSeconds) -> Result<Identity, AuthFailure> {
    authenticator(&[]).verify(&Token::new(token)?, now)
}

fn failure(token: &str) -> AuthFailure {
    verify_at(token, NOW).expect_err("the token must not verify")
}

fn good_claims() -> Value {
    json!({ "sub": "alice", "exp": NOW.0 + 60, "rooms": { "chat:*": ["subscribe", "publish"], "user:alice": ["subscribe"] } })
}

/// A token with valid claims except for one, which is given as raw JSON.
fn with_claim(claim: &str, json: &str) -> String {
    let mut fields = vec![format!(r#""{claim}":{json}"#)];
    for (name, value) in good_claims().as_object().unwrap() {
        if name != claim {
            fields.push(format!(r#""{name}":{value}"#));
        }
    }
    sign(HEADER, &format!("{{{}}}", fields.join(",")))
}

fn without_claim(claim: &str) -> String {
    let mut claims = good_claims();
    claims.as_object_mut().unwrap().remove(claim);
    sign(HEADER, &claims.to_string())
}

fn room(name: &str) -> RoomName {
    RoomName::new(name).unwrap()
}

#[test]
fn a_valid_token_yields_subject_grant_and_expiry() {
    let identity = verify_at(&sign(HEADER, &good_claims().to_string()), NOW).unwrap();
    assert_eq!(identity.subject().as_str(), "alice");
    assert_eq!(identity.expires_at(), UnixSeconds(NOW.0 + 60 + LEEWAY));
    assert_eq!(identity.remaining(NOW), Duration::from_secs(60 + LEEWAY));
    assert_eq!(identity.remaining(UnixSeconds(NOW.0 + 1000)), Duration::ZERO);
    assert!(identity.may(Operation::Subscribe, &room("chat:a")));
    assert!(identity.may(Operation::Publish, &room("chat:a")));
    assert!(!identity.may(Operation::Presence, &room("chat:a")));
    assert!(!identity.may(Operation::History, &room("chat:a")));
    assert!(identity.may(Operation::Subscribe, &room("user:alice")));
    assert!(!identity.may(Operation::Publish, &room("user:alice")));
    assert!(!identity.may(Operation::Subscribe, &room("user:bob")));
    assert!(!identity.may(Operation::Subscribe, &room("lobby")));
}

#[test]
fn nothing_is_allowed_unless_something_grants_it() {
    for token in [without_claim("rooms"), with_claim("rooms", "{}"), with_claim("rooms", r#"{"*":[]}"#)] {
        let identity = verify_at(&token, NOW).unwrap();
        for operation in Operation::ALL {
            assert!(!identity.may(operation, &room("chat:a")));
        }
    }
}

#[test]
fn room_policies_add_grants_to_the_token() {
    let authenticator = authenticator(&[("news:*", "subscribe"), ("user:{sub}:*", "subscribe,publish")]);
    let verify = |token: String| authenticator.verify(&Token::new(&token).unwrap(), NOW).unwrap();
    let alice = verify(without_claim("rooms"));
    assert!(alice.may(Operation::Subscribe, &room("news:today")));
    assert!(!alice.may(Operation::Publish, &room("news:today")));
    assert!(alice.may(Operation::Publish, &room("user:alice:inbox")));
    assert!(!alice.may(Operation::Subscribe, &room("user:bob:inbox")));
    assert!(!alice.may(Operation::Subscribe, &room("chat:a")));
    for subject in ["*", "a*", "alice:*", "alice:inbox", "{sub}", "a b", "al"] {
        let odd = verify(with_claim("sub", &json!(subject).to_string()));
        for name in ["user:alice:inbox", "user:*:inbox", "user:a*:inbox", "user:alice:inbox:x"] {
            assert!(!odd.may(Operation::Subscribe, &room(name)), "{subject} {name}");
        }
        assert!(odd.may(Operation::Subscribe, &room("news:today")), "{subject}");
    }
}

#[test]
fn the_shape_of_a_token_is_checked() {
    let good = sign(HEADER, &good_claims().to_string());
    let [header, payload, signature]: [&str; 3] = good.split('.').collect::<Vec<_>>().try_into().unwrap();
    for token in [
        "a",
        "a.b",
        "...",
        "..",
        ".a.b",
        "a.b.",
        "a..b",
        "e30.e30.e30",
        &format!("{header}.{payload}"),
        &format!("{header}.{payload}.{signature}.{signature}"),
        &format!("{good}."),
        &format!(".{good}"),
        &format!("{header}.{payload}.{signature}A"),
        // The last character of a signature has two unused bits; only one spelling is accepted.
        &format!("{header}.{payload}.{}", respell_last(signature)),
    ] {
        let failure = failure(token);
        assert!(
            matches!(failure, AuthFailure::Malformed | AuthFailure::BadSignature),
            "{token}: {failure:?}"
        );
    }
    assert_eq!(failure(&"a".repeat(Token::MAX_BYTES + 1)), AuthFailure::TooLong);
    for header in [
        "",
        "{",
        "[]",
        r#"["HS256"]"#,
        "\"HS256\"",
        "null",
        "{}",
        r#"{"alg":null}"#,
        r#"{"alg":1}"#,
        r#"{"alg":["HS256"]}"#,
        r#"{"alg":"HS256"} x"#,
        r#"{"alg":"HS256","alg":"HS256"}"#,
        r#"{"alg":"HS256","alg":"none"}"#,
        r#"{"alg":"none","alg":"HS256"}"#,
        r#"{"ALG":"HS256"}"#,
    ] {
        assert_eq!(failure(&sign(header, &good_claims().to_string())), AuthFailure::Malformed, "{header}");
    }
    let deep = format!(r#"{{"alg":"HS256","x":{}}}"#, "[".repeat(5000));
    assert_eq!(failure(&sign(&deep, "{}")), AuthFailure::Malformed);
}

fn respell_last(signature: &str) -> String {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (rest, last) = signature.split_at(signature.len() - 1);
    let value = ALPHABET.iter().position(|&b| b == last.as_bytes()[0]).unwrap();
    format!("{rest}{}", ALPHABET[value ^ 1] as char)
}

#[test]
fn the_algorithm_is_pinned() {
    let claims = good_claims().to_string();
    for alg in [
        "none", "None", "NONE", "nOnE", "", "HS384", "HS512", "RS256", "ES256", "PS256", "EdDSA", "hs256",
        "HS256 ", "dir",
    ] {
        let header = json!({ "alg": alg, "typ": "JWT" }).to_string();
        let signed = sign(&header, &claims);
        assert_eq!(failure(&signed), AuthFailure::WrongAlgorithm, "{alg}");
        let unsigned = format!("{}.{}.", encode(&header), encode(&claims));
        assert_eq!(failure(&unsigned), AuthFailure::WrongAlgorithm, "{alg}");
    }
    let longer = sign_with(aws_lc_rs::hmac::HMAC_SHA512, SECRET, r#"{"alg":"HS512"}"#, &claims);
    assert_eq!(failure(&longer), AuthFailure::WrongAlgorithm);
    // An encrypted token has five parts.
    let encrypted = format!("{}.a.b.c.d", encode(r#"{"alg":"dir","enc":"A256GCM"}"#));
    assert_eq!(failure(&encrypted), AuthFailure::Malformed);
}

#[test]
fn the_signature_is_checked() {
    let claims = good_claims().to_string();
    let good = sign(HEADER, &claims);
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let forged = good_claims().to_string().replace("alice", "mallory");
    for token in [
        format!("{signed}."),
        format!("{signed}.{}", encode("x")),
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode([0; 32])),
        // Another payload under a valid signature, another header, and a truncated HMAC.
        format!("{}.{}.{signature}", encode(HEADER), encode(&forged)),
        format!("{}.{}.{signature}", encode(r#"{"alg":"HS256"}"#), encode(&claims)),
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(&URL_SAFE_NO_PAD.decode(signature).unwrap()[..16])),
        sign_with(aws_lc_rs::hmac::HMAC_SHA256, &[0; 32], HEADER, &claims),
        sign_with(aws_lc_rs::hmac::HMAC_SHA256, b"", HEADER, &claims),
        sign_with(aws_lc_rs::hmac::HMAC_SHA256, &SECRET[..31], HEADER, &claims),
        sign_with(aws_lc_rs::hmac::HMAC_SHA512, SECRET, HEADER, &claims),
    ] {
        assert_eq!(failure(&token), AuthFailure::BadSignature, "{token}");
    }
}

#[test]
fn keys_and_extensions_in_a_header_are_not_used() {
    let claims = good_claims().to_string();
    // The attacker signs with its own key and includes the key in the header. The node must not use it.
    let attacker = [7; 32];
    let jwk = json!({ "kty": "oct", "k": URL_SAFE_NO_PAD.encode(attacker) });
    for header in [
        json!({ "alg": "HS256", "jwk": jwk }),
        json!({ "alg": "HS256", "jku": "https://evil.example/keys" }),
        json!({ "alg": "HS256", "x5u": "file:///dev/null", "x5c": [1] }),
        json!({ "alg": "HS256", "kid": "../../../../dev/null" }),
        json!({ "alg": "HS256", "kid": "' UNION SELECT 'x" }),
    ] {
        let header = header.to_string();
        let forged = sign_with(aws_lc_rs::hmac::HMAC_SHA256, &attacker, &header, &claims);
        assert_eq!(failure(&forged), AuthFailure::BadSignature, "{header}");
        let empty = sign_with(aws_lc_rs::hmac::HMAC_SHA256, b"", &header, &claims);
        assert_eq!(failure(&empty), AuthFailure::BadSignature, "{header}");
        // With the right key, such fields have no effect.
        assert!(verify_at(&sign(&header, &claims), NOW).is_ok(), "{header}");
    }
    for crit in ["[]", r#"["exp"]"#, r#"["b64"],"b64":false"#, "null", "1"] {
        let header = format!(r#"{{"alg":"HS256","crit":{crit}}}"#);
        assert_eq!(failure(&sign(&header, &claims)), AuthFailure::CriticalHeader, "{crit}");
    }
}

#[test]
fn claims_of_the_wrong_type_are_refused_by_name() {
    use AuthFailure::{
        ForeignAudience, InvalidPattern, InvalidPayload, InvalidRooms, InvalidSubject, InvalidTime,
        UnknownOperation,
    };
    assert_eq!(failure(&without_claim("sub")), InvalidSubject);
    assert_eq!(failure(&without_claim("exp")), InvalidTime);
    let long = format!("\"{}\"", "a".repeat(256));
    for (claim, json, expected) in [
        ("sub", "null", InvalidSubject),
        ("sub", "\"\"", InvalidSubject),
        ("sub", "1", InvalidSubject),
        ("sub", "[\"alice\"]", InvalidSubject),
        ("sub", "{}", InvalidSubject),
        ("sub", "true", InvalidSubject),
        ("sub", "\"a\\u0000b\"", InvalidSubject),
        ("sub", "\"a\\nb\"", InvalidSubject),
        ("sub", "\"\\ud800\"", InvalidSubject),
        ("sub", &long, InvalidSubject),
        ("exp", "null", InvalidTime),
        ("exp", "\"1900000000\"", InvalidTime),
        ("exp", "true", InvalidTime),
        ("exp", "[1900000000]", InvalidTime),
        ("exp", "-1", InvalidTime),
        ("exp", "1900000000000", InvalidTime),
        ("exp", "1e300", InvalidTime),
        ("exp", "18446744073709551615", InvalidTime),
        ("exp", "99999999999999999999999999", InvalidTime),
        ("nbf", "null", InvalidTime),
        ("nbf", "\"0\"", InvalidTime),
        ("nbf", "{}", InvalidTime),
        ("iat", "\"today\"", InvalidTime),
        ("iat", "null", InvalidTime),
        ("aud", "\"someone\"", ForeignAudience),
        ("aud", "[]", ForeignAudience),
        ("aud", "null", ForeignAudience),
        ("rooms", "null", InvalidRooms),
        ("rooms", "[]", InvalidRooms),
        ("rooms", "\"*\"", InvalidRooms),
        ("rooms", r#"["chat:*"]"#, InvalidRooms),
        ("rooms", r#"{"chat:*":"subscribe"}"#, InvalidRooms),
        ("rooms", r#"{"chat:*":null}"#, InvalidRooms),
        ("rooms", r#"{"chat:*":[1]}"#, InvalidRooms),
        ("rooms", r#"{"chat:*":{"subscribe":true}}"#, InvalidRooms),
        ("rooms", r#"{"a":[],"a":["publish"]}"#, InvalidRooms),
        ("rooms", r#"{"a":[],"\u0061":["publish"]}"#, InvalidRooms),
        ("rooms", r#"{"chat:*":["read"]}"#, UnknownOperation),
        ("rooms", r#"{"chat:*":["*"]}"#, UnknownOperation),
        ("rooms", r#"{"chat:*":["subscribe,publish"]}"#, UnknownOperation),
        ("rooms", r#"{"":["subscribe"]}"#, InvalidPattern),
        ("rooms", r#"{"*a":["subscribe"]}"#, InvalidPattern),
        ("rooms", r#"{"a b":["subscribe"]}"#, InvalidPattern),
        ("rooms", r#"{"user:{sub}":["subscribe"]}"#, InvalidPattern),
    ] {
        assert_eq!(failure(&with_claim(claim, json)), expected, "{claim}: {json}");
    }
    for payload in [
        "",
        "null",
        "[]",
        "\"x\"",
        "{",
        r#"["alice",1900000000]"#,
        "{} {}",
        r#"{"sub":"alice","sub":"mallory","exp":1900000000}"#,
        r#"{"sub":"alice","exp":1,"exp":1900000000}"#,
        r#"{"sub":"alice","exp":1900000000,"rooms":{},"rooms":{"*":["publish"]}}"#,
    ] {
        assert_eq!(failure(&sign(HEADER, payload)), InvalidPayload, "{payload}");
    }
}

#[test]
fn unknown_claims_and_unusual_spellings_are_accepted() {
    for token in [
        with_claim("name", "{\"first\":[1,null]}"),
        with_claim("sub", "\"\\u0061lice\""),
        with_claim("sub", &format!("\"{}\"", "a".repeat(255))),
        with_claim("exp", &format!("{}.75", NOW.0 + 1)),
        with_claim("exp", "1.9e9"),
        with_claim("exp", "253402300799"),
        with_claim("rooms", r#"{"\u0063hat:*":["sub\u0073cribe","subscribe"]}"#),
    ] {
        assert!(verify_at(&token, NOW).is_ok(), "{token}");
    }
}

#[test]
fn grants_are_bounded() {
    let rooms = |count: usize| {
        let rooms: serde_json::Map<_, _> =
            (0..count).map(|n| (format!("r{n}"), json!(["publish"]))).collect();
        with_claim("rooms", &Value::Object(rooms).to_string())
    };
    assert!(verify_at(&rooms(Authenticator::MAX_GRANTS), NOW).is_ok());
    assert_eq!(failure(&rooms(Authenticator::MAX_GRANTS + 1)), AuthFailure::TooManyGrants);
}

#[test]
fn times_are_checked_with_leeway_at_both_ends() {
    let at = |token: &str, now| verify_at(token, UnixSeconds(now)).map(|_| ());
    let exp = good_claims()["exp"].as_u64().unwrap();
    let token = sign(HEADER, &good_claims().to_string());
    assert_eq!(at(&token, exp - 1), Ok(()));
    assert_eq!(at(&token, exp + LEEWAY - 1), Ok(()));
    assert_eq!(at(&token, exp + LEEWAY), Err(AuthFailure::Expired));
    assert_eq!(at(&token, u64::MAX), Err(AuthFailure::Expired));
    assert_eq!(at(&with_claim("exp", "0"), NOW.0), Err(AuthFailure::Expired));
    // A fraction of a second never extends a token's validity.
    let token = with_claim("exp", &format!("{}.9", NOW.0));
    assert_eq!(at(&token, NOW.0 + LEEWAY), Err(AuthFailure::Expired));

    let token = with_claim("nbf", &(NOW.0 + LEEWAY).to_string());
    assert_eq!(at(&token, NOW.0), Ok(()));
    assert_eq!(at(&token, NOW.0 - 1), Err(AuthFailure::NotYetValid));
    assert_eq!(at(&token, 0), Err(AuthFailure::NotYetValid));
    let token = with_claim("nbf", &format!("{}.1", NOW.0 + LEEWAY));
    assert_eq!(at(&token, NOW.0), Err(AuthFailure::NotYetValid));
    assert_eq!(at(&with_claim("iat", &(NOW.0 + 1000).to_string()), NOW.0), Ok(()));
}

#[test]
fn equal_grants_are_shared_and_the_cache_is_bounded() {
    let authenticator = authenticator(&[]);
    let verify = |token: &str| authenticator.verify(&Token::new(token).unwrap(), NOW).unwrap();
    let one = verify(&with_claim("rooms", r#"{"a":["publish"],"b*":["subscribe","publish"],"c":[]}"#));
    let other = verify(&with_claim("rooms", r#"{"b*":["publish","subscribe"],"a":["publish"]}"#));
    assert!(Arc::ptr_eq(&one.grants, &other.grants));
    let different = verify(&with_claim("rooms", r#"{"b":["publish","subscribe"],"a":["publish"]}"#));
    assert!(!Arc::ptr_eq(&one.grants, &different.grants));

    let held: Vec<_> = (0..3 * Authenticator::REMEMBERED_GRANTS)
        .map(|n| {
            let identity = verify(&with_claim("rooms", &format!(r#"{{"r{n}":["publish"]}}"#)));
            assert!(authenticator.remembered_grants() <= Authenticator::REMEMBERED_GRANTS);
            identity
        })
        .collect();
    for (n, identity) in held.iter().enumerate() {
        assert!(identity.may(Operation::Publish, &room(&format!("r{n}"))));
        assert!(!identity.may(Operation::Publish, &room(&format!("r{}", n + 1))));
    }
}

#[test]
fn debug_output_shows_no_token_and_no_secret() {
    let token = sign(HEADER, &good_claims().to_string());
    let authenticator = authenticator(&[]);
    let identity = authenticator.verify(&Token::new(&token).unwrap(), NOW).unwrap();
    let mut shown = format!("{authenticator:?} {identity:?} {:?}", Token::new(&token));
    for failure in AuthFailure::ALL.iter().copied() {
        shown = format!("{shown} {failure} {failure:?} {}", failure.as_str());
    }
    for part in token.split('.').chain([std::str::from_utf8(SECRET).unwrap()]) {
        assert!(!shown.contains(part), "{part} in {shown}");
    }
    assert!(!shown.contains(&format!("{SECRET:?}")));
}

#[test]
fn each_failure_has_its_own_label() {
    let labels: std::collections::HashSet<_> =
        AuthFailure::ALL.iter().map(|failure| failure.as_str()).collect();
    assert_eq!(labels.len(), AuthFailure::ALL.len());
    assert!(labels.iter().all(|label| label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')));
}

#[test]
fn minted_tokens_verify() {
    let grants: Vec<Grant> =
        ["chat:*=subscribe", "chat:*=publish", "news=history"].map(|grant| grant.parse().unwrap()).into();
    let alice = Subject::new("alice \"é\"").unwrap();
    let token = mint(SECRET, &alice, &grants, Duration::from_secs(60), NOW).unwrap();
    let identity = verify_at(token.expose(), NOW).unwrap();
    assert_eq!(identity.subject(), &alice);
    assert_eq!(identity.remaining(NOW), Duration::from_secs(60 + LEEWAY));
    assert!(
        identity.may(Operation::Subscribe, &room("chat:a"))
            && identity.may(Operation::Publish, &room("chat:a"))
    );
    assert!(
        identity.may(Operation::History, &room("news")) && !identity.may(Operation::Subscribe, &room("news"))
    );
}

#[test]
fn tokens_that_would_not_verify_are_not_minted() {
    let alice = Subject::new("alice").unwrap();
    let minute = Duration::from_secs(60);
    let refused = |secret, grants: &[Grant], ttl| mint(secret, &alice, grants, ttl, NOW).unwrap_err();
    assert_eq!(refused(&SECRET[..31], &[], minute), MintError::Secret(KeyError::WeakSecret(32)));
    for ttl in
        [Duration::ZERO, Duration::from_millis(999), Duration::from_secs(300_000_000_000), Duration::MAX]
    {
        assert_eq!(refused(SECRET, &[], ttl), MintError::Lifetime, "{ttl:?}");
    }
    let grants = |count: usize, length: usize| -> Vec<Grant> {
        (0..count).map(|n| format!("{n:0length$}=publish").parse().unwrap()).collect()
    };
    assert_eq!(refused(SECRET, &grants(Authenticator::MAX_GRANTS + 1, 3), minute), MintError::TooManyGrants);
    assert_eq!(refused(SECRET, &grants(60, 200), minute), MintError::TooLong);
}

#[test]
#[should_panic(expected = "weak secrets")]
fn a_weak_secret_panics() {
    drop(AuthConfig::with_secret(&[1; 31]));
}

#[test]
fn secrets_differ() {
    assert_ne!(generate_secret().unwrap(), generate_secret().unwrap());
}

proptest! {
    #[test]
    fn a_changed_token_never_verifies(
        at in any::<prop::sample::Index>(), put in "[A-Za-z0-9_.-]{0,2}", take in 0..3_usize,
    ) {
        let good = sign(HEADER, &good_claims().to_string());
        let at = at.index(good.len() + 1);
        let end = (at + take).min(good.len());
        let changed = format!("{}{put}{}", &good[..at], &good[end..]);
        prop_assume!(changed != good);
        prop_assert!(verify_at(&changed, NOW).is_err());
    }

    #[test]
    fn signed_nonsense_never_panics(header in "\\PC{0,40}", payload in "\\PC{0,80}") {
        drop(verify_at(&sign(&header, &payload), NOW));
        drop(verify_at(&sign(HEADER, &payload), NOW));
    }

    /// Whatever JSON an issuer signs, a token is valid only with a subject and an expiry.
    #[test]
    fn any_signed_json_is_accepted_or_refused(claims in claims()) {
        if let Ok(identity) = verify_at(&sign(HEADER, &claims.to_string()), NOW) {
            prop_assert_eq!(Some(identity.subject().as_str()), claims["sub"].as_str());
            prop_assert!(claims["exp"].as_f64().is_some());
            prop_assert!(identity.expires_at() > NOW);
        }
    }

    /// An identity may do exactly what some grant of its token names, compared with a naive model.
    #[test]
    fn permission_agrees_with_a_naive_model(
        grants in prop::collection::btree_map("[ab:]{1,3}\\*?", prop::sample::subsequence(&Operation::ALL[..], 0..=4), 0..6),
        names in prop::collection::vec("[ab:*]{1,4}", 1..8),
    ) {
        let rooms: serde_json::Map<_, _> = grants.iter()
            .map(|(pattern, operations)| {
                (pattern.clone(), operations.iter().map(|operation| json!(operation.as_str())).collect())
            })
            .collect();
        let identity = verify_at(&with_claim("rooms", &Value::Object(rooms).to_string()), NOW).unwrap();
        for name in names {
            for operation in Operation::ALL {
                let expected = grants.iter().any(|(pattern, operations)| {
                    operations.contains(&operation)
                        && (*pattern == name
                            && !pattern.ends_with('*')
                            || pattern.ends_with('*') && name.starts_with(pattern.trim_end_matches('*')))
                });
                prop_assert_eq!(identity.may(operation, &room(&name)), expected, "{:?} {}", operation, name);
            }
        }
    }
}

fn claims() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (NOW.0 - 100..NOW.0 + 100).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z*:{}]{0,6}".prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::hash_map("[a-z:*]{1,5}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    });
    let name = prop::sample::select(&["sub", "exp", "nbf", "iat", "rooms", "aud", "other"][..]);
    prop::collection::hash_map(name, value, 0..7).prop_map(|map| {
        Value::Object(map.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    })
}

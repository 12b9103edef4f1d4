//! Valid and invalid keys, and the test vectors of the RFCs.

use aws_lc_rs::{
    encoding::AsDer as _,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
        KeyPair as _,
    },
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use serde_json::{Value, json};

use super::{
    jwks::{Document, DocumentError, Origin, Why},
    key::{Algorithm, Key, KeyError},
    keyring::Keyring,
};
use crate::auth::AuthFailure;

fn bytes(text: &str) -> Vec<u8> {
    URL_SAFE_NO_PAD.decode(text).unwrap()
}

fn text(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
}

/// The only key of a set, or why it was skipped.
fn only(jwk: &Value, origin: Origin) -> Result<Key, Why> {
    match Document::read(json!({ "keys": [jwk] }).to_string().as_bytes(), origin) {
        Ok(document) => Ok(document.keys.into_iter().next().unwrap()),
        Err(DocumentError::NoneUsable(why)) => Err(why),
        Err(error) => panic!("{error}"),
    }
}

fn from_url(jwk: &Value) -> Result<Key, Why> {
    only(jwk, Origin::Url)
}

fn verifies(key: &Key, token: &str) -> bool {
    let (signed, signature) = token.rsplit_once('.').unwrap();
    key.verifies(signed.as_bytes(), &bytes(signature))
}

/// Asserts that the vector verifies, and that it does not with any byte of the signature changed or with more
/// text.
fn check_vector(key: &Key, token: &str) {
    assert!(verifies(key, token), "{token}");
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let mut signature = bytes(signature);
    for at in 0..signature.len() {
        signature[at] ^= 1;
        assert!(!key.verifies(signed.as_bytes(), &signature), "byte {at}");
        signature[at] ^= 1;
    }
    assert!(!key.verifies(format!("{signed}A").as_bytes(), &signature));
}

const RSA_N: &str = "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ";

fn rsa_jwk() -> Value {
    json!({ "kty": "RSA", "n": RSA_N, "e": "AQAB" })
}

fn p256_jwk() -> Value {
    json!({
        "kty": "EC", "crv": "P-256",
        "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
        "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
    })
}

fn ed25519_jwk() -> Value {
    json!({ "kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo" })
}

#[test]
fn rfc_7515_a_1_hs256() {
    let jwk = json!({
        "kty": "oct", "alg": "HS256",
        "k": "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow",
    });
    let token = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
    check_vector(&only(&jwk, Origin::File).unwrap(), token);
}

#[test]
fn rfc_7515_a_2_rs256() {
    let token = "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw";
    check_vector(&from_url(&rsa_jwk()).unwrap(), token);
}

#[test]
fn rfc_7515_a_3_es256() {
    let token = "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";
    check_vector(&from_url(&p256_jwk()).unwrap(), token);
}

#[test]
fn rfc_8037_a_4_eddsa() {
    let token = "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
    check_vector(&from_url(&ed25519_jwk()).unwrap(), token);
}

#[test]
fn a_key_without_alg_is_pinned_to_the_algorithm_of_its_type() {
    let p384 = EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap();
    let point = p384.public_key().as_ref();
    let p384 = json!({ "kty": "EC", "crv": "P-384", "x": text(&point[1..49]), "y": text(&point[49..]) });
    for (jwk, own, fits) in [
        (rsa_jwk(), Algorithm::Rs256, &Algorithm::ALL[3..9]),
        (p256_jwk(), Algorithm::Es256, &[Algorithm::Es256][..]),
        (p384, Algorithm::Es384, &[Algorithm::Es384]),
        (ed25519_jwk(), Algorithm::EdDsa, &[Algorithm::EdDsa]),
    ] {
        assert_eq!(from_url(&jwk).unwrap().algorithm(), own);
        for algorithm in Algorithm::ALL {
            let mut named = jwk.clone();
            named["alg"] = algorithm.as_str().into();
            match from_url(&named) {
                Ok(key) => assert!(key.algorithm() == algorithm && fits.contains(&algorithm)),
                Err(why) => assert!(why == Why::Mismatch && !fits.contains(&algorithm), "{named}"),
            }
        }
    }
    let mut renamed = ed25519_jwk();
    renamed["alg"] = "Ed25519".into();
    assert_eq!(from_url(&renamed).unwrap().algorithm(), Algorithm::EdDsa);
}

#[test]
fn a_key_set_skips_unsuitable_keys() {
    let with = |mut jwk: Value, member: &str, value: Value| {
        jwk[member] = value;
        jwk
    };
    let secret = json!({ "kty": "oct", "alg": "HS256", "k": text(&[7; 32]) });
    let long = "k".repeat(257);
    for (jwk, why) in [
        (with(rsa_jwk(), "use", "enc".into()), Why::OtherUse),
        (with(rsa_jwk(), "key_ops", json!(["encrypt"])), Why::OtherUse),
        (with(rsa_jwk(), "key_ops", json!([])), Why::OtherUse),
        (with(rsa_jwk(), "alg", "RSA-OAEP".into()), Why::Unsupported),
        (with(rsa_jwk(), "alg", "none".into()), Why::Unsupported),
        (with(rsa_jwk(), "d", "AQAB".into()), Why::Private),
        (with(ed25519_jwk(), "d", text(&[7; 32]).into()), Why::Private),
        (with(rsa_jwk(), "kid", long.as_str().into()), Why::Key(KeyError::Id)),
        (with(rsa_jwk(), "kid", "".into()), Why::Key(KeyError::Id)),
        (with(rsa_jwk(), "kid", 7.into()), Why::Broken),
        (with(rsa_jwk(), "e", "AQ".into()), Why::Key(KeyError::WeakRsa)),
        (with(rsa_jwk(), "e", "Ag".into()), Why::Key(KeyError::WeakRsa)),
        (with(rsa_jwk(), "e", "".into()), Why::Key(KeyError::WeakRsa)),
        (with(rsa_jwk(), "n", text(&bytes(RSA_N)[..255]).into()), Why::Key(KeyError::WeakRsa)),
        (with(rsa_jwk(), "n", text(&bytes(RSA_N)[..128]).into()), Why::Key(KeyError::WeakRsa)),
        (with(rsa_jwk(), "n", "!".into()), Why::Broken),
        (with(p256_jwk(), "crv", "P-521".into()), Why::Unsupported),
        (with(p256_jwk(), "crv", "secp256k1".into()), Why::Unsupported),
        (with(p256_jwk(), "crv", "P-384".into()), Why::Broken),
        // Not on the curve: the start of an invalid-curve attack.
        (with(p256_jwk(), "y", text(&[7; 32]).into()), Why::Key(KeyError::Unfit("ES256"))),
        (with(p256_jwk(), "x", text(&[0; 31]).into()), Why::Broken),
        (with(ed25519_jwk(), "crv", "X25519".into()), Why::Unsupported),
        (with(ed25519_jwk(), "x", text(&[7; 31]).into()), Why::Broken),
        (json!({ "kty": "AKP", "pub": "AA" }), Why::Unsupported),
        (json!({ "kty": "EC" }), Why::Unsupported),
        (json!({}), Why::Broken),
        (json!(["RSA"]), Why::Broken),
        (json!("RSA"), Why::Broken),
        (json!(null), Why::Broken),
        (secret.clone(), Why::Shared),
    ] {
        assert_eq!(from_url(&jwk).map(|key| key.algorithm()), Err(why), "{jwk}");
    }
    let twice = br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","kty":"OKP"}]}"#;
    assert_eq!(Document::read(twice, Origin::Url).unwrap_err(), DocumentError::NoneUsable(Why::Broken));
    // A file may hold a secret, but the secret must be strong enough and name its algorithm.
    assert!(only(&secret, Origin::File).is_ok());
    let weak = with(secret.clone(), "alg", "HS384".into());
    assert_eq!(only(&weak, Origin::File).unwrap_err(), Why::Key(KeyError::WeakSecret(48)));
    let public = with(secret.clone(), "alg", "RS256".into());
    assert_eq!(only(&public, Origin::File).unwrap_err(), Why::Mismatch);
    assert_eq!(
        only(&json!({ "kty": "oct", "k": text(&[7; 32]) }), Origin::File).unwrap_err(),
        Why::Unsupported
    );
    // The other keys of a set stay usable.
    let set = json!({ "keys": [secret, { "kty": "?" }, p256_jwk()], "more": 1 }).to_string();
    let document = Document::read(set.as_bytes(), Origin::Url).unwrap();
    assert_eq!((document.keys.len(), document.ignored.len()), (1, 2));
    assert_eq!(
        document.ignored[1].to_string(),
        "key 1 of the set is not used: its type, curve or algorithm is not supported"
    );
}

#[test]
fn a_document_is_bounded() {
    let read = |json: &str| Document::read(json.as_bytes(), Origin::Url).map(|document| document.keys.len());
    for malformed in
        ["", "[]", "{}", "null", r#"{"keys":{}}"#, r#"{"keys":[]"#, r#"[[{"kty":"RSA"}]]"#, "<html>"]
    {
        assert_eq!(read(malformed), Err(DocumentError::Malformed), "{malformed}");
    }
    assert_eq!(read(r#"{"keys":[],"keys":[]}"#), Err(DocumentError::Malformed));
    assert_eq!(read(r#"{"keys":[]}"#), Err(DocumentError::Empty));
    let set = |count: usize| json!({ "keys": vec![ed25519_jwk(); count] }).to_string();
    assert_eq!(read(&set(Document::MAX_KEYS)), Ok(Document::MAX_KEYS));
    assert_eq!(read(&set(Document::MAX_KEYS + 1)), Err(DocumentError::TooMany));
    let padded = |length: usize| format!("{}{}", set(1), " ".repeat(length - set(1).len()));
    assert_eq!(read(&padded(Document::MAX_BYTES)), Ok(1));
    assert_eq!(read(&padded(Document::MAX_BYTES + 1)), Err(DocumentError::TooLong));
    let deep = format!(r#"{{"keys":[{}]}}"#, "[".repeat(100_000));
    assert_eq!(read(&deep), Err(DocumentError::Malformed));
}

#[test]
fn secrets_are_at_least_as_long_as_their_hash_and_not_pem() {
    let shared = |algorithm, secret: &[u8]| Key::shared(None, algorithm, secret).map(drop);
    for (algorithm, length) in [(Algorithm::Hs256, 32), (Algorithm::Hs384, 48), (Algorithm::Hs512, 64)] {
        assert_eq!(shared(algorithm, &vec![7; length]), Ok(()));
        assert_eq!(shared(algorithm, &vec![7; length - 1]), Err(KeyError::WeakSecret(length)));
        for label in ["PUBLIC KEY", "RSA PUBLIC KEY", "CERTIFICATE", "PRIVATE KEY"] {
            let text = format!("\n{}", pem(label, &[7; 90]));
            assert_eq!(shared(algorithm, text.as_bytes()), Err(KeyError::PemAsSecret));
        }
    }
    assert_eq!(shared(Algorithm::Rs256, &[7; 64]), Err(KeyError::Unfit("RS256")));
}

#[test]
fn a_pem_file_holds_one_public_key_for_its_algorithm() {
    let p256 = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let p384 = EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap();
    let ed = Ed25519KeyPair::generate().unwrap();
    let rsa = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    let files = [
        (rsa.public_key_pem(), &Algorithm::ALL[3..9]),
        (pem("PUBLIC KEY", p256.public_key().as_der().unwrap().as_ref()), &[Algorithm::Es256][..]),
        (pem("PUBLIC KEY", p384.public_key().as_der().unwrap().as_ref()), &[Algorithm::Es384]),
        (pem("PUBLIC KEY", ed.public_key().as_der().unwrap().as_ref()), &[Algorithm::EdDsa]),
    ];
    for (file, fits) in &files {
        for algorithm in Algorithm::ALL {
            let key = Key::public(Some("k"), algorithm, file.as_bytes());
            match key {
                Ok(key) => assert!(fits.contains(&algorithm) && key.algorithm() == algorithm),
                Err(error) => {
                    assert!(!fits.contains(&algorithm), "{algorithm:?}");
                    assert_eq!(error, KeyError::Unfit(algorithm.as_str()));
                }
            }
        }
    }
    let public = |text: &str| Key::public(None, Algorithm::Es256, text.as_bytes()).map(drop);
    let own = &files[1].0;
    assert_eq!(public(&format!("a comment before it\n{own}")), Ok(()));
    assert_eq!(public(&format!("{own}{own}")), Err(KeyError::Several));
    let private = p256.to_pkcs8v1().unwrap();
    for label in ["PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY"] {
        let private = pem(label, private.as_ref());
        assert_eq!(public(&private), Err(KeyError::Private), "{label}");
        assert_eq!(public(&format!("{own}{private}")), Err(KeyError::Private), "{label}");
    }
    assert_eq!(public(&pem("CERTIFICATE", &[7; 90])), Err(KeyError::Certificate));
    for nothing in
        ["", "x", "-----BEGIN PUBLIC KEY-----", &pem("DH PARAMETERS", &[7; 9]), &own.replace("END", "ENT")]
    {
        assert_eq!(public(nothing), Err(KeyError::NotPem), "{nothing}");
    }
    assert_eq!(public(&pem("PUBLIC KEY", &[7; 90])), Err(KeyError::Unfit("ES256")));
    assert_eq!(Key::public(Some(""), Algorithm::Es256, own.as_bytes()).map(drop), Err(KeyError::Id));
}

/// The `SubjectPublicKeyInfo` of an RSA key, encoded by hand (RFC 8017 A.1.1).
fn rsa_spki(n: &[u8], e: &[u8]) -> Vec<u8> {
    rsa_spki_of(&[6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 13, 1, 1, 1, 5, 0], n, e)
}

fn rsa_spki_of(algorithm: &[u8], n: &[u8], e: &[u8]) -> Vec<u8> {
    let der = |tag: u8, body: &[u8]| {
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        let head = match length {
            [0, short @ ..=127] => vec![tag, short],
            [0, short] => vec![tag, 0x81, short],
            long => [&[tag, 0x82], &long[..]].concat(),
        };
        [&head, body].concat()
    };
    let integer = |bytes: &[u8]| der(2, &[&[0], bytes].concat()); // above 2^1023: a sign byte first
    let key = der(0x30, &[integer(n), der(2, e)].concat());
    der(0x30, &[der(0x30, algorithm), der(3, &[&[0], &key[..]].concat())].concat())
}

#[test]
fn weak_rsa_keys_are_refused_in_pem_too() {
    let n = bytes(RSA_N);
    let read = |n: &[u8], e: &[u8]| {
        Key::public(None, Algorithm::Ps256, pem("PUBLIC KEY", &rsa_spki(n, e)).as_bytes()).map(drop)
    };
    assert_eq!(read(&n, &[1, 0, 1]), Ok(()));
    for (n, e) in [(&n[..], &[1][..]), (&n, &[2]), (&n[..128], &[1, 0, 1]), (&n[..255], &[1, 0, 1])] {
        assert!(read(n, e).is_err());
    }
}

#[test]
fn a_pss_only_key_is_refused_for_pkcs_1() {
    let only_pss = [6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 13, 1, 1, 10];
    let pem = pem("PUBLIC KEY", &rsa_spki_of(&only_pss, &bytes(RSA_N), &[1, 0, 1]));
    for algorithm in &Algorithm::ALL[3..6] {
        let refused = Key::public(None, *algorithm, pem.as_bytes()).map(drop);
        assert_eq!(refused, Err(KeyError::Unfit(algorithm.as_str())));
    }
    for algorithm in &Algorithm::ALL[6..9] {
        assert!(Key::public(None, *algorithm, pem.as_bytes()).is_ok(), "{algorithm:?}");
    }
}

#[test]
fn keys_are_chosen_by_name_and_algorithm() {
    use Algorithm::{EdDsa, Es256, Es384, Hs256, Hs384, Hs512, Rs256};
    use AuthFailure::{UnknownKey, WrongAlgorithm};

    let shared = |id, algorithm| Key::shared(id, algorithm, &[7; 64]).unwrap();
    let set = |jwks: Vec<Value>| {
        Document::read(json!({ "keys": jwks }).to_string().as_bytes(), Origin::Url).unwrap().keys
    };
    let with_id = |mut jwk: Value, id: &str| {
        jwk["kid"] = id.into();
        jwk
    };
    let keyring = Keyring::new(
        vec![shared(None, Algorithm::Hs256), shared(Some("a"), Algorithm::Hs384)],
        set(vec![with_id(p256_jwk(), "b"), with_id(ed25519_jwk(), "a")]),
    )
    .with_url();
    let find = |algorithm, id: Option<&str>| {
        let keys = keyring.current();
        keys.find(algorithm, id).map(|keys| keys.iter().map(|key| key.algorithm()).collect::<Vec<_>>())
    };
    for (algorithm, id, found) in [
        (Hs256, None, Ok(vec![Hs256])),
        (Hs256, Some("whatever"), Ok(vec![Hs256])),
        (Hs384, Some("a"), Ok(vec![Hs384])),
        (Hs384, None, Ok(vec![Hs384])),
        (Hs384, Some("whatever"), Err(UnknownKey)),
        // A key has one algorithm, and the set does not replace the configured key with that id.
        (Hs256, Some("a"), Err(WrongAlgorithm)),
        (EdDsa, Some("a"), Err(WrongAlgorithm)),
        (EdDsa, None, Ok(vec![EdDsa])),
        (Es256, Some("b"), Ok(vec![Es256])),
        (Es384, Some("b"), Err(WrongAlgorithm)),
        (Hs512, None, Err(WrongAlgorithm)),
        // The set that has not been fetched yet may contain the key.
        (Rs256, None, Err(UnknownKey)),
        (Rs256, Some("c"), Err(UnknownKey)),
    ] {
        assert_eq!(find(algorithm, id), found, "{algorithm:?} {id:?}");
    }
    assert!(!keyring.is_complete());
    let several = (0..5).map(|n| with_id(rsa_jwk(), &format!("r{n}"))).chain([with_id(p256_jwk(), "b")]);
    keyring.set_url(set(several.collect()));
    assert!(keyring.is_complete());
    for (algorithm, id, found) in [
        (Rs256, Some("r4"), Ok(vec![Rs256])),
        // More keys fit than are tried, so the token must name one.
        (Rs256, None, Err(UnknownKey)),
        (Rs256, Some("r5"), Err(UnknownKey)),
        (Es256, None, Ok(vec![Es256, Es256])),
        (Es256, Some("b"), Ok(vec![Es256])),
        (Es384, None, Err(WrongAlgorithm)),
    ] {
        assert_eq!(find(algorithm, id), found, "{algorithm:?} {id:?}");
    }
    // Several keys with the same id in one set: each is tried, up to the bound.
    keyring.set_url(set(vec![with_id(ed25519_jwk(), "same"); 9]));
    assert_eq!(find(EdDsa, Some("same")), Ok(vec![EdDsa; Keyring::MAX_TRIES]));
    let shown = format!("{keyring:?}");
    assert!(shown.contains("Hs384") && !shown.contains("11qY") && !shown.contains("[7, 7"), "{shown}");
}

#[tokio::test(start_paused = true)]
async fn one_fetch_serves_all_waiting_requests() {
    use super::keyring::Fetching;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    assert!(!Keyring::new(Vec::new(), Vec::new()).wait_for_key(0).await, "there is no URL");
    let keyring = Arc::new(Keyring::new(Vec::new(), Vec::new()).with_url());
    keyring.set_url(Vec::new());
    let fetches = Arc::new(AtomicUsize::new(0));
    let tasks = tokio::task::LocalSet::new();
    let (own, count) = (Arc::clone(&keyring), Arc::clone(&fetches));
    tasks.spawn_local(async move {
        let fetching = own.fetching().unwrap();
        loop {
            fetching.wanted().await;
            fetching.begin();
            count.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            fetching.end();
        }
    });
    tasks
        .run_until(async {
            let ask = || async {
                let seen = keyring.fetches();
                let asked = (0..100).map(|_| keyring.wait_for_key(seen));
                futures_util::future::join_all(asked).await
            };
            assert_eq!(ask().await, [true; 100]);
            assert_eq!(fetches.load(Ordering::Relaxed), 1);
            // During the cooldown, requests start no fetch.
            assert_eq!(ask().await, [false; 100]);
            assert!(!keyring.want_key(1));
            // They look again if a fetch has ended since they looked.
            assert!(keyring.want_key(0) && keyring.wait_for_key(0).await);
            assert_eq!(fetches.load(Ordering::Relaxed), 1);
            tokio::time::advance(Fetching::COOLDOWN).await;
            assert!(keyring.want_key(1) && keyring.want_key(1), "running until it ends");
            assert_eq!(ask().await, [true; 100]);
            assert_eq!(fetches.load(Ordering::Relaxed), 2);
        })
        .await;
}

//! `auth.*`: keys in files, key sets, and the errors for invalid ones.

use super::{SECRET, complaints, env, file, flags, load};

/// A public key as a user would configure it.
const P256: &str = "-----BEGIN PUBLIC KEY-----\n\
    MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEf83OJ3D2xF1Bg8vub9tLe1gHMzV7\n\
    6e8Tus9uPHvRVEXH8UTNG72bfocs3+257rn0s2ldbqkLJK2KRiMohYjlrQ==\n\
    -----END PUBLIC KEY-----\n";

#[test]
fn keys_are_tables_in_a_file_and_inline_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let (pem, secret) = (dir.path().join("key.pem"), dir.path().join("secret"));
    std::fs::write(&pem, P256).unwrap();
    std::fs::write(&secret, SECRET).unwrap();
    let inline = format!(
        "{{ \"2026-08\" = {{ algorithm = \"ES256\", public_key_file = {pem:?} }}, old = {{ algorithm = \"HS256\", \
         secret_file = {secret:?} }} }}"
    );
    let tables = format!(
        "[auth.keys.\"2026-08\"]\nalgorithm = \"ES256\"\npublic_key_file = {pem:?}\n\
         [auth.keys.old]\nalgorithm = \"HS256\"\nsecret_file = {secret:?}\n"
    );
    let expected = load(&file(&tables)).auth.keys.files;
    assert_eq!(expected.iter().map(|key| &*key.id).collect::<Vec<_>>(), ["2026-08", "old"]);
    for sources in [
        file(&format!("[auth]\nkeys = {inline}")),
        flags(&[("auth.keys", &inline)]),
        env(&[("TIDEGATE_AUTH__KEYS", &inline)]),
    ] {
        let config = load(&sources);
        assert_eq!(config.auth.keys.files, expected);
        assert!(!config.demo, "a key is configured");
    }
    assert!(!load(&flags(&[("auth.jwks_url", "https://login.example/keys")])).demo);
}

#[test]
fn each_invalid_key_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name).to_str().unwrap().to_owned()
    };
    let (public, secret) = (path("public", P256), path("secret", SECRET));
    let private = path("private", &P256.replace("PUBLIC", "PRIVATE"));
    for (table, complaint) in [
        ("7".to_owned(), "expected a table of keys by name"),
        ("{ a = 7 }".to_owned(), r#""a": expected a table, such as { algorithm"#),
        (r#"{ a = { algorithm = "none" } }"#.to_owned(), r#""a": an algorithm is one of HS256"#),
        ("{ a = { algorithm = 256 } }".to_owned(), r#""a": expected text in "algorithm""#),
        (format!("{{ a = {{ public_key_file = {public:?} }} }}"), r#""a": expected an algorithm"#),
        (
            format!("{{ \"\" = {{ algorithm = \"ES256\", public_key_file = {public:?} }} }}"),
            "expected names of 1 to 256 bytes",
        ),
        (
            r#"{ a = { algorithm = "HS256" } }"#.to_owned(),
            r#""a": expected secret_file, and nothing else, for HS256"#,
        ),
        (
            format!("{{ a = {{ algorithm = \"HS256\", public_key_file = {public:?} }} }}"),
            r#""a": expected secret_file, and nothing else, for HS256"#,
        ),
        (
            format!("{{ a = {{ algorithm = \"ES256\", secret_file = {secret:?} }} }}"),
            r#""a": expected public_key_file, and nothing else, for ES256"#,
        ),
        (
            format!("{{ a = {{ algorithm = \"HS256\", secret = {SECRET:?} }} }}"),
            r#""a": there is no key "secret"; expected algorithm, and secret_file or public_key_file"#,
        ),
        (
            format!("{{ a = {{ algorithm = \"HS256\", secret_file = {public:?} }} }}"),
            r#""a", HS256: in its file, expected a secret, this is PEM"#,
        ),
        (
            format!("{{ a = {{ algorithm = \"HS512\", secret_file = {secret:?} }} }}"),
            r#""a", HS512: in its file, expected a secret of at least 64 bytes"#,
        ),
        (
            format!("{{ a = {{ algorithm = \"ES384\", public_key_file = {public:?} }} }}"),
            r#""a", ES384: in its file, expected a key for ES384"#,
        ),
        (
            format!("{{ a = {{ algorithm = \"ES256\", public_key_file = {private:?} }} }}"),
            r#""a", ES256: in its file, expected a public key, this is a private key"#,
        ),
        (
            r#"{ a = { algorithm = "ES256", public_key_file = "/nonexistent/key" } }"#.to_owned(),
            r#""a": expected a file that can be read: No such file"#,
        ),
    ] {
        let lines = complaints(&flags(&[("auth.keys", &table)]));
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        assert!(line.contains(complaint) && line.starts_with("auth.keys (command line): "), "{line}");
    }
    // Reports an error for each of several keys in one pass.
    let several = r#"{ a = { algorithm = "ES256", public_key_file = "/none" }, b = { algorithm = "EdDSA", public_key_file = "/none" } }"#;
    assert_eq!(complaints(&flags(&[("auth.keys", several)])).len(), 2);
    let set = path("set", r#"{"keys":[{"kty":"EC"}]}"#);
    let lines = complaints(&flags(&[("auth.jwks_file", &set)]));
    assert!(
        lines.concat().contains("in that file, expected at least one key that verifies tokens"),
        "{lines:?}"
    );
}

#[test]
fn a_key_set_url_is_https_or_loopback() {
    for url in [
        "https://login.example/keys?tenant=1",
        "https://login.example",
        "HTTPS://10.0.0.1:8443/",
        "http://localhost/k",
        "http://127.0.0.1:9000/",
        "http://127.9.9.9/",
        "http://[::1]:9000/keys",
    ] {
        assert!(load(&flags(&[("auth.jwks_url", url)])).auth.jwks_url.is_some(), "{url}");
    }
    for url in [
        "",
        "login.example",
        "/keys",
        "http://login.example/",
        "http://10.0.0.1/",
        "http://localhost.evil.example/",
        "http://127.0.0.1.evil.example/",
        "http://[::2]/",
        "ftp://localhost/",
        "file:///etc/keys",
        "https://",
        "https://user@login.example/",
        "https://user:hunter2@login.example/",
        "https://login.example/#x",
        "http://localhost@evil.example/",
    ] {
        let lines = complaints(&flags(&[("auth.jwks_url", url)]));
        assert!(lines.len() == 1 && !lines.concat().contains("hunter2"), "{lines:?}");
    }
    let lines = complaints(&flags(&[("auth.jwks_ca_file", "ca.pem")]));
    assert!(lines.concat().contains("expected auth.jwks_url as well"), "{lines:?}");
}

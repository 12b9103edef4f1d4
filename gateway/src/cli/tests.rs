use std::{
    fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    thread,
};

use super::*;

const SECRET: &str = "correct horse battery staple, and more";

/// Runs a command line and returns its status (`None` if it runs a node), standard output and standard error.
fn run(args: &[&str], env: &[(&str, &str)]) -> (Option<Status>, String, String) {
    let (invocation, out, err) = invoke_with(args, env);
    let status = match invocation {
        Invocation::Serve(_) => None,
        Invocation::Done(status) => Some(status),
    };
    (status, out, err)
}

fn invoke_with(args: &[&str], env: &[(&str, &str)]) -> (Invocation, String, String) {
    let args = std::iter::once("tidegate").chain(args.iter().copied()).map(OsString::from);
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let invocation = invoke(args, env, &mut out, &mut err);
    (invocation, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

fn config(args: &[&str]) -> Config {
    match invoke_with(args, &[]) {
        (Invocation::Serve(loaded), out, err) if out.is_empty() && err.is_empty() => loaded.config,
        other => panic!("{args:?}: {other:?}"),
    }
}

#[test]
fn the_command_line_definition_is_valid() {
    Cli::command().debug_assert();
}

#[test]
fn a_node_is_the_default() {
    assert_eq!(config(&[]).public.listen.port(), 8080);
    assert_eq!(config(&["serve"]).public.listen.port(), 8080);
}

#[test]
fn flags_are_accepted_before_and_after_the_command() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tidegate.toml");
    fs::write(&path, "shards = 3\nsse.retry = '7s'").unwrap();
    let path = path.to_str().unwrap();
    let config = config(&[
        "--set",
        "shards=2",
        "--public-listen",
        "127.0.0.1:1",
        "serve",
        "--config",
        path,
        "--set",
        r#"rooms."a=b".grant=subscribe"#,
        "--public-listen",
        "127.0.0.1:2",
        "--ops-listen=127.0.0.1:3",
        "--broker-url=redis://redis.example",
        "--log-format=json",
    ]);
    assert_eq!((config.shards, config.sse.retry), (2, Duration::from_secs(7)));
    assert_eq!((config.public.listen.port(), config.ops.listen.port()), (2, 3));
    assert_eq!(config.broker.url.to_string(), "redis://redis.example:6379");
    assert_eq!(config.rooms.first().map(|policy| policy.pattern.to_string()).as_deref(), Some("a=b"));
}

#[test]
fn an_invalid_configuration_is_reported_and_not_started() {
    for command in [&[][..], &["serve"], &["check-config"], &["token", "--sub", "a"]] {
        let args: Vec<&str> =
            command.iter().chain(&["--set", "shards=0", "--set=hunter2"]).copied().collect();
        let (status, out, err) = run(&args, &[("TIDEGATE_SHARD", "1")]);
        assert_eq!((status, out.as_str()), (Some(Status::Misuse), ""), "{command:?}");
        assert_eq!(
            err.lines().collect::<Vec<_>>(),
            [
                "--set (command line): expected KEY=VALUE",
                "shard (environment TIDEGATE_SHARD): there is no such key; did you mean TIDEGATE_SHARDS?",
                "shards = \"0\" (command line): expected auto, or a whole number from 1 to 256",
            ],
        );
    }
    let (status, _, err) = run(&["check-config", "--config", "/nonexistent.toml"], &[]);
    assert_eq!(status, Some(Status::Misuse));
    assert!(err.starts_with("/nonexistent.toml: expected a file of text that can be read: No such"), "{err}");
}

#[test]
fn a_valid_configuration_is_reported_as_valid() {
    let said = (Some(Status::Success), "configuration is valid\n".to_owned(), String::new());
    assert_eq!(run(&["check-config"], &[]), said);
    assert_eq!(run(&["check-config", "--set", "shards=2"], &[("TIDEGATE_SHARDS", "0")]), said);
}

#[test]
fn a_certificate_and_its_key_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let pair = || rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (own, other) = (pair(), pair());
    let (cert, key) = (own.cert.pem(), own.signing_key.serialize_pem());
    let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    let request = cert.replace("CERTIFICATE", "CERTIFICATE REQUEST");
    let not_x509 = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_owned();
    let check = |cert: &str, key: &str| {
        let (cert, key) = (format!("tls.cert={cert}"), format!("tls.key={key}"));
        run(&["check-config", "--set", &cert, "--set", &key], &[])
    };
    let in_files = |cert: &str, key: &str| {
        let [cert_path, key_path] = [("tls.crt", cert), ("tls.key", key)].map(|(name, text)| {
            fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name).to_str().unwrap().to_owned()
        });
        check(&cert_path, &key_path)
    };
    let said = (Some(Status::Success), "configuration is valid\n".to_owned(), String::new());
    assert_eq!(in_files(&cert, &key), said);
    assert_eq!(in_files(&(cert.clone() + &other.cert.pem()), &key), said, "a chain");
    let no_cert = "expected at least one certificate in PEM";
    let no_key = "tls.key: expected one unencrypted private key in PEM";
    let no_pair = "tls.key: expected the private key of the first certificate in tls.cert (";
    for (cert, key, expected) in [
        (&cert, &other.signing_key.serialize_pem(), no_pair),
        (&other.cert.pem(), &key, no_pair),
        (&not_x509, &key, no_pair),
        (&key, &key, no_cert),
        (&request, &key, no_cert),
        (&String::new(), &key, no_cert),
        (&cert.replace('M', "!"), &key, no_cert),
        (&cert, &cert, no_key),
        (&cert, &encrypted, no_key),
        (&cert, &String::new(), no_key),
        (&cert, &own.signing_key.public_key_pem(), no_key),
    ] {
        let (status, out, err) = in_files(cert, key);
        assert_eq!((status, out.as_str()), (Some(Status::Misuse), ""), "{err}");
        assert!(err.contains(expected), "{expected:?} is not in {err:?}");
    }

    // A key given instead of a path is never shown, whole or in part, wherever it was given.
    let base64: String = key.lines().filter(|line| !line.starts_with('-')).collect();
    in_files(&cert, &key);
    let good = dir.path().join("tls.crt");
    let good = good.to_str().unwrap();
    for (cert, key) in [(good, key.as_str()), (good, base64.as_str()), (key.as_str(), good)] {
        let (status, _, err) = check(cert, key);
        assert_eq!(status, Some(Status::Misuse));
        assert!(err.starts_with("tls.") && err.contains("expected a file that can be read"), "{err}");
        assert!(!err.contains(&base64[..20]), "{err}");
    }
}

#[test]
fn the_default_configuration_is_a_valid_file() {
    let (status, out, err) = run(&["default-config"], &[]);
    assert_eq!((status, err.as_str()), (Some(Status::Success), ""));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tidegate.toml");
    fs::write(&path, out).unwrap();
    assert_eq!(run(&["check-config", "--config", path.to_str().unwrap()], &[]).0, Some(Status::Success));
}

#[test]
fn only_the_token_is_printed() {
    use crate::auth::{AuthConfig, Authenticator, Operation, Token};

    let args =
        ["token", "--sub", "alice", "--room", "chat:*=subscribe,publish", "--room=a=b=history", "--ttl=5m"];
    let (status, out, err) = run(&args, &[("TIDEGATE_AUTH__HS256_SECRET", SECRET)]);
    assert_eq!((status, err.as_str()), (Some(Status::Success), ""));
    let authenticator = Authenticator::new(AuthConfig::with_secret(SECRET.as_bytes()));
    let now = UnixSeconds::from(SystemTime::now());
    let token = Token::new(out.strip_suffix('\n').unwrap()).unwrap();
    let identity = authenticator.verify(&token, now).unwrap();
    assert_eq!(identity.subject().as_str(), "alice");
    assert!(identity.may(Operation::Publish, &"chat:1".parse().unwrap()));
    assert!(identity.may(Operation::History, &"a=b".parse().unwrap()));
    assert!(!identity.may(Operation::History, &"chat:1".parse().unwrap()));
    assert!((298..=300).contains(&identity.remaining(now).as_secs()));
}

#[test]
fn a_token_is_signed_with_a_key_from_a_file() {
    use std::sync::Arc;

    use crate::auth::{Algorithm, AuthConfig, Authenticator, Key, Keyring, Token};

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    let now = UnixSeconds::from(SystemTime::now());
    let printed = |algorithm: &str, more: &[&str]| {
        let args =
            ["token", "--sub", "alice", "--key-file", path.to_str().unwrap(), "--algorithm", algorithm];
        run(&[&args, more].concat(), &[])
    };
    let verified = |out: &str, key: Key, audience: &[&str]| {
        let authenticator = Authenticator::new(AuthConfig {
            keys: Arc::new(Keyring::new(vec![key], Vec::new())),
            issuer: (!audience.is_empty()).then(|| "me".to_owned()),
            audience: audience.iter().map(|&name| name.to_owned()).collect(),
            ..AuthConfig::with_secret(SECRET.as_bytes())
        });
        authenticator.verify(&Token::new(out.strip_suffix('\n').unwrap()).unwrap(), now).map(drop)
    };
    let pairs = [
        (rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap(), vec![Algorithm::Es256]),
        (rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap(), vec![Algorithm::Es384]),
        (rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap(), vec![Algorithm::EdDsa]),
        (rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap(), Algorithm::ALL[3..9].to_vec()),
    ];
    for (pair, fits) in pairs {
        fs::write(&path, pair.serialize_pem()).unwrap();
        for algorithm in Algorithm::ALL {
            let (status, out, err) = printed(algorithm.as_str(), &["--kid", "k"]);
            if fits.contains(&algorithm) {
                assert_eq!((status, err.as_str()), (Some(Status::Success), ""), "{algorithm:?}");
                let key = || Key::public(Some("k"), algorithm, pair.public_key_pem().as_bytes()).unwrap();
                assert_eq!(verified(&out, key(), &[]), Ok(()), "{algorithm:?}");
                // The token meets the configured requirements.
                let demands = ["--kid=k", "--set", "auth.issuer=me", "--set", "auth.audience=chat,other"];
                let (_, out, _) = printed(algorithm.as_str(), &demands);
                assert_eq!(verified(&out, key(), &["chat"]), Ok(()), "{algorithm:?}");
            } else {
                assert_eq!((status, out.as_str()), (Some(Status::Misuse), ""), "{algorithm:?}");
                assert!(err.contains("expected a"), "{err}");
            }
        }
    }
    fs::write(&path, format!("{SECRET}{SECRET}\n")).unwrap();
    let (_, out, _) = printed("HS512", &[]);
    let key = Key::shared(None, Algorithm::Hs512, format!("{SECRET}{SECRET}").as_bytes()).unwrap();
    assert_eq!(verified(&out, key, &[]), Ok(()));
    for args in [
        &["--key-file", "/nonexistent/key", "--algorithm", "ES256"][..],
        &["--key-file", "key"],
        &["--algorithm", "ES256"],
    ] {
        let (status, out, err) = run(&[&["token", "--sub", "a"], args].concat(), &[]);
        assert_eq!((status, out.as_str()), (Some(Status::Misuse), ""), "{args:?}");
        assert!(err.contains("--key-file") || err.contains("--algorithm"), "{err}");
    }
}

#[test]
fn a_token_that_cannot_be_made_is_an_error_with_the_reason() {
    let secret = [("TIDEGATE_AUTH__HS256_SECRET", SECRET)];
    for (args, env, reason) in [
        (&["token", "--sub", "alice"][..], &[][..], "TIDEGATE_AUTH__HS256_SECRET"),
        (&["token"], &secret, "--sub"),
        (&["token", "--sub", ""], &secret, "1 to 255 bytes"),
        (&["token", "--sub", "a", "--room", "chat:*"], &secret, "PATTERN=OPERATION"),
        (&["token", "--sub", "a", "--room", "chat:*=fly"], &secret, "subscribe, publish"),
        (&["token", "--sub", "a", "--ttl", "10"], &secret, "such as 30s"),
        (&["token", "--sub", "a", "--ttl", "0s"], &secret, "at least one second"),
    ] {
        let (status, out, err) = run(args, env);
        assert_eq!((status, out.as_str()), (Some(Status::Misuse), ""), "{args:?}");
        assert!(err.contains(reason), "{args:?}: {err}");
        assert!(!err.contains(SECRET), "{err}");
    }
}

#[test]
fn help_and_version_are_results_and_misuse_is_not() {
    let (status, out, err) = run(&["--version"], &[]);
    assert_eq!((status, err.as_str()), (Some(Status::Success), ""));
    assert_eq!(out, format!("tidegate {}\n", version()));
    let (status, out, _) = run(&["--help"], &[]);
    assert_eq!(status, Some(Status::Success));
    for command in ["serve", "token", "check-config", "default-config", "print-functions", "healthcheck"] {
        assert!(out.contains(command), "{out}");
    }
    for wrong in [&["fly"][..], &["--fly"], &["serve", "x"], &["default-config", "--set", "a=b"]] {
        let (status, out, err) = run(wrong, &[]);
        assert_eq!((status, out.as_str()), (Some(Status::Misuse), ""), "{wrong:?}");
        assert!(!err.is_empty());
    }
}

#[test]
fn a_closed_pipe_is_a_failure_not_a_panic() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let args = ["tidegate", "default-config"].map(OsString::from);
    let invocation = invoke(args, BTreeMap::new(), &mut Closed, &mut Closed);
    assert!(matches!(invocation, Invocation::Done(Status::Failure)), "{invocation:?}");
}

#[test]
fn a_setting_is_split_at_the_first_unquoted_equals_sign() {
    for (text, split) in [
        ("a=b", Some(("a", "b"))),
        ("a=", Some(("a", ""))),
        ("a=b=c", Some(("a", "b=c"))),
        (r#"rooms."a=b".grant=c"#, Some((r#"rooms."a=b".grant"#, "c"))),
        (r#"rooms={ "a" = {} }"#, Some(("rooms", r#"{ "a" = {} }"#))),
        ("=", Some(("", ""))),
        ("", None),
        ("a", None),
        (r#""a=b"#, None),
    ] {
        assert_eq!(split_setting(text), split, "{text}");
    }
}

/// Answers one request with `answer` and returns the request's head.
fn answer_once(listener: TcpListener, answer: &'static [u8]) -> thread::JoinHandle<Vec<String>> {
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
        let asked = lines.take_while(|line| !line.is_empty()).collect();
        stream.write_all(answer).unwrap();
        asked
    })
}

#[test]
fn a_healthcheck_queries_the_configured_node() {
    for (answer, status) in [
        (&b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"[..], Status::Success),
        (b"HTTP/1.1 204 \r\n\r\n", Status::Success),
        (b"HTTP/1.0 200 OK\n", Status::Success),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", Status::Failure),
        (b"HTTP/1.1 302 Found\r\nlocation: /\r\n\r\n", Status::Failure),
        (b"HTTP/1.1 2000 OK\r\n", Status::Failure),
        (b"HTTP/2 200\r\n", Status::Failure),
        (b"-ERR unknown command\r\n", Status::Failure),
        (&[b'x'; 2_000], Status::Failure),
        (b"", Status::Failure),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = answer_once(listener, answer);
        let (got, out, err) = run(&["healthcheck"], &[("TIDEGATE_OPS__LISTEN", &address.to_string())]);
        assert_eq!(got, Some(status), "{out}{err}");
        let from = "(ops.listen: environment TIDEGATE_OPS__LISTEN): ";
        assert!(format!("{out}{err}").starts_with(&format!("http://{address}/readyz {from}")), "{out}{err}");
        let asked = server.join().unwrap();
        let host = format!("Host: {address}");
        assert_eq!(asked, ["GET /readyz HTTP/1.1", &host, "Connection: close"]);
    }
}

/// A node keeps running when its configuration becomes invalid, so its health must still be checkable.
#[test]
fn a_healthcheck_uses_the_configured_address() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tidegate.toml");
    let named = path.to_str().unwrap();
    for (args, env) in [
        (&["healthcheck"][..], &[("TIDEGATE_CONFIG", named)][..]),
        (&["healthcheck", "--config", named], &[("TIDEGATE_CONFIG", "/nonexistent.toml")]),
        (&["healthcheck", "--config", named], &[("TIDEGATE_CONFIG", "")]),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        fs::write(&path, format!("shards = 0\nops.listen = '{address}'\nsse.rety = '1s'\n")).unwrap();
        let server = answer_once(listener, b"HTTP/1.1 200 OK\r\n\r\n");
        let (status, out, err) = run(args, env);
        let expected = format!("http://{address}/readyz (ops.listen: {named}:2): 200 OK\n");
        assert_eq!((status, out, err.as_str()), (Some(Status::Success), expected, ""), "{args:?}");
        server.join().unwrap();
    }
    // The keys that the check needs must be valid.
    for (text, complaint) in [
        ("ops.listen = 'here'", "ops.listen = \"here\""),
        ("ops.listen = ", "expected TOML"),
        ("ops.listen = '127.0.0.1:0'", "lets the system choose a port"),
    ] {
        fs::write(&path, text).unwrap();
        let (status, _, err) = run(&["healthcheck"], &[("TIDEGATE_CONFIG", named)]);
        assert_eq!(status, Some(Status::Misuse), "{text}");
        assert!(err.contains(complaint), "{text}: {err}");
    }
    let (status, _, err) = run(&["healthcheck", "--set=x"], &[]);
    assert_eq!((status, err.as_str()), (Some(Status::Misuse), "--set (command line): expected KEY=VALUE\n"));
    let (_, _, err) = run(&["healthcheck"], &[("TIDEGATE_CONFIG", "/nonexistent.toml")]);
    assert!(err.starts_with("/nonexistent.toml: expected a file"), "{err}");
}

/// All commands use the same file, so each sees what the node sees.
#[test]
fn every_command_reads_the_file_named_by_the_environment() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("tidegate.toml"), dir.path().join("other.toml"));
    fs::write(&path, format!("shards = 3\nauth.hs256_secret = '{SECRET}'")).unwrap();
    fs::write(&other, "shards = 4").unwrap();
    let env = [("TIDEGATE_CONFIG", path.to_str().unwrap())];
    let shards = |args: &[&str]| match invoke_with(args, &env).0 {
        Invocation::Serve(loaded) => loaded.config.shards,
        Invocation::Done(_) => panic!("a node would run"),
    };
    assert_eq!((shards(&[]), shards(&["serve"])), (3, 3));
    assert_eq!(shards(&["--config", other.to_str().unwrap()]), 4, "the command line wins");
    assert_eq!(run(&["check-config"], &env).0, Some(Status::Success));
    assert_eq!(run(&["token", "--sub", "a"], &env).0, Some(Status::Success));
    fs::write(&path, "shards = 0").unwrap();
    for command in [&["serve"][..], &["check-config"], &["token", "--sub", "a"]] {
        let (status, _, err) = run(command, &env);
        assert_eq!(status, Some(Status::Misuse), "{command:?}");
        assert!(err.contains("tidegate.toml:1"), "{command:?}: {err}");
    }
}

/// `check-config` refuses what a start would refuse.
#[test]
fn trusted_certificates_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ca.pem");
    let given = |key: &str| format!("{key}={}", path.display());
    for (key, with) in [
        ("broker.ca_file", "broker.url=rediss://redis.example"),
        ("auth.jwks_ca_file", "auth.jwks_url=https://login.example/jwks"),
    ] {
        let check = || run(&["check-config", "--set", with, "--set", &given(key)], &[]);
        fs::write(&path, "no certificate").unwrap();
        let (status, _, err) = check();
        assert_eq!(status, Some(Status::Misuse));
        assert!(err.starts_with(key) && err.contains("at least one certificate"), "{err}");
        fs::remove_file(&path).unwrap();
        assert!(check().2.contains("expected a file that can be read: No such file"), "{key}");
        let pair = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        fs::write(&path, format!("\u{feff}{}", pair.cert.pem())).unwrap();
        assert_eq!(check().0, Some(Status::Success), "{key}");
    }
}

#[test]
fn a_healthcheck_without_a_node_fails() {
    // Bound and dropped, so nothing listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{address}/livez?x");
    let (status, _, err) = run(&["healthcheck", "--url", &url], &[]);
    assert_eq!(status, Some(Status::Failure));
    assert!(err.starts_with(&format!("{url}: ")), "{err}");
    for wrong in
        ["", "/readyz", "127.0.0.1:9090", "https://127.0.0.1/", "http://u:p@127.0.0.1/", "http://a b/"]
    {
        let (status, _, err) = run(&["healthcheck", "--url", wrong], &[]);
        assert_eq!(status, Some(Status::Misuse), "{wrong}: {err}");
    }
}

#[test]
fn a_healthcheck_times_out() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    // The kernel accepts the connection, but nothing answers.
    let error = healthcheck::get_within(&url, Duration::from_millis(50)).unwrap_err();
    assert!(
        matches!(&error, healthcheck::Error::Io(error) if error.kind() == io::ErrorKind::TimedOut),
        "{error:?}"
    );
}

#[test]
fn a_healthcheck_replaces_an_unspecified_address_by_loopback() {
    for (listen, url) in [
        ("127.0.0.1:9090", "http://127.0.0.1:9090/readyz"),
        ("0.0.0.0:9090", "http://127.0.0.1:9090/readyz"),
        ("[::]:9090", "http://[::1]:9090/readyz"),
        ("10.0.0.1:80", "http://10.0.0.1:80/readyz"),
    ] {
        assert_eq!(healthcheck::readiness_url(listen.parse().unwrap()), url);
    }
}

//! The command line.
//!
//! Parses arguments and runs every command except the node itself. For `serve`, [`main`] passes a validated
//! configuration to the caller.
//!
//! Exit status: 0 for success, 1 for failure, 2 for wrong usage or configuration. Only results go to standard
//! output, so that `TOKEN=$(tidegate token …)` works; errors go to standard error.

mod healthcheck;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::{
    auth::{
        Algorithm, Grant, Subject, UnixSeconds,
        mint::{Signer, Wanted},
    },
    config::{Config, ConfigError, ConfigErrors, Loaded, Source, Sources, document, value::parse_time},
    file::{MAX, MAX_SMALL, read_text, read_value},
    tls,
};

/// Executes this process's command line. Runs a node with `serve`. Errors that prevent its start have been
/// printed to standard error before.
pub fn main(serve: impl FnOnce(Loaded) -> ExitCode) -> ExitCode {
    let (mut out, mut err) = (io::stdout().lock(), io::stderr());
    match invoke(std::env::args_os(), Sources::environment(), &mut out, &mut err) {
        Invocation::Serve(loaded) => {
            drop(out);
            serve(*loaded)
        }
        Invocation::Done(status) => status.into(),
    }
}

/// The program's version and the revision it was built from.
pub fn version() -> &'static str {
    concat!(env!("CARGO_PKG_VERSION"), " (", env!("TIDEGATE_REVISION"), ")")
}

/// The revision that the program was built from, or `unknown` (see `build.rs`).
pub fn revision() -> &'static str {
    env!("TIDEGATE_REVISION")
}

/// The result of a command line.
#[derive(Debug)]
pub enum Invocation {
    /// Run a node.
    Serve(Box<Loaded>),
    /// The command has ended.
    Done(Status),
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It succeeded.
    Success,
    /// It failed.
    Failure,
    /// The usage or the configuration is wrong.
    Misuse,
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        match status {
            Status::Success => Self::SUCCESS,
            Status::Failure => Self::FAILURE,
            Status::Misuse => Self::from(2),
        }
    }
}

/// Parses a command line, including the program's name, and executes it unless it runs a node.
pub fn invoke(
    args: impl IntoIterator<Item = OsString>,
    env: BTreeMap<String, String>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Invocation {
    let parsed = Cli::command().version(version()).try_get_matches_from(args);
    let Cli { layers, command } = match parsed.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(refusal) if refusal.use_stderr() => {
            return Invocation::Done(say(err, &refusal.render(), Status::Misuse));
        }
        // Not an error: help or the version was requested.
        Err(asked) => return Invocation::Done(say(out, &asked.render(), Status::Success)),
    };
    let result = match command {
        None => layers.load_to_serve(env),
        Some(Command::Serve(more)) => layers.and(more).load_to_serve(env),
        Some(Command::Token(token)) => token.run(layers, env, out),
        Some(Command::CheckConfig(more)) => layers
            .and(more)
            .load(env)
            .map_err(Failure::from)
            .and_then(|config| check_files(&config))
            .map(|()| Invocation::Done(say(out, &"configuration is valid\n", Status::Success))),
        Some(Command::DefaultConfig) => {
            Ok(Invocation::Done(say(out, &document::default_config(), Status::Success)))
        }
        Some(Command::PrintFunctions) => {
            Ok(Invocation::Done(say(out, &broker_bridge::redis::functions::TEXT, Status::Success)))
        }
        Some(Command::Healthcheck(check)) => check.run(layers, env, out),
    };
    result
        .unwrap_or_else(|failure| Invocation::Done(say(err, &format!("{}\n", failure.text), failure.status)))
}

/// Checks the files that a node reads at startup in addition to the configuration.
fn check_files(config: &Config) -> Result<(), Failure> {
    config.tls.as_ref().map_or(Ok(()), tls::check).map_err(|error| Failure::misuse(&error))?;
    for (key, file) in
        [("broker.ca_file", &config.broker.ca_file), ("auth.jwks_ca_file", &config.auth.jwks_ca_file)]
    {
        let Some(path) = file else { continue };
        let text = read_text(path, MAX).map_err(|error| {
            let path = path.display();
            Failure::misuse(&format!("{key} ({path}): expected a file that can be read: {error}"))
        })?;
        if let Err(error) = broker_bridge::tls::Client::new(Some(text.as_bytes())) {
            return Err(Failure::misuse(&format!("{key} ({}): {error}", path.display())));
        }
    }
    Ok(())
}

/// A pub/sub gateway: a room is a URL, and a room is a Redis topic.
#[derive(Debug, Parser)]
#[command(name = "tidegate")]
struct Cli {
    #[command(flatten)]
    layers: Layers,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a node (the default command)
    Serve(Layers),
    /// Print a token, signed with the configured secret or with a key from a file
    Token(TokenArgs),
    /// Check the configuration and print all errors in it
    CheckConfig(Layers),
    /// Print a configuration file with every key, its default and its documentation
    DefaultConfig,
    /// Print the library of functions that nodes load into Redis, for `redis-cli -x FUNCTION LOAD REPLACE`
    PrintFunctions,
    /// Check whether a running node is ready
    Healthcheck(HealthcheckArgs),
}

/// The sources of the configuration. Allowed before and after the command.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Configuration")]
struct Layers {
    /// A configuration file (TOML). Without it, the file that the environment variable `TIDEGATE_CONFIG`
    /// names
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Set a key, overriding file and environment; may be repeated
    // Parsed later: clap would repeat the text in its error, and it may contain a secret.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The same as --set public.listen=…
    #[arg(long, value_name = "ADDRESS")]
    public_listen: Option<String>,
    /// The same as --set ops.listen=…
    #[arg(long, value_name = "ADDRESS")]
    ops_listen: Option<String>,
    /// The same as --set broker.url=…
    #[arg(long, value_name = "URL")]
    broker_url: Option<String>,
    /// The same as --set log.format=…
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
}

impl Layers {
    /// Merges both; values of `more` win.
    fn and(mut self, more: Self) -> Self {
        self.set.extend(more.set);
        Self {
            config: more.config.or(self.config),
            set: self.set,
            public_listen: more.public_listen.or(self.public_listen),
            ops_listen: more.ops_listen.or(self.ops_listen),
            broker_url: more.broker_url.or(self.broker_url),
            log_format: more.log_format.or(self.log_format),
        }
    }

    fn load_to_serve(self, env: BTreeMap<String, String>) -> Result<Invocation, Failure> {
        let (config, sources) = self.load_with_sources(env)?;
        Ok(Invocation::Serve(Box::new(Loaded { config, sources })))
    }

    fn load(self, env: BTreeMap<String, String>) -> Result<Config, ConfigErrors> {
        self.load_with_sources(env).map(|(config, _)| config)
    }

    fn load_with_sources(self, env: BTreeMap<String, String>) -> Result<(Config, Sources), ConfigErrors> {
        let (sources, errors) = self.sources(env)?;
        match Config::load(&sources) {
            Ok(config) if errors.is_empty() => Ok((config, sources)),
            Ok(_) => Err(ConfigErrors::from(errors)),
            Err(more) => Err(ConfigErrors::from([errors, more.into()].concat())),
        }
    }

    /// The sources, and errors in the flags. Fails at once if the file cannot be read: without its values,
    /// other errors would mislead.
    fn sources(self, env: BTreeMap<String, String>) -> Result<(Sources, Vec<ConfigError>), ConfigErrors> {
        let mut errors = Vec::new();
        let file = self.config.or_else(|| Sources::file_of(&env));
        let mut sources = Sources { env, ..Sources::default() };
        for set in self.set {
            match split_setting(&set) {
                Some((key, value)) => sources.flags.push((key.to_owned(), value.to_owned())),
                None => errors.push(ConfigError {
                    key: "--set".to_owned(),
                    source: Source::Flag,
                    value: None,
                    expected: "expected KEY=VALUE".to_owned(),
                }),
            }
        }
        let short = [
            ("public.listen", self.public_listen),
            ("ops.listen", self.ops_listen),
            ("broker.url", self.broker_url),
            ("log.format", self.log_format),
        ];
        let given = |(key, value): (&str, Option<String>)| value.map(|value| (key.to_owned(), value));
        sources.flags.extend(short.into_iter().filter_map(given));
        match file.map(|path| sources.read_file(path)) {
            Some(Err(error)) => Err(ConfigErrors::from([errors, vec![error]].concat())),
            None | Some(Ok(())) => Ok((sources, errors)),
        }
    }
}

/// Splits `key=value` at the first `=` outside quotes, because a room name may contain one.
fn split_setting(text: &str) -> Option<(&str, &str)> {
    let mut quoted = false;
    let at = text.find(|c| {
        quoted ^= c == '"';
        c == '=' && !quoted
    })?;
    let (key, value) = text.split_at_checked(at)?;
    Some((key, value.strip_prefix('=')?))
}

#[derive(Debug, Args)]
struct TokenArgs {
    /// The token's subject
    #[arg(long, value_name = "NAME")]
    sub: Subject,
    /// Allowed operations, such as 'chat:*=subscribe,publish'; may be repeated
    #[arg(long, value_name = "PATTERN=OPERATIONS")]
    room: Vec<Grant>,
    /// Lifetime of the token, such as 30s, 5m or 24h
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_time)]
    ttl: Duration,
    /// Sign with the private key (PEM) or the secret in this file instead of `auth.hs256_secret`
    #[arg(long, value_name = "PATH", requires = "algorithm")]
    key_file: Option<PathBuf>,
    /// Algorithm of that key: HS256, RS256, PS256 (or 384, 512), ES256, ES384 or `EdDSA`
    #[arg(long, value_name = "NAME", requires = "key_file")]
    algorithm: Option<Algorithm>,
    /// Id of that key (`kid`), as in auth.keys or in a key set
    #[arg(long, value_name = "NAME")]
    kid: Option<String>,
    #[command(flatten)]
    layers: Layers,
}

impl TokenArgs {
    fn run(
        self,
        layers: Layers,
        env: BTreeMap<String, String>,
        out: &mut dyn Write,
    ) -> Result<Invocation, Failure> {
        const NO_SECRET: &str = "auth.hs256_secret is not set, so there is nothing to sign a token with: set \
                                 it in a file (--config), as TIDEGATE_AUTH__HS256_SECRET, or name a file that \
                                 holds it with auth.hs256_secret_file; or name a private key with --key-file";
        let config = layers.and(self.layers).load(env)?;
        let kid = self.kid.as_deref();
        let signer = if let (Some(path), Some(algorithm)) = (self.key_file, self.algorithm) {
            let key = if algorithm.is_shared() { read_value(&path) } else { read_text(&path, MAX_SMALL) };
            let key = key.map_err(|error| {
                Failure::misuse(&format!("--key-file: expected a file that can be read: {error}"))
            })?;
            Signer::new(algorithm, key.as_bytes(), kid)
        } else {
            let secret = config.auth.keys.secret.ok_or_else(|| Failure::misuse(NO_SECRET))?;
            Signer::new(Algorithm::Hs256, secret.expose(), kid)
        };
        let signer = signer.map_err(|error| Failure::misuse(&error))?;
        let wanted = Wanted {
            subject: &self.sub,
            grants: &self.room,
            issuer: config.auth.issuer.as_deref(),
            // One of the names is enough; use the first.
            audience: config.auth.audience.get(..1).unwrap_or_default(),
            ttl: self.ttl,
        };
        let token = signer.sign(&wanted, UnixSeconds::from(SystemTime::now()));
        let token = token.map_err(|error| Failure::misuse(&error))?;
        Ok(Invocation::Done(say(out, &format!("{}\n", token.expose()), Status::Success)))
    }
}

#[derive(Debug, Args)]
struct HealthcheckArgs {
    /// The URL to request; by default /readyz at the configured ops.listen
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    #[command(flatten)]
    layers: Layers,
}

impl HealthcheckArgs {
    fn run(
        self,
        layers: Layers,
        env: BTreeMap<String, String>,
        out: &mut dyn Write,
    ) -> Result<Invocation, Failure> {
        let asked = match self.url {
            Some(url) => Asked { url, source: None },
            None => Asked::configured(layers.and(self.layers), env)?,
        };
        match healthcheck::get(&asked.url) {
            Ok(status) if status.is_success() => {
                Ok(Invocation::Done(say(out, &format!("{asked}: {status}\n"), Status::Success)))
            }
            Ok(status) => Err(Failure { text: format!("{asked}: {status}"), status: Status::Failure }),
            Err(error @ healthcheck::Error::Url) => Err(Failure::misuse(&error)),
            Err(error) => {
                let hint = match asked.source {
                    Some(Source::Default) => {
                        "; if the node listens elsewhere, name its configuration with --config or TIDEGATE_CONFIG"
                    }
                    _ => "",
                };
                Err(Failure { text: format!("{asked}: {error}{hint}"), status: Status::Failure })
            }
        }
    }
}

/// The URL that a health check requests, and where it came from.
struct Asked {
    url: String,
    /// `None` if the command line gave the URL.
    source: Option<Source>,
}

impl Asked {
    fn configured(layers: Layers, env: BTreeMap<String, String>) -> Result<Self, Failure> {
        let (sources, wrong) = layers.sources(env)?;
        if !wrong.is_empty() {
            return Err(ConfigErrors::from(wrong).into());
        }
        let (listen, source) = Config::ops_listen(&sources)?;
        if listen.port() == 0 {
            let text = format!(
                "ops.listen ({source}) lets the system choose a port: give the node's URL with --url"
            );
            return Err(Failure::misuse(&text));
        }
        Ok(Self { url: healthcheck::readiness_url(listen), source: Some(source) })
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            None => write!(f, "{}", self.url),
            Some(source) => write!(f, "{} (ops.listen: {source})", self.url),
        }
    }
}

/// The error message and status of a failed command.
struct Failure {
    text: String,
    status: Status,
}

impl Failure {
    fn misuse(text: &(impl ToString + ?Sized)) -> Self {
        Self { text: text.to_string(), status: Status::Misuse }
    }
}

impl From<ConfigErrors> for Failure {
    fn from(errors: ConfigErrors) -> Self {
        Self::misuse(&errors)
    }
}

/// Writes the text and returns the status; a failure if it could not be written, for example to a closed
/// pipe.
fn say(stream: &mut dyn Write, text: &dyn std::fmt::Display, status: Status) -> Status {
    match write!(stream, "{text}").and_then(|()| stream.flush()) {
        Err(_) if status == Status::Success => Status::Failure,
        Ok(()) | Err(_) => status,
    }
}

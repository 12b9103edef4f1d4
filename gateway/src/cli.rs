//! The command line.
//!
//! Owns how the program is called and every command that is not the node itself. `serve` is only recognised
//! here: [`main`] hands a checked configuration to whoever runs the node.
//!
//! Exit status: 0 done, 1 failed, 2 called or configured wrongly. Results go to standard output and nothing
//! else does, so that `TOKEN=$(tidegate token …)` works; complaints go to standard error.

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

/// Does what the command line of this process says. A node is run by `serve`; whatever keeps it from being
/// started has been said on standard error by then.
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

/// The program's version, with the revision it was built from.
pub fn version() -> &'static str {
    concat!(env!("CARGO_PKG_VERSION"), " (", env!("TIDEGATE_REVISION"), ")")
}

/// The revision that the program was built from, or `unknown` (`build.rs` says when that is).
pub fn revision() -> &'static str {
    env!("TIDEGATE_REVISION")
}

/// What a command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// To run a node.
    Serve(Box<Loaded>),
    /// Nothing any more.
    Done(Status),
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It did what it was asked.
    Success,
    /// It could not.
    Failure,
    /// It was called or configured wrongly.
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

/// Understands a command line, the program's name first, and does what it says unless that is to run a node.
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
        // Not refused: help or the version was asked for.
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
        Some(Command::Healthcheck(check)) => check.run(layers, env, out),
    };
    result
        .unwrap_or_else(|failure| Invocation::Done(say(err, &format!("{}\n", failure.text), failure.status)))
}

/// Checks what a node would read when it starts, besides the configuration.
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
    /// Run a node (what happens without a command)
    Serve(Layers),
    /// Print a token, signed with the configured secret or with a key from a file
    Token(TokenArgs),
    /// Say whether the configuration is valid, or everything that is wrong with it
    CheckConfig(Layers),
    /// Print a configuration file with every key, its default and its meaning
    DefaultConfig,
    /// Ask a running node whether it is ready
    Healthcheck(HealthcheckArgs),
}

/// Where the configuration comes from. May stand before and after the command.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Configuration")]
struct Layers {
    /// A configuration file (TOML); without it, the one that `TIDEGATE_CONFIG` names in the environment
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Sets a key, overriding file and environment; may be repeated
    // The text is taken apart later: clap would repeat it in its complaint, and it may hold a secret.
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
    /// Both together; where they disagree, `more` wins.
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

    /// What is to be read, and what is wrong with the flags. The file is read already: what it would have said is
    /// unknown without it, and judging the rest would mislead.
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

/// Splits `key=value` at the first `=` that is not within quotes: a room's name may hold one.
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
    /// Whom the token is for
    #[arg(long, value_name = "NAME")]
    sub: Subject,
    /// What it allows, such as 'chat:*=subscribe,publish'; may be repeated
    #[arg(long, value_name = "PATTERN=OPERATIONS")]
    room: Vec<Grant>,
    /// How long it is good for, such as 30s, 5m or 24h
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_time)]
    ttl: Duration,
    /// Signs with the private key (PEM) or the secret in this file; without it, with
    /// `auth.hs256_secret`
    #[arg(long, value_name = "PATH", requires = "algorithm")]
    key_file: Option<PathBuf>,
    /// How that key signs: HS256, RS256, PS256 (or 384, 512), ES256, ES384 or `EdDSA`
    #[arg(long, value_name = "NAME", requires = "key_file")]
    algorithm: Option<Algorithm>,
    /// The name of the key, as in auth.keys or in a key set
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
            // One of the names is enough, and the first one will do.
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
    /// What to ask; by default /readyz at the configured ops.listen
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
                        "; a node that listens elsewhere is found by its configuration: --config or TIDEGATE_CONFIG"
                    }
                    _ => "",
                };
                Err(Failure { text: format!("{asked}: {error}{hint}"), status: Status::Failure })
            }
        }
    }
}

/// What a health check asks, and what says that it is the node's address.
struct Asked {
    url: String,
    /// `None`: the command line named the URL.
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
            let text =
                format!("ops.listen ({source}) lets the system choose a port: name the node with --url");
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

/// What a command says when it did not succeed.
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

/// Writes and returns the status, or a failure if nobody could have read it: a pipe that was closed early.
fn say(stream: &mut dyn Write, text: &dyn std::fmt::Display, status: Status) -> Status {
    match write!(stream, "{text}").and_then(|()| stream.flush()) {
        Err(_) if status == Status::Success => Status::Failure,
        Ok(()) | Err(_) => status,
    }
}

//! Runs a node as a process, from its configuration until it is told to stop.
//!
//! Owns the process-wide parts: logging, the runtime, signals, the exit code, and the greeting of a first
//! start without a key. [`crate::reload`] handles configuration changes at runtime.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
    thread,
    time::{Duration, SystemTime},
};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    auth::{Grant, Subject, mint},
    cli,
    config::{Config, Loaded, Sources},
    descriptors,
    node::{Departure, Node},
    reload::{ReloadMetrics, Reloader},
    telemetry::{self, InitError},
    vocabulary::Secret,
};

/// Threads for everything except clients' sockets: broker, listeners, ops.
const RUNTIME_THREADS: usize = 2;
/// The lifetime of the token that a first start prints.
const DEMO_TOKEN_TTL: Duration = Duration::from_secs(24 * 60 * 60);
const DEMO_GRANT: &str = "demo:*=subscribe,publish";
const DEMO_SUBJECT: &str = "demo";

/// Serves until SIGTERM or SIGINT, then drains. A second signal stops at once.
///
/// The exit code is 0 after a complete drain, 1 if the node could not start or the drain was cut short.
pub fn run(loaded: Loaded) -> ExitCode {
    // Dropped last, so that the end of the process is logged.
    let log = match telemetry::init(&loaded.config.log) {
        Ok(log) => Some(log),
        // Another subscriber is already installed, so there is a log, but not ours.
        Err(error @ InitError::Taken(_)) => {
            tracing::warn!(%error, "cannot set up the log");
            None
        }
        Err(error @ InitError::Thread(_)) => {
            let _ = writeln!(io::stderr(), "{error}");
            return ExitCode::FAILURE;
        }
    };
    say_what_starts(&loaded.config, &loaded.sources);
    descriptors::raise_limit(&loaded.config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("runtime")
        .enable_all()
        .build();
    let outcome = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let outcome = runtime.block_on(serve(loaded, log.as_ref().map(|log| log.filter.clone())));
        // A hung file read may block its thread forever; everything else has ended.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(Departure::Complete) => ExitCode::SUCCESS,
        Ok(Departure::Cut(_)) => ExitCode::FAILURE,
        Err(error) => {
            tracing::error!(%error, "cannot serve");
            ExitCode::FAILURE
        }
    }
}

async fn serve(loaded: Loaded, log: Option<telemetry::Filter>) -> anyhow::Result<Departure> {
    // Install handlers first: PID 1 ignores SIGTERM by default, and SIGHUP would end any other process.
    let mut stop = Stop::install()?;
    let mut hangup = signal(SignalKind::hangup())?;
    let Loaded { mut config, sources } = loaded;
    let demo = config.demo;
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let mut reloader = Reloader::new(sources, config.clone(), log);
    let node = if config.auth.has_key() {
        Node::start(config)?
    } else {
        let secret = mint::generate_secret()?;
        let own = Secret::new(secret);
        reloader = reloader.with_own_secret(own.clone());
        config.auth.keys.secret = Some(own);
        let node = Node::start(config)?;
        say(greeting(scheme, node.public_address(), &secret, demo)?);
        node
    };
    let metrics = ReloadMetrics::register(node.registry(), SystemTime::now().into())?;
    let signal = tokio::select! {
        signal = stop.wait() => signal,
        never = reloader.run(&node, &metrics, &mut hangup) => match never {},
    };
    tracing::info!(signal, "draining to stop; a second signal stops at once");
    tokio::select! {
        departure = node.drain() => Ok(departure),
        signal = stop.wait() => {
            tracing::warn!(signal, "stopping at once");
            Ok(Departure::Cut(0))
        }
    }
}

/// Logs the first line: the facts that every fault report needs.
fn say_what_starts(config: &Config, sources: &Sources) {
    let file =
        sources.file.as_ref().map_or_else(|| "none".to_owned(), |(path, _)| path.display().to_string());
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        revision = cli::revision(),
        broker = %config.broker.url,
        shards = config.shards,
        config_file = file,
        "starting"
    );
}

/// Tells a first user what to do next. The secret, and so the token, is valid until the process ends.
fn greeting(scheme: &str, public: SocketAddr, secret: &[u8], demo: bool) -> anyhow::Result<String> {
    let subject = Subject::new(DEMO_SUBJECT)?;
    let grants: [Grant; 1] = [DEMO_GRANT.parse()?];
    let token = mint::mint(secret, &subject, &grants, DEMO_TOKEN_TTL, SystemTime::now().into())?;
    let token = token.expose();
    let mut text = format!(
        "No key is configured (under auth), so this node has generated one for this run.\n\
         A token for {DEMO_GRANT}, valid for one day or until this node stops:\n\n  {token}\n\n"
    );
    if demo {
        let host = reachable(public);
        let _ = writeln!(text, "Open the demo page, twice:\n\n  {scheme}://{host}/#token={token}\n");
    }
    Ok(text)
}

/// Writes to standard output from a separate thread, because the write blocks if nobody reads.
fn say(text: String) {
    let write = move || {
        let mut out = io::stdout().lock();
        if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            tracing::warn!(%error, "cannot print the token of this run");
        }
    };
    if let Err(error) = thread::Builder::new().name("greeting".to_owned()).spawn(write) {
        tracing::warn!(%error, "cannot print the token of this run");
    }
}

/// The address under which a browser on this machine reaches `listen`.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        ip if !ip.is_unspecified() => ip,
        std::net::IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        std::net::IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, listen.port())
}

/// The signals that stop a process.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn install() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

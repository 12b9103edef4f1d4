//! The physical limit of TLS connects on this machine: a bare loop of rustls handshakes.
//!
//! A separate process accepts connections, does a full TLS 1.3 handshake for each with an ECDSA P-256
//! certificate, sends one frame, and holds it. It uses the library, cryptography and settings of Tidegate; no
//! HTTP, no token, no session. The clients are those of `storm`, which runs against it.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, CreateFlags, EventData, EventFlags},
    process::{Signal, set_parent_process_death_signal},
};
use rustls::{
    ServerConfig, ServerConnection,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::NoServerSessionStorage,
};

use super::yardstick::WELCOME;
use crate::{
    cli::{HandshakeServer, Handshakes, Storm, load::Run},
    process,
    report::Verdict,
    stop::Stop,
    target::{Protocol, PublishArg, TargetArgs},
    workshop::{self, certificate},
};

const EVENTS_PER_TURN: usize = 1024;

/// Marks the listener among the connections.
const LISTENER: u64 = u64::MAX;

/// Runs the scenario and prints a storm's report.
pub fn run(args: &Handshakes) -> anyhow::Result<Verdict> {
    workshop::with_scratch("handshakes", |scratch| {
        let (ca, key) = certificate(scratch)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("handshake-server").arg("--cert").arg(&ca).arg("--key").arg(key);
        command.arg(format!("--connections={}", args.connections));
        command.args(args.server_cpu.map(|cpu| format!("--cpu={cpu}")));
        let server = Running::spawn(command)?;
        let target = TargetArgs {
            url: format!("wss://{}/", server.address),
            protocol: Protocol::Bare,
            channel: None,
            publish: PublishArg::Client,
            topic: None,
            token: None,
            hs256_secret: None,
            ca: Some(ca),
            insecure: false,
            deflate: false,
            addresses: args.addresses,
        };
        super::storm::run(&Storm {
            connections: args.connections,
            waves: args.waves,
            rooms: 1,
            at_once: args.at_once,
            hold: args.hold,
            expect_refused: Some(0),
            expect_connect_p99: None,
            target,
            run: Run { server_pid: vec![server.pid()], ..args.run.clone() },
        })
    })
}

/// The loop itself, in the process that is measured.
pub fn serve(args: &HandshakeServer) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Ctrl-C reaches the whole process group, but the tester still has to finish its last wave.
    let _ignored = Stop::install(Duration::MAX)?;
    if let Some(cpu) = args.cpu {
        process::pin_to(cpu)?;
    }
    process::allow_descriptors(args.connections as usize)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", listener.local_addr()?)?;
    stdout.flush()?;
    Loop::new(listener, config(&args.cert, &args.key)?)?.run()
}

/// The gateway's settings: tickets are created and sent, and no session is stored. Only one version is
/// allowed, so no other is measured by mistake.
pub(super) fn config(certificate: &Path, key: &Path) -> anyhow::Result<Arc<ServerConfig>> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(certificate)?.collect();
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain?, PrivateKeyDer::from_pem_file(key)?)?;
    config.ticketer = aws_lc_rs::Ticketer::new()?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

struct Loop {
    listener: TcpListener,
    epoll: OwnedFd,
    config: Arc<ServerConfig>,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
}

struct Connection {
    socket: TcpStream,
    session: ServerConnection,
    welcomed: bool,
}

impl Loop {
    fn new(listener: TcpListener, config: Arc<ServerConfig>) -> anyhow::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        Ok(Self { listener, epoll, config, connections: Vec::new(), free: Vec::new() })
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let mut ready = Vec::with_capacity(EVENTS_PER_TURN);
        loop {
            ready.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut ready), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &ready {
                let at = event.data.u64();
                if at == LISTENER {
                    self.accept()?;
                    continue;
                }
                let at = usize::try_from(at)?;
                let Some(slot) = self.connections.get_mut(at) else { continue };
                // A client that fails and one that leaves are treated alike.
                if !slot.as_mut().is_some_and(|connection| connection.turn().unwrap_or(false)) {
                    *slot = None;
                    self.free.push(at);
                }
            }
        }
    }

    fn accept(&mut self) -> anyhow::Result<()> {
        loop {
            let socket = match self.listener.accept() {
                Ok((socket, _)) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            socket.set_nonblocking(true)?;
            socket.set_nodelay(true)?;
            let at = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            epoll::add(&self.epoll, &socket, EventData::new_u64(at as u64), EventFlags::IN)?;
            let session = ServerConnection::new(Arc::clone(&self.config))?;
            if let Some(slot) = self.connections.get_mut(at) {
                *slot = Some(Connection { socket, session, welcomed: false });
            }
        }
    }
}

impl Connection {
    /// Handles readiness; `false` once the connection has ended.
    fn turn(&mut self) -> io::Result<bool> {
        let Self { socket, session, welcomed } = self;
        if session.read_tls(socket)? == 0 {
            return Ok(false);
        }
        session.process_new_packets().map_err(io::Error::other)?;
        if !*welcomed && !session.is_handshaking() {
            *welcomed = true;
            session.writer().write_all(&WELCOME)?;
        }
        // A handshake's few kilobytes fit an empty socket buffer: a full one does not belong to a client of
        // this program.
        while session.wants_write() {
            session.write_tls(socket)?;
        }
        Ok(true)
    }
}

/// A bare loop's process, killed when this is dropped.
pub(super) struct Running {
    child: Child,
    pub(super) address: SocketAddr,
}

impl Running {
    /// Starts a process that prints its address.
    pub(super) fn spawn(mut command: Command) -> anyhow::Result<Self> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("standard output is piped")?;
        // Created here, so that the process is killed if what follows fails.
        let mut running = Self { child, address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)) };
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        running.address = line.trim().parse().context("the bare loop did not start")?;
        Ok(running)
    }

    /// The process to measure.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _: io::Result<()> = self.child.kill();
        let _: io::Result<_> = self.child.wait();
    }
}

//! The physical limit of idle connections on this machine: a bare loop of ping and pong.
//!
//! A separate process, one thread with one epoll, accepts connections, pings each once per interval and reads the
//! pongs. It looks at its schedule ten times a second, as Tidegate does. With `--tls` it uses the library,
//! cryptography and settings of Tidegate. No HTTP, no session, no outbound queue. The clients are those of
//! `idle`, which runs against it.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    buffer::spare_capacity,
    event::{
        Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
    process::{Signal, set_parent_process_death_signal},
};
use rustls::{ServerConfig, ServerConnection};

use super::{
    handshakes::{self, Running},
    yardstick::WELCOME,
};
use crate::{
    cli::{HeartbeatServer, Heartbeats, Idle, load::Run},
    process,
    report::Verdict,
    stop::Stop,
    target::{Protocol, PublishArg, TargetArgs},
    workshop::{self, certificate},
};

const EVENTS_PER_TURN: usize = 1024;
/// How often the loop looks for pings that are due.
const STEP: Duration = Duration::from_millis(100);
/// An empty ping.
const PING: [u8; 2] = [0x89, 0];
/// Marks the listener among the connections.
const LISTENER: u64 = u64::MAX;

/// Runs the scenario and prints the report of `idle`.
pub fn run(args: &Heartbeats) -> anyhow::Result<Verdict> {
    workshop::with_scratch("heartbeats", |scratch| {
        let mut command = Command::new(std::env::current_exe()?);
        let most = args.connections.last().copied().unwrap_or_default();
        command.arg("heartbeat-server").arg(format!("--connections={most}"));
        command.arg(format!("--interval={}ms", args.interval.0.as_millis()));
        command.args(args.server_cpu.map(|cpu| format!("--cpu={cpu}")));
        let ca = if args.tls {
            let (ca, key) = certificate(scratch)?;
            command.arg("--cert").arg(&ca).arg("--key").arg(key);
            Some(ca)
        } else {
            None
        };
        let server = Running::spawn(command)?;
        let scheme = if args.tls { "wss" } else { "ws" };
        super::idle::run(&Idle {
            connections: args.connections.clone(),
            rooms: 1,
            window: args.window,
            expect_bytes: None,
            target: TargetArgs {
                url: format!("{scheme}://{}/", server.address),
                protocol: Protocol::Bare,
                channel: None,
                publish: PublishArg::Client,
                topic: None,
                token: None,
                hs256_secret: None,
                ca,
                insecure: false,
                deflate: false,
                addresses: args.addresses,
            },
            run: Run { server_pid: vec![server.pid()], ..args.run.clone() },
        })
    })
}

/// The loop itself, in the process that is measured.
pub fn serve(args: &HeartbeatServer) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Ctrl-C reaches the whole process group, but the tester still has to finish.
    let _ignored = Stop::install(Duration::MAX)?;
    if let Some(cpu) = args.cpu {
        process::pin_to(cpu)?;
    }
    process::allow_descriptors(args.connections as usize)?;
    let config = args.cert.as_deref().zip(args.key.as_deref());
    let config = config.map(|(cert, key)| handshakes::config(cert, key)).transpose()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", listener.local_addr()?)?;
    stdout.flush()?;
    Loop::new(listener, config, args.interval.0)?.run()
}

struct Loop {
    listener: TcpListener,
    epoll: OwnedFd,
    config: Option<Arc<ServerConfig>>,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    /// The connections to ping in each step; the steps of an interval follow each other in a circle.
    steps: Vec<Vec<usize>>,
    buffer: Vec<u8>,
}

struct Connection {
    socket: TcpStream,
    tls: Option<Box<ServerConnection>>,
    welcomed: bool,
}

impl Loop {
    fn new(
        listener: TcpListener,
        config: Option<Arc<ServerConfig>>,
        interval: Duration,
    ) -> anyhow::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        let steps = usize::try_from(interval.as_millis() / STEP.as_millis())?.max(1);
        Ok(Self {
            listener,
            epoll,
            config,
            connections: Vec::new(),
            free: Vec::new(),
            steps: vec![Vec::new(); steps],
            buffer: vec![0; 64 * 1024],
        })
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let mut ready = Vec::with_capacity(EVENTS_PER_TURN);
        let (mut step, mut next) = (0, Instant::now() + STEP);
        loop {
            ready.clear();
            let left = Timespec::try_from(next.saturating_duration_since(Instant::now()))?;
            match epoll::wait(&self.epoll, spare_capacity(&mut ready), Some(&left)) {
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
                let stays = slot.as_mut().map(|connection| connection.turn(&mut self.buffer));
                if !matches!(stays, Some(Ok(true))) {
                    *slot = None;
                    self.free.push(at);
                }
            }
            if Instant::now() >= next {
                next += STEP;
                step = (step + 1) % self.steps.len();
                for at in self.steps.get(step).into_iter().flatten() {
                    if let Some(connection) = self.connections.get_mut(*at).and_then(Option::as_mut) {
                        // A client that is gone shows at the next read.
                        connection.send(&PING).ok();
                    }
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
                let at = self.connections.len();
                self.connections.push(None);
                // Spread evenly over the interval, whenever they connect.
                let steps = self.steps.len();
                if let Some(step) = self.steps.get_mut(at % steps) {
                    step.push(at);
                }
                at
            });
            epoll::add(&self.epoll, &socket, EventData::new_u64(at as u64), EventFlags::IN)?;
            let tls = self.config.clone().map(ServerConnection::new).transpose()?.map(Box::new);
            let mut connection = Connection { socket, tls, welcomed: false };
            connection.welcome()?;
            if let Some(slot) = self.connections.get_mut(at) {
                *slot = Some(connection);
            }
        }
    }
}

impl Connection {
    /// Handles readiness; `false` once the connection has ended.
    fn turn(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let Some(tls) = &mut self.tls else { return Ok(self.socket.read(buffer)? > 0) };
        if tls.read_tls(&mut self.socket)? == 0 {
            return Ok(false);
        }
        tls.process_new_packets().map_err(io::Error::other)?;
        match tls.reader().read(buffer) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        self.flush()?;
        self.welcome()?;
        Ok(true)
    }

    /// Tells the client that it is connected, once it is.
    fn welcome(&mut self) -> io::Result<()> {
        if self.welcomed || self.tls.as_ref().is_some_and(|tls| tls.is_handshaking()) {
            return Ok(());
        }
        self.welcomed = true;
        self.send(&WELCOME)
    }

    /// Sends a frame. It fits an empty socket buffer: a full one does not belong to a client of this program.
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        match &mut self.tls {
            None => return self.socket.write_all(frame),
            Some(tls) if tls.is_handshaking() => return Ok(()),
            Some(tls) => tls.writer().write_all(frame)?,
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        while tls.wants_write() {
            tls.write_tls(&mut self.socket)?;
        }
        Ok(())
    }
}

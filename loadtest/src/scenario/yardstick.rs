//! The physical limit on this machine: a bare loop of `send(2)`.
//!
//! A separate process accepts one socket per member, waits for a batch on a control connection and writes it
//! to every socket. There are two limits: the coalescing loop uses one system call per batch and socket; with
//! `--per-message` it uses one per message and socket. For single messages both are the same. No protocol, no
//! table, no queue. The tester reads with the same code, from the same addresses, at the same pace as from a
//! gateway.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use rustix::process::{Signal, set_parent_process_death_signal};

use super::cost::{describe_room, rounds};
use crate::{
    cli::{RoomArgs, Yardstick, YardstickServer},
    dialect::Dialect,
    ledger::Counts,
    payload::Payload,
    process::{self, Server},
    publisher::Publisher,
    report::{RoomReport, Verdict, outputs::Outputs},
    room::{Room, Round, Sender},
    stop::Stop,
    target::{Address, Entrance},
    token::Credentials,
    websocket::MAX_FRAME,
};

/// The maximum bytes of a batch: 1,024 of the largest messages would be a gigabyte.
const MAX_BATCH: usize = 64 * MAX_FRAME;

/// An empty pong that tells a member that its connection has been accepted.
pub const WELCOME: [u8; 2] = [0x8A, 0];

/// Runs the scenario and prints its report, or executes the orders of a [`Lockstep`] on standard input.
pub fn run(args: &Yardstick) -> anyhow::Result<Verdict> {
    if args.lockstep {
        // The parent handles the deadline and the first signal.
        set_parent_process_death_signal(Some(Signal::KILL))?;
    }
    let outputs = Outputs::of_common(&args.common)?;
    let stop = super::begin(&args.common)?;
    let server = Running::start(args)?;
    let address = Address {
        socket: server.members,
        tls: None,
        authority: server.members.to_string(),
        path_and_query: String::new(),
        basic: None,
    };
    let entrance = Entrance {
        address,
        dialect: Dialect::Bare,
        channel: String::new(),
        credentials: Credentials::None,
        deflate: false,
        source_addresses: args.addresses,
    };
    let measured = Server::new(vec![server.child.id()]);
    let connect = || Publisher::yardstick(server.control, !args.per_message).map(Sender::Line);
    let load = args.room.load()?;
    let room = Room::open_with(&entrance, args.room.members, connect, measured, load, &stop);
    if args.lockstep {
        let mut room = room?;
        obey(&mut room, &stop)?;
        room.close()?;
        return Ok(Verdict::AsExpected);
    }
    let mut report = RoomReport::new(describe(&args.room, args.per_message), &args.room);
    let outcome = room.and_then(|room| rounds(room, &args.room, &mut report, &stop));
    report.interrupted = stop.early_end(outcome)?;
    report.conclude();
    report.judge(Some(0));
    outputs.deliver(&report.document(), &report)?;
    Ok(report.verdict())
}

/// One line that describes the measurement.
pub fn describe(room: &RoomArgs, per_message: bool) -> String {
    let limit = match (room.burst, per_message) {
        (1, _) => "a bare loop of send(2)",
        (_, false) => "a bare loop of one send(2) per batch",
        (_, true) => "a bare loop of one send(2) per message",
    };
    format!("yardstick, {limit}: {}", describe_room(room))
}

/// The loop itself, in the process that is measured.
pub fn serve(args: &YardstickServer) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Ctrl-C reaches the whole process group, but the tester still has to finish its last round.
    let _ignored = Stop::install(Duration::MAX)?;
    if let Some(cpu) = args.cpu {
        process::pin_to(cpu)?;
    }
    process::allow_descriptors(args.members)?;
    let members = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let control = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{} {}", members.local_addr()?, control.local_addr()?)?;
    stdout.flush()?;
    let sockets = (0..args.members)
        .map(|_| {
            let (mut socket, _) = members.accept()?;
            socket.set_nodelay(true)?;
            socket.write_all(&WELCOME)?;
            Ok(socket)
        })
        .collect::<io::Result<Vec<_>>>()?;
    let (mut control, _) = control.accept()?;
    let (mut header, mut batch) = ([0; 12], Vec::new());
    while read_or_end(&mut control, &mut header)? {
        let [_, _, _, coalesce, c0, c1, c2, c3, l0, l1, l2, l3] = header;
        let count = usize::try_from(u32::from_be_bytes([c0, c1, c2, c3]))?;
        let length = usize::try_from(u32::from_be_bytes([l0, l1, l2, l3]))?;
        let bytes = count.checked_mul(length).filter(|&bytes| bytes <= MAX_BATCH);
        batch.resize(bytes.context("a batch beyond the bound")?, 0);
        control.read_exact(&mut batch)?;
        let piece = if coalesce == 0 { length } else { batch.len() };
        for mut socket in &sockets {
            for piece in batch.chunks(piece.max(1)) {
                socket.write_all(piece)?;
            }
        }
    }
    Ok(())
}

/// A yardstick in a separate process, controlled one round at a time.
///
/// Two swarms of 10,000 do not fit under one descriptor limit, and with separate processes neither leg's CPU
/// time includes the other's.
#[derive(Debug)]
pub struct Lockstep {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Lockstep {
    /// Starts a yardstick with the same room as `args`, without waiting: its members connect meanwhile.
    pub fn start(args: &Yardstick) -> anyhow::Result<Self> {
        let room = &args.room;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("yardstick").arg("--lockstep");
        for (flag, value) in [
            ("--members", room.members.to_string()),
            ("--size", room.size.to_string()),
            ("--burst", room.burst.to_string()),
            ("--patience", format!("{}us", room.patience.0.as_micros())),
            ("--addresses", args.addresses.to_string()),
            ("--time-limit", format!("{}us", args.common.time_limit.0.as_micros())),
        ] {
            command.arg(flag).arg(value);
        }
        if room.payload == Payload::Json {
            command.arg("--payload=json");
        }
        if let Some(rate) = room.rate {
            command.arg("--rate").arg(rate.to_string());
        }
        if args.per_message {
            command.arg("--per-message");
        }
        for (flag, cpu) in [("--server-cpu", args.server_cpu), ("--client-cpu", args.common.client_cpu)] {
            if let Some(cpu) = cpu {
                command.arg(flag).arg(cpu.to_string());
            }
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let answers = BufReader::new(child.stdout.take().context("standard output is piped")?);
        Ok(Self { child, answers })
    }

    /// Runs one round and waits for its end; returns the round and the counts since the start.
    pub fn round(&mut self, messages: u64) -> anyhow::Result<(Round, Counts)> {
        let orders = self.child.stdin.as_mut().context("standard input is piped")?;
        writeln!(orders, "{messages}").context("the yardstick has ended")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the yardstick has ended");
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Lockstep {
    fn drop(&mut self) {
        // Closing its input ends the process; waiting for it leaves no zombie.
        drop(self.child.stdin.take());
        let _: io::Result<_> = self.child.wait();
    }
}

fn obey(room: &mut Room, stop: &Stop) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    for order in io::stdin().lock().lines() {
        let round = room.round(order?.trim().parse()?, stop)?;
        serde_json::to_writer(&mut stdout, &(round, room.counts()))?;
        writeln!(stdout)?;
        stdout.flush()?;
    }
    Ok(())
}

/// Fills `buffer`; `false` if the stream ended before its first byte.
fn read_or_end(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<bool> {
    match stream.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// A yardstick server, killed when this is dropped.
struct Running {
    child: Child,
    members: SocketAddr,
    control: SocketAddr,
}

impl Running {
    fn start(args: &Yardstick) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("yardstick-server").arg("--members").arg(args.room.members.to_string());
        if let Some(cpu) = args.server_cpu {
            command.arg("--cpu").arg(cpu.to_string());
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("standard output is piped")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let (members, control) = line.trim().split_once(' ').context("the yardstick server did not start")?;
        Ok(Self { child, members: members.parse()?, control: control.parse()? })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _: io::Result<()> = self.child.kill();
        let _: io::Result<_> = self.child.wait();
    }
}

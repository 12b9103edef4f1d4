//! `tidegate-loadtest`: measures what a delivery and a connection cost a `WebSocket` gateway, and counts lost
//! messages.
//!
//! A scenario opens clients, publishes numbered messages, and accounts for every delivery. The layout:
//!
//! | module | what it owns |
//! |---|---|
//! | [`cli`] | the flags, on the command line and in a file |
//! | [`scenario`] | what each scenario runs, in which order, and what its report holds |
//! | [`target`], [`web`], [`token`] | the server under test, how to publish to it, the identity of clients |
//! | [`swarm`], [`member`] | the connections: one epoll loop, nothing allocated per message |
//! | [`dialect`], [`websocket`], [`sse`], [`tls`], [`inflate`] | the protocols on them |
//! | [`publisher`] | the connection that publishes without a client: HTTP, Redis |
//! | [`stamp`], [`payload`], [`ledger`], [`latency`] | the stamp of a message, its content, and the accounting of deliveries |
//! | [`compare`] | Tidegate and other gateways, started and measured in turn |
//! | [`budgets`] | the cost budgets of Tidegate, and their measurement |
//! | [`workshop`], [`probe`] | servers started by the tester, and requests to them |
//! | [`room`] | rounds that measure what a delivery costs |
//! | [`capacity`] | the size of a fleet, computed from unit costs |
//! | [`flow`], [`tap`], [`relay`], [`redis`] | rounds that measure throughput, Redis without a gateway, and the smallest gateway |
//! | [`crowd`], [`place`] | clients of rooms with a history, which drop their connections and come back |
//! | [`fleet`] | nodes on one Redis for them |
//! | [`journal`], [`pipeline`], [`dice`] | numbered messages that are recorded, many commands to Redis in flight, random choices |
//! | [`plan`], [`crew`], [`timeline`], [`live`] | a run over several processes, and the sum of their updates |
//! | [`worker`], [`books`] | one of these processes: its share of the clients and of the schedule |
//! | [`acks`] | which sizes of messages can be compared |
//! | [`process`], [`syscalls`] | CPU time, memory, pinning, descriptors; system calls |
//! | [`report`] | warnings, expectations, tables, plots, JSON |
//! | [`clock`], [`stop`], [`exit`] | the time, the reasons to end a run, and the exit codes |
//!
//! Linux only: the tester reads `/proc` and waits with epoll. `README.md` explains each number.

mod acks;
#[cfg(test)]
mod allocations;
mod books;
mod budgets;
mod capacity;
mod cli;
mod clock;
mod compare;
mod crew;
mod crowd;
mod dialect;
mod dice;
mod exit;
mod fleet;
mod flow;
mod inflate;
mod journal;
mod latency;
mod ledger;
mod live;
mod member;
mod payload;
mod pipeline;
mod place;
mod plan;
mod probe;
mod process;
mod publisher;
mod redis;
mod relay;
mod report;
mod room;
mod scenario;
mod sse;
mod stamp;
mod stop;
mod swarm;
mod syscalls;
mod tap;
mod target;
mod timeline;
mod tls;
mod token;
mod web;
mod websocket;
mod worker;
mod workshop;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::FromArgMatches;

use crate::{
    cli::{Cli, Scenario},
    exit::Exit,
    report::Verdict,
};

fn main() -> ExitCode {
    let outcome = cli::file::expand(std::env::args_os().collect()).and_then(run);
    let (exit, words) = match outcome {
        Ok(Verdict::AsExpected) => return Exit::Met.into(),
        Ok(Verdict::Unexpected(words)) => (Exit::NotMet, words),
        Ok(Verdict::Interrupted(words)) => (Exit::Interrupted, words),
        Err(error) => (Exit::Failed, format!("{error:#}")),
    };
    // Standard error may be closed; the exit code still reports the failure.
    let _: io::Result<()> = writeln!(io::stderr(), "tidegate-loadtest: {}", web::redacted(&words));
    exit.into()
}

fn run(arguments: Vec<std::ffi::OsString>) -> anyhow::Result<Verdict> {
    let matches = match cli::command().try_get_matches_from(arguments) {
        Ok(matches) => matches,
        // Help and the version are not errors.
        Err(error) if !error.use_stderr() => error.exit(),
        // The message repeats the arguments, which may hold a password, so it is redacted like other errors.
        Err(error) => anyhow::bail!("{}", error.render().to_string().trim_end()),
    };
    match Cli::from_arg_matches(&matches)?.scenario {
        Scenario::Cost(args) => scenario::cost::run(&args),
        Scenario::Yardstick(args) => scenario::yardstick::run(&args),
        Scenario::CompareLimit(args) => scenario::compare_limit::run(&args),
        Scenario::CompareRooms(args) => scenario::compare_rooms::run(&args),
        Scenario::Intake(args) => scenario::flow::intake(&args),
        Scenario::Publish(args) => scenario::flow::publish(&args),
        Scenario::Relay(args) => scenario::relay::relay(&args),
        Scenario::CompareRelay(args) => scenario::relay::compare(&args),
        Scenario::RelayServer(args) => relay::serve(&args).map(|()| Verdict::AsExpected),
        Scenario::Resubscribe(args) => scenario::resubscribe::run(&args),
        Scenario::Jitter(args) => scenario::jitter::run(&args),
        Scenario::Resume(args) => scenario::resume::run(&args),
        Scenario::History(args) => scenario::history::run(&args),
        Scenario::Outage(args) => scenario::outage::run(&args),
        Scenario::Repair(args) => scenario::repair::run(&args),
        Scenario::Handshakes(args) => scenario::handshakes::run(&args),
        Scenario::HandshakeServer(args) => scenario::handshakes::serve(&args).map(|()| Verdict::AsExpected),
        Scenario::Heartbeats(args) => scenario::heartbeats::run(&args),
        Scenario::HeartbeatServer(args) => scenario::heartbeats::serve(&args).map(|()| Verdict::AsExpected),
        Scenario::Start(args) => scenario::start::run(&args),
        Scenario::Budgets(args) => budgets::run(&args),
        Scenario::Compare(args) => compare::run(&args),
        Scenario::YardstickServer(args) => scenario::yardstick::serve(&args).map(|()| Verdict::AsExpected),
        Scenario::TapServer(args) => tap::serve(&args).map(|()| Verdict::AsExpected),
        Scenario::Fanout(args) => scenario::load::fanout(&args),
        Scenario::Rooms(args) => scenario::load::rooms(&args),
        Scenario::Chat(args) => scenario::load::chat(&args),
        Scenario::Slow(args) => scenario::load::slow(&args),
        Scenario::Mixed(args) => scenario::load::mixed(&args),
        Scenario::Storm(args) => scenario::storm::run(&args),
        Scenario::Idle(args) => scenario::idle::run(&args),
        Scenario::Capacity(args) => capacity::run(&args),
        Scenario::Worker => worker::run().map(|()| Verdict::AsExpected),
    }
}

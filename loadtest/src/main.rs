//! `tidegate-loadtest`: what a delivery and a connection cost a `WebSocket` gateway, and what it lost.
//!
//! A scenario opens members, publishes numbered messages, and keeps exact books. The layout:
//!
//! | module | what it owns |
//! |---|---|
//! | [`scenario`] | what is run, in which order, and what its report holds |
//! | [`room`] | the pace of a round and its measurements |
//! | [`swarm`] | the connections that listen: one epoll loop, nothing allocated per message |
//! | [`publisher`] | the connection that publishes: WebSocket, HTTP, Redis |
//! | [`ledger`] | delivered, missing, duplicated, out of order, exactly |
//! | [`stamp`] | the marks a test message carries |
//! | [`websocket`] | frames and the upgrade, as bytes |
//! | [`process`] | CPU time, memory, pinning, descriptors |
//! | [`report`] | medians, tables, JSON |
//! | [`target`], [`cli`], [`stop`] | what was asked for, and when to end |
//!
//! The tester is Linux only: it reads `/proc` and waits with epoll. `README.md` says what each number means.

mod cli;
mod ledger;
mod process;
mod publisher;
mod report;
mod room;
mod scenario;
mod stamp;
mod stop;
mod swarm;
mod target;
mod websocket;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;

use crate::{
    cli::{Cli, Scenario},
    report::Verdict,
};

/// A stated expectation was not met.
const UNEXPECTED: u8 = 1;
/// The test could not be carried out.
const FAILED: u8 = 2;

fn main() -> ExitCode {
    let outcome = match Cli::parse().scenario {
        Scenario::Fanout(args) => scenario::fanout::run(&args),
        Scenario::Yardstick(args) => scenario::yardstick::run(&args),
        Scenario::CompareLimit(args) => scenario::compare_limit::run(&args),
        Scenario::Idle(args) => scenario::idle::run(&args),
        Scenario::YardstickServer(args) => scenario::yardstick::serve(&args).map(|()| Verdict::AsExpected),
    };
    let (code, words) = match outcome {
        Ok(Verdict::AsExpected) => return ExitCode::SUCCESS,
        Ok(Verdict::Unexpected(words)) => (UNEXPECTED, words),
        Err(error) => (FAILED, format!("{error:#}")),
    };
    // Standard error may be gone; the exit code still speaks.
    let _: io::Result<()> = writeln!(io::stderr(), "tidegate-loadtest: {words}");
    ExitCode::from(code)
}

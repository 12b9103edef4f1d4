//! The scenarios, one module per kind: arguments come from [`cli`](crate::cli), reports go to
//! [`report`](crate::report).

pub mod compare_limit;
pub mod compare_rooms;
pub mod cost;
pub mod flow;
pub mod handshakes;
pub mod heartbeats;
pub mod held;
pub mod history;
pub mod idle;
pub mod jitter;
pub mod load;
pub mod outage;
pub mod relay;
pub mod repair;
pub mod resubscribe;
pub mod resume;
pub mod start;
pub mod storm;
pub mod yardstick;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use anyhow::ensure;
use clap::ValueEnum;

use crate::{
    cli::{Common, history::Follower, load::Run},
    clock,
    crew::Crew,
    live::Live,
    plan::{Group, Order, Plan},
    process::{self, Memory, Server},
    stop::Stop,
    swarm::OPENING_AT_ONCE,
    target::{Protocol, TargetArgs},
};

/// Pins this process as requested and installs the handlers that end the run.
fn begin(common: &Common) -> anyhow::Result<Stop> {
    if let Some(cpu) = common.client_cpu {
        process::pin_to(cpu)?;
    }
    Ok(Stop::install(common.time_limit.0)?)
}

/// Installs the handlers that end the run, and checks that the server can be measured: a wrong pid is
/// reported before thousands of connections are opened.
fn begin_run(run: &Run) -> anyhow::Result<(Stop, Server)> {
    let server = Server::new(run.server_pid.clone());
    server.cpu()?;
    Ok((Stop::install(run.time_limit.0)?, server))
}

fn plan_of(run: &Run, groups: Vec<Group>) -> Plan {
    Plan {
        run: process::run_id(),
        groups,
        part: 0,
        parts: run.processes,
        ramp: clock::nanos(run.ramp.0),
        at_once: u32::try_from(OPENING_AT_ONCE).unwrap_or(u32::MAX),
        tolerant: false,
        client_cpu: run.client_cpu,
    }
}

/// Memory counts as settled when this many consecutive samples, [`SAMPLE`] apart, differ by less than
/// [`SETTLED`] bytes.
const STEADY_SAMPLES: usize = 10;
const SAMPLE: Duration = Duration::from_millis(200);
const SETTLED: u64 = 64 * 1024;

/// After this time memory is measured even if it has not settled, and the report says so.
const SETTLE_PATIENCE: Duration = Duration::from_secs(15);

/// How long to wait for arrivals in one turn.
const GLANCE: Duration = Duration::from_millis(50);

/// Samples memory until it is stable; returns the last sample, and whether it was stable. `sample` waits for
/// the given time first.
fn settle(
    stop: &Stop,
    mut sample: impl FnMut(Duration) -> anyhow::Result<Memory>,
) -> anyhow::Result<(Memory, bool)> {
    let begun = Instant::now();
    let mut samples = VecDeque::with_capacity(STEADY_SAMPLES + 1);
    loop {
        let memory = sample(SAMPLE)?;
        samples.push_back(memory.rss);
        if samples.len() > STEADY_SAMPLES {
            samples.pop_front();
        }
        let (low, high) = (samples.iter().min(), samples.iter().max());
        let spread = high.zip(low).map_or(0, |(high, low)| high - low);
        if samples.len() == STEADY_SAMPLES && spread < SETTLED {
            return Ok((memory, true));
        }
        if begun.elapsed() > SETTLE_PATIENCE || stop.is_set() {
            return Ok((memory, false));
        }
    }
}

/// Checks that the protocol supports several rooms on one connection.
fn check_several_rooms(target: &TargetArgs) -> anyhow::Result<()> {
    ensure!(
        target.protocol == Protocol::Centrifuge,
        "--rooms-per-client: only the Centrifuge protocol has several rooms on one connection; use --protocol centrifuge"
    );
    Ok(())
}

/// Checks that `rooms` can be divided among clients that are in `each` rooms each.
fn check_rooms_per_client(target: &TargetArgs, rooms: u32, each: u32) -> anyhow::Result<()> {
    if each > 1 {
        check_several_rooms(target)?;
    }
    ensure!(rooms.is_multiple_of(each), "--rooms must be a multiple of --rooms-per-client");
    Ok(())
}

/// The names of protocols, for a title.
fn names(protocols: &[Follower]) -> String {
    let name = |follower: &Follower| follower.to_possible_value().map(|value| value.get_name().to_owned());
    protocols.iter().filter_map(name).collect::<Vec<_>>().join(", ")
}

/// Opens every connection of the plan. If not all become ready that is an error: a test with fewer clients
/// than requested is a different test. `false` if the run is to end first.
fn open_all(crew: &mut Crew, live: &Live, stop: &Stop) -> anyhow::Result<bool> {
    let clients = crew.plan.clients();
    live.doing("connecting");
    crew.order(&Order::Open(clients))?;
    if !crew.until(stop, Crew::is_settled, |crew| live.show(crew))? {
        return Ok(false);
    }
    ensure!(
        crew.totals.standing == clients,
        "{} of {clients} clients are ready{}",
        crew.totals.standing,
        crew.totals.first_loss.as_deref().map(|why| format!("; {why}")).unwrap_or_default()
    );
    Ok(true)
}

//! What can be run. One module per kind of scenario: its arguments come from [`cli`](crate::cli), its report
//! goes to [`report`](crate::report).

pub mod compare_limit;
pub mod cost;
pub mod handshakes;
pub mod held;
pub mod idle;
pub mod load;
pub mod start;
pub mod storm;
pub mod yardstick;

use anyhow::{bail, ensure};

use crate::{
    cli::{Common, load::Run},
    clock,
    crew::Crew,
    live::Live,
    plan::{Group, Order, Plan},
    process::{self, Server},
    stop::Stop,
    swarm::OPENING_AT_ONCE,
};

/// Pins this process as asked and starts to listen for the end of the run.
fn begin(common: &Common) -> anyhow::Result<Stop> {
    if let Some(cpu) = common.client_cpu {
        process::pin_to(cpu)?;
    }
    Ok(Stop::install(common.time_limit.0)?)
}

/// Starts to listen for the end of the run, and makes sure that the server can be measured: a wrong pid is told
/// before thousands of connections are opened.
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

/// Opens every connection of the plan. Anything but all of them standing is an error: a test of fewer clients
/// than asked for is another test.
fn open_all(crew: &mut Crew, live: &Live, stop: &Stop) -> anyhow::Result<()> {
    let clients = crew.plan.clients();
    live.doing("connecting");
    crew.order(&Order::Open(clients))?;
    if !crew.until(stop, Crew::is_settled, |crew| live.show(crew))? {
        bail!("ended while connecting; {} of {clients} stand", crew.totals.standing);
    }
    ensure!(
        crew.totals.standing == clients,
        "{} of {clients} clients stand{}",
        crew.totals.standing,
        crew.totals.first_loss.as_deref().map(|why| format!("; {why}")).unwrap_or_default()
    );
    Ok(())
}

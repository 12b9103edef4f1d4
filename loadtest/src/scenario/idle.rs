//! Many connections that do nothing.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::{GLANCE, fanout::entrance};
use crate::{
    cli::Idle,
    process::{self, Memory, Server},
    report::{self, IdleReport, Level, Verdict},
    stop::Stop,
    swarm::{Event, Swarm},
};

/// Memory counts as settled when so many samples in a row, [`SAMPLE`] apart, differ by less than
/// [`SETTLED`] bytes.
const STEADY_SAMPLES: usize = 10;
const SAMPLE: Duration = Duration::from_millis(200);
const SETTLED: u64 = 64 * 1024;

/// Then it is measured as it is, and the report says so.
const SETTLE_PATIENCE: Duration = Duration::from_secs(15);

/// Runs the scenario and prints its report.
pub fn run(args: &Idle) -> anyhow::Result<Verdict> {
    ensure!(args.connections.is_sorted(), "--connections must ascend");
    let most = *args.connections.last().context("--connections is empty")?;
    let stop = super::begin(&args.common)?;
    process::allow_descriptors(most)?;
    let server = Server::new(args.server_pid.clone());
    let entrance = entrance(&args.url, args.addresses);
    let window = Duration::from_secs(args.window);
    let mut swarm = Swarm::new()?;
    let mut held = Held { lost: 0, messages: 0 };
    let mut report = IdleReport::new(format!("idle connections to {}", args.url), args.window);
    for connections in std::iter::once(0).chain(args.connections.iter().copied()) {
        if stop.is_set() {
            break;
        }
        swarm.grow(&entrance, connections, &stop, |event| held.note(&event))?;
        let (memory, settled) = settle(&server, &mut swarm, &mut held, &stop)?;
        let (before, start) = (server.cpu()?.unwrap_or_default(), Instant::now());
        while start.elapsed() < window && !stop.is_set() {
            swarm.drain(GLANCE.min(window), |event| held.note(&event))?;
        }
        let cpu = server.cpu()?.unwrap_or_default().since(before).total() / start.elapsed().as_secs_f64();
        report.levels.push(Level { connections, memory, settled, cpu_per_second: cpu, lost: held.lost });
    }
    report.messages = held.messages;
    swarm.close();
    report.conclude();
    report::print(&report)?;
    report::save(&report, args.common.json.as_deref())?;
    Ok(report.verdict())
}

/// What happened to connections that should have had peace.
struct Held {
    lost: usize,
    messages: u64,
}

impl Held {
    fn note(&mut self, event: &Event<'_>) {
        match event {
            Event::Lost { .. } => self.lost += 1,
            Event::Message { .. } => self.messages += 1,
        }
    }
}

/// Samples memory until it stands still: the last sample, and whether it did.
fn settle(
    server: &Server,
    swarm: &mut Swarm,
    held: &mut Held,
    stop: &Stop,
) -> anyhow::Result<(Memory, bool)> {
    let start = Instant::now();
    let mut samples = VecDeque::with_capacity(STEADY_SAMPLES + 1);
    loop {
        let memory = server.memory()?;
        samples.push_back(memory.rss);
        if samples.len() > STEADY_SAMPLES {
            samples.pop_front();
        }
        let (low, high) = (samples.iter().min(), samples.iter().max());
        let spread = high.zip(low).map_or(0, |(high, low)| high - low);
        if samples.len() == STEADY_SAMPLES && spread < SETTLED {
            return Ok((memory, true));
        }
        if start.elapsed() > SETTLE_PATIENCE || stop.is_set() {
            return Ok((memory, false));
        }
        let until = Instant::now() + SAMPLE;
        while Instant::now() < until {
            swarm.drain(until.saturating_duration_since(Instant::now()), |event| held.note(&event))?;
        }
    }
}

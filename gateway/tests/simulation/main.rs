//! Whole nodes in one thread, from a seed: shard cores, sessions of every protocol, hub, limits and settings
//! are the real ones; sockets, the broker, clients and time are simulated. After every step it is checked
//! that nothing is lost without a gap, doubled or out of order, and that queues keep their bounds; at the end
//! of a seed, that everything has arrived and is accounted for.
//!
//! `cargo test -p tidegate --test simulation` runs for ten seconds, or for as long as `SIMULATION_SECONDS`
//! says. From three of four seeds some rooms have a history, on a server that starts again with all it had, with what it
//! had a while ago or with nothing. A seed that fails is printed with the command that runs it again, and the fewest steps
//! with which it fails.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::struct_excessive_bools,
    clippy::disallowed_methods,
    reason = "a test fails by a panic, and prints what it has done"
)]

mod broker;
mod client;
mod golden;
mod node;
mod random;
mod server;
mod service;
mod task;
#[path = "../../src/session/transcript.rs"]
mod transcript;
mod transport;
mod wire;
mod world;

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use world::{Counts, World};

/// Steps per seed. Many short lives find more than a long one.
const STEPS: u64 = 20_000;

fn from_env(name: &str) -> Option<u64> {
    env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn run(seed: u64, steps: u64) -> Counts {
    golden::play(seed);
    let mut world = World::new(seed);
    world.run(steps);
    world.counts
}

fn fails(seed: u64, steps: u64) -> bool {
    catch_unwind(AssertUnwindSafe(|| run(seed, steps))).is_err()
}

/// The fewest steps with which a seed fails, about.
fn shrink(seed: u64, steps: u64) -> u64 {
    let (mut passes, mut failing) = (0, steps);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    while failing - passes > 1 {
        let middle = passes + (failing - passes) / 2;
        if fails(seed, middle) { failing = middle } else { passes = middle }
    }
    std::panic::set_hook(hook);
    failing
}

#[test]
fn nodes_keep_their_promises_from_every_seed() {
    let steps = from_env("SIMULATION_STEPS").unwrap_or(STEPS);
    if let Some(seed) = from_env("SIMULATION_SEED") {
        println!("{:?}", run(seed, steps));
        return;
    }
    let time = Duration::from_secs(from_env("SIMULATION_SECONDS").unwrap_or(10));
    let first = from_env("SIMULATION_FIRST").unwrap_or(1);
    let (start, mut all, mut seeds) = (Instant::now(), Counts::default(), 0);
    while start.elapsed() < time {
        let seed = first + seeds;
        let Ok(counts) = catch_unwind(AssertUnwindSafe(|| run(seed, steps))) else {
            let after = start.elapsed();
            let fewest = shrink(seed, steps);
            panic!(
                "seed {seed} fails after {after:?}. Run it again:\n  SIMULATION_SEED={seed} SIMULATION_STEPS={fewest} \
                 cargo test --profile ci -p tidegate --test simulation -- --nocapture"
            );
        };
        all = all.plus(counts);
        seeds += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{seeds} seeds, {:.0} steps/s, {:.0} simulated seconds/s: {all:?}",
        all.steps as f64 / seconds,
        all.ticks as f64 / 10.0 / seconds
    );
}

#[test]
fn a_seed_runs_the_same_way_again() {
    let again = |seed| format!("{:?}", run(seed, 3_000));
    for seed in 1..4 {
        assert_eq!(again(seed), again(seed));
    }
}

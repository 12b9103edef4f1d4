//! A server compared with the physical limit: `cost` and `yardstick` in alternating rounds of one run.
//!
//! Machines drift (clock, cache, neighbours); a ratio of medians over alternating rounds is not affected.

use super::{
    cost::{self, describe},
    yardstick::{self, Lockstep},
};
use crate::{
    cli::{Common, CompareLimit, Yardstick},
    report::{CompareReport, RoomReport, Verdict, outputs::Outputs},
    stop::Stop,
};

/// Runs both and prints both reports and their ratio.
pub fn run(args: &CompareLimit) -> anyhow::Result<Verdict> {
    let cost = &args.cost;
    let outputs = Outputs::of_common(&cost.common)?;
    let stop = super::begin(&cost.common)?;
    let mut server = RoomReport::new(describe(cost), &cost.room);
    let title = yardstick::describe(&cost.room, args.per_message);
    let mut limit = RoomReport::new(title, &cost.room);
    server.interrupted = stop.early_end(rounds(args, &mut limit, &mut server, &stop))?;
    limit.interrupted.clone_from(&server.interrupted);
    server.conclude();
    limit.conclude();
    let mut report = CompareReport::new(limit, server);
    report.judge(cost.expect_lost, args.expect_ratio, args.expect_p99_ratio);
    outputs.deliver(&report.document(), &report)?;
    Ok(report.verdict())
}

/// Measures rounds of both in turn; returns whether all were measured.
fn rounds(
    args: &CompareLimit,
    limit_report: &mut RoomReport,
    server_report: &mut RoomReport,
    stop: &Stop,
) -> anyhow::Result<bool> {
    let cost = &args.cost;
    let mut limit = Lockstep::start(&Yardstick {
        server_cpu: args.server_cpu,
        lockstep: true,
        per_message: args.per_message,
        addresses: cost.target.addresses,
        room: cost.room.clone(),
        common: Common { json: None, html: None, ..cost.common.clone() },
    })?;
    let mut room = cost::open(cost, stop)?;
    let warmup = cost.room.warmup();
    if warmup > 0 {
        limit.round(warmup)?;
        room.round(warmup, stop)?;
    }
    let planned = cost.room.rounds as usize;
    while server_report.rounds.len() < planned && !stop.is_set() {
        let (round, counts) = limit.round(cost.room.messages)?;
        limit_report.rounds.push(round);
        limit_report.counts = counts;
        if stop.is_set() {
            break;
        }
        server_report.rounds.push(room.round(cost.room.messages, stop)?);
    }
    server_report.first_loss = room.first_loss().map(str::to_owned);
    server_report.counts = room.close()?;
    Ok(limit_report.complete() == planned && server_report.complete() == planned)
}

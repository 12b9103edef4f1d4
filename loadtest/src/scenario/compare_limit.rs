//! A server beside the physical limit: `cost` and `yardstick` in alternating rounds of one run.
//!
//! Machines drift (clock, cache, neighbours); a ratio of medians over rounds that alternate does not care.

use super::{
    cost::{self, describe},
    yardstick::{self, Lockstep},
};
use crate::{
    cli::{CompareLimit, Yardstick},
    report::{self, CompareReport, RoomReport, Verdict},
};

/// Runs both and prints both reports and their ratio.
pub fn run(args: &CompareLimit) -> anyhow::Result<Verdict> {
    let cost = &args.cost;
    let stop = super::begin(&cost.common)?;
    let mut limit = Lockstep::start(&Yardstick {
        server_cpu: args.server_cpu,
        lockstep: true,
        per_message: args.per_message,
        addresses: cost.target.addresses,
        room: cost.room.clone(),
        common: cost.common.clone(),
    })?;
    let mut room = cost::open(cost, &stop)?;
    let warmup = cost.room.warmup();
    if warmup > 0 {
        limit.round(warmup)?;
        room.round(warmup, &stop)?;
    }
    let mut server_report = RoomReport::new(describe(cost), &cost.room);
    let title = yardstick::describe(&cost.room, args.per_message);
    let mut limit_report = RoomReport::new(title, &cost.room);
    for _ in 0..cost.room.rounds {
        if stop.is_set() {
            break;
        }
        let (round, counts) = limit.round(cost.room.messages)?;
        limit_report.rounds.push(round);
        limit_report.counts = counts;
        if stop.is_set() {
            break;
        }
        server_report.rounds.push(room.round(cost.room.messages, &stop)?);
    }
    server_report.first_loss = room.first_loss().map(str::to_owned);
    server_report.counts = room.close()?;
    server_report.conclude();
    limit_report.conclude();
    let report = CompareReport::new(limit_report, server_report);
    report::deliver(&report.document(), &report, &cost.common)?;
    Ok(report.verdict(cost.expect_lost, args.expect_ratio, args.expect_p99_ratio))
}

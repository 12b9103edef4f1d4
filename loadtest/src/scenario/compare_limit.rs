//! A server beside the physical limit: `fanout` and `yardstick` in alternating rounds of one run.
//!
//! Machines drift (clock, cache, neighbours); a ratio of medians over rounds that alternate does not care.

use super::{
    fanout::{self, describe, describe_room},
    yardstick::Lockstep,
};
use crate::{
    cli::{CompareLimit, Yardstick},
    report::{self, CompareReport, RoomReport, Verdict},
};

/// Runs both and prints both reports and their ratio.
pub fn run(args: &CompareLimit) -> anyhow::Result<Verdict> {
    let fanout = &args.fanout;
    let stop = super::begin(&fanout.common)?;
    let mut limit = Lockstep::start(&Yardstick {
        server_cpu: args.server_cpu,
        lockstep: true,
        room: fanout.room.clone(),
        common: fanout.common.clone(),
    })?;
    let mut room = fanout::open(fanout, &stop)?;
    let warmup = fanout.room.warmup();
    if warmup > 0 {
        limit.round(warmup)?;
        room.round(warmup, &stop)?;
    }
    let mut server_report = RoomReport::new(describe(fanout), &fanout.room);
    let title = format!("yardstick, a bare loop of send(2): {}", describe_room(&fanout.room));
    let mut limit_report = RoomReport::new(title, &fanout.room);
    for _ in 0..fanout.room.rounds {
        if stop.is_set() {
            break;
        }
        let (round, counts) = limit.round(fanout.room.messages)?;
        limit_report.rounds.push(round);
        limit_report.counts = counts;
        if stop.is_set() {
            break;
        }
        server_report.rounds.push(room.round(fanout.room.messages, &stop)?);
    }
    server_report.first_loss = room.first_loss().map(str::to_owned);
    server_report.counts = room.close()?;
    server_report.conclude();
    limit_report.conclude();
    let report = CompareReport::new(limit_report, server_report);
    report::print(&report)?;
    report::save(&report, fanout.common.json.as_deref())?;
    Ok(report.verdict(fanout.expect_lost, args.expect_ratio))
}

//! The cost of a delivery: one room, many members, rounds.

use crate::{
    cli::{Cost, RoomArgs},
    process::Server,
    report::{RoomReport, Verdict, outputs::Outputs},
    room::Room,
    stop::Stop,
};

/// Runs the scenario and prints its report.
pub fn run(args: &Cost) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.common)?;
    let stop = super::begin(&args.common)?;
    let mut report = RoomReport::new(describe(args), &args.room);
    let outcome = open(args, &stop).and_then(|room| rounds(room, &args.room, &mut report, &stop));
    report.interrupted = stop.early_end(outcome)?;
    report.conclude();
    report.judge(args.expect_lost);
    outputs.deliver(&report.document(), &report)?;
    Ok(report.verdict())
}

/// Measures the rounds that `args` request; returns whether all were completed.
pub fn rounds(mut room: Room, args: &RoomArgs, report: &mut RoomReport, stop: &Stop) -> anyhow::Result<bool> {
    let warmup = args.warmup();
    if warmup > 0 {
        room.round(warmup, stop)?;
    }
    while report.rounds.len() < args.rounds as usize && !stop.is_set() {
        report.rounds.push(room.round(args.messages, stop)?);
    }
    report.first_loss = room.first_loss().map(str::to_owned);
    report.counts = room.close()?;
    Ok(report.complete() == args.rounds as usize)
}

/// Opens the room that `args` describe.
pub fn open(args: &Cost, stop: &Stop) -> anyhow::Result<Room> {
    let target = args.target.resolve(1)?;
    let server = Server::new(args.server_pid.clone());
    server.cpu()?; // report a wrong pid before thousands of connections are opened
    Room::open(&target, args.room.members, server, args.room.load()?, stop)
}

/// One line that describes the measurement.
pub fn describe(args: &Cost) -> String {
    let target = args.target.resolve(1);
    let (at, via) = target.map_or_else(
        |_| Default::default(),
        |target| (target.entrance.address.to_string(), format!(", published by {}", target.via)),
    );
    format!("cost of a delivery at {at}{via}: {}", describe_room(&args.room))
}

/// The part of the description that the yardstick shares.
pub fn describe_room(room: &RoomArgs) -> String {
    let together = match room.burst {
        1 => "one message at a time".to_owned(),
        burst => format!("{burst} messages together"),
    };
    let pace = room.rate.map(|rate| format!(", {rate} messages/s")).unwrap_or_default();
    format!("{} members, {} B, {together}{pace}, {} messages a round", room.members, room.size, room.messages)
}

//! What a delivery costs: one room, many members, rounds.

use crate::{
    cli::{Cost, RoomArgs},
    process::Server,
    report::{self, RoomReport, Verdict},
    room::Room,
    stop::Stop,
};

/// Runs the scenario and prints its report.
pub fn run(args: &Cost) -> anyhow::Result<Verdict> {
    let stop = super::begin(&args.common)?;
    let mut room = open(args, &stop)?;
    let mut report = RoomReport::new(describe(args), &args.room);
    let warmup = args.room.warmup();
    if warmup > 0 {
        room.round(warmup, &stop)?;
    }
    for _ in 0..args.room.rounds {
        if stop.is_set() {
            break;
        }
        report.rounds.push(room.round(args.room.messages, &stop)?);
    }
    report.first_loss = room.first_loss().map(str::to_owned);
    report.counts = room.close()?;
    report.conclude();
    report::deliver(&report.document(), &report, &args.common)?;
    Ok(report.verdict(args.expect_lost))
}

/// Opens the room that `args` describe.
pub fn open(args: &Cost, stop: &Stop) -> anyhow::Result<Room> {
    let target = args.target.resolve(1)?;
    let server = Server::new(args.server_pid.clone());
    server.cpu()?; // a wrong pid is told before thousands of connections are opened
    Room::open(&target, args.room.members, server, args.room.load()?, stop)
}

/// One line that says what is measured.
pub fn describe(args: &Cost) -> String {
    let target = args.target.resolve(1);
    let (at, via) = target.map_or_else(
        |_| Default::default(),
        |target| (target.entrance.address.to_string(), format!(", published by {}", target.via)),
    );
    format!("cost of a delivery at {at}{via}: {}", describe_room(&args.room))
}

/// The part of it that the yardstick shares.
pub fn describe_room(room: &RoomArgs) -> String {
    let together = match room.burst {
        1 => "one message at a time".to_owned(),
        burst => format!("{burst} messages together"),
    };
    let pace = room.rate.map(|rate| format!(", {rate} messages/s")).unwrap_or_default();
    format!("{} members, {} B, {together}{pace}, {} messages a round", room.members, room.size, room.messages)
}

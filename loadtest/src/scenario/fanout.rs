//! One room, many members.

use crate::{
    cli::{Fanout, RoomArgs},
    process::Server,
    publisher::Publisher,
    report::{self, RoomReport, Verdict},
    room::Room,
    stop::Stop,
    swarm::Entrance,
    target::Target,
    websocket,
};

/// Runs the scenario and prints its report.
pub fn run(args: &Fanout) -> anyhow::Result<Verdict> {
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
    report::print(&report)?;
    report::save(&report, args.common.json.as_deref())?;
    Ok(report.verdict(args.expect_lost))
}

/// Opens the room that `args` describe.
pub fn open(args: &Fanout, stop: &Stop) -> anyhow::Result<Room> {
    let via = args.publish.settle(&args.url, args.topic.as_deref())?;
    let entrance = entrance(&args.url, args.room.addresses);
    let server = Server::new(args.server_pid.clone());
    server.cpu()?; // a wrong pid is told before thousands of connections are opened
    Room::open(&entrance, args.room.members, || Publisher::connect(&via), server, args.room.load(), stop)
}

/// One line that says what is measured.
pub fn describe(args: &Fanout) -> String {
    let via = args.publish.settle(&args.url, args.topic.as_deref());
    let via = via.map_or_else(|_| String::new(), |via| format!(", published by {via}"));
    format!("fanout of {}{via}: {}", args.url, describe_room(&args.room))
}

/// The part of it that the yardstick shares.
pub fn describe_room(room: &RoomArgs) -> String {
    let together = match room.burst {
        1 => "one message at a time".to_owned(),
        burst => format!("{burst} messages together"),
    };
    format!("{} members, {} B, {together}, {} messages a round", room.members, room.size, room.messages)
}

/// How members get in: by an upgrade, and to this machine from several addresses.
pub fn entrance(url: &Target, addresses: u8) -> Entrance {
    Entrance {
        address: url.address,
        upgrade: Some(websocket::upgrade_request(&url.authority, &url.path_and_query)),
        source_addresses: if url.is_loopback() { addresses } else { 0 },
    }
}

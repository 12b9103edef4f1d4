//! Throughput between Redis and clients: `intake` and `publish`.
//!
//! Rounds alternate with the same publications without a gateway: a pipelined PUBLISH, and a bare subscriber
//! in the gateway's place. The slowest participant sets the pace, and that is often Redis or the tester; the
//! gateway's own cost per publication is its CPU time. Both are reported.

use anyhow::bail;

use crate::{
    cli::flow::{Flow, Intake, Publish},
    dialect::Seat,
    flow::{self, Bare, Clients, Lanes, Load, MemberBooks, Passage, Pipeline, Script, Way, pass},
    payload::Shape,
    process::{self, Cpu, Server},
    publisher::Publisher,
    redis::Link,
    report::{
        Verdict,
        flow::{FlowReport, FlowRound},
        outputs::Outputs,
        ratio,
    },
    stamp::Finder,
    stop::Stop,
    swarm::Swarm,
    tap::{Tap, Wish},
    target::{PublishArg, Redis, Target, TargetArgs, Via},
};

/// From Redis through a gateway to one member of each room.
pub fn intake(args: &Intake) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.flow.common)?;
    let stop = super::begin(&args.flow.common)?;
    let mut report = FlowReport::new(String::new());
    let outcome = measure_intake(args, &mut report, &stop);
    finish(report, &args.flow, outcome, &stop, outputs)
}

fn measure_intake(args: &Intake, report: &mut FlowReport, stop: &Stop) -> anyhow::Result<bool> {
    let Around { target, redis, bare, load, mut meter, .. } =
        Around::new(&args.flow, args.rooms, args.rooms, args.burst)?;
    report.what = format!(
        "intake: Redis to {} rooms of one member at {}, {} B",
        args.rooms, target.entrance.address, load.size
    );
    super::check_rooms_per_client(&args.flow.target, args.rooms, args.rooms_per_client)?;
    let wish = Wish {
        redis: &bare,
        rooms: args.rooms,
        connections: args.subscribers,
        cpu: args.server_cpu,
        verify: None,
    };
    let mut bare = Bare { pipeline: Pipeline::new(Publisher::redis(&bare)?, &load), tap: Tap::start(&wish)? };
    let mut books = MemberBooks {
        lanes: Lanes::new(args.rooms),
        finder: Finder::new(load.run, Shape::dots(load.size)),
        entrance: target.entrance,
        rooms_per_client: args.rooms_per_client,
        first_loss: None,
    };
    let clients = (args.rooms / args.rooms_per_client) as usize;
    process::allow_descriptors(clients)?;
    let mut swarm = Swarm::new()?;
    let seat = |member: usize| {
        let user = u32::try_from(member).unwrap_or(0);
        let (room, rooms) = (user * args.rooms_per_client, args.rooms_per_client);
        Seat { user, room, rooms, stays: false, since: None, listens: true }
    };
    let entrance = books.entrance.clone();
    swarm.grow(&entrance, clients, seat, stop, |event| books.note(event))?;
    let pipeline = Pipeline::new(Publisher::redis(&redis)?, &load);
    let mut way = flow::Intake { pipeline, swarm, books };
    let tap = Some(bare.tap.pid());
    let published = alternate(&mut bare, tap, &mut way, None, &args.flow, &load, &mut meter, report, stop)?;
    let flow::Intake { swarm, books, .. } = way;
    report.counts = books.lanes.counts;
    report.first_loss = books.first_loss;
    report.account(published);
    swarm.close();
    Ok(report.complete() == args.flow.rounds as usize)
}

/// From clients through a gateway into Redis.
pub fn publish(args: &Publish) -> anyhow::Result<Verdict> {
    let outputs = Outputs::of_common(&args.flow.common)?;
    let stop = super::begin(&args.flow.common)?;
    let mut report = FlowReport::new(String::new());
    let outcome = measure_publish(args, &mut report, &stop);
    finish(report, &args.flow, outcome, &stop, outputs)
}

fn measure_publish(args: &Publish, report: &mut FlowReport, stop: &Stop) -> anyhow::Result<bool> {
    let Around { target, redis, bare, load, mut meter } =
        Around::new(&args.flow, args.sessions, args.rooms, args.burst)?;
    report.what = format!(
        "publish: {} clients at {} to {} rooms, {} B, {} in a row, out at Redis",
        args.sessions, target.entrance.address, args.rooms, load.size, load.burst
    );
    let verify = Some((load.run, load.lanes, load.size));
    let wish =
        |redis| Wish { redis, rooms: args.rooms, connections: 1, cpu: args.flow.common.client_cpu, verify };
    let mut without =
        Bare { pipeline: Pipeline::new(Publisher::redis(&bare)?, &load), tap: Tap::start(&wish(&bare))? };
    let entrance = target.entrance;
    process::allow_descriptors(args.sessions as usize)?;
    let mut swarm = Swarm::new()?;
    let seat = |member: usize| {
        let user = u32::try_from(member).unwrap_or(0);
        Seat { user, room: user % args.rooms, rooms: 1, stays: false, since: None, listens: false }
    };
    swarm.grow(&entrance, args.sessions as usize, seat, stop, |_| {})?;
    let mut way = Clients {
        swarm,
        entrance,
        script: Script::new(&load),
        tap: Tap::start(&wish(&redis))?,
        frames: Vec::new(),
        failure: None,
        said: 0,
    };
    let (tap, other) = (Some(without.tap.pid()), Some(way.tap.pid()));
    let published =
        alternate(&mut without, tap, &mut way, other, &args.flow, &load, &mut meter, report, stop)?;
    let Clients { swarm, tap, .. } = way;
    (_, report.counts) = tap.finish()?;
    report.account(published);
    swarm.close();
    Ok(report.complete() == args.flow.rounds as usize)
}

/// The setup that both share.
struct Around {
    target: Target,
    /// Redis, with the topics of the server's rooms and with unused topics.
    redis: Redis,
    bare: Redis,
    load: Load,
    meter: Meter,
}

impl Around {
    fn new(args: &Flow, lanes: u32, rooms: u32, burst: u32) -> anyhow::Result<Self> {
        if args.target.publish != PublishArg::Client {
            bail!("--publish: set the Redis with --redis");
        }
        let publish = PublishArg::from(args.redis.clone());
        let target = TargetArgs { publish, ..args.target.clone() }.resolve(rooms)?;
        let Via::Redis(redis) = target.via.clone() else { bail!("--redis: not a Redis URL") };
        // As long as the others, so that they cost the same.
        let topic = redis.topic.chars().skip(1);
        let bare = Redis { topic: std::iter::once('=').chain(topic).collect(), ..redis.clone() };
        let server = Server::new(args.server_pid.clone());
        server.cpu()?;
        let load = Load {
            run: process::run_id(),
            lanes,
            rooms,
            size: args.size,
            burst,
            window: args.window,
            patience: args.patience.0,
        };
        let meter = Meter { server, redis: Link::open(&redis)? };
        Ok(Self { target, redis, bare, load, meter })
    }
}

/// Measures the CPU time of all participants.
struct Meter {
    server: Server,
    redis: Link,
}

#[derive(Clone, Copy)]
struct Reading {
    server: Option<Cpu>,
    redis: Cpu,
    tap: Option<Cpu>,
    tester: Cpu,
}

impl Meter {
    fn read(&mut self, tap: Option<u32>) -> anyhow::Result<Reading> {
        Ok(Reading {
            server: self.server.cpu()?,
            redis: self.redis.cpu()?,
            tap: tap.map(Cpu::of).transpose()?,
            tester: Cpu::of_self()?,
        })
    }

    fn round(
        &mut self,
        way: &mut impl Way,
        tap: Option<u32>,
        load: &Load,
        messages: u64,
        stop: &Stop,
    ) -> anyhow::Result<(FlowRound, Passage)> {
        let before = self.read(tap)?;
        let passage = pass(way, load, messages, stop)?;
        let after = self.read(tap)?;
        #[expect(clippy::cast_precision_loss, reason = "counts below 2^53")]
        let arrived = passage.arrived as f64;
        let per_million = |cpu: Cpu| (passage.arrived > 0).then(|| cpu.scaled(1e6 / arrived));
        let of = |after: Option<Cpu>, before: Option<Cpu>| {
            after.zip(before).and_then(|(after, before)| per_million(after.since(before)))
        };
        let round = FlowRound {
            messages: passage.published,
            seconds: passage.seconds,
            per_second: ratio(arrived, passage.seconds),
            complete: passage.published == messages && passage.arrived == messages,
            server_cpu: of(after.server, before.server),
            redis_cpu: per_million(after.redis.since(before.redis)),
            subscriber_cpu: of(after.tap, before.tap),
            tester_cpu: per_million(after.tester.since(before.tester)),
        };
        Ok((round, passage))
    }
}

/// Alternates rounds without and with the server; returns how many messages were published through it.
#[expect(clippy::too_many_arguments, reason = "two ways, each with its subscriber, and what they share")]
fn alternate(
    bare: &mut Bare,
    bare_tap: Option<u32>,
    way: &mut impl Way,
    tap: Option<u32>,
    args: &Flow,
    load: &Load,
    meter: &mut Meter,
    report: &mut FlowReport,
    stop: &Stop,
) -> anyhow::Result<u64> {
    let warmup = args.warmup.unwrap_or(args.messages / 10);
    let mut published = 0;
    if warmup > 0 {
        let passage = pass(bare, load, warmup, stop)?;
        report.bare_missing += passage.published - passage.arrived;
        published += pass(way, load, warmup, stop)?.published;
    }
    for _ in 0..args.rounds {
        if stop.is_set() {
            break;
        }
        let (mut round, passage) = meter.round(bare, bare_tap, load, args.messages, stop)?;
        // The server is not involved.
        round.server_cpu = None;
        report.bare.push(round);
        report.bare_missing += passage.published.saturating_sub(passage.arrived);
        let (round, passage) = meter.round(way, tap, load, args.messages, stop)?;
        report.server.push(round);
        published += passage.published;
    }
    Ok(published)
}

fn finish(
    mut report: FlowReport,
    args: &Flow,
    outcome: anyhow::Result<bool>,
    stop: &Stop,
    outputs: Outputs,
) -> anyhow::Result<Verdict> {
    report.interrupted = stop.early_end(outcome)?;
    report.conclude(args);
    outputs.deliver(&report.document(), &report)?;
    Ok(report.verdict())
}

//! Numbered messages, published reliably into rooms with a history, straight into Redis.
//!
//! Owns the numbers, and what is known of each message: that Redis has recorded it, or that a connection was
//! lost before the answer, so that nobody can tell. It calls `tidegate_publish`, as a backend does.

use std::collections::{HashMap, VecDeque};

use anyhow::{Context, bail, ensure};

use crate::{
    payload::Shape,
    pipeline::{Answer, Pipeline},
    place::Place,
    stamp::Stamp,
    target::{NUMBER, Redis},
};

/// The publisher of a run.
#[derive(Debug)]
pub struct Journal {
    redis: Redis,
    /// `None` after the connection was lost.
    pipeline: Option<Pipeline>,
    run: u32,
    shape: Shape,
    /// How many messages each room has got.
    published: Vec<u64>,
    /// The newest position of each room.
    places: Vec<Option<Place>>,
    in_flight: VecDeque<(u32, u64)>,
    /// Messages whose outcome is unknown, ascending, by room.
    doubts: HashMap<u32, Vec<u64>>,
    payload: Vec<u8>,
}

impl Journal {
    /// Connects. The rooms are numbered, and the topic of `redis` contains their number.
    pub fn open(redis: &Redis, rooms: u32, run: u32, shape: Shape) -> anyhow::Result<Self> {
        Ok(Self {
            redis: redis.clone(),
            pipeline: Some(Pipeline::open(redis)?),
            run,
            shape,
            published: vec![0; rooms as usize],
            places: vec![None; rooms as usize],
            in_flight: VecDeque::new(),
            doubts: HashMap::new(),
            payload: Vec::new(),
        })
    }

    /// How many messages each room has got.
    pub fn published(&self) -> &[u64] {
        &self.published
    }

    /// How many have not been answered yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Messages of `room` whose outcome is unknown, ascending.
    pub fn doubts(&self, room: u32) -> &[u64] {
        self.doubts.get(&room).map_or(&[], Vec::as_slice)
    }

    /// Whether there is a connection.
    pub fn is_connected(&self) -> bool {
        self.pipeline.is_some()
    }

    /// Connects again.
    pub fn reopen(&mut self) -> anyhow::Result<()> {
        self.pipeline = Some(Pipeline::open(&self.redis)?);
        Ok(())
    }

    /// Publishes the next message of `room`, which was due at `due`; [`turn`](Self::turn) sends it.
    pub fn publish(&mut self, room: u32, due: u64) -> anyhow::Result<()> {
        let pipeline = self.pipeline.as_mut().context("no connection to Redis")?;
        let sequence = self.published.get_mut(room as usize).context("a room has a number")?;
        let stamp = Stamp { run: self.run, room, publisher: 0, sequence: *sequence, sent: due };
        self.payload.clear();
        stamp.write(&mut self.payload, self.shape);
        let key = log_key(&self.redis, room);
        pipeline.push(&[
            b"FCALL",
            b"tidegate_publish",
            b"1",
            key.as_bytes(),
            &self.payload,
            b"kind",
            b"json",
        ]);
        self.in_flight.push_back((room, *sequence));
        *sequence += 1;
        Ok(())
    }

    /// Sends what is due and reads the answers. An answer that is not the room's next position is an error.
    pub fn turn(&mut self) -> anyhow::Result<()> {
        let Some(pipeline) = &mut self.pipeline else { return Ok(()) };
        let Self { in_flight, places, .. } = self;
        let mut wrong = None;
        let heard = pipeline.flush().and_then(|()| {
            pipeline.hear(|answer| {
                let Some((room, sequence)) = in_flight.pop_front() else { return };
                let place = places.get_mut(room as usize);
                let follows = match (&answer, &place) {
                    (&Answer::Recorded { place: Some(now), duplicate: false }, Some(Some(before))) => {
                        now.epoch > before.epoch
                            || now.epoch == before.epoch && now.offset == before.offset + 1
                    }
                    (Answer::Recorded { place: Some(_), duplicate: false }, Some(None)) => true,
                    _ => false,
                };
                if let (true, Answer::Recorded { place: now, .. }, Some(place)) = (follows, &answer, place) {
                    *place = *now;
                } else if wrong.is_none() {
                    wrong = Some(format!("message {sequence} of room {room}: Redis answered {answer:?}"));
                }
            })
        });
        if let Some(wrong) = wrong {
            bail!("{wrong}");
        }
        if heard.is_err() {
            // The connection is lost. These may have been recorded or not.
            self.pipeline = None;
            for (room, sequence) in self.in_flight.drain(..) {
                self.doubts.entry(room).or_default().push(sequence);
            }
        }
        Ok(())
    }

    /// Fails if the connection is lost, for scenarios that do not interrupt it.
    pub fn ensure_connected(&self) -> anyhow::Result<()> {
        ensure!(self.is_connected(), "Redis closed the connection that publishes");
        Ok(())
    }
}

/// The key of a room's log.
pub fn log_key(redis: &Redis, room: u32) -> String {
    format!("{{{}}}:log", redis.topic.replace(NUMBER, &room.to_string()))
}

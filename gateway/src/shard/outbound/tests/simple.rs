//! The simplest possible queue: what the real one must do, without regard to time.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes};

use crate::shard::outbound::{Full, Lane, Outbound, RoomLane, RoomTag};

/// Frames in a row. Every operation scans them.
#[derive(Debug, Default)]
pub struct Simple {
    pub frames: VecDeque<Frame>,
    head_started: bool,
}

#[derive(Clone, Debug)]
pub struct Frame {
    pub bytes: Bytes,
    lane: Lane,
    /// Nothing may overtake it.
    sealed: bool,
}

impl Simple {
    pub fn push(&mut self, bytes: Bytes, lane: Lane, limit: usize) -> Result<(), Full> {
        if !self.frames.is_empty() && self.cost() + bytes.len() + Outbound::PER_FRAME > limit {
            return Err(Full);
        }
        let place = match lane {
            Lane::Room(RoomLane { priority: true, .. }) => {
                let waiting = self.frames.range(usize::from(self.head_started)..).rev();
                self.frames.len() - waiting.take_while(|ahead| ahead.lets_pass()).count()
            }
            _ => self.frames.len(),
        };
        self.frames.insert(place, Frame { bytes, lane, sealed: false });
        Ok(())
    }

    pub fn push_over(
        &mut self,
        bytes: Bytes,
        lane: RoomLane,
        limit: usize,
        all: bool,
        notice: Option<Bytes>,
    ) -> Result<usize, Full> {
        let noticed = notice.as_ref().map_or(0, |notice| notice.len() + Outbound::PER_FRAME);
        let mut cost = self.cost() + bytes.len() + Outbound::PER_FRAME + noticed;
        let (mut index, mut dropped, mut gap) = (0, 0, None);
        self.frames.retain(|waiting| {
            let started = index == 0 && self.head_started;
            let goes = !started && waiting.is_of(lane.room) && (all || cost > limit);
            if goes {
                gap.get_or_insert((index, waiting.sealed));
                cost -= waiting.bytes.len() + Outbound::PER_FRAME;
                dropped += 1;
            }
            index += 1;
            !goes
        });
        if let (Some((at, sealed)), Some(bytes)) = (gap, notice) {
            self.frames.insert(at, Frame { bytes, lane: Lane::Gap(lane), sealed });
        }
        self.push(bytes, Lane::Room(lane), limit).map(|()| dropped)
    }

    pub fn may_drop(&self, room: RoomTag) -> bool {
        self.frames.range(usize::from(self.head_started)..).any(|frame| frame.is_of(room))
    }

    pub fn has_gap_notice(&self, room: RoomTag) -> bool {
        let tells = |frame: &Frame| matches!(frame.lane, Lane::Gap(lane) if lane.room == room);
        self.frames.range(usize::from(self.head_started)..).any(tells)
    }

    pub fn seal(&mut self) {
        self.frames.iter_mut().for_each(|frame| frame.sealed = true);
    }

    pub fn clear(&mut self) {
        self.frames.truncate(usize::from(self.head_started));
        self.frames.iter_mut().for_each(|frame| frame.sealed = false);
    }

    pub fn advance(&mut self, mut written: usize) {
        while let Some(head) = self.frames.front_mut() {
            if written < head.bytes.len() {
                head.bytes.advance(written);
                self.head_started |= written > 0;
                return;
            }
            written -= head.bytes.len();
            self.frames.pop_front();
            self.head_started = false;
        }
    }

    pub fn pop(&mut self) -> Option<Bytes> {
        self.head_started = false;
        self.frames.pop_front().map(|frame| frame.bytes)
    }

    fn cost(&self) -> usize {
        self.frames.iter().map(|frame| frame.bytes.len() + Outbound::PER_FRAME).sum()
    }
}

impl Frame {
    fn is_of(&self, room: RoomTag) -> bool {
        matches!(self.lane, Lane::Room(lane) if lane.room == room)
    }

    fn lets_pass(&self) -> bool {
        !self.sealed
            && match self.lane {
                Lane::Session => false,
                Lane::Heartbeat => true,
                Lane::Room(lane) | Lane::Gap(lane) => !lane.priority,
            }
    }
}

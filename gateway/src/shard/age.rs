//! The age at which a session is told to move to another node.
//!
//! A newly added node stays empty for as long as existing sessions last. With `public.max_session_age`, each
//! session is told to reconnect once in a while and lands where there is room. Sessions that began together
//! must not end together, so each has its own deadline. The deadline is derived from the session's id, so
//! nothing has to be stored.

use std::time::Duration;

use broker_bridge::SessionId;

use crate::clock::Tick;

/// The part of the age limit that is the same for all sessions.
const FIRM: f32 = 0.8;

/// How old sessions may get.
#[derive(Clone, Copy, Debug)]
pub struct Age {
    limit: Option<Duration>,
    /// When the limit took effect. Older sessions began without it.
    since: Tick,
}

impl Age {
    /// Applies `limit` from `now` on.
    pub fn new(limit: Option<Duration>, now: Tick) -> Self {
        Self { limit, since: now }
    }

    /// When the session that began at `created` reaches its age limit.
    ///
    /// Between 80 % and 100 % of the limit for a session that began under it. A session that is older than
    /// the limit ends at any time within one limit of the change, so a newly set limit does not end all old
    /// sessions at once.
    pub fn end(&self, session: SessionId, created: Tick) -> Tick {
        let Some(limit) = self.limit else { return Tick(u32::MAX) };
        let spread = spread(session);
        if created >= self.since {
            created.after(limit.mul_f32(FIRM + (1.0 - FIRM) * spread))
        } else {
            self.since.after(limit.mul_f32(spread))
        }
    }
}

/// A number in `0..1` for each session. Ids are consecutive, and multiples of the golden ratio are spread as
/// evenly as possible, for any count of them (Knuth, TAOCP volume 3, §6.4).
#[expect(clippy::cast_precision_loss, reason = "24 bits fit an f32's mantissa")]
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is counted up")]
fn spread(session: SessionId) -> f32 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let hash = (session.0 as u64).wrapping_mul(GOLDEN);
    (hash >> 40) as f32 / (1_u64 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF_AN_HOUR: Duration = Duration::from_secs(30 * 60);
    const SESSIONS: u32 = 10_000;

    /// How many of the sessions end in each of `parts` equal parts of the time between two ticks.
    fn histogram(ends: impl Iterator<Item = Tick>, from: u32, to: u32, parts: u32) -> Vec<u32> {
        let mut counts = vec![0; parts as usize];
        for Tick(end) in ends {
            assert!((from..=to).contains(&end), "{from} <= {end} <= {to}");
            counts[((end - from) * parts / (to - from + 1)) as usize] += 1;
        }
        counts
    }

    fn sessions() -> impl Iterator<Item = SessionId> {
        (0..u128::from(SESSIONS)).map(|number| SessionId(7 << 64 | number))
    }

    #[test]
    fn sessions_that_began_together_end_evenly_over_the_last_fifth() {
        let age = Age::new(Some(HALF_AN_HOUR), Tick(0));
        let ends = sessions().map(|session| age.end(session, Tick(1_000)));
        // 24 to 30 minutes later, in ticks of 100 ms.
        let counts = histogram(ends, 1_000 + 14_400, 1_000 + 18_000, 36);
        let even = SESSIONS / 36;
        assert!(counts.iter().all(|count| count.abs_diff(even) <= even / 10), "{counts:?}");
    }

    #[test]
    fn sessions_older_than_the_limit_end_evenly_over_all_of_it() {
        let age = Age::new(Some(HALF_AN_HOUR), Tick(500_000));
        let ends = sessions().map(|session| age.end(session, Tick(3)));
        let counts = histogram(ends, 500_000, 500_000 + 18_000, 36);
        let even = SESSIONS / 36;
        assert!(counts.iter().all(|count| count.abs_diff(even) <= even / 10), "{counts:?}");
    }

    #[test]
    fn the_end_is_stable_and_absent_without_a_limit() {
        let session = SessionId(42);
        let age = Age::new(Some(HALF_AN_HOUR), Tick(9));
        assert_eq!(age.end(session, Tick(10)), age.end(session, Tick(10)));
        assert_eq!(Age::new(None, Tick(9)).end(session, Tick(10)), Tick(u32::MAX));
    }
}

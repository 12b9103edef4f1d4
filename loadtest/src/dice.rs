//! Pseudo-random choices that are the same for the same seed (splitmix64).

use std::time::Duration;

use crate::clock;

/// A generator.
#[derive(Clone, Copy, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The same choices for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    /// Any number below `limit`; 0 if that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// Any of `words`.
    pub fn of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        let at = usize::try_from(self.below(words.len() as u64)).unwrap_or(0);
        words.get(at).copied().unwrap_or_default()
    }

    /// A time from half of `mean` to one and a half of it, in nanoseconds.
    pub fn about(&mut self, mean: Duration) -> u64 {
        let mean = clock::nanos(mean);
        mean / 2 + self.below(mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_spread_around_the_mean() {
        let mut dice = Dice::new(1);
        let times: Vec<u64> = (0..1000).map(|_| dice.about(Duration::from_secs(2))).collect();
        let (low, high) = (times.iter().min().unwrap(), times.iter().max().unwrap());
        assert!((1_000_000_000..1_100_000_000).contains(low), "{low}");
        assert!((2_900_000_000..3_000_000_000).contains(high), "{high}");
        assert_eq!(dice.below(0), 0);
    }
}

//! The pauses between attempts to open lanes again.

use std::time::Duration;

/// The pause after the first attempt. Each further pause is twice as long …
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// … up to this.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// The pauses of one period without lanes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff(Duration);

impl Backoff {
    pub(crate) fn new() -> Backoff {
        Backoff(PAUSE_MIN)
    }

    /// Between half of a pause and all of it, so that many sources do not dial at the same moment.
    pub(crate) fn next(&mut self, jitter: &mut Jitter) -> Duration {
        let pause = self.0;
        self.0 = (2 * pause).min(PAUSE_MAX);
        pause / 2 + (pause / 2).mul_f64(jitter.next())
    }
}

/// A pseudorandom sequence that its seed determines (Marsaglia's xorshift64).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Jitter(u64);

impl Jitter {
    pub(crate) fn of(seed: u64) -> Jitter {
        Jitter(seed | 1)
    }

    /// 0 to 1.
    fn next(&mut self) -> f64 {
        let mut x = self.0;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0 = x;
        f64::from((x >> 32) as u32) / f64::from(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_one_second_with_jitter_of_at_most_half() {
        let (mut backoff, mut jitter) = (Backoff::new(), Jitter::of(7));
        for full in [100, 200, 400, 800, 1000, 1000].map(Duration::from_millis) {
            let pause = backoff.next(&mut jitter);
            assert!(full / 2 <= pause && pause <= full, "{pause:?}");
        }
    }
}

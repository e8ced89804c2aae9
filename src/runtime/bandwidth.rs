//! The bandwidth limit of background pages, which all bulk lanes share and which may change at any
//! time.
//!
//! A lane asks before it claims pages and reports afterwards how many bytes it has sent, so no page
//! is claimed and then held back while a vCPU may wait for it. If a batch exceeds the limit, the
//! lane waits before the next one. Demand pages neither ask nor count.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A waiting lane checks again after this time at the latest, so that a changed limit takes effect
/// soon.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// How much a late lane may catch up: timers are late by some 100 µs.
const CATCH_UP: Duration = Duration::from_millis(5);

/// Bytes a second for the background.
pub(crate) struct Bandwidth {
    /// 0 without a limit.
    bytes_per_s: AtomicU64,
    /// Until when the limit occupies the background with the bytes sent; nanoseconds since the
    /// origin.
    busy_until: AtomicU64,
    origin: Instant,
}

impl Bandwidth {
    /// `None` for no limit.
    pub(crate) fn new(bytes_per_s: Option<u64>) -> Bandwidth {
        Bandwidth {
            bytes_per_s: AtomicU64::new(bytes_per_s.unwrap_or(0)),
            busy_until: AtomicU64::new(0),
            origin: Instant::now(),
        }
    }

    pub(crate) fn limit(&self) -> Option<u64> {
        Some(self.bytes_per_s.load(Relaxed)).filter(|&limit| limit > 0)
    }

    /// Sets the limit from now on. Bytes sent before are not counted.
    pub(crate) fn set(&self, bytes_per_s: Option<u64>) {
        self.bytes_per_s.store(bytes_per_s.unwrap_or(0), Relaxed);
        self.busy_until.store(self.now(), Relaxed);
    }

    /// Whether a lane has to wait before it claims more pages, and when to ask again.
    pub(crate) fn wait(&self) -> Option<Duration> {
        self.limit()?;
        let left = self.busy_until.load(Relaxed).saturating_sub(self.now());
        (left > 0).then(|| Duration::from_nanos(left).min(LOOK_INTERVAL))
    }

    /// Counts bytes that a lane sends.
    pub(crate) fn sent(&self, bytes: u64) {
        let Some(limit) = self.limit() else { return };
        let takes = u128::from(bytes) * 1_000_000_000 / u128::from(limit);
        let takes = u64::try_from(takes).unwrap_or(u64::MAX);
        let earliest = self.now().saturating_sub(nanos(CATCH_UP));
        let add = |until: u64| Some(until.max(earliest).saturating_add(takes));
        let _ = self.busy_until.fetch_update(Relaxed, Relaxed, add);
    }

    fn now(&self) -> u64 {
        nanos(self.origin.elapsed())
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lane_without_a_limit_never_waits() {
        let bandwidth = Bandwidth::new(None);
        bandwidth.sent(u64::MAX);
        assert_eq!((bandwidth.wait(), bandwidth.limit()), (None, None));
    }

    #[test]
    fn bytes_sent_delay_the_next_batch_until_the_limit_changes() {
        let bandwidth = Bandwidth::new(Some(1000));
        assert_eq!(bandwidth.wait(), None);
        bandwidth.sent(1_000_000);
        assert_eq!(bandwidth.wait(), Some(LOOK_INTERVAL));
        bandwidth.set(Some(2000));
        assert_eq!(bandwidth.wait(), None);
        bandwidth.sent(u64::MAX);
        bandwidth.sent(u64::MAX);
        assert_eq!(bandwidth.wait(), Some(LOOK_INTERVAL));
        bandwidth.set(None);
        assert_eq!(bandwidth.wait(), None);
    }

    /// All lanes together send no more than the limit allows in the time that passes.
    #[test]
    fn lanes_together_stay_within_the_limit() {
        const LIMIT: u64 = 64 << 20;
        const BATCH: u64 = 256 << 10;
        let bandwidth = Bandwidth::new(Some(LIMIT));
        let sent = AtomicU64::new(0);
        let started = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while sent.load(Relaxed) < 4 << 20 {
                        match bandwidth.wait() {
                            Some(wait) => std::thread::sleep(wait),
                            None => {
                                bandwidth.sent(BATCH);
                                sent.fetch_add(BATCH, Relaxed);
                            }
                        }
                    }
                });
            }
        });
        let allowed = (started.elapsed() + CATCH_UP).as_secs_f64() * LIMIT as f64;
        // Each lane may have begun a batch at the same moment.
        let most = allowed + 3.0 * BATCH as f64;
        assert!(sent.load(Relaxed) as f64 <= most, "{} > {most}", sent.load(Relaxed));
    }
}

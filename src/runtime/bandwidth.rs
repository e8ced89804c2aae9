//! A limit that all bulk lanes share and that may change at any time: of the background after the switchover, or of the
//! passes while the guest runs.
//!
//! A lane asks before it claims pages and says afterwards what it has sent, so that no page is claimed
//! and then held back: somebody might wait for it. What a batch exceeds the limit by is made up for by
//! waiting before the next one. Demand pages neither ask nor count.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A lane that waits looks again after this at the latest, so that a changed limit is soon felt.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// What a lane that was late may make up for: timers are, by some 100 µs.
const CATCH_UP: Duration = Duration::from_millis(5);

/// Bytes a second for all lanes together.
pub(crate) struct Bandwidth {
    /// 0 for no limit.
    bytes_per_s: AtomicU64,
    /// Until when what has been sent takes, at the limit; nanoseconds since the origin.
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

    /// From now on. What was sent before is forgotten.
    pub(crate) fn set(&self, bytes_per_s: Option<u64>) {
        self.bytes_per_s.store(bytes_per_s.unwrap_or(0), Relaxed);
        self.busy_until.store(self.now(), Relaxed);
    }

    /// Whether a lane has to wait before it claims more pages, and when to ask again.
    pub(crate) fn wait(&self) -> Option<Duration> {
        self.wait_at(self.now())
    }

    /// A lane sends so much.
    pub(crate) fn sent(&self, bytes: u64) {
        self.sent_at(bytes, self.now());
    }

    /// The same at a time, nanoseconds since the origin.
    fn wait_at(&self, now: u64) -> Option<Duration> {
        self.limit()?;
        let left = self.busy_until.load(Relaxed).saturating_sub(now);
        (left > 0).then(|| Duration::from_nanos(left).min(LOOK_INTERVAL))
    }

    fn sent_at(&self, bytes: u64, now: u64) {
        let Some(limit) = self.limit() else { return };
        let takes = u128::from(bytes) * 1_000_000_000 / u128::from(limit);
        let takes = u64::try_from(takes).unwrap_or(u64::MAX);
        let earliest = now.saturating_sub(nanos(CATCH_UP));
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
    fn without_a_limit_nobody_waits() {
        let bandwidth = Bandwidth::new(None);
        bandwidth.sent(u64::MAX);
        assert_eq!((bandwidth.wait(), bandwidth.limit()), (None, None));
    }

    #[test]
    fn what_was_sent_takes_its_time_until_the_limit_changes() {
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

    /// All lanes together send what the limit allows in a time, no more and hardly less, however often they look.
    #[test]
    fn lanes_share_the_limit() {
        const LIMIT: u64 = 64 << 20;
        const BATCH: u64 = 256 << 10;
        const SECONDS: u64 = 10;
        for lanes in [1, 3, 16] {
            let bandwidth = Bandwidth::new(Some(LIMIT));
            let mut sent = 0;
            // When each lane looks next; the lanes come in turn where they look at the same time.
            let mut looks = vec![0; lanes];
            loop {
                let lane = (0..lanes).min_by_key(|&lane| looks[lane]).unwrap();
                let now = looks[lane];
                if now >= SECONDS * 1_000_000_000 {
                    break;
                }
                looks[lane] = match bandwidth.wait_at(now) {
                    Some(wait) => now + nanos(wait),
                    None => {
                        bandwidth.sent_at(BATCH, now);
                        sent += BATCH;
                        // The lane is late by a microsecond.
                        now + 1000
                    }
                };
                let allowed = LIMIT as f64 * (now as f64 / 1e9 + CATCH_UP.as_secs_f64());
                assert!(sent as f64 <= allowed + BATCH as f64, "{sent} of {allowed} at {now} ns");
            }
            let (least, most) = (LIMIT * SECONDS - BATCH, LIMIT * SECONDS + 2 * BATCH);
            assert!((least..=most).contains(&sent), "{lanes} lanes: {sent} of {least} to {most}");
        }
    }
}

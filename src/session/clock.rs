//! Points in time for other processes: the kernel's monotonic clock, nanoseconds.

use std::time::{Duration, Instant};

/// A time on the clock that all processes of this machine share until it reboots.
pub(crate) fn since_boot(at: Instant) -> u64 {
    let ago = u64::try_from(at.elapsed().as_nanos()).unwrap_or(u64::MAX);
    now().saturating_sub(ago)
}

/// The time that [`since_boot`] returned as a number.
pub(crate) fn when(since_boot: u64) -> Instant {
    let ago = Duration::from_nanos(now().saturating_sub(since_boot));
    Instant::now().checked_sub(ago).unwrap_or_else(Instant::now)
}

fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is a local variable. The call fails only for unknown clocks.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instant_survives_conversion_to_time_since_boot() {
        let then = Instant::now().checked_sub(Duration::from_secs(2)).unwrap();
        let found = when(since_boot(then));
        let apart = found.max(then) - found.min(then);
        assert!(apart < Duration::from_millis(500), "{apart:?}");
    }
}

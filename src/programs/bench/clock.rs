//! Processor time of threads, and their time waiting for a processor.

use std::time::Duration;

/// Processor time of the calling thread.
pub(super) fn thread_time() -> Duration {
    clock_time(libc::CLOCK_THREAD_CPUTIME_ID).unwrap_or_default()
}

/// The value of a clock; None if it is gone, as a thread's clock is after the thread.
pub(super) fn clock_time(clock: libc::clockid_t) -> Option<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes to a local variable.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).ok()?;
    (result == 0).then(|| Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0)))
}

/// How long a thread of this process was runnable and had no core (`Documentation/scheduler/sched-stats.rst`); None if
/// the kernel does not report it, or the thread has ended.
pub(super) fn waited(thread: i32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    let nanoseconds = text.split_ascii_whitespace().nth(1)?;
    nanoseconds.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_time_is_read_for_an_existing_thread_only() {
        let own = nix::unistd::gettid().as_raw();
        assert!(waited(own).is_some_and(|waited| waited < Duration::from_secs(86_400)));
        assert_eq!(waited(0), None);
    }
}

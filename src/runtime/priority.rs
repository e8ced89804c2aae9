//! Demand threads take precedence over all other threads of their core: a vCPU waits for them, and
//! they sleep most of the time. Bulk threads take precedence over ordinary threads.

use std::time::{Duration, Instant};

/// The result of a request for precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// Precedence over every thread without real-time priority.
    RealTime,
    /// The largest share among ordinary threads.
    Nice,
    /// The priority is unchanged.
    Unchanged,
}

/// Requests the lowest real-time priority for the calling thread, or, if that is not allowed, the
/// best ordinary one; otherwise nothing changes and demand pages wait for their core.
///
/// A demand thread runs for microseconds at a time; the kernel's real-time throttling
/// (`sched_rt_runtime_us`, 95 % by default) bounds the share that a storm of faults can take.
pub(crate) fn go_first() -> Priority {
    let parameters = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: 0 is the calling thread, and the parameters outlive the call.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } == 0 {
        return Priority::RealTime;
    }
    // SAFETY: 0 is the calling thread (Linux keeps nice values per thread); no memory is involved.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) } {
        0 => Priority::Nice,
        _ => Priority::Unchanged,
    }
}

/// A bulk thread's nice value. It is a weight, 1.25 to its power: the thread gets nine tenths of a
/// core that it shares with a vCPU.
const EARLY: i32 = -10;

/// The RLIMIT_NICE that allows it without CAP_SYS_NICE (setrlimit(2): 20 less the nice value).
pub(crate) const EARLY_LIMIT: u64 = (20 - EARLY) as u64;

/// Requests precedence over ordinary threads, also of other processes; if that is not allowed
/// nothing changes.
///
/// For bulk threads. Until the last page has come the guest waits for missing pages and depends on
/// two hosts and the network between them. The work is the same at any time; done early it leaves
/// fewer faults to serve, and returns the guest's cores sooner.
///
/// Returns whether it was allowed.
pub(crate) fn go_early() -> bool {
    let mut attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        nice: EARLY,
        runtime_ns: SLICE_NS,
        ..Attributes::default()
    };
    // SAFETY: 0 is the calling thread, and the attributes outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw mut attributes, 0) };
    // SAFETY: 0 is the calling thread (Linux keeps nice values per thread); no memory is involved.
    result == 0 || unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, EARLY) } == 0
}

/// When a bulk thread yields its core to waiting threads.
///
/// A vCPU whose page has come may have used up its share of the core for now, so that waking it
/// does not preempt the bulk thread, and from then on the scheduler checks again only at its next
/// tick, up to 10 ms later. A yield makes it check at once; the bulk thread loses only the rest of
/// its slice.
///
/// While no vCPU has waited for a page, a yield would only run another bulk thread: with two lanes
/// on two cores, where every batch yielded the core to the other lane, they took a tenth to a sixth
/// longer than one.
#[derive(Debug, Default)]
pub(crate) struct YieldPolicy {
    served: u64,
    /// The end of the period after a served fault.
    until: Option<Instant>,
}

/// The longest tick of a scheduler (CONFIG_HZ=100).
const TICK: Duration = Duration::from_millis(10);

impl YieldPolicy {
    /// To be called after each batch, with a number that changes when a page comes that a vCPU has
    /// waited for.
    pub(crate) fn let_others(&mut self, served: u64) {
        let now = Instant::now();
        if self.is_due(served, now) {
            std::thread::yield_now();
        }
    }

    fn is_due(&mut self, served: u64, now: Instant) -> bool {
        if std::mem::replace(&mut self.served, served) != served {
            self.until = Some(now + TICK);
        }
        self.until.is_some_and(|until| now < until)
    }
}

/// How long a bulk thread runs before another thread may, ns (since Linux 6.12; ignored before). A
/// yield gives up the rest of it, so that the waiting thread runs next. With the minimum, 0.1 ms,
/// the 99th percentile of a fault under load was 0.6 ms, with this 0.5 and with 1 ms 0.4, for 12.8,
/// 12.4 and 10.1 Gbit/s of the stream.
const SLICE_NS: u64 = 400_000;

/// `struct sched_attr` in its first version (include/uapi/linux/sched/types.h).
#[repr(C)]
#[derive(Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}
const _: () = assert!(size_of::<Attributes>() == 48);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yield_is_due_for_a_tick_after_each_fault() {
        let mut policy = YieldPolicy::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!policy.is_due(0, at(0)), "no vCPU has waited");
        assert!(policy.is_due(70, at(1)));
        assert!(policy.is_due(70, at(10)), "within a tick of the fault");
        assert!(!policy.is_due(70, at(11)));
        assert!(policy.is_due(140, at(30)) && policy.is_due(200, at(35)));
        assert!(policy.is_due(200, at(44)), "a tick after the last fault");
        assert!(!policy.is_due(200, at(45)));
    }
}

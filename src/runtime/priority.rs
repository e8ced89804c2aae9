//! Demand threads go before everything else that wants their core: a vCPU waits for them, and they
//! sleep most of the time. Bulk threads go before what is ordinary.

use std::time::{Duration, Instant};

/// What a thread that asked to go first got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Priority {
    /// It goes before every thread that has none of these.
    RealTime,
    /// The largest share among ordinary threads.
    Nice,
    /// What it had.
    Unchanged,
}

/// Asks for the lowest real-time priority for the calling thread, or, where that is not allowed, for
/// the best ordinary one; where neither is, nothing changes and demand pages wait their turn.
///
/// A demand thread runs for microseconds at a time; the kernel's real-time throttling
/// (`sched_rt_runtime_us`, 95 % by default) bounds what a storm of faults could take.
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

/// How much before ordinary threads a bulk thread goes: a nice value is a weight, 1.25 to the power of
/// it, so this one gets nine tenths of a core that it shares with a vCPU.
const EARLY: i32 = -10;

/// RLIMIT_NICE that allows it to whoever has no CAP_SYS_NICE (setrlimit(2): 20 less the nice value).
pub(crate) const EARLY_LIMIT: u64 = (20 - EARLY) as u64;

/// Asks for the calling thread to go before ordinary ones, and other processes'; where that is not
/// allowed nothing changes.
///
/// For bulk threads. Until the last page has come the guest waits for what is missing and depends on
/// two hosts and the network between them. The work is the same whenever it is done; done early there are
/// fewer faults to serve, and the guest gets its cores back whole.
///
/// The value says whether it was allowed.
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

/// When a bulk thread lets whoever waits for its core run first.
///
/// A vCPU whose page has come may have used up its share of the core for now, so that waking it does not take
/// the core from the bulk thread, and from then on the scheduler looks again only at its next tick, up to 10 ms
/// later. A yield has it look at once; the bulk thread loses no more of its share than the rest of its slice.
///
/// While nobody has waited for a page, who would run first is another bulk thread: with two lanes on two
/// cores, where every batch gave the core to the other lane, they took a tenth to a sixth longer than one.
#[derive(Debug, Default)]
pub(crate) struct YieldPolicy {
    served: u64,
    /// Not once a fault has been served.
    until: Option<Instant>,
}

/// The longest that a scheduler's tick takes (CONFIG_HZ=100).
const TICK: Duration = Duration::from_millis(10);

impl YieldPolicy {
    /// To be called after each batch, with a number that changes when a page comes that a vCPU has waited for.
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

/// How long a bulk thread runs before somebody else may, ns (since Linux 6.12; before that the scheduler ignores
/// the value). What is left of it is what a yield gives away, so that who waits comes next: with the least that
/// there is, 0.1 ms, the 99th percentile of a fault under load was 0.6 ms, with this 0.5 and with 1 ms 0.4, for
/// 12.8, 12.4 and 10.1 Gbit/s of the stream.
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
    fn others_go_first_for_a_tick_after_each_fault() {
        let mut courtesy = YieldPolicy::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!courtesy.is_due(0, at(0)), "nobody has waited");
        assert!(courtesy.is_due(70, at(1)));
        assert!(courtesy.is_due(70, at(10)), "within a tick of it");
        assert!(!courtesy.is_due(70, at(11)));
        assert!(courtesy.is_due(140, at(30)) && courtesy.is_due(200, at(35)));
        assert!(courtesy.is_due(200, at(44)), "a tick from the last one");
        assert!(!courtesy.is_due(200, at(45)));
    }
}

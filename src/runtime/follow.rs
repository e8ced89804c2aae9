//! A demand thread moves to the core of the thread that wakes it.
//!
//! Waking a thread on a sleeping core takes several times as long as switching to it on the core of
//! the waiting thread: some 40 µs on a virtual machine, where the core has been given back to the
//! host. A vCPU that waits for a page leaves its core idle, so the thread that answers runs best
//! there. At the destination that is the core of the vCPU, at the source the one on which the
//! requests arrive. With faults from many cores the thread stays where it is.

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{Read, Write};
use std::mem::size_of_val;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use core_affinity::CoreId;

/// Events for each look at their origin: a look takes up to 10 µs.
const EVERY: u32 = 16;

/// Consecutive looks that have to agree before the thread moves.
const VOTES: u32 = 3;

/// Moves its thread.
#[derive(Debug)]
pub(crate) struct AffinityFollower {
    /// The cores it may move to; none when the user has named one.
    allowed: Vec<usize>,
    at: Option<usize>,
    candidate: usize,
    votes: u32,
    since_look: u32,
}

impl AffinityFollower {
    /// Follows among the process's cores if `chosen`, that is if the user has named none. `at` is
    /// the core to which the thread is bound now.
    pub(crate) fn new(chosen: bool, at: Option<usize>) -> AffinityFollower {
        let cores = if chosen { core_affinity::get_core_ids() } else { None };
        let allowed = cores.unwrap_or_default().into_iter().map(|core| core.id).collect();
        AffinityFollower { allowed, at, candidate: 0, votes: 0, since_look: 0 }
    }

    /// Counts a wake-up of the thread. Whether its origin should be looked up.
    pub(crate) fn is_due(&mut self) -> bool {
        self.since_look += 1;
        if self.allowed.len() < 2 || self.since_look < EVERY {
            return false;
        }
        self.since_look = 0;
        true
    }

    /// Records the core of a wake-up's origin.
    pub(crate) fn saw(&mut self, core: usize) {
        if let Some(core) = self.vote(core) {
            core_affinity::set_for_current(CoreId { id: core });
        }
    }

    /// The core to move to, once enough looks agree.
    fn vote(&mut self, core: usize) -> Option<usize> {
        self.votes = if core == self.candidate { self.votes + 1 } else { 1 };
        self.candidate = core;
        if self.at == Some(core) || self.votes < VOTES || !self.allowed.contains(&core) {
            return None;
        }
        self.at = Some(core);
        self.at
    }
}

/// The core that a thread of this machine runs on, or last ran on.
pub(crate) fn core_of_thread(thread: u32) -> Option<usize> {
    // Called repeatedly by threads that allocate nothing: 17 bytes and the number at most.
    let mut path = [0; 32];
    write!(&mut path[..], "/proc/{thread}/stat").ok()?;
    let path = CStr::from_bytes_until_nul(&path).ok()?;
    let mut stat = [0; 1024];
    let path = OsStr::from_bytes(path.to_bytes());
    let len = File::open(path).and_then(|mut file| file.read(&mut stat)).ok()?;
    processor(std::str::from_utf8(&stat[..len]).ok()?)
}

/// Field 39 of proc_pid_stat(5). Field 2 is a name in parentheses that may hold any character.
fn processor(stat: &str) -> Option<usize> {
    let (_, from_third) = stat.rsplit_once(')')?;
    from_third.split_ascii_whitespace().nth(39 - 3)?.parse().ok()
}

/// The core that the last packet of a connection arrived on (SO_INCOMING_CPU, socket(7)).
pub(crate) fn core_of_socket(socket: BorrowedFd<'_>) -> Option<usize> {
    let mut core: libc::c_int = -1;
    let mut len = size_of_val(&core) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `core`, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_INCOMING_CPU,
            (&raw mut core).cast(),
            &raw mut len,
        )
    };
    if result == 0 { usize::try_from(core).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn follower() -> AffinityFollower {
        AffinityFollower {
            allowed: vec![0, 1, 2],
            at: Some(0),
            candidate: 0,
            votes: 0,
            since_look: 0,
        }
    }

    #[test]
    fn thread_moves_after_several_looks_agree() {
        let mut follower = follower();
        let moves = [2, 2, 1, 2, 2, 2, 2, 0, 0, 0].map(|core| follower.vote(core));
        let mut expected = [None; 10];
        expected[5] = Some(2);
        expected[9] = Some(0);
        assert_eq!(moves, expected);
    }

    #[test]
    fn thread_moves_only_among_allowed_cores() {
        let mut follower = follower();
        assert!((0..10).all(|_| follower.vote(3).is_none()));
        let mut named = AffinityFollower::new(false, Some(1));
        assert!((0..1000).all(|_| !named.is_due()), "the user has named its core");
    }

    #[test]
    fn origin_is_looked_up_only_every_nth_event() {
        let mut follower = follower();
        let looks = (0..160).filter(|_| follower.is_due()).count();
        assert_eq!(looks, 160 / EVERY as usize);
    }

    #[test]
    fn processor_is_parsed_after_any_thread_name() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("77 (a) R (b c)) {}\n", fields.join(" "));
        assert_eq!(processor(&stat), Some(39));
        assert_eq!(processor("77 (short) S 1 2"), None);
    }

    #[test]
    fn core_of_this_thread_is_found() {
        // SAFETY: no memory is involved.
        let this = unsafe { libc::gettid() };
        let cores = core_affinity::get_core_ids().unwrap();
        let core = core_of_thread(u32::try_from(this).unwrap()).unwrap();
        assert!(cores.iter().any(|known| known.id == core));
        assert_eq!(core_of_thread(u32::MAX), None);
    }
}

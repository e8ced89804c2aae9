//! A userfaultfd of the guest's process, and its *gate*: a thread that makes pages visible, or cached, holds it open; a
//! thread that reads events closes it ([why](super)).

use std::io;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::fault::pagemap;
use crate::fault::uffd::{Placed, Stop, Uffd};
use crate::memory::small_page_bytes;
use crate::memory::words::Events;

/// A userfaultfd of the guest's process.
pub(crate) struct FaultSource {
    pub(crate) uffd: Uffd,
    /// The process whose memory it is; None for this process.
    pid: Option<u32>,
    /// The buffer for its events, if a takeover may have to apply them.
    pub(crate) events: Option<Events>,
    gate: RwLock<()>,
}

impl FaultSource {
    pub(crate) fn new(uffd: Uffd) -> FaultSource {
        FaultSource { uffd, pid: None, events: None, gate: RwLock::new(()) }
    }

    /// The memory belongs to another process.
    pub(super) fn belongs_to(&mut self, pid: u32) {
        self.pid = Some(pid);
    }

    /// Copies pages to the guest, as [`Uffd::copy`] does, and returns [`Stop::Already`] only for a page that is
    /// present.
    ///
    /// The kernel answers EEXIST also for a huge page if the pool, or a limit of the process's cgroup, is exhausted: it
    /// checks that the page has a page table entry, not that the entry is empty (`hugetlb_mfill_atomic_pte` in
    /// mm/hugetlb.c). `page_bytes` is the size of the guest's pages.
    ///
    /// # Errors
    /// ENOMEM if the page is absent, or the page map of its process cannot be read.
    pub(super) fn copy(&self, address: u64, bytes: &[u8], page_bytes: u64) -> io::Result<Placed> {
        let placed = self.uffd.copy(address, bytes)?;
        if placed.stop != Some(Stop::Already) || page_bytes == small_page_bytes() {
            return Ok(placed);
        }
        // Pages copied before this one are copied again on the retry, and are present then.
        let at = address + placed.bytes;
        match pagemap::is_populated(self.pid, &(at..at + page_bytes)) {
            Ok(true) => Ok(placed),
            Ok(false) | Err(_) => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
        }
    }

    /// Overwrites pages that are mapped, of a guest that does not run.
    ///
    /// # Errors
    /// This process has no permission to write to the memory of the guest's process, or a page is not mapped.
    pub(super) fn overwrite(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        let pid = self.pid.unwrap_or_else(std::process::id);
        let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut done = 0;
        while done < bytes.len() {
            let (rest, at) = (&bytes[done..], address + done as u64);
            let from =
                libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
            let to = libc::iovec {
                iov_base: std::ptr::without_provenance_mut(at as usize),
                iov_len: rest.len(),
            };
            // SAFETY: this process's bytes are borrowed for the call and only read. The other address is in the guest's
            // process: the kernel checks it, and a guest's memory holds no Rust object.
            let count =
                unsafe { libc::process_vm_writev(pid, &raw const from, 1, &raw const to, 1, 0) };
            match usize::try_from(count) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
        Ok(())
    }

    /// For a thread that makes pages visible, or cached.
    pub(super) fn open_gate(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For a thread that reads the kernel's reports.
    pub(crate) fn close_gate(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use umem_wire::{PageRange, RegionId};

    use super::super::fixture::Guest;
    use crate::memory::claims::RunKind;
    use crate::memory::pages::PageState;

    /// A discard of shared memory has been read, the kernel has removed the page, and the page lands only now: a bulk
    /// thread that finishes it waits until the discard is recorded.
    #[test]
    fn page_landing_after_a_discard_reads_as_zeroes() {
        let guest = Guest::new();
        guest.awaits(1, false);
        let gate = guest.memory.sources[0].close_gate();
        guest.region().file().write_at(&[0xa5; 4096], 1 << 12).unwrap();
        std::thread::scope(|scope| {
            let (sender, thread) = std::sync::mpsc::channel();
            let memory = &guest.memory;
            let bulk = scope.spawn(move || {
                sender.send(nix::unistd::gettid()).unwrap();
                let range = PageRange { region: RegionId(0), first: 1, pages: 1 };
                memory.finish(range, RunKind::Data, |_| {}).unwrap();
            });
            let stat = format!("/proc/self/task/{}/stat", thread.recv().unwrap());
            let waits = || std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") S "));
            while !bulk.is_finished() && !waits() {
                std::thread::yield_now();
            }
            let address = guest.address(1);
            guest.memory.discard(address, address + 4096).unwrap();
            drop(gate);
        });
        assert_eq!(guest.state(1), PageState::Cached);
        assert!(guest.contents(1) == [0; 4096], "what the source had");
    }
}

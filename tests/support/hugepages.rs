//! Huge pages of the machine, reserved for the length of a test.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::memfd::{MFdFlags, memfd_create};

const POOL: &str = "/proc/sys/vm/nr_hugepages";
const COMPACT: &str = "/proc/sys/vm/compact_memory";

/// A reservation of 2 MiB pages, returned at the end. One test on the machine has a reservation at a time.
pub(crate) struct HugePages {
    pool: Flock<File>,
    pages_before: u64,
}

impl HugePages {
    /// Reserves `pages` pages for any process.
    pub(crate) fn reserve(pages: u64) -> HugePages {
        let pool = OpenOptions::new().read(true).write(true).open(POOL);
        let pool = pool.unwrap_or_else(|error| panic!("{POOL}: {error}; run the tests as root"));
        let pool = Flock::lock(pool, FlockArg::LockExclusive).expect("a lock");
        // Pages of the previous test that were still in use at its end: they leave the pool by themselves.
        super::wait_for("huge pages of others to leave the pool", || {
            (HugePages::count("surplus_hugepages") == 0).then_some(())
        });
        let mut huge = HugePages { pool, pages_before: 0 };
        huge.pages_before = huge.pool_pages();
        huge.resize(huge.pages_before + pages);
        huge
    }

    /// Reserves this many more.
    pub(crate) fn grow(&mut self, pages: u64) {
        let wanted = self.pool_pages() + pages;
        self.resize(wanted);
    }

    /// Pages that are neither in use nor reserved by a mapping.
    pub(crate) fn free() -> u64 {
        HugePages::count("free_hugepages") - HugePages::count("resv_hugepages")
    }

    fn count(name: &str) -> u64 {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        let text = std::fs::read_to_string(path).expect("the kernel knows pages of 2 MiB");
        text.trim().parse().expect("a number")
    }

    fn pool_pages(&mut self) -> u64 {
        let mut text = String::new();
        self.pool.rewind().expect("a file");
        self.pool.read_to_string(&mut text).expect("a file that can be read");
        text.trim().parse().expect("a number")
    }

    /// Has the pool this many pages. Free memory may be in pieces that are too small: the kernel gives what it has, and
    /// more once it has put the pieces together.
    fn resize(&mut self, pages: u64) {
        super::wait_for(format!("{pages} huge pages in the pool"), || {
            self.set_pool_pages(pages);
            if self.pool_pages() == pages {
                return Some(());
            }
            std::fs::write(COMPACT, "1").expect("root may have memory compacted");
            None
        });
    }

    fn set_pool_pages(&mut self, pages: u64) {
        self.pool.rewind().expect("a file");
        self.pool.write_all(pages.to_string().as_bytes()).expect("root may change the pool");
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // A page in use leaves the pool when it is freed.
        self.set_pool_pages(self.pages_before);
    }
}

/// A file of 2 MiB pages, and the reservation for it.
pub(crate) struct HugeFile {
    file: File,
    _room: HugePages,
}

impl HugeFile {
    /// An empty file, and a reservation of `pages` pages of 2 MiB.
    pub(crate) fn with_room(pages: u64) -> HugeFile {
        let room = HugePages::reserve(pages);
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        let file = File::from(memfd_create(c"umem-test", flags).expect("a file of huge pages"));
        HugeFile { file, _room: room }
    }

    /// The path for another process, valid while this process has the file open.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// The file's contents.
    pub(crate) fn bytes(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.file.rewind().expect("a file");
        self.file.read_to_end(&mut bytes).expect("a file that can be read");
        bytes
    }
}

//! RAM that umem names by its address, once QEMU has reported the address: memory without a file.
//!
//! At the moment of the mapping such memory looks like any other mapping of the program, so it is registered later,
//! when the program may have touched it. A page that is present never faults, and the guest would read its contents. So
//! the object drops all pages first. A page that is touched between the drop and the registration shows in the page
//! tables:
//!
//! ```text
//! drop      MADV_DONTNEED: no page is present            (locked memory: EINVAL, refused)
//! register  a touch of a missing page waits from here on
//! look      /proc/self/pagemap: a page is present? --> unregister, and once more
//! ```
//!
//! The guest does not run yet, and the memory holds nothing but zeroes that `prealloc=on` has allocated.
//!
//! With passes some pages are sent again when the source's guest stands still. The object drops their copies in the
//! same way ([`empty`]). It unregisters the memory first: the kernel would report each dropped range as a discard by
//! the guest. So the memory is unregistered for a moment. A touch in that moment, by khugepaged for example, leaves a
//! present page, which the object finds and drops as above.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::config::{Kind, RamFile};
use crate::report::{Code, Failure, Handover};
use crate::uffd::{self, Backing};
use crate::{handover, state, sys};

/// The most attempts to drop memory that other code touches meanwhile.
const ATTEMPTS_MAX: usize = 8;

/// Entries of the page tables that are read at a time, of 8 bytes each.
const ENTRIES_MAX: usize = 8 << 10;

const ENTRY_SIZE: usize = 8;

/// Bits of an entry (Documentation/admin-guide/mm/pagemap.rst): the page is in memory, or in swap.
const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;

/// Empties and registers the memory, and hands it over under this name.
pub(crate) fn register(
    socket: i32,
    address: usize,
    length: usize,
    name: &str,
) -> Result<(), Failure> {
    check(address, length)?;
    let backing = Backing::anonymous();
    let (uffd, features) = uffd::open(backing)?;
    handover::keep_from_children(address, length)?;
    empty_and_register(&uffd, (address, length), &[(address, length)])?;
    let told = Handover {
        ram: RamFile { name: name.to_owned(), path: PathBuf::new() },
        kind: Kind::Anonymous,
        address,
        length,
        file_offset: 0,
        page_size: backing.page_size,
        features,
    };
    handover::hand_over_anonymous(socket, told, uffd)
}

fn check(address: usize, length: usize) -> Result<(), Failure> {
    let refuse = |errno, text: &str| Err(Failure::new(Code::Block, errno, text));
    let is_whole = |number: usize| number.is_multiple_of(sys::page_size());
    let end = address.checked_add(length);
    let Some(end) = end.filter(|_| length > 0 && is_whole(address) && is_whole(length)) else {
        return refuse(sys::EINVAL, "QEMU names memory that is not whole pages");
    };
    if handover::is_held(address, length) {
        return refuse(sys::EBUSY, "QEMU names memory of another RAM block");
    }
    match is_anonymous(address, end) {
        Ok(true) => Ok(()),
        Ok(false) => refuse(
            sys::EINVAL,
            "its memory is neither private memory without a file nor a file that umem has seen mapped: use a \
             memory-backend-ram with share=off, or a memory-backend-file with share=on on tmpfs or hugetlbfs",
        ),
        Err(error) => refuse(
            error.raw_os_error().unwrap_or(sys::EINVAL),
            "QEMU's process cannot look at its own mappings (/proc/self/maps)",
        ),
    }
}

/// Whether all of the range is mapped, writable, private and without a file.
fn is_anonymous(start: usize, end: usize) -> std::io::Result<bool> {
    let mut reached = start;
    for line in BufReader::new(File::open("/proc/self/maps")?).lines() {
        let line = line?;
        let Some(area) = Area::parse(&line) else { continue };
        if area.end <= reached || area.start >= end {
            continue;
        }
        if area.start > reached || !area.is_anonymous {
            return Ok(false);
        }
        reached = area.end;
        if reached >= end {
            return Ok(true);
        }
    }
    Ok(false)
}

/// One line of `/proc/PID/maps`.
struct Area {
    start: usize,
    end: usize,
    is_anonymous: bool,
}

impl Area {
    /// `START-END PERMISSIONS OFFSET DEVICE INODE [NAME]`
    fn parse(line: &str) -> Option<Area> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let permissions = words.next()?;
        let inode = words.nth(2)?;
        // The kernel names stacks and the like; `[anon:…]` is a name that a program has given.
        let is_unnamed = words.next().is_none_or(|name| name.starts_with("[anon:"));
        Some(Area {
            start: usize::from_str_radix(start, 16).ok()?,
            end: usize::from_str_radix(end, 16).ok()?,
            is_anonymous: permissions.starts_with("rw")
                && permissions.ends_with('p')
                && inode == "0"
                && is_unnamed,
        })
    }
}

/// Drops these ranges of the memory and registers the whole memory; repeats until none of the dropped pages is present.
fn empty_and_register(
    uffd: &OwnedFd,
    (address, length): (usize, usize),
    ranges: &[(usize, usize)],
) -> Result<(), Failure> {
    // Checked before any change.
    let mut tables = PageTables::open()?;
    for _ in 0..ATTEMPTS_MAX {
        let dropped = ranges.iter().try_for_each(|&(start, size)| drop_pages(start, size));
        uffd::register(uffd, Kind::Anonymous, address, length)?;
        dropped?;
        let mut are_empty = true;
        for &(start, size) in ranges {
            are_empty = are_empty && tables.are_empty(start, size)?;
        }
        if are_empty {
            return Ok(());
        }
        unregister(uffd, address, length)?;
    }
    Err(Failure::new(
        Code::Block,
        sys::EBUSY,
        "the guest's memory is touched at its destination before the guest runs there: leave out what does that (a \
         loader device, a debugger)",
    ))
}

fn unregister(uffd: &OwnedFd, address: usize, length: usize) -> Result<(), Failure> {
    uffd::unregister(uffd, address, length).map_err(|errno| {
        Failure::new(Code::Register, errno, "the guest's memory cannot be taken out of userfaultfd")
    })
}

/// Drops the copies of pages that are sent again, ranges of the memory that begins at `block`. Returns their bytes.
pub(crate) fn empty(block: usize, stale: &[(usize, usize)]) -> Result<usize, Failure> {
    if state::guest_may_run() {
        let text = "the guest may run here, so its pages cannot be dropped";
        return Err(Failure::new(Code::Block, sys::EBUSY, text));
    }
    let emptied = handover::with_anonymous(block, |uffd, length| {
        let end = block + length;
        let is_whole = |number: usize| number.is_multiple_of(sys::page_size());
        let is_within = |&(start, size): &(usize, usize)| {
            let until = start.checked_add(size);
            start >= block
                && until.is_some_and(|until| until <= end)
                && is_whole(start)
                && is_whole(size)
        };
        if !stale.iter().all(is_within) {
            let text = "the pages to drop are not in the guest's memory";
            return Err(Failure::new(Code::Block, sys::EINVAL, text));
        }
        unregister(uffd, block, length)?;
        empty_and_register(uffd, (block, length), stale)?;
        Ok(stale.iter().map(|&(_, size)| size).sum())
    });
    emptied.unwrap_or_else(|| {
        let text = "no memory without a file was handed over at this address";
        Err(Failure::new(Code::Block, sys::EINVAL, text))
    })
}

/// Drops the range: no page of it is present afterwards. The range must not be registered: the kernel would report the
/// drop to umem.
fn drop_pages(address: usize, length: usize) -> Result<(), Failure> {
    let start = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: memory of a guest that does not run; it holds no data of this object or of the program.
    if unsafe { sys::madvise(start, length, sys::MADV_DONTNEED) } == 0 {
        return Ok(());
    }
    let errno = sys::last_errno();
    Err(match errno {
        sys::EINVAL => Failure::new(
            Code::MemLock,
            errno,
            "QEMU locks the guest's memory: start it without mem-lock=on",
        ),
        _ => Failure::new(Code::Block, errno, "the guest's memory cannot be emptied"),
    })
}

/// This process's page tables.
struct PageTables {
    pagemap: File,
    /// The buffer of one read.
    entries: Vec<u8>,
}

impl PageTables {
    fn open() -> Result<PageTables, Failure> {
        let pagemap = File::open("/proc/self/pagemap").map_err(|error| unreadable(&error))?;
        Ok(PageTables { pagemap, entries: vec![0; ENTRIES_MAX * ENTRY_SIZE] })
    }

    /// Whether no page of the range is present.
    fn are_empty(&mut self, address: usize, length: usize) -> Result<bool, Failure> {
        let page_size = sys::page_size();
        let (mut page, end) = (address / page_size, (address + length) / page_size);
        while page < end {
            let count = ENTRIES_MAX.min(end - page);
            let part = self.entries.get_mut(..count * ENTRY_SIZE).unwrap_or_default();
            let read = self.pagemap.read_exact_at(part, (page * ENTRY_SIZE) as u64);
            read.map_err(|error| unreadable(&error))?;
            let (entries, _) = part.as_chunks::<ENTRY_SIZE>();
            if entries.iter().any(|entry| u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0) {
                return Ok(false);
            }
            page += count;
        }
        Ok(true)
    }
}

fn unreadable(error: &std::io::Error) -> Failure {
    Failure::new(
        Code::Block,
        error.raw_os_error().unwrap_or(sys::EINVAL),
        "QEMU's process cannot look at its own page tables (/proc/self/pagemap)",
    )
}

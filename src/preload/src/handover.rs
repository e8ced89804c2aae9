//! The mapping of a RAM file: it is protected and handed over, or undone.

use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::config::{self, Kind, RamFile};
use crate::report::{self, Code, Failure};
use crate::uffd::{self, Backing};
use crate::{state, sys, whole};

/// Memory that was handed over and is not released yet. Its userfaultfds are the duplicates that make
/// the guest wait when umem dies: only [`release`] closes them.
static HELD: Mutex<Vec<Held>> = Mutex::new(Vec::new());

struct Held {
    name: String,
    address: usize,
    length: usize,
    /// The offset of its start in the file.
    offset: u64,
    /// Mapped shared: the file is the guest's memory.
    is_shared: bool,
    page_size: usize,
    /// Its file's pages are huge, as far as the file system could make them.
    is_huge: bool,
    /// Whether a refusal was reported: QEMU tries to populate several times, and umem gets one report.
    has_refused: bool,
    /// The program's own last advice about forks, which [`release`] restores.
    wants_dont_fork: bool,
    /// The hand-over message, for a umem that takes over.
    told: report::Handover,
    uffd: OwnedFd,
    /// None for memory without a file.
    file: Option<RamDescriptor>,
}

/// The file of memory that was handed over.
struct RamDescriptor {
    /// The open file that has the locks: the same for all mappings of this file.
    file: OwnedFd,
    /// The program's own descriptor of the file.
    number: c_int,
}

/// Maps a RAM file for the caller. Returns the result of `mmap`, with errno set.
///
/// # Safety
///
/// As for `mmap(2)`.
pub(crate) unsafe fn map(
    ram: &RamFile,
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    offset: i64,
) -> *mut c_void {
    let Some(config) = config::get() else {
        return sys::map_failed(sys::EINVAL);
    };
    config.hide();
    if state::is_settled() {
        // Missing pages would read as zeroes in the second mapping.
        if held().iter().any(|held| is_same(held, descriptor)) {
            report::complaint(
                &ram.name,
                &Failure::new(
                    Code::RamTwice,
                    sys::EBUSY,
                    "the guest's memory is not complete yet, and is mapped once more: try again later",
                ),
            );
            return sys::map_failed(sys::EBUSY);
        }
        // SAFETY: the caller's own promises, passed on.
        return unsafe { sys::mmap(address, length, protection, flags, descriptor, offset) };
    }
    let fail = |failure: &Failure| {
        report::failure(config.socket, &ram.name, failure);
        sys::map_failed(failure.errno)
    };

    let Some(kind) = config.kind else {
        return fail(&Failure::new(
            Code::Kind,
            sys::EINVAL,
            "the preload object does not know this kind of memory: use the object of this umem",
        ));
    };
    let offset_in_file = offset.unsigned_abs();
    let part = offset_in_file..offset_in_file.saturating_add(length as u64);
    let locked = match lock_before(ram, kind, flags, descriptor, &part) {
        Ok(locked) => locked,
        Err(failure) => return fail(&failure),
    };
    // SAFETY: the caller's own promises, passed on.
    let mapping = unsafe { sys::mmap(address, length, protection, flags, descriptor, offset) };
    if mapping == sys::MAP_FAILED {
        return mapping;
    }
    let mapped = Mapped { ram, kind, start: mapping, length, descriptor, offset: offset_in_file };
    if let Err(failure) = protect(config.socket, &mapped, locked) {
        // SAFETY: the mapping was made above and has no other user yet.
        unsafe { sys::munmap(mapping, length) };
        return fail(&failure);
    }
    mapping
}

/// True if the range reaches into memory that was handed over; umem is told, once.
pub(crate) fn refuse_populate(address: usize, length: usize) -> bool {
    refuse(
        |held| held.overlaps(address, length),
        Code::Prealloc,
        "QEMU preallocates the guest's memory: start it without prealloc=on",
    )
}

/// True if the range reaches into memory that was handed over; umem is told, once.
pub(crate) fn refuse_remap(address: usize, length: usize) -> bool {
    refuse(
        // With a length of 0 a shared mapping is mapped a second time, from this page on.
        |held| held.overlaps(address, length.max(1)),
        Code::Remap,
        "the guest's memory is moved or resized before all of it has come: let it stay where it is \
         until umem is done",
    )
}

/// Notes the program's advice about the range in forked children. True if the range reaches into
/// memory that was handed over: no child may have it before [`release`].
pub(crate) fn note_fork_advice(address: usize, length: usize, dont_fork: bool) -> bool {
    let mut is_held = false;
    for held in held().iter_mut().filter(|held| held.overlaps(address, length)) {
        held.wants_dont_fork = dont_fork;
        is_held = true;
    }
    is_held
}

/// True if the range reaches into memory that was handed over and whose page tables may stay: the memory is shared, or
/// still empty, or has no file and the guest has not been loaded yet. Until then the source alone decides the contents
/// of such memory, and with passes the memory has copies of pages that are unknown to QEMU.
pub(crate) fn keeps(address: usize, length: usize) -> bool {
    let is_kept = |held: &Held| match held.descriptor() {
        Some(file) => held.is_shared || is_empty(file),
        None => !state::guest_may_run(),
    };
    held().iter().any(|held| held.overlaps(address, length) && is_kept(held))
}

/// Whether the memory is still empty: no page arrives before umem's first command.
fn is_empty(descriptor: c_int) -> bool {
    !state::has_begun() && blocks_of(descriptor).is_ok_and(|blocks| blocks == 0)
}

/// Punches a hole into a file; through the mapping if the file is shared memory that was handed over. Fails with an
/// errno. Through the mapping the hole must be whole pages: umem has no record of a partly discarded page.
pub(crate) fn punch(descriptor: c_int, mode: c_int, offset: u64, length: u64) -> Result<(), c_int> {
    let in_file = |from: u64, to: u64| match from < to {
        true if sys::fallocate(descriptor, mode, from as i64, (to - from) as i64) != 0 => {
            Err(sys::last_errno())
        }
        _ => Ok(()),
    };
    let end = offset.saturating_add(length);
    let mut done = offset;
    for (start, mapped, page_size) in shared_mappings_of(descriptor) {
        let (from, to) = (done.max(mapped.start), end.min(mapped.end));
        if from >= to {
            continue;
        }
        in_file(done, from)?;
        if !is_empty(descriptor) {
            let is_whole =
                [from, to].iter().all(|at| (at - mapped.start).is_multiple_of(page_size));
            if !is_whole {
                return Err(sys::EOPNOTSUPP);
            }
            let address = start + (from - mapped.start) as usize;
            let pages = std::ptr::with_exposed_provenance_mut(address);
            // The lock is not held: this waits until umem has read the event.
            // SAFETY: the caller wants these bytes of the file to be zeroes, in every mapping.
            if unsafe { sys::madvise(pages, (to - from) as usize, sys::MADV_REMOVE) } != 0 {
                return Err(sys::last_errno());
            }
        }
        done = to;
    }
    in_file(done, end)
}

/// The mappings of this file that were handed over, in the order of their offsets: the address, the range of the file,
/// the page size.
fn shared_mappings_of(descriptor: c_int) -> Vec<(usize, Range<u64>, u64)> {
    let all = held();
    let mut found: Vec<_> = all
        .iter()
        .filter(|held| held.is_shared && is_same(held, descriptor))
        .map(|held| (held.address, held.part(), held.page_size as u64))
        .collect();
    found.sort_by_key(|(_, part, _)| part.start);
    found
}

/// Makes private copies of the pages of the range. The pages are present, or umem fills them meanwhile.
/// Fails with the name of the RAM, if known, and the answer.
pub(crate) fn touch(address: usize, length: usize) -> Result<(), (String, Failure)> {
    let Some(name) = name_of(address, length) else {
        let text = "no memory of this guest is at this address";
        return Err((String::new(), Failure::new(Code::Touch, sys::EINVAL, text)));
    };
    let start = std::ptr::with_exposed_provenance_mut(address);
    // The lock is not held: this may wait for umem. Only this thread releases memory.
    // SAFETY: a write fault in every page changes no content.
    if unsafe { sys::madvise(start, length, sys::MADV_POPULATE_WRITE) } == 0 {
        return Ok(());
    }
    let touched = match sys::last_errno() {
        sys::EPERM | sys::EACCES | sys::ENOSYS => touch_each(address, length),
        errno => Err(errno),
    };
    let text = "the guest's memory cannot be populated";
    touched.map_err(|errno| (name, Failure::new(Code::Touch, errno, text)))
}

/// The fallback if a sandbox forbids that advice: a write to each page that changes no content. The kernel writes,
/// because the program may have unmapped the page.
fn touch_each(address: usize, length: usize) -> Result<(), i32> {
    (address..address + length).step_by(sys::page_size().max(1)).try_for_each(sys::write_nothing)
}

/// The RAM to which the whole range belongs; the range must be whole pages.
fn name_of(address: usize, length: usize) -> Option<String> {
    let is_whole = length > 0
        && address.is_multiple_of(sys::page_size())
        && length.is_multiple_of(sys::page_size());
    let end = address.checked_add(length).filter(|_| is_whole)?;
    let all = held();
    let held = all.iter().find(|held| held.address <= address && end <= held.end())?;
    Some(held.name.clone())
}

impl Held {
    fn end(&self) -> usize {
        self.address.saturating_add(self.length)
    }

    /// The file that has the locks.
    fn descriptor(&self) -> Option<c_int> {
        self.file.as_ref().map(|ram| ram.file.as_raw_fd())
    }

    /// Its range of the file.
    fn part(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.length as u64)
    }

    fn overlaps(&self, address: usize, length: usize) -> bool {
        address < self.end() && self.address < address.saturating_add(length)
    }
}

/// True if anything was handed over; umem is told, once.
pub(crate) fn refuse_lock() -> bool {
    refuse(|_| true, Code::MemLock, "QEMU locks the guest's memory: start it without mem-lock=on")
}

fn refuse(is_meant: impl Fn(&Held) -> bool, code: Code, text: &str) -> bool {
    let Some(config) = config::get() else {
        return false;
    };
    let mut all = held();
    let Some(held) = all.iter_mut().find(|held| is_meant(held)) else {
        return false;
    };
    if !held.has_refused {
        held.has_refused = true;
        let failure = Failure::new(code, sys::EFAULT, text);
        // The refusal must not end a guest that may be running here.
        if state::guest_may_run() {
            report::complaint(&held.name, &failure);
        } else {
            report::failure(config.socket, &held.name, &failure);
        }
    }
    true
}

/// Closes the userfaultfds, once everything is unregistered, and returns their number.
pub(crate) fn release() -> usize {
    let released = std::mem::take(&mut *held());
    for held in &released {
        held.descriptor().into_iter().for_each(sys::unlock_move);
        if !held.wants_dont_fork {
            advise_fork(held.address, held.length, sys::MADV_DOFORK);
        }
        if let Some(ram) = held.file.as_ref().filter(|_| held.is_huge) {
            whole::map(held.address, held.length, &ram.file, held.offset);
        }
    }
    let count = released.len();
    // If the program closes its own descriptor, or the locked one of several, this descriptor keeps the file locked as
    // long as the program lives.
    let files: Vec<RamDescriptor> = released.into_iter().filter_map(|held| held.file).collect();
    let identities: Vec<_> = files.iter().map(|ram| identity_of(ram.file.as_raw_fd())).collect();
    for (ram, file) in files.into_iter().zip(&identities) {
        let is_only = identities.iter().filter(|other| *other == file).count() == 1;
        if !is_only || identity_of(ram.number) != *file {
            std::mem::forget(ram.file);
        }
    }
    count
}

fn identity_of(descriptor: c_int) -> Option<(u64, u64)> {
    metadata(descriptor).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Names the memory at this address.
pub(crate) fn rename(address: usize, name: &str) {
    for held in held().iter_mut().filter(|held| held.address == address) {
        name.clone_into(&mut held.name);
        name.clone_into(&mut held.told.ram.name);
    }
}

/// Forgets memory that is not RAM: umem has closed its userfaultfd, and closing this duplicate unregisters the memory.
pub(crate) fn forget(address: usize) {
    let mut all = held();
    let Some(index) = all.iter().position(|held| held.address == address) else { return };
    let held = all.swap_remove(index);
    if let Some(file) =
        held.descriptor().filter(|&file| !all.iter().any(|held| is_same(held, file)))
    {
        sys::unlock_move(file);
    }
    if !held.wants_dont_fork {
        advise_fork(held.address, held.length, sys::MADV_DOFORK);
    }
}

/// Hands everything that is not released over again, to a umem that takes over. Fails with an errno.
pub(crate) fn again(socket: i32) -> Result<(), i32> {
    for held in held().iter() {
        send(socket, held)?;
    }
    Ok(())
}

/// Sends a hand-over message with its descriptors. Fails with an errno.
fn send(socket: i32, held: &Held) -> Result<(), i32> {
    let descriptors: Vec<c_int> =
        std::iter::once(held.uffd.as_raw_fd()).chain(held.descriptor()).collect();
    report::send(socket, report::handover_line(&held.told).as_bytes(), &descriptors)
}

fn held() -> MutexGuard<'static, Vec<Held>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Checks whether the requested mapping can be handed over, and locks its file. Returns the file that has the locks.
fn lock_before(
    ram: &RamFile,
    kind: Kind,
    flags: c_int,
    descriptor: c_int,
    part: &Range<u64>,
) -> Result<OwnedFd, Failure> {
    if kind == Kind::Shared && flags & sys::MAP_SHARED == 0 {
        return Err(Failure::new(
            Code::ShareOff,
            sys::EINVAL,
            "the memory backend maps its file privately: set share=on",
        ));
    }
    if kind == Kind::Private && flags & sys::MAP_TYPE != sys::MAP_PRIVATE {
        return Err(Failure::new(
            Code::ShareOn,
            sys::EINVAL,
            "the memory backend maps its file shared, and the kind is private: set share=off",
        ));
    }
    let keep = |descriptor| {
        sys::duplicate(descriptor)
            .map_err(|errno| Failure::new(Code::Send, errno, "the RAM file cannot be kept open"))
    };
    let all = held();
    let of_file: Vec<&Held> = all.iter().filter(|held| is_same(held, descriptor)).collect();
    let overlaps = |held: &&Held| {
        let other = held.part();
        other.start < part.end && part.start < other.end
    };
    // A named RAM file is mapped as a whole.
    let is_named = config::get().is_some_and(config::Config::has_names);
    if of_file.iter().any(overlaps) || (is_named && all.iter().any(|held| held.name == ram.name)) {
        return Err(Failure::new(
            Code::RamTwice,
            sys::EBUSY,
            "the RAM file is mapped a second time: give each memory backend a mem-path of its own, or an offset= \
             of its own without --ram",
        ));
    }
    if let Some(other) = of_file.first().and_then(|held| held.descriptor()) {
        return keep(other);
    }
    drop(all);
    // This program's open file description holds the lock from here on, so the lock ends with the program.
    if let Err(errno) = sys::lock_ram(descriptor) {
        let text = match errno {
            sys::EAGAIN => {
                "another guest has its memory in this file, or another umem moves the guest in it"
            }
            _ => "the RAM file cannot be locked",
        };
        return Err(Failure::new(Code::RamLocked, errno, text));
    }
    let blocks = blocks_of(descriptor)?;
    if blocks > 0 {
        return Err(Failure::new(
            Code::RamInUse,
            sys::EBUSY,
            "the RAM file has contents already: name another mem-path, or remove the file if no guest has it mapped",
        )
        .of(&ram.path));
    }
    keep(descriptor)
}

/// A mapping that is not handed over yet.
struct Mapped<'a> {
    ram: &'a RamFile,
    kind: Kind,
    start: *mut c_void,
    /// The requested length, bytes.
    length: usize,
    descriptor: c_int,
    /// In its file.
    offset: u64,
}

/// `file` has the locks.
fn protect(socket: i32, mapped: &Mapped, file: OwnedFd) -> Result<(), Failure> {
    let &Mapped { ram, kind, start, length, descriptor, offset } = mapped;
    // Pages populated with the mapping itself (an earlier mlockall, MAP_POPULATE) are zeroes and never
    // fault.
    if blocks_of(descriptor)? > 0 {
        return Err(Failure::new(
            Code::RamPopulated,
            sys::EBUSY,
            "the guest's memory was locked or populated as it was mapped: start QEMU without \
             mem-lock=on",
        ));
    }
    let backing = Backing::of(descriptor);
    let (uffd, features) = uffd::open(backing)?;
    let length = length.next_multiple_of(backing.page_size.max(1));
    let address = start as usize;
    uffd::register(&uffd, kind, address, length)?;
    keep_from_children(address, length)?;
    let told = report::Handover {
        ram: ram.clone(),
        kind,
        address,
        length,
        file_offset: offset,
        page_size: backing.page_size,
        features,
    };
    // Pages that became anonymous are small, also if the file's pages are huge.
    let is_huge = kind == Kind::Shared
        && block_size_of(descriptor) >= whole::HUGE_PAGE_SIZE as u64
        && sys::hugetlbfs_page_size(descriptor).is_none();
    hand_over(socket, told, uffd, Some(RamDescriptor { file, number: descriptor }), is_huge)
}

/// Hands over memory without a file; it is registered and kept from forked children.
pub(crate) fn hand_over_anonymous(
    socket: i32,
    told: report::Handover,
    uffd: OwnedFd,
) -> Result<(), Failure> {
    hand_over(socket, told, uffd, None, false)
}

/// Calls `change` with the userfaultfd and the length of the memory without a file that begins at this address. None if
/// there is no such memory. The lock excludes other changes meanwhile.
pub(crate) fn with_anonymous<T>(
    address: usize,
    change: impl FnOnce(&OwnedFd, usize) -> T,
) -> Option<T> {
    let all = held();
    let held = all.iter().find(|held| held.address == address && held.file.is_none())?;
    Some(change(&held.uffd, held.length))
}

/// True if the range reaches into memory that was handed over.
pub(crate) fn is_held(address: usize, length: usize) -> bool {
    held().iter().any(|held| held.overlaps(address, length))
}

fn hand_over(
    socket: i32,
    told: report::Handover,
    uffd: OwnedFd,
    file: Option<RamDescriptor>,
    is_huge: bool,
) -> Result<(), Failure> {
    let address = told.address;
    // Kept before it is sent: as soon as umem has the userfaultfd, this duplicate must exist.
    let mut all = held();
    all.push(Held {
        name: told.ram.name.clone(),
        address,
        length: told.length,
        offset: told.file_offset,
        is_shared: told.kind == Kind::Shared,
        page_size: told.page_size.max(1),
        is_huge,
        has_refused: false,
        // A QEMU keeps all of its RAM from children when it makes the RAM, before memory without a file is handed over.
        wants_dont_fork: file.is_none(),
        told,
        uffd,
        file,
    });
    let sent = all.last().map_or(Ok(()), |held| send(socket, held));
    drop(all);
    if let Err(errno) = sent.and_then(|()| state::listen(socket)) {
        held().retain(|held| held.address != address);
        return Err(Failure::new(Code::Send, errno, "the RAM could not be handed to umem"));
    }
    Ok(())
}

/// A forked child has the mapping without the userfaultfd, and would read zeroes.
pub(crate) fn keep_from_children(address: usize, length: usize) -> Result<(), Failure> {
    if advise_fork(address, length, sys::MADV_DONTFORK) == 0 {
        return Ok(());
    }
    Err(Failure::new(
        Code::Register,
        sys::last_errno(),
        "the guest's memory cannot be kept from forked children",
    ))
}

fn advise_fork(address: usize, length: usize, advice: c_int) -> c_int {
    // SAFETY: changes whether a child inherits the range, and no content. If the program has unmapped the range
    // meanwhile, the call fails without effect.
    unsafe { sys::madvise(std::ptr::with_exposed_provenance_mut(address), length, advice) }
}

fn is_same(held: &Held, descriptor: c_int) -> bool {
    let identity = |descriptor| metadata(descriptor).ok().map(|file| (file.dev(), file.ino()));
    let Some(file) = held.descriptor() else { return false };
    identity(descriptor).is_some_and(|other| identity(file) == Some(other))
}

fn block_size_of(descriptor: c_int) -> u64 {
    metadata(descriptor).map_or(0, |metadata| metadata.blksize())
}

fn metadata(descriptor: c_int) -> std::io::Result<std::fs::Metadata> {
    // SAFETY: the descriptor is the caller's and stays so: ManuallyDrop never closes it.
    ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(descriptor) }).metadata()
}

fn blocks_of(descriptor: c_int) -> Result<u64, Failure> {
    match metadata(descriptor) {
        Ok(metadata) => Ok(metadata.blocks()),
        Err(error) => Err(Failure::new(
            Code::RamInUse,
            error.raw_os_error().unwrap_or(sys::EINVAL),
            "the RAM file cannot be examined",
        )),
    }
}

//! The shared object that an unmodified QEMU is started with (`LD_PRELOAD`): it hands the guest's
//! RAM to umem before the guest or QEMU can touch it.
//!
//! # What goes in
//!
//! | variable | meaning |
//! |---|---|
//! | `UMEM_PRELOAD_SOCKET` | number of an inherited descriptor, one end of a unix stream socket pair |
//! | `UMEM_PRELOAD_RAM` | `name=path`, one a line: the RAM files to wait for; without it they are what a QEMU maps as its RAM |
//! | `UMEM_PRELOAD_QEMU` | `incoming`: a QEMU gets the options to wait for a guest; `monitor`: and a monitor |
//! | `UMEM_PRELOAD_KIND` | `shared` (also if it is not set) or `private`: how they have to be mapped |
//!
//! # What goes over the socket
//!
//! Every message is one line of JSON. A program that loads the object says
//!
//! ```text
//! {"preload":1,"pid":4711,"program":"/usr/bin/qemu-system-x86_64"}
//! ```
//!
//! and a wrapper (a shell script, `taskset`, `numactl`) says it as well, before QEMU does: the
//! variables and the socket pass through programs until one maps a RAM file. From then on they are
//! gone, so that nothing QEMU starts inherits them.
//!
//! A QEMU, which is known by its name, says further, with umem's end of a socket for its monitor if it was to have one,
//!
//! ```text
//! {"qemu":1,"monitor":true,"registers":true}
//! ```
//!
//! (`registers`: it knows the command of that name) and of each file that it makes on tmpfs or hugetlbfs, which is its owner's alone,
//!
//! ```text
//! {"made":"/dev/shm/x","device":27,"inode":16}
//! ```
//!
//! When a named file is mapped writable, or a QEMU maps a file of tmpfs or hugetlbfs over memory that it has reserved,
//! which is how it maps its RAM, one `sendmsg` carries
//!
//! ```text
//! [{"name":"ram0","path":"/dev/shm/x","base_host_virt_addr":140737354133504,"size":268435456,
//!   "offset":0,"file_offset":0,"page_size":4096,"kind":"shared","features":1064,"pid":4711,"umem":2}]
//! ```
//!
//! (on one line; addresses and sizes in bytes, `features` as `UFFDIO_API` granted them) and exactly
//! two descriptors: the userfaultfd, registered MISSING and MINOR over the mapping, then the RAM
//! file. One message for each mapping, each with a userfaultfd of its own. There is no answer. `file_offset` is where
//! in its file the mapping begins. Of a file that is mapped in several places, at offsets of their own, the file that
//! comes is the same open file for each: its locks are on that.
//! `umem` says which version of the commands below is understood.
//!
//! What cannot be protected is not mapped: the mapping is undone, `mmap` fails, QEMU refuses to
//! start, and the socket says why (the codes are [`report::Code`]):
//!
//! ```text
//! {"error":"ram-in-use","name":"ram0","errno":16,"text":"…"}
//! ```
//!
//! After the first hand-over, and in a QEMU from the moment at which it maps the first of its RAM, a thread of ours reads
//! command lines, any number at once, and carries them out in their order:
//!
//! | command | answer | |
//! |---|---|---|
//! | `ping` | `{"pong":1}` | |
//! | `register ADDRESS LENGTH NAME` | a hand-over message | empties and registers private memory without a file |
//! | `stale ADDRESS LENGTH` | | names a range for the next `empty` |
//! | `empty ADDRESS` | `{"emptied":ADDRESS,"size":LENGTH}` | drops the stale ranges of the memory that was registered there |
//! | `name ADDRESS NAME` | | what is mapped there is called so from now on |
//! | `forget ADDRESS` | | what is mapped there is no RAM: closes our userfaultfd of it |
//! | `settled` | | that was all: what is mapped from now on (a DIMM that is plugged in later) is none of ours |
//! | `touch ADDRESS LENGTH` | `{"touched":ADDRESS,"size":LENGTH}` | makes these pages the guest's own |
//! | `keep` | | the guest may run here from now on |
//! | `session` | | with two or three descriptors: keeps them for a umem that takes over |
//! | `release` | `{"released":N}` | everything is unregistered: closes our userfaultfds, ends the thread |
//!
//! Addresses and lengths are decimal, bytes, whole pages of one RAM file. A `touch` that fails is
//! answered by `{"error":"touch",…}` and changes nothing. What `register` hands over is of kind `anonymous`: its
//! message comes with the userfaultfd alone, which reports missing pages. Before `keep` a page that has come there may
//! be `stale`, and is missing again once `empty` has been answered; `size` is the ranges' sum. A program's own
//! MADV_DONTNEED does nothing there before `keep`. If the socket closes before `keep`, no guest
//! will come: the process is killed.
//!
//! With `session` come a unix socket that listens, a memory file and, perhaps, umem's end of the
//! monitor's socket. Whoever connects to the listening socket, in which the file system lets nobody
//! but umem's user, gets every hand-over message again, and then
//!
//! ```text
//! {"session":2}
//! ```
//!
//! with the memory file and the monitor's socket (`1` without it); commands come on that connection
//! then. So a umem that was killed after `keep` can be replaced, while the guest waits.
//!
//! Until `release` the memory is in no forked child (MADV_DONTFORK) and stays where it is (`mremap`
//! fails): the kernel would not tell umem of either, and missing pages would read as zeroes there.
//!
//! A discard of shared memory has to be told apart from page tables that are dropped, and the kernel reports
//! both alike, and a hole that is punched in the file not at all. QEMU discards (balloon, reports of free pages,
//! virtio-mem) by punching and then dropping. So until `release` a hole is punched through the mapping
//! (`MADV_REMOVE`), which is reported, before anything is gone, as the discard that it is; and dropping does
//! nothing. A program that makes sure, as it starts, that its memory is empty (virtio-mem of QEMU 7.2) discards
//! nothing, and is not to wait for a umem that waits for its monitor: nothing happens, and nothing is reported.
//!
//! # What must hold
//!
//! - The userfaultfds stay open in this process until `release`. A closed one would let the guest
//!   read zeroes for pages that never arrived; an open one makes it wait, whatever became of umem.
//! - No RAM file named to us is ever mapped writable and left unprotected.
//! - A mapping that is none of ours costs a few comparisons: nothing is locked, nothing allocated.
//! - Nothing here panics, and nothing but the C library is needed: the object is loaded into
//!   programs that know nothing of it.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("the preload object needs 64-bit Linux: it speaks its system calls and layouts");

mod block;
mod commands;
mod config;
mod handover;
mod made;
mod qemu;
mod report;
mod state;
mod sys;
mod uffd;
mod whole;

use std::ffi::{c_char, c_int, c_long, c_void};

/// Run by the dynamic linker when the object has been loaded, before `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static INITIALISE: extern "C" fn() = initialise;

extern "C" fn initialise() {
    config::read_environment();
    state::listens_by(commands::start);
    if let Some(config) = config::get() {
        report::hello(config.socket);
    }
}

/// `mmap64` of the C library, which is what Debian's QEMU calls.
///
/// # Safety
///
/// As for `mmap(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    offset: i64,
) -> *mut c_void {
    if let Some(ram) = ram_file(protection, flags, descriptor) {
        // SAFETY: the caller's own promises, passed on.
        return unsafe {
            handover::map(&ram, address, length, protection, flags, descriptor, offset)
        };
    }
    if flags & sys::MAP_FIXED != 0 && protection & sys::PROT_WRITE != 0 {
        qemu::maps_ram();
    }
    // SAFETY: as above.
    unsafe { sys::mmap(address, length, protection, flags, descriptor, offset) }
}

/// `mmap` of the C library; the same function where `off_t` has 64 bits.
///
/// # Safety
///
/// As for `mmap(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    offset: c_long,
) -> *mut c_void {
    // SAFETY: the caller's own promises, passed on.
    unsafe { mmap64(address, length, protection, flags, descriptor, offset) }
}

/// `madvise` of the C library: passed on, but populating handed-over memory (`prealloc=on`) is
/// refused. It would wait, for ever or for the whole migration, for pages that are still elsewhere.
/// Letting forked children have it (`MADV_DOFORK`) is put off until it is complete. Dropping the page tables of
/// shared memory (`MADV_DONTNEED`) is done by doing nothing: its bytes have to stay, and the kernel would report
/// to umem what it reports of a discard. So is a discard of what is still empty.
///
/// # Safety
///
/// As for `madvise(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int {
    let populates = advice == sys::MADV_POPULATE_READ || advice == sys::MADV_POPULATE_WRITE;
    if populates && handover::refuse_populate(address as usize, length) {
        sys::set_errno(sys::EFAULT);
        return -1;
    }
    let drops = advice == sys::MADV_DONTNEED || advice == sys::MADV_DONTNEED_LOCKED;
    if drops && handover::keeps(address as usize, length) {
        return 0;
    }
    if advice == sys::MADV_DONTFORK || advice == sys::MADV_DOFORK {
        let dont_fork = advice == sys::MADV_DONTFORK;
        let is_held = handover::note_fork_advice(address as usize, length, dont_fork);
        if is_held && !dont_fork {
            return 0;
        }
    }
    // SAFETY: the caller's own promises, passed on.
    unsafe { sys::madvise(address, length, advice) }
}

/// `fallocate64` of the C library, which is what QEMU calls: passed on, but a hole in handed-over memory is
/// punched by way of its mapping (`MADV_REMOVE`). The kernel says nothing of a hole that is punched in a file, and
/// what comes later would fill it; of the other it tells umem, which has heard of it before the pages go.
#[unsafe(no_mangle)]
pub extern "C" fn fallocate64(descriptor: c_int, mode: c_int, offset: i64, length: i64) -> c_int {
    if mode & sys::FALLOC_FL_PUNCH_HOLE != 0 && offset >= 0 && length > 0 {
        return match handover::punch(descriptor, mode, offset as u64, length as u64) {
            Ok(()) => 0,
            Err(errno) => {
                sys::set_errno(errno);
                -1
            }
        };
    }
    sys::fallocate(descriptor, mode, offset, length)
}

/// `fallocate` of the C library; the same function where `off_t` has 64 bits.
#[unsafe(no_mangle)]
pub extern "C" fn fallocate(
    descriptor: c_int,
    mode: c_int,
    offset: c_long,
    length: c_long,
) -> c_int {
    fallocate64(descriptor, mode, offset, length)
}

/// `mremap` of the C library: passed on, but moving, growing or doubling handed-over memory is refused.
/// The userfaultfd would not come along, and what is missing would read as zeroes.
///
/// The C library's takes its last argument only if it is given; on every processor that this object
/// is made for an argument that is not given is a register that is not looked at.
///
/// # Safety
///
/// As for `mremap(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    address: *mut c_void,
    length: usize,
    new_length: usize,
    flags: c_int,
    new_address: *mut c_void,
) -> *mut c_void {
    // Shrinking without a new place unmaps the rest, which anybody may.
    let shrinks = length > 0 && new_length <= length && flags & !sys::MREMAP_MAYMOVE == 0;
    if !shrinks && handover::refuse_remap(address as usize, length) {
        return sys::map_failed(sys::ENOMEM);
    }
    // SAFETY: the caller's own promises, passed on.
    unsafe { sys::mremap(address, length, new_length, flags, new_address) }
}

/// `mlockall` of the C library: passed on, but locking handed-over memory (`mem-lock=on`) is refused,
/// for the same reason. Locking pages as they come (`MCL_ONFAULT`) is fine.
///
/// # Safety
///
/// As for `mlockall(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mlockall(flags: c_int) -> c_int {
    let populates = flags & sys::MCL_CURRENT != 0 && flags & sys::MCL_ONFAULT == 0;
    if populates && handover::refuse_lock() {
        sys::set_errno(sys::EFAULT);
        return -1;
    }
    // SAFETY: the caller's own promises, passed on.
    unsafe { sys::mlockall(flags) }
}

/// The RAM file that this mapping is of, if it is a writable mapping of one.
fn ram_file(protection: c_int, flags: c_int, descriptor: c_int) -> Option<config::RamFile> {
    let anonymous = flags & sys::MAP_ANONYMOUS != 0;
    if anonymous || descriptor < 0 || protection & sys::PROT_WRITE == 0 {
        return None;
    }
    let config = config::get()?;
    if !config.has_names() {
        // A QEMU maps its RAM over what it has reserved. Of the other kind it is none of ours, and umem learns of it
        // when it asks for QEMU's RAM blocks.
        let is_shared = flags & sys::MAP_SHARED != 0;
        if flags & sys::MAP_FIXED == 0 || is_shared != (config.kind == Some(config::Kind::Shared)) {
            return None;
        }
    }
    config.ram_file(descriptor)
}

/// `open64` of the C library, by which a QEMU makes its RAM files: passed on, but a file that it makes on tmpfs or
/// hugetlbfs is its owner's alone.
///
/// # Safety
///
/// As for `open(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: the caller's own promises, passed on.
    unsafe { made::open(path, flags, mode) }
}

/// `open` of the C library; the same function where `off_t` has 64 bits.
///
/// # Safety
///
/// As for `open(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: the caller's own promises, passed on.
    unsafe { made::open(path, flags, mode) }
}

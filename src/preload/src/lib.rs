//! The shared object with which umem starts an unmodified QEMU (`LD_PRELOAD`): it hands the guest's RAM to umem before
//! the guest or QEMU can touch the RAM.
//!
//! # Input
//!
//! | variable | meaning |
//! |---|---|
//! | `UMEM_PRELOAD_SOCKET` | number of an inherited descriptor, one end of a unix stream socket pair |
//! | `UMEM_PRELOAD_RAM` | `name=path`, one a line: the RAM files to wait for; without it, the files that a QEMU maps as its RAM |
//! | `UMEM_PRELOAD_QEMU` | `incoming`: a QEMU gets the options to wait for a guest; `monitor`: and a monitor |
//! | `UMEM_PRELOAD_KIND` | `shared` (the default) or `private`: how the RAM files must be mapped |
//!
//! # Messages on the socket
//!
//! Every message is one line of JSON. A program that loads the object sends
//!
//! ```text
//! {"preload":1,"pid":4711,"program":"/usr/bin/qemu-system-x86_64"}
//! ```
//!
//! A wrapper (a shell script, `taskset`, `numactl`) sends this message as well, before QEMU does: the variables and the
//! socket pass through programs until one maps a RAM file. From then on they are gone, so that no program that QEMU
//! starts inherits them.
//!
//! A QEMU is recognised by its name. It also sends the following, with umem's end of a socket for its monitor if the
//! variables ask for a monitor:
//!
//! ```text
//! {"qemu":1,"monitor":true,"registers":true}
//! ```
//!
//! `registers` means that the object has the command `register`. For each file that a QEMU makes on tmpfs or hugetlbfs,
//! which only its owner can access, the object sends
//!
//! ```text
//! {"made":"/dev/shm/x","device":27,"inode":16}
//! ```
//!
//! A RAM file is handed over when a named file is mapped writable, or when a QEMU maps a file of tmpfs or hugetlbfs
//! over memory that it has reserved, which is how QEMU maps its RAM. One `sendmsg` carries
//!
//! ```text
//! [{"name":"ram0","path":"/dev/shm/x","base_host_virt_addr":140737354133504,"size":268435456,
//!   "offset":0,"file_offset":0,"page_size":4096,"kind":"shared","features":1064,"pid":4711,"umem":2}]
//! ```
//!
//! on one line, and exactly two descriptors: the userfaultfd, registered MISSING and MINOR over the mapping, then the
//! RAM file. Addresses and sizes are bytes. `features` are those that `UFFDIO_API` granted. `file_offset` is the
//! mapping's offset in its file. `umem` is the version of the commands below. There is one message for each mapping,
//! each with its own userfaultfd, and no answer. If a file is mapped in several places, at different offsets, each
//! message carries the same open file, which has the locks.
//!
//! Memory that cannot be protected is not mapped: the object undoes the mapping, `mmap` fails, and QEMU refuses to
//! start. The socket gets the reason (the codes are [`report::Code`]; the path of the RAM file only where umem looks at
//! that file):
//!
//! ```text
//! {"error":"ram-in-use","name":"ram0","errno":16,"text":"…","path":"/dev/shm/ram0"}
//! ```
//!
//! # Commands
//!
//! After the first hand-over, and in a QEMU from its first RAM mapping on, a thread of the object reads lines of
//! commands and carries them out in order:
//!
//! | command | answer | |
//! |---|---|---|
//! | `ping` | `{"pong":1}` | |
//! | `register ADDRESS LENGTH NAME` | a hand-over message | empties and registers private memory without a file |
//! | `stale ADDRESS LENGTH` | | names a range for the next `empty` |
//! | `empty ADDRESS` | `{"emptied":ADDRESS,"size":LENGTH}` | drops the stale ranges of the memory registered at this address |
//! | `name ADDRESS NAME` | | names the memory mapped at this address |
//! | `forget ADDRESS` | | the memory at this address is not RAM: closes the object's userfaultfd of it |
//! | `settled` | | all RAM has been handed over: later mappings (a DIMM that is plugged in) are not umem's |
//! | `touch ADDRESS LENGTH` | `{"touched":ADDRESS,"size":LENGTH}` | makes private copies of these pages for the guest |
//! | `keep` | | the guest may run here from now on |
//! | `session` | | with two or three descriptors: keeps them for a umem that takes over |
//! | `release` | `{"released":N}` | everything is unregistered: closes the object's userfaultfds, ends the thread |
//!
//! Addresses and lengths are decimal, bytes, whole pages of one RAM file. A `touch` that fails is answered with
//! `{"error":"touch",…}` and changes nothing. `register` hands over memory of kind `anonymous`: the message has only
//! the userfaultfd, which reports missing pages. Before `keep` an arrived page of such memory may become `stale`; it is
//! missing again once `empty` has been answered, and `size` is the sum of the ranges. Before `keep` the program's own
//! MADV_DONTNEED has no effect on such memory. If the socket closes before `keep`, no guest will arrive, and the object
//! kills the process.
//!
//! `session` carries a listening unix socket, a memory file and, optionally, umem's end of the monitor's socket. Only
//! umem's user can connect to the listening socket (its file has mode 0600). A umem that connects gets every hand-over
//! message again, and then
//!
//! ```text
//! {"session":2}
//! ```
//!
//! with the memory file and the monitor's socket (`1` without the socket). Commands then arrive on that connection. So
//! a umem that was killed after `keep` can be replaced while the guest waits.
//!
//! # Calls that the object changes
//!
//! Until `release` no forked child has the memory (MADV_DONTFORK), and `mremap` of it fails: the kernel would report
//! neither to umem, and missing pages would read as zeroes in the copy.
//!
//! The kernel reports a discard of shared memory and a drop of page tables alike, and does not report a hole punched in
//! the file. QEMU discards pages (balloon, free page reporting, virtio-mem) with both: it punches, then drops. So until
//! `release` the object punches a hole through the mapping (`MADV_REMOVE`), which the kernel reports as a discard
//! before the pages are gone, and ignores the drop. A program that empties its memory at its start (virtio-mem of QEMU
//! 7.2) discards nothing, and must not wait for a umem that itself waits for the monitor: the object ignores that call.
//!
//! # What must hold
//!
//! - The userfaultfds stay open in this process until `release`. A closed userfaultfd would let the guest read zeroes
//!   for pages that never arrived; an open one makes the guest wait, even without umem.
//! - No named RAM file is ever mapped writable and left unprotected.
//! - Any other mapping costs a few comparisons, without a lock or an allocation.
//! - Nothing here panics or needs more than the C library: the object is loaded into unsuspecting programs.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("the preload object needs 64-bit Linux: it uses its system calls and layouts");

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

/// The dynamic linker runs this after loading the object, before `main`.
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

/// `mmap64` of the C library, which Debian's QEMU calls.
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

/// `madvise` of the C library: passed on, with exceptions for handed-over memory:
///
/// - Populating it (`prealloc=on`) is refused: the call would wait for pages that are still at the source, for the
///   whole migration or forever.
/// - Giving it to forked children (`MADV_DOFORK`) is postponed until it is complete.
/// - Dropping the page tables of shared memory (`MADV_DONTNEED`) is ignored: the bytes must stay, and the kernel would
///   report the drop to umem as a discard. A discard of memory that is still empty is ignored too.
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

/// `fallocate64` of the C library, which QEMU calls: passed on, but a hole in handed-over memory is punched through the
/// mapping (`MADV_REMOVE`). The kernel does not report a hole punched in a file, and a page that arrives later would
/// fill the hole. It reports `MADV_REMOVE` to umem, which reads the event before the pages are gone.
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

/// `mremap` of the C library: passed on, but moving, growing or doubling handed-over memory is refused. The new mapping
/// would not be registered, and missing pages would read as zeroes.
///
/// The C library's function reads its last argument only with a flag. On every supported processor a missing argument
/// is a register that the function does not read.
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
    // Shrinking in place unmaps the rest, which is allowed.
    let shrinks = length > 0 && new_length <= length && flags & !sys::MREMAP_MAYMOVE == 0;
    if !shrinks && handover::refuse_remap(address as usize, length) {
        return sys::map_failed(sys::ENOMEM);
    }
    // SAFETY: the caller's own promises, passed on.
    unsafe { sys::mremap(address, length, new_length, flags, new_address) }
}

/// `mlockall` of the C library: passed on, but locking handed-over memory (`mem-lock=on`) is refused, because the call
/// would wait for missing pages. Locking pages on arrival (`MCL_ONFAULT`) is allowed.
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

/// The RAM file of this mapping, if it is a writable mapping of a RAM file.
fn ram_file(protection: c_int, flags: c_int, descriptor: c_int) -> Option<config::RamFile> {
    let anonymous = flags & sys::MAP_ANONYMOUS != 0;
    if anonymous || descriptor < 0 || protection & sys::PROT_WRITE == 0 {
        return None;
    }
    let config = config::get()?;
    if !config.has_names() {
        // A QEMU maps its RAM over memory that it has reserved. RAM of another kind is not handled here: umem finds it
        // when it queries QEMU's RAM blocks.
        let is_shared = flags & sys::MAP_SHARED != 0;
        if flags & sys::MAP_FIXED == 0 || is_shared != (config.kind == Some(config::Kind::Shared)) {
            return None;
        }
    }
    config.ram_file(descriptor)
}

/// `open64` of the C library, with which a QEMU makes its RAM files: passed on, but a new file on tmpfs or hugetlbfs
/// is accessible to its owner only.
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

//! The needed parts of the C library and the kernel. The declarations are here because a build script compiles the
//! object without any dependency. Errors are errno values.

use std::ffi::{CStr, c_char, c_int, c_long, c_void};
use std::os::fd::{FromRawFd, OwnedFd};

pub(crate) const PROT_WRITE: c_int = 0x2;
/// Set in MAP_SHARED (1) and in MAP_SHARED_VALIDATE (3), not in MAP_PRIVATE (2).
pub(crate) const MAP_SHARED: c_int = 0x1;
/// The bits of the flags that hold one of them, and the private one.
pub(crate) const MAP_TYPE: c_int = 0xf;
pub(crate) const MAP_PRIVATE: c_int = 0x2;
pub(crate) const MAP_FIXED: c_int = 0x10;
pub(crate) const MAP_ANONYMOUS: c_int = 0x20;
pub(crate) const MAP_FAILED: *mut c_void = std::ptr::without_provenance_mut(usize::MAX);

pub(crate) const MADV_DONTNEED: c_int = 4;
pub(crate) const MADV_REMOVE: c_int = 9;
pub(crate) const MADV_DONTFORK: c_int = 10;
pub(crate) const MADV_DOFORK: c_int = 11;
pub(crate) const MADV_POPULATE_READ: c_int = 22;
pub(crate) const MADV_POPULATE_WRITE: c_int = 23;
pub(crate) const MADV_DONTNEED_LOCKED: c_int = 24;
pub(crate) const MADV_COLLAPSE: c_int = 25;
pub(crate) const FALLOC_FL_PUNCH_HOLE: c_int = 2;
pub(crate) const MREMAP_MAYMOVE: c_int = 1;
pub(crate) const MCL_CURRENT: c_int = 1;
pub(crate) const MCL_ONFAULT: c_int = 4;

pub(crate) const EPERM: c_int = 1;
pub(crate) const EINTR: c_int = 4;
pub(crate) const EAGAIN: c_int = 11;
pub(crate) const ENOMEM: c_int = 12;
pub(crate) const EACCES: c_int = 13;
pub(crate) const EFAULT: c_int = 14;
pub(crate) const EBUSY: c_int = 16;
pub(crate) const EINVAL: c_int = 22;
pub(crate) const ENOSYS: c_int = 38;
pub(crate) const EOPNOTSUPP: c_int = 95;

const O_RDWR: c_int = 0o2;
/// Makes a file that did not exist.
pub(crate) const O_NEW: c_int = 0o100 | 0o200;
const O_NONBLOCK: c_int = 0o4000;
const O_CLOEXEC: c_int = 0o2_000_000;
/// The flags of a new userfaultfd.
pub(crate) const O_UFFD: c_int = O_CLOEXEC | O_NONBLOCK;

const F_SETFD: c_int = 2;
const FD_CLOEXEC: c_int = 1;
const SC_PAGESIZE: c_int = 30;
const HUGETLBFS_MAGIC: u32 = 0x9584_58f6;
const TMPFS_MAGIC: u32 = 0x0102_1994;
const AT_FDCWD: c_int = -100;
const RTLD_NEXT: *mut c_void = std::ptr::without_provenance_mut(usize::MAX);
const SOL_SOCKET: c_int = 1;
const SCM_RIGHTS: c_int = 1;
const MSG_NOSIGNAL: c_int = 0x4000;
const MSG_CMSG_CLOEXEC: c_int = 0x4000_0000;
const SHUT_RDWR: c_int = 2;
const SEEK_SET: c_int = 0;
const SEEK_CUR: c_int = 1;
const SEEK_DATA: c_int = 3;
const SEEK_HOLE: c_int = 4;
const F_DUPFD_CLOEXEC: c_int = 1030;
const F_OFD_SETLK: c_int = 37;
const F_WRLCK: i16 = 1;
const LOCK_EX: c_int = 2;
const LOCK_NB: c_int = 4;
const LOCK_UN: c_int = 8;
const SOCK_CLOEXEC: c_int = 0o2_000_000;
const SIG_SETMASK: c_int = 2;
const SIGKILL: c_int = 9;

#[cfg(target_arch = "x86_64")]
mod number {
    use std::ffi::c_long;
    pub(super) const MMAP: c_long = 9;
    pub(super) const MREMAP: c_long = 25;
    pub(super) const MADVISE: c_long = 28;
    pub(super) const MLOCKALL: c_long = 151;
    pub(super) const FUTEX: c_long = 202;
    pub(super) const FALLOCATE: c_long = 285;
    pub(super) const PROCESS_VM_READV: c_long = 310;
    pub(super) const USERFAULTFD: c_long = 323;
}
#[cfg(not(target_arch = "x86_64"))]
mod number {
    //! The generic table: aarch64, riscv64, loongarch64.
    use std::ffi::c_long;
    pub(super) const FALLOCATE: c_long = 47;
    pub(super) const FUTEX: c_long = 98;
    pub(super) const MREMAP: c_long = 216;
    pub(super) const MMAP: c_long = 222;
    pub(super) const MADVISE: c_long = 233;
    pub(super) const MLOCKALL: c_long = 230;
    pub(super) const PROCESS_VM_READV: c_long = 270;
    pub(super) const USERFAULTFD: c_long = 282;
}

#[repr(C)]
struct Iovec {
    base: *const u8,
    length: usize,
}

#[repr(C)]
struct Msghdr {
    name: *const c_void,
    name_length: u32,
    iov: *const Iovec,
    iov_count: usize,
    control: *const c_void,
    control_length: usize,
    flags: c_int,
}

/// A control message with room for the descriptors of a hand-over, or of a session.
#[repr(C)]
struct Rights {
    length: usize,
    level: c_int,
    kind: c_int,
    descriptors: [c_int; DESCRIPTORS_MAX],
}

pub(crate) const DESCRIPTORS_MAX: usize = 3;
const RIGHTS_HEADER_SIZE: usize = std::mem::offset_of!(Rights, descriptors);

/// `struct statfs` of 64-bit Linux; only its head is of interest.
#[repr(C)]
struct Statfs {
    kind: i64,
    block_size: i64,
    rest: [u64; 16],
}

/// `Dl_info`.
#[repr(C)]
struct DlInfo {
    object_path: *const c_char,
    object_base: *mut c_void,
    symbol_name: *const c_char,
    symbol_address: *mut c_void,
}

/// `sigset_t` of glibc and musl: 1024 bits.
type SignalSet = [u64; 16];

mod c {
    use super::{DlInfo, Msghdr, SignalSet, Statfs};
    use std::ffi::{c_char, c_int, c_long, c_ulong, c_void};

    unsafe extern "C" {
        pub(super) fn syscall(number: c_long, ...) -> c_long;
        pub(super) fn lseek(descriptor: c_int, offset: i64, whence: c_int) -> i64;
        pub(super) fn munmap(address: *mut c_void, length: usize) -> c_int;
        pub(super) fn ioctl(descriptor: c_int, request: c_ulong, ...) -> c_int;
        pub(super) fn open(path: *const c_char, flags: c_int, ...) -> c_int;
        pub(super) fn fcntl(descriptor: c_int, command: c_int, ...) -> c_int;
        pub(super) fn flock(descriptor: c_int, operation: c_int) -> c_int;
        pub(super) fn fstatfs(descriptor: c_int, statfs: *mut Statfs) -> c_int;
        pub(super) fn sysconf(name: c_int) -> c_long;
        pub(super) fn sendmsg(socket: c_int, message: *const Msghdr, flags: c_int) -> isize;
        pub(super) fn recvmsg(socket: c_int, message: *mut Msghdr, flags: c_int) -> isize;
        pub(super) fn accept4(
            socket: c_int,
            address: *mut c_void,
            length: *mut u32,
            flags: c_int,
        ) -> c_int;
        pub(super) fn shutdown(socket: c_int, how: c_int) -> c_int;
        pub(super) fn write(descriptor: c_int, buffer: *const c_void, size: usize) -> isize;
        pub(super) fn dladdr(address: *const c_void, info: *mut DlInfo) -> c_int;
        pub(super) fn pthread_sigmask(
            how: c_int,
            new: *const SignalSet,
            old: *mut SignalSet,
        ) -> c_int;
        pub(super) fn getpid() -> c_int;
        pub(super) fn kill(pid: c_int, signal: c_int) -> c_int;
        pub(super) fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
        pub(super) fn _exit(status: c_int) -> !;
        pub(super) fn openat(directory: c_int, path: *const c_char, flags: c_int, ...) -> c_int;
        pub(super) fn __errno_location() -> *mut c_int;
    }
}

/// The system call itself: bypasses every interposed `mmap`, this object's too.
///
/// # Safety
///
/// As for `mmap(2)`.
pub(crate) unsafe fn mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    descriptor: c_int,
    offset: i64,
) -> *mut c_void {
    // The kernel reads whole registers, so every argument is widened.
    // SAFETY: the caller's promises.
    let result = unsafe {
        c::syscall(
            number::MMAP,
            address,
            length,
            c_long::from(protection),
            c_long::from(flags),
            c_long::from(descriptor),
            offset,
        )
    };
    std::ptr::with_exposed_provenance_mut(result as usize)
}

/// # Safety
///
/// As for `madvise(2)`.
pub(crate) unsafe fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int {
    // SAFETY: the caller's promises.
    unsafe { c::syscall(number::MADVISE, address, length, c_long::from(advice)) as c_int }
}

/// The most attempts. A page that is discarded this often between two system calls is not in use.
const WRITE_TRIES: u32 = 16;

/// Has the kernel write to the page at `address`, four bytes aligned, by an atomic operation that changes nothing of
/// it: futex(2) with FUTEX_WAKE_OP, which needs no futex to be there. An address that is not mapped is an error, where
/// a write of this process's own would end the process.
///
/// futex(2) does not wait for a missing page of a userfaultfd: it fails with EFAULT. process_vm_readv(2) waits, so a
/// byte of such a page is read first. The page may be discarded in between, so both are tried [`WRITE_TRIES`] times.
pub(crate) fn write_nothing(address: usize) -> Result<(), c_int> {
    const FUTEX_WAKE_OP: c_long = 5;
    const FUTEX_PRIVATE_FLAG: c_long = 128;
    /// OR with 0 (FUTEX_OP_OR), which changes nothing, and a comparison without effect.
    const OR_NOTHING: c_long = 2 << 28;
    let operation = FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG;
    let none: c_long = 0;
    for _ in 0..WRITE_TRIES {
        let at = address as c_long;
        // SAFETY: the kernel checks the address, and no bit changes there.
        let result =
            unsafe { c::syscall(number::FUTEX, at, operation, none, none, at, OR_NOTHING) };
        match result {
            0.. => return Ok(()),
            _ if last_errno() != EFAULT => return Err(last_errno()),
            _ => read_byte(address)?,
        }
    }
    // Readable but not writable: the mapping is read-only.
    Err(EFAULT)
}

/// Has the kernel read a byte at `address`; waits for a missing page of a userfaultfd.
fn read_byte(address: usize) -> Result<(), c_int> {
    let mut byte = 0u8;
    let into = Iovec { base: (&raw mut byte).cast_const(), length: 1 };
    let from = Iovec { base: std::ptr::with_exposed_provenance(address), length: 1 };
    let (into, from) = (&raw const into, &raw const from);
    let (one, none): (c_long, c_long) = (1, 0);
    // SAFETY: getpid passes no memory.
    let pid = c_long::from(unsafe { c::getpid() });
    // SAFETY: one byte is written, to a local variable; the kernel checks the source address.
    let result = unsafe { c::syscall(number::PROCESS_VM_READV, pid, into, one, from, one, none) };
    if result == 1 { Ok(()) } else { Err(last_errno()) }
}

pub(crate) fn fallocate(descriptor: c_int, mode: c_int, offset: i64, length: i64) -> c_int {
    let (descriptor, mode) = (c_long::from(descriptor), c_long::from(mode));
    // SAFETY: no memory is passed.
    unsafe { c::syscall(number::FALLOCATE, descriptor, mode, offset, length) as c_int }
}

/// # Safety
///
/// As for `mremap(2)`.
pub(crate) unsafe fn mremap(
    address: *mut c_void,
    length: usize,
    new_length: usize,
    flags: c_int,
    new_address: *mut c_void,
) -> *mut c_void {
    // SAFETY: the caller's promises.
    let result = unsafe {
        c::syscall(number::MREMAP, address, length, new_length, c_long::from(flags), new_address)
    };
    std::ptr::with_exposed_provenance_mut(result as usize)
}

/// # Safety
///
/// As for `mlockall(2)`.
pub(crate) unsafe fn mlockall(flags: c_int) -> c_int {
    // SAFETY: the caller's promises.
    unsafe { c::syscall(number::MLOCKALL, c_long::from(flags)) as c_int }
}

/// # Safety
///
/// As for `munmap(2)`.
pub(crate) unsafe fn munmap(address: *mut c_void, length: usize) {
    // SAFETY: the caller's promises. The call fails only for a range without a mapping.
    unsafe { c::munmap(address, length) };
}

/// The result of a failing `mmap`, with errno set.
pub(crate) fn map_failed(errno: c_int) -> *mut c_void {
    set_errno(errno);
    MAP_FAILED
}

pub(crate) fn set_errno(errno: c_int) {
    // SAFETY: the C library gives each thread a valid place for its errno.
    unsafe { *c::__errno_location() = errno };
}

/// # Safety
///
/// `argument` must point to what `request` takes.
pub(crate) unsafe fn ioctl<T>(
    descriptor: c_int,
    request: u64,
    argument: *mut T,
) -> Result<(), c_int> {
    // SAFETY: the caller's promise.
    check(i64::from(unsafe { c::ioctl(descriptor, request, argument) })).map(|_| ())
}

/// An ioctl whose argument is a number and whose result is a descriptor.
pub(crate) fn ioctl_value(
    descriptor: c_int,
    request: u64,
    argument: c_int,
) -> Result<c_int, c_int> {
    // SAFETY: no memory is passed.
    let result = unsafe { c::ioctl(descriptor, request, c_long::from(argument)) };
    check(i64::from(result)).map(|_| result)
}

pub(crate) fn open_device(path: &CStr) -> Result<OwnedFd, c_int> {
    // SAFETY: the path is a C string.
    let descriptor = unsafe { c::open(path.as_ptr(), O_RDWR | O_CLOEXEC) };
    check(i64::from(descriptor))?;
    // SAFETY: just opened, without another owner.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

pub(crate) fn userfaultfd(flags: c_int) -> Result<c_int, c_int> {
    // SAFETY: no memory is passed.
    let descriptor = unsafe { c::syscall(number::USERFAULTFD, c_long::from(flags)) };
    check(descriptor).map(|_| descriptor as c_int)
}

pub(crate) fn set_close_on_exec(descriptor: c_int) {
    // SAFETY: no memory is passed. A descriptor that is not open stays so.
    unsafe { c::fcntl(descriptor, F_SETFD, FD_CLOEXEC) };
}

/// The page size of the hugetlbfs that the file is on; None elsewhere.
pub(crate) fn hugetlbfs_page_size(descriptor: c_int) -> Option<usize> {
    let mut statfs = Statfs { kind: 0, block_size: 0, rest: [0; 16] };
    // SAFETY: the structure is at least as long as the C library's.
    let result = unsafe { c::fstatfs(descriptor, &raw mut statfs) };
    let is_hugetlbfs = result == 0 && statfs.kind as u32 == HUGETLBFS_MAGIC;
    is_hugetlbfs.then_some(statfs.block_size as usize)
}

/// Whether a file is shared memory: on tmpfs or hugetlbfs.
pub(crate) fn is_memory(descriptor: c_int) -> bool {
    let mut statfs = Statfs { kind: 0, block_size: 0, rest: [0; 16] };
    // SAFETY: the structure is at least as long as the C library's.
    let result = unsafe { c::fstatfs(descriptor, &raw mut statfs) };
    result == 0 && [HUGETLBFS_MAGIC, TMPFS_MAGIC].contains(&(statfs.kind as u32))
}

/// The system call `open`: bypasses the interposed functions.
///
/// # Safety
///
/// As for `open(2)`.
pub(crate) unsafe fn open(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: the caller's promises.
    unsafe { c::openat(AT_FDCWD, path, flags, mode) }
}

/// The next function of this name after this object's, for the program.
pub(crate) fn next_symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is a string; -1 means the objects after this one.
    let symbol = unsafe { c::dlsym(RTLD_NEXT, name.as_ptr()) };
    (!symbol.is_null()).then_some(symbol)
}

pub(crate) fn exit(status: c_int) -> ! {
    // SAFETY: ends the process at once.
    unsafe { c::_exit(status) }
}

/// The first byte of data of a file at `offset` or after it; None without data.
pub(crate) fn next_data(descriptor: c_int, offset: u64) -> Option<u64> {
    seek(descriptor, offset, SEEK_DATA)
}

/// The first hole of a file at `offset` or after it; the end of the file counts as a hole.
pub(crate) fn next_hole(descriptor: c_int, offset: u64) -> Option<u64> {
    seek(descriptor, offset, SEEK_HOLE)
}

/// Restores the descriptor's position, which belongs to the monitor.
fn seek(descriptor: c_int, offset: u64, whence: c_int) -> Option<u64> {
    let offset = i64::try_from(offset).ok()?;
    // SAFETY: no memory is passed.
    unsafe {
        let position = c::lseek(descriptor, 0, SEEK_CUR);
        let found = c::lseek(descriptor, offset, whence);
        c::lseek(descriptor, position, SEEK_SET);
        u64::try_from(found).ok()
    }
}

pub(crate) fn page_size() -> usize {
    // SAFETY: no memory is passed.
    let size = unsafe { c::sysconf(SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

/// One `sendmsg`, without SIGPIPE. Returns the bytes sent.
pub(crate) fn send_message(
    socket: c_int,
    bytes: &[u8],
    descriptors: &[c_int],
) -> Result<usize, c_int> {
    let iov = Iovec { base: bytes.as_ptr(), length: bytes.len() };
    let mut rights = Rights {
        length: RIGHTS_HEADER_SIZE + size_of_val(descriptors),
        level: SOL_SOCKET,
        kind: SCM_RIGHTS,
        descriptors: [-1; DESCRIPTORS_MAX],
    };
    for (slot, descriptor) in rights.descriptors.iter_mut().zip(descriptors) {
        *slot = *descriptor;
    }
    let has_rights = !descriptors.is_empty();
    let message = Msghdr {
        name: std::ptr::null(),
        name_length: 0,
        iov: &raw const iov,
        iov_count: 1,
        control: if has_rights { (&raw const rights).cast() } else { std::ptr::null() },
        control_length: if has_rights { rights.length } else { 0 },
        flags: 0,
    };
    // SAFETY: the message points to the bytes and to the rights, which live to the end of this
    // function, with their own lengths.
    check(unsafe { c::sendmsg(socket, &raw const message, MSG_NOSIGNAL) } as i64)
}

/// Returns 0 at the end of the stream. Appends descriptors that arrive with the bytes.
pub(crate) fn receive(
    socket: c_int,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> Result<usize, c_int> {
    let iov = Iovec { base: buffer.as_mut_ptr(), length: buffer.len() };
    let mut rights = Rights { length: 0, level: 0, kind: 0, descriptors: [-1; DESCRIPTORS_MAX] };
    let mut message = Msghdr {
        name: std::ptr::null(),
        name_length: 0,
        iov: &raw const iov,
        iov_count: 1,
        control: (&raw mut rights).cast_const().cast(),
        control_length: size_of::<Rights>(),
        flags: 0,
    };
    // SAFETY: the message points to the buffer and to the rights, both writable for the call, with
    // their own lengths.
    let count = check(unsafe { c::recvmsg(socket, &raw mut message, MSG_CMSG_CLOEXEC) } as i64)?;
    let has_rights = message.control_length >= RIGHTS_HEADER_SIZE
        && (rights.level, rights.kind) == (SOL_SOCKET, SCM_RIGHTS);
    if has_rights {
        let bytes = rights.length.saturating_sub(RIGHTS_HEADER_SIZE);
        for &descriptor in rights.descriptors.iter().take(bytes / size_of::<c_int>()) {
            // SAFETY: the kernel has just made this descriptor, which has no other owner.
            descriptors.push(unsafe { OwnedFd::from_raw_fd(descriptor) });
        }
    }
    Ok(count)
}

/// Waits for a connection.
pub(crate) fn accept(listener: c_int) -> Result<OwnedFd, c_int> {
    // SAFETY: no address is requested.
    let socket =
        unsafe { c::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), SOCK_CLOEXEC) };
    check(i64::from(socket))?;
    // SAFETY: the kernel has just made this descriptor, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// Ends the wait for connections on this socket.
pub(crate) fn shut_down(socket: c_int) {
    // SAFETY: no memory is passed. A second shutdown has no effect.
    unsafe { c::shutdown(socket, SHUT_RDWR) };
}

/// Another descriptor of the same file, closed on exec.
pub(crate) fn duplicate(descriptor: c_int) -> Result<OwnedFd, c_int> {
    // SAFETY: no memory is passed.
    let number = unsafe { c::fcntl(descriptor, F_DUPFD_CLOEXEC, 0) };
    check(i64::from(number))?;
    // SAFETY: the kernel has just made this descriptor, which has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// `struct flock` of 64-bit Linux.
#[repr(C)]
struct Lock {
    kind: i16,
    whence: i16,
    start: i64,
    length: i64,
    pid: c_int,
}

/// Locks a RAM file for this process's guest, and for the umem that moves the guest, with this open file description,
/// as umem's `memory::claim` does. Fails with EAGAIN if another description has the lock.
pub(crate) fn lock_ram(descriptor: c_int) -> Result<(), c_int> {
    let lock = Lock { kind: F_WRLCK, whence: 0, start: 0, length: 0, pid: 0 };
    // SAFETY: the lock is read, and outlives the call.
    check(i64::from(unsafe { c::fcntl(descriptor, F_OFD_SETLK, &raw const lock) }))?;
    // SAFETY: no memory is passed.
    check(i64::from(unsafe { c::flock(descriptor, LOCK_EX | LOCK_NB) })).map(drop)
}

/// Ends the move, once the whole guest has arrived: the guest may be moved on.
pub(crate) fn unlock_move(descriptor: c_int) {
    // SAFETY: no memory is passed.
    unsafe { c::flock(descriptor, LOCK_UN) };
}

/// Ends the process at once: other threads may wait in page faults without an answer.
pub(crate) fn kill_this_process() {
    // SAFETY: no memory is passed.
    unsafe { c::kill(c::getpid(), SIGKILL) };
}

pub(crate) fn write_stderr(bytes: &[u8]) {
    // SAFETY: the bytes are readable for the call. A failure cannot be reported.
    unsafe { c::write(2, bytes.as_ptr().cast(), bytes.len()) };
}

/// The path under which the object that holds `function` was loaded.
pub(crate) fn object_path(function: *const ()) -> Option<&'static CStr> {
    let mut info = DlInfo {
        object_path: std::ptr::null(),
        object_base: std::ptr::null_mut(),
        symbol_name: std::ptr::null(),
        symbol_address: std::ptr::null_mut(),
    };
    // SAFETY: the structure is the C library's; the call only looks the address up.
    let found = unsafe { c::dladdr(function.cast(), &raw mut info) };
    if found == 0 || info.object_path.is_null() {
        return None;
    }
    // SAFETY: a string of the dynamic linker, which keeps it as long as the object is loaded; this
    // code is part of that object.
    Some(unsafe { CStr::from_ptr(info.object_path) })
}

/// Runs `action` with all signals blocked; a thread that it starts inherits that.
pub(crate) fn with_signals_blocked<T>(action: impl FnOnce() -> T) -> T {
    let all: SignalSet = [u64::MAX; 16];
    let mut before: SignalSet = [0; 16];
    // SAFETY: both sets are as long as the C library's.
    let blocked = unsafe { c::pthread_sigmask(SIG_SETMASK, &raw const all, &raw mut before) } == 0;
    let result = action();
    if blocked {
        // SAFETY: as above.
        unsafe { c::pthread_sigmask(SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    }
    result
}

/// A result of a system call: not negative, or errno.
fn check(result: i64) -> Result<usize, c_int> {
    usize::try_from(result).map_err(|_| last_errno())
}

pub(crate) fn last_errno() -> c_int {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(EINVAL)
}

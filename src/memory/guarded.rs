//! Reads of mapped guest memory that may be gone: a file that has become shorter, a disk that
//! cannot be read, memory with an error. The kernel raises SIGBUS for such a read; this module
//! returns an error, [`Gone`].
//!
//! Every read of a mapping by this process's own instructions goes through [`copy`], [`is_zero`] or
//! [`touch`]. On x86-64 they are a few instructions between two known addresses. The handler of
//! SIGBUS compares the address of the failed instruction with those, and makes the thread return
//! from the function with an error. No replacement is mapped, so no other thread can read zeroes in
//! place of lost data. Every other SIGBUS goes to the previous handler. On other processors the
//! kernel copies, and returns an error.
//!
//! The handler is installed with the first mapping that is read, in any program. A program that
//! embeds umem and installs a handler later keeps its own, and behaves as without this one.

use std::ptr::NonNull;

/// The memory is not accessible any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gone;

/// Fills `to` from `from` on. Bytes that are written at the same time are copied in any state.
///
/// # Safety
/// `from` and as many bytes as `to` has lie inside one mapping of this process, which stays mapped;
/// the mapped file or memory may be gone.
pub(crate) unsafe fn copy(from: *const u8, to: &mut [u8]) -> Result<(), Gone> {
    // SAFETY: the caller's contract; `to` belongs to this function.
    let failed = unsafe { raw::copy(to.as_mut_ptr(), from, to.len()) };
    if failed == 0 { Ok(()) } else { Err(Gone) }
}

/// True if the `len` bytes from `start` are all zero.
///
/// Most pages that hold data differ from zero within their first cache line, so the scan ends at
/// the first chunk that does.
///
/// # Safety
/// As for [`copy`]; `start` is 16-byte aligned and `len` is a positive multiple of 64. The memory
/// may change at any time: a racing write gives either result.
pub(crate) unsafe fn is_zero(start: NonNull<u8>, len: usize) -> Result<bool, Gone> {
    debug_assert!(start.as_ptr().addr().is_multiple_of(16) && len.is_multiple_of(64) && len > 0);
    // SAFETY: the caller's contract.
    match unsafe { raw::is_zero(start.as_ptr(), len) } {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Gone),
    }
}

/// Reads one byte, so that its page is mapped.
///
/// # Safety
/// As for [`copy`].
pub(crate) unsafe fn touch(at: *const u8) -> Result<(), Gone> {
    // SAFETY: the caller's contract.
    unsafe { copy(at, &mut [0]) }
}

pub(crate) use raw::install;

#[cfg(target_arch = "x86_64")]
mod raw {
    use std::ffi::{c_int, c_void};
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicPtr, Ordering};

    // Neither function uses the stack, so a thread can jump from any of their instructions to the
    // third one, which returns to their caller.
    std::arch::global_asm!(
        ".pushsection .text.umem_guarded, \"ax\", @progbits",
        ".p2align 5",
        ".hidden umem_guarded_copy",
        ".globl umem_guarded_copy",
        "umem_guarded_copy:",
        "mov rcx, rdx",
        "cld",
        "rep movsb",
        "xor eax, eax",
        "ret",
        ".p2align 5",
        ".hidden umem_guarded_is_zero",
        ".globl umem_guarded_is_zero",
        "umem_guarded_is_zero:",
        "pxor xmm2, xmm2",
        "2:",
        "movdqa xmm0, [rdi]",
        "por xmm0, [rdi + 16]",
        "movdqa xmm1, [rdi + 32]",
        "por xmm1, [rdi + 48]",
        "por xmm0, xmm1",
        "pcmpeqb xmm0, xmm2",
        "pmovmskb eax, xmm0",
        "cmp eax, 0xffff",
        "jne 3f",
        "add rdi, 64",
        "sub rsi, 64",
        "jnz 2b",
        "mov eax, 1",
        "ret",
        "3:",
        "xor eax, eax",
        "ret",
        ".hidden umem_guarded_failed",
        ".globl umem_guarded_failed",
        "umem_guarded_failed:",
        "mov eax, 2",
        "ret",
        ".popsection",
    );

    unsafe extern "C" {
        #[link_name = "umem_guarded_copy"]
        pub(super) fn copy(to: *mut u8, from: *const u8, len: usize) -> u32;
        #[link_name = "umem_guarded_is_zero"]
        pub(super) fn is_zero(start: *const u8, len: usize) -> u32;
        #[link_name = "umem_guarded_failed"]
        fn failed() -> u32;
    }

    /// The previous handler of the signal, once it is known. Never freed.
    static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

    /// Takes SIGBUS over, once in the life of a process.
    pub(crate) fn install() {
        static INSTALLED: OnceLock<()> = OnceLock::new();
        INSTALLED.get_or_init(|| {
            // SAFETY: all zeroes is a sigaction without a handler.
            let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
            ours.sa_sigaction = handler as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            // SAFETY: as above.
            let before = Box::leak(Box::new(unsafe { std::mem::zeroed::<libc::sigaction>() }));
            // SAFETY: both are valid. If this fails, a read of lost memory ends the process, as
            // without it.
            let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, before) };
            if result == 0 {
                BEFORE.store(before, Ordering::Release);
            }
        });
    }

    /// Async-signal-safe: only compares, and calls only sigaction and raise.
    extern "C" fn handler(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
        let (first, last) = (copy as *const () as usize, failed as *const () as usize);
        // SAFETY: the kernel gives a handler with SA_SIGINFO the context of the thread, which it resumes from it.
        let context_of = unsafe { &mut *context.cast::<libc::ucontext_t>() };
        let at = &mut context_of.uc_mcontext.gregs[libc::REG_RIP as usize];
        if (first..last).contains(&(*at as usize)) {
            *at = last as i64;
            return;
        }
        let before = BEFORE.load(Ordering::Acquire);
        // SAFETY: null, or what `install` has leaked.
        let before = unsafe { before.as_ref() };
        let is_default = |before: &libc::sigaction| {
            [libc::SIG_DFL, libc::SIG_IGN].contains(&before.sa_sigaction)
        };
        match before.filter(|before| !is_default(before)) {
            Some(before) if before.sa_flags & libc::SA_SIGINFO != 0 => {
                type Handler = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
                // SAFETY: a handler installed with SA_SIGINFO has this type.
                let handler: Handler = unsafe { std::mem::transmute(before.sa_sigaction) };
                handler(signal, info, context);
            }
            Some(before) => {
                // SAFETY: a handler installed without SA_SIGINFO has this type.
                let handler: extern "C" fn(c_int) =
                    unsafe { std::mem::transmute(before.sa_sigaction) };
                handler(signal);
            }
            None => {
                // SAFETY: both are async-signal-safe; the signal comes when this returns, and ends the process.
                unsafe {
                    libc::signal(signal, libc::SIG_DFL);
                    libc::raise(signal);
                }
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod raw {
    pub(super) use super::portable::{copy, is_zero};

    /// Nothing to install.
    pub(crate) fn install() {}
}

/// The kernel copies the memory.
#[cfg(any(test, not(target_arch = "x86_64")))]
mod portable {
    /// Bytes that are checked at once.
    const CHUNK_BYTES: usize = 4096;

    pub(super) unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> u32 {
        let mut done = 0;
        while done < len {
            let local = libc::iovec { iov_base: to.wrapping_add(done).cast(), iov_len: len - done };
            let remote = libc::iovec {
                iov_base: from.wrapping_add(done).cast_mut().cast(),
                iov_len: len - done,
            };
            // SAFETY: the call writes the caller's buffer and reads this process's memory, and
            // checks both.
            let count = unsafe {
                let process = libc::getpid();
                libc::process_vm_readv(process, &raw const local, 1, &raw const remote, 1, 0)
            };
            match usize::try_from(count) {
                Ok(count @ 1..) => done += count,
                _ => return 2,
            }
        }
        0
    }

    pub(super) unsafe fn is_zero(start: *const u8, len: usize) -> u32 {
        let mut chunk = [0; CHUNK_BYTES];
        for offset in (0..len).step_by(CHUNK_BYTES) {
            let part = &mut chunk[..CHUNK_BYTES.min(len - offset)];
            // SAFETY: the caller's contract.
            if unsafe { copy(part.as_mut_ptr(), start.wrapping_add(offset), part.len()) } != 0 {
                return 2;
            }
            if !crate::memory::zero::slice_is_zero(part) {
                return 0;
            }
        }
        1
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::num::NonZeroUsize;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;

    #[repr(align(64))]
    struct Page([u8; 4096]);

    /// Two pages of a file that has one: a read of the second raises SIGBUS.
    struct Half(NonNull<u8>);

    impl Half {
        fn new() -> Half {
            install();
            let file = File::from(memfd_create(c"half", MFdFlags::MFD_CLOEXEC).unwrap());
            file.set_len(4096).unwrap();
            let length = NonZeroUsize::new(8192).unwrap();
            // SAFETY: a new mapping at an address of the kernel's choice.
            let start =
                unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0) };
            Half(start.unwrap().cast())
        }

        fn at(&self, offset: usize) -> *const u8 {
            self.0.as_ptr().wrapping_add(offset)
        }
    }

    impl Drop for Half {
        fn drop(&mut self) {
            // SAFETY: this test's own mapping, whole.
            unsafe { munmap(self.0.cast(), 8192) }.unwrap();
        }
    }

    #[test]
    fn one_set_bit_anywhere_is_detected() {
        let mut page = Box::new(Page([0; 4096]));
        let start = NonNull::from(&mut *page).cast::<u8>();
        // SAFETY: the box is 4096 aligned bytes and outlives each call.
        assert_eq!(unsafe { is_zero(start, 4096) }, Ok(true));
        for at in 0..4096 {
            page.0[at] = 1 << (at % 8);
            // SAFETY: as above.
            assert_eq!(unsafe { is_zero(start, 4096) }, Ok(false), "byte {at}");
            page.0[at] = 0;
        }
    }

    #[test]
    fn vanished_memory_is_an_error_and_no_signal() {
        let half = Half::new();
        let mut bytes = vec![0xa5; 8192];
        for _ in 0..3 {
            // SAFETY: inside the mapping.
            unsafe {
                assert_eq!(copy(half.at(0), &mut bytes[..4096]), Ok(()));
                assert_eq!(bytes[..4096], [0; 4096]);
                assert_eq!(copy(half.at(4000), &mut bytes[..200]), Err(Gone));
                assert_eq!(touch(half.at(4095)), Ok(()));
                assert_eq!(touch(half.at(4096)), Err(Gone));
                assert_eq!(is_zero(half.0, 4096), Ok(true));
                assert_eq!(is_zero(half.0, 8192), Err(Gone));
            }
        }
    }

    /// In every thread, whatever the thread did before.
    #[test]
    fn lost_memory_fails_in_every_thread_that_reads_it() {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let half = Half::new();
                    for _ in 0..200 {
                        // SAFETY: inside the mapping.
                        assert_eq!(unsafe { touch(half.at(5000)) }, Err(Gone));
                    }
                });
            }
        });
    }

    #[test]
    fn portable_copy_gives_the_same_results() {
        let half = Half::new();
        let mut bytes = [0xa5; 4096];
        // SAFETY: inside the mapping.
        unsafe {
            assert_eq!(portable::copy(bytes.as_mut_ptr(), half.at(0), 4096), 0);
            assert_eq!(bytes, [0; 4096]);
            assert_eq!(portable::copy(bytes.as_mut_ptr(), half.at(2048), 4096), 2);
            assert_eq!(portable::is_zero(half.at(0), 4096), 1);
            assert_eq!(portable::is_zero(half.at(0), 8192), 2);
            assert_eq!(portable::is_zero(bytes.as_ptr(), 4096), 1);
            bytes[4000] = 1;
            assert_eq!(portable::is_zero(bytes.as_ptr(), 4096), 0);
        }
    }
}

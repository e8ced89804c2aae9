//! The ring's errors, with the remedy in their text and the errno kept as the source.
//!
//! The functions that turn an errno into one of these are pure and tested on literal numbers, as a
//! test can hardly provide a kernel that lacks something.

use std::fmt;
use std::io;

/// An error of the ring. The failure of an operation in flight is an [`Outcome`](crate::Outcome).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This process may not use io_uring, or no process may.
    #[error("io_uring is not available: {remedy}")]
    Unavailable {
        /// The remedy.
        remedy: &'static str,
        /// `ENOSYS` or `EPERM`.
        source: io::Error,
    },
    /// The ring could not be set up.
    #[error("cannot set up the ring {what}")]
    Setup {
        /// [`Config::name`](crate::Config::name), the refused feature, and where it matters the
        /// kernel version that introduced it.
        what: Box<str>,
        /// The kernel's errno.
        source: io::Error,
    },
    /// The kernel lacks something that operations here need.
    #[error("this kernel's io_uring lacks {what}, which Linux has since {since}")]
    Missing {
        /// An opcode or a flag.
        what: &'static str,
        /// The kernel version that introduced it.
        since: &'static str,
    },
    /// A request that no kernel could carry out; a bug of the caller.
    #[error("invalid: {what}")]
    Invalid {
        /// The fault in the request.
        what: &'static str,
    },
    /// The thread could not be bound to its core.
    #[error("cannot run on core {core}: it does not exist or this process may not use it")]
    Core {
        /// The requested core.
        core: usize,
        /// The kernel's errno.
        source: io::Error,
    },
    /// The limit of operations in flight is reached: read completions, then try again.
    #[error("{ops_max} operations are in flight already")]
    Full {
        /// [`Config::ops_max`](crate::Config::ops_max).
        ops_max: u32,
    },
    /// Registered memory counts as locked memory, and would exceed its limit.
    #[error(
        "registering {needed_bytes} bytes takes more locked memory than the limit of {limit_bytes}: \
         raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK= in systemd) or grant CAP_IPC_LOCK"
    )]
    MemlockTooSmall {
        /// Bytes to be registered.
        needed_bytes: u64,
        /// `RLIMIT_MEMLOCK` in bytes; the user's other rings count against it too.
        limit_bytes: u64,
        /// `ENOMEM`.
        source: io::Error,
    },
    /// Files or buffers could not be registered.
    #[error("cannot register {what}")]
    Register {
        /// The files or buffers.
        what: &'static str,
        /// The kernel's errno.
        source: io::Error,
    },
    /// Files or buffers could not be unregistered. Closing the ring unregisters them later.
    #[error("cannot unregister {what}")]
    Unregister {
        /// The files or buffers.
        what: &'static str,
        /// The kernel's errno.
        source: io::Error,
    },
    /// A descriptor the ring needs for itself could not be made.
    #[error("cannot make {what}")]
    Descriptor {
        /// The descriptor.
        what: &'static str,
        /// The kernel's errno.
        source: io::Error,
    },
    /// The ring that the message was for is closed.
    #[error("the ring is closed")]
    Closed,
    /// The kernel refused to accept operations or to wait for them.
    #[error("cannot enter the ring")]
    Submit(#[source] io::Error),
    /// Some operations did not end in time. Their memory is leaked on purpose.
    #[error("the ring {ring:?} was closed with {count} operations in flight ({operations})")]
    LeftOver {
        /// [`Config::name`](crate::Config::name).
        ring: Box<str>,
        /// Operations in flight.
        count: u32,
        /// The operations, as in `recv 2, madvise 1`.
        operations: Box<str>,
    },
}

impl Error {
    /// The kernel's errno, if there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Error::Unavailable { source, .. }
            | Error::Setup { source, .. }
            | Error::Core { source, .. }
            | Error::MemlockTooSmall { source, .. }
            | Error::Register { source, .. }
            | Error::Unregister { source, .. }
            | Error::Descriptor { source, .. }
            | Error::Submit(source) => source.raw_os_error(),
            Error::Missing { .. }
            | Error::Invalid { .. }
            | Error::Full { .. }
            | Error::Closed
            | Error::LeftOver { .. } => None,
        }
    }
}

/// The kernel's reason for an operation's failure.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// The operation was cancelled.
    pub const CANCELED: Errno = Errno(libc::ECANCELED);

    /// From a positive errno.
    pub const fn new(raw: i32) -> Errno {
        Errno(raw)
    }

    /// The errno, positive, as in `libc::EPIPE`.
    pub const fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from(*self).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({})", io::Error::from(*self))
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(errno.0)
    }
}

/// The meaning of an errno of `io_uring_setup(2)`. `disabled` is the sysctl
/// kernel.io_uring_disabled (since 6.6), if it is readable.
pub(crate) fn setup_error(ring: &str, source: io::Error, disabled: Option<u8>) -> Error {
    let remedy = match (source.raw_os_error(), disabled) {
        (Some(libc::ENOSYS), _) => {
            "the kernel was built without CONFIG_IO_URING, or a seccomp filter hides it; allow \
             io_uring_setup, io_uring_enter and io_uring_register there"
        }
        (Some(libc::EPERM), Some(1)) => {
            "kernel.io_uring_disabled is 1; put the user into the group of kernel.io_uring_group, \
             grant CAP_SYS_ADMIN, or set the sysctl to 0"
        }
        (Some(libc::EPERM), Some(2)) => {
            "kernel.io_uring_disabled is 2; run sysctl -w kernel.io_uring_disabled=0"
        }
        (Some(libc::EPERM), _) => {
            "a seccomp filter or security module forbids it; allow io_uring_setup, io_uring_enter \
             and io_uring_register in the container's profile"
        }
        _ => return setup_refusal(ring, source),
    };
    Error::Unavailable { remedy, source }
}

/// The meaning of an errno when `needed_bytes` of buffers are registered under this
/// `RLIMIT_MEMLOCK`.
pub(crate) fn buffers_error(source: io::Error, needed_bytes: u64, limit_bytes: u64) -> Error {
    match source.raw_os_error() {
        // Locked pages are summed over all rings of a user, so the limit may be reached below its
        // value.
        Some(libc::ENOMEM) if limit_bytes != libc::RLIM_INFINITY => {
            Error::MemlockTooSmall { needed_bytes, limit_bytes, source }
        }
        Some(libc::EOPNOTSUPP) => Error::Register {
            what: "buffers in a mapping of a file: only anonymous memory, shared memory and hugetlbfs \
                   can be pinned",
            source,
        },
        Some(libc::EBUSY) => Error::Register { what: "buffers twice", source },
        _ => Error::Register { what: "buffers", source },
    }
}

fn setup_refusal(ring: &str, source: io::Error) -> Error {
    let what = match source.raw_os_error() {
        Some(libc::EINVAL) => "SINGLE_ISSUER with DEFER_TASKRUN is refused; Linux has it since 6.1",
        Some(libc::ENOMEM) => {
            "there is not enough memory for its queues, or not enough that may be locked; raise \
             RLIMIT_MEMLOCK (ulimit -l)"
        }
        Some(libc::EMFILE) => {
            "this process has no descriptor left; raise RLIMIT_NOFILE (ulimit -n)"
        }
        Some(libc::ENFILE) => "the system has no descriptor left; raise the sysctl fs.file-max",
        _ => "the kernel refuses",
    };
    Error::Setup { what: format!("{ring:?}: {what}").into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn os(raw: i32) -> io::Error {
        io::Error::from_raw_os_error(raw)
    }

    #[test]
    fn error_of_a_disabled_io_uring_names_the_sysctl() {
        for (raw, disabled, expected) in [
            (libc::ENOSYS, None, "CONFIG_IO_URING"),
            (libc::EPERM, Some(1), "kernel.io_uring_group"),
            (libc::EPERM, Some(2), "sysctl -w kernel.io_uring_disabled=0"),
            (libc::EPERM, Some(0), "seccomp"),
            (libc::EPERM, None, "seccomp"),
        ] {
            let error = setup_error("lane", os(raw), disabled);
            assert!(error.to_string().contains(expected), "{raw} {disabled:?}: {error}");
            assert_eq!(error.raw_os_error(), Some(raw));
        }
    }

    #[test]
    fn error_on_an_old_kernel_names_the_missing_feature() {
        let error = setup_error("lane", os(libc::EINVAL), Some(0));
        assert_eq!(
            error.to_string(),
            "cannot set up the ring \"lane\": SINGLE_ISSUER with DEFER_TASKRUN is refused; Linux has it \
             since 6.1"
        );
    }

    #[test]
    fn error_at_the_memlock_limit_names_the_remedy() {
        let error = buffers_error(os(libc::ENOMEM), 16 << 20, 8 << 20);
        let text = error.to_string();
        for expected in ["16777216", "8388608", "RLIMIT_MEMLOCK", "CAP_IPC_LOCK"] {
            assert!(text.contains(expected), "{text}");
        }
        let unlimited = buffers_error(os(libc::ENOMEM), 16 << 20, libc::RLIM_INFINITY);
        assert!(matches!(unlimited, Error::Register { .. }), "{unlimited}");
    }

    #[test]
    fn cause_is_printed_only_once() {
        let error = Error::Submit(os(libc::EBADF));
        assert!(!error.to_string().contains("descriptor"), "{error}");
        assert!(std::error::Error::source(&error).is_some());
    }
}

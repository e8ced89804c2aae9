//! What can go wrong, in words that say what to do, with the errno kept as the source.
//!
//! The functions that turn an errno into one of these are pure, and tested on literal numbers: a
//! kernel that lacks something is hard to come by in a test.

use std::fmt;
use std::io;

/// An error of the ring. What an operation in flight met is an [`Outcome`](crate::Outcome) instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody, or not this process, may use io_uring here.
    #[error("io_uring is not available: {remedy}")]
    Unavailable {
        /// What to do about it.
        remedy: &'static str,
        /// `ENOSYS` or `EPERM`.
        source: io::Error,
    },
    /// The ring could not be set up.
    #[error("cannot set up the ring {what}")]
    Setup {
        /// [`Config::name`](crate::Config::name), what was refused, and where it matters the kernel
        /// version it came with.
        what: Box<str>,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel lacks something that operations here need.
    #[error("this kernel's io_uring lacks {what}, which Linux has since {since}")]
    Missing {
        /// An opcode or a flag.
        what: &'static str,
        /// The kernel version it came with.
        since: &'static str,
    },
    /// A request that no kernel could meet; a bug of the caller.
    #[error("invalid: {what}")]
    Invalid {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The thread could not be bound to its core.
    #[error("cannot run on core {core}: it does not exist or this process may not use it")]
    Core {
        /// The core asked for.
        core: usize,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The limit of operations in flight is reached: read completions, then try again.
    #[error("{ops_max} operations are in flight already")]
    Full {
        /// [`Config::ops_max`](crate::Config::ops_max).
        ops_max: u32,
    },
    /// Registered memory is locked memory, and there may not be that much.
    #[error(
        "registering {needed_bytes} bytes takes more locked memory than the limit of {limit_bytes}: \
         raise RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK= in systemd) or grant CAP_IPC_LOCK"
    )]
    MemlockTooSmall {
        /// Bytes to be registered.
        needed_bytes: u64,
        /// `RLIMIT_MEMLOCK` in bytes; what the user's other rings hold counts against it too.
        limit_bytes: u64,
        /// `ENOMEM`.
        source: io::Error,
    },
    /// Files or buffers could not be registered.
    #[error("cannot register {what}")]
    Register {
        /// What was to be registered.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Files or buffers could not be let go of. Closing the ring does it, some time later.
    #[error("cannot unregister {what}")]
    Unregister {
        /// What was registered.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A descriptor the ring needs for itself could not be made.
    #[error("cannot make {what}")]
    Descriptor {
        /// What it is for.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The ring that the message was for is closed.
    #[error("the ring is closed")]
    Closed,
    /// The kernel would not take operations or wait for them.
    #[error("cannot enter the ring")]
    Submit(#[source] io::Error),
    /// The kernel did not let go of some operations in time. Their memory is leaked on purpose.
    #[error("the ring {ring:?} was closed with {count} operations in flight ({operations})")]
    LeftOver {
        /// [`Config::name`](crate::Config::name).
        ring: Box<str>,
        /// How many there are.
        count: u32,
        /// Which, as in `recv 2, madvise 1`.
        operations: Box<str>,
    },
}

impl Error {
    /// The kernel's errno, where there is one.
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

/// What `io_uring_setup(2)` means by its errno. `disabled` is the sysctl kernel.io_uring_disabled
/// (since 6.6), where it can be read.
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

/// What registering `needed_bytes` of buffers means by its errno, under this `RLIMIT_MEMLOCK`.
pub(crate) fn buffers_error(source: io::Error, needed_bytes: u64, limit_bytes: u64) -> Error {
    match source.raw_os_error() {
        // Locked pages are summed over all of a user's rings, so it may be exhausted below the limit.
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
    fn a_disabled_io_uring_names_the_switch() {
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
    fn an_old_kernel_is_told_what_it_lacks() {
        let error = setup_error("lane", os(libc::EINVAL), Some(0));
        assert_eq!(
            error.to_string(),
            "cannot set up the ring \"lane\": SINGLE_ISSUER with DEFER_TASKRUN is refused; Linux has it \
             since 6.1"
        );
    }

    #[test]
    fn a_memlock_limit_is_named_with_its_remedy() {
        let error = buffers_error(os(libc::ENOMEM), 16 << 20, 8 << 20);
        let text = error.to_string();
        for expected in ["16777216", "8388608", "RLIMIT_MEMLOCK", "CAP_IPC_LOCK"] {
            assert!(text.contains(expected), "{text}");
        }
        let unlimited = buffers_error(os(libc::ENOMEM), 16 << 20, libc::RLIM_INFINITY);
        assert!(matches!(unlimited, Error::Register { .. }), "{unlimited}");
    }

    #[test]
    fn a_cause_is_not_printed_twice() {
        let error = Error::Submit(os(libc::EBADF));
        assert!(!error.to_string().contains("descriptor"), "{error}");
        assert!(std::error::Error::source(&error).is_some());
    }
}

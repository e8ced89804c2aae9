//! Makes a ring from a [`Config`] and checks that it supports all that this crate needs.

use std::fs;
use std::io;

use io_uring::{IoUring, Probe, cqueue, opcode, types};

use crate::encode::{OPCODES, SEND_ZC_REPORT_USAGE, message};
use crate::error::{Error, setup_error};
use crate::key::UserData;

/// The configuration of a ring.
#[derive(Clone, Debug)]
pub struct Config {
    /// The ring's name in errors.
    pub name: String,
    /// Most operations in flight, 1 to [`OPS_MAX`].
    pub ops_max: u32,
    /// Entries of the submission queue, at least 1; the kernel rounds up to a power of two, and
    /// down to 32768. A chain has at most as many members.
    pub entries: u32,
    /// The core that the calling thread is bound to from then on; none keeps the thread's affinity.
    pub core: Option<usize>,
}

impl Default for Config {
    fn default() -> Config {
        Config { name: "ring".to_owned(), ops_max: 256, entries: 128, core: None }
    }
}

/// The largest [`Config::ops_max`]: the capacity of the kernel's largest completion queue (65536
/// entries), at two completions an operation, less the slack.
pub const OPS_MAX: u32 = (65536 - CQ_SLACK) / CQES_PER_OP;

/// Binds the thread, makes the ring, and checks the kernel's features.
pub(crate) fn setup(config: &Config) -> Result<IoUring, Error> {
    if config.ops_max == 0 || config.ops_max > OPS_MAX {
        return Err(Error::Invalid { what: "ops_max is 1 to 32704" });
    }
    if config.entries == 0 {
        return Err(Error::Invalid { what: "entries is at least 1" });
    }
    if let Some(core) = config.core {
        bind(core)?;
    }
    let mut ring = build(config)?;
    check_features(&ring)?;
    check_opcodes(&ring)?;
    check_flags(&mut ring)?;
    Ok(ring)
}

/// A result and a notification.
const CQES_PER_OP: u32 = 2;

/// Room for completions outside the table: messages, wake-ups, cancellations. The kernel keeps
/// completions beyond it aside (NODROP) until there is room, so it limits speed only.
const CQ_SLACK: u32 = 128;

fn bind(core: usize) -> Result<(), Error> {
    // core_affinity sets a bit of a fixed set, and panics beyond it.
    if core >= libc::CPU_SETSIZE as usize {
        return Err(Error::Core { core, source: io::Error::from_raw_os_error(libc::EINVAL) });
    }
    if core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
        return Ok(());
    }
    Err(Error::Core { core, source: io::Error::last_os_error() })
}

fn build(config: &Config) -> Result<IoUring, Error> {
    IoUring::builder()
        .dontfork()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .setup_clamp()
        .setup_cqsize(config.ops_max * CQES_PER_OP + CQ_SLACK)
        .build(config.entries)
        .map_err(|source| {
            let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
            let disabled = disabled.ok().and_then(|text| text.trim().parse().ok());
            setup_error(&config.name, source, disabled)
        })
}

fn check_features(ring: &IoUring) -> Result<(), Error> {
    let params = ring.params();
    for (has, what, since) in [
        (params.is_feature_nodrop(), "IORING_FEAT_NODROP", "5.5"),
        (params.is_feature_submit_stable(), "IORING_FEAT_SUBMIT_STABLE", "5.5"),
        (params.is_feature_ext_arg(), "IORING_FEAT_EXT_ARG", "5.11"),
        (params.is_feature_skip_cqe_on_success(), "IORING_FEAT_CQE_SKIP", "5.17"),
        (params.is_feature_linked_file(), "IORING_FEAT_LINKED_FILE", "5.17"),
    ] {
        if !has {
            return Err(Error::Missing { what, since });
        }
    }
    Ok(())
}

fn check_opcodes(ring: &IoUring) -> Result<(), Error> {
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|source| Error::Register { what: "a probe of the opcodes", source })?;
    for (code, what, since) in OPCODES {
        if !probe.is_supported(code) {
            return Err(Error::Missing { what, since });
        }
    }
    Ok(())
}

/// Tries flags that no probe reports on an invalid descriptor: a kernel that knows the flag fails
/// with EBADF, an older one with EINVAL.
fn check_flags(ring: &mut IoUring) -> Result<(), Error> {
    let nowhere = types::Fd(-1);
    let send = opcode::SendZc::new(nowhere, std::ptr::null(), 0).zc_flags(SEND_ZC_REPORT_USAGE);
    for (entry, what, since) in [
        (send.build(), "IORING_SEND_ZC_REPORT_USAGE", "6.2"),
        (message(nowhere, 0, 0), "IORING_MSG_RING_FLAGS_PASS", "6.3"),
    ] {
        let entry = entry.user_data(UserData::Ignored.encode());
        // SAFETY: the entry has no descriptor and no memory that it could use.
        unsafe { ring.submission().push(&entry) }
            .map_err(|_| Error::Invalid { what: "no room in an empty submission queue" })?;
        let refused = try_one(ring).map_err(Error::Submit)?;
        if refused {
            return Err(Error::Missing { what, since });
        }
    }
    Ok(())
}

/// Runs the one entry in the queue; returns whether the kernel finds it invalid.
fn try_one(ring: &mut IoUring) -> io::Result<bool> {
    loop {
        match ring.submit_and_wait(1) {
            Ok(_) => (),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
        // A send that fails may be followed by a notification, here or later, which is ignored.
        if let Some(result) = ring.completion().find(|cqe| !cqueue::notif(cqe.flags())) {
            return Ok(result.result() == -libc::EINVAL);
        }
    }
}

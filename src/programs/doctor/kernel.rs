//! The kernel: its version, and the interfaces that umem requires.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::Group;
use umem_ring::{Config, Ring};

use super::{Check, user};
use crate::fault::open::{self, DEVICE, Faults, Way};
use crate::memory;
use crate::runtime::idle;
use crate::runtime::process::{read, sudo};

/// The README's requirement: IORING_MSG_RING_FLAGS_PASS is the newest feature in use.
const OLDEST: (u32, u32) = (6, 3);

pub(super) fn release() -> Check {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let check = Check::ok("kernel", "umem needs Linux 6.3 or later", format!("Linux {release}"));
    match version(&release) {
        Some(version) if version >= OLDEST => check,
        _ => check.missing("boot Linux 6.3 or later"),
    }
}

pub(super) fn pages() -> Check {
    let bytes = memory::small_page_bytes();
    let check = Check::ok("pages", "the unit of memory", format!("{bytes} bytes"));
    match memory::check_pages() {
        Ok(()) => check,
        Err(_) => check.missing("boot a kernel with pages of 4 KiB"),
    }
}

/// The first two numbers.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Makes a ring as umem's threads do, with all of their checks.
pub(super) fn io_uring() -> Check {
    let check = |found: &str| Check::ok("io_uring", "all that umem sends and receives", found);
    let disabled = read("/proc/sys/kernel/io_uring_disabled");
    match Ring::new(&Config { name: "doctor".into(), ..Config::default() }) {
        Ok(_) => check("allowed, with every flag and operation that is used"),
        Err(umem_ring::Error::Unavailable { source, .. })
            if disabled.as_deref().is_some_and(|value| value != "0") =>
        {
            check(&format!("forbidden by a sysctl: {source}"))
                .missing(format!("{}sysctl -w kernel.io_uring_disabled=0", sudo()))
        }
        Err(umem_ring::Error::Unavailable { remedy, source }) => {
            check(&source.to_string()).missing(remedy)
        }
        Err(error @ umem_ring::Error::Missing { .. }) => {
            check(&error.to_string()).missing("boot Linux 6.3 or later")
        }
        Err(error) => check("there is no ring").missing(error.to_string()),
    }
}

/// A low descriptor limit shows in a check of its own, so each of these two opens one descriptor alone.
pub(super) fn userfaultfd() -> Check {
    let check = |found: &str| {
        Check::ok(
            "userfaultfd",
            "at the destination, reports the page that a vCPU waits for",
            found,
        )
    };
    match open::open(Faults::All) {
        Ok((_, Way::Device)) => check(&format!("allowed by the permissions of {DEVICE}")),
        Ok((_, Way::SystemCall)) => {
            check("allowed by vm.unprivileged_userfaultfd or CAP_SYS_PTRACE")
        }
        // The device shows that the kernel has it.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) && Path::new(DEVICE).exists() => {
            check("a seccomp filter forbids the call").missing(permission(true))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            check("the kernel has none, or a seccomp filter hides it")
                .missing("boot a kernel with CONFIG_USERFAULTFD, or allow the call userfaultfd")
        }
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            let found = match open::open(Faults::UserMode) {
                Ok(_) => "user-mode faults only, without those of KVM and of system calls",
                Err(_) => "no permission",
            };
            check(found).missing(permission(Path::new(DEVICE).exists()))
        }
        Err(error) => check("there is none").missing(error.to_string()),
    }
}

/// The command that gives this user access.
fn permission(has_device: bool) -> String {
    match has_device {
        true => format!("{}setfacl -m u:{}:rw {DEVICE}", sudo(), user()),
        false => format!("{}sysctl -w vm.unprivileged_userfaultfd=1", sudo()),
    }
}

/// The features with their names, and whether a guest in shared memory of small pages needs them.
const FEATURES: [(u64, &str, bool); 5] = [
    (open::MISSING_SHMEM, "MISSING_SHMEM", true),
    (open::MINOR_SHMEM, "MINOR_SHMEM", true),
    (open::EVENT_REMOVE, "EVENT_REMOVE", true),
    (open::MISSING_HUGETLBFS, "MISSING_HUGETLBFS", false),
    (open::MINOR_HUGETLBFS, "MINOR_HUGETLBFS", false),
];

/// The kernel reports its features to every user, also with a userfaultfd for user mode.
pub(super) fn userfaultfd_features() -> Check {
    let check = |found: String| {
        Check::ok("userfaultfd features", "which kinds of memory a guest may have", found)
    };
    let opened = open::open(Faults::All).or_else(|_| open::open(Faults::UserMode));
    let offered = match opened.and_then(|(uffd, _)| open::handshake(&uffd, 0)) {
        Ok(offered) => offered,
        Err(error) => return check(format!("unknown: {error}")).warning("see userfaultfd"),
    };
    let names = |wanted: &dyn Fn(&(u64, &str, bool)) -> bool| {
        let chosen = FEATURES.iter().filter(|feature| wanted(feature));
        chosen.map(|(_, name, _)| *name).collect::<Vec<_>>().join(", ")
    };
    let lacking = names(&|(bit, ..)| offered & bit == 0);
    let needed = FEATURES.iter().any(|(bit, _, needed)| *needed && offered & bit == 0);
    let check = check(match lacking.as_str() {
        "" => names(&|_| true),
        lacking => format!("lacks {lacking}"),
    });
    match (lacking.is_empty(), needed) {
        (true, _) => check,
        // It has CONFIG_USERFAULTFD, because it has answered.
        (false, true) => check.missing("boot Linux 5.14 or later, on x86-64 or arm64"),
        (false, false) => {
            let filesystems = read("/proc/filesystems").unwrap_or_default();
            check.warning(way_to_hugetlbfs(filesystems.contains("hugetlbfs")))
        }
    }
}

fn way_to_hugetlbfs(is_there: bool) -> &'static str {
    match is_there {
        true => "for guests in hugetlb pages, boot Linux 5.13 or later",
        false => "for guests in hugetlb pages, boot a kernel with CONFIG_HUGETLBFS",
    }
}

/// Keeps the cores awake as a demand thread does, and releases them at once.
pub(super) fn idle_cores() -> Check {
    let check = |found: &str| {
        Check::ok(
            "idle cores",
            "kept awake while a vCPU waits for a page, because waking them takes long",
            found,
        )
    };
    match idle::hold(idle::DEVICE) {
        Ok(_) => check("umem can keep them awake"),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            let remedy = format!("{}setfacl -m u:{}:w {}", sudo(), user(), idle::DEVICE);
            check(&format!("no permission for {}", idle::DEVICE)).warning(remedy)
        }
        Err(error) => check(&format!("{}: {error}", idle::DEVICE))
            .warning(way_to_idle(Path::new(CPUIDLE).exists())),
    }
}

/// There with CONFIG_CPU_IDLE, also in containers.
const CPUIDLE: &str = "/sys/devices/system/cpu/cpuidle";

fn way_to_idle(has_cpuidle: bool) -> String {
    match has_cpuidle {
        true => format!("the kernel has it: give the container or the unit {}", idle::DEVICE),
        false => "boot a kernel with CONFIG_CPU_IDLE".into(),
    }
}

pub(super) fn kvm() -> Check {
    let check = |found: &str| {
        Check::ok(
            "/dev/kvm",
            "for QEMU's -accel kvm, not for umem; without it guests are emulated",
            found,
        )
    };
    match OpenOptions::new().read(true).write(true).open(KVM) {
        Ok(_) => check("usable"),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            check("no permission").warning(way_to_kvm(&user(), group_of(KVM).as_deref()))
        }
        Err(_) => check("missing"),
    }
}

/// KVM's device.
const KVM: &str = "/dev/kvm";

/// The command that lets this user open the device: joining the group that may, if there is one.
fn way_to_kvm(user: &str, group: Option<&str>) -> String {
    match group {
        Some(group) => format!("{}usermod -aG {group} {user}, and log in anew", sudo()),
        None => format!("{}setfacl -m u:{user}:rw {KVM}", sudo()),
    }
}

/// The group, other than root's, that may read and write the file.
fn group_of(path: &str) -> Option<String> {
    let found = std::fs::metadata(path).ok()?;
    let may = found.mode() & 0o060 == 0o060 && found.gid() != 0;
    let group = may.then(|| Group::from_gid(found.gid().into()).ok().flatten());
    group.flatten().map(|group| group.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group helps only if it may open the device, and an option only if the kernel lacks it.
    #[test]
    fn remedies_fit_what_is_there() {
        assert!(way_to_kvm("ann", Some("kvm")).contains("usermod -aG kvm ann"));
        assert!(way_to_kvm("ann", None).contains("setfacl -m u:ann:rw /dev/kvm"));
        assert!(!way_to_idle(true).contains("CONFIG_") && way_to_idle(false).contains("CONFIG_"));
        assert!(!way_to_hugetlbfs(true).contains("CONFIG_"));
        let scratch = tempfile::tempdir().unwrap();
        let device = scratch.path().join("kvm");
        std::fs::write(&device, "").unwrap();
        // Root's group, or one that may not write: neither is worth joining.
        assert_eq!(group_of(device.to_str().unwrap()), None);
    }

    #[test]
    fn kernel_releases_compare_numerically() {
        for (release, expected) in [
            ("6.18.44", Some((6, 18))),
            ("6.3.0-rc1+", Some((6, 3))),
            ("5.15-generic", Some((5, 15))),
            ("10.2", Some((10, 2))),
            ("6", None),
            ("", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
        assert!(version("6.18.44") > Some(OLDEST) && version("5.19.1") < Some(OLDEST));
    }
}

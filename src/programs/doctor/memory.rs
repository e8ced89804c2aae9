//! The place of the guest's RAM.

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::Check;
use crate::runtime::process::{read, sudo};

const SHARED_MEMORY: &str = "/dev/shm";

/// Less than any useful guest takes.
const FREE_BYTES: u64 = 256 << 20;

pub(super) fn shared() -> Check {
    let check =
        |found: String| Check::ok(SHARED_MEMORY, "the usual place for the guest's RAM file", found);
    let remedy = format!("{}mount -t tmpfs -o nosuid,nodev tmpfs {SHARED_MEMORY}", sudo());
    let Ok(stat) = statfs(SHARED_MEMORY) else {
        return check("missing".into()).warning(remedy);
    };
    if stat.filesystem_type() != TMPFS_MAGIC {
        return check("not a tmpfs: no RAM file in it can be used".into()).warning(remedy);
    }
    let unit = u64::try_from(stat.block_size()).expect("a size is not negative");
    let bytes = |blocks: u64| blocks.saturating_mul(unit);
    let (size, free) = (bytes(stat.blocks()), bytes(stat.blocks_available()));
    let check = check(format!("{} MiB free of {} MiB", free >> 20, size >> 20));
    match free {
        0..FREE_BYTES if size > 0 => {
            check.warning(format!("{}mount -o remount,size=BYTES {SHARED_MEMORY}", sudo()))
        }
        _ => check,
    }
}

pub(super) fn huge_pages() -> Check {
    let check = |found: String| {
        Check::ok(
            "huge pages",
            "RAM files in /dev/shm, QEMU's with align=2M: pages land two to five times as fast",
            found,
        )
    };
    let setting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let Some(enabled) = read(setting).and_then(|text| chosen(&text)) else {
        return check("the kernel has no huge pages for shared memory".into())
            .warning("boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE");
    };
    let mounts = read("/proc/self/mounts").unwrap_or_default();
    let option = mount_option(&mounts).unwrap_or("never");
    let check =
        check(format!("{SHARED_MEMORY} is mounted with huge={option}, and {enabled} in sysfs"));
    match (enabled.as_str(), option) {
        ("force", _) => check,
        ("deny", _) => check.warning(format!("echo never | {}tee {setting}", sudo())),
        (_, "never") => {
            check.warning(format!("{}mount -o remount,huge=always {SHARED_MEMORY}", sudo()))
        }
        _ => check,
    }
}

/// The word in brackets: `always within_size advise [never] deny force`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_owned())
}

/// The huge= option of the last mount over /dev/shm.
fn mount_option(mounts: &str) -> Option<&str> {
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let options = fields.rfind(|fields| fields.get(1) == Some(&SHARED_MEMORY))?;
    options.get(3)?.split(',').find_map(|option| option.strip_prefix("huge="))
}

pub(super) fn hugetlb_pool() -> Check {
    let check = |found: String| {
        Check::ok(
            "hugetlb pool",
            "only for guests that ask for such pages, with vm.nr_hugepages",
            found,
        )
    };
    let text = read("/proc/meminfo").unwrap_or_default();
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
    };
    match (number("HugePages_Total"), number("HugePages_Free"), number("Hugepagesize")) {
        (Some(0), ..) => check("empty".into()),
        (Some(total), Some(free), Some(kib)) => {
            check(format!("{free} of {total} pages of {kib} KiB free"))
        }
        _ => check("not in this kernel".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selected_kernel_setting_is_parsed() {
        let text = "always within_size advise [never] deny force";
        assert_eq!(chosen(text).as_deref(), Some("never"));
        assert_eq!(chosen("always never"), None);
    }

    #[test]
    fn last_mount_of_a_path_is_the_visible_one() {
        let mounts = "tmpfs /dev/shm tmpfs rw,nosuid 0 0\n\
                      tmpfs /dev/shm/below tmpfs rw,huge=always 0 0\n\
                      tmpfs /dev/shm tmpfs rw,nosuid,huge=within_size,inode64 0 0";
        assert_eq!(mount_option(mounts), Some("within_size"));
        assert_eq!(mount_option("tmpfs /dev/shm tmpfs rw 0 0"), None);
        assert_eq!(mount_option(""), None);
    }
}

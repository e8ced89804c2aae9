//! A memory limit for processes of a test: a control group of its own, which is gone afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use super::wait_for;

/// What processes that are put into it take of the kernel's memory from then on is limited. Dropped, it lets them go.
pub(crate) struct MemoryLimit {
    directory: PathBuf,
    is_v2: bool,
}

impl MemoryLimit {
    /// So many MiB. Whoever would take more is killed.
    ///
    /// # Panics
    /// Where this machine has no control groups that limit memory.
    pub(crate) fn of(mib: u64) -> MemoryLimit {
        let is_v2 = !Path::new("/sys/fs/cgroup/memory").is_dir();
        let parent = if is_v2 { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/memory" };
        let directory = Path::new(parent).join(format!("umem-test-{}", std::process::id()));
        fs::create_dir(&directory).expect("root may make a control group");
        let limit = MemoryLimit { directory, is_v2 };
        limit.set(mib);
        limit
    }

    /// Whoever would take more is told so, and nobody is killed. False where control groups cannot do that: those of
    /// version 2 kill.
    pub(crate) fn kills_nobody(&self) -> bool {
        if !self.is_v2 {
            self.write("memory.oom_control", "1");
        }
        !self.is_v2
    }

    pub(crate) fn set(&self, mib: u64) {
        let file = if self.is_v2 { "memory.max" } else { "memory.limit_in_bytes" };
        self.write(file, &(mib << 20).to_string());
    }

    /// A process, with all of its threads.
    pub(crate) fn take(&self, pid: u32) {
        self.write("cgroup.procs", &pid.to_string());
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.directory.join(file);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let above = self.directory.with_file_name("cgroup.procs");
        wait_for(format!("{} to be left", self.directory.display()), || {
            let pids = fs::read_to_string(self.directory.join("cgroup.procs")).unwrap_or_default();
            for pid in pids.lines() {
                // Fails where it has just ended.
                let _ = fs::write(&above, pid);
            }
            fs::remove_dir(&self.directory).ok()
        });
    }
}

//! A memory limit for processes of a test: a control group of its own, removed afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use super::wait_for;

/// Limits the kernel memory of the processes in it from then on. Dropped, it releases them.
pub(crate) struct MemoryLimit {
    directory: PathBuf,
    is_v2: bool,
}

impl MemoryLimit {
    /// The limit in MiB. A process that exceeds it is killed.
    ///
    /// # Panics
    /// If this machine has no control groups that limit memory.
    pub(crate) fn of(mib: u64) -> MemoryLimit {
        let is_v2 = !Path::new("/sys/fs/cgroup/memory").is_dir();
        let parent = if is_v2 { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/memory" };
        let directory = Path::new(parent).join(format!("umem-test-{}", std::process::id()));
        fs::create_dir(&directory).expect("root may make a control group");
        let limit = MemoryLimit { directory, is_v2 };
        limit.set(mib);
        limit
    }

    /// A process that exceeds the limit gets an error and is not killed. False for control groups of version 2, which
    /// kill.
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

    /// Adds a process, with all of its threads.
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
                // Fails if the process has just ended.
                let _ = fs::write(&above, pid);
            }
            fs::remove_dir(&self.directory).ok()
        });
    }
}

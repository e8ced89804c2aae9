//! A directory for a test's files, and the cleanup of everything the test leaves behind.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use tempfile::TempDir;

use super::process::pid;
use super::wait_for;

const SHARED_MEMORY: &str = "/dev/shm";

/// A directory for sockets and logs, and names for RAM files. Each name contains the directory's unique name, which
/// identifies every process that was started with one of them.
pub(crate) struct Scratch {
    directory: TempDir,
    token: String,
}

impl Scratch {
    pub(crate) fn new() -> Scratch {
        // Short, because the paths of sockets are limited, and under /tmp, where any user may read.
        let directory = tempfile::Builder::new()
            .prefix("umem-test-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempdir_in("/tmp")
            .expect("a directory in /tmp");
        let token = directory.path().file_name().expect("the directory has a name").to_str();
        let token = token.expect("its name is ASCII").to_owned();
        Scratch { directory, token }
    }

    /// A file or socket of the test.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The path of a RAM file in shared memory, which the caller or another program creates.
    pub(crate) fn ram(&self, name: &str) -> PathBuf {
        Path::new(SHARED_MEMORY).join(format!("{}-{name}", self.token))
    }

    /// The test's existing files in shared memory.
    pub(crate) fn ram_files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(SHARED_MEMORY).expect("shared memory can be listed");
        let paths = entries.flatten().map(|entry| entry.path());
        paths.filter(|path| path.to_string_lossy().contains(&self.token)).collect()
    }

    /// Processes with `word` and a name of the test in their command line: pid and command line.
    pub(crate) fn processes(&self, word: &str) -> Vec<(u32, String)> {
        let entries = fs::read_dir("/proc").expect("/proc can be listed").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(|pid: u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let ours = line.contains(&self.token) && line.contains(word);
            (ours && pid != std::process::id()).then_some((pid, line))
        })
        .collect()
    }

    /// Waits until no process of the test has `word` in its command line.
    pub(crate) fn wait_until_gone(&self, word: &str) {
        wait_for(format!("the end of every process with {word}"), || {
            self.processes(word).is_empty().then_some(())
        });
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Processes left behind, such as the QEMU of a killed umem.
        for (number, _) in self.processes("") {
            let _ = kill(pid(number), Signal::SIGKILL);
        }
        for path in self.ram_files() {
            let _ = fs::remove_file(path);
        }
    }
}

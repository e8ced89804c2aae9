//! A file system of limited size for RAM files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

/// A tmpfs that is visible only to this thread and the processes that it starts.
pub(crate) struct Room {
    path: PathBuf,
}

impl Room {
    /// Mounts a tmpfs of this many MiB at `path`, a directory that is created.
    pub(crate) fn of(mib: u64, path: &Path) -> Room {
        fs::create_dir(path).expect("a directory");
        unshare(CloneFlags::CLONE_NEWNS).expect("mounts of its own");
        let here = path.display().to_string();
        run("mount", &["--make-rprivate", "/"]);
        run("mount", &["-t", "tmpfs", "-o", &format!("size={mib}m,mode=0700"), "none", &here]);
        Room { path: path.to_owned() }
    }

    pub(crate) fn ram(&self) -> PathBuf {
        self.path.join("ram")
    }

    /// Occupies this many MiB.
    pub(crate) fn take(&self, mib: usize) {
        fs::write(self.path.join("taken"), vec![0xa5; mib << 20])
            .expect("the file system has room");
    }

    /// Frees them.
    pub(crate) fn give_back(&self) {
        fs::remove_file(self.path.join("taken")).expect("the room has been taken");
    }

    /// Resizes it.
    pub(crate) fn resize(&self, mib: u64) {
        let here = self.path.display().to_string();
        run("mount", &["-o", &format!("remount,size={mib}m"), &here]);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // Processes with open files there keep them.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().expect("the program starts");
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

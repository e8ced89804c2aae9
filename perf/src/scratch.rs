//! Temporary files of a measurement, which are removed in every case.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};
use crate::interrupt;
use crate::memory::warm;

/// The directory of guests' RAM files.
const SHARED_MEMORY: &str = "/dev/shm";

/// A directory for sockets and logs.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Result<Scratch> {
        let template = std::env::temp_dir().join("umem-perf-XXXXXX");
        Ok(Scratch(nix::unistd::mkdtemp(&template).context(|| "making a directory")?))
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A name in /dev/shm for a guest's RAM; dropping it removes the file, which another process may
/// make.
pub(crate) struct SharedFile(PathBuf);

impl SharedFile {
    pub(crate) fn named(name: &str) -> SharedFile {
        let name = format!("umem-perf-{}-{name}", std::process::id());
        SharedFile(Path::new(SHARED_MEMORY).join(name))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Warms memory for files in /dev/shm: see [`warm`].
pub(crate) fn warm_shared_memory(bytes: u64) -> Result<()> {
    warm(|| {
        let name = SharedFile::named("warm");
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).open(name.path());
        let file = file.context(|| name.path().display())?;
        fill(&file, bytes).context(|| format!("warming memory in {SHARED_MEMORY}"))
    })
}

/// Writes `bytes` to a memory file.
fn fill(mut file: &File, bytes: u64) -> Result<()> {
    let chunk = vec![0x5a; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        interrupt::check()?;
        let length = chunk.len().min(usize::try_from(left)?);
        file.write_all(&chunk[..length])?;
        left -= length as u64;
    }
    Ok(())
}

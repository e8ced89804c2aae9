//! A FIFO with which a test unblocks another program.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use nix::sys::stat::Mode;

/// A FIFO from which another program reads a byte.
pub(crate) struct Fifo {
    path: PathBuf,
    /// Open for reading too, so neither opening nor writing waits for the reader.
    file: File,
}

impl Fifo {
    pub(crate) fn new(path: PathBuf) -> Fifo {
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).expect("a FIFO");
        let file = OpenOptions::new().read(true).write(true).open(&path).expect("the file exists");
        Fifo { path, file }
    }

    /// As an argument of the program.
    pub(crate) fn path(&self) -> &str {
        self.path.to_str().expect("scratch paths are ASCII")
    }

    pub(crate) fn release(&self) {
        (&self.file).write_all(b"\n").expect("the FIFO has room");
    }
}

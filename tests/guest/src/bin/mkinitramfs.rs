//! `mkinitramfs INIT OUTPUT`: packs one static program into an initramfs, a cpio archive in the
//! `newc` format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst), together with
//! the directories and the console that the kernel and the program expect.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program of the tests, or a measurement"
)]

use std::path::Path;
use std::process::ExitCode;
use std::{env, fs, io};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let [init, output] = arguments.as_slice() else {
        eprintln!("usage: mkinitramfs INIT OUTPUT");
        return ExitCode::from(2);
    };
    match pack(Path::new(init), Path::new(output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mkinitramfs: {error}");
            ExitCode::FAILURE
        }
    }
}

fn pack(init: &Path, output: &Path) -> io::Result<()> {
    let mut archive = Archive::default();
    archive.add("dev", DIRECTORY, (0, 0), &[]);
    archive.add("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    archive.add("dev/null", CHARACTER_DEVICE, (1, 3), &[]);
    archive.add("proc", DIRECTORY, (0, 0), &[]);
    archive.add("init", PROGRAM, (0, 0), &fs::read(init)?);
    fs::write(output, archive.finish())
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: usize,
}

impl Archive {
    /// `device` is major and minor number, for a device.
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.entries += 1;
        let fields = [
            self.entries,      // inode
            mode as usize,     // kind and permissions
            0,                 // user
            0,                 // group
            1,                 // links
            0,                 // modification time: always the same archive
            contents.len(),    // size
            0,                 // device that it lies on, major
            0,                 // and minor
            device.0 as usize, // device that it is, major
            device.1 as usize, // and minor
            name.len() + 1,    // size of the name with its zero
            0,                 // checksum, not used
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(contents);
        self.align();
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

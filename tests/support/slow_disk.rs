//! A disk that answers late: a FUSE file system of the test's own with one file, whose reads bypass the page cache.
//! Pages of a guest that are read into are pinned meanwhile, and written past every mapping.
//!
//! Page `n` of the file has the words `mix(n) ^ w`, for each word's number `w`, as the Linux guest expects
//! (tests/guest/src/disk.rs).

use std::ffi::CString;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::Scratch;

const PAGE: u64 = 4096;
/// How long a read takes. No test waits for that time.
const DELAY: Duration = Duration::from_millis(30);

// Of linux/fuse.h, version 7.31.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const BATCH_FORGET: u32 = 42;
const HEADER_BYTES: usize = 40;
/// FUSE_ASYNC_READ, FUSE_ASYNC_DIO, FUSE_MAX_PAGES.
const FLAGS: u32 = 1 | 1 << 15 | 1 << 22;
const FOPEN_DIRECT_IO: u32 = 1;
const ROOT: u64 = 1;
const DISK: u64 = 2;
const VALID_S: u64 = 1000;

/// The disk, until it is dropped.
pub(crate) struct SlowDisk {
    directory: PathBuf,
}

impl SlowDisk {
    /// Of this size.
    pub(crate) fn start(scratch: &Scratch, mib: u64) -> SlowDisk {
        let directory = scratch.path("slow");
        std::fs::create_dir(&directory).expect("a directory");
        let device = File::options().read(true).write(true).open("/dev/fuse").expect("FUSE");
        let number = device.as_raw_fd();
        let options = format!("fd={number},rootmode=40000,user_id=0,group_id=0,allow_other");
        let [options, target] = [options.as_bytes(), directory.as_os_str().as_bytes()]
            .map(|text| CString::new(text).expect("no zero in it"));
        // SAFETY: strings with their ends.
        let mounted = unsafe {
            let (name, flags) = (c"slow".as_ptr(), libc::MS_NOSUID);
            libc::mount(name, target.as_ptr(), c"fuse".as_ptr(), flags, options.as_ptr().cast())
        };
        assert_eq!(mounted, 0, "mounting: {}", std::io::Error::last_os_error());
        let device = Arc::new(device);
        // Ends when it is unmounted.
        std::thread::spawn(move || serve(&device, mib << 20));
        SlowDisk { directory }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join("disk")
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        unmount(&self.directory);
    }
}

fn unmount(directory: &Path) {
    let target = CString::new(directory.as_os_str().as_bytes()).expect("no zero in it");
    // SAFETY: a string with its end.
    unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
}

/// Fields of a message, one behind the other.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn word(mut self, value: u64) -> Message {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn half(mut self, value: u32) -> Message {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// `struct fuse_attr`.
    fn attributes(self, node: u64, size: u64) -> Message {
        let (mode, size) = match node {
            ROOT => (libc::S_IFDIR | 0o755, 0),
            _ => (libc::S_IFREG | 0o444, size),
        };
        let times = |message: Message| (0..3).fold(message, |message, _| message.word(0));
        let message = times(self.word(node).word(size).word(size / 512)).half(0).half(0).half(0);
        message.half(mode).half(1).half(0).half(0).half(0).half(4096).half(0)
    }
}

fn serve(device: &Arc<File>, size: u64) {
    let mut buffer = vec![0; 2 << 20];
    loop {
        let count = match (&**device).read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // A request has been taken back.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(_) => return,
        };
        let half = |at: usize| u32::from_le_bytes(buffer[at..at + 4].try_into().expect("4 bytes"));
        let word = |at: usize| u64::from_le_bytes(buffer[at..at + 8].try_into().expect("8 bytes"));
        let (opcode, unique, node) = (half(4), word(8), word(16));
        let body = &buffer[HEADER_BYTES..count];
        let answer = match opcode {
            INIT => {
                let message = Message::default().half(7).half(31).half(1 << 20).half(FLAGS);
                let message = message.half(64 | 48 << 16).half(1 << 20).half(1).half(256);
                Ok((0..8).fold(message, |message, _| message.half(0)))
            }
            LOOKUP if body == b"disk\0" => {
                let message = Message::default().word(DISK).word(0).word(VALID_S).word(VALID_S);
                Ok(message.word(0).attributes(DISK, size))
            }
            LOOKUP => Err(libc::ENOENT),
            GETATTR => Ok(Message::default().word(VALID_S).word(0).attributes(node, size)),
            OPEN => Ok(Message::default().word(0).half(FOPEN_DIRECT_IO).half(0)),
            READ => {
                let (offset, length) = (word(HEADER_BYTES + 8), half(HEADER_BYTES + 16));
                let device = device.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(DELAY);
                    let bytes = contents(offset, (offset + u64::from(length)).min(size));
                    reply(&device, unique, Ok(Message(bytes)));
                });
                continue;
            }
            FORGET | BATCH_FORGET => continue,
            RELEASE | FLUSH => Ok(Message::default()),
            _ => Err(libc::ENOSYS),
        };
        reply(device, unique, answer);
    }
}

fn reply(device: &File, unique: u64, answer: Result<Message, i32>) {
    let (error, body) = match answer {
        Ok(message) => (0, message.0),
        Err(errno) => (-errno, Vec::new()),
    };
    let length = u32::try_from(16 + body.len()).expect("a message");
    let mut message = Message::default().half(length).half(error.cast_unsigned()).word(unique);
    message.0.extend(body);
    // Nobody wants it any more where it was unmounted.
    let _ = (&*device).write(&message.0);
}

/// The file's bytes from `start` to `end`.
fn contents(start: u64, end: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for page in start / PAGE..end.div_ceil(PAGE).max(start / PAGE) {
        let base = mix(page);
        bytes.extend((0..PAGE / 8).flat_map(|word| (base ^ word).to_le_bytes()));
    }
    let skipped = usize::try_from(start % PAGE).expect("inside a page");
    let count = usize::try_from(end.saturating_sub(start)).expect("a message");
    bytes.drain(..skipped.min(bytes.len()));
    bytes.truncate(count);
    bytes
}

/// The finaliser of splitmix64 behind its step, as in the guest.
fn mix(value: u64) -> u64 {
    super::random::mix(value.wrapping_add(0x9e37_79b9_7f4a_7c15))
}

//! Long runs of small pages go from the socket into the file by splice(2), through a pipe.
//!
//! Spliced bytes are copied once, from the network's buffers into the file's pages; bytes that are read ahead are
//! copied into a buffer first. Headers cannot be spliced, so splicing is worthwhile for long runs, and only for pages
//! that the CPU need not read: without checksums and TLS.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};

/// A run with fewer bytes left than this, 64 KiB, is read ahead, which also fetches the next header.
const WORTHWHILE_BYTES: u64 = 64 << 10;

/// The most bytes of one turn: as many as a receive that reads ahead.
const TURN_BYTES: usize = super::buffer::AHEAD_BULK_BYTES;

/// The pipe's size. The size counts pages, and a slot may hold a piece of a packet smaller than a page: this leaves
/// room for a turn of packets of 1 KiB. Unprivileged processes may have this size (pipe(7),
/// `/proc/sys/fs/pipe-max-size`).
const PIPE_BYTES: i32 = 1 << 20;

/// A lane's pipe. It is empty between turns.
#[derive(Debug)]
pub(super) struct Pipe {
    output: OwnedFd,
    input: OwnedFd,
    stage: Stage,
    /// This socket does not support splice(2). The rest of the current run is read ahead, in pieces that need not be
    /// whole pages; no further run is spliced.
    is_unable: bool,
}

/// The state of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The lane is read ahead.
    Off,
    /// The rest of the current run goes through the pipe.
    Run,
    /// After a spliced run. The next header is received alone, because another long run may follow.
    Header,
}

/// The reason why bytes were not moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SpliceError {
    /// This socket does not support splice(2); nothing has been taken from it.
    Unable,
    /// The connection is broken.
    Socket(Errno),
    /// The file takes no more. Bytes taken from the socket are lost with the pipe.
    File(Errno),
}

impl Pipe {
    /// None if no pipe can be had.
    pub(super) fn new() -> Option<Pipe> {
        let (output, input) = nix::unistd::pipe2(OFlag::O_CLOEXEC).ok()?;
        // A smaller pipe works as well, in more turns.
        let _ = fcntl(&input, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
        Some(Pipe { output, input, stage: Stage::Off, is_unable: false })
    }

    pub(super) fn stage(&self) -> Stage {
        if self.is_unable { Stage::Off } else { self.stage }
    }

    /// Whether the rest of a run is spliced: `here` of its `bytes` have been read ahead.
    pub(super) fn takes(&mut self, bytes: u64, here: usize) -> bool {
        if self.stage != Stage::Run {
            let is_long = bytes.saturating_sub(here as u64) >= WORTHWHILE_BYTES;
            self.stage = if is_long && !self.is_unable { Stage::Run } else { Stage::Off };
        }
        self.stage == Stage::Run
    }

    /// Disables splicing.
    pub(super) fn give_up(&mut self) {
        self.is_unable = true;
    }

    /// The run has ended.
    pub(super) fn run_ended(&mut self) {
        self.stage = Stage::Header;
    }

    /// The header behind a run is not a run's.
    pub(super) fn rest(&mut self) {
        self.stage = Stage::Off;
    }

    /// Moves up to `most` bytes from the socket to `offset` of the file. Returns 0 at the connection's end. Blocks if
    /// the socket has no data: call it when the socket is readable.
    pub(super) fn carry(
        &self,
        socket: impl AsFd,
        file: impl AsFd,
        offset: u64,
        most: u64,
    ) -> Result<usize, SpliceError> {
        let most = usize::try_from(most).map_or(TURN_BYTES, |most| most.min(TURN_BYTES));
        let flags = SpliceFFlags::SPLICE_F_MOVE;
        let taken = again(|| splice(&socket, None, &self.input, None, most, flags));
        let taken = taken.map_err(|errno| match errno {
            // A sandbox returns the latter three for unknown calls.
            Errno::EINVAL | Errno::ENOSYS | Errno::EPERM | Errno::EACCES => SpliceError::Unable,
            errno => SpliceError::Socket(errno),
        })?;
        let mut offset = i64::try_from(offset).map_err(|_| SpliceError::File(Errno::EFBIG))?;
        let mut left = taken;
        while left > 0 {
            let stored =
                again(|| splice(&self.output, None, &file, Some(&mut offset), left, flags));
            match stored {
                Ok(0) => return Err(SpliceError::File(Errno::EIO)),
                Ok(stored) => left -= stored,
                Err(errno) => return Err(SpliceError::File(errno)),
            }
        }
        Ok(taken)
    }
}

/// Repeats the call until no signal interrupts it.
fn again(mut call: impl FnMut() -> nix::Result<usize>) -> nix::Result<usize> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;

    use nix::fcntl::SealFlag;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn file(bytes: u64) -> File {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"ram", flags).unwrap());
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn piped_bytes_land_at_their_offset_only() {
        let (pipe, file) = (Pipe::new().unwrap(), file(1 << 20));
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let bytes: Vec<u8> = (0..50_000u32).map(|at| at as u8 | 1).collect();
        ours.write_all(&bytes).unwrap();
        let mut at = 0;
        while at < 30_000 {
            at += pipe.carry(&theirs, &file, 4096 + at as u64, 30_000 - at as u64).unwrap();
        }
        assert_eq!(at, 30_000);
        let mut there = vec![0; 40_000];
        file.read_exact_at(&mut there, 4096).unwrap();
        assert!(there[..30_000] == bytes[..30_000]);
        assert!(there[30_000..].iter().all(|&byte| byte == 0), "no more than was asked for");
        drop(ours);
        while at < bytes.len() {
            at += pipe.carry(&theirs, &file, 4096 + at as u64, u64::MAX).unwrap();
        }
        assert_eq!(pipe.carry(&theirs, &file, 0, u64::MAX), Ok(0), "the end");
    }

    #[test]
    fn splice_error_names_the_failing_side() {
        let (pipe, file) = (Pipe::new().unwrap(), file(8192));
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[0xa5; 4096]).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
        assert_eq!(pipe.carry(&theirs, &file, 0, 4096), Err(SpliceError::File(Errno::EPERM)));

        let device = File::open("/dev/cpu_dma_latency").or_else(|_| File::open("/proc/self/mem"));
        let unable = Pipe::new().unwrap().carry(device.unwrap(), &file, 0, 4096);
        assert_eq!(unable, Err(SpliceError::Unable));
    }

    #[test]
    fn only_long_runs_are_spliced_and_to_their_end() {
        let mut pipe = Pipe::new().unwrap();
        assert!(!pipe.takes(WORTHWHILE_BYTES - 1, 0));
        assert!(!pipe.takes(WORTHWHILE_BYTES + 10, 11));
        assert!(pipe.takes(WORTHWHILE_BYTES + 10, 10));
        assert!(pipe.takes(4096, 0), "the run has begun");
        pipe.run_ended();
        assert_eq!(pipe.stage(), Stage::Header);
        assert!(!pipe.takes(4096, 0), "a short run behind it");
        assert_eq!(pipe.stage(), Stage::Off);

        assert!(pipe.takes(2 * WORTHWHILE_BYTES, 0));
        pipe.give_up();
        assert_eq!(pipe.stage(), Stage::Off, "the run is read ahead");
        assert!(pipe.takes(4096, 100), "the begun run may end inside a page");
        pipe.run_ended();
        assert!(!pipe.takes(2 * WORTHWHILE_BYTES, 0), "the run is the last one");
        assert_eq!(pipe.stage(), Stage::Off);
    }
}

//! Commands to the preload object for memory without a file, which QEMU names by its address.

use std::fmt::Write as _;
use std::io::{ErrorKind, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::{HandoffSocket, Message};
use crate::error::{Context, Error, Result};
use crate::runtime::polling::poll;

impl HandoffSocket {
    /// Whether the guest side is the preload object in a QEMU, and supports [`register`](HandoffSocket::register).
    pub(crate) fn registers(&self) -> bool {
        self.registers
    }

    /// Makes the preload object forget files that were mapped while umem reported that all of the guest's memory had
    /// been handed over: they would never be filled.
    pub(crate) fn forget_late(&mut self, messages: &[Message]) -> Result<()> {
        for message in messages {
            let Message::Memory { pieces, .. } = message else { continue };
            for piece in pieces.iter().filter(|piece| piece.file.is_some()) {
                self.forget(piece.address)?;
            }
        }
        Ok(())
    }

    /// Makes the preload object empty and register memory without a file. A hand-over message follows.
    pub(crate) fn register(&mut self, address: u64, bytes: u64, name: &str) -> Result<()> {
        self.command(format!("register {address} {bytes} {name}\n").as_bytes())
    }

    /// Makes the preload object drop the copies of pages that are sent again: ranges of addresses in the memory
    /// without a file that begins at `block`. No thread may fill pages of it meanwhile. Returns when the pages are
    /// missing again.
    ///
    /// # Errors
    /// The preload object failed, the guest's process has ended, or it does not answer in time.
    pub(crate) fn empty(
        &mut self,
        block: u64,
        stale: &[Range<u64>],
        patience: Duration,
    ) -> Result<()> {
        let bytes: u64 = stale.iter().map(|range| range.end - range.start).sum();
        let mut lines = String::new();
        for range in stale {
            // Writing to a String does not fail.
            let _ = writeln!(lines, "stale {} {}", range.start, range.end - range.start);
        }
        let _ = writeln!(lines, "empty {block}");
        self.emptied = None;
        let silent = || {
            Error::Preload(
                "the guest's process does not drop pages: check whether it is stopped".into(),
            )
        };
        self.stream.set_write_timeout(Some(patience)).context(|| "the hand-over socket")?;
        let written = self.stream.write_all(lines.as_bytes());
        self.stream.set_write_timeout(None).context(|| "the hand-over socket")?;
        match written {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Err(silent());
            }
            Err(error) => return Err(error).context(|| "the hand-over socket"),
        }
        let deadline = Instant::now() + patience;
        while self.emptied.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, timeout) {
                Ok(0) => return Err(silent()),
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno).context(|| "the hand-over socket"),
            }
            let Some(messages) = self.read()? else {
                return Err(Error::Preload("the guest's process ended as it dropped pages".into()));
            };
            self.forget_late(&messages)?;
        }
        match self.emptied.take() {
            Some(emptied) if emptied == (block, bytes) => Ok(()),
            _ => Err(Error::Preload(
                "the guest's process has dropped other pages than those that are sent again".into(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A page that is to be dropped.
    const STALE: Range<u64> = 4096..8192;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A guest side that reads up to `empty`, and answers with `answer`.
    fn answering(answer: &'static str) -> (HandoffSocket, std::thread::JoinHandle<Vec<String>>) {
        let (guest, daemon) = UnixStream::pair().unwrap();
        let guest = std::thread::spawn(move || {
            let mut lines = Vec::new();
            for line in BufReader::new(&guest).lines() {
                lines.push(line.unwrap());
                if lines.last().is_some_and(|line| line.starts_with("empty")) {
                    break;
                }
            }
            (&guest).write_all(answer.as_bytes()).unwrap();
            lines
        });
        (HandoffSocket::new(daemon), guest)
    }

    #[test]
    fn stale_pages_are_dropped_once_the_guest_side_confirms() {
        let (mut daemon, guest) = answering("{\"emptied\":4096,\"size\":12288}\n");
        daemon.empty(4096, &[4096..8192, 16384..24576], PATIENCE).unwrap();
        assert_eq!(guest.join().unwrap(), ["stale 4096 4096", "stale 16384 8192", "empty 4096"]);
    }

    #[test]
    fn unexpected_answer_of_the_guest_side_is_an_error() {
        for (answer, expected) in [
            ("{\"emptied\":4096,\"size\":8192}\n", "dropped other pages"),
            ("{\"emptied\":8192,\"size\":4096}\n", "dropped other pages"),
            ("{\"emptied\":4096}\n{\"emptied\":4096,\"size\":1}\n", "dropped other pages"),
            (
                "{\"error\":\"block\",\"name\":\"pc.ram\",\"text\":\"no\"}\n",
                "RAM pc.ram: no (block)",
            ),
            ("", "ended as it dropped pages"),
        ] {
            let (mut daemon, guest) = answering(answer);
            let error = daemon.empty(4096, &[STALE], PATIENCE).unwrap_err().to_string();
            assert!(error.contains(expected), "{answer}: {error}");
            guest.join().unwrap();
        }
    }

    #[test]
    fn wait_for_a_silent_guest_side_is_bounded() {
        let (_guest, daemon) = UnixStream::pair().unwrap();
        let mut daemon = HandoffSocket::new(daemon);
        let error = daemon.empty(4096, &[STALE], Duration::from_millis(1)).unwrap_err();
        assert!(error.to_string().contains("does not drop pages"), "{error}");
        // The same for a guest side that does not read.
        let ranges = vec![4096..8192; 1 << 16];
        let error = daemon.empty(4096, &ranges, Duration::from_millis(1)).unwrap_err();
        assert!(error.to_string().contains("does not drop pages"), "{error}");
    }
}

//! Errors of a lane, with the place of its pages.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use umem_ring::Outcome;
use umem_wire::ReceiveError;

use super::lane_core::{Current, Health, LaneCore, out_of_memory};
use crate::error::Error;
use crate::statistics::Counters;

impl LaneCore {
    /// Received bytes cannot be decoded, or changed in transit. The latter is counted, once a lane.
    pub(super) fn unreadable(&mut self, error: &ReceiveError) -> Error {
        let before = std::mem::replace(&mut self.health, Health::Unreadable);
        if before != Health::Unreadable && error.is_corruption() {
            Counters::add(&self.guest.counters.checksum_errors, 1);
        }
        match error {
            ReceiveError::RunSum { range } => {
                let (first, last) = (range.first, range.first + range.pages - 1);
                let name = &self.guest.region(range.region).name;
                self.lost(format!(
                    "the checksum of RAM {name}, pages {first} to {last}, is wrong; bytes change in \
                     transit"
                ))
            }
            error => Error::received("source", &self.name, error),
        }
    }

    /// The reason of an incomplete receive.
    pub(super) fn failed(&self, outcome: Outcome) -> Error {
        match outcome {
            // The kernel could not store the bytes in the page: its file system is full.
            Outcome::Short { .. } if self.is_open() => self.has_no_room(),
            Outcome::Failed(errno) if errno.raw() == libc::EFAULT => self.has_no_room(),
            Outcome::Short { .. } | Outcome::Done(_) => self.lost("the source closed it".into()),
            Outcome::Failed(errno) => self.lost(errno.to_string()),
            other => self.lost(format!("{other:?}")),
        }
    }

    /// Whether more may arrive: a receive ended early for a reason other than the connection's end.
    fn is_open(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.socket.as_raw_fd(), &mut [0], flags) {
            Ok(count) => count > 0,
            Err(errno) => errno == Errno::EAGAIN,
        }
    }

    /// For the current run.
    fn has_no_room(&self) -> Error {
        let region = |current: &Current| self.guest.region(current.range.region);
        let ram = self.current.as_ref().map(|current| region(current).name.as_str());
        out_of_memory(ram.unwrap_or("of the guest"))
    }

    /// The TLS connection has ended.
    pub(super) fn ended(&self, cause: Option<String>) -> Error {
        let cause = cause.map(|cause| format!(" (TLS: {cause})")).unwrap_or_default();
        self.lost(format!("the source closed it{cause}"))
    }

    pub(super) fn lost(&self, what: String) -> Error {
        Error::Lost { side: "source", lane: self.name.clone(), what }
    }
}

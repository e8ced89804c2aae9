//! Connections that have not said yet what they are for.
//!
//! Whoever can reach the port can open one: they are few ([`LOBBY_MAX`]), each may say one line, and has
//! [`HELLO_TIMEOUT`] for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use super::protocol::{Line, Read, Request, read_hello, refusal, send_line};
use crate::transport::lane::HELLO_TIMEOUT;

/// Connections that wait at a time: all lanes of a test in both directions, and a few strangers.
const LOBBY_MAX: usize = 2 * (umem_wire::limits::LANES_MAX as usize + 1) + 16;

#[derive(Default)]
pub(super) struct Lobby {
    /// In the order in which they came.
    waiting: Vec<Waiting>,
}

struct Waiting {
    socket: OwnedFd,
    line: Line,
    deadline: Instant,
}

impl Lobby {
    /// Lets somebody in; when it is full whoever has waited longest has to go.
    pub(super) fn admit(&mut self, socket: OwnedFd) {
        if self.waiting.len() == LOBBY_MAX {
            self.show_out();
        }
        let deadline = Instant::now() + HELLO_TIMEOUT;
        self.waiting.push(Waiting { socket, line: Line::default(), deadline });
    }

    /// Shows out whoever has waited longest: false if nobody waits.
    pub(super) fn show_out(&mut self) -> bool {
        let is_somebody = !self.waiting.is_empty();
        self.waiting.drain(..usize::from(is_somebody));
        is_somebody
    }

    /// Shows out those whose time is up.
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        self.waiting.retain(|waiting| waiting.deadline > now);
    }

    /// When the next one's time is up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.first().map(|waiting| waiting.deadline)
    }

    pub(super) fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.waiting.iter().map(|waiting| waiting.socket.as_fd())
    }

    /// Hears one of [`Lobby::sockets`] out: what it is for, once it has said so. Strangers are told, and
    /// shown out.
    pub(super) fn hear(&mut self, index: usize) -> Option<(OwnedFd, Request)> {
        let waiting = &mut self.waiting[index];
        let said = match waiting.line.read(waiting.socket.as_fd()) {
            Read::Partial => return None,
            Read::Whole(line) => read_hello(&line),
            Read::TooLong => Err("only `umem bench client` is served here".into()),
            Read::Closed => Err(String::new()),
        };
        let Waiting { socket, .. } = self.waiting.remove(index);
        match said {
            Ok(request) => Some((socket, request)),
            Err(text) => {
                refuse(socket, &text);
                None
            }
        }
    }
}

/// Turns a connection away, with the reason.
#[expect(clippy::needless_pass_by_value, reason = "the connection ends here")]
pub(super) fn refuse(socket: OwnedFd, text: &str) {
    // Who has gone, or does not read, needs no answer.
    let _ = send_line(socket.as_fd(), &refusal(text));
}

//! Connections that have not sent their hello.
//!
//! Any peer that reaches the port can open one: they are few ([`LOBBY_MAX`]), each may send one line, and has
//! [`HELLO_TIMEOUT`] for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use super::protocol::{Line, Read, Request, read_hello, refusal, send_line};
use crate::transport::lane::HELLO_TIMEOUT;

/// The most connections that wait at a time: all lanes of a test in both directions, and a few others.
const LOBBY_MAX: usize = 2 * (umem_wire::limits::LANES_MAX as usize + 1) + 16;

#[derive(Default)]
pub(super) struct Lobby {
    /// In the order of arrival.
    waiting: Vec<Waiting>,
}

struct Waiting {
    socket: OwnedFd,
    line: Line,
    deadline: Instant,
}

impl Lobby {
    /// Adds a connection; if the lobby is full, the oldest is dropped.
    pub(super) fn admit(&mut self, socket: OwnedFd) {
        if self.waiting.len() == LOBBY_MAX {
            self.show_out();
        }
        let deadline = Instant::now() + HELLO_TIMEOUT;
        self.waiting.push(Waiting { socket, line: Line::default(), deadline });
    }

    /// Drops the oldest connection: false if there is none.
    pub(super) fn show_out(&mut self) -> bool {
        let is_somebody = !self.waiting.is_empty();
        self.waiting.drain(..usize::from(is_somebody));
        is_somebody
    }

    /// Drops connections past their deadline.
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        self.waiting.retain(|waiting| waiting.deadline > now);
    }

    /// The next deadline.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.first().map(|waiting| waiting.deadline)
    }

    pub(super) fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.waiting.iter().map(|waiting| waiting.socket.as_fd())
    }

    /// Reads from one of [`Lobby::sockets`]: returns its purpose once its hello is complete. Foreign peers get an error
    /// and are dropped.
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

/// Rejects a connection with the reason.
#[expect(clippy::needless_pass_by_value, reason = "the connection ends here")]
pub(super) fn refuse(socket: OwnedFd, text: &str) {
    // A peer that has gone or does not read needs no answer.
    let _ = send_line(socket.as_fd(), &refusal(text));
}

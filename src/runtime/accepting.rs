//! Results of accept(2), and the pause of a listener that has no room for one more connection.
//!
//! A connection for which the process has no descriptor or the machine no memory stays in its
//! listener's queue, and the listener stays readable: a loop that polled it again would spin. No
//! event reports free room, because any process may use up descriptors and memory. So such a
//! listener pauses for [`ROOM_INTERVAL`].

use std::io;
use std::time::{Duration, Instant};

/// How often a pausing listener is tried again.
pub(crate) const ROOM_INTERVAL: Duration = Duration::from_millis(100);

/// The result for a waiting connection.
pub(crate) enum Accepted<T> {
    One(T),
    /// The peer has closed it.
    Gone,
    /// There is no descriptor or no memory for it. It still waits.
    NoRoom(io::Error),
}

impl<T> Accepted<T> {
    /// Sorts the result of accept(2).
    ///
    /// # Errors
    /// Errors of the listener itself: it is not listening, or no longer.
    pub(crate) fn of(accepted: io::Result<T>) -> io::Result<Accepted<T>> {
        /// Errors of accept(2) that concern a connection that failed before it was accepted.
        const OF_CONNECTION: [i32; 14] = [
            libc::EAGAIN,
            libc::EINTR,
            libc::ECONNABORTED,
            libc::ECONNRESET,
            libc::ETIMEDOUT,
            libc::EPROTO,
            libc::EPERM,
            libc::ENETDOWN,
            libc::ENOPROTOOPT,
            libc::EHOSTDOWN,
            libc::ENONET,
            libc::EHOSTUNREACH,
            libc::EOPNOTSUPP,
            libc::ENETUNREACH,
        ];
        const OF_ROOM: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
        match accepted {
            Ok(one) => Ok(Accepted::One(one)),
            Err(error) => match error.raw_os_error() {
                Some(errno) if OF_CONNECTION.contains(&errno) => Ok(Accepted::Gone),
                Some(errno) if OF_ROOM.contains(&errno) => Ok(Accepted::NoRoom(error)),
                _ => Err(error),
            },
        }
    }
}

/// Whether a listener pauses.
#[derive(Debug, Default)]
pub(crate) struct Room {
    /// The end of its pause.
    until: Option<Instant>,
}

impl Room {
    /// Notes a lack of room at this moment.
    pub(crate) fn lacked(&mut self, now: Instant) {
        self.until = Some(now + ROOM_INTERVAL);
    }

    /// The end of the pause; none if there is no pause.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(errno: i32) -> io::Result<Accepted<()>> {
        Accepted::of(Err(io::Error::from_raw_os_error(errno)))
    }

    #[test]
    fn only_errors_of_the_listener_itself_are_errors() {
        for errno in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM] {
            assert!(matches!(of(errno), Ok(Accepted::NoRoom(_))), "errno {errno}");
        }
        for errno in [libc::EAGAIN, libc::EINTR, libc::ECONNABORTED, libc::EPERM] {
            assert!(matches!(of(errno), Ok(Accepted::Gone)), "errno {errno}");
        }
        for errno in [libc::EBADF, libc::EINVAL] {
            assert!(of(errno).is_err(), "errno {errno}");
        }
        assert!(matches!(Accepted::of(Ok(1)), Ok(Accepted::One(1))));
    }

    #[test]
    fn listener_without_room_pauses_for_the_interval() {
        let (mut room, now) = (Room::default(), Instant::now());
        assert_eq!(room.deadline(now), None);
        room.lacked(now);
        assert_eq!(room.deadline(now), Some(now + ROOM_INTERVAL));
        assert_eq!(room.deadline(now + ROOM_INTERVAL), None);
    }
}

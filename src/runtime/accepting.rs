//! What accept(2) says, and how a listener waits for room for one more connection.
//!
//! A connection for which the process has no descriptor or the machine no memory stays in its listener's queue, and
//! the listener stays readable: a loop that polled it again would do nothing else. No event tells when there is room,
//! because descriptors and memory may be anybody's. So such a listener is left alone for [`ROOM_INTERVAL`].

use std::io;
use std::time::{Duration, Instant};

/// How often it is tried whether there is room.
pub(crate) const ROOM_INTERVAL: Duration = Duration::from_millis(100);

/// What has become of a connection that waited.
pub(crate) enum Accepted<T> {
    One(T),
    /// Whoever has dialled has gone again.
    Gone,
    /// There is no descriptor or no memory for it. It still waits.
    NoRoom(io::Error),
}

impl<T> Accepted<T> {
    /// Sorts what accept(2) has returned.
    ///
    /// # Errors
    /// What tells of the listener: it is none, or none any more.
    pub(crate) fn of(accepted: io::Result<T>) -> io::Result<Accepted<T>> {
        /// What accept(2) returns of a connection that has failed before it was accepted.
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

/// Whether a listener is to be listened to.
#[derive(Debug, Default)]
pub(crate) struct Room {
    /// It is left alone until then.
    until: Option<Instant>,
}

impl Room {
    /// There was none at this moment.
    pub(crate) fn lacked(&mut self, now: Instant) {
        self.until = Some(now + ROOM_INTERVAL);
    }

    /// When it is worth another try; none if it is now.
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
    fn a_lack_of_room_ends_no_listener_and_what_is_wrong_with_it_does() {
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
    fn a_listener_without_room_is_left_alone_for_a_while() {
        let (mut room, now) = (Room::default(), Instant::now());
        assert_eq!(room.deadline(now), None);
        room.lacked(now);
        assert_eq!(room.deadline(now), Some(now + ROOM_INTERVAL));
        assert_eq!(room.deadline(now + ROOM_INTERVAL), None);
    }
}

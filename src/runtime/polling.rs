//! poll(2), also for more descriptors than the process may open now.
//!
//! poll(2) fails with EINVAL then, and with ENOMEM if the machine has no memory for the call. An
//! administrator may lower the limit of a running process, and neither error concerns the
//! descriptors, so no migration may end by them.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollTimeout};

/// How often descriptors are polled one by one.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until a descriptor is ready: the number of ready descriptors, 0 after the timeout.
///
/// # Errors
/// EINTR after a signal.
pub(crate) fn poll(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> nix::Result<i32> {
    #[expect(clippy::disallowed_methods, reason = "all other code calls this function")]
    let asked = nix::poll::poll(fds, timeout);
    match asked {
        Err(Errno::EINVAL | Errno::ENOMEM) => Ok(poll_each(fds, timeout)),
        asked => asked,
    }
}

/// The same with one call a descriptor. A descriptor that cannot be polled is not ready.
fn poll_each(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> i32 {
    // Negative: no limit.
    let millis = u64::try_from(i32::from(timeout)).ok();
    let deadline = millis.map(|millis| Instant::now() + Duration::from_millis(millis));
    loop {
        let mut ready = 0;
        for fd in fds.chunks_mut(1) {
            #[expect(clippy::disallowed_methods, reason = "all other code calls this function")]
            let asked = nix::poll::poll(fd, PollTimeout::ZERO);
            ready += asked.unwrap_or(0);
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if ready > 0 || left == Some(Duration::ZERO) {
            return ready;
        }
        std::thread::sleep(left.unwrap_or(LOOK_INTERVAL).min(LOOK_INTERVAL));
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::poll::PollFlags;

    use super::*;

    /// The fallback itself: a lowered limit would affect the tests beside this one as well.
    #[test]
    fn poll_each_finds_ready_descriptors() {
        let (mut here, there) = UnixStream::pair().unwrap();
        let (quiet, _other) = UnixStream::pair().unwrap();
        let mut fds = [&quiet, &there].map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN));
        let began = Instant::now();
        assert_eq!(poll_each(&mut fds, PollTimeout::from(20_u8)), 0);
        assert!(began.elapsed() >= Duration::from_millis(20));
        let writer = std::thread::spawn(move || here.write_all(b"x").map(|()| here));
        assert_eq!(poll_each(&mut fds, PollTimeout::NONE), 1);
        assert_eq!(fds[0].revents(), Some(PollFlags::empty()));
        assert_eq!(fds[1].revents(), Some(PollFlags::POLLIN));
        writer.join().unwrap().unwrap();
    }
}

//! poll(2), also where it polls more descriptors than the process may open now.
//!
//! It answers EINVAL then, and ENOMEM where the machine has no memory for the call. An administrator may lower the
//! limit of a process that runs, and neither says anything of the descriptors: no migration may end by it.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollTimeout};

/// How often descriptors are looked at one by one.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until a descriptor is ready: how many are, 0 when none was in time.
///
/// # Errors
/// EINTR after a signal.
pub(crate) fn poll(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> nix::Result<i32> {
    #[expect(clippy::disallowed_methods, reason = "it is what everybody else calls")]
    let asked = nix::poll::poll(fds, timeout);
    match asked {
        Err(Errno::EINVAL | Errno::ENOMEM) => Ok(poll_each(fds, timeout)),
        asked => asked,
    }
}

/// The same, one descriptor a call. One that cannot be polled is not ready.
fn poll_each(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> i32 {
    // Negative: none.
    let millis = u64::try_from(i32::from(timeout)).ok();
    let deadline = millis.map(|millis| Instant::now() + Duration::from_millis(millis));
    loop {
        let mut ready = 0;
        for fd in fds.chunks_mut(1) {
            #[expect(clippy::disallowed_methods, reason = "it is what everybody else calls")]
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

    /// What it does below a limit; a limit itself would be that of the tests beside this one as well.
    #[test]
    fn descriptors_are_polled_one_by_one() {
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

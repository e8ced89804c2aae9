//! The size of a lane's batches and of its queue in the kernel.
//!
//! A request for a claimed and unsent page waits for its batch, so batches should be small; but a lane without queued
//! data idles while its thread does something else. Both limits are times, not bytes: [`PACE`] at the lane's rate.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::transport::lane::setsockopt_raw;

/// The duration of a batch; twice as much is queued in the kernel behind it. With 256 KiB at any
/// rate a lane into huge pages stayed at 37 Gbit/s; with 1 MiB it had 47.
const PACE: Duration = Duration::from_micros(200);

/// Fewest bytes of pages in a batch: enough to hide the cost of a send, and 0.2 ms at 10 Gbit/s.
pub(in crate::source) const BATCH_BYTES_MIN: u64 = 256 << 10;

/// Most bytes of pages in a batch: 0.2 ms at 40 Gbit/s.
const BATCH_BYTES_MAX: u64 = 1 << 20;

/// How often the rate is measured.
const INTERVAL: Duration = Duration::from_millis(2);

/// The size of one lane's batches.
pub(in crate::source) struct Pace {
    /// None if the kernel's queue is not set and batches stay small.
    socket: Option<Arc<OwnedFd>>,
    batch_bytes: u64,
    since: Instant,
    bytes: u64,
}

impl Pace {
    /// For a lane over TCP; none for other lanes.
    pub(in crate::source) fn new(socket: Option<Arc<OwnedFd>>) -> Pace {
        Pace { socket, batch_bytes: BATCH_BYTES_MIN, since: Instant::now(), bytes: 0 }
    }

    /// Bytes of pages for the next batch.
    pub(in crate::source) fn batch_bytes(&self) -> u64 {
        self.batch_bytes
    }

    /// Counts a batch of `bytes` that has been sent.
    pub(in crate::source) fn sent(&mut self, bytes: u64) {
        self.bytes += bytes;
        let elapsed = self.since.elapsed();
        if elapsed < INTERVAL {
            return;
        }
        let wanted = batch_bytes(self.bytes, elapsed);
        (self.bytes, self.since) = (0, Instant::now());
        let Some(socket) = &self.socket else { return };
        if wanted.abs_diff(self.batch_bytes) <= self.batch_bytes / 4 {
            return;
        }
        if queue(socket, 2 * wanted) {
            self.batch_bytes = wanted;
        } else {
            self.socket = None;
        }
    }
}

/// The bytes of [`PACE`] at the rate of `bytes` in `elapsed`, within the limits.
fn batch_bytes(bytes: u64, elapsed: Duration) -> u64 {
    let rate = bytes as f64 / elapsed.as_secs_f64().max(1e-9);
    ((rate * PACE.as_secs_f64()) as u64).clamp(BATCH_BYTES_MIN, BATCH_BYTES_MAX)
}

/// Sets how many unsent bytes the kernel queues. False if the socket has no such option, or is
/// closed.
fn queue(socket: &OwnedFd, bytes: u64) -> bool {
    let bytes = u32::try_from(bytes).expect("twice the largest batch");
    setsockopt_raw(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, bytes).is_ok()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn batch_size_follows_the_rate_within_its_limits() {
        let ms = Duration::from_millis(1);
        // 10, 20 and 100 Gbit/s.
        assert_eq!(batch_bytes(1_250_000, ms), BATCH_BYTES_MIN);
        assert_eq!(batch_bytes(2_500_000, ms), 500_000);
        assert_eq!(batch_bytes(12_500_000, ms), BATCH_BYTES_MAX);
        assert_eq!(batch_bytes(0, ms), BATCH_BYTES_MIN);
    }

    #[test]
    fn kernel_queue_is_twice_the_batch() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = Arc::new(OwnedFd::from(socket));
        let mut pace = Pace::new(Some(socket.clone()));
        let long_ago = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
        pace.since = long_ago;
        // 100 Gbit/s.
        pace.sent(12_500_000_000);
        assert_eq!(pace.batch_bytes(), BATCH_BYTES_MAX);
        let mut bytes: u32 = 0;
        let mut length = size_of_val(&bytes) as libc::socklen_t;
        // SAFETY: the kernel writes at most four bytes to a local variable.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_NOTSENT_LOWAT,
                (&raw mut bytes).cast(),
                &raw mut length,
            )
        };
        assert_eq!((result, u64::from(bytes)), (0, 2 * BATCH_BYTES_MAX));
        // A lane that is not TCP keeps small batches.
        let mut pace = Pace::new(None);
        pace.since = long_ago;
        pace.sent(12_500_000_000);
        assert_eq!(pace.batch_bytes(), BATCH_BYTES_MIN);
    }
}

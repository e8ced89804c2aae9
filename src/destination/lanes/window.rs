//! Bounds the bytes of a bulk lane that are in flight.
//!
//! A demanded page that is already in flight in the background cannot arrive sooner: it queues behind everything before
//! it. The kernel lets a receive buffer grow (tcp_rmem, often to megabytes) as long as that may make a connection
//! faster. On a short path the larger buffer does not help and only fills: it held 24 MB of a lane over loopback. So
//! the buffer is set to the size that the path needs: twice the round-trip time at the rate at which pages arrive, plus
//! the bytes that arrive while a thread of either side does other work.
//!
//! Setting it takes CAP_NET_ADMIN, or room below `net.core.rmem_max`. Without either, and on a path that needs more
//! than that, the kernel's own choice stays.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use crate::transport::lane::{Lane, setsockopt_raw};

/// The smallest window, bytes: 100 µs of a lane at 40 Gbit/s.
const WINDOW_BYTES_MIN: u64 = 512 << 10;

/// The largest window: 40 Gbit/s over 50 ms.
const WINDOW_BYTES_MAX: usize = 256 << 20;

/// Allowance for the time in which the lane's thread, or the source's, does other work.
const PAUSE: Duration = Duration::from_micros(500);

/// The shortest interval of adjustments; on a longer path a change takes effect after two round trips.
const INTERVAL: Duration = Duration::from_millis(2);

/// Bounds the window of one lane's connection, from the thread that receives.
pub(in crate::destination) struct Window {
    /// None if there is nothing to bound: no TCP, or a path of unknown round-trip time.
    socket: Option<Arc<OwnedFd>>,
    /// The shortest round-trip time seen.
    path: Duration,
    /// Bytes of the lane received by then.
    seen: (Instant, u64),
    /// The last window set, bytes.
    offered: usize,
}

impl Window {
    /// For a lane whose hello has been answered, so that the round-trip time is known.
    pub(in crate::destination) fn new(lane: &Lane) -> Window {
        let socket = lane.socket();
        let info = TcpInfo::of(&socket).filter(TcpInfo::has_path);
        let mut window = Window {
            path: info.as_ref().map_or(Duration::ZERO, TcpInfo::path),
            seen: (Instant::now(), info.as_ref().map_or(0, |info| info.bytes_received)),
            offered: 0,
            socket: info.is_some().then_some(socket),
        };
        window.offer(WINDOW_BYTES_MIN);
        window
    }

    /// Adjusts the window, if it is time. Call after each receive.
    pub(in crate::destination) fn adapt(&mut self) {
        let Some(socket) = &self.socket else { return };
        let (since, bytes) = self.seen;
        let elapsed = since.elapsed();
        if elapsed < INTERVAL.max(2 * self.path) {
            return;
        }
        let Some(info) = TcpInfo::of(socket) else { return };
        self.path = self.path.min(info.path());
        self.seen = (Instant::now(), info.bytes_received);
        let arrived = info.bytes_received.saturating_sub(bytes);
        self.offer(needed(arrived, elapsed, self.path));
    }

    fn offer(&mut self, bytes: u64) {
        let Some(socket) = &self.socket else { return };
        let wanted = usize::try_from(bytes).unwrap_or(usize::MAX).min(WINDOW_BYTES_MAX);
        // The kernel doubles the value, for its own bookkeeping (socket(7)).
        let there_is = getsockopt(socket, sockopt::RcvBuf).unwrap_or(0) / 2;
        let wanted = wanted.max(there_is);
        // Never less than before: bytes in flight would be dropped without room, and retransmitted only after 200 ms.
        if wanted <= self.offered + self.offered / 4 {
            return;
        }
        // Without the privilege the kernel may set less than requested, and less than before.
        let may_ask = self.offered > 0 || there_is as u64 <= WINDOW_BYTES_MIN;
        self.offered = wanted;
        let asked = match setsockopt(socket, sockopt::RcvBufForce, &wanted) {
            Err(_) if may_ask => setsockopt(socket, sockopt::RcvBuf, &wanted),
            forced => forced,
        };
        let is_enough = asked.is_ok()
            && getsockopt(socket, sockopt::RcvBuf).is_ok_and(|bytes| bytes >= 2 * wanted);
        if !is_enough {
            let_the_kernel_choose(socket);
            self.socket = None;
        }
    }
}

/// Clears the request for a receive buffer, so that the kernel may grow it again (SO_BUF_LOCK, since Linux 5.14;
/// earlier kernels cannot).
fn let_the_kernel_choose(socket: &OwnedFd) {
    let _ = setsockopt_raw(socket.as_fd(), libc::SOL_SOCKET, libc::SO_BUF_LOCK, 0);
}

/// The window for this round-trip time at this rate: twice their product, so that a window that was too small doubles.
fn needed(bytes: u64, elapsed: Duration, path: Duration) -> u64 {
    let rate = bytes as f64 / elapsed.as_secs_f64().max(1e-9);
    let needed = rate * (2 * path + PAUSE).as_secs_f64();
    (needed as u64).max(WINDOW_BYTES_MIN)
}

/// The kernel's `struct tcp_info` (include/uapi/linux/tcp.h), up to the fields used.
#[repr(C)]
struct TcpInfo {
    before: [u8; 128],
    bytes_received: u64,
    between: [u8; 12],
    /// All ones if none has been seen.
    min_rtt_us: u32,
}
const _: () = assert!(size_of::<TcpInfo>() == 152);

impl TcpInfo {
    /// None for a socket other than TCP, or a kernel that reports less.
    fn of(socket: &OwnedFd) -> Option<TcpInfo> {
        let mut info =
            TcpInfo { before: [0; 128], bytes_received: 0, between: [0; 12], min_rtt_us: 0 };
        let mut length = size_of_val(&info) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to a local variable of plain numbers.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut length,
            )
        };
        (result == 0 && length as usize == size_of::<TcpInfo>()).then_some(info)
    }

    fn has_path(&self) -> bool {
        self.min_rtt_us != u32::MAX
    }

    fn path(&self) -> Duration {
        Duration::from_micros(self.min_rtt_us.into())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    const MIB: u64 = 1 << 20;
    const PASSED_BYTES: usize = 256 << 20;

    #[test]
    fn short_path_keeps_a_small_buffer_and_long_path_doubles_it_until_sufficient() {
        let ms = Duration::from_millis;
        // 10 Gbit/s with a round-trip time of 50 µs.
        let short = needed(1250 * 1000, ms(1), Duration::from_micros(50));
        assert!((WINDOW_BYTES_MIN..MIB).contains(&short), "{short}");
        // 10 Gbit/s over 20 ms take 25 MB, and each adjustment measures the bytes that the window let through.
        let (path, full) = (ms(20), 25_000_000);
        let mut window = WINDOW_BYTES_MIN;
        let mut looks = 0;
        while window < full {
            let arrived = window.min(full);
            window = needed(arrived, path, path);
            looks += 1;
            assert!(looks < 8, "{window} after {looks} looks");
        }
        assert!(needed(full, path, path) < 3 * full);
    }

    /// A source whose lane is not read has sent no more than the window.
    #[test]
    fn bytes_in_flight_are_bounded() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut destination, _) = listener.accept().unwrap();
        source.write_all(&[1]).unwrap();
        source.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        destination.read_exact(&mut [0]).unwrap();
        let lane =
            Lane::new(destination.try_clone().unwrap().into(), "bulk lane 1".into()).unwrap();
        let mut window = Window::new(&lane);
        assert!(window.socket.is_some(), "loopback has a path");
        // Far more than the window, as fast as possible: that makes the kernel's buffers grow.
        let writer = std::thread::spawn(move || {
            let chunk = vec![0; 256 << 10];
            let mut sent = 0;
            while sent < 2 * PASSED_BYTES {
                match source.write(&chunk) {
                    Ok(count) => sent += count,
                    // The reader has closed the lane.
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                }
            }
        });
        let mut chunk = vec![0; MIB as usize];
        let (mut passed, mut most_offered) = (0, 0);
        while passed < PASSED_BYTES {
            passed += destination.read(&mut chunk).unwrap();
            window.adapt();
            most_offered = most_offered.max(window.offered);
        }
        writer.join().unwrap();
        // The lane's next thread does not shrink its window.
        let buffer = || getsockopt(&lane.socket(), sockopt::RcvBuf).unwrap();
        let had = buffer();
        Window::new(&lane);
        assert!(buffer() >= had, "{} of {had} bytes", buffer());
        let mut waiting: libc::c_int = 0;
        // SAFETY: the request writes an int to a local variable.
        let result =
            unsafe { libc::ioctl(destination.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
        assert_eq!(result, 0);
        let waiting = u64::try_from(waiting).unwrap();
        // The kernel's bookkeeping takes less than assumed.
        let most = 2 * most_offered as u64;
        assert!(waiting > 0 && waiting <= most, "{waiting} bytes wait, {most} were offered");
    }

    #[test]
    fn socket_other_than_tcp_has_no_window() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let lane = Lane::new(ours.into(), "bulk lane 1".into()).unwrap();
        let mut window = Window::new(&lane);
        assert!(window.socket.is_none());
        window.adapt();
    }
}

//! The work of a lane's thread: sends or lands pages pass by pass, or moves bytes that are discarded.
//!
//! Each continues until its last byte, or until its socket is shut down.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::SyncSender;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use nix::sys::stat::Mode;

use super::memory::Landing;
use super::passes::Passes;
use super::protocol::Test;
use crate::destination::faults::serving::Servers;
use crate::destination::lanes::acks::Acks;
use crate::error::{Context, Error, Result};
use crate::runtime::cores::Place;
use crate::runtime::inbox::Inbox;
use crate::runtime::polling::poll;
use crate::runtime::worker::Started;
use crate::source::memory::SourceMemory;
use crate::transport::lane::Lane;
use crate::{destination, source};

/// Bytes of one sendfile call; also the size of the file that is sent repeatedly.
const SEND_BYTES: usize = 1 << 20;

/// Bytes of the receive buffer: it stays in the processor's cache.
const HOT_BYTES: usize = 256 << 10;

/// A connection of a test, counted from 0, with the requested congestion control.
pub(super) fn lane(socket: OwnedFd, index: u16, test: &Test) -> Result<Lane> {
    let (each, congestion) = (test.connections_each(), test.congestion.as_deref());
    let back = if test.bidir && index >= each { " back" } else { "" };
    let name = match index % each {
        index if index == test.lanes => format!("fault lane{back}"),
        index => format!("bench lane {}{back}", index + 1),
    };
    let mut lane = Lane::new(socket, name)?;
    if let Some(name) = congestion.filter(|_| lane.congestion.is_some()) {
        setsockopt(&lane, sockopt::TcpCongestion, &name.into()).map_err(|errno| {
            Error::Bench(format!(
                "no congestion control {name} here ({}): choose one that sysctl \
                 net.ipv4.tcp_allowed_congestion_control lists, or load its module",
                errno.desc()
            ))
        })?;
        lane.congestion = Some(name.to_owned());
    }
    Ok(lane)
}

/// Lets the kernel queue any amount. Lanes have it queue little, because the order of pages may still change; discarded
/// bytes have no order.
pub(super) fn queue_freely(lane: &Lane) -> Result<()> {
    if lane.congestion.is_none() {
        return Ok(());
    }
    lane.set_queue_bytes(u32::MAX).context(|| lane.name.clone())
}

/// TCP segments that a lane has retransmitted; None for other sockets.
pub(super) fn retransmits(lane: &Lane) -> Option<u64> {
    lane.congestion.as_ref()?;
    // SAFETY: plain numbers, for which zeroes are valid.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to a local variable.
    let result = unsafe {
        libc::getsockopt(
            lane.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    (result == 0).then_some(info.tcpi_total_retrans.into())
}

/// A lane's part in sending pages.
pub(super) struct SendPages {
    pub(super) lane: Lane,
    pub(super) index: u16,
    pub(super) lanes: u16,
    pub(super) core: Place,
    pub(super) zero_copy: bool,
    pub(super) passes: Arc<Passes<SourceMemory>>,
}

impl SendPages {
    pub(super) fn run(self) -> Result<()> {
        let mut is_copied = false;
        for pass in 0.. {
            let Some(memory) = self.passes.enter(pass)? else {
                return Ok(());
            };
            // Measurements of the path carry over from the first pass.
            memory.zero_copy_is_copied.fetch_or(is_copied, Relaxed);
            // The order channel is unused.
            let (_, orders) = std::sync::mpsc::channel();
            source::lanes::bulk::BulkLane {
                lane: self.lane.clone(),
                orders,
                has_rounds: false,
                memory: memory.clone(),
                index: self.index.into(),
                lanes: self.lanes.into(),
                core: self.core.again(),
                zero_copy: self.zero_copy,
                // The end of a pass has no receiver.
                post: Inbox::new()?.post(),
            }
            .run(Started::unheard())?;
            is_copied = memory.zero_copy_is_copied.load(Relaxed);
            drop(memory);
            self.passes.leave(pass);
        }
        Ok(())
    }
}

/// A lane's part in landing pages.
pub(super) struct LandPages {
    pub(super) lane: Lane,
    pub(super) core: Place,
    pub(super) passes: Arc<Passes<Landing>>,
    /// Frees memory.
    pub(super) retire: SyncSender<Arc<Landing>>,
}

impl LandPages {
    pub(super) fn run(self) -> Result<()> {
        let mut ahead = None;
        for pass in 0.. {
            let Some(landing) = self.passes.enter(pass)? else {
                return Ok(());
            };
            let lane = destination::lanes::bulk::BulkLane {
                lane: self.lane.clone(),
                regions: landing.table.clone(),
                acks: Acks::new(false),
                guest: landing.guest.clone(),
                core: self.core.again(),
                // No thread waits for a page.
                servers: Servers::new(Vec::new()),
                ahead: ahead.take(),
                post: Inbox::new()?.post(),
            };
            ahead = lane.pass(Started::unheard())?;
            drop(landing);
            if let Some(landing) = self.passes.leave(pass) {
                // Fails only if that thread has failed, which posts the reason.
                let _ = self.retire.send(landing);
            }
        }
        Ok(())
    }
}

/// Sends `bytes`, or without end, from a file that stays in the cache.
pub(super) fn send_any(lane: &Lane, bytes: Option<u64>, sent: &AtomicU64) -> Result<()> {
    let file = any_file()?;
    let lane = Polled::new(lane)?;
    lane.all(bytes, sent, PollFlags::POLLOUT, |length| {
        nix::sys::sendfile::sendfile(lane.0, &file, Some(&mut 0), length.min(SEND_BYTES))
    })
}

/// Receives `bytes`, or without end, into a buffer that stays in the cache.
pub(super) fn receive_any(lane: &Lane, bytes: Option<u64>, received: &AtomicU64) -> Result<()> {
    let mut buffer = vec![0; HOT_BYTES];
    let lane = Polled::new(lane)?;
    lane.all(bytes, received, PollFlags::POLLIN, |length| {
        let room = &mut buffer[..length.min(HOT_BYTES)];
        nix::sys::socket::recv(lane.0.as_fd().as_raw_fd(), room, MsgFlags::empty())
    })
}

/// A file of [`SEND_BYTES`] with arbitrary contents. A file on a disk's file system, as with iperf3: its cached pages
/// come in larger pieces than those of a memfd, which costs both ends a third less. Without one, a memfd.
fn any_file() -> Result<File> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let contents = vec![0xa5; SEND_BYTES];
    if let Ok(file) = open(&std::env::temp_dir(), flags, Mode::S_IRUSR | Mode::S_IWUSR) {
        let file = File::from(file);
        if file.write_all_at(&contents, 0).is_ok() {
            return Ok(file);
        }
    }
    let file = memfd_create(c"umem-bench", MFdFlags::MFD_CLOEXEC).context(|| "making a memfd")?;
    let file = File::from(file);
    file.write_all_at(&contents, 0).context(|| "filling a memory file")?;
    Ok(file)
}

/// A lane whose readiness is polled. A call that blocks is slower over loopback: the sender that fills the socket's
/// queue sleeps, and the receiver's core does the work of sending, too.
struct Polled<'a>(&'a Lane);

impl<'a> Polled<'a> {
    fn new(lane: &'a Lane) -> Result<Polled<'a>> {
        fcntl(lane, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context(|| lane.name.clone())?;
        Ok(Polled(lane))
    }

    /// Repeats `call` with the number of bytes left, until there are none.
    fn all(
        &self,
        bytes: Option<u64>,
        moved: &AtomicU64,
        ready: PollFlags,
        mut call: impl FnMut(usize) -> nix::Result<usize>,
    ) -> Result<()> {
        let mut left = bytes.unwrap_or(u64::MAX);
        while left > 0 {
            match call(usize::try_from(left).unwrap_or(usize::MAX)) {
                Ok(0) => return Err(lost(self.0, "the other side closed it")),
                Ok(count) => {
                    moved.fetch_add(count as u64, Relaxed);
                    left -= count as u64;
                }
                Err(Errno::EAGAIN) => {
                    match poll(&mut [PollFd::new(self.0.as_fd(), ready)], PollTimeout::NONE) {
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(errno) => return Err(lost(self.0, errno.desc())),
                    }
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(lost(self.0, errno.desc())),
            }
        }
        Ok(())
    }
}

fn lost(lane: &Lane, what: &str) -> Error {
    Error::Bench(format!("{} was lost: {what}", lane.name))
}

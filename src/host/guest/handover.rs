//! Hand-over of anonymous memory to `umem incoming --handoff SOCKET`, by the process that has the memory.
//!
//! Another process cannot map anonymous memory. So the process itself makes the userfaultfd, registers its memory and
//! sends the descriptor, as Firecracker does. The message is Firecracker's with a name and `"umem":2`, which states
//! that this process carries out the commands of the preload object (`src/preload/src/lib.rs` has the table), on a
//! thread of its own.
//!
//! The preload object's rules hold here too: the userfaultfds stay open until `release`, so that a thread waits for a
//! missing page and does not read zeroes; no forked child has the memory before `release`; and if the socket closes
//! before `keep`, no guest will arrive and the process ends.

mod commands;
#[cfg(test)]
mod tests;

use std::ffi::c_void;
use std::io::{IoSlice, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

use crate::error::{Context, Error, Result};
use crate::fault::open::{self, Faults};
use crate::memory::kind::Kind;
use crate::runtime::accepting::{Accepted, ROOM_INTERVAL};

use commands::serve;

/// Shards begin at multiples of this, so that no huge page is in two shards.
const SHARD_ALIGNMENT: u64 = 2 << 20;

/// Anonymous memory of this process that has not been touched yet. It must stay mapped until the process ends.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    /// The region's name, the same as at the source.
    pub name: &'a str,
    /// Its address.
    pub start: NonNull<c_void>,
    /// Its size, whole pages.
    pub bytes: u64,
    /// 4 KiB, or 2 MiB if it was mapped with MAP_HUGETLB.
    pub page_bytes: u64,
    /// Number of parts with a userfaultfd of their own, each handed over in its own message.
    pub shards: usize,
}

/// Registers the memory and hands it over. From here on a thread that touches a missing page of it waits.
///
/// # Errors
/// This user may not make a userfaultfd, the kernel lacks a feature, or no process listens at `socket`.
pub fn hand_over(socket: &Path, memory: &Memory<'_>) -> Result<()> {
    let shards = shards(memory)?;
    let stream = UnixStream::connect(socket).map_err(|error| {
        Error::Host(format!(
            "no umem accepts its memory at {}: {error}; start `umem incoming --handoff {}` first",
            socket.display(),
            socket.display()
        ))
    })?;
    let area = memory.area();
    advise(&area, libc::MADV_DONTFORK).context(|| format!("madvise of RAM {}", memory.name))?;
    let uffds: Vec<OwnedFd> =
        shards.iter().map(|shard| protect(memory, shard)).collect::<Result<_>>()?;
    let messages = shards.iter().enumerate();
    let messages: Vec<Value> =
        messages.map(|(index, shard)| message(memory, shard, index + 1 < shards.len())).collect();
    let pieces: Vec<(Value, OwnedFd)> = messages.into_iter().zip(uffds).collect();
    hand_over_pieces(&stream, &pieces).context(|| "handing the guest's memory over")?;
    let held = Arc::new(Held {
        name: memory.name.to_owned(),
        area,
        pieces: Mutex::new(pieces),
        keeps: AtomicBool::new(false),
        session: Mutex::new(None),
    });
    super::thread("umem-commands", move || serve(&stream, &held)).map(drop)
}

impl Memory<'_> {
    /// The range of its addresses.
    fn area(&self) -> Range<u64> {
        let start = self.start.as_ptr().expose_provenance() as u64;
        start..start + self.bytes
    }
}

/// The parts, as offsets in bytes.
fn shards(memory: &Memory<'_>) -> Result<Vec<Range<u64>>> {
    let count = memory.shards as u64;
    let blocks = (memory.bytes / SHARD_ALIGNMENT).max(1);
    if count == 0 || count > blocks {
        return Err(Error::Usage(format!(
            "--shards is 1 to {blocks} for this RAM, one for every 2 MiB at most, not {count}"
        )));
    }
    let begin = |index: u64| match index {
        last if last == count => memory.bytes,
        _ => blocks * index / count * SHARD_ALIGNMENT,
    };
    Ok((0..count).map(|index| begin(index)..begin(index + 1)).collect())
}

fn message(memory: &Memory<'_>, shard: &Range<u64>, more: bool) -> Value {
    let mut region = json!({
        "name": memory.name,
        "base_host_virt_addr": memory.area().start + shard.start,
        "size": shard.end - shard.start,
        "offset": shard.start,
        "page_size": memory.page_bytes,
        "page_size_kib": memory.page_bytes,
        "kind": "anonymous",
        "umem": 2,
    });
    if more {
        region["more"] = json!(true);
    }
    json!([region])
}

fn hand_over_pieces(stream: &UnixStream, pieces: &[(Value, OwnedFd)]) -> std::io::Result<()> {
    pieces.iter().try_for_each(|(message, uffd)| send(stream, message, &[uffd.as_raw_fd()]))
}

/// Sends a line with descriptors.
fn send(stream: &UnixStream, message: &Value, descriptors: &[i32]) -> std::io::Result<()> {
    let line = format!("{message}\n");
    let rights = [ControlMessage::ScmRights(descriptors)];
    let (socket, bytes) = (stream.as_raw_fd(), [IoSlice::new(line.as_bytes())]);
    let sent = sendmsg::<()>(socket, &bytes, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    // The descriptors went with the first byte.
    let mut stream = stream;
    stream.write_all(&line.as_bytes()[sent..])
}

/// Registers this part of the memory with a new userfaultfd.
fn protect(memory: &Memory<'_>, shard: &Range<u64>) -> Result<OwnedFd> {
    let huge = memory.page_bytes > crate::memory::small_page_bytes();
    let features =
        open::EVENT_REMOVE | open::THREAD_ID | if huge { open::MISSING_HUGETLBFS } else { 0 };
    let uffd = create()?;
    open::handshake(&uffd, features).context(
        || "this kernel's userfaultfd lacks EVENT_REMOVE, THREAD_ID or MISSING_HUGETLBFS",
    )?;
    let start = memory.area().start;
    open::register(&uffd, &(start + shard.start..start + shard.end), Kind::Anonymous)
        .context(|| format!("registering RAM {} with userfaultfd", memory.name))?;
    Ok(uffd)
}

/// Not for faults of user mode only: system calls and KVM access the guest's memory too.
fn create() -> Result<OwnedFd> {
    match open::open(Faults::All) {
        Ok((uffd, _)) => Ok(uffd),
        Err(error) => Err(Error::Unsupported(format!(
            "no userfaultfd for the guest's memory: {error}; let its user read and write /dev/userfaultfd, or set \
             `sysctl vm.unprivileged_userfaultfd=1`; `umem doctor` has details"
        ))),
    }
}

/// The memory that has been handed over.
struct Held {
    name: String,
    area: Range<u64>,
    /// Each message with its userfaultfd; empty after the release.
    pieces: Mutex<Vec<(Value, OwnedFd)>>,
    /// The guest may run here.
    keeps: AtomicBool,
    session: Mutex<Option<Arc<Session>>>,
}

/// The state that is kept for a umem that takes over.
struct Session {
    /// The socket to which that umem connects.
    listener: UnixListener,
    /// The state of the guest's pages, and possibly the monitor's socket. This process does not read them.
    kept: Vec<OwnedFd>,
}

impl Held {
    /// The descriptors of a session have arrived: from now on another umem may take over. There is one session at most.
    fn keep_session(self: &Arc<Held>, descriptors: Vec<OwnedFd>) {
        let mut descriptors = descriptors.into_iter();
        let Some(listener) = descriptors.next() else { return };
        let session = Arc::new(Session { listener: listener.into(), kept: descriptors.collect() });
        let mut slot = lock(&self.session);
        if slot.is_some() || session.kept.is_empty() {
            return;
        }
        let (held, accepting) = (self.clone(), session.clone());
        // Without the thread a takeover is impossible, and the guest waits.
        if super::thread("umem-session", move || held.accept(&accepting)).is_ok() {
            *slot = Some(session);
        }
    }

    /// Hands over again to each umem that connects: its predecessor has ended then.
    fn accept(self: &Arc<Held>, session: &Session) {
        loop {
            let accepted = session.listener.accept().map(|(stream, _)| stream);
            let stream = match Accepted::of(accepted) {
                Ok(Accepted::One(stream)) => stream,
                Ok(Accepted::Gone) => continue,
                // The umem that connects waits meanwhile.
                Ok(Accepted::NoRoom(_)) => {
                    std::thread::sleep(ROOM_INTERVAL);
                    continue;
                }
                // Released.
                Err(_) => return,
            };
            let kept: Vec<i32> = session.kept.iter().map(AsRawFd::as_raw_fd).collect();
            let handed = hand_over_pieces(&stream, &lock(&self.pieces))
                .and_then(|()| send(&stream, &json!({ "session": kept.len() }), &kept));
            if handed.is_ok() {
                let held = self.clone();
                // A umem that is not served gives up, and may try again.
                let _ = super::thread("umem-commands", move || serve(&stream, &held));
            }
        }
    }

    /// All memory has arrived: closes the userfaultfds, and returns their number.
    fn release(&self) -> usize {
        let pieces = std::mem::take(&mut *lock(&self.pieces));
        let count = pieces.len();
        drop(pieces);
        // Fails if the process has unmapped some of it meanwhile, which is allowed.
        let _ = advise(&self.area, libc::MADV_DOFORK);
        if let Some(session) = lock(&self.session).take() {
            // SAFETY: no memory is involved; the thread that accepts connections there ends.
            unsafe { libc::shutdown(session.listener.as_raw_fd(), libc::SHUT_RDWR) };
        }
        count
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `madvise` with advice that leaves the contents unchanged.
fn advise(range: &Range<u64>, advice: i32) -> std::io::Result<()> {
    let start =
        std::ptr::with_exposed_provenance_mut(usize::try_from(range.start).expect("64 bits"));
    let length = usize::try_from(range.end - range.start).expect("64 bits");
    // SAFETY: the caller's promise; for unmapped addresses the kernel returns an error.
    match unsafe { libc::madvise(start, length, advice) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

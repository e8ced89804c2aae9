//! Handing anonymous memory over to `umem incoming --handoff SOCKET`, from the process whose memory it
//! is.
//!
//! Nobody else can map anonymous memory, so that the process itself makes the userfaultfd, registers
//! its memory and sends the descriptor away, as Firecracker does. The message is Firecracker's with a
//! name and `"umem":2`, which says that the commands of the preload object are understood here as well
//! (`src/preload/src/lib.rs` has the table): a thread of its own carries them out.
//!
//! What must hold is what holds there: our userfaultfds stay open until `release`, so that a page that
//! never comes is waited for and not read as zeroes; no forked child has the memory before; and if the
//! socket closes before `keep`, no guest will come and the process ends.

use std::ffi::c_void;
use std::io::{IoSlice, IoSliceMut, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde_json::{Value, json};

use crate::error::{Context, Error, Result};
use crate::fault::open::{self, Faults};

/// Shards begin at multiples of this, so that no huge page is in two of them.
const SHARD_ALIGNMENT: u64 = 2 << 20;

/// Longer lines than any command are dropped.
const LINE_BYTES_MAX: usize = 256;

/// Anonymous memory of this process that nobody has touched yet. It must stay mapped until the process
/// ends.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    /// The region's name, the same as at the source.
    pub name: &'a str,
    /// Where it is mapped.
    pub start: NonNull<c_void>,
    /// Its size, whole pages.
    pub bytes: u64,
    /// 4 KiB, or 2 MiB if it was mapped with MAP_HUGETLB.
    pub page_bytes: u64,
    /// How many parts of it get a userfaultfd of their own, each with its own message.
    pub shards: usize,
}

/// Registers the memory and hands it over. From here on whoever touches a missing page of it waits.
///
/// # Errors
/// No userfaultfd for this user or of this kernel, or nobody who listens at `socket`.
pub fn hand_over(socket: &Path, memory: &Memory<'_>) -> Result<()> {
    let shards = shards(memory)?;
    let stream = UnixStream::connect(socket).map_err(|error| {
        Error::Host(format!(
            "nobody takes its memory at {}: {error}; start `umem incoming --handoff {}` first",
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
    /// Its addresses.
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

/// A line with descriptors.
fn send(stream: &UnixStream, message: &Value, descriptors: &[i32]) -> std::io::Result<()> {
    let line = format!("{message}\n");
    let rights = [ControlMessage::ScmRights(descriptors)];
    let (socket, bytes) = (stream.as_raw_fd(), [IoSlice::new(line.as_bytes())]);
    let sent = sendmsg::<()>(socket, &bytes, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    // The descriptors have gone with the first byte.
    let mut stream = stream;
    stream.write_all(&line.as_bytes()[sent..])
}

/// A userfaultfd with which this part of the memory is registered.
fn protect(memory: &Memory<'_>, shard: &Range<u64>) -> Result<OwnedFd> {
    let huge = memory.page_bytes > 4096;
    let features =
        open::EVENT_REMOVE | open::THREAD_ID | if huge { open::MISSING_HUGETLBFS } else { 0 };
    let uffd = create()?;
    open::handshake(&uffd, features).context(
        || "this kernel's userfaultfd lacks EVENT_REMOVE, THREAD_ID or MISSING_HUGETLBFS",
    )?;
    let mut register = uffd::Register {
        start: memory.area().start + shard.start,
        length: shard.end - shard.start,
        mode: uffd::MODE_MISSING,
        ioctls: 0,
    };
    // SAFETY: the structure is the one that the ioctl takes, alive for the call.
    unsafe { uffd::register(uffd.as_raw_fd(), &mut register) }
        .context(|| format!("registering RAM {} with userfaultfd", memory.name))?;
    Ok(uffd)
}

/// Never for faults of user mode only, as system calls and KVM reach the guest's memory too.
fn create() -> Result<OwnedFd> {
    match open::open(Faults::All) {
        Ok((uffd, _)) => Ok(uffd),
        Err(error) => Err(Error::Unsupported(format!(
            "no userfaultfd for the guest's memory: {error}; let its user read and write \
             /dev/userfaultfd, or set `sysctl vm.unprivileged_userfaultfd=1`; `umem doctor` says more"
        ))),
    }
}

mod uffd {
    //! As far as needed here; numbers and layouts are those of `linux/userfaultfd.h`.

    pub(super) const MODE_MISSING: u64 = 1 << 0;

    #[repr(C)]
    pub(super) struct Register {
        pub(super) start: u64,
        pub(super) length: u64,
        pub(super) mode: u64,
        pub(super) ioctls: u64,
    }

    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
}

/// What has been handed over.
struct Held {
    name: String,
    area: Range<u64>,
    /// Each message with its userfaultfd; none any more once they are released.
    pieces: Mutex<Vec<(Value, OwnedFd)>>,
    /// The guest may run here.
    keeps: AtomicBool,
    session: Mutex<Option<Arc<Session>>>,
}

/// What is kept for a umem that takes over.
struct Session {
    /// Where it connects.
    listener: UnixListener,
    /// The state of the guest's pages, and perhaps the monitor's socket: never looked at.
    kept: Vec<OwnedFd>,
}

impl Held {
    /// What a session consists of has come: from now on another umem may take over. One session is all
    /// that there can be.
    fn keep_session(self: &Arc<Held>, descriptors: Vec<OwnedFd>) {
        let mut descriptors = descriptors.into_iter();
        let Some(listener) = descriptors.next() else { return };
        let session = Arc::new(Session { listener: listener.into(), kept: descriptors.collect() });
        let mut slot = lock(&self.session);
        if slot.is_some() || session.kept.is_empty() {
            return;
        }
        let (held, accepting) = (self.clone(), session.clone());
        // Without the thread nobody can take over, and the guest waits.
        if super::thread("umem-session", move || held.accept(&accepting)).is_ok() {
            *slot = Some(session);
        }
    }

    /// Hands over again to each umem that connects: the one before it is gone then.
    fn accept(self: &Arc<Held>, session: &Session) {
        loop {
            let stream = match session.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
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

    /// Everything has come: closes the userfaultfds, and says how many there were.
    fn release(&self) -> usize {
        let pieces = std::mem::take(&mut *lock(&self.pieces));
        let count = pieces.len();
        drop(pieces);
        // Fails where the process has unmapped some of it meanwhile, which is its own affair.
        let _ = advise(&self.area, libc::MADV_DOFORK);
        if let Some(session) = lock(&self.session).take() {
            // SAFETY: no memory is involved; who waits for connections there gives up.
            unsafe { libc::shutdown(session.listener.as_raw_fd(), libc::SHUT_RDWR) };
        }
        count
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Carries out umem's commands until `release`, or until umem is gone.
fn serve(stream: &UnixStream, held: &Arc<Held>) {
    match carry_out(stream, held) {
        Ended::Released => {
            let count = held.release();
            // Nobody is left to tell if this fails.
            let mut stream = stream;
            let _ = writeln!(stream, "{}", json!({ "released": count }));
            let _ = stream.shutdown(Shutdown::Both);
        }
        // The guest runs here: what is missing is waited for, whoever may bring it.
        Ended::Kept => std::mem::forget(held.clone()),
        Ended::Forsaken => {
            // At once: other threads may wait in faults that nobody answers any more. umem has said why.
            std::process::exit(1);
        }
    }
}

/// How it ended with umem.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    Released,
    /// umem has gone after `keep` …
    Kept,
    /// … or before it.
    Forsaken,
}

fn carry_out(stream: &UnixStream, held: &Arc<Held>) -> Ended {
    let mut commands =
        Lines { stream, bytes: Vec::new(), is_skipping: false, descriptors: Vec::new() };
    while let Some(line) = commands.next() {
        let answer = match line.as_slice() {
            b"keep" => {
                held.keeps.store(true, SeqCst);
                continue;
            }
            b"session" => {
                held.keep_session(std::mem::take(&mut commands.descriptors));
                continue;
            }
            b"release" => return Ended::Released,
            b"ping" => json!({ "pong": 1 }),
            line => match parse_touch(line) {
                Some((address, length)) => touch(&held.name, &held.area, address, length),
                None => continue,
            },
        };
        // Nobody reads any more if this fails: then the end of the stream comes next.
        let mut stream = stream;
        let _ = writeln!(stream, "{answer}");
    }
    if held.keeps.load(SeqCst) { Ended::Kept } else { Ended::Forsaken }
}

/// The lines of a stream, and the descriptors that came with them.
struct Lines<'a> {
    stream: &'a UnixStream,
    bytes: Vec<u8>,
    /// In a line that is too long.
    is_skipping: bool,
    descriptors: Vec<OwnedFd>,
}

impl Lines<'_> {
    /// Without its end; none at the stream's.
    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.bytes.drain(..=end).collect();
                line.pop();
                if !std::mem::take(&mut self.is_skipping) && line.len() < LINE_BYTES_MAX {
                    return Some(line);
                }
                continue;
            }
            if self.bytes.len() >= LINE_BYTES_MAX {
                self.is_skipping = true;
                self.bytes.clear();
            }
            self.receive()?;
        }
    }

    fn receive(&mut self) -> Option<()> {
        let mut buffer = [0; 4096];
        let mut control = nix::cmsg_space!([i32; 4]);
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let (socket, flags) = (self.stream.as_raw_fd(), MsgFlags::MSG_CMSG_CLOEXEC);
        let received = loop {
            match recvmsg::<()>(socket, &mut iov, Some(&mut control), flags) {
                Err(Errno::EINTR) => {}
                received => break received.ok()?,
            }
        };
        let count = received.bytes;
        for message in received.cmsgs().ok()? {
            if let ControlMessageOwned::ScmRights(fds) = message {
                // SAFETY: the kernel has just made these descriptors for us.
                let owned = fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                self.descriptors.extend(owned);
            }
        }
        self.bytes.extend_from_slice(&buffer[..count]);
        (count > 0).then_some(())
    }
}

/// `touch ADDRESS LENGTH`
fn parse_touch(line: &[u8]) -> Option<(u64, u64)> {
    let words = std::str::from_utf8(line).ok()?.strip_prefix("touch ")?;
    let (address, length) = words.split_once(' ')?;
    Some((address.parse().ok()?, length.parse().ok()?))
}

/// Makes pages the guest's own; anonymous ones are as soon as they are there.
fn touch(name: &str, area: &Range<u64>, address: u64, length: u64) -> Value {
    let failed = |errno: i32, text: &str| json!({ "error": "touch", "name": name, "errno": errno, "text": text });
    let inside =
        address >= area.start && address.checked_add(length).is_some_and(|end| end <= area.end);
    if !inside {
        return failed(libc::EINVAL, "no memory of this guest is there");
    }
    let range = address..address + length;
    match advise(&range, libc::MADV_POPULATE_WRITE) {
        Ok(()) => json!({ "touched": address, "size": length }),
        Err(error) => failed(
            error.raw_os_error().unwrap_or(libc::EINVAL),
            "the guest's memory cannot be populated",
        ),
    }
}

/// `madvise` with advice that leaves the contents as they are.
fn advise(range: &Range<u64>, advice: i32) -> std::io::Result<()> {
    let start =
        std::ptr::with_exposed_provenance_mut(usize::try_from(range.start).expect("64 bits"));
    let length = usize::try_from(range.end - range.start).expect("64 bits");
    // SAFETY: the caller's promise; where nothing is mapped any more the kernel says so.
    match unsafe { libc::madvise(start, length, advice) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::num::NonZeroUsize;

    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    const PAGE: u64 = 4096;

    /// A mapping and the daemon's end of its socket, once it has been handed over.
    struct HandedOver {
        start: NonNull<c_void>,
        bytes: u64,
        daemon: BufReader<UnixStream>,
        messages: Vec<(Value, OwnedFd)>,
    }

    impl HandedOver {
        fn new(mib: u64, shards: usize) -> HandedOver {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("handoff");
            let listener = UnixListener::bind(&path).unwrap();
            let bytes = mib << 20;
            let length = NonZeroUsize::new(usize::try_from(bytes).unwrap()).unwrap();
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let start =
                unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) }.unwrap();
            let memory = Memory { name: "ram0", start, bytes, page_bytes: PAGE, shards };
            hand_over(&path, &memory).unwrap();
            let (stream, _) = listener.accept().unwrap();
            let messages = (0..shards).map(|_| receive(&stream)).collect();
            HandedOver { start, bytes, daemon: BufReader::new(stream), messages }
        }

        fn command(&mut self, lines: &str) {
            self.daemon.get_mut().write_all(lines.as_bytes()).unwrap();
        }

        fn answer(&mut self) -> Value {
            let mut line = String::new();
            self.daemon.read_line(&mut line).unwrap();
            serde_json::from_str(&line).unwrap()
        }

        fn release(&mut self) {
            self.command("release\n");
            assert_eq!(self.answer(), json!({ "released": self.messages.len() }));
        }

        /// A thread that reads the first byte of a page.
        fn reader(&self, page: u64) -> std::thread::JoinHandle<u8> {
            let address = self.start.addr().get() + usize::try_from(page * PAGE).unwrap();
            std::thread::spawn(move || {
                let byte = std::ptr::with_exposed_provenance::<u8>(address);
                // SAFETY: inside the mapping, which outlives the thread.
                unsafe { byte.read_volatile() }
            })
        }
    }

    impl Drop for HandedOver {
        fn drop(&mut self) {
            // Without it the process would end with the socket.
            let _ = self.daemon.get_mut().write_all(b"keep\n");
            let mut line = String::new();
            let _ = self.daemon.get_mut().write_all(b"ping\n");
            let _ = self.daemon.read_line(&mut line);
            // SAFETY: the tests' threads have ended.
            unsafe { munmap(self.start, usize::try_from(self.bytes).unwrap()) }.unwrap();
        }
    }

    /// One line that comes with one descriptor.
    fn receive(stream: &UnixStream) -> (Value, OwnedFd) {
        let (line, descriptors) = receive_all(stream);
        let [descriptor] = <[OwnedFd; 1]>::try_from(descriptors).unwrap();
        (line, descriptor)
    }

    fn receive_all(stream: &UnixStream) -> (Value, Vec<OwnedFd>) {
        let (mut line, mut descriptors) = (Vec::new(), Vec::new());
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            let mut control = nix::cmsg_space!([i32; 4]);
            let mut iov = [IoSliceMut::new(&mut byte)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let received =
                recvmsg::<()>(stream.as_raw_fd(), &mut iov, Some(&mut control), flags).unwrap();
            assert_eq!(received.bytes, 1);
            for message in received.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(fds) = message {
                    // SAFETY: the kernel has just made them for us.
                    descriptors
                        .extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            line.extend(byte);
        }
        (serde_json::from_slice(&line).unwrap(), descriptors)
    }

    /// Waits for a page fault, and returns its address.
    fn fault(uffd: &OwnedFd) -> u64 {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut waiting = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut waiting, PollTimeout::NONE).unwrap(), 1);
        let mut event = [0; crate::fault::uffd::MESSAGE_BYTES];
        assert_eq!(nix::unistd::read(uffd, &mut event).unwrap(), event.len());
        match crate::fault::uffd::Event::decode(&event) {
            crate::fault::uffd::Event::PageFault { address, .. } => address,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn shards_have_a_userfaultfd_each_and_cover_the_memory_once() {
        let mut memory = HandedOver::new(7, 3);
        let mut offset = 0;
        for (index, (message, uffd)) in memory.messages.iter().enumerate() {
            let [region] = &message.as_array().unwrap()[..] else { panic!("{message}") };
            let number = |field: &str| region[field].as_u64().unwrap();
            assert_eq!((&region["name"], &region["kind"]), (&json!("ram0"), &json!("anonymous")));
            assert_eq!((number("page_size"), number("page_size_kib")), (PAGE, PAGE));
            assert_eq!((number("umem"), number("offset")), (2, offset));
            assert_eq!(region["more"].as_bool(), (index < 2).then_some(true));
            assert_eq!(number("offset") % SHARD_ALIGNMENT, 0);
            let start = memory.start.addr().get() as u64 + offset;
            assert_eq!(number("base_host_virt_addr"), start);
            // A fault of this part comes to this descriptor.
            let page = offset / PAGE + 1;
            let reader = memory.reader(page);
            assert_eq!(fault(uffd) & !(PAGE - 1), start + PAGE);
            let guest_side = crate::fault::uffd::Uffd::new(uffd.try_clone().unwrap());
            guest_side.zero(start + PAGE, PAGE).unwrap();
            assert_eq!(reader.join().unwrap(), 0);
            offset += number("size");
        }
        assert_eq!(offset, 7 << 20);
        for (message, uffd) in &memory.messages {
            let number = |field: &str| message[0][field].as_u64().unwrap();
            let guest_side = crate::fault::uffd::Uffd::new(uffd.try_clone().unwrap());
            guest_side.unregister(number("base_host_virt_addr"), number("size")).unwrap();
        }
        memory.release();
        assert_eq!(memory.reader(3).join().unwrap(), 0, "nobody is asked any more");
    }

    #[test]
    fn every_shard_has_a_block() {
        let memory = |mib: u64, shards| Memory {
            name: "ram0",
            start: NonNull::dangling(),
            bytes: mib << 20,
            page_bytes: PAGE,
            shards,
        };
        for (mib, most) in [(1, 1), (2, 1), (3, 1), (4, 2), (33, 16)] {
            let all = shards(&memory(mib, most)).unwrap();
            assert_eq!((all.len(), all[0].start, all[most - 1].end), (most, 0, mib << 20));
            assert!(all.windows(2).all(|two| two[0].end == two[1].start && !two[0].is_empty()));
            for wrong in [0, most + 1] {
                let error = shards(&memory(mib, wrong)).unwrap_err().to_string();
                assert!(error.contains(&format!("1 to {most} ")), "{error}");
            }
        }
    }

    #[test]
    fn commands_are_carried_out_in_their_order() {
        let mut memory = HandedOver::new(2, 1);
        let start = memory.start.addr().get() as u64;
        let uffd = crate::fault::uffd::Uffd::new(memory.messages[0].1.try_clone().unwrap());
        uffd.zero(start, 2 * PAGE).unwrap();
        let long = "x".repeat(300);
        let outside = start + (2 << 20);
        memory.command(&format!(
            "{long}\nnonsense\nping\ntouch {start} {}\ntouch {outside} {PAGE}\n{long}ping\nping\n",
            2 * PAGE
        ));
        assert_eq!(memory.answer(), json!({ "pong": 1 }));
        assert_eq!(memory.answer(), json!({ "touched": start, "size": 2 * PAGE }));
        assert_eq!(memory.answer()["errno"], libc::EINVAL);
        assert_eq!(memory.answer(), json!({ "pong": 1 }));
        uffd.unregister(start, 2 << 20).unwrap();
        memory.release();
    }

    #[test]
    fn what_becomes_of_the_process_depends_on_keep() {
        for (lines, ended) in [
            ("", Ended::Forsaken),
            ("ping\n", Ended::Forsaken),
            ("keep", Ended::Forsaken),
            ("keep\n", Ended::Kept),
            ("keep\nping\n", Ended::Kept),
            ("keep\nrelease\nping\n", Ended::Released),
        ] {
            let (guest, mut daemon) = UnixStream::pair().unwrap();
            daemon.write_all(lines.as_bytes()).unwrap();
            daemon.shutdown(std::net::Shutdown::Write).unwrap();
            let held = Arc::new(Held {
                name: "ram0".into(),
                area: 0..0,
                pieces: Mutex::default(),
                keeps: AtomicBool::new(false),
                session: Mutex::new(None),
            });
            assert_eq!(carry_out(&guest, &held), ended, "{lines:?}");
        }
    }

    /// Whoever connects when umem is gone gets what it had, as often as need be, until the release.
    #[test]
    fn a_umem_that_takes_over_is_handed_everything_again() {
        let mut memory = HandedOver::new(4, 2);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("guest");
        let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
        let state = OwnedFd::from(std::fs::File::open(directory.path()).unwrap());
        let descriptors = [listener.as_raw_fd(), state.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let (socket, line) = (memory.daemon.get_ref().as_raw_fd(), [IoSlice::new(b"session\n")]);
        sendmsg::<()>(socket, &line, &rights, MsgFlags::empty(), None).unwrap();
        drop(listener);
        memory.command("keep\nping\n");
        assert_eq!(memory.answer(), json!({ "pong": 1 }));
        for _ in 0..2 {
            let stream = UnixStream::connect(&path).unwrap();
            for (message, _) in &memory.messages {
                assert_eq!(&receive(&stream).0, message);
            }
            let (session, kept) = receive_all(&stream);
            assert_eq!((session, kept.len()), (json!({ "session": 1 }), 1));
            memory.daemon = BufReader::new(stream);
            memory.command("ping\n");
            assert_eq!(memory.answer(), json!({ "pong": 1 }));
        }
        for (message, uffd) in &memory.messages {
            let number = |field: &str| message[0][field].as_u64().unwrap();
            let guest_side = crate::fault::uffd::Uffd::new(uffd.try_clone().unwrap());
            guest_side.unregister(number("base_host_virt_addr"), number("size")).unwrap();
        }
        memory.release();
        assert!(UnixStream::connect(&path).is_err(), "nothing is left to take over");
    }

    #[test]
    fn a_daemon_that_is_not_there_is_named() {
        let memory = Memory {
            name: "ram0",
            start: NonNull::dangling(),
            bytes: 1 << 20,
            page_bytes: PAGE,
            shards: 1,
        };
        let error = hand_over(Path::new("/nonexistent/socket"), &memory).unwrap_err().to_string();
        assert!(error.contains("--handoff /nonexistent/socket"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

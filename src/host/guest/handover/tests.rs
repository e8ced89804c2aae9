use std::io::{BufRead, BufReader, IoSliceMut};
use std::num::NonZeroUsize;
use std::os::fd::FromRawFd;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::sys::socket::{ControlMessageOwned, recvmsg};

use super::commands::{Ended, carry_out};
use super::*;

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
        // Without `keep` the process would end with the socket.
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
                // SAFETY: the kernel has just made them for this process.
                descriptors.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        line.extend(byte);
    }
    (serde_json::from_slice(&line).unwrap(), descriptors)
}

/// Waits for a page fault, and returns its address.
fn fault(uffd: &OwnedFd) -> u64 {
    use nix::poll::{PollFd, PollFlags, PollTimeout};

    use crate::runtime::polling::poll;
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
fn each_shard_has_a_userfaultfd_and_shards_cover_the_memory_once() {
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
        // A fault in this part is reported by this descriptor.
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
    assert_eq!(memory.reader(3).join().unwrap(), 0, "no process is asked any more");
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
fn commands_are_carried_out_in_order() {
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
fn process_survives_the_end_of_its_umem_only_after_keep() {
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

/// Each umem that connects after the end of its predecessor gets the same descriptors, until the release.
#[test]
fn memory_is_handed_over_again_to_a_umem_that_takes_over() {
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
fn missing_daemon_is_named_by_its_socket() {
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

//! The preload object, without umem: a test program (`tests/mapper`) is started with it, and the test plays `umem
//! incoming`.

#![allow(clippy::disallowed_methods, reason = "it may open all that it polls")]

#[path = "preload/block.rs"]
mod block;
mod support;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};
use support::{DEADLINE, Scratch};

const PAGE: u64 = 4096;

/// Bytes of every RAM here.
const LENGTH: u64 = 64 * PAGE;

/// A program with the preload object, and umem's end of its socket.
struct Program {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    socket: UnixStream,
    bytes: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    stderr: tempfile::NamedTempFile,
}

impl Program {
    /// `kind` is the variable's value, if it is set.
    fn start(ram: &Path, kind: Option<&str>) -> Program {
        Program::start_prepared(ram, kind, |_| {})
    }

    fn start_prepared(
        ram: &Path,
        kind: Option<&str>,
        prepare: impl FnOnce(&mut Command),
    ) -> Program {
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let stderr = tempfile::NamedTempFile::new().unwrap();
        let number = theirs.as_raw_fd();
        let mut command = Command::new(support::program("umem-test-mapper"));
        command
            .env("LD_PRELOAD", concat!(env!("OUT_DIR"), "/libumem_preload.so"))
            .env("UMEM_PRELOAD_SOCKET", number.to_string())
            .env("UMEM_PRELOAD_RAM", format!("ram0={}\n", ram.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr.reopen().unwrap());
        if let Some(kind) = kind {
            command.env("UMEM_PRELOAD_KIND", kind);
        }
        // SAFETY: fcntl is async-signal-safe, and the descriptor is open until spawn returns.
        unsafe {
            command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let commands = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let (bytes, descriptors) = (Vec::new(), VecDeque::new());
        let mut program = Program { child, commands, answers, socket, bytes, descriptors, stderr };
        assert_eq!(program.message()["preload"], 1);
        program
    }

    /// Starts a program that has mapped its RAM and handed it over.
    fn with_ram(scratch: &Scratch, kind: &str) -> (Program, Ram) {
        Program::with_ram_prepared(scratch, kind, |_| {})
    }

    fn with_ram_prepared(
        scratch: &Scratch,
        kind: &str,
        prepare: impl FnOnce(&mut Command),
    ) -> (Program, Ram) {
        let path = scratch.ram("ram");
        let mut program = Program::start_prepared(&path, Some(kind), prepare);
        let address = program.ask(&format!("map {kind} {LENGTH} {}", path.display()));
        let message = program.message();
        let message = &message[0];
        assert_eq!(message["base_host_virt_addr"].to_string(), address);
        assert_eq!(message["size"], LENGTH);
        assert_eq!((&message["name"], &message["kind"]), (&json!("ram0"), &json!(kind)));
        assert_eq!((&message["page_size"], &message["umem"]), (&json!(PAGE), &json!(2)));
        let uffd = program.descriptors.pop_front().expect("the userfaultfd");
        let file = File::from(program.descriptors.pop_front().expect("the RAM file"));
        assert!(program.descriptors.is_empty());
        (program, Ram { address: address.parse().unwrap(), uffd, file })
    }

    /// Sends the program a command, without waiting for it.
    fn send(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "the program has ended: {}", self.stderr());
        line.trim_end().to_owned()
    }

    fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.answer()
    }

    /// Sends to the object, as umem does.
    fn command(&mut self, lines: &str) {
        self.socket.write_all(lines.as_bytes()).unwrap();
    }

    /// The object's next message.
    fn message(&mut self) -> Value {
        loop {
            if let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                return serde_json::from_slice(&line).unwrap();
            }
            let mut buffer = [0; 4096];
            let mut control = nix::cmsg_space!([i32; 4]);
            let mut iov = [IoSliceMut::new(&mut buffer)];
            let socket = self.socket.as_raw_fd();
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let received = recvmsg::<()>(socket, &mut iov, Some(&mut control), flags).unwrap();
            let count = received.bytes;
            for rights in received.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(descriptors) = rights {
                    // SAFETY: the kernel has just made them for this process.
                    let owned =
                        descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                    self.descriptors.extend(owned);
                }
            }
            assert!(count > 0, "the socket was closed: {}", self.stderr());
            self.bytes.extend_from_slice(&buffer[..count]);
        }
    }

    /// Waits for the answer to a ping: all earlier messages have arrived by then.
    fn pong(&mut self) {
        self.command("ping\n");
        assert_eq!(self.message(), json!({ "pong": 1 }));
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.stderr.path()).unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Fails if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The hand-over's contents.
struct Ram {
    address: u64,
    uffd: OwnedFd,
    file: File,
}

#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

#[repr(C)]
struct Operation {
    range: Range,
    mode: u64,
    done: i64,
}

mod uffd {
    //! The ioctls of linux/userfaultfd.h that are needed here.
    use super::{Operation, Range, block::Copy};
    nix::ioctl_read!(unregister, 0xaa, 0x01, Range);
    nix::ioctl_readwrite!(copy, 0xaa, 0x03, Copy);
    nix::ioctl_readwrite!(zeropage, 0xaa, 0x04, Operation);
    nix::ioctl_readwrite!(mark_cached, 0xaa, 0x07, Operation);
}

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;

impl Ram {
    fn range(&self, page: u64, pages: u64) -> Range {
        Range { start: self.address + page * PAGE, length: pages * PAGE }
    }

    fn operation(&self, page: u64) -> Operation {
        Operation { range: self.range(page, 1), mode: 0, done: 0 }
    }

    /// Writes the page's bytes to the file; the guest does not see them yet.
    fn land(&self, page: u64, byte: u8) {
        self.file.write_all_at(&[byte; PAGE as usize], page * PAGE).unwrap();
    }

    /// Makes the page of the file visible to the guest.
    fn mark_cached(&self, page: u64) {
        // SAFETY: the structure has the ioctl's layout; here and below.
        unsafe { uffd::mark_cached(self.uffd.as_raw_fd(), &mut self.operation(page)) }.unwrap();
    }

    fn mark_zero(&self, page: u64) {
        // SAFETY: as above.
        unsafe { uffd::zeropage(self.uffd.as_raw_fd(), &mut self.operation(page)) }.unwrap();
    }

    fn unregister(&self) {
        // SAFETY: as above.
        unsafe { uffd::unregister(self.uffd.as_raw_fd(), &mut self.range(0, LENGTH / PAGE)) }
            .unwrap();
    }

    /// Frees the page in the file.
    fn remove(&self, page: u64) {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (start, length) = ((page * PAGE) as i64, PAGE as i64);
        fallocate(&self.file, flags, start, length).unwrap();
    }

    /// Waits for the next event: its kind, and its first page.
    fn event(&self) -> (u8, u64) {
        use std::os::fd::AsFd;
        let mut waiting = [PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(DEADLINE).unwrap();
        assert_eq!(poll(&mut waiting, patience).unwrap(), 1, "no event");
        let mut event = [0; 32];
        assert_eq!(nix::unistd::read(&self.uffd, &mut event).unwrap(), event.len());
        let at = if event[0] == EVENT_PAGEFAULT { 16 } else { 8 };
        let address = u64::from_ne_bytes(event[at..at + 8].try_into().unwrap());
        (event[0], (address - self.address) / PAGE)
    }
}

#[test]
fn private_memory_becomes_anonymous_page_by_page() {
    let scratch = Scratch::new();
    let (mut program, ram) = Program::with_ram(&scratch, "private");

    // A page that a thread waits for.
    program.send("read 0");
    assert_eq!(ram.event(), (EVENT_PAGEFAULT, 0));
    ram.land(0, 7);
    ram.mark_cached(0);
    assert_eq!(program.answer(), "7");

    // Two further pages; all three become anonymous, and the file is emptied.
    ram.land(1, 8);
    ram.land(2, 9);
    ram.mark_cached(1);
    ram.mark_cached(2);
    let address = ram.address;
    program.command(&format!("touch {address} {}\n", 3 * PAGE));
    assert_eq!(program.message(), json!({ "touched": address, "size": 3 * PAGE }));
    (0..3).for_each(|page| ram.remove(page));
    for (page, byte) in [(0, "7"), (1, "8"), (2, "9")] {
        assert_eq!(program.ask(&format!("read {}", page * PAGE + 5)), byte);
    }
    assert_eq!(program.ask("write 0 77"), "ok");
    let mut byte = [1];
    ram.file.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [0], "guest writes do not reach the file");

    // A discarded page is missing again, and becomes zeroes without the file.
    program.send(&format!("advise 0 {PAGE} {}", libc::MADV_DONTNEED));
    assert_eq!(ram.event(), (EVENT_REMOVE, 0));
    assert_eq!(program.answer(), "ok");
    program.send("read 0");
    assert_eq!(ram.event(), (EVENT_PAGEFAULT, 0));
    ram.mark_zero(0);
    assert_eq!(program.answer(), "0");

    ram.unregister();
    program.command("keep\nrelease\n");
    assert_eq!(program.message(), json!({ "released": 1 }));
    assert_eq!(program.ask(&format!("read {}", 60 * PAGE)), "0", "no page is waited for");
    assert_eq!(program.ask(&format!("read {}", 2 * PAGE)), "9");
}

#[test]
fn touch_waits_for_a_missing_page() {
    let scratch = Scratch::new();
    let (mut program, ram) = Program::with_ram(&scratch, "private");
    program.command(&format!("touch {} {PAGE}\nping\n", ram.address + 3 * PAGE));
    assert_eq!(ram.event(), (EVENT_PAGEFAULT, 3));
    ram.mark_zero(3);
    assert_eq!(program.message(), json!({ "touched": ram.address + 3 * PAGE, "size": PAGE }));
    assert_eq!(program.message(), json!({ "pong": 1 }));
}

/// Whether the kernel populates a range, or a sandbox forbids that and each page is written to.
#[test]
fn touch_of_an_unmapped_page_fails_and_the_program_continues() {
    let populate = (2, libc::MADV_POPULATE_WRITE.unsigned_abs());
    for forbidden in [None, Some(libc::EPERM), Some(libc::ENOSYS)] {
        let scratch = Scratch::new();
        let (mut program, ram) = Program::with_ram_prepared(&scratch, "private", |command| {
            if let Some(errno) = forbidden {
                support::sandbox::forbid_with(command, libc::SYS_madvise, populate, errno);
            }
        });
        let address = |page: u64| ram.address + page * PAGE;
        for page in 3..6 {
            ram.land(page, 1);
            ram.mark_cached(page);
        }
        program.command(&format!("touch {} {}\n", address(3), 3 * PAGE));
        assert_eq!(program.message(), json!({ "touched": address(3), "size": 3 * PAGE }));
        // The program has its own copies now: the file may free its pages.
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&ram.file, punch, 3 * PAGE as i64, 3 * PAGE as i64).unwrap();
        let there = (3..6).map(|page| program.ask(&format!("read {}", page * PAGE)));
        assert!(there.collect::<Vec<_>>().iter().all(|byte| byte != "0"), "{forbidden:?}");
        assert_eq!(program.ask(&format!("unmap {} {PAGE}", 4 * PAGE)), "ok");
        program.command(&format!("touch {} {}\nping\n", address(3), 3 * PAGE));
        let answer = program.message();
        assert_eq!(answer["error"], "touch", "{answer}");
        assert_eq!(program.message(), json!({ "pong": 1 }));
        assert_ne!(program.ask(&format!("read {}", 5 * PAGE)), "0");
    }
}

#[test]
fn batched_commands_are_answered_in_order() {
    let scratch = Scratch::new();
    let (mut program, ram) = Program::with_ram(&scratch, "private");
    let pages = LENGTH / PAGE;
    for page in 0..pages {
        ram.land(page, 1);
        ram.mark_cached(page);
    }
    // More than the object reads at once, and more answers than it keeps.
    let order: Vec<u64> = (0..1000).map(|number| number * 7 % pages).collect();
    let address = |page: &u64| ram.address + page * PAGE;
    let lines: String =
        order.iter().map(|page| format!("touch {} {PAGE}\nping\n", address(page))).collect();
    program.command(&lines);
    for page in &order {
        assert_eq!(program.message(), json!({ "touched": address(page), "size": PAGE }));
        assert_eq!(program.message(), json!({ "pong": 1 }));
    }
}

#[test]
fn lines_other_than_commands_are_dropped() {
    let scratch = Scratch::new();
    let (mut program, ram) = Program::with_ram(&scratch, "private");
    ram.land(0, 1);
    ram.mark_cached(0);
    let long = format!("touch {}{} {PAGE}", "0".repeat(300), ram.address);
    let cut = format!("touch {} {PAGE}{}", ram.address, " ".repeat(300));
    for line in ["", "no", "touch", "touch 1", "touch x 4096", "touch 4096 -1", &long, &cut] {
        program.command(&format!("{line}\n"));
    }
    program.pong();
}

#[test]
fn memory_outside_the_guest_is_not_touched() {
    let scratch = Scratch::new();
    let (mut program, ram) = Program::with_ram(&scratch, "private");
    let end = ram.address + LENGTH;
    for (address, length) in [
        (end, PAGE),
        (end - PAGE, 2 * PAGE),
        (ram.address - PAGE, 2 * PAGE),
        (ram.address, LENGTH + PAGE),
        (ram.address, 0),
        (ram.address + 1, PAGE),
        (ram.address, PAGE + 1),
        (PAGE, u64::MAX - PAGE + 1),
        (u64::MAX - PAGE + 1, PAGE),
    ] {
        program.command(&format!("touch {address} {length}\n"));
        let answer = program.message();
        assert_eq!(answer["error"], "touch", "{address} {length}: {answer}");
        assert_eq!(answer["errno"], libc::EINVAL);
    }
    program.pong();
}

#[test]
fn file_mapped_unlike_its_kind_is_refused() {
    for (kind, sharing, code) in [
        (Some("private"), "shared", "share-on"),
        (Some("shared"), "private", "share-off"),
        (None, "private", "share-off"),
        (Some("other"), "shared", "kind"),
    ] {
        let scratch = Scratch::new();
        let path = scratch.ram("ram");
        let mut program = Program::start(&path, kind);
        let command = format!("map {sharing} {LENGTH} {}", path.display());
        assert_eq!(program.ask(&command), format!("errno {}", libc::EINVAL));
        let message = program.message();
        assert_eq!((&message["error"], &message["name"]), (&json!(code), &json!("ram0")));
    }
}

#[test]
fn handed_over_memory_cannot_be_remapped_until_it_is_complete() {
    for kind in ["shared", "private"] {
        let scratch = Scratch::new();
        let (mut program, ram) = Program::with_ram(&scratch, kind);
        let grow = format!("remap {LENGTH} {} {}", 2 * LENGTH, libc::MREMAP_MAYMOVE);
        let duplicate = format!("remap 0 {LENGTH} {}", libc::MREMAP_MAYMOVE);
        let refused = format!("errno {}", libc::ENOMEM);
        assert_eq!(program.ask(&grow), refused);
        let message = program.message();
        assert_eq!((&message["error"], &message["name"]), (&json!("mremap"), &json!("ram0")));
        assert!(message["text"].as_str().unwrap().contains("moved or resized"), "{message}");
        assert_eq!(program.ask(&duplicate), refused);
        program.pong();
        // Unmapped memory needs no protection.
        assert_eq!(program.ask(&format!("remap {LENGTH} {} 0", LENGTH - PAGE)), "ok");
        ram.unregister();
        program.command("keep\nrelease\n");
        assert_eq!(program.message(), json!({ "released": 1 }));
        let grow = format!("remap {} {LENGTH} {}", LENGTH - PAGE, libc::MREMAP_MAYMOVE);
        assert_eq!(program.ask(&grow), "ok");
    }
}

/// umem would give up on a guest that reports a failure, and this one runs.
#[test]
fn refused_system_calls_of_a_complete_guest_pass_through() {
    let scratch = Scratch::new();
    let (mut program, _ram) = Program::with_ram(&scratch, "shared");
    program.command("keep\n");
    program.pong();
    let grow = format!("remap {LENGTH} {} {}", 2 * LENGTH, libc::MREMAP_MAYMOVE);
    assert_eq!(program.ask(&grow), format!("errno {}", libc::ENOMEM));
    program.pong();
    assert!(program.stderr().starts_with("umem: ram0: the guest's memory is moved"));
    assert_eq!(program.stderr().lines().count(), 1);
}

/// As QEMU discards: it punches a hole into the file, and then drops the page tables.
#[test]
fn punched_holes_in_shared_memory_are_reported_first() {
    let scratch = Scratch::new();
    let (mut program, ram) = Program::with_ram(&scratch, "shared");
    ram.land(5, 7);
    ram.mark_cached(5);
    // Page 4 has not arrived, and would be filled without the report.
    program.send(&format!("punch {} {}", 4 * PAGE, 2 * PAGE));
    assert_eq!(ram.event(), (EVENT_REMOVE, 4));
    assert_eq!(program.answer(), "ok");
    assert_eq!(ram.file.metadata().unwrap().blocks(), 0, "the hole was not punched");
    assert_eq!(program.ask(&format!("advise {} {} 4", 4 * PAGE, 2 * PAGE)), "ok");
    program.send(&format!("read {}", 5 * PAGE));
    assert_eq!(ram.event(), (EVENT_PAGEFAULT, 5), "no other event was reported");
    ram.mark_zero(5);
    assert_eq!(program.answer(), "0");

    let refused = format!("errno {}", libc::EOPNOTSUPP);
    assert_eq!(program.ask(&format!("punch 1 {PAGE}")), refused);
    ram.land(9, 8);
    ram.unregister();
    program.command("keep\nrelease\n");
    assert_eq!(program.message(), json!({ "released": 1 }));
    assert_eq!(
        program.ask(&format!("punch {} 1", 9 * PAGE)),
        "ok",
        "punching works after the release"
    );
    assert_eq!(program.ask(&format!("read {}", 9 * PAGE)), "0");
    assert_eq!(program.ask(&format!("read {}", 9 * PAGE + 1)), "8");
}

/// As virtio-mem of QEMU 7.2 discards its empty memory. Pages that arrive later are kept, and umem waits for the
/// program's monitor then and reads no reports.
#[test]
fn discarding_empty_memory_does_not_wait() {
    for kind in ["shared", "private"] {
        let scratch = Scratch::new();
        let (mut program, ram) = Program::with_ram(&scratch, kind);
        assert_eq!(program.ask(&format!("punch 0 {LENGTH}")), "ok");
        let drop = format!("advise 0 {LENGTH} {}", libc::MADV_DONTNEED);
        assert_eq!(program.ask(&drop), "ok");
        program.send("read 0");
        assert_eq!(ram.event(), (EVENT_PAGEFAULT, 0), "no event was reported");
        ram.land(0, 9);
        ram.mark_cached(0);
        assert_eq!(program.answer(), "9");
    }
}

/// The bytes of a shared mapping belong to the file: a program that drops its page tables has not discarded them.
#[test]
fn dontneed_on_shared_memory_is_no_discard() {
    let scratch = Scratch::new();
    let (mut program, ram) = Program::with_ram(&scratch, "shared");
    ram.land(2, 7);
    ram.mark_cached(2);
    for advice in [libc::MADV_DONTNEED, 24] {
        assert_eq!(program.ask(&format!("advise 0 {} {advice}", 4 * PAGE)), "ok");
    }
    program.send("read 0");
    assert_eq!(ram.event(), (EVENT_PAGEFAULT, 0), "no event was reported");
    ram.land(0, 9);
    ram.mark_cached(0);
    assert_eq!(program.answer(), "9");
    assert_eq!(program.ask(&format!("read {}", 2 * PAGE)), "7");
    program.send(&format!("advise 0 {PAGE} {}", libc::MADV_REMOVE));
    assert_eq!(ram.event(), (EVENT_REMOVE, 0), "the call discards the page");
    assert_eq!(program.answer(), "ok");
}

#[test]
fn forked_children_do_not_map_missing_memory() {
    let lost = format!("signal {}", libc::SIGSEGV);
    let advise = |advice| format!("advise 0 {LENGTH} {advice}");
    for kind in ["shared", "private"] {
        for (advice, at_the_end) in [
            (None, "byte 3"),
            (Some(libc::MADV_DOFORK), "byte 3"),
            (Some(libc::MADV_DONTFORK), lost.as_str()),
        ] {
            let scratch = Scratch::new();
            let (mut program, ram) = Program::with_ram(&scratch, kind);
            ram.land(0, 3);
            ram.mark_cached(0);
            if let Some(advice) = advice {
                assert_eq!(program.ask(&advise(advice)), "ok");
            }
            assert_eq!(program.ask("fork 0"), lost, "{kind} {advice:?}");
            ram.unregister();
            program.command("keep\nrelease\n");
            assert_eq!(program.message(), json!({ "released": 1 }));
            assert_eq!(program.ask("fork 0"), at_the_end, "{kind} {advice:?}");
        }
    }
}

#[test]
fn program_ends_when_its_guest_will_not_arrive() {
    let scratch = Scratch::new();
    let (mut program, _ram) = Program::with_ram(&scratch, "private");
    let (other, _) = UnixStream::pair().unwrap();
    program.send("read 0");
    program.socket = other;
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(program.child.wait().unwrap().signal(), Some(libc::SIGKILL));
}

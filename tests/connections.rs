//! A program that embeds umem and gives it connections: the peer may connect at any time, and has ten seconds from its
//! first byte on.

mod support;

use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use umem::embed::{DestinationSetup, Event, Memory, SourceSetup};
use umem_wire::{Capabilities, HELLO_BYTES, Hello, LaneRole, PROTOCOL, SessionId};

const BYTES: usize = 1 << 20;

/// Connections for umem, and their other ends.
fn pairs(count: usize) -> (Vec<OwnedFd>, Vec<UnixStream>) {
    let pairs = (0..count).map(|_| UnixStream::pair().expect("a pair"));
    pairs.map(|(ours, theirs)| (OwnedFd::from(ours), theirs)).unzip()
}

/// Gives a destination this many connections, has `speak` send bytes at their other ends, and waits for its failure.
fn destination(count: usize, speak: impl FnOnce(&mut [UnixStream])) -> String {
    let length = NonZeroUsize::new(BYTES).expect("some bytes");
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let start = unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE) };
    let start = start.expect("memory");
    let (ours, mut theirs) = pairs(count);
    let mut setup = DestinationSetup::new();
    // SAFETY: the mapping has no other user, and it is unmapped below, when the destination has been dropped.
    unsafe { setup.region("ram0", &Memory { start, bytes: BYTES as u64, file: None }) }
        .expect("a region");
    setup.connections(ours).expect("connected sockets");
    let destination = setup.start().expect("the side starts");
    speak(&mut theirs);
    let failed = loop {
        match destination.wait(Some(support::DEADLINE)).expect("the wait succeeds") {
            Some(Event::Failed(failure)) => break failure.error.to_string(),
            Some(_) => {}
            None => panic!("the side still waits"),
        }
    };
    drop(destination);
    // SAFETY: mapped above, and without a user any more.
    unsafe { munmap(start, BYTES) }.expect("the memory was mapped");
    failed
}

/// The same for a source.
fn source(count: usize, speak: impl FnOnce(&mut [UnixStream])) -> String {
    let file = std::fs::File::from(memfd_create(c"ram0", MFdFlags::empty()).expect("a memfd"));
    file.set_len(BYTES as u64).expect("room");
    let (ours, mut theirs) = pairs(count);
    let mut setup = SourceSetup::new();
    setup.region("ram0", std::os::fd::AsFd::as_fd(&file)).expect("a region");
    setup.connections(ours).expect("connected sockets");
    let source = setup.start().expect("the side starts");
    speak(&mut theirs);
    loop {
        match source.wait(Some(support::DEADLINE)).expect("the wait succeeds") {
            Some(Event::Failed(failure)) => return failure.error.to_string(),
            Some(_) => {}
            None => panic!("the side still waits"),
        }
    }
}

/// The hello of a demand lane, of a session with this many bulk lanes.
fn hello(bulk_lanes: u16) -> [u8; HELLO_BYTES] {
    let hello = Hello {
        versions: PROTOCOL,
        capabilities: Capabilities::NONE,
        session: SessionId([1; 16]),
        role: LaneRole::Demand,
        index: 0,
        bulk_lanes,
        epoch: 0,
        proof: [0; 32],
    };
    hello.encode()
}

#[test]
fn given_connection_must_finish_its_hello_in_ten_seconds() {
    let one_byte =
        |ends: &mut [UnixStream]| ends[0].write_all(b"U").expect("the destination reads");
    let first_lane = |ends: &mut [UnixStream]| {
        ends[0].write_all(&hello(1)).expect("the destination reads");
        ends[0].read_exact(&mut [0; HELLO_BYTES]).expect("a welcome");
    };
    std::thread::scope(|scope| {
        let failures = [
            scope.spawn(|| destination(1, one_byte)),
            scope.spawn(|| destination(2, one_byte)),
            scope.spawn(|| destination(2, first_lane)),
            scope.spawn(|| source(1, one_byte)),
            scope.spawn(|| source(2, one_byte)),
        ];
        for failure in failures {
            let text = failure.join().expect("the thread does not panic");
            let is_late = text.contains("has not sent its hello within 10 s")
                || text.contains("no welcome: timed out");
            assert!(is_late, "{text}");
        }
    });
}

//! The answers to a broken peer, and to a foreign one: each is refused with the reason, and no other connection is
//! delayed.
//!
//! `hostile.rs` covers authenticated peers that flood their lanes, `secure.rs` authentication.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::sys::signal::Signal;
use support::peer::{Peer, hello, range};
use support::waiting::{bytes_of, incoming_to_idle_guest, uri_of, write_snapshot};
use support::{Scratch, Umem, wait_for};
use umem_wire::{
    Capabilities, Frame, HELLO_BYTES, Hello, PROTOCOL, PageSize, Region, RegionId, RegionTable,
    Welcome, transmit,
};

const PAGE: u64 = 4096;

#[test]
fn duplicate_page_is_refused_before_it_lands() {
    for (lane, again) in [
        (0, Frame::Data(range(3, 1))),
        (1, Frame::Data(range(0, 8))),
        (1, Frame::Zero(range(3, 1))),
        (0, Frame::Hole(range(0, 2048))),
    ] {
        let scratch = Scratch::new();
        let mut incoming = incoming_to_idle_guest(&scratch, 8);
        let mut peer = Peer::dial(&uri_of(&mut incoming), 1);
        peer.until_stopped(8, true);
        peer.send(1, &Frame::Data(range(3, 1)), &[0xa5; 4096]);
        let ram = scratch.ram("destination");
        wait_for("the page to land", || {
            let mut first = [0; 1];
            File::open(&ram).unwrap().read_exact_at(&mut first, 3 * PAGE).unwrap();
            (first == [0xa5]).then_some(())
        });
        peer.send(lane, &again, &[0x5a; 4096]);
        let fault = peer.fault();
        assert!(fault.contains("came a second time"), "{fault}");
        let error = incoming.fails();
        assert!(error.contains("page 3 of RAM ram0 came a second time"), "{error}");
        assert!(!ram.exists(), "the guest had not arrived");
    }
}

#[test]
fn differing_regions_are_named_on_both_sides() {
    let region = |name: &str, mib: u64| Region {
        name: name.into(),
        bytes: mib << 20,
        page_size: PageSize::SIZE_4K,
    };
    for (regions, hint) in [
        (vec![region("ram0", 16)], "ram0"),
        (vec![region("other", 8)], "other"),
        (vec![region("ram0", 8), region("ram1", 8)], "ram1"),
    ] {
        let scratch = Scratch::new();
        let mut incoming = incoming_to_idle_guest(&scratch, 8);
        let mut peer = Peer::dial(&uri_of(&mut incoming), 1);
        peer.send(0, &Frame::Regions(RegionTable::new(regions).unwrap()), &[]);
        let fault = peer.fault();
        assert!(fault.contains(hint), "{fault}");
        let error = incoming.fails();
        assert!(error.contains(hint), "{error}");
    }
}

#[test]
fn foreign_connections_do_not_disturb_a_migration() {
    let scratch = Scratch::new();
    let source = scratch.ram("source");
    write_snapshot(&source, 8);
    let mut incoming = incoming_to_idle_guest(&scratch, 8);
    let uri = uri_of(&mut incoming);
    let address = uri.strip_prefix("tcp:").unwrap();
    for greeting in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 4096], b""] {
        let mut stranger = TcpStream::connect(address).unwrap();
        // The peer may close while the test still writes.
        let _ = stranger.write_all(greeting);
        let _ = stranger.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stranger.read_to_end(&mut answer);
    }
    // A bulk lane of no session, and more lanes than allowed.
    for hello in [hello(1, 1), hello(0, 17)] {
        let mut stranger = TcpStream::connect(address).unwrap();
        stranger.write_all(&hello.encode()).unwrap();
        let mut answer = [0; HELLO_BYTES];
        stranger.read_exact(&mut answer).unwrap();
        assert!(Welcome::decode(&answer).is_err());
    }
    let ram = format!("ram0={}", source.display());
    let mut migrate = Umem::start(["migrate", "-p", "--json", "--ram", &ram, &uri]);
    migrate.event("completed");
    incoming.event("completed");
    assert!(bytes_of(&source) == bytes_of(&scratch.ram("destination")));
}

/// Connections that send nothing, or too little, for an unlimited time.
#[test]
fn silent_connections_do_not_delay_a_migration() {
    let scratch = Scratch::new();
    let source = scratch.ram("source");
    write_snapshot(&source, 8);
    let mut incoming = incoming_to_idle_guest(&scratch, 8);
    let uri = uri_of(&mut incoming);
    let address = uri.strip_prefix("tcp:").unwrap();
    // One after the other they would exceed the test's deadline.
    let silent: Vec<TcpStream> = (0..40)
        .map(|index| {
            let mut silent = TcpStream::connect(address).unwrap();
            silent.write_all(&hello(0, 0).encode()[..index]).unwrap();
            silent
        })
        .collect();
    let ram = format!("ram0={}", source.display());
    let mut migrate = Umem::start(["migrate", "-p", "--json", "--ram", &ram, &uri]);
    migrate.event("completed");
    incoming.event("completed");
    drop(silent);
    assert!(bytes_of(&source) == bytes_of(&scratch.ram("destination")));
}

#[test]
fn partial_hello_does_not_block_ctrl_c() {
    let scratch = Scratch::new();
    let mut incoming = incoming_to_idle_guest(&scratch, 8);
    let uri = uri_of(&mut incoming);
    let mut half = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    half.write_all(&hello(0, 0).encode()[..64]).unwrap();
    // A later connection is answered, so the half hello has been read as well.
    let mut bulk = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    bulk.write_all(&hello(1, 1).encode()).unwrap();
    bulk.read_exact(&mut [0; HELLO_BYTES]).unwrap();
    incoming.signal(Signal::SIGINT);
    let error = incoming.fails();
    assert!(error.contains("interrupted"), "{error}");
}

/// A source that disappears, or makes no progress, before its last lane has arrived.
#[test]
fn partial_session_does_not_block_the_next() {
    for is_closed in [true, false] {
        let scratch = Scratch::new();
        let source = scratch.ram("source");
        write_snapshot(&source, 8);
        let mut incoming = incoming_to_idle_guest(&scratch, 8);
        let uri = uri_of(&mut incoming);
        let address = uri.strip_prefix("tcp:").unwrap();
        let mut half = Vec::new();
        // The second of three bulk lanes: they may arrive in any order.
        for index in [0, 2] {
            let mut lane = TcpStream::connect(address).unwrap();
            lane.write_all(&hello(index, 3).encode()).unwrap();
            let mut welcome = [0; HELLO_BYTES];
            lane.read_exact(&mut welcome).unwrap();
            Welcome::decode(&welcome).unwrap();
            half.push(lane);
        }
        if is_closed {
            half.clear();
        }
        let ram = format!("ram0={}", source.display());
        let mut migrate = wait_for("an accepted migration", || {
            let mut migrate = Umem::start(["migrate", "-p", "--json", "--ram", &ram, &uri]);
            migrate.connects().then_some(migrate)
        });
        migrate.event("completed");
        incoming.event("completed");
    }
}

/// A reset gives the same error as a close.
#[test]
fn source_exit_before_its_regions_is_a_closed_lane() {
    let scratch = Scratch::new();
    let mut incoming = incoming_to_idle_guest(&scratch, 8);
    let peer = Peer::dial(&uri_of(&mut incoming), 1);
    let no_wait = libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&peer.lanes[0], nix::sys::socket::sockopt::Linger, &no_wait)
        .unwrap();
    incoming.event("connected");
    drop(peer);
    let error = incoming.fails();
    assert!(error.contains("demand lane") && error.contains("the source closed it"), "{error}");
}

/// The other end does not answer: its queue of connections is full.
#[test]
fn connecting_to_an_unanswered_address_can_be_interrupted() {
    let scratch = Scratch::new();
    let source = scratch.ram("source");
    write_snapshot(&source, 8);
    let ram = format!("ram0={}", source.display());
    let full = FullListener::new();
    let uri = format!("tcp:127.0.0.1:{}", full.port);
    let mut migrate = Umem::start(["migrate", "-p", "--json", "--ram", &ram, &uri]);
    full.wait_for_another();
    migrate.signal(Signal::SIGINT);
    let error = migrate.fails();
    assert!(error.contains("interrupted"), "{error}");
}

#[test]
fn forbidden_frame_of_a_destination_ends_the_migration_at_the_source() {
    let ready = |unit| Frame::Ready(vec![unit]);
    let frames: [(&str, Vec<Frame>); 4] = [
        ("request", vec![Frame::Request(vec![(RegionId(0), 0)])]),
        ("running", vec![ready(PageSize::SIZE_4K), Frame::Running { us_since_switchover: 1 }]),
        ("unit", vec![ready(PageSize::SIZE_1G)]),
        ("data", vec![Frame::Data(range(0, 1))]),
    ];
    for (what, frames) in frames {
        let scratch = Scratch::new();
        let source = scratch.ram("source");
        write_snapshot(&source, 8);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port());
        let ram = format!("ram0={}", source.display());
        let migrate = Umem::start(["migrate", "-p", "--json", "--ram", &ram, &uri]);
        let mut lanes: Vec<TcpStream> = (0..2)
            .map(|_| {
                let (mut lane, _) = listener.accept().unwrap();
                let mut bytes = [0; HELLO_BYTES];
                lane.read_exact(&mut bytes).unwrap();
                let hello = Hello::decode(&bytes).unwrap();
                let welcome = Welcome::answer(&hello, PROTOCOL, Capabilities::NONE, [0; 32]);
                lane.write_all(&welcome.unwrap().encode()).unwrap();
                lane
            })
            .collect();
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| transmit::encode(frame, &mut bytes));
        lanes[0].write_all(&bytes).unwrap();
        let error = migrate.fails();
        assert!(error.contains("does not allow"), "{what}: {error}");
    }
}

/// A TCP listener that accepts no more connections.
struct FullListener {
    port: u16,
    _listener: std::os::fd::OwnedFd,
    _queued: TcpStream,
}

impl FullListener {
    fn new() -> FullListener {
        use nix::sys::socket::*;
        let listener =
            socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(listener.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
        // Room for one: tcp(7) counts from zero.
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let address: SockaddrIn = getsockname(listener.as_raw_fd()).unwrap();
        let queued = TcpStream::connect(("127.0.0.1", address.port())).unwrap();
        FullListener { port: address.port(), _listener: listener, _queued: queued }
    }

    /// Waits for a connection attempt: a socket in state SYN_SENT (2) towards this port.
    fn wait_for_another(&self) {
        let remote = format!("0100007F:{:04X} 02", self.port);
        wait_for("a connection attempt", || {
            let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
            sockets.contains(&remote).then_some(())
        });
    }
}

//! Every kind of address, for both roles: a connection for each lane, and one connection that all lanes share.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use support::{LaneFromSource, Scratch, Umem, wait_for};
use umem_wire::{Capabilities, Event, Frame, PageRange, RegionId};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

const MIB: u64 = 8;
const PAGES: u64 = MIB << 8;

/// Data, except every fourth page, which is a hole.
fn write_snapshot(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(MIB << 20).unwrap();
    for page in (0..PAGES).filter(|page| page % 4 != 0) {
        file.write_all_at(&[page as u8 | 1; 4096], page * 4096).unwrap();
    }
}

/// A snapshot, and the commands that move it.
struct Move {
    scratch: Scratch,
    mode: &'static [&'static str],
}

impl Move {
    fn new(mode: &'static [&'static str]) -> Move {
        let scratch = Scratch::new();
        write_snapshot(&scratch.ram("source"));
        Move { scratch, mode }
    }

    fn migrate(&self, uri: &str) -> Vec<String> {
        let ram = format!("ram0={}", self.scratch.ram("source").display());
        let arguments =
            ["migrate", "--json", "--ram", &ram].into_iter().chain(self.mode.to_owned());
        arguments.chain([uri]).map(str::to_owned).collect()
    }

    fn incoming(&self, uri: &str) -> Vec<String> {
        let ram = format!("ram0={}", self.scratch.ram("destination").display());
        let qmp = self.scratch.path("guest.qmp").display().to_string();
        let mib = MIB.to_string();
        let umem = ["incoming", "--json", "--ram", &ram, uri, "--", UMEM, "guest", "--incoming"];
        let guest = ["--threads", "0", "--ram", &ram, "--size", &mib, "--qmp", &qmp];
        umem.into_iter().chain(guest).map(str::to_owned).collect()
    }

    fn assert_arrived(&self) {
        let bytes = |name| std::fs::read(self.scratch.ram(name)).unwrap();
        assert!(bytes("source") == bytes("destination"), "every byte is equal");
    }
}

fn shell(arguments: &[String]) -> String {
    let quoted: Vec<String> = arguments.iter().map(|word| format!("'{word}'")).collect();
    format!("exec '{UMEM}' {}", quoted.join(" "))
}

/// As systemd hands a socket to a service: another process has bound it, and keeps it.
#[test]
fn inherited_listening_socket_accepts_a_source() {
    for kind in ["tcp", "unix"] {
        let moving = Move::new(&["-p", "--lanes", "2"]);
        let path = moving.scratch.path("umem.sock");
        let (tcp, unix);
        let listener: &dyn AsRawFd = match kind {
            "tcp" => {
                tcp = TcpListener::bind("127.0.0.1:0").unwrap();
                &tcp
            }
            _ => {
                unix = UnixListener::bind(&path).unwrap();
                &unix
            }
        };
        let mut incoming =
            Umem::start_inheriting(&listener.as_raw_fd(), 17, moving.incoming("fd:17"));
        let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();
        assert!(uri.starts_with(kind), "{uri}");
        let mut migrate = Umem::start(moving.migrate(&uri));
        assert_eq!(migrate.event("completed")["lanes"], 2);
        incoming.event("completed");
        migrate.succeeds();
        moving.assert_arrived();
        assert!(kind == "tcp" || path.exists(), "a foreign socket is removed");
        drop(incoming);
    }
}

fn does_not_block(socket: &dyn AsRawFd) -> bool {
    // SAFETY: no memory is passed, and the socket is open.
    let flags = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFL) };
    assert!(flags >= 0);
    flags & libc::O_NONBLOCK != 0
}

/// The process that handed a socket over may still have it, and wait for it in its own way.
#[test]
fn inherited_socket_keeps_its_flags() {
    for (mode, nonblocking) in [(&["-p"][..], true), (&[], true), (&["-p"], false)] {
        let moving = Move::new(mode);
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(nonblocking).unwrap();
        theirs.set_nonblocking(nonblocking).unwrap();
        let mut incoming = Umem::start_inheriting(&theirs, 9, moving.incoming("fd:9"));
        incoming.event("listening");
        let mut migrate = Umem::start_inheriting(&ours, 17, moving.migrate("fd:17"));
        let report = migrate.event("completed");
        assert_eq!(report["pages_background"], PAGES);
        incoming.event("completed");
        assert_eq!(does_not_block(&ours), nonblocking);
        assert_eq!(does_not_block(&theirs), nonblocking);
        migrate.succeeds();
        assert_eq!(does_not_block(&ours), nonblocking);
        assert_eq!(does_not_block(&theirs), nonblocking);
        moving.assert_arrived();
    }
}

#[test]
fn source_refuses_a_listening_socket() {
    let moving = Move::new(&["-p"]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let arguments = moving.migrate("fd:7").into_iter();
    let text = Umem::start_inheriting(&listener, 7, arguments).fails_as_misused();
    assert!(text.contains("fd:7 is a listening socket"), "{text}");
}

#[test]
fn several_lanes_over_given_sockets() {
    for (mode, uri) in [
        (&["-p"][..], "tcp:[::1]:0"),
        (&["-p", "--lanes", "2"], "unix:"),
        (&[], "tcp:[::1]:0"),
        (&[], "unix:"),
    ] {
        let moving = Move::new(mode);
        let uri = match uri {
            "unix:" => format!("unix:{}", moving.scratch.path("umem.sock").display()),
            uri => uri.to_owned(),
        };
        let mut incoming = Umem::start(moving.incoming(&uri));
        let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();
        let mut migrate = Umem::start(moving.migrate(&uri));
        migrate.event("completed");
        incoming.event("completed");
        migrate.succeeds();
        moving.assert_arrived();
    }
}

#[test]
fn one_lane_over_an_inherited_socket() {
    for mode in [&["-p"][..], &[]] {
        let moving = Move::new(mode);
        let (ours, theirs) = UnixStream::pair().unwrap();
        // If the source is there first, its hello waits in the socket.
        let mut migrate = Umem::start_inheriting(&ours, 17, moving.migrate("fd:17"));
        let mut incoming = Umem::start_inheriting(&theirs, 9, moving.incoming("fd:9"));
        drop((ours, theirs));
        assert_eq!(incoming.event("listening")["uri"], "fd:9");
        let report = migrate.event("completed");
        assert_eq!((&report["lanes"], &report["pages_demand"]), (&0.into(), &0.into()));
        assert_eq!(report["pages_background"], PAGES);
        let report = incoming.event("completed");
        assert_eq!(report["pages_background"], PAGES);
        migrate.succeeds();
        moving.assert_arrived();
    }
}

#[test]
fn single_connection_waits_without_background() {
    let moving = Move::new(&["-p", "-n"]);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut migrate = Umem::start_inheriting(&ours, 5, moving.migrate("fd:5"));
    let mut incoming = Umem::start_inheriting(&theirs, 5, moving.incoming("fd:5"));
    drop((ours, theirs));
    migrate.event("running");
    incoming.event("running");
    migrate.signal(Signal::SIGINT);
    assert_eq!(migrate.event("completed")["pages_background"], PAGES);
    incoming.event("completed");
    moving.assert_arrived();
}

#[test]
fn one_lane_over_a_command_at_the_source() {
    for mode in [&["-p"][..], &[]] {
        let moving = Move::new(mode);
        let said = moving.scratch.path("incoming.json");
        let command = format!("{} >'{}'", shell(&moving.incoming("fd:0")), said.display());
        let mut migrate = Umem::start(moving.migrate(&format!("exec:{command}")));
        migrate.event("completed");
        migrate.succeeds();
        moving.assert_arrived();
        let said = std::fs::read_to_string(said).unwrap();
        assert!(said.contains(r#""event":"completed""#), "{said}");
        // The command was asked to end; the received guest runs on.
        assert!(moving.scratch.processes("umem incoming").is_empty());
        assert_eq!(moving.scratch.processes("umem guest --incoming").len(), 1);
    }
}

#[test]
fn one_lane_over_a_command_at_the_destination() {
    let moving = Move::new(&["-p"]);
    let command = format!("{} >/dev/null", shell(&moving.migrate("fd:0")));
    let mut incoming = Umem::start(moving.incoming(&format!("exec:{command}")));
    incoming.event("completed");
    moving.scratch.wait_until_gone("umem migrate");
    assert!(incoming.is_running(), "umem runs as long as its guest");
    moving.assert_arrived();
}

#[test]
fn failed_command_is_named_with_its_status() {
    let moving = Move::new(&["-p"]);
    for (command, status) in [
        ("exit 7", "exit status: 7"),
        ("head -c 1 >/dev/null; kill -KILL $$", "signal: 9"),
        ("no-such-program 2>/dev/null", "exit status: 127"),
    ] {
        let error = Umem::start(moving.migrate(&format!("exec:{command}"))).fails();
        assert!(error.contains(&format!("exec:{command} ended with {status}")), "{error}");
    }
    let error = Umem::start(moving.incoming("exec:echo hello; exit 3")).fails();
    assert!(error.contains("exec:echo hello; exit 3 ended with exit status: 3"), "{error}");
    assert!(!moving.scratch.ram("destination").exists());
}

/// The terminal's signals are umem's: one that ended the command would break the connection.
#[test]
fn signals_of_umem_do_not_reach_its_command() {
    let moving = Move::new(&["-p"]);
    let status = moving.scratch.path("status");
    let command = format!(
        "exec:cat /proc/self/status >'{0}.new'; mv '{0}.new' '{0}'; exec sleep 1000",
        status.display()
    );
    let mut migrate = Umem::start(moving.migrate(&command));
    let status = wait_for("the command", || std::fs::read_to_string(&status).ok());
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a line");
    let ignored = u64::from_str_radix(ignored.trim(), 16).expect("hexadecimal");
    for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP] {
        assert!(ignored >> (signal as u64 - 1) & 1 == 1, "{signal} in {ignored:x}");
    }
    migrate.signal(Signal::SIGINT);
    migrate.fails();
}

#[test]
fn command_ends_with_umem() {
    let moving = Move::new(&["-p"]);
    let pid = moving.scratch.path("pid");
    let command = format!("exec:trap '' INT; echo $$ >'{}'; exec sleep 1000", pid.display());
    let mut migrate = Umem::start(moving.migrate(&command));
    let pid = wait_for("the command", || {
        let text = std::fs::read_to_string(&pid).ok()?;
        text.trim().parse::<u32>().ok()
    });
    migrate.signal(Signal::SIGINT);
    let error = migrate.fails();
    assert!(error.contains("interrupted"), "{error}");
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "ended and reaped");
}

#[test]
fn descriptor_other_than_a_connected_stream_socket_is_refused() {
    let moving = Move::new(&["-p"]);
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (family, kind) = (AddressFamily::Inet, SockType::Stream);
    let idle = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let file = File::open(moving.scratch.ram("source")).unwrap();
    let descriptors = [
        (datagrams.as_raw_fd(), "not a stream"),
        (idle.as_raw_fd(), "not connected"),
        (file.as_raw_fd(), "is not a socket"),
    ];
    for (descriptor, why) in descriptors {
        for arguments in [moving.migrate("fd:7"), moving.incoming("fd:7")] {
            let error = Umem::start_inheriting(&descriptor, 7, arguments).fails_as_misused();
            assert!(error.starts_with("fd:7") && error.contains(why), "{error}");
        }
    }
    for arguments in [moving.migrate("fd:700"), moving.incoming("fd:700")] {
        let error = Umem::start(arguments).fails_as_misused();
        assert!(error.contains("fd:700 is not open"), "{error}");
    }
}

#[test]
fn lanes_option_is_refused_over_one_connection() {
    let moving = Move::new(&["-p", "--lanes", "2"]);
    for uri in ["fd:7", "exec:true"] {
        let error = Umem::start(moving.migrate(uri)).fails_as_misused();
        assert!(error.contains("--lanes") && error.contains("one connection"), "{error}");
        let mut arguments = moving.incoming(uri);
        arguments.insert(1, "--lanes=2".into());
        let error = Umem::start(arguments).fails_as_misused();
        assert!(error.contains("--lanes"), "{error}");
    }
}

/// Several lanes would wait for each other forever.
#[test]
fn source_with_several_lanes_is_refused_on_a_single_connection() {
    let moving = Move::new(&["-p"]);
    let listener = UnixListener::bind(moving.scratch.path("umem.sock")).unwrap();
    let uri = format!("unix:{}", moving.scratch.path("umem.sock").display());
    let migrate = Umem::start(moving.migrate(&uri));
    let (lane, _) = listener.accept().unwrap();
    let incoming = Umem::start_inheriting(&lane, 5, moving.incoming("fd:5"));
    drop(lane);
    let error = migrate.fails();
    assert!(error.contains("fd: or exec:"), "{error}");
    let error = incoming.fails();
    assert!(error.contains("only connection"), "{error}");
}

/// The connection's queued bytes go first, and one batch; nothing else of the background does.
#[test]
fn answer_overtakes_the_background_on_a_single_connection() {
    let moving = Move::new(&["-p"]);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut migrate = Umem::start_inheriting(&theirs, 5, moving.migrate("fd:5"));
    drop(theirs);
    let mut lane = LaneFromSource::welcome(ours, Capabilities::NONE);
    assert_eq!(lane.hello.bulk_lanes, 0);
    lane.until_stopped();
    lane.until_running();
    migrate.event("running");
    // The first pages are there: the background has begun.
    assert!(matches!(lane.event(), Some(Event::Hole(_) | Event::RunBegins(_))));
    let page = PAGES - 1;
    lane.send(&Frame::Request(vec![(RegionId(0), page)]));
    wait_for("the request to be read", || (unread(&lane.stream) == 0).then_some(()));
    let before = lane.page_bytes;
    let answer = PageRange { region: RegionId(0), first: page, pages: 1 };
    while lane.event().expect("pages come") != Event::RunBegins(answer) {}
    // The kernel's queue is twice 64 KiB, and a batch of 64 KiB stands before it.
    let waited_for = lane.page_bytes - before;
    assert!(waited_for <= 3 * (64 << 10), "{waited_for} bytes arrived before the answer");
    // The rest arrives too, each page once.
    let mut pages = 0;
    while lane.page_bytes < (PAGES * 3 / 4) * 4096 {
        if let Event::Data(range) = lane.event().expect("pages come") {
            pages += range.pages;
        }
    }
    assert!(pages > 0);
    lane.send(&Frame::Complete(umem_wire::Totals::default()));
    let report = migrate.event("completed");
    assert_eq!(report["pages_demand"], 1);
    migrate.succeeds();
}

/// Bytes sent that the peer has not read (unix(7), SIOCOUTQ).
fn unread(socket: &UnixStream) -> i32 {
    let mut bytes = 0;
    // SAFETY: the kernel writes one integer during the call.
    let result =
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, std::ptr::from_mut(&mut bytes)) };
    assert_eq!(result, 0);
    bytes
}

/// Both sides are interrupted before they get an answer.
#[test]
fn given_connection_without_a_peer_can_be_interrupted() {
    let moving = Move::new(&["-p"]);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut migrate = Umem::start_inheriting(&theirs, 5, moving.migrate("fd:5"));
    let mut hello = [0; umem_wire::HELLO_BYTES];
    (&ours).read_exact(&mut hello).unwrap();
    migrate.signal(Signal::SIGINT);
    assert!(migrate.fails().contains("interrupted"));
    drop((ours, theirs));

    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut incoming = Umem::start_inheriting(&theirs, 5, moving.incoming("fd:5"));
    incoming.event("listening");
    // Half a hello.
    (&ours).write_all(&hello[..64]).unwrap();
    incoming.signal(Signal::SIGINT);
    assert!(incoming.fails().contains("interrupted"));
}

//! A guest that moves between two hosts of a private network, which goes dark, loses connections, or carries other
//! traffic.
//!
//! `UMEM_MOVES`, `UMEM_MIB` and `UMEM_KILLS` extend the test in which the kernel destroys connections:
//!
//! ```sh
//! UMEM_MOVES=50 UMEM_MIB=2048 tests/run --test network destroys --no-capture
//! ```

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a test may say what it does")]

mod support;

use std::net::{TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::{
    Authority, LaneToDestination, Namespace, Network, Qmp, Random, Scratch, Umem, seed, wait_for,
};
use umem_wire::{Capabilities, Hello, LaneRole, PROTOCOL, SessionId};

const UMEM: &str = env!("CARGO_BIN_EXE_umem");

/// A guest that checks its own memory and moves from one host to the other.
struct Move {
    scratch: Scratch,
    network: Network,
    guest: Umem,
    incoming: Umem,
    migrate: Umem,
    mib: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Secured {
    Not,
    Tls,
}

impl Move {
    /// Up to the guest running at the destination, with further arguments for `umem migrate`.
    fn switched(mib: u64, secured: Secured, more: &[&str]) -> Move {
        let (scratch, network) = (Scratch::new(), Network::new());
        let security = match secured {
            Secured::Not => vec!["--insecure".to_owned()],
            Secured::Tls => {
                let authority = Authority::new("ours");
                let creds = authority.credentials(&scratch, "tls", network.destination_address());
                vec!["--tls-creds".to_owned(), creds.display().to_string()]
            }
        };
        let path = |name: &str| scratch.path(name).display().to_string();
        let of_guest = |side: &str| -> Vec<String> {
            let ram = format!("ram0={}", scratch.ram(side).display());
            let common = ["--size", &mib.to_string(), "--threads", "1", "--seed", "5"];
            let full = ["--zero-percent", "0", "--hole-percent", "0"];
            let own = ["guest", "--qmp", &path(side), "--ram", &ram];
            own.into_iter().chain(common).chain(full).map(str::to_owned).collect()
        };
        let mut guest = Umem::start(of_guest("source"));
        guest.event("ready");
        let ram = format!("ram0={}", scratch.ram("destination").display());
        let (qmp, control) = (path("destination"), path("destination.control"));
        let listen = network.listen();
        let mut arguments: Vec<String> = ["incoming", "--json", "--qmp", &qmp]
            .into_iter()
            .chain(security.iter().map(String::as_str))
            .chain(["--ram", &ram, "--control", &control, &listen, "--", UMEM])
            .map(str::to_owned)
            .collect();
        arguments.extend(of_guest("destination"));
        arguments.push("--incoming".into());
        let mut incoming = Umem::start_under(&network.destination().wrapper(), arguments);
        let uri = incoming.event("listening")["uri"].as_str().unwrap().to_owned();
        let (qmp, control) = (path("source"), path("source.control"));
        let mut arguments = vec!["migrate", "-p", "--json", "--qmp", &qmp, "--control", &control];
        arguments.extend(["--lanes", "2"]);
        arguments.extend(more);
        if secured == Secured::Tls {
            arguments.extend(security.iter().map(String::as_str));
        }
        arguments.push(&uri);
        let mut migrate = Umem::start_under(&network.source().wrapper(), arguments);
        migrate.event("running");
        incoming.event("running");
        Move { scratch, network, guest, incoming, migrate, mib }
    }

    /// Waits until this many more bytes have left the source's host, or umem has ended there.
    fn wait_for_bytes(&mut self, more: u64) {
        let host = self.network.source();
        let bytes = host.bytes_sent() + more;
        wait_for(format!("{bytes} bytes"), || {
            (host.bytes_sent() >= bytes || !self.migrate.is_running()).then_some(())
        });
    }

    /// `umem control` at one of the two sides; returns its output.
    fn control(&self, side: &str, words: &[&str]) -> String {
        let socket: PathBuf = self.scratch.path(&format!("{side}.control"));
        let output = Command::new(UMEM).arg("control").arg(socket).args(words).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// `umem control status` at one of the two sides.
    fn status(&self, side: &str) -> Value {
        serde_json::from_str(&self.control(side, &["status"])).unwrap()
    }

    /// An event at both sides.
    fn both(&mut self, name: &str) -> [Value; 2] {
        [self.migrate.event(name), self.incoming.event(name)]
    }

    /// Waits for the end on both sides, and has the guest check every word. Returns both reports.
    fn complete(mut self) -> [Value; 2] {
        let reports = self.both("completed");
        let mut qmp = Qmp::connect(&self.scratch.path("destination"));
        let verdict = qmp.execute("umem-verify", json!({}));
        assert_eq!(verdict["verified_pages"], self.mib * 256, "{verdict}");
        assert_eq!(verdict["bad_pages"], 0, "{verdict}");
        assert_eq!(verdict["guest_writes_lost"], 0, "{verdict}");
        assert_eq!(verdict["registered"], false, "{verdict}");
        qmp.quit();
        Qmp::connect(&self.scratch.path("source")).quit();
        self.migrate.succeeds();
        self.incoming.succeeds();
        self.guest.succeeds();
        reports
    }
}

/// Slow enough that the test acts before the move is complete.
const LIMIT: [&str; 2] = ["--max-postcopy-bandwidth", "32M"];

/// Packets vanish without an error: both sides detect that, and continue when there is a path again.
#[test]
fn both_sides_detect_a_silent_link() {
    goes_dark(Secured::Not, Network::darken, Network::lighten);
}

/// The same with TLS pumps between the connections and the lanes.
#[test]
fn both_sides_detect_a_silent_link_behind_tls() {
    goes_dark(Secured::Tls, Network::darken, Network::lighten);
}

/// The source's own link is down: every send fails at once, and the source keeps trying.
#[test]
fn move_resumes_when_a_link_comes_back() {
    goes_dark(Secured::Not, Network::unplug, Network::plug_in);
}

fn goes_dark(secured: Secured, darken: fn(&Network), lighten: fn(&Network)) {
    let mut random = Random::new(seed(64));
    let mut moving = Move::switched(64, secured, &LIMIT);
    moving.wait_for_bytes(random.below(48 << 20));
    darken(&moving.network);
    moving.both("recovering");
    lighten(&moving.network);
    for resumed in moving.both("resumed") {
        assert_eq!(resumed["recoveries"], 1, "{resumed}");
    }
    for report in moving.complete() {
        assert_eq!(report["recoveries"], 1, "{report}");
    }
}

/// Manually, at either side, to the same address and to another one.
#[test]
fn paused_move_resumes_at_another_address() {
    let mut moving = Move::switched(64, Secured::Not, &LIMIT);
    moving.control("source", &["pause"]);
    assert_eq!(moving.migrate.event("paused")["reason"], "paused manually");
    moving.incoming.event("recovering");
    assert_eq!(moving.status("source")["phase"], "without connection");
    assert_eq!(moving.status("destination")["phase"], "without connection");
    moving.control("source", &["resume"]);
    moving.both("resumed");

    moving.control("destination", &["pause"]);
    assert_eq!(moving.incoming.event("paused")["reason"], "paused manually");
    moving.migrate.event("recovering");
    let refused = moving.migrate.event("retrying")["reason"].as_str().unwrap().to_owned();
    assert!(refused.contains("paused here; resume it first"), "{refused}");
    moving.control("destination", &["resume"]);
    moving.both("resumed");

    // The first network stays down.
    moving.control("source", &["pause"]);
    moving.migrate.event("paused");
    moving.incoming.event("recovering");
    let elsewhere = moving.network.listen_elsewhere();
    moving.control("destination", &["resume", &elsewhere]);
    let uri = moving.incoming.event("listening")["uri"].as_str().unwrap().to_owned();
    assert!(uri.starts_with(elsewhere.trim_end_matches('0')) && uri != elsewhere, "{uri}");
    moving.control("source", &["resume", &uri]);
    for resumed in moving.both("resumed") {
        assert_eq!(resumed["recoveries"], 3, "{resumed}");
    }
    for side in ["source", "destination"] {
        let status = moving.status(side);
        assert_eq!(status["connection-losses"], 3, "{status}");
        assert!(status["disconnected-s"].as_f64() > Some(0.0), "{status}");
    }
    for report in moving.complete() {
        assert_eq!(report["recoveries"], 3, "{report}");
    }
}

/// A resolver that does not answer does not delay an interrupt.
#[test]
fn name_lookup_can_be_interrupted() {
    let (scratch, network) = (Scratch::new(), Network::new());
    let (ram, resolver) = (scratch.ram("source"), scratch.path("resolv.conf"));
    std::fs::write(&ram, [1; 4096]).unwrap();
    // Packets to it vanish without an error.
    std::fs::write(&resolver, "nameserver 10.213.2.1\n").unwrap();
    network.darken();
    let prepare =
        format!("mount --bind {} /etc/resolv.conf && exec \"$0\" \"$@\"", resolver.display());
    let of_its_own = ["unshare", "--mount", "sh", "-c", &prepare];
    let wrapper = [&network.source().wrapper()[..], &of_its_own].concat();
    let ram = format!("ram0={}", ram.display());
    let arguments = ["migrate", "-p", "--ram", &ram, "tcp:there.example:4444"];
    let mut migrate = Umem::start_under(&wrapper, arguments);
    wait_for("the look-up thread", || looks_up(&migrate).then_some(()));
    migrate.signal(Signal::SIGINT);
    assert_eq!(migrate.fails(), "interrupted; the guest continues at the source");
}

/// Nor does it delay serving pages: the name of a manual resume is looked up in parallel.
#[test]
fn name_lookup_of_a_manual_resume_blocks_no_other_work() {
    const PAGES: u64 = 256;
    let scratch = Scratch::new();
    let path = |name: &str| scratch.path(name).display().to_string();
    // A resolver that receives questions and does not answer.
    let _resolver = UdpSocket::bind("127.0.0.153:53").unwrap();
    let configuration = path("resolv.conf");
    std::fs::write(&configuration, "nameserver 127.0.0.153\noptions timeout:30 attempts:5\n")
        .unwrap();
    let prepare = format!("mount --bind {configuration} /etc/resolv.conf && exec \"$0\" \"$@\"");
    let ram = format!("ram0={}", scratch.ram("destination").display());
    let (control, qmp) = (path("control"), path("guest.qmp"));
    let own = ["incoming", "--json", "--ram", &ram, "--control", &control, "tcp:127.0.0.1:0", "--"];
    let guest = [
        UMEM,
        "guest",
        "--incoming",
        "--threads",
        "0",
        "--ram",
        &ram,
        "--size",
        "1",
        "--qmp",
        &qmp,
    ];
    let wrapper = ["unshare", "--mount", "sh", "-c", &prepare];
    let mut incoming = Umem::start_under(&wrapper, own.into_iter().chain(guest));
    let listening = incoming.event("listening");
    let address = listening["uri"].as_str().unwrap().strip_prefix("tcp:").unwrap();
    let hello = Hello {
        versions: PROTOCOL,
        capabilities: Capabilities::RECOVERY,
        session: SessionId([7; 16]),
        role: LaneRole::Demand,
        index: 0,
        bulk_lanes: 0,
        epoch: 0,
        proof: [0; 32],
    };
    let mut lane = LaneToDestination::open(TcpStream::connect(address).unwrap(), &hello).unwrap();
    lane.switch_over(PAGES * 4096);
    incoming.event("running");
    let order = |words: &[&str]| {
        let words = ["control", &control].into_iter().chain(words.iter().copied());
        Umem::start(words).succeeds();
    };
    order(&["resume", "tcp:there.example:4444"]);
    wait_for("the look-up thread", || looks_up(&incoming).then_some(()));
    order(&["pause"]);
    incoming.event("paused");
    assert!(looks_up(&incoming), "the look-up still runs");
}

/// Whether a thread of the process is looking up a name.
fn looks_up(umem: &Umem) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{}/task", umem.pid())).unwrap().flatten();
    let mut names = threads.flat_map(|task| std::fs::read_to_string(task.path().join("comm")));
    names.any(|name| name.trim() == "umem-lookup")
}

/// `ss -K`: the kernel destroys a connection and resets the peer's. Lanes of either side, repeatedly.
#[test]
fn connections_destroyed_by_the_kernel_are_reopened() {
    let number = |name: &str, otherwise: u64| {
        std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
    };
    let (moves, mib) = (number("UMEM_MOVES", 1), number("UMEM_MIB", 256));
    let kills = number("UMEM_KILLS", 10);
    let mut random = Random::new(seed(mib ^ kills << 32));
    // Two seconds without interruptions.
    let limit = format!("{}M", mib.div_ceil(2));
    for round in 1..=moves {
        let mut moving = Move::switched(mib, Secured::Not, &["--max-postcopy-bandwidth", &limit]);
        let mut killed = 0;
        for _ in 0..kills {
            // Half of the move on average.
            moving.wait_for_bytes(random.below((mib << 20) / kills));
            let host = match random.below(2) {
                0 => moving.network.source(),
                _ => moving.network.destination(),
            };
            killed += u64::from(destroy_one(host, &mut random));
        }
        let [source, destination] = moving.complete();
        println!(
            "{round}: {killed} connections destroyed, {} and {} recoveries, {:.3} s without any",
            source["recoveries"],
            destination["recoveries"],
            destination["disconnected_s"].as_f64().unwrap()
        );
        assert!(killed > 0 && source["recoveries"].as_u64() > Some(0), "{source}");
    }
}

/// Has the kernel of this host destroy one of its connections; false if there is none.
fn destroy_one(host: &Namespace, random: &mut Random) -> bool {
    let listed = host.run(&["ss", "-Htn", "state", "established"]);
    // Queued bytes, then the local address, then the peer's.
    let column = |line: &str, index| line.split_ascii_whitespace().nth(index).map(str::to_owned);
    let lanes: Vec<_> =
        listed.lines().filter_map(|line| Some((column(line, 2)?, column(line, 3)?))).collect();
    if lanes.is_empty() {
        return false;
    }
    let (ours, theirs) = &lanes[random.below(lanes.len() as u64) as usize];
    let listed = host.run(&["ss", "-HtnK", "src", ours, "dst", theirs]);
    !listed.trim().is_empty()
}

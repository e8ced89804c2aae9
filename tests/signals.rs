//! Signals: which stop umem, the consequences for the guest, and signals that are not for umem.

mod support;

use std::io::{IoSlice, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, channel};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use support::{Cutter, Guests, Qmp, Scratch, Umem, wait_for};

/// Every signal that ends a process by default and does not indicate a fault of the process, by number; two real-time
/// ones.
fn enders() -> Vec<i32> {
    let named = [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGALRM,
        libc::SIGTERM,
        libc::SIGSTKFLT,
        libc::SIGXCPU,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGIO,
        libc::SIGPWR,
    ];
    named.into_iter().chain([libc::SIGRTMIN(), libc::SIGRTMAX()]).collect()
}

/// Any number, also those without a name.
fn send(umem: &Umem, signal: i32) {
    let pid = i32::try_from(umem.pid()).expect("pids are small");
    // SAFETY: numbers only; the process is our child, and has not been reaped.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

/// The guest's process, the only child of `umem incoming`.
fn guest_of(incoming: &Umem) -> Pid {
    let path = format!("/proc/{0}/task/{0}/children", incoming.pid());
    let children = std::fs::read_to_string(path).expect("the process exists");
    Pid::from_raw(children.trim().parse().expect("one child"))
}

/// Whether a process runs. An ended process may be waiting for its parent.
fn is_there(pid: Pid) -> bool {
    !matches!(state(pid).chars().next(), None | Some('Z'))
}

/// The state as in `/proc/PID/stat`, with the fields behind it; empty if there is no such process.
fn state(pid: Pid) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").map_or_else(String::new, |(_, state)| state.to_owned())
}

/// Up to a guest that stands still at the source, because its data is held back.
fn stopped(scratch: &Scratch, wrapper: &[&str]) -> (Guests, Umem, Cutter) {
    let guests = Guests::quiet(scratch, &["--json"]);
    let cutter = Cutter::to(guests.uri());
    let qmp = scratch.path("source").display().to_string();
    let words = ["migrate", "--stop-first", "--json", "--qmp", &qmp, cutter.uri()];
    let mut migrate = Umem::start_under(wrapper, words);
    migrate.event("stopped");
    (guests, migrate, cutter)
}

#[test]
fn every_signal_cancels_while_the_source_owns_the_guest() {
    for signal in enders() {
        let scratch = Scratch::new();
        let (mut guests, migrate, _cutter) = stopped(&scratch, &[]);
        send(&migrate, signal);
        assert_eq!(
            migrate.fails(),
            "interrupted; the guest continues at the source",
            "signal {signal}"
        );
        assert_eq!(Qmp::connect(&scratch.path("source")).status(), "running", "signal {signal}");
        assert!(guests.source_runs());
        let told = guests.incoming.fails();
        assert!(told.contains("the source gave up"), "signal {signal}: {told}");
    }
}

#[test]
fn no_signal_ends_a_destination_with_missing_pages() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    let cutter = Cutter::to(guests.uri());
    let mut migrate = guests.migrate_to(cutter.uri(), &["--json", "-p"]);
    migrate.event("running");
    guests.incoming.event("running");
    for (index, signal) in enders().into_iter().enumerate() {
        for (umem, words) in [
            (&guests.incoming, "so umem continues until"),
            (&migrate, "continuing until it has them"),
        ] {
            send(umem, signal);
            wait_for(format!("an answer to signal {signal}"), || {
                (umem.stderr().matches(words).count() > index).then_some(())
            });
        }
    }
    cutter.let_pages_go();
    guests.incoming.event("completed");
    migrate.succeeds();
    Qmp::connect(&scratch.path("destination")).quit();
    guests.incoming.succeeds();
}

/// systemd's actions on a service that is stopped (systemd.kill(5)): the unit names the signal, and whether it goes to
/// all processes or to umem alone.
fn stop_service(incoming: &Umem, guest: Pid) {
    let unit =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/programs/install/umem-incoming@.service");
    let unit = std::fs::read_to_string(unit).expect("the file exists");
    let says = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key));
    let signal: Signal = says("KillSignal=").unwrap_or("SIGTERM").parse().expect("a signal");
    send(incoming, signal as i32);
    match says("KillMode=") {
        Some("mixed") => {}
        None | Some("control-group") => kill(guest, signal).expect("the process exists"),
        Some(other) => panic!("KillMode={other}"),
    }
}

#[test]
fn stopped_service_keeps_an_incomplete_guest_and_ends_a_complete_one() {
    let scratch = Scratch::new();
    let mut guests = Guests::quiet(&scratch, &["--json"]);
    let cutter = Cutter::to(guests.uri());
    let mut migrate = guests.migrate_to(cutter.uri(), &["--json", "-p"]);
    migrate.event("running");
    guests.incoming.event("running");
    let guest = guest_of(&guests.incoming);
    stop_service(&guests.incoming, guest);
    wait_for("its remark that it continues", || {
        guests.incoming.stderr().contains("so umem continues until").then_some(())
    });
    cutter.let_pages_go();
    guests.incoming.event("completed");
    migrate.succeeds();
    assert!(is_there(guest));
    stop_service(&guests.incoming, guest);
    assert_eq!(guests.incoming.event("stopping")["guest_pid"], guest.as_raw());
    guests.incoming.wait();
    assert!(!is_there(guest));
}

/// A pipe without a reader and a file that has grown too large are errors of a write; a hang-up has no effect on a umem
/// started with nohup(1).
#[test]
fn ignored_signals_stay_ignored() {
    let scratch = Scratch::new();
    let (mut guests, migrate, cutter) = stopped(&scratch, &["nohup"]);
    for signal in [libc::SIGPIPE, libc::SIGXFSZ, libc::SIGHUP] {
        send(&migrate, signal);
    }
    cutter.let_pages_go();
    guests.incoming.event("completed");
    migrate.succeeds();
    Qmp::connect(&scratch.path("destination")).quit();
    guests.incoming.succeeds();
}

/// Up to a complete guest, and the umem that stays with it.
fn complete(scratch: &Scratch) -> (Guests, Pid) {
    let mut guests = Guests::quiet(scratch, &["--json"]);
    guests.migrate(&["-p"]).succeeds();
    guests.incoming.event("completed");
    let guest = guest_of(&guests.incoming);
    (guests, guest)
}

#[test]
fn ctrl_c_terminates_a_complete_guest() {
    let scratch = Scratch::new();
    let (mut guests, guest) = complete(&scratch);
    guests.incoming.signal(Signal::SIGINT);
    assert_eq!(guests.incoming.event("stopping")["guest_pid"], guest.as_raw());
    // The guest's end by a signal is a failure; a QEMU would have exited cleanly.
    let status = guests.incoming.wait();
    assert_eq!((status.code(), status.signal()), (Some(1), None));
    assert!(!is_there(guest));
}

#[test]
fn other_signals_leave_the_guest_and_report_its_pid() {
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1] {
        let scratch = Scratch::new();
        let (mut guests, guest) = complete(&scratch);
        send(&guests.incoming, signal);
        assert_eq!(guests.incoming.event("left")["guest_pid"], guest.as_raw());
        assert!(guests.incoming.wait().success());
        assert!(guests.incoming.stderr().is_empty(), "{}", guests.incoming.stderr());
        assert!(is_there(guest));
        Qmp::connect(&scratch.path("destination")).quit();
        scratch.wait_until_gone("--incoming");
    }
}

/// umem waits for a process that ignores SIGTERM, and not forever.
#[test]
fn second_ctrl_c_leaves_a_guest_that_ignores_sigterm() {
    let scratch = Scratch::new();
    let (mut guests, guest) = complete(&scratch);
    kill(guest, Signal::SIGSTOP).expect("the process exists");
    // Of two pending signals the one that ends it would come first.
    wait_for("the guest's stop", || state(guest).starts_with('T').then_some(()));
    guests.incoming.signal(Signal::SIGINT);
    guests.incoming.event("stopping");
    guests.incoming.signal(Signal::SIGINT);
    assert_eq!(guests.incoming.event("left")["guest_pid"], guest.as_raw());
    assert_eq!(guests.incoming.wait().code(), Some(1));
    assert!(is_there(guest));
}

/// COMMAND may be a wrapper that stays: its children are stopped with it.
#[test]
fn ctrl_c_terminates_the_child_of_a_wrapper() {
    let scratch = Scratch::new();
    let [ram, socket] = [scratch.ram("ram"), scratch.path("handoff")];
    let [qmp, pid] = [scratch.path("source"), scratch.path("pid")];
    let umem = env!("CARGO_BIN_EXE_umem");
    let mut guest = Umem::start(
        format!("guest --qmp {} --ram ram0={} --size 8 --threads 0", qmp.display(), ram.display())
            .split(' '),
    );
    guest.event("ready");
    let qmp_there = scratch.path("destination").display().to_string();
    let wrapped = format!(
        "{umem} guest --incoming --kind anonymous --qmp {qmp_there} --ram ram0 --handoff {0} --size 8 \
         --threads 0 & echo $! >{1}; wait",
        socket.display(),
        pid.display()
    );
    let socket = socket.display().to_string();
    let words =
        ["incoming", "--json", "--handoff", &socket, "--qmp", &qmp_there, "tcp:127.0.0.1:0"];
    let mut incoming = Umem::start(words.iter().copied().chain(["--", "sh", "-c", &wrapped]));
    let uri = incoming.event("listening")["uri"].as_str().expect("an address").to_owned();
    let qmp = qmp.display().to_string();
    Umem::start(["migrate", "-p", "--json", "--qmp", &qmp, &uri]).succeeds();
    incoming.event("completed");
    let arrived =
        std::fs::read_to_string(&pid).expect("the pid was written before the guest arrived");
    let arrived = Pid::from_raw(arrived.trim().parse().expect("a pid"));
    incoming.signal(Signal::SIGINT);
    incoming.event("stopping");
    incoming.wait();
    wait_for("the end of the wrapped guest", || (!is_there(arrived)).then_some(()));
}

/// Stands before a monitor, and swallows one command: the monitor no longer answers umem on that connection.
struct Deaf {
    socket: PathBuf,
    /// Signals that the command has arrived.
    swallowed: Receiver<()>,
    /// Bytes of events sent instead of an answer.
    said_bytes: Arc<AtomicU64>,
}

/// The monitor's behaviour instead of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Silent,
    /// It sends events, without end.
    Talks,
}

/// The minimum bytes of events before the test continues.
const TALK_BYTES: u64 = 32 << 20;

impl Deaf {
    /// `part` is a part of the command's JSON. umem may connect several times.
    fn to(monitor: PathBuf, socket: PathBuf, part: String, manner: Manner) -> Deaf {
        let listener = UnixListener::bind(&socket).expect("a new socket");
        let (sender, swallowed) = channel();
        let said_bytes = Arc::new(AtomicU64::new(0));
        let said = said_bytes.clone();
        std::thread::spawn(move || {
            for umem in listener.incoming().map_while(Result::ok) {
                let monitor = wait_for("the monitor", || UnixStream::connect(&monitor).ok());
                let (answers, back) = (monitor.try_clone().unwrap(), umem.try_clone().unwrap());
                std::thread::spawn(move || std::io::copy(&mut &answers, &mut &back));
                let back = umem.try_clone().unwrap();
                let (sender, said, part) = (sender.clone(), said.clone(), part.clone());
                let swallow = move || {
                    let _ = sender.send(());
                    if manner == Manner::Silent {
                        return;
                    }
                    let (mut back, said) = (back.try_clone().unwrap(), said.clone());
                    std::thread::spawn(move || talk(&mut back, &said));
                };
                std::thread::spawn(move || relay(&umem, &monitor, &part, &swallow));
            }
        });
        Deaf { socket, swallowed, said_bytes }
    }

    /// Waits until it has sent many events, if it does, and checks that umem did not keep them.
    fn has_talked(&self, umem: &Umem, manner: Manner) {
        if manner == Manner::Silent {
            return;
        }
        wait_for("many events", || (self.said_bytes.load(SeqCst) > TALK_BYTES).then_some(()));
        let status = std::fs::read_to_string(format!("/proc/{}/status", umem.pid())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
        let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
        assert!(peak << 10 < TALK_BYTES * 2, "{peak} kB");
    }

    fn wait(&self) {
        self.swallowed.recv_timeout(support::DEADLINE).expect("the command comes");
    }
}

fn talk(back: &mut UnixStream, said: &AtomicU64) {
    let event =
        format!("{{\"event\":\"RESUME\",\"data\":{{\"why\":\"{}\"}}}}\n", "x".repeat(60000));
    while back.write_all(event.as_bytes()).is_ok() {
        said.fetch_add(event.len() as u64, SeqCst);
    }
}

/// Forwards commands, with their descriptors.
fn relay(umem: &UnixStream, monitor: &UnixStream, part: &str, swallow: &dyn Fn()) {
    loop {
        let mut bytes = [0; 65536];
        let mut space = nix::cmsg_space!([i32; 4]);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<UnixAddr>(umem.as_raw_fd(), &mut buffers, Some(&mut space), flags);
        let Ok(received) = received else { return };
        let mut descriptors = Vec::new();
        for message in received.cmsgs().expect("the buffer holds the control messages") {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                // SAFETY: the kernel has just made them for this process, and they have no other owner.
                let owned = numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
                descriptors.extend(owned);
            }
        }
        let count = received.bytes;
        if count == 0 {
            return;
        }
        if String::from_utf8_lossy(&bytes[..count]).contains(part) {
            swallow();
            continue;
        }
        let raw: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[][..] } else { &rights[..] };
        let data = [IoSlice::new(&bytes[..count])];
        let flags = MsgFlags::MSG_NOSIGNAL;
        if sendmsg::<UnixAddr>(monitor.as_raw_fd(), &data, rights, flags, None).is_err() {
            return;
        }
    }
}

/// A migration whose guest's monitor at the source stops answering.
fn to_the_deaf(
    scratch: &Scratch,
    command: &'static str,
    manner: Manner,
) -> (Guests, Umem, Deaf, Cutter) {
    migrate_to_the_deaf(scratch, "--stop-first", execute(command), manner)
}

/// A part of a command's JSON.
fn execute(command: &str) -> String {
    format!("\"execute\":\"{command}\"")
}

/// The same with this manner of migration, for the command that has `part` in its JSON.
fn migrate_to_the_deaf(
    scratch: &Scratch,
    option: &str,
    part: String,
    manner: Manner,
) -> (Guests, Umem, Deaf, Cutter) {
    let guests = Guests::quiet(scratch, &["--json"]);
    let cutter = Cutter::to(guests.uri());
    let deaf = Deaf::to(scratch.path("source"), scratch.path("deaf"), part, manner);
    let sessions = scratch.path("sessions").display().to_string();
    let qmp = deaf.socket.display().to_string();
    // The process at the other end of the socket is this one, and has none of the guest's memory.
    let ram = format!("ram0={}", scratch.ram("source").display());
    let words = ["migrate", option, "--json", "--session-dir", &sessions, "--qmp", &qmp];
    let words = words.iter().copied().chain(["--ram", &ram, cutter.uri()]);
    let migrate = Umem::start(words);
    (guests, migrate, deaf, cutter)
}

#[test]
fn unresponsive_monitor_is_waited_for_until_a_signal() {
    for (command, manner) in [
        ("qmp_capabilities", Manner::Silent),
        ("qom-list", Manner::Silent),
        ("qmp_capabilities", Manner::Talks),
        ("qom-list", Manner::Talks),
    ] {
        let scratch = Scratch::new();
        let (_guests, mut migrate, deaf, _cutter) = to_the_deaf(&scratch, command, manner);
        deaf.wait();
        deaf.has_talked(&migrate, manner);
        migrate.signal(Signal::SIGTERM);
        assert_eq!(migrate.fails(), "interrupted; the guest continues at the source");
    }
}

#[test]
fn monitor_without_a_greeting_is_waited_for_until_a_signal() {
    let scratch = Scratch::new();
    let silent = scratch.path("silent");
    let listener = UnixListener::bind(&silent).expect("a new socket");
    let silent = silent.display().to_string();
    let mut migrate = Umem::start(["migrate", "--json", "--qmp", &silent, "tcp:127.0.0.1:1"]);
    let _connection = listener.accept().expect("umem connects");
    migrate.signal(Signal::SIGINT);
    assert_eq!(migrate.fails(), "interrupted; the guest continues at the source");
}

/// The monitor of the demo's guest changes no setting to track writes, so no record exists, and umem names no
/// `--resume`.
#[test]
fn hung_monitor_without_changed_settings_is_left_without_a_command_to_resume() {
    let scratch = Scratch::new();
    // The first command of the tracking itself.
    let begins = "\"from\":0".to_owned();
    let (mut guests, mut migrate, deaf, _cutter) =
        migrate_to_the_deaf(&scratch, "--precopy", begins, Manner::Silent);
    deaf.wait();
    migrate.signal(Signal::SIGINT);
    migrate.signal(Signal::SIGTERM);
    assert_eq!(migrate.fails(), "interrupted; the guest continues at the source");
    let files = std::fs::read_dir(scratch.path("sessions")).unwrap().flatten();
    let mut records = files.filter(|file| file.path().extension().is_some_and(|it| it == "source"));
    assert!(records.next().is_none(), "a record exists, and no line names it");
    assert!(guests.source_runs());
}

/// The guest may stand still then: the printed commands query and continue it, and they work.
#[test]
fn hung_monitor_of_a_stopped_guest_is_left_at_the_second_signal() {
    for (command, manner) in [
        ("migrate", Manner::Silent),
        ("cont", Manner::Silent),
        ("migrate", Manner::Talks),
        ("cont", Manner::Talks),
    ] {
        let scratch = Scratch::new();
        let (_guests, mut migrate, deaf, _cutter) = to_the_deaf(&scratch, command, manner);
        if command == "cont" {
            migrate.event("stopped");
        } else {
            deaf.wait();
        }
        // Two signals that do not merge, however close they are.
        migrate.signal(Signal::SIGINT);
        if command == "cont" {
            deaf.wait();
        }
        deaf.has_talked(&migrate, manner);
        migrate.signal(Signal::SIGTERM);
        assert_eq!(migrate.wait().code(), Some(1), "{command}: {}", migrate.stderr());
        let stderr = migrate.stderr();
        for part in ["the monitor has not answered", "`query-status`", "umem migrate --resume "] {
            assert!(stderr.contains(part), "{command}: {part:?} in {stderr}");
        }
        let (_, session) = stderr.split_once("umem migrate --resume ").expect("a command");
        let session = session.split_whitespace().next().expect("a number").to_owned();
        // To the monitor itself, which serves one client after the other.
        let resume = |qmp: &Path| {
            let sessions = scratch.path("sessions");
            let file = sessions.join(format!("{session}.source"));
            let record = std::fs::read_to_string(&file).expect("the session file stays");
            let deaf = deaf.socket.display().to_string();
            std::fs::write(&file, record.replace(&deaf, &qmp.display().to_string())).unwrap();
            let sessions = sessions.display().to_string();
            Umem::start(["migrate", "--json", "--session-dir", &sessions, "--resume", &session])
        };
        let mut resumed = resume(&scratch.path("source"));
        resumed.event("undone");
        resumed.succeeds();
        assert_eq!(Qmp::connect(&scratch.path("source")).status(), "running", "{command}");
    }
}

/// The guest belongs to the destination, and does not run yet.
#[test]
fn hung_destination_monitor_is_left_at_the_second_signal() {
    [Manner::Silent, Manner::Talks].into_iter().for_each(a_destinations_monitor_is_left);
}

fn a_destinations_monitor_is_left(manner: Manner) {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.path(name).display().to_string();
    let ram = |name: &str| format!("ram0={}", scratch.ram(name).display());
    let (qmp, sessions) = (path("source"), path("sessions"));
    let (ram_here, ram_there) = (ram("source"), ram("destination"));
    let of_guest = |qmp: &str, ram: &str| {
        ["guest", "--qmp", qmp, "--ram", ram, "--size", "8", "--threads", "0"].map(str::to_owned)
    };
    let mut guest = Umem::start(of_guest(&qmp, &ram_here));
    guest.event("ready");
    let [there, deaf] = ["destination", "deaf"].map(|name| scratch.path(name));
    let deaf = Deaf::to(there, deaf, execute("cont"), manner);
    let there = path("destination");
    let words = ["incoming", "--json", "--session-dir", &sessions, "--qmp", &path("deaf")]
        .map(str::to_owned);
    let words =
        words.into_iter().chain(["--ram", &ram_there, "tcp:127.0.0.1:0", "--"].map(str::to_owned));
    let words = words.chain([env!("CARGO_BIN_EXE_umem").to_owned()]);
    let words = words.chain(of_guest(&there, &ram_there)).chain(["--incoming".to_owned()]);
    let mut incoming = Umem::start(words);
    let uri = incoming.event("listening")["uri"].as_str().expect("an address").to_owned();
    let arrived = guest_of(&incoming);
    let mut migrate =
        Umem::start(["migrate", "--json", "-p", "--session-dir", &sessions, "--qmp", &qmp, &uri]);
    deaf.wait();
    deaf.has_talked(&incoming, manner);
    incoming.signal(Signal::SIGTERM);
    wait_for("the remark about the wait", || {
        incoming.stderr().contains("has not answered `cont` yet").then_some(())
    });
    incoming.signal(Signal::SIGTERM);
    assert_eq!(incoming.wait().code(), Some(1), "{}", incoming.stderr());
    let stderr = incoming.stderr();
    assert!(
        stderr.contains("umem incoming --resume ") && stderr.contains("`query-status`"),
        "{stderr}"
    );
    assert!(is_there(arrived), "the guest waits");
    // The source has not been notified of the end.
    migrate.event("recovering");
    assert!(migrate.is_running());
}

#[test]
fn fifo_without_a_writer_is_waited_for_until_a_signal() {
    let scratch = Scratch::new();
    let fifo = scratch.path("secret");
    mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).expect("a new name");
    let fifo = fifo.display().to_string();
    let waits = |umem: &Umem| {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", umem.pid())).ok()?;
        let mut names = tasks
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.any(|name| name.trim() == "umem-waiting").then_some(())
    };
    let migrate =
        ["migrate", "--json", "--secret-file", &fifo, "--ram", "ram0=/none", "tcp:127.0.0.1:1"];
    let incoming = ["incoming", "--json", "--secret-file", &fifo, "tcp:127.0.0.1:0", "--", "true"];
    for (words, text) in [
        (&migrate[..], "interrupted; the guest continues at the source"),
        (&incoming[..], "interrupted; no guest had arrived"),
    ] {
        let mut umem = Umem::start(words);
        wait_for("the thread that reads", || waits(&umem));
        umem.signal(Signal::SIGINT);
        assert_eq!(umem.fails(), text);
    }
    let report = ["migrate", "--json", "--report", &fifo, "--ram", "ram0=/none", "tcp:127.0.0.1:1"];
    let refused = Umem::start(report).fails();
    assert!(refused.contains("--report"), "{refused}");
}

/// Signals do not kill the other programs that move pages either.
#[test]
fn any_signal_ends_demo_and_bench_cleanly() {
    for signal in [libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1] {
        // The guest touches 64 MiB/s, and progress is printed once a second.
        let slowly = ["demo", "--json", "--size", "512", "--max-postcopy-bandwidth", "1M"];
        let mut demo = Umem::start(slowly);
        demo.event("progress");
        let path = format!("/proc/{0}/task/{0}/children", demo.pid());
        let children = std::fs::read_to_string(path).expect("the process exists");
        let children: Vec<i32> =
            children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        assert!(children.len() > 1, "{children:?}");
        send(&demo, signal);
        assert_eq!(demo.fails(), "interrupted; the demo's processes have been ended");
        assert!(!children.into_iter().any(|pid| is_there(Pid::from_raw(pid))));

        let mut server = Umem::start(["bench", "server", "--json", "tcp:127.0.0.1:0"]);
        let uri = server.event("listening")["uri"].as_str().expect("an address").to_owned();
        let mut client = Umem::start(["bench", "client", "-t", "80000", "-i", "0.1", &uri]);
        client.line();
        send(&client, signal);
        assert_eq!(client.wait().code(), Some(1), "{}", client.stderr());
        assert!(client.stderr().contains("interrupted"), "{}", client.stderr());
        server.event("tested");
        send(&server, signal);
        assert_eq!(server.wait().code(), Some(0), "{}", server.stderr());
    }
}

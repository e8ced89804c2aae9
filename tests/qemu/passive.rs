//! Migrations that another program begins: this manager sends the commands to both QEMUs, umem carries the stream
//! between them, and the manager starts the guest at the destination when the source's QEMU has completed its
//! migration.

use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::destination::Destination;
use crate::moving::Moving;
use crate::support::{
    Cutter, Ends, Machine, Qemu, QemuVersion, Qmp, Scratch, SourceRam, Umem, wait_for,
};
use crate::{NOBODY, boot, says};

/// The capabilities that a management tool switches on at the source.
const MANAGED: &[&str] = &["return-path", "switchover-ack", "pause-before-switchover"];

/// The tests' Linux guest, whose memory is QEMU's own.
fn machine() -> Machine {
    let guest = "umem.mib=96".into();
    Machine { source_ram: SourceRam::Default, guest, ..Machine::linux(QemuVersion::V10_0) }
}

fn set(qmp: &mut Qmp, names: &[&str]) {
    let on = |name: &&str| json!({ "capability": name, "state": true });
    let list: Vec<Value> = names.iter().map(on).collect();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": list }));
}

fn migration(qmp: &mut Qmp) -> String {
    let migration = qmp.execute("query-migrate", json!({}));
    migration["status"].as_str().unwrap_or("none").to_owned()
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// A migration under external management, with both umems started.
struct Managed {
    source: Qemu,
    umem: Umem,
    destination: Destination,
    /// The manager's connection to the destination's monitor.
    arriving: Qmp,
    socket: PathBuf,
}

impl Managed {
    /// Starts umems with these options, through a relay if one is given.
    fn start(
        scratch: &Scratch,
        machine: &Machine,
        options: &[&str],
        through: impl FnOnce(&str) -> Option<String>,
    ) -> Managed {
        let source = boot(machine, scratch);
        let (destination, arriving) = external_destination(machine, scratch);
        let uri = through(&destination.uri).unwrap_or_else(|| destination.uri.clone());
        let socket = scratch.path("migration");
        let umem = listen(&socket, &uri, &[options, &["--switchover", "external"]].concat());
        Managed { source, umem, destination, arriving, socket }
    }

    /// The manager tells the source to migrate, once umem waits for that.
    fn migrate(&mut self, capabilities: &[&str]) {
        self.umem.event("listening");
        self.begin(capabilities);
    }

    fn begin(&mut self, capabilities: &[&str]) {
        // A guest that writes all the time stops in the end, also on a slow machine.
        let fast = json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": 3000 });
        self.source.qmp.execute("migrate-set-parameters", fast);
        set(&mut self.source.qmp, capabilities);
        self.source.qmp.execute("migrate", json!({ "uri": unix(&self.socket) }));
        if capabilities.contains(&"pause-before-switchover") {
            let go_on = json!({ "state": "pre-switchover" });
            self.is("pre-switchover");
            self.source.qmp.execute("migrate-continue", go_on);
        }
    }

    /// With `-n` pages that the guest does not touch wait for a signal: some pages are left until then.
    fn send_the_rest(&mut self) {
        wait_for("the rest to be sent", || {
            let is_sent = self.umem.stderr().contains("sending the remaining pages");
            if !is_sent {
                self.umem.signal(Signal::SIGINT);
            }
            is_sent.then_some(())
        });
    }

    /// Waits until the source's migration has this status.
    fn is(&mut self, status: &str) {
        wait_for(format!("the source's migration to be {status}"), || {
            assert!(self.umem.is_running() || status == "failed", "{}", self.umem.stderr());
            (migration(&mut self.source.qmp) == status).then_some(())
        });
    }

    /// The source has completed: the manager starts the guest at the destination, where all of its memory arrives.
    fn completes(mut self) {
        wait_for("the source's migration to complete", || {
            let status = migration(&mut self.source.qmp);
            assert!(!["failed", "cancelled"].contains(&status.as_str()), "{}", self.umem.stderr());
            (status == "completed").then_some(())
        });
        assert_eq!(self.source.qmp.status(), "postmigrate");
        assert_ne!(self.arriving.status(), "running", "nobody has let it run");
        self.arriving.execute("cont", json!({}));
        self.destination.umem.event("left_to_manager");
        let ours = self.umem.event("completed");
        let report = self.destination.umem.event("completed");
        for name in ["total_bytes", "data_bytes", "zero_bytes", "hole_bytes"] {
            assert_eq!(ours[name], report[name], "{name}");
        }
        assert_eq!(report["total_bytes"], 256_u64 << 20);
        self.is_whole();
        self.umem.succeeds();
        assert!(!self.socket.exists());
        self.arriving.quit();
        self.destination.umem.succeeds();
        assert_eq!(self.source.qmp.status(), "postmigrate");
        self.source.qmp.quit();
    }

    fn is_whole(&mut self) {
        let last = self.source.serial.last_beat();
        let serial = &mut self.destination.serial;
        let first = serial.beat("a number after the source's last", |_| true);
        assert!(first.number > last.number, "{first:?} at the destination after {last:?}");
        serial.beat("two more sweeps", |beat| beat.passes >= first.passes + 2);
        assert_eq!(self.source.serial.last_beat().number, last.number, "both guests run");
    }

    /// The migration has failed: the source's QEMU itself resumes its guest.
    fn goes_on_at_the_source(mut self, status: &str) {
        wait_for(format!("the source's migration to have {status}"), || {
            (migration(&mut self.source.qmp) == status).then_some(())
        });
        wait_for("the guest to go on", || (self.source.qmp.status() == "running").then_some(()));
        self.source.serial.goes_on();
        self.destination.umem.fails();
        assert!(!self.socket.exists());
    }
}

fn external_destination(machine: &Machine, scratch: &Scratch) -> (Destination, Qmp) {
    listening_destination(machine, scratch, &["--switchover", "external"])
}

/// A `umem incoming` whose QEMU listens by its manager's command.
fn listening_destination(
    machine: &Machine,
    scratch: &Scratch,
    options: &[&str],
) -> (Destination, Qmp) {
    let path = scratch.path("arrival");
    let connect = unix(&path);
    let sessions = scratch.path("arriving-sessions").display().to_string();
    let ours = ["--connect", &connect, "--session-dir", &sessions];
    let options = [&ours[..], options].concat();
    let destination = Destination::start_with(machine, scratch, &options, "tcp:127.0.0.1:0");
    let mut arriving = Qmp::connect(&destination.qmp);
    set(&mut arriving, &["return-path"]);
    arriving.execute("migrate-incoming", json!({ "uri": connect }));
    wait_for("QEMU to listen", || path.exists().then_some(()));
    (destination, arriving)
}

/// A `umem migrate` that waits for QEMU at this path.
fn listen(path: &Path, uri: &str, options: &[&str]) -> Umem {
    let listen = unix(path);
    Umem::start([&["migrate", "--json", "--listen", &listen], options, &[uri]].concat())
}

fn direct(_: &str) -> Option<String> {
    None
}

#[test]
fn guest_moves_when_its_manager_begins_the_migration() {
    let scratch = Scratch::new();
    let mut managed = Managed::start(&scratch, &machine(), &["--checksum"], direct);
    managed.migrate(&["return-path"]);
    managed.completes();
}

#[test]
fn guest_paused_by_its_manager_before_the_switchover_moves_hybrid() {
    let scratch = Scratch::new();
    let mut managed = Managed::start(&scratch, &machine(), &["-p", "--lanes", "2"], direct);
    managed.migrate(MANAGED);
    managed.completes();
}

/// A move in the middle of its first pass, of which the bulk lanes take nothing.
fn stalled(scratch: &Scratch, options: &[&str]) -> (Managed, Cutter) {
    let mut cutter = None;
    let mut managed = Managed::start(scratch, &machine(), options, |uri| {
        let relay = Cutter::to(uri);
        let uri = relay.uri().to_owned();
        cutter = Some(relay);
        Some(uri)
    });
    let cutter = cutter.expect("a relay");
    managed.umem.event("listening");
    // The lane with which umem has checked the destination is not one of the move's.
    cutter.cut(Ends::Both, false);
    managed.begin(&["return-path"]);
    managed.umem.event("connected");
    managed.destination.umem.event("connected");
    assert_eq!(managed.source.qmp.status(), "running");
    (managed, cutter)
}

#[test]
fn guest_continues_at_the_source_when_its_manager_cancels() {
    let scratch = Scratch::new();
    let (mut managed, _cutter) = stalled(&scratch, &[]);
    managed.source.qmp.execute("migrate_cancel", json!({}));
    let umem = std::mem::replace(&mut managed.umem, Umem::start(["--version"]));
    says(&umem.fails(), "before the end of its stream: the migration was cancelled");
    managed.goes_on_at_the_source("cancelled");
}

#[test]
fn guest_continues_at_the_source_when_its_umem_is_killed_in_a_pass() {
    let scratch = Scratch::new();
    let (mut managed, _cutter) = stalled(&scratch, &[]);
    managed.umem.kill();
    managed.goes_on_at_the_source("failed");
}

#[test]
fn guest_continues_at_the_source_when_the_connection_is_lost_in_a_pass() {
    let scratch = Scratch::new();
    let (mut managed, cutter) = stalled(&scratch, &["-p"]);
    cutter.cut(Ends::Both, true);
    let umem = std::mem::replace(&mut managed.umem, Umem::start(["--version"]));
    umem.fails();
    managed.goes_on_at_the_source("failed");
}

/// After the switchover, of which the manager knows: no page is lost, and the guest is not started twice.
#[test]
fn guest_is_whole_when_the_connection_is_lost_after_the_switchover() {
    let scratch = Scratch::new();
    let options = ["-p", "-n"];
    let (mut managed, cutter) = stalled(&scratch, &options);
    cutter.let_pages_go();
    managed.umem.event("left_to_manager");
    cutter.cut(Ends::Both, false);
    managed.umem.event("resumed");
    managed.send_the_rest();
    managed.completes();
}

#[test]
fn guest_is_whole_when_its_umem_is_killed_after_the_switchover() {
    let scratch = Scratch::new();
    let sessions = scratch.path("sessions").display().to_string();
    let options = ["-p", "-n", "--session-dir", &sessions];
    let mut managed = Managed::start(&scratch, &machine(), &options, direct);
    managed.migrate(&["return-path"]);
    let session = managed.umem.event("resumable")["session"].as_str().expect("text").to_owned();
    managed.umem.event("left_to_manager");
    managed.umem.kill();
    let resume = ["migrate", "--json", "--session-dir", &sessions, "--resume", &session];
    managed.umem = Umem::start(resume);
    managed.umem.event("resumed");
    managed.send_the_rest();
    managed.completes();
}

/// The destination's QEMU has no such device.
#[test]
fn guest_continues_at_the_source_when_the_destination_refuses_its_device_state() {
    let scratch = Scratch::new();
    let extra = ["-device", "virtio-rng-pci"].map(str::to_owned).to_vec();
    let source = boot(&Machine { extra, ..machine() }, &scratch);
    let (destination, arriving) = external_destination(&machine(), &scratch);
    let socket = scratch.path("migration");
    let umem = listen(&socket, &destination.uri, &["--switchover", "external"]);
    let mut managed = Managed { source, umem, destination, arriving, socket };
    managed.migrate(&["return-path"]);
    let umem = std::mem::replace(&mut managed.umem, Umem::start(["--version"]));
    // The destination's QEMU itself has reported the missing device.
    says(&umem.fails(), "the destination gave up: the guest's monitor");
    managed.goes_on_at_the_source("failed");
}

/// A QEMU that listens and is told to migrate to a umem with these options; the output of umem's refusal.
fn refused(options: &[&str], capabilities: &[&str]) -> String {
    let scratch = Scratch::new();
    let bare = Machine { source_ram: SourceRam::Default, ..Machine::bare(QemuVersion::V10_0) };
    let mut source = bare.start(&scratch);
    let (mut destination, _arriving) = external_destination(&bare, &scratch);
    let socket = scratch.path("migration");
    let mut umem = listen(&socket, &destination.uri, options);
    umem.event("listening");
    set(&mut source.qmp, capabilities);
    source.qmp.execute("migrate", json!({ "uri": unix(&socket) }));
    let text = umem.fails();
    wait_for("the migration to fail", || (migration(&mut source.qmp) == "failed").then_some(()));
    assert_eq!(source.qmp.status(), "running");
    assert!(destination.umem.is_running());
    text
}

#[test]
fn unsupported_stream_is_refused_by_its_capability() {
    let external = ["--switchover", "external"];
    says(&refused(&external, &[]), "its capability return-path off");
    says(&refused(&external, &["return-path", "multifd"]), "multifd");
    says(&refused(&external, &["return-path", "xbzrle", "x-ignore-shared"]), "x-ignore-shared");
    says(&refused(&external, &["return-path", "postcopy-ram"]), "capability postcopy-ram");
}

#[test]
fn switchover_is_refused_when_only_one_side_leaves_it_to_a_manager() {
    let scratch = Scratch::new();
    let bare = Machine { source_ram: SourceRam::Default, ..Machine::bare(QemuVersion::V10_0) };
    let mut source = bare.start(&scratch);
    let path = scratch.path("migration");
    let external = ["--switchover", "external"];
    let destination = Destination::start(&bare, &scratch);
    says(
        &listen(&path, &destination.uri, &external).fails(),
        "leave out --switchover external there",
    );
    assert!(!path.exists());
    drop(destination);

    let other = Scratch::new();
    let (mut destination, _arriving) = external_destination(&bare, &other);
    let qmp = source.socket.display().to_string();
    let words = ["migrate", "--json", "--qmp", &qmp, &destination.uri];
    says(&Umem::start(words).fails(), "use --switchover external there");
    assert!(destination.umem.is_running());
    assert_eq!(source.qmp.status(), "running");
}

#[test]
fn ambiguous_switchover_options_are_a_usage_error() {
    let scratch = Scratch::new();
    let path = scratch.path("migration");
    let text = listen(&path, NOBODY, &[]).fails_as_misused();
    says(&text, "with --qmp");
    says(&text, "with --switchover external on both sides");
    let both = ["--qmp", "/nowhere", "--switchover", "external"];
    says(&listen(&path, NOBODY, &both).fails_as_misused(), "leave out --qmp");
    let alone = ["migrate", "--json", "--switchover", "external", NOBODY];
    says(&Umem::start(alone).fails_as_misused(), "with --listen unix:PATH");
    let limit = ["--switchover", "external", "--downtime-limit", "5"];
    says(&listen(&path, NOBODY, &limit).fails_as_misused(), "leave out --downtime-limit");
    let alone = ["incoming", "--json", "--switchover", "external", "tcp:127.0.0.1:0", "--", "true"];
    says(&Umem::start(alone).fails_as_misused(), "with --connect unix:PATH");
    // A missing destination is detected before QEMU gets a command.
    let text = listen(&path, NOBODY, &["--switchover", "external"]).fails();
    says(&text, "cannot connect to");
    assert!(!path.exists());
}

/// umem uses the monitors of both sides; another program has told the source's QEMU to migrate.
#[test]
fn guest_is_started_by_umem_when_it_has_the_sources_monitor() {
    for is_listening in [false, true] {
        let scratch = Scratch::new();
        let machine = machine();
        let destination = match is_listening {
            false => Destination::start(&machine, &scratch),
            true => listening_destination(&machine, &scratch, &[]).0,
        };
        moves_by_both_monitors(boot(&machine, &scratch), destination, &scratch);
    }
}

fn moves_by_both_monitors(source: Qemu, destination: Destination, scratch: &Scratch) {
    let socket = scratch.path("migration");
    let qmp = source.socket.display().to_string();
    let umem = listen(&socket, &destination.uri, &["-p", "--qmp", &qmp]);
    let mut moving = Moving { source, umem, destination };
    moving.umem.event("listening");
    let fast = json!({ "max-bandwidth": 1_u64 << 40, "downtime-limit": 3000 });
    moving.source.qmp.execute("migrate-set-parameters", fast);
    set(&mut moving.source.qmp, &["return-path"]);
    moving.source.qmp.execute("migrate", json!({ "uri": unix(&socket) }));
    moving.complete().end();
}

/// Only the manager starts the guest there, also with a umem that takes over.
#[test]
fn guest_is_whole_after_a_takeover_and_started_by_its_manager_alone() {
    let scratch = Scratch::new();
    let options = ["-p", "-n"];
    let mut managed = Managed::start(&scratch, &machine(), &options, direct);
    managed.migrate(&["return-path"]);
    let session = managed.umem.event("resumable")["session"].as_str().expect("text").to_owned();
    managed.destination.umem.event("left_to_manager");
    managed.destination.umem.kill();
    managed.umem.event("recovering");
    let sessions = scratch.path("arriving-sessions").display().to_string();
    let resume = ["incoming", "--json", "--session-dir", &sessions, "--resume", &session];
    managed.destination.umem = Umem::start(resume);
    managed.umem.event("resumed");
    assert_ne!(managed.arriving.status(), "running");
    managed.arriving.execute("cont", json!({}));
    managed.send_the_rest();
    managed.umem.event("completed");
    managed.destination.umem.event("completed");
    managed.is_whole();
    managed.umem.succeeds();
    managed.destination.umem.succeeds();
    assert_eq!(managed.source.qmp.status(), "postmigrate");
    managed.arriving.quit();
}

/// A umem that was killed while it waited has left its socket.
#[test]
fn socket_replaces_a_deserted_one_and_no_other() {
    let scratch = Scratch::new();
    let bare = Machine { source_ram: SourceRam::Default, ..Machine::bare(QemuVersion::V10_0) };
    let (destination, _arriving) = external_destination(&bare, &scratch);
    let path = scratch.path("migration");
    let external = ["--switchover", "external"];
    let mut killed = listen(&path, &destination.uri, &external);
    killed.event("listening");
    says(&listen(&path, &destination.uri, &external).fails(), "another process has it");
    killed.kill();
    assert!(path.exists());
    let mut umem = listen(&path, &destination.uri, &external);
    umem.event("listening");
    umem.signal(Signal::SIGTERM);
    says(&umem.fails(), "QEMU had not begun its migration");
    assert!(!path.exists());
}

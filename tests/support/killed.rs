//! A guest that moves from one umem to another; the umems are killed on the way and taken over.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::arrival::{self, Arrival};
use super::{Cutter, Qmp, Scratch, Umem, seed, seeded};

/// A guest that moves from one umem to another through a relay.
pub(crate) struct Move {
    pub(crate) scratch: Scratch,
    pub(crate) guest: Umem,
    pub(crate) incoming: Umem,
    pub(crate) migrate: Umem,
    pub(crate) cutter: Cutter,
    pub(crate) how: How,
    /// The session's number, once the move is resumable.
    pub(crate) session: String,
    /// Names of the guest's socket and file on both sides.
    pub(crate) names: [&'static str; 2],
}

#[derive(Clone, Copy, Default)]
pub(crate) struct How {
    pub(crate) mib: u64,
    /// Options of both guests.
    pub(crate) threads: u32,
    pub(crate) kind: Option<&'static str>,
    /// For `umem incoming`.
    pub(crate) incoming: &'static [&'static str],
    /// For the guest there.
    pub(crate) arriving: &'static [&'static str],
    pub(crate) migrate: &'static [&'static str],
    /// For both umem processes: a directory of certificates, or a secret.
    pub(crate) security: Option<[&'static str; 2]>,
    /// The points where the source's and the destination's umem panic, once [`Move::panics`] enables them; none if
    /// empty.
    pub(crate) panics: [&'static str; 2],
}

/// The panic points are enabled while this file exists.
pub(crate) const PANIC: &str = "panic";

/// The processes to kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
    Both,
}

impl Move {
    /// Up to the guest running at the destination. Its pages arrive on demand, until the cutter releases the others.
    pub(crate) fn switched(how: How) -> Move {
        Move::start(how).until_switched()
    }

    pub(crate) fn until_switched(self) -> Move {
        let mut moving = self;
        moving.session = text(&moving.migrate.event("resumable"), "session");
        moving.migrate.event("running");
        moving.incoming.event("running");
        moving
    }

    /// Up to the start of `umem migrate`.
    pub(crate) fn start(how: How) -> Move {
        Move::start_with(how, |_| {})
    }

    /// As above; `prepare` runs before any umem process starts.
    pub(crate) fn start_with(how: How, prepare: impl FnOnce(&Scratch)) -> Move {
        let scratch = Scratch::new();
        prepare(&scratch);
        let [mib, threads] = [how.mib.to_string(), how.threads.to_string()];
        let qmp = scratch.path("source.qmp").display().to_string();
        let ram = format!("ram0={}", scratch.ram("source").display());
        let mut arguments = vec!["guest", "--qmp", &qmp, "--ram", &ram];
        arguments.extend(["--size", &mib, "--threads", &threads, "--seed", "7"]);
        let mut guest = Umem::start(arguments);
        guest.event("ready");
        Move::from("source", guest, "destination", scratch, how)
    }

    /// As above with an existing guest, known by these names on both sides.
    pub(crate) fn from(
        source: &'static str,
        guest: Umem,
        destination: &'static str,
        scratch: Scratch,
        how: How,
    ) -> Move {
        let [mib, threads] = [how.mib.to_string(), how.threads.to_string()];
        let path = |name: &str| scratch.path(name).display().to_string();
        let [source_qmp, destination_qmp] =
            [source, destination].map(|name| path(&format!("{name}.qmp")));
        let common = ["--size", &mib, "--threads", &threads, "--seed", "7"];
        let sessions = path("sessions");
        let wrapper = |side: usize| {
            let variable = "UMEM_TEST_PANIC";
            ["env".into(), format!("{variable}={}={}", how.panics[side], path(PANIC))]
        };
        let [wrapper_here, wrapper_there]: [[String; 2]; 2] = [0, 1].map(wrapper);
        let arrival = Arrival {
            qmp: &destination_qmp,
            ram: &format!("ram0={}", scratch.ram(destination).display()),
            handoff: &path("handoff"),
            kind: how.kind,
            common: &common,
            incoming: &[&["--session-dir", &sessions], how.incoming].concat(),
            arriving: how.arriving,
            security: how.security,
            wrapper: &wrapper_there.each_ref().map(String::as_str),
        };
        let (incoming, cutter) = arrival.start();
        let mut arguments = vec!["migrate", "-p", "--json", "--session-dir", &sessions];
        // So that processes start and end more quickly than the guest moves.
        arguments.extend(["--max-postcopy-bandwidth", "24M"]);
        arguments.extend(["--qmp", &source_qmp, cutter.uri()]);
        arguments.extend(how.migrate);
        arguments.extend(how.security.iter().flatten());
        let wrapper = wrapper_here.each_ref().map(String::as_str);
        let migrate = Umem::start_under(&wrapper, arguments);
        let (session, names) = (String::new(), [source, destination]);
        Move { scratch, guest, incoming, migrate, cutter, how, session, names }
    }

    /// Enables the panic points of [`How::panics`], and waits for the panic. All pages are released, so that a point is
    /// reached.
    pub(crate) fn panics(&self) {
        let file = self.scratch.path(PANIC);
        std::fs::write(&file, "").expect("a file");
        self.cutter.let_pages_go();
        super::wait_for("the panic", || (!file.exists()).then_some(()));
    }

    pub(crate) fn sessions(&self) -> PathBuf {
        self.scratch.path("sessions")
    }

    /// Takes over from one side.
    pub(crate) fn resume(&self, command: &str) -> Umem {
        self.resume_with(command, &[])
    }

    /// The same with further arguments.
    pub(crate) fn resume_with(&self, command: &str, more: &[&str]) -> Umem {
        let sessions = self.sessions().display().to_string();
        let own = [command, "--json", "--session-dir", &sessions, "--resume", &self.session];
        Umem::start(own.iter().chain(more))
    }

    /// The names of session files, sorted.
    pub(crate) fn session_files(&self) -> Vec<String> {
        // The directory may not exist yet.
        let entries = std::fs::read_dir(self.sessions()).into_iter().flatten().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub(crate) fn kill(&mut self, side: Side) {
        if side != Side::Source {
            self.incoming.kill();
        }
        if side != Side::Destination {
            self.migrate.kill();
        }
        if side != Side::Source {
            self.incoming = self.resume("incoming");
        }
        if side != Side::Destination {
            self.migrate = self.resume("migrate");
        }
    }

    /// Kills this often, each time after a random number of bytes below `most`. Every third time the number is too
    /// small for the takeover to have finished.
    pub(crate) fn kill_often(&mut self, count: usize, most: u64, sides: &[Side]) {
        let seed = seed(self.how.mib ^ u64::from(self.how.threads) << 8 ^ sides.len() as u64);
        self.cutter.let_pages_go();
        let moments = seeded(seed, most).zip(seeded(!seed, sides.len() as u64)).take(count);
        for (at, (bytes, which)) in moments.enumerate() {
            let bytes = if at % 3 == 2 { bytes % 700 } else { bytes };
            self.pass(bytes);
            let side = sides[usize::try_from(which).unwrap()];
            println!("kill {at}: {side:?} after {bytes} bytes");
            self.kill(side);
        }
    }

    /// Waits until this many more bytes have been relayed.
    pub(crate) fn pass(&mut self, bytes: u64) {
        let until = self.cutter.passed() + bytes;
        super::wait_for(format!("{bytes} more bytes"), || {
            let both = [&mut self.incoming, &mut self.migrate];
            for umem in both {
                assert!(umem.is_running(), "umem has ended: {}", umem.stderr());
            }
            (self.cutter.passed() >= until).then_some(())
        });
    }

    /// Waits for the end on both sides, and has the guest check its memory. Returns both reports.
    pub(crate) fn complete(self) -> (Value, Value) {
        let (scratch, guest, [_, there], reports) = self.arrive();
        Qmp::connect(&scratch.path(&format!("{there}.qmp"))).quit();
        guest.succeeds();
        reports
    }

    /// The same, and leaves the guest at the destination: returns its `umem incoming`, which ends with the guest.
    pub(crate) fn arrive(mut self) -> (Scratch, Umem, [&'static str; 2], (Value, Value)) {
        self.cutter.let_pages_go();
        let source = self.migrate.event("completed");
        let destination = self.incoming.event("completed");
        self.check(&destination);
        self.migrate.succeeds();
        Qmp::connect(&self.scratch.path(&format!("{}.qmp", self.names[0]))).quit();
        self.guest.succeeds();
        let left: Vec<_> = std::fs::read_dir(self.scratch.path("sessions")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        (self.scratch, self.incoming, self.names, (source, destination))
    }

    /// The checks of a complete guest.
    pub(crate) fn check(&self, report: &Value) {
        let qmp = self.scratch.path(&format!("{}.qmp", self.names[1]));
        arrival::check(&qmp, self.how.mib, report);
    }
}

impl Move {
    /// Up to the moment when the destination has loaded the guest, and the source has not been notified: nothing is
    /// committed. Of the destination's frames none passes after the request of the one page that loading needs.
    pub(crate) fn loaded() -> Move {
        let mut moving = Move::start(How { mib: 16, threads: 1, ..How::default() });
        let answers = umem_wire::HELLO_BYTES + (umem_wire::HEADER_BYTES + 1) + REQUEST_BYTES;
        moving.cutter.limit_answers(Some(answers as u64));
        moving.session = text(&moving.incoming.event("resumable"), "session");
        assert_eq!(text(&moving.migrate.event("stopped"), "session"), moving.session);
        moving
    }

    /// The report of the source's guest about itself.
    pub(crate) fn status(&self) -> String {
        let mut qmp = Qmp::connect(&self.scratch.path("source.qmp"));
        text(&qmp.execute("query-status", json!({})), "status")
    }
}

/// A request for one page.
pub(crate) const REQUEST_BYTES: usize = umem_wire::HEADER_BYTES + 8;

pub(crate) fn text(event: &Value, field: &str) -> String {
    event[field].as_str().unwrap_or_else(|| panic!("no {field} in {event}")).to_owned()
}

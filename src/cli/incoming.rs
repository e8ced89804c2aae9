//! `umem incoming`

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use super::values::{CoreList, PostcopyFlags, Seconds, UnixPath, lanes_to, several_lanes};
use crate::control::liveness::STEP_TIMEOUT;
use crate::destination;
use crate::error::{Error, Result};
use crate::host::command::RamPath;
use crate::host::kind::MonitorSocket;
use crate::host::switchover::Switchover;
use crate::memory::kind::Kind;
use crate::observe::{self, Address};
use crate::runtime::idle::IdleCores;
use crate::session::ResumeOptions;
use crate::transport::secure::Security;
use crate::transport::single;
use crate::transport::uri::Uri;

/// Receive a guest: listen at URI, start COMMAND (its monitor), fill its memory.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "incoming",
    note = "URI is an address to listen at, tcp:HOST:PORT or unix:PATH, or one existing \
            connection: fd:N is an inherited stream socket, exec:CMD (run by /bin/sh) is a command \
            whose standard input and output lead to the source. If the socket fd:N listens, such \
            as systemd's fd:3, umem listens at it. COMMAND is a QEMU, also through wrappers \
            and scripts. Its RAM is its own (-m SIZE, memory-backend-ram), a memory-backend-memfd \
            or a memory-backend-file, these with share=on (--kind private: share=off). Or COMMAND is \
            another monitor that maps the files named with --ram. umem adds \
            -incoming and a QMP socket to a QEMU's options itself. The terminal's signals do not \
            reach COMMAND. Its standard input is the terminal if umem's is. Before the \
            switchover a signal ends the migration, and the guest continues at the source. While \
            pages are missing no signal ends umem or the guest. Once the guest is complete, \
            Ctrl-C (SIGINT) sends SIGTERM to COMMAND, and umem ends with COMMAND's exit status. \
            A second Ctrl-C, or any other signal, ends umem alone: the guest continues, and umem \
            prints its process id.",
    example = "Take over the waiting guest after this process was killed:\n  {command_name} --resume SESSION",
    example = "Serve a Firecracker that restores a snapshot; its memory file is at the source:\n  \
               {command_name} --tls-creds /etc/pki/qemu --handoff /run/uffd.sock tcp::4444",
    example = "Receive a guest for a QEMU that a management tool runs, which listens at /run/mig.sock:\n  \
               {command_name} --tls-creds /etc/pki/qemu --connect unix:/run/mig.sock --switchover external \\\n    \
               tcp::4444 -- qemu-system-x86_64 …",
    example = "Receive a QEMU guest:\n  {command_name} --tls-creds /etc/pki/qemu tcp::4444 -- \\\n    qemu-system-x86_64 -m 2G -machine memory-backend=ram0 \\\n    -object \
               memory-backend-file,id=ram0,size=2G,share=on,mem-path=/dev/shm/guest",
    error_code(
        1,
        "The guest did not arrive, or its memory is damaged, or the output could not be written; stderr says why."
    ),
    error_code(2, "The command line is wrong.")
)]
pub(super) struct Incoming {
    /// how the guest maps its memory that is in files: shared (the default) or private; a QEMU's memory
    /// without a file needs no option, and a process that hands over anonymous memory (--handoff) reports
    /// that itself
    #[argh(option, default = "Kind::Shared")]
    kind: Kind,
    /// kind private: 1 touches the guest's pages during the move, so the file's copies of the pages can
    /// be released; 0 waits for the guest's own accesses until the end (default 0)
    #[argh(option, default = "PostcopyFlags(0)")]
    postcopy_flags: PostcopyFlags,
    /// make this unix socket, on which the guest's process hands over its memory itself, as
    /// Firecracker does; COMMAND is then optional
    #[argh(option)]
    handoff: Option<PathBuf>,
    /// a RAM file of the guest, NAME=PATH; repeat for more (default: umem asks QEMU)
    #[argh(option)]
    ram: Vec<RamPath>,
    /// the monitor's QMP socket (default: a QEMU gets one from umem)
    #[argh(option)]
    qmp: Option<PathBuf>,
    /// a QEMU that listens for its migration at unix:PATH, by -incoming or by its manager's
    /// migrate-incoming: umem sends the device state there (default: umem sends migrate-incoming)
    #[argh(option)]
    connect: Option<UnixPath>,
    /// the program that starts the guest: umem (the default), or external, a program that manages the
    /// QEMUs of both sides and sends `cont` here when the source's migration has completed; external
    /// needs --connect, and --switchover external at the source
    #[argh(option, default = "Switchover::Umem")]
    switchover: Switchover,
    /// the most bulk lanes that a source may open (default 16; none with fd: and exec:)
    #[argh(option)]
    lanes: Option<u16>,
    /// refuse a source that does not detect bits that change in transit (umem migrate --checksum);
    /// without this option the source decides
    #[argh(switch)]
    checksum: bool,
    /// accept a guest that does not fit into the free memory, or into the file system of a RAM file,
    /// because memory becomes free during the move: from a source on this machine that frees its own
    /// memory (umem migrate --release-ram), or from swap. If it does not, the guest is lost
    #[argh(switch)]
    overcommit: bool,
    /// TLS with certificates on both sides: the directory of ca-cert.pem, server-cert.pem and
    /// server-key.pem, as for QEMU; the source needs a certificate that this ca-cert.pem has signed
    #[argh(option)]
    tls_creds: Option<PathBuf>,
    /// a file with a secret of 16 bytes or more, which the source needs too; a secret keeps other
    /// programs out, and encrypts nothing
    #[argh(option)]
    secret_file: Option<PathBuf>,
    /// listen at a network address with neither TLS nor a secret: every host that reaches the address
    /// can send a guest, and a host on the path can read and change a guest in transit
    #[argh(switch)]
    insecure: bool,
    /// take over the session with this number (its beginning is enough), whose umem was killed, and its
    /// waiting guest. Leave out COMMAND; the URI, --tls-creds, --secret-file and --insecure may
    /// change. The guest is no child of this umem, which ends when the guest is complete. If the
    /// guest is complete already, this sends the source the completion
    #[argh(option)]
    resume: Option<String>,
    /// before the switchover: the most seconds that one step of the source may take while no byte
    /// moves (default 600). After that the guest continues at the source
    #[argh(option)]
    step_timeout: Option<Seconds>,
    /// the directory for the files that --resume needs; it must belong to this user (default: umem
    /// in $XDG_RUNTIME_DIR, or /run/umem for root)
    #[argh(option)]
    session_dir: Option<PathBuf>,
    /// cores for the demand lane and the bulk lanes, such as 0,2,3 (default: umem chooses, and threads may leave their cores)
    #[argh(option, default = "CoreList::default()")]
    cores: CoreList,
    /// idle cores while faults arrive: poll (the default) more than halves the time of a fault, and
    /// needs access to /dev/cpu_dma_latency; sleep leaves the cores alone
    #[argh(option, default = "IdleCores::Poll")]
    idle_cores: IdleCores,
    /// a preload object to use instead of the built-in one
    #[argh(option)]
    preload: Option<PathBuf>,
    /// write a report with pictures to this file: a page for a browser, or the figures if the name
    /// ends in .json
    #[argh(option)]
    report: Option<PathBuf>,
    /// serve metrics to Prometheus at PORT, on the loopback address, or HOST:PORT
    #[argh(option)]
    metrics: Option<Address>,
    /// make this unix socket for commands, see umem control
    #[argh(option)]
    control: Option<PathBuf>,
    /// show no progress
    #[argh(switch, short = 'q')]
    quiet: bool,
    /// trace phases and threads on stderr; RUST_LOG selects the detail
    #[argh(switch, short = 'v')]
    verbose: bool,
    /// print JSON objects; the last one is the report
    #[argh(switch)]
    json: bool,
    /// tcp:HOST:PORT or unix:PATH to listen at, or fd:N or exec:CMD; after -- follows COMMAND, the
    /// guest's monitor with its arguments
    #[argh(positional, arg_name = "uri")]
    words: Vec<String>,
}

impl Incoming {
    pub(super) fn run(self) -> Result<i32> {
        observe::trace::begin(self.verbose);
        // After --, which argh takes away, everything is a word of COMMAND.
        let mut words = self.words.clone().into_iter();
        let uri = words.next().map(|word| word.parse::<Uri>()).transpose().map_err(Error::Usage)?;
        let command: Vec<String> = words.collect();
        if self.resume.is_some() {
            return self.go_on(uri, &command);
        }
        let Some(uri) = uri else {
            return Err(Error::Usage(
                "no URI: give an address to listen at, such as tcp::4444, or a session to --resume"
                    .into(),
            ));
        };
        let lanes_max = match single::is_listening(&uri) {
            true => several_lanes(self.lanes, 16)?,
            false => lanes_to(&uri, self.lanes, 16)?,
        };
        if self.kind.comes_from_owner() == Some(true) && self.handoff.is_none() {
            return Err(Error::Usage(
                "--kind anonymous needs --handoff SOCK: anonymous memory has no file, so the process that owns the \
                 memory has to hand it over"
                    .into(),
            ));
        }
        if self.kind.comes_from_owner() == Some(false) && self.handoff.is_some() {
            return Err(Error::Usage(
                "--kind private is for files that COMMAND maps under the preload object: leave out --handoff"
                    .into(),
            ));
        }
        if self.postcopy_flags.0 != 0 && !self.kind.needs_touch() {
            return Err(Error::Usage(
                "--postcopy-flags 1 has the guest's pages touched, which only --kind private needs"
                    .into(),
            ));
        }
        if self.switchover == Switchover::External && self.connect.is_none() {
            return Err(Error::Usage(
                "--switchover external is for a QEMU whose migration another program begins: give the socket at \
                 which that QEMU listens with --connect unix:PATH"
                    .into(),
            ));
        }
        if self.connect.is_some() && command.is_empty() && self.qmp.is_none() {
            return Err(Error::Usage(
                "--connect needs QEMU's monitor, which reports the guest's RAM: give its QMP socket with --qmp, or \
                 have umem start QEMU (-- COMMAND)"
                    .into(),
            ));
        }
        destination::run(&destination::Options {
            security: self.security(),
            observe: self.observe(),
            connect: self.connect.map(|path| path.0),
            switchover: self.switchover,
            uri,
            ram: self.ram,
            kind: self.kind,
            touch: self.postcopy_flags.0 == 1,
            handoff: self.handoff,
            monitor: self.qmp.map(MonitorSocket::qmp),
            lanes_max,
            step_timeout: self.step_timeout.map_or(STEP_TIMEOUT, |seconds| seconds.0),
            checksum: self.checksum,
            overcommit: self.overcommit,
            cores: self.cores.0,
            idle_cores: self.idle_cores,
            preload: self.preload,
            session_dir: self.session_dir,
            json: self.json,
            command,
        })
    }

    /// `--resume`
    fn go_on(self, uri: Option<Uri>, command: &[String]) -> Result<i32> {
        let begins = [
            ("--handoff", self.handoff.is_some()),
            ("--ram", !self.ram.is_empty()),
            ("--qmp", self.qmp.is_some()),
            ("--connect", self.connect.is_some()),
            ("--switchover", self.switchover != Switchover::Umem),
            ("--lanes", self.lanes.is_some()),
            ("--step-timeout", self.step_timeout.is_some()),
            ("--overcommit", self.overcommit),
            ("--preload", self.preload.is_some()),
            ("COMMAND", !command.is_empty()),
        ];
        if let Some((what, _)) = begins.iter().find(|(_, is_given)| *is_given) {
            return Err(Error::Usage(format!(
                "--resume continues the session with the guest and the options it began with: leave out {what}"
            )));
        }
        if let Some(uri) = uri.as_ref().filter(|uri| uri.is_one_connection()) {
            return Err(Error::Usage(format!("--resume listens, and umem cannot listen at {uri}")));
        }
        let security = self.security();
        let is_named =
            security.tls_creds.is_some() || security.secret_file.is_some() || security.insecure;
        destination::resume(&ResumeOptions {
            observe: self.observe(),
            session: self.resume.unwrap_or_default(),
            session_dir: self.session_dir,
            uri,
            security: is_named.then_some(security),
            cores: self.cores.0,
            idle_cores: self.idle_cores,
            json: self.json,
        })
    }

    fn security(&self) -> Security {
        Security {
            tls_creds: self.tls_creds.clone(),
            tls_hostname: None,
            secret_file: self.secret_file.clone(),
            insecure: self.insecure,
        }
    }

    fn observe(&self) -> observe::Options {
        observe::Options {
            report: self.report.clone(),
            metrics: self.metrics,
            control: self.control.clone(),
            quiet: self.quiet,
        }
    }
}

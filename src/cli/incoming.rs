//! `umem incoming`

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use super::values::{CoreList, PostcopyFlags, Seconds, lanes_to, several_lanes};
use crate::error::{Error, Result};
use crate::host::command::RamPath;
use crate::idle::IdleCores;
use crate::liveness::STEP_TIMEOUT;
use crate::memory::kind::Kind;
use crate::observe::Address;
use crate::secure::Security;
use crate::session::ResumeOptions;
use crate::uri::Uri;
use crate::{destination, observe, single};

/// Receive a guest: listen at URI, start COMMAND (its monitor), fill its memory.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "incoming",
    note = "URI is where to listen, tcp:HOST:PORT or unix:PATH, or one connection that is there \
            already: fd:N, an inherited stream socket, or exec:CMD, whose standard input and output \
            lead to the source (run by /bin/sh). A socket fd:N that listens, such as systemd's fd:3, \
            is listened at. COMMAND is a QEMU whose RAM is a \
            memory-backend-file with share=on (--kind private: share=off), also by way of wrappers and \
            scripts, or another monitor that maps the files named with --ram. umem adds -incoming and a QMP \
            socket to a QEMU's options itself. COMMAND runs out of reach of the terminal's \
            signals, with the terminal as its standard input where umem has it. A signal before the \
            switchover gives the guest up, which stays at the source; while memory comes no signal \
            ends umem, nor the guest. Once the guest is complete Ctrl-C (SIGINT) has COMMAND \
            stopped with SIGTERM, and umem ends with its exit status; a second one, and every other signal at once, \
            ends umem alone: the guest goes on, and umem says as which process.",
    example = "Go on after this process was killed, with the guest that waits:\n  {command_name} --resume SESSION",
    example = "Serve a Firecracker that restores a snapshot, whose memory file the source has:\n  \
               {command_name} --tls-creds /etc/pki/qemu --handoff /run/uffd.sock tcp::4444",
    example = "Receive a QEMU guest:\n  {command_name} --tls-creds /etc/pki/qemu tcp::4444 -- \\\n    qemu-system-x86_64 -m 2G -machine memory-backend=ram0 \\\n    -object \
               memory-backend-file,id=ram0,size=2G,share=on,mem-path=/dev/shm/guest",
    error_code(
        1,
        "The guest did not arrive, or not whole, or what was to be on stdout could not be written; stderr says why."
    ),
    error_code(2, "The command line is wrong.")
)]
pub(super) struct Incoming {
    /// how the guest maps its memory: shared (the default) or private; anonymous memory says so
    /// itself, see --handoff
    #[argh(option, default = "Kind::Shared")]
    kind: Kind,
    /// kind private: 1 has the guest side touch pages as they come, so that the file's copies can be
    /// released; 0 leaves that to the guest's own accesses until the end (default 0)
    #[argh(option, default = "PostcopyFlags(0)")]
    postcopy_flags: PostcopyFlags,
    /// a unix socket to make, where the guest's process hands over its memory itself, as Firecracker
    /// does; COMMAND may be left out then
    #[argh(option)]
    handoff: Option<PathBuf>,
    /// a RAM file of the guest, NAME=PATH; repeat for more (default: a QEMU is asked for its own)
    #[argh(option)]
    ram: Vec<RamPath>,
    /// the monitor's QMP socket (default: one that umem gives a QEMU)
    #[argh(option)]
    qmp: Option<PathBuf>,
    /// bulk lanes that a source may open at most (default 16; none with fd: and exec:)
    #[argh(option)]
    lanes: Option<u16>,
    /// take no guest whose source does not check what is sent for bits that change on their way (umem
    /// migrate --checksum); without this option that is the source's choice
    #[argh(switch)]
    checksum: bool,
    /// take a guest for which there seems to be no room, in memory or in a RAM file's file system: room
    /// that comes while it moves, as from a source on this machine that frees its own (umem migrate
    /// --release-ram), or swap. If it does not come the guest is lost
    #[argh(switch)]
    overcommit: bool,
    /// TLS with certificates on both sides: the directory of ca-cert.pem, server-cert.pem and
    /// server-key.pem, as for QEMU; a source needs a certificate that this ca-cert.pem has signed
    #[argh(option)]
    tls_creds: Option<PathBuf>,
    /// a file with a secret of 16 bytes or more, which the source has to know too; it keeps others
    /// out, but does not encrypt
    #[argh(option)]
    secret_file: Option<PathBuf>,
    /// listen at an address of the network with neither TLS nor a secret: whoever reaches it can send
    /// a guest, and read and change one on its way
    #[argh(switch)]
    insecure: bool,
    /// go on with the session of this number (its beginning is enough) whose umem was killed, with the
    /// guest that waits: no COMMAND; the URI, --tls-creds, --secret-file and --insecure may be given
    /// anew. The guest is no child of this umem's then, which ends when all of its memory has come. If it had,
    /// this tells the source, which may not know
    #[argh(option)]
    resume: Option<String>,
    /// the most that a step of the source's may take before the switchover, seconds without a byte that moves
    /// (default 600). Then the guest goes on there
    #[argh(option)]
    step_timeout: Option<Seconds>,
    /// where to leave what --resume needs, a directory of this user's (default: umem in
    /// $XDG_RUNTIME_DIR, or /run/umem for root)
    #[argh(option)]
    session_dir: Option<PathBuf>,
    /// cores for the demand lane and the bulk lanes, such as 0,2,3 (default: chosen; threads may leave them)
    #[argh(option, default = "CoreList::default()")]
    cores: CoreList,
    /// what idle cores do while faults come: poll, the default, which halves the time of a fault
    /// and more (takes access to /dev/cpu_dma_latency, without which they sleep), or sleep
    #[argh(option, default = "IdleCores::Poll")]
    idle_cores: IdleCores,
    /// a preload object to use in place of the built-in one
    #[argh(option)]
    preload: Option<PathBuf>,
    /// a file for a report in pictures: a page for a browser, or the figures where its name ends in
    /// .json
    #[argh(option)]
    report: Option<PathBuf>,
    /// serve metrics to Prometheus at PORT, on the loopback address, or HOST:PORT
    #[argh(option)]
    metrics: Option<Address>,
    /// a unix socket to make for commands, see umem control
    #[argh(option)]
    control: Option<PathBuf>,
    /// show no progress
    #[argh(switch, short = 'q')]
    quiet: bool,
    /// trace what happens on stderr; RUST_LOG says in more detail what
    #[argh(switch, short = 'v')]
    verbose: bool,
    /// print JSON objects, the last of them the report
    #[argh(switch)]
    json: bool,
    /// tcp:HOST:PORT or unix:PATH to listen at, or fd:N or exec:CMD; then, after --, COMMAND, the
    /// guest's monitor and its arguments
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
                "no URI: say where to listen, such as tcp::4444, or which session to --resume"
                    .into(),
            ));
        };
        let lanes_max = match single::is_listening(&uri) {
            true => several_lanes(self.lanes, 16)?,
            false => lanes_to(&uri, self.lanes, 16)?,
        };
        if self.kind.comes_from_owner() == Some(true) && self.handoff.is_none() {
            return Err(Error::Usage(
                "--kind anonymous needs --handoff SOCK: anonymous memory has no file, so that its \
                 owner has to hand it over itself"
                    .into(),
            ));
        }
        if self.kind.comes_from_owner() == Some(false) && self.handoff.is_some() {
            return Err(Error::Usage(
                "--kind private is for memory that COMMAND maps under umem's eyes: leave out \
                 --handoff"
                    .into(),
            ));
        }
        if self.postcopy_flags.0 != 0 && !self.kind.needs_touch() {
            return Err(Error::Usage(
                "--postcopy-flags 1 asks for touches, which only --kind private has a use for"
                    .into(),
            ));
        }
        destination::run(&destination::Options {
            security: self.security(),
            observe: self.observe(),
            uri,
            ram: self.ram,
            kind: self.kind,
            touch: self.postcopy_flags.0 == 1,
            handoff: self.handoff,
            qmp: self.qmp,
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
            ("--lanes", self.lanes.is_some()),
            ("--step-timeout", self.step_timeout.is_some()),
            ("--overcommit", self.overcommit),
            ("--preload", self.preload.is_some()),
            ("COMMAND", !command.is_empty()),
        ];
        if let Some((what, _)) = begins.iter().find(|(_, is_given)| *is_given) {
            return Err(Error::Usage(format!(
                "--resume goes on with the guest of the session as it was begun: leave out {what}"
            )));
        }
        if let Some(uri) = uri.as_ref().filter(|uri| uri.is_one_connection()) {
            return Err(Error::Usage(format!(
                "--resume listens: {uri} is no address to listen at"
            )));
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

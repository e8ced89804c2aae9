//! `umem migrate`

use std::path::PathBuf;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};

use super::values::{CoreList, Seconds, Size, UnixPath, lanes_to};
use crate::control::liveness::STEP_TIMEOUT;
use crate::error::{Error, Result, WITHOUT_PASSES};
use crate::host::command::RamPath;
use crate::host::kind::MonitorSocket;
use crate::host::switchover::Switchover;
use crate::observe::{self, Address};
use crate::runtime::idle::IdleCores;
use crate::session::ResumeOptions;
use crate::source::{self, Precopy};
use crate::transport::limits;
use crate::transport::secure::Security;
use crate::transport::uri::Uri;

/// Passes where the command line names no number: most of the gain comes from the first two.
const PRECOPY_PASSES: u32 = 4;

/// Passes of a QEMU that paces itself, before what is left waits for the time after the switchover.
const PACED_PASSES: u32 = 1;

/// QEMU's own default, milliseconds.
const DOWNTIME_LIMIT_MS: u64 = 300;

/// Move a guest away, to the `umem incoming` at URI: its memory while it runs, then the guest and the rest.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "migrate",
    note = "URI is the address at which `umem incoming` listens, tcp:HOST:PORT or unix:PATH, or \
            one connection to it that carries everything: fd:N is an inherited stream socket, \
            exec:CMD (run by /bin/sh) a command whose standard input and output lead there. \
            Until the switchover any failure, and Ctrl-C or any other signal that ends a \
            program, leave the guest running here. After it the guest never runs here again: \
            umem reopens connections that break until the guest is complete. With -n, Ctrl-C \
            sends the remaining pages.",
    example = "Live precopy: the guest moves when little of its memory is left to send.\n  {command_name} --tls-creds \
               /etc/pki/qemu --qmp /run/qmp.sock tcp:DESTINATION:4444",
    example = "Hybrid: the same, and the rest follows after the switchover.\n  {command_name} --precopy -p --tls-creds \
               /etc/pki/qemu --qmp /run/qmp.sock tcp:DESTINATION:4444",
    example = "Postcopy: the guest moves at once, and all memory follows.\n  {command_name} -p --tls-creds \
               /etc/pki/qemu --qmp /run/qmp.sock tcp:DESTINATION:4444",
    example = "The guest of a management tool, which has QEMU migrate to /run/umem.sock and runs it there:\n  \
               {command_name} --tls-creds /etc/pki/qemu --listen unix:/run/umem.sock --switchover external \\\n    \
               tcp:DESTINATION:4444",
    example = "Take over after this process was killed:\n  {command_name} --resume SESSION",
    example = "End the session of a guest that is complete at a destination that is gone:\n  {command_name} --resume SESSION --abandon",
    error_code(
        1,
        "The guest did not move, or its memory is damaged, or the output could not be written; stderr says why."
    ),
    error_code(2, "The command line is wrong.")
)]
pub(super) struct Migrate {
    /// postcopy: the guest runs at its destination before its last pages come (default: all pages come first); without
    /// --precopy the guest moves at once
    #[argh(switch, short = 'p')]
    postcopy: bool,
    /// live precopy, the default without -p: passes send the pages while the guest runs, first all of them, then those
    /// that it has written meanwhile; with -p (hybrid) the rest comes after the switchover, without -p before
    #[argh(switch)]
    precopy: bool,
    /// stop the guest first, then send all pages while it stands still
    #[argh(switch)]
    stop_first: bool,
    /// passes while the guest runs, at most (default 4); the first one sends all memory
    #[argh(option)]
    precopy_passes: Option<u32>,
    /// end the passes as soon as what is left takes no longer than this to send, in milliseconds (default 300)
    #[argh(option)]
    downtime_limit: Option<u64>,
    /// end the passes after this many seconds: with -p the guest then runs at its destination while the rest comes,
    /// without -p it stands still while the rest is sent
    #[argh(option)]
    timeout: Option<Seconds>,
    /// limit of the passes while the guest runs, bytes a second such as 100M, for all lanes together; what is sent
    /// after the stop does not count (umem control changes it)
    #[argh(option)]
    max_bandwidth: Option<Size>,
    /// send only the pages that the guest touches, to measure (needs -p)
    #[argh(switch, short = 'n')]
    no_background: bool,
    /// a RAM file of the guest, NAME=PATH; repeat for more (default: umem asks the monitor)
    #[argh(option)]
    ram: Vec<RamPath>,
    /// the monitor's QMP socket
    #[argh(option)]
    qmp: Option<PathBuf>,
    /// take what QEMU migrates to unix:PATH, whoever tells it to (`migrate -d unix:PATH`, a management
    /// tool); its capability return-path has to be on, and it decides when its guest stops. Needs
    /// --qmp, by which umem lets the guest run at the destination, or --switchover external
    #[argh(option)]
    listen: Option<UnixPath>,
    /// who lets the guest run at the destination: umem (the default), by the monitors, or external, a
    /// program that manages the QEMUs of both sides; needs --listen, and --switchover external there
    #[argh(option, default = "Switchover::Umem")]
    switchover: Switchover,
    /// bulk lanes: connections for background pages (default 1; none with fd: and exec:)
    #[argh(option)]
    lanes: Option<u16>,
    /// free the guest's RAM here as it arrives there, from the switchover on; afterwards the
    /// guest's process here can only be ended
    #[argh(switch)]
    release_ram: bool,
    /// check every page and every message for bits that change on their way, send wrong ones again,
    /// and compare all of the guest's memory at the end; reads the memory twice more here and once
    /// more there
    #[argh(switch)]
    checksum: bool,
    /// TLS with certificates on both sides: the directory of ca-cert.pem, client-cert.pem and
    /// client-key.pem, as for QEMU; the destination's certificate must be for the URI's host
    #[argh(option)]
    tls_creds: Option<PathBuf>,
    /// the name or address in the destination's certificate, if it is not the URI's host
    #[argh(option)]
    tls_hostname: Option<String>,
    /// a file with the destination's secret
    #[argh(option)]
    secret_file: Option<PathBuf>,
    /// take over the session of this number (its beginning is enough), whose umem was killed, with
    /// the session's own options; the URI, --tls-creds with --tls-hostname, and --secret-file may
    /// change. If no switchover had left, the guest goes on here instead
    #[argh(option)]
    resume: Option<String>,
    /// with --resume: end the session without its destination. Use this only if you know that the
    /// guest there is complete or has ended, and that no umem there will say so. The RAM file
    /// stays, and the guest never runs here again
    #[argh(switch)]
    abandon: bool,
    /// before the switchover: the most seconds that one step of the destination, such as loading
    /// the device state, may take while no byte moves (default 600). Then the guest goes on here
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
    /// the order of background pages: adaptive (the default) runs ahead of a guest that reads
    /// through its memory; plain is by address
    #[argh(option, default = "source::Order::Adaptive")]
    order: source::Order,
    /// limit of the background after the switchover, bytes a second such as 100M; pages that the
    /// guest waits for do not count (needs -p; umem control changes it)
    #[argh(option)]
    max_postcopy_bandwidth: Option<Size>,
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
    /// tcp:HOST:PORT, unix:PATH, fd:N or exec:CMD
    #[argh(positional)]
    uri: Option<Uri>,
}

impl Migrate {
    pub(super) fn run(self) -> Result<i32> {
        observe::trace::begin(self.verbose);
        if self.resume.is_some() {
            return self.go_on();
        }
        if self.abandon {
            return Err(Error::Usage(
                "--abandon ends a session that is there: name it with --resume SESSION".into(),
            ));
        }
        let Some(uri) = self.uri.clone() else {
            return Err(Error::Usage(
                "no URI: say where `umem incoming` listens, such as tcp:HOST:4444, or which session to \
                 --resume"
                    .into(),
            ));
        };
        let lanes = lanes_to(&uri, self.lanes, 1)?;
        limits::check(lanes)?;
        if self.no_background && !self.postcopy {
            return Err(Error::Usage("-n only makes sense with -p: write -p -n".into()));
        }
        if self.tls_hostname.is_some() && self.tls_creds.is_none() {
            return Err(Error::Usage(
                "--tls-hostname names whom a certificate is for: add --tls-creds".into(),
            ));
        }
        let max_postcopy_bandwidth = self.max_postcopy_bandwidth.map(|limit| limit.0);
        if max_postcopy_bandwidth.is_some() && !self.postcopy {
            return Err(Error::Usage(
                "--max-postcopy-bandwidth limits what is sent after the switchover: add -p".into(),
            ));
        }
        if max_postcopy_bandwidth == Some(0) {
            return Err(Error::Usage(
                "--max-postcopy-bandwidth 0 would send nothing: leave it out for no limit, or write \
                 -n for no background"
                    .into(),
            ));
        }
        self.check_listen()?;
        let precopy = self.passes(&uri)?;
        source::run(&source::Options {
            security: self.security(),
            observe: self.observe(),
            uri,
            postcopy: self.postcopy,
            background: !self.no_background,
            precopy,
            ram: self.ram,
            monitor: self.qmp.map(MonitorSocket::qmp),
            listen: self.listen.map(|path| path.0),
            switchover: self.switchover,
            lanes,
            release_ram: self.release_ram,
            checksum: self.checksum,
            cores: self.cores.0,
            idle_cores: self.idle_cores,
            order: self.order,
            step_timeout: self.step_timeout.map_or(STEP_TIMEOUT, |seconds| seconds.0),
            max_postcopy_bandwidth,
            session_dir: self.session_dir,
            json: self.json,
        })?;
        Ok(0)
    }

    /// Whether the options fit a migration that another program begins.
    fn check_listen(&self) -> Result<()> {
        let usage = |text: &str| Err(Error::Usage(text.into()));
        let is_external = self.switchover == Switchover::External;
        if self.listen.is_none() {
            return match is_external {
                true => usage(
                    "--switchover external is for a migration that another program begins: say with --listen unix:PATH \
                     where QEMU migrates to",
                ),
                false => Ok(()),
            };
        }
        match (self.qmp.is_some(), is_external) {
            (false, false) => {
                return usage(
                    "--listen: umem may let the guest run at the destination only if it knows that the guest stands \
                     still here: give QEMU's monitor with --qmp, or leave that to the program that manages both QEMUs \
                     with --switchover external, on both sides",
                );
            }
            (true, true) => {
                return usage(
                    "--switchover external asks no monitor: leave out --qmp, or leave out --switchover external and \
                     umem lets the guest run at the destination",
                );
            }
            _ => {}
        }
        let others = [
            ("--stop-first", self.stop_first, "QEMU sends its guest's memory while that runs"),
            ("--ram", !self.ram.is_empty(), "the guest's memory comes with QEMU's stream"),
            ("--release-ram", self.release_ram, "there are no RAM files of the guest's to free"),
            (
                "--downtime-limit",
                self.downtime_limit.is_some(),
                "QEMU decides when its guest stops, by its own parameter downtime-limit",
            ),
            (
                "--timeout",
                self.timeout.is_some() && !self.postcopy,
                "without -p QEMU alone decides when its guest stops",
            ),
            (
                "--precopy-passes",
                self.precopy_passes.is_some() && !self.postcopy,
                "without -p QEMU alone decides when its guest stops",
            ),
        ];
        match others.iter().find(|(_, is_given, _)| *is_given) {
            Some((option, _, why)) => {
                Err(Error::Usage(format!("with --listen {why}: leave out {option}")))
            }
            None => Ok(()),
        }
    }

    /// The passes while the guest runs; none where there are none.
    ///
    /// # Errors
    /// The options contradict each other, or passes are impossible.
    fn passes(&self, uri: &Uri) -> Result<Option<Precopy>> {
        let usage = |text: String| Err(Error::Usage(text));
        if self.stop_first && (self.postcopy || self.precopy) {
            return usage(
                "--stop-first sends all pages while the guest stands still: leave out -p and --precopy, or --stop-first"
                    .into(),
            );
        }
        let is_paced = self.listen.is_some();
        let has_guest = self.qmp.is_some() || is_paced;
        let is_wanted =
            self.precopy || is_paced || (has_guest && !self.postcopy && !self.stop_first);
        if !is_wanted {
            let options = [
                ("--precopy-passes", self.precopy_passes.is_some()),
                ("--downtime-limit", self.downtime_limit.is_some()),
                ("--timeout", self.timeout.is_some()),
                ("--max-bandwidth", self.max_bandwidth.is_some()),
            ];
            let why = match self {
                _ if self.postcopy => "-p alone has none: add --precopy",
                _ if self.stop_first => "--stop-first has none: leave it out",
                _ => "files alone have no guest that runs: give its monitor's socket with --qmp",
            };
            return match options.iter().find(|(_, is_given)| *is_given) {
                Some((option, _)) => {
                    usage(format!("{option} is about passes while the guest runs, and {why}"))
                }
                None => Ok(None),
            };
        }
        if self.precopy_passes == Some(0) {
            return usage(format!("--precopy-passes 0 would send nothing: use {WITHOUT_PASSES}"));
        }
        let max_bandwidth = self.max_bandwidth.map(|limit| limit.0);
        if max_bandwidth == Some(0) {
            return usage(
                "--max-bandwidth 0 would send nothing: leave it out for no limit, or give bytes a second such as 100M"
                    .into(),
            );
        }
        if !has_guest {
            return usage(
                "--precopy is for a guest that runs, and files alone have none: give its monitor's socket with --qmp"
                    .into(),
            );
        }
        if uri.is_one_connection() {
            return usage(format!(
                "passes while the guest runs need bulk lanes, and {uri} is one connection without them: use \
                 {WITHOUT_PASSES}, or give an address to connect to (tcp: or unix:)"
            ));
        }
        Ok(Some(Precopy {
            passes_max: self.precopy_passes.unwrap_or(match is_paced {
                true => PACED_PASSES,
                false => PRECOPY_PASSES,
            }),
            downtime_limit: Duration::from_millis(self.downtime_limit.unwrap_or(DOWNTIME_LIMIT_MS)),
            timeout: self.timeout.map(|seconds| seconds.0),
            max_bandwidth,
        }))
    }

    /// `--resume`
    fn go_on(self) -> Result<i32> {
        let begins = [
            ("-p", self.postcopy),
            ("--precopy", self.precopy),
            ("--stop-first", self.stop_first),
            ("--precopy-passes", self.precopy_passes.is_some()),
            ("--downtime-limit", self.downtime_limit.is_some()),
            ("--timeout", self.timeout.is_some()),
            ("--max-bandwidth", self.max_bandwidth.is_some()),
            ("-n", self.no_background),
            ("--ram", !self.ram.is_empty()),
            ("--qmp", self.qmp.is_some()),
            ("--listen", self.listen.is_some()),
            ("--switchover", self.switchover != Switchover::Umem),
            ("--lanes", self.lanes.is_some()),
            ("--step-timeout", self.step_timeout.is_some()),
            ("--release-ram", self.release_ram),
            ("--max-postcopy-bandwidth", self.max_postcopy_bandwidth.is_some()),
        ];
        if let Some((option, _)) = begins.iter().find(|(_, is_given)| *is_given) {
            return Err(Error::Usage(format!(
                "--resume goes on as the session was begun: leave out {option}"
            )));
        }
        if let Some(uri) = self.uri.as_ref().filter(|uri| uri.is_one_connection()) {
            return Err(Error::Usage(format!(
                "--resume opens connections itself: {uri} is no address to connect to"
            )));
        }
        let security = self.security();
        let is_named = security.tls_creds.is_some() || security.secret_file.is_some();
        source::resume(&source::ResumeOptions {
            resume: ResumeOptions {
                observe: self.observe(),
                session: self.resume.unwrap_or_default(),
                session_dir: self.session_dir,
                uri: self.uri,
                security: is_named.then_some(security),
                cores: self.cores.0,
                idle_cores: self.idle_cores,
                json: self.json,
            },
            order: self.order,
            abandon: self.abandon,
        })?;
        Ok(0)
    }

    fn security(&self) -> Security {
        Security {
            tls_creds: self.tls_creds.clone(),
            tls_hostname: self.tls_hostname.clone(),
            secret_file: self.secret_file.clone(),
            insecure: false,
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

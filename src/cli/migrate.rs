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
    note = "URI is the address at which `umem incoming` listens, tcp:HOST:PORT or unix:PATH, or one \
            existing connection that carries all lanes: fd:N is an inherited stream socket, exec:CMD \
            (run by /bin/sh) is a command whose standard input and output lead to the destination. \
            Before the switchover the guest continues here after any failure, after Ctrl-C and after \
            any other signal that ends a program. After the switchover the guest never runs here \
            again: umem reopens lost connections until the guest is complete. With -n, Ctrl-C sends \
            the remaining pages.",
    example = "Live precopy: the guest moves when little of its memory is left to send.\n  {command_name} --tls-creds \
               /etc/pki/qemu --qmp /run/qmp.sock tcp:DESTINATION:4444",
    example = "Hybrid: the same, and the rest follows after the switchover.\n  {command_name} --precopy -p --tls-creds \
               /etc/pki/qemu --qmp /run/qmp.sock tcp:DESTINATION:4444",
    example = "Postcopy: the guest moves at once, and all memory follows.\n  {command_name} -p --tls-creds \
               /etc/pki/qemu --qmp /run/qmp.sock tcp:DESTINATION:4444",
    example = "A guest whose management tool has QEMU migrate to /run/umem.sock, and starts the guest at the destination:\n  \
               {command_name} --tls-creds /etc/pki/qemu --listen unix:/run/umem.sock --switchover external \\\n    \
               tcp:DESTINATION:4444",
    example = "Take over after this process was killed:\n  {command_name} --resume SESSION",
    example = "End the session of a guest that is complete, when its destination no longer exists:\n  {command_name} \
               --resume SESSION --abandon",
    error_code(
        1,
        "The guest did not move, or its memory is damaged, or the output could not be written; stderr says why."
    ),
    error_code(2, "The command line is wrong.")
)]
pub(super) struct Migrate {
    /// postcopy: the guest runs at the destination before its last pages arrive (default: all pages arrive first);
    /// without --precopy the guest is stopped at once
    #[argh(switch, short = 'p')]
    postcopy: bool,
    /// live precopy, the default without -p: passes send pages while the guest runs, first all pages, then the pages
    /// that the guest has written meanwhile; the rest is sent after the switchover with -p (hybrid), before it
    /// without -p
    #[argh(switch)]
    precopy: bool,
    /// stop the guest first, then send all pages while the guest stands still
    #[argh(switch)]
    stop_first: bool,
    /// the number of passes while the guest runs, at most (default 4); the first pass sends all memory
    #[argh(option)]
    precopy_passes: Option<u32>,
    /// end the passes as soon as the rest can be sent within this time, in milliseconds (default 300)
    #[argh(option)]
    downtime_limit: Option<u64>,
    /// end the passes after this many seconds: the rest is sent while the guest runs at the destination with -p, while
    /// the guest stands still without -p
    #[argh(option)]
    timeout: Option<Seconds>,
    /// limit of the passes while the guest runs, bytes a second such as 100M, for all lanes together; pages sent
    /// after the stop do not count (umem control changes the limit)
    #[argh(option)]
    max_bandwidth: Option<Size>,
    /// send only the pages that the guest touches, for measurements (needs -p)
    #[argh(switch, short = 'n')]
    no_background: bool,
    /// a RAM file of the guest, NAME=PATH; repeat for more (default: umem asks the monitor)
    #[argh(option)]
    ram: Vec<RamPath>,
    /// the monitor's QMP socket
    #[argh(option)]
    qmp: Option<PathBuf>,
    /// receive QEMU's migration at unix:PATH, which another program begins (`migrate -d unix:PATH`, a
    /// management tool); QEMU's capability return-path has to be on, and QEMU decides when the guest
    /// stops. Needs --qmp, so that umem can start the guest at the destination, or --switchover external
    #[argh(option)]
    listen: Option<UnixPath>,
    /// the program that starts the guest at the destination: umem (the default), through the monitors,
    /// or external, a program that manages the QEMUs of both sides; external needs --listen, and
    /// --switchover external at the destination
    #[argh(option, default = "Switchover::Umem")]
    switchover: Switchover,
    /// bulk lanes: connections for background pages (default 1; none with fd: and exec:)
    #[argh(option)]
    lanes: Option<u16>,
    /// free the guest's RAM here as it arrives at the destination, from the switchover on; after that
    /// the guest's process here can only be ended
    #[argh(switch)]
    release_ram: bool,
    /// detect bits that change in transit with a checksum of every page and message, send damaged ones
    /// again, and compare all of the guest's memory at the end; this reads the memory twice more at
    /// the source and once more at the destination
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
    /// take over the session with this number (its beginning is enough), whose umem was killed, with
    /// the session's own options; the URI, --tls-creds with --tls-hostname, and --secret-file may
    /// change. If no switchover was sent, the guest continues here instead
    #[argh(option)]
    resume: Option<String>,
    /// with --resume: end the session without its destination. Use this only if you know that the
    /// guest is complete or has ended there, and that no umem there will report it. The RAM file
    /// stays, and the guest never runs here again
    #[argh(switch)]
    abandon: bool,
    /// before the switchover: the most seconds that one step of the destination, such as loading
    /// the device state, may take while no byte moves (default 600). After that the guest continues here
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
    /// limit of background pages after the switchover, bytes a second such as 100M; pages that the
    /// guest waits for do not count (needs -p; umem control changes the limit)
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
                "--abandon ends an existing session: name the session with --resume SESSION".into(),
            ));
        }
        let Some(uri) = self.uri.clone() else {
            return Err(Error::Usage(
                "no URI: give the address at which `umem incoming` listens, such as tcp:HOST:4444, or a session to \
                 --resume"
                    .into(),
            ));
        };
        let lanes = lanes_to(&uri, self.lanes, 1)?;
        limits::check(lanes)?;
        if self.no_background && !self.postcopy {
            return Err(Error::Usage("-n needs -p: write -p -n".into()));
        }
        if self.tls_hostname.is_some() && self.tls_creds.is_none() {
            return Err(Error::Usage(
                "--tls-hostname is the name in a certificate: add --tls-creds".into(),
            ));
        }
        let max_postcopy_bandwidth = self.max_postcopy_bandwidth.map(|limit| limit.0);
        if max_postcopy_bandwidth.is_some() && !self.postcopy {
            return Err(Error::Usage(
                "--max-postcopy-bandwidth limits the pages sent after the switchover: add -p"
                    .into(),
            ));
        }
        if max_postcopy_bandwidth == Some(0) {
            return Err(Error::Usage(
                "--max-postcopy-bandwidth 0 would send no pages: leave it out for no limit, or write -n for no \
                 background"
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
                    "--switchover external is for a migration that another program begins: give the socket to which \
                     QEMU migrates with --listen unix:PATH",
                ),
                false => Ok(()),
            };
        }
        match (self.qmp.is_some(), is_external) {
            (false, false) => {
                return usage(
                    "--listen: before umem starts the guest at the destination, umem has to check that the guest \
                     stands still here: give QEMU's monitor with --qmp, or let the program that manages both QEMUs \
                     start the guest, with --switchover external on both sides",
                );
            }
            (true, true) => {
                return usage(
                    "--switchover external uses no monitor: leave out --qmp, or leave out --switchover external so \
                     that umem starts the guest at the destination",
                );
            }
            _ => {}
        }
        let others = [
            ("--stop-first", self.stop_first, "QEMU sends the guest's memory while the guest runs"),
            ("--ram", !self.ram.is_empty(), "the guest's memory comes with QEMU's stream"),
            ("--release-ram", self.release_ram, "the guest has no RAM files to free"),
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
                _ if self.postcopy => "-p alone has no passes: add --precopy",
                _ if self.stop_first => "--stop-first has no passes: leave it out",
                _ => "RAM files alone have no running guest: give its monitor's socket with --qmp",
            };
            return match options.iter().find(|(_, is_given)| *is_given) {
                Some((option, _)) => {
                    usage(format!("{option} is about passes while the guest runs, and {why}"))
                }
                None => Ok(None),
            };
        }
        if self.precopy_passes == Some(0) {
            return usage(format!("--precopy-passes 0 would send no pages: use {WITHOUT_PASSES}"));
        }
        let max_bandwidth = self.max_bandwidth.map(|limit| limit.0);
        if max_bandwidth == Some(0) {
            return usage(
                "--max-bandwidth 0 would send no pages: leave it out for no limit, or give bytes a second such as \
                 100M"
                    .into(),
            );
        }
        if !has_guest {
            return usage(
                "--precopy is for a running guest, and RAM files alone have none: give its monitor's socket with \
                 --qmp"
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
                "--resume continues the session with the options it began with: leave out {option}"
            )));
        }
        if let Some(uri) = self.uri.as_ref().filter(|uri| uri.is_one_connection()) {
            return Err(Error::Usage(format!(
                "--resume opens connections itself, and umem cannot connect to {uri}"
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

//! `umem migrate`

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use super::values::{CoreList, Seconds, Size, lanes_to};
use crate::error::{Error, Result};
use crate::host::command::RamPath;
use crate::idle::IdleCores;
use crate::liveness::STEP_TIMEOUT;
use crate::observe::Address;
use crate::secure::Security;
use crate::session::ResumeOptions;
use crate::uri::Uri;
use crate::{doctor, observe, source};

/// Move a guest away: stop it, switch over to the `umem incoming` at URI, send its memory.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "migrate",
    note = "URI is where `umem incoming` listens, tcp:HOST:PORT or unix:PATH, or one connection to \
            it, over which everything goes: fd:N, an inherited stream socket, or exec:CMD, whose \
            standard input and output lead there (run by /bin/sh). Until the switchover any failure, and Ctrl-C or any \
            other signal that would end a program, leave \
            the guest running here; after it the guest never runs here again, and connections that \
            break are opened again until it has all of its memory. With -n, Ctrl-C sends the rest.",
    example = "{command_name} -p --tls-creds /etc/pki/qemu --qmp /run/qmp.sock tcp:DESTINATION:4444",
    example = "Go on after this process was killed, once the switchover had left:\n  {command_name} --resume SESSION",
    example = "End what is left here of a guest that is complete at a destination which is gone:\n  {command_name} --resume SESSION --abandon",
    error_code(
        1,
        "The guest did not move, or not whole, or what was to be on stdout could not be written; stderr says why."
    ),
    error_code(2, "The command line is wrong.")
)]
pub(super) struct Migrate {
    /// postcopy: switch over first and send pages after (default: send all before)
    #[argh(switch, short = 'p')]
    postcopy: bool,
    /// send no page that was not asked for, to measure (needs -p)
    #[argh(switch, short = 'n')]
    no_background: bool,
    /// a RAM file of the guest, NAME=PATH; repeat for more (default: asked of the monitor)
    #[argh(option)]
    ram: Vec<RamPath>,
    /// the monitor's QMP socket
    #[argh(option)]
    qmp: Option<PathBuf>,
    /// bulk lanes, connections that carry pages in the background (default 1; none with fd: and
    /// exec:)
    #[argh(option)]
    lanes: Option<u16>,
    /// free the guest's RAM here as it arrives there, from the switchover on; afterwards it is gone
    /// here, so that the guest's process here can only be ended
    #[argh(switch)]
    release_ram: bool,
    /// check every page and every word of both sides for bits that change on their way, have sent again
    /// what did, and compare all of the guest's memory at the end; reads it twice more here and once there
    #[argh(switch)]
    checksum: bool,
    /// TLS with certificates on both sides: the directory of ca-cert.pem, client-cert.pem and
    /// client-key.pem, as for QEMU; the destination's certificate must be for the URI's host
    #[argh(option)]
    tls_creds: Option<PathBuf>,
    /// the name or address that the destination's certificate is for, where it is not the URI's host
    #[argh(option)]
    tls_hostname: Option<String>,
    /// a file with the secret that the destination was started with
    #[argh(option)]
    secret_file: Option<PathBuf>,
    /// go on with the session of this number (its beginning is enough) whose umem was killed, as it was
    /// begun; the URI, --tls-creds with --tls-hostname, and --secret-file may be given anew. If no
    /// switchover had left, the guest goes on here instead
    #[argh(option)]
    resume: Option<String>,
    /// with --resume: end the session without its destination, once it is known that the guest there is
    /// complete or has ended, and nobody there will say so any more; its RAM file stays, and the guest never
    /// runs here again
    #[argh(switch)]
    abandon: bool,
    /// the most that a step of the destination's may take before the switchover, seconds without a byte that
    /// moves (default 600): its monitor may be slow to load. Then the guest goes on here
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
    /// the order of the pages that nobody has asked for: adaptive, the default, which runs ahead of a
    /// guest that reads on through its memory, or plain, as they lie there
    #[argh(option, default = "source::Order::Adaptive")]
    order: source::Order,
    /// the most that is sent after the switchover beside what is asked for, bytes a second such as 100M
    /// (needs -p; umem control changes it)
    #[argh(option)]
    max_postcopy_bandwidth: Option<Size>,
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
        doctor::limits::check(lanes)?;
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
        source::run(&source::Options {
            security: self.security(),
            observe: self.observe(),
            uri,
            postcopy: self.postcopy,
            background: !self.no_background,
            ram: self.ram,
            qmp: self.qmp,
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

    /// `--resume`
    fn go_on(self) -> Result<i32> {
        let begins = [
            ("-p", self.postcopy),
            ("-n", self.no_background),
            ("--ram", !self.ram.is_empty()),
            ("--qmp", self.qmp.is_some()),
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

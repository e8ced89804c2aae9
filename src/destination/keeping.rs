//! What this process leaves behind should it be killed, and when it writes it down.
//!
//! What another one does with that, and why it is enough, is in [`takeover`](super::takeover).

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use umem_wire::destination::{Mode, Phase};

use super::Migration;
use super::accept::Lanes;
use super::farewell::{Farewell, Word};
use super::guest::GuestMemory;
use super::prepare::{Adopted, Prepared};
use super::side::GuestSide;
use crate::control::event::Event;
use crate::error::{Context, Error, Result};
use crate::host::command::{Created, began};
use crate::lane;
use crate::memory::words::State;
use crate::observe::watch::Role;
use crate::report::Output;
use crate::session::{
    self, DestinationRecord, DestinationState, Directory, GuestRecord, Keeper, RegionRecord,
    SecurityRecord, TotalsRecord, VERSION, absolute, since_boot,
};

/// What is kept for the case that this process is killed, before it is.
pub(super) struct Keeping {
    keeper: Keeper<DestinationRecord>,
    /// Our end of the monitor's socket, where nobody could open another one.
    qmp: Option<OwnedFd>,
}

/// Prepares a session that begins. None where one of those who would have a part in taking over cannot,
/// or there is no place for its file.
pub(super) fn keep(
    options: &super::Options,
    uri: &str,
    lanes: &Lanes,
    prepared: &Prepared,
    adopted: &Adopted,
    output: &Output,
) -> Result<Option<Keeping>> {
    let Some(process) = prepared.side.process() else { return Ok(None) };
    if !lanes.recovers() || !process.keeps_sessions {
        return Ok(None);
    }
    let named = options.session_dir.as_deref();
    let found = Directory::find_or_remark(named, |why| output.remark(why))?;
    let Some(directory) = found else { return Ok(None) };
    let monitor = &process.monitor;
    let pid = monitor.pid();
    let guest = GuestRecord {
        pid,
        // One that has ended is noticed elsewhere.
        began: began(pid).unwrap_or(0),
        owner: monitor.owner(),
        created: monitor.created().iter().map(Created::absolute).collect::<Result<_>>()?,
        qmp: options.qmp.as_deref().map(absolute).transpose()?,
        has_monitor: prepared.host.is_some(),
        runs: true,
    };
    let qmp = match (&guest.qmp, &prepared.host) {
        (None, Some(host)) => host.connection()?,
        _ => None,
    };
    let regions = adopted.landing.iter().map(|(_, region)| RegionRecord {
        name: region.name.clone(),
        bytes: region.bytes,
        unit_shift: region.page_size.shift(),
    });
    let record = DestinationRecord {
        version: VERSION,
        state: DestinationState::Loaded,
        uri: lanes.door.is_some().then(|| uri.to_owned()),
        bulk_lanes: lanes.hello.bulk_lanes,
        capabilities: lanes.hello.capabilities.0,
        certificate: lanes.certificate.as_deref().map(session::hex),
        regions: regions.collect(),
        postcopy: true,
        background: true,
        touch: options.touch,
        security: SecurityRecord::of(&options.security)?,
        guest,
        stopped_us: 0,
        switched_at: None,
        running_at: None,
        totals: TotalsRecord::default(),
    };
    match Keeper::new(&directory, lanes.hello.session, Role::Destination, record) {
        Ok(keeper) => Ok(Some(Keeping { keeper, qmp })),
        // Its number is the source's choice: one that is in use here is no reason to refuse a guest.
        Err(error @ Error::Environment(_)) => {
            output.remark(&format!(
                "this process cannot be taken over from if it is killed: {error}"
            ));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Keeping {
    /// Has the pages' states kept where they outlive this process, and gives the guest's side what it
    /// has to keep.
    pub(super) fn begin(
        self,
        guest: &mut GuestMemory,
        side: &mut GuestSide,
    ) -> Result<Keeper<DestinationRecord>> {
        let state = State::new(guest.extents(), guest.sources.len())?;
        guest.share(&state);
        let path = self.keeper.file(GUEST_SOCKET);
        let listener = listen(&path).context(|| format!("making {}", path.display()))?;
        side.entrust(listener, &state.file, self.qmp)?;
        Ok(self.keeper)
    }
}

impl Migration<'_> {
    fn keep_state(&self, change: impl FnOnce(&mut DestinationRecord)) -> Result<()> {
        self.keeper.as_ref().map_or(Ok(()), |keeper| keeper.edit(change))
    }

    /// The same where the guest is this side's: it goes on whether that can be written down or not, and what is
    /// there says less than is so, which the source makes up for.
    fn keep_if_possible(&self, change: impl FnOnce(&mut DestinationRecord)) {
        if let Err(error) = self.keep_state(change) {
            self.output.remark(&format!("{error}; going on"));
        }
    }

    /// Once the source hears of it, it may give its guest up: this one is kept from now on.
    pub(super) fn keep_loaded(&self, side: &mut GuestSide) -> Result<()> {
        let Mode { postcopy, background } = self.mode;
        self.keep_state(|record| {
            record.guest.runs = self.runs;
            (record.postcopy, record.background) = (postcopy, background);
        })?;
        if self.keeper.is_some() { side.hold() } else { Ok(()) }
    }

    /// The guest is this side's.
    pub(super) fn keep_switched(&self, stopped_us: u64) {
        let switched_at = self.times.switched.map(since_boot);
        self.keep_if_possible(|record| {
            record.state = DestinationState::Switched;
            (record.stopped_us, record.switched_at) = (stopped_us, switched_at);
        });
    }

    /// It runs.
    pub(super) fn keep_running(&self) {
        let running_at = self.times.running.map(since_boot);
        self.keep_if_possible(|record| {
            record.state = DestinationState::Running;
            record.running_at = running_at;
        });
    }

    /// It has all of its memory. What cannot be written now would be found again.
    pub(super) fn keep_complete(&self) {
        let totals = self.guest.counters.totals().into();
        let _ = self.keep_state(|record| {
            (record.state, record.totals) = (DestinationState::Complete, totals);
        });
    }

    /// The source has said goodbye: nobody waits for it any more.
    pub(super) fn keep_parted(&self) {
        self.keep_if_possible(|record| record.state = DestinationState::Parted);
    }

    /// The source finds this side somewhere else from now on.
    pub(super) fn keep_address(&self, uri: &str) -> Result<()> {
        self.keep_state(|record| record.uri = Some(uri.to_owned()))
    }

    pub(super) fn say_how_to_resume(&self) {
        let (Some(keeper), Some(command)) = (&self.keeper, self.how_to_resume()) else { return };
        self.output.tell(&Event::Resumable { session: keeper.session(), command });
    }

    /// The command that goes on, if one can.
    pub(super) fn how_to_resume(&self) -> Option<String> {
        self.keeper.as_ref().map(resume_command)
    }

    /// Nobody has to take over any more.
    pub(super) fn forget_session(&self) {
        self.keeper.iter().for_each(Keeper::remove);
    }

    /// The end of the session, unless the source has not heard of it: then there is somebody for it to
    /// find, as long as this process stays, and a record for who resumes after that.
    pub(super) fn part(&mut self) -> Option<Farewell> {
        if !matches!(self.phase, Phase::Completed(None)) {
            self.forget_session();
            return None;
        }
        let keeper = self.keeper.clone()?;
        self.output.remark(&source_does_not_know(&keeper));
        let (standing, landing) = (self.standing(), self.landing.clone());
        let door = self.link.leave()?;
        Some(Farewell::new(door, Word::Complete { standing, landing }, keeper))
    }

    /// After a failure: whether the guest stays, and with it what another process needs to go on. From *loaded* on
    /// the source may have given its guest up. Then only the source ends this one, or somebody who knows better.
    pub(super) fn guest_stays(&self, error: &Error, side: &GuestSide) -> bool {
        let is_there = side.process().is_some() && !side.has_exited() && !self.guest.is_gone();
        match self.phase {
            _ if !is_there => false,
            Phase::Loaded { .. } => {
                self.keeper.is_some()
                    && !matches!(error, Error::Peer { .. } | Error::Interrupted(_))
            }
            _ => self.phase.may_run() && !side.ends_with_us(),
        }
    }

    /// Says how to go on with a guest that waits.
    pub(super) fn explain_staying(&self, error: Error) -> Error {
        let error = self.explain(error);
        if let Some(command) = self.how_to_resume() {
            let is_loaded_only = matches!(self.phase, Phase::Loaded { .. });
            let session = self.keeper.as_ref().map(Keeper::session);
            self.output.tell(&Event::Stays { session, is_loaded_only, command });
        }
        error
    }
}

/// What is to be done about a source that has not said goodbye.
pub(super) fn source_does_not_know(keeper: &Keeper<DestinationRecord>) -> String {
    format!(
        "the source has not heard that its guest is complete: if its umem comes back it is told by {}, or \
         end it there with `umem migrate --resume {} --abandon`",
        resume_command(keeper),
        keeper.session()
    )
}

fn resume_command(keeper: &Keeper<DestinationRecord>) -> String {
    format!("umem incoming --resume {}{}", keeper.session(), keeper.directory_option())
}

/// The file of the socket at which the guest's side is reached.
pub(super) const GUEST_SOCKET: &str = "guest";

/// A path of a unix socket may have 107 bytes, and its directory's may be long: named by a descriptor of
/// that, it is short.
fn short(path: &Path) -> std::io::Result<(std::fs::File, PathBuf)> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(ErrorKind::InvalidInput.into());
    };
    let directory =
        std::fs::File::options().read(true).custom_flags(libc::O_DIRECTORY).open(parent)?;
    let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
    Ok((directory, short))
}

pub(super) fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let (_directory, short) = short(path)?;
    lane::connect_at_once(&short)
}

fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let (_directory, short) = short(path)?;
    lane::bind_private(&short)
}

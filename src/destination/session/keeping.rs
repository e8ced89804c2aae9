//! The state that this process leaves for a takeover, and when it writes that state.
//!
//! [`takeover`](super::takeover) describes the takeover, and why this state is sufficient.

use crate::runtime::{hex, private_socket};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::control::destination::{Record, Session};
use crate::destination::Migration;
use crate::destination::admission::accept::Lanes;
use crate::destination::admission::prepare::{Adopted, Prepared};
use crate::destination::memory::GuestMemory;
use crate::destination::side::GuestSide;
use crate::error::{Context, Error, Result};
use crate::memory::created::Created;
use crate::memory::words::State;
use crate::observe::output::Output;
use crate::runtime::process::began;
use crate::runtime::role::Role;
use crate::session::{
    DestinationRecord, DestinationState, Directory, GuestRecord, RegionRecord, SecurityRecord,
    SessionFile, TotalsRecord, VERSION, since_boot,
};

/// The state of a running session for a takeover.
pub(in crate::destination) struct Persistence {
    keeper: SessionFile<DestinationRecord>,
    /// This side's end of the monitor's socket, if no other process could open another connection.
    connection: Option<OwnedFd>,
}

/// Prepares a session that begins. None if a party to a takeover does not support it, or if there is no directory for
/// the session file.
pub(in crate::destination) fn keep(
    options: &crate::destination::Options,
    uri: &str,
    lanes: &Lanes,
    prepared: &Prepared,
    adopted: &Adopted,
    output: &Output,
) -> Result<Option<Persistence>> {
    let Some(process) = prepared.side.process() else { return Ok(None) };
    if !lanes.recovers() || !process.keeps_sessions {
        return Ok(None);
    }
    let named = options.session_dir.as_deref();
    let found = Directory::find_or_remark(named, |why| output.remark(why))?;
    let Some(directory) = found else { return Ok(None) };
    let handle = match &prepared.monitor {
        Some(monitor) => monitor.handle()?,
        None => None,
    };
    let (monitor, connection) =
        handle.map_or((None, None), |handle| (Some(handle.record), handle.connection));
    let process = &process.monitor;
    let pid = process.pid();
    let guest = GuestRecord {
        pid,
        // A process that has ended is detected elsewhere.
        began: began(pid).unwrap_or(0),
        owner: process.owner(),
        created: process.created().iter().map(Created::absolute).collect::<Result<_>>()?,
        monitor,
        runs: true,
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
        certificate: lanes.certificate.as_deref().map(hex::hex),
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
    match SessionFile::new(&directory, lanes.hello.session, Role::Destination, record) {
        Ok(keeper) => Ok(Some(Persistence { keeper, connection })),
        // The source chooses the session's number: a number in use here is no reason to refuse a guest.
        Err(error @ Error::Environment(_)) => {
            output
                .remark(&format!("no other process can take over if this one is killed: {error}"));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Persistence {
    /// Moves the page states to memory that outlives this process, and hands the guest's process the objects that it
    /// keeps for a takeover.
    pub(in crate::destination) fn begin(
        self,
        guest: &mut GuestMemory,
        side: &mut GuestSide,
    ) -> Result<SessionFile<DestinationRecord>> {
        let state = State::new(guest.extents(), guest.sources.len())?;
        guest.share(&state);
        let path = self.keeper.file(GUEST_SOCKET);
        let listener = listen(&path).context(|| format!("making {}", path.display()))?;
        side.entrust(listener, &state.file, self.connection)?;
        Ok(self.keeper)
    }
}

impl Migration<'_> {
    /// Writes the session's progress to its file, if there is one.
    pub(in crate::destination) fn write(&self, what: Record) -> Result<()> {
        // Before the session file, whose write may fail.
        self.guest.note_standing(&what);
        self.edit(|record| {
            record.state = what.state();
            match what {
                Record::Loaded { mode, runs } => {
                    record.guest.runs = runs;
                    (record.postcopy, record.background) = (mode.postcopy, mode.background);
                }
                Record::Switched { stopped_us, at } => {
                    (record.stopped_us, record.switched_at) = (stopped_us, Some(since_boot(at)));
                }
                Record::Running { at } => record.running_at = Some(since_boot(at)),
                Record::Complete { totals } => record.totals = totals.into(),
                Record::Parted => {}
            }
        })
    }

    /// Records this side's new address.
    pub(in crate::destination) fn write_address(&self, uri: &str) -> Result<()> {
        self.edit(|record| record.uri = Some(uri.to_owned()))
    }

    fn edit(&self, change: impl FnOnce(&mut DestinationRecord)) -> Result<()> {
        self.keeper.as_ref().map_or(Ok(()), |keeper| keeper.edit(change))
    }

    /// Removes the session's files: no takeover is needed any more.
    pub(in crate::destination) fn forget_session(&self) {
        self.keeper.iter().for_each(SessionFile::remove);
    }
}

/// The core's view of a session that another process can take over.
pub(in crate::destination) fn session_of(keeper: &SessionFile<DestinationRecord>) -> Session {
    Session { number: keeper.session(), directory_option: keeper.directory_option() }
}

/// The file name of the guest process's socket.
pub(in crate::destination) const GUEST_SOCKET: &str = "guest";

/// A path of a unix socket is limited to 107 bytes, and its directory's path may be long: through a descriptor of the
/// directory the path is short.
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

pub(in crate::destination) fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let (_directory, short) = short(path)?;
    private_socket::connect_at_once(&short)
}

fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let (_directory, short) = short(path)?;
    private_socket::bind_private(&short)
}

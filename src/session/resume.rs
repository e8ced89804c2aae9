//! The start of `--resume SESSION` on either side.

use std::path::PathBuf;

use serde::Serialize;
use serde::de::DeserializeOwned;

use umem_wire::limits::LANES_MAX;

use super::{DestinationRecord, Directory, SessionFile, SourceRecord, VERSION};
use crate::error::{Error, Result};
use crate::observe;
use crate::runtime::idle::IdleCores;
use crate::runtime::role::Role;
use crate::transport::secure::Security;
use crate::transport::uri::Uri;

/// The options of a process that takes over.
#[derive(Clone, Debug)]
pub struct Options {
    /// The session's number, or its beginning.
    pub session: String,
    /// The directory of session files; none for the default.
    pub session_dir: Option<PathBuf>,
    /// A new address of the other side, or for it, if it has changed.
    pub uri: Option<Uri>,
    /// New security options, if they have changed.
    pub security: Option<Security>,
    /// Cores for the demand lane and the bulk lanes, in this order; empty to choose.
    pub cores: Vec<usize>,
    /// What idle cores do while faults come.
    pub idle_cores: IdleCores,
    /// JSON events on stdout.
    pub json: bool,
    /// Options of progress, metrics and control.
    pub observe: observe::Options,
}

/// A side's record.
pub(crate) trait Record: Clone + Serialize + DeserializeOwned {
    const ROLE: Role;

    fn version(&self) -> u32;

    /// The number of its session's bulk lanes.
    fn bulk_lanes(&self) -> u16;

    /// The security options of its lanes.
    fn security(&self) -> Security;
}

impl Record for SourceRecord {
    const ROLE: Role = Role::Source;

    fn version(&self) -> u32 {
        self.version
    }

    fn bulk_lanes(&self) -> u16 {
        self.bulk_lanes
    }

    fn security(&self) -> Security {
        self.security.security()
    }
}

impl Record for DestinationRecord {
    const ROLE: Role = Role::Destination;

    fn version(&self) -> u32 {
        self.version
    }

    fn bulk_lanes(&self) -> u16 {
        self.bulk_lanes
    }

    fn security(&self) -> Security {
        self.security.security()
    }
}

impl Options {
    /// Takes the session over for this process, and reads its record.
    ///
    /// # Errors
    /// No such session, one that a running process serves, or the record of another version of
    /// umem.
    pub(crate) fn take_over<R: Record>(&self) -> Result<(SessionFile<R>, R)> {
        let directory = Directory::find(self.session_dir.as_deref())?.ok_or_else(no_directory)?;
        let (keeper, record) = SessionFile::<R>::take_over(&directory, &self.session, R::ROLE)?;
        check(&record)?;
        Ok((keeper, record))
    }

    /// The security options of the lanes.
    pub(crate) fn security(&self, record: &impl Record) -> Security {
        self.security.clone().unwrap_or_else(|| record.security())
    }
}

/// Without a directory there are no sessions.
fn no_directory() -> Error {
    Error::Usage(
        "there is no default directory for session files, as $XDG_RUNTIME_DIR is not set: give one \
         with --session-dir"
            .into(),
    )
}

/// Refuses records of another version of umem, and invalid ones.
pub(crate) fn check(record: &impl Record) -> Result<()> {
    let (version, lanes) = (record.version(), record.bulk_lanes());
    if version == VERSION && lanes > LANES_MAX {
        return Err(Error::Environment(format!(
            "the session file has {lanes} bulk lanes, and there are {LANES_MAX} at most: it is damaged"
        )));
    }
    if version == VERSION {
        return Ok(());
    }
    Err(Error::Environment(format!(
        "the session file has version {version}, and this umem supports {VERSION}: resume with the umem \
         that began the session"
    )))
}

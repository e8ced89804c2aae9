//! The means to open the source's lanes, and to close them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use umem_wire::{Receiver, Standing};

use crate::error::Result;
use crate::runtime::inbox::Wait;
use crate::session::{SessionFile, SourceRecord};
use crate::transport::lane::{Lane, Session, ShutdownHandle};
use crate::transport::secure::{self, ClientAuth};
use crate::transport::uri::Uri;

/// The open lanes of one attempt.
pub(super) struct Opened {
    pub(super) lanes: Vec<Lane>,
    /// Has read the destination's first frames on the demand lane.
    pub(super) receiver: Receiver,
    pub(super) standing: Standing,
}

pub(super) struct Link {
    pub(super) recovers: bool,
    pub(super) session: Session,
    /// The credentials to show and to require each time lanes are opened.
    pub(super) pass: Arc<ClientAuth>,
    /// The destination's address; None if the session has only connections, which cannot be opened again.
    pub(super) uri: Option<Uri>,
    /// Connections to replace lost ones. They serve one attempt.
    pub(super) given: Option<Vec<OwnedFd>>,
    /// Opened lanes that are not served yet.
    pub(super) opened: Option<Opened>,
    /// The session file for another process, should this one be killed.
    pub(super) keeper: Option<SessionFile<SourceRecord>>,
    pub(super) sockets: ShutdownHandle,
}

impl Link {
    /// With the lanes that have just been opened, the demand lane first.
    pub(super) fn new(
        session: Session,
        pass: Arc<ClientAuth>,
        uri: Option<Uri>,
        lanes: &[Lane],
    ) -> Link {
        let recovers = |lane: &Lane| lane.capabilities.contains(umem_wire::Capabilities::RECOVERY);
        Link {
            recovers: lanes.iter().all(recovers),
            session,
            pass,
            uri,
            given: None,
            opened: None,
            keeper: None,
            sockets: ShutdownHandle::new(lanes),
        }
    }

    /// For a session whose process is gone: no lanes are up.
    pub(super) fn taken_over(
        session: Session,
        pass: Arc<ClientAuth>,
        uri: Option<Uri>,
        keeper: SessionFile<SourceRecord>,
    ) -> Link {
        Link { recovers: true, keeper: Some(keeper), ..Link::new(session, pass, uri, &[]) }
    }

    pub(super) fn recovers(&self) -> bool {
        self.recovers
    }

    /// For a caller that may have to close the lanes.
    pub(super) fn shutdown_handle(&self) -> ShutdownHandle {
        self.sockets.clone()
    }
}

/// Opens all lanes on given connections; a single connection serves as all lanes. The first answer may take as long as
/// the destination's program takes.
pub(super) fn open_over(
    sockets: Vec<OwnedFd>,
    session: &Session,
    epoch: u32,
    pass: &ClientAuth,
    wait: Wait<'_>,
) -> Result<Vec<Lane>> {
    let open = |(index, socket)| {
        let hello = session.hello(index, epoch);
        match session.bulk_lanes {
            0 => secure::open_shared(socket, &hello, pass, wait),
            _ => secure::open(socket, &hello, wait),
        }
    };
    (0..).zip(sockets).map(open).collect()
}

//! What is needed to open the source's lanes, and to end them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use umem_wire::{Receiver, Standing};

use crate::error::Result;
use crate::runtime::inbox::Wait;
use crate::session::{SessionFile, SourceRecord};
use crate::transport::lane::{Lane, Session, ShutdownHandle};
use crate::transport::secure::{self, ClientAuth};
use crate::transport::uri::Uri;

/// Lanes of one attempt, opened.
pub(super) struct Opened {
    pub(super) lanes: Vec<Lane>,
    /// Has read what the destination said first on the demand lane.
    pub(super) receiver: Receiver,
    pub(super) standing: Standing,
}

pub(super) struct Link {
    pub(super) recovers: bool,
    pub(super) session: Session,
    /// What is shown, and asked for, each time lanes are opened.
    pub(super) pass: Arc<ClientAuth>,
    /// Where the destination listens; none where there were connections, which cannot be opened again.
    pub(super) uri: Option<Uri>,
    /// Connections in place of lost ones, good for one attempt.
    pub(super) given: Option<Vec<OwnedFd>>,
    /// Lanes that have been opened, and are not served yet.
    pub(super) opened: Option<Opened>,
    /// Where another process finds what it needs to go on, should this one be killed.
    pub(super) keeper: Option<SessionFile<SourceRecord>>,
    pub(super) sockets: ShutdownHandle,
}

impl Link {
    /// With the lanes that have just been opened, demand lane first.
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

    /// Of a session whose process is gone: there are no lanes.
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

    /// For who may have to end them.
    pub(super) fn shutdown_handle(&self) -> ShutdownHandle {
        self.sockets.clone()
    }
}

/// Opens all lanes on connections that are there already; a single one is for all. The first answer may take as long
/// as the destination's program does.
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

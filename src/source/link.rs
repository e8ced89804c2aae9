//! What is needed to open the source's lanes, and to end them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::reopening::Opened;
use crate::lane::{Lane, Session, Severable};
use crate::secure::Pass;
use crate::session::{Keeper, SourceRecord};
use crate::uri::Uri;

pub(super) struct Link {
    pub(super) recovers: bool,
    pub(super) session: Session,
    /// What is shown, and asked for, each time lanes are opened.
    pub(super) pass: Arc<Pass>,
    /// Where the destination listens; none where there were connections, which cannot be opened again.
    pub(super) uri: Option<Uri>,
    /// Connections in place of lost ones, good for one attempt.
    pub(super) given: Option<Vec<OwnedFd>>,
    /// Lanes that have been opened, and are not served yet.
    pub(super) opened: Option<Opened>,
    /// Where another process finds what it needs to go on, should this one be killed.
    pub(super) keeper: Option<Keeper<SourceRecord>>,
    pub(super) sockets: Severable,
}

impl Link {
    /// With the lanes that have just been opened, demand lane first.
    pub(super) fn new(session: Session, pass: Arc<Pass>, uri: Option<Uri>, lanes: &[Lane]) -> Link {
        let recovers = |lane: &Lane| lane.capabilities.contains(umem_wire::Capabilities::RECOVERY);
        Link {
            recovers: lanes.iter().all(recovers),
            session,
            pass,
            uri,
            given: None,
            opened: None,
            keeper: None,
            sockets: Severable::new(lanes),
        }
    }

    /// Of a session whose process is gone: there are no lanes.
    pub(super) fn taken_over(
        session: Session,
        pass: Arc<Pass>,
        uri: Option<Uri>,
        keeper: Keeper<SourceRecord>,
    ) -> Link {
        Link { recovers: true, keeper: Some(keeper), ..Link::new(session, pass, uri, &[]) }
    }

    pub(super) fn recovers(&self) -> bool {
        self.recovers
    }

    /// For who may have to end them.
    pub(super) fn severable(&self) -> Severable {
        self.sockets.clone()
    }
}

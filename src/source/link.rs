//! The source's lanes, or their absence: what is needed to open them again, and how that has gone so far.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::control::liveness::{Liveness, STEP_TIMEOUT};
use crate::control::suspicion::Suspicion;
use crate::error::{Error, Result};
use crate::lane::{Lane, Session, Severable};
use crate::secure::Pass;
use crate::session::{Keeper, SourceRecord};
use crate::uri::Uri;

/// What is needed to open lanes again, and how often that was.
pub(super) struct Link {
    pub(super) recovers: bool,
    pub(super) session: Session,
    /// What is shown, and asked for, each time lanes are opened.
    pub(super) pass: Arc<Pass>,
    /// Where the destination listens; none where there were connections, which cannot be opened again.
    pub(super) uri: Option<Uri>,
    /// Connections in place of lost ones, good for one attempt.
    pub(super) given: Option<Vec<OwnedFd>>,
    /// Of the last attempt to open lanes.
    pub(super) epoch: u32,
    /// Where another process finds what it needs to go on, should this one be killed.
    pub(super) keeper: Option<Keeper<SourceRecord>>,
    pub(super) sockets: Severable,
    pub(super) is_up: bool,
    pub(super) liveness: Liveness,
    /// A bulk lane is lost, and until then a destination that gives up may say so on the demand lane.
    pub(super) doubt: Option<(Error, Instant)>,
    /// By hand: no lanes are opened.
    pub(super) is_paused: bool,
    pub(super) was_interrupted: bool,
    /// The destination has not had the switchover, which leaves once more when the monitor says that it may.
    pub(super) owes_switchover: bool,
    /// It has not had it, and the monitor says that it may not.
    pub(super) is_not_given_away: bool,
    pub(super) suspicion: Suspicion,
    /// Bytes that the destination had when it said so last.
    pub(super) accounted: u64,
    /// It has said that the guest runs there.
    pub(super) heard_running: bool,
    /// It has no room for pages, and that has been told.
    pub(super) is_short: bool,
    /// The goodbye has been said, and until then the destination may say that it has come.
    pub(super) parting: Option<Instant>,
    /// The lanes were lost before it said so.
    pub(super) is_unheard: bool,
    /// Since when nobody answers, and whether that has been remarked on.
    pub(super) unanswered: Option<(Instant, bool)>,
    pub(super) recoveries: u32,
    pub(super) disconnected: Duration,
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
            epoch: 0,
            keeper: None,
            sockets: Severable::new(lanes),
            is_up: true,
            liveness: Liveness::off(STEP_TIMEOUT),
            doubt: None,
            is_paused: false,
            was_interrupted: false,
            owes_switchover: false,
            is_not_given_away: false,
            suspicion: Suspicion::default(),
            accounted: 0,
            heard_running: false,
            is_short: false,
            parting: None,
            is_unheard: false,
            unanswered: None,
            recoveries: 0,
            disconnected: Duration::ZERO,
        }
    }

    /// Of a session whose process is gone: there are no lanes.
    pub(super) fn taken_over(
        session: Session,
        pass: Arc<Pass>,
        uri: Option<Uri>,
        keeper: Keeper<SourceRecord>,
        record: &SourceRecord,
    ) -> Link {
        Link {
            recovers: true,
            epoch: record.epoch,
            keeper: Some(keeper),
            is_up: false,
            accounted: record.heard_bytes,
            heard_running: record.running,
            ..Link::new(session, pass, uri, &[])
        }
    }

    /// The number of the next attempt to open lanes: more than any before it, of any process. So it is
    /// written down before it is used.
    pub(super) fn next_epoch(&mut self) -> Result<u32> {
        let next = self.epoch.checked_add(1);
        self.epoch = next
            .ok_or_else(|| Error::Unsupported("the connection has been lost too often".into()))?;
        let (epoch, uri) = (self.epoch, self.uri.as_ref().map(Uri::to_string));
        // Where it cannot be written, as its file system is full, a process that takes over may be refused until
        // its own numbers are higher.
        if let Some(keeper) = &self.keeper {
            let _ = keeper.edit(|record| {
                record.epoch = epoch;
                record.uri = uri.unwrap_or_else(|| record.uri.clone());
            });
        }
        Ok(epoch)
    }

    pub(super) fn recovers(&self) -> bool {
        self.recovers
    }

    pub(super) fn is_up(&self) -> bool {
        self.is_up
    }

    /// For who may have to end them.
    pub(super) fn severable(&self) -> Severable {
        self.sockets.clone()
    }

    /// By hand: whoever has these opens others from here on, and no address is dialled.
    pub(super) fn give(&mut self, sockets: Vec<OwnedFd>) {
        (self.uri, self.given) = (None, Some(sockets));
        self.is_paused = false;
    }

    pub(super) fn has_way(&self) -> bool {
        !self.is_paused && (self.uri.is_some() || self.given.is_some())
    }

    /// How to open lanes now, if there is a way.
    pub(super) fn take_way(&mut self) -> Option<Way> {
        if self.is_paused {
            return None;
        }
        let given = self.given.take().map(Way::Given);
        given.or_else(|| self.uri.clone().map(Way::Dial))
    }

    /// When `Migration::look_after_link` has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let doubt = self.doubt.as_ref().map(|&(_, until)| until);
        doubt.into_iter().chain(self.parting).chain(self.liveness.deadline()).min()
    }

    /// From *ready* on, and each time there are lanes again. Once the guest is not ours any more only where its
    /// lanes can be replaced: without them it would be lost.
    pub(super) fn watch_over(&mut self, is_ours: bool) {
        let is_asked = self.session.bulk_lanes > 0 && (is_ours || self.recovers);
        self.liveness.begin(is_asked, Instant::now());
    }
}

/// How lanes are opened again.
pub(super) enum Way {
    Dial(Uri),
    /// One for each, the demand lane's first.
    Given(Vec<OwnedFd>),
}

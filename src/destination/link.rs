//! The destination's lanes, or their absence, and the door through which others come.

use std::sync::Arc;
use std::time::{Duration, Instant};

use umem_wire::{Capabilities, Hello};

use super::accept::{Door, Lanes};
use crate::control::liveness::{Liveness, STEP_TIMEOUT};
use crate::control::suspicion::Suspicion;
use crate::error::{Error, Result};
use crate::lane::Severable;
use crate::secure::{Guard, Interest};

/// The lanes of the session, or their absence.
pub(super) struct Link {
    pub(super) recovers: bool,
    /// The demand lane's, of the last attempt that has come to something.
    pub(super) hello: Hello,
    /// What those who come have to show.
    pub(super) guard: Arc<Guard>,
    /// Who began the session, where TLS is asked for.
    pub(super) certificate: Option<Vec<u8>>,
    /// None where there were connections, which cannot be opened again, and no others have been given.
    pub(super) door: Option<Door>,
    pub(super) sockets: Severable,
    pub(super) state: State,
    pub(super) liveness: Liveness,
    /// New lanes, which wait until nothing is left of the old ones.
    pub(super) arrived: Option<Lanes>,
    /// By hand: no lanes are taken.
    pub(super) is_paused: bool,
    /// How often something has been said by hand: an address that was looked up for an earlier order is of
    /// no use.
    pub(super) orders: u64,
    pub(super) was_interrupted: bool,
    pub(super) suspicion: Suspicion,
    /// There was no room for what has come.
    pub(super) shortage: Option<Shortage>,
    /// When somebody was told last that pages cannot be made visible for want of memory.
    pub(super) short_of_tables: Option<Instant>,
    pub(super) recoveries: u32,
    pub(super) disconnected: Duration,
}

/// There was no room for what had come: no lanes are taken until there may be.
pub(super) struct Shortage {
    /// For whoever comes meanwhile; none once lanes are taken again.
    pub(super) refusal: Option<String>,
    /// When to look for room next, and how long after that.
    pub(super) until: Instant,
    pub(super) pause: Duration,
    /// Pages that had come by then.
    pub(super) pages_done: u64,
}

pub(super) enum State {
    Up,
    /// A bulk lane is lost. A source that gives up says why on the demand lane, which is not ordered
    /// against it.
    Doubtful {
        error: Error,
        until: Instant,
    },
    Down {
        since: Instant,
        /// Nothing of the old lanes is left.
        is_quiet: bool,
        /// Every page is here: the source is waited for until then.
        until: Option<Instant>,
    },
}

impl Link {
    pub(super) fn new(lanes: &mut Lanes, guard: Arc<Guard>) -> Link {
        let (hello, certificate) = (lanes.hello.clone(), lanes.certificate.clone());
        Link {
            recovers: lanes.recovers(),
            sockets: lanes.severable(),
            state: State::Up,
            ..Link::down(hello, guard, certificate, lanes.door.take())
        }
    }

    /// Of a session whose process is gone: there are no lanes, and nothing of those before is left.
    pub(super) fn taken_over(
        hello: Hello,
        guard: Arc<Guard>,
        certificate: Option<Vec<u8>>,
        door: Door,
    ) -> Link {
        Link::down(hello, guard, certificate, Some(door))
    }

    /// One that recovers and has no lanes.
    fn down(
        hello: Hello,
        guard: Arc<Guard>,
        certificate: Option<Vec<u8>>,
        door: Option<Door>,
    ) -> Link {
        Link {
            recovers: true,
            hello,
            guard,
            certificate,
            door,
            sockets: Severable::default(),
            state: State::Down { since: Instant::now(), is_quiet: true, until: None },
            liveness: Liveness::off(STEP_TIMEOUT),
            arrived: None,
            is_paused: false,
            orders: 0,
            was_interrupted: false,
            suspicion: Suspicion::default(),
            shortage: None,
            short_of_tables: None,
            recoveries: 0,
            disconnected: Duration::ZERO,
        }
    }

    pub(super) fn recovers(&self) -> bool {
        self.recovers
    }

    /// The source asked for checksums, which a destination always has.
    pub(super) fn is_checked(&self) -> bool {
        self.hello.capabilities.contains(Capabilities::CHECKSUM)
    }

    /// The source's digests count what this side's do.
    pub(super) fn has_whole_digests(&self) -> bool {
        self.hello.capabilities.contains(Capabilities::WHOLE_DIGESTS)
    }

    /// For who may have to end the lanes.
    pub(super) fn severable(&self) -> Severable {
        self.sockets.clone()
    }

    /// Something has been said by hand.
    pub(super) fn next_order(&mut self) -> u64 {
        self.orders += 1;
        self.orders
    }

    /// Connections that were given are of no use any more.
    pub(super) fn forget_given(&mut self) {
        self.door.take_if(|door| door.is_of_connections());
    }

    /// Everything is here: where a source comes in that has not heard of it, if it can come.
    pub(super) fn leave(&mut self) -> Option<Door> {
        self.door.take_if(|door| !door.is_of_connections())
    }

    pub(super) fn is_down(&self) -> bool {
        matches!(self.state, State::Down { .. })
    }

    /// Where new lanes come in: what is ready is for [`answer`](Link::answer).
    pub(super) fn fds(&self) -> Vec<Interest<'_>> {
        self.door.as_ref().map_or_else(Vec::new, Door::fds)
    }

    pub(super) fn answer(&mut self, index: usize) -> Result<()> {
        self.door.as_mut().map_or(Ok(()), |door| door.answer(index))
    }

    /// When `Migration::look_after_link` has something to do at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let own = match &self.state {
            State::Up => None,
            State::Doubtful { until, .. } => Some(*until),
            State::Down { until, .. } => *until,
        };
        let shortage = self.shortage.as_ref().filter(|shortage| shortage.refusal.is_some());
        let room = shortage.map(|shortage| shortage.until);
        let own = own.into_iter().chain(room).chain(self.liveness.deadline());
        own.chain(self.door.as_ref().and_then(Door::next_deadline)).min()
    }
}

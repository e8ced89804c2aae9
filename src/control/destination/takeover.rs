//! A session whose process is gone: the remaining work, and the continuation in another process.
//!
//! The record has the earliest possible state: it is written before each step, and from *complete* on after the step.
//! The source supplies the rest: it sends a switchover again that has not arrived.

use std::time::{Duration, Instant};

use umem_wire::Standing;
use umem_wire::destination::{Mode, Phase};

use super::link::Link;
use super::{Core, Effect, Effects, Failure, Moment, SessionPolicy, Stage, Times, micros};
use crate::session::{DestinationRecord, DestinationState, when};

/// The state of the guest; `G` if it still waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found<G> {
    /// Its side has handed everything over again.
    Waiting(G),
    /// Its process knows that it has all of its memory.
    Complete,
    Ended,
}

/// The remaining work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan<G> {
    /// Serve the guest.
    Serve(G),
    /// Tell the guest's process to continue without umem: both sides know that the guest is complete.
    Release(G),
    /// Nothing: remove the record.
    Nothing,
    /// Tell the source that the guest is complete.
    TellOfCompletion,
    /// Tell the source that the guest has ended.
    TellOfEnd,
}

/// The work that a record and the state of its guest require.
pub(crate) fn plan<G>(record: DestinationState, found: Found<G>) -> Plan<G> {
    match (record, found) {
        (DestinationState::Parted, Found::Waiting(guest)) => Plan::Release(guest),
        (DestinationState::Parted, Found::Complete | Found::Ended) => Plan::Nothing,
        (_, Found::Waiting(guest)) => Plan::Serve(guest),
        (DestinationState::Complete, Found::Complete | Found::Ended) => Plan::TellOfCompletion,
        (_, Found::Complete) => Plan::Nothing,
        (_, Found::Ended) => Plan::TellOfEnd,
    }
}

/// The progress of an earlier process, as recorded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recalled {
    pub(crate) state: DestinationState,
    pub(crate) mode: Mode,
    pub(crate) stopped_us: u64,
    pub(crate) switched: Option<Instant>,
    pub(crate) running: Option<Instant>,
}

impl From<&DestinationRecord> for Recalled {
    fn from(record: &DestinationRecord) -> Recalled {
        let &DestinationRecord { state, postcopy, background, stopped_us, .. } = record;
        Recalled {
            state,
            mode: Mode { postcopy, background },
            stopped_us,
            switched: record.switched_at.map(when),
            running: record.running_at.map(when),
        }
    }
}

impl Recalled {
    /// The time from the switchover's arrival until the guest ran.
    pub(crate) fn ran_after(&self) -> Duration {
        let both = self.switched.zip(self.running);
        both.map_or(Duration::ZERO, |(s, r)| r.saturating_duration_since(s))
    }

    /// The standing that a source receives for a complete guest.
    pub(crate) fn standing(&self, totals: umem_wire::Totals) -> Standing {
        Standing { switched: true, running: Some(micros(self.ran_after())), totals }
    }

    fn phase(&self) -> Phase {
        let &Recalled { mode, stopped_us, .. } = self;
        match self.state {
            DestinationState::Loaded => Phase::Loaded { mode },
            DestinationState::Switched => Phase::Switched { mode, stopped_us },
            DestinationState::Running | DestinationState::Complete | DestinationState::Parted => {
                Phase::Running { mode, stopped_us }
            }
        }
    }

    fn times(&self) -> Times {
        let stopped_for = Duration::from_micros(self.stopped_us);
        let stopped = self.switched.map(|at| at.checked_sub(stopped_for).unwrap_or(at));
        Times {
            stopped,
            switched: self.switched,
            running: self.running,
            first_page: stopped,
            cached: None,
            downtime: stopped_for + self.ran_after(),
        }
    }
}

impl Core {
    /// Continues from the recorded state, without lanes at first.
    pub(crate) fn recalled(terms: SessionPolicy, recalled: &Recalled, now: Instant) -> Core {
        let link = Link::down(&terms, now);
        let core = Core::at(terms, recalled.phase(), Stage::TakingOver, link, now);
        Core { times: recalled.times(), ..core }
    }

    /// A cancellation is no longer possible in a session that an earlier process has begun.
    pub(super) fn take_over(effects: &mut Effects) {
        effects.push(Effect::Commit);
    }

    /// Faults are served again.
    pub(super) fn taken_up(
        &mut self,
        now: &Moment,
        effects: &mut Effects,
    ) -> std::result::Result<(), Failure> {
        let Stage::TakingOver = self.stage else { return Ok(()) };
        if self.times.running.is_some() {
            effects.push(Effect::Sleep { downtime: self.times.downtime });
        }
        self.stage = match self.phase {
            Phase::Loaded { .. } => {
                // If the takeover fails now, this guest ends, because the source's guest continues.
                effects.push(Effect::Doom);
                Stage::Awaiting
            }
            Phase::Switched { .. } => {
                effects.push(Effect::Run);
                Stage::Starting { is_told: false }
            }
            _ => Stage::Serving,
        };
        effects.push(Effect::Show("waiting"));
        self.announce("another process has served this session before".into(), now, effects);
        if now.memory.pages_missing == 0 {
            self.all_cached(now, effects)?;
        }
        Ok(())
    }
}

//! A session whose process is gone: what is left to do for it, and how another process goes on.
//!
//! The record says the least that is so: it is written before what it speaks of is done, from *complete* on
//! afterwards. The source says the rest: it sends a switchover again that has not come.

use std::time::{Duration, Instant};

use umem_wire::Standing;
use umem_wire::destination::{Mode, Phase};

use super::link::Link;
use super::{Core, Effect, Effects, Failure, Moment, SessionPolicy, Stage, Times, micros};
use crate::session::{DestinationRecord, DestinationState, when};

/// What has become of the guest, `G` where it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found<G> {
    /// Its side has handed everything over again.
    Waiting(G),
    /// It was told that it has all of its memory.
    Complete,
    Ended,
}

/// What is left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan<G> {
    /// Serve it.
    Serve(G),
    /// Tell its process to go on alone: both sides know that it is complete.
    Release(G),
    /// Nothing: the record goes.
    Nothing,
    /// Tell the source that it is complete.
    TellOfCompletion,
    /// Tell the source that it has ended.
    TellOfEnd,
}

/// What a record and a guest together ask for.
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

/// How far a process before this had come, as its record says.
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
    /// From the switchover's arrival until the guest ran.
    pub(crate) fn ran_after(&self) -> Duration {
        let both = self.switched.zip(self.running);
        both.map_or(Duration::ZERO, |(s, r)| r.saturating_duration_since(s))
    }

    /// What a source hears of a guest that is complete.
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
    /// Goes on from there, without lanes at first.
    pub(crate) fn recalled(terms: SessionPolicy, recalled: &Recalled, now: Instant) -> Core {
        let link = Link::down(&terms, now);
        let core = Core::at(terms, recalled.phase(), Stage::TakingOver, link, now);
        Core { times: recalled.times(), ..core }
    }

    /// Nobody cancels any more what a process before this has begun.
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
                // If it comes to nothing now, this guest is ended, as the source's goes on.
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

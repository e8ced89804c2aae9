//! From the source's first frame to its goodbye: loading, the point of no return, the switchover, the last page.

use std::time::Duration;

use umem_wire::destination::{Input as Step, Mode, Phase};
use umem_wire::{Event as Heard, Frame, RegionTable};

use super::ending::Verdict;
use super::{
    Core, Effect, Effects, Exit, Failure, Moment, Owner, Pages, Record, Stage, Voice, micros,
};
use crate::error::Error;
use crate::events::{Event, Place, Remark, awaits_cont};

type Handled = std::result::Result<(), Failure>;

impl Core {
    pub(super) fn begin(
        &mut self,
        landing: RegionTable,
        now: &Moment,
        effects: &mut Effects,
    ) -> Handled {
        let ready = Frame::Ready(landing.units());
        effects.push(Effect::Prepare);
        self.step(Step::Received(&Heard::Regions(landing)), effects)?;
        self.step(Step::GuestReady, effects)?;
        effects.push(Effect::Send(ready));
        self.link.liveness.begin(self.terms.has_bulk_lanes, now.at);
        Ok(())
    }

    pub(super) fn received(
        &mut self,
        heard: Heard,
        now: &Moment,
        effects: &mut Effects,
    ) -> Handled {
        if let Heard::Error(fault) = heard {
            return self.source_gives_up(fault, now, effects);
        }
        self.step(Step::Received(&heard), effects)?;
        match heard {
            Heard::Rounds => {
                self.times.first_page = Some(now.at);
                effects.push(Effect::Show("copying"));
            }
            Heard::Remaining { .. } => self.settle_pages(effects),
            Heard::Pong(number) => self.link.liveness.answered(number, now.at),
            Heard::Stopped { postcopy, .. } => {
                self.times.stopped = Some(now.at);
                self.times.first_page.get_or_insert(now.at);
                effects.push(Effect::Show(if postcopy { "switching" } else { "filling" }));
                if postcopy {
                    effects.push(Effect::StayAwake);
                }
                effects.push(Effect::Report(Event::StoppedAtSource { postcopy }));
            }
            // The whole device state.
            Heard::DeviceState(state) => self.stage = Stage::Receiving { state },
            Heard::Load { .. } => self.load(effects),
            Heard::Switchover { stopped_us } => self.switch(stopped_us, now, effects),
            // Handled before the ping behind it is answered.
            Heard::Complete(_) => {
                effects.push(Effect::Persist(Record::Parted));
                self.complete(effects);
            }
            Heard::Digests(digests) if self.terms.is_checked => {
                effects.push(Effect::Compare(digests));
            }
            Heard::Digests(_) => {
                return Err(Error::protocol("demand lane", "unrequested digests").into());
            }
            _ => {}
        }
        Ok(())
    }

    /// Settles the pages when the remaining ones have been named and every earlier copy has landed. The two come in any
    /// order.
    pub(super) fn settle_pages(&self, effects: &mut Effects) {
        if self.phase == Phase::Settling && self.have_rounds_ended {
            effects.push(Effect::SettlePages);
        }
    }

    /// Each page comes once from here on.
    pub(super) fn pages_settled(&mut self, effects: &mut Effects) -> Handled {
        if self.phase == Phase::Settling {
            self.step(Step::PagesSettled, effects)?;
            effects.push(Effect::Send(Frame::Settled));
        }
        Ok(())
    }

    fn load(&mut self, effects: &mut Effects) {
        if let Stage::Receiving { state } = &mut self.stage {
            let state = std::mem::take(state);
            self.stage = Stage::Loading;
            effects.extend([Effect::StayAwake, Effect::Load(state)]);
        }
    }

    /// The monitor has loaded the device state. `runs` is true if the guest ran when it was stopped.
    pub(super) fn loaded(&mut self, runs: bool, effects: &mut Effects) -> Handled {
        if let Stage::Loading = self.stage {
            self.stage = Stage::Loaded { runs };
            self.commit_if_enough(effects);
        }
        Ok(())
    }

    /// Commits if the guest could run here: from then on the source may give its guest up. Without postcopy every page
    /// must be cached: the source has sent them all, but they may not have arrived.
    fn commit_if_enough(&mut self, effects: &mut Effects) {
        let Stage::Loaded { runs } = self.stage else { return };
        let Phase::Loading { mode: Mode { postcopy, .. }, .. } = self.phase else { return };
        if postcopy || self.is_cached() {
            self.stage = Stage::Committing { runs };
            effects.push(Effect::Commit);
        }
    }

    pub(super) fn committed(&mut self, effects: &mut Effects) -> Handled {
        if let Stage::TakingOver = self.stage {
            effects.push(Effect::TakeUp);
            return Ok(());
        }
        let Stage::Committing { runs } = self.stage else { return Ok(()) };
        let Phase::Loading { mode, .. } = self.phase else { return Ok(()) };
        if self.terms.session.is_none() {
            return self.say_loaded(effects);
        }
        self.stage = Stage::Holding;
        effects.extend([Effect::Persist(Record::Loaded { mode, runs }), Effect::Hold]);
        Ok(())
    }

    pub(super) fn held(&mut self, effects: &mut Effects) -> Handled {
        match self.stage {
            Stage::Holding => self.say_loaded(effects),
            _ => Ok(()),
        }
    }

    /// From here on only the source knows the owner of the guest.
    fn say_loaded(&mut self, effects: &mut Effects) -> Handled {
        self.step(Step::StateLoaded, effects)?;
        self.stage = Stage::Awaiting;
        effects.push(Effect::Send(Frame::Loaded));
        if let Some(session) = &self.terms.session {
            let (session, command) = (session.number.clone(), session.command());
            effects.push(Effect::Report(Event::Resumable { session, command }));
        }
        Ok(())
    }

    /// The guest belongs to this side.
    ///
    /// The downtime is the time that the source states, and the time since the switchover. A switchover may have waited
    /// behind other bytes. The guest has stood still at least since *stopped* arrived, so the switchover counts from the
    /// time at which that is as long as the source states. *Running* reports the same to the source, so both sides have
    /// one downtime.
    fn switch(&mut self, stopped_us: u64, now: &Moment, effects: &mut Effects) {
        let stated = Duration::from_micros(stopped_us);
        let known =
            self.times.stopped.map_or(Duration::ZERO, |at| now.at.saturating_duration_since(at));
        let switched = now.at.checked_sub(known.saturating_sub(stated)).unwrap_or(now.at);
        self.times.switched = Some(switched);
        self.times.downtime = stated;
        self.times.stopped = switched.checked_sub(stated).or(Some(switched));
        self.stage = Stage::Starting { is_told: false };
        effects.extend([
            Effect::Keep,
            Effect::Persist(Record::Switched { stopped_us, at: switched }),
            Effect::Run,
        ]);
    }

    /// The monitor reports that the guest runs.
    pub(super) fn running(&mut self, now: &Moment, effects: &mut Effects) -> Handled {
        let Stage::Starting { .. } = self.stage else { return Ok(()) };
        let since_switchover =
            self.times.switched.map_or(Duration::ZERO, |at| now.at.saturating_duration_since(at));
        // Whole microseconds, as the source hears them.
        let since_switchover = Duration::from_micros(micros(since_switchover));
        self.times.running = Some(now.at);
        self.times.downtime += since_switchover;
        let downtime = self.times.downtime;
        effects.push(Effect::Persist(Record::Running { at: now.at }));
        self.step(Step::GuestRunning, effects)?;
        self.stage = Stage::Serving;
        effects.extend([
            Effect::Send(Frame::Running { us_since_switchover: micros(since_switchover) }),
            Effect::Sleep { downtime },
        ]);
        if self.terms.runs_itself {
            effects.push(Effect::RequestPages);
        }
        effects.extend([
            Effect::Report(Event::Running { place: Place::Destination, downtime }),
            Effect::Show("filling"),
        ]);
        self.unregister_if_whole(effects);
        Ok(())
    }

    pub(super) fn is_cached(&self) -> bool {
        matches!(self.pages, Pages::Cached | Pages::Whole)
    }

    pub(super) fn all_cached(&mut self, now: &Moment, effects: &mut Effects) -> Handled {
        self.times.cached = Some(now.at);
        self.pages = match self.pages {
            Pages::Released => Pages::Whole,
            _ if self.terms.is_private => Pages::Cached,
            _ => Pages::Whole,
        };
        if self.terms.is_private {
            effects.extend([Effect::Show("touching"), Effect::TouchTheRest]);
        }
        self.commit_if_enough(effects);
        self.unregister_if_whole(effects);
        Ok(())
    }

    pub(super) fn all_released(&mut self, effects: &mut Effects) -> Handled {
        self.pages = match self.pages {
            Pages::Coming | Pages::Released => Pages::Released,
            Pages::Cached | Pages::Whole => Pages::Whole,
        };
        self.unregister_if_whole(effects);
        Ok(())
    }

    /// If the guest runs and has every page, it unregisters its userfaultfds at once.
    fn unregister_if_whole(&mut self, effects: &mut Effects) {
        if matches!(self.stage, Stage::Serving) && self.pages == Pages::Whole {
            self.stage = Stage::Unregistering;
            effects.push(Effect::Unregister);
        }
    }

    /// Checks that the guest still exists before it is reported complete: the pages of a guest whose process is gone
    /// count as cached, because no thread misses them.
    pub(super) fn unregistered(
        &mut self,
        exit: Option<Exit>,
        unmapped_bytes: u64,
        now: &Moment,
        effects: &mut Effects,
    ) -> Handled {
        let Stage::Unregistering = self.stage else { return Ok(()) };
        if let Some(Exit::Failed { how }) = exit {
            return Err(self.guest_died(&how).into());
        }
        effects.push(Effect::Free);
        if unmapped_bytes > 0 {
            effects.push(Effect::Report(Event::Unmapped { bytes: unmapped_bytes }));
        }
        effects.push(Effect::Persist(Record::Complete { totals: now.memory.totals }));
        self.step(Step::AllCached, effects)?;
        self.stage = Stage::Parting;
        effects.push(Effect::SendCompletion);
        Ok(())
    }

    pub(super) fn interrupted(&mut self, now: &Moment, effects: &mut Effects) -> Handled {
        if self.link.is_down() {
            return self.interrupted_without_lanes(effects);
        }
        match self.owner() {
            Owner::Source => {
                return Err(Error::Interrupted("the guest stays at the source".into()).into());
            }
            Owner::Undecided => {
                effects.push(Effect::Report(Event::Remark(Remark::SourceMayGiveUp)));
            }
            Owner::Ours => {
                let pages = now.memory.pages_missing;
                match self.stage {
                    Stage::Starting { is_told } if !self.terms.is_embedded => {
                        return self.interrupted_before_it_runs(is_told, pages, effects);
                    }
                    _ => effects.push(Effect::Report(Event::Remark(Remark::PagesNeeded { pages }))),
                }
            }
        }
        Ok(())
    }

    /// The guest belongs to this side, and its monitor has not reported yet that it runs.
    fn interrupted_before_it_runs(
        &mut self,
        is_told: bool,
        pages: u64,
        effects: &mut Effects,
    ) -> Handled {
        let how = self.terms.session.as_ref().map(super::Session::command);
        // If no process can continue, the missing pages are lost.
        let goes_on = how.is_none() && pages > 0;
        if goes_on || !is_told {
            effects.push(Effect::Report(Event::Remark(Remark::AwaitsCont { pages, goes_on })));
            self.stage = Stage::Starting { is_told: is_told || !goes_on };
            return Ok(());
        }
        let how = how.map_or_else(String::new, |how| {
            format!("; when the monitor answers again, {how} continues the session")
        });
        let waits = awaits_cont(pages);
        let error = Error::Interrupted(format!(
            "{waits}: do not start the guest at the source again; ask the monitor with `query-status`{how}"
        ));
        Err(Failure { error, voice: Voice::Silent })
    }

    /// Handles a loss of lanes that no lanes will replace, when no page is missing.
    pub(super) fn lose(&mut self, effects: &mut Effects) -> Handled {
        self.step(Step::Lost, effects)?;
        self.complete(effects);
        Ok(())
    }

    /// The guest is complete, whether or not the source knows it.
    fn complete(&mut self, effects: &mut Effects) {
        self.stage = Stage::Stopping(Verdict::Complete);
        effects
            .extend([Effect::Show("ending"), Effect::EndThreads { told: None, has_failed: false }]);
    }
}

//! What the destination does as the source, the monitor and its own lanes say how far they are: from the
//! guest's stop to the last page.

use std::time::{Duration, Instant};

use umem_wire::destination::{Input, Mode, Phase};
use umem_wire::{Event, Frame, transmit};

use super::demand::Command;
use super::guest::GuestRegion;
use super::side::GuestSide;
use super::{Migration, Note};
use crate::control::event::{self, Place};
use crate::error::{Error, Result};
use crate::host::qemu::Qemu;
use crate::host::thread::Answer;
use crate::idle;

impl Migration<'_> {
    pub(super) fn note(&mut self, note: Note, side: &mut GuestSide) -> Result<()> {
        match note {
            Note::Received(event) => self.received(event, side),
            Note::AllCached => {
                self.all_cached = true;
                self.times.cached = Some(Instant::now());
                if let Some(toucher) = &self.toucher {
                    self.progress.phase("touching");
                    toucher.touch_the_rest();
                }
                self.loaded_if_done(side)?;
                self.complete_if_done(side)
            }
            Note::AllReleased => {
                self.all_released = true;
                self.complete_if_done(side)
            }
            Note::BulkEnded => Ok(()),
            Note::Failed(error) if error.ends_lanes() => self.lane_lost(error),
            Note::Failed(error) => Err(error),
            Note::Quiet => self.quiet(),
            Note::Settled => self.settled(),
            Note::Pause => {
                self.progress.watch().heard();
                self.pause()
            }
            Note::Resume(uri) => {
                self.progress.watch().heard();
                self.resume(uri)
            }
            Note::Found { order, uri, found } => self.found(order, &uri, found),
            Note::Listen(listener) => {
                self.listen(listener);
                Ok(())
            }
            Note::Reconnect(sockets) => self.reconnect(sockets),
            Note::Host(Answer::Loaded(result)) => {
                result?;
                self.state_loaded = true;
                self.loaded_if_done(side)
            }
            Note::Host(Answer::Prepared(result)) => result,
            Note::Host(Answer::Running(result)) => {
                result?;
                self.running(side)
            }
            Note::Host(_) => Ok(()),
        }
    }

    pub(super) fn received(&mut self, event: Event, side: &mut GuestSide) -> Result<()> {
        if let Event::Error(fault) = event {
            return self.source_gives_up(fault);
        }
        self.step(Input::Received(&event))?;
        match event {
            Event::Pong(number) => self.link.liveness.answered(number, Instant::now()),
            Event::Stopped { postcopy, background } => {
                self.mode = Mode { postcopy, background };
                self.times.stopped = Some(Instant::now());
                self.times.first_page = self.times.stopped;
                self.progress.phase(if postcopy { "switching" } else { "filling" });
                if postcopy {
                    self.awake = idle::stay_awake(self.idle_cores);
                }
                self.output.tell(&event::Event::StoppedAtSource { postcopy });
            }
            // All of it.
            Event::DeviceState(state) => self.state = state,
            Event::Load { .. } => {
                self.runs = Qemu::runs_with(&self.state);
                self.awake = self.awake.take().or_else(|| idle::stay_awake(self.idle_cores));
                self.host.load_state(std::mem::take(&mut self.state));
            }
            Event::Switchover { stopped_us } => {
                side.keep()?;
                let now = Instant::now();
                self.times.switched = Some(now);
                self.times.downtime = Duration::from_micros(stopped_us);
                self.times.stopped = now.checked_sub(self.times.downtime).or(Some(now));
                self.keep_switched(stopped_us);
                self.host.run();
            }
            // Before the question behind it is answered.
            Event::Complete(_) => self.keep_parted(),
            Event::Digests(digests) if self.is_checked => self.source_digests = Some(digests),
            Event::Digests(_) => {
                return Err(Error::protocol("demand lane", "digests that nobody asked for"));
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn running(&mut self, side: &mut GuestSide) -> Result<()> {
        let now = Instant::now();
        self.awake = None;
        let since_switchover = self.times.switched.map_or(Duration::ZERO, |at| now - at);
        self.times.running = Some(now);
        self.times.downtime += since_switchover;
        self.keep_running();
        self.step(Input::GuestRunning)?;
        let us_since_switchover = u64::try_from(since_switchover.as_micros()).unwrap_or(u64::MAX);
        self.send(&Frame::Running { us_since_switchover });
        self.progress.watch().running(self.times.downtime);
        let (place, downtime) = (Place::Destination, self.times.downtime);
        self.output.tell(&event::Event::Running { place, downtime });
        self.progress.phase("filling");
        self.complete_if_done(side)
    }

    /// Tells the source that the guest could run here. Without postcopy it could only once every
    /// page is cached: the source has sent them all, but that is not their arrival.
    fn loaded_if_done(&mut self, side: &mut GuestSide) -> Result<()> {
        let enough = self.mode.postcopy || self.all_cached;
        if !self.state_loaded || !enough {
            return Ok(());
        }
        self.state_loaded = false;
        // Once the source has heard this it may give the guest up.
        self.progress.watch().commit("the guest stays at the source")?;
        self.keep_loaded(side)?;
        self.step(Input::StateLoaded)?;
        self.send(&Frame::Loaded);
        self.say_how_to_resume();
        Ok(())
    }

    /// The end: every page is cached and the guest runs. It leaves its userfaultfds at once; the
    /// source hears of it and says goodbye.
    ///
    /// Whether there still is a guest is asked before anybody is told that it is complete: pages of one whose process
    /// is gone count as cached, as nobody misses them.
    fn complete_if_done(&mut self, side: &mut GuestSide) -> Result<()> {
        let is_done = self.all_cached && self.all_released;
        if !is_done || !matches!(self.phase, Phase::Running { .. }) {
            return Ok(());
        }
        self.guest.unregister_all()?;
        if (self.guest.is_gone() || side.has_exited()) && !self.may_have_ended(side) {
            return Err(self.guest_exited(side));
        }
        self.guest.regions.iter().for_each(GuestRegion::end_move);
        side.is_complete();
        self.say_unmapped();
        self.keep_complete();
        self.step(Input::AllCached)?;
        let _ = self.commands.send(Command::Send(self.completion()));
        self.demand.wake();
        Ok(())
    }

    fn say_unmapped(&self) {
        let bytes = self.guest.unmapped_bytes();
        if bytes > 0 {
            self.output.tell(&event::Event::Unmapped { bytes });
        }
    }

    /// What is said once everything is here.
    pub(super) fn completion(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.is_checked && self.digests_are_known {
            transmit::encode(&Frame::Digests(self.guest.digests.get()), &mut bytes);
        }
        transmit::encode(&Frame::Complete(self.guest.counters.totals()), &mut bytes);
        bytes
    }

    pub(super) fn interrupted(&mut self) -> Result<()> {
        if let Some(result) = self.interrupted_without_lanes() {
            return result;
        }
        if !self.phase.outlives_its_lanes() {
            return Err(Error::Interrupted("the guest stays at the source".into()));
        }
        if !self.phase.may_run() {
            self.output.remark(
                "the source may be giving the guest up at this moment; going on, as nobody would have \
                 it then",
            );
            return Ok(());
        }
        if matches!(self.phase, Phase::Switched { .. }) && !self.inbox.is_embedded() {
            return self.interrupted_before_it_runs();
        }
        self.output.remark(&format!(
            "the guest runs here and still needs {} pages from the source; stopping now would stop \
             it, so this goes on until they have come",
            self.guest.pages_missing()
        ));
        Ok(())
    }

    /// The guest is ours, and its monitor has not answered yet that it runs.
    fn interrupted_before_it_runs(&mut self) -> Result<()> {
        let (missing, how) = (self.guest.pages_missing(), self.how_to_resume());
        let waits = format!(
            "the source has given the guest to this side, and the monitor here has not answered `cont` yet; \
             {missing} pages are still to come"
        );
        // Who could not go on would lose what is missing.
        if how.is_none() && missing > 0 {
            self.output.remark(&format!("{waits}, so this goes on until they have"));
            return Ok(());
        }
        if !std::mem::replace(&mut self.is_told_of_monitor, true) {
            let text = format!(
                "{waits}; another interrupt ends the waiting, and leaves the guest as it is"
            );
            self.output.remark(&text);
            return Ok(());
        }
        self.leaves_quietly = true;
        let how =
            how.map_or_else(String::new, |how| format!("; when it answers again, {how} goes on"));
        Err(Error::Interrupted(format!(
            "{waits}: do not start the guest at the source again; ask the monitor with `query-status`{how}"
        )))
    }
}

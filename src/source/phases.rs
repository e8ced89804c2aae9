//! What the source does as the destination, the monitor and its own lanes say how far they are: from the
//! guest's stop to the last page.

use std::sync::atomic::Ordering::Release;
use std::time::{Duration, Instant};

use umem_wire::limits::STATE_CHUNK_BYTES_MAX;
use umem_wire::source::{Input, Phase};
use umem_wire::{Event, Frame, transmit};

use super::demand::Command;
use super::parting::GOODBYE_PING;
use super::{Migration, peer};
use crate::control::event::{self, Place, Remark};
use crate::error::{Error, Result};
use crate::host::thread::Answer;
use crate::idle;
use crate::session::Keeper;

impl Migration {
    pub(super) fn received(&mut self, event: Event) -> Result<()> {
        if let Event::Error(fault) = event {
            return self.peer_failed(peer(fault));
        }
        self.step(Input::Received(&event))?;
        match event {
            Event::Ready(landing) => {
                self.land(landing)?;
                self.times.stopped = Some(Instant::now());
                if self.postcopy {
                    self.awake = idle::stay_awake(self.idle_cores);
                }
                self.link.watch_over(true);
                self.host.stop();
            }
            Event::Loaded => self.prepare_to_commit()?,
            Event::Running { .. } => self.running(Instant::now())?,
            Event::Pong(GOODBYE_PING) => self.link.parting = None,
            Event::Pong(number) => self.link.liveness.answered(number, Instant::now()),
            Event::Digests(digests) if self.memory.is_checked => self.digesting.heard(digests),
            Event::Digests(_) => {
                return Err(Error::protocol("demand lane", "digests that nobody asked for"));
            }
            Event::Complete(_) => {
                self.times.completed = Some(Instant::now());
                return self.completed();
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn answered(&mut self, answer: Answer) -> Result<()> {
        match answer {
            Answer::Stopped(result) => {
                if let Some(asked) = result? {
                    self.times.stopped = Some(asked);
                }
                self.stopped()
            }
            Answer::Saved(result) => {
                let state = result?;
                self.send_state(&state)
            }
            Answer::StandsStill(result) => self.may_be_given_away(result),
            Answer::PutBack(result) => {
                self.has_put_back(&result);
                Ok(())
            }
            Answer::Resumed(_) | Answer::Prepared(_) | Answer::Loaded(_) | Answer::Running(_) => {
                Ok(())
            }
        }
    }

    /// The guest stands still: its pages may leave.
    pub(super) fn stopped(&mut self) -> Result<()> {
        let (postcopy, background) = (self.postcopy, self.background);
        self.step(Input::GuestStopped { postcopy, background })?;
        self.memory.fix(false)?;
        self.memory.stopped.store(true, Release);
        let session = self.link.keeper.as_ref().map(Keeper::session);
        self.output.tell(&event::Event::Stopped { postcopy, session });
        self.send(&Frame::Stopped { postcopy, background });
        if postcopy {
            self.progress.phase("switching");
            self.host.save_state();
            return Ok(());
        }
        self.progress.phase("sending");
        self.start_bulk()
    }

    fn send_state(&mut self, state: &[u8]) -> Result<()> {
        let mut bytes = Vec::with_capacity(state.len() + state.len() / 1000 + 64);
        for chunk in state.chunks(STATE_CHUNK_BYTES_MAX) {
            self.step(Input::SentState { bytes: chunk.len() as u64 })?;
            bytes.extend_from_slice(&transmit::device_state_header(chunk.len()));
            bytes.extend_from_slice(chunk);
        }
        self.step(Input::SentLoad)?;
        transmit::encode(&Frame::Load { state_bytes: state.len() as u64 }, &mut bytes);
        // An answer would come behind all of it, so that nobody is asked until it has left.
        self.link.liveness.begin(false, Instant::now());
        self.command(Command::State(bytes));
        Ok(())
    }

    pub(super) fn state_has_left(&mut self) {
        if matches!(self.phase, Phase::Loading { .. }) {
            self.link.watch_over(true);
        }
    }

    /// The destination could run the guest. Whether it may is the monitor's to say, and asked last of all: so
    /// the session file says before that a switchover may have left.
    fn prepare_to_commit(&mut self) -> Result<()> {
        if self.memory.releases {
            self.allocated_bytes = self.memory.allocated_bytes()?;
        }
        self.times.switched = Some(Instant::now());
        self.keep_commit()?;
        self.host.stands_still();
        Ok(())
    }

    /// What the monitor says of a guest that is to be given away, or has been by a switchover that has not come.
    fn may_be_given_away(&mut self, result: Result<()>) -> Result<()> {
        match (&self.phase, result) {
            (Phase::Loaded { .. }, result) => {
                result?;
                self.switch_over()
            }
            (_, Ok(())) => {
                if std::mem::take(&mut self.link.owes_switchover) {
                    self.send_switchover();
                }
                Ok(())
            }
            (_, Err(error)) => {
                self.link.is_not_given_away = true;
                Err(error)
            }
        }
    }

    /// The commit point: from here on the guest never runs at this side again.
    fn switch_over(&mut self) -> Result<()> {
        self.progress.watch().commit("the guest goes on here")?;
        self.times.switched = Some(Instant::now());
        self.step(Input::SentSwitchover)?;
        self.send_switchover();
        self.put_back();
        self.link.watch_over(false);
        self.say_how_to_resume();
        self.start_release()
    }

    /// Has everything that was changed in the monitor put back, beside the guest, which has gone.
    pub(super) fn put_back(&mut self) {
        self.puts_back = true;
        self.host.put_back();
    }

    pub(super) fn has_put_back(&mut self, result: &Result<()>) {
        self.puts_back = false;
        if let Err(error) = result {
            self.remark(Remark::NotPutBack { reason: error.to_string() });
        }
    }

    pub(super) fn send_switchover(&self) {
        let stopped = self.times.stopped.map_or(Duration::ZERO, |at| at.elapsed());
        let stopped_us = u64::try_from(stopped.as_micros()).unwrap_or(u64::MAX);
        self.send(&Frame::Switchover { stopped_us });
    }

    /// The guest runs at the destination since then.
    pub(super) fn running(&mut self, since: Instant) -> Result<()> {
        self.times.running = Some(since);
        self.awake = None;
        self.link.heard_running = true;
        self.keep_heard();
        self.progress.watch().running(self.downtime());
        let (place, downtime) = (Place::Source, self.downtime());
        self.output.tell(&event::Event::Running { place, downtime });
        self.progress.phase("sending");
        if self.postcopy && self.background && self.link.is_up() {
            self.start_bulk()?;
        }
        Ok(())
    }

    pub(super) fn bulk_has_ended(&mut self) -> Result<()> {
        self.bulk_ended += 1;
        if self.bulk_ended < usize::from(self.lane_count) {
            return Ok(());
        }
        let precopying = matches!(self.phase, Phase::Precopying);
        self.step(Input::PagesAllSent)?;
        if precopying {
            self.progress.phase("switching");
            self.awake = idle::stay_awake(self.idle_cores);
            self.host.save_state();
        }
        Ok(())
    }

    /// Ctrl-C: gives up while the guest is still ours; afterwards the destination needs us. Without
    /// background pages it means that the benchmark is over: the rest is sent.
    pub(super) fn interrupted(&mut self) -> Result<()> {
        if self.phase.may_run() {
            return Err(Error::Interrupted("the guest goes on here".into()));
        }
        // Everything has been said.
        if self.link.parting.take().is_some() {
            return Ok(());
        }
        if !self.background && matches!(self.phase, Phase::Serving) {
            self.background = true;
            self.remark(Remark::SendsTheRest);
            return self.start_bulk();
        }
        let left = self.memory.total_bytes().saturating_sub(self.bytes_done());
        self.remark(Remark::StillNeeded { bytes: left });
        Ok(())
    }
}

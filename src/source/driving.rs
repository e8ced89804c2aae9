//! Carries out the effects of the source's core, and hands it its inputs.

use std::sync::atomic::Ordering::{Relaxed, Release};
use std::time::{Duration, Instant};

use umem_wire::limits::STATE_CHUNK_BYTES_MAX;
use umem_wire::{Frame, transmit};

use super::lanes::bulk;
use super::lanes::demand::Command;
use super::memory::digest;
use super::session::parting::Caller;
use super::{InboxMessage, Migration};
use crate::control::calling::Word;
use crate::control::source::closing::GOODBYE_PING;
use crate::control::source::{Effect, Goodbye, Input, Question};
use crate::control::{Moment, Order};
use crate::error::Result;
use crate::events::{Event, Remark};
use crate::host::monitor;
use crate::runtime::inbox::Wake;
use crate::runtime::{idle, panics};
use crate::session::SessionFile;

impl Migration {
    /// Runs until the core has ended.
    pub(super) fn until_ended(&mut self) {
        while !self.core.has_ended() {
            let input = self.answers.pop_front().unwrap_or_else(|| self.wait());
            self.handle(input);
            self.progress.update();
        }
    }

    /// Hands an input to the core, and carries out its effects.
    pub(super) fn handle(&mut self, input: Input) {
        let mut next = Some(input);
        while let Some(input) = next.take() {
            let now = Moment {
                at: Instant::now(),
                moved_bytes: self.bytes_done() + self.memory.counters.rounds_bytes.load(Relaxed),
                checksum_errors: self.memory.counters.checksum_errors.load(Relaxed),
                memory: (),
            };
            let effects = self.core.handle(input, &now);
            if let Some(phase) = self.core.phase_name() {
                self.progress.watch().entered(phase);
            }
            for effect in effects {
                if let Err(error) = self.carry_out(effect) {
                    next = Some(Input::NotDone(error));
                    break;
                }
            }
        }
    }

    fn wait(&mut self) -> Input {
        let due = self.core.deadline().map(|at| at.saturating_duration_since(Instant::now()));
        let interval = self.progress.interval();
        if let Some(phase) = self.core.phase_name() {
            panics::point(format_args!("control {phase}"));
        }
        match self.inbox.wait(&[], Some(due.map_or(interval, |due| due.min(interval)))) {
            Ok(Wake::Timeout | Wake::Ready(_)) => Input::Time,
            Ok(Wake::Signal) => Input::Interrupted,
            Ok(Wake::Message(note)) => self.input(note),
            Err(error) => Input::Abandoned(error),
        }
    }

    /// The core's input for a message.
    pub(super) fn input(&mut self, note: InboxMessage) -> Input {
        match note {
            InboxMessage::Received(event) => Input::Received(event),
            InboxMessage::StateLeft => Input::StateLeft,
            InboxMessage::BulkEnded => Input::BulkEnded,
            InboxMessage::PassEnded => Input::PassEnded,
            InboxMessage::EndPasses => {
                self.memory.end_passes();
                Input::EndPasses
            }
            InboxMessage::Failed(error) => Input::Failed(error),
            InboxMessage::Host(answer) => Input::Monitor(answer),
            InboxMessage::Digested(outcome) => Input::Digested(outcome),
            InboxMessage::Pause => {
                self.progress.watch().heard();
                Input::Order(Order::Pause)
            }
            InboxMessage::Resume(uri) => {
                self.progress.watch().heard();
                Input::Order(Order::Resume(uri))
            }
            InboxMessage::Reconnect(sockets) => {
                self.link.given = Some(sockets);
                Input::Given
            }
        }
    }

    fn carry_out(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Persist(record) => {
                let kept = self.keep(&record);
                if record.is_vital() { kept } else { Ok(()) }
            }
            Effect::Forget => {
                self.forget_session();
                Ok(())
            }
            Effect::Commit => {
                self.progress.watch().commit("the guest continues at the source")?;
                self.answers.push_back(Input::Committed);
                Ok(())
            }
            Effect::Ask(question) => {
                self.host.ask(match question {
                    Question::Track => monitor::Question::Track(self.memory.marks()),
                    Question::Look => monitor::Question::Look,
                    Question::Stop => monitor::Question::Stop,
                    Question::Save => monitor::Question::Save,
                    Question::StandsStill => monitor::Question::StandsStill,
                    Question::PutBack => monitor::Question::PutBack,
                    Question::Resume => monitor::Question::Resume,
                });
                Ok(())
            }
            Effect::SendRegions => {
                let table = self.memory.table()?;
                self.send(&Frame::Regions(table));
                Ok(())
            }
            Effect::Land(landing) => self.land(landing),
            Effect::Fix => {
                self.memory.fix(false)?;
                self.memory.stopped.store(true, Release);
                Ok(())
            }
            Effect::Send(frame) => {
                self.send(&frame);
                Ok(())
            }
            Effect::SendState(state) => {
                self.send_state(&state);
                Ok(())
            }
            Effect::Switchover => {
                self.send_switchover();
                Ok(())
            }
            Effect::Goodbye(goodbye) => {
                self.say_goodbye(goodbye);
                Ok(())
            }
            Effect::Ping(number) => {
                self.command(Command::Ping(number));
                Ok(())
            }
            Effect::SendBulk => self.start_bulk(),
            Effect::SendPass => {
                self.progress.watch().pass_begins(self.memory.left_to_send().dirty_bytes);
                self.send_pass()
            }
            Effect::CutPass => {
                self.order_bulk(bulk::Order::CutPass);
                Ok(())
            }
            Effect::CountDirty => {
                let left = self.memory.left_to_send();
                let sent_bytes = self.memory.counters.rounds_bytes.load(Relaxed);
                self.answers.push_back(Input::Counted { left, sent_bytes });
                Ok(())
            }
            Effect::EndRounds => {
                self.progress.watch().passes_are_over();
                self.order_bulk(bulk::Order::EndRounds);
                self.send_bytes(self.memory.end_rounds());
                Ok(())
            }
            Effect::StartRelease => self.start_release(),
            Effect::EndRelease => {
                self.end_release();
                Ok(())
            }
            Effect::Digest => digest::begin(self.memory.clone(), self.inbox.post()),
            Effect::CheckFiles { are_compared } => self.memory.check_files(are_compared),
            Effect::TakeDown => self.take_down(),
            Effect::Open { way, epoch } => self.open(way, epoch),
            Effect::HangUp => {
                self.link.opened = None;
                Ok(())
            }
            Effect::Serve => self.serve(),
            Effect::EndThreads(fault) => {
                let is_failure = fault.is_some();
                let ended = panics::caught(|| {
                    panics::point(format_args!("ending"));
                    self.end(fault);
                    Ok(())
                });
                // After a failure the following effects are carried out all the same: a guest that may continue here
                // does.
                if is_failure { Ok(()) } else { ended }
            }
            Effect::Call { uri, epoch, until, word } => {
                let (inbox, pass, session) = (&self.inbox, &*self.link.pass, self.link.session);
                let caller = Caller { uri: &uri, session, pass, inbox };
                let called = match word {
                    Word::Goodbye => caller.goodbye(epoch, until, self.memory.landing()),
                    Word::GaveUp(why) => caller.gave_up(epoch, until, &why),
                };
                self.answers.push_back(Input::Called(called));
                Ok(())
            }
            Effect::FreeRest => {
                self.free_rest();
                Ok(())
            }
            Effect::StayAwake => {
                self.awake = idle::stay_awake(self.idle_cores);
                Ok(())
            }
            Effect::Relax => {
                self.awake = None;
                Ok(())
            }
            Effect::Show(what) => {
                self.progress.phase(what);
                Ok(())
            }
            Effect::Tell(event) => {
                match event {
                    Event::Running { downtime, .. } => self.progress.watch().running(downtime),
                    Event::Pass { dirty_bytes, dirty_bytes_per_s, expected_downtime, .. } => {
                        let watch = self.progress.watch();
                        watch.pass_ends(dirty_bytes, dirty_bytes_per_s, expected_downtime);
                    }
                    _ => {}
                }
                self.output.tell(&match self.link.session.is_external() {
                    true => event.left_to_manager(),
                    false => event,
                });
                Ok(())
            }
            Effect::ReportUnrestored { reason } => {
                let is_recorded = self.link.keeper.as_ref().is_some_and(SessionFile::is_written);
                if let Some(command) = self.how_to_resume().filter(|_| is_recorded) {
                    self.output.tell(&Event::Remark(Remark::NotTidied { reason, command }));
                }
                Ok(())
            }
        }
    }

    fn send_state(&mut self, state: &[u8]) {
        let mut bytes = Vec::with_capacity(state.len() + state.len() / 1000 + 64);
        for chunk in state.chunks(STATE_CHUNK_BYTES_MAX) {
            bytes.extend_from_slice(&transmit::device_state_header(chunk.len()));
            bytes.extend_from_slice(chunk);
        }
        transmit::encode(&Frame::Load { state_bytes: state.len() as u64 }, &mut bytes);
        self.command(Command::State(bytes));
    }

    fn send_switchover(&self) {
        let stopped_us = self.core.times().stopped_us();
        self.send(&Frame::Switchover { stopped_us });
    }

    fn say_goodbye(&self, goodbye: Goodbye) {
        let frame = Frame::Complete(self.memory.counters.totals());
        match goodbye {
            Goodbye::Said => self.send(&frame),
            Goodbye::Asked => {
                let mut bytes = Vec::new();
                transmit::encode(&frame, &mut bytes);
                self.command(Command::SendAndPing(bytes, GOODBYE_PING));
            }
        }
    }

    /// Ends the threads of the lanes, and takes their last messages.
    fn take_down(&mut self) -> Result<()> {
        self.link.sockets.sever();
        self.idle.clear();
        self.command(Command::End);
        self.order_bulk(bulk::Order::Stop);
        self.bulk.clear();
        for thread in self.bulk_threads.drain(..).chain(self.demand_thread.take()) {
            let _ = thread.join();
        }
        while let Wake::Message(note) = self.inbox.wait(&[], Some(Duration::ZERO))? {
            let input = self.input(note);
            self.answers.push_back(input);
        }
        self.answers.push_back(Input::LanesDown);
        Ok(())
    }

    /// Serves the lanes that have been opened.
    fn serve(&mut self) -> Result<()> {
        let Some(opened) = self.link.opened.take() else { return Ok(()) };
        let mut lanes = opened.lanes;
        self.link.sockets.replace(&lanes);
        self.idle = lanes.split_off(1);
        let lane = lanes.pop().expect("the demand lane is there");
        self.congestion = lane.congestion.clone().unwrap_or_else(|| "none".into());
        self.digest_as(&lane);
        self.start_demand(lane, opened.receiver)?;
        if let Some(phase) = self.core.phase_name() {
            self.progress.watch().reconnected(phase);
        }
        Ok(())
    }

    fn free_rest(&mut self) {
        match self.release_rest() {
            Ok(bytes) => self.release_bytes = bytes,
            Err(error) => {
                let remark = Remark::NotFreed { reason: error.to_string() };
                self.output.tell(&Event::Remark(remark));
            }
        }
    }
}

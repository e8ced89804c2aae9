//! Drives the core of this side ([`control::destination`](crate::control::destination)): events go in, effects come out
//! and are carried out here.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Instant;

use nix::poll::PollFlags;
use umem_wire::{Frame, LaneRole, transmit};

use super::lanes::demand::Command;
use super::memory::GuestRegion;
use super::session::farewell::{CompletionNotifier, Word};
use super::side::GuestSide;
use super::{InboxMessage, Migration, encoded, ending};
use crate::control::Order;
use crate::control::destination::{
    Effect, Entrance, Exit, FreeSpace, Input, Memory, Moment, Outcome, Process,
};
use crate::error::{Error, Result, lane_name};
use crate::host::monitor::{Answer, Loaded, Question};
use crate::runtime::inbox::Wake;
use crate::runtime::{idle, panics, worker};
use crate::statistics::Completed;
use crate::transport::lane::Listener;

impl Migration<'_> {
    /// Runs until everything has ended. After an error before the switchover the source is notified, so that its guest
    /// continues there.
    pub(super) fn drive(
        mut self,
        side: &mut GuestSide,
    ) -> Result<(Completed, Option<CompletionNotifier>)> {
        let mut watches_guest = true;
        loop {
            match self.outcome.take() {
                None => {
                    // The core decides about the guest after a panic as after any other failure.
                    let turned = panics::caught(|| self.turn(side, &mut watches_guest));
                    if let Err(error) = turned {
                        self.feed(Input::NotDone(error), side);
                    }
                }
                Some(Outcome::Failed(error)) => return Err(error),
                Some(Outcome::Complete { unheard }) => {
                    let farewell = unheard.and_then(|standing| {
                        let word = Word::Complete { standing, landing: self.landing.clone() };
                        Some(CompletionNotifier::new(
                            self.link.leave()?,
                            word,
                            self.keeper.clone()?,
                            None,
                        ))
                    });
                    return Ok((self.report(), farewell));
                }
            }
        }
    }

    /// Ends a migration that has not begun, with this error.
    pub(super) fn give_up(mut self, error: Error, side: &mut GuestSide) -> Error {
        self.feed(Input::Failed(error), side);
        match self.outcome {
            Some(Outcome::Failed(error)) => error,
            _ => unreachable!("the core ends with an error when it is given one"),
        }
    }

    /// Waits for an event and handles it.
    fn turn(&mut self, side: &mut GuestSide, watches_guest: &mut bool) -> Result<()> {
        let has_toucher = self.threads.toucher.is_some();
        let watched = if *watches_guest { side.watched(has_toucher) } else { Vec::new() };
        let of_guest = watched.len();
        let fds: Vec<_> =
            watched.into_iter().map(|fd| (fd, PollFlags::POLLIN)).chain(self.link.fds()).collect();
        let deadlines = self.core.deadline().into_iter().chain(self.link.deadline());
        let due = deadlines.min().map(|at| at.saturating_duration_since(Instant::now()));
        let interval = self.progress.interval();
        panics::point(format_args!("control {}", self.core.phase_name()));
        match self.inbox.wait_for(&fds, Some(due.map_or(interval, |due| due.min(interval))))? {
            Wake::Timeout => {}
            Wake::Signal => self.feed(Input::Interrupt, side),
            Wake::Ready(index) if index >= of_guest => self.link.answer(index - of_guest)?,
            Wake::Ready(index) => {
                if side.has_ended(index)? {
                    *watches_guest = false;
                    let exit = self.exit(side);
                    self.feed(Input::GuestEnded(exit), side);
                }
            }
            Wake::Message(note) => {
                if let Some(input) = self.input(note) {
                    self.feed(input, side);
                }
            }
        }
        if let Some(input) = self.link.look(self.core.refusal()) {
            self.feed(input, side);
        }
        if let Some(why) = self.guest.take_shortage() {
            let free = self.free_space();
            self.feed(Input::ShortOfTables { why, free }, side);
        }
        self.feed(Input::Tick, side);
        self.progress.update();
        Ok(())
    }

    /// Passes an event to the core, and carries out the effects and their results.
    pub(super) fn feed(&mut self, input: Input, side: &mut GuestSide) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let now = self.now();
            for effect in self.core.handle(input, &now) {
                match self.carry_out(effect, side) {
                    Ok(result) => inputs.extend(result),
                    // Later effects are dropped.
                    Err(error) => {
                        inputs.push_front(Input::NotDone(error));
                        break;
                    }
                }
            }
        }
    }

    fn now(&self) -> Moment {
        let counters = &self.guest.counters;
        let memory = Memory {
            pages_missing: self.guest.pages_missing(),
            bytes_missing: self.guest.bytes_missing(),
            pages_done: counters.pages_done.load(SeqCst),
            totals: counters.totals(),
        };
        Moment {
            at: Instant::now(),
            moved_bytes: counters.done_bytes()
                + counters.rounds_bytes.load(Relaxed)
                + counters.state_bytes.load(Relaxed),
            checksum_errors: counters.checksum_errors.load(Relaxed),
            memory,
        }
    }

    /// The core's event for a message; None if the core needs none.
    fn input(&mut self, note: InboxMessage) -> Option<Input> {
        Some(match note {
            InboxMessage::Received(event) => Input::Received(event),
            InboxMessage::AllCached => Input::AllCached,
            InboxMessage::AllReleased => Input::AllReleased,
            InboxMessage::BulkEnded => return None,
            InboxMessage::RoundsEnded => {
                self.rounds_ended += 1;
                return (self.rounds_ended == self.lane_count).then_some(Input::RoundsEnded);
            }
            InboxMessage::Failed(error) => self.failed(error),
            InboxMessage::Quiet => Input::Quiet,
            InboxMessage::Settled => Input::Settled,
            InboxMessage::Pause => {
                self.progress.watch().heard();
                Input::Order(Order::Pause)
            }
            InboxMessage::Resume(uri) => {
                self.progress.watch().heard();
                Input::Order(Order::Resume(uri))
            }
            InboxMessage::Found { order, uri, found } => Input::Found { order, uri, found },
            InboxMessage::Listen(listener) => {
                self.link.offer(super::link::Offer::Listener(listener));
                Input::Offered(Entrance::Listener)
            }
            InboxMessage::Reconnect(sockets) => {
                self.link.offer(super::link::Offer::Connections(sockets));
                Input::Offered(Entrance::Given)
            }
            InboxMessage::Host(Answer::Loaded(Ok(Loaded { runs }))) => Input::Loaded { runs },
            InboxMessage::Host(Answer::Running(Ok(()))) => Input::Running,
            InboxMessage::Host(
                Answer::Prepared(Err(error))
                | Answer::Loaded(Err(error))
                | Answer::Running(Err(error)),
            ) => Input::Failed(error),
            InboxMessage::Host(_) => return None,
        })
    }

    /// The error of a thread that failed.
    fn failed(&self, error: Error) -> Input {
        match error {
            Error::Lost { ref lane, .. } => {
                let is_demand = *lane == lane_name(LaneRole::Demand, 0);
                let lane = if is_demand { LaneRole::Demand } else { LaneRole::Bulk };
                Input::LaneLost { lane, error }
            }
            Error::OutOfMemory(_) => Input::NoRoom { error, free: self.free_space() },
            error => Input::Failed(error),
        }
    }

    fn free_space(&self) -> Option<FreeSpace> {
        let least = self.guest.least_room();
        least.map(|(ram, bytes)| FreeSpace { ram: ram.to_owned(), bytes })
    }

    /// How the guest's process ended. The process has ended, or is about to.
    fn exit(&self, side: &mut GuestSide) -> Exit {
        let has_all = self.guest.pages_missing() == 0 && !self.guest.has_missed();
        // The process's socket and memory may be gone a moment before its exit is visible. The status of a process that
        // is not a child is unknown.
        side.exits_within(ending::EXIT_PATIENCE);
        let status = side.status();
        let has_failed = match status {
            Some(status) => !status.success(),
            None => side.process().is_some_and(|process| process.monitor.is_child()),
        };
        match has_all && !has_failed {
            true => Exit::Fine,
            false => Exit::Failed {
                how: status.map_or_else(String::new, |status| format!(" ({status})")),
            },
        }
    }

    fn process(&self, side: &GuestSide) -> Process {
        let is_there = side.process().is_some() && !side.has_exited() && !self.guest.is_gone();
        match is_there {
            false => Process::Gone,
            true if side.ends_with_us() => Process::EndsWithUs,
            true => Process::Stays,
        }
    }

    /// Carries out one effect. Results go back to the core.
    fn carry_out(&mut self, effect: Effect, side: &mut GuestSide) -> Result<Option<Input>> {
        match effect {
            Effect::Prepare => self.host.ask(Question::Prepare),
            Effect::SettlePages => {
                for (block, stale) in self.guest.stale() {
                    side.empty(block, &stale)?;
                }
                let mut wanted = Vec::new();
                let is_last = self.guest.settle(|page| wanted.push(page))?;
                if !wanted.is_empty() {
                    self.threads.command(Command::Show(wanted));
                }
                if is_last {
                    self.inbox.post().send(InboxMessage::AllCached);
                }
                return Ok(Some(Input::PagesSettled));
            }
            Effect::Load(state) => self.host.ask(Question::Load(state)),
            Effect::RequestPages => self.threads.command(Command::RequestPages),
            Effect::Run => self.host.ask(Question::Run),
            Effect::StayAwake => {
                self.awake = self.awake.take().or_else(|| idle::stay_awake(self.idle_cores));
            }
            Effect::Sleep { downtime } => {
                self.awake = None;
                self.progress.watch().running(downtime);
            }
            Effect::Commit => {
                self.progress.watch().commit("the guest stays at the source")?;
                return Ok(Some(Input::Committed));
            }
            Effect::Persist(record) => match self.write(record) {
                Err(error) if !record.is_vital() => {
                    return Ok(Some(Input::NotWritten { state: record.state(), error }));
                }
                written => written?,
            },
            Effect::WriteAddress(uri) => {
                return Ok(self.write_address(&uri).err().map(Input::AddressNotWritten));
            }
            Effect::Hold => {
                side.hold()?;
                return Ok(Some(Input::Held));
            }
            Effect::Doom => side.doom()?,
            Effect::Keep => side.keep()?,
            // If this fails, the process ends: its side is notified through the same socket.
            Effect::LetWait => drop(side.keep()),
            Effect::TakeUp => {
                self.guest.touch_again()?;
                // From here on the fault threads read the userfaultfds.
                self.guest.wake_all()?;
                return Ok(Some(Input::TakenUp));
            }
            Effect::TouchTheRest => {
                self.threads
                    .toucher
                    .iter()
                    .for_each(crate::destination::memory::touch::Toucher::touch_the_rest);
            }
            Effect::Unregister => {
                self.guest.unregister_all()?;
                let has_ended = self.guest.is_gone() || side.has_exited();
                let exit = has_ended.then(|| self.exit(side));
                let unmapped_bytes = self.guest.unmapped_bytes();
                return Ok(Some(Input::Unregistered { exit, unmapped_bytes }));
            }
            Effect::Free => {
                self.guest.regions.iter().for_each(GuestRegion::end_move);
                side.is_complete();
            }
            Effect::Compare(digests) => self.source_digests = Some(digests),
            Effect::Send(frame) => self.send(&frame),
            Effect::SendCompletion => self.threads.command(Command::Send(self.completion())),
            Effect::Ping(number) => self.threads.command(Command::Ping(number)),
            Effect::Sever => self.sever(),
            Effect::Settle => self.inbox.post().send(InboxMessage::Settled),
            Effect::RollBack => self.guest.roll_back()?,
            Effect::Reconnect { standing, is_complete } => self.reconnect(standing, is_complete)?,
            Effect::DropLanes => self.link.drop_lanes(),
            Effect::LookUp { order, uri } => {
                let (post, named) = (self.inbox.post(), uri.clone());
                let tell = move |found| post.send(InboxMessage::Found { order, uri: named, found });
                return Ok(Listener::look_up(&uri, tell).err().map(Input::NotResumed));
            }
            Effect::Bind { uri, found } => {
                let bound = self.link.bind(&uri, &found, &self.output);
                return Ok(Some(bound.map_or_else(Input::NotResumed, |uri| Input::Bound { uri })));
            }
            Effect::Open => self.link.open(&self.output),
            Effect::Decline => self.link.decline(),
            Effect::ForgetGiven => self.link.forget_given(),
            Effect::MeasureRoom => return Ok(Some(Input::Room(self.free_space()))),
            Effect::Entered(phase) => self.progress.watch().entered(phase),
            Effect::Show(name) => self.progress.phase(name),
            Effect::Report(event) => self.output.tell(&match self.link.is_external() {
                true => event.left_to_manager(),
                false => event,
            }),
            Effect::SeekCause(error) => {
                let error = worker::first_cause(self.inbox, error);
                return Ok(Some(Input::Cause { error, process: self.process(side) }));
            }
            Effect::EndThreads { told, has_failed } => {
                self.end(told.as_ref(), has_failed);
                return Ok(Some(Input::ThreadsEnded));
            }
            Effect::Release => {
                side.release(self.inbox, &self.output)?;
                return Ok(Some(Input::Released));
            }
            Effect::EndGuest => side.end(),
            Effect::Forget => self.forget_session(),
            Effect::Finish(outcome) => self.outcome = Some(outcome),
        }
        Ok(None)
    }

    /// The report once every page is here.
    pub(super) fn completion(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.is_checked && self.digests_are_known {
            transmit::encode(&Frame::Digests(self.guest.digests.get()), &mut bytes);
        }
        transmit::encode(&Frame::Complete(self.guest.counters.totals()), &mut bytes);
        bytes
    }

    fn send(&self, frame: &Frame) {
        self.threads.command(Command::Send(encoded(frame)));
    }
}

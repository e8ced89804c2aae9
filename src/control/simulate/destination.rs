//! The destination's driver in the simulation: it carries out effects on the simulated world, and may be killed between
//! any two.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use umem_wire::destination::Mode;
use umem_wire::{Event as Said, FaultCode, Frame, Standing, Totals};

use super::Random;
use super::threads::{Asked, Bond, Guest, Own, Threads, kills};
use super::world::{CHUNK, Happening, PAGES, World};
use crate::control::destination::farewell::{self, Farewell};
use crate::control::destination::takeover::{Found, Plan, Recalled, plan};
use crate::control::destination::{
    Core, Effect, Entrance, FreeSpace, Input, Memory, Moment, Outcome, Process as After, Record,
    Session, SessionPolicy,
};
use crate::error::{Error, Result};
use crate::events::{Event, Lost, Remark};
use crate::session::DestinationState;

/// How long the driver waits for a source that must learn of the guest's end or completion.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(30);

/// How long that source may then take to close its lanes.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

enum Process {
    Migration(Box<Core>),
    /// The migration is over, and the source may not know.
    Farewell(Farewell, Word),
}

/// The notice for a source that arrives after the end.
#[derive(Debug)]
pub(super) enum Word {
    Complete(Standing),
    Ended(Error),
}

pub(super) struct Destination {
    process: Option<Process>,
    /// The number of processes so far, this one included.
    pub(super) number: u32,
    /// The record on the disk, and below it the state in memory, which the next write replaces as a whole.
    pub(super) record: Option<Recalled>,
    kept: Option<Recalled>,
    pub(super) guest: Guest,
    /// Pages that are cached.
    pub(super) have: BTreeSet<u64>,
    /// The contents of its memory: each page with its version at the source.
    pub(super) contents: BTreeMap<u64, u32>,
    pub(super) threads: Threads,
    pub(super) monitor_busy: Duration,
    /// Lanes on which the source has received the notice.
    pub(super) closing: Option<u32>,
    /// The process is killed after this many effects; further numbers are for the next processes.
    kills: VecDeque<u64>,
    outcome: Option<Outcome>,
    /// Reports that the person has not acted on.
    is_paused: bool,
    /// Another interrupt ends a guest that may be the only one.
    pub(super) is_warned: bool,
    /// The monitor has not answered whether the guest runs.
    awaits_monitor: bool,
    began: Duration,
    /// umem has ended in failure, or a person has interrupted it.
    pub(super) has_failed: bool,
}

impl Destination {
    pub(super) fn new(random: &mut Random) -> Destination {
        Destination {
            process: None,
            number: 1,
            record: None,
            kept: None,
            guest: Guest::new(),
            have: BTreeSet::new(),
            contents: BTreeMap::new(),
            threads: Threads::new(None),
            monitor_busy: Duration::ZERO,
            closing: None,
            kills: kills(random),
            outcome: None,
            is_paused: false,
            is_warned: false,
            awaits_monitor: false,
            began: Duration::ZERO,
            has_failed: false,
        }
    }

    pub(super) fn runs(&self) -> bool {
        self.guest.runs
    }

    pub(super) fn is_alive(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn is_migrating(&self) -> bool {
        matches!(self.process, Some(Process::Migration(_)))
    }

    pub(super) fn has_all(&self) -> bool {
        self.have.len() as u64 == PAGES
    }

    pub(super) fn totals(&self) -> Totals {
        Totals { data_bytes: self.have.len() as u64 * CHUNK, ..Totals::default() }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.process {
            Some(Process::Migration(core)) => core.deadline(),
            Some(Process::Farewell(core, _)) => core.deadline(),
            None => None,
        }
    }

    /// Whether the source answers the notice.
    pub(super) fn has_goodbye_to_hear(&self) -> bool {
        matches!(self.process, Some(Process::Farewell(Farewell::Hearing { .. }, Word::Complete(_))))
    }

    /// Why new lanes are refused.
    pub(super) fn refusal(&self) -> Option<(FaultCode, String)> {
        match &self.process {
            Some(Process::Migration(core)) => {
                core.refusal().map(|(code, text): (_, Cow<'_, str>)| (code, text.into_owned()))
            }
            _ => None,
        }
    }

    /// The source's memory and record are of no use to this side.
    pub(super) fn can_do_alone(&self) -> bool {
        let guest = &self.guest;
        guest.has_died || guest.bond != Bond::Ended && self.has_all() && guest.is_ours
    }

    /// No person has to act: there is no guest, or it runs without umem.
    pub(super) fn is_settled(&self) -> bool {
        let is_whole = self.guest.runs && self.has_all();
        let has_died = self.guest.has_died && self.process.is_none();
        let process = match &self.process {
            None => true,
            // The process stays for its guest, and its record is of no use without a source.
            Some(Process::Farewell(farewell, Word::Complete(_))) => {
                return farewell.deadline().is_none();
            }
            Some(_) => false,
        };
        let record = self.record.is_none_or(|record| {
            matches!(record.state, DestinationState::Complete | DestinationState::Parted)
        });
        process
            && (self.guest.bond == Bond::Ended && self.record.is_none()
                || (is_whole || has_died) && record)
    }

    /// The process is gone, and no process can continue.
    pub(super) fn is_left(&self) -> bool {
        self.process.is_none() && self.record.is_none()
    }

    pub(super) fn describe(&self) -> String {
        let process = match &self.process {
            Some(Process::Migration(core)) => format!("{core:?}"),
            Some(Process::Farewell(core, word)) => format!("{core:?} {word:?}"),
            None => "has ended".into(),
        };
        let Destination { guest, record, have, threads, .. } = self;
        format!("{process}, record {record:?}, {guest:?}, has {have:?}, {threads:?}")
    }

    pub(super) fn take_paused(&mut self) -> bool {
        std::mem::take(&mut self.is_paused)
    }

    /// Whether the process has run for so long that a person asks for its reason.
    pub(super) fn waits_for_its_monitor(&self, now: Duration) -> bool {
        let is_starting = match &self.process {
            Some(Process::Migration(core)) => core.phase_name() == "starting the guest",
            _ => false,
        };
        (is_starting || self.awaits_monitor) && now - self.began > Duration::from_secs(60)
    }
}

impl World {
    fn terms(&self) -> SessionPolicy {
        let session = Session { number: "5e55".into(), directory_option: String::new() };
        SessionPolicy {
            recovers: self.habits.recovers,
            has_bulk_lanes: true,
            is_checked: self.habits.is_checked,
            is_private: self.habits.is_private,
            runs_itself: false,
            is_embedded: false,
            session: self.habits.is_kept.then_some(session),
            step_timeout: Duration::from_secs(30),
        }
    }

    /// The lanes are open, and the destination compares regions.
    pub(super) fn start_destination(&mut self, link: u32) {
        let core = Core::new(self.terms(), Some(Entrance::Listener), self.instant());
        self.destination.threads = Threads::new(Some(link));
        self.destination.threads.is_in_rounds = self.habits.rounds.is_some();
        self.destination.process = Some(Process::Migration(Box::new(core)));
    }

    pub(super) fn destination_moment(&self) -> Moment {
        let destination = &self.destination;
        let pages_done = destination.have.len() as u64;
        let pages_missing = PAGES - pages_done;
        let memory = Memory {
            pages_missing,
            bytes_missing: pages_missing * CHUNK,
            pages_done,
            totals: destination.totals(),
        };
        let moved_bytes = self.moved_bytes();
        Moment { at: self.instant(), moved_bytes, checksum_errors: 0, memory }
    }

    /// Hands an input in, carries out the effects, and then checks the clock.
    pub(super) fn tell_destination(&mut self, input: Input) {
        self.feed_destination(input);
        self.feed_destination(Input::Tick);
    }

    fn feed_destination(&mut self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let now = self.destination_moment();
            if !matches!(input, Input::Tick) {
                self.note(format_args!("destination hears {input:?}"));
            }
            let Some(Process::Migration(core)) = &mut self.destination.process else { return };
            for effect in core.handle(input, &now) {
                if self.is_destination_killed() {
                    return self.kill_destination();
                }
                self.note(format_args!("destination: {effect:?}"));
                match self.carry_out_there(effect) {
                    Ok(result) => inputs.extend(result),
                    Err(error) => {
                        inputs.push_front(Input::NotDone(error));
                        break;
                    }
                }
            }
        }
        if let Some(outcome) = self.destination.outcome.take() {
            self.destination_ends(&outcome);
        }
    }

    fn is_destination_killed(&mut self) -> bool {
        if self.is_well() {
            return false;
        }
        match self.destination.kills.front_mut() {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    fn write(&mut self, record: Record) -> Result<()> {
        if !self.habits.is_kept {
            return Ok(());
        }
        let kept = self.destination.kept.get_or_insert(Recalled {
            state: DestinationState::Loaded,
            mode: Mode { postcopy: true, background: true },
            stopped_us: 0,
            switched: None,
            running: None,
        });
        kept.state = record.state();
        let has_ended = self.destination.guest.bond == Bond::Ended && self.destination.number == 1;
        if has_ended && matches!(record, Record::Complete { .. }) {
            self.violated("a guest is complete whose process has ended");
        }
        let Some(kept) = &mut self.destination.kept else { return Ok(()) };
        match record {
            Record::Loaded { mode, .. } => kept.mode = mode,
            Record::Switched { stopped_us, at } => {
                (kept.stopped_us, kept.switched) = (stopped_us, Some(at));
            }
            Record::Running { at } => kept.running = Some(at),
            Record::Complete { .. } | Record::Parted => {}
        }
        if matches!(record, Record::Switched { .. } | Record::Running { .. }) {
            self.destination.guest.noted = Some(*kept);
        }
        if !self.is_well() && self.random.percent(self.habits.disk) {
            return Err(Error::Host("no space".into()));
        }
        self.destination.record = self.destination.kept;
        Ok(())
    }

    fn carry_out_there(&mut self, effect: Effect) -> Result<Option<Input>> {
        match effect {
            Effect::Prepare => self.ask_destination(Asked::Prepare),
            Effect::SettlePages => return self.settles_pages().map(Some),
            Effect::Load(_) => self.ask_destination(Asked::Load),
            Effect::Run => self.ask_destination(Asked::Run),
            Effect::Commit if self.habits.cancels_there && self.destination.number == 1 => {
                return Err(Error::Interrupted("the guest stays at the source".into()));
            }
            Effect::Commit => return Ok(Some(Input::Committed)),
            Effect::Persist(record) => match self.write(record) {
                Err(error) if !record.is_vital() => {
                    return Ok(Some(Input::NotWritten { state: record.state(), error }));
                }
                written => written?,
            },
            Effect::Hold => {
                self.binds(Bond::Held);
                return Ok(Some(Input::Held));
            }
            Effect::Doom => self.binds(Bond::Held),
            Effect::Keep => {
                self.binds(Bond::Kept);
                self.destination.guest.is_ours = true;
            }
            Effect::LetWait => self.binds(Bond::Kept),
            Effect::TakeUp => {
                self.roll_back();
                return Ok(Some(Input::TakenUp));
            }
            Effect::TouchTheRest => self.post(Input::AllReleased),
            Effect::Unregister => {
                let has_ended = self.destination.guest.bond == Bond::Ended;
                let exit = has_ended.then(|| self.exit());
                return Ok(Some(Input::Unregistered { exit, unmapped_bytes: 0 }));
            }
            Effect::Free => self.binds(Bond::Kept),
            Effect::Send(frame) => {
                let said = self.said(frame);
                self.reply(said);
            }
            Effect::SendCompletion => {
                if let Some(link) = self.destination.threads.demand {
                    self.say_complete(link);
                }
            }
            Effect::Ping(number) => self.reply(Said::Ping(number)),
            Effect::Sever => self.sever(),
            Effect::Settle => self.post(Input::Settled),
            Effect::RollBack => self.roll_back(),
            Effect::Reconnect { standing, is_complete } => self.reconnect(standing, is_complete),
            Effect::DropLanes => self.drop_arrived(),
            Effect::MeasureRoom => {
                let is_short = !self.is_well() && self.random.percent(50);
                let free = is_short.then(|| FreeSpace { ram: "ram0".into(), bytes: 0 });
                return Ok(Some(Input::Room(free)));
            }
            Effect::Report(event) => self.destination_reports(&event),
            Effect::SeekCause(error) => {
                let error = self.destination.threads.first_cause(error);
                let process = match self.destination.guest.bond {
                    Bond::Ended => After::Gone,
                    Bond::Bound | Bond::Held => After::EndsWithUs,
                    Bond::Kept | Bond::Released => After::Stays,
                };
                return Ok(Some(Input::Cause { error, process }));
            }
            Effect::EndThreads { told, .. } => {
                if let Some(fault) = told {
                    self.reply(Said::Error(fault));
                }
                self.end_destination_threads(true);
                return Ok(Some(Input::ThreadsEnded));
            }
            Effect::Release => {
                self.binds(Bond::Released);
                return Ok(Some(Input::Released));
            }
            Effect::EndGuest => {
                let guest = &mut self.destination.guest;
                if matches!(guest.bond, Bond::Bound | Bond::Held) {
                    guest.ends();
                }
            }
            Effect::Forget => self.forget_there(),
            Effect::Finish(outcome) => self.destination.outcome = Some(outcome),
            Effect::StayAwake
            | Effect::RequestPages
            | Effect::Sleep { .. }
            | Effect::Compare(_)
            | Effect::LookUp { .. }
            | Effect::Bind { .. }
            | Effect::Open
            | Effect::Decline
            | Effect::ForgetGiven
            | Effect::WriteAddress(_)
            | Effect::Entered(_)
            | Effect::Show(_) => {}
        }
        Ok(None)
    }

    /// The guest's process, if there is one, ends no sooner than this bond.
    fn binds(&mut self, bond: Bond) {
        let guest = &mut self.destination.guest;
        if guest.bond != Bond::Ended {
            guest.bond = bond;
        }
    }

    fn destination_reports(&mut self, event: &Event) {
        match event {
            Event::Paused { .. } => self.destination.is_paused = true,
            Event::Resumed { .. } => {
                (self.destination.is_paused, self.destination.is_warned) = (false, false);
            }
            Event::Remark(Remark::InterruptAgainHere { lost: Lost::Owner }) => {
                self.destination.is_warned = true;
            }
            Event::Remark(Remark::AwaitsCont { .. }) => self.destination.awaits_monitor = true,
            _ => {}
        }
    }

    /// Removes the record: no takeover is needed any more.
    fn forget_there(&mut self) {
        self.destination.record = None;
        if self.destination.guest.bond != Bond::Ended && !self.destination.can_do_alone() {
            self.violated("the destination's session is forgotten, and its guest waits for it");
        }
    }

    fn destination_ends(&mut self, outcome: &Outcome) {
        self.note(format_args!("destination has ended: {outcome:?}"));
        self.destination.process = None;
        self.destination.guest.outlives(false);
        match outcome {
            // A later process does not stay for the source.
            Outcome::Complete { unheard: Some(standing) } if self.destination.number == 1 => {
                self.says_farewell(None, Word::Complete(*standing));
            }
            Outcome::Complete { .. } => {}
            Outcome::Failed(_) => {
                self.destination.has_failed = true;
                if self.random.percent(50) {
                    self.soon(Happening::StartDestination);
                }
            }
        }
    }

    fn says_farewell(&mut self, until: Option<Instant>, word: Word) {
        self.destination.process = Some(Process::Farewell(Farewell::new(until), word));
    }

    pub(super) fn kill_destination(&mut self) {
        if !self.destination.is_alive() {
            return;
        }
        self.note(format_args!("destination is killed"));
        self.killed();
        self.destination.kills.pop_front();
        self.destination.process = None;
        self.destination.outcome = None;
        self.destination.guest.outlives(true);
        let sends_rest = self.random.percent(70);
        self.destination.threads.forget_question();
        self.end_destination_threads(sends_rest);
        if let Some(link) = self.destination.closing.take() {
            self.destination_hangs_up(link, sends_rest);
        }
        let at = self.now + self.random.millis(13);
        self.at(at, Happening::StartDestination);
    }

    /// The person starts umem again with `--resume`.
    pub(super) fn resume_destination(&mut self) {
        if self.destination.is_alive() {
            return;
        }
        let Some(recalled) = self.destination.record else { return };
        let bond = self.destination.guest.bond;
        self.note(format_args!("destination is resumed: {:?}, {bond:?}", recalled.state));
        self.destination.number += 1;
        self.destination.began = self.now;
        self.destination.threads = Threads::new(None);
        self.destination.kept = Some(recalled);
        (self.destination.is_paused, self.destination.is_warned) = (false, false);
        self.destination.awaits_monitor = false;
        let found = match bond {
            Bond::Ended => Found::Ended,
            Bond::Released => Found::Complete,
            Bond::Bound | Bond::Held | Bond::Kept => Found::Waiting(()),
        };
        let until = Some(self.instant() + FAREWELL_PATIENCE);
        match plan(recalled.state, found) {
            Plan::Serve(()) => {
                let noted = self.destination.guest.noted;
                let recalled =
                    noted.filter(|noted| noted.state > recalled.state).unwrap_or(recalled);
                self.destination.kept = Some(recalled);
                // The guest's process is no child of this one, so it ends only when it is told to.
                self.binds(Bond::Kept);
                let core = Core::recalled(self.terms(), &recalled, self.instant());
                self.destination.process = Some(Process::Migration(Box::new(core)));
                self.tell_destination(Input::TakeOver);
            }
            Plan::Release(()) => {
                self.binds(Bond::Released);
                self.forget_there();
            }
            Plan::Nothing => self.forget_there(),
            Plan::TellOfCompletion => {
                let totals = self.destination.totals();
                self.says_farewell(until, Word::Complete(recalled.standing(totals)));
            }
            Plan::TellOfEnd => {
                let error = Error::Ended("the guest's process ended".into());
                self.says_farewell(until, Word::Ended(error));
            }
        }
    }

    /// Time has passed for the destination.
    pub(super) fn destination_looks(&mut self) {
        match self.destination.process {
            Some(Process::Migration(_)) => self.feed_destination(Input::Tick),
            Some(Process::Farewell(..)) => self.tell_farewell(farewell::Input::Tick),
            None => {}
        }
    }

    pub(super) fn interrupt_destination(&mut self) {
        self.note(format_args!("somebody interrupts the destination"));
        match self.destination.process {
            Some(Process::Migration(_)) => self.tell_destination(Input::Interrupt),
            Some(Process::Farewell(..)) => self.tell_farewell(farewell::Input::Interrupt),
            None => {}
        }
    }

    pub(super) fn tell_farewell(&mut self, input: farewell::Input) {
        let mut next = Some(input);
        while let Some(input) = next.take() {
            let now = self.instant();
            let Some(Process::Farewell(core, _)) = &mut self.destination.process else { return };
            let effects = core.handle(input, now);
            let outcome = core.outcome();
            for effect in effects {
                if self.is_destination_killed() {
                    return self.kill_destination();
                }
                self.note(format_args!("destination: {effect:?}"));
                next = self.carry_out_farewell(effect);
            }
            if let Some(is_told) = outcome {
                return self.farewell_ends(is_told);
            }
        }
    }

    fn carry_out_farewell(&mut self, effect: farewell::Effect) -> Option<farewell::Input> {
        match effect {
            farewell::Effect::Tell => {
                let Some(Process::Farewell(core, word)) = self.destination.process.take() else {
                    return None;
                };
                let told = self.tell_word(&word);
                self.destination.process = Some(Process::Farewell(core, word));
                return Some(told);
            }
            farewell::Effect::Hear => {
                let (process, link) = (self.destination.number, self.destination.closing?);
                let what = Own::HasClosed { link };
                self.at(self.now + CLOSE_PATIENCE, Happening::Destination { process, what });
            }
            farewell::Effect::Forget => self.destination.record = None,
            farewell::Effect::Answer => {}
        }
        None
    }

    fn farewell_ends(&mut self, is_told: bool) {
        let process = self.destination.process.take();
        self.note(format_args!("destination has ended, and the source knows: {is_told}"));
        self.drop_arrived();
        if let Some(Process::Farewell(_, Word::Ended(_))) = process {
            // A report asks the person to end the source.
            self.destination.record = None;
        }
    }
}

/// The source's input for a frame.
impl World {
    fn said(&self, frame: Frame) -> Said {
        match frame {
            Frame::Ready(_) => Said::Ready(self.table()),
            Frame::Loaded => Said::Loaded,
            Frame::Settled => Said::Settled,
            Frame::Running { us_since_switchover } => Said::Running { us_since_switchover },
            Frame::Error(fault) => Said::Error(fault),
            other => unreachable!("{other:?} of a destination"),
        }
    }
}

//! The source's driver in the simulation: it carries out effects on the simulated world, and may be killed between any
//! two.

mod left;
mod opening;

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use umem_wire::{Fault as Reason, Frame, Totals};

use super::threads::kills;
use super::world::{CHUNK, Happening, Lane, PAGES, Sent, TOTAL_BYTES, World};
use super::{Fault, Random};
use crate::control::Moment;
use crate::control::source::closing::GOODBYE_PING;
use crate::control::source::leftover::{self, Knocked, Leftover};
use crate::control::source::{
    Effect, Goodbye, Guest, Heard, Input, Kept, Left, Opened, Outcome, Plan, Question, Record,
    Source,
};
use crate::error::{Error, Result};
use crate::events::Event;
use crate::transport::uri::Uri;

pub(super) use opening::Opening;

/// The record on the disk.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    state: State,
    epoch: u32,
    heard: Heard,
    background: bool,
    stopped: Option<Instant>,
    switched: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Stopped,
    Committed,
    Completed,
}

enum Process {
    Migration(Box<Source>),
    Leftover(Box<Leftover>),
}

pub(super) struct SourceSide {
    process: Option<Process>,
    /// The number of processes so far, this one included.
    number: u32,
    /// The record on the disk, and below it the state in memory, which the next write replaces as a whole.
    pub(super) record: Option<Disk>,
    kept: Option<Disk>,
    pub(super) link: Option<u32>,
    /// Opened lanes that are not served yet.
    opened: Option<u32>,
    /// The attempt that the driver waits for, and messages that arrive meanwhile.
    pub(super) opening: Option<Opening>,
    attempts: u32,
    notes: VecDeque<Input>,
    answers: VecDeque<Input>,
    /// For deliberate faults: an effect that is delayed, and an effect that comes next.
    held: Option<Effect>,
    late: Option<Effect>,
    /// Pages that count as sent.
    pub(super) sent: BTreeSet<u64>,
    /// The memory is still here.
    has_memory: bool,
    /// The process is killed after this many effects; further numbers are for the next processes.
    kills: VecDeque<u64>,
    /// Reports that the person has not acted on.
    is_paused: bool,
    pub(super) is_by_hand: bool,
    /// The same, if a record may help.
    can_be_by_hand: bool,
    /// A process has ended without the guest.
    pub(super) has_left: bool,
    /// Connections to the destination are refused, as umem has reported.
    pub(super) is_told_of_silence: bool,
    began: Duration,
    /// Whether the person once takes a live destination for gone, and whether that happens now.
    is_mistaken: bool,
    mistakes: bool,
}

impl SourceSide {
    pub(super) fn new(random: &mut Random, is_mistaken: bool) -> SourceSide {
        SourceSide {
            process: None,
            number: 0,
            record: None,
            kept: None,
            link: None,
            opened: None,
            opening: None,
            attempts: 0,
            notes: VecDeque::new(),
            answers: VecDeque::new(),
            held: None,
            late: None,
            sent: BTreeSet::new(),
            has_memory: true,
            kills: kills(random),
            is_paused: false,
            is_by_hand: false,
            can_be_by_hand: false,
            has_left: false,
            is_told_of_silence: false,
            began: Duration::ZERO,
            is_mistaken,
            mistakes: false,
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn is(&self, process: u32) -> bool {
        self.is_alive() && self.number == process
    }

    pub(super) fn process_number(&self) -> u32 {
        self.number
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.process {
            Some(Process::Migration(core)) => core.deadline(),
            Some(Process::Leftover(core)) => core.deadline(),
            None => None,
        }
    }

    pub(super) fn describe(&self) -> String {
        match &self.process {
            Some(Process::Migration(core)) => format!("{core:?}"),
            Some(Process::Leftover(core)) => format!("{core:?}"),
            None => "has ended".into(),
        }
    }

    pub(super) fn is_opening(&self, attempt: u32) -> bool {
        self.opening.as_ref().is_some_and(|opening| opening.attempt == attempt)
    }

    /// Whether the guest may have been given away, as far as the record shows.
    pub(super) fn may_have_given_its_guest_away(&self) -> bool {
        self.record.as_ref().is_some_and(|disk| disk.state == State::Committed)
    }

    pub(super) fn take_paused(&mut self) -> bool {
        std::mem::take(&mut self.is_paused)
    }

    /// Whether the person takes the destination of a guest that may have been given away for gone, by mistake.
    pub(super) fn takes_for_gone(&mut self) -> bool {
        self.may_have_given_its_guest_away() && std::mem::take(&mut self.is_mistaken)
    }

    pub(super) fn take_by_hand(&mut self) -> bool {
        std::mem::take(&mut self.is_by_hand)
    }

    /// Whether the process has run for so long that a person asks for its reason.
    pub(super) fn waits_for_a_person(&self, now: Duration) -> bool {
        self.is_alive() && now - self.began > Duration::from_secs(60)
    }

    /// The monitor records the settings to undo, before it stops the guest.
    pub(super) fn stops(&mut self, is_kept: bool) {
        if is_kept {
            self.kept = Some(Disk {
                state: State::Stopped,
                epoch: 0,
                heard: Heard::default(),
                background: true,
                stopped: None,
                switched: None,
            });
            self.record.clone_from(&self.kept);
        }
    }

    /// These lanes are open, and the destination has reported its pages.
    pub(super) fn opened(&mut self, link: u32, have: &BTreeSet<u64>) {
        self.opened = Some(link);
        self.sent.clone_from(have);
    }
}

impl World {
    fn source_plan(&self) -> Plan {
        let kept = Kept { session: "5e55".into(), directory_option: String::new() };
        Plan {
            postcopy: self.habits.postcopy,
            rounds: self.habits.rounds.as_ref().map(|rounds| rounds.plan),
            bulk_lanes: 1,
            recovers: self.habits.recovers,
            kept: self.habits.is_kept.then_some(kept),
            is_checked: self.habits.is_checked,
            is_embedded: false,
            total_bytes: TOTAL_BYTES,
            step_timeout: Duration::from_secs(30),
            seed: self.source.number.into(),
        }
    }

    fn uri() -> Uri {
        Uri::Tcp { host: "host".into(), port: 1 }
    }

    pub(super) fn start_source(&mut self, link: u32) {
        let core = Source::new(
            self.source_plan(),
            Some(World::uri()),
            self.habits.background,
            self.instant(),
        );
        self.source.number = 1;
        self.source.link = Some(link);
        self.source.process = Some(Process::Migration(Box::new(core)));
        self.tell_source(Input::Begin);
    }

    /// The person starts umem again with `--resume`.
    pub(super) fn resume_source(&mut self) {
        if self.source.is_alive() {
            return;
        }
        let Some(disk) = self.source.record.clone() else { return };
        self.note(format_args!("source is resumed: {disk:?}"));
        self.source.number += 1;
        self.source.began = self.now;
        self.source.kept = Some(disk.clone());
        self.source.sent = (0..PAGES).collect();
        let (session, uri) = ("5e55".to_owned(), World::uri());
        let now = self.instant();
        let mut first = Input::Begin;
        self.source.process = Some(match disk.state {
            State::Stopped => {
                Process::Leftover(Box::new(Leftover::stopped(session, uri, disk.epoch)))
            }
            State::Completed => {
                Process::Leftover(Box::new(Leftover::completed(session, uri, disk.epoch, now)))
            }
            State::Committed => {
                let left = Left {
                    epoch: disk.epoch,
                    heard: disk.heard,
                    stopped: disk.stopped.unwrap_or(now),
                    switched: disk.switched.unwrap_or(now),
                };
                let plan = self.source_plan();
                let core = Source::taken_over(plan, Some(uri), disk.background, left, now);
                first = Input::TakeOver;
                Process::Migration(Box::new(core))
            }
        });
        self.tell_source(first);
    }

    /// Hands an input in, and carries out the effects, until the source waits, has ended, or is killed.
    pub(super) fn tell_source(&mut self, input: Input) {
        match &self.source.process {
            Some(Process::Migration(_)) => self.run_source(input),
            Some(Process::Leftover(_)) => match input {
                Input::Begin => self.run_leftover(leftover::Input::Begin),
                Input::Time => self.run_leftover(leftover::Input::Time),
                Input::Called(called) => self.run_leftover(leftover::Input::Called(called)),
                Input::Opened(Opened::NotNow(error)) => {
                    let knocked = Knocked::NotOpened(error);
                    self.run_leftover(leftover::Input::Knocked(knocked));
                }
                Input::Interrupted => {
                    let error = Error::Interrupted("no destination is notified".into());
                    self.run_leftover(leftover::Input::NotDone(error));
                }
                _ => {}
            },
            None => {}
        }
    }

    fn run_source(&mut self, input: Input) {
        self.source.answers.push_front(input);
        while let Some(input) = self.source.answers.pop_front() {
            let now = self.moment();
            let Some(Process::Migration(core)) = &mut self.source.process else { return };
            let mut effects: VecDeque<Effect> = core.handle(input, &now).collect();
            while let Some(effect) = effects.pop_front() {
                if self.is_killed() {
                    return self.kill_source();
                }
                let Some(effect) = self.with_fault(effect) else { continue };
                self.note(format_args!("source: {effect:?}"));
                if let Err(error) = self.carry_out(effect) {
                    self.source.answers.push_front(Input::NotDone(error));
                    break;
                }
                if let Some(late) = self.source.late.take() {
                    effects.push_front(late);
                }
            }
        }
        self.end_source();
    }

    fn end_source(&mut self) {
        let Some(Process::Migration(core)) = &mut self.source.process else { return };
        if !core.has_ended() {
            return;
        }
        let outcome = core.take_outcome();
        self.source.process = None;
        for link in [self.source.link.take(), self.source.opened.take()].into_iter().flatten() {
            self.source_hangs_up(link, true);
        }
        self.note(format_args!("source has ended: {outcome:?}"));
        self.drops_log();
        match outcome {
            Some(Outcome::Failed { guest: Guest::Stopped(_) | Guest::Asked, .. })
                if !self.memory.has_been_stopped() && self.source.number == 1 =>
            {
                self.violated("a guest that was never stopped is said to stand still");
            }
            Some(Outcome::Completed(_)) if self.source.record.is_some() => {
                self.violated("a record is left of a session that is complete");
            }
            // The error asks the user to resume the guest, unless there is a record to resume.
            Some(Outcome::Failed { guest: Guest::Stopped(_) | Guest::Asked, .. }) => {
                self.source.is_by_hand = self.source.record.is_none();
                self.source.can_be_by_hand = true;
            }
            Some(Outcome::Failed { guest: Guest::Away | Guest::Complete, .. }) => {
                self.source.has_left = true;
            }
            _ => {}
        }
    }

    fn moment(&self) -> Moment {
        let moved_bytes = self.source.sent.len() as u64 * CHUNK + self.memory.rounds_bytes;
        Moment { at: self.instant(), moved_bytes, checksum_errors: 0, memory: () }
    }

    /// The effect as a driver with this fault carries it out.
    fn with_fault(&mut self, effect: Effect) -> Option<Effect> {
        match (self.fault, effect) {
            (Fault::GoodbyeBeforeRecord, effect @ Effect::Persist(Record::Completed))
            | (Fault::SwitchoverBeforeRecord, effect @ Effect::Persist(Record::Committed { .. })) =>
            {
                self.source.held = Some(effect);
                None
            }
            (_, effect @ (Effect::Switchover | Effect::Goodbye(_))) => {
                self.source.late = self.source.held.take();
                Some(effect)
            }
            (Fault::ForgetsEarly, Effect::Ask(Question::Resume)) => {
                self.source.record = None;
                Some(Effect::Ask(Question::Resume))
            }
            (Fault::ResumesAlways, Effect::EndThreads(Some(fault))) => {
                self.runs_here = true;
                Some(Effect::EndThreads(Some(fault)))
            }
            (_, effect) => Some(effect),
        }
    }

    fn is_killed(&mut self) -> bool {
        if self.is_well() || !self.habits.is_kept && self.source.record.is_none() && self.runs_here
        {
            return false;
        }
        match self.source.kills.front_mut() {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    fn kill_source(&mut self) {
        self.note(format_args!("source is killed"));
        self.killed();
        self.drops_log();
        self.source.kills.pop_front();
        self.source.process = None;
        self.source.answers.clear();
        self.source.notes.clear();
        let opening = self.source.opening.take().and_then(|opening| opening.link);
        (self.source.held, self.source.late) = (None, None);
        let sends_rest = self.random.percent(70);
        for link in
            [self.source.link.take(), self.source.opened.take(), opening].into_iter().flatten()
        {
            self.source_hangs_up(link, sends_rest);
        }
        let at = self.now + self.random.millis(13);
        self.at(at, Happening::StartSource);
    }

    fn carry_out(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Persist(record) => {
                let fails = !self.is_well() && self.random.percent(self.habits.disk);
                self.persist(&record, fails);
                if fails && record.is_vital() {
                    return Err(Error::Host("no space".into()));
                }
            }
            Effect::Forget => {
                self.forgets_changes();
                self.forget();
            }
            Effect::Commit if self.habits.cancels && self.source.number == 1 => {
                return Err(Error::Interrupted("the guest continues at the source".into()));
            }
            Effect::Commit => self.source.answers.push_back(Input::Committed),
            Effect::Ask(question) => {
                self.is_asked(question);
                self.ask(question);
            }
            Effect::SendRegions => self.send_frame(Frame::Regions(self.table())),
            Effect::Send(frame) => self.send_frame(frame),
            Effect::SendState(_) => {
                self.send_on(Lane::Demand, Sent::State);
                self.note_soon(Input::StateLeft);
            }
            Effect::Switchover => self.send_frame(Frame::Switchover { stopped_us: 1 }),
            Effect::Goodbye(goodbye) => {
                self.send_frame(Frame::Complete(Totals::default()));
                if goodbye == Goodbye::Asked {
                    self.send_frame(Frame::Ping(GOODBYE_PING));
                }
            }
            Effect::Ping(number) => self.send_frame(Frame::Ping(number)),
            Effect::SendBulk => self.send_pages(),
            Effect::SendPass => self.begins_pass(),
            Effect::CutPass => self.cuts_pass(),
            Effect::CountDirty => self.source.answers.push_back(self.memory.counted()),
            Effect::EndRounds => self.ends_rounds(),
            Effect::Digest => {
                let process = self.source.number;
                let at = self.now + self.random.millis(12);
                self.at(at, Happening::Digested { process });
            }
            Effect::TakeDown => {
                if let Some(link) = self.source.link.take() {
                    self.source_hangs_up(link, false);
                }
                self.source.answers.push_back(Input::LanesDown);
            }
            Effect::Open { epoch, .. } => self.dials(epoch, None),
            Effect::HangUp => {
                if let Some(link) = self.source.opened.take() {
                    self.source_hangs_up(link, false);
                }
            }
            Effect::Serve => self.source.link = self.source.opened.take(),
            Effect::EndThreads(fault) => self.end_threads(fault),
            Effect::Call { epoch, word, .. } => self.dials(epoch, Some(word)),
            Effect::FreeRest => self.free(),
            Effect::Tell(event) => self.is_told(&event),
            Effect::CheckFiles { .. }
                if !self.is_well() && self.random.percent(self.habits.disk) =>
            {
                let (name, path) = ("ram0".into(), "/dev/shm/ram0".into());
                return Err(Error::RamFailed { name, path, what: "has changed".into() });
            }
            Effect::Land(_) => self.memory.is_all_dirty(),
            Effect::Fix
            | Effect::StartRelease
            | Effect::EndRelease
            | Effect::CheckFiles { .. }
            | Effect::StayAwake
            | Effect::Relax
            | Effect::Show(_)
            | Effect::ReportUnrestored { .. } => {}
        }
        Ok(())
    }

    fn is_told(&mut self, event: &Event) {
        match event {
            Event::Paused { .. } => self.source.is_paused = true,
            Event::Unanswered(_) => self.source.is_told_of_silence = true,
            Event::Resumed { .. } => {
                (self.source.is_paused, self.source.is_told_of_silence) = (false, false);
            }
            _ => {}
        }
    }

    fn persist(&mut self, record: &Record, fails: bool) {
        // No record is written for a session that has ended or that no process can take over.
        let Some(disk) = self.source.kept.as_mut().filter(|_| self.source.record.is_some()) else {
            return;
        };
        match record {
            Record::Committed { background, times } => {
                disk.state = State::Committed;
                disk.background = *background;
                (disk.stopped, disk.switched) = (times.stopped, times.switched);
            }
            Record::Stopped => disk.state = State::Stopped,
            Record::Completed => disk.state = State::Completed,
            Record::Epoch { epoch, .. } => disk.epoch = *epoch,
            Record::Heard(heard) => disk.heard = *heard,
            Record::FileFailed => {}
        }
        if !fails {
            self.source.record.clone_from(&self.source.kept);
        }
    }

    /// Removes the record: no process may need this side any more.
    fn forget(&mut self) {
        self.source.record = None;
        let is_needed = self.habits.is_kept && !self.destination.can_do_alone();
        if !self.runs_or_will() && is_needed {
            self.violated("the session is forgotten, and the guest needs it");
        }
    }

    fn free(&mut self) {
        self.source.has_memory = false;
        if !self.destination.can_do_alone() {
            self.violated("memory is freed that the guest needs");
        }
    }

    pub(super) fn send_on(&mut self, lane: Lane, sent: Sent) {
        if let Some(link) = self.source.link {
            self.send(link, lane, sent);
        }
    }

    pub(super) fn send_frame(&mut self, frame: Frame) {
        self.send_on(Lane::Demand, Sent::Frame(frame));
    }

    fn send_pages(&mut self) {
        let missing: Vec<u64> =
            (0..PAGES).filter(|page| !self.source.sent.contains(page)).collect();
        for page in missing {
            self.source.sent.insert(page);
            let sent = self.memory.read(page);
            self.send_on(Lane::Bulk, sent);
        }
        self.note_soon(Input::BulkEnded);
    }

    pub(super) fn note_soon(&mut self, input: Input) {
        if let Some(link) = self.source.link {
            let process = self.source.number;
            self.soon(Happening::Note { process, link, input });
        }
    }

    fn end_threads(&mut self, fault: Option<Reason>) {
        let Some(link) = self.source.link else { return };
        if let Some(fault) = fault {
            self.send_frame(Frame::Error(fault));
        }
        self.source.link = None;
        self.source_hangs_up(link, true);
    }
}

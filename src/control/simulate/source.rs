//! The source's driver of the simulation: it carries effects out on the world, and may be killed between any two.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use umem_wire::{Event as Said, Fault as Reason, Frame, Totals};

use super::world::{Happening, Lane, PAGES, Sent, TOTAL_BYTES, World};
use super::{Fault, Random};
use crate::control::Moment;
use crate::control::event::{Event, Undone};
use crate::control::source::closing::GOODBYE_PING;
use crate::control::source::leftover::{self, Leftover};
use crate::control::source::{
    Effect, Goodbye, Guest, Heard, Input, Kept, Left, Outcome, Plan, Question, Record, Source,
};
use crate::error::{Error, Result};
use crate::uri::Uri;

/// What lies on the disk.
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
    /// Of this process, and of all before it.
    number: u32,
    pub(super) record: Option<Disk>,
    pub(super) link: Option<u32>,
    /// Lanes that have been opened and are not served yet.
    opened: Option<u32>,
    answers: VecDeque<Input>,
    leftover_answer: Option<leftover::Input>,
    /// Where a fault is put in: what comes after something else, and what comes next.
    held: Option<Effect>,
    late: Option<Effect>,
    /// Pages that have been sent, as far as is known.
    sent: BTreeSet<u64>,
    /// The memory is still here.
    has_memory: bool,
    /// After so many effects the process is killed; of the next processes, too.
    kills: VecDeque<u64>,
    /// What a person has been told, and has not acted on.
    is_paused: bool,
    pub(super) is_by_hand: bool,
    /// A process has ended without the guest.
    pub(super) has_left: bool,
    began: Duration,
}

impl SourceSide {
    pub(super) fn new(random: &mut Random) -> SourceSide {
        let count = [0, 0, 1, 1, 2, 3][random.below(6) as usize];
        SourceSide {
            process: None,
            number: 0,
            record: None,
            link: None,
            opened: None,
            answers: VecDeque::new(),
            leftover_answer: None,
            held: None,
            late: None,
            sent: BTreeSet::new(),
            has_memory: true,
            kills: (0..count).map(|_| random.below(60)).collect(),
            is_paused: false,
            is_by_hand: false,
            has_left: false,
            began: Duration::ZERO,
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

    pub(super) fn take_paused(&mut self) -> bool {
        std::mem::take(&mut self.is_paused)
    }

    pub(super) fn take_by_hand(&mut self) -> bool {
        std::mem::take(&mut self.is_by_hand)
    }

    /// It has gone on for so long that a person asks what it waits for.
    pub(super) fn waits_for_a_person(&self, now: Duration) -> bool {
        self.is_alive() && now - self.began > Duration::from_secs(60)
    }

    /// The monitor writes down what it has to undo, before it stops the guest.
    pub(super) fn stops(&mut self, is_kept: bool) {
        if is_kept {
            self.record = Some(Disk {
                state: State::Stopped,
                epoch: 0,
                heard: Heard::default(),
                background: true,
                stopped: None,
                switched: None,
            });
        }
    }

    /// These lanes are open, and the destination has said what it has.
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
            rounds: None,
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
        self.run_source();
    }

    /// Somebody starts umem again with `--resume`.
    pub(super) fn resume_source(&mut self) {
        if self.source.is_alive() {
            return;
        }
        let Some(disk) = self.source.record.clone() else { return };
        self.note(format_args!("source is resumed: {disk:?}"));
        self.source.number += 1;
        self.source.began = self.now;
        self.source.sent = (0..PAGES).collect();
        let (session, uri) = ("5e55".to_owned(), World::uri());
        let now = self.instant();
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
                Process::Migration(Box::new(core))
            }
        });
        self.tell_source(Input::Time);
    }

    /// Hands this in, and carries out what follows.
    pub(super) fn tell_source(&mut self, input: Input) {
        let now = self.moment();
        match (&mut self.source.process, input) {
            (Some(Process::Migration(core)), input) => core.handle(input, &now),
            (Some(Process::Leftover(core)), Input::Called(called)) => {
                core.handle(leftover::Input::Called(called), now.at);
            }
            (Some(Process::Leftover(core)), Input::Time) => {
                core.handle(leftover::Input::Time, now.at);
            }
            (Some(Process::Leftover(core)), Input::Interrupted) => {
                let error = Error::Interrupted("nobody is told".into());
                core.handle(leftover::Input::NotDone(error), now.at);
            }
            (Some(Process::Leftover(_)), _) | (None, _) => return,
        }
        self.run_source();
    }

    /// Carries out effects until the source waits, has ended, or is killed.
    fn run_source(&mut self) {
        loop {
            let effect = match &mut self.source.process {
                Some(Process::Migration(core)) => {
                    self.source.late.take().or_else(|| core.next_effect())
                }
                Some(Process::Leftover(core)) => {
                    let effect = core.next_effect();
                    self.run_leftover(effect);
                    return;
                }
                None => return,
            };
            if self.is_killed() {
                return self.kill_source();
            }
            let Some(effect) = effect else {
                let Some(answer) = self.source.answers.pop_front() else { break };
                self.tell_core(answer);
                continue;
            };
            let Some(effect) = self.with_fault(effect) else { continue };
            self.note(format_args!("source: {effect:?}"));
            if let Err(error) = self.carry_out(effect) {
                self.tell_core(Input::NotDone(error));
            }
        }
        if let Some(Process::Migration(core)) = &mut self.source.process
            && core.has_ended()
        {
            let outcome = core.take_outcome();
            self.source.process = None;
            self.note(format_args!("source has ended: {outcome:?}"));
            match outcome {
                Some(Outcome::Completed(_)) if self.source.record.is_some() => {
                    self.violated("a record is left of a session that is complete");
                }
                // The error says to have it go on by hand, unless there is a record to resume.
                Some(Outcome::Failed { guest: Guest::Stopped(_) | Guest::Asked, .. }) => {
                    self.source.is_by_hand = self.source.record.is_none();
                }
                Some(Outcome::Failed { guest: Guest::Away | Guest::Complete, .. }) => {
                    self.source.has_left = true;
                }
                _ => {}
            }
        }
    }

    fn moment(&self) -> Moment {
        let moved_bytes = self.source.sent.len() as u64 * (TOTAL_BYTES / PAGES);
        Moment { at: self.instant(), moved_bytes, checksum_errors: 0 }
    }

    fn tell_core(&mut self, input: Input) {
        let now = self.moment();
        if let Some(Process::Migration(core)) = &mut self.source.process {
            core.handle(input, &now);
        }
    }

    /// An effect as a driver with this fault has it.
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
        self.source.kills.pop_front();
        self.source.process = None;
        self.source.answers.clear();
        self.source.leftover_answer = None;
        (self.source.held, self.source.late) = (None, None);
        let sends_rest = self.random.percent(70);
        for link in [self.source.link.take(), self.source.opened.take()].into_iter().flatten() {
            self.source_hangs_up(link, sends_rest);
        }
        let at = self.now + self.random.millis(13);
        self.at(at, Happening::StartSource);
    }

    fn carry_out(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Persist(record) => {
                // Of a record that is not vital and cannot be written a person has to decide after a kill.
                let fails = !self.is_well() && self.random.percent(self.habits.disk);
                if fails && record.is_vital() {
                    return Err(Error::Host("no space".into()));
                }
                self.persist(&record);
            }
            Effect::Forget => self.forget(),
            Effect::Commit if self.habits.cancels && self.source.number == 1 => {
                return Err(Error::Interrupted("the guest goes on here".into()));
            }
            Effect::Commit => self.source.answers.push_back(Input::Committed),
            Effect::Ask(question) => self.ask(question),
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
            Effect::SendPass | Effect::CountDirty | Effect::EndRounds => {
                unreachable!("there are no rounds here")
            }
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
            Effect::Land(_)
            | Effect::Fix
            | Effect::StartRelease
            | Effect::EndRelease
            | Effect::CheckFiles { .. }
            | Effect::StayAwake
            | Effect::Relax
            | Effect::Show(_) => {}
        }
        Ok(())
    }

    fn is_told(&mut self, event: &Event) {
        self.source.is_paused |= matches!(event, Event::Paused { .. });
    }

    fn persist(&mut self, record: &Record) {
        // Nothing is written of a session that nobody can take over, or that has ended.
        let Some(disk) = &mut self.source.record else { return };
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
    }

    /// The record goes: nobody may need this side any more.
    fn forget(&mut self) {
        self.source.record = None;
        if !self.runs_here && !self.destination.can_do_alone() {
            self.violated("the session is forgotten, and the guest needs it");
        }
    }

    fn free(&mut self) {
        self.source.has_memory = false;
        if !self.destination.can_do_alone() {
            self.violated("memory is freed that the guest needs");
        }
    }

    fn send_on(&mut self, lane: Lane, sent: Sent) {
        if let Some(link) = self.source.link {
            self.send(link, lane, sent);
        }
    }

    fn send_frame(&mut self, frame: Frame) {
        self.send_on(Lane::Demand, Sent::Frame(frame));
    }

    fn send_pages(&mut self) {
        let missing: Vec<u64> =
            (0..PAGES).filter(|page| !self.source.sent.contains(page)).collect();
        for page in missing {
            self.source.sent.insert(page);
            self.send_on(Lane::Bulk, Sent::Page(page));
        }
        self.note_soon(Input::BulkEnded);
    }

    fn note_soon(&mut self, input: Input) {
        if let Some(link) = self.source.link {
            let process = self.source.number;
            self.soon(Happening::Note { process, link, input });
        }
    }

    fn dials(&mut self, epoch: u32, word: Option<crate::control::calling::Word>) {
        let process = self.source.number;
        let at = self.now + self.random.millis(9);
        self.at(at, Happening::Dialled { process, epoch, word });
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

/// A session in which nothing is served.
impl World {
    fn run_leftover(&mut self, mut effect: Option<leftover::Effect>) {
        loop {
            if self.is_killed() {
                return self.kill_source();
            }
            let Some(next) = effect.take() else {
                let Some(answer) = self.source.leftover_answer.take() else { break };
                effect = self.tell_leftover(answer);
                continue;
            };
            self.note(format_args!("source: {next:?}"));
            match next {
                leftover::Effect::Undo => {
                    self.runs_here = true;
                    let undone = leftover::Input::Undone(Ok(Undone::GoesOn));
                    self.source.leftover_answer = Some(undone);
                }
                leftover::Effect::Epoch(epoch) => {
                    if let Some(disk) = &mut self.source.record {
                        disk.epoch = epoch;
                    }
                }
                leftover::Effect::Call { epoch, word, .. } => self.dials(epoch, Some(word)),
                leftover::Effect::Free => self.free(),
                leftover::Effect::Forget => self.forget(),
                leftover::Effect::Tell(_) => {}
            }
            effect = match &mut self.source.process {
                Some(Process::Leftover(core)) => core.next_effect(),
                _ => None,
            };
        }
        if let Some(Process::Leftover(core)) = &self.source.process
            && core.has_ended()
        {
            self.note(format_args!("source has ended, as a session that was left"));
            self.source.process = None;
        }
    }

    fn tell_leftover(&mut self, input: leftover::Input) -> Option<leftover::Effect> {
        let now = self.instant();
        let Some(Process::Leftover(core)) = &mut self.source.process else { return None };
        core.handle(input, now);
        // A call begins at once.
        core.handle(leftover::Input::Time, now);
        core.next_effect()
    }
}

/// What the demand thread of the source answers.
impl World {
    pub(super) fn source_answers(&mut self, link: u32, page: u64) {
        if self.source.link == Some(link) && self.source.sent.insert(page) {
            self.send(link, Lane::Demand, Sent::Page(page));
        }
    }

    pub(super) fn source_hears(&mut self, link: u32, said: Said) {
        self.say(link, said);
    }
}

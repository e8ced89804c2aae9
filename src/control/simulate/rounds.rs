//! The memory of the guest at the source, and its pages that are sent before the stop.
//!
//! A page has a version: the number of the guest's writes to it. Writes that the log has seen are marked when the log
//! looks, or before. The source's bulk lane goes around the guest block by block: it takes the marks of a block and
//! then reads its pages, one after the other. The destination lands copies in the order of the lane, which takes a
//! while.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use umem_wire::{Event as Said, Frame};

use super::threads::Own;
use super::world::{CHUNK, Happening, Lane, PAGES, Sent, World};
use super::{CHAOS, Fault, Random};
use crate::control::destination::Input as There;
use crate::control::source::{Input, Question, RoundsPlan};
use crate::error::{Error, Result};
use crate::memory::dirty::LeftToSend;

/// Pages of a block. The marks of a block are taken together.
const BLOCK: u64 = 3;

/// A limit of the guest's writes, to keep seeds short.
const WRITES_MAX: u32 = 400;

/// The parameters of rounds that a seed determines.
#[derive(Debug)]
pub(super) struct RoundsHabits {
    pub(super) plan: RoundsPlan,
    /// The guest writes to this many pages often, and to the others rarely.
    hot: u64,
    /// log2 of the most milliseconds between two writes.
    pause_bits: u64,
    /// The percentage of writes that are marked before the log looks.
    prompt: u64,
    /// The settings to undo are recorded when tracking begins.
    is_noted: bool,
    /// The percentage of looks after which the monitor has stopped the guest by itself.
    stops: u64,
    /// log2 of the most milliseconds of a look.
    look_bits: u64,
    /// When a person ends the passes.
    ends_after: Option<Duration>,
}

impl RoundsHabits {
    /// From a separate random sequence, so that seeds without rounds run as before.
    pub(super) fn of(seed: u64) -> Option<RoundsHabits> {
        let mut random = Random(seed ^ 0x0072_6f75_6e64_7321);
        if !random.percent(40) {
            return None;
        }
        let downtime_ms = [0, 1, 50, 1000, 100_000][random.below(5) as usize];
        let mut habits = RoundsHabits {
            plan: RoundsPlan {
                passes_max: random.below(5) as u32,
                downtime_limit: Duration::from_millis(downtime_ms),
                timeout: None,
            },
            hot: random.below(PAGES + 1),
            pause_bits: 2 + random.below(8),
            prompt: [0, 0, 50, 100][random.below(4) as usize],
            is_noted: random.percent(50),
            stops: [0, 0, 10][random.below(3) as usize],
            look_bits: [0, 4, 8, 12][random.below(4) as usize],
            ends_after: None,
        };
        let timeout_ms = [None, None, Some(0), Some(200), Some(2000)][random.below(5) as usize];
        habits.plan.timeout = timeout_ms.map(Duration::from_millis);
        habits.ends_after = random.percent(20).then(|| random.millis(11));
        Some(habits)
    }
}

/// The guest's memory at the source.
pub(super) struct Memory {
    versions: [u32; PAGES as usize],
    writes_left: u32,
    /// Pages that are marked dirty.
    dirty: BTreeSet<u64>,
    /// The writes that the log has seen since its last look, and the time of the last one; None if tracking is off.
    log: Option<BTreeMap<u64, Duration>>,
    /// The monitor has stopped the guest by itself, and resumes it when the log ends.
    has_stopped_itself: bool,
    /// umem has changed the monitor's settings for tracking, and has recorded that.
    is_changed: bool,
    /// The monitor has been asked to stop the guest.
    is_asked_to_stop: bool,
    /// The source gave up before that.
    has_failed_before: bool,
    pass: Option<Pass>,
    pub(super) rounds_bytes: u64,
}

/// One pass over the guest.
#[derive(Default)]
struct Pass {
    next_block: u64,
    /// This is the last block.
    is_cut: bool,
    /// Pages whose marks have been taken, with the versions that have been read.
    taken: VecDeque<(u64, Option<u32>)>,
}

impl Memory {
    pub(super) fn new() -> Memory {
        Memory {
            versions: [0; PAGES as usize],
            writes_left: WRITES_MAX,
            dirty: BTreeSet::new(),
            log: None,
            has_stopped_itself: false,
            is_changed: false,
            is_asked_to_stop: false,
            has_failed_before: false,
            pass: None,
            rounds_bytes: 0,
        }
    }

    fn version(&self, page: u64) -> u32 {
        self.versions[page as usize]
    }

    /// The page with its current version.
    pub(super) fn read(&self, page: u64) -> Sent {
        Sent::Page { page, version: self.version(page) }
    }

    pub(super) fn is_all_dirty(&mut self) {
        self.dirty = (0..PAGES).collect();
    }

    pub(super) fn counted(&self) -> Input {
        let dirty_bytes = self.dirty.len() as u64 * CHUNK;
        let left = LeftToSend { dirty_bytes, ..LeftToSend::default() };
        Input::Counted { left, sent_bytes: self.rounds_bytes }
    }

    pub(super) fn has_been_stopped(&self) -> bool {
        self.is_asked_to_stop
    }
}

/// The guest and its log.
impl World {
    /// Schedules the external events of the passes.
    pub(super) fn plan_passes(&mut self) {
        if let Some(at) = self.habits.rounds.as_ref().and_then(|rounds| rounds.ends_after) {
            self.at(at, Happening::EndPasses);
        }
        self.guest_will_write();
    }

    fn guest_will_write(&mut self) {
        let Some(rounds) = &self.habits.rounds else { return };
        let bits = rounds.pause_bits;
        let at = self.now + self.random.millis(bits);
        let is_watched = self.source.is_alive() || self.now.is_zero();
        if at < CHAOS
            && is_watched
            && !self.destination.guest.is_ours
            && self.memory.writes_left > 0
        {
            self.memory.writes_left -= 1;
            self.at(at, Happening::GuestWrites);
        }
    }

    pub(super) fn guest_writes(&mut self) {
        let Some(&RoundsHabits { hot, prompt, .. }) = self.habits.rounds.as_ref() else { return };
        if self.runs_here {
            let is_hot = hot > 0 && self.random.percent(90);
            let page = self.random.below(if is_hot { hot } else { PAGES });
            let is_prompt = self.random.percent(prompt);
            let memory = &mut self.memory;
            memory.versions[page as usize] += 1;
            match &mut memory.log {
                Some(_) if is_prompt => drop(memory.dirty.insert(page)),
                Some(log) => drop(log.insert(page, self.now)),
                None => {}
            }
        }
        self.guest_will_write();
    }

    /// The monitor starts tracking.
    pub(super) fn tracks(&mut self, result: Result<()>) -> Result<()> {
        let is_noted = self.habits.rounds.as_ref().is_some_and(|rounds| rounds.is_noted);
        if is_noted {
            self.source.stops(self.habits.is_kept);
            self.memory.is_changed = self.habits.is_kept;
        }
        self.memory.log = result.is_ok().then(BTreeMap::new);
        self.believed(result)
    }

    /// Marks all writes before the question, and perhaps later ones.
    pub(super) fn looks(&mut self, result: Result<()>, asked: Duration) -> Result<()> {
        if result.is_err() {
            self.memory.log = None;
            return self.believed(result);
        }
        let stops = self.habits.rounds.as_ref().map_or(0, |rounds| rounds.stops);
        if self.runs_here && self.random.percent(stops) {
            self.note(format_args!("the monitor stops the guest by itself"));
            (self.runs_here, self.memory.has_stopped_itself) = (false, true);
        }
        let Some(log) = &mut self.memory.log else { return Ok(()) };
        for (page, written) in std::mem::take(log) {
            let is_late = written > asked;
            if !is_late || self.random.percent(50) {
                self.memory.dirty.insert(page);
            }
            if is_late && (self.random.percent(50) || !self.memory.dirty.contains(&page)) {
                self.memory.log.get_or_insert_default().insert(page, written);
            }
        }
        Ok(())
    }

    /// The monitor stops the guest, and the log marks the rest.
    pub(super) fn stops(&mut self, result: Result<()>) -> Result<()> {
        if self.memory.has_failed_before {
            self.violated("a guest is stopped by a source that has given up before the stop");
        }
        let is_log_wrong = result.is_err() && self.memory.log.is_some() && self.random.percent(50);
        if result.is_ok() || is_log_wrong {
            self.runs_here = false;
            self.memory.has_stopped_itself = false;
            if let Some(log) = self.memory.log.take()
                && !is_log_wrong
                && self.fault != Fault::LeavesLastMarks
            {
                self.memory.dirty.extend(log.into_keys());
            }
        }
        if is_log_wrong { self.believed(result) } else { result }
    }

    fn believed(&self, result: Result<()>) -> Result<()> {
        match self.fault {
            Fault::BelievesFailedLog => Ok(()),
            _ => result,
        }
    }

    /// Tracking ends: a monitor that has stopped the guest by itself resumes it.
    pub(super) fn drops_log(&mut self) {
        self.memory.log = None;
        if std::mem::take(&mut self.memory.has_stopped_itself) {
            self.note(format_args!("the monitor has the guest go on by itself"));
            self.runs_here = true;
        }
    }

    /// The monitor's settings are restored.
    pub(super) fn is_put_back(&mut self) {
        self.memory.is_changed = false;
    }

    /// The record with the settings to undo is removed.
    pub(super) fn forgets_changes(&mut self) {
        if self.memory.is_changed && !self.destination.guest.is_ours {
            self.violated("the record goes of a monitor that umem has changed");
        }
    }

    /// The guest runs at the source, or will run when umem ends there.
    pub(super) fn runs_or_will(&self) -> bool {
        self.runs_here || self.memory.has_stopped_itself
    }

    /// The source asks its monitor a question.
    pub(super) fn is_asked(&mut self, question: Question) {
        match question {
            Question::Stop => self.memory.is_asked_to_stop = true,
            Question::Resume => self.memory.has_failed_before |= !self.memory.is_asked_to_stop,
            _ => {}
        }
    }

    /// How long a look takes, beside the time of any command.
    pub(super) fn look_takes(&mut self) -> Duration {
        let bits = self.habits.rounds.as_ref().map_or(0, |rounds| rounds.look_bits);
        self.random.millis(bits)
    }

    /// A page of the destination's guest that differs from its state when the guest stopped.
    pub(super) fn stale_page(&self) -> Option<u64> {
        let destination = &self.destination;
        let is_stale =
            |page: &&u64| destination.contents.get(page) != Some(&self.memory.version(**page));
        destination.have.iter().find(is_stale).copied()
    }

    /// The outcome of a seed with rounds.
    pub(super) fn rounds_came_to(&self) -> Option<&'static str> {
        match (self.memory.rounds_bytes, self.runs_here) {
            (0, _) => None,
            (_, false) if self.destination.runs() => Some("rounds, and completed"),
            (_, true) if self.memory.is_asked_to_stop => Some("rounds, and stayed"),
            (_, true) => Some("rounds, and stayed without a stop"),
            (_, false) => None,
        }
    }
}

/// The source's bulk lane.
impl World {
    pub(super) fn begins_pass(&mut self) {
        self.memory.pass = Some(Pass::default());
        self.pass_goes_on_soon();
    }

    /// The pass ends with the block that the lane is at.
    pub(super) fn cuts_pass(&mut self) {
        if let Some(pass) = &mut self.memory.pass {
            pass.is_cut = true;
        }
    }

    fn pass_goes_on_soon(&mut self) {
        let Some(link) = self.source.link else { return };
        let (process, at) = (self.source.process_number(), self.now + self.random.millis(5));
        self.at(at, Happening::Pass { process, link });
    }

    pub(super) fn go_on_with_pass(&mut self) {
        let Some(mut pass) = self.memory.pass.take() else { return };
        let memory = &mut self.memory;
        if let Some((page, read)) = pass.taken.pop_front() {
            if read.is_some() {
                memory.dirty.remove(&page);
            }
            let version = read.unwrap_or_else(|| memory.version(page));
            memory.rounds_bytes += CHUNK;
            self.send_on(Lane::Bulk, Sent::Page { page, version });
        } else if !pass.is_cut && pass.next_block * BLOCK < PAGES {
            let first = pass.next_block * BLOCK;
            pass.next_block += 1;
            let block: Vec<u64> = memory.dirty.range(first..first + BLOCK).copied().collect();
            for page in block {
                let reads = self.fault == Fault::ReadsBeforeTaking;
                if !reads {
                    memory.dirty.remove(&page);
                }
                pass.taken.push_back((page, reads.then(|| memory.version(page))));
            }
        } else {
            return self.note_soon(Input::PassEnded);
        }
        self.memory.pass = Some(pass);
        self.pass_goes_on_soon();
    }

    /// Drops pages that a lane has taken and not sent.
    pub(super) fn ends_rounds(&mut self) {
        self.memory.pass = None;
        self.send_on(Lane::Bulk, Sent::Frame(Frame::RoundsEnd));
        let mut pages = self.memory.dirty.clone();
        self.source.sent = (0..PAGES).filter(|page| !pages.contains(page)).collect();
        if self.random.percent(30) {
            let rest = pages.split_off(&self.random.below(PAGES));
            self.send_on(Lane::Demand, Sent::Remaining { pages, last: false });
            pages = rest;
        }
        self.send_on(Lane::Demand, Sent::Remaining { pages, last: true });
    }
}

/// The pages received in rounds.
#[derive(Debug, Default)]
pub(super) struct Copies {
    /// Pages that have arrived at least once.
    came: BTreeSet<u64>,
    /// Pages that come once more.
    remaining: BTreeSet<u64>,
    /// When all received copies are in their files.
    land_until: Duration,
    pub(super) bytes: u64,
}

/// The destination.
impl World {
    pub(super) fn copy_comes(&mut self, link: u32, page: u64, version: u32) {
        let soonest = self.now + self.random.millis(6);
        let copies = &mut self.destination.threads.copies;
        let at = soonest.max(copies.land_until);
        copies.land_until = at;
        let at = if self.fault == Fault::CopiesOvertake { soonest } else { at };
        let (process, what) = (self.destination.number, Own::Copied { link, page, version });
        self.at(at, Happening::Destination { process, what });
    }

    pub(super) fn copied(&mut self, link: u32, page: u64, version: u32) {
        if self.destination.threads.bulk != Some(link) {
            return;
        }
        self.destination.contents.insert(page, version);
        let copies = &mut self.destination.threads.copies;
        copies.came.insert(page);
        copies.bytes += CHUNK;
    }

    pub(super) fn rounds_end_comes(&mut self, link: u32) {
        let threads = &mut self.destination.threads;
        if !std::mem::take(&mut threads.is_in_rounds) {
            return self.violated("the end of rounds comes twice");
        }
        let landed = threads.copies.land_until.max(self.now);
        let at = if self.fault == Fault::RoundsEndEarly { self.now } else { landed };
        let (process, what) = (self.destination.number, Own::RoundsEnded { link });
        self.at(at, Happening::Destination { process, what });
    }

    pub(super) fn rounds_have_ended(&mut self, link: u32) {
        if self.destination.threads.bulk == Some(link) {
            self.post(There::RoundsEnded);
        }
    }

    pub(super) fn remaining_come(&mut self, pages: BTreeSet<u64>, last: bool) {
        self.destination.threads.copies.remaining.extend(pages);
        self.post(There::Received(Said::Remaining { runs: Vec::new(), last }));
    }

    /// Each page comes once from here on.
    pub(super) fn settles_pages(&mut self) -> Result<There> {
        let Copies { came, remaining, .. } = &self.destination.threads.copies;
        let settles = self.fault == Fault::SettlesRemaining;
        for page in 0..PAGES {
            if remaining.contains(&page) && !(settles && came.contains(&page)) {
                self.destination.contents.remove(&page);
            } else if came.contains(&page) {
                self.destination.have.insert(page);
            } else {
                let what = format!("page {page} has not come and is not said to remain");
                return Err(Error::protocol("demand lane", what));
            }
        }
        let has_all = self.destination.has_all();
        if has_all && !std::mem::replace(&mut self.destination.threads.has_all, true) {
            self.post(There::AllCached);
        }
        Ok(There::PagesSettled)
    }
}

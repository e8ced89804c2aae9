//! Virtual time: the world's events, its habits and its end.

mod monitor;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::{Duration, Instant};

use umem_wire::{PageSize, Region, RegionTable};

use super::destination::Destination;
use super::rounds::{Memory, RoundsHabits};
use super::source::SourceSide;
use super::threads::Own;
use super::{CHAOS, END, Fault, Random};
use crate::control::Order;
use crate::control::calling::Word;
use crate::control::destination::Input as There;
use crate::control::source::{Input, Question};
use crate::error::Error;
use crate::host::monitor::Answer;

pub(super) use wire::{LANES, Lane, Reply, Sent, lost, nobody};

/// Pages of the guest.
pub(super) const PAGES: u64 = 6;

/// Bytes of a page.
pub(super) const CHUNK: u64 = 4096;
pub(super) const TOTAL_BYTES: u64 = PAGES * CHUNK;

/// An upper bound of any run's steps.
const STEPS_MAX: u32 = 20_000;

/// Bytes of device state.
pub(super) const STATE_BYTES: usize = 4;

/// An event at some time. Its numbers name the lanes and the process it belongs to. The event is dropped if these are
/// gone.
#[derive(Debug)]
pub(super) enum Happening {
    ToDestination {
        link: u32,
        lane: Lane,
        sent: Sent,
    },
    ToSource {
        link: u32,
        lane: Lane,
        told: Reply,
    },
    DestinationLoses {
        link: u32,
        lane: Lane,
    },
    SourceLoses {
        link: u32,
        lane: Lane,
    },
    /// A thread of the source posts a message.
    Note {
        process: u32,
        link: u32,
        input: Input,
    },
    /// All memory there has been read.
    Digested {
        process: u32,
    },
    /// The monitor carries out a command.
    Monitor {
        process: u32,
        question: Question,
        /// When the command was sent.
        asked: Duration,
    },
    /// The source's bulk lane continues its pass.
    Pass {
        process: u32,
        link: u32,
    },
    /// The person ends the passes of the source.
    EndPasses,
    /// The source's guest writes to a page if it runs.
    GuestWrites,
    Answered {
        process: u32,
        answer: Answer,
    },
    /// A dial of the source arrives.
    Dialled {
        attempt: u32,
        epoch: u32,
        word: Option<Word>,
    },
    /// The destination has sent nothing on lanes that are being opened.
    OpeningIsLate {
        attempt: u32,
    },
    /// An event of the destination alone.
    Destination {
        process: u32,
        what: Own,
    },
    // Chaos.
    Cut {
        whole: bool,
    },
    KillDestination,
    StartSource,
    StartDestination,
    Interrupt {
        side: Side,
    },
    Pause {
        side: Side,
    },
    Resume {
        side: Side,
    },
    /// A thread panics.
    Panic {
        side: Side,
    },
    /// A RAM file of the source has changed.
    FileFails,
    GuestDies,
    /// Another client of the source's monitor runs the guest.
    Cont,
    /// The person reacts to umem's reports.
    Person,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

/// The parameters that a seed determines.
#[derive(Debug)]
pub(super) struct Habits {
    pub(super) postcopy: bool,
    /// Pages are sent before the stop, too.
    pub(super) rounds: Option<RoundsHabits>,
    pub(super) background: bool,
    pub(super) recovers: bool,
    pub(super) is_kept: bool,
    pub(super) is_checked: bool,
    /// The destination's memory is private.
    pub(super) is_private: bool,
    /// The percentage of monitor questions that get a wrong answer, or one when everything works again.
    pub(super) wrong: u64,
    pub(super) stuck: u64,
    /// The percentage of record writes that fail.
    pub(super) disk: u64,
    /// The percentage of pages without room.
    pub(super) short: u64,
    /// An embedding program cancels at the last moment.
    pub(super) cancels: bool,
    pub(super) cancels_there: bool,
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) fault: Fault,
    pub(super) habits: Habits,
    base: Instant,
    pub(super) now: Duration,
    queue: BTreeMap<(Duration, u64), Happening>,
    order: u64,
    /// The last delivery of each lane in each direction: later data does not overtake it.
    arrivals: BTreeMap<(u32, Lane, bool), Duration>,
    cut: BTreeSet<(u32, Lane)>,
    links: u32,
    /// The source's guest runs.
    pub(super) runs_here: bool,
    pub(super) memory: Memory,
    monitor_busy: Duration,
    /// The source's monitor has answered whether its guest may be given away.
    has_been_asked: bool,
    pub(super) source: SourceSide,
    pub(super) destination: Destination,
    pub(super) violation: Option<String>,
    kills: u32,
    /// A person has ended the source's session, because its destination needs nothing and cannot report that.
    pub(super) has_abandoned: bool,
    log: String,
}

impl World {
    pub(super) fn new(seed: u64, fault: Fault) -> World {
        let mut random = Random(seed);
        let recovers = random.percent(90);
        let habits = Habits {
            postcopy: random.percent(85),
            rounds: RoundsHabits::of(seed),
            background: random.percent(85),
            recovers,
            is_kept: recovers && random.percent(85),
            is_checked: random.percent(30),
            is_private: random.percent(20),
            wrong: [0, 0, 5][random.below(3) as usize],
            stuck: [0, 0, 0, 10][random.below(4) as usize],
            disk: [0, 0, 0, 5][random.below(4) as usize],
            short: [0, 0, 0, 0, 10][random.below(5) as usize],
            cancels: random.percent(2),
            cancels_there: random.percent(2),
        };
        // From a separate random sequence, so that the runs of other seeds stay the same.
        let is_mistaken = Random(!seed).percent(25);
        let source = SourceSide::new(&mut random, is_mistaken);
        let destination = Destination::new(&mut random);
        let mut world = World {
            random,
            fault,
            habits,
            base: Instant::now(),
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            order: 0,
            arrivals: BTreeMap::new(),
            cut: BTreeSet::new(),
            links: 0,
            runs_here: true,
            memory: Memory::new(),
            monitor_busy: Duration::ZERO,
            has_been_asked: false,
            source,
            destination,
            violation: None,
            kills: 0,
            has_abandoned: false,
            log: String::new(),
        };
        world.plan();
        world
    }

    /// Schedules the external events of the period of faults.
    fn plan(&mut self) {
        // Mostly after the switchover, because a migration that ends before it is short.
        let begin = Duration::from_millis([0, 1000, 2000, 3000][self.random.below(4) as usize]);
        for _ in 0..[0, 1, 1, 2, 4][self.random.below(5) as usize] {
            let at = begin + self.random.millis(13);
            let whole = self.random.percent(70);
            self.at(at, Happening::Cut { whole });
        }
        for _ in 0..[0, 0, 1, 2][self.random.below(4) as usize] {
            let at = begin + self.random.millis(13);
            self.at(at, Happening::KillDestination);
        }
        for side in [Side::Source, Side::Destination] {
            for _ in 0..[0, 0, 0, 1, 2][self.random.below(5) as usize] {
                let at = begin + self.random.millis(13);
                self.at(at, Happening::Interrupt { side });
            }
            for _ in 0..[0, 0, 0, 1][self.random.below(4) as usize] {
                let at = begin + self.random.millis(12);
                self.at(at, Happening::Pause { side });
                let later = at + self.random.millis(13);
                self.at(later, Happening::Resume { side });
            }
            if self.random.percent(5) {
                let at = begin + self.random.millis(13);
                self.at(at, Happening::Panic { side });
            }
        }
        if self.random.percent(3) {
            let at = begin + self.random.millis(13);
            self.at(at, Happening::FileFails);
        }
        if self.random.percent(3) {
            let at = begin + self.random.millis(13);
            self.at(at, Happening::GuestDies);
        }
        if self.random.percent(5) {
            let at = self.random.millis(11);
            self.at(at, Happening::Cont);
        }
        self.at(CHAOS, Happening::Person);
        if self.habits.rounds.is_some() {
            self.plan_passes();
        }
    }

    pub(super) fn instant(&self) -> Instant {
        self.base + self.now
    }

    pub(super) fn is_well(&self) -> bool {
        self.now >= CHAOS
    }

    pub(super) fn at(&mut self, at: Duration, happening: Happening) {
        self.order += 1;
        self.queue.insert((at, self.order), happening);
    }

    pub(super) fn soon(&mut self, happening: Happening) {
        let at = self.now + self.random.millis(7);
        self.at(at, happening);
    }

    /// Adds a line to the log of a seed. Instants are omitted, because they differ from run to run.
    pub(super) fn note(&mut self, what: std::fmt::Arguments<'_>) {
        let mut what = what.to_string();
        while let Some(at) = what.find("Instant {") {
            let end = what[at..].find('}').map_or(what.len(), |end| at + end + 1);
            what.replace_range(at..end, "…");
        }
        let _ = writeln!(self.log, "{:>9.3} s  {what}", self.now.as_secs_f64());
    }

    pub(super) fn log(&self) -> String {
        format!("{:?}\n{}", self.habits, self.log)
    }

    pub(super) fn violated(&mut self, what: &str) {
        self.violation.get_or_insert_with(|| what.to_owned());
    }

    pub(super) fn table(&self) -> RegionTable {
        let page_size = PageSize::from_shift(12).expect("4 KiB");
        let region = Region { name: "ram0".into(), bytes: TOTAL_BYTES, page_size };
        RegionTable::new(vec![region]).expect("one region")
    }

    /// Runs until the migration is over, or until the end.
    pub(super) fn run(&mut self) -> Result<&'static str, String> {
        let link = self.connect();
        self.start_destination(link);
        self.start_source(link);
        for _ in 0..STEPS_MAX {
            self.check()?;
            if self.is_over() {
                return self.judge();
            }
            let wakes = [self.source.deadline(), self.destination.deadline()];
            let wakes = wakes.into_iter().flatten().min();
            let wakes = wakes.map(|at| at.saturating_duration_since(self.base));
            let next = self.queue.first_key_value().map(|(&(at, _), _)| at);
            let at = match (wakes, next) {
                (Some(wakes), Some(next)) => wakes.min(next),
                (Some(at), None) | (None, Some(at)) => at,
                (None, None) => END + Duration::from_secs(1),
            };
            if at > END {
                return Err(format!("it is not over: {}", self.state()));
            }
            self.now = self.now.max(at);
            if next == Some(at) {
                let (_, happening) = self.queue.pop_first().expect("it is there");
                self.happen(happening);
            } else {
                let now = self.instant();
                if self.source.deadline().is_some_and(|at| at <= now) {
                    self.tell_source(Input::Time);
                }
                if self.destination.deadline().is_some_and(|at| at <= now) {
                    self.destination_looks();
                }
            }
        }
        Err(format!("it runs in circles: {}", self.state()))
    }

    fn check(&self) -> Result<(), String> {
        if let Some(violation) = &self.violation {
            return Err(violation.clone());
        }
        if self.destination.runs() {
            if self.runs_here {
                return Err("the guest runs twice".into());
            }
            if let Some(page) = self.stale_page() {
                return Err(format!("page {page} that the guest runs with is stale"));
            }
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.is_well()
            && !self.source.is_alive()
            && self.source.record.is_none()
            && !self.source.is_by_hand
            && (self.destination.is_settled() || !self.habits.is_kept && self.destination.is_left())
    }

    fn judge(&self) -> Result<&'static str, String> {
        let has_all = self.destination.has_all();
        match (self.runs_here, self.destination.runs()) {
            (true, false) if self.kills == 0 => Ok("stayed"),
            (true, false) => Ok("stayed after a kill"),
            // A destination may learn that only if records could not be written.
            (false, true) if has_all && self.has_abandoned && self.habits.disk > 0 => {
                Ok("completed, and a person has ended the source")
            }
            (false, true) if has_all && self.has_abandoned => {
                Err("a source did not come to an end by itself".into())
            }
            (false, true) if has_all && self.kills == 0 => Ok("completed"),
            (false, true) if has_all => Ok("completed after a kill"),
            (false, false) if self.destination.guest.has_died => Ok("the guest died"),
            // No lanes can be opened again, by agreement of both sides.
            (false, _) if !self.habits.recovers => Ok("lost without recovery"),
            (false, _) if !self.habits.is_kept && self.kills > 0 => Ok("lost with its process"),
            (false, _)
                if !self.habits.is_kept
                    && (self.source.has_left || self.destination.has_failed) =>
            {
                Ok("left with nothing to resume")
            }
            _ => Err(format!("the guest is lost: {}", self.state())),
        }
    }

    pub(super) fn state(&self) -> String {
        format!(
            "at the source it runs: {}, source {}, record {:?}; destination {}",
            self.runs_here,
            self.source.describe(),
            self.source.record,
            self.destination.describe()
        )
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::ToDestination { link, lane, sent } => {
                if !self.cut.contains(&(link, lane)) {
                    self.destination_hears(link, lane, sent);
                }
            }
            Happening::ToSource { link, lane, told } => {
                if !self.cut.contains(&(link, lane)) {
                    self.source_hears(link, told);
                }
            }
            Happening::DestinationLoses { link, lane } => self.destination_loses(link, lane),
            Happening::SourceLoses { link, lane } => self.source_loses(link, lane),
            Happening::Note { process, link, input } => {
                if self.source.is(process) && self.source.link == Some(link) {
                    self.source_notes(input);
                }
            }
            Happening::Digested { process } => {
                if self.source.is(process) {
                    let digests = self.random.percent(80).then(|| vec![7]);
                    self.source_notes(Input::Digested(Ok(digests)));
                }
            }
            Happening::Monitor { process, question, asked } => {
                self.monitor_does(process, question, asked);
            }
            Happening::Pass { process, link } => {
                if self.source.is(process) && self.source.link == Some(link) {
                    self.go_on_with_pass();
                }
            }
            Happening::EndPasses => {
                self.note(format_args!("somebody ends the passes"));
                self.source_notes(Input::EndPasses);
            }
            Happening::GuestWrites => self.guest_writes(),
            Happening::Answered { process, answer } => {
                if self.source.is(process) {
                    self.note(format_args!("monitor answers {answer:?}"));
                    self.source_notes(Input::Monitor(answer));
                }
            }
            Happening::Dialled { attempt, epoch, word } => self.dialled(attempt, epoch, word),
            Happening::OpeningIsLate { attempt } => {
                if self.source.is_opening(attempt) {
                    self.opening_fails(lost("demand lane"));
                }
            }
            Happening::Destination { process, what } => self.destination_does(process, what),
            Happening::Cut { whole } => self.cut_lanes(whole),
            Happening::KillDestination => self.kill_destination(),
            Happening::StartSource => self.resume_source(),
            Happening::StartDestination => self.resume_destination(),
            Happening::Interrupt { side: Side::Source } => self.interrupt_source(),
            // The person has been warned that this ends a guest that may be the only one, so the person does not
            // interrupt.
            Happening::Interrupt { side: Side::Destination } if self.destination.is_warned => {}
            Happening::Interrupt { side: Side::Destination } => self.interrupt_destination(),
            Happening::Pause { side: Side::Source } => self.order_source(Order::Pause),
            Happening::Resume { side: Side::Source } => self.order_source(Order::Resume(None)),
            Happening::Pause { side: Side::Destination } => {
                self.tell_destination(There::Order(Order::Pause));
            }
            Happening::Resume { side: Side::Destination } => {
                self.tell_destination(There::Order(Order::Resume(None)));
            }
            Happening::Panic { side } => self.panic(side),
            Happening::FileFails => {
                let (name, path) = ("ram0".into(), "/dev/shm/ram0".into());
                let what = "has changed".into();
                self.source_notes(Input::Failed(Error::RamFailed { name, path, what }));
            }
            Happening::GuestDies => self.guest_dies(),
            // A client that runs the guest after it was given away makes it run twice. umem cannot prevent that.
            Happening::Cont if self.has_been_asked => {}
            Happening::Cont => {
                self.note(format_args!("somebody has the guest run at the source"));
                self.runs_here = true;
            }
            Happening::Person => self.look_after(),
        }
    }

    fn panic(&mut self, side: Side) {
        self.note(format_args!("a thread of the {side:?} panics"));
        let error = Error::Internal("a panic".into());
        match side {
            Side::Source => self.source_notes(Input::Failed(error)),
            Side::Destination if self.destination.is_migrating() => self.post(There::Failed(error)),
            Side::Destination => {}
        }
    }

    pub(super) fn killed(&mut self) {
        self.kills += 1;
    }
}

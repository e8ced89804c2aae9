//! Virtual time, the wire, the source's monitor and its person.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::{Duration, Instant};

use umem_wire::{Event as Said, Frame, PageSize, Region, RegionTable};

use super::destination::Destination;
use super::source::SourceSide;
use super::{CHAOS, END, Fault, Random};
use crate::control::calling::{Called, Word};
use crate::control::source::{Input, Opened, Order, Question};
use crate::error::Error;
use crate::host::thread::Answer;

/// Pages of the guest.
pub(super) const PAGES: u64 = 6;

const PAGE_BYTES: u64 = 4096;
pub(super) const TOTAL_BYTES: u64 = PAGES * PAGE_BYTES;

/// More than any run has.
const STEPS_MAX: u32 = 20_000;

/// Bytes of device state.
pub(super) const STATE_BYTES: usize = 4;

/// Which lane of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lane {
    Demand,
    Bulk,
}

pub(super) const LANES: [Lane; 2] = [Lane::Demand, Lane::Bulk];

/// What the source sends.
#[derive(Clone, Debug)]
pub(super) enum Sent {
    Frame(Frame),
    /// The device state and its end.
    State,
    Page(u64),
}

/// What is to happen at some time. Numbers say of which lanes and which process it is: what is of others that have
/// gone does not happen any more.
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
        said: Said,
    },
    DestinationLoses {
        link: u32,
    },
    SourceLoses {
        link: u32,
        lane: Lane,
    },
    /// A thread of the source has something to say.
    Note {
        process: u32,
        link: u32,
        input: Input,
    },
    /// All memory has been read there.
    Digested {
        process: u32,
    },
    /// The monitor does what it was asked.
    Monitor {
        process: u32,
        question: Question,
    },
    Answered {
        process: u32,
        answer: Answer,
    },
    /// A dial of the source arrives.
    Dialled {
        process: u32,
        epoch: u32,
        word: Option<Word>,
    },
    /// The destination's own affairs.
    Destination {
        process: u32,
        what: super::destination::Own,
    },
    // Chaos.
    Cut {
        whole: bool,
    },
    KillDestination,
    StartSource,
    StartDestination,
    Interrupt,
    Pause,
    Resume,
    /// The person looks after what is told.
    Person,
}

/// What a seed decides once.
#[derive(Debug)]
pub(super) struct Habits {
    pub(super) postcopy: bool,
    pub(super) background: bool,
    pub(super) recovers: bool,
    pub(super) is_kept: bool,
    pub(super) is_checked: bool,
    /// Of a hundred questions so many get a wrong answer, or one when everything is well again.
    wrong: u64,
    stuck: u64,
    /// Of a hundred writes so many fail.
    pub(super) disk: u64,
    pub(super) cancels: bool,
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) fault: Fault,
    pub(super) habits: Habits,
    base: Instant,
    pub(super) now: Duration,
    queue: BTreeMap<(Duration, u64), Happening>,
    order: u64,
    /// The last delivery of each lane each way: what is behind does not come before it.
    arrivals: BTreeMap<(u32, Lane, bool), Duration>,
    cut: BTreeSet<(u32, Lane)>,
    links: u32,
    /// The source's guest runs.
    pub(super) runs_here: bool,
    monitor_busy: Duration,
    pub(super) source: SourceSide,
    pub(super) destination: Destination,
    pub(super) violation: Option<String>,
    kills: u32,
    log: String,
}

impl World {
    pub(super) fn new(seed: u64, fault: Fault) -> World {
        let mut random = Random(seed);
        let recovers = random.percent(90);
        let habits = Habits {
            postcopy: random.percent(85),
            background: random.percent(85),
            recovers,
            is_kept: recovers && random.percent(85),
            is_checked: random.percent(30),
            wrong: [0, 0, 5][random.below(3) as usize],
            stuck: [0, 0, 0, 10][random.below(4) as usize],
            disk: [0, 0, 0, 5][random.below(4) as usize],
            cancels: random.percent(3),
        };
        let source = SourceSide::new(&mut random);
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
            monitor_busy: Duration::ZERO,
            source,
            destination: Destination::new(),
            violation: None,
            kills: 0,
            log: String::new(),
        };
        world.plan();
        world
    }

    /// What happens from outside, until everything is well.
    fn plan(&mut self) {
        // Mostly after the switchover: a migration that ends before it is a short one.
        let begin = Duration::from_millis([0, 500, 1500, 1500][self.random.below(4) as usize]);
        for _ in 0..[0, 1, 1, 2, 4][self.random.below(5) as usize] {
            let at = begin + self.random.millis(13);
            let whole = self.random.percent(70);
            self.at(at, Happening::Cut { whole });
        }
        for _ in 0..[0, 0, 1, 2][self.random.below(4) as usize] {
            let at = begin + self.random.millis(13);
            self.at(at, Happening::KillDestination);
        }
        for _ in 0..[0, 0, 0, 1, 2][self.random.below(5) as usize] {
            let at = begin + self.random.millis(13);
            self.at(at, Happening::Interrupt);
        }
        for _ in 0..[0, 0, 0, 1][self.random.below(4) as usize] {
            let at = begin + self.random.millis(12);
            self.at(at, Happening::Pause);
            let later = at + self.random.millis(13);
            self.at(later, Happening::Resume);
        }
        self.at(CHAOS, Happening::Person);
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

    /// For whoever reads what a seed does. Instants are of this run alone.
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

    /// Until it is over, or the end.
    pub(super) fn run(&mut self) -> Result<&'static str, String> {
        let link = self.connect();
        self.destination.link = Some(link);
        self.start_source(link);
        for _ in 0..STEPS_MAX {
            self.check()?;
            if self.is_over() {
                return self.judge();
            }
            let wakes = self.source.deadline().map(|at| at - self.base);
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
                self.tell_source(Input::Time);
            }
        }
        Err(format!("it runs in circles: {}", self.state()))
    }

    fn check(&self) -> Result<(), String> {
        if let Some(violation) = &self.violation {
            return Err(violation.clone());
        }
        match self.runs_here && self.destination.runs() {
            true => Err("the guest runs twice".into()),
            false => Ok(()),
        }
    }

    fn is_over(&self) -> bool {
        self.is_well()
            && !self.source.is_alive()
            && !self.destination.is_alive()
            && self.source.record.is_none()
            && !self.source.is_by_hand
            && self.destination.is_settled()
    }

    fn judge(&self) -> Result<&'static str, String> {
        let has_all = self.destination.have.len() as u64 == PAGES;
        match (self.runs_here, self.destination.runs()) {
            (true, false) if self.kills == 0 => Ok("stayed"),
            (true, false) => Ok("stayed after a kill"),
            (false, true) if has_all && self.kills == 0 => Ok("completed"),
            (false, true) if has_all => Ok("completed after a kill"),
            // Nobody can open lanes again, or go on: that was agreed on.
            (false, _) if !self.habits.recovers => Ok("lost without recovery"),
            (false, _) if !self.habits.is_kept && self.kills > 0 => Ok("lost with its process"),
            (false, _) if !self.habits.is_kept && self.source.has_left => {
                Ok("left by a person, with nothing to resume")
            }
            _ => Err(format!("the guest is lost: {}", self.state())),
        }
    }

    fn state(&self) -> String {
        format!(
            "at the source it runs: {}, source {}, record {:?}; destination {:?}",
            self.runs_here,
            self.source.describe(),
            self.source.record,
            self.destination
        )
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::ToDestination { link, lane, sent } => {
                if self.destination.link == Some(link) && !self.cut.contains(&(link, lane)) {
                    self.note(format_args!("destination hears {sent:?}"));
                    self.destination_hears(sent);
                }
            }
            Happening::ToSource { link, lane, said } => {
                if self.source.link == Some(link) && !self.cut.contains(&(link, lane)) {
                    self.note(format_args!("source hears {}", said.name()));
                    self.tell_source(Input::Received(said));
                }
            }
            Happening::DestinationLoses { link } => {
                if self.destination.link == Some(link) {
                    self.note(format_args!("destination loses its lanes"));
                    self.destination_loses_lanes();
                }
            }
            Happening::SourceLoses { link, lane } => {
                if self.source.link == Some(link) {
                    let lane = match lane {
                        Lane::Demand => "demand lane",
                        Lane::Bulk => "bulk lane 1",
                    };
                    self.note(format_args!("source loses its {lane}"));
                    self.tell_source(Input::Failed(lost(lane)));
                }
            }
            Happening::Note { process, link, input } => {
                if self.source.is(process) && self.source.link == Some(link) {
                    self.tell_source(input);
                }
            }
            Happening::Digested { process } => {
                if self.source.is(process) {
                    let digests = self.random.percent(80).then(|| vec![7]);
                    self.tell_source(Input::Digested(Ok(digests)));
                }
            }
            Happening::Monitor { process, question } => self.monitor_does(process, question),
            Happening::Answered { process, answer } => {
                if self.source.is(process) {
                    self.note(format_args!("monitor answers {answer:?}"));
                    self.tell_source(Input::Monitor(answer));
                }
            }
            Happening::Dialled { process, epoch, word } => self.dialled(process, epoch, word),
            Happening::Destination { process, what } => self.destination_does(process, what),
            Happening::Cut { whole } => self.cut_lanes(whole),
            Happening::KillDestination => {
                self.kills += 1;
                self.kill_destination();
            }
            Happening::StartSource => self.resume_source(),
            Happening::StartDestination => self.resume_destination(),
            Happening::Interrupt => {
                self.note(format_args!("somebody interrupts the source"));
                self.tell_source(Input::Interrupted);
            }
            Happening::Pause => self.tell_source(Input::Order(Order::Pause)),
            Happening::Resume => self.tell_source(Input::Order(Order::Resume(None))),
            Happening::Person => self.look_after(),
        }
    }

    /// A person does what was told.
    fn look_after(&mut self) {
        if !self.source.is_alive() && self.source.record.is_some() {
            self.resume_source();
        }
        if self.source.is_alive() || self.source.record.is_some() {
            self.resume_destination();
        }
        if self.source.take_by_hand() {
            self.note(format_args!("the person has the guest go on"));
            self.runs_here = true;
        }
        if self.source.take_paused() {
            self.tell_source(Input::Order(Order::Resume(None)));
        }
        // Nothing but a person ends what waits for a monitor, or keeps back what nobody asks for.
        if self.source.waits_for_a_person(self.now) || !self.habits.background {
            self.note(format_args!("the person interrupts the source"));
            self.tell_source(Input::Interrupted);
        }
        if !self.source.is_alive() && self.source.record.is_none() {
            self.leave_destination();
        }
        let at = self.now + Duration::from_secs(20);
        self.at(at, Happening::Person);
    }

    pub(super) fn killed(&mut self) {
        self.kills += 1;
    }
}

/// The wire.
impl World {
    pub(super) fn connect(&mut self) -> u32 {
        self.links += 1;
        self.links
    }

    fn arrives(&mut self, link: u32, lane: Lane, to_source: bool) -> Duration {
        // Pages take longer, so that there is something to break.
        let bits = if lane == Lane::Bulk && !to_source { 10 } else { 6 };
        let soonest = self.now + self.random.millis(bits);
        let last = self.arrivals.entry((link, lane, to_source)).or_default();
        *last = (*last).max(soonest);
        *last
    }

    pub(super) fn send(&mut self, link: u32, lane: Lane, sent: Sent) {
        let at = self.arrives(link, lane, false);
        self.at(at, Happening::ToDestination { link, lane, sent });
    }

    pub(super) fn say(&mut self, link: u32, said: Said) {
        let lane = Lane::Demand;
        let at = self.arrives(link, lane, true);
        self.at(at, Happening::ToSource { link, lane, said });
    }

    /// The source has ended its lanes: what was sent may still come.
    pub(super) fn source_hangs_up(&mut self, link: u32, sends_rest: bool) {
        if !sends_rest {
            self.cut.extend(LANES.map(|lane| (link, lane)));
        }
        let at = LANES.map(|lane| self.arrives(link, lane, false)).into_iter().max();
        self.at(at.unwrap_or(self.now), Happening::DestinationLoses { link });
    }

    pub(super) fn destination_hangs_up(&mut self, link: u32, sends_rest: bool) {
        if !sends_rest {
            self.cut.extend(LANES.map(|lane| (link, lane)));
        }
        for lane in LANES {
            let at = self.arrives(link, lane, true);
            self.at(at, Happening::SourceLoses { link, lane });
        }
    }

    /// The network loses one lane, or all; the ends hear of it at different times.
    fn cut_lanes(&mut self, whole: bool) {
        let Some(link) = self.source.link.or(self.destination.link) else { return };
        self.note(format_args!("lanes {link} are cut, all of them: {whole}"));
        let bulk = self.random.percent(50);
        let one = if bulk { Lane::Bulk } else { Lane::Demand };
        for lane in LANES.into_iter().filter(|&lane| whole || lane == one) {
            self.cut.insert((link, lane));
            let at = self.now + self.random.millis(13);
            self.at(at, Happening::SourceLoses { link, lane });
            let at = self.now + self.random.millis(13);
            self.at(at, Happening::DestinationLoses { link });
        }
    }

    /// The source has dialled: to open lanes, or to say a word.
    fn dialled(&mut self, process: u32, epoch: u32, word: Option<Word>) {
        if !self.source.is(process) {
            return;
        }
        let is_lost = !self.is_well() && self.random.percent(10);
        let accepted = match is_lost {
            true => Err(nobody(std::io::ErrorKind::TimedOut)),
            false => self.destination_accepts(epoch),
        };
        self.note(format_args!("source dials {epoch}, {word:?}: {accepted:?}"));
        let breaks = !self.is_well() && self.random.percent(10);
        let input = match (accepted, word) {
            (Err(error), None) => Input::Opened(Opened::NotNow(error)),
            (Err(error), Some(_)) => Input::Called(Called::NotOpened(error)),
            (Ok(link), None) if breaks => {
                self.at(self.now + Duration::from_secs(2), Happening::DestinationLoses { link });
                self.cut.extend(LANES.map(|lane| (link, lane)));
                Input::Opened(Opened::NotNow(lost("demand lane")))
            }
            (Ok(link), None) => {
                let standing = self.destination_stands();
                self.source.opened(link, &self.destination.have);
                self.destination_goes_on(link);
                Input::Opened(Opened::Lanes(standing))
            }
            (Ok(link), Some(word)) => {
                let is_heard = !breaks && self.destination_hears_word(&word);
                self.at(self.now, Happening::DestinationLoses { link });
                match is_heard {
                    true => Input::Called(Called::Heard),
                    false => Input::Called(Called::NotHeard(lost("demand lane"))),
                }
            }
        };
        self.tell_source(input);
    }
}

/// The source's monitor, which does one thing after the other.
impl World {
    pub(super) fn ask(&mut self, question: Question) {
        let process = self.source.process_number();
        let begins = self.monitor_busy.max(self.now);
        self.monitor_busy = begins + self.random.millis(9);
        if !self.is_well() && self.random.percent(self.habits.stuck) {
            self.monitor_busy = self.monitor_busy.max(CHAOS + self.random.millis(14));
        }
        self.at(self.monitor_busy, Happening::Monitor { process, question });
    }

    fn monitor_does(&mut self, process: u32, question: Question) {
        // The connection has gone with its process.
        if !self.source.is(process) {
            return;
        }
        let is_wrong = !self.is_well() && self.random.percent(self.habits.wrong);
        self.note(format_args!("monitor does {question:?}, wrongly: {is_wrong}"));
        let result = match is_wrong {
            true => Err(Error::Host("it refuses".into())),
            false => Ok(()),
        };
        let answer = match question {
            Question::Track | Question::Look => unreachable!("there are no rounds here"),
            Question::Stop => {
                // Written down before anything is changed.
                self.source.stops(self.habits.is_kept);
                self.runs_here = is_wrong && self.runs_here;
                Answer::Stopped(result.map(|()| None))
            }
            Question::Save => Answer::Saved(result.map(|()| vec![0; STATE_BYTES])),
            Question::StandsStill if self.runs_here => {
                Answer::StandsStill(Err(Error::Host("the guest runs".into())))
            }
            Question::StandsStill => Answer::StandsStill(result),
            Question::PutBack => Answer::PutBack(result),
            Question::Resume => {
                self.runs_here |= !is_wrong;
                Answer::Resumed(result)
            }
        };
        // One that answers something else does not answer. Where that is whether a lost switchover may leave again,
        // nothing but a new process ends the waiting yet (docs/design/control.md).
        let is_silent = !self.is_well() && self.random.percent(self.habits.wrong);
        if is_silent && question != Question::StandsStill {
            return;
        }
        self.soon(Happening::Answered { process, answer });
    }
}

pub(super) fn lost(lane: &str) -> Error {
    Error::Lost { side: "destination", lane: lane.into(), what: "reset".into() }
}

pub(super) fn nobody(kind: std::io::ErrorKind) -> Error {
    Error::Connect { uri: "tcp:host:1".into(), source: kind.into() }
}

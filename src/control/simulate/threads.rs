//! The threads, the guest and the monitor of the destination's core. The threads land pages.
//!
//! Each lane has a thread, which posts its messages and the fate of its lane to an inbox, in order. A received page
//! lands for a while. Accepted lanes are unused until the core serves them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use umem_wire::{Event as Said, Frame, LaneRole, Standing};

use super::Random;
use super::destination::Word;
use super::rounds::Copies;
use super::world::{CHUNK, Happening, LANES, Lane, PAGES, Reply, STATE_BYTES, Sent, World, nobody};
use crate::control::destination::farewell;
use crate::control::destination::takeover::Recalled;
use crate::control::destination::{Exit, FreeSpace, Input};
use crate::error::{Error, Result, lane_name};

/// Events of the destination alone.
#[derive(Clone, Copy, Debug)]
pub(super) enum Own {
    /// The core handles the next message of its inbox.
    Turn,
    /// The monitor carries out a command.
    Monitor(Asked),
    /// The monitor answers, late.
    Answers(Asked),
    /// A received page becomes visible, unless its lane is gone.
    Landed { link: u32, page: u64, version: u32 },
    /// In rounds: a copy of a page is written to its file.
    Copied { link: u32, page: u64, version: u32 },
    /// Every copy received on the bulk lane is written.
    RoundsEnded { link: u32 },
    /// The guest touches this page.
    Touches(u64),
    /// The demand thread releases its lane.
    LetsGo { link: u32 },
    /// A source that has received the notice has had time to close its lanes.
    HasClosed { link: u32 },
}

/// A command to the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Prepare,
    Load,
    Run,
}

/// When the guest's process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bond {
    /// With umem, whether it exits or is killed.
    Bound,
    /// When umem exits.
    Held,
    /// By itself only: it waits for a takeover.
    Kept,
    /// The same; it was told that it is complete.
    Released,
    Ended,
}

/// The guest's process.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) bond: Bond,
    pub(super) runs: bool,
    /// It has belonged to this side at some time.
    pub(super) is_ours: bool,
    /// It has ended by itself, without a fault of either side.
    pub(super) has_died: bool,
    /// Pages that it waits for.
    pub(super) touched: BTreeSet<u64>,
    /// The memory file, which the process keeps: the progress of the switchover, from *switched* on.
    pub(super) noted: Option<Recalled>,
}

/// Accepted lanes.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) link: u32,
    /// Data that has already arrived on them.
    early: VecDeque<Sent>,
    lost: Vec<Lane>,
}

/// The threads of one process.
#[derive(Debug)]
pub(super) struct Threads {
    /// The link whose demand lane the demand thread serves.
    pub(super) demand: Option<u32>,
    /// The demand thread has released the lane, or will soon.
    is_letting_go: bool,
    /// The link whose bulk lane the bulk thread serves.
    pub(super) bulk: Option<u32>,
    /// Pages on the bulk lane are copies, which come again.
    pub(super) is_in_rounds: bool,
    pub(super) copies: Copies,
    /// Landing pages, with their link and lane.
    pub(super) landing: BTreeMap<u64, (u32, Lane)>,
    /// Accepted lanes that are not served yet.
    pub(super) arrived: Option<Arrived>,
    /// The epoch of the last accepted attempt.
    epoch: u32,
    inbox: VecDeque<Input>,
    last_turn: Duration,
    /// The source has said goodbye. The ping behind it is answered at the end.
    has_parted: bool,
    ping: Option<u64>,
    /// The core knows that every page is cached.
    pub(super) has_all: bool,
}

impl Threads {
    pub(super) fn new(link: Option<u32>) -> Threads {
        Threads {
            demand: link,
            is_letting_go: false,
            bulk: link,
            is_in_rounds: false,
            copies: Copies::default(),
            landing: BTreeMap::new(),
            arrived: None,
            epoch: 0,
            inbox: VecDeque::new(),
            last_turn: Duration::ZERO,
            has_parted: false,
            ping: None,
            has_all: false,
        }
    }

    /// The links that are served at least in part.
    fn links(&self) -> impl Iterator<Item = u32> + use<> {
        let arrived = self.arrived.as_ref().map(|arrived| arrived.link);
        [self.demand, self.bulk, arrived].into_iter().flatten().collect::<BTreeSet<_>>().into_iter()
    }

    /// Drops a question whose process was killed before the answer.
    pub(super) fn forget_question(&mut self) {
        self.ping = None;
    }

    /// The cause of a failure: a later failure in the inbox may explain the loss of a lane.
    pub(super) fn first_cause(&mut self, error: Error) -> Error {
        let is_effect = |error: &Error| matches!(error, Error::Lost { lane, .. } if *lane != name(Lane::Demand));
        if !is_effect(&error) {
            return error;
        }
        for input in self.inbox.drain(..) {
            let cause = match input {
                Input::Failed(error)
                | Input::LaneLost { error, .. }
                | Input::NoRoom { error, .. } => error,
                Input::Received(Said::Error(fault)) => {
                    Error::Peer { side: "source", code: fault.code, text: fault.text }
                }
                _ => continue,
            };
            if !is_effect(&cause) {
                return cause;
            }
        }
        error
    }
}

fn name(lane: Lane) -> String {
    match lane {
        Lane::Demand => lane_name(LaneRole::Demand, 0),
        Lane::Bulk => lane_name(LaneRole::Bulk, 1),
    }
}

fn lost(lane: Lane) -> Input {
    let error = Error::Lost { side: "source", lane: name(lane), what: "reset".into() };
    let lane = match lane {
        Lane::Demand => LaneRole::Demand,
        Lane::Bulk => LaneRole::Bulk,
    };
    Input::LaneLost { lane, error }
}

/// The inbox.
impl World {
    pub(super) fn later(&mut self, what: Own) {
        let process = self.destination.number;
        self.soon(Happening::Destination { process, what });
    }

    pub(super) fn post(&mut self, input: Input) {
        let process = self.destination.number;
        let soon = self.now + self.random.millis(3);
        let threads = &mut self.destination.threads;
        threads.last_turn = threads.last_turn.max(soon);
        threads.inbox.push_back(input);
        let at = threads.last_turn;
        self.at(at, Happening::Destination { process, what: Own::Turn });
    }

    pub(super) fn destination_does(&mut self, process: u32, what: Own) {
        if self.destination.number != process {
            return;
        }
        match what {
            Own::Turn => {
                if let Some(input) = self.destination.threads.inbox.pop_front() {
                    self.tell_destination(input);
                }
            }
            Own::Monitor(asked) => self.destination_monitor_does(asked),
            Own::Answers(Asked::Prepare) => {}
            Own::Answers(Asked::Load) => self.post(Input::Loaded { runs: true }),
            Own::Answers(Asked::Run) => self.post(Input::Running),
            Own::Landed { link, page, version } => self.lands(link, page, version),
            Own::Copied { link, page, version } => self.copied(link, page, version),
            Own::RoundsEnded { link } => self.rounds_have_ended(link),
            Own::Touches(page) => self.touches(page),
            Own::LetsGo { link } => self.lets_go(link),
            Own::HasClosed { link } => self.has_closed(link),
        }
    }
}

/// Lanes.
impl World {
    pub(super) fn destination_hears(&mut self, link: u32, lane: Lane, sent: Sent) {
        if self.destination.closing == Some(link) {
            return self.hears_goodbye(sent);
        }
        let threads = &mut self.destination.threads;
        if let Some(arrived) = threads.arrived.as_mut().filter(|arrived| arrived.link == link) {
            arrived.early.push_back(sent);
            return;
        }
        let is_served = match lane {
            Lane::Demand => threads.demand == Some(link) && !threads.is_letting_go,
            Lane::Bulk => threads.bulk == Some(link),
        };
        if is_served {
            self.hears(link, lane, sent);
        }
    }

    fn hears(&mut self, link: u32, lane: Lane, sent: Sent) {
        let frame = match sent {
            Sent::Page { page, version } => return self.page_comes(link, lane, page, version),
            Sent::Remaining { pages, last } => return self.remaining_come(pages, last),
            Sent::State => {
                self.post(Input::Received(Said::DeviceState(vec![0; STATE_BYTES])));
                let state_bytes = STATE_BYTES as u64;
                return self.post(Input::Received(Said::Load { state_bytes }));
            }
            Sent::Frame(frame) => frame,
        };
        let said = match frame {
            Frame::Ping(number) if self.destination.threads.has_parted => {
                self.destination.threads.ping = Some(number);
                return;
            }
            Frame::Ping(number) => return self.say(link, Reply::Said(Said::Pong(number))),
            Frame::Regions(table) => return self.post(Input::Begin(table)),
            Frame::Rounds => Said::Rounds,
            Frame::RoundsEnd => return self.rounds_end_comes(link),
            Frame::Complete(totals) => {
                self.destination.threads.has_parted = true;
                Said::Complete(totals)
            }
            Frame::Stopped { postcopy, background } => Said::Stopped { postcopy, background },
            Frame::Switchover { stopped_us } => Said::Switchover { stopped_us },
            Frame::Digests(digests) => Said::Digests(digests),
            Frame::Pong(number) => Said::Pong(number),
            Frame::Error(fault) => Said::Error(fault),
            other => unreachable!("{other:?} of a source"),
        };
        self.post(Input::Received(said));
    }

    fn page_comes(&mut self, link: u32, lane: Lane, page: u64, version: u32) {
        let is_copy = lane == Lane::Bulk && self.destination.threads.is_in_rounds;
        let has_come = self.destination.have.contains(&page)
            || self.destination.threads.landing.contains_key(&page);
        if has_come && !is_copy {
            return self.violated("a page comes twice");
        }
        if !self.is_well() && self.random.percent(self.habits.short) {
            let error = Error::OutOfMemory("no space".into());
            let free = self.random.percent(50).then(|| FreeSpace { ram: "ram0".into(), bytes: 0 });
            return self.thread_loses(link, lane, Input::NoRoom { error, free });
        }
        if is_copy {
            return self.copy_comes(link, page, version);
        }
        self.destination.threads.landing.insert(page, (link, lane));
        let (process, at) = (self.destination.number, self.now + self.random.millis(5));
        self.at(at, Happening::Destination { process, what: Own::Landed { link, page, version } });
    }

    fn lands(&mut self, link: u32, page: u64, version: u32) {
        let threads = &mut self.destination.threads;
        let is_served = match threads.landing.get(&page) {
            Some(&(of, Lane::Demand)) => of == link && threads.demand == Some(link),
            Some(&(of, Lane::Bulk)) => of == link && threads.bulk == Some(link),
            None => false,
        };
        if !is_served {
            return;
        }
        threads.landing.remove(&page);
        self.destination.have.insert(page);
        self.destination.contents.insert(page, version);
        self.destination.guest.touched.remove(&page);
        if self.destination.has_all()
            && !std::mem::replace(&mut self.destination.threads.has_all, true)
        {
            self.post(Input::AllCached);
        }
    }

    /// The end of a lane, as its thread notices it.
    pub(super) fn destination_loses(&mut self, link: u32, lane: Lane) {
        if let Some(closing) = self.destination.closing.filter(|&closing| closing == link) {
            return self.has_closed(closing);
        }
        let threads = &mut self.destination.threads;
        if let Some(arrived) = threads.arrived.as_mut().filter(|arrived| arrived.link == link) {
            arrived.lost.push(lane);
            return;
        }
        self.thread_loses(link, lane, lost(lane));
    }

    fn thread_loses(&mut self, link: u32, lane: Lane, note: Input) {
        let threads = &mut self.destination.threads;
        match lane {
            Lane::Demand if threads.demand == Some(link) && !threads.is_letting_go => {
                if threads.has_parted && matches!(note, Input::LaneLost { .. }) {
                    return;
                }
                threads.is_letting_go = true;
                self.post(note);
                self.later(Own::LetsGo { link });
            }
            Lane::Bulk if threads.bulk == Some(link) => {
                threads.bulk = None;
                self.post(note);
            }
            _ => return,
        }
        self.hang_up_lane(link, lane);
    }

    /// No operation of the demand lane is in flight any more.
    fn lets_go(&mut self, link: u32) {
        if self.destination.threads.demand == Some(link) {
            self.destination.threads.demand = None;
            self.destination.threads.is_letting_go = false;
            if self.destination.is_migrating() {
                self.post(Input::Quiet);
            }
        }
    }

    /// Closes all lanes. The bulk threads have ended afterwards.
    pub(super) fn sever(&mut self) {
        let links = [self.destination.threads.demand, self.destination.threads.bulk];
        for link in links.into_iter().flatten().collect::<BTreeSet<_>>() {
            for lane in LANES {
                self.thread_loses(link, lane, lost(lane));
            }
        }
    }

    /// Continues over the accepted lanes.
    pub(super) fn reconnect(&mut self, standing: Standing, is_complete: bool) {
        let Some(Arrived { link, early, lost }) = self.destination.threads.arrived.take() else {
            return self.violated("lanes that nobody has opened");
        };
        let threads = &mut self.destination.threads;
        if threads.demand.is_some() || threads.bulk.is_some() {
            return self.violated("lanes are served beside others");
        }
        (threads.demand, threads.bulk) = (Some(link), Some(link));
        let have = self.destination.have.clone();
        self.say(link, Reply::Account { standing, have });
        if is_complete {
            self.say_complete(link);
        }
        for page in self.destination.guest.touched.clone() {
            self.say(link, Reply::Request(page));
        }
        for sent in early {
            let lane = if matches!(sent, Sent::Page { .. }) { Lane::Bulk } else { Lane::Demand };
            self.destination_hears(link, lane, sent);
        }
        for lane in lost {
            self.destination_loses(link, lane);
        }
    }

    /// Landing pages become missing again.
    pub(super) fn roll_back(&mut self) {
        self.destination.threads.landing.clear();
    }

    /// Answers the ping behind a goodbye. With `sends_rest` pending data still arrives.
    pub(super) fn end_destination_threads(&mut self, sends_rest: bool) {
        let threads = &mut self.destination.threads;
        let question = threads.ping.take().zip(threads.demand.filter(|_| !threads.is_letting_go));
        if let Some((number, link)) = question {
            self.say(link, Reply::Said(Said::Pong(number)));
        }
        for link in self.destination.threads.links() {
            self.destination_hangs_up(link, sends_rest);
        }
        let threads = &mut self.destination.threads;
        (threads.demand, threads.bulk, threads.arrived) = (None, None, None);
        threads.landing.clear();
    }

    pub(super) fn drop_arrived(&mut self) {
        if let Some(Arrived { link, .. }) = self.destination.threads.arrived.take() {
            self.destination_hangs_up(link, true);
        }
    }

    /// Sends on the demand lane, if there is one.
    pub(super) fn reply(&mut self, said: Said) {
        let threads = &self.destination.threads;
        if let Some(link) = threads.demand.filter(|_| !threads.is_letting_go) {
            self.say(link, Reply::Said(said));
        }
    }

    pub(super) fn say_complete(&mut self, link: u32) {
        if self.habits.is_checked && self.destination.number == 1 {
            self.say(link, Reply::Said(Said::Digests(vec![7])));
        }
        let totals = self.destination.totals();
        self.say(link, Reply::Said(Said::Complete(totals)));
    }

    /// A source dials: whether the entrance accepts lanes of this attempt.
    pub(super) fn destination_accepts(&mut self, epoch: u32) -> Result<u32> {
        if !self.destination.is_alive() {
            return Err(nobody(std::io::ErrorKind::ConnectionRefused));
        }
        let stale = (epoch <= self.destination.threads.epoch)
            .then(|| (umem_wire::FaultCode::Refused, "it is an older attempt".into()));
        if let Some((code, text)) = self.destination.refusal().or(stale) {
            return Err(Error::Peer { side: "destination", code, text });
        }
        self.destination.threads.epoch = epoch;
        self.drop_arrived();
        let link = self.connect();
        self.destination.threads.arrived =
            Some(Arrived { link, early: VecDeque::new(), lost: Vec::new() });
        Ok(link)
    }

    /// Lanes have been accepted.
    pub(super) fn lanes_come(&mut self) {
        if self.destination.is_migrating() {
            self.tell_destination(Input::Came);
        } else {
            self.tell_farewell(farewell::Input::Came);
        }
    }

    /// Sends the notice of the session's end on the accepted lanes.
    pub(super) fn tell_word(&mut self, word: &Word) -> farewell::Input {
        let Some(Arrived { link, early, lost }) = self.destination.threads.arrived.take() else {
            return farewell::Input::NotTold;
        };
        if !lost.is_empty() || !self.is_well() && self.random.percent(10) {
            self.destination_hangs_up(link, false);
            return farewell::Input::NotTold;
        }
        match word {
            Word::Complete(standing) => {
                let (standing, have) = (*standing, (0..PAGES).collect());
                self.say(link, Reply::Account { standing, have });
                self.say(link, Reply::Said(Said::Complete(standing.totals)));
            }
            Word::Ended(error) => self.say(link, Reply::Said(Said::Error(error.to_fault()))),
        }
        self.destination.closing = Some(link);
        for sent in early {
            let (lane, to) = (Lane::Demand, self.now);
            self.at(to, Happening::ToDestination { link, lane, sent });
        }
        farewell::Input::Told
    }

    fn has_closed(&mut self, link: u32) {
        if self.destination.closing != Some(link) {
            return;
        }
        self.destination.closing = None;
        self.destination_hangs_up(link, true);
        let has_word = self.destination.has_goodbye_to_hear();
        self.tell_farewell(if has_word {
            farewell::Input::Closed
        } else {
            farewell::Input::Parted
        });
        self.tell_farewell(farewell::Input::Closed);
    }

    /// A frame from a source that has received the notice.
    fn hears_goodbye(&mut self, sent: Sent) {
        match sent {
            Sent::Frame(Frame::Complete(_) | Frame::Error(_)) => {
                self.tell_farewell(farewell::Input::Parted);
            }
            Sent::Frame(Frame::Ping(number)) => {
                if let Some(link) = self.destination.closing {
                    self.say(link, Reply::Said(Said::Pong(number)));
                }
            }
            _ => {}
        }
    }
}

/// The guest and its monitor.
impl World {
    pub(super) fn ask_destination(&mut self, asked: Asked) {
        let process = self.destination.number;
        let begins = self.destination.monitor_busy.max(self.now);
        let mut at = begins + self.random.millis(9);
        if !self.is_well() && self.random.percent(self.habits.stuck) {
            at = at.max(super::CHAOS + self.random.millis(14));
        }
        self.destination.monitor_busy = at;
        self.at(at, Happening::Destination { process, what: Own::Monitor(asked) });
    }

    fn destination_monitor_does(&mut self, asked: Asked) {
        // A monitor that still exists obeys a command that it read before umem was killed.
        if self.destination.guest.bond == Bond::Ended
            || !self.destination.is_alive() && self.random.percent(50)
        {
            return;
        }
        let is_wrong = !self.is_well() && self.random.percent(self.habits.wrong);
        self.note(format_args!("destination's monitor does {asked:?}, wrongly: {is_wrong}"));
        let answer = match asked {
            _ if is_wrong => Some(Input::Failed(Error::Host("it refuses".into()))),
            Asked::Prepare => None,
            Asked::Load => {
                let page = self.random.below(PAGES);
                self.later(Own::Touches(page));
                Some(Input::Loaded { runs: true })
            }
            Asked::Run => {
                self.destination.guest.runs = true;
                let page = self.random.below(PAGES);
                self.later(Own::Touches(page));
                Some(Input::Running)
            }
        };
        let is_silent = !is_wrong && !self.is_well() && self.random.percent(self.habits.wrong);
        let Some(answer) = answer.filter(|_| self.destination.is_alive()) else { return };
        match is_silent {
            false => self.post(answer),
            // Without a takeover only the answer helps.
            true if !self.habits.is_kept => {
                let at = super::CHAOS + self.random.millis(14);
                let process = self.destination.number;
                self.at(at, Happening::Destination { process, what: Own::Answers(asked) });
            }
            true => {}
        }
    }

    fn touches(&mut self, page: u64) {
        let guest = &mut self.destination.guest;
        if guest.bond == Bond::Ended || self.destination.have.contains(&page) {
            return;
        }
        guest.touched.insert(page);
        let threads = &self.destination.threads;
        if let Some(link) = threads.demand.filter(|_| !threads.is_letting_go) {
            self.say(link, Reply::Request(page));
        }
    }

    /// The guest's process ends by itself.
    pub(super) fn guest_dies(&mut self) {
        let guest = &mut self.destination.guest;
        if guest.bond == Bond::Ended {
            return;
        }
        guest.ends();
        guest.has_died = true;
        self.note(format_args!("the destination's guest dies"));
        if self.destination.is_alive() {
            let exit = self.exit();
            self.post(Input::GuestEnded(exit));
        }
    }

    /// The end of the guest's process; unknown if it is no child.
    pub(super) fn exit(&self) -> Exit {
        let is_child = self.destination.number == 1;
        match self.destination.has_all() && !is_child {
            true => Exit::Fine,
            false => Exit::Failed { how: String::new() },
        }
    }

    /// Bytes of device state and memory that have arrived.
    pub(super) fn moved_bytes(&self) -> u64 {
        (self.destination.have.len() as u64 + self.destination.threads.landing.len() as u64) * CHUNK
            + self.destination.threads.copies.bytes
    }
}

impl Guest {
    pub(super) fn new() -> Guest {
        Guest {
            bond: Bond::Bound,
            runs: false,
            is_ours: false,
            has_died: false,
            touched: BTreeSet::new(),
            noted: None,
        }
    }

    pub(super) fn ends(&mut self) {
        (self.bond, self.runs) = (Bond::Ended, false);
    }

    /// umem has exited, or was killed.
    pub(super) fn outlives(&mut self, was_killed: bool) {
        let ends = match self.bond {
            Bond::Bound => true,
            Bond::Held => !was_killed,
            Bond::Kept | Bond::Released | Bond::Ended => false,
        };
        if ends {
            self.ends();
        }
    }
}

/// This percentage of processes is killed at some effect.
pub(super) fn kills(random: &mut Random) -> VecDeque<u64> {
    let count = [0, 0, 1, 1, 2, 3][random.below(6) as usize];
    (0..count).map(|_| random.below(80)).collect()
}

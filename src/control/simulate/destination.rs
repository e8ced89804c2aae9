//! A destination as the source sees it: over the wire's phases, with a record, a guest that outlives its umem, and a
//! person.

use std::collections::BTreeSet;
use std::time::Duration;

use umem_wire::destination::{Input as Step, Phase};
use umem_wire::{Event as Said, Fault as Reason, FaultCode, Frame, Standing, Totals};

use super::world::{Happening, PAGES, STATE_BYTES, Sent, World, nobody};
use crate::control::calling::Word;
use crate::error::{Error, Result};

/// How long one that has everything waits for a source that has not heard of it.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(30);

/// What happens by itself.
#[derive(Clone, Copy, Debug)]
pub(super) enum Own {
    Ready,
    Loaded {
        is_wrong: bool,
    },
    Runs,
    /// It has waited for the source for long enough.
    GivesUpWaiting {
        since: u32,
    },
    /// The guest touches this page.
    Touches(u64),
    /// It is complete, and has said all it had to.
    Ends,
}

/// What lies on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Loaded,
    Switched,
    Running,
    Complete,
    Parted,
}

/// The guest there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guest {
    /// Its process has ended, or it has never been loaded.
    Gone,
    Waits,
    Runs,
}

#[derive(Debug)]
pub(super) struct Destination {
    /// What its umem does; none where none runs.
    phase: Option<Phase>,
    number: u32,
    epoch: u32,
    pub(super) link: Option<u32>,
    record: Option<State>,
    guest: Guest,
    pub(super) have: BTreeSet<u64>,
    loads: bool,
    is_loaded: bool,
    losses: u32,
}

impl Destination {
    pub(super) fn new() -> Destination {
        Destination {
            phase: Some(Phase::new()),
            number: 1,
            epoch: 0,
            link: None,
            record: None,
            guest: Guest::Gone,
            have: BTreeSet::new(),
            loads: false,
            is_loaded: false,
            losses: 0,
        }
    }

    pub(super) fn runs(&self) -> bool {
        self.guest == Guest::Runs
    }

    pub(super) fn is_alive(&self) -> bool {
        self.phase.is_some()
    }

    fn has_all(&self) -> bool {
        self.have.len() as u64 == PAGES
    }

    /// The source's memory and record are of no use to it.
    pub(super) fn can_do_alone(&self) -> bool {
        match self.guest {
            Guest::Gone => false,
            Guest::Waits => self.has_all() && self.record >= Some(State::Switched),
            Guest::Runs => self.has_all(),
        }
    }

    /// Nobody has to look after it: there is no guest, or it runs alone.
    pub(super) fn is_settled(&self) -> bool {
        match self.record {
            None => true,
            Some(State::Complete | State::Parted) => self.runs() && self.has_all(),
            Some(_) => false,
        }
    }
}

impl World {
    fn later(&mut self, what: Own) {
        let process = self.destination.number;
        self.soon(Happening::Destination { process, what });
    }

    fn reply(&mut self, said: Said) {
        if let Some(link) = self.destination.link {
            self.source_hears(link, said);
        }
    }

    fn step_destination(&mut self, input: Step<'_>) -> bool {
        let Some(phase) = self.destination.phase.take() else { return false };
        match phase.step(input) {
            Ok(phase) => {
                self.destination.phase = Some(phase);
                true
            }
            Err((phase, error)) => {
                self.destination.phase = Some(phase);
                self.destination_fails(&Error::protocol("demand lane", error));
                false
            }
        }
    }

    fn is_phase(&self, is: impl FnOnce(&Phase) -> bool) -> bool {
        self.destination.phase.as_ref().is_some_and(is)
    }

    pub(super) fn destination_hears(&mut self, sent: Sent) {
        match sent {
            Sent::Frame(Frame::Regions(table)) => {
                if self.step_destination(Step::Received(&Said::Regions(table))) {
                    self.later(Own::Ready);
                }
            }
            Sent::Frame(Frame::Stopped { postcopy, background }) => {
                self.step_destination(Step::Received(&Said::Stopped { postcopy, background }));
            }
            Sent::State => {
                let state = Said::DeviceState(vec![0; STATE_BYTES]);
                let state_bytes = STATE_BYTES as u64;
                if self.step_destination(Step::Received(&state))
                    && self.step_destination(Step::Received(&Said::Load { state_bytes }))
                {
                    self.destination.loads = true;
                    let is_wrong = !self.is_well() && self.random.percent(5);
                    self.later(Own::Loaded { is_wrong });
                }
            }
            Sent::Frame(Frame::Switchover { stopped_us }) => {
                if self.step_destination(Step::Received(&Said::Switchover { stopped_us })) {
                    self.destination.record = self.destination.record.map(|_| State::Switched);
                    self.later(Own::Runs);
                }
            }
            Sent::Page(page) => {
                self.destination.have.insert(page);
                self.destination_may_be_loaded();
                self.destination_may_be_complete();
            }
            Sent::Frame(Frame::Complete(totals)) => {
                if self.step_destination(Step::Received(&Said::Complete(totals))) {
                    self.destination.record = self.destination.record.map(|_| State::Parted);
                    self.later(Own::Ends);
                }
            }
            Sent::Frame(Frame::Ping(number)) => self.reply(Said::Pong(number)),
            Sent::Frame(Frame::Error(fault)) => self.source_gives_up(&fault),
            Sent::Frame(_) => {}
        }
    }

    /// Its goodbye has come, and there is nothing more to answer.
    fn end_if_complete(&mut self) {
        if !self.is_phase(|phase| matches!(phase, Phase::Completed(_))) {
            return;
        }
        self.note(format_args!("destination has ended, complete"));
        if self.is_phase(|phase| matches!(phase, Phase::Completed(Some(_)))) {
            self.destination.record = None;
        }
        self.hang_up_and_end(true);
    }

    fn hang_up_and_end(&mut self, sends_rest: bool) {
        self.destination.phase = None;
        if let Some(link) = self.destination.link.take() {
            self.destination_hangs_up(link, sends_rest);
        }
    }

    fn source_gives_up(&mut self, fault: &Reason) {
        if self.is_phase(|phase| matches!(phase, Phase::Completed(_) | Phase::Completing)) {
            return self.end_if_complete();
        }
        let code = fault.code;
        self.destination_fails(&Error::Peer { side: "source", code, text: fault.text.clone() });
    }

    /// It cannot go on. Once the guest is its own it stays, for a umem that takes over.
    fn destination_fails(&mut self, error: &Error) {
        self.note(format_args!("destination fails: {error}"));
        if self.destination.link.is_some() && !matches!(error, Error::Peer { .. }) {
            self.reply(Said::Error(error.to_fault()));
        }
        let stays = match self.destination.record {
            None => self.destination.guest == Guest::Runs,
            Some(State::Loaded) => !matches!(error, Error::Peer { .. }),
            Some(_) => true,
        };
        if !stays {
            (self.destination.guest, self.destination.record) = (Guest::Gone, None);
        }
        self.hang_up_and_end(true);
    }

    fn destination_may_be_loaded(&mut self) {
        let Some(Phase::Loading { mode, .. }) = self.destination.phase else { return };
        if !self.destination.is_loaded || !(mode.postcopy || self.destination.has_all()) {
            return;
        }
        if self.habits.is_kept {
            self.destination.record = Some(State::Loaded);
        }
        self.destination.guest = Guest::Waits;
        if self.step_destination(Step::StateLoaded) {
            self.reply(Said::Loaded);
        }
    }

    fn destination_may_be_complete(&mut self) {
        if !self.destination.has_all()
            || !self.is_phase(|phase| matches!(phase, Phase::Running { .. }))
        {
            return;
        }
        self.destination.record = self.destination.record.map(|_| State::Complete);
        if self.step_destination(Step::AllCached) {
            self.say_complete();
        }
    }

    fn say_complete(&mut self) {
        if self.habits.is_checked {
            self.reply(Said::Digests(vec![7]));
        }
        self.reply(Said::Complete(Totals::default()));
    }

    pub(super) fn destination_does(&mut self, process: u32, what: Own) {
        if !self.destination.is_alive() || self.destination.number != process {
            return;
        }
        self.note(format_args!("destination: {what:?}"));
        match what {
            Own::Ready => {
                if self.step_destination(Step::GuestReady) {
                    let table = self.table();
                    self.reply(Said::Ready(table));
                }
            }
            Own::Loaded { is_wrong: true } => {
                self.destination_fails(&Error::Host("the state does not load".into()));
            }
            Own::Loaded { is_wrong: false } => {
                self.destination.is_loaded = true;
                self.destination_may_be_loaded();
            }
            Own::Runs => {
                self.destination.guest = Guest::Runs;
                self.destination.record = self.destination.record.map(|_| State::Running);
                if self.step_destination(Step::GuestRunning) {
                    self.reply(Said::Running { us_since_switchover: 1 });
                }
                let page = self.random.below(PAGES);
                self.later(Own::Touches(page));
                self.destination_may_be_complete();
            }
            Own::Touches(page) => {
                if let Some(link) = self.destination.link {
                    self.source_answers(link, page);
                }
            }
            Own::Ends => self.end_if_complete(),
            Own::GivesUpWaiting { since } => {
                if since == self.destination.losses
                    && self.destination.link.is_none()
                    && self.is_phase(|phase| matches!(phase, Phase::Completing))
                {
                    self.step_destination(Step::Lost);
                    self.end_if_complete();
                }
            }
        }
    }

    pub(super) fn destination_loses_lanes(&mut self) {
        self.destination.link = None;
        self.destination.losses += 1;
        if self.is_phase(|phase| matches!(phase, Phase::Completed(_))) {
            return self.end_if_complete();
        }
        if !self.habits.recovers {
            return match self.is_phase(|phase| matches!(phase, Phase::Completing)) {
                true => {
                    self.step_destination(Step::Lost);
                    self.end_if_complete();
                }
                false => self.destination_fails(&super::world::lost("demand lane")),
            };
        }
        if self.step_destination(Step::Broken) {
            self.wait_for_the_source();
        }
    }

    fn wait_for_the_source(&mut self) {
        if self.is_phase(|phase| matches!(phase, Phase::Completing)) {
            let (process, since) = (self.destination.number, self.destination.losses);
            let what = Own::GivesUpWaiting { since };
            self.at(self.now + GOODBYE_PATIENCE, Happening::Destination { process, what });
        }
    }

    /// Whether it takes lanes of this attempt; those before are lost then.
    pub(super) fn destination_accepts(&mut self, epoch: u32) -> Result<u32> {
        if !self.destination.is_alive() {
            return Err(nobody(std::io::ErrorKind::ConnectionRefused));
        }
        if !self.is_phase(Phase::outlives_its_lanes) || epoch <= self.destination.epoch {
            let text = "its lanes are not to be replaced".into();
            return Err(Error::Peer { side: "destination", code: FaultCode::Refused, text });
        }
        self.destination.epoch = epoch;
        self.destination.losses += 1;
        let link = self.connect();
        self.destination.link = Some(link);
        Ok(link)
    }

    pub(super) fn destination_stands(&self) -> Standing {
        let switched = !self.is_phase(|phase| matches!(phase, Phase::Loaded { .. }));
        let running = (switched && self.destination.runs()).then_some(1);
        Standing { switched, running, totals: Totals::default() }
    }

    /// The source has read what it has.
    pub(super) fn destination_goes_on(&mut self, link: u32) {
        self.destination.link = Some(link);
        if self.is_phase(|phase| matches!(phase, Phase::Completing)) {
            self.say_complete();
        } else if self.destination.runs() {
            let page = self.random.below(PAGES);
            self.later(Own::Touches(page));
        }
    }

    /// On lanes that were opened for nothing else.
    pub(super) fn destination_hears_word(&mut self, word: &Word) -> bool {
        match word {
            Word::Goodbye => {
                let is_complete = self.is_phase(|phase| matches!(phase, Phase::Completing));
                if is_complete {
                    self.destination_hears(Sent::Frame(Frame::Complete(Totals::default())));
                    self.end_if_complete();
                }
                is_complete
            }
            Word::GaveUp(fault) => {
                self.source_gives_up(fault);
                true
            }
        }
    }

    pub(super) fn kill_destination(&mut self) {
        if !self.destination.is_alive() {
            return;
        }
        self.note(format_args!("destination is killed"));
        if self.destination.record.is_none() && self.destination.guest == Guest::Waits {
            self.destination.guest = Guest::Gone;
        }
        self.hang_up_and_end(false);
        let at = self.now + self.random.millis(13);
        self.at(at, Happening::StartDestination);
    }

    /// Somebody starts umem again with `--resume`.
    pub(super) fn resume_destination(&mut self) {
        if self.destination.is_alive() {
            return;
        }
        let Some(state) = self.destination.record else { return };
        self.note(format_args!("destination is resumed: {state:?}"));
        self.destination.number += 1;
        self.destination.epoch = 0;
        self.destination.losses += 1;
        let mode = umem_wire::destination::Mode { postcopy: true, background: true };
        let stopped_us = 1;
        self.destination.phase = Some(match state {
            State::Loaded => Phase::Loaded { mode },
            State::Switched => Phase::Switched { mode, stopped_us },
            State::Running => Phase::Running { mode, stopped_us },
            State::Complete => Phase::Completing,
            State::Parted => {
                self.destination.record = None;
                self.destination.phase = None;
                return;
            }
        });
        if state == State::Switched {
            self.later(Own::Runs);
        }
        self.destination_may_be_complete();
        self.wait_for_the_source();
    }

    /// The person knows that the source is gone for good: a guest that waits there never gets what it misses.
    pub(super) fn leave_destination(&mut self) {
        let is_loaded = self.is_phase(|phase| matches!(phase, Phase::Loaded { .. }))
            || self.destination.record == Some(State::Loaded);
        let is_in_vain = !self.habits.is_kept && (is_loaded || !self.destination.has_all());
        if is_loaded && self.runs_here || is_in_vain {
            self.note(format_args!("the person ends the destination"));
            self.destination.record = None;
            if self.destination.guest == Guest::Waits {
                self.destination.guest = Guest::Gone;
            }
            self.hang_up_and_end(false);
        }
    }
}

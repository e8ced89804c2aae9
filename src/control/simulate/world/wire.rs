//! The wire between the sides: lanes that delay, lose and drop data.

use std::collections::BTreeSet;
use std::time::Duration;

use umem_wire::{Event as Said, Frame, Standing};

use super::{Happening, World};
use crate::control::calling::Word;
use crate::control::simulate::source::Opening;
use crate::error::Error;
use crate::transport::lane::HELLO_TIMEOUT;

/// A lane of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::control::simulate) enum Lane {
    Demand,
    Bulk,
}

pub(in crate::control::simulate) const LANES: [Lane; 2] = [Lane::Demand, Lane::Bulk];

/// Data from the source.
#[derive(Clone, Debug)]
pub(in crate::control::simulate) enum Sent {
    Frame(Frame),
    /// The device state and its end.
    State,
    /// A page with its version, which is the number of writes before it was read.
    Page {
        page: u64,
        version: u32,
    },
    /// Pages that remain after rounds.
    Remaining {
        pages: BTreeSet<u64>,
        last: bool,
    },
}

/// Data from the destination.
#[derive(Clone, Debug)]
pub(in crate::control::simulate) enum Reply {
    Said(Said),
    /// A thread of the guest waits for this page.
    Request(u64),
    /// On new lanes: the standing, and the pages that have arrived.
    Account {
        standing: Standing,
        have: BTreeSet<u64>,
    },
}

/// The wire.
impl World {
    pub(in crate::control::simulate) fn connect(&mut self) -> u32 {
        self.links += 1;
        self.links
    }

    fn arrives(&mut self, link: u32, lane: Lane, to_source: bool) -> Duration {
        // Pages take longer, so that lanes break while they are in transit.
        let bits = if lane == Lane::Bulk && !to_source { 10 } else { 6 };
        let soonest = self.now + self.random.millis(bits);
        let last = self.arrivals.entry((link, lane, to_source)).or_default();
        *last = (*last).max(soonest);
        *last
    }

    pub(in crate::control::simulate) fn send(&mut self, link: u32, lane: Lane, sent: Sent) {
        let at = self.arrives(link, lane, false);
        self.at(at, Happening::ToDestination { link, lane, sent });
    }

    pub(in crate::control::simulate) fn say(&mut self, link: u32, told: Reply) {
        let lane = Lane::Demand;
        let at = self.arrives(link, lane, true);
        self.at(at, Happening::ToSource { link, lane, told });
    }

    /// The source has closed its lanes. Sent data may still arrive.
    pub(in crate::control::simulate) fn source_hangs_up(&mut self, link: u32, sends_rest: bool) {
        for lane in LANES {
            if !sends_rest {
                self.cut.insert((link, lane));
            }
            let at = self.arrives(link, lane, false);
            self.at(at, Happening::DestinationLoses { link, lane });
        }
    }

    pub(in crate::control::simulate) fn destination_hangs_up(
        &mut self,
        link: u32,
        sends_rest: bool,
    ) {
        for lane in LANES {
            if !sends_rest {
                self.cut.insert((link, lane));
            }
            self.hang_up_lane(link, lane);
        }
    }

    /// The destination has closed one lane.
    pub(in crate::control::simulate) fn hang_up_lane(&mut self, link: u32, lane: Lane) {
        let at = self.arrives(link, lane, true);
        self.at(at, Happening::SourceLoses { link, lane });
    }

    /// The network loses one lane, or all. The two ends notice it at different times.
    pub(super) fn cut_lanes(&mut self, whole: bool) {
        let there = self.destination.threads.demand.or(self.destination.threads.bulk);
        let Some(link) = self.source.link.or(there) else { return };
        self.note(format_args!("lanes {link} are cut, all of them: {whole}"));
        let bulk = self.random.percent(50);
        let one = if bulk { Lane::Bulk } else { Lane::Demand };
        for lane in LANES.into_iter().filter(|&lane| whole || lane == one) {
            self.cut_lane(link, lane);
        }
    }

    fn cut_lane(&mut self, link: u32, lane: Lane) {
        self.cut.insert((link, lane));
        let at = self.now + self.random.millis(13);
        self.at(at, Happening::SourceLoses { link, lane });
        let at = self.now + self.random.millis(13);
        self.at(at, Happening::DestinationLoses { link, lane });
    }

    /// The source has dialed, to open lanes or to send one message.
    pub(super) fn dialled(&mut self, attempt: u32, epoch: u32, word: Option<Word>) {
        if !self.source.is_opening(attempt) {
            return;
        }
        if self.is_mistaken_no_more() {
            return self.opening_fails(Error::Interrupted("the person has a look".into()));
        }
        let is_lost = !self.is_well() && self.random.percent(10);
        let accepted = match is_lost {
            true => Err(nobody(std::io::ErrorKind::TimedOut)),
            false => self.destination_accepts(epoch),
        };
        self.note(format_args!("source dials {epoch}, {word:?}: {accepted:?}"));
        let link = match accepted {
            Ok(link) => link,
            Err(error) => return self.opening_fails(error),
        };
        if self.is_knocking() {
            self.lanes_come();
            return self.knocked(link);
        }
        self.source.opening =
            Some(Opening { attempt, link: Some(link), word: word.clone(), has_parted: false });
        self.at(self.now + HELLO_TIMEOUT, Happening::OpeningIsLate { attempt });
        if let Some(Word::GaveUp(fault)) = word {
            self.send(link, Lane::Demand, Sent::Frame(Frame::Error(fault)));
        }
        if !self.is_well() && self.random.percent(10) {
            LANES.into_iter().for_each(|lane| self.cut_lane(link, lane));
        }
        self.lanes_come();
    }
}

pub(in crate::control::simulate) fn lost(lane: &str) -> Error {
    Error::Lost { side: "destination", lane: lane.into(), what: "reset".into() }
}

pub(in crate::control::simulate) fn nobody(kind: std::io::ErrorKind) -> Error {
    Error::Connect { uri: "tcp:host:1".into(), source: kind.into() }
}

//! Attempts of the source to open lanes, and the messages that reach it.

use std::time::Duration;

use umem_wire::{Event as Said, FaultCode, Frame};

use crate::control::Order;
use crate::control::calling::{Called, Word};
use crate::control::simulate::world::{Happening, Lane, Reply, Sent, World, lost};
use crate::control::source::closing::GOODBYE_PING;
use crate::control::source::{Input, Opened, peer};
use crate::error::Error;

/// An attempt to open lanes, or to send one message.
#[derive(Debug)]
pub(in crate::control::simulate) struct Opening {
    pub(in crate::control::simulate) attempt: u32,
    /// Set when the destination has accepted the lanes.
    pub(in crate::control::simulate) link: Option<u32>,
    pub(in crate::control::simulate) word: Option<Word>,
    /// The goodbye has been sent.
    pub(in crate::control::simulate) has_parted: bool,
}

/// Messages to the source. While it opens lanes it accepts only orders.
impl World {
    pub(super) fn dials(&mut self, epoch: u32, word: Option<Word>) {
        self.source.attempts += 1;
        let attempt = self.source.attempts;
        let opening = Opening { attempt, link: None, word: word.clone(), has_parted: false };
        self.source.opening = Some(opening);
        let at = self.now + self.random.millis(9);
        self.at(at, Happening::Dialled { attempt, epoch, word });
    }

    pub(in crate::control::simulate) fn source_notes(&mut self, input: Input) {
        match &self.source.opening {
            None => self.tell_source(input),
            Some(Opening { word: None, .. }) => self.source.notes.push_back(input),
            Some(Opening { word: Some(_), .. }) => {}
        }
    }

    pub(in crate::control::simulate) fn order_source(&mut self, order: Order) {
        self.note(format_args!("somebody orders the source: {order:?}"));
        self.source_notes(Input::Order(order));
        if matches!(self.source.opening, Some(Opening { word: None, .. })) {
            self.opening_fails(Error::Interrupted("the attempt is given up".into()));
        }
    }

    pub(in crate::control::simulate) fn interrupt_source(&mut self) {
        self.note(format_args!("somebody interrupts the source"));
        self.source_notes(Input::Interrupted);
        if self.source.opening.is_some() {
            self.opening_fails(Error::Interrupted("the attempt is given up".into()));
        }
    }

    pub(in crate::control::simulate) fn source_loses(&mut self, link: u32, lane: Lane) {
        let name = match lane {
            Lane::Demand => "demand lane",
            Lane::Bulk => "bulk lane 1",
        };
        if self.source.link == Some(link) {
            self.note(format_args!("source loses its {name}"));
            return self.source_notes(Input::Failed(lost(name)));
        }
        let Some(opening) = &self.source.opening else { return };
        if opening.link != Some(link) {
            return;
        }
        match (lane, &opening.word) {
            // The core notices that once the lane is served.
            (Lane::Bulk, _) => {
                let at = self.now + Duration::from_secs(1);
                self.at(at, Happening::SourceLoses { link, lane });
            }
            // The end of the lane is the answer.
            (_, Some(Word::GaveUp(_))) => self.opening_ends(Input::Called(Called::Heard)),
            (_, Some(Word::Goodbye)) if opening.has_parted => {
                self.opening_ends(Input::Called(Called::Heard));
            }
            _ => self.opening_fails(lost(name)),
        }
    }

    pub(in crate::control::simulate) fn source_hears(&mut self, link: u32, told: Reply) {
        if self.source.link == Some(link) {
            match told {
                Reply::Said(Said::Ping(number)) => self.send_frame(Frame::Pong(number)),
                Reply::Said(said) => {
                    self.note(format_args!("source hears {}", said.name()));
                    self.source_notes(Input::Received(said));
                }
                Reply::Request(page) => {
                    if self.source.sent.insert(page) {
                        let sent = self.memory.read(page);
                        self.send(link, Lane::Demand, sent);
                    }
                }
                Reply::Account { .. } => self.violated("an account on lanes that are served"),
            }
        } else if self.source.opening.as_ref().is_some_and(|opening| opening.link == Some(link)) {
            self.opening_hears(link, told);
        }
    }

    fn opening_hears(&mut self, link: u32, told: Reply) {
        let Some(opening) = &mut self.source.opening else { return };
        match (&opening.word, told) {
            (None, Reply::Account { standing, have }) => {
                self.source.opened(link, &have);
                self.opening_ends(Input::Opened(Opened::Lanes(standing)));
            }
            (None, Reply::Said(Said::Error(fault))) if fault.code == FaultCode::Ended => {
                self.source_hangs_up(link, true);
                self.opening_ends(Input::Opened(Opened::Never(peer(fault))));
            }
            (Some(Word::Goodbye), Reply::Said(Said::Complete(totals))) if !opening.has_parted => {
                opening.has_parted = true;
                self.send(link, Lane::Demand, Sent::Frame(Frame::Complete(totals)));
                self.send(link, Lane::Demand, Sent::Frame(Frame::Ping(GOODBYE_PING)));
            }
            (Some(Word::Goodbye), Reply::Said(Said::Pong(GOODBYE_PING))) => {
                self.source_hangs_up(link, true);
                self.opening_ends(Input::Called(Called::Heard));
            }
            (None | Some(Word::Goodbye), Reply::Said(Said::Error(fault))) => {
                self.opening_fails(peer(fault));
            }
            _ => {}
        }
    }

    /// The attempt fails.
    pub(in crate::control::simulate) fn opening_fails(&mut self, error: Error) {
        let Some(opening) = &self.source.opening else { return };
        let (link, is_word) = (opening.link, opening.word.is_some());
        if let Some(link) = link {
            self.source_hangs_up(link, true);
        }
        self.opening_ends(match (is_word, link) {
            (false, _) => Input::Opened(Opened::NotNow(error)),
            (true, None) => Input::Called(Called::NotOpened(error)),
            (true, Some(_)) => Input::Called(Called::NotHeard(error)),
        });
    }

    /// Messages that arrived meanwhile are handled first.
    fn opening_ends(&mut self, answer: Input) {
        self.source.opening = None;
        let process = self.source.number;
        for note in std::mem::take(&mut self.source.notes).into_iter().chain([answer]) {
            if self.source.is(process) {
                self.tell_source(note);
            }
        }
    }
}

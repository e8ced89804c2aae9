//! A source's session whose process is gone and that has no pages to serve, and its end by a person.

use std::io::ErrorKind;

use super::{Opening, Process};
use crate::control::simulate::Fault;
use crate::control::simulate::world::{World, nobody};
use crate::control::source::leftover::{self, Knocked, Leftover};
use crate::control::source::{Input, Record};
use crate::error::Error;
use crate::events::{Event, Undone};

impl World {
    pub(super) fn run_leftover(&mut self, input: leftover::Input) {
        let mut next = Some(input);
        while let Some(input) = next.take() {
            let now = self.instant();
            let Some(Process::Leftover(core)) = &mut self.source.process else { return };
            for effect in core.handle(input, now) {
                if self.is_killed() {
                    return self.kill_source();
                }
                self.note(format_args!("source: {effect:?}"));
                next = self.carry_out_leftover(effect);
            }
        }
        if let Some(Process::Leftover(core)) = &self.source.process
            && core.has_ended()
        {
            self.note(format_args!("source has ended, as a session that was left"));
            self.source.process = None;
        }
    }

    fn carry_out_leftover(&mut self, effect: leftover::Effect) -> Option<leftover::Input> {
        match effect {
            leftover::Effect::Undo => {
                let is_wrong = !self.is_well() && self.random.percent(self.habits.wrong);
                self.runs_here |= !is_wrong;
                if !is_wrong {
                    self.is_put_back();
                }
                return Some(leftover::Input::Undone(match is_wrong {
                    true => Err(Error::Host("it refuses".into())),
                    false => Ok(Undone::GoesOn),
                }));
            }
            leftover::Effect::Epoch(epoch) => {
                self.persist(&Record::Epoch { epoch, uri: None }, false);
            }
            leftover::Effect::Call { epoch, word, .. } => self.dials(epoch, Some(word)),
            leftover::Effect::Knock { epoch } => self.dials(epoch, None),
            leftover::Effect::Free => self.free(),
            leftover::Effect::Forget => self.forget(),
            leftover::Effect::Tell(Event::Abandoned { .. }) => self.has_abandoned = true,
            leftover::Effect::Tell(_) => {}
        }
        None
    }

    /// The person ends a session whose destination needs nothing, or is taken for gone.
    pub(in crate::control::simulate) fn abandon_source(&mut self, is_mistaken: bool) {
        let Some(disk) = self.source.record.clone() else { return };
        if !is_mistaken && self.source.can_be_by_hand && !self.destination.can_do_alone() {
            self.note(format_args!(
                "the person has the guest go on, and removes the source's record"
            ));
            self.runs_here = true;
            return self.forget();
        }
        self.note(format_args!("the person abandons the source's session: {disk:?}"));
        self.source.mistakes = is_mistaken;
        self.source.number += 1;
        self.source.began = self.now;
        self.source.kept = Some(disk.clone());
        let core = Leftover::abandoned("5e55".to_owned(), World::uri(), disk.epoch, Vec::new());
        self.source.process = Some(Process::Leftover(Box::new(core)));
        self.tell_source(Input::Begin);
    }

    /// All lanes are open, only to find out whether the destination answers.
    pub(in crate::control::simulate) fn knocked(&mut self, link: u32) {
        self.source.opening = None;
        self.source_hangs_up(link, true);
        let knocked = match self.fault {
            Fault::TakesAnswersForSilence => Knocked::NotOpened(nobody(ErrorKind::TimedOut)),
            _ => Knocked::Opened,
        };
        self.run_leftover(leftover::Input::Knocked(knocked));
    }

    /// Taking a destination for gone that has just gone is no mistake, and umem cannot help: the guest that waits there
    /// is the person's loss.
    pub(in crate::control::simulate) fn is_mistaken_no_more(&self) -> bool {
        self.is_knocking() && self.source.mistakes && !self.destination.is_alive()
    }

    pub(in crate::control::simulate) fn is_knocking(&self) -> bool {
        matches!(self.source.process, Some(Process::Leftover(_)))
            && matches!(self.source.opening, Some(Opening { word: None, .. }))
    }
}

//! The source's monitor, which carries out one command at a time.

use std::time::Duration;

use super::{Happening, STATE_BYTES, World};
use crate::control::simulate::CHAOS;
use crate::control::source::Question;
use crate::error::Error;
use crate::host::monitor::Answer;

impl World {
    pub(in crate::control::simulate) fn ask(&mut self, question: Question) {
        let process = self.source.process_number();
        let begins = self.monitor_busy.max(self.now);
        self.monitor_busy = begins + self.random.millis(9);
        if !self.is_well() && self.random.percent(self.habits.stuck) {
            self.monitor_busy = self.monitor_busy.max(CHAOS + self.random.millis(14));
        }
        if question == Question::Look {
            let takes = self.look_takes();
            self.monitor_busy += takes;
        }
        let asked = self.now;
        self.at(self.monitor_busy, Happening::Monitor { process, question, asked });
    }

    pub(super) fn monitor_does(&mut self, process: u32, question: Question, asked: Duration) {
        // The connection has ended with its process.
        if !self.source.is(process) {
            return;
        }
        let is_wrong = !self.is_well() && self.random.percent(self.habits.wrong);
        self.note(format_args!("monitor does {question:?}, wrongly: {is_wrong}"));
        let result = match is_wrong {
            true => Err(Error::Host("it refuses".into())),
            false => Ok(()),
        };
        self.has_been_asked |= question == Question::StandsStill;
        let answer = match question {
            Question::Track => Answer::Tracking(self.tracks(result)),
            Question::Look => Answer::Looked(self.looks(result, asked)),
            Question::Stop => {
                // Written before any setting is changed.
                self.source.stops(self.habits.is_kept);
                Answer::Stopped(self.stops(result).map(|()| None))
            }
            Question::Save => Answer::Saved(result.map(|()| vec![0; STATE_BYTES])),
            Question::StandsStill if self.runs_here => {
                Answer::StandsStill(Err(Error::Host("the guest runs".into())))
            }
            Question::StandsStill => Answer::StandsStill(result),
            Question::PutBack => {
                if !is_wrong {
                    self.is_put_back();
                }
                Answer::PutBack(result)
            }
            Question::Resume => {
                self.drops_log();
                self.runs_here |= !is_wrong;
                if !is_wrong {
                    self.is_put_back();
                }
                Answer::Resumed(result)
            }
        };
        // A wrong answer counts as no answer.
        let is_silent = !self.is_well() && self.random.percent(self.habits.wrong);
        if is_silent {
            return;
        }
        self.soon(Happening::Answered { process, answer });
    }
}

//! The simulated person, who acts on umem's reports.

use std::time::Duration;

use super::threads::Bond;
use super::world::{Happening, World};
use crate::control::Order;
use crate::control::destination::Input as There;

/// The interval between two checks.
const INTERVAL: Duration = Duration::from_secs(20);

impl World {
    /// Acts on the reports of both sides.
    pub(super) fn look_after(&mut self) {
        self.look_after_source();
        self.look_after_destination();
        self.at(self.now + INTERVAL, Happening::Person);
    }

    fn look_after_source(&mut self) {
        if !self.source.is_alive() && self.source.record.is_some() {
            // In some seeds the person tries that at once, while the destination lives: umem must refuse.
            let is_mistaken = self.destination.is_alive() && self.source.takes_for_gone();
            match self.source_is_needed() && !is_mistaken {
                true => self.resume_source(),
                // The attempt takes a while.
                false => return self.abandon_source(is_mistaken),
            }
        }
        if self.source.take_by_hand() {
            self.note(format_args!("the person has the guest go on"));
            self.runs_here = true;
        }
        if self.source.take_paused() {
            self.order_source(Order::Resume(None));
        }
        // Only a person ends a process that waits for a monitor, or that holds pages without a demand.
        let is_in_vain = self.source.is_alive() && !self.source_is_needed();
        if self.source.waits_for_a_person(self.now) || !self.habits.background || is_in_vain {
            self.interrupt_source();
        }
    }

    /// Whether a destination may still come for the pages here, or has not yet been dialed.
    fn source_is_needed(&self) -> bool {
        self.destination.is_alive()
            || self.destination.record.is_some()
            || !self.source.may_have_given_its_guest_away()
            || !self.source.is_told_of_silence
    }

    fn look_after_destination(&mut self) {
        let is_source_there = self.source.is_alive() || self.source.record.is_some();
        let has_record = self.destination.record.is_some();
        let is_settled = self.destination.is_settled() && !is_source_there;
        if has_record && !self.destination.is_alive() && !is_settled {
            self.resume_destination();
        }
        if self.destination.take_paused() {
            self.tell_destination(There::Order(Order::Resume(None)));
        }
        // The source is gone: the guest continues there, or no process can continue.
        let is_in_vain = !is_source_there && !self.destination.can_do_alone();
        if is_in_vain || self.destination.waits_for_its_monitor(self.now) {
            self.interrupt_destination();
        }
        let is_there = self.destination.guest.bond != Bond::Ended;
        let is_in_vain = is_in_vain && !self.destination.is_alive() && is_there;
        if is_in_vain && !self.habits.is_kept {
            self.note(format_args!("the person ends the destination's guest"));
            self.destination.guest.ends();
            self.destination.record = None;
        }
    }
}

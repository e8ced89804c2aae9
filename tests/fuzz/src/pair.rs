//! Both sides' phases, joined by a demand lane that may be slow and may break: whatever each side does, and however
//! late it learns of the other's steps, the guest never runs on both sides.

use std::collections::VecDeque;

use arbitrary::{Arbitrary, Unstructured};
use umem_wire::{Event, Totals, destination, source};

use crate::phases::{AtDestination, AtSource, step_destination, step_source};
use crate::words::table;

/// The next event.
#[derive(Arbitrary, Clone, Debug)]
enum Happens {
    /// Frames that the source received before have another origin.
    AtSource(AtSource),
    AtDestination(AtDestination),
    /// The next frame arrives.
    ReachesSource,
    ReachesDestination,
    /// The lane breaks: frames in flight are lost, and both sides notice that later.
    Breaks,
}

struct Pair {
    source: source::Phase,
    destination: destination::Phase,
    to_source: VecDeque<Event>,
    to_destination: VecDeque<Event>,
    is_broken: bool,
}

pub(crate) fn run(input: &[u8]) {
    let mut input = Unstructured::new(input);
    play(std::iter::from_fn(|| {
        if input.is_empty() { None } else { Happens::arbitrary(&mut input).ok() }
    }));
}

/// Applies all events, and returns both sides at the end.
fn play(all: impl IntoIterator<Item = Happens>) -> Pair {
    let mut pair = Pair {
        source: source::Phase::new(),
        destination: destination::Phase::new(),
        to_source: VecDeque::new(),
        to_destination: VecDeque::new(),
        is_broken: false,
    };
    for happens in all {
        pair.happens(&happens);
        assert!(!(pair.source.may_run() && pair.destination.may_run()), "the guest runs twice");
        if let destination::Phase::Completed(_) = pair.destination {
            assert!(!pair.source.may_run());
        }
    }
    pair
}

impl Pair {
    fn happens(&mut self, happens: &Happens) {
        match happens {
            // The frames are not forged.
            Happens::AtSource(AtSource::Received(_))
            | Happens::AtDestination(AtDestination::Received(_)) => {}
            // Small pieces suffice: only their sum matters.
            &Happens::AtSource(AtSource::SentState { bytes }) => {
                self.source_does(&AtSource::SentState { bytes: 1 + bytes % 1024 });
            }
            Happens::AtSource(what) => self.source_does(what),
            Happens::AtDestination(what) => self.destination_does(what),
            Happens::ReachesSource => {
                if let Some(event) = self.to_source.pop_front() {
                    self.source = step_source(self.source.clone(), source::Input::Received(&event));
                    // Its goodbye.
                    if let (source::Phase::Completed(_), Event::Complete(totals)) =
                        (&self.source, event)
                    {
                        self.send_to_destination(Event::Complete(totals));
                    }
                }
            }
            Happens::ReachesDestination => {
                if let Some(event) = self.to_destination.pop_front() {
                    let input = destination::Input::Received(&event);
                    self.destination = step_destination(self.destination.clone(), input);
                }
            }
            Happens::Breaks => {
                self.is_broken = true;
                self.to_source.clear();
                self.to_destination.clear();
            }
        }
    }

    /// A frame to be sent leaves once its phase allows it.
    fn source_does(&mut self, what: &AtSource) {
        let next = step_source(self.source.clone(), what.input(None));
        let failed = matches!(next, source::Phase::Failed { .. });
        let before = std::mem::replace(&mut self.source, next);
        if failed {
            return;
        }
        let event = match *what {
            AtSource::SentRegions => Event::Regions(table()),
            AtSource::GuestStopped { postcopy, background } => {
                Event::Stopped { postcopy, background }
            }
            AtSource::SentState { bytes } => Event::DeviceState(vec![0xa5; bytes as usize]),
            AtSource::SentLoad => match before {
                source::Phase::Saving { state_bytes } => Event::Load { state_bytes },
                _ => unreachable!("load is sent while saving"),
            },
            AtSource::SentSwitchover => Event::Switchover { stopped_us: 1 },
            AtSource::PagesAllSent
            | AtSource::Received(_)
            | AtSource::Lost
            | AtSource::Cancel
            | AtSource::Broken => return,
        };
        self.send_to_destination(event);
    }

    fn destination_does(&mut self, what: &AtDestination) {
        self.destination = step_destination(self.destination.clone(), what.input(None));
        if matches!(self.destination, destination::Phase::Failed { .. }) {
            return;
        }
        let event = match what {
            AtDestination::GuestReady => Event::Ready(table()),
            AtDestination::StateLoaded => Event::Loaded,
            AtDestination::GuestRunning => Event::Running { us_since_switchover: 1 },
            AtDestination::AllCached => Event::Complete(Totals::default()),
            AtDestination::Received(_)
            | AtDestination::Lost
            | AtDestination::Cancel
            | AtDestination::Broken => return,
        };
        if !self.is_broken {
            self.to_source.push_back(event);
        }
    }

    fn send_to_destination(&mut self, event: Event) {
        if !self.is_broken {
            self.to_destination.push_back(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Happens::{Breaks, ReachesDestination, ReachesSource};

    /// A whole migration: up to the sending of the switchover, and from there on.
    fn migration() -> (Vec<Happens>, Vec<Happens>) {
        let (source, destination) = (Happens::AtSource, Happens::AtDestination);
        let before = vec![
            source(AtSource::SentRegions),
            ReachesDestination,
            destination(AtDestination::GuestReady),
            ReachesSource,
            source(AtSource::GuestStopped { postcopy: true, background: true }),
            source(AtSource::SentState { bytes: 5000 }),
            source(AtSource::SentLoad),
            ReachesDestination,
            ReachesDestination,
            ReachesDestination,
            destination(AtDestination::StateLoaded),
            ReachesSource,
            source(AtSource::SentSwitchover),
        ];
        let after = vec![
            ReachesDestination,
            destination(AtDestination::GuestRunning),
            ReachesSource,
            destination(AtDestination::AllCached),
            ReachesSource,
            ReachesDestination,
        ];
        (before, after)
    }

    /// The pair can reach the end, so the checks are not vacuous.
    #[test]
    fn undisturbed_migration_completes() {
        let (before, after) = migration();
        let pair = play(before.into_iter().chain(after));
        assert!(matches!(pair.source, source::Phase::Completed(_)), "{:?}", pair.source);
        assert!(matches!(pair.destination, destination::Phase::Completed(Some(_))));
    }

    #[test]
    fn lost_switchover_leaves_the_guest_without_owner() {
        let (mut before, _) = migration();
        before.push(Breaks);
        before.push(Happens::AtSource(AtSource::Lost));
        before.push(Happens::AtDestination(AtDestination::Lost));
        let pair = play(before);
        assert_eq!(pair.source, source::Phase::Failed { may_run: false });
        assert_eq!(pair.destination, destination::Phase::Failed { may_have_run: false });
    }
}

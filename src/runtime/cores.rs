//! Which thread runs on which core.

use core_affinity::CoreId;
use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::role::Role;

/// Where a bulk thread runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Where the scheduler has it.
    Anywhere,
    /// It begins on this core, and the scheduler may move it.
    ///
    /// A bulk thread that had to stay would wait for its core however busy that is and whatever the others do. Beside
    /// one thread of real-time priority that does not sleep (another migration's pump, a demand lane that carries
    /// the background) ordinary threads of a core share a twentieth of it. On two cores with 20 busy threads and
    /// one of those a bulk thread that was bound to its core waited for up to 1.0 s at a time, and one that was not for
    /// 0.4 s, with 1.7 to 2.5 times the processor time. With 34 ordinary ones alone (0.3 to 0.4 s) being bound
    /// made no difference, nor did yields; nice −10 had ten times an ordinary thread's share.
    From(usize),
    /// On this core, which was named.
    At(usize),
}

impl Place {
    /// Takes the calling thread there. Returns the core that it, and its ring, have to be bound to.
    pub(crate) fn enter(self) -> Option<usize> {
        match self {
            Place::Anywhere => None,
            Place::At(core) => Some(core),
            Place::From(core) => {
                let this = Pid::from_raw(0);
                if let Ok(allowed) = sched_getaffinity(this)
                    && core_affinity::set_for_current(CoreId { id: core })
                {
                    // It cannot fail: the thread was allowed there before.
                    let _ = sched_setaffinity(this, &allowed);
                }
                None
            }
        }
    }

    /// The same for a thread that has been there: it is not taken back to where it began.
    pub(crate) fn again(self) -> Place {
        match self {
            Place::From(_) => Place::Anywhere,
            place => place,
        }
    }
}

/// The cores of one side's threads: the demand lane's first, then those of the bulk lanes, which go
/// round when there are more lanes than cores.
pub(crate) struct Cores {
    demand: Option<usize>,
    bulk: Vec<usize>,
    are_named: bool,
}

impl Cores {
    /// `named` as the user gave them, or a choice among the cores this process may use. Source and
    /// destination choose from opposite ends, so that they do not meet when both run on one machine.
    pub(crate) fn choose(named: &[usize], role: Role) -> Cores {
        if let [demand, bulk @ ..] = named {
            let bulk = if bulk.is_empty() { vec![*demand] } else { bulk.to_vec() };
            return Cores { demand: Some(*demand), bulk, are_named: true };
        }
        let mut available: Vec<usize> =
            core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
        available.sort_unstable();
        if role == Role::Destination {
            available.reverse();
        }
        match available.as_slice() {
            // Nothing to choose from: the scheduler knows better.
            [] | [_] => Cores { demand: None, bulk: Vec::new(), are_named: false },
            [demand, bulk @ ..] => {
                Cores { demand: Some(*demand), bulk: bulk.to_vec(), are_named: false }
            }
        }
    }

    pub(crate) fn demand(&self) -> Option<usize> {
        self.demand
    }

    /// How many cores there are to choose from; one where there is no choice.
    pub(crate) fn count(&self) -> usize {
        usize::from(self.demand.is_some()).max(1) + self.bulk.len()
    }

    /// The core of the `index`th of some threads that share all cores.
    pub(crate) fn any(&self, index: usize) -> Option<usize> {
        let all: Vec<usize> = self.bulk.iter().copied().chain(self.demand).collect();
        (!all.is_empty()).then(|| all[index % all.len()])
    }

    /// Where bulk lane `index` runs, counted from 0.
    pub(crate) fn bulk(&self, index: usize) -> Place {
        match self.bulk.as_slice() {
            [] => Place::Anywhere,
            bulk if self.are_named => Place::At(bulk[index % bulk.len()]),
            bulk => Place::From(bulk[index % bulk.len()]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_cores_are_taken_in_their_order() {
        let cores = Cores::choose(&[3, 1, 2], Role::Source);
        assert_eq!(cores.demand(), Some(3));
        assert_eq!(
            [0, 1, 2].map(|lane| cores.bulk(lane)),
            [Place::At(1), Place::At(2), Place::At(1)]
        );
        assert_eq!(Cores::choose(&[5], Role::Destination).bulk(7), Place::At(5));
    }

    #[test]
    fn threads_stay_on_cores_that_were_named_alone() {
        let allowed = || sched_getaffinity(Pid::from_raw(0)).unwrap();
        let before = allowed();
        for index in 0..3 {
            assert_eq!(Cores::choose(&[], Role::Source).bulk(index).enter(), None);
            assert_eq!(allowed(), before, "it may go elsewhere");
        }
        assert_eq!(Place::At(3).enter(), Some(3));
        assert_eq!([Place::At(3).again(), Place::From(3).again()], [Place::At(3), Place::Anywhere]);
    }

    #[test]
    fn both_ends_on_one_machine_choose_apart() {
        let (source, destination) =
            (Cores::choose(&[], Role::Source), Cores::choose(&[], Role::Destination));
        if source.demand().is_some() {
            assert_ne!(source.demand(), destination.demand());
        }
    }
}

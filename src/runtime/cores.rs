//! The cores of threads.

use core_affinity::CoreId;
use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::role::Role;

/// The core of a bulk thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Any core, as the scheduler decides.
    Anywhere,
    /// This core at first; the scheduler may move the thread.
    ///
    /// A bound bulk thread would wait for its core however busy that is. Beside one thread of
    /// real-time priority that does not sleep (another migration's pump, a demand lane that carries
    /// the background), the ordinary threads of a core share a twentieth of it. On two cores with
    /// 20 busy threads and one of those, a bound bulk thread waited for up to 1.0 s at a time, and
    /// an unbound one for 0.4 s, with 1.7 to 2.5 times the processor time. With 34 ordinary threads
    /// alone (0.3 to 0.4 s) binding made no difference, nor did yields; nice −10 had ten times an
    /// ordinary thread's share.
    From(usize),
    /// This core only, as the user named it.
    At(usize),
}

impl Place {
    /// Moves the calling thread there. Returns the core that it, and its ring, have to be bound to.
    pub(crate) fn enter(self) -> Option<usize> {
        match self {
            Place::Anywhere => None,
            Place::At(core) => Some(core),
            Place::From(core) => {
                let this = Pid::from_raw(0);
                if let Ok(allowed) = sched_getaffinity(this)
                    && core_affinity::set_for_current(CoreId { id: core })
                {
                    // It cannot fail: the thread was allowed on these cores before.
                    let _ = sched_setaffinity(this, &allowed);
                }
                None
            }
        }
    }

    /// The place for a thread that has been started before: it does not return to its first core.
    pub(crate) fn again(self) -> Place {
        match self {
            Place::From(_) => Place::Anywhere,
            place => place,
        }
    }
}

/// The cores of one side's threads: the demand lane's, then those of the bulk lanes, which share
/// cores in turn when there are more lanes than cores.
pub(crate) struct Cores {
    demand: Option<usize>,
    bulk: Vec<usize>,
    are_named: bool,
}

impl Cores {
    /// `named` as the user gave them, or a choice among the cores this process may use. Source and
    /// destination choose from opposite ends, so that they use different cores on one machine.
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
            // With at most one core there is no choice; the scheduler places the threads.
            [] | [_] => Cores { demand: None, bulk: Vec::new(), are_named: false },
            [demand, bulk @ ..] => {
                Cores { demand: Some(*demand), bulk: bulk.to_vec(), are_named: false }
            }
        }
    }

    pub(crate) fn demand(&self) -> Option<usize> {
        self.demand
    }

    /// The number of cores to choose from; one without a choice.
    pub(crate) fn count(&self) -> usize {
        usize::from(self.demand.is_some()).max(1) + self.bulk.len()
    }

    /// The core of thread `index` among threads that share all cores.
    pub(crate) fn any(&self, index: usize) -> Option<usize> {
        let all: Vec<usize> = self.bulk.iter().copied().chain(self.demand).collect();
        (!all.is_empty()).then(|| all[index % all.len()])
    }

    /// The place of bulk lane `index`, counted from 0.
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
    fn named_cores_are_used_in_their_order() {
        let cores = Cores::choose(&[3, 1, 2], Role::Source);
        assert_eq!(cores.demand(), Some(3));
        assert_eq!(
            [0, 1, 2].map(|lane| cores.bulk(lane)),
            [Place::At(1), Place::At(2), Place::At(1)]
        );
        assert_eq!(Cores::choose(&[5], Role::Destination).bulk(7), Place::At(5));
    }

    #[test]
    fn threads_are_bound_only_to_named_cores() {
        let allowed = || sched_getaffinity(Pid::from_raw(0)).unwrap();
        let before = allowed();
        for index in 0..3 {
            assert_eq!(Cores::choose(&[], Role::Source).bulk(index).enter(), None);
            assert_eq!(allowed(), before, "the thread is not bound");
        }
        assert_eq!(Place::At(3).enter(), Some(3));
        assert_eq!([Place::At(3).again(), Place::From(3).again()], [Place::At(3), Place::Anywhere]);
    }

    #[test]
    fn both_sides_on_one_machine_choose_different_cores() {
        let (source, destination) =
            (Cores::choose(&[], Role::Source), Cores::choose(&[], Role::Destination));
        if source.demand().is_some() {
            assert_ne!(source.demand(), destination.demand());
        }
    }
}

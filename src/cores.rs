//! Which thread runs on which core.

/// Which end of the lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Source,
    Destination,
}

/// The cores of one side's threads: the demand lane's first, then those of the bulk lanes, which go
/// round when there are more lanes than cores.
pub(crate) struct Cores {
    demand: Option<usize>,
    bulk: Vec<usize>,
}

impl Cores {
    /// `named` as the user gave them, or a choice among the cores this process may use. Source and
    /// destination choose from opposite ends, so that they do not meet when both run on one machine.
    pub(crate) fn choose(named: &[usize], role: Role) -> Cores {
        if let [demand, bulk @ ..] = named {
            let bulk = if bulk.is_empty() { vec![*demand] } else { bulk.to_vec() };
            return Cores { demand: Some(*demand), bulk };
        }
        let mut available: Vec<usize> =
            core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
        available.sort_unstable();
        if role == Role::Destination {
            available.reverse();
        }
        match available.as_slice() {
            // Nothing to choose from: the scheduler knows better.
            [] | [_] => Cores { demand: None, bulk: Vec::new() },
            [demand, bulk @ ..] => Cores { demand: Some(*demand), bulk: bulk.to_vec() },
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

    /// The core of bulk lane `index`, counted from 0.
    pub(crate) fn bulk(&self, index: usize) -> Option<usize> {
        (!self.bulk.is_empty()).then(|| self.bulk[index % self.bulk.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_cores_are_taken_in_their_order() {
        let cores = Cores::choose(&[3, 1, 2], Role::Source);
        assert_eq!(cores.demand(), Some(3));
        assert_eq!([0, 1, 2].map(|lane| cores.bulk(lane)), [Some(1), Some(2), Some(1)]);
        assert_eq!(Cores::choose(&[5], Role::Destination).bulk(7), Some(5));
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

//! Words of the command line.

use std::str::FromStr;

use super::super::guest::Ram;
use super::super::mover::{Mover, Qemu, Umem};

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LoadName {
    Idle,
    Hot,
    Sequential,
    Random,
}

/// The way between the two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Road {
    Loopback,
    /// Through a shaped link between two network namespaces.
    Link,
}

/// In the order of the tables.
pub(super) const MOVERS: [(&str, Mover); 6] = [
    ("qemu-precopy", Mover::Qemu(Qemu::Precopy)),
    ("qemu-multifd", Mover::Qemu(Qemu::Multifd)),
    ("qemu-hybrid", Mover::Qemu(Qemu::Hybrid)),
    ("umem-postcopy", Mover::Umem(Umem::Postcopy)),
    ("umem-precopy", Mover::Umem(Umem::Precopy)),
    ("umem-hybrid", Mover::Umem(Umem::Hybrid)),
];

pub(super) const LOADS: [(&str, LoadName); 4] = [
    ("idle", LoadName::Idle),
    ("hot", LoadName::Hot),
    ("sequential", LoadName::Sequential),
    ("random", LoadName::Random),
];

pub(super) const ROADS: [(&str, Road); 2] = [("loopback", Road::Loopback), ("10g", Road::Link)];

const RAMS: [(&str, Ram); 3] =
    [("file", Ram::File), ("huge", Ram::HugeFile), ("private", Ram::Private)];

impl FromStr for Mover {
    type Err = String;

    fn from_str(word: &str) -> Result<Mover, String> {
        named(&MOVERS, word)
    }
}

impl FromStr for LoadName {
    type Err = String;

    fn from_str(word: &str) -> Result<LoadName, String> {
        named(&LOADS, word)
    }
}

impl FromStr for Road {
    type Err = String;

    fn from_str(word: &str) -> Result<Road, String> {
        named(&ROADS, word)
    }
}

impl FromStr for Ram {
    type Err = String;

    fn from_str(word: &str) -> Result<Ram, String> {
        named(&RAMS, word)
    }
}

impl LoadName {
    pub(super) fn word(self) -> &'static str {
        word(&LOADS, self)
    }
}

impl Road {
    pub(super) fn word(self) -> &'static str {
        word(&ROADS, self)
    }
}

pub(super) fn ram_word(ram: Ram) -> &'static str {
    word(&RAMS, ram)
}

fn named<T: Copy>(all: &[(&str, T)], word: &str) -> Result<T, String> {
    let known = || all.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
    let found = all.iter().find(|(name, _)| *name == word);
    found.map(|(_, value)| *value).ok_or_else(|| format!("give one of {}", known()))
}

fn word<T: Copy + PartialEq>(all: &[(&'static str, T)], value: T) -> &'static str {
    all.iter().find(|(_, one)| *one == value).map_or("?", |(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::List;

    #[test]
    fn words_are_read_as_they_are_written() {
        for (word, mover) in MOVERS {
            assert_eq!(word.parse(), Ok(mover));
            assert_eq!(mover.key().replace('_', "-"), word);
        }
        assert!(LOADS.iter().all(|(word, load)| load.word() == *word));
        assert!(ROADS.iter().all(|(word, road)| road.word() == *word));
        assert!(RAMS.iter().all(|&(word, ram)| ram_word(ram) == word));
        let error = "hot,cold".parse::<List<LoadName>>().unwrap_err();
        assert!(error.contains("cold") && error.contains("sequential"), "{error}");
    }
}

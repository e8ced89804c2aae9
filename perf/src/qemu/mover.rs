//! The programs that move the guest, and their ways.

use super::guest::Ram;

/// A program and its way of moving a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mover {
    Qemu(Qemu),
    Umem(Umem),
}

/// QEMU's own migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Qemu {
    Precopy,
    /// Precopy over as many connections as are QEMU's default, with the capability multifd.
    Multifd,
    /// Postcopy at once, with postcopy-preempt.
    Preempt,
    /// Postcopy at once, without it.
    Plain,
    /// One pass of precopy, then postcopy with postcopy-preempt.
    Hybrid,
}

/// umem's modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Umem {
    Postcopy,
    Precopy,
    Hybrid,
}

/// A mover, and the RAM of the guest that it moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Subject {
    pub(super) mover: Mover,
    pub(super) ram: Ram,
}

impl Ram {
    pub(super) fn name(self) -> &'static str {
        match self {
            Ram::File => "file",
            Ram::HugeFile => "huge file",
            Ram::Private => "private",
        }
    }
}

impl Qemu {
    /// Capabilities that both QEMUs have on.
    pub(super) fn capabilities(self) -> &'static [&'static str] {
        match self {
            Qemu::Precopy => &["events"],
            Qemu::Multifd => &["events", "multifd"],
            Qemu::Plain => &["events", "postcopy-ram"],
            Qemu::Preempt | Qemu::Hybrid => &["events", "postcopy-ram", "postcopy-preempt"],
        }
    }

    /// Whether the guest moves only when little of its memory is left.
    pub(super) fn has_to_converge(self) -> bool {
        matches!(self, Qemu::Precopy | Qemu::Multifd)
    }
}

impl Umem {
    /// Options of `umem migrate`.
    pub(super) fn options(self) -> &'static [&'static str] {
        match self {
            Umem::Postcopy => &["-p"],
            Umem::Precopy => &["--precopy"],
            Umem::Hybrid => &["--precopy", "-p"],
        }
    }
}

impl Mover {
    /// Its name in a table.
    pub(super) fn name(self) -> &'static str {
        match self {
            Mover::Qemu(Qemu::Precopy) => "QEMU precopy",
            Mover::Qemu(Qemu::Multifd) => "QEMU multifd precopy",
            Mover::Qemu(Qemu::Preempt) => "postcopy-preempt",
            Mover::Qemu(Qemu::Plain) => "plain postcopy",
            Mover::Qemu(Qemu::Hybrid) => "postcopy-preempt after a pass",
            Mover::Umem(Umem::Postcopy) => "umem -p",
            Mover::Umem(Umem::Precopy) => "umem --precopy",
            Mover::Umem(Umem::Hybrid) => "umem --precopy -p",
        }
    }

    /// Its name in JSON.
    pub(super) fn key(self) -> &'static str {
        match self {
            Mover::Qemu(Qemu::Precopy) => "qemu_precopy",
            Mover::Qemu(Qemu::Multifd) => "qemu_multifd",
            Mover::Qemu(Qemu::Preempt) => "qemu_preempt",
            Mover::Qemu(Qemu::Plain) => "qemu_plain",
            Mover::Qemu(Qemu::Hybrid) => "qemu_hybrid",
            Mover::Umem(Umem::Postcopy) => "umem_postcopy",
            Mover::Umem(Umem::Precopy) => "umem_precopy",
            Mover::Umem(Umem::Hybrid) => "umem_hybrid",
        }
    }

    /// Whether it moves a guest with such RAM: without passes umem needs it in a file.
    pub(super) fn takes(self, ram: Ram) -> bool {
        self != Mover::Umem(Umem::Postcopy) || ram != Ram::Private
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_postcopy_at_once_needs_ram_in_a_file() {
        for umem in [Umem::Postcopy, Umem::Precopy, Umem::Hybrid] {
            assert!(Mover::Umem(umem).takes(Ram::File) && Mover::Umem(umem).takes(Ram::HugeFile));
            assert_eq!(Mover::Umem(umem).takes(Ram::Private), umem != Umem::Postcopy);
        }
        assert!(Mover::Qemu(Qemu::Preempt).takes(Ram::Private));
    }
}

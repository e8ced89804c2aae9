//! The numbers of a stream: types of sections, flags of RAM's records, commands.

/// `QEVM`, and the version after it.
pub(super) const MAGIC: [u8; 4] = *b"QEVM";
pub(super) const VERSION: u32 = 3;

/// The version of RAM's section that is read here.
pub(super) const RAM_VERSION: u32 = 4;

/// The name of RAM's section.
pub(super) const RAM: &str = "ram";

/// Bytes of a page in a record. A guest with another page size is refused.
pub(crate) const PAGE_BYTES: usize = 4096;

/// log2 of the page size, as in the configuration.
pub(super) const PAGE_BITS: u32 = PAGE_BYTES.trailing_zeros();

/// Types of sections (`QEMU_VM_*` in QEMU's migration/savevm.h).
pub(super) mod section {
    pub(in super::super) const START: u8 = 0x01;
    pub(in super::super) const PART: u8 = 0x02;
    pub(in super::super) const END: u8 = 0x03;
    pub(in super::super) const FULL: u8 = 0x04;
    pub(in super::super) const SUBSECTION: u8 = 0x05;
    pub(in super::super) const CONFIGURATION: u8 = 0x07;
    pub(in super::super) const COMMAND: u8 = 0x08;
    pub(in super::super) const FOOTER: u8 = 0x7e;
}

/// Flags of a record, in the lower bits of its first word (`RAM_SAVE_FLAG_*` in QEMU's migration/ram.c).
pub(super) mod flag {
    pub(in super::super) const ZERO: u16 = 0x02;
    pub(in super::super) const MEM_SIZE: u16 = 0x04;
    pub(in super::super) const PAGE: u16 = 0x08;
    pub(in super::super) const END: u16 = 0x10;
    /// The page is in the same block as the preceding one: no name follows.
    pub(in super::super) const SAME_BLOCK: u16 = 0x20;
    /// Some QEMUs write it even if there is nothing to flush.
    pub(in super::super) const MULTIFD_FLUSH: u16 = 0x200;
}

/// The first word of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) offset: u64,
    pub(super) flags: u16,
}

impl Word {
    pub(super) fn parse(bytes: [u8; 8]) -> Word {
        const FLAGS: u64 = PAGE_BYTES as u64 - 1;
        let word = u64::from_be_bytes(bytes);
        Word { offset: word & !FLAGS, flags: (word & FLAGS) as u16 }
    }

    pub(super) fn bytes(self) -> [u8; 8] {
        (self.offset | u64::from(self.flags)).to_be_bytes()
    }
}

/// The command that asks the destination to answer.
pub(super) const OPEN_RETURN_PATH: u16 = 1;

/// The commands that a stream of umem's settings may have, each with the bytes of its data (`qemu_vm_cmd` in QEMU's
/// migration/savevm.c).
pub(super) fn command_bytes(command: u16) -> Option<u16> {
    const PING: u16 = 2;
    const SWITCHOVER_START: u16 = 11;
    match command {
        OPEN_RETURN_PATH | SWITCHOVER_START => Some(0),
        PING => Some(4),
        _ => None,
    }
}

/// The setting with which QEMU writes another command.
pub(super) fn capability_of_command(command: u16) -> Option<&'static str> {
    match command {
        // ADVISE, LISTEN, RUN and RAM_DISCARD of postcopy, a package, and RESUME.
        3..=8 => Some("capability postcopy-ram"),
        9 => Some("capability x-colo"),
        _ => None,
    }
}

/// The setting with which QEMU writes a record with other flags.
pub(super) fn capability_of_flags(flags: u16) -> Option<&'static str> {
    match flags & !flag::SAME_BLOCK {
        0x40 => Some("capability xbzrle"),
        0x80 => Some("migration by RDMA"),
        0x100 => Some("capability compress"),
        _ => None,
    }
}

/// The setting with which QEMU begins a connection differently.
pub(super) fn capability_of_beginning(bytes: [u8; 4]) -> Option<&'static str> {
    match bytes {
        // `MULTIFD_MAGIC` of its migration/multifd.c.
        [0x11, 0x22, 0x33, 0x44] => Some("capability multifd"),
        // A TLS handshake.
        [0x16, 0x03, ..] => Some("parameter tls-creds"),
        _ => None,
    }
}

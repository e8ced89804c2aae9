//! QEMU's own migration stream, read for two purposes: as a log of the pages that the guest writes, and as its device
//! state.
//!
//! ```text
//! stream         "QEVM" u32 3 | configuration | sections …
//! configuration  07 u32 n, machine's name | 05 u8 n, name, u32 version, fields …
//!   fields of configuration/capabilities      u32 count, each u8 n, name
//!             configuration/target-page-bits  u32
//!             configuration/uuid              16 bytes
//! section START  01 u32 id, u8 n, name, u32 instance, u32 version | RAM's records | footer
//!         PART   02 u32 id | RAM's records | footer
//!         END    03 u32 id | RAM's records | footer
//!         FULL   04 device state from here on, to the end: 00 06 u32 n, description
//! footer         7e u32 id
//! command        08 u16 command, u16 n, data
//! record         u64 offset | flags, and
//!   04           (offset: bytes of all blocks) each u8 n, name, u64 bytes; with x-ignore-shared u64 address
//!   08           u8 n, block's name, unless 20 (the same block); the page
//!   02           the same, with a byte 00 in place of the page
//!   10           nothing: the records of the section end
//! ```
//!
//! Numbers are big-endian. [`Parser`] does no I/O: it takes bytes in any pieces and returns [`Event`]s. Its memory is
//! bounded by [`BLOCKS_MAX`] and [`CAPABILITIES_MAX`]. It never panics. An unknown element ends in an error that names
//! it, because the bytes behind it could not be interpreted.
//!
//! - [`cut`]: the stream without the pages that umem moves, which is a stream as well
//! - [`look`]: the end of a look over the whole guest
//! - [`reading`]: the thread that reads
//! - [`sorting`]: what becomes of each event: marks, contents, and the rest of the stream
//! - [`passive`]: a stream that another program has had QEMU begin
//! - [`log`]: the driver, which has QEMU write such a stream

mod cut;
pub(crate) mod log;
mod look;
pub(crate) mod passive;
pub(super) mod reading;
mod records;
mod sorting;
#[cfg(test)]
mod tests;

use crate::error::{Error, Result};
pub(crate) use cut::Cut;
pub(super) use log::ignores_shared;
pub(crate) use records::PAGE_BYTES;
use records::{
    MAGIC, OPEN_RETURN_PATH, PAGE_BITS, RAM, RAM_VERSION, VERSION, Word, capability_of_beginning,
    capability_of_command, capability_of_flags, command_bytes, flag, section,
};

/// RAM blocks of a guest at most. One with 256 DIMMs has fewer than 300.
pub(crate) const BLOCKS_MAX: usize = 1024;

/// Capabilities that a configuration names at most. QEMU has about 20.
pub(crate) const CAPABILITIES_MAX: usize = 64;

/// Bytes of a field that is kept until it is whole: a name, whose length is a byte, or a machine's name.
const FIELD_BYTES_MAX: usize = 256;

/// Bytes of the version after a name.
const VERSION_BYTES: usize = 4;

/// Bytes of a stream's magic number and version.
const MAGIC_BYTES: u64 = 8;

/// The capability that leaves shared RAM out of a stream, and adds the addresses of blocks.
pub(crate) const IGNORE_SHARED: &str = "x-ignore-shared";

/// A RAM block, as in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) name: String,
    /// The used bytes.
    pub(crate) bytes: u64,
}

/// The meaning of a piece of a stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event<'a> {
    /// Bytes outside of RAM's pages: the configuration, commands, the list of blocks, the footer of RAM's last section,
    /// and everything after it.
    Other(&'a [u8]),
    /// A part of RAM, in the section of this number, begins at this byte of the stream.
    Began { section: u32, is_last: bool, at: u64 },
    /// A page of the block with this index in [`Parser::blocks`], at this offset. Its bytes follow, unless it is zero.
    /// Its record begins at this byte of the stream.
    Page { block: usize, offset: u64, is_zero: bool, at: u64 },
    /// Contents of the preceding page: [`PAGE_BYTES`] in all.
    Content(&'a [u8]),
    /// The part of RAM is over.
    Ended { is_last: bool },
}

/// The next element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Magic,
    /// The type of a section, or of an element of the configuration.
    Type,
    MachineLength,
    Machine(usize),
    SubsectionLength,
    /// The name and version of a subsection.
    Subsection(usize),
    PageBits,
    CapabilityCount,
    /// The number of capabilities that are left.
    CapabilityLength(u32),
    Capability(u32, usize),
    Uuid,
    /// A section with a name: its number and the length of its name.
    Header {
        is_full: bool,
    },
    Name {
        is_full: bool,
        section: u32,
        bytes: usize,
    },
    /// Instance and version.
    Version {
        section: u32,
    },
    /// The number of a section that continues.
    Part {
        at: u64,
    },
    Footer,
    Command,
    CommandData(usize),
    /// The first word of a record.
    Record,
    /// The bytes of all blocks that are left.
    BlockLength(u64),
    BlockName(u64, usize),
    BlockBytes(u64),
    BlockAddress(u64),
    /// The length of the name of a page's block.
    PageNameLength(Word, u64),
    PageName(Word, u64, usize),
    ZeroByte,
    /// The bytes of a page that are left.
    Content(usize),
    /// Device state, to the end.
    Rest,
}

impl State {
    /// The bytes of its field; None if any number of bytes is accepted.
    fn field_bytes(self) -> Option<usize> {
        Some(match self {
            State::Type | State::SubsectionLength | State::CapabilityLength(_) => 1,
            State::BlockLength(_) | State::PageNameLength(..) | State::ZeroByte => 1,
            State::MachineLength | State::PageBits | State::CapabilityCount => 4,
            State::Part { .. } | State::Footer | State::Command => 4,
            State::Header { .. } => 5,
            State::Magic | State::Version { .. } | State::Record => 8,
            State::BlockBytes(_) | State::BlockAddress(_) => 8,
            State::Uuid => 16,
            State::Subsection(bytes) => bytes + VERSION_BYTES,
            State::Machine(bytes)
            | State::Capability(_, bytes)
            | State::Name { bytes, .. }
            | State::CommandData(bytes)
            | State::BlockName(_, bytes)
            | State::PageName(_, _, bytes) => bytes,
            State::Content(_) | State::Rest => return None,
        })
    }
}

/// RAM's progress in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ram {
    Unknown,
    /// Its section has this number.
    Begun(u32),
    /// Its last part has arrived.
    Over(u32),
}

/// The part of RAM's pages that a field is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    None,
    Middle,
    Last,
}

/// The meaning of a field.
enum Told {
    Other,
    /// An element of a record, or of the bytes around records.
    Silent,
    Began {
        section: u32,
        at: u64,
    },
    Page {
        block: usize,
        offset: u64,
        is_zero: bool,
        at: u64,
    },
    Ended,
}

/// Reads a stream.
#[derive(Debug)]
pub(crate) struct Parser {
    state: State,
    /// A field that has arrived in part.
    field: [u8; FIELD_BYTES_MAX + VERSION_BYTES],
    field_bytes: usize,
    /// Bytes that have been read.
    position: u64,
    is_configuring: bool,
    capabilities: Vec<String>,
    blocks: Vec<Block>,
    ram: Ram,
    /// A return path was asked for before RAM.
    opens_return_path: bool,
    part: Part,
    /// The block of the preceding page.
    block: Option<usize>,
}

impl Parser {
    pub(crate) fn new() -> Parser {
        Parser {
            state: State::Magic,
            field: [0; FIELD_BYTES_MAX + VERSION_BYTES],
            field_bytes: 0,
            position: 0,
            is_configuring: false,
            capabilities: Vec::new(),
            blocks: Vec::new(),
            ram: Ram::Unknown,
            opens_return_path: false,
            part: Part::None,
            block: None,
        }
    }

    /// RAM's blocks, in QEMU's order, which is that of the pages in a pass. The list is complete when the first part of
    /// RAM begins.
    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The capabilities that the stream's configuration names: both QEMUs must have them.
    pub(crate) fn capabilities(&self) -> &[String] {
        &self.capabilities
    }

    /// Whether RAM that is shared was left out.
    pub(crate) fn ignores_shared(&self) -> bool {
        self.capabilities.iter().any(|name| name == IGNORE_SHARED)
    }

    /// Whether the stream asks the destination to answer: without that QEMU waits for no acknowledgement at the end.
    pub(crate) fn opens_return_path(&self) -> bool {
        self.opens_return_path
    }

    /// Whether RAM's last part has arrived, and the rest is device state.
    pub(crate) fn is_device_state(&self) -> bool {
        self.state == State::Rest
    }

    /// Takes the next bytes, and passes their events to `tell`, in order.
    ///
    /// # Errors
    /// The stream cannot be parsed, or `tell` fails. The parser cannot be used any more then.
    pub(crate) fn read(
        &mut self,
        mut input: &[u8],
        mut tell: impl FnMut(&Parser, Event<'_>) -> Result<()>,
    ) -> Result<()> {
        loop {
            let Some(bytes) = self.state.field_bytes() else {
                if input.is_empty() {
                    return Ok(());
                }
                let event = self.pass(&mut input);
                tell(self, event)?;
                continue;
            };
            if self.field_bytes == 0
                && let Some((field, later)) = input.split_at_checked(bytes)
            {
                input = later;
                self.finish_field(field, &mut tell)?;
                continue;
            }
            let count = (bytes - self.field_bytes).min(input.len());
            let (now, later) = input.split_at(count);
            input = later;
            self.field[self.field_bytes..self.field_bytes + count].copy_from_slice(now);
            self.field_bytes += count;
            if self.field_bytes < bytes {
                return Ok(());
            }
            self.field_bytes = 0;
            let field = self.field;
            self.finish_field(&field[..bytes], &mut tell)?;
        }
    }

    /// Passes on bytes that do not belong to a field.
    fn pass<'a>(&mut self, input: &mut &'a [u8]) -> Event<'a> {
        let count = match self.state {
            State::Content(left) => left.min(input.len()),
            _ => input.len(),
        };
        let (now, later) = input.split_at(count);
        *input = later;
        self.position += count as u64;
        match self.state {
            State::Content(left) => {
                let left = left - count;
                self.state = if left == 0 { State::Record } else { State::Content(left) };
                Event::Content(now)
            }
            _ => Event::Other(now),
        }
    }

    fn finish_field(
        &mut self,
        field: &[u8],
        tell: &mut impl FnMut(&Parser, Event<'_>) -> Result<()>,
    ) -> Result<()> {
        let at = self.position;
        self.position += field.len() as u64;
        let is_last = self.part == Part::Last;
        let event = match self.take(field, at)? {
            Told::Silent => return Ok(()),
            Told::Other => Event::Other(field),
            Told::Began { section, at } => {
                Event::Began { section, is_last: self.part == Part::Last, at }
            }
            Told::Page { block, offset, is_zero, at } => Event::Page { block, offset, is_zero, at },
            Told::Ended => Event::Ended { is_last },
        };
        tell(self, event)
    }

    /// Takes a whole field that began at this byte of the stream.
    fn take(&mut self, field: &[u8], at: u64) -> Result<Told> {
        let mut told = if self.part == Part::None { Told::Other } else { Told::Silent };
        self.state = match self.state {
            State::Magic => {
                if field[..4] != MAGIC {
                    let beginning: [u8; 4] = std::array::from_fn(|at| field[at]);
                    let setting = capability_of_beginning(beginning);
                    return Err(match setting {
                        Some(_) => of_capability(format!("no magic but {beginning:02x?}"), setting),
                        None => malformed(format!("begins with {beginning:02x?}")),
                    });
                }
                match u32_in(&field[4..]) {
                    VERSION => State::Type,
                    version => return Err(unknown(format!("version {version}"))),
                }
            }
            State::Type => {
                let next = self.section(field[0], at)?;
                told = if self.part == Part::None { Told::Other } else { Told::Silent };
                next
            }
            State::MachineLength => match u32_in(field) as usize {
                bytes if bytes <= FIELD_BYTES_MAX => State::Machine(bytes),
                bytes => return Err(malformed(format!("has a machine's name of {bytes} bytes"))),
            },
            State::SubsectionLength => State::Subsection(field[0].into()),
            State::Subsection(bytes) => subsection(&field[..bytes], u32_in(&field[bytes..]))?,
            State::PageBits => match u32_in(field) {
                PAGE_BITS => State::Type,
                bits => return Err(unknown(format!("pages of 2^{bits} bytes"))),
            },
            State::CapabilityCount => match u32_in(field) {
                0 => State::Type,
                count if count as usize <= CAPABILITIES_MAX => State::CapabilityLength(count),
                count => return Err(malformed(format!("names {count} capabilities"))),
            },
            State::CapabilityLength(left) => State::Capability(left, field[0].into()),
            State::Capability(left, _) => {
                self.capabilities.push(text(field));
                if left == 1 { State::Type } else { State::CapabilityLength(left - 1) }
            }
            State::Header { is_full } => {
                State::Name { is_full, section: u32_in(field), bytes: field[4].into() }
            }
            State::Name { is_full: true, .. } => {
                return Err(unknown(format!("the section {} before the end of RAM", text(field))));
            }
            State::Name { section, .. } => {
                if field != RAM.as_bytes() || self.ram != Ram::Unknown {
                    return Err(unknown(format!("the section {} in parts", text(field))));
                }
                State::Version { section }
            }
            State::Version { section } => match u32_in(&field[4..]) {
                RAM_VERSION => {
                    self.ram = Ram::Begun(section);
                    State::Record
                }
                version => return Err(unknown(format!("version {version} of the section {RAM}"))),
            },
            State::Part { at } => {
                let section = u32_in(field);
                if self.ram != Ram::Begun(section) {
                    return Err(unknown(format!(
                        "a part of section {section}, which is not {RAM}"
                    )));
                }
                if self.part == Part::Last {
                    self.ram = Ram::Over(section);
                }
                told = Told::Began { section, at };
                State::Record
            }
            State::Footer => match u32_in(field) {
                section if [Ram::Begun(section), Ram::Over(section)].contains(&self.ram) => {
                    State::Type
                }
                section => return Err(malformed(format!("has a footer of section {section}"))),
            },
            State::Command => {
                let (command, bytes) = (u16_in(field), u16_in(&field[2..]));
                if command_bytes(command) != Some(bytes) {
                    let what = format!("command {command} with {bytes} bytes");
                    return Err(of_capability(what, capability_of_command(command)));
                }
                self.opens_return_path |= command == OPEN_RETURN_PATH;
                State::CommandData(bytes.into())
            }
            State::Record => {
                let word = Word::parse(array(field));
                match self.part {
                    Part::None => setup(word)?,
                    _ if word.flags == flag::END => {
                        told = Told::Ended;
                        State::Type
                    }
                    _ => self.page(word, at, &mut told)?,
                }
            }
            State::BlockLength(left) => State::BlockName(left, field[0].into()),
            State::BlockName(left, _) => {
                if self.blocks.len() == BLOCKS_MAX {
                    return Err(malformed(format!("has more than {BLOCKS_MAX} RAM blocks")));
                }
                self.blocks.push(Block { name: text(field), bytes: 0 });
                State::BlockBytes(left)
            }
            State::BlockBytes(left) => {
                let bytes = u64::from_be_bytes(array(field));
                let Some(left) = left.checked_sub(bytes) else {
                    return Err(malformed("has RAM blocks that are larger than all of RAM".into()));
                };
                self.blocks.last_mut().expect("its name came before").bytes = bytes;
                if self.ignores_shared() { State::BlockAddress(left) } else { next_block(left) }
            }
            State::BlockAddress(left) => next_block(left),
            State::PageNameLength(word, at) => State::PageName(word, at, field[0].into()),
            State::PageName(word, at, _) => {
                self.block = self.blocks.iter().position(|block| block.name.as_bytes() == field);
                if self.block.is_none() {
                    return Err(malformed(format!("has a page of a RAM block {}", text(field))));
                }
                self.page_of_block(word, at, &mut told)?
            }
            State::ZeroByte => match field[0] {
                0 => State::Record,
                byte => return Err(unknown(format!("a page full of bytes {byte:#04x}"))),
            },
            State::Machine(_) | State::Uuid | State::CommandData(_) => State::Type,
            State::Content(_) | State::Rest => unreachable!("these have no fields"),
        };
        Ok(told)
    }

    /// The element after the type of a section.
    fn section(&mut self, kind: u8, at: u64) -> Result<State> {
        let is_configured = !std::mem::take(&mut self.is_configuring);
        let is_over = matches!(self.ram, Ram::Over(_));
        // The footer of a part belongs to the part, except for the last one.
        if kind != section::FOOTER || self.part == Part::Last {
            self.part = Part::None;
        }
        Ok(match kind {
            section::CONFIGURATION if at == MAGIC_BYTES => {
                self.is_configuring = true;
                State::MachineLength
            }
            section::SUBSECTION if !is_configured => {
                self.is_configuring = true;
                State::SubsectionLength
            }
            section::START if !is_over => State::Header { is_full: false },
            section::PART | section::END if !is_over => {
                self.part = if kind == section::END { Part::Last } else { Part::Middle };
                State::Part { at }
            }
            section::FULL if is_over => State::Rest,
            section::FULL => State::Header { is_full: true },
            section::COMMAND => State::Command,
            section::FOOTER => State::Footer,
            _ => return Err(unknown(format!("a section of type {kind:#04x}"))),
        })
    }

    /// A record of a page, from its first word on.
    fn page(&mut self, word: Word, at: u64, told: &mut Told) -> Result<State> {
        match word.flags & !flag::SAME_BLOCK {
            flag::MULTIFD_FLUSH if word.flags == flag::MULTIFD_FLUSH => Ok(State::Record),
            flag::PAGE | flag::ZERO if word.flags & flag::SAME_BLOCK == 0 => {
                Ok(State::PageNameLength(word, at))
            }
            flag::PAGE | flag::ZERO => self.page_of_block(word, at, told),
            flags => {
                let what = format!("a record of RAM with flags {:#x}", word.flags);
                Err(of_capability(what, capability_of_flags(flags)))
            }
        }
    }

    /// The same, when its block is known.
    fn page_of_block(&mut self, word: Word, at: u64, told: &mut Told) -> Result<State> {
        let Some(block) = self.block else {
            return Err(malformed("has a page of the block before, and there is none".into()));
        };
        let Block { name, bytes } = &self.blocks[block];
        if word.offset >= *bytes {
            let offset = word.offset;
            return Err(malformed(format!(
                "has a page at {offset:#x} of the RAM block {name}, which has {bytes:#x} bytes"
            )));
        }
        let is_zero = word.flags & flag::ZERO != 0;
        *told = Told::Page { block, offset: word.offset, is_zero, at };
        Ok(if is_zero { State::ZeroByte } else { State::Content(PAGE_BYTES) })
    }
}

/// The element after the first word of a record in the section that lists RAM's blocks.
fn setup(word: Word) -> Result<State> {
    match word.flags {
        flag::MEM_SIZE => Ok(next_block(word.offset)),
        flag::END => Ok(State::Type),
        flag::MULTIFD_FLUSH => Ok(State::Record),
        flags => Err(unknown(format!("a record of RAM with flags {flags:#x} before its pages"))),
    }
}

fn next_block(left: u64) -> State {
    if left == 0 { State::Record } else { State::BlockLength(left) }
}

/// The element after the name of a configuration's subsection.
fn subsection(name: &[u8], version: u32) -> Result<State> {
    let name = text(name);
    match (name.as_str(), version) {
        ("configuration/capabilities", 1) => Ok(State::CapabilityCount),
        ("configuration/target-page-bits", 1) => Ok(State::PageBits),
        ("configuration/uuid", 1) => Ok(State::Uuid),
        _ => Err(unknown(format!("version {version} of {name}"))),
    }
}

fn u16_in(field: &[u8]) -> u16 {
    u16::from_be_bytes([field[0], field[1]])
}

fn u32_in(field: &[u8]) -> u32 {
    u32::from_be_bytes([field[0], field[1], field[2], field[3]])
}

/// A field of 8 bytes.
fn array(field: &[u8]) -> [u8; 8] {
    std::array::from_fn(|at| field[at])
}

/// A name, for messages and for comparison with names that are UTF-8.
fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field).into_owned()
}

fn unknown(what: String) -> Error {
    Error::Unsupported(format!(
        "QEMU's migration stream has {what}, which umem does not know: move the guest without rounds before the \
         switchover"
    ))
}

/// The same, with the setting of QEMU that causes it.
fn of_capability(what: String, setting: Option<&str>) -> Error {
    match setting {
        None => unknown(what),
        Some(setting) => Error::Unsupported(format!(
            "QEMU's migration stream has {what}, as with its {setting}, which umem does not carry: switch that off, and \
             migrate again"
        )),
    }
}

fn malformed(what: String) -> Error {
    Error::Host(format!("QEMU's migration stream {what}, as no such stream does"))
}

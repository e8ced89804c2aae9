//! Single pieces of a move, for tests: QEMU's stream as a log of written pages, the parser of such streams, and a QEMU
//! that loads one.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use umem_wire::RegionId;

use super::monitor::Monitor as _;
use super::qemu::Qemu;
use super::qemu::stream::log::SharedQemu;
use super::qemu::stream::{Cut, Event, Parser};
use super::qmp::Qmp;

use crate::Result;
use crate::memory::dirty::{DirtyLog, DirtyMap};

/// log2 of the landing units here: small pages.
const UNIT_SHIFT: u8 = 12;

/// Bytes of the remaining stream at most.
const CUT_BYTES_MAX: usize = 256 << 20;

/// A QEMU whose guest is being moved away.
pub struct Source {
    host: SharedQemu,
    log: Box<dyn DirtyLog>,
    marks: Arc<DirtyMap>,
}

impl Source {
    /// Claims the guest of the QEMU at this QMP socket. `backends` are its RAM backends with their sizes in bytes.
    ///
    /// # Errors
    /// QEMU does not answer, or another umem has claimed its guest.
    pub fn connect(qmp: &Path, backends: &[(&str, u64)]) -> Result<Source> {
        let mut qemu = Qemu::new(Qmp::connect(qmp)?);
        qemu.claim()?;
        let units = |&(_, bytes): &(&str, u64)| (bytes >> UNIT_SHIFT, UNIT_SHIFT);
        let marks = DirtyMap::new(&backends.iter().map(units).collect::<Vec<_>>());
        let mut host =
            SharedQemu::new(qemu, backends.iter().map(|&(id, _)| id.to_owned()).collect());
        let log = host.dirty_log().expect("every QEMU has one");
        Ok(Source { host, log, marks: Arc::new(marks) })
    }

    /// Starts QEMU's migration.
    ///
    /// # Errors
    /// The guest cannot be moved, or QEMU refuses.
    pub fn start(&mut self) -> Result<()> {
        self.log.start(self.marks.clone())
    }

    /// Looks over the whole guest.
    ///
    /// # Errors
    /// QEMU's migration has failed, or umem cannot parse its stream.
    pub fn look(&mut self) -> Result<()> {
        self.log.next()
    }

    /// The pages of a region that have been marked since the previous call.
    #[must_use]
    pub fn marked(&self, region: u16) -> Vec<u64> {
        let bits = self.marks.region(RegionId(region));
        (0..bits.pages()).filter(|&page| bits.take_word(page, 1) != 0).collect()
    }

    /// Stops the guest, and marks the remaining pages. Returns the moment at which the guest stopped.
    ///
    /// # Errors
    /// As of [`Source::look`].
    pub fn stop(&mut self) -> Result<Option<Instant>> {
        let stopped = self.host.stop()?;
        self.log.finish()?;
        Ok(stopped)
    }

    /// The device state.
    ///
    /// # Errors
    /// The guest was not stopped.
    pub fn state(&mut self) -> Result<Vec<u8>> {
        self.host.save_state()
    }

    /// Completes QEMU's migration.
    ///
    /// # Errors
    /// The guest has run.
    pub fn give_away(&mut self) -> Result<()> {
        self.host.stands_still()?;
        self.host.put_back()
    }

    /// Resumes the guest, and undoes all changes.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn resume(&mut self) -> Result<()> {
        self.host.resume()
    }
}

/// A QEMU that waits for a guest.
pub struct Destination(Qemu);

impl Destination {
    /// Has the QEMU at this QMP socket wait for a device state and load it. The guest does not run yet.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn load(qmp: &Path, state: Vec<u8>) -> Result<Destination> {
        let mut qemu = Qemu::new(Qmp::connect(qmp)?);
        qemu.prepare()?;
        qemu.load_state(state)?;
        Ok(Destination(qemu))
    }

    /// Starts the guest, if it ran at the source.
    ///
    /// # Errors
    /// QEMU's own.
    pub fn run(&mut self) -> Result<()> {
        self.0.run()
    }
}

/// The contents of a QEMU's stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// RAM blocks, with their sizes in bytes.
    pub blocks: Vec<(String, u64)>,
    /// The capabilities that the configuration names.
    pub capabilities: Vec<String>,
    /// Pages in their order: block, offset, whether the page is zero, and a sum over its bytes and all earlier ones.
    pub pages: Vec<(usize, u64, bool, u64)>,
    /// Number of RAM's parts.
    pub parts: usize,
    /// RAM's end has arrived: the rest is device state.
    pub is_device_state: bool,
    /// The stream without the pages of the blocks that are moved.
    pub cut: Vec<u8>,
}

/// Parses a stream in these pieces. The blocks of these names are moved.
///
/// # Errors
/// Names the part of the stream that umem cannot parse.
pub fn parse<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
    is_moved: impl Fn(&str) -> bool,
) -> Result<Parsed> {
    let (mut parser, mut cut) = (Parser::new(), Cut::new(CUT_BYTES_MAX));
    let (mut parsed, mut sum) = (Parsed::default(), DefaultHasher::new());
    for piece in pieces {
        parser.read(piece, |parser, event| {
            match event {
                Event::Page { block, offset, is_zero, at } => {
                    at.hash(&mut sum);
                    parsed.pages.push((block, offset, is_zero, sum.finish()));
                }
                // Byte by byte, so that the result does not depend on the pieces.
                Event::Content(bytes) => {
                    bytes.iter().for_each(|&byte| sum.write_u8(byte));
                    parsed.pages.last_mut().expect("a page").3 = sum.finish();
                }
                Event::Began { at, .. } => at.hash(&mut sum),
                Event::Ended { .. } => parsed.parts += 1,
                Event::Other(_) => {}
            }
            let blocks = parser.blocks();
            cut.take(blocks, |block| is_moved(&blocks[block].name), &event)
        })?;
    }
    parsed.blocks = parser.blocks().iter().map(|b| (b.name.clone(), b.bytes)).collect();
    parsed.capabilities = parser.capabilities().to_vec();
    parsed.is_device_state = parser.is_device_state();
    parsed.cut = cut.into_stream();
    Ok(parsed)
}

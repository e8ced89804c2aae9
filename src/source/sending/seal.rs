//! Frames of the source's pages, with checksums on checked lanes.

use umem_ring::Memory;
use umem_wire::{HEADER_BYTES, PageRange, Seal, transmit};

use crate::memory::claims::{Run, RunKind};
use crate::memory::guarded::Gone;
use crate::memory::sums;

/// One lane's sending direction: every frame passes here once, in the order of sending.
pub(crate) struct Sealer {
    seal: Seal,
    /// Sums of the current run.
    sums: Vec<u32>,
}

impl Sealer {
    /// Before the first frame of a lane.
    pub(crate) fn new(checked: bool) -> Sealer {
        Sealer { seal: Seal::new(checked), sums: Vec::new() }
    }

    /// The frame count.
    pub(crate) fn place(&self) -> Seal {
        self.seal
    }

    /// Restores the frame count: the frames since then were not sent.
    pub(crate) fn go_back(&mut self, place: Seal) {
        self.seal = place;
    }

    /// Whole frames without pages.
    pub(crate) fn frames(&mut self, frames: &mut [u8]) {
        self.seal.frames(frames);
    }

    /// The header of a run, whose pages are `contents` if they are sent with it.
    ///
    /// They are read here for their sums, just before the kernel reads them, so that it finds them
    /// in the processor's cache.
    pub(crate) fn run(
        &mut self,
        run: &Run,
        contents: Option<&Memory>,
    ) -> Result<[u8; HEADER_BYTES], Gone> {
        let mut header = match run.kind {
            RunKind::Data => transmit::data_header(run.range),
            RunKind::Zero => transmit::zero_header(run.range),
            RunKind::Hole => transmit::hole_header(run.range),
        };
        if self.seal.is_on() {
            match contents {
                Some(contents) => {
                    sums::of_memory(contents, &mut self.sums)?;
                    self.seal.data(&mut header, &self.sums);
                }
                None => self.seal.frames(&mut header),
            }
        }
        Ok(header)
    }

    /// The header of a page that is sent from one of umem's buffers.
    pub(crate) fn page(&mut self, page: PageRange, contents: &[u8]) -> [u8; HEADER_BYTES] {
        let mut header = transmit::data_header(page);
        if self.seal.is_on() {
            sums::of_slice(contents, &mut self.sums);
            self.seal.data(&mut header, &self.sums);
        }
        header
    }
}

//! A stream without the pages that umem moves: the device state.
//!
//! The result is a stream that any QEMU loads. It has everything that is not a page, in the original order, and of the
//! other blocks (video memory, tables of the firmware) the last contents of each page, all in RAM's last part. So its
//! size does not depend on how long the stream is read.
//!
//! ```text
//! QEMU's   head | PART a b | PART a | command | END b c | footer | device state
//! cut      head | command | END a b c | footer | device state
//! ```

use std::collections::BTreeMap;

use super::records::{Word, flag, section};
use super::{Block, Event, PAGE_BYTES};
use crate::error::{Error, Result};

/// Collects the remaining stream.
#[derive(Debug)]
pub(crate) struct Cut {
    stream: Vec<u8>,
    /// The pages of blocks that are kept, by block and offset. A page without bytes is zero.
    pages: BTreeMap<(usize, u64), Vec<u8>>,
    /// The page to which the next contents belong.
    page: Option<(usize, u64)>,
    /// Bytes of all pages.
    page_bytes: usize,
    bytes_max: usize,
}

impl Cut {
    /// A cut of at most `bytes_max` bytes.
    pub(crate) fn new(bytes_max: usize) -> Cut {
        Cut { stream: Vec::new(), pages: BTreeMap::new(), page: None, page_bytes: 0, bytes_max }
    }

    /// The collected stream. It is whole when QEMU's stream has ended.
    pub(crate) fn stream(&self) -> &[u8] {
        &self.stream
    }

    pub(crate) fn into_stream(self) -> Vec<u8> {
        self.stream
    }

    /// Takes the next event. `is_moved` is true for the blocks that umem moves.
    ///
    /// # Errors
    /// The cut becomes too large.
    pub(crate) fn take(
        &mut self,
        blocks: &[Block],
        is_moved: impl Fn(usize) -> bool,
        event: &Event<'_>,
    ) -> Result<()> {
        match *event {
            Event::Other(bytes) => self.stream.extend_from_slice(bytes),
            Event::Began { section, is_last: true, .. } => {
                self.stream.push(section::END);
                self.stream.extend_from_slice(&section.to_be_bytes());
            }
            Event::Began { .. } | Event::Ended { is_last: false } => {}
            Event::Page { block, .. } if is_moved(block) => self.page = None,
            Event::Page { block, offset, is_zero, .. } => {
                self.page = Some((block, offset));
                let page = Vec::with_capacity(if is_zero { 0 } else { PAGE_BYTES });
                let before = self.pages.insert((block, offset), page);
                self.page_bytes -= before.map_or(0, |page| page.len());
            }
            Event::Content(bytes) => {
                if let Some(page) = self.page.and_then(|at| self.pages.get_mut(&at)) {
                    page.extend_from_slice(bytes);
                    self.page_bytes += bytes.len();
                }
            }
            Event::Ended { is_last: true } => self.write_pages(blocks),
        }
        // A page's word and name are fewer bytes than its place here.
        if self.stream.len() + self.page_bytes > self.bytes_max {
            return Err(Error::Unsupported(format!(
                "QEMU's device state is larger than {} MiB: RAM that umem does not move is part of it",
                self.bytes_max >> 20
            )));
        }
        Ok(())
    }

    /// Writes the pages and their end.
    fn write_pages(&mut self, blocks: &[Block]) {
        let mut before = None;
        for ((block, offset), page) in std::mem::take(&mut self.pages) {
            let is_same = before.replace(block) == Some(block);
            let kind = if page.is_empty() { flag::ZERO } else { flag::PAGE };
            let flags = if is_same { kind | flag::SAME_BLOCK } else { kind };
            self.stream.extend_from_slice(&Word { offset, flags }.bytes());
            if !is_same {
                let name = blocks[block].name.as_bytes();
                self.stream.push(name.len() as u8);
                self.stream.extend_from_slice(name);
            }
            match page.is_empty() {
                true => self.stream.push(0),
                false => self.stream.extend_from_slice(&page),
            }
        }
        (self.page, self.page_bytes) = (None, 0);
        self.stream.extend_from_slice(&Word { offset: 0, flags: flag::END }.bytes());
    }
}

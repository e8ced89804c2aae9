//! Which pages of a RAM file exist.

use crate::error::Result;
use crate::memory::claims::RunKind;
use crate::memory::region::RamFile;
use crate::memory::small_page_bytes;

/// Which pages in a part of the file, a block or a page, are holes.
///
/// SEEK_HOLE would report them, but it walks the whole extent of data, to the other end of the file when there is no
/// hole: one call per block makes the work quadratic. So residency is queried for the part alone, and only a page that
/// is not in memory is searched in the file (it may be swapped out, or be on disk). SEEK_DATA is quick there, as it
/// ends at the first data.
#[derive(Default)]
pub(crate) struct Holes {
    start: u64,
    /// A byte for each kernel page; a page of the file may consist of many of these.
    resident: Vec<u8>,
    /// The file has no data before this offset, as far as SEEK_DATA has been called.
    until: u64,
}

impl Holes {
    pub(crate) fn of(ram: &RamFile, start: u64, len: u64) -> Result<Holes> {
        let mut holes = Holes::default();
        holes.look_at(ram, start, len)?;
        Ok(holes)
    }

    /// Moves on to a part of this file or of another one.
    pub(super) fn look_at(&mut self, ram: &RamFile, start: u64, len: u64) -> Result<()> {
        (self.start, self.until) = (start, 0);
        // The kernel reports a mapped huge page as resident at once. For one that is not mapped it looks up each 4 KiB,
        // which took 7 % of a lane's thread at 40 Gbit/s; data is going to be read anyway.
        if ram.backing.has_huge_pages()
            && let Some(data) = ram.next_data_in(start..start + len)?
        {
            ram.map_in(data)?;
        }
        ram.resident(start, len, &mut self.resident)
    }

    /// The kind of `unit` bytes at `offset`, whole pages of the file: data if any page of it holds data; zeroes if the
    /// others are holes. Holes are not read: a read would allocate them.
    pub(super) fn kind(&mut self, ram: &RamFile, offset: u64, unit: u64) -> Result<RunKind> {
        let mut kind = RunKind::Hole;
        for page in (offset..offset + unit).step_by(1 << ram.page_shift) {
            if self.covers(ram, page)? {
                continue;
            }
            if !ram.page_is_zero(page)? {
                return Ok(RunKind::Data);
            }
            kind = RunKind::Zero;
        }
        Ok(kind)
    }

    /// Whether the file's page at `offset` is a hole.
    pub(crate) fn covers(&mut self, ram: &RamFile, offset: u64) -> Result<bool> {
        let page_bytes = small_page_bytes();
        let small_page =
            usize::try_from((offset - self.start) / page_bytes).expect("inside a block");
        if offset < self.until {
            return Ok(true);
        }
        if self.resident[small_page] & 1 == 1 {
            return Ok(false);
        }
        // Not beyond this part: on hugetlbfs everything up to the next data is read.
        let end = ram.bytes.min(self.start + self.resident.len() as u64 * page_bytes);
        self.until =
            ram.next_data_in(offset..end)?.unwrap_or(end) >> ram.page_shift << ram.page_shift;
        // Behind the end of a truncated file SEEK_DATA finds no data, though there is no hole either.
        ram.check_length()?;
        Ok(offset < self.until)
    }
}

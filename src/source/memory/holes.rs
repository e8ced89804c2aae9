//! What of a RAM file is there.

use crate::error::Result;
use crate::memory::claims::RunKind;
use crate::memory::region::RamFile;
use crate::memory::small_page_bytes;

/// Which of the file's pages in a part of it, a block or a page, are holes.
///
/// SEEK_HOLE would tell, but it walks the whole extent of data, to the other end of the file when
/// there is no hole: asked once a block it makes the work quadratic. So residency is asked for the
/// part alone, and only a page that is not in memory is looked for in the file (it may be swapped
/// out, or be on disk); SEEK_DATA is quick there, as it ends at the first data.
#[derive(Default)]
pub(crate) struct Holes {
    start: u64,
    /// A byte for each of the kernel's pages, which a page of the file may have many of.
    resident: Vec<u8>,
    /// No data before this offset, as far as SEEK_DATA has been asked.
    until: u64,
}

impl Holes {
    pub(crate) fn of(ram: &RamFile, start: u64, len: u64) -> Result<Holes> {
        let mut holes = Holes::default();
        holes.look_at(ram, start, len)?;
        Ok(holes)
    }

    /// Turns to a part of the file, or of another one.
    pub(super) fn look_at(&mut self, ram: &RamFile, start: u64, len: u64) -> Result<()> {
        (self.start, self.until) = (start, 0);
        // Of a huge page that is mapped the kernel knows at once that all of it is there; of one that is not it
        // looks up each 4 KiB, which took 7 % of a lane's thread at 40 Gbit/s. Data is going to be read anyway.
        if ram.backing.has_huge_pages()
            && let Some(data) = ram.next_data_in(start..start + len)?
        {
            ram.map_in(data)?;
        }
        ram.resident(start, len, &mut self.resident)
    }

    /// What `unit` bytes at `offset` are, whole pages of the file. Data if any page of it holds data;
    /// zeroes if the rest of it are holes. Reads no hole, which would allocate it.
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
        // No further than this part: of hugetlbfs everything up to the data is read.
        let end = ram.bytes.min(self.start + self.resident.len() as u64 * page_bytes);
        self.until =
            ram.next_data_in(offset..end)?.unwrap_or(end) >> ram.page_shift << ram.page_shift;
        // Behind the end of a file that has been truncated there is no data either, and no hole.
        ram.check_length()?;
        Ok(offset < self.until)
    }
}

//! Places arrived pages and makes them visible to the guest.
//!
//! Each step may find pending events, which the kernel requires to be read first: the step then does less than
//! requested, and reports that.

use umem_wire::PageRange;

use super::{
    COPIED_PAGE_BYTES_MAX, FaultSource, GuestMemory, GuestRegion, PageId, Part, failed, what,
};
use crate::error::{Context, Error, Result, WITHOUT_PASSES};
use crate::fault::uffd::{Placed, Stop};
use crate::memory::claims::RunKind;
use crate::memory::pages::PageState;

/// The most bytes made visible with the gate held open, unless a page is larger: it delays a reader of fault reports by
/// at most some 20 µs.
const GATE_BYTES_MAX: u64 = 64 << 10;

/// A zero page, as large as the largest page that UFFDIO_ZEROPAGE does not support (hugetlb).
static ZEROES: [u8; COPIED_PAGE_BYTES_MAX as usize] = [0; COPIED_PAGE_BYTES_MAX as usize];

impl GuestMemory {
    /// Anonymous memory: copies the arrived bytes of a run into place and marks them cached, except the first `done`
    /// bytes, which are in place. Always advances `done` to the bytes in place: fewer than all when events are pending,
    /// which must be read first, or after an error.
    pub(crate) fn place(&self, range: PageRange, bytes: &[u8], done: &mut usize) -> Result<()> {
        let region = self.region(range.region);
        let start = region.byte_offset(range.first);
        let end = start + bytes.len() as u64;
        let mut at = start + *done as u64;
        let within = |offset: u64| usize::try_from(offset - start).expect("a buffer's length");
        while at < end {
            let part = region.part_at(at);
            let len = GATE_BYTES_MAX.max(1 << region.unit_shift());
            let to = end.min(part.offset + part.bytes).min(at + len);
            let source = &self.sources[part.source];
            let _gate = source.open_gate();
            let chunk = &bytes[within(at)..within(to)];
            let unit_bytes = 1 << region.unit_shift();
            let first = at >> region.unit_shift();
            for run in runs(chunk, unit_bytes, |unit| region.is_plain(first + unit)) {
                let offset = at + run.start as u64;
                let (first, units) =
                    (offset >> region.unit_shift(), (run.bytes.len() / unit_bytes) as u64);
                let placed = if run.is_plain {
                    copy_in(region, part, source, offset, run.bytes, There::Stays)?
                } else {
                    copy_rest(region, part, source, offset, run.bytes)?
                };
                if !placed {
                    return Ok(());
                }
                region.pages.finish(first, units, |_| Ok::<(), Error>(()))?;
                *done = within(offset) + run.bytes.len();
            }
            at = to;
        }
        Ok(())
    }

    /// Anonymous memory in rounds: copies the arrived bytes of a run into place, over earlier copies of the same pages.
    /// `done` as for [`place`](GuestMemory::place).
    pub(crate) fn place_again(
        &self,
        range: PageRange,
        bytes: &[u8],
        done: &mut usize,
    ) -> Result<()> {
        let region = self.region(range.region);
        let start = region.byte_offset(range.first);
        let shift = region.unit_shift();
        while *done < bytes.len() {
            let at = start + *done as u64;
            let (part, unit) = (region.part_at(at), at >> shift);
            let most = GATE_BYTES_MAX.max(1 << shift);
            let (is_there, end) = self.copies_alike(range.region, unit);
            let to = (start + bytes.len() as u64)
                .min(part.offset + part.bytes)
                .min(at + most)
                .min(region.byte_offset(end));
            let to = usize::try_from(to - start).expect("a buffer's length");
            let chunk = &bytes[*done..to];
            let source = &self.sources[part.source];
            let _gate = source.open_gate();
            if is_there {
                overwrite(region, source, part.address + (at - part.offset), chunk)?;
            } else if !copy_in(region, part, source, at, chunk, There::IsOverwritten)? {
                return Ok(());
            }
            *done = to;
        }
        Ok(())
    }

    /// Anonymous memory in rounds: overwrites earlier copies of these pages with zeroes.
    pub(super) fn write_zeroes(&self, range: PageRange) -> Result<()> {
        let region = self.region(range.region);
        let start = region.byte_offset(range.first);
        for (part, address, len) in region.pieces(start..start + self.bytes(range)) {
            let end = address + len;
            for at in (address..end).step_by(ZEROES.len()) {
                let len = usize::try_from(end - at).expect("64-bit Linux").min(ZEROES.len());
                overwrite(region, &self.sources[part.source], at, &ZEROES[..len])?;
            }
        }
        Ok(())
    }

    /// Makes a cached page visible to the guest and wakes its waiting threads. False when pending events must be read
    /// first: try again then.
    pub(crate) fn mark(&self, id: PageId) -> Result<bool> {
        let region = self.region(id.region);
        debug_assert_eq!(region.pages.get(id.page), PageState::Cached);
        let offset = region.byte_offset(id.page);
        if region.memory.unit_is_page() {
            return self.show(region, offset);
        }
        // A waiting thread faults again, and gets the one page that it needs.
        let part = region.part_at(offset);
        let address = part.address + (offset - part.offset);
        self.sources[part.source]
            .uffd
            .wake(address, 1 << region.unit_shift())
            .context(|| what(region))?;
        Ok(true)
    }

    /// A vCPU waits at an address whose page is cached: its fault was late, or the page has been discarded or reclaimed
    /// since. False as for [`mark`](GuestMemory::mark).
    pub(crate) fn show_at(&self, address: u64) -> Result<bool> {
        let Some((index, offset)) = self.locate(address) else { return Ok(true) };
        let region = &self.regions[index];
        self.show(region, offset & !(region.page_bytes() - 1))
    }

    /// One page of the guest's size.
    fn show(&self, region: &GuestRegion, offset: u64) -> Result<bool> {
        let part = region.part_at(offset);
        let source = &self.sources[part.source];
        let uffd = &source.uffd;
        let (address, len) = (part.address + (offset - part.offset), region.page_bytes());
        // A zero page is in no file yet. A neighbour that lands in the same huge page may allocate it between the two
        // calls, so that the first call succeeds the second time.
        for _ in 0..3 {
            if region.memory.kind.lands_in_file() {
                match uffd.map(address, len).map_err(|error| failed(region, error))?.stop {
                    None => return Ok(true),
                    Some(Stop::Again) => return Ok(false),
                    Some(Stop::Already | Stop::Gone) => break,
                    Some(Stop::NotPresent) => {}
                }
            }
            if region.memory.allocates_in_file() {
                region.file().allocate_page(offset)?;
                continue;
            }
            match zero(region, source, address, len)?.stop {
                None => return Ok(true),
                Some(Stop::Again) => return Ok(false),
                Some(Stop::Gone) => break,
                Some(Stop::Already | Stop::NotPresent) => {}
            }
        }
        // A woken thread finds the page, or faults again.
        uffd.wake(address, len).context(|| what(region))?;
        Ok(true)
    }

    /// Private memory: makes an arrived range visible, so that it can be touched: data from the file, the rest as
    /// zeroes. Returns the number of visible pages: fewer than all when events are pending. For the touch thread, which
    /// does not read the events.
    pub(crate) fn show_private(&self, range: PageRange, kind: RunKind) -> Result<u64> {
        let region = self.region(range.region);
        let mut at = region.byte_offset(range.first);
        let end = at + region.byte_offset(range.pages);
        let done = |at: u64| (at >> region.unit_shift()) - range.first;
        while at < end {
            let part = region.part_at(at);
            let source = &self.sources[part.source];
            let to = end.min(part.offset + part.bytes).min(at + GATE_BYTES_MAX);
            let _gate = source.open_gate();
            while at < to {
                let address = part.address + (at - part.offset);
                let mut placed = Placed { bytes: 0, stop: Some(Stop::NotPresent) };
                if kind == RunKind::Data {
                    let mapped = source.uffd.map(address, to - at);
                    placed = mapped.map_err(|error| failed(region, error))?;
                }
                if placed.stop == Some(Stop::NotPresent) {
                    // Page by page if it was expected to be data: one of the pages was discarded.
                    let len = if kind == RunKind::Data { region.page_bytes() } else { to - at };
                    placed = zero(region, source, address, len)?;
                }
                at += placed.bytes;
                match placed.stop {
                    None => {}
                    Some(Stop::Already | Stop::NotPresent) => at += region.page_bytes(),
                    Some(Stop::Again) => return Ok(done(at)),
                    Some(Stop::Gone) => at = to,
                }
            }
        }
        Ok(range.pages)
    }
}

/// Zeroes at an address; UFFDIO_ZEROPAGE does not support hugetlb.
fn zero(region: &GuestRegion, source: &FaultSource, address: u64, len: u64) -> Result<Placed> {
    if region.memory.has_zero_page() {
        return source.uffd.zero(address, len).map_err(|error| failed(region, error));
    }
    let page = usize::try_from(region.page_bytes()).expect("64-bit Linux");
    copy(region, source, address, &ZEROES[..page])
}

/// Copies whole pages to an address.
fn copy(region: &GuestRegion, source: &FaultSource, address: u64, bytes: &[u8]) -> Result<Placed> {
    source.copy(address, bytes, region.page_bytes()).map_err(|error| failed(region, error))
}

/// The treatment of a page that is present already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum There {
    /// The page is the guest's own by now, or has the same contents.
    Stays,
    /// The page is an earlier copy, of a guest that does not run.
    IsOverwritten,
}

/// Copies whole pages to the guest. False when events are pending. If the kernel reports that they are not mapped, or
/// not in one mapping, fewer are tried: the kernel accepts no range across mappings, and the process may have split its
/// own (mprotect(2), madvise(2), munmap(2) of a part).
fn copy_in(
    region: &GuestRegion,
    part: &Part,
    source: &FaultSource,
    offset: u64,
    bytes: &[u8],
    there: There,
) -> Result<bool> {
    let page = usize::try_from(region.page_bytes()).expect("64-bit Linux");
    let address = part.address + (offset - part.offset);
    let (mut at, mut most) = (0, bytes.len());
    while at < bytes.len() {
        let len = most.min(bytes.len() - at);
        let placed = copy(region, source, address + at as u64, &bytes[at..at + len])?;
        at += usize::try_from(placed.bytes).expect("a buffer's length");
        match placed.stop {
            None => {}
            Some(Stop::Already) if there == There::IsOverwritten => {
                overwrite(region, source, address + at as u64, &bytes[at..at + page])?;
                at += page;
            }
            // Copied by an attempt before this one.
            Some(Stop::Already) => {
                source.uffd.wake(address + at as u64, page as u64).context(|| what(region))?;
                at += page;
            }
            Some(Stop::Again) => return Ok(false),
            Some(Stop::Gone) if len > page => most = (len / 2).next_multiple_of(page),
            Some(Stop::Gone) => at += page,
            Some(Stop::NotPresent) => {
                return Err(Error::System {
                    what: what(region),
                    source: std::io::Error::from_raw_os_error(libc::EFAULT),
                });
            }
        }
    }
    Ok(true)
}

/// Overwrites earlier copies of pages.
fn overwrite(region: &GuestRegion, source: &FaultSource, address: u64, bytes: &[u8]) -> Result<()> {
    source.overwrite(address, bytes).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => Error::Host(format!(
            "umem may not write over pages of RAM {} that come again while its source runs (process_vm_writev: \
             {error}): run umem as root, or as a user who may trace QEMU (kernel.yama.ptrace_scope); or use shared \
             memory in a file here; or give `umem migrate` there {WITHOUT_PASSES}",
            region.name
        )),
        _ => failed(region, error),
    })
}

/// Copies the parts of one unit that have not been discarded. False when events are pending.
fn copy_rest(
    region: &GuestRegion,
    part: &Part,
    source: &FaultSource,
    offset: u64,
    bytes: &[u8],
) -> Result<bool> {
    let unit = offset >> region.unit_shift();
    if region.pages.get(unit) == PageState::Discarded {
        return Ok(true);
    }
    let Some(discarded) = region.fragments.take(unit) else {
        return copy_in(region, part, source, offset, bytes, There::Stays);
    };
    for (page, count) in discarded.runs(false) {
        let (from, len) = (page << region.page_shift(), count << region.page_shift());
        let at = usize::try_from(from).expect("a buffer's length");
        let len = usize::try_from(len).expect("a buffer's length");
        let bytes = &bytes[at..at + len];
        let copied = copy_in(region, part, source, offset + from, bytes, There::Stays);
        if !matches!(copied, Ok(true)) {
            for (page, count) in discarded.runs(true) {
                region.fragments.add(unit, page, count);
            }
            return copied;
        }
    }
    Ok(true)
}

/// Some units of a run, in its buffer.
struct Units<'a> {
    start: usize,
    bytes: &'a [u8],
    is_plain: bool,
}

/// Groups units without discards into long runs, the others one by one.
fn runs(
    bytes: &[u8],
    unit_bytes: usize,
    is_plain: impl Fn(u64) -> bool,
) -> impl Iterator<Item = Units<'_>> {
    let plain_at = move |at: usize| is_plain((at / unit_bytes) as u64);
    let mut end = 0;
    std::iter::from_fn(move || {
        let start = end;
        if start == bytes.len() {
            return None;
        }
        let is_plain = plain_at(start);
        end += unit_bytes;
        while is_plain && end < bytes.len() && plain_at(end) {
            end += unit_bytes;
        }
        Some(Units { start, bytes: &bytes[start..end], is_plain })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use umem_ring::{Config, Op, Ring, Wait};
    use umem_wire::RegionId;

    use super::super::fixture::Guest;
    use super::*;
    use crate::destination::faults::serving::Faults;

    const TOKEN_RETRY: u64 = 1;
    const TOKEN_FAULTS: u64 = 2;
    const TOKEN_TICK: u64 = 3;
    /// Interval in which the test leaves the ring to check the threads.
    const TICK: Duration = Duration::from_millis(5);

    /// Two threads touch two pages of one landing unit, the second when the unit is cached and the landing lane has not
    /// yet looked for waiting threads. No block leaves the userfaultfd.
    #[test]
    fn second_fault_of_a_unit_also_wakes_the_first() {
        let Guest { memory, mapping, .. } = Guest::in_units_of(13);
        let memory = Arc::new(memory);
        let mut ring = Ring::new(&Config::default()).unwrap();
        let mut faults = Faults::new(memory.clone(), vec![0], TOKEN_FAULTS, TOKEN_RETRY);
        faults.arm(&mut ring).unwrap();
        ring.submit(Op::timeout(TICK), TOKEN_TICK).unwrap();
        let mut serve = || {
            ring.enter(Wait::One).unwrap();
            while let Some(completion) = ring.next() {
                match completion.token {
                    TOKEN_TICK => drop(ring.submit(Op::timeout(TICK), TOKEN_TICK).unwrap()),
                    _ => faults.complete(&mut ring, completion).unwrap(),
                }
            }
            faults.listen_again(&mut ring).unwrap();
        };
        let range = PageRange { region: RegionId(0), first: 0, pages: 1 };
        let (sender, woken) = std::sync::mpsc::channel();
        let touch = |page: u64| {
            let (span, sender) = (mapping.span(page << 12, 1), sender.clone());
            // SAFETY: a byte of the mapping, which the span keeps.
            move || sender.send(unsafe { span.as_ptr().read_volatile() }).unwrap()
        };
        let region = memory.region(RegionId(0));
        std::thread::spawn(touch(0));
        while !region.pages.is_wanted(0) {
            serve();
        }
        memory.begin(range, "a lane").unwrap();
        region.file().write_at(&[0xa5; 8192], 0).unwrap();
        region.finish_in_file(0, 1).unwrap();
        std::thread::spawn(touch(1));
        while region.pages.is_wanted(0) {
            serve();
        }
        memory.finished(range, RunKind::Data, |page| panic!("{page:?} is reported twice")).unwrap();
        // A woken thread faults again: its page is in the file, and not in the mapping.
        let (mut seen, began) = (Vec::new(), Instant::now());
        while seen.len() < 2 {
            seen.extend(woken.try_iter());
            serve();
            assert!(began.elapsed() < Duration::from_secs(60), "a thread waits forever");
        }
        assert_eq!(seen, [0xa5, 0xa5]);
    }

    #[test]
    fn adjacent_plain_units_are_copied_in_one_call() {
        let bytes = [0; 5 * 4096];
        let runs: Vec<_> = runs(&bytes, 4096, |unit| unit != 2)
            .map(|run| (run.start / 4096, run.bytes.len() / 4096, run.is_plain))
            .collect();
        assert_eq!(runs, [(0, 2, true), (2, 1, false), (3, 2, true)]);
    }
}

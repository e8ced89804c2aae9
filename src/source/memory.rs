//! The guest's memory at the source: read only, its guest stopped, every page sent once.
//!
//! Pages here are landing units, which the destination's ready frame determines: a page of the file, or several if the
//! destination's pages are larger.

pub(in crate::source) mod digest;
mod holes;
mod hot;
pub(in crate::source) mod release;
mod rounds;
mod walk;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, OnceLock};

use umem_ring::{Memory, Waker};
use umem_wire::limits::RUN_BYTES_MAX;
use umem_wire::{
    HEADER_BYTES, PageRange, PageSize, ReceiveError, Region, RegionId, RegionTable, Totals,
};

pub(crate) use holes::Holes;
use rounds::Tracked;
pub(crate) use rounds::{RoundsWalk, no_dirty_log};
pub(crate) use walk::Walk;

use super::sending::seal::Sealer;
use crate::error::{Error, Result};
use crate::memory::acks::{Acks, NotSent};
use crate::memory::claims::{Claims, LastDemand, Run, RunKind};
use crate::memory::guarded::Gone;
use crate::memory::region::RamFile;
use crate::memory::sequences::Sequences;
use crate::memory::staging::{STAGED_PAGE_BYTES, Staging};
use crate::memory::sums::Digests;
use crate::memory::words::AtomicWords;
use crate::memory::zero;
use crate::runtime::bandwidth::Bandwidth;
use crate::statistics::Counters;

/// The largest page that is answered from a copy: for a larger one the copy costs more than it saves.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// One region: its file and the claims of its pages.
pub(crate) struct SourceRegion {
    pub(crate) ram: RamFile,
    /// Known from the destination's ready frame on, long before any page is sent.
    landing: OnceLock<Landing>,
}

/// The state of a region once its landing unit is known.
struct Landing {
    unit: PageSize,
    claims: Claims,
    /// With `--release-ram`.
    acks: Option<Acks>,
}

/// All regions, in the order of the table that went to the destination.
pub(crate) struct SourceMemory {
    pub(crate) regions: Vec<SourceRegion>,
    /// The landing table, whose units page numbers count.
    landing: OnceLock<RegionTable>,
    /// Pages are sent while the guest runs.
    has_rounds: bool,
    /// With rounds, once pages can be counted.
    tracked: OnceLock<Tracked>,
    /// The staging files, if the guest has RAM without files: contents that wait to be sent.
    staging: Option<Arc<Staging>>,
    pub(crate) counters: Arc<Counters>,
    /// The limit of the background.
    pub(crate) bandwidth: Arc<Bandwidth>,
    /// The limit of the passes while the guest runs.
    pub(crate) pass_bandwidth: Arc<Bandwidth>,
    /// The last demand: bulk lanes continue from there.
    pub(crate) pivot: LastDemand,
    /// What the demands look like going on with: bulk lanes run ahead of that first.
    pub(crate) sequences: Sequences,
    /// The guest has stopped: only from then on are its pages what the destination must get.
    pub(crate) stopped: AtomicBool,
    /// A zero-copy send was copied by the kernel, or refused for lack of locked memory: plain sends are cheaper then.
    pub(crate) zero_copy_is_copied: AtomicBool,
    /// The destination acknowledges pages, which are freed here.
    pub(crate) releases: bool,
    /// Sent frames have checksums, and runs are short enough for them.
    pub(crate) is_checked: bool,
    /// With checksums: the digests of freed pages, and at the end those of all pages.
    pub(crate) digests: Digests,
    /// Pages were freed, or may have been freed, without an entry in the digests.
    pub(crate) digest_is_lost: AtomicBool,
    /// Wakes the thread that frees pages, from the switchover on.
    pub(crate) releaser: OnceLock<Waker>,
    /// That thread is to end.
    pub(crate) is_ending: AtomicBool,
}

impl SourceMemory {
    pub(crate) fn new(files: Vec<RamFile>, releases: bool) -> SourceMemory {
        let region = |ram| SourceRegion { ram, landing: OnceLock::new() };
        let counters = Arc::new(Counters::of(files.iter().map(|file| file.bytes)));
        let digests = Digests::of(files.len());
        SourceMemory {
            regions: files.into_iter().map(region).collect(),
            landing: OnceLock::new(),
            has_rounds: false,
            tracked: OnceLock::new(),
            staging: None,
            counters,
            bandwidth: Arc::new(Bandwidth::new(None)),
            pass_bandwidth: Arc::new(Bandwidth::new(None)),
            pivot: LastDemand::default(),
            sequences: Sequences::default(),
            stopped: AtomicBool::new(false),
            zero_copy_is_copied: AtomicBool::new(false),
            releases,
            is_checked: false,
            digests,
            digest_is_lost: AtomicBool::new(false),
            releaser: OnceLock::new(),
            is_ending: AtomicBool::new(false),
        }
    }

    /// Sets the limit of the background.
    pub(crate) fn limited(self, bandwidth: Arc<Bandwidth>) -> SourceMemory {
        SourceMemory { bandwidth, ..self }
    }

    /// Sets whether there are checksums.
    pub(crate) fn checked(self, is_checked: bool) -> SourceMemory {
        SourceMemory { is_checked, ..self }
    }

    /// Sets whether there are rounds.
    pub(crate) fn in_rounds(self, has_rounds: bool) -> SourceMemory {
        SourceMemory { has_rounds, ..self }
    }

    /// Sets the staging files of regions whose contents come with a stream.
    pub(crate) fn staged(self, staging: Option<Arc<Staging>>) -> SourceMemory {
        SourceMemory { staging, ..self }
    }

    /// The staging files of a region, if its contents come with a stream.
    fn staging_of(&self, id: RegionId) -> Option<&Staging> {
        self.staging.as_deref().filter(|staging| staging.has(id))
    }

    /// By `umem control`: the passes are to end, including passes whose end another program decides.
    pub(crate) fn end_passes(&self) {
        self.staging.iter().for_each(|staging| staging.end_passes());
    }

    /// Whether a region's file is a staging file of umem's own.
    pub(crate) fn is_own(&self, id: RegionId) -> bool {
        self.staging_of(id).is_some()
    }

    /// Names the staging files: from here on another process finds the guest's memory in them.
    pub(crate) fn name_files(&self) -> Result<()> {
        self.staging.as_ref().map_or(Ok(()), |staging| staging.name())
    }

    fn landing_tracked(&self) -> Option<&Tracked> {
        self.tracked.get()
    }

    /// The most pages of a region that one data run may have.
    fn run_pages_max(&self, unit: PageSize) -> u64 {
        if self.is_checked { unit.checked_run_pages_max() } else { unit.run_pages_max() }
    }

    pub(crate) fn table(&self) -> Result<RegionTable> {
        let regions = self
            .regions
            .iter()
            .map(|region| Region {
                name: region.ram.name.clone(),
                bytes: region.ram.bytes,
                page_size: PageSize::from_shift(region.ram.page_shift).expect("a page size"),
            })
            .collect();
        RegionTable::new(regions).map_err(|error| Error::Usage(error.to_string()))
    }

    /// The destination is ready and has named the units: from here on pages can be counted. The wire's receiver has
    /// checked that this happens once.
    pub(crate) fn land(&self, landing: RegionTable) {
        self.land_keeping(landing, |_, _| Ok(None)).expect("nothing that could fail is asked for");
    }

    /// The same. `freed` provides the words that record the acknowledged pages of each region, if another process may
    /// take over.
    pub(crate) fn land_keeping(
        &self,
        landing: RegionTable,
        freed: impl Fn(RegionId, u64) -> Result<Option<AtomicWords>>,
    ) -> Result<()> {
        for (region, (id, landed)) in self.regions.iter().zip(landing.iter()) {
            if let Some(staging) = self.staging_of(id)
                && landed.page_size.bytes() != STAGED_PAGE_BYTES
            {
                staging.keep_all();
            }
            let claims = Claims::new(landed.pages(), landed.page_size.shift());
            let acks = match self.releases {
                true => Some(match freed(id, landed.pages().div_ceil(64))? {
                    Some(words) => Acks::over(words, landed.pages()),
                    None => Acks::new(landed.pages()),
                }),
                false => None,
            };
            region.landing.get_or_init(|| Landing { unit: landed.page_size, claims, acks });
        }
        if self.has_rounds {
            let units =
                landing.iter().map(|(_, region)| (region.pages(), region.page_size.shift()));
            let units: Vec<_> = units.collect();
            self.tracked.get_or_init(|| Tracked::new(&units));
        }
        self.landing.get_or_init(|| landing);
        Ok(())
    }

    /// The guest has left, and an earlier umem process has sent its pages: the destination reports the pages that it
    /// misses.
    pub(crate) fn has_left(&self) {
        self.regions.iter().for_each(|region| region.claims().claim_all());
        self.stopped.store(true, Release);
    }

    /// The landing table.
    ///
    /// # Panics
    /// Before the destination is ready.
    pub(crate) fn landing(&self) -> &RegionTable {
        self.landing.get().expect("no page leaves before the destination is ready")
    }

    pub(crate) fn region(&self, id: RegionId) -> &SourceRegion {
        &self.regions[usize::from(id.0)]
    }

    /// Claims a demanded page; false if the page has been sent already.
    pub(crate) fn claim_demanded(&self, id: RegionId, page: u64) -> bool {
        self.region(id).claims().claim(page)
    }

    /// Sends a claimed page: appends header and contents to `answer`. Returns only contents larger than
    /// [`ANSWER_BYTES_MAX`], to be sent from the mapping. `holes` is a buffer for the query of the page's kind, without
    /// state of its own.
    ///
    /// A small page is read from its file and not through the mapping: that takes one system call instead of two (a
    /// hole must not be touched) and the mapping's page fault, and leaves one piece to send.
    pub(crate) fn answer(
        &self,
        page: PageRange,
        answer: &mut Vec<u8>,
        holes: &mut Holes,
        sealer: &mut Sealer,
    ) -> Result<(Run, Option<Memory>)> {
        let region = self.region(page.region);
        let (offset, unit) = (page.first << region.unit().shift(), region.unit().bytes());
        if unit > ANSWER_BYTES_MAX {
            holes.look_at(&region.ram, offset, unit)?;
            let run = Run { kind: holes.kind(&region.ram, offset, unit)?, range: page };
            let (header, pages) = self.pieces(&run, sealer)?;
            region.ram.check()?;
            answer.extend_from_slice(&header);
            return Ok((run, pages));
        }
        self.sending(page);
        let start = answer.len();
        let contents = start + HEADER_BYTES;
        answer.resize(contents + usize::try_from(unit).expect("64-bit Linux"), 0);
        region.ram.read_into(&mut answer[contents..], offset)?;
        // The bytes read are the guest's only if the file was still whole at that time.
        region.ram.check()?;
        if !zero::slice_is_zero(&answer[contents..]) {
            let header = sealer.page(page, &answer[contents..]);
            answer[start..contents].copy_from_slice(&header);
            return Ok((Run { kind: RunKind::Data, range: page }, None));
        }
        answer.truncate(start);
        holes.look_at(&region.ram, offset, unit)?;
        let kind = match holes.kind(&region.ram, offset, unit)? {
            RunKind::Hole => RunKind::Hole,
            // The guest has stopped, so zero pages stay zero.
            RunKind::Data | RunKind::Zero => RunKind::Zero,
        };
        let run = Run { kind, range: page };
        let header = sealer.run(&run, None).map_err(|Gone| region.ram.gone())?;
        answer.extend_from_slice(&header);
        Ok((run, None))
    }

    /// Notes that a run has been handed to the kernel, and whether it was demanded.
    pub(crate) fn count(&self, run: &Run, demanded: bool) {
        let bytes = self.bytes(run.range);
        Counters::add(
            match run.kind {
                RunKind::Data => &self.counters.data_bytes,
                RunKind::Zero => &self.counters.zero_bytes,
                RunKind::Hole => &self.counters.hole_bytes,
            },
            bytes,
        );
        Counters::add(&self.counters.pages_done, run.range.pages);
        let shift = self.region(run.range.region).unit().shift();
        self.counters.map.count(run.range, shift, run.kind, demanded);
    }

    /// The length of a range.
    pub(crate) fn bytes(&self, range: PageRange) -> u64 {
        range.pages * self.region(range.region).unit().bytes()
    }

    /// The error for undecodable bytes of a lane; called once for each lane.
    pub(crate) fn received(&self, lane: &str, error: &ReceiveError) -> Error {
        Counters::add(&self.counters.checksum_errors, error.is_corruption().into());
        Error::received("destination", lane, error)
    }

    /// The destination has cached these pages: they may be freed once the guest has been given away.
    pub(crate) fn acknowledged(&self, range: PageRange, lane: &str) -> Result<()> {
        if !self.stopped.load(Acquire) {
            return Err(Error::protocol(lane, "an acknowledgement before the guest had stopped"));
        }
        let region = self.region(range.region);
        let Some(acks) = &region.landing().acks else {
            return Err(Error::protocol(lane, "an unrequested acknowledgement"));
        };
        acks.acknowledge(range.first, range.pages).map_err(|NotSent { page }| {
            let name = &region.ram.name;
            let what = format!(
                "the acknowledged page {page} of RAM {name} was not sent, or was acknowledged before"
            );
            Error::protocol(lane, what)
        })?;
        if let Some(releaser) = self.releaser.get() {
            releaser.wake();
        }
        Ok(())
    }

    /// New lanes: records which of these pages the destination has, a bit each; the others are still to be sent. Pages
    /// are not sent meanwhile.
    pub(crate) fn account(&self, range: PageRange, words: &[u64], lane: &str) -> Result<()> {
        let region = self.region(range.region);
        let strange = |page: u64, what: &str| {
            let name = &region.ram.name;
            Error::protocol(lane, format!("page {page} of RAM {name} {what}"))
        };
        for (first, &has) in (range.first..).step_by(64).zip(words) {
            region.claims().account(first, has).map_err(|page| {
                strange(page, "was reported to be at the destination, but was not sent")
            })?;
            if let Some(acks) = &region.landing().acks {
                acks.account(first, has).map_err(|page| {
                    strange(page, "was acknowledged, and is now reported missing there")
                })?;
            }
        }
        Ok(())
    }

    /// Every page has been accounted for: pages may be claimed again. `totals` counts all pages that have arrived.
    pub(crate) fn accounted(&self, totals: &Totals) {
        self.regions.iter().for_each(|region| region.claims().free_blocks());
        // This process has sent nothing: an earlier one has sent what is there.
        if self.counters.pages_done.load(Relaxed) == 0 {
            self.map_earlier();
        }
        self.counters.set(totals);
        self.releaser.get().into_iter().for_each(Waker::wake);
    }

    /// Marks the pages that an earlier process has sent on the map.
    fn map_earlier(&self) {
        for (index, region) in self.regions.iter().enumerate() {
            let id = RegionId(u16::try_from(index).expect("a table has at most 256 regions"));
            region.claims().each_claimed(|first, pages| {
                let range = PageRange { region: id, first, pages };
                self.counters.map.count_earlier(range, region.unit().shift());
            });
        }
    }

    /// A run to be sent now: its header, and its pages if they are sent with it.
    pub(crate) fn pieces(
        &self,
        run: &Run,
        sealer: &mut Sealer,
    ) -> Result<([u8; HEADER_BYTES], Option<Memory>)> {
        self.sending(run.range);
        let contents = match run.kind {
            RunKind::Data => Some(self.contents(run.range)?),
            RunKind::Zero | RunKind::Hole => None,
        };
        let header = sealer.run(run, contents.as_ref());
        Ok((header.map_err(|Gone| self.region(run.range.region).ram.gone())?, contents))
    }

    /// Claims the files for this migration: a file of another migration is refused, and so is a byte in two regions.
    pub(crate) fn claim(&self, after_a_dead: bool) -> Result<()> {
        for (index, region) in self.regions.iter().enumerate() {
            let identity = region.ram.identity()?;
            for other in &self.regions[..index] {
                let (one, two) = (other.ram.part(), region.ram.part());
                let overlap = one.start < two.end && two.start < one.end;
                if overlap && other.ram.identity()? == identity {
                    return Err(Error::Usage(format!(
                        "RAM {} and RAM {} are the same file: give each region its own file",
                        other.ram.name, region.ram.name
                    )));
                }
            }
            region.ram.claim_for_source(after_a_dead)?;
        }
        Ok(())
    }

    /// The guest has stopped, or these are snapshots without a guest: from here on the files change only by pages that
    /// are freed here.
    pub(crate) fn fix(&self, are_snapshots: bool) -> Result<()> {
        self.regions.iter().try_for_each(|region| region.ram.fix(are_snapshots))
    }

    /// Fails if a file of these runs, which are about to be sent, has changed: pages that were read from it may have
    /// been gone by then.
    pub(crate) fn check_runs(&self, runs: &[Run]) -> Result<()> {
        let mut last = None;
        for run in runs {
            let region = run.range.region;
            if last.replace(region) != Some(region) {
                self.region(region).ram.check()?;
            }
        }
        Ok(())
    }

    /// Fails if any file has changed. With `sums` the contents have been compared, which is stronger evidence than the
    /// time of modification: only the length is checked then.
    pub(crate) fn check_files(&self, sums: bool) -> Result<()> {
        self.regions.iter().try_for_each(|region| match sums {
            true => region.ram.check_length(),
            false => region.ram.check(),
        })
    }

    /// The reason of a failed send, if the reason is the memory and not the connection.
    pub(crate) fn why_unsent(&self, runs: &[Run], errno: Option<i32>) -> Result<()> {
        self.check_files(false)?;
        match runs.first() {
            Some(run) if errno == Some(libc::EFAULT) => {
                Err(self.region(run.range.region).ram.gone())
            }
            _ => Ok(()),
        }
    }

    /// From here on these pages may be acknowledged.
    fn sending(&self, range: PageRange) {
        if let Some(acks) = &self.region(range.region).landing().acks {
            acks.sending(range.first, range.pages);
        }
    }

    /// Bytes of a run that cross the wire as page contents.
    pub(crate) fn data_bytes(&self, run: &Run) -> u64 {
        if run.kind == RunKind::Data { self.bytes(run.range) } else { 0 }
    }

    /// The pages of a data run, to be sent: from the mapping, or from a copy if one landing unit holds holes of the
    /// file, which a send would allocate. A unit over [`RUN_BYTES_MAX`] is not copied, and its holes are allocated.
    fn contents(&self, range: PageRange) -> Result<Memory> {
        let region = self.region(range.region);
        let (offset, len) = (range.first * region.unit().bytes(), self.bytes(range));
        let may_have_holes = region.unit().shift() > region.ram.page_shift;
        if may_have_holes && len <= RUN_BYTES_MAX && !region.ram.is_resident(offset, len)? {
            return Ok(Memory::from(region.ram.read(offset, len)?));
        }
        Ok(Memory::from(region.ram.span(offset, len)))
    }

    /// Bytes of memory that the files hold.
    pub(crate) fn allocated_bytes(&self) -> Result<u64> {
        let mut files = BTreeMap::new();
        for SourceRegion { ram, .. } in &self.regions {
            let (bytes, _) = files.entry(ram.identity()?).or_insert((0, ram));
            *bytes += ram.bytes;
        }
        // A file that is longer than its regions may hold more.
        files.values().map(|(bytes, ram)| Ok(ram.file_bytes()?.min(*bytes))).sum()
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.ram.bytes).sum()
    }
}

impl SourceRegion {
    fn landing(&self) -> &Landing {
        self.landing.get().expect("no page leaves before the destination is ready")
    }

    fn claims(&self) -> &Claims {
        &self.landing().claims
    }

    /// Takes some of the acknowledged pages, as ranges of bytes (offset and length); the caller frees them.
    pub(crate) fn take_acknowledged(&self, mut range: impl FnMut(u64, u64)) {
        if let Some(acks) = &self.landing().acks {
            let unit = self.unit().bytes();
            acks.take(|pages| range(pages.start * unit, (pages.end - pages.start) * unit));
        }
    }

    /// The landing unit.
    pub(crate) fn unit(&self) -> PageSize {
        self.landing().unit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    /// A file of 4 MiB + 3 pages, or 8 MiB for large units: data in pages 5 to 9 and 600, zeroes
    /// written in page 7 and 601, and in 1024.
    fn memory_in(unit: PageSize) -> SourceMemory {
        let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        let is_small = unit == PageSize::SIZE_4K;
        let bytes = if is_small { (4 << 20) + 3 * 4096 } else { 8 << 20 };
        file.as_file().set_len(bytes).unwrap();
        for page in [5, 6, 7, 8, 9, 600, 601u64] {
            file.seek(SeekFrom::Start(page * 4096)).unwrap();
            let byte = if page == 7 || page == 601 { 0 } else { 0xa5 };
            file.write_all(&[byte; 4096]).unwrap();
        }
        if !is_small {
            file.seek(SeekFrom::Start(1024 * 4096)).unwrap();
            file.write_all(&[0; 4096]).unwrap();
        }
        let ram = vec![RamFile::open_source("ram0", file.path(), false).unwrap()];
        let memory = SourceMemory::new(ram, false);
        memory.land(memory.table().unwrap().with_units(&[unit]).unwrap());
        memory
    }

    fn memory() -> SourceMemory {
        memory_in(PageSize::SIZE_4K)
    }

    fn all(memory: &SourceMemory) -> Vec<(RunKind, u64, u64)> {
        let mut walk = Walk::new(memory, 0, 1);
        let mut runs = Vec::new();
        while walk.next_runs(memory, u64::MAX, &mut runs).unwrap() {}
        runs.iter().map(|run| (run.kind, run.range.first, run.range.pages)).collect()
    }

    /// The result of a demand for a page, if there is one.
    fn demanded(memory: &SourceMemory, page: u64) -> Option<RunKind> {
        let region = RegionId(0);
        let unit = memory.region(region).unit().bytes() as usize;
        let range = PageRange { region, first: page, pages: 1 };
        memory.claim_demanded(region, page).then(|| {
            let mut answer = vec![0xa5; 3];
            let (mut holes, mut sealer) = (Holes::default(), Sealer::new(false));
            let (run, contents) =
                memory.answer(range, &mut answer, &mut holes, &mut sealer).unwrap();
            assert_eq!(run.range, range);
            assert_eq!(answer[3..3 + HEADER_BYTES], Sealer::new(false).run(&run, None).unwrap());
            let bytes = answer.len() - 3 - HEADER_BYTES + contents.map_or(0, |pages| pages.len());
            assert_eq!(bytes, if run.kind == RunKind::Data { unit } else { 0 });
            run.kind
        })
    }

    #[test]
    fn answer_is_a_header_and_the_page() {
        let memory = memory();
        let mut answer = Vec::new();
        for page in [5, 7] {
            assert!(memory.claim_demanded(RegionId(0), page));
            let range = PageRange { region: RegionId(0), first: page, pages: 1 };
            let (mut holes, mut sealer) = (Holes::default(), Sealer::new(false));
            let answered = memory.answer(range, &mut answer, &mut holes, &mut sealer).unwrap();
            assert!(answered.1.is_none());
        }
        assert_eq!(answer.len(), 2 * HEADER_BYTES + 4096);
        assert!(answer[HEADER_BYTES..HEADER_BYTES + 4096].iter().all(|&byte| byte == 0xa5));
    }

    #[test]
    fn holes_and_zeroes_are_distinguished_from_data() {
        let expected = [
            (RunKind::Hole, 0, 5),
            (RunKind::Data, 5, 2),
            (RunKind::Zero, 7, 1),
            (RunKind::Data, 8, 2),
            (RunKind::Hole, 10, 590),
            (RunKind::Data, 600, 1),
            (RunKind::Zero, 601, 1),
            (RunKind::Hole, 602, 425),
        ];
        let memory = memory();
        assert_eq!(all(&memory), expected);
        assert_eq!(memory.regions[0].ram.allocated_bytes().unwrap(), 7 * 4096, "read no hole");
    }

    #[test]
    fn large_unit_is_data_if_any_of_its_pages_is() {
        let small = PageSize::from_shift(14).unwrap();
        let memory = memory_in(small);
        let expected = [
            (RunKind::Hole, 0, 1),
            (RunKind::Data, 1, 2),
            (RunKind::Hole, 3, 147),
            (RunKind::Data, 150, 1),
            (RunKind::Hole, 151, 105),
            (RunKind::Zero, 256, 1),
            (RunKind::Hole, 257, 255),
        ];
        assert_eq!(all(&memory), expected);
        let memory = memory_in(PageSize::SIZE_2M);
        let expected = [
            (RunKind::Data, 0, 1),
            (RunKind::Data, 1, 1),
            (RunKind::Zero, 2, 1),
            (RunKind::Hole, 3, 1),
        ];
        assert_eq!(all(&memory), expected);
        let memory = memory_in(PageSize::SIZE_2M);
        let demand = |page| demanded(&memory, page);
        let kinds = [1, 2, 3, 1].map(demand);
        let (data, zero, hole) = (RunKind::Data, RunKind::Zero, RunKind::Hole);
        assert_eq!(kinds, [Some(data), Some(zero), Some(hole), None]);
        assert_eq!(memory.regions[0].ram.allocated_bytes().unwrap(), 8 * 4096, "read no hole");
    }

    #[test]
    fn unit_with_holes_is_sent_from_a_copy() {
        let memory = memory_in(PageSize::SIZE_2M);
        let first = PageRange { region: RegionId(0), first: 0, pages: 1 };
        let Memory::Bytes(bytes) = memory.contents(first).unwrap() else { panic!("no copy") };
        let mut expected = vec![0; 2 << 20];
        for page in [5, 6, 8, 9] {
            expected[page * 4096..(page + 1) * 4096].fill(0xa5);
        }
        assert!(bytes.as_slice() == expected);
        assert_eq!(memory.regions[0].ram.allocated_bytes().unwrap(), 8 * 4096, "read no hole");

        let memory = memory_in(PageSize::from_shift(13).unwrap());
        let whole = PageRange { region: RegionId(0), first: 4, pages: 1 };
        assert!(matches!(memory.contents(whole), Ok(Memory::Span(_))), "pages 8 and 9 are there");
    }

    #[test]
    fn demanded_page_is_sent_once() {
        let memory = memory();
        let demand = |page| demanded(&memory, page);
        assert_eq!(demand(6), Some(RunKind::Data));
        assert_eq!(demand(6), None);
        assert_eq!(demand(7), Some(RunKind::Zero));
        assert_eq!(demand(1000), Some(RunKind::Hole));
        let left = all(&memory);
        assert!(!left.iter().any(|&(_, first, pages)| (first..first + pages).contains(&6)));
        assert_eq!(left.iter().map(|(_, _, pages)| pages).sum::<u64>(), 1024 + 3 - 3);
    }

    #[test]
    fn walk_continues_from_the_last_demand() {
        let memory = memory();
        let mut walk = Walk::new(&memory, 0, 1);
        let mut runs = Vec::new();
        memory.pivot.set(RegionId(0), 700);
        walk.next_runs(&memory, u64::MAX, &mut runs).unwrap();
        assert_eq!(runs[0].range.first, 512);
    }
}

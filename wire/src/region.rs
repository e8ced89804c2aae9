//! Regions of guest memory: the encoding of a table of regions, its validity, and what has to agree
//! between the two ends.
//!
//! A region's number ([`RegionId`]) is its index in its own side's table. Only the *source's*
//! numbers are used on the wire. [`RegionTable::compare`] maps them to the destination's, and
//! computes the *landing table*: the source's table with each region's landing unit in place of its
//! page size. Page numbers on the wire count units of the landing table.

use crate::bytes::{array, put, u64_at};
use crate::limits::*;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

const _: () = assert!(REGIONS_MAX * DESCRIPTOR_BYTES <= BODY_BYTES_MAX);

/// Bytes of one region in a regions frame.
pub const DESCRIPTOR_BYTES: usize = 80;

/// A region's descriptor: name, NUL padded · length in bytes · page size's logarithm · zeroes.
mod field {
    pub(super) const NAME: usize = 0;
    pub(super) const NAME_BYTES: usize = 64;
    pub(super) const BYTES: usize = 64;
    pub(super) const SHIFT: usize = 72;
    pub(super) const RESERVED: usize = 73;
    pub(super) const RESERVED_BYTES: usize = 7;
}

const _: () = assert!(field::NAME + field::NAME_BYTES == field::BYTES);
const _: () = assert!(field::RESERVED + field::RESERVED_BYTES == DESCRIPTOR_BYTES);
const _: () = assert!(field::NAME_BYTES == REGION_NAME_BYTES_MAX + 1);

/// A region's index in the table of the side that numbers it.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct RegionId(pub u16);

/// Consecutive pages of one region.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageRange {
    /// The region.
    pub region: RegionId,
    /// The first page's index in the region, counted in the region's landing unit.
    pub first: u64,
    /// The number of pages.
    pub pages: u64,
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages from {} in region {}", self.pages, self.first, self.region.0)
    }
}

/// The size of a region's pages: a power of two from 4 KiB to 1 GiB.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageSize {
    shift: u8,
}

impl PageSize {
    /// 4 KiB, everywhere.
    pub const SIZE_4K: PageSize = PageSize { shift: 12 };
    /// 2 MiB, hugetlbfs.
    pub const SIZE_2M: PageSize = PageSize { shift: 21 };
    /// 1 GiB, hugetlbfs.
    pub const SIZE_1G: PageSize = PageSize { shift: 30 };

    /// The page size of 2^`shift` bytes, for a shift from 12 to 30.
    pub const fn from_shift(shift: u8) -> Option<PageSize> {
        if shift < 12 || shift > 30 { None } else { Some(PageSize { shift }) }
    }

    /// The page size of this many bytes, if it is valid.
    pub const fn from_bytes(bytes: u64) -> Option<PageSize> {
        if !bytes.is_power_of_two() {
            return None;
        }
        PageSize::from_shift(bytes.trailing_zeros() as u8)
    }

    /// The page size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// The base-2 logarithm of the page size in bytes.
    pub const fn shift(self) -> u8 {
        self.shift
    }

    /// The most pages that one data run may have: [`RUN_BYTES_MAX`] worth, or one larger page.
    pub const fn run_pages_max(self) -> u64 {
        let pages = RUN_BYTES_MAX >> self.shift;
        if pages == 0 { 1 } else { pages }
    }

    /// The most pages of one data run on a checked lane: [`CHECKED_RUN_BYTES_MAX`] worth, or one
    /// larger page.
    pub const fn checked_run_pages_max(self) -> u64 {
        let pages = CHECKED_RUN_BYTES_MAX >> self.shift;
        if pages == 0 { 1 } else { pages }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Bytes(self.bytes()).fmt(f)
    }
}

/// A contiguous piece of guest RAM, as the ends compare it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Region {
    /// The name by which the two sides' regions are matched.
    pub name: String,
    /// The length in bytes, a multiple of the page size.
    pub bytes: u64,
    /// The size of its pages; in a landing table, its landing unit.
    pub page_size: PageSize,
}

impl Region {
    /// The length in pages.
    pub fn pages(&self) -> u64 {
        self.bytes >> self.page_size.shift
    }

    fn check(&self, index: usize) -> Result<(), RegionError> {
        let name_fits = (1..=REGION_NAME_BYTES_MAX).contains(&self.name.len());
        if !name_fits || self.name.chars().any(char::is_control) {
            return Err(RegionError::Name(index));
        }
        if self.bytes == 0 || !self.bytes.is_multiple_of(self.page_size.bytes()) {
            return Err(RegionError::Bytes { name: self.name.clone(), bytes: self.bytes });
        }
        Ok(())
    }

    fn encode(&self) -> [u8; DESCRIPTOR_BYTES] {
        let mut out = [0; DESCRIPTOR_BYTES];
        put(&mut out, field::NAME, self.name.as_bytes());
        put(&mut out, field::BYTES, &self.bytes.to_le_bytes());
        out[field::SHIFT] = self.page_size.shift;
        out
    }

    /// Reads one descriptor; its fields are checked with the rest of the table.
    fn decode(bytes: &[u8; DESCRIPTOR_BYTES], index: usize) -> Result<Region, RegionError> {
        let padded: [u8; field::NAME_BYTES] = array(bytes, field::NAME);
        let name_bytes = padded.iter().position(|&byte| byte == 0);
        let (name, padding) = padded.split_at(name_bytes.ok_or(RegionError::Name(index))?);
        if padding.iter().any(|&byte| byte != 0) {
            return Err(RegionError::Name(index));
        }
        let name = std::str::from_utf8(name).map_err(|_| RegionError::Name(index))?;
        if bytes[field::RESERVED..].iter().any(|&byte| byte != 0) {
            return Err(RegionError::Reserved(index));
        }
        let shift = bytes[field::SHIFT];
        let page_size =
            PageSize::from_shift(shift).ok_or(RegionError::PageSize { index, shift })?;
        Ok(Region { name: name.to_owned(), bytes: u64_at(bytes, field::BYTES), page_size })
    }
}

/// A checked table: 1 to [`REGIONS_MAX`] regions with different printable names, each of whole
/// pages, [`TOTAL_BYTES_MAX`] bytes at most in all. A clone shares the entries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegionTable {
    regions: Arc<[Region]>,
    total_bytes: u64,
}

impl RegionTable {
    /// Checks the regions; their order gives them their numbers.
    pub fn new(regions: Vec<Region>) -> Result<RegionTable, RegionError> {
        if regions.is_empty() {
            return Err(RegionError::Empty);
        }
        if regions.len() > REGIONS_MAX {
            return Err(RegionError::TooMany(regions.len()));
        }
        let mut names = BTreeSet::new();
        let mut total_bytes = 0u64;
        for (index, region) in regions.iter().enumerate() {
            region.check(index)?;
            if !names.insert(region.name.as_str()) {
                return Err(RegionError::Duplicate(region.name.clone()));
            }
            total_bytes = total_bytes
                .checked_add(region.bytes)
                .filter(|&total| total <= TOTAL_BYTES_MAX)
                .ok_or(RegionError::Total)?;
        }
        Ok(RegionTable { regions: regions.into(), total_bytes })
    }

    /// The region of this number.
    pub fn get(&self, id: RegionId) -> Option<&Region> {
        self.regions.get(usize::from(id.0))
    }

    /// The regions in order of their numbers.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (RegionId, &Region)> {
        self.regions.iter().enumerate().map(|(index, region)| (RegionId(index as u16), region))
    }

    /// How many regions, at least one.
    #[expect(clippy::len_without_is_empty, reason = "a table is never empty")]
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// The length of all regions, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// The length of a region, in its own pages; 0 for an unknown region.
    pub fn pages(&self, id: RegionId) -> u64 {
        self.get(id).map_or(0, Region::pages)
    }

    /// Checks that a range has at least one page and that all its pages exist.
    pub fn check(&self, range: PageRange) -> Result<(), RegionError> {
        let region = self.get(range.region).ok_or(RegionError::Unknown(range.region))?;
        if range.pages == 0 {
            return Err(RegionError::NoPages(range.region));
        }
        let region_pages = region.pages();
        match range.first.checked_add(range.pages) {
            Some(end) if end <= region_pages => Ok(()),
            _ => Err(RegionError::Outside { range, region_pages }),
        }
    }

    /// The landing units of a landing table, for a ready frame.
    pub fn units(&self) -> Vec<PageSize> {
        self.regions.iter().map(|region| region.page_size).collect()
    }

    /// The landing table for these units, one for each region in order. A unit is at least the
    /// region's page size and divides its length.
    pub fn with_units(&self, units: &[PageSize]) -> Result<RegionTable, RegionError> {
        if units.len() != self.len() {
            return Err(RegionError::UnitCount { units: units.len(), regions: self.len() });
        }
        let land = |(region, &unit): (&Region, &PageSize)| {
            let Region { name, bytes, page_size } = region.clone();
            if unit < page_size || !bytes.is_multiple_of(unit.bytes()) {
                return Err(RegionError::Unit { name, bytes, page_size, unit });
            }
            Ok(Region { name, bytes, page_size: unit })
        };
        let regions = self.regions.iter().zip(units).map(land).collect::<Result<_, _>>()?;
        Ok(RegionTable { regions, total_bytes: self.total_bytes })
    }

    /// Matches the source's table (`theirs`) with the destination's (`self`) by name; lengths must
    /// be equal. Page sizes may differ; the larger of the two is the landing unit, which divides
    /// the length because it is one side's page size.
    pub fn compare(&self, theirs: &RegionTable) -> Result<Agreement, RegionMismatch> {
        let mut ours: BTreeMap<&str, (RegionId, &Region)> =
            self.iter().map(|(id, region)| (region.name.as_str(), (id, region))).collect();
        let mut ids = Vec::with_capacity(theirs.len());
        let mut units = Vec::with_capacity(theirs.len());
        let mut differences = Vec::new();
        for (_, theirs) in theirs.iter() {
            match ours.remove(theirs.name.as_str()) {
                None => differences.push(RegionDifference::MissingHere(theirs.clone())),
                Some((id, ours)) if ours.bytes == theirs.bytes => {
                    ids.push(id);
                    units.push(ours.page_size.max(theirs.page_size));
                }
                Some((_, ours)) => differences
                    .push(RegionDifference::Unlike { ours: ours.clone(), theirs: theirs.clone() }),
            }
        }
        let unclaimed = ours.into_values().map(|(_, region)| region.clone());
        differences.extend(unclaimed.map(RegionDifference::MissingThere));
        if !differences.is_empty() {
            return Err(RegionMismatch { differences });
        }
        let landing = theirs.with_units(&units).expect("the larger of two page sizes fits both");
        Ok(Agreement { ids, landing })
    }

    /// Bytes that [`RegionTable::encode`] appends.
    pub(crate) fn encoded_bytes(&self) -> usize {
        self.len() * DESCRIPTOR_BYTES
    }

    /// Appends the body of a regions frame.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        for region in self.regions.iter() {
            out.extend_from_slice(&region.encode());
        }
    }

    /// Reads the body of a regions frame, whose length is a multiple of [`DESCRIPTOR_BYTES`].
    pub(crate) fn decode(body: &[u8]) -> Result<RegionTable, RegionError> {
        let (descriptors, rest) = body.as_chunks::<DESCRIPTOR_BYTES>();
        assert!(rest.is_empty(), "the header's length was checked");
        let regions = descriptors.iter().enumerate().map(|(i, bytes)| Region::decode(bytes, i));
        RegionTable::new(regions.collect::<Result<_, _>>()?)
    }
}

/// The agreement of two tables of the same memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Agreement {
    /// For each of the source's numbers, the number of the same region at the destination.
    pub ids: Vec<RegionId>,
    /// The landing table: the source's regions in landing units.
    pub landing: RegionTable,
}

/// Every difference between the two sides' memory; at least one. Its text is one line, from the
/// destination's point of view.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub struct RegionMismatch {
    /// Each difference: first the source's regions in order, then those only the destination has.
    pub differences: Vec<RegionDifference>,
}

/// One way in which the two sides' memory differs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RegionDifference {
    /// Only the source has this region.
    MissingHere(Region),
    /// Only the destination has this region.
    MissingThere(Region),
    /// Both sides have the region, with different lengths.
    Unlike {
        /// The destination's.
        ours: Region,
        /// The source's.
        theirs: Region,
    },
}

impl fmt::Display for RegionMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Differences that the text lists; more would not be read.
        const SHOWN_MAX: usize = 4;
        f.write_str("the two sides' memory differs: ")?;
        for (index, difference) in self.differences.iter().take(SHOWN_MAX).enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{difference}")?;
        }
        match self.differences.len().saturating_sub(SHOWN_MAX) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl fmt::Display for RegionDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegionDifference::MissingHere(region) => {
                write!(f, "the destination has no '{}' ({})", region.name, Bytes(region.bytes))
            }
            RegionDifference::MissingThere(region) => {
                write!(f, "the source has no '{}' ({})", region.name, Bytes(region.bytes))
            }
            RegionDifference::Unlike { ours, theirs } => write!(
                f,
                "'{}' is {} at the source, {} at the destination",
                ours.name,
                Bytes(theirs.bytes),
                Bytes(ours.bytes),
            ),
        }
    }
}

/// Bytes in the largest binary unit that divides them.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.iter().find(|(shift, _)| self.0.is_multiple_of(1 << shift)) {
            Some((shift, unit)) => write!(f, "{} {unit}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// An error in a table of regions, or in a range of pages.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RegionError {
    /// The table is empty.
    #[error("a table without regions")]
    Empty,
    /// The table has more than [`REGIONS_MAX`] entries.
    #[error("{0} regions, at most {REGIONS_MAX} are possible")]
    TooMany(usize),
    /// A name is empty, too long, not UTF-8, has control characters or is not padded with NUL.
    #[error("region {0}: its name must be 1 to {REGION_NAME_BYTES_MAX} bytes of printable UTF-8")]
    Name(usize),
    /// Two regions have one name.
    #[error("two regions have the name '{0}'")]
    Duplicate(String),
    /// A page size is not a power of two from 4 KiB to 1 GiB.
    #[error("region {index}: a page of 2^{shift} bytes (12 to 30 are possible)")]
    PageSize {
        /// Which region of the table.
        index: usize,
        /// The base-2 logarithm of the page size.
        shift: u8,
    },
    /// A length that is zero or not a multiple of the page size.
    #[error("region '{name}': {bytes} bytes are not a positive multiple of its page size")]
    Bytes {
        /// The region's name.
        name: String,
        /// Its length in bytes.
        bytes: u64,
    },
    /// All regions together are longer than [`TOTAL_BYTES_MAX`].
    #[error("the regions are more than {TOTAL_BYTES_MAX} bytes in all")]
    Total,
    /// A ready frame has more or fewer landing units than there are regions.
    #[error("{units} landing units for {regions} regions")]
    UnitCount {
        /// Units received.
        units: usize,
        /// Regions in the table.
        regions: usize,
    },
    /// A landing unit that is smaller than the region's pages, or does not divide the region.
    #[error("region '{name}' of {bytes} bytes in {page_size} pages cannot land in units of {unit}")]
    Unit {
        /// The region's name.
        name: String,
        /// Its length in bytes.
        bytes: u64,
        /// Its page size at the source.
        page_size: PageSize,
        /// The unit.
        unit: PageSize,
    },
    /// Padding in a region's descriptor is not zero.
    #[error("region {0}: reserved bytes are not zero")]
    Reserved(usize),
    /// No region has this number.
    #[error("there is no region {}", .0.0)]
    Unknown(RegionId),
    /// A range without pages.
    #[error("a range of no pages in region {}", .0.0)]
    NoPages(RegionId),
    /// A range that leaves its region.
    #[error("{range} is outside its region of {region_pages} pages")]
    Outside {
        /// The range.
        range: PageRange,
        /// The pages that the region has.
        region_pages: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(name: &str, bytes: u64, page_size: PageSize) -> Region {
        Region { name: name.into(), bytes, page_size }
    }

    fn table(regions: &[Region]) -> RegionTable {
        RegionTable::new(regions.to_vec()).expect("a table")
    }

    /// 'ram0', two pages of 4 KiB.
    fn descriptor() -> [u8; DESCRIPTOR_BYTES] {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..4].copy_from_slice(b"ram0");
        bytes[64..].copy_from_slice(&[0, 0x20, 0, 0, 0, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    /// The descriptor with one byte changed.
    fn with(at: usize, byte: u8) -> Result<RegionTable, RegionError> {
        let mut bytes = descriptor();
        bytes[at] = byte;
        RegionTable::decode(&bytes)
    }

    #[test]
    fn descriptor_layout_is_80_literal_bytes() {
        let ram0 = table(&[region("ram0", 8192, PageSize::SIZE_4K)]);
        let mut out = Vec::with_capacity(100);
        out.spare_capacity_mut().fill(std::mem::MaybeUninit::new(0xa5));
        ram0.encode(&mut out);
        assert_eq!(out, descriptor());
        assert_eq!(RegionTable::decode(&descriptor()), Ok(ram0));
    }

    #[test]
    fn invalid_descriptor_is_refused() {
        assert_eq!(with(0, 0), Err(RegionError::Name(0)));
        assert_eq!(with(0, 0x1b), Err(RegionError::Name(0)));
        assert_eq!(with(0, 0xff), Err(RegionError::Name(0)));
        assert_eq!(with(63, b'x'), Err(RegionError::Name(0)));
        assert_eq!(with(65, 0), Err(RegionError::Bytes { name: "ram0".into(), bytes: 0 }));
        assert_eq!(with(64, 1), Err(RegionError::Bytes { name: "ram0".into(), bytes: 0x2001 }));
        assert_eq!(with(71, 1), Err(RegionError::Total));
        assert_eq!(with(72, 11), Err(RegionError::PageSize { index: 0, shift: 11 }));
        assert_eq!(with(72, 64), Err(RegionError::PageSize { index: 0, shift: 64 }));
        assert_eq!(with(73, 1), Err(RegionError::Reserved(0)));
        assert_eq!(with(79, 1), Err(RegionError::Reserved(0)));
    }

    #[test]
    fn invalid_table_is_refused() {
        let page = region("a", 4096, PageSize::SIZE_4K);
        assert_eq!(RegionTable::new(vec![]), Err(RegionError::Empty));
        assert_eq!(
            RegionTable::new(vec![page.clone(), page.clone()]),
            Err(RegionError::Duplicate("a".into()))
        );
        let many = |count| (0..count).map(|i| region(&i.to_string(), 4096, PageSize::SIZE_4K));
        assert_eq!(table(&many(256).collect::<Vec<_>>()).len(), 256);
        assert_eq!(RegionTable::new(many(257).collect()), Err(RegionError::TooMany(257)));

        let most = region("b", TOTAL_BYTES_MAX, PageSize::SIZE_1G);
        assert_eq!(table(std::slice::from_ref(&most)).total_bytes(), TOTAL_BYTES_MAX);
        assert_eq!(RegionTable::new(vec![most.clone(), page]), Err(RegionError::Total));
        let wraps = region("c", 0u64.wrapping_sub(1 << 30), PageSize::SIZE_1G);
        assert_eq!(RegionTable::new(vec![most, wraps]), Err(RegionError::Total));

        let long = region(&"n".repeat(64), 4096, PageSize::SIZE_4K);
        assert_eq!(RegionTable::new(vec![long]), Err(RegionError::Name(0)));
    }

    #[test]
    fn range_outside_its_region_is_refused() {
        let table = table(&[region("a", 16384, PageSize::SIZE_4K)]);
        let check = |region, first, pages| {
            table.check(PageRange { region: RegionId(region), first, pages })
        };
        assert_eq!(check(0, 0, 4), Ok(()));
        assert_eq!(check(0, 3, 1), Ok(()));
        assert_eq!(check(0, 0, 0), Err(RegionError::NoPages(RegionId(0))));
        assert_eq!(check(1, 0, 1), Err(RegionError::Unknown(RegionId(1))));
        for (first, pages) in [(0, 5), (4, 1), (u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX)] {
            let range = PageRange { region: RegionId(0), first, pages };
            let outside = RegionError::Outside { range, region_pages: 4 };
            assert_eq!(check(0, first, pages), Err(outside));
        }
        assert_eq!((table.pages(RegionId(0)), table.pages(RegionId(1))), (4, 0));
    }

    #[test]
    fn page_size_is_a_power_of_two_from_4_kib_to_1_gib() {
        assert_eq!(PageSize::from_bytes(4096), Some(PageSize::SIZE_4K));
        assert_eq!(PageSize::from_bytes(1 << 30), Some(PageSize::SIZE_1G));
        for bytes in [0, 1, 2048, 4097, 1 << 31, u64::MAX] {
            assert_eq!(PageSize::from_bytes(bytes), None);
        }
        let sizes = [PageSize::SIZE_4K, PageSize::SIZE_2M, PageSize::SIZE_1G];
        assert_eq!(sizes.map(PageSize::run_pages_max), [512, 1, 1]);
        assert_eq!(sizes.map(PageSize::checked_run_pages_max), [16, 1, 1]);
        assert_eq!(sizes.map(|size| size.to_string()), ["4 KiB", "2 MiB", "1 GiB"]);
    }

    #[test]
    fn tables_are_matched_by_name() {
        let (a, b) = (region("a", 4096, PageSize::SIZE_4K), region("b", 8192, PageSize::SIZE_4K));
        let ours = table(&[a.clone(), b.clone()]);
        let theirs = table(&[b, a]);
        let ids = vec![RegionId(1), RegionId(0)];
        assert_eq!(ours.compare(&theirs), Ok(Agreement { ids, landing: theirs }));
        let ids = vec![RegionId(0), RegionId(1)];
        assert_eq!(ours.compare(&ours), Ok(Agreement { ids, landing: ours.clone() }));
    }

    #[test]
    fn larger_page_is_the_landing_unit() {
        let table = |sizes: [PageSize; 3]| {
            let region =
                |(index, size): (usize, PageSize)| region(&index.to_string(), 4 << 30, size);
            table(&sizes.into_iter().enumerate().map(region).collect::<Vec<_>>())
        };
        let (small, large, huge) = (PageSize::SIZE_4K, PageSize::SIZE_2M, PageSize::SIZE_1G);
        let (ours, theirs) = (table([small, huge, large]), table([large, small, large]));
        let landing = table([large, huge, large]);
        assert_eq!(ours.compare(&theirs).unwrap().landing, landing);
        assert_eq!(theirs.compare(&ours).unwrap().landing, landing);
        assert_eq!(landing.units(), [large, huge, large]);
        assert_eq!(theirs.with_units(&landing.units()), Ok(landing));
    }

    #[test]
    fn unit_that_does_not_fit_its_region_is_refused() {
        let three = region("three", 3 << 21, PageSize::SIZE_2M);
        let one = table(std::slice::from_ref(&three));
        let units = |units: usize| RegionError::UnitCount { units, regions: 1 };
        assert_eq!(one.with_units(&[]), Err(units(0)));
        assert_eq!(one.with_units(&[PageSize::SIZE_2M; 2]), Err(units(2)));
        // Smaller than a page; does not divide the length.
        for unit in [PageSize::SIZE_4K, PageSize::from_shift(22).unwrap(), PageSize::SIZE_1G] {
            let Region { name, bytes, page_size } = three.clone();
            let error = RegionError::Unit { name, bytes, page_size, unit };
            assert_eq!(one.with_units(&[unit]), Err(error));
        }
    }

    #[test]
    fn mismatch_text_is_one_line() {
        let ours = table(&[
            region("ram0", 1 << 31, PageSize::SIZE_4K),
            region("ours", 4096, PageSize::SIZE_4K),
        ]);
        let theirs = table(&[
            region("ram0", 1 << 30, PageSize::SIZE_2M),
            region("theirs", 3 << 20, PageSize::SIZE_4K),
        ]);
        let mismatch = ours.compare(&theirs).unwrap_err();
        assert_eq!(
            mismatch.to_string(),
            "the two sides' memory differs: 'ram0' is 1 GiB at the source, 2 GiB at the destination; \
             the destination has no 'theirs' (3 MiB); the source has no 'ours' (4 KiB)"
        );
        let many = (0..9).map(|i| region(&format!("m{i}"), 4096, PageSize::SIZE_4K)).collect();
        let mismatch = ours.compare(&RegionTable::new(many).unwrap()).unwrap_err();
        assert!(mismatch.to_string().ends_with("'m3' (4 KiB); and 7 more"), "{mismatch}");
    }
}

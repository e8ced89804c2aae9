//! Kinds of guest memory and their properties, all in this place.
//!
//! Two facts decide how pages land and become visible: the [`Kind`], which is how the guest's
//! process maps the memory, and the [`Backing`], which is the kind of its pages. [`RegionMemory`]
//! has both for one region, and a method for each property that the rest of the program uses. A new
//! kind of memory begins here: its column is added to these tables, and `tests::table` fails until
//! it is complete.
//!
//! Of a kind alone:
//!
//! | | shared | private | anonymous |
//! |---|---|---|---|
//! | [`lands_in_file`](Kind::lands_in_file) | yes | yes | no |
//! | [`is_mapped_shared`](Kind::is_mapped_shared) | yes | no | no |
//! | [`needs_touch`](Kind::needs_touch) | no | yes | no |
//! | [`keeps_discarded`](Kind::keeps_discarded) | no | yes | no |
//! | [`comes_from_owner`](Kind::comes_from_owner) | perhaps | no | always |
//!
//! Of a region. *Small*, *huge* and *hugetlb* are the [`Backing`]; private memory of hugetlb is
//! refused:
//!
//! | | shared, small | shared, huge | shared, hugetlb | private, small | private, huge | anonymous |
//! |---|---|---|---|---|---|---|
//! | [`is_copied_in`](RegionMemory::is_copied_in) | no | no | no | no | no | yes |
//! | [`is_received_into`](RegionMemory::is_received_into) | no | yes | yes | no | yes | no |
//! | [`can_be_spliced`](RegionMemory::can_be_spliced) | yes | no | no | yes | no | no |
//! | [`can_be_given`](RegionMemory::can_be_given) | yes, if units are pages | no | no | no | no | no |
//! | [`allocates_in_file`](RegionMemory::allocates_in_file) | no | no | yes | no | no | no |

use std::fmt;
use std::str::FromStr;

/// log2 of the bytes of the kernel's small page.
fn small_shift() -> u8 {
    super::small_page_bytes().trailing_zeros() as u8
}

/// How the destination's guest maps its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// MAP_SHARED of a file: pages land in the file, and a completed block leaves the userfaultfd.
    #[default]
    Shared,
    /// MAP_PRIVATE of a file: pages land in the file, the guest side touches them, which makes
    /// private copies, and the file's pages are released.
    Private,
    /// MAP_PRIVATE | MAP_ANONYMOUS: pages are copied in.
    Anonymous,
}

impl Kind {
    pub(crate) const ALL: [Kind; 3] = [Kind::Shared, Kind::Private, Kind::Anonymous];

    /// The name on the command line, in the hand-over message and in the report.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Shared => "shared",
            Kind::Private => "private",
            Kind::Anonymous => "anonymous",
        }
    }

    /// The memory has a file, into which this process can write pages before the guest sees them;
    /// the userfaultfd reports minor faults as well as missing ones, and UFFDIO_CONTINUE makes a
    /// page of the file visible. Otherwise a page waits in a buffer of this process until
    /// UFFDIO_COPY copies it into the guest.
    pub(crate) fn lands_in_file(self) -> bool {
        match self {
            Kind::Shared | Kind::Private => true,
            Kind::Anonymous => false,
        }
    }

    /// The guest maps its file MAP_SHARED: the file is the guest's memory, and a file system with
    /// huge pages provides them to the guest.
    pub(crate) fn is_mapped_shared(self) -> bool {
        match self {
            Kind::Shared => true,
            Kind::Private | Kind::Anonymous => false,
        }
    }

    /// The guest has its own copy of a landed page only after the guest side has touched the page;
    /// then the file's page is released, and the page's block leaves the userfaultfd. With other
    /// kinds a block leaves when its pages are cached. A page occupies the file only for a moment.
    pub(crate) fn needs_touch(self) -> bool {
        match self {
            Kind::Private => true,
            Kind::Shared | Kind::Anonymous => false,
        }
    }

    /// Pages that the guest discards stay in the file, in which this process has to punch holes.
    /// With a MAP_SHARED file the kernel does so.
    pub(crate) fn keeps_discarded(self) -> bool {
        self.lands_in_file() && !self.is_mapped_shared()
    }

    /// Whether only the process that owns the memory can hand it over (`--handoff`). None if either
    /// way is possible.
    pub(crate) fn comes_from_owner(self) -> Option<bool> {
        match self {
            Kind::Shared => None,
            Kind::Private => Some(false),
            Kind::Anonymous => Some(true),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Kind, String> {
        Kind::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            format!("the memory kinds are shared, private and anonymous, not {text:?}")
        })
    }
}

/// The kind of a memory's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Pages of 4 KiB, of tmpfs, of another file system, or anonymous.
    Small,
    /// A file system that makes huge pages where it can, and 4 KiB pages otherwise: tmpfs with
    /// `huge=`.
    Huge,
    /// Huge pages of the kernel's pool, which cannot be split (hugetlb).
    Hugetlb,
}

impl Backing {
    /// The backing of memory without a file, by the size of its pages.
    pub(crate) fn of_pages(page_shift: u8) -> Backing {
        if page_shift == small_shift() { Backing::Small } else { Backing::Hugetlb }
    }

    /// A fault allocates a huge page, and zeroes the whole of it.
    pub(crate) fn has_huge_pages(self) -> bool {
        self != Backing::Small
    }
}

/// The properties of one region's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionMemory {
    pub(crate) kind: Kind,
    pub(crate) backing: Backing,
    /// log2 of the size of the guest's pages.
    pub(crate) page_shift: u8,
    /// log2 of the landing unit, at least a page.
    pub(crate) unit_shift: u8,
}

impl RegionMemory {
    /// Pages wait in a buffer, on every lane, and UFFDIO_COPY copies them into the guest.
    pub(crate) fn is_copied_in(self) -> bool {
        !self.kind.lands_in_file()
    }

    /// Receiving into this process's mapping of the file is the fastest way to land a page: one
    /// fault makes a huge page. A receive into small pages faults on each of them, and each is
    /// zeroed first, so that writing to the file is faster (`umem-perf floor`).
    pub(crate) fn is_received_into(self) -> bool {
        self.kind.lands_in_file() && self.backing.has_huge_pages()
    }

    /// splice(2) can move pages from a pipe into the file, as fast as a write: the pages are small.
    pub(crate) fn can_be_spliced(self) -> bool {
        self.kind.lands_in_file() && !self.backing.has_huge_pages()
    }

    /// UFFDIO_COPY makes one page in the file, makes it visible and wakes its waiters. The kernel
    /// does so with small pages of a MAP_SHARED file, and a unit is one page.
    pub(crate) fn can_be_given(self) -> bool {
        self.kind.is_mapped_shared()
            && self.backing == Backing::Small
            && self.page_shift == small_shift()
            && self.unit_is_page()
    }

    /// UFFDIO_ZEROPAGE can make a page of zeroes; hugetlb has no such page, so one has to be copied
    /// in.
    pub(crate) fn has_zero_page(self) -> bool {
        self.page_shift == small_shift()
    }

    /// A page of zeroes that is a hole of the file is allocated there, as UFFDIO_ZEROPAGE cannot
    /// make it.
    pub(crate) fn allocates_in_file(self) -> bool {
        self.kind.lands_in_file() && self.backing == Backing::Hugetlb
    }

    /// The landing unit is one of the guest's pages.
    pub(crate) fn unit_is_page(self) -> bool {
        self.unit_shift == self.page_shift
    }

    /// Asserts the invariants of every possible region.
    ///
    /// # Panics
    /// For memory that no hand-over gives.
    pub(crate) fn assert_possible(self) {
        assert!(self.unit_shift >= self.page_shift, "{self:?}: a unit is a page at least");
        assert!(
            self.backing == Backing::Hugetlb || self.page_shift == small_shift(),
            "{self:?}: only hugetlb has pages that are not small"
        );
        assert!(
            self.kind.lands_in_file() || self.backing != Backing::Huge,
            "{self:?}: only a file system makes huge pages where it can"
        );
        assert!(
            !self.kind.needs_touch() || self.backing != Backing::Hugetlb,
            "{self:?}: private memory becomes small pages"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every possible region, as in the module's tables.
    const MADE: [(Kind, Backing); 7] = [
        (Kind::Shared, Backing::Small),
        (Kind::Shared, Backing::Huge),
        (Kind::Shared, Backing::Hugetlb),
        (Kind::Private, Backing::Small),
        (Kind::Private, Backing::Huge),
        (Kind::Anonymous, Backing::Small),
        (Kind::Anonymous, Backing::Hugetlb),
    ];

    fn region((kind, backing): (Kind, Backing)) -> RegionMemory {
        let page_shift = if backing == Backing::Hugetlb { 21 } else { small_shift() };
        RegionMemory { kind, backing, page_shift, unit_shift: page_shift }
    }

    /// The indexes of the regions for which it is true.
    fn which(is_so: impl Fn(RegionMemory) -> bool) -> Vec<usize> {
        let regions = MADE.map(region);
        regions.iter().for_each(|region| region.assert_possible());
        (0..MADE.len()).filter(|&index| is_so(regions[index])).collect()
    }

    #[test]
    fn each_region_has_the_properties_in_the_table() {
        assert_eq!(which(RegionMemory::is_copied_in), [5, 6]);
        assert_eq!(which(RegionMemory::is_received_into), [1, 2, 4]);
        assert_eq!(which(RegionMemory::can_be_spliced), [0, 3]);
        assert_eq!(which(RegionMemory::can_be_given), [0]);
        assert_eq!(which(RegionMemory::has_zero_page), [0, 1, 3, 4, 5]);
        assert_eq!(which(RegionMemory::allocates_in_file), [2]);
        assert_eq!(which(|region| region.kind.lands_in_file()), [0, 1, 2, 3, 4]);
        assert_eq!(which(|region| region.kind.is_mapped_shared()), [0, 1, 2]);
        assert_eq!(which(|region| region.kind.needs_touch()), [3, 4]);
        assert_eq!(which(|region| region.kind.keeps_discarded()), [3, 4]);
        assert_eq!(which(|region| region.kind.comes_from_owner() == Some(true)), [5, 6]);
        assert_eq!(which(|region| region.kind.comes_from_owner() == Some(false)), [3, 4]);
    }

    #[test]
    fn unit_of_several_pages_cannot_be_copied_in() {
        let page = region((Kind::Shared, Backing::Small));
        assert!(!RegionMemory { unit_shift: 21, ..page }.can_be_given());
    }

    /// Every page has exactly one way from a lane into memory.
    #[test]
    fn each_region_has_one_landing_method_for_background_pages() {
        for made in MADE.map(region) {
            let ways = [made.is_copied_in(), made.is_received_into(), made.can_be_spliced()];
            assert_eq!(ways.iter().filter(|&&way| way).count(), 1, "{made:?}");
        }
    }

    #[test]
    fn each_kind_parses_from_its_name() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert!("huge".parse::<Kind>().is_err());
    }
}

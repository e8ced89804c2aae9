//! The kind and contents of a test's memory, and its maximum size.

use std::fmt;
use std::fs::File;
use std::str::FromStr;

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use umem_wire::PageSize;

use crate::error::{Context, Error, Result};
use crate::memory::BLOCK_BYTES;
use crate::memory::kind::Kind;

/// The unit of page numbers and reports: the smallest landing unit.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// The most bytes of a pass: enough for its start and end not to matter, and few enough that the memory is freed in
/// time.
pub(crate) const REGION_BYTES_MAX: u64 = 512 << 20;

/// The most passes whose memory exists at a time: the one being filled, the next one that some lanes are in already,
/// one that waits to be freed and one being freed; or the one that is sent. Plus room for other programs.
pub(super) const REGIONS_ALIVE_MAX: u64 = 6;

/// Free pages of 2 MiB in the kernel's pool.
const HUGE_PAGES_FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// The size of a test's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PageKind {
    /// Shared: a memfd of 4 KiB pages, unless the system gives shared memory huge ones.
    #[serde(rename = "4K")]
    Small,
    /// Shared: a tmpfs that makes huge pages. Anonymous: from the kernel's pool (hugetlb).
    #[serde(rename = "2M")]
    Huge,
}

/// How the mapping that stands for the guest's is backed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MemoryKind {
    /// A file, MAP_SHARED: pages land in the file.
    Shared,
    /// MAP_PRIVATE | MAP_ANONYMOUS: pages are copied in.
    Anonymous,
}

/// The memory that pages land in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) kind: MemoryKind,
    pub(super) pages: PageKind,
}

impl Place {
    /// Pages of the kernel's pool.
    pub(super) fn is_hugetlb(self) -> bool {
        self == Place { kind: MemoryKind::Anonymous, pages: PageKind::Huge }
    }

    /// The landing unit: both sides derive it independently.
    pub(super) fn unit(self) -> PageSize {
        if self.is_hugetlb() { PageSize::SIZE_2M } else { PageSize::SIZE_4K }
    }

    /// Bytes of a pass that this machine has the memory for, whole blocks, with `directions` at once; `lands`: pages
    /// land here, too.
    pub(super) fn region_bytes(self, directions: u64, lands: bool) -> Result<u64> {
        let mut bytes = available_bytes()?;
        let what = "memory are available here";
        let mut remedy = "free some".to_owned();
        let mut of = what;
        if lands && self.is_hugetlb() {
            bytes = pool_bytes();
            of = "huge pages are free in the kernel's pool";
            remedy = format!(
                "`sysctl vm.nr_hugepages={}` makes enough for passes of 128 MiB",
                REGIONS_ALIVE_MAX * 64
            );
        }
        let region = (bytes / REGIONS_ALIVE_MAX / directions).min(REGION_BYTES_MAX);
        match region / BLOCK_BYTES * BLOCK_BYTES {
            0 => Err(Error::Bench(format!(
                "only {} MiB of {of}, too little to measure with: {remedy}",
                bytes >> 20
            ))),
            region => Ok(region),
        }
    }
}

fn available_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context(|| "/proc/meminfo")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.parse::<u64>().ok());
    Ok(kib.map_or(0, |kib| kib << 10))
}

/// None if the kernel has no pool.
fn pool_bytes() -> u64 {
    let text = std::fs::read_to_string(HUGE_PAGES_FREE).unwrap_or_default();
    text.trim().parse::<u64>().unwrap_or(0) * BLOCK_BYTES
}

impl PageKind {
    pub(super) fn bytes(self) -> u64 {
        match self {
            PageKind::Small => PAGE_BYTES,
            PageKind::Huge => BLOCK_BYTES,
        }
    }

    /// A memory file of such pages.
    pub(super) fn file(self, bytes: u64) -> Result<File> {
        let file = match self {
            PageKind::Small => {
                memfd_create(c"umem-bench", MFdFlags::MFD_CLOEXEC).context(|| "making a memfd")?
            }
            PageKind::Huge => {
                crate::programs::demo::huge_tmpfs_file(bytes.div_ceil(1 << 20)).ok_or_else(|| {
                    Error::Bench(
                        "no tmpfs with huge pages can be made here: run this side as root, or leave \
                         out --page-size 2M"
                            .into(),
                    )
                })?
            }
        };
        let file = File::from(file);
        file.set_len(bytes).context(|| "sizing a memory file")?;
        Ok(file)
    }
}

impl fmt::Display for PageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PageKind::Small => "4K",
            PageKind::Huge => "2M",
        })
    }
}

impl FromStr for PageKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<PageKind, String> {
        match text {
            "4K" | "4k" => Ok(PageKind::Small),
            "2M" | "2m" => Ok(PageKind::Huge),
            _ => Err(format!("pages are of 4K or 2M, not {text:?}")),
        }
    }
}

impl From<MemoryKind> for Kind {
    fn from(kind: MemoryKind) -> Kind {
        match kind {
            MemoryKind::Shared => Kind::Shared,
            MemoryKind::Anonymous => Kind::Anonymous,
        }
    }
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Kind::from(*self).fmt(f)
    }
}

impl FromStr for MemoryKind {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<MemoryKind, String> {
        match text.parse()? {
            Kind::Shared => Ok(MemoryKind::Shared),
            Kind::Anonymous => Ok(MemoryKind::Anonymous),
            Kind::Private => Err("private memory becomes a guest's own when the guest side touches \
                                  it, and there is no guest here: `umem demo --kind private` has one"
                .into()),
        }
    }
}

/// The contents of a page, by its number: every word of it.
pub(super) fn word(page: u64, index: usize) -> u64 {
    mix(page).wrapping_add(index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Mixes the numbers (splitmix64's finalizer).
fn mix(page: u64) -> u64 {
    let mut x = page.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Whether a page is one of the test's zero pages.
pub(super) fn is_zero(page: u64, zero_percent: u32) -> bool {
    mix(page) % 100 < u64::from(zero_percent)
}

/// A whole page.
pub(super) fn page_bytes(page: u64, zero_percent: u32, bytes: &mut [u8]) {
    if is_zero(page, zero_percent) {
        return bytes.fill(0);
    }
    for (index, chunk) in bytes.chunks_exact_mut(size_of::<u64>()).enumerate() {
        chunk.copy_from_slice(&word(page, index).to_le_bytes());
    }
}

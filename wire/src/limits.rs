//! Every limit of the protocol, by name. A peer that exceeds one gets a typed error. No limit is
//! negotiated, so both ends may size their buffers at compile time.

/// Bulk lanes in one session, without the demand lane.
///
/// One lane occupies one core on each side; 64 is well past the eight connections with which Cloud
/// Hypervisor fills a 100 GbE link.
pub const LANES_MAX: u16 = 64;

/// Regions in one table. QEMU guests have one to about twenty RAM blocks.
pub const REGIONS_MAX: usize = 256;

/// Bytes of a region's name, UTF-8, without the NUL that ends it on the wire.
pub const REGION_NAME_BYTES_MAX: usize = 63;

/// Bytes of all regions together: 4 PiB, so that no sum of lengths or offsets overflows, and every
/// page index (at most 2^40 pages of 4 KiB) fits a request's 48 bits.
pub const TOTAL_BYTES_MAX: u64 = 1 << 52;

/// Bytes in one data run, unless a single page is larger: then the run is that page.
///
/// 2 MiB is one huge page: one receive can fill it, and a demand page waits at most for this much
/// on its own lane. Zero and hole runs carry no bytes and may be as long as their region.
pub const RUN_BYTES_MAX: u64 = 2 << 20;

/// Bytes in one data run on a checked lane. The receiver holds the whole run until its sum is
/// checked; a buffer of this size stays in a core's L2 cache.
pub const CHECKED_RUN_BYTES_MAX: u64 = 64 << 10;

/// Pages in one request frame.
pub const REQUEST_ENTRIES_MAX: usize = 256;

/// Pages in one have frame, a bit each: 64 KiB of bits, the pages of 2 GiB at 4 KiB. A destination
/// reports its pages of 1 TiB in 512 frames.
pub const HAVE_PAGES_MAX: u64 = 8 * (64 << 10);

/// Runs of pages in one remaining frame, 64 KiB of them.
pub const REMAINING_RUNS_MAX: usize = 4096;

/// Bytes of device state in one frame.
pub const STATE_CHUNK_BYTES_MAX: usize = 64 << 10;

/// Total bytes of device state. QEMU with `x-ignore-shared` sends about 300 kB.
pub const STATE_BYTES_MAX: u64 = 256 << 20;

/// Bytes of text in an error frame, UTF-8.
pub const ERROR_TEXT_BYTES_MAX: usize = 512;

/// Bytes of text in a refusal, UTF-8: a welcome's length without magic, version and code.
pub const REFUSAL_TEXT_BYTES_MAX: usize = 116;

/// Bytes of any body: the largest of the limits above. Page bytes of a data run are not a body.
pub const BODY_BYTES_MAX: usize = STATE_CHUNK_BYTES_MAX;

const _: () = assert!(ERROR_TEXT_BYTES_MAX <= BODY_BYTES_MAX);
const _: () = assert!(HAVE_PAGES_MAX as usize / 8 <= BODY_BYTES_MAX);
const _: () = assert!(REGIONS_MAX <= 1 << 16);
const _: () = assert!(TOTAL_BYTES_MAX >> 12 <= 1 << 48);

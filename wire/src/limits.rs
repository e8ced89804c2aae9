//! Every limit of the protocol, by name. A peer that goes past one gets a typed error; none of them
//! is negotiated, so both ends may size their buffers at compile time.

/// Bulk lanes in one session, the demand lane not counted.
///
/// One lane occupies one core on each side; 64 is well past the eight connections with which Cloud
/// Hypervisor fills a 100 GbE link.
pub const LANES_MAX: u16 = 64;

/// Regions in one table. QEMU guests have one to about twenty RAM blocks.
pub const REGIONS_MAX: usize = 256;

/// Bytes of a region's name, UTF-8, without the NUL that ends it on the wire.
pub const REGION_NAME_BYTES_MAX: usize = 63;

/// Bytes of all regions together: 4 PiB, so that no sum of lengths or offsets overflows, and a page
/// index (at most 2^40 of them, at 4 KiB) always fits the 48 bits that a request has for it.
pub const TOTAL_BYTES_MAX: u64 = 1 << 52;

/// Bytes in one data run, unless a single page is larger: then the run is that page.
///
/// 2 MiB is one huge page: the receive that fills it can be one operation, and a demand page waits
/// behind at most this much on its own lane. Zero and hole runs carry no bytes and may be as long
/// as their region.
pub const RUN_BYTES_MAX: u64 = 2 << 20;

/// The same on a lane that is checked: whoever receives it holds it whole until its sum is known to be
/// right, and a buffer of that stays in a core's nearest cache but one.
pub const CHECKED_RUN_BYTES_MAX: u64 = 64 << 10;

/// Pages asked for in one request frame.
pub const REQUEST_ENTRIES_MAX: usize = 256;

/// Pages that one have frame speaks of, a bit each: 64 KiB of them, the pages of 2 GiB at 4 KiB. A
/// destination tells what it has of 1 TiB in 512 frames.
pub const HAVE_PAGES_MAX: u64 = 8 * (64 << 10);

/// Runs of pages in one remaining frame, 64 KiB of them.
pub const REMAINING_RUNS_MAX: usize = 4096;

/// Bytes of device state in one frame.
pub const STATE_CHUNK_BYTES_MAX: usize = 64 << 10;

/// Bytes of device state in all. QEMU with `x-ignore-shared` sends about 300 kB.
pub const STATE_BYTES_MAX: u64 = 256 << 20;

/// Bytes of text in an error frame, UTF-8.
pub const ERROR_TEXT_BYTES_MAX: usize = 512;

/// Bytes of text in a refusal, UTF-8: what is left of a welcome after magic, version and code.
pub const REFUSAL_TEXT_BYTES_MAX: usize = crate::HELLO_BYTES - 12;

/// Bytes that follow any header as a body: the largest of the limits above. Page bytes of a data
/// run are not a body.
pub const BODY_BYTES_MAX: usize = STATE_CHUNK_BYTES_MAX;

const _: () = assert!(REQUEST_ENTRIES_MAX * crate::frame::REQUEST_ENTRY_BYTES <= BODY_BYTES_MAX);
const _: () = assert!(REMAINING_RUNS_MAX * crate::frame::REMAINING_RUN_BYTES <= BODY_BYTES_MAX);
const _: () = assert!(REGIONS_MAX * crate::region::DESCRIPTOR_BYTES <= BODY_BYTES_MAX);
const _: () = assert!(REGIONS_MAX * crate::frame::UNIT_BYTES <= BODY_BYTES_MAX);
const _: () = assert!(REGIONS_MAX * crate::frame::DIGEST_BYTES <= BODY_BYTES_MAX);
const _: () = assert!(ERROR_TEXT_BYTES_MAX <= BODY_BYTES_MAX);
const _: () = assert!(HAVE_PAGES_MAX as usize / 8 <= BODY_BYTES_MAX);
const _: () = assert!(REGIONS_MAX <= 1 << 16);
const _: () = assert!(TOTAL_BYTES_MAX >> 12 <= 1 << 48);

//! Little-endian fields of a layout, by offset. A field outside the buffer is a mistake of this
//! crate: the offsets are constants beside each layout, whose sizes are asserted there.

/// The `N` bytes at `at`.
pub(crate) fn array<const N: usize>(buffer: &[u8], at: usize) -> [u8; N] {
    *buffer[at..].first_chunk().expect("field inside the layout")
}

pub(crate) fn u16_at(buffer: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(buffer, at))
}

pub(crate) fn u32_at(buffer: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(buffer, at))
}

pub(crate) fn u64_at(buffer: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(buffer, at))
}

/// Writes `bytes` at `at`.
pub(crate) fn put(buffer: &mut [u8], at: usize, bytes: &[u8]) {
    buffer[at..at + bytes.len()].copy_from_slice(bytes);
}

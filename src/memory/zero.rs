//! Whether a page is all zeroes, for umem's own buffers; [`guarded`](super::guarded) checks guest
//! memory.

/// True if all bytes of a buffer of umem's own are zero.
pub(crate) fn slice_is_zero(bytes: &[u8]) -> bool {
    // The compiler vectorizes the inner loop.
    bytes.chunks(64).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

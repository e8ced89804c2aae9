//! Whether a page in one of umem's buffers is all zeroes; [`guarded`](super::guarded) checks guest
//! memory.

/// True if all bytes of the buffer, which is umem's, are zero.
pub(crate) fn slice_is_zero(bytes: &[u8]) -> bool {
    // The compiler vectorizes the inner loop.
    bytes.chunks(64).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

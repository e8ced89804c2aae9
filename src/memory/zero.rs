//! Is a page all zeroes? Of buffers of our own; guest memory is looked at by [`guarded`](super::guarded).

/// True when all bytes of a buffer of our own are zero.
pub(crate) fn slice_is_zero(bytes: &[u8]) -> bool {
    // The compiler makes vector instructions of the inner loop.
    bytes.chunks(64).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

//! Is a page all zeroes? Read through raw pointers: the memory belongs to a guest.

use std::ptr::NonNull;

/// True when the `len` bytes from `start` are all zero.
///
/// Most pages that hold data differ from zero within their first cache line, so the scan leaves at
/// the first chunk that does.
///
/// # Safety
/// `start..start + len` is mapped and readable, `start` is 16-byte aligned and `len` is a multiple
/// of 64. Nobody needs to hold the memory still: a racing write gives either answer.
pub(crate) unsafe fn is_zero(start: NonNull<u8>, len: usize) -> bool {
    debug_assert!(start.as_ptr().addr().is_multiple_of(16) && len.is_multiple_of(64));
    let mut at = 0;
    while at < len {
        // SAFETY: at + 64 <= len, all inside the mapping that the caller vouches for.
        if unsafe { !chunk_is_zero(start.as_ptr().add(at)) } {
            return false;
        }
        at += 64;
    }
    true
}

/// True when all bytes of a buffer of our own are zero.
pub(crate) fn slice_is_zero(bytes: &[u8]) -> bool {
    // The compiler makes vector instructions of the inner loop.
    bytes.chunks(64).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// # Safety
/// 64 readable bytes at the 16-byte aligned `at`.
#[cfg(target_arch = "x86_64")]
unsafe fn chunk_is_zero(at: *const u8) -> bool {
    use std::arch::x86_64::{
        __m128i, _mm_cmpeq_epi8, _mm_load_si128, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128,
    };
    let at = at.cast::<__m128i>();
    // SAFETY: four aligned 16-byte loads within the caller's 64 bytes; SSE2 is part of x86-64.
    unsafe {
        let low = _mm_or_si128(_mm_load_si128(at), _mm_load_si128(at.add(1)));
        let high = _mm_or_si128(_mm_load_si128(at.add(2)), _mm_load_si128(at.add(3)));
        let all = _mm_cmpeq_epi8(_mm_or_si128(low, high), _mm_setzero_si128());
        _mm_movemask_epi8(all) == 0xffff
    }
}

/// # Safety
/// 64 readable bytes at the 16-byte aligned `at`.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn chunk_is_zero(at: *const u8) -> bool {
    let at = at.cast::<u64>();
    // SAFETY: eight aligned loads within the caller's 64 bytes.
    (0..8).fold(0, |all, i| all | unsafe { at.add(i).read() }) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Page([u8; 4096]);

    #[test]
    fn one_bit_anywhere_is_seen() {
        let mut page = Box::new(Page([0; 4096]));
        let start = NonNull::from(&mut *page).cast::<u8>();
        // SAFETY: the box is 4096 aligned bytes and outlives each call.
        assert!(unsafe { is_zero(start, 4096) });
        for at in 0..4096 {
            page.0[at] = 1 << (at % 8);
            // SAFETY: as above.
            assert!(unsafe { !is_zero(start, 4096) }, "byte {at}");
            page.0[at] = 0;
        }
    }
}

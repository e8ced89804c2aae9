//! Guest memory that umem reads, for its sum or to encrypt it: copied out, as there may be no
//! reference to it.

use umem_ring::{Memory, Span};

use super::guarded::{self, Gone};

/// Fills `to` with the data of one buffer or one piece of a mapping, from `offset` on.
pub(crate) fn copy_out(memory: &Memory, offset: usize, to: &mut [u8]) -> Result<(), Gone> {
    match memory {
        Memory::Bytes(bytes) => {
            to.copy_from_slice(&bytes.as_slice()[offset..][..to.len()]);
            Ok(())
        }
        Memory::Span(span) => copy_out_of_span(span, offset, to),
        Memory::Pieces(_) => unreachable!("a run is one piece of memory"),
    }
}

/// The same for a piece of a mapping. Bytes that are written at the same time are copied in any
/// state.
pub(crate) fn copy_out_of_span(span: &Span, offset: usize, to: &mut [u8]) -> Result<(), Gone> {
    assert!(offset + to.len() <= span.len(), "inside the span");
    // SAFETY: the bytes lie inside the span (asserted above), which its owner keeps mapped.
    unsafe { guarded::copy(span.as_ptr().add(offset), to) }
}

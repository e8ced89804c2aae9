//! Guest memory that is read here, for its sum or to be encrypted: copied out, as nobody may hold a reference
//! to it.

use umem_ring::{Memory, Span};

use super::guarded::{self, Gone};

/// Fills `to` from `offset` on of what is sent, one buffer or one piece of a mapping.
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

/// The same of a piece of a mapping. Bytes that somebody writes meanwhile are copied as whatever they are.
pub(crate) fn copy_out_of_span(span: &Span, offset: usize, to: &mut [u8]) -> Result<(), Gone> {
    assert!(offset + to.len() <= span.len(), "inside the span");
    // SAFETY: the bytes lie inside the span (asserted above), which its owner keeps mapped.
    unsafe { guarded::copy(span.as_ptr().add(offset), to) }
}

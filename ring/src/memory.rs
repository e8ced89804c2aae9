//! Memory that the kernel reads or writes while an operation is in flight.
//!
//! The table owns it for that time, so no other code can access it. [`Bytes`] are private to this
//! process. A [`Span`] is part of a mapping that a guest, a peer process or the kernel may write at
//! any moment: an address and a length for the kernel, with a share in the mapping's owner, and
//! never a Rust reference.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// The memory of an operation.
#[derive(Debug)]
pub enum Memory {
    /// A private buffer.
    Bytes(Bytes),
    /// A piece of a mapping.
    Span(Span),
    /// Several of the two above, in order; only for [`Op::SendVectored`](crate::Op::SendVectored).
    Pieces(Vec<Memory>),
}

impl Memory {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Memory::Bytes(bytes) => bytes.len(),
            Memory::Span(span) => span.len(),
            Memory::Pieces(pieces) => pieces.iter().map(Memory::len).sum(),
        }
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The buffer, if this is one.
    pub fn into_bytes(self) -> Option<Bytes> {
        match self {
            Memory::Bytes(bytes) => Some(bytes),
            Memory::Span(_) | Memory::Pieces(_) => None,
        }
    }

    /// The piece of a mapping, if this is one.
    pub fn into_span(self) -> Option<Span> {
        match self {
            Memory::Span(span) => Some(span),
            Memory::Bytes(_) | Memory::Pieces(_) => None,
        }
    }

    /// The pieces, if these are pieces.
    pub fn into_pieces(self) -> Option<Vec<Memory>> {
        match self {
            Memory::Pieces(pieces) => Some(pieces),
            Memory::Bytes(_) | Memory::Span(_) => None,
        }
    }

    /// The address of the bytes; valid while `self` is kept and its buffer not changed. Pieces have
    /// no single address: the caller has ruled them out.
    pub(crate) fn address(&mut self) -> *mut u8 {
        match self {
            Memory::Bytes(bytes) => bytes.address(),
            Memory::Span(span) => span.as_ptr(),
            Memory::Pieces(_) => std::ptr::null_mut(),
        }
    }
}

impl From<Bytes> for Memory {
    fn from(bytes: Bytes) -> Memory {
        Memory::Bytes(bytes)
    }
}

impl From<Vec<u8>> for Memory {
    fn from(vec: Vec<u8>) -> Memory {
        Memory::Bytes(vec.into())
    }
}

impl From<Span> for Memory {
    fn from(span: Span) -> Memory {
        Memory::Span(span)
    }
}

/// A buffer on the heap, and the part of it that is in use.
pub struct Bytes {
    storage: Vec<u8>,
    used: Range<usize>,
}

impl Bytes {
    /// A zeroed buffer of `len` bytes, all of them in use.
    pub fn with_capacity(len: usize) -> Bytes {
        vec![0; len].into()
    }

    /// Bytes in use.
    pub fn len(&self) -> usize {
        self.used.len()
    }

    /// Whether no bytes are in use.
    pub fn is_empty(&self) -> bool {
        self.used.is_empty()
    }

    /// Size of the whole buffer in bytes.
    pub fn capacity(&self) -> usize {
        self.storage.len()
    }

    /// The bytes in use.
    pub fn as_slice(&self) -> &[u8] {
        &self.storage[self.used.clone()]
    }

    /// The bytes in use.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.storage[self.used.clone()]
    }

    /// The same buffer with `range` of the *whole* buffer in use, whatever part was in use before;
    /// so the part can grow again.
    ///
    /// # Panics
    ///
    /// If `range` reaches beyond [`capacity`](Self::capacity).
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Bytes {
        assert!(
            range.start <= range.end && range.end <= self.storage.len(),
            "{range:?} of a buffer of {} bytes",
            self.storage.len()
        );
        Bytes { used: range, ..self }
    }

    /// The storage of the whole buffer.
    pub fn into_vec(self) -> Vec<u8> {
        self.storage
    }

    fn address(&mut self) -> *mut u8 {
        self.as_mut_slice().as_mut_ptr()
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(storage: Vec<u8>) -> Bytes {
        let used = 0..storage.len();
        Bytes { storage, used }
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({:?} of {})", self.used, self.storage.len())
    }
}

/// Part of a mapping that others may write, and a share in its owner.
#[derive(Clone)]
pub struct Span {
    start: NonNull<u8>,
    len: usize,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a span is an address and a length for the kernel; this crate never reads or writes
// through it, and the owner, which is Send and Sync, keeps the mapping alive wherever the span
// goes.
unsafe impl Send for Span {}
// SAFETY: as above; a shared span gives nothing but the address.
unsafe impl Sync for Span {}

impl Span {
    /// `len` bytes from `start`, mapped for as long as `owner` lives.
    ///
    /// # Safety
    ///
    /// Until the last clone of `owner` is dropped the range stays mapped, and anything may be written
    /// there at any time: no Rust reference to any of it exists.
    pub unsafe fn new(start: NonNull<u8>, len: usize, owner: Arc<dyn Any + Send + Sync>) -> Span {
        Span { start, len, owner }
    }

    /// Bytes in the span.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The start address. Must not become a reference.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// `len` bytes from `offset`; `None` if they are not all inside.
    pub fn sub(&self, offset: usize, len: usize) -> Option<Span> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset is within the span, which is one mapping of at most isize::MAX bytes that the
        // owner keeps mapped.
        let start = unsafe { self.start.add(offset) };
        Some(Span { start, len, owner: Arc::clone(&self.owner) })
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Span({:p}+{:#x})", self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(len: usize) -> Span {
        let owner = Arc::new(());
        // SAFETY: the address is never used.
        unsafe { Span::new(NonNull::dangling(), len, owner) }
    }

    #[test]
    fn sub_span_outside_its_span_is_none() {
        let whole = span(4096);
        assert_eq!(whole.sub(4096, 0).map(|s| s.len()), Some(0));
        assert_eq!(whole.sub(4095, 1).map(|s| s.as_ptr() as usize), Some(1 + 4095));
        assert!(whole.sub(4095, 2).is_none());
        assert!(whole.sub(usize::MAX, 2).is_none());
    }

    #[test]
    fn sliced_bytes_can_grow_to_the_whole_buffer() {
        let bytes = Bytes::from(vec![1, 2, 3, 4]).slice(1..3);
        assert_eq!(bytes.as_slice(), [2, 3]);
        assert_eq!(bytes.slice(0..4).as_slice(), [1, 2, 3, 4]);
    }

    #[test]
    #[should_panic(expected = "of a buffer of 4 bytes")]
    fn slice_beyond_the_buffer_panics() {
        let _ = Bytes::with_capacity(4).slice(2..5);
    }
}

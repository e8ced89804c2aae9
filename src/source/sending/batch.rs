//! Batches of runs for a bulk lane: pieces of the guest's memory and the headers before them, or
//! the TLS records made of both.

use umem_ring::{Fd, Memory, Op};
use umem_wire::HEADER_BYTES;
use umem_wire::limits::CHECKED_RUN_BYTES_MAX;

use super::pace::BATCH_BYTES_MIN;
use crate::memory::copy::copy_out;
use crate::memory::guarded::Gone;
use crate::transport::tls::{Channel, Outgoing};

/// Most runs of a batch, which is sent when it holds these, or as many bytes of pages as
/// [`Pace`](super::pace::Pace) allows. Each run is at most two pieces, and a vectored send takes
/// 1024.
pub(in crate::source) const BATCH_RUNS: usize = 256;

/// Bytes of the headers that usually precede a piece of pages.
const HEADERS_BYTES: usize = 16 * HEADER_BYTES;

/// Most bytes of headers, of a batch of zeroes and holes.
const HEADERS_BYTES_MAX: usize = BATCH_RUNS * HEADER_BYTES;

/// Copies of runs that are kept for the next batch; each has room for a run on a checked lane.
const COPIES_MAX: usize = BATCH_RUNS;
const COPY_BYTES: usize = CHECKED_RUN_BYTES_MAX as usize;
const _: () = assert!(COPY_BYTES > HEADERS_BYTES_MAX);

/// Reused storage of batches: the kernel returns it with each batch.
#[derive(Default)]
pub(in crate::source) struct Storage {
    /// Empty; one for each batch that can be in the kernel at once.
    pieces: Vec<Vec<Memory>>,
    /// Empty; one for each piece of headers.
    headers: Vec<Vec<u8>>,
    /// With the data of earlier runs; one for each run that is copied before it is sent.
    copies: Vec<Vec<u8>>,
    /// With TLS: the buffer of records. One batch is in the kernel at once.
    records: Option<Outgoing>,
}

impl Storage {
    /// An empty batch, of records if there is TLS.
    pub(in crate::source) fn batch(&mut self, has_tls: bool) -> Batch {
        if !has_tls {
            let pieces = self.pieces.pop().unwrap_or_else(|| Vec::with_capacity(2 * BATCH_RUNS));
            return Batch::Clear { pieces, headers: self.headers() };
        }
        let room = BATCH_BYTES_MIN as usize + HEADERS_BYTES_MAX;
        Batch::Secured(self.records.take().unwrap_or_else(|| Outgoing::with_room(room)))
    }

    /// A buffer for the pages of a run, of any length.
    pub(in crate::source) fn copy(&mut self) -> Vec<u8> {
        self.copies.pop().unwrap_or_else(|| Vec::with_capacity(COPY_BYTES))
    }

    fn take_back_bytes(&mut self, mut bytes: Vec<u8>) {
        if bytes.capacity() <= HEADERS_BYTES_MAX {
            bytes.clear();
            self.headers.push(bytes);
        } else if self.copies.len() < COPIES_MAX {
            self.copies.push(bytes);
        }
    }

    fn headers(&mut self) -> Vec<u8> {
        self.headers.pop().unwrap_or_else(|| Vec::with_capacity(HEADERS_BYTES))
    }

    pub(in crate::source) fn take_back(&mut self, memory: Memory, has_tls: bool) {
        let mut pieces = match memory {
            Memory::Pieces(pieces) => pieces,
            Memory::Bytes(records) if has_tls => {
                self.records = Some(Outgoing::reuse(records));
                return;
            }
            Memory::Bytes(_) | Memory::Span(_) => return,
        };
        for piece in pieces.drain(..) {
            if let Memory::Bytes(bytes) = piece {
                self.take_back_bytes(bytes.into_vec());
            }
        }
        self.pieces.push(pieces);
    }
}

/// Why a run cannot be sent.
pub(in crate::source) enum Unfit {
    /// The error of TLS.
    Secured(String),
    /// Its pages cannot be read.
    Gone,
}

/// Runs in one send.
pub(in crate::source) enum Batch {
    /// Headers without pages behind them yet wait for the next piece.
    Clear {
        pieces: Vec<Memory>,
        headers: Vec<u8>,
    },
    Secured(Outgoing),
}

impl Batch {
    /// Adds a run. An error is TLS's, or means that the pages cannot be read; nothing of the batch
    /// may be sent then.
    pub(in crate::source) fn add(
        &mut self,
        storage: &mut Storage,
        channel: &mut Channel,
        header: &[u8],
        pages: Option<Memory>,
    ) -> Result<(), Unfit> {
        match (self, pages) {
            (Batch::Clear { headers, .. }, None) => headers.extend_from_slice(header),
            (Batch::Clear { pieces, headers }, Some(pages)) => {
                headers.extend_from_slice(header);
                pieces.push(Memory::from(std::mem::replace(headers, storage.headers())));
                pieces.push(pages);
            }
            (Batch::Secured(out), pages) => {
                channel.append(out, header).map_err(Unfit::Secured)?;
                if let Some(pages) = pages {
                    let mut copied = Ok(());
                    let copy = |offset, room: &mut [u8]| {
                        copied = copied.and_then(|()| copy_out(&pages, offset, room));
                    };
                    let appended = channel.append_with(out, pages.len(), copy);
                    if let Memory::Bytes(bytes) = pages {
                        storage.take_back_bytes(bytes.into_vec());
                    }
                    copied.map_err(|Gone| Unfit::Gone)?;
                    appended.map_err(Unfit::Secured)?;
                }
            }
        }
        Ok(())
    }

    /// Adds the last frames of a TLS lane, and close_notify.
    pub(in crate::source) fn end(
        &mut self,
        channel: &mut Channel,
        frames: &[u8],
    ) -> Result<(), String> {
        match self {
            Batch::Clear { .. } => unreachable!("there is TLS"),
            Batch::Secured(out) => {
                channel.append(out, frames)?;
                channel.close(out)
            }
        }
    }

    pub(in crate::source) fn into_op(
        self,
        storage: &mut Storage,
        channel: &mut Channel,
        socket: &Fd,
        zero_copy: bool,
    ) -> Result<Op, String> {
        let fd = socket.clone();
        match self {
            Batch::Clear { mut pieces, headers } => {
                if headers.is_empty() {
                    storage.headers.push(headers);
                } else {
                    pieces.push(Memory::from(headers));
                }
                Ok(Op::SendVectored { fd, pieces, zero_copy, more: false })
            }
            Batch::Secured(mut out) => {
                channel.flush(&mut out)?;
                Ok(Op::send(fd, out.into_bytes()).wait_all())
            }
        }
    }
}

//! Batches of runs, as they leave on a bulk lane: pieces of the guest's memory and the headers before them,
//! or the records of TLS that are made of both.

use umem_ring::{Fd, Memory, Op};
use umem_wire::HEADER_BYTES;

use super::pace::BATCH_BYTES_MIN;
use crate::memory::copy::copy_out;
use crate::memory::guarded::Gone;
use crate::tls::{Channel, Outgoing};

/// The most runs of a batch, which is sent when it holds these, or as many bytes of pages as [`Pace`](super::pace::Pace) says.
/// Each run is two pieces at most, and a vectored send takes 1024.
pub(super) const BATCH_RUNS: usize = 256;

/// The headers that usually stand before a piece of pages.
const HEADERS_BYTES: usize = 16 * HEADER_BYTES;

/// A batch of zeroes and holes has no more than this of headers.
const HEADERS_BYTES_MAX: usize = BATCH_RUNS * HEADER_BYTES;

/// What batches are made of, used again and again: the kernel gives each batch back.
#[derive(Default)]
pub(super) struct Storage {
    /// Empty; one for each batch that can be in the kernel at once.
    pieces: Vec<Vec<Memory>>,
    /// Empty; one for each piece of headers.
    headers: Vec<Vec<u8>>,
    /// With TLS: where records are made. One batch is in the kernel at once.
    records: Option<Outgoing>,
}

impl Storage {
    /// An empty batch, of records where there is TLS.
    pub(super) fn batch(&mut self, has_tls: bool) -> Batch {
        if !has_tls {
            let pieces = self.pieces.pop().unwrap_or_else(|| Vec::with_capacity(2 * BATCH_RUNS));
            return Batch::Clear { pieces, headers: self.headers() };
        }
        let room = BATCH_BYTES_MIN as usize + HEADERS_BYTES_MAX;
        Batch::Secured(self.records.take().unwrap_or_else(|| Outgoing::with_room(room)))
    }

    fn headers(&mut self) -> Vec<u8> {
        self.headers.pop().unwrap_or_else(|| Vec::with_capacity(HEADERS_BYTES))
    }

    pub(super) fn take_back(&mut self, memory: Memory, has_tls: bool) {
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
                let mut headers = bytes.into_vec();
                // A copy of a large page is not what the next header needs.
                if headers.capacity() <= HEADERS_BYTES_MAX {
                    headers.clear();
                    self.headers.push(headers);
                }
            }
        }
        self.pieces.push(pieces);
    }
}

/// Why a run cannot leave.
pub(super) enum Unfit {
    /// What TLS says.
    Secured(String),
    /// Its pages cannot be read.
    Gone,
}

/// Runs that leave as one send.
pub(super) enum Batch {
    /// Headers that have no pages behind them yet wait for the next piece.
    Clear {
        pieces: Vec<Memory>,
        headers: Vec<u8>,
    },
    Secured(Outgoing),
}

impl Batch {
    /// Adds a run. An error says why TLS cannot go on, or that the pages are not there any more; nothing of the
    /// batch may leave then.
    pub(super) fn add(
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
                    copied.map_err(|Gone| Unfit::Gone)?;
                    appended.map_err(Unfit::Secured)?;
                }
            }
        }
        Ok(())
    }

    /// Adds the last frames of a lane of TLS, and says that nothing more comes.
    pub(super) fn end(&mut self, channel: &mut Channel, frames: &[u8]) -> Result<(), String> {
        match self {
            Batch::Clear { .. } => unreachable!("there is TLS"),
            Batch::Secured(out) => {
                channel.append(out, frames)?;
                channel.close(out)
            }
        }
    }

    pub(super) fn into_op(
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

//! The bytes that a guest's process writes to the hand-over socket, in any pieces, with any number of descriptors: the
//! parsed messages do not depend on the pieces.

/// Pieces of a size that the socket keeps apart.
const PIECE_BYTES_MAX: usize = 4096;

/// Byte 0 is the number of descriptors, byte 1 the number of pieces' lengths that follow; the rest is the message.
pub(crate) fn run(input: &[u8]) {
    let &[descriptors, pieces, ref rest @ ..] = input else { return };
    let (pieces, text) = rest.split_at(rest.len().min(pieces.into()));
    let descriptors = usize::from(descriptors % 8);
    let whole = umem::fuzz::handoff(descriptors, text.chunks(PIECE_BYTES_MAX));
    let mut lengths = pieces.iter().cycle();
    let mut left = text;
    let apart = std::iter::from_fn(|| {
        let length = lengths.next().map_or(PIECE_BYTES_MAX, |&length| usize::from(length) + 1);
        let (now, later) = left.split_at(length.min(left.len()));
        left = later;
        (!now.is_empty()).then_some(now)
    });
    let apart = umem::fuzz::handoff(descriptors, apart);
    match (whole, apart) {
        (Ok(whole), Ok(apart)) => assert_eq!(whole, apart),
        // Messages before the error may have been read with it, or before it.
        (Err(whole), Err(apart)) => assert!(!whole.is_empty() && !apart.is_empty()),
        (whole, apart) => panic!("{whole:?} whole, {apart:?} in pieces"),
    }
}

//! What people, monitors, the kernel and other programs write: texts, and the records of TLS.

use umem::Uri;

/// An address means the same when umem has written it.
pub(crate) fn uri(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    match text.parse::<Uri>() {
        Ok(uri) => assert_eq!(uri.to_string().parse(), Ok(uri)),
        Err(error) => assert!(!error.is_empty()),
    }
}

/// What a QMP socket says, from its greeting on.
pub(crate) fn qmp(input: &[u8]) {
    umem::fuzz::qmp(input);
}

/// Two numbers, an address and a size, and the lines of a process's `maps`.
pub(crate) fn maps(input: &[u8]) {
    let Some((numbers, text)) = input.split_first_chunk::<16>() else { return };
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| numbers[at + byte]));
    umem::fuzz::maps(text, number(0), number(8));
}

/// A session file.
pub(crate) fn session(input: &[u8]) {
    umem::fuzz::session(input);
}

/// What a client says at a control socket.
pub(crate) fn control(input: &[u8]) {
    umem::fuzz::control(input);
}

/// What a client asks of `--metrics`.
pub(crate) fn metrics(input: &[u8]) {
    umem::fuzz::metrics(input);
}

/// TLS records after the handshake: what a peer sends, and what somebody on the path makes of it.
pub(crate) fn records(input: &[u8]) {
    umem::fuzz::records(input);
}

//! Texts of users, monitors, the kernel and other programs, and the records of TLS.

use umem::Uri;

/// An address printed by umem parses to the same address.
pub(crate) fn uri(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    match text.parse::<Uri>() {
        Ok(uri) => assert_eq!(uri.to_string().parse(), Ok(uri)),
        Err(error) => assert!(!error.is_empty()),
    }
}

/// The bytes of a QMP socket, from its greeting on.
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

/// The commands of a client at a control socket.
pub(crate) fn control(input: &[u8]) {
    umem::fuzz::control(input);
}

/// The request of a client of `--metrics`.
pub(crate) fn metrics(input: &[u8]) {
    umem::fuzz::metrics(input);
}

/// TLS records after the handshake: sent by a peer, and changed by an attacker on the path.
pub(crate) fn records(input: &[u8]) {
    umem::fuzz::records(input);
}

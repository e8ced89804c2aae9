//! Texts that people and monitors write.

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

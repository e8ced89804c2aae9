//! The reason that an end sends when it gives up: a code for programs, a text for people.
//!
//! On the wire the code is 16 bits and the text is UTF-8 without control characters, in the body of
//! an error frame (up to [`ERROR_TEXT_BYTES_MAX`] bytes) or at the end of a refusal (up to
//! [`REFUSAL_TEXT_BYTES_MAX`](crate::limits::REFUSAL_TEXT_BYTES_MAX) bytes). The text may be shown
//! on a terminal as it is.

use crate::limits::ERROR_TEXT_BYTES_MAX;
use std::fmt;

/// An end's reason for giving up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The reason, for programs.
    pub code: FaultCode,
    /// The reason, for people: one line. Sending cuts it to [`ERROR_TEXT_BYTES_MAX`] bytes and
    /// turns control characters into spaces.
    pub text: String,
}

impl Fault {
    /// A fault whose text is cut and cleaned here, so that it arrives unchanged.
    pub fn new(code: FaultCode, text: &str) -> Fault {
        let mut bytes = Vec::new();
        push_text(&mut bytes, text, ERROR_TEXT_BYTES_MAX);
        let text = String::from_utf8(bytes).expect("made of whole characters");
        Fault { code, text }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.text.is_empty() {
            return self.code.fmt(f);
        }
        write!(f, "{} ({})", self.text, self.code)
    }
}

/// A code for the reason. Zero is never a code.
#[derive(Copy, Clone, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum FaultCode {
    /// The reason stands in the text. Codes that this version does not know are read as this one.
    Other = 1,
    /// The peer broke the protocol.
    Protocol = 2,
    /// The two sides' memory differs.
    RegionMismatch = 3,
    /// The destination's guest is missing, or not ready.
    NotReady = 4,
    /// Memory ran out.
    OutOfMemory = 5,
    /// The guest or its monitor failed.
    HostFailed = 6,
    /// A user or program asked to stop.
    Cancelled = 7,
    /// Wrong version, secret or session.
    Refused = 8,
    /// The source's copy of the guest's memory changed, or cannot be read. Repair may be possible:
    /// a destination whose guest may run waits for the source to come back, as after a lost
    /// connection.
    SourceMemory = 9,
    /// A destination's guest has exited for good after the switchover: the migration cannot continue,
    /// and the source's pages are needed no more. After the switchover every other code leaves that
    /// open, and the source keeps its pages.
    Ended = 10,
}

impl FaultCode {
    /// Every code, in order of its number.
    pub const ALL: [FaultCode; 10] = [
        FaultCode::Other,
        FaultCode::Protocol,
        FaultCode::RegionMismatch,
        FaultCode::NotReady,
        FaultCode::OutOfMemory,
        FaultCode::HostFailed,
        FaultCode::Cancelled,
        FaultCode::Refused,
        FaultCode::SourceMemory,
        FaultCode::Ended,
    ];

    /// The number on the wire.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// The code of a number; none for zero. A number that this version does not know is
    /// [`FaultCode::Other`].
    pub fn from_number(number: u16) -> Option<FaultCode> {
        if number == 0 {
            return None;
        }
        let known = FaultCode::ALL.into_iter().find(|code| code.number() == number);
        Some(known.unwrap_or(FaultCode::Other))
    }
}

impl fmt::Display for FaultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FaultCode::Other => "other",
            FaultCode::Protocol => "protocol error",
            FaultCode::RegionMismatch => "memory differs",
            FaultCode::NotReady => "not ready",
            FaultCode::OutOfMemory => "out of memory",
            FaultCode::HostFailed => "guest failed",
            FaultCode::Cancelled => "cancelled",
            FaultCode::Refused => "refused",
            FaultCode::SourceMemory => "the source's memory failed",
            FaultCode::Ended => "guest ended",
        })
    }
}

/// Appends as many whole characters of `text` as fit `bytes_max`, control characters as spaces.
pub(crate) fn push_text(out: &mut Vec<u8>, text: &str, bytes_max: usize) {
    let end = out.len() + bytes_max;
    for character in text.chars() {
        let character = if character.is_control() { ' ' } else { character };
        let mut utf8 = [0; 4];
        let utf8 = character.encode_utf8(&mut utf8).as_bytes();
        if out.len() + utf8.len() > end {
            return;
        }
        out.extend_from_slice(utf8);
    }
}

/// The text that a peer sent, if it is printable.
pub(crate) fn parse_text(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    (!text.chars().any(char::is_control)).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_keep_their_numbers() {
        let numbers = FaultCode::ALL.map(FaultCode::number);
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
        for code in FaultCode::ALL {
            assert_eq!(FaultCode::from_number(code.number()), Some(code));
        }
        assert_eq!(FaultCode::from_number(0), None);
        assert_eq!(FaultCode::from_number(11), Some(FaultCode::Other));
    }

    #[test]
    fn fault_text_is_cut_between_characters_and_loses_control_characters() {
        let long = "é".repeat(ERROR_TEXT_BYTES_MAX);
        let fault = Fault::new(FaultCode::Other, &format!("a\n{long}"));
        assert_eq!(fault.text.len(), ERROR_TEXT_BYTES_MAX);
        assert!(fault.text.starts_with("a é"));
        assert_eq!(parse_text(b"a\x1b[31m"), None);
        assert_eq!(parse_text(b"\xff"), None);
    }
}

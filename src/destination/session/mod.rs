//! Session records for a takeover, and the end of a session.

pub(in crate::destination) mod farewell;
pub(in crate::destination) mod keeping;
pub(crate) mod takeover;

//! What another process needs to go on, and how a session ends.

pub(in crate::destination) mod farewell;
pub(in crate::destination) mod keeping;
pub(crate) mod takeover;

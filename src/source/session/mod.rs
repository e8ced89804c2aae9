//! What goes on over other lanes, or in another process, and how it ends there.

pub(in crate::source) mod parting;
pub(in crate::source) mod reopening;
pub(crate) mod takeover;

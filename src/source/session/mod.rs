//! The continuation of a session over other lanes or in another process, and its end.

pub(in crate::source) mod parting;
pub(in crate::source) mod reopening;
pub(crate) mod takeover;
